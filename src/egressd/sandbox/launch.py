"""Running a command in a sandbox: start, watch, end.

The order is the safety, and every step that does not happen means the command never runs:

1. `Enter`: the daemon says on what terms, or refuses;
2. the plumber is forked, who buries the sandbox if this process dies before step 6 (see plumb.py);
   bubblewrap starts; its command is the gate (see plan.py), which waits for "go";
3. as soon as bubblewrap names its child, that child's network namespace goes to the daemon (`Attach`), while
   bubblewrap still mounts;
4. the plumber enters the namespace meanwhile, and lays the addresses once the `Lease` is there;
5. the gate says that it waits, and bubblewrap's first process inside is at rest: now the death of any of
   them is the death of all;
6. "go". Only now does the command exist.

Whoever asks for it (`Wish.admitted`) is called between 3 and 6, when the lease is there: what must be on
record before the command exists is put there then.

While it runs, the connection to the daemon is the lease: what the daemon says there (`Revoked`) is the
sandbox's end. If the connection breaks off without a word, the daemon was restarted, or has crashed. The
sandbox goes on then, with what the kernel admits meanwhile, and the lease is asked for again by the network
namespace (`Control.resume`): by who watches, beside all else. If it does not come back, that is the end.
The other way round, this process dying closes the connection, and takes bubblewrap along (--die-with-parent).

A run ends when the command ends; what it left behind in its process namespace is killed, and this is waited
for before the lease is given back, so that no packet is sent over a link that is somebody else's problem.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH123, PTH208
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from egressd.ipc import messages
from egressd.model.errors import EgressdError, Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import files, limits, plan, plumb, seccomp
from egressd.sandbox.attempts import Reports
from egressd.sandbox.control import DEFAULT_RUN_DIR, Control, Gone, Resumption
from egressd.sandbox.pump import Pump
from egressd.sandbox.signals import ENDING, Arrived, SignalDesk

if TYPE_CHECKING:
    import resource
    import subprocess

__all__ = [
    "Enough", "Heeded", "Interrupted", "Mover", "Outcome", "Running", "Sandbox", "Undead", "Wish", "start",
    "take_in_orphans",
]  # fmt: skip

TIMED_OUT = 124  # as timeout(1)
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_BWRAP = ("/usr/bin/bwrap", "/usr/local/bin/bwrap", "/bin/bwrap")
_PATIENCE = 30.0  # seconds for each thing that is waited for while starting
_GONE = 10.0  # seconds after which processes that survive SIGKILL are reported
_FAREWELL = 1.0  # seconds for which a command's end waits for a daemon that is away


N = TypeVar("N", int, float)


class Interrupted(EgressdError):
    """A signal came before the command was started; nothing ran."""

    def __init__(self, number: signal.Signals) -> None:
        self.signal = number
        super().__init__(f"ended by {number.name} before the command was started")


class Undead(Refused):
    """Something of a sandbox survives SIGKILL: it waits in the kernel, for a disk perhaps."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be run, and how it is to be seen. Checked before anything starts."""

    workspace: str
    command: tuple[str, ...]
    files: str | None = None
    bind_ro: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    run_dir: str = DEFAULT_RUN_DIR
    wall: float | None = None  # seconds; the workspace's own limit holds as well
    terminal: bool = False
    # Shown at /work as it is, where `files` is looked through first. Only for a directory that the caller
    # has just made, of regular files and where nobody else writes: nothing is checked.
    projected: str | None = None
    tools: str | None = None  # a directory of this program's own, shown at /opt/egressd
    cpu: float | None = None  # seconds; see limits.py for what of this is per process
    memory: int | None = None  # bytes; the workspace's own limit holds as well, and the one below
    processes: int | None = None
    file_size: int | None = None  # bytes
    descriptors: int | None = None  # of each process
    quota: int | None = None  # bytes over the link, held by the kernel
    connections: int | None = None  # opened over the link, held by the kernel
    closed: bool = False  # nothing is admitted over the link
    usage: bool = False  # the command has a pipe to us, see `Running.usage`
    preflight: tuple[
        str, ...
    ] = ()  # a command that must succeed in the sandbox first (selftest/preflight.py)
    admitted: Callable[[Control, messages.Lease], None] | None = None  # raising ends it with nothing run

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("there is no command to run")
        if self.files is not None and self.projected is not None:
            raise ValueError("there is one /work: files or projected")
        if any("\0" in word for word in self.command):
            raise ValueError("a command cannot hold a NUL")
        plan.environment(extra=self.environment)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `why` is empty when the command ended by itself."""

    status: int  # the command's, or 128 + signal, 124 (time), 125 (egressd)
    why: str = ""
    timed_out: bool = False


class Enough(Exception):
    """Raised by who moves a sandbox's input and output: it is to end now, and this is how it ended."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        super().__init__(outcome.why)


