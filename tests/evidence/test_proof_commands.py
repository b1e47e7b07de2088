"""`egressctl proof`, `verify`, `key` and `run --receipt`, as a person types them."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import scene
from egressd.cli import run as run_verb
from egressd.cli.main import main
from egressd.cli.whole_files import write_whole
from egressd.journal.keys import PrivateKey, Verifier
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import control


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> scene.Story:
    return scene.usual(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def proof(story: scene.Story, tmp_path: Path) -> Path:
    path = tmp_path / "acme.proof"
    path.write_bytes(story.proof())
    return path


@pytest.fixture
def key(story: scene.Story, tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    path.write_text(story.key.public.pem())
    return path


# ---- verify


def test_verified_with_key_and_policy(
    proof: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "acme.yaml").write_text(scene.POLICY)
    words = ["verify", str(proof), "--key", str(key), "--policy", str(tmp_path / "acme.yaml")]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{proof}: verified, signed by the key that was given\n")
    for said in ("eu.api.openai.com", "192.0.2.10", "unlisted", "203.0.113.9", "eg9", "over this link"):
        assert said in page
    assert "To know" not in page


def test_the_key_may_be_typed(story: scene.Story, proof: Path) -> None:
    assert main(["verify", str(proof), "--key", story.key.public.verifier(story.origin)]) == 0


def test_without_a_key_it_says_so(proof: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(proof)]) == 0
    assert "! No key was given" in capsys.readouterr().out


def test_a_changed_file_says_where(
    story: scene.Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(found: dict[str, Any]) -> None:
        texts = found["predicate"]["journal"]["records"]["lines"]
        place = next(n for n, line in enumerate(texts) if '"event":"denied"' in line)
        texts[place] = texts[place].replace("203.0.113.9", "203.0.113.8")

    path = tmp_path / "changed"
    path.write_bytes(scene.altered(story.proof(), change, story.key))
    assert main(["verify", str(path)]) == 1
    page = capsys.readouterr().out
    assert f"{path}: NOT VERIFIED" in page
    assert re.search(r"broken inclusion: Record \d+ was changed", page)
    assert re.search(r"at predicate\.journal\.records\.lines\[\d+\]", page)
    assert "What else was tried" not in page  # what does not hold is not shown as if it did


def test_another_key_or_policy_is_told(
    proof: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = PrivateKey.generate().public
    (tmp_path / "other.pem").write_text(other.pem())
    (tmp_path / "rival.yaml").write_text(scene.POLICY.replace("acme", "rival"))
    assert main(["verify", str(proof), "--key", str(tmp_path / "other.pem")]) == 1
    assert main(["verify", str(proof), "--policy", str(tmp_path / "rival.yaml")]) == 1
    assert "is none of the proof's" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["verify"],
        ["verify", "/nonexistent"],
        ["verify", "PROOF", "--key", "/nonexistent"],
        ["verify", "PROOF", "--key", "PROOF"],
        ["verify", "PROOF", "--policy", "/nonexistent.yaml"],
        ["verify", "PROOF", "--journal", "/nonexistent"],
        ["verify", "--journal", "/nonexistent"],
    ],
)
def test_what_cannot_be_checked_is_2(words: list[str], proof: Path) -> None:
    assert main([str(proof) if word == "PROOF" else word for word in words]) == 2


def test_for_programs(proof: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(proof), "--key", str(key), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], found["pinned"]) == (True, True)
    assert found["statement"]["summary"]["totals"]["ok_packets"] == 8
    assert found["statement"]["journal"]["records"] == {"count": 22}
    assert {check["verdict"] for check in found["checks"]} == {"holds"}


def test_foreign_text_is_harmless_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = scene.Story(tmp_path)
    story.tell("sandbox-opening", link="eg7", workspace="acme", uid=1, pid=2, command="\x1b[2J\u202eexe.txt")
    path = tmp_path / "proof"
    path.write_bytes(story.proof())
    assert main(["verify", str(path)]) == 0
    page = capsys.readouterr().out
    assert "\x1b[2J" not in page
    assert "\u202e" not in page
    assert r"\x1b[2J" in page


def test_a_page_is_written(proof: Path, tmp_path: Path) -> None:
    assert main(["verify", str(proof), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert scene.OPENAI in page


def test_neither_daemon_nor_network_nor_the_callers_files_are_needed(proof: Path) -> None:
    """In a process that may open nothing but what Python itself loads."""
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise AssertionError('a socket')\n"
        "socket.socket = no\n"
        "from egressd.cli.main import main\n"
        f"sys.exit(main(['--run-dir', '/nonexistent', 'verify', {str(proof)!r}]))\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], env={}, cwd="/", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_whole_journal_is_checked(story: scene.Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.checkpoint()
    words = ["verify", "--journal", str(story.directory), "--key", story.key.public.verifier(story.origin)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]
    assert found["records"] == found["signed"] == story.file.seq


def test_a_journal_is_held_to_what_was_kept_of_it(
    story: scene.Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = story.checkpoint()
    (tmp_path / "note").write_bytes((story.directory / "checkpoint").read_bytes())
    (tmp_path / "old.proof").write_bytes(story.proof())
    story.denied(7)
    story.checkpoint()
    other = scene.usual(tmp_path / "other")
    other.denied(1)
    other.checkpoint()
    foreign = other.directory / "checkpoint"
    note = (tmp_path / "note").read_text()
    (tmp_path / "later").write_text(note.replace(f"\n{size}\n", "\n9999\n", 1))
    (tmp_path / "otherwise").write_text(note.replace(f"\n{size}\n", f"\n{size - 1}\n", 1))
    for kept, status, said in (
        (tmp_path / "note", 0, "It continues the checkpoint that was given."),
        (tmp_path / "old.proof", 0, "It continues the checkpoint that was given."),
        (foreign, 1, "is of another log"),
        (tmp_path / "later", 1, "says 9999 records"),
        (tmp_path / "otherwise", 1, f"the first {size - 1} records are not those"),
        (tmp_path / "none", 2, ""),
    ):
        assert main(["verify", "--journal", str(story.directory), "--checkpoint", str(kept)]) == status
        assert said in capsys.readouterr().out


def test_a_whole_journal_after_a_change_of_keys(tmp_path: Path) -> None:
    story = scene.usual(tmp_path)
    old = story.key.public
    story.rotate()
    story.denied(7)
    story.checkpoint()
    for key in (old, story.key.public):
        words = ["verify", "--journal", str(story.directory), "--key", key.verifier(story.origin)]
        if key == old:
            assert main(words) == 0
    stranger = PrivateKey.generate().public.verifier(story.origin)
    assert main(["verify", "--journal", str(story.directory), "--key", stranger]) == 1


# ---- proof


@pytest.fixture
def daemon(story: scene.Story, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Answers `Prove` from the story; what was asked."""
    asked: list[dict[str, Any]] = []

    class Control:
        def __init__(self, run_dir: str) -> None:
            asked.append({"run_dir": run_dir})

        def __enter__(self) -> Control:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def prove(self, workspace: str, **options: Any) -> Any:
            asked[-1].update(options, workspace=workspace)
            if workspace != "acme":
                raise Refused(Reason.MEMBER, "you are not a member")
            told = {name: options[name] for name in ("link", "continues")}
            return json.loads(story.proof(workspace=workspace, **told))

    monkeypatch.setattr(control, "Control", Control)
    yield asked


