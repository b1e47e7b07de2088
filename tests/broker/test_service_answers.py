"""What each asker is answered. The service is real; verifier, store, runners and record are those of the
scene, handed to its constructor."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import httpx
import pytest
from service_scene import CONFIG, DIGEST, PROJECTED, STARTED, Scene, ended, out, request, until, user

from egressd.access.authorise import authorise
from egressd.access.roles import Role
from egressd.broker.config import BrokerConfig, ServiceLimits
from egressd.broker.inferences import State

NOBODY_ELSE = "r-" + "a" * 26
MANIFEST = b'{"files":[{"id":"handbook:a.md","path":"handbook/a.md","sha256":"%s","size":5}]}\n' % (
    b"ab" * 32
)


def with_limits(**limits: Any) -> BrokerConfig:
    return BrokerConfig(workspaces=CONFIG.workspaces, limits=ServiceLimits(**limits))


def run(scene: Scene, play: Any, token: str = "alice") -> Any:
    async def whole() -> Any:
        async with scene.asking(token) as client:
            return await play(client)

    return asyncio.run(whole())


# ---- a request that goes well


def test_an_answer_and_its_receipt() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        asked = request(candidates=["handbook:a.md", "handbook:secret.md", "handbook:none.md"], input="Why?")
        made = await client.post("/v1/inferences", json=asked, params={"wait": 5})
        assert made.status_code == 201
        document = made.json()
        assert made.headers["location"] == f"/v1/inferences/{document['id']}"
        assert made.headers["cache-control"] == "no-store"
        assert document["state"] == "ended"
        result = document["result"]
        assert (result["status"], result["why"], result["hit"]) == (0, "", [])
        assert result["output"] == {
            "stdout": {"text": "hello\n"},
            "stderr": {"text": ""},
            "octets": 6,
            "cut": 0,
        }
        receipt = result["receipt"]
        assert receipt["files"] == [{"id": "handbook:a.md", "sha256": DIGEST.removeprefix("sha256:")}]
        listed = await client.get(f"/v1/inferences/{document['id']}/manifest")
        assert (listed.status_code, listed.headers["content-type"]) == (200, "application/json")
        assert listed.content == MANIFEST
        assert receipt["manifest"] == f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
        assert receipt["network"] == {
            "mode": "policy",
            "link": 41,
            "counters": {"in": {"packets": 2, "bytes": 100}, "ok": {"packets": 2, "bytes": 100}},
        }
        assert (receipt["role"], receipt["action"], receipt["asker"]) == ("editor", "default", user("alice"))
        assert receipt["destroyed"] is True
        whole = json.dumps(document)
        for untold in ("secret", "none.md", "discard", "generation"):
            assert untold not in whole
        (talk,) = scene.runners.talks
        job = talk.job
        assert talk.heard == ["go"]
        assert talk.closed
        assert (job.discarded, job.generation, job.stdin) == (2, 7, b"Why?")
        assert [(copy.id, copy.root, copy.path) for copy in job.copies] == [
            ("handbook:a.md", b"/srv/handbook", b"a.md")
        ]
        assert job.environment == {"MODE": "plain"}
        assert (job.limits.wall, job.limits.output) == (60.0, scene.service.config.limits.output)
        assert (await client.get(f"/v1/inferences/{document['id']}")).json() == document
        assert (await client.get(receipt["signed"])).json()["payload"] == "acme eg41"
        assert (await client.get(f"/v1/inferences/{document['id']}/receipt")).json() == receipt
        listed = (await client.get("/v1/inferences")).json()["inferences"]
        assert [one["id"] for one in listed] == [document["id"]]

    run(scene, play)


@pytest.mark.parametrize(
    ("asked", "network", "wall"),
    [
        (request(), "policy", 60.0),
        (request(network="none"), "none", 60.0),
        (request(inference="closed"), "none", None),
        (request(limits={"wall": 5, "egress_bytes": 10}), "policy", 5.0),
        ({"workspace": "acme", "command": ["id"]}, "policy", None),
    ],
)
def test_what_is_asked_for_may_only_be_less(asked: Any, network: str, wall: float | None) -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/inferences?wait=5", json=asked)).status_code == 201

    run(scene, play)
    job = scene.runners.talks[0].job
    assert (job.network, job.limits.wall) == (network, wall)
    assert job.limits.egress == (10 if "limits" in asked else None)


@pytest.mark.parametrize("prefer", ["wait", "wait=5", "respond-async, wait=5; x=1", "WAIT = 5"])
def test_prefer_wait_is_the_same(prefer: str) -> None:
    async def play(client: httpx.AsyncClient) -> None:
        made = await client.post("/v1/inferences", json=request(), headers={"Prefer": prefer})
        assert (made.json()["state"], made.headers["preference-applied"]) == ("ended", "wait")

    run(Scene(), play)


def test_bytes_that_are_no_text_come_in_base64() -> None:
    scene = Scene()
    scene.runners.by_itself = [PROJECTED, STARTED, out(b"\xff\x00"), out("warn", "stderr"), ended(status=3)]

    async def play(client: httpx.AsyncClient) -> None:
        result = (await client.post("/v1/inferences?wait=5", json=request())).json()["result"]
        assert result["status"] == 3
        assert result["output"]["stdout"] == {"base64": "/wA="}
        assert result["output"]["stderr"] == {"text": "warn"}

    run(scene, play)


# ---- who is told nothing


UNSEEN: list[tuple[str, str, str, str, Any]] = [
    # why, token, method, path, body
    ("no such workspace", "alice", "POST", "/v1/inferences", request(workspace="nowhere")),
    ("not a member", "mallory", "POST", "/v1/inferences", request()),
    ("not a member, no such inference", "mallory", "POST", "/v1/inferences", request(inference="nothing")),
    ("not a member, no such file", "mallory", "POST", "/v1/inferences", request(files=["handbook:x.md"])),
    ("not served here", "alice", "POST", "/v1/inferences", request(workspace="other")),
    ("a file that is not there", "alice", "POST", "/v1/inferences", request(files=["handbook:none.md"])),
    ("a file that may not be seen", "alice", "POST", "/v1/inferences", request(files=["handbook:secret.md"])),
    ("one of two", "alice", "POST", "/v1/inferences", request(files=["handbook:a.md", "handbook:secret.md"])),
    ("a source that is not there", "alice", "POST", "/v1/inferences", request(files=["nosuch:a.md"])),
    ("no such inference", "alice", "GET", f"/v1/inferences/{NOBODY_ELSE}", None),
    ("somebody else's", "bob", "GET", "/v1/inferences/THEIRS", None),
    ("a stranger", "mallory", "GET", "/v1/inferences/THEIRS", None),
    ("somebody else's output", "bob", "GET", "/v1/inferences/THEIRS/output", None),
    ("nobody's output", "bob", "GET", f"/v1/inferences/{NOBODY_ELSE}/output", None),
    ("somebody else's receipt", "bob", "GET", "/v1/inferences/THEIRS/receipt", None),
    ("somebody else's proof", "bob", "GET", "/v1/inferences/THEIRS/receipt?proof=1", None),
    ("somebody else's manifest", "bob", "GET", "/v1/inferences/THEIRS/manifest", None),
    ("a stranger's manifest", "mallory", "GET", "/v1/inferences/THEIRS/manifest", None),
    ("nobody's manifest", "bob", "GET", f"/v1/inferences/{NOBODY_ELSE}/manifest", None),
    ("ending somebody else's", "bob", "DELETE", "/v1/inferences/THEIRS", None),
    ("ending nobody's", "bob", "DELETE", f"/v1/inferences/{NOBODY_ELSE}", None),
    ("no inference's name", "bob", "GET", "/v1/inferences/x", None),
    ("members of no workspace", "mallory", "GET", "/v1/workspaces/nowhere/members", None),
    ("members of acme", "mallory", "GET", "/v1/workspaces/acme/members", None),
    (
        "setting members of acme",
        "mallory",
        "PUT",
        "/v1/workspaces/acme/members/user:idp:x",
        {"role": "owner"},
    ),
    ("setting members of none", "mallory", "PUT", "/v1/workspaces/no/members/user:idp:x", {"role": "owner"}),
    ("barriers of acme", "mallory", "GET", "/v1/workspaces/acme/barriers", None),
    ("no workspace's name", "alice", "GET", "/v1/workspaces/A%20B/members", None),
    ("no member of that name", "admin", "GET", "/v1/workspaces/acme/members/user:idp:x", None),
    ("no such page", "alice", "GET", "/v1/anything", None),
]


def test_what_may_not_be_seen_is_answered_as_what_does_not_exist() -> None:
    """Status, headers and body, byte for byte, of every row."""
    scene = Scene()

    async def ask(token: str, method: str, path: str, body: Any, theirs: str) -> Any:
        async with scene.client(token) as client:
            told = await client.request(method, path.replace("THEIRS", theirs), json=body)
            return told.status_code, sorted(told.headers.items()), told.content

    async def play(client: httpx.AsyncClient) -> None:
        theirs = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
        ran = len(scene.runners.talks)
        first = await ask(*UNSEEN[0][1:], theirs)
        assert first[0] == 404
        for why, *asked in UNSEEN:
            assert await ask(*asked, theirs) == first, why  # type: ignore[call-arg]
        assert len(scene.runners.talks) == ran, "something ran"
        # and the one who may is answered otherwise
        assert (await client.get(f"/v1/inferences/{theirs}")).status_code == 200

    run(scene, play)


@pytest.mark.parametrize(
    "alike",
    [
        [row for row in UNSEEN if row[2] == "POST" and "files" not in row[4]],
        [row for row in UNSEEN if row[2] == "POST" and len(row[4].get("files", ())) == 1],
        [row for row in UNSEEN if row[2] in ("GET", "DELETE") and row[3].startswith("/v1/inferences/")],
        [row for row in UNSEEN if row[3].endswith("/members") and "%" not in row[3]],
        [row for row in UNSEEN if row[2] == "PUT"],
    ],
    ids=["workspaces", "files", "inferences", "members", "changes"],
)
def test_the_same_is_done_for_what_is_not_there_and_what_may_not_be_seen(
    alike: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a clock, which says something else each time: by what is asked of verifier, store and record,
    and how many candidates are judged."""
    scene = Scene()

    def judged(asker: Any, candidates: Any, documents: Any, rules: Any) -> Any:
        scene.log.append(("authorise", len(candidates)))
        return authorise(asker, candidates, documents, rules)

    monkeypatch.setattr("egressd.broker.service.authorise", judged)

    async def play(client: httpx.AsyncClient) -> None:
        theirs = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
        done = {}
        for why, token, method, path, body in alike:
            scene.log.clear()
            scene.witness.notes.clear()
            async with scene.client(token) as asker:
                await asker.request(method, path.replace("THEIRS", theirs), json=body)
            done[why] = (*scene.log, len(scene.witness.notes))
        assert len(done) >= 2
        assert len(set(done.values())) == 1, done

    run(scene, play)


