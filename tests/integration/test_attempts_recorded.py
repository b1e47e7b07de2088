"""The journal names the process inside that tried what was refused, beside the gateway's own record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lab import topology as t
from lab.machine import poll

POLICY = """
workspace: acme
guard: {guard}
members: [user:4001]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
  - {{cidr: 10.20.0.0/24, ports: [7/tcp]}}
"""
CONNECT = "import socket; socket.socket({family}).connect(({host!r}, 25))"
SEND = "import socket, time; s = socket.socket({family}, 2); s.sendto(b'x', ({host!r}, 25)); time.sleep(0.05)"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY.format(guard="enforce")})


def records(daemon: Any, event: str) -> list[dict[str, Any]]:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record["fields"] for line in lines if (record := json.loads(line))["event"] == event]


def attempts_of(daemon: Any, argv: list[str]) -> list[dict[str, Any]]:
    """What the journal has of a sandbox that ran this, when that has ended."""
    before = {fields["link"] for fields in records(daemon, "sandbox-closed")}
    daemon.sandbox("acme", argv)
    poll(lambda: {f["link"] for f in records(daemon, "sandbox-closed")} > before, timeout=10)
    [link] = {fields["link"] for fields in records(daemon, "sandbox-closed")} - before
    return [fields for fields in records(daemon, "attempt") if fields["link"] == link]


@pytest.mark.parametrize("url", ["http://10.1.2.3/", "http://[2001:db8:dead::1]/"])
def test_a_short_lived_curl_is_named(daemon: Any, url: str) -> None:
    [attempt] = attempts_of(daemon, ["curl", "-sS", url])
    assert attempt.pop("link").startswith("eg")
    assert attempt == {
        "workspace": "acme",
        "protocol": "tcp",
        "destination": url.removeprefix("http://").strip("/[]"),
        "port": 80,
        "pid": 2,
        "executable": "/usr/bin/curl",
        "command": f"curl -sS {url}" if "[" not in url else f"curl -sS '{url}'",
    }


@pytest.mark.parametrize(("family", "host"), [(2, str(t.EVIL4)), (10, str(t.EVIL6))])
@pytest.mark.parametrize(("protocol", "script"), [("tcp", CONNECT), ("udp", SEND)])
def test_python_is_named(daemon: Any, family: int, host: str, protocol: str, script: str) -> None:
    text = script.format(family=family, host=host)
    [attempt] = attempts_of(daemon, ["/usr/bin/python3", "-I", "-c", text])
    assert (attempt["protocol"], attempt["destination"], attempt["port"]) == (protocol, host, 25)
    assert attempt["pid"] == 2
    assert attempt["executable"].startswith("/usr/bin/python3")
    assert attempt["command"].startswith("/usr/bin/python3 -I -c")


def test_the_one_of_several_that_tried(daemon: Any) -> None:
    [attempt] = attempts_of(
        daemon, ["sh", "-c", "sleep 1 & curl -sS http://10.1.2.3:81/; kill %1 2>/dev/null; :"]
    )
    assert (attempt["port"], attempt["executable"]) == (81, "/usr/bin/curl")
    assert attempt["pid"] > 2


def test_what_is_listed_is_no_attempt(daemon: Any) -> None:
    """Nor what goes to a listed name's address, by any port: the gateway alone knows about that."""
    talk = "import socket; s = socket.create_connection(({host!r}, 7)); s.sendall(b'x'); s.recv(1)"
    for host in ("plain.test", str(t.DB4)):
        assert attempts_of(daemon, ["/usr/bin/python3", "-I", "-c", talk.format(host=host)]) == []


def test_a_refusal_is_felt_at_once_all_the_same(daemon: Any) -> None:
    script = """
import socket, time
for port in range(1, 200):
    began = time.monotonic()
    try: socket.socket().connect(("10.1.2.3", port))
    except ConnectionRefusedError: pass
    assert time.monotonic() - began < 0.5, port
"""
    assert 20 <= len(attempts_of(daemon, ["/usr/bin/python3", "-I", "-c", script])) <= 80


@pytest.mark.parametrize("guard", ["observe", "off"])
def test_where_nothing_is_refused_nobody_tries(daemon: Any, guard: str) -> None:
    daemon.policy("acme", POLICY.format(guard=guard))
    try:
        assert attempts_of(daemon, ["curl", "-sS", "-m", "1", "http://10.1.2.3/"]) == []
    finally:
        daemon.policy("acme", POLICY.format(guard="enforce"))
