"""What the inspector may dial: what its workspace's policy lists, from that workspace's own source address.

The inspector's part is played by sockets of the gateway, which could as well be a compromised inspector's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from guard_topology import (
    ACME,
    POOLS,
    SERVER4,
    SERVER6,
    Topology,
    attempt,
    echo,
    frames,
    inside,
    inspected,
    policy,
    poll,
    sh,
    tcp,
    topology,
)
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from egressd.kernel.conntrack import Conntrack
from egressd.model.identities import Link
from egressd.ruleset import diff
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import INSPECTOR_PORT, Kind, Mark
from egressd.ruleset.observe import DialCount, Tally

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])
AT_ONCE = 50.0  # milliseconds
INSPECTED = (
    inspected("pay.test", tcp(443), plain=(tcp(80),)),
    inspected("lost.test", tcp(443)),  # never resolves
)


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("dial") as made:
        made.apply(policy(*ACME, *INSPECTED), policy(inspected("other.test", tcp(443)), workspace="other"))
        made.connect(1)
        made.resolve("pay.test", SERVER4, SERVER6)
        made.resolve("other.test", SERVER4, SERVER6, workspace="other")
        for address in (SERVER4, SERVER6):
            for port in (443, 445):
                echo(made.server(made.internet, address, port))
        yield made


def server(family: int) -> str:
    return SERVER4 if family == 4 else SERVER6


def stream(t: Topology, family: int) -> socket.socket:
    sock = t.dialling(t.source(family))
    sock.connect((t.address("pay.test", family), 443))
    sock.sendall(b"before")
    assert sock.recv(10) == b"before"
    return sock


def of(t: Topology, host: str, family: int) -> DialCount:
    [found] = [d for d in t.counters().dialled if d.comment == host and (":" in d.address) == (family == 6)]
    return found


# ---- allowed


@FAMILIES
def test_what_is_inspected_is_dialled_counted_and_answered(there: Topology, family: int) -> None:
    uplink = there.raw(there.internet, "inet0")
    for slot in range(4):
        with there.dialling(there.source(family)) as sock:
            assert attempt(sock, there.address("pay.test", family, slot), 443)[0] == "ok"
            sock.sendall(b"hello")
            assert sock.recv(10) == b"hello"
    found = [Ether(frame) for frame in frames(uplink)]
    senders = {frame[IP if family == 4 else IPv6].src for frame in found}
    assert senders == {"10.3.0.1" if family == 4 else "2001:db8:3::1"}, "the host's address, no other"
    forward = int(Mark(kind=Kind.FORWARD, workspace=there.wants["acme"].index, block=there.block("pay.test")))
    counts = there.counters()
    found = of(there, "pay.test", family)
    assert (found.workspace, found.port, found.mark) == ("acme", 443, forward)
    assert found.address == there.address("pay.test", family)
    assert counts.opened[forward] == Tally(), "what sandboxes begin: another port is forwarded"
    header = 52 if family == 4 else 72  # with timestamps
    data = 4 * (5 + header)
    assert poll(lambda: of(there, "pay.test", family).packets >= 4 * 4), "SYN, ACK, data, FIN at the least"
    found = of(there, "pay.test", family)
    assert found.bytes == 4 * (header + 8) + data + (found.packets - 8) * header, "to the byte"
    assert counts.replies[forward] == Tally(), "and what they receive"
    assert counts.late == {reason: Tally() for reason in counts.late}


@FAMILIES
def test_it_needs_no_right(there: Topology, family: int) -> None:
    """An ordinary user binds the address, since table local delivers it, and cannot set a mark."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _tell(writing, lambda: _as_user(there, family))
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        assert answer.read() == "ok, PermissionError, PermissionError"


def _tell(writing: int, what: Callable[[], str]) -> None:
    """What comes of it, or the error; never returns."""
    try:
        os.write(writing, what().encode())
    except BaseException as error:
        os.write(writing, repr(error).encode())
    finally:
        os._exit(0)


def _as_user(t: Topology, family: int) -> str:
    kind, level = (socket.AF_INET, socket.SOL_IP) if family == 4 else (socket.AF_INET6, socket.IPPROTO_IPV6)
    sock = t.plug(t.gateway, kind, socket.SOCK_STREAM)
    os.setgroups([])
    os.setresgid(4001, 4001, 4001)
    os.setresuid(4001, 4001, 4001)
    sock.settimeout(2)
    if family == 6:
        sock.setsockopt(level, 78, 1)  # IPV6_FREEBIND
    tries: list[Callable[[], object]] = [
        lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1),
        lambda: sock.setsockopt(level, 19 if family == 4 else 75, 1),  # IP_TRANSPARENT, IPV6_TRANSPARENT
    ]
    said = []
    for one in tries:
        try:
            one()
            said.append("allowed")
        except OSError as error:
            said.append(type(error).__name__)
    sock.bind((t.source(family), 0))
    return ", ".join([attempt(sock, t.address("pay.test", family), 443)[0], *said])


