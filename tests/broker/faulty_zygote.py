"""A zygote whose runners stop, or end, where their job says: `faulty_zygote.py SOCKET`.

A job's variable EGRESSD_TEST_AT is "STEP ACTION": the runner sends itself the signal ACTION when it comes to
STEP; or it is out of memory there (MEMORY), or from there on its sandboxes seem not to die (UNDEAD). The
command sees the variable too, which does no harm.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from egressd.broker.runners import cycle
from egressd.broker.runners import zygote as runners
from egressd.model.verdicts import Reason
from egressd.sandbox import launch

serve = cycle.serve
kill_child = launch.Running._kill_child


def memory() -> None:
    raise MemoryError


def undead() -> None:
    def seem_undead(running: launch.Running) -> None:
        kill_child(running)
        raise launch.Undead(Reason.UNAVAILABLE, "it does not die")

    launch.Running._kill_child = seem_undead  # type: ignore[method-assign]


ACTIONS: dict[str, Callable[[], None]] = {"MEMORY": memory, "UNDEAD": undead}


def faulty(job: Any, desk: Any) -> None:
    at, _, action = job.environment.get("EGRESSD_TEST_AT", "").partition(" ")

    def step(name: str) -> None:
        if name == at.replace("-", " "):
            ACTIONS.get(action, lambda: os.kill(os.getpid(), signal.Signals[action]))()

    serve(job, desk, step=step)


runners.cycle.serve = faulty  # type: ignore[assignment]
sys.exit(runners.main(sys.argv[1:]))
