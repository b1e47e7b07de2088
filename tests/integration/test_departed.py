"""A sandbox that ends with a connection open: soon the host knows nothing of it. Its neighbour's goes
on, also while the process that sees to it is away."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from egressd.ruleset.layout import UPLINK_GATEWAY4, UPLINK_GATEWAY6
from integration import inside
from integration.neighbours import POLICY
from integration.probe import Resident
from lab import topology as t
from lab.machine import poll

FAMILIES = pytest.mark.parametrize("family", ["4", "6"])
FORGETS = 5.0  # seconds; mostly it takes a quarter of one
OURS = {"4": str(UPLINK_GATEWAY4), "6": UPLINK_GATEWAY6.exploded}


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    found = start_module_daemon(policies={"acme": POLICY})
    poll(lambda: "custodian" in found.pids(), what="the custodian")
    return found


def known(daemon: Any, family: str, where: str = t.HOST) -> int:
    """Open connections to port 7 that come from the gateway, or go back to it."""
    path = "/proc/net/nf_conntrack"
    lines = daemon.lab.run(["cat", path], where=where).check().out.splitlines()
    ours = f"src={OURS[family]}" if where == t.HOST else f"dst={OURS[family]}"
    return sum({"ESTABLISHED", ours, "dport=7"} <= set(line.split()) for line in lines)


def holds(resident: Resident, family: str, count: int = 1) -> None:
    address = resident.tries(("resolve", "plain.test", family))[0].data
    found = resident.tries(*[("hold", address, 7)] * count)
    assert [one.result for one in found] == ["ok"] * count


def vanish(daemon: Any, resident: Resident) -> None:
    """Without a word to anybody: its kernel would close what its processes had open, were there a way."""
    for family in "46":
        inside.run(daemon, resident.process, "ip", f"-{family}", "route", "flush", "default").check()
    resident.process.kill()


@FAMILIES
def test_the_host_forgets_what_a_sandbox_left_open(daemon: Any, family: str) -> None:
    with Resident(daemon) as neighbour:
        holds(neighbour, family)
        leaves = Resident(daemon)
        holds(leaves, family, 3)
        assert known(daemon, family) == 4
        vanish(daemon, leaves)
        poll(lambda: known(daemon, family) == 1, timeout=FORGETS, what="only the neighbour's is left")
        assert [one.result for one in neighbour.tries(("release", 1))] == ["ok"], "it was open"
    poll(lambda: known(daemon, family) == 0, timeout=FORGETS, what="nothing is left")


def test_what_ended_without_anybody_listening_is_forgotten_later(daemon: Any) -> None:
    """The socket outlives the custodian, and what the kernel told meanwhile waits in it."""
    leaves = Resident(daemon)
    holds(leaves, "4", 3)
    pid = daemon.pids()["custodian"]
    daemon.lab.signal(pid, signal.SIGSTOP)
    vanish(daemon, leaves)
    poll(lambda: known(daemon, "4", daemon.gateway) == 0, what="the gateway has forgotten it")
    assert known(daemon, "4") == 3
    daemon.lab.signal(pid, signal.SIGKILL)
    poll(lambda: known(daemon, "4") == 0, timeout=15, what="another custodian has dealt with it")


@pytest.mark.parametrize("who", ["--mend", "the next start"])
def test_who_looks_forgets_what_nobody_was_told_of(daemon: Any, who: str) -> None:
    """A gateway that tells nobody: what ends meanwhile stays in the host's table until somebody looks."""
    with Resident(daemon) as neighbour:
        holds(neighbour, "4")
        leaves = Resident(daemon)
        warden = daemon.pids()["warden"]
        daemon.lab.signal(warden, signal.SIGSTOP)  # it would put that back
        try:
            events(daemon, "0")
            holds(leaves, "4", 3)
            events(daemon, "1")
        finally:
            daemon.lab.signal(warden, signal.SIGCONT)
        vanish(daemon, leaves)
        poll(lambda: known(daemon, "4", daemon.gateway) == 1, what="the gateway has forgotten it")
        assert known(daemon, "4") == 4
        if who == "--mend":
            daemon.lab.run([*daemon.argv, who]).check()
        else:
            daemon.kill()
            daemon.start()  # which does not wait for it
        poll(lambda: known(daemon, "4") == 1, timeout=FORGETS, what="only the neighbour's is left")
        poll(lambda: "foundation" not in daemon.pids(), timeout=FORGETS, what="who forgot them has ended")
        assert [one.result for one in neighbour.tries(("release", 1))] == ["ok"]


def events(daemon: Any, value: str) -> None:
    """Does the gateway tell of the end of what begins from now on?"""
    path = "/proc/sys/net/netfilter/nf_conntrack_events"
    daemon.lab.run(["/bin/sh", "-c", f"echo {value} > {path}"], where=daemon.gateway).check()
