"""The system-call filter of a sandbox, compiled by libseccomp into a BPF program.

The rules are data (`RULES`), the default is *allow*: the namespaces and the gateway hold the network, this
filter takes away what would lead around them. Refused are socket families that leave the namespace (vsock
reaches a hypervisor, AF_ALG and AF_PACKET the kernel's less travelled parts), raw and rare protocols, new
namespaces (which would give back capabilities), io_uring (whose operations no filter sees), and the calls
that reach other processes or the kernel itself.

Arguments are 64 bits wide in the filter and 32 in the kernel. A rule that refuses must therefore not be
escaped by setting the upper half: `MASKED_EQ` where the kernel truncates, and for the socket family a
64-bit comparison in which anything above the families we allow is refused.

Numbers above `NEWEST_KNOWN` answer ENOSYS, as on an older kernel: a filter that allows by default must not
let through a call that did not exist when it was written (open_tree_attr is 467). libseccomp cannot say
"greater than" of a number, so four instructions are put before its program; BPF jumps are relative, so
that changes nothing in it. Numbers from 424 on are the same on every architecture.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH123
from __future__ import annotations

import errno
import functools
import os
import struct
from dataclasses import dataclass

import pyseccomp as lib

__all__ = ["RULES", "Rule", "program", "program_descriptor"]

# 450 set_mempolicy_home_node (Linux 5.17). What came later and is wanted has a fallback in every libc.
NEWEST_KNOWN = 450
_X32_BIT = 0x4000_0000  # asm/unistd.h: such numbers are the x32 ABI, and libseccomp's program kills them
_NEW_NAMESPACE = {  # linux/sched.h
    "CLONE_NEWNS": 0x0002_0000,
    "CLONE_NEWCGROUP": 0x0200_0000,
    "CLONE_NEWUTS": 0x0400_0000,
    "CLONE_NEWIPC": 0x0800_0000,
    "CLONE_NEWUSER": 0x1000_0000,
    "CLONE_NEWPID": 0x2000_0000,
    "CLONE_NEWNET": 0x4000_0000,
}
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16  # linux/socket.h
_ICMP, _TCP, _UDP = 1, 6, 17  # linux/in.h
_LOW = 0xFFFF_FFFF
_TYPE = 0xF  # linux/net.h SOCK_TYPE_MASK: above it are SOCK_CLOEXEC and SOCK_NONBLOCK


@dataclass(frozen=True, slots=True)
class Compare:
    """Argument number `argument`, compared; every comparison of a rule must hold."""

    argument: int
    operator: int
    value: int
    mask: int = 0  # for MASKED_EQ


@dataclass(frozen=True, slots=True)
class Rule:
    """Calls `names` fail with `error` when all of `when` hold."""

    error: int
    names: tuple[str, ...]
    when: tuple[Compare, ...] = ()


def _low(argument: int, value: int) -> Compare:
    return Compare(argument, lib.MASKED_EQ, value, _LOW)


def _families() -> list[Rule]:
    """socket(2): AF_UNIX, AF_INET, AF_INET6, and AF_NETLINK with protocol 0 (NETLINK_ROUTE), which reads
    the namespace's own interfaces and which Node and `if_nameindex` need. The rest does not exist."""
    refused = [n for n in range(_NETLINK) if n not in (_UNIX, _INET, _INET6)]
    rules = [Rule(errno.EAFNOSUPPORT, ("socket",), (Compare(0, lib.EQ, n),)) for n in refused]
    rules.append(Rule(errno.EAFNOSUPPORT, ("socket",), (Compare(0, lib.GT, _NETLINK),)))
    netlink = (Compare(0, lib.EQ, _NETLINK), Compare(2, lib.NE, 0))
    rules.append(Rule(errno.EAFNOSUPPORT, ("socket",), netlink))
    rules.append(Rule(errno.EAFNOSUPPORT, ("socketpair",), (Compare(0, lib.NE, _UNIX),)))
    return rules


def _kinds() -> list[Rule]:
    """Of the Internet families only TCP and UDP (and IPv4 ping, which ping_group_range refuses)."""
    rules: list[Rule] = []
    for family in (_INET, _INET6):
        for kind in (3, 4, 6, 10):  # SOCK_RAW, SOCK_RDM, SOCK_DCCP, SOCK_PACKET
            when = (Compare(0, lib.EQ, family), Compare(1, lib.MASKED_EQ, kind, _TYPE))
            rules.append(Rule(errno.EPERM, ("socket",), when))
        # Of the protocols only 0, ICMP, TCP and UDP. What is refused by name is not enough: 256 is SMC
        # (Linux 6.10), which moves a connection into memory shared with a peer on this machine, uncounted.
        unwanted = [Compare(2, lib.EQ, n) for n in range(_UDP) if n not in (0, _ICMP, _TCP)]
        for protocol in (*unwanted, Compare(2, lib.GT, _UDP)):  # 64 bits wide: no upper half escapes it
            for kind in (1, 2, 5):  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
                what = (Compare(0, lib.EQ, family), Compare(1, lib.MASKED_EQ, kind, _TYPE), protocol)
                rules.append(Rule(errno.EPROTONOSUPPORT, ("socket",), what))
    return rules


