"""One sandbox does what it can to fill what all share: the tables of connections in gateway and host, the
neighbours, the log. Each bound holds, what is over it is counted, and the next sandbox works."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_topology import (
    ACME,
    HOST4,
    POOLS,
    SERVER4,
    SERVER6,
    Limits,
    Topology,
    inside,
    policy,
    poll,
    sh,
    topology,
)
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from egressd.kernel import sockets
from egressd.model.identities import Link
from egressd.ruleset import diff
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import CLOSED_FOR, IDLE_FOR, RESOLVER4, RESOLVER6, SANDBOX_MAC
from egressd.ruleset.observe import Counters
from integration.hostile import frames, from_ports

pytestmark = pytest.mark.kernel
OPEN = 4096  # connections of one sandbox, where its policy says nothing
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
FAMILIES = pytest.mark.parametrize("family", [4, 6])
COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("host") as made:
        made.apply(policy(*ACME))
        for name in ("plain.test", "quic.test"):
            made.resolve(name, SERVER4, SERVER6)
        made.connect(1)
        made.connect(2)
        yield made


def entries(there: Topology) -> tuple[int, int]:
    """In the tables of gateway and host."""
    found = []
    for where in (there.gateway, there.host):
        with inside(where):
            found.append(int(COUNT.read_text()))
    return found[0], found[1]


def addresses(number: int, family: int) -> str:
    return str(POOLS.sandbox(Link(number))[family == 6])


def send(there: Topology, number: int, every: list[bytes]) -> None:
    wire = there.raw(there.sandbox(number), "eth0")
    wire.setblocking(True)
    before = there.counters().links[f"eg{number}"].in_.packets
    for data in every:
        wire.send(data)
    there.settled(number, before + len(every))


def balanced(there: Topology) -> Counters:
    counters = there.counters()
    found = books(equations(counters, {}, {}, workspace_of={"eg1": "acme", "eg2": "acme"}))
    assert found.balanced, found.differences
    return counters


def held(there: Topology, number: int, kind: str, family: int) -> str:
    """One ordinary attempt of a sandbox at what it may have."""
    if kind == "tcp":
        return there.timed(number, there.address("plain.test", family), 80)[0]
    return there.timed(number, there.address("quic.test", family), 443, kind=socket.SOCK_DGRAM)[0]


@contextlib.contextmanager
def servers(there: Topology) -> Iterator[None]:
    """Of both families: a listener, and who answers datagrams, without a thread: the kernel's own backlog."""
    made = [there.server(there.internet, at, 80) for at in (SERVER4, SERVER6)]
    try:
        yield
    finally:
        for sock in made:
            sock.close()


# ---- connections


@FAMILIES
def test_datagrams_from_every_port_leave_no_more_entries_than_a_sandbox_may_have(
    there: Topology, family: int
) -> None:
    """6,000 flows to an allowed host: so many as may be open are, the rest is refused as too many."""
    to = there.address("quic.test", family)
    body = UDP(sport=1, dport=443) / Raw(b"x")
    send(there, 1, from_ports(family, addresses(1, family), to, body, range(1024, 7024)))
    counters = balanced(there)
    refused = counters.late["connections"].packets
    assert counters.links["eg1"].ok.packets == 6000
    assert refused == 6000 - OPEN
    assert counters.late["pace"].packets == 0, "the burst is longer than that"
    assert poll(lambda: entries(there) == (OPEN, OPEN)), entries(there)
    with servers(there):
        assert held(there, 2, "tcp", family) == "ok", "a neighbour has places of its own"


@FAMILIES
def test_beginnings_are_paced(there: Topology, family: int) -> None:
    """SYNs to a host that refuses them: nothing is ever open, and still no more than the pace get through."""
    to = there.address("plain.test", family)
    count = 14_000
    body = TCP(sport=1, dport=80, flags="S")
    every = from_ports(family, addresses(1, family), to, body, range(1024, 1024 + count))
    began = time.monotonic()
    send(there, 1, every)
    allowed = 8000 + 1000 * (time.monotonic() - began + 0.1)
    counters = balanced(there)
    through = count - sum(counters.late[reason].packets for reason in ("pace", "connections"))
    assert 8000 <= through <= allowed
    assert counters.late["pace"].packets > 0
    assert max(entries(there)) <= allowed
    with servers(there):
        assert held(there, 2, "tcp", family) == "ok"


