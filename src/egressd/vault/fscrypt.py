"""Encrypting one empty directory with a key of its own (linux/fscrypt.h, version 2 policies).

For a scratch on disk: what is written there is ciphertext, names included, and when the key is gone it stays
so, for whoever takes the disk as well as for a file system that still has the blocks of removed files. The
key is 64 random bytes that only the kernel keeps; this process forgets its own copy at once.

The file system must have been made for it: mkfs.ext4 -O encrypt, or tune2fs -O encrypt later; or f2fs, ubifs.
No privilege is needed. The key belongs to the account that added it, and it outlives the process that did: a
key is removed by its identifier, which the directory's policy names to whoever cleans up after a death.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

__all__ = ["encrypt", "identifier_of", "remove_key"]

# _IOR('f', 19, 12 bytes), _IOWR('f', 22, 9), _IOWR('f', 23, 80), _IOWR('f', 24, 64), _IOWR('f', 26, 128)
_SET_POLICY, _GET_POLICY_EX = 0x800C6613, 0xC0096616
_ADD_KEY, _REMOVE_KEY, _KEY_STATUS = 0xC0506617, 0xC0406618, 0xC080661A
_VERSION_2, _BY_IDENTIFIER = 2, 2
_AES_256_XTS, _AES_256_CTS, _PAD_32 = 1, 4, 0x03
_KEY = 64  # bytes: FSCRYPT_MAX_KEY_SIZE
_ABSENT, _PRESENT = 1, 2
_BUSY, _OTHERS = 0x1, 0x2  # of removal_status_flags


def encrypt(directory: int) -> None:
    """Give the empty directory (open for reading) a new key. `Refused` where its file system does not
    encrypt."""
    # struct fscrypt_add_key_arg: the specifier (type, reserved, 32 bytes of union), raw_size, key_id,
    # 8 reserved words, the key
    order = bytearray(struct.pack("=II32xII32x", _BY_IDENTIFIER, 0, _KEY, 0) + os.urandom(_KEY))
    try:
        fcntl.ioctl(directory, _ADD_KEY, order)
        identifier = bytes(order[8:24])
    except OSError as error:
        raise _refused(error) from error
    finally:
        order[-_KEY:] = bytes(_KEY)
    policy = struct.pack("=BBBB4x16s", _VERSION_2, _AES_256_XTS, _AES_256_CTS, _PAD_32, identifier)
    try:
        fcntl.ioctl(directory, _SET_POLICY, policy)
    except OSError as error:
        remove_key(directory, identifier)
        raise _refused(error) from error


def identifier_of(directory: int) -> bytes | None:
    """The identifier of a directory's key, whether or not the key is still there; None for a plain one."""
    # struct fscrypt_get_policy_ex_arg: u64 policy_size, the policy
    answer = bytearray(struct.pack("=Q24x", 24))
    try:
        fcntl.ioctl(directory, _GET_POLICY_EX, answer)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTTY):
            return None
        raise
    return bytes(answer[16:32]) if answer[8] == _VERSION_2 else None


def remove_key(anywhere: int, identifier: bytes) -> str:
    """Have the kernel forget the key. `anywhere` is a descriptor of the same file system. Says what is wrong
    if it is still there: files that are open keep it."""
    order = bytearray(struct.pack("=II16s16xI20x", _BY_IDENTIFIER, 0, identifier, 0))
    try:
        fcntl.ioctl(anywhere, _REMOVE_KEY, order)
    except OSError as error:
        return "" if error.errno == errno.ENOKEY else f"its key cannot be removed: {error.strerror}"
    flags = struct.unpack_from("=I", order, 40)[0]
    if flags & _OTHERS:
        return "its key was added by another account, too"
    if flags & _BUSY or _status(anywhere, identifier) != _ABSENT:
        return "its key is still in the kernel, because files are open"
    return ""


def _status(anywhere: int, identifier: bytes) -> int:
    # struct fscrypt_get_key_status_arg: specifier, 6 reserved words; status, flags, user_count, 13 words
    order = bytearray(struct.pack("=II16s16x24xIII52x", _BY_IDENTIFIER, 0, identifier, 0, 0, 0))
    fcntl.ioctl(anywhere, _KEY_STATUS, order)
    return int(struct.unpack_from("=I", order, 64)[0])


def _refused(error: OSError) -> Refused:
    remedy = {
        errno.EOPNOTSUPP: "its file system was not made for it: tune2fs -O encrypt DEVICE",
        errno.ENOTTY: "its file system cannot: use ext4 or f2fs",
        errno.ENOPKG: "the kernel lacks AES-XTS or CTS",
        errno.EDQUOT: "this account has too many keys: see kernel.keys.maxkeys",
    }.get(error.errno or 0, error.strerror or "")
    return Refused(Reason.UNAVAILABLE, f"the scratch directory cannot be encrypted: {remedy}")
