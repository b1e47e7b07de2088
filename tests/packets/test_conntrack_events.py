"""The ends of connections: hand-made datagrams, any bytes. For a real kernel's see test_flow_facts.py."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from conntrack_datagrams import ICMP, UDP, attribute, destroy, ended, message, nested, tuple_of
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.packets.conntrack_events import Ended, Ends, Malformed, Overrun, Tally, parse

FULL = ended("198.19.0.7", "198.18.0.4", 443, mark=0x8000_4001, real="203.0.113.9")
FULL6 = ended("fd53:1::7", "fd53:e9::4", 53, mark=0x8000_4001, protocol=UDP, real="2001:db8::9")


def test_every_attribute_is_read() -> None:
    assert parse(FULL) == [
        Ended(
            protocol=6,
            original=Ends(ip_address("198.19.0.7"), ip_address("198.18.0.4"), 40000, 443),
            reply=Ends(ip_address("203.0.113.9"), ip_address("169.254.54.2"), 443, 40000),
            mark=0x8000_4001,
            status=0x2E,
            out=Tally(3, 200),
            back=Tally(2, 5000),
            began=1_700_000_000_000_000_000,
            ended=1_700_000_001_500_000_000,
            tcp_state=7,
        )
    ]


def test_ipv6_and_datagrams() -> None:
    [found] = parse(FULL6)
    assert isinstance(found, Ended)
    assert (found.protocol, found.tcp_state) == (17, None)
    assert found.original == Ends(ip_address("fd53:1::7"), ip_address("fd53:e9::4"), 40000, 53)
    assert found.reply.source == ip_address("2001:db8::9")


def test_icmp_has_a_type_and_no_ports() -> None:
    [found] = parse(ended("198.19.0.7", "203.0.113.9", mark=1, protocol=ICMP))
    assert isinstance(found, Ended)
    assert (found.original.icmp_type, found.original.icmp_code) == (8, 0)
    assert (found.original.source_port, found.original.destination_port) == (None, None)


def test_without_accounting_nothing_is_made_up() -> None:
    [found] = parse(ended("198.19.0.7", "198.18.0.4", mark=1, out=None, back=None, began=None))
    assert isinstance(found, Ended)
    assert (found.out, found.back, found.began, found.ended) == (None, None, None, None)


def test_several_in_one_datagram_and_what_is_no_event() -> None:
    kinds = [type(e) for e in parse(FULL + message(3, bytes(4)) + message(4, b"") + FULL6)]
    assert kinds == [Ended, Overrun, Ended]


ORIGINAL = tuple_of(1, "198.19.0.7", "198.18.0.4", 6, 1, 2)
REPLY = tuple_of(2, "203.0.113.9", "169.254.54.2", 6, 2, 1)


@pytest.mark.parametrize(
    "datagram",
    [
        b"\x00",
        message(0x102, b""),
        message(0x102, b"\x02\x01\x00\x00"),
        message(0x100, b"\x02\x00\x00\x00"),  # a connection that begins
        destroy(),
        destroy(ORIGINAL),
        destroy(REPLY),
        destroy(ORIGINAL, tuple_of(2, "203.0.113.9", "169.254.54.2", 17, 2, 1)),
        destroy(REPLY, nested(1, nested(1, attribute(1, b"\1\2\3"), attribute(2, bytes(4))))),
        destroy(REPLY, nested(1, nested(1, attribute(1, bytes(4)), attribute(4, bytes(16))))),
        destroy(ORIGINAL, REPLY, b"\xff\x00\x01\x00"),
        struct.pack("=IHHII", 4000, 0x102, 0, 0, 0),
    ],
)
def test_what_is_no_event_is_malformed(datagram: bytes) -> None:
    assert [type(e) for e in parse(datagram)] == [Malformed]


def test_an_attribute_of_another_length_is_not_believed() -> None:
    [found] = parse(destroy(ORIGINAL, REPLY, attribute(8, b"\1"), nested(9, attribute(1, bytes(4)))))
    assert isinstance(found, Ended)
    assert (found.mark, found.out) == (0, None)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda at, b: FULL[:at] + b + FULL[at + len(b) :],
            st.integers(0, len(FULL)),
            st.binary(max_size=6),
        ),
        st.builds(lambda n: FULL6[:n], st.integers(0, len(FULL6))),
        st.builds(destroy, st.builds(attribute, st.integers(0, 0xFFFF), st.binary(max_size=40))),
        st.builds(lambda b: destroy(ORIGINAL, REPLY, nested(9, b), nested(20, b)), st.binary(max_size=40)),
    )
)
def test_any_bytes_give_events(datagram: bytes) -> None:
    for found in parse(datagram):
        assert isinstance(found, Ended | Overrun | Malformed)
        if isinstance(found, Ended):
            assert found.original.source.version == found.original.destination.version
            assert 0 <= found.mark < 1 << 32
