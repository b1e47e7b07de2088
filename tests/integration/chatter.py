"""Open flows that keep talking. This file is also the program that runs inside the sandbox.

`Chatter(daemon, flows)` opens each flow ("tcp4 plain.test 7"), then sends a line on each in turn, waits for
its echo, and goes on until told to stop. It tells when (CLOCK_MONOTONIC, the same everywhere on a machine) a
flow failed and how, and how many echoes each had.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

MARKER = "chatter-5b1e"
PATIENCE = 1.0  # seconds an echo may take


class Chatter:
    """A running sandbox with open flows."""

    def __init__(self, daemon: Any, flows: Sequence[str], *, workspace: str = "acme") -> None:
        from lab.machine import poll

        self._poll = poll
        self.flows = list(flows)
        text = open(__file__, encoding="utf-8").read()  # noqa: SIM115, PTH123
        self.process = daemon.start_sandbox(workspace, ["/usr/bin/python3", "-I", "-c", text, *flows])
        poll(lambda: "open\n" in self.process.out, timeout=10, what=f"flows open: {self.process.err}")

    def events(self) -> list[dict[str, Any]]:
        """What happened so far: {"flow", "error", "at"} of each flow that failed."""
        return [json.loads(line) for line in self.process.out.splitlines() if line.startswith('{"flow')]

    def failed(self, flow: str) -> dict[str, Any] | None:
        return next((event for event in self.events() if event["flow"] == flow), None)

    def wait_for_failure(self, flow: str, *, timeout: float = 5.0) -> dict[str, Any]:
        found: dict[str, Any] = self._poll(lambda: self.failed(flow), timeout=timeout, what=f"{flow} fails")
        return found

    def beats(self) -> dict[str, int]:
        """Echoes so far, by flow; asks the sandbox."""
        before = self.process.out.count('{"beats')
        self.process.stdin.write(b"?\n")
        self._poll(lambda: self.process.out.count('{"beats') > before, timeout=5, what="an answer")
        line = [line for line in self.process.out.splitlines() if line.startswith('{"beats')][-1]
        found: dict[str, int] = json.loads(line)["beats"]
        return found

    def go_on(self, *, timeout: float = 5.0) -> None:
        """Wait until every flow has had another echo."""
        before = self.beats()
        self._poll(
            lambda: all(now > then for now, then in zip(self.beats().values(), before.values(), strict=True)),
            timeout=timeout,
            what="every flow goes on",
        )

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.status() is None:
            self.stop()


def _open(flow: str) -> socket.socket:
    kind, host, port = flow.split()
    family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
    number = socket.SOCK_STREAM if kind.startswith("tcp") else socket.SOCK_DGRAM
    address = socket.getaddrinfo(host, int(port), family, number)[0][4]
    sock = socket.socket(family, number)
    sock.settimeout(PATIENCE)
    sock.connect(address)
    return sock


def _beat(sock: socket.socket, number: int) -> None:
    sock.send(f"{MARKER} {number}\n".encode())
    if not sock.recv(4096):
        raise ConnectionResetError(errno.ECONNRESET, "end of file")


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(flows: list[str]) -> None:
    open_flows = {flow: _open(flow) for flow in flows}
    beats = dict.fromkeys(flows, 0)
    print("open", flush=True)
    while True:
        if select.select([0], [], [], 0 if open_flows else 0.01)[0]:
            if not sys.stdin.readline():
                return
            _say(beats=beats)
        for flow, sock in list(open_flows.items()):
            try:
                _beat(sock, beats[flow])
                beats[flow] += 1
            except OSError as error:
                at = time.monotonic()
                name = "timeout" if isinstance(error, TimeoutError) else errno.errorcode.get(error.errno or 0)
                _say(flow=flow, error=name, at=at)
                del open_flows[flow]


if __name__ == "__main__":
    main(sys.argv[1:])
