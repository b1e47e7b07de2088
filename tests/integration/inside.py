"""The caller's own way into a sandbox's network: as its owner, with every capability there.

A sandbox's network namespace belongs to a user namespace that the caller's own bubblewrap made, so the
caller may enter both, and is root of that network: no seccomp filter, raw sockets, any address, any link.
This file is also the program that enters: `inside.py PATH COMMAND...`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000  # linux/sched.h
_NS_GET_USERNS = 0xB701  # linux/nsfs.h


def main(path: str, command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(path, os.O_RDONLY)
    for descriptor, kind in (
        (fcntl.ioctl(network, _NS_GET_USERNS), _CLONE_NEWUSER),
        (network, _CLONE_NEWNET),
    ):
        if libc.setns(descriptor, kind):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    os.execvp(command[0], command)


def argv(daemon: Any, process: Any, *command: str) -> list[str]:
    """What to run, as the sandbox's owner, to run `command` inside its network."""
    text = open(__file__, encoding="utf-8").read()  # noqa: SIM115, PTH123
    return ["/usr/bin/python3", "-I", "-c", text, daemon.namespace_of(process), *command]


def start(daemon: Any, process: Any, *command: str, **options: Any) -> Any:
    """The same as `run`, left running: a process of the caller's beside the sandbox, in its network."""
    return daemon.lab.start(argv(daemon, process, *command), uid=daemon.lab.user, **options)


def counters(daemon: Any, workspace: str = "acme") -> dict[str, Any]:
    """The workspace's counters, asked over the control socket itself: some milliseconds."""
    from egressd.sandbox.control import Control

    with Control(f"/proc/{daemon.lab.keeper_pid}/root{daemon.run_dir}") as control:
        document = control.ask("counters", workspace=workspace)
    found: dict[str, Any] = document["workspaces"][0]
    return found | {"late": document["late"], "balanced": document["balanced"]}


def run(daemon: Any, process: Any, *command: str, **options: Any) -> Any:
    """`command` inside the network of the sandbox `process`, as root of that network alone."""
    return daemon.lab.run(argv(daemon, process, *command), uid=options.pop("uid", daemon.lab.user), **options)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
