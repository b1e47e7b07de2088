"""What root in a sandbox can put on the wire, frame by frame: every one is counted once, as what it is, to
the byte; what is admitted is on its element; and nothing leaves the uplink untranslated.

AF_PACKET stands for a sandbox whose seccomp filter is already lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from guard_topology import ACME, POOLS, SERVER4, SERVER6, Topology, frames, policy, poll, topology, total
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from egressd.model.identities import Link
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from egressd.ruleset.observe import Tally

pytestmark = pytest.mark.kernel

ME4, ME6 = map(str, POOLS.sandbox(Link(1)))
OTHER4, OTHER6 = map(str, POOLS.sandbox(Link(2)))


@pytest.fixture(scope="module")
def there() -> Iterator[Topology]:
    with topology("bal") as made:
        made.apply(policy(*ACME))
        made.connect(1)
        made.connect(2)
        made.resolve("plain.test", SERVER4, SERVER6)
        made.resolve("quic.test", SERVER4, SERVER6)
        yield made


@dataclass(frozen=True)
class Case:
    name: str
    frame: Packet | bytes
    becomes: str  # ok, other, or the reason it is denied for
    leaves: bool = False  # for the approved host, translated


def ether(payload: Packet, **fields: object) -> Packet:
    return Ether(src=SANDBOX_MAC, dst=fields.pop("dst", GATEWAY_MAC), **fields) / payload


def cases(t: Topology, number: int = 1) -> list[Case]:
    """What a sandbox can send, at its wits' end; `number` is of its link."""
    me4, me6 = map(str, POOLS.sandbox(Link(number)))
    plain4, plain6 = t.address("plain.test", 4), t.address("plain.test", 6)
    quic4, quic6 = t.address("quic.test", 4), t.address("quic.test", 6)
    web4 = IP(src=me4, dst=plain4)
    web6 = IPv6(src=me6, dst=plain6)
    syn = TCP(sport=2000, dport=80, flags="S")
    return [
        # allowed
        Case("v4 SYN to an allowed host", ether(web4 / TCP(sport=1001, dport=80, flags="S")), "ok", True),
        Case("v6 SYN to an allowed host", ether(web6 / TCP(sport=1002, dport=80, flags="S")), "ok", True),
        Case("v4 UDP to an allowed host", ether(IP(src=me4, dst=quic4) / UDP(sport=1003, dport=443) / b"x"),
             "ok", True),
        Case("v6 UDP to an allowed host", ether(IPv6(src=me6, dst=quic6) / UDP(sport=1004, dport=443) / b"x"),
             "ok", True),
        Case("TTL 1", ether(IP(src=me4, dst=plain4, ttl=1) / TCP(sport=1005, dport=80, flags="S")), "ok"),
        # admitted by address and port, invalid to conntrack: must not leave untranslated
        Case("v4 bare ACK with data", ether(web4 / TCP(sport=1010, dport=80, flags="A") / b"leak"), "ok"),
        Case("v6 bare ACK with data", ether(web6 / TCP(sport=1011, dport=80, flags="A") / b"leak"), "ok"),
        Case("v4 UDP, bad checksum",
             ether(IP(src=me4, dst=quic4) / UDP(sport=1012, dport=443, chksum=0x1234) / b"leak"), "ok"),
        Case("v6 UDP, bad checksum",
             ether(IPv6(src=me6, dst=quic6) / UDP(sport=1013, dport=443, chksum=0x1234) / b"leak"), "ok"),
        Case("v4 all TCP flags", ether(web4 / TCP(sport=1014, dport=80, flags=0xFF)), "ok"),
        Case("v6 all TCP flags", ether(web6 / TCP(sport=1015, dport=80, flags=0xFF)), "ok"),
        Case("v4 SYN, bad checksum", ether(web4 / TCP(sport=1016, dport=80, flags="S", chksum=1)), "ok"),
        Case("v4 UDP header of four bytes",
             ether(IP(src=me4, dst=quic4, proto=17) / Raw(bytes.fromhex("03f801bb"))), "ok"),
        Case("v4 bad IP checksum", ether(IP(src=me4, dst=plain4, chksum=0xBAD) / syn), "ok"),
        # not on the list
        Case("v4 wrong port", ether(web4 / TCP(sport=2000, dport=81, flags="S")), "unlisted"),
        Case("v6 wrong protocol", ether(web6 / UDP(sport=2000, dport=80)), "unlisted"),
        Case("v4 real address", ether(IP(src=me4, dst=SERVER4) / syn), "unlisted"),
        Case("v6 real address", ether(IPv6(src=me6, dst=SERVER6) / syn), "unlisted"),
        Case("v4 other sandbox", ether(IP(src=me4, dst=OTHER4) / syn), "unlisted"),
        Case("v6 other sandbox", ether(IPv6(src=me6, dst=OTHER6) / syn), "unlisted"),
        Case("v4 ping", ether(IP(src=me4, dst=plain4) / ICMP()), "unlisted"),
        Case("v6 ping", ether(IPv6(src=me6, dst=plain6) / ICMPv6EchoRequest()), "unlisted"),
        Case("v4 loopback", ether(IP(src=me4, dst="127.0.0.1") / syn), "unlisted"),
        Case("v4 multicast", ether(IP(src=me4, dst="224.0.0.251") / UDP(dport=5353), dst="01:00:5e:00:00:fb"),
             "unlisted"),
        Case("v4 GRE", ether(IP(src=me4, dst=plain4, proto=47) / Raw(b"\0" * 8)), "unlisted"),
        Case("another MAC", ether(web4 / syn, dst="02:53:00:00:00:99"), "unlisted"),
        Case("v4 resolver's neighbour", ether(IP(src=me4, dst="169.254.53.54") / UDP(dport=53)), "unlisted"),
        # not the sandbox's own
        Case("v4 forged", ether(IP(src="10.9.9.9", dst=plain4) / syn), "source"),
        Case("v6 forged", ether(IPv6(src="2001:db8:bad::1", dst=plain6) / syn), "source"),
        Case("v4 the other sandbox's source", ether(IP(src=OTHER4, dst=plain4) / syn), "source"),
        Case("v6 the other sandbox's source", ether(IPv6(src=OTHER6, dst=plain6) / syn), "source"),
        Case("v6 link-local source", ether(IPv6(src="fe80::1", dst="fe80::53") / ICMPv6ND_NS()), "source"),
        Case("v6 no source", ether(IPv6(src="::", dst="ff02::1:ff00:53") / ICMPv6ND_NS()), "source"),
        # misshapen
        Case("v4 first fragment", ether(IP(src=me4, dst=plain4, flags="MF") / syn), "shape"),
        Case("v4 last fragment", ether(IP(src=me4, dst=plain4, frag=9, proto=6) / Raw(b"\0" * 40)), "shape"),
        Case("v4 source route", ether(
            IP(src=me4, dst=plain4, options=[IPOption(bytes.fromhex("8307040a03000200"))]) / syn), "shape"),
        Case("v6 fragment", ether(web6 / IPv6ExtHdrFragment(offset=0, m=1) / syn), "shape"),
        Case("v6 atomic fragment", ether(web6 / IPv6ExtHdrFragment() / syn), "shape"),
        Case("v6 hop by hop", ether(web6 / IPv6ExtHdrHopByHop() / syn), "shape"),
        Case("v6 routing", ether(web6 / IPv6ExtHdrRouting(addresses=[SERVER6]) / syn), "shape"),
        Case("v6 destination options", ether(web6 / IPv6ExtHdrDestOpt() / syn), "shape"),
        Case("v6 authentication header", ether(web6 / AH(nh=6, spi=1, seq=1, icv=b"\0" * 12) / syn), "shape"),
        Case("v4 header beyond the packet", ether(IP(src=me4, dst=plain4, ihl=15, len=40) / syn), "shape"),
        Case("v4 total length too long", ether(IP(src=me4, dst=plain4, len=4000) / syn), "shape"),
        Case("v4 version 5", ether(IP(src=me4, dst=plain4, version=5) / syn), "shape"),
        # cut short: there is not even a source to compare
        Case("v4 cut in the header", bytes(ether(web4 / syn))[: 14 + 12], "source"),
        Case("v6 cut in the header", bytes(ether(web6 / syn))[: 14 + 20], "source"),
        # the source is whole, the port is not
        Case("v4 cut in the ports", bytes(ether(IP(src=me4, dst=plain4, len=22) / syn))[:36], "unlisted"),
        # not IP
        Case("ARP", ether(ARP(pdst="169.254.53.53"), dst="ff:ff:ff:ff:ff:ff"), "other"),
        Case("VLAN", ether(Dot1Q(vlan=7) / web4 / syn), "other"),
        Case("priority tag", ether(Dot1Q(vlan=0) / web4 / syn), "other"),
        Case("LLDP", bytes.fromhex("0180c200000e") + b"\2\x53\0\0\0\1" + b"\x88\xcc" + b"\0" * 46, "other"),
        Case("802.3 length", bytes(ether(Raw(b"\xaa\xaa\3" + b"\0" * 40), type=43)), "other"),
        Case("unknown ethertype", ether(Raw(b"x" * 50), type=0x9999), "other"),
    ]  # fmt: skip


