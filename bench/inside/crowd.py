"""Many sandboxes at once, idle. `python -m bench.inside.crowd RUN_DIR WORKSPACE COUNT`.

Says "open" when all of them run, and ends them with its standard input. Each of a few processes holds a part
of them: a sandbox's caller is this process, and starting them one after the other would take long.
"""

from __future__ import annotations

import os
import sys

from egressd.sandbox import launch

HANDS = 4


def _hold(run_dir: str, workspace: str, count: int, opened: int, stay: tuple[int, int]) -> None:
    wish = launch.Wish(workspace=workspace, command=("sleep", "infinity"), run_dir=run_dir)
    null = os.open(os.devnull, os.O_RDWR)
    os.close(stay[1])
    running = [launch.start(wish, stdio=(null, null, null)) for _ in range(count)]
    os.write(opened, b".")
    os.read(stay[0], 1)
    for sandbox in running:
        sandbox.destroy()


def _start(arguments: tuple[str, str, int], opened: int, stay: tuple[int, int]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _hold(*arguments, opened, stay)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(run_dir: str, workspace: str, count: int) -> int:
    opened, stay = os.pipe(), os.pipe()
    shares = [count // HANDS + (1 if hand < count % HANDS else 0) for hand in range(HANDS)]
    pids = [_start((run_dir, workspace, share), opened[1], stay) for share in shares]
    os.close(opened[1])
    for _ in pids:
        if not os.read(opened[0], 1):
            return 1
    print("open", flush=True)
    sys.stdin.read()
    os.close(stay[1])
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
