"""The auditor, whole: what goes in by its sockets, and what then stands in the journal."""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from auditor_lab import UID, Auditor, logged, read, until
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from egressd.ipc import messages
from egressd.journal import records, segments
from egressd.ruleset.layout import LINK_INDEX

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts a process that gives up root")

V4, V6 = 0x0800, 0x86DD
SOURCE4, SOURCE6 = "198.19.0.7", "fd53:1::7"


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory as the supervisor prepares it."""
    path = Path(tempfile.mkdtemp(prefix="egressd-auditor-"))
    try:
        path.chmod(0o755)
        (path / "journal").mkdir(mode=0o750)
        os.chown(path / "journal", UID, UID)
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def auditor(state: Path) -> Iterator[Auditor]:
    with Auditor(state) as running:
        yield running.ready()


def denial(
    auditor: Auditor, packet, prefix: str = "acme unlisted", *, sequence: int, indev: int = 12, mark: int = 0
) -> None:
    ethertype = V4 if packet.version == 4 else V6
    auditor.nflog.send(
        logged(bytes(packet), prefix=prefix, indev=indev, ethertype=ethertype, sequence=sequence, mark=mark)
    )


# ---- events


def test_an_event_becomes_a_record(auditor: Auditor) -> None:
    auditor.event("sandbox-opened", link=7, workspace="acme", command="echo \x1b[31m\u202e\n", note=None)
    (fields,) = auditor.wait_for("sandbox-opened")
    assert fields == {"link": 7, "workspace": "acme", "command": "echo \x1b[31m\u202e\n", "note": None}
    raw = (auditor.directory / "0001.jsonl").read_bytes()
    assert rb"\u001b[31m\u202e\n" in raw
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in raw)


def test_records_are_numbered_without_gaps_and_say_who_and_when(auditor: Auditor) -> None:
    for i in range(500):
        auditor.event("tick", by="controller" if i % 2 else "warden", i=i)
    auditor.wait_for("tick", 500)
    found = auditor.records()
    assert [r.seq for r in found] == list(range(len(found)))
    assert {r.process for r in found if r.event == "tick"} == {"controller", "warden"}
    assert sorted(f["i"] for f in auditor.of("tick")) == list(range(500))
    assert all(r.time == sorted([r.time, "2020"])[1] for r in found)


def test_a_process_cannot_speak_in_anothers_name(auditor: Auditor) -> None:
    auditor.event("granted", by="warden", claims="controller", x=1)
    auditor.wait_for("granted")
    (record,) = [r for r in auditor.records() if r.event == "granted"]
    assert record.process == "warden"
    assert record.fields == {"claimed_process": "controller", "x": 1}


@pytest.mark.parametrize("rubbish", [b"rubbish", b"{}", b'{"type":"Ready"}', b"[" * 9000, b"\xff"])
def test_rubbish_ends_that_peer_and_no_other(auditor: Auditor, rubbish: bytes) -> None:
    auditor.channels["warden"].socket.send(rubbish)
    auditor.wait_for("peer-broken")
    assert auditor.channels["warden"].socket.recv(10) == b""
    auditor.event("still-here")
    auditor.wait_for("still-here")


def test_only_the_controller_says_who_has_which_address(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6, by="warden")
    auditor.wait_for("peer-broken")
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), sequence=0)
    (fields,) = auditor.wait_for("denied")
    assert fields["link"] is None


def test_losses_of_others_are_added_up(auditor: Auditor) -> None:
    auditor.channels["warden"].send(messages.Losses(process="warden", count=40))
    auditor.channels["warden"].send(messages.Losses(process="warden", count=2))
    found = until(lambda: (f := auditor.of("lost")) and sum(x["count"] for x in f) == 42 and f)
    assert {(f["cause"], f["from"]) for f in found} == {("sender", "warden")}


def test_a_restarted_process_is_heard_on_its_new_socket(auditor: Auditor) -> None:
    auditor.event("first", by="warden")
    new = auditor.introduce("audit-warden")
    new.send(messages.Event(process="warden", event="second", fields={}))
    auditor.wait_for("second")
    assert len(auditor.of("first")) == 1  # what lay in the old socket was still read
    assert auditor.channels["warden"].socket.recv(10) == b""
    newcomer = auditor.introduce("audit-resolver")
    newcomer.send(messages.Event(process="resolver", event="third", fields={}))
    auditor.wait_for("third")
    ignored = auditor.introduce("mystery")
    assert ignored.socket.recv(10) == b""
    new.close()
    newcomer.close()


# ---- denials


def test_a_denial_is_recorded_with_link_destination_and_reason(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443, flags="S"), sequence=0)
    denial(auditor, IPv6(src=SOURCE6, dst="2001:db8::9") / UDP(dport=53), "acme port", sequence=1)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / ICMP(type=8), sequence=2)
    by_protocol = {f["protocol"]: f for f in auditor.wait_for("denied", 3)}
    assert by_protocol["tcp"] == {
        "link": "eg7", "workspace": "acme", "reason": "unlisted", "protocol": "tcp", "source": SOURCE4,
        "destination": "203.0.113.9", "port": 443, "packets": 1,
    }  # fmt: skip
    assert by_protocol["udp"] == {
        "link": "eg7", "workspace": "acme", "reason": "port", "protocol": "udp", "source": SOURCE6,
        "destination": "2001:db8::9", "port": 53, "packets": 1,
    }  # fmt: skip
    assert (by_protocol["icmp"]["icmp_type"], by_protocol["icmp"]["port"]) == (8, None)


def test_a_flood_is_one_record_with_the_exact_count(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    for i in range(300):
        denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(sport=1000 + i, dport=443), sequence=i)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=444), sequence=300)
    until(lambda: sum(f["packets"] for f in auditor.of("denied")) == 301)
    of_443 = [f for f in auditor.of("denied") if f["port"] == 443]
    assert sum(f["packets"] for f in of_443) == 300
    assert len(of_443) <= 2  # one, or two where the machine took longer than a second to send them
    assert "kernel's counters" in of_443[0]["note"]
    assert [f["packets"] for f in auditor.of("denied") if f["port"] == 444] == [1]
    assert not auditor.of("lost")


def test_a_forged_source_is_attributed_by_the_interface_it_came_in_on(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    auditor.bind(8, "acme", "198.19.0.8", "fd53:1::8")
    forged = IP(src="198.19.0.8", dst="203.0.113.9") / TCP(dport=443)  # link 7 says it is link 8
    denial(auditor, forged, "acme source", sequence=0, indev=LINK_INDEX + 7)
    denial(auditor, forged, "acme source", sequence=1, indev=12)  # no interface of ours
    denial(auditor, forged, "acme unlisted", sequence=2, indev=LINK_INDEX + 7)
    denial(auditor, forged, "other source", sequence=3, indev=LINK_INDEX + 7)  # not its workspace's rule
    denial(
        auditor, forged, "other source", sequence=4, indev=LINK_INDEX + 9
    )  # never heard of: the index says it
    found = auditor.wait_for("denied", 5)
    assert [f["link"] for f in found] == ["eg7", None, "eg7", None, "eg9"]
    assert [f.get("interface_index") for f in found] == [None, 12, None, LINK_INDEX + 7, None]
    assert {f["source"] for f in found} == {"198.19.0.8"}


def test_a_link_of_another_workspace_is_never_named(auditor: Auditor) -> None:
    auditor.bind(7, "other", SOURCE4, SOURCE6)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), "acme unlisted", sequence=0)
    (fields,) = auditor.wait_for("denied")
    assert (fields["workspace"], fields["link"]) == ("acme", None)


def test_what_a_link_did_last_is_still_its_own(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    auditor.channels["controller"].send(messages.UnbindSource(request=1, link=7))
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), sequence=0)
    assert auditor.wait_for("denied")[0]["link"] == "eg7"
    auditor.bind(9, "acme", SOURCE4, SOURCE6)  # the address has a new owner
    auditor.event("bound")
    auditor.wait_for("bound")
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=444), sequence=1)
    assert auditor.wait_for("denied", 2)[1]["link"] == "eg9"


def test_an_observing_workspace_has_observations_not_denials(auditor: Auditor) -> None:
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), sequence=0, mark=0x9000_4000)
    assert auditor.wait_for("observed")[0]["destination"] == "203.0.113.9"
    assert not auditor.of("denied")


def test_packets_the_kernel_could_not_hand_over_are_counted_exactly(auditor: Auditor) -> None:
    packet = IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443)
    for sequence in (5, 6, 10, 0xFFFF_FFFF, 0):  # 7, 8, 9 are missing; then the group was bound anew
        denial(auditor, packet, sequence=sequence)
    until(lambda: sum(f["packets"] for f in auditor.of("denied")) == 5)
    assert [(f["cause"], f["from"], f["count"]) for f in auditor.wait_for("lost")] == [
        ("netlink", "kernel", 3)
    ]


def test_rubbish_in_the_log_is_counted_and_read_past(auditor: Auditor) -> None:
    auditor.nflog.send(b"\x00" * 7)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), "%n unlisted \x1b", sequence=0)
    (fields,) = auditor.wait_for("denied")
    assert (fields["workspace"], fields["reason"], fields["link"]) == (None, "unknown", None)
    assert auditor.wait_for("lost")[0]["cause"] == "malformed"


# ---- the disk


def test_a_restart_continues_the_numbers(state: Path) -> None:
    for run in range(3):
        with Auditor(state) as auditor:
            auditor.ready().event("run", n=run)
            assert auditor.stop() == 0
    found = read(state / "journal")
    assert [r.seq for r in found] == list(range(len(found)))
    assert [dict(r.fields) for r in found if r.event == "run"] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_what_was_said_before_the_end_is_recorded(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), sequence=0)
    for i in range(2000):
        auditor.event("last-words", i=i)
    assert auditor.stop() == 0
    assert len(auditor.of("last-words")) == 2000
    assert auditor.of("denied")[0]["packets"] == 1


def test_it_ends_when_the_supervisor_does(auditor: Auditor) -> None:
    auditor.event("before")
    auditor.channels["supervisor"].close()
    assert auditor.process.wait(10) == 0
    assert auditor.of("before")


def test_killed_while_writing_it_loses_no_whole_line(state: Path) -> None:
    chance = random.Random(1)
    written = 0
    for _ in range(4):
        with Auditor(state) as auditor:
            auditor.ready()
            end = time.monotonic() + chance.uniform(0.05, 0.3)
            while time.monotonic() < end:
                auditor.event("noise", text="x" * chance.randrange(900))
            auditor.process.kill()
            auditor.process.wait()
        found = read(state / "journal")
        assert [r.seq for r in found] == list(range(len(found)))
        assert len(found) > written
        written = len(found)


@pytest.mark.parametrize("size", [1, 300, 70_000, 200_000])
def test_a_torn_line_is_set_aside_and_recorded(state: Path, size: int) -> None:
    for run in range(2):
        with Auditor(state) as auditor:
            auditor.ready().event("run", n=run)
            assert auditor.stop() == 0
        with (state / "journal/0001.jsonl").open("ab") as stream:
            stream.write(b"{" * size)
    with Auditor(state) as auditor:
        auditor.ready().event("run", n=2)
        assert auditor.stop() == 0
    found = read(state / "journal")
    assert [r.seq for r in found] == list(range(len(found)))
    torn = [dict(r.fields) for r in found if r.event == "journal-torn"]
    assert torn == [
        {"bytes": size, "file": "0001.jsonl", "moved_to": "0001.torn"},
        {"bytes": size, "file": "0001.jsonl", "moved_to": "0001.2.torn"},
    ]
    assert (state / "journal/0001.torn").read_bytes() == b"{" * size
    assert [dict(r.fields)["n"] for r in found if r.event == "run"] == [0, 1, 2]


def test_a_journal_that_is_one_torn_line_begins_anew(state: Path) -> None:
    (state / "journal/0001.jsonl").write_bytes(b"x" * 100)
    os.chown(state / "journal/0001.jsonl", UID, UID)
    with Auditor(state) as auditor:
        auditor.ready()
        auditor.stop()
    assert [r.seq for r in read(state / "journal")] == [0, 1]
    assert (state / "journal/0001.torn").read_bytes() == b"x" * 100


def test_damaged_lines_stay_and_are_counted_past(state: Path) -> None:
    with Auditor(state) as auditor:
        auditor.ready().event("run")
        auditor.stop()
    path = state / "journal/0001.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b"damaged\n" * 2)
    with Auditor(state) as auditor:
        auditor.ready()
        auditor.stop()
    after = path.read_bytes()
    assert after.startswith(before + b"damaged\n" * 2)
    damaged = [records.decode(line) for line in after[len(before) + 16 :].splitlines()]
    assert (damaged[0].event, damaged[0].fields) == ("journal-damaged", {"lines": 2})
    assert damaged[0].seq == len(before.splitlines()) + 2


def test_a_second_writer_is_refused(auditor: Auditor) -> None:
    with Auditor(auditor.state) as second:
        assert second.process.wait(20) == 1
    assert "is being written by another process" in auditor.said()
    auditor.event("still-writing")
    auditor.wait_for("still-writing")


def test_a_disk_that_fills_loses_nothing_if_it_empties_in_time(auditor: Auditor) -> None:
    auditor.event("before")
    auditor.wait_for("before")
    size = (auditor.directory / "0001.jsonl").stat().st_size
    limit_file_size(auditor, size + 100)  # a write stops in the middle of a line, then fails
    for i in range(50):
        auditor.event("while-full", i=i)
    until(lambda: "cannot be written" in auditor.said())
    until(lambda: (auditor.directory / "0001.jsonl").stat().st_size == size, what="no half line is left")
    assert auditor.process.poll() is None
    limit_file_size(auditor, resource.RLIM_INFINITY)
    found = auditor.wait_for("while-full", 50)
    assert [f["i"] for f in found] == list(range(50))
    assert [r.seq for r in auditor.records()] == list(range(len(auditor.records())))
    until(lambda: "is written again" in auditor.said())
    assert auditor.said().count("cannot be written") == 1


def limit_file_size(auditor: Auditor, size: int) -> None:
    """RLIMIT_FSIZE stands in for a full disk: a short write first, then an error. Set as its own user,
    since for another's process prlimit(2) asks for CAP_SYS_RESOURCE."""
    limit = "unlimited" if size == resource.RLIM_INFINITY else str(size)
    user = ("setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups")
    command = (*user, "prlimit", "--pid", str(auditor.process.pid), f"--fsize={limit}:unlimited")
    subprocess.run(command, check=True)


