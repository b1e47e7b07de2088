"""People, groups and documents for tests of the store; a record that remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from egressd.access.documents import Acl
from egressd.access.identifiers import identifier
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.store.administration import Administration, Operator
from egressd.broker.store.rows import Stored, acl_text, list_text
from egressd.broker.store.store import Membership, Source, Store
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

OPERATOR = Operator("uid 0 (root)")
FINANCE, RESEARCH, STAFF = (f"group:okta:{name}" for name in ("finance", "research", "staff"))
DIGEST = "sha256:" + "0" * 64


def asker(name: str, *groups: str) -> Identity:
    return Identity("okta", name, frozenset(groups))


ANN, BEN, CAT = asker("ann", FINANCE, STAFF), asker("ben", RESEARCH, STAFF), asker("cat")


class Journal:
    """What was put on record; refuses while `broken`."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, dict[str, Any]]] = []
        self.broken = False

    def __call__(self, workspace: str, event: str, fields: Mapping[str, Any]) -> None:
        if self.broken:
            raise Refused(Reason.UNAVAILABLE, "egressd is not running")
        self.records.append((workspace, event, dict(fields)))

    @property
    def changes(self) -> list[str]:
        return [str(fields.get("what", event)) for _, event, fields in self.records]


def administered(store: Store) -> tuple[Administration, Journal]:
    journal = Journal()
    return Administration(store, journal, clock=lambda: 1_800_000_000.0), journal


def stored(source: str, path: bytes, *, readers: Iterable[str] = (STAFF,), **fields: Any) -> Stored:
    """A row as an ingest makes it."""
    plain = {
        "id": identifier(source, path), "path": path, "size": 3, "digest": DIGEST,
        "acl": acl_text(Acl(frozenset(readers))), "clearance": "public", "groups": list_text(()),
        "problem": "", "own": None, "listed": None, "stamp": "",
    }  # fmt: skip
    return Stored(**{**plain, **fields})


def fill(store: Store, workspace: str = "acme", *, paths: Iterable[bytes] = (b"a.md", b"b.md")) -> None:
    """Ann is an owner, staff are viewers, and there are some documents."""
    with store.change(workspace) as change:
        change.put_member(Membership("user:okta:ann", Role.OWNER, "secret", "uid 0", 1.0))
        change.put_member(Membership(STAFF, Role.VIEWER, "internal", "uid 0", 1.0))
        change.put_source(Source(name="handbook", directory="/srv/handbook"))
        change.put_documents("handbook", [stored("handbook", path) for path in paths])
