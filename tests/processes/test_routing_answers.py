"""Which provider serves a route: asked of a controller that knows where names lead.

Every answer is on record; a flood of equal ones is one record with their number.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from controller_lab import World, world

from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.processes.routing_answers import RoutingAnswers

DE4, DE6, FR4, US4, US6, NOWHERE4 = (
    "11.22.33.1",
    "2a10:1::1",
    "11.22.34.1",
    "11.22.35.1",
    "2a10:3::1",
    "11.22.37.1",
)
PREFIXES = {"DE": "11.22.33.0/24 2a10:1::/32", "FR": "11.22.34.0/24", "US": "11.22.35.0/24 2a10:3::/32"}
POLICY = """\
guard: enforce
members: [user:4001]
{pin}
providers:
  near:
    type: openai-compatible
    base_url: https://near.example.com/v1
    api_key: secret://env/NEAR_KEY
    residency: {{region: eu-1, jurisdiction: DE, source_url: "https://example.com/where"}}
  far: {{type: openai-compatible, base_url: "https://far.example.com/v1"}}
  here: {{type: ollama, base_url: "http://127.0.0.1:11434/v1"}}
  away: {{type: openai-compatible, base_url: "https://away.example.com/v1"}}
routes:
  default: {{provider: near}}
  both: {{providers: [far, near]}}
  home: {{providers: [far, here]}}
  unlisted: {{provider: away}}
allow:
  - provider: near
  - provider: far
  - provider: here