class Mover(Protocol):
    """Who moves a sandbox's input and output in the launcher's own poll (see pump.py)."""

    @property
    def pause(self) -> float | None:
        """Seconds after which `move` is called though nothing is ready; None: never."""

    def register(self, poll: select.poll) -> None: ...

    def move(self, ready: set[int], poll: select.poll) -> None:
        """`Enough` ends the sandbox."""

    def drain(self) -> None:
        """After its end."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything known before the first process is started; what --dry-run shows."""

    plan: plan.Plan
    bounds: limits.Bounds
    services: tuple[plumb.Service, ...]
    wall: float | None
    known: tuple[str, ...] | None  # networks, see messages.Terms


def prepare(wish: Wish, terms: messages.Terms, *, default_signals: tuple[str, ...] = ()) -> Prepared:
    """Check the caller's directories, and decide what the sandbox will be. `Refused` where it cannot."""
    ollama = next((s.port for s in terms.services if s.service == "ollama"), None)
    binds = files.open_binds(wish.bind_ro, run_dir=wish.run_dir)
    shown = None if wish.files is None else files.open_files(wish.files, run_dir=wish.run_dir)
    terminal = os.environ.get("TERM") if wish.terminal else None
    wanted = _wanted(wish, terms)
    bounds = limits.bound(wanted)
    spec = plan.SandboxSpec(
        command=wish.command,
        files=shown if wish.projected is None else wish.projected,
        tools=wish.tools,
        binds=binds,
        environment=plan.environment(terminal=terminal, ollama_port=ollama, usage=wish.usage),
        unseen=wish.environment,
        terminal=wish.terminal,
        default_signals=default_signals,
        limits=bounds.rlimits,
        shared_memory=wanted.memory,
        preflight=wish.preflight,
    )
    return Prepared(
        plan=plan.plan(spec, files.machine()),
        bounds=bounds,
        services=tuple(plumb.Service(s.port, s.address4, s.address6) for s in terms.services),
        wall=_lower(wish.wall, terms.wall),
        known=terms.known,
    )


def _wanted(wish: Wish, terms: messages.Terms) -> limits.Wanted:
    return limits.Wanted(
        memory=_lower(wish.memory, terms.memory),
        processes=_lower(wish.processes, terms.processes),
        cpu=wish.cpu,
        file_size=wish.file_size,
        descriptors=wish.descriptors,
    )


