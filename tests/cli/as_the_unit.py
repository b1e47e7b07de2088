"""Exec a program with the rights that systemd/egressd.service leaves it: bounding set, no_new_privs, system
calls, no writable code. What systemd does, done by hand, where no systemd runs.

    python as_the_unit.py PROGRAM [ARGUMENT...]
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pyseccomp

UNIT = (Path(__file__).resolve().parents[2] / "systemd" / "egressd.service").read_text()
WRITE, EXECUTE = 2, 4  # PROT_*, sys/mman.h


def words(directive: str) -> list[str]:
    return " ".join(re.findall(rf"^{directive}=(.*)$", UNIT, re.MULTILINE)).split()


def calls(group: str) -> set[str]:
    """The system calls of a group, as systemd names them; a call is its own group."""
    if not group.startswith("@"):
        return {group}
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    inside = [line.strip() for line in listed.splitlines()[1:]]
    return {call for word in inside if word and word[0] != "#" for call in calls(word)}


def allowed_calls() -> set[str]:
    found = calls("@default")
    removing = False
    for word in words("SystemCallFilter"):
        removing = word.startswith("~") or (removing and word.startswith("@"))
        found = found - calls(word.lstrip("~")) if removing else found | calls(word)
    return found


def load_filter() -> None:
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in sorted(allowed_calls() - {"mmap", "mprotect", "pkey_mprotect"}):
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except OSError:
            continue  # not a call of this architecture, or newer than libseccomp
    masked = pyseccomp.MASKED_EQ
    rules.add_rule(pyseccomp.ALLOW, "mmap", pyseccomp.Arg(2, masked, WRITE, 0))
    rules.add_rule(pyseccomp.ALLOW, "mmap", pyseccomp.Arg(2, masked, WRITE | EXECUTE, WRITE))
    rules.add_rule(pyseccomp.ALLOW, "mprotect", pyseccomp.Arg(2, masked, EXECUTE, 0))
    rules.load()


def main(command: list[str]) -> None:
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in words("CapabilityBoundingSet"))
    if os.environ.get("FILTERED") is None:
        again = [
            "setpriv",
            "--no-new-privs",
            "--bounding-set",
            f"-all,{kept}",
            sys.executable,
            __file__,
            *command,
        ]
        os.execvpe("setpriv", again, {**os.environ, "FILTERED": "1"})
    load_filter()
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
