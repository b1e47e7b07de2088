"""What brokers put on record about requests: who may, how much, and in which order.

A broker decides what a sandbox is shown; egressd does not, and records its word as that. What is certain is
who said it, of which workspace and over which link, when, and before or after what else. A broker that was
taken over may lie about requests of its own workspaces, and no more: these events and no others
(`journal.testimony`), of a workspace it has entered, of a sandbox it holds itself, of one request each, and
so many a second.

Nobody waits for the auditor. A record that it does not take is counted as lost, and the broker is answered.
"""

from __future__ import annotations

import asyncio
import collections
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from egressd.ipc import messages
from egressd.journal import testimony
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes.leases import Sandbox
from egressd.processes.members import Caller
from egressd.processes.spawn_refusals import SpawnRefusals

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["BURST", "PER_SECOND", "Said", "Testifying"]

# Of one account. Ten requests a second with forty records each are 400. A long record counts as several: it
# is bytes that keep the auditor, and fill the disk.
PER_SECOND, BURST = 1000, 8192
_OCTETS = 8192  # of a record that counts as one
_REMEMBERED = 65_536  # links, as many as the controller remembers ended ones
# Half of the channel to the auditor is for who cannot wait (ritual.Auditing.offer); we can, but not for long.
_PATIENCE, _PAUSE = 0.5, 0.005  # seconds
_TOLD_WITHIN = 1.0  # seconds


