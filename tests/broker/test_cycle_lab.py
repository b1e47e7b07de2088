"""Whole requests against a real egressd: both families, its budgets, its refusals, and its journal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.machine import VENV, poll

pytestmark = pytest.mark.kernel
POLICY = """
workspace: {name}
guard: enforce
members: [user:4001, user:4002]
allow:
  - {{host: plain.test, ports: [7/tcp, 443/udp], verify: address}}
limits: {limits}
"""
HERE = Path(__file__).resolve().parent
CONNECT = """
import socket, sys
def tried(family, number):
    with socket.socket(family) as s:
        s.settimeout(5)
        try:
            s.connect(socket.getaddrinfo("plain.test", 7, family, socket.SOCK_STREAM)[0][4])
            s.sendall(open("/work/docs/a.md", "rb").read())
            return s.recv(100).decode()
        except OSError as error:
            return type(error).__name__
print([tried(family, n) for n in range({times}) for family in (socket.AF_INET, socket.AF_INET6)])
"""


class Service:
    """In the lab, as the account that is both a member and a broker."""

    def __init__(self, daemon: Any, documents: str, *, uid: int | None = None) -> None:
        argv = [str(VENV / "bin" / "python"), str(HERE / "cycle_inside.py"), daemon.run_dir, documents]
        self.daemon, self.process = daemon, daemon.lab.start(argv, uid=uid or daemon.lab.user)
        self._answers = 0

    def ask(self, *command: str, workspace: str = "acme", **more: Any) -> dict[str, Any]:
        wish = {"command": command, "workspace": workspace, **more}
        self.process.stdin.write(json.dumps(wish).encode() + b"\n")
        self._answers += 1
        end = time.monotonic() + 60
        while self.process.out.count("\n") < self._answers:
            assert self.process.status() is None and time.monotonic() < end, self.process.err
            time.sleep(0.005)
        answer: dict[str, Any] = json.loads(self.process.out.splitlines()[self._answers - 1])
        assert answer["left"] == [] and answer["finished"]["destroyed"], answer
        return answer

    def python(self, script: str, **more: Any) -> dict[str, Any]:
        return self.ask("/usr/bin/python3", "-I", "-c", script, **more)

    def records(self, request: str) -> list[dict[str, Any]]:
        """What is in the journal about it, once its end is."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            text = self.daemon.ctl("--json", "audit", "--request", request).check().out
            lines = [json.loads(line) for line in text.splitlines()]
            found[:] = [{"event": line["event"], **line["fields"]} for line in lines]
            return bool(found) and found[-1]["event"] in ("request-ended", "request-refused")

        poll(there, timeout=10, what=f"the journal tells of {request}")
        return found


@pytest.fixture(scope="module")
def service(start_module_daemon: Any) -> Iterator[Service]:
    daemon = start_module_daemon(
        policies={
            "acme": POLICY.format(name="acme", limits="{}"),
            "small": POLICY.format(name="small", limits="{egress_bytes: 2KiB, connections: 3}"),
        },
        brokers=["4001"],
    )
    directory = daemon.lab.path("cycle-documents")
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    (directory / "a.md").write_text("the handbook")
    made = Service(daemon, daemon.lab.inside("cycle-documents"))
    yield made
    made.process.stdin.close()
    made.process.wait(10)


def test_a_whole_cycle_over_both_families(service: Service) -> None:
    answer = service.python(CONNECT.replace("{times}", "1"), documents=["a.md"])
    assert answer["out"].count("the handbook") == 2, json.dumps(answer)
    counters = answer["finished"]["counters"]
    assert counters["ok"][0] > 0 and counters["in"] == [
        counters["ok"][n] + counters["denied"][n] + counters["other"][n] for n in (0, 1)
    ]
    poll(lambda: not service.daemon.sandbox_links(), timeout=5, what="the link goes")


def test_the_journal_tells_what_was_decided_before_it_ran(service: Service) -> None:
    answer = service.ask("sh", "-c", "exit 7", documents=["a.md"], discarded=3, action="summarise")
    records = service.records(answer["request"])
    assert [r["event"] for r in records] == [
        "request-asked", "request-decided", "request-files", "request-ended",
    ]  # fmt: skip
    assert {r["link"] for r in records} == {f"eg{answer['link']}"}, "the daemon's word"
    assert {(r["workspace"], r["broker_uid"]) for r in records} == {("acme", 4001)}
    asked, decided, files, ended = records
    assert (asked["candidates"], asked["discarded"], decided["cleared"]) == (4, 3, 1)
    assert files["files"].startswith("docs:a.md sha256:")
    assert (ended["status"], ended["destroyed"]) == (7, True)


def test_without_a_network_nothing_is_reached_and_all_is_counted(service: Service) -> None:
    answer = service.python(CONNECT.replace("{times}", "1"), documents=["a.md"], network="none")
    assert "the handbook" not in answer["out"] and answer["finished"]["status"] == 0
    counters = answer["finished"]["counters"]
    assert counters["ok"] == [0, 0], "not one packet"


def test_its_connections_are_bounded_and_that_is_named(service: Service) -> None:
    answer = service.python(CONNECT.replace("{times}", "4"), documents=["a.md"], limits={"connections": 3})
    assert answer["out"].count("the handbook") == 3, answer["out"]
    assert answer["finished"]["hit"] == ["connections"], answer["finished"]
    assert service.records(answer["request"])[-1]["hit"] == "connections"


def test_its_bytes_are_bounded_and_that_is_named(service: Service) -> None:
    answer = service.python(CONNECT.replace("{times}", "20"), documents=["a.md"], limits={"egress": 2048})
    assert 0 < answer["out"].count("the handbook") < 40
    assert answer["finished"]["hit"] == ["egress"], answer["finished"]
    assert answer["finished"]["counters"]["ok"][1] <= 2048


def test_the_workspaces_own_limits_hold_as_well(service: Service) -> None:
    answer = service.python(CONNECT.replace("{times}", "4"), documents=["a.md"], workspace="small",
                            limits={"egress": 1 << 20, "connections": 100})  # fmt: skip
    assert answer["out"].count("the handbook") < 8


def test_a_refusal_is_in_the_journal_and_belongs_to_no_link(service: Service) -> None:
    answer = service.ask("true", documents=["a.md"], bind_ro=["/no/such/directory"])
    assert "/no/such/directory" in answer["finished"]["refused"]
    (record,) = service.records(answer["request"])
    assert (record["event"], record["asker"], record.get("link")) == ("request-refused", "user:okta:u1", None)


def test_a_member_who_is_no_broker_runs_nothing(service: Service) -> None:
    if service.daemon.lab.single_user:
        pytest.skip("one account is all there is, and that is root's")
    other = Service(service.daemon, "/usr/share", uid=4002)
    try:
        answer = other.ask("echo", "ran")
        assert answer["out"] == "" and "no broker" in answer["finished"]["refused"]
    finally:
        other.process.stdin.close()
        other.process.wait(10)
