"""The command that a sandbox's gate runs first, where that is wished (`sandbox.launch.Wish.preflight`).

It leaves traces: two packets that are denied and one question that is refused are counted and recorded with
each run, as any others. That, and the start of an interpreter, is why it is not done unless asked for.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH100, PTH118, PTH120, PTH123
from __future__ import annotations

import functools
import os
import sys

__all__ = ["command", "interpreter"]


def interpreter() -> str:
    """One that a sandbox sees: below /usr, which is shown."""
    real = os.path.realpath(sys.executable)
    return real if real.startswith("/usr/") else "/usr/bin/python3"


def command(run_dir: str) -> tuple[str, ...]:
    """Its exit status is 0 if everything was refused; else what was not stands on standard error."""
    return (interpreter(), "-I", "-S", "-c", _text(), os.path.abspath(run_dir))


@functools.lru_cache(maxsize=1)
def _text() -> str:
    """Read where it is installed; nothing of it is imported here."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shown", "preflight.py")
    with open(path, encoding="utf-8") as stream:
        return stream.read()
