"""What the HTTP API answers, and to whom: to root, a member, a member of another workspace, a stranger."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from api_scene import ACME, MEMBER, OTHER, PROOF, ROOT, SECRETS, STRANGER, Site, play, write_journal

from egressd.ipc import messages
from egressd.journal import testimony
from egressd.processes.api import Bounds
from egressd.processes.api_table import ENDPOINTS
from egressd.ruleset.observe import Counters, LinkCounts, Tally

ACMES, RIVALS = {"workspace": "acme"}, {"workspace": "rival"}
STORY: list[tuple[str, str, dict[str, Any]]] = [
    ("auditor", "journal-opened", {"file": "0001.jsonl", "next": 0}),
    ("controller", "sandbox-opening", {**ACMES, "link": "eg7", "uid": 4001}),
    ("auditor", "denied", {**ACMES, "link": "eg7", "reason": "unlisted", "destination": "192.0.2.9"}),
    ("controller", "route-selected", {**ACMES, "route": "default", "provider": "azure", "host": "api.test"}),
    ("controller", "route-refused", {**ACMES, "route": "default", "text": "none complies"}),
    ("controller", "route-selected", {**ACMES, "route": "fast", "provider": "azure"}),
    ("controller", "route-selected", {**RIVALS, "route": "default", "provider": "secret.rival.test"}),
    ("auditor", "denied", {**RIVALS, "link": "eg77", "reason": "port", "destination": "2001:db8::9"}),
    ("auditor", "lost", {"cause": "queue", "count": 2, "from": "controller"}),
    ("supervisor", "process-started", {"name": "warden", "pid": 4002}),
]
OWN = [1, 2, 3, 4, 5]


def numbers(found: Any) -> list[int]:
    return [record["seq"] for record in found]


# ---- one word from each


def test_each_document_as_root(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        status = (await site.get("/v1/status")).json
        assert {row["workspace"] for row in status["workspaces"]} == {"acme", "rival"}
        counters = (await site.get("/v1/counters")).json
        assert {row["workspace"] for row in counters["workspaces"]} == {"acme", "rival"}
        one = (await site.get("/v1/counters?workspace=rival")).json
        assert [row["workspace"] for row in one["workspaces"]] == ["rival"]
        policy = (await site.get("/v1/policy?workspace=acme")).json
        assert policy["digest"] == site.world.controller.policies["acme"].digest
        assert [(rule["kind"], rule["host"], rule["ports"]) for rule in policy["rules"]] == [
            ("host", "api.test", ["8080/tcp"])
        ]
        assert (policy["guard"], policy["pin"]["jurisdictions"], policy["barred"]) == ("enforce", [], [])
        assert (await site.get("/v1/proof?workspace=acme")).json == PROOF
        assert numbers((await site.get("/v1/audit")).json) == list(range(len(STORY)))
        assert (await site.get("/healthz")).json == {"status": "ok"}
        assert (await site.get("/openapi.json")).json["openapi"] == "3.1.0"

    play(tmp_path, story)


def test_the_proof_that_is_asked_for(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        target = "/v1/proof?workspace=acme&since=2026-11-21T10:00:00%2B01:00&until=2026-11-21T12:00:00+01:00"
        assert (await site.get(target, uid=MEMBER)).status == 200
        (asked,) = site.world.of(messages.MakeProof)
        assert (asked.workspace, asked.link) == ("acme", None)
        assert (asked.since, asked.until) == ("2026-11-21T09:00:00.000000Z", "2026-11-21T11:00:00.000000Z")
        refused = await site.get("/v1/proof?workspace=acme&sandbox=eg5")
        assert refused.status == 404 and "eg5" in refused.detail

    play(tmp_path, story)


def test_head_is_get_without_its_body(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for target in ("/v1/policy?workspace=acme", "/v1/policy?workspace=none", "/nowhere", "/openapi.json"):
            got, head = await site.get(target), await site.get(target, method="HEAD")
            assert (head.status, head.headers) == (got.status, got.headers)
            assert (head.body, len(got.body)) == (b"", int(got.headers["content-length"]))

    play(tmp_path, story)


# ---- records


QUERIES: list[tuple[str, list[int]]] = [
    ("", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ("route=default", [3, 4, 6]),
    ("route=default&workspace=acme", [3, 4]),
    ("route=default&event=route-refused", [4]),
    ("route=default&event=denied", []),
    ("workspace=acme", [1, 2, 3, 4, 5]),
    ("workspace=gone", []),  # root may ask for records of what is no more
    ("event=denied,lost", [2, 7, 8]),
    ("reason=unlisted", [2]),
    ("reason=port,unlisted", [2, 7]),
    ("host=api.test", [3]),
    ("host=192.0.2.9", [2]),
    ("host=2001:DB8:0::9", [7]),
    ("since=2026-11-21T10:00:07Z", [7, 8, 9]),
    ("since=2026-11-21T11:00:07+01:00", [7, 8, 9]),  # a plus is a plus
    ("until=2026-11-21T10:00:02Z", [0, 1]),
    ("since=2026-11-21T10:00:02&until=2026-11-21T10:00:04", [2, 3]),
    ("since=0001-01-01&limit=2", [0, 1]),
    ("until=9999-12-31T23:59:59Z", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ("limit=2", [8, 9]),  # the last ones
    ("after=0&limit=2", [1, 2]),  # the first after
    ("after=7", [8, 9]),
    ("after=9", []),
    ("%61fter=7", [8, 9]),
]


def test_records_that_are_asked_for(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        for query, expected in QUERIES:
            assert numbers((await site.get(f"/v1/audit?{query}")).json) == expected, query

    play(tmp_path, story)


def test_pages_lead_from_one_to_the_next(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY * 10)
        target, seen = "/v1/audit?workspace=acme&limit=7&after=0", []
        for _ in range(20):
            reply = await site.get(target, uid=MEMBER)
            seen += numbers(reply.json)
            link = reply.headers.get("link", "")
            if not link:
                break
            assert link.endswith('>; rel="next"') and "limit=7" in link and "workspace=acme" in link
            target = link[1:].partition(">")[0]
        assert seen == [10 * round + own for round in range(10) for own in OWN]

    play(tmp_path, story)


def test_a_link_says_again_what_was_asked_and_no_more(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, [("auditor", "denied", {"host": 'a>;"b'})] * 3)
        reply = await site.get('/v1/audit?host=a>;"b&after=0&limit=1')
        assert numbers(reply.json) == [1]
        assert reply.headers["link"] == '</v1/audit?host=a%3E;%22b&limit=1&after=1>; rel="next"'

    play(tmp_path, story)


def test_records_come_byte_for_byte_in_either_form(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        lines = (site.journal / "0001.jsonl").read_bytes()
        plain = await site.get("/v1/audit", "Accept: application/x-ndjson")
        assert (plain.headers["content-type"], plain.body) == ("application/x-ndjson", lines)
        array = await site.get("/v1/audit", "Accept: application/json, */*;q=0.1")
        assert array.headers["content-type"] == "application/json"
        assert array.body == b"[" + lines[:-1].replace(b"\n", b",\n") + b"]\n"
        assert array.json == [json.loads(line) for line in lines.splitlines()]
        assert plain.headers["vary"] == "Accept"

    play(tmp_path, story)


def test_a_search_ends_in_time_and_says_where_to_go_on(tmp_path: Path) -> None:
    """With no time at all a page still gets on by one piece of the journal."""

    async def story(site: Site) -> None:
        filler = [("auditor", "denied", {"workspace": "acme", "name": "x" * 900})] * 1200
        write_journal(site.journal, [*filler, *filler, *STORY])
        target, steps, seen = "/v1/audit?event=lost&after=0", 0, []
        while target:
            reply = await site.get(target)
            seen += numbers(reply.json)
            target = reply.headers.get("link", "")[1:].partition(">")[0]
            steps += 1
        assert seen == [2408] and 2 <= steps <= 5
        refused = await site.get("/v1/audit?event=lost&reason=dial")
        assert refused.status == 503 and "since= or after=" in refused.detail

    play(tmp_path, story, bounds=Bounds(search_within=0.0))


def test_a_journal_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.journal.rmdir()
        reply = await site.get("/v1/audit")
        assert (reply.status, "No such file" in reply.detail) == (503, True)
        assert str(tmp_path) not in reply.detail

    play(tmp_path, story)


# ---- who may see what


def test_a_member_sees_the_records_of_their_workspace_and_no_others(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        for query in ("", "?after=0", "?since=2026-11-21", "?limit=1000", "?host=**.test", "?route=default"):
            reply = await site.get(f"/v1/audit{query}", uid=MEMBER)
            assert reply.status == 200 and set(numbers(reply.json)) <= set(OWN), query
            assert not any(secret.encode() in reply.body for secret in SECRETS), query
        assert numbers((await site.get("/v1/audit")).json) == OWN
        assert numbers((await site.get("/v1/audit", uid=OTHER)).json) == [6, 7]
        assert (await site.get("/v1/audit", uid=STRANGER)).json == []
        assert (await site.get("/v1/audit?event=lost,process-started,journal-opened", uid=MEMBER)).json == []

    play(tmp_path, story)


def test_what_brokers_say_of_requests_is_for_root(tmp_path: Path) -> None:
    """A member of the workspace does not see it under any of the names that it might be asked for."""
    told = {"workspace": "acme", "link": "eg1", "request": "r-" + "a" * 26, "host": "api.test",
            "route": "default", "reason": "unlisted", "asker": "user:okta:00u1",
            "discarded": 3467173467}  # fmt: skip
    events = sorted(testimony.PRIVATE)

    async def story(site: Site) -> None:
        own = [("controller", "sandbox-opening", {"workspace": "acme", "link": "eg1"})]
        write_journal(site.journal, [*own, *(("controller", event, told) for event in events), *own])
        last = len(events) + 1
        for uid in (MEMBER, STRANGER):
            for query in (
                "",
                "?after=0",
                "?since=2026-11-21",
                "?workspace=acme",
                "?limit=1",
                "?after=0&limit=1",
            ):
                reply = await site.get(f"/v1/audit{query}", uid=uid)
                assert not any(word in reply.body for word in (b"request", b"00u1", b"3467173467"))
            for query in (f"event={','.join(events)}", "host=api.test", "route=default", "reason=unlisted"):
                reply = await site.get(f"/v1/audit?{query}", uid=uid)
                assert (reply.status, reply.json) == (200, []), query
        assert numbers((await site.get("/v1/audit", uid=MEMBER)).json) == [0, last]
        assert numbers((await site.get("/v1/audit?after=0&limit=1", uid=MEMBER)).json) == [last]
        assert numbers((await site.get("/v1/audit?after=0", uid=ROOT)).json) == list(range(1, last + 1))
        found = await site.get(f"/v1/audit?event={','.join(events)}", uid=ROOT)
        assert numbers(found.json) == list(range(1, last)), "it was there to be seen"

    play(tmp_path, story)


WITH_WORKSPACE = ["/v1/audit?", "/v1/policy?", "/v1/counters?", "/v1/proof?", "/v1/route?route=default&"]


@pytest.mark.parametrize("target", WITH_WORKSPACE)
def test_what_is_anothers_looks_like_what_is_not_there(tmp_path: Path, target: str) -> None:
    """Byte for byte but for the name that was asked for, and before anything is read or made for it."""

    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        for uid in (MEMBER, STRANGER):
            theirs = await site.get(f"{target}workspace=rival", uid=uid)
            none = await site.get(f"{target}workspace=nobdy", uid=uid)
            assert theirs.status == none.status == 404
            assert theirs.body.replace(b"rival", b"nobdy") == none.body
            assert theirs.headers == none.headers
            assert "secret" not in theirs.detail
        assert not site.world.of(messages.MakeProof)

    play(tmp_path, story)


def test_no_document_tells_a_member_of_another_workspace(tmp_path: Path) -> None:
    """Names, numbers, alarms, drift, what is broken, sandboxes."""
    (tmp_path / "workspaces").mkdir()
    (tmp_path / "workspaces" / "secret.rival.test.yaml").write_text("workspace: [")  # a problem to be told
    (tmp_path / "workspaces").rename(tmp_path / "broken")

    async def story(site: Site) -> None:
        w = site.world
        write_journal(site.journal, STORY)
        (tmp_path / "broken" / "secret.rival.test.yaml").rename(w.workspaces / "rivalbroken.yaml")
        await w.controller.apply(dry_run=False, by="test")
        sandbox = w.sandbox("rival")
        w.controller.alarm("tampered", "the gateway was changed by somebody: chain of rival", {})
        w.controller.drifted = w.drift = [
            "add rule netdev egressd rival_4",
            "add to rival_out4: secret.rival.test",
        ]
        tally = Tally(4002, 4002)
        w.counters = Counters(
            links={sandbox.link.device: LinkCounts(in_=tally, ok=tally)},
            denied={"rival": {"unlisted": tally}}, unlisted={}, elements=(), replies={}, opened={}, late={},
        )  # fmt: skip
        w.refused = {"resolver": {"rival": {"name": 4002}}, "inspector": {"rival": {"sni-other": 4002}}}
        targets = ["/v1/status", "/v1/counters", "/v1/counters?workspace=acme", "/v1/policy?workspace=acme",
                   "/v1/audit", "/v1/route?workspace=acme&route=none"]  # fmt: skip
        for uid in (MEMBER, STRANGER):
            for target in targets:
                reply = await site.get(target, uid=uid)
                told = [secret for secret in SECRETS if secret.encode() in reply.body]
                assert not told, (uid, target, reply.body)
        as_root = b"".join([(await site.get(target, uid=ROOT)).body for target in targets])
        assert all(secret.encode() in as_root for secret in SECRETS), "it was there to be told"

    play(tmp_path, story)


# ---- what is refused


MALFORMED: list[tuple[str, str]] = [
    ("/v1/audit?workspaze=acme", "did you mean workspace?"),
    ("/v1/audit?evnt=denied&limt=3", "did you mean event?"),
    ("/v1/audit?colour=red", "there are workspace, route, event"),
    ("/v1/audit?limit=0", "from 1 to 1000"),
    ("/v1/audit?limit=1001", "from 1 to 1000"),
    ("/v1/audit?limit=9e9", "from 1 to 1000"),
    ("/v1/audit?after=-1", "no number from 0"),
    ("/v1/audit?since=lately", "write 30m, 2h, 7d"),
    ("/v1/audit?since=99999999w", "write 30m"),
    ("/v1/audit?since=2026-11-21T10:00&until=2026-11-21T09:00", "is before since"),
    ("/v1/audit?reason=unlistd", "did you mean unlisted?"),
    ("/v1/audit?event=Denied!", "is no event"),
    ("/v1/audit?workspace=a&workspace=b", "is there twice"),
    ("/v1/audit?workspace=", "has no value"),
    ("/v1/audit?workspace=../etc", "is not the name of a workspace"),
    ("/v1/audit?host=%ff", "is not UTF-8"),
    ("/v1/audit?host=%zz", "is not percent-encoded"),
    ("/v1/audit?host=a%0ab", "control characters"),
    ("/v1/audit?host=" + "x" * 1025, "more than 1024 characters"),
    ("/v1/policy", "is missing: /v1/policy?workspace=acme"),
    ("/v1/route?workspace=acme", "is missing: /v1/route?route=default"),
    ("/v1/route?workspace=acme&route=" + "x" * 257, "more than 256 characters"),
    ("/v1/proof?workspace=acme&sandbox=7", "write eg7"),
    ("/v1/status?workspace=acme", "it has none"),
    ("/healthz?x", "it has none"),
]


def test_a_parameter_that_cannot_be_is_named_with_what_to_write(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for target, says in MALFORMED:
            reply = await site.get(target)
            assert (reply.status, says in reply.detail) == (400, True), (target, reply)
            assert reply.json["parameters"] and all(reply.json["parameters"].values())

    play(tmp_path, story)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        reply = await site.get("/v1/proof?since=x&sandbx=eg1")
        assert set(reply.json["parameters"]) == {"workspace", "since", "sandbx"}

    play(tmp_path, story)


METHODS = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def test_no_other_method_is_answered(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for path, method in itertools.product([*ENDPOINTS, "/nowhere"], METHODS):
            reply = await site.get(path, method=method)
            assert reply.status == (405 if path in ENDPOINTS else 404)
            assert reply.headers.get("allow") == ("GET, HEAD" if path in ENDPOINTS else None)
            assert reply.detail

    play(tmp_path, story)


def test_what_is_not_in_the_table_is_not_there(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for path in ["/", "/v1", "/v1/audit/", "/V1/audit", "/v1/../v1/audit", "//v1/audit", "/v1%2faudit"]:
            reply = await site.get(path)
            assert reply.status == 404 and "/v1/audit" in reply.detail

    play(tmp_path, story)


HERE = """localhost LOCALHOST:8000 localhost: 127.0.0.1 127.0.0.1:8000 127.9.9.9:1 [::1] [::1]:8000"""
ELSEWHERE = """evil.example localhost.evil.example 127.0.0.1.nip.io 0.0.0.0 [::] 192.0.2.7:8000
[::ffff:127.0.0.1] 127.1 2130706433
localhost@evil.example localhost:8000:1 ::1 * localhost:80a xn--localhost"""


@pytest.mark.parametrize("where", ["unix", "127.0.0.1"])
def test_only_names_of_this_machine_lead_here(tmp_path: Path, where: str) -> None:
    """Another one's page can be given our address, but not our name (DNS rebinding)."""

    async def story(site: Site) -> None:
        for host in HERE.split():
            assert (await site.get("/v1/status", host=host)).status == 200, host
        for host in ELSEWHERE.split():
            reply = await site.get("/v1/status", host=host)
            assert (reply.status, "http://localhost" in reply.detail) == (403, True), host
        two = await site.get("/v1/status", "Host: evil.example")
        assert two.status == 400
        # nobody's browser speaks over a Unix socket
        for line in (
            b"GET /v1/status HTTP/1.1\r\n\r\n",
            b"GET /v1/status HTTP/1.0\r\n\r\n",
            b"GET /v1/status HTTP/1.1\r\nHost:\r\n\r\n",
        ):
            assert site.reply(await site.say(line), "/v1/status").status == (200 if where == "unix" else 403)

    play(tmp_path, story, where=where)


