"""One request's life in its runner: project, wait for the word, run, destroy.

The order is the safety again (see sandbox/launch.py):

1. the copies are made, in a scratch that only this process and its sandbox see, and sealed;
2. the service hears what they are (`Projected`), and says `Go` if what it decided still holds;
3. the sandbox is built round them. When it has its link, and before its gate opens, the decision goes on
   record over the connection that is the lease: link and workspace are the daemon's own words there;
4. the gate opens, output goes to the service, limits are held;
5. whatever ends it, everything is destroyed and looked for, before the service hears that it is over. The
   lease goes last: what the link counted, and that the request ended, is told over it.

Where egressd dies before the decision is on record, nothing runs. Where it dies later, the command runs on,
and the lease is asked for again (launch.py); here as well, at the end. What was told when it died is told
again over the same lease only: egressd knows what it has taken of a sandbox, and does not take it twice.

A failure before 4 is a refusal: nothing ran, nothing is left, and that is on record too. The end of the
channel is `Stop` from a service that is gone. This process killed leaves nothing either: the kernel does then
what `finally` does here (docs: the lease is a connection, the copies are in a namespace, --die-with-parent).
"""

# ruff: noqa: PTH112, PTH114, PTH118, PTH120, PTH208
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import egressd
from egressd.broker.runners import jobs
from egressd.broker.runners.desk import Desk, Stopped
from egressd.broker.runners.limits import Meter, named
from egressd.broker.runners.relaying import Relay
from egressd.ipc import messages
from egressd.model.errors import EgressdError, KernelError, Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import launch
from egressd.sandbox.attempts import printable
from egressd.sandbox.control import RESUME_WITHIN, Control, Fact, Gone
from egressd.sandbox.files import seen_anyway
from egressd.sandbox.plan import FAILED
from egressd.selftest import preflight
from egressd.vault import projection
from egressd.vault.scratch import DirectoryScratch, PrivateScratch

__all__ = ["Cycle", "dumpable", "file_records", "serve"]

_TEXT = 4096  # characters of one field of a record
_PR_SET_DUMPABLE = 4  # linux/prctl.h
# Where a private scratch is mounted: in a namespace of this process alone, and nothing is ever written to
# what lies below. The first that is an empty directory is taken, so that no source is ever covered.
_PLACES = ("/run/egressd-broker/copies", "/var/lib/egressd-broker/copies", "/mnt", "/media", "/srv", "/opt")
_TOOLS = os.path.join(os.path.dirname(egressd.__file__), "tools")
_ENDED = "request-ended"
_ONCE = f"{_ENDED} was said of this sandbox"  # what a second one is answered (processes/testifying.py)
Step = Callable[[str], None]
A = TypeVar("A")


def serve(job: jobs.Job, desk: Desk, *, step: Step = lambda _: None) -> None:
    """All of it. Never raises for what goes wrong in it. `step` is told where it is: for tests, which end
    this process there."""
    desk.tell(Cycle(job, desk, step).run())
    desk.hang_up()


def dumpable(*, allowed: bool) -> None:
    """While it is not, no other process of the same account may trace this one, nor enter what it sees
    through /proc/PID/root or its namespaces (ptrace(2), PTRACE_MODE_READ_FSCREDS); nor can it map ids."""
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, int(allowed), 0, 0, 0) != 0:
        raise KernelError(
            f"prctl(PR_SET_DUMPABLE, {int(allowed)}) failed: who may look into a runner is not known"
        )


@dataclass(slots=True)
class _Facts:
    """What has become of it so far."""

    seconds: dict[str, float] = field(default_factory=dict)
    manifest: projection.Manifest | None = None
    outcome: launch.Outcome | None = None  # of the sandbox, if it ran
    refused: str = ""
    code: str = ""  # of the refusal
    why: str = ""
    unknown: str = ""  # what could not be found out of it: for the answer, not for the record
    undead: bool = False
    hit: set[str] = field(default_factory=set)
    destroyed: bool = False
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    cpu: float = 0.0
    max_rss: int = 0


