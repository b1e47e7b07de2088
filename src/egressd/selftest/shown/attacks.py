"""Ways out of a sandbox, each a small function that tries one and says what came of it.

This file runs inside the sandbox, where nothing of egressd is but this directory: the standard library alone.
It trusts nothing and decides nothing. The judge (`selftest.judge`) imports the same table outside, tells it
which row to try, and compares what is said here with what the kernel counted at the link.

Nothing here does harm where it succeeds. Destinations are addresses of documentation (RFC 5737, RFC 3849)
wherever the kind of address is not itself the point; a connection that comes about is closed at once; system
calls have arguments that no kernel accepts (a reboot without its magic numbers, a module of no bytes), so
that without a filter they fail too, but otherwise; what is opened for writing is not written to.
"""

# pathlib costs more to import than most attacks take
# ruff: noqa: PTH101, PTH108, PTH112, PTH116, PTH123, PTH208, S103, S104, S108
from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["ATTACKS", "COUNTED", "NEEDS", "Attack", "attempt", "hello", "question"]

WAIT = 0.15  # seconds for an answer: what is refused is refused within one
_QUIET = 0.02  # the same where silence is what must happen: only stragglers are waited for

# What must have been counted at the link.
DENIED = "denied"  # at least one frame, and every one was refused
ADMITTED = "admitted"  # to egressd's own resolver or inspector, which refuses by answering
NOTHING = "nothing"  # no frame
EITHER = "nothing or denied"  # the sandbox's own kernel may stop it before the link
COUNTED = (DENIED, ADMITTED, NOTHING, EITHER)

Facts = Mapping[str, Any]  # what the judge knows of the machine: see judge.Facts


class Attack(NamedTuple):
    group: str
    name: str
    family: str  # "v4", "v6", or "-"
    must: tuple[str, ...]  # names of errors, or words; one of them must be what happened
    counted: str
    run: Callable[[Facts], str]
    needs: tuple[str, ...] = ()  # facts without which it cannot be tried
    target: str = ""  # a fixed address, which a policy might allow
    kernel: str = ""  # what the kernel must have, as `judge.kernel_has` knows it


# Why an attack that needs something cannot be tried without.
NEEDS: Mapping[str, str] = {
    "own6": "IPv6 is off",
    "host4": "this machine has no IPv4 address but the loopback's",
    "host6": "this machine has no IPv6 address but the loopback's",
    "listed": "the policy lists no host that has an address now",
    "listed6": "the policy lists no host that has an IPv6 address now",
    "tls": "the policy lists no host whose TLS is read and that has an address now",
    "x86_64": "only on x86_64",
}

RAW4, RAW6 = "192.0.2.1", "2001:db8::1"
RESOLVER4, RESOLVER6 = "169.254.53.53", "fd53:53::53"
UNLISTED = "selftest.egressd.example"  # RFC 2606: nobody lists it, and nobody has it
ATTACKS: list[Attack] = []

_REFUSED = ("ECONNREFUSED",)
_UNREACHABLE = ("ECONNREFUSED", "ENETUNREACH", "EHOSTUNREACH", "EINVAL", "EACCES", "EADDRNOTAVAIL", "silence")
_NO_FAMILY = ("EAFNOSUPPORT",)
_NO_PROTOCOL = ("EPROTONOSUPPORT",)
_NOT_PERMITTED = ("EPERM",)
_NOT_THERE = ("ENOENT",)


def _add(
    group: str,
    name: str,
    must: tuple[str, ...],
    counted: str,
    run: Callable[[Facts], str],
    *,
    family: str = "-",
    needs: tuple[str, ...] = (),
    target: str = "",
    kernel: str = "",
) -> None:
    if family == "v6":
        needs = ("own6", *needs)
    ATTACKS.append(Attack(group, name, family, must, counted, run, needs, target, kernel))


def _do(run: Callable[..., str], *arguments: Any) -> Callable[[Facts], str]:
    """For what needs to know nothing."""
    return lambda _: run(*arguments)


def _with(run: Callable[..., str], *arguments: Any) -> Callable[[Facts], str]:
    return lambda facts: run(facts, *arguments)


# --------------------------------------------------------------------------------------------------
# how to try


def attempt(attack: Attack, facts: Facts) -> str:
    """What happened, as one word. Never raises."""
    try:
        return attack.run(facts)
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except Exception as error:
        return f"failed: {type(error).__name__}"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _tcp(address: str, port: int, data: bytes = b"") -> str:
    with socket.socket(_family(address), socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT)
        sock.connect((address, port))
        if not data:
            return "connected"
        sock.sendall(data)
        return "answered" if sock.recv(4096) else "closed"


def _udp(address: str, port: int, data: bytes = b"selftest", *, wait: float = WAIT) -> str:
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.settimeout(wait)
        sock.connect((address, port))
        sock.send(data)
        sock.recv(4096)
        return "answered"


def _socket(family: int, kind: int, protocol: int = 0) -> str:
    """Made and closed; never connected."""
    socket.socket(family, kind, protocol).close()
    return "made"


def _open(path: str, flags: int = os.O_RDONLY) -> str:
    os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))
    return "opened"


def _connect_path(path: str) -> str:
    said = ""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.settimeout(WAIT)
            try:
                sock.connect(path)
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    said = errno.errorcode.get(error.errno or 0, "failed")
                continue
            return "connected"
    return said


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_X86 = platform.machine() == "x86_64"
# asm/unistd_64.h; elsewhere those of asm-generic/unistd.h, without what they never had. From 424 on all are
# the same.
_X86_NUMBERS = {
    "ptrace": 101, "syslog": 103, "personality": 135, "modify_ldt": 154, "pivot_root": 155, "chroot": 161,
    "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169, "sethostname": 170, "iopl": 172,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "settimeofday": 164, "clock_settime": 227,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
    "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "acct": 163, "mknodat": 259, "clone": 56,
    "capset": 126, "mbind": 237, "fchmodat": 268,
}  # fmt: skip
_GENERIC_NUMBERS = {
    "ptrace": 117, "syslog": 116, "personality": 92, "pivot_root": 41, "chroot": 51, "mount": 40,
    "umount2": 39, "swapon": 224, "reboot": 142, "sethostname": 161, "init_module": 105, "delete_module": 106,
    "quotactl": 60, "settimeofday": 170, "clock_settime": 112, "kexec_load": 104, "add_key": 217,
    "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "kexec_file_load": 294, "bpf": 280,
    "userfaultfd": 282, "acct": 89, "mknodat": 33, "clone": 220, "capset": 91, "mbind": 235, "fchmodat": 53,
}  # fmt: skip
_SAME_NUMBERS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "clone3": 435, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
    "process_mrelease": 448, "open_tree_attr": 467,
}  # fmt: skip
_NUMBERS = (_X86_NUMBERS if _X86 else _GENERIC_NUMBERS) | _SAME_NUMBERS


def _call(number: int, *arguments: int) -> int:
    """OSError as for any call of `os`."""
    ctypes.set_errno(0)
    got: int = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a & (1 << 64) - 1) for a in arguments))
    if got == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return got


