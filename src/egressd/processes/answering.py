"""The auditor's second channel to the controller, on which it answers: how is the journal, prove this, change
the key. The first one, over which everything is recorded, never waits; this one may.

A proof takes this way: the controller takes a snapshot of the counters (events on the first channel, the last
of which is `snapshot`) and asks here, naming it. When that record, and everything before it, is on disk and
under a checkpoint, the prover is run up to that checkpoint, what it states is signed, and that it was is
recorded before it is handed over. The key stays in this process.

Nothing of this holds up the loop, which has the kernel's log to read: waiting is awaiting, large work is a
thread's or another process's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Protocol

from egressd.ipc import messages
from egressd.ipc.channel import Received, payload
from egressd.ipc.peer import Peer, PeerGone
from egressd.journal import dsse, notes, records
from egressd.journal.keys import PrivateKey, Verifier
from egressd.journal.notes import NoteError
from egressd.model.errors import EgressdError, ProtocolError, Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes.journal_file import Draft, WriterState, timestamp
from egressd.processes.journal_keys import Keys
from egressd.processes.proving import Prover

__all__ = ["Answering", "Journal"]

log = logging.getLogger(__name__)

_SNAPSHOT_WITHIN, _DISK_WITHIN = 5.0, 20.0  # seconds
_TRIES = 3  # with a key that is being changed
_SNAPSHOTS = 256  # ids remembered
_LOOK = 0.02  # seconds between two looks whether a snapshot has come


class Journal(Protocol):
    """What is asked of the journal; see journal_file.Writer."""

    def submit(self, draft: Draft) -> bool: ...
    def barrier(self) -> Future[str]: ...
    def rotate(self) -> Future[str]: ...
    def state(self) -> WriterState: ...


class Answering:
    """Answers whoever has the other end; one at a time has it, the latest."""

    def __init__(self, journal: Journal, keys: Keys, prover: Prover) -> None:
        self._journal, self._keys, self._prover = journal, keys, prover
        self._snapshots: OrderedDict[str, None] = OrderedDict()
        self._peer: Peer | None = None
        # What has happened, of this link above all, goes to the journal before a proof is made of it.
        self.settle: Callable[[Link | None], Awaitable[None]] = _nothing

    def listen(self, sock: socket.socket) -> None:
        """Answer on this socket; an older one is closed."""
        if self._peer is not None:
            self._peer.close("replaced")
        self._peer = Peer(sock, messages.TO_EVIDENCE, handler=self._asked)

    def snapshot_submitted(self, name: object) -> None:
        """The closing record of a snapshot is on its way to the disk."""
        if isinstance(name, str):
            self._snapshots[name] = None
            while len(self._snapshots) > _SNAPSHOTS:
                self._snapshots.popitem(last=False)

    async def _asked(self, peer: Peer, received: Received[Any]) -> None:
        message = received.message
        try:
            match message:
                case messages.ReadJournal():
                    peer.send(self._state(message.request))
                case messages.RotateKey():
                    peer.send(await self._rotated(message.request))
                case messages.MakeProof():
                    await self._prove(peer, message, received.payload())
        except ProtocolError as error:
            peer.close(str(error))
        except PeerGone:
            log.info("%s: whoever asked is gone", type(message).__name__)
        except Exception as error:  # a defect of ours, too: who waits for a proof keeps others from theirs
            if not isinstance(error, EgressdError | OSError):
                log.exception("%s", type(message).__name__)
            reason = error.reason if isinstance(error, Refused) else Reason.UNAVAILABLE
            with contextlib.suppress(PeerGone):
                peer.send(
                    messages.Failed(request=message.request, reason=str(reason), text=str(error)[:4096])
                )
        finally:
            received.close()

    def _state(self, request: int) -> messages.JournalState:
        return messages.JournalState(request=request, **asdict(self._journal.state()))

    async def _rotated(self, request: int) -> messages.JournalState:
        await self._on_disk(self._journal.rotate(), "the new key")
        return self._state(request)

    async def _on_disk(self, written: Future[str], what: str) -> str:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(written), _DISK_WITHIN)
        except TimeoutError:
            text = f"{what} is not on disk and signed after {_DISK_WITHIN:g} s: the journal cannot be written"
            raise Refused(Reason.UNAVAILABLE, text) from None

    # ---- proofs

    async def _prove(self, peer: Peer, asked: messages.MakeProof, facts: bytes) -> None:
        with self._prover.place():
            if asked.after:
                await self._came(asked.after)
            await self.settle(None if asked.link is None else Link(asked.link))
            key, statement, size = await self._stated(asked, facts)
            envelope, digest = await _aside(_sealed, statement, key)
            self._record(asked, digest, size)
            # Written to a memfd by a thread: a proof may be a hundred megabytes.
            with contextlib.ExitStack() as stack:
                descriptor = await _aside(stack.enter_context, payload(envelope))
                answer = messages.Payload(request=asked.request, payload_length=len(envelope))
                peer.send(answer, descriptor=descriptor)

    async def _came(self, snapshot: str) -> None:
        """The snapshot was said on the other channel, before; it may have been lost there."""
        deadline = asyncio.get_running_loop().time() + _SNAPSHOT_WITHIN
        while snapshot not in self._snapshots:
            if asyncio.get_running_loop().time() > deadline:
                text = "the counters as they are now did not reach the journal; ask again"
                raise Refused(Reason.UNAVAILABLE, text)
            await asyncio.sleep(_LOOK)

    async def _stated(self, asked: messages.MakeProof, facts: bytes) -> tuple[PrivateKey, bytes, int]:
        """(key to sign with, statement, records under it). One key has signed the checkpoint and signs the
        proof: where it was changed in between, all begins anew."""
        for _ in range(_TRIES):
            key = self._keys.current
            note = await self._on_disk(self._journal.barrier(), "the journal")
            checkpoint = notes.parse(notes.signatures(note)[0])
            statement = await self._prover.statement(asked, facts, size=checkpoint.size)
            if self._keys.current is key and _signed(note, Verifier(checkpoint.origin, key.public)):
                return key, statement, checkpoint.size
        raise Refused(Reason.UNAVAILABLE, "the signing key was changed while the proof was made; ask again")

    def _record(self, asked: messages.MakeProof, digest: str, size: int) -> None:
        fields: Mapping[str, Any] = {
            "workspace": asked.workspace,
            "link": None if asked.link is None else Link(asked.link).device,
            "digest": digest,
            "since": asked.since,
            "until": asked.until,
            "size": size,
        }
        if not self._journal.submit(Draft(timestamp(), "auditor", "proof-issued", records.bounded(fields))):
            raise Refused(Reason.UNAVAILABLE, "the journal is full: what is not recorded is not handed out")


async def _nothing(link: Link | None) -> None:
    """There is nothing to wait for."""


def _signed(note: str, verifier: Verifier) -> bool:
    try:
        return bool(notes.signers(note, [verifier]))
    except NoteError:
        return False


def _sealed(statement: bytes, key: PrivateKey) -> tuple[bytes, str]:
    """The envelope, and the digest of what is in it."""
    envelope = dsse.encode(dsse.seal(dsse.IN_TOTO, statement, [key]))
    return envelope, f"sha256:{hashlib.sha256(statement).hexdigest()}"


def _aside(work: Any, *arguments: Any) -> Awaitable[Any]:
    return asyncio.to_thread(work, *arguments)
