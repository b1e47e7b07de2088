"""What is read from a packet's first bytes: a table of packets, and one law for all bytes."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_RR, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.sctp import SCTP
from scapy.packet import Raw

from egressd.packets.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6, Attempt, Family, parse

V4 = {"src": "198.19.0.7", "dst": "203.0.113.9"}
V6 = {"src": "fd53:1::7", "dst": "2001:db8::9"}

PACKETS = [
    # packet, and what must be read from it
    (IP(**V4) / TCP(sport=1, dport=443, flags="S"),
     {"protocol": "tcp", "destination_port": 443, "tcp_flags": ("syn",)}),
    (IP(**V4) / TCP(dport=1, flags="FSRPAUEC"),
     {"tcp_flags": ("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr")}),
    (IP(**V4) / UDP(sport=5353, dport=53), {"protocol": "udp", "source_port": 5353, "destination_port": 53}),
    (IP(**V4) / ICMP(type=8, code=0),
     {"protocol": "icmp", "icmp_type": 8, "icmp_code": 0, "destination_port": None}),
    (IP(**V4) / SCTP(sport=7, dport=9), {"protocol": "sctp", "destination_port": 9}),
    (IP(**V4, proto=47) / Raw(b"xxxx"), {"protocol": "gre", "destination_port": None}),
    (IP(**V4, proto=253) / Raw(b"xxxx"), {"protocol": "protocol-253", "number": 253}),
    (IP(**V4, options=[IPOption_RR()]) / TCP(dport=80), {"options": True, "destination_port": 80}),
    (IP(**V4, flags="DF") / TCP(dport=80), {"fragment": False}),
    (IP(**V4, flags="MF") / UDP(dport=80), {"fragment": True, "destination_port": 80}),
    (IP(**V4, frag=7) / Raw(b"\x00\x50" * 8), {"fragment": True, "destination_port": None}),
    (IPv6(**V6) / TCP(dport=443, flags="S"),
     {"protocol": "tcp", "destination_port": 443, "tcp_flags": ("syn",)}),
    (IPv6(**V6) / UDP(dport=53), {"protocol": "udp", "destination_port": 53, "options": False}),
    (IPv6(**V6) / ICMPv6EchoRequest(), {"protocol": "icmpv6", "icmp_type": 128}),
    (IPv6(**V6) / IPv6ExtHdrHopByHop() / TCP(dport=22),
     {"options": True, "protocol": "tcp", "destination_port": 22}),
    (IPv6(**V6) / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting() / UDP(dport=1),
     {"options": True, "destination_port": 1}),
    (IPv6(**V6) / AH(payloadlen=4) / TCP(dport=5), {"options": True}),
    (IPv6(**V6) / IPv6ExtHdrFragment(m=1) / UDP(dport=9), {"fragment": True, "destination_port": 9}),
    (IPv6(**V6) / IPv6ExtHdrFragment(offset=3) / UDP(dport=9), {"fragment": True, "destination_port": None}),
    (IPv6(**V6, nh=59), {"protocol": "no-next-header"}),
]  # fmt: skip


@pytest.mark.parametrize(("packet", "expected"), PACKETS, ids=[p.summary()[:60] for p, _ in PACKETS])
def test_a_packet_is_read_as_it_was_written(packet, expected: dict) -> None:
    attempt = parse(bytes(packet))
    family, addresses = (Family.IPV4, V4) if packet.version == 4 else (Family.IPV6, V6)
    assert attempt.family is family
    assert attempt.source == ip_address(addresses["src"])
    assert attempt.destination == ip_address(addresses["dst"])
    assert {key: getattr(attempt, key) for key in expected} == expected
    assert not attempt.truncated or "destination_port" not in expected


@pytest.mark.parametrize(
    "packet", [IP(**V4) / TCP(dport=443), IPv6(**V6) / TCP(dport=443)], ids=["ipv4", "ipv6"]
)
def test_a_packet_cut_short_says_so_and_never_guesses(packet) -> None:
    whole = parse(bytes(packet))
    header = len(bytes(packet)) - 20
    for length in range(len(bytes(packet))):
        attempt = parse(bytes(packet)[:length])
        if length < header + 14:
            assert attempt.truncated, length
        assert attempt.destination_port in (None, whole.destination_port)
        assert attempt.destination in (None, whole.destination)


def test_the_length_is_the_packets_own_claim() -> None:
    assert parse(bytes(IP(**V4) / UDP() / Raw(b"x" * 100))).length == 128
    assert parse(bytes(IPv6(**V6) / UDP() / Raw(b"x" * 100))).length == 148


def test_later_fragments_have_no_ports() -> None:
    first, *rest = fragment(IP(**V4) / UDP(dport=53) / Raw(b"x" * 3000), fragsize=800)
    assert parse(bytes(first)).destination_port == 53
    assert rest
    assert all(parse(bytes(p)).destination_port is None and parse(bytes(p)).fragment for p in rest)


@pytest.mark.parametrize(
    ("ethertype", "name"),
    [
        (0x0806, "arp"),
        (0x88CC, "lldp"),
        (0x8100, "vlan"),
        (0x1234, "ethertype-0x1234"),
        (0, "ethertype-0x0000"),
    ],
)
def test_a_frame_that_is_not_ip_is_named(ethertype: int, name: str) -> None:
    assert parse(b"\x45" + bytes(30), ethertype=ethertype) == Attempt(family=Family.OTHER, protocol=name)


@pytest.mark.parametrize("ethertype", [ETHERTYPE_IPV4, ETHERTYPE_IPV6])
def test_a_label_that_contradicts_the_version_is_unreadable(ethertype: int) -> None:
    packet = bytes(IPv6(**V6) if ethertype == ETHERTYPE_IPV4 else IP(**V4)) + bytes(40)
    attempt = parse(packet, ethertype=ethertype)
    assert (attempt.protocol, attempt.truncated, attempt.destination) == ("unreadable", True, None)


def test_a_chain_of_extension_headers_without_end_is_given_up() -> None:
    packet = bytes(IPv6(**V6, nh=60)) + (b"\x3c\x00" + bytes(6)) * 400
    assert parse(packet).truncated


START = st.sampled_from([bytes(packet) for packet, _ in PACKETS])


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda b, v: bytes([v]) + b, st.binary(max_size=120), st.sampled_from([0x45, 0x4F, 0x40, 0x60])
        ),
        st.builds(
            lambda p, at, b: p[:at] + b + p[at + len(b) :], START, st.integers(0, 60), st.binary(max_size=8)
        ),
    ),
    st.one_of(st.none(), st.integers(0, 0xFFFF), st.sampled_from([ETHERTYPE_IPV4, ETHERTYPE_IPV6])),
)
def test_any_bytes_give_an_attempt(data: bytes, ethertype: int | None) -> None:
    attempt = parse(data, ethertype=ethertype)
    assert isinstance(attempt, Attempt)
    assert attempt.destination is None or attempt.destination.packed in data
    for port in (attempt.source_port, attempt.destination_port):
        assert port is None or port.to_bytes(2, "big") in data
    assert hash(attempt) == hash(dataclasses.replace(attempt))