@FAMILIES
def test_segments_have_the_size_of_the_uplink_s(there: Topology, family: int) -> None:
    """The first route of the connection leads to lo, whose packets may have 64 KiB."""
    sock = stream(there, family)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == (1448 if family == 4 else 1428)


@FAMILIES
def test_a_narrow_place_further_out_is_heard_of(there: Topology, family: int) -> None:
    """Path-MTU messages are answers to the connection like its packets."""
    sh(f"ip -n {there.host} link set wan mtu 1400")
    sock = stream(there, family)
    sender = threading.Thread(target=sock.sendall, args=(b"x" * 100_000,))
    sender.start()
    got = 0
    while got < 100_000:
        got += len(sock.recv(65536))
    sender.join()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == (1348 if family == 4 else 1328)


@FAMILIES
def test_a_moved_name_keeps_what_is_open(there: Topology, family: int) -> None:
    sock = stream(there, family)
    there.resolve("pay.test", "10.3.0.77", "2001:db8:3::77")
    sock.sendall(b"after")
    assert sock.recv(10) == b"after"


# ---- refused


def refusals(t: Topology, family: int) -> dict[str, tuple[str, str, int]]:
    """What a compromised inspector may try: source, destination, port."""
    mine, theirs = t.source(family), t.source(family, "other")
    pay = t.address("pay.test", family)
    return {
        "another workspace's source": (theirs, pay, 443),
        "another workspace's host": (mine, t.address("other.test", family, workspace="other"), 443),
        "a port that is not listed": (mine, pay, 445),
        "a port that is not inspected": (mine, pay, 80),
        "a host that is not inspected": (mine, t.address("plain.test", family), 80),
        "a local service": (mine, t.address("ollama", family), 11434),
        "a block of nobody": (mine, str(POOLS.synthetic(7)[family == 6]), 443),
        "an index of nobody": ("169.254.64.77" if family == 4 else "fd53:3::77", pay, 443),
        "a real address": (mine, server(family), 443),
        "the host": (mine, "169.254.54.1" if family == 4 else "fd53:2::1", 22),
        "the gateway itself": (mine, "127.0.0.1" if family == 4 else "::1", INSPECTOR_PORT),
        "the resolver": (mine, "169.254.53.53" if family == 4 else "fd53:53::53", 53),
        "a sandbox": (mine, str(POOLS.sandbox(Link(1))[family == 6]), 7000),
        "the uplink's source": ("169.254.54.2" if family == 4 else "fd53:2::2", pay, 443),
        "loopback's source": ("127.0.0.1" if family == 4 else "::1", pay, 443),
        "a sandbox's source": (str(POOLS.sandbox(Link(1))[family == 6]), pay, 443),
    }


@FAMILIES
def test_everything_else_is_refused_at_once_and_nothing_leaves(there: Topology, family: int) -> None:
    uplink, wire = there.raw(there.internet, "inet0"), there.raw(there.sandbox(1), "eth0")
    dialled = 0
    for what, (source, address, port) in refusals(there, family).items():
        before = there.counters().late["dial"].packets
        try:
            outcome, milliseconds = there.dialled(source, address, port)
        except OSError:  # an address of nobody cannot even be bound
            outcome, milliseconds = "unbound", 0.0
        assert outcome in ("ConnectionRefusedError", "PermissionError", "unbound"), what
        assert milliseconds < AT_ONCE, what
        dialled += there.counters().late["dial"].packets - before
    assert dialled == 8, "the rest is not even routed"
    assert frames(uplink) == frames(wire) == []
    assert there.counters().late["unresolved"] == Tally()


@FAMILIES
def test_datagrams_are_refused_whatever_is_listed(there: Topology, family: int) -> None:
    uplink = there.raw(there.internet, "inet0")
    sock = there.dialling(there.source(family), kind=socket.SOCK_DGRAM)
    with pytest.raises(PermissionError):
        sock.sendto(b"x", (there.address("pay.test", family), 443))
    assert there.counters().late["dial"].packets == 1
    assert frames(uplink) == []


