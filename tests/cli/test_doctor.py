"""`egressctl doctor`: on this machine as it is, as root and as anybody; and how it is shown."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from egressd.cli.doctor import document, render
from egressd.cli.main import main
from egressd.cli.text import Paint
from egressd.diagnosis.facts import Facts, Software, Trial
from egressd.diagnosis.findings import Finding, Result, Whose, conclude

ROOT = Path(__file__).resolve().parents[2]
CTL = ROOT / ".venv" / "bin" / "egressctl"
PLAIN = Paint(io.StringIO(), no_color=True)


def doctor(*words: str, uid: int | None = None) -> tuple[int, dict[str, Any]]:
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    done = subprocess.run(
        [*drop, str(CTL), "--json", "doctor", *words], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def results(answer: dict[str, Any], whose: str) -> dict[str, str]:
    return {row["need"]: row["result"] for row in answer["findings"] if row["whose"] == whose}


@pytest.mark.kernel
def test_as_root_everything_of_the_kernel_is_really_tried(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    config = tmp_path / "egressd.yaml"
    config.write_text("")
    status, answer = doctor("--config", str(config), "--run-dir", str(tmp_path))
    kernel = results(answer, "daemon")
    for need in (
        "transparent proxying",
        "rejecting at netdev ingress",
        "connection tracking that counts",
        "pairs of virtual devices",
        "a log of packets (NFLOG)",
        "the gateway's ruleset as a whole",
    ):
        assert kernel[need] == "ok"
    callers = results(answer, "callers")
    assert callers["namespaces without any right"] == "ok"
    assert callers["a /proc of its own in each sandbox"] == "ok"
    assert kernel["egressd runs and enforces"] == "warning"
    missing = [row for row in answer["findings"] if row["result"] == "missing"]
    assert (status == 1) == bool(missing) == (not answer["healthy"])
    assert all(row["fix"] for row in missing)


@pytest.mark.kernel
def test_without_rights_nothing_is_called_good_that_was_not_tried(tmp_path: Path) -> None:
    uid = 4001 if os.geteuid() == 0 else None
    _, answer = doctor("--config", "/nonexistent/egressd.yaml", "--run-dir", str(tmp_path), uid=uid)
    assert (
        results(answer, "neighbourhood")["no firewall of the host's drops what comes from egw"]
        == "not tested"
    )
    assert answer["facts"]["uid"] == (uid or os.geteuid())
    assert answer["facts"]["network"]["obstacles"] is None


@pytest.mark.kernel
def test_it_leaves_nothing(tmp_path: Path) -> None:
    def there() -> str:
        commands = (
            "ip -br link; ip netns; ip rule; nft list tables; cat /proc/mounts; sysctl -a 2>/dev/null | wc -l"
        )
        return subprocess.run(["sh", "-c", commands], capture_output=True, text=True, check=False).stdout

    before = there()
    doctor("--run-dir", str(tmp_path))
    assert there() == before


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("", True),
        ("upstream: [udp://9.9.9.9]\n", True),
        ("upstreem: []\n", False),
        ("pools: {sandbox4: x}\n", False),
    ],
)
def test_the_configuration_is_loaded(tmp_path: Path, text: str, ok: bool) -> None:
    config = tmp_path / "egressd.yaml"
    config.write_text(text)
    _, answer = doctor("--config", str(config), "--run-dir", str(tmp_path))
    assert results(answer, "daemon")[f"a configuration: {config}"] == ("ok" if ok else "missing")


def test_a_machine_that_cannot_be_examined(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise subprocess.TimeoutExpired("examiner", 120)

    monkeypatch.setattr(subprocess, "run", fails)
    assert main(["doctor"]) == 125
    assert "could not be examined" in capsys.readouterr().err


# ---- how it is shown

FACTS = Facts(
    uid=4001, software=Software(os="Debian \x1b[31m", kernel="6.1.0", nftables=Trial(False, "no \x07 module"))
)


def test_what_is_in_order_is_shown_only_when_asked_for() -> None:
    found = conclude(FACTS)
    short, long = (render(FACTS, found, paint=PLAIN, everything=everything) for everything in (False, True))
    assert "Linux 5.15 or later" not in short
    assert "ok         Linux 5.15 or later: 6.1.0" in long
    assert "missing    the binding of libnftables" in short


def test_each_has_how_it_was_tested_and_what_to_do() -> None:
    made = Finding(Whose.CALLERS, "a need", "a way", Result.MISSING, "a word", "a remedy")
    text = render(FACTS, [made], paint=PLAIN, everything=False)
    assert "  missing    a need: a word\n             tested: a way\n             fix: a remedy\n" in text
    assert text.endswith("1 missing")
    assert "egressctl run: 0 of 1 in order" in text


def test_what_a_machine_says_cannot_reach_the_terminal() -> None:
    text = render(FACTS, conclude(FACTS), paint=PLAIN, everything=True)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "no \\x07 module" in text


def test_the_document_holds_the_same_and_the_facts() -> None:
    found = conclude(FACTS)
    answer: Any = document(FACTS, found)
    assert [row["need"] for row in answer["findings"]] == [finding.need for finding in found]
    assert msgspec.convert(answer["facts"], Facts) == FACTS
    assert answer["healthy"] is False
    assert set(answer["findings"][0]) == {"whose", "need", "tested", "result", "said", "fix"}
