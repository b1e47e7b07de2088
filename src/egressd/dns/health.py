"""How the upstream servers do: whom to ask first, whom last, and when to look whether one is back.

The configured order is the order of preference, among servers that answer about equally fast. One failure
(no answer in time, unreachable, TLS refused) puts a server last: a question is worth more than another try.
It is asked again beside a question that others answer, so nobody waits for it, after pauses that double;
the first answer makes it whole. With one server alone nothing of this changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from egressd.dns.exchange import Server

__all__ = ["Health"]

_FIRST_PROBE, _LAST_PROBE = 1.0, 60.0  # seconds
_SMOOTHING = 0.125  # of each new round trip, as in RFC 6298 section 2
_FRESH = 60.0  # seconds; a slow one is not slow for ever
_SLOWER, _SLACK = 3.0, 0.05  # this many times the best and so many seconds more: not equally fast


@dataclass(slots=True)
class _Record:
    trip: float | None = None  # smoothed, seconds
    measured_at: float = 0.0
    failures: int = 0  # in a row
    probe_at: float = 0.0


class Health:
    """Times are seconds of one monotonic clock."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._records = {server: _Record() for server in servers}

    def order(self, *, now: float) -> tuple[Server, ...]:
        """Whom to ask, first to last. Every server is in it: when all are down, all are tried."""
        trips = {s: r.trip for s, r in self._records.items() if r.trip is not None and self._is_fresh(r, now)}
        bound = min(trips.values(), default=0.0) * _SLOWER + _SLACK

        def rank(server: Server) -> tuple[bool, bool]:
            return self._records[server].failures > 0, trips.get(server, 0.0) > bound

        return tuple(sorted(self._records, key=rank))  # a stable sort: else as configured

    @staticmethod
    def _is_fresh(record: _Record, now: float) -> bool:
        return not record.failures and now - record.measured_at < _FRESH

    def answered(self, server: Server, *, trip: float, now: float) -> None:
        """It said something, be it that it will not. `trip` is how long that took, in seconds."""
        record = self._records[server]
        record.failures, record.measured_at = 0, now
        record.trip = trip if record.trip is None else record.trip + (trip - record.trip) * _SMOOTHING

    def failed(self, server: Server, *, now: float) -> None:
        """It did not answer. The pause grows only once it is over, however many questions fail meanwhile."""
        record = self._records[server]
        if record.failures and now < record.probe_at:
            return
        record.failures += 1
        record.probe_at = now + _pause(record.failures)

    def is_down(self, server: Server) -> bool:
        return self._records[server].failures > 0

    def probe(self, *, now: float) -> Server | None:
        """A server that is down and due to be asked beside the next question; once per pause."""
        if all(record.failures for record in self._records.values()):
            return None  # whatever is asked tries all of them
        for server, record in self._records.items():
            if record.failures and now >= record.probe_at:
                record.failures += 1
                record.probe_at = now + _pause(record.failures)
                return server
        return None


def _pause(failures: int) -> float:
    return min(_FIRST_PROBE * 2.0 ** min(failures - 1, 16), _LAST_PROBE)