def test_the_record_says_which_it_was_and_the_answer_does_not() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        for name in ("none.md", "secret.md"):
            await client.post("/v1/inferences", json=request(files=[f"handbook:{name}"]))

    run(scene, play)
    assert [(note.asker, note.workspace, note.action, note.code) for note in scene.witness.notes] == [
        (user("alice"), "acme", "default", 404)
    ] * 2
    assert [note.text() for note in scene.witness.notes] == [
        "1 of the files that had to be shown: handbook:none.md unknown",
        "1 of the files that had to be shown: handbook:secret.md unlisted",
    ]
    assert len({note.request for note in scene.witness.notes}) == 2


def test_a_membership_that_ended_ends_what_was_ones_own() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
        del scene.store.roles["acme", user("alice")]
        assert (await client.get(f"/v1/inferences/{id}")).status_code == 404
        assert (await client.get("/v1/inferences")).json() == {"inferences": []}

    run(scene, play)


def test_who_administers_sees_others_requests_and_why_they_were_refused() -> None:
    scene = Scene()
    scene.runners.by_itself = [ended(status=125, refused="handbook:a.md is not what was ingested")]

    async def play(client: httpx.AsyncClient) -> None:
        told = (await client.post("/v1/inferences?wait=5", json=request())).json()
        assert told["state"] == "refused"
        assert "ingested" not in json.dumps(told)
        assert told["result"]["why"] == "it could not be run; the reason is on record under its number"
        async with scene.client("admin") as admin:
            seen = (await admin.get(f"/v1/inferences/{told['id']}")).json()
        assert seen["result"]["refused"] == "handbook:a.md is not what was ingested"

    run(scene, play)


