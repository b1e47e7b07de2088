"""The store, over SQLite and over PostgreSQL: what a request reads, and what it never reads."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import event
from store_world import ANN, BEN, CAT, FINANCE, RESEARCH, STAFF, asker, fill, stored

from egressd.access.authorise import Finding, authorise, judge
from egressd.access.documents import LEVELS, Asker
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.store import rows as store_rows
from egressd.broker.store.store import Membership, Source, Store
from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


def put(store: Store, *members: Membership) -> None:
    with store.change("acme") as change:
        for member in members:
            change.put_member(member)


def member(principal: str, role: Role, clearance: str = "public") -> Membership:
    return Membership(principal, role, clearance, "uid 0", 1.0)


def execute(url: str, statement: str, *values: Any) -> None:
    """By a hand that goes past us."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        connection.execute(statement.replace("%s", "?"), values)
    else:
        connection = psycopg.connect(url.replace("+psycopg", ""))
        connection.execute(statement.encode(), values)
    connection.commit()
    connection.close()


# ---- an empty store, and a workspace that nobody knows


def test_an_empty_store_knows_nobody_and_nothing(store: Store) -> None:
    found = store.snapshot("acme", ANN, ["handbook:a.md"])
    assert found.asker == Asker(ANN, Role.NONE, "")
    assert (dict(found.documents), found.generation) == ({}, 0)
    assert (found.rules.levels, found.rules.barriers) == (LEVELS, frozenset())
    assert store.generation("acme") == 0


@pytest.mark.parametrize(
    "workspace", ["nope", "", "ACME", "acme\0", "acm\u00e9", "a" * 5000, "acme'; DROP TABLE documents; --"]
)
def test_another_workspace_shows_nothing(store: Store, workspace: str) -> None:
    fill(store)
    found = store.snapshot(workspace, ANN, ["handbook:a.md"])
    assert (found.asker.role, dict(found.documents), found.generation) == (Role.NONE, {}, 0)


# ---- roles and clearances


@pytest.mark.parametrize(
    ("members", "who", "role", "clearance"),
    [
        ([("user:okta:ann", Role.VIEWER, "public")], ANN, Role.VIEWER, "public"),
        ([("user:okta:ann", Role.VIEWER, "public")], BEN, Role.NONE, ""),
        ([("user:entra:ann", Role.OWNER, "secret")], ANN, Role.NONE, ""),
        ([("user:okta:ANN", Role.OWNER, "secret")], ANN, Role.NONE, ""),
        ([(STAFF, Role.EDITOR, "internal")], ANN, Role.EDITOR, "internal"),
        ([(STAFF, Role.EDITOR, "internal")], CAT, Role.NONE, ""),
        # the highest role and the highest clearance, each on its own
        ([(STAFF, Role.OWNER, "public"), (FINANCE, Role.VIEWER, "secret")], ANN, Role.OWNER, "secret"),
        ([(STAFF, Role.OWNER, "public"), (RESEARCH, Role.VIEWER, "secret")], ANN, Role.OWNER, "public"),
        # a level that is no level any more clears for nothing
        ([(STAFF, Role.VIEWER, "cosmic")], ANN, Role.VIEWER, "cosmic"),
        ([(STAFF, Role.VIEWER, "cosmic"), (FINANCE, Role.VIEWER, "public")], ANN, Role.VIEWER, "public"),
    ],
)
def test_the_role_is_the_highest_of_all_memberships(
    store: Store, members: list[tuple[str, Role, str]], who: Identity, role: Role, clearance: str
) -> None:
    put(store, *(member(*one) for one in members))
    found = store.snapshot("acme", who, ()).asker
    assert (found.role, found.clearance) == (role, clearance)


def test_a_role_that_is_none_counts_for_nothing_not_even_its_clearance(store: Store, url: str) -> None:
    put(store, member(STAFF, Role.VIEWER), member(FINANCE, Role.VIEWER, "secret"))
    execute(url, "UPDATE memberships SET role = 'emperor' WHERE principal = %s", FINANCE)
    found = store.snapshot("acme", ANN, ()).asker
    assert (found.role, found.clearance) == (Role.VIEWER, "public")


