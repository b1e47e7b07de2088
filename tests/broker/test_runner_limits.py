"""What a command reports of itself, and what is read of it in /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.broker.runners import relaying
from egressd.broker.runners.desk import Desk
from egressd.broker.runners.jobs import Limits
from egressd.broker.runners.limits import Meter, Usage, named
from egressd.broker.runners.relaying import Relay
from egressd.sandbox.launch import Enough
from egressd.sandbox.limits import Group

LINES = [b'{"tokens": 3}', b'{"cost": 0.5}', b'{"tokens": 4, "cost": 1}', b"", b"no", b'{"tokens": -1}']


@settings(max_examples=100)
@given(st.lists(st.sampled_from(LINES), max_size=20), st.lists(st.integers(0, 400), max_size=10))
def test_however_the_lines_are_cut_the_sum_is_the_same(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    usage, at = Usage(), 0
    for cut in [*sorted(min(c, len(data)) for c in cuts), len(data)]:
        usage.take(data[at:cut])
        at = cut
    assert usage.tokens == 3 * lines.count(LINES[0]) + 4 * lines.count(LINES[2])
    assert usage.cost == 0.5 * lines.count(LINES[1]) + lines.count(LINES[2])


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_nothing_that_is_written_there_breaks_it_or_takes_back(pieces: list[bytes]) -> None:
    usage = Usage()
    usage.take(b'{"tokens": 9}\n')
    for piece in pieces:
        before = usage.tokens
        usage.take(piece)
        assert usage.tokens >= before


def test_one_piece_is_read_at_a_time() -> None:
    """Whoever fills the pipe meanwhile waits for the next turn."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    usage = Usage()
    with pytest.raises(BlockingIOError):
        usage.read(ours)
    os.write(theirs, b'{"tokens": 1}\n')
    assert usage.read(ours)
    os.write(theirs, b'{"tokens": 1}\n')
    assert usage.tokens == 1
    os.close(theirs)
    assert usage.read(ours) and usage.tokens == 2
    assert not usage.read(ours)
    os.close(ours)


def test_a_line_without_an_end_is_not_kept() -> None:
    usage = Usage()
    for _ in range(1000):
        usage.take(b"x" * 65536)
    usage.take(b'{"tokens": 9}\n{"tokens": 1}\n')
    assert usage.tokens == 1, "the first is the end of the long one"
    assert len(usage._begun) == 0


@pytest.mark.parametrize(
    ("tokens", "cost", "reached"),
    [(5, 1.0, set()), (6, 1.0, {"tokens"}), (5, 1.01, {"cost"}), (6, 2.0, {"tokens", "cost"})],
)
def test_budgets(tokens: int, cost: float, reached: set[str]) -> None:
    usage = Usage()
    usage.take(b'{"tokens": %d, "cost": %.2f}\n' % (tokens, cost))
    assert usage.reached(Limits(tokens=5, cost=1.0)) == reached
    assert usage.reached(Limits()) == set()


def test_what_the_kernel_refused_is_named_as_a_limit_of_the_request() -> None:
    assert named(("quota", "connections")) == {"egress", "connections"}
    assert named(("something-newer",)) == set()


BURN = """
import os, sys, time
for _ in range(2):
    if os.fork() == 0:
        end = time.process_time() + 0.3
        while time.process_time() < end: pass
        os._exit(0)
os.wait(); os.wait()
print("burnt", flush=True)
sys.stdin.read()
"""


def test_time_of_children_that_were_waited_for_is_counted() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    meter = Meter(process.pid, None, Limits(cpu=0.5, processes=1))
    meter.look()
    assert 0.6 <= meter.cpu < 5
    assert meter.reached() == {"cpu", "processes"} and meter.threads >= 1
    process.communicate()
    before = meter.cpu
    meter.look()
    assert meter.cpu == before, "never less, though it is gone"


@pytest.mark.parametrize(
    ("limits", "used", "pause"),
    [
        (Limits(), 0.0, None),
        (Limits(processes=5), 0.0, 0.5),
        (Limits(cpu=1000), 0.0, 0.5),
        (Limits(cpu=10), 9.99, 0.05),
        (Limits(cpu=10), 11.0, 0.05),
    ],
)
def test_looks_are_as_frequent_as_they_must_be(limits: Limits, used: float, pause: float | None) -> None:
    meter = Meter(os.getpid(), None, limits)
    meter.cpu = used
    assert meter.pause == pause


class Counting(Meter):
    looks = 0

    def look(self) -> None:
        self.looks += 1


def test_a_command_that_writes_much_is_not_looked_at_for_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(relaying.time, "monotonic", lambda: clock[0])
    relay = bare_relay(Limits(cpu=10))
    relay.meter = meter = Counting(os.getpid(), None, Limits(cpu=10))
    looks = []
    for _ in range(1000):
        relay._check()
        clock[0] += 0.01
        looks.append(meter.looks)
    assert (looks[0], looks[-1]) == (1, 200), "at once, and from then on every 50 ms in 10 s"


def test_a_limit_that_nobody_can_hold_ends_the_command(tmp_path: Path) -> None:
    """The group's own file is gone, or cannot be read: what it used is not nothing."""
    limits = Limits(cpu=10)
    relay = bare_relay(limits)
    relay.meter = Meter(os.getpid(), Group(str(tmp_path)), limits)
    with pytest.raises(Enough, match=r"usage_usec of .*/cpu\.stat cannot be read") as caught:
        relay._check()
    assert caught.value.outcome.status == 125
    (tmp_path / "cpu.stat").write_text("usage_usec 9999999\n")
    relay = bare_relay(limits)
    relay.meter = Meter(os.getpid(), Group(str(tmp_path)), limits)
    relay._check()
    (tmp_path / "cpu.stat").write_text("usage_usec 10000000\n")
    relay._looked = 0.0
    with pytest.raises(Enough, match="the cpu limit of 10 s is reached"):
        relay._check()


def bare_relay(limits: Limits) -> Relay:
    """One that nobody speaks to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    relay = Relay(Desk(ours), limits, b"")
    relay.close()
    return relay


def test_the_standard_input_is_a_file_that_nobody_can_change() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        relay = Relay(Desk(ours), Limits(), b"input")
        number = relay.theirs[0]
        assert os.read(number, 99) == b"input"
        for does in (lambda: os.write(number, b"x"), lambda: os.truncate(number, 0)):
            with pytest.raises(PermissionError):
                does()
        relay.close()
