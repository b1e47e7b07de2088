"""Starts sandboxes and kills itself, again and again: `victim.py RUN_DIR WORKSPACE TIMES LONGEST_MS SEED`.
LONGEST_MS 0 means: find out how long a spawn takes here and now, and go half as far again.

Each attempt is a forked broker that is killed by SIGKILL at a random moment of its spawn. Prints one JSON
document: how many got as far as opening the gate, and what must not be: commands that ran though the gate
was not opened, and processes that outlived their broker by more than a second.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import uuid
from pathlib import Path

from egressd.sandbox import launch, seccomp


def broker(run_dir: str, workspace: str, token: str, gate: int, said: int) -> None:
    """Starts a sandbox whose command writes a word; tells `gate` before the gate is opened."""
    opened = launch.Running.open_gate

    def tell(running: launch.Running) -> None:
        os.write(gate, b"G")
        opened(running)

    launch.Running.open_gate = tell  # type: ignore[method-assign]
    command = ("sh", "-c", f"echo ran; exec sleep 1000; : {token}")
    wish = launch.Wish(workspace=workspace, command=command, run_dir=run_dir)
    launch.start(wish, stdio=(0, said, 2)).watch()


def attempt(run_dir: str, workspace: str, delay: float | None) -> tuple[bool, bool, str]:
    """(gate opened, command ran, token of what to look for). No delay: kill when the gate is opened."""
    token = uuid.uuid4().hex
    gate_end, gate = os.pipe2(os.O_CLOEXEC)
    said_end, said = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(gate_end)
        os.close(said_end)
        try:
            broker(run_dir, workspace, token, gate, said)
        finally:
            os._exit(1)
    os.close(gate)
    os.close(said)
    if delay is None:
        select.select([gate_end], [], [], 5.0)
    else:
        time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    opened = os.read(gate_end, 1) == b"G"
    said_something, _, _ = select.select([said_end], [], [], 1.0)  # also when all its holders have ended
    ran = bool(said_something) and os.read(said_end, 16) == b"ran\n"
    os.close(gate_end)
    os.close(said_end)
    return opened, ran, token


def usual(run_dir: str, workspace: str) -> float:
    """Seconds from fork to the opened gate: the middle one of five."""
    spent = []
    for _ in range(5):
        began = time.monotonic()
        attempt(run_dir, workspace, None)
        spent.append(time.monotonic() - began)
    return sorted(spent)[2]


def survivors(tokens: list[str]) -> list[str]:
    """Command lines that hold one of the tokens."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found += [line for token in tokens if token in line]
    return found


def main() -> None:
    run_dir, workspace, times, longest, seed = sys.argv[1:]
    seccomp.program()
    moment = random.Random(seed)
    most = int(longest) / 1000 or 1.5 * usual(run_dir, workspace)
    results = [attempt(run_dir, workspace, moment.uniform(0, most)) for _ in range(int(times))]
    end = time.monotonic() + 1.0
    tokens = [token for _, _, token in results]
    while (left := survivors(tokens)) and time.monotonic() < end:
        time.sleep(0.01)
    print(
        json.dumps(
            {
                "opened": sum(opened for opened, _, _ in results),
                "closed": sum(not opened for opened, _, _ in results),
                "ran though closed": sum(ran and not opened for opened, ran, _ in results),
                "survivors": left,
            }
        )
    )


if __name__ == "__main__":
    main()