def test_a_proof_is_written_and_summed_up(
    daemon: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            ["--run-dir", "/run/x", "proof", "-w", "acme", "--since", "2026-09-21T12:00", "--html", "a.html"]
        )
        == 0
    )
    assert daemon == [
        {
            "run_dir": "/run/x",
            "workspace": "acme",
            "link": None,
            "since": "2026-09-21T12:00:00.000000Z",
            "until": None,
            "continues": None,
        }
    ]
    assert "acme.proof: verified" in capsys.readouterr().out
    assert main(["verify", "acme.proof"]) == 0
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "acme.proof"]


def test_what_was_kept_is_a_proof_or_a_checkpoint(
    daemon: list[dict[str, Any]],
    story: scene.Story,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.proof").write_bytes(story.proof())
    size = len(story.leaves())
    Path("note").write_bytes((story.directory / "checkpoint").read_bytes())
    story.denied(7)
    for kept in ("old.proof", "note"):
        assert main(["proof", "-w", "acme", "--checkpoint", kept]) == 0
        assert daemon[-1]["continues"] == size
        assert main(["verify", "acme.proof", "--checkpoint", kept]) == 0
        assert f"whose {size} records are unchanged" in capsys.readouterr().out
    assert main(["proof", "-w", "acme"]) == 0
    assert main(["verify", "acme.proof", "--checkpoint", "note"]) == 1
    Path("note").write_text("nothing")
    for name in ("note", "none"):
        assert main(["verify", "acme.proof", "--checkpoint", name]) == 2
        assert main(["proof", "-w", "acme", "--checkpoint", name]) == 125


def test_a_key_with_the_name_of_another_journal_is_not_this_ones(
    proof: Path, story: scene.Story, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(proof), "--key", str(Verifier(story.origin, story.key.public))]) == 0
    assert main(["verify", str(proof), "--key", str(Verifier("other", story.key.public))]) == 1
    assert "The key that was given is of journal other" in capsys.readouterr().out
    journal = ["verify", "--journal", str(story.directory), "--key"]
    assert main([*journal, str(Verifier("other", story.key.public))]) == 2


