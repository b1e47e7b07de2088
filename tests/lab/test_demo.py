"""The demo is the project's first impression and its shortest proof: every check mark in it must hold."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest

from lab.machine import PROJECT

pytestmark = pytest.mark.kernel
CHECKS = 51  # a demo that skips one proves less


@functools.cache
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


def marks(text: str) -> set[str]:
    """What stands behind the check marks, and how many held at the end, whatever the numbers."""
    found = re.findall(r"^ +(?:✓ .*|\d+ of \d+ checks held)", text, re.MULTILINE)
    return {re.sub(r"\d+", "N", line.strip()) for line in found}


def test_the_readme_shows_what_it_prints() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert marks(readme) - marks(story()) == set()
    assert f" {CHECKS} of {CHECKS} checks held" in readme


@pytest.mark.parametrize("page", ["README.md", "docs/residency.md"])
def test_the_route_that_the_pages_show_is_the_one_it_asks_for(page: str) -> None:
    asked = "$ egressctl route -w acme default\n"
    shown = (PROJECT / page).read_text().split(asked)[1].partition("```")[0].partition("$ ")[0]
    assert "\n".join(f"   | {line}" for line in shown.splitlines()) in story()


def test_it_needs_no_root(unprivileged: list[str]) -> None:
    if not unprivileged:
        pytest.skip("the other test was without root already")
    assert story(*unprivileged).count("✓") == CHECKS
