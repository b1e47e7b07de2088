"""The caller's end of the control socket: one request at a time, waiting for its answer.

Whoever connects is known to the daemon by SO_PEERCRED; nothing said here identifies anybody. A connection
that holds a lease is the lease: keep it open as long as the sandbox lives.

Where it breaks off without a word (`Gone`), egressd was restarted or has crashed, and knows its leases when
it is back: `Control.resume`. Nothing is imported when that happens, for egressd may have been upgraded.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH118
from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received
from egressd.model.errors import EgressdError, ProtocolError, Refused
from egressd.model.verdicts import Reason

__all__ = ["DEFAULT_RUN_DIR", "RESUME_WITHIN", "Control", "Fact", "Gone", "NotRunning", "Resumption"]

DEFAULT_RUN_DIR = "/run/egressd"
SOCKET = "control.sock"
_PATIENCE = 30.0  # seconds without an answer after which the daemon is taken for dead
_PROVING = 120.0  # the same for a proof, for which the auditor may take a minute
RESUME_WITHIN = 15.0  # seconds for which a sandbox waits for egressd, as long as egressd waits for it
_SHORTEST, _LONGEST = 0.02, 0.25  # seconds between two tries
# Times that somebody reads our `Resume` and hangs up. Killed at that moment each time it is not; an egressd
# that does not know the message does just that.
_HANG_UPS = 5
# No decision about the lease: a crowd at the door, a process that is being started.
_LATER = (Reason.LIMIT, Reason.UNAVAILABLE)
M = TypeVar("M")
Fact: TypeAlias = str | int | float | bool | None  # of a record: flat, and no more than that


class NotRunning(Refused):
    """Nobody listens: there is no egressd with this run directory now."""


class Gone(Refused):
    """The connection has ended, and nobody said why. `unread`: what we said last has certainly not been read.

    The kernel tells: who closes with something unread in its queue resets the connection (unix_release_sock),
    and what is read is read in order.
    """

    def __init__(self, text: str, *, unread: bool) -> None:
        self.unread = unread
        super().__init__(Reason.UNAVAILABLE, text)


class Control:
    """`with Control(run_dir) as control: terms = control.enter("acme")`. Raises `Refused` for every no."""

    def __init__(self, run_dir: str = DEFAULT_RUN_DIR) -> None:
        self.run_dir = run_dir
        self.channel: Channel[Any] = Channel(_connect(run_dir, patience=_PATIENCE), messages.TO_CLIENT)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    def fileno(self) -> int:
        return self.channel.fileno()

    # ---- spawning

    def enter(self, workspace: str) -> messages.Terms:
        """May I spawn there, and on what terms?"""
        self._send(messages.Enter(workspace=workspace))
        return self._expect(messages.Terms).message

    def attach(
        self,
        namespace: int,
        *,
        command: str = "",
        digest: str = "",
        quota: int | None = None,
        connections: int | None = None,
        closed: bool = False,
    ) -> None:
        """Hand over my child's network namespace; `lease` waits for the answer.

        `quota` (bytes) and `connections` (that may ever be opened) are of this sandbox alone, beside the
        workspace's own limits; a `closed` link admits nothing.
        """
        message = messages.Attach(
            command=command, digest=digest, quota=quota, connections=connections, closed=closed
        )
        self._send(message, descriptor=namespace)

    def tell(self, message: messages.Ended | messages.Attempt) -> bool:
        """What is recorded and never answered. Nobody waits for it, and a daemon that is busy misses it.
        False where the connection has ended."""
        if self.fileno() < 0:
            return False
        connection = self.channel.socket
        patience = connection.gettimeout()
        connection.settimeout(0)
        try:
            self.channel.send(message)
        except ConnectionError:
            return False
        except OSError:
            pass
        finally:
            connection.settimeout(patience)
        return True

    def lease(self) -> messages.Lease:
        return self._expect(messages.Lease).message

    def spent(self) -> messages.Spent:
        """What my link has counted until now, and which of its budgets have refused something. After
        `lease`."""
        self._send(messages.ReadSpent())
        return self._expect(messages.Spent).message

    def testify(self, event: str, fields: Mapping[str, Fact]) -> None:
        """Put on record what I say happened: from root and the brokers of the configuration. After `enter` of
        that workspace, after `lease` of that sandbox. Handed over when this returns; `Refused` if not."""
        self._send(messages.Testify(event=event, fields=dict(fields)))  # type: ignore[arg-type]
        self._expect(messages.Recorded)

    def ended(self) -> str:
        """Call when the connection is readable though nothing was asked: why the lease is over. `Gone` where
        nobody says that it is."""
        try:
            message = _received(self.channel).message
        except ProtocolError as error:
            return f"egressd sent something unintelligible: {error}"
        except OSError as error:
            return f"egressd cannot be heard: {error.strerror}"
        if isinstance(message, messages.Revoked | messages.Refusal):
            return message.text
        return f"egressd sent {type(message).__name__} unasked"

    def last_word(self) -> Refused:
        """Once the connection has ended: what was said last, and may lie there unread. `Gone` for nothing."""
        with contextlib.suppress(EgressdError, OSError):
            self.channel.socket.settimeout(0)
            message = _received(self.channel).message
            if isinstance(message, messages.Revoked | messages.Refusal):
                return Refused(Reason.UNAVAILABLE, message.text)
        return Gone("egressd closed the connection without a word", unread=True)

    def resume(self, namespace: int, link: int) -> Resumption:
        """After `Gone`: ask for the same lease again, on another connection. `namespace` is the network
        namespace that was handed over; it stays the caller's to close, and later than the `Resumption`."""
        self.close()
        return Resumption(self, namespace, link)

    # ---- verbs that read, and apply

    def for_user(self, uid: int, gids: Iterable[int]) -> None:
        """Before anything else, from root or the HTTP API's account: ask for that user. Never answered; where
        it is not allowed the next question is refused."""
        self._send(messages.ForUser(uid=uid, gids=tuple(gids)))

    def ask(self, what: str, *, workspace: str | None = None) -> Any:
        """One of "status", "counters", "ruleset", "policy", "diff", "workspaces"; the JSON document."""
        return self._answer(messages.Ask(what=what, workspace=workspace))  # type: ignore[arg-type]

    def why(self, workspace: str, subject: str) -> Any:
        return self._answer(messages.Why(workspace=workspace, subject=subject))

    def select_route(self, workspace: str, route: str) -> Any:
        return self._answer(messages.SelectRoute(workspace=workspace, route=route))

    def apply(self, *, dry_run: bool = False, why: str = "", about: str = "") -> Any:
        """Read the policies again and make them so; with `dry_run`, say what would change. `why` is put on
        record, with changes of the workspace `about` alone if it is about one."""
        return self._answer(messages.Apply(dry_run=dry_run, why=why, about=about))

    def prove(
        self,
        workspace: str,
        *,
        link: int | None = None,
        since: str | None = None,
        until: str | None = None,
        continues: int | None = None,
    ) -> dict[str, Any]:
        """Evidence of a workspace, or of one sandbox of it that has ended: the DSSE envelope. Times as a
        record spells them; `continues` is the size of an earlier checkpoint."""
        self.channel.socket.settimeout(_PROVING)
        envelope: dict[str, Any] = self._answer(
            messages.Prove(workspace=workspace, link=link, since=since, until=until, continues=continues)
        )
        return envelope

    def change_key(self) -> Any:
        """A new signing key; the same document as `ask("journal")`."""
        return self._answer(messages.ChangeKey())

    def _answer(self, request: Any) -> Any:
        self._send(request)
        return msgspec.json.decode("".join(self._parts()))

    def _parts(self) -> Iterator[str]:
        while True:
            received: Received[Any] = self._expect(messages.Part, messages.Answer)
            if isinstance(received.message, messages.Answer):
                yield received.payload().decode()
                return
            yield received.message.text
            if received.message.last:
                return

    # ---- both ways

    def _send(self, message: Any, *, descriptor: int | None = None) -> None:
        try:
            if self.fileno() < 0:
                raise BrokenPipeError
            self.channel.send(message, descriptor=descriptor)
        except ConnectionError:
            raise self.last_word() from None
        except OSError as error:
            raise Refused(Reason.UNAVAILABLE, f"egressd does not take requests: {error.strerror}") from error

    def _expect(self, *kinds: type[M]) -> Received[M]:
        try:
            received = _received(self.channel)
        except OSError as error:
            waited = f"no answer from egressd within {self.channel.socket.gettimeout():g} s"
            text = waited if isinstance(error, BlockingIOError | TimeoutError) else str(error)
            raise Refused(Reason.UNAVAILABLE, text) from error
        message = received.message
        if isinstance(message, kinds):
            return received
        received.close()
        if isinstance(message, messages.Refusal):
            raise Refused(Reason.of(message.reason), message.text)
        if isinstance(message, messages.Revoked):
            raise Refused(Reason.UNAVAILABLE, message.text)
        raise ProtocolError(f"{type(message).__name__} is no answer to this")


