"""Frames that nobody's socket would send, from a sandbox that has lost its system-call filter, against the
whole daemon: each is counted once, to the byte, under its reason, and the uplink stays quiet."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from scapy.layers.inet import GRE, ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from integration import inside
from integration.probe import Resident
from lab import topology as t

MARKER = b"frame-6d02"
POLICY = """
workspace: {name}
guard: {guard}
members: [user:4001]
allow:
  - {{host: {host}, ports: [7/tcp, 21/tcp, 443/udp, 5060/udp], verify: address}}
"""


@dataclass(frozen=True)
class Case:
    name: str
    frame: Packet | bytes
    becomes: str  # "other", or the reason it is denied for


class Scene:
    """Two sandboxes of two workspaces whose names lead to different hosts, and a raw socket in the first."""

    def __init__(self, daemon: Any) -> None:
        self.daemon = daemon
        self.mine, self.other = Resident(daemon), Resident(daemon, workspace="beta")
        own = {s["workspace"]: s for s in daemon.json("status")["sandboxes"]}
        self.me4, self.me6 = own["acme"]["address4"], own["acme"]["address6"]
        self.other4, self.other6 = own["beta"]["address4"], own["beta"]["address6"]
        (four, six) = (self.mine.tries(("resolve", "plain.test", f))[0].data for f in "46")
        self.plain4, self.plain6 = four, six
        self.wire = daemon.lab.socket(
            socket.AF_PACKET, socket.SOCK_RAW, where=daemon.namespace_of(self.mine.process)
        )
        self.wire.bind(("eth0", 0))

    def send(self, frame: Packet | bytes) -> int:
        """Bytes above the Ethernet header."""
        data = bytes(frame)
        self.wire.send(data)
        return len(data) - 14

    def close(self) -> None:
        self.wire.close()
        for resident in (self.mine, self.other):
            resident.__exit__()


@pytest.fixture(scope="module")
def scene(start_module_daemon: Any) -> Iterator[Scene]:
    policies = {
        "acme": POLICY.format(name="acme", host="plain.test", guard="enforce"),
        "beta": POLICY.format(name="beta", host="one.cdn.test", guard="enforce"),
    }
    made = Scene(start_module_daemon(policies=policies))
    try:
        yield made
    finally:
        made.close()


def ether(payload: Packet, *, dst: str = GATEWAY_MAC, src: str = SANDBOX_MAC) -> Packet:
    return Ether(src=src, dst=dst) / payload


def cases(s: Scene) -> list[Case]:
    four, six = IP(src=s.me4, dst=s.plain4), IPv6(src=s.me6, dst=s.plain6)
    syn, echo = TCP(sport=3001, dport=7, flags="S"), UDP(sport=3002, dport=443)
    load = Raw(MARKER)
    embedded4 = IP(src=s.other4, dst=str(t.CDN4)) / UDP(sport=5, dport=443)
    embedded6 = IPv6(src=s.other6, dst=str(t.CDN6)) / UDP(sport=5, dport=443)
    evil4, evil6 = str(t.EVIL4), str(t.EVIL6)
    return [
        # to be somebody else
        *(Case(f"v4 from {who}", ether(IP(src=who, dst=s.plain4) / echo / load), "source")
          for who in (s.other4, str(t.HOST4), "169.254.54.1", "169.254.54.2", "169.254.53.53", "127.0.0.1",
                      "0.0.0.0", "255.255.255.255", s.plain4, evil4)),
        *(Case(f"v6 from {who}", ether(IPv6(src=who, dst=s.plain6) / echo / load), "source")
          for who in (s.other6, str(t.HOST6), "fd53:2::1", "fd53:2::2", "fd53:53::53", "fe80::53", "::1",
                      "::", f"::ffff:{s.me4}", s.plain6, evil6)),
        # sandbox to sandbox, in every protocol
        *(Case(f"v4 to the other sandbox, protocol {number}",
               ether(IP(src=s.me4, dst=s.other4, proto=number) / Raw(b"\0\7\0\7" + MARKER)), "unlisted")
          for number in (1, 2, 4, 6, 17, 41, 47, 50, 51, 89, 103, 112, 115, 132, 136, 253)),
        *(Case(f"v6 to the other sandbox, protocol {number}",
               ether(IPv6(src=s.me6, dst=s.other6, nh=number) / Raw(b"\0\7\0\7" + MARKER)), "unlisted")
          for number in (1, 4, 6, 17, 41, 47, 50, 58, 59, 89, 132, 135, 136, 139, 140, 253)),
        Case("v4 to itself", ether(IP(src=s.me4, dst=s.me4) / syn / load), "unlisted"),
        # tunnels to the approved host
        *(Case(f"v4 tunnel, protocol {number}", ether(IP(src=s.me4, dst=s.plain4, proto=number) / load),
               "unlisted") for number in (4, 41, 47, 50, 132, 136)),
        Case("GRE", ether(IP(src=s.me4, dst=s.plain4) / GRE() / IP(dst=evil4) / load), "unlisted"),
        # ICMP
        Case("v4 echo with data", ether(four / ICMP() / load), "unlisted"),
        Case("v4 echo reply with data", ether(IP(src=s.me4, dst=evil4) / ICMP(type=0) / load), "unlisted"),
        Case("v4 unreachable for another's flow", ether(IP(src=s.me4, dst=str(t.CDN4)) /
             ICMP(type=3, code=3) / embedded4), "unlisted"),
        Case("v4 redirect", ether(IP(src=s.me4, dst="169.254.53.53") / ICMP(type=5, gw=s.me4) / embedded4),
             "unlisted"),
        Case("v6 too big for another's flow",
             ether(IPv6(src=s.me6, dst=str(t.CDN6)) / ICMPv6PacketTooBig(mtu=1280) / embedded6), "unlisted"),
        Case("v6 router advertisement", ether(IPv6(src=s.me6, dst="ff02::1") / ICMPv6ND_RA(),
             dst="33:33:00:00:00:01"), "unlisted"),
        Case("v6 neighbour advertisement",
             ether(IPv6(src=s.me6, dst="fd53:2::1") / ICMPv6ND_NA(tgt="fd53:2::2")), "unlisted"),
        Case("v6 redirect", ether(IPv6(src=s.me6, dst="fe80::53") /
             ICMPv6ND_Redirect(tgt=s.me6, dst=s.other6)), "unlisted"),
        Case("v6 listener report", ether(IPv6(src=s.me6, dst="ff02::16") / ICMPv6MLReport(),
             dst="33:33:00:00:00:16"), "unlisted"),
        # everybody at once
        *(Case(f"v4 to {to}", ether(IP(src=s.me4, dst=to) / echo / load, dst="ff:ff:ff:ff:ff:ff"), "unlisted")
          for to in ("255.255.255.255", "198.19.255.255", "224.0.0.1", "10.3.0.255", s.plain4)),
        *(Case(f"v6 to {to}", ether(IPv6(src=s.me6, dst=to) / echo / load, dst="33:33:00:00:00:01"),
               "unlisted") for to in ("ff02::1", "ff05::1:3", "ff0e::1")),
        # the gateway and the host
        *(Case(f"v4 to {to}", ether(IP(src=s.me4, dst=to) / TCP(sport=9, dport=port, flags="S")), "unlisted")
          for to in ("169.254.53.53", "169.254.54.1", "169.254.54.2", "127.0.0.1", str(t.HOST4), "0.0.0.0")
          for port in (22, 8443, t.SECRET_PORTS[1])),
        *(Case(f"v6 to {to}", ether(IPv6(src=s.me6, dst=to) / TCP(sport=9, dport=port, flags="S")),
               "unlisted")
          for to in ("fd53:53::53", "fd53:2::1", "fd53:2::2", "::1", "fe80::53", str(t.HOST6), "::")
          for port in (22, 8443, t.SECRET_PORTS[2])),
        Case("the resolver, another protocol", ether(IP(src=s.me4, dst="169.254.53.53", proto=132) /
             Raw(b"\0\x35\0\x35")), "unlisted"),
        # headers in front of a lawful packet
        Case("v6 options in front", ether(six / IPv6ExtHdrHopByHop() / echo / load), "shape"),
        Case("v6 two headers in front", ether(six / IPv6ExtHdrDestOpt() / IPv6ExtHdrDestOpt() / echo / load),
             "shape"),
        Case("v6 fragment in front", ether(six / IPv6ExtHdrFragment(m=1, id=7) / echo / load), "shape"),
        Case("v4 one overlapping fragment", ether(IP(src=s.me4, dst=s.plain4, frag=1, proto=17) / load),
             "shape"),
        Case("v4 last of a datagram", ether(IP(src=s.me4, dst=s.plain4, frag=8100, proto=17) / load),
             "shape"),
        # other links' ways
        Case("QinQ", ether(Dot1AD(vlan=1) / Dot1Q(vlan=2) / four / echo / load), "other"),
        Case("VLAN 4095", ether(Dot1Q(vlan=4095) / four / echo / load), "other"),
        Case("ARP for the gateway", ether(ARP(op=2, psrc="169.254.53.53", hwsrc=SANDBOX_MAC)), "other"),
        Case("MPLS", bytes(Ether(dst=GATEWAY_MAC, src=SANDBOX_MAC, type=0x8847)) + b"\0" * 4 + bytes(four),
             "other"),
        Case("PPPoE", bytes(Ether(dst=GATEWAY_MAC, src=SANDBOX_MAC, type=0x8864)) + b"\x11\0\0\1\0\6" +
             bytes(four), "other"),
        Case("IPv6 said to be IPv4", bytes(Ether(dst=GATEWAY_MAC, src=SANDBOX_MAC, type=0x800)) + bytes(six),
             "source"),
        Case("nothing above Ethernet", bytes(Ether(dst=GATEWAY_MAC, src=SANDBOX_MAC, type=0x800)), "source"),
    ]  # fmt: skip


def test_every_frame_is_counted_as_what_it_is_and_none_leaves(scene: Scene, uplink: Any) -> None:
    every = cases(scene)
    assert len(every) > 120
    wrong = []
    since = uplink.settle()
    for case in every:
        before = inside.counters(scene.daemon)
        # A tag belongs to the link layer: the kernel has taken the outer one off by the time it counts.
        size = scene.send(case.frame) - (4 if case.name in ("QinQ", "VLAN 4095") else 0)
        after = settled(scene, before)
        came = difference(link(after)["in"], link(before)["in"])
        if came != [1, size] or verdict(before, after) != {case.becomes: [1, size]}:
            wrong.append(f"{case.name}: {came} of {size} bytes came, {verdict(before, after)}")
    assert not wrong, "\n".join(wrong)
    # Servers may still be repeating themselves to sandboxes of earlier tests: what counts is what leaves.
    uplink.assert_only_to(t.DNS4, t.DNS6, since=since)
    uplink.assert_never(MARKER, since=since)
    assert inside.counters(scene.daemon)["balance"]["balanced"]


def settled(scene: Scene, before: dict[str, Any]) -> dict[str, Any]:
    """Once something has come, and between two looks nothing more: frames wait for the other processor."""
    deadline, last = time.monotonic() + 1.0, before
    while True:
        after = inside.counters(scene.daemon)
        came, still = link(after)["in"] != link(before)["in"], link(after)["in"] == link(last)["in"]
        if (came and still) or time.monotonic() > deadline:
            return after
        last = after


def link(counters: dict[str, Any]) -> dict[str, list[int]]:
    (found,) = counters["links"]
    return found  # type: ignore[no-any-return]


def difference(after: list[int], before: list[int]) -> list[int]:
    return [now - then for now, then in zip(after, before, strict=True)]


def verdict(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[int]]:
    """Reason -> packets and bytes, of whatever was counted in between; "ok" for what was admitted."""
    found = {
        reason: difference(after["denied"][reason], before["denied"].get(reason, [0, 0]))
        for reason in after["denied"]
    }
    for part in ("ok", "other"):
        found[part] = difference(link(after)[part], link(before)[part])
    return {reason: count for reason, count in found.items() if count != [0, 0]}


# ---- what is admitted by its address, and is not what it says


def lawful(s: Scene) -> dict[str, tuple[Packet, str]]:
    """Admitted by the map; and the counter that says what became of it."""
    number = itertools.count(4000)
    four, six = IP(src=s.me4, dst=s.plain4), IPv6(src=s.me6, dst=s.plain6)
    load = Raw(MARKER)
    cases: dict[str, tuple[Packet, str]] = {}
    for name, ip in (("v4", four), ("v6", six)):
        for flags in ("SA", "A", "FA", "RA", "PA", "", "SF", "SFRPAU"):
            cases[f"{name} flags {flags or 'none'}"] = (
                ip / TCP(sport=next(number), dport=7, flags=flags) / load,
                "invalid",
            )
        cases[f"{name} UDP length 8000"] = (
            ip / UDP(sport=next(number), dport=443, len=8000) / load,
            "invalid",
        )
        cases[f"{name} UDP checksum"] = (ip / UDP(sport=next(number), dport=443, chksum=1) / load, "invalid")
        cases[f"{name} data offset 1"] = (
            ip / TCP(sport=next(number), dport=7, flags="S", dataofs=1) / load,
            "invalid",
        )
    slot = s.plain4.rpartition(".")
    beyond = f"{slot[0]}.{int(slot[2]) | 3}"
    cases["v4 another slot of the name"] = (
        IP(src=s.me4, dst=beyond) / UDP(sport=next(number), dport=443) / Raw(b"slot"),
        "",
    )
    return cases  # fmt: skip


def test_what_no_connection_knows_does_not_leave(scene: Scene, uplink: Any) -> None:
    """Admitted by address and port, and lost later, under a name: nothing crosses the uplink unasked."""
    since = uplink.settle()
    for name, (packet, lost) in lawful(scene).items():
        before = inside.counters(scene.daemon)
        size = scene.send(ether(packet))
        after = settled(scene, before)
        found = verdict(before, after)
        assert found.pop("ok") == [1, size], name
        # No socket awaits what an echo server answers: the sandbox's own kernel says so, and is denied.
        assert not found or (not lost and set(found) == {"unlisted"}), (name, found)
        if lost:
            assert difference(after["late"][lost], before["late"][lost])[0] == 1, (name, lost, after["late"])
    uplink.assert_never(MARKER, since=since)
    for frame in uplink.frames(since=since, outgoing=True):
        assert frame.source == t.HOST4 and frame.destination == t.PLAIN4, str(frame)


def test_a_reset_guessed_into_anothers_connection_does_nothing(scene: Scene) -> None:
    """Blindly, under the other sandbox's address, on every port near the one it has."""
    (open_,) = scene.other.tries(("tcp", "one.cdn.test", 7, "x"))
    assert open_.result == "ok"
    before = inside.counters(scene.daemon)
    for port in range(32768, 32768 + 200):
        scene.send(ether(IP(src=scene.other4, dst=str(t.CDN4)) / TCP(sport=port, dport=7, flags="R")))
        scene.send(ether(IP(src=scene.me4, dst=str(t.CDN4)) / TCP(sport=port, dport=7, flags="R")))
    after = settled(scene, before)
    found = verdict(before, after)
    assert set(found) == {"source", "unlisted"}, found


