"""Starts sandboxes and says how long each took until its command's first instruction.

Run as the caller that is to be measured: `python -m bench.inside.spawner ORDERS`, ORDERS a JSON object with
`run_dir`, `files` (the directory with the command), `inside` and `outside` (the command as seen there),
`rounds`, `at_once` and `waves`. Prints one JSON object; all times in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import egressd
from bench.figures import interleaved, percentile
from bench.first import nanoseconds
from egressd.sandbox import launch, plumb
from egressd.sandbox.control import Control

ECHO = (
    "import socket;s=socket.create_connection(('plain.test',7),5);s.sendall(b'x');"
    "assert s.recv(1)==b'x';print('networked')"
)


class Spawner:
    def __init__(self, *, run_dir: str, files: str, command: Sequence[str], outside: Sequence[str]) -> None:
        self.command, self.outside = list(command), list(outside)
        self.run_dir, self.files = run_dir, files
        self.box = egressd.Sandbox(workspace="acme", files=files, run_dir=run_dir)
        self._peer, self._texts = self._bwrap()

    # ---- who is measured

    def egressd(self) -> float:
        began = time.monotonic_ns()
        return _until(self.box.run(self.command, capture_output=True).stdout, began)

    def bwrap(self) -> float:
        for text in self._texts:
            os.lseek(text, 0, os.SEEK_SET)
        return _timed(self._peer, pass_fds=self._texts)

    def firejail(self) -> float:
        """With its default profile, which like ours filters system calls and drops capabilities."""
        return self._jail()

    def firejail_bare(self) -> float:
        """Without: no filter, and the machine's files as they are."""
        return self._jail("--noprofile")

    def _jail(self, *options: str) -> float:
        """Again if it fails: it gives up when somebody mounts or unmounts anything meanwhile."""
        words = ["firejail", "--net=none", "--quiet", *options, *self.outside]
        for _ in range(5):
            with contextlib.suppress(subprocess.CalledProcessError, ValueError):
                return _timed(words, stderr=subprocess.DEVNULL)
        return _timed(words)

    def egressctl(self) -> float:
        options = ["run", "-w", "acme", "--files", self.files, "--"]
        program = str(Path(sys.executable).with_name("egressctl"))
        number = int(self.run_dir.rsplit("/", 1)[1])
        return _timed([program, "--run-dir", self.run_dir, *options, *self.command], pass_fds=[number])

    def _bwrap(self) -> tuple[list[str], list[int]]:
        """The same bubblewrap arguments as egressd's own, without what makes the difference: no filter, no
        gate, no report, and nobody who lays a network."""
        with Control(self.run_dir) as control:
            terms = control.enter("acme")
        wish = launch.Wish(
            workspace="acme", command=tuple(self.command), files=self.files, run_dir=self.run_dir
        )
        plan = launch.prepare(wish, terms).plan
        arguments = list(plan.arguments[: plan.arguments.index("--")])
        for option in ("--seccomp", "--json-status-fd"):
            at = arguments.index(option)
            del arguments[at : at + 2]
        texts = []
        for number, text in plan.data:
            texts.append(os.memfd_create("text"))
            os.write(texts[-1], text.encode())
            at = next(
                i + 1
                for i, word in enumerate(arguments)
                if word == "--ro-bind-data" and arguments[i + 1] == str(number)
            )
            arguments[at] = str(texts[-1])
        return [*arguments, "--", *self.command], texts

    # ---- checks, without which the figures would mean nothing

    def prove(self) -> None:
        """What egressd starts has a network and a guard; what bwrap starts has none."""
        done = self.box.run(["/usr/bin/python3", "-I", "-c", ECHO], capture_output=True, text=True)
        if done.stdout != "networked\n":
            raise RuntimeError(f"the sandbox has no network: {done.stderr}")
        refused = self.box.run(
            ["/usr/bin/python3", "-I", "-c", ECHO.replace("plain", "evil")], capture_output=True
        )
        if refused.returncode == 0:
            raise RuntimeError("the sandbox has no guard")

    def why_not_firejail(self) -> str:
        """Empty if it really makes sandboxes here; in a container it starts the command without one."""
        words = ["firejail", "--net=none", "--quiet", "readlink", "/proc/self/ns/net"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        if done.returncode != 0 or not done.stdout.startswith("net:"):
            return (done.stderr or done.stdout).strip()[:300]
        same = done.stdout.strip() == str(Path("/proc/self/ns/net").readlink())
        return "it makes no sandbox on this machine (a container?)" if same else ""


def _timed(argv: Sequence[str], **options: Any) -> float:
    began = time.monotonic_ns()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, **options)
    return _until(done.stdout, began)


