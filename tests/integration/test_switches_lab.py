"""A switch thrown with egressctl: the kernel shows it at once, the file keeps its comments, and the
journal tells who it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from integration.chatter import Chatter
from integration.probe import probe
from lab.machine import poll

POLICY = """\
# acme's: see contract 4711
workspace: acme
guard: enforce   # since the audit
members: [user:4001]
residency: {jurisdictions: [EU]}   # contract 4711
allow:
  - {host: plain.test, ports: [7/tcp], verify: address, vouch: "the lab's"}   # them
  - {local: echo, ports: [11500/tcp]}
"""
HOSTS = ["tcp4 plain.test 7", "tcp6 plain.test 7"]
LOCAL = "tcp4 echo 11500"
ECHO = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 11500))
print("listening", flush=True)
def echo(sock):
    while data := sock.recv(4096):
        sock.sendall(data)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""


@pytest.fixture
def daemon(start_daemon: Any, internet: Any, lab: Any) -> Iterator[Any]:
    service = lab.start(["/usr/bin/python3", "-I", "-c", ECHO])
    poll(lambda: "listening" in service.out, what="the local service listens")
    yield start_daemon(policies={"acme": POLICY})
    service.kill()


def policy_file(daemon: Any) -> str:
    text: str = daemon.lab.path(f"{daemon.directory}/workspaces/acme.yaml").read_text()
    return text


def elements(daemon: Any) -> set[str]:
    """Comments of the elements of the workspace's maps, as the kernel lists them: what is reached."""
    found = set()
    for name in ("acme_out4", "acme_out6"):
        words = ["nft", "-j", "list", "map", "netdev", daemon.gateway, name]
        listed = json.loads(daemon.lab.run(words, where=daemon.gateway).check().out)
        (entries,) = [each["map"].get("elem", []) for each in listed["nftables"] if "map" in each]
        found |= {entry["comment"] for entry in _within(entries, "comment")}
    return found


def _within(node: Any, key: str) -> Iterator[Any]:
    """Every mapping that has `key`, wherever nft nests it."""
    if isinstance(node, dict):
        if key in node:
            yield node
        for value in node.values():
            yield from _within(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _within(value, key)


def changes(daemon: Any) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted(daemon.lab.path(f"{daemon.directory}/state/journal").glob("*.jsonl"))
        for line in segment.read_text().splitlines()
    ]
    changes = [line["fields"] for line in lines if line["event"] == "policy-changed"]
    return [fields for fields in changes if fields.get("why", "").startswith("local-only")]


def test_local_only_cuts_hosts_at_once_and_nothing_else(daemon: Any) -> None:
    assert {"plain.test", "echo"} <= elements(daemon)
    with Chatter(daemon, [*HOSTS, LOCAL]) as chatter:
        told = daemon.ctl("local-only", "acme", "on").check()
        applied = time.monotonic()
        assert "local-only of acme: off -> on (file and kernel)\n" in told.out
        for flow in HOSTS:
            event = chatter.wait_for_failure(flow)
            assert event["error"] == "ECONNRESET"
            assert event["at"] - applied < 0.050, "the kernel lets nothing pass once it is applied"
        assert "plain.test" not in elements(daemon)
        assert "echo" in elements(daemon)
        before = chatter.beats()[LOCAL]
        poll(lambda: chatter.beats()[LOCAL] > before, what="the local service goes on")
        assert chatter.failed(LOCAL) is None
    (outcome,) = probe(daemon, [("tcp", "plain.test", 7, "x")])
    assert outcome.result == "EAI_NONAME"
    assert policy_file(daemon) == POLICY.replace(
        "# since the audit\n", "# since the audit\nlocal_only: true\n"
    )
    shown = {verb: daemon.json(verb, "acme")["value"] for verb in ("guard", "residency", "local-only")}
    assert shown == {"guard": "enforce", "residency": ["EU"], "local-only": True}, "each by itself"

    told = daemon.ctl("local-only", "acme", "off").check()
    assert "this opens: hosts may be reached again\n" in told.out
    assert {"plain.test", "echo"} <= elements(daemon)
    back = lambda: probe(daemon, [("tcp", "plain.test", 7, "x")])[0].data == "x"  # noqa: E731
    poll(back, what="the host is reached again")
    assert policy_file(daemon) == POLICY.replace(
        "# since the audit\n", "# since the audit\nlocal_only: false\n"
    )

    recorded = poll(lambda: len(changes(daemon)) >= 4 and changes(daemon), what="the journal has them")
    assert {fields["why"] for fields in recorded} == {"local-only acme on", "local-only acme off"}
    assert all(fields["by"].startswith("uid 0") for fields in recorded)