@pytest.mark.parametrize(
    ("port", "protocol", "said"),
    [
        (21, "tcp", b"PORT 127,0,0,1,39,15\r\nEPRT |1|11.22.33.66|7|\r\n"),
        (
            5060,
            "udp",
            b"INVITE sip:x@y SIP/2.0\r\nContact: <sip:x@11.22.33.66:7>\r\n\r\nc=IN IP4 11.22.33.66\r\n",
        ),
    ],
)
def test_no_helper_opens_a_second_way(
    scene: Scene, uplink: Any, port: int, protocol: str, said: bytes
) -> None:
    """Neither FTP's PORT nor SIP's Contact makes conntrack expect anything."""
    scene.mine.tries((protocol, "plain.test", port, said.decode()))
    listing = scene.daemon.lab.run(["cat", "/proc/net/nf_conntrack_expect"], where=scene.daemon.gateway)
    assert listing.out.strip() == ""
    since = uplink.settle()
    tried = scene.mine.tries(
        ("tcp", str(t.EVIL4), 7, MARKER.decode()), ("udp", str(t.EVIL4), 7, MARKER.decode())
    )
    assert {o.result for o in tried} == {"ECONNREFUSED"}
    uplink.assert_never(MARKER, since=since)


def test_marks_set_in_the_sandbox_are_nothing_in_the_gateway(scene: Scene, uplink: Any) -> None:
    """SO_MARK, which the owner of the network may set: every kind, every block, the other workspace's too."""
    text = f"""
import socket, struct
for kind in (0x8, 0x9, 0x4, 0x2, 0xF, 0xC):
    for workspace in range(1, 4):
        for block in (0, 1, 16383):
            mark = struct.pack("=I", kind << 28 | workspace << 14 | block)
            for family, to in ((2, "{t.EVIL4}"), (10, "{t.EVIL6}"), (2, "{t.CDN4}")):
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sock.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
                sock.sendto({MARKER!r}, (to, 443))
"""
    before = inside.counters(scene.daemon)
    since = uplink.settle()
    inside.run(scene.daemon, scene.mine.process, "/usr/bin/python3", "-c", text).check()
    after = settled(scene, before)
    assert verdict(before, after)["unlisted"][0] == 162 and set(verdict(before, after)) == {"unlisted"}
    # Servers may still be repeating themselves to sandboxes of earlier tests: what counts is what leaves.
    uplink.assert_only_to(t.DNS4, t.DNS6, since=since)
    uplink.assert_never(MARKER, since=since)
