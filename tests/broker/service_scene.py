"""The service with everything outside of it made up: who tokens speak of, what the store says, what runners
do.

All of that comes in through the constructor, as the real ones do. The fakes keep a list of what was asked of
them, in order, so that a test can say that two requests had the same done for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec

from egressd.access.documents import Acl, Asker, Document, Rules
from egressd.access.principals import Identity
from egressd.access.roles import Right, Role, may
from egressd.broker.config import BrokerConfig, Inference, ServiceLimits, WorkspaceConfig
from egressd.broker.identity.tokens import Code, Unauthenticated
from egressd.broker.runners import jobs
from egressd.broker.service import Service
from egressd.broker.store.administration import Administration
from egressd.broker.store.rows import Membership
from egressd.broker.store.store import Snapshot
from egressd.broker.web.app import App
from egressd.broker.witness import Note
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.vault import manifest

EVERYBODY = "group:idp:staff"
DIGEST = "sha256:" + "ab" * 32


def identity(name: str) -> Identity:
    return Identity("idp", name, frozenset({EVERYBODY}), f"{name}@example.test", 2e9)


def user(name: str) -> str:
    return f"user:idp:{name}"


class FakeVerifier:
    """The token is the name; some are not believed."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.away = False

    def verify(self, token: str, *, nonce: str = "") -> Identity:
        self.log.append("verify")
        if self.away:
            raise Unauthenticated(Code.UNAVAILABLE, "no keys")
        if token.startswith("bad") or nonce not in ("", "n-1"):
            raise Unauthenticated(Code.SIGNATURE, "no")
        return identity(token)


class FakeStore:
    """Members and documents of workspaces, in dictionaries."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.roles: dict[tuple[str, str], Role] = {}
        self.documents: dict[str, dict[str, Document]] = {"acme": {}, "other": {}}
        self.generations = {"acme": 7, "other": 3}
        self.broken = False
        self.hold: Any = None  # called by `generation`

    def snapshot(self, workspace: str, who: Identity, candidates: Sequence[str]) -> Snapshot:
        self.log.append(("snapshot", len(candidates)))
        if self.broken:
            raise Refused(Reason.UNAVAILABLE, "the store: it is broken, and this is a secret")
        role = self.roles.get((workspace, who.user), Role.NONE)
        found = self.documents.get(workspace, {})
        return Snapshot(
            asker=Asker(who, role, "internal" if role else ""),
            documents={id: found[id] for id in candidates if id in found},
            rules=Rules(),
            generation=self.generations.get(workspace, 0),
        )

    def generation(self, workspace: str) -> int:
        self.log.append("generation")
        if self.hold is not None:
            self.hold()
        return self.generations.get(workspace, 0)


class FakeAdministration:
    """As far as HTTP needs it: the rights are those of access.roles."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.kept: dict[str, Membership] = {}

    def _check(self, actor: Identity, workspace: str, right: Right) -> None:
        self.store.log.append(("administration", str(right)))
        role = self.store.roles.get((workspace, actor.user), Role.NONE)
        if role is Role.NONE:
            raise Refused(Reason.WORKSPACE, "there is no such workspace")
        if not may(role, right):
            raise Refused(Reason.MEMBER, f"a {role} may not do that ({right})")

    def members(self, actor: Identity, workspace: str) -> tuple[Membership, ...]:
        self._check(actor, workspace, Right.SEE_MEMBERS)
        return tuple(self.kept.values())

    def set_member(
        self, actor: Identity, workspace: str, name: str, role: Role, clearance: str = ""
    ) -> Membership | None:
        self._check(actor, workspace, Right.SET_MEMBERS)
        was = self.kept.get(name)
        self.kept[name] = Membership(name, role, clearance or "public", actor.user, 1.0)
        return was

    def remove_member(self, actor: Identity, workspace: str, name: str) -> Membership | None:
        self._check(actor, workspace, Right.SET_MEMBERS)
        return self.kept.pop(name, None)

    def sources(self, actor: Identity, workspace: str) -> tuple[()]:
        self._check(actor, workspace, Right.INGEST)
        return ()

    def set_trust(self, actor: Identity, workspace: str, name: str, **_: Any) -> None:
        self._check(actor, workspace, Right.SET_TRUST)
        raise Refused(Reason.MEMBER, "there is no source here")

    def drop_source(self, actor: Identity, workspace: str, name: str) -> int:
        self._check(actor, workspace, Right.SET_TRUST)
        return 0

    def barriers(self, actor: Identity, workspace: str) -> tuple[tuple[str, str], ...]:
        self._check(actor, workspace, Right.SET_BARRIERS)
        return (("group:idp:a", "group:idp:b"),)

    def add_barrier(self, actor: Identity, workspace: str, a: str, b: str) -> bool:
        self._check(actor, workspace, Right.SET_BARRIERS)
        return True

    remove_barrier = add_barrier


