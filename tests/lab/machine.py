"""The lab as seen by who uses it: start it, run things in it, take sockets and descriptors out of it.

    with Lab() as lab:
        print(lab.run(["ip", "addr"]).out)                 # in lab-host
        lab.run(["nft", "list", "ruleset"], where="egressd")  # in any pinned namespace

The user stays in the machine's own namespaces; a keeper process (see `keeper.py`) acts for it inside. Needs
root, or a kernel that lets unprivileged users make user namespaces (`Lab(rootless=True)` to insist).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

from lab import topology

__all__ = ["Lab", "LabError", "Process", "Result", "Running", "closed_to_others", "open_descriptors", "poll"]

TESTS = Path(__file__).resolve().parent.parent
PROJECT = TESTS.parent
VENV = Path(sys.prefix)
# One of the directories that every Debian has and few use: the lab's files are a tmpfs over it. Not /run and
# not /tmp, which sandboxes replace by their own, so that a directory of the lab can be shown to a sandbox.
_MOUNT_POINTS = ("/srv", "/media", "/mnt", "/opt")
USER = 4001  # who runs sandboxes in the lab; a plain number, no account needed


class LabError(Exception):
    """The lab could not be made, or something in it did not do what it must."""


def poll(condition: Callable[[], Any], *, timeout: float = 5.0, what: str = "") -> Any:
    """The first true value of `condition()`; LabError when a look begun `timeout` seconds later finds none.

    One that begins in time and ends late, on a busy machine, says nothing about the time after it.
    """
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        if began > deadline:
            raise LabError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.002)


def _readable(descriptor: int, timeout: float | None) -> bool:
    """By poll(2): select(2) takes no descriptor above 1023."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(None if timeout is None else timeout * 1000))


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended. `seconds` includes its start."""

    argv: tuple[str, ...]
    status: int  # negative: killed by that signal
    out: str
    err: str
    seconds: float

    def check(self) -> Self:
        if self.status != 0:
            raise LabError(f"{' '.join(self.argv)} ended with {self.status}\n{self.out}{self.err}")
        return self


@dataclass(frozen=True, slots=True)
class Running:
    """A row of the lab's process table."""

    pid: int
    parent: int
    network: int  # inode of its network namespace; 0: not known
    command: str