# ---- rights


@pytest.mark.parametrize(
    ("role", "asked", "status", "detail"),
    [
        ("viewer", request(), 201, ""),
        (
            "viewer",
            {"workspace": "acme", "command": ["id"]},
            403,
            "the role viewer may not run commands of one's own",
        ),
        ("editor", {"workspace": "acme", "command": ["id"]}, 201, ""),
        ("owner", {"workspace": "quiet", "command": ["id"]}, 403, "this workspace runs what it offers"),
        ("mallory", {"workspace": "acme", "command": ["id"]}, 404, "there is nothing here that you may see"),
    ],
)
def test_only_members_hear_of_a_right_they_lack(role: str, asked: Any, status: int, detail: str) -> None:
    scene = Scene()
    scene.store.roles["quiet", user("owner")] = Role.OWNER

    async def play(client: httpx.AsyncClient) -> None:
        told = await client.post("/v1/inferences", json=asked)
        assert told.status_code == status
        if status != 201:
            assert detail in told.json()["detail"]

    run(scene, play, role)


@pytest.mark.parametrize(
    ("token", "status"), [("viewer", 403), ("editor", 403), ("admin", 201), ("owner", 201)]
)
def test_members_are_set_by_those_who_may(token: str, status: int) -> None:
    scene = Scene()
    path = "/v1/workspaces/acme/members/user:idp:new%2Fone"

    async def play(client: httpx.AsyncClient) -> None:
        assert (await client.put(path, json={"role": "viewer"})).status_code == status
        if status == 201:
            assert (await client.put(path, json={"role": "editor"})).json()["before"]["role"] == "viewer"
            assert (await client.get(path)).json()["role"] == "editor"
            assert (await client.delete(path)).json()["before"]["role"] == "editor"
            assert (await client.get(path)).status_code == 404

    run(scene, play, token)


