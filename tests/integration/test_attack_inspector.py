"""Against the inspector from both of its sides: from a sandbox, to have one byte of a wrong hello sent on; and
as the inspector itself, taken over, to reach what no rule names. The judges are the servers and the capture."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from integration.hellos import hello, put_together, records, server_name, taken_apart
from integration.probe import Resident
from integration.test_cotenant import FAMILIES, SERVER_SPOKE, Sender, grown
from lab import topology as t
from lab.machine import poll

MARKER = "taken-over-7d31"
MINE, OTHER = "one.cdn.test", "two.cdn.test"
POLICY = """
workspace: {workspace}
guard: enforce
members: [user:4001]
allow:
  - {{host: {host}, ports: [443/tcp]}}
  - {{host: silent.test, ports: [443/tcp]}}
  - {{host: plain.test, ports: [7/tcp, 443/udp], verify: address}}
  - {{local: ollama}}
"""


def policy(workspace: str = "acme", host: str = MINE) -> str:
    return POLICY.format(workspace=workspace, host=host)


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": policy(), "beta": policy("beta", "eu.api.openai.test")})


# ---- the inspector, taken over

# Runs in the gateway, as the inspector's user and without any right: [[kind, device, source, destination, port, data]]
DIAL = r"""
import errno, json, select, socket, sys, time
attempts, results, socks = json.loads(sys.argv[1]), [], {}
for number, (kind, device, source, to, port, data) in enumerate(attempts):
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    sock = socket.socket(family, {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[kind])
    sock.setblocking(False)
    results.append("silence")
    try:
        if device:
            sock.setsockopt(1, 25, device.encode())  # SO_BINDTODEVICE, which needs no right
        if source:
            level, option = (0, 15) if family == socket.AF_INET else (41, 78)  # IP_FREEBIND, IPV6_FREEBIND
            sock.setsockopt(level, option, 1)
            sock.bind((source, 0))
        sock.connect((to, port))
        if kind == "udp":
            sock.send(data.encode())
    except BlockingIOError:
        pass
    except OSError as error:
        results[number] = errno.errorcode[error.errno]
        continue
    socks[sock.fileno()] = (number, sock, kind, data)
poll = select.poll()
for number in socks:
    poll.register(number, select.POLLIN | (select.POLLOUT if socks[number][2] == "tcp" else 0))
end = time.monotonic() + 1.0
while socks and time.monotonic() < end:
    for found, events in poll.poll(100):
        number, sock, kind, data = socks[found]
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        results[number] = errno.errorcode[code] if code else "connected" if kind == "tcp" else "answered"
        if not code and kind == "tcp":
            sock.send(data.encode())
        poll.unregister(found)
        del socks[found]
print(json.dumps(results))
"""
POWERS = r"""
import errno, json, socket
def tried(call):
    try:
        call()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
sock = socket.socket()
print(json.dumps({
    "a mark": tried(lambda: sock.setsockopt(1, 36, b"\1\x40\0\x80")),
    "transparent": tried(lambda: sock.setsockopt(0, 19, 1)),
    "transparent, IPv6": tried(lambda: socket.socket(10).setsockopt(41, 75, 1)),
    "the resolver's port": tried(lambda: socket.socket(2, 2).bind(("169.254.53.53", 53))),
    "raw": tried(lambda: socket.socket(2, 3, 1)),
    "raw, IPv6": tried(lambda: socket.socket(10, 3, 58)),
    "packets": tried(lambda: socket.socket(17, 3, 3)),
    "an echo request": tried(lambda: socket.socket(2, 2, 1).sendto(b"\x08\0\0\0\0\0\0\0", ("11.22.33.66", 0))),
}))
"""


def taken_over(daemon: Any, *argv: str) -> Any:
    """Run as the inspector would: its user, its namespace, no capability to be had."""
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    if not daemon.lab.single_user:
        words += ["--reuid=4104", "--regid=4104", "--clear-groups"]
    return daemon.lab.run([*words, *argv], where=daemon.gateway)


def dialled(daemon: Any) -> list[tuple[str, str, int, str]]:
    """(synthetic address, source, port, host) of each element of dial4 and dial6."""
    text = daemon.json("ruleset")["text"]
    found = re.findall(r'([0-9a-f.:]+) \. ([0-9a-f.:]+) \. (\d+) counter [^"]*"([^"]+)"', text)
    return [(address, source, int(port), host) for address, source, port, host in found]


def ways(permitted: Any, sandboxes: Any, *, six: bool) -> list[tuple[str, str]]:
    """(source, destination), of one family: whatever somebody in the gateway might try."""
    mine = [each for each in permitted if (":" in each[0]) is six]
    own, synthetic = sorted({source for _, source, _, _ in mine}), sorted({to for to, _, _, _ in mine})
    sandbox = [s["address6" if six else "address4"] for s in sandboxes]
    gateway = ["fd53:2::2", "fd53:53::53", "::1"] if six else ["169.254.54.2", "169.254.53.53", "127.0.0.1"]
    real = (t.EVIL6, t.CDN6, t.DB6, t.HOST6) if six else (t.EVIL4, t.CDN4, t.DB4, t.HOST4)
    sources = [*own, *gateway, sandbox[0], synthetic[0], ""]
    return [(s, to) for s in sources for to in (*synthetic, *map(str, real), *sandbox, *gateway, *own)]


def test_the_inspector_taken_over_reaches_what_some_workspace_may_and_nothing_else(
    daemon: Any, internet: Any, uplink: Any
) -> None:
    with Resident(daemon) as resident, Resident(daemon, workspace="beta"):
        resident.tries(("resolve", MINE))
        sandboxes = daemon.json("status")["sandboxes"]
        permitted = dialled(daemon)
        assert {host for _, _, _, host in permitted} == {MINE, "eu.api.openai.test", "silent.test"}
        attempts = [
            (kind, device, source, to, port, MARKER)
            for six in (False, True)
            for source, to in ways(permitted, sandboxes, six=six)
            for device in ("", "up0", "eg{}".format(sandboxes[0]["link"]), "lo")
            for kind, port in (("tcp", 443), ("udp", 443), ("tcp", 7), ("udp", 53), ("tcp", 8444))
        ]
        results: list[str] = []
        for at in range(0, len(attempts), 900):
            argv = ("/usr/bin/python3", "-I", "-c", DIAL, json.dumps(attempts[at : at + 900]))
            results += json.loads(taken_over(daemon, *argv).check().out)
        stood = {a for a, result in zip(attempts, results, strict=True) if result in ("connected", "answered")}
        may = {
            ("tcp", "", source, to, port, MARKER)
            for to, source, port, host in permitted
            if host != "silent.test"
        }
        assert stood == may, (stood - may, may - stood)
        allowed = (t.CDN4, t.CDN6, t.OPENAI4, t.OPENAI6)
        uplink.assert_only_to(*allowed, t.SILENT4, t.SILENT6)
        reached = {(entry.protocol, entry.address, entry.port) for entry in internet.seen() if entry.port not in (9, 53)}
    assert daemon.counters("acme")["balance"]["balanced"]


def test_the_inspector_taken_over_has_no_power_over_the_gateway(daemon: Any) -> None:
    powers = json.loads(taken_over(daemon, "/usr/bin/python3", "-I", "-c", POWERS).check().out)
    assert set(powers.values()) <= {"EPERM", "EACCES"}, powers
    for command in (
        ["nft", "flush", "ruleset"], ["nft", "list", "ruleset"], ["ip", "rule", "flush"],
        ["ip", "route", "add", "default", "dev", "up0"], ["ip", "addr", "add", "10.9.9.1/32", "dev", "lo"],
        ["ip", "link", "set", "up0", "down"], ["sysctl", "-w", "net.ipv4.ip_unprivileged_port_start=0"],
    ):  # fmt: skip
        result = taken_over(daemon, *command)
        assert result.status != 0 or "table" not in result.out, f"{command}: {result.out}"
    assert daemon.json("policy", "diff")["drift"] == []


# ---- a sandbox

# Runs inside. A line of JSON in, one out: [what to do, with which socket, ...]. "silence" after 0.4 s.
STEPS = r"""
import json, socket, struct, sys, time
socks = {}
def act(what, name, *more):
    if what == "open":
        host, family, port = more
        found = socket.getaddrinfo(host, port, {4: 2, 6: 10}[family], socket.SOCK_STREAM)
        socks[name] = sock = socket.socket(found[0][0], socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(2)
        sock.connect(found[0][4])
        return "open"
    sock = socks[name]
    if what == "send":
        sock.sendall(bytes.fromhex(more[0]))
    elif what == "urgent":
        sock.send(bytes.fromhex(more[0]), socket.MSG_OOB)
    elif what == "end":
        sock.shutdown(socket.SHUT_WR)
    elif what == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    elif what == "read":
        sock.settimeout(more[0])
        return sock.recv(65536)[:1].hex() or "closed"
    return "done"
for line in sys.stdin:
    try:
        result = act(*json.loads(line))
    except (ConnectionResetError, BrokenPipeError):
        result = "reset"
    except ConnectionRefusedError:
        result = "refused"
    except TimeoutError:
        result = "silence"
    except OSError as error:
        result = str(error)
    print(json.dumps(result), flush=True)
"""
CHANGE = bytes.fromhex("140303000101")  # the change_cipher_spec that browsers send in front of a second hello


class Hands:
    """A sandbox whose sockets are moved by the test."""

    def __init__(self, daemon: Any, workspace: str = "acme") -> None:
        self.process = daemon.start_sandbox(workspace, ["/usr/bin/python3", "-I", "-c", STEPS])
        self._said = 0

    def do(self, what: str, name: str, *more: Any) -> str:
        more = tuple(m.hex() if isinstance(m, bytes) else m for m in more)
        self.process.stdin.write(json.dumps([what, name, *more]).encode() + b"\n")
        self._said += 1
        poll(lambda: self.process.out.count("\n") >= self._said, timeout=20, what="the sandbox's answer")
        return str(json.loads(self.process.out.splitlines()[self._said - 1]))

    def begin(self, name: str, *data: bytes, host: str = MINE, family: int = 4, port: int = 443) -> None:
        assert self.do("open", name, host, family, port) == "open"
        for piece in data:
            assert self.do("send", name, piece) == "done"

    def read(self, name: str, within: float = 3.0) -> str:
        return self.do("read", name, within)

    def __enter__(self) -> Hands:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def hands(daemon: Any) -> Any:
    with Hands(daemon) as made:
        yield made


def refused(daemon: Any) -> dict[str, int]:
    return dict(daemon.counters("acme")["flows_refused"])


def share(name: str, *, key: bool) -> bytes:
    """OpenSSL's hello for a group of which it sends no share, so that the server asks again; or with it."""
    head, extensions = taken_apart(hello(name))
    point = ec.generate_private_key(ec.SECP384R1()).public_key()
    raw = point.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    listed = struct.pack("!HH", 0x18, len(raw)) + raw if key else b""
    new = {10: b"\0\2\0\x18", 51: struct.pack("!H", len(listed)) + listed}
    return records(put_together(head, [(kind, new.get(kind, data)) for kind, data in extensions]))


def second_hellos() -> dict[str, list[bytes]]:
    """What may follow a first hello that the server answers with HelloRetryRequest."""
    other = share(OTHER, key=True)
    return {
        "at once": [CHANGE + other],
        "cut": [CHANGE, other[:3], other[3:60], other[60:]],
        "in many records": [CHANGE + records(other[5:], *[20] * 12)],
        "behind early data": [b"\x17\x03\x03\0\x10" + bytes(16) + other],
        "behind a heartbeat": [b"\x18\x03\x03\0\x03\x01\0\0" + other],
        "in a record of no type": [b"\x63" + other[1:]],
        "as SSL 2.0": [b"\x80\x40\x01\x03\x03\0\x03\0\0\0\x20\0\0\x2f" + OTHER.encode() + bytes(38)],
        "in a warning": [b"\x15" + other[1:]],
        "in a change of cipher": [b"\x14" + other[1:]],
    }


@FAMILIES
@pytest.mark.parametrize("early", [False, True], ids=["when asked", "before it is asked"])
def test_a_second_hello_for_another_host_never_leaves(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int, early: bool
) -> None:
    results, leaked = {}, set()
    for what, pieces in second_hellos().items():
        since = uplink.settle()
        hands.begin("s", share(MINE, key=False), family=family)
        assert early or hands.read("s") == "16", "the server asks for another hello"
        for piece in pieces:
            hands.do("send", "s", piece)
        results[what] = [hands.read("s", 1.0) for _ in range(3)]
        hands.do("reset", "s")
        uplink.settle()
        leaked |= {what} if uplink.holding(OTHER.encode(), since=since) else set()
    assert leaked == set(), results
    assert {entry.name for entry in internet.seen(port=443)} <= {MINE, ""}
    # and the honest one still works
    hands.begin("s", share(MINE, key=False), family=family)
    assert hands.read("s") == "16"
    hands.do("send", "s", CHANGE + share(MINE, key=True))
    assert hands.read("s") == "16"
    hands.do("reset", "s")
