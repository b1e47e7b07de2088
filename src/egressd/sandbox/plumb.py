"""The inside of a sandbox's network, laid by the caller without any privilege of its own.

The creator of a user namespace holds every capability over it (user_namespaces(7)), and the sandbox's
network namespace belongs to one that bubblewrap made for the caller. So a forked child enters both and
speaks netlink there. It must be a fork: setns(CLONE_NEWUSER) is refused to a process with threads, and
nobody comes back from it. Where the daemon says that attempts are of interest, it stays as long as the
sandbox, and says which process tried what (attempts.py).

The child (`Plumber`) is forked before bubblewrap is started, because it has a second duty: while a sandbox
is being built it is the one who outlives the broker. bubblewrap's --die-with-parent has two gaps, both seen:

- Between clone() and its first word to the clone, the outer process can be killed by the broker's death
  while the inner one waits, with no death signal of its own yet, for that word: for ever.
- Until the inner process has forked the gate it has no death signal either. A "go" that lies in the pipe
  by then is read by a gate whose broker is dead.

So until the broker says `release`, the end of its socket makes the plumber kill whoever holds the gate's
pipe, and the sandbox's first process. It has a process group of its own, out of reach of a killed group.

The netlink messages are written with `struct`: pyroute2 costs 60 ms to import, as long as all of
`egressctl run`. The translation rules are nft syntax given to libnftables, whose loading costs 1 ms, and
only where the workspace has a local service at all.

Nothing in here is a security property. If it is wrong, the sandbox reaches less.

Order that matters:
- `arp off` comes before the addresses and before the link is up: otherwise the kernel resolves and announces.
- `lo` is bubblewrap's: it adds 127.0.0.1/8 itself and dies of EEXIST if the kernel did so first, which
  happens as soon as anybody else brings `lo` up.
- 127.0.0.1 is translated in the output hook; the packet then leaves by eth0 with the loopback's source, which
  routing refuses (EINVAL in __mkroute_output) unless eth0 has route_localnet, and which is masqueraded after.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH115, PTH123, PTH208
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from egressd.model.errors import KernelError
from egressd.ruleset import layout
from egressd.sandbox import queueing
from egressd.sandbox.attempts import Reports, Witness
from egressd.sandbox.plan import ABOVE, GATE

__all__ = ["DEVICE", "Address", "Plumber", "Service", "batch", "enter", "translation"]

DEVICE = "eth0"
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_NS_GET_USERNS = 0xB701  # linux/nsfs.h: _IO(0xb7, 1)
_PATIENCE = 10.0  # seconds for the plumber's work
_QUIET = 5  # looks that must find nobody before a sandbox counts as buried
_DONE, _WATCHING, _RELEASED = "done", "watching", b"released"
_FAILED = "the sandbox's network could not be laid"

# Written through /proc/sys/net, which shows the namespace of whoever opens it. Not written, because a new
# namespace has it so already and a group that is not mapped here cannot be named (EINVAL):
# ping_group_range "1 0", no group may open ICMP sockets.
_SYSCTLS = (
    ("ipv6/conf/eth0/accept_ra", "0"),  # nobody advertises here
    ("ipv6/conf/eth0/router_solicitations", "0"),
    ("ipv6/conf/eth0/dad_transmits", "0"),
    ("ipv4/igmp_link_local_mcast_reports", "0"),
)


@dataclass(frozen=True, slots=True)
class Address:
    """The sandbox's own addresses, from the lease."""

    v4: IPv4Address
    v6: IPv6Address


@dataclass(frozen=True, slots=True)
class Service:
    """A port of the sandbox's loopback and where it really leads."""

    port: int
    v4: IPv4Address
    v6: IPv6Address


# --------------------------------------------------------------------------------------------------
# netlink, as far as it is needed (linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h)

