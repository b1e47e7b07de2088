"""egressctl run, as an unprivileged caller, against a stand-in for egressd that makes real links."""

# ruff: noqa: PTH115
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from sandbox.stand_in import CALLER, Gateway, as_caller, eventually, processes_with

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _nothing_left(gateway: Gateway) -> None:
    """Every test ends with no link in the gateway."""
    yield
    assert eventually(lambda: gateway.links() == []), gateway.links()


# ---- as under env(1)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "exit 125"], 125),
        (["sh", "-c", "exit 255"], 255),
        (["no-such-command"], 127),
        (["/no/such/path"], 127),
        (["/etc/passwd"], 126),
        (["/usr"], 126),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["sh", "-c", "kill -SEGV $$"], 139),
    ],
)
def test_the_exit_status_is_the_commands(gateway: Gateway, command: list[str], status: int) -> None:
    done = gateway.run(*command)
    assert done.returncode == status, done.stderr
    assert subprocess.run(["env", *command], check=False, capture_output=True).returncode in (
        status,
        128 - status,  # env is replaced by the command, so Python sees the signal itself
    )


def test_output_input_and_errors_are_the_callers(gateway: Gateway) -> None:
    done = gateway.run("sh", "-c", "cat; echo err >&2", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "err\n", 0)


def test_the_end_of_input_is_seen(gateway: Gateway) -> None:
    assert gateway.run("wc", "-c", input="").stdout == "0\n"
    closed = gateway.run("cat", stdin=subprocess.DEVNULL)
    assert (closed.stdout, closed.returncode) == ("", 0)


def test_big_input_and_output_pass_whole(gateway: Gateway) -> None:
    data = "0123456789abcde\n" * (1 << 18)  # 4 MiB
    assert gateway.run("cat", input=data).stdout == data


def test_a_reader_that_goes_away_ends_the_command(gateway: Gateway) -> None:
    line = " ".join(gateway.argv("yes"))
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=20, check=True, cwd="/",
    )  # fmt: skip
    assert done.stdout == "y\n141\n", done.stderr  # 128 + SIGPIPE: not left ignored by Python


