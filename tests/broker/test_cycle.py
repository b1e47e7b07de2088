"""One request's whole life, with real sandboxes and copies, and a stand-in for egressd."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from broker.cycle_stand import Told, World, eventually, listen, nothing_left, world
from egressd.broker.runners import cycle, jobs
from egressd.broker.runners.jobs import Limits

__all__ = ["nothing_left", "world"]
pytestmark = pytest.mark.kernel


# ---- what the command finds


def test_from_project_to_finished(world: World) -> None:
    world.write("a.md", b"# A\n")
    world.write("hr/leave.md", b"leave\n")
    job = world.job("sh", "-c", "pwd; cat docs/a.md docs/hr/leave.md; echo done >&2; exit 3",
                    copies=(world.copy("a.md"), world.copy("hr/leave.md")), discarded=5)  # fmt: skip
    told = world.told(job)
    assert told.kinds == ["Projected", "Started", "Output", "Finished"]
    assert (told.out, told.err) == (b"/work\n# A\nleave\n", b"done\n")
    end = told.finished
    assert (end.status, end.why, end.hit, end.refused, end.destroyed) == (3, "", (), "", True)
    assert set(end.seconds) == {"project", "start", "run", "destroy"}
    assert end.cpu > 0 and end.max_rss > 1 << 20
    assert end.counters == {"in": (3, 180), "ok": (2, 120), "denied": (1, 60), "other": (0, 0)}


def test_the_record_comes_before_the_command_and_its_end_before_the_lease_goes(world: World) -> None:
    world.write("a.md", b"# A\n")
    job = world.job("true", copies=(world.copy("a.md"),), discarded=2, action="summarise", generation=9,
                    email="a@b.example", clearance="internal", network="none")  # fmt: skip
    told = world.told(job)
    asked, decided, files, ended = records = world.records(job.id)
    assert [r["event"] for r in records] == [
        "request-asked", "request-decided", "request-files", "request-ended",
    ]  # fmt: skip
    assert len({r["link"] for r in records}) == 1 and asked["link"], "all of one sandbox"
    assert asked["fields"] == {
        "request": job.id, "asker": "user:okta:u1", "email": "a@b.example", "issuer": "okta",
        "clearance": "internal", "candidates": 3, "discarded": 2, "generation": 9,
    }  # fmt: skip
    assert decided["fields"] == {
        "request": job.id, "role": "viewer", "action": "summarise", "cleared": 1, "octets": 4,
        "manifest": told.messages[0].manifest, "network": "none",
    }  # fmt: skip
    assert files["fields"]["files"] == f"docs:a.md {job.copies[0].digest}"
    assert ended["fields"] | {"seconds": 0} == {
        "request": job.id, "status": 0, "why": "", "hit": "", "destroyed": True, "files": 1, "seconds": 0,
        "tokens": 0, "cost": 0.0,
    }  # fmt: skip


def test_many_files_take_many_records_and_each_line_stands_in_one(world: World) -> None:
    copies = tuple(
        jobs.Copy(id=f"docs:{'d' * 100}/{n}", root=b"/", path=b"x", size=1, digest="sha256:" + "0" * 64)
        for n in range(100)
    )
    parts = list(cycle.file_records(world.job("true", copies=copies)))
    assert [(p["part"], p["parts"]) for p in parts] == [(n, len(parts)) for n in range(1, len(parts) + 1)]
    assert len(parts) > 1 and max(len(str(p["files"])) for p in parts) <= 4096
    lines = [line for p in parts for line in str(p["files"]).splitlines()]
    assert lines == [f"{copy.id} {copy.digest}" for copy in copies]
    (none,) = cycle.file_records(world.job("true"))
    assert (none["part"], none["parts"], none["files"]) == (1, 1, "")


def test_the_world_is_the_copies_and_they_cannot_be_written(world: World) -> None:
    world.write("a.md", b"# A\n")
    world.write("secret.md", b"not cleared\n")
    script = (
        "find /work -type f; cat /work/MANIFEST.json; echo; (echo x > docs/a.md) 2>&1; (: > new) 2>&1;"
        " touch docs/a.md 2>&1; ls -A /run /mnt /var 2>&1; test -w /opt/egressd && echo writable"
    )
    told = world.told(world.job("sh", "-c", script, copies=(world.copy("a.md"),)))
    lines = told.out.decode().splitlines()
    assert set(lines[:2]) == {"/work/MANIFEST.json", "/work/docs/a.md"}
    assert [entry["id"] for entry in json.loads(lines[2])["files"]] == ["docs:a.md"]
    assert "secret" not in told.out.decode() and "writable" not in lines
    assert sum("Read-only file system" in line or "Permission denied" in line for line in lines) == 3, lines


def test_input_environment_and_descriptors(world: World) -> None:
    script = (
        "import os, sys; print(sys.stdin.read(), os.environ['A'], os.environ['EGRESSD_USAGE_FD'],"
        " sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    )
    told = world.told(world.python(script, stdin=b"input \xc3\xa9", environment={"A": "1"}))
    assert told.out.decode() == "input é 1 3 [0, 1, 2, 3]\n", told.err
    assert world.told(world.job("cat", stdin=b"x" * (1 << 20))).out == b"x" * (1 << 20)
    assert world.told(world.job("cat")).out == b""


def test_output_that_is_no_text_arrives_as_it_was(world: World) -> None:
    data = bytes(range(256)) * 1024
    told = world.told(world.job("cat", stdin=data))
    assert told.out == data


def test_a_command_that_closes_its_output_goes_on(world: World) -> None:
    script = "import os, sys, time; os.close(1); os.close(3); time.sleep(0.2); print('late', file=sys.stderr)"
    told = world.told(world.python(script))
    assert (told.err, told.finished.status) == (b"late\n", 0)


def test_a_command_that_is_not_there(world: World) -> None:
    told = world.told(world.job("no-such-command"))
    assert told.finished.status == 127 and b"not found" in told.err


def test_what_a_command_leaves_behind_ends_with_it(world: World) -> None:
    script = (
        "import os, signal, time\n"
        "for n in range(1, 65):\n"
        "    if n not in (9, 19, 32, 33): signal.signal(n, signal.SIG_IGN)\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "        os._exit(0)\n"
        "open('/tmp/full', 'wb').write(bytes(1 << 20)); print('up', flush=True)\n"
    )
    told = world.told(world.python(script))
    assert (told.out, told.finished.status, told.finished.destroyed) == (b"up\n", 0, True)


def test_several_at_once_see_their_own(world: World) -> None:
    for n in range(3):
        world.write(f"{n}.md", b"%d" % n)
    runs = [
        world.runners.run(world.job("sh", "-c", "sleep 0.2; cat docs/*", copies=(world.copy(f"{n}.md"),)))
        for n in range(3)
    ]
    for n, run in enumerate(runs):
        with run:
            assert listen(run).out == b"%d" % n


def test_on_disk_instead(world: World, tmp_path: Path) -> None:
    world.write("a.md", b"# A\n")
    place = Path(f"/var/tmp/egressd-scratch-{os.getpid()}")
    place.mkdir(mode=0o700)
    os.chown(place, 4001, 4001)
    try:
        told = world.told(world.job("cat", "docs/a.md", copies=(world.copy("a.md"),), scratch=str(place)))
        assert (told.out, told.finished.destroyed) == (b"# A\n", True), told.finished
        assert list(place.iterdir()) == []
    finally:
        place.rmdir()


CYCLE = """
import os, socket
held = [os.open(path, os.O_RDONLY) for path in ("/work/docs/a.md", "/work")]
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
socket.send_fds(one, [b"x"], [other.fileno(), *held])
socket.send_fds(other, [b"x"], [one.fileno(), *held])
print("sent")
"""


def test_files_that_sockets_hold_in_flight_do_not_outlive_it(world: World) -> None:
    """Sockets in each other's queues are closed by nobody when their process ends."""
    world.write("a.md", b"# A\n")
    told = world.told(world.python(CYCLE, copies=(world.copy("a.md"),)))
    assert (told.out, told.finished.destroyed) == (b"sent\n", True), told.finished