@FAMILIES
def test_a_name_without_an_address_is_refused_at_once(there: Topology, family: int) -> None:
    uplink = there.raw(there.internet, "inet0")
    outcome, milliseconds = there.dialled(there.source(family), there.address("lost.test", family), 443)
    assert (outcome, milliseconds < AT_ONCE) == ("ConnectionRefusedError", True)
    assert there.counters().late["unresolved"].packets == 1
    assert frames(uplink) == []
    there.resolve("lost.test", SERVER4, SERVER6)
    assert there.dialled(there.source(family), there.address("lost.test", family), 443)[0] == "ok"


@FAMILIES
def test_nobody_connects_to_where_the_inspector_dials_from(there: Topology, family: int) -> None:
    """From the sandbox, from the host by a route that does not belong there, and from the gateway."""
    source = there.source(family)
    listener = there.dialling(source)
    listener.listen(1)
    port = listener.getsockname()[1]
    assert there.timed(1, source, port)[0] == "ConnectionRefusedError"
    via = "169.254.54.2" if family == 4 else "fd53:2::2"
    sh(f"ip -n {there.host} route add {source} via {via} dev egw")
    sock = there.plug(there.host, listener.family, socket.SOCK_STREAM)
    sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        sock.connect((source, port))
    with there.dialling(there.source(family, "other")) as sock:
        sock.settimeout(0.2)
        assert attempt(sock, source, port)[0] != "ok"


# ---- revoked


@FAMILIES
def test_a_revoked_host_is_reset_when_the_inspector_sends(there: Topology, family: int) -> None:
    sock, kept = stream(there, family), there.dialling(there.source(family, "other"))
    kept.connect((there.address("other.test", family, workspace="other"), 443))
    uplink = there.raw(there.internet, "inet0")
    revoke(there)
    with pytest.raises(ConnectionResetError):
        for _ in range(100):
            sock.send(b"more")
    assert frames(uplink) == []
    kept.sendall(b"still")
    assert kept.recv(10) == b"still"


def revoke(t: Topology) -> None:
    """pay.test goes; the other workspace stays as it is."""
    t.apply(policy(*ACME), policy(inspected("other.test", tcp(443)), workspace="other"))


@FAMILIES
def test_a_revoked_host_is_reset_when_the_server_speaks(there: Topology, family: int) -> None:
    there.apply(policy(*ACME, inspected("pay.test", tcp(444))), *list(there.policies.values())[1:])
    there.resolve("pay.test", SERVER4, SERVER6)
    listener = there.server(there.internet, server(family), 444)
    sock = there.dialling(there.source(family))
    sock.connect((there.address("pay.test", family), 444))
    peer, _ = listener.accept()
    there.sockets.append(peer)
    revoke(there)
    peer.sendall(b"late")
    with pytest.raises(ConnectionResetError):
        sock.recv(10)
    with inside(there.gateway):
        assert there.counters().late["dial"].packets == 0


@FAMILIES
def test_a_revoked_inspected_connection_ends_at_the_sandbox_by_the_inspector_s_reset(
    there: Topology, family: int
) -> None:
    """The mark has left @in: data of the inspector is kept back, its reset is let through."""
    where = "127.0.0.1" if family == 4 else "::1"
    listener = there.server(there.gateway, where, INSPECTOR_PORT, transparent=True)
    sock = there.client(1, there.address("pay.test", family), 443)
    peer, _ = listener.accept()
    there.sockets.append(peer)
    assert peer.getsockname()[:2] == (there.address("pay.test", family), 443)
    revoke(there)
    wire = there.raw(there.sandbox(1), "eth0")
    peer.send(b"data that is kept back")
    assert frames(wire) == []
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    with pytest.raises(ConnectionResetError):
        sock.recv(30)


@FAMILIES
def test_only_one_port_revoked_keeps_the_answers_to_the_other(there: Topology, family: int) -> None:
    """Both ports share the mark of what is forwarded, which must stay in @in."""
    echo(there.server(there.internet, server(family), 80))
    plain = there.client(1, there.address("pay.test", family), 80)
    sock = stream(there, family)
    rest = inspected("pay.test", plain=(tcp(80),))
    there.apply(policy(*ACME, rest), *list(there.policies.values())[1:])
    with pytest.raises(ConnectionResetError):
        for _ in range(100):
            sock.send(b"more")
    plain.sendall(b"still")
    assert plain.recv(10) == b"still"


