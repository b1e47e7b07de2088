"""Whose socket it is: the question and the answer, and this kernel, asked about sockets of this process."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.packets.headers import Attempt, Family
from egressd.packets.inet_diag import inode, question, row

TCP, UDP, ICMP = 6, 17, 1
RAW = b"""  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   1: 00000000:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0
  58: 00000000:003A 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 12 2 0 0
  58: 00000000:003A 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 13 2 0 0
"""


def attempt(protocol: int, source: tuple[str, int], destination: tuple[str, int]) -> Attempt:
    return Attempt(
        family=Family.IPV6 if ":" in source[0] else Family.IPV4,
        protocol="any",
        number=protocol,
        source=ip_address(source[0]),
        destination=ip_address(destination[0]),
        source_port=source[1],
        destination_port=destination[1],
    )


@pytest.fixture
def kernel() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as asking:
        asking.settimeout(5)
        yield asking


def asked(kernel: socket.socket, about: Attempt) -> int | None:
    said = question(about)
    assert said is not None
    kernel.send(said)
    return inode(kernel.recv(1 << 14))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(("protocol", "kind"), [(TCP, socket.SOCK_STREAM), (UDP, socket.SOCK_DGRAM)])
def test_the_kernel_knows_whose_it_is(kernel: socket.socket, address: str, protocol: int, kind: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as there, socket.socket(family, kind) as here:
        there.bind((address, 0))
        if protocol == TCP:
            there.listen()
        here.connect(there.getsockname()[:2])
        mine, other = here.getsockname()[:2], there.getsockname()[:2]
        assert asked(kernel, attempt(protocol, mine, other)) == os.fstat(here.fileno()).st_ino
        assert asked(kernel, attempt(protocol, (address, 1), other)) is None, "nobody's"


def test_a_socket_of_both_families_is_found_by_its_ipv4_packet(kernel: socket.socket) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as here:
        here.connect(("::ffff:127.0.0.1", 9))
        found = asked(kernel, attempt(UDP, ("127.0.0.1", here.getsockname()[1]), ("127.0.0.1", 9)))
        assert found == os.fstat(here.fileno()).st_ino


def test_what_has_no_ports_is_not_asked_about() -> None:
    assert question(attempt(ICMP, ("192.0.2.1", 1), ("192.0.2.2", 2))) is None
    assert question(Attempt(family=Family.IPV4, protocol="tcp", number=TCP)) is None


def test_an_orphan_has_no_inode() -> None:
    answer = struct.pack("=IHHII", 16 + 72, 20, 0, 0, 0) + bytes(72)
    assert inode(answer) is None
    assert inode(answer[:-4] + b"\1\0\0\0") == struct.unpack("=I", b"\1\0\0\0")[0]


def test_a_table_tells_only_what_is_certain() -> None:
    assert row(RAW, 1) == 4711
    assert row(RAW, 58) is None, "two of them: whose it was cannot be known"
    assert row(RAW, 2) is None
    assert row(b"", 1) is None


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 65535))
def test_any_bytes_are_an_answer(data: bytes, port: int) -> None:
    assert isinstance(inode(data), int | None)
    assert isinstance(row(data, port), int | None)