class Process:
    """Something running in the lab. Its output is collected by threads as it comes."""

    def __init__(
        self, lab: Lab, argv: Sequence[str], pid: int, status: int, pipes: Mapping[str, int]
    ) -> None:
        self.argv = tuple(argv)
        self.pid = pid  # as the lab counts
        self.stdin: IO[bytes] | None = os.fdopen(pipes["in"], "wb", buffering=0) if "in" in pipes else None
        self._lab = lab
        self._status_pipe = status
        self._status: int | None = None
        self._text: dict[str, bytearray] = {name: bytearray() for name in pipes if name != "in"}
        self._threads = [
            threading.Thread(target=self._collect, args=(name, pipe), daemon=True)
            for name, pipe in pipes.items()
            if name != "in"
        ]
        for thread in self._threads:
            thread.start()

    def _collect(self, name: str, pipe: int) -> None:
        while chunk := os.read(pipe, 1 << 16):
            self._text[name] += chunk
        os.close(pipe)

    @property
    def out(self) -> str:
        return bytes(self._text.get("out", b"")).decode(errors="replace")

    @property
    def err(self) -> str:
        return bytes(self._text.get("err", b"")).decode(errors="replace")

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self._status is None and _readable(self._status_pipe, 0):
            self._read_status()
        return self._status

    def _read_status(self) -> None:
        text = os.read(self._status_pipe, 16)
        self._status = int(text) if text else -signal.SIGKILL  # no word: the whole lab is gone
        os.close(self._status_pipe)

    def wait(self, timeout: float | None = 30.0) -> int:
        """Wait for the end; LabError (the process goes on) after `timeout` seconds."""
        if self._status is None:
            if not _readable(self._status_pipe, timeout):
                raise LabError(f"{' '.join(self.argv)} still runs after {timeout:g} s\n{self.out}{self.err}")
            self._read_status()
        assert self._status is not None
        return self._status

    def drain(self, timeout: float = 2.0) -> None:
        """Wait until nobody holds its output open: descendants that outlive it may."""
        for thread in self._threads:
            thread.join(timeout)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal; one that has already ended is left alone."""
        if self.status() is None:
            with contextlib.suppress(ProcessLookupError):
                self._lab.signal(-self.pid if group else self.pid, number)

    def kill(self, *, group: bool = True) -> int:
        self.signal(signal.SIGKILL, group=group)
        return self.wait()

    def close(self) -> None:
        """Close what this side holds."""
        if self.stdin is not None and not self.stdin.closed:
            self.stdin.close()


class Companion(Protocol):
    """Something of this process that belongs to a lab."""

    def close(self) -> object: ...


class Lab:
    """The two namespaces, wired and quiet; `start_internet` and `Daemon` go on top."""

    def __init__(self, *, rootless: bool | None = None) -> None:
        self.rootless = os.geteuid() != 0 if rootless is None else rootless
        self._lock = threading.Lock()
        self._processes: list[Process] = []
        self.companions: list[Companion] = []  # ended with the lab, and kept alive by it
        self.directory = _mount_point()  # as the lab sees it
        # Other users than ourselves are of use only if they can read this checkout.
        several = _subordinate_ids() and closed_to_others(VENV) is None
        self.single_user = self.rootless and not several
        self.user = 0 if self.single_user else USER
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._keeper = self._start_keeper(theirs)
        try:
            self._prepare()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- beginning and end

    def _start_keeper(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        users = [] if not self.rootless else ["--user", "--map-root-user"]
        if self.rootless and not self.single_user:
            users.append("--map-auto")
        keeper = str(TESTS / "lab" / "keeper.py")
        argv = [
            "unshare", *users, "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
            "--mount-proc", "--", sys.executable, "-I", "-S", keeper, str(theirs.fileno()),
        ]  # fmt: skip
        return subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def _prepare(self) -> None:
        self.ask(
            "prepare",
            data=self.directory,
            host=topology.HOST,
            net=topology.NET,
            resolver=f"nameserver {topology.DNS4}\nnameserver {topology.DNS6}\n",
            sysctls={
                topology.HOST: topology.sysctls(host=True),
                topology.NET: topology.sysctls(host=False),
            },
        )
        # A directory descriptor of the lab's private file system: /proc/self/fd leads into it from out here.
        self._root = self.ask("open", path=self.directory, flags=os.O_DIRECTORY)[1][0]
        for where, batch in ((topology.HOST, topology.host_batch()), (topology.NET, topology.net_batch())):
            self.run(["ip", "-batch", "-"], where=where, stdin=batch).check()

    def stop(self) -> None:
        """End everything. Safe to call twice. Returns when the keeper, and with it the lab, is gone."""
        for companion in self.companions:
            companion.close()
        self.companions.clear()
        self._control.close()
        try:
            self._keeper.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        for process in self._processes:
            process.close()
            process.drain()
            process.status()
        self._processes.clear()
        if (root := getattr(self, "_root", None)) is not None:
            os.close(root)
            del self._root

    @property
    def keeper_pid(self) -> int:
        """The lab's process 1 as this side counts, to look at it from outside (/proc/PID)."""
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text().split()
        return int(children[0])

    def ask(self, op: str, *, give: Sequence[int] = (), **fields: Any) -> tuple[Any, list[int]]:
        """One request to the keeper: (result, descriptors). OSError if the kernel said no."""
        with self._lock:
            try:
                socket.send_fds(self._control, [json.dumps({"op": op, **fields}).encode()], list(give))
                data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 20, 4)
            except OSError as error:
                raise LabError(f"the lab is gone ({error}): did `unshare` report something above?") from error
        if not data:
            raise LabError("the lab ended: did `unshare` report something above?")
        reply = json.loads(data)
        if "error" in reply:
            raise OSError(reply["errno"], reply["error"])
        return reply["result"], descriptors

    # ---- files

    def path(self, name: str = "") -> Path:
        """A file of the lab's private directory, as this side can open it."""
        return Path(f"/proc/self/fd/{self._root}", name)

    def inside(self, name: str = "") -> str:
        """The same file, as processes of the lab call it."""
        return str(Path(self.directory, name))

    # ---- processes

    def start(
        self,
        argv: Sequence[str],
        *,
        where: str = topology.HOST,
        uid: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: int | None = None,
        groups: Sequence[int] = (),
        pipes: bool = True,
        foreground: bool = False,
    ) -> Process:
        """Start `argv` in a namespace. With `pipes`, output is collected and `.stdin` is open (unless `stdin`
        is given); without, standard output and error are this process's own.

        `uid` None is root of the lab. `env` is added to a small clean environment.
        """
        if uid is not None and (self.single_user or uid == 0):
            uid = None
        ours: dict[str, int] = {}
        theirs: list[int] = []
        if pipes:
            if stdin is not None:
                theirs.append(os.dup(stdin))
            else:
                read, write = os.pipe2(os.O_CLOEXEC)
                ours["in"] = write
                theirs.append(read)
            for name in ("out", "err"):
                ours[name], write = os.pipe2(os.O_CLOEXEC)
                theirs.append(write)
        else:
            theirs = [os.dup(number) for number in (0 if stdin is None else stdin, 1, 2)]
        status, teller = os.pipe2(os.O_CLOEXEC)
        theirs.append(teller)
        try:
            pid, _ = self.ask(
                "spawn", give=theirs, argv=list(argv), where=where, uid=uid, cwd=cwd, groups=list(groups),
                env=environment() | dict(env or {}), foreground=foreground,
            )  # fmt: skip
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        process = Process(self, argv, pid, status, ours)
        for known in self._processes:
            if known.status() is not None:
                known.close()  # now, and not when the garbage is collected: a suite starts thousands
        self._processes = [known for known in self._processes if known.status() is None]
        self._processes.append(process)
        return process

    def run(
        self, argv: Sequence[str], *, stdin: str | bytes = "", timeout: float = 30.0, **options: Any
    ) -> Result:
        """Run to the end and collect. After `timeout` its process group is killed and LabError raised."""
        began = time.monotonic()
        process = self.start(argv, **options)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stdin.encode() if isinstance(stdin, str) else stdin)
        process.stdin.close()
        try:
            status = process.wait(timeout)
        except LabError:
            process.kill()
            raise
        seconds = time.monotonic() - began
        process.drain()
        return Result(tuple(argv), status, process.out, process.err, seconds)

    def signal(self, pid: int, number: int) -> None:
        self.ask("signal", pid=pid, signal=int(number))

    def processes(self) -> dict[int, str]:
        """pid -> command line of every living process of the lab except the keeper."""
        return {process.pid: process.command for process in self.table()}

    def table(self) -> list[Running]:
        """The living processes of the lab, the keeper aside."""
        found: list[Running] = []
        while batch := self.ask("processes", skip=len(found))[0]:
            found += [Running(*row) for row in batch]
        return found

    def descendants(self, pid: int) -> list[Running]:
        """Everything below a process, nearest first."""
        table, found, parents = self.table(), [], {pid}
        while children := [process for process in table if process.parent in parents]:
            found += children
            parents = {child.pid for child in children}
        return found

    def namespace_below(self, pid: int, *, timeout: float = 5.0) -> str:
        """The path of the first network namespace below a process that is not the host's: a sandbox's own.

        Good for every `where`. LabError if there is none in time.
        """

        def find() -> str:
            home = os.stat(f"/proc/{self.keeper_pid}/ns/net").st_ino  # noqa: PTH116
            strangers = [child.pid for child in self.descendants(pid) if child.network not in (0, home)]
            return f"/proc/{strangers[-1]}/ns/net" if strangers else ""

        return str(poll(find, timeout=timeout, what=f"a network namespace below process {pid}"))

    # ---- the network

    def namespace(self, where: str = topology.HOST) -> int:
        """A descriptor for a namespace of the lab; the caller closes it."""
        return self.ask("namespace", where=where)[1][0]

    def socket(
        self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0, *, where: str = topology.HOST
    ) -> socket.socket:
        """A socket that was made in a namespace of the lab, for use out here."""
        descriptors = self.ask(
            "socket", where=where, family=int(family), type=int(kind), protocol=int(protocol)
        )[1]
        return socket.socket(fileno=descriptors[0])

    def links(self, where: str = topology.HOST) -> dict[str, dict[str, Any]]:
        """Name -> what `ip -j link` says."""
        listing = json.loads(self.run(["ip", "-j", "-d", "link"], where=where).check().out)
        return {link["ifname"]: link for link in listing}

    @contextlib.contextmanager
    def leaving_nothing(
        self,
        *,
        within: float = 2.0,
        places: Sequence[str] = (topology.HOST,),
        ignore: Callable[[str], bool] = lambda _: False,
    ) -> Iterator[None]:
        """Links and nft tables of `places`, pinned namespaces and processes: after the block as before.

        Gives the kernel `within` seconds to finish what it has begun.
        """
        before = self.inventory(*places)

        def new() -> set[str]:
            return {item for item in self.inventory(*places) - before if not ignore(item)}

        yield
        deadline = time.monotonic() + within
        while new() and time.monotonic() < deadline:
            time.sleep(0.02)
        if left := new():
            raise AssertionError("left behind:\n  " + "\n  ".join(sorted(left)))

    def inventory(self, *places: str) -> set[str]:
        """What exists in the lab, as lines to compare. Sandboxes' namespaces show by their processes."""
        found = {f"process {pid} {words}" for pid, words in self.processes().items()}
        found |= {f"namespace {name}" for name in self.namespaces()}
        for where in places or (topology.HOST,):
            tables = self.run(["nft", "list", "tables"], where=where).check().out.splitlines()
            found |= {f"{where}: link {name}" for name in self.links(where)}
            found |= {f"{where}: nft {table}" for table in tables}
        return found

    def namespaces(self) -> list[str]:
        """Names pinned under the lab's own /run/netns."""
        (pins,) = self.ask("open", path="/run/netns", flags=os.O_DIRECTORY)[1]
        try:
            return sorted(path.name for path in Path(f"/proc/self/fd/{pins}").iterdir())
        finally:
            os.close(pins)


