"""What a wildcard lets sandboxes ask upstream, counted: names, bytes of names, and how fast.

A name that only a wildcard covers is chosen by whoever asks, so its labels carry whatever the asker wants
out. Two accounts bound that. A sandbox has so many distinct names and so many bytes in its whole life; a
workspace holds so many names at a time, and so many bytes per day. Both have a rate.

`names` of a workspace are counted by the owner of the names (wildcards.py), who passes how many it holds.
A day's bytes are a bucket: full at first, refilled evenly over 24 hours. So within any period of T days no
more than (1 + T) times the budget leave.

Everything is looked at before anything is charged: a question that is refused costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from egressd.model.verdicts import Reason
from egressd.policy.compiled import Budget, Budgets

__all__ = ["Account", "Bucket", "Spent"]

DAY = 86_400.0  # seconds


@dataclass(frozen=True, slots=True)
class Spent:
    """Which budget does not allow it; `text` is for whoever asked."""

    reason: Reason
    text: str


@dataclass(slots=True)
class Bucket:
    """`capacity` at once, `rate` per second from then on. Times are seconds of one monotonic clock."""

    capacity: float
    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, capacity: float, rate: float, *, now: float) -> Bucket:
        return cls(capacity, rate, capacity, now)

    def has(self, amount: float, *, now: float) -> bool:
        self._fill(now)
        return amount <= self.level

    def take(self, amount: float, *, now: float) -> None:
        self._fill(now)
        self.level -= amount

    def resize(self, capacity: float, rate: float, *, now: float) -> None:
        """The budget was changed: what is used stays used."""
        self._fill(now)
        used = self.capacity - self.level
        self.capacity, self.rate, self.level = capacity, rate, capacity - used

    def _fill(self, now: float) -> None:
        if now > self.at:
            self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
            self.at = now


def _per_second(rate: float, *, now: float) -> Bucket:
    return Bucket.full(_burst(rate), rate, now=now)


def _burst(rate: float) -> float:
    """A second's worth at once, and never less than one question."""
    return max(rate, 1.0)


@dataclass(slots=True)
class _Purse:
    """Of one sandbox. At most `names` entries, so it is as small as its budget."""

    rate: Bucket
    names: set[str] = field(default_factory=set)
    bytes: int = 0


class Account:
    """The budgets of one workspace and of each of its sandboxes."""

    def __init__(self, budgets: Budgets, *, now: float) -> None:
        self.budgets = budgets
        shared = budgets.workspace
        self._rate = _per_second(shared.rate, now=now)
        self._bytes = Bucket.full(shared.bytes, shared.bytes / DAY, now=now)
        self._purses: dict[int, _Purse] = {}  # by link

    def __len__(self) -> int:
        """How many sandboxes have asked for anything."""
        return len(self._purses)

    def change(self, budgets: Budgets, *, now: float) -> None:
        """Another policy: what is spent stays spent."""
        self.budgets = budgets
        shared, own = budgets.workspace, budgets.sandbox
        self._rate.resize(_burst(shared.rate), shared.rate, now=now)
        self._bytes.resize(shared.bytes, shared.bytes / DAY, now=now)
        for purse in self._purses.values():
            purse.rate.resize(_burst(own.rate), own.rate, now=now)

    def close(self, link: int) -> None:
        """The sandbox has ended."""
        self._purses.pop(link, None)

    def close_all(self) -> None:
        """All of them have ended."""
        self._purses.clear()

    def charge(self, link: int, host: str, cost: int, *, held: int, now: float) -> Spent | None:
        """Pay for one question upstream: `cost` bytes of labels that the asker chose, `held` names held
        already. None when it is paid, else why not, and nothing is charged."""
        purse = self._purses.get(link)
        if purse is None:
            purse = self._purses[link] = _Purse(_per_second(self.budgets.sandbox.rate, now=now))
        spent = self._own(purse, host, cost, now) or self._shared(cost, held, now)
        if spent is None:
            purse.names.add(host)
            purse.bytes += cost
            purse.rate.take(1, now=now)
            self._bytes.take(cost, now=now)
            self._rate.take(1, now=now)
        return spent

    def _own(self, purse: _Purse, host: str, cost: int, now: float) -> Spent | None:
        budget = self.budgets.sandbox
        if host not in purse.names and len(purse.names) >= budget.names:
            return _names("sandbox", budget, "in its life")
        if purse.bytes + cost > budget.bytes:
            return _bytes("sandbox", budget, "in its life")
        return None if purse.rate.has(1, now=now) else _rate("sandbox", budget)

    def _shared(self, cost: int, held: int, now: float) -> Spent | None:
        budget = self.budgets.workspace
        if held >= budget.names:
            return _names("workspace", budget, "at a time")
        if not self._bytes.has(cost, now=now):
            return _bytes("workspace", budget, "per day")
        return None if self._rate.has(1, now=now) else _rate("workspace", budget)


def _names(whose: str, budget: Budget, period: str) -> Spent:
    text = f"the budget of this {whose} for names of wildcards is spent: {budget.names} {period}"
    return Spent(Reason.BUDGET_NAMES, text)


def _bytes(whose: str, budget: Budget, period: str) -> Spent:
    text = f"the budget of this {whose} for bytes in names of wildcards is spent: {budget.bytes} {period}"
    return Spent(Reason.BUDGET_BYTES, text)


def _rate(whose: str, budget: Budget) -> Spent:
    text = (
        f"this {whose} asks for fresh names of wildcards faster than its budget: {budget.rate:g} per second"
    )
    return Spent(Reason.BUDGET_RATE, text)