class Cycle:
    """`run` once."""

    def __init__(self, job: jobs.Job, desk: Desk, step: Step = lambda _: None) -> None:
        self._job, self._desk, self._step = job, desk, step
        self._facts = _Facts()
        self._relay = Relay(desk, job.limits, job.stdin)
        self._scratch: PrivateScratch | DirectoryScratch | None = None
        self._recorded: bool | None = False  # how it ended; None: perhaps

    def run(self) -> jobs.Finished:
        facts = self._facts
        self._step("begun")
        try:
            with self._copies() as place:
                self._project(place)
                self._inference(place)
        except launch.Undead as undead:
            facts.undead, facts.refused, facts.code = True, str(undead), str(undead.reason)
        except Stopped as stopped:
            facts.why, facts.refused = str(stopped), f"stopped before it ran: {stopped}"
            facts.code = "stopped"
        except (EgressdError, OSError, ValueError, MemoryError) as error:
            facts.refused = self._explained(error)
            facts.code = str(error.reason) if isinstance(error, Refused) else "failed"
        if facts.outcome is not None:
            facts.refused = ""
        if self._recorded is False:
            self._record_without_lease()
        self._relay.send_rest()
        self._relay.close()
        self._step("told")
        return self._finished()

    def _explained(self, error: BaseException) -> str:
        """Why it never ran, for the record; with what bubblewrap itself said, if it said something."""
        said = self._relay.said()
        return f"{str(error) or type(error).__name__}{f' ({said})' if said else ''}"[:_TEXT]

    # ---- 1, 2

    @contextlib.contextmanager
    def _copies(self) -> Iterator[str]:
        """The directory to project into. However the block is left it is destroyed, and looked for."""
        self._scratch = scratch = _scratch_of(self._job)
        try:
            dumpable(allowed=True)  # or the maps of a user namespace could not be written
            try:
                place = os.fspath(scratch.__enter__())
            finally:
                dumpable(allowed=False)
            self._step("scratch")
            yield place
        finally:
            self._destroy_copies()

    def _destroy_copies(self) -> None:
        """All processes that could see them have ended."""
        if self._scratch is not None:
            scratch, self._scratch = self._scratch, None
            began = time.monotonic()
            try:
                self._facts.destroyed = scratch.destroy()
            except OSError as error:
                self._log(f"its copies could not be destroyed: {error}")
            for trouble in scratch.trouble:
                self._log(f"its copies are not seen to be gone: {trouble}")
            self._facts.seconds["destroy"] = time.monotonic() - began
            self._step("destroyed")

    def _project(self, place: str) -> None:
        assert self._scratch is not None
        began = time.monotonic()
        with self._desk.interrupting():
            self._step("projecting")
            _check_places(self._job)
            made = self._facts.manifest = projection.project(self._job.copies, place)
            self._scratch.seal()
        seconds = self._facts.seconds["project"] = time.monotonic() - began
        self._step("projected")
        self._desk.tell(
            jobs.Projected(manifest=made.digest, files=made.files, octets=made.octets, seconds=seconds)
        )
        self._desk.await_go()
        self._step("go")

    # ---- 3, 4

    def _inference(self, place: str) -> None:
        began = time.monotonic()
        launch.take_in_orphans()
        running = launch.start(self._wish(place), stdio=self._relay.theirs, heed=self._desk)
        begun = time.monotonic()
        self._facts.seconds["start"] = begun - began
        running.ending = lambda control: self._end(running, control, begun)
        try:
            started = jobs.Started(link=running.link, policy=running.policy)
            self._relay.begin(
                Meter(running.child, running.group, self._job.limits), running.pipes.usage, started
            )
            self._step("started")
            running.watch(pump=self._relay)
        except launch.Undead as undead:  # the ending was not called; it ran, and something may still
            self._facts.outcome = running.outcome or launch.Outcome(FAILED)
            self._facts.why = str(undead)
            raise
        finally:
            running.destroy()

    def _wish(self, place: str) -> launch.Wish:
        job, limits = self._job, self._job.limits
        return launch.Wish(
            workspace=job.workspace,
            command=job.command,
            bind_ro=job.bind_ro,
            environment=job.environment,
            run_dir=job.run_dir,
            projected=place,
            tools=_TOOLS if os.path.isdir(_TOOLS) else None,
            wall=limits.wall,
            cpu=limits.cpu,
            memory=limits.memory,
            processes=limits.processes,
            file_size=limits.file_size,
            descriptors=_descriptors(),
            quota=limits.egress,
            connections=limits.connections,
            closed=job.network == "none",
            usage=True,
            preflight=preflight.command(job.run_dir) if job.preflight else (),
            admitted=self._admitted,
        )

    def _admitted(self, control: Control, lease: messages.Lease) -> None:
        """Who asked, what was decided, which files: on record before the command exists."""
        self._step("leased")
        made, job = self._facts.manifest, self._job
        assert made is not None
        asked: dict[str, Fact] = {
            "request": job.id,
            "asker": job.asker,
            "email": job.email,
            "issuer": job.asker.split(":")[1] if job.asker.count(":") > 1 else "",
            "clearance": job.clearance,
            "candidates": len(job.copies) + job.discarded,
            "discarded": job.discarded,
            "generation": job.generation,
        }
        decided: dict[str, Fact] = {  # and no more: this stands in the receipt
            "request": job.id,
            "role": job.role,
            "action": job.action,
            "cleared": len(job.copies),
            "manifest": made.digest,
            "octets": made.octets,
            "network": job.network,
        }
        control.testify("request-asked", asked)
        control.testify("request-decided", decided)
        for fields in file_records(job):
            control.testify("request-files", fields)
        self._step("recorded")

    # ---- 5

    def _end(self, running: launch.Running, control: Control, begun: float) -> None:
        """All its processes are dead, the lease is still there. Nothing here waits for the service."""
        facts = self._facts
        facts.seconds["run"] = time.monotonic() - begun
        facts.outcome = running.outcome or launch.Outcome(FAILED, "it was ended by a failure of the runner")
        self._step("dead")
        self._relay.drain()
        self._measure(running)
        self._destroy_copies()
        self._read_counters(running, control)
        with contextlib.suppress(EgressdError, OSError):
            self._testify_end(control, running)
        self._step("recorded the end")

    def _read_counters(self, running: launch.Running, control: Control) -> None:
        facts = self._facts
        try:
            spent = _over_lease(control.spent, running)
        except (EgressdError, OSError) as error:
            self._log(f"what its link counted is not known: {error}")
            if facts.outcome is not None and not facts.outcome.why:  # or that says it
                facts.unknown = f"what its link counted is not known: {error}"
            return
        facts.counters = spent.counters
        facts.hit |= named(spent.spent)

    def _measure(self, running: launch.Running) -> None:
        facts, meter = self._facts, self._relay.meter
        assert facts.outcome is not None
        assert meter is not None
        if running.used is not None:
            meter.cpu = max(meter.cpu, running.used.ru_utime + running.used.ru_stime)
            facts.max_rss = running.used.ru_maxrss << 10  # KiB, getrusage(2)
        facts.hit |= self._relay.hit
        try:
            if running.group is not None:
                meter.look()
            facts.hit |= meter.reached()
        except Refused as refused:  # it has ended: nothing is left to be held
            self._log(str(refused))
        facts.cpu = meter.cpu
        facts.hit |= {"wall"} if facts.outcome.timed_out else set()
        for number, name in ((signal.SIGXCPU, "cpu"), (signal.SIGXFSZ, "file_size")):
            if facts.outcome.status == 128 + number and getattr(self._job.limits, name) is not None:
                facts.hit.add(name)

    def _testify_end(self, control: Control, running: launch.Running | None = None) -> None:
        """Once. `running`: over the lease, which is asked for again if need be."""
        told = self._finished()
        fields: dict[str, Fact] = {
            "request": self._job.id,
            "status": told.status,
            "why": self._why(),
            "hit": ",".join(told.hit),
            "destroyed": told.destroyed,
            "files": 0 if self._facts.manifest is None else self._facts.manifest.files,
            "seconds": round(sum(told.seconds.values()), 6),
            "tokens": told.tokens,
            "cost": told.cost,
        }
        try:
            if running is None:
                control.testify(_ENDED, fields)
            else:
                _testify_over_lease(control, running, fields)
        except Gone as gone:
            if not gone.unread:
                self._doubt(gone)
            raise
        self._recorded = True

    def _doubt(self, gone: Gone) -> None:
        """Told a second time over no lease, it might stand there twice."""
        self._recorded = None
        self._facts.unknown = f"whether its end is on record is not known: {gone}"
        self._log(self._facts.unknown)

    def _record_without_lease(self) -> None:
        """Over a connection of its own. A daemon that is gone records nothing; then the answer says so."""
        try:
            with Control(self._job.run_dir) as control:
                control.enter(self._job.workspace)
                if self._facts.outcome is not None:
                    self._testify_end(control)
                else:
                    control.testify("request-refused", self._refusal())
        except (EgressdError, OSError) as error:
            if self._recorded is None:
                return
            missing = f"this is not on record: {error}"
            self._facts.why = "; ".join(filter(None, (self._facts.why, missing)))

    def _refusal(self) -> dict[str, Fact]:
        job = self._job
        return {
            "request": job.id,
            "asker": job.asker,
            "action": job.action,
            "text": self._facts.refused[:_TEXT],
            "code": self._facts.code,
        }

    def _why(self) -> str:
        ended = "" if self._facts.outcome is None else self._facts.outcome.why
        return "; ".join(filter(None, (ended, self._facts.why)))[:_TEXT]

    def _log(self, text: str) -> None:
        """To the service's log, which is our standard error."""
        with contextlib.suppress(OSError):
            print(f"request {self._job.id}: {printable(os.fsencode(text))}", file=sys.stderr, flush=True)

    def _finished(self) -> jobs.Finished:
        facts, usage = self._facts, self._relay.usage
        outcome = facts.outcome or launch.Outcome(FAILED)
        why = "; ".join(filter(None, (self._why(), facts.unknown)))
        return jobs.Finished(
            status=outcome.status,
            why=why[:_TEXT],
            hit=tuple(sorted(facts.hit)),
            refused=facts.refused[:_TEXT],
            destroyed=facts.destroyed and not facts.undead,
            counters=facts.counters,
            tokens=usage.tokens,
            cost=usage.cost,
            seconds={name: round(seconds, 6) for name, seconds in facts.seconds.items()},
            cpu=round(facts.cpu, 6),
            max_rss=facts.max_rss,
        )


