"""What was said of a document, kept beside what follows from it: so a change of trust reads no file anew."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from egressd.access.statements import Statement
from egressd.access.trust import Trust, effective
from egressd.broker.store.rows import Stored, acl_text, as_names, list_text
from egressd.model.errors import Unfit

__all__ = ["as_said", "judged", "said_text"]

_MOST: Final = 1000  # characters of a problem
_LISTS: Final = ("readers", "denied", "groups")


def said_text(said: Statement | Unfit | None) -> str | None:
    """JSON; None where nothing was said. An `Unfit` is kept as what is wrong."""
    if said is None:
        return None
    if isinstance(said, Unfit):
        return json.dumps({"problem": str(said)})
    found: dict[str, Any] = {
        name: json.loads(list_text(getattr(said, name))) for name in _LISTS if getattr(said, name) is not None
    }
    if said.clearance is not None:
        found["clearance"] = said.clearance
    return json.dumps(found, separators=(",", ":"), sort_keys=True)


def as_said(text: Any) -> Statement | Unfit | None:
    """The inverse. Damage is an `Unfit`: then nobody may read the document."""
    if text is None:
        return None
    if not isinstance(text, str):
        return _damaged()
    try:
        found = json.loads(text)
        if found.keys() == {"problem"}:
            return Unfit(str(found["problem"]))
        if found.keys() - {*_LISTS, "clearance"} or not isinstance(found.get("clearance", ""), str):
            return _damaged()
        lists = {name: as_names(found[name]) for name in _LISTS if name in found}
        return Statement(clearance=found.get("clearance"), **lists)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return _damaged()


def _damaged() -> Unfit:
    """A new one each time: exceptions that are raised again grow."""
    return Unfit("what is stored of what was said about it is damaged", "ingest its source again")


def judged(document: Stored, trust: Trust, levels: tuple[str, ...], issuers: frozenset[str] | None) -> Stored:
    """With what follows, under that trust, from what was said of it."""
    found = effective(as_said(document.own), as_said(document.listed), trust, levels, issuers=issuers)
    return replace(
        document,
        acl=acl_text(found.acl),
        clearance=found.clearance,
        groups=list_text(found.groups),
        problem=_plain(found.problem),
    )


def _plain(text: str) -> str:
    """One line that both databases hold. It quotes what a document says."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST])
