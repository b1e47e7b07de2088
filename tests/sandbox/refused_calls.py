"""Runs inside a sandbox's filter: makes each system call it is told to, and says what came of it.

argv[1] is a JSON list of [name, number, [arguments...]]. Prints {name: errno name, or "ok"}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def attempt(number: int, arguments: list[int]) -> str:
    """In a child, which a call that works by mistake may end or change."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.set_errno(0)
        got = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments))
        code = ctypes.get_errno() if got == -1 else 0
        os.write(writer, (errno.errorcode.get(code, "ok") if code else "ok").encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100).decode()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return said or f"signal {os.WTERMSIG(status)}"


print(json.dumps({name: attempt(number, arguments) for name, number, arguments in json.loads(sys.argv[1])}))