_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_NEWNEIGH = 16, 18, 20, 24, 28
_NLMSG_ERROR = 2
_IFF_UP, _IFF_NOARP = 0x1, 0x80
_IFLA_AF_SPEC, _IFLA_INET_CONF, _IFLA_INET6_ADDR_GEN_MODE = 26, 1, 8
_IFLA_OPERSTATE, _IF_OPER_UP = 16, 6  # linux/if.h
_ADDR_GEN_MODE_NONE, _ROUTE_LOCALNET = 1, 26  # IPV4_DEVCONF_ROUTE_LOCALNET, linux/ip.h
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_F_NODAD = 1, 2, 8, 0x02
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RT_TABLE_MAIN, _RT_TABLE_LOCAL, _RT_SCOPE_UNIVERSE, _RTNH_F_ONLINK = 254, 255, 0, 4
_RTPROT_STATIC, _RTN_UNICAST, _RTN_LOCAL = 4, 1, 2


def _attribute(kind: int, value: bytes) -> bytes:
    """struct rtattr: length and type, then the value, padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _message(kind: int, body: bytes, *, number: int) -> bytes:
    """struct nlmsghdr and the body; `number` comes back in the acknowledgement."""
    flags = _NLM_F_REQUEST | _NLM_F_ACK
    if kind != _RTM_NEWLINK:
        flags |= _NLM_F_CREATE | _NLM_F_REPLACE
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def _link(index: int, flags: int, attributes: bytes = b"") -> bytes:
    """struct ifinfomsg; the last field says which flags are meant."""
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags) + attributes


def _quiet(*, localnet: bool) -> bytes:
    """IFLA_AF_SPEC: no link-local address is made, and 127.0.0.1 may be a source here."""
    inet6 = _attribute(socket.AF_INET6, _attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_ADDR_GEN_MODE_NONE])))
    inet = b""
    if localnet:
        inet = _attribute(socket.AF_INET, _attribute(_IFLA_INET_CONF, _number(_ROUTE_LOCALNET, 1)))
    return _attribute(_IFLA_AF_SPEC, inet + inet6)


def _address(index: int, own: IPv4Address | IPv6Address) -> bytes:
    family = socket.AF_INET if own.version == 4 else socket.AF_INET6
    header = struct.pack("=BBBBi", family, own.max_prefixlen, 0, _RT_SCOPE_UNIVERSE, index)
    attributes = _attribute(_IFA_LOCAL, own.packed) + _attribute(_IFA_ADDRESS, own.packed)
    return header + attributes + _number(_IFA_FLAGS, _IFA_F_NODAD)


def _neighbour(index: int, hop: IPv4Address | IPv6Address) -> bytes:
    family = socket.AF_INET if hop.version == 4 else socket.AF_INET6
    mac = bytes.fromhex(layout.GATEWAY_MAC.replace(":", ""))
    header = struct.pack("=BxxxiHBB", family, index, _NUD_PERMANENT, 0, 0)
    return header + _attribute(_NDA_DST, hop.packed) + _attribute(_NDA_LLADDR, mac)


def _route(index: int, own: IPv4Address | IPv6Address, hop: IPv4Address | IPv6Address) -> bytes:
    """The default route, by a hop that lies on no network of ours: onlink."""
    family = socket.AF_INET if own.version == 4 else socket.AF_INET6
    header = struct.pack(
        "=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST,
        _RTNH_F_ONLINK,
    )  # fmt: skip
    attributes = _number(_RTA_OIF, index) + _attribute(_RTA_GATEWAY, hop.packed)
    return header + attributes + _attribute(_RTA_PREFSRC, own.packed)


def _loopback_route(index: int) -> bytes:
    """::1 is local on eth0 too: an answer translated back to ::1 is looked up with its device fixed
    (rt6_need_strict), and there is no route_localnet for IPv6. Last in line, so that lo keeps its own."""
    header = struct.pack(
        "=BBBBBBBBI", socket.AF_INET6, 128, 0, 0, _RT_TABLE_LOCAL, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE,
        _RTN_LOCAL, 0,
    )  # fmt: skip
    loopback = IPv6Address("::1").packed
    return header + _attribute(_RTA_DST, loopback) + _number(_RTA_OIF, index) + _number(_RTA_PRIORITY, 9999)


def batch(index: int, address: Address, *, localnet: bool) -> tuple[bytes, tuple[str, ...]]:
    """All of eth0 in one datagram, and what each message in it does, for the error."""
    hop4, hop6 = layout.NEXT_HOP4, layout.NEXT_HOP6
    steps: tuple[tuple[str, int, bytes], ...] = (
        ("arp off", _RTM_NEWLINK, _link(index, _IFF_NOARP, _quiet(localnet=localnet))),
        ("IPv4 address", _RTM_NEWADDR, _address(index, address.v4)),
        ("IPv6 address", _RTM_NEWADDR, _address(index, address.v6)),
        ("link up", _RTM_NEWLINK, _link(index, _IFF_UP)),
        ("IPv4 neighbour", _RTM_NEWNEIGH, _neighbour(index, hop4)),
        ("IPv6 neighbour", _RTM_NEWNEIGH, _neighbour(index, hop6)),
        ("IPv4 route", _RTM_NEWROUTE, _route(index, address.v4, hop4)),
        ("IPv6 route", _RTM_NEWROUTE, _route(index, address.v6, hop6)),
    )
    if localnet:
        steps = (*steps, ("IPv6 loopback route", _RTM_NEWROUTE, _loopback_route(index)))
    messages = [_message(kind, body, number=n) for n, (_, kind, body) in enumerate(steps)]
    return b"".join(messages), tuple(name for name, _, _ in steps)


def _send(data: bytes, names: tuple[str, ...]) -> None:
    """One datagram out, one acknowledgement per message back; the kernel works them off in order."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(5)
        netlink.send(data)
        waiting = len(names)
        while waiting:
            answer = netlink.recv(1 << 16)
            while len(answer) >= 16:
                length, kind, _, number, _ = struct.unpack_from("=IHHII", answer)
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", answer, 16)
                    if code:
                        raise OSError(-code, os.strerror(-code), names[number])
                    waiting -= 1
                answer = answer[(length + 3) & ~3 :]


