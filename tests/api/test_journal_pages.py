"""Pages of a journal against looking at every line of it; and where pages lead, all is found once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from egressd.journal import records
from egressd.journal.records import Record
from egressd.processes import journal_search
from egressd.processes.journal_pages import MOST_BYTES, TooLong, page
from egressd.processes.journal_search import Query, read

START = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
COUNT = 90


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Three files, the clock set back once between."""
    directory = tmp_path_factory.mktemp("journal")
    written = []
    for seq in range(COUNT):
        moment = START + timedelta(seconds=seq if seq < 50 else seq - 20)
        workspace = ("acme", "rival", None)[seq % 3]
        event = "clock-stepped" if seq == 50 else ("denied", "flow")[seq % 2]
        fields = {
            "workspace": workspace,
            "name": "n" * (seq % 40),
            "route": "default" if seq % 7 == 0 else None,
        }
        written.append(records.encode(Record(seq, records.stamp(moment), "auditor", event, fields)))
    for number in range(3):
        (directory / f"000{number + 1}.jsonl").write_bytes(b"".join(written[30 * number : 30 * number + 30]))
    return directory, [line[:-1] for line in written]


queries = st.builds(
    Query,
    workspaces=st.none() | st.sets(st.sampled_from(["acme", "rival", "x"])).map(frozenset),
    events=st.none() | st.just(frozenset({"denied"})),
    unshown=st.just(frozenset()) | st.sampled_from([frozenset({"denied"}), frozenset({"flow", "lost"})]),
    route=st.none() | st.just("default"),
    after=st.none() | st.integers(-1, COUNT + 5),
    since=st.none() | st.integers(-5, COUNT).map(lambda s: START + timedelta(seconds=s)),
    until=st.none() | st.integers(-5, COUNT).map(lambda s: START + timedelta(seconds=s)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=queries, limit=st.integers(1, COUNT), hasty=st.booleans())
def test_pages_are_what_looking_at_every_line_finds(
    lines: tuple[Path, list[bytes]], query: Query, limit: int, hasty: bool
) -> None:
    directory, written = lines
    expected = [line for line in written if query.holds(read(line))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_search, "_GRAIN", 300)
        patch.setattr(journal_search, "_FUZZY", 900)
        patch.setattr(journal_search, "_CHUNK", 1000)
        patch.setattr(journal_search, "_SLACK", timedelta(0))
        if query.since is None and query.after is None:
            try:
                found = page(str(directory), query, limit=limit, over=lambda: hasty)
            except TooLong:
                assert hasty
                return
            assert list(found.lines) == expected[-limit:]
            return
        seen: list[bytes] = []
        asked: Any = query
        for _ in range(COUNT + 5):
            found = page(str(directory), asked, limit=limit, over=lambda: hasty)
            assert len(found.lines) <= limit
            seen += found.lines
            if found.after is None:
                break
            assert asked.after is None or found.after > asked.after, "it gets on"
            asked = Query(
                **{name: getattr(asked, name) for name in Query.__slots__ if name != "after"},
                after=found.after,
            )
        assert seen == expected


def test_who_may_see_nothing_is_shown_nothing(lines: tuple[Path, list[bytes]]) -> None:
    found = page(str(lines[0]), Query(workspaces=frozenset()), limit=100, over=lambda: False)
    assert (found.lines, found.after) == ((), None)


def test_a_page_has_no_more_bytes_than_may_wait_for_who_does_not_read_it(tmp_path: Path) -> None:
    """Records hold what sandboxes say: 1000 of the longest would be 64 MiB in an answer."""
    word = "\U0001f600" * 1000  # 12 bytes each, as a record spells it
    made = [
        records.encode(Record(number, records.stamp(START), "controller", "attempt",
                              {"workspace": "acme", "a": word, "b": word, "c": word}))
        for number in range(400)
    ]  # fmt: skip
    (tmp_path / "0001.jsonl").write_bytes(b"".join(made))
    lines = [line.rstrip(b"\n") for line in made]
    whole = Query(workspaces=frozenset({"acme"}))
    last = page(str(tmp_path), whole, limit=1000, over=lambda: False)
    assert last.after is None and last.lines == tuple(lines[-len(last.lines) :])
    seen: list[bytes] = []
    after: int | None = -1
    while after is not None:
        query = Query(workspaces=frozenset({"acme"}), after=after)
        found = page(str(tmp_path), query, limit=1000, over=lambda: False)
        assert sum(map(len, found.lines)) < MOST_BYTES + len(lines[0])
        seen, after = [*seen, *found.lines], found.after
    assert seen == lines and len(last.lines) < len(lines)


def test_for_who_may_see_nothing_no_file_is_read(tmp_path: Path) -> None:
    """It would keep a disk busy, and tell how long the journal is."""
    (tmp_path / "0001.jsonl").mkdir()  # to open it is an error
    with pytest.raises(IsADirectoryError):
        page(str(tmp_path), Query(workspaces=frozenset({"acme"})), limit=1, over=lambda: False)
    assert page(str(tmp_path), Query(workspaces=frozenset()), limit=1, over=lambda: True).lines == ()


def test_a_name_in_another_field_is_no_workspace(tmp_path: Path) -> None:
    """Bytes only ever save work: a record that says `"workspace":"acme"` in a text is not acme's."""
    fields = {"workspace": "rival", "name": '"workspace":"acme"'}
    line = records.encode(Record(0, records.stamp(START), "resolver", "dns-refused", fields))
    (tmp_path / "0001.jsonl").write_bytes(line)
    for workspace, count in (("acme", 0), ("rival", 1)):
        query = Query(workspaces=frozenset({workspace}))
        assert len(page(str(tmp_path), query, limit=9, over=lambda: False).lines) == count
