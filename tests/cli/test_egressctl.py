"""The program from outside: its verbs, its help, its exit statuses, what it says when things are wrong."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import COUNTERS, DIFF, STATUS, WHY, changed

from egressd.cli.main import VERBS, whole_parser
from egressd.ipc import messages


def every_command(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from every_command(child, (*path, name))


COMMANDS = dict(every_command(whole_parser()))


# ---- help and usage


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_examples(egressctl: Any, path: tuple[str, ...]) -> None:
    told = egressctl(*path, "--help")
    assert told.status == 0
    assert told.out.startswith(f"usage: {' '.join(('egressctl', *path))} ")
    assert "examples:" in told.out
    assert all(len(line) <= 110 for line in told.out.splitlines())
    assert not told.err


def test_the_help_lists_every_verb_and_every_exit_status(egressctl: Any) -> None:
    told = egressctl("--help").out
    for verb, (_, summary) in VERBS.items():
        assert f"  {verb:<12}{summary}\n" in told
    for status in ("0 ", "1 ", "2 ", "125 "):
        assert status in told.split("exit status:")[1]


def test_the_table_of_verbs_is_what_the_parser_knows() -> None:
    assert [path[0] for path in COMMANDS if len(path) == 1] == list(VERBS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["conters"], "there is no verb 'conters': did you mean 'counters'?"),
        (["polcy", "check"], "did you mean 'policy'?"),
        (["--json", "Status"], "did you mean 'status'?"),
        (["xyzzy"], "the verbs are run, status, doctor, selftest, policy, guard, residency, local-only"),
        (["\x1b[2Jboo"], r"there is no verb '\x1b[2Jboo'"),
        (["policy", "chek"], "invalid choice: 'chek'"),
        (["policy"], "required: ACTION"),
        (["policy", "check"], "required: FILE"),
        (["why", "-w", "acme"], "required: SUBJECT"),
        (["status", "--verbose"], "usage: egressctl status "),
        (
            ["status", "--verbose"],
            "egressctl: unrecognized arguments: --verbose (see egressctl status --help)",
        ),
        (["policy", "diff", "x"], "unrecognized arguments: x (see egressctl policy diff --help)"),
        (["counters", "acme", "\x1b[2J"], r"unrecognized arguments: \x1b[2J (see"),
        (["counters", "--js"], "unrecognized arguments: --js"),  # no abbreviations
        ([], "verbs:"),
    ],
)
def test_a_wrong_command_line_is_status_2(egressctl: Any, words: list[str], says: str) -> None:
    told = egressctl(*words)
    assert told.status == 2
    assert says in told.err
    assert not told.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run"], "egressctl: the following arguments are required: -w/--workspace"),
        (["run", "-w", "acme", "--verbose", "--", "id"], "egressctl: unrecognized arguments: --verbose"),
        (["run", "-w", "acme"], "egressctl: there is no command to run: egressctl run -w acme -- CMD ..."),
        (["run", "-w", "acme", "--"], "egressctl: there is no command to run"),
        (["run", "-w", "acme", "--wall", "soon", "id"], "egressctl: --wall 'soon': write a time such as 30s"),
        (["run", "-w", "acme", "--env", "A", "id"], "egressctl: --env 'A': write NAME=VALUE"),
    ],
)
def test_a_wrong_command_line_of_run_is_125_because_2_could_be_the_commands(
    egressctl: Any, words: list[str], says: str
) -> None:
    told = egressctl(*words)
    assert (told.status, told.out) == (125, "")
    assert says in told.err


def test_version(egressctl: Any) -> None:
    assert egressctl("--version").out == "egressctl 0.1.0\n"


# ---- without a daemon

ASKING = [["status"], ["counters"], ["ruleset"], ["why", "-w", "acme", "x.example"], ["policy", "diff"],
          ["policy", "apply"], ["policy", "explain", "acme"]]  # fmt: skip


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_without_a_daemon_it_is_125_and_says_where_it_looked(
    egressctl: Any, tmp_path: Path, words: list[str]
) -> None:
    told = egressctl("--run-dir", tmp_path, *words)
    assert told.status == 125
    assert not told.out
    assert "egressd is not running" in told.err
    assert str(tmp_path) in told.err


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_a_refusal_is_125_with_the_daemons_words_made_harmless(
    egressctl: Any, daemon: Any, words: list[str]
) -> None:
    daemon.refusal = messages.Refusal(reason="member", text="you are not a member\x1b[31m of acme")
    told = egressctl("--run-dir", daemon.run_dir, *words)
    assert told.status == 125
    assert not told.out
    assert told.err == "egressctl: you are not a member\\x1b[31m of acme\n"


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_a_refusal_in_json_is_a_document_and_a_line(egressctl: Any, daemon: Any, words: list[str]) -> None:
    daemon.refusal = messages.Refusal(reason="member", text="not yours\x1b[31m")
    told = egressctl("--json", "--run-dir", daemon.run_dir, *words)
    assert told.status == 125
    assert told.json == {"error": {"reason": "member", "text": "not yours\x1b[31m"}}
    assert "\x1b" not in told.out
    assert told.err == "egressctl: not yours\\x1b[31m\n"


def test_no_daemon_in_json_is_a_document_too(egressctl: Any, tmp_path: Path) -> None:
    told = egressctl("--json", "--run-dir", tmp_path, "status")
    assert told.status == 125
    assert told.json["error"]["reason"] == "unavailable"
    assert "egressd is not running" in told.json["error"]["text"]


def test_a_daemon_that_hangs_up_is_125(egressctl: Any, daemon: Any) -> None:
    daemon.hang_up = True
    told = egressctl("--run-dir", daemon.run_dir, "status")
    assert (told.status, told.out) == (125, "")
    assert "without an answer" in told.err


# ---- what is asked


@pytest.mark.parametrize(
    ("words", "document", "asked"),
    [
        (["status"], STATUS, messages.Ask(what="status")),
        (["counters"], COUNTERS, messages.Ask(what="counters")),
        (["counters", "acme"], COUNTERS, messages.Ask(what="counters", workspace="acme")),
        (["ruleset"], {"text": ""}, messages.Ask(what="ruleset")),
        (["why", "x.example", "-w", "acme"], WHY, messages.Why(workspace="acme", subject="x.example")),
        (["why", "eg7"], WHY, messages.Why(workspace="", subject="eg7")),
        (["policy", "diff"], DIFF, messages.Ask(what="diff")),
        (["policy", "apply"], DIFF, messages.Apply()),
        (["policy", "apply", "--dry-run"], DIFF, messages.Apply(dry_run=True)),
        (
            ["policy", "explain", "acme"],
            {"workspace": "acme", "digest": "", "text": ""},
            messages.Ask(what="policy", workspace="acme"),
        ),
    ],
)
def test_each_verb_asks_one_question_and_json_is_its_answer(
    egressctl: Any, daemon: Any, words: list[str], document: Any, asked: Any
) -> None:
    daemon.document = document
    before = egressctl("--run-dir", daemon.run_dir, "--json", *words)
    after = egressctl(*words, "--run-dir", daemon.run_dir, "--json")
    assert before.json == after.json == document
    assert daemon.asked == [asked, asked]
    assert before.status == 0


def seeing(*names: str) -> dict[str, Any]:
    """STATUS for somebody who is a member of these."""
    first = STATUS["workspaces"][0]
    return changed(STATUS, workspaces=[{**first, "workspace": name} for name in names])


def test_why_without_a_workspace_is_about_the_only_one_there_is_for_the_caller(
    egressctl: Any, daemon: Any
) -> None:
    daemon.document, daemon.status = WHY, seeing("acme")
    told = egressctl("--run-dir", daemon.run_dir, "why", "x.example")
    assert told.status == 0
    assert daemon.asked[1:] == [messages.Why(workspace="acme", subject="x.example")]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("lab", "acme"), "in which workspace? Say -w with one of acme, lab"),
        ((), "there is no workspace you may ask about"),
    ],
)
def test_why_without_a_workspace_asks_back_where_it_is_not_one(
    egressctl: Any, daemon: Any, names: tuple[str, ...], says: str
) -> None:
    daemon.document, daemon.status = WHY, seeing(*names)
    told = egressctl("--run-dir", daemon.run_dir, "why", "x.example")
    assert (told.status, told.out) == (125, "")
    assert says in told.err
    assert daemon.asked == [messages.Ask(what="status")]


@pytest.mark.parametrize(("uid", "says"), [(0, "nobody may spawn"), (4001, "that you are a member of")])
def test_no_workspaces_means_something_else_to_root(
    egressctl: Any, daemon: Any, monkeypatch: pytest.MonkeyPatch, uid: int, says: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    daemon.document = changed(STATUS, workspaces=[])
    assert says in egressctl("--run-dir", daemon.run_dir, "status").out


# ---- exit statuses that an operator may rely on


def unbalanced(field: str, unit: int) -> dict[str, Any]:
    """COUNTERS with one number off by one, though the daemon still says that they balance."""
    document = changed(COUNTERS)
    document["workspaces"][0]["balance"][field][unit] += 1
    return document


@pytest.mark.parametrize("unit", [0, 1], ids=["packets", "bytes"])
@pytest.mark.parametrize("field", ["in", "admitted", "denied", "other", "elements"])
def test_numbers_that_do_not_add_up_are_status_1_whatever_the_daemon_says(
    egressctl: Any, daemon: Any, field: str, unit: int
) -> None:
    daemon.document = unbalanced(field, unit)
    told = egressctl("--run-dir", daemon.run_dir, "counters")
    assert told.status == 1
    assert "THE BOOKS DO NOT BALANCE" in told.out
    assert " != " in told.out
    assert told.err == "egressctl: the books do not balance\n"


def moved(by: int, *, lagging: int) -> dict[str, Any]:
    """COUNTERS after `by` more packets to a host; the link's own were listed `lagging` packets earlier."""
    document = changed(COUNTERS)
    balance = document["workspaces"][0]["balance"]
    for field in ("in", "admitted", "elements"):
        behind = 0 if field == "elements" else lagging
        balance[field] = [balance[field][0] + by - behind, balance[field][1] + 100 * (by - behind)]
    return document


