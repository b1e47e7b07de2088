"""The kernel's packet log: hand-made datagrams, any bytes, and then a real kernel."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.verdicts import Reason
from egressd.packets import headers, nflog
from egressd.packets.nflog import Failure, Logged, Malformed, Overrun, Subject, parse, subject

PREFIX, PAYLOAD, MARK, INDEV, HDR, TIMESTAMP, SEQ = 10, 9, 2, 4, 1, 3, 12


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def message(kind: int, body: bytes, *, sequence: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body + bytes(-len(body) % 4)


def packet(*attributes: bytes, group: int = 5) -> bytes:
    return message(0x400, struct.pack("!BBH", 5, 0, group) + b"".join(attributes))


FULL = packet(
    attribute(HDR, struct.pack("!HBx", 0x0800, 0)),
    attribute(PREFIX, b"acme unlisted\0"),
    attribute(MARK, struct.pack("!I", 0x80000005)),
    attribute(TIMESTAMP, struct.pack("!QQ", 1_700_000_000, 250_000)),
    attribute(INDEV, struct.pack("!I", 12)),
    attribute(PAYLOAD, b"\x45" + bytes(19)),
    attribute(SEQ, struct.pack("!I", 41)),
)
LOGGED = Logged(
    prefix="acme unlisted",
    payload=b"\x45" + bytes(19),
    ethertype=0x0800,
    hook=0,
    group=5,
    mark=0x80000005,
    indev=12,
    sequence=41,
    time=1_700_000_000.25,
)


def test_every_attribute_is_read() -> None:
    assert parse(FULL) == (LOGGED,)


def test_a_datagram_holds_several_messages_and_an_end() -> None:
    done = message(3, bytes(4))
    assert parse(FULL + FULL + done) == (LOGGED, LOGGED)


def test_errors_acknowledgements_and_overruns_are_told_apart() -> None:
    refused = message(2, struct.pack("=i", -1) + bytes(16), sequence=9)
    acknowledged = message(2, struct.pack("=i", 0) + bytes(16), sequence=1)
    assert parse(refused + acknowledged + message(4, b"")) == (Failure(1, 9), Failure(0, 1), Overrun())


@pytest.mark.parametrize(
    "datagram",
    [
        b"\x00",
        message(0x400, b""),
        message(0x400, b"\x05\x01\x00\x05"),
        message(0x0301, b"\x00" * 8),
        message(2, b"\x01"),
        packet(b"\x02\x00\x01\x00"),
        packet(b"\xff\x00\x01\x00"),
        struct.pack("=IHHII", 4000, 0x400, 0, 0, 0),
        struct.pack("=IHHII", 3, 0x400, 0, 0, 0),
    ],
)
def test_what_is_no_message_is_malformed(datagram: bytes) -> None:
    assert [type(m) for m in parse(datagram)] == [Malformed]


def test_a_broken_message_does_not_hide_those_before_it() -> None:
    good, bad = parse(FULL + struct.pack("=IHHII", 4000, 0x400, 0, 0, 0))
    assert (good, type(bad)) == (LOGGED, Malformed)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("acme unlisted", Subject("acme", Reason.UNLISTED)),
        ("acme unlisted ", Subject("acme", Reason.UNLISTED)),
        ("a-1 not-ip", Subject("a-1", Reason.NOT_IP)),
        ("acme quota: ", Subject("acme", Reason.QUOTA)),
        ("acme nonsense", Subject("acme", Reason.UNKNOWN)),
        ("acme", Subject("acme", Reason.UNKNOWN)),
        ("", Subject(None, Reason.UNKNOWN)),
        ("ACME unlisted", Subject(None, Reason.UNKNOWN)),
        ("../x unlisted", Subject(None, Reason.UNKNOWN)),
        ("acme\x1b[2J unlisted", Subject(None, Reason.UNKNOWN)),
    ],
)
def test_a_prefix_names_workspace_and_reason_or_nobody(prefix: str, expected: Subject) -> None:
    assert subject(prefix) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda at, b: FULL[:at] + b + FULL[at + len(b) :],
            st.integers(0, len(FULL)),
            st.binary(max_size=6),
        ),
        st.builds(lambda n: FULL[:n], st.integers(0, len(FULL))),
        st.builds(packet, st.builds(attribute, st.integers(0, 0xFFFF), st.binary(max_size=40))),
    )
)
def test_any_bytes_give_messages(datagram: bytes) -> None:
    for found in parse(datagram):
        assert isinstance(found, Logged | Failure | Overrun | Malformed)
        if isinstance(found, Logged):
            assert isinstance(subject(found.prefix), Subject)


# ---- a real kernel: two namespaces, one veth, a rule at netdev ingress that logs

RULES = """
table netdev t {
  chain c {
    type filter hook ingress device "v0" priority -500; policy accept;
    ip daddr 192.0.2.1 udp dport 7 meta mark set 0x80000005 log group 5 prefix "acme unlisted"
    ip6 daddr 2001:db8::1 tcp dport 443 log group 5 prefix "acme port"
    meta protocol arp log group 5 prefix "acme not-ip"
  }
}
"""


def sh(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


@pytest.fixture
def link() -> Iterator[tuple[str, str]]:
    """sandbox `pk-s` (v1) -- gateway `pk-g` (v0, logs)."""
    gateway, sandbox = f"pk-g{os.getpid()}", f"pk-s{os.getpid()}"
    try:
        for name in (gateway, sandbox):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "-n", gateway, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", sandbox)
        for name, device, last in ((gateway, "v0", 1), (sandbox, "v1", 2)):
            sh("ip", "-n", name, "addr", "add", f"192.0.2.{last}/24", "dev", device)
            sh("ip", "-n", name, "-6", "addr", "add", f"2001:db8::{last}/64", "dev", device, "nodad")
            sh("ip", "-n", name, "link", "set", device, "up")
        sh("ip", "netns", "exec", gateway, "nft", "-f", "-", input=RULES.encode())
        yield gateway, sandbox
    finally:
        for name in (gateway, sandbox):
            subprocess.run(("ip", "netns", "del", name), check=False)


OPEN = """
import socket, sys, array
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
sock.bind((0, 0))
to = socket.socket(fileno=int(sys.argv[1]))
to.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))])
"""

SEND = """
import socket, errno
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.sendto(b"hello", ("192.0.2.1", 7)); u.sendto(b"hello", ("192.0.2.1", 7)); u.sendto(b"no", ("192.0.2.1", 8))
t = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
assert t.connect_ex(("2001:db8::1", 443)) == errno.ECONNREFUSED
"""


def socket_from(namespace: str) -> socket.socket:
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, its:
        its.set_inheritable(True)
        command = ("ip", "netns", "exec", namespace, sys.executable, "-c", OPEN, str(its.fileno()))
        sh(*command, pass_fds=(its.fileno(),))
        _, descriptors, _, _ = socket.recv_fds(mine, 16, 1)
        return socket.socket(fileno=descriptors[0])


def receive(sock: socket.socket, *, until: int, seconds: float = 5.0) -> list[nflog.Message]:
    found: list[nflog.Message] = []
    while len(found) < until:
        assert select.select([sock], [], [], seconds)[0], f"nothing more after {found}"
        found += parse(sock.recv(1 << 17))
    return found


@pytest.mark.kernel
def test_a_real_kernels_log_is_read(link: tuple[str, str]) -> None:
    gateway, sandbox = link
    with socket_from(gateway) as sock:
        sock.send(nflog.configure(group=5, copy=64))
        assert receive(sock, until=3) == [Failure(0, 1), Failure(0, 2), Failure(0, 3)]
        sh("ip", "netns", "exec", sandbox, sys.executable, "-c", SEND)
        logged = [m for m in receive(sock, until=4) if isinstance(m, Logged)]
        where = ("ip", "netns", "exec", gateway, "cat", "/sys/class/net/v0/ifindex")
        index = subprocess.check_output(where, text=True)
    assert [m.sequence for m in logged] == list(range(len(logged)))
    assert {m.indev for m in logged} == {int(index)}
    assert all(m.group == 5 and len(m.payload) <= 64 and m.time is not None for m in logged)
    read = {(subject(m.prefix), m.mark, attempt_of(m)) for m in logged}
    v4, v6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")
    assert (Subject("acme", Reason.UNLISTED), 0x80000005, ("udp", v4, 7)) in read
    assert (Subject("acme", Reason.PORT), 0, ("tcp", v6, 443)) in read
    assert (Subject("acme", Reason.NOT_IP), 0, ("arp", None, None)) in read
    assert sum(attempt_of(m) == ("udp", v4, 7) for m in logged) == 2
    assert not any(attempt_of(m)[2] == 8 for m in logged)


def attempt_of(logged: Logged) -> tuple:
    attempt = headers.parse(logged.payload, ethertype=logged.ethertype)
    return attempt.protocol, attempt.destination, attempt.destination_port


@pytest.mark.kernel
def test_packets_lost_to_a_full_socket_are_gaps_in_the_numbers(link: tuple[str, str]) -> None:
    gateway, sandbox = link
    with socket_from(gateway) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.send(nflog.configure(group=5, copy=64, batch=1))
        flood = (
            "import socket\nu = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for i in range(500): u.sendto(b'x', ('192.0.2.1', 7))"
        )
        sh("ip", "netns", "exec", sandbox, sys.executable, "-c", flood)
        sock.setblocking(False)
        seen, overflowed = drain(sock)
        sh("ip", "netns", "exec", sandbox, sys.executable, "-c", SEND)
        sock.setblocking(True)
        after = [m for m in receive(sock, until=3) if isinstance(m, Logged) and m.sequence is not None]
    udp = [m for m in seen if m.sequence is not None]
    assert overflowed
    assert len(udp) < 500
    first_after = after[0].sequence
    assert first_after is not None
    # what came, plus the gap before what comes next, is what was logged: 500 datagrams and the ARP frames
    assert first_after >= 500
    assert after[0].sequence > udp[-1].sequence + 1  # type: ignore[operator]


def drain(sock: socket.socket) -> tuple[list[Logged], bool]:
    found: list[Logged] = []
    overflowed = False
    while True:
        try:
            found += [m for m in parse(sock.recv(1 << 17)) if isinstance(m, Logged)]
        except BlockingIOError:
            return found, overflowed
        except OSError:
            overflowed = True
