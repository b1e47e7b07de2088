"""Residency through the whole daemon: what a pinned workspace reaches, and what becomes of open connections
when a record, a table or the pin moves. The tables are plain lists over the lab's own addresses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import pytest

from integration.chatter import Chatter
from integration.probe import probe
from lab import topology as t
from lab.machine import poll

# One prefix per jurisdiction and family; what lies in none of them is in no table.
PREFIXES = {
    "DE": ("11.22.33.192/29", "2a10:5353::c0/125"),
    "FR": ("11.22.33.200/29", "2a10:5353::c8/125"),
    "US": ("11.22.33.208/29", "2a10:5353::d0/125"),
}
DE, FR, US = (
    tuple((f"11.22.33.{base + n}", f"2a10:5353::{base + n:x}") for n in range(8)) for base in (192, 200, 208)
)
UNLISTED = ("11.22.33.225", "2a10:5353::e1")
POLICY = """\
workspace: acme
guard: {guard}
members: [user:4001]
residency: {{jurisdictions: {pin}}}
local_only: {local_only}
wildcards: {{sandbox: {{names: 100, rate: 50}}, workspace: {{names: 1000, rate: 100}}}}
allow:
  - {{host: moves.test, ports: [7/tcp], verify: address}}
  - {{host: german.test, ports: [7/tcp, 443/tcp, 443/udp], verify: address}}
  - {{host: read.test, ports: [443/tcp]}}
  - {{host: french.test, ports: [7/tcp, 443/udp], verify: address}}
  - {{host: american.test, ports: [7/tcp], verify: address}}
  - {{host: half.test, ports: [7/tcp], verify: address}}
  - {{host: otherhalf.test, ports: [7/tcp], verify: address}}
  - {{host: several.test, ports: [7/tcp], verify: address}}
  - {{host: unlisted.test, ports: [7/tcp], verify: address}}
  - {{host: vouched.test, ports: [7/tcp], verify: address, vouch: "contract 4711"}}
  - {{host: vouchedus.test, ports: [7/tcp], verify: address, vouch: "contract 4712"}}
  - {{host: api.openai.com, ports: [443/tcp]}}
  - {{host: '*.inside.test', ports: [7/tcp], verify: address}}
  - {{host: '*.outside.test', ports: [7/tcp], verify: address}}
  - {{host: '*.several.test', ports: [7/tcp], verify: address}}
