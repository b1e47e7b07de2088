"""The process that forks runners: how many, what they hold, who outlives whom, and who can look into them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker.cycle_stand import World, a_runners_world, descendants, eventually, listen, nothing_left, world
from egressd.broker.runners.zygote import Run, Runners, jobs
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from sandbox.stand_in import CALLER, as_caller

__all__ = ["nothing_left", "world"]
pytestmark = pytest.mark.kernel


def projected(world: World, job: jobs.Job) -> Run:
    run = world.runners.run(job)
    run.channel.socket.settimeout(10)
    assert isinstance(run.receive(), jobs.Projected)
    return run


def started(world: World, job: jobs.Job) -> Run:
    run = projected(world, job)
    run.go()
    assert isinstance(run.receive(), jobs.Started)
    return run


def runner_of(world: World) -> int:
    """The only one."""
    (pid,) = map(
        int, Path(f"/proc/{world.runners.pid}/task/{world.runners.pid}/children").read_text().split()
    )
    return pid


def test_a_runner_has_nothing_that_is_not_its_own(world: World) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    with projected(world, world.job("true")) as one, projected(world, world.job("true")) as other:
        pids = Path(f"/proc/{world.runners.pid}/task/{world.runners.pid}/children").read_text().split()
        for pid in pids:
            held = {str(place.readlink()) for place in Path(f"/proc/{pid}/fd").iterdir()}
            sockets = {place for place in held if place.startswith("socket:")}
            assert len(sockets) == 1, "its channel"
            assert not any(f"pipe:[{os.fstat(reading).st_ino}]" in place for place in held)
            assert os.getsid(int(pid)) == os.getpgid(int(pid)) == int(pid)
        assert len(pids) == 2
        assert {f"mount in {pid}" for pid in pids} <= set(world.leavings()), "what is left would be seen"
        assert {listen_stopped(run) for run in (one, other)} == {"stopped before it ran: enough"}
    os.close(reading)
    os.close(writing)


def listen_stopped(run: Run) -> str:
    run.stop("enough")
    return listen(run).finished.refused


def test_no_more_at_once_than_may_be() -> None:
    with a_runners_world(most=2) as world:
        with projected(world, world.job("true")), projected(world, world.job("true")):
            with pytest.raises(Refused, match="as many requests as may be") as caught:
                world.runners.run(world.job("true"))
            assert caught.value.reason is Reason.LIMIT
            assert world.runners.live == 2
        assert world.runners.live == 0
        assert world.told(world.job("echo", "ok")).out == b"ok\n", "there is room again"


def test_a_request_ends_while_a_zygote_is_still_begun(world: World) -> None:
    """That takes its time, and who closes may be an event loop."""
    run = projected(world, world.job("true"))
    with world.runners._lock:
        closing = threading.Thread(target=run.close)
        closing.start()
        closing.join(10)
        assert not closing.is_alive() and world.runners.live == 0
    closing.join()


def test_no_zombie_stays(world: World) -> None:
    for _ in range(5):
        world.told(world.job("true"))
    assert eventually(lambda: descendants(world.runners.pid) == [])


def test_from_many_threads(world: World) -> None:
    outputs: list[bytes] = []

    def ask(n: int) -> None:
        outputs.append(world.told(world.job("echo", str(n))).out)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == [b"%d\n" % n for n in range(8)]


def test_closing_ends_everything() -> None:
    with a_runners_world() as world:
        run = started(world, world.job("sleep", "100"))
        zygote = world.runners.pid
        world.runners.close()
        assert not Path(f"/proc/{zygote}").exists()
        assert world.leavings() == [] or world.leavings() == world.gateway.links(), "waited for"
        with pytest.raises(Refused, match="ending"):
            world.runners.run(world.job("true"))
        run.close()


SERVICE = """
import sys
from broker.cycle_stand import World
from egressd.broker.runners import jobs
from egressd.broker.runners.zygote import Runners
from pathlib import Path
runners = Runners.start()
world = World(runners, Path(sys.argv[1]), Path("/"))
run = runners.run(world.job("sleep", "100"))
for message in run:
    if isinstance(message, jobs.Projected):
        run.go()
    if isinstance(message, jobs.Started):
        print(runners.pid, flush=True)