def test_every_frame_is_counted_once_and_as_what_it_is(there: Topology) -> None:
    wire = there.raw(there.sandbox(1), "eth0")
    uplink = there.raw(there.internet, "inet0")
    every = cases(there)
    assert len(every) > 50
    wrong = []
    for case in every:
        frame = bytes(case.frame)
        before = there.counters()
        frames(uplink)
        wire.send(frame)
        after = there.settled(1, before.links["eg1"].in_.packets + 1)
        link, old = after.links["eg1"], before.links["eg1"]
        seen = {
            "ok": link.ok - old.ok,
            "other": link.other - old.other,
            **{r: t - before.denied["acme"][r] for r, t in after.denied["acme"].items()},
        }
        # the ingress hook sees the frame without its Ethernet header, and a VLAN tag already taken off
        one = Tally(1, len(frame) - (18 if frame[12:14] == b"\x81\0" else 14))
        expected = {reason: one if reason == case.becomes else Tally() for reason in seen}
        denied = Tally() if case.becomes in ("ok", "other") else one
        if seen != expected or link.in_ - old.in_ != one or link.denied - old.denied != denied:
            wrong.append((case.name, case.becomes, seen, link.in_ - old.in_))
        if total(after) - total(before) != seen["ok"]:
            wrong.append((case.name, "elements", total(after), total(before)))
        if case.leaves:
            assert poll(lambda: bool(frames(uplink))), f"{case.name}: nothing arrived"
        elif left := frames(uplink):
            wrong.append((case.name, "left the uplink", left))
    assert not wrong, "\n".join(map(str, wrong))
    result = books(equations(there.counters(), {}, {}, workspace_of={"eg1": "acme", "eg2": "acme"}))
    assert result.balanced, result.differences


