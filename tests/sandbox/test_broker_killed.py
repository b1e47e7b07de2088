"""SIGKILL at any moment of the spawn: no process is left, and never a command that ran without its gate.

With bwrap's --block-fd instead of the gate, 80 kills left 66 processes behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from lab.scale import scaled
from sandbox.stand_in import Gateway, as_caller, eventually, processes_with

pytestmark = pytest.mark.kernel
HERE = Path(__file__).resolve().parent


def kill(gateway: Gateway, *, times: int, longest: int = 0, workspace: str = "plain") -> dict[str, object]:
    argv = [sys.executable, HERE / "victim.py", gateway.run_dir, workspace, times, longest, "seed"]
    done = subprocess.run(
        as_caller(*map(str, argv)), capture_output=True, text=True, timeout=60 + times, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert eventually(lambda: gateway.links() == [], within=1.0), gateway.links()
    return found


def test_80_kills(gateway: Gateway) -> None:
    found = kill(gateway, times=80)
    assert found["ran though closed"] == 0
    assert found["survivors"] == []
    assert found["opened"] > 5, "the moments do not cover the end of the spawn"
    assert found["closed"] > 5, "the moments do not cover its beginning"


def test_kills_where_somebody_stays_to_see_who_tries_what(gateway: Gateway) -> None:
    found = kill(gateway, times=40, workspace="watched")
    assert (found["ran though closed"], found["survivors"]) == (0, [])


def test_kills_while_the_daemon_is_slow(gateway: Gateway) -> None:
    """Blocked at the gate: where --block-fd always left a process."""
    found = kill(gateway, times=10, longest=300, workspace="never")
    assert found == {"opened": 0, "closed": 10, "ran though closed": 0, "survivors": []}


def test_killed_while_the_link_comes_to_life(gateway: Gateway) -> None:
    """The plumber waits for the other end of the pair, which stays down: it must not go on waiting, and
    thus let the sandbox stand, once nobody waits for it."""
    token = uuid.uuid4().hex
    process = gateway.start("sleep", token, workspace="dark")
    assert eventually(lambda: laid(token), within=5.0)
    process.kill()
    assert eventually(lambda: processes_with(token) == [], within=1.0), processes_with(token)
    assert eventually(lambda: gateway.links() == [], within=1.0)
    process.communicate()


def laid(token: str) -> bool:
    """Whether some process with the token is where eth0 is up, and lacks the other end's answer."""
    return any(
        "<NO-CARRIER" in subprocess.run(
            ["nsenter", "-t", str(pid), "-n", "ip", "-o", "link", "show", "dev", "eth0"],
            capture_output=True, text=True, check=False,
        ).stdout
        for pid in processes_with(token)
    )  # fmt: skip


ON_THE_WAY = """
import os, sys
from egressd.sandbox import launch

run_dir, fifo, token = sys.argv[1:]
spawn = os.posix_spawn
wait = [(os.POSIX_SPAWN_OPEN, 200, fifo, os.O_RDONLY, 0), (os.POSIX_SPAWN_CLOSE, 200)]
os.posix_spawn = lambda *words, file_actions, **more: spawn(*words, file_actions=file_actions + wait, **more)
launch.start(launch.Wish(workspace="plain", command=("sleep", token), run_dir=run_dir))
"""


def test_killed_while_bubblewrap_is_on_its_way(gateway: Gateway, shown: Path) -> None:
    """The forked half of posix_spawn has its descriptors in their places, but is not bubblewrap yet: held
    up here, and on a busy machine by anybody. The plumber waits for what it will become."""
    token, fifo = uuid.uuid4().hex, shown / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    process = subprocess.Popen(
        as_caller(sys.executable, "-c", ON_THE_WAY, gateway.run_dir, fifo, token), cwd="/"
    )
    try:
        assert eventually(lambda: any(held_up(pid) for pid in processes_with(token)), within=5.0)
        assert len(processes_with(token)) == 3, "the broker, the plumber, and what will be bubblewrap"
        process.kill()
        process.wait()
        eventually(lambda: len(processes_with(token)) < 2, within=0.5)  # a plumber that does not wait is gone
        with fifo.open("w"):
            assert eventually(lambda: processes_with(token) == [], within=1.0), processes_with(token)
        # In the middle of exec a process has no words at all, and is not found by them.
        assert not eventually(lambda: processes_with(token) != [], within=0.3), processes_with(token)
    finally:
        for pid in processes_with(token):
            os.kill(pid, signal.SIGKILL)


def held_up(pid: int) -> bool:
    """Whether it waits for the other end of a FIFO (fs/pipe.c)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")
    return False


@pytest.mark.slow
def test_500_kills(gateway: Gateway) -> None:
    found = kill(gateway, times=scaled(500, least=20), workspace="acme")
    assert (found["ran though closed"], found["survivors"]) == (0, [])
