"""When a name is looked up again."""

from __future__ import annotations

import pytest

from egressd.dns import schedule


@pytest.mark.parametrize(
    ("ttl", "jitter", "seconds"),
    [
        (0, 0.0, 5.0),
        (1, 1.0, 5.0),
        (60, 0.0, 54.0),
        (60, 1.0, 48.0),
        (60, 9.0, 48.0),  # a draw out of range stays in range
        (60, -9.0, 54.0),
        (3600, 0.0, 3240.0),
        (1 << 31, 0.0, 3240.0),
    ],
)
def test_refreshed_before_the_ttl_ends(ttl: float, jitter: float, seconds: float) -> None:
    assert schedule.refresh_after(ttl, jitter=jitter) == pytest.approx(seconds)


def test_pauses_grow_to_a_bound() -> None:
    pauses = [schedule.retry_after(n, jitter=0.0) for n in range(1, 12)]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert schedule.retry_after(10**9, jitter=1.0) == 225
    assert schedule.retry_after(1, jitter=1.0) == 1


@pytest.mark.parametrize(("now", "expected"), [(100, False), (86_400, False), (86_401, True)])
def test_stale_for_a_day(now: float, expected: bool) -> None:
    assert schedule.is_stale_too_long(good_at=0, now=now) is expected