def test_guard_and_residency_are_switched_by_themselves(daemon: Any) -> None:
    assert (
        daemon.ctl("guard", "acme", "off").check().out.startswith("guard of acme: enforce -> off (file and")
    )
    assert [o.data for o in probe(daemon, [("tcp", "11.22.33.66", 7, "open")])] == ["open"]
    daemon.ctl("residency", "acme", "none").check()
    assert policy_file(daemon) == POLICY.replace("guard: enforce", "guard: off").replace(
        "residency: {jurisdictions: [EU]}   # contract", "# contract"
    )
    daemon.ctl("guard", "acme", "on").check()
    daemon.ctl("residency", "acme", "EU").check()
    assert [o.result for o in probe(daemon, [("tcp", "11.22.33.66", 7, "shut")])] == ["ECONNREFUSED"]
    assert [w["guard"] for w in daemon.json("status")["workspaces"]] == ["enforce"]
    assert policy_file(daemon).count("#") == POLICY.count("#")


def test_a_member_sees_them_and_may_not_throw_them(daemon: Any) -> None:
    uid = daemon.lab.user
    assert daemon.ctl("guard", "acme", uid=uid).check().out == "guard of acme: enforce\n"
    assert daemon.ctl("residency", "acme", uid=uid).check().out == "residency of acme: EU\n"
    told = daemon.ctl("guard", "acme", "off", uid=uid)
    assert (told.status, told.err) == (
        125, "egressctl: only root and the daemon's own user change guard of acme: use sudo\n"
    )  # fmt: skip
    assert policy_file(daemon) == POLICY


ROUTES = """\
providers:
  near: {type: openai-compatible, base_url: "http://plain.test:7/v1", api_key: "secret://env/KEY"}
  far: {type: openai-compatible, base_url: "https://one.cdn.test/v1"}
routes:
  default: {providers: [far, near]}
  none: {provider: far}
"""


def test_a_route_is_answered_from_what_the_names_lead_to(daemon: Any) -> None:
    """`far` is listed by no rule, so it is no way out; `near` leads where the rule vouches for it."""
    text = POLICY.replace("allow:\n", 'allow:\n  - {provider: near, vouch: "the lab\'s"}\n') + ROUTES
    daemon.policy("acme", text.replace("plain.test, ports: [7/tcp]", "plain.test, ports: [9/tcp]"))
    asked = ("route", "-w", "acme", "default")
    poll(lambda: daemon.ctl(*asked).status == 0, what="plain.test is looked up")
    told = daemon.ctl(*asked, uid=daemon.lab.user).check()
    assert told.out.startswith("near http://plain.test:7/v1\n")
    assert "key: secret://env/KEY" in told.out and "passed over: far: no rule of acme allows" in told.out
    told = daemon.ctl("route", "-w", "acme", "none", uid=daemon.lab.user)
    assert (told.status, told.out) == (1, "")
    assert "route none of acme: no provider complies" in told.err
    assert daemon.ctl("route", "-w", "acme", "other").status == 125
    assert daemon.ctl(*asked, uid=4999).status == 125