def _in_child(run: Callable[[], str]) -> str:
    """For what may end or change whoever does it, if it works."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = attempt(Attack("", "", "", (), "", lambda _: run()), {})
            os.write(writer, said.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(pid, 0)
    return said or (signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "ended")


def _call_in_child(name: str, *arguments: int) -> str:
    def run() -> str:
        _call(_NUMBERS[name], *arguments)
        return "done"

    return _in_child(run)


# --------------------------------------------------------------------------------------------------
# 1. addresses


def _add_both(name: str, run4: Callable[[Facts], str], run6: Callable[[Facts], str], **more: Any) -> None:
    must, counted = more.pop("must", _REFUSED), more.pop("counted", DENIED)
    group = more.pop("group")
    _add(group, name, must, counted, run4, family="v4", **more)
    _add(group, name, must, counted, run6, family="v6", **more)


def _addresses() -> None:
    group = "addresses"
    for name, port in (("HTTP", 80), ("HTTPS", 443), ("SSH", 22), ("SMTP", 25), ("a high port", 54321)):
        _add_both(
            f"TCP to a raw address, {name}",
            _do(_tcp, RAW4, port),
            _do(_tcp, RAW6, port),
            group=group,
        )
    for name, port in (("NTP", 123), ("QUIC", 443), ("WireGuard", 51820), ("syslog", 514)):
        _add_both(
            f"UDP to a raw address, {name}",
            _do(_udp, RAW4, port),
            _do(_udp, RAW6, port),
            group=group,
        )
    _add_both(
        "data in the first segment (TCP Fast Open) to a raw address",
        lambda f: _fast_open(RAW4),
        lambda f: _fast_open(RAW6),
        group=group,
    )
    for name, address in _PLACES:
        family, six = ("v6", True) if ":" in address else ("v4", False)
        for what, run in (("TCP", _tcp), ("UDP", _udp)):
            _add(
                group, f"{what} to {name}", _REFUSED if not six else (*_REFUSED, "EACCES"), DENIED,
                _do(run, address, 80),
                family=family, target=address,
            )  # fmt: skip
    for name, address, port in _MANY:
        _add(
            group, f"UDP to {name}", ("silence", "ECONNREFUSED"), DENIED,
            _do(_to_many, address, port),
            family="v6" if ":" in address else "v4",
        )  # fmt: skip
    for name, address, family in _NOWHERE:
        _add(
            group, f"TCP to {name}", _UNREACHABLE, EITHER,
            _do(_tcp, address, 80),
            family=family,
        )  # fmt: skip


# What lies where, by the registries of special-purpose addresses (RFC 6890) and by custom.
_PLACES = (
    ("a private network, 10/8", "10.255.255.254"),
    ("a private network, 172.16/12", "172.31.255.254"),
    ("a private network, 192.168/16", "192.168.255.254"),
    ("a carrier's network, 100.64/10", "100.127.255.254"),
    ("a link-local address", "169.254.1.1"),
    ("the cloud's metadata", "169.254.169.254"),
    ("a container's gateway", "172.17.0.1"),
    ("6to4's relay", "192.88.99.1"),
    ("a unique local address", "fdff:ffff:ffff::1"),
    ("the cloud's metadata", "fd00:ec2::254"),
    ("NAT64, to a raw IPv4 address", "64:ff9b::c000:201"),
    ("6to4, to a raw IPv4 address", "2002:c000:201::1"),
    ("Teredo", "2001:0:c000:201::1"),
    ("a site-local address", "fec0::1"),
    ("an address made of an IPv4 one", "::c000:201"),
    ("an ORCHIDv2 address", "2001:20::1"),
)
_MANY = (
    ("all hosts", "224.0.0.1", 9),
    ("SSDP's group", "239.255.255.250", 1900),
    ("a global group", "233.252.0.1", 9),  # RFC 6676, documentation
    ("the broadcast address", "255.255.255.255", 67),
    ("mDNS", "224.0.0.251", 5353),
    ("LLMNR", "224.0.0.252", 5355),
    ("NetBIOS's broadcast", "198.19.255.255", 137),
    ("all nodes", "ff02::1", 9),
    ("all routers", "ff02::2", 9),
    ("all nodes of the site", "ff05::1", 9),
    ("a global group", "ff0e::db8:0:1", 9),
    ("mDNS", "ff02::fb", 5353),
    ("LLMNR", "ff02::1:3", 5355),
    ("DHCPv6's servers", "ff02::1:2", 547),
)
_NOWHERE = (
    ("this network, 0.0.0.1", "0.0.0.1", "v4"),
    ("a reserved address, 240.0.0.1", "240.0.0.1", "v4"),
    ("the next hop's link-local address", "fe80::53", "v6"),
    ("an IPv4-mapped address", "::ffff:192.0.2.1", "v6"),
    ("an IPv4-mapped address of the host's loopback", "::ffff:127.0.0.1", "v6"),
)


def _fast_open(address: str) -> str:
    """Blocking: else the call ends before the answer is there."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("=qq", 0, int(WAIT * 1e6)))
        sock.sendto(b"selftest", socket.MSG_FASTOPEN, (address, 443))
        return "connected"


def _to_many(address: str, port: int) -> str:
    """With the device named: link-local groups need it, and there is only one way out anyway."""
    index = socket.if_nametoindex("eth0")
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.settimeout(_QUIET)
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            sock.sendto(b"selftest", (address, port, 0, index))
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", b"", b"", index))
            sock.sendto(b"selftest", (address, port))
        sock.recv(4096)
        return "answered"


# --------------------------------------------------------------------------------------------------
# 2. egressd's own addresses, the host's, and other sandboxes'


def _neighbours() -> None:
    group = "neighbours"
    for port in (22, 80, 443, 853, 5353, 8443, 8444, 9100):
        _add_both(
            f"the resolver's address, port {port}/tcp",
            _do(_tcp, RESOLVER4, port),
            _do(_tcp, RESOLVER6, port),
            group=group,
        )
    for port in (67, 123, 443, 853, 5353):
        _add_both(
            f"the resolver's address, port {port}/udp",
            _do(_udp, RESOLVER4, port),
            _do(_udp, RESOLVER6, port),
            group=group,
        )
    for name, four, six in (
        ("the gateway's end of its uplink", "169.254.54.2", "fd53:2::2"),
        ("the host's end of the gateway's uplink", "169.254.54.1", "fd53:2::1"),
        ("where the inspector dials from", "169.254.64.1", "fd53:3::1"),
    ):
        _add_both(f"{name}, SSH", _do(_tcp, four, 22), _do(_tcp, six, 22), group=group)
        _add_both(f"{name}, DNS", _do(_udp, four, 53), _do(_udp, six, 53), group=group)
    for family in ("4", "6"):
        v, host, own = f"v{family}", f"host{family}", f"own{family}"
        listed = "listed" if family == "4" else "listed6"
        for port in (22, 80, 443):
            _add(
                group, f"the host's own address, port {port}/tcp", _REFUSED, DENIED,
                _with(_tcp_at, host, port),
                family=v, needs=(host,),
            )  # fmt: skip
        _add(
            group, "a service of the host's loopback, at the host's own address", _REFUSED, DENIED,
            _with(_service_at, host), family=v, needs=(host,),
        )  # fmt: skip
        for name, offset in (("before", -1), ("after", 1), ("far away", 5000)):
            _add(
                group, f"the sandbox {name}", _REFUSED, DENIED,
                _with(_sandbox_at, own, offset), family=v,
            )  # fmt: skip
        _add(
            group, "the sandbox after, UDP", _REFUSED, DENIED,
            _with(_sandbox_udp_at, own, 1), family=v,
        )  # fmt: skip
        _add(
            group, "a synthetic address of another workspace", _REFUSED, DENIED,
            _with(_tcp_at, f"synthetic{family}", 443), family=v,
        )  # fmt: skip
        for port in (9, 22, 65535):
            _add(
                group, f"a listed host, unlisted port {port}/tcp", _REFUSED, DENIED,
                _with(_tcp_at, listed, port),
                family=v, needs=(listed,),
            )  # fmt: skip
        _add(
            group, "a listed host, unlisted port 9/udp", _REFUSED, DENIED,
            _with(_udp_at, listed, 9),
            family=v, needs=(listed,),
        )  # fmt: skip
    for name, address, family in (
        ("127.0.0.1", "127.0.0.1", "v4"),
        ("127.1.2.3", "127.1.2.3", "v4"),
        ("0.0.0.0", "0.0.0.0", "v4"),
        ("::1", "::1", "v6"),
        ("::", "::", "v6"),
    ):
        _add(
            group, f"a service of the host's loopback, at {name}", _REFUSED, NOTHING,
            _with(_service_on, address), family=family,
        )  # fmt: skip


