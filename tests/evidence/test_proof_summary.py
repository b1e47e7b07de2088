"""Counters of snapshots, and what happened between two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scene
from egressd.journal.lines import Line
from egressd.journal.summary import Summary, summarise

OPENAI, DB = scene.OPENAI, scene.DB


def summary_of(story: scene.Story, **asked: Any) -> Summary:
    return story.state(**asked).predicate.summary


def out(summary: Summary) -> dict[str, int]:
    return {host.host: host.counted.out_packets for host in summary.hosts}


@pytest.fixture
def story(tmp_path: Path) -> scene.Story:
    return scene.Story(tmp_path)


def test_from_the_beginning_everything_counts(story: scene.Story) -> None:
    story.snapshot(openai=4, db=1, unlisted=2)
    found = summary_of(story)
    assert out(found) == {OPENAI: 4, DB: 1}
    assert [(d.reason, d.packets, d.bytes) for d in found.denied] == [("unlisted", 2, 120)]
    assert (found.totals.in_packets, found.totals.ok_packets, found.totals.denied_packets) == (7, 5, 2)
    assert found.epochs[0].begins == "at nothing"
    assert not found.unequal
    assert found.hosts[1].addresses == ("192.0.2.10", "2001:db8::10")


def test_a_later_window_counts_from_the_snapshot_before_it(story: scene.Story) -> None:
    story.snapshot(openai=4, unlisted=2)
    story.denied(7, packets=9)
    story.snapshot(openai=10, unlisted=5)
    found = summary_of(story, since=scene.at(story.clock - 0.5))
    (epoch,) = found.epochs
    assert epoch.begins == "at a snapshot"
    assert out(found) == {DB: 0, OPENAI: 6}
    (host,) = [host for host in epoch.hosts if host.host == OPENAI]
    assert (host.start.out_packets, host.end.out_packets, host.counted.out_packets) == (4, 10, 6)
    assert found.denied[0].packets == 3
    assert sum(a.times for a in found.attempts) == 9  # it lies behind that snapshot


def test_snapshots_that_are_not_full_build_on_those_before(story: scene.Story) -> None:
    story.snapshot(openai=4, db=2)
    story.tell(
        "counted",
        workspace="acme",
        snapshot="s2-x",
        host=OPENAI,
        kind="host",
        out_packets=6,
        out_bytes=600,
        in_packets=6,
        in_bytes=9000,
        connections=2,
        dialled_packets=0,
        dialled_bytes=0,
        addresses="192.0.2.77",
    )
    story.tell(
        "snapshot",
        workspace="acme",
        snapshot="s2-x",
        epoch=scene.EPOCH,
        rows=1,
        full=False,
        links=0,
        in_packets=8,
        in_bytes=800,
        ok_packets=8,
        ok_bytes=800,
        denied_packets=0,
        denied_bytes=0,
        other_packets=0,
        other_bytes=0,
        balanced=True,
        policy="",
        guard="enforce",
    )
    found = summary_of(story)
    assert out(found) == {OPENAI: 6, DB: 2}
    assert not found.unequal
    assert "192.0.2.77" in next(host for host in found.hosts if host.host == OPENAI).addresses


def test_a_new_epoch_begins_at_nothing_and_both_count(story: scene.Story) -> None:
    story.snapshot(openai=4)
    story.flow(7, packets=1)
    story.snapshot(openai=3, epoch="5f3c0a1b-1790000999999")
    found = summary_of(story)
    assert out(found)[OPENAI] == 7
    assert [epoch.begins for epoch in found.epochs] == ["at nothing", "at nothing"]
    assert any("is in none" in gap for gap in found.gaps)


def test_what_follows_the_last_snapshot_is_said_not_guessed(story: scene.Story) -> None:
    story.snapshot(openai=4)
    assert not summary_of(story).gaps
    story.flow(7, packets=100)
    found = summary_of(story)
    assert out(found)[OPENAI] == 4
    assert any("is in no snapshot" in gap for gap in found.gaps)


def test_an_incomplete_snapshot_is_not_used_nor_what_builds_on_it(story: scene.Story) -> None:
    story.snapshot(openai=4)
    story.snapshot(openai=6, full=False, lose=1)
    story.snapshot(openai=7, full=False)
    found = summary_of(story)
    assert out(found)[OPENAI] == 4
    assert found.epochs[0].unusable == 2
    assert any("2 snapshots" in gap for gap in found.gaps)
    story.snapshot(openai=9)
    assert out(summary_of(story))[OPENAI] == 9


def test_a_window_without_a_snapshot_before_it_says_where_it_begins(story: scene.Story) -> None:
    story.denied(7)
    story.snapshot(openai=4)
    story.snapshot(openai=9)
    found = summary_of(story, since=scene.at(0.5))
    assert found.epochs[0].begins == "at its first snapshot"
    assert out(found)[OPENAI] == 5
    assert any("before its first snapshot" in gap for gap in found.gaps)


def test_nothing_may_shrink_within_an_epoch(story: scene.Story) -> None:
    story.snapshot(openai=4)
    story.snapshot(openai=3)
    wrong = summary_of(story).unequal
    assert f"{OPENAI}: nothing shrinks within an epoch" in [each.what for each in wrong]
    assert not any(each.moving for each in wrong)


def test_sandboxes_are_added_up_again(story: scene.Story) -> None:
    story.sandbox(7, ok=3, denied=2)
    found = summary_of(story)
    (sandbox,) = found.sandboxes
    assert (sandbox.link, sandbox.exit, sandbox.uid, sandbox.balanced) == ("eg7", 0, 4001, True)
    assert sandbox.recorded == (1, 3, 300)
    assert (sandbox.user_seconds, sandbox.max_rss) == (0.25, 1 << 20)
    story.tell("sandbox-closed", link="eg8", workspace="acme", in_packets=3, ok_packets=1, denied_packets=1)
    found = summary_of(story)
    assert [each.what for each in found.unequal] == ["eg8: in = ok + denied + other"]
    assert found.sandboxes[1].balanced is False
    assert found.sandboxes[1].opened is None


def test_equal_attempts_are_one_row_with_their_sum(story: scene.Story) -> None:
    for link, packets in ((7, 3), (9, 4)):
        story.denied(link, packets=packets)
    story.denied(7, port=80)
    story.tell(
        "dns-denied",
        process="resolver",
        link=7,
        workspace="acme",
        name="tracker.example",
        type="A",
        reason="name",
        count=5,
    )
    story.tell(
        "observed",
        process="auditor",
        link="eg7",
        workspace="acme",
        reason="unlisted",
        protocol="udp",
        destination="2001:db8::5",
        port=53,
        packets=2,
    )
    rows = summary_of(story).attempts
    assert [(a.verdict, a.by, a.destination, a.port, a.times, a.links) for a in rows] == [
        ("denied", "kernel", "203.0.113.9", 443, 7, ("eg7", "eg9")),
        ("denied", "resolver", "tracker.example", None, 5, ("eg7",)),
        ("observed", "kernel", "2001:db8::5", 53, 2, ("eg7",)),
        ("denied", "kernel", "203.0.113.9", 80, 1, ("eg7",)),
    ]


def test_summed_flows_count_as_many_as_they_are(story: scene.Story) -> None:
    story.flow(7, packets=3)
    story.tell(
        "flow",
        process="auditor",
        link="eg7",
        workspace="acme",
        host=OPENAI,
        kind="host",
        protocol="tcp",
        address="192.0.2.10",
        port=443,
        flows=40,
        out_packets=80,
        out_bytes=8000,
        in_packets=40,
        in_bytes=4000,
        seconds=2.5,
    )
    (flow,) = summary_of(story).flows
    assert (flow.flows, flow.out_packets, flow.out_bytes, flow.longest) == (41, 83, 8300, 2.5)


def test_odd_values_do_not_stop_it() -> None:
    """A record may hold any scalar anywhere; its sender is not believed to be sane."""
    odd: list[Any] = [None, True, -1, 1.5, "x", "\udc80", 2**63]
    events = (
        "denied",
        "flow",
        "counted",
        "snapshot",
        "sandbox-opening",
        "sandbox-closed",
        "link-flows",
        "lost",
        "attempt",
        "name-granted",
        "policy-changed",
        "process-started",
        "dns-denied",
    )
    names = (
        "link",
        "workspace",
        "packets",
        "port",
        "host",
        "rows",
        "snapshot",
        "epoch",
        "in_packets",
        "seconds",
        "count",
        "name",
        "reason",
        "out_packets",
        "exit",
        "addresses",
    )
    read = [
        Line(event, dict.fromkeys(names, value), "auditor", 0, scene.at(0))
        for event in events
        for value in odd
    ]
    for base in (0, 20):
        found = summarise(read, base=base, from_beginning=True)
        assert found == summarise(read, base=base, from_beginning=True)
