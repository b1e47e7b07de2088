"""What a broker may put on record about requests, and which of it anybody else is ever shown; and the one
thing that whoever holds a sandbox may, the outcome of a self-test.

The controller records these on the word of a broker (`processes.testifying`), beside workspace, link, boot
and the broker's user id, which are its own word. `DECIDED` and `ENDED` stand in the receipt of their sandbox:
the asker gets that, and may hand it on. So what they can say is closed; who asked, which files were shown and
what was left out stand in records of their own, which no member of a workspace is shown, by no way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from msgspec import Struct

from egressd.journal.records import Fields, Scalar, bounded

__all__ = [
    "ASKED", "BY_HOLDERS", "DECIDED", "ENDED", "EVENTS", "OWN", "PRIVATE", "REFUSED", "SELFTEST", "SHOWN",
    "Entry", "Request",
    "is_request", "is_shown", "of_sandbox", "told", "wrong",
]  # fmt: skip

ASKED: Final = "request-asked"
DECIDED: Final = "request-decided"
ENDED: Final = "request-ended"
SHOWN: Final = frozenset({DECIDED, ENDED})
_OF_REQUESTS: Final = frozenset({ASKED, DECIDED, ENDED, "request-files", "request-refused"})
# What came of attacking a sandbox (`egressd.selftest`). Not only of brokers: whoever is a member may make a
# sandbox of its own, and say this of it, once. Its fields are closed, so every member may read it.
SELFTEST: Final = "selftest"
BY_HOLDERS: Final = frozenset({SELFTEST})
EVENTS: Final = _OF_REQUESTS | {"access-changed", "documents-ingested", "leftovers-removed"} | BY_HOLDERS

# What the controller says when it does not take a broker's word.
REFUSED: Final = "testimony-refused"
# What no member of a workspace is shown; but see `is_shown`.
PRIVATE: Final = (EVENTS - BY_HOLDERS) | {REFUSED}

# What the controller adds.
OWN: Final = frozenset({"workspace", "link", "boot", "broker_uid"})

_REQUEST: Final = re.compile(r"r-[0-9a-z]{26}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MOST: Final = 1 << 62
Holds: TypeAlias = Callable[[Scalar], bool]


class Entry(Struct, frozen=True):
    """A record of one sandbox: its number and time, and what it says."""

    event: str
    seq: int
    time: str
    fields: Mapping[str, Scalar]


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """What ran in a sandbox, as its broker said. `files` were shown to it, `octets` in all; `manifest` is the
    digest of their list as it lay there. `destroyed` None: nobody said what became of them."""

    id: str
    manifest: str
    files: int
    octets: int
    role: str
    action: str
    network: str
    decided: str  # time of the record
    ended: str | None
    status: int | None
    why: str
    hit: str
    destroyed: bool | None


def is_request(text: object) -> bool:
    return isinstance(text, str) and _REQUEST.fullmatch(text) is not None


def _word(most: int) -> Holds:
    def holds(value: Scalar) -> bool:
        return isinstance(value, str) and len(value) <= most and value.isprintable()

    return holds


def _text(value: Scalar) -> bool:
    return isinstance(value, str)  # as long as any; whoever shows it escapes it


def _count(value: Scalar) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _amount(value: Scalar) -> bool:
    return type(value) in (int, float) and 0 <= value < _MOST  # type: ignore[operator]


def _status(value: Scalar) -> bool:
    return type(value) is int and -128 <= value <= 255


def _digest(value: Scalar) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


# field -> what it must be; those of `_OPTIONAL` may be absent
_FIELDS: Final[Mapping[str, Mapping[str, Holds]]] = {
    DECIDED: {
        "request": is_request,
        "role": _word(32),
        "action": _word(256),
        "cleared": _count,
        "manifest": _digest,
        "octets": _count,
        "network": lambda value: value in ("policy", "none"),
    },
    ENDED: {
        "request": is_request,
        "status": _status,
        "destroyed": lambda value: type(value) is bool,
        "why": _text,
        "hit": _word(256),
        "files": _count,
        "seconds": _amount,
        "tokens": _count,
        "cost": _amount,
    },
    SELFTEST: {
        "tried": _count,
        "refused": _count,
        "escaped": _count,
        "unclear": _count,
        "not_tried": _count,
        "table": _digest,
        "version": _word(64),
    },
}
_OPTIONAL: Final = frozenset({"why", "hit", "files", "seconds", "tokens", "cost"})


def wrong(event: str, fields: Fields) -> str:
    """Why this cannot be recorded, in words; empty if it can. Nothing is ever cut: half of a list of files
    would be another list."""
    if event not in EVENTS:
        return f"{event} is not a broker's to say"
    own = sorted(OWN & fields.keys())
    if own:
        return f"{', '.join(own)}: that is the controller's own to say"
    if event in _OF_REQUESTS and not is_request(fields.get("request")):
        return "request: not the name of one: r- and 26 lower-case letters and digits"
    if event == ASKED and not isinstance(fields.get("asker"), str):
        return "asker: missing"
    if not _whole(fields):
        return "it takes more than one record holds, or a field's name is none: send it in parts"
    return _misshapen(event, fields) if event in _FIELDS else ""


def _whole(fields: Fields) -> bool:
    """Whether all of it is recorded, also beside what the controller adds."""
    all_of_it = {**fields, **dict.fromkeys(OWN, "x" * 64)}
    return "cut_fields" not in fields and bounded(all_of_it) == all_of_it


def _misshapen(event: str, fields: Fields) -> str:
    table = _FIELDS[event]
    unknown = sorted(fields.keys() - table.keys())
    if unknown:
        return f"{unknown[0]}: {event} has no such field, since others are shown it"
    for name, holds in table.items():
        if name not in fields:
            if name not in _OPTIONAL:
                return f"{name}: missing in {event}"
        elif not holds(fields[name]):
            return f"{name}: not what {event} may say"
    return ""


# ---- who may see it


def is_shown(event: str, *, receipt: bool) -> bool:
    """Whether a record may be shown to who is not root, the daemon or the auditor. `receipt`: in the evidence
    of the one sandbox it is about, which the asker gets."""
    return event not in PRIVATE or (receipt and event in SHOWN)


# ---- what it comes to


def told(event: str, fields: Fields) -> bool:
    """Whether a record of this event says all that it must; what does not is read for nothing."""
    if event not in _FIELDS:
        return False
    return not _misshapen(event, {name: value for name, value in fields.items() if name not in OWN})


def of_sandbox(entries: Iterable[Entry]) -> Request | None:
    """The request that the records of one sandbox tell of; None if they tell of none. Of several decisions
    the first counts (that there is but one is checked elsewhere), and an end counts for its own request."""
    known = [entry for entry in entries if told(entry.event, entry.fields)]
    decision = next((entry for entry in known if entry.event == DECIDED), None)
    if decision is None:
        return None
    said = decision.fields
    ends = (e for e in known if e.event == ENDED and e.fields["request"] == said["request"])
    end = next((e for e in ends if e.seq > decision.seq), None)
    after: Mapping[str, Scalar] = {} if end is None else end.fields
    return Request(
        id=str(said["request"]),
        manifest=str(said["manifest"]),
        files=int(said["cleared"] or 0),
        octets=int(said["octets"] or 0),
        role=str(said["role"]),
        action=str(said["action"]),
        network=str(said["network"]),
        decided=decision.time,
        ended=None if end is None else end.time,
        status=None if end is None else int(after["status"] or 0),
        why=str(after.get("why") or ""),
        hit=str(after.get("hit") or ""),
        destroyed=None if end is None else after["destroyed"] is True,
    )