def _tcp_at(facts: Facts, key: str, port: int) -> str:
    return _tcp(facts[key], port)


def _udp_at(facts: Facts, key: str, port: int) -> str:
    return _udp(facts[key], port)


def _service_at(facts: Facts, key: str) -> str:
    """The judge's own listener on the host's 127.0.0.1."""
    return _tcp(facts[key], facts["port"])


def _service_on(facts: Facts, address: str) -> str:
    return _tcp(address, facts["port"])


def _sandbox_at(facts: Facts, own: str, offset: int) -> str:
    return _tcp(_beside(facts[own], offset), 80)


def _sandbox_udp_at(facts: Facts, own: str, offset: int) -> str:
    return _udp(_beside(facts[own], offset), 9)


def _beside(address: str, offset: int) -> str:
    """Another address of the same pool: the low 16 bits alone are the sandbox's."""
    family = _family(address)
    packed = socket.inet_pton(family, address)
    low = (int.from_bytes(packed[-2:], "big") + offset) & 0xFFFF
    return socket.inet_ntop(family, packed[:-2] + low.to_bytes(2, "big"))


# --------------------------------------------------------------------------------------------------
# 3. other protocols and other kinds of sockets

_FAMILIES = (
    ("AX.25", 3), ("IPX", 4), ("AppleTalk", 5), ("X.25", 9), ("PF_KEY", 15), ("packet", 17), ("RDS", 21),
    ("PPPoX", 24), ("LLC", 26), ("InfiniBand", 27), ("MPLS", 28), ("CAN", 29), ("TIPC", 30),
    ("Bluetooth", 31), ("RxRPC", 33), ("ISDN", 34), ("Phonet", 35), ("IEEE 802.15.4", 36), ("CAIF", 37),
    ("kernel crypto (AF_ALG)", 38), ("NFC", 39), ("vsock", 40), ("KCM", 41), ("QIPCRTR", 42), ("SMC", 43),
    ("XDP", 44), ("MCTP", 45),
)  # fmt: skip
_NETLINKS = (
    ("socket monitoring", 4), ("netfilter's log", 5), ("xfrm", 6), ("SELinux", 7), ("iSCSI", 8), ("audit", 9),
    ("connector", 11), ("netfilter (nft)", 12), ("uevents", 15), ("generic", 16), ("crypto", 21),
)  # fmt: skip


def _protocols() -> None:
    group = "protocols"
    v4, v6 = socket.AF_INET, socket.AF_INET6
    for name, kind, number in (
        ("SCTP", 1, 132), ("SCTP, one to many", 5, 132), ("UDP-Lite", 2, 136), ("L2TP", 2, 115),
        ("MPTCP", 1, 262), ("SMC", 1, 256),
    ):  # fmt: skip
        _add_both(
            f"a socket of {name}",
            _do(_socket, v4, kind, number),
            _do(_socket, v6, kind, number),
            group=group, must=_NO_PROTOCOL, counted=NOTHING, kernel=f"inet:{number}",
        )  # fmt: skip
    for name, kind, number in (
        ("DCCP", 6, 33), ("raw ICMP", 3, 1), ("raw TCP", 3, 6), ("raw IP", 3, 255),
        ("an IPv4 tunnel (IPIP)", 3, 4), ("an IPv6 tunnel (SIT)", 3, 41), ("GRE", 3, 47), ("ESP", 3, 50),
        ("OSPF", 3, 89), ("the old packet interface", 10, 0x0300),
    ):  # fmt: skip
        _add_both(
            f"a socket for {name}",
            _do(_socket, v4, kind, number),
            _do(_socket, v6, kind, number),
            group=group, must=_NOT_PERMITTED, counted=NOTHING,
        )  # fmt: skip
    _add(group, "a ping socket", ("EACCES",), NOTHING, lambda f: _socket(v4, 2, 1), family="v4")
    _add(group, "a ping socket", _NO_PROTOCOL, NOTHING, lambda f: _socket(v6, 2, 58), family="v6")
    for name, number in _FAMILIES:
        _add(
            group, f"a socket of family {name}", _NO_FAMILY, NOTHING,
            _do(_any_kind, number),
            kernel=f"family:{number}",
        )  # fmt: skip
    _add(group, "a vsock socket, the family's upper half set", ("EAFNOSUPPORT", "EINVAL"), NOTHING,
         lambda f: _wide_family(40))  # fmt: skip
    for name, number in _NETLINKS:
        _add(
            group, f"netlink: {name}", _NO_FAMILY, NOTHING,
            _do(_socket, socket.AF_NETLINK, socket.SOCK_RAW, number),
        )  # fmt: skip
    for name, kind, body in (
        ("a new link", 16, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _text_attribute(3, "selftest0")),
        ("the link's MTU", 16, struct.pack("=BxHiII", 0, 0, 2, 0, 0) + struct.pack("=HHI", 8, 4, 1280)),
        ("a new address", 20, struct.pack("=BBBBi", 2, 32, 0, 0, 1) + b"\x08\0\x02\0\xc0\0\x02\x09"),
        ("a new route", 24,
         struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 4, 0, 1, 0) + b"\x08\0\x01\0\xc0\0\2\x09"),
        ("a new neighbour", 28, struct.pack("=BxxxiHBB", 2, 2, 0x80, 0, 0) + b"\x08\0\x01\0\xc0\0\2\x09"),
        ("a new rule", 32, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 0, 0, 1, 0)),
    ):  # fmt: skip
        _add(group, f"rtnetlink: {name}", _NOT_PERMITTED, NOTHING,
             _do(_rtnetlink, kind, body))  # fmt: skip
    for name, request in (("flags", 0x8914), ("address", 0x8916), ("MTU", 0x8922), ("name", 0x8923),
                          ("a bridge", 0x89A0), ("an ARP entry", 0x8955), ("a route", 0x890B)):  # fmt: skip
        _add(group, f"ioctl on a device: {name}", _NOT_PERMITTED, NOTHING,
             _do(_device_ioctl, request))  # fmt: skip


def _text_attribute(kind: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _any_kind(family: int) -> str:
    """SOCK_RAW, or what the family has instead. The first that is not refused for its family counts."""
    for kind in (3, 1, 2, 5):
        try:
            return _socket(family, kind)
        except OSError as error:
            said = error
            if error.errno != errno.EAFNOSUPPORT:
                break
    raise said


def _wide_family(family: int) -> str:
    """socket(2) takes an int; a filter compares 64 bits."""
    os.close(_call(41 if _X86 else 198, family | 1 << 32, 1, 0))
    return "made"


def _rtnetlink(kind: int, body: bytes) -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(1)
        netlink.send(struct.pack("=IHHII", 16 + len(body), kind, 0x1 | 0x4 | 0x400, 1, 0) + body)
        (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))
    return "done"


