"""The demo is the project's first impression and its shortest proof: every check mark in it must hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lab.machine import PROJECT

pytestmark = pytest.mark.kernel
CHECKS = 26  # a demo that skips one proves less


def story(*prefix: str) -> str:
    """What it prints to a reader without a terminal; fails if it says that anything failed."""
    result = subprocess.run(
        [*prefix, sys.executable, "-B", str(PROJECT / "demo" / "demo.py")],
        capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"HOME": "/tmp"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_check_mark_holds() -> None:
    told = story()
    assert (told.count("✓"), told.count("✗")) == (CHECKS, 0)
    assert "\033" not in told, "colours are for terminals"


def test_it_needs_no_root(unprivileged: list[str]) -> None:
    if not unprivileged:
        pytest.skip("the other test was without root already")
    assert story(*unprivileged).count("✓") == CHECKS
