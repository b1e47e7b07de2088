"""Connections to one address of a host are cut: both ends hear of it, and everybody else's live on.

    sandbox 1, 2 of acme, 3 of other        internet: FORBIDDEN and ALLOWED, both addresses of the same names

What the inspector sends on is played by sockets of the gateway, as in test_guard_dialled.py.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from guard_topology import (
    POOLS,
    SERVER4,
    SERVER6,
    Topology,
    batch,
    frames,
    inside,
    inspected,
    named,
    policy,
    poll,
    tcp,
    topology,
    udp,
)
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from egressd.kernel.conntrack import Conntrack
from egressd.kernel.nft import Nft
from egressd.model.identities import Link
from egressd.ruleset import diff
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import BLOCKS, CUT, GATEWAY_MAC, SANDBOX_MAC, Kind, Mark, begun_with

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])
CARRIERS = pytest.mark.parametrize("carrier", ["forwarded", "inspected"])
FORBIDDEN = {4: "10.3.0.66", 6: "2001:db8:3::66"}
ALLOWED = {4: SERVER4, 6: SERVER6}
NAMES = {"forwarded": ("plain.test", 80), "inspected": ("pay.test", 443)}
AT_ONCE = 0.050  # seconds
RULES = (named("plain.test", tcp(80), udp(53)), inspected("pay.test", tcp(443)))


@dataclass
class Scene:
    t: Topology
    conntrack: Conntrack

    def mask(self, workspace: str = "acme") -> tuple[int, int]:
        index = self.t.wants[workspace].index
        return int(Mark(kind=Kind.FORWARD, workspace=index, block=0)), 0xFFFF_FFFF & ~(BLOCKS - 1)

    def mark(self, host: str, workspace: str = "acme") -> int:
        index = self.t.wants[workspace].index
        return int(Mark(kind=Kind.FORWARD, workspace=index, block=self.t.block(host, workspace)))

    def led(self, workspace: str = "acme") -> set[tuple[int, str]]:
        return {(mark, str(address)) for mark, address in self.conntrack.led(*self.mask(workspace))}

    def cut(self, host: str, address: str, workspace: str = "acme") -> int:
        """As the warden does it, its way being closed."""
        place = (self.mark(host, workspace), ip_address(address))
        with inside(self.t.gateway):
            return self.conntrack.cut([place], *self.mask(workspace))

    def close_way(self, family: int) -> None:
        for host in ("plain.test", "pay.test"):
            self.t.resolve(host, ALLOWED[4], ALLOWED[6], *([FORBIDDEN[10 - family]]))

    def pair(
        self, carrier: str, family: int, address: str, *, sandbox: int = 1, workspace: str = "acme"
    ) -> tuple[socket.socket, socket.socket]:
        """A connection to that one of the host's addresses: (the client's end, the host's), both tried."""
        host, port = NAMES[carrier]
        slot = 0 if address == FORBIDDEN[family] else 1
        synthetic = self.t.address(host, family, slot, workspace)
        listener = self.listeners[address, port]
        if carrier == "forwarded":
            client = self.t.client(sandbox, synthetic, port)
        else:
            client = self.t.dialling(self.t.source(family, workspace))
            client.connect((synthetic, port))
        peer, _ = listener.accept()
        peer.settimeout(3)
        self.t.sockets.append(peer)
        assert exchange(client, peer, b"before")
        return client, peer

    listeners: dict[tuple[str, int], socket.socket]

    def entries(self, address: str) -> list[str]:
        """Lines of the gateway's table with that address."""
        wanted = ip_address(address).exploded if ":" in address else address
        with inside(self.t.gateway):
            table = Path("/proc/thread-self/net/nf_conntrack").read_text()
        return [line for line in table.splitlines() if f"src={wanted} " in line]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with topology("cut") as t, contextlib.ExitStack() as stack:
        for family, length in ((4, "24"), (6, "64 nodad")):
            address, *more = length.split()
            batch(t.internet, [f"addr add {FORBIDDEN[family]}/{address} dev inet0 {' '.join(more)}"])
            batch(t.host, [f"neigh add {FORBIDDEN[family]} lladdr 02:53:00:00:03:02 dev wan nud permanent"])
        t.apply(policy(*RULES), policy(*RULES, workspace="other"))
        for number, workspace in ((1, "acme"), (2, "acme"), (3, "other")):
            t.connect(number, workspace)
        for workspace in ("acme", "other"):
            for host in ("plain.test", "pay.test"):
                t.resolve(host, FORBIDDEN[4], ALLOWED[4], FORBIDDEN[6], ALLOWED[6], workspace=workspace)
        listeners = {
            (address, port): t.server(t.internet, address, port)
            for address in (*FORBIDDEN.values(), *ALLOWED.values())
            for port in (80, 443)
        }
        with inside(t.gateway):
            conntrack = Conntrack()
        stack.callback(conntrack.close)
        yield Scene(t, conntrack, listeners)