def _device_ioctl(request: int) -> str:
    """struct ifreq (linux/if.h), and for what reads another structure as good as any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, request, struct.pack("=16sHxx4s120x", b"eth0", 2, b"\xc0\0\2\x09"))
    return "done"


# --------------------------------------------------------------------------------------------------
# 4. packets that are not what they seem


def _disguises() -> None:
    group = "disguises"
    for name, option in (("loose source routing", 131), ("strict source routing", 137)):
        _add(group, f"{name} over a lawful destination", ("silence", "ECONNREFUSED", "EPERM"), EITHER,
             _do(_source_routed, option), family="v4")  # fmt: skip
    _add(group, "record route", ("silence", "ECONNREFUSED"), DENIED, lambda f: _recorded_route(), family="v4")
    _add(group, "a routing header over a lawful destination",
         ("EPERM", "EINVAL", "silence", "ECONNREFUSED", "EHOSTUNREACH", "EACCES"), EITHER,
         lambda f: _routing_header(), family="v6")  # fmt: skip
    _add(group, "hop-by-hop options", _NOT_PERMITTED, NOTHING,
         lambda f: _ipv6_option(54, b"\0\0\1\4\0\0\0\0"), family="v6")  # fmt: skip
    _add(group, "destination options", _NOT_PERMITTED, NOTHING,
         lambda f: _ipv6_option(59, b"\0\0\1\4\0\0\0\0"), family="v6")  # fmt: skip
    _add_both("a datagram in fragments, to the resolver", lambda f: _fragmented(RESOLVER4),
              lambda f: _fragmented(RESOLVER6), group=group, must=("silence", "ECONNREFUSED"))  # fmt: skip
    _add_both("a datagram in fragments, to a raw address", lambda f: _fragmented(RAW4),
              lambda f: _fragmented(RAW6), group=group, must=("silence", "ECONNREFUSED"))  # fmt: skip
    _add_both("bound to a foreign source", lambda f: _bound("192.0.2.9", free=False),
              lambda f: _bound("2001:db8::9", free=False), group=group, must=("EADDRNOTAVAIL",),
              counted=NOTHING)  # fmt: skip
    _add_both("bound to a foreign source (freebind)", lambda f: _bound("192.0.2.9", free=True),
              lambda f: _bound("2001:db8::9", free=True), group=group, must=(*_UNREACHABLE, "ENETDOWN"),
              counted=EITHER)  # fmt: skip
    _add_both("bound to the sandbox after", lambda f: _bound(_beside(f["own4"], 1), free=True),
              lambda f: _bound(_beside(f["own6"], 1), free=True), group=group, must=_UNREACHABLE,
              counted=EITHER)  # fmt: skip
    _add_both("a foreign source beside the datagram", lambda f: _packet_info("192.0.2.9"),
              lambda f: _packet_info("2001:db8::9"), group=group, must=("EINVAL", "ENETUNREACH"),
              counted=NOTHING)  # fmt: skip
    for name, level, option in (("a mark of one's own (SO_MARK)", 1, 36), ("forced priority", 1, 12),
                                ("transparent proxying (v4)", 0, 19), ("transparent proxying (v6)", 41, 75),
                                ("repairing a connection (TCP_REPAIR)", 6, 19)):  # fmt: skip
        must = _NOT_PERMITTED
        _add(group, name, must, NOTHING,
             _do(_privileged_option, level, option))  # fmt: skip
    _add(group, "a low hop limit to a raw address", (*_REFUSED, "silence"), DENIED,
         lambda f: _short_lived(RAW4), family="v4")  # fmt: skip
    _add(group, "a low hop limit to a raw address", (*_REFUSED, "silence"), DENIED,
         lambda f: _short_lived(RAW6), family="v6")  # fmt: skip


def _source_routed(kind: int) -> str:
    """RFC 791: to the resolver, by way of a raw address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        route = bytes([kind, 7, 4]) + socket.inet_aton(RAW4) + b"\0"
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, route)
        sock.settimeout(_QUIET)
        sock.sendto(question(UNLISTED), (RESOLVER4, 53))
        sock.recv(4096)
        return "answered"


def _recorded_route() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x07\x07\x04\0\0\0\0\0")
        sock.settimeout(_QUIET)
        sock.sendto(question(UNLISTED), (RESOLVER4, 53))
        sock.recv(4096)
        return "answered"


def _routing_header() -> str:
    """A segment routing header (RFC 8754) with one more segment, a raw address."""
    segments = socket.inet_pton(socket.AF_INET6, RAW6) + socket.inet_pton(socket.AF_INET6, RESOLVER6)
    return _ipv6_option(57, struct.pack("=BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + segments)


def _ipv6_option(option: int, value: bytes) -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, option, value)
        sock.settimeout(_QUIET)
        sock.sendto(question(UNLISTED), (RESOLVER6, 53))
        sock.recv(4096)
        return "answered"


def _fragmented(address: str) -> str:
    """IP_MTU_DISCOVER 10, IPV6_MTU_DISCOVER 23 (linux/in.h, in6.h): do not discover."""
    level, option = (41, 23) if ":" in address else (0, 10)
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(level, option, 0)
        sock.settimeout(_QUIET)
        sock.connect((address, 53))
        sock.send(question(UNLISTED) + bytes(4000))
        sock.recv(4096)
        return "answered"


def _bound(source: str, *, free: bool) -> str:
    """To the resolver, where a frame of our own would be admitted. IP_FREEBIND 15, IPV6_FREEBIND 78."""
    six = ":" in source
    with socket.socket(_family(source), socket.SOCK_DGRAM) as sock:
        if free:
            sock.setsockopt(41 if six else 0, 78 if six else 15, 1)
        sock.bind((source, 0))
        sock.settimeout(_QUIET)
        sock.connect((RESOLVER6 if six else RESOLVER4, 53))
        sock.send(question(UNLISTED))
        sock.recv(4096)
        return "answered"


def _packet_info(source: str) -> str:
    """IP_PKTINFO 8, IPV6_PKTINFO 50 (linux/in.h, in6.h)."""
    packed = socket.inet_pton(_family(source), source)
    six = ":" in source
    data = packed + struct.pack("=i", 0) if six else struct.pack("=i4s4s", 0, packed, bytes(4))
    with socket.socket(_family(source), socket.SOCK_DGRAM) as sock:
        sock.settimeout(_QUIET)
        ancillary = [(41, 50, data)] if six else [(0, 8, data)]
        sock.sendmsg([question(UNLISTED)], ancillary, 0, (RESOLVER6 if six else RESOLVER4, 53))
        sock.recv(4096)
        return "answered"


def _privileged_option(level: int, option: int) -> str:
    family = socket.AF_INET6 if level == 41 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(level, option, 7)
    return "set"


def _short_lived(address: str) -> str:
    six = ":" in address
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(41 if six else 0, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, 1)
        sock.settimeout(_QUIET)
        sock.connect((address, 33434))
        sock.send(b"selftest")
        sock.recv(4096)
        return "answered"


# --------------------------------------------------------------------------------------------------
# 5. names

_TYPES = {
    "A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "NULL": 10, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28, "SRV": 33,
    "NAPTR": 35, "DNAME": 39, "DS": 43, "DNSKEY": 48, "SVCB": 64, "HTTPS": 65, "IXFR": 251, "AXFR": 252,
    "ANY": 255,
}  # fmt: skip
_RCODES = {0: "no answer in it", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}
_NO_NAME = ("NXDOMAIN",)
_NO_ANSWER = ("NXDOMAIN", "REFUSED", "NOTIMP", "FORMERR", "no answer in it")


def question(
    name: str | bytes,
    kind: int = 1,
    *,
    kind_class: int = 1,
    flags: int = 0x0100,
    count: int = 1,
    options: bytes | None = None,
) -> bytes:
    """A question of DNS (RFC 1035 section 4.1); with `options`, an OPT record that holds them (RFC 6891)."""
    labels = name if isinstance(name, bytes) else _labels(name.split("."))
    asked = labels + struct.pack("!2H", kind, kind_class)
    more = b"" if options is None else b"\0" + struct.pack("!HHIH", 41, 65535, 0, len(options)) + options
    return struct.pack("!6H", 0x5353, flags, count, 0, 0, 1 if more else 0) + asked * count + more


def _labels(labels: list[str]) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode("latin-1") for part in labels if part) + b"\0"


