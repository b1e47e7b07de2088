"""What a journal holds of a sandbox, from its opening to the counters after its end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from egressd.ipc import messages
from egressd.sandbox.control import Control
from lab.daemon import Daemon
from lab.machine import poll

pytestmark = pytest.mark.kernel

FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*"]
POLICY = """\
workspace: recorded
guard: enforce
members: [user:{user}]
allow:
  - host: plain.test
    ports: [80/tcp]
    verify: address
"""


def records(daemon: Daemon, *events: str) -> list[dict[str, Any]]:
    """Fields of the records of this workspace, in order, each with its event."""
    lines = [
        json.loads(line)
        for segment in sorted(daemon.lab.path(f"{daemon.directory}/state/journal").glob("*.jsonl"))
        for line in segment.read_text().splitlines()
    ]
    return [
        {"event": line["event"], **line["fields"]}
        for line in lines
        if line["event"] in events and line["fields"].get("workspace") == "recorded"
    ]


def test_a_sandbox_is_on_record_whole(daemon: Daemon) -> None:
    daemon.policy("recorded", POLICY.format(user=daemon.lab.user))
    assert daemon.sandbox("recorded", [*FETCH, "http://plain.test/"]).status == 0
    assert daemon.sandbox("recorded", [*FETCH, "http://evil.test/"]).status == 6
    closed = poll(lambda: records(daemon, "sandbox-closed")[1:] and records(daemon, "sandbox-closed"))
    opened = records(daemon, "sandbox-opening")
    assert [o["link"] for o in opened] == [c["link"] for c in closed]
    assert [c["exit"] for c in closed] == [0, 6] and all(c["max_rss"] > 1 << 20 for c in closed)
    digests = {o["command_digest"] for o in opened}
    assert len(digests) == 2 and all(digest.startswith("sha256:") for digest in digests)
    policies = {o["policy"] for o in opened} | {records(daemon, "policy-changed")[-1]["policy"]}
    assert len(policies) == 1


def test_the_ruleset_that_egressd_made_is_no_drift_and_status_says_so(daemon: Daemon) -> None:
    daemon.policy("recorded", POLICY.format(user=daemon.lab.user))
    status = daemon.json("status")
    assert status["drift"] == [] and status["drift_read"] is not None
    assert daemon.ctl("status").status == 0, daemon.ctl("status").out


def test_a_change_of_policy_is_a_snapshot_and_a_proof_is_another(daemon: Daemon) -> None:
    daemon.policy("recorded", POLICY.format(user=daemon.lab.user))
    assert daemon.sandbox("recorded", [*FETCH, "http://plain.test/"]).status == 0
    poll(lambda: records(daemon, "snapshot"))
    with Control(f"/proc/{daemon.lab.keeper_pid}/root{daemon.run_dir}") as control:
        envelope = control._answer(messages.Prove(workspace="recorded"))
    assert envelope["payloadType"] == "application/vnd.in-toto+json" and envelope["signatures"]
    last = records(daemon, "snapshot")[-1]
    counters = daemon.counters("recorded")
    (row,) = [r for r in counters["hosts"] if r["host"] == "plain.test"]
    rows = [r for r in records(daemon, "counted") if r.get("host") == "plain.test"]
    assert [rows[-1]["out_packets"], rows[-1]["out_bytes"]] == row["out"] and row["out"][0] > 0
    assert rows[-1]["addresses"].split() == row["addresses"]
    assert [last["in_packets"], last["in_bytes"]] == counters["balance"]["in"] and last["balanced"]
