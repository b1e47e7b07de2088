"""Requests without a service: a job in, what its runner says out. For the tests of cycle and runners.

The test plays the service, as root; zygote, runners and sandboxes are an ordinary account's.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from egressd.broker.runners.zygote import PROGRAM, Run, Runners, jobs
from sandbox.stand_in import Returning, as_caller, eventually, gateway_named, processes_with

__all__ = ["Told", "World", "a_runners_world", "descendants", "eventually", "nothing_left", "world"]

HERE = Path(__file__).resolve().parent
# In their order.
STEPS = (
    "begun", "scratch", "projecting", "projected", "go", "leased", "recorded", "started", "dead", "destroyed",
    "recorded the end", "told",
)  # fmt: skip


@dataclass
class Told:
    """All that one runner said."""

    messages: list[Any] = field(default_factory=list)

    @property
    def finished(self) -> jobs.Finished:
        (last,) = (m for m in self.messages if isinstance(m, jobs.Finished))
        return last

    def stream(self, name: str) -> bytes:
        return b"".join(m.data for m in self.messages if isinstance(m, jobs.Output) and m.stream == name)

    @property
    def out(self) -> bytes:
        return self.stream("stdout")

    @property
    def err(self) -> bytes:
        return self.stream("stderr")

    @property
    def kinds(self) -> list[str]:
        """Runs of the same kind once."""
        names = [type(m).__name__ for m in self.messages]
        return [n for i, n in enumerate(names) if i == 0 or n != names[i - 1]]


@dataclass
class World:
    runners: Runners
    run_dir: Path
    documents: Path
    gateway: Returning | None = None
    # By which a sandbox of this world is known, and its copies: others may be tested on this machine.
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    size: int = field(default_factory=lambda: (64 << 20) + 4096 * secrets.randbelow(1 << 12))

    # ---- what is asked

    def write(self, path: str, text: bytes = b"text\n") -> None:
        place = self.documents / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)

    def copy(self, path: str) -> jobs.Copy:
        data = (self.documents / path).read_bytes()
        return jobs.Copy(
            id=f"docs:{path}", root=os.fsencode(self.documents), path=path.encode(), size=len(data),
            digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        )  # fmt: skip

    def job(self, *command: str, **more: Any) -> jobs.Job:
        settings: dict[str, Any] = {
            "id": name(), "workspace": "plain", "command": command, "copies": (), "asker": "user:okta:u1",
            "role": "viewer", "discarded": 0, "action": "command", "run_dir": str(self.run_dir),
            "scratch_size": self.size,
        }  # fmt: skip
        environment = {"WORLD": self.token} | more.pop("environment", {})
        return jobs.Job(**(settings | more), environment=environment)

    def python(self, script: str, **more: Any) -> jobs.Job:
        return self.job("/usr/bin/python3", "-c", script, **more)

    # ---- and what comes of it

    def told(self, job: jobs.Job) -> Told:
        """To the end, having said go."""
        with self.runners.run(job) as run:
            run.channel.socket.settimeout(30)
            return listen(run)

    def records(self, request: str) -> list[dict[str, Any]]:
        """What the stand-in for egressd has been told about a request."""
        path = self.run_dir / "testified.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line["fields"].get("request") == request]

    def leavings(self) -> list[str]:
        """Whatever of any request is still there: processes, mounts, links."""
        found = [f"process {pid}" for pid in descendants(self.runners.pid)] if self.runners.pid else []
        found += [f"process {pid}: bwrap" for pid in processes_with(self.token)]
        found += [f"mount in {pid}" for pid in seeing_copies(self.size)]
        return found + (self.gateway.links() if self.gateway is not None else [])

    def nothing_left(self, *, within: float = 5.0) -> None:
        assert eventually(lambda: not self.leavings(), within=within), self.leavings()


def name() -> str:
    return "r-" + base64.b32encode(secrets.token_bytes(17)).decode().lower()[:26].translate(
        str.maketrans("=", "0")
    )


def listen(run: Run, told: Told | None = None) -> Told:
    told = told or Told()
    for message in run:
        told.messages.append(message)
        if isinstance(message, jobs.Projected):
            run.go()
    return told


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    found, waiting = [], [pid]
    while waiting:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{waiting[-1]}/task/{waiting.pop()}/children").read_text()
            children = [int(word) for word in text.split()]
            found += children
            waiting += children
    return found


def seeing_copies(size: int) -> list[int]:
    """Processes in whose mount namespace a private scratch of that size is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (entry / "mountinfo").read_text().splitlines()
                if any(f" - tmpfs egressd rw,size={size >> 10}k," in sealed(line) for line in lines):
                    found.append(int(entry.name))
    return found


def sealed(line: str) -> str:
    return line.replace(" egressd ro,", " egressd rw,")


_worlds = itertools.count()


@contextlib.contextmanager
def a_runners_world(
    *, faulty: bool = False, most: int = 64, daemon: str = "fake_daemon.py"
) -> Iterator[World]:
    if os.getuid() != 0:
        pytest.skip("the stand-in for egressd makes links: root only")
    zygote = [sys.executable, str(HERE / "faulty_zygote.py")] if faulty else list(PROGRAM)
    with (
        gateway_named(f"rq-{os.getpid()}-{next(_worlds)}", program=daemon) as gateway,
        tempfile.TemporaryDirectory(prefix="egressd-documents-", dir="/var/tmp") as documents,
        Runners.start(program=as_caller(*zygote), most=most) as runners,
    ):
        Path(documents).chmod(0o755)
        made = World(runners, gateway.run_dir, Path(documents), gateway)
        yield made
        made.nothing_left()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_runners_world() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    """After each test of a file that imports this."""
    yield
    world.nothing_left()