def test_nothing_untranslated_ever_passes_the_uplink(there: Topology) -> None:
    """All cases at once, twenty times, with the capture as the judge."""
    wire = there.raw(there.sandbox(1), "eth0")
    uplink = there.raw(there.internet, "inet0")
    every = [bytes(case.frame) for case in cases(there)]
    before = there.counters().links["eg1"].in_.packets
    for _ in range(20):
        for frame in every:
            wire.send(frame)
    there.settled(1, before + 20 * len(every))
    seen = [Ether(frame) for frame in frames(uplink)]
    assert seen, "the allowed ones should have left"
    for frame in seen:
        packet = frame.getlayer(IP) or frame.getlayer(IPv6)
        if packet is None:
            continue
        assert packet.src in ("10.3.0.1", "2001:db8:3::1") or packet.src.startswith("fe80"), packet.summary()
        assert packet.dst in (SERVER4, SERVER6) or packet.dst.startswith("ff02"), packet.summary()
        assert b"leak" not in bytes(packet)


def test_an_idle_sandbox_is_silent(there: Topology) -> None:
    """Static neighbours: no ARP, no neighbour discovery, no router solicitation, no MLD."""
    assert there.counters().links["eg2"].in_ == Tally()


def test_the_sandbox_hears_no_answer_to_a_forged_source(there: Topology) -> None:
    """A refusal goes back out of the device it came in by, never to whoever's address was used."""
    wire = there.raw(there.sandbox(1), "eth0")
    other = there.raw(there.sandbox(2), "eth0")
    before = there.counters().links["eg1"].in_.packets
    wire.send(bytes(ether(IP(src=OTHER4, dst=SERVER4) / TCP(dport=80, flags="S"))))
    there.settled(1, before + 1)
    assert poll(lambda: any(Ether(f)[IP].dst == OTHER4 for f in frames(wire) if IP in Ether(f)))
    assert frames(other) == []
