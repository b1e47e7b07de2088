"""What can be learned by looking at the service from beside it: by its clock, by another's number, by a role
that is high and a clearance that is not; and what it remembers of whom nobody asks for any more."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from service_scene import DIGEST, EVERYBODY, Scene, ended, identity, request, user

from egressd.broker import service
from egressd.broker.identity.keyring import MAX_WAITING
from egressd.broker.inferences import Inference, Inferences, Shown, State
from egressd.broker.service import told_at
from egressd.broker.web import requests


def run(scene: Scene, play: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with scene.asking() as client:
            return await play(client)

    return asyncio.run(whole())


# ---- by its clock


@pytest.mark.parametrize(
    ("took", "documents", "slots"),
    [
        (0.0, 1, 1),
        (0.0099, 0, 1),
        (0.0101, 0, 2),
        (0.030, 644, 2),
        (0.026, 644, 1),
        (0.2, 10_000, 1),
        (9, 0, 900),
    ],
)
def test_a_decision_is_told_at_whole_slots(took: float, documents: int, slots: int) -> None:
    """Whatever it took, of what was found; only how much was asked for counts."""
    assert told_at(100.0, 100.0 + took, documents) == pytest.approx(100 + slots * (0.010 + documents * 25e-6))


def test_what_takes_long_to_be_refused_is_not_told_apart_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two is held up in the store; neither is answered before the end of the slot."""
    monkeypatch.setattr(service, "_SLOT", 0.6)
    scene = Scene()
    plain = scene.store.snapshot

    def snapshot(workspace: str, who: Any, candidates: Any) -> Any:
        if "handbook:secret.md" in candidates:
            time.sleep(0.05)
        return plain(workspace, who, candidates)

    monkeypatch.setattr(scene.store, "snapshot", snapshot)

    async def play(client: httpx.AsyncClient) -> None:
        async def seconds(**more: Any) -> float:
            began = time.monotonic()
            told = await client.post("/v1/inferences", json=request(**more))
            assert told.status_code in (201, 404)
            return time.monotonic() - began

        held = await asyncio.gather(
            seconds(files=["handbook:secret.md"]),
            seconds(files=["handbook:none.md"]),
            seconds(candidates=["handbook:none.md"]),
            seconds(workspace="nowhere"),
        )
        assert min(held) >= 0.599, held

    run(scene, play)


# ---- by a role that is high, and a clearance that is not


@pytest.mark.parametrize(
    ("what", "then", "readable"),
    [
        ("one that all may read", {}, True),
        ("of others", {"readers": {user("alice")}}, False),
        ("secret", {"clearance": "secret"}, False),
        ("another by now", {"digest": "sha256:" + "0" * 64}, False),
    ],
)
def test_no_role_reads_what_another_was_shown(what: str, then: dict[str, Any], readable: bool) -> None:
    """Who administers sees every request, how it ended, and may end it; what it wrote, and which documents it
    was shown, only if they may read those, too."""
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences?wait=5", json=request(candidates=["handbook:a.md"]))).json()[
            "id"
        ]
        scene.document("handbook:a.md", **({"readers": {EVERYBODY}} | then))
        async with scene.client("admin") as admin:
            told = (await admin.get(f"/v1/inferences/{id}")).json()
            assert (told["state"], told["result"]["status"]) == ("ended", 0)
            assert ("receipt" in told["result"], "output" in told["result"]) == (readable, readable)
            assert ("handbook" in str(told), "hello" in str(told)) == (readable, readable)
            nothing = await admin.get("/v1/inferences/r-" + "a" * 26)
            for below in ("output", "receipt", "receipt?proof=1", "manifest"):
                found = await admin.get(f"/v1/inferences/{id}/{below}")
                assert found.status_code == (200 if readable else 404), below
                if not readable:
                    assert (found.content, found.headers) == (nothing.content, nothing.headers)
            cancelled = await admin.delete(f"/v1/inferences/{id}")
            assert cancelled.status_code == 200
            assert ("handbook" in cancelled.text) == readable
        assert "hello" in (await client.get(f"/v1/inferences/{id}")).text, "one's own stays one's own"

    run(scene, play)


def test_why_it_was_refused_may_name_a_document() -> None:
    scene = Scene()
    scene.runners.by_itself = [ended(status=125, refused="handbook:a.md is not what was ingested")]

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences?wait=5", json=request(files=["handbook:a.md"]))).json()["id"]
        scene.document("handbook:a.md", {user("alice")})
        async with scene.client("admin") as admin:
            told = await admin.get(f"/v1/inferences/{id}")
        assert told.json()["state"] == "refused"
        assert "a.md" not in told.text

    run(scene, play)


# ---- what runs, and is asked for by nobody


