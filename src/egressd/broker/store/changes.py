"""What can be read and written within one change of a workspace. Asks nobody whether it may be: see
`administration`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, Table, bindparam, delete, insert, select, text, update
from sqlalchemy.sql.elements import ColumnElement

from egressd.broker.store import schema
from egressd.broker.store.rows import Membership, Source, Stored, as_membership, as_source, as_stored

__all__ = ["Change"]

_AT_ONCE: Final = 500  # rows of one statement
# Raw columns: what a hand may have edited is looked at here, not in a converter.
_SOURCES: Final = text(
    "SELECT name, directory, front_matter, default_read, default_deny, default_groups, "
    "default_clearance, access_list, changed_by, at, ingested_at "
    "FROM sources WHERE workspace = :workspace ORDER BY name"
)
_OF_SOURCE: Final = text(
    "SELECT id, path, size, digest, acl, clearance, groups, problem, own, listed, stamp "
    "FROM documents WHERE workspace = :workspace AND source = :source"
)


class Change:
    """Over a connection in a transaction. `generation` is the workspace's, after the change."""

    def __init__(self, connection: Connection, workspace: str, generation: int) -> None:
        self.connection = connection
        self.workspace = workspace
        self.generation = generation

    def _of(self, table: Table, **columns: object) -> list[ColumnElement[bool]]:
        return [table.c.workspace == self.workspace, *(table.c[name] == v for name, v in columns.items())]

    def _drop(self, table: Table, **columns: object) -> None:
        self.connection.execute(delete(table).where(*self._of(table, **columns)))

    def _put(self, table: Table, key: Mapping[str, object], values: Mapping[str, object]) -> None:
        """Another row may have been there; the change's first statement has shut out other writers."""
        row = {"workspace": self.workspace, **key, **values}
        changed = self.connection.execute(update(table).where(*self._of(table, **key)).values(**values))
        if not changed.rowcount:
            self.connection.execute(insert(table).values(**row))

    # ---- members

    def members(self) -> tuple[Membership, ...]:
        table = schema.memberships
        rows = self.connection.execute(select(table).where(*self._of(table)).order_by(table.c.principal))
        return tuple(as_membership(row) for row in rows.mappings())

    def member(self, principal: str) -> Membership | None:
        table = schema.memberships
        row = self.connection.execute(select(table).where(*self._of(table, principal=principal)))
        found = row.mappings().one_or_none()
        return None if found is None else as_membership(found)

    def put_member(self, member: Membership) -> None:
        self._put(schema.memberships, {"principal": member.principal}, {
            "role": str(member.role), "clearance": member.clearance,
            "granted_by": member.granted_by, "at": member.at,
        })  # fmt: skip

    def drop_member(self, principal: str) -> None:
        self._drop(schema.memberships, principal=principal)

    # ---- sources

    def sources(self) -> tuple[Source, ...]:
        rows = self.connection.execute(_SOURCES, {"workspace": self.workspace})
        return tuple(as_source(row) for row in rows)

    def source(self, name: str) -> Source | None:
        return next((source for source in self.sources() if source.name == name), None)

    def put_source(self, source: Source) -> None:
        self._put(schema.sources, {"name": source.name}, source.columns())

    def drop_source(self, name: str) -> None:
        self._drop(schema.documents, source=name)
        self._drop(schema.sources, name=name)

    # ---- documents

    def documents(self, source: str) -> dict[str, Stored]:
        """By id; all that is stored of them, believed or not."""
        rows = self.connection.execute(_OF_SOURCE, {"workspace": self.workspace, "source": source})
        return {str(row[0]): as_stored(row) for row in rows}

    def put_documents(self, source: str, documents: Sequence[Stored]) -> None:
        """In place of those of the same identifiers."""
        self.drop_documents(document.id for document in documents)
        for start in range(0, len(documents), _AT_ONCE):
            rows = [
                {"workspace": self.workspace, "source": source, **document.columns()}
                for document in documents[start : start + _AT_ONCE]
            ]
            self.connection.execute(insert(schema.documents), rows)

    def judge(self, documents: Sequence[Stored]) -> None:
        """What is in force for them, and nothing else."""
        table = schema.documents
        columns = ("acl", "clearance", "groups", "problem")
        statement = (
            update(table)
            .where(*self._of(table), table.c.id == bindparam("_id"))
            .values({name: bindparam(f"_{name}") for name in columns})
        )
        rows = [{f"_{name}": getattr(one, name) for name in ("id", *columns)} for one in documents]
        for start in range(0, len(rows), _AT_ONCE):
            self.connection.execute(statement, rows[start : start + _AT_ONCE])

    def drop_documents(self, ids: Iterable[str]) -> None:
        table = schema.documents
        rest = list(ids)
        for start in range(0, len(rest), _AT_ONCE):
            some = rest[start : start + _AT_ONCE]
            self.connection.execute(delete(table).where(*self._of(table), table.c.id.in_(some)))

    # ---- barriers

    def barriers(self) -> tuple[tuple[str, str], ...]:
        table = schema.barriers
        rows = self.connection.execute(select(table.c.a, table.c.b).where(*self._of(table)))
        return tuple(sorted((str(a), str(b)) for a, b in rows))

    def put_barrier(self, a: str, b: str) -> None:
        row = {"workspace": self.workspace, "a": a, "b": b}
        self.connection.execute(insert(schema.barriers).values(**row))

    def drop_barrier(self, a: str, b: str) -> None:
        self._drop(schema.barriers, a=a, b=b)
