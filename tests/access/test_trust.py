"""What holds for a document when several speak of it: the whole table of who is heard."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.access.documents import LEVELS, Acl
from egressd.access.statements import Statement
from egressd.access.trust import Effective, Trust, effective
from egressd.model.errors import Unfit

HR, ALL, ANN = frozenset({"group:okta:hr"}), frozenset({"group:okta:all"}), frozenset({"user:okta:ann"})
NOBODY: frozenset[str] = frozenset()
BROKEN = Unfit("line 3: ...")
PLAIN = Trust(default=Acl(ALL), default_clearance="internal")
BELIEVED = Trust(front_matter=True, default=Acl(ALL), default_clearance="internal")


def said(readers: frozenset[str] | None = None, clearance: str | None = None, **more: Any) -> Statement:
    return Statement(readers=readers, clearance=clearance, **more)


def held(readers: frozenset[str], clearance: str = "internal", **more: Any) -> Effective:
    return Effective(Acl(readers, more.get("denied", NOBODY)), clearance, more.get("groups", NOBODY), "")


# what is told, front matter, access list, trust, what holds
HELD = [
    ("nobody speaks",        None,                 None,                 PLAIN,    held(ALL)),
    ("nobody speaks",        None,                 None,                 BELIEVED, held(ALL)),
    ("no default: nobody",   None,                 None,                 Trust(default_clearance="public"),
                                                                                   held(NOBODY, "public")),
    ("the front matter",     said(HR),             None,                 BELIEVED, held(HR)),
    ("one not believed",     said(HR),             None,                 PLAIN,    held(ALL)),
    ("a broken one, neither", BROKEN,              None,                 PLAIN,    held(ALL)),
    ("the list",             None,                 said(HR),             PLAIN,    held(HR)),
    ("the list",             None,                 said(HR),             BELIEVED, held(HR)),
    ("the list, for both",   said(ANN),            said(HR),             PLAIN,    held(HR)),
    ("the list, for both",   BROKEN,               said(HR),             PLAIN,    held(HR)),
    ("both agree",           said(HR),             said(HR),             BELIEVED, held(HR)),
    ("each on its own",      said(HR),             said(None, "secret"), BELIEVED, held(HR, "secret")),
    ("each on its own",      said(None, "secret"), said(HR),             BELIEVED, held(HR, "secret")),
    ("it says nothing",      said(),               said(HR),             BELIEVED, held(HR)),
    ("it says: nobody",      said(NOBODY),         None,                 BELIEVED, held(NOBODY)),
    ("denied beside a default", said(denied=ANN),  None,                 BELIEVED, held(ALL, denied=ANN)),
    ("whose it is",          said(groups=HR),      None,                 BELIEVED, held(ALL, groups=HR)),
]  # fmt: skip

ODD, UNSET = Trust(default_clearance="x"), Trust(front_matter=True)
PROBLEMS = [
    ("a broken one",         BROKEN,               None,                 BELIEVED, "line 3"),
    ("a broken one",         BROKEN,               said(HR, "public"),   BELIEVED, "line 3"),
    ("a broken list",        None,                 BROKEN,               PLAIN,    "line 3"),
    ("a broken list",        said(HR),             BROKEN,               BELIEVED, "line 3"),
    ("they differ",          said(HR),             said(ALL),            BELIEVED, "differ in who may read"),
    ("they differ",          said(NOBODY),         said(ALL),            BELIEVED, "differ in who may read"),
    ("they differ",          said(denied=HR),      said(denied=ANN),     BELIEVED, "differ in who may not"),
    ("they differ",          said(HR, "public"),   said(HR, "secret"),   BELIEVED, "the clearance"),
    ("they differ",          said(groups=HR),      said(groups=ALL),     BELIEVED, "differ in whose it is"),
    ("an unknown level",     said(HR, "cosmic"),   None,                 BELIEVED, "not a level"),
    ("an unknown level",     None,                 said(HR, "cosmic"),   PLAIN,    "not a level"),
    ("an unknown default",   None,                 None,                 ODD,      "not a level"),
    ("no level",             said(HR),             None,                 UNSET,    "its clearance"),
    ("no level",             None,                 said(HR),             UNSET,    "its clearance"),
    ("nothing at all",       None,                 None,                 UNSET,    "its clearance"),
]  # fmt: skip


@pytest.mark.parametrize("case", HELD, ids=[case[0] for case in HELD])
def test_it_holds(case: Any) -> None:
    _, front, listed, trust, expected = case
    assert effective(front, listed, trust, LEVELS) == expected


@pytest.mark.parametrize("case", PROBLEMS, ids=[case[0] for case in PROBLEMS])
def test_it_is_unreadable(case: Any) -> None:
    _, front, listed, trust, why = case
    found = effective(front, listed, trust, LEVELS)
    assert why in found.problem
    assert found[:3] == (Acl(), "", NOBODY), "what nobody may read names nobody either"


@pytest.mark.parametrize("field", ["readers", "denied", "groups"])
def test_a_provider_that_is_not_configured_is_a_problem(field: str) -> None:
    speaks = Statement(**{field: frozenset({"group:otka:hr"})})  # type: ignore[arg-type]
    known = frozenset({"okta"})
    assert effective(None, speaks, PLAIN, LEVELS).problem == ""
    assert "is of no provider" in effective(None, speaks, PLAIN, LEVELS, issuers=known).problem
    assert effective(None, Statement(readers=HR), PLAIN, LEVELS, issuers=known).problem == ""


_LISTS = st.none() | st.sampled_from([NOBODY, HR, ALL, HR | ANN])
_STATEMENTS = st.builds(
    Statement, _LISTS, _LISTS, st.none() | st.sampled_from(["public", "secret", "x"]), _LISTS
)
_SPEAKERS = st.none() | st.just(BROKEN) | _STATEMENTS


@settings(max_examples=200, deadline=None)
@given(_SPEAKERS, _SPEAKERS, st.booleans(), st.sampled_from(["", "public", "x"]))
def test_nobody_reads_whom_no_believed_voice_named(
    front: Any, listed: Any, believed: bool, level: str
) -> None:
    trust = Trust(front_matter=believed, default=Acl(ANN), default_clearance=level)
    found = effective(front, listed, trust, LEVELS)
    voices = [one for one in (front if believed else None, listed) if isinstance(one, Statement)]
    lists = [one.readers for one in voices if one.readers is not None] or [ANN]
    assert all(found.acl.readers <= one for one in lists)
    if not found.problem:
        assert all(found.acl.denied >= one.denied for one in voices if one.denied is not None)
        assert found.clearance in LEVELS
        assert all(found.clearance == one.clearance for one in voices if one.clearance is not None)
