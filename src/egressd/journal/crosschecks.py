"""What the records of a proof say against each other, or against what its reader would take for granted.

A proof of an honest machine may have any of these, so none of them breaks it; each is told. They are also
what is left to see where somebody with the key left records out: counters, guards and policies are in many
places, and who hides one has to hide all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from egressd.journal.lines import Line
from egressd.journal.snapshots import LinkTotals
from egressd.journal.statement import Predicate

__all__ = ["remarks"]

_ALARMS: Final = frozenset(
    {
        "books-restarted", "books-unbalanced", "clock-stepped", "drift", "journal-damaged",
        "journal-torn", "journal-truncated", "lease-refused", "log-ended", "peer-broken", "process-hung",
        "process-killed", "record-refused", "sandbox-lost", "tampered",
    }
)  # fmt: skip
_STATES: Final = frozenset({"snapshot", "sandbox-opening"})  # these say which policy and guard were in force
_TERMS: Final = ("in", "ok", "denied", "other")


def remarks(
    predicate: Predicate, lines: Sequence[Line], *, apart: Callable[[str, str], bool]
) -> Iterator[tuple[str, str]]:
    """(name of the check, text) of each. `lines`: all records, those before the window first. `apart`:
    whether two times differ by more than records that are written late explain."""
    base = predicate.window.base
    told = [line for line in lines[base:] if line.event in _ALARMS]
    # The last record before the window is the snapshot that it begins with.
    states = [line for line in lines[max(base - 1, 0) :] if line.event in _STATES]
    yield from _asked(predicate, apart)
    yield from _alarms(told)
    yield from _guards(predicate, states)
    yield from _policies(predicate, states)
    yield from _backwards(lines[base:], apart)
    yield from _unexplained(predicate, states)


def _asked(predicate: Predicate, apart: Callable[[str, str], bool]) -> Iterator[tuple[str, str]]:
    """A window that is not the one that was asked for, because there is nothing before it or after."""
    window = predicate.window
    wanted, begins = window.asked_since, window.since
    if wanted and begins and wanted < begins and apart(wanted, begins):
        yield "window", f"It was asked for from {wanted} on, and begins only at {begins}."
    if window.asked_until and window.until and window.until < window.asked_until:
        yield "window", f"It was asked for until {window.asked_until}, and ends at {window.until}, when made."


def _alarms(told: Sequence[Line]) -> Iterator[tuple[str, str]]:
    if told:
        counts = Counter(line.event for line in told)
        what = ", ".join(f"{count} {event}" for event, count in sorted(counts.items()))
        first = told[0]
        yield "alarms", f"egressd raised alarms: {what}; the first is record {first.seq}, of {first.time}."


def _guards(predicate: Predicate, states: Sequence[Line]) -> Iterator[tuple[str, str]]:
    now = predicate.policy.guard
    for guard in ("off", "observe", "enforce"):
        found = [line for line in states if line.fields.get("guard") == guard]
        if found and guard != now:
            weak = "" if guard == "enforce" else ": what was not listed was let through meanwhile"
            yield (
                "guard",
                f"The guard was {guard} too, by {len(found)} records from {found[0].time} to"
                f" {found[-1].time}{weak}.",
            )


def _policies(predicate: Predicate, states: Sequence[Line]) -> Iterator[tuple[str, str]]:
    changes = predicate.summary.policy_changes
    known = {predicate.policy.digest, *(c.policy for c in changes), *(c.policy_before for c in changes)}
    odd = [line for line in states if line.fields.get("policy") not in (None, *known)]
    if odd:
        yield (
            "policy-changes",
            f"Record {odd[0].seq}, of {odd[0].time}, was made under another policy"
            f" ({odd[0].fields['policy']}), and no record tells of a change: egressd was started with another"
            " one, or a record is missing.",
        )


def _backwards(lines: Sequence[Line], apart: Callable[[str, str], bool]) -> Iterator[tuple[str, str]]:
    """Records are numbered as they were written. Those of a minute are not looked at closer."""
    latest = ""
    for line in lines:
        if line.time >= latest:
            latest = line.time
        elif line.time[:16] != latest[:16] and apart(line.time, latest):
            yield "window", f"Time goes back: record {line.seq} is of {line.time}, after one of {latest}."
            return


def _unexplained(predicate: Predicate, states: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """What was counted, against the sandboxes. They can be compared where each is in the proof whole, and
    none was open at the last snapshot."""
    summary = predicate.summary
    snapshots = [line for line in states if line.event == "snapshot"]
    if predicate.scope.link is not None or not snapshots or snapshots[-1].fields.get("links") != 0:
        return
    if any(each.opened is None or each.totals is None for each in summary.sandboxes):
        return
    for term in _TERMS:
        counted = _pair(summary.totals, term)
        parts = [_pair(each.totals, term) for each in summary.sandboxes if each.totals is not None]
        packets = counted[0] - sum(part[0] for part in parts)
        octets = counted[1] - sum(part[1] for part in parts)
        if packets > 0 or octets > 0:
            yield (
                "sandboxes",
                f"{packets} packets ({octets} bytes, {term}) were counted that are of no sandbox in the"
                " proof: records of one are missing.",
            )
            return


def _pair(totals: LinkTotals, term: str) -> tuple[int, int]:
    return getattr(totals, f"{term}_packets"), getattr(totals, f"{term}_bytes")
