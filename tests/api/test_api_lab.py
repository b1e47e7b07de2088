"""curl against a real egressd's HTTP API, as root, as a member, as a member of another workspace and as a
stranger; over the loopback in both families and over a Unix socket."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from lab import topology
from lab.daemon import ACCOUNTS, Daemon
from lab.machine import Lab, LabError, poll

pytestmark = pytest.mark.kernel

PORT = 8000
SOCKET = "/run/egressd/api.sock"
PLACES = {"ipv4": f"127.0.0.1:{PORT}", "ipv6": f"[::1]:{PORT}", "unix": f"unix:{SOCKET}"}
MEMBER, OTHER, STRANGER = 4001, 4002, 4003
ACME = f"""
workspace: acme
guard: enforce
members: [user:{MEMBER}]
allow:
  - {{host: plain.test, ports: [80/tcp], verify: address}}
  - {{host: eu.api.openai.test}}
"""
RIVAL = f"""
workspace: rival
guard: enforce
members: [group:{OTHER}]
allow:
  - {{host: two.cdn.test, ports: [80/tcp], verify: address}}
"""
FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*", "-o", "/dev/null"]


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """curl, at one of the places."""

    def __init__(self, daemon: Daemon, where: str) -> None:
        self.daemon, self.lab, self.where = daemon, daemon.lab, where

    def argv(self, target: str, *words: str) -> list[str]:
        way = ["--unix-socket", SOCKET] if self.where == "unix" else []
        host = "[::1]" if self.where == "ipv6" else "localhost" if self.where == "unix" else "127.0.0.1"
        shown = ["-w", "\n%{http_code}", "--max-time", "20", "--noproxy", "*"]
        return ["curl", "-sS", "-g", *shown, *way, *words, f"http://{host}:{PORT}{target}"]

    def get(self, target: str, *words: str, uid: int | None = None) -> Reply:
        result = self.lab.run(self.argv(target, *words), uid=uid).check()
        body, _, status = result.out.rpartition("\n")
        return Reply(int(status), body)

    def up(self) -> bool:
        return "api" in self.daemon.pids() and self.lab.run(self.argv("/healthz")).out.endswith("200")


@pytest.fixture(scope="module", params=PLACES)
def caller(request: Any, start_module_daemon: Callable[..., Daemon], lab: Lab) -> Caller:
    if lab.single_user or lab.rootless:
        pytest.skip("there is one user only")
    for daemon in _running:
        daemon.stop()
    _running.clear()
    daemon = start_module_daemon(policies={"acme": ACME, "rival": RIVAL}, api=PLACES[request.param])
    _running.append(daemon)
    made = Caller(daemon, request.param)
    poll(made.up, timeout=15, what="the HTTP API")
    return made


_running: list[Daemon] = []


def test_each_sees_what_is_theirs(caller: Caller) -> None:
    seen = {
        uid: {row["workspace"] for row in caller.get("/v1/status", uid=uid).json["workspaces"]}
        for uid in (0, MEMBER, STRANGER)
    }
    assert seen == {0: {"acme", "rival"}, MEMBER: {"acme"}, STRANGER: set()}
    own = caller.get("/v1/policy?workspace=acme", uid=MEMBER)
    assert (own.status, own.json["workspace"], own.json["guard"]) == (200, "acme", "enforce")
    for uid in (MEMBER, STRANGER):
        theirs, none = (caller.get(f"/v1/policy?workspace={name}", uid=uid) for name in ("rival", "nobdy"))
        assert theirs.status == none.status == 404
        assert theirs.body.replace("rival", "nobdy") == none.body
    assert caller.get("/v1/policy?workspace=rival", uid=0).status == 200


def test_a_group_of_the_asker_counts_where_the_kernel_tells_of_it(caller: Caller) -> None:
    """Over TCP groups are those of the user database, and it knows no user 4002."""
    reply = caller.get("/v1/counters?workspace=rival", uid=OTHER)
    assert reply.status == (200 if caller.where == "unix" else 404)


def test_records_of_a_denial_are_told_to_members_and_root(caller: Caller) -> None:
    daemon = caller.daemon
    daemon.sandbox("acme", [*FETCH, f"http://{topology.EVIL4}/"], uid=MEMBER)
    daemon.sandbox("acme", [*FETCH, f"http://[{topology.EVIL6}]/"], uid=MEMBER)

    def told(uid: int) -> list[str]:
        reply = caller.get("/v1/audit?event=denied&reason=unlisted&limit=1000", uid=uid)
        return [record["fields"]["destination"] for record in reply.json]

    evil = {str(topology.EVIL4), str(topology.EVIL6)}
    poll(lambda: set(told(MEMBER)) >= evil, timeout=10, what="the records")
    assert set(told(0)) >= evil
    assert told(STRANGER) == []
    lines = caller.get("/v1/audit?limit=1000&after=0", "-H", "Accept: application/x-ndjson", uid=0).body
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    written = {line for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()}
    assert lines and set(lines.splitlines()) <= written, "byte for byte"


def test_counters_are_those_of_egressctl(caller: Caller) -> None:
    def counted(document: Any) -> Any:
        return {row["workspace"]: row["balance"] for row in document["workspaces"]}

    caller.daemon.sandbox("acme", [*FETCH, "http://plain.test/"], uid=MEMBER).check()
    assert counted(caller.get("/v1/counters").json) == counted(caller.daemon.json("counters"))
    (mine,) = caller.get("/v1/counters", uid=MEMBER).json["workspaces"]
    assert mine["workspace"] == "acme" and mine["balance"]["admitted"][0] > 0


def test_a_proof_by_curl_verifies(caller: Caller) -> None:
    where = caller.lab.path(f"{caller.where}.proof")
    where.write_text(caller.get("/v1/proof?workspace=acme&since=1h", uid=MEMBER).body)
    where.chmod(0o644)
    result = caller.daemon.ctl("verify", caller.lab.inside(f"{caller.where}.proof"))
    assert result.status == 0, result.out + result.err
    assert caller.get("/v1/proof?workspace=acme", uid=STRANGER).status == 404


def test_a_route_that_is_not_is_not_there(caller: Caller) -> None:
    reply = caller.get("/v1/route?workspace=acme&route=default", uid=MEMBER)
    assert reply.status == 404 and "default" in reply.json["detail"]


def test_pages_of_others_get_nothing(caller: Caller) -> None:
    for words in (["-H", "Origin: https://evil.example"], ["-H", "Host: evil.example"]):
        assert caller.get("/v1/status", *words, uid=0).status == 403
    assert caller.get("/v1/status", "-X", "POST", "-d", "x=1", uid=0).status == 405


def test_it_has_no_right_but_to_ask_and_to_read_the_journal(caller: Caller) -> None:
    daemon, lab = caller.daemon, caller.lab
    text = lab.run(["cat", f"/proc/{daemon.pids()['api']}/status"]).check().out
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    api, audit = int(ACCOUNTS["api"]), int(ACCOUNTS["audit"])
    assert (status["Uid"].split(), status["Groups"].split()) == ([str(api)] * 4, [str(audit)])
    state = f"{daemon.directory}/state"
    for path in ("keys", "keys/journal.key"):
        assert lab.run(["cat", lab.inside(f"{state}/{path}")], uid=api, groups=[audit]).status != 0
    assert lab.run(["touch", lab.inside(f"{state}/journal/0001.jsonl")], uid=api, groups=[audit]).status != 0
    for words in (["policy", "apply"], ["ruleset"], ["key", "rotate"]):
        assert daemon.ctl(*words, uid=api).status != 0, words
    assert daemon.sandbox("acme", ["true"], uid=api).status == 125
    assert "acme" not in daemon.ctl("status", uid=api).out, "for itself it sees nothing"


def test_held_connections_keep_nobody_out_and_leave_nothing(caller: Caller) -> None:
    lab, before = caller.lab, descriptors(caller)
    family = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6, "unix": socket.AF_UNIX}[caller.where]
    held = [lab.socket(family) for _ in range(600)]
    try:
        for sock in held:
            if caller.where == "unix":
                sock.connect(f"/proc/{lab.keeper_pid}/root{SOCKET}")
            else:
                sock.connect(("::1" if caller.where == "ipv6" else "127.0.0.1", PORT))
            sock.send(b"GET /v1/status HTTP/1.1\r\nX: ")
        assert caller.get("/v1/status", uid=MEMBER).status == 200
        assert descriptors(caller) < before + 300
    finally:
        for sock in held:
            sock.close()
    poll(lambda: descriptors(caller) <= before, timeout=10, what="no descriptor is left")


def descriptors(caller: Caller) -> int:
    found = caller.lab.run(["ls", f"/proc/{caller.daemon.pids()['api']}/fd"]).check().out
    return len(found.split())


@pytest.mark.parametrize("caller", ["ipv4"], indirect=True)  # where a local rule leads
def test_no_sandbox_asks_anything_not_even_through_a_rule_of_its_own(caller: Caller) -> None:
    """A `local` rule carries it there; there it is the relay who asks, and the relay is nobody's member."""
    daemon = caller.daemon
    for place in ("127.0.0.1", "169.254.54.1", str(topology.HOST4)):
        assert daemon.sandbox("acme", [*FETCH, f"http://{place}:{PORT}/v1/status"], uid=MEMBER).status == 7
    daemon.policy("acme", ACME + f"  - {{local: api, ports: [{PORT}/tcp]}}\n")
    try:
        ask = ["curl", "-sS", "--max-time", "5", "--noproxy", "*"]
        here = f"http://127.0.0.1:{PORT}"
        status = json.loads(daemon.sandbox("acme", [*ask, f"{here}/v1/status"], uid=MEMBER).check().out)
        assert status["workspaces"] == [] and status["sandboxes"] == []
        audit = daemon.sandbox("acme", [*ask, f"{here}/v1/audit"], uid=MEMBER).check().out
        assert json.loads(audit) == []
    finally:
        daemon.policy("acme", ACME)


