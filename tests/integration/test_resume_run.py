"""The real daemon's controller is killed while `egressctl run` goes on: who runs it does not notice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
from typing import Any

import pytest

from egressd.model.errors import Refused
from lab.machine import poll

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
"""
# Sends pieces to the echo, one at a time, until it is told to stop; then says how many came back, and their
# digest. A line for each hundred.
STREAM = """
import hashlib, select, socket, sys
stream, digest, sent = socket.create_connection(("plain.test", 7), 10), hashlib.sha256(), 0
stream.settimeout(10)
while not select.select([sys.stdin], [], [], 0)[0]:
    piece = b"%08d" % sent * 1024
    stream.sendall(piece)
    left = len(piece)
    while left:
        data = stream.recv(left)
        if not data: sys.exit("the stream was cut")
        digest.update(data)
        left -= len(data)
    sent += 1
    if sent % 100 == 0: print("up", sent, flush=True)
print(sent, digest.hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


def replaced(daemon: Any) -> None:
    """SIGKILL to the controller; returns when another answers."""
    before = daemon.pids()["controller"]
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get("controller", before) != before, timeout=10, what="another controller")
    poll(lambda: links(daemon) is not None, timeout=10, what="it answers")


def links(daemon: Any) -> list[str] | None:
    """None while nobody answers."""
    with contextlib.suppress(Refused):
        return [f"eg{sandbox['link']}" for sandbox in daemon.ask("status")["sandboxes"]]
    return None


def records(daemon: Any, event: str, link: str) -> list[dict[str, Any]]:
    segments = sorted(daemon.lab.path(f"{daemon.directory}/state/journal").glob("*.jsonl"))
    lines = [json.loads(line) for segment in segments for line in segment.read_text().splitlines()]
    return [line["fields"] for line in lines if line["event"] == event and line["fields"].get("link") == link]


def test_a_stream_does_not_notice(daemon: Any) -> None:
    process = daemon.start_sandbox("acme", ["/usr/bin/python3", "-I", "-c", STREAM])
    poll(lambda: "up 100\n" in process.out, timeout=20, what=f"it streams: {process.err}")
    (link,) = links(daemon) or ()
    for _ in range(2):
        replaced(daemon)
        poll(lambda: links(daemon) == [link], timeout=10, what="the same lease")
        seen = process.out.count("up")
        poll(lambda seen=seen: process.out.count("up") > seen, timeout=10, what="it goes on")
    process.stdin.write(b"\n")
    status = process.wait(20)
    process.drain()
    sent, told = process.out.splitlines()[-1].split()
    digest = hashlib.sha256()
    for number in range(int(sent)):
        digest.update(b"%08d" % number * 1024)
    assert (status, process.err, told) == (0, "", digest.hexdigest())
    poll(lambda: links(daemon) == [] and daemon.sandbox_links() == [], timeout=5, what="nothing is left")
    poll(lambda: records(daemon, "sandbox-closed", link), timeout=5, what="its end is on record")
    (closed,) = records(daemon, "sandbox-closed", link)
    assert closed["exit"] == 0, "its last word was told to the last controller"
    assert len(records(daemon, "sandbox-resumed", link)) == 2
    account = daemon.counters("acme")
    assert account["balance"]["balanced"], account["balance"]


def test_a_command_that_ends_while_nobody_is_there(daemon: Any) -> None:
    process = daemon.start_sandbox("acme", ["/bin/sh", "-c", "echo up; read line; exit 7"])
    poll(lambda: "up\n" in process.out, timeout=20, what=f"it runs: {process.err}")
    daemon.lab.signal(daemon.pids()["controller"], signal.SIGKILL)
    process.stdin.write(b"\n")
    assert (process.wait(20), process.err) == (7, "")
    # its link went with its network; it is accounted for when nobody has come back (test_resume.py)
    poll(lambda: daemon.sandbox_links() == [], timeout=10, what="no link is left")