def _asked(server: str, data: bytes, *, tcp: bool = False) -> str:
    """The answer's code; "answered" if it holds a record."""
    with socket.socket(_family(server), socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0 if tcp else 0.5)
        sock.connect((server, 53))
        sock.sendall(struct.pack("!H", len(data)) + data if tcp else data)
        answer = sock.recv(65535)
        if tcp:
            _finish(sock)
    answer = answer[2:] if tcp else answer
    if len(answer) < 12:
        return "closed"
    if struct.unpack_from("!H", answer, 6)[0]:
        return "answered"
    return _RCODES.get(answer[3] & 15, f"code {answer[3] & 15}")


def _finish(sock: socket.socket) -> None:
    """Until the other side has ended as well: no acknowledgement goes out after this attempt."""
    try:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65535):
            pass
    except OSError:
        pass


def _names() -> None:
    group = "names"

    def ask(name: str, data: bytes | Callable[[Facts], bytes], must: tuple[str, ...] = _NO_ANSWER, *,
            tcp: bool = False, needs: tuple[str, ...] = ()) -> None:  # fmt: skip
        def run(facts: Facts, server: str) -> str:
            return _asked(server, data(facts) if callable(data) else data, tcp=tcp)

        _add(group, name, must, ADMITTED, lambda f: run(f, RESOLVER4), family="v4", needs=needs)
        _add(group, name, must, ADMITTED, lambda f: run(f, RESOLVER6), family="v6", needs=needs)

    for kind, number in _TYPES.items():
        if kind not in ("AXFR", "IXFR"):
            ask(f"an unlisted name, {kind}", question(UNLISTED, number))
    ask("an unlisted name over TCP", question(UNLISTED), _NO_NAME, tcp=True)
    ask("a zone transfer (AXFR)", question("example", 252), tcp=True)
    ask("a zone transfer (IXFR)", question("example", 251), tcp=True)
    ask("an unlisted name in mixed case", question("SeLfTeSt.EgReSsD.eXaMpLe"), _NO_NAME)
    ask("odd bytes in a name", question(b"\x08\0\xff;.\\ \x1b\n\x07example\0"))
    ask("dots within a label", question(b"\x0bselftest.eg\x07example\0"))
    ask("a name that ends in white space", question("selftest.egressd.example ".replace(" ", "\x20")))
    ask("a long name that carries 180 bytes", question(".".join(["a" * 60] * 3) + ".example"), _NO_NAME)
    ask("many labels that carry bytes", question(".".join("0123456789abcdef" * 6) + ".example"), _NO_NAME)
    ask("the version of the server (CHAOS)", question("version.bind", 16, kind_class=3))
    ask("a name of the class HESIOD", question(UNLISTED, 1, kind_class=4))
    ask("the name of a raw address", question("1.2.0.192.in-addr.arpa", 12))
    ask("the root", question(b"\0", 2))
    ask("the cloud's metadata by name", question("metadata.google.internal"), _NO_NAME)
    ask("the container's host by name", question("host.docker.internal"), _NO_NAME)
    ask("the resolver's own discovery (DDR)", question("_dns.resolver.arpa", 64))
    ask("a name that is an address", question("192.0.2.1"), _NO_NAME)
    ask(
        "a local option of EDNS that carries bytes",
        question(UNLISTED, options=_edns(65001, b"selftest")),
        _NO_NAME,
    )
    ask("a client subnet of EDNS", question(UNLISTED, options=_edns(8, b"\0\1\x20\0\xc0\0\2\1")), _NO_NAME)
    ask("a cookie of EDNS that carries bytes", question(UNLISTED, options=_edns(10, b"selftest")), _NO_NAME)
    ask("a question that is an update", question(UNLISTED, 6, flags=5 << 11))
    ask("a question that is a notice", question(UNLISTED, 6, flags=4 << 11))
    ask("a question that is a status", question(UNLISTED, flags=2 << 11))
    ask("two questions at once", question(UNLISTED, count=2))
    ask("no recursion wished", question(UNLISTED, flags=0), _NO_ANSWER)
    ask(
        "below a listed name", lambda f: question(f"selftest.{f['listed_name']}"), _NO_NAME, needs=("listed",)
    )
    ask("a listed name, TXT", lambda f: question(f["listed_name"], 16), needs=("listed",))
    ask("a listed name, ANY", lambda f: question(f["listed_name"], 255), (*_NO_ANSWER, "answered"),
        needs=("listed",))  # fmt: skip
    for name, data in (("a name that points at itself", question(b"\xc0\x0c")),
                       ("an answer instead of a question", question(UNLISTED, flags=0x8180)),
                       ("half a question", question(UNLISTED)[:20])):  # fmt: skip
        ask(name, data, ("FORMERR", "REFUSED", "NOTIMP", "silence", "closed"))
    _add(group, "a listed name tells its real address", ("synthetic",), ADMITTED, _told_address,
         needs=("listed",))  # fmt: skip
    for name, port, tcp in (("DNS", 53, False), ("DNS over TCP", 53, True), ("DNS over TLS", 853, True),
                            ("DNS over QUIC", 853, False), ("DNS over HTTPS", 443, True)):  # fmt: skip
        _add_both(
            f"{name}, straight to a resolver elsewhere",
            _do(_elsewhere, "192.0.2.53", port, tcp),
            _do(_elsewhere, "2001:db8::53", port, tcp),
            group=group,
        )  # fmt: skip
    _add(group, "the library's own way to a name", ("EAI_NONAME", "EAI_NODATA"), ADMITTED,
         lambda f: _library(UNLISTED))  # fmt: skip
    _add(group, "the library's own way to a name that ends in a dot", ("EAI_NONAME", "EAI_NODATA"), ADMITTED,
         lambda f: _library(UNLISTED + "."))  # fmt: skip


def _elsewhere(address: str, port: int, tcp: bool) -> str:
    return _tcp(address, port) if tcp else _udp(address, port, question(UNLISTED))


