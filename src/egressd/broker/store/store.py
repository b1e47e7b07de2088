"""Memberships, sources, documents and barriers of each workspace, and the one reading that a request needs.

    store = Store.open("sqlite:////var/lib/egressd-broker/store.db")
    snapshot = store.snapshot("acme", identity, candidates)
    cleared = authorise(snapshot.asker, candidates, snapshot.documents, snapshot.rules)

Changes go through `administration`, which asks who wants them and puts them on record first. Threads may
share a store; a process that forks opens its own afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection, Engine, TextClause, text

from egressd.access.documents import LEVELS, Asker, Document, Rules
from egressd.access.identifiers import MAX_IDENTIFIER
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.store.changes import Change
from egressd.broker.store.engine import (
    FilePlace,
    engine_for,
    parsed,
    place_of,
    plainly,
    reading,
    unavailable,
    writing,
)
from egressd.broker.store.migration import bring_up
from egressd.broker.store.rows import Membership, Source, Stored, as_document
from egressd.model.errors import Refused

__all__ = ["DEFAULT_STORE", "Membership", "Snapshot", "Source", "Store"]

DEFAULT_STORE: Final = "sqlite:////var/lib/egressd-broker/store.db"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of a workspace, as far as one asker and some candidates are concerned."""

    asker: Asker
    documents: Mapping[str, Document]  # of the candidates, those that exist
    rules: Rules
    generation: int  # 0: nothing was ever said about that workspace


class Store:
    """`Refused(UNAVAILABLE)` from every method where the database cannot be read or written."""

    def __init__(self, engine: Engine, place: FilePlace | None, levels: tuple[str, ...]) -> None:
        self._engine = engine
        self._place = place
        self.levels = levels
        self._statements = _statements(engine.dialect.name)

    @classmethod
    def open(cls, url: str, *, migrate: bool = True, levels: tuple[str, ...] = LEVELS) -> Store:
        """Made if it is not there, migrated if it is older than the program. `levels` is the ladder of
        clearances, lowest first. `Unfit` for a URL that is none; `Refused` for a store that is newer than the
        program, or that others could have written to."""
        where = parsed(url)
        place = place_of(where)
        engine = engine_for(where)
        try:
            bring_up(engine, migrate=migrate)
        except Refused:
            engine.dispose()
            raise
        return cls(engine, place, levels)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(Refused), plainly():
            self._engine.dispose()

    @property
    def owner(self) -> int | None:
        """The uid that the database file belongs to; None for one that is not a file."""
        return None if self._place is None else self._place.owner

    @property
    def owner_group(self) -> int:
        """The file's gid; this process's own for one that is not a file."""
        return os.getegid() if self._place is None else self._place.path.lstat().st_gid

    # ---- what a request needs

    def snapshot(self, workspace: str, identity: Identity, candidates: Sequence[str]) -> Snapshot:
        """In one transaction, by the same statements whatever there is to be found, and by the same work for
        each candidate.

        The role is the highest, and the clearance is the highest, of all memberships of the asker's
        principals; they need not be of the same one. Linear in the number of candidates.
        """
        workspace = _spelled(workspace)
        names = list(identity.principals)
        ids = [id for id in dict.fromkeys(candidates) if _nameable(id)]
        with self._reading() as connection:
            generation = _generation(connection, workspace)
            grants = self._rows(connection, "grants", workspace, names)
            barriers = connection.execute(_BARRIERS, {"workspace": workspace}).all()
            rows = self._rows(connection, "documents", workspace, ids)
        documents = {row[0]: as_document(row) for row in rows}
        for _ in range(len(ids) - len(rows)):
            as_document(_NOT_THERE)  # takes as long as one that is
        return Snapshot(
            asker=self._asker(identity, grants),
            documents=MappingProxyType(documents),
            rules=Rules(levels=self.levels, barriers=_pairs(barriers)),
            generation=generation,
        )

    def _rows(
        self, connection: Connection, what: str, workspace: str, names: list[str]
    ) -> Sequence[Sequence[Any]]:
        # One parameter, however many names: the statement stays the same, and the time linear.
        return connection.execute(
            self._statements[what], {"workspace": workspace, "names": json.dumps(names)}
        ).all()

    def _asker(self, identity: Identity, grants: Iterable[Sequence[Any]]) -> Asker:
        found = [(Role.of(str(row[0])), str(row[1])) for row in grants]
        held = [one for one in found if one[0] is not Role.NONE]
        return Asker(
            identity=identity,
            role=max((role for role, _ in held), default=Role.NONE),
            clearance=max((clearance for _, clearance in held), default="", key=self.rank),
        )

    def rank(self, level: str) -> int:
        """Of a clearance, on the ladder; below all of it for one that the ladder does not have."""
        return self.levels.index(level) if level in self.levels else -1

    def generation(self, workspace: str) -> int:
        """Moves with every change of the workspace, and never back."""
        with self._reading() as connection:
            return _generation(connection, _spelled(workspace))

    # ---- what administration shows

    def members(self, workspace: str) -> tuple[Membership, ...]:
        with self._reading() as connection:
            return Change(connection, workspace, 0).members()

    def sources(self, workspace: str) -> tuple[Source, ...]:
        with self._reading() as connection:
            return Change(connection, workspace, 0).sources()

    def barriers(self, workspace: str) -> tuple[tuple[str, str], ...]:
        with self._reading() as connection:
            return Change(connection, workspace, 0).barriers()

    def stored(self, workspace: str, source: str) -> dict[str, Stored]:
        with self._reading() as connection:
            return Change(connection, workspace, 0).documents(source)

    # ---- changes: for `administration` alone

    @contextlib.contextmanager
    def change(self, workspace: str) -> Iterator[Change]:
        """One writer at a time in a workspace. The generation has moved when this is committed, at the end;
        whatever is raised inside leaves everything as it was."""
        self._check()
        with writing(self._engine) as connection:
            generation = connection.execute(_BUMP, {"workspace": workspace}).scalar_one()
            yield Change(connection, workspace, generation)

    def asker(self, change: Change, identity: Identity) -> Asker:
        """As it stands in that change."""
        rows = self._rows(change.connection, "grants", change.workspace, list(identity.principals))
        return self._asker(identity, rows)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._check()
        with reading(self._engine) as connection:
            yield connection

    def _check(self) -> None:
        if self._place is not None:
            self._place.check()