class Resumption:
    """A lease on its way back, in somebody's poll. Nothing here waits: `step` is to be called when something
    is ready, and after `pause` seconds at the latest."""

    def __init__(self, control: Control, namespace: int, link: int) -> None:
        self._control, self._namespace, self._link = control, namespace, link
        self.began = time.monotonic()
        self._end = self.began + RESUME_WITHIN
        self._next, self._wait = self.began, _SHORTEST
        self._asking: Channel[Any] | None = None  # the connection on which it was asked for
        self._sent, self._hung_up = False, 0
        self._put_off = ""  # what was said instead of an answer

    @property
    def pause(self) -> float:
        return max(0.0, (self._end if self._asking else min(self._next, self._end)) - time.monotonic())

    def register(self, poll: select.poll) -> None:
        if self._asking is not None:
            poll.register(self._asking, select.POLLIN)

    def close(self) -> None:
        if self._asking is not None:
            self._asking.close()
            self._asking = None

    def step(self, ready: set[int], poll: select.poll) -> bool:
        """Whether the lease is there again: `control` then speaks over the new connection, which `poll`
        knows. `Refused` if it will not be."""
        asking = self._asking
        if asking is not None and asking.fileno() in ready and self._heard(asking, poll):
            return True
        now = time.monotonic()
        if now >= self._end:
            said = f" (it said: {self._put_off})" if self._put_off else ""
            text = f"egressd has ended, and did not come back within {RESUME_WITHIN:g} s{said}"
            raise Refused(Reason.UNAVAILABLE, text)
        if self._asking is None and now >= self._next:
            self._ask(poll)
        return False

    def _ask(self, poll: select.poll) -> None:
        """Its listening socket may outlive a daemon: then this waits there for the next one. Whatever fails
        here, descriptors among it, is tried again."""
        try:
            channel: Channel[Any] = Channel(_connected(self._control.run_dir, patience=0), messages.TO_CLIENT)
        except OSError:
            self._put_back()
            return
        self._sent = False
        try:
            channel.send(messages.Resume(link=self._link), descriptor=self._namespace)
            self._sent = True
        except ConnectionError:
            pass  # whoever turns away says so before
        except OSError:
            channel.close()
            self._put_back()
            return
        self._asking = channel
        poll.register(channel, select.POLLIN)

    def _put_back(self) -> None:
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LONGEST)

    def _again(self, poll: select.poll) -> None:
        assert self._asking is not None
        poll.unregister(self._asking)
        self.close()
        self._put_back()

    def _heard(self, asking: Channel[Any], poll: select.poll) -> bool:
        try:
            received = _received(asking)
        except BlockingIOError:
            return False
        except Gone as gone:
            self._hung_up += self._sent and not gone.unread
            if self._hung_up >= _HANG_UPS:
                text = "egressd was restarted, and does not give leases back: it hangs up when it is asked"
                raise Refused(Reason.UNAVAILABLE, text) from None
            self._again(poll)
            return False
        except OSError:
            self._again(poll)
            return False
        except ProtocolError as error:
            text = f"egressd was restarted, and sends something unintelligible: {error}"
            raise Refused(Reason.PROTOCOL, text) from error
        received.close()
        return self._judged(received.message, poll)

    def _judged(self, message: Any, poll: select.poll) -> bool:
        if isinstance(message, messages.Refusal) and Reason.of(message.reason) in _LATER:
            self._put_off = message.text
            self._again(poll)
            return False
        if isinstance(message, messages.Refusal | messages.Revoked):
            text = f"egressd was restarted, and does not give the lease back: {message.text}"
            raise Refused(Reason.UNAVAILABLE, text)
        if not isinstance(message, messages.Lease) or message.link != self._link:
            text = "egressd was restarted, and offers something else than the sandbox's lease"
            raise Refused(Reason.PROTOCOL, text)
        assert self._asking is not None
        self._asking.socket.settimeout(_PATIENCE)
        self._control.channel, self._asking = self._asking, None
        return True


