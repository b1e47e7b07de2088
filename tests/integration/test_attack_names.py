"""The resolver as a way out: with exact names only, nothing a sandbox asks puts a packet on the uplink.

A thousand questions that try: data in labels, every type and class, EDNS options, odd flags and ids, names
that look listed, garbage, over UDP and TCP, to both of the resolver's addresses. The judge is the capture.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from integration.probe import Resident
from lab.topology import Records

MARKER = "6e616d6573"
COUNT = 1000
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: many.test, ports: [7/tcp], verify: address}
"""
# Runs inside. Prints how many answers came and how many were not well formed enough to be one.
ASK = r"""
import json, random, socket, struct, sys
seed, count, marker, server = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
draw = random.Random(seed)
LISTED = ["plain.test", "many.test"]

def label(size):
    return bytes(draw.randrange(256) for _ in range(size))

def name():
    kind = draw.randrange(9)
    data = (marker + "%012x" % draw.getrandbits(48)).encode()
    listed = draw.choice(LISTED).encode().split(b".")
    return {
        0: [data, *listed],                       # below a listed name
        1: [data, b"evil", b"test"],              # data for a server of the asker's own
        2: [draw.choice([b"PLAIN", b"pLaIn"]), b"test"],
        3: [label(63), label(63), label(63), label(50)],
        4: [*listed, data, b"test"],              # a listed name as a prefix
        5: [b"plain.test"],                       # the dot inside the label
        6: [b"plain\0", b"test"],
        7: [b"1", b"33", b"22", b"11", b"in-addr", b"arpa"],
        8: [],
    }[kind]

def question():
    if draw.random() < 0.05:
        return label(draw.randrange(64))
    wire = b"".join(bytes([len(part)]) + part for part in name()) + b"\0"
    flags = draw.choice([0x0100, 0x0000, 0x0110, 0x0120, 0x0900, 0x1100, 0x2100, draw.getrandbits(16)])
    kind = draw.choice([1, 28, 1, 28, 5, 6, 12, 15, 16, 33, 35, 43, 48, 64, 65, 99, 250, 251, 252, 255,
                        draw.getrandbits(16)])
    klass = draw.choice([1, 1, 1, 1, 3, 4, 254, 255, draw.getrandbits(16)])
    options = b""
    if draw.random() < 0.5:
        payload = marker.encode()
        code = draw.choice([3, 8, 10, 11, 12, 15, 65001])
        options = struct.pack("!2H", code, len(payload)) + payload
    size, flag = draw.choice([0, 512, 1232, 65535]), draw.choice([0, 0x8000, 1 << 16])
    opt = b"\0" + struct.pack("!HHIH", 41, size, flag, len(options)) + options
    with_opt = draw.random() < 0.6
    head = struct.pack("!6H", draw.getrandbits(16), flags, 1, 0, 0, with_opt)
    return head + wire + struct.pack("!2H", kind, klass) + opt * with_opt

family = socket.AF_INET6 if ":" in server else socket.AF_INET
answers = odd = 0
udp = socket.socket(family, socket.SOCK_DGRAM)
udp.settimeout(2)
udp.connect((server, 53))
tcp = None
for number in range(count):
    message = question()
    if number % 5 == 4:
        try:
            with socket.create_connection((server, 53), timeout=2) as tcp:
                tcp.sendall(struct.pack("!H", len(message)) + message)
                tcp.shutdown(socket.SHUT_WR)
                reply = b"".join(iter(lambda: tcp.recv(65536), b""))[2:]
        except OSError:
            reply = b""
    else:
        udp.send(message)
        expected = len(message) >= 12 and not message[2] & 0x80
        reply = udp.recv(65536) if expected else b""
    answers += bool(reply)
    odd += bool(reply) and (len(reply) < 12 or reply[:2] != message[:2] or not reply[2] & 0x80)
print(json.dumps([answers, odd]))
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any, _servers: Any) -> Any:
    internet = _servers[0]
    internet.reset()
    for name in ("plain.test", "many.test"):  # not due again while the capture listens
        internet.set(name, Records({"A": ["11.22.33.30"], "AAAA": ["2a10:5353::30"]}, ttl=3600))
    return start_module_daemon(policies={"acme": POLICY})


@pytest.mark.parametrize("server", ["169.254.53.53", "fd53:53::53"])
def test_a_thousand_hostile_questions_put_nothing_on_the_uplink(
    daemon: Any, uplink: Any, server: str
) -> None:
    with Resident(daemon) as resident:
        assert resident.tries(("resolve", "plain.test"))[0].result == "ok"
        before = daemon.counters("acme")
        since = uplink.settle()
        words = ["/usr/bin/python3", "-I", "-c", ASK, server, str(COUNT), MARKER, server]
        result = daemon.sandbox("acme", words).check()
        uplink.assert_quiet(since=since)
        answers, odd = json.loads(result.out)
        assert answers > COUNT * 0.9, "most are questions, and get an answer"
        assert odd == 0
        # the one beside it goes on, and the books say what happened
        assert resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
        after = daemon.counters("acme")
    assert after["balance"]["balanced"], after["balance"]
    assert after["names_refused"] > before["names_refused"] + 100
