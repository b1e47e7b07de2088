"""A request from its token to its receipt. Knows no HTTP, and touches no document.

The steps of an inference: who asks (`identify`), how often and how much at once (`pace`, `place`), what it
may see (`_decide`), a runner that copies it (`_conduct`), once more whether that holds (`_still_holds`), and
only then "go". Deciding is the same sequence of operations whatever there is to be found, and what comes of
it is held back until a time that depends on what was asked for alone (`told_at`), so that neither the answer
nor when it comes tells a document that is not there from one that may not be seen: `NotThere` is both, for
workspaces, other people's inferences and documents alike.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from egressd.access.authorise import authorise, judge
from egressd.access.documents import Asker, Document, Rules
from egressd.access.principals import Identity
from egressd.access.roles import Right, Role, may
from egressd.broker import config as configuration
from egressd.broker.config import BrokerConfig, WorkspaceConfig
from egressd.broker.identity.keyring import MAX_WAITING
from egressd.broker.inferences import Inference, Inferences, Shown, State
from egressd.broker.rates import Buckets, Places
from egressd.broker.runners.conversation import Runners, Talk
from egressd.broker.runners.jobs import Copy, Finished, Job, Limits, Output, Projected, Started
from egressd.broker.store.store import Snapshot
from egressd.broker.web.requests import Fault, Faults, NewInference, lower
from egressd.broker.witness import Note
from egressd.journal.records import stamp
from egressd.model.errors import EgressdError, Refused
from egressd.model.verdicts import Reason
from egressd.policy.units import size_text
from egressd.sandbox.control import Control
from egressd.vault import manifest

__all__ = ["Ending", "NotAllowed", "NotThere", "NotYet", "Service", "Store", "Verifier", "Witness"]

log = logging.getLogger("broker")
T = TypeVar("T")
_NUMBER = re.compile(r"r-[0-9a-z]{26}")
_PAGE = 4096  # of a tmpfs
_ROOM = 16 << 20  # of a scratch, beside the copies: the manifest, and what a command that runs long may need
_STOPPING = 30.0  # seconds for a runner to end its sandbox, then it is hung up on
_PROOFS = 2  # at once
_READS = 10  # for each thing that may be asked
_SLOT = (
    0.010  # seconds after which a decision is told, and for each document that was asked for as many more:
)
_SLOT_EACH = 25e-6  # one that is stored takes 10 us to be found and judged, one that is not takes 1
_TOLD = 8  # files that a record of a refusal names
_COULD_NOT = "it could not be run; the reason is on record under its number"
_MOVED = "what was decided about it does not hold any more: ask again"


class NotThere(Exception):
    """There is no such thing, or not for who asks: never told apart."""


class NotAllowed(Exception):
    """To a member, of a workspace they see: their role lacks the right."""


class NotYet(Exception):
    """It cannot be had now; later, perhaps."""


class Ending(Exception):
    """The service is ending, and begins nothing new."""


class Verifier(Protocol):
    def verify(self, token: str, *, nonce: str = "") -> Identity: ...


class Store(Protocol):
    def snapshot(self, workspace: str, identity: Identity, candidates: Sequence[str], /) -> Snapshot: ...

    def generation(self, workspace: str, /) -> int: ...


class Witness(Protocol):
    def refusal(self, note: Note, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What may be shown, and how it will be run."""

    role: Role
    documents: tuple[Document, ...]
    discarded: int
    generation: int
    offered: configuration.Inference
    limits: Limits
    clearance: str = ""  # the asker's; for the record

    def same(self, other: Decision) -> bool:
        """Whether copies made for the one are right for the other."""
        return (self.role, _copies(self.documents)) == (other.role, _copies(other.documents))


class Denied(Exception):
    """`error` is what is answered; `text` works out what is recorded."""

    def __init__(self, error: Exception, code: int, text: Callable[[], str]) -> None:
        self.error, self.code, self.text = error, code, text


