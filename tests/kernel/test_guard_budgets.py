"""What a link alone is held to: how many TCP connections may ever be opened over it, and that nothing passes
where it was opened without a network. In raw frames, too, as root in a sandbox could send them."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest
from guard_topology import (
    ACME,
    POOLS,
    SERVER4,
    SERVER6,
    Guard,
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
    total,
    udp,
)
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from test_guard_balance import cases

from egressd.ipc.messages import MOST_CONNECTIONS
from egressd.model.identities import Link
from egressd.ruleset import build, diff
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import (
    GATEWAY_MAC,
    INSPECTOR_PORT,
    RELAY_PORT,
    RESOLVER4,
    RESOLVER6,
    SANDBOX_MAC,
    SPENT,
)
from egressd.ruleset.observe import Counters, LinkCounts, Tally

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("family", [4, 6])
EVERY_GUARD = pytest.mark.parametrize("guard", list(Guard), ids=str)
RULES = (*ACME, inspected("read.test", tcp(443)), named("both.test", tcp(80), udp(80)))


@pytest.fixture(scope="module")
def there() -> Iterator[Topology]:
    with topology("bud") as made:
        made.apply(policy(*RULES))
        for host in ("plain.test", "quic.test", "read.test", "both.test"):
            made.resolve(host, SERVER4, SERVER6)
        for address in (SERVER4, SERVER6):
            echo(made.server(made.internet, address, 80))
        for port in (INSPECTOR_PORT, RELAY_PORT):
            for address in ("127.0.0.1", "::1"):
                echo(made.server(made.gateway, address, port, transparent=True))
        for address in map(str, (RESOLVER4, RESOLVER6)):
            echo(made.server(made.gateway, address, 53))
        yield made


@pytest.fixture
def link(there: Topology) -> Iterator[Opener]:
    """Opens a link that no test has used; it goes with the test."""
    opener = Opener(there)
    yield opener
    there.apply(policy(*RULES))
    opener.close()


_numbers = itertools.count(1)


class Opener:
    def __init__(self, there: Topology) -> None:
        self.there, self.numbers = there, list[int]()

    def __call__(self, connections: int | None = None, *, closed: bool = False) -> int:
        number = next(_numbers)  # never the same: the far end may still speak to the one before
        self.numbers.append(number)
        self.there.connect(number, connections=connections, closed=closed)
        # Until the kernel has heard that the other end is up (linkwatch_do_dev), answers die at ours: a SYN
        # would be sent again, and count twice.
        device = f"ip -n {self.there.gateway} link show eg{number}"
        assert poll(lambda: "noqueue state UP" in sh(device), seconds=10)
        # All sandboxes come from one address in the end. Where the far end still has a connection of one that
        # is gone, a SYN from its port would be sent again, too (RFC 5961 4.2).
        ports = f"{10_000 + number * 200} {10_199 + number * 200}"
        self.there.sysctl(self.there.sandbox(number), {"net/ipv4/ip_local_port_range": ports})
        return number

    def close(self) -> None:
        for number in self.numbers:
            self.there.disconnect(number)


def counted(there: Topology, number: int) -> LinkCounts:
    return there.counters().links[f"eg{number}"]


def spent(counters: Counters) -> int:
    return counters.late[SPENT].packets


def exact(there: Topology, before: Counters, number: int) -> Counters:
    """The books of the link, and of its workspace since `before`, add up, once what was under way is judged:
    a listing is no moment. What was refused late is among what the elements counted."""
    device, found = f"eg{number}", [before]

    def balanced() -> bool:
        found[0] = after = there.counters()
        wrong = books(equations(after, {}, {}, workspace_of={device: "acme"})).differences
        admitted = total(after) + after.unlisted["acme"] - total(before) - before.unlisted["acme"]
        link = after.links[device]
        return admitted == link.ok and not any(each.what.startswith(f"{device}: ") for each in wrong)

    assert poll(balanced), found
    return found[0]


def opens(there: Topology, number: int, address: str, port: int = 80) -> str:
    """Opened and closed again: "ok", or how it was refused."""
    return there.timed(number, address, port)[0]


# ---- a budget of connections


@FAMILIES
@pytest.mark.parametrize("budget", [1, 2, 9])
def test_exactly_as_many_as_the_budget_says_are_ever_opened(
    there: Topology, link: Opener, family: int, budget: int
) -> None:
    """Open, closed again or refused by nobody: each has taken one, and none comes back."""
    number, before = link(budget), there.counters()
    address = there.address("plain.test", family)
    assert [opens(there, number, address) for _ in range(budget)] == ["ok"] * budget
    told = [there.timed(number, address, 80) for _ in range(3)]
    assert [outcome for outcome, _ in told] == ["ConnectionRefusedError"] * 3
    assert min(milliseconds for _, milliseconds in told) < 50, "at once, when nothing else keeps the machine"
    after = exact(there, before, number)
    counts = after.links[f"eg{number}"]
    assert (counts.connections_used, counts.connections) == (budget, budget)
    assert spent(after) - spent(before) == 3 and counts.denied == Tally()


def test_one_that_is_open_goes_on_when_the_budget_is_spent(there: Topology, link: Opener) -> None:
    number, address = link(1), there.address("plain.test")
    first = there.client(number, address, 80)
    assert opens(there, number, address) == "ConnectionRefusedError"
    first.sendall(b"still here")
    assert first.recv(100) == b"still here"


def test_all_ways_take_from_one_budget(there: Topology, link: Opener) -> None:
    """Both families, a host, one whose connections are read, a local service; questions to the resolver take
    nothing, over TCP either, and datagrams neither."""
    number = link(6)
    ways = [("plain.test", 80), ("read.test", 443), ("ollama", 11434)]
    for family, resolver in ((4, RESOLVER4), (6, RESOLVER6)):
        assert opens(there, number, str(resolver), 53) == "ok"
        for host, port in ways:
            assert opens(there, number, there.address(host, family), port) == "ok"
    assert counted(there, number).connections_used == 6
    for family, resolver in ((4, RESOLVER4), (6, RESOLVER6)):
        for host, port in ways:
            assert opens(there, number, there.address(host, family), port) == "ConnectionRefusedError"
        assert opens(there, number, str(resolver), 53) == "ok"
        datagram = there.plug(there.sandbox(number), socket.AF_INET6 if family == 6 else socket.AF_INET,
                              socket.SOCK_DGRAM)  # fmt: skip
        before = quic(there)
        datagram.sendto(b"x", (there.address("quic.test", family), 443))
        assert poll(lambda before=before: quic(there) == before + 1)


def quic(there: Topology) -> int:
    return sum(e.packets for e in there.counters().elements if e.comment == "quic.test")


def test_what_is_denied_anyway_takes_nothing(there: Topology, link: Opener) -> None:
    number, address = link(2), there.address("plain.test")
    for _ in range(5):
        assert opens(there, number, SERVER4) == "ConnectionRefusedError"
        assert opens(there, number, address, 81) == "ConnectionRefusedError"
    assert [opens(there, number, address) for _ in range(3)] == ["ok", "ok", "ConnectionRefusedError"]


def test_it_is_the_links_own(there: Topology, link: Opener) -> None:
    one, two, free = link(1), link(1), link()
    address = there.address("plain.test")
    assert [opens(there, one, address) for _ in range(2)] == ["ok", "ConnectionRefusedError"]
    assert [opens(there, two, address) for _ in range(2)] == ["ok", "ConnectionRefusedError"]
    assert [opens(there, free, address) for _ in range(3)] == ["ok"] * 3
    assert counted(there, free).connections is None


@EVERY_GUARD
def test_it_holds_whatever_the_guard(there: Topology, link: Opener, guard: Guard) -> None:
    """What is on no list and let through counts as well."""
    there.apply(policy(*RULES, guard=guard))
    number, before = link(3), there.counters()
    where = [SERVER4, SERVER6, there.address("plain.test")]
    if guard is Guard.ENFORCE:
        where = [there.address("plain.test")] * 3
    assert [opens(there, number, each) for each in where] == ["ok"] * 3
    assert [opens(there, number, each) for each in where] == ["ConnectionRefusedError"] * 3
    exact(there, before, number)


def test_all_at_once_no_more_than_the_budget_get_through(there: Topology, link: Opener) -> None:
    number, address = link(15), there.address("plain.test")
    socks = [there.plug(there.sandbox(number), socket.AF_INET, socket.SOCK_STREAM) for _ in range(40)]
    waiting = select.poll()
    for sock in socks:
        sock.setblocking(False)
        sock.connect_ex((address, 80))
        waiting.register(sock, select.POLLOUT)
    decided: set[int] = set()

    def all_decided() -> bool:
        decided.update(descriptor for descriptor, _ in waiting.poll(10))
        return len(decided) == len(socks)

    assert poll(all_decided)
    outcomes = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for sock in socks]
    assert sorted(outcomes) == [0] * 15 + [111] * 25
    for sock in socks:
        sock.close()


# ---- frame by frame


def syn(
    there: Topology, number: int, port: int, family: int = 4, host: str = "plain.test", **more: object
) -> bytes:
    source, source6 = map(str, POOLS.sandbox(Link(number)))
    address = there.address(host, family)
    ip: Packet = IP(src=source, dst=address) if family == 4 else IPv6(src=source6, dst=address)
    segment = TCP(sport=port, dport=80, **{"flags": "S", **more})
    return bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / ip / segment)


def send(there: Topology, number: int, every: Sequence[bytes]) -> Counters:
    """Send them, wait until the guard has judged them."""
    wire = there.raw(there.sandbox(number), "eth0")
    before = counted(there, number).in_.packets
    for frame in every:
        wire.send(frame)
    return there.settled(number, before + len(every))


@pytest.mark.parametrize("budget", [1, 200, MOST_CONNECTIONS])
def test_a_flood_is_counted_to_the_frame(there: Topology, link: Opener, budget: int) -> None:
    """Of the largest budget there is, too: the kernel's tokens are nanoseconds in 64 bits. To a host that
    resolves to nothing, so that no table fills. Looking at it in between takes nothing and gives nothing."""
    number, before = link(budget), there.counters()
    flood = [syn(there, number, 1 + n % 60_000, (4, 6)[n % 2], "nowhere.test") for n in range(budget)]
    looked = send(there, number, flood).links[f"eg{number}"]
    assert (looked.connections_used, looked.connections) == (budget, budget)
    assert spent(there.counters()) == spent(before)
    for _ in range(3):
        there.nft.list_json()
        assert diff.plan(there.observed(), there.wanted()) == ()
    after = send(there, number, [flood[0]] * 3)
    assert after.links[f"eg{number}"].connections_used == budget
    assert spent(after) - spent(before) == 3
    exact(there, before, number)


def test_several_processors_at_once_take_no_more(there: Topology, link: Opener) -> None:
    number = link(1000)
    flood = [syn(there, number, 1 + n, host="nowhere.test") for n in range(500)]
    wires = [there.raw(there.sandbox(number), "eth0", protocol=0) for _ in range(4)]

    def run(wire: socket.socket) -> None:
        wire.setblocking(True)
        for frame in flood:
            wire.send(frame)

    before = there.counters()
    threads = [threading.Thread(target=run, args=(wire,)) for wire in wires]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = there.settled(number, 2000)
    assert after.links[f"eg{number}"].connections_used == 1000
    assert spent(after) - spent(before) == 1000
    exact(there, before, number)


TAKES = {
    "a SYN": ({"flags": "S"}, True),
    "the same again": ({"flags": "S"}, True),
    "with data, as of fast open": ({"flags": "S", "options": [(34, b"12345678")]}, True),
    "SYN and FIN": ({"flags": "SF"}, True),
    "SYN and RST": ({"flags": "SR"}, True),
    "SYN, ECE and CWR": ({"flags": "SEC"}, True),
    "SYN, PSH and URG": ({"flags": "SPU"}, True),
    "an ACK": ({"flags": "A"}, False),
    "SYN and ACK": ({"flags": "SA"}, False),
    "all of them": ({"flags": 0x1FF}, False),
    "none": ({"flags": 0}, False),
    "FIN": ({"flags": "F"}, False),
    "RST": ({"flags": "R"}, False),
}


@FAMILIES
def test_what_takes_from_the_budget(there: Topology, link: Opener, family: int) -> None:
    number = link(1000)
    for port, (name, (fields, takes)) in enumerate(TAKES.items(), 3000):
        had = counted(there, number).connections_used
        data = b"early" if "data" in name else b""
        after = send(there, number, [syn(there, number, port, family, **fields) + data])
        assert after.links[f"eg{number}"].connections_used == (had or 0) + takes, name


@FAMILIES
def test_what_hides_its_flags_is_denied_and_takes_nothing(there: Topology, link: Opener, family: int) -> None:
    number = link(1000)
    source = str(POOLS.sandbox(Link(number))[family == 6])
    begin, ether = TCP(sport=4000, dport=80, flags="S"), Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC)
    where = {"src": source, "dst": there.address("plain.test", family)}
    if family == 4:
        plain = IP(**where) / begin
        hidden = [
            IP(**where, flags="MF") / begin,
            IP(**where, frag=1, proto=6) / Raw(bytes(begin)),
            IP(**where, options=[IPOption(b"\x94\x04\0\0")]) / begin,
        ]
    else:
        plain = IPv6(**where) / begin
        hidden = [IPv6(**where) / IPv6ExtHdrFragment(m=more) / begin for more in (0, 1)]
    after = send(there, number, [bytes(ether / each) for each in hidden])
    counts = after.links[f"eg{number}"]
    assert counts.connections_used == 0
    assert counts.denied.packets == len(hidden) and counts.ok == Tally()
    assert send(there, number, [bytes(ether / plain)]).links[f"eg{number}"].connections_used == 1


@FAMILIES
def test_with_the_budget_spent_no_frame_begins_anything(there: Topology, link: Opener, family: int) -> None:
    """All flags that there are, with and without data, to ports of their own; as answers to a SYN of the far
    side, too (simultaneous open), of which no sandbox ever hears."""
    number = link(1)
    assert opens(there, number, there.address("plain.test", family)) == "ok"
    uplink = there.raw(there.internet, "inet0")
    every = [
        syn(there, number, 5000 + flags, family, flags=flags) + data
        for flags in range(512)
        for data in (b"", b"leak")
    ]
    before = there.counters()
    send(there, number, every)
    # a quarter of the flags has SYN and not ACK, twice
    assert poll(lambda: spent(there.counters()) - spent(before) == 256)
    assert [f for f in frames(uplink) if TCP in Ether(f) and 5000 <= Ether(f)[TCP].sport < 5512] == []
    assert opens(there, number, there.address("plain.test", family)) == "ConnectionRefusedError"


# ---- what others do to it


REWRITING = {
    "a rule of it gone": ["flush chain netdev egressd eg{n}"],
    "a rule added": ["insert rule netdev egressd eg{n} accept"],
    "its refusal emptied": [f"flush chain netdev egressd late_{SPENT}"],
    "a policy turned": ["add chain netdev egressd eg{n} {{ policy accept; }}"],
    "its counter gone": [
        "flush chain netdev egressd eg{n}",
        "delete counter netdev egressd eg{n}_over_budget",
    ],
}


@pytest.mark.parametrize("what", REWRITING)
def test_what_is_spent_stays_spent_when_the_rules_are_put_back(
    there: Topology, link: Opener, what: str
) -> None:
    number, address = link(5), there.address("plain.test")
    assert [opens(there, number, address) for _ in range(2)] == ["ok"] * 2
    there.nft.run([line.format(n=number) for line in REWRITING[what]])
    operations = diff.plan(there.observed(), there.wanted())
    assert operations
    there.nft.run(diff.commands(operations))
    assert diff.plan(there.observed(), there.wanted()) == ()
    outcomes = [opens(there, number, address) for _ in range(5)]
    assert outcomes == ["ok"] * 3 + ["ConnectionRefusedError"] * 2


def test_a_change_of_policy_gives_nothing_back(there: Topology, link: Opener) -> None:
    number, address = link(3), there.address("plain.test")
    assert opens(there, number, address) == "ok"
    there.apply(policy(*RULES, named("more.test", tcp(80)), guard=Guard.OBSERVE))
    there.apply(policy(*RULES))
    outcomes = [opens(there, number, address) for _ in range(3)]
    assert outcomes == ["ok", "ok", "ConnectionRefusedError"]


def test_another_budget_is_drift(there: Topology, link: Opener) -> None:
    """A limit cannot be changed in place (nf_tables_newobj): it is made anew."""
    number = link(3)
    path = f"limit netdev egressd eg{number}_budget"
    there.nft.run([
        f"flush chain netdev egressd eg{number}",
        f"delete {path}",
        f"add {path} {{ rate over 1/week burst 9000 packets; }}",
    ])  # fmt: skip
    told = [operation.describe() for operation in diff.plan(there.observed(), there.wanted())]
    assert f"remove {path}" in told and f"make {path}" in told
    there.nft.run(diff.commands(diff.plan(there.observed(), there.wanted())))
    address = there.address("plain.test")
    assert [opens(there, number, address) for _ in range(4)] == ["ok"] * 3 + ["ConnectionRefusedError"]


# ---- a closed link


@FAMILIES
@EVERY_GUARD
def test_over_a_closed_link_nothing_passes_and_everything_is_told_at_once(
    there: Topology, link: Opener, guard: Guard, family: int
) -> None:
    there.apply(policy(*RULES, guard=guard))
    number, before = link(closed=True), there.counters()
    server, resolver = ((SERVER4, RESOLVER4), (SERVER6, RESOLVER6))[family == 6]
    tries = [
        ("stream", str(resolver), 53), ("datagram", str(resolver), 53), ("stream", server, 80),
        *(("stream", there.address(host, family), port)
          for host, port in (("plain.test", 80), ("read.test", 443), ("ollama", 11434))),
        ("datagram", there.address("quic.test", family), 443),
    ]  # fmt: skip
    kinds = {"stream": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM}
    told = [there.timed(number, address, port, kind=kinds[kind]) for kind, address, port in tries]
    assert {outcome for outcome, _ in told} == {"ConnectionRefusedError"}, told
    assert min(milliseconds for _, milliseconds in told) < 50, "at once, when nothing else keeps the machine"
    after = exact(there, before, number)
    counts = after.links[f"eg{number}"]
    assert counts.ok == counts.other == Tally() and counts.in_.packets == len(tries)
    assert after.denied["acme"]["closed"] - before.denied["acme"]["closed"] == counts.denied


@EVERY_GUARD
def test_no_frame_at_all_passes_a_closed_link(there: Topology, link: Opener, guard: Guard) -> None:
    there.apply(policy(*RULES, guard=guard))
    number = link(closed=True)
    uplink = there.raw(there.internet, "inet0")
    every = cases(there, number)
    before = there.counters()
    after = send(there, number, [bytes(case.frame) for case in every])
    counts = after.links[f"eg{number}"]
    alien = sum(case.becomes == "other" for case in every)
    assert alien > 3 and counts.other.packets == alien
    assert counts.ok == Tally() and counts.denied.packets == len(every) - alien
    assert after.denied["acme"]["closed"] - before.denied["acme"]["closed"] == counts.denied
    assert total(after) == total(before) and after.unlisted == before.unlisted
    assert frames(uplink) == []


def test_without_any_rule_of_a_closed_link_nothing_passes(there: Topology, link: Opener) -> None:
    """Each rule taken away alone, then all of them, then the chain: the second key holds."""
    number = link(closed=True)
    name, rules = f"eg{number}", build.link(there.links[number], there.wants["acme"], POOLS)
    rules = [line for line in rules if line.startswith(f"add rule netdev egressd {name} ")]
    every = [bytes(case.frame) for case in cases(there, number)]
    uplink = there.raw(there.internet, "inet0")
    wire = there.raw(there.sandbox(number), "eth0")
    for missing in range(len(rules)):
        without(there, name, [line for place, line in enumerate(rules) if place != missing])
        never_out(there, wire, uplink, every)
        assert diff.plan(there.observed(), there.wanted()) != ()
    without(there, name, [])
    never_out(there, wire, uplink, every)
    there.nft.run([f"delete chain netdev egressd {name}"])
    never_out(there, wire, uplink, every)
    there.nft.run(diff.commands(diff.plan(there.observed(), there.wanted())))
    assert diff.plan(there.observed(), there.wanted()) == ()
    assert opens(there, number, there.address("plain.test")) == "ConnectionRefusedError"


def without(there: Topology, name: str, rules: Sequence[str]) -> None:
    there.nft.run([f"flush chain netdev egressd {name}", *rules])


def never_out(there: Topology, wire: socket.socket, uplink: socket.socket, every: Sequence[bytes]) -> None:
    """Whatever is sent, nothing is admitted, and nothing arrives beyond the gateway. The counter that would
    say that all has been judged may be what is missing."""
    before = total(there.counters())
    for frame in every:
        wire.send(frame)
    assert not poll(lambda: total(there.counters()) != before or frames(uplink) != [], seconds=0.05)


def test_a_closed_link_stays_closed_whatever_the_policy_becomes(there: Topology, link: Opener) -> None:
    number = link(closed=True)
    for guard in (Guard.OFF, Guard.OBSERVE, Guard.ENFORCE):
        there.apply(policy(*RULES, named("more.test", tcp(80)), guard=guard))
        for address in (there.address("plain.test"), SERVER4, SERVER6, str(RESOLVER4)):
            assert opens(there, number, address) == "ConnectionRefusedError"
    assert counted(there, number).ok == Tally()


def test_nobody_can_speak_to_a_closed_sandbox(there: Topology, link: Opener) -> None:
    """Answers need a connection, and it has none."""
    number = link(closed=True)
    wire = there.raw(there.sandbox(number), "eth0")
    send(there, number, [syn(there, number, 6000)])
    assert poll(lambda: any(TCP in Ether(f) and Ether(f)[TCP].flags.R for f in frames(wire)))
    source = str(POOLS.sandbox(Link(number))[0])
    from_outside = there.raw(there.internet, "inet0")
    from_outside.send(bytes(
        Ether(src="02:53:00:00:03:02", dst="02:53:00:00:03:01")
        / IP(src=SERVER4, dst=source) / UDP(sport=53, dport=53) / b"x"
    ))  # fmt: skip
    assert not poll(lambda: frames(wire) != [], seconds=0.05)
