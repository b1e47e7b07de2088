"""The filter, met by the calls themselves: bubblewrap with the program and nothing else of ours."""

# programs are easier to read in one line
# ruff: noqa: E501
from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyseccomp
import pytest

from egressd.sandbox import seccomp
from egressd.sandbox.seccomp import RULES, program, program_descriptor
from sandbox.stand_in import as_caller

HERE = Path(__file__).resolve().parent
HIGH = 1 << 32  # the filter sees 64 bits, the kernel takes 32: what sets only the upper half is no way around
pytestmark = pytest.mark.kernel


@dataclass
class Filtered:
    """bwrap under the filter, with everything of the machine's in sight."""

    descriptor: int

    def run(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"text": True, "env": {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}}
        if "input" not in more:
            settings["stdin"] = subprocess.DEVNULL
        line = as_caller(
            "bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
            "--tmpfs", "/tmp", "--die-with-parent", "--seccomp", str(self.descriptor), "--", *argv,
        )  # fmt: skip
        return subprocess.run(
            line, pass_fds=(self.descriptor,), capture_output=True, timeout=30, check=False, cwd="/",
            **(settings | more),
        )  # fmt: skip


@pytest.fixture
def filtered() -> Iterator[Filtered]:
    descriptor = program_descriptor()
    yield Filtered(descriptor)
    os.close(descriptor)


def attempts(filtered: Filtered, calls: dict[str, tuple[int, list[int]]]) -> dict[str, str]:
    asked = json.dumps([[name, number, arguments] for name, (number, arguments) in calls.items()])
    script = (HERE / "refused_calls.py").read_text()
    done = filtered.run("/usr/bin/python3", "-c", script, asked)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def number(name: str) -> int:
    found: int = pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)
    return found


NEVER = [name for rule in RULES if not rule.when for name in rule.names if number(name) >= 0]


def test_calls_that_are_never_allowed(filtered: Filtered) -> None:
    """One entry per call; arguments of zero, which most would answer otherwise without the filter."""
    expected = {name: errno.errorcode[rule.error] for rule in RULES if not rule.when for name in rule.names}
    found = attempts(filtered, {name: (number(name), [0] * 6) for name in NEVER})
    assert found == {name: expected[name] for name in NEVER}
    assert len(found) > 50


def test_socket_families(filtered: Filtered) -> None:
    call = number("socket")
    families = {str(n): (call, [n, socket.SOCK_DGRAM, 0]) for n in range(64)}
    far = {"vsock high": (call, [40 + HIGH, 1, 0]), "inet high": (call, [2 + HIGH, 1, 0]),
           "1000": (call, [1000, 1, 0]), "-1": (call, [2**64 - 1, 1, 0])}  # fmt: skip
    found = attempts(filtered, families | far)
    assert {name for name, said in found.items() if said == "ok"} == {"1", "2", "10", "16"}
    assert {said for name, said in found.items() if name not in ("1", "2", "10", "16")} == {"EAFNOSUPPORT"}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_kinds_and_protocols_of_internet_sockets(filtered: Filtered, family: int) -> None:
    call, cloexec = number("socket"), socket.SOCK_CLOEXEC
    tried = {
        "tcp": [family, 1, 0], "udp": [family, 2, 0], "tcp by name": [family, 1 | cloexec, 6],
        "raw": [family, 3, 255], "raw cloexec": [family, 3 | cloexec, 1], "raw high": [family, 3 + HIGH, 1],
        "rdm": [family, 4, 0], "dccp": [family, 6, 0], "packet": [family, 10, 3],
        "sctp": [family, 1, 132], "mptcp": [family, 1, 262], "mptcp high": [family, 1, 262 + HIGH],
        "smc": [family, 1, 256], "smc high": [family, 1, 256 + HIGH], "sctp packets": [family, 5, 132],
        "udplite": [family, 2, 136], "ping": [family, 2, 1 if family == socket.AF_INET else 58],
    }  # fmt: skip
    assert attempts(filtered, {name: (call, arguments) for name, arguments in tried.items()}) == {
        "tcp": "ok", "udp": "ok", "tcp by name": "ok",
        "raw": "EPERM", "raw cloexec": "EPERM", "raw high": "EPERM",
        "rdm": "EPERM", "dccp": "EPERM", "packet": "EPERM",
        "sctp": "EPROTONOSUPPORT", "mptcp": "EPROTONOSUPPORT", "mptcp high": "EPROTONOSUPPORT",
        "smc": "EPROTONOSUPPORT", "smc high": "EPROTONOSUPPORT", "sctp packets": "EPROTONOSUPPORT",
        # what the filter leaves of ping, ping_group_range refuses
        "udplite": "EPROTONOSUPPORT", "ping": "EACCES" if family == socket.AF_INET else "EPROTONOSUPPORT",
    }  # fmt: skip


