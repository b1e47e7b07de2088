"""Restarted or stopped? And what a service manager keeps over a restart: asked for, taken back, judged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.ipc import listening, readiness
from egressd.processes import manager, unrecorded
from egressd.processes.unrecorded import Happening

UNDER_SYSTEMD = {"NOTIFY_SOCKET": "/run/systemd/notify", "INVOCATION_ID": "0" * 32}
JOBS = "1234 other.service      stop    waiting\n1235 egressd.service    {}  running\n"


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/egressd.service\n", "egressd.service"),
        ("0::/system.slice/egressd.service/sub\n", "egressd.service"),
        ("0::/system.slice/system-egressd.slice/egressd@two.service", "egressd@two.service"),
        ("12:cpu:/wrong.service\n1:name=systemd:/system.slice/egressd.service\n0::/\n", "egressd.service"),
        # Hybrid: systemd's own hierarchy, version 2 beside it, controllers elsewhere.
        (
            "9:name=systemd:/system.slice/egressd.service\n8:pids:/system.slice/egressd.service\n"
            "4:memory:/system.slice\n0::/system.slice/egressd.service\n",
            "egressd.service",
        ),
        ("9:name=systemd:/\n8:pids:/wrong.service\n0::/system.slice/egressd.service\n", "egressd.service"),
        ("4:memory:/system.slice/wrong.service\n1:name=elogind:/wrong.service\n0::/\n", ""),
        # In a container without a control-group namespace: the innermost is ours.
        (
            "0::/machine.slice/systemd-nspawn@debian.service/payload/system.slice/egressd.service\n",
            "egressd.service",
        ),
        ("0::/../../system.slice/egressd.service\n", "egressd.service"),
        ("0::/system.slice/egressd.service (deleted)\n", ""),
        ("0::/user.slice/user-0.slice/session-1.scope\n", ""),
        ("0::/\n", ""),
        ("", ""),
        ("nonsense", ""),
        ("0::/system.slice/e vil.service", ""),
    ],
)
def test_our_unit_is_read_from_the_control_group(cgroups: str, unit: str) -> None:
    assert manager.unit(cgroups) == unit


@pytest.mark.parametrize("kind", ["restart", "stop", "try-restart"])
def test_the_job_of_our_unit_and_of_no_other(kind: str) -> None:
    assert manager.job(JOBS.format(kind), "egressd.service") == kind
    assert manager.job(JOBS.format(kind), "gressd.service") == ""
    assert manager.job("No jobs running.\n", "egressd.service") == ""


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program that answers in systemctl's place."""
    program = tmp_path / "systemctl"
    monkeypatch.setattr(manager, "_COMMAND", (str(program), "list-jobs"))
    monkeypatch.setattr(manager, "unit", lambda _: "egressd.service")
    return program


