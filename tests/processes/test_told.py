"""What the auditor is told, many messages at a time: the same as one by one, only faster."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from auditor_lab import read
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.ipc import messages
from egressd.ipc.channel import MAX_MESSAGE, Channel, pair
from egressd.journal import records
from egressd.processes.batches import Inbox
from egressd.processes.journal_file import Draft, JournalFile, Sheaf, Writer, timestamp
from egressd.processes.told import Teller, inbox

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
NOON = "2026-03-01T12:00:00.000000Z"
INBOX = inbox()


def event(process: str = "relay", event: str = "relay-opened", **fields: Any) -> bytes:
    return msgspec.json.encode(messages.Event(process=process, event=event, fields=fields))


class Hearing:
    """A Teller, and what it makes of messages: lines, numbered in the order in which they came."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.others: list[Any] = []
        self.sheaves: list[int] = []
        self.ended: list[str] = []
        self.sock, its = pair()
        self.sock.setblocking(False)
        self.teller = Teller(
            its,
            "relay",
            INBOX,
            heard=self.heard,
            sheaf=self.sheaf,
            gone=lambda _, why: self.ended.append(why),
        )

    def heard(self, message: Any) -> bool:
        if not isinstance(message, messages.Event):
            self.others.append((len(self.lines), message))
            return False
        fields = dict(message.fields)
        if message.process != "relay":
            fields["claimed_process"] = message.process
        self.lines.append(
            records.spell(
                seq=len(self.lines),
                time=NOON,
                process="relay",
                event=message.event,
                fields=records.bounded(fields),
            )
        )
        return message.event != "relay-heeded"

    def sheaf(self, sheaf: Sheaf) -> None:
        self.sheaves.append(len(sheaf.frames))
        self.lines += records.finished(sheaf.frames, sheaf.spelled, seq=len(self.lines), time=NOON)

    def close(self) -> None:
        self.sock.close()
        self.teller.close()


def hear(said: list[bytes], *, together: bool, known: list[bytes] | None = None) -> Hearing:
    """`known`: told before, one by one."""

    async def listen() -> Hearing:
        hearing = Hearing()
        for message in known or []:
            hearing.sock.send(message)
            hearing.teller.read(1)
        hearing.sheaves.clear()
        for message in said:
            with contextlib.suppress(BrokenPipeError):  # it has been closed
                hearing.sock.send(message)
            if not together:
                hearing.teller.read(1)
        hearing.teller.read(Inbox.COUNT)
        hearing.close()
        return hearing

    return asyncio.run(listen())


def test_a_run_of_one_kind_is_one_sheaf() -> None:
    said = [event(at="one", number=number) for number in range(100)]
    found = hear(said, together=True, known=said[:1])
    assert found.sheaves == [100]
    assert found.lines == hear([said[0], *said], together=False).lines
    assert [records.decode(line).fields["number"] for line in found.lines] == [0, *range(100)]


def test_a_kind_is_learned_from_the_first_of_its_kind() -> None:
    said = [event(at="one", number=number) for number in range(100)]
    assert hear(said, together=True).sheaves == [99]
    assert hear([event(other=1), *said, event(other=2)], together=True).sheaves == [100]


def test_what_is_of_no_known_kind_keeps_its_place() -> None:
    known = [event(number=0)]
    said = [
        event(number=1), event(number=2), event(other="x"), event(number=3),
        event("warden", number=4), event(number=5), event(event="relay-heeded", number=6), event(number=7),
        msgspec.json.encode(messages.Losses(process="relay", count=3)), event(number=8),
    ]  # fmt: skip
    found = hear(said, together=True, known=known)
    assert found.sheaves == [2, 1, 1, 1, 1]
    alone = hear(known + said, together=False)
    assert (found.lines, found.others) == (alone.lines, alone.others)
    assert found.others == [(9, messages.Losses(process="relay", count=3))]
    assert records.decode(found.lines[5]).fields == {"number": 4, "claimed_process": "warden"}


def test_what_somebody_acts_on_is_never_in_a_sheaf() -> None:
    said = [event(event="relay-heeded", number=number) for number in range(3)]
    assert hear(said, together=True, known=said[:1]).sheaves == []


