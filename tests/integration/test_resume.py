"""The controller is killed, and sandboxes go on: what is kept, who may come back for it, and what is cut."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from integration.chatter import Chatter
from integration.probe import Resident
from integration.test_attack_control import PRELUDE
from lab.machine import VENV, LabError, poll

MEMBER, OTHER = 4001, 4002
FLOWS = ["tcp4 plain.test 7", "tcp6 plain.test 7"]
WILD = ["tcp4 a.search.test 7", "tcp6 a.search.test 7"]
POLICY = """
workspace: acme
guard: enforce
members: [user:4001, user:4002]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: "*.search.test", ports: [7/tcp], verify: address}
  - {host: one.cdn.test, ports: [7/tcp], verify: address}
"""
WITHOUT = "\n".join(line for line in POLICY.splitlines() if "one.cdn.test" not in line)


@pytest.fixture(scope="module")
def running_daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


@pytest.fixture
def daemon(running_daemon: Any) -> Iterator[Any]:
    poll(lambda: answers(running_daemon), timeout=10)
    running_daemon.policy("acme", POLICY)
    running_daemon.before = len(journal(running_daemon))
    yield running_daemon
    poll(lambda: answers(running_daemon), timeout=10)
    poll(lambda: not running_daemon.ask("status")["sandboxes"], timeout=25, what="no lease is left")
    assert not list(leases(running_daemon))
    poll(lambda: running_daemon.sandbox_links() == [], what="devices are gone, a moment after their lease")


def answers(daemon: Any) -> bool:
    with contextlib.suppress(LabError, OSError, Exception):
        states = {each["name"]: each["state"] for each in daemon.ask("status")["processes"]}
        return all(states[name] == "running" for name in ("controller", "warden", "resolver", "auditor"))
    return False


def journal(daemon: Any) -> list[dict[str, Any]]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def records(daemon: Any, event: str) -> list[dict[str, Any]]:
    return [record["fields"] for record in journal(daemon)[daemon.before :] if record["event"] == event]


def leases(daemon: Any) -> Iterator[str]:
    result = daemon.lab.run(["ls", f"{daemon.run_dir}/controller/leases"])
    return (line for line in result.out.split() if line)


def kill(daemon: Any, name: str = "controller") -> None:
    """Returns when another one is at work."""
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get(name, before) != before, timeout=10, what=f"another {name}")
    poll(lambda: answers(daemon), timeout=10, what="all are there again")


def resumed(daemon: Any, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = poll(
        lambda: len(records(daemon, "sandbox-resumed")) >= count and records(daemon, "sandbox-resumed"),
        timeout=15,
        what=f"{count} sandboxes are resumed",
    )
    return found


def balanced(daemon: Any) -> dict[str, Any]:
    account: dict[str, Any] = daemon.counters("acme")
    assert account["balance"]["balanced"], account["balance"]
    return account


# ---- what goes on


def test_streams_to_names_go_on_and_the_books_are_exact(daemon: Any) -> None:
    with Chatter(daemon, FLOWS) as chatter, Chatter(daemon, WILD) as wild:
        before = {each["link"]: each for each in daemon.ask("status")["sandboxes"]}
        counted = balanced(daemon)["balance"]["in"]
        for round in (1, 2):
            kill(daemon)
            assert {each["link"] for each in resumed(daemon, 2 * round)} == {f"eg{n}" for n in before} | {
                link for link in before if isinstance(link, str)
            }
            chatter.go_on()
            wild.go_on()
        assert chatter.events() == wild.events() == []
        assert {each["link"]: each for each in daemon.ask("status")["sandboxes"]} == before
        now = balanced(daemon)["balance"]["in"]
        assert now[0] > counted[0] and now[1] > counted[1]
    opened, over = records(daemon, "sandbox-opening"), poll(
        lambda: len(records(daemon, "sandbox-closed")) == 2 and records(daemon, "sandbox-closed")
    )  # fmt: skip
    assert sorted(each["link"] for each in opened) == sorted(each["link"] for each in over)
    for each in over:
        sums = [
            each["ok_" + unit] + each["denied_" + unit] + each["other_" + unit]
            for unit in ("packets", "bytes")
        ]
        assert sums == [each["in_packets"], each["in_bytes"]]
    assert records(daemon, "sandbox-lost") == records(daemon, "name-released") == []
    balanced(daemon)


def test_addresses_that_a_sandbox_remembers_lead_where_they_led(daemon: Any) -> None:
    with Resident(daemon) as resident:
        names = [("resolve", "plain.test", 4), ("resolve", "a.search.test", 4)]
        addresses = [each.data.split()[0] for each in resident.tries(*names)]
        before = daemon.pids()["controller"]
        daemon.lab.signal(before, signal.SIGKILL)
        tried = resident.tries(*(("tcp", address, 7, "x") for address in addresses))
        assert [each.result for each in tried] == ["ok", "ok"]  # while there is none
        poll(lambda: daemon.pids().get("controller", before) != before, timeout=10)
        poll(lambda: answers(daemon), timeout=10)
        resumed(daemon, 1)
        tried = resident.tries(*(("tcp", address, 7, "x") for address in addresses))
        assert [each.result for each in tried] == ["ok", "ok"]
        again = [each.data.split()[0] for each in resident.tries(*names)]
        assert again == addresses
    balanced(daemon)


def test_a_host_that_was_taken_out_meanwhile_is_cut_and_no_other(daemon: Any) -> None:
    with Chatter(daemon, [*FLOWS, "tcp4 one.cdn.test 7"]) as chatter:
        daemon.write_policy("acme", WITHOUT)
        kill(daemon)
        assert chatter.wait_for_failure("tcp4 one.cdn.test 7")["error"] == "ECONNRESET"
        resumed(daemon, 1)
        before = chatter.beats()
        poll(lambda: all(chatter.beats()[flow] > before[flow] for flow in FLOWS))
        assert [event["flow"] for event in chatter.events()] == ["tcp4 one.cdn.test 7"]
    balanced(daemon)


def test_a_controller_that_is_told_to_leave_ends_no_sandbox(daemon: Any) -> None:
    with Chatter(daemon, FLOWS) as chatter:
        before = daemon.pids()["controller"]
        daemon.lab.signal(before, signal.SIGUSR2)
        poll(lambda: daemon.pids().get("controller", before) != before, timeout=10)
        poll(lambda: answers(daemon), timeout=10)
        resumed(daemon, 1)
        chatter.go_on()
        assert chatter.events() == []
    balanced(daemon)


def test_controller_and_warden_may_die_together(daemon: Any) -> None:
    with Chatter(daemon, [*FLOWS, *WILD]) as chatter:
        pids = daemon.pids()
        for name in ("controller", "warden"):
            daemon.lab.signal(pids[name], signal.SIGKILL)
        poll(lambda: all(daemon.pids().get(n, pids[n]) != pids[n] for n in ("controller", "warden")))
        poll(lambda: answers(daemon), timeout=10)
        resumed(daemon, 1)
        chatter.go_on()
        assert chatter.events() == []
    balanced(daemon)


# ---- who may come back

HOLDER = (
    PRELUDE
    + '''
def ask(what, descriptor, number):
    """What a connection that says Resume is told."""
    channel = Channel(raw(), messages.TO_CLIENT)
    channel.socket.settimeout(20)
    channel.send(messages.Resume(link=number), descriptor=descriptor)
    answer = channel.receive().message
    KEPT.append(channel)
    word = getattr(answer, "reason", getattr(answer, "link", None))
    say([what, type(answer).__name__, word, getattr(answer, "text", "")])

def become(uid):
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)

mine, other, decoy = network(4001), network(4001), network(4002)
reading, writing = os.pipe()
if (thief := os.fork()) == 0:
    become(4002)
    os.close(writing)
    if not (text := os.read(reading, 16)):
        os._exit(0)
    link = int(text)
    ask("another account, its own namespace", decoy, link)
    ask("another account, the namespace itself", mine, link)
    ask("another account, no such link", decoy, 999999)
    os._exit(0)
become(4001)
(_, link), (_, second) = first = attached("acme", mine), attached("acme", other)
say(["attached", link, second])
sys.stdin.readline()
os.write(writing, str(link).encode())
os.waitpid(thief, 0)
ask("another namespace of the account", network(), link)
ask("the namespace of another lease", other, link)
ask("no namespace", os.open("/dev/null", os.O_RDONLY), link)
ask("no such link", mine, 999999)
ask("the holder", mine, link)
ask("the holder again", mine, link)
ask("the other holder", other, second)
say()
time.sleep(20)
'''
)


def told(process: Any, count: int) -> list[list[Any]]:
    def over() -> bool:
        assert process.status() in (None, 0), process.err
        return len(process.out.splitlines()) >= count

    poll(over, timeout=30, what="the attack is over")
    return [json.loads(line) for line in process.out.splitlines()][:count]


def test_a_lease_is_its_accounts_its_namespaces_and_resumed_once(daemon: Any) -> None:
    process = daemon.lab.start([str(VENV / "bin" / "python"), "-I", "-c", HOLDER, daemon.run_dir])
    try:
        _, link, second = told(process, 1)[0]
        kill(daemon)
        process.stdin.write(b"go\n")
        found = told(process, 11)[1:]
        nobodys = ["Refusal", "member"]
        assert [each[:3] for each in found] == [
            ["another account, its own namespace", *nobodys],
            ["another account, the namespace itself", *nobodys],
            ["another account, no such link", *nobodys],
            ["another namespace of the account", "Refusal", "namespace"],
            ["the namespace of another lease", "Refusal", "namespace"],
            ["no namespace", "Refusal", "namespace"],
            ["no such link", *nobodys],
            ["the holder", "Lease", link],
            ["the holder again", *nobodys],
            ["the other holder", "Lease", second],
        ]
        texts = [text.replace(f"eg{link}:", "eg999999:") for *_, text in found]
        assert texts[0] == texts[1] == texts[2]  # who it is not told whether there is one
        assert {each["uid"] for each in resumed(daemon, 2)} == {MEMBER}
        poll(lambda: [r for r in records(daemon, "spawn-refused") if r["uid"] == OTHER], timeout=20)
    finally:
        process.kill()


def test_what_nobody_comes_back_for_is_closed_and_told(daemon: Any) -> None:
    sandbox = Resident(daemon)
    sandbox.tries(("tcp", "plain.test", 7, "x"))
    [lease] = daemon.ask("status")["sandboxes"]
    before = daemon.pids()["controller"]
    daemon.lab.signal(before, signal.SIGSTOP)  # so that it does not see its broker die
    sandbox.process.kill()
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get("controller", before) != before, timeout=10)
    (over,) = poll(lambda: [*records(daemon, "sandbox-lost"), *records(daemon, "sandbox-closed")], timeout=40)
    assert over["link"] in (lease["link"], f"eg{lease['link']}") and over["uid"] == MEMBER
    assert over["why"] in ("nobody came back for it", "its link was gone when it was looked for")
    assert over["ok_packets"] > 0
    balanced(daemon)