def _received(channel: Channel[Any]) -> Received[Any]:
    """`Gone` at the end. A reset is told before what was said before it."""
    try:
        return channel.receive()
    except EOFError:
        raise Gone("egressd closed the connection without an answer", unread=False) from None
    except ConnectionError:
        with contextlib.suppress(EOFError, OSError):
            return channel.receive()
        raise Gone("egressd closed the connection, and has not read what it was told", unread=True) from None


def _connect(run_dir: str, *, patience: float) -> socket.socket:
    path = os.path.join(run_dir, SOCKET)
    try:
        return _connected(run_dir, patience=patience)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(
            Reason.UNAVAILABLE, f"egressd is not running (nobody listens at {path}): systemctl start egressd"
        ) from None
    except OSError as error:
        raise Refused(Reason.UNAVAILABLE, f"{path} cannot be connected to: {error.strerror}") from error


def _connected(run_dir: str, *, patience: float) -> socket.socket:
    """OSError; EAGAIN where too many wait to be let in, and go on waiting for `patience` seconds."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        # Python's own time-out makes the socket non-blocking, and connect(2) then fails at once on a full
        # backlog; the kernel's waits for room (unix_stream_connect in net/unix/af_unix.c).
        connection.setblocking(patience > 0)
        seconds = math.floor(patience)
        timeval = struct.pack("@ll", seconds, int((patience - seconds) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        connection.connect(os.path.join(run_dir, SOCKET))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bytes(len(timeval)))
        connection.settimeout(patience)
    except BaseException:
        connection.close()
        raise
    return connection
