"""As whom somebody logged in who asks as root: told where the kernel knows it of that very process."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from egressd.ipc.channel import peer_credentials
from egressd.processes import logins
from egressd.processes.logins import who
from egressd.processes.members import Caller, caller_of

CONNECT = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sys.stdin.read()
"""


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Asker:
    """Another process that has connected, and our end of it."""

    def __init__(self, directory: Path, listener: socket.socket) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONNECT, directory / "socket"], stdin=subprocess.PIPE
        )
        self.socket, _ = listener.accept()
        self.accepted = now()
        self.caller = caller_of(self.socket)
        assert self.caller.pid == self.process.pid

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def asker(tmp_path: Path) -> Iterator[Asker]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        found = Asker(tmp_path, listener)
        yield found
        found.end()
        found.socket.close()


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asker: Asker) -> Path:
    """What /proc says of the asker, for a test to say otherwise."""
    directory = tmp_path / "proc" / str(asker.caller.pid)
    directory.mkdir(parents=True)
    os.chown(directory, asker.caller.uid, -1)
    (directory / "stat").write_bytes(Path(f"/proc/{asker.caller.pid}/stat").read_bytes())
    (directory / "loginuid").write_text("1000")
    monkeypatch.setattr(logins, "PROC", tmp_path / "proc")
    return directory


@pytest.fixture(params=["held by the kernel", "held by its number"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linux before 6.5 has no SO_PEERPIDFD: ENOPROTOOPT, as for any number that is none."""
    if request.param == "held by its number":
        monkeypatch.setattr(logins, "_SO_PEERPIDFD", 0x7FFF)
    elif not has_peer_pidfd():
        pytest.skip("this kernel has no SO_PEERPIDFD")
    return str(request.param)


def has_peer_pidfd() -> bool:
    one, other = socket.socketpair()
    with one, other:
        try:
            os.close(one.getsockopt(socket.SOL_SOCKET, logins._SO_PEERPIDFD))
        except OSError:
            return False
        return True


def told(asker: Asker) -> str:
    return who(asker.caller, asker.socket, accepted=asker.accepted)


def test_the_login_is_told_beside_the_uid(asker: Asker, proc: Path, held: str) -> None:
    assert told(asker) == f"uid {os.getuid()} (login 1000)"


@pytest.mark.parametrize(
    "text", ["4294967295", str(os.getuid()), "", "x", "-1", "1000\n1000", "\x1b[2J", "٣"]
)
def test_one_that_is_unset_the_same_or_no_number_is_not(
    asker: Asker, proc: Path, held: str, text: str
) -> None:
    (proc / "loginuid").write_text(text)
    assert told(asker) == f"uid {os.getuid()}"


def test_without_audit_in_the_kernel_there_is_none(asker: Asker, proc: Path, held: str) -> None:
    (proc / "loginuid").unlink()
    assert told(asker) == f"uid {os.getuid()}"


def test_of_a_process_that_has_ended_nothing_is_read(asker: Asker, proc: Path, held: str) -> None:
    """Its number may be another's by now."""
    asker.end()
    assert told(asker) == f"uid {os.getuid()}"


def test_one_that_is_younger_than_the_connection_is_another(
    asker: Asker, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "_SO_PEERPIDFD", 0x7FFF)
    before = who(asker.caller, asker.socket, accepted=asker.accepted - 3600)
    assert (before, told(asker)) == (f"uid {os.getuid()}", f"uid {os.getuid()} (login 1000)")


def test_one_of_another_user_is_another(asker: Asker, proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "_SO_PEERPIDFD", 0x7FFF)
    other = Caller(asker.caller.pid, asker.caller.uid + 1, frozenset())
    assert who(other, asker.socket, accepted=asker.accepted) == f"uid {other.uid}"


def test_one_of_another_pid_namespace_has_no_number(asker: Asker, proc: Path, held: str) -> None:
    assert who(Caller(0, 0, frozenset()), asker.socket, accepted=asker.accepted) == "uid 0"


def test_no_descriptor_is_left_open(asker: Asker, proc: Path, held: str) -> None:
    told(asker)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        told(asker)
    (proc / "loginuid").unlink()
    for _ in range(10):
        told(asker)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_kernels_descriptor_is_of_the_process_that_connected(asker: Asker) -> None:
    """unix(7) does not have it yet; net/core/sock.c, Linux 6.5."""
    if not has_peer_pidfd():
        pytest.skip("this kernel has no SO_PEERPIDFD")
    descriptor = asker.socket.getsockopt(socket.SOL_SOCKET, logins._SO_PEERPIDFD)
    try:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        assert f"Pid:\t{peer_credentials(asker.socket).pid}\n" in info
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        assert not poller.poll(0)
        asker.end()
        assert poller.poll(5000)
    finally:
        os.close(descriptor)