def environment() -> dict[str, str]:
    """What processes of the lab start with."""
    return {
        "PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PYTHONPATH": str(TESTS),
        "PYTHONUNBUFFERED": "1",
    }


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def closed_to_others(path: Path) -> Path | None:
    """The first directory on the way to `path` that other users may not enter; None if they may."""
    for directory in (*reversed(path.resolve().parents), path.resolve()):
        if directory.is_dir() and not directory.stat().st_mode & 0o001:
            return directory
    return None


def _mount_point() -> str:
    for candidate in _MOUNT_POINTS:
        path = Path(candidate)
        used = any(place.is_relative_to(path) for place in (PROJECT, VENV, Path.cwd()))
        if path.is_dir() and not path.is_symlink() and not used and not any(path.iterdir()):
            return candidate
    return "/var/tmp"


def _subordinate_ids() -> bool:
    """Whether newuidmap would give this user a range of ids for the lab."""
    if shutil.which("newuidmap") is None or shutil.which("newgidmap") is None:
        return False
    names = {str(os.getuid())}
    with contextlib.suppress(KeyError, OSError):
        names.add(getpass.getuser())
    try:
        return all(
            any(line.split(":")[0] in names for line in Path(file).read_text().splitlines())
            for file in ("/etc/subuid", "/etc/subgid")
        )
    except OSError:
        return False
