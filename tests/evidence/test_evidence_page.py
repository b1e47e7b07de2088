"""docs/evidence.md: what it lists is what the code says, and what it tells a reader to type works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scene
from egressd.journal import summary
from egressd.journal.statement import Predicate
from egressd.processes import prover

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text()
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src" / "egressd").rglob("*.py"))


def rows(head: str) -> list[list[str]]:
    """Of the table with this first line."""
    lines = PAGE.split(f"\n{head}\n")[1].splitlines()[1:]
    table = lines[: next(at for at, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_event_and_field_is_one_that_is_recorded() -> None:
    words = set(re.findall(r"\w+", SOURCE))
    said = set(re.findall(r'"([a-z-]+)"', SOURCE))
    for events, fields, _ in rows("| event | fields | says |"):
        assert set(re.findall(r"`([a-z-]+)`", events)) <= said
        assert set(fields.split()) <= words | {
            f"{of}_{what}"  # spelled out of two parts
            for of in ("in", "ok", "out", "denied", "other", "question", "answer", "unrecorded")
            for what in ("packets", "bytes")
        }


def test_every_part_of_a_proof_is_named() -> None:
    named = [name for row in rows("| field | what |") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(Predicate.__struct_fields__)


def test_every_cause_of_a_loss_is_one() -> None:
    causes = [cause for row in rows("| cause | what it was |") for cause in re.findall(r"`([\w-]+)`", row[0])]
    assert len(causes) == 8
    for cause in causes:
        spelled = re.sub(r"-enobufs$", "-{", cause)  # the errno's name is put in
        assert f'"{spelled}' in SOURCE, cause


def test_the_limits_are_those_of_the_code() -> None:
    limits = section("Limits")
    assert f"{prover.MAX_RECORDS:,} records or {prover.MAX_BYTES >> 20} MiB" in limits
    assert f"{summary.MAX_ATTEMPTS:,} attempts and {summary.MAX_FLOWS:,} flows" in limits


@pytest.mark.skipif(not all(map(shutil.which, ("jq", "openssl"))), reason="the page uses openssl and jq")
@pytest.mark.parametrize("damage", [False, True])
def test_a_proof_is_verified_by_hand_as_the_page_says(tmp_path: Path, *, damage: bool) -> None:
    story = scene.usual(tmp_path)
    proof = story.proof()
    (tmp_path / "egressd.pem").write_text(story.key.public.pem())
    text = section("Verify without egressd")
    (tmp_path / "root.py").write_text(blocks(text, "python")[0])
    by_hand = blocks(text, "sh")
    assert len(by_hand) == 2
    if damage:
        by_hand[0] = by_hand[0].replace("> statement.json", "| sed 's/tcp/udp/' > statement.json", 1)
    (tmp_path / "acme.proof").write_bytes(proof)
    script = "\n".join([*by_hand, f"{sys.executable} root.py"])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    good = "Signature Verified Successfully"
    said = done.stdout.splitlines()
    if damage:  # the checkpoint is as it was, the records are not
        assert said[0].startswith("Signature Verification Failure")
        assert said[1:] == [good, "False"]
    else:
        assert said == [good, good, "True"], done.stderr