def test_netlink_reads_the_namespaces_own_links_and_nothing_else(filtered: Filtered) -> None:
    call = number("socket")
    tried = {str(n): (call, [16, 3, n]) for n in (0, 4, 9, 12, 15, 16)} | {"high": (call, [16, 3, HIGH])}
    found = attempts(filtered, tried)
    assert found == {name: "ok" if name == "0" else "EAFNOSUPPORT" for name in tried}


def test_unix_sockets_and_pairs(filtered: Filtered) -> None:
    room = 2**20  # not mapped: EFAULT says the call got past the filter
    found = attempts(
        filtered,
        {
            "unix pair": (number("socketpair"), [1, 1, 0, room]),
            "inet pair": (number("socketpair"), [2, 1, 0, room]),
            "pair high": (number("socketpair"), [1 + HIGH, 1, 0, room]),
            "unix dgram": (number("socket"), [1, 2, 0]),
            "unix stream": (number("socket"), [1, 1, 0]),
        },
    )
    assert found == {
        "unix pair": "EFAULT", "inet pair": "EAFNOSUPPORT", "pair high": "EAFNOSUPPORT",
        "unix dgram": "ok", "unix stream": "ok",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(seccomp._NEW_NAMESPACE))
def test_no_new_namespaces(filtered: Filtered, name: str) -> None:
    flag, sigchld = seccomp._NEW_NAMESPACE[name], 17
    found = attempts(
        filtered,
        {
            "clone": (number("clone"), [flag | sigchld, 0, 0, 0, 0]),
            "with user": (number("clone"), [flag | 0x10000000 | sigchld, 0, 0, 0, 0]),
            "unshare": (number("unshare"), [flag]),
        },
    )
    assert set(found.values()) == {"EPERM"}


def test_nobody_types_into_the_terminal(filtered: Filtered) -> None:
    call = number("ioctl")
    found = attempts(
        filtered,
        {
            "TIOCSTI": (call, [0, 0x5412, 0]),
            "TIOCSTI high": (call, [0, 0x5412 + HIGH, 0]),
            "TIOCLINUX": (call, [0, 0x541C, 0]),
            "TCGETS": (call, [0, 0x5401, 0]),
        },
    )
    assert found == {"TIOCSTI": "EPERM", "TIOCSTI high": "EPERM", "TIOCLINUX": "EPERM", "TCGETS": "ENOTTY"}