def test_a_wrong_document_of_a_member_has_every_fault_told() -> None:
    async def play(client: httpx.AsyncClient) -> None:
        told = await client.put("/v1/workspaces/acme/members/user:idp:x", json={"clearance": 3, "rolle": "x"})
        assert told.status_code == 422
        assert [fault["where"] for fault in told.json()["problems"]] == ["role", "clearance", "rolle"]

    run(Scene(), play, "admin")


# ---- who is not believed


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer a b"},
        {"Authorization": "Bearer ä".encode("latin-1")},
        [("Authorization", "Bearer alice"), ("Authorization", "Bearer bob")],
    ],
)
def test_no_token_no_answer(headers: Any) -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        told = await client.get("/v1/inferences", headers=headers)
        assert told.status_code == 401
        assert told.headers["www-authenticate"] == 'Bearer realm="egressd"'
        assert told.headers["content-type"] == "application/problem+json"

    run(scene, play, "")
    assert scene.log == []


def test_every_token_that_is_not_believed_gets_the_same() -> None:
    async def play(client: httpx.AsyncClient) -> None:
        told = [await client.get("/v1/inferences", headers=headers) for headers in (
            {"Authorization": "Bearer bad"},
            {"Authorization": "Bearer badly-signed"},
            {"Authorization": "Bearer alice", "OpenID-Nonce": "another"},
            {"Authorization": "Bearer alice", "OpenID-Nonce": "with blanks"},
        )]  # fmt: skip
        assert {one.status_code for one in told} == {401}
        assert len({one.content for one in told}) == 1
        assert told[0].headers["www-authenticate"] == 'Bearer realm="egressd", error="invalid_token"'
        good = {"Authorization": "bearer  alice", "OpenID-Nonce": "n-1"}
        assert (await client.get("/v1/inferences", headers=good)).status_code == 200

    run(Scene(), play, "")


