"""Limits of memory, processes and time: a delegated cgroup where the caller has one, and rlimits.

A cgroup bounds the sandbox as a whole. It needs a place in the cgroup2 tree where the caller may make a
group with the controllers enabled: a sibling of its own group under a delegated parent, or, for a group
that holds nobody but this process (`systemd-run --user --scope -p Delegate=yes`), a child of it.

rlimits need nothing, and bound less: RLIMIT_DATA counts private writable memory of each process by itself
(not reservations, which Node and Java make by the gigabyte and RLIMIT_AS would count), RLIMIT_NPROC counts
the processes of the sandbox's user namespace (ucounts, Linux 5.14), and neither holds the superuser.
A limit that cannot be had ends the launch.

RLIMIT_CPU, RLIMIT_FSIZE and RLIMIT_NOFILE are always set, whatever else holds. The first is each process'
own: what all of them use together is read from the cgroup (`Group.cpu_seconds`), or added up by who watches
them.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH116, PTH118, PTH120, PTH123
from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import plan

__all__ = ["Bounds", "Group", "Wanted", "bound", "own_group", "step_down"]


@dataclass(frozen=True, slots=True)
class Wanted:
    memory: int | None = None  # bytes
    processes: int | None = None
    cpu: float | None = None  # seconds, of all processes together
    file_size: int | None = None  # bytes
    descriptors: int | None = None  # of each process

    @property
    def controllers(self) -> frozenset[str]:
        both = (("memory", self.memory), ("pids", self.processes))
        return frozenset(name for name, value in both if value is not None)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What was found: a group (or none), what is left to rlimits, and a sentence for --debug."""

    group: Group | None
    rlimits: plan.Limits
    text: str


def bound(wanted: Wanted, *, root: str = "/") -> Bounds:
    """Decide how `wanted` is enforced. `Refused` where it cannot be. `root` is for tests."""
    always = plan.Limits(cpu=wanted.cpu, file_size=wanted.file_size, descriptors=wanted.descriptors)
    if not wanted.controllers and wanted.cpu is None:
        return Bounds(None, always, "no limits" if always == plan.Limits() else "rlimits")
    group = Group.make(wanted, root=root)
    if group is not None:
        return Bounds(group, always, f"cgroup {group.path}")
    if not wanted.controllers:
        return Bounds(None, always, "rlimits (time per process): no cgroup can be made")
    if wanted.processes is not None and os.getuid() == 0:
        raise Refused(
            Reason.LIMIT,
            "processes are limited (by the workspace, or broker.yaml), which no rlimit does for root, and no"
            " cgroup is delegated: run as an ordinary user, or under systemd-run --scope -p Delegate=yes",
        )
    rlimits = replace(always, memory=wanted.memory, processes=wanted.processes)
    return Bounds(None, rlimits, "rlimits (memory per process): no delegated cgroup with memory and pids")


def step_down(*, root: str = "/") -> bool:
    """For a program that will start many sandboxes, while it is the only process of a delegated group
    (systemd's Delegate=yes): whatever it forks from now on finds a parent for groups. False where there is
    none to be had; then rlimits hold."""
    own = own_group(root=root)
    with contextlib.suppress(OSError):
        return own is not None and _make_room(own, Wanted(memory=1, processes=1))
    return False


def own_group(*, root: str = "/") -> str | None:
    """This process's directory in the cgroup2 tree; None where there is none."""
    try:
        with open(os.path.join(root, "proc/self/cgroup")) as stream:
            path = next(line[3:].rstrip("\n") for line in stream if line.startswith("0::"))
        with open(os.path.join(root, "proc/self/mountinfo")) as stream:
            mount = next(_mount_point(line) for line in stream if " - cgroup2 " in line)
    except (OSError, StopIteration):
        return None
    return os.path.normpath(os.path.join(root, mount.lstrip("/"), path.lstrip("/")))


def _mount_point(line: str) -> str:
    """Field 5 of mountinfo (proc(5)), with its octal escapes undone."""
    return line.split(" ")[4].encode().decode("unicode_escape")


