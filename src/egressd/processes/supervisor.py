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
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from egressd import __version__
from egressd.ipc import messages
from egressd.ipc.channel import Channel, pair
from egressd.ipc.readiness import notify
from egressd.model.errors import EgressdError, KernelError, PolicyError, ProtocolError
from egressd.processes import isolation
from egressd.processes.cards import CARDS, Capability, Card, Namespace
from egressd.processes.config import Account, Config, ListenAddress, load
from egressd.processes.remembered import forget
from egressd.processes.ritual import Auditing

__all__ = ["main"]

log = logging.getLogger("egressd")

# The order of starting: what denies and records before what grants and answers.
ORDER = ("auditor", "warden", "relay", "inspector", "resolver", "controller")
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
    "exporter": ("metrics",),
    "api": ("api",),
}
HUNG_AFTER = 10.0  # seconds without a heartbeat
_HTTP_BACKLOG = 1024  # connections that wait to be accepted
_CREDENTIAL = "egressd-journal-key"  # journal_keys.CREDENTIAL, without what that imports
_CREDENTIAL_BYTES = (1 << 16) + 1  # fits the buffer of a socket; a key has a hundred
START_WITHIN = 30.0  # seconds for a process to say that it is ready
_CLONE_NEWNET = 0x4000_0000  # linux/sched.h


def order(config: Config) -> tuple[str, ...]:
    """The processes there are, in the order of starting."""
    return (*ORDER, *(name for name, key in OPTIONAL.items() if getattr(config, key) is not None))


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
        gateway: int,
        *,
        credential: bytes | None = None,
    ) -> None:
        """`credential`: the auditor's signing key, where the system manager holds it."""
        self.config, self.sockets, self.credential = config, sockets, credential
        self.accounts = {"root": Account(os.getuid(), os.getgid()), **config.accounts()}
        self.children = {name: Child(CARDS[name]) for name in order(config)}
        self.selector = selectors.DefaultSelector()
        self.auditing = Auditing("supervisor")
        self.stopping = self.announced = False
        self._untold: deque[tuple[str, dict[str, str | int]]] = deque(maxlen=64)
        self._waiting: dict[tuple[str, str], socket.socket] = {}  # (process, role) -> its end
        self._gateway = _thread_in(gateway)
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
        for name in ORDER:
            self.start(self.children[name])
            self._serve_until(lambda name=name: self.children[name].ready or self.stopping)  # type: ignore[misc]
        for name in OPTIONAL:
            if name in self.children and not self.stopping:
                self.start(self.children[name])
        self._serve_until(lambda: self.stopping)
        self._stop()

    def _serve_until(self, done: Callable[[], bool]) -> None:
        while not done():
            for key, _ in self.selector.select(timeout=1.0):
                key.data()
            self._look_after()

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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self.selector.register(reader, selectors.EVENT_READ, lambda: self._signalled(reader))

    def _signalled(self, reader: socket.socket) -> None:
        numbers = reader.recv(64)
        if signal.SIGHUP in numbers:
            controller = self.children["controller"].process
            if controller is not None:
                controller.send_signal(signal.SIGHUP)
        if {signal.SIGTERM, signal.SIGINT} & set(numbers):
            self.stopping = True

    def _stop(self) -> None:
        """Permission shrinks first: the controller ends the leases, then the rest goes. The gateway, with
        its denial, stays."""
        log.info("stopping; the gateway keeps denying until `egressd --dismantle`")
        notify("STOPPING=1")
        for child in reversed(self.children.values()):
            if child.process is None:
                continue
            child.process.terminate()
            deadline = time.monotonic() + 5
            while child.process is not None and time.monotonic() < deadline:
                for key, _ in self.selector.select(timeout=0.5):
                    key.data()
            self._kill(child)
        for child in self.children.values():
            if child.process is not None:
                child.process.wait(timeout=5)


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


