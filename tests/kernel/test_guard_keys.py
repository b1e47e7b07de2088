"""The two keys, and what happens to open connections when one of them, or both, are taken away.

Each of these leaked, hung or lost counters in an earlier drawing of the ruleset.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from guard_topology import (
    ACME,
    HOST4,
    HOST6,
    POOLS,
    SERVER4,
    SERVER6,
    Guard,
    Limits,
    Topology,
    echo,
    frames,
    inspected,
    named,
    policy,
    poll,
    sh,
    tcp,
    topology,
    udp,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from egressd.model.identities import Link
from egressd.ruleset import build, diff
from egressd.ruleset.layout import GATEWAY_MAC, INSPECTOR_PORT, RELAY_PORT, SANDBOX_MAC
from egressd.ruleset.observe import Tally

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("key") as made:
        made.apply(policy(*ACME))
        made.connect(1)
        made.resolve("plain.test", SERVER4, SERVER6)
        made.resolve("quic.test", SERVER4, SERVER6)
        for address in (SERVER4, SERVER6):
            echo(made.server(made.internet, address, 80))
        yield made


def server(family: int) -> str:
    return SERVER4 if family == 4 else SERVER6


def open_stream(t: Topology, family: int) -> socket.socket:
    sock = t.client(1, t.address("plain.test", family), 80)
    sock.sendall(b"before")
    assert sock.recv(10) == b"before"
    return sock


def forged(t: Topology, family: int) -> list[bytes]:
    """SYNs and datagrams from sixteen sources to everything a sandbox might want."""
    found = []
    if family == 4:
        sources = [str(POOLS.sandbox(Link(1))[0]), "198.19.0.2", "10.9.9.9", HOST4, "169.254.54.2", SERVER4,
                   "127.0.0.1", "0.0.0.0"]  # fmt: skip
        targets = [SERVER4, HOST4, "169.254.54.1", "169.254.53.53", "127.0.0.1", t.address("plain.test", 4)]
        network: type[IP | IPv6] = IP
    else:
        sources = [str(POOLS.sandbox(Link(1))[1]), "fd53:1::2", "2001:db8:bad::1", HOST6, "fd53:2::2",
                   "fe80::1", "::1", "2001:db8:3::9"]  # fmt: skip
        targets = [SERVER6, HOST6, "fd53:2::1", "fd53:53::53", "fe80::53", t.address("plain.test", 6)]
        network = IPv6
    for source in sources:
        for target in targets:
            packet = network(src=source, dst=target)
            for upper in (TCP(sport=999, dport=80, flags="S"), UDP(sport=999, dport=53)):
                found.append(bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / packet / upper))
    return found


STATES = {
    "nft flushed": lambda t: t.nft.run(["flush ruleset"]),
    "tables dormant": lambda t: t.nft.run(
        [f"add table {family} egressd {{ flags dormant; }}" for family in ("netdev", "inet")]
    ),
    "guard gone": lambda t: t.nft.run(["delete table netdev egressd"]),
    "steering gone": lambda t: t.nft.run(["delete table inet egressd"]),
    "rules flushed": lambda t: [sh(f"ip -n {t.gateway} {f} rule flush") for f in ("-4", "-6")],
    "both flushed": lambda t: (STATES["nft flushed"](t), STATES["rules flushed"](t)),
}


@pytest.mark.parametrize("state", STATES)
def test_nothing_leaves_and_no_service_answers(there: Topology, state: str) -> None:
    """With open flows of every kind. Packets of the flows, new connections, forged packets."""
    streams = [open_stream(there, family) for family in (4, 6)]
    inspector = [there.server(there.gateway, a, RELAY_PORT, transparent=True) for a in ("127.0.0.1", "::1")]
    steered = [there.client(1, there.address("ollama", family), 11434) for family in (4, 6)]
    read = [listener.accept()[0] for listener in inspector]
    for address in (HOST4, HOST6, "169.254.54.1", "fd53:2::1"):
        echo(there.server(there.host, address, 80))
    uplink, wire = there.raw(there.internet, "inet0"), there.raw(there.sandbox(1), "eth0")

    STATES[state](there)
    frames(uplink), frames(wire)
    for sock in (*streams, *steered):
        with contextlib.suppress(OSError):
            sock.send(b"after")
    for family in (4, 6):
        for frame in forged(there, family):
            with contextlib.suppress(OSError):
                wire.send(frame)
        for address in (server(family), HOST4 if family == 4 else HOST6, there.address("plain.test", family)):
            sock = there.plug(there.sandbox(1), socket.AF_INET if family == 4 else socket.AF_INET6,
                              socket.SOCK_STREAM)  # fmt: skip
            sock.settimeout(0.05)
            with pytest.raises(OSError):
                sock.connect((address, 80))
    left = [Ether(frame).summary() for frame in frames(uplink)]
    assert left == []
    # without steering the guard still judges, and still admits what was admitted to the inspector
    for sock in read if state != "steering gone" else ():
        sock.settimeout(0.1)
        with pytest.raises(OSError):
            assert sock.recv(10) != b"after"
            raise OSError
    answers = [Ether(frame) for frame in frames(wire)]
    assert [a.summary() for a in answers if TCP in a and a[TCP].flags == "SA"] == []


def test_control_the_same_things_do_arrive_while_both_keys_are_there(there: Topology) -> None:
    """Lest the test above pass because nothing works at all."""
    uplink = there.raw(there.internet, "inet0")
    for family in (4, 6):
        sock = open_stream(there, family)
        sock.sendall(b"more")
        assert sock.recv(10) == b"more"
        assert frames(uplink)


@FAMILIES
def test_revoking_a_host_resets_its_open_connection_and_keeps_the_others(
    there: Topology, family: int
) -> None:
    there.apply(policy(*ACME, named("stays.test", tcp(80))))
    there.resolve("stays.test", SERVER4, SERVER6)
    gone = open_stream(there, family)
    kept = there.client(1, there.address("stays.test", family), 80)
    before = {e.comment: e for e in there.counters().elements if (":" in e.address) == (family == 6)}
    there.apply(policy(*[r for r in ACME if r.key != "plain.test"], named("stays.test", tcp(80))))
    uplink = there.raw(there.internet, "inet0")
    with pytest.raises(ConnectionResetError):
        for _ in range(100):
            gone.send(b"more")
    assert frames(uplink) == []
    kept.sendall(b"still")
    assert kept.recv(10) == b"still"
    after = {e.comment: e for e in there.counters().elements if (":" in e.address) == (family == 6)}
    assert "plain.test" not in after
    assert after["stays.test"].packets > before["stays.test"].packets >= 2, "its counter was not begun anew"


def test_a_revoked_host_leaves_its_address_unused(there: Topology) -> None:
    """Mark reuse: conntrack may still lead from the old name's address to the old name's server."""
    old = {there.address("plain.test", family) for family in (4, 6)}
    others = [r for r in ACME if r.key != "plain.test"]
    there.apply(policy(*others))
    there.apply(policy(*others, *(named(f"new{n}.test", tcp(80)) for n in range(2000))))
    new = {there.address(f"new{n}.test", family) for n in range(2000) for family in (4, 6)}
    assert len(new) == 4000
    assert not old & new
    there.apply(policy(*ACME))
    assert {there.address("plain.test", family) for family in (4, 6)} == old, "its own again"


@FAMILIES
def test_a_moved_name_keeps_its_open_connection(there: Topology, family: int) -> None:
    """Rotating records change the NAT map, which conntrack asks once per connection."""
    sock = open_stream(there, family)
    there.resolve("plain.test", "10.3.0.77", "2001:db8:3::77")
    sock.sendall(b"after")
    assert sock.recv(10) == b"after"


def test_untracked_packets_are_not_forwarded(there: Topology) -> None:
    """Somebody's `notrack`: no entry, so no translation and no disguise. Also for guard off."""
    there.apply(policy(*ACME, guard=Guard.OFF))
    there.nft.run(
        [
            "add table inet foreign",
            "add chain inet foreign raw { type filter hook prerouting priority -300; }",
            "add rule inet foreign raw notrack",
        ]
    )
    uplink = there.raw(there.internet, "inet0")
    before = there.counters().late["invalid"].packets
    for family in (4, 6):
        for address in (server(family), there.address("plain.test", family)):
            there_is = there.plug(there.sandbox(1), socket.AF_INET if family == 4 else socket.AF_INET6,
                                  socket.SOCK_DGRAM)  # fmt: skip
            there_is.sendto(b"leak", (address, 80))
            sock = there.plug(there.sandbox(1), there_is.family, socket.SOCK_STREAM)
            sock.settimeout(0.02)
            with pytest.raises(OSError):
                sock.connect((address, 80))
    assert poll(lambda: there.counters().late["invalid"].packets >= before + 6)
    assert frames(uplink) == []