def _testify_over_lease(control: Control, running: launch.Running, fields: dict[str, Fact]) -> None:
    """`Gone` where egressd was told, and does not come back to say whether it has recorded it."""
    heard: Gone | None = None  # the first time that it may have read it
    while True:
        try:
            control.testify(_ENDED, fields)
        except Gone as gone:
            heard = heard or (None if gone.unread else gone)
            if not running.regain(within=RESUME_WITHIN):
                raise heard or gone from None
        except Refused as refused:
            if heard is None or _ONCE not in str(refused):
                raise heard or refused from None
            return
        else:
            return


def _over_lease(ask: Callable[[], A], running: launch.Running) -> A:
    """What is only read may be asked again, when egressd is back."""
    while True:
        try:
            return ask()
        except Gone:
            if not running.regain(within=RESUME_WITHIN):
                raise


def _descriptors() -> int:
    """Half of what this account's own processes may have open. Descriptors on their way over Unix sockets are
    counted for the account as a whole, against the limit of who sends the next (ETOOMANYREFS, unix(7)): with
    the same limit, one command that never receives what it sends has every other request refused."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def _scratch_of(job: jobs.Job) -> PrivateScratch | DirectoryScratch:
    if job.scratch != "private":
        return DirectoryScratch(job.scratch, job.id, encrypted=job.scratch_encrypted)
    inodes = projection.room(job.copies).inodes
    return PrivateScratch(size=job.scratch_size, inodes=inodes, at=_place())


def _check_places(job: jobs.Job) -> None:
    """What a sandbox sees without being shown it must hold no source, and no other request's copies."""
    places = {os.fsdecode(copy.root) for copy in job.copies}
    for place in sorted(places | ({job.scratch} if job.scratch != "private" else set())):
        where = seen_anyway(place, bind_ro=job.bind_ro)
        if where is not None:
            text = f"{place} is seen by every command, because of {where}: move one of them"
            raise Refused(Reason.FILES, text)


def _place() -> str:
    for path in _PLACES:
        with contextlib.suppress(OSError):
            if not os.path.islink(path) and not os.path.ismount(path) and not os.listdir(path):
                return path
    raise Refused(
        Reason.UNAVAILABLE,
        f"there is no empty directory to mount a scratch on: make {_PLACES[1]} (chmod 0711)",
    )


def file_records(job: jobs.Job) -> Iterator[dict[str, Fact]]:
    """The fields of each `request-files`: as many lines as fit a field, at least one record."""
    parts: list[str] = [""]
    for copy in job.copies:
        line = f"{copy.id} {copy.digest}\n"
        if len(parts[-1]) + len(line) > _TEXT:
            parts.append("")
        parts[-1] += line
    for number, files in enumerate(parts, 1):
        yield {"request": job.id, "part": number, "parts": len(parts), "files": files.rstrip("\n")}
