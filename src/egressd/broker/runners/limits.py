"""What a request has used, as far as nobody else counts it: time of all its processes together, and what the
command says of itself.

Where the sandbox has a cgroup, the kernel adds up. Elsewhere its processes are looked at now and then, and a
sum of looks is a lower bound: a process that began and ended between two of them is counted only if somebody
in there waited for it (getrusage(2), RUSAGE_CHILDREN). Whoever lets children be reaped unseen (SIGCHLD
ignored) escapes the sum, not RLIMIT_CPU, which each of them has. With a cgroup nobody escapes.
"""

# ruff: noqa: PTH123
from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from egressd.broker.runners.jobs import Limits
from egressd.sandbox.attempts import family
from egressd.sandbox.limits import Group

__all__ = ["Meter", "Usage", "named"]

_TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # seconds
_PROCESSORS = os.cpu_count() or 1
_SHORTEST, _LONGEST = 0.05, 0.5  # seconds between two looks
_LINE = 4096  # bytes of one report
_PIECE = 1 << 16
# Of all reports together: what JSON holds exactly (RFC 8259, section 6). More would not be taken on record.
_MOST = (1 << 53) - 1
# How a link's budgets are called in `Limits` (the others by `Reason`, as messages.Spent has them).
_BUDGETS: Mapping[str, str] = {"quota": "egress", "connections": "connections"}


def named(spent: tuple[str, ...]) -> frozenset[str]:
    """Fields of `Limits` for what the kernel refused over the link."""
    return frozenset(_BUDGETS[word] for word in spent if word in _BUDGETS)


class _Seen(NamedTuple):
    own: float  # seconds
    waited: float  # seconds of children that were waited for
    threads: int


class Meter:
    """Of one sandbox whose first process is `first`. Look often enough: see `pause`."""

    def __init__(self, first: int, group: Group | None, limits: Limits) -> None:
        self._first, self._group, self._limits = first, group, limits
        self._ever: dict[tuple[int, int], float] = {}  # (pid, when it began) -> seconds of its own
        self.cpu = 0.0  # seconds, never less than before
        self.threads = 0  # the most that were there at once

    @property
    def pause(self) -> float | None:
        """Seconds until the limit could be reached, on all processors of the machine; None: no need to look.

        One that is near is looked for often, but not for that more than twenty times a second.
        """
        if self._limits.cpu is not None:
            left = (self._limits.cpu - self.cpu) / _PROCESSORS
            return min(max(left, _SHORTEST), _LONGEST)
        return _LONGEST if self._limits.processes is not None and self._group is None else None

    def look(self) -> None:
        """`Refused` where it is not known what the sandbox has used."""
        if self._group is not None:
            self.cpu = max(self.cpu, self._group.cpu_seconds())
            return
        living = 0.0
        threads = 0
        for pid in family(self._first):
            with contextlib.suppress(OSError, ValueError, IndexError):
                key, seen = _stat(pid)
                self._ever[key] = max(seen.own, self._ever.get(key, 0.0))
                living += seen.own + seen.waited
                threads += seen.threads
        self.cpu = max(self.cpu, living, sum(self._ever.values()))
        self.threads = max(self.threads, threads)

    @property
    def cpu_spent(self) -> bool:
        return self._limits.cpu is not None and self.cpu >= self._limits.cpu

    def reached(self) -> frozenset[str]:
        """Fields of `Limits` that are known to have been reached. What RLIMIT_DATA refuses nobody is told."""
        found = set(self._group.reached()) if self._group is not None else set()
        if self.cpu_spent:
            found.add("cpu")
        if self._group is None and self._limits.processes is not None:
            found |= {"processes"} if self.threads >= self._limits.processes else set()
        return frozenset(found)


def _stat(pid: int) -> tuple[tuple[int, int], _Seen]:
    """Of proc(5)'s stat: fields 14 to 17 (times), 20 (threads), 22 (when it began). As bytes: its name is the
    process's own to choose, and one that is no UTF-8 must not hide it."""
    with open(f"/proc/{pid}/stat", "rb") as stream:
        fields = stream.read().rpartition(b")")[2].split()
    user, system, waited_user, waited_system = map(int, fields[11:15])
    seen = _Seen((user + system) * _TICK, (waited_user + waited_system) * _TICK, int(fields[17]))
    return (pid, int(fields[19])), seen


# ---- what the command says


class _Report(Struct, frozen=True):
    """One line of it. Nothing can be taken back."""

    tokens: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    cost: Annotated[float, Meta(ge=0, le=1e12)] = 0.0


class Usage:
    """JSON lines {"tokens": N, "cost": X} from a pipe, each what was used since the one before. What is none
    is passed over: it is the command's own word, and a command that says nothing says nothing."""

    def __init__(self) -> None:
        self.tokens, self.cost = 0, 0.0
        self._begun = b""
        self._skipping = False  # the rest of a line that is too long

    def read(self, number: int) -> bool:
        """A piece; False at the end, BlockingIOError if there is none now. One at a time: who writes faster
        than is read here would otherwise keep us from all else, the clock among it."""
        data = os.read(number, _PIECE)
        self.take(data)
        return bool(data)

    def take(self, data: bytes) -> None:
        *lines, rest = (self._begun + data).split(b"\n")
        for line in lines:
            if not self._skipping and len(line) <= _LINE:
                self._add(line)
            self._skipping = False
        self._skipping = self._skipping or len(rest) > _LINE
        self._begun = b"" if self._skipping else rest

    def _add(self, line: bytes) -> None:
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            report = msgspec.json.decode(line, type=_Report)
            self.tokens = min(self.tokens + report.tokens, _MOST)
            self.cost = min(self.cost + report.cost, float(_MOST))

    def reached(self, limits: Limits) -> frozenset[str]:
        """Budgets that are spent: "when passed", so that one may be used up to the last."""
        found = set()
        if limits.tokens is not None and self.tokens > limits.tokens:
            found.add("tokens")
        if limits.cost is not None and self.cost > limits.cost:
            found.add("cost")
        return frozenset(found)