def test_a_token_in_the_url_is_none() -> None:
    async def play(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/inferences?access_token=alice")).status_code == 401

    run(Scene(), play, "")


# ---- what cannot be meant, and too much


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        ("text/plain", b"{}", 415),
        ("", b"{}", 415),
        ("application/json", b"x" * ((1 << 20) + 1), 413),
        ("application/json", b"nonsense", 422),
        ("application/json; charset=utf-8", b"[]", 422),
        ("application/json", b"[" * 100_000, 422),
        ("application/json", b"\xff", 422),
        ("application/json", b"", 422),
    ],
)
def test_bodies_that_are_none(kind: str, data: bytes, status: int) -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        told = await client.post("/v1/inferences", content=data, headers={"Content-Type": kind})
        assert told.status_code == status
        assert told.json()["status"] == status

    run(scene, play)
    assert scene.log == ["verify"]


def test_every_problem_of_a_request_at_once() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        asked = {
            "workspace": "A!",
            "inference": "x",
            "command": [],
            "files": ["x", 3],
            "limits": {"wall": 0, "x": 1},
        }
        told = await client.post("/v1/inferences", json=asked)
        assert told.status_code == 422
        assert [one["where"] for one in told.json()["problems"]] == [
            "workspace", "command", "files[0]", "files[1]", "limits.wall", "limits.x", "",
        ]  # fmt: skip
        more = await client.post("/v1/inferences", json=request(limits={"wall": 61, "memory": 1 << 31}))
        assert [one["where"] for one in more.json()["problems"]] == ["limits.wall", "limits.memory"]
        unknown = (await client.post("/v1/inferences", json=request(inference="none"))).json()
        assert unknown["problems"][0]["remedy"] == "it offers default, closed"
        scene.document("handbook:big.md", {user("alice")}, size=2 << 30)
        much = await client.post("/v1/inferences", json=request(candidates=["handbook:big.md"]))
        assert (much.status_code, much.json()["problems"][0]["where"]) == (422, "candidates")

    run(scene, play)
    assert scene.runners.talks == []


def test_too_often() -> None:
    scene = Scene(with_limits(rate=(2, 60.0), per_user=9, at_once=9))

    async def play(client: httpx.AsyncClient) -> None:
        codes = [(await client.post("/v1/inferences", json=request())).status_code for _ in range(3)]
        assert codes == [201, 201, 429]
        told = await client.post("/v1/inferences", json=request())
        assert told.headers["retry-after"] == "30"
        async with scene.client("bob") as bob:
            assert (await bob.post("/v1/inferences", json=request())).status_code == 201
        assert (await client.get("/v1/inferences")).status_code == 200, "reading is paced by itself"
        scene.time += 30
        assert (await client.post("/v1/inferences", json=request())).status_code == 201
        assert (await client.post("/v1/inferences", json=request())).status_code == 429

    run(scene, play)


