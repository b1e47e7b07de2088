"""A program whose first instructions tell the time: what a sandbox's command is in the spawn benchmark.

It writes CLOCK_MONOTONIC to standard output as a struct timespec (16 bytes) and ends. Made here byte by byte
instead of by a compiler, so that nothing has to be installed and nothing (loader, libc, locale) runs before
it. On other machines than x86-64 a Python one-liner stands in, and its start-up counts for all peers alike.
"""

from __future__ import annotations

import platform
import struct
import sys
from pathlib import Path

__all__ = ["STAND_IN", "command", "nanoseconds"]

STAND_IN = "import os,struct,time;n=time.monotonic_ns();os.write(1,struct.pack('=qq',n//10**9,n%10**9))"
_BASE = 0x400000
_CODE = bytes.fromhex(
    "4883ec10"  # sub  $16, %rsp
    "b8e4000000"  # mov  $228, %eax       clock_gettime(
    "bf01000000"  # mov  $1, %edi           CLOCK_MONOTONIC,
    "4889e6"  # mov  %rsp, %rsi         here)
    "0f05"  # syscall
    "b801000000"  # mov  $1, %eax         write(
    "bf01000000"  # mov  $1, %edi           standard output,
    "4889e6"  # mov  %rsp, %rsi         here,
    "ba10000000"  # mov  $16, %edx          sizeof(struct timespec))
    "0f05"  # syscall
    "b83c000000"  # mov  $60, %eax        exit(
    "31ff"  # xor  %edi, %edi         0)
    "0f05"  # syscall
)


def command(directory: Path, *, seen_as: str) -> list[str]:
    """Put the program into `directory`; the command line where that is visible as `seen_as`."""
    if platform.machine() != "x86_64":
        return [
            sys.executable if seen_as == str(directory) else "/usr/bin/python3",
            "-I",
            "-S",
            "-c",
            STAND_IN,
        ]
    path = directory / "first"
    path.write_bytes(_elf())
    path.chmod(0o755)
    return [f"{seen_as}/first"]


def nanoseconds(output: bytes) -> int:
    """What it wrote, as time.monotonic_ns() counts. ValueError if it never ran."""
    if len(output) != 16:
        raise ValueError(f"the command did not tell the time: {output!r}")
    seconds, rest = struct.unpack("=qq", output)
    return seconds * 1_000_000_000 + rest


def _elf() -> bytes:
    """elf(5): a header, one segment that holds the whole file, readable and executable."""
    size = 64 + 56 + len(_CODE)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian, version 1
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return identity + header + segment + _CODE
