"""Signals and terminals: what reaches the launcher reaches the command, once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.stand_in import Gateway, eventually

pytestmark = pytest.mark.kernel

SAYS = """
import os, signal, sys
def say(number, _):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
for name in ("INT", "QUIT", "TERM", "HUP", "USR1", "USR2", "WINCH", "CONT", "TSTP"):
    signal.signal(getattr(signal, "SIG" + name), say)
os.write(1, b"up\\n")
for line in sys.stdin: sys.exit(5)
"""
FORWARDED = ["INT", "QUIT", "TERM", "HUP", "USR1", "USR2", "WINCH", "CONT"]


def test_each_signal_arrives_once_and_ends_nobody(gateway: Gateway) -> None:
    process = gateway.start("/usr/bin/python3", "-c", SAYS, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    for name in FORWARDED:
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.stdout.readline() == f"SIG{name}\n"
    out, err = process.communicate("\n", timeout=10)
    assert (out, err, process.returncode) == ("", "", 5)


@pytest.mark.parametrize("name", ["INT", "QUIT", "TERM", "HUP", "USR1", "USR2"])
def test_a_signal_that_ends_the_command_shows_in_the_status(gateway: Gateway, name: str) -> None:
    number = getattr(signal, f"SIG{name}")
    process = gateway.start("sh", "-c", "echo up; exec sleep 100")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + number, "")


def test_a_signal_to_the_whole_group_arrives_once(gateway: Gateway) -> None:
    process = gateway.start("/usr/bin/python3", "-c", SAYS, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    out, _ = process.communicate("\n", timeout=10)
    assert (out, process.returncode) == ("", 5)


def test_what_was_ignored_stays_ignored(gateway: Gateway) -> None:
    """nohup egressctl run ..."""
    process = subprocess.Popen(
        ["nohup", *gateway.argv("sh", "-c", "echo up; sleep 1; echo on")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=10)
    assert (out, process.returncode) == ("on\n", 0)


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_before_the_lease_means_nothing_runs(gateway: Gateway, name: str) -> None:
    number = getattr(signal, f"SIG{name}")
    process = gateway.start("echo", "ran", workspace="never")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert eventually(lambda: bool(children.read_text()))  # bubblewrap is there, so the signals are ours
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (out, process.returncode) == ("", 128 + number)
    assert "Traceback" not in err


def test_stopping_the_launcher_stops_the_command(gateway: Gateway) -> None:
    process = gateway.start("sh", "-c", "echo up; while :; do echo tick; sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.set_blocking(process.stdout.fileno(), False)
    time.sleep(0.1)
    with contextlib.suppress(BlockingIOError):
        os.read(process.stdout.fileno(), 1 << 16)
    time.sleep(0.3)
    with pytest.raises(BlockingIOError):
        os.read(process.stdout.fileno(), 1 << 16)
    process.send_signal(signal.SIGCONT)
    assert select.select([process.stdout], [], [], 3)[0]
    process.kill()
    process.communicate()


# ---- terminals


class Terminal:
    """A terminal with a command in its foreground, as a shell would start it."""

    def __init__(self, argv: list[str]) -> None:
        self.master, self._slave = pty.openpty()
        self.text = ""

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        # a shell stays behind as leader of the session: a group without one cannot be stopped
        leader = """set -m
            "$@"; code=$?; echo "[left $code]"
            while [ $code -gt 140 ]; do fg %1; code=$?; echo "[left $code]"; done"""
        self.process = subprocess.Popen(
            ["bash", "-c", leader, "bash", *argv], stdin=self._slave, stdout=self._slave, stderr=self._slave,
            start_new_session=True, preexec_fn=take_terminal, cwd="/",  # noqa: PLW1509
        )  # fmt: skip

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, *, within: float = 10.0) -> None:
        end = time.monotonic() + within
        while text not in self.text:
            assert time.monotonic() < end, f"{text!r} did not come: {self.text!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 4096).decode()

    def close(self) -> None:
        os.close(self._slave)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(gateway: Gateway) -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for one in made:
        one.close()


def test_ctrl_c_reaches_the_command_once_and_not_the_launcher(
    gateway: Gateway, terminal: list[Terminal]
) -> None:
    terminal.append(Terminal(gateway.argv("/usr/bin/python3", "-c", SAYS)))
    tty = terminal[0]
    tty.wait_for("up\r\n")
    tty.type("\x03")
    tty.wait_for("SIGINT\r\n")
    tty.type("\x1c")
    tty.wait_for("SIGQUIT\r\n")
    tty.type("\n")
    tty.wait_for("[left 5]")
    assert tty.text.count("SIGINT") == 1
    assert tty.text.count("SIGQUIT") == 1


def test_ctrl_c_ends_a_command_that_does_not_care(gateway: Gateway, terminal: list[Terminal]) -> None:
    terminal.append(Terminal(gateway.argv("sh", "-c", "echo up; exec sleep 100")))
    tty = terminal[0]
    tty.wait_for("up\r\n")
    tty.type("\x03")
    tty.wait_for("[left 130]")


def test_ctrl_z_stops_and_fg_goes_on(gateway: Gateway, terminal: list[Terminal]) -> None:
    terminal.append(Terminal(gateway.argv("sh", "-c", "echo up; read line; echo got $line; exit 3")))
    tty = terminal[0]
    tty.wait_for("up\r\n")
    time.sleep(0.1)
    tty.type("\x1a")
    tty.wait_for("[left 14")  # 128 + SIGTSTP or SIGSTOP; then the shell says fg
    tty.type("word\n")
    tty.wait_for("got word\r\n")
    tty.wait_for("[left 3]")


def test_the_command_has_the_terminal(gateway: Gateway, terminal: list[Terminal]) -> None:
    script = "test -t 0 && test -t 1 && echo term $TERM; (echo open) > /dev/tty; stty size"
    argv = ["env", "TERM=xterm-color", *gateway.argv("sh", "-c", script)]
    terminal.append(Terminal(argv))
    tty = terminal[0]
    fcntl.ioctl(tty.master, termios.TIOCSWINSZ, b"\x21\x00\x50\x00\x00\x00\x00\x00")
    tty.wait_for("[left 0]")
    assert "term xterm-color\r\n" in tty.text
    assert "open\r\n" in tty.text


def test_an_interactive_shell_has_job_control(gateway: Gateway, terminal: list[Terminal]) -> None:
    terminal.append(Terminal(gateway.argv("bash", "--norc", "--noprofile", "-i")))
    tty = terminal[0]
    tty.wait_for("$ ")
    tty.type("sleep 100\n")
    time.sleep(0.2)
    tty.type("\x03")
    tty.type("echo a$((1+1))c\n")
    tty.wait_for("a2c\r\n")
    tty.type("exit 4\n")
    tty.wait_for("[left 4]")
    assert "no job control" not in tty.text
