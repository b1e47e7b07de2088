"""What a program in a sandbox sees: allowed works, and everything else is refused at once, IPv4 and IPv6."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from guard_topology import (
    ACME,
    HOST4,
    HOST6,
    POOLS,
    SERVER4,
    SERVER6,
    CidrRule,
    Guard,
    Topology,
    echo,
    frames,
    inside,
    named,
    policy,
    poll,
    tcp,
    topology,
)

from egressd.model.identities import Link
from egressd.packets import nflog
from egressd.ruleset import diff
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import ADMITTED, NFLOG_GROUP, RELAY_PORT, RESOLVER4, RESOLVER6, Kind
from egressd.ruleset.observe import Counters, Tally

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("family", [4, 6])
AT_ONCE = 50.0  # milliseconds
DIRECT = (
    CidrRule(network=ip_network(f"{SERVER4}/32"), ports=(tcp(8080),), line=1),
    CidrRule(network=ip_network("2001:db8:3::/64"), ports=(tcp(8080),), line=1),
)


@pytest.fixture(scope="module")
def there() -> Iterator[Topology]:
    with topology("acc") as made:
        rules = (*ACME, *DIRECT, named("count4.test", tcp(80)), named("count6.test", tcp(80)))
        made.apply(
            policy(*rules),
            policy(named("plain.test", tcp(80)), workspace="watch", guard=Guard.OBSERVE),
            policy(named("plain.test", tcp(80)), workspace="open", guard=Guard.OFF),
            policy(*DIRECT, workspace="wide", guard=Guard.OFF),
        )
        made.connect(1)
        made.connect(2)
        made.connect(3, "watch")
        made.connect(4, "open")
        made.connect(5, "wide")
        for workspace in ("acme", "watch", "open"):
            made.resolve("plain.test", SERVER4, SERVER6, workspace=workspace)
        for host in ("quic.test", "count4.test", "count6.test"):
            made.resolve(host, SERVER4, SERVER6)
        for address in (SERVER4, SERVER6):
            for port in (80, 8080, 9999):
                echo(made.server(made.internet, address, port))
        for address in (HOST4, HOST6):
            echo(made.server(made.host, address, 22))
        yield made


def server(family: int) -> str:
    return SERVER4 if family == 4 else SERVER6


def balanced(t: Topology) -> bool:
    workspaces = {lease.link.device: lease.workspace for lease in t.links.values()}
    result = books(equations(t.counters(), {}, {}, workspace_of=workspaces))
    return result.balanced


@FAMILIES
@pytest.mark.parametrize("slot", range(4))
def test_every_slot_of_an_allowed_name_leads_to_it(there: Topology, family: int, slot: int) -> None:
    sock = there.client(1, there.address("plain.test", family, slot), 80)
    sock.sendall(b"hello")
    assert sock.recv(100) == b"hello"
    sock.close()


@FAMILIES
def test_a_connection_is_counted_out_in_and_once(there: Topology, family: int) -> None:
    host = f"count{family}.test"  # nobody else's connections, closing late, are in its counters
    mark, before = there.mark(host), there.counters()
    sock = there.client(1, there.address(host, family), 80)
    sock.sendall(b"x" * 1000)
    assert sock.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
    header = (20 if family == 4 else 40) + 32  # IP, and TCP with timestamps; 8 more in a SYN
    assert poll(lambda: element(there, host, family, 80).packets >= 4)
    after = there.counters()
    assert after.opened[mark] - before.opened[mark] == Tally(1, header + 8)
    out = element_of(after, host, family) - element_of(before, host, family)
    assert out.bytes == 8 + out.packets * header + 1000
    back = after.replies[mark] - before.replies[mark]
    assert back.bytes == 8 + back.packets * header + 1000
    sock.close()


def element(t: Topology, host: str, family: int, port: int, protocol: str = "tcp") -> Tally:
    return element_of(t.counters(), host, family, port, protocol)


def element_of(
    counters: Counters, host: str, family: int, port: int = 80, protocol: str = "tcp", workspace: str = "acme"
) -> Tally:
    for found in counters.elements:
        if (found.workspace, found.comment, found.port, found.protocol) == (
            workspace,
            host,
            port,
            protocol,
        ) and ((":" in found.address) == (family == 6)):
            return Tally(found.packets, found.bytes)
    raise AssertionError(host)


REFUSED = {
    "a port not listed": (lambda t, f: t.address("plain.test", f), 81, "unlisted"),
    "the real address": (lambda t, f: server(f), 80, "unlisted"),
    "the host": (lambda t, f: HOST4 if f == 4 else HOST6, 22, "unlisted"),
    "the gateway": (lambda t, f: "169.254.54.2" if f == 4 else "fd53:2::2", 8443, "unlisted"),
    "the other sandbox": (lambda t, f: str(POOLS.sandbox(Link(2))[f == 6]), 80, "unlisted"),
    "a metadata service": (lambda t, f: "169.254.169.254" if f == 4 else "fd00:ec2::254", 80, "unlisted"),
    "another port of an allowed network": (lambda t, f: server(f), 8081, "unlisted"),
    "the resolver on another port": (lambda t, f: str(RESOLVER4 if f == 4 else RESOLVER6), 54, "unlisted"),
}


@FAMILIES
@pytest.mark.parametrize("what", REFUSED)
def test_tcp_that_is_not_allowed_is_reset_at_once(there: Topology, family: int, what: str) -> None:
    address, port, reason = REFUSED[what]
    before = there.counters()
    outcome, milliseconds = there.timed(1, address(there, family), port)
    assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True)
    after = there.counters()
    assert (after.denied["acme"][reason] - before.denied["acme"][reason]).packets == 1
    assert balanced(there)


@FAMILIES
def test_udp_that_is_not_allowed_is_refused_at_once(there: Topology, family: int) -> None:
    for address, port in ((server(family), 53), (there.address("plain.test", family), 80)):
        outcome, milliseconds = there.timed(1, address, port, kind=socket.SOCK_DGRAM)
        assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True)


@FAMILIES
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_name_without_an_address_is_refused_at_once(there: Topology, family: int, kind: int) -> None:
    uplink = there.raw(there.internet, "inet0")
    before = there.counters()
    outcome, milliseconds = there.timed(1, there.address("nowhere.test", family), 80, kind=kind)
    assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True)
    after = there.counters()
    assert (after.late["unresolved"] - before.late["unresolved"]).packets == 1
    assert after.replies[there.mark("nowhere.test")] == Tally(), "our own refusal is nobody's reply"
    assert frames(uplink) == []


@FAMILIES
def test_a_network_is_reached_as_addressed(there: Topology, family: int) -> None:
    sock = there.client(1, server(family), 8080)
    sock.sendall(b"direct")
    assert sock.recv(100) == b"direct"
    sock.close()


@FAMILIES
def test_the_resolver_is_reached_over_tcp_and_udp(there: Topology, family: int) -> None:
    address = str(RESOLVER4 if family == 4 else RESOLVER6)
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    assert there.timed(1, address, 53)[0] == "ConnectionRefusedError"  # nobody listens: said at once
    assert there.timed(1, address, 53, kind=socket.SOCK_DGRAM)[0] == "ConnectionRefusedError"
    listener = there.server(there.gateway, address, 53)
    datagrams = there.plug(there.gateway, kind, socket.SOCK_DGRAM)
    datagrams.bind((address, 53))
    datagrams.settimeout(2)
    sock = there.client(1, address, 53)
    peer, source = listener.accept()
    assert source[0] == str(POOLS.sandbox(Link(1))[family == 6])
    asker = there.plug(there.sandbox(1), kind, socket.SOCK_DGRAM)
    asker.settimeout(2)
    asker.sendto(b"?", (address, 53))
    question, source = datagrams.recvfrom(10)
    datagrams.sendto(b"!", source)
    assert (question, asker.recv(10)) == (b"?", b"!")
    for used in (sock, peer, listener, datagrams, asker):
        used.close()


@FAMILIES
def test_the_inspector_sees_the_synthetic_address(there: Topology, family: int) -> None:
    where = "127.0.0.1" if family == 4 else "::1"
    address = there.address("ollama", family)
    listener = there.server(there.gateway, where, RELAY_PORT, transparent=True)
    sock = there.client(1, address, 11434)
    peer, source = listener.accept()
    assert peer.getsockname()[:2] == (address, 11434)
    assert source[0] == str(POOLS.sandbox(Link(1))[family == 6])
    sock.sendall(b"up")
    assert peer.recv(10) == b"up"
    peer.sendall(b"down")
    assert sock.recv(10) == b"down"
    for used in (sock, peer, listener):
        used.close()
    before = there.counters()
    outcome, milliseconds = there.timed(1, address, 11434)
    assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True), "without an inspector"
    assert there.counters().late["inspector"].packets == before.late["inspector"].packets + 1


@FAMILIES
def test_nobody_connects_to_a_sandbox(there: Topology, family: int) -> None:
    """From the gateway, and from the host and the internet with routes added that do not belong there."""
    address = str(POOLS.sandbox(Link(1))[family == 6])
    there.server(there.sandbox(1), address, 7000)
    seen = there.raw(there.sandbox(1), "eth0")
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    for namespace in (there.gateway, there.host):
        sock = there.plug(namespace, kind, socket.SOCK_STREAM)
        sock.settimeout(0.2)
        with pytest.raises(OSError):
            sock.connect((address, 7000))
    assert frames(seen) == []


# ---- guard: observe and off


@FAMILIES
@pytest.mark.parametrize(("number", "workspace"), [(3, "watch"), (4, "open")])
def test_without_enforcement_the_rest_goes_out_counted(
    there: Topology, family: int, number: int, workspace: str
) -> None:
    before = there.counters()
    sock = there.client(number, server(family), 9999)
    sock.sendall(b"any")
    assert sock.recv(10) == b"any"
    after = there.counters()
    assert (after.unlisted[workspace] - before.unlisted[workspace]).packets >= 3
    assert sum(t.packets for t in after.denied[workspace].values()) == sum(
        t.packets for t in before.denied[workspace].values()
    )
    sock.close()
    listed = there.client(number, there.address("plain.test", family, workspace=workspace), 80)
    listed.close()
    assert element_of(there.counters(), "plain.test", family, workspace=workspace).packets >= 2
    assert poll(lambda: balanced(there))


@FAMILIES
@pytest.mark.parametrize("number", [3, 4])
def test_without_enforcement_egressd_and_the_host_stay_out_of_reach(
    there: Topology, family: int, number: int
) -> None:
    for address, port in (
        (str(POOLS.sandbox(Link(1))[family == 6]), 7000),
        ("169.254.54.1" if family == 4 else "fd53:2::1", 22),
        ("169.254.169.254" if family == 4 else "fe80::1%eth0", 80),
        (HOST4 if family == 4 else HOST6, 22),
    ):
        if "%" in address:
            continue
        outcome, milliseconds = there.timed(number, address, port)
        assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True), address


def test_the_kernel_holds_exactly_what_is_wanted(there: Topology) -> None:
    """After all of the above: no rule, element or set more or less."""
    assert diff.plan(there.observed(), there.wanted()) == ()


def test_marks_say_whose_they_are(there: Topology) -> None:
    kinds = {(e.comment, Kind(e.mark & 0xF000_0000)) for e in there.wants["acme"].elements}
    assert ("ollama", Kind.RELAY) in kinds
    assert ("plain.test", Kind.FORWARD) in kinds
    assert ("10.3.0.2/32", Kind.DIRECT) in kinds
    assert ("(resolver)", Kind.RESOLVE) in kinds


# ---- the log


def test_every_denial_is_logged_with_workspace_and_reason(there: Topology) -> None:
    """And what observe lets through; a late refusal has "-" for the workspace, and the link tells it."""
    log = there.plug(there.gateway, socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    log.bind((0, 0))
    log.send(nflog.configure(group=NFLOG_GROUP, batch=1))
    log.setblocking(False)
    there.timed(1, SERVER4, 81)
    there.timed(1, SERVER6, 81, kind=socket.SOCK_DGRAM)
    there.timed(3, SERVER4, 9999)
    there.timed(1, there.address("nowhere.test"), 80)
    with inside(there.gateway):
        index = socket.if_nametoindex("eg1")
    seen: list[nflog.Logged] = []

    def arrived() -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                seen.extend(m for m in nflog.parse(log.recv(1 << 16)) if isinstance(m, nflog.Logged))
        return len({m.prefix for m in seen}) >= 3

    assert poll(arrived), seen
    assert {m.prefix for m in seen} == {"acme unlisted", "watch unlisted", "- unresolved"}
    assert {m.indev for m in seen if m.prefix in ("acme unlisted", "- unresolved")} == {index}
    # by the mark the auditor tells what was refused from what observe let through
    assert {m.prefix for m in seen if m.mark & ADMITTED} == {"watch unlisted", "- unresolved"}
    assert all(0 < len(m.payload) <= 128 for m in seen)


@FAMILIES
def test_an_error_about_a_connection_does_not_give_it_to_another_host(there: Topology, family: int) -> None:
    """An unrestricted sandbox may send ICMP errors. One bears the entry of the connection it is about, and
    what follows must still be counted under that connection's host."""
    from scapy.layers.inet import ICMP, IP, TCP
    from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

    address = server(family)
    mark = there.mark(str(DIRECT[family == 6].network), "wide")
    sock = there.client(5, address, 8080)
    sock.sendall(b"before")
    assert sock.recv(100) == b"before"
    own, port = sock.getsockname()[:2]
    ip, error = (IP, ICMP(type=3, code=3)) if family == 4 else (IPv6, ICMPv6DestUnreach(code=4))
    quoted = ip(src=address, dst=own) / TCP(sport=8080, dport=port, flags="A", seq=1)
    with inside(there.sandbox(5)):
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        raw = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
    unlisted = there.counters().unlisted["wide"]
    with raw:
        raw.sendto(bytes(ip(src=own, dst=address) / error / quoted), (address, 0))
    assert poll(lambda: there.counters().unlisted["wide"].packets > unlisted.packets), "the guard let it pass"
    before = there.counters().replies[mark]
    sock.sendall(b"after")
    assert sock.recv(100) == b"after"
    assert poll(lambda: there.counters().replies[mark].packets > before.packets)
    sock.close()
