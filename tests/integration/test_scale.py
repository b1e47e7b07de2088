"""Waves of sandboxes: each used, ended, and nothing of them left, in the kernel, in memory or on disk.

The crowd and what is compared are the benchmark's (bench/scale.py); here is no time measured.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench import memory, scale
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, poll
from lab.scale import scaled

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="the crowd's kernel memory is read as root"),
]

WAVES = 4
GROWTH = 1.10  # of the daemon's memory, from the first wave's end to the last's


@pytest.fixture
def daemon(lab: Lab, internet: Internet) -> Iterator[Daemon]:
    with (
        lab.leaving_nothing(within=10),
        Daemon(lab, policies={"acme": scale.policy(lab.user)}, gateway="egw-many") as daemon,
    ):
        yield daemon


def books(daemon: Daemon) -> dict[str, Any]:
    document = daemon.ask("counters", workspace="acme")
    assert document["balanced"], document["differences"]
    found: dict[str, Any] = document["workspaces"][0]
    return found


def wave(daemon: Daemon, crowd: scale.Crowd, count: int) -> None:
    before = books(daemon)
    assert len(crowd.tell("spawn", count=count)["ms"]) == count
    assert len(daemon.sandbox_links()) == count
    assert crowd.tell("ask")["answers"] == {"yes no": count}
    stray = scale.check_books(before, books(daemon), count)
    assert stray < count, "late answers of the resolver, and no second look at what was denied"
    crowd.tell("end")


@pytest.mark.slow
def test_waves_of_sandboxes_leave_nothing(daemon: Daemon) -> None:
    count = scaled(200, least=20) // WAVES
    with scale.Crowd.started(daemon, hands=4) as crowd:
        wave(daemon, crowd, count)  # what is made once, is made now
        pids = daemon.pids()
        left = scale.quiet(daemon, pids)
        weight = memory.pss(daemon.lab, pids.values())
        for _ in range(WAVES - 1):
            wave(daemon, crowd, count)
            scale.settled(daemon, pids, left)
    assert daemon.pids() == pids, "nobody was started again"
    assert memory.pss(daemon.lab, pids.values()) < GROWTH * weight
    assert not daemon.ask("status")["alarms"]


def test_a_few_at_once_are_exact_and_leave_nothing(daemon: Daemon) -> None:
    with scale.Crowd.started(daemon, hands=2) as crowd:
        wave(daemon, crowd, 2)
        pids = daemon.pids()
        left = scale.quiet(daemon, pids)
        wave(daemon, crowd, 3)
        scale.settled(daemon, pids, left)
        crowd.tell("spawn", count=1)
        poll(daemon.sandbox_links, what="one stands")
        assert any(line.startswith("links") for line in scale.Left.now(daemon, pids).beyond(left))
        crowd.tell("end")
        scale.settled(daemon, pids, left)


def workspace(*, opened: int, unlisted: int, links: list[tuple[int, int]]) -> dict[str, Any]:
    """The books of acme; of each link how many packets were admitted, and denied."""
    return {
        "hosts": [{"host": "plain.test", "connections": opened}],
        "denied": {"unlisted": [unlisted, 60 * unlisted]},
        "links": [
            {"link": number, "ok": [ok, 0], "denied": [denied, 0]}
            for number, (ok, denied) in enumerate(links, 1)
        ],
    }


BEFORE = workspace(opened=7, unlisted=5, links=[])
AFTER = workspace(opened=9, unlisted=7, links=[(8, 1), (8, 1)])


def test_books_are_exact_or_say_what_is_not() -> None:
    assert scale.check_books(BEFORE, AFTER, 2) == 0
    late = workspace(opened=9, unlisted=8, links=[(8, 1), (8, 2)])
    assert scale.check_books(BEFORE, late, 2) == 1, "a late answer of the resolver"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"hosts": [{"host": "plain.test", "connections": 10}]}, "3 connections were opened"),
        ({"denied": {"unlisted": [8, 0]}}, "2 packets were denied by links, 3 in all"),
        ({"links": AFTER["links"][:1]}, "1 links are in the books"),
    ],
)
def test_books_that_are_not_exact_are_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        scale.check_books(BEFORE, copy.deepcopy(AFTER) | changed, 2)


def test_a_sandbox_that_was_denied_nothing_is_seen() -> None:
    silent = workspace(opened=9, unlisted=7, links=[(8, 2), (8, 0)])
    with pytest.raises(RuntimeError, match=r"to \[2\]"):
        scale.check_books(BEFORE, silent, 2)
