"""How often and how much at once one user may ask. No clock of its own: the time is an argument."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

__all__ = ["Bucket", "Buckets", "Places", "TooMany"]

_MOST = 10_000  # users whose bucket is remembered


class TooMany(Exception):
    """`retry_after`: whole seconds after which it is worth another try."""

    def __init__(self, text: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(text)


@dataclass(slots=True)
class Bucket:
    left: float
    at: float  # when that was so


class Buckets:
    """A token bucket for each user: `most` at once, refilled evenly within `per` seconds."""

    def __init__(self, *, most: int, per: float) -> None:
        self._most, self._per = most, per
        self._of: collections.OrderedDict[str, Bucket] = collections.OrderedDict()

    def take(self, who: str, *, now: float) -> None:
        """TooMany if there is none left."""
        bucket = self._of.get(who)
        if bucket is None:
            bucket = self._of[who] = Bucket(self._most, now)
        self._of.move_to_end(who)
        bucket.left = min(self._most, bucket.left + max(now - bucket.at, 0.0) * self._most / self._per)
        bucket.at = now
        self._forget(now)
        if bucket.left < 1:
            wait = math.ceil((1 - bucket.left) * self._per / self._most)
            raise TooMany(f"you may ask {self._most} times in {self._per:g} s", max(wait, 1))
        bucket.left -= 1

    def _forget(self, now: float) -> None:
        """Who has not asked for so long that their bucket is full again. More than `_MOST` who are not are
        more than any rate could admit: the one who has waited longest begins anew."""
        while self._of:
            who, oldest = next(iter(self._of.items()))
            if now - oldest.at < self._per and len(self._of) <= _MOST:
                return
            del self._of[who]


class Places:
    """How many may be at it at once, of one user and of all."""

    def __init__(self, *, per_user: int, at_once: int) -> None:
        self._per_user, self._at_once = per_user, at_once
        self._of: collections.Counter[str] = collections.Counter()

    @property
    def taken(self) -> int:
        return self._of.total()

    def take(self, who: str) -> None:
        """TooMany; else to be given back."""
        if self._of[who] >= self._per_user:
            raise TooMany(f"{self._per_user} inferences of yours are under way; wait for one of them", 1)
        if self._of.total() >= self._at_once:
            raise TooMany("as many inferences as this service may run are under way", 2)
        self._of[who] += 1

    def give_back(self, who: str) -> None:
        self._of[who] -= 1
        if self._of[who] <= 0:
            del self._of[who]
