"""Between rows and nouns. What is written is canonical; what is read is believed only if it is."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from egressd.access.documents import Acl, Document
from egressd.access.identifiers import identifier
from egressd.access.principals import principal
from egressd.access.roles import Role
from egressd.access.trust import Trust
from egressd.broker.store.engine import unavailable

__all__ = [
    "DIGEST", "Membership", "Source", "Stored", "acl_text", "as_acl", "as_document", "as_membership",
    "as_names", "as_principals", "as_source", "as_stored", "list_text",
]  # fmt: skip

DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
MAX_PRINCIPALS: Final = 10_000  # of one list
DAMAGED: Final = "what is stored about it is damaged: ingest its source again"


@dataclass(frozen=True, slots=True)
class Membership:
    """`principal` may be a group: then of everybody in it."""

    principal: str
    role: Role
    clearance: str  # a level
    granted_by: str
    at: float  # Unix time, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A directory of documents, and what is believed of it."""

    name: str
    directory: str
    trust: Trust = field(default_factory=Trust)
    access_list: str = ""  # digest of the one that it was ingested with; "" without
    changed_by: str = ""
    at: float = 0.0
    ingested_at: float | None = None

    def columns(self) -> dict[str, object]:
        return {
            "directory": self.directory,
            "front_matter": self.trust.front_matter,
            "default_read": list_text(self.trust.default.readers),
            "default_deny": list_text(self.trust.default.denied),
            "default_groups": list_text(self.trust.default_groups),
            "default_clearance": self.trust.default_clearance,
            "access_list": self.access_list,
            "changed_by": self.changed_by,
            "at": self.at,
            "ingested_at": self.ingested_at,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A document's row, as it is spelled there: two that are equal say the same."""

    id: str
    path: bytes
    size: int
    digest: str
    acl: str
    clearance: str
    groups: str
    problem: str
    own: str | None  # JSON: what its front matter says
    listed: str | None  # JSON: what the source system's list says of it
    stamp: str  # of the file when it was read

    def columns(self) -> dict[str, object]:
        return asdict(self)


def list_text(names: Iterable[str]) -> str:
    return json.dumps(sorted(names), separators=(",", ":"))


def acl_text(acl: Acl) -> str:
    return f'{{"read":{list_text(acl.readers)},"deny":{list_text(acl.denied)}}}'


# Many documents have the same list; decoding each one's anew would be half of the time of a request.
@functools.lru_cache(maxsize=4096)
def as_principals(text: str) -> frozenset[str]:
    """`ValueError` for anything that `list_text` would not have written of principals."""
    return as_names(json.loads(text))


@functools.lru_cache(maxsize=4096)
def as_acl(text: str) -> Acl:
    """`ValueError` for anything that is not exactly a list of who may and one of who may not."""
    found = json.loads(text, object_pairs_hook=_once)
    if not isinstance(found, dict) or found.keys() != {"read", "deny"}:
        raise ValueError("not an access list")
    return Acl(readers=as_names(found["read"]), denied=as_names(found["deny"]))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two lists of the same name it could be either that is meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def as_names(found: object) -> frozenset[str]:
    if not isinstance(found, list) or len(found) > MAX_PRINCIPALS:
        raise ValueError("not a list of principals")
    return frozenset(principal(name) for name in found)


def as_membership(row: Mapping[Any, Any]) -> Membership:
    return Membership(
        principal=str(row["principal"]), role=Role.of(str(row["role"])), clearance=str(row["clearance"]),
        granted_by=str(row["granted_by"]), at=float(row["at"]),
    )  # fmt: skip


def as_source(row: Sequence[Any]) -> Source:
    """`Refused` for one that is damaged: a list of who may not read that is lost would be a permission."""
    name, directory, front_matter, read, deny, groups, clearance, access_list, by, at, ingested_at = row
    try:
        trust = Trust(
            front_matter=front_matter in (True, 1),
            default=Acl(as_principals(read), as_principals(deny)),
            default_clearance=str(clearance),
            default_groups=as_principals(groups),
        )
        return Source(
            name=str(name), directory=str(directory), trust=trust, access_list=str(access_list),
            changed_by=str(by), at=float(at), ingested_at=None if ingested_at is None else float(ingested_at),
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError) as error:
        raise unavailable(f"what it says about source {name} is damaged: drop it, ingest it again") from error


def as_stored(row: Sequence[Any]) -> Stored:
    """Whatever is there: this is compared and replaced, and never decides."""
    id, path, size, digest, acl, clearance, groups, problem, own, listed, stamp = row
    return Stored(
        id=id, path=path, size=size, digest=digest, acl=acl, clearance=clearance, groups=groups,
        problem=problem, own=own, listed=listed, stamp=stamp,
    )  # fmt: skip


def as_document(row: Sequence[Any]) -> Document:
    """Of raw columns, which SQLite lets be of any type. Damage makes it a document that nobody may read."""
    id, source, root, path, size, digest, acl, clearance, groups, problem = row
    try:
        if not (_texts(id, source, root, digest, clearance, problem) and _is_size(size)):
            return _damaged(id)
        if not (DIGEST.fullmatch(digest) and root.startswith("/") and _named(id, source, path)):
            return _damaged(id)
        return Document(
            id=id, root=root, path=path, size=size, digest=digest, acl=as_acl(acl),
            clearance=clearance, groups=as_principals(groups), problem=problem,
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError):  # Unfit and JSON's own are ValueErrors
        return _damaged(id)


def _texts(*values: object) -> bool:
    return all(type(value) is str for value in values)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _named(id: str, source: str, path: bytes) -> bool:
    """Whether that is the document's identifier: a row that was edited could name one document and lead to
    another."""
    return isinstance(path, bytes) and identifier(source, path) == id


def _damaged(id: object) -> Document:
    return Document(id=str(id), root="/", path=b"", size=0, digest="", problem=DAMAGED)
