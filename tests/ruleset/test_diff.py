"""On a real kernel: what was built is read back as it was wanted, and every change leads there."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, host, local, network, policy, tcp, udp

from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.policy.compiled import Guard, Policy
from egressd.ruleset import build, diff, observe
from egressd.ruleset.allocate import allocate
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import SLOTS, Pools
from egressd.ruleset.objects import Chain, Key
from egressd.ruleset.plan import want
from egressd.ruleset.wants import NatEntry, WorkspaceWant

pytestmark = pytest.mark.kernel
POOLS = Pools()


@pytest.fixture(scope="module")
def nft() -> Iterator[Nft]:
    name = f"rs-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before, Path(f"/run/netns/{name}").open() as there:
        assert libc.setns(there.fileno(), 0) == 0
        made = Nft()
        assert libc.setns(before.fileno(), 0) == 0
    try:
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def reset(nft: Nft) -> None:
    nft.run(["flush ruleset"])
    nft.run(build.base(POOLS))


def seen(nft: Nft) -> observe.Observed:
    return observe.parse(nft.list_json(), nft.list_chains())


def wants(*policies: Policy) -> dict[str, WorkspaceWant]:
    allocation = allocate(policies)
    return {made.workspace: want(made, allocation, POOLS) for made in policies}


def leads(found: WorkspaceWant, real4: str, real6: str) -> dict[tuple[int, str], NatEntry]:
    entries = {}
    for element in found.elements:
        if element.mark >> 28 == 8:
            for slot in range(SLOTS):
                for address, real in zip(
                    POOLS.synthetic(element.mark & 0x3FFF, slot), (real4, real6), strict=True
                ):
                    entries[element.mark, str(address)] = NatEntry(
                        element.mark, str(address), real, element.comment
                    )
    return entries


FULL = [
    policy(*EXAMPLE),
    policy(*EXAMPLE, workspace="beta", guard=Guard.OBSERVE, connections=9),
    policy(workspace="in", guard=Guard.OFF),  # named like a set of ours, and a keyword
    policy(host("a.test"), workspace="eg1"),
    policy(network("2001:db8::1.2.3.4/128"), workspace="tcp"),  # inet_ntop may spell it otherwise
    policy(host("b.test"), workspace="late", connections=3),
]
# What a link may be held to, in turn.
BOUNDS: tuple[dict[str, Any], ...] = (
    {"quota": 1 << 20},
    {},
    {"connections": 1},
    {"quota": 1 << 62, "connections": 10_000},
    {"closed": True},
    {"quota": 5, "connections": 5, "closed": True},
)


def everything(policies: list[Policy]) -> Desired:
    made = wants(*policies)
    links = tuple(
        LinkWant(Link(number), name, **BOUNDS[number % len(BOUNDS)])
        for number, name in enumerate(sorted(made) * 2, 1)
    )
    nat = leads(made["acme"], "192.0.2.1", "2001:db8::1") if "acme" in made else {}
    return Desired(pools=POOLS, wants=made, links=links, nat=nat)


def construct(nft: Nft, wanted: Desired) -> None:
    reset(nft)
    for found in wanted.wants.values():
        nft.run(build.workspace(found, POOLS))
    for lease in wanted.links:
        nft.run(build.link(lease, wanted.wants[lease.workspace], POOLS))
    nft.run(build.nat(wanted.nat.values(), {}))


def test_what_was_built_is_what_is_listed(nft: Nft) -> None:
    """Every rule, set and element, in the words of this nft. If this fails on another version, the warden
    refuses to start there, and `observe.render` is what to look at."""
    wanted = everything(FULL)
    construct(nft, wanted)
    assert diff.plan(seen(nft), wanted) == ()
    assert not [
        r for thing in seen(nft).things.values() for r in getattr(thing, "rules", ()) if "foreign" in r
    ]


def test_from_nothing(nft: Nft) -> None:
    wanted = everything(FULL)
    nft.run(["flush ruleset"])
    nft.run(diff.commands(diff.plan(seen(nft), wanted)))
    assert diff.plan(seen(nft), wanted) == ()


def test_to_nothing(nft: Nft) -> None:
    wanted = everything(FULL)
    construct(nft, wanted)
    empty = Desired(pools=POOLS, wants={})
    nft.run(diff.commands(diff.plan(seen(nft), empty)))
    assert diff.plan(seen(nft), empty) == ()
    for lease in wanted.links:
        nft.run(build.unlink(lease.link))


def test_dropping_a_workspace_leaves_nothing_of_it(nft: Nft) -> None:
    reset(nft)
    for found in wants(*FULL).values():
        nft.run(build.workspace(found, POOLS))
        nft.run(build.drop_workspace(found))
    assert diff.plan(seen(nft), Desired(pools=POOLS, wants={})) == ()


rules = st.lists(
    st.one_of(
        st.integers(0, 6).map(lambda n: host(f"h{n}.test", tcp(443) + udp(443) if n % 2 else tcp(80))),
        st.integers(0, 3).map(lambda n: network(f"10.{n}.0.0/16")),
        st.integers(0, 3).map(lambda n: network(f"2001:db8:{n + 1}::/48")),
        st.integers(0, 2).map(lambda n: local(f"service{n}", 8000 + n)),
    ),
    max_size=8,
    unique_by=lambda rule: rule.key,
)
policies = st.builds(
    lambda found, guard, connections: policy(*found, guard=guard, connections=connections),
    rules,
    st.sampled_from(Guard),
    st.none() | st.integers(1, 9),
)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(before=policies, after=policies)
def test_every_change_leads_there(nft: Nft, before: Policy, after: Policy) -> None:
    """The fast path, which does not look, and the slow one, which does, agree."""
    one, two = everything([before]), everything([after])
    construct(nft, one)
    links = one.links
    nft.run(diff.commands(diff.changes(one.wants["acme"], two.wants["acme"], links=links)))
    goal = Desired(pools=POOLS, wants=two.wants, links=links, nat=one.nat)
    assert diff.plan(seen(nft), goal) == ()
    back = Desired(pools=POOLS, wants=one.wants, links=links, nat=one.nat)
    nft.run(diff.commands(diff.plan(seen(nft), back)))
    assert diff.plan(seen(nft), back) == ()


@few
@given(before=policies, after=policies)
def test_what_stays_is_not_touched(nft: Nft, before: Policy, after: Policy) -> None:
    one, two = wants(before)["acme"], wants(after)["acme"]
    stay = {e for e in one.elements if e in two.elements}
    text = "\n".join(diff.commands(diff.changes(one, two)))
    for element in stay:
        address = element.address.removesuffix("/32")
        assert f" {address} . {element.protocol} . {element.port} " not in text.replace(",", " ")
    assert "flush set" not in text
    assert "flush map" not in text


def test_nothing_to_do_is_nothing_done() -> None:
    found = wants(policy(*EXAMPLE))["acme"]
    assert diff.changes(found, found) == ()
    assert diff.changes(None, None) == ()
    with pytest.raises(ValueError):
        diff.changes(found, wants(policy(workspace="beta"))["beta"])


def test_operations_say_what_they_do() -> None:
    one, two = wants(policy(host("a.test")))["acme"], wants(policy(host("b.test")))["acme"]
    told = "\n".join(operation.describe() for operation in diff.changes(one, two))
    assert "remove from acme_out4" in told
    assert "(a.test)" in told
    assert "add to acme_out6" in told
    assert "(b.test)" in told


FOREIGN = [
    'add rule netdev egressd acme_4 ip saddr 1.2.3.4 meta mark set 0x80000001',
    "add rule inet egressd local_out accept",
    "add rule inet egressd steer meta l4proto tcp tproxy ip to 127.0.0.1:9999",
    "add rule inet egressd translate dnat ip to 10.0.0.1",
    "add rule inet egressd forwarding ct state established accept",
    "add rule netdev egressd refuse counter",
    "add rule netdev egressd refuse limit rate over 1/second accept",
    "add rule netdev egressd eg1 exthdr dst exists accept",
    "add rule inet egressd disguise masquerade random",
    "add rule inet egressd steer log",
    "add rule inet egressd steer meta mark set ct original packets",
    "add rule netdev egressd eg1 meta mark vmap { 3 : accept }",
    "add rule netdev egressd eg1 reject",
    "add rule inet egressd eg2_connections ct count over 9000 accept",
    "insert rule inet egressd eg2_connections accept",
    "add rule inet egressd steer iifname vmap { eg1 : accept }",
]  # fmt: skip


@pytest.mark.parametrize("rule", FOREIGN)
def test_a_rule_of_somebody_else_is_found_and_goes(nft: Nft, rule: str) -> None:
    wanted = everything(FULL)
    construct(nft, wanted)
    nft.run([rule])
    operations = diff.plan(seen(nft), wanted)
    assert any("rules of" in operation.describe() for operation in operations)
    nft.run(diff.commands(operations))
    assert diff.plan(seen(nft), wanted) == ()


@pytest.mark.parametrize("verdict", ["accept", "return", "goto eg2_connections", "jump refuse", None])
def test_an_element_that_leads_around_a_limit_is_found_and_goes(nft: Nft, verdict: str | None) -> None:
    wanted = everything(FULL)
    construct(nft, wanted)
    gone = 'delete element inet egressd connections { "eg2" }'
    nft.run([gone, *([f'add element inet egressd connections {{ "eg2" : {verdict} }}'] if verdict else [])])
    operations = diff.plan(seen(nft), wanted)
    assert any("add to connections" in operation.describe() for operation in operations)
    nft.run(diff.commands(operations))
    assert diff.plan(seen(nft), wanted) == ()


def test_a_limit_that_stays_is_not_written_anew(nft: Nft) -> None:
    """Its rule is what counts: another one would count from nothing."""
    before, after = (wants(policy(host(name), connections=9))["acme"] for name in ("a.test", "b.test"))
    links = [LinkWant(Link(1), "acme")]
    text = "\n".join(diff.commands(diff.changes(before, after, links=links)))
    assert "b.test" in text
    assert "connections" not in text
    other = wants(policy(host("a.test"), connections=8))["acme"]
    flushed, *written = diff.commands(diff.changes(before, other, links=links))
    assert flushed == "flush chain inet egressd eg1_connections"
    assert written[-1] == "add rule inet egressd eg1_connections ct count over 8 goto late_connections"


def test_a_policy_that_says_nothing_of_connections_bounds_them_all_the_same() -> None:
    """And saying something changes that one number: the rates are the same."""
    silent, more = (wants(policy(host("a.test"), connections=n))["acme"] for n in (None, 5000))
    rules = [build.connection_limit(LinkWant(Link(1), "acme"), want) for want in (silent, more)]
    (one, two) = (found[Key("inet", "chain", "eg1_connections")] for found in rules)
    assert isinstance(one, Chain) and isinstance(two, Chain)
    assert one.rules[:-1] == two.rules[:-1]
    assert (one.rules[-1], two.rules[-1]) == tuple(
        f"ct count over {number} goto late_connections" for number in (4096, 5000)
    )
    assert build.connection_limit(LinkWant(Link(1), "acme", closed=True), silent) == {}


def test_limits_that_hang_on_elements_become_rules(nft: Nft) -> None:
    """As an earlier version had them: `connections` was a set."""
    wanted = everything(FULL)
    construct(nft, wanted)
    steer = seen(nft).things[Key("inet", "chain", "steer")]
    assert isinstance(steer, Chain)
    old = [rule.replace("vmap @connections", "@connections goto late_connections") for rule in steer.rules]
    assert old != list(steer.rules)
    nft.run(["flush chain inet egressd steer", "delete map inet egressd connections",
             "flush chain inet egressd eg2_connections", "delete chain inet egressd eg2_connections",
             "add set inet egressd connections { type ifname; size 65535; flags dynamic; }",
             'add element inet egressd connections { "eg2" ct count over 9 comment "beta" }',
             *(f"add rule inet egressd steer {rule}" for rule in old)])  # fmt: skip
    nft.run(diff.commands(diff.plan(seen(nft), wanted)))
    assert diff.plan(seen(nft), wanted) == ()


def test_a_map_that_leads_to_chains_goes_with_them(nft: Nft) -> None:
    """The kernel keeps a chain (EBUSY) as long as an element leads there, though its map is about to go."""
    wanted = everything(FULL)
    construct(nft, wanted)
    nft.run(["add chain inet egressd other",
             "add map inet egressd extra { type ifname : verdict; }",
             'add element inet egressd extra { "x" : jump other }'])  # fmt: skip
    nft.run(diff.commands(diff.plan(seen(nft), wanted)))
    assert diff.plan(seen(nft), wanted) == ()


@pytest.mark.parametrize("guard", Guard)
def test_a_workspace_comes_and_goes_by_the_fast_path(nft: Nft, guard: Guard) -> None:
    reset(nft)
    found = wants(policy(*EXAMPLE, guard=guard, connections=3))
    nft.run(diff.commands(diff.changes(None, found["acme"])))
    assert diff.plan(seen(nft), Desired(pools=POOLS, wants=found)) == ()
    nft.run(diff.commands(diff.changes(found["acme"], None)))
    assert diff.plan(seen(nft), Desired(pools=POOLS, wants={})) == ()


def test_a_batch_that_fails_changes_nothing(nft: Nft) -> None:
    wanted = everything(FULL)
    construct(nft, wanted)
    with pytest.raises(KernelError, match="No such file"):
        nft.run(["flush chain netdev egressd acme_4", "delete counter netdev egressd not_there"])
    assert diff.plan(seen(nft), wanted) == ()
