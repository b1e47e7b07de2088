"""From a sandbox's first packet to a file that somebody else checks: all of egressd, in the lab."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from lab.daemon import Daemon

pytestmark = pytest.mark.kernel

FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*"]
POLICY = """\
workspace: witness
guard: enforce
members: [user:{user}]
allow:
  - host: plain.test
    ports: [80/tcp]
    verify: address
"""
BYSTANDER = "bystander"


@pytest.fixture(scope="module")
def proved(daemon: Daemon) -> Iterator[Daemon]:
    daemon.policy("witness", POLICY.format(user=daemon.lab.user))
    daemon.policy(BYSTANDER, POLICY.format(user=daemon.lab.user).replace("witness", BYSTANDER))
    yield daemon
    daemon.policy("witness", None)
    daemon.policy(BYSTANDER, None)


def test_a_receipt_says_what_one_run_did(proved: Daemon, place: Path) -> None:
    fetch = "curl -sS --max-time 5 --noproxy '*'"
    allowed = f"{fetch} -4 http://plain.test/; {fetch} -6 http://plain.test/"
    refused = f"{fetch} http://{topology.EVIL4}/; {fetch} -g 'http://[{topology.EVIL6}]/'"
    script = f"{allowed}; {refused}; exit 4"
    options = ["--receipt", str(place / "receipt")]
    done = proved.sandbox("witness", ["sh", "-c", script], *options)
    assert done.status == 4, done.err
    key = proved.json("key", "show")["key"]
    checked = proved.ctl("--json", "verify", str(place / "receipt"), "--key", key)
    found = json.loads(checked.out)
    assert checked.status == 0, [c for c in found["checks"] if c["verdict"] == "broken"]
    assert found["pinned"]
    summary = found["statement"]["summary"]
    (sandbox,) = summary["sandboxes"]
    assert sandbox["exit"] == 4
    assert sandbox["totals"]["denied_packets"] > 0
    assert sandbox["balanced"]
    flows = {(flow["host"], flow["address"]): flow for flow in summary["flows"]}
    assert flows.keys() == {("plain.test", str(topology.PLAIN4)), ("plain.test", str(topology.PLAIN6))}
    assert all(flow["flows"] == 1 and flow["in_bytes"] > 0 for flow in flows.values())
    tried = {attempt["destination"] for attempt in summary["attempts"]}
    assert tried == {str(topology.EVIL4), str(topology.EVIL6)}


DENIED_AT_LAST = """\
import socket, sys
for family, address in ((socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2])):
    for kind, port in ((socket.SOCK_STREAM, 25), (socket.SOCK_DGRAM, 123)):
        with socket.socket(family, kind) as sock:
            sock.settimeout(5)
            try:
                sock.connect((address, port))
                sock.send(b"x")
                sock.recv(1)
            except ConnectionRefusedError:
                continue
            sys.exit("not refused")
try:
    socket.getaddrinfo("elsewhere.test", 80)
except socket.gaierror:
    sys.exit()
sys.exit("resolved")
"""


def test_a_receipt_holds_what_was_tried_last(proved: Daemon, place: Path) -> None:
    """The command ends with what is denied, and nobody waits after it."""
    tried = ["/usr/bin/python3", "-c", DENIED_AT_LAST, str(topology.EVIL4), str(topology.EVIL6)]
    done = proved.sandbox("witness", tried, "--receipt", str(place / "receipt"))
    assert done.status == 0, done.err
    checked = proved.ctl("--json", "verify", str(place / "receipt"))
    summary = json.loads(checked.out)["statement"]["summary"]
    assert checked.status == 0
    attempts = {(a["destination"], a["protocol"], a["port"]): a["times"] for a in summary["attempts"]}
    assert attempts == {
        (str(topology.EVIL4), "tcp", 25): 1,
        (str(topology.EVIL4), "udp", 123): 1,
        (str(topology.EVIL6), "tcp", 25): 1,
        (str(topology.EVIL6), "udp", 123): 1,
        ("elsewhere.test", "A", None): 1,
        ("elsewhere.test", "AAAA", None): 1,
    }
    (sandbox,) = summary["sandboxes"]
    assert sandbox["totals"]["denied_packets"] == 4
    assert sandbox["flow_books"] is not None and not sandbox["flow_books"]["partial"]


def test_a_proof_says_what_the_workspace_did_and_nothing_of_others(proved: Daemon, place: Path) -> None:
    assert proved.sandbox(BYSTANDER, [*FETCH, "http://plain.test/"]).status == 0
    assert proved.sandbox("witness", [*FETCH, "http://plain.test/"]).status == 0
    file = place / "witness.proof"
    made = proved.ctl("proof", "-w", "witness", "-o", str(file), "--html", str(place / "page.html"))
    assert made.status == 0, made.out + made.err
    (place / "witness.yaml").write_text(POLICY.format(user=proved.lab.user))
    checked = proved.ctl("--json", "verify", str(file), "--policy", str(place / "witness.yaml"))
    found = json.loads(checked.out)
    assert checked.status == 0, found["checks"]
    counted = {h["host"]: h["counted"] for h in found["statement"]["summary"]["hosts"]}
    now = {h["host"]: h["out"] for h in proved.counters("witness")["hosts"]}
    assert [counted["plain.test"]["out_packets"], counted["plain.test"]["out_bytes"]] == now["plain.test"]
    assert BYSTANDER not in json.dumps(found["statement"])
    assert "plain.test" in (place / "page.html").read_text()


def test_who_is_no_member_gets_no_proof(proved: Daemon, place: Path) -> None:
    done = proved.ctl("proof", "-w", "witness", "-o", str(place / "x"), uid=4999)
    assert done.status == 125
    assert not (place / "x").exists()


def test_the_journal_itself_holds_and_goes_on_under_another_key(proved: Daemon, place: Path) -> None:
    journal = proved.lab.inside(f"{proved.directory}/state/journal")
    first = proved.json("key", "show")["key"]
    kept = str(place / "earlier")
    proved.ctl("proof", "-w", "witness", "-o", kept).check()
    changed = proved.json("key", "rotate")["key"]
    assert changed != first
    assert proved.sandbox("witness", ["true"]).status == 0
    made = proved.ctl("proof", "-w", "witness", "-o", str(place / "proof"), "--checkpoint", kept)
    assert made.status == 0, made.err
    for key in (first, changed):
        checked = proved.ctl("verify", str(place / "proof"), "--key", key, "--checkpoint", kept)
        assert checked.status == 0, checked.out
    checked = proved.ctl("--json", "verify", "--journal", journal, "--key", first)
    assert checked.status == 0, checked.out + checked.err
    assert json.loads(checked.out)["checkpoints"] > 0