def _lower(one: N | None, other: N | None) -> N | None:
    """Of two limits the one that holds; None is none."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


# --------------------------------------------------------------------------------------------------
# starting


def start(
    wish: Wish,
    *,
    stdio: Sequence[int] = (0, 1, 2),
    desk: SignalDesk | None = None,
    heed: Heeded | None = None,
    say: Callable[[str], None] | None = None,
) -> Running:
    """Steps 1 to 6. Returns with the command running, or raises with nothing left of the attempt:
    `Refused`, `KernelError`, `ProtocolError`, `Interrupted`. `say` is told what is done (--debug)."""
    tell = say or (lambda _: None)
    with contextlib.ExitStack() as undo:
        control = undo.enter_context(Control(wish.run_dir))
        terms = control.enter(wish.workspace)
        tell(f"workspace {terms.workspace}, guard {terms.guard}, policy {terms.policy}")
        prepared = prepare(wish, terms, default_signals=desk.to_restore if desk else ())
        group = prepared.bounds.group
        if group is not None:
            undo.enter_context(group)
        pipes = undo.enter_context(Pipes(usage=wish.usage))
        plumber = undo.enter_context(plumb.Plumber(gate=pipes.theirs[plan.GATE], close=pipes.others(control)))
        running = _spawn(prepared, pipes, stdio=stdio, desk=desk, control=control)
        undo.callback(running.destroy)
        running.policy, running.say = terms.policy, tell
        tell(f"limits: {prepared.bounds.text}")
        tell(plan.describe(prepared.plan).partition("\n")[0])
        if desk is not None:
            take_in_orphans()
        _admit(running, prepared, plumber, desk=desk, heed=heed, wish=wish)
        tell(f"gate opened; bubblewrap is process {running.pid}, the sandbox's first is {running.child}")
        if plumber.trouble:
            tell(plumber.trouble)
        running.keep(undo.pop_all(), wall=prepared.wall, group=group)
        return running


def named(command: Sequence[str]) -> str:
    """What the record calls a command: its program, and a digest of all its words. The words themselves may
    hold prompts and keys, which are nobody's business but the caller's."""
    digest = hashlib.sha256("\0".join(command).encode(errors="surrogateescape")).hexdigest()
    return f"{command[0][:256]} (sha256:{digest})"


def digest(command: Sequence[str]) -> str:
    """SHA-256 of all words of a command, each ended by the NUL that none of them can hold."""
    data = b"".join(os.fsencode(word) + b"\0" for word in command)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def take_in_orphans() -> None:
    """bubblewrap ends before the sandbox's first process, without waiting for it; from then on that is a
    child of ours, and wait4(2) tells what all of the sandbox used. Only in a process of our own: in somebody
    else's, every orphan of theirs would come to us too, and nobody would wait for it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # it has been there since Linux 3.4


def _admit(
    running: Running,
    prepared: Prepared,
    plumber: plumb.Plumber,
    *,
    desk: SignalDesk | None,
    heed: Heeded | None,
    wish: Wish,
) -> None:
    """Steps 3 to 6."""
    control = running.control
    _wait_for(running.pipes.status, desk, heed)
    namespace = running.open_namespace()
    control.attach(
        namespace,
        command=named(wish.command),
        digest=digest(wish.command),
        quota=wish.quota,
        connections=wish.connections,
        closed=wish.closed,
    )
    plumber.enter(
        namespace,
        child=running.child_descriptor,
        first=running.child,
        services=prepared.services,
        known=prepared.known,
    )
    _adopt(prepared.bounds.group, running)
    _wait_for(control.fileno(), desk, heed)
    lease = control.lease()
    running.link = lease.link
    plumber.lay(plumb.Address(lease.address4, lease.address6))
    if wish.admitted is not None:
        wish.admitted(control, lease)
    _wait_for(running.pipes.ready, desk, heed)
    running.at_rest()
    running.open_gate()
    running.reports = plumber.release()


def _adopt(group: limits.Group | None, running: Running) -> None:
    """The gate may exist already or not yet: after its parent was moved, either way it is found."""
    if group is not None:
        for pid in (running.pid, running.child, *_children(running.child)):
            group.adopt(pid)


class Heeded(Protocol):
    """Somebody who may call a start off. `heed` is called when its descriptor is readable, and raises."""

    def fileno(self) -> int: ...

    def heed(self) -> None: ...


