"""What a command reports of itself, and what is read of it in /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.broker.runners.jobs import Limits
from egressd.broker.runners.limits import Meter, Usage, named

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
