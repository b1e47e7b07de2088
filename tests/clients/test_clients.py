"""The resolvers that programs really use, in real sandboxes: each finds what is allowed, in both families,
and each is told at once what is not. Own target (`make test-clients`): the clients are big packages."""

from __future__ import annotations

import shutil
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: four.test, ports: [7/tcp], verify: address}
  - {host: six.test, ports: [7/tcp], verify: address}
  - {host: broken.test, ports: [7/tcp], verify: address}
  - {host: "*.search.test", ports: [7/tcp], verify: address}
"""
SYNTHETIC = (ip_network("198.18.0.0/16"), ip_network("fd53:e9::/64"))
AT_ONCE = 2.0  # seconds, start of the client included; what is not answered takes five and more


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


@pytest.fixture(scope="module")
def programs(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Each client's words but for the name; what has to be built is built."""
    place = tmp_path_factory.mktemp("clients")
    for source in ("lookup.js", "Lookup.java"):
        shutil.copy(HERE / source, place)
    build("musl-gcc", "-static", "-O1", "-o", str(place / "musl"), str(HERE / "lookup.c"))
    build("javac", "-d", str(place), str(HERE / "Lookup.java"))
    go = {
        "CGO_ENABLED": "0",
        "GOCACHE": str(place / "cache"),
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
    }
    build("go", "build", "-o", str(place / "go"), str(HERE / "lookup.go"), env=go)
    shutil.rmtree(place / "cache")
    shutil.copytree(place, lab.path("clients"))
    lab.path("clients").chmod(0o755)
    inside = lab.inside("clients")
    return {
        "glibc": ["/usr/bin/getent", "ahosts"],
        "musl": [f"{inside}/musl"],
        "c-ares": ["/usr/bin/node", f"{inside}/lookup.js"],
        "java": ["/usr/bin/java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", inside, "Lookup"],
        "go": [f"{inside}/go"],
    }


def build(*words: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


def ask(daemon: Any, programs: dict[str, list[str]], client: str, name: str) -> Any:
    words = [*programs[client], name]
    return daemon.sandbox("acme", words, "--bind-ro", daemon.lab.inside("clients"))


def families(text: str) -> set[int]:
    """IP versions of the addresses printed; every one must be synthetic."""
    found = {ip_address(line.split()[0]) for line in text.splitlines()}
    assert all(any(a in network for network in SYNTHETIC if network.version == a.version) for a in found), (
        text
    )
    return {a.version for a in found}


CLIENTS = ("glibc", "musl", "c-ares", "java", "go")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("plain.test", {4, 6}), ("PLAIN.test", {4, 6}), ("four.test", {4}), ("six.test", {6}),
     ("first.search.test", {4, 6})],
)  # fmt: skip
def test_what_is_allowed_is_found(
    daemon: Any, programs: Any, internet: Any, client: str, name: str, expected: set[int]
) -> None:
    result = ask(daemon, programs, client, name)
    assert (result.status, families(result.out)) == (0, expected), result.out + result.err


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "name", ["evil.test", "sub.plain.test", "deep.er.search.test", "search.test", "test"]
)
def test_what_is_not_is_refused_at_once(
    daemon: Any, programs: Any, internet: Any, client: str, name: str
) -> None:
    result = ask(daemon, programs, client, name)
    assert result.status in (1, 2), result.out + result.err  # its own word, not that it did not start
    assert result.seconds < AT_ONCE * (2 if client == "java" else 1), f"{client} took {result.seconds:.1f} s"
    assert name not in {asked for asked, _ in internet.queries()}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_name_that_cannot_be_resolved_is_an_error(daemon: Any, programs: Any, client: str) -> None:
    result = ask(daemon, programs, client, "broken.test")
    assert result.status in (1, 2), result.out + result.err


# ---- dig and kdig: what the wire says


DIALOGUES = {
    # options and question -> words the answer must hold
    "an address": (("plain.test", "A"), ("NOERROR", "198.18.")),
    "IPv6": (("plain.test", "AAAA"), ("NOERROR", "fd53:e9:")),
    "over TCP": (("+tcp", "plain.test", "A"), ("NOERROR", "198.18.")),
    "case kept": (("pLaIn.TeSt", "A"), ("NOERROR", "pLaIn.TeSt.")),
    "without EDNS": (("+noedns", "plain.test", "A"), ("NOERROR", "198.18.")),
    "HTTPS": (("plain.test", "HTTPS"), ("NOERROR", "ANSWER: 0")),
    "SVCB": (("_dns.plain.test", "SVCB"), ("NXDOMAIN",)),
    "ANY": (("plain.test", "ANY"), ("NOERROR", "RFC8482")),
    "TXT": (("plain.test", "TXT"), ("NOERROR", "ANSWER: 0")),
    "denied": (("evil.test", "A"), ("NXDOMAIN", "Blocked", "not on the list")),
    "denied over TCP": (("+tcp", "evil.test", "AAAA"), ("NXDOMAIN", "Blocked")),
    "a wildcard's name": (("second.search.test", "A"), ("NOERROR", "198.18.")),
    "another class": (("-c", "CH", "version.bind", "TXT"), ("REFUSED",)),
    "client subnet": (("+subnet=192.0.2.0/24", "plain.test", "A"), ("NOERROR", "198.18.")),
}  # fmt: skip


@pytest.mark.parametrize("server", ["169.254.53.53", "fd53:53::53"])
@pytest.mark.parametrize("program", ["dig", "kdig"])
@pytest.mark.parametrize("what", DIALOGUES)
def test_what_the_wire_says(daemon: Any, internet: Any, program: str, server: str, what: str) -> None:
    words, expected = DIALOGUES[what]
    usual = {"dig": ["+tries=1"], "kdig": ["+retry=0", "+edns"]}[program]
    result = daemon.sandbox("acme", [f"/usr/bin/{program}", f"@{server}", "+timeout=3", *usual, *words])
    text = result.out.lower()
    assert [word for word in expected if word.lower() not in text] == [], result.out + result.err


def test_a_synthetic_address_tells_its_name(daemon: Any) -> None:
    """Both ways: what a name gave, asked in reverse, is that name."""
    for kind in ("A", "AAAA"):
        address = daemon.sandbox("acme", ["/usr/bin/dig", "+short", "plain.test", kind]).out.split()[0]
        assert daemon.sandbox("acme", ["/usr/bin/dig", "+short", "-x", address]).out.split() == [
            "plain.test."
        ]
