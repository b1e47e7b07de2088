"""From one sandbox to another nothing goes, in any protocol: to its address, to its names, through the
gateway, through the resolver. There is no rule of a policy that would let it. The judge is a capture in the
network of the one that is spoken to: not one frame."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from integration import inside
from integration.probe import Resident
from lab.machine import poll

MARKER = b"between-51aa"
EVERYBODY, ALL_NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
PORT = 9053  # where the other one listens, in both protocols, on every address it has
LISTEN = f"""
import socket, sys
held = []
for family, any_ in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(family, kind)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((any_, {PORT}))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        held.append(sock)
print("listens", flush=True)
sys.stdin.read()
"""
# The guard's modes that let most through: what nobody lists may go out, and still not next door.
POLICY = """
workspace: {name}
guard: {guard}
members: [user:4001]
allow:
  - {{host: plain.test, ports: [7/tcp, {port}/tcp, {port}/udp], verify: address}}
  - {{host: eu.api.openai.test}}
  - {{local: ollama}}
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    names = (("acme", "enforce"), ("beta", "enforce"), ("wide", "off"), ("seen", "observe"))
    return start_module_daemon(
        policies={name: POLICY.format(name=name, guard=guard, port=PORT) for name, guard in names}
    )


class Pair:
    """One that tries, with a raw socket in its network, and one that would listen, with a capture in its."""

    def __init__(self, daemon: Any, mine: str, theirs: str) -> None:
        self.daemon, self.workspace = daemon, mine
        known = {s["link"] for s in daemon.json("status")["sandboxes"]}
        self.other = daemon.start_sandbox(theirs, ["/usr/bin/python3", "-I", "-c", LISTEN])
        poll(lambda: "listens\n" in self.other.out, what=f"who listens: {self.other.err}")
        self.far4, self.far6 = self._addresses(known)
        known |= {s["link"] for s in daemon.json("status")["sandboxes"]}
        self.resident = Resident(daemon, workspace=mine, timeout=0.5)
        self.me4, self.me6 = self._addresses(known)
        self.names = [self.resident.tries(("resolve", "plain.test", family))[0].data for family in "46"]
        self.wire = self._raw(self.resident.process)
        self.ear = self._raw(self.other, protocol=3)  # ETH_P_ALL
        self.ear.setblocking(False)

    def _addresses(self, known: set[str]) -> tuple[str, str]:
        (new,) = [s for s in self.daemon.json("status")["sandboxes"] if s["link"] not in known]
        return new["address4"], new["address6"]

    def _raw(self, process: Any, *, protocol: int = 0) -> socket.socket:
        where = self.daemon.namespace_of(process)
        sock: socket.socket = self.daemon.lab.socket(socket.AF_PACKET, socket.SOCK_RAW, where=where)
        sock.bind(("eth0", protocol))
        return sock

    def heard(self) -> list[bytes]:
        """What has come to the other one since this was last asked."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, where = self.ear.recvfrom(1 << 16)
                if where[2] != socket.PACKET_OUTGOING:
                    found.append(data)
        return found

    def link(self) -> dict[str, list[int]]:
        """Of who tries."""
        (number,) = [
            str(s["link"]).removeprefix("eg")
            for s in self.daemon.json("status")["sandboxes"]
            if s["address4"] == self.me4
        ]
        links = inside.counters(self.daemon, self.workspace)["links"]
        (found,) = [link for link in links if str(link["link"]).removeprefix("eg") == number]
        return found  # type: ignore[no-any-return]

    def close(self) -> None:
        for sock in (self.wire, self.ear):
            sock.close()
        self.resident.__exit__()
        self.other.stdin.close()
        self.other.wait(10)


PAIRS = {
    "one workspace": ("acme", "acme"),
    "two workspaces": ("acme", "beta"),
    "guard off": ("wide", "wide"),
    "guard observe, to another": ("seen", "acme"),
}


@pytest.fixture(scope="module", params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest, daemon: Any) -> Iterator[Pair]:
    made = Pair(daemon, *request.param)
    try:
        yield made
    finally:
        made.close()


def ether(payload: Packet, *, dst: str = GATEWAY_MAC) -> bytes:
    return bytes(Ether(src=SANDBOX_MAC, dst=dst) / payload)


def frames(p: Pair) -> dict[str, bytes]:
    """Everything that has an address, or none."""
    load, syn = Raw(MARKER), TCP(sport=3001, dport=PORT, flags="S")
    four, six = IP(src=p.me4, dst=p.far4), IPv6(src=p.me6, dst=p.far6)
    datagram = UDP(sport=3002, dport=PORT) / load
    found = {
        "TCP to its address": four / syn, "TCP to its address, IPv6": six / syn,
        "UDP to its address": four / datagram, "UDP to its address, IPv6": six / datagram,
        "echo": four / ICMP() / load, "echo, IPv6": six / ICMPv6EchoRequest(data=MARKER),
        "an error of ours": four / ICMP(type=3, code=4) / IP(src=p.far4, dst=p.me4) / datagram,
        "UDP as if from it": IP(src=p.far4, dst=p.me4) / datagram,
        "UDP as if from the resolver": IP(src="169.254.53.53", dst=p.far4) / UDP(sport=53, dport=PORT) / load,
        "UDP as if from the gateway": IP(src="169.254.54.2", dst=p.far4) / datagram,
        "UDP as if from the gateway, IPv6": IPv6(src="fd53:53::53", dst=p.far6) / datagram,
        "UDP as if from itself, IPv6": IPv6(src=p.far6, dst=p.far6) / datagram,
        "loopback": IP(src=p.me4, dst="127.0.0.1") / datagram,
        "to the resolver's other ports": IP(src=p.me4, dst="169.254.53.53") / datagram,
        "to the gateway": IP(src=p.me4, dst="169.254.54.2") / datagram,
        "to the host's end": IP(src=p.me4, dst="169.254.54.1") / datagram,
        "to the gateway, IPv6": IPv6(src=p.me6, dst="fd53:2::2") / datagram,
        "source-routed": IP(src=p.me4, dst=p.names[0], options=[b"\x83\x07\x04" + socket.inet_aton(p.far4)])
        / datagram,
        "tunnelled to the gateway": IP(src=p.me4, dst="169.254.53.53") / IP(src=p.me4, dst=p.far4) / datagram,
    }  # fmt: skip
    for number in (0, 2, 4, 41, 47, 50, 51, 89, 103, 112, 132, 136, 253, 255):
        found[f"protocol {number}"] = IP(src=p.me4, dst=p.far4, proto=number) / load
        found[f"protocol {number}, IPv6"] = IPv6(src=p.me6, dst=p.far6, nh=number) / load
    plain = {name: ether(packet) for name, packet in found.items()}
    link_local, told = IPv6(src=p.me6, dst="fe80::53"), ICMPv6NDOptDstLLAddr(lladdr=SANDBOX_MAC)
    asked = IPv6(src=p.me6, dst="ff02::1:ff00:2") / ICMPv6ND_NS(tgt=p.far6)
    return plain | {
        "broadcast frame": ether(four / datagram, dst=EVERYBODY),
        "broadcast": ether(IP(src=p.me4, dst="255.255.255.255") / datagram, dst=EVERYBODY),
        "the pool's broadcast": ether(IP(src=p.me4, dst="198.19.255.255") / datagram, dst=EVERYBODY),
        "multicast": ether(IP(src=p.me4, dst="224.0.0.251") / datagram, dst="01:00:5e:00:00:fb"),
        "all nodes": ether(IPv6(src=p.me6, dst="ff02::1") / datagram, dst=ALL_NODES),
        "solicited node": ether(asked, dst=ALL_NODES),
        "I am the gateway": ether(IPv6(src=p.me6, dst="ff02::1") / ICMPv6ND_RA(), dst=ALL_NODES),
        "I am your neighbour": ether(link_local / ICMPv6ND_NA(tgt=p.far6) / told),
        "go by me": ether(IPv6(src="fe80::53", dst=p.far6) / ICMPv6ND_Redirect(tgt=p.me6, dst=p.names[1])),
        "ARP, asked": ether(ARP(op=1, psrc=p.me4, pdst=p.far4), dst=EVERYBODY),
        "ARP, told": ether(ARP(op=2, psrc="169.254.53.53", pdst=p.far4, hwsrc=SANDBOX_MAC), dst=EVERYBODY),
        "ARP, its address is mine": ether(ARP(op=1, psrc=p.far4, pdst=p.far4), dst=EVERYBODY),
        "its own link address": ether(four / datagram, dst=SANDBOX_MAC),
        "VLAN": ether(Dot1Q(vlan=2) / four / datagram),
        "a protocol of nobody's": bytes(Ether(src=SANDBOX_MAC, dst=SANDBOX_MAC, type=0x88B5)) + MARKER,
        "LLDP": bytes(Ether(src=SANDBOX_MAC, dst="01:80:c2:00:00:0e", type=0x88CC)) + MARKER,
        "spanning tree": bytes(Ether(src=SANDBOX_MAC, dst="01:80:c2:00:00:00", type=0x27)) + b"BB\3" + MARKER,
    }  # fmt: skip


def test_no_frame_of_any_kind_arrives(pair: Pair) -> None:
    every = frames(pair)
    assert len(every) > 60
    pair.heard()
    before = pair.link()
    for data in every.values():
        pair.wire.send(data)

    def settled() -> bool:
        return pair.link()["in"][0] - before["in"][0] >= len(every)

    poll(settled, what="the gateway has seen them all")
    after = pair.link()
    assert after["ok"][0] == before["ok"][0], "none was admitted, whatever the guard"
    heard = pair.heard()
    assert not heard, [data[:60].hex() for data in heard]
    asking = "import socket; socket.socket().connect(('11.22.33.66', 80))"
    inside.run(pair.daemon, pair.other, "/usr/bin/python3", "-I", "-c", asking)
    assert pair.heard(), "what is for it would be heard: here, the refusal of its own"
    assert inside.counters(pair.daemon, pair.workspace)["balance"]["balanced"]


def test_no_socket_reaches_it_and_is_told_so(pair: Pair) -> None:
    """As an ordinary program would: refused at once, in both families."""
    pair.heard()
    tried = pair.resident.tries(
        *((kind, to, PORT, MARKER.decode()) for kind in ("tcp", "udp") for to in (pair.far4, pair.far6)),
        ("tcp", "169.254.53.53", PORT, "x"), ("udp", "fd53:53::53", PORT, "x"),
    )  # fmt: skip
    assert {outcome.result for outcome in tried} == {"ECONNREFUSED"}, tried
    assert not pair.heard()


def test_its_addresses_and_names_mean_something_else_here(pair: Pair) -> None:
    """What a name stands for leads to its host, from whichever sandbox; a name for a sandbox there is not."""
    pair.heard()
    (said,) = pair.resident.tries(("tcp", "plain.test", 7, MARKER.decode()))
    assert said.data == MARKER.decode(), "its own business goes on"
    reverse = [".".join(reversed(pair.far4.split("."))) + ".in-addr.arpa", "eg1", "eg2", "localhost.egressd"]
    for name in reverse:
        (asked,) = pair.resident.tries(("resolve", name, "4"))
        assert asked.result != "ok", (name, asked)
    assert not pair.heard()


def test_taking_its_address_brings_nothing_of_its(pair: Pair) -> None:
    """Squatting, by the owner of the network: what it sends is denied as another's, what is sent to the other
    still arrives there alone."""
    before = pair.link()
    lines = f"ip addr add {pair.far4}/32 dev eth0\nip -6 addr add {pair.far6}/128 dev eth0 nodad"
    for line in lines.splitlines():
        inside.run(pair.daemon, pair.resident.process, *line.split()).check()
    pair.heard()
    for four, six in ((pair.far4, pair.far6),):
        for packet in (IP(src=four, dst=pair.names[0]), IPv6(src=six, dst=pair.names[1])):
            pair.wire.send(ether(packet / TCP(sport=4000, dport=7, flags="S")))
            pair.wire.send(ether(packet / UDP(sport=4000, dport=PORT) / Raw(MARKER)))
    poll(lambda: pair.link()["denied"][0] >= before["denied"][0] + 4)
    assert pair.link()["ok"][0] == before["ok"][0]
    assert not pair.heard(), "no answer goes to who was pretended to ask"
    for line in lines.replace("add", "del", 1).replace("-6 addr add", "-6 addr del").splitlines():
        inside.run(pair.daemon, pair.resident.process, *line.replace(" nodad", "").split())