@FAMILIES
def test_a_link_without_a_guard_is_told_apart_and_gets_nowhere(there: Topology, family: int) -> None:
    there.nft.run(["flush chain netdev egressd eg1", "delete chain netdev egressd eg1"])
    uplink, before = there.raw(there.internet, "inet0"), there.counters().late["unmarked"].packets
    assert there.timed(1, there.address("plain.test", family), 80, seconds=0.1)[0] != "ok"
    assert there.counters().late["unmarked"].packets > before
    assert frames(uplink) == []


def test_a_chain_is_not_left_for_the_next_device_of_its_name(there: Topology) -> None:
    there.disconnect(1)
    assert diff.plan(there.observed(), there.wanted()) == ()
    assert "eg1" not in str(there.nft.list_json())


def test_unlinking_twice_and_with_everything_gone_is_no_error(there: Topology) -> None:
    there.nft.run(build.unlink(Link(1)))
    there.nft.run(build.unlink(Link(1)))
    there.nft.run(build.unlink(Link(77)))


# ---- limits


@FAMILIES
def test_one_connection_too_many_is_refused_at_once(there: Topology, family: int) -> None:
    there.apply(policy(*ACME, limits=Limits(connections=3)))
    there.connect(2)
    resolver = "169.254.53.53" if family == 4 else "fd53:53::53"
    for _ in range(5):
        there.timed(1, resolver, 53, kind=socket.SOCK_DGRAM)  # questions do not count
    socks = [there.client(1, there.address("plain.test", family), 80) for _ in range(3)]
    before = there.counters()
    outcome, milliseconds = there.timed(1, there.address("plain.test", family), 80)
    assert (outcome, milliseconds < 50) == ("ConnectionRefusedError", True)
    assert there.counters().late["connections"].packets == before.late["connections"].packets + 1
    assert there.timed(2, there.address("plain.test", family), 80)[0] == "ok", "each sandbox has its own"
    socks[0].sendall(b"the others live")
    assert socks[0].recv(20) == b"the others live"
    there.apply(policy(*ACME))
    assert there.timed(1, there.address("plain.test", family), 80)[0] == "ok", "without a limit"
    assert diff.plan(there.observed(), there.wanted()) == ()


