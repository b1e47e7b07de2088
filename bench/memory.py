"""Memory of processes of the lab, as the kernel accounts for it.

PSS (proportional set size, proc(5)): private pages, plus each shared page divided by how many share it. So
the sum over processes is what they really take together. Kernel memory (links, rules) is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from lab.machine import Lab

__all__ = ["pss"]


def pss(lab: Lab, pids: Iterable[int]) -> float:
    """MiB, summed; a process that has just ended counts nothing."""
    return sum(_kibibytes(lab, pid) for pid in pids) / 1024


def _kibibytes(lab: Lab, pid: int) -> int:
    try:
        _, (descriptor,) = lab.ask("open", path=f"/proc/{pid}/smaps_rollup", flags=os.O_RDONLY)
    except OSError:
        return 0
    with os.fdopen(descriptor) as stream:
        try:
            lines = stream.read().splitlines()
        except ProcessLookupError:
            return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
