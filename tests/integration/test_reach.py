"""A sandboxed process reaches exactly what its workspace allows: the whole daemon, real sandboxes, the real
kernel, and a capture on the uplink as the judge."""

from __future__ import annotations

from typing import Any

import pytest

from integration.probe import Outcome, probe
from lab import topology as t

MARKER = "egressd-marker-7f3a"
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp, 80/tcp, 443/udp], verify: address}
  - {host: four.test, ports: [7/tcp], verify: address}
  - {host: six.test, ports: [7/tcp], verify: address}
  - {host: alias.test, ports: [7/tcp], verify: address}
  - {host: many.test, ports: [7/tcp], verify: address}
  - {host: one.cdn.test, ports: [7/tcp], verify: address}
  - {host: db.internal.test, ports: [5432/tcp], verify: address, private: true}
  - {host: rebind.test, ports: [9998/tcp], verify: address, private: true}
  - {host: metadata.test, ports: [80/tcp], verify: address, private: true}
  - {host: silent.test, ports: [7/tcp], verify: address}
  - {host: broken.test, ports: [7/tcp], verify: address}
  - {cidr: 10.20.0.0/24, ports: [7/tcp]}
  - {cidr: fd20:20::/64, ports: [7/tcp]}
  - local: ollama
"""
GONE = 50.0  # milliseconds within which a denial must be felt
V4 = {
    "plain": str(t.PLAIN4),
    "evil": str(t.EVIL4),
    "dns": str(t.DNS4),
    "other": str(t.OTHER_DNS4),
    "metadata": str(t.METADATA4),
}
V6 = {
    "plain": str(t.PLAIN6),
    "evil": str(t.EVIL6),
    "dns": str(t.DNS6),
    "other": str(t.OTHER_DNS6),
    "metadata": str(t.METADATA6),
}

ALLOWED: list[tuple[Any, ...]] = [
    ("tcp", "plain.test", 7, MARKER),
    ("udp", "plain.test", 443, MARKER),
    ("tcp", "four.test", 7, MARKER),
    ("tcp", "six.test", 7, MARKER),
    ("tcp", "alias.test", 7, MARKER),
    ("tcp", "many.test", 7, MARKER),
    ("tcp", "one.cdn.test", 7, MARKER),
    ("tcp", "db.internal.test", 5432, MARKER),
    ("tcp", str(t.DB4), 7, MARKER),
    ("tcp", str(t.DB6), 7, MARKER),
]  # fmt: skip
DENIED: list[tuple[tuple[Any, ...], str]] = [
    *((("tcp", V[name], 443, MARKER), "ECONNREFUSED") for V in (V4, V6) for name in V),
    *((("udp", V[name], 53, MARKER), "ECONNREFUSED") for V in (V4, V6) for name in V),
    *((("ask", V[name], f"{MARKER}.evil.test"), "ECONNREFUSED")
      for V in (V4, V6) for name in ("dns", "other")),
    (("tcp", "plain.test", 8080, MARKER), "ECONNREFUSED"),
    (("tcp", "plain.test", 443, MARKER), "ECONNREFUSED"),
    (("udp", "plain.test", 7, MARKER), "ECONNREFUSED"),
    (("tcp", "evil.test", 443, MARKER), "EAI_NONAME"),
    (("tcp", "two.cdn.test", 7, MARKER), "EAI_NONAME"),
    (("tcp", f"{MARKER}.plain.test", 7, MARKER), "EAI_NONAME"),
    (("tcp", str(t.DB4), 5432, MARKER), "ECONNREFUSED"),
    (("tcp", "10.20.1.5", 7, MARKER), "ECONNREFUSED"),
    (("tcp", "fd20:20:0:1::5", 7, MARKER), "ECONNREFUSED"),
    # the host, on every address it has, every port it serves
    *((("tcp", address, port, MARKER), "ECONNREFUSED")
      for address in (str(t.HOST4), str(t.HOST6), "127.0.0.1", "::1", "169.254.54.1", "fd53:2::1")
      for port in t.SECRET_PORTS),
    # the gateway and its neighbours
    *((("tcp", address, port, MARKER), "ECONNREFUSED")
      for address in ("169.254.54.2", "fd53:2::2", "169.254.53.53", "fd53:53::53", "198.19.0.1", "fd53:1::1")
      for port in (22, 8443)),
    # synthetic addresses nobody was given
    (("tcp", "198.18.255.254", 7, MARKER), "ECONNREFUSED"),
    (("tcp", "fd53:e9::fffe", 7, MARKER), "ECONNREFUSED"),
    # names that may lead nowhere, whatever the rule says
    (("tcp", "rebind.test", 9998, MARKER), "EAI_AGAIN"),
    (("tcp", "metadata.test", 80, MARKER), "EAI_AGAIN"),
    (("tcp", "broken.test", 7, MARKER), "EAI_AGAIN"),
    # multicast, broadcast, everything odd
    (("tcp", "0.0.0.0", 9998, MARKER), "ECONNREFUSED"),
    (("tcp", "::ffff:11.22.33.66", 443, MARKER), "ECONNREFUSED"),
    (("tcp", "64:ff9b::b16:2142", 443, MARKER), "ECONNREFUSED"),
]  # fmt: skip
FAMILIES = {
    "packet": 17,
    "vsock": 40,
    "bluetooth": 31,
    "can": 29,
    "alg": 38,
    "xdp": 44,
    "key": 15,
    "tipc": 30,
    "rds": 21,
}


@pytest.fixture(scope="module")
def guarded(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


def books_balance(daemon: Any, workspace: str = "acme") -> dict[str, Any]:
    account = daemon.counters(workspace)
    assert account["balance"]["balanced"], account["balance"]
    for link in [*account["links"], account["ended"]]:
        assert link["in"] == [
            sum(pair) for pair in zip(link["ok"], link["denied"], link["other"], strict=True)
        ]
    assert account["balance"]["admitted"] == account["balance"]["elements"]
    return account  # type: ignore[no-any-return]


def show(outcomes: list[Outcome]) -> str:
    return "\n".join(f"{o.attempt}: {o.result} after {o.milliseconds:.1f} ms" for o in outcomes)


def test_what_is_allowed_works(guarded: Any, internet: Any) -> None:
    outcomes = probe(guarded, ALLOWED)
    assert [(o.attempt, o.result, o.data) for o in outcomes] == [(a, "ok", MARKER) for a in ALLOWED], show(
        outcomes
    )
    books_balance(guarded)


def test_what_is_not_allowed_fails_at_once_and_leaves_nothing_on_the_uplink(
    guarded: Any, internet: Any, uplink: Any
) -> None:
    before = guarded.counters("acme")
    attempts = [attempt for attempt, _ in DENIED]
    outcomes = probe(guarded, attempts)
    assert [(o.attempt, o.result) for o in outcomes] == DENIED, show(outcomes)
    slow = [o for o in outcomes if o.milliseconds > GONE]
    assert not slow, show(slow)
    uplink.settle()
    uplink.assert_never(MARKER.encode())
    uplink.assert_only_to(t.DNS4, t.DNS6)  # the resolver's own questions
    after = books_balance(guarded)
    denied = after["denied"]["unlisted"][0] - before["denied"].get("unlisted", [0, 0])[0]
    own = ("127.0.0.1", "::1", "0.0.0.0")  # refused by the sandbox's own stack; nothing to count
    by_kernel = [o for o in outcomes if o.result == "ECONNREFUSED" and o.attempt[1] not in own]
    # A client that is refused at one address of a name tries the next: both families are felt as one.
    twice = [o for o in by_kernel if o.attempt[:2] == ("tcp", "plain.test")]
    assert denied == len(by_kernel) + len(twice), f"{denied} counted, {len(by_kernel)} + {len(twice)} felt"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_that_leaves_the_namespace_cannot_be_had(guarded: Any, family: int) -> None:
    outcomes = probe(guarded, [("socket", family, kind) for kind in (1, 2, 3)])
    assert {o.result for o in outcomes} <= {"EAFNOSUPPORT", "EPERM"}, show(outcomes)


def test_raw_sockets_and_icmp_cannot_be_had(guarded: Any) -> None:
    attempts = [("socket", family, 3, protocol) for family in (2, 10) for protocol in (1, 6, 17, 58, 255)]
    attempts += [("socket", 2, 2, 1), ("socket", 10, 2, 58)]  # ping sockets
    outcomes = probe(guarded, attempts)
    assert {o.result for o in outcomes} <= {"EPERM", "EACCES", "EAFNOSUPPORT", "EPROTONOSUPPORT"}, show(
        outcomes
    )


def test_the_local_service_answers_under_both_its_names(guarded: Any, host_services: Any) -> None:
    ask = "GET /api/tags HTTP/1.0\r\nHost: x\r\n\r\n"
    attempts = [("tcp", where, t.OLLAMA_PORT, ask) for where in ("127.0.0.1", "::1", "localhost", "ollama")]
    outcomes = probe(guarded, attempts)
    assert all(o.result == "ok" and " 200 " in o.data for o in outcomes), show(outcomes)
    environment = guarded.sandbox("acme", ["/usr/bin/env"]).check().out
    assert "OLLAMA_HOST=" in environment
    books_balance(guarded)


def test_names_off_the_list_say_so(guarded: Any) -> None:
    result = guarded.sandbox("acme", ["/usr/bin/dig", "+tries=1", "evil.test", "AAAA"]).check()
    assert "NXDOMAIN" in result.out
    assert "EDE: 15 (Blocked)" in result.out and "acme" in result.out


@pytest.mark.parametrize("options", [["+notcp"], ["+tcp"], ["-6"], ["-6", "+tcp"]])
@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_names_on_the_list_get_addresses_of_their_own(guarded: Any, options: list[str], kind: str) -> None:
    server = "@fd53:53::53" if "-6" in options else "@169.254.53.53"
    result = guarded.sandbox(
        "acme", ["/usr/bin/dig", "+short", *options, server, "one.cdn.test", kind]
    ).check()
    (address,) = result.out.split()
    assert address.startswith("198.18." if kind == "A" else "fd53:e9::")


def test_a_name_with_many_addresses_gets_four(guarded: Any) -> None:
    (outcome,) = probe(guarded, [("resolve", "many.test", "4")])
    assert len(outcome.data.split()) == 4


def test_nobody_but_a_member_gets_a_sandbox(guarded: Any) -> None:
    for workspace, uid in (("acme", 4002), ("acme", 0), ("other", 4001), ("../acme", 4001), ("", 4001)):
        result = guarded.sandbox(workspace, ["/bin/true"], uid=uid)
        assert result.status == 125, (workspace, uid, result)
        assert "egressctl" in result.err and ("member" in result.err or "workspace" in result.err)


def test_teardown_leaves_nothing(guarded: Any, lab: Any) -> None:
    links = guarded.json("status")["sandboxes"]
    assert links == []
    listing = guarded.json("ruleset")["text"]
    assert "chain eg" not in listing and "counter eg" not in listing
