"""The resolver as a process: real sockets, real dig, a tiny upstream, a controller that can refuse."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dnslib
import pytest
from resolver_scene import (
    SANDBOX4,
    SANDBOX6,
    STRANGER4,
    STRANGER6,
    UID,
    UPSTREAM,
    Authority,
    Namespace,
    Scene,
    able,
    eventually,
)

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ruleset.layout import RESOLVER4, RESOLVER6

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not able(), reason="needs root, ip and dig")]

SOURCES = [SANDBOX4, SANDBOX6]
ROADS = [(), ("+tcp",)]
HOSTS = {
    "api.example.com": (1, False),
    "four.example.com": (2, False),
    "six.example.com": (3, False),
    "alias.example.com": (4, False),
    "nobody.example.com": (5, False),
    "broken.example.com": (6, False),
    "inside.example.com": (7, False),
    "rebound.example.com": (8, False),
    "private.example.com": (9, True),
    "static.example.com": (10, False),
}
ZONE: dict[tuple[str, str], list[str] | int] = {
    ("api.example.com", "A"): ["api.example.com 60 A 93.184.215.14", "api.example.com 60 A 93.184.215.15"],
    ("api.example.com", "AAAA"): ["api.example.com 60 AAAA 2606:2800::1"],
    ("four.example.com", "A"): ["four.example.com 60 A 93.184.215.16"],
    ("six.example.com", "AAAA"): ["six.example.com 60 AAAA 2606:2800::2"],
    ("alias.example.com", "A"): ["alias.example.com 60 CNAME x.cdn", "x.cdn 60 A 93.184.215.17"],
    ("broken.example.com", "A"): 2,
    ("broken.example.com", "AAAA"): 2,
    ("inside.example.com", "A"): ["inside.example.com 60 A 10.0.0.5"],
    ("rebound.example.com", "A"): ["rebound.example.com 60 A 169.254.169.254"],
    ("private.example.com", "A"): ["private.example.com 60 A 10.0.0.6", "private.example.com 60 A 127.0.0.1"],
    ("open.example", "A"): ["open.example 33 A 93.184.215.20", "open.example 33 A 10.9.9.9"],
    ("open.example", "AAAA"): ["open.example 33 AAAA 2606:2800::20"],
    ("loop.example", "A"): ["loop.example 33 A 127.0.0.1"],
    ("loop.example", "AAAA"): ["loop.example 33 AAAA fd53:e9::4"],
}  # fmt: skip
ACME = WorkspaceNames(workspace="acme", guard="enforce", hosts=HOSTS, services={"ollama": 40})
CONFIG = {"upstream": [f"udp://{UPSTREAM}:5300"], "hosts": {"static.example.com": ["93.184.215.99"]}}


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()
    assert not Path("/run/netns", made.name).exists()


@pytest.fixture
def authority(namespace: Namespace) -> Iterator[Authority]:
    made = Authority(namespace, zone=dict(ZONE))
    yield made
    made.close()


@pytest.fixture
def scene(namespace: Namespace, authority: Authority) -> Iterator[Scene]:
    """A resolver that knows acme's names and sandbox 1."""
    made = Scene(namespace, **CONFIG)
    made.controller.names(ACME)
    made.controller.bind()
    yield made
    pid = made.process.pid
    errors = made.close()
    assert "Traceback" not in errors, errors
    assert made.process.returncode == 0
    assert not Path(f"/proc/{pid}").exists()


# ---- answers


