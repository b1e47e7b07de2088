"""egressd goes away while a request runs, and comes back, or does not; with real sandboxes and copies, and a
stand-in for egressd that goes where it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.cycle_stand import Told, World, a_runners_world, eventually, listen, nothing_left
from egressd.broker.runners import jobs
from egressd.broker.runners.jobs import Limits
from sandbox.stand_in import Returning, processes_with

__all__ = ["nothing_left"]
pytestmark = pytest.mark.kernel
COUNTERS = {"in": (3, 180), "ok": (2, 120), "denied": (1, 60), "other": (0, 0)}
DECIDED = ["request-asked", "request-decided", "request-files"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_runners_world(daemon="returning_daemon.py") as made:
        yield made


@pytest.fixture
def egressd(world: World) -> Iterator[Returning]:
    assert world.gateway is not None
    world.gateway.do("resume lease")
    yield world.gateway
    world.gateway.do("back")
    world.gateway.do("close")


def events(world: World, job: jobs.Job) -> list[str]:
    return [record["event"] for record in world.records(job.id)]


def of_one_sandbox(world: World, job: jobs.Job) -> bool:
    links = {record["link"] for record in world.records(job.id)}
    return len(links) == 1 and None not in links


def when_it_says_something(world: World, job: jobs.Job, *does: str) -> Told:
    """`does` is told to the stand-in after the first output."""
    assert world.gateway is not None
    told = Told()
    with world.runners.run(job) as run:
        run.channel.socket.settimeout(60)
        for message in run:
            told.messages.append(message)
            if isinstance(message, jobs.Projected):
                run.go()
            if isinstance(message, jobs.Output):
                for words in does:
                    world.gateway.do(words)
                return listen(run, told)
    raise AssertionError(f"it said nothing: {told}")


# ---- while the command runs


def test_a_stream_goes_on(world: World, egressd: Returning) -> None:
    job = world.job("sh", "-c", "for n in 1 2 3 4 5 6 7 8 9; do echo $n; sleep 0.1; done; exit 3")
    told = when_it_says_something(world, job, "away", "back")
    assert told.out == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    end = told.finished
    assert (end.status, end.why, end.counters, end.destroyed) == (3, "", COUNTERS, True)
    assert events(world, job) == [*DECIDED, "request-ended"]
    assert of_one_sandbox(world, job)


def test_limits_and_the_service_s_word_hold_in_the_gap(world: World, egressd: Returning) -> None:
    loud = "while :; do echo 0123456789; done"
    told = when_it_says_something(
        world, world.job("sh", "-c", loud, limits=Limits(output=1 << 20)), "away", "back"
    )
    assert len(told.out) == 1 << 20
    assert told.finished.hit == ("output",)
    told = when_it_says_something(
        world, world.job("sh", "-c", "echo up; exec sleep 100", limits=Limits(wall=2)), "away", "back"
    )
    assert (told.finished.status, told.finished.hit) == (124, ("wall",))


def test_where_it_does_not_give_the_lease_back(world: World, egressd: Returning) -> None:
    job = world.job("sh", "-c", "echo up; exec sleep 100")
    end = when_it_says_something(world, job, "resume refuse", "cut").finished
    assert end.status == 125
    assert end.why == "egressd was restarted, and does not give the lease back: its time is over"
    assert (end.destroyed, end.counters) == (True, {})
    assert events(world, job) == [*DECIDED, "request-ended"], "over a connection of its own"
    assert world.records(job.id)[-1]["link"] is None


# ---- while something is told


@pytest.mark.parametrize("event", ["request-asked", "request-decided"])
def test_what_is_not_on_record_does_not_run(world: World, egressd: Returning, event: str) -> None:
    egressd.do(f"resume dies:before:{event} lease")
    job = world.job("echo", "ran")
    told = world.told(job)
    assert (told.out, told.kinds) == (b"", ["Projected", "Finished"])
    assert "closed the connection without an answer" in told.finished.refused
    assert told.finished.destroyed
    assert "request-decided" not in events(world, job)
    assert events(world, job)[-1] == "request-refused"


@pytest.mark.parametrize("when", ["spent", "before:request-ended", "after:request-ended"])
def test_the_end_is_on_record_once_and_of_its_sandbox(world: World, egressd: Returning, when: str) -> None:
    """It dies while it is asked for the counters; before it has recorded what it was told; and after."""
    egressd.do(f"resume dies:{when} lease")
    job = world.job("sh", "-c", "echo out; exit 4")
    end = world.told(job).finished
    assert (end.status, end.why, end.counters) == (4, "", COUNTERS)
    assert events(world, job) == [*DECIDED, "request-ended"]
    assert of_one_sandbox(world, job)
    assert eventually(lambda: [word["status"] for word in egressd.written("ended")][-1:] == [4])


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_may_be_on_record_is_not_said_again_elsewhere(
    world: World, egressd: Returning, when: str
) -> None:
    egressd.do(f"resume dies:{when}:request-ended refuse")
    job = world.job("true")
    end = world.told(job).finished
    assert end.status == 0
    assert end.why.startswith("whether its end is on record is not known: egressd closed the connection")
    assert events(world, job) == [*DECIDED, "request-ended"][: 3 if when == "before" else 4]


def test_a_command_that_ends_in_the_gap(world: World, egressd: Returning) -> None:
    """All is destroyed at once; that it ended is told when egressd is back, and only then is it over."""
    place = world.documents
    wait = f"while [ ! -e {place}/end ]; do sleep 0.05; done; exit 5"
    job = world.job("sh", "-c", wait, bind_ro=(str(place),))
    token, told = world.token, Told()
    with world.runners.run(job) as run:
        run.channel.socket.settimeout(60)
        for message in run:
            told.messages.append(message)
            if isinstance(message, jobs.Projected):
                run.go()
            if isinstance(message, jobs.Started):
                egressd.do("away")
                world.write("end")
                assert eventually(lambda: processes_with(token) == [], within=10)
                assert "request-ended" not in events(world, job)
                egressd.do("back")
                listen(run, told)
                break
    end = told.finished
    assert (end.status, end.why, end.destroyed, end.counters) == (5, "", True, COUNTERS)
    assert events(world, job) == [*DECIDED, "request-ended"]
    assert of_one_sandbox(world, job)
