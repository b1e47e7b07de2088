"""Starts sandboxes when told how many: a line with a number, answered by a line with the milliseconds that
each took until its command's first instruction. The caller is who runs this; see bench/spawn.py."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import egressd
from bench.first import nanoseconds


def main(orders: dict[str, Any]) -> int:
    box = egressd.Sandbox(workspace=orders["workspace"], files=orders["files"], run_dir=orders["run_dir"])

    def start() -> float:
        began = time.monotonic_ns()
        return (nanoseconds(box.run(orders["inside"], capture_output=True).stdout) - began) / 1e6

    start()  # once for the caches
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps([start() for _ in range(int(line))]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
