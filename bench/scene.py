"""Where it is measured: the lab, its internet, egressd in it, and who measures."""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.daemon import Daemon
from lab.internet import Internet, start_internet
from lab.machine import Lab

__all__ = ["PROJECT", "account", "alarms", "environment", "program", "shared_directory", "stage", "started"]

PROJECT = Path(__file__).resolve().parent.parent
_ORDINARY = ("daemon", "www-data", "man")  # accounts every Debian has; not games, which firejail cannot map


@contextlib.contextmanager
def stage(given: tuple[Lab, Internet] | None = None) -> Iterator[tuple[Lab, Internet]]:
    """A lab of our own with its servers, or the caller's, who keeps it."""
    if given is not None:
        yield given
        return
    with Lab() as lab:
        yield lab, start_internet(lab)[0]


@contextlib.contextmanager
def started(lab: Lab, policies: Mapping[str, str], **config: Any) -> Iterator[Daemon]:
    with Daemon(lab, policies=policies, **config) as daemon:
        yield daemon


def account() -> pwd.struct_passwd:
    """An ordinary user with a name, because firejail serves no other."""
    for name in _ORDINARY:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError(f"none of the accounts {', '.join(_ORDINARY)} exists")


def environment() -> dict[str, str]:
    """What finds this package."""
    return {"PYTHONPATH": f"{PROJECT}:{PROJECT}/tests", "PATH": os.environ.get("PATH", "/usr/bin:/bin")}


def program(name: str, *words: str) -> list[str]:
    """The command line of one of the programs in inside/."""
    return [sys.executable, "-B", "-m", f"bench.inside.{name}", *words]


def alarms(daemon: Daemon) -> list[str]:
    """What the daemon was alarmed by while we measured. Said aloud: then the figures mean less."""
    found = [str(alarm["text"]) for alarm in daemon.json("status")["alarms"]]
    for text in found:
        print(f"bench: egressd raised an alarm meanwhile: {text}", file=sys.stderr)
    return found


@contextlib.contextmanager
def shared_directory() -> Iterator[Path]:
    """A directory that everybody may read, to be shown in sandboxes."""
    with tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