def answers(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


ANSWERS = {
    "a restart": (f"printf '{JOBS.format('restart')}'", True),
    "a conditional restart": (f"printf '{JOBS.format('try-restart')}'", True),
    "a stop": (f"printf '{JOBS.format('stop')}'", False),
    "a start": (f"printf '{JOBS.format('start')}'", False),
    "no job": ("true", False),
    "no answer": ("sleep 30", False),
    "a refusal": (f"printf '{JOBS.format('restart')}'; exit 1", False),
    "nonsense": ("printf '\\377\\376 egressd.service'", False),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_whatever_cannot_be_found_out_is_a_stop(
    systemctl: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, restarts = ANSWERS[what]
    answers(systemctl, f"exec {script}" if what == "no answer" else script)
    monkeypatch.setattr(manager, "_WITHIN", 0.5 if what == "no answer" else 20.0)
    assert manager.restarts(UNDER_SYSTEMD) == restarts
    assert manager.restarts({}) is False, "nobody manages us"


def test_without_the_program_it_is_a_stop(systemctl: Path) -> None:
    assert manager.restarts(UNDER_SYSTEMD) is False


# ---- what is kept


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(notified: socket.socket) -> tuple[str, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(notified, 4096, 4)
    return data.decode(), list(descriptors)


def test_a_descriptor_is_kept_by_name_and_dropped_by_name(notified: socket.socket) -> None:
    with socket.socket() as mine:
        readiness.keep("control", mine.fileno())
        said, (theirs,) = heard(notified)
        assert said == "FDSTORE=1\nFDNAME=control\nFDPOLL=0"
        assert os.fstat(theirs).st_ino == os.fstat(mine.fileno()).st_ino
        os.close(theirs)
    dropping = threading.Thread(target=readiness.drop, args=(["control", "udp4"],))
    dropping.start()
    assert [heard(notified)[0] for _ in range(2)] == [
        "FDSTOREREMOVE=1\nFDNAME=control", "FDSTOREREMOVE=1\nFDNAME=udp4"
    ]  # fmt: skip
    said, (barrier,) = heard(notified)
    assert said == "BARRIER=1"
    os.close(barrier)  # which says that all of it was read
    dropping.join(5)
    assert not dropping.is_alive()


def test_a_manager_that_is_gone_or_deaf_holds_nobody_up(
    notified: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(readiness, "_WITHIN", 0.05)
    for _ in range(20):
        readiness.notify("WATCHDOG=1")  # more than its queue holds (net.unix.max_dgram_qlen, 10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    readiness.notify("READY=1")
    readiness.drop(["control"])
    monkeypatch.delenv("NOTIFY_SOCKET")
    readiness.notify("READY=1")


TAKE = """
import json, os, sys
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
from egressd.ipc import readiness
found = readiness.kept()
left = [name for name in os.environ if name.startswith("LISTEN")]
print(json.dumps([{name: [n, os.get_inheritable(n)] for name, n in found.items()}, left]))
"""


def taken(*, names: str, count: int, other: int = 0) -> Any:
    line = "; ".join(f"exec {3 + number}</dev/null" for number in range(count))
    argv = ["sh", "-c", f'{line}; exec "$@"', "sh", sys.executable, "-c", TAKE, str(other)]
    env = os.environ | {"LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_what_was_kept_is_taken_once_and_by_nobody_else() -> None:
    assert taken(names="control:udp4", count=2) == [{"control": [3, False], "udp4": [4, False]}, []]
    assert taken(names="control:control", count=2) == [{"control": [3, False]}, []], "a name, once"
    assert taken(names="control", count=2) == [{"control": [3, False]}, []], "one without a name"
    assert taken(names="control:udp4", count=2, other=1) == [{}, []], "for another process"


def test_a_socket_that_was_kept_is_judged_by_the_kernel(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("the kernel tells only the network's administrator")
    path = str(tmp_path / "control.sock")

    def judged(sock: socket.socket, **other: Any) -> str:
        return listening.misfit(sock, **({"kind": socket.SOCK_SEQPACKET, "address": path} | other))

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, socket.socket() as tcp:
        sock.bind(path)
        assert "does not listen" in judged(sock)
        sock.listen()
        assert judged(sock) == ""
        assert "another kind" in judged(sock, kind=socket.SOCK_STREAM)
        assert "bound elsewhere" in judged(sock, address=path + "2")
        Path(path).unlink()
        assert "does not say" in judged(sock), "its path is gone"
        Path(path).touch()
        assert "leads to another file" in judged(sock)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        place = tcp.getsockname()
        assert judged(tcp, kind=socket.SOCK_STREAM, address=place) == ""
        assert "bound elsewhere" in judged(tcp, kind=socket.SOCK_STREAM, address=("127.0.0.1", 1))


# ---- what happened while nobody kept the journal


def test_happenings_wait_in_their_order_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert unrecorded.kept(state) == []
    one, two = Happening("gateway-begun", {"why": "a\nb"}), Happening("sandbox-lost", {"link": "eg1"})
    unrecorded.keep(state, [one])
    unrecorded.keep(state, [])
    unrecorded.keep(state, [two])
    path = state / "unrecorded.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a") as file:
        file.write('{"event": "sandbox-lo')
    assert unrecorded.kept(state) == [one, two]
    unrecorded.forget(state)
    assert unrecorded.kept(state) == []


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"event": "sandbox-lost", "fields": {}}\n')
    (tmp_path / "unrecorded.jsonl").symlink_to(tmp_path / "elsewhere")
    assert unrecorded.kept(tmp_path) == []
    with pytest.raises(OSError, match="symbolic"):
        unrecorded.keep(tmp_path, [Happening("gateway-begun", {})])