def test_packets_that_flow_while_the_books_are_read_are_no_contradiction(egressctl: Any, daemon: Any) -> None:
    daemon.document, daemon.then = moved(10, lagging=2), moved(20, lagging=3)
    told = egressctl("--run-dir", daemon.run_dir, "counters")
    assert told.status == 0
    assert "the books balance; packets flowed while they were read" in told.out
    assert "admitted 28 != hosts 31" in told.out  # what was read is shown as it was read
    daemon.document = moved(10, lagging=2)
    assert egressctl("--run-dir", daemon.run_dir, "--json", "counters").json["moving"] is True


def test_two_readings_that_cannot_meet_are_status_1(egressctl: Any, daemon: Any) -> None:
    daemon.document, daemon.then = moved(10, lagging=5), moved(12, lagging=5)
    told = egressctl("--run-dir", daemon.run_dir, "counters")
    assert told.status == 1
    assert "THE BOOKS DO NOT BALANCE" in told.out


def test_books_the_daemon_calls_unbalanced_are_status_1_in_json_too(egressctl: Any, daemon: Any) -> None:
    daemon.document = changed(COUNTERS, balanced=False, differences=["acme: 1 packets, 60 bytes"])
    told = egressctl("--run-dir", daemon.run_dir, "--json", "counters")
    assert told.status == 1
    assert told.json["balanced"] is False
    assert "acme: 1 packets, 60 bytes" in egressctl("--run-dir", daemon.run_dir, "counters").out


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({}, None),
        ({"quota": None, "connections": None, "closed": False}, None),
        ({"quota": 51200, "connections": None, "closed": False}, "51200 bytes"),
        ({"quota": 51200, "connections": 4, "closed": False}, "51200 bytes, 4 connections"),
        ({"quota": 51200, "connections": 4, "closed": True}, "no network"),
    ],
)
def test_what_a_sandbox_alone_is_held_to_is_shown(
    egressctl: Any, daemon: Any, held: dict[str, Any], told: str | None
) -> None:
    daemon.document = changed(STATUS, sandboxes=[{**STATUS["sandboxes"][0], **held}])
    out = egressctl("--run-dir", daemon.run_dir, "status").out
    assert ("held to" in out) == (told is not None)
    assert told is None or f"{told}\n" in out


