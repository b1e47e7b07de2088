"""A sandbox that does its worst for a while, against the whole daemon: it hurts itself. A neighbour of
another workspace works meanwhile; tables, memory and journal stay bounded; and the books are exact."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from integration import inside
from integration.hostile import frames, from_ports
from integration.probe import Resident
from lab import topology as t
from lab.machine import poll
from lab.scale import scaled

POLICY = """
workspace: {name}
guard: enforce
members: [user:4001]
allow:
  - {{host: {host}, ports: [7/tcp, 443/udp], verify: address}}
  - {{host: eu.api.openai.test}}
limits: {limits}
"""
MEMORY = 24.0  # MiB that a process of egressd's may have grown by: buffers and caches have their bounds
ENTRIES = 4096 + 18_000 + 16_000  # one sandbox's, in the gateway; the host sees no questions


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(
        policies={
            "acme": POLICY.format(name="acme", host="plain.test", limits="{}"),
            "beta": POLICY.format(name="beta", host="one.cdn.test", limits="{}"),
            "small": POLICY.format(name="small", host="plain.test", limits="{memory: 64MiB, processes: 40}"),
        }
    )


# ---- what is measured


def number(daemon: Any, path: str, where: str = t.HOST) -> int:
    return int(daemon.lab.run(["cat", path], where=where).check().out)


def entries(daemon: Any) -> tuple[int, int]:
    path = "/proc/sys/net/netfilter/nf_conntrack_count"
    return number(daemon, path, daemon.gateway), number(daemon, path)


def neighbours(daemon: Any) -> int:
    """Entries that the kernel learnt by itself."""
    found = 0
    for where in (daemon.gateway, t.HOST):
        for family in "46":
            listing = daemon.lab.run(["ip", f"-{family}", "neigh", "show", "nud", "all"], where=where)
            found += sum("NOARP" not in line and "PERMANENT" not in line for line in listing.out.splitlines())
    return found


def memory(daemon: Any) -> dict[str, float]:
    """MiB resident, of each process."""
    found = {}
    for name, pid in daemon.pids().items():
        status = daemon.lab.run(["cat", f"/proc/{pid}/status"]).check().out
        found[name] = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return found


def journal(daemon: Any) -> int:
    """Bytes on disk."""
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


class Bystander:
    """A neighbour that goes on with its business: each look is one connection, one question, one datagram."""

    def __init__(self, daemon: Any) -> None:
        self.resident = Resident(daemon, workspace="beta")
        self.slowest = 0.0

    def look(self) -> None:
        tried = self.resident.tries(
            ("tcp", "one.cdn.test", 7, "fine"), ("udp", "one.cdn.test", 443, "fine"),
            ("resolve", "one.cdn.test", "6"), ("tcp", "11.22.33.66", 7, "x"),
        )  # fmt: skip
        assert [o.result for o in tried] == ["ok", "ok", "ok", "ECONNREFUSED"], tried
        self.slowest = max(self.slowest, *(outcome.milliseconds for outcome in tried))

    def close(self) -> None:
        self.resident.__exit__()


def balanced(daemon: Any) -> None:
    for workspace in ("acme", "beta", "small"):
        account = inside.counters(daemon, workspace)
        assert account["balance"]["balanced"] and account["balance"]["difference"] == [0, 0], account


# ---- within the sandbox


BOMB = """
import os, sys, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""
FULL = """
import os
written = 0
try:
    with open("/tmp/full", "wb", buffering=0) as file:
        while written < 1 << 30:
            written += file.write(bytes(1 << 20))
except OSError as error:
    print(error.errno, written >> 20)
else:
    print(0, written >> 20)
"""


def test_a_fork_bomb_stays_within_its_processes_and_goes_with_its_sandbox(daemon: Any) -> None:
    bystander = Bystander(daemon)
    bomb = daemon.start_sandbox("small", ["/usr/bin/python3", "-I", "-c", BOMB])
    poll(lambda: len(daemon.lab.descendants(bomb.pid)) > 20, timeout=10, what="it goes off")
    for _ in range(3):
        bystander.look()
    assert len(daemon.lab.descendants(bomb.pid)) <= 40 + 8, "its limit, and what stands around it"
    bomb.kill()
    bomb.wait()
    poll(
        lambda: not [p for p in daemon.lab.table() if "os.fork()" in p.command],
        timeout=10,
        what="all of it is gone",
    )
    bystander.close()
    balanced(daemon)


def test_a_full_tmp_is_the_sandbox_s_own(daemon: Any) -> None:
    bystander = Bystander(daemon)
    errno, written = map(int, daemon.sandbox("small", ["/usr/bin/python3", "-c", FULL]).check().out.split())
    assert errno in (12, 28) and written < 128, "no more than its memory"
    bystander.look()
    bystander.close()
    again = daemon.sandbox(
        "small", ["/bin/sh", "-c", "ls -A /tmp | wc -l; echo x > /tmp/mine && cat /tmp/mine"]
    )
    assert again.check().out == "0\nx\n", "nothing is left of it"


# ---- over the link