@FAMILIES
def test_questions_are_paced_by_asker_and_by_number(there: Topology, family: int) -> None:
    """From every port: a thousand at once. From one: four thousand. And neither uses up connections."""
    to = str(RESOLVER4 if family == 4 else RESOLVER6)
    listener = there.plug(
        there.gateway, socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    )
    listener.bind((to, 53))
    me = addresses(1, family)
    question = UDP(sport=1024, dport=53) / Raw(b"q")
    every = from_ports(family, me, to, question, range(1024, 4024))
    began = time.monotonic()
    send(there, 1, every)
    allowed = 1000 + 500 * (time.monotonic() - began + 0.1)
    through = 3000 - balanced(there).late["pace"].packets
    assert 1000 <= through <= allowed
    gateway, host = entries(there)
    assert gateway <= allowed and host == 0
    one = frames(family, me, to, [question]) * 9000
    before = balanced(there).late["pace"].packets
    send(there, 1, one)
    most = 4000 + 2000 * (time.monotonic() - began + 0.1)
    assert 9000 - (balanced(there).late["pace"].packets - before) <= most
    assert balanced(there).late["pace"].packets > before
    with servers(there):
        assert held(there, 1, "tcp", family) == "ok", "connections are another bound"
    asked = there.timed(2, to, 53, kind=socket.SOCK_DGRAM, seconds=0.1)
    assert asked[0] == "timeout", "a neighbour's question arrives; nobody answers here"


@FAMILIES
def test_what_the_policy_says_is_the_bound(there: Topology, family: int) -> None:
    """More than what holds where it says nothing, too."""
    there.apply(policy(*ACME, limits=Limits(connections=5000)))
    to = there.address("quic.test", family)
    body = UDP(sport=1, dport=443) / Raw(b"x")
    send(there, 1, from_ports(family, addresses(1, family), to, body, range(1024, 7024)))
    assert balanced(there).late["connections"].packets == 1000
    assert poll(lambda: entries(there) == (5000, 5000)), entries(there)


def test_without_its_chain_a_link_has_none_and_drift_says_so(there: Topology) -> None:
    there.nft.run(['delete element inet egressd connections { "eg1" }'])
    assert any(
        "connections" in operation.describe() for operation in diff.plan(there.observed(), there.wanted())
    )


# ---- what has ended


def conntrack(there: Topology, where: str) -> list[str]:
    with inside(where):
        return Path("/proc/net/nf_conntrack").read_text().splitlines()


@FAMILIES
def test_the_host_forgets_soon_what_has_been_closed(there: Topology, family: int) -> None:
    """And keeps what is idle for two hours, not five days. Its own connections live as long as ever."""
    with servers(there):
        client = there.client(1, there.address("plain.test", family), 80)
        open_ = [line.split() for line in conntrack(there, there.host) if "ESTABLISHED" in line]
        assert [IDLE_FOR - 20 < int(line[4]) <= IDLE_FOR for line in open_] == [True]
        for sock in there.sockets:
            if sock is not client and sock.fileno() >= 0 and sock.type == socket.SOCK_STREAM:
                sock.settimeout(0.3)
                with contextlib.suppress(OSError):
                    sock.accept()[0].close()
        client.recv(1)
        client.close()

        def waiting() -> list[list[str]]:
            return [line.split() for line in conntrack(there, there.host) if "TIME_WAIT" in line]

        assert poll(lambda: len(waiting()) == 1)
        assert int(waiting()[0][4]) <= CLOSED_FOR
        with inside(there.host):
            own = socket.create_connection((SERVER4, 80), 2)
        mine = [line.split() for line in conntrack(there, there.host) if f"src={HOST4}" in line.split()[6]]
        assert [int(line[4]) > IDLE_FOR for line in mine] == [True]
        own.close()


# ---- neighbours


