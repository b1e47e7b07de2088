"""What a proof says about where a pinned workspace's hosts are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import scene
from egressd.cli.proof_words import render
from egressd.cli.text import Paint
from egressd.journal.page import page
from egressd.journal.residency import CLAIM
from egressd.journal.verification import Report, Verdict, verify

OPENAI, DB = scene.OPENAI, scene.DB
TABLE = "sha256:" + "5e" * 32
REGISTRY = "sha256:" + "77" * 32


def placed(story: scene.Story, host: str, address: str, *, admitted: bool = True, **fields: Any) -> None:
    story.tell(
        "residency-admitted" if admitted else "residency-refused",
        workspace="nordic",
        host=host,
        address=address,
        code="vouched" if admitted else "outside",
        text=f"{address} is in no published prefix; the rule vouches for it"
        if admitted
        else f"{address} is in the US",
        declared="EEA and Switzerland",
        provider="" if admitted else "aws",
        region="" if admitted else "us-east-1",
        prefix="" if admitted else "203.0.113.0/24",
        table="" if admitted else "aws",
        table_digest="" if admitted else TABLE,
        registry=REGISTRY,
        **fields,
    )


@pytest.fixture
def story(tmp_path: Path) -> scene.Story:
    return scene.Story(tmp_path)


def reports(story: scene.Story, **asked: Any) -> tuple[Report, dict[Verdict, list[str]]]:
    report = verify(story.proof(workspace="nordic", **asked), key=story.key.public)
    said: dict[Verdict, list[str]] = {}
    for check in report.checks:
        if check.name == "residency":
            said.setdefault(check.verdict, []).append(check.text)
    return report, said


def all_placed(story: scene.Story) -> None:
    for address in ("192.0.2.10", "2001:db8::10"):
        placed(story, OPENAI, address)
    placed(story, DB, "10.20.0.5")


def test_every_address_that_was_reached_was_judged_first(story: scene.Story) -> None:
    all_placed(story)
    placed(story, OPENAI, "203.0.113.9", admitted=False)
    placed(story, OPENAI, "203.0.113.9", admitted=False)
    story.snapshot(openai=3, db=1, workspace="nordic")
    report, said = reports(story)
    assert report.verified
    assert said[Verdict.HOLDS] == [
        "Residency was pinned to CH, EEA: each of 3 addresses was judged first, 1 address refused."
    ]
    assert said[Verdict.NOTE] == [
        'db.internal.example is vouched for, by its rule\'s author: "our own machine room in Oslo"',
        "eu.api.openai.com is vouched for, by its rule's author:"
        ' "contract 4711: processed in the EEA and Switzerland"',
    ]
    assert CLAIM in report.limits


def test_an_address_without_a_record_is_told_and_nothing_is_claimed(story: scene.Story) -> None:
    placed(story, OPENAI, "192.0.2.10")
    story.snapshot(openai=3, workspace="nordic")
    _, said = reports(story)
    assert Verdict.HOLDS not in said
    (text,) = (text for text in said[Verdict.NOTE] if text.startswith("No record here says where it is"))
    assert "1 address of hosts, the first 2001:db8::10 of eu.api.openai.com" in text


def test_a_refusal_is_no_record_that_it_was_let_in(story: scene.Story) -> None:
    all_placed(story)
    story.snapshot(openai=3, workspace="nordic")
    flow = {"host": OPENAI, "kind": "dialled", "protocol": "tcp", "port": 443, "address": "203.0.113.9"}
    counts = {"out_packets": 1, "out_bytes": 100, "in_packets": 1, "in_bytes": 100, "seconds": 1.0}
    story.tell("flow", process="auditor", link="eg7", workspace="nordic", **flow, **counts)
    placed(story, OPENAI, "203.0.113.9", admitted=False)
    _, said = reports(story)
    assert Verdict.HOLDS not in said
    assert any("203.0.113.9 of eu.api.openai.com" in text for text in said[Verdict.NOTE])


def test_what_was_found_before_the_window_is_in_front_of_it(story: scene.Story) -> None:
    story.snapshot(workspace="nordic")
    all_placed(story)
    placed(story, OPENAI, "203.0.113.9")
    placed(story, OPENAI, "203.0.113.9", admitted=False)
    story.snapshot(openai=3, workspace="nordic")
    story.clock += 600
    story.snapshot(openai=9, db=2, workspace="nordic")
    report, said = reports(story, since=scene.at(story.clock - 300))
    assert report.verified
    assert said[Verdict.HOLDS] == [
        "Residency was pinned to CH, EEA: each of 3 addresses was judged first, 0 addresses refused."
    ]


def test_another_workspaces_place_may_not_be_in_front_of_it(story: scene.Story) -> None:
    story.snapshot(workspace="nordic")
    all_placed(story)
    story.snapshot(openai=3, workspace="nordic")
    story.clock += 600
    story.snapshot(openai=9, workspace="nordic")
    proof = story.proof(workspace="nordic", since=scene.at(story.clock - 300))

    def rename(found: dict[str, Any]) -> None:
        records = found["predicate"]["journal"]["records"]["lines"]
        for place, line in enumerate(records):
            if "residency-admitted" in line:
                records[place] = line.replace("nordic", "rivals")

    report = verify(scene.altered(proof, rename, story.key), key=story.key.public)
    assert any(check.name == "scope" and "rivals" not in check.text for check in report.broken)


def test_a_catalogue_that_is_not_egressds_alone_is_told(story: scene.Story) -> None:
    own = "own.yaml@sha256:" + "0a" * 32
    all_placed(story)
    story.snapshot(openai=1, workspace="nordic")
    report, said = reports(story, catalogue=(own,))
    assert report.verified
    assert (
        f"What URLs say of a place is also the word of a file of that machine's own: {own}."
        in said[Verdict.NOTE]
    )
    assert own in page(report)
    assert not any("own.yaml" in text for text in reports(story)[1][Verdict.NOTE])


def test_a_host_that_was_sent_nothing_needs_no_place(story: scene.Story) -> None:
    story.snapshot(workspace="nordic")
    _, said = reports(story)
    assert said[Verdict.HOLDS] == [
        "Residency was pinned to CH, EEA: each of 0 addresses was judged first, 0 addresses refused."
    ]


def test_only_the_controller_can_say_where_an_address_is(story: scene.Story) -> None:
    all_placed(story)
    story.tell(
        "residency-admitted", process="resolver", workspace="nordic", host=OPENAI, address="203.0.113.9"
    )
    story.snapshot(openai=1, workspace="nordic")
    report, _ = reports(story)
    assert report.statement is not None
    assert {place.address for place in report.statement.predicate.summary.places} == {
        "192.0.2.10", "2001:db8::10", "10.20.0.5"
    }  # fmt: skip


def test_another_workspaces_places_are_not_in_it(story: scene.Story) -> None:
    all_placed(story)
    story.snapshot(openai=1)
    report = verify(story.proof(), key=story.key.public)
    assert report.statement is not None
    assert report.statement.predicate.summary.places == ()
    assert b"residency-admitted" not in story.proof()
    assert CLAIM not in report.limits


def test_routes_are_told_with_whom_they_named(story: scene.Story) -> None:
    chosen = {"workspace": "nordic", "route": "default", "by": "uid 4001"}
    for _ in range(2):
        story.tell(
            "route-selected",
            **chosen,
            provider="openai-eu",
            host=OPENAI,
            declared_region="eu",
            jurisdiction="EEA",
        )
    story.tell(
        "route-selected",
        **chosen,
        provider="openai-eu",
        host=OPENAI,
        declared_region="eu",
        jurisdiction="EEA",
        count=40,
    )
    story.tell("route-refused", workspace="nordic", route="draft", text="no provider complies", by="uid 4001")
    report, _ = reports(story)
    assert report.statement is not None
    assert [(r.route, r.provider, r.times) for r in report.statement.predicate.summary.routes] == [
        ("default", "openai-eu", 42), ("draft", "", 1)
    ]  # fmt: skip
    text = render(report, name="x.proof", paint=Paint(io.StringIO(), no_color=True))
    assert "Which providers were named for its routes" in text


def test_words_and_page_say_where(story: scene.Story) -> None:
    all_placed(story)
    placed(story, OPENAI, "203.0.113.9", admitted=False)
    story.snapshot(openai=3, workspace="nordic")
    report, _ = reports(story)
    text = render(report, name="x.proof", paint=Paint(io.StringIO(), no_color=True))
    assert "Where its addresses are" in text
    assert "refused: outside" in text
    assert "203.0.113.0/24" in text
    shown = page(report)
    assert "Pinned to CH, EEA." in shown
    assert "our own machine room in Oslo" in shown
    assert TABLE in shown
