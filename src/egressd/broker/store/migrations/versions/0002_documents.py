"""Sources, their documents, and barriers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _sources()
    _documents()
    op.create_table(
        "barriers",
        sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.workspace"), primary_key=True),
        sa.Column("a", sa.Text, primary_key=True),
        sa.Column("b", sa.Text, primary_key=True),
        sa.CheckConstraint("a <> b", name="barriers_of_two"),
    )


def _sources() -> None:
    op.create_table(
        "sources",
        sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.workspace"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("directory", sa.Text, nullable=False),
        sa.Column("front_matter", sa.Boolean, nullable=False),
        sa.Column("default_read", sa.Text, nullable=False),
        sa.Column("default_deny", sa.Text, nullable=False),
        sa.Column("default_groups", sa.Text, nullable=False),
        sa.Column("default_clearance", sa.Text, nullable=False),
        sa.Column("access_list", sa.Text, nullable=False),
        sa.Column("changed_by", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("ingested_at", sa.Double),
    )


def _documents() -> None:
    op.create_table(
        "documents",
        sa.Column("workspace", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("path", sa.LargeBinary, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("acl", sa.Text, nullable=False),
        sa.Column("clearance", sa.Text, nullable=False),
        sa.Column("groups", sa.Text, nullable=False),
        sa.Column("problem", sa.Text, nullable=False),
        sa.Column("own", sa.Text),
        sa.Column("listed", sa.Text),
        sa.Column("stamp", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(
            ["workspace", "source"], ["sources.workspace", "sources.name"], ondelete="CASCADE"
        ),
    )
    op.create_index("documents_of_source", "documents", ["workspace", "source"])
