"""egressctl ask, against the real server; behind it the made-up world of tests/broker/service_scene.py."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "broker"))
from service_scene import PROJECTED, STARTED, Scene, ended, out, until
from service_server import Serving, serving

from egressd.broker.config import Listen
from egressd.cli.main import main

PROGRAM = [sys.executable, "-c", "import sys; from egressd.cli.main import main; sys.exit(main())"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with serving(Scene(), Listen(str(tmp_path / "broker.sock"))) as found:
        yield found


class Told:
    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out.decode("utf-8", "replace"), err.decode()


@pytest.fixture
def ask(served: Serving, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> Any:
    """In this process, with the token where it belongs."""
    monkeypatch.setenv("EGRESSD_TOKEN", "alice")
    monkeypatch.setenv("EGRESSD_BROKER", str(served.address))

    def call(*words: str, stdin: bytes = b"") -> Told:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        status = main(["ask", *words])
        sys.stdout.flush()
        written = capfdbinary.readouterr()
        return Told(status, written.out, written.err)

    return call


# ---- what it runs, and with what


def test_output_and_status_are_the_commands(served: Serving, ask: Any) -> None:
    served.scene.runners.by_itself = [
        PROJECTED,
        STARTED,
        out("yes\n"),
        out("hm\n", "stderr"),
        ended(status=3),
    ]
    told = ask("-w", "acme", "--file", "handbook:a.md", stdin=b"May I?")
    assert (told.status, told.out, told.err) == (3, "yes\n", "hm\n")
    job = served.scene.runners.talks[0].job
    assert (job.action, job.stdin, [copy.id for copy in job.copies]) == (
        "default",
        b"May I?",
        ["handbook:a.md"],
    )


@pytest.mark.parametrize("more", [["--no-stream"], []])
def test_with_and_without_a_stream_it_is_the_same(served: Serving, ask: Any, more: list[str]) -> None:
    assert (told := ask("-w", "acme", *more)).status == 0, told.err
    assert told.out == "hello\n"


def test_a_command_of_ones_own_without_network(served: Serving, ask: Any) -> None:
    assert ask("-w", "acme", "--network", "none", "--", "grep", "-r", "x").status == 0
    job = served.scene.runners.talks[0].job
    assert (job.action, job.command, job.network) == ("command", ("grep", "-r", "x"), "none")


def test_candidates_of_a_file_and_of_standard_input(served: Serving, ask: Any, tmp_path: Path) -> None:
    names = b"handbook:a.md\nhandbook:secret.md\n\nhandbook:b.md"
    (tmp_path / "found").write_bytes(names)
    assert ask("-w", "acme", "--candidates", str(tmp_path / "found"), stdin=b"in").status == 0
    assert ask("-w", "acme", "--candidates", "-", stdin=names).status == 0
    first, second = (talk.job for talk in served.scene.runners.talks)
    assert [copy.id for copy in first.copies] == [copy.id for copy in second.copies] == [
        "handbook:a.md", "handbook:b.md",
    ]  # fmt: skip
    assert (first.stdin, second.stdin) == (b"in", b"")


@pytest.mark.parametrize(("nonce", "status"), [("n-1", 0), ("another", 125)])
def test_a_nonce_goes_with_its_token(
    ask: Any, monkeypatch: pytest.MonkeyPatch, nonce: str, status: int
) -> None:
    monkeypatch.setenv("EGRESSD_NONCE", nonce)
    assert ask("-w", "acme").status == status


def test_json_is_one_document(ask: Any) -> None:
    told = ask("-w", "acme", "--json", "--file", "handbook:a.md")
    document = json.loads(told.out)
    assert (document["state"], document["status"], document["stdout"]) == ("ended", 0, "hello\n")
    assert document["receipt"]["files"][0]["id"] == "handbook:a.md"


def test_the_receipt_holds_its_evidence(ask: Any, tmp_path: Path) -> None:
    receipt, proof = tmp_path / "job.json", tmp_path / "job.proof"
    assert ask("-w", "acme", "--receipt", str(receipt), "--proof", str(proof)).status == 0
    found = json.loads(receipt.read_text())
    assert (found["status"], found["signed"]["payload"]) == (0, "acme eg41")
    assert json.loads(proof.read_text())["payload"] == "acme eg41"


def test_the_manifest_is_the_one_on_the_receipt(ask: Any, tmp_path: Path) -> None:
    kept = [str(tmp_path / name) for name in ("job.json", "job.proof", "MANIFEST.json")]
    words = ["--receipt", kept[0], "--proof", kept[1], "--manifest", kept[2]]
    assert ask("-w", "acme", "--file", "handbook:a.md", *words).status == 0
    listed = Path(kept[2]).read_bytes()
    assert [file["path"] for file in json.loads(listed)["files"]] == ["handbook/a.md"]
    receipt = json.loads(Path(kept[0]).read_text())
    assert receipt["manifest"] == f"sha256:{hashlib.sha256(listed).hexdigest()}"
    assert Path(kept[1]).exists()


def test_of_what_never_ran_there_is_no_manifest(served: Serving, ask: Any, tmp_path: Path) -> None:
    served.scene.runners.by_itself = [ended(status=0, refused="a reason")]
    told = ask("-w", "acme", "--manifest", str(tmp_path / "MANIFEST.json"))
    assert told.status == 125
    assert "there is no manifest of it: nothing was run" in told.err
    assert list(tmp_path.glob("MANIFEST*")) == []


def test_a_success_without_the_receipt_that_was_asked_for_is_none(ask: Any, tmp_path: Path) -> None:
    told = ask("-w", "acme", "--receipt", str(tmp_path / "none" / "x"))
    assert (told.status, told.out) == (125, "hello\n")
    assert "the receipt cannot be written" in told.err


# ---- refusals


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-w", "nowhere"], "there is nothing here that you may see"),
        (["-w", "acme", "--file", "handbook:secret.md"], "there is nothing here that you may see"),
        (["-w", "acme", "--file", "handbook:none.md"], "there is nothing here that you may see"),
        (["-w", "acme", "--file", "nonsense"], "files[0]: this is not a document's identifier"),
        (["-w", "acme", "--inference", "other"], "inference: the workspace offers none of that name"),
        (["-w", "acme", "--inference", "x", "--", "id"], "not both"),
        (["-w", "acme", "--broker", "http://127.0.0.1"], "no broker's address"),
        (["-w", "acme", "--broker", "unix:/nowhere.sock"], "cannot be reached"),
        (["-w", "acme", "--network", "policy"], "invalid choice"),
        (["-w", "acme", "--candidates", "/nowhere"], "No such file"),
        ([], "required: -w/--workspace"),
    ],
)
def test_a_refusal_is_125_with_the_reason(served: Serving, ask: Any, words: list[str], says: str) -> None:
    told = ask(*words)
    assert (told.status, told.out) == (125, "")
    assert says in told.err
    assert served.scene.runners.talks == []


def test_what_could_not_be_run_is_125_and_has_a_number(served: Serving, ask: Any) -> None:
    served.scene.runners.by_itself = [ended(status=125, refused="a secret reason")]
    told = ask("-w", "acme")
    assert told.status == 125
    assert "the reason is on record under its number (r-" in told.err
    assert "secret" not in told.err


def test_a_refusal_in_json_is_a_document_too(ask: Any) -> None:
    told = ask("-w", "nowhere", "--json")
    assert told.status == 125
    assert json.loads(told.out)["error"]["status"] == 404


# ---- the token


def test_a_token_from_a_file_that_only_its_owner_reads(
    served: Serving, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EGRESSD_TOKEN")
    file = tmp_path / "token"
    file.write_text("bob\n")
    file.chmod(0o600)
    assert ask("-w", "acme", "--token-file", str(file)).status == 0
    assert served.scene.runners.talks[0].job.asker == "user:idp:bob"
    file.chmod(0o644)
    told = ask("-w", "acme", "--token-file", str(file))
    assert (told.status, "chmod 600" in told.err) == (125, True)
    assert "bob" not in told.err


@pytest.mark.parametrize("token", ["", " ", "two words-hunter2", "tökn-hunter2", "a\nb-hunter2"])
def test_what_is_no_token_is_not_sent_and_not_shown(
    served: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("EGRESSD_TOKEN", token)
    told = ask("-w", "acme")
    assert told.status == 125
    assert "EGRESSD_TOKEN holds" in told.err
    assert "hunter2" not in told.err
    assert served.scene.log == []


def test_a_token_has_no_place_on_the_command_line(ask: Any) -> None:
    told = ask("-w", "acme", "--token", "alice")
    assert told.status == 125
    assert "unrecognized arguments" in told.err or "ambiguous" in told.err


# ---- Ctrl-C, and nobody who reads


@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--json"]])
def test_ctrl_c_cancels(served: Serving, more: list[str]) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED, out("begun\n")]
    environment = {**os.environ, "EGRESSD_TOKEN": "alice"}
    command = [*PROGRAM, "ask", "-w", "acme", "--broker", str(served.address), *more]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        talks = served.scene.runners.talks
        served.do(lambda: until(lambda: talks and talks[0].heard, 30))
        if not more:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    (talk,) = talks
    served.do(lambda: until(lambda: talk.closed))
    assert talk.heard[-1] == "stop: who asked went away"


def test_only_this_verb_loads_httpx(tmp_path: Path) -> None:
    code = (
        "import sys; from egressd.cli.main import main; main(['status', '--run-dir', sys.argv[1]]);"
        "unwanted = ('httpx', 'starlette', 'uvicorn', 'jwt', 'sqlalchemy');"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