def limited(t: Topology, connections: int) -> None:
    """To so many connections, and the collection has run that would take away what counts none."""
    t.apply(policy(*ACME, limits=Limits(connections=connections)))
    t.nft.run(["add table inet clock", "add set inet clock s { type ifname; size 8; flags dynamic; }"])
    t.nft.run(['add element inet clock s { "any" ct count over 1 }'])
    assert poll(lambda: '"any"' not in str(t.nft.list_json()).replace("'", '"'), seconds=10), "it never ran"
    t.nft.run(["delete table inet clock"])
    assert diff.plan(t.observed(), t.wanted()) == ()


def refused(t: Topology, family: int, *, port: int = 80, host: str = "plain.test") -> bool:
    """At once, counted once; else it was let in."""
    before = t.counters().late["connections"].packets
    outcome, milliseconds = t.timed(1, t.address(host, family), port)
    over = t.counters().late["connections"].packets - before
    assert (outcome, over) in (("ok", 0), ("ConnectionRefusedError", 1)) and milliseconds < 100, outcome
    return over == 1


def another(t: Topology, family: int) -> socket.socket:
    """A connection more, once there is room: within some ticks of the kernel's clock."""
    found: list[socket.socket] = []

    def admitted() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            found.append(t.client(1, t.address("plain.test", family), 80))
        return bool(found)

    assert poll(admitted)
    return found[0]


