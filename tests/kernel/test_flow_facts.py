"""Flow records against a real kernel: who talked to whom, to the byte; and what connection tracking counts of
what the guard admitted.

The law, for a link whose entries are all gone: recorded <= ok, in packets and bytes. The difference is what
was admitted and came to belong to no connection. Each cause has its test here.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from guard_topology import (
    ACME,
    POOLS,
    SERVER4,
    SERVER6,
    CidrRule,
    Guard,
    Topology,
    echo,
    inside,
    inspected,
    policy,
    poll,
    tcp,
    topology,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from egressd.kernel import sockets, sysctl
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.gateway import GATEWAY_SETTINGS
from egressd.model.identities import Link
from egressd.processes.denials import Attribution
from egressd.processes.flow_accounts import FlowLog, Hosts
from egressd.processes.journal_file import Draft
from egressd.ruleset.layout import GATEWAY_MAC, RESOLVER4, RESOLVER6, SANDBOX_MAC
from egressd.ruleset.observe import Tally

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])
REAL = {4: SERVER4, 6: SERVER6}
RULES = (
    *ACME,
    inspected("read.test", tcp(443)),
    CidrRule(network=IPv4Network(f"{SERVER4}/32"), ports=(tcp(81),), line=1),
    CidrRule(network=IPv6Network(f"{SERVER6}/128"), ports=(tcp(81),), line=2),
)
SETTINGS = {s.key: s.value for s in GATEWAY_SETTINGS if "nf_conntrack" in s.key}


@dataclass
class Flows:
    """The topology, and a flow log that reads what its gateway tells."""

    there: Topology
    opened: dict[str, socket.socket]
    conntrack: Conntrack
    drafts: list[Draft] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owners, self.hosts = Attribution(), Hosts(POOLS)
        self.log = FlowLog(self.owners, self.hosts, submit=self.drafts.append)
        self.opened["flows"].setblocking(False)

    def begin(self) -> None:
        """Link 1 is new, and its counters are as they are now."""
        with inside(self.there.gateway):
            self.conntrack.forget_all()
        self.read()
        self.drafts.clear()
        self.log = FlowLog(self.owners, self.hosts, submit=self.drafts.append)
        self.owners.bind(Link(1), "acme", *POOLS.sandbox(Link(1)))
        self.log.opening(Link(1))
        blocks = self.there.allocation.blocks["acme"]  # type: ignore[union-attr]
        hosts = {block: host for host, block in blocks.items()}
        self.hosts.learn("acme", self.there.wants["acme"].index, hosts, now=0)
        self.before = self.there.counters()

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.log.read(self.opened["flows"].recv(1 << 16), now=time.monotonic())

    def end(self) -> dict[str, Any]:
        """Link 1 ends as the warden and the controller end it; returns its `link-flows`."""
        ok = self.there.counters().links["eg1"].ok - self.before.links["eg1"].ok
        self.conntrack.forget_sources(POOLS.sandbox(Link(1)))
        self.owners.unbind(Link(1))
        fields = {"workspace": "acme", "ok_packets": ok.packets, "ok_bytes": ok.bytes}
        self.log.closed(Link(1), fields, at="2026-01-01T00:00:00.000000Z", now=time.monotonic())
        self.log.erased(Link(1))
        self.read()
        self.log.settle(now=time.monotonic(), empty=True)
        [found] = self.of("link-flows")
        assert found["unrecorded_packets"] >= 0
        assert found["unrecorded_bytes"] >= 0
        assert (found["ok_packets"], found["ok_bytes"]) == (ok.packets, ok.bytes)
        assert self.log.malformed == self.log.uncounted == 0
        return found

    def of(self, event: str) -> list[dict[str, Any]]:
        return [dict(d.fields) for d in self.drafts if d.event == event]

    def ended(self, count: int) -> list[dict[str, Any]]:
        """The flows, once so many are told of."""

        def enough() -> bool:
            self.read()
            return len(self.of("flow")) >= count

        assert poll(enough), self.drafts
        return self.of("flow")

    def admitted(self, host: str) -> Tally:
        found = Tally()
        for counters, sign in ((self.there.counters(), 1), (self.before, -1)):
            for element in counters.elements:
                if element.comment == host:
                    found += Tally(sign * element.packets, sign * element.bytes)
        return found


@pytest.fixture(scope="module")
def made() -> Iterator[Flows]:
    with topology("flow") as there, contextlib.ExitStack() as stack:
        there.sysctl(there.gateway, SETTINGS)
        there.apply(policy(*RULES))
        there.connect(1)
        for host in ("plain.test", "quic.test", "read.test"):
            there.resolve(host, SERVER4, SERVER6)
        for address in (SERVER4, SERVER6):
            for port in (80, 81, 443):
                echo(there.server(there.internet, address, port))
        with inside(there.gateway):
            opened = {name: stack.enter_context(sock) for name, sock in sockets.open_all().items()}
            conntrack = Conntrack()
        stack.callback(conntrack.close)
        yield Flows(there, opened, conntrack)


@pytest.fixture
def flows(made: Flows) -> Flows:
    made.begin()
    return made


def talk(sock: socket.socket, data: bytes) -> None:
    """Say it and hear it back, then end as both sides want it."""
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        got += sock.recv(65536)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
    sock.close()


def me(family: int) -> str:
    return str(POOLS.sandbox(Link(1))[family == 6])


def ip(family: int, destination: str, **fields: Any) -> Packet:
    return IP(src=me(4), dst=destination, **fields) if family == 4 else IPv6(src=me(6), dst=destination)


def send(flows: Flows, *packets: Packet, trailer: bytes = b"") -> int:
    """From link 1; returns how many bytes that was at the ingress of the link."""
    there = flows.there
    already = there.counters().links["eg1"].in_.packets
    wire = there.raw(there.sandbox(1), "eth0")
    data = [bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / packet) + trailer for packet in packets]
    for frame in data:
        wire.send(frame)
    there.settled(1, already + len(data))
    return sum(len(frame) - 14 for frame in data)


def lacking(found: dict[str, Any]) -> tuple[int, int]:
    return found["unrecorded_packets"], found["unrecorded_bytes"]


# ---- the settings


def test_the_settings_are_the_namespace_s_own(made: Flows) -> None:
    there = made.there
    keys = [key for key in SETTINGS if not key.endswith("loose")]
    assert len(keys) == 4
    with inside(there.gateway):
        inner = {key: sysctl.read(key) for key in keys}
    with inside(there.internet):
        outer = {key: sysctl.read(key) for key in keys}
    assert {key.rpartition("_")[2]: value for key, value in inner.items()} == {
        "acct": "1", "timestamp": "1", "events": "1", "wait": "10",
    }  # fmt: skip
    assert inner != outer


# ---- the kinds, each to the byte


@FAMILIES
def test_a_host_s_flow_is_recorded_under_its_name_with_its_real_address(flows: Flows, family: int) -> None:
    there = flows.there
    address = there.address("plain.test", family)
    client = there.client(1, address, 80)
    port = client.getsockname()[1]
    talk(client, b"x" * 100_000)
    found = flows.end()
    admitted = flows.admitted("plain.test")
    [flow] = flows.of("flow")
    seconds = flow.pop("seconds")
    back_packets, back_bytes = flow.pop("in_packets"), flow.pop("in_bytes")
    assert flow == {
        "link": "eg1", "workspace": "acme", "host": "plain.test", "kind": "host", "protocol": "tcp",
        "source": me(family), "source_port": port, "destination": address, "port": 80,
        "address": REAL[family], "address_port": 80,
        "out_packets": admitted.packets, "out_bytes": admitted.bytes,
    }  # fmt: skip
    assert admitted.bytes > 100_000
    assert back_bytes > 100_000
    assert back_packets > 3
    assert 0 < seconds < 10
    replies = there.counters().replies
    old = flows.before.replies
    counted = sum((replies[m] - old.get(m, Tally()) for m in replies), Tally())
    assert (back_packets, back_bytes) == (counted.packets, counted.bytes)
    assert lacking(found) == (0, 0)
    assert (found["flows"], found["questions"], found["link"]) == (1, 0, "eg1")


@FAMILIES
def test_a_datagram_s_flow(flows: Flows, family: int) -> None:
    there = flows.there
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    server = there.plug(there.internet, kind, socket.SOCK_DGRAM)
    server.bind((REAL[family], 443))
    server.settimeout(3)
    client = there.plug(there.sandbox(1), kind, socket.SOCK_DGRAM)
    client.settimeout(3)
    client.connect((there.address("quic.test", family), 443))
    client.send(b"a" * 100)
    _, peer = server.recvfrom(2000)
    server.sendto(b"b" * 300, peer)
    assert client.recv(2000) == b"b" * 300
    server.close()
    found = flows.end()
    [flow] = flows.of("flow")
    header = 28 if family == 4 else 48
    assert (flow["protocol"], flow["host"], flow["address"]) == ("udp", "quic.test", REAL[family])
    assert (flow["out_packets"], flow["out_bytes"]) == (1, 100 + header)
    assert (flow["in_packets"], flow["in_bytes"]) == (1, 300 + header)
    assert lacking(found) == (0, 0)


@FAMILIES
def test_a_local_service_s_flow(flows: Flows, family: int) -> None:
    there = flows.there
    listener = flows.opened[f"relay{family}"]
    client = there.client(1, there.address("ollama", family), 11434)
    server, _ = listener.accept()
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.close()
    assert client.recv(1) == b""
    client.close()
    found = flows.end()
    [flow] = flows.of("flow")
    admitted = flows.admitted("ollama")
    assert (flow["kind"], flow["host"], flow["port"]) == ("local", "ollama", 11434)
    assert (flow["address"], flow["address_port"]) == (None, None)
    assert (flow["out_packets"], flow["out_bytes"]) == (admitted.packets, admitted.bytes)
    assert lacking(found) == (0, 0)


@FAMILIES
def test_both_halves_of_a_connection_that_is_read(flows: Flows, family: int) -> None:
    there = flows.there
    address = there.address("read.test", family)
    client = there.client(1, address, 443)
    port = client.getsockname()[1]
    server, _ = flows.opened[f"inspect{family}"].accept()
    dialled = there.dialling(there.source(family))
    dialled.connect((address, 443))
    talk(dialled, b"y" * 5000)
    server.close()
    client.close()
    with inside(there.gateway):
        flows.conntrack.forget_all()
    found = flows.end()
    halves = {flow["kind"]: flow for flow in flows.of("flow")}
    assert sorted(halves) == ["dialled", "read"]
    read, other = halves["read"], halves["dialled"]
    assert (read["link"], read["workspace"], read["host"]) == ("eg1", "acme", "read.test")
    assert (read["source"], read["source_port"], read["address"]) == (me(family), port, None)
    assert (other["link"], other["workspace"], other["host"]) == (None, "acme", "read.test")
    assert (other["source"], other["address"], other["address_port"]) == (
        there.source(family), REAL[family], 443,
    )  # fmt: skip
    old = {(d.address, d.port): d for d in flows.before.dialled}
    [counted] = [d for d in there.counters().dialled if (":" in d.address) == (family == 6)]
    was = old[counted.address, counted.port]
    assert (other["out_packets"], other["out_bytes"]) == (
        counted.packets - was.packets, counted.bytes - was.bytes,
    )  # fmt: skip
    assert lacking(found) == (0, 0), "the inspector's half is not the link's"
    assert found["flows"] == 1


@FAMILIES
def test_a_network_s_flow_goes_as_addressed(flows: Flows, family: int) -> None:
    talk(flows.there.client(1, REAL[family], 81), b"z" * 10)
    found = flows.end()
    [flow] = flows.of("flow")
    assert (flow["kind"], flow["destination"], flow["address"]) == ("direct", REAL[family], REAL[family])
    assert lacking(found) == (0, 0)


@FAMILIES
def test_questions_to_the_resolver_are_counted_and_not_recorded(flows: Flows, family: int) -> None:
    there = flows.there
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    for size in (10, 20, 30):
        client = there.plug(there.sandbox(1), kind, socket.SOCK_DGRAM)
        client.settimeout(3)
        client.connect((str(RESOLVER6 if family == 6 else RESOLVER4), 53))
        client.send(b"q" * size)
        _, peer = flows.opened[f"udp{family}"].recvfrom(100)
        flows.opened[f"udp{family}"].sendto(b"a" * 100, peer)
        assert client.recv(200)
    found = flows.end()
    header = 28 if family == 4 else 48
    assert flows.of("flow") == []
    assert (found["flows"], found["questions"]) == (0, 3)
    assert (found["question_packets"], found["question_bytes"]) == (3, 60 + 3 * header)
    assert (found["answer_packets"], found["answer_bytes"]) == (3, 300 + 3 * header)
    assert (found["out_packets"], found["out_bytes"]) == (3, 60 + 3 * header)
    assert lacking(found) == (0, 0)


# ---- what connection tracking does not count of what the guard admitted


@FAMILIES
def test_packets_of_no_connection_are_admitted_and_unrecorded(flows: Flows, family: int) -> None:
    where = ip(family, flows.there.address("plain.test", family))
    octets = send(flows, where / TCP(sport=1010, dport=80, flags="A") / b"leak")
    found = flows.end()
    assert lacking(found) == (1, octets)
    assert flows.of("flow") == []


@FAMILIES
def test_the_first_packet_of_what_is_refused_late_is_unrecorded(flows: Flows, family: int) -> None:
    where = ip(family, flows.there.address("nowhere.test", family))
    octets = send(flows, *(where / TCP(sport=port, dport=80, flags="S") for port in (1100, 1101)))
    found = flows.end()
    assert lacking(found) == (2, octets)
    assert flows.of("flow") == []


@FAMILIES
def test_what_trails_a_packet_is_counted_by_the_guard_alone(flows: Flows, family: int) -> None:
    where = ip(family, flows.there.address("quic.test", family))
    octets = send(flows, where / UDP(sport=1200, dport=443) / b"x", trailer=bytes(17))
    found = flows.end()
    [flow] = flows.of("flow")
    assert (flow["out_packets"], flow["out_bytes"]) == (1, octets - 17)
    assert lacking(found) == (0, 17)


def test_a_header_that_ip_refuses_is_unrecorded(flows: Flows) -> None:
    where = IP(src=me(4), dst=flows.there.address("quic.test", 4), chksum=0xBAD)
    octets = send(flows, where / UDP(sport=1300, dport=443) / b"x")
    assert lacking(flows.end()) == (1, octets)


@FAMILIES
def test_packets_of_a_connection_after_its_reset(flows: Flows, family: int) -> None:
    """The entry lives on for ten seconds and counts them, whatever becomes of them."""
    there = flows.there
    client = there.client(1, there.address("plain.test", family), 80)
    port = client.getsockname()[1]
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    where = ip(family, there.address("plain.test", family))
    send(flows, *(where / TCP(sport=port, dport=80, flags="A", seq=1, ack=1) / b"late" for _ in range(3)))
    found = flows.end()
    assert found["out_packets"] + found["unrecorded_packets"] == found["ok_packets"]
    assert found["unrecorded_packets"] <= 3


@FAMILIES
def test_with_an_open_guard_ping_is_a_flow_to_the_unlisted(made: Flows, family: int) -> None:
    there = made.there
    there.apply(policy(*RULES, guard=Guard.OFF))
    try:
        made.begin()
        ping = ICMP(id=7) / b"ping" if family == 4 else ICMPv6EchoRequest(id=7) / b"ping"
        octets = send(made, ip(family, REAL[family]) / ping)
        found = made.end()
        [flow] = made.of("flow")
        assert (flow["protocol"], flow["host"]) == ("icmp" if family == 4 else "icmpv6", "(unlisted)")
        assert (flow["kind"], flow["port"], flow["address"]) == ("direct", None, REAL[family])
        assert (flow["out_packets"], flow["out_bytes"]) == (1, octets)
        assert (flow["in_packets"], flow["icmp_type"]) == (1, 8 if family == 4 else 128)
        assert lacking(found) == (0, 0)
    finally:
        there.apply(policy(*RULES))


def test_an_entry_tells_of_its_end_by_itself_too(flows: Flows) -> None:
    """Not only when the link is closed: UDP that is not answered is forgotten after a while."""
    there = flows.there
    there.sysctl(there.gateway, {"net/netfilter/nf_conntrack_udp_timeout": 1})
    try:
        send(flows, ip(4, there.address("quic.test", 4)) / UDP(sport=1400, dport=443) / b"x")
        time.sleep(1.1)  # the kernel's own time
        send(flows, ip(4, there.address("quic.test", 4)) / UDP(sport=1400, dport=443) / b"x")
        [flow] = flows.ended(1)
        assert flow["out_packets"] == 1
    finally:
        there.sysctl(there.gateway, {"net/netfilter/nf_conntrack_udp_timeout": 30})
    assert lacking(flows.end()) == (0, 0)


def test_what_does_not_fit_the_socket_is_told_as_an_overrun(flows: Flows) -> None:
    """And the entries are forgotten all the same: nobody waits for a reader that hangs."""
    there = flows.there
    count = 600
    with inside(there.gateway):
        small = sockets.open_flows()
    with small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        where = ip(4, there.address("quic.test", 4))
        send(flows, *(where / UDP(sport=2000 + i, dport=443) / b"x" for i in range(count)))
        flows.conntrack.forget_sources(POOLS.sandbox(Link(1)))
        with inside(there.gateway):
            assert flows.conntrack.marks() == []
        heard, overruns = 0, 0
        while True:
            try:
                heard += bool(small.recv(1 << 16))
            except BlockingIOError:
                break
            except OSError:
                overruns += 1
    assert overruns == 1
    assert heard < count
    found = flows.end()
    assert (found["flows"], lacking(found)) == (count, (0, 0))
