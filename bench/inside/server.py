"""What the data path benchmark talks to: a port that swallows streams, one that accepts and lets go.

`python -m bench.inside.server`; says "ready", ends with its standard input.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

SWALLOW, ACCEPT = 7001, 7002


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(4096)
    return listener


def _swallow(listener: socket.socket) -> None:
    """Read to the end of each stream, then say how many bytes came."""
    buffer = bytearray(1 << 20)
    while True:
        stream, _ = listener.accept()
        with stream, contextlib.suppress(OSError):
            total = 0
            while count := stream.recv_into(buffer):
                total += count
            stream.sendall(str(total).encode())


def _accept(listener: socket.socket) -> None:
    while True:
        with contextlib.suppress(OSError):
            listener.accept()[0].close()


def main() -> int:
    for port, work in ((SWALLOW, _swallow), (ACCEPT, _accept)):
        threading.Thread(target=work, args=(_listener(port),), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