def test_the_connections_of_a_mark_are_forgotten_whoever_began_them(there: Topology) -> None:
    for family in (4, 6):
        stream(there, family)
    with inside(there.gateway):
        conntrack = Conntrack()
    block, index = there.block("pay.test"), there.wants["acme"].index
    mark = int(Mark(kind=Kind.FORWARD, workspace=index, block=block))
    assert conntrack.marks().count(mark) == 2
    conntrack.forget_marks({mark})
    assert mark not in conntrack.marks()
    conntrack.close()


# ---- the two keys

STATES: dict[str, Callable[[Topology], object]] = {
    "nft flushed": lambda t: t.nft.run(["flush ruleset"]),
    "tables dormant": lambda t: t.nft.run(
        [f"add table {family} egressd {{ flags dormant; }}" for family in ("netdev", "inet")]
    ),
    "steering gone": lambda t: t.nft.run(["delete table inet egressd"]),
    "the lookup gone": lambda t: t.nft.run(["flush chain inet egressd dial"]),
    "the elements gone": lambda t: t.nft.run([f"flush map inet egressd dial{n}" for n in "46"]),
    "the translation gone": lambda t: t.nft.run(["flush chain inet egressd translate_out"]),
    "rules flushed": lambda t: [sh(f"ip -n {t.gateway} {f} rule flush") for f in ("-4", "-6")],
    "the rule for marks gone": lambda t: [sh(f"ip -n {t.gateway} -{n} rule del pref 13") for n in "46"],
    "the rule for sources gone": lambda t: [sh(f"ip -n {t.gateway} -{n} rule del pref 14") for n in "46"],
    "both flushed": lambda t: (STATES["nft flushed"](t), STATES["rules flushed"](t)),
}
KEPT = ("the translation gone",)  # an open connection is translated by its entry, not by a rule


@pytest.mark.parametrize("state", STATES)
def test_nothing_leaves_without_both_keys(there: Topology, state: str) -> None:
    """Open connections and new ones."""
    streams = [stream(there, family) for family in (4, 6)]
    uplink = there.raw(there.internet, "inet0")
    STATES[state](there)
    for sock in streams if state not in KEPT else ():
        with contextlib.suppress(OSError):
            sock.send(b"after")
    for family in (4, 6):
        for source, address, port in (
            (there.source(family), there.address("pay.test", family), 443),
            (there.source(family), server(family), 443),
        ):
            with there.dialling(source) as sock:
                sock.settimeout(0.1)
                assert attempt(sock, address, port)[0] != "ok"
    assert [Ether(frame).summary() for frame in frames(uplink)] == []


def test_control_with_both_keys_it_leaves(there: Topology) -> None:
    uplink = there.raw(there.internet, "inet0")
    for family in (4, 6):
        stream(there, family)
        assert frames(uplink)


TAMPERING = {
    "an element more": [
        'add element inet egressd dial4 { 198.18.0.4 . 169.254.64.1 . 443 comment "x" : 0x80004001 }'
    ],
    "all elements gone": ["flush map inet egressd dial6"],
    "another order": ["insert rule inet egressd dial_4 accept"],
    "no lookup": ["flush chain inet egressd dial"],
    "no translation": ["flush chain inet egressd translate_out"],
    "answers for all": ["insert rule inet egressd dialled accept"],
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_found_and_mended(there: Topology, what: str) -> None:
    assert diff.plan(there.observed(), there.wanted()) == ()
    there.nft.run(TAMPERING[what])
    operations = diff.plan(there.observed(), there.wanted())
    assert operations
    there.nft.run(diff.commands(operations))
    assert diff.plan(there.observed(), there.wanted()) == ()
    for family in (4, 6):
        assert there.dialled(there.source(family), there.address("pay.test", family), 443)[0] == "ok"
        assert there.dialled(there.source(family), there.address("pay.test", family), 445)[0] != "ok"


def test_the_books_know_nothing_of_it(there: Topology) -> None:
    """What is dialled came over no link: it is counted apart, and the equations hold."""
    stream(there, 4)
    there.timed(1, SERVER4, 81)
    counts = there.counters()
    found = equations(counts, {}, {}, workspace_of={"eg1": "acme"})
    assert books(found).balanced
    assert sum(each.packets for each in counts.dialled) >= 3
    assert sum(each.packets for each in counts.elements) == 0


def test_the_sets_name_what_is_dialled(there: Topology) -> None:
    text = there.nft.list_text()
    assert f"{there.address('pay.test')} . {there.source(4)} . 443 counter packets 0 bytes 0" in text
    assert 'comment "acme pay.test"' in text