def exchange(one: socket.socket, other: socket.socket, data: bytes) -> bool:
    """Both ways."""
    one.sendall(data)
    other.sendall(data)
    return received(other, len(data)) == received(one, len(data)) == data


def received(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def reset_within(sock: socket.socket, seconds: float) -> float:
    """How long until the end of this connection is told, in seconds; it must be a reset."""
    began = time.perf_counter()
    waiting = select.poll()
    waiting.register(sock, 0)  # POLLERR and POLLHUP come unasked
    assert waiting.poll(seconds * 1000), "nothing was heard"
    elapsed = time.perf_counter() - began
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 104, "ECONNRESET"
    return elapsed


def payload_to(address: str, seen: list[bytes]) -> int:
    """Bytes of data that frames carry to this address."""
    total = 0
    for frame in map(Ether, seen):
        network = frame.getlayer(IP) or frame.getlayer(IPv6)
        if network is None or network.dst != address:
            continue
        upper = network.payload
        total += len(bytes(upper.payload))
    return total


# ---- who is idle


@CARRIERS
@FAMILIES
def test_an_idle_connection_is_reset_at_both_ends_at_once(scene: Scene, carrier: str, family: int) -> None:
    client, peer = scene.pair(carrier, family, FORBIDDEN[family])
    scene.close_way(family)
    uplink = scene.t.raw(scene.t.internet, "inet0")
    assert scene.cut(NAMES[carrier][0], FORBIDDEN[family]) == 1
    reset_within(client, AT_ONCE)
    reset_within(peer, AT_ONCE)
    [told] = [Ether(frame) for frame in frames(uplink)]
    assert (told[TCP].flags, len(bytes(told[TCP].payload))) == ("R", 0)
    assert scene.t.counters().late["cut"].packets == 1, "the client's answer to the nudge, refused"


@CARRIERS
@FAMILIES
def test_the_same_host_s_other_address_and_everybody_else_stay(
    scene: Scene, carrier: str, family: int
) -> None:
    host = NAMES[carrier][0]
    client, _ = scene.pair(carrier, family, FORBIDDEN[family])
    stay = {
        "the allowed address": scene.pair(carrier, family, ALLOWED[family]),
        "another workspace": scene.pair(carrier, family, FORBIDDEN[family], sandbox=3, workspace="other"),
        "another host": scene.pair(
            "inspected" if carrier == "forwarded" else "forwarded", family, FORBIDDEN[family]
        ),
        "the other family": scene.pair(carrier, 10 - family, FORBIDDEN[10 - family]),
    }
    streams = {what: Stream(*pair) for what, pair in stay.items()}
    scene.close_way(family)
    assert scene.cut(host, FORBIDDEN[family]) == 1
    reset_within(client, AT_ONCE)
    for what, stream in streams.items():
        assert stream.end(), what
    assert scene.cut(host, FORBIDDEN[family]) == 0, "there is nothing more"


class Stream:
    """Writes without pause from a thread, and counts what arrives."""

    def __init__(self, client: socket.socket, peer: socket.socket) -> None:
        self._client, self._peer = client, peer
        self._stop = threading.Event()
        self.sent = self.got = 0
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()
        assert poll(lambda: self.got > 1_000_000)

    def _write(self) -> None:
        while not self._stop.is_set():
            self._client.sendall(b"x" * 8192)
            self.sent += 8192
        self._client.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        while data := self._peer.recv(1 << 16):
            self.got += len(data)

    def end(self) -> bool:
        """Goes on for a while, and then: did every byte arrive?"""
        before = self.got
        went_on = poll(lambda: self.got > before + 1_000_000)
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return went_on and self.got == self.sent


@CARRIERS
def test_every_connection_of_the_host_to_it_is_cut_whoever_began_it(scene: Scene, carrier: str) -> None:
    family = 6
    clients = [scene.pair(carrier, family, FORBIDDEN[family], sandbox=1 + n % 2)[0] for n in range(10)]
    scene.close_way(family)
    assert scene.cut(NAMES[carrier][0], FORBIDDEN[family]) == 10
    for client in clients:
        reset_within(client, AT_ONCE)


# ---- who is busy


@CARRIERS
@FAMILIES
@pytest.mark.parametrize("direction", ["upload", "download", "both"])
def test_a_busy_connection_ends_with_no_byte_more(
    scene: Scene, carrier: str, family: int, direction: str
) -> None:
    client, peer = scene.pair(carrier, family, FORBIDDEN[family])
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    busy = [Busy(client, writes=direction != "download"), Busy(peer, writes=direction != "upload")]
    assert poll(lambda: sum(end.got for end in busy) > 1_000_000)
    scene.close_way(family)
    assert scene.cut(NAMES[carrier][0], FORBIDDEN[family]) == 1
    uplink = scene.t.raw(scene.t.internet, "inet0")
    assert busy[0].error(1) == "ConnectionResetError"
    if direction != "both":
        # At once, or, where data of the client was on the way and is missed, when the host next asks. One
        # that has data of its own on the way does not ask, and gives up in its own time.
        assert busy[1].error(3) == "ConnectionResetError", "and its host hears of it"
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0


class Busy:
    """One end that writes, or reads, for as long as it can."""

    def __init__(self, sock: socket.socket, *, writes: bool) -> None:
        self._sock, self.got, self._errors = sock, 0, list[str]()
        self._threads = [threading.Thread(target=self._run, args=(self._read,), daemon=True)]
        if writes:
            self._threads.append(threading.Thread(target=self._run, args=(self._write,), daemon=True))
        sock.settimeout(10)
        for thread in self._threads:
            thread.start()

    def _run(self, what: object) -> None:
        try:
            while what():  # type: ignore[operator]
                pass
        except OSError as error:
            self._errors.append(type(error).__name__)

    def _read(self) -> bool:
        data = self._sock.recv(1 << 16)
        self.got += len(data)
        return bool(data)

    def _write(self) -> bool:
        return bool(self._sock.send(b"x" * 8192))

    def error(self, seconds: float) -> str:
        """A reset is told to one of the two: afterwards reading meets the end, and writing EPIPE."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "nothing was heard"
        return min(self._errors, key=lambda name: name != "ConnectionResetError", default="")


# ---- what is not an open TCP connection


@FAMILIES
def test_datagrams_are_refused_and_answers_do_not_arrive(scene: Scene, family: int) -> None:
    t = scene.t
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    server = t.plug(t.internet, kind, socket.SOCK_DGRAM)
    server.bind((FORBIDDEN[family], 53))
    server.settimeout(2)
    client = t.plug(t.sandbox(1), kind, socket.SOCK_DGRAM)
    client.settimeout(2)
    client.connect((t.address("plain.test", family), 53))
    client.send(b"question")
    _, back = server.recvfrom(100)
    server.sendto(b"answer", back)
    assert client.recv(100) == b"answer"
    t.resolve("plain.test")  # its slots lead nowhere
    assert scene.cut("plain.test", FORBIDDEN[family]) == 1
    uplink, wire = t.raw(t.internet, "inet0"), t.raw(t.sandbox(1), "eth0")
    server.sendto(b"late", back)
    with pytest.raises(ConnectionRefusedError):
        client.send(b"more")
        client.recv(100)
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0
    assert b"late" not in b"".join(frames(wire))
    assert scene.entries(FORBIDDEN[family]) == []
    assert t.counters().late["unresolved"].packets == 1
    t.resolve("plain.test", ALLOWED[4], ALLOWED[6])
    other = t.plug(t.internet, kind, socket.SOCK_DGRAM)
    other.bind((ALLOWED[family], 53))
    other.settimeout(2)
    client.send(b"again")
    assert other.recv(100) == b"again", "the same socket reaches the address that is allowed"


@FAMILIES
def test_a_connection_that_is_being_made_is_refused(scene: Scene, family: int) -> None:
    """Its SYN went out before, and nobody has answered."""
    t = scene.t
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    batch(t.internet, [f"route add blackhole {POOR[family]}"])
    sock = t.plug(t.sandbox(1), kind, socket.SOCK_STREAM)
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.connect((t.address("plain.test", family), 80))
    assert poll(lambda: bool(scene.entries(FORBIDDEN[family])))
    t.resolve("plain.test")
    uplink = t.raw(t.internet, "inet0")
    assert scene.cut("plain.test", FORBIDDEN[family]) == 1
    waiting = select.poll()
    waiting.register(sock, 0)
    assert waiting.poll(5000), "with the SYN that is sent again"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (104, 111)
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0


POOR = {4: "10.3.0.1/32", 6: "2001:db8:3::1/128"}  # where the internet's answers would go


# ---- what is left, and what is counted


@CARRIERS
@FAMILIES
def test_nothing_is_left_and_a_new_connection_goes_where_it_may(
    scene: Scene, carrier: str, family: int
) -> None:
    client, _ = scene.pair(carrier, family, FORBIDDEN[family])
    mark = scene.mark(NAMES[carrier][0])
    assert (mark, FORBIDDEN[family]) in scene.led()
    scene.close_way(family)
    before = scene.t.observed()
    scene.cut(NAMES[carrier][0], FORBIDDEN[family])
    reset_within(client, AT_ONCE)
    assert scene.led() == set(), "what was cut is not open"
    [left] = scene.entries(FORBIDDEN[family])
    assert " CLOSE " in left
    number = int(left.split("mark=")[1].split()[0])
    assert number & 0xF000_0000 == CUT
    assert begun_with(number) == mark, "the record of it says whose it was"
    assert int(left.split()[4]) <= 10, "seconds until the kernel forgets it"
    assert scene.t.observed() == before, "the ruleset is what it was"
    assert not diff.plan(scene.t.observed(), scene.t.wanted())
    fresh, peer = scene.pair(carrier, family, ALLOWED[family])
    assert exchange(fresh, peer, b"after")
    with inside(scene.t.gateway):
        tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
    sockets = sum(len(table.splitlines()) - 1 for table in tables)
    assert sockets == (1 if carrier == "inspected" else 0), "no nudge's socket stays"


@FAMILIES
def test_the_books_balance(scene: Scene, family: int) -> None:
    for carrier in NAMES:
        client, _ = scene.pair(carrier, family, FORBIDDEN[family])
        scene.cut(NAMES[carrier][0], FORBIDDEN[family])
        reset_within(client, AT_ONCE)
    owners = {"eg1": "acme", "eg2": "acme", "eg3": "other"}
    verdict = books(equations(scene.t.counters(), {}, {}, workspace_of=owners))
    assert verdict.balanced, verdict


def test_what_is_open_is_read_once_each_in_both_families(scene: Scene) -> None:
    for carrier in NAMES:
        for family in (4, 6):
            for address in (FORBIDDEN[family], ALLOWED[family]):
                scene.pair(carrier, family, address)
                scene.pair(carrier, family, address, sandbox=2)
            scene.pair(carrier, family, FORBIDDEN[family], sandbox=3, workspace="other")
    for workspace, places in (("acme", (FORBIDDEN, ALLOWED)), ("other", (FORBIDDEN,))):
        wanted = {
            (scene.mark(host, workspace), place[family])
            for host, _ in NAMES.values()
            for place in places
            for family in (4, 6)
        }
        assert scene.led(workspace) == wanted


# ---- what a sandbox can make of it


@FAMILIES
def test_who_does_not_answer_the_nudge_sends_nothing_all_the_same(scene: Scene, family: int) -> None:
    """A sandbox that has lost its seccomp filter and drops what the nudge says."""
    t = scene.t
    client, _ = scene.pair("forwarded", family, FORBIDDEN[family])
    with inside(t.sandbox(1)):
        Nft().run(
            [
                "add table inet deaf",
                "add chain inet deaf in { type filter hook input priority 0; policy drop; }",
            ]
        )
    scene.close_way(family)
    uplink = t.raw(t.internet, "inet0")
    assert scene.cut("plain.test", FORBIDDEN[family]) == 1
    [left] = scene.entries(FORBIDDEN[family])
    assert " CLOSE " in left and int(left.split()[4]) <= 10, "it is forgotten all the same"
    for _ in range(3):
        client.send(b"secret")
    assert poll(lambda: t.counters().late["cut"].packets >= 5), "refused, and sent again"
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0


@FAMILIES
def test_words_cannot_be_hidden_in_resets(scene: Scene, family: int) -> None:
    """The sandbox's own resets may go out as its kernel makes them, and few."""
    t = scene.t
    client, _ = scene.pair("forwarded", family, FORBIDDEN[family])
    port = client.getsockname()[1]
    uplink, wire = t.raw(t.internet, "inet0"), t.raw(t.sandbox(1), "eth0")
    scene.close_way(family)
    assert scene.cut("plain.test", FORBIDDEN[family]) == 1
    reset_within(client, AT_ONCE)
    [told] = [Ether(frame)[TCP] for frame in frames(uplink)]
    before = t.counters().late["cut"].packets
    network = (IP if family == 4 else IPv6)(
        src=str(POOLS.sandbox(Link(1))[family == 6]), dst=t.address("plain.test", family)
    )
    packet = Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / network
    bare = TCP(sport=port, dport=80, flags="R", seq=told.seq)
    optional = TCP(sport=port, dport=80, flags="R", seq=told.seq, options=[("Timestamp", (1, 2))])
    for wordy in (bare / b"words", optional, optional / b"words"):
        wire.send(bytes(packet / wordy))
    assert frames(uplink) == []
    for _ in range(100):
        wire.send(bytes(packet / bare))
    gone = len(frames(uplink))
    assert 0 < gone <= 50  # 20 a second, and a machine may be slow to send a hundred
    assert t.counters().late["cut"].packets - before == 103 - gone


@CARRIERS
@FAMILIES
def test_what_a_warden_left_half_done_is_finished(
    scene: Scene, carrier: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died after it had marked the connection: nothing passes, and the next one ends it."""
    client, peer = scene.pair(carrier, family, FORBIDDEN[family])
    scene.close_way(family)
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr("egressd.kernel.conntrack.nudge", _killed)
        scene.cut(NAMES[carrier][0], FORBIDDEN[family])
    uplink, wire = scene.t.raw(scene.t.internet, "inet0"), scene.t.raw(scene.t.sandbox(1), "eth0")
    client.send(b"secret")
    peer.send(b"answer")
    peer.shutdown(socket.SHUT_WR)
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(10)
    with inside(scene.t.gateway):
        scene.conntrack.resume()
    reset_within(client, AT_ONCE)
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0
    assert b"answer" not in b"".join(frames(wire))


def _killed(**_: object) -> None:
    raise KeyboardInterrupt


@CARRIERS
@FAMILIES
def test_without_nudges_the_next_word_of_either_end_ends_it(
    scene: Scene, carrier: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel makes no such sockets, or there are too many connections."""
    speaks = [scene.pair(carrier, family, FORBIDDEN[family]) for _ in range(3)]
    scene.close_way(family)
    monkeypatch.setattr("egressd.kernel.conntrack.nudge", _refused)
    assert scene.cut(NAMES[carrier][0], FORBIDDEN[family]) == 3
    uplink = scene.t.raw(scene.t.internet, "inet0")
    speaks[0][0].send(b"client")
    reset_within(speaks[0][0], AT_ONCE)
    speaks[1][1].send(b"host")
    reset_within(speaks[1][0], AT_ONCE)
    speaks[2][1].shutdown(socket.SHUT_WR)  # not as if all had been said
    reset_within(speaks[2][0], AT_ONCE)
    assert payload_to(FORBIDDEN[family], frames(uplink)) == 0


def _refused(**_: object) -> None:
    raise OSError


@FAMILIES
def test_a_connection_keeps_the_mark_it_was_begun_with(scene: Scene, family: int) -> None:
    """One that is cut while a packet of it is on its way must not be given its packet's mark once more."""
    client, _ = scene.pair("forwarded", family, FORBIDDEN[family])
    scene.t.apply(policy(inspected("plain.test", tcp(80))), policy(*RULES, workspace="other"))
    client.send(b"read from now on")
    device = scene.t.links[1].link.device
    assert poll(lambda: scene.t.counters().links[device].in_.packets >= 4)
    marks = {int(line.split("mark=")[1].split()[0]) for line in scene.entries(FORBIDDEN[family])}
    assert marks == {scene.mark("plain.test")}
