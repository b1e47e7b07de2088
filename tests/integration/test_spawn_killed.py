"""The broker killed by SIGKILL at any moment, the real daemon on the other side: no command without its gate,
no process, no link, no rule, no element, no lease; and what ran is gone within a second."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from integration.probe import Resident
from lab.machine import VENV, LabError, poll

VICTIM = Path(__file__).resolve().parent.parent / "sandbox" / "victim.py"
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp, 443/udp], verify: address}
  - local: ollama
limits: {egress_bytes: 1MiB, connections: 20}
"""
# Children in sessions of their own that no signal but one ends.
STUBBORN = """
import os, signal, time
for number in range(1, 65):
    if number not in (9, 19, 32, 33):
        signal.signal(number, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            break
print("up", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


def traces(daemon: Any) -> list[str]:
    """Whatever of a sandbox is still there."""
    text = re.sub(r"comment \"[^\"]*\"", "", daemon.json("ruleset")["text"])
    found = [line.strip() for line in text.splitlines() if re.search(r"\beg[0-9]+", line)]
    found += [name for name in daemon.lab.links(daemon.gateway) if name.startswith("eg")]
    found += [f"lease {s['link']}" for s in daemon.json("status")["sandboxes"]]
    processes = daemon.lab.processes().values()
    return found + [words for words in processes if "bwrap" in words or "egressctl" in words]


def assert_nothing_left(daemon: Any) -> None:
    try:
        poll(lambda: not traces(daemon), timeout=2.0, what="nothing is left")
    except LabError as error:
        raise LabError(f"{error}; but there are {traces(daemon)}") from None
    account = daemon.counters("acme")
    assert account["balance"]["balanced"], account["balance"]


def kill(daemon: Any, times: int, seed: str) -> dict[str, Any]:
    """The Python interface, killed while it starts a sandbox."""
    argv = [str(VENV / "bin" / "python"), str(VICTIM), daemon.run_dir, "acme", str(times), "0", seed]
    found: dict[str, Any] = json.loads(
        daemon.lab.run(argv, uid=daemon.lab.user, timeout=60 + times).check().out
    )
    assert found["ran though closed"] == 0, found
    assert found["survivors"] == [], found
    assert_nothing_left(daemon)
    return found


def test_60_kills_of_the_python_interface(daemon: Any) -> None:
    found = kill(daemon, 60, "sixty")
    assert found["opened"] > 3 and found["closed"] > 3, f"the moments do not cover the spawn: {found}"


@pytest.mark.slow
def test_500_kills_of_the_python_interface(daemon: Any) -> None:
    kill(daemon, 500, "five hundred")


def kill_programs(daemon: Any, times: int, seed: str) -> int:
    """`egressctl run`, killed; how many commands had begun."""
    moments = random.Random(seed)
    began = 0
    for _ in range(times):
        process = daemon.start_sandbox("acme", ["/bin/sh", "-c", "echo ran; exec sleep 1000"])
        time.sleep(moments.uniform(0, 0.3))
        process.kill(group=False)
        began += "ran" in process.out
    assert_nothing_left(daemon)
    return began


def test_30_kills_of_the_program(daemon: Any) -> None:
    assert 0 < kill_programs(daemon, 30, "thirty") < 30


@pytest.mark.slow
def test_500_kills_of_the_program(daemon: Any) -> None:
    kill_programs(daemon, 500, "five hundred")


def test_two_at_a_time_and_the_daemon_spawns_on(daemon: Any) -> None:
    """While brokers die, others get their sandboxes."""
    moments = random.Random("two")
    with Resident(daemon) as resident:
        for _ in range(10):
            dying = [daemon.start_sandbox("acme", ["/bin/sleep", "1000"]) for _ in range(3)]
            time.sleep(moments.uniform(0, 0.25))
            for process in dying:
                process.kill(group=False)
            assert resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
    assert daemon.sandbox("acme", ["/bin/true"]).status == 0
    assert_nothing_left(daemon)


def test_a_killed_brokers_sandbox_is_gone_within_a_second(daemon: Any) -> None:
    """Processes, link, rules and elements; the worst of ten is told."""
    worst = 0.0
    for _ in range(10):
        process = daemon.start_sandbox("acme", ["/usr/bin/python3", "-I", "-c", STUBBORN])
        poll(lambda p=process: p.out.count("up") >= 1, what="it runs")
        began = time.monotonic()
        process.signal(signal.SIGKILL)
        poll(
            lambda: not daemon.lab.links(daemon.gateway).keys() & {f"eg{n}" for n in range(1, 2000)},
            timeout=1.0,
        )
        poll(lambda: not traces(daemon), timeout=1.0, what="nothing is left")
        worst = max(worst, time.monotonic() - began)
        process.wait()
    print(f"gone after at most {worst * 1000:.0f} ms, as seen by asking the daemon")
    assert worst < 1.0
