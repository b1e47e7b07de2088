"""Durations and sizes, always with their unit: `120s`, `50MiB`. A bare number would be a guess."""

from __future__ import annotations

import re

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["duration", "duration_text", "size", "size_text"]

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_QUANTITY = re.compile(r"([1-9][0-9]{0,14})([A-Za-z]+)")


def duration(text: str) -> float:
    """Seconds of `120s`, `2m` or `1h`."""
    return float(_quantity(text, _SECONDS, "a duration such as 120s, 2m or 1h"))


def size(text: str) -> int:
    """Bytes of `4096B`, `50MiB` or `4GiB`. Decimal units (MB) are refused: too few people mean them."""
    return _quantity(text, _BYTES, "a size such as 64KiB, 50MiB or 4GiB")


def _quantity(text: str, units: dict[str, int], what: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is not None and match[2] in units:
        return int(match[1]) * units[match[2]]
    raise Unfit(f"{quoted(text)} is not {what}", _meant(match, units) or "write a whole number and its unit")


def _meant(match: re.Match[str] | None, units: dict[str, int]) -> str:
    """`4GB`, `4G` and `4gib` all mean `4GiB`, most likely."""
    if match is None:
        return ""
    likely = [unit for unit in units if unit[0].lower() == match[2][0].lower()]
    return f"write {match[1]}{likely[0]}" if len(likely) == 1 else ""


def duration_text(seconds: float) -> str:
    """The inverse of `duration`, in the largest unit that leaves a whole number."""
    return _largest(int(seconds), _SECONDS)


def size_text(count: int) -> str:
    """The inverse of `size`, in the largest unit that leaves a whole number."""
    return _largest(count, _BYTES)


def _largest(count: int, units: dict[str, int]) -> str:
    factor, unit = max((factor, unit) for unit, factor in units.items() if count % factor == 0)
    return f"{count // factor}{unit}"