PAGES = [
    "Origin: https://evil.example",
    "Origin: null",
    "Origin: http://localhost",
    "Origin:",
    *(f"Sec-Fetch-Site: {site}" for site in ("cross-site", "same-site", "same-origin")),
]


def test_a_web_page_gets_nothing(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for path, line, method in itertools.product(ENDPOINTS, PAGES, ("GET", "OPTIONS")):
            reply = await site.get(path, line, method=method)
            assert (reply.status, "web page" in reply.detail) == (403, True)
            assert not any(name.startswith("access-control") for name in reply.headers)

    play(tmp_path, story)


def test_what_is_typed_into_a_browser_is_answered_and_cannot_be_shown_elsewhere(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        reply = await site.get("/v1/status", "Sec-Fetch-Site: none")
        assert reply.status == 200
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert (reply.headers["x-content-type-options"], reply.headers["cache-control"]) == (
            "nosniff",
            "no-store",
        )

    play(tmp_path, story)


# ---- every answer that is documented


def target(path: str) -> str:
    words = [f"{p.name}={p.example}" for p in ENDPOINTS[path].parameters if p.required]
    return f"{path}?{'&'.join(words)}" if words else path


@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_answer_of_a_path_that_is_documented_can_be_had(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documented = set(ENDPOINTS[path].statuses)

    async def story(site: Site) -> None:
        found: dict[int, str] = {}

        async def note(reply: Any) -> None:
            got = await reply
            found[got.status] = got.detail if got.status != 200 else "ok"

        await note(site.get(f"{target(path)}{'&' if '?' in target(path) else '?'}nonsense=1"))
        await note(site.get(target(path), "Origin: https://evil.example"))
        await note(site.get(target(path), "Content-Length: 5"))
        await note(site.get(target(path), "X: " + "x" * 9000))
        begun = f"GET {target(path)} HTTP/1.1\r\n".encode()
        reply = site.reply(await site.say(begun), path)
        found[reply.status] = reply.detail
        if 404 in documented:
            await note(
                site.get(f"{path}?{'route=x&' if path == '/v1/route' else ''}workspace=rival", uid=MEMBER)
            )
        site.uid = ROOT
        if 429 in documented:
            await crowd(site)
            await note(site.get(target(path)))
            site.world.release.set()  # type: ignore[attr-defined]
        if 503 in documented:
            (tmp_path / "control.sock").unlink()
            await note(site.get(target(path)))
        monkeypatch.setattr(type(site.api), f"_{ENDPOINTS[path].name}", _broken)
        await note(site.get(target(path)))
        assert set(found) | {200} == documented
        assert all(len(text) > 20 for text in found.values()), found

    async def crowd(site: Site) -> None:
        """As many questions as may be: all wait for one that is not answered."""
        release = asyncio.Event()
        site.world.release = release  # type: ignore[attr-defined]
        for turns in (site.api._asking, site.api._proving, site.api._searching):
            turns._asked[ROOT] = site.api.bounds.most  # type: ignore[attr-defined]

        def back() -> None:
            for turns in (site.api._asking, site.api._proving, site.api._searching):
                del turns._asked[ROOT]

        asyncio.get_running_loop().create_task(_then(release, back))

    play(tmp_path, story, bounds=Bounds(head_within=0.3))


async def _then(event: asyncio.Event, work: Any) -> None:
    await event.wait()
    work()


async def _broken(*_: Any) -> Any:
    raise ZeroDivisionError


# ---- what is away


def test_a_controller_that_does_not_answer_is_said_in_time(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.world.silent.add("warden")
        began = time.monotonic()
        reply = await site.get("/v1/counters")
        assert reply.status == 503 and time.monotonic() - began < 3
        assert reply.headers["retry-after"] == "1"
        assert (await site.get("/healthz")).status == 200

    play(tmp_path, story, bounds=Bounds(ask_within=0.3))


def test_an_auditor_that_is_away_keeps_proofs_and_nothing_else(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, STORY)
        site.world.disconnect("evidence")
        await site.world.settle()
        assert (await site.get("/v1/proof?workspace=acme")).status == 503
        assert len((await site.get("/v1/audit")).json) == len(STORY)
        assert "error" not in (await site.get("/v1/counters")).json

    play(tmp_path, story)


def test_a_thread_that_waits_for_a_proof_holds_up_no_end(tmp_path: Path) -> None:
    began = time.monotonic()

    async def story(site: Site) -> None:
        site.world.held = asyncio.Event()
        asking = asyncio.create_task(site.get("/v1/proof?workspace=acme"))
        while not site.world.of(messages.MakeProof):
            await asyncio.sleep(0.01)
        site.api.close()
        assert (await asking).status == 503
        site.world.held.set()

    play(tmp_path, story)
    assert time.monotonic() - began < 10


def test_one_user_who_asks_without_end_keeps_no_other_out(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        site.world.held = asyncio.Event()
        proofs = [asyncio.create_task(site.get("/v1/proof?workspace=acme", uid=MEMBER)) for _ in range(12)]
        while sum(task.done() for task in proofs) < 4:
            await asyncio.sleep(0.01)
        turned_away = [task.result() for task in proofs if task.done()]
        assert {reply.status for reply in turned_away} == {429}
        assert "wait for one of them" in turned_away[0].detail
        assert (await site.get("/v1/counters", uid=MEMBER)).status == 200
        assert (await site.get("/v1/audit", uid=OTHER)).status == 200
        theirs = asyncio.create_task(site.get("/v1/proof?workspace=rival", uid=OTHER))
        while not any(asked.workspace == "rival" for asked in site.world.of(messages.MakeProof)):
            await asyncio.sleep(0.01)
        site.world.held.set()
        assert (await theirs).status == 200
        assert sorted(reply.status for reply in await asyncio.gather(*proofs)) == [200] * 8 + [429] * 4

    play(tmp_path, story)


def test_groups_make_members(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        assert (await site.get("/v1/policy?workspace=acme", uid=4555)).status == 200
        assert (await site.get("/v1/policy?workspace=acme", uid=4556)).status == 404

    play(tmp_path, story, acme=ACME.replace("user:4001", "group:4555"))


def test_nobody_who_is_not_known_is_told_anything(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for path, endpoint in ENDPOINTS.items():
            reply = await site.get(target(path), uid=None)
            assert reply.status == (403 if endpoint.known else 200), path
            assert not endpoint.known or "use a Unix socket" in reply.detail

    play(tmp_path, story)
