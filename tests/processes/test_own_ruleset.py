"""The ruleset as a member of one workspace may see it: theirs and everybody's, of others not a word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from egressd.processes import evidence
from egressd.processes.evidence import Own, own_drift, own_text
from egressd.ruleset import build
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.wants import Element, NatEntry, WorkspaceWant

POOLS = Pools()
# (workspace, index, block, host, real address, links); names that begin alike, or like what is everybody's
TENANTS = [
    ("acme", 1, 5, "api.acme.test", "203.0.113.5", (7,)),
    ("acme-2", 2, 6, "api.acme-2.test", "203.0.113.6", (70, 8)),
    ("rival", 3, 7, "secret.rival.test", "203.0.113.77", (9,)),
    ("late", 4, 8, "late.test", "203.0.113.8", ()),
    ("eg7", 5, 9, "nine.test", "203.0.113.9", ()),
]
SCRIPT = """
import json, subprocess, sys
from egressd.kernel.nft import Nft
told = json.load(sys.stdin)
for device in told["devices"]:
    subprocess.run(["ip", "link", "add", device, "type", "veth", "peer", "name", f"p-{device}"], check=True)
nft = Nft()
nft.run(told["commands"])
nft.run(["add table ip stranger", "add chain ip stranger secret-rival"])
print(nft.list_text(), end="")
"""


def want(name: str, index: int, block: int, host: str) -> WorkspaceWant:
    elements = [
        Element(str(address), "tcp", port, int(Mark(kind, index, block)), host)
        for address in POOLS.synthetic(block)
        for port, kind in ((443, Kind.INSPECT), (8080, Kind.FORWARD))
    ]
    cidr = Element(f"10.{index}.0.0/16", "tcp", 5432, int(Mark(Kind.DIRECT, index, block + 20)), "cidr")
    guard = "observe" if name == "rival" else "enforce"
    return WorkspaceWant(name, index, guard, (*elements, cidr), connections=index + 100)


def nat(index: int, block: int, host: str, real: str) -> list[NatEntry]:
    mark = int(Mark(Kind.FORWARD, index, block))
    return [NatEntry(mark, str(POOLS.synthetic(block, slot)[0]), real, host) for slot in range(4)]


def listing(tenants: Sequence[tuple[str, int, int, str, str, tuple[int, ...]]]) -> str:
    """As nft prints it, from a network namespace that ends with the process that made it."""
    import json

    from egressd.model.identities import Link
    from egressd.ruleset.build import LinkWant

    commands = build.base(POOLS)
    for name, index, block, host, real, links in tenants:
        wanted = want(name, index, block, host)
        commands += build.workspace(wanted, POOLS)
        for number in links:
            lease = LinkWant(Link(number), name, quota=1000 + index, connections=200 + index)
            commands += build.link(lease, wanted, POOLS)
        commands += build.nat(nat(index, block, host, real), {})
    told = {"devices": [f"eg{n}" for t in tenants for n in t[5]], "commands": commands}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", SCRIPT],
        input=json.dumps(told), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole() -> str:
    if os.getuid() != 0:
        pytest.skip("a network namespace is made: root only")
    return listing(TENANTS)


def own(name: str) -> Own:
    index = next(index for each, index, *_ in TENANTS if each == name)
    devices = {each: frozenset(f"eg{number}" for number in links) for each, *_, links in TENANTS}
    return Own(
        workspace=name,
        index=index,
        devices=devices[name],
        static=evidence._static(POOLS),
    )


LINKS = "in|ok|denied|other|over_quota|opened|over_budget|quota|budget|connections"


def objects(text: str) -> list[str]:
    return re.findall(r"^\t(\w+ \S+) \{$", text, re.MULTILINE)


@pytest.mark.kernel
@pytest.mark.parametrize("name", [tenant[0] for tenant in TENANTS])
def test_no_other_workspaces_name_host_address_or_link_is_in_it(whole: str, name: str) -> None:
    text = own_text(whole, own(name))
    mine = next(tenant for tenant in TENANTS if tenant[0] == name)
    for other, index, block, host, real, links in TENANTS:
        if other == name:
            continue
        assert host not in text and real not in text and f"10.{index}.0.0" not in text
        assert str(POOLS.synthetic(block)[0]) not in text and str(POOLS.synthetic(block)[1]) not in text
        assert f"{int(Mark(Kind.FORWARD, index, block)):08x}" not in text
        if other != "late":  # what is everybody's begins like that, too
            assert not [each for each in objects(text) if re.search(rf" {other}_(?!{LINKS})", each)]
            assert not re.search(rf'"{other} |workspace {other}"', text)
        for number in links:
            of_it = {f"chain eg{number}", f"quota eg{number}_quota", f"chain eg{number}_connections"}
            of_it |= {f"counter eg{number}_{part}" for part in ("in", "ok", "denied", "other")}
            assert not of_it & set(objects(text)) and of_it <= set(objects(whole))
            assert f'"eg{number}"' not in text and f'"eg{number}_in"' not in text
    assert mine[3] in text and mine[4] in text
    for number in mine[5]:
        assert {f"chain eg{number}", f"counter eg{number}_in", f"quota eg{number}_quota"} <= set(
            objects(text)
        )
    for each in (
        f"map {name}_out4",
        f"chain {name}_4",
        f"chain {name}_quota",
        f"counter {name}_shape_denied",
    ):
        assert each in objects(text)


@pytest.mark.kernel
def test_what_is_everybodys_is_in_it_word_for_word(whole: str) -> None:
    text = own_text(whole, own("acme"))
    for chain in ("steer", "translate", "forwarding", "dial_4", "late_unmarked", "refuse"):
        (block,) = set(re.findall(rf"\tchain {chain} \{{\n.*?\n\t\}}\n", whole, re.DOTALL))
        assert block in text
    assert "169.254.0.0/16" in text and "counter late_invalid" in text
    assert text.count("table ") == 2 and "stranger" not in text
    assert text.count("# here stands what is not egressd's") == 1


@pytest.mark.kernel
def test_of_the_only_workspace_there_is_all_of_it_is_shown() -> None:
    if os.getuid() != 0:
        pytest.skip("a network namespace is made: root only")
    text = listing(TENANTS[:1])
    shown = own_text(text, Own("acme", 1, frozenset({"eg7"}), evidence._static(POOLS)))
    assert text.startswith(shown.partition("# here")[0])
    assert set(objects(shown)) == set(objects(text)) - {"chain secret-rival"}


DRIFT = [
    ("make chain netdev egressd acme_4", "make chain netdev egressd acme_4"),
    ("make chain netdev egressd acme-2_4", None),
    ("remove counter netdev egressd eg7_in", "remove counter netdev egressd eg7_in"),
    ("remove counter netdev egressd eg70_in", None),
    ("make counter netdev egressd eg7_shape_denied", None),  # a workspace's of that name
    ("empty chain netdev egressd eg7_quota", None),
    ("remove quota netdev egressd eg7_quota",) * 2,
    ("add to acme_out4: 198.18.0.20 . tcp . 443 (api.acme.test)",) * 2,
    ("remove from rival_out4: 198.18.0.28 . tcp . 443 (secret.rival.test)", None),
    ("remove from in: 0x8000c007 (rival secret.rival.test) and 3 more", "remove from in: elements"),
    ("write the 9 rules of inet egressd steer",) * 2,
    ("empty chain inet egressd steer",) * 2,
    ("table inet egressd is missing; table netdev egressd is dormant or has foreign flags",) * 2,
    ("remove chain inet egressd secret-of-rival", None),
    ("words that nobody says: secret.rival.test", "something that is not egressd's"),
]


@pytest.mark.parametrize(("line", "shown"), DRIFT, ids=[line for line, _ in DRIFT])
def test_drift_is_that_of_the_workspace_and_of_nobody(line: str, shown: str | None) -> None:
    assert own_drift([line], own("acme")) == ([] if shown is None else [shown])


def test_the_versions_are_known(tmp_path: Path) -> None:
    told = evidence.versions()
    assert told["nft"].startswith("nftables v") and told["kernel"].startswith("Linux ")
    assert re.fullmatch(r"[0-9a-f-]{36}", evidence.boot_id())
