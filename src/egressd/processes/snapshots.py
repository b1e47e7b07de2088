"""Snapshots: the books of a workspace as records, so that what a journal says can be added up.

A snapshot is one `counted` record for each host and each reason of denial, and then one `snapshot` record
with the totals and the number of those rows; all carry its id. A reader who finds fewer rows knows that some
were lost and does not use it. One that is not `full` has only the rows that changed since the one before.

Within an *epoch* every number of a workspace begins at nothing and only grows, whatever the kernel's counters
do: hosts that are removed and come back count on, names of wildcards keep a row of their own after they were
given back, and processes that start again and count from zero are added to what they had counted. So the
difference of two snapshots of one epoch is what happened between them. Another epoch begins, with a full
snapshot, when controller or warden are others, and when counters were lost with the ruleset. It counts from
the last snapshot on that is in the journal, wherever that is known (`Remembered` keeps it for the next
controller), so that nothing is in two epochs, or in none but what was lost.

The journal's channel never waits, and what does not fit is lost. A snapshot of ten thousand hosts does not
fit: it is handed over in pieces, whenever less than half of the channel is in use. The rest is for those who
cannot wait.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Policy
from egressd.processes import reports
from egressd.processes.remembered import Retiring
from egressd.ruleset.books import Books
from egressd.ruleset.observe import Counters, Tally

if TYPE_CHECKING:
    from egressd.processes.controller import Controller
    from egressd.processes.grants import Grant

__all__ = ["Refusals", "Snapshots"]

log = logging.getLogger("controller")

EVERY, FULL_EVERY = 60.0, 3600.0  # seconds
BATCH = 100  # records between two looks at what else there is to do
_PAUSE = 0.005  # seconds after a batch: at most 20,000 records a second, less than any journal takes
_PATIENCE = 10.0  # seconds without room for a single record
MAX_RELEASED = 16_384  # names of one workspace that are remembered after they were given back

Fields: TypeAlias = dict[str, str | int | float | bool | None]
Numbers: TypeAlias = dict[str, int]
Counts: TypeAlias = Mapping[str, Mapping[str, int]]
_NOTHING = Tally()
_TOTALS = "total"  # its key, beside "host eu.api.example", "name a.search.example", "denied unlisted"
_OF_A_HOST = ("out_packets", "out_bytes", "in_packets", "in_bytes", "connections", "dialled_packets",
              "dialled_bytes")  # fmt: skip
_KINDS: Mapping[Retiring, str] = {"retired": "out", "dialled": "dialled", "replies": "in"}
# Numbers that nobody keeps when who counts them begins anew: a process that died.
_RESTARTING = frozenset({"names_refused", "flows_refused"})


@dataclass(frozen=True, slots=True)
class Refusals:
    """What resolver and inspector refused: workspace -> reason -> count. Empty where they were not asked."""

    names: Counts
    flows: Counts


@dataclass(slots=True)
class Released:
    """What a name of a wildcard had counted when it was given back, by kind. The books have it under the
    wildcard."""

    wildcard: str
    counted: dict[Retiring, Tally] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """One row of a reading, or the totals: its numbers as they are counted, and what is said beside them."""

    numbers: Numbers
    words: Fields

    def add(self, kind: Retiring, tally: Tally) -> None:
        if kind == "opened":
            self.numbers["connections"] += tally.packets
            return
        self.numbers[f"{_KINDS[kind]}_packets"] += tally.packets
        self.numbers[f"{_KINDS[kind]}_bytes"] += tally.bytes


@dataclass(slots=True)
class Book:
    """One workspace's epoch. `base`: what was counted before it; `raw`: the last reading; `gone`: what those
    had counted who began anew; `shown`: the rows that are in the journal, if it is `complete`."""

    epoch: str
    base: dict[str, Numbers]
    raw: dict[str, Numbers] = field(default_factory=dict)
    gone: dict[str, Numbers] = field(default_factory=dict)
    shown: dict[str, Fields] = field(default_factory=dict)
    totals: Fields = field(default_factory=dict)
    complete: bool = False
    number: int = 0  # of the last that was handed over
    taken: float = -EVERY  # on the monotonic clock
    full: float = -FULL_EVERY

    def count(self, key: str, numbers: Numbers) -> Numbers:
        """From the kernel's numbers to the epoch's. `Shrunk` if there is less than there was."""
        base = self.base.get(key, {})
        before, gone = self.raw.get(key, base), self.gone.setdefault(key, {})
        for what, now in numbers.items():
            last = before.get(what, 0)
            if now < last and what not in _RESTARTING:
                raise Shrunk(f"{key}: {what}")
            if now < last:
                gone[what] = gone.get(what, 0) + last
        self.raw[key] = numbers
        return {what: now + gone.get(what, 0) - base.get(what, 0) for what, now in numbers.items()}


class Shrunk(Exception):
    """Counters were lost: this epoch cannot go on."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A snapshot that is about to be handed over. `raw` is what the next epoch would begin with."""

    number: int
    book: Book
    rows: dict[str, Fields]  # all
    shown: list[Fields]  # those that are recorded
    totals: Fields
    full: bool
    raw: dict[str, Numbers]

    @property
    def id(self) -> str:
        return f"s{self.number}-{self.book.epoch}"


