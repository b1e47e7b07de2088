"""Sandboxes, gateway, host and internet, as namespaces of this process's own making.

    s1 eth0 ── eg1 ┐
                   ├ gateway  up0 ── egw  host  wan ── inet0  internet
    s2 eth0 ── eg2 ┘

Everything is made with `ip`, from the documented listing, so that these tests hold the ruleset against
a kernel without any of egressd's own netlink code. Sockets stay in the namespace they were made in: one
process plays all the parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from egressd.kernel.nft import Nft
from egressd.model.identities import Link
from egressd.policy.compiled import (
    Budgets,
    CidrRule,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Policy,
    Port,
    Protocol,
    Rule,
    Verify,
)
from egressd.ruleset import build, diff, layout, observe, plan
from egressd.ruleset.allocate import Allocation, allocate
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.observe import Counters, Tally
from egressd.ruleset.wants import NatEntry, WorkspaceWant

POOLS = Pools()
SERVER4, SERVER6 = "10.3.0.2", "2001:db8:3::2"
HOST4, HOST6 = "10.3.0.1", "2001:db8:3::1"
CLONE_NEWNET = 0x4000_0000  # linux/sched.h
IP_TRANSPARENT, IPV6_TRANSPARENT, IPV6_FREEBIND = 19, 75, 78  # linux/in.h, linux/in6.h
_libc = ctypes.CDLL(None, use_errno=True)


def tcp(number: int) -> Port:
    return Port(number, Protocol.TCP)


def udp(number: int) -> Port:
    return Port(number, Protocol.UDP)


def named(host: str, *ports: Port) -> HostRule:
    return HostRule(host=host, ports=ports, inspected=(), private=False, line=1)


def inspected(host: str, *ports: Port, plain: tuple[Port, ...] = ()) -> HostRule:
    """A host whose connections to `ports` are read, and those to `plain` are not."""
    read = tuple((port, Verify.SNI) for port in ports)
    return HostRule(host=host, ports=(*ports, *plain), inspected=read, private=False, line=1)


def policy(
    *rules: Rule, workspace: str = "acme", guard: Guard = Guard.ENFORCE, limits: Limits | None = None
) -> Policy:
    return Policy(
        workspace=workspace,
        guard=guard,
        members=(),
        residency=(),
        rules=rules,
        limits=limits or Limits(),
        wildcards=Budgets(),
        digest="sha256:0",
    )


ACME = (
    named("plain.test", tcp(80)),
    named("quic.test", udp(443)),
    named("nowhere.test", tcp(80), udp(80)),  # never resolves
    LocalRule(service="ollama", ports=(tcp(11434),), line=1),
)


def poll(condition: Callable[[], bool], *, seconds: float = 3.0) -> bool:
    """Wait for it, without sleeping longer than it takes. The last look begins after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return True
        if began > end:
            return False
        time.sleep(0.002)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a namespace; sockets made here stay there."""
    with Path("/proc/thread-self/ns/net").open() as before, Path(f"/run/netns/{namespace}").open() as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(before.fileno())


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def sh(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def batch(namespace: str, lines: Sequence[str]) -> None:
    command = ["ip", "-n", namespace, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{namespace}: {done.stderr.strip()}")


@dataclass
class Topology:
    """The namespaces, and the ruleset's wants as they are at present."""

    prefix: str
    wants: dict[str, WorkspaceWant] = field(default_factory=dict)
    links: dict[int, LinkWant] = field(default_factory=dict)
    nat: dict[tuple[int, str], NatEntry] = field(default_factory=dict)
    allocation: Allocation | None = None
    policies: dict[str, Policy] = field(default_factory=dict)
    sockets: list[socket.socket] = field(default_factory=list)

    # ---- names
    @property
    def gateway(self) -> str:
        return f"{self.prefix}-g"

    @property
    def host(self) -> str:
        return f"{self.prefix}-h"

    @property
    def internet(self) -> str:
        return f"{self.prefix}-i"

    def sandbox(self, number: int) -> str:
        return f"{self.prefix}-s{number}"

    # ---- making and unmaking
    def build(self) -> None:
        for name in (self.gateway, self.host, self.internet):
            sh(f"ip netns add {name}")
            sh(f"ip -n {name} link set lo up")
        self._sysctls()
        self._pairs()
        self._rules()
        with inside(self.gateway):
            self.nft = Nft()
        with inside(self.host):
            self.host_nft = Nft()
            self.host_nft.run(build.host(POOLS))
        self.nft.run(build.base(POOLS))

    def _pairs(self) -> None:
        gw4, gw6, up4, up6 = (
            layout.UPLINK_GATEWAY4,
            layout.UPLINK_GATEWAY6,
            layout.UPLINK_HOST4,
            layout.UPLINK_HOST6,
        )
        sh(f"ip link add up0 netns {self.gateway} address 02:53:00:00:02:01 type veth"
           f" peer name egw netns {self.host} address 02:53:00:00:02:02")  # fmt: skip
        sh(f"ip link add wan netns {self.host} address 02:53:00:00:03:01 type veth"
           f" peer name inet0 netns {self.internet} address 02:53:00:00:03:02")  # fmt: skip
        batch(self.gateway, [
            "link set up0 arp off", f"addr add {gw4}/30 dev up0", f"addr add {gw6}/64 dev up0 nodad",
            f"addr add {layout.RESOLVER4}/32 dev lo", f"addr add {layout.RESOLVER6}/128 dev lo nodad",
            "link set up0 up",
            f"neigh add {up4} lladdr 02:53:00:00:02:02 dev up0 nud permanent",
            f"neigh add {up6} lladdr 02:53:00:00:02:02 dev up0 nud permanent",
            f"route add default via {up4} table 200", f"route add default via {up6} dev up0 onlink table 200",
        ])  # fmt: skip
        batch(self.host, [
            "link set egw arp off", f"addr add {up4}/30 dev egw", f"addr add {up6}/64 dev egw nodad",
            "link set egw up",
            f"neigh add {gw4} lladdr 02:53:00:00:02:01 dev egw nud permanent",
            f"neigh add {gw6} lladdr 02:53:00:00:02:01 dev egw nud permanent",
            f"addr add {HOST4}/24 dev wan", f"addr add {HOST6}/64 dev wan nodad", "link set wan up",
            f"neigh add {SERVER4} lladdr 02:53:00:00:03:02 dev wan nud permanent",
            f"neigh add {SERVER6} lladdr 02:53:00:00:03:02 dev wan nud permanent",
            f"route add default via {SERVER4}", f"route add default via {SERVER6} dev wan",
        ])  # fmt: skip
        batch(self.internet, [
            f"addr add {SERVER4}/24 dev inet0", f"addr add {SERVER6}/64 dev inet0 nodad", "link set inet0 up",
            f"neigh add {HOST4} lladdr 02:53:00:00:03:01 dev inet0 nud permanent",
            f"neigh add {HOST6} lladdr 02:53:00:00:03:01 dev inet0 nud permanent",
        ])  # fmt: skip

    def _sysctls(self) -> None:
        self.sysctl(self.gateway, {
            "net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1,
            "net/ipv4/ip_early_demux": 0, "net/ipv4/tcp_early_demux": 0, "net/ipv4/udp_early_demux": 0,
            "net/netfilter/nf_conntrack_tcp_loose": 0,
            "net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/default/rp_filter": 0,
            "net/ipv4/conf/all/accept_source_route": 0, "net/ipv4/conf/all/send_redirects": 0,
            "net/ipv6/conf/default/accept_ra": 0, "net/ipv6/conf/default/addr_gen_mode": 1,
            "net/ipv6/conf/default/accept_dad": 0, "net/ipv6/conf/default/dad_transmits": 0,
        })  # fmt: skip
        self.sysctl(self.host, {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
        for quiet in (self.host, self.internet):  # no link-local address, no duplicate address detection
            self.sysctl(quiet, {"net/ipv6/conf/default/addr_gen_mode": 1,
                                "net/ipv6/conf/default/accept_dad": 0})  # fmt: skip

    def sysctl(self, namespace: str, values: dict[str, object]) -> None:
        with inside(namespace):
            for name, value in values.items():
                Path("/proc/sys", name).write_text(str(value))

    def _rules(self) -> None:
        for family in ("-4", "-6"):
            sh(f"ip -n {self.gateway} {family} rule flush")
            with contextlib.suppress(RuntimeError):
                sh(f"ip -n {self.gateway} {family} rule del pref 0")
            for line in (
                "pref 10 fwmark 0x40000000/0x40000000 iif up0 prohibit",
                "pref 11 fwmark 0x40000000/0x40000000 lookup 100",
                "pref 12 fwmark 0x20000000/0x20000000 lookup local",
                "pref 13 fwmark 0x80000000/0x80000000 lookup 200",
                f"pref 14 from {layout.DIAL4 if family == '-4' else layout.DIAL6} iif lo lookup 101",
                f"pref 15 from {layout.DIAL4 if family == '-4' else layout.DIAL6} iif lo prohibit",
                "pref 20 iif lo lookup local",
                "pref 21 iif lo lookup main",
                "pref 22 iif up0 lookup local",
                "pref 23 iif up0 lookup main",
                "pref 32767 prohibit",
            ):
                sh(f"ip -n {self.gateway} {family} rule add {line}")
            sh(f"ip -n {self.gateway} {family} route add local default dev lo table 100")
            dial, pool = (
                (layout.DIAL4, POOLS.synthetic4) if family == "-4" else (layout.DIAL6, POOLS.synthetic6)
            )
            sh(f"ip -n {self.gateway} {family} route add local {dial} dev lo table local")
            sh(f"ip -n {self.gateway} {family} route add local {pool} dev lo mtu 1500 table 101")

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        for name in sh("ip netns list").split():
            if name.startswith(f"{self.prefix}-"):
                sh(f"ip netns del {name}")

    # ---- what is wanted
    def apply(self, *policies: Policy) -> None:
        """These are the policies now: the fast path, as the warden takes it."""
        self.policies = {p.workspace: p for p in policies}
        self.allocation = allocate(policies, self.allocation)
        after = {p.workspace: plan.want(p, self.allocation, POOLS) for p in policies}
        operations: list[diff.Operation] = []
        for name in sorted({*self.wants, *after}):
            links = [lease for lease in self.links.values() if lease.workspace == name]
            operations += diff.changes(self.wants.get(name), after.get(name), pools=POOLS, links=links)
        self.nft.run(diff.commands(operations))
        self.wants = after

    def resolve(self, host: str, *addresses: str, workspace: str = "acme") -> None:
        """The name leads to these addresses, all four slots of a family filled."""
        elements = [e for e in self.wants[workspace].elements if e.comment == host]
        marks = {m for e in elements for m in build.marks(e) if Mark.of(m).kind is Kind.FORWARD}
        entries = []
        for mark in sorted(marks):
            for family in (0, 1):
                real = [a for a in addresses if ip_address(a).version == (4, 6)[family]]
                for slot in range(layout.SLOTS):
                    synthetic = str(POOLS.synthetic(self.block(host, workspace), slot)[family])
                    target = real[slot % len(real)] if real else None
                    entries.append(NatEntry(mark, synthetic, target, host))
        current = {key: entry.real for key, entry in self.nat.items() if entry.real is not None}
        self.nft.run(build.nat(entries, current))
        for entry in entries:
            self.nat[entry.mark, entry.synthetic] = entry
        self.nat = {key: entry for key, entry in self.nat.items() if entry.real is not None}

    def block(self, host: str, workspace: str = "acme") -> int:
        assert self.allocation is not None
        return self.allocation.blocks[workspace][host]

    def mark(self, host: str, workspace: str = "acme") -> int:
        return next(e.mark for e in self.wants[workspace].elements if e.comment == host)

    def address(self, host: str, family: int = 4, slot: int = 0, workspace: str = "acme") -> str:
        return str(POOLS.synthetic(self.block(host, workspace), slot)[family == 6])

    def connect(
        self,
        number: int,
        workspace: str = "acme",
        *,
        quota: int | None = None,
        connections: int | None = None,
        closed: bool = False,
    ) -> None:
        """A sandbox with its link: chain first."""
        name, link = self.sandbox(number), Link(number)
        lease = LinkWant(link, workspace, quota=quota, connections=connections, closed=closed)
        self.nft.run(build.link(lease, self.wants[workspace], POOLS))
        self.links[number] = lease
        sh(f"ip netns add {name}")
        sh(f"ip link add eth0 netns {name} address {layout.SANDBOX_MAC} type veth"
           f" peer name {link.device} netns {self.gateway} address {layout.GATEWAY_MAC}")  # fmt: skip
        self.sysctl(name, {"net/ipv6/conf/eth0/addr_gen_mode": 1, "net/ipv6/conf/eth0/accept_ra": 0,
                           "net/ipv6/conf/eth0/dad_transmits": 0,
                           "net/ipv4/igmp_link_local_mcast_reports": 0})  # fmt: skip
        self._plumb(name, link)

    def _plumb(self, name: str, link: Link) -> None:
        four, six = POOLS.sandbox(link)
        mac = layout.SANDBOX_MAC
        batch(self.gateway, [
            f"link set {link.device} arp off group {layout.LINK_GROUP}", f"link set {link.device} up",
            f"neigh add {four} lladdr {mac} dev {link.device} nud permanent",
            f"neigh add {six} lladdr {mac} dev {link.device} nud permanent",
            f"route add {four} dev {link.device}", f"route add {six} dev {link.device}",
        ])  # fmt: skip
        hop4, hop6, gateway = layout.NEXT_HOP4, layout.NEXT_HOP6, layout.GATEWAY_MAC
        batch(name, [
            "link set lo up", "link set eth0 arp off",
            f"addr add {four}/32 dev eth0", f"addr add {six}/128 dev eth0 nodad", "link set eth0 up",
            f"neigh add {hop4} lladdr {gateway} dev eth0 nud permanent",
            f"neigh add {hop6} lladdr {gateway} dev eth0 nud permanent",
            f"route add {hop4} dev eth0", f"route add default via {hop4} src {four}",
            f"route add default via {hop6} dev eth0 src {six}",
        ])  # fmt: skip
        # Until a worker of the kernel's (linkwatch) has been there, what is sent over it is lost.
        assert poll(lambda: "state UP" in sh(f"ip -n {self.gateway} link show {link.device}"), seconds=10)

    def disconnect(self, number: int) -> None:
        lease = self.links.pop(number)
        with contextlib.suppress(RuntimeError):
            sh(f"ip -n {self.gateway} link del {lease.link.device}")
        self.nft.run(build.unlink(lease.link))
        sh(f"ip netns del {self.sandbox(number)}")

    # ---- looking
    def counters(self) -> Counters:
        return observe.counters(self.nft.list_json())

    def observed(self) -> observe.Observed:
        return observe.parse(self.nft.list_json(), self.nft.list_chains())

    def wanted(self) -> Desired:
        return Desired(pools=POOLS, wants=self.wants, links=tuple(self.links.values()), nat=self.nat)

    def settled(self, number: int, packets: int) -> Counters:
        """The counters once the link has seen that many packets."""
        device = f"eg{number}"
        assert poll(lambda: self.counters().links[device].in_.packets >= packets), self.counters()
        return self.counters()

    # ---- sockets
    def plug(self, namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        with inside(namespace):
            sock = socket.socket(family, kind, protocol)
        self.sockets.append(sock)
        return sock

    def raw(self, namespace: str, device: str, *, protocol: int = 3) -> socket.socket:
        """Frames out, and in (ETH_P_ALL)."""
        sock = self.plug(namespace, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        sock.bind((device, protocol))
        sock.setblocking(False)
        return sock

    def server(self, namespace: str, address: str, port: int, *, transparent: bool = False) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.plug(namespace, family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if transparent and family == socket.AF_INET:
            sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        elif transparent:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        sock.bind((address, port))
        sock.listen(64)
        sock.settimeout(3)
        return sock

    def client(self, number: int, address: str, port: int, *, seconds: float = 2.0) -> socket.socket:
        """A TCP connection from a sandbox; what connect raises is the verdict."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.plug(self.sandbox(number), family, socket.SOCK_STREAM)
        sock.settimeout(seconds)
        sock.connect((address, port))
        return sock

    def dialling(self, source: str, *, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the gateway, bound as the inspector binds its own. IPv6 asks for IPV6_FREEBIND, which
        needs no right: its bind(2) looks for configured addresses only (ipv6_chk_addr)."""
        six = ":" in source
        sock = self.plug(self.gateway, socket.AF_INET6 if six else socket.AF_INET, kind)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        sock.settimeout(2)
        sock.bind((source, 0))
        return sock

    def dialled(self, source: str, address: str, port: int) -> tuple[str, float]:
        """("ok" or the error's name, milliseconds) of one attempt."""
        with self.dialling(source) as sock:
            return attempt(sock, address, port)

    def source(self, family: int, workspace: str = "acme") -> str:
        return str(layout.dial_source(self.wants[workspace].index)[family == 6])

    def timed(
        self, number: int, address: str, port: int, *, kind: int = socket.SOCK_STREAM, seconds: float = 2
    ) -> tuple[str, float]:
        """("ok" or the error's name, milliseconds) of one attempt."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.plug(self.sandbox(number), family, kind)
        sock.settimeout(seconds)
        start = time.perf_counter()
        try:
            sock.connect((address, port))
            if kind == socket.SOCK_DGRAM:
                sock.send(b"x")
                sock.recv(100)
            outcome = "ok"
        except TimeoutError:
            outcome = "timeout"
        except OSError as error:
            outcome = type(error).__name__ if type(error) is not OSError else str(error.strerror)
        elapsed = (time.perf_counter() - start) * 1000
        sock.close()
        return outcome, elapsed


def attempt(sock: socket.socket, address: str, port: int) -> tuple[str, float]:
    """("ok" or the error's name, milliseconds) of connect(2)."""
    start = time.perf_counter()
    try:
        sock.connect((address, port))
        outcome = "ok"
    except TimeoutError:
        outcome = "timeout"
    except OSError as error:
        outcome = type(error).__name__ if type(error) is not OSError else str(error.strerror)
    return outcome, (time.perf_counter() - start) * 1000


def frames(sock: socket.socket) -> list[bytes]:
    """Everything that has arrived at a raw socket, but for the host's own multicast reports (MLDv2)."""
    seen = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, address = sock.recvfrom(65536)
            if address[2] != socket.PACKET_OUTGOING and data[:6] != b"\x33\x33\0\0\0\x16":
                seen.append(data)
    return seen


def echo(listener: socket.socket) -> None:
    """Serve a listener in a thread: send back what comes. Ends when the listener is closed."""

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(5)
            while data := sock.recv(65536):
                sock.sendall(data)

    def accept() -> None:
        listener.settimeout(0.2)
        while listener.fileno() >= 0:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def total(counters: Counters, workspace: str = "acme") -> Tally:
    """What the workspace's elements have admitted."""
    found = Tally()
    for element in counters.elements:
        if element.workspace == workspace:
            found += Tally(element.packets, element.bytes)
    return found


@contextlib.contextmanager
def topology(name: str) -> Iterator[Topology]:
    made = Topology(prefix=f"kn-{name}{os.getpid()}")
    try:
        made.build()
        yield made
    finally:
        made.close()


__all__ = [
    "ACME", "HOST4", "HOST6", "POOLS", "SERVER4", "SERVER6", "CidrRule", "Guard", "Limits", "Topology",
    "attempt", "echo", "frames", "inside", "inspected", "named", "policy", "poll", "sh", "tcp",
    "topology", "total", "udp",
]  # fmt: skip