def _wait_for(number: int, desk: SignalDesk | None, heed: Heeded | None) -> None:
    """Wait until there is something to read, but not deaf to Ctrl-C."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    for source in (desk, heed):
        if source is not None:
            poll.register(source, select.POLLIN)
    while True:
        ready = [found for found, _ in poll.poll(_PATIENCE * 1000)]
        if desk is not None:
            _refuse_if_ending(desk)
        if heed is not None and heed.fileno() in ready:
            heed.heed()
        if number in ready or not ready:
            return  # too late is found out by who reads


def _refuse_if_ending(desk: SignalDesk) -> None:
    for arrived in desk.read():
        if arrived.signal in ENDING:
            raise Interrupted(arrived.signal)


class Pipes:
    """The pipes to a sandbox being built. Leaving the block closes what is still open."""

    def __init__(self, *, usage: bool = False) -> None:
        self.status, status = os.pipe2(os.O_CLOEXEC)  # bubblewrap's reports
        self.ready, ready = os.pipe2(os.O_CLOEXEC)  # the gate's word that it waits
        gate, self.gate = os.pipe2(os.O_CLOEXEC)  # our "go"
        self.theirs = {plan.STATUS: status, plan.READY: ready, plan.GATE: gate}
        self.usage = -1  # what the command reports
        if usage:
            self.usage, self.theirs[plan.USAGE] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.usage, False)

    def others(self, control: Control) -> tuple[int, ...]:
        """All but the gate's reading end: what the plumber must not hold. Ours, because nobody else may, the
        connection that is the lease among it; and theirs, or the end of who has them would not be seen."""
        ours = (self.gate, self.status, self.ready, self.usage, control.fileno())
        theirs = (number for place, number in self.theirs.items() if place != plan.GATE)
        return tuple(number for number in (*ours, *theirs) if number >= 0)

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close_theirs()
        for number in (self.status, self.ready, self.gate, self.usage):
            if number >= 0:
                os.close(number)
        self.status = self.ready = self.gate = self.usage = -1

    def close_theirs(self) -> None:
        while self.theirs:
            os.close(self.theirs.popitem()[1])

    def close_gate(self) -> None:
        os.close(self.gate)
        self.gate = -1


def _spawn(
    prepared: Prepared, pipes: Pipes, *, stdio: Sequence[int], desk: SignalDesk | None, control: Control
) -> Running:
    """Start bubblewrap with exactly its descriptors: 0, 1, 2, the gate's, the filter, the texts."""
    with contextlib.ExitStack() as temporary:
        places = dict(enumerate(stdio)) | pipes.theirs
        places[plan.SECCOMP] = _temporary(temporary, seccomp.program_descriptor())
        for number, text in prepared.plan.data:
            places[number] = _temporary(temporary, _memory_file(text))
        pid = _posix_spawn(prepared.plan.arguments, places, desk=desk, temporary=temporary)
    pipes.close_theirs()
    return Running(pid=pid, pipes=pipes, control=control)


def _temporary(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _memory_file(text: str) -> int:
    descriptor = os.memfd_create("egressd-text")
    os.write(descriptor, os.fsencode(text))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _posix_spawn(
    arguments: Sequence[str],
    places: Mapping[int, int],
    *,
    desk: SignalDesk | None,
    temporary: contextlib.ExitStack,
) -> int:
    """posix_spawn(3), which unlike subprocess can choose numbers, and like it does not copy our memory.

    Descriptors of ours are close-on-exec (PEP 446); what we inherited ourselves may not be, and is closed.
    """
    actions: list[tuple[int, ...]] = [
        (os.POSIX_SPAWN_CLOSE, number) for number in _inheritable() if number > 2 and number not in places
    ]
    lifted = {place: _lift(number, temporary) for place, number in places.items()}
    actions += [(os.POSIX_SPAWN_DUP2, number, place) for place, number in lifted.items()]
    options: dict[str, Any] = {"setsigdef": [signal.SIGPIPE, signal.SIGXFSZ]}
    if desk is not None:
        options = {"setsigdef": desk.defaults, "setsigmask": desk.mask}
        if not desk.terminal:
            options["setpgroup"] = 0  # out of reach of signals to our group; we forward them
    bwrap = next((path for path in _BWRAP if os.access(path, os.X_OK)), None)
    if bwrap is None:
        raise Refused(Reason.UNAVAILABLE, "bubblewrap is not installed (apt install bubblewrap)")
    return os.posix_spawn(bwrap, list(arguments), {"PATH": plan.PATH}, file_actions=actions, **options)


def _inheritable() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor
            if os.get_inheritable(int(name)):
                yield int(name)


def _lift(number: int, temporary: contextlib.ExitStack) -> int:
    """A duplicate out of the way of the places; /dev/null for a standard descriptor that is closed."""
    try:
        lifted = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, plan.ABOVE)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        lifted = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, plan.ABOVE)
        os.close(null)
    return _temporary(temporary, lifted)


