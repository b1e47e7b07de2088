"""Times as people write them: a moment ago, a day, an instant."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["moment"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def moment(text: str, *, now: datetime) -> datetime:
    """`30m` before `now`, `today`, `yesterday`, `now`, a date, or a date with a time; in UTC if it does not
    say. ValueError, with examples, for anything else."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    named = {"now": now, "today": midnight, "yesterday": midnight - timedelta(days=1)}
    if text in named:
        return named[text]
    try:
        ago = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
        if ago:
            return now - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is no time: write 30m, 2h, 7d, today, yesterday or 2026-11-21T10:00"
        ) from None
