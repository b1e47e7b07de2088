"""Network namespaces: entering, pinning, and telling whose one is.

`verify` is the gate for descriptors that strangers send. A namespace's identity is (st_dev, st_ino) of its
nsfs file; its owner is the user who made the user namespace it belongs to. Both never change, so there is
no race between the check and the use of the same descriptor. No process id is ever looked at.

Python 3.11 has neither setns(2) nor unshare(2); both come by ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from egressd.kernel.netlink import Netlink, Request, attribute, attributes
from egressd.model.errors import KernelError, Refused
from egressd.model.verdicts import Reason

__all__ = [
    "Identity", "enter", "identity", "inside", "number", "open_own", "own_identity", "pin", "throw_away",
    "unpin", "verify",
]  # fmt: skip

Identity = tuple[int, int]  # st_dev, st_ino

_CLONE_NEWNET = 0x4000_0000  # linux/sched.h
_NSFS_MAGIC = 0x6E73_6673  # linux/magic.h
_NS_GET_USERNS, _NS_GET_NSTYPE, _NS_GET_OWNER_UID = 0xB701, 0xB703, 0xB704  # linux/nsfs.h
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 1 << 20, 2  # linux/mount.h
_RTM_GETNSID = 90  # linux/rtnetlink.h
_NETNSA_NSID, _NETNSA_FD = 1, 3  # linux/net_namespace.h
_OWN = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def identity(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def open_own() -> int:
    """A descriptor of this thread's network namespace."""
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def enter(descriptor: int) -> None:
    """setns(2): this thread lives in that network namespace from now on. Needs CAP_SYS_ADMIN."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise _error("the network namespace cannot be entered")


@contextlib.contextmanager
def inside(descriptor: int) -> Iterator[None]:
    """Sockets and /proc/sys/net used in the block are the other namespace's."""
    own = open_own()
    try:
        enter(descriptor)
        try:
            yield
        finally:
            enter(own)
    finally:
        os.close(own)


@contextlib.contextmanager
def throw_away() -> Iterator[None]:
    """The block runs in a network namespace of its own, which ends with it."""
    own = open_own()
    try:
        _unshare()
        try:
            yield
        finally:
            enter(own)
    finally:
        os.close(own)


def _unshare() -> None:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise _os_error()


def _os_error() -> OSError:
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---- whose is it


def verify(descriptor: int, *, owner: int, forbidden: Collection[Identity] = ()) -> Identity:
    """The identity of a network namespace fit for a sandbox of user `owner`; `Refused` if it is not one.

    Fit is: a network namespace; not this process's own (the gateway), nor one of `forbidden`; belonging
    to a user namespace other than the one the gateway belongs to (on a host that is init's, in a rootless
    lab the lab's), which `owner` made.
    """
    if _filesystem(descriptor) != _NSFS_MAGIC or _ioctl(descriptor, _NS_GET_NSTYPE) != _CLONE_NEWNET:
        raise _refused("the descriptor is not a network namespace")
    own = open_own()
    try:
        found = identity(descriptor)
        if found == identity(own) or found in forbidden:
            raise _refused("the network namespace is in use: the host's, the gateway's or another sandbox's")
        maker, same = _maker(descriptor, own)
    finally:
        os.close(own)
    if same:
        raise _refused("the network namespace belongs to no user namespace of its own")
    if maker != owner:
        raise _refused(f"the network namespace was not made by user {owner}")
    return found


def number(route: Netlink, descriptor: int) -> int | None:
    """What the namespace of `route` calls the one of this descriptor: a number that the kernel gives it when
    a device of ours first leads there, and that stays its own while both live. None if it has none.

    RTM_GETNSID (rtnl_net_getid), linux/net_namespace.h. KernelError for what is no network namespace.
    """
    body = bytes(4) + attribute(_NETNSA_FD, struct.pack("=I", descriptor))
    for reply in route.ask(Request(_RTM_GETNSID, body, "ask for a namespace's number")):
        found = dict(attributes(reply.body[4:])).get(_NETNSA_NSID)  # struct rtgenmsg, padded
        if found is not None:
            value = int(struct.unpack_from("=i", found)[0])
            return value if value >= 0 else None  # NETNSA_NSID_NOT_ASSIGNED
    return None