"""
PINNED, OPEN = POLICY.format(pin="residency: {jurisdictions: [EU]}"), POLICY.format(pin="")
numbers = itertools.count(1)
Dialogue = Callable[[World], Coroutine[Any, Any, None]]


def play(directory: Path, dialogue: Dialogue, *, acme: str = PINNED) -> None:
    async def scene() -> None:
        async with world(directory, acme=acme) as made:
            made.table("lab", **PREFIXES)
            await made.start()
            made.serve()
            await dialogue(made)

    asyncio.run(scene())


def slots(*addresses: str) -> Any:
    return (*map(ip_address, addresses), *[None] * (4 - len(addresses)))


async def lead(w: World, **hosts: tuple[str, ...]) -> None:
    """The resolver found these: `near` is near.example.com."""
    policy = w.controller.policies["acme"]
    rules = {rule.host: rule for rule in policy.hosts}
    for name, addresses in hosts.items():
        host = f"{name}.example.com"
        found = messages.Resolved(
            request=next(numbers), host=host, private=False,
            terms=w.controller.residency.terms(policy, rules[host]),
            slots4=slots(*(a for a in addresses if "." in a)),
            slots6=slots(*(a for a in addresses if ":" in a)),
        )  # fmt: skip
        assert isinstance(await w.ask(found), messages.Admitted)
    await w.settle()
    w.told.clear()


def asking(w: World, *, later: Any = None) -> Callable[..., Any]:
    """As the control socket does: the document."""
    answers = RoutingAnswers(w.controller, later=later or (lambda _, __: None))

    def ask(route: str = "default", *, uid: int = 4001) -> Any:
        return answers.answer(w.controller.policies["acme"], route, uid=uid)

    ask.drain = answers.drain  # type: ignore[attr-defined]
    return ask


def test_the_document_says_what_was_selected_and_why(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4, DE6))
        document = asking(w)()
        selected = document.pop("selected")
        (candidate,) = document.pop("candidates")
        assert document == {
            "workspace": "acme", "route": "default", "pin": ["EU"], "code": "inside", "remedy": "",
            "policy": w.controller.policies["acme"].digest, "registry": w.controller.registry.digest,
            "reason": candidate["reason"],
        }  # fmt: skip
        assert selected.pop("api_key") == "secret://env/NEAR_KEY", "the reference; there is no other"
        assert selected == candidate
        assert {name: selected[name] for name in ("provider", "type", "base_url", "host", "port")} == {
            "provider": "near", "type": "openai-compatible", "base_url": "https://near.example.com/v1",
            "host": "near.example.com", "port": 443,
        }  # fmt: skip
        assert (selected["region"], selected["jurisdiction"]) == ("eu-1", "DE")
        assert selected["source_url"] == "https://example.com/where"
        assert selected["addresses"] == [DE4, DE6]
        assert selected["prefixes"] == ["11.22.33.0/24", "2a10:1::/32"]
        (table,) = selected["tables"]
        assert table.startswith("lab@sha256:")
        assert selected["refused"] == {}

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    ("policy", "route", "leads", "provider", "code"),
    [
        # by address, pinned to the EU
        (PINNED, "default", {"near": (DE4,)}, "near", "inside"),
        (PINNED, "default", {"near": (DE6,)}, "near", "inside"),
        (PINNED, "default", {"near": (FR4, DE6)}, "near", "inside"),
        (PINNED, "default", {"near": (US4,)}, None, "outside"),
        (PINNED, "default", {"near": (US6,)}, None, "outside"),
        (PINNED, "default", {"near": (US4, US6, NOWHERE4)}, None, "outside"),
        (PINNED, "default", {"near": (NOWHERE4,)}, None, "no-prefix"),
        (PINNED, "default", {"near": (US4, DE6)}, "near", "inside"),  # only the German one is led to
        (PINNED, "default", {}, None, "unresolved"),
        # the first that complies, in the order of the route; never one that does not
        (PINNED, "both", {"far": (DE4,), "near": (FR4,)}, "far", "inside"),
        (PINNED, "both", {"far": (US4,), "near": (FR4,)}, "near", "inside"),
        (PINNED, "both", {"far": (US4,), "near": (US6,)}, None, "none-complies"),
        (PINNED, "both", {"near": (DE4,)}, "near", "inside"),
        # this machine
        (PINNED, "home", {"far": (US4,)}, "here", "loopback"),
        (OPEN, "home", {"far": (US4,)}, "far", "unpinned"),
        # not pinned
        (OPEN, "default", {"near": (US4,)}, "near", "unpinned"),
        (OPEN, "default", {}, None, "unresolved"),
        # what no rule allows is no way out
        (OPEN, "unlisted", {}, None, "unlisted"),
        (PINNED, "unlisted", {}, None, "unlisted"),
        # external routing is off
        (f"local_only: true\n{PINNED}", "both", {}, None, "none-complies"),
        (f"local_only: true\n{PINNED}", "default", {}, None, "local-only"),
        (f"local_only: true\n{PINNED}", "home", {}, "here", "loopback"),
        (f"local_only: true\n{OPEN}", "default", {}, None, "local-only"),
    ],
)
def test_who_is_selected(
    tmp_path: Path,
    policy: str,
    route: str,
    leads: dict[str, tuple[str, ...]],
    provider: str | None,
    code: str,
) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, **leads)
        document = asking(w)(route)
        selected = document["selected"]
        assert (None if selected is None else selected["provider"]) == provider
        assert document["code"] == code, document["reason"]
        assert document["reason"]
        names = {"default": ["near"], "both": ["far", "near"], "home": ["far", "here"], "unlisted": ["away"]}
        assert [one["provider"] for one in document["candidates"]] == names[route]
        (record,) = [fields for event, fields in told(w)]
        assert ("provider" in record) == (provider is not None)

    play(tmp_path, dialogue, acme=policy)


def told(w: World) -> list[tuple[str, dict[str, Any]]]:
    return [(what, fields) for who, what, fields in w.told if who == "journal" and what.startswith("route-")]


def test_addresses_that_residency_refuses_are_shown_with_the_reason(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4, US4, US6))
        (candidate,) = asking(w)()["candidates"]
        assert candidate["addresses"] == [DE4]
        assert list(candidate["refused"]) == [US4, US6]
        assert all("US is not in EU" in why for why in candidate["refused"].values())

    play(tmp_path, dialogue)


def test_another_table_decides_anew_at_once(tmp_path: Path) -> None:
    """Nothing of what was known under the old one selects anybody."""

    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,))
        ask = asking(w)
        assert ask()["selected"] is not None
        w.table("lab", US="11.22.33.0/24")
        await w.controller.apply(by="test")
        assert ask()["selected"] is None

    play(tmp_path, dialogue)


def test_a_broken_table_selects_nobody(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,), far=(DE4,))
        (w.tables / "lab.json").write_text("{")
        await w.controller.apply(by="test")
        ask = asking(w)
        for route in ("default", "both", "home"):
            document = ask(route)
            assert document["selected"] is None
            assert {one["code"] for one in document["candidates"]} == {"broken-registry"}

    play(tmp_path, dialogue)


# ---- what is recorded


def test_a_selection_is_recorded_with_its_evidence(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4, DE6))
        document = asking(w)()
        assert told(w) == [
            (
                "route-selected",
                {
                    "workspace": "acme", "route": "default", "provider": "near", "host": "near.example.com",
                    "declared_region": "eu-1", "jurisdiction": "DE", "addresses": f"{DE4}, {DE6}",
                    "prefixes": "11.22.33.0/24, 2a10:1::/32", "tables": document["selected"]["tables"][0],
                    "code": "inside", "by": "uid 4001", "registry": document["registry"],
                    "policy": document["policy"], "text": document["reason"],
                },
            )
        ]  # fmt: skip

    play(tmp_path, dialogue)


def test_a_refusal_is_recorded_with_each_reason(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(US4,), far=(NOWHERE4,))
        document = asking(w)("both", uid=0)
        ((event, record),) = told(w)
        assert event == "route-refused"
        text = record.pop("text")
        assert text == document["reason"]
        assert f"near: {US4} is in 11.22.35.0/24" in text and f"far: {NOWHERE4} is in no published" in text
        assert record == {
            "workspace": "acme", "route": "both", "code": "none-complies", "by": "uid 0",
            "registry": document["registry"],
        }  # fmt: skip

    play(tmp_path, dialogue)


def test_a_route_that_is_not_is_refused_with_those_there_are(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        with pytest.raises(Refused, match="no route 'defautl'; its routes are both, default, home, unlisted"):
            asking(w)("defautl")
        ((event, record),) = told(w)
        assert (event, record["route"], record["by"]) == ("route-refused", "defautl", "uid 4001")
        assert record["code"] == "no-such-route"

    play(tmp_path, dialogue)


def test_a_policy_without_routes_says_how_to_write_one(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        with pytest.raises(Refused, match="its policy has none: write routes:"):
            asking(w)("default")

    play(tmp_path, dialogue, acme="guard: enforce\n")


# ---- a flood of questions


class Later:
    """An event loop's `call_later`, of which the test is the clock."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def __call__(self, seconds: float, what: Callable[[], None]) -> None:
        assert seconds == 10.0
        self.due.append(what)

    def passes(self) -> None:
        due, self.due = self.due, []
        for what in due:
            what()