class Snapshots:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._books: dict[str, Book] = {}
        self._released: dict[str, dict[str, Released]] = {}  # by workspace and name
        self._numbers = itertools.count(1)
        self._began = 0  # milliseconds: of the last epoch
        self._readers = 0  # auditors that came after the first
        self._lock = asyncio.Lock()

    # ---- epochs

    def begin_anew(self, *, lost: bool = False) -> None:
        """Another epoch for every workspace. `lost`: its counters are at zero, with a ruleset made anew."""
        self._books.clear()
        if lost:
            self._released.clear()
            self._controller.remembered.counted.clear()

    def forget(self, workspace: str) -> None:
        """The workspace is gone; if it comes back, it counts from zero."""
        self._books.pop(workspace, None)
        self._released.pop(workspace, None)
        self._controller.remembered.counted.pop(workspace, None)

    def distrust(self) -> None:
        """Rows may have been lost on their way to an auditor that is gone: the next snapshot of each
        workspace has all of them."""
        self._readers += 1
        for book in self._books.values():
            book.complete = False

    def released(self, grant: Grant, kind: Retiring, last: Tally) -> None:
        """An element of this name has left its map with this counter, which its wildcard's row has now."""
        names = self._released.setdefault(grant.workspace, {})
        mine = names.setdefault(grant.host, Released(grant.wildcard))
        mine.counted[kind] = mine.counted.get(kind, _NOTHING) + last

    def _begin(self, workspace: str, reading: Mapping[str, Row]) -> Book:
        self._began = max(self._began + 1, int(time.time() * 1000))
        base = _base(self._controller.remembered.counted.get(workspace, {}), reading)
        book = self._books[workspace] = Book(f"{self._controller.boot[:8] or 'unknown'}-{self._began}", base)
        return book

    # ---- taking

    def due(self) -> bool:
        """Is it time to look whether something has changed?"""
        return bool(self._waiting())

    async def refusals(self) -> Refusals:
        return Refusals(
            *await asyncio.gather(self._controller.refused_names(), self._controller.refused_flows())
        )

    async def record(self, counters: Counters, found: Books, refused: Refusals) -> None:
        """From this reading: of each workspace whose turn it is, if anything in it has changed."""
        if self._lock.locked():
            return  # a newer reading is being handed over; this one would come after it
        async with self._lock:
            drafts = [self._draft(policy, counters, found, refused) for policy in self._waiting()]
            for draft in drafts:
                if draft.full or draft.shown or draft.totals != draft.book.totals:
                    await self._hand_over(draft)
                draft.book.taken = time.monotonic()

    def _waiting(self) -> list[Policy]:
        now, policies = time.monotonic(), self._controller.policies
        return [
            policy
            for name, policy in policies.items()
            if name not in self._books or now - self._books[name].taken >= EVERY
        ]

    async def take(self, *workspaces: str, full: bool = False) -> dict[str, str]:
        """Of these workspaces, now, changed or not; returns their ids once all of it is handed over. Refused
        or PeerGone if the journal does not take it, or the counters cannot be read."""
        async with self._lock:
            refused = await self.refusals()
            counters, found = await reports.read_books(self._controller)
            policies = self._controller.policies
            drafts = [
                self._draft(policies[name], counters, found, refused, full=full)
                for name in workspaces
                if name in policies
            ]
            for draft in drafts:
                await self._hand_over(draft)
        return {str(draft.totals["workspace"]): draft.id for draft in drafts}

    async def draft(self, *workspaces: str) -> list[Draft]:
        """As they are now, for `hand_over` in its own time: whoever asks is about to change them."""
        counters, found = await reports.read_books(self._controller)
        policies, unknown = self._controller.policies, Refusals({}, {})
        return [self._draft(policies[name], counters, found, unknown) for name in workspaces]

    async def hand_over(self, drafts: Iterable[Draft]) -> None:
        async with self._lock:
            for draft in drafts:
                if draft.number > draft.book.number:  # else there is a newer one already
                    await self._hand_over(draft)

    def _draft(
        self, policy: Policy, counters: Counters, found: Books, refused: Refusals, *, full: bool = False
    ) -> Draft:
        """With nothing awaited since the reading, so that the accounts are as they were then."""
        document = reports.account(self._controller, counters, found, policy)
        book, rows, totals = self._counted(policy, document, refused)
        full = full or not book.complete or time.monotonic() - book.full >= FULL_EVERY
        shown = [row for key, row in rows.items() if full or book.shown.get(key) != row]
        return Draft(next(self._numbers), book, rows, shown, totals, full, _for_the_next(book.raw, rows))

    def _counted(
        self, policy: Policy, document: reports.Document, refused: Refusals
    ) -> tuple[Book, dict[str, Fields], Fields]:
        name = policy.workspace
        book, released = self._books.get(name), self._released.get(name, {})
        if len(released) > MAX_RELEASED:
            book, released = None, self._released.pop(name) and {}
        if book is not None:
            try:
                return book, *_of_the_epoch(book, _reading(book, released, document, policy, refused))
            except Shrunk as shrunk:
                log.warning("counters of %s began anew (%s), and so do its snapshots", name, shrunk)
        book = self._begin(name, _reading(None, released, document, policy, refused))
        return book, *_of_the_epoch(book, _reading(book, released, document, policy, refused))

    # ---- handing over

    async def _hand_over(self, draft: Draft) -> None:
        book, workspace, readers = draft.book, str(draft.totals["workspace"]), self._readers
        book.complete = False
        head: Fields = {"workspace": workspace, "snapshot": draft.id}
        for number, row in enumerate(draft.shown, 1):
            await self._send("counted", head | row, left=len(draft.shown) + 1 - number)
            if number % BATCH == 0:
                await asyncio.sleep(_PAUSE)
        about: Fields = {"epoch": book.epoch, "rows": len(draft.shown), "full": draft.full}
        await self._send("snapshot", head | about | draft.totals, left=0)
        if draft.full:
            await self._place(workspace)
        if readers != self._readers:
            raise Refused(Reason.UNAVAILABLE, "the auditor was started again meanwhile; ask again")
        book.number = draft.number
        book.shown, book.totals, book.complete = draft.rows, draft.totals, True
        book.taken = time.monotonic()
        book.full = book.taken if draft.full else book.full
        if self._books.get(workspace) is book:  # else the counters it is about are others by now
            self._controller.remembered.counted[workspace] = draft.raw
            self._controller.remembered.save_counted()

    async def _place(self, workspace: str) -> None:
        for number, fields in enumerate(list(self._controller.residency.placements(workspace)), 1):
            await self._send("residency-admitted", {**fields}, left=0)
            if number % BATCH == 0:
                await asyncio.sleep(_PAUSE)

    async def _send(self, event: str, fields: Fields, *, left: int) -> None:
        auditing = self._controller.auditing
        message = messages.Event(process=auditing.process, event=event, fields=fields)
        end = time.monotonic() + _PATIENCE
        while not auditing.offer(message):
            if time.monotonic() > end:
                auditing.lost += 1 + left
                raise Refused(Reason.UNAVAILABLE, "the auditor does not take records; see egressctl status")
            await asyncio.sleep(_PAUSE)


