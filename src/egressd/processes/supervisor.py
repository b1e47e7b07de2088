"""egressd: starts the processes, each with its sockets open, and starts again what dies.

While still root it has `foundation` (a one-shot process, gone before the first stranger's byte arrives)
make and pin the gateway and open the sockets that live there. Then it gives up all but what cards.py
says and never regains it: NET_ADMIN stays permitted but not effective, to be handed to a warden it starts
again. It reads two messages, `Ready` and `Heartbeat`, and nothing from any stranger.

A network namespace belongs to a thread (setns(2)), so one thread of this process enters the gateway before
the rights are given up, and every warden is forked from that thread: no CAP_SYS_ADMIN is ever needed again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from egressd import __version__
from egressd.ipc import journald, messages, readiness
from egressd.ipc.channel import Channel, pair
from egressd.ipc.readiness import notify
from egressd.model.errors import EgressdError, KernelError, PolicyError, ProtocolError
from egressd.processes import isolation, manager, unrecorded
from egressd.processes.cards import CARDS, Capability, Card, Namespace
from egressd.processes.config import Account, Config
from egressd.processes.config_file import load
from egressd.processes.doors import open_doors
from egressd.processes.ritual import Auditing

__all__ = ["main"]

log = logging.getLogger("egressd")

# The order of starting: what denies and records before what grants and answers. Those of one wave at once.
WAVES = (("auditor", "warden"), ("relay", "inspector", "resolver", "controller"))
ORDER = tuple(name for wave in WAVES for name in wave)
# Started after them, and nobody waits for it: without it, approved traffic fails after a flush of the host's
# firewall. What was denied stays so.
LATER = ("custodian",)
# Started after them, each where this key of the configuration says where it answers. Nobody waits for them:
# whether egressd enforces does not hang on them. They have no channel to the others either; they ask at the
# control socket, as those who may read.
OPTIONAL = {"exporter": "metrics", "api": "api"}
# Who talks to whom: (asker, its name for the other, the other, its name for the asker).
RELATIONS = (
    ("controller", "warden", "warden", "controller"),
    ("controller", "resolver", "resolver", "controller"),
    ("controller", "relay", "relay", "controller"),
    ("controller", "inspector", "inspector", "controller"),
    ("controller", "evidence", "auditor", "evidence"),
    ("controller", "custodian", "custodian", "controller"),
    *((name, "audit", "auditor", f"audit-{name}") for name in ORDER if name != "auditor"),
)
# Sockets that live as long as the supervisor, so that a restarted process finds them open, queue and all.
HELD = {
    "auditor": ("nflog", "flows"),
    "warden": (),
    "relay": ("relay4", "relay6"),
    "inspector": ("inspect4", "inspect6"),
    "resolver": ("udp4", "udp6", "tcp4", "tcp6"),
    "controller": ("control",),
    "custodian": ("ended",),
    "exporter": ("metrics",),
    "api": ("api",),
}
_DOORS = frozenset({"control", "metrics", "api"})
_GATEWAYS = frozenset(role for roles in HELD.values() for role in roles) - _DOORS  # live in the gateway
HUNG_AFTER = 10.0  # seconds without a heartbeat
_STOPPED_AFTER = 5.0  # seconds between two looks at the others, where there should be one
_CREDENTIAL = "egressd-journal-key"  # journal_keys.CREDENTIAL, without what that imports
_CREDENTIAL_BYTES = (1 << 16) + 1  # fits the buffer of a socket; a key has a hundred
_STOP_WITHIN, _LEAVE_WITHIN = 5.0, 2.0  # seconds for one to end when asked
_LOCKS = Path("/run/egressd")  # the unit may write here and nowhere else in /run, whatever `run_dir` is
START_WITHIN = 30.0  # seconds for a process to say that it is ready
_CLONE_NEWNET = 0x4000_0000  # linux/sched.h


def order(config: Config) -> tuple[str, ...]:
    """The processes there are, in the order of starting."""
    return (*ORDER, *LATER, *(name for name, key in OPTIONAL.items() if getattr(config, key) is not None))


@dataclass(slots=True)
class Child:
    """One process, through all its lives."""

    card: Card
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    channel: Channel[messages.FROM_CHILD] | None = None
    ready: bool = False
    heard: float = 0.0  # monotonic seconds
    started: list[float] = field(default_factory=list)
    start_at: float = 0.0  # not before; monotonic seconds
    restarts: int = 0

    @property
    def state(self) -> messages.ProcessState:
        running = self.process is not None
        word = "running" if running and self.ready else "starting" if running else "down"
        pid = self.process.pid if self.process else 0
        return messages.ProcessState(name=self.card.name, pid=pid, state=word, restarts=self.restarts)  # type: ignore[arg-type]


class Supervisor:
    def __init__(
        self,
        config: Config,
        sockets: dict[str, socket.socket],
        laid: Foundation,
        *,
        credential: bytes | None = None,
    ) -> None:
        """`credential`: the auditor's signing key, where the system manager holds it."""
        self.config, self.sockets, self.credential = config, sockets, credential
        self.accounts = {"root": Account(os.getuid(), os.getgid()), **config.accounts()}
        self.children = {name: Child(CARDS[name]) for name in order(config)}
        self.selector = selectors.DefaultSelector()
        self.auditing = Auditing("supervisor")
        self.stopping = self.leaving = self.announced = False
        self._looked = time.monotonic()
        self._untold: deque[tuple[str, dict[str, str | int]]] = deque(maxlen=64)
        # what happened while nobody kept the journal
        self._unrecorded = deque(unrecorded.kept(Path(config.state_dir)))
        self._waiting: dict[tuple[str, str], socket.socket] = {}  # (process, role) -> its end
        self._gateway, self._tidying = _thread_in(laid.gateway), laid.process
        self._here = concurrent.futures.ThreadPoolExecutor(1)

    # ---- rights

    def give_up_rights(self) -> None:
        """Both threads: capabilities belong to a thread (capabilities(7))."""
        give_up = _Rights(CARDS["supervisor"])
        self._gateway.submit(give_up).result()
        give_up()

    # ---- running

    def run(self) -> None:
        self._watch_signals()
        for wave in WAVES:
            self._start_all([self.children[name] for name in wave])
        for name in (*LATER, *OPTIONAL):
            if name in self.children and not self.stopping:
                self.start(self.children[name])
        self._serve_until(lambda: self.stopping)
        if self.leaving:
            self._leave()
        else:
            self._stop()

    def _start_all(self, wave: Sequence[Child]) -> None:
        for child in wave:
            if not self.stopping:
                self.start(child)
        self._serve_until(lambda: self.stopping or all(child.ready for child in wave))

    def _serve_until(self, done: Callable[[], bool]) -> None:
        while not done():
            for key, _ in self.selector.select(timeout=1.0):
                key.data()
            self._forgive(time.monotonic())
            self._look_after()
            self._tell_unrecorded()
            self._tidying.poll()  # or it would stay as a zombie

    def _tell_unrecorded(self) -> None:
        """As many as the auditor has room for."""
        while self._unrecorded:
            event, fields = self._unrecorded[0].event, self._unrecorded[0].fields
            if not self.auditing.offer(messages.Event(process="supervisor", event=event, fields=fields)):
                return
            self._unrecorded.popleft()
            if not self._unrecorded:
                unrecorded.forget(Path(self.config.state_dir))

    def _look_after(self) -> None:
        now = time.monotonic()
        for child in self.children.values():
            if child.process is None and not self.stopping and child.started and now >= child.start_at:
                self.start(child)
            allowed = HUNG_AFTER if child.ready else START_WITHIN
            if child.process is not None and now - child.heard > allowed:
                log.error("%s (pid %d) hangs: killed", child.card.name, child.process.pid)
                self._record_end("process-hung", child, {"seconds": round(now - child.heard)})
                child.process.kill()
                child.heard = now
        if all(self.children[name].ready for name in ORDER):
            self._announce()

    def _forgive(self, now: float) -> None:
        """What stopped us, a machine that was suspended say, stopped them as well: nobody hangs for that."""
        gap, self._looked = now - self._looked, now
        if gap > _STOPPED_AFTER:
            for child in self.children.values():
                child.heard = min(now, child.heard + gap)

    def _announce(self) -> None:
        if not self.announced:
            self.announced = True
            log.info("enforcing; control socket %s", self.config.control_socket)
            print("ready", flush=True)
            notify("READY=1\nSTATUS=enforcing")
        notify("WATCHDOG=1")

    # ---- one child

    def start(self, child: Child) -> None:
        """Exec it with its sockets; tell its neighbours where to reach it."""
        name = child.card.name
        now = time.monotonic()
        mine, its = pair()
        ends = {"supervisor": its, **{role: self.sockets[role] for role in HELD[name]}}
        neighbours = dict(self._relate(name, ends))
        child.process = self._spawn(child.card, ends)
        child.pidfd = os.pidfd_open(child.process.pid)
        child.channel, child.ready, child.heard = Channel(mine, messages.FROM_CHILD), False, now
        child.started = [*child.started[-9:], now]
        mine.setblocking(False)
        self.selector.register(mine, selectors.EVENT_READ, lambda: self._hear(child))
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._bury(child))
        for role, sock in ends.items():
            if role not in HELD[name]:
                sock.close()
        for (neighbour, role), sock in neighbours.items():
            self._introduce(neighbour, role, sock)
        log.info("%s started, pid %d", name, child.process.pid)
        self.auditing.record(
            "process-started", {"name": name, "pid": child.process.pid, "restarts": child.restarts}
        )
        self._tell_states()

    def _relate(
        self, name: str, ends: dict[str, socket.socket]
    ) -> Iterator[tuple[tuple[str, str], socket.socket]]:
        """Channels between `name` and each neighbour: fills `ends` with its own, yields the neighbours'.
        One that a neighbour has been using already, waiting for this process, is taken as it is."""
        for left, left_name, right, right_name in RELATIONS:
            if name not in (left, right):
                continue
            mine, theirs = left_name, (right, right_name)
            if name == right:
                mine, theirs = right_name, (left, left_name)
            waiting = self._waiting.pop((name, mine), None)
            if waiting is not None:
                ends[mine] = waiting
                continue
            ends[mine], other = pair()
            yield theirs, other
        if name == "auditor":
            ends["audit-supervisor"], own = pair()
            self.auditing.connect(own)
            while self._untold:
                self.auditing.record(*self._untold.popleft())
            if self.credential is not None:
                ends["credential"] = _handed(self.credential)

    def _introduce(self, neighbour: str, role: str, sock: socket.socket) -> None:
        """Hand a running neighbour its new end; for one that is down it waits until it starts."""
        channel = self.children[neighbour].channel
        if channel is None:
            old = self._waiting.pop((neighbour, role), None)
            if old is not None:
                old.close()
            self._waiting[neighbour, role] = sock
            return
        with sock, contextlib.suppress(OSError):
            channel.send(messages.NewPeer(name=role), descriptor=sock.fileno())

    def _spawn(self, card: Card, ends: dict[str, socket.socket]) -> subprocess.Popen[bytes]:
        account = self.accounts[card.user]
        command = [sys.executable, "-I", "-m", f"egressd.processes.{card.name}"]
        for role, sock in ends.items():
            command += ["--fd", f"{role}={sock.fileno()}"]
        command += ["--uid", str(account.uid), "--gid", str(account.gid)]
        for role in card.groups:
            command += ["--group", str(self.accounts[role].gid)]
        command += ["--config-json", self.config.encode()]
        thread = self._gateway if card.namespace is Namespace.GATEWAY else self._here
        descriptors = [sock.fileno() for sock in ends.values()]
        # The parent-death signal follows the thread that forked (prctl(2)): both threads live as long as we.
        return thread.submit(_popen, command, descriptors).result()

    def _hear(self, child: Child) -> None:
        try:
            if child.channel is None:
                return
            message = child.channel.receive().message
        except BlockingIOError:
            return
        except (EOFError, OSError):
            self._forget_channel(child)
            return
        except ProtocolError as error:
            log.error("%s said something unexpected: %s", child.card.name, error)  # noqa: TRY400
            self._record_end("process-killed", child, {"why": str(error)[:512]})
            self._kill(child)
            return
        child.heard = time.monotonic()
        if isinstance(message, messages.Ready) and not child.ready:
            child.ready = True
            self._tell_states()

    def _bury(self, child: Child) -> None:
        if child.process is None:
            return
        status = child.process.wait()
        log.log(
            logging.INFO if self.stopping else logging.ERROR, "%s ended, %s", child.card.name, _ending(status)
        )
        self._record_end("process-ended", child, {"status": status})
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self._forget_channel(child)
        child.process, child.pidfd, child.ready = None, -1, False
        child.restarts += 1
        child.start_at = time.monotonic() + _backoff(child.started)
        self._tell_states()

    def _forget_channel(self, child: Child) -> None:
        if child.channel is not None:
            self.selector.unregister(child.channel.socket)
            child.channel.close()
            child.channel = None

    def _kill(self, child: Child) -> None:
        if child.process is not None:
            child.process.kill()

    def _record_end(self, event: str, child: Child, fields: dict[str, str | int]) -> None:
        """What ends, and what is about to be killed. Of the auditor, its successor is told."""
        pid = child.process.pid if child.process else 0
        record = event, {"name": child.card.name, "pid": pid, **fields}
        if child.card.name == "auditor" and not self.stopping:
            self._untold.append(record)
        else:
            self.auditing.record(*record)

    def _tell_states(self) -> None:
        channel = self.children["controller"].channel
        if channel is not None:
            states = tuple(child.state for child in self.children.values())
            with contextlib.suppress(OSError):
                channel.send(messages.ProcessTable(processes=states))

    # ---- signals and the end

    def _watch_signals(self) -> None:
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        self._wakeup = writer
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        self.selector.register(reader, selectors.EVENT_READ, lambda: self._signalled(reader))

    def _signalled(self, reader: socket.socket) -> None:
        numbers = reader.recv(64)
        if signal.SIGHUP in numbers:
            controller = self.children["controller"].process
            if controller is not None:
                controller.send_signal(signal.SIGHUP)
        if signal.SIGUSR1 in numbers and not self.stopping:
            self.stopping = self.leaving = True
        if {signal.SIGTERM, signal.SIGINT} & set(numbers) and not self.stopping:
            self.stopping = True
            self.leaving = signal.SIGINT not in numbers and manager.restarts()

    def _stop(self) -> None:
        """Permission shrinks first: the controller ends the leases, then the rest goes. The gateway, with
        its denial, stays."""
        log.info("stopping; the gateway keeps denying until `egressd --dismantle`")
        notify("STOPPING=1")
        for name in reversed(self.children):
            self._end([name], signal.SIGTERM, within=_STOP_WITHIN)

    def _leave(self) -> None:
        """For the next start: gateway, links and leases stay as they are, and brokers wait for it. Who
        records ends last."""
        log.info("leaving the sandboxes to the next start")
        notify("STOPPING=1")
        self._end(["controller"], signal.SIGUSR2, within=_LEAVE_WITHIN)
        self._end([name for name in self.children if name != "auditor"], signal.SIGTERM, within=_LEAVE_WITHIN)
        self._end(["auditor"], signal.SIGTERM, within=_STOP_WITHIN)

    def _end(self, names: Iterable[str], number: signal.Signals, *, within: float) -> None:
        """Ask them to end; whoever is there after `within` seconds is killed."""
        ending = [self.children[name] for name in names if self.children[name].process is not None]
        for child in ending:
            assert child.process is not None
            child.process.send_signal(number)
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0 and any(child.process for child in ending):
            for key, _ in self.selector.select(timeout=left):
                key.data()
        for child in ending:
            self._kill(child)
            if child.process is not None:
                child.process.wait(timeout=5)
                self._bury(child)


