"""From nothing, from each earlier version, and never from a later one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text
from store_world import ANN, fill

from egressd.access.roles import Role
from egressd.broker.store.engine import engine_for, parsed, writing
from egressd.broker.store.schema import METADATA, REVISIONS
from egressd.broker.store.store import Store
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason


@contextlib.contextmanager
def engine(url: str) -> Iterator[Engine]:
    made = engine_for(parsed(url))
    yield made
    made.dispose()


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", "egressd.broker.store:migrations")
    made.set_main_option("path_separator", "os")
    return made


def bring_to(url: str, revision: str) -> None:
    with engine(url) as made, writing(made) as connection:
        alembic = config()
        alembic.attributes["connection"] = connection
        command.upgrade(alembic, revision)


def test_the_revisions_are_those_of_the_program() -> None:
    script = ScriptDirectory.from_config(config())
    assert [one.revision for one in reversed(list(script.walk_revisions()))] == list(REVISIONS)
    assert script.get_heads() == [REVISIONS[-1]]


def test_migrated_from_nothing_it_has_the_tables_of_the_program(url: str) -> None:
    Store.open(url).close()
    with engine(url) as made, made.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": "egressd_version"}
        )
        assert compare_metadata(context, METADATA) == []
        assert set(inspect(connection).get_table_names()) == {*METADATA.tables, "egressd_version"}


@pytest.mark.parametrize("revision", REVISIONS)
def test_from_each_version_members_and_generation_stay(url: str, revision: str) -> None:
    bring_to(url, revision)
    with engine(url) as made, writing(made) as connection:
        connection.execute(text("INSERT INTO workspaces VALUES ('acme', 7)"))
        connection.execute(
            text("INSERT INTO memberships VALUES ('acme', 'user:okta:ann', 'owner', 'secret', 'uid 0', 1.5)")
        )
    with Store.open(url) as store:
        found = store.snapshot("acme", ANN, ["handbook:a.md"])
        assert (found.asker.role, found.asker.clearance, found.generation) == (Role.OWNER, "secret", 7)
        fill(store)
        assert store.snapshot("acme", ANN, ["handbook:a.md"]).generation == 8


@pytest.mark.parametrize("found", ["", *REVISIONS[:-1]])
def test_an_older_one_is_left_alone_where_that_is_wanted(url: str, found: str) -> None:
    if found:
        bring_to(url, found)
    with pytest.raises(Refused, match=f"it is of version {found or 'none'}, not {REVISIONS[-1]}"):
        Store.open(url, migrate=False)
    Store.open(url).close()
    Store.open(url, migrate=False).close()


def test_a_newer_one_is_refused_and_left_as_it_is(url: str) -> None:
    with Store.open(url) as store:
        fill(store)
    with engine(url) as made, writing(made) as connection:
        connection.execute(text("UPDATE egressd_version SET version_num = '0999'"))
    for migrate in (True, False):
        with pytest.raises(Refused, match=r"version 0999, which .* does not know .*: update egressd") as said:
            Store.open(url, migrate=migrate)
        assert said.value.reason is Reason.UNAVAILABLE
    with engine(url) as made, made.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM egressd_version")).scalars().all() == ["0999"]
        assert connection.execute(text("SELECT generation FROM workspaces")).scalar_one() == 1


def test_somebody_else_s_tables_are_not_touched(url: str) -> None:
    with engine(url) as made, writing(made) as connection:
        connection.execute(text("CREATE TABLE documents (name text)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
    with pytest.raises(Refused, match="tables of other programs"):
        Store.open(url)
    with engine(url) as made, made.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"documents", "alembic_version"}


def test_a_migration_that_fails_leaves_nothing_half_done(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_to(url, "0001")
    original = METADATA.tables["sources"].name
    with engine(url) as made, writing(made) as connection:
        connection.execute(text("CREATE TABLE barriers (name text)"))  # the last that 0002 makes
    with pytest.raises(Refused, match="already exists"):
        Store.open(url)
    with engine(url) as made, made.connect() as connection:
        tables = set(inspect(connection).get_table_names())
        assert original not in tables
        assert connection.execute(text("SELECT version_num FROM egressd_version")).scalar_one() == "0001"


def test_two_that_open_it_at_once_migrate_it_once(url: str) -> None:
    opened: list[Store] = []
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            opened.append(Store.open(url))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in opened:
        assert store.generation("acme") == 0
        store.close()
    assert (len(opened), failures) == (2, [])
