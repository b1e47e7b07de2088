"""The frames are what they say: read by scapy, and some of them byte for byte what scapy would send."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from egressd.selftest.frames import FRAMES, Ends, checksum
from egressd.selftest.shown.attacks import UNLISTED, hello, question

ENDS = Ends(
    IPv4Address("198.19.0.7"), IPv6Address("fd53:1::7"), IPv4Address("198.19.0.8"), IPv6Address("fd53:1::8")
)
RESOLVER4, RESOLVER6 = "169.254.53.53", "fd53:53::53"
BUILT = {(frame.name, frame.family): frame.build(ENDS) for frame in FRAMES}
ASKED = Raw(question(UNLISTED))
HEAD = Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC)
FOUR, SIX = IP(src="198.19.0.7", dst=RESOLVER4, id=1), IPv6(src="fd53:1::7", dst=RESOLVER6)
ASKING = UDP(sport=5353, dport=53) / ASKED


def scapys() -> dict[tuple[str, str], Packet]:
    to_raw4, to_raw6 = IP(src="198.19.0.7", dst="192.0.2.1", id=1), IPv6(src="fd53:1::7", dst="2001:db8::1")
    syn = TCP(sport=5353, dport=443, flags="S", seq=1)
    solicited = Ether(src=SANDBOX_MAC, dst="33:33:ff:00:00:53")
    return {
        ("the source of the sandbox after", "v4"): HEAD / IP(src="198.19.0.8", dst=RESOLVER4, id=1) / ASKING,
        ("the source of the sandbox after", "v6"): HEAD / IPv6(src="fd53:1::8", dst=RESOLVER6) / ASKING,
        ("a lawful question to everybody's MAC", "v4"):
            Ether(src=SANDBOX_MAC, dst="ff:ff:ff:ff:ff:ff") / FOUR / ASKING,
        ("a SYN to a raw address", "v4"): HEAD / to_raw4 / syn,
        ("a SYN to a raw address", "v6"): HEAD / to_raw6 / syn,
        ("an echo with data, to a raw address", "v4"):
            HEAD / to_raw4 / ICMP(id=1, seq=1) / Raw(b"selftest"),
        ("an echo with data, to a raw address", "v6"):
            HEAD / to_raw6 / ICMPv6EchoRequest(id=1, seq=1, data=b"selftest"),
        ("a wrong checksum of the header, to a raw address", "v4"): HEAD / to_raw4 / ASKING,
        ("a router alert", "v4"):
            HEAD / IP(src="198.19.0.7", dst=RESOLVER4, id=1, options=[IPOption_Router_Alert()]) / ASKING,
        ("hop-by-hop options", "v6"):
            HEAD / SIX / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]) / ASKING,
        ("a fragment header", "v6"): HEAD / SIX / IPv6ExtHdrFragment(m=1, id=7) / ASKING,
        ("a VLAN's tag before a lawful question", "-"): HEAD / Dot1Q(vlan=7) / FOUR / ASKING,
        ("ARP: I am the gateway", "-"):
            HEAD / ARP(op=2, hwsrc=SANDBOX_MAC, psrc=RESOLVER4, hwdst="00:00:00:00:00:00", pdst=RESOLVER4),
        ("ND: who has the gateway", "v6"):
            solicited / IPv6(src="fd53:1::7", dst="ff02::1:ff00:53", hlim=64) / ICMPv6ND_NS(tgt="fe80::53"),
        ("ND: I am your router", "v6"):
            Ether(src=SANDBOX_MAC, dst="33:33:00:00:00:01") / IPv6(src="fd53:1::7", dst="ff02::1", hlim=64)
            / ICMPv6ND_RA(chlim=64, prf=0, routerlifetime=1800),
    }  # fmt: skip


@pytest.mark.parametrize(("which", "packet"), scapys().items(), ids=lambda found: str(found)[:40])
def test_it_is_what_scapy_would_send(which: tuple[str, str], packet: Packet) -> None:
    ours, theirs = bytearray(BUILT[which]), bytes(packet)
    if which[0].startswith("a wrong checksum"):
        assert checksum(bytes(ours[14:34])) != 0 == checksum(theirs[14:34])
        ours[24:26] = theirs[24:26]
    assert bytes(ours) == theirs


def test_every_other_checksum_of_an_ipv4_header_is_right() -> None:
    for (name, _), data in BUILT.items():
        if data[12:14] == b"\x08\x00" and len(data) >= 34 and data[14] >> 4 == 4:
            size = 4 * (data[14] & 15)
            assert (checksum(data[14 : 14 + size]) == 0) != name.startswith("a wrong checksum"), name


def test_frames_come_from_us_and_fit_the_link() -> None:
    ours = bytes.fromhex(SANDBOX_MAC.replace(":", ""))
    for (name, _), data in BUILT.items():
        assert data[6:12] == ours and 14 <= len(data) <= 1514, name


def test_what_is_counted_as_other_is_not_plain_ip() -> None:
    for frame in FRAMES:
        plain = frame.build(ENDS)[12:14] in (b"\x08\x00", b"\x86\xdd")
        assert plain == (frame.counted == "denied"), frame.name


def test_a_question_is_one() -> None:
    asked = DNS(question("a.b.example", 16, options=b"\xfd\xe9\0\1x"))
    assert (asked.qd[0].qname, asked.qd[0].qtype, asked.rd, asked.qr) == (b"a.b.example.", 16, 1, 0)
    assert asked.ar[0].type == 41
    plain = question("a.example")
    assert plain == bytes(DNS(id=0x5353, rd=1, qd=DNSQR(qname="a.example")))


def test_a_hello_is_read_by_the_inspectors_own_reader() -> None:
    from egressd.tls import hello as reader

    found: Any = reader.read(hello(name=b"api.example"))
    assert "api.example" in repr(found)