@dataclass(frozen=True, slots=True)
class _Rights:
    """What the supervisor keeps, applied to the calling thread."""

    card: Card

    def __call__(self) -> None:
        effective = self.card.capabilities - {Capability.NET_ADMIN, Capability.SETPCAP}
        isolation.drop_bounding(self.card.capabilities)
        isolation.limit_to(effective=effective, permitted=self.card.capabilities)
        isolation.no_new_privileges()


def _thread_in(namespace: int) -> concurrent.futures.ThreadPoolExecutor:
    """A pool of one thread that lives in the network namespace `namespace` (setns(2))."""
    executor = concurrent.futures.ThreadPoolExecutor(1)

    def enter() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise KernelError(f"cannot enter the gateway: {os.strerror(ctypes.get_errno())}")

    executor.submit(enter).result()
    return executor


def _popen(command: list[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=2, env=_environment()
    )


def _environment() -> dict[str, str]:
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "JOURNAL_STREAM", "INVOCATION_ID")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _backoff(started: Sequence[float]) -> float:
    """At once the first times; a process that cannot live is tried ever more slowly, up to 10 s."""
    recent = sum(1 for at in started if time.monotonic() - at < 10)
    return 0.0 if recent <= 3 else min(10.0, 0.5 * 2 ** (recent - 4))


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