"""
NAMES = {
    "moves.test": [*DE[1]],
    "german.test": [*DE[2]],
    "read.test": [*DE[3]],
    "french.test": [*FR[1]],
    "american.test": [*US[1]],
    "half.test": [DE[4][0], US[4][1]],
    "otherhalf.test": [US[4][0], DE[4][1]],
    "several.test": [*itertools.chain(*US[1:6]), *DE[5]],
    "unlisted.test": [*UNLISTED],
    "vouched.test": [*UNLISTED],
    "vouchedus.test": [*US[1]],
    "api.openai.com": [*DE[6]],
    "*.inside.test": [*DE[6]],
    "*.outside.test": [*US[6]],
    "*.several.test": [*itertools.chain(*US[1:6]), *DE[5]],
}
MARKER = "egressd-marker-r17d"


def policy(*, pin: str = "[EU]", guard: str = "enforce", local_only: str = "false") -> str:
    return POLICY.format(pin=pin, guard=guard, local_only=local_only)


def records(addresses: list[str]) -> t.Records:
    four = [a for a in addresses if ip_address(a).version == 4]
    six = [a for a in addresses if ip_address(a).version == 6]
    return t.Records({"A": four, "AAAA": six}, ttl=1)


def import_table(daemon: Any, prefixes: Mapping[str, tuple[str, ...]] = PREFIXES) -> None:
    lines = [f"{prefix} {code}\n" for code, listed in prefixes.items() for prefix in listed]
    daemon.lab.path("prefixes.txt").write_text("".join(lines))
    words = ("residency", "import", daemon.lab.inside("prefixes.txt"), "--provider", "lab", "--name", "lab")
    daemon.ctl(*words).check()


@pytest.fixture(scope="module")
def running_daemon(start_module_daemon: Any, _servers: Any, lab: Any) -> Any:
    for name, addresses in NAMES.items():
        _servers[0].set(name, records(addresses), standing=True)
    lab.path("residency").mkdir(exist_ok=True)
    daemon = start_module_daemon(policies={"acme": policy()}, residency_dir=lab.inside("residency"))
    import_table(daemon)
    return daemon


@pytest.fixture
def daemon(running_daemon: Any, internet: Any) -> Any:
    """With the table and the policy as they were, and nothing said in the journal since."""
    running_daemon.write_policy("acme", policy())
    import_table(running_daemon)
    running_daemon.ctl("policy", "apply").check()
    running_daemon.journal_before = len(journal_lines(running_daemon))
    internet.forget()
    return running_daemon


def journal_lines(daemon: Any) -> list[str]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    return [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]


def journal(daemon: Any, event: str) -> list[dict[str, Any]]:
    entries = map(json.loads, journal_lines(daemon)[daemon.journal_before :])
    return [entry["fields"] for entry in entries if entry["event"] == event]


def echo(name: str) -> tuple[str, str, int, str]:
    return ("tcp", name, 7, MARKER)


def dig(daemon: Any, name: str, kind: str) -> str:
    """What the sandbox hears, with the Extended DNS Error."""
    words = ["/usr/bin/dig", "+time=6", "+tries=1", "+nocookie", name, kind]
    return str(daemon.sandbox("acme", words).out)


def why(daemon: Any, subject: str) -> str:
    return str(daemon.ctl("why", "-w", "acme", subject).out)


def served(internet: Any) -> set[str]:
    """Addresses at which somebody was talked to, but for DNS."""
    return {entry.address for entry in internet.seen() if entry.port not in (53, 853)}


# ---- what is reached


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("german.test", {*DE[2]}),
        ("french.test", {*FR[1]}),
        ("several.test", {*DE[5]}),
        ("vouched.test", {*UNLISTED}),
        ("any.inside.test", {*DE[6]}),
        ("any.several.test", {*DE[5]}),
    ],
)
def test_inside_the_pin_both_families_are_reached(
    daemon: Any, internet: Any, name: str, reached: set[str]
) -> None:
    four, six = probe(daemon, [("resolve", name, "4"), ("resolve", name, "6")])
    assert (four.result, six.result) == ("ok", "ok")
    addresses = (*four.data.split(), *six.data.split())
    outcomes = probe(daemon, [echo(address) for address in addresses])
    assert {o.data for o in outcomes} == {MARKER}, outcomes
    assert served(internet) == reached


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("american.test", "US is not in EU"),
        ("unlisted.test", "no published prefix"),
        ("vouchedus.test", "US is not in EU"),
        ("any.outside.test", "US is not in EU"),
    ],
)
def test_outside_nothing_is_and_the_sandbox_is_told_why(
    daemon: Any, internet: Any, uplink: Any, name: str, says: str
) -> None:
    assert [o.result for o in probe(daemon, [echo(name), ("resolve", name, "6")])] == ["EAI_NONAME"] * 2
    for kind in ("A", "AAAA"):
        answer = dig(daemon, name, kind)
        assert "status: NXDOMAIN" in answer and "EDE: 15 (Blocked)" in answer and says in answer, answer
        assert "workspace acme" in answer
    assert served(internet) == set()
    uplink.assert_only_to(t.DNS4, t.DNS6)
    assert "[residency]" in why(daemon, name) and says in why(daemon, name)
    poll(
        lambda: {r["reason"] for r in journal(daemon, "dns-denied") if r["name"] == name} == {"residency"},
        timeout=5,
        what="the refusals are recorded",
    )


@pytest.mark.parametrize(("name", "good", "bad"), [("half.test", "4", "6"), ("otherhalf.test", "6", "4")])
def test_each_family_is_judged_for_itself(daemon: Any, internet: Any, name: str, good: str, bad: str) -> None:
    reached, refused = probe(daemon, [("resolve", name, good), ("resolve", name, bad)])
    assert reached.result == "ok" and refused.result in ("EAI_NODATA", "EAI_NONAME", "EAI_ADDRFAMILY")
    assert [o.data for o in probe(daemon, [echo(reached.data), echo(name)])] == [MARKER] * 2
    assert served(internet) == {DE[4][0 if good == "4" else 1]}
    answer = dig(daemon, name, "A" if bad == "4" else "AAAA")
    assert "status: NOERROR" in answer and "EDE: 15 (Blocked)" in answer and "US is not in EU" in answer


def test_what_the_catalogue_bars_is_not_even_asked_for(daemon: Any, internet: Any) -> None:
    answer = dig(daemon, "api.openai.com", "A")
    assert (
        "status: NXDOMAIN" in answer
        and "EDE: 15 (Blocked)" in answer
        and "barred in workspace acme" in answer
    )
    assert "api.openai.com" not in {name for name, _ in internet.queries()}
    assert "api.openai.com" not in daemon.json("ruleset")["text"]


# ---- what moves


def test_a_record_that_moves_out_is_refused_within_one_refresh(daemon: Any, internet: Any) -> None:
    """At a TTL of one second that is five seconds. What is open leads inside, and stays."""
    four, six = probe(daemon, [("resolve", "moves.test", "4"), ("resolve", "moves.test", "6")])
    internet.forget()
    with Chatter(daemon, ["tcp4 moves.test 7", "tcp6 moves.test 7"]) as chatter:
        poll(lambda: len(served(internet)) == 2, what="both connections are told by the far end")
        internet.forget()
        try:
            internet.set("moves.test", records([*US[2]]), standing=True)
            poll(lambda: "US is not in EU" in why(daemon, "moves.test"), timeout=8, what="it is refused")
            by_name, by_four, by_six = probe(daemon, [echo("moves.test"), echo(four.data), echo(six.data)])
            assert by_name.result == "EAI_NONAME"
            # an address that a sandbox held on to leads nowhere, and says so at once
            assert {by_four.result, by_six.result} <= {"EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED"}
            answer = dig(daemon, "moves.test", "AAAA")
            assert "EDE: 15 (Blocked)" in answer and "US is not in EU" in answer
            chatter.go_on()
            assert chatter.events() == []
            assert served(internet) == set(), "nobody new was talked to"
            told = [r for r in journal(daemon, "residency-refused") if r["host"] == "moves.test"]
            assert {(r["address"], r["code"], r["prefix"], r["table"]) for r in told} == {
                (US[2][0], "outside", PREFIXES["US"][0], "lab"),
                (US[2][1], "outside", PREFIXES["US"][1], "lab"),
            }
            assert len(told) == 2
            assert daemon.counters("acme")["addresses_refused"]["moves.test"] == 2
            explained = why(daemon, "moves.test")
            assert "it has not resolved to any usable address" in explained and US[2][0] in explained
        finally:
            internet.set("moves.test", records(NAMES["moves.test"]), standing=True)
    poll(lambda: probe(daemon, [echo("moves.test")])[0].data == MARKER, timeout=8, what="it is back")


GOES = ["tcp4 german.test 7", "tcp6 german.test 7"]
STAYS = ["tcp4 french.test 7", "tcp6 french.test 7", "udp4 french.test 443", "udp6 french.test 443"]


def move_table(daemon: Any) -> None:
    import_table(daemon, PREFIXES | {"DE": (), "US": (*PREFIXES["US"], *PREFIXES["DE"])})


def move_pin(daemon: Any) -> None:
    daemon.policy("acme", policy(pin="[FR]"))


@pytest.mark.parametrize("move", [move_table, move_pin])
def test_open_connections_to_what_is_refused_now_are_cut_and_no_others(daemon: Any, move: Any) -> None:
    with Chatter(daemon, [*GOES, *STAYS]) as chatter:
        chatter.go_on()
        move(daemon)
        for flow in GOES:
            assert chatter.wait_for_failure(flow, timeout=2)["error"] == "ECONNRESET"
        before = chatter.beats()
        poll(lambda: all(chatter.beats()[flow] > before[flow] for flow in STAYS), timeout=5)
        assert {event["flow"] for event in chatter.events()} == set(GOES)
        cut = {(r["workspace"], r["host"], r["address"], r["code"]) for r in journal(daemon, "flows-cut")}
        assert cut == {("acme", "german.test", address, "outside") for address in DE[2]}
        assert [o.result for o in probe(daemon, [echo("german.test"), echo("french.test")])] == [
            "EAI_NONAME",
            "ok",
        ]
    assert daemon.counters("acme")["balance"]["balanced"]
    assert daemon.json("policy", "diff")["drift"] == []


TLS = """
import socket, ssl, sys, time
family = {"4": socket.AF_INET, "6": socket.AF_INET6}[sys.argv[1]]
address = socket.getaddrinfo("read.test", 443, family, socket.SOCK_STREAM)[0][4]
plain = socket.socket(family, socket.SOCK_STREAM)
plain.connect(address)
stream = ssl._create_unverified_context().wrap_socket(plain, server_hostname="read.test")
print("open", flush=True)
try:
    while True:
        stream.send(b"GET")
        time.sleep(0.05)
