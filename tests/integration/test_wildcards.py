"""Names that wildcards cover, through the whole daemon: the first question grants, budgets bound what is
asked upstream, and what was granted outlives every process. The capture on the uplink is
the judge of what left."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from integration.chatter import Chatter
from integration.hellos import hello
from integration.probe import Resident, probe
from integration.test_cotenant import Sender, grown
from lab import topology as t
from lab.machine import LabError, poll

MARKER = "egressd-marker-w41c"
POLICY = """
workspace: {workspace}
guard: enforce
members: [user:4001]
wildcards:
  sandbox: {{names: 4, bytes: 200B, rate: 50}}
  workspace: {{names: {names}, bytes: 4KiB, rate: 100}}
allow:
  - {{host: '{pattern}', ports: [7/tcp, 443/tcp]}}
  - {{host: plain.test, ports: [7/tcp], verify: address}}
"""
SEARCH = "*.search.test"
FOUR, SIX = "11.22.33.40", "2a10:5353::40"


def policy(workspace: str = "acme", *, pattern: str = SEARCH, names: int = 100) -> str:
    return POLICY.format(workspace=workspace, pattern=pattern, names=names)


@pytest.fixture(scope="module")
def running_daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": policy(), "beta": policy("beta")})


@pytest.fixture
def daemon(running_daemon: Any, internet: Any) -> Any:
    """With no name granted, and nothing said in the journal since."""
    poll(lambda: running(running_daemon), timeout=10)
    for pattern in ("*.none.test", SEARCH):
        for workspace in ("acme", "beta"):
            running_daemon.write_policy(workspace, policy(workspace, pattern=pattern))
        running_daemon.ctl("policy", "apply").check()
    running_daemon.journal_before = len(journal_lines(running_daemon))
    internet.forget()
    return running_daemon


def echo(name: str, data: str = MARKER) -> tuple[str, str, int, str]:
    return ("tcp", name, 7, data)


def asked(internet: Any) -> list[tuple[str, str]]:
    """Questions that reached the internet's DNS about anything but what is listed."""
    return sorted((name, kind) for name, kind in internet.queries() if name != "plain.test")


def rows(daemon: Any, workspace: str = "acme") -> dict[str, dict[str, Any]]:
    account = daemon.counters(workspace)
    assert account["balance"]["balanced"], account["balance"]
    return {row["host"]: row for row in account["hosts"]}


def refused(daemon: Any, workspace: str = "acme") -> dict[str, int]:
    return dict(daemon.counters(workspace)["names_refused_by"])


def journal_lines(daemon: Any) -> list[str]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    return [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]


def journal(daemon: Any, event: str) -> list[dict[str, Any]]:
    """What was recorded under that name since the test began."""
    entries = map(json.loads, journal_lines(daemon)[daemon.journal_before :])
    return [entry["fields"] for entry in entries if entry["event"] == event]


def recorded(daemon: Any, event: str, **fields: Any) -> dict[str, Any]:
    """The one record with these fields, once it is written."""

    def found() -> list[dict[str, Any]]:
        return [r for r in journal(daemon, event) if fields.items() <= r.items()]

    poll(lambda: len(found()) == 1, timeout=5, what=f"one record {event} {fields}: {found()}")
    return found()[0]


def granted(daemon: Any, workspace: str = "acme") -> int:
    found = next(w for w in daemon.json("status")["workspaces"] if w["workspace"] == workspace)
    return int(found["names"]["granted"])


def running(daemon: Any) -> bool:
    try:
        return {p["state"] for p in daemon.json("status")["processes"]} == {"running"}
    except LabError:
        return False


def replace(daemon: Any, name: str) -> None:
    """Kill a process and wait for another one of that name."""
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get(name, before) != before, timeout=10, what=f"another {name}")
    poll(lambda: running(daemon) and daemon.sandbox("acme", ["/bin/true"]).status == 0, timeout=10)


def test_the_first_question_reaches_it_and_the_uplink_saw_no_more_than_that_question(
    daemon: Any, internet: Any, uplink: Any
) -> None:
    resolved4, resolved6, four, again = probe(
        daemon,
        [("resolve", "a1.search.test", "4"), ("resolve", "a1.search.test", "6"),
         echo("a1.search.test"), echo("a1.search.test", "again")],
    )  # fmt: skip
    assert [o.result for o in (resolved4, resolved6, four, again)] == ["ok"] * 4, (resolved4, resolved6, four)
    assert resolved4.data.startswith("198.18.") and resolved6.data.startswith("fd53:e9::")
    assert (four.data, again.data) == (MARKER, "again")
    assert asked(internet) == [("a1.search.test", "A"), ("a1.search.test", "AAAA")]
    uplink.assert_only_to(t.DNS4, t.DNS6, FOUR, SIX)
    row = rows(daemon)["a1.search.test"]
    assert (row["kind"], row["wildcard"]) == ("granted", SEARCH)
    assert row["ports"] == ["443/tcp", "7/tcp"] and set(row["addresses"]) == {FOUR, SIX}
    assert row["out"][1] > 2 * len(MARKER) and row["connections"] == 2
    record = recorded(daemon, "name-granted", name="a1.search.test")
    assert (record["wildcard"], record["workspace"]) == (SEARCH, "acme")


