"""egressd in the lab: the handle that other tests hold on it does what it says."""

from __future__ import annotations

import pytest

from lab import topology
from lab.capture import Capture
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, LabError, poll

pytestmark = pytest.mark.kernel

FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*"]
PLAIN = """\
workspace: plain
guard: enforce
members: [user:{user}]
allow:
  - host: plain.test
    ports: [80/tcp]
    verify: address
"""


def test_it_starts_with_every_process_of_its_own(daemon: Daemon) -> None:
    assert daemon.pids().keys() >= {"supervisor", "warden", "controller", "resolver", "relay", "auditor"}
    assert len(set(daemon.pids().values())) == len(daemon.pids())


def test_what_is_listed_works_and_nothing_else(daemon: Daemon, internet: Internet, uplink: Capture) -> None:
    daemon.policy("plain", PLAIN.format(user=daemon.lab.user))
    for family in ("-4", "-6"):
        result = daemon.sandbox("plain", [*FETCH, family, "http://plain.test/"])
        assert (result.status, result.out.startswith("plain.test at ")) == (0, True), result.err
    began = uplink.settle()
    for url in (
        "http://evil.test/",
        f"http://{topology.EVIL4}/",
        f"http://[{topology.EVIL6}]/",
        "http://plain.test:81/",
    ):
        result = daemon.sandbox("plain", [*FETCH, url])
        assert result.status in (6, 7), result  # curl(1): could not resolve; could not connect
    uplink.assert_nothing_to(topology.EVIL4, topology.EVIL6, since=began)
    assert {entry.address for entry in internet.seen(port=80)} == {str(topology.PLAIN4), str(topology.PLAIN6)}
    assert sum(packets for packets, _ in daemon.counters("plain")["denied"].values()) > 0


def test_a_policy_can_be_taken_away(daemon: Daemon) -> None:
    daemon.policy("brief", PLAIN.format(user=daemon.lab.user).replace("plain\n", "brief\n", 1))
    assert daemon.sandbox("brief", ["true"]).status == 0
    daemon.policy("brief", None)
    refused = daemon.sandbox("brief", ["true"])
    assert refused.status == 125
    assert "brief" in refused.err


def test_a_broken_policy_is_told(daemon: Daemon) -> None:
    with pytest.raises(LabError, match="policy apply"):
        daemon.policy("broken", "workspace: broken\nallow: [{host: '*'}]\n")
    daemon.policy("broken", None)


def test_who_is_no_member_gets_no_sandbox(daemon: Daemon) -> None:
    if daemon.lab.single_user:
        pytest.skip("there is one user only")
    assert daemon.sandbox("acme", ["true"], uid=4999).status == 125


def test_a_sandbox_can_be_looked_into(daemon: Daemon) -> None:
    sandbox = daemon.start_sandbox("acme", ["sleep", "60"])
    poll(lambda: daemon.lab.links(daemon.namespace_of(sandbox)).keys() == {"lo", "eth0"}, what="its link")
    sandbox.kill()


def test_a_daemon_that_cannot_start_says_why_and_leaves_nothing(lab: Lab, no_leaks: None) -> None:
    with pytest.raises(LabError, match="upstream_port"):
        Daemon(lab, gateway="other", upstream_port=53).start()