# ---- start, while still root


@dataclass(frozen=True, slots=True)
class Foundation:
    """`gateway`: a descriptor of its namespace. `sockets` live there, some of them the same as `before`.
    `process` laid it, and is still tidying up."""

    gateway: int
    sockets: dict[str, socket.socket]
    before: frozenset[str]
    process: subprocess.Popen[bytes]


def lay_foundation(config: Config, kept: Mapping[str, int], *, debug: bool = False) -> Foundation:
    """Run the one-shot. `kept`: descriptors of sockets from before, which are closed here. KernelError if it
    fails."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation"]
    command += ["--config-json", config.encode(), "--fd", f"reply={its.fileno()}"]
    command += ["--debug"] if debug else []
    for name, number in kept.items():
        command += ["--held", f"{name}={number}"]
    passed = [its.fileno(), *kept.values()]
    # Not longer than we: the lock is ours, and whoever has it next is alone.
    process = subprocess.Popen(
        command,
        pass_fds=passed,
        stdin=subprocess.DEVNULL,
        stdout=2,
        preexec_fn=isolation.die_with_parent,  # noqa: PLW1509 -- there is no other thread yet
    )
    its.close()
    for number in kept.values():
        os.close(number)
    with mine:
        data, descriptors, _, _ = socket.recv_fds(mine, 1 << 16, 64)
    if not data:
        ending = _ending(process.wait())
        raise KernelError(f"the foundation could not be laid ({ending}); the reason stands above")
    reply = json.loads(data)
    found = dict(zip(reply["names"], descriptors, strict=True))
    gateway = found.pop("gateway")
    made = {name: socket.socket(fileno=number) for name, number in found.items()}
    return Foundation(gateway, made, frozenset(reply["kept"]), process)


def open_sockets(config: Config, *, debug: bool = False) -> tuple[dict[str, socket.socket], Foundation]:
    """Everything that lives as long as the supervisor, by role. What systemd kept is taken back; what is new,
    it is asked to keep."""
    kept = readiness.kept()
    try:
        return _taken_back(config, kept, debug=debug)
    except KernelError as error:
        if not kept:
            raise
        # What was kept may itself be what stands in the way, under whatever name.
        log.warning("once more without the sockets that were kept: %s", error)
        readiness.drop(sorted(kept))
        return _taken_back(config, {}, debug=debug)


def _taken_back(
    config: Config, kept: Mapping[str, int], *, debug: bool
) -> tuple[dict[str, socket.socket], Foundation]:
    inside = {name: number for name, number in kept.items() if name in _GATEWAYS}
    outside = {name: number for name, number in kept.items() if name not in inside}
    try:
        laid = lay_foundation(config, inside, debug=debug)
    except KernelError:
        for number in outside.values():
            os.close(number)
        raise
    doors, still = open_doors(config, outside)
    same = laid.before | still
    if same:
        log.info("systemd kept %d sockets: %s", len(same), ", ".join(sorted(same)))
    readiness.drop(sorted(kept.keys() - same))
    for name, sock in (laid.sockets | doors).items():
        if name not in same:
            readiness.keep(name, sock.fileno())
    return laid.sockets | doors, laid


def prepare_state(config: Config) -> None:
    state, journal = Path(config.state_dir), Path(config.state_dir, "journal")
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    journal.mkdir(mode=0o750, exist_ok=True)
    keys = state / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    own = Path(config.run_dir, "controller")
    own.mkdir(mode=0o700, exist_ok=True)
    custody = Path(config.run_dir, "custodian")  # hostside.CUSTODY, without what that imports
    custody.mkdir(mode=0o700, exist_ok=True)
    accounts = config.accounts()
    for directory in (journal, keys):
        os.chown(directory, accounts["audit"].uid, accounts["audit"].gid)
    os.chown(own, accounts["daemon"].uid, accounts["daemon"].gid)
    os.chown(custody, accounts["custody"].uid, accounts["custody"].gid)


def read_credential() -> bytes | None:
    """The signing key, if systemd holds it (systemd.exec(5), LoadCredential=): readable by root alone, and so
    read before the rights are given up. A restarted auditor is handed it again."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        return None if directory is None else Path(directory, _CREDENTIAL).read_bytes()[:_CREDENTIAL_BYTES]
    except FileNotFoundError:
        return None