def _edns(code: int, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value


def _told_address(facts: Facts) -> str:
    """Every address of a listed name lies in the pools of synthetic ones: no rebinding, no real address."""
    found = {
        str(entry[4][0]) for entry in socket.getaddrinfo(facts["listed_name"], 1, type=socket.SOCK_STREAM)
    }
    pools = facts["pools"]  # [(first, last)] as numbers, by family
    for address in found:
        family = _family(address)
        number = int.from_bytes(socket.inet_pton(family, address), "big")
        low, high = pools["6" if ":" in address else "4"]
        if not low <= number <= high:
            return f"real: {address}"
    return "synthetic"


def _library(name: str) -> str:
    try:
        socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        codes = {getattr(socket, n): n for n in dir(socket) if n.startswith("EAI_")}
        return codes.get(error.errno or 0, "failed")
    return "answered"


# --------------------------------------------------------------------------------------------------
# 6. TLS, where a listed host's is read


def hello(*, name: bytes | None, extra: bytes = b"", version: int = 0x0303) -> bytes:
    """A ClientHello (RFC 8446 section 4.1.2) of one record; `extra` are further extensions."""
    extensions = extra
    if name is not None:
        entry = b"\0" + struct.pack("!H", len(name)) + name
        extensions += _extension(0, struct.pack("!H", len(entry)) + entry)
    extensions += _extension(43, b"\x02\x03\x04") + _extension(10, b"\0\x02\0\x1d")
    extensions += _extension(13, b"\0\x04\x04\x03\x08\x04")
    extensions += _extension(51, b"\0\x24\0\x1d\0\x20" + bytes(range(32)))
    body = struct.pack("!H", version) + bytes(32) + b"\x20" + bytes(32)
    body += b"\0\x02\x13\x01" + b"\x01\0" + struct.pack("!H", len(extensions)) + extensions
    handshake = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack("!H", len(handshake)) + handshake


def _extension(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value


_ECH = _extension(0xFE0D, b"\0\0\x01\0\x01\x00\0\x20" + bytes(32) + b"\0\x10" + bytes(16))


def _inspected(facts: Facts, data: bytes) -> str:
    """What the inspector says to these first bytes: anything but a server's hello is a refusal."""
    with socket.socket(_family(facts["tls"]), socket.SOCK_STREAM) as sock:
        sock.settimeout(2.0)
        sock.connect((facts["tls"], facts["tls_port"]))
        sock.sendall(data)
        answer = sock.recv(4096)
    if not answer:
        return "closed"
    return "alert" if answer[0] == 0x15 else "answered"


def _tls() -> None:
    group, must = "TLS", ("ECONNRESET", "closed", "alert", "EPIPE")

    def add(name: str, data: Callable[[bytes], bytes]) -> None:
        _add(
            group, name, must, ADMITTED, lambda f: _inspected(f, data(f["tls_name"].encode())), needs=("tls",)
        )

    add("no name asked for (SNI)", lambda n: hello(name=None))
    add("another name asked for", lambda n: hello(name=UNLISTED.encode()))
    add("a name below the listed one", lambda n: hello(name=b"selftest." + n))
    add("the listed name with more behind it", lambda n: hello(name=n + b".example"))
    add("a NUL in the name", lambda n: hello(name=n + b"\0.example"))
    add("a raw address as the name", lambda n: hello(name=b"192.0.2.1"))
    add("an empty name", lambda n: hello(name=b""))
    add("two names", lambda n: hello(name=n, extra=_extension(0, b"\0\x0a\0\0\x07example")))
    add("the name encrypted (ECH)", lambda n: hello(name=n, extra=_ECH))
    add("no TLS at all: HTTP", lambda n: b"GET / HTTP/1.1\r\nHost: " + n + b"\r\n\r\n")
    add("no TLS at all: CONNECT", lambda n: b"CONNECT 192.0.2.1:443 HTTP/1.1\r\n\r\n")
    add("no TLS at all: SSH", lambda n: b"SSH-2.0-selftest\r\n\r\n")
    add("a hello of SSL 2", lambda n: b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37))
    add("another record first", lambda n: b"\x17\x03\x03\x00\x08selftest" + hello(name=n))


# --------------------------------------------------------------------------------------------------
# 7. the machine's own sockets, processes and files

_SOCKETS = (
    "/run/systemd/notify", "/run/systemd/private", "/run/systemd/journal/stdout",
    "/run/systemd/journal/socket", "/run/systemd/resolve/io.systemd.Resolve", "/run/dbus/system_bus_socket",
    "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock", "/run/nscd/socket",
    "/run/user/0/bus", "/run/egressd-broker/broker.sock", "/run/snapd.socket", "/dev/log",
    "/tmp/.X11-unix/X0",
)  # fmt: skip
_FILES = (
    ("the host's memory", "/dev/mem"), ("the kernel's log", "/dev/kmsg"), ("KVM", "/dev/kvm"),
    ("vsock's device", "/dev/vsock"), ("a tunnel device", "/dev/net/tun"), ("FUSE", "/dev/fuse"),
    ("vhost", "/dev/vhost-net"), ("vhost-vsock", "/dev/vhost-vsock"), ("PPP", "/dev/ppp"),
    ("user events", "/dev/uinput"), ("loop devices", "/dev/loop-control"), ("a disk", "/dev/sda"),
    ("a disk", "/dev/vda"), ("the kernel's memory", "/proc/kcore"), ("port I/O", "/dev/port"),
)  # fmt: skip
_WRITTEN = (
    ("the core pattern", "/proc/sys/kernel/core_pattern"), ("the module loader", "/proc/sys/kernel/modprobe"),
    ("hotplug", "/proc/sys/kernel/hotplug"), ("forwarding", "/proc/sys/net/ipv4/ip_forward"),
    ("who may ping", "/proc/sys/net/ipv4/ping_group_range"),
    ("binary formats", "/proc/sys/fs/binfmt_misc/register"), ("SysRq", "/proc/sysrq-trigger"),
    ("the keys' limits", "/proc/sys/kernel/keys/maxkeys"),
    ("the sandbox's own kernel settings", "/proc/sys/net/ipv6/conf/eth0/accept_ra"),
)  # fmt: skip
_HIDDEN = (
    "/home", "/root", "/var", "/boot", "/srv", "/opt/egressd/../../run/egressd", "/etc/egressd/egressd.yaml",
    "/etc/egressd/workspaces", "/sys", "/sys/fs/cgroup", "/sys/fs/cgroup/release_agent",
    "/sys/kernel/uevent_helper",
    "/sys/class/net", "/sys/firmware", "/run/netns", "/run/secrets/kubernetes.io",
)  # fmt: skip
_VARIABLES = (
    "http_proxy", "https_proxy", "all_proxy", "no_proxy", "dbus_session_bus_address", "ssh_auth_sock",
    "notify_socket", "listen_fds", "xdg_runtime_dir", "docker_host", "kubernetes_service_host", "ld_preload",
    "display", "wayland_display",
)  # fmt: skip


def _machine() -> None:
    group, gone = "machine", ("ENOENT", "ENOTDIR", "ENXIO")
    _add(group, "egressd's control socket", gone, NOTHING,
         lambda f: _connect_path(f"{f['run_dir']}/control.sock"))  # fmt: skip
    _add(group, "egressd's run directory", gone, NOTHING, lambda f: _open(f["run_dir"]))
    for path in _SOCKETS:
        _add(group, f"the socket {path}", gone, NOTHING,
             _do(_connect_path, path))  # fmt: skip
    _add(group, "an abstract socket of the host", _REFUSED, NOTHING,
         lambda f: _connect_path("\0" + f["abstract"]))  # fmt: skip
    _add(
        group, "a name of an abstract socket that listens outside", ("not listed",), NOTHING, _abstract_names
    )
    for name, path in _FILES:
        _add(group, f"{name} ({path})", (*gone, "EACCES", "EPERM"), NOTHING,
             _do(_open, path))  # fmt: skip
    for name, path in _WRITTEN:
        _add(group, f"writing {name} ({path})", ("EROFS", "EACCES", "EPERM", "ENOENT"), NOTHING,
             _do(_written, path))  # fmt: skip
    _add(
        group,
        "another mapping of users (uid_map)",
        ("EPERM",),
        NOTHING,
        lambda f: _mapped("/proc/self/uid_map"),
    )
    _add(group, "another mapping of users, of the first process", ("EPERM", "EACCES"), NOTHING,
         lambda f: _mapped("/proc/1/uid_map"))  # fmt: skip
    _add(group, "a first process with fewer bounds", ("the same bounds",), NOTHING, _first_bounds)
    for path in _HIDDEN:
        _add(group, f"looking into {path}", (*gone, "EACCES", "nothing in it"), NOTHING,
             _do(_listed_in, path))  # fmt: skip
    for name in _VARIABLES:
        _add(group, f"a way out in the variable {name.upper()}", ("not set",), NOTHING,
             _do(_variable, name))  # fmt: skip
    _add(group, "a descriptor that was left open", ("none",), NOTHING, _descriptors)
    _add(
        group, "a process outside (/proc)", ("ENOENT",), NOTHING, lambda f: _open(f"/proc/{f['pid']}/ns/net")
    )
    _add(group, "processes outside (listing)", ("own alone",), NOTHING, _processes)
    _add(group, "another root by way of /proc/1/root", ("the same",), NOTHING, _other_root)
    _add(group, "a signal to a process outside", ("ESRCH",), NOTHING, lambda f: _signal(f["pid"]))
    _add(group, "a pidfd of a process outside", ("ESRCH", "EINVAL"), NOTHING,
         lambda f: _pidfd(f["pid"]))  # fmt: skip
    _add(group, "the system's files can be written", ("EROFS", "EACCES", "EPERM"), NOTHING,
         lambda f: _open("/usr/bin/selftest", os.O_WRONLY | os.O_CREAT))  # fmt: skip
    _add(group, "the sandbox's root can be written", ("EROFS", "EACCES", "EPERM"), NOTHING,
         lambda f: _open("/selftest", os.O_WRONLY | os.O_CREAT))  # fmt: skip
    _add(group, "the resolver's file can be written", ("EROFS", "EACCES", "EPERM"), NOTHING,
         lambda f: _open("/etc/resolv.conf", os.O_WRONLY))  # fmt: skip
    _add(group, "a file that runs as its owner (setuid)", ("no new privileges",), NOTHING, _setuid)
    _add(group, "a device node of one's own", ("EPERM", "EACCES"), NOTHING, _node)
    _add(group, "another user's number", ("EINVAL", "EPERM"), NOTHING, lambda f: _in_child(_other_user))
    _add(group, "another group's number", ("EINVAL", "EPERM"), NOTHING, lambda f: _in_child(_other_group))


def _abstract_names(facts: Facts) -> str:
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as stream:
        return "listed" if facts["abstract"] in stream.read() else "not listed"


def _written(path: str) -> str:
    """Opened, and closed again: what it holds stays as it is."""
    return _open(path, os.O_WRONLY)


def _mapped(path: str) -> str:
    """It is written once, by who makes the namespace (user_namespaces(7))."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"0 0 1\n")
    finally:
        os.close(descriptor)
    return "done"


_BOUNDS = ("Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapInh", "CapAmb")


def _first_bounds(facts: Facts) -> str:
    """Whoever may write another process's memory (/proc/1/mem) is what that process is."""
    first, own = _statuses("/proc/1/status"), _statuses("/proc/self/status")
    less = [key for key in _BOUNDS if first.get(key) != own.get(key)]
    return f"other {' '.join(less)}" if less else "the same bounds"


def _statuses(path: str) -> dict[str, str]:
    with open(path, encoding="utf-8") as stream:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in stream)}


