"""The journal on disk: what is written stays, is signed, and is taken up wherever it was interrupted."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal import merkle, notes, records
from egressd.journal.keys import PrivateKey, Verifier
from egressd.journal.notes import Checkpoint
from egressd.processes import journal_file, journal_reader, journal_tree
from egressd.processes.journal_file import (
    Clock,
    Draft,
    JournalBusy,
    JournalFile,
    Unwritten,
    Writer,
    timestamp,
)
from egressd.processes.journal_keys import KeyProblem, Keys, open_keys
from egressd.processes.journal_reader import check_journal, inspect_journal
from egressd.processes.journal_search import Journal, Tail

KEY, OTHER = PrivateKey.from_seed(bytes(31) + b"\x01"), PrivateKey.from_seed(bytes(31) + b"\x02")


def ticks(first: int, count: int = 1) -> list[Draft]:
    return [Draft("2026-03-01T12:00:00.000000Z", "auditor", "tick", {"i": first + i}) for i in range(count)]


def opened(directory: Path, **more) -> JournalFile:
    return JournalFile(directory, **{"keys": Keys(KEY), "host": "box", **more})


def written(directory: Path, *batches: int, **more) -> JournalFile:
    """A journal with a checkpoint after each batch, still open."""
    journal = opened(directory, **more)
    journal.append(journal.notes)
    for batch in batches:
        journal.append(ticks(journal.seq, batch))
        journal.tree.checkpoint()
    return journal


def found(directory: Path) -> list[records.Record]:
    return [records.decode(line) for _, line in journal_reader.lines(directory)]


def events(directory: Path) -> list[str]:
    return [record.event for record in found(directory) if record.event != "tick"]


def reopened(directory: Path, **more) -> list[Draft]:
    """Open it again, write what that found, sign, close; the notes."""
    journal = opened(directory, **more)
    journal.append(journal.notes)
    journal.tree.checkpoint()
    journal.close()
    return journal.notes


def assert_sound(directory: Path, *earlier: Checkpoint) -> None:
    """In order, and the tree still begins with every checkpoint that was ever signed."""
    assert check_journal(directory) == []
    leaves = journal_reader.leaves(directory)
    for checkpoint in earlier:
        assert merkle.root(leaves.first(checkpoint.size)) == checkpoint.root
    assert [merkle.leaf_hash(line) for _, line in journal_reader.lines(directory)] == list(leaves)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of journals are opened here; what survives a power cut is not what is tested."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


# ---- a log begins, grows and is read


def test_a_new_journal_says_whose_it_is_and_signs(tmp_path: Path) -> None:
    written(tmp_path / "j", 3).close()
    origin = journal_reader.origin(tmp_path / "j")
    assert origin.startswith("box/egressd/") and len(origin) == len("box/egressd/") + 8
    assert events(tmp_path / "j") == ["journal-opened", "key-created"]
    key = KEY.public.verifier(origin)
    assert found(tmp_path / "j")[1].fields["key"] == key
    assert journal_reader.verifiers(tmp_path / "j") == [Verifier.parse(key)]
    note = journal_reader.latest(tmp_path / "j")
    checkpoint = notes.open(note, [key])
    assert (checkpoint.origin, checkpoint.size) == (origin, 5)
    assert_sound(tmp_path / "j", checkpoint)
    assert list(journal_reader.checkpoints(tmp_path / "j")) == [note]


def test_it_goes_on_under_the_same_name_and_key(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", 3, 4)
    before = journal.tree.latest
    journal.close()
    assert [note.event for note in reopened(tmp_path / "j")] == ["journal-opened"]
    assert len(list(journal_reader.checkpoints(tmp_path / "j"))) == 3
    assert_sound(tmp_path / "j", before)
    assert [record.seq for record in found(tmp_path / "j")] == list(range(10))


def test_over_many_segments(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    journal = written(directory, *[7] * 20, segment_bytes=1500)
    signed = journal.tree.latest
    assert journal.segment > 5
    assert journal.octets == sum(path.stat().st_size for path in directory.glob("*.jsonl"))
    assert journal.segments == len(list(directory.glob("*.jsonl")))
    journal.close()
    report = inspect_journal(directory)
    assert (report.findings, report.records, report.signed) == ([], 142, 142)
    reopened(directory, segment_bytes=1500)
    assert_sound(directory, signed)
    assert [index for index, _ in journal_reader.lines(directory, 77)] == list(range(77, 143))


def test_opening_reads_the_last_segment_and_not_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    written(directory, *[20] * 6, segment_bytes=1500).close()
    last = max(directory.glob("*.jsonl"))
    for path in directory.glob("*.jsonl"):
        if path != last:
            path.unlink()
            path.mkdir()  # whoever opened it to read would fail
    journal = opened(directory)
    assert journal.seq == 122
    journal.close()


def test_old_segments_may_be_moved_away(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    written(directory, *[20] * 6, segment_bytes=1500).close()
    for number in (1, 2):
        (directory / f"{number:04d}.jsonl").unlink()
    (directory / "0004.frontier").unlink()
    reopened(directory)
    report = inspect_journal(directory)
    assert report.findings == [] and 0 < report.archived < 122 and report.records == 123
    first = next(journal_reader.lines(directory))[0]
    assert first == report.archived
    assert len(journal_reader.leaves(directory)) == 123


def test_without_a_key_it_writes_and_signs_nothing(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "j")
    journal.append([*journal.notes, *ticks(0, 5)])
    assert not journal.tree.unsigned
    journal.close()
    assert not (tmp_path / "j/checkpoint").exists()
    assert [finding.what for finding in check_journal(tmp_path / "j")] == [
        "there is no good checkpoint: nothing is signed"
    ]


def test_a_journal_from_before_there_were_checkpoints_is_taken_up(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    journal = JournalFile(directory, segment_bytes=1000)
    for at in range(30):
        journal.append(ticks(at))
    journal.close()
    for path in directory.iterdir():
        if path.suffix != ".jsonl":
            path.unlink()
    reopened(directory)
    assert_sound(directory)
    assert [record.event for record in found(directory)[-2:]] == ["journal-opened", "key-created"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", 1)
    with pytest.raises(JournalBusy):
        opened(tmp_path / "j")
    journal.close()
    opened(tmp_path / "j").close()


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = list(Path("/proc/self/fd").iterdir())
    written(tmp_path / "j", *[5] * 10, segment_bytes=500).close()
    reopened(tmp_path / "j")
    (tmp_path / "j/checkpoint").write_text("nonsense")
    (tmp_path / "j/checkpoints").write_text("")
    reopened(tmp_path / "j")
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


# ---- interrupted


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Checkpoint]]:
    """A small journal of two segments and four checkpoints, to be damaged."""
    directory = tmp_path_factory.mktemp("story") / "j"
    journal = opened(directory, segment_bytes=700)
    journal.append(journal.notes)
    signed = []
    for batch in (2, 3, 2, 1):
        journal.append(ticks(journal.seq, batch))
        journal.tree.checkpoint()
        signed.append(journal.tree.latest)
    assert journal.segment == 2
    journal.close()
    return directory, signed


def copied(story: Path, target: Path) -> Path:
    shutil.copytree(story, target)
    return target


@pytest.mark.parametrize("name", ["0001.leaves", "0002.leaves", "0001.frontier", "checkpoint", "checkpoints"])
def test_a_file_beside_the_records_is_cut_short_at_every_byte(
    name: str, story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    """Each of them can be made again from the others."""
    whole = (story[0] / name).read_bytes()
    lines = [line for _, line in journal_reader.lines(story[0])]
    for cut in range(max(0, len(whole) - 420), len(whole)):  # the last two of four, in `checkpoints`
        directory = copied(story[0], tmp_path / f"{cut}")
        (directory / name).write_bytes(whole[:cut])
        noted = [note.event for note in reopened(directory)]
        assert noted in (["journal-opened"], ["journal-damaged", "journal-opened"])
        assert [line for _, line in journal_reader.lines(directory)][: len(lines)] == lines
        assert_sound(directory, *story[1])
        shutil.rmtree(directory)


def test_a_batch_is_cut_short_at_every_byte(tmp_path: Path) -> None:
    """The machine stops while records are written that no checkpoint speaks of yet."""
    journal = written(tmp_path / "a", 2, 2)
    signed = journal.tree.latest
    before = (tmp_path / "a/0001.jsonl").stat().st_size
    journal.append(ticks(journal.seq, 3))
    journal.close()
    whole = (tmp_path / "a/0001.jsonl").read_bytes()
    for cut in range(before, len(whole)):
        directory = copied(tmp_path / "a", tmp_path / "b")
        with (directory / "0001.jsonl").open("r+b") as file:
            file.truncate(cut)
        torn = len(whole[:cut]) - (whole[:cut].rfind(b"\n") + 1)
        noted = [note.event for note in reopened(directory)]
        assert noted == (["journal-torn"] if torn else []) + ["journal-opened"]
        kept = (directory / "0001.jsonl").read_bytes()
        assert kept.startswith(whole[: cut - torn])  # every whole line is there
        assert_sound(directory, signed)
        shutil.rmtree(directory)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_cut_at_once_nothing_signed_is_forgotten(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, story: tuple[Path, list[Checkpoint]]
) -> None:
    """Any of the caches missing, short or wrong, in any combination."""
    directory = copied(story[0], tmp_path_factory.mktemp("cut") / "j")
    for name in ("0001.leaves", "0002.leaves", "0001.frontier"):
        whole = (directory / name).read_bytes()
        match data.draw(st.sampled_from(["keep", "cut", "change", "longer", "remove"])):
            case "cut":
                (directory / name).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
            case "change" if name != "0001.leaves":  # what is not read is not compared; see below
                at = data.draw(st.integers(0, len(whole) - 1))
                (directory / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            case "longer":
                (directory / name).write_bytes(whole + data.draw(st.binary(max_size=70)))
            case "remove":
                (directory / name).unlink()
    if data.draw(st.booleans()):
        (directory / data.draw(st.sampled_from(["checkpoint", "checkpoints"]))).unlink()
    assert [note.event for note in reopened(directory)] == ["journal-opened"]
    assert_sound(directory, *story[1])
    shutil.rmtree(directory.parent)


def test_a_wrong_hash_in_an_old_sidecar_is_found_and_made_again_once_the_file_is_gone(
    story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    directory = copied(story[0], tmp_path / "j")
    change(directory / "0001.leaves", 70)
    reopened(directory)
    (finding,) = check_journal(directory)
    assert (finding.file, finding.line) == ("0001.jsonl", 3)
    (directory / "0001.leaves").unlink()
    assert check_journal(directory) == []
    reopened(directory)
    assert_sound(directory, *story[1])


# ---- taken away, or changed


@pytest.mark.parametrize("lines", [1, 3, 8])
def test_records_that_were_signed_and_are_gone_begin_another_log(
    lines: int, story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    directory = copied(story[0], tmp_path / "j")
    origin = journal_reader.origin(directory)
    last = max(directory.glob("*.jsonl"))
    kept = last.read_bytes().splitlines(keepends=True)[:-lines]
    last.write_bytes(b"".join(kept))
    if not kept:
        last.unlink()
    journal = opened(directory)
    assert [note.event for note in journal.notes] == ["journal-truncated", "journal-opened", "key-created"]
    journal.append([*journal.notes, *ticks(0, 3)])
    journal.tree.checkpoint()
    journal.close()
    first = found(directory)[0]
    signed = story[1][-1]
    text = signed.text.splitlines()
    assert (first.seq, first.event) == (0, "journal-truncated")
    assert first.fields["size"] == signed.size and first.fields["root"] == text[2]
    assert first.fields["origin"] == origin != journal_reader.origin(directory)
    assert first.fields["moved_to"] == "broken-1"
    assert (directory / "broken-1" / last.name).exists() == bool(kept)
    assert (directory / "broken-1/checkpoint").read_bytes() == (story[0] / "checkpoint").read_bytes()
    assert_sound(directory)
    assert [note.event for note in reopened(directory)] == ["journal-opened"]  # said once


def test_it_is_said_even_if_the_machine_stops_before_it_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    written(directory, 5).close()
    (directory / "0001.jsonl").write_bytes(b"")
    opened(directory).close()  # set aside, and then nothing was written
    assert reopened(directory)[0].event == "journal-truncated"
    assert found(directory)[0].fields["size"] == 7


@pytest.mark.parametrize("moved", range(1, 6))
def test_setting_aside_is_interrupted_and_goes_on(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "j"
    written(directory, 5).close()
    (directory / "0001.jsonl").write_bytes(b"")
    rename, count = os.rename, iter(range(100))

    def stops(*arguments, **more) -> None:
        if next(count) == moved:
            raise KeyboardInterrupt
        rename(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal_file.os, "rename", stops)
        opened(directory)
    assert reopened(directory)[0].event == "journal-truncated"
    assert_sound(directory)
    aside = {path.name for side in directory.glob("broken-*") for path in side.iterdir()}
    assert {"0001.jsonl", "0001.leaves", "checkpoint", "checkpoints", "origin", "verifiers"} <= aside


def test_what_is_not_of_the_log_stays_when_it_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lost+found, which root owns and nobody else can move."""
    directory = tmp_path / "j"
    written(directory, 5).close()
    (directory / "0001.jsonl").write_bytes(b"")
    (directory / "lost+found").mkdir()
    (directory / "README").write_text("the owner's\n")
    rename = os.rename

    def owned(name: str, *arguments, **more) -> None:
        if name in ("lost+found", "README"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        rename(name, *arguments, **more)

    monkeypatch.setattr(journal_file.os, "rename", owned)
    assert reopened(directory)[0].event == "journal-truncated"
    assert_sound(directory)
    assert (directory / "lost+found").is_dir() and (directory / "README").exists()
    assert [path.name for path in directory.glob("broken-*")] == ["broken-1"]


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda d: (d / "origin").write_text("other/egressd/00000000\n"), "of another log"),
        (lambda d: (d / "origin").write_text("../../x\n"), "log's name"),
        (
            lambda d: [(d / n).write_text("nonsense\n\n") for n in ("checkpoint", "checkpoints")],
            "be believed",
        ),
        (lambda d: (d / "0001.jsonl").unlink() or (d / "0001.leaves").unlink(), "nor its leaves"),
        (lambda d: [p.unlink() for p in d.glob("*.jsonl")], "is not there"),
        (lambda d: change(d / "0001.jsonl", 40), "are not those of the last checkpoint"),
        (lambda d: change(max(d.glob("*.jsonl")), 40), "are not those of the last checkpoint"),
    ],
)
def test_a_log_that_cannot_be_believed_is_not_continued(
    break_it, why: str, story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    directory = copied(story[0], tmp_path / "j")
    (directory / "0001.frontier").unlink()  # so that opening has to read the first segment as well
    break_it(directory)
    noted = reopened(directory)
    assert noted[0].event == "journal-truncated" and why in str(noted[0].fields["why"])
    assert_sound(directory)


def change(path: Path, at: int, xor: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= xor
    path.write_bytes(data)


def test_another_key_does_not_continue_the_log(tmp_path: Path) -> None:
    written(tmp_path / "j", 2).close()
    noted = reopened(tmp_path / "j", keys=Keys(OTHER))
    assert noted[0].event == "journal-truncated" and "none of the known keys" in str(noted[0].fields["why"])
    assert_sound(tmp_path / "j")


def test_damage_that_no_checkpoint_speaks_of_stays_and_is_said(tmp_path: Path) -> None:
    written(tmp_path / "j", 2).close()
    with (tmp_path / "j/0001.jsonl").open("ab") as file:
        file.write(b"damaged\n" * 2)
    noted = reopened(tmp_path / "j")
    assert [(n.event, n.fields.get("lines")) for n in noted] == [
        ("journal-damaged", 2),
        ("journal-opened", None),
    ]
    findings = check_journal(tmp_path / "j")  # signed as it is, and no record all the same
    assert [(f.index, f.what) for f in findings] == [(at, "the line is not JSON in ASCII") for at in (4, 5)]


# ---- a disk that is full


class FullDisk:
    """After `room` bytes, writes fail as on a full disk, partly written."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        write = os.write

        def limited(descriptor: int, data: bytes) -> int:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = write(descriptor, bytes(data)[: self.room])
            self.room -= done
            return done

        patch.setattr(os, "write", limited)


@pytest.mark.parametrize("room", [*range(0, 1200, 23), 1_000_000])
def test_a_disk_that_is_full_anywhere_leaves_whole_records_and_true_checkpoints(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path / "j", 2)
    signed, lines = journal.tree.latest, journal.seq
    with monkeypatch.context() as patch:
        FullDisk(patch, room)
        try:
            journal.append(ticks(journal.seq, 5))
            journal.tree.checkpoint()
        except OSError as error:
            assert error.errno == errno.ENOSPC
    for path in (tmp_path / "j/0001.jsonl",):
        assert path.read_bytes().endswith(b"\n")
    assert journal.seq in (lines, lines + 5)
    journal.append(ticks(journal.seq, 1))  # there is room again
    journal.tree.checkpoint()
    journal.close()
    assert_sound(tmp_path / "j", signed)
    assert [note.event for note in reopened(tmp_path / "j")] == ["journal-opened"]


def test_it_is_opened_on_a_full_disk_and_catches_up(
    story: tuple[Path, list[Checkpoint]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(story[0], tmp_path / "j")
    for name in ("0001.leaves", "0002.leaves", "0001.frontier", "checkpoint"):
        (directory / name).unlink()
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, 0)
        journal = opened(directory)
        with pytest.raises(OSError, match="No space"):
            journal.append(journal.notes)
        disk.room = 1 << 20
        journal.append(journal.notes)
        journal.tree.checkpoint()
        journal.close()
    assert check_journal(directory) == []
    reopened(directory)
    assert_sound(directory, *story[1])


def test_half_a_line_does_not_keep_it_closed_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "j", 5).close()
    with (tmp_path / "j" / "0001.jsonl").open("ab") as file:
        file.write(b'{"event":"to')
    with monkeypatch.context() as patch:
        FullDisk(patch, 3)
        journal = opened(tmp_path / "j")
    (torn,) = [note for note in journal.notes if note.event == "journal-torn"]
    assert torn.fields["bytes"] == 12 and torn.fields["moved_to"] is None
    assert list((tmp_path / "j").glob("*.torn")) == []
    journal.append(journal.notes)
    journal.tree.checkpoint()
    journal.close()
    assert_sound(tmp_path / "j")


def test_a_checkpoint_is_not_signed_before_the_hashes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path / "j", 2)
    with monkeypatch.context() as patch:
        FullDisk(
            patch,
            len(records.spell(seq=4, time=timestamp(), process="auditor", event="tick", fields={"i": 4})),
        )
        journal.append(ticks(4))
        with pytest.raises(OSError, match="No space"):
            journal.tree.checkpoint()
    assert len(journal_reader.leaves(tmp_path / "j")) == journal.tree.latest.size == 4
    journal.tree.checkpoint()
    assert len(journal_reader.leaves(tmp_path / "j")) == journal.tree.latest.size == 5
    journal.close()


@pytest.mark.parametrize("behind", ["checkpoint", "checkpoints"])
def test_after_opening_both_files_end_with_the_latest_checkpoint(
    behind: str, story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    directory = copied(story[0], tmp_path / "j")
    listed = list(journal_reader.checkpoints(directory))
    (directory / behind).write_text(
        {"checkpoint": listed[-2], "checkpoints": "".join(f"{n}\n" for n in listed[:-1])}[behind]
    )
    opened(directory).close()
    assert list(journal_reader.checkpoints(directory)) == listed
    assert journal_reader.latest(directory) == listed[-1]


# ---- every change is seen


def test_a_record_with_the_number_of_another_is_found_even_if_it_was_signed(tmp_path: Path) -> None:
    written(tmp_path / "j", 2).close()
    line = records.spell(seq=2, time=timestamp(), process="auditor", event="tick", fields={})
    with (tmp_path / "j/0001.jsonl").open("ab") as file:
        file.write(line)
    assert reopened(tmp_path / "j")[0].event == "journal-damaged"
    (finding,) = check_journal(tmp_path / "j")
    assert (finding.line, finding.what) == (5, "the record says it is number 2, it is number 4")


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, 1 << 30),
    xor=st.integers(1, 255),
    segment=st.sampled_from(["0001", "0002"]),
    cut=st.booleans(),
)
def test_every_changed_byte_of_a_segment_is_seen(
    at: int, xor: int, segment: str, cut: bool, tmp_path_factory: pytest.TempPathFactory,
    story: tuple[Path, list[Checkpoint]],
) -> None:  # fmt: skip
    """Even by one who makes the leaf hashes again, as anybody could."""
    directory = copied(story[0], tmp_path_factory.mktemp("change") / "j")
    path = directory / f"{segment}.jsonl"
    change(path, at, xor)
    if cut:
        for cache in [*directory.glob("*.leaves"), *directory.glob("*.frontier")]:
            cache.unlink()
    findings = check_journal(directory)
    assert findings
    if not cut:
        data = (story[0] / f"{segment}.jsonl").read_bytes()
        where = at % len(data)
        line = data[:where].count(b"\n") + 1
        named = [f for f in findings if f.file == path.name]
        assert named[0].line in (line, line + 1)  # a line that lost its end is joined with the next one
        assert named[0].offset is not None and named[0].offset <= where
    shutil.rmtree(directory.parent)


@pytest.mark.parametrize("name", ["0001.leaves", "0001.frontier"])
def test_every_changed_byte_beside_a_closed_segment_is_seen(
    name: str, story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    whole = (story[0] / name).read_bytes()
    directory = copied(story[0], tmp_path / "j")
    for at in range(0, len(whole), 3):
        (directory / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        assert check_journal(directory)


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, 1 << 30), xor=st.integers(1, 255), name=st.sampled_from(["checkpoint", "checkpoints"])
)
def test_every_changed_byte_of_a_checkpoint_is_seen(
    at: int,
    xor: int,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    story: tuple[Path, list[Checkpoint]],
) -> None:
    directory = copied(story[0], tmp_path_factory.mktemp("change") / "j")
    change(directory / name, at, xor)
    assert check_journal(directory)
    shutil.rmtree(directory.parent)


def test_where_a_rewritten_past_stops_being_true(
    story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    """Lines replaced by other good ones, with all caches made again: the checkpoints say from where on."""
    directory = copied(story[0], tmp_path / "j")
    path = directory / "0001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"i":5', b'"i":6')
    path.write_bytes(b"".join(lines))
    for cache in [*directory.glob("*.leaves"), *directory.glob("*.frontier")]:
        cache.unlink()
    (finding,) = check_journal(directory)
    assert finding.file == "checkpoints"
    assert finding.what == "the first 7 records are not those that were signed; those up to 4 are"


def test_a_reader_with_the_key_believes_no_other(
    story: tuple[Path, list[Checkpoint]], tmp_path: Path
) -> None:
    directory, _ = story
    origin = journal_reader.origin(directory)
    for key in (KEY.public, KEY.public.pem(), KEY.public.verifier(origin), Verifier(origin, KEY.public)):
        assert check_journal(directory, [key]) == []
    (finding,) = check_journal(directory, [OTHER.public])
    assert finding.what == "the latest checkpoint is signed by none of the given keys"


# ---- keys


def test_a_change_of_keys_is_recorded_and_signed_by_both(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys")
    first = keys.current
    writer = Writer(JournalFile(tmp_path / "j", keys=keys, host="box"), say=print, seal_every=0.0)
    writer.submit(ticks(0)[0])
    before = writer.barrier().result(5)
    note = writer.rotate().result(5)
    assert writer.end()
    origin = journal_reader.origin(tmp_path / "j")
    old, new = first.public.verifier(origin), keys.current.public.verifier(origin)
    rotated = [r for r in found(tmp_path / "j") if r.event == "key-rotated"]
    assert [dict(r.fields) for r in rotated] == [{"old": old, "new": new}]
    assert [str(v) for v in notes.signers(note, [old, new])] == [old, new]
    assert notes.open(note, [new]).size > rotated[0].seq >= notes.open(before, [old]).size
    assert [str(v) for v in journal_reader.verifiers(tmp_path / "j")] == [old, new]
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["journal.key", "old"]
    (kept,) = (tmp_path / "keys/old").iterdir()
    assert kept.read_text() == first.public.pem() and "PRIVATE" not in kept.read_text()
    # the old key alone leads to the new one, the new one alone has signed the latest
    for key in (old, new):
        assert check_journal(tmp_path / "j", [key]) == []
    assert PrivateKey.load((tmp_path / "keys/journal.key").read_bytes()).public == keys.current.public


@pytest.mark.parametrize("after", ["key", "record", "checkpoint"])
def test_a_change_of_keys_is_interrupted_and_goes_on(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = open_keys(tmp_path / "keys")
    journal = written(tmp_path / "j", 2, keys=keys)
    old, new = journal.tree.rotate()
    if after != "key":
        journal.append([Draft(timestamp(), "auditor", "key-rotated", {"old": old, "new": new})])
    if after == "checkpoint":
        monkeypatch.setattr(Keys, "settle", lambda self: None)
        journal.tree.checkpoint()
        monkeypatch.undo()
    journal.close()
    again = open_keys(tmp_path / "keys")
    reopened(tmp_path / "j", keys=again)
    assert again.current.public.verifier(journal_reader.origin(tmp_path / "j")) == new
    assert again.previous == []
    assert not (tmp_path / "keys/journal.key.new").exists()
    rotated = [dict(r.fields) for r in found(tmp_path / "j") if r.event == "key-rotated"]
    assert rotated and all(fields == {"old": old, "new": new} for fields in rotated)
    for key in (old, new):
        assert check_journal(tmp_path / "j", [key]) == []


def test_a_credential_changes_by_holding_both(tmp_path: Path) -> None:
    reopened(tmp_path / "j", keys=open_keys(tmp_path / "keys", KEY.dump()))
    both = open_keys(tmp_path / "keys", OTHER.dump() + KEY.dump())
    assert [note.event for note in reopened(tmp_path / "j", keys=both)] == ["journal-opened", "key-rotated"]
    alone = open_keys(tmp_path / "keys", OTHER.dump())
    assert [note.event for note in reopened(tmp_path / "j", keys=alone)] == ["journal-opened"]
    for key in (KEY, OTHER):
        assert check_journal(tmp_path / "j", [key.public]) == []
    writer = Writer(JournalFile(tmp_path / "j", keys=alone), say=print)
    with pytest.raises(KeyProblem, match="in front of the old one"):
        writer.rotate().result(5)
    assert writer.end()


# ---- the clock


class Times:
    def __init__(self) -> None:
        self.wall, self.running = 1_000_000.0, 500.0

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.running)


@pytest.mark.parametrize(
    ("passed", "shown", "said"),
    [(10, 10, None), (0, 0, None), (10, 69, None), (3600, 3600.01, None), (10, 71, 61.0), (10, 9.98, None),
     (10, 9, -1.0), (10, -3590, -3600.0), (10, 9.9, -0.1)],
)  # fmt: skip
def test_a_step_of_the_clock(passed: float, shown: float, said: float | None) -> None:
    times = Times()
    clock = times.clock()
    times.running += passed
    times.wall += shown
    step = clock.stepped()
    assert step == (None if said is None else pytest.approx(said))
    assert clock.stepped() is None  # once


def test_a_slow_reading_of_the_clocks_is_no_step() -> None:
    times = Times()

    def slow() -> float:
        times.running += 200  # suspended between the two readings
        times.wall += 200
        return times.running

    clock = Clock(lambda: times.wall, slow)
    assert clock.stepped() is clock.stepped() is None


def test_a_step_is_recorded_and_numbers_go_on(tmp_path: Path) -> None:
    times = Times()
    journal = opened(tmp_path / "j", clock=times.clock())
    writer = Writer(journal, say=print, seal_every=0.0)
    writer.barrier().result(5)
    times.wall -= 7200
    writer.submit(ticks(0)[0])
    writer.barrier().result(5)
    assert writer.end()
    assert [r.event for r in found(tmp_path / "j")][-2:] == ["clock-stepped", "tick"]
    assert found(tmp_path / "j")[-2].fields == {"seconds": -7200}
    assert_sound(tmp_path / "j")


def test_a_clock_that_was_set_back_while_nobody_looked(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", 1)
    journal.append([Draft("2999-01-01T00:00:00.000000Z", "auditor", "tick", {})])
    journal.tree.checkpoint()
    journal.close()
    assert [note.event for note in reopened(tmp_path / "j")] == ["journal-opened", "clock-stepped"]
    assert found(tmp_path / "j")[-1].fields["since"] == "2999-01-01T00:00:00.000000Z"


# ---- the writer


def test_a_barrier_is_passed_when_it_is_signed(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path / "j"), say=print, seal_every=0.0)
    for at in range(50):
        writer.submit(ticks(at)[0])
        checkpoint = notes.open(writer.barrier().result(5), journal_reader.verifiers(tmp_path / "j"))
        last = [r for r in found(tmp_path / "j") if r.event == "tick"][-1]
        assert last.fields == {"i": at} and checkpoint.size > last.seq
    assert writer.barrier().result(5) == journal_reader.latest(tmp_path / "j")  # nothing new: at once
    assert writer.end()
    with pytest.raises(Unwritten):
        writer.barrier().result(5)


def test_a_barrier_waits_for_what_lies_in_later_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_BATCH_RECORDS", 1)
    writer = Writer(opened(tmp_path / "j"), say=print, seal_every=0.0)
    for at in range(30):
        writer.submit(ticks(at)[0])
    note = writer.barrier().result(5)
    assert notes.open(note, journal_reader.verifiers(tmp_path / "j")).size == 32
    assert writer.end()


def test_a_barrier_is_not_passed_by_what_is_written_and_not_signed(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    writer = Writer(journal, say=print, seal_every=3600.0)
    writer.barrier().result(5)  # the first checkpoint comes at once
    writer.submit(ticks(0)[0])
    waiting = writer.barrier()
    while journal.seq < 3:
        threading.Event().wait(0.01)
    assert not waiting.done()
    assert writer.end() and waiting.result(0) == journal_reader.latest(tmp_path / "j")


def test_at_most_one_checkpoint_in_a_while_and_one_at_the_end(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path / "j"), say=print, seal_every=3600.0)
    writer._sealed_at = journal_file.time.monotonic()
    for at in range(20):
        writer.submit(ticks(at)[0])
    waiting = writer.barrier()
    assert writer.end()
    assert len(list(journal_reader.checkpoints(tmp_path / "j"))) <= 2
    assert waiting.result(0) == journal_reader.latest(tmp_path / "j")
    assert_sound(tmp_path / "j")


def test_what_the_writer_says_of_itself(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path / "j"), say=print, seal_every=0.0)
    writer.submit(ticks(0)[0])
    writer.lose(cause="netlink", process="kernel", count=7)
    writer.barrier().result(5)
    state = writer.state()
    assert (state.queued, state.lag, state.failing, state.segments) == (0, 0.0, "", 1)
    assert state.lost == {"netlink": 7}
    assert state.octets == (tmp_path / "j/0001.jsonl").stat().st_size
    assert state.records == state.checkpoint_size == len(found(tmp_path / "j"))
    assert state.origin == journal_reader.origin(tmp_path / "j")
    assert state.key == KEY.public.verifier(state.origin)
    assert abs(state.checkpoint_time - journal_file.time.time()) < 60
    assert writer.end()


class HangingDisk:
    """fdatasync waits until it may go on, or fails as long as it should."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.goes_on, self.failing = threading.Event(), True
        self.tried = threading.Event()
        patch.setattr(journal_file.os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        self.tried.set()
        if self.failing:
            raise OSError(errno.EIO, "Input/output error")


def test_a_failing_disk_is_told_of_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "_RETRY", 0.02)
    said: list[str] = []
    journal = opened(tmp_path / "j")
    with monkeypatch.context() as patch:
        disk = HangingDisk(patch)
        writer = Writer(journal, say=said.append, seal_every=0.0)
        writer.submit(ticks(0)[0])
        waiting: Future[str] = writer.barrier()
        assert disk.tried.wait(5)
        while not writer.state().failing:
            pass
        state = writer.state()
        assert state.failing == "Input/output error" and state.queued >= 1 and state.lag > 0
        assert not waiting.done()
        disk.failing = False
        assert waiting.result(5)
    assert writer.end()
    assert len(said) == 2 and "still trying" in said[0] and "written again" in said[1]
    assert_sound(tmp_path / "j")


def test_what_cannot_be_spelled_is_said_and_holds_nobody_up(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path / "j"), say=print, seal_every=0.0)
    writer.submit(Draft(timestamp(), "auditor", "Not A Name", {}))
    writer.submit(Draft("yesterday", "auditor", "tick", {"x": [1]}))
    writer.submit(ticks(7)[0])
    writer.barrier().result(5)
    assert writer.end()
    assert [r.event for r in found(tmp_path / "j")][-3:] == ["record-refused", "record-refused", "tick"]
    assert found(tmp_path / "j")[-3].fields["event"] == "Not A Name"
    assert_sound(tmp_path / "j")


def test_a_writer_that_ends_by_a_defect_does_not_do_so_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    journal = opened(tmp_path / "j")
    monkeypatch.setattr(journal, "append", lambda drafts: 1 // 0)
    writer = Writer(journal, say=said.append)
    with pytest.raises(Unwritten):
        writer.barrier().result(5)
    assert "ZeroDivisionError" in writer.state().failing and "not written any more" in said[0]
    assert not writer.end()


# ---- reading while it is written


def test_a_reader_sees_a_sound_journal_at_any_moment(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    writer = Writer(opened(directory, segment_bytes=20_000), say=print, seal_every=0.0)
    writer.barrier().result(5)
    seen = [line for _, line in journal_reader.lines(directory)]
    tail = Tail(Journal.open(str(directory)))
    for at in range(400):
        writer.submit(ticks(at)[0])
        if at % 20 == 0:
            assert check_journal(directory) == []
            seen += tail.read()
            note = journal_reader.latest(directory)
            checkpoint = notes.open(note, journal_reader.verifiers(directory))
            assert merkle.root(journal_reader.leaves(directory).first(checkpoint.size)) == checkpoint.root
    assert writer.end()
    seen += all_of(tail)
    assert [records.decode(line).seq for line in seen] == list(range(len(seen)))
    assert seen == [line for _, line in journal_reader.lines(directory)]
    assert tail.read() == []


def test_an_unfinished_line_is_not_seen_and_then_is(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    journal = written(directory, 2)
    tail = Tail(Journal.open(str(directory)))
    assert [index for index, _ in journal_reader.lines(directory, 3)] == [3]
    line = records.spell(seq=4, time=timestamp(), process="auditor", event="tick", fields={})
    path = directory / "0001.jsonl"
    for cut in (1, 20, len(line) - 1):
        with path.open("ab") as file:
            file.write(line[:cut])
        assert tail.read() == [] and len(list(journal_reader.lines(directory))) == 4
        assert check_journal(directory) == []
        os.truncate(path, path.stat().st_size - cut)
    with path.open("ab") as file:
        file.write(line)
    assert tail.read() == [line[:-1]]
    journal.close()


def test_a_reader_follows_into_a_log_that_begins_anew(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    written(directory, 9).close()
    assert len(list(journal_reader.lines(directory))) == 11
    tail = Tail(Journal.open(str(directory)))
    (directory / "0001.jsonl").write_bytes(b"")
    reopened(directory)
    assert records.decode(all_of(tail)[0]).event == "journal-truncated"


def test_reading_begins_anywhere_in_many_segments_and_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    journal = written(directory, *[7] * 12, segment_bytes=1500)
    lines = list(journal_reader.lines(directory))
    for first in (0, 1, 30, 85, 86, 99):
        assert list(journal_reader.lines(directory, first)) == lines[first:]
    tail = Tail(Journal.open(str(directory)))
    for _ in range(40):
        journal.append(ticks(journal.seq, 3))
    assert all_of(tail) == [line for _, line in journal_reader.lines(directory)][len(lines) :]
    journal.close()


def all_of(tail: Tail) -> list[bytes]:
    """A read ends with a segment."""
    return [line for lines in iter(tail.read, []) for line in lines]


def test_what_is_not_there(tmp_path: Path) -> None:
    assert journal_reader.latest(tmp_path) is None and journal_reader.origin(tmp_path) == ""
    assert list(journal_reader.checkpoints(tmp_path)) == list(journal_reader.lines(tmp_path)) == []
    assert len(journal_reader.leaves(tmp_path)) == 0 and journal_reader.verifiers(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        check_journal(tmp_path / "nowhere")


def test_names_of_machines_become_names_of_logs() -> None:
    for host, name in (
        ("Box.Example", "box.example"),
        ("a b+c\n", "a-b-c"),
        ("", "machine"),
        ("ü" * 90, "machine"),
    ):
        assert journal_tree.new_origin(host).startswith(f"{name}/egressd/")


def test_now_is_spelled_as_any_other_time_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is kept from the last call: over its end, and back when the clock is set."""
    for nanoseconds, text in (
        (1_790_000_000_000_000_999, "2026-09-21T14:13:20.000000Z"),
        (1_790_000_000_999_999_999, "2026-09-21T14:13:20.999999Z"),
        (1_790_000_001_000_001_000, "2026-09-21T14:13:21.000001Z"),
        (1_600_000_000_250_000_000, "2020-09-13T12:26:40.250000Z"),
        (1_790_000_001_000_002_000, "2026-09-21T14:13:21.000002Z"),
    ):
        monkeypatch.setattr("time.time_ns", lambda now=nanoseconds: now)
        assert timestamp() == timestamp(1e300) == text
    assert timestamp(1_790_000_000.25) == "2026-09-21T14:13:20.250000Z"