def test_a_name_that_is_known_costs_neither_a_question_nor_budget(daemon: Any, internet: Any) -> None:
    with Resident(daemon) as one, Resident(daemon) as two:
        names = [f"n{n}.search.test" for n in range(4)]
        assert [o.data for o in one.tries(*map(echo, names))] == [MARKER] * 4
        before = asked(internet)
        assert len(before) == 8
        for resident in (one, two):
            for _ in range(3):
                assert [o.data for o in resident.tries(*map(echo, names))] == [MARKER] * 4
        assert asked(internet) == before
        assert granted(daemon) == 4


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_spent_budget_refuses_this_sandbox_and_nobody_else(
    daemon: Any, internet: Any, uplink: Any, family: str
) -> None:
    before = refused(daemon), refused(daemon, "beta")
    with Resident(daemon) as one, Resident(daemon) as two, Resident(daemon, workspace="beta") as other:
        spent = one.tries(*(("resolve", f"n{n}.search.test", family) for n in range(4)))
        assert [o.result for o in spent] == ["ok"] * 4
        over = one.tries(*(("resolve", f"{MARKER}{n}.search.test", family) for n in range(20)))
        assert {o.result for o in over} == {"EAI_NONAME"}
        uplink.settle()
        uplink.assert_never(MARKER.encode())
        assert grown(before[0], refused(daemon)) == {"budget-names": 20}
        # what it has, it keeps
        assert one.tries(echo("n0.search.test"))[0].data == MARKER
        # others have their own
        assert two.tries(echo("fresh.search.test"))[0].data == MARKER
        assert other.tries(echo("n0.search.test"))[0].data == MARKER
        assert refused(daemon, "beta") == before[1]
    poll(
        lambda: sum(int(f["count"]) for f in journal(daemon, "dns-denied")) == 20,
        timeout=5,
        what="every refusal is recorded",
    )
    assert {f["reason"] for f in journal(daemon, "dns-denied")} == {"budget-names"}
    why = daemon.ctl("why", "-w", "acme", f"{MARKER}1.search.test").check().out
    assert "budget-names" in why and SEARCH in why


def test_bytes_are_a_budget_of_their_own(daemon: Any, internet: Any) -> None:
    before, long = refused(daemon), "x" * 60
    results = [o.result for o in probe(daemon, [("resolve", f"{long}{n}.search.test") for n in range(4)])]
    assert results == ["ok", "ok", "ok", "EAI_NONAME"]
    assert grown(before, refused(daemon)).keys() == {"budget-bytes"}


def test_a_workspace_that_holds_all_it_may_refuses_further_names(daemon: Any) -> None:
    daemon.policy("acme", policy(names=3))
    with Resident(daemon) as one, Resident(daemon) as two:
        assert {o.result for o in one.tries(*(echo(f"n{n}.search.test") for n in range(3)))} == {"ok"}
        assert two.tries(echo("n3.search.test"))[0].result == "EAI_NONAME"
        assert two.tries(echo("n0.search.test"))[0].result == "ok"
    # with the sandboxes gone their names make room
    assert [o.result for o in probe(daemon, [echo("n3.search.test")])] == ["ok"]
    assert "n3.search.test" in rows(daemon)
    released = recorded(daemon, "name-released")
    assert released["name"] in ("n0.search.test", "n1.search.test", "n2.search.test")
    gone = rows(daemon)[SEARCH]
    assert gone["kind"] == "wildcard" and gone["out"][0] > 0, "what it counted stays in the books"


def test_what_is_not_there_is_not_granted(daemon: Any, internet: Any) -> None:
    internet.set("none.search.test", t.Records(rcode="NXDOMAIN"))
    internet.set("empty.search.test", t.Records({"TXT": ["x"]}))
    internet.set("broken.search.test", t.Records(rcode="SERVFAIL"))
    internet.set("home.search.test", A=["127.0.0.1"], AAAA=["::1"])
    names = ("none", "empty", "broken", "home")
    results = [o.result for o in probe(daemon, [("resolve", f"{name}.search.test") for name in names])]
    assert results[0] == "EAI_NONAME"
    assert results[1] in ("EAI_NODATA", "EAI_NONAME")
    assert results[2:] == ["EAI_AGAIN", "EAI_AGAIN"]
    assert granted(daemon) == 0 and journal(daemon, "name-granted") == []