# ---- what is refused


@pytest.mark.parametrize("bound", [True, False])
def test_a_source_that_every_command_sees_anyway(world: World, bound: bool) -> None:
    """Its decision would be worth nothing."""
    world.write("a.md", b"# A\n")
    copy = world.copy("a.md")
    if bound:
        job = world.job("true", copies=(copy,), bind_ro=(str(world.documents.parent),))
    else:
        job = world.job("true", copies=(msgspec.structs.replace(copy, root=b"/usr/share/doc"),))
    refused(world, world.told(job), job, "is seen by every command", "files")


def refused(world: World, told: Told, job: jobs.Job, text: str, code: str) -> None:
    """Nothing ran; it is on record, over no link."""
    assert told.kinds in (["Finished"], ["Projected", "Finished"])
    assert text in told.finished.refused, told.finished
    assert told.finished.status == 125 and told.out == told.err == b""
    (record,) = world.records(job.id)
    assert (record["event"], record["link"]) == ("request-refused", None)
    assert text in record["fields"]["text"] and record["fields"]["code"] == code


@pytest.mark.parametrize("change", ["removed", "longer", "other", "link", "fifo"])
def test_a_file_that_is_not_what_was_ingested(world: World, change: str) -> None:
    """Between the decision and the copying."""
    world.write("a.md", b"# A\n")
    job = world.job("true", copies=(world.copy("a.md"),))
    file = world.documents / "a.md"
    file.unlink()
    match change:
        case "longer":
            file.write_bytes(b"# A\n# B\n")
        case "other":
            file.write_bytes(b"# B\n")
        case "link":
            file.symlink_to("/etc/hostname")
        case "fifo":
            os.mkfifo(file)
    told = world.told(job)
    refused(world, told, job, "docs:a.md", "files")
    assert told.finished.destroyed
    file.unlink(missing_ok=True)


def test_a_scratch_that_is_full(world: World) -> None:
    world.write("big", bytes(200_000))
    job = world.job("true", copies=(world.copy("big"),), scratch_size=100_000)
    told = world.told(job)
    assert told.finished.refused and told.finished.destroyed, told.finished
    assert world.records(job.id)[0]["event"] == "request-refused"


