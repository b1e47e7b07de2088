"""When a name is looked up again. Times are seconds of one monotonic clock; jitter is drawn by the caller.

A name is looked up before its TTL ends, so that a sandbox never waits for it. When that fails, again with
growing pauses; the last good addresses stay for a bounded time (RFC 8767, "serve stale").
"""

from __future__ import annotations

__all__ = ["MAX_STALE", "is_stale_too_long", "refresh_after", "retry_after"]

MIN_REFRESH, MAX_REFRESH = 5.0, 3600.0  # seconds
MIN_RETRY, MAX_RETRY = 1.0, 300.0  # RFC 9520 section 3.2: at least one second, at most five minutes
MAX_STALE = 86_400.0  # seconds; RFC 8767 section 6 speaks of one to three days
_EARLY = 0.1  # of the TTL: refreshed this much before it ends, and up to as much again by jitter


def refresh_after(ttl: float, *, jitter: float) -> float:
    """Seconds from a good answer to the next look; `jitter` in [0, 1] spreads names of one TTL."""
    bounded = min(ttl, MAX_REFRESH)
    return max(bounded - bounded * _EARLY * (1 + _bounded(jitter)), MIN_REFRESH)


def retry_after(failures: int, *, jitter: float) -> float:
    """Seconds from the `failures`-th failure in a row (1 is the first) to the next look."""
    doubled = MIN_RETRY * 2.0 ** min(max(failures - 1, 0), 16)
    return max(MIN_RETRY, min(doubled, MAX_RETRY) * (1 - _bounded(jitter) / 4))


def is_stale_too_long(*, good_at: float, now: float) -> bool:
    """Whether addresses last confirmed at `good_at` may no longer serve."""
    return now - good_at > MAX_STALE


def _bounded(jitter: float) -> float:
    return min(max(jitter, 0.0), 1.0)
