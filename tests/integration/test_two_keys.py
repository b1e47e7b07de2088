"""Two keys: whoever takes one away, or both, takes the network from the sandboxes and gives them nothing.

Each key is taken with the warden stopped, so that nothing is mended while we look; then the warden goes on,
and must notice and mend within a second.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from integration.chatter import MARKER as CHATTER
from integration.chatter import Chatter
from integration.probe import Resident
from lab import topology as t
from lab.machine import poll

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp, 443/udp], verify: address}
  - {cidr: 10.20.0.0/24, ports: [7/tcp]}
  - {cidr: fd20:20::/64, ports: [7/tcp]}
  - local: ollama
"""
FLOWS = [
    "tcp4 plain.test 7", "tcp6 plain.test 7", "udp4 plain.test 443", "udp6 plain.test 443",
    f"tcp4 {t.DB4} 7", f"tcp6 {t.DB6} 7",
]  # fmt: skip
MARKER = "two-keys-91c4"
NFT = ["nft", "flush", "ruleset"]
RULES = [["ip", family, "rule", "flush"] for family in ("-4", "-6")]
HOST_SERVICES = [
    ("tcp", address, port, MARKER)
    for address in (
        str(t.HOST4),
        str(t.HOST6),
        "169.254.54.1",
        "fd53:2::1",
        "169.254.53.53",
        "fd53:53::53",
        "fe80::53%eth0",
    )
    for port in t.SECRET_PORTS
]
ELSEWHERE = [("tcp", str(t.EVIL4), 7, MARKER), ("tcp", str(t.EVIL6), 7, MARKER)]


@pytest.fixture
def daemon(start_daemon: Any, internet: Any, host_services: Any) -> Any:
    return start_daemon(policies={"acme": POLICY})


@contextmanager
def stopped(daemon: Any, name: str) -> Iterator[None]:
    pid = daemon.pids()[name]
    daemon.lab.signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.lab.signal(pid, signal.SIGCONT)


def in_gateway(daemon: Any, *commands: list[str]) -> None:
    for command in commands:
        daemon.lab.run(command, where=daemon.gateway).check()


def works(resident: Resident) -> bool:
    return resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"


@pytest.mark.parametrize("taken", [[NFT], RULES, [NFT, *RULES]], ids=["nft", "rules", "both"])
def test_without_a_key_nothing_leaves_and_the_host_does_not_answer(
    daemon: Any, uplink: Any, taken: list[list[str]]
) -> None:
    with Chatter(daemon, FLOWS) as chatter:
        with stopped(daemon, "warden"):
            in_gateway(daemon, *taken)
            since = uplink.settle()
            for flow in FLOWS:
                chatter.wait_for_failure(flow, timeout=20)
            frames = [f for f in uplink.frames(since=since, outgoing=True) if CHATTER.encode() in f.data]
            assert not frames, f"{len(frames)} frames left after the key was gone"
        poll(lambda: daemon.json("status")["alarms"], timeout=5, what="an alarm")
    with Resident(daemon) as resident:
        poll(lambda: works(resident), timeout=5, what="the warden mends")
    assert "tampered" in daemon.log or "changed by" in daemon.log


@pytest.mark.parametrize("taken", [[NFT], RULES, [NFT, *RULES]], ids=["nft", "rules", "both"])
def test_a_sandbox_cannot_reach_the_host_without_keys(
    daemon: Any, uplink: Any, host_services: Any, taken: list[list[str]]
) -> None:
    with Resident(daemon, timeout=0.3) as resident:
        with stopped(daemon, "warden"):
            in_gateway(daemon, *taken)
            since = uplink.settle()
            outcomes = resident.tries(*HOST_SERVICES, *ELSEWHERE)
            assert all(outcome.result != "ok" for outcome in outcomes), outcomes
            uplink.assert_never(MARKER.encode(), since=since)
        assert not [seen for seen in host_services.seen() if MARKER in seen.data]
        poll(lambda: works(resident), timeout=5, what="the warden mends")


@pytest.mark.parametrize("taken", [[NFT], RULES], ids=["nft", "rules"])
def test_the_warden_mends_within_a_second_and_flows_that_are_allowed_go_on(
    daemon: Any, taken: list[list[str]]
) -> None:
    with Resident(daemon, timeout=1.0) as resident:
        in_gateway(daemon, *taken)
        poll(lambda: works(resident), timeout=1, what="the warden mends")
        assert daemon.json("status")["alarms"]
    poll(lambda: daemon.json("status")["balanced"], timeout=5, what="the books balance, or begin anew")


def test_each_rule_alone_is_missed_and_opens_nothing(daemon: Any, uplink: Any) -> None:
    """Every routing rule, one at a time, removed under an open sandbox: nothing new becomes reachable."""
    with Resident(daemon, timeout=0.2) as resident:
        for family in ("-4", "-6"):
            listing = daemon.lab.run(["ip", "-j", family, "rule", "list"], where=daemon.gateway).check().out
            for rule in json.loads(listing):
                with stopped(daemon, "warden"):
                    in_gateway(daemon, ["ip", family, "rule", "del", "pref", str(rule["priority"])])
                    since = uplink.settle()
                    outcomes = resident.tries(*ELSEWHERE, *HOST_SERVICES[:6])
                    assert all(outcome.result != "ok" for outcome in outcomes), (rule, outcomes)
                    uplink.assert_never(MARKER.encode(), since=since)
                poll(lambda: works(resident), timeout=5, what=f"rule {rule['priority']} is back")