def test_a_hundred_groups_in_other_scripts_are_compared_byte_by_byte(store: Store) -> None:
    put(store, member("group:okta:Gr\u00fcn", Role.VIEWER))
    many = [f"group:okta:g{i}" for i in range(100)]
    assert store.snapshot("acme", asker("x", "group:okta:Gr\u00fcn", *many), ()).asker.role is Role.VIEWER
    assert store.snapshot("acme", asker("x", "group:okta:gr\u00fcn", *many), ()).asker.role is Role.NONE


# ---- documents


def test_documents_come_as_they_were_stored(store: Store) -> None:
    path = b"caf\xe9/\n %.md"
    fill(store, paths=(path,))
    [(id, document)] = store.snapshot("acme", ANN, ["handbook:caf%E9/%0A%20%25.md"]).documents.items()
    assert (id, document.id) == ("handbook:caf%E9/%0A%20%25.md",) * 2
    assert (document.root, document.path, document.size) == ("/srv/handbook", path, 3)
    assert (document.acl.readers, document.acl.denied) == (frozenset({STAFF}), frozenset())
    assert (document.clearance, document.groups, document.problem) == ("public", frozenset(), "")


@pytest.mark.parametrize(
    "candidate",
    ["handbook:c.md", "HANDBOOK:a.md", "handbook:a.md ", "handbook:a.md\0", "handbook:%61.md", "a.md", "",
     "handbook:\ud800", "handbook:\u00e4.md", "handbook:" + "a" * 10_000, "%", "') OR 1=1 --", '"', "[]",
     "\\"],
)  # fmt: skip
def test_what_is_not_stored_is_not_found(store: Store, candidate: str) -> None:
    fill(store)
    found = store.snapshot("acme", ANN, [candidate, "handbook:a.md", candidate])
    assert list(found.documents) == ["handbook:a.md"]


def test_a_document_is_of_its_own_workspace_alone(store: Store) -> None:
    fill(store, "acme", paths=(b"a.md",))
    fill(store, "other", paths=(b"a.md", b"b.md"))
    assert set(store.snapshot("acme", ANN, ["handbook:a.md", "handbook:b.md"]).documents) == {"handbook:a.md"}


def test_ten_thousand_candidates_are_one_reading(store: Store) -> None:
    paths = [b"d%d/f%d.md" % (i % 100, i) for i in range(10_000)]
    fill(store, paths=paths)
    wanted = [f"handbook:d{i % 100}/f{i}.md" for i in range(0, 20_000, 2)]
    found = store.snapshot("acme", BEN, wanted)
    assert len(found.documents) == 5000
    cleared = authorise(found.asker, wanted, found.documents, found.rules)
    assert (len(cleared.documents), cleared.discarded) == (5000, 5000)


@pytest.mark.parametrize("workspace", ["acme", "nope"])
@pytest.mark.parametrize("who", [ANN, CAT])
@pytest.mark.parametrize("candidates", [0, 1, 1000])
def test_the_same_statements_are_executed_whatever_there_is(
    store: Store, workspace: str, who: Identity, candidates: int
) -> None:
    fill(store)
    said: list[str] = []
    event.listen(store._engine, "before_cursor_execute", lambda *a: said.append(a[2]))
    store.snapshot(workspace, who, [f"handbook:{i}.md" for i in range(candidates)])
    selects = [text for text in said if text.startswith("SELECT")]
    assert len(selects) == 4
    assert [text.split(" FROM ")[1].split()[0] for text in selects] == [
        "workspaces", "memberships", "barriers", "documents",
    ]  # fmt: skip


@pytest.mark.parametrize(("workspace", "who"), [("acme", ANN), ("acme", CAT), ("nope", ANN)])
@pytest.mark.parametrize("candidates", [("a.md", "b.md"), ("a.md", "x.md"), ("x.md", "y.md", "x.md")])
def test_the_same_is_done_for_a_candidate_that_is_not_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, workspace: str, who: Identity, candidates: tuple[str, ...]
) -> None:
    """A stored one takes ten times as long as none: a thousand guesses could be told apart by that."""
    fill(store)
    read: list[bool] = []

    def as_document(row: Any) -> Any:
        found = store_rows.as_document(row)
        read.append(bool(found.problem))
        return found

    monkeypatch.setattr("egressd.broker.store.store.as_document", as_document)
    store.snapshot(workspace, who, [f"handbook:{name}" for name in candidates])
    assert read == [False, False]