@pytest.mark.parametrize(
    ("workspace", "text"),
    [
        ("revokes", ""),  # its reason is lost with what it had not read yet (ECONNRESET)
        ("nowhere", "not a member"),
        ("full", "as many sandboxes"),
        ("dies", "closed the connection"),
    ],
)
def test_where_there_is_no_lease_nothing_runs(world: World, workspace: str, text: str) -> None:
    told = world.told(world.job("echo", "ran", workspace=workspace))
    assert told.kinds == ["Projected", "Finished"]
    assert text in told.finished.refused and told.finished.refused
    assert told.finished.destroyed and told.out == b""


def test_what_cannot_be_put_on_record_does_not_run(world: World) -> None:
    job = world.job("echo", "ran", workspace="mute")
    told = world.told(job)
    assert told.kinds == ["Projected", "Finished"] and told.out == b""
    assert "no broker" in told.finished.refused and "not on record" in told.finished.why
    assert told.finished.destroyed and world.records(job.id) == []


def test_without_egressd_nothing_runs(world: World) -> None:
    told = world.told(world.job("true", run_dir="/var/tmp/no-such-place"))
    assert "egressd is not running" in told.finished.refused and "not on record" in told.finished.why


def test_a_lease_that_is_revoked_ends_it(world: World) -> None:
    job = world.job("sleep", "100", workspace="later")
    told = world.told(job)
    assert (told.finished.status, told.finished.why) == (125, "the workspace was removed")
    assert told.finished.destroyed
    assert world.records(job.id)[-1]["event"] == "request-ended", "over a connection of its own"


# ---- what the service does


def test_nothing_runs_before_go(world: World) -> None:
    with world.runners.run(world.job("echo", "ran")) as run:
        run.channel.socket.settimeout(10)
        assert isinstance(run.receive(), jobs.Projected)
        run.channel.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            run.receive()
        run.channel.socket.settimeout(10)
        run.stop("what was decided does not hold any more")
        end = listen(run).finished
        assert end.refused == "stopped before it ran: what was decided does not hold any more"


def test_a_stop_ends_what_runs(world: World) -> None:
    job = world.job("sh", "-c", "trap '' TERM; echo up; sleep 100")
    with world.runners.run(job) as run:
        told = Told()
        for message in run:
            told.messages.append(message)
            if isinstance(message, jobs.Projected):
                run.go()
            if isinstance(message, jobs.Output):
                run.stop("cancelled by its asker")
        assert (told.finished.status, told.finished.why) == (143, "cancelled by its asker")
        assert told.finished.destroyed
    assert world.records(job.id)[-1]["fields"]["why"] == "cancelled by its asker"


def test_a_service_that_does_not_read_holds_up_the_command_and_not_the_clock(world: World) -> None:
    job = world.job("cat", "/dev/zero", limits=Limits(wall=1.0))
    with world.runners.run(job) as run:
        run.channel.socket.settimeout(20)
        assert isinstance(run.receive(), jobs.Projected)
        run.go()
        assert eventually(lambda: len(world.records(job.id)) == 4, within=10), "it ended all the same"
        assert memory_of_runners(world) < 100 << 20
        told = listen(run)
        assert (told.finished.status, told.finished.hit) == (124, ("wall",))
        assert set(told.out) == {0} and 1 << 16 < len(told.out) < 4 << 20, "what was in flight"


def memory_of_runners(world: World) -> int:
    """The most that any has in memory, bytes."""
    found = [0]
    for entry in Path(f"/proc/{world.runners.pid}/task/{world.runners.pid}/children").read_text().split():
        status = Path(f"/proc/{entry}/status").read_text()
        found += [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS")]
    return max(found)


def test_a_service_that_goes_away_takes_it_along(world: World) -> None:
    job = world.job("sh", "-c", "echo up; sleep 100")
    with world.runners.run(job) as run:
        for message in run:
            if isinstance(message, jobs.Projected):
                run.go()
            if isinstance(message, jobs.Output):
                break
    world.nothing_left()
    ended = world.records(job.id)[-1]["fields"]
    assert (ended["status"], ended["destroyed"]) == (128 + signal.SIGTERM, True)
    assert ended["why"].startswith("the service is gone")


def test_a_stop_while_copies_are_made(world: World) -> None:
    """Many of them: it does not wait for the last."""
    for n in range(400):
        world.write(f"many/{n}", b"%d" % n * 1000)
    copies = tuple(world.copy(f"many/{n}") for n in range(400))
    with world.runners.run(world.job("true", copies=copies)) as run:
        run.stop("never mind")
        end = listen(run).finished
        assert end.refused == "stopped before it ran: never mind" and end.destroyed


def test_time_is_told_by_step(world: World) -> None:
    began = time.monotonic()
    end = world.told(world.job("sleep", "0.3")).finished
    # The command began a moment before its gate was known to be open.
    assert 0.2 <= end.seconds["run"] < time.monotonic() - began
    assert sum(end.seconds.values()) < time.monotonic() - began