@FAMILIES
def test_a_limit_holds_from_the_beginning_and_after_idleness(there: Topology, family: int) -> None:
    limited(there, 2)
    for _ in range(2):
        socks = [there.client(1, there.address("plain.test", family), 80) for _ in range(2)]
        assert refused(there, family) and refused(there, family)
        for sock in socks:
            sock.close()
        limited(there, 2)


def test_both_families_and_both_protocols_count_together(there: Topology) -> None:
    limited(there, 3)
    there.client(1, there.address("plain.test", 4), 80)
    there.client(1, there.address("plain.test", 6), 80)
    question = there.plug(there.sandbox(1), socket.AF_INET6, socket.SOCK_DGRAM)
    question.sendto(b"x", (there.address("quic.test", 6), 443))
    assert poll(lambda: there.counters().opened[there.mark("quic.test")].packets == 1)
    assert refused(there, 4) and refused(there, 6)
    assert there.timed(1, there.address("quic.test", 4), 443, kind=socket.SOCK_DGRAM)[0] != "timeout"
    assert there.counters().opened[there.mark("quic.test")].packets == 1


@FAMILIES
def test_a_connection_that_ends_gives_its_place_back(there: Topology, family: int) -> None:
    limited(there, 2)
    socks = [there.client(1, there.address("plain.test", family), 80) for _ in range(2)]
    assert refused(there, family)
    socks.pop().close()
    another(there, family)
    assert refused(there, family), "one place, not more"


@pytest.mark.parametrize("kind", ["inspected", "relayed"])
@FAMILIES
def test_connections_that_egressd_carries_count(there: Topology, family: int, kind: str) -> None:
    host, port = ("tls.test", 443) if kind == "inspected" else ("ollama", 11434)
    there.apply(policy(*ACME, inspected("tls.test", tcp(443)), limits=Limits(connections=2)))
    here = INSPECTOR_PORT if kind == "inspected" else RELAY_PORT
    there.server(there.gateway, "127.0.0.1" if family == 4 else "::1", here, transparent=True)
    for _ in range(2):
        there.client(1, there.address(host, family), port)
    assert refused(there, family, port=port, host=host)
    assert refused(there, family), "whatever it asks for"


@pytest.mark.parametrize("new", [2, 4])
def test_another_number_counts_what_begins_from_then_on(there: Topology, new: int) -> None:
    limited(there, 3)
    old = [there.client(1, there.address("plain.test"), 80) for _ in range(3)]
    assert refused(there, 4)
    limited(there, new)
    fresh = [there.client(1, there.address("plain.test"), 80) for _ in range(new)]
    assert refused(there, 4) and refused(there, 6)
    for sock in (*old, *fresh):
        sock.sendall(b"lives")
        assert sock.recv(10) == b"lives"


def test_a_change_of_something_else_does_not_count_anew(there: Topology) -> None:
    limited(there, 2)
    for _ in range(2):
        there.client(1, there.address("plain.test"), 80)
    there.apply(policy(*ACME, named("more.test", tcp(80)), limits=Limits(connections=2)))
    assert refused(there, 4)


def test_a_limit_does_not_know_what_an_earlier_link_had_open(there: Topology) -> None:
    limited(there, 2)
    for _ in range(2):
        there.client(1, there.address("plain.test"), 80)
    assert refused(there, 4)
    there.disconnect(1)
    assert "eg1" not in str(there.nft.list_json())
    there.connect(1)
    for _ in range(2):
        there.client(1, there.address("plain.test"), 80)
    assert refused(there, 4)