# ---- what a hand has edited


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("acl", "{"), ("acl", ""), ("acl", "[]"), ("acl", "null"), ("acl", '{"read":["group:okta:staff"]}'),
        ("acl", '{"read":"group:okta:staff","deny":[]}'), ("acl", '{"read":["everybody"],"deny":[]}'),
        ("acl", '{"read":["group:okta:staff"],"deny":[],"deny":[]}'), ("acl", '{"read":[1],"deny":[]}'),
        ("acl", '{"read":["group:okta:staff"],"deny":[],"extra":1}'), ("acl", "[" * 100_000),
        ("acl", '{"read":["group:okta:staff"],"deny":[NaN]}'),
        ("groups", "x"), ("groups", "{}"), ("groups", "[null]"),
        ("digest", "sha256:short"), ("digest", "md5:" + "0" * 64), ("size", -1),
        ("path", b"../../etc/shadow"), ("path", b"b.md"), ("path", b""), ("path", b"a.md\0"),
    ],
)  # fmt: skip
def test_a_document_that_was_edited_is_nobody_s(store: Store, url: str, column: str, value: Any) -> None:
    fill(store)
    assert judged(store) == {"handbook:a.md": Finding.CLEARED, "handbook:b.md": Finding.CLEARED}
    execute(url, f"UPDATE documents SET {column} = %s WHERE id = 'handbook:a.md'", value)
    assert judged(store) == {"handbook:a.md": Finding.UNREADABLE, "handbook:b.md": Finding.CLEARED}


def judged(store: Store) -> dict[str, Finding]:
    found = store.snapshot("acme", ANN, ["handbook:a.md", "handbook:b.md"])
    return {id: judge(found.asker, one, found.rules) for id, one in found.documents.items()}


@pytest.mark.parametrize("directory", ["srv/handbook", ""])
def test_a_source_that_leads_nowhere_shows_nothing(store: Store, url: str, directory: str) -> None:
    fill(store)
    execute(url, "UPDATE sources SET directory = %s", directory)
    assert set(judged(store).values()) == {Finding.UNREADABLE}


@pytest.mark.parametrize(
    ("column", "value"), [("size", "many"), ("path", "a.md"), ("digest", b"\xff"), ("clearance", b"public"),
                          ("acl", b"{}"), ("problem", 0.5), ("size", 1.5)],
)  # fmt: skip
def test_sqlite_holds_values_of_any_type(tmp_path: Any, column: str, value: Any) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with Store.open(url) as store:
        fill(store)
        execute(url, f"UPDATE documents SET {column} = %s WHERE id = 'handbook:a.md'", value)
        if column == "problem":  # any text is a problem
            assert judged(store)["handbook:a.md"] is Finding.UNREADABLE
        else:
            assert judged(store) == {"handbook:a.md": Finding.UNREADABLE, "handbook:b.md": Finding.CLEARED}