def test_what_is_used_of_it_is_shown(egressctl: Any, daemon: Any) -> None:
    document = changed(COUNTERS)
    (link,) = document["workspaces"][0]["links"]
    link |= {"quota": [1200, 51200], "connections": [3, 4]}
    daemon.document = document
    out = egressctl("--run-dir", daemon.run_dir, "counters").out
    assert "1200/51200 bytes, 3/4 connections\n" in out and " used\n" in out
    link |= {"quota": None, "connections": None}
    assert " used\n" not in egressctl("--run-dir", daemon.run_dir, "counters").out


JOURNAL = STATUS["journal"]


def process(state: str) -> dict[str, Any]:
    return {"name": "relay", "pid": 9, "state": state, "restarts": 0}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({}, 0, "enforcing, books balance"),
        ({"enforcing": False}, 1, "NOT ENFORCING"),
        ({"balanced": False}, 1, "BOOKS DO NOT BALANCE"),
        (
            {"alarms": [{"time": 0, "text": "the gateway was changed"}]},
            0,
            "1970-01-01 00:00:00Z  the",
        ),
        ({"drift": ["make chain netdev egressd acme_4"]}, 1, "  make chain netdev egressd acme_4"),
        ({"drift": ["add to x\x1b[31m"]}, 1, "NOT AS COMPILED"),
        ({"drift": ["more"] * 13}, 1, "and 3 more"),
        ({"drift_read": None}, 0, "ruleset: not read back yet"),
        ({}, 0, "ruleset: as compiled, read back"),
        ({}, 0, "journal: 4711 records, last checkpoint"),
        ({"journal": None, "journal_error": "it is \x1bgone"}, 1, "journal: not known: it is \\x1bgone"),
        ({"journal": JOURNAL | {"failing": "No space left"}}, 1, "failing: No space left"),
        ({"journal": JOURNAL | {"lost": {"queue": 3, "sender": 1}}}, 1, "4 records lost (3 queue, 1 sender)"),
        ({"journal": JOURNAL | {"lost": {"queue": 0}}}, 0, "none lost"),
        ({"journal": JOURNAL | {"queued": 5, "lag": 3.0}}, 0, "5 waiting, for 3 s"),
        (
            {"journal": JOURNAL | {"queued": 5, "lag": 61.0}},
            1,
            "nothing was written for 1 min: the disk hangs",
        ),
        ({"journal": JOURNAL | {"checkpoint_time": 0.0}}, 0, "no checkpoint yet"),
        ({"processes": [process("running"), process("down")]}, 1, "down"),
        ({"processes": [process("running"), process("starting")]}, 0, "starting"),
        ({"sandboxes": []}, 0, "no sandboxes"),
        ({"workspaces": []}, 0, "no workspaces"),
    ],
)
def test_status_is_1_when_something_is_wrong_now(
    egressctl: Any, daemon: Any, change: dict[str, Any], status: int, says: str
) -> None:
    daemon.document = changed(STATUS, **change)
    told = egressctl("--run-dir", daemon.run_dir, "status")
    assert told.status == status
    assert says in told.out


