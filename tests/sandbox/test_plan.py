"""The plan is data: from the same wish and the same machine, the same command line."""

from __future__ import annotations

import pytest

from egressd.sandbox import plan as room
from egressd.sandbox.plan import Bind, Limits, Machine, Overlay, SandboxSpec, describe, environment, plan

DEBIAN = Machine(
    roots={"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"},
    overlays=tuple(Overlay(name=name, resolved=name) for name in room.DATA_FILES),
)
GATE = (
    'echo >&7; exec 7>&-; IFS= read -r g <&8 && [ "$g" = go ] || exit 125; exec 8<&-; ulimit -c 0; exec "$@"'
)


def words(spec: SandboxSpec, machine: Machine = DEBIAN) -> list[str]:
    return list(plan(spec, machine).arguments)


def pairs(arguments: list[str], option: str, width: int) -> list[tuple[str, ...]]:
    at = [i for i, word in enumerate(arguments) if word == option]
    return [tuple(arguments[i + 1 : i + 1 + width]) for i in at]


def test_the_whole_line_for_a_plain_command() -> None:
    line = words(SandboxSpec(command=("true",), environment={"PATH": "/bin"}))
    expected = """
        bwrap --unshare-all --hostname sandbox --die-with-parent --cap-drop ALL --new-session
        --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/sbin /sbin --symlink usr/lib /lib
        --symlink usr/lib64 /lib64 --ro-bind /etc /etc --proc /proc --dev /dev
        --perms 1777 --tmpfs /dev/shm --perms 1777 --tmpfs /tmp --perms 0755 --tmpfs /run
        --perms 0444 --ro-bind-data 11 /etc/resolv.conf --perms 0444 --ro-bind-data 12 /etc/nsswitch.conf
        --perms 0444 --ro-bind-data 13 /etc/hosts --chdir /tmp --remount-ro /dev --remount-ro /
        --clearenv --setenv PATH /bin --seccomp 9 --json-status-fd 10 -- sh -c
    """
    assert line == [*expected.split(), GATE, "egressctl", "true"]


def test_variables_that_may_hold_keys_stand_on_no_command_line() -> None:
    """Everybody may read /proc/PID/cmdline. bwrap reads them from a descriptor, each word ended by a NUL."""
    made = plan(
        SandboxSpec(command=("true",), environment={"A": "1"}, unseen={"KEY": "s3cret", "B": ""}), DEBIAN
    )
    line = " ".join(made.arguments)
    assert "KEY" not in line and "s3cret" not in line and "s3cret" not in describe(made)
    assert "--clearenv --setenv A 1 --args 14 --seccomp 9" in line
    assert made.data[3] == (14, "--setenv\0KEY\0s3cret\0--setenv\0B\0\0")
    assert "--args" not in describe(made)


def test_a_closed_pipe_must_never_be_permission() -> None:
    """bwrap --block-fd runs the command at end of file: 80 killed brokers left 66 processes."""
    line = words(SandboxSpec(command=("true",)))
    assert "--block-fd" not in line
    assert "--userns-block-fd" not in line
    assert "--die-with-parent" in line


@pytest.mark.parametrize(("terminal", "new_session"), [(False, True), (True, False)])
def test_on_a_terminal_the_session_is_the_callers(terminal: bool, new_session: bool) -> None:
    assert ("--new-session" in words(SandboxSpec(command=("sh",), terminal=terminal))) == new_session


def test_directories_are_shown_read_only_and_never_otherwise() -> None:
    spec = SandboxSpec(command=("true",), files="/home/me/job", binds=(Bind("/opt/venv", "/opt/venv"),))
    line = words(spec)
    assert ("/home/me/job", "/work") in pairs(line, "--ro-bind", 2)
    assert ("/opt/venv", "/opt/venv") in pairs(line, "--ro-bind", 2)
    assert pairs(line, "--chdir", 1) == [("/work",)]
    assert not {"--bind", "--dev-bind", "--bind-try", "--share-net"} & set(line)


def test_what_is_not_merged_into_usr_is_bound() -> None:
    line = words(SandboxSpec(command=("true",)), Machine(roots={"lib": None, "bin": "usr/bin"}, overlays=()))
    assert ("/lib", "/lib") in pairs(line, "--ro-bind", 2)
    assert ("usr/bin", "/bin") in pairs(line, "--symlink", 2)


def test_a_linked_resolv_conf_is_covered_where_it_lies_after_run_was_made() -> None:
    stub = "/run/systemd/resolve/stub-resolv.conf"
    overlay = Overlay("/etc/resolv.conf", stub, links=(("/var/run", "/run"),))
    made = plan(SandboxSpec(command=("true",)), Machine(roots={}, overlays=(overlay,)))
    line = list(made.arguments)
    assert made.data == ((11, room.RESOLV_CONF),)
    assert pairs(line, "--ro-bind-data", 2) == [("11", stub)]
    assert ("/run", "/var/run") in pairs(line, "--symlink", 2)
    assert line.index("/run") < line.index(stub)


