"""Applies the policy each time a line comes in, and says how many milliseconds egressd took for it.

`python -m bench.inside.applier RUN_DIR`, as root of the lab.
"""

from __future__ import annotations

import sys

from egressd.sandbox.control import Control


def main(run_dir: str) -> int:
    with Control(run_dir) as control:
        print("ready", flush=True)
        for _ in sys.stdin:
            answer = control.apply()
            if answer["problems"]:
                raise RuntimeError(answer["problems"])
            print(answer["milliseconds"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
