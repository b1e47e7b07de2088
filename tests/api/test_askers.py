"""Who is at the other end: the kernel's word about real sockets of real users, and what it must not be taken
for."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.packets.headers import Attempt, Family
from egressd.packets.inet_diag import owner
from egressd.processes import askers
from egressd.processes.askers import Asker, Unknown

LOOPBACKS = pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to be other users")
# Connects as another user, says where from, and does what it is told.
CLIENT = textwrap.dedent(
    """
    import os, socket, sys
    uid, family, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.setgroups([int(g) for g in sys.argv[5:]])
    os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
    sock = socket.socket(family)
    sock.connect(where if family == 1 else (where, int(sys.argv[4])))
    print("there", flush=True)
    for line in sys.stdin:
        if line == "half\\n": sock.shutdown(socket.SHUT_WR)
        if line == "close\\n": sock.close()
        print("done", flush=True)
    """
)


@contextlib.contextmanager
def client(
    uid: int, listener: socket.socket, *groups: int
) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """(our end, the process at the other one)"""
    family, where = listener.family, listener.getsockname()
    words = (where, "0") if family == socket.AF_UNIX else (where[0], str(where[1]))
    with connected(uid, family, words, listener, *groups) as found:
        yield found


@contextlib.contextmanager
def connected(
    uid: int, family: int, where: tuple[str, str], listener: socket.socket, *groups: int
) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """The same, by a socket of this family, to what it calls this place."""
    argv = [sys.executable, "-I", "-S", "-c", CLIENT, str(uid), str(int(family)), *where, *map(str, groups)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "there\n"
            sock, _ = listener.accept()
            with sock:
                yield sock, process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(10)


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


@pytest.fixture
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as made:
        made.bind((address, 0))
        made.listen()
        yield made


@as_root
@LOOPBACKS
def test_over_tcp_it_is_the_user_whose_socket_it_is(address: str, listening: socket.socket) -> None:
    for uid in (4001, 0, 4002):
        with client(uid, listening, 4999) as (sock, _):
            asker = askers.at(sock)
            assert asker == Asker(uid, None)
            # Groups come from the user database, which knows of no 4999: they are not the process's to say.
            assert askers.complete(asker).gids == ((0,) if uid == 0 else ())


@as_root
def test_an_ipv6_socket_that_holds_an_ipv4_connection_is_somebodys_too() -> None:
    """As all of Java's do."""
    with socket.socket(socket.AF_INET) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        mapped = ("::ffff:127.0.0.1", str(listener.getsockname()[1]))
        with connected(4001, socket.AF_INET6, mapped, listener) as (sock, process):
            assert askers.at(sock) == Asker(4001, None)
            tell(process, "close")
            with pytest.raises(Unknown):
                askers.at(sock)


@as_root
def test_over_a_unix_socket_groups_are_the_kernels_word() -> None:
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as listener:
        Path(place).chmod(0o755)
        path = Path(place, "socket")
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        with client(4001, listener, 50, 60) as (sock, _):
            assert askers.complete(askers.at(sock)) == Asker(4001, (50, 60, 4001))


@as_root
@LOOPBACKS
def test_one_that_has_said_all_is_still_somebody(address: str, listening: socket.socket) -> None:
    with client(4001, listening) as (sock, process):
        tell(process, "half")
        assert askers.at(sock) == Asker(4001, None)


@as_root
@LOOPBACKS
def test_one_that_is_gone_is_nobody_and_not_root(address: str, listening: socket.socket) -> None:
    """What the kernel has of its socket then reads uid 0."""
    with client(4001, listening) as (sock, process):
        tell(process, "close")
        with pytest.raises(Unknown, match="no process on this machine"):
            askers.at(sock)


class Ends:
    """A socket as far as its ends go."""

    def __init__(self, family: int, there: tuple[object, ...], here: tuple[object, ...]) -> None:
        self.family, self._there, self._here = family, there, here

    def getpeername(self) -> tuple[object, ...]:
        return self._there

    def getsockname(self) -> tuple[object, ...]:
        return self._here


@LOOPBACKS
def test_a_listener_is_never_taken_for_a_client(address: str, listening: socket.socket) -> None:
    """Asked about a connection that is not there, the kernel answers about who listens at that port."""
    port = listening.getsockname()[1]
    for there in ((address, port), ("192.0.2.7", port), ("2001:db8::7", port)):
        if (":" in str(there[0])) == (":" in address):
            with pytest.raises(Unknown):
                askers.at(Ends(listening.family, there, (address, 1)))


def test_a_socket_without_another_end_is_nobodys() -> None:
    with socket.socket() as alone, pytest.raises(Unknown, match="does not say who"):
        askers.at(alone)


# ---- the answer, by its bytes

ASKED = Attempt(
    family=Family.IPV4,
    protocol="tcp",
    number=6,
    source=ip_address("127.0.0.1"),
    destination=ip_address("127.0.0.2"),
    source_port=40000,
    destination_port=8000,
)


def message(
    *,
    state: int = 1,
    uid: int = 4001,
    number: int = 77,
    port: int = 40000,
    family: int = 2,
    mapped: bytes = b"",
) -> bytes:
    """inet_diag_msg; `mapped`: what stands before IPv4 addresses"""
    ends = (
        struct.pack("!HH", port, 8000)
        + (mapped + bytes([127, 0, 0, 1])).ljust(16, b"\0")
        + (mapped + bytes([127, 0, 0, 2])).ljust(16, b"\0")
    )
    body = bytes([family, state, 0, 0]) + ends + bytes(12) + bytes(12) + struct.pack("=II", uid, number)
    return struct.pack("=IHHII", 16 + len(body), 20, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("answer", "uid"),
    [
        (message(), 4001),
        (message(uid=0), 0),
        (message(state=4), 4001),  # FIN_WAIT1: it has said all
        (message(state=10), None),  # LISTEN
        (message(state=6, uid=0, number=0), None),  # TIME_WAIT
        (message(state=3, uid=0, number=0), None),  # SYN_RECV
        (message(uid=0, number=0), None),  # an orphan
        (message(port=40001), None),  # another's
        (message(family=10), None),
        (message(family=10, mapped=bytes(10) + b"\xff\xff"), 4001),  # ::ffff:127.0.0.1
        (message(family=10, mapped=bytes(12)), None),  # ::127.0.0.1 is another address
        (message(family=2, mapped=bytes(10) + b"\xff\xff"), None),
        (message(family=10, mapped=bytes(10) + b"\xff\xff", uid=0, number=0), None),
        (message()[:-1], None),
        (b"", None),
        (struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -2), None),  # ENOENT
    ],
)
def test_only_a_connection_between_these_ends_has_an_owner(answer: bytes, uid: int | None) -> None:
    assert owner(answer, ASKED) == uid


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer(data: bytes) -> None:
    assert isinstance(owner(data, ASKED), int | None)