@pytest.mark.parametrize("road", ROADS, ids=["udp", "tcp"])
@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_answers_are_synthetic(scene: Scene, source: str, road: tuple[str, ...]) -> None:
    def ask(name: str, qtype: str) -> tuple[str, list[str], str]:
        found = scene.dig(name, qtype, *road, source=source)
        return found.status, found.data, found.extended.split(":")[0]

    assert ask("api.example.com", "A") == ("NOERROR", ["198.18.0.4", "198.18.0.5"], "")
    assert ask("API.example.com", "AAAA") == ("NOERROR", ["fd53:e9::4"], "")
    assert ask("four.example.com", "A") == ("NOERROR", ["198.18.0.8"], "")
    assert ask("four.example.com", "AAAA") == ("NOERROR", [], "")
    assert ask("six.example.com", "A") == ("NOERROR", [], "")
    assert ask("alias.example.com", "A") == ("NOERROR", ["198.18.0.16"], "")
    assert ask("nobody.example.com", "A") == ("NXDOMAIN", [], "")
    assert ask("broken.example.com", "A")[:2] == ("SERVFAIL", [])
    assert ask("inside.example.com", "A") == ("SERVFAIL", [], "15 (Blocked)")
    assert ask("rebound.example.com", "AAAA") == ("SERVFAIL", [], "15 (Blocked)")
    assert ask("private.example.com", "A") == ("NOERROR", ["198.18.0.36"], "")
    assert ask("static.example.com", "A") == ("NOERROR", ["198.18.0.40"], "")
    assert ask("ollama", "A") == ("NOERROR", ["198.18.0.160"], "")
    assert ask("ollama", "AAAA") == ("NOERROR", ["fd53:e9::a0"], "")
    assert ask("localhost", "AAAA") == ("NOERROR", ["::1"], "")
    assert ask("api.example.com", "HTTPS")[:2] == ("NOERROR", [])
    assert ask("api.example.com", "MX") == ("NOERROR", [], "21 (Not Supported)")
    assert ask("api.example.com", "ANY") == ("NOERROR", ['"RFC8482" ""'], "")
    assert ask("4.0.18.198.in-addr.arpa", "PTR") == ("NOERROR", ["api.example.com."], "")
    assert ask("other.example", "A") == ("NXDOMAIN", [], "15 (Blocked)")
    assert ask("x.api.example.com", "TXT") == ("NXDOMAIN", [], "15 (Blocked)")


def test_the_controller_was_told_where_slots_lead(scene: Scene) -> None:
    scene.dig("api.example.com")
    told = {r.host: r for r in scene.controller.resolved}
    assert len(told) == len(HOSTS) == len(scene.controller.resolved)
    assert [str(a) for a in told["api.example.com"].slots4] == ["93.184.215.14", "93.184.215.15"] * 2
    assert [str(a) for a in told["api.example.com"].slots6] == ["2606:2800::1"] * 4
    assert [str(a) for a in told["private.example.com"].slots4] == ["10.0.0.6"] * 4
    assert told["private.example.com"].private
    assert told["inside.example.com"].slots4 == (None,) * 4
    refused = {(e["name"], e["address"], e["kind"]) for e in scene.named("dns-refused-address")}
    assert refused == {
        ("inside.example.com", "10.0.0.5", "private"),
        ("rebound.example.com", "169.254.169.254", "metadata"),
        ("private.example.com", "127.0.0.1", "loopback"),
    }


def test_the_case_of_the_question_comes_back(scene: Scene) -> None:
    for _ in range(2):  # the second comes from the dictionary
        text = scene.dig("aPi.ExAmPlE.cOm").text
        assert (
            text.count("\naPi.ExAmPlE.cOm.") + text.count("\n;aPi.ExAmPlE.cOm.") == 3
        )  # question, two owners


def test_a_thousand_queries_for_listed_names_cause_no_upstream_query(
    scene: Scene, authority: Authority
) -> None:
    scene.dig("broken.example.com")
    asked = {(name, qtype) for name, qtype, _, _ in authority.asked}
    assert asked == {(h, t) for h in HOSTS if h != "static.example.com" for t in ("A", "AAAA")}
    before = [a for a in authority.asked if a[0] != "broken.example.com"]  # that one is retried by itself
    with client(scene, SANDBOX4) as sock:
        for number in range(1000):
            name = ["api.example.com", f"secret{number}.example.com", "nobody.example.com"][number % 3]
            sock.send(question(name, ["A", "AAAA", "TXT", "HTTPS"][number % 4], number=number))
            sock.recv(4096)
    assert [a for a in authority.asked if a[0] != "broken.example.com"] == before
    assert all(dnslib.DNSRecord.parse(d).ar[0].rdata == [] for d in authority.raw)