def test_life_and_death(caller: Caller) -> None:
    """Its death is nobody's business; the controller's is said, and the next one is found."""
    daemon, lab = caller.daemon, caller.lab
    sandbox = daemon.start_sandbox("acme", ["sleep", "60"], uid=MEMBER)
    poll(lambda: caller.get("/v1/status", uid=MEMBER).json["sandboxes"], timeout=10, what="the sandbox")
    assert caller.get("/v1/status", uid=STRANGER).json["sandboxes"] == []
    old = daemon.pids()["api"]
    lab.signal(old, signal.SIGKILL)
    poll(lambda: daemon.pids().get("api", old) != old and caller.up(), timeout=15, what="another one")
    assert sandbox.status() is None
    sandbox.kill()
    lab.signal(daemon.pids()["controller"], signal.SIGKILL)

    def again() -> bool:
        try:
            return caller.get("/v1/status", uid=MEMBER).status == 200
        except LabError:
            return False

    poll(again, timeout=15, what="it is asked")


@pytest.mark.parametrize("caller", ["unix"], indirect=True)
def test_the_socket_is_for_everybody(caller: Caller) -> None:
    shown = caller.lab.run(["stat", "-c", "%a %u %g %F", SOCKET]).check().out
    assert shown.split() == ["666", "0", ACCOUNTS["api"], "socket"]


def test_without_api_there_is_no_process_for_it(start_daemon: Callable[..., Daemon]) -> None:
    for daemon in _running:
        daemon.stop()
    _running.clear()
    daemon = start_daemon()
    assert "api" not in daemon.pids()
    assert "api" not in {process["name"] for process in daemon.json("status")["processes"]}
