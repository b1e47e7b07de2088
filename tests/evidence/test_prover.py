"""Which records go into a proof: those of its scope and window, all of them, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scene
from egressd.journal import lines, notes, statement
from egressd.journal.keys import PrivateKey
from egressd.journal.notes import Checkpoint
from egressd.journal.statement import Scope, Statement
from egressd.journal.verification import verify
from egressd.processes import journal_reader, prover
from egressd.processes.prover import Asked, CannotProve, prove


@pytest.fixture
def story(tmp_path: Path) -> scene.Story:
    return scene.Story(tmp_path)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> scene.Story:
    """Several segments, two workspaces, snapshots full and not, some incomplete, two epochs."""
    story = scene.Story(tmp_path_factory.mktemp("long"), segment_bytes=4096)
    for turn in range(12):
        story.sandbox(7 + turn, workspace="rival" if turn % 5 == 3 else "acme")
        epoch = scene.EPOCH if turn < 7 else "5f3c0a1b-1790000999999"
        full = turn % 4 == 0 or turn == 7
        story.snapshot(openai=3 * turn, unlisted=2 * turn, full=full, lose=int(turn == 5), epoch=epoch)
        story.checkpoint()
    return story


def told(found: Statement) -> list[str]:
    """Its records in the window, by event."""
    window = found.predicate.window
    return [lines.read(line.encode()).event for line in found.predicate.journal.records.lines[window.base :]]


def test_of_two_workspaces_each_gets_its_own(story: scene.Story) -> None:
    story.snapshot()
    story.snapshot(workspace="rival", openai=99)
    story.sandbox(7)
    story.sandbox(8, workspace="rival")
    story.tell(
        "name-granted", workspace="rival", link=8, name="secret.rival.example", wildcard="*.rival.example"
    )
    story.tell("lost", process="auditor", cause="queue", count=1, **{"from": "resolver"})
    story.tell("tampered", what="element of rival_out4 is foreign", restored=True)
    story.tell("books-unbalanced", differences="rival: ok = elements + unlisted + retired")
    story.tell("dns-upstream-failed", process="resolver", name="secret.rival.example", reason="timeout")
    story.tell("denied", process="auditor", workspace=None, link=None, reason="unknown", prefix="rival:x")
    for workspace, other in (("acme", b"rival"), ("rival", b"acme")):
        found = story.state(workspace=workspace)
        assert other not in statement.encode(found)
        assert "lost" in told(found)
        assert found.predicate.withheld == {"books-unbalanced": 1, "tampered": 1}
        assert verify(scene.sealed(found, story.key)).verified


def test_a_name_that_contains_anothers_is_another(story: scene.Story) -> None:
    for workspace in ("acme", "acme-lab", "lab-acme"):
        story.sandbox(7, workspace=workspace)
    assert told(story.state(workspace="acme")).count("sandbox-opening") == 1
    assert told(story.state(workspace="lab-acme")).count("sandbox-opening") == 1


def test_a_name_in_a_text_is_no_membership(story: scene.Story) -> None:
    """What looks like the member of a record inside one of its texts is escaped there, and is text."""
    story.tell("attempt", workspace="rival", link="eg8", command='"workspace":"acme"', executable="/bin/sh")
    story.tell("tampered", what='"workspace":"acme"', restored=True)
    assert "attempt" not in told(story.state(workspace="acme"))


def test_every_record_of_the_window_is_there(story: scene.Story) -> None:
    for link in range(7, 12):
        story.sandbox(link)
    assert told(story.state()).count("sandbox-closed") == 5
    assert told(story.state(since=scene.at(8), until=scene.at(16))) == [
        "sandbox-closed",
        "sandbox-opening",
        "denied",
        "flow",
        "sandbox-closed",
        "sandbox-opening",
        "denied",
        "flow",
        "sandbox-closed",
    ]


def test_it_begins_at_the_last_complete_snapshot_before_since(story: scene.Story) -> None:
    story.snapshot(openai=1)
    story.denied(7)
    story.snapshot(openai=2)
    story.denied(9)
    story.snapshot(openai=3, full=False, lose=1)  # not complete
    story.denied(11)
    since = scene.at(story.clock + 0.5)
    story.denied(12)
    found = story.state(since=since).predicate
    assert [lines.read(line.encode()).fields.get("link") for line in found.journal.records.lines][
        -1
    ] == "eg12"
    assert found.window.asked_since == since
    assert found.window.base == 4
    assert found.summary.epochs[0].start.ok_packets == 2
    assert found.summary.epochs[0].unusable == 1


def test_the_base_is_the_last_full_snapshot_and_what_follows_it(story: scene.Story) -> None:
    story.snapshot(openai=1)
    story.snapshot(openai=2)
    story.snapshot(openai=3, full=False)
    story.denied(9)
    story.denied(10)
    found = story.state(since=scene.at(story.clock)).predicate
    assert found.window.base == 8  # two snapshots of three rows and a closing record
    assert found.summary.events == {"denied": 2}
    assert found.window.first == found.journal.records.indices[7] + 1


def test_a_receipt_is_of_its_link_alone(story: scene.Story) -> None:
    story.snapshot()
    story.sandbox(7)
    story.sandbox(70)
    story.tell("policy-changed", workspace="acme", change="+ host x", widens=True, by="uid 0")
    story.tell("spawn-refused", workspace="acme", uid=4002, reason="member", text="no")
    assert told(story.state(link=7)) == [
        "journal-opened",
        "key-created",
        "sandbox-opening",
        "denied",
        "flow",
        "sandbox-closed",
        "policy-changed",
    ]
    with pytest.raises(CannotProve, match="end of sandbox eg8"):
        story.state(link=8)


def test_the_end_is_the_checkpoint_that_was_asked_for(story: scene.Story) -> None:
    story.denied(7)
    size = story.checkpoint()
    story.denied(9)
    story.checkpoint()
    found = prove(Asked(story.directory, Scope("acme", None), None, None, size), scene.facts_of())
    assert found.predicate.window.past == size
    assert len(told(found)) == size
    assert verify(scene.sealed(found, story.key)).verified
    with pytest.raises(CannotProve, match="no checkpoint of 1 records"):
        prove(Asked(story.directory, Scope("acme", None), None, None, 1), scene.facts_of())


def test_over_several_segments(tmp_path: Path) -> None:
    story = scene.Story(tmp_path, segment_bytes=4096)
    for turn in range(12):
        story.sandbox(7 + turn)
        story.snapshot(openai=3 * turn, unlisted=2 * turn, full=turn % 4 == 0)
        story.checkpoint()
    assert len(list(story.directory.glob("*.jsonl"))) > 5
    for seconds in (0, 10, 25, 33.3, 40, story.clock, story.clock + 100):
        found = story.state(since=scene.at(seconds))
        report = verify(scene.sealed(found, story.key), key=story.key.public)
        assert report.verified, report.broken
        begins = next((e.begins for e in found.predicate.summary.epochs), None)
        assert (begins == "at a snapshot") == (found.predicate.window.base > 0) == (seconds > 0)
        assert not [check for check in report.notes if check.name == "gap"]


def test_a_window_in_which_nothing_is_has_nothing_counted(story: scene.Story) -> None:
    found = story.state(since=scene.at(story.clock + 100))
    assert found.predicate.window.since == found.predicate.window.until == scene.at(story.clock)
    assert found.predicate.summary.totals.in_packets == 0
    assert all(host.counted.out_packets == 0 for host in found.predicate.summary.hosts)


def test_a_window_does_not_reach_into_the_future(story: scene.Story) -> None:
    proof = story.proof(until=scene.at(story.clock + 86_400))
    report = verify(proof, key=story.key.public)
    assert report.statement is not None
    assert report.statement.predicate.window.until == scene.at(story.clock)
    assert "window" in [check.name for check in report.notes]


def test_no_receipt_without_the_sandboxes_beginning(story: scene.Story) -> None:
    story.sandbox(7)
    with pytest.raises(CannotProve, match="eg7 was opened before the window: ask from an earlier moment"):
        story.state(link=7, since=scene.at(2))
    with pytest.raises(CannotProve, match="does not hold the end of sandbox eg8"):
        story.state(link=8)


def test_no_window_ends_before_it_begins(story: scene.Story) -> None:
    with pytest.raises(CannotProve, match="--since is later than --until"):
        story.state(since=scene.at(2), until=scene.at(1))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_record_of_a_window_is_left_out(long: scene.Story, data: st.DataObject) -> None:
    """What the window claims to hold, by number, against the journal read from end to end."""
    times = st.floats(-5, long.clock + 5).map(scene.at)
    since, until = (data.draw(st.none() | times) for _ in range(2))
    link = data.draw(st.none() | st.integers(7, 18))
    found = _stated(long, since=since, until=until, link=link)
    if found is None:
        return
    predicate = found.predicate
    window, scope = predicate.window, predicate.scope
    whole = [(index, lines.read(line)) for index, line in journal_reader.lines(long.directory)]
    meant = [
        index
        for index, line in whole
        if window.first <= index < window.past and statement.belongs(line.event, line.fields, scope)
    ]
    assert list(predicate.journal.records.indices[window.base :]) == [
        index for index in meant if link is None or not statement.is_snapshot(whole[index][1].event)
    ]
    asked = [i for i, line in whole if (since or "") <= line.time <= (until or "a")]
    assert all(window.first <= index < window.past for index in asked)
    report = verify(scene.sealed(found, long.key), key=long.key.public)
    assert report.verified, report.broken


def _stated(story: scene.Story, **asked: Any) -> Statement | None:
    try:
        return story.state(**asked)
    except CannotProve:
        backwards = None not in (asked["since"], asked["until"]) and asked["since"] > asked["until"]
        assert backwards or asked["link"] is not None  # whose end is not in the window
        return None


def test_among_many_checkpoints_the_right_one_is_found(tmp_path: Path) -> None:
    """The file is bisected, not read."""
    key, origin = PrivateKey.generate(), "lab.example/egressd/00000000"
    sizes = range(2, 4000, 2)
    signed = [notes.sign(Checkpoint(origin, size, bytes(32)), origin, [key]) for size in sizes]
    (tmp_path / "checkpoints").write_text("".join(f"{note}\n" for note in signed))
    assert (tmp_path / "checkpoints").stat().st_size > 4 * prover._CHUNK
    for size in (2, 3, 4, 5, 1999, 2000, 2001, 3997, 3998, 9999):
        note = prover._note_upto(tmp_path, size)
        assert note == signed[min(size // 2, len(signed)) - 1]
    assert prover._note_upto(tmp_path, 1) is None


def test_too_much_is_refused_with_what_to_do(story: scene.Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover, "MAX_RECORDS", 10)
    for _ in range(20):
        story.denied(7)
    with pytest.raises(CannotProve, match="ask for a shorter one"):
        story.state()
    assert len(told(story.state(since=scene.at(story.clock - 3)))) == 4


def test_times_of_floods_that_are_late_stay_in(story: scene.Story) -> None:
    """A flood's record carries the time of its first packet, and is written when it ends."""
    story.snapshot()
    story.tell(
        "denied", after=10, process="auditor", workspace="acme", link="eg7", packets=1, reason="unlisted"
    )
    story.tell(
        "denied", after=-2, process="auditor", workspace="acme", link="eg7", packets=5, reason="unlisted"
    )
    found = story.state(until=scene.at(9.5))
    assert sum(a.times for a in found.predicate.summary.attempts) == 6
    assert verify(scene.sealed(found, story.key)).verified


