"""How soon a live stream is cut when its host leaves the policy.

Three moments per revocation, all in CLOCK_MONOTONIC: the request to apply (the file is written already), the
kernel's commit of the batch (seen on its own notification socket, in the gateway), and the reset as the
sandboxed program sees it. From the commit on the guard decides; before it, egressd's own work is counted.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import scene
from lab.daemon import Daemon
from lab.machine import Process, poll

__all__ = ["Applier", "Cut", "cuts"]

NETLINK_NETFILTER, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 12, 270, 1
NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
DELSETELEM, NEWGEN = 10 << 8 | 14, 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES and the message, nf_tables.h


@dataclass(frozen=True)
class Cut:
    """Milliseconds from request and from commit to the reset."""

    from_request: float
    from_commit: float


def cuts(daemon: Daemon, *, names: Sequence[str], policy: Callable[[Sequence[str]], str]) -> list[Cut]:
    """Revoke `names` one by one, each under its own live stream."""
    text = (scene.PROJECT / "bench" / "inside" / "victim.py").read_text()
    victim = daemon.start_sandbox("few", ["/usr/bin/python3", "-I", "-c", text, *names])
    poll(lambda: "open\n" in victim.out or victim.status() is not None, timeout=20, what="streams open")
    with _Commits(daemon) as commits, Applier(daemon) as applier:
        found = []
        for number, name in enumerate(names):
            poll(lambda: f"live {name}\n" in victim.out, what=f"{name} talks: {victim.err}")  # noqa: B023
            time.sleep(0.01)
            daemon.write_policy("few", policy(names[number + 1 :]))
            asked = time.monotonic()
            applier.apply()
            event = _reset(victim, name)
            found.append(Cut((event["at"] - asked) * 1e3, (event["at"] - commits.after(asked)) * 1e3))
    victim.wait()
    return found


def _reset(victim: Process, name: str) -> dict[str, Any]:
    def told() -> dict[str, Any] | None:
        lines = [line for line in victim.out.splitlines() if line.startswith('{"host')]
        return next((event for line in lines if (event := json.loads(line))["host"] == name), None)

    event: dict[str, Any] = poll(told, what=f"the stream to {name} is cut")
    if event["error"] != "ECONNRESET":
        raise RuntimeError(f"the stream to {name} ended with {event['error']}, not with a reset")
    return event


class Applier:
    """Asks the daemon to apply, over a connection that stays: no program has to start in the timed part."""

    def __init__(self, daemon: Daemon) -> None:
        self._process = daemon.lab.start(
            scene.program("applier", daemon.run_dir), env=scene.environment(), cwd=str(scene.PROJECT)
        )
        self._answers = 0
        poll(lambda: "ready\n" in self._process.out, timeout=10, what=f"the applier: {self._process.err}")

    def apply(self) -> float:
        """Returns with the answer: the milliseconds egressd itself took."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"apply\n")
        self._answers += 1
        poll(lambda: len(self._process.out.splitlines()) > self._answers, timeout=120, what="an answer")
        return float(self._process.out.splitlines()[self._answers])

    def __enter__(self) -> Applier:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class _Commits:
    """When the kernel committed batches in the gateway that took elements away.

    The notification of a batch ends with NEWGEN; what it deleted comes before."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = daemon.lab.socket(
            socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER, where=daemon.gateway
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        self._socket.settimeout(0.2)
        self._moments: list[float] = []
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        deleting = False
        while not self._ended:
            try:
                data = self._socket.recv(1 << 17)
            except TimeoutError:
                continue
            at = time.monotonic()
            kinds = _kinds(data)
            deleting |= DELSETELEM in kinds
            if NEWGEN in kinds:
                if deleting:
                    self._moments.append(at)
                deleting = False

    def after(self, moment: float) -> float:
        """The first commit since."""
        found: float = poll(
            lambda: next((at for at in self._moments if at >= moment), None), what="the kernel's commit"
        )
        return found

    def __enter__(self) -> _Commits:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()
        self._socket.close()


def _kinds(data: bytes) -> set[int]:
    """The types of the netlink messages in a datagram (struct nlmsghdr)."""
    kinds = set()
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        kinds.add(kind)
        data = data[(max(length, 16) + 3) & ~3 :]
    return kinds