def test_the_same_answer_is_one_record_at_once_and_one_for_the_others(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,))
        later = Later()
        ask = asking(w, later=later)
        for _ in range(1000):
            ask()
        ((_, first),) = told(w)
        assert "count" not in first
        later.passes()
        assert told(w)[1:] == [("route-selected", {**first, "count": 999})]
        ask()
        assert told(w)[2:] == [("route-selected", first)], "a window later it is told at once again"
        later.passes()
        later.passes()
        assert len(told(w)) == 3, "one that was not repeated is not told twice"

    play(tmp_path, dialogue)


def test_another_answer_another_asker_another_route_is_told_at_once(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,))
        ask = asking(w, later=Later())
        for _ in range(3):
            ask()
            ask(uid=4002)
            ask("both")
        await lead_again(w, near=(FR4,))
        ask()
        await lead_again(w, near=(US4,))
        ask()
        facts = [(event, r["by"], r["route"], r.get("prefixes")) for event, r in told(w)]
        assert facts == [
            ("route-selected", "uid 4001", "default", "11.22.33.0/24"),
            ("route-selected", "uid 4002", "default", "11.22.33.0/24"),
            ("route-selected", "uid 4001", "both", "11.22.33.0/24"),
            ("route-selected", "uid 4001", "default", "11.22.34.0/24"),
            ("route-refused", "uid 4001", "default", None),
        ]
        ask.drain()  # type: ignore[attr-defined]
        assert [r["count"] for _, r in told(w)[5:]] == [2, 2, 2], "at the end nothing is left untold"

    async def lead_again(w: World, **hosts: tuple[str, ...]) -> None:
        before = list(w.told)
        await lead(w, **hosts)
        w.told[:] = before

    play(tmp_path, dialogue)