@dataclass(slots=True)
class Said:
    """What one connection has said while it held its sandbox."""

    request: str = ""
    events: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Counts:
    """Of one workspace, since the controller started: for metrics."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    documents: int = 0
    undestroyed: int = 0
    leftovers: int = 0


@dataclass(slots=True)
class _Bucket:
    """Records that an account may still have recorded at `since`; and whether its next one is waited with."""

    left: float
    since: float
    patient: bool = True


class Testifying:
    """`later` is an event loop's `call_later`."""

    def __init__(
        self,
        controller: Controller,
        *,
        later: Callable[[float, Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller, self._clock = controller, clock
        self._refused = SpawnRefusals(controller.auditing.record, later=later, event=testimony.REFUSED)
        self._buckets: dict[int, _Bucket] = {}
        self._lost, self._later = 0, later
        self._askers: collections.OrderedDict[Link, int] = collections.OrderedDict()
        self.counts: dict[str, Counts] = {}
        self.refusals: collections.Counter[str] = collections.Counter()  # by reason

    async def hear(
        self,
        message: messages.Testify,
        *,
        caller: Caller,
        workspace: str | None,
        sandbox: Sandbox | None,
        said: Said,
    ) -> None:
        """Record it, or Refused. `workspace`: the one that was entered; `sandbox`: the one that is held."""
        try:
            entered = self._check(message, caller, workspace, sandbox, said)
            if sandbox is not None:
                said.events.add(message.event)
                said.request = said.request or str(message.fields.get("request") or "")
                if message.event not in testimony.BY_HOLDERS:
                    self._keep_private(sandbox)
                if message.event == testimony.DECIDED and not sandbox.closed:
                    await self._check_unused(sandbox)
        except Refused as refused:
            self._refuse(caller, workspace, message, refused)
            raise
        self._count(entered, message)
        own: dict[str, Any] = {"workspace": entered, "broker_uid": caller.uid}
        if sandbox is not None:
            own.update(link=sandbox.link.device, boot=self._controller.boot)
        await self._put(message.event, {**message.fields, **own}, self._buckets[caller.uid])

    def close(self) -> None:
        """What is still counted is recorded."""
        self._refused.drain()
        self._tell_lost()

    # ---- who, and what

    def _check(
        self,
        message: messages.Testify,
        caller: Caller,
        workspace: str | None,
        sandbox: Sandbox | None,
        said: Said,
    ) -> str:
        holder = message.event in testimony.BY_HOLDERS and sandbox is not None
        if not holder and not self._is_broker(caller):
            remedy = "list it under `brokers:` in egressd.yaml, or ask as one that is"
            raise Refused(Reason.MEMBER, f"uid {caller.uid} is no broker whose word is recorded: {remedy}")
        if workspace is None:
            raise Refused(Reason.PROTOCOL, "a record is of a workspace: enter it first")
        if text := testimony.wrong(message.event, message.fields):
            raise Refused(Reason.PROTOCOL, text)
        if text := _out_of_turn(message, sandbox, said):
            raise Refused(Reason.PROTOCOL, text)
        if not self._may_record(caller.uid, 1 + len(json.dumps(message.fields)) // _OCTETS):
            text = f"more than {PER_SECOND} records a second of uid {caller.uid}: ask again in a moment"
            raise Refused(Reason.LIMIT, text)
        return workspace

    def _is_broker(self, caller: Caller) -> bool:
        return caller.uid == 0 or self._controller.config.is_broker(caller.uid)

    async def _check_unused(self, sandbox: Sandbox) -> None:
        """A flow is on record when it has ended: one that is still open would look as if it came later."""
        packets, _ = (await self._controller.spent(sandbox)).counters.get("ok", (0, 0))
        if packets:
            text = f"{packets} packets of this sandbox were let out: what it is shown is decided before that"
            raise Refused(Reason.PROTOCOL, text)

    def _may_record(self, uid: int, cost: int) -> bool:
        """Take so many from the account's bucket. There are as many buckets as accounts that are brokers."""
        now = self._clock()
        bucket = self._buckets.setdefault(uid, _Bucket(BURST, now))
        bucket.left = min(BURST, bucket.left + (now - bucket.since) * PER_SECOND)
        bucket.since = now
        if bucket.left < cost:
            return False
        bucket.left -= cost
        return True

    def _refuse(
        self, caller: Caller, workspace: str | None, message: messages.Testify, refused: Refused
    ) -> None:
        self.refusals[refused.reason.value] += 1
        fields = {"pid": caller.pid, "workspace": workspace, "told": message.event, "text": str(refused)}
        self._refused.add(caller.uid, refused.reason.value, workspace, fields)

    # ---- who may see it

    def _keep_private(self, sandbox: Sandbox) -> None:
        self._askers[sandbox.link] = sandbox.caller.uid
        self._askers.move_to_end(sandbox.link)
        if len(self._askers) > _REMEMBERED:
            self._askers.popitem(last=False)

    def recall(self, link: Link, uid: int) -> None:
        """As a controller before this one knew."""
        self._askers[link] = uid

    def asker(self, link: Link) -> int | None:
        """Whose receipt this link's is, if it is not every member's."""
        return self._askers.get(link)

    def is_of_request(self, link: Link) -> bool:
        return link in self._askers

    def may_see_receipt(self, link: Link, uid: int) -> bool:
        """The receipt of a sandbox that somebody's request ran in says what for: it is the broker's, who
        hands it to the asker. Another member of the workspace is told that there is none."""
        return self._askers.get(link, uid) == uid

    # ---- numbers

    def _count(self, workspace: str, message: messages.Testify) -> None:
        counts, fields = self.counts.setdefault(workspace, Counts()), message.fields
        if message.event == testimony.DECIDED:
            counts.documents += _number(fields.get("cleared"))
        elif message.event == testimony.ENDED:
            counts.outcomes[_outcome(fields)] += 1
            counts.undestroyed += fields.get("destroyed") is not True
        elif message.event == "request-refused":
            counts.outcomes["refused"] += 1
        elif message.event == "leftovers-removed":
            counts.leftovers += _number(fields.get("count"))

    def document(self, workspaces: Iterable[str]) -> dict[str, Any]:
        """For metrics: nothing of what was not shown, since who reads them is not asked who they are. Where
        there are brokers, of every workspace from the beginning."""
        brokers = self._controller.config.broker_uids()
        told = {
            name: self.counts.get(name, Counts()) for name in workspaces if brokers or name in self.counts
        }
        return {
            "workspaces": {name: msgspec.to_builtins(counts) for name, counts in told.items()},
            "refused": dict(self.refusals),
        }

    # ---- recording

    async def _put(self, event: str, fields: dict[str, Any], bucket: _Bucket) -> None:
        """Hand it over, in order: a connection's next message is read after this one. Once the auditor was
        waited for in vain, nobody of that account waits until it takes something of theirs again."""
        auditing = self._controller.auditing
        message = messages.Event(process=auditing.process, event=event, fields=fields)
        end = self._clock() + (_PATIENCE if bucket.patient else 0)
        while not auditing.offer(message):
            if self._clock() >= end:
                bucket.patient = False
                self._lose()
                return
            await asyncio.sleep(_PAUSE)
        bucket.patient = True

    def _lose(self) -> None:
        """One more. Told at most once a second: word of each would fill the half that is not ours."""
        if not self._lost:
            self._later(_TOLD_WITHIN, self._tell_lost)
        self._lost += 1

    def _tell_lost(self) -> None:
        self._controller.auditing.lost += self._lost
        self._lost = 0
        self._controller.auditing.flush()


def _out_of_turn(message: messages.Testify, sandbox: Sandbox | None, said: Said) -> str:
    """A sandbox is of one request, decided once; what is said of it is said over its own connection."""
    event, request = message.event, message.fields.get("request")
    if sandbox is None:
        once = event in (testimony.ASKED, testimony.DECIDED, testimony.SELFTEST)
        return f"{event} is said of a sandbox: attach it first" if once else ""
    if request is not None and said.request not in ("", request):
        return f"this sandbox is of request {said.request}"
    if event in _ONCE and event in said.events:
        return f"{event} was said of this sandbox"
    if event == testimony.DECIDED and (message.fields["network"] == "none") != sandbox.closed:
        return f"network: this sandbox was started {'without' if sandbox.closed else 'with'} one"
    return ""


_ONCE: Final = frozenset({testimony.ASKED, testimony.DECIDED, testimony.ENDED, testimony.SELFTEST})


def _outcome(fields: dict[str, Any]) -> str:
    """`stopped`: it did not end by itself."""
    if fields.get("why"):
        return "stopped"
    return "done" if fields.get("status") == 0 else "failed"


def _number(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
