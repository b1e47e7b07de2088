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
from lab.scale import scaled

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
# What `traces` sees of a sandbox that runs.
KINDS = {"egressctl", "bwrap", "lease ", "chain eg", "counter eg", "quota eg"}
COMMAND = ["/bin/sh", "-c", "echo ran; exec sleep 1000"]
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
    """Whatever of a sandbox is still there. Looks without starting anything, and is itself done in a few
    milliseconds, so that the time it is asked for is not its own."""
    processes = daemon.lab.processes().values()
    found = [words for words in processes if "bwrap" in words or "egressctl" in words]
    found += daemon.sandbox_links()
    found += [f"lease {s['link']}" for s in daemon.ask("status")["sandboxes"]]
    text = re.sub(r"comment \"[^\"]*\"", "", daemon.ask("ruleset")["text"])
    return found + [line.strip() for line in text.splitlines() if re.search(r"\beg[0-9]+", line)]


def gone(daemon: Any, *, within: float, when: str = "") -> float:
    """Seconds until no trace is left; LabError naming what is."""
    began = time.monotonic()
    try:
        poll(lambda: not traces(daemon), timeout=within, what=f"nothing is left {when}")
    except LabError as error:
        raise LabError(f"{error}; but there are {traces(daemon)}") from None
    return time.monotonic() - began


def assert_nothing_left(daemon: Any) -> None:
    gone(daemon, within=2.0)
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
    kill(daemon, scaled(500, least=30), "five hundred")


def usual(daemon: Any) -> float:
    """Seconds from the start of egressctl to the command's first word, here and now: the middle of five."""
    spent = []
    for _ in range(5):
        began = time.monotonic()
        process = daemon.start_sandbox("acme", COMMAND)
        poll(lambda p=process: "ran" in p.out, what="it runs")
        spent.append(time.monotonic() - began)
        process.kill(group=False)
    return sorted(spent)[2]


def kill_programs(daemon: Any, times: int, seed: str) -> int:
    """`egressctl run`, killed; how many commands had begun. Looked for after each, or what is left for
    seconds would be seen only if it was one of the last."""
    moments = random.Random(seed)
    most = 1.5 * usual(daemon)
    began = 0
    for number in range(times):
        process = daemon.start_sandbox("acme", COMMAND)
        moment = moments.uniform(0, most)
        time.sleep(moment)
        process.kill(group=False)
        began += "ran" in process.out
        gone(daemon, within=2.0, when=f"of number {number}, killed after {moment:.3f} s")
    assert_nothing_left(daemon)
    return began


def test_30_kills_of_the_program(daemon: Any) -> None:
    assert 0 < kill_programs(daemon, 30, "thirty") < 30


@pytest.mark.slow
def test_500_kills_of_the_program(daemon: Any) -> None:
    kill_programs(daemon, scaled(500, least=30), "five hundred")


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
        before = traces(daemon)
        assert {kind for kind in KINDS if any(kind in trace for trace in before)} == KINDS, before
        assert daemon.sandbox_links()
        process.signal(signal.SIGKILL)
        worst = max(worst, gone(daemon, within=1.0))
        process.wait()
    print(f"gone after at most {worst * 1000:.0f} ms, as seen by asking the daemon")
    assert worst < 1.0