def _await_carrier(index: int, channel: socket.socket) -> bool:
    """Until both ends of the pair really pass packets. The kernel brings a veth's queues to life from a
    worker (linkwatch) after the "up" was acknowledged; what the gateway answers before that is lost, and a
    refused connect would be felt only when TCP tries again, a second later. Mostly 0.1 ms, at most 12.

    False as soon as the channel has something to say. The broker is silent until it hears "done", so that is
    its end; the daemon then takes the link away, which will never come to life. OSError when that happens
    while the broker lives, or nothing at all happens.
    """
    deadline = time.monotonic() + _PATIENCE / 2
    question = struct.pack("=IHHII", 32, _RTM_GETLINK, _NLM_F_REQUEST, 0, 0) + _link(index, 0)
    broker = select.poll()
    broker.register(channel, select.POLLIN)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.settimeout(5)
        while not broker.poll(0):
            netlink.send(question)
            if _operational(netlink.recv(1 << 16)):
                return True
            if time.monotonic() > deadline:
                raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN), DEVICE)
            time.sleep(0.0001)
    return False


def _operational(answer: bytes) -> bool:
    """IFLA_OPERSTATE of an RTM_NEWLINK: after struct nlmsghdr and struct ifinfomsg. OSError for a refusal:
    the link is gone (ENODEV)."""
    if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, 16)[0]
        raise OSError(code, os.strerror(code), DEVICE)
    at = 16 + 16
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _IFLA_OPERSTATE:
            return answer[at + 4] == _IF_OPER_UP
        at += max(4, (length + 3) & ~3)
    return False


# --------------------------------------------------------------------------------------------------
# the loopback's translation