def _listed_in(path: str) -> str:
    if not os.path.isdir(path):
        return _open(path)
    return "shown" if os.listdir(path) else "nothing in it"


def _variable(name: str) -> str:
    return "set" if any(found.lower() == name for found in os.environ) else "not set"


def _descriptors(facts: Facts) -> str:
    """What is open, but for the three and the one that this listing takes."""
    return _words(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2 and _is_open(int(name)))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _words(numbers: Any) -> str:
    return " ".join(map(str, sorted(numbers))) or "none"


def _processes(facts: Facts) -> str:
    """A pid namespace of its own counts from 1: the sandbox's first process, and we two or three."""
    found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return "own alone" if len(found) <= 4 and max(found) < 1000 else f"{len(found)} processes"


def _other_root(facts: Facts) -> str:
    there, here = os.stat("/proc/1/root"), os.stat("/")
    return "the same" if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) else "another"


def _signal(pid: int) -> str:
    os.kill(pid, 0)
    return "there"


def _pidfd(pid: int) -> str:
    os.close(_call(_NUMBERS["pidfd_open"], pid, 0))
    return "opened"


def _setuid(facts: Facts) -> str:
    """NoNewPrivs (proc(5)) and no capability: then no file's mode changes who one is."""
    path = "/tmp/selftest-setuid"  # the sandbox's own
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o755))
    try:
        os.chmod(path, 0o4755)
    except OSError:
        pass
    finally:
        os.unlink(path)
    return "no new privileges" if _status("NoNewPrivs") == "1" else "new privileges"


def _node(facts: Facts) -> str:
    """The machine's memory (1, 1), closed and removed at once."""
    path = "/tmp/selftest-node"  # the sandbox's own
    os.mknod(path, 0o020600, os.makedev(1, 1))
    os.unlink(path)
    return "made"


def _other_user() -> str:
    other = 54321 if os.getuid() != 54321 else 54322
    os.setresuid(other, other, other)
    return "changed"


def _other_group() -> str:
    other = 54321 if os.getgid() != 54321 else 54322
    os.setresgid(other, other, other)
    return "changed"


# --------------------------------------------------------------------------------------------------
# 8. the kernel's objects