def test_a_process_that_floods_is_never_blocked_and_the_rest_is_heard(auditor: Auditor) -> None:
    limit_file_size(auditor, 1)
    longest = 0.0
    for i in range(4000):
        started = time.monotonic()
        auditor.event("flood", by="warden", text="x" * 1000, i=i)
        longest = max(longest, time.monotonic() - started)
    assert longest < 1.0
    auditor.event("quiet")
    limit_file_size(auditor, resource.RLIM_INFINITY)
    auditor.wait_for("quiet")
    found = auditor.records()
    assert [r.seq for r in found] == list(range(len(found)))
    lost = sum(r.fields["count"] for r in found if r.event == "lost")  # type: ignore[misc]
    assert sum(r.event == "flood" for r in found) + lost == 4000


# ---- rights and lines for people


def test_it_has_no_right_left(auditor: Auditor) -> None:
    status = Path(f"/proc/{auditor.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh")] == [0] * 4
    assert fields["NoNewPrivs"] == "1"


def test_it_beats_for_as_long_as_its_loop_turns(auditor: Auditor) -> None:
    assert auditor.channels["supervisor"].receive().message == messages.Heartbeat()


def test_notable_records_are_lines_for_the_systems_journal(state: Path) -> None:
    with Auditor(state, environment={"JOURNAL_STREAM": "1:2"}) as auditor:
        auditor.ready().event("tampered", what="table \x1b[2J inet gone", restored=True)
        auditor.event("sandbox-opened")
        auditor.wait_for("sandbox-opened")
        line = '<4>controller: tampered {"restored": true, "what": "table \\u001b[2J inet gone"}\n'
        until(lambda: line in auditor.said())
        assert "sandbox-opened" not in auditor.said()


