"""Where runners come from: a process that forks one for each request, and does nothing else.

The service has threads, and a process with threads cannot fork a sandbox: fork copies one thread and the
locks of all others, and setns(2) and unshare(2) refuse user namespaces to a process with threads. So the
first thing the service does is to start this program by exec (`Runners.start`). It imports all that a runner
needs, and waits; each message on its socket is one end of a channel, for which it forks a runner.

What dies with what:

- the service: its end of every channel closes. Each runner destroys and ends; the zygote reads end of file
  and ends. Nobody was given the service's ends, so this needs nobody to do anything;
- the zygote: runners go on, each with its own channel. The service starts another for the next request;
- a runner: its control connection closes, which is the lease; bubblewrap dies with it. What becomes an orphan
  by that is the zygote's, and is waited for there.

A runner has its own session, no descriptor but its channel and the log, and cannot be traced by other
processes of its account (see cycle.dumpable).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import msgspec

from egressd.broker.runners import cycle, jobs
from egressd.broker.runners.desk import Desk
from egressd.ipc.channel import Channel, pair, payload
from egressd.model.errors import EgressdError, ProtocolError, Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import launch, seccomp
from egressd.sandbox.limits import step_down
from egressd.sandbox.plan import FAILED

__all__ = ["PROGRAM", "Run", "Runners", "main"]

# -I: neither the directory it is started in nor variables decide what is imported.
PROGRAM = (sys.executable, "-I", "-m", "egressd.broker.runners.zygote")
_MOST = 64  # requests at once
_PLACE = 3  # the number of the one descriptor that a zygote, and a runner, has
_READY = b"ready"
_PATIENCE = 30.0  # seconds for a zygote to import everything
_ALL = (1 << 31) - 1


# --------------------------------------------------------------------------------------------------
# in the service


class Run:
    """One request's runner, as the service holds it. Closing it is the end of everything that runs for it.

    Iterate over it, which waits; or wait for `fileno` to be readable and `receive`. Not for two threads at
    once, but for `stop` and `close`.
    """

    def __init__(self, connection: socket.socket, free: Callable[[], None]) -> None:
        self.channel: Channel[Any] = Channel(connection, jobs.FROM_RUNNER)
        self._free = free
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self.channel.fileno()

    def receive(self) -> Any:
        """The next message. `Finished` is the last. EOFError if the runner died without one: then nothing of
        it is left, but nobody looked, and the request's end is not on record. BlockingIOError if the socket
        does not wait and there is nothing."""
        try:
            return self.channel.receive().message
        except ConnectionResetError:  # killed, with something of ours unread; told once, before what it said
            return self.channel.receive().message

    def __iter__(self) -> Iterator[Any]:
        """Up to and with `Finished`; one is made up for a runner that was killed."""
        while True:
            try:
                message = self.receive()
            except (EOFError, ProtocolError):
                message = jobs.Finished(status=FAILED, why="its runner was killed")
            yield message
            if isinstance(message, jobs.Finished):
                return

    def go(self) -> None:
        self._say(jobs.Go())

    def stop(self, why: str) -> None:
        self._say(jobs.Stop(why=why[:4096]))

    def _say(self, message: Any) -> None:
        """A runner that is gone misses it."""
        with contextlib.suppress(OSError):
            self.channel.send(message)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self.channel.socket.shutdown(socket.SHUT_RDWR)  # who waits in `receive` is woken
        self.channel.close()
        self._free()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Runners:
    """`Runners.start()` as early as can be, while there are no threads and few descriptors. Every method may
    be called from any thread."""

    def __init__(self, *, most: int, program: Sequence[str]) -> None:
        self._most, self._program = most, tuple(program)
        self._lock = threading.Lock()  # of the zygote; held while one is begun, which takes its time
        self._counting = threading.Lock()  # of those that live; an event loop may wait for it
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._live: set[Run] = set()
        self._closed = False

    @classmethod
    def start(cls, *, most: int = _MOST, program: Sequence[str] = PROGRAM) -> Runners:
        """At most so many at once. Returns when the zygote is ready; `Refused` if it does not get so."""
        made = cls(most=most, program=program)
        step_down()
        with made._lock:
            made._start()
        return made

    @property
    def pid(self) -> int:
        """The zygote's; 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def live(self) -> int:
        """How many are not closed yet."""
        with self._counting:
            return len(self._live)

    def run(self, job: jobs.Job) -> Run:
        """Begin it. The first message will be `Projected`, or `Finished`. `Refused` where as many as may be
        are running, or no zygote can be had."""
        ours, theirs = pair()
        with theirs:
            made = Run(ours, lambda: self._forget(made))
            try:
                with self._counting:
                    self._admit()
                    self._live.add(made)
                with self._lock:
                    self._hand_over(theirs)
                data = msgspec.msgpack.encode(job)
                with payload(data) as descriptor:
                    made.channel.send(jobs.Begin(payload_length=len(data)), descriptor=descriptor)
            except BaseException as error:
                made.close()
                if isinstance(error, OSError):
                    raise Refused(Reason.UNAVAILABLE, f"no runner can be had: {error.strerror}") from error
                raise
        return made

    def close(self) -> None:
        """End everything that runs, and the zygote; returns when both have."""
        with self._counting:
            self._closed = True
            live = list(self._live)
        for run in live:
            run.close()
        with self._lock:
            self._end()

    def __enter__(self) -> Runners:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _forget(self, run: Run) -> None:
        with self._counting:
            self._live.discard(run)

    def _admit(self) -> None:
        self._refuse_if_closed()
        if len(self._live) >= self._most:
            raise Refused(Reason.LIMIT, f"as many requests as may be ({self._most}) are running")

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Refused(Reason.UNAVAILABLE, "the service is ending")

    def _hand_over(self, theirs: socket.socket) -> None:
        """To the zygote; to another if that one is dead. One that dies before it has forked closes `theirs`
        for us: end of file without a word."""
        self._refuse_if_closed()  # or it would have a zygote that nobody ends
        for attempt in (1, 2):
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start()
            assert self._socket is not None
            try:
                socket.send_fds(self._socket, [b"run"], [theirs.fileno()], socket.MSG_NOSIGNAL)
            except OSError:
                self._end()
                if attempt == 2:
                    raise
            else:
                return

    def _start(self) -> None:
        ours, theirs = pair()
        with theirs:
            self._socket = ours
            self._process = subprocess.Popen(
                [*self._program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        ours.settimeout(_PATIENCE)
        try:
            word = ours.recv(64)
        except OSError:
            word = b""
        if word != _READY:
            self._end()
            raise Refused(
                Reason.UNAVAILABLE, "the process that forks runners did not start; its log says why"
            )

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:  # somebody has stopped it
                self._process.kill()
                self._process.wait()
            self._process = None


# --------------------------------------------------------------------------------------------------
# the zygote


def main(argv: Sequence[str]) -> int:
    """`argv` is the number of its socket. Ends at end of file there, when all its runners have."""
    control = socket.socket(fileno=int(argv[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the service's to hear
    signal.signal(signal.SIGCHLD, _reap)
    launch.take_in_orphans()
    cycle.dumpable(allowed=False)
    seccomp.program()
    gc.collect()
    gc.freeze()  # what is shared with runners stays shared
    control.send(_READY)
    with contextlib.suppress(ConnectionResetError):
        while True:
            data, descriptors, _, _ = socket.recv_fds(control, 64, 1)
            if not data:
                break
            for number in descriptors:
                _fork(number, control)
                os.close(number)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return 0


def _reap(_number: int, _frame: FrameType | None) -> None:
    """Runners that have ended, and what a killed one left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _fork(number: int, control: socket.socket) -> None:
    """Fails (EAGAIN, ENOMEM) by closing the channel: the service reads end of file."""
    with contextlib.suppress(OSError):
        if os.fork() == 0:
            status = 1
            try:
                control.detach()  # or the object would close a number that is somebody else's by then
                _run(number)
                status = 0
            except BaseException:  # the last word of a process
                traceback.print_exc()
            finally:
                os._exit(status)


# --------------------------------------------------------------------------------------------------
# a runner


def _run(number: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    if number != _PLACE:  # EINVAL (dup3(2))
        os.dup2(number, _PLACE, inheritable=False)
    os.closerange(_PLACE + 1, _ALL)
    connection = socket.socket(fileno=_PLACE)
    job = _job(connection)
    if job is not None:
        cycle.serve(job, Desk(connection))


def _job(connection: socket.socket) -> jobs.Job | None:
    """None if the service has gone without a word."""
    connection.settimeout(_PATIENCE)
    try:
        received = Channel[Any](connection, jobs.TO_RUNNER).receive()
    except (EOFError, OSError):
        return None
    if not isinstance(received.message, jobs.Begin):
        raise ProtocolError("a runner is told its job first")
    try:
        return msgspec.msgpack.decode(received.payload(), type=jobs.Job)
    except msgspec.DecodeError as error:
        raise EgressdError(f"not a job: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