@pytest.mark.parametrize("name", ["search.test", "a.b.search.test", "a.evil.test", f"{MARKER}.plain.test"])
def test_what_no_wildcard_covers_is_not_asked(daemon: Any, internet: Any, uplink: Any, name: str) -> None:
    (outcome,) = probe(daemon, [("resolve", name)])
    assert outcome.result == "EAI_NONAME"
    assert asked(internet) == []


@pytest.mark.parametrize("family", [4, 6])
def test_tls_to_a_granted_name_must_ask_for_that_name(daemon: Any, internet: Any, family: int) -> None:
    before, sender = daemon.counters("acme")["flows_refused"], Sender(daemon)
    try:
        name = "tls.search.test"
        assert sender.send(hello(name), name=name, family=family) in ("16", "15")
        assert [(s.name, s.port) for s in internet.seen(port=443)] == [(name, 443)]
        for other in ("other.search.test", "search.test", "evil.test"):
            assert sender.send(hello(other), name=name, family=family) == "reset"
        assert len(internet.seen(port=443)) == 1
        assert grown(before, daemon.counters("acme")["flows_refused"]) == {"sni-other": 3}
        row = rows(daemon)[name]
        assert row["dialled"] is not None and row["dialled"][1] > len(hello(name))
    finally:
        sender.close()


@pytest.mark.parametrize("flow", ["tcp4 a1.search.test 7", "tcp6 a1.search.test 7"])
def test_a_policy_without_the_wildcard_cuts_its_names_and_nothing_else(daemon: Any, flow: str) -> None:
    stays = "tcp4 plain.test 7"
    with Chatter(daemon, [flow, stays]) as chatter:
        daemon.policy("acme", policy(pattern="*.other.test"))
        assert chatter.wait_for_failure(flow)["error"] == "ECONNRESET"
        assert chatter.failed(stays) is None
    (outcome,) = probe(daemon, [("resolve", "a1.search.test")])
    assert outcome.result == "EAI_NONAME"
    assert granted(daemon) == 0
    assert "no wildcard" in recorded(daemon, "name-released", name="a1.search.test")["text"]
    assert "a1.search.test" not in daemon.json("ruleset")["text"]


def test_a_policy_that_still_covers_it_cuts_nothing(daemon: Any) -> None:
    with Chatter(daemon, ["tcp4 a1.search.test 7", "tcp6 a1.search.test 7"]) as chatter:
        before = rows(daemon)["a1.search.test"]["out"][0]
        daemon.policy("acme", policy(pattern="**.search.test"))
        chatter.go_on()
        assert chatter.events() == []
        row = rows(daemon)["a1.search.test"]
        assert row["wildcard"] == "**.search.test" and row["out"][0] > before, "a counter went back"


@pytest.mark.parametrize("name", ["warden", "resolver", "inspector", "auditor", "relay", "controller"])
def test_what_was_granted_outlives_every_process(daemon: Any, internet: Any, name: str) -> None:
    sender = Sender(daemon)
    with Chatter(daemon, ["tcp4 a1.search.test 7", "tcp6 a1.search.test 7"]) as chatter:
        assert sender.send(hello("a1.search.test"), name="a1.search.test") in ("16", "15")
        (before,) = probe(daemon, [("resolve", "a1.search.test")])
        replace(daemon, name)
        after, reached = probe(daemon, [("resolve", "a1.search.test"), echo("a1.search.test")])
        assert (after.data, reached.data) == (before.data, MARKER)
        assert sender.send(hello("a1.search.test"), name="a1.search.test") in ("16", "15")
        assert sender.send(hello("evil.test"), name="a1.search.test") == "reset"
        assert chatter.events() == []
        assert granted(daemon) == 1
        fresh, gone = probe(daemon, [echo("b2.search.test"), ("resolve", "a.other.test")])
        assert (fresh.result, gone.result) == ("ok", "EAI_NONAME")
    sender.close()
    assert daemon.json("policy", "diff")["drift"] == []
    rows(daemon)


def test_why_tells_what_became_of_a_name(daemon: Any) -> None:
    def why(subject: str) -> str:
        return str(daemon.ctl("why", "-w", "acme", subject).check().out)

    assert "no sandbox holds it" in why("a1.search.test") and "0 of 100 names" in why("a1.search.test")
    with Resident(daemon) as resident:
        address = resident.tries(("resolve", "a1.search.test", "4"))[0].data
        assert f"granted under {SEARCH}" in why("a1.search.test") and FOUR in why("a1.search.test")
        assert "a1.search.test" in why(f"{address}:7/tcp")
        assert "denied" in why("a1.search.test:22/tcp")
        status = daemon.ctl("status").check().out
        assert "1/100" in status
        counters = daemon.ctl("counters").check().out
        assert SEARCH in counters and "    a1.search.test" in counters
