"""The next sandbox on an address, 65,534 links later, has nothing of the one before it: no connection, no
answer that was still on its way, not a byte in its counters; and the host's table is rid of the first's."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from guard_topology import ACME, POOLS, SERVER4, SERVER6, Topology, inside, policy, poll, topology

from egressd.kernel.conntrack import Conntrack
from egressd.kernel.netlink import NETFILTER, Netlink
from egressd.kernel.orphans import Orphans
from egressd.model.identities import Link
from egressd.ruleset.books import books, equations
from egressd.ruleset.observe import Tally

pytestmark = pytest.mark.kernel
FIRST, NEXT = 1, 65_535
FAMILIES = pytest.mark.parametrize("family", [4, 6])
NEAR = 40_000  # the port that both use


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("again") as made:
        made.apply(policy(*ACME))
        for name in ("plain.test", "quic.test"):
            made.resolve(name, SERVER4, SERVER6)
        made.connect(FIRST)
        yield made


@pytest.fixture
def orphans(there: Topology) -> Orphans:
    with inside(there.gateway):
        gateway = Netlink(NETFILTER)
    with inside(there.host):
        return Orphans(host=Netlink(NETFILTER), gateway=gateway)


def test_the_two_have_one_address() -> None:
    assert POOLS.sandbox(Link(FIRST)) == POOLS.sandbox(Link(NEXT))


def server(there: Topology, family: int) -> socket.socket:
    sock = there.plug(there.internet, socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind((SERVER4 if family == 4 else SERVER6, 443))
    sock.settimeout(3)
    return sock


def flow(there: Topology, number: int, family: int) -> socket.socket:
    """A datagram from the one port, sent."""
    sock = there.plug(
        there.sandbox(number), socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    )
    sock.bind(("", NEAR))
    sock.settimeout(5)
    sock.connect((there.address("quic.test", family), 443))
    sock.send(b"question")
    return sock


def handed_on(there: Topology, orphans: Orphans | None) -> None:
    """The first goes as the warden and its eraser let it go; the next comes."""
    there.disconnect(FIRST)
    with inside(there.gateway):
        table = Conntrack()
    table.forget_sources(POOLS.sandbox(Link(FIRST)))
    table.close()
    if orphans is not None:
        orphans.forget()
    there.connect(NEXT)


def known(there: Topology, where: str) -> list[str]:
    with inside(where):
        return Path("/proc/net/nf_conntrack").read_text().splitlines()


@FAMILIES
def test_a_late_answer_to_the_first_reaches_nobody(there: Topology, orphans: Orphans, family: int) -> None:
    """The server answers the first one's question when the address is the next one's, who listens there."""
    far = server(there, family)
    flow(there, FIRST, family)
    _, asker = far.recvfrom(100)
    handed_on(there, orphans)
    listens = there.plug(
        there.sandbox(NEXT), socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    )
    listens.bind(("", NEAR))
    listens.settimeout(0.3)
    far.sendto(b"for the first", asker)
    with pytest.raises(TimeoutError):
        listens.recv(100)
    counters = there.counters()
    assert counters.links["eg65535"].in_ == Tally()
    assert "eg1" not in counters.links


@FAMILIES
def test_what_the_next_one_sends_is_counted_as_its_own_to_the_byte(
    there: Topology, orphans: Orphans, family: int
) -> None:
    far = server(there, family)
    flow(there, FIRST, family)
    far.recvfrom(100)
    first = there.counters().links["eg1"]
    handed_on(there, orphans)
    mine = flow(there, NEXT, family)
    _, asker = far.recvfrom(100)
    far.sendto(b"answer", asker)
    assert mine.recv(100) == b"answer"
    size = (28 if family == 4 else 48) + len(b"question")
    counters = there.counters()
    link = counters.links["eg65535"]
    assert (link.in_, link.ok, link.denied) == (Tally(1, size), Tally(1, size), Tally())
    assert first.ok == Tally(1, size)
    found = books(equations(counters, {}, {"acme": (first,)}, workspace_of={"eg65535": "acme"}))
    assert found.balanced, found.differences


@FAMILIES
def test_a_connection_of_the_first_is_not_the_nexts(there: Topology, orphans: Orphans, family: int) -> None:
    """Same ports, same host: the next one's begins with a handshake of its own, at once."""
    listener = there.server(there.internet, SERVER4 if family == 4 else SERVER6, 80)
    old = there.client(FIRST, there.address("plain.test", family), 80)
    theirs, _ = listener.accept()
    port = old.getsockname()[1]
    handed_on(there, orphans)
    new = there.plug(
        there.sandbox(NEXT), socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM
    )
    new.bind(("", port))
    new.settimeout(3)
    theirs.send(b"for the first")  # its segment meets no connection, in gateway and host
    new.connect((there.address("plain.test", family), 80))
    fresh, _ = listener.accept()
    fresh.send(b"mine")
    assert new.recv(100) == b"mine"
    fresh.close()
    theirs.close()


@FAMILIES
def test_what_the_first_left_open_is_gone_from_the_host(
    there: Topology, orphans: Orphans, family: int
) -> None:
    """Only that: another sandbox's connection and the host's own go on."""
    there.connect(2)
    listener = there.server(there.internet, SERVER4 if family == 4 else SERVER6, 80)
    to = there.address("plain.test", family)
    left, stays = there.client(FIRST, to, 80), there.client(2, to, 80)
    with inside(there.host):
        own = socket.create_connection((SERVER4 if family == 4 else SERVER6, 80), 2)
    ends = [listener.accept()[0] for _ in range(3)]
    assert orphans.forget() == 0, "everybody is there"
    assert len(known(there, there.host)) == 3
    handed_on(there, None)
    assert len(known(there, there.host)) == 3, "the host is not told"
    assert orphans.forget() == 1
    assert orphans.forget() == 0
    assert len(known(there, there.host)) == 2
    ends[0].send(b"is anybody there?")
    ends[0].settimeout(2)
    with pytest.raises(ConnectionResetError):
        while ends[0].recv(1):
            pass
    for sock, end in ((stays, ends[1]), (own, ends[2])):
        sock.send(b"x")
        assert end.recv(1) == b"x"
        sock.close()
    with contextlib.suppress(OSError):
        left.close()


@FAMILIES
def test_thousands_of_leftovers_go_at_once(there: Topology, orphans: Orphans, family: int) -> None:
    sockets = [flow_from(there, port, family) for port in range(1100, 1400)]
    assert poll(lambda: len(known(there, there.host)) == 300)
    there.disconnect(FIRST)
    with inside(there.gateway):
        table = Conntrack()
    table.forget_sources([ip_address(a) for a in map(str, POOLS.sandbox(Link(FIRST)))])
    table.close()
    assert orphans.forget() == 300
    assert known(there, there.host) == known(there, there.gateway) == []
    for sock in sockets:
        sock.close()


def flow_from(there: Topology, port: int, family: int) -> socket.socket:
    sock = there.plug(
        there.sandbox(FIRST), socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    )
    sock.bind(("", port))
    sock.sendto(b"x", (there.address("quic.test", family), 443))
    return sock