except OSError as error:
    print("ended", type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("family", ["4", "6"])
def test_connections_that_the_inspector_carries_are_cut_as_well(daemon: Any, family: str) -> None:
    process = daemon.start_sandbox("acme", ["/usr/bin/python3", "-I", "-c", TLS, family])
    poll(lambda: "open" in process.out, timeout=10, what=f"it is open: {process.err}")
    daemon.policy("acme", policy(pin="[DE]"))
    assert "ended" not in process.out, "what complies stays"
    move_pin(daemon)
    poll(lambda: "ended" in process.out, timeout=2, what=f"an end: {journal(daemon, 'flows-cut')}")
    assert {r["host"] for r in journal(daemon, "flows-cut")} == {"read.test"}
    assert process.wait(10) == 0


def test_a_name_of_a_wildcard_is_cut_and_comes_back(daemon: Any) -> None:
    flows = ["tcp4 any.inside.test 7", "tcp6 any.inside.test 7"]
    with Chatter(daemon, [*flows, STAYS[0]]) as chatter:
        move_pin(daemon)
        for flow in flows:
            assert chatter.wait_for_failure(flow, timeout=2)["error"] == "ECONNRESET"
        assert chatter.failed(STAYS[0]) is None
        assert probe(daemon, [echo("any.inside.test")])[0].result == "EAI_NONAME"
        daemon.policy("acme", policy())
        assert probe(daemon, [echo("any.inside.test")])[0].data == MARKER
        chatter.stop()


def test_a_pin_that_goes_opens_what_it_held(daemon: Any, internet: Any) -> None:
    daemon.policy("acme", policy().replace("residency: {jurisdictions: [EU]}\n", ""))
    outcomes = probe(daemon, [echo(n) for n in ("american.test", "unlisted.test", "any.outside.test")])
    assert {o.data for o in outcomes} == {MARKER}
    daemon.policy("acme", policy())
    outcomes = probe(daemon, [echo(n) for n in ("american.test", "unlisted.test", "any.outside.test")])
    assert {o.result for o in outcomes} == {"EAI_NONAME"}


def test_a_table_that_broke_closes_what_is_pinned(daemon: Any) -> None:
    with Chatter(daemon, GOES) as chatter:
        path = daemon.lab.path("residency/tables/lab.json")
        path.write_bytes(path.read_bytes()[:-20])
        daemon.ctl("policy", "apply")
        for flow in GOES:
            assert chatter.wait_for_failure(flow, timeout=2)["error"] == "ECONNRESET"
    answer = dig(daemon, "german.test", "A")
    assert "EDE: 15 (Blocked)" in answer and "lab.json" in answer
    assert any("residency cannot be judged" in alarm["text"] for alarm in daemon.json("status")["alarms"])


@pytest.mark.parametrize("guard", ["enforce", "observe", "off"])
def test_local_only_leaves_no_host_whatever_the_guard(daemon: Any, internet: Any, guard: str) -> None:
    daemon.policy("acme", policy(guard=guard))
    with Chatter(daemon, [*GOES, STAYS[0]]) as chatter:
        daemon.policy("acme", policy(guard=guard, local_only="true"))
        for flow in (*GOES, STAYS[0]):
            assert chatter.wait_for_failure(flow, timeout=2)["error"] == "ECONNRESET"
    internet.forget()  # by now the far end has told of the connections that were cut
    outcomes = probe(
        daemon, [echo("german.test"), echo("any.inside.test"), echo("evil.test"), echo(str(t.EVIL4))]
    )
    assert [o.result for o in outcomes] == ["EAI_NONAME"] * 3 + ["ECONNREFUSED"]
    assert "external routing is off" in dig(daemon, "german.test", "A")
    assert served(internet) == set()


@pytest.mark.parametrize("name", ["resolver", "warden", "inspector"])
def test_residency_outlives_every_process_but_the_controller(daemon: Any, name: str) -> None:
    from integration.test_wildcards import replace, running

    replace(daemon, name)
    poll(lambda: running(daemon), timeout=10)
    good, bad, covered, uncovered = probe(
        daemon, [echo(n) for n in ("german.test", "american.test", "a.inside.test", "a.outside.test")]
    )
    assert (good.data, covered.data) == (MARKER, MARKER)
    assert (bad.result, uncovered.result) == ("EAI_NONAME", "EAI_NONAME")


def test_a_new_controller_refuses_what_the_old_one_did(daemon: Any) -> None:
    from integration.test_wildcards import replace, running

    replace(daemon, "controller")
    poll(lambda: running(daemon), timeout=10)
    assert [o.result for o in probe(daemon, [echo("american.test"), echo("german.test")])] == [
        "EAI_NONAME",
        "ok",
    ]
    assert daemon.counters("acme")["addresses_refused"]["american.test"] == 2
