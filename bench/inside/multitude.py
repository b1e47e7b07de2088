"""A thousand sandboxes of one user, held by a few processes. `python -m bench.inside.multitude ORDERS`.

ORDERS is a JSON object: `run_dir`, `workspace`, `files` (a directory with the command whose first instruction
tells the time), `first` (that command as seen inside), `outside` (the same as seen here), `hands` (how many
processes hold the sandboxes), `allowed` and `denied` (each "HOST PORT").

Then one order per line on standard input, each a JSON object answered by one line:

    {"do": "spawn", "count": N}     N more, by all hands at once      {"ms": [of each], "seconds": all}
    {"do": "probe", "count": N}     N more, one after the other, each ended before the next, and as many by
                                    bubblewrap alone in between       {"egressd": [ms], "bwrap": [ms]}
    {"do": "ask"}                   every sandbox asks for what is allowed and for what is not, at once
                                                                      {"answers": {"yes no": N}, "seconds"}
    {"do": "end"}                   all of them                       {"ms": [of each], "seconds": all}

A hand is forked from this process, which has imported everything, as a broker's runners are from their zygote
(broker/runners/zygote.py): so what is held is what a sandbox costs, not what an interpreter costs.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from bench.inside.spawner import Spawner
from egressd.sandbox import launch

__all__ = ["main"]

# Waits for its standard input to end. What it then asks is answered in words of one line, which a pipe takes
# whole (PIPE_BUF, pipe(7)); bash speaks TCP by itself, and is there only as long as it has something to say.
_WAIT = 'read -r _; /bin/bash -c "$0" "$@"; exec sleep infinity'
_ASK = """\
said() { exec 2>/dev/null 3<>"/dev/tcp/$1/$2" && echo hello >&3 && read -r -t 20 answer <&3 && [ "$answer" = hello ]; }
(said "$1" "$2") && a=yes || a=no
(said "$3" "$4") && b=yes || b=no
echo "$a $b"
"""  # noqa: E501 -- one line of shell


@dataclass(frozen=True)
class Hand:
    """A process that holds some of the sandboxes; `answers` is read from, and its end awaited."""

    pid: int
    answers: int

    def read(self) -> dict[str, Any]:
        """One line. EOFError if it died."""
        line = b""
        while not line.endswith(b"\n"):
            data = os.read(self.answers, 1 << 16)
            if not data:
                raise EOFError("a hand died")
            line += data
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        os.close(self.answers)
        os.waitpid(self.pid, 0)


class Multitude:
    def __init__(self, orders: dict[str, Any]) -> None:
        self._run_dir, self._workspace = orders["run_dir"], orders["workspace"]
        self._hands = orders["hands"]
        words = [*orders["allowed"].split(), *orders["denied"].split()]
        self._command = ("/bin/sh", "-c", _WAIT, _ASK, "ask", *words)
        self._probe = Spawner(
            run_dir=self._run_dir, files=orders["files"], command=orders["first"], outside=orders["outside"]
        )
        self._crowd: list[Hand] = []
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        """The pipes that all sandboxes of a round share."""
        self._stay, self._go, self._told = os.pipe(), os.pipe(), os.pipe()

    # ---- orders

    def spawn(self, count: int) -> dict[str, Any]:
        hands = min(count, self._hands)
        shares = [count // hands + (1 if hand < count % hands else 0) for hand in range(hands)]
        began = time.monotonic()
        fresh = [self._hand(share) for share in shares]
        found = [hand.read() for hand in fresh]
        self._crowd += fresh
        self._count += count
        if problems := [answer["problem"] for answer in found if "problem" in answer]:
            return {"problem": problems[0]}
        return {"ms": _all(found), "seconds": time.monotonic() - began}

    def probe(self, count: int) -> dict[str, Any]:
        """Each in a process of its own, as a runner is: what it forks is as small as it was."""
        turns: dict[str, list[float]] = {"egressd": [], "bwrap": []}
        for _ in range(count):
            for name, times in turns.items():
                times.append(_apart(getattr(self._probe, name)))
        return turns

    def ask(self) -> dict[str, Any]:
        began = time.monotonic()
        os.close(self._go[1])
        self._go = (self._go[0], -1)
        text = b""
        while text.count(b"\n") < self._count:
            text += os.read(self._told[0], 1 << 16)
        answers = collections.Counter(text.decode().splitlines())
        return {"answers": answers, "seconds": time.monotonic() - began}

    def end(self) -> dict[str, Any]:
        began = time.monotonic()
        os.close(self._stay[1])
        found = [hand.read() for hand in self._crowd]
        for hand in self._crowd:
            hand.close()
        seconds = time.monotonic() - began
        for descriptor in (self._stay[0], *self._go, *self._told):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._crowd, self._count = [], 0
        self._begin()
        return {"ms": _all(found), "seconds": seconds}

    # ---- a hand

    def _hand(self, count: int) -> Hand:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._serve(count, writing)
        os.close(writing)
        return Hand(pid, reading)

    def _serve(self, count: int, answers: int) -> NoReturn:
        status = 1
        try:
            os.close(self._stay[1])
            if self._go[1] >= 0:
                os.close(self._go[1])
            with contextlib.ExitStack() as undo:
                running = []
                try:
                    times: list[float] = []
                    for _ in range(count):
                        with _timed(times):
                            running.append(self._start())
                        undo.callback(running[-1].destroy)
                except Exception as error:
                    _say(answers, {"problem": f"{type(error).__name__}: {error}"})
                else:
                    _say(answers, {"ms": times})
                os.read(self._stay[0], 1)
                times = []
                for sandbox in running:
                    with _timed(times):
                        sandbox.destroy()
            _say(answers, {"ms": times})
            status = 0
        finally:
            os._exit(status)

    def _start(self) -> launch.Running:
        wish = launch.Wish(workspace=self._workspace, command=self._command, run_dir=self._run_dir)
        return launch.start(wish, stdio=(self._go[0], self._told[1], 2))


def _apart(measure: Any) -> float:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writing, str(measure()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    text = os.read(reading, 64)
    os.close(reading)
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError("a probe failed")
    return float(text)


@contextlib.contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    times.append((time.monotonic() - began) * 1e3)


def _all(found: list[dict[str, Any]]) -> list[float]:
    return [each for answer in found for each in answer["ms"]]


def _say(descriptor: int, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def main(orders: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    multitude = Multitude(orders)
    gc.collect()
    gc.freeze()  # as the zygote does: what is forked shares what is here
    _say(1, {"ready": os.getpid()})
    for line in sys.stdin:
        order = json.loads(line)
        _say(1, getattr(multitude, order.pop("do"))(**order))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
