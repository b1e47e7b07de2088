"""The store's tables, as they are now; migrations/ says how they came to be, and a test that both agree.

Everything is of one workspace, and changing anything of it adds one to that workspace's generation. Lists are
JSON in a text column, written by `rows` alone and read with distrust: a hand may have edited them.
Times are Unix time in seconds. Text is compared byte for byte by both databases.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

__all__ = ["METADATA", "REVISIONS", "barriers", "documents", "memberships", "sources", "workspaces"]

REVISIONS: Final = ("0001", "0002")  # of migrations/versions, oldest first; the last one is these tables

METADATA = MetaData()

workspaces = Table(
    "workspaces",
    METADATA,
    Column("workspace", Text, primary_key=True),
    Column("generation", BigInteger, nullable=False),
)

memberships = Table(
    "memberships",
    METADATA,
    Column("workspace", Text, ForeignKey("workspaces.workspace"), primary_key=True),
    Column("principal", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("clearance", Text, nullable=False),
    Column("granted_by", Text, nullable=False),
    Column("at", Double, nullable=False),
)

sources = Table(
    "sources",
    METADATA,
    Column("workspace", Text, ForeignKey("workspaces.workspace"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("directory", Text, nullable=False),
    Column("front_matter", Boolean, nullable=False),  # whether it is believed
    Column("default_read", Text, nullable=False),  # JSON list of principals
    Column("default_deny", Text, nullable=False),
    Column("default_groups", Text, nullable=False),
    Column("default_clearance", Text, nullable=False),
    Column("access_list", Text, nullable=False),  # digest of the one it was ingested with; "" without
    Column("changed_by", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("ingested_at", Double),
)

documents = Table(
    "documents",
    METADATA,
    Column("workspace", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("source", Text, nullable=False),
    Column("path", LargeBinary, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    # What is in force:
    Column("acl", Text, nullable=False),  # JSON {"read": [principal], "deny": [principal]}
    Column("clearance", Text, nullable=False),
    Column("groups", Text, nullable=False),  # JSON list of principals
    Column("problem", Text, nullable=False),
    # What it was computed from, so that a change of trust needs no reading of files:
    Column("own", Text),  # JSON: what the document's front matter says
    Column("listed", Text),  # JSON: what the source system's list says of it
    Column("stamp", Text, nullable=False),  # of the file when it was read
    ForeignKeyConstraint(["workspace", "source"], ["sources.workspace", "sources.name"], ondelete="CASCADE"),
    Index("documents_of_source", "workspace", "source"),
)

barriers = Table(
    "barriers",
    METADATA,
    Column("workspace", Text, ForeignKey("workspaces.workspace"), primary_key=True),
    Column("a", Text, primary_key=True),
    Column("b", Text, primary_key=True),
    CheckConstraint("a <> b", name="barriers_of_two"),
)