class Attacker:
    """The owner of a sandbox's network, with a raw socket there."""

    def __init__(self, daemon: Any, family: int) -> None:
        self.daemon, self.family = daemon, family
        self.resident = Resident(daemon)
        (own,) = [s for s in daemon.json("status")["sandboxes"] if s["workspace"] == "acme"]
        self.me: str = own[f"address{family}"]
        self.plain = self.resident.tries(("resolve", "plain.test", str(family)))[0].data
        self.read = self.resident.tries(("resolve", "eu.api.openai.test", str(family)))[0].data
        self.resolver = "169.254.53.53" if family == 4 else "fd53:53::53"
        self.stranger = str(t.EVIL4 if family == 4 else t.EVIL6)
        self.wire: socket.socket = daemon.lab.socket(
            socket.AF_PACKET, socket.SOCK_RAW, where=daemon.namespace_of(self.resident.process)
        )
        self.wire.bind(("eth0", 0))
        self.sent = 0

    def ports(self, to: str, body: Any, count: int) -> list[bytes]:
        return from_ports(self.family, self.me, to, body, range(1024, 1024 + count))

    def one(self, to: str, body: Any, *, source: str = "") -> bytes:
        return frames(self.family, source or self.me, to, [body])[0]

    def send(self, every: list[bytes], *, meanwhile: Callable[[], None]) -> None:
        """In sixteen parts, with a look between them."""
        step = max(1, len(every) // 16)
        for start in range(0, len(every), step):
            for data in every[start : start + step]:
                self.wire.send(data)
                self.sent += 1
            if start // step % 4 == 3:
                meanwhile()

    def close(self) -> None:
        self.wire.close()
        self.resident.__exit__()


def question(name: bytes) -> UDP:
    data = b"\x77\x77\1\0\0\1\0\0\0\0\0\0" + name + b"\0\0\1\0\1"
    return UDP(sport=1, dport=53) / Raw(data)


def strange(a: Attacker, count: int) -> list[bytes]:
    """Discovery and ARP for everybody, sources that are others', fragments, tiny and huge packets."""
    ethertype, largest = (0x800, 1472) if a.family == 4 else (0x86DD, 1452)
    raw = Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC)
    made: list[bytes] = []
    for n in range(count // 8):
        made += _strange4(a, n) if a.family == 4 else _strange6(a, n)
        made.append(bytes(raw / Raw(b""))[:12] + ethertype.to_bytes(2, "big") + bytes([n & 255]) * (n % 40))
        made.append(a.one(a.plain, TCP(sport=n, dport=7, flags="A")))
        made.append(a.one(a.stranger, UDP(sport=n, dport=9) / Raw(b"x" * (n % 1400))))
        made.append(a.one(a.plain, UDP(sport=n, dport=443) / Raw(b"x" * largest)))
    return made


def _strange4(a: Attacker, n: int) -> list[bytes]:
    other = f"198.19.{n & 63}.{1 + n % 250}"
    claim = Ether(src=SANDBOX_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(op=2, psrc=other)
    fragment = IP(src=a.me, dst=a.plain, flags="MF", id=n) / Raw(b"x" * 64)
    return [
        bytes(claim),
        bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / fragment),
        a.one(a.plain, UDP(sport=n, dport=443), source=other),
        a.one(a.plain, ICMP() / Raw(b"x" * 1400)),
    ]


def _strange6(a: Attacker, n: int) -> list[bytes]:
    other = f"fd53:1::{n + 999:x}"
    return [
        a.one("fe80::53", ICMPv6ND_NA(tgt=other)),
        a.one("ff02::1:ff00:9", ICMPv6ND_NS(tgt=other)),
        a.one(a.plain, UDP(sport=n, dport=443), source=other),
        a.one(a.plain, ICMPv6EchoRequest(data=b"x" * 1400)),
    ]


def flooding(daemon: Any, family: int, count: int) -> None:
    before, grown = memory(daemon), journal(daemon)
    bystander, attacker = Bystander(daemon), Attacker(daemon, family)
    still = neighbours(daemon)
    began = time.monotonic()
    attacks = {
        "SYNs": attacker.ports(attacker.plain, TCP(sport=1, dport=7, flags="S"), count),
        "SYNs to what is read": attacker.ports(attacker.read, TCP(sport=1, dport=443, flags="S"), count),
        "datagrams": attacker.ports(attacker.plain, UDP(sport=1, dport=443) / Raw(b"x"), count),
        "questions": attacker.ports(attacker.resolver, question(b"\5plain\4test"), count),
        "questions from one port": [attacker.one(attacker.resolver, question(b"\4evil\4test"))] * count,
        "denied": [attacker.one(attacker.stranger, UDP(sport=9, dport=9) / Raw(b"x"))] * count,
        "strange": strange(attacker, count // 4),
    }
    most = (0, 0)
    for every in attacks.values():
        attacker.send(every, meanwhile=bystander.look)
        now = entries(daemon)
        most = max(most[0], now[0]), max(most[1], now[1])
    seconds = time.monotonic() - began
    assert most[0] <= ENTRIES and most[1] <= 4096 + 18_000, most
    assert neighbours(daemon) <= still
    poll(lambda: link(daemon)["in"][0] >= attacker.sent, what="everything was judged")
    found = link(daemon)
    assert found["in"] == [
        sum(part) for part in zip(found["ok"], found["denied"], found["other"], strict=True)
    ]
    balanced(daemon)
    bystander.look()
    assert bystander.slowest < 3000
    attacker.close()
    bystander.close()
    after = memory(daemon)
    assert set(after) == set(before), "nobody died"
    assert {name: after[name] for name in after if after[name] > before[name] + MEMORY} == {}, before
    # some fifteen reasons at one record a second and kind, half a KiB each; what flows there were; snapshots
    flows = 800 * (ENTRIES + 2 * count)
    assert journal(daemon) - grown < flows + 64 * 1024 * (seconds + 60), (journal(daemon), grown)


def link(daemon: Any) -> dict[str, list[int]]:
    (found,) = inside.counters(daemon)["links"]
    return found  # type: ignore[no-any-return]


FAMILIES = pytest.mark.parametrize("family", [4, 6])


@FAMILIES
def test_every_flood_in_turn(daemon: Any, family: int) -> None:
    flooding(daemon, family, 2000)


@pytest.mark.slow
@FAMILIES
def test_every_flood_for_a_while(daemon: Any, family: int) -> None:
    flooding(daemon, family, scaled(60_000, least=6000))
