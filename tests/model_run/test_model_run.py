"""A real inference, end to end: llama.cpp serves a model on the host's 127.0.0.1:11434, and an unmodified
client in a sandbox asks it about the files it was given. Own target (`make test-model`): llama.cpp is
compiled for minutes. The model's weights are random, so what it says means nothing; that it read the files
shows in the tokens it counts and in the text it then gives."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.test_cycle_lab import Service
from lab import topology as t
from lab.daemon import Daemon
from lab.machine import PROJECT, VENV, Lab, LabError, Process, poll

pytestmark = pytest.mark.model

HERE = Path(__file__).parent
MODEL_PYTHON = PROJECT / ".lab" / "model-venv" / "bin" / "python"  # has gguf and llama-cpp-python
POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - local: ollama
"""
FILES = {"hr/leave.md": "# Leave\nThirty days a year.\n", "plan.txt": "The plan is to win.\n"}
SECRET = "secret.txt"  # beside what is shown
ELSEWHERE = [f"{t.PLAIN4}:443", f"{t.EVIL4}:443", f"{t.HOST4}:11434", "169.254.54.1:11434", "127.0.0.1:8000"]
TOKENS = 24


@pytest.fixture(scope="module")
def machine() -> Iterator[Lab]:
    """A lab without the servers that others use: its port 11434 is free."""
    if not MODEL_PYTHON.exists():
        pytest.fail(f"{MODEL_PYTHON} is not there: make test-model")
    try:
        made = Lab()
    except LabError as error:
        pytest.skip(f"no lab on this machine: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def model(machine: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """llama.cpp's server, on the loopback of the lab's host."""
    made = tmp_path_factory.mktemp("model") / "tiny.gguf"
    subprocess.run([MODEL_PYTHON, HERE / "tiny_gguf.py", made], check=True, timeout=60)
    shutil.copy(made, machine.path("tiny.gguf"))
    options = {
        "model": machine.inside("tiny.gguf"),
        "host": "127.0.0.1",
        "port": t.OLLAMA_PORT,
        "n_threads": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    server = machine.start(
        [str(MODEL_PYTHON), "-m", "llama_cpp.server", *words, "--n_ctx", "2048", "--model_alias", "tiny"],
        env={"HOME": "/nonexistent"},
    )

    def ready() -> bool:
        if server.status() is not None:
            raise LabError(f"the model's server ended:\n{server.out}{server.err}")
        return "Uvicorn running" in server.err

    try:
        poll(ready, timeout=90)
        yield server
    finally:
        if server.status() is None:
            server.kill()
        poll(lambda: server.status() is not None)


@pytest.fixture(scope="module")
def guarded(machine: Lab, model: Process) -> Iterator[Daemon]:
    with machine.leaving_nothing(), Daemon(machine, policies={"acme": POLICY}, brokers=["4001"]) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def job(machine: Lab) -> str:
    """The directory that the sandbox is shown, and something beside it that it is not."""
    place = machine.path("job")
    for name, text in FILES.items():
        (place / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "files" / name).write_text(text)
    (place / SECRET).write_text("not for the model")
    (place / "program").mkdir()
    shutil.copy(HERE / "ask_about_files.py", place / "program")
    (place / "receipt").mkdir()
    if not machine.single_user:
        os.chown(place / "receipt", machine.user, machine.user)
    place.chmod(0o755)
    return machine.inside("job")


@pytest.fixture(scope="module")
def python(machine: Lab) -> Iterator[str]:
    """The tests' own Python, at a place that `--files` does not cover: the checkout may lie below /work."""
    machine.path("venv").mkdir()
    place = machine.inside("venv")
    machine.run(["mount", "--bind", str(VENV), place]).check()
    yield place
    machine.run(["umount", place]).check()


@pytest.fixture(scope="module")
def inference(guarded: Daemon, job: str, python: str) -> dict[str, Any]:
    """What the program in the sandbox said; its receipt stays in the job's directory."""
    program = f"{job}/program"
    options = ["--files", f"{job}/files", "--bind-ro", program, "--bind-ro", python]
    receipt = ["--receipt", f"{job}/receipt/receipt.json"]
    argv = [f"{python}/bin/python", "-B", f"{program}/ask_about_files.py", *ELSEWHERE]
    done = guarded.sandbox("acme", argv, *options, *receipt, timeout=180).check()
    return json.loads(done.out)  # type: ignore[no-any-return]


def test_the_model_answers_about_the_files(inference: dict[str, Any]) -> None:
    bare, asked = inference["bare"], inference["asked"]
    assert inference["files"] == sorted(FILES)
    for answer in (bare, asked):
        assert answer["completion_tokens"] == TOKENS
        assert len(answer["text"]) == TOKENS and answer["text"].isprintable()
    read = sum(len(f"{name}\n{text}") for name, text in FILES.items())
    assert asked["prompt_tokens"] - bare["prompt_tokens"] == read, (
        "a token is a byte: the model read them all"
    )
    assert asked["text"] != bare["text"], "and says something else for it"
    assert inference["again"] == asked, "the same for the same"


def test_the_way_to_the_model_is_the_only_way_out(inference: dict[str, Any]) -> None:
    assert inference["out"] == dict.fromkeys(ELSEWHERE, "ECONNREFUSED")


def test_every_byte_of_it_is_counted(guarded: Daemon, inference: dict[str, Any]) -> None:
    account = guarded.counters("acme")
    link = account["ended"]
    assert account["links"] == []
    assert link["in"] == [sum(pair) for pair in zip(link["ok"], link["denied"], link["other"], strict=True)]
    assert account["balance"]["balanced"], account["balance"]
    assert account["balance"]["admitted"] == account["balance"]["elements"] == link["ok"]
    sent = sum(len(f"{name}\n{text}") for name, text in FILES.items()) * 2
    assert link["ok"][1] > sent, "the files went over the link, twice"
    assert link["denied"][0] == len(ELSEWHERE) - 1, "each once, but for the one that stays on loopback"


def test_the_receipt_says_the_same(
    guarded: Daemon, machine: Lab, job: str, inference: dict[str, Any]
) -> None:
    guarded.ctl("verify", f"{job}/receipt/receipt.json").check()
    envelope = json.loads(machine.path("job/receipt/receipt.json").read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    lines = [json.loads(line) for line in statement["predicate"]["journal"]["records"]["lines"]]
    (closed,) = [line["fields"] for line in lines if line["event"] == "sandbox-closed"]
    ended = guarded.counters("acme")["ended"]
    for which in ("in", "ok", "denied", "other"):
        assert [closed[f"{which}_packets"], closed[f"{which}_bytes"]] == ended[which]


# ---- the same, as a request to the broker


@pytest.fixture(scope="module")
def service(guarded: Daemon, machine: Lab, job: str) -> Iterator[Service]:
    made = Service(guarded, f"{job}/files")
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(10)


def test_a_request_is_answered_about_its_own_copies(service: Service, job: str, python: str) -> None:
    program = f"{job}/program"
    argv = [f"{python}/bin/python", "-B", f"{program}/ask_about_files.py", *ELSEWHERE]
    told = service.ask(*argv, documents=["hr/leave.md"], bind_ro=[program, python])
    assert told["finished"]["status"] == 0, told
    said = json.loads(told["out"])
    assert said["files"] == ["MANIFEST.json", "docs/hr/leave.md"], "not the other one"
    assert said["asked"]["completion_tokens"] == TOKENS and said["asked"]["text"].isprintable()
    assert said["asked"]["text"] != said["bare"]["text"]
    assert said["out"] == dict.fromkeys(ELSEWHERE, "ECONNREFUSED")
    counters = told["finished"]["counters"]
    assert counters["ok"][1] > 0 and counters["in"] == [
        counters["ok"][n] + counters["denied"][n] + counters["other"][n] for n in (0, 1)
    ]


def test_the_models_tools_see_the_copies_and_nothing_else(service: Service) -> None:
    calls = [
        {"method": "initialize", "params": {"protocolVersion": "2025-11-25"}},
        {"method": "tools/call", "params": {"name": "list_documents"}},
        {
            "method": "tools/call",
            "params": {"name": "read_document", "arguments": {"path": "docs/hr/leave.md"}},
        },
        {"method": "tools/call", "params": {"name": "read_document", "arguments": {"path": "docs/plan.txt"}}},
        {"method": "tools/call", "params": {"name": "search_documents", "arguments": {"text": "THIRTY"}}},
    ]
    lines = "\n".join(json.dumps({"jsonrpc": "2.0", "id": n, **call}) for n, call in enumerate(calls))
    ask = 'printf "%s\\n" "$1" | python3 /opt/egressd/documents.py'
    told = service.ask("sh", "-c", ask, "sh", lines, documents=["hr/leave.md"])
    _, listed, read, absent, found = [json.loads(line)["result"] for line in told["out"].splitlines()]
    assert [line.split("  ")[0] for line in text(listed).splitlines()] == [
        "MANIFEST.json",
        "docs/hr/leave.md",
    ]
    assert text(read).startswith(FILES["hr/leave.md"]) and not read["isError"]
    assert text(absent) == "There is no document with this path." and absent["isError"]
    assert text(found) == "docs/hr/leave.md:2: Thirty days a year."


def text(result: dict[str, Any]) -> str:
    return str(result["content"][0]["text"])


def test_another_sandbox_without_the_rule_has_no_model(guarded: Daemon, inference: dict[str, Any]) -> None:
    guarded.policy("acme", POLICY.replace("allow:\n  - local: ollama", "allow: []"))
    try:
        ask = ["curl", "-sS", "-m", "10", "http://127.0.0.1:11434/v1/models"]
        done = guarded.sandbox("acme", ask)
        assert done.status == 7, "curl: could not connect"
    finally:
        guarded.policy("acme", POLICY)
