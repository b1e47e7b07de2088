"""Memory and processor time of processes of the lab, as the kernel accounts for them.

PSS (proportional set size, proc(5)): private pages, plus each shared page divided by how many share it. So
the sum over processes is what they really take together. Kernel memory (links, rules) is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from lab.machine import Lab

__all__ = ["processor_time", "pss"]


def pss(lab: Lab, pids: Iterable[int]) -> float:
    """MiB, summed; a process that has just ended counts nothing."""
    return sum(_kibibytes(lab, pid) for pid in pids) / 1024


def processor_time(lab: Lab, pids: Iterable[int]) -> float:
    """Seconds, summed, since they began (utime and stime of proc(5), /proc/PID/stat)."""
    ticks = 0
    for pid in pids:
        fields = _read(lab, f"/proc/{pid}/stat").rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _kibibytes(lab: Lab, pid: int) -> int:
    lines = _read(lab, f"/proc/{pid}/smaps_rollup").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _read(lab: Lab, path: str) -> str:
    """Empty for a process that has just ended."""
    try:
        _, (descriptor,) = lab.ask("open", path=path, flags=os.O_RDONLY)
        with os.fdopen(descriptor) as stream:
            return stream.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