_PATHS = (ctypes.create_string_buffer(b"/tmp"), ctypes.create_string_buffer(b"tmpfs"))
_TMP, _TMPFS = map(ctypes.addressof, _PATHS)
_NEW = (
    ("network", 0x4000_0000), ("user", 0x1000_0000), ("mount", 0x0002_0000), ("process", 0x2000_0000),
    ("IPC", 0x0800_0000), ("host name", 0x0400_0000), ("cgroup", 0x0200_0000),
)  # fmt: skip
_CALLS: tuple[tuple[str, str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("mount a filesystem", "mount", (_TMPFS, _TMP, _TMPFS, 0, 0), _NOT_PERMITTED),
    ("unmount one", "umount2", (_TMP, 0xFFFF), _NOT_PERMITTED),
    ("another root (pivot_root)", "pivot_root", (0, 0), _NOT_PERMITTED),
    ("another root (chroot)", "chroot", (0,), _NOT_PERMITTED),
    ("the new mount interface (fsopen)", "fsopen", (0, 0), _NOT_PERMITTED),
    ("a copy of a mount (open_tree)", "open_tree", (-100, 0, 1), _NOT_PERMITTED),
    ("move a mount", "move_mount", (-1, 0, -1, 0, 0), _NOT_PERMITTED),
    ("a mount's attributes", "mount_setattr", (-1, 0, 0, 0, 0), _NOT_PERMITTED),
    ("a file by its handle (open_by_handle_at)", "open_by_handle_at", (-1, 0, 0), _NOT_PERMITTED),
    ("a file's handle (name_to_handle_at)", "name_to_handle_at", (-1, 0, 0, 0, 0), _NOT_PERMITTED),
    ("a program in the kernel (bpf)", "bpf", (9999, 0, 0), _NOT_PERMITTED),
    ("io_uring_setup", "io_uring_setup", (0, 0), ("ENOSYS",)),
    ("io_uring_enter", "io_uring_enter", (-1, 0, 0, 0, 0, 0), ("ENOSYS",)),
    ("io_uring_register", "io_uring_register", (-1, 0, 0, 0), ("ENOSYS",)),
    ("page faults in user space (userfaultfd)", "userfaultfd", (1 << 30,), _NOT_PERMITTED),
    ("the kernel's keys (keyctl)", "keyctl", (9999, 0, 0, 0, 0), _NOT_PERMITTED),
    ("a new key (add_key)", "add_key", (0, 0, 0, 0, 0), _NOT_PERMITTED),
    ("a key that is asked for (request_key)", "request_key", (0, 0, 0, 0), _NOT_PERMITTED),
    ("performance counters", "perf_event_open", (0, 0, -1, -1, 0), _NOT_PERMITTED),
    ("another kernel (kexec_load)", "kexec_load", (0, 999, 0, 0), _NOT_PERMITTED),
    ("another kernel (kexec_file_load)", "kexec_file_load", (-1, -1, 0, 0, 0xFFFF), _NOT_PERMITTED),
    ("a module (init_module)", "init_module", (0, 0, 0), _NOT_PERMITTED),
    ("a module (finit_module)", "finit_module", (-1, 0, 0), _NOT_PERMITTED),
    ("a module less (delete_module)", "delete_module", (0, 0), _NOT_PERMITTED),
    ("a reboot", "reboot", (0, 0, 0, 0), _NOT_PERMITTED),
    ("swap space", "swapon", (0, 0), _NOT_PERMITTED),
    ("the kernel's log (syslog)", "syslog", (9999, 0, 0), _NOT_PERMITTED),
    ("the clock (settimeofday)", "settimeofday", (1, 1), _NOT_PERMITTED),
    ("the clock (clock_settime)", "clock_settime", (9999, 0), _NOT_PERMITTED),
    ("disk quotas", "quotactl", (-1, 0, 0, 0), _NOT_PERMITTED),
    ("process accounting", "acct", (1,), _NOT_PERMITTED),
    ("watching every file (fanotify)", "fanotify_init", (0xFFFF, 0), _NOT_PERMITTED),
    ("tracing the first process", "ptrace", (16, 1, 0, 0), _NOT_PERMITTED),
    ("reading the first process's memory", "process_vm_readv", (1, 0, 0, 0, 0, 0), _NOT_PERMITTED),
    ("writing the first process's memory", "process_vm_writev", (1, 0, 0, 0, 0, 0), _NOT_PERMITTED),
    ("comparing processes (kcmp)", "kcmp", (1, 1, 0, 0, 0), _NOT_PERMITTED),
    ("taking a descriptor (pidfd_getfd)", "pidfd_getfd", (-1, 0, 0), _NOT_PERMITTED),
    ("placing memory (mbind)", "mbind", (0, 0, 9999, 0, 0, 0), _NOT_PERMITTED),
    ("clone3, whose flags no filter sees", "clone3", (0, 0), ("ENOSYS",)),
    ("a call newer than the filter (open_tree_attr)", "open_tree_attr", (-1, 0, 0, 0, 0), ("ENOSYS",)),
    ("another host name", "sethostname", (_TMP, 4), _NOT_PERMITTED),
)


def _kernel() -> None:
    group = "kernel"
    for name, flag in _NEW:
        _add(group, f"a new {name} namespace (unshare)", _NOT_PERMITTED, NOTHING,
             _do(_call_in_child, "unshare", flag))  # fmt: skip
    for name, flag in _NEW[:2]:
        _add(group, f"a new {name} namespace (clone)", _NOT_PERMITTED, NOTHING,
             _do(_cloned, flag))  # fmt: skip
    _add(group, "unshare, the upper half of its argument set", _NOT_PERMITTED, NOTHING,
         lambda f: _call_in_child("unshare", 0x1000_0000 | 1 << 63))  # fmt: skip
    _add(group, "entering a namespace (setns)", _NOT_PERMITTED, NOTHING, _entered)
    for name, call, arguments, must in _CALLS:
        _add(group, name, must, NOTHING,
             _do(_call_in_child, call, *arguments))  # fmt: skip
    _add(group, "the calls of x32", ("ENOSYS", "SIGSYS"), NOTHING,
         lambda f: _in_child(lambda: str(_call(0x4000_0000 | 39))), needs=("x86_64",))  # fmt: skip
    _add(group, "typing into the terminal (TIOCSTI)", _NOT_PERMITTED, NOTHING, lambda f: _terminal(0x5412))
    _add(group, "pasting into the console (TIOCLINUX)", _NOT_PERMITTED, NOTHING, lambda f: _terminal(0x541C))
    _add(group, "capabilities back (capset)", _NOT_PERMITTED, NOTHING, lambda f: _in_child(_capabilities))
    _add(group, "a capability of its own", ("none",), NOTHING, _held)
    _add(group, "a life without the filter", ("filtered",), NOTHING, _filtered)
    _add(group, "privileges that come back (no_new_privs)", ("EINVAL",), NOTHING,
         lambda f: _in_child(lambda: _prctl(38, 0)))  # fmt: skip
    _add(
        group,
        "an ambient capability",
        ("EPERM", "EINVAL"),
        NOTHING,
        lambda f: _in_child(lambda: _prctl(47, 2, 21)),
    )
    _add(group, "a memory file that runs as its owner", ("no new privileges",), NOTHING, _memory_file)


def _cloned(flag: int) -> str:
    """clone(flags | SIGCHLD) without a stack is fork(2)."""
    pid = _call(_NUMBERS["clone"], flag | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "made"


def _entered(facts: Facts) -> str:
    descriptor = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _call_in_child("setns", descriptor, 0)
    finally:
        os.close(descriptor)


def _terminal(request: int) -> str:
    """On a pipe: without the filter it is ENOTTY."""
    fcntl.ioctl(0, request, b"x")
    return "done"


def _capabilities() -> str:
    """CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN, effective and permitted (linux/capability.h)."""
    mask = 1 << 12 | 1 << 13 | 1 << 21
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x2008_0522, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", mask, mask, 0, 0, 0, 0))
    _call(_NUMBERS["capset"], ctypes.addressof(header), ctypes.addressof(data))
    return "granted"


def _status(key: str) -> str:
    return _statuses("/proc/self/status")[key]


def _held(facts: Facts) -> str:
    held = int(_status("CapEff"), 16) | int(_status("CapPrm"), 16) | int(_status("CapInh"), 16)
    return f"{held:x}" if held else "none"


def _filtered(facts: Facts) -> str:
    """SECCOMP_MODE_FILTER (proc(5), Seccomp)."""
    return "filtered" if _status("Seccomp") == "2" else "not filtered"


def _prctl(option: int, *arguments: int) -> str:
    ctypes.set_errno(0)
    if _libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])) == -1:
        raise OSError(ctypes.get_errno(), "prctl")
    return "done"


def _memory_file(facts: Facts) -> str:
    """What is executed from memory stands under the same rules."""
    with os.fdopen(os.memfd_create("selftest"), "wb") as stream:
        os.fchmod(stream.fileno(), 0o755)
    return "no new privileges" if _status("NoNewPrivs") == "1" else "new privileges"


_addresses()
_neighbours()
_protocols()
_disguises()
_names()
_tls()
_machine()
_kernel()


# --------------------------------------------------------------------------------------------------


def resolved(name: str) -> tuple[list[str], list[str]]:
    """An honest question. Addresses of both families; empty where there are none."""
    found: dict[socket.AddressFamily, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for family in found:
        try:
            entries = socket.getaddrinfo(name, 443, family, socket.SOCK_STREAM)
        except OSError:
            continue
        found[family] = sorted({str(entry[4][0]) for entry in entries})
    return found[socket.AF_INET], found[socket.AF_INET6]


def main() -> int:
    """The first line holds the facts. Each other one is a row to try, a name to resolve, or the facts anew;
    one line is answered to each."""
    facts: Facts = json.loads(sys.stdin.readline() or "{}")
    answer: Any = len(ATTACKS)
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if isinstance(message, int):
            answer = attempt(ATTACKS[message], facts)
        elif "resolve" in message:
            answer = resolved(message["resolve"])
        else:
            facts, answer = message["facts"], None
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
