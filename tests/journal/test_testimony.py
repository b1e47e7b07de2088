"""What a broker may say: nothing is cut, nothing that is shown says more than it should, and any record
at all can be read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal import records, testimony
from egressd.journal.records import MAX_TEXT, Record, bounded, decode, encode
from egressd.journal.testimony import ASKED, DECIDED, ENDED, EVENTS, OWN, Entry, of_sandbox, told, wrong

R1, R2 = "r-" + "a1" * 13, "r-" + "b2" * 13
DIGEST = "sha256:" + "ab" * 32
DECISION: dict[str, Any] = {
    "request": R1, "role": "viewer", "action": "summarise", "cleared": 298, "manifest": DIGEST,
    "octets": 9000, "network": "policy",
}  # fmt: skip
END: dict[str, Any] = {
    "request": R1, "status": -9, "why": "wall", "hit": "wall output", "destroyed": True, "files": 298,
    "seconds": 1.5, "tokens": 10, "cost": 0.25,
}  # fmt: skip
SECRET = {"asker", "email", "issuer", "clearance", "discarded", "candidates", "files_listed", "by"}
TIME = "2026-11-21T10:00:00.000000Z"


def entry(event: str, fields: dict[str, Any], seq: int = 1) -> Entry:
    return Entry(event, seq, TIME, {**fields, "workspace": "acme", "link": "eg7"})


# ---- what may be said


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        (DECIDED, DECISION),
        (DECIDED, {**DECISION, "cleared": 0, "octets": 0, "network": "none"}),
        (ENDED, END),
        (ENDED, {"request": R1, "status": 0, "destroyed": False}),
        (ENDED, {**END, "seconds": 2, "cost": 0}),
        (ASKED, {"request": R1, "asker": "user:okta:00u1"}),
        ("request-files", {"request": R1, "part": 1, "files": "x" * MAX_TEXT}),
        ("request-files", {"request": R1, "files": "a:b.md " + DIGEST + "\n" + "a:c%0A.md " + DIGEST}),
        ("access-changed", {}),
        ("leftovers-removed", {"count": 1, "where": "\u202e\x1b[2J"}),
    ],
)
def test_what_may_be_said(event: str, fields: dict[str, Any]) -> None:
    assert wrong(event, fields) == ""


@pytest.mark.parametrize("event", sorted(EVENTS))
@pytest.mark.parametrize("name", sorted(OWN))
def test_the_controllers_own_words_are_nobody_elses(event: str, name: str) -> None:
    assert wrong(event, {**DECISION, name: "x"}).startswith(f"{name}: ")


@pytest.mark.parametrize("event", ["sandbox-closed", "denied", "testimony-refused", "request-", ""])
def test_other_events_are_nobodys_to_say(event: str) -> None:
    assert "not a broker's to say" in wrong(event, DECISION)


@pytest.mark.parametrize(
    "request_",
    [None, 1, "", "r-", R1.upper(), R1 + "a", R1[:-1], R1 + "\n", "x" + R1[1:], "r-" + "a/" * 13],
)
def test_a_request_has_a_name(request_: Any) -> None:
    for event in (ASKED, DECIDED, ENDED, "request-files", "request-refused"):
        assert wrong(event, {**DECISION, "request": request_}).startswith("request: ")


@pytest.mark.parametrize("name", sorted(SECRET))
@pytest.mark.parametrize(("event", "fields"), [(DECIDED, DECISION), (ENDED, END)])
def test_what_is_shown_cannot_say_more(event: str, fields: dict[str, Any], name: str) -> None:
    assert (
        wrong(event, {**fields, name: 1}) == f"{name}: {event} has no such field, since others are shown it"
    )


@pytest.mark.parametrize("name", sorted(DECISION))
def test_a_decision_says_all_that_it_must(name: str) -> None:
    without = {key: value for key, value in DECISION.items() if key != name}
    assert wrong(DECIDED, without)
    assert wrong(DECIDED, {**DECISION, name: None})
    assert of_sandbox([entry(DECIDED, without)]) is None, "and is read for nothing if it does not"


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 64), 1 << 64), st.floats(), st.text(max_size=80),
    st.sampled_from([R1, DIGEST, "policy", "none", "x" * (MAX_TEXT + 1), "\U0001f600" * MAX_TEXT]),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from([*DECISION, *END, *OWN, *SECRET, "cut_fields"]),
    st.from_regex(r"[a-zA-Z_][a-z0-9_]{0,35}", fullmatch=True),
)
FIELDS = st.dictionaries(NAMES, SCALARS, max_size=12)
SAID = st.one_of(
    FIELDS, FIELDS.map(lambda more: {**DECISION, **more}), FIELDS.map(lambda more: {**END, **more})
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(EVENTS)), SAID)
def test_what_is_accepted_is_recorded_whole_and_can_be_told_apart(event: str, fields: dict[str, Any]) -> None:
    if wrong(event, fields):
        return
    own = {"workspace": "acme", "link": "eg7", "boot": "b" * 36, "broker_uid": 4001}
    line = encode(Record(1, TIME, "controller", event, bounded({**fields, **own})))
    assert decode(line).fields == {**fields, **own}
    assert told(event, {**fields, **own}) == (event in (DECIDED, ENDED))
    if event in (DECIDED, ENDED):
        assert not fields.keys() & SECRET
        assert testimony.is_shown(event, receipt=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([DECIDED, ENDED, ASKED, "denied"]), SAID), max_size=6))
def test_any_records_can_be_read(said: list[tuple[str, dict[str, Any]]]) -> None:
    """Of a proof, which anybody can have written."""
    entries = [Entry(event, seq, TIME, fields) for seq, (event, fields) in enumerate(said)]
    found = of_sandbox(entries)
    decisions = [e for e in entries if e.event == DECIDED and told(e.event, e.fields)]
    assert (found is None) == (not decisions)
    if found is not None:
        assert found.id == decisions[0].fields["request"]
        assert found.files == decisions[0].fields["cleared"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=MAX_TEXT))
def test_a_text_of_the_longest_is_recorded_as_it_is(text: str) -> None:
    fields = {"request": R1, "files": text}
    if not wrong("request-files", fields):
        line = records.encode(Record(1, TIME, "controller", "request-files", bounded(fields)))
        assert decode(line).fields == fields


# ---- what it comes to


def test_a_request_and_its_end() -> None:
    found = of_sandbox(
        [entry("request-asked", {"request": R1}), entry(DECIDED, DECISION), entry(ENDED, END, 2)]
    )
    assert found == testimony.Request(
        id=R1, manifest=DIGEST, files=298, octets=9000, role="viewer", action="summarise", network="policy",
        decided=TIME, ended=TIME, status=-9, why="wall", hit="wall output", destroyed=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "end",
    [
        [],
        [entry(ENDED, {**END, "request": R2}, 2)],
        [entry(ENDED, {**END, "destroyed": "yes"}, 2)],
        [entry(ENDED, END, 0)],
    ],
    ids=["none", "another's", "misshapen", "before it was decided"],
)
def test_without_an_end_of_its_own_nothing_is_known_of_it(end: list[Entry]) -> None:
    found = of_sandbox([*end, entry(DECIDED, DECISION)])
    assert found is not None
    assert (found.ended, found.status, found.destroyed) == (None, None, None)


def test_what_is_shown_to_whom() -> None:
    for event in testimony.PRIVATE:
        assert not testimony.is_shown(event, receipt=False)
        assert testimony.is_shown(event, receipt=True) == (event in (DECIDED, ENDED))
    for event in ("denied", "sandbox-closed", "spawn-refused"):
        assert testimony.is_shown(event, receipt=False)
