"""Man pages and completions say what the programs say."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from egressd.cli.main import VERBS, whole_parser
from egressd.processes.config import Config, PoolsConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "man"
EVERYWHERE = {"-h", "--help", "--json", "--run-dir"}


def every_command(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from every_command(child, (*path, name))


COMMANDS = dict(every_command(whole_parser()))
WITH_ACTIONS = {path[:-1] for path in COMMANDS if path}
ENDS = {path: parser for path, parser in COMMANDS.items() if path not in WITH_ACTIONS}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def options_in(text: str) -> set[str]:
    """The options that `.It Fl` lines of mdoc describe."""
    words = re.findall(
        r"\bFl (-?)([a-z][a-z0-9-]*)", "\n".join(re.findall(r"^\.It (Fl .*)$", text, re.MULTILINE))
    )
    return {f"-{dash}{name}" for dash, name in words}


def page(name: str) -> str:
    return (PAGES / name).read_text()


def verbs_section() -> str:
    return page("egressctl.1").split(".Sh VERBS")[1].split("\n.Sh ")[0]


def blocks() -> dict[tuple[str, ...], str]:
    """The part of the page about each verb."""
    parts = re.split(r"^\.It Cm (.*)$", verbs_section(), flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        path = tuple(re.match(r"[a-z -]+", heading)[0].split())  # type: ignore[index]
        found[path] = text
    return found


def test_the_page_has_every_verb_and_no_other_in_the_same_order() -> None:
    assert list(blocks()) == list(ENDS)


@pytest.mark.parametrize("path", ENDS, ids=" ".join)
def test_the_page_has_every_option_of_a_verb_and_no_other(path: tuple[str, ...]) -> None:
    assert options_in(blocks()[path]) == options_of(ENDS[path]) - EVERYWHERE


def test_the_page_has_the_options_of_the_program() -> None:
    before = page("egressctl.1").split(".Sh VERBS")[0]
    assert options_in(before) == options_of(COMMANDS[()])


def test_the_synopsis_has_every_verb() -> None:
    synopsis = page("egressctl.1").split(".Sh SYNOPSIS")[1].split(".Sh ")[0]
    assert [tuple(line.split()) for line in re.findall(r"^\.Cm (.*)$", synopsis, re.MULTILINE)] == list(ENDS)


def test_egressd_has_the_options_its_page_says() -> None:
    program = ROOT / ".venv" / "bin" / "egressd"
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    said = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", told.split("options:")[1].split("See ")[0]))
    documented = options_in(page("egressd.8"))
    assert documented <= said
    assert {name for name in said if name.startswith("--")} <= documented


def test_the_configuration_page_has_every_key() -> None:
    section = page("egressd.yaml.5").split(".Sh DESCRIPTION")[1].split(".Sh ")[0]
    keys = re.findall(r"^\.It Cm ([a-z_0-9]+)$", section, re.MULTILINE)
    assert keys == [field.name for field in msgspec.structs.fields(Config)]
    for field in msgspec.structs.fields(PoolsConfig):
        assert f".Cm {field.name}" in section
        assert f".Pq Li {field.default}" in section


@pytest.mark.parametrize("name", sorted(path.name for path in PAGES.iterdir()))
def test_the_pages_are_sound_mdoc(name: str) -> None:
    mandoc = shutil.which("mandoc")
    if mandoc is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        [mandoc, "-T", "lint", "-W", "warning", PAGES / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# ---- completions


def test_completions_are_what_the_command_line_gives() -> None:
    for path, text in runpy.run_path(str(ROOT / "completions" / "generate.py"))["written"]().items():
        assert path.read_text() == text, f"{path.name}: run completions/generate.py"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ([""], list(VERBS)),
        (["st"], ["status"]),
        (["--json", "co"], ["counters"]),
        (["policy", ""], ["check", "lint", "diff", "apply", "explain"]),
        (["policy", "apply", "--d"], ["--dry-run"]),
        (["counters", ""], ["acme", "lab"]),
        (["counters", "a"], ["acme"]),
        (["--run-dir", "/elsewhere", "counters", ""], ["remote"]),
        (["run", "-w", ""], ["acme", "lab"]),
        (["why", "-w", "l"], ["lab"]),
        (["run", "-w", "acme", "--", "mandatory-comm"], ["mandatory-command"]),
        (["status", "x"], []),
        (["audit", "-w", "a"], ["acme"]),
        (["audit", "--verdict", "denied", "--fo"], ["--follow"]),
    ],
)
def test_bash_completes(tmp_path: Path, words: list[str], completed: list[str]) -> None:
    fake = tmp_path / "egressctl"
    fake.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --run-dir ]; then echo \'{"workspaces": [{"workspace": "remote"}]}\'; else\n'
        'echo \'{"workspaces": [{"workspace": "acme"}, {"workspace": "lab"}],'
        ' "sandboxes": [{"workspace":"acme"}]}\'; fi\n'
    )
    fake.chmod(0o755)
    shutil.copy(fake, tmp_path / "mandatory-command")
    script = (
        f"source {ROOT / 'completions' / 'egressctl.bash'}\n"
        'COMP_WORDS=(egressctl "$@"); COMP_CWORD=$#\n_egressctl\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == completed
    assert not done.stderr


@pytest.mark.parametrize(("shell", "name"), [("zsh", "_egressctl"), ("fish", "egressctl.fish")])
def test_the_other_shells_can_read_theirs(shell: str, name: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n", ROOT / "completions" / name], check=True)