class Group:
    """One sandbox's cgroup. `with group: group.adopt(pid)`; leaving kills what is left and removes it."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def make(cls, wanted: Wanted, *, root: str = "/") -> Group | None:
        """A new group holding `wanted`; None where the caller has no place for one."""
        own = own_group(root=root)
        if own is None:
            return None
        for parent in (os.path.dirname(own), own):
            with contextlib.suppress(OSError):
                if parent == own and not _make_room(own, wanted):
                    continue
                if wanted.controllers <= set(_read(parent, "cgroup.subtree_control").split()):
                    return cls._make_in(parent, wanted)
        return None

    @classmethod
    def _make_in(cls, parent: str, wanted: Wanted) -> Group:
        path = os.path.join(parent, f"egressd-{os.getpid()}-{time.monotonic_ns()}")
        os.mkdir(path)
        group = cls(path)
        try:
            group._write_limits(wanted)
            os.stat(os.path.join(path, "cgroup.procs"))
            if not os.access(os.path.join(parent, "cgroup.procs"), os.W_OK):
                raise PermissionError  # moving in needs the right to the common ancestor (cgroups(7))
        except OSError:
            group.close()
            raise
        return group

    def _write_limits(self, wanted: Wanted) -> None:
        if wanted.memory is not None:
            _write(self.path, "memory.max", wanted.memory)
            for name, value in (("memory.swap.max", 0), ("memory.oom.group", 1)):
                with contextlib.suppress(FileNotFoundError):  # no swap accounting, or before 4.19
                    _write(self.path, name, value)
        if wanted.processes is not None:
            _write(self.path, "pids.max", wanted.processes)

    def adopt(self, pid: int) -> None:
        """Move a process in; what it forks from now on is born here."""
        try:
            _write(self.path, "cgroup.procs", pid)
        except ProcessLookupError:
            pass  # ended already
        except OSError as error:
            text = f"the sandbox cannot be moved to its cgroup {self.path}: {error.strerror}"
            raise Refused(Reason.LIMIT, text) from error

    def cpu_seconds(self) -> float:
        """Used by everything that ever was in it. cpu.stat is there without any controller (cgroup v2).
        `Refused` where it cannot be read: nobody would end what is over its limit."""
        return self._number("cpu.stat", "usage_usec") / 1e6

    def reached(self) -> frozenset[str]:
        """Which of "memory" and "processes" have stopped something: a kill, a refused fork. `Refused` where
        that cannot be read; what is not limited has no such file."""
        stopped = (("memory", "memory.events", "oom_kill"), ("processes", "pids.events", "max"))
        there = [each for each in stopped if os.path.exists(os.path.join(self.path, each[1]))]
        return frozenset(name for name, file, key in there if self._number(file, key))

    def _number(self, name: str, key: str) -> int:
        try:
            lines = _read(self.path, name).splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(f"{key} "))
        except (OSError, ValueError, IndexError, StopIteration) as error:
            why = str(error) or "it is not there"
            text = f"{key} of {os.path.join(self.path, name)} cannot be read: {why}"
            raise Refused(Reason.LIMIT, text) from error

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            _write(self.path, "cgroup.kill", 1)  # Linux 5.14; the pid namespace is gone by now anyway
        for _ in range(200):  # EBUSY while a dead process is still being taken apart
            try:
                os.rmdir(self.path)
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.005)
            else:
                return


def _make_room(own: str, wanted: Wanted) -> bool:
    """A group with members cannot have controlled children (cgroups(7), "no internal processes"): if
    this process is alone in a group of its own, step down into a leaf and enable the controllers."""
    if wanted.controllers <= set(_read(own, "cgroup.subtree_control").split()):
        return True
    if not wanted.controllers <= set(_read(own, "cgroup.controllers").split()):
        return False
    if _read(own, "cgroup.procs").split() != [str(os.getpid())]:
        return False
    leaf = os.path.join(own, "broker")
    os.makedirs(leaf, exist_ok=True)
    _write(leaf, "cgroup.procs", os.getpid())
    _write(own, "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(wanted.controllers)))
    return True


def _read(group: str, name: str) -> str:
    with open(os.path.join(group, name)) as stream:
        return stream.read()


def _write(group: str, name: str, value: object) -> None:
    with open(os.path.join(group, name), "w") as stream:
        stream.write(f"{value}\n")