def test_a_workspace_whose_file_was_never_good_is_shown_and_is_status_1(egressctl: Any, daemon: Any) -> None:
    unknown = {"guard": None, "policy": None, "sandboxes": 0, "names": None}
    broken = {"workspace": "new", **unknown, "problem": "new.yaml:3: no"}
    daemon.document = changed(STATUS, workspaces=[broken])
    told = egressctl("--run-dir", daemon.run_dir, "status")
    assert told.status == 1
    assert "new        -              0      -  -       new.yaml:3: no" in told.out


@pytest.mark.parametrize(
    ("words", "change", "status", "conclusion"),
    [
        (["diff"], {}, 0, "2 changes, nothing applied"),
        (["diff", "--exit-code"], {}, 1, "2 changes, nothing applied"),
        (["diff", "--exit-code"], {"changes": []}, 0, "no changes: what is in force is what is written"),
        (["diff"], {"problems": ["acme.yaml:3: nonsense"]}, 1, "problem: acme.yaml:3: nonsense"),
        (["apply"], {"applied": True}, 0, "2 changes, applied in 1.2 ms"),
        (["apply"], {"applied": True, "problems": ["b.yaml: no"]}, 1, "problem: b.yaml: no"),
    ],
)
def test_policy_changes(
    egressctl: Any, daemon: Any, words: list[str], change: dict[str, Any], status: int, conclusion: str
) -> None:
    daemon.document = changed(DIFF, **change)
    told = egressctl("--run-dir", daemon.run_dir, "policy", *words)
    assert told.status == status
    assert conclusion in told.out.splitlines()


