"""The caller's end of the control socket: one request at a time, waiting for its answer.

Whoever connects is known to the daemon by SO_PEERCRED; nothing said here identifies anybody. A connection
that holds a lease is the lease: keep it open as long as the sandbox lives.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH118
from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received
from egressd.model.errors import ProtocolError, Refused
from egressd.model.verdicts import Reason

__all__ = ["DEFAULT_RUN_DIR", "Control", "Fact", "NotRunning"]

DEFAULT_RUN_DIR = "/run/egressd"
SOCKET = "control.sock"
_PATIENCE = 30.0  # seconds without an answer after which the daemon is taken for dead
_PROVING = 120.0  # the same for a proof, for which the auditor may take a minute
M = TypeVar("M")
Fact: TypeAlias = str | int | float | bool | None  # of a record: flat, and no more than that


class NotRunning(Refused):
    """Nobody listens: there is no egressd with this run directory now."""


class Control:
    """`with Control(run_dir) as control: terms = control.enter("acme")`. Raises `Refused` for every no."""

    def __init__(self, run_dir: str = DEFAULT_RUN_DIR) -> None:
        self.run_dir = run_dir
        self.channel: Channel[Any] = Channel(_connect(run_dir), messages.TO_CLIENT)

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

    def tell(self, message: messages.Ended | messages.Attempt) -> None:
        """What is recorded and never answered. Nobody waits for it, and a daemon that is gone or busy misses
        it."""
        connection = self.channel.socket
        patience = connection.gettimeout()
        connection.settimeout(0)
        with contextlib.suppress(OSError):
            self.channel.send(message)
        connection.settimeout(patience)

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
        """Call when the connection is readable though nothing was asked: why the lease is over."""
        try:
            message = self.channel.receive().message
        except (EOFError, OSError):
            return "egressd has ended, and with it the sandbox's lease"
        except ProtocolError as error:
            return f"egressd sent something unintelligible: {error}"
        if isinstance(message, messages.Revoked | messages.Refusal):
            return message.text
        return f"egressd sent {type(message).__name__} unasked"

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
            self.channel.send(message, descriptor=descriptor)
        except OSError as error:
            raise Refused(Reason.UNAVAILABLE, f"egressd does not take requests: {error.strerror}") from error

    def _expect(self, *kinds: type[M]) -> Received[M]:
        try:
            received = self.channel.receive()
        except EOFError:
            raise Refused(Reason.UNAVAILABLE, "egressd closed the connection without an answer") from None
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


def _connect(run_dir: str) -> socket.socket:
    path = os.path.join(run_dir, SOCKET)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_PATIENCE)
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NotRunning(
            Reason.UNAVAILABLE, f"egressd is not running (nobody listens at {path}): systemctl start egressd"
        ) from None
    except OSError as error:
        connection.close()
        raise Refused(Reason.UNAVAILABLE, f"{path} cannot be connected to: {error.strerror}") from error
    return connection