"""


def test_a_service_that_is_killed_takes_all_along(world: World) -> None:
    tests = str(Path(__file__).resolve().parent.parent)
    service = subprocess.Popen(
        as_caller(sys.executable, "-c", SERVICE, world.run_dir), stdout=subprocess.PIPE, text=True, cwd="/",
        env={"PYTHONPATH": tests, "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert service.stdout is not None
    zygote = int(service.stdout.readline())
    below = descendants(zygote)
    assert len(below) >= 3, "runner, bubblewrap, its first process"
    service.kill()
    service.communicate()
    left = [zygote, *below]
    assert eventually(lambda: not any(alive(pid) for pid in left), within=5), left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_zygote_that_does_not_start() -> None:
    with pytest.raises(Refused, match="did not start"):
        Runners.start(program=("/bin/false",))
    with pytest.raises(OSError):
        Runners.start(program=("/no/such/program",))


def test_a_job_that_cannot_be_read_ends_its_runner_alone(world: World) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, world.runners._lock:
        world.runners._hand_over(theirs)
        theirs.close()
        ours.send(b"nonsense")
        ours.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert ours.recv(100) == b""
    assert world.told(world.job("echo", "ok")).out == b"ok\n"


# ---- another process of the same account

DENIED = {"Permission denied", "Operation not permitted"}
LOOK = """
import os, sys
pid = int(sys.argv[1])
def tried(what, act):
    try: print(what, act() or "yes")
    except OSError as error: print(what, error.strerror)
tried("root", lambda: len(os.listdir(f"/proc/{pid}/root/")) and None)
tried("copies", lambda: ",".join(sorted(os.listdir(f"/proc/{pid}/root{sys.argv[2]}"))))
tried("memory", lambda: open(f"/proc/{pid}/mem", "rb") and None)
tried("environment", lambda: open(f"/proc/{pid}/environ", "rb").read(1) and None)
tried("descriptors", lambda: os.listdir(f"/proc/{pid}/fd") and None)
tried("mount namespace", lambda: os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) and None)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def seize():
    if libc.ptrace(0x4206, pid, 0, 0):  # PTRACE_SEIZE, linux/ptrace.h
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
tried("trace", seize)
"""


def look(pid: int, place: str) -> dict[str, str]:
    """What came of each attempt of a process of the runners' account."""
    done = subprocess.run(
        as_caller(sys.executable, "-c", LOOK, str(pid), place), capture_output=True, text=True, check=True,
        cwd="/",
    )  # fmt: skip
    names = ("root", "copies", "memory", "environment", "descriptors", "mount namespace", "trace")
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done
    return {name: line.removeprefix(name + " ") for name, line in zip(names, lines, strict=True)}


def test_nobody_of_the_same_account_can_look_into_a_runner(world: World) -> None:
    """While its copies are there, and nothing has run yet; and into the process that forked it."""
    world.write("a.md", b"# A\n")
    with projected(world, world.job("true", copies=(world.copy("a.md"),))):
        assert set(look(runner_of(world), "/mnt").values()) == {
            "Permission denied",
            "Operation not permitted",
        }
        assert set(look(world.runners.pid, "/mnt").values()) == {
            "Permission denied",
            "Operation not permitted",
        }


def test_what_runs_in_a_sandbox_is_its_accounts(world: World) -> None:
    """What does not hold, so that nobody is told it does: bubblewrap and the command are plain processes of
    the account (exec makes a process dumpable again), which owns their user namespaces."""
    world.write("a.md", b"# A\n")
    run = started(world, world.job("sleep", "100", copies=(world.copy("a.md"),)))
    with run:
        runner = runner_of(world)
        assert set(look(runner, "/mnt").values()) == DENIED
        first = descendants(runner)[-1]
        assert look(first, "/work")["copies"] == "MANIFEST.json,docs"


def test_another_account_can_look_into_nothing(world: World) -> None:
    world.write("a.md", b"# A\n")
    with started(world, world.job("sleep", "100", copies=(world.copy("a.md"),))):
        for pid in descendants(runner_of(world)):
            done = subprocess.run(
                as_caller("ls", f"/proc/{pid}/root/work", uid=CALLER + 1), capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert "Permission denied" in done.stderr and done.stdout == ""


def test_a_command_sees_no_process_but_its_own(world: World) -> None:
    """Two requests at once, same account: neither finds the other's copies through /proc, nor a way there."""
    world.write("mine.md", b"mine")
    world.write("yours.md", b"yours")
    script = "cat /proc/[0-9]*/root/work/docs/* 2>&1; ls -d /proc/[0-9]* | wc -l; ls /proc/*/root/mnt 2>&1"
    with started(world, world.job("sleep", "100", copies=(world.copy("yours.md"),))):
        told = world.told(world.job("sh", "-c", script, copies=(world.copy("mine.md"),)))
    assert b"yours" not in told.out and b"mine" in told.out
