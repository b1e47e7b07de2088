"""What a sandbox tries, and what came of it. This file is also the program that runs inside.

`probe(daemon, attempts)` runs all attempts in one sandbox and returns one `Outcome` each. An attempt is a
tuple: ("tcp", address or name, port, data), ("udp", ...), ("resolve", name, family), ("ask", server, name),
("socket", family, kind, protocol), ("hold", address or name, port): a TCP connection that stays open, of a
Resident; ("release", how many) closes the latest of those.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

TIMEOUT = 5.0  # seconds; what is not denied within it was dropped in silence


@dataclass(frozen=True)
class Outcome:
    attempt: tuple[Any, ...]
    result: str  # "ok", an errno's name, "timeout", a resolver error's name
    milliseconds: float
    data: str = ""


def probe(
    daemon: Any, attempts: Sequence[tuple[Any, ...]], *, workspace: str = "acme", **options: Any
) -> list[Outcome]:
    text = open(__file__, encoding="utf-8").read()  # noqa: SIM115, PTH123
    argv = ["/usr/bin/python3", "-I", "-c", text, json.dumps([list(attempt) for attempt in attempts])]
    result = daemon.sandbox(workspace, argv, **options).check()
    return [
        Outcome(tuple(attempt), *found)
        for attempt, found in zip(attempts, json.loads(result.out), strict=True)
    ]


class Resident:
    """A sandbox that stays and makes attempts when asked to."""

    def __init__(
        self, daemon: Any, *, workspace: str = "acme", timeout: float = TIMEOUT, uid: int | None = None
    ) -> None:
        text = open(__file__, encoding="utf-8").read()  # noqa: SIM115, PTH123
        text = text.replace(f"TIMEOUT = {TIMEOUT}", f"TIMEOUT = {timeout}")
        self.process = daemon.start_sandbox(workspace, ["/usr/bin/python3", "-I", "-c", text], uid=uid)
        self._answers = 0
        self.tries(("socket", 2, 1))

    def tries(self, *attempts: tuple[Any, ...], within: float = 60.0) -> list[Outcome]:
        self.process.stdin.write(json.dumps([list(attempt) for attempt in attempts]).encode() + b"\n")
        self._answers += 1
        deadline = time.monotonic() + within
        while len(self.process.out.splitlines()) < self._answers or not self.process.out.endswith("\n"):
            if self.process.status() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the resident ended or hangs: {self.process.err}")
            time.sleep(0.002)
        found = json.loads(self.process.out.splitlines()[self._answers - 1])
        return [Outcome(tuple(attempt), *each) for attempt, each in zip(attempts, found, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def tcp(host: str, port: int, data: str = "") -> str:
    with socket.create_connection((host, port), timeout=TIMEOUT) as connection:
        connection.settimeout(TIMEOUT)
        if not data:
            return ""
        connection.sendall(data.encode())
        return connection.recv(65536).decode(errors="replace")


def udp(host: str, port: int, data: str = "x") -> str:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(address)
        sock.send(data.encode())
        return sock.recv(65536).decode(errors="replace")


def resolve(name: str, family: str = "any") -> str:
    number = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(family, socket.AF_UNSPEC)
    found = socket.getaddrinfo(name, None, number, socket.SOCK_STREAM)
    return " ".join(sorted({str(entry[4][0]) for entry in found}))


def ask(server: str, name: str) -> str:
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    packet = struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + question + b"\0" + struct.pack("!2H", 1, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((server, 53))
        sock.send(packet)
        return f"rcode {sock.recv(4096)[3] & 15}"


HELD: list[socket.socket] = []


def hold(host: str, port: int) -> str:
    HELD.append(socket.create_connection((host, port), timeout=TIMEOUT))
    return ""


def release(count: int) -> str:
    for _ in range(count):
        HELD.pop().close()
    return ""


def make(family: int, kind: int, protocol: int = 0) -> str:
    socket.socket(family, kind, protocol).close()
    return ""


TRIES = {"tcp": tcp, "udp": udp, "resolve": resolve, "ask": ask, "socket": make}
TRIES |= {"hold": hold, "release": release}


def attempt(kind: str, *arguments: Any) -> tuple[str, float, str]:
    began = time.monotonic()
    data = ""
    try:
        data = TRIES[kind](*arguments)  # type: ignore[operator]
        result = "ok"
    except socket.gaierror as error:
        result = {getattr(socket, n): n for n in dir(socket) if n.startswith("EAI_")}.get(
            error.errno, str(error)
        )
    except TimeoutError:
        result = "timeout"
    except OSError as error:
        result = errno.errorcode.get(error.errno or 0, str(error))
    return result, (time.monotonic() - began) * 1000, data


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps([attempt(*each) for each in json.loads(sys.argv[1])]))
    else:
        for line in sys.stdin:
            print(json.dumps([attempt(*each) for each in json.loads(line)]), flush=True)
