"""Workspaces, and who has which role in each."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "workspaces",
        sa.Column("workspace", sa.Text, primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "memberships",
        sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.workspace"), primary_key=True),
        sa.Column("principal", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("clearance", sa.Text, nullable=False),
        sa.Column("granted_by", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