def _state(pid: int) -> str:
    """The letter of proc(5)'s stat, after the name in parentheses; "X" for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _children(pid: int) -> list[int]:
    """Direct children (CONFIG_PROC_CHILDREN)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            return [int(word) for word in stream.read().split()]
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------
# running


class Running:
    """bubblewrap and what it holds. `watch` returns when it is over; `destroy` ends it at once."""

    def __init__(self, *, pid: int, pipes: Pipes, control: Control) -> None:
        self.link = 0  # the number of its link, once it is admitted
        self.policy = ""  # digest, of the terms it was admitted on
        self.say: Callable[[str], None] = lambda _: None
        self.pid, self.pipes, self.control = pid, pipes, control
        self.child = 0  # first process in the sandbox, our pid for it
        self.child_descriptor = -1  # and a pidfd of it
        self.namespace = -1  # its network, kept: by that the lease is known to a daemon that was restarted
        self._reported = b""
        self._descriptor = os.pidfd_open(pid)
        self._exit: int | None = None  # wait status, once reaped
        self.outcome: Outcome | None = None  # once `watch` knows
        self.reports: Reports | None = None  # of what is tried inside
        self.group: limits.Group | None = None
        self.ending: Callable[[Control], None] | None = None  # called when all is dead, before the lease goes
        self.used: resource.struct_rusage | None = None  # once it is over, where that is known
        self._resuming: Resumption | None = None  # while the daemon is away
        self._lost = False  # the lease is over, for certain
        self._destroyed = False
        self._undo = contextlib.ExitStack()
        self._deadline: float | None = None
        self._wall: float | None = None

    def keep(
        self, undo: contextlib.ExitStack, *, wall: float | None, group: limits.Group | None = None
    ) -> None:
        """From here on this object owns the connection and the group."""
        self._undo, self.group = undo, group
        if wall is not None:
            self._wall, self._deadline = wall, time.monotonic() + wall

    # ---- while starting

    def open_namespace(self) -> int:
        """The network namespace of the sandbox's first process, as bubblewrap itself reported it.

        That process is bubblewrap's child, not ours, so its number could in principle be another's by
        now: the inode bubblewrap named is compared with the one opened.
        """
        facts = self._first_report()
        try:
            self.child = int(facts["child-pid"])
            self.child_descriptor = os.pidfd_open(self.child)
            namespace = os.open(f"/proc/{self.child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except (KeyError, ProcessLookupError, FileNotFoundError) as error:
            raise self._not_built() from error
        except PermissionError as error:
            text = "the sandbox's namespace cannot be opened: is bwrap installed setuid root?"
            raise Refused(Reason.NAMESPACE, text) from error
        if os.fstat(namespace).st_ino != facts.get("net-namespace"):
            os.close(namespace)
            raise Refused(Reason.NAMESPACE, "the sandbox's namespace is not the one bubblewrap made")
        self.namespace = namespace
        return namespace

    def _first_report(self) -> dict[str, Any]:
        while b"\n" not in self._reported:
            data = os.read(self.pipes.status, 4096)
            if not data:
                raise self._not_built()
            self._reported += data
        facts: dict[str, Any] = msgspec.json.decode(self._reported.split(b"\n")[0])
        return facts

    def _not_built(self) -> Refused:
        return Refused(Reason.UNAVAILABLE, "bubblewrap could not build the sandbox; its own message says why")

    def at_rest(self) -> None:
        """Wait until the gate waits, and its parent, the sandbox's first process, waits for it.

        That parent sets its death signal after it has forked the gate and before it waits. If bubblewrap's
        outer process was gone by then, the signal would never come: so this is looked at last.
        """
        os.set_blocking(self.pipes.ready, False)
        try:
            word = os.read(self.pipes.ready, 1)
        except BlockingIOError:
            text = f"bubblewrap did not build the sandbox within {_PATIENCE:g} s"
            raise Refused(Reason.UNAVAILABLE, text) from None
        end = time.monotonic() + _PATIENCE
        while not word or (state := _state(self.child)) != "S":
            if not word or state in ("X", "Z") or time.monotonic() > end:
                raise self._not_built()
            time.sleep(0.0002)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if poll.poll(0):
            raise self._not_built()

    def open_gate(self) -> None:
        try:
            os.write(self.pipes.gate, b"go\n")
        except BrokenPipeError:
            raise self._not_built() from None
        finally:
            self.pipes.close_gate()

    # ---- while it runs

    def watch(
        self, *, desk: SignalDesk | None = None, pump: Mover | None = None, timeout: float | None = None
    ) -> Outcome:
        """Wait for the end, whoever brings it; nothing is left of the sandbox afterwards."""
        deadline = self._deadline
        if timeout is not None:
            deadline = min(deadline or float("inf"), time.monotonic() + timeout)
        try:
            self.outcome = outcome = self._loop(desk, pump, deadline)
        except Enough as enough:
            self.outcome = outcome = enough.outcome
        finally:
            self.destroy()
        if pump is not None:
            pump.drain()
        return outcome

    def _loop(self, desk: SignalDesk | None, pump: Mover | None, deadline: float | None) -> Outcome:
        poll = select.poll()
        for source in (self._descriptor, self.control, desk, self.reports):
            if source is not None:
                poll.register(source, select.POLLIN)
        if pump is not None:
            pump.register(poll)
        while True:
            if deadline is not None and deadline <= time.monotonic():
                return self._out_of_time()
            left = self._pause(deadline, pump)
            ready = {number for number, _ in poll.poll(None if left is None else left * 1000 + 1)}
            if self.reports is not None and self.reports.fileno() in ready:
                self._pass_on(self.reports, poll)
            if self._descriptor in ready:
                return self._ended()
            if why := self._keep_lease(ready, poll):
                return Outcome(plan.FAILED, why)
            if desk is not None and desk.fileno() in ready:
                for arrived in desk.read():
                    self._forward(arrived, terminal=desk.terminal)
            if pump is not None:
                pump.move(ready, poll)

    def _pause(self, deadline: float | None, pump: Mover | None) -> float | None:
        """Seconds until something has to be done though nothing is ready."""
        pauses = [
            None if deadline is None else max(0.0, deadline - time.monotonic()),
            None if pump is None else pump.pause,
            None if self._resuming is None else self._resuming.pause,
        ]
        return min((pause for pause in pauses if pause is not None), default=None)

    # ---- the lease

    def _keep_lease(self, ready: set[int], poll: select.poll) -> str:
        """Why it is over, if it is. Asks for it again, a step at a time, while the daemon is away."""
        try:
            if self._resuming is None:
                return self._heard(poll) if self.control.fileno() in ready else ""
            if self._resuming.step(ready, poll):
                self._resumed(self._resuming)
        except Refused as refused:
            self._lost = True
            return str(refused)
        return ""

    def _heard(self, poll: select.poll) -> str:
        """What the daemon says unasked is why it is over. If it is gone, it may come back."""
        number = self.control.fileno()
        try:
            why = self.control.ended()
        except Gone:
            poll.unregister(number)
            self._away()
            return ""
        self._lost = True
        return why

    def _away(self) -> Resumption:
        self.say("egressd is gone: the sandbox goes on, and asks for its lease again")
        self._resuming = self.control.resume(self.namespace, self.link)
        return self._resuming

    def _resumed(self, resuming: Resumption) -> None:
        self._resuming = None
        self.say(f"egressd is there again, after {time.monotonic() - resuming.began:.3f} s")

    def regain(self, *, within: float) -> bool:
        """Once the connection is found to have ended: wait so many seconds for the lease to be ours again.
        For when all is dead, since nothing else is looked after meanwhile."""
        if self._resuming is None and not isinstance(self.control.last_word(), Gone):
            self._lost = True
        if self._lost:
            return False
        resuming, poll, ready = self._resuming or self._away(), select.poll(), set[int]()
        resuming.register(poll)
        end = time.monotonic() + within
        try:
            while not resuming.step(ready, poll):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                ready = {number for number, _ in poll.poll(min(left, resuming.pause) * 1000 + 1)}
        except Refused:
            self._lost = True
            return False
        self._resumed(resuming)
        return True

    def _pass_on(self, reports: Reports, poll: select.poll) -> None:
        try:
            for attempt in reports.read():
                self.control.tell(attempt)
        except EOFError:
            poll.unregister(reports)
            self._dismiss()

    def _hear_the_rest(self) -> None:
        if self.reports is not None:
            for attempt in self.reports.finish():
                self.control.tell(attempt)

    def _dismiss(self) -> None:
        """The process that looked has its memory to give back: it is waited for late."""
        if self.reports is not None:
            self.reports.close()
            self.reports = None

    def _out_of_time(self) -> Outcome:
        text = "out of time" if self._wall is None else f"the wall limit of {self._wall:g} s is reached"
        return Outcome(TIMED_OUT, text, timed_out=True)

    def _ended(self) -> Outcome:
        """bubblewrap has ended: by itself with the command's status, or else something went wrong."""
        self._reap()
        assert self._exit is not None
        if os.WIFSIGNALED(self._exit):
            number = os.WTERMSIG(self._exit)
            return Outcome(128 + number, f"bubblewrap was ended by signal {number}")
        if not self._command_ran():
            return Outcome(plan.FAILED, str(self._not_built()))
        return Outcome(os.WEXITSTATUS(self._exit))

    def _command_ran(self) -> bool:
        """bubblewrap reports an exit code only when set-up was finished."""
        os.set_blocking(self.pipes.status, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipes.status, 4096):
                self._reported += data
        return b'"exit-code"' in self._reported

    def _forward(self, arrived: Arrived, *, terminal: bool) -> None:
        """On a terminal the kernel's own signals have reached the command already."""
        if not (terminal and arrived.from_kernel):
            number = arrived.signal
            if number == signal.SIGTSTP and not terminal and not self._handles(number):
                number = signal.SIGSTOP  # TSTP does not stop a group without a parent in its session
            self._send(number)
        if arrived.signal == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)  # seen to be stopped by who waits for us

    def _command(self) -> int | None:
        """The command's pid. It was the gate's, the second process of its pid namespace."""
        for pid in _children(self.child):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status", errors="replace") as stream:
                if any(line.startswith("NSpid:") and line.split()[-1] == "2" for line in stream):
                    return pid
        return None

    def _send(self, number: signal.Signals) -> None:
        command = self._command()
        if command is None:
            return
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(command)
            try:
                signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def _handles(self, number: signal.Signals) -> bool:
        """Whether the command catches or ignores the signal (proc(5), SigCgt and SigIgn)."""
        command = self._command()
        with contextlib.suppress(OSError), open(f"/proc/{command}/status", errors="replace") as stream:
            masks = [int(line.split()[1], 16) for line in stream if line.startswith(("SigCgt", "SigIgn"))]
            return any(mask >> (number - 1) & 1 for mask in masks)
        return False

    # ---- ending

    def _reap(self) -> None:
        if self._exit is None:
            _, self._exit = os.waitpid(self.pid, 0)

    def destroy(self) -> None:
        """Kill whatever is left, wait until it is gone, give the lease back. Safe to call twice."""
        if self._destroyed:
            return
        self._destroyed = True
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # ours and not reaped: the number is still its own
        self._hear_the_rest()
        with self._undo:
            try:
                self._kill_child()
                self._reap()
                self.used = self._used()
                if self.ending is not None:
                    self.ending(self.control)
                self._tell_the_end()
                self._dismiss()
            finally:
                self._let_go()

    def _let_go(self) -> None:
        if self._resuming is not None:
            self._resuming.close()
        for descriptor in (self._descriptor, self.child_descriptor, self.namespace):
            if descriptor >= 0:
                os.close(descriptor)

    def _tell_the_end(self) -> None:
        """Our last word over the connection, which ends with the lease; recorded as what we say.

        A daemon that is away at this moment is waited for, but not for long: who waits for the command's end
        should not wait for egressd's. Then the record has no exit status, and says that the lease was not
        resumed.
        """
        if self.outcome is None:
            return
        used = self.used
        word = messages.Ended(
            status=self.outcome.status,
            why=self.outcome.why[:256],
            user_seconds=used.ru_utime if used else 0.0,
            system_seconds=used.ru_stime if used else 0.0,
            max_rss=used.ru_maxrss << 10 if used else 0,
        )
        if not self.control.tell(word) and self.regain(within=_FAREWELL):
            self.control.tell(word)

    def _used(self) -> resource.struct_rusage | None:
        """By the sandbox's first process and everything that was waited for in there; None where that process
        is not ours to wait for. What was killed at the end is not counted (getrusage(2))."""
        if self.child_descriptor < 0:
            return None
        try:
            os.waitid(os.P_PIDFD, self.child_descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return os.wait4(self.child, 0)[2]  # dead, and ours to reap: the number is still its own
        except ChildProcessError:
            return None

    def _kill_child(self) -> None:
        """The first process of a pid namespace ends only after all others in it have."""
        if self.child_descriptor < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.child_descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(self.child_descriptor, select.POLLIN)
        if not poll.poll(_GONE * 1000):
            raise Undead(Reason.UNAVAILABLE, f"process {self.child} of the sandbox does not die")


# --------------------------------------------------------------------------------------------------
# the Python interface


class Sandbox:
    """Runs commands in a workspace's sandboxes; each `run` has a sandbox of its own.

    >>> with egressd.Sandbox(workspace="acme", files="job/") as box:      # doctest: +SKIP
    ...     result = box.run(["python3", "infer.py"], capture_output=True, timeout=60)

    Entering the block asks the daemon whether the caller is a member, and looks through the directories, so
    that a mistake is found before there is work to lose. Raises `Refused` for every no.
    """

    def __init__(
        self,
        *,
        workspace: str,
        files: str | os.PathLike[str] | None = None,
        run_dir: str | os.PathLike[str] = DEFAULT_RUN_DIR,
        env: Mapping[str, str] | None = None,
        bind_ro: Sequence[str | os.PathLike[str]] = (),
        wall: float | None = None,
    ) -> None:
        self._wish = {
            "workspace": workspace,
            "files": None if files is None else os.fspath(files),
            "run_dir": os.fspath(run_dir),
            "environment": dict(env or {}),
            "bind_ro": tuple(os.fspath(path) for path in bind_ro),
            "wall": wall,
        }

    def __enter__(self) -> Sandbox:
        wish = Wish(command=("true",), **self._wish)  # type: ignore[arg-type]
        with Control(wish.run_dir) as control:
            control.enter(wish.workspace)
        files.open_binds(wish.bind_ro, run_dir=wish.run_dir)
        if wish.files is not None:
            files.open_files(wish.files, run_dir=wish.run_dir)
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to undo: a sandbox lives no longer than the `run` that made it."""

    def run(
        self,
        args: Sequence[str],
        *,
        input: bytes | str | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        text: bool = False,
        check: bool = False,
    ) -> subprocess.CompletedProcess[Any]:
        """As `subprocess.run`. A command ended by signal n has returncode 128 + n.

        `subprocess.TimeoutExpired` for `timeout` and for the workspace's wall limit; `Refused` when egressd
        refuses to start the sandbox, and when it ends it.
        """
        import subprocess  # noqa: PLC0415 - `egressctl run` does without

        if capture_output:
            stdout = stderr = subprocess.PIPE
        wish = Wish(command=tuple(map(str, args)), **self._wish)  # type: ignore[arg-type]
        with Pump(input=input, stdin=stdin, stdout=stdout, stderr=stderr, text=text) as pump:
            running = start(wish, stdio=pump.theirs)
            pump.close_theirs()
            began = time.monotonic()
            outcome = running.watch(pump=pump, timeout=timeout)
        if outcome.timed_out:
            spent = timeout if timeout is not None else time.monotonic() - began
            raise subprocess.TimeoutExpired(list(args), spent, output=pump.out, stderr=pump.err)
        if outcome.why:
            raise Refused(Reason.UNAVAILABLE, outcome.why)
        result = subprocess.CompletedProcess(list(args), outcome.status, pump.out, pump.err)
        if check:
            result.check_returncode()
        return result
