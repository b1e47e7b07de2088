"""A service of one request at a time, in the lab: a line of JSON in, all that its runner said out.

The line is a `Job` without what is the same for all; `documents` are files below DIRECTORY:
`cycle_inside.py RUN_DIR DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from broker.cycle_stand import World, eventually
from egressd.broker.runners.zygote import Runners, jobs


def main() -> None:
    run_dir, directory = sys.argv[1:]
    with Runners.start() as runners:
        world = World(runners, Path(run_dir), Path(directory))
        for line in sys.stdin:
            wish = json.loads(line)
            copies = tuple(world.copy(path) for path in wish.pop("documents", ()))
            limits = jobs.Limits(**wish.pop("limits", {}))
            job = world.job(*wish.pop("command"), copies=copies, limits=limits, **wish)
            told = world.told(job)
            eventually(lambda: not world.leavings(), within=5)
            answer = {
                "request": job.id, "out": told.out.decode(), "err": told.err.decode(),
                "link": next((m.link for m in told.messages if isinstance(m, jobs.Started)), 0),
                "finished": msgspec.to_builtins(told.finished), "left": world.leavings(),
            }  # fmt: skip
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