def test_nothing_runs_for_a_stream_that_was_never_begun() -> None:
    """Where it is read from is a question about another's output: a new one is read from its beginning."""
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        asked = request(stream=True)
        for wrong in ({"params": {"offset": "x"}}, {"headers": {"Last-Event-ID": "x"}}):
            told = await client.post("/v1/inferences", json=asked, **wrong)  # type: ignore[arg-type]
            assert (told.status_code, len(scene.runners.talks)) in ((201, 1), (201, 2))
            assert '"text":"hello' in told.text

    run(scene, play)


def remembered(number: int) -> Inference:
    files = tuple(Shown(f"handbook:{name}.md", DIGEST, 5) for name in range(3))
    made = Inference(f"r-{number}", "a", "acme", "default", "viewer", None, files, "policy", "")
    made.state = State.ENDED
    return made


def test_what_nobody_asks_for_is_forgotten_all_the_same() -> None:
    now = 0.0
    kept = Inferences(keep=100, most=1000, clock=lambda: now)
    for number in range(10):
        now = number * 60.0
        one = remembered(number)
        one.over_since = now
        kept.add(one)
    assert len(kept) == 2


def test_the_last_one_is_forgotten_when_nobody_comes_any_more() -> None:
    """By a clock of the loop's: what it wrote is not kept until somebody happens to ask for something."""
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        due: list[tuple[float, Any]] = []
        loop = asyncio.get_running_loop()
        later = loop.call_later
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_later", lambda s, *do: (due.append((s, do[0])), later(s, *do))[1])
            await client.post("/v1/inferences?wait=5", json=request())
        scene.time += scene.service.config.keep + 0.5
        (tidy,) = [do for seconds, do in due if seconds > scene.service.config.keep]
        assert len(scene.service.inferences) == 1
        tidy()
        assert len(scene.service.inferences) == 0

    run(scene, play)


def test_a_record_that_waits_holds_on_to_few_documents() -> None:
    """A daemon that does not answer must not make the service keep all that was looked at."""
    scene = Scene()
    names = [f"handbook:{number}.md" for number in range(100)]
    for name in names:
        scene.document(name, {user("mallory")})

    async def play(client: httpx.AsyncClient) -> None:
        asked = request(files=[f"handbook:{n}.md" for n in range(10)], candidates=names)
        assert (await client.post("/v1/inferences", json=asked)).status_code == 404

    run(scene, play)
    (note,) = scene.witness.notes
    assert isinstance(note.text, functools.partial), "no closure over a whole snapshot"
    assert [len(held) for held in note.text.args if isinstance(held, dict)] == [8]
    assert note.text().count("unlisted") == 8


def test_one_body_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take thirty times its size meanwhile, and strangers send them, too."""
    scene = Scene()
    reading: list[int] = []
    most: list[int] = []
    plain = requests.new_inference

    def new_inference(*args: Any, **more: Any) -> Any:
        reading.append(1)
        most.append(len(reading))
        time.sleep(0.02)
        found = plain(*args, **more)
        reading.pop()
        return found

    monkeypatch.setattr(requests, "new_inference", new_inference)

    async def play(client: httpx.AsyncClient) -> None:
        told = await asyncio.gather(*(client.post("/v1/inferences?wait=5", json=request()) for _ in range(4)))
        assert [one.status_code for one in told] == [201] * 4

    run(scene, play)
    assert most == [1] * 4


def test_a_member_is_found_however_the_name_is_composed() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        at = "/v1/workspaces/acme/members/group:idp:R"
        async with scene.client("admin") as admin:
            await admin.put(f"{at}%C3%A9vision", json={"role": "viewer"})
            for spelled in ("%C3%A9", "e%CC%81"):
                assert (await admin.get(f"{at}{spelled}vision")).json()["role"] == "viewer"

    run(scene, play)


def test_a_provider_that_does_not_answer_leaves_others_their_threads() -> None:
    """As many threads wait for it as a keyring lets wait, and somebody else's token is verified meanwhile."""
    scene = Scene()
    go, waiting = threading.Event(), threading.Semaphore(0)
    plain = scene.verifier.verify

    def verify(token: str, *, nonce: str = "") -> Any:
        if token == "slow":
            waiting.release()
            assert go.wait(30)
        return plain(token, nonce=nonce)

    scene.verifier.verify = verify  # type: ignore[method-assign]

    async def play(client: httpx.AsyncClient) -> None:
        slow = [asyncio.create_task(scene.service.identify("slow")) for _ in range(MAX_WAITING)]
        try:
            for _ in slow:
                await asyncio.to_thread(waiting.acquire, timeout=30)
            async with asyncio.timeout(10):
                assert await scene.service.identify("alice") == identity("alice")
        finally:
            go.set()
            await asyncio.gather(*slow)

    run(scene, play)
