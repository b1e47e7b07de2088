"""Who tried what is refused: named while it waits for the refusal, and never made to wait for longer."""

# programs are easier to read in one line
# ruff: noqa: E501
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.sandbox import plumb, queueing
from egressd.sandbox.attempts import ATTEMPTS, PER_SECOND, Budget, printable
from sandbox.stand_in import Gateway, as_caller, eventually, processes_with

STRANGER4, STRANGER6 = "203.0.113.1", "2001:db8::1"  # the stand-in has them, and refuses
CURL = "curl -s -m 5"


# ---- what can be said without a sandbox


def test_twenty_a_second_are_told() -> None:
    budget = Budget()
    assert [budget.allows(5.0 + n / 1000) for n in range(PER_SECOND + 2)] == [True] * PER_SECOND + [False] * 2
    assert budget.allows(6.0)


def test_ten_thousand_are_told_and_no_more() -> None:
    budget = Budget()
    assert sum(budget.allows(float(n // 10)) for n in range(ATTEMPTS + 100)) == ATTEMPTS
    assert not budget.allows(1e6)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"curl", "curl"),
        ("größe".encode(), "größe"),
        (b"a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u202egnp.exe".encode(), "\\u202egnp.exe"),  # RIGHT-TO-LEFT OVERRIDE
        ("\ud800".encode(errors="surrogatepass"), "\\xed\\xa0\\x80"),
    ],
)
def test_foreign_text_is_spelled_in_printable_characters(data: bytes, text: str) -> None:
    assert printable(data) == text


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_any_bytes_become_text_that_can_be_sent(data: bytes) -> None:
    assert printable(data).isprintable()
    printable(data).encode()


def test_a_kernel_without_it_is_said_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> tuple[int, int]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(queueing, "open_sockets", missing)
    witness: list[Any] = []
    trouble = plumb._heed("7 198.18.0.0/16", witness)
    assert witness == []
    assert (
        trouble == "nobody will say which process tried what is refused: [Errno 2] No such file or directory"
    )
    assert plumb._heed("", witness) == "", "nothing was wished"


# ---- in a sandbox


@pytest.fixture
def told(gateway: Gateway) -> Iterator[Path]:
    path = gateway.run_dir / "attempts.jsonl"
    path.unlink(missing_ok=True)
    yield path
    assert eventually(lambda: gateway.links() == []), gateway.links()
    path.unlink(missing_ok=True)