def test_upstream_questions_have_ports_and_ids_of_their_own(scene: Scene, authority: Authority) -> None:
    scene.dig("api.example.com")
    ports, ids = {p for _, _, p, _ in authority.asked}, {i for _, _, _, i in authority.asked}
    assert len(authority.asked) >= 18
    # Twenty draws of 28,000 ports and 65,536 ids: a collision or two may happen, a fixed one may not.
    assert len(ports) > 14
    assert len(ids) > 14


def client(scene: Scene, source: str, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, kind)
        sock.settimeout(6)
        sock.bind((source, 0))
        sock.connect((str(RESOLVER6 if ":" in source else RESOLVER4), 53))
        return sock

    made: socket.socket = scene.namespace.run(connect)
    return made


def question(name: str, qtype: str = "A", *, number: int = 1, edns: bool = True) -> bytes:
    record = dnslib.DNSRecord.question(name, qtype)
    record.header.id = number
    if edns:
        record.add_ar(dnslib.EDNS0(udp_len=1232, opts=[dnslib.EDNSOption(8, b"\0\1\x20\0\1\2\3\4")]))
    return bytes(record.pack())


# ---- record, admit, answer


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_no_answer_before_the_kernel_has_it(namespace: Namespace, authority: Authority, source: str) -> None:
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.verdict = lambda _: None
        scene.controller.names(ACME)
        scene.controller.bind()
        with client(scene, source) as sock:
            sock.send(question("api.example.com"))
            eventually(lambda: len(scene.controller.held) == len(HOSTS))
            assert {e["name"] for e in scene.named("dns-resolved")} == set(
                HOSTS
            )  # recorded before it was asked
            sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                sock.recv(4096)
            scene.controller.release()
            sock.settimeout(5)
            answer = dnslib.DNSRecord.parse(sock.recv(4096))
            assert [str(rr.rdata) for rr in answer.rr] == ["198.18.0.4", "198.18.0.5"]
    finally:
        scene.close()


def test_waiting_is_bounded(namespace: Namespace, authority: Authority) -> None:
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.verdict = lambda _: None
        scene.controller.names(ACME)
        scene.controller.bind()
        begun = time.monotonic()
        found = scene.dig("api.example.com")
        assert (found.status, found.data) == ("SERVFAIL", [])
        assert found.extended == "14 (Not Ready): (api.example.com has not been resolved yet)"
        assert 3.5 < time.monotonic() - begun < 5
    finally:
        scene.close()