def translation(services: Iterable[Service]) -> str:
    """nft syntax: 127.0.0.1:PORT and [::1]:PORT lead to the service, with the sandbox's own source."""
    rules = []
    for service in services:
        rules += [
            f"ip daddr 127.0.0.1 tcp dport {int(service.port)} dnat ip to {IPv4Address(service.v4)}",
            f"ip6 daddr ::1 tcp dport {int(service.port)} dnat ip6 to {IPv6Address(service.v6)}",
        ]
    if not rules:
        return ""
    body = "\n".join(f"    {rule}" for rule in rules)
    return f"""table inet egressd {{
  chain out {{
    type nat hook output priority -100; policy accept;
{body}
  }}
  chain leave {{
    type nat hook postrouting priority 100; policy accept;
    oifname "{DEVICE}" ip saddr 127.0.0.1 masquerade
    oifname "{DEVICE}" ip6 saddr ::1 masquerade
  }}
}}
"""


class _Nft:
    """Just enough of libnftables (nftables/libnftables.h) to run one text."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libnftables.so.1")
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        self._lib.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
        self._lib.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
        self._lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._context = self._lib.nft_ctx_new(0)

    def run(self, text: str) -> None:
        self._lib.nft_ctx_buffer_error(self._context)
        if self._lib.nft_run_cmd_from_buffer(self._context, text.encode()):
            problem = self._lib.nft_ctx_get_error_buffer(self._context) or b""
            raise OSError(errno.EINVAL, problem.decode(errors="replace").strip()[:500])


# --------------------------------------------------------------------------------------------------
# the child


class Plumber:
    """A forked child that lays the sandbox's network, and buries the sandbox if the broker dies first.

    `with Plumber(gate=..., close=...) as plumber:` before bubblewrap starts; then `enter`, `lay`, and, once
    the gate is open, `release`. Leaving the block without it kills what is left of the sandbox.
    """

    def __init__(self, *, gate: int, close: Iterable[int]) -> None:
        """`gate` is the reading end of the gate's pipe, by which its holders are known; `close` are
        descriptors the child must not keep: the gate's writing end, above all."""
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Out of the way of the places that a sandbox's descriptors are given (plan.py). The broker may be
        # killed while posix_spawn's child is on its way to exec. That child holds our end too: were it
        # overwritten there, the plumber would look for a bubblewrap that does not exist yet, and go home.
        with ours:
            self._socket = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, ABOVE))
        self._socket.settimeout(_PATIENCE)
        self._pid = os.fork()
        if self._pid == 0:
            self._child(os.readlink(f"/proc/self/fd/{gate}"), other, (gate, *close))  # never returns
        other.close()
        self.trouble = ""  # why nobody will say who tried, if somebody was to
        self._witness = False

    def enter(
        self,
        namespace: int,
        *,
        child: int,
        first: int,
        services: Iterable[Service],
        known: Sequence[str] | None = None,
    ) -> None:
        """`child` is a pidfd of the sandbox's first process, `first` its number. Does not wait. Unless None,
        `known` are networks: of who tries to reach any other the plumber will tell, see `release`."""
        wanted = "" if known is None else " ".join([str(first), *known])
        self._tell(f"{wanted}\n{translation(services)}".encode(), descriptors=[namespace, child])

    def lay(self, address: Address) -> None:
        """Configure eth0, and wait until it is. KernelError naming the step that failed."""
        self._tell(f"{address.v4} {address.v6}".encode())
        try:
            answer = self._socket.recv(1 << 14)
        except OSError as error:
            raise KernelError(f"{_FAILED}: {error}") from error
        done, _, self.trouble = answer.decode(errors="replace").partition(" ")
        if done not in (_DONE, _WATCHING):
            problem = answer.decode(errors="replace") or "the plumber ended without a word"
            raise KernelError(f"{_FAILED}: {problem}")
        self._witness = done == _WATCHING

    def release(self) -> Reports | None:
        """From here on bubblewrap's own death signals hold. If so it was wished, the plumber stays to see who
        tries what; the caller has to close what is returned."""
        self._tell(_RELEASED)
        if not self._witness:
            self._end()
            return None
        reports, self._pid = Reports(self._socket.dup(), self._pid), 0
        self._socket.close()
        return reports

    def _tell(self, data: bytes, *, descriptors: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._socket, [data], list(descriptors), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise KernelError(f"{_FAILED}: the plumber is gone ({error.strerror})") from error

    def __enter__(self) -> Plumber:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._socket.close()
        if self._pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0

    def _child(self, gate: str, channel: socket.socket, close: Iterable[int]) -> None:
        sandbox: list[int] = []
        witness: list[Witness] = []
        status = 1
        try:
            os.setpgid(0, 0)
            self._socket.close()  # or we would keep our own end of file away
            for descriptor in close:
                os.close(descriptor)
            try:
                _work(channel, sandbox, witness)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                channel.send(f"{where}{error.strerror or error}".encode())
            if channel.recv(64) == _RELEASED:
                status = 0
                for each in witness:
                    each.serve(channel)
        finally:
            if status:
                _bury(gate, sandbox)
            os._exit(status)


def _work(channel: socket.socket, sandbox: list[int], witness: list[Witness]) -> None:
    """Puts the pidfd into `sandbox` as soon as it is there, and into `witness` who will look at attempts, if
    anybody; returns early at the end of the channel."""
    text, descriptors, _, _ = socket.recv_fds(channel, 1 << 17, 2)
    if not descriptors:
        return
    namespace, child = descriptors
    sandbox.append(child)
    enter(namespace)
    known, _, rules = text.decode().partition("\n")
    if rules:
        _Nft().run(rules)
    trouble = _heed(known, witness)
    request = channel.recv(4096)
    if not request:
        return  # there will be no lease
    v4, v6 = request.decode().split()
    address = Address(IPv4Address(v4), IPv6Address(v6))
    index = _index()
    data, names = batch(index, address, localnet=bool(rules))
    for name, value in _SYSCTLS:
        _write_sysctl(name, value)
    _send(data, names)
    if _await_carrier(index, channel):
        channel.send(f"{_WATCHING if witness else _DONE} {trouble[:512]}".encode())


def _heed(known: str, witness: list[Witness]) -> str:
    """Why there is no witness, though one was wished: a sandbox can do without."""
    if not known:
        return ""
    first, *networks = known.split()
    try:
        queue, asking = queueing.open_sockets(networks)
    except (OSError, ValueError) as error:
        return f"nobody will say which process tried what is refused: {error}"
    witness.append(Witness(queue=queue, asking=asking, first=int(first)))
    return ""


def _bury(gate: str, sandbox: Sequence[int]) -> None:
    """Kill the sandbox's first process, and whoever has the gate's pipe where the gate has it. The broker's
    own end lies elsewhere, and its name is not bwrap.

    Until nobody was found several times in a row: the listing of /proc is older than the kill it leads to,
    and bubblewrap may have cloned its inner half in between, which would wait for a dead parent for ever;
    nor has a process its name yet in the moment in which exec closes the descriptors that woke us.
    """
    end, quiet = time.monotonic() + _PATIENCE, 0
    while quiet < _QUIET and time.monotonic() < end:
        for child in sandbox:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(child, signal.SIGKILL)
        found = [int(name) for name in os.listdir("/proc") if name.isdigit() and _holds(name, gate)]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(0.004)


def _holds(pid: str, gate: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as stream:
        if stream.read() in (b"bwrap\n", b"sh\n"):
            return os.readlink(f"/proc/{pid}/fd/{GATE}") == gate
    return False


def _index() -> int:
    try:
        return socket.if_nametoindex(DEVICE)
    except OSError as error:
        raise OSError(errno.ENODEV, "the daemon made no such link", DEVICE) from error


def enter(namespace: int) -> None:
    """The owning user namespace first: only there do we have the right to enter the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    for descriptor, kind, name in ((owner, _CLONE_NEWUSER, "user"), (namespace, _CLONE_NEWNET, "network")):
        if libc.setns(descriptor, kind):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"entering the sandbox's {name} namespace")
    os.close(owner)


def _write_sysctl(name: str, value: str) -> None:
    descriptor = os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error
    finally:
        os.close(descriptor)