def test_routes_that_somebody_makes_up_are_one_record_however_many(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        later = Later()
        ask = asking(w, later=later)
        for number in range(500):
            with pytest.raises(Refused):
                ask(f"made-up-{number}")
        assert [record["route"] for _, record in told(w)] == ["made-up-0"]
        later.passes()
        assert [record["count"] for _, record in told(w)[1:]] == [499]

    play(tmp_path, dialogue)


def test_what_is_kept_to_be_counted_is_bounded(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,))
        later = Later()
        ask = asking(w, later=later)
        ask(uid=1)
        ask(uid=1)
        for uid in range(2, 4098):
            ask(uid=uid)
        counts = [record for _, record in told(w) if "count" in record]
        assert [(record["by"], record["count"]) for record in counts] == [("uid 1", 1)], (
            "told early, not lost"
        )
        later.passes()
        assert len(told(w)) == 4098

    play(tmp_path, dialogue)


# ---- over the control socket


def test_members_are_answered_and_nobody_else(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        await lead(w, near=(DE4,))
        asked = messages.SelectRoute(workspace="acme", route="default")
        answers = {}
        for uid in (4001, 4002):
            client = w.client()
            client.say(messages.ForUser(uid=uid, gids=()))
            answers[uid] = await client.ask(asked)
            client.close()
        root = w.client()
        assert (await root.ask(asked))["selected"]["provider"] == "near"
        assert answers[4001]["selected"]["provider"] == "near"
        assert isinstance(answers[4002], messages.Refusal) and answers[4002].reason == "member"
        assert [record["by"] for _, record in told(w)] == ["uid 4001", "uid 0"]
        refusal = await root.ask(messages.SelectRoute(workspace="acme", route="none"))
        assert isinstance(refusal, messages.Refusal) and refusal.reason == "unlisted"
        root.close()

    play(tmp_path, dialogue)


def test_who_changed_a_policy_and_what_he_was_asked_is_on_record(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        w.told.clear()
        w.write("acme", PINNED.replace("enforce", "off"))
        await client.ask(messages.Apply(why="guard acme off"))
        (record,) = w.records("policy-changed")
        assert record["why"] == "guard acme off" and record["by"].startswith("uid 0")
        w.told.clear()
        w.write("acme", PINNED)
        await client.ask(messages.Apply())
        (record,) = w.records("policy-changed")
        assert "why" not in record
        client.close()

    play(tmp_path, dialogue)


def test_what_was_asked_about_one_workspace_is_not_told_to_members_of_others(tmp_path: Path) -> None:
    """What was written before is applied with it: their records are for their members, who read them."""

    async def dialogue(w: World) -> None:
        client = w.client()
        w.write("rival", PINNED)
        await client.ask(messages.Apply())
        w.told.clear()
        for name in ("acme", "rival"):
            w.write(name, PINNED.replace("enforce", "off"))
        await client.ask(messages.Apply(why="guard acme off", about="acme"))
        whys = {record["workspace"]: record.get("why") for record in w.records("policy-changed")}
        assert whys == {"acme": "guard acme off", "rival": None}
        w.told.clear()
        for name in ("acme", "rival"):
            w.write(name, PINNED)
        await client.ask(messages.Apply(why="residency import aws"))
        whys = {record["workspace"]: record.get("why") for record in w.records("policy-changed")}
        assert whys == dict.fromkeys(("acme", "rival"), "residency import aws")
        client.close()

    play(tmp_path, dialogue)