def _maker(descriptor: int, own: int) -> tuple[int | None, bool]:
    """Who made the user namespace that `descriptor` belongs to; and whether it is `own`'s as well."""
    user = _ioctl(descriptor, _NS_GET_USERNS)
    if user < 0:  # EPERM: outside our own user namespace and its descendants
        return None, False
    try:
        ours = _ioctl(own, _NS_GET_USERNS)
        # The kernel does not show a namespace's owner when it lies above the asker's user namespace
        # (EPERM); such an owner is none of a sandbox's either way, so only equality matters.
        same = ours >= 0 and identity(user) == identity(ours)
        if ours >= 0:
            os.close(ours)
        buffer = bytearray(4)
        try:
            fcntl.ioctl(user, _NS_GET_OWNER_UID, buffer)
        except OSError:
            return None, same
        return struct.unpack("=I", buffer)[0], same
    finally:
        os.close(user)


def _ioctl(descriptor: int, request: int) -> int:
    """The ioctl's own result, or -1."""
    try:
        return fcntl.ioctl(descriptor, request)
    except OSError:
        return -1


def _filesystem(descriptor: int) -> int:
    """f_type of fstatfs(2), its first word (asm-generic/statfs.h); os.fstatvfs does not show it."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(descriptor, buffer) != 0:
        return 0
    return int(ctypes.c_ulong.from_buffer(buffer).value)


def _refused(text: str) -> Refused:
    return Refused(Reason.NAMESPACE, f"{text}; {Reason.NAMESPACE.text}")


# ---- pins, as `ip netns` makes and reads them


def pin(name: str, *, directory: str = "/run/netns") -> tuple[int, bool]:
    """Open the network namespace pinned as `name`, making it first if there is none.

    Returns its descriptor and whether it was made. A file left over from a pin that is gone (after a
    reboot on a persistent /run) is replaced. KernelError if it cannot be done.
    """
    place = Path(directory, name)
    try:
        _share(directory)
        adopted = _adopt(place)
        if adopted is not None:
            return adopted, False
        return _make(place), True
    except OSError as error:
        raise KernelError(
            f"the gateway cannot be pinned at {place}: {error.strerror};"
            " this step needs CAP_SYS_ADMIN and a writable /run that is shared with the host"
        ) from error


def unpin(name: str, *, directory: str = "/run/netns") -> bool:
    """Remove the pin; True if there was one. The namespace ends with its last process."""
    place = Path(directory, name)
    if not place.exists():
        return False
    if _libc.umount2(bytes(place), _MNT_DETACH) != 0 and ctypes.get_errno() != errno.EINVAL:
        raise _error(f"{place} cannot be unmounted")
    place.unlink()
    return True


def _share(directory: str) -> None:
    """Make the directory a shared mount, as iproute2 does, so that pins show in every mount namespace
    that was made from this one, whichever of both began."""
    Path(directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        _mount("", directory, _MS_SHARED | _MS_REC)
        return
    # EINVAL: it is no mount yet
    _mount(directory, directory, _MS_BIND | _MS_REC)
    _mount("", directory, _MS_SHARED | _MS_REC)


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(source.encode(), target.encode(), b"none", flags, None) != 0:
        raise _os_error()


def _adopt(place: Path) -> int | None:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if _filesystem(descriptor) != _NSFS_MAGIC:
        os.close(descriptor)
        place.unlink()
        return None
    if _ioctl(descriptor, _NS_GET_NSTYPE) != _CLONE_NEWNET or identity(descriptor) == own_identity():
        os.close(descriptor)
        raise KernelError(f"{place} is not a network namespace of egressd's; remove it")
    return descriptor


def _make(place: Path) -> int:
    own = open_own()
    os.close(os.open(place, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _unshare()
        try:
            _mount(_OWN, str(place), _MS_BIND)
            return open_own()
        finally:
            enter(own)
    except BaseException:
        place.unlink()
        raise
    finally:
        os.close(own)


def own_identity() -> Identity:
    own = open_own()
    try:
        return identity(own)
    finally:
        os.close(own)


def _error(what: str) -> KernelError:
    return KernelError(f"{what}: {os.strerror(ctypes.get_errno())}")
