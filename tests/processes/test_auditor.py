"""The auditor, whole: what goes in by its sockets, and what then stands in the journal."""

from __future__ import annotations

import hashlib
import json
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
from typing import Any

import pytest
from auditor_lab import UID, Auditor, logged, read, until
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received, payload
from egressd.journal import dsse, notes, records, segments
from egressd.journal.keys import PrivateKey
from egressd.ruleset.layout import LINK_INDEX, Kind, Mark, Pools
from packets.conntrack_datagrams import ended

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts a process that gives up root")

V4, V6 = 0x0800, 0x86DD
SOURCE4, SOURCE6 = "198.19.0.7", "fd53:1::7"


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory as the supervisor prepares it."""
    path = Path(tempfile.mkdtemp(prefix="egressd-auditor-"))
    try:
        path.chmod(0o755)
        for name, mode in (("journal", 0o750), ("keys", 0o700)):
            (path / name).mkdir(mode=mode)
            os.chown(path / name, UID, UID)
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


@pytest.mark.parametrize(
    ("process", "own", "foreign"),
    [
        ("resolver", "dns-denied", "snapshot"),
        ("resolver", "dns-resolved", "counted"),
        ("inspector", "flow-closed", "flow"),
        ("inspector", "flow-refused", "link-flows"),
        ("relay", "relay-closed", "sandbox-closed"),
        ("relay", "relay-denied", "lost"),
    ],
)
def test_who_reads_strangers_bytes_cannot_say_what_evidence_is_made_of(
    auditor: Auditor, process: str, own: str, foreign: str
) -> None:
    channel = auditor.introduce(f"audit-{process}")
    channel.send(messages.Event(process=process, event=own, fields={"workspace": "acme"}))
    auditor.wait_for(own)
    channel.send(messages.Event(process=process, event=foreign, fields={"workspace": "acme"}))
    (broken,) = auditor.wait_for("peer-broken")
    assert broken["why"] == f"{foreign} is not for {process} to say"
    assert channel.socket.recv(10) == b""
    assert auditor.of(foreign) == []
    channel.close()


@pytest.mark.parametrize("count", [0, 1 << 32, 1 << 70])
def test_a_number_of_losses_that_no_record_could_hold_ends_that_peer(auditor: Auditor, count: int) -> None:
    auditor.channels["warden"].send(messages.Losses(process="warden", count=count))
    auditor.wait_for("peer-broken")
    assert auditor.of("lost") == auditor.of("record-refused") == []


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
    newcomer.send(messages.Event(process="resolver", event="dns-third", fields={}))
    auditor.wait_for("dns-third")
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


def test_what_is_refused_past_the_guard_is_a_denial_of_its_link_s_workspace(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    auditor.event("bound")
    auditor.wait_for("bound")
    packet = IP(src=SOURCE4, dst="198.18.0.4") / TCP(dport=443)
    for sequence, (reason, link) in enumerate((("pace", 7), ("unresolved", 7), ("pace", 8))):
        indev = LINK_INDEX + link
        denial(auditor, packet, f"- {reason}", sequence=sequence, indev=indev, mark=0x8000_4001)
    found = auditor.wait_for("denied", 3)
    assert [(f["link"], f["workspace"], f["reason"]) for f in found] == [
        ("eg7", "acme", "pace"), ("eg7", "acme", "unresolved"), ("eg8", None, "pace"),
    ]  # fmt: skip
    assert ["prefix" in f for f in found] == [False, False, True]
    assert not auditor.of("observed")


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


def test_a_denial_at_a_name_s_own_address_says_whose_it_is(auditor: Auditor) -> None:
    auditor.bind(7, "acme", SOURCE4, SOURCE6)
    auditor.name("acme", 12, {5: "api.test"})
    auditor.event("named")
    auditor.wait_for("named")
    at4, at6 = Pools().synthetic(5, 3)
    denial(auditor, IP(src=SOURCE4, dst=str(at4)) / TCP(dport=22), sequence=0)
    denial(auditor, IPv6(src=SOURCE6, dst=str(at6)) / TCP(dport=22), sequence=1)
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=22), sequence=2)
    assert [f.get("host") for f in auditor.wait_for("denied", 3)] == ["api.test", "api.test", None]


# ---- flows

FORWARD = int(Mark(kind=Kind.FORWARD, workspace=12, block=5))


def flow(
    auditor: Auditor, source: str = SOURCE4, *, port: int = 443, out: tuple[int, int] = (3, 200)
) -> None:
    real, six = ("2001:db8::9", 1) if ":" in source else ("203.0.113.9", 0)
    synthetic = str(Pools().synthetic(5)[six])
    auditor.flows.send(ended(source, synthetic, port, mark=FORWARD, real=real, out=out))


def open_link(auditor: Auditor, link: int = 7) -> None:
    """As the controller does it."""
    auditor.bind(link, "acme", f"198.19.0.{link}", f"fd53:1::{link}")
    auditor.event("sandbox-opening", link=f"eg{link}", workspace="acme")
    auditor.name("acme", 12, {5: "api.test"})
    auditor.event("named")
    auditor.wait_for("named")


def close_link(auditor: Auditor, link: int = 7, *, ok: tuple[int, int]) -> None:
    auditor.channels["controller"].send(messages.UnbindSource(request=1, link=link))
    auditor.event("sandbox-closed", link=f"eg{link}", workspace="acme", ok_packets=ok[0], ok_bytes=ok[1])


def test_the_end_of_a_connection_is_a_flow_record(auditor: Auditor) -> None:
    open_link(auditor)
    flow(auditor)
    flow(auditor, SOURCE6)
    four, six = auditor.wait_for("flow", 2)
    assert (four["link"], four["workspace"], four["host"], four["address"]) == (
        "eg7", "acme", "api.test", "203.0.113.9",
    )  # fmt: skip
    assert (six["source"], six["host"], six["address"]) == (SOURCE6, "api.test", "2001:db8::9")


def test_a_link_s_flows_are_compared_with_its_counter_when_it_ends(auditor: Auditor) -> None:
    open_link(auditor)
    flow(auditor)
    close_link(auditor, ok=(10, 900))
    flow(auditor, SOURCE6, out=(6, 600))  # the kernel tells of it after the controller told of the end
    auditor.wait_for("flow", 2)
    assert auditor.of("link-flows") == []
    auditor.erased(7)
    [found] = auditor.wait_for("link-flows")
    assert (found["link"], found["flows"], found["out_packets"], found["out_bytes"]) == ("eg7", 2, 9, 800)
    assert (found["ok_packets"], found["unrecorded_packets"], found["unrecorded_bytes"]) == (10, 1, 100)
    assert "partial" not in found


def test_what_lies_in_the_socket_counts_when_the_link_is_erased(auditor: Auditor) -> None:
    open_link(auditor)
    for port in range(1, 151):  # more than are read at once
        flow(auditor, port=port)
    auditor.erased(7)
    close_link(auditor, ok=(451, 30_040))
    [found] = auditor.wait_for("link-flows")
    assert (found["flows"], found["unrecorded_packets"], found["unrecorded_bytes"]) == (150, 1, 40)


def test_only_the_warden_says_that_a_link_is_erased(auditor: Auditor) -> None:
    auditor.erased(7, by="controller")
    auditor.wait_for("peer-broken")


def test_only_the_controller_s_word_ends_a_link(auditor: Auditor) -> None:
    auditor.event("sandbox-closed", by="warden", link="eg7", workspace="acme", ok_packets=0, ok_bytes=0)
    auditor.event("sandbox-closed", link="eg8", workspace="acme", ok_packets=0, ok_bytes=0)
    assert [f["link"] for f in auditor.wait_for("link-flows")] == ["eg8"]


def test_a_killed_auditor_s_successor_finds_what_was_told_meanwhile(state: Path) -> None:
    """The supervisor keeps the socket. What the first one had summed is lost, and the record says so."""
    kept, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kept, its:
        with Auditor(state, flows=its) as first:
            first.ready()
            first.flows.close()
            first.flows = kept.dup()
            open_link(first)
            flow(first)
            first.wait_for("flow")
            first.process.kill()
            first.process.wait()
            flow(first, port=444)
        with Auditor(state, flows=its) as second:
            second.ready()
            second.bind(7, "acme", SOURCE4, SOURCE6)
            until(lambda: len(second.of("flow")) == 2)
            close_link(second, ok=(6, 400))
            second.erased(7)
            [found] = second.wait_for("link-flows")
            assert (found["flows"], found["partial"], found["unrecorded_packets"]) == (1, True, 3)


def test_flows_told_before_the_end_are_recorded(auditor: Auditor) -> None:
    open_link(auditor)
    for i in range(1000):
        flow(auditor, port=1 + i % 7)
    close_link(auditor, ok=(3000, 200_000))
    assert auditor.stop() == 0
    flows = auditor.of("flow")
    assert sum(f.get("flows", 1) for f in flows) == 1000
    assert sum(f["out_bytes"] for f in flows) == 200_000
    assert auditor.of("link-flows")[0]["unrecorded_packets"] == 0


def test_rubbish_among_the_flows_is_counted_and_read_past(auditor: Auditor) -> None:
    auditor.flows.send(b"\x00" * 9)
    auditor.flows.send(ended(SOURCE4, "198.18.0.20", mark=FORWARD, out=None))
    flow(auditor)
    auditor.wait_for("flow", 2)
    assert {f["cause"] for f in auditor.wait_for("lost", 2)} == {"flows-malformed", "flows-uncounted"}


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
    for run in range(1, 5):
        with Auditor(state) as auditor:
            auditor.ready().event("begun")
            auditor.wait_for("begun", run)  # the disk may be busy: what follows is written while it is killed
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
    events = [(r.seq, r.event) for r in read(state / "journal")]
    assert events == [(0, "journal-torn"), (1, "journal-opened"), (2, "key-created")]
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


# ---- the channel that is answered

FACTS = {
    "policy": {"digest": f"sha256:{0:064x}", "text": "workspace: acme", "guard": "enforce"},
    "ruleset": {"digest": f"sha256:{0:064x}", "text": "", "drift": []},
    "versions": {"egressd": "0", "kernel": "0", "nft": "0", "python": "0"},
    "machine": {"boot": "00000000-0000-0000-0000-000000000000"},
    "registry": {"digest": f"sha256:{'0' * 64}"},
}


def snapshot(auditor: Auditor, name: str, *, workspace: str = "acme") -> None:
    auditor.event(
        "snapshot", workspace=workspace, snapshot=name, epoch="0-0", rows=0, full=True, links=0,
        in_packets=0, in_bytes=0, ok_packets=0, ok_bytes=0, denied_packets=0, denied_bytes=0,
        other_packets=0, other_bytes=0, balanced=True, policy="sha256:0", guard="enforce",
        names_refused=0, flows_refused=0,
    )  # fmt: skip


def ask_for_proof(
    auditor: Auditor, *, after: str = "", number: int = 1, facts: Any = FACTS, **fields: Any
) -> None:
    data = json.dumps(facts).encode()
    message = messages.MakeProof(
        request=number, payload_length=len(data), workspace="acme", after=after, **fields
    )
    with payload(data) as descriptor:
        auditor.channels["evidence"].send(message, descriptor=descriptor)


def answer(auditor: Auditor) -> Received[Any]:
    auditor.channels["evidence"].socket.settimeout(20)
    return auditor.channels["evidence"].receive()


def test_the_journal_tells_how_it_is(auditor: Auditor) -> None:
    auditor.channels["warden"].send(messages.Losses(process="warden", count=3))
    auditor.wait_for("lost")

    def told() -> messages.JournalState | None:
        auditor.channels["evidence"].send(messages.ReadJournal(request=9))
        state = answer(auditor).message
        return state if state.checkpoint_size else None

    state = until(told)
    assert (state.request, state.segments, state.failing) == (9, 1, "")
    assert state.lost == {"sender": 3}
    assert state.records == len(auditor.records())
    assert state.octets == (auditor.directory / "0001.jsonl").stat().st_size
    assert state.key.startswith(f"{state.origin}+")


def test_a_proof_is_signed_recorded_and_handed_over(auditor: Auditor) -> None:
    snapshot(auditor, "s1-0")
    ask_for_proof(auditor, after="s1-0")
    received = answer(auditor)
    assert isinstance(received.message, messages.Payload), received.message
    envelope = dsse.decode(received.payload())
    key = PrivateKey.load((auditor.state / "keys/journal.key").read_bytes()).public
    signed = dsse.open(envelope)
    assert dsse.signers(signed, [key]) == (key.fingerprint,)
    statement = json.loads(signed.payload)
    assert statement["predicateType"] == "urn:egressd:proof:v1"
    assert "s1-0" in signed.payload.decode(), "the counters that the proof was asked for are in it"
    [issued] = auditor.wait_for("proof-issued")
    assert issued["digest"] == f"sha256:{hashlib.sha256(signed.payload).hexdigest()}"
    assert (issued["workspace"], issued["link"], issued["since"]) == ("acme", None, None)
    assert 0 < issued["size"] <= len(auditor.records())


def test_a_proof_holds_what_was_denied_a_moment_ago(auditor: Auditor) -> None:
    """Neither the second in which equal denials are counted together nor what has not been read yet is
    missing, of the kernel or of whoever else denies."""
    open_link(auditor)
    for sequence in range(300):  # more than are read at once
        denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=25), sequence=sequence)
    for _ in range(40):  # equal flows; beyond some they are one record
        flow(auditor)
    for _ in range(100):  # more than are read at once
        auditor.event("relay-denied", by="warden", workspace="acme", link="eg7", connections=1)
    close_link(auditor, ok=(120, 8000))
    snapshot(auditor, "s1-0")
    ask_for_proof(auditor, after="s1-0", link=7)
    time.sleep(0.2)  # the proof waits for the link to be erased
    auditor.erased(7)
    told = statement_of(answer(auditor))
    events = [record["event"] for record in told]
    assert sum(record["fields"]["packets"] for record in told if record["event"] == "denied") == 300
    assert sum(record["fields"].get("flows", 1) for record in told if record["event"] == "flow") == 40
    assert events.count("relay-denied") == 100 and events.count("link-flows") == 1


def statement_of(received: Received[Any]) -> list[dict[str, Any]]:
    """The records of a proof."""
    signed = dsse.open(dsse.decode(received.payload()))
    return [
        json.loads(line) for line in json.loads(signed.payload)["predicate"]["journal"]["records"]["lines"]
    ]


def test_no_proof_without_its_snapshot(auditor: Auditor) -> None:
    snapshot(auditor, "s1-0")
    ask_for_proof(auditor, after="s2-0")
    message = answer(auditor).message
    assert (message.reason, "ask again" in message.text) == ("unavailable", True)
    assert not auditor.of("proof-issued")


def test_what_the_prover_refuses_is_told(auditor: Auditor) -> None:
    ask_for_proof(auditor, facts={})
    message = answer(auditor).message
    assert isinstance(message, messages.Failed)
    assert "no proof could be made: the facts cannot be read" in message.text
    assert not auditor.of("proof-issued")


def test_a_third_proof_at_once_is_refused_and_the_log_is_read_meanwhile(auditor: Auditor) -> None:
    for number in (1, 2, 3):
        ask_for_proof(auditor, number=number, after="s7-0")
    first = answer(auditor).message
    assert (first.request, first.reason) == (3, "limit")
    assert first.text.startswith("busy")
    denial(auditor, IP(src=SOURCE4, dst="203.0.113.9") / TCP(dport=443), sequence=0)
    auditor.wait_for("denied")
    snapshot(auditor, "s7-0")
    assert {type(answer(auditor).message) for _ in range(2)} == {messages.Payload}


def test_a_new_key_signs_with_the_old_one_first(auditor: Auditor) -> None:
    auditor.channels["evidence"].send(messages.ReadJournal(request=1))
    before = answer(auditor).message.key
    auditor.channels["evidence"].send(messages.RotateKey(request=2))
    state = answer(auditor).message
    assert isinstance(state, messages.JournalState), state
    assert state.key != before
    [rotated] = auditor.wait_for("key-rotated")
    assert rotated == {"old": before, "new": state.key}
    note = (auditor.directory / "checkpoint").read_text()
    assert notes.open(note, [before]) == notes.open(note, [state.key])
    snapshot(auditor, "s1-0")
    ask_for_proof(auditor, after="s1-0", number=3)
    envelope = dsse.decode(answer(auditor).payload())
    key = PrivateKey.load((auditor.state / "keys/journal.key").read_bytes()).public
    assert dsse.signers(dsse.open(envelope), [key]) == (key.fingerprint,)


def test_a_restarted_controller_is_answered_on_its_new_channel(auditor: Auditor) -> None:
    old = auditor.channels["evidence"]
    new = auditor.introduce("evidence")
    auditor.channels["evidence"] = Channel(new.socket, messages.FROM_EVIDENCE)
    auditor.channels["evidence"].send(messages.ReadJournal(request=4))
    assert answer(auditor).message.request == 4
    assert old.socket.recv(10) == b""
    old.close()


@pytest.mark.parametrize("rubbish", [b"rubbish", b'{"type":"Ready"}'])
def test_rubbish_among_the_questions_ends_that_channel_alone(auditor: Auditor, rubbish: bytes) -> None:
    auditor.channels["evidence"].socket.send(rubbish)
    assert auditor.channels["evidence"].socket.recv(10) == b""
    auditor.event("still-here")
    auditor.wait_for("still-here")


def test_a_credential_wins_over_the_file(state: Path) -> None:
    key = PrivateKey.generate()
    with Auditor(state, credential=key.dump()) as auditor:
        auditor.ready()
        auditor.channels["evidence"].send(messages.ReadJournal(request=1))
        assert answer(auditor).message.key == key.public.verifier(answer_origin(auditor))
        auditor.channels["evidence"].send(messages.RotateKey(request=2))
        message = answer(auditor).message
        assert isinstance(message, messages.Failed)
        assert "credential" in message.text
    assert not (state / "keys/journal.key").exists()


def answer_origin(auditor: Auditor) -> str:
    return (auditor.directory / "origin").read_text().strip()


def test_a_key_that_others_may_read_is_not_used(state: Path) -> None:
    path = state / "keys/journal.key"
    path.write_bytes(PrivateKey.generate().dump())
    os.chown(path, UID, UID)
    path.chmod(0o644)
    with Auditor(state) as auditor:
        assert auditor.process.wait(20) == 1
        assert "may be read by others" in auditor.said()


# ---- rights and lines for people


def test_it_has_no_right_left(auditor: Auditor) -> None:
    status = Path(f"/proc/{auditor.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh")] == [0] * 4
    assert fields["NoNewPrivs"] == "1"


def test_it_beats_for_as_long_as_its_loop_turns(auditor: Auditor) -> None:
    assert auditor.channels["supervisor"].receive().message == messages.Heartbeat()


@pytest.mark.skipif(
    Path("/run/systemd/journal/socket").exists(), reason="this machine's journal would take them"
)
def test_notable_records_are_lines_where_the_systems_journal_does_not_take_entries(state: Path) -> None:
    """The entries with their fields: tests/system."""
    (state / "stderr").touch()
    status = (state / "stderr").stat()
    with Auditor(state, environment={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}) as auditor:
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
    names = sorted(entry.name for entry in (tmp_path / "j").iterdir() if entry.suffix == ".jsonl")
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


def test_what_is_told_without_end_is_written_in_the_order_of_each(state: Path) -> None:
    with Auditor(state, names=("controller", "relay", "warden")) as auditor:
        auditor.ready()
        for number in range(1500):
            auditor.event("relay-opened", by="relay", number=number, host="a.test", seconds=number / 1000)
            host = "caf\u00e9.test" if number % 100 == 7 else "b.test"
            auditor.event("counted", by="controller", number=number, host=host)
            if number % 500 == 0:
                auditor.event("snapshot", by="controller", number=number, snapshot=f"s{number}")
        auditor.event("denied", by="relay", number=1)  # not its word: that ends it
        auditor.wait_for("peer-broken")
        until(lambda: len(auditor.of("counted")) == 1500)
        assert auditor.stop() == 0
    for event, count in (("relay-opened", 1500), ("counted", 1500), ("snapshot", 3), ("denied", 0)):
        found: list[Any] = [fields["number"] for fields in auditor.of(event)]
        assert found == sorted(found) and len(set(found)) == len(found) == count
    written = auditor.records()
    assert [record.seq for record in written] == list(range(len(written)))
    assert {record.process for record in written if record.event == "relay-opened"} == {"relay"}


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


def test_who_reads_strangers_bytes_fills_half_of_the_queue_and_crowds_out_nobody(tmp_path: Path) -> None:
    from egressd.processes.journal_file import Draft, JournalFile, Writer, timestamp

    journal = JournalFile(tmp_path / "j")
    writer = Writer(journal, say=print, queue_records=100, modest=frozenset({"resolver"}))

    def submitted(process: str, count: int) -> int:
        return sum(writer.submit(Draft(timestamp(), process, "tick", {"i": i})) for i in range(count))

    with writer._changed:  # the thread takes nothing meanwhile
        assert 40 < submitted("resolver", 200) <= 50
        assert submitted("controller", 50) == 50
        assert submitted("resolver", 1) == 0
        assert 0 <= submitted("controller", 50) < 10
    assert writer.end()
    lost = {r.fields["from"] for r in read(tmp_path / "j") if r.event == "lost"}
    assert lost == {"resolver", "controller"}


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
