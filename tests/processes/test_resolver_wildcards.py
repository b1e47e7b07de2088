"""Names of wildcards in the real process: what is withheld, what is shared, what a flood costs whom."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dnslib
import pytest
from resolver_scene import SANDBOX4, SANDBOX6, UPSTREAM, Authority, Namespace, Scene, able, eventually

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.policy.compiled import Budget, Budgets
from egressd.ruleset.layout import RESOLVER4, RESOLVER6

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not able(), reason="needs root, ip and dig")]

HOST, OTHER = "www.example.com", "other.example.com"
ZONE: dict[tuple[str, str], list[str] | int] = {
    (HOST, "A"): [f"{HOST} 60 A 93.184.215.14", f"{HOST} 60 A 93.184.215.15"],
    (HOST, "AAAA"): [f"{HOST} 60 AAAA 2606:2800::1"],
    (OTHER, "A"): [f"{OTHER} 60 A 93.184.215.16"],
    ("alias.example.com", "A"): ["alias.example.com 60 CNAME x.cdn.test", "x.cdn.test 60 A 93.184.215.17"],
    ("inside.example.com", "A"): ["inside.example.com 60 A 10.0.0.5"],
    ("metadata.example.com", "A"): ["metadata.example.com 60 A 169.254.169.254"],
}  # fmt: skip
WIDE = Budgets(Budget(names=500, bytes=1 << 20, rate=500), Budget(names=500, bytes=1 << 20, rate=500))
ACME = WorkspaceNames(
    workspace="acme", guard="enforce", hosts={"api.example.net": (1, False)},
    wildcards={"**.example.com": False}, budgets=WIDE,
)  # fmt: skip
ANSWER4, ANSWER6 = ["198.18.1.144", "198.18.1.145"], ["fd53:e9::190"]  # of the first block of the stage
SOURCES = [SANDBOX4, SANDBOX6]
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()
    assert not Path("/run/netns", made.name).exists()


@pytest.fixture
def authority(namespace: Namespace) -> Iterator[Authority]:
    with contextlib.closing(Authority(namespace, zone=dict(ZONE))) as made:
        yield made


def begin(namespace: Namespace, names: WorkspaceNames = ACME) -> Scene:
    scene = Scene(namespace, upstream=[f"udp://{UPSTREAM}:5300"])
    scene.controller.names(names)
    scene.controller.bind()
    scene.controller.bind(2)
    return scene


@pytest.fixture
def scene(namespace: Namespace, authority: Authority) -> Iterator[Scene]:
    made = begin(namespace)
    yield made
    errors = made.close()
    assert "Traceback" not in errors, errors
    assert made.process.returncode == 0


def client(scene: Scene, source: str) -> socket.socket:
    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(5)
        sock.bind((source, 0))
        sock.connect((str(RESOLVER6 if ":" in source else RESOLVER4), 53))
        return sock

    made: socket.socket = scene.namespace.run(connect)
    return made


def question(name: str, qtype: str = "A") -> bytes:
    record = dnslib.DNSRecord.question(name, qtype)
    record.header.id = next(_numbers) & 0xFFFF
    record.add_ar(dnslib.EDNS0(udp_len=1232, opts=[dnslib.EDNSOption(8, b"\0\1\x20\0\1\2\3\4")]))
    return bytes(record.pack())


def is_silent(sock: socket.socket, seconds: float = 0.3) -> bool:
    sock.settimeout(seconds)
    try:
        sock.recv(4096)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(5)
    return False


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_no_answer_before_the_controller_has_granted_it(scene: Scene, source: str) -> None:
    scene.controller.verdict = lambda m: None if isinstance(m, messages.GrantName) else True
    with client(scene, source) as sock:
        sock.send(question(HOST))
        eventually(lambda: scene.controller.held)
        (asked,) = scene.controller.grants
        assert (asked.workspace, asked.link, asked.host, asked.wildcard) == (
            "acme",
            1,
            HOST,
            "**.example.com",
        )
        assert [str(a) for a in asked.slots4] == ["93.184.215.14", "93.184.215.15"] * 2
        assert [str(a) for a in asked.slots6] == ["2606:2800::1"] * 4
        assert {e["name"] for e in scene.named("dns-resolved")} >= {HOST}  # recorded before it was asked
        assert is_silent(sock)
        scene.controller.release()
        answer = dnslib.DNSRecord.parse(sock.recv(4096))
        assert [str(rr.rdata) for rr in answer.rr] == ANSWER4
    assert scene.dig(HOST, "AAAA", source=source).data == ANSWER6
    assert len(scene.controller.grants) == 1


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_not_granted_is_not_answered_but_asked_again(scene: Scene, source: str) -> None:
    scene.controller.verdict = lambda m: not isinstance(m, messages.GrantName)
    for _ in range(2):
        found = scene.dig(HOST, source=source)
        assert (found.status, found.data) == ("SERVFAIL", [])
        assert found.extended == f"14 (Not Ready): ({HOST} is not admitted: no kernel)"
    assert scene.controller.granted == {}
    assert eventually(lambda: scene.named("dns-withheld"))[0]["name"] == HOST
    scene.controller.verdict = lambda _: True
    eventually(lambda: scene.dig(HOST, source=source).data == ANSWER4)


def test_a_silent_controller_is_a_failure_in_time(scene: Scene) -> None:
    scene.controller.verdict = lambda m: None if isinstance(m, messages.GrantName) else True
    found = scene.dig(HOST)
    assert found.extended == f"14 (Not Ready): ({HOST} has not been resolved yet)"
    scene.controller.release()
    eventually(lambda: scene.dig(HOST).data == ANSWER4)  # granted late, and answered then
    assert len(scene.controller.grants) == 1


def test_fifty_first_questions_of_both_sandboxes_share_one_grant(scene: Scene, authority: Authority) -> None:
    scene.controller.verdict = lambda m: None if isinstance(m, messages.GrantName) else True
    with client(scene, SANDBOX4) as one, client(scene, SANDBOX6) as six, client(scene, "198.19.0.2") as two:
        for number in range(50):
            [one, six, two][number % 3].send(question(HOST, ["A", "AAAA"][number % 2]))
        eventually(lambda: scene.controller.held)
        assert all(is_silent(sock, 0.1) for sock in (one, six, two))
        scene.controller.release()
        heard = [dnslib.DNSRecord.parse(sock.recv(4096)) for sock in (one, six, two) for _ in range(16)]
    assert {len(a.rr) for a in heard} == {1, 2}
    assert len(scene.controller.grants) == 1
    assert sorted(qtype for name, qtype, _, _ in authority.asked if name == HOST) == ["A", "AAAA"]


def test_the_controller_dies_while_it_is_asked(scene: Scene) -> None:
    scene.controller.verdict = lambda m: None if isinstance(m, messages.GrantName) else True
    with client(scene, SANDBOX4) as sock:
        sock.send(question(HOST))
        eventually(lambda: scene.controller.held)
        scene.controller.channel.socket.shutdown(socket.SHUT_RDWR)
        answer = dnslib.DNSRecord.parse(sock.recv(4096))
        assert (answer.header.rcode, answer.rr) == (2, [])


def test_what_a_new_controller_does_not_hold_is_asked_for_again(scene: Scene) -> None:
    assert scene.dig(HOST).data == ANSWER4
    controller = scene.new_controller()
    controller.bind()
    controller.names(ACME)
    assert {r.host for r in controller.resolved} <= {"api.example.net", HOST}
    controller.verdict = lambda _: False
    assert scene.dig(HOST).status == "SERVFAIL"
    controller.verdict = lambda _: True
    eventually(lambda: scene.dig(HOST).data == ANSWER4)
    assert [g.host for g in controller.grants].count(HOST) >= 1


def test_a_new_resolver_is_told_what_is_granted(namespace: Namespace, authority: Authority) -> None:
    listed = WorkspaceNames(
        workspace="acme", guard="enforce", wildcards={"**.example.com": False}, granted={HOST: (77, False)}
    )
    scene = begin(namespace, listed)
    try:
        for source in SOURCES:
            assert scene.dig(HOST, source=source).data == ["198.18.1.52", "198.18.1.53"]
        assert [r.host for r in scene.controller.resolved] == [HOST]  # looked up like a listed name
        assert scene.controller.grants == []
        assert scene.dig("52.1.18.198.in-addr.arpa", "PTR").data == [f"{HOST}."]
    finally:
        scene.close()


def test_a_granted_name_is_refreshed_and_answered_from_the_new_addresses(
    namespace: Namespace, authority: Authority
) -> None:
    authority.zone[OTHER, "A"] = [f"{OTHER} 5 A 93.184.215.16"]
    scene = begin(namespace)
    try:
        assert scene.dig(OTHER).data == ["198.18.1.144"]
        authority.zone[OTHER, "A"] = [f"{OTHER} 5 A 93.184.215.16", f"{OTHER} 5 A 93.184.215.99"]
        told = eventually(lambda: [r for r in scene.controller.resolved if r.host == OTHER], within=8)
        assert str(told[0].slots4[3]) == "93.184.215.99"
        eventually(lambda: scene.dig(OTHER).data == ["198.18.1.144", "198.18.1.147"])
    finally:
        scene.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("inside.example.com", "every address of inside.example.com is refused: 10.0.0.5 (private)"),
        (
            "metadata.example.com",
            "every address of metadata.example.com is refused: 169.254.169.254 (metadata)",
        ),
    ],
)
def test_rebinding_is_refused(scene: Scene, name: str, text: str) -> None:
    for source in SOURCES:
        found = scene.dig(name, source=source)
        assert (found.status, found.extended) == ("SERVFAIL", f"15 (Blocked): ({text})")
    assert scene.controller.grants == []
    assert eventually(lambda: scene.named("dns-refused-address"))[0]["name"] == name


def test_an_alias_grants_nothing_to_the_name_on_the_way(scene: Scene, authority: Authority) -> None:
    assert scene.dig("alias.example.com").data == ["198.18.1.144"]
    assert [g.host for g in scene.controller.grants] == ["alias.example.com"]
    assert scene.dig("x.cdn.test").status == "NXDOMAIN"
    assert {name for name, *_ in authority.asked} == {"alias.example.com", "api.example.net"}


def test_what_goes_upstream_is_the_name_in_lower_case_and_nothing_else(
    scene: Scene, authority: Authority
) -> None:
    with client(scene, SANDBOX4) as sock:
        sock.send(question("WwW.ExAmPlE.cOm"))
        assert dnslib.DNSRecord.parse(sock.recv(4096)).rr
    for data in authority.raw:
        record = dnslib.DNSRecord.parse(data)
        assert str(record.q.qname) == str(record.q.qname).lower()
        assert [(rr.rtype, rr.rdata) for rr in record.ar] == [(41, [])]


def test_hostile_questions_of_other_types_cause_nothing(scene: Scene, authority: Authority) -> None:
    scene.dig("api.example.net")
    before = list(authority.asked)
    with client(scene, SANDBOX4) as sock:
        for number in range(1000):
            qtype = ["TXT", "HTTPS", "NULL", "MX", "SRV", "ANY", "NS", "CNAME", "SOA", "PTR"][number % 10]
            sock.send(question(f"{'s3cret' * 8}{number}.example.com", qtype))
            sock.recv(4096)
        for number in range(200):
            sock.send(question(f"_s{number}.example.com"))
            sock.recv(4096)
    assert authority.asked == before
    assert scene.controller.grants == []


# ---- budgets


def flood(scene: Scene, source: str, count: int, *, start: int = 0) -> list[dnslib.DNSRecord]:
    with client(scene, source) as sock:
        answers = []
        for number in range(start, start + count):
            sock.send(question(f"n{number}.example.com"))
            answers.append(dnslib.DNSRecord.parse(sock.recv(4096)))
        return answers


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_a_spent_budget_is_a_recorded_refusal_and_a_neighbours_affair_not(
    namespace: Namespace, authority: Authority, source: str
) -> None:
    tight = Budgets(Budget(names=10, bytes=4096, rate=500), Budget(names=500, bytes=1 << 20, rate=500))
    names = WorkspaceNames(
        workspace="acme", guard="enforce", wildcards={"**.example.com": False}, budgets=tight
    )
    scene = begin(namespace, names)
    try:
        answers = flood(scene, source, 60)
        assert {a.header.rcode for a in answers} == {3}
        blocked = [a for a in answers if any(o.code == 15 for o in a.ar[0].rdata)]
        assert blocked == answers[10:]
        assert len({name for name, *_ in authority.asked}) == 10
        counts = scene.controller.ask(messages.ReadRefused(request=9000)).counts
        assert counts == {"acme": {"budget-names": 50}}
        eventually(
            lambda: sum(e["count"] for e in scene.named("dns-denied") if e["reason"] == "budget-names") == 50,
        )
        assert scene.dig(HOST, source="198.19.0.2").data == ANSWER4
        assert scene.dig(HOST, source=source).data == ANSWER4  # granted: costs nothing now
        scene.controller.unbind(1)
        scene.controller.bind(1)  # another sandbox, as far as budgets go
        assert flood(scene, source, 1, start=900)[0].ar[0].rdata == []
    finally:
        scene.close()


@pytest.mark.parametrize("guard", ["off", "observe"])
def test_under_an_open_guard_covered_names_are_synthetic_and_a_spent_budget_restricts_nothing(
    namespace: Namespace, authority: Authority, guard: Any
) -> None:
    tight = Budgets(Budget(names=1, bytes=4096, rate=500), Budget(names=500, bytes=1 << 20, rate=500))
    names = WorkspaceNames(workspace="acme", guard=guard, wildcards={"**.example.com": False}, budgets=tight)
    scene = begin(namespace, names)
    try:
        assert scene.dig(HOST).data == ANSWER4
        assert scene.dig(HOST, "AAAA", source=SANDBOX6).data == ANSWER6
        assert scene.dig(OTHER).data == ["93.184.215.16"]
        assert scene.named("dns-denied") == []
        if guard == "observe":
            (event,) = eventually(lambda: scene.named("dns-would-deny"))
            assert (event["name"], event["reason"]) == (OTHER, "budget-names")
    finally:
        scene.close()


def test_memory_stays_bounded_under_endless_fresh_names(namespace: Namespace, authority: Authority) -> None:
    wide = Budgets(Budget(10**6, 1 << 30, 10**5), Budget(500, 1 << 30, 10**5))
    names = WorkspaceNames(
        workspace="acme", guard="enforce", wildcards={"**.example.com": False}, budgets=wide
    )
    scene = begin(namespace, names)
    try:
        flood(scene, SANDBOX4, 1100)  # more than are remembered
        before = _resident(scene)
        flood(scene, SANDBOX4, 1100, start=1100)
        assert _resident(scene) - before < 2 << 20
    finally:
        scene.close()


def _resident(scene: Scene) -> int:
    text = Path(f"/proc/{scene.process.pid}/statm").read_text()
    return int(text.split()[1]) * 4096
