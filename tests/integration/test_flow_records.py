"""What the journal says of a sandbox when it has ended, against the kernel's counters: every flow under its
name, to the byte, and of what was refused the exact total."""

from __future__ import annotations

import json
from typing import Any

import pytest

from integration.probe import probe
from lab.machine import poll
from lab.scale import scaled

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: eu.api.openai.test}
  - local: ollama
"""
STORM = """
import socket, sys
count = int(sys.argv[1])
four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
for i in range(count):
    sock, where = (six, "2001:db8:dead::1") if i & 1 else (four, "203.0.113.77")
    while True:
        try:
            sock.sendto(b"x" * 32, (where, 53))
            break
        except OSError:  # the refusal of an earlier one
            pass
print(count)
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    found = start_module_daemon(policies={"acme": POLICY})
    found.opened = len(records(found))  # what the lab's earlier daemons wrote stays in the journal
    return found


def records(daemon: Any) -> list[dict[str, Any]]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines[getattr(daemon, "opened", 0) :]]


def of(daemon: Any, event: str, link: str | None = None) -> list[dict[str, Any]]:
    return [
        record["fields"]
        for record in records(daemon)
        if record["event"] == event and (link is None or record["fields"]["link"] == link)
    ]


def ended(daemon: Any, before: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`sandbox-closed` and `link-flows` of the one sandbox that ended since."""
    poll(lambda: len(of(daemon, "link-flows")) > before, timeout=10, what="link-flows")
    flows = of(daemon, "link-flows")[-1]
    [closed] = of(daemon, "sandbox-closed", flows["link"])
    return closed, flows


def test_every_flow_is_recorded_under_its_name_to_the_byte(daemon: Any, host_services: Any) -> None:
    before = len(of(daemon, "link-flows"))
    attempts = [("tcp", "plain.test", 7, "hello"), ("tcp", "127.0.0.1", 11434, "GET / HTTP/1.0\r\n\r\n")]
    outcomes = probe(daemon, attempts)
    assert [o.result for o in outcomes] == ["ok", "ok"], outcomes
    curl = daemon.sandbox("acme", ["curl", "-sSk", "-o", "/dev/null", "https://eu.api.openai.test/"])
    poll(lambda: len(of(daemon, "link-flows")) == before + 2, timeout=10)
    both = of(daemon, "link-flows")[before:]
    for flows in both:
        link = flows["link"]
        [closed] = of(daemon, "sandbox-closed", link)
        own = of(daemon, "flow", link)
        assert "partial" not in flows
        assert (flows["ok_packets"], flows["ok_bytes"]) == (closed["ok_packets"], closed["ok_bytes"])
        assert (flows["unrecorded_packets"], flows["unrecorded_bytes"]) == (0, 0), flows
        summed = sum(f["out_packets"] for f in own), sum(f["out_bytes"] for f in own)
        asked = flows["question_packets"], flows["question_bytes"]
        assert (summed[0] + asked[0], summed[1] + asked[1]) == (flows["out_packets"], flows["out_bytes"])
        assert flows["questions"] > 0
    kinds = {(f["kind"], f["host"]) for flows in both for f in of(daemon, "flow", flows["link"])}
    assert {("host", "plain.test"), ("local", "ollama")} <= kinds
    assert ("read", "eu.api.openai.test") in kinds, curl
    assert curl.status == 0, curl
    dialled = [f for f in of(daemon, "flow") if f["kind"] == "dialled"]
    # the inspector's half lingers in TIME_WAIT; it is told of when that is over, or when the daemon ends
    assert all(f["host"] == "eu.api.openai.test" and f["link"] is None for f in dialled)


def weather(daemon: Any, count: int) -> None:
    before = len(of(daemon, "link-flows"))
    result = daemon.sandbox("acme", ["/usr/bin/python3", "-I", "-c", STORM, str(count)], timeout=300).check()
    assert result.out.strip() == str(count)
    closed, flows = ended(daemon, before)
    octets = count // 2 * (60 + 80)
    assert (closed["denied_packets"], closed["denied_bytes"]) == (count, octets)
    assert (closed["in_packets"], closed["in_bytes"]) == (count, octets)
    assert (flows["ok_packets"], flows["unrecorded_packets"], flows["flows"]) == (0, 0, 0)
    where = {"203.0.113.77", "2001:db8:dead::1"}
    poll(lambda: {f["destination"] for f in of(daemon, "denied", closed["link"])} == where, timeout=5)
    denied = of(daemon, "denied", closed["link"])
    assert 0 < sum(f["packets"] for f in denied) <= count
    assert daemon.counters("acme")["balance"]["balanced"]


def test_a_storm_of_denials_ends_with_its_exact_total(daemon: Any) -> None:
    weather(daemon, 10_000)


@pytest.mark.slow
def test_a_million_denials_end_with_their_exact_total(daemon: Any) -> None:
    weather(daemon, scaled(1_000_000, least=20_000) // 2 * 2)
