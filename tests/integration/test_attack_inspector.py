"""Against the inspector from both of its sides: from a sandbox, to have a byte of a wrong hello sent on; as
the inspector itself, taken over, to reach what no rule names. The judges are servers and capture."""

from __future__ import annotations

import json
import re
import signal
import struct
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from integration import inside
from integration.hellos import hello, put_together, records, server_name, taken_apart
from integration.probe import Resident
from integration.test_cotenant import FAMILIES, SERVER_SPOKE, grown
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

# Runs in the gateway, as the inspector's user and without any right:
# [[kind, device, source, destination, port, data]]
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
def shared(family, kind, option, place):
    sock = socket.socket(family, kind)
    for number in option:
        sock.setsockopt(1, number, 1)  # SO_REUSEADDR, SO_REUSEPORT
    sock.bind((place, 53))
    kind == 1 and sock.listen()
sock = socket.socket()
places = ((2, "169.254.53.53"), (2, "0.0.0.0"), (10, "fd53:53::53"), (10, "::"))
print(json.dumps({
    f"the resolver's port: {place} {kind} {option}": tried(lambda: shared(family, kind, option, place))
    for family, place in places for kind in (1, 2) for option in ((), (2,), (15,), (2, 15))
} | {
    "a mark": tried(lambda: sock.setsockopt(1, 36, b"\1\x40\0\x80")),
    "transparent": tried(lambda: sock.setsockopt(0, 19, 1)),
    "transparent, IPv6": tried(lambda: socket.socket(10).setsockopt(41, 75, 1)),
    "raw": tried(lambda: socket.socket(2, 3, 1)),
    "raw, IPv6": tried(lambda: socket.socket(10, 3, 58)),
    "packets": tried(lambda: socket.socket(17, 3, 3)),
    "an echo request": tried(lambda: socket.socket(2, 2, 1).sendto(b"\x08" + bytes(7), ("11.22.33.66", 0))),
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
        stood = {
            a for a, result in zip(attempts, results, strict=True) if result in ("connected", "answered")
        }
        may = {
            ("tcp", "", source, to, port, MARKER)
            for to, source, port, host in permitted
            if host != "silent.test"
        }
        assert stood == may, (stood - may, may - stood)
        allowed = (t.CDN4, t.CDN6, t.OPENAI4, t.OPENAI6)
        # egressd itself asks for the listed names now and then
        uplink.assert_only_to(*allowed, t.SILENT4, t.SILENT6, t.DNS4, t.DNS6)
        assert {name for name, _ in internet.queries()} <= {
            MINE,
            "eu.api.openai.test",
            "silent.test",
            "plain.test",
        }
        reached = {(entry.protocol, entry.address, entry.port) for entry in internet.seen(port=443)}
        assert reached == {("tcp", str(address), 443) for address in allowed}
    assert daemon.counters("acme")["balance"]["balanced"]


def test_the_inspector_taken_over_has_no_power_over_the_gateway(daemon: Any) -> None:
    powers = json.loads(taken_over(daemon, "/usr/bin/python3", "-I", "-c", POWERS).check().out)
    taken = {powers.pop(what) for what in list(powers) if what.startswith("the resolver's port")}
    assert taken == {"EADDRINUSE"}, "low ports are free to everybody there, and this one is not"
    assert set(powers.values()) <= {"EPERM", "EACCES"}, powers
    for command in (
        ["nft", "flush", "ruleset"], ["nft", "list", "ruleset"], ["ip", "rule", "flush"],
        ["ip", "route", "add", "default", "dev", "up0"], ["ip", "addr", "add", "10.9.9.1/32", "dev", "lo"],
        ["ip", "link", "set", "up0", "down"], ["sysctl", "-w", "net.ipv4.ip_unprivileged_port_start=0"],
    ):  # fmt: skip
        result = taken_over(daemon, *command)
        assert result.status != 0, f"{command}: {result.out}"
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

    def ends(self, name: str, data: bytes = b"", within: float = 3.0) -> str:
        """How it ends, said by whatever hears of it first."""
        said = self.do("send", name, data)
        return self.read(name, within) if said == "done" else said

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


@FAMILIES
def test_a_hello_that_is_finished_after_its_host_was_revoked(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int
) -> None:
    """Begun under one policy, finished under another; not even for the name that is listed instead."""
    before, after = hello(MINE), hello(OTHER)
    hands.begin("old", before[:200], family=family)
    hands.begin("new", after[:200], family=family)
    hands.begin("silent", family=family)
    try:
        daemon.policy("acme", policy(host=OTHER))
        since = uplink.settle()
        for name, rest in (("old", before[200:]), ("new", after[200:]), ("silent", before)):
            assert hands.ends(name, rest) == "reset", name
        uplink.assert_nothing_to(t.CDN4, t.CDN6, since=since)
        assert internet.seen(port=443) == []
    finally:
        daemon.policy("acme", policy())
    hands.begin("old", before, family=family)
    assert hands.read("old") in SERVER_SPOKE


@FAMILIES
def test_a_host_that_is_revoked_while_it_is_dialled(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int
) -> None:
    hands.begin("s", hello("silent.test"), host="silent.test", family=family)
    poll(lambda: uplink.to(t.SILENT4 if family == 4 else t.SILENT6), what="the dial")
    try:
        daemon.policy("acme", policy().replace("silent.test", "two.cdn.test"))
        since = uplink.settle()
        assert hands.read("s", 1.0) == "reset"
        assert hands.read("s", 1.2) in ("reset", "closed")  # longer than the kernel waits to say SYN again
        uplink.assert_nothing_to(t.SILENT4, t.SILENT6, since=since)
    finally:
        daemon.policy("acme", policy())


@FAMILIES
@pytest.mark.parametrize("inspected", [False, True], ids=["that is not read", "that was read"])
def test_a_flow_does_not_outlive_the_way_it_was_verified(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int, inspected: bool
) -> None:
    """A host stays, but its port is verified in another way: what was opened under the old terms ends, though
    workspace, block, address and port are the same."""
    loose = policy().replace("[443/tcp]}", "[443/tcp], verify: address}", 1)
    before, after = (policy(), loose) if inspected else (loose, policy())
    try:
        daemon.policy("acme", before)
        hands.begin("s", hello(MINE if inspected else OTHER), family=family)
        assert hands.read("s") in SERVER_SPOKE
        daemon.policy("acme", after)
        since = uplink.settle()
        assert hands.ends("s", f"{MARKER} {OTHER}".encode() * 20) == "reset"
        assert hands.ends("s", OTHER.encode() * 20, 0.5) in ("reset", "closed")
        uplink.settle()
        assert not uplink.holding(OTHER.encode(), since=since)
        hands.begin("s", hello(OTHER), family=family)
        assert (hands.read("s") in SERVER_SPOKE) is inspected
        hands.begin("s", hello(MINE), family=family)
        assert hands.read("s") in SERVER_SPOKE
    finally:
        daemon.policy("acme", policy())
    assert daemon.counters("acme")["balance"]["balanced"]


@FAMILIES
def test_the_inspector_killed_in_the_middle_of_everything(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int
) -> None:
    """What was open ends, half a hello goes nowhere, and a hello after it is read by the next one."""
    hands.begin("flow", hello(MINE), family=family)
    assert hands.read("flow") in SERVER_SPOKE
    hands.begin("half", hello(OTHER)[:200], family=family)
    hands.begin("dialling", hello("silent.test"), host="silent.test", family=family)
    pid = daemon.pids()["inspector"]
    daemon.lab.signal(pid, signal.SIGSTOP)
    hands.begin("waiting", hello(OTHER), family=family)  # in the listener's queue, which outlives the process
    before = refused(daemon)
    daemon.lab.signal(pid, signal.SIGKILL)
    assert [hands.read(name) for name in ("flow", "dialling")] == ["reset", "reset"]
    assert hands.ends("half", hello(OTHER)[200:]) == "reset"
    assert hands.read("waiting", 8.0) == "reset"
    poll(lambda: {p["state"] for p in daemon.json("status")["processes"]} == {"running"}, timeout=10)
    hands.begin("again", hello(MINE), family=family)
    assert hands.read("again") in SERVER_SPOKE
    uplink.settle()
    uplink.assert_never(OTHER.encode())
    assert grown(before, refused(daemon)).keys() <= {"sni-other", "unlisted", "source"}
    assert inside.counters(daemon)["balance"]["balanced"]


@FAMILIES
def test_bytes_out_of_order_are_read_as_they_are_sent_on(
    daemon: Any, hands: Hands, internet: Any, uplink: Any, family: int
) -> None:
    """An urgent byte stands outside of the stream for who does not ask for it: two readers, two names."""
    mine = hello(MINE)
    at = mine.index(MINE.encode())
    hands.begin("whole", mine[:at], family=family)
    hands.do("urgent", "whole", mine[at : at + 1])
    hands.do("send", "whole", mine[at + 1 :])
    assert hands.read("whole") in SERVER_SPOKE
    # without its urgent bytes this one is whole and right
    head, extensions = taken_apart(mine)
    longer = [(k, server_name(b"x" + MINE.encode()) if k == 0 else d) for k, d in extensions]
    long = records(put_together(head, longer))
    at, since = long.index(b"x" + MINE.encode()), uplink.settle()
    hands.begin("two", long[:at], family=family)
    hands.do("urgent", "two", b"x")
    hands.do("send", "two", long[at + 1 :])
    assert hands.read("two") == "reset"
    uplink.assert_nothing_to(t.CDN4, t.CDN6, since=since)


@FAMILIES
def test_a_client_that_leaves_at_any_point_leaves_nothing_behind(
    daemon: Any, hands: Hands, internet: Any, family: int
) -> None:
    def descriptors() -> int:
        pid = daemon.pids()["inspector"]
        return len(daemon.lab.run(["ls", f"/proc/{pid}/fd"]).check().out.split())

    before = descriptors()
    for leave in ("end", "reset"):
        for data in (b"", hello(MINE)[:1], hello(MINE)[:200], hello(MINE), share(MINE, key=False)):
            hands.begin("s", data, family=family)
            hands.do(leave, "s")
            if leave == "end":
                hands.read("s", 0.2)
                hands.do("reset", "s")
    poll(lambda: descriptors() == before, timeout=5, what=f"{descriptors()} descriptors, {before} before")
    assert {entry.name for entry in internet.seen(port=443)} <= {MINE, ""}


# ---- names that wildcards cover, spelled by somebody who wants more than his budget

WILD = """
workspace: wild
guard: enforce
members: [user:4001]
wildcards:
  sandbox: {names: 3, bytes: 200B, rate: 100}
  workspace: {names: 100, bytes: 1KiB, rate: 200}
allow:
  - {host: '**.search.test', ports: [7/tcp, 443/tcp]}
"""
# Runs inside: [[labels in hex, type, "udp" or "tcp"]] -> [rcode, number of answers] each
ASK = r"""
import json, socket, struct, sys
for labels, kind, way in json.loads(sys.argv[1]):
    wire = b"".join(bytes([len(l) // 2]) + bytes.fromhex(l) for l in labels) + b"\0"
    message = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + wire + struct.pack("!2H", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if way == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(("169.254.53.53", 53))
        sock.send(struct.pack("!H", len(message)) + message if way == "tcp" else message)
        reply = sock.recv(4096)[2 if way == "tcp" else 0:]
    print(json.dumps([reply[3] & 15, int.from_bytes(reply[6:8], "big")]), flush=True)
"""


def ask(daemon: Any, *questions: tuple[list[bytes], int, str]) -> list[list[int]]:
    listed = [([label.hex() for label in labels], kind, way) for labels, kind, way in questions]
    words = ["/usr/bin/python3", "-I", "-c", ASK, json.dumps(listed)]
    return [json.loads(line) for line in daemon.sandbox("wild", words).check().out.splitlines()]


@pytest.fixture
def wild(daemon: Any, internet: Any) -> Any:
    daemon.policy("wild", WILD)
    internet.forget()
    yield daemon
    daemon.policy("wild", None)


def upstream(internet: Any) -> set[tuple[str, str]]:
    return {(name, kind) for name, kind in internet.queries() if name.endswith("search.test")}


def test_one_name_in_all_its_spellings_is_one_name(wild: Any, internet: Any) -> None:
    spellings = [[b"one", b"search", b"test"], [b"ONE", b"Search", b"tesT"], [b"oNe", b"SEARCH", b"TEST"]]
    questions = [(labels, kind, way) for labels in spellings for kind in (1, 28) for way in ("udp", "tcp")]
    assert ask(wild, *questions) == [[0, 1]] * len(questions)
    assert sorted(internet.queries()) == [("one.search.test", "A"), ("one.search.test", "AAAA")]


def test_names_that_are_no_host_names_and_types_without_addresses_cost_no_question(
    wild: Any, internet: Any, uplink: Any
) -> None:
    odd = (
        *rb' " \ $(id) _dmarc -x x- * { ; % a.b'.split(),  # the dot of the last is inside of its label
        *(b"a b", b"\n", b"\0", b"\xff"),
    )
    tail = [b"search", b"test"]
    questions = [([MARKER.encode(), label, *tail], kind, "udp") for label in odd for kind in (1, 28)]
    types = (2, 5, 6, 12, 15, 16, 33, 43, 48, 52, 64, 65, 99, 255, 257, 65280)
    questions += [([MARKER.encode(), *tail], kind, way) for kind in types for way in ("udp", "tcp")]
    answers = ask(wild, *questions)
    uplink.settle()
    uplink.assert_never(MARKER.encode())
    assert upstream(internet) == set()
    assert all(rcode in (0, 1, 3) for rcode, _ in answers), answers
    assert not any(
        count for (labels, kind, _), (_, count) in zip(questions, answers, strict=True) if kind != 255
    )
    assert (
        next(w for w in wild.json("status")["workspaces"] if w["workspace"] == "wild")["names"]["granted"]
        == 0
    )


def test_sandbox_after_sandbox_spends_the_budget_of_the_workspace(
    wild: Any, internet: Any, uplink: Any
) -> None:
    """Each has a purse of its own; what all of them carry out is the workspace's 1024 bytes a day, whether
    the names exist or not, in both families and over both transports."""
    internet.set("*.search.test", t.Records(rcode="NXDOMAIN"))
    since, before = uplink.settle(), wild.counters("wild")["names_refused_by"]
    for number in range(8):
        labels = [[b"%03d" % (number * 10 + n) + b"x" * 60, b"search", b"test"] for n in range(5)]
        ask(wild, *((each, kind, way) for each in labels for kind, way in ((1, "udp"), (28, "tcp"))))
    uplink.settle()
    asked = {name for name, _ in upstream(internet)}
    assert len(asked) == 1024 // 63, sorted(asked)
    assert uplink.holding(b"search", since=since)
    counted = grown(before, wild.counters("wild")["names_refused_by"])
    assert counted.keys() == {"budget-names", "budget-bytes"}, counted
    assert sum(counted.values()) == 8 * 5 * 2 - 2 * len(asked)


# ---- at the neighbours' expense

# Runs inside: [address, port, count] connections begun and dropped; prints how many were refused.
RUSH = r"""
import json, socket, struct, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
refused = 0
for _ in range(count):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.connect((address, port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except ConnectionRefusedError:
        refused += 1
    sock.close()
print(refused)
"""


@FAMILIES
def test_who_begins_connections_without_end_is_slowed_alone(daemon: Any, internet: Any, family: int) -> None:
    """The inspector serves everybody. Beyond 1000 at once, and 500 a second, the kernel refuses."""
    count = 6000
    before = daemon.json("counters")["late"]["pace"][0]
    kind = {4: "ahostsv4", 6: "ahostsv6"}[family]
    address = daemon.sandbox("acme", ["/usr/bin/getent", kind, MINE]).out.split()[0]
    began = time.monotonic()
    rush = daemon.start_sandbox("acme", ["/usr/bin/python3", "-I", "-c", RUSH, address, "443", str(count)])
    with Resident(daemon, workspace="beta") as neighbour:
        seen = []
        while rush.status() is None:
            seen += neighbour.tries(("tcp", "eu.api.openai.test", 443))
        assert {outcome.result for outcome in seen} == {"ok"}, seen
        assert max(outcome.milliseconds for outcome in seen) < 2000
    allowed = 1000 + 500 * (time.monotonic() - began)
    assert rush.wait(5) == 0, rush.err
    refused = int(rush.out)
    assert count - refused <= allowed, "no more than the pace was let through"
    assert daemon.json("counters")["late"]["pace"][0] == before + refused > before
    assert daemon.counters("acme")["balance"]["balanced"]
