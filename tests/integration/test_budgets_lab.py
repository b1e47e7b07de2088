"""What one sandbox alone is held to, with everything real: a number of connections that it may ever open, and
no network at all. Its broker asks what was used before it gives the sandbox up."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration import inside
from integration import probe as probing
from lab.machine import VENV, poll

POLICY = """
workspace: {name}
guard: {guard}
members: [user:4001]
allow:
  - {{host: plain.test, ports: [7/tcp, 443/udp], verify: address}}
  - {{host: eu.api.openai.com}}
limits: {limits}
"""
# A broker: runs a program, and says how it ended and what the kernel says it has used, once the last process
# of the sandbox is gone.
BROKER = """
import json, sys
from egressd.sandbox import launch
wish, run_dir = json.loads(sys.argv[1]), sys.argv[2]
wish = launch.Wish(run_dir=run_dir, **{k: tuple(v) if isinstance(v, list) else v for k, v in wish.items()})
running = launch.start(wish, stdio=(0, 1, 2))
spent = []
control, closing = running.control, running.control.close
def close():
    spent.append(control.spent())
    closing()
control.close = close
outcome = running.watch()
[last] = spent
print()
print(json.dumps([outcome.status, running.link, last.counters, last.spent]))
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(
        policies={
            "acme": POLICY.format(name="acme", guard="enforce", limits="{}"),
            "open": POLICY.format(name="open", guard="off", limits="{egress_bytes: 4KiB}"),
        }
    )


# Takes nothing; once it is answered both ends of the link are up for certain, and no answer gets lost.
WARM = ("resolve", "plain.test")


@dataclass(frozen=True)
class Run:
    results: list[str]
    link: int
    counters: dict[str, list[int]]
    spent: list[str]


def program(connections: int) -> str:
    """The prober, from ports that nobody else uses and that are never used twice: where the far end still has
    a connection of a sandbox that is gone, a SYN from there is sent again (RFC 5961 4.2), and two count."""
    text = Path(probing.__file__).read_text()
    plain, bound = "(host, port), timeout=TIMEOUT)", '(host, port), TIMEOUT, ("", PORTS.pop()))'
    assert plain in text
    ports = [next(_ports) for _ in range(connections)]
    return text.replace(plain, bound).replace("\nTIMEOUT = ", f"\nPORTS = {ports}\nTIMEOUT = ")


_ports = itertools.count(61_000)  # above what the kernel picks itself (ip_local_port_range)


def run(daemon: Any, attempts: list[tuple[Any, ...]], *, workspace: str = "acme", **bounds: Any) -> Run:
    wish = {
        "workspace": workspace,
        "command": ["/usr/bin/python3", "-I", "-c", program(len(attempts)), json.dumps(attempts)],
        **bounds,
    }
    argv = [str(VENV / "bin/python"), "-I", "-c", BROKER, json.dumps(wish), daemon.run_dir]
    done = daemon.lab.run(argv, uid=daemon.lab.user).check()
    said, told = (json.loads(line) for line in done.out.splitlines() if line)
    status, link, counters, spent = told
    assert status == 0, done
    assert [sum(counters[part][n] for part in ("ok", "denied", "other")) for n in (0, 1)] == counters["in"]
    return Run([result for result, _, _ in said], link, counters, spent)


def closed_record(daemon: Any, link: int) -> dict[str, Any]:
    def found() -> Any:
        lines = daemon.ctl("--json", "audit", "--event", "sandbox-closed").out.splitlines()
        records = [json.loads(line) for line in lines]
        return next((r["fields"] for r in records if r["fields"]["link"] == f"eg{link}"), None)

    record: dict[str, Any] = poll(found)
    return record


def four_and_six(daemon: Any) -> tuple[str, str]:
    with probing.Resident(daemon) as resident:
        found = resident.tries(*(("resolve", "plain.test", family) for family in "46"))
    return found[0].data, found[1].data


def test_as_many_connections_as_it_may_open_and_then_none(daemon: Any) -> None:
    four, six = four_and_six(daemon)
    before = inside.counters(daemon)["late"]["budget-connections"][0]
    attempts = [("tcp", at, 7, "x") for at in (four, six) * 3]
    told = run(daemon, [WARM, *attempts, ("udp", four, 443, "x"), ("resolve", "plain.test")], connections=4)
    assert told.results == ["ok"] * 5 + ["ECONNREFUSED"] * 2 + ["ok", "ok"]
    assert told.spent == ["connections"]
    counts = inside.counters(daemon)
    assert counts["late"]["budget-connections"][0] - before == 2
    assert counts["balance"]["balanced"], counts["balance"]
    record = closed_record(daemon, told.link)
    for part, (packets, octets) in told.counters.items():
        assert (record[f"{part}_packets"], record[f"{part}_bytes"]) == (packets, octets), (
            "no packet came after"
        )


def test_what_is_just_enough_is_not_spent(daemon: Any) -> None:
    four, _ = four_and_six(daemon)
    told = run(daemon, [WARM, *[("tcp", four, 7, "x")] * 3], connections=3)
    assert (told.results, told.spent) == (["ok"] * 4, [])


@pytest.mark.parametrize("workspace", ["acme", "open"])
def test_without_a_network_nothing_is_admitted_and_nothing_waits(daemon: Any, workspace: str) -> None:
    four, six = four_and_six(daemon)
    attempts = [
        ("ask", "169.254.53.53", "plain.test"), ("ask", "fd53:53::53", "plain.test"),
        ("tcp", "169.254.53.53", 53), ("udp", four, 443), ("udp", six, 443),
        *(("tcp", at, port) for at in (four, six) for port in (7, 443)),
    ]  # fmt: skip
    told = run(daemon, [*attempts, ("resolve", "plain.test")], workspace=workspace, closed=True)
    assert set(told.results[:-1]) == {"ECONNREFUSED"} and told.results[-1].startswith("EAI_"), told
    assert told.counters["ok"] == [0, 0] and told.counters["denied"][0] >= len(attempts) + 1
    assert told.spent == []
    counts = inside.counters(daemon, workspace)
    assert counts["denied"]["closed"][0] >= told.counters["denied"][0]
    assert counts["balance"]["balanced"], counts["balance"]


def test_denials_of_a_closed_sandbox_are_on_record_with_their_reason(daemon: Any) -> None:
    told = run(daemon, [("tcp", "203.0.113.5", 80)], closed=True)
    poll(
        lambda: [
            record
            for line in daemon.ctl("--json", "audit", "--event", "denied").out.splitlines()
            if (record := json.loads(line)["fields"])["link"] == f"eg{told.link}"
            and (record["reason"], record["destination"], record["port"]) == ("closed", "203.0.113.5", 80)
        ]
    )


def test_the_lower_of_two_bounds_of_bytes_holds(daemon: Any) -> None:
    attempts = [("udp", "203.0.113.5", 9, "x" * 1000)]
    for asked, spent in ((500, ["quota"]), (60_000, []), (1 << 40, [])):
        told = run(daemon, attempts, workspace="acme", quota=asked)
        assert told.spent == spent
    many = [("ask", "169.254.53.53", "plain.test")] * 100
    assert run(daemon, many, workspace="open", quota=1 << 40).spent == ["quota"], "4 KiB by the policy"
