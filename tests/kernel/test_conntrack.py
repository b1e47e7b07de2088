"""Forgetting connections: exactly those that are meant, of both families."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from warden_world import sh

from egressd.kernel import namespaces
from egressd.kernel.conntrack import Conntrack
from lab.machine import poll

pytestmark = pytest.mark.kernel

BOTH = {"4": ("10.99.0.1", "10.99.0.2"), "6": ("fd99::1", "fd99::2")}


@pytest.fixture
def table() -> Iterator[Conntrack]:
    """Of a namespace of its own, with two connections from the first address of each family and one from the
    second."""
    with namespaces.throw_away(), contextlib.ExitStack() as stack:
        sh("ip link set lo up")
        for four, six in zip(*BOTH.values(), strict=True):
            sh(f"ip addr add {four}/32 dev lo && ip addr add {six}/128 dev lo nodad")
        # tracking begins when somebody looks at the state of connections
        sh("nft 'add table inet t; add chain inet t o { type filter hook output priority 0; }'")
        sh("nft add rule inet t o ct state new accept")
        for first, second in BOTH.values():
            for address in (first, first, second):
                connect(stack, address)
        table = Conntrack()
        stack.callback(table.close)
        yield table


def connect(stack: contextlib.ExitStack, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = stack.enter_context(socket.socket(family))
    listener.bind((address, 0))
    listener.listen()
    client = stack.enter_context(socket.socket(family))
    client.bind((address, 0))
    poll(lambda: reached(client, listener), what="the address has its route")


def reached(client: socket.socket, listener: socket.socket) -> bool:
    """The kernel lays the route of a fresh IPv6 address in its own time."""
    try:
        client.connect(listener.getsockname())
    except OSError as error:
        if error.errno == errno.ENETUNREACH:
            return False
        raise
    return True


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(("which", "gone"), [(0, 2), (1, 1)])
def test_a_source_that_goes_takes_its_own_connections_and_no_other_s(
    table: Conntrack, family: str, which: int, gone: int
) -> None:
    assert len(table.marks()) == 6
    table.forget_sources([ip_address(BOTH[family][which])])
    assert len(table.marks()) == 6 - gone
    table.forget_sources([ip_address(BOTH[family][which])])
    assert len(table.marks()) == 6 - gone, "nothing of it was left"
    others = [a for pair in BOTH.values() for a in pair if a != BOTH[family][which]]
    table.forget_sources([ip_address(address) for address in others])
    assert table.marks() == []


@pytest.mark.parametrize("stranger", ["10.99.0.9", "fd99::9"])
def test_a_source_without_connections_takes_none(table: Conntrack, stranger: str) -> None:
    table.forget_sources([ip_address(stranger)])
    assert len(table.marks()) == 6