def _until(output: bytes, began: int) -> float:
    return (nanoseconds(output) - began) / 1e6


# --------------------------------------------------------------------------------------------------
# many at once


def wave(spawn: Callable[[], float], count: int) -> tuple[list[float], float]:
    """`count` processes start a sandbox each at one moment: (milliseconds each, sandboxes per second)."""
    ready, go = os.pipe(), os.pipe()
    answers = [_worker(spawn, ready[1], go) for _ in range(count)]
    os.close(ready[1])
    for _ in range(count):
        os.read(ready[0], 1)
    began = time.monotonic()
    os.close(go[1])
    found = [_answer(pid, pipe) for pid, pipe in answers]
    rate = count / (time.monotonic() - began)
    os.close(ready[0])
    os.close(go[0])
    return found, rate


def _worker(spawn: Callable[[], float], ready: int, go: tuple[int, int]) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            os.close(go[1])
            os.write(ready, b".")
            os.read(go[0], 1)
            os.write(writing, str(spawn()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return pid, reading


def _answer(pid: int, pipe: int) -> float:
    text = os.read(pipe, 64)
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise RuntimeError("one of the concurrent sandboxes failed")
    return float(text)


# --------------------------------------------------------------------------------------------------
# where the time goes

# What is done. Each entry's time runs from the end of whatever ended before it, so they add up; a step that
# waits (for bubblewrap, for the daemon) counts what those did meanwhile.
STEPS: tuple[tuple[str, object, str], ...] = (
    ("enter: connect, and the daemon's terms", Control, "enter"),
    ("prepare: arguments, files looked through", launch, "prepare"),
    ("start bubblewrap", launch, "_spawn"),
    ("bubblewrap makes the namespaces", launch.Running, "open_namespace"),
    ("attach: the namespace goes to the daemon", Control, "attach"),
    ("fork the plumber", plumb.Plumber, "__init__"),
    ("lease: the daemon makes chain and link", Control, "lease"),
    ("plumb: addresses, routes, loopback", plumb.Plumber, "lay"),
    ("go", launch.Running, "open_gate"),
)


@contextlib.contextmanager
def _watched(ends: list[int]) -> Iterator[None]:
    """Note when each step has ended, in `ends`."""
    with contextlib.ExitStack() as undo:
        for number, (_, owner, name) in enumerate(STEPS):
            original = getattr(owner, name)
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, _noting(original, ends, number))
        yield


def _noting(function: Any, ends: list[int], number: int) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            ends[number] = time.monotonic_ns()

    return noting


def where(spawner: Spawner, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        ends = [0] * len(STEPS)
        with _watched(ends):
            before = time.monotonic_ns()
            output = spawner.box.run(spawner.command, capture_output=True).stdout
        moments = [(end, name) for end, (name, _, _) in zip(ends, STEPS, strict=True)]
        moments.append(
            (nanoseconds(output), "gate and bubblewrap's rest, until the command's first instruction")
        )
        for end, name in sorted(moments):
            found.setdefault(name, []).append((end - before) / 1e6)
            before = end
    return {name: round(percentile(values, 50), 3) for name, values in found.items()}


def main(orders: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spawner = Spawner(
        run_dir=orders["run_dir"], files=orders["files"], command=orders["inside"], outside=orders["outside"]
    )
    spawner.prove()
    contenders = {"egressd": spawner.egressd, "bwrap": spawner.bwrap}
    without = spawner.why_not_firejail()
    if not without:
        contenders |= {"firejail": spawner.firejail, "firejail_bare": spawner.firejail_bare}
    for measure in contenders.values():
        measure()  # once for the caches
    times = interleaved(orders["rounds"], contenders)
    cli = interleaved(max(1, orders["rounds"] // 4), {"egressctl": spawner.egressctl, "bwrap": spawner.bwrap})
    steps = where(spawner, max(1, orders["rounds"] // 3))
    waves = [wave(spawner.egressd, orders["at_once"]) for _ in range(orders["waves"])]
    answer = {
        "times": times,
        "without": {"why_no_peer": without},
        "cli": cli,
        "steps": steps,
        "concurrent": [value for values, _ in waves for value in values],
        "rates": [rate for _, rate in waves],
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