def test_calls_newer_than_the_filter_are_not_there(filtered: Filtered) -> None:
    """listmount 458, open_tree_attr 467, file_getattr 468: unknown to libseccomp, which lets them by."""
    found = attempts(filtered, {str(n): (n, [0] * 6) for n in (451, 458, 467, 468, 600, 100_000)})
    assert set(found.values()) == {"ENOSYS"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 has a second ABI in its numbers")
def test_the_x32_abi_ends_the_process(filtered: Filtered) -> None:
    assert attempts(filtered, {"x32 socket": (0x40000000 + number("socket"), [40, 1, 0])}) == {
        "x32 socket": "signal 31"
    }


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("gcc"), reason="needs gcc on x86_64")
def test_32_bit_calls_end_the_process(filtered: Filtered, tmp_path: Path) -> None:
    source, program = tmp_path / "old.c", tmp_path / "old"
    source.write_text('int main(void){int r;asm volatile("int $0x80":"=a"(r):"a"(20));return r<=0;}')
    subprocess.run(["gcc", "-o", program, source], check=True)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if directory.stat().st_uid == os.getuid() and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o011)
    without = subprocess.run(as_caller(program), check=False, cwd="/").returncode
    if without != 0:
        pytest.skip("this kernel runs no 32-bit calls anyway")
    stdin = program.read_bytes()
    runs = "cat > /tmp/old && chmod +x /tmp/old && /tmp/old"
    done = filtered.run("sh", "-c", runs, input=stdin, text=False)
    assert done.returncode == 128 + 31


PYTHON = {
    "asyncio": "import asyncio; asyncio.run(asyncio.create_subprocess_exec('true'))",
    "subprocess": "import subprocess; subprocess.run(['true'], check=True)",
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "pool": "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: assert p.map(abs, [-1]) == [1]",
    "manager": "import multiprocessing as m\nwith m.get_context('fork').Manager() as g: assert g.list([1])[0] == 1",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory as S\ns = S(create=True, size=9); s.unlink()",
    "if_nameindex": "import socket; assert [n for _, n in socket.if_nameindex()] == ['lo']",
    "unix": "import socket; s = socket.socket(1); s.bind('/tmp/s'); s.listen(); socket.socket(1).connect('/tmp/s')",
    "loopback": "import socket; s = socket.create_server(('::1', 0), family=10); socket.create_connection(s.getsockname()[:2])",
    "getaddrinfo": "import socket; assert socket.getaddrinfo('localhost', 80)",
    "tempfile": "import tempfile; tempfile.NamedTemporaryFile().write(b'x')",
}


@pytest.mark.parametrize("what", PYTHON)
def test_python_works(filtered: Filtered, what: str) -> None:
    done = filtered.run("/usr/bin/python3", "-c", PYTHON[what])
    assert done.returncode == 0, done.stderr


OTHERS = {
    "node net": [
        "node",
        "-e",
        "require('net').createServer().listen(0, '::1', function () { this.close() })",
    ],
    "node unix": [
        "node",
        "-e",
        "require('net').createServer().listen('/tmp/n', function () { this.close() })",
    ],
    "node worker": ["node", "-e", "new (require('worker_threads').Worker)('1', {eval: true})"],
    "node fork": ["node", "-e", "require('child_process').execSync('true')"],
    "node dns": ["node", "-e", "require('dns').lookup('localhost', e => process.exit(e ? 1 : 0))"],
    "node interfaces": ["node", "-e", "require('os').networkInterfaces()"],
    "java": ["java", "-Xmx64m", "-version"],
    "curl": ["curl", "--version"],
    "git": ["git", "--version"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_programs_work(filtered: Filtered, what: str) -> None:
    if not shutil.which(OTHERS[what][0], path="/usr/bin:/bin"):
        pytest.skip(f"no {OTHERS[what][0]} here")
    done = filtered.run(*OTHERS[what])
    assert done.returncode == 0, done.stderr


def test_the_program_is_whole_and_made_once() -> None:
    assert len(program()) % 8 == 0
    assert 100 < len(program()) // 8 < 4096  # BPF_MAXINSNS
    assert program() is program()


def test_names_of_other_architectures_do_no_harm() -> None:
    """aarch64 has no iopl, x86_64 no stime: what is not there needs no rule."""
    assert seccomp._number("stime" if platform.machine() == "x86_64" else "iopl") is None
    assert seccomp._number("no_such_call") is None
    assert seccomp._number("ptrace") is not None