def test_a_hostile_name_does_not_reach_the_terminal(
    proof: Path, story: scene.Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hostile(found: Any) -> None:
        found["predicate"]["scope"]["workspace"] = "acme\x1b]0;owned\x07"

    odd = tmp_path / "odd"
    odd.write_bytes(scene.altered(proof.read_bytes(), hostile, story.key))
    assert main(["verify", str(odd)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_of_one_sandbox(daemon: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "seven"
    assert main(["proof", "-w", "acme", "--sandbox", "eg7", "-o", str(path), "--json"]) == 0
    assert daemon[0]["link"] == 7
    assert main(["verify", str(path)]) == 0


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-w", "rival"], 125),
        (["-w", "acme", "-o", "/nonexistent/there"], 125),
        (["-w", "acme", "--since", "whenever"], 2),
        (["-w", "acme", "--sandbox", "eth0"], 2),
        ([], 2),
    ],
)
def test_no_proof_is_said(
    words: list[str],
    status: int,
    daemon: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["proof", *words]) == status
    assert list(tmp_path.iterdir()) == []


def test_boot_and_beginning_are_times(daemon: list[dict[str, Any]], tmp_path: Path) -> None:
    for word in ("boot", "beginning", "2h"):
        assert main(["proof", "-w", "acme", "--since", word, "-o", str(tmp_path / "x")]) == 0
    boot, beginning, hours = (each["since"] for each in daemon)
    assert beginning is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", boot)
    assert hours > "2026"


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "proof"
    old = os.umask(0o027)
    try:
        write_whole(path, b"first")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def _no_space(_: int) -> None:
    raise OSError(28, "no space")


# ---- run --receipt


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[str]]:
    """The sandbox of `run` ends with this status, having had this link; which commands were run."""

    def arrange(status: int, link: int) -> list[str]:
        ran: list[str] = []

        def watched(wish: Any, *, debug: bool) -> tuple[int, int]:
            ran.append(wish.command[0])
            return status, link

        monkeypatch.setattr(run_verb, "_watched", watched)
        return ran

    return arrange


@pytest.mark.parametrize("status", [0, 3, 137])
def test_a_receipt_comes_with_the_commands_own_status(
    status: int, ends: Callable[[int, int], list[str]], daemon: list[dict[str, Any]], tmp_path: Path
) -> None:
    ends(status, 7)
    path = tmp_path / "receipt"
    assert main(["run", "-w", "acme", "--receipt", str(path), "--", "true"]) == status
    assert (daemon[0]["link"], daemon[0]["workspace"]) == (7, "acme")
    assert daemon[0]["since"] is not None
    assert main(["verify", str(path)]) == 0


@pytest.mark.parametrize(("status", "shown"), [(0, 125), (3, 3)])
def test_a_receipt_that_cannot_be_had_spoils_only_a_success(
    status: int,
    shown: int,
    ends: Callable[[int, int], list[str]],
    daemon: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends(status, 7)
    path = tmp_path / "receipt"
    assert main(["run", "-w", "rival", "--receipt", str(path), "--", "true"]) == shown
    assert "there is no receipt: you are not a member" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("name", ["/nonexistent/receipt", "/proc/receipt", "."])
def test_a_receipt_with_no_place_stops_the_command(
    name: str,
    ends: Callable[[int, int], list[str]],
    daemon: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = ends(0, 7)
    assert main(["run", "-w", "acme", "--receipt", name, "--", "true"]) == 125
    assert ran == []
    assert "nothing was run" in capsys.readouterr().err


# ---- key


def test_the_key_in_all_its_spellings(
    story: scene.Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    from egressd.cli import daemon as daemon_module

    class Control:
        def __init__(self, run_dir: str) -> None: ...
        def __enter__(self) -> Control:
            return self

        def __exit__(self, *_: object) -> None: ...
        def ask(self, what: str) -> Any:
            assert what == "journal"
            return {"key": story.key.public.verifier(story.origin)}

        def change_key(self) -> Any:
            return {"key": story.key.public.verifier(story.origin)}

    monkeypatch.setattr(daemon_module, "Control", Control)
    assert main(["key", "show"]) == 0
    page = capsys.readouterr().out
    assert story.key.public.fingerprint in page
    assert hashlib.sha512(story.key.public.raw).hexdigest() in page
    assert main(["key", "show", "--pem"]) == 0
    assert capsys.readouterr().out == story.key.public.pem()
    assert main(["key", "rotate"]) == 0
    assert "Give this one to whoever checks proofs" in capsys.readouterr().out


def test_without_a_key_there_is_none_to_show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-dir", "/nonexistent", "key", "show"]) == 125
    assert "is not running" in capsys.readouterr().err