def test_without_its_sockets_it_does_not_begin(state: Path) -> None:
    command = [sys.executable, "-m", "egressd.processes.auditor", "--uid", str(UID), "--gid", str(UID)]
    done = subprocess.run(
        [*command, "--config-json", f'{{"state_dir":"{state}"}}'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "without --fd supervisor=N" in done.stderr


def test_segments_rotate_by_size(tmp_path: Path) -> None:
    from egressd.processes.journal_file import Draft, JournalFile, timestamp

    journal = JournalFile(tmp_path / "j", segment_bytes=1000)
    for i in range(30):
        journal.append([Draft(timestamp(), "auditor", "tick", {"i": i})])
    journal.close()
    names = sorted(entry.name for entry in (tmp_path / "j").iterdir())
    assert len(names) > 2
    assert names == [segments.name(i + 1) for i in range(len(names))]
    assert [r.fields["i"] for r in read(tmp_path / "j")] == list(range(30))
    again = JournalFile(tmp_path / "j", segment_bytes=1000)
    assert (again.seq, again.segment) == (30, len(names))
    again.close()
    (
        tmp_path / "j" / segments.name(len(names) + 1)
    ).touch()  # a crash between making a file and its first line
    again = JournalFile(tmp_path / "j")
    assert (again.seq, again.segment) == (30, len(names) + 1)
    again.close()


def test_a_segment_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    from egressd.processes.journal_file import JournalFile

    (tmp_path / "j").mkdir()
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "j/0001.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        JournalFile(tmp_path / "j")


def test_the_queue_is_bounded_and_says_what_it_lost(tmp_path: Path) -> None:
    from egressd.processes.journal_file import Draft, JournalFile, Writer, timestamp

    journal = JournalFile(tmp_path / "j")
    said: list[str] = []
    writer = Writer(journal, say=said.append, queue_records=10)
    drafts = [Draft(timestamp(), "warden", "tick", {"i": i}) for i in range(200)]
    kept = sum(writer.submit(draft) for draft in drafts)
    assert writer.end()
    found = read(tmp_path / "j")
    assert kept < 200
    assert sum(r.event == "tick" for r in found) == kept
    lost = [dict(r.fields) for r in found if r.event == "lost"]
    assert sum(f["count"] for f in lost) == 200 - kept  # type: ignore[misc]
    assert {(f["cause"], f["from"]) for f in lost} == {("queue", "warden")}


def test_no_socket_of_a_dead_auditor_keeps_its_neighbours_waiting(state: Path) -> None:
    with Auditor(state) as auditor:
        auditor.ready()
        auditor.process.kill()
        auditor.process.wait()
        auditor.channels["controller"].socket.settimeout(5)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                auditor.event("anyone")
        assert isinstance(auditor.channels["controller"].socket, socket.socket)
