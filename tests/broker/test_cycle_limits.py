"""Each limit of a request is reached in turn: it ends, or refuses, what it is meant to, and is named."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from broker.cycle_stand import World, nothing_left, world
from egressd.broker.runners import jobs
from egressd.broker.runners.jobs import Limits

__all__ = ["nothing_left", "world"]
pytestmark = pytest.mark.kernel
BURN = "while True: pass"
BURN_IN_TWO = "import os\nos.fork()\nwhile True: pass"
# Children that each burn a fifth of a second and are waited for; none alone comes near a limit.
BURN_IN_MANY = (
    "import os, time\n"
    "while True:\n"
    "    if os.fork() == 0:\n"
    "        end = time.process_time() + 0.2\n"
    "        while time.process_time() < end: pass\n"
    "        os._exit(0)\n"
    "    os.wait()\n"
)
WRITE = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nopen('/tmp/x', 'wb').write(bytes({}))"


def python(world: World, script: str, **limits: Any) -> Any:
    job = world.python(script, limits=Limits(**limits))
    told = world.told(job)
    ended = world.records(job.id)[-1]["fields"]
    assert ended["hit"] == ",".join(told.finished.hit), "what is said is what is on record"
    assert (ended["status"], ended["why"]) == (told.finished.status, told.finished.why)
    assert told.finished.destroyed
    return told


def test_wall(world: World) -> None:
    end = python(world, "import time; time.sleep(60)", wall=0.4).finished
    assert (end.status, end.hit, end.why) == (124, ("wall",), "the wall limit of 0.4 s is reached")


@pytest.mark.parametrize("script", [BURN, BURN_IN_TWO, BURN_IN_MANY])
def test_cpu_of_all_processes_together(world: World, script: str) -> None:
    end = python(world, script, cpu=0.7, wall=20).finished
    assert (end.status, end.hit, end.why) == (137, ("cpu",), "the cpu limit of 0.7 s is reached")
    assert 0.7 <= end.cpu < 2.5


def test_cpu_of_one_process_is_the_kernels_to_end(world: World) -> None:
    """SIGXCPU at the limit, where nobody looks before."""
    script = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert python(world, script, cpu=7).out == b"(7, 8)\n"
    assert python(world, script, cpu=6.2).out == b"(7, 8)\n"
    assert python(world, script).out == b"(-1, -1)\n"
    end = python(world, "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", cpu=7).finished
    assert (end.status, end.hit) == (152, ("cpu",))


def test_file_size(world: World) -> None:
    assert python(world, WRITE.format(4096), file_size=4096).finished.hit == ()
    end = python(world, WRITE.format(8192), file_size=4096).finished
    assert (end.status, end.hit) == (153, ("file_size",))
    ignoring = python(world, "open('/tmp/x', 'wb', 0).write(bytes(9)); open('/tmp/x', 'ab', 0).write(b'x')",
                      file_size=9)  # fmt: skip
    assert b"File too large" in ignoring.err and ignoring.finished.status == 1


def test_output_to_the_byte(world: World) -> None:
    told = python(world, "print('x' * 999)", output=1000)
    assert (len(told.out), told.finished.hit, told.finished.status) == (1000, (), 0)
    told = python(world, "import sys; print('x' * 900, file=sys.stderr); print('x' * 200)", output=1000)
    assert len(told.out) + len(told.err) == 1000 and told.finished.hit == ("output",)


def test_gigabytes_of_output(world: World) -> None:
    began = time.monotonic()
    job = world.job("sh", "-c", "exec cat /dev/zero", limits=Limits(output=3 << 20, wall=20))
    told = world.told(job)
    end = told.finished
    assert len(told.out) == 3 << 20
    assert (end.status, end.hit) == (137, ("output",)), end
    assert end.why == f"the output limit of {3 << 20} bytes is reached"
    assert time.monotonic() - began < 15


def test_memory_and_processes_of_the_request(world: World) -> None:
    much = python(world, "x = bytearray(200 << 20)\nprint('had it')", memory=96 << 20)
    assert much.out == b"" and b"MemoryError" in much.err
    shared = python(world, "open('/tmp/x', 'wb').write(bytes(64 << 20))", memory=48 << 20)
    assert shared.finished.status == 1
    forks = (
        "import os, time\n"
        "try:\n"
        "    for n in range(50):\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "except OSError as error: print(error.errno)\n"
        "time.sleep(1.2)\n"
    )
    told = python(world, forks, processes=10)
    assert (told.out, told.finished.hit) == (b"11\n", ("processes",)), "EAGAIN"


def test_the_lower_of_the_workspaces_limit_and_the_requests_holds(world: World) -> None:
    """`small` has 64 MiB and 12 processes, `brief` half a second."""
    script = "import resource as r; print([r.getrlimit(n)[0] for n in (r.RLIMIT_DATA, r.RLIMIT_NPROC)])"
    for limits, expected in (
        ({}, [64 << 20, 12]),
        ({"memory": 1 << 30, "processes": 100}, [64 << 20, 12]),
        ({"memory": 50 << 20, "processes": 9}, [50 << 20, 9]),
    ):
        told = world.told(world.python(script, workspace="small", limits=Limits(**limits)))
        assert json.loads(told.out) == expected
    end = world.told(world.job("sleep", "60", workspace="brief", limits=Limits(wall=50))).finished
    assert (end.status, end.hit) == (124, ("wall",))


def test_budgets_of_the_link_go_to_egressd_and_come_back_by_name(world: World) -> None:
    job = world.job("true", workspace="spent", network="none", limits=Limits(egress=4096, connections=7))
    end = world.told(job).finished
    assert (end.hit, end.status) == (("connections", "egress"), 0), (
        "refused by the kernel; the command goes on"
    )
    attached = json.loads((world.run_dir / "attached.jsonl").read_text().splitlines()[-1])
    assert (attached["quota"], attached["connections"], attached["closed"]) == (4096, 7, True)


REPORT = (
    "import json, os, time\n"
    "for n in range(100):\n"
    "    os.write(3, json.dumps({}).encode() + b'\\n')\n"
    "    time.sleep(0.02)\n"
)


def test_a_budget_of_tokens_as_the_command_reports_it(world: World) -> None:
    end = python(world, REPORT.format("{'tokens': 100}"), tokens=450).finished
    assert (end.hit, end.why) == (("tokens",), "the budget of 450 tokens is spent")
    assert end.status == 137 and 450 < end.tokens < 2000


def test_a_budget_of_money(world: World) -> None:
    end = python(world, REPORT.format("{'cost': 0.25}"), cost=1.0).finished
    assert (end.hit, end.why) == (("cost",), "the budget of 1 is spent")
    assert end.cost >= 1.25


def test_what_is_reported_last_counts_too(world: World) -> None:
    end = python(world, 'import os; os.write(3, b\'{"tokens": 7, "cost": 0.5}\\n\')', tokens=5).finished
    assert (end.tokens, end.cost, end.hit) == (7, 0.5, ("tokens",))
    end = python(world, "import os; os.write(3, b'{\"tokens\": 5}\\n')", tokens=5).finished
    assert (end.tokens, end.hit, end.status) == (5, (), 0), "a budget may be used up"


def test_reports_that_are_none(world: World) -> None:
    lines = [b"", b"x", b"[]", b'{"tokens": -5}', b'{"tokens": 1.5}', b'{"cost": NaN}', b"[" * 4000,
             b'{"tokens": 3, "model": "m"}', b"y" * 100_000, b'{"tokens": 4}']  # fmt: skip
    script = f"import os\nfor line in {lines!r}: os.write(3, line + b'\\n')"
    end = python(world, script, tokens=1000).finished
    assert (end.tokens, end.cost, end.status) == (7, 0.0, 0)


def test_a_flood_of_reports_does_not_hold_up_the_clock(world: World) -> None:
    """Written by two, faster than one can read it."""
    script = "import os\nos.fork()\nlines = b'\\n' * 65536\nwhile True: os.write(3, lines)"
    end = python(world, script, wall=1.0).finished
    assert (end.status, end.hit) == (124, ("wall",))


def test_more_tokens_than_a_record_holds(world: World) -> None:
    """Or how it ended would not be taken on record."""
    script = 'import os\nfor _ in range(20): os.write(3, b\'{"tokens": %d, "cost": 1e12}\\n\' * 2000)'
    end = python(world, script % (1 << 50), wall=20).finished
    assert (end.tokens, end.status) == ((1 << 53) - 1, 0)
    assert 0 < end.cost < 1 << 62


def test_a_process_whose_name_is_no_text_uses_time_all_the_same(world: World) -> None:
    name = "import ctypes, os\nctypes.CDLL(None).prctl(15, b'\\xff)\\xfe', 0, 0, 0)\nos.fork()\n"
    end = python(world, name + BURN, cpu=0.7, wall=20).finished
    assert (end.status, end.hit) == (137, ("cpu",))


SEND = """
import os, socket
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
null, kept, sent = os.open("/dev/null", os.O_RDONLY), [], 0
try:
    while True:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        kept.append(pair)
        pair[0].setblocking(False)
        try:
            while True:
                socket.send_fds(pair[0], [b"x"], [null] * 250)
                sent += 250
        except BlockingIOError:
            pass
except OSError as error:
    print(error.errno, flush=True)
import time; time.sleep(60)
"""


def test_descriptors_that_nobody_receives_are_nobody_elses_limit(world: World) -> None:
    """They are counted for the account, which all requests have in common."""
    with world.runners.run(world.python(SEND, limits=Limits(wall=30))) as run:
        run.channel.socket.settimeout(20)
        for message in run:
            if isinstance(message, jobs.Projected):
                run.go()
            if isinstance(message, jobs.Output):
                assert message.data == b"109\n", "ETOOMANYREFS"
                break
        told = world.told(world.job("echo", "another"))
        assert told.out == b"another\n", told.finished