# ---- from a reading to rows


def _base(before: Mapping[str, Numbers], reading: Mapping[str, Row]) -> dict[str, Numbers]:
    """What was counted when the last snapshot was taken, as far as it is still there. What a name's row had
    and has no more is in its wildcard's row now."""
    base = {_as_host(key): dict(numbers) for key, numbers in before.items()}
    for key in [_as_host(key) for key in before if key.startswith("name ")]:
        pattern = _covering(key.removeprefix("host "), reading)
        now = reading[key].numbers if key in reading else {}
        if pattern is not None:
            into = base.setdefault(pattern, {})
            for what in _OF_A_HOST:
                into[what] = into.get(what, 0) + max(base[key].get(what, 0) - now.get(what, 0), 0)
    return {key: _lesser(numbers, reading[key].numbers) for key, numbers in base.items() if key in reading}


def _as_host(key: str) -> str:
    return f"host {key.removeprefix('name ')}" if key.startswith("name ") else key


def _for_the_next(raw: Mapping[str, Numbers], rows: Mapping[str, Fields]) -> dict[str, Numbers]:
    """`raw`, with names of wildcards told from hosts: what they counted will move."""
    names = {key for key, row in rows.items() if "wildcard" in row}
    return {
        f"name {key.removeprefix('host ')}" if key in names else key: numbers for key, numbers in raw.items()
    }


