"""A zygote whose runners stop, or end, where their job says: `faulty_zygote.py SOCKET`.

A job's variable EGRESSD_TEST_AT is "STEP ACTION": the runner sends itself the signal ACTION when it comes to
STEP. The command sees the variable too, which does no harm.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from egressd.broker import cycle, runners

serve = cycle.serve


def faulty(job: Any, desk: Any) -> None:
    at, _, action = job.environment.get("EGRESSD_TEST_AT", "").partition(" ")

    def step(name: str) -> None:
        if name == at.replace("-", " "):
            os.kill(os.getpid(), signal.Signals[action])

    serve(job, desk, step=step)


runners.cycle.serve = faulty  # type: ignore[assignment]
sys.exit(runners.main(sys.argv[1:]))
