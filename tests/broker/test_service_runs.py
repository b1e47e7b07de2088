"""What becomes of an inference: its states, what changes meanwhile, cancelling at each of them, and the end
of the service. Runners, verifier and store are the scene's, handed to the constructor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest
from service_scene import CONFIG, EVERYBODY, PROJECTED, STARTED, Scene, ended, out, request, until, user

from egressd.access.roles import Role
from egressd.broker.config import BrokerConfig, Inference, ServiceLimits, WorkspaceConfig
from egressd.broker.inferences import Inference as Remembered
from egressd.broker.inferences import Inferences, State
from egressd.broker.runners import jobs
from egressd.broker.service import Service
from egressd.model.errors import ProtocolError, Refused
from egressd.model.verdicts import Reason
from egressd.vault import manifest


def run(scene: Scene, play: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with scene.asking() as client:
            return await play(client)

    return asyncio.run(whole())


async def begun(scene: Scene, client: httpx.AsyncClient, **more: Any) -> Any:
    """Its number and its runner, once there is one."""
    before = len(scene.runners.talks)
    told = await client.post("/v1/inferences", json=request(**more))
    assert told.status_code == 201, told.text
    await until(lambda: len(scene.runners.talks) > before)
    return told.json()["id"], scene.runners.talks[-1]


async def state(client: httpx.AsyncClient, id: str, wait: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/inferences/{id}", params={"wait": wait})).json()
    return found


def waiting() -> Scene:
    scene = Scene()
    scene.runners.by_itself = None
    return scene


# ---- between copying and running


def test_it_goes_only_after_what_was_decided_was_looked_at_again() -> None:
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        id, talk = await begun(scene, client)
        assert (await state(client, id))["state"] == "projecting"
        scene.log.clear()
        talk.says.put_nowait(PROJECTED)
        await until(lambda: talk.heard)
        assert talk.heard == ["go"]
        assert scene.log == ["generation"]
        talk.says.put_nowait(STARTED)
        await until(lambda: scene.service.inferences.get(id).state is State.RUNNING)  # type: ignore[union-attr]
        talk.says.put_nowait(ended())
        assert (await state(client, id, 5))["state"] == "ended"

    run(scene, play)


def role(scene: Scene, to: Role) -> None:
    scene.store.roles["acme", user("alice")] = to


CHANGES: list[tuple[str, Callable[[Scene], Any], bool]] = [
    ("something else", lambda scene: scene.document("handbook:new.md", {EVERYBODY}), True),
    ("the same document, read anew", lambda scene: scene.document("handbook:a.md", {EVERYBODY}), True),
    ("no reader any more", lambda scene: scene.document("handbook:a.md", set()), False),
    ("another reader", lambda scene: scene.document("handbook:a.md", {user("bob")}), False),
    ("a reader more", lambda scene: scene.document("handbook:a.md", {EVERYBODY, user("bob")}), True),
    (
        "other bytes",
        lambda scene: scene.document("handbook:a.md", {EVERYBODY}, digest="sha256:" + "0" * 64),
        False,
    ),
    ("gone", lambda scene: scene.store.documents["acme"].pop("handbook:a.md"), False),
    ("secret now", lambda scene: scene.document("handbook:a.md", {EVERYBODY}, clearance="secret"), False),
    ("another role", lambda scene: role(scene, Role.VIEWER), False),
    ("a higher role", lambda scene: role(scene, Role.OWNER), False),
    ("no member any more", lambda scene: role(scene, Role.NONE), False),
    ("the store is broken", lambda scene: setattr(scene.store, "broken", True), False),
    (
        "one more of the candidates may be seen",
        lambda scene: scene.document("handbook:secret.md", {EVERYBODY}),
        False,
    ),
]


@pytest.mark.parametrize(("what", "change", "holds"), CHANGES, ids=[row[0] for row in CHANGES])
def test_what_changed_while_it_was_copied(what: str, change: Callable[[Scene], Any], holds: bool) -> None:
    """Another generation is decided anew, and what was copied is shown only if it would be copied again."""
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        id, talk = await begun(scene, client, candidates=["handbook:a.md", "handbook:secret.md"])
        change(scene)
        scene.store.generations["acme"] += 1
        talk.says.put_nowait(PROJECTED)
        await until(lambda: talk.heard)
        if holds:
            assert talk.heard == ["go"]
            return
        assert talk.heard == ["stop: what was decided about it does not hold any more: ask again"]
        await until(lambda: scene.service.inferences.get(id).state.over)  # type: ignore[union-attr]
        found = scene.service.inferences.get(id)
        assert found is not None
        assert (found.state, found.why) == (State.REFUSED, found.stop)

    run(scene, play)


def test_a_store_that_has_not_moved_is_not_read_again() -> None:
    """Then what was decided holds: that is what a generation is for."""
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        _, talk = await begun(scene, client)
        role(scene, Role.NONE)  # which no real store does without another generation
        talk.says.put_nowait(PROJECTED)
        await until(lambda: talk.heard)
        assert talk.heard == ["go"]

    run(scene, play)


@pytest.mark.parametrize("change", [
    lambda copies: [],
    lambda copies: copies[:1],
    lambda copies: [*copies, msgspec.structs.replace(copies[0], id="handbook:secret.md")],
    lambda copies: [copies[0], msgspec.structs.replace(copies[1], digest="sha256:" + "0" * 64)],
    lambda copies: [copies[0], msgspec.structs.replace(copies[1], size=6)],
    lambda copies: [copies[0], msgspec.structs.replace(copies[1], id="handbook:c.md")],
], ids=["nothing", "one too few", "one too many", "other bytes", "another size", "another name"])  # fmt: skip
def test_a_runner_that_copied_something_else_is_stopped(change: Callable[[Any], Any]) -> None:
    """Its own word for what it did is compared with what was decided; the record says that, too."""
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        id, talk = await begun(scene, client, files=["handbook:a.md", "handbook:b.md"])
        made = manifest.digest_of(manifest.written(change(list(talk.job.copies))))
        talk.says.put_nowait(jobs.Projected(manifest=made, files=2, octets=10, seconds=0.01))
        told = await state(client, id, 5)
        assert talk.heard == ["stop: it could not be run; the reason is on record under its number"]
        assert (told["state"], told["result"]["why"]) == ("refused", talk.heard[0].removeprefix("stop: "))
        assert told["result"]["receipt"]["manifest"] == ""
        assert (await client.get(f"/v1/inferences/{id}/manifest")).status_code == 409
        (note,) = scene.witness.notes
        assert (note.request, note.workspace, note.asker, note.code) == (id, "acme", user("alice"), 500)
        assert note.text().startswith("its runner copied something else than what was decided: sha256:")
        assert note.text().endswith(f"it has '{made}'")

    run(scene, play)


def test_a_runner_that_copied_what_was_decided_in_another_order_goes() -> None:
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        _, talk = await begun(scene, client, files=["handbook:b.md", "handbook:a.md"])
        made = manifest.digest_of(manifest.written(talk.job.copies[::-1]))
        talk.says.put_nowait(jobs.Projected(manifest=made, files=2, octets=10, seconds=0.01))
        await until(lambda: talk.heard)
        assert (talk.heard, scene.witness.notes) == (["go"], [])

    run(scene, play)


# ---- cancelling


async def _deciding_again(scene: Scene, talk: Any) -> Callable[[], None]:
    held = threading.Event()
    scene.store.hold = held.wait
    talk.says.put_nowait(PROJECTED)
    await until(lambda: scene.log[-1] == "generation")
    return held.set


async def _projecting(scene: Scene, talk: Any) -> Callable[[], None]:
    return lambda: None


async def _running(scene: Scene, talk: Any) -> Callable[[], None]:
    talk.says.put_nowait(PROJECTED)
    talk.says.put_nowait(STARTED)
    talk.says.put_nowait(out("begun "))
    await until(lambda: any(one.written for one in scene.service.inferences._all.values()))
    return lambda: None


@pytest.mark.parametrize(
    ("come_to", "was", "went"),
    [(_projecting, "projecting", False), (_deciding_again, "deciding", False), (_running, "running", True)],
)
def test_cancelling_at_each_state(come_to: Any, was: str, went: bool) -> None:
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        id, talk = await begun(scene, client)
        release = await come_to(scene, talk)
        assert (await state(client, id))["state"] == was
        told = await client.delete(f"/v1/inferences/{id}")
        assert told.status_code in (200, 202)
        release()
        found = await state(client, id, 5)
        assert (found["state"], found["result"]["why"]) == ("ended", "it was cancelled")
        assert found["result"]["status"] == 143
        assert found["result"]["receipt"]["destroyed"] is True
        assert talk.heard == (["go"] if went else []) + ["stop: it was cancelled"]
        assert talk.closed
        again = await client.delete(f"/v1/inferences/{id}")
        assert (again.status_code, again.json()["state"]) == (200, "ended")
        assert talk.heard.count("stop: it was cancelled") == 1

    run(scene, play)
    assert scene.service._places.taken == 0


def test_cancelling_before_there_is_a_runner() -> None:
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        scene.runners.before = asyncio.Event()
        id = (await client.post("/v1/inferences", json=request())).json()["id"]
        assert (await client.delete(f"/v1/inferences/{id}")).status_code == 202
        scene.runners.before.set()
        assert (await state(client, id, 5))["result"]["why"] == "it was cancelled"
        assert scene.runners.talks[0].heard == ["stop: it was cancelled"]

    run(scene, play)


def test_a_runner_that_does_not_stop_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egressd.broker.service._STOPPING", 0.05)
    scene = waiting()

    async def play(client: httpx.AsyncClient) -> None:
        id, talk = await begun(scene, client)
        talk.stubborn = True
        await client.delete(f"/v1/inferences/{id}")
        found = await state(client, id, 5)
        assert (found["state"], found["result"]["status"]) == ("ended", 125)
        assert found["result"]["receipt"]["destroyed"] is False, "nobody has looked"
        assert talk.closed

    run(scene, play)


# ---- runners that fail


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([EOFError()], "its runner ended without a word"),
        ([PROJECTED, STARTED, EOFError()], "its runner ended without a word"),
        ([ValueError("a defect")], "the service failed"),
    ],
)
def test_a_runner_that_is_gone(said: list[Any], why: str) -> None:
    scene = Scene()
    scene.runners.by_itself = said

    async def play(client: httpx.AsyncClient) -> None:
        told = (await client.post("/v1/inferences?wait=5", json=request())).json()
        assert (told["state"], told["result"]["status"], told["result"]["why"]) == ("ended", 125, why)
        assert told["result"]["receipt"]["destroyed"] is False

    run(scene, play)
    assert scene.service._places.taken == 0
    assert all(talk.closed for talk in scene.runners.talks)


@pytest.mark.parametrize(
    "error", [Refused(Reason.LIMIT, "no runner"), ProtocolError("what?"), OSError(11, "no")]
)
def test_no_runner_is_a_refusal_that_says_no_more(error: Exception) -> None:
    scene = Scene()
    scene.runners.refusal = error

    async def play(client: httpx.AsyncClient) -> None:
        told = (await client.post("/v1/inferences?wait=5", json=request())).json()
        assert (told["state"], told["result"]["status"]) == ("refused", 125)
        assert "refused" not in told["result"]

    run(scene, play)


# ---- secrets


def offering(**environment: str) -> BrokerConfig:
    inference = Inference(("true",), environment=environment)
    return BrokerConfig(workspaces={"acme": WorkspaceConfig({"default": inference})})


def test_secrets_are_fetched_for_each_request_and_forgotten_at_its_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("A_KEY", "from-env")
    scene = Scene(offering(ONE=f"secret://file{tmp_path}/key", TWO="secret://env/A_KEY", THREE="3"))

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
        assert scene.runners.talks[0].job.environment == {
            "ONE": "from-a-file",
            "TWO": "from-env",
            "THREE": "3",
        }
        (tmp_path / "key").write_text("another")
        await client.post("/v1/inferences?wait=5", json=request())
        assert scene.runners.talks[1].job.environment["ONE"] == "another"
        assert scene.service.inferences.get(id).job is None  # type: ignore[union-attr]
        (tmp_path / "key").unlink()
        told = await client.post("/v1/inferences", json=request())
        assert told.status_code == 503
        assert str(tmp_path) not in told.text

    run(scene, play)


# ---- what it wrote


def test_output_is_bounded_and_says_so() -> None:
    scene = Scene(BrokerConfig(workspaces=CONFIG.workspaces, limits=ServiceLimits(output=1000)))
    scene.runners.by_itself = [PROJECTED, STARTED, *[out("x" * 300)] * 5, ended(hit=("output",))]

    async def play(client: httpx.AsyncClient) -> None:
        result = (await client.post("/v1/inferences?wait=5", json=request())).json()["result"]
        assert result["hit"] == ["output"]
        assert result["output"]["octets"] + result["output"]["cut"] == 1500
        assert result["output"]["octets"] <= 1000
        assert scene.runners.talks[0].job.limits.output == 1000

    run(scene, play)


def inference(owner: str, id: str, octets: int) -> Remembered:
    made = Remembered(id, owner, "acme", "default", "viewer", None, (), "policy", "")
    made.write("stdout", b"x" * octets, most=1 << 30)
    made.state = State.ENDED
    return made


def test_who_keeps_most_is_forgotten_first() -> None:
    async def play() -> None:
        now = 0.0
        kept = Inferences(keep=100, most=1000, clock=lambda: now)
        for at, (owner, octets) in enumerate((("a", 100), ("b", 400), ("b", 400), ("a", 100))):
            one = inference(owner, f"r-{at}", octets)
            one.over_since = float(at)
            kept.add(one)
        kept.tidy()
        assert [one.written for one in kept._all.values()] == [100, 400, 400, 100]
        one = inference("c", "r-9", 300)
        one.over_since = 9.0
        kept.add(one)
        kept.tidy()
        assert [(one.written, one.cut) for one in kept._all.values()] == [
            (100, 0), (0, 400), (400, 0), (100, 0), (300, 0),
        ]  # fmt: skip
        now = 101.5
        kept.tidy()
        assert list(kept._all) == ["r-2", "r-3", "r-9"]

    asyncio.run(play())


def test_small_pieces_are_put_together_and_read_by_bytes() -> None:
    async def play() -> None:
        one = Remembered("r-1", "a", "acme", "default", "viewer", None, (), "policy", "")
        for letter in "abcdef":
            one.write("stdout", letter.encode(), most=10_000)
        assert len(one.pieces) == 1
        read = []

        async def reader(offset: int) -> bytes:
            return b"".join([piece.data async for piece in one.output(offset)])

        tasks = [asyncio.create_task(reader(offset)) for offset in (0, 3, 6, 9)]
        await asyncio.sleep(0)
        one.write("stdout", b"ghi", most=10_000)
        one.write("stderr", b"!", most=10_000)
        await asyncio.sleep(0)
        one.change(State.ENDED)
        read = [await task for task in tasks]
        assert read == [b"abcdefghi!", b"defghi!", b"ghi!", b"!"]

    asyncio.run(play())


def test_a_byte_at_a_time_of_each_stream_takes_no_more_room_than_it_may() -> None:
    async def play() -> None:
        one = Remembered("r-1", "a", "acme", "default", "viewer", None, (), "policy", "")
        for _ in range(2000):
            one.write("stdout", b"o", most=100_000)
            one.write("stderr", b"e", most=100_000)
        assert one.written + one.cut == 4000
        assert len(one.pieces) < 100_000 / 256 + 1

    asyncio.run(play())


# ---- the end of the service


def test_the_end_stops_destroys_and_answers_everybody() -> None:
    scene = waiting()

    async def play() -> None:
        async with scene.client() as client:
            asked = asyncio.create_task(client.post("/v1/inferences?wait=60", json=request()))
            await until(lambda: scene.runners.talks)
            await scene.service.close(within=5)
            told = (await asked).json()
            assert (told["state"], told["result"]["why"]) == ("ended", "the service ends")
            assert scene.runners.talks[0].heard == ["stop: the service ends"]
            late = await client.post("/v1/inferences", json=request())
            assert (late.status_code, late.headers["retry-after"]) == (503, "10")

    asyncio.run(play())


def test_the_end_does_not_wait_for_a_runner_for_ever() -> None:
    scene = waiting()

    async def play() -> None:
        async with scene.client() as client:
            id, talk = await begun(scene, client)
            talk.stubborn = True
            await scene.service.close(within=0.05)
            assert talk.closed
            found = scene.service.inferences.get(id)
            assert found is not None
            assert (found.state, found.status) == (State.ENDED, 125)
        assert isinstance(scene.service, Service)

    asyncio.run(play())