def test_a_barrier_that_is_damaged_ends_all_answers(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with Store.open(url) as store:
        fill(store)
        execute(url, "INSERT INTO barriers VALUES ('acme', %s, %s)", FINANCE, b"\xff")
        with pytest.raises(Refused, match="a barrier is damaged") as refused:
            store.snapshot("acme", ANN, ["handbook:a.md"])
        assert refused.value.reason is Reason.UNAVAILABLE


# ---- barriers


def test_a_barrier_binds_both_ways(store: Store) -> None:
    with store.change("acme") as change:
        change.put_member(member(STAFF, Role.VIEWER))
        change.put_source(Source(name="s", directory="/srv/s"))
        change.put_documents("s", [
            stored("s", b"f", readers=(STAFF, FINANCE)), stored("s", b"r", readers=(STAFF, RESEARCH)),
        ])  # fmt: skip
        change.put_barrier(*sorted((FINANCE, RESEARCH)))
    for who, wanted in ((ANN, ["s:f"]), (BEN, ["s:r"])):
        found = store.snapshot("acme", who, ["s:f", "s:r"])
        cleared = authorise(found.asker, ["s:f", "s:r"], found.documents, found.rules)
        assert [document.id for document in cleared.documents] == wanted


# ---- generations, and who writes at the same time


def test_every_change_moves_the_generation_of_its_workspace_alone(store: Store) -> None:
    fill(store, "acme")
    fill(store, "other")
    put(store, member(STAFF, Role.EDITOR))
    assert (store.generation("acme"), store.generation("other")) == (2, 1)
    assert store.snapshot("acme", ANN, ()).generation == 2


def test_what_is_raised_inside_a_change_leaves_everything_as_it_was(store: Store) -> None:
    fill(store)
    with pytest.raises(KeyError), store.change("acme") as change:
        change.drop_source("handbook")
        change.drop_member("user:okta:ann")
        raise KeyError
    found = store.snapshot("acme", ANN, ["handbook:a.md"])
    assert (found.asker.role, len(found.documents), found.generation) == (Role.OWNER, 1, 1)


def test_no_bump_is_lost_when_many_write_at_once(store: Store, url: str) -> None:
    """Two threads over one store, and two over stores of their own."""
    others = [Store.open(url) for _ in range(2)]
    failures: list[BaseException] = []

    def write(which: Store) -> None:
        try:
            for _ in range(5):
                with which.change("acme") as change:
                    count = sum(m.principal.startswith("user:okta:w") for m in change.members())
                    change.put_member(member(f"user:okta:w{count}", Role.VIEWER))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(which,)) for which in (store, store, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        other.close()
    assert failures == []
    assert store.generation("acme") == 20
    assert len(store.members("acme")) == 20  # each saw all that the one before it had written


def test_a_reader_sees_one_state_while_a_writer_writes(store: Store) -> None:
    fill(store)
    with store.change("acme") as change:
        change.drop_member("user:okta:ann")
        change.drop_documents(["handbook:a.md"])
        found = store.snapshot("acme", ANN, ["handbook:a.md"])  # does not wait, either
        assert (found.asker.role, len(found.documents), found.generation) == (Role.OWNER, 1, 1)
    found = store.snapshot("acme", ANN, ["handbook:a.md"])
    assert (found.asker.role, len(found.documents), found.generation) == (Role.VIEWER, 0, 2)


def test_documents_generation_and_role_are_of_the_same_moment(store: Store) -> None:
    """The number of documents is the generation's parity, whenever it is read."""
    fill(store, paths=())
    done = threading.Event()

    def write() -> None:
        for i in range(60):
            with store.change("acme") as change:
                if i % 2:
                    change.drop_documents(["handbook:a.md"])
                else:
                    change.put_documents("handbook", [stored("handbook", b"a.md")])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not done.is_set() or not seen:
        found = store.snapshot("acme", ANN, ["handbook:a.md"])
        assert len(found.documents) == (found.generation - 1) % 2
        seen.add(found.generation)
    thread.join()
    assert store.generation("acme") == 61


# ---- a store that does not work


@pytest.mark.parametrize(
    "wrong",
    ["", "nothing", "mysql://root@localhost/x", "sqlite://", "sqlite:///:memory:", "sqlite:///relative.db",
     "sqlite:////srv/x.db?mode=memory", "sqlite+aiosqlite:////x", "postgresql+asyncpg://x/y", "://"],
)  # fmt: skip
def test_other_urls_are_refused_with_what_to_write(wrong: str) -> None:
    with pytest.raises(Unfit, match="write sqlite:////ABSOLUTE/PATH or postgresql"):
        Store.open(wrong)


def test_a_password_in_a_url_is_never_repeated() -> None:
    for url in ("mysql://root:hunter2@localhost/x", "postgresql://u:hunter2@/x?host=/nowhere"):
        with pytest.raises((Unfit, Refused)) as said:
            Store.open(url)
        assert "hunter2" not in str(said.value)


def test_a_postgresql_that_is_gone_is_unavailable(postgres: Any) -> None:
    with pytest.raises(Refused) as refused:
        Store.open(f"postgresql+psycopg://store@/nope?host={postgres.directory}")
    assert refused.value.reason is Reason.UNAVAILABLE
    assert 'database "nope" does not exist' in str(refused.value)


def test_a_connection_that_was_cut_is_made_anew(postgres: Any) -> None:
    url = postgres.empty_database()
    with Store.open(url) as store:
        fill(store)
        execute(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                     "WHERE pid <> pg_backend_pid() AND datname = current_database()")  # fmt: skip
        assert store.generation("acme") == 1
