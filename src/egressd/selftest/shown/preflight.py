"""The cheapest handful, tried by the sandbox's gate right before its command: if one succeeds, nothing runs.

Given to the gate as text, not as a file: a sandbox need not be shown a directory for it. `_socket` and not
`socket`: what that imports besides costs half of all this. Exit status 0: everything was refused.
"""

from __future__ import annotations

import _socket
import ctypes
import os
import struct
import sys
from collections.abc import Callable

_SETNS, _UNSHARE = (308, 272) if os.uname().machine == "x86_64" else (268, 97)  # asm/unistd.h
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_WAIT = 5.0  # seconds. What is refused is refused at once; silence means that it went somewhere
_UNLISTED = b"\x08selftest\x07egressd\x07example\0"


def _connected(family: int, address: str) -> bool:
    sock = _socket.socket(family, _socket.SOCK_STREAM)
    try:
        sock.settimeout(_WAIT)
        sock.connect((address, 443))
    finally:
        sock.close()
    return True


def _answered() -> bool:
    """An unlisted name has an answer with a record in it."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        sock.settimeout(1.0)  # silence is no answer
        sock.connect(("169.254.53.53", 53))
        sock.send(struct.pack("!6H", 0x5353, 0x0100, 1, 0, 0, 0) + _UNLISTED + struct.pack("!2H", 1, 1))
        return sock.recv(4096)[6:8] != b"\0\0"
    except TimeoutError:
        return False
    finally:
        sock.close()


def _made(family: int, kind: int) -> bool:
    """Never connected."""
    _socket.socket(family, kind, 0).close()
    return True


def _called(number: int, *arguments: int) -> bool:
    return bool(ctypes.CDLL(None).syscall(number, *arguments) != -1)


def _seen(path: str) -> bool:
    return os.path.lexists(path)


def _entered() -> bool:
    descriptor = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    return _called(_SETNS, descriptor, 0)


def handful(run_dir: str) -> tuple[tuple[str, Callable[[], bool]], ...]:
    return (
        ("a vsock socket", lambda: _made(40, _socket.SOCK_STREAM)),
        ("a packet socket", lambda: _made(17, _socket.SOCK_RAW)),
        ("entering a namespace", _entered),
        ("a new network namespace", lambda: _called(_UNSHARE, _CLONE_NEWNET)),
        ("a new user namespace", lambda: _called(_UNSHARE, _CLONE_NEWUSER)),
        ("egressd's control socket", lambda: _seen(f"{run_dir}/control.sock")),
        ("a raw IPv4 address", lambda: _connected(_socket.AF_INET, "192.0.2.1")),
        ("a raw IPv6 address", lambda: _connected(_socket.AF_INET6, "2001:db8::1")),
        ("a name that is not listed", _answered),
    )


def main(run_dir: str) -> int:
    escaped = []
    for name, tried in handful(run_dir):
        try:
            if tried():
                escaped.append(name)
        except TimeoutError:
            escaped.append(name)
            break  # as slow as this the rest would be
        except OSError:  # refused, one way or another
            continue
    for name in escaped:
        print(f"egressctl: preflight: {name} is not refused: nothing is run", file=sys.stderr)
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
