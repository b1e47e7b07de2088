"""The server of the inspector's benchmark: answers a ClientHello as a server begins to, then listens.

    python -m bench.inside.greeted HELLO ANSWER PORT...     (bytes in hexadecimal digits)

Says "ready", ends with its standard input. Each connection is read to its end; then it is told how many bytes
came, hello included, and closed. One thread waits for many connections; a stream that talks gets its own.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading

__all__ = ["main"]


class Server:
    def __init__(self, hello: int, answer: bytes, ports: list[int]) -> None:
        self._hello, self._answer = hello, answer
        self._poll = select.epoll()
        self._listeners = {listener.fileno(): listener for listener in map(_listener, ports)}
        self._streams: dict[int, tuple[socket.socket, int]] = {}
        for number in self._listeners:
            self._poll.register(number, select.EPOLLIN)

    def run(self) -> None:
        while True:
            for number, _ in self._poll.poll():
                if number in self._listeners:
                    self._accept(self._listeners[number])
                else:
                    with contextlib.suppress(OSError):
                        self._hear(number)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(16):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self._streams[sock.fileno()] = (sock, 0)
            self._poll.register(sock.fileno(), select.EPOLLIN)

    def _hear(self, number: int) -> None:
        sock, before = self._streams.pop(number)
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            sock.close()
            return
        total = before + len(data)
        if before < self._hello <= total:
            sock.send(self._answer)
        if not data:
            if before > self._hello:
                sock.send(str(total).encode())
            sock.close()
        elif total > self._hello:
            self._poll.unregister(number)
            threading.Thread(target=_swallow, args=(sock, total), daemon=True).start()
        else:
            self._streams[number] = (sock, total)


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def _swallow(sock: socket.socket, total: int) -> None:
    """Read to the end, then say how many bytes came."""
    buffer = bytearray(1 << 20)
    sock.setblocking(True)
    with sock, contextlib.suppress(OSError):
        while count := sock.recv_into(buffer):
            total += count
        sock.sendall(str(total).encode())


def main(hello: str, answer: str, *ports: str) -> int:
    server = Server(len(bytes.fromhex(hello)), bytes.fromhex(answer), [int(port) for port in ports])
    threading.Thread(target=server.run, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
