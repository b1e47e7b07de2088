"""`egressctl audit` against journals written as the auditor writes them, and damaged as disks damage them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.cli import audit, audit_words
from egressd.cli.text import Paint
from egressd.journal import records, segments
from egressd.journal.records import Record, Scalar
from egressd.model.verdicts import Reason
from egressd.processes import journal_search as audit_search
from egressd.processes.journal_file import Draft, JournalFile, timestamp
from egressd.processes.journal_search import Journal, Query, Search, Tail

START = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
DENIED4 = {"link": "eg7", "workspace": "acme", "reason": "unlisted", "protocol": "tcp",
           "source": "198.19.0.7", "destination": "11.22.33.66", "port": 80, "packets": 3,
           "seconds": 0.9}  # fmt: skip
DENIED6 = {**DENIED4, "link": "eg8", "destination": "2001:db8::66", "port": 443, "packets": 1}
FLOW = {"link": "eg7", "workspace": "acme", "host": "eu.api.openai.com", "kind": "host", "protocol": "tcp",
        "destination": "198.18.0.4", "port": 443, "address": "203.0.113.9", "address_port": 443,
        "out_packets": 7, "out_bytes": 48201, "in_packets": 9, "in_bytes": 512, "seconds": 1.25}  # fmt: skip
ASKED = {
    "link": "eg9",
    "workspace": "lab",
    "name": "tracker.example",
    "type": "A",
    "reason": "name",
    "count": 2,
}
GRANTED = {"link": 9, "workspace": "lab", "name": "one.search.example.com",
           "wildcard": "*.search.example.com", "ports": "443/tcp",
           "addresses": "203.0.113.5 2001:db8::5"}  # fmt: skip
SNI = {"link": "eg7", "workspace": "acme", "source": "198.19.0.7", "destination": "198.18.0.4", "port": 443,
       "host": "eu.api.openai.com", "asked": "evil.example", "reason": "sni-other",
       "connections": 1}  # fmt: skip
STORY: list[tuple[str, str, dict[str, Any]]] = [
    ("auditor", "journal-opened", {"file": "0001.jsonl", "next": 0}),
    (
        "controller",
        "sandbox-opening",
        {"link": "eg7", "workspace": "acme", "uid": 4001, "command": "python3 x"},
    ),
    ("auditor", "denied", DENIED4),
    ("auditor", "denied", DENIED6),
    ("auditor", "flow", FLOW),
    ("resolver", "dns-denied", ASKED),
    ("controller", "name-granted", GRANTED),
    ("inspector", "flow-refused", SNI),
    ("auditor", "observed", {**DENIED4, "workspace": "lab", "link": "eg9"}),
    ("auditor", "lost", {"cause": "queue", "count": 4, "from": "resolver"}),
]


def line(
    seq: int, process: str, event: str, fields: dict[str, Scalar], *, at: datetime | None = None
) -> bytes:
    moment = at or START + timedelta(minutes=seq)
    return records.encode(Record(seq, records.stamp(moment), process, event, fields))


def story() -> list[bytes]:
    return [line(seq, *each) for seq, each in enumerate(STORY)]


def lay(directory: Path, lines: list[bytes], *, each: int = 4) -> Path:
    """Write `lines` into segments of `each` lines."""
    directory.mkdir(exist_ok=True)
    for number, first in enumerate(range(0, len(lines), each), 1):
        (directory / segments.name(number)).write_bytes(b"".join(lines[first : first + each]))
    return directory


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return lay(tmp_path / "journal", story())


# ---- which records


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["-w", "acme"], [1, 2, 3, 4, 7]),
        (["-w", "acm"], []),
        (["--sandbox", "eg7"], [1, 2, 4, 7]),
        (["--sandbox", "9"], [5, 6, 8]),  # one of them has it as a number
        (["--sandbox", "eg70"], []),
        (["--host", "eu.api.openai.com"], [4, 7]),
        (["--host", "EU.API.OpenAI.com."], [4, 7]),
        (["--host", "openai.com"], []),
        (["--host", "*.openai.com"], []),
        (["--host", "**.openai.com"], [4, 7]),
        (["--host", "*.api.openai.com"], [4, 7]),
        (["--host", "*.search.example.com"], [6]),
        (["--host", "evil.example"], [7]),  # what the hello asked for
        (["--host", "11.22.33.66"], [2, 8]),
        (["--host", "2001:0db8::66"], [3]),
        (["--host", "[2001:db8::5]"], [6]),
        (["--host", "198.19.0.7"], []),  # a source is no host
        (["--event", "denied,flow"], [2, 3, 4]),
        (["--event", "deni"], []),
        (["--verdict", "denied"], [2, 3, 5]),
        (["--verdict", "refused"], [7]),
        (["--verdict", "observed"], [8]),
        (["--verdict", "allowed,granted"], [4, 6]),
        (["--verdict", "denied", "--event", "dns-denied,flow"], [5]),
        (["--reason", "sni-other,name"], [5, 7]),
        (["--since", "2026-11-21T10:06"], [6, 7, 8, 9]),
        (["--until", "2026-11-21T10:02"], [0, 1]),
        (["--since", "2026-11-21T12:02+02:00", "--until", "2026-11-21T10:04Z"], [2, 3]),
        (["--since", "2026-11-22"], []),
        (["-w", "acme", "--verdict", "denied", "-n", "1"], [3]),
        (["-n", "2"], [8, 9]),
        (["-n", "2", "--reverse"], [9, 8]),
        (["--reverse", "-w", "lab"], [8, 6, 5]),
        (["--limit", "100"], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
    ids=lambda value: " ".join(map(str, value)) or "all",
)
@pytest.mark.parametrize("each", [1, 4, 100])
def test_json_is_the_very_lines_of_the_records_that_match(
    egressctl: Any, tmp_path: Path, words: list[str], found: list[int], each: int
) -> None:
    directory = lay(tmp_path / "journal", story(), each=each)
    told = egressctl("audit", "--journal", directory, "--json", *words)
    assert told.out.encode() == b"".join(story()[index] for index in found)
    assert (told.status, told.err) == (0, "")


R1, R2, R3 = ("r-" + each * 26 for each in "abc")
ANN, BOB = "user:okta:00u1", "user:okta:00u2"
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("controller", "request-asked", {"workspace": "acme", "link": "eg1", "request": R1, "asker": ANN}),
    ("controller", "request-asked", {"workspace": "acme", "link": "eg2", "request": R2, "asker": BOB}),
    ("controller", "request-decided", {"workspace": "acme", "link": "eg1", "request": R1}),
    ("controller", "request-decided", {"workspace": "acme", "link": "eg2", "request": R2}),
    ("auditor", "denied", DENIED4),
    ("controller", "request-refused", {"workspace": "lab", "request": R3, "asker": ANN}),
    ("controller", "access-changed", {"workspace": "acme", "by": ANN, "what": f'"asker":"{BOB}"'}),
    ("controller", "request-ended", {"workspace": "acme", "link": "eg2", "request": R2}),
    ("controller", "request-ended", {"workspace": "acme", "link": "eg1", "request": R1}),
]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--request", R1], [0, 2, 8]),
        (["--request", R3], [5]),
        (["--request", "r-" + "d" * 26], []),
        (["--asker", ANN], [0, 2, 5, 8]),
        (["--asker", BOB], [1, 3, 7]),
        (["--asker", "user:okta:00u"], []),
        (["--asker", ANN, "--reverse"], [8, 5, 2, 0]),
        (["--asker", ANN, "-n", "1"], [8]),
        (["--asker", ANN, "--since", "2026-11-21T10:07"], [8]),  # that it is theirs was said before
        (["--asker", ANN, "-w", "acme", "--event", "request-ended"], [8]),
        (["--asker", ANN, "--request", R2], []),
        (["--verdict", "granted"], [2, 3]),
        (["--verdict", "refused"], [5]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
@pytest.mark.parametrize("each", [1, 100])
def test_requests_are_found_by_name_and_by_who_asked(
    egressctl: Any, tmp_path: Path, words: list[str], found: list[int], each: int
) -> None:
    lines = [line(seq, *told) for seq, told in enumerate(REQUESTS)]
    directory = lay(tmp_path / "journal", lines, each=each)
    told = egressctl("audit", "--journal", directory, "--json", *words)
    assert told.out.encode() == b"".join(lines[index] for index in found)
    assert (told.status, told.err) == (0, "")


def test_a_request_that_is_asked_for_later_is_followed_too(tmp_path: Path) -> None:
    lines = [line(seq, *told) for seq, told in enumerate(REQUESTS)]
    search = Search(Query(asker=BOB))
    assert [found for found, _ in search.pick([each[:-1] for each in lines])] == [
        lines[index][:-1] for index in (1, 3, 7)
    ]


def test_what_only_looks_like_a_field_does_not_match(egressctl: Any, tmp_path: Path) -> None:
    trick = '","workspace":"acme","link":"eg7","reason":"unlisted'
    lines = [line(0, "auditor", "denied", {"workspace": "lab", "prefix": trick, "link": "eg1"})]
    directory = lay(tmp_path / "journal", lines)
    for words in (["-w", "acme"], ["--sandbox", "eg7"], ["--reason", "unlisted"]):
        assert egressctl("audit", "--journal", directory, "--json", *words).out == ""
    assert egressctl("audit", "--journal", directory, "--json", "-w", "lab").out.encode() == lines[0]


def clock_story(steps: list[tuple[int, int]]) -> list[bytes]:
    """Thirty records, a second apart, from each of these minutes on; the mark comes some records late."""
    lines: list[bytes] = []
    for minute, late in steps:
        for second in range(31):
            moment = START + timedelta(minutes=minute, seconds=second)
            event = "clock-stepped" if second == late else "flow"
            lines.append(
                line(len(lines), "auditor", event, {"workspace": "acme", "host": "h" * 40}, at=moment)
            )
    return lines


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=20),
    st.integers(-60, 22 * 60),
    st.integers(0, 22 * 60),
)
def test_bisecting_finds_what_reading_everything_finds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], since: int, length: int
) -> None:
    """Wherever the clock is set to, as long as the journal says so soon after."""
    directory = tmp_path_factory.mktemp("j")
    lines = clock_story(steps)
    lay(directory, lines, each=200)
    begin = START + timedelta(seconds=since)
    query = Query(since=begin, until=begin + timedelta(seconds=length))
    expected = [each[:-1] for each in lines if query.holds(audit_search.read(each[:-1]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_search, "_GRAIN", 300)  # so that there is something to halve
        patch.setattr(audit_search, "_FUZZY", 900)
        patch.setattr(audit_search, "_CHUNK", 1000)
        patch.setattr(audit_search, "_SLACK", timedelta(0))
        for reverse in (False, True):
            found = [each for each, _ in Search(query).through(Journal.open(str(directory)), reverse=reverse)]
            assert found == (expected[::-1] if reverse else expected)


def test_a_span_of_time_is_found_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        line(seq, "auditor", "flow", {"host": "h" * 200}, at=START + timedelta(seconds=seq))
        for seq in range(20_000)
    ]
    directory = str(lay(tmp_path / "journal", lines, each=30_000))
    taken: list[int] = []
    pick = Search.pick
    monkeypatch.setattr(Search, "pick", lambda self, some: (taken.append(len(some)), pick(self, some))[1])
    query = Query(since=START + timedelta(seconds=9000), until=START + timedelta(seconds=9003))
    assert len(list(Search(query).through(Journal.open(directory)))) == 3
    assert sum(taken) < 2500  # five minutes of slack on both sides, and what a block holds


# ---- how they read


def lines_for_people(egressctl: Any, directory: Path, *words: str) -> list[str]:
    told = egressctl("audit", "--journal", directory, *words)
    assert told.status == 0
    return [each[25:] for each in told.out.splitlines()]


PAGE = """\
2026-11-21 10:00:00.000Z  -       -             -         journal opened: 0001.jsonl, from record 0 on
2026-11-21 10:01:00.000Z  eg7     acme          -         sandbox opens for uid 4001: python3 x
2026-11-21 10:02:00.000Z  eg7     acme          denied    11.22.33.66:80/tcp: no rule of the workspace allows this destination [unlisted]; 3 packets in 0.9 s
2026-11-21 10:03:00.000Z  eg8     acme          denied    [2001:db8::66]:443/tcp: no rule of the workspace allows this destination [unlisted]
2026-11-21 10:04:00.000Z  eg7     acme          allowed   eu.api.openai.com:443/tcp (203.0.113.9): out 48201 (47.1 KiB), in 512, 1.25 s
2026-11-21 10:05:00.000Z  eg9     lab           denied    name tracker.example (A): the name is not on the workspace's list [name]; 2 questions
2026-11-21 10:06:00.000Z  eg9     lab           granted   name one.search.example.com under *.search.example.com, ports 443/tcp; leads to 203.0.113.5 2001:db8::5
2026-11-21 10:07:00.000Z  eg7     acme          refused   eu.api.openai.com:443: the TLS ClientHello names another server than the one whose address was used [sni-other]; asked for evil.example
2026-11-21 10:08:00.000Z  eg9     lab           observed  11.22.33.66:80/tcp: no rule of the workspace allows this destination [unlisted]; 3 packets in 0.9 s
2026-11-21 10:09:00.000Z  -       -             ALARM     4 records of resolver were lost: queue
"""  # noqa: E501 - as wide as it is


def test_a_record_is_a_line(egressctl: Any, journal: Path) -> None:
    assert egressctl("audit", "--journal", journal).out == PAGE


def test_every_record_can_be_told_with_no_field_and_with_hostile_ones() -> None:
    """What another version writes, or leaves out, is shown somehow and never acted on."""
    plain = Paint(sys.stdout, no_color=True)
    keys = {key for _, _, fields in STORY for key in fields} | {
        "seconds",
        "why",
        "exit",
        "executable",
        "problem",
    }
    for event in (*audit_words._TELLERS, "something-new"):
        empty = audit_search.read(line(0, "auditor", event, {})[:-1])
        assert audit_words.line(empty, paint=plain).isprintable()
        for value in ("\x1b[2J\u202e\n", -1, 2.5, True, None):
            odd = audit_search.read(line(0, "auditor", event, dict.fromkeys(keys, value))[:-1])
            assert audit_words.line(odd, paint=plain).isprintable(), (event, value)


@pytest.mark.parametrize(
    ("event", "fields", "told"),
    [
        ("link-flows", {"flows": 1, "questions": 2, "out_bytes": 60, "in_bytes": 0, "unrecorded_packets": 3},
         "of this sandbox are recorded: 1 flow, 2 questions to the resolver; out 60, in 0;"
         " 3 admitted packets belong to no recorded flow"),
        ("process-started", {"name": "relay", "pid": 7, "restarts": 2},
         "process relay starts, pid 7, for the 3. time"),
        ("dns-resolved", {"name": "a.test", "addresses": "1.2.3.4 ::5"}, "name a.test leads to 1.2.3.4 ::5"),
        ("attempt", {"protocol": "tcp", "destination": "::5", "port": 80, "pid": 4, "executable": "/bin/nc",
                     "command": "nc ::5 80"},
         "[::5]:80/tcp: tried by /bin/nc pid 4, as its broker says; nc ::5 80"),
        ("flow", {**FLOW, "kind": "read"},
         "eu.api.openai.com:443/tcp (203.0.113.9): as far as the inspector;"
         " out 48201 (47.1 KiB), in 512, 1.25 s"),
        ("sandbox-closed", {"seconds": 65, "exit": 0, "in_bytes": 3, "ok_bytes": 1, "denied_bytes": 2},
         "sandbox is closed after 1 min; exit 0; in 3 = admitted 1 + denied 2 + other 0"),
        ("sandbox-closed", {"seconds": 1, "exit": -9, "why": "wall"},
         "sandbox is closed after 1 s; wall; in 0 = admitted 0 + denied 0 + other 0"),
        ("snapshot", {"balanced": False}, "all counters recorded: in 0 = admitted 0 + denied 0 + other 0;"
         " THE BOOKS DO NOT BALANCE"),
        ("denied", {"reason": "shape", "protocol": "icmp", "destination": "192.0.2.1", "packets": 1},
         f"icmp to 192.0.2.1: {Reason.SHAPE.text} [shape]"),
        ("relay-closed", {"service": "ollama", "port": 11434, "bytes_out": 5, "bytes_in": 6, "seconds": 2,
                          "how": "reset"},
         "ollama:11434: payload out 5, in 6, 2 s; reset"),
        ("relay-closed", {"service": "ollama", "port": 11434, "connections": 70, "bytes_out": 5,
                          "bytes_in": 6, "seconds": 2, "how": "finished"},
         "ollama:11434: 70 connections, payload out 5, in 6, 2 s; finished"),
        ("residency-admitted", {"host": "a.test", "text": "1.2.3.4 is in 1.2.3.0/24 of aws, eu-west-1 (IE)",
                                "code": "inside", "declared": "eu-west-1 (IE)", "table": "aws",
                                "table_digest": "sha256:0123456789abcdef"},
         "name a.test: 1.2.3.4 is in 1.2.3.0/24 of aws, eu-west-1 (IE) [inside]; declared eu-west-1 (IE);"
         " by table aws, sha256:0123456789ab"),
        ("residency-refused", {"host": "a.test", "text": "::5 is in no prefix", "code": "no-prefix",
                               "declared": "", "table": "", "table_digest": ""},
         "name a.test: ::5 is in no prefix [no-prefix]"),
        ("flows-cut", {"host": "a.test", "address": "::5", "text": "::5 is in the US", "code": "outside"},
         "open connections to ::5 of a.test were ended: ::5 is in the US [outside]"),
        ("route-selected", {"route": "default", "by": "uid 7", "provider": "frankfurt", "host": "a.test",
                            "addresses": "1.2.3.4, ::5", "code": "inside"},
         "route default, asked by uid 7: frankfurt, a.test at 1.2.3.4, ::5 [inside]"),
        ("route-refused", {"route": "default", "by": "uid 7", "text": "no provider complies",
                           "code": "none-complies"},
         "route default, asked by uid 7: none; no provider complies [none-complies]"),
        ("registry-changed", {"by": "start", "registry": "sha256:01", "tables": ""},
         "catalogue and prefixes changed by start: sha256:01; tables none"),
        ("request-asked", {"request": "r-1", "asker": "user:okta:00u1", "email": "ann@acme.test",
                           "clearance": "internal", "discarded": 346},
         "request r-1 of user:okta:00u1 (ann@acme.test), clearance internal; 346 candidates not shown"),
        ("request-asked", {"request": "r-1", "asker": "user:okta:00u1"}, "request r-1 of user:okta:00u1"),
        ("request-decided", {"request": "r-1", "role": "viewer", "action": "summarise", "cleared": 298,
                             "octets": 2048, "manifest": "sha256:ab", "network": "none"},
         "request r-1 (viewer, summarise), without a network: 298 documents cleared, 2048 bytes (2.0 KiB),"
         " manifest sha256:ab"),
        ("request-files", {"request": "r-1", "part": 2, "parts": 3,
                           "files": "a:b.md sha256:1\na:c.md sha256:2"},
         "request r-1, part 2 of 3: a:b.md sha256:1 and 1 more"),
        ("request-refused", {"request": "r-1", "asker": "user:okta:00u1", "action": "summarise",
                             "text": "a file is not readable", "code": 404},
         "request r-1 of user:okta:00u1 (summarise): a file is not readable [404]"),
        ("request-ended", {"request": "r-1", "status": -9, "why": "stopped", "hit": "wall output",
                           "seconds": 4, "tokens": 12, "destroyed": True},
         "request r-1 has ended, status -9; stopped; reached its limit of wall, output; 4 s; 12 tokens;"
         " its copies are destroyed"),
        ("request-ended", {"request": "r-1", "status": 0, "destroyed": False},
         "request r-1 has ended, status 0; ITS COPIES WERE NOT SEEN TO BE DESTROYED"),
        ("access-changed", {"what": "member add", "by": "uid 0", "role": "viewer", "broker_uid": 7},
         "access changed by uid 0: member add; role=viewer"),
        ("documents-ingested", {"source": "hr", "added": 3, "removed": 0, "by": "uid 0",
                                "digest": "sha256:1"},
         "source hr ingested by uid 0: 3 added, 0 removed; sha256:1"),
        ("documents-ingested", {"source": "hr", "added": 1, "front_matter": True,
                                "front_matter_before": False, "read": "[]", "read_before": "[]"},
         "source hr ingested: 1 added; front_matter=yes front_matter_before=no read=[] read_before=[]"),
        ("leftovers-removed", {"count": 1, "where": "/var/tmp/x"},
         "copies of 1 request were left in /var/tmp/x, and are removed"),
        ("testimony-refused", {"uid": 7, "told": "request-decided", "text": "uid 7 is no broker",
                               "reason": "member", "count": 3},
         "uid 7 may not put request-decided on record: uid 7 is no broker [member]; 3 times"),
        ("something-new", {"b": True, "a": None, "workspace": "acme"}, "something-new: a=- b=yes"),
    ],
)  # fmt: skip
def test_what_is_told_of_each(event: str, fields: dict[str, Any], told: str) -> None:
    assert audit_words.told(audit_search.read(line(0, "auditor", event, fields)[:-1])) == told


def test_every_verdict_has_a_choice_and_every_reason_its_words() -> None:
    assert set(audit._VERDICTS) == set(audit_words.VERDICTS)
    for reason in Reason:
        told = audit_words.told(
            audit_search.read(line(0, "auditor", "denied", {"reason": reason.value})[:-1])
        )
        assert reason is Reason.UNKNOWN or reason.text in told


class Loud(Paint):
    def good(self, text: str) -> str:
        return text.upper()

    def bad(self, text: str) -> str:
        return f"<{text.strip()}>"


def test_colour_is_for_terminals(egressctl: Any, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in egressctl("audit", "--journal", journal).out
    monkeypatch.setattr(audit, "paint", lambda: Loud(sys.stdout, no_color=True))
    told = egressctl("audit", "--journal", journal).out
    assert "<denied>" in told and "<refused>" in told and "<ALARM>" in told and "GRANTED" in told


# ---- damage


def test_lines_that_are_no_records_are_counted_and_not_shown(egressctl: Any, tmp_path: Path) -> None:
    good = story()[2:4]
    bad = good[0].replace(b'"seq":2', b'"seq": 2')  # the same record in another spelling
    lines = [good[0], b"\x1b[2Jrubbish\n", bad, good[1]]
    directory = lay(tmp_path / "journal", lines)
    for words in ([], ["--json"], ["--reverse"]):
        told = egressctl("audit", "--journal", directory, *words)
        assert told.status == 1
        assert told.err == (
            f"egressctl: 2 lines are no records: `egressctl verify --journal {directory}` says where\n"
        )
        assert len(told.out.splitlines()) == 2 and "\x1b" not in told.out


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_torn_last_line_is_not_there_yet(egressctl: Any, journal: Path, cut: int) -> None:
    last = journal / segments.name(3)
    extra = line(10, "auditor", "denied", DENIED4)
    last.write_bytes(last.read_bytes() + extra[:cut])
    told = egressctl("audit", "--journal", journal, "--json")
    assert (told.status, told.out.encode()) == (0, b"".join(story()))


def test_other_files_of_the_directory_are_not_read(egressctl: Any, journal: Path) -> None:
    for name in ("0003.torn", "0001.leaves", "checkpoint", "checkpoints", "origin"):
        (journal / name).write_bytes(b"\x00\xff" * 64)
    (journal / "broken-1").mkdir()
    assert egressctl("audit", "--journal", journal, "--json").out.encode() == b"".join(story())


def test_a_journal_without_its_oldest_segments_has_the_rest(egressctl: Any, journal: Path) -> None:
    (journal / segments.name(1)).unlink()
    assert egressctl("audit", "--journal", journal, "--json").out.encode() == b"".join(story()[4:])


# ---- where it is, and who may


def test_nothing_found_is_told_to_people_and_is_no_error(
    egressctl: Any, journal: Path, tmp_path: Path
) -> None:
    told = egressctl("audit", "--journal", journal, "-w", "nobody")
    assert (told.status, told.out, told.err) == (0, "", f"egressctl: nothing in {journal} matches\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert egressctl("audit", "--journal", empty).err == f"egressctl: {empty} is empty\n"


def test_no_journal_is_125_with_the_remedy(egressctl: Any, tmp_path: Path) -> None:
    told = egressctl("audit", "--journal", tmp_path / "nowhere")
    assert (told.status, told.out) == (125, "")
    assert "there is no journal at" in told.err and "--journal DIR" in told.err
    told = egressctl("audit", "--journal", tmp_path / "nowhere", "--json")
    assert told.json["error"]["reason"] == "unavailable"


def test_a_segment_that_is_a_symbolic_link_is_refused(egressctl: Any, journal: Path) -> None:
    (journal / segments.name(9)).symlink_to("/etc/shadow")
    told = egressctl("audit", "--journal", journal)
    assert (told.status, told.out) == (125, "")
    assert "cannot be read" in told.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("what", ["directory", "file"])
def test_who_may_not_read_it_is_told_how_to(journal: Path, what: str) -> None:
    for parent in (journal, *list(journal.parents)[:4]):
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    (journal if what == "directory" else journal / segments.name(1)).chmod(
        0o750 if what == "directory" else 0o640
    )
    prefix = ["setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups"]
    command = [sys.executable, "-m", "egressd.cli.main", "audit", "--journal", str(journal)]
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout) == (125, "")
    assert "may only be read by root and the group egressd-audit: use sudo, or" in done.stderr
    assert "`adduser 4001 egressd-audit`" in done.stderr
    group = [*prefix[:-1], "--groups", "0"]  # the group that owns the files
    assert (
        subprocess.run([*group, *command], capture_output=True, check=False, cwd="/").stdout.count(b"\n")
        == 10
    )


def test_the_daemon_that_is_named_tells_where_its_journal_is(
    egressctl: Any, daemon: Any, journal: Path
) -> None:
    daemon.document = {"state_dir": str(journal.parent)}
    told = egressctl("--run-dir", daemon.run_dir, "audit", "--json")
    assert told.out.encode() == b"".join(story())
    daemon.document = {}
    told = egressctl("--run-dir", daemon.run_dir, "audit")
    assert told.status == 125 and "--journal DIR" in told.err
    told = egressctl("--run-dir", daemon.run_dir / "nowhere", "audit")
    assert told.status == 125 and "egressd is not running" in told.err and "--journal DIR" in told.err


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        (None, "/var/lib/egressd/journal"),
        ("upstream: []\n", "/var/lib/egressd/journal"),
        ("state_dir: /srv/e\n", "/srv/e/journal"),
        ("state_dir: /srv/e\nnonsense: [1\n", "/srv/e/journal"),
        ("state_dir: /srv/e\nno_such_key: 1\n", "/srv/e/journal"),
    ],
)
def test_else_the_configuration_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, directory: str
) -> None:
    config = tmp_path / "egressd.yaml"
    if text is not None:
        config.write_text(text)
    monkeypatch.setattr(audit, "_CONFIG", str(config))
    monkeypatch.setattr("egressd.cli.main.DEFAULT_RUN_DIR", str(tmp_path))  # where nobody listens
    assert audit.journal_directory(Namespace(journal=None, run_dir=str(tmp_path))) == directory


def test_without_a_configuration_the_daemon_of_the_default_directory_is_asked(
    daemon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.document = {"state_dir": "/srv/e"}
    monkeypatch.setattr(audit, "_CONFIG", str(daemon.run_dir / "egressd.yaml"))
    monkeypatch.setattr("egressd.cli.main.DEFAULT_RUN_DIR", str(daemon.run_dir))
    args = Namespace(journal=None, run_dir=str(daemon.run_dir))
    assert audit.journal_directory(args) == "/srv/e/journal"


# ---- what is typed


NOW = datetime(2026, 11, 21, 15, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", NOW),
        ("30s", NOW - timedelta(seconds=30)),
        ("30m", NOW - timedelta(minutes=30)),
        ("1h", NOW - timedelta(hours=1)),
        ("2w", NOW - timedelta(weeks=2)),
        ("today", datetime(2026, 11, 21, tzinfo=UTC)),
        ("yesterday", datetime(2026, 11, 20, tzinfo=UTC)),
        ("2026-11-20", datetime(2026, 11, 20, tzinfo=UTC)),
        ("2026-11-20T10:30", datetime(2026, 11, 20, 10, 30, tzinfo=UTC)),
        ("2026-11-20 10:30:05.5", datetime(2026, 11, 20, 10, 30, 5, 500_000, tzinfo=UTC)),
        ("2026-11-20T10:30+02:00", datetime(2026, 11, 20, 8, 30, tzinfo=UTC)),
        ("2026-11-20T10:30:00.000001Z", datetime(2026, 11, 20, 10, 30, 0, 1, tzinfo=UTC)),
    ],
)
def test_times(text: str, meant: datetime) -> None:
    assert audit.instant(text, now=NOW.timestamp()) == meant


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--since", "soon"], "'soon' is no time: write 30m"),
        (["--since", "999999999w"], "is no time"),
        (["--until", "-5m"], "argument --until"),
        (["--sandbox", "acme"], "'acme' is no sandbox: write eg7"),
        (["--sandbox", "eg0"], "is no sandbox"),
        (["--verdict", "denid"], "there is no verdict 'denid': did you mean denied?"),
        (["--verdict", ""], "there is no verdict"),
        (["--reason", "sni_other"], "did you mean sni-other?"),
        (["--event", "Denied"], "'Denied': write events such as denied,flow"),
        (["-n", "0"], "'0' is no number of records"),
        (["--request", "7"], "'7' is no request: write r-..."),
        (["--asker", "ann@acme.test"], "write user:ISSUER:SUBJECT or group:ISSUER:NAME"),
        (["--follow", "--reverse"], "neither --reverse nor --until"),
        (["--follow", "--until", "now"], "neither --reverse nor --until"),
    ],
)
def test_a_wrong_word_is_status_2_and_names_the_right_one(
    egressctl: Any, journal: Path, words: list[str], says: str
) -> None:
    told = egressctl("audit", "--journal", journal, *words)
    assert (told.status, told.out) == (2, "")
    assert says in told.err


# ---- following


def append(directory: Path, segment: int, data: bytes) -> None:
    with (directory / segments.name(segment)).open("ab") as file:
        file.write(data)


def test_a_tail_gives_each_whole_line_once_across_segments(journal: Path) -> None:
    tail = Tail(Journal.open(str(journal)))
    new = [line(10 + n, "auditor", "denied", DENIED4) for n in range(5)]
    assert tail.read() == []
    append(journal, 3, new[0] + new[1][:50])
    assert tail.read() == [new[0][:-1]]
    assert tail.read() == []
    append(journal, 3, new[1][50:])
    append(journal, 4, new[2])
    append(journal, 5, new[3])
    assert [*tail.read(), *tail.read(), *tail.read()] == [each[:-1] for each in new[1:4]]
    append(journal, 5, new[4])
    assert tail.read() == [new[4][:-1]]


def test_lines_that_were_cut_off_and_written_again_are_not_given_twice(journal: Path) -> None:
    """A write that failed half-way is cut off and done again: the same records, and then others."""
    tail = Tail(Journal.open(str(journal)))
    last = journal / segments.name(3)
    before, new = last.read_bytes(), [line(10 + n, "auditor", "denied", DENIED4) for n in range(3)]
    last.write_bytes(before + new[0] + new[1][:9])
    assert tail.read() == [new[0][:-1]]
    last.write_bytes(before)
    assert tail.read() == []
    last.write_bytes(before + b"".join(new))
    assert tail.read() == [each[:-1] for each in new[1:]]


def test_a_tail_begins_with_the_first_segment_of_an_empty_journal(tmp_path: Path) -> None:
    tail = Tail(Journal.open(str(tmp_path)))
    assert tail.read() == []
    append(tmp_path, 1, story()[0])
    assert tail.read() == [story()[0][:-1]]


def test_a_journal_that_was_begun_anew_is_followed_from_its_beginning(journal: Path) -> None:
    tail = Tail(Journal.open(str(journal)))
    assert tail.read() == []
    aside = journal / "broken-1"
    aside.mkdir()
    for path in journal.glob("*.jsonl"):
        path.rename(aside / path.name)
    assert tail.read() == []
    append(journal, 1, story()[0] + story()[1])
    assert [*tail.read(), *tail.read()] == [each[:-1] for each in story()[:2]]


def test_a_file_in_the_place_of_another_is_another_journal(tmp_path: Path) -> None:
    lay(tmp_path, story(), each=100)
    tail = Tail(Journal.open(str(tmp_path)))
    (tmp_path / "new").write_bytes(story()[0])
    (tmp_path / "new").rename(tmp_path / segments.name(1))
    assert [*tail.read(), *tail.read()] == [story()[0][:-1]]


def test_what_the_auditor_writes_is_followed_across_its_own_segments(tmp_path: Path) -> None:
    """Each record once and in order, with the files really growing and changing meanwhile."""
    directory = tmp_path / "journal"
    file = JournalFile(directory, segment_bytes=3000)
    file.append([Draft(timestamp(), "auditor", "process-started", {"name": "warden"})])
    tail, seen = Tail(Journal.open(str(directory))), []
    for number in range(120):
        file.append([Draft(timestamp(), "auditor", "denied", {**DENIED4, "port": number})] * (1 + number % 3))
        if number % 7 == 0:
            seen += tail.read()
    while lines := tail.read():
        seen += lines
    file.close()
    assert len(list(directory.glob("*.jsonl"))) > 5
    ports = [audit_search.read(each).fields["port"] for each in seen]
    assert ports == [number for number in range(120) for _ in range(1 + number % 3)]
    assert [audit_search.read(each).seq for each in seen] == list(range(1, 1 + len(seen)))


@pytest.fixture
def following(journal: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "egressd.cli.main", "audit", "--journal", str(journal)]
    words = ["--follow", "--json", "--verdict", "denied", "-n", "1"]
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_following_shows_what_is_recorded_and_ends_at_ctrl_c(
    following: subprocess.Popen[bytes], journal: Path
) -> None:
    assert following.stdout and following.stderr
    assert following.stdout.readline() == story()[5]
    new = line(10, "auditor", "denied", DENIED4)
    append(journal, 3, line(11, "auditor", "flow", FLOW) + new[:30])
    time.sleep(0.4)  # a torn line stays unseen meanwhile
    append(journal, 4, line(12, "auditor", "denied", DENIED6))
    assert following.stdout.readline() == line(12, "auditor", "denied", DENIED6)
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 130
    assert following.stderr.read() == b""


def test_following_ends_when_nobody_reads_though_nothing_happens(following: subprocess.Popen[bytes]) -> None:
    assert following.stdout and following.stderr
    following.stdout.readline()
    following.stdout.close()
    assert following.wait(10) == 141
    assert following.stderr.read() == b""
