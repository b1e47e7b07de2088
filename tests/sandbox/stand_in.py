"""A gateway with a stand-in for egressd in it, and a caller without any right who runs commands there.

For the tests of this directory by their conftest, for others as `sandbox.stand_in`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CALLER = 4001  # no account needed
BIN = Path(sys.executable).parent


def as_caller(*argv: str | Path, uid: int = CALLER) -> list[str]:
    """`argv`, run without privilege."""
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--"]
    return [*drop, *map(str, argv)] if os.getuid() == 0 else [str(word) for word in argv]


def eventually(holds: Callable[[], bool], *, within: float = 3.0) -> bool:
    """Poll until it holds; False when it does not hold in a look that begins after that time."""
    end = time.monotonic() + within
    while True:
        began = time.monotonic()
        if holds():
            return True
        if began > end:
            return False
        time.sleep(0.005)


def processes_with(token: str) -> list[int]:
    """Every process of the machine that has `token` in its command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if token.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@dataclass
class Gateway:
    """The namespace that plays the gateway, and the stand-in's run directory."""

    namespace: str
    run_dir: Path

    def links(self) -> list[str]:
        """Sandbox links that exist now."""
        shown = subprocess.run(
            ["ip", "-n", self.namespace, "-o", "link"], capture_output=True, text=True, check=True
        ).stdout
        return [line.split(": ")[1].split("@")[0] for line in shown.splitlines() if ": eg" in line]

    def argv(self, *command: str, workspace: str = "plain", options: tuple[str, ...] = ()) -> list[str]:
        """egressctl run, as the caller."""
        return as_caller(
            BIN / "egressctl", "--run-dir", self.run_dir, "run", "-w", workspace, *options, "--", *command
        )

    def run(
        self, *command: str, workspace: str = "plain", options: tuple[str, ...] = (), **more: Any
    ) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 30, "cwd": "/"}
        if "input" not in more:
            settings["stdin"] = subprocess.DEVNULL
        argv = self.argv(*command, workspace=workspace, options=options)
        return subprocess.run(argv, check=False, **(settings | more))

    def start(
        self, *command: str, workspace: str = "plain", options: tuple[str, ...] = (), **more: Any
    ) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
            "cwd": "/",
        }  # fmt: skip
        return subprocess.Popen(
            self.argv(*command, workspace=workspace, options=options), **(settings | more)
        )

    def python(
        self, script: str, *, workspace: str = "plain", **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command that is a Python program, inside."""
        return self.run("/usr/bin/python3", "-c", script, workspace=workspace, **more)


@dataclass
class Returning(Gateway):
    """One whose stand-in goes away when it is told, and comes back (see returning_daemon.py)."""

    process: subprocess.Popen[str]

    def do(self, words: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def written(self, name: str) -> list[Any]:
        """Lines of what the stand-in wrote down."""
        path = self.run_dir / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def gateway_named(name: str, *, program: str = "fake_daemon.py") -> Iterator[Returning]:
    """Root only. Checks that no link is left in it."""
    with tempfile.TemporaryDirectory(prefix="egressd-sandbox-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        subprocess.run(["ip", "netns", "add", name], check=True)
        process = subprocess.Popen(
            [sys.executable, HERE / program, directory, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            made = Returning(namespace=name, run_dir=Path(directory), process=process)
            yield made
            assert eventually(lambda: made.links() == []), f"links left behind: {made.links()}"
        finally:
            process.kill()
            process.wait()
            subprocess.run(["ip", "netns", "del", name], check=True)