def lay_foundation(config: Config, *, debug: bool = False) -> tuple[dict[str, socket.socket], int]:
    """Run the one-shot; returns the gateway's sockets by name, and its namespace descriptor."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation"]
    command += ["--config-json", config.encode(), "--fd", f"reply={its.fileno()}"]
    command += ["--debug"] if debug else []
    process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, stdout=2)
    its.close()
    with mine:
        data, descriptors, _, _ = socket.recv_fds(mine, 1 << 16, 64)
    status = process.wait()
    if status != 0 or not data:
        raise KernelError(f"the foundation could not be laid ({_ending(status)}); the reason stands above")
    names = json.loads(data)
    found = dict(zip(names, descriptors, strict=True))
    gateway = found.pop("gateway")
    return {name: socket.socket(fileno=number) for name, number in found.items()}, gateway


def open_control_socket(config: Config) -> socket.socket:
    """Anyone may connect; who may do what is decided by peer credentials."""
    directory = Path(config.run_dir)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = config.control_socket
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.bind(str(path))
    path.chmod(0o666)
    control.listen(4096)  # the kernel bounds it by net.core.somaxconn
    return control


def open_metrics_socket(config: Config) -> socket.socket | None:
    """None where metrics are not configured. A path is for root and the group of the account: whoever is to
    read joins that group."""
    where = config.metrics_address
    return where if where is None else _open_http(where, config.accounts()["metrics"], "metrics", mode=0o660)


def open_api_socket(config: Config) -> socket.socket | None:
    """None where the HTTP API is not configured. A path is for everybody: each peer is asked who it is."""
    where = config.api_address
    return where if where is None else _open_http(where, config.accounts()["api"], "the HTTP API", mode=0o666)


def _open_http(where: ListenAddress, account: Account, what: str, *, mode: int) -> socket.socket:
    """Bound while still root, so that nobody else takes the address first, and a port below 1024 is a port
    like any other."""
    if where.address is None:
        return _open_path(Path(where.path), account, what, mode=mode)
    sock = socket.socket(socket.AF_INET if where.address.version == 4 else socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shown = str(where.address) if where.address.version == 4 else f"[{where.address}]"
    _bound(sock, (str(where.address), where.port), what, shown=f"{shown}:{where.port}")
    sock.listen(_HTTP_BACKLOG)
    return sock


def _bound(sock: socket.socket, address: tuple[str, int] | str, what: str, *, shown: str) -> None:
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise KernelError(f"{what} cannot be offered at {shown}: {error.strerror}") from error


def _open_path(path: Path, account: Account, what: str, *, mode: int) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise KernelError(f"{what}: {path} is there already and is not a socket; name another path")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX)
    # Before listen(2) nobody can connect: there is no moment with another mode.
    _bound(sock, str(path), what, shown=str(path))
    os.chown(path, 0, account.gid)
    path.chmod(mode)
    sock.listen(_HTTP_BACKLOG)
    return sock


def prepare_state(config: Config) -> None:
    state, journal = Path(config.state_dir), Path(config.state_dir, "journal")
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    journal.mkdir(mode=0o750, exist_ok=True)
    keys = state / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    own = Path(config.run_dir, "controller")
    own.mkdir(mode=0o700, exist_ok=True)
    forget(own)
    accounts = config.accounts()
    for directory in (journal, keys):
        os.chown(directory, accounts["audit"].uid, accounts["audit"].gid)
    os.chown(own, accounts["daemon"].uid, accounts["daemon"].gid)


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
    # The unit may write here and nowhere else in /run, whatever `run_dir` is.
    path = Path("/run/egressd", f"{config.gateway}.lock")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        lock = path.open("a+")
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
    held, gateway = lay_foundation(config, debug=debug)
    held["control"] = open_control_socket(config)
    for role, opened in (("metrics", open_metrics_socket(config)), ("api", open_api_socket(config))):
        if opened is not None:
            held[role] = opened
    prepare_state(config)
    supervisor = Supervisor(config, held, gateway, credential=read_credential())
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
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="egressd: %(levelname)s: %(message)s")
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
    return subprocess.run([*command, "--config-json", config.encode()], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