@FAMILIES
def test_no_frame_adds_a_neighbour_anywhere(there: Topology, family: int) -> None:
    """Discovery, ARP, and packets from and to addresses nobody has: both tables stay as they were."""
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr
    from scapy.layers.l2 import ARP

    def tables() -> list[str]:
        return sorted(
            line
            for where in (there.gateway, there.host)
            for line in sh(f"ip -n {where} -{family} neigh show nud all").splitlines()
            if "NOARP" not in line
        )

    before, every = tables(), []
    for n in range(600):
        if family == 4:
            packet: Packet = ARP(op=1 + n % 2, psrc=f"198.19.{n >> 8}.{n & 255}", pdst="169.254.53.53")
            every.append(bytes(Ether(src=SANDBOX_MAC, dst="ff:ff:ff:ff:ff:ff") / packet))
            every += frames(4, f"198.19.{n >> 8}.{n & 255}", f"198.19.9.{n & 255}", [UDP(dport=7)])
        else:
            option = ICMPv6NDOptSrcLLAddr(lladdr=SANDBOX_MAC)
            kind = ICMPv6ND_NS if n % 2 else ICMPv6ND_NA
            asks = kind(tgt=f"fd53:1::{n + 3:x}") / option
            every += frames(6, addresses(1, 6), "fe80::53", [asks])
            every += frames(6, f"fd53:1::{n + 3:x}", f"fd53:1::{n + 700:x}", [UDP(dport=7)])
    send(there, 1, every)
    counters = balanced(there)
    link = counters.links["eg1"]
    assert (link.ok.packets, link.denied.packets + link.other.packets) == (0, len(every))
    assert tables() == before
    assert entries(there) == (0, 0)


# ---- the log


def logged(sock: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 16))
    return found


def denied(there: Topology, number: int, count: int, port: int) -> None:
    bodies = [UDP(sport=1024, dport=port) / Raw(b"denied")]
    send(there, number, frames(4, addresses(number, 4), SERVER4, bodies) * count)


def test_a_flood_of_denials_leaves_the_neighbours_in_the_log(there: Topology) -> None:
    """Both of one workspace, for one reason: the first sends twenty thousand, the second one in between."""
    with contextlib.ExitStack() as stack:
        with inside(there.gateway):
            opened = {name: stack.enter_context(sock) for name, sock in sockets.open_all().items()}
        log = opened["nflog"]
        log.setblocking(False)
        log.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        began = time.monotonic()
        for port in (7001, 7002, 7003):
            denied(there, 1, 6000, 9)
            denied(there, 2, 1, port)
        seconds = time.monotonic() - began
        said = b"".join(logged(log)) + _later(log)
    for port in (7001, 7002, 7003):
        assert struct.pack(">HH", 1024, port) in said, "each of the neighbour's"
    flood = said.count(struct.pack(">HH", 1024, 9))
    assert 200 <= flood <= 200 + 50 * (seconds + 1), "and of the flood its share"
    assert balanced(there).denied["acme"]["unlisted"].packets == 18_003


def _later(log: socket.socket) -> bytes:
    """The kernel hands the log over in batches, the last after a tenth of a second."""
    found = b""

    def more() -> bool:
        nonlocal found
        found += b"".join(logged(log))
        return struct.pack(">HH", 1024, 7003) in found

    poll(more, seconds=1.0)
    return found


def test_what_is_late_is_shared_out_in_the_same_way(there: Topology) -> None:
    """One log for all workspaces: a flood of bare ACKs, and a neighbour's one."""
    to = there.address("plain.test")
    with contextlib.ExitStack() as stack:
        with inside(there.gateway):
            opened = {name: stack.enter_context(sock) for name, sock in sockets.open_all().items()}
        log = opened["nflog"]
        log.setblocking(False)
        log.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        send(there, 1, frames(4, addresses(1, 4), to, [TCP(sport=4000, dport=80, flags="A")]) * 6000)
        send(there, 2, frames(4, addresses(2, 4), to, [TCP(sport=7003, dport=80, flags="A")]))
        said = b""

        def told() -> bool:
            nonlocal said
            said += b"".join(logged(log))
            return struct.pack(">HH", 7003, 80) in said

        assert poll(told)
    assert said.count(struct.pack(">HH", 4000, 80)) < 400
    assert balanced(there).late["invalid"].packets == 6001
