"""The supervisor's start, among other users of the machine and what they may open."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.model.errors import KernelError
from egressd.processes import examiner, supervisor
from egressd.processes.config import Config

STRANGER = 4001
HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As /run/egressd: everybody may look into it."""
    with tempfile.TemporaryDirectory(prefix="egressd-locks-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        monkeypatch.setattr(supervisor, "_LOCKS", place)
        yield place


@pytest.mark.parametrize("before", ["no lock", "one that everybody may read"])
def test_nobody_else_holds_the_lock_of_a_start(locks: Path, before: str) -> None:
    """flock(2) asks for no right to write: who may open it can keep egressd from ever starting again."""
    config = Config(gateway="egressd-l2")
    path = locks / "egressd-l2.lock"
    if before != "no lock":
        path.touch(mode=0o644)
    second = pytest.raises(KernelError, match=r"running already for gateway 'egressd-l2', process [0-9]+;")
    with supervisor.alone(config), second:
        supervisor.alone(config).__enter__()
    stranger = subprocess.run(
        [sys.executable, "-c", HOLD, str(path)],
        user=STRANGER, group=STRANGER, extra_groups=(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, cwd="/",
    )  # fmt: skip
    assert "held" not in stranger.stdout and "PermissionError" in stranger.stderr
    with supervisor.alone(config):
        pass


ONE_SHOT = """
import sys
from egressd.processes import supervisor
from egressd.processes.config import Config
sys.executable = sys.argv[1]
verb = sys.argv[2]
supervisor._one_shot(Config(), verb, debug=False) if verb else supervisor.lay_foundation(Config(), {})
"""


@pytest.mark.parametrize("verb", ["", "--dismantle"])
def test_who_lays_the_foundation_does_not_outlive_the_lock(tmp_path: Path, verb: str) -> None:
    """The lock ends with egressd: another start, or a dismantling, would be at work beside it."""
    program, told = tmp_path / "program", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 60\n")
    program.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", ONE_SHOT, str(program), verb]) as egressd:
        poll(told.exists)
        pid = int(told.read_text())
        egressd.kill()
    try:
        poll(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def poll(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "answer",
    [{}, [], {"enforcing": True}, {"enforcing": True, "workspaces": [1]}, {"workspaces": {}}],
    ids=str,
)
def test_whatever_the_controller_answers_the_examiner_tells_of_it(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    class Controller:
        def __enter__(self) -> Controller:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, _: str) -> Any:
            return answer

    monkeypatch.setattr(examiner, "Control", lambda _: Controller())
    trial, broken = examiner._asked("/run/egressd")
    assert (trial.ok, broken) == (False, ())