# ---- the program


def _run(
    story: scene.Story, *arguments: str, facts: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    given = msgspec.json.encode(scene.facts_of()) if facts is None else facts
    command = [sys.executable, "-I", "-m", "egressd.processes.prover", "--journal", str(story.directory)]
    return subprocess.run([*command, *arguments], input=given, capture_output=True, check=False, env={})


def test_the_program_writes_the_statement(story: scene.Story) -> None:
    story.sandbox(7)
    size = str(story.checkpoint())
    done = _run(story, "--workspace", "acme", "--link=7", f"--since={scene.at(0)}", "--size", size)
    assert (done.returncode, done.stderr) == (0, b"")
    found = statement.decode(done.stdout)
    assert found.predicate.scope == Scope("acme", "eg7")
    assert verify(scene.sealed(found, story.key)).verified


@pytest.mark.parametrize(
    ("arguments", "facts", "said"),
    [
        (("--size", "99"), None, b"no checkpoint of 99"),
        (("--size", "2"), b"{}", b"facts cannot be read"),
        (("--size", "2", "--since=yesterday"), None, b"not a time"),
        (("--size", "2", "--link=9"), None, b"end of sandbox eg9"),
    ],
)
def test_the_program_says_in_one_line_why_not(
    arguments: tuple[str, ...], facts: bytes | None, said: bytes, story: scene.Story
) -> None:
    done = _run(story, "--workspace", "acme", *arguments, facts=facts)
    assert done.returncode != 0
    assert done.stdout == b""
    assert said in done.stderr.splitlines()[-1]


def test_a_journal_that_is_not_there(tmp_path: Path, story: scene.Story) -> None:
    story.directory = tmp_path / "elsewhere"
    done = _run(story, "--workspace", "acme", "--size", "2")
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