class Service:
    """Everything it needs from elsewhere comes in here. `clock` is monotonic seconds, `now` Unix time."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        verifier: Verifier,
        store: Store,
        runners: Runners,
        witness: Witness,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        control: Callable[[str], Any] = Control,
    ) -> None:
        self.config = config
        self._verifier, self._store, self._runners, self._witness = verifier, store, runners, witness
        self._clock, self._now, self._control = clock, now, control
        limits = config.limits
        self.inferences = Inferences(keep=config.keep, most=limits.kept, clock=clock)
        most, per = limits.rate
        self._asking, self._reading = Buckets(most=most, per=per), Buckets(most=_READS * most, per=per)
        self._places = Places(per_user=limits.per_user, at_once=limits.at_once)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._talks: dict[str, tuple[Talk, asyncio.Timeout]] = {}
        self._ending = False
        # Each kind of waiting has threads of its own: a provider that does not answer stops no decision.
        self._identity_threads = concurrent.futures.ThreadPoolExecutor(4 * MAX_WAITING, "identity")
        self._threads = concurrent.futures.ThreadPoolExecutor(8, "decision")
        # One: a body may take thirty times its size while it is read, and that of strangers, too.
        self._body_thread = concurrent.futures.ThreadPoolExecutor(1, "body")
        self._proofs = asyncio.Semaphore(_PROOFS)

    # ---- who asks, how often

    async def identify(self, token: str, nonce: str = "") -> Identity:
        """Whatever the verifier raises."""
        return await self._in(self._identity_threads, lambda: self._verifier.verify(token, nonce=nonce))

    def pace(self, identity: Identity, *, reading: bool = False) -> None:
        """TooMany. Who reads may do so more often, and does not use up what they may ask."""
        buckets = self._reading if reading else self._asking
        buckets.take(identity.user, now=self._clock())

    @contextlib.contextmanager
    def place(self, identity: Identity) -> Iterator[Place]:
        """One of those who may run something; TooMany. Given back at the end unless an inference has it."""
        if self._ending:
            raise Ending
        place = Place(self._places, identity.user)
        try:
            yield place
        finally:
            if not place.kept:
                place.give_back()

    async def decided(self, work: Callable[[], T]) -> T:
        """In a thread of those that decide: the store is read there."""
        return await self._in(self._threads, work)

    async def read(self, work: Callable[[], T]) -> T:
        """What somebody sent, one after another."""
        return await self._in(self._body_thread, work)

    async def _in(self, threads: concurrent.futures.Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def served(self, workspace: str) -> str:
        """The name to look up: of one that is not served, a name that nothing has. The same is done."""
        return workspace if workspace in self.config.workspaces else ""

    # ---- a new inference

    async def begin(self, identity: Identity, asked: NewInference, place: Place) -> Inference:
        """NotThere, NotAllowed, Faults; `Refused` where something that is needed does not work."""
        if self._ending:
            raise Ending
        try:
            inference, decision = await self._decided_in_time(lambda: self._prepare(identity, asked), asked)
        except Denied as denied:
            self._note(identity, asked.workspace, asked.action, denied.code, denied.text)
            raise denied.error from None
        if self._ending:
            raise Ending
        self.inferences.add(inference)
        place.kept = True
        task = asyncio.create_task(self._run(inference, identity, asked, decision, place))
        self._tasks[inference.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(inference.id, None))
        return inference

    async def _decided_in_time(self, work: Callable[[], T], asked: NewInference) -> T:
        """As `decided`; what comes of it, an error too, comes at the time of `told_at`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await self.decided(work)
        finally:
            now = loop.time()
            await asyncio.sleep(told_at(began, now, len(asked.files) + len(asked.candidates)) - now)

    def _prepare(self, identity: Identity, asked: NewInference) -> tuple[Inference, Decision]:
        decision = self._decide(identity, asked)
        job = self._job(identity, asked, decision)
        inference = Inference(
            id=job.id,
            owner=identity.user,
            workspace=asked.workspace,
            action=asked.action,
            role=str(decision.role),
            job=job,
            files=tuple(Shown(one.id, one.digest, one.size) for one in decision.documents),
            network=job.network,
            asked=self._stamp(),
        )
        return inference, decision

    def _decide(self, identity: Identity, asked: NewInference) -> Decision:
        """Raises `Denied`. The store is read and every document judged before anything is looked at that
        could end it early."""
        wanted = (*asked.files, *asked.candidates)
        snapshot = self._store.snapshot(self.served(asked.workspace), identity, wanted)
        cleared = authorise(snapshot.asker, wanted, snapshot.documents, snapshot.rules)
        shown = {document.id for document in cleared.documents}
        missing = [name for name in asked.files if name not in shown]
        role = snapshot.asker.role
        if not may(role, Right.ASK):
            raise Denied(NotThere(), 404, lambda: "the asker is no member of the workspace")
        workspace = self.config.workspaces[asked.workspace]
        offered = _offered(workspace, asked, role)
        try:
            limits = lower(_bounded(offered.limits, self.config.limits.output), asked.limits)
        except Faults as error:
            raise Denied(error, 422, error.__str__) from None
        if missing:
            # No more of it than is told: a note may wait for long.
            some = {name: snapshot.documents.get(name) for name in missing[:_TOLD]}
            told = functools.partial(_findings, len(missing), some, snapshot.asker, snapshot.rules)
            raise Denied(NotThere(), 404, told)
        _refuse_too_much(cleared.documents, self.config.limits.bytes)
        return Decision(
            role,
            cleared.documents,
            cleared.discarded,
            snapshot.generation,
            offered,
            limits,
            snapshot.asker.clearance,
        )

    def _job(self, identity: Identity, asked: NewInference, decision: Decision) -> Job:
        copies = _copies(decision.documents)
        return Job(
            id=_new_id(),
            workspace=asked.workspace,
            command=decision.offered.command,
            copies=copies,
            asker=identity.user,
            role=str(decision.role),
            discarded=decision.discarded,
            action=asked.action,
            stdin=asked.input,
            environment={name: _value(text) for name, text in decision.offered.environment.items()},
            bind_ro=decision.offered.bind_ro,
            network="none" if "none" in (asked.network, decision.offered.network) else "policy",
            limits=decision.limits,
            run_dir=self.config.run_dir,
            scratch=self.config.scratch,
            scratch_size=_ROOM + sum(copy.size + _PAGE for copy in copies),
            scratch_encrypted=self.config.scratch_encrypted,
            preflight=self.config.preflight,
            generation=decision.generation,
            clearance=decision.clearance,
            email=identity.email,
        )

    # ---- its run

    async def _run(
        self, inference: Inference, identity: Identity, asked: NewInference, decision: Decision, place: Place
    ) -> None:
        """Ends with the inference over, whatever happens."""
        try:
            await self._conduct(inference, identity, asked, decision)
        except EOFError:
            self._lost(inference, "its runner ended without a word")
        except TimeoutError:
            self._lost(inference, "its runner did not end it in time, and was hung up on")
        except (EgressdError, OSError) as error:
            self._refuse(inference, str(error))
        except asyncio.CancelledError:
            self._lost(inference, "the service ended")
            raise
        except Exception:
            log.exception("%s", inference.id)
            self._lost(inference, "the service failed")
        finally:
            place.give_back()
            inference.job = None  # the input, and secrets in its environment
            inference.over_since = self._clock()
            inference.ended = inference.ended or self._stamp()
            inference.change(inference.state if inference.state.over else State.ENDED)
            asyncio.get_running_loop().call_later(self.config.keep + 1, self.inferences.tidy)

    async def _conduct(
        self, inference: Inference, identity: Identity, asked: NewInference, decision: Decision
    ) -> None:
        assert inference.job is not None
        inference.change(State.PROJECTING)
        talk = await self._runners.begin(inference.job)
        try:
            async with asyncio.timeout(None) as deadline:
                self._talks[inference.id] = (talk, deadline)
                if inference.stop:
                    self._say_stop(inference)
                await self._listen(
                    inference, talk, lambda made: self._may_go(inference, identity, asked, decision, made)
                )
        finally:
            self._talks.pop(inference.id, None)
            talk.close()

    async def _listen(
        self, inference: Inference, talk: Talk, may_go: Callable[[Projected], Awaitable[bool]]
    ) -> None:
        while True:
            message = await talk.hear()
            match message:
                case Projected():
                    if not inference.stop and await may_go(message):
                        inference.change(State.PROJECTING)
                        if not inference.stop:  # somebody may have wanted that meanwhile
                            talk.go()
                case Started():
                    inference.link, inference.policy = message.link, message.policy
                    inference.started = self._stamp()
                    inference.change(State.RUNNING)
                case Output():
                    inference.write(message.stream, message.data, most=self.config.limits.output)
                case Finished():
                    self._finish(inference, message)
                    return

    async def _may_go(
        self, inference: Inference, identity: Identity, asked: NewInference, decision: Decision,
        made: Projected,
    ) -> bool:  # fmt: skip
        """Whether the copies are those that were decided on, and these are still the right ones."""
        right = await self.decided(lambda: manifest.digest_of(manifest.written(inference.files)))
        if made.manifest == right:
            inference.manifest = right
            return await self._still_holds(inference, identity, asked, decision)
        has = ascii(made.manifest[:80])
        why = f"its runner copied something else than what was decided: {right} is right, it has {has}"
        log.error("%s: %s", inference.id, why)
        self._note(identity, asked.workspace, asked.action, 500, lambda: why, request=inference.id)
        inference.refused = why
        self.stop(inference, _COULD_NOT)
        return False

    async def _still_holds(
        self, inference: Inference, identity: Identity, asked: NewInference, decision: Decision
    ) -> bool:
        """Copying took its time: roles, lists and barriers may have changed since. If it does not hold, the
        runner has been told to stop."""
        inference.change(State.DECIDING)
        workspace = self.served(asked.workspace)
        try:
            if await self.decided(lambda: self._store.generation(workspace)) == decision.generation:
                return True
            again = await self._decided_in_time(lambda: self._decide(identity, asked), asked)
        except Denied as denied:
            self._note(
                identity, asked.workspace, asked.action, denied.code, denied.text, request=inference.id
            )
        except EgressdError as error:
            log.warning("%s: what was decided cannot be confirmed: %s", inference.id, error)
        else:
            if again.same(decision):
                return True
        inference.refused = _MOVED
        self.stop(inference, _MOVED)
        return False

    def _finish(self, inference: Inference, finished: Finished) -> None:
        inference.status, inference.hit = finished.status, finished.hit
        inference.why = inference.stop or finished.why
        inference.destroyed = finished.destroyed
        inference.counters, inference.seconds = dict(finished.counters), dict(finished.seconds)
        inference.tokens, inference.cost = finished.tokens, finished.cost
        inference.state = State.ENDED
        if inference.refused:  # by us, after the copies were made
            inference.state = State.REFUSED
        elif finished.refused and not inference.stop:
            self._refuse(inference, finished.refused)

    def _refuse(self, inference: Inference, reason: str) -> None:
        log.warning("%s was not run: %s", inference.id, reason)
        inference.refused, inference.why = reason, inference.stop or _COULD_NOT
        inference.state = State.REFUSED
        if inference.status is None:
            inference.status = 125

    def _lost(self, inference: Inference, why: str) -> None:
        """Nobody said how it ended. Its end of the channel is gone, and with it the sandbox; that this was
        looked for, nobody can say."""
        inference.status, inference.why = 125, inference.stop or why
        inference.state = State.ENDED

    # ---- asking for it afterwards

    async def find(self, identity: Identity, id: str, action: str) -> Found:
        """NotThere."""
        found = self.inferences.get(id)
        workspace = "" if found is None else found.workspace
        snapshot = await self.decided(lambda: self._store.snapshot(workspace, identity, ()))
        role = snapshot.asker.role
        administers = may(role, Right.SEE_ALL_REQUESTS)
        if found is not None and found.owner == identity.user and role is not Role.NONE:
            return Found(found, administers, readable=True)
        if found is not None and administers:
            readable = await self.decided(lambda: self._could_be_shown(identity, found))
            return Found(found, administers, readable)
        self._note(identity, workspace, action, 404, lambda: f"{id[:64]} is not the asker's", request=id[:64])
        raise NotThere

    def _could_be_shown(self, identity: Identity, inference: Inference) -> bool:
        """Whether somebody else may read all that it was shown, as it was then: no role lifts an access list,
        a clearance or a barrier."""
        ids = [shown.id for shown in inference.files]
        snapshot = self._store.snapshot(inference.workspace, identity, ids)
        cleared = authorise(snapshot.asker, ids, snapshot.documents, snapshot.rules).documents
        return {(one.id, one.digest) for one in cleared} == {(one.id, one.digest) for one in inference.files}

    async def mine(self, identity: Identity) -> list[Inference]:
        """One's own, where one is still a member."""
        own = self.inferences.of(identity.user)
        roles = {}
        for workspace in {inference.workspace for inference in own}:
            snapshot = await self.decided(lambda name=workspace: self._store.snapshot(name, identity, ()))  # type: ignore[misc]
            roles[workspace] = snapshot.asker.role
        return [inference for inference in own if roles[inference.workspace] is not Role.NONE]

    def stop(self, inference: Inference, why: str) -> None:
        """Safe at any state; it is over once the runner says so."""
        if inference.state.over or inference.stop:
            return
        inference.stop = why
        self._say_stop(inference)

    def _say_stop(self, inference: Inference) -> None:
        """Nothing yet, where there is no runner yet."""
        if inference.id in self._talks:
            talk, deadline = self._talks[inference.id]
            talk.stop(inference.stop)
            deadline.reschedule(asyncio.get_running_loop().time() + _STOPPING)

    async def manifest(self, inference: Inference) -> bytes:
        """MANIFEST.json as its sandbox had it, byte for byte. NotYet."""
        if inference.link is None and inference.state.over:
            raise NotYet("nothing was run, so nothing was shown")
        if inference.link is None or not inference.manifest:
            raise NotYet("there is no manifest of what has not begun")
        return await self.decided(lambda: manifest.written(inference.files))

    async def proof(self, inference: Inference) -> dict[str, Any]:
        """Signed evidence of its sandbox: a DSSE envelope. NotYet; `Refused`."""
        if not inference.state.over:
            raise NotYet("there is no proof of what has not ended")
        if inference.link is None:
            raise NotYet("nothing was run, so there is nothing to prove")
        async with self._proofs:
            return await asyncio.to_thread(self._prove, inference.workspace, inference.link)

    def _prove(self, workspace: str, link: int) -> dict[str, Any]:
        with self._control(self.config.run_dir) as control:
            envelope: dict[str, Any] = control.prove(workspace, link=link)
            return envelope

    # ---- the end

    async def close(self, within: float = 20.0) -> None:
        """Every run is stopped, destroyed and recorded; those that are not by then are hung up on. What they
        came to can still be asked for, until `dismiss`."""
        self._ending = True
        for inference in self.inferences.under_way():
            self.stop(inference, "the service ends")
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def dismiss(self) -> None:
        """Its threads. Nothing is asked of it any more."""
        for threads in (self._threads, self._identity_threads, self._body_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    # ---- small things

    def _note(
        self,
        identity: Identity,
        workspace: str,
        action: str,
        code: int,
        text: Callable[[], str],
        *,
        request: str = "",
    ) -> None:
        number = request if _NUMBER.fullmatch(request) else _new_id()
        self._witness.refusal(Note(number, workspace, identity.user, action, code, text))

    def _stamp(self) -> str:
        return stamp(datetime.fromtimestamp(self._now(), UTC))


@dataclass(frozen=True, slots=True)
class Found:
    """An inference, and what who asks for it may know of it beside its state and its end."""

    inference: Inference
    administers: bool  # with `readable`: why it was refused, which may name a document
    readable: bool  # what it wrote, and what it was shown


class Place:
    """Of one inference, or of a request that may become one."""

    def __init__(self, places: Places, who: str) -> None:
        places.take(who)
        self._places, self._who = places, who
        self.kept = False

    def give_back(self) -> None:
        self._places.give_back(self._who)


def told_at(began: float, now: float, documents: int) -> float:
    """When a decision on so many documents is told: one slot after it began, or more, but only whole ones.
    It may take ten times as long as another, by how many of them the store has and what their lists say."""
    slot = _SLOT + _SLOT_EACH * documents
    return began + slot * max(1, math.ceil((now - began) / slot))


def _copies(documents: tuple[Document, ...]) -> tuple[Copy, ...]:
    return tuple(
        Copy(document.id, os.fsencode(document.root), document.path, document.size, document.digest)
        for document in documents
    )


def _offered(workspace: WorkspaceConfig, asked: NewInference, role: Role) -> configuration.Inference:
    """What will be run. `Denied` to a member: they may know what their workspace offers."""
    if asked.inference:
        offered = workspace.inferences.get(asked.inference)
        if offered is None:
            fault = Fault("inference", "the workspace offers none of that name", _offers(workspace))
            raise Denied(Faults([fault]), 422, lambda: fault.text)
        return offered
    if not workspace.commands:
        raise _not_allowed("this workspace runs what it offers, and no commands of one's own")
    if not may(role, Right.RUN_COMMAND):
        raise _not_allowed(f"the role {role} may not run commands of one's own")
    return configuration.Inference(asked.command, network=workspace.network, limits=workspace.limits)


def _not_allowed(text: str) -> Denied:
    return Denied(NotAllowed(text), 403, lambda: text)


def _offers(workspace: WorkspaceConfig) -> str:
    return f"it offers {', '.join(workspace.inferences)}" if workspace.inferences else "it offers none"


def _bounded(limits: Limits, output: int) -> Limits:
    """No more is let through than is kept."""
    most = output if limits.output is None else min(limits.output, output)
    return Limits(**{name: getattr(limits, name) for name in Limits.__struct_fields__} | {"output": most})


def _refuse_too_much(documents: tuple[Document, ...], most: int) -> None:
    octets = sum(document.size for document in documents)
    if octets > most:
        fault = Fault(
            "candidates", f"what they show has {octets} bytes, {size_text(most)} are the most", "ask for less"
        )
        raise Denied(Faults([fault]), 422, lambda: fault.text)


def _findings(missing: int, some: Mapping[str, Document | None], asker: Asker, rules: Rules) -> str:
    """For the record alone: what an asker is never told."""
    told = (f"{name} {judge(asker, document, rules)}" for name, document in some.items())
    return f"{missing} of the files that had to be shown: {'; '.join(told)}"


def _new_id() -> str:
    return "r-" + base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def _value(text: str) -> str:
    """Of a variable: what a reference leads to now, so that a key can be changed without a restart."""
    if text.startswith("secret://env/"):
        name = text.removeprefix("secret://env/")
        if name not in os.environ:
            raise Refused(
                Reason.UNAVAILABLE,
                f"the broker's environment has no {name}, to which the configuration refers",
            )
        return os.environ[name]
    if text.startswith("secret://file/"):
        path = Path(text.removeprefix("secret://file"))
        try:
            return path.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(
                Reason.UNAVAILABLE, f"{path}, to which the configuration refers, cannot be read"
            ) from error
    return text