ODD_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False),
    st.floats(-1e-3, 1e-3), st.text(max_size=20), st.text(alphabet="e-0.:1\x7f\\\"", max_size=20),
    st.sampled_from([0.0, -0.0, 1e-4, 9.9e-5, 1e15, 1e16, 1 << 62, -(1 << 63), "x" * 1024, "x" * 1025, "\n"]),
)  # fmt: skip
EVENTS = st.builds(
    lambda names, values, name: (name, dict(zip(names, values, strict=False))),
    st.sampled_from([("a", "b"), ("b", "a"), ("cut_fields", "a"), (), ("a", "b", "c")]),
    st.lists(ODD_VALUES, min_size=3, max_size=3),
    st.sampled_from(["relay-opened", "relay-closed"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=12))
def test_whatever_is_told_is_recorded_as_if_it_were_told_alone(
    told: list[tuple[str, dict[str, Any]]],
) -> None:
    known = [
        event(event=name, **dict.fromkeys(names))
        for name in ("relay-opened", "relay-closed")
        for names in (("a", "b"), ("b", "a"), (), ("a", "b", "c"))
    ]
    said = [event(event=name, **fields) for name, fields in told if _finite(fields)]
    found = hear(said, together=True, known=known)
    assert found.ended == ["closed"]
    assert found.lines == hear(known + said, together=False).lines


def _finite(fields: dict[str, Any]) -> bool:
    return all(value not in (float("inf"), float("-inf")) for value in fields.values())


GOOD = event(number=1)
EVIL = {
    "two messages in one": GOOD + GOOD,
    "two, with a newline": GOOD + b"\n" + GOOD,
    "nothing but space": b" ",
    "half a message": GOOD[:-9],
    "the other half": b'"number":1}}',
    "ends inside of a text": GOOD[:-3] + b'"}',
    "ends behind the fields": GOOD[:-1],
    "begins in the middle": b'{"number":1}}',
    "no type": GOOD.replace(b'"type":"Event",', b""),
    "another type": GOOD.replace(b'"Event"', b'"Lease"'),
    "a type of no message": GOOD.replace(b'"Event"', b'"_Plain"'),
    "a field too many": GOOD[:-1] + b',"more":1}',
    "no fields": b'{"type":"Event","process":"relay","event":"relay-opened"}',
    "fields that hold fields": GOOD.replace(b":1}", b':{"a":1}}'),
    "a list": GOOD.replace(b":1}", b":[1]}"),
    "an ill-named field": GOOD.replace(b"number", b"Number"),
    "an ill-named event": GOOD.replace(b"relay-opened", b"Relay"),
    "a lone surrogate": GOOD.replace(b":1}", b':"\\ud800"}'),
    "no text at all": b"\xff\xfe",
    "not a number": GOOD.replace(b":1}", b":NaN}"),
    "deeper than anybody can read": b"[" * 5000,
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
@pytest.mark.parametrize("place", [0, 1, 3])
def test_what_is_refused_alone_is_refused_among_others(evil: bytes, place: int) -> None:
    said = [event(number=number) for number in range(3)]
    said.insert(place, evil)
    said.append(event(number=9))
    found, alone = hear(said, together=True, known=[GOOD]), hear([GOOD, *said], together=False)
    assert (found.lines, found.ended) == (alone.lines, alone.ended)
    assert len(found.lines) == 1 + place
    assert len(found.ended) == 1 and found.ended[0].startswith("not a message")


@pytest.mark.parametrize(
    "odd", [b" " + GOOD, GOOD + b"\n", GOOD.replace(b",", b",\n", 1), GOOD.replace(b"1}", b'0,"number":1}')]
)
def test_what_is_spelled_in_another_way_is_the_same(odd: bytes) -> None:
    found = hear([GOOD, odd, GOOD], together=True, known=[GOOD])
    assert found.lines == hear([GOOD] * 4, together=False).lines


@pytest.mark.parametrize("halves", [(GOOD[:20], GOOD[20:]), (GOOD + GOOD, b" "), (GOOD + GOOD, b"")])
def test_messages_are_not_put_together(halves: tuple[bytes, bytes]) -> None:
    """As many values as messages, and yet not one in each."""
    found = hear([GOOD, *halves, GOOD], together=True, known=[GOOD])
    assert len(found.lines) == 2  # the known one, and the good one before
    assert len(found.ended) == 1 and found.ended[0] != "closed"


def test_nothing_is_heard_after_the_message_that_ended_it() -> None:
    said = [event(number=0), b"{}", event(number=1)]
    found = hear(said, together=True, known=[GOOD])
    assert len(found.lines) == 2 and found.ended[0].startswith("not a message")


def test_the_end_is_heard_behind_the_last_message() -> None:
    async def listen() -> Hearing:
        hearing = Hearing()
        hearing.sock.send(event(number=0))
        hearing.sock.send(event(number=1))
        hearing.sock.close()
        hearing.teller.read(1)
        assert (len(hearing.lines), hearing.ended) == (1, [])
        hearing.teller.read(Inbox.COUNT)
        return hearing

    found = asyncio.run(listen())
    assert (len(found.lines), found.ended) == (2, ["it ended"])


def test_a_descriptor_ends_it_and_is_not_kept() -> None:
    async def listen() -> Hearing:
        hearing = Hearing()
        hearing.sock.send(event(number=0))
        before = set(Path("/proc/self/fd").iterdir())
        with Path("/dev/null").open("rb") as file:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))
            hearing.sock.sendmsg([event(number=1)], [rights])
        hearing.teller.read(Inbox.COUNT)
        assert len(set(Path("/proc/self/fd").iterdir())) < len(before)  # the teller's socket is closed
        hearing.close()
        return hearing

    found = asyncio.run(listen())
    assert len(found.lines) == 1 and len(found.ended) == 1


# ---- the memory for it


def taken(said: list[bytes], read: Callable[[socket.socket], Any]) -> Any:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 23)
        for message in said:
            one.send(message)
        return read(other)