def test_a_reset_that_dies_on_its_way_frees_a_place(there: Topology) -> None:
    """The limit as it is (docs/threat-model.md): connection tracking believes in the reset. It takes raw
    frames to do it, and what is held so is still judged and counted."""
    limited(there, 1)
    wire, address = there.raw(there.sandbox(1), "eth0"), there.address("plain.test")
    first = open_stream(there, 4)
    assert refused(there, 4)
    seen = [Ether(frame) for frame in frames(wire)]
    source, port = first.getsockname()
    last = [packet[TCP] for packet in seen if TCP in packet and packet[TCP].dport == port][-1]
    reset = TCP(sport=port, dport=80, flags="R", seq=last.ack)
    ethernet = Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC)
    wire.send(bytes(ethernet / IP(src=source, dst=address, ttl=2) / reset))
    second = another(there, 4)
    for sock in (first, second):
        sock.sendall(b"lives")
        assert sock.recv(10) == b"lives"
    links = there.counters().links["eg1"]
    assert links.in_ == links.ok + links.denied + links.other


@FAMILIES
def test_a_quota_ends_the_link_and_says_so(there: Topology, family: int) -> None:
    there.connect(2, quota=20_000)
    sock = there.client(2, there.address("plain.test", family), 80)
    with pytest.raises(OSError):
        for _ in range(100):
            sock.sendall(b"x" * 1000)
            sock.recv(1000)
    counts = there.counters()
    assert counts.links["eg2"].quota == 20_000
    assert counts.links["eg2"].quota_used == 20_000  # the kernel lists no more than the quota itself
    assert counts.links["eg2"].ok.bytes <= 20_000
    assert counts.denied["acme"]["quota"].packets >= 1
    outcome, milliseconds = there.timed(2, there.address("plain.test", family), 80)
    assert (outcome, milliseconds < 50) == ("ConnectionRefusedError", True)
    link = there.counters().links["eg2"]
    assert link.in_ == link.ok + link.denied + link.other
    assert there.timed(1, there.address("plain.test", family), 80)[0] == "ok", "only that one"


# ---- tampering is found and mended


TAMPERING = {
    "a rule added": ["insert rule netdev egressd eg1 accept"],
    "a rule taken away": ["flush chain netdev egressd acme_unlisted"],
    "a policy turned": ["add chain netdev egressd eg1 { policy accept; }"],
    "an element added": ["add element netdev egressd acme_cidr4 { 10.3.0.0/24 . tcp . 80 : 0x90004001 }"],
    "an answer permitted": ["add element inet egressd in { 0x12345678 }"],
    "a name led elsewhere": ["add element inet egressd real4 { 0x80000001 . 198.18.0.4 : 10.9.9.9 }"],
    "a chain added": [
        "add chain inet egressd spy { type filter hook forward priority -1; }",
        "add rule inet egressd spy accept",
    ],
    "a set added": ["add set inet egressd extra { type ipv4_addr; }"],
    "a map widened": ["add element netdev egressd unreachable4 { 8.8.8.8 }"],
    "a counter taken": [
        "flush chain netdev egressd acme_source",
        "delete counter netdev egressd acme_source_denied",
    ],
    "a table gone": ["delete table inet egressd"],
    "all gone": ["flush ruleset"],
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found_and_mended(there: Topology, what: str) -> None:
    open_stream(there, 4)
    before = there.counters()
    assert diff.plan(there.observed(), there.wanted()) == ()
    there.nft.run(TAMPERING[what])
    operations = diff.plan(there.observed(), there.wanted())
    assert operations
    assert all(operation.describe() for operation in operations)
    there.nft.run(diff.commands(operations))
    assert diff.plan(there.observed(), there.wanted()) == ()
    assert there.timed(1, there.address("plain.test"), 80)[0] == "ok"
    assert there.timed(1, SERVER4, 80)[0] == "ConnectionRefusedError"
    if what not in ("all gone", "a table gone"):
        kept, had = there.counters().links["eg1"].ok, before.links["eg1"].ok
        assert kept.packets >= had.packets > 0, "counters live through the mending"


def test_late_counters_are_zero_where_nothing_was_late(there: Topology) -> None:
    open_stream(there, 4).close()
    counts = there.counters()
    assert set(counts.late) == set(build.LATE)
    assert {r: t for r, t in counts.late.items() if t != Tally()} == {}
    assert named("u.test", udp(1)).key == "u.test"