_GENERATION: Final = text("SELECT generation FROM workspaces WHERE workspace = :workspace")
_BARRIERS: Final = text("SELECT a, b FROM barriers WHERE workspace = :workspace")
# The first statement of every change: its row is the lock on which the workspace's writers wait.
_BUMP: Final = text(
    "INSERT INTO workspaces (workspace, generation) VALUES (:workspace, 1) ON CONFLICT (workspace) "
    "DO UPDATE SET generation = workspaces.generation + 1 RETURNING generation"
)
_GRANTS: Final = "SELECT role, clearance FROM memberships WHERE workspace = :workspace AND principal IN ({})"
# Raw columns: what a hand may have edited must not fail in a converter, for all candidates at once.
_DOCUMENTS: Final = (
    "SELECT d.id, d.source, s.directory, d.path, d.size, d.digest, d.acl, d.clearance, d.groups, d.problem "
    "FROM documents d JOIN sources s ON s.workspace = d.workspace AND s.name = d.source "
    "WHERE d.workspace = :workspace AND d.id IN ({})"
)
_NOT_THERE: Final = (
    "x:x", "x", "/", b"x", 0, "sha256:" + "0" * 64, '{"read":["user:x:x"],"deny":[]}', "x", "[]", "",
)  # fmt: skip
_EACH: Final = {
    "sqlite": "SELECT value FROM json_each(:names)",
    "postgresql": "SELECT json_array_elements_text(CAST(:names AS json))",
}


def _statements(dialect: str) -> dict[str, TextClause]:
    names = _EACH[dialect]
    return {"grants": text(_GRANTS.format(names)), "documents": text(_DOCUMENTS.format(names))}


def _generation(connection: Connection, workspace: str) -> int:
    found = connection.execute(_GENERATION, {"workspace": workspace}).scalar_one_or_none()
    if found is None:
        return 0
    if type(found) is not int:
        raise unavailable(f"the generation of {workspace} is damaged")
    return found


def _pairs(rows: Iterable[Sequence[Any]]) -> frozenset[frozenset[str]]:
    """A barrier that is damaged would be one that does not hold: then nothing is decided at all."""
    pairs = frozenset(frozenset(row) for row in rows)
    if any(len(pair) != 2 or not all(isinstance(name, str) for name in pair) for pair in pairs):
        raise unavailable("a barrier is damaged: remove it, and add it again")
    return pairs


def _spelled(workspace: str) -> str:
    """What could be no workspace's name is looked up under one that nothing has, by the same statements."""
    return workspace if _nameable(workspace) else ""


def _nameable(id: str) -> bool:
    return len(id) <= MAX_IDENTIFIER and id.isascii() and id.isprintable()
