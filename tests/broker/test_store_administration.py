"""Who may change what; that it is on record before it is made; and that nothing else is made."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_world import (
    ANN,
    BEN,
    CAT,
    FINANCE,
    OPERATOR,
    RESEARCH,
    STAFF,
    Journal,
    administered,
    asker,
    stored,
)

from egressd.access.authorise import authorise
from egressd.access.documents import Acl
from egressd.access.principals import Identity
from egressd.access.roles import Right, Role, may, may_set
from egressd.access.statements import Statement
from egressd.access.trust import Trust
from egressd.broker.store.administration import Administration, Operator, local_operator
from egressd.broker.store.statements import as_said, said_text
from egressd.broker.store.store import Membership, Source, Store
from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason

DOT = "user:okta:dot"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


@pytest.fixture
def made(store: Store) -> tuple[Administration, Journal]:
    return administered(store)


def give(store: Store, principal: str, role: Role, clearance: str = "secret") -> None:
    with store.change("acme") as change:
        if role is Role.NONE:
            change.drop_member(principal)
        else:
            change.put_member(Membership(principal, role, clearance, "uid 0", 1.0))


def reason(call: Callable[[], Any]) -> str:
    """How it went: "done", or why not."""
    try:
        call()
    except Refused as refused:
        return refused.reason.value
    return "done"


# ---- roles


def test_who_may_set_whom_is_the_table_of_roles(tmp_path: Path) -> None:
    """Every actor, every member as they are, everything they could become."""
    with Store.open(f"sqlite:///{tmp_path}/store.db") as store:
        to, _ = administered(store)
        give(store, "user:okta:another", Role.OWNER)  # so that nobody is the last
        for actor, now, then in itertools.product(Role, repeat=3):
            give(store, "user:okta:ann", actor)
            give(store, DOT, now)
            before = store.members("acme")
            how = reason(
                lambda then=then: (
                    to.remove_member(ANN, "acme", DOT)  # type: ignore[misc]
                    if then is Role.NONE
                    else to.set_member(ANN, "acme", DOT, then, "secret")
                )
            )
            if actor is Role.NONE:
                assert how == "workspace", (actor, now, then)
            elif not may(actor, Right.SET_MEMBERS):
                assert how == "member", (actor, now, then)
            elif now is then:
                assert how == "done"
            else:
                assert (how == "done") == may_set(actor, now=now, then=then), (actor, now, then)
            if how != "done":
                assert store.members("acme") == before


def test_a_stranger_is_told_what_somebody_is_told_whose_workspace_does_not_exist(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    give(store, "user:okta:ann", Role.OWNER)
    to, journal = made
    calls: list[Callable[[str], Any]] = [
        lambda w: to.members(CAT, w),
        lambda w: to.sources(CAT, w),
        lambda w: to.barriers(CAT, w),
        lambda w: to.set_member(CAT, w, DOT, Role.VIEWER),
        lambda w: to.remove_member(CAT, w, "user:okta:ann"),
        lambda w: to.set_trust(CAT, w, "handbook", front_matter=True),
        lambda w: to.drop_source(CAT, w, "handbook"),
        lambda w: to.add_barrier(CAT, w, FINANCE, RESEARCH),
        lambda w: to.remove_barrier(CAT, w, FINANCE, RESEARCH),
    ]
    for call in calls:
        told = []
        for workspace in ("acme", "nope"):
            with pytest.raises(Refused) as refused:
                call(workspace)
            told.append((refused.value.reason, str(refused.value)))
        assert told[0] == told[1] == (Reason.WORKSPACE, "there is no such workspace")
    assert journal.records == []
    assert (store.generation("acme"), store.generation("nope")) == (1, 0)


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        (Role.VIEWER, set()),
        (Role.EDITOR, {"members", "sources"}),
        (Role.ADMIN, {"members", "sources", "barriers", "trust", "drop", "barrier"}),
        (Role.OWNER, {"members", "sources", "barriers", "trust", "drop", "barrier"}),
    ],
)
def test_what_each_role_may_do(
    store: Store, made: tuple[Administration, Journal], role: Role, allowed: set[str]
) -> None:
    to, _ = made
    give(store, STAFF, role)  # by a group, too
    with store.change("acme") as change:
        change.put_source(Source(name="handbook", directory="/srv/handbook"))
    calls: dict[str, Callable[[], Any]] = {
        "members": lambda: to.members(ANN, "acme"),
        "sources": lambda: to.sources(ANN, "acme"),
        "barriers": lambda: to.barriers(ANN, "acme"),
        "trust": lambda: to.set_trust(ANN, "acme", "handbook", front_matter=True),
        "barrier": lambda: to.add_barrier(ANN, "acme", FINANCE, RESEARCH),
        "drop": lambda: to.drop_source(ANN, "acme", "handbook"),
    }
    assert {name for name, call in calls.items() if reason(call) == "done"} == allowed


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({FINANCE}, "you stand behind it yourself"),
        ({RESEARCH, STAFF}, "you stand behind it yourself"),
        ({FINANCE, RESEARCH}, "you stand behind it yourself"),
        ({STAFF}, ""),
        (set(), ""),
    ],
)
def test_a_barrier_is_not_taken_away_by_who_stands_behind_it(
    store: Store, made: tuple[Administration, Journal], groups: set[str], says: str
) -> None:
    """Whichever way it is named, and whatever their role; they may put one up all the same."""
    to, journal = made
    who = asker("ann", *groups)
    give(store, "user:okta:ann", Role.OWNER)
    assert to.add_barrier(who, "acme", FINANCE, RESEARCH) is True
    for a, b in ((FINANCE, RESEARCH), (RESEARCH, FINANCE)):
        if says:
            with pytest.raises(Refused, match=says) as refused:
                to.remove_barrier(who, "acme", a, b)
            assert refused.value.reason is Reason.MEMBER
            assert store.barriers("acme") == ((FINANCE, RESEARCH),)
            assert journal.changes == ["barrier-added"]
        else:
            assert to.remove_barrier(who, "acme", a, b) is True
            assert store.barriers("acme") == ()
            to.add_barrier(who, "acme", a, b)
    assert to.remove_barrier(OPERATOR, "acme", FINANCE, RESEARCH) is True


def test_the_role_that_counts_is_the_one_at_the_moment_of_the_change(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, _ = made
    give(store, "user:okta:ann", Role.OWNER)
    give(store, "user:okta:ben", Role.OWNER)
    to.remove_member(ANN, "acme", "user:okta:ben")
    with pytest.raises(Refused) as refused:  # the same token as before
        to.remove_member(BEN, "acme", "user:okta:ann")
    assert refused.value.reason is Reason.WORKSPACE


@pytest.mark.parametrize("who", [ANN, OPERATOR], ids=["herself", "the operator"])
def test_the_last_owner_stays(
    store: Store, made: tuple[Administration, Journal], who: Identity | Operator
) -> None:
    to, journal = made
    give(store, "user:okta:ann", Role.OWNER)
    for call in (
        lambda: to.remove_member(who, "acme", "user:okta:ann"),
        lambda: to.set_member(who, "acme", "user:okta:ann", Role.ADMIN),
    ):
        with pytest.raises(Refused, match="last owner: make somebody else owner first"):
            call()
    to.set_member(who, "acme", "user:okta:ann", Role.OWNER, "internal")  # an owner still
    to.set_member(who, "acme", STAFF, Role.OWNER, "internal")
    to.remove_member(who, "acme", "user:okta:ann")
    assert journal.changes == ["member-set", "member-set", "member-removed"]


def test_nobody_gives_a_clearance_that_they_do_not_have(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, _ = made
    give(store, "user:okta:ann", Role.OWNER, "internal")
    assert reason(lambda: to.set_member(ANN, "acme", DOT, Role.VIEWER, "internal")) == "done"
    assert reason(lambda: to.set_member(ANN, "acme", DOT, Role.VIEWER, "confidential")) == "member"
    assert reason(lambda: to.set_member(ANN, "acme", "user:okta:ann", Role.OWNER, "secret")) == "member"
    # who has more already keeps it when something else changes, and may lose it
    give(store, DOT, Role.VIEWER, "secret")
    assert reason(lambda: to.set_member(ANN, "acme", DOT, Role.EDITOR)) == "done"
    assert [m.clearance for m in store.members("acme") if m.principal == DOT] == ["secret"]
    assert reason(lambda: to.set_member(ANN, "acme", DOT, Role.EDITOR, "public")) == "done"


def test_defaults_above_one_s_own_clearance_are_not_one_s_to_set(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, _ = made
    give(store, "user:okta:ann", Role.ADMIN, "internal")
    with store.change("acme") as change:
        change.put_source(Source(name="vault", directory="/srv/vault"))
    assert reason(lambda: to.set_trust(ANN, "acme", "vault", clearance="internal")) == "done"
    assert reason(lambda: to.set_trust(ANN, "acme", "vault", clearance="secret")) == "member"
    to.set_trust(OPERATOR, "acme", "vault", clearance="secret")
    assert reason(lambda: to.set_trust(ANN, "acme", "vault", clearance="public")) == "member"


def test_a_clearance_that_documents_ask_for_is_not_taken_away_by_who_has_less(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    """Not to believe front matter any more would show an admin who is cleared for less what says "secret"."""
    to, _ = made
    give(store, "user:okta:ann", Role.ADMIN, "internal")
    trust = Trust(front_matter=True, default=Acl(frozenset({FINANCE})), default_clearance="internal")
    with store.change("acme") as change:
        change.put_source(Source(name="vault", directory="/srv/vault", trust=trust))
        own = said_text(Statement(clearance="secret"))
        change.put_documents("vault", [stored("vault", b"pay.md", clearance="secret", own=own)])

    def seen() -> int:
        found = store.snapshot("acme", ANN, ["vault:pay.md"])
        return len(authorise(found.asker, ["vault:pay.md"], found.documents, found.rules).documents)

    assert reason(lambda: to.set_trust(ANN, "acme", "vault", front_matter=False)) == "member"
    assert seen() == 0
    give(store, "user:okta:ann", Role.ADMIN, "secret")
    assert reason(lambda: to.set_trust(ANN, "acme", "vault", front_matter=False)) == "done"
    assert seen() == 1
    give(store, "user:okta:ann", Role.ADMIN, "internal")
    assert reason(lambda: to.set_trust(ANN, "acme", "vault", front_matter=True)) == "done"
    assert seen() == 0


# ---- values


@pytest.mark.parametrize(
    "call",
    [
        lambda to: to.set_member(OPERATOR, "acme", "ann", Role.VIEWER),
        lambda to: to.set_member(OPERATOR, "acme", "ann@acme.example", Role.VIEWER),
        lambda to: to.set_member(OPERATOR, "acme", "user:okta:a\nb", Role.VIEWER),
        lambda to: to.set_member(OPERATOR, "acme", "user:nobody:ann", Role.VIEWER),
        lambda to: to.set_member(OPERATOR, "acme", DOT, Role.NONE),
        lambda to: to.set_member(OPERATOR, "acme", DOT, Role.VIEWER, "cosmic"),
        lambda to: to.set_member(OPERATOR, "Acme/..", DOT, Role.VIEWER),
        lambda to: to.set_member(OPERATOR, "", DOT, Role.VIEWER),
        lambda to: to.members(OPERATOR, "acme\0"),
        lambda to: to.remove_member(OPERATOR, "acme", "dot"),
        lambda to: to.add_barrier(OPERATOR, "acme", DOT, STAFF),
        lambda to: to.add_barrier(OPERATOR, "acme", STAFF, STAFF),
        lambda to: to.add_barrier(OPERATOR, "acme", STAFF, "group:nobody:x"),
        lambda to: to.set_trust(OPERATOR, "acme", "nope"),
        lambda to: to.set_trust(OPERATOR, "acme", "no/pe", front_matter=True),
        lambda to: to.set_trust(OPERATOR, "acme", "nope", clearance="cosmic"),
        lambda to: to.set_trust(OPERATOR, "acme", "vault", read=frozenset({"everybody"})),
        lambda to: to.set_trust(OPERATOR, "acme", "vault", clearance="cosmic"),
        lambda to: to.drop_source(OPERATOR, "acme", "nope"),
    ],
)
def test_what_is_no_value_is_told_and_changes_nothing(tmp_path: Path, call: Callable[[Any], Any]) -> None:
    with Store.open(f"sqlite:///{tmp_path}/store.db") as store:
        journal = Journal()
        to = Administration(store, journal, issuers=frozenset({"okta"}))
        with store.change("acme") as change:
            change.put_source(Source(name="vault", directory="/srv/vault"))
        with pytest.raises(Unfit) as unfit:
            call(to)
        assert unfit.value.remedy
        assert (journal.records, store.generation("acme")) == ([], 1)


def test_two_spellings_of_one_name_are_one_member(store: Store, made: tuple[Administration, Journal]) -> None:
    to, _ = made
    to.set_member(OPERATOR, "acme", "group:okta:Gru\u0308n", Role.VIEWER)
    assert to.set_member(OPERATOR, "acme", "group:okta:Gr\u00fcn", Role.EDITOR) is not None
    assert [m.principal for m in store.members("acme")] == ["group:okta:Gr\u00fcn"]
    assert to.remove_member(OPERATOR, "acme", "group:okta:Gru\u0308n") is not None


# ---- on record, then made


def test_what_is_recorded_says_who_what_and_what_it_was(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, journal = made
    give(store, "user:okta:ann", Role.OWNER)
    to.set_member(ANN, "acme", DOT, Role.VIEWER)
    to.set_member(OPERATOR, "acme", DOT, Role.EDITOR, "internal")
    to.remove_member(ANN, "acme", DOT)
    to.add_barrier(OPERATOR, "acme", RESEARCH, FINANCE)
    assert journal.records == [
        ("acme", "access-changed", {
            "what": "member-set", "principal": DOT, "role": "viewer", "clearance": "public",
            "role_before": "none", "clearance_before": "", "by": "user:okta:ann", "generation": 2,
        }),
        ("acme", "access-changed", {
            "what": "member-set", "principal": DOT, "role": "editor", "clearance": "internal",
            "role_before": "viewer", "clearance_before": "public", "by": "uid 0 (root)", "generation": 3,
        }),
        ("acme", "access-changed", {
            "what": "member-removed", "principal": DOT, "role_before": "editor",
            "clearance_before": "internal", "by": "user:okta:ann", "generation": 4,
        }),
        ("acme", "access-changed", {
            "what": "barrier-added", "a": FINANCE, "b": RESEARCH, "by": "uid 0 (root)", "generation": 5,
        }),
    ]  # fmt: skip
    assert store.generation("acme") == 5


def test_what_cannot_be_recorded_is_not_made(store: Store, made: tuple[Administration, Journal]) -> None:
    to, journal = made
    give(store, STAFF, Role.VIEWER)
    with store.change("acme") as change:
        change.put_source(Source(name="vault", directory="/srv/vault"))
        change.put_documents("vault", [stored("vault", b"a")])
        change.put_barrier(*sorted((FINANCE, RESEARCH)))
    before = (store.members("acme"), store.sources("acme"), store.barriers("acme"),
              store.stored("acme", "vault"), store.generation("acme"))  # fmt: skip
    journal.broken = True
    calls: list[Callable[[], Any]] = [
        lambda: to.set_member(OPERATOR, "acme", DOT, Role.VIEWER),
        lambda: to.remove_member(OPERATOR, "acme", STAFF),
        lambda: to.set_trust(OPERATOR, "acme", "vault", front_matter=True),
        lambda: to.drop_source(OPERATOR, "acme", "vault"),
        lambda: to.add_barrier(OPERATOR, "acme", FINANCE, STAFF),
        lambda: to.remove_barrier(OPERATOR, "acme", FINANCE, RESEARCH),
    ]
    for call in calls:
        with pytest.raises(Refused, match="egressd is not running"):
            call()
    assert before == (store.members("acme"), store.sources("acme"), store.barriers("acme"),
                      store.stored("acme", "vault"), store.generation("acme"))  # fmt: skip


def test_nothing_is_admitted_before_it_is_on_record(store: Store) -> None:
    seen: list[Role] = []

    def record(workspace: str, _event: str, _fields: Any) -> None:
        seen.append(store.snapshot(workspace, BEN, ()).asker.role)

    Administration(store, record).set_member(OPERATOR, "acme", STAFF, Role.VIEWER)
    assert seen == [Role.NONE]
    assert store.snapshot("acme", BEN, ()).asker.role is Role.VIEWER


def test_what_was_recorded_and_then_failed_is_recorded_as_not_made(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, journal = made
    with pytest.raises(KeyError), to.changing(OPERATOR, "acme", Right.SET_MEMBERS) as turn:
        turn.changed("member-set", principal=DOT)
        raise KeyError
    assert journal.changes == ["member-set", "not-made"]
    assert journal.records[1][2] == {
        "what": "not-made", "event": "access-changed", "of": "member-set", "by": "uid 0 (root)",
        "generation": 1,
    }  # fmt: skip
    assert store.generation("acme") == 0


def test_what_changes_nothing_is_not_recorded_and_moves_nothing(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, journal = made
    to.set_member(OPERATOR, "acme", STAFF, Role.VIEWER)
    assert to.add_barrier(OPERATOR, "acme", FINANCE, RESEARCH) is True
    to.set_member(OPERATOR, "acme", STAFF, Role.VIEWER)
    assert to.remove_member(OPERATOR, "acme", DOT) is None
    assert to.add_barrier(OPERATOR, "acme", RESEARCH, FINANCE) is False
    assert to.remove_barrier(OPERATOR, "acme", RESEARCH, STAFF) is False
    assert journal.changes == ["member-set", "barrier-added"]
    assert store.generation("acme") == 2


# ---- trust


def test_a_change_of_trust_judges_what_is_stored_at_once(
    store: Store, made: tuple[Administration, Journal]
) -> None:
    to, journal = made
    says = said_text(Statement(frozenset({FINANCE}), None, "internal", None))
    with store.change("acme") as change:
        change.put_source(Source(name="vault", directory="/srv/vault"))
        change.put_documents("vault", [
            stored("vault", b"own", own=says, readers=(), problem="x"),
            stored("vault", b"silent", readers=(), problem="x"),
            stored("vault", b"edited", own="{", readers=(), problem="x"),
        ])  # fmt: skip

    def readers() -> dict[str, tuple[frozenset[str], str]]:
        found = store.snapshot("acme", ANN, ["vault:own", "vault:silent", "vault:edited"])
        return {
            id: (one.acl.readers, one.clearance) for id, one in found.documents.items() if not one.problem
        }

    to.set_trust(OPERATOR, "acme", "vault", clearance="public")
    assert readers() == dict.fromkeys(("vault:own", "vault:silent", "vault:edited"), (frozenset(), "public"))
    to.set_trust(OPERATOR, "acme", "vault", front_matter=True, read=frozenset({STAFF}))
    assert readers() == {
        "vault:own": (frozenset({FINANCE}), "internal"), "vault:silent": (frozenset({STAFF}), "public"),
    }  # fmt: skip
    to.set_trust(OPERATOR, "acme", "vault", front_matter=False, read=frozenset())
    assert set(readers().values()) == {(frozenset(), "public")}
    assert journal.changes == ["trust-set"] * 3
    assert journal.records[1][2]["read"] == '["group:okta:staff"]'
    assert journal.records[1][2]["read_before"] == "[]"


def test_a_record_has_room_for_the_longest_lists(store: Store, made: tuple[Administration, Journal]) -> None:
    to, journal = made
    with store.change("acme") as change:
        change.put_source(Source(name="vault", directory="/srv/vault"))
    for n in (2000, 2001):
        many = frozenset(f"group:okta:{i:04}" for i in range(n))
        to.set_trust(OPERATOR, "acme", "vault", read=many, deny=many, groups=many)
    assert all(len(value) <= 1024 for _, _, fields in journal.records for value in fields.values()
               if isinstance(value, str))  # fmt: skip
    one, other = (fields["read"] for _, _, fields in journal.records)
    assert one != other  # cut, but not to the same


# ---- what was said, as it is stored


@pytest.mark.parametrize(
    "said",
    [
        None,
        Statement(),
        Statement(readers=frozenset()),
        Statement(
            frozenset({STAFF, 'user:okta:\u00fc"\\'}), frozenset({FINANCE}), "secret", frozenset({STAFF})
        ),
    ],
)
def test_what_was_said_comes_back(said: Statement | None) -> None:
    assert as_said(said_text(said)) == said


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"readers":1}', '{"readers":["x"]}', '{"x":[]}',
                                  '{"clearance":1}', '{"readers":null}', b"{}", 7])  # fmt: skip
def test_what_is_damaged_is_a_problem(text: Any) -> None:
    assert isinstance(as_said(text), Unfit)


def test_a_problem_comes_back_as_one() -> None:
    found = as_said(said_text(Unfit("line 3: this is no list", "write [NAME]")))
    assert isinstance(found, Unfit)
    assert str(found) == "line 3: this is no list (write [NAME])"


# ---- the operator


def test_root_and_the_owner_are_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(f"sqlite:///{tmp_path}/store.db") as store:
        assert local_operator(store).name.startswith(f"uid {os.geteuid()} (")
        monkeypatch.setattr("egressd.broker.store.administration.os.geteuid", lambda: 54321)
        with pytest.raises(Refused, match="only root and the store's owner"):
            local_operator(store)


def test_a_rank_is_by_the_ladder(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/store.db", levels=("low", "high")) as store:
        assert [store.rank(level) for level in ("high", "low", "public", "")] == [1, 0, -1, -1]
        to, _ = administered(store)
        to.set_member(OPERATOR, "acme", STAFF, Role.VIEWER)
        assert store.snapshot("acme", asker("x", STAFF), ()).asker.clearance == "low"
