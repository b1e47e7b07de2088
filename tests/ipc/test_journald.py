"""Entries for systemd's journal: their bytes, who may have chosen them, and what happens where nobody
listens."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.ipc import journald


def parsed(data: bytes) -> dict[str, str]:
    """As journald reads the binary form of each field."""
    found = {}
    while data:
        name, _, rest = data.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        assert rest[8 + length : 9 + length] == b"\n"
        assert name.decode() not in found
        found[name.decode()] = rest[8 : 8 + length].decode("ascii")
        data = rest[9 + length :]
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.settimeout(5)
        yield sock


def test_an_entry_reads_as_it_was_meant() -> None:
    fields = {
        "MESSAGE": "two\nlines",
        "PRIORITY": 4,
        "WORKSPACE": "acme",
        "EGRESSD_OK": True,
        "EGRESSD_NO": None,
    }
    assert parsed(journald.entry(fields)) == {
        "MESSAGE": "two\nlines",
        "PRIORITY": "4",
        "WORKSPACE": "acme",
        "EGRESSD_OK": "true",
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nPRIORITY=0", "a\\nPRIORITY=0"),
        ("\x1b[2Jcleared", "\\x1b[2Jcleared"),
        ("übel\u202e", "\\xfcbel\\u202e"),
        ("half \udc80", "half \\udc80"),
    ],
)
def test_what_a_stranger_chose_is_escaped(value: str, shown: str) -> None:
    assert parsed(journald.entry({"EGRESSD_NAME": value})) == {"EGRESSD_NAME": shown}


@pytest.mark.parametrize("name", ["_PID", "lower", "1ST", "A B", "A=B", "", "X" * 65, "A\n"])
def test_a_name_the_journal_would_not_take_is_left_out(name: str) -> None:
    assert parsed(journald.entry({name: "x", "MESSAGE": "kept"})) == {"MESSAGE": "kept"}


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=8), st.one_of(st.text(), st.integers(), st.booleans(), st.none())))
def test_no_field_becomes_another(fields: dict[str, str | int | bool | None]) -> None:
    found = parsed(journald.entry(fields))
    assert set(found) <= set(fields)
    assert all(
        character.isprintable() for name, text in found.items() if name != "MESSAGE" for character in text
    )


def test_what_is_too_large_is_left_out_and_the_rest_is_sent(journal: socket.socket) -> None:
    fields = {"EGRESSD_LARGE": "x" * (1 << 20), "MESSAGE": "small"}
    assert journald.send(fields, path=journal.getsockname())
    assert parsed(journal.recv(1 << 20)) == {"MESSAGE": "small"}


def test_nobody_waits_for_a_journal_that_is_not_there_or_hangs(
    tmp_path: Path, journal: socket.socket
) -> None:
    assert not journald.send({"MESSAGE": "x"}, path=str(tmp_path / "nowhere"))
    sent = [journald.send({"MESSAGE": "x"}, path=journal.getsockname()) for _ in range(2000)]
    assert sent[0]
    assert not sent[-1]  # full, and said so at once


def test_an_event_has_its_fields_and_an_id_of_its_own() -> None:
    told = journald.event_fields(
        event="spawn-refused",
        process="controller",
        level=4,
        message="…",
        fields={"workspace": "acme", "uid": 4001, "process": "sh"},
    )
    assert told == {
        "MESSAGE": "…",
        "MESSAGE_ID": journald.message_id("spawn-refused"),
        "PRIORITY": 4,
        "SYSLOG_IDENTIFIER": "egressd",
        "EGRESSD_EVENT": "spawn-refused",
        "EGRESSD_PROCESS": "controller",
        "WORKSPACE": "acme",
        "EGRESSD_UID": 4001,
        "EGRESSD_OF_PROCESS": "sh",
    }
    assert journald.message_id("drift") == "4116027932955e4ea538ec65ae026ddb"
    assert journald.message_id("drift") != journald.message_id("lost")


def test_the_stream_is_the_journals_only_if_it_is_the_very_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    status = os.fstat(write)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not journald.heard(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert journald.heard(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not journald.heard(write)
    for broken in ("", "1", "a:b", "1:2:3"):
        monkeypatch.setenv("JOURNAL_STREAM", broken)
        assert not journald.heard(write)
    os.close(read)
    os.close(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert not journald.heard(write)


@pytest.mark.parametrize(
    ("level", "number"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_levels_have_the_priority_of_syslog(level: int, number: int) -> None:
    assert journald.priority(level) == number
