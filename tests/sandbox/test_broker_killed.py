"""SIGKILL at any moment of the spawn: no process is left, and never a command that ran without its gate.

With bwrap's --block-fd instead of the gate, 80 kills left 66 processes behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Gateway, as_caller, eventually

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


def test_kills_while_the_daemon_is_slow(gateway: Gateway) -> None:
    """Blocked at the gate: where --block-fd always left a process."""
    found = kill(gateway, times=10, longest=300, workspace="never")
    assert found == {"opened": 0, "closed": 10, "ran though closed": 0, "survivors": []}


@pytest.mark.slow
def test_500_kills(gateway: Gateway) -> None:
    found = kill(gateway, times=500, workspace="acme")
    assert (found["ran though closed"], found["survivors"]) == (0, [])
