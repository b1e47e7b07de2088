"""Killed at every step, whoever it is: no process, no mount, no link is left, and nothing runs that must not.

A runner stops itself at the step (SIGSTOP, see faulty_zygote.py); then the test does its worst, and lets it
go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker.cycle_stand import STEPS, Told, World, a_runners_world, descendants, eventually, listen
from egressd.broker.runners.zygote import Run, jobs

pytestmark = pytest.mark.kernel
BEFORE_GO = STEPS[: STEPS.index("go")]
BEFORE_IT_RAN = STEPS[: STEPS.index("started")]
WITH_A_SANDBOX = ("leased", "recorded", "started")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_runners_world(faulty=True) as made:
        made.write("a.md", b"# A\n")
        yield made


def job(world: World, step: str, action: str, *, command: tuple[str, ...] = ("echo", "ran")) -> jobs.Job:
    at = {"EGRESSD_TEST_AT": f"{step.replace(' ', '-')} {action}"}
    return world.job(*command, environment=at, copies=(world.copy("a.md"),))


def state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


@contextlib.contextmanager
def stopped(
    world: World, step: str, *, command: tuple[str, ...] = ("echo", "ran")
) -> Iterator[tuple[Run, int]]:
    """A run whose runner has stopped at `step`, and that runner's pid; it goes on after the block."""
    with world.runners.run(job(world, step, "SIGSTOP", command=command)) as run:
        run.channel.socket.settimeout(20)
        if step not in BEFORE_GO and step != "projected":
            assert isinstance(run.receive(), jobs.Projected)
            run.go()
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid in descendants(world.runners.pid) if state(pid) == "T"]
            return len(found) == 1

        assert eventually(there, within=10), (step, descendants(world.runners.pid))
        try:
            yield run, found[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGCONT)


def heard(run: Run) -> Told:
    return listen(run)


@pytest.mark.parametrize("step", STEPS)
def test_the_runner_kills_itself(world: World, step: str) -> None:
    asked = job(world, step, "SIGKILL", command=("sh", "-c", "echo ran; exec sleep 100"))
    if step in STEPS[STEPS.index("dead") :]:
        asked = job(world, step, "SIGKILL")
    told = world.told(asked)
    end = told.finished
    assert (end.why, end.destroyed, end.refused) == ("its runner was killed", False, "")
    assert (b"ran\n" in told.out) <= (step not in BEFORE_IT_RAN), "nothing ran before its gate was opened"
    world.nothing_left(within=3)
    records = [record["event"] for record in world.records(asked.id)]
    decided = ["request-asked", "request-decided", "request-files"]
    told_by = {"begun": [], "recorded": decided, "recorded the end": [*decided, "request-ended"]}
    latest = max((name for name in told_by if STEPS.index(name) <= STEPS.index(step)), key=STEPS.index)
    assert records == told_by[latest]


@pytest.mark.parametrize("step", STEPS)
def test_the_runner_is_killed_while_it_stands_still(world: World, step: str) -> None:
    with stopped(world, step) as (run, pid):
        os.kill(pid, signal.SIGKILL)
        assert heard(run).finished.why == "its runner was killed"
    world.nothing_left(within=3)


@pytest.mark.parametrize("step", STEPS)
def test_the_service_goes_away(world: World, step: str) -> None:
    with stopped(world, step, command=("sleep", "100") if step == "started" else ("true",)) as (run, _):
        run.close()
    world.nothing_left()


@pytest.mark.parametrize("step", STEPS)
def test_the_service_says_stop(world: World, step: str) -> None:
    command = ("sleep", "100") if step == "started" else ("echo", "ran")
    with stopped(world, step, command=command) as (run, pid):
        run.stop("never mind")
        os.kill(pid, signal.SIGCONT)
        told = heard(run)
    end = told.finished
    if step in ("leased", "recorded", *BEFORE_GO, "projected", "go"):
        assert end.refused == "stopped before it ran: never mind", (step, end)
        assert told.out == b""
        assert step not in ("begun", "scratch", "projecting") or told.kinds == ["Finished"], "at once"
    elif step == "started":
        assert (end.status, end.why, end.refused) == (143, "never mind", "")
    else:
        assert (end.status, end.why, told.out) == (0, "", b"ran\n"), "it was over"
    assert end.destroyed
    world.nothing_left()


def test_a_stop_that_comes_too_late_takes_nothing_of_the_answer_away(world: World) -> None:
    """A socket closed with something unread resets its peer (unix(7), ECONNRESET) before what it sent."""
    with stopped(world, "told") as (run, pid):
        run.stop("never mind")
        os.kill(pid, signal.SIGCONT)
        assert eventually(lambda: state(pid) in "XZ")
        first = run.channel.receive().message
        assert not isinstance(first, jobs.Finished), "nothing was read yet"
        assert heard(run).finished.status == 0


@pytest.mark.parametrize("step", WITH_A_SANDBOX)
@pytest.mark.parametrize("which", ["outer", "first"])
def test_bubblewrap_is_killed(world: World, step: str, which: str) -> None:
    with stopped(world, step, command=("sleep", "100")) as (run, pid):
        (outer,) = [p for p in descendants(pid) if parent(p) == pid and comm(p) == "bwrap"]
        both = {"outer": outer, "first": descendants(outer)[0]}
        os.kill(both[which], signal.SIGKILL)
        assert eventually(lambda: state(both[which]) in "XZ")
        os.kill(pid, signal.SIGCONT)
        told = heard(run)
    assert told.finished.destroyed and told.out == b"", told
    assert (told.finished.refused == "") == (step == "started"), told
    world.nothing_left()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.mark.parametrize("step", [*BEFORE_GO, "go", "recorded", "started", "dead", "destroyed", "told"])
def test_the_zygote_is_killed(world: World, step: str) -> None:
    """What runs goes on to its end, and the next request has another zygote."""
    before = world.runners.pid
    with stopped(world, step) as (run, pid):
        os.kill(before, signal.SIGKILL)
        os.kill(pid, signal.SIGCONT)
        told = heard(run)
    assert (told.out, told.finished.status, told.finished.destroyed) == (b"ran\n", 0, True)
    assert eventually(lambda: state(pid) in "XZ")
    assert world.told(world.job("echo", "again")).out == b"again\n"
    assert world.runners.pid != before
    world.nothing_left()


def test_what_does_not_die_is_not_called_destroyed_and_did_run(world: World) -> None:
    asked = job(world, "started", "UNDEAD")
    end = world.told(asked).finished
    assert (end.destroyed, end.refused) == (False, "") and "does not die" in end.why, end
    last = world.records(asked.id)[-1]
    assert (last["event"], last["fields"]["destroyed"]) == ("request-ended", False)


def test_what_never_ran_and_does_not_die_is_not_called_destroyed(world: World) -> None:
    """In `mute` nothing can be put on record, so the gate stays closed."""
    asked = msgspec.structs.replace(job(world, "leased", "UNDEAD"), workspace="mute")
    end = world.told(asked).finished
    assert (end.destroyed, end.refused) == (False, "it does not die"), end


@pytest.mark.parametrize("step", ["projecting", "leased"])
def test_without_memory_it_is_refused_by_name(world: World, step: str) -> None:
    asked = job(world, step, "MEMORY")
    end = world.told(asked).finished
    assert (end.refused, end.destroyed, end.status) == ("MemoryError", True, 125)
    assert world.records(asked.id)[-1]["event"] == "request-refused"