# ---- as a real process


def egressctl_process(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "egressd.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Any) -> None:
    daemon.document = {"text": "x\n" * 100_000}
    command = [sys.executable, "-m", "egressd.cli.main", "--run-dir", str(daemon.run_dir), "ruleset"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


CLOSED = ">&- ", "2>&- ", ">&- 2>&- ", "<&- >&- 2>&- "


@pytest.mark.parametrize("closed", CLOSED, ids=str.strip)
@pytest.mark.parametrize(
    ("words", "status"), [("status", 0), ("--help", 0), ("conters", 2), ("run", 125), ("policy check /", 0)]
)
def test_closed_descriptors_change_no_exit_status(daemon: Any, closed: str, words: str, status: int) -> None:
    daemon.document = STATUS
    line = f"exec {sys.executable} -m egressd.cli.main --run-dir {daemon.run_dir} {words} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    # `policy check /` finds what is wrong with the machine's root, whatever that is
    assert done.returncode in ((0, 1) if "check" in words else (status,))


@pytest.mark.parametrize("words", [("status",), ("--json", "status"), ("--help",), ("--version",)])
def test_a_full_disk_is_told_and_is_125(daemon: Any, words: tuple[str, ...]) -> None:
    daemon.document = STATUS
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "egressd.cli.main", "--run-dir", str(daemon.run_dir), *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr == "egressctl: the answer cannot be written: No space left on device\n"


def test_a_terminal_without_the_letters_is_shown_their_numbers(daemon: Any) -> None:
    daemon.document = {**WHY, "text": "b\u00fccher"}
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = egressctl_process("--run-dir", str(daemon.run_dir), "why", "-w", "acme", "x", env=environment)
    assert told.returncode == 0
    assert "b\\xfccher" in told.stdout


LOADED = """
import sys
from egressd.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(" ".join(sys.modules), file=sys.stderr)
"""


def modules_loaded_by(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "never"),
    [
        (("--help",), {"msgspec", "pydantic", "json", "asyncio"}),
        (("run", "--help"), {"pydantic", "publicsuffixlist", "yaml", "pyroute2", "egressd.cli.counters"}),
        (("status",), {"pydantic", "publicsuffixlist", "yaml", "asyncio", "egressd.cli.run"}),
        (("counters",), {"pydantic", "publicsuffixlist", "yaml", "asyncio", "egressd.cli.run"}),
        (("audit", "--journal", "/nowhere"), {"asyncio", "pydantic", "textual", "egressd.sandbox.control"}),
        (("watch",), {"asyncio", "pydantic", "textual", "rich", "yaml"}),
        (("policy", "check", "/nowhere.yaml"), {"asyncio", "pyroute2", "egressd.sandbox.control"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_verb_loads_only_what_it_needs(words: tuple[str, ...], never: set[str]) -> None:
    assert not modules_loaded_by("--run-dir", "/nowhere", *words) & never


def test_a_closed_terminal_or_an_odd_environment_does_not_matter() -> None:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "COLUMNS": "20"}
    told = egressctl_process("--help", env=environment)
    assert (told.returncode, told.stderr) == (0, "")