def claims(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def places(path: Path) -> list[tuple[str, str, int | None]]:
    return [(c["protocol"], c["destination"], c.get("port")) for c in claims(path)]


TRY = """
import socket, sys, time
for word in sys.argv[1:]:
    kind, host, port = word.split(",")
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, {"tcp": 1, "udp": 2}[kind])
    s.settimeout(5)
    began = time.monotonic()
    try:
        s.connect((host, int(port)))
        if kind == "udp":
            s.send(b"x")
            time.sleep(0.02)
    except OSError as error:
        pass
    print(word, "slow" if time.monotonic() - began > 0.5 else "at once", flush=True)
"""


def tries(*words: str) -> list[str]:
    return ["/usr/bin/python3", "-I", "-c", TRY, *words]


@pytest.mark.kernel
def test_a_short_lived_process_is_named(gateway: Gateway, told: Path) -> None:
    done = gateway.run(*CURL.split(), "-A", "a b", f"http://{STRANGER4}/", workspace="watched")
    assert done.returncode == 7, done.stderr
    assert eventually(lambda: len(claims(told)) == 1), claims(told)
    assert claims(told) == [
        {
            "type": "Attempt", "protocol": "tcp", "destination": STRANGER4, "port": 80, "pid": 2,
            "executable": "/usr/bin/curl", "command": f"curl -s -m 5 -A 'a b' http://{STRANGER4}/",
        }
    ]  # fmt: skip


@pytest.mark.kernel
def test_both_families_and_protocols(gateway: Gateway, told: Path) -> None:
    words = [
        f"{kind},{host},{port}" for kind in ("tcp", "udp") for host, port in ((STRANGER4, 9), (STRANGER6, 10))
    ]
    words.append(f"tcp,::ffff:{STRANGER4},11")
    done = gateway.run(*tries(*words), workspace="watched")
    assert done.stdout.splitlines() == [f"{word} at once" for word in words], done.stderr
    wanted = [("tcp", STRANGER4, 9), ("tcp", STRANGER6, 10), ("udp", STRANGER4, 9), ("udp", STRANGER6, 10),
              ("tcp", STRANGER4, 11)]  # fmt: skip
    assert eventually(lambda: places(told) == wanted), places(told)
    assert {claim["pid"] for claim in claims(told)} == {2}


@pytest.mark.kernel
def test_the_one_of_several_processes_that_has_the_socket(gateway: Gateway, told: Path) -> None:
    script = f"sleep 3 & (sleep 3 & exec {CURL} http://{STRANGER6.join('[]')}:81/); kill %1"
    gateway.run("bash", "-c", script, workspace="watched")
    assert eventually(lambda: places(told) == [("tcp", STRANGER6, 81)]), places(told)
    [claim] = claims(told)
    assert claim["executable"] == "/usr/bin/curl"
    assert claim["pid"] > 2


@pytest.mark.kernel
def test_what_the_policy_may_list_is_left_alone(gateway: Gateway, told: Path) -> None:
    """The workspace's networks are 198.18.0.0/16, fd53:e9::/64, the resolver, and 192.0.2.0/25."""
    known = ["tcp,169.254.53.53,1", "udp,192.0.2.1,1", "tcp,192.0.2.1,1", "tcp,127.0.0.1,1", "tcp,::1,1"]
    gateway.run(*tries(*known, "tcp,192.0.2.129,1"), workspace="watched")
    assert eventually(lambda: places(told) == [("tcp", "192.0.2.129", 1)]), places(told)


@pytest.mark.kernel
def test_where_nobody_is_to_look_nobody_does(gateway: Gateway, told: Path) -> None:
    gateway.run(*tries(f"tcp,{STRANGER4},1"), workspace="plain")
    gateway.run(*tries(f"tcp,{STRANGER4},2"), workspace="watched")
    assert eventually(lambda: places(told) == [("tcp", STRANGER4, 2)]), places(told)


@pytest.mark.kernel
def test_a_crowd_is_told_of_as_far_as_it_goes_and_nobody_waits(gateway: Gateway, told: Path) -> None:
    words = [f"tcp,{STRANGER4},{port}" for port in range(1, 501)]
    began = time.monotonic()
    done = gateway.run(*tries(*words), workspace="watched")
    assert done.stdout.splitlines() == [f"{word} at once" for word in words]
    assert eventually(lambda: len(claims(told)) >= PER_SECOND), len(claims(told))
    assert len(claims(told)) <= PER_SECOND * (2 + int(time.monotonic() - began))


@pytest.mark.kernel
def test_at_one_moment(gateway: Gateway, told: Path) -> None:
    script = f"""
import socket, time
all = [socket.socket() for _ in range(15)]
for port, s in enumerate(all): s.setblocking(False); s.connect_ex(("{STRANGER4}", 100 + port))
time.sleep(0.3)
"""
    gateway.python(script, workspace="watched")
    assert eventually(lambda: places(told) == [("tcp", STRANGER4, 100 + n) for n in range(15)]), places(told)


def witness_of(process: subprocess.Popen[str]) -> int | None:
    """The broker's fork, once it has closed what came along from the broker, and looks."""
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            found = {path.name for path in Path(f"/proc/{word}/fd").iterdir()}
            if len(found) == 3 and "0" not in found:
                return int(word)
    return None


@pytest.mark.kernel
@pytest.mark.parametrize("who", ["broker", "group"])
def test_a_stopped_broker_keeps_nobody_waiting(gateway: Gateway, told: Path, who: str) -> None:
    words = [f"tcp,{STRANGER4},1", f"tcp,{STRANGER6},2"]
    script = f"read x; exec /usr/bin/python3 -I -c '{TRY}' {' '.join(words)}"
    process = gateway.start(
        "bash", "-c", script, workspace="watched", stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert eventually(lambda: witness_of(process) is not None)
        (os.killpg if who == "group" else os.kill)(process.pid, signal.SIGSTOP)
        process.stdin.write("\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in words] == [f"{word} at once\n" for word in words]
        assert claims(told) == [], "who would have told them is stopped"
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.communicate(timeout=10)
    assert eventually(lambda: places(told) == [("tcp", STRANGER4, 1), ("tcp", STRANGER6, 2)]), places(told)


@pytest.mark.kernel
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_witness_it_is_refused_all_the_same(
    gateway: Gateway, told: Path, signal_number: int
) -> None:
    """Killed: the kernel holds nothing any more. Stopped, which only the caller can do: held, until the end."""
    token = uuid.uuid4().hex
    process = gateway.start(
        "bash",
        "-c",
        f"read x; {CURL} http://{STRANGER4}/; echo $?; : {token}",
        workspace="watched",
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert eventually(lambda: witness_of(process) is not None)
    witness = witness_of(process)
    assert witness is not None
    os.kill(witness, signal_number)
    out, _ = process.communicate("\n", timeout=20)
    assert out == ("7\n" if signal_number == signal.SIGKILL else "28\n")  # refused; curl's own time was up
    assert claims(told) == []
    assert eventually(lambda: not Path(f"/proc/{witness}").exists())
    assert eventually(lambda: processes_with(token) == [])


@pytest.mark.kernel
def test_the_broker_killed_leaves_no_witness(gateway: Gateway, told: Path) -> None:
    token = uuid.uuid4().hex
    process = gateway.start("bash", "-c", f"sleep 60; : {token}", workspace="watched")
    assert eventually(lambda: witness_of(process) is not None)
    process.kill()
    process.communicate()
    assert eventually(lambda: processes_with(token) == []), processes_with(token)


@pytest.mark.kernel
def test_the_command_can_neither_reach_the_queue_nor_the_rules(gateway: Gateway, told: Path) -> None:
    script = """
import os, socket
print(sorted(int(n) for n in os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"))])
for protocol in (4, 12):
    try: print(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol))
    except OSError as error: print(error.strerror)
"""
    done = gateway.python(script, workspace="watched")
    assert done.stdout.splitlines() == [
        "[0, 1, 2] 4",
        str(["0" * 16] * 5),
        *["Address family not supported by protocol"] * 2,
    ]


PING = """
import ctypes, fcntl, os, socket, sys
libc = ctypes.CDLL(None)
network = os.open(f"/proc/{sys.argv[1]}/ns/net", os.O_RDONLY)
assert not libc.setns(fcntl.ioctl(network, 0xB701), 0x10000000) and not libc.setns(network, 0x40000000)
for family, protocol, host in ((2, 1, "203.0.113.1"), (10, 58, "2001:db8::1")):
    s = socket.socket(family, socket.SOCK_RAW, protocol)
    s.sendto(bytes([8 if family == 2 else 128, 0, 0, 0, 0, 1, 0, 1]), (host, 0))
    s.settimeout(1)
    try: s.recv(99)
    except OSError: pass
    s.close()
"""


@pytest.mark.kernel
def test_another_process_of_the_caller_s_is_named_without_a_number(gateway: Gateway, told: Path) -> None:
    """With a raw socket, which nobody inside can have."""
    token = uuid.uuid4().hex
    process = gateway.start("bash", "-c", f"sleep 20; : {token}", workspace="watched")
    with contextlib.ExitStack() as undo:
        undo.callback(process.communicate)
        undo.callback(process.terminate)
        assert eventually(lambda: witness_of(process) is not None)
        inside = max(processes_with(token))
        done = subprocess.run(
            as_caller("/usr/bin/python3", "-c", PING, str(inside)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert eventually(lambda: places(told) == [("icmp", STRANGER4, None), ("icmpv6", STRANGER6, None)]), (
            places(told)
        )
    assert all(claim.get("pid") is None and "PING" not in claim["command"] for claim in claims(told))
    assert {claim["executable"] for claim in claims(told)} == {os.path.realpath("/usr/bin/python3")}


@pytest.mark.kernel
def test_long_and_hostile_words_are_cut_and_escaped(gateway: Gateway, told: Path) -> None:
    gateway.run(*tries(f"tcp,{STRANGER4},1"), "\x1b[2J\n", "x" * 5000, workspace="watched")
    assert eventually(lambda: len(claims(told)) == 1)
    [claim] = claims(told)
    assert len(claim["command"]) == 2048
    assert claim["command"].isprintable()


@pytest.mark.kernel
def test_what_waits_for_an_end_of_file_gets_it(gateway: Gateway) -> None:
    """The witness is a fork: were it to keep the broker's pipes, `cat` would wait for its input for ever."""
    program = f"import egressd; print(egressd.Sandbox(workspace='watched', run_dir={str(gateway.run_dir)!r}).run(['cat'], input=b'in', capture_output=True, timeout=10).stdout)"
    done = subprocess.run(
        as_caller(sys.executable, "-c", program), capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.stdout == "b'in'\n", done.stderr