def test_withheld_is_a_failure_until_the_kernel_takes_it(namespace: Namespace, authority: Authority) -> None:
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.verdict = lambda _: False
        scene.controller.names(ACME)
        scene.controller.bind()
        eventually(lambda: any(e["name"] == "api.example.com" for e in scene.named("dns-withheld")))
        for source in SOURCES:
            found = scene.dig("api.example.com", source=source)
            assert (found.status, found.data) == ("SERVFAIL", [])
            assert found.extended == "14 (Not Ready): (api.example.com is not admitted: no kernel)"
        scene.controller.verdict = lambda _: True
        eventually(lambda: scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"])
    finally:
        scene.close()


def test_a_new_controller_is_told_again_and_binds_again(scene: Scene) -> None:
    assert scene.dig("api.example.com").data
    scene.new_controller()
    eventually(lambda: len(scene.controller.resolved) == len(HOSTS))
    assert scene.dig("api.example.com").data  # whom it will not name is not known yet
    scene.controller.bind()
    scene.controller.names(ACME)
    assert scene.dig("api.example.com").data


def test_whom_a_new_controller_does_not_name_has_ended(scene: Scene) -> None:
    assert scene.dig("api.example.com").data
    scene.new_controller()
    scene.controller.names(ACME)
    assert scene.dig("api.example.com").status == "REFUSED"
    scene.controller.bind()
    assert scene.dig("api.example.com").data


def test_while_the_controller_is_gone_known_names_are_answered(scene: Scene) -> None:
    assert scene.dig("api.example.com").data
    scene.controller.channel.socket.shutdown(socket.SHUT_RDWR)
    assert scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"]
    assert scene.dig("other.example").status == "NXDOMAIN"


def test_a_policy_change_takes_effect_with_its_acknowledgement(scene: Scene) -> None:
    assert scene.dig("api.example.com").data
    scene.controller.names(
        WorkspaceNames(workspace="acme", guard="enforce", hosts={"four.example.com": (2, False)})
    )
    assert scene.dig("api.example.com").status == "NXDOMAIN"
    assert scene.dig("ollama").status == "NXDOMAIN"
    assert scene.dig("four.example.com").data == ["198.18.0.8"]
    scene.controller.names(ACME)
    assert scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"]
    scene.controller.names()
    assert scene.dig("api.example.com").status == "SERVFAIL"


def test_a_broken_list_leaves_the_old_one(scene: Scene) -> None:
    for bad in (b"[ ", b"[1]", b'[{"workspace": "acme", "guard": "open"}]'):
        reply = scene.controller.raw_names(bad)
        assert (type(reply).__name__, reply.reason) == ("Failed", "protocol")
    assert scene.dig("api.example.com").data


# ---- who asks


@pytest.mark.parametrize("road", ROADS, ids=["udp", "tcp"])
@pytest.mark.parametrize("source", [STRANGER4, STRANGER6], ids=["v4", "v6"])
def test_a_source_that_is_nobodys_is_refused_and_recorded(
    scene: Scene, source: str, road: tuple[str, ...]
) -> None:
    found = scene.dig("api.example.com", "A", *road, source=source)
    assert (found.status, found.data) == ("REFUSED", [])
    assert found.extended == f"18 (Prohibited): ({source} is not the address of a sandbox)"
    event = eventually(lambda: scene.named("dns-unknown-source"))[0]
    assert (event["link"], event["name"], event["reason"], event["count"]) == (None, source, "source", 1)


def test_bound_and_unbound(scene: Scene) -> None:
    second = WorkspaceNames(workspace="zeta", guard="enforce", hosts={"four.example.com": (77, False)})
    scene.controller.names(ACME, second)
    scene.controller.bind(2, "zeta")
    assert scene.dig("four.example.com", source="198.19.0.2").data == ["198.18.1.52"]
    assert scene.dig("four.example.com", source="fd53:1::2").data == ["198.18.1.52"]
    assert scene.dig("four.example.com").data == ["198.18.0.8"]
    assert scene.dig("api.example.com", source="198.19.0.2").status == "NXDOMAIN"
    scene.controller.unbind(2)
    assert scene.dig("four.example.com", source="198.19.0.2").status == "REFUSED"
    assert scene.dig("four.example.com").data == ["198.18.0.8"]


def test_denials_are_recorded_and_floods_counted_exactly(scene: Scene) -> None:
    with client(scene, SANDBOX6) as sock:
        for number in range(50):
            sock.send(question("evil.example", "TXT", number=number))
            sock.recv(4096)
    events = eventually(
        lambda: sum(e["count"] for e in scene.named("dns-denied")) == 50 and scene.named("dns-denied")
    )
    assert len(events) <= 3
    fields = {k: events[0][k] for k in ("link", "workspace", "name", "type", "reason")}
    assert fields == {
        "link": "eg1",
        "workspace": "acme",
        "name": "evil.example",
        "type": "TXT",
        "reason": "name",
    }


def test_who_asks_what_was_refused_finds_it_on_record(scene: Scene) -> None:
    """A proof may be made of it: nothing waits for the end of its second."""
    with client(scene, SANDBOX4) as sock:
        for number in range(3):
            sock.send(question("evil.example", number=number))
            sock.recv(4096)
    counts = scene.controller.ask(messages.ReadRefused(request=77)).counts
    assert counts["acme"] == {"name": 3}
    [told] = eventually(lambda: scene.named("dns-denied"), within=0.4)
    assert told["count"] == 3


def test_fresh_names_without_end_are_counted_to_the_last(scene: Scene) -> None:
    with client(scene, SANDBOX4) as sock:
        for number in range(1000):
            sock.send(question(f"n{number}.evil.example", number=number))
            sock.recv(4096)
    eventually(lambda: sum(e["count"] for e in scene.named("dns-denied")) == 1000)
    assert len(scene.named("dns-denied")) < 400


# ---- bad manners


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_garbage_does_not_stop_it(scene: Scene, source: str) -> None:
    with client(scene, source) as sock:
        for size in [*range(64), 500, 1400, 4000]:
            sock.send(os.urandom(size))
        sock.send(b"\x00\x07\x01\x00" + b"\x00" * 8)  # no question
        while True:
            answer = sock.recv(4096)
            if answer[:2] == b"\x00\x07":
                break
        assert answer[3] & 0xF == 1
    with client(scene, source, socket.SOCK_STREAM) as sock:
        sock.sendall(os.urandom(70_000))
    with client(scene, source, socket.SOCK_STREAM) as sock:
        sock.sendall(b"\xff\xff" + b"x" * 100)
        assert scene.dig("api.example.com", source=source).data == ["198.18.0.4", "198.18.0.5"]
    assert scene.process.poll() is None


@pytest.mark.parametrize(
    ("option", "status"),
    [
        ("+edns=1", "BADVERS"),
        ("+opcode=2", "NOTIMP"),
        ("+opcode=5", "NOTIMP"),
        ("+header-only", "FORMERR"),
    ],
)
def test_what_is_not_done_is_said(scene: Scene, option: str, status: str) -> None:
    for source in SOURCES:
        found = scene.dig("api.example.com", "A", "+noednsnegotiation", option, source=source)
        assert found.status == status, found.text


@pytest.mark.parametrize(("qtype", "qclass"), [("TXT", 3), ("A", 4), ("A", 255), ("AXFR", 1), ("IXFR", 1)])
def test_other_classes_and_transfers_are_refused(scene: Scene, qtype: str, qclass: int) -> None:
    record = dnslib.DNSRecord.question("api.example.com", qtype)
    record.q.qclass = qclass
    for source in SOURCES:
        with client(scene, source) as sock:
            sock.send(record.pack())
            assert dnslib.DNSRecord.parse(sock.recv(4096)).header.rcode == 5


def stream_ask(sock: socket.socket, *data: bytes) -> list[dnslib.DNSRecord]:
    sock.sendall(b"".join(struct.pack("!H", len(d)) + d for d in data))
    with sock.makefile("rb") as reader:
        return [dnslib.DNSRecord.parse(reader.read(int.from_bytes(reader.read(2), "big"))) for _ in data]


@pytest.mark.parametrize("source", SOURCES, ids=["v4", "v6"])
def test_tcp_carries_many_questions_at_once(scene: Scene, source: str) -> None:
    scene.dig("api.example.com")
    with client(scene, source, socket.SOCK_STREAM) as sock:
        names = ["api.example.com", "other.example", "four.example.com"] * 100
        answers = stream_ask(sock, *(question(n, number=i) for i, n in enumerate(names)))
        assert sorted(a.header.id for a in answers) == list(range(300))
        by_id = {a.header.id: a for a in answers}
        assert all(str(by_id[i].q.qname) == f"{n}." for i, n in enumerate(names))


def test_a_waiting_question_does_not_hold_up_those_behind_it(
    namespace: Namespace, authority: Authority
) -> None:
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.verdict = lambda r: None if r.host == "api.example.com" else True
        scene.controller.names(ACME)
        scene.controller.bind()
        with client(scene, SANDBOX4, socket.SOCK_STREAM) as sock:
            slow, quick = question("api.example.com", number=1), question("four.example.com", number=2)
            sock.sendall(b"".join(struct.pack("!H", len(d)) + d for d in (slow, quick)))
            with sock.makefile("rb") as reader:
                first = dnslib.DNSRecord.parse(reader.read(int.from_bytes(reader.read(2), "big")))
                assert first.header.id == 2
                scene.controller.release()
                second = dnslib.DNSRecord.parse(reader.read(int.from_bytes(reader.read(2), "big")))
                assert second.header.id == 1
    finally:
        scene.close()


def test_seventeen_connections_are_one_too_many_for_one_sandbox_alone(scene: Scene) -> None:
    scene.controller.bind(2)
    open_ones = [client(scene, SANDBOX4, socket.SOCK_STREAM) for _ in range(16)]
    for sock in open_ones:
        assert stream_ask(sock, question("api.example.com"))[0].rr
    with client(scene, SANDBOX4, socket.SOCK_STREAM) as extra:
        assert _ended(extra)
    assert eventually(lambda: scene.named("dns-connections"))[0]["link"] == "eg1"
    assert scene.dig("api.example.com", "A", "+tcp", source="198.19.0.2").data
    assert scene.dig("api.example.com", "A", "+tcp", source=SANDBOX6).data  # counted per address
    assert scene.dig("api.example.com").data
    for sock in open_ones:
        sock.close()
    eventually(lambda: scene.dig("api.example.com", "A", "+tcp").data)


def _ended(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"\0")
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_a_flood_of_one_does_not_stop_another(scene: Scene) -> None:
    scene.controller.bind(2)
    assert scene.dig("api.example.com").data
    with client(scene, SANDBOX4) as flood:
        flood.setblocking(False)
        for number in range(20_000):
            try:
                flood.send(
                    question("evil.example", number=number & 0xFFFF) if not number % 100 else b"x" * 40
                )
            except OSError:
                continue
    assert scene.dig("api.example.com", source="198.19.0.2").data
    assert scene.process.poll() is None


@pytest.mark.slow
def test_idle_connections_are_closed(scene: Scene) -> None:
    with client(scene, SANDBOX4, socket.SOCK_STREAM) as sock:
        sock.settimeout(15)
        begun = time.monotonic()
        assert sock.recv(1) == b""
        assert 9 < time.monotonic() - begun < 12


# ---- upstream


def test_forged_answers_are_ignored(namespace: Namespace, authority: Authority) -> None:
    forger = namespace.run(_forger)

    def forge(authority: Authority, reply: dnslib.DNSRecord, place: Any) -> None:
        bad = dnslib.DNSRecord.parse(reply.pack())
        for record in bad.rr:
            record.rdata = dnslib.A("203.0.113.66") if record.rtype == 1 else dnslib.AAAA("2001:db8::66")
        whole = bad.pack()
        wrong_id = bytes([whole[0] ^ 0xFF]) + whole[1:]
        wrong_question = whole.replace(b"\x07example", b"\x07fxample")
        for data in (wrong_id, wrong_question, b"", whole[:20], os.urandom(60)):
            authority.udp.sendto(data, place)
        forger[0].sendto(whole, place)  # another port
        forger[1].sendto(whole, place)  # another address
        time.sleep(0.05)

    authority.tricks.append(forge)
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.names(
            WorkspaceNames(workspace="acme", guard="enforce", hosts={"api.example.com": (1, False)})
        )
        scene.controller.bind()
        assert scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"]
        (told,) = scene.controller.resolved
        assert {str(a) for a in told.slots4} == {"93.184.215.14", "93.184.215.15"}
        assert {str(a) for a in told.slots6} == {"2606:2800::1"}
        assert len(authority.asked) == 2
    finally:
        scene.close()
        for sock in forger:
            sock.close()


def _forger() -> list[socket.socket]:
    made = []
    for place in [(UPSTREAM, 5399), ("127.0.0.54", 5300)]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(place)
        made.append(sock)
    return made


def test_truncated_comes_again_over_tcp(namespace: Namespace, authority: Authority) -> None:
    authority.truncate = True
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.names(
            WorkspaceNames(workspace="acme", guard="enforce", hosts={"api.example.com": (1, False)})
        )
        scene.controller.bind()
        assert scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"]
        assert (len(authority.asked), authority.connections) == (4, 1)  # both families over one connection
    finally:
        scene.close()


def test_the_second_server_answers_when_the_first_does_not(
    namespace: Namespace, authority: Authority
) -> None:
    config = {"upstream": [f"udp://{UPSTREAM}:5999", f"tcp://{UPSTREAM}:5300"]}  # nobody listens on the first
    scene = Scene(namespace, **config)
    try:
        scene.controller.names(
            WorkspaceNames(workspace="acme", guard="enforce", hosts={"api.example.com": (1, False)})
        )
        scene.controller.bind()
        assert scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"]
        assert authority.connections == 1
        assert scene.open_outside_sockets() != []  # so the air-gapped test below could fail
    finally:
        scene.close()


def test_upstream_gone_at_first_then_there(namespace: Namespace) -> None:
    scene = Scene(namespace, **CONFIG)
    try:
        scene.controller.names(ACME)
        scene.controller.bind()
        found = scene.dig("api.example.com")
        assert (found.status, found.extended.split(":")[0]) == ("SERVFAIL", "23 (Network Error)")
        assert scene.dig("static.example.com").data == ["198.18.0.40"]
        assert "api.example.com" in {e["name"] for e in scene.named("dns-upstream-failed")}
        authority = Authority(namespace, zone=dict(ZONE))
        try:
            eventually(lambda: scene.dig("api.example.com").data == ["198.18.0.4", "198.18.0.5"], within=10)
        finally:
            authority.close()
    finally:
        scene.close()


def test_silent_upstream_is_unreachable_authority(namespace: Namespace, authority: Authority) -> None:
    authority.silent = True
    scene = Scene(namespace, upstream=[f"udp://{UPSTREAM}:5300"])
    try:
        scene.controller.names(
            WorkspaceNames(workspace="acme", guard="enforce", hosts={"api.example.com": (1, False)})
        )
        scene.controller.bind()
        found = scene.dig("api.example.com")
        assert (found.status, found.extended.split(":")[0]) == ("SERVFAIL", "22 (No Reachable Authority)")
    finally:
        scene.close()


def test_air_gapped_opens_no_socket_to_the_outside(namespace: Namespace, authority: Authority) -> None:
    scene = Scene(namespace, upstream=[], hosts=CONFIG["hosts"])
    try:
        off = WorkspaceNames(workspace="off", guard="off")
        scene.controller.names(ACME, off)
        scene.controller.bind()
        scene.controller.bind(2, "off")
        assert scene.dig("static.example.com").data == ["198.18.0.40"]
        found = scene.dig("api.example.com")
        assert (found.status, found.extended.split(":")[0]) == ("SERVFAIL", "22 (No Reachable Authority)")
        assert scene.dig("open.example", source="198.19.0.2").status == "SERVFAIL"
        assert scene.dig("static.example.com", source="198.19.0.2").data == ["93.184.215.99"]
        assert scene.open_outside_sockets() == []
        assert authority.asked == []
    finally:
        scene.close()


@pytest.mark.parametrize("guard", ["off", "observe"])
def test_an_open_guard_answers_with_real_addresses_but_not_with_our_own(scene: Scene, guard: Any) -> None:
    scene.controller.names(
        WorkspaceNames(workspace="acme", guard=guard, hosts={"api.example.com": (1, False)})
    )
    for source in SOURCES:
        assert scene.dig("open.example", "A", source=source).data == ["93.184.215.20", "10.9.9.9"]
        assert scene.dig("open.example", "AAAA", source=source).data == ["2606:2800::20"]
        assert scene.dig("api.example.com", "A", source=source).data == ["198.18.0.4", "198.18.0.5"]
        assert scene.dig("nowhere.example", "A", source=source).status == "NXDOMAIN"
        for qtype in ("A", "AAAA"):
            found = scene.dig("loop.example", qtype, source=source)
            assert (found.status, found.extended.split(":")[0]) == ("SERVFAIL", "15 (Blocked)")
    if guard == "observe":
        seen = eventually(
            lambda: {e["name"] for e in scene.named("dns-would-deny")} >= {"open.example", "loop.example"}
        )
        assert seen
    else:
        assert scene.named("dns-would-deny") == []
    assert scene.named("dns-denied") == []


@pytest.fixture(scope="module")
def authorities() -> Iterator[tuple[Path, Path]]:
    """A private CA's certificate, and a key with certificate for dns.example."""
    with tempfile.TemporaryDirectory(prefix="egressd-resolver-") as made:
        Path(made).chmod(0o755)  # the process reads it as another user
        yield make_certificates(Path(made), "dns.example")


def make_certificates(where: Path, name: str) -> tuple[Path, Path]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(subject: str, public: Any, *, issuer: str, key: Any, ca: bool) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        )
        return builder.sign(key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate("ca.example", ca_key.public_key(), issuer="ca.example", key=ca_key, ca=True)
    leaf = certificate(name, key.public_key(), issuer="ca.example", key=ca_key, ca=False)
    pem = serialization.Encoding.PEM
    (where / "ca.pem").write_bytes(root.public_bytes(pem))
    (where / "leaf.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(pem)
    )
    return where / "ca.pem", where / "leaf.pem"


@pytest.mark.parametrize(
    ("name", "trusted", "status"),
    [
        ("dns.example", True, "NOERROR"),
        ("other.example", True, "SERVFAIL"),
        ("dns.example", False, "SERVFAIL"),
    ],
)
def test_tls_checks_the_certificate_and_keeps_the_connection(
    namespace: Namespace, authorities: tuple[Path, Path], name: str, trusted: bool, status: str
) -> None:
    ca, leaf = authorities
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf)
    config: dict[str, Any] = {"upstream": [f"tls://{name}@{UPSTREAM}:8853"]}
    config |= {"upstream_ca": str(ca)} if trusted else {}
    names = {"api.example.com": (1, False), "four.example.com": (2, False)}
    with (
        contextlib.closing(Authority(namespace, port=8853, tls=context, zone=dict(ZONE))) as authority,
        contextlib.closing(Scene(namespace, **config)) as scene,
    ):
        scene.controller.names(WorkspaceNames(workspace="acme", guard="enforce", hosts=names))
        scene.controller.bind()
        found = scene.dig("api.example.com")
        assert found.status == status
        if status == "NOERROR":
            assert scene.dig("four.example.com").data == ["198.18.0.8"]
            assert (len(authority.asked), authority.connections) == (4, 1)
        else:
            assert "certificate" in found.extended
            assert authority.asked == []


# ---- rights


def test_it_has_no_rights_left(scene: Scene) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{scene.process.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split() == [str(UID)] * 4
    assert {status[k] for k in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_it_says_that_it_lives(scene: Scene) -> None:
    eventually(lambda: scene.heartbeats >= 1)