def test_too_much_at_once_of_one_and_of_all() -> None:
    scene = Scene(with_limits(rate=(1000, 60.0), per_user=2, at_once=3))
    scene.runners.by_itself = None

    async def play(client: httpx.AsyncClient) -> None:
        ids = [(await client.post("/v1/inferences", json=request())).json()["id"] for _ in range(2)]
        third = await client.post("/v1/inferences", json=request())
        assert (third.status_code, third.headers["retry-after"]) == (429, "1")
        async with scene.client("bob") as bob:
            assert (await bob.post("/v1/inferences", json=request())).status_code == 201
            full = await bob.post("/v1/inferences", json=request())
            assert (full.status_code, "as many inferences" in full.json()["detail"]) == (429, True)
        await until(lambda: len(scene.runners.talks) == 3)
        assert (await client.delete(f"/v1/inferences/{ids[0]}?wait=5")).json()["state"] == "ended"
        assert (await client.post("/v1/inferences", json=request())).status_code == 201

    run(scene, play)


def test_a_request_that_is_refused_gives_its_place_back() -> None:
    scene = Scene(with_limits(rate=(1000, 60.0), per_user=1, at_once=1))

    async def play(client: httpx.AsyncClient) -> None:
        for wrong in (request(workspace="nowhere"), {"x": 1}, request(files=["handbook:none.md"])):
            assert (await client.post("/v1/inferences", json=wrong)).status_code in (404, 422)
        assert (await client.post("/v1/inferences?wait=5", json=request())).status_code == 201

    run(scene, play)


# ---- what does not work


def test_what_is_broken_is_503_and_not_explained() -> None:
    scene = Scene()

    async def play(client: httpx.AsyncClient) -> None:
        scene.store.broken = True
        told = await client.post("/v1/inferences", json=request())
        assert (told.status_code, told.headers["retry-after"]) == (503, "5")
        assert "secret" not in told.text
        scene.store.broken, scene.verifier.away = False, True
        assert (await client.post("/v1/inferences", json=request())).status_code == 503
        scene.verifier.away = False
        scene.store.generations = None  # type: ignore[assignment]
        assert (await client.post("/v1/inferences", json=request())).status_code == 500

    run(scene, play)


def test_a_method_that_is_not_there_names_those_that_are() -> None:
    async def play(client: httpx.AsyncClient) -> None:
        for method in ("PATCH", "HEAD", "OPTIONS"):
            told = await client.request(method, "/v1/inferences")
            assert told.status_code == 405
            assert set(told.headers["allow"].split(", ")) == {"GET", "POST"}

    run(Scene(), play)


@pytest.mark.parametrize("path", ["/v1/inferences?wait=x", "/v1/inferences?wait=-1"])
def test_a_wait_that_is_none(path: str) -> None:
    async def play(client: httpx.AsyncClient) -> None:
        assert (await client.post(path, json=request())).status_code == 422

    run(Scene(), play)


def test_a_receipt_is_of_what_has_ended() -> None:
    scene = Scene()
    scene.runners.by_itself = [PROJECTED, STARTED]

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences", json=request())).json()["id"]
        for path in ("receipt", "receipt?proof=1"):
            assert (await client.get(f"/v1/inferences/{id}/{path}")).status_code == 409

    run(scene, play)


def test_a_manifest_is_of_what_has_begun() -> None:
    """Before that nothing had it, and it may never be had."""
    scene = Scene()
    scene.runners.by_itself = None

    async def play(client: httpx.AsyncClient) -> None:
        id = (await client.post("/v1/inferences", json=request(files=["handbook:a.md"]))).json()["id"]
        path = f"/v1/inferences/{id}/manifest"
        await until(lambda: scene.runners.talks)
        (talk,) = scene.runners.talks
        assert (await client.get(path)).status_code == 409
        talk.says.put_nowait(PROJECTED)
        await until(lambda: talk.heard)
        assert (await client.get(path)).status_code == 409
        talk.says.put_nowait(STARTED)
        await until(lambda: scene.service.inferences.get(id).state is State.RUNNING)  # type: ignore[union-attr]
        assert (await client.get(path)).content == MANIFEST
        scene.runners.by_itself = [PROJECTED, ended(status=125, refused="no sandbox")]
        other = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
        told = await client.get(f"/v1/inferences/{other}/manifest")
        assert (told.status_code, told.json()["detail"]) == (409, "nothing was run, so nothing was shown")

    run(scene, play)