@pytest.mark.parametrize("sizes", [[1], [2047, 2048, 2049], [5, MAX_MESSAGE, 5, 4096, 1], [100] * 128])
def test_messages_come_whole_and_in_order(sizes: list[int]) -> None:
    said = [bytes([65 + at % 26]) * size for at, size in enumerate(sizes)]
    assert taken(said, lambda sock: INBOX.receive(sock.fileno())) == (said, [0] * len(said))


def test_no_more_are_taken_than_asked_for() -> None:
    said = [b"%d" % number for number in range(200)]

    def read(sock: socket.socket) -> list[int]:
        return [len(INBOX.receive(sock.fileno(), most)[0]) for most in (1, 50, 1000, 1000)]

    assert taken(said, read) == [1, 50, 128, 21]


def test_what_is_too_long_says_so() -> None:
    found, flags = taken([b"x" * (MAX_MESSAGE + 1), b"y"], lambda sock: INBOX.receive(sock.fileno()))
    assert (len(found[0]), found[1]) == (MAX_MESSAGE, b"y")
    assert flags == [socket.MSG_TRUNC, 0]


def test_an_empty_socket_does_not_keep_anybody_waiting() -> None:
    with pytest.raises(BlockingIOError):
        taken([], lambda sock: INBOX.receive(sock.fileno()))


def test_a_descriptor_is_closed_by_the_kernel() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        reading, writing = os.pipe()
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing]))])
        os.close(writing)
        assert INBOX.receive(other.fileno()) == ([b"x"], [socket.MSG_CTRUNC])
        assert os.read(reading, 1) == b""  # nobody holds the writing end any more
        os.close(reading)


# ---- the queue


def sheaf(first: int, count: int, *, process: str = "relay") -> Sheaf:
    frame = records.frame(event="tick", process=process, names=("i",))
    spelled = records.spelled([{"i": first + at} for at in range(count)])
    assert frame is not None and spelled is not None
    return Sheaf(timestamp(), process, [frame] * count, spelled)


def numbers(directory: Path) -> list[Any]:
    return [record.fields["i"] for record in read(directory) if record.event == "tick"]


def test_sheaves_and_single_records_are_written_in_their_order(tmp_path: Path) -> None:
    writer = Writer(JournalFile(tmp_path / "j"), say=print)
    assert writer.submit_sheaf(sheaf(0, 3)) == 3
    assert writer.submit(Draft(timestamp(), "warden", "tick", {"i": 3}))
    assert writer.submit_sheaf(sheaf(4, 5000)) == 5000
    assert writer.submit_sheaf(sheaf(5004, 1)) == 1
    writer.barrier()
    assert writer.end()
    assert numbers(tmp_path / "j") == list(range(5005))
    assert [record.seq for record in read(tmp_path / "j")] == list(range(5006))  # and that it was opened


def test_of_a_sheaf_what_has_room_is_kept_and_the_rest_is_counted(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "j")
    writer = Writer(journal, say=print, queue_records=100, modest=frozenset({"relay"}))
    with writer._changed:  # the thread takes nothing meanwhile
        waiting = writer.state().queued
        kept = writer.submit_sheaf(sheaf(0, 80))
        assert kept == 50 - waiting
        assert writer.submit_sheaf(sheaf(80, 80)) == 0
        assert writer.submit_sheaf(sheaf(0, 200, process="warden")) == 50
        assert writer.state().queued == 100
    assert writer.end()
    assert numbers(tmp_path / "j") == [*range(kept), *range(50)]
    lost = {
        record.fields["from"]: record.fields["count"]
        for record in read(tmp_path / "j")
        if record.event == "lost"
    }
    assert lost == {"relay": 160 - kept, "warden": 150}


def test_a_sheaf_takes_no_more_bytes_than_there_are(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "j")
    journal.notes = []
    writer = Writer(journal, say=print, queue_bytes=5000)
    with writer._changed:
        kept = writer.submit_sheaf(sheaf(0, 200))
        assert 40 < kept < 200
        assert writer._bytes <= 5000
        assert writer.submit_sheaf(sheaf(200, 4)) < 4
    assert writer.end()
    assert writer.state().lost == {"queue": 204 - len(numbers(tmp_path / "j"))}
    assert writer._bytes == 0


def test_a_whole_sheaf_waits_while_the_disk_is_full(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "j")
    append, tried = journal.append, []

    def full(drafts: Any) -> int:
        if len(tried) < 1:
            tried.append(len(drafts))
            raise OSError(28, "No space left on device")
        return append(drafts)

    journal.append = full  # type: ignore[method-assign]
    writer = Writer(journal, say=lambda _: None)
    writer.submit_sheaf(sheaf(0, 10))
    assert writer.barrier().result(10) == ""
    assert writer.end()
    assert tried and numbers(tmp_path / "j") == list(range(10))


def test_the_channel_decodes_alone_what_came_without_descriptors() -> None:
    one, other = pair()
    with one, other:
        channel: Channel[Any] = Channel(one, messages.TO_AUDITOR)
        assert channel.decode(GOOD) == messages.Event(
            process="relay", event="relay-opened", fields={"number": 1}
        )
        with pytest.raises(EOFError):
            channel.decode(b"")
