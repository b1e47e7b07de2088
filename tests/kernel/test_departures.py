"""The host forgets what a sandbox leaves open when the gateway does, and only that; and who tells it cannot
be told anything."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_topology import ACME, POOLS, SERVER4, SERVER6, Topology, inside, policy, poll, topology

from egressd.kernel import sockets
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.netlink import ACK, DUMP, NETFILTER, REQUEST, Netlink
from egressd.kernel.orphans import Departures
from egressd.model.identities import Link
from egressd.ruleset.layout import RESOLVER4, RESOLVER6

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])
SERVER = {4: SERVER4, 6: SERVER6}


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("left") as made:
        made.apply(policy(*ACME))
        for name in ("plain.test", "quic.test"):
            made.resolve(name, SERVER4, SERVER6)
        made.connect(1)
        made.connect(2)
        yield made


@pytest.fixture
def departures(there: Topology) -> Iterator[Departures]:
    with inside(there.gateway):
        told = sockets.open_ended()
    with inside(there.host):
        made = Departures(told, host=Netlink(NETFILTER))
    with told, contextlib.closing(made):
        yield made


def known(there: Topology, where: str) -> list[str]:
    with inside(where):
        return Path("/proc/net/nf_conntrack").read_text().splitlines()


def forgotten(there: Topology, *numbers: int) -> None:
    """As the eraser has the gateway forget."""
    with inside(there.gateway):
        table = Conntrack()
    table.forget_sources([a for number in numbers for a in POOLS.sandbox(Link(number))])
    table.close()


def connection(there: Topology, number: int, listener: socket.socket, family: int) -> list[socket.socket]:
    near = there.client(number, there.address("plain.test", family), 80)
    return [near, listener.accept()[0]]


def talks(ends: list[socket.socket]) -> bool:
    ends[0].send(b"x")
    return ends[1].recv(1) == b"x"


# ---- what is forgotten


@FAMILIES
def test_what_a_sandbox_leaves_open_goes_and_nobody_else_s(
    there: Topology, departures: Departures, family: int
) -> None:
    listener = there.server(there.internet, SERVER[family], 80)
    left, stays = (connection(there, number, listener, family) for number in (1, 2))
    with inside(there.host):
        own = [socket.create_connection((SERVER[family], 80), 2), listener.accept()[0]]
    assert departures.forget(100) == 0, "nothing has ended"
    there.disconnect(1)
    forgotten(there, 1)
    assert len(known(there, there.host)) == 3
    assert departures.forget(100) == 1
    assert len(known(there, there.host)) == 2
    left[1].send(b"is anybody there?")
    left[1].settimeout(2)
    with pytest.raises(ConnectionResetError):
        while left[1].recv(1):
            pass
    assert talks(stays) and talks(own)
    assert departures.forget(100) == 0


@FAMILIES
def test_of_datagrams_as_well(there: Topology, departures: Departures, family: int) -> None:
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    for number in (1, 2):
        for port in range(5000, 5003):
            sock = there.plug(there.sandbox(number), kind, socket.SOCK_DGRAM)
            sock.bind(("", port))
            sock.sendto(b"x", (there.address("quic.test", family), 443))
    assert poll(lambda: len(known(there, there.host)) == 6)
    forgotten(there, 1)
    assert departures.forget(2) == 2, "no more at once than is asked for"
    assert departures.forget(2) == 1
    assert len(known(there, there.host)) == len(known(there, there.gateway)) == 3


@FAMILIES
def test_what_is_over_goes_by_itself(there: Topology, departures: Departures, family: int) -> None:
    """Both sides have closed: the host's kernel has seen that, too, and lets it rest."""
    there.sysctl(there.gateway, {"net/netfilter/nf_conntrack_tcp_timeout_time_wait": 1})
    listener = there.server(there.internet, SERVER[family], 80)
    for end in connection(there, 1, listener, family):
        end.close()
    assert poll(lambda: "TIME_WAIT" in known(there, there.host)[0])

    def told() -> bool:
        known(there, there.gateway)  # what is over goes when somebody looks (nf_ct_should_gc)
        return departures.forget(100) == 1

    assert poll(told, seconds=5)
    assert "TIME_WAIT" in known(there, there.host)[0]


