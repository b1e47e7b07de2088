"""How much of a slow test is run: EGRESSD_SCALE, 1 unless said otherwise. See `make test-slow-short`."""

from __future__ import annotations

import os

__all__ = ["scaled"]


def scaled(count: int, *, least: int = 1) -> int:
    """`count` times EGRESSD_SCALE; never less than `least`, under which the test would show nothing."""
    return max(least, round(count * float(os.environ.get("EGRESSD_SCALE", "1"))))
