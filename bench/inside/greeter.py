"""The client of the inspector's benchmark: in a sandbox, or in a namespace. Standard library only, one file.

Reads one JSON order per line and answers each with one line. Every connection begins with the same
ClientHello, whatever lies in between, and counts once the far end has answered it. With "to": [host, port]:

    {"do": "stream", "seconds": s, "streams": n}    bytes per second, as the far end got them
    {"do": "connect", "count": n}                   seconds from connect() to the answer, each
    {"do": "flood", "count": n, "at_once": k}       connections per second
    {"do": "hold", "sources": [...], "count": n}    opened and answered; held until the next, or until
    {"do": "drop"}

Started with the hello in hexadecimal digits, and the length of the answer.
"""

import json
import select
import socket
import sys
import threading
import time

BLOCK = memoryview(bytes(1 << 18))


class Greeter:
    def __init__(self, hello: bytes, length: int) -> None:
        self.hello, self.length = hello, length
        self.held: list[socket.socket] = []

    def greet(self, to: tuple[str, int], source: str = "") -> socket.socket:
        sock = socket.create_connection(to, 10, source_address=(source, 0) if source else None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(self.hello)
        left = self.length
        while left:
            data = sock.recv(left)
            if not data:
                raise RuntimeError("the far end hung up instead of answering")
            left -= len(data)
        return sock

    # ---- orders

    def stream(self, to: tuple[str, int], seconds: float, streams: int) -> float:
        found: list[float] = []
        threads = [threading.Thread(target=self._one, args=(to, seconds, found)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) != streams:
            raise RuntimeError("a stream broke")
        return sum(found)

    def _one(self, to: tuple[str, int], seconds: float, found: list[float]) -> None:
        with self.greet(to) as sock:
            sock.settimeout(20)
            began = time.monotonic()
            end, sent = began + seconds, 0
            while time.monotonic() < end:
                sent += sock.send(BLOCK)
            sock.shutdown(socket.SHUT_WR)
            received = int(sock.recv(64))
            if received == sent + len(self.hello):
                found.append(received / (time.monotonic() - began))

    def connect(self, to: tuple[str, int], count: int) -> list[float]:
        times = []
        for _ in range(count):
            began = time.monotonic()
            with self.greet(to):
                times.append(time.monotonic() - began)
        return times

    def flood(self, to: tuple[str, int], count: int, at_once: int) -> float:
        poll, going = select.epoll(), dict[int, socket.socket]()
        begun = done = 0
        began = time.monotonic()
        while done < count:
            while begun < count and len(going) < at_once:
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(to)
                poll.register(sock.fileno(), select.EPOLLOUT)
                going[sock.fileno()] = sock
                begun += 1
            for number, events in poll.poll(10):
                if events & select.EPOLLOUT:
                    going[number].send(self.hello)
                    poll.modify(number, select.EPOLLIN)
                    continue
                sock = going.pop(number)
                if len(sock.recv(1 << 12)) != self.length:
                    raise RuntimeError("a connection got no answer, or half of one")
                sock.close()
                done += 1
        poll.close()
        return count / (time.monotonic() - began)

    def hold(self, to: tuple[str, int], sources: list[str], count: int) -> int:
        self.drop()
        self.held = [self.greet(to, sources[number % len(sources)]) for number in range(count)]
        return len(self.held)

    def drop(self) -> None:
        for sock in self.held:
            sock.close()
        self.held = []


def main(hello: str, length: str) -> None:
    greeter = Greeter(bytes.fromhex(hello), int(length))
    for line in sys.stdin:
        order = json.loads(line)
        work = getattr(greeter, order.pop("do"))
        if "to" in order:
            order["to"] = (socket.gethostbyname(order["to"][0]), order["to"][1])
        print(json.dumps(work(**order)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