@FAMILIES
def test_what_was_idle_for_too_long_goes_in_both(
    there: Topology, departures: Departures, family: int
) -> None:
    there.sysctl(there.gateway, {"net/netfilter/nf_conntrack_tcp_timeout_established": 1})
    listener = there.server(there.internet, SERVER[family], 80)
    ends = connection(there, 1, listener, family)
    assert "ESTABLISHED" in known(there, there.host)[0]

    def told() -> bool:
        known(there, there.gateway)
        return departures.forget(100) == 1

    assert poll(told, seconds=5)
    assert known(there, there.host) == []
    for end in ends:
        end.close()


@FAMILIES
def test_what_never_left_the_gateway_is_nothing_to_the_host(
    there: Topology, departures: Departures, family: int
) -> None:
    """A question to the resolver, and in the host something of its own."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    resolver, loopback = (RESOLVER4, "127.0.0.1") if family == 4 else (RESOLVER6, "::1")
    for where, to in ((there.sandbox(1), (str(resolver), 53)), (there.host, (loopback, 53))):
        there.plug(where, kind, socket.SOCK_DGRAM).sendto(b"x", to)
    assert poll(lambda: len(known(there, there.gateway)) == 1)
    before = len(known(there, there.host))
    forgotten(there, 1)
    assert departures.forget(100) == 1
    assert len(known(there, there.host)) == before


def test_what_it_could_not_be_told_is_counted(there: Topology, departures: Departures) -> None:
    departures.told.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for port in range(5000, 5050):
        sock = there.plug(there.sandbox(1), socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("", port))
        sock.sendto(b"x", (there.address("quic.test", 4), 443))
    assert poll(lambda: len(known(there, there.host)) == 50)
    forgotten(there, 1)
    assert departures.forget(1000) < 50
    assert departures.lost == 1


# ---- what it may say


@pytest.mark.parametrize(
    ("what", "kind", "flags"),
    [
        ("list connections", 0x101, DUMP),
        ("forget all connections", 0x102, ACK),
        ("list tables", 0x0A01, DUMP),
        ("delete all tables", 0x0A02, ACK),
    ],
)
def test_over_its_socket_nothing_can_be_said_in_the_gateway(
    there: Topology, departures: Departures, what: str, kind: int, flags: int
) -> None:
    """By whoever holds it: we are root, and have every right there."""
    there.plug(there.sandbox(1), socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (str(RESOLVER4), 53))
    assert poll(lambda: bool(known(there, there.gateway)))
    before = len(known(there, there.gateway)), tables(there)
    message = struct.pack("=IHHII", 20, kind, REQUEST | flags, 7, 0) + bytes(4)
    departures.told.send(message)
    answer = departures.told.recv(4096)
    assert struct.unpack_from("=i", answer, 16) == (-1,), "EPERM"
    assert (len(known(there, there.gateway)), tables(there)) == before


def tables(there: Topology) -> list[str]:
    return [line for line in there.nft.list_text().splitlines() if line.startswith("table")]


def test_the_right_is_back_at_once(there: Topology) -> None:
    """Who opens it goes on with what it may."""
    with inside(there.gateway):
        sockets.open_ended().close()
        Conntrack().close()
        before = Path("/proc/thread-self/status").read_text()
        assert "CapEff:\t" in before
        with sockets.open_all(but=[name for name in sockets.NAMES if name != "ended"])["ended"] as sock:
            assert sockets.misfit("ended", sock) == ""
        assert _capabilities(Path("/proc/thread-self/status").read_text()) == _capabilities(before)


def _capabilities(status: str) -> list[str]:
    return [line for line in status.splitlines() if line.startswith("Cap")]


def test_another_socket_does_not_fit(there: Topology) -> None:
    with (
        inside(there.gateway),
        sockets.open_all(but=[n for n in sockets.NAMES if n != "nflog"])["nflog"] as log,
    ):
        assert sockets.misfit("ended", log) == "it does not hear of connections' ends"
