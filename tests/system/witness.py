"""What a container must leave of the machine it runs on as it was. One kernel serves both, so a program in
there that writes to what no namespace covers (a sysctl of fs or kernel) has written to the machine.

    before = witness()
    ...
    assert changes(before, witness()) == []

What is read-only is not looked at: nobody could have changed it, and most of it counts something.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["changes", "witness"]

_SYSCTLS, _GROUPS = Path("/proc/sys"), Path("/sys/fs/cgroup")
# The kernel itself changes these: with every process, and when a disk lets somebody wait for minutes.
_RESTLESS = frozenset({"kernel/ns_last_pid", "kernel/hung_task_warnings"})
# What applies to all groups of a hierarchy.
_OF_HIERARCHIES = (
    *("release_agent", "notify_on_release", "cgroup.clone_children"),
    *("cgroup.subtree_control", "cgroup.max.depth", "cgroup.max.descendants"),
)
Witness = Mapping[str, str]


def witness() -> Witness:
    """Settings, mounts and control groups of this machine, as this process sees them: text by name."""
    return dict((*_sysctls(), *_mounts(), *_groups()))


def changes(before: Witness, after: Witness) -> list[str]:
    """What became different, or went away; of mounts and settings of hierarchies also what came. Sysctls come
    with modules and links, which are no settings of anybody's."""
    names = before.keys() | {name for name in after if not name.startswith("sysctl ")}
    return [
        f"{name}: {before.get(name, 'nothing')!r} became {after.get(name, 'nothing')!r}"
        for name in sorted(names)
        if before.get(name) != after.get(name) and not _went_with_its_link(name, after)
    ]


def _went_with_its_link(name: str, after: Witness) -> bool:
    """Each link has sysctls of its own, and labs of others come and go."""
    of_a_link = name.startswith("sysctl net/") and ("/conf/" in name or "/neigh/" in name)
    return of_a_link and name not in after


def _sysctls() -> Iterator[tuple[str, str]]:
    for path in sorted(_SYSCTLS.rglob("*")):
        name = str(path.relative_to(_SYSCTLS))
        try:
            if name in _RESTLESS or not path.is_file() or not path.stat().st_mode & 0o222:
                continue
            yield f"sysctl {name}", path.read_text(errors="replace").strip()
        except OSError:  # net.ipv6.conf.*.stable_secret has none yet; a link is gone
            continue


def _mounts() -> Iterator[tuple[str, str]]:
    """Where, what and how (proc_pid_mountinfo(5)); without its numbers."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        words = head.split()
        # Other tests, at the same time, pin namespaces and mount in directories of theirs. A container's
        # gateway is called egressd.
        if words[4].startswith(("/run/netns/", "/tmp/", "/var/tmp/")) and words[4] != "/run/netns/egressd":
            continue
        yield f"mount {words[4]}", " ".join((words[3], *words[5:], tail))


def _groups() -> Iterator[tuple[str, str]]:
    for hierarchy in (_GROUPS, *sorted(path for path in _GROUPS.iterdir() if path.is_dir())):
        for name in _OF_HIERARCHIES:
            path = hierarchy / name
            if path.is_file():
                yield f"group {path}", path.read_text().strip()
        if (hierarchy / "cgroup.procs").exists():
            left = sorted(path.name for path in hierarchy.glob(f"egressd-*-{os.getpid()}"))
            yield f"group {hierarchy} of ours", " ".join(left)
