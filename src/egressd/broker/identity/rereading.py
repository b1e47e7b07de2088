"""Files that somebody else changes while the service runs: keys, and who is in which group.

Such a file is read whole each time it is asked for, and parsed only if its bytes are others than before:
modification times have too coarse a grain to tell. What cannot be read or parsed is no answer; the old one
is not kept, because whoever emptied the file may have meant it. Change files by rename(2), or half of one
may be read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from egressd.model.errors import EgressdError

__all__ = ["Reread", "Unavailable"]

T = TypeVar("T")


class Unavailable(EgressdError):
    """What would decide is not to be had now. Nobody is believed meanwhile. The text is for the record."""


class Reread(Generic[T]):
    """`parse` gets all bytes of the file, at most `limit`, and raises an `EgressdError` for what is wrong."""

    def __init__(self, path: str, parse: Callable[[bytes], T], *, limit: int) -> None:
        self._path = Path(path)
        self._parse = parse
        self._limit = limit
        self._last: tuple[bytes, T | str] | None = None  # replaced whole: threads read it without a lock

    def value(self) -> T:
        """What stands in the file now. `Unavailable` says what is wrong with it."""
        data = self._bytes()
        last = self._last
        if last is None or last[0] != data:
            last = self._last = (data, self._parsed(data))
        if isinstance(last[1], str):
            raise Unavailable(last[1])
        return last[1]

    def _bytes(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                data = file.read(self._limit + 1)
        except OSError as error:
            raise Unavailable(f"{self._path}: {error.strerror}") from error
        if len(data) > self._limit:
            raise Unavailable(f"{self._path} has more than {self._limit} bytes")
        return data

    def _parsed(self, data: bytes) -> T | str:
        """The fault is kept, too: a broken file is parsed once."""
        try:
            return self._parse(data)
        except EgressdError as error:
            return f"{self._path}: {error}"
