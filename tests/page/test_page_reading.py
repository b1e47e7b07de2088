"""From proofs as egressd makes them, checked by its own verifier, to the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from egressd.journal.page import page
from egressd.journal.page_data import Amount, PageData
from egressd.journal.page_reading import from_report
from egressd.journal.verification import LIMITS, Report, verify
from evidence.scene import DB, OPENAI, Story, sealed, usual

BELOW = {"link": "eg7", "workspace": "acme"}


def read(report: Report) -> PageData:
    return from_report(report, reasons={"unlisted": "no rule allows it"})


def headline(text: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", text)
    assert found
    return found[1]


def test_a_workspace(tmp_path: Path) -> None:
    story = usual(tmp_path)
    report = verify(story.proof(), key=story.key.public)
    data = read(report)
    assert data.verified, data.failures
    assert (data.workspace, data.link, data.guard, data.restricted) == ("acme", "", "enforce", True)
    rows = {row.host: row for row in data.hosts}
    assert rows[OPENAI].out == Amount(8, 800)
    assert rows[OPENAI].in_ == Amount(8, 12_000)
    assert rows[OPENAI].addresses == ("192.0.2.10", "2001:db8::10")
    assert rows[OPENAI].ports == ("443/tcp",)
    assert rows[DB].out == Amount()
    assert [(row.reason, row.total, row.logged) for row in data.refusals] == [("unlisted", Amount(2, 120), 2)]
    assert [(t.destination, t.port, t.count, t.by) for t in data.tried] == [
        ("203.0.113.9", "443/tcp", 2, "kernel; eg7")
    ]
    assert [(s.link, s.who, s.ended) for s in data.sandboxes] == [
        ("eg7", "uid 4001", "exit 0"),
        ("eg9", "uid 4001", "exit 0"),
    ]
    assert [m.refused for m in data.moments] == [True, False, False]
    assert data.lost == 0
    assert any("resolver: started 1" in h.detail for h in data.happenings)
    assert all(each.holds for each in data.equations)
    assert len(data.equations) == 3
    assert set(LIMITS) <= set(data.not_proved)


def test_the_page_of_a_workspace(tmp_path: Path) -> None:
    story = usual(tmp_path)
    text = page(verify(story.proof(), key=story.key.public), reasons={"unlisted": "no rule allows it"})
    assert headline(text).endswith(f"800 B to {OPENAI}.")
    for said in (
        "no rule allows it",
        "rival",
        "203.0.113.9",
        story.key.public.fingerprint,
        "&quot;host&quot;",
    ):
        assert (said in text) == (said not in ("rival", "&quot;host&quot;")), said
    assert "Key compared with yours" in text


def test_without_a_key_the_page_says_so(tmp_path: Path) -> None:
    text = page(verify(usual(tmp_path).proof()))
    assert "✓ Verified" in text
    assert "No key was given, so who signed is only what the file says." in text
    assert "no: nothing but this file says whose key it is" in text


@pytest.mark.parametrize("place", [100, 5_000, -200])
def test_a_changed_byte_is_not_verified(tmp_path: Path, place: int) -> None:
    proof = bytearray(usual(tmp_path).proof())
    proof[place] ^= 1
    text = page(verify(bytes(proof)))
    assert "✗ NOT verified" in text
    assert "✓ Verified" not in text
    assert headline(text) == "This proof does not hold. Nothing below can be relied on."


@pytest.mark.parametrize("data", [b"", b"{}", b"\x00" * 40, b"[" * 5000, b"<script>alert(1)</script>"])
def test_what_is_no_proof_has_a_page(data: bytes) -> None:
    text = page(verify(data))
    assert "✗ NOT verified" in text
    assert "<script" not in text


def test_another_signer_is_not_verified(tmp_path: Path) -> None:
    story = usual(tmp_path / "one")
    other = usual(tmp_path / "two")
    text = page(verify(sealed(story.state(), other.key), key=story.key.public))
    assert "✗ NOT verified" in text


def test_a_receipt_has_the_links_own_numbers(tmp_path: Path) -> None:
    story = usual(tmp_path)
    data = read(verify(story.proof(link=7), key=story.key.public))
    assert data.verified, data.failures
    assert data.link == "eg7"
    assert [(row.host, row.out) for row in data.hosts] == [(OPENAI, Amount(3, 300))]
    assert [each.holds for each in data.equations] == [True, True]
    assert data.equations[0].left == ("in", Amount(5, 420))
    assert [s.link for s in data.sandboxes] == ["eg7"]
    assert data.refused == Amount(2, 120)


def test_a_receipt_names_what_no_record_tells(tmp_path: Path) -> None:
    """Ten packets were admitted over the link; three are in a flow record, four were questions."""
    story = Story(tmp_path)
    story.tell("sandbox-opening", **BELOW, uid=1, pid=2, command="x", policy="", guard="enforce")
    story.flow(7, packets=3)
    story.tell(
        "link-flows", process="auditor", **BELOW, flows=2, out_packets=7, out_bytes=620, in_packets=3,
        in_bytes=0, questions=2, question_packets=4, question_bytes=320, answer_packets=4, answer_bytes=500,
        ok_packets=10, ok_bytes=900, unrecorded_packets=3, unrecorded_bytes=280, partial=False,
    )  # fmt: skip
    story.tell(
        "sandbox-closed", **BELOW, uid=1, pid=2, seconds=1.0, in_packets=10, in_bytes=900, ok_packets=10,
        ok_bytes=900, denied_packets=0, denied_bytes=0, other_packets=0, other_bytes=0,
    )  # fmt: skip
    data = read(verify(story.proof(link=7), key=story.key.public))
    assert data.verified, data.failures
    assert {row.host: row.out for row in data.hosts} == {
        OPENAI: Amount(3, 300),
        "(resolver)": Amount(4, 320),
        "(in no record)": Amount(3, 280),
    }
    assert all(each.holds for each in data.equations)
    assert headline(page(verify(story.proof(link=7)))) == (
        f"Nothing left but 300 B to {OPENAI} and 280 B that no record of a connection names."
    )


@pytest.mark.parametrize(
    ("tell", "words"),
    [
        (
            lambda s: s.tell("lost", process="auditor", cause="queue", **{"from": "warden"}, count=14),
            "14 records were lost",
        ),
        (lambda s: s.tell("clock-stepped", process="auditor", seconds=3.5), "clock stepped"),
        (
            lambda s: s.tell(
                "policy-changed", workspace="acme", change="+ host x.test", widens=True, by="uid 0"
            ),
            "widens: ",
        ),
    ],
)
def test_what_limits_a_proof_is_on_its_page(
    tmp_path: Path, tell: Callable[[Story], object], words: str
) -> None:
    story = usual(tmp_path)
    assert words not in page(verify(story.proof()))
    tell(story)
    assert words in page(verify(story.proof()))


def test_books_that_do_not_balance_are_not_verified(tmp_path: Path) -> None:
    story = usual(tmp_path)
    story.snapshot(openai=9, unlisted=2, off=1)
    text = page(verify(story.proof(), key=story.key.public))
    assert "✗ NOT verified" in text
    assert "✗ does not hold: +1 packets, +0 bytes" in text


@pytest.mark.parametrize("guard", ["off", "observe"])
def test_a_guard_that_was_open_for_a_while_restricted_nothing(tmp_path: Path, guard: str) -> None:
    story = usual(tmp_path)
    story.tell(
        "sandbox-opening", link="eg11", workspace="acme", uid=1, pid=2, command="x", policy="", guard=guard
    )
    text = page(verify(story.proof()))
    assert headline(text).startswith("For a part of the time nothing was restricted")


def test_a_window_without_any_snapshot_claims_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.tell("sandbox-opening", **BELOW, uid=1, pid=2, command="x", policy="", guard="enforce")
    text = page(verify(story.proof(), key=story.key.public))
    assert headline(text) == "As far as it was counted, nothing left."


def test_hostile_text_in_records_stays_text(tmp_path: Path) -> None:
    story = usual(tmp_path)
    evil = "</td><script>alert(1)</script>\u202e\x1b[2J"
    story.tell(
        "denied",
        process="auditor",
        link="eg7",
        workspace="acme",
        reason=evil,
        protocol=evil,
        destination=evil,
        port=1,
    )
    story.tell(
        "attempt", **BELOW, protocol=evil, destination=evil, port=1, pid=1, executable=evil, command=evil
    )
    text = page(verify(story.proof(), key=story.key.public))
    assert "✓ Verified" in text
    assert "<script" not in text
    assert "&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\u{202e}\\u{001b}[2J" in text
