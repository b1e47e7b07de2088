"""Bringing a database to the version of this program. Older ones are migrated; newer ones are refused."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, inspect, text

from egressd.broker.store.engine import reading, unavailable, writing
from egressd.broker.store.schema import METADATA, REVISIONS

__all__ = ["bring_up"]

_ONE_AT_A_TIME = 0x65677264  # "egrd": a lock by number, of PostgreSQL


def bring_up(engine: Engine, *, migrate: bool) -> None:
    """`Refused` for a store of a newer version, of another program, or, without `migrate`, an older one."""
    with reading(engine) as connection:
        version = _version(connection)
    if version == REVISIONS[-1]:
        return
    if not migrate:
        raise unavailable(f"it is of version {version or 'none'}, not {REVISIONS[-1]}: start egressd-broker, "
                          "or run an egressctl verb that changes it, once as its owner")  # fmt: skip
    with writing(engine) as connection:
        _migrate(connection)


def _migrate(connection: Connection) -> None:
    """Whoever comes second finds it done."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ONE_AT_A_TIME})
    if _version(connection) == REVISIONS[-1]:
        return
    # Not imported where there is nothing to migrate: it costs as much as all the rest.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "egressd.broker.store:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _version(connection: Connection) -> str:
    """ "" where there is no store yet."""
    tables = set(inspect(connection).get_table_names())
    if "egressd_version" not in tables:
        if tables & set(METADATA.tables):
            raise unavailable("the database has tables of other programs by its names: give it its own")
        return ""
    found = [str(row[0]) for row in connection.execute(text("SELECT version_num FROM egressd_version"))]
    if not found:  # the table is left empty when every revision was taken back
        return ""
    if len(found) > 1 or found[0] not in REVISIONS:
        raise unavailable(f"it is of version {', '.join(found)[:80]}, which this egressd does not know "
                          f"(it knows up to {REVISIONS[-1]}): update egressd")  # fmt: skip
    return found[0]
