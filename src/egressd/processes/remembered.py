"""What a controller must not forget when it is started again while the gateway lives on.

The kernel keeps the counters of hosts; what links that are gone had counted, and what hosts that are gone
had, is known only here, and without it the books would not balance. The numbers of names are remembered so
that a name keeps its synthetic addresses. The files lie in the run directory; the supervisor removes them
when the gateway's tables begin anew. Leases are not among them (leases_file.py): what became of each has to
be told.

In the books stands which of the warden's reports are in them (`messages.Heard`), and which links: so that
what is told again is not counted again, whenever we ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from egressd.processes import plain_files
from egressd.processes.left_behind import BOOKS, COUNTED, NUMBERS
from egressd.ruleset.allocate import Allocation
from egressd.ruleset.observe import LinkCounts, Tally

__all__ = ["Account", "Remembered", "Retiring"]

Retiring = Literal["retired", "dialled", "replies", "opened"]  # fields of Account


class Account(Struct):
    """What a workspace's links and hosts that are gone had counted."""

    links: int = 0
    ended: LinkCounts = LinkCounts()
    retired: dict[str, Tally] = {}  # by host; names that wildcards covered are counted under the wildcard
    dialled: dict[str, Tally] = {}  # the same, of what the inspector had sent upstream for them
    replies: dict[str, Tally] = {}  # the same, of what they had sent back to sandboxes
    opened: dict[str, Tally] = {}  # the same, of connections: as packets

    def end(self, last: LinkCounts) -> None:
        self.links += 1
        self.ended = LinkCounts(
            in_=self.ended.in_ + last.in_,
            ok=self.ended.ok + last.ok,
            denied=self.ended.denied + last.denied,
            other=self.ended.other + last.other,
        )

    def retire(self, kind: Retiring, host: str, last: Tally) -> None:
        sums: dict[str, Tally] = getattr(self, kind)
        sums[host] = sums.get(host, Tally()) + last


class _Books(Struct):
    accounts: dict[str, Account] = {}
    heard: list[int] = []
    settled: list[int] = []


class Remembered:
    """Accounts by workspace, and the numbers of names; on disk as soon as they are `saved`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.accounts: dict[str, Account] = {}
        self.heard: set[int] = set()  # reports that are accounted, and which the warden still keeps
        self.settled: set[int] = set()  # links that are accounted, whose lease may still be on disk
        self.allocation: Allocation | None = None
        # workspace -> row -> numbers, of the last snapshot that is in the journal (see snapshots.py)
        self.counted: dict[str, dict[str, dict[str, int]]] = {}

    def load(self) -> None:
        """ValueError for a file that is not ours."""
        books, numbers = self._directory / BOOKS, self._directory / NUMBERS
        counted = self._directory / COUNTED
        if books.exists():
            found = msgspec.json.decode(books.read_bytes(), type=_Books)
            self.accounts, self.heard, self.settled = found.accounts, set(found.heard), set(found.settled)
        if numbers.exists():
            self.allocation = msgspec.json.decode(numbers.read_bytes(), type=Allocation)

        if counted.exists():
            self.counted = msgspec.json.decode(
                counted.read_bytes(), type=dict[str, dict[str, dict[str, int]]]
            )

    def account(self, workspace: str) -> Account:
        return self.accounts.setdefault(workspace, Account())

    def save_books(self) -> None:
        books = _Books(accounts=self.accounts, heard=sorted(self.heard), settled=sorted(self.settled))
        self._write(BOOKS, books)

    def save_numbers(self) -> None:
        self._write(NUMBERS, self.allocation)

    def save_counted(self) -> None:
        self._write(COUNTED, self.counted)

    def _write(self, name: str, value: object) -> None:
        plain_files.replace(self._directory / name, msgspec.json.encode(value))