@pytest.mark.parametrize(
    ("limits", "script"),
    [
        (Limits(), "ulimit -c 0; exec"),
        (Limits(memory=1 << 30), "ulimit -c 0; ulimit -d 1048576 || exit 125; exec"),
        (Limits(memory=1), "ulimit -d 1 || exit 125"),
        (Limits(processes=7), "ulimit -u 7 2>/dev/null || ulimit -p 7 || exit 125; exec"),
    ],
)
def test_a_limit_that_cannot_be_set_ends_the_launch(limits: Limits, script: str) -> None:
    line = words(SandboxSpec(command=("true",), limits=limits))
    assert script in line[line.index("sh") + 2]


def test_memory_also_bounds_what_files_in_memory_may_take() -> None:
    line = words(SandboxSpec(command=("true",), shared_memory=1 << 20))
    assert pairs(line, "--size", 1) == [("1048576",)] * 3


def test_the_command_comes_last_and_unread() -> None:
    command = ("sh", "-c", "echo $HOME; rm -rf '/'", "--block-fd", "")
    spec = SandboxSpec(command=command, default_signals=("INT", "TERM"), terminal=True)
    assert words(spec)[-7:] == ["env", "--default-signal=INT,TERM", *command]


def test_hidden_directories_are_empty() -> None:
    line = words(SandboxSpec(command=("true",)), Machine(roots={}, overlays=(), hidden=("/etc/egressd",)))
    assert ("/etc/egressd",) in pairs(line, "--tmpfs", 1)
    assert line.index("/etc/egressd") > line.index("/etc")


def test_the_environment_is_named_variable_by_variable() -> None:
    bare = {"PATH": room.PATH, "HOME": "/tmp", "LANG": "C.UTF-8"}
    assert environment() == bare
    assert environment(terminal="xterm") == bare | {"TERM": "xterm"}
    assert environment(ollama_port=11434) == bare | {"OLLAMA_HOST": "http://127.0.0.1:11434"}
    assert environment(extra={"HOME": "/work", "A": ""}) == bare | {"HOME": "/work", "A": ""}


@pytest.mark.parametrize("name", ["", "A=B", "A\0B"])
def test_what_is_no_variable_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="environment variable"):
        environment(extra={name: "x"})


def test_the_resolver_is_ours_in_both_families_and_alone() -> None:
    servers = [line for line in room.RESOLV_CONF.splitlines() if line.startswith("nameserver")]
    assert servers == ["nameserver 169.254.53.53", "nameserver fd53:53::53"]
    assert "search" not in room.RESOLV_CONF
    assert "hosts: files dns\n" in room.NSSWITCH_CONF
    assert "resolve" not in room.NSSWITCH_CONF


def test_the_description_can_be_pasted() -> None:
    text = describe(plan(SandboxSpec(command=("echo", "it's")), DEBIAN))
    first, *rest = text.splitlines()
    assert first.startswith("bwrap --unshare-all")
    assert first.endswith(
        "egressctl echo 'it'\"'\"'s' 7>/dev/null 8<<<go 11<<'EOF11' 12<<'EOF12' 13<<'EOF13'"
    )
    assert "--seccomp" not in first
    assert rest[-1] == "EOF13"


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        (Limits(cpu=2), "ulimit -S -t 2 && ulimit -H -t 3 || exit 125"),
        (Limits(cpu=0.2), "ulimit -S -t 1 && ulimit -H -t 2 || exit 125"),
        (Limits(file_size=4096), "ulimit -f 8 || exit 125"),
        (Limits(file_size=4095), "ulimit -f 7 || exit 125"),
        (Limits(file_size=100), "ulimit -f 0 || exit 125"),
        (Limits(descriptors=512), "ulimit -n 512 || exit 125"),
    ],
)
def test_time_and_file_size_are_set_in_the_gate_and_never_weaker(limits: Limits, lines: str) -> None:
    script = words(SandboxSpec(command=("true",), limits=limits))[-3]
    assert script == GATE.replace('; exec "$@"', f'; {lines}; exec "$@"')


def test_tools_are_shown_read_only_in_their_own_place() -> None:
    line = words(SandboxSpec(command=("true",), files="/mnt", tools="/usr/lib/egressd/tools"))
    assert ("/usr/lib/egressd/tools", "/opt/egressd") in pairs(line, "--ro-bind", 2)
    assert ("/mnt", "/work") in pairs(line, "--ro-bind", 2)


def test_where_usage_is_to_be_reported_stands_in_the_environment() -> None:
    assert environment(usage=True)["EGRESSD_USAGE_FD"] == "3"
    assert "EGRESSD_USAGE_FD" not in environment()