def _namespaces() -> list[Rule]:
    """clone3 passes its flags in memory, where no filter looks: ENOSYS makes libc use clone."""
    rules = [
        Rule(errno.EPERM, ("clone",), (Compare(0, lib.MASKED_EQ, flag, flag),))
        for flag in _NEW_NAMESPACE.values()
    ]
    rules.append(Rule(errno.ENOSYS, ("clone3",)))
    return rules


def _terminals() -> list[Rule]:
    """TIOCSTI types into the caller's terminal, TIOCLINUX pastes into a console (asm/ioctls.h)."""
    return [Rule(errno.EPERM, ("ioctl",), (_low(1, request),)) for request in (0x5412, 0x541C)]


_NEVER = """
    unshare setns mount umount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree
    move_mount mount_setattr ptrace process_vm_readv process_vm_writev process_madvise
    process_mrelease kcmp pidfd_getfd bpf userfaultfd perf_event_open keyctl add_key request_key
    open_by_handle_at name_to_handle_at kexec_load kexec_file_load init_module finit_module
    delete_module reboot swapon swapoff acct quotactl quotactl_fd iopl ioperm syslog settimeofday
    clock_settime clock_adjtime adjtimex stime modify_ldt fanotify_init mbind set_mempolicy
    migrate_pages move_pages lookup_dcookie nfsservctl vhangup
""".split()  # noqa: SIM905 - a list would take a screen
_NOT_THERE = ("io_uring_setup", "io_uring_enter", "io_uring_register")

RULES: tuple[Rule, ...] = (
    *_families(),
    *_kinds(),
    *_namespaces(),
    *_terminals(),
    Rule(errno.EPERM, tuple(_NEVER)),
    Rule(errno.ENOSYS, _NOT_THERE),
)


def _number(name: str) -> int | None:
    """The call's number here; None where the architecture has no such call (aarch64 has no iopl)."""
    try:
        number = lib.resolve_syscall(lib.Arch.NATIVE, name)
    except (ValueError, OSError):
        return None
    return number if number >= 0 else None  # libseccomp gives pseudo-numbers below zero


def _argument(compare: Compare) -> lib.Arg:
    if compare.operator == lib.MASKED_EQ:
        return lib.Arg(compare.argument, lib.MASKED_EQ, compare.mask, compare.value)
    return lib.Arg(compare.argument, compare.operator, compare.value)


def _filter() -> lib.SyscallFilter:
    compiled = lib.SyscallFilter(defaction=lib.ALLOW)
    compiled.set_attr(lib.Attr.ACT_BADARCH, lib.KILL_PROCESS)
    for rule in RULES:
        action = lib.ERRNO(rule.error)
        arguments = [_argument(compare) for compare in rule.when]
        for name in rule.names:
            number = _number(name)
            if number is not None:
                compiled.add_rule(action, number, *arguments)
    return compiled


def _instruction(code: int, true: int, false: int, value: int) -> bytes:
    """struct sock_filter (linux/filter.h)."""
    return struct.pack("=HBBI", code, true, false, value)


def _newer_than_known() -> bytes:
    """if (NEWEST_KNOWN < nr && nr < x32) return ENOSYS; else fall into libseccomp's program."""
    load_number, jump_ge, jump_gt, give = 0x20, 0x35, 0x25, 0x06  # BPF_LD|W|ABS, JGE, JGT, RET
    return b"".join(
        (
            _instruction(load_number, 0, 0, 0),
            _instruction(jump_ge, 2, 0, _X32_BIT),
            _instruction(jump_gt, 0, 1, NEWEST_KNOWN),
            _instruction(give, 0, 0, lib.ERRNO(errno.ENOSYS)),
        )
    )


@functools.lru_cache(maxsize=1)
def program() -> bytes:
    """The whole program, struct sock_filter after struct sock_filter. Made once per process.

    Raises OSError or ValueError from libseccomp: without a filter nothing is run.
    """
    with open(os.memfd_create("egressd-seccomp"), "w+b") as stream:
        _filter().export_bpf(stream)
        stream.seek(0)
        exported = stream.read()
    if not exported or len(exported) % 8:
        raise ValueError("libseccomp gave no program for this machine")
    return _newer_than_known() + exported


def program_descriptor() -> int:
    """A new memfd (close-on-exec) holding the program, at its beginning, as bwrap --seccomp reads it."""
    descriptor = os.memfd_create("egressd-seccomp")
    os.write(descriptor, program())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