def _lesser(before: Numbers, now: Numbers) -> Numbers:
    """Of what restarts, what it was; of the rest no more than there is now."""
    return {
        what: value if what in _RESTARTING else min(value, now.get(what, 0)) for what, value in before.items()
    }


def _covering(host: str, reading: Mapping[str, Row]) -> str | None:
    """The key of the wildcard's row to which a name's counters went: the most specific that covers it."""
    labels = host.split(".")
    for number in range(1, len(labels)):
        for stars in ("*", "**") if number == 1 else ("**",):
            key = f"host {stars}.{'.'.join(labels[number:])}"
            if key in reading:
                return key
    return None


def _of_the_epoch(book: Book, reading: Mapping[str, Row]) -> tuple[dict[str, Fields], Fields]:
    """(rows that have counted anything, totals). `Shrunk` if this is another epoch."""
    rows: dict[str, Fields] = {}
    for key, row in reading.items():
        numbers = book.count(key, row.numbers)
        if any(numbers.values()) or key == _TOTALS:
            rows[key] = {**row.words, **numbers}
    return rows, rows.pop(_TOTALS)


def _reading(
    book: Book | None,
    released: Mapping[str, Released],
    document: reports.Document,
    policy: Policy,
    refused: Refusals,
) -> dict[str, Row]:
    hosts = _hosts(document["hosts"])
    for name, gone in released.items():
        row, pattern = hosts.setdefault(name, _host("granted")), hosts.get(gone.wildcard)
        row.words["wildcard"] = gone.wildcard
        for kind, tally in gone.counted.items():
            row.add(kind, tally)
            if pattern is not None:
                pattern.add(kind, _NOTHING - tally)
    reading = {f"host {name}": Row(row.numbers, {"host": name, **row.words}) for name, row in hosts.items()}
    for reason, (packets, octets) in document["denied"].items():
        numbers = {"denied_packets": packets, "denied_bytes": octets}
        reading[f"denied {reason}"] = Row(numbers, {"reason": reason})
    reading[_TOTALS] = _totals(book, document, policy, refused)
    return reading


def _hosts(documents: Iterable[reports.Document]) -> dict[str, Row]:
    """By host: one that was removed and is there again has counted in two places."""
    hosts: dict[str, Row] = {}
    for document in documents:
        row = hosts.setdefault(document["host"], _host(document["kind"]))
        row.add("retired", Tally(*document["out"]))
        row.add("dialled", Tally(*(document["dialled"] or (0, 0))))
        row.add("replies", Tally(*document["in"]))
        row.add("opened", Tally(document["connections"], 0))
        if document["addresses"]:
            row.words["addresses"] = " ".join(document["addresses"])
        if "wildcard" in document:
            row.words["wildcard"] = document["wildcard"]
    return hosts


def _host(kind: str) -> Row:
    return Row(dict.fromkeys(_OF_A_HOST, 0), {"kind": kind, "addresses": ""})


def _totals(book: Book | None, document: reports.Document, policy: Policy, refused: Refusals) -> Row:
    balance = document["balance"]
    numbers: Numbers = {}
    for name, of in (("in", "in"), ("ok", "admitted"), ("denied", "denied"), ("other", "other")):
        numbers |= {f"{name}_packets": balance[of][0], f"{name}_bytes": balance[of][1]}
    before = book.raw.get(_TOTALS, book.base.get(_TOTALS, {})) if book is not None else {}
    for what, found in (("names_refused", refused.names), ("flows_refused", refused.flows)):
        # who could not be asked has not forgotten
        of_workspace = sum(found.get(policy.workspace, {}).values())
        numbers[what] = of_workspace if found else before.get(what, 0)
    words: Fields = {
        "workspace": policy.workspace,
        "links": len(document["links"]),
        "balanced": balance["balanced"],
        "policy": policy.digest,
        "guard": policy.guard.value,
    }
    return Row(numbers, words)