def _handed(data: bytes) -> socket.socket:
    """The readable end of a pair that holds `data` and then ends."""
    mine, its = socket.socketpair()
    with mine:
        mine.sendall(data)
    return its


@contextlib.contextmanager
def alone(config: Config) -> Iterator[None]:
    """One egressd per gateway: a second one would begin the first one's tables anew. The lock ends with the
    process that holds it; KernelError names that process."""
    path = _LOCKS / f"{config.gateway}.lock"
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        # Nobody else may open it: whoever can, be it for reading, can lock it, too (flock(2)).
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+")
        os.fchmod(lock.fileno(), 0o600)
    except PermissionError as error:
        raise KernelError(f"{path} may not be written: egressd is started as root") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise KernelError(
                f"egressd is running already for gateway {config.gateway!r}, process {lock.read(16) or '?'};"
                " stop it first, or name another `gateway`"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def serve(config: Config, *, debug: bool = False) -> int:
    _check_accounts(config)
    held, laid = open_sockets(config, debug=debug)
    prepare_state(config)
    supervisor = Supervisor(config, held, laid, credential=read_credential())
    notify("STATUS=starting")
    supervisor.give_up_rights()
    supervisor.run()
    return 0


def _check_accounts(config: Config) -> None:
    try:
        accounts = config.accounts()
    except KeyError as error:
        raise KernelError(
            f"{error.args[0]}; create the accounts with `systemd-sysusers egressd.conf`"
        ) from error
    uids = [account.uid for account in accounts.values()]
    if len(set(uids)) < len(uids) or os.getuid() in uids:
        log.warning(
            "user: %s -- the processes share a user id and are kept apart by capabilities alone", config.user
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="egressd",
        description="Keeps sandboxed inferences from reaching hosts their workspace did not approve.",
        epilog="See egressd(8) and egressd.yaml(5).",
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/egressd/egressd.yaml"), metavar="FILE")
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--check", action="store_true", help="check the configuration and exit")
    verbs.add_argument("--foundation", action="store_true", help="make and pin the gateway, then exit")
    verbs.add_argument(
        "--mend",
        action="store_true",
        help="put the host's side in order again, while egressd runs: after a flush of the host's firewall",
    )
    verbs.add_argument(
        "--dismantle",
        action="store_true",
        help="remove the gateway and everything else egressd made, then exit",
    )
    parser.add_argument(
        "--debug", action="store_true", help="log every single change that preparing the gateway makes"
    )
    parser.add_argument("--version", action="version", version=f"egressd {__version__}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The program `egressd`."""
    options = _parser().parse_args(arguments)
    one_shot = options.check or options.foundation or options.mend or options.dismantle
    journald.configure("", long_lived=not one_shot)
    try:
        config = load(options.config)
        if options.check:
            print(f"{options.config}: ok")
            return 0
        if options.mend:
            return _one_shot(config, "--mend", debug=options.debug)
        with alone(config):
            if options.foundation or options.dismantle:
                verb = "--dismantle" if options.dismantle else "--foundation"
                return _one_shot(config, verb, debug=options.debug)
            return serve(config, debug=options.debug)
    except PolicyError as error:
        for problem in error.problems:
            print(f"egressd: {problem}", file=sys.stderr)
    except (EgressdError, isolation.IsolationError, OSError) as error:
        # the kernel said no to something that has no name: where it was asked is all there is to go by
        if isinstance(error, OSError) and error.filename is None:
            log.exception("not started; this is where")
        print(f"egressd: {error}", file=sys.stderr)
    return 1


def _one_shot(config: Config, verb: str, *, debug: bool) -> int:
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation", verb]
    command += ["--debug"] if debug else []
    command += ["--config-json", config.encode()]
    return subprocess.run(command, check=False, preexec_fn=isolation.die_with_parent).returncode


if __name__ == "__main__":
    sys.exit(main())
