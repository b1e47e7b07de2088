"""egressd goes away while a sandbox runs, and comes back, or does not: what its caller's side does.

The stand-in for egressd is another process on a real socket, with real links (returning_daemon.py).
"""

# ruff: noqa: PTH208
from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.sandbox import control as controlling
from egressd.sandbox.control import Control, Resumption
from sandbox.stand_in import Returning, as_caller, eventually, gateway_named, processes_with

pytestmark = pytest.mark.kernel
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def returning() -> Iterator[Returning]:
    if os.getuid() != 0:
        pytest.skip("the stand-in for egressd makes links: root only")
    with gateway_named(f"sr-{os.getpid()}", program="returning_daemon.py") as made:
        yield made


@pytest.fixture(autouse=True)
def _as_it_was(returning: Returning) -> Iterator[None]:
    """Each test finds a daemon that listens and resumes, and leaves no link."""
    for name in ("resumed", "ended"):
        (returning.run_dir / f"{name}.jsonl").unlink(missing_ok=True)
    returning.do("resume lease")
    yield
    returning.do("back")
    returning.do("close")
    assert eventually(lambda: returning.links() == []), returning.links()


CHAT = "trap 'echo bye; exit 9' TERM; while read word; do echo $word; done; exit 7"


class Chatter:
    """`egressctl run` of a command that says a line for each line it is told."""

    def __init__(self, returning: Returning, *options: str) -> None:
        self.token = uuid.uuid4().hex
        self.process = returning.start("sh", "-c", CHAT, self.token, options=options, stdin=subprocess.PIPE)
        self.says("hello")

    def says(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{word}\n"

    def ended(self) -> tuple[int, str, str]:
        """By itself: its status, and the rest of what was said."""
        self.process.wait(30)
        return self.end("")

    def end(self, text: str) -> tuple[int, str, str]:
        """By the end of its input."""
        out, err = self.process.communicate(text, timeout=30)
        assert processes_with(self.token) == []
        return self.process.returncode, out, err


def a_try(returning: Returning, *, more_than: int = 0) -> None:
    assert eventually(lambda: len(returning.written("resumed")) > more_than, within=10)


def resumed(returning: Returning) -> None:
    a_try(returning)
    assert len(returning.links()) == 1


# ---- it comes back


def test_a_daemon_that_is_there_again_is_not_noticed(returning: Returning) -> None:
    chatter = Chatter(returning)
    returning.do("cut")
    resumed(returning)
    chatter.says("there")
    assert chatter.end("") == (7, "", "")
    assert [end["status"] for end in returning.written("ended")] == [7], "told over the new connection"


def test_while_it_is_away_the_command_goes_on(returning: Returning) -> None:
    chatter = Chatter(returning)
    returning.do("away")
    chatter.says("in the gap")
    assert returning.written("resumed") == []
    returning.do("back")
    resumed(returning)
    assert chatter.end("") == (7, "", "")


def test_its_link_passes_packets_all_the_while(returning: Returning) -> None:
    script = (
        "import socket, sys\n"
        "for line in sys.stdin:\n"
        "    with socket.create_connection(('127.0.0.1', 11434), 5) as s:\n"
        "        print(s.recv(99).decode().split()[0], flush=True)\n"
    )
    process = returning.start("/usr/bin/python3", "-c", script, workspace="acme", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for moment in ("", "away", "back"):
        if moment:
            returning.do(moment)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ollama\n", moment
    resumed(returning)
    assert process.communicate(timeout=20) == ("", "")


def test_it_may_go_away_again_and_again(returning: Returning) -> None:
    chatter = Chatter(returning)
    for number in range(8):
        returning.do("cut")
        a_try(returning, more_than=number)
        chatter.says(str(number))
    assert chatter.end("") == (7, "", "")


@pytest.mark.parametrize(
    "tries", ["hang-up hang-up hang-up", "later later later later later later", "starting"]
)
def test_after_some_tries(returning: Returning, tries: str) -> None:
    """It dies while it is asked; it turns away a crowd; one of its processes is still being started."""
    returning.do(f"resume {tries} lease")
    chatter = Chatter(returning)
    returning.do("cut")
    a_try(returning, more_than=len(tries.split()))
    chatter.says("there")
    assert chatter.end("") == (7, "", "")


def test_debug_says_so_and_nothing_else_does(returning: Returning) -> None:
    chatter = Chatter(returning, "--debug")
    returning.do("cut")
    resumed(returning)
    status, _, err = chatter.end("")
    assert status == 7
    assert "egressd is gone" in err
    assert "egressd is there again" in err


def test_the_python_interface_goes_on(returning: Returning) -> None:
    script = (
        "import sys, egressd\n"
        f"with egressd.Sandbox(workspace='plain', run_dir={str(returning.run_dir)!r}) as box:\n"
        "    done = box.run(['sh', '-c', 'echo up >&2; sleep 1; echo out; exit 3'], stdout=-1)\n"
        "print(done.returncode, done.stdout)\n"
    )
    process = subprocess.Popen(
        as_caller(sys.executable, "-c", script),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "up\n"
    returning.do("away")
    returning.do("back")
    resumed(returning)
    assert process.communicate(timeout=20) == ("3 b'out\\n'\n", "")


# ---- it does not


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("refuse", "does not give the lease back: its time is over"),
        ("revoke", "does not give the lease back: egressd is stopping"),
        ("other", "offers something else than the sandbox's lease"),
        ("terms", "offers something else than the sandbox's lease"),
        ("hang-up", "does not give leases back: it hangs up when it is asked"),
        ("nonsense", "sends something unintelligible: not a message"),
    ],
)
def test_any_other_answer_ends_the_sandbox(returning: Returning, how: str, text: str) -> None:
    returning.do(f"resume {how}")
    chatter = Chatter(returning)
    returning.do("cut")
    status, out, err = chatter.ended()
    assert (status, out) == (125, "")
    assert text in err


def test_another_network_is_not_the_leases(returning: Returning) -> None:
    """The daemon compares; here it has forgotten."""
    chatter = Chatter(returning)
    returning.do("close")
    returning.do("cut")
    status, _, err = chatter.ended()
    assert (status, "that is not the lease's network" in err) == (125, True), err


def test_nobody_comes(returning: Returning) -> None:
    """One does who never answers, and is gone again; then nobody."""
    chatter = Chatter(returning)
    returning.do("resume mute")
    returning.do("cut")
    began = time.monotonic()
    a_try(returning)
    returning.do("away")
    status, _, err = chatter.ended()
    assert (status, err) == (125, "egressctl: egressd has ended, and did not come back within 15 s\n")
    assert 14 < time.monotonic() - began < 25


# ---- what happens meanwhile


def test_the_command_ends_in_the_gap(returning: Returning) -> None:
    chatter = Chatter(returning)
    returning.do("away")
    began = time.monotonic()
    assert chatter.end("last words\n") == (7, "last words\n", "")
    assert time.monotonic() - began < 8, "its end is not kept for long"
    assert returning.written("ended") == []


def test_the_command_ends_in_the_gap_and_that_can_still_be_told(returning: Returning) -> None:
    """The first answer is put off, so that the end comes before the lease: the network outlives it."""
    returning.do("resume later later later lease")
    chatter = Chatter(returning)
    returning.do("cut")
    assert chatter.end("") == (7, "", "")
    assert [end["status"] for end in returning.written("ended")] == [7]


def test_the_wall_limit_holds_in_the_gap(returning: Returning) -> None:
    chatter = Chatter(returning, "--wall", "2s")
    returning.do("away")
    status, _, err = chatter.ended()
    assert (status, err) == (124, "egressctl: the wall limit of 2 s is reached\n")


def test_signals_are_forwarded_in_the_gap(returning: Returning) -> None:
    chatter = Chatter(returning)
    returning.do("away")
    chatter.says("in the gap")
    chatter.process.send_signal(signal.SIGTERM)
    assert chatter.ended() == (9, "bye\n", "")


def test_its_caller_killed_in_the_gap_leaves_nothing(returning: Returning) -> None:
    chatter = Chatter(returning)
    returning.do("away")
    chatter.says("in the gap")
    chatter.process.kill()
    chatter.process.communicate()
    assert eventually(lambda: processes_with(chatter.token) == [])
    # the link went with its namespace: nobody was there to take it away
    assert eventually(lambda: returning.links() == [])


# ---- the resumption alone


def carry_on(resumption: Resumption, poll: select.poll) -> None:
    """As a launcher's poll does."""
    ready: set[int] = set()
    while not resumption.step(ready, poll):
        ready = {number for number, _ in poll.poll(resumption.pause * 1000 + 1)}


def enter(returning: Returning, namespace: int) -> tuple[Control, int]:
    control = Control(str(returning.run_dir))
    control.enter("empty")
    control.attach(namespace)
    return control, control.lease().link


@pytest.fixture
def namespace() -> Iterator[int]:
    number = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    yield number
    os.close(number)


def test_50_resumptions_leave_no_descriptor(returning: Returning, namespace: int) -> None:
    control, link = enter(returning, namespace)
    before = set(os.listdir("/proc/self/fd"))
    for number in range(50):
        returning.do("cut")
        returning.do(f"resume {'later ' * (number % 3)}lease")
        poll = select.poll()
        carry_on(control.resume(namespace, link), poll)
        assert set(os.listdir("/proc/self/fd")) == before
        assert control.spent().counters
        assert not poll.poll(0), "the poll knows the new connection, and nothing is said there"
    control.close()
    assert len(os.listdir("/proc/self/fd")) == len(before) - 1


def test_a_resumption_that_is_given_up_leaves_none_either(returning: Returning, namespace: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for how in ("mute", "refuse", "hang-up", "later"):
        returning.do(f"resume {how}")
        control, link = enter(returning, namespace)
        returning.do("cut")
        resumption, poll = control.resume(namespace, link), select.poll()
        for _ in range(6):
            try:
                resumption.step({number for number, _ in poll.poll(50)}, poll)
            except Refused:
                break
        resumption.close()
        control.close()
        assert set(os.listdir("/proc/self/fd")) == before, how


def test_nothing_is_said_in_the_gap_and_nothing_waits(returning: Returning, namespace: int) -> None:
    control, link = enter(returning, namespace)
    returning.do("away")
    control.resume(namespace, link)
    assert not control.tell(messages.Ended(status=0))
    for does in (control.spent, lambda: control.testify("request-ended", {})):
        with pytest.raises(controlling.Gone) as caught:
            does()  # type: ignore[operator]
        assert caught.value.unread


def test_pauses_grow_to_a_quarter_of_a_second(
    returning: Returning, namespace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(controlling.time, "monotonic", lambda: clock[0])
    control, link = enter(returning, namespace)
    returning.do("away")
    resumption, poll = control.resume(namespace, link), select.poll()
    pauses: list[float] = []
    with pytest.raises(Refused, match="did not come back within 15 s"):
        while True:
            assert not resumption.step(set(), poll)
            pauses.append(round(resumption.pause, 6))
            clock[0] += resumption.pause + 1e-9
    assert pauses[:5] == [0.02, 0.04, 0.08, 0.16, 0.25]
    assert max(pauses) == 0.25
    assert 15 <= clock[0] - 1000.0 < 15.1


def test_a_listener_that_is_full_is_tried_again(namespace: int, tmp_path: Path) -> None:
    """The listening socket may outlive a daemon: who connects waits there to be let in by the next."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(0)  # room for one
        with Control(str(tmp_path)) as control:
            resumption, poll = control.resume(namespace, 1), select.poll()
            assert not resumption.step(set(), poll)
            assert 0 < resumption.pause <= 0.02
            listener.accept()[0].close()
            end = time.monotonic() + 10
            while resumption.pause < 1:  # it waits for an answer now, and nothing else
                assert time.monotonic() < end
                assert not resumption.step(set(), poll)
            resumption.close()
