"""A self-test on record: from whoever holds the sandbox it is of, once, and shown to every member."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from controller_lab import World
from test_testifying import DIGEST, MEMBER, attached, entered, play, says

SAID: dict[str, Any] = {
    "tried": 583, "refused": 583, "escaped": 0, "unclear": 0, "not_tried": 32, "table": DIGEST,
    "version": "0.1.0",
}  # fmt: skip


def test_a_member_who_is_no_broker_says_it_of_its_own_sandbox(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        member, link = await attached(w, callers, MEMBER)
        assert await says(member, "selftest", SAID) == "recorded"
        own = {"workspace": "acme", "broker_uid": MEMBER, "link": link, "boot": w.controller.boot}
        assert w.records("selftest") == [{**SAID, **own}]
        # the sandbox is nobody's request: its receipt stays every member's
        assert not any(w.controller.control.testifying.is_of_request(s) for s in w.controller.leases.by_link)
        member.close()

    play(tmp_path, dialogue)


def test_only_once(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        member, _ = await attached(w, callers, MEMBER)
        assert await says(member, "selftest", SAID) == "recorded"
        again = await says(member, "selftest", {**SAID, "escaped": 1})
        assert again == "protocol: selftest was said of this sandbox"
        assert len(w.records("selftest")) == 1
        member.close()

    play(tmp_path, dialogue)


def test_not_without_a_sandbox(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        member = await entered(w, callers, MEMBER)
        assert (await says(member, "selftest", SAID)).startswith("member: uid 4003 is no broker")
        broker = await entered(w, callers)
        assert (await says(broker, "selftest", SAID)).startswith("protocol: selftest is said of a sandbox")
        assert w.records("selftest") == []
        for client in (member, broker):
            client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"link": "eg1"}, "link: that is the controller's own to say"),
        ({"broker_uid": 0}, "broker_uid: that is the controller's own to say"),
        ({"tried": "many"}, "tried: not what selftest may say"),
        ({"table": "sha256:x"}, "table: not what selftest may say"),
        ({"remark": "all is well"}, "remark: selftest has no such field, since others are shown it"),
    ],
)
def test_nothing_but_its_numbers(
    tmp_path: Path, callers: list[int], change: dict[str, Any], text: str
) -> None:
    async def dialogue(w: World) -> None:
        member, _ = await attached(w, callers, MEMBER)
        assert await says(member, "selftest", {**SAID, **change}) == f"protocol: {text}"
        assert w.records("selftest") == []
        member.close()

    play(tmp_path, dialogue)


def test_holding_a_sandbox_gives_no_other_word(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        member, _ = await attached(w, callers, MEMBER)
        assert (await says(member, "leftovers-removed", {"count": 1})).startswith("member: ")
        member.close()

    play(tmp_path, dialogue)
