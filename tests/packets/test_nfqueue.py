"""Packets that the kernel holds: hand-made datagrams, and any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.packets.netlink import Malformed
from egressd.packets.nfqueue import Held, accept, parse

HDR, MARK, PAYLOAD = 1, 3, 10
QUEUED, VERDICT, CONFIG = 0x300, 0x301, 0x302


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + bytes(-len(body) % 4)


def packet(*attributes: bytes, queue: int = 53) -> bytes:
    return message(QUEUED, struct.pack("!BBH", 2, 0, queue) + b"".join(attributes))


NUMBERED = attribute(HDR, struct.pack("!IHB", 7, 0x0800, 3))


def test_a_packet_is_its_number_and_its_bytes() -> None:
    assert parse(packet(NUMBERED, attribute(PAYLOAD, b"\x45abc"))) == (Held(53, 7, 0x0800, b"\x45abc"),)


def test_a_packet_without_bytes_can_still_be_let_go() -> None:
    assert parse(packet(NUMBERED, attribute(MARK, bytes(4)))) == (Held(53, 7, 0x0800, b""),)


def test_several_packets_come_in_order_whatever_is_between() -> None:
    other = packet(attribute(HDR, struct.pack("!IHB", 8, 0x86DD, 3)))
    acknowledged = message(2, bytes(20))
    assert [held.number for held in parse(packet(NUMBERED) + acknowledged + other)] == [7, 8]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("datagram", "text"),
    [
        (
            packet(attribute(PAYLOAD, b"abc")),
            "a packet whose number is not told, and which nobody can let go",
        ),
        (packet(attribute(HDR, bytes(6))), "a packet whose number is not told, and which nobody can let go"),
        (packet(b"\x03\0\0\0"), "a packet whose number is not told, and which nobody can let go"),
        (message(QUEUED, b"\2"), "a packet without its header"),
        (message(CONFIG, bytes(4)), "message type 0x0302 is not one of the packet queue's"),
        (b"\0", "1 bytes after the last message"),
    ],
)
def test_what_is_no_packet_is_malformed(datagram: bytes, text: str) -> None:
    assert parse(datagram) == (Malformed(text),)


def test_letting_go_names_queue_and_number() -> None:
    kind, body = struct.unpack_from("=H", accept(Held(53, 0x01020304, 0x0800, b"")), 4)[0], slice(16, None)
    said = accept(Held(53, 0x01020304, 0x0800, b""))[body]
    assert kind == VERDICT
    assert said == struct.pack("!BBH", 0, 0, 53) + attribute(2, bytes([0, 0, 0, 1, 1, 2, 3, 4]))


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_values(data: bytes, wrapped: bool) -> None:
    for each in parse(message(QUEUED, data) if wrapped else data):
        assert isinstance(each, Held | Malformed)


@settings(max_examples=100)
@given(number=st.integers(0, 2**32 - 1), ethertype=st.integers(0, 2**16 - 1), payload=st.binary(max_size=128))
def test_what_the_kernel_says_is_what_is_read(number: int, ethertype: int, payload: bytes) -> None:
    header = attribute(HDR, struct.pack("!IHB", number, ethertype, 3))
    assert parse(packet(header, attribute(PAYLOAD, payload))) == (Held(53, number, ethertype, payload),)