def test_closed_standard_descriptors_are_null_not_something_else(gateway: Gateway) -> None:
    line = " ".join(gateway.argv("sh", "-c", "'readlink /proc/self/fd/0 >&2'"))
    done = subprocess.run(
        ["bash", "-c", f"{line} <&- >&-"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stderr.strip() == "/dev/null"


def test_words_reach_the_command_as_they_are(gateway: Gateway) -> None:
    words = ["", " ", "a b", "$HOME", "`id`", "'", '"', "*", "\n", "é", "-x", "--", "\\"]
    done = gateway.python("import sys, json; print(json.dumps(sys.argv[1:]))", workspace="plain")
    assert json.loads(done.stdout) == []
    shown = gateway.run("/usr/bin/python3", "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *words)
    assert json.loads(shown.stdout) == words


# ---- what the command finds


def test_the_environment_is_clean(gateway: Gateway) -> None:
    done = gateway.run(
        "env", env={"PATH": os.environ["PATH"], "SECRET": "s", "LD_PRELOAD": "", "TERM": "vt100"}
    )
    assert sorted(done.stdout.splitlines()) == [
        "HOME=/tmp", "LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin", "PWD=/tmp",
    ]  # fmt: skip


def test_named_variables_are_set(gateway: Gateway) -> None:
    done = gateway.run(
        "sh", "-c", "echo $A-$B-$HOME", options=("--env", "A=1", "--env", "B=x=y", "--env=HOME=/")
    )
    assert done.stdout == "1-x=y-/\n"


def test_a_variable_need_not_be_text(gateway: Gateway) -> None:
    done = gateway.run("printenv", "X", options=("--env", os.fsdecode(b"X=\xff\xc3\xa9")), text=False)
    assert (done.stdout, done.returncode) == (b"\xff\xc3\xa9\n", 0), done.stderr


def test_ollama_host_is_set_where_there_is_one(gateway: Gateway) -> None:
    assert gateway.run("printenv", "OLLAMA_HOST", workspace="acme").stdout == "http://127.0.0.1:11434\n"
    assert gateway.run("printenv", "OLLAMA_HOST", workspace="plain").returncode == 1


def test_no_descriptor_but_the_three_is_passed_on(gateway: Gateway) -> None:
    with socket.socket() as leak, Path("/etc/hostname").open() as other:
        numbers = (leak.fileno(), other.fileno())
        done = gateway.python(
            "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])", pass_fds=numbers
        )
    assert done.stdout == "[0, 1, 2]\n", done.stderr


def test_no_capability_and_no_way_to_one(gateway: Gateway) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in gateway.run("cat", "/proc/self/status").stdout.splitlines()
        if ":\t" in line
    )
    sets = [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert set(sets) == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == [str(CALLER)] * 4


def test_every_namespace_is_its_own(gateway: Gateway) -> None:
    done = gateway.run("sh", "-c", "readlink /proc/self/ns/*")
    inside = set(done.stdout.split())
    outside = {
        os.readlink(f"/proc/self/ns/{n}") for n in ("user", "net", "mnt", "pid", "ipc", "uts", "cgroup")
    }
    assert not inside & outside
    assert gateway.run("hostname").stdout == "sandbox\n"


def test_nothing_of_the_machine_is_writable_or_reachable(gateway: Gateway) -> None:
    script = """
for d in / /usr /etc /dev /proc/sys/kernel /sys /work; do (: > $d/x) 2>/dev/null && echo "writable $d"; done
(: > /tmp/x) || echo 'no /tmp'
(echo 1 > /proc/sys/net/ipv4/ip_forward) 2>/dev/null && echo 'sysctl'
find / -xdev \\( -type s -o -type p -o -type b \\) 2>/dev/null
ls -A /run; ls -A /tmp
ls / | tr '\\n' ' '
"""
    done = gateway.run("sh", "-c", script)
    assert done.stdout.splitlines() == ["x", "bin dev etc lib lib64 proc run sbin tmp usr "]


def test_processes_of_the_machine_are_not_seen(gateway: Gateway) -> None:
    done = gateway.run("sh", "-c", "echo /proc/[0-9]*")
    assert len(done.stdout.split()) <= 3  # bubblewrap's init, the shell


def test_core_dumps_are_off(gateway: Gateway) -> None:
    assert gateway.run("sh", "-c", "ulimit -Hc").stdout == "0\n"


def test_names_are_looked_up_at_our_resolver_only(gateway: Gateway) -> None:
    done = gateway.run("cat", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")
    assert (
        "nameserver 169.254.53.53\nnameserver fd53:53::53\noptions ndots:1 timeout:1 attempts:5\n"
        in done.stdout
    )
    assert "search" not in done.stdout
    assert "hosts: files dns\n" in done.stdout
    assert socket.gethostname() not in done.stdout.split()


@pytest.mark.parametrize(
    "target",
    [
        "../run/systemd/resolve/stub-resolv.conf",
        "/run/resolvconf/resolv.conf",
        "resolv.conf.real",
        "/nowhere/at/all",
    ],
)
def test_resolv_conf_may_be_a_link_on_the_machine(gateway: Gateway, target: str, tmp_path: Path) -> None:
    """Seen from a mount namespace whose /etc is a copy."""
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore=shutil.ignore_patterns("*shadow*", "ssl", "java*"))
    (etc / "resolv.conf").unlink()
    (etc / "resolv.conf").symlink_to(target)
    if target == "resolv.conf.real":
        (etc / target).write_text("nameserver 9.9.9.9\n")
    line = gateway.argv("sh", "-c", "readlink /etc/resolv.conf; cat /etc/resolv.conf")
    script = f'mount --bind {etc} /etc && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *line],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.stderr == ""
    expected = "nameserver 169.254.53.53\nnameserver fd53:53::53\noptions ndots:1 timeout:1 attempts:5\n"
    assert done.stdout == f"{target}\n{expected}"


# ---- the network, as plumbed


def test_the_link_as_ip_shows_it(gateway: Gateway) -> None:
    script = "ip -j -d addr show dev eth0; ip -j neigh; ip -j route; ip -6 -j route show default"
    done = gateway.run("sh", "-c", script, workspace="acme")
    link, neighbours, routes4, routes6 = (json.loads(line) for line in done.stdout.splitlines())
    assert link[0]["address"] == "02:53:00:00:00:01"
    assert {"NOARP", "UP"} <= set(link[0]["flags"])
    found = {(a["local"], a["prefixlen"]) for a in link[0]["addr_info"]}
    assert len(found) == 2
    assert {prefix for _, prefix in found} == {32, 128}
    assert not any("tentative" in a for a in link[0]["addr_info"])
    own4, own6 = (next(a for a, p in found if p == width) for width in (32, 128))
    assert {(n["dst"], n["lladdr"], *n["state"]) for n in neighbours} == {
        ("169.254.53.53", "02:53:00:00:00:02", "PERMANENT"),
        ("fe80::53", "02:53:00:00:00:02", "PERMANENT"),
    }
    assert [(r["dst"], r["gateway"], r["prefsrc"]) for r in routes4] == [("default", "169.254.53.53", own4)]
    assert [(r["dst"], r["gateway"], r["prefsrc"]) for r in routes6] == [("default", "fe80::53", own6)]


CONNECT = """
import socket, sys
for word in sys.argv[1:]:
    address, _, port = word.rpartition(":")
    try:
        with socket.create_connection((address, int(port)), 2) as s: print(s.recv(99).decode().split()[0])
    except OSError as error: print(type(error).__name__)
"""


def test_services_answer_on_the_loopback_in_both_families(gateway: Gateway) -> None:
    asked = ["127.0.0.1:11434", "::1:11434", "localhost:11434", "127.0.0.1:8080", "::1:8080",
             "127.0.0.1:1", "::1:1", "127.0.0.2:11434"]  # fmt: skip
    done = gateway.run("/usr/bin/python3", "-c", CONNECT, *asked, workspace="acme")
    refused = "ConnectionRefusedError"
    assert done.stdout.split() == ["ollama"] * 3 + ["other"] * 2 + [refused] * 3, done.stderr


def test_without_a_service_the_loopback_leads_nowhere(gateway: Gateway) -> None:
    asked = ["127.0.0.1:11434", "::1:11434"]
    done = gateway.run("/usr/bin/python3", "-c", CONNECT, *asked, workspace="plain")
    assert done.stdout.split() == ["ConnectionRefusedError"] * 2


def test_own_servers_on_the_loopback_work_beside_the_services(gateway: Gateway) -> None:
    script = """
import socket
for host in ("127.0.0.1", "::1"):
    server = socket.create_server((host, 5000), family=10 if ":" in host else 2)
    with socket.create_connection((host, 5000), 2) as client:
        server.accept()[0].sendall(b"own")
        print(client.recv(9).decode())
"""
    assert gateway.python(script, workspace="acme").stdout == "own\nown\n"


def test_bytes_to_a_service_cross_the_counted_link_with_the_sandboxs_source(gateway: Gateway) -> None:
    script = """
import socket, re
own = set(open('/proc/net/fib_trie').read().split()) & {'198.19.0.%d' % n for n in range(256)}
with socket.create_connection(('127.0.0.1', 11434), 2) as s: print(s.recv(99).decode().split()[1] in own)
"""
    assert gateway.python(script, workspace="acme").stdout == "True\n"


def test_an_idle_sandbox_sends_nothing(gateway: Gateway) -> None:
    """No ARP, no neighbour discovery, no MLD: each would be a denied packet in the books."""
    done = gateway.run(
        "sh",
        "-c",
        "sleep 2; cat /sys/class/net/eth0/statistics/tx_packets 2>/dev/null || ip -s -j link show eth0",
    )
    assert json.loads(done.stdout)[0]["stats64"]["tx"]["packets"] == 0


def test_no_icmp_sockets(gateway: Gateway) -> None:
    script = """
import errno, socket
for family, protocol in ((2, 1), (10, 58)):
    try: socket.socket(family, 2, protocol)
    except OSError as error: print(errno.errorcode[error.errno])
"""
    assert gateway.python(script).stdout == "EACCES\nEPROTONOSUPPORT\n"


# ---- the caller's directories


def test_files_are_shown_read_only_and_are_the_working_directory(gateway: Gateway, shown: Path) -> None:
    (shown / "data").write_text("hello")
    script = "pwd; cat data; (: > new) 2>/dev/null || echo read-only"
    done = gateway.run("sh", "-c", script, options=("--files", str(shown)))
    assert done.stdout == "/work\nhelloread-only\n"


def test_bound_directories_are_where_they_were(gateway: Gateway, shown: Path) -> None:
    (shown / "tool").write_text("#!/bin/sh\necho tool\n")
    (shown / "tool").chmod(0o755)
    done = gateway.run(str(shown / "tool"), options=("--bind-ro", str(shown)))
    assert done.stdout == "tool\n", done.stderr


def test_a_tree_with_a_socket_runs_nothing(gateway: Gateway, shown: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shown / "docker.sock"))
        done = gateway.run("echo", "ran", options=("--files", str(shown)))
    assert (done.returncode, done.stdout) == (125, "")
    assert "docker.sock' is a socket" in done.stderr
    assert done.stderr.startswith("egressctl: ")


def test_the_control_directory_is_refused(gateway: Gateway) -> None:
    done = gateway.run("echo", "ran", options=("--files", str(gateway.run_dir)))
    assert (done.returncode, done.stdout) == (125, "")


# ---- refusals: nothing runs, 125, one line saying why


@pytest.mark.parametrize(
    ("workspace", "said"),
    [
        ("strangers", "you are not a member of 'strangers' (member)"),
        ("full", "as many sandboxes as may be are running (limit)"),
        ("dies", "egressd closed the connection without an answer (unavailable)"),
        ("empty", "the sandbox's network could not be laid: eth0: "),
        ("withdrawn", "the sandbox's network could not be laid: eth0: No such device"),
        ("a\nb\x1b[0m", "you are not a member of"),
    ],
)
def test_no_lease_no_command(gateway: Gateway, workspace: str, said: str) -> None:
    token = uuid.uuid4().hex
    began = time.monotonic()
    done = gateway.run("sh", "-c", f"echo ran {token}", workspace=workspace)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"egressctl: {said}")
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert time.monotonic() - began < 3  # not after the patience with which a link is waited for
    assert eventually(lambda: processes_with(token) == [])


def test_without_a_daemon_it_says_what_to_do(gateway: Gateway, tmp_path: Path) -> None:
    elsewhere = Gateway(namespace=gateway.namespace, run_dir=Path("/nonexistent"))
    done = elsewhere.run("echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert "egressd is not running" in done.stderr
    assert "systemctl start egressd" in done.stderr


@pytest.mark.parametrize(
    "options",
    [("--env", "A"), ("--env", "=x"), ("--wall", "soon"), ("--wall", "0"), ("--files", "/nonexistent")],
)
def test_a_wrong_option_runs_nothing(gateway: Gateway, options: tuple[str, ...]) -> None:
    done = gateway.run("echo", "ran", options=options)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("egressctl: ")


def test_no_command_is_no_run(gateway: Gateway) -> None:
    assert gateway.run().returncode == 125


def test_a_dry_run_prints_a_line_that_builds_the_same_and_runs_nothing(gateway: Gateway) -> None:
    done = gateway.run("echo", "it's", options=("--dry-run",), workspace="acme")
    assert done.returncode == 0
    assert "# 127.0.0.1:11434 is ollama" in done.stdout
    assert gateway.links() == []
    again = subprocess.run(
        as_caller("bash"), input=done.stdout, capture_output=True, text=True, check=False, cwd="/"
    )
    assert (again.stdout, again.stderr) == ("it's\n", "")


# ---- the lease is the connection


@pytest.mark.parametrize(
    ("workspace", "said"),
    [
        ("wordless", "egressd was restarted, and does not give the lease back: only spawning is played here"),
        ("revokes", "the workspace was removed"),
    ],
)
def test_the_end_of_the_lease_is_the_end_of_the_sandbox(gateway: Gateway, workspace: str, said: str) -> None:
    token = uuid.uuid4().hex
    began = time.monotonic()
    done = gateway.run("sh", "-c", f"trap '' TERM HUP; sleep 100; sleep 100 {token}", workspace=workspace)
    assert time.monotonic() - began < 3
    assert (done.returncode, done.stderr) == (125, f"egressctl: {said}\n")
    assert processes_with(token) == []  # at once: the launcher waited for it


LINGER = """
import os, signal, time, sys
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)
    os._exit(0)
print("up", flush=True)
time.sleep(0.2 if "leave" in sys.argv else 1000)
"""


def test_what_the_command_leaves_behind_ends_with_it(gateway: Gateway) -> None:
    token = uuid.uuid4().hex
    done = gateway.run("/usr/bin/python3", "-c", LINGER, "leave", token)
    assert (done.returncode, done.stdout) == (0, "up\n")
    assert processes_with(token) == []


@pytest.mark.parametrize("killed", ["broker", "bwrap", "both stopped"])
def test_a_killed_launcher_takes_everything_along(gateway: Gateway, killed: str) -> None:
    token = uuid.uuid4().hex
    process = gateway.start("/usr/bin/python3", "-c", LINGER, token)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    assert len(gateway.links()) == 1
    began = time.monotonic()
    match killed:
        case "broker":
            process.kill()
        case "bwrap":
            os.kill(int(children[0]), signal.SIGKILL)
        case _:
            os.kill(int(children[0]), signal.SIGSTOP)
            process.send_signal(signal.SIGSTOP)
            process.kill()
    assert eventually(lambda: processes_with(token) == [], within=1.0)
    assert eventually(lambda: gateway.links() == [], within=1.0)
    assert time.monotonic() - began < 1.0
    process.communicate()
    assert process.returncode == (137 if killed == "bwrap" else -9)


# ---- limits


def test_the_wall_limit_of_the_workspace(gateway: Gateway) -> None:
    began = time.monotonic()
    done = gateway.run("sleep", "100", workspace="brief")
    assert 0.5 <= time.monotonic() - began < 3
    assert (done.returncode, done.stderr) == (124, "egressctl: the wall limit of 0.5 s is reached\n")


@pytest.mark.parametrize(("asked", "status"), [("300ms", 124), ("30s", 0), ("1m", 0)])
def test_the_wall_limit_of_the_caller(gateway: Gateway, asked: str, status: int) -> None:
    assert gateway.run("sleep", "0.6", options=("--wall", asked)).returncode == status


def test_the_shorter_wall_limit_holds(gateway: Gateway) -> None:
    assert gateway.run("sleep", "100", workspace="brief", options=("--wall", "1h")).returncode == 124


def test_memory_is_bounded(gateway: Gateway) -> None:
    script = "x = bytearray({} << 20); print('got it')"
    assert gateway.python(script.format(16), workspace="small").stdout == "got it\n"
    done = gateway.python(script.format(128), workspace="small")
    assert "MemoryError" in done.stderr
    assert gateway.python(script.format(128), workspace="plain").stdout == "got it\n"


def test_files_in_memory_are_bounded_too(gateway: Gateway) -> None:
    for place in ("/tmp", "/dev/shm"):
        line = f"head -c 100M /dev/zero > {place}/x"
        done = gateway.run("sh", "-c", line, workspace="small")
        assert (done.returncode, "No space left" in done.stderr) == (1, True), done.stderr


FORKS = """
import os, time
made = 0
try:
    while made < 40:
        if os.fork() == 0: time.sleep(5); os._exit(0)
        made += 1
except BlockingIOError: pass
print(made)
"""


def test_processes_are_bounded_within_the_sandbox_alone(gateway: Gateway) -> None:
    """Counted in its own user namespace (Linux 5.14): what else the caller runs does not matter."""
    others = [subprocess.Popen(as_caller("sleep", "20")) for _ in range(15)]
    try:
        made = int(gateway.python(FORKS, workspace="small").stdout)
        assert 6 <= made < 12
        assert int(gateway.python(FORKS, workspace="plain").stdout) == 40
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_debug_says_how_limits_are_kept(gateway: Gateway) -> None:
    done = gateway.run("true", workspace="small", options=("--debug",))
    assert "egressctl: limits: rlimits (memory per process)" in done.stderr
    assert "egressctl: gate opened" in done.stderr
    assert done.returncode == 0


def test_a_limit_that_cannot_be_kept_runs_nothing(gateway: Gateway) -> None:
    """RLIMIT_NPROC does not hold root."""
    argv = gateway.argv("echo", "ran", workspace="small")
    as_root = argv[argv.index("--") + 1 :]
    done = subprocess.run(as_root, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout) == (125, "")
    assert "(limit)" in done.stderr


# ---- the last word


def last_word(gateway: Gateway) -> dict[str, object]:
    return json.loads((gateway.run_dir / "ended.jsonl").read_bytes().splitlines()[-1])


SPENDS = """\
import time
x = bytearray(60_000_000)
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
"""


def test_the_end_of_a_command_is_told_with_what_it_used(gateway: Gateway) -> None:
    assert gateway.python(SPENDS).returncode == 0
    told = last_word(gateway)
    assert (told["status"], told["why"]) == (0, "")
    assert 0.25 <= told["user_seconds"] + told["system_seconds"] < 5
    assert 60_000_000 <= told["max_rss"] < 400_000_000


@pytest.mark.parametrize(
    ("command", "workspace", "status", "why"),
    [
        (["sh", "-c", "exit 7"], "plain", 7, ""),
        (["sh", "-c", "kill -TERM $$"], "plain", 143, ""),
        (["sleep", "60"], "brief", 124, "the wall limit of 0.5 s is reached"),
    ],
)
def test_however_it_ends_is_told(
    gateway: Gateway, command: list[str], workspace: str, status: int, why: str
) -> None:
    gateway.run(*command, workspace=workspace)
    told = last_word(gateway)
    assert (told["status"], told["why"]) == (status, why)


def test_what_was_never_run_and_a_broker_that_dies_say_nothing(gateway: Gateway) -> None:
    gateway.run("true")
    words = (gateway.run_dir / "ended.jsonl").read_bytes().count(b"\n")
    assert gateway.run("true", workspace="full").returncode == 125
    broker = subprocess.Popen(gateway.argv("sleep", "60"), cwd="/", stdout=subprocess.DEVNULL)
    assert eventually(lambda: gateway.links() != [])
    broker.kill()
    broker.wait()
    assert eventually(lambda: gateway.links() == [])
    assert (gateway.run_dir / "ended.jsonl").read_bytes().count(b"\n") == words