class FakeTalk:
    """A runner that says what the test puts into `says`, and by itself only how it ended."""

    def __init__(self, job: jobs.Job) -> None:
        self.job = job
        self.heard: list[str] = []
        self.says: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = False
        self.stubborn = False

    async def hear(self) -> Any:
        said = await self.says.get()
        if isinstance(said, BaseException):
            raise said
        if said is PROJECTED:
            made = manifest.digest_of(manifest.written(self.job.copies))
            return msgspec.structs.replace(PROJECTED, manifest=made)
        return said

    def go(self) -> None:
        self.heard.append("go")

    def stop(self, why: str) -> None:
        self.heard.append(f"stop: {why}")
        if not self.stubborn:
            self.says.put_nowait(ended(status=143, why=why))

    def close(self) -> None:
        self.closed = True


PROJECTED = jobs.Projected(manifest="", files=1, octets=5, seconds=0.01)  # with what the job says
STARTED = jobs.Started(link=41, policy="sha256:" + "ef" * 32)


def ended(**more: Any) -> jobs.Finished:
    return jobs.Finished(
        **({"status": 0, "destroyed": True, "counters": {"in": (2, 100), "ok": (2, 100)}} | more)
    )


def out(text: str | bytes, stream: str = "stdout") -> jobs.Output:
    return jobs.Output(stream=stream, data=text.encode() if isinstance(text, str) else text)  # type: ignore[arg-type]


class FakeRunners:
    """`by_itself`: what each runner says, and None where it waits for "go"."""

    def __init__(self) -> None:
        self.talks: list[FakeTalk] = []
        self.by_itself: list[Any] | None = [PROJECTED, STARTED, out("hello\n"), ended()]
        self.refusal: Exception | None = None
        self.before: asyncio.Event | None = None  # waited for, before there is a runner

    async def begin(self, job: jobs.Job) -> FakeTalk:
        if self.before is not None:
            await self.before.wait()
        if self.refusal is not None:
            raise self.refusal
        talk = FakeTalk(job)
        self.talks.append(talk)
        for said in self.by_itself or ():
            talk.says.put_nowait(said)
        return talk


@dataclass
class FakeWitness:
    notes: list[Note] = field(default_factory=list)

    def refusal(self, note: Note) -> None:
        self.notes.append(note)


class FakeControl:
    """Gives one proof."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __enter__(self) -> FakeControl:
        return self

    def __exit__(self, *_: object) -> None: ...

    def prove(self, workspace: str, *, link: int) -> dict[str, Any]:
        payload = f"{workspace} eg{link}"
        return {"payloadType": "application/vnd.in-toto+json", "payload": payload, "signatures": []}


CONFIG = BrokerConfig(
    workspaces={
        "acme": WorkspaceConfig(
            inferences={
                "default": Inference(
                    ("python3", "infer.py"),
                    environment={"MODE": "plain"},
                    limits=jobs.Limits(wall=60.0, memory=1 << 30),
                ),
                "closed": Inference(("true",), network="none"),
            },
            commands=True,
        ),
        "quiet": WorkspaceConfig(inferences={"default": Inference(("true",))}),
    },
    limits=ServiceLimits(rate=(1000, 60.0), per_user=4, at_once=6, candidates=100, files=10, body=1 << 20),
)


class Scene:
    """acme has a member of each role, and alice's and mallory's documents; `other` is no workspace of the
    service's, though the store knows it."""

    def __init__(self, config: BrokerConfig = CONFIG) -> None:
        self.log: list[Any] = []
        self.time = 1000.0
        self.verifier, self.store = FakeVerifier(self.log), FakeStore(self.log)
        self.runners, self.witness = FakeRunners(), FakeWitness()
        self.administration = FakeAdministration(self.store)
        for name in ("viewer", "editor", "admin", "owner"):
            self.store.roles["acme", user(name)] = Role.of(name)
        self.store.roles["acme", user("alice")] = Role.EDITOR
        self.store.roles["acme", user("bob")] = Role.EDITOR
        self.store.roles["other", user("alice")] = Role.OWNER
        for name, readers in (("a.md", {EVERYBODY}), ("b.md", {EVERYBODY}), ("secret.md", {user("mallory")})):
            self.document(f"handbook:{name}", readers)
        self.service = Service(
            config,
            verifier=self.verifier,
            store=self.store,
            runners=self.runners,
            witness=self.witness,
            clock=lambda: self.time,
            now=lambda: 1.7e9 + self.time,
            control=FakeControl,
        )
        administration: Any = self.administration
        assert Administration  # what it stands in for
        self.app = App(self.service, administration).asgi()

    def document(self, id: str, readers: set[str], **more: Any) -> None:
        path = id.partition(":")[2].encode()
        made = Document(id, "/srv/handbook", path, 5, DIGEST, Acl(frozenset(readers)), clearance="internal")
        self.store.documents["acme"][id] = replace(made, **more)

    def client(self, token: str = "alice", **more: Any) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://broker", headers=headers, **more)

    @contextlib.asynccontextmanager
    async def asking(self, token: str = "alice") -> AsyncIterator[httpx.AsyncClient]:
        """And the end of the service."""
        async with self.client(token) as client:
            yield client
        await self.service.close(within=5)
        self.service.dismiss()


def request(**more: Any) -> dict[str, Any]:
    return {"workspace": "acme", "inference": "default", **more}


async def until(holds: Any, within: float = 5.0) -> None:
    """Poll."""
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.002)
