"""Two names on one address behind one server, one allowed: the other is out of reach by any ClientHello. The
servers and the capture are the judges: for what is refused, not one packet goes to the address."""

from __future__ import annotations

import json
import signal
import ssl
from typing import Any

import pytest

from integration.hellos import BENT, hello, records
from lab import topology as t
from lab.machine import poll

MINE, OTHER = "one.cdn.test", "two.cdn.test"
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - host: one.cdn.test
  - {host: eu.api.openai.test, ech: allow}
  - {host: plain.test, ports: [8443/tls, 7/tcp]}
  - {host: "*.search.test", ports: [443/tcp]}
"""
# Runs inside: one line of JSON in, one out. [name, family, port, [pieces in hex], seconds between them]
SEND = r"""
import json, socket, sys, time
for line in sys.stdin:
    name, family, port, pieces, pause = json.loads(line)
    began = time.monotonic()
    try:
        found = socket.getaddrinfo(name, port, {4: 2, 6: 10}[family], socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(15)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(address)
            for piece in pieces:
                sock.sendall(bytes.fromhex(piece))
                time.sleep(pause)
            said = sock.recv(65536)
        result = said[:1].hex() if said else "closed"
    except (ConnectionResetError, BrokenPipeError):
        result = "reset"
    except OSError as error:
        result = str(error)
    print(json.dumps([result, time.monotonic() - began]), flush=True)
"""
FAMILIES = pytest.mark.parametrize("family", [4, 6])
SERVER_SPOKE = ("16", "15")  # a handshake record, or an alert: the server's own words


class Sender:
    """A sandbox that sends what it is told."""

    def __init__(self, daemon: Any, workspace: str = "acme") -> None:
        self.process = daemon.start_sandbox(workspace, ["/usr/bin/python3", "-I", "-c", SEND])
        self._said = 0

    def send(
        self, *pieces: bytes, name: str = MINE, family: int = 4, port: int = 443, pause: float = 0.0
    ) -> str:
        return self.timed(*pieces, name=name, family=family, port=port, pause=pause)[0]

    def timed(
        self, *pieces: bytes, name: str = MINE, family: int = 4, port: int = 443, pause: float = 0.0
    ) -> tuple[str, float]:
        request = [name, family, port, [piece.hex() for piece in pieces], pause]
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self._said += 1
        poll(lambda: self.process.out.count("\n") >= self._said, timeout=40, what="the sandbox's answer")
        result, seconds = json.loads(self.process.out.splitlines()[self._said - 1])
        return result, seconds

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


@pytest.fixture(scope="module")
def sender(daemon: Any) -> Any:
    made = Sender(daemon)
    yield made
    made.close()


def refused(daemon: Any) -> dict[str, int]:
    return dict(daemon.counters("acme")["flows_refused"])


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {
        reason: after[reason] - before.get(reason, 0)
        for reason in after
        if after[reason] != before.get(reason)
    }


def address(family: int) -> Any:
    return t.CDN4 if family == 4 else t.CDN6


@FAMILIES
@pytest.mark.parametrize("what", list(BENT(MINE, OTHER)))
def test_what_is_not_exactly_the_name_is_reset_and_never_leaves(
    daemon: Any, sender: Sender, internet: Any, uplink: Any, what: str, family: int
) -> None:
    data, reason = BENT(MINE, OTHER)[what]
    before, since = refused(daemon), uplink.settle()
    result, seconds = sender.timed(data, family=family)
    assert result == "reset", f"{what}: {result}"
    assert seconds < 1.0, f"{what}: only after {seconds:.1f} s"
    uplink.assert_nothing_to(address(family), since=since)
    assert internet.seen(port=443) == []
    found = grown(before, refused(daemon))
    assert sum(found.values()) == 1 and (not reason or found == {reason: 1}), found


@FAMILIES
def test_the_name_itself_gets_through_however_it_is_cut(
    daemon: Any, sender: Sender, internet: Any, family: int
) -> None:
    whole = hello(MINE)
    message = whole[5:]
    cuts = {
        "whole": [whole],
        "two segments": [whole[:100], whole[100:]],
        "byte by byte": [whole[at : at + 1] for at in range(len(whole))],
        "two records": [records(message, 60)],
        "a record a byte": [records(message, *[1] * 100)],
        "upper case": [hello(MINE.upper())],
        "TLS 1.2": [hello(MINE, version=ssl.TLSVersion.TLSv1_2)],
    }
    results = {what: sender.send(*pieces, family=family, pause=0.0005) for what, pieces in cuts.items()}
    assert set(results.values()) <= set(SERVER_SPOKE), results
    names = {entry.name.lower() for entry in internet.seen(port=443)}
    assert names == {MINE}


@FAMILIES
def test_the_other_name_has_no_address_at_all(
    daemon: Any, sender: Sender, internet: Any, family: int
) -> None:
    assert "not known" in sender.send(hello(OTHER), name=OTHER, family=family)
    assert internet.seen(port=443) == []


@FAMILIES
def test_encrypted_hellos_pass_only_where_the_policy_says_so(
    daemon: Any, sender: Sender, internet: Any, family: int
) -> None:
    """`ech: allow` is for one host, and still wants the outer name to be its own."""
    allowed = "eu.api.openai.test"
    data = {what: data for what, (data, _) in BENT(allowed, OTHER).items()}
    assert sender.send(data["encrypted"], name=allowed, family=family) in SERVER_SPOKE
    internet.forget()
    before = refused(daemon)
    assert sender.send(data["the other name"], name=allowed, family=family) == "reset"
    assert internet.seen(port=443) == []
    assert grown(before, refused(daemon)) == {"sni-other": 1}


@FAMILIES
def test_a_port_marked_tls_and_a_port_that_is_not(
    daemon: Any, sender: Sender, internet: Any, family: int
) -> None:
    assert sender.send(hello("plain.test"), name="plain.test", port=8443, family=family) in SERVER_SPOKE
    assert sender.send(hello(OTHER), name="plain.test", port=8443, family=family) == "reset"
    # 7/tcp goes by its address: an echo, whatever is said
    assert sender.send(hello(OTHER), name="plain.test", port=7, family=family) == "16"


@FAMILIES
def test_each_name_of_a_wildcard_is_held_to_itself(
    daemon: Any, sender: Sender, internet: Any, family: int
) -> None:
    assert sender.send(hello("a.search.test"), name="a.search.test", family=family) in SERVER_SPOKE
    before = refused(daemon)
    assert sender.send(hello("b.search.test"), name="a.search.test", family=family) == "reset"
    assert grown(before, refused(daemon)) == {"sni-other": 1}


def test_a_hello_that_never_ends_is_ended(daemon: Any, sender: Sender, internet: Any) -> None:
    before = refused(daemon)
    result, seconds = sender.timed(hello(MINE)[:50])
    assert result == "reset" and 2 < seconds < 14, (result, seconds)
    assert grown(before, refused(daemon)) == {"hello-too-slow": 1}
    long = b"".join(b"\x16\x03\x01\x40\x00" + bytes(1 << 14) for _ in range(8))
    assert sender.send(b"\x16\x03\x01\x40\x00\x01\x01\xff\xff" + long) == "reset"
    assert internet.seen(port=443) == []


def test_a_real_client_works_and_is_held_to_the_name(daemon: Any, internet: Any) -> None:
    ca = daemon.lab.inside("ca.pem")
    curl = ["/usr/bin/curl", "-sS", "--max-time", "10", "--cacert", ca]
    shown = ("--bind-ro", daemon.lab.inside(""))
    for family in ("-4", "-6"):
        result = daemon.sandbox("acme", [*curl, family, f"https://{MINE}/"], *shown)
        assert result.status == 0, result.err
    internet.forget()
    found = daemon.sandbox("acme", ["/usr/bin/getent", "ahostsv4", MINE]).out.split()[0]
    result = daemon.sandbox("acme", [*curl, "--resolve", f"{OTHER}:443:{found}", f"https://{OTHER}/"], *shown)
    assert result.status == 35, f"curl: {result.status} {result.err}"
    assert internet.seen(port=443) == []


def test_counters_and_records_tell_what_was_asked(daemon: Any, sender: Sender, internet: Any) -> None:
    sender.send(hello(OTHER))
    sender.send(hello(MINE))
    account = daemon.counters("acme")
    assert account["balance"]["balanced"], account["balance"]
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")

    def told() -> bool:
        lines = [line for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]
        return any("sni-other" in line and OTHER in line for line in lines)

    poll(told, what="the record of what was asked")


@pytest.mark.parametrize("guard", ["observe", "off"])
def test_a_guard_that_restricts_nothing_reads_nothing(
    daemon: Any, sender: Sender, internet: Any, guard: str
) -> None:
    daemon.policy("acme", POLICY.replace("guard: enforce", f"guard: {guard}"))
    try:
        assert sender.send(hello(OTHER)) in SERVER_SPOKE
        assert [entry.name for entry in internet.seen(port=443)] == [OTHER]
    finally:
        daemon.policy("acme", POLICY)
    internet.forget()
    assert sender.send(hello(OTHER)) == "reset"
    assert internet.seen(port=443) == []


# Runs inside: opens a connection, and after a line from outside sends on it; prints how that ended.
STAY = r"""
import socket, sys
family, port = {"4": 2, "6": 10}[sys.argv[1]], int(sys.argv[2])
address = socket.getaddrinfo(sys.argv[3], port, family, socket.SOCK_STREAM)[0][4]
with socket.socket(family, socket.SOCK_STREAM) as sock:
    sock.settimeout(10)
    sock.connect(address)
    sock.sendall(b"before")
    print(sock.recv(100), flush=True)
    sys.stdin.readline()
    try:
        sock.sendall(b"after")
        print(sock.recv(100) or "closed", flush=True)
    except ConnectionResetError:
        print("reset", flush=True)
    except OSError as error:
        print(error, flush=True)
"""


@FAMILIES
def test_a_connection_opened_unread_ends_when_its_port_is_to_be_read(
    daemon: Any, internet: Any, family: int
) -> None:
    """And at once: nobody knows what was said on it."""
    words = ["/usr/bin/python3", "-I", "-c", STAY, str(family), "7", "plain.test"]
    process = daemon.start_sandbox("acme", words)
    poll(lambda: "before" in process.out, timeout=10, what="the connection")
    daemon.policy("acme", POLICY.replace("7/tcp]", "7/tls]"))
    try:
        process.stdin.write(b"on\n")
        process.wait(5)
    finally:
        daemon.policy("acme", POLICY)
    assert process.out.splitlines()[-1] == "reset", process.out
    assert [entry.data for entry in internet.seen(port=7)] == ["before"]


# Runs inside: one TLS connection; for each line from outside a request on it, and its status printed.
KEPT = r"""
import http.client, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
connection = http.client.HTTPSConnection(sys.argv[1], timeout=10, context=context)
connection.connect()
port = connection.sock.getsockname()[1]
for line in sys.stdin:
    connection.request("GET", "/")
    answer = connection.getresponse()
    answer.read()
    print(answer.status, connection.sock.getsockname()[1] == port, flush=True)
"""


@pytest.mark.parametrize("name", ["warden", "resolver", "relay", "auditor"])
def test_a_connection_that_is_read_survives_the_other_processes(
    daemon: Any, internet: Any, name: str
) -> None:
    ca = daemon.lab.inside("ca.pem")
    words = ["/usr/bin/python3", "-I", "-c", KEPT, MINE, ca]
    process = daemon.start_sandbox("acme", words, "--bind-ro", daemon.lab.inside(""))

    def answered(count: int) -> None:
        process.stdin.write(b"again\n")
        poll(lambda: process.out.count("\n") >= count, timeout=10, what=f"an answer; {process.err}")

    answered(1)
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGKILL)
    answered(2)  # while it is gone, or hardly back
    poll(lambda: daemon.pids().get(name, before) != before, timeout=10, what=f"another {name}")
    states = {"running"}
    poll(lambda: {p["state"] for p in daemon.json("status")["processes"]} == states, timeout=10)
    answered(3)
    process.stdin.close()
    process.wait(10)
    assert process.out.split("\n")[:3] == ["200 True"] * 3, process.out + process.err
    assert len(internet.seen(port=443)) == 1
