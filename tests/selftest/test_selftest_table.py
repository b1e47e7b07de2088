"""The table of ways out: whole, in order, and judged as it says."""

from __future__ import annotations

import ast
import io
import json
import re
from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pyseccomp
import pytest

from egressd.cli.main import main
from egressd.cli.selftest import ESCAPED, render, status_of
from egressd.cli.text import Paint
from egressd.journal import testimony
from egressd.selftest import judge, preflight
from egressd.selftest.judge import Counts, Report, Row, Verdict, Way
from egressd.selftest.shown import attacks

GROUPS = {
    "addresses", "neighbours", "protocols", "disguises", "names", "TLS", "machine", "kernel", "frames"
}  # fmt: skip
SHOWN = Path(attacks.__file__)


# ---- the table


def test_there_are_hundreds_each_with_a_number_and_a_name_of_its_own() -> None:
    ways = judge.ways()
    assert len(ways) >= 500
    assert [way.number for way in ways] == list(range(1, len(ways) + 1))
    assert [name for name, times in Counter(map(str, ways)).items() if times > 1] == []


def test_every_group_has_its_part_and_both_families_theirs() -> None:
    assert {way.group for way in judge.ways()} == GROUPS
    least = {"addresses": 60, "neighbours": 60, "protocols": 80, "names": 100, "machine": 80, "kernel": 55}
    of = Counter(way.group for way in judge.ways())
    assert all(of[group] >= many for group, many in least.items()), of
    families = Counter(way.family for way in judge.ways())
    assert families["v4"] > 150 and families["v6"] > 150


def test_each_says_how_it_must_end_and_where_it_is_counted() -> None:
    for way in judge.ways():
        assert way.must and all(re.fullmatch(r"[A-Za-z_ ]+", word) for word in way.must), way
        assert way.counted in ({"denied", "other"} if way.frame else set(attacks.COUNTED)), way
        assert way.name.isprintable() and len(way.name) < 90, way
        assert not {"connected", "opened", "made", "done", "shown", "set"} & set(way.must), way


def test_only_a_listed_name_may_be_answered() -> None:
    """With what the resolver says of it anyway; never with what somebody else put there."""
    answered = {way.name for way in judge.ways() if "answered" in way.must}
    assert answered == {"a listed name, ANY"}


def test_what_lies_in_a_network_of_the_policy_has_a_target_to_compare() -> None:
    targets = [ip_address(a.target) for a in attacks.ATTACKS if a.target]
    assert len(targets) >= 30
    private = ip_network("10.0.0.0/8")
    assert any(target in private for target in targets if target.version == 4)


def test_needs_are_known() -> None:
    assert {need for attack in attacks.ATTACKS for need in attack.needs} <= set(attacks.NEEDS)


def test_what_runs_inside_needs_nothing_but_the_standard_library() -> None:
    import sys

    for name in ("attacks.py", "preflight.py"):
        tree = ast.parse(SHOWN.with_name(name).read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").partition(".")[0])
        assert modules <= sys.stdlib_module_names, name


@pytest.mark.parametrize(
    ("architecture", "numbers"),
    [(pyseccomp.Arch.X86_64, attacks._X86_NUMBERS), (pyseccomp.Arch.AARCH64, attacks._GENERIC_NUMBERS)],
    ids=["x86_64", "aarch64"],
)
def test_system_calls_have_the_numbers_that_libseccomp_knows(
    architecture: Any, numbers: dict[str, int]
) -> None:
    known = {name: pyseccomp.resolve_syscall(architecture, name) for name in numbers}
    assert known == numbers


def test_newer_calls_have_one_number_everywhere() -> None:
    for name, number in attacks._SAME_NUMBERS.items():
        if name != "open_tree_attr":  # newer than this libseccomp
            assert pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) == number, name
            assert pyseccomp.resolve_syscall(pyseccomp.Arch.AARCH64, name) == number, name


# ---- which of them


@pytest.mark.parametrize(
    ("pattern", "among"),
    [
        ("names", "names: an unlisted name, TXT (v4)"),
        ("*metadata*", "addresses: TCP to the cloud's metadata (v6)"),
        ("KERNEL", "kernel: a reboot"),
        ("frames: arp*", "frames: ARP: I am the gateway"),
    ],
)
def test_a_pattern_chooses(pattern: str, among: str) -> None:
    chosen = judge.chosen(pattern)
    assert among in map(str, chosen) and len(chosen) < len(judge.ways())


def test_a_number_chooses_one_and_nonsense_none() -> None:
    assert [way.number for way in judge.chosen("17")] == [17]
    assert judge.chosen("xyzzy") == () == judge.chosen("0")
    assert judge.chosen(None) == judge.ways()


# ---- the verdict


def way(group: str = "addresses", must: tuple[str, ...] = ("ECONNREFUSED",), counted: str = "denied") -> Way:
    return Way(1, group, "a way", "v4", must, counted, 0, frame=group == "frames")


def counts(sent: int = 0, ok: int = 0, denied: int = 0, other: int = 0, came: int | None = None) -> Counts:
    return Counts(sent, ok, denied, other, ok + denied + other if came is None else came)


DENIED = counts(sent=1, denied=1)


@pytest.mark.parametrize(
    ("tried", "happened", "spent", "verdict", "why"),
    [
        (way(), "ECONNREFUSED", DENIED, "refused", ""),
        (way(), "ECONNREFUSED", counts(sent=3, denied=3), "refused", ""),
        (way(), "connected", counts(sent=4, ok=4), "ESCAPED", "4 of 4 frames were admitted"),
        (way(), "connected", DENIED, "ESCAPED", "connected instead of ECONNREFUSED"),
        (way(), "ECONNREFUSED", counts(sent=1, ok=1), "ESCAPED", "1 of 1 frames were admitted"),
        (way(), "ECONNREFUSED", counts(sent=2, ok=1, denied=1), "ESCAPED", "1 of 2 frames were admitted"),
        (way(), "silence", DENIED, "unclear", "silence instead of ECONNREFUSED"),
        (way(), "ENETUNREACH", counts(), "unclear", "ENETUNREACH instead of ECONNREFUSED"),
        (way(), "ECONNREFUSED", counts(), "unclear", "no frame was sent"),
        (way(), "ECONNREFUSED", counts(sent=2, denied=1), "unclear",
         "2 frames were sent, the link counted 1: 0 admitted, 1 denied, 0 other"),
        (way(), "ECONNREFUSED", counts(sent=1, denied=1, came=2), "unclear",
         "1 frames were sent, the link counted 2: 0 admitted, 1 denied, 0 other"),
        (way(), "failed: KeyError", counts(), "unclear", "failed: KeyError instead of ECONNREFUSED"),
        (way("kernel", ("EPERM",), "nothing"), "EPERM", counts(), "refused", ""),
        (way("kernel", ("EPERM",), "nothing"), "EINVAL", counts(), "ESCAPED", "EINVAL instead of EPERM"),
        (way("kernel", ("EPERM",), "nothing"), "done", counts(), "ESCAPED", "done instead of EPERM"),
        (way("kernel", ("EPERM",), "nothing"), "EPERM", DENIED, "unclear",
         "1 frames were sent, and none should have been"),
        (way("protocols", ("EAFNOSUPPORT",), "nothing"), "made", counts(), "ESCAPED",
         "made instead of EAFNOSUPPORT"),
        (way("machine", ("ENOENT",), "nothing"), "opened", counts(), "ESCAPED", "opened instead of ENOENT"),
        (way("names", ("NXDOMAIN",), "admitted"), "NXDOMAIN", counts(sent=1, ok=1), "refused", ""),
        (way("names", ("NXDOMAIN",), "admitted"), "answered", counts(sent=1, ok=1), "ESCAPED",
         "answered instead of NXDOMAIN"),
        (way("names", ("NXDOMAIN",), "admitted"), "SERVFAIL", counts(sent=1, ok=1), "unclear",
         "SERVFAIL instead of NXDOMAIN"),
        (way("names", ("NXDOMAIN",), "admitted"), "NXDOMAIN", counts(), "unclear", "no frame was sent"),
        (way("names", ("NXDOMAIN",), "admitted"), "NXDOMAIN", counts(sent=2, ok=1, denied=1), "unclear",
         "1 frames were denied"),
        (way("disguises", ("EPERM",), "nothing or denied"), "EPERM", counts(), "refused", ""),
        (way("disguises", ("silence",), "nothing or denied"), "silence", DENIED, "refused", ""),
        (way("disguises", ("silence",), "nothing or denied"), "silence", counts(sent=1, ok=1), "ESCAPED",
         "1 of 1 frames were admitted"),
        (way("frames", ("sent",), "denied"), "sent", DENIED, "refused", ""),
        (way("frames", ("sent",), "denied"), "sent", counts(sent=1, other=1), "unclear",
         "1 frames were not IP"),
        (way("frames", ("sent",), "other"), "sent", counts(sent=1, other=1), "refused", ""),
        (way("frames", ("sent",), "other"), "sent", DENIED, "unclear", "1 frames were denied"),
        (way("frames", ("sent",), "other"), "sent", counts(sent=1, ok=1), "ESCAPED",
         "1 of 1 frames were admitted"),
        (way("frames", ("sent",), "denied"), "Message too long", counts(), "unclear",
         "Message too long instead of sent"),
    ],
)  # fmt: skip
def test_the_verdict(tried: Way, happened: str, spent: Counts, verdict: str, why: str) -> None:
    found, told = judge.judged(tried, happened, spent)
    assert (found.value, told) == (verdict, why)


# ---- the report


def row(number: int, verdict: Verdict, **more: Any) -> Row:
    found = Row(
        number=number, group="addresses", name="TCP to a raw address, HTTPS", family="v6",
        must=("ECONNREFUSED",), counted="denied", happened="ECONNREFUSED", verdict=verdict, sent=1, denied=1,
    )  # fmt: skip
    return replace(found, **more)


REFUSED, NOT_TRIED = row(1, Verdict.REFUSED), row(2, Verdict.NOT_TRIED, happened="", why="IPv6 is off")
GOT_OUT = row(3, Verdict.ESCAPED, happened="connected", why="4 of 4 frames were admitted", ok=4, denied=0)
UNCLEAR = row(4, Verdict.UNCLEAR, happened="silence", why="silence instead of ECONNREFUSED")


def report(*rows: Row, **more: Any) -> Report:
    settings: dict[str, Any] = {
        "workspace": "acme", "guard": "enforce", "policy": "sha256:" + "ab" * 32, "link": "eg7",
        "seconds": 3.25, "whole": True, "recorded": True,
    }  # fmt: skip
    return Report(**(settings | more), rows=rows)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ((REFUSED,), 0), ((REFUSED, NOT_TRIED), 0), ((REFUSED, UNCLEAR), 1), ((NOT_TRIED,), 1), ((), 1),
        ((REFUSED, GOT_OUT), ESCAPED), ((UNCLEAR, GOT_OUT), 2),
    ],
)  # fmt: skip
def test_the_exit_status(rows: tuple[Row, ...], status: int) -> None:
    assert status_of(report(*rows)) == status


def text(made: Report, *, columns: int = 0, everything: bool = False) -> str:
    return render(made, paint=Paint(io.StringIO(), no_color=True, columns=columns), everything=everything)


def test_the_page_ends_with_the_sum() -> None:
    found = text(report(REFUSED, NOT_TRIED))
    assert "1 ways tried, 1 refused, 0 escaped; 1 not tried" in found
    assert "On record over link eg7, as your word: sha256:" in found
    assert "TCP to a raw address" not in text(report(REFUSED))
    assert "TCP to a raw address, HTTPS (v6)" in text(report(REFUSED), everything=True)


def test_what_escaped_is_said_last_and_with_what_was_counted() -> None:
    found = text(report(REFUSED, NOT_TRIED, GOT_OUT, UNCLEAR))
    assert "3 ways tried, 1 refused, 1 escaped, 1 unclear; 1 not tried" in found
    (line,) = (line for line in found.splitlines() if "ESCAPED" in line)
    assert "4 admitted" in line and "4 of 4 frames were admitted" in line
    assert found.index("IPv6 is off") < found.index("ESCAPED")


def test_a_guard_that_is_off_is_named() -> None:
    assert "egressctl guard acme on" in text(report(GOT_OUT, guard="off"))
    assert "egressctl guard" not in text(report(GOT_OUT))


def test_what_was_not_recorded_says_why() -> None:
    assert "Not on record: the disk is full" in text(
        report(REFUSED, recorded=False, unrecorded="the disk is full")
    )
    assert "record" not in text(report(REFUSED, whole=False, recorded=False))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_page_fits_a_terminal(columns: int) -> None:
    found = text(report(REFUSED, NOT_TRIED, GOT_OUT, UNCLEAR), columns=columns, everything=True)
    long = [line for line in found.splitlines() if len(line) > columns and "sha256:" not in line]
    assert long == []


SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["tried", "refused", "escaped", "unclear", "not_tried", "table", "ways", "recorded"],
    "properties": {
        **{name: {"type": "string"} for name in
           ("workspace", "guard", "policy", "link", "version", "unrecorded")},
        **{name: {"type": "integer", "minimum": 0} for name in
           ("tried", "refused", "escaped", "unclear", "not_tried")},
        "seconds": {"type": "number"},
        "whole": {"type": "boolean"},
        "recorded": {"type": "boolean"},
        "table": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "ways": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["number", "group", "name", "family", "must", "counted", "happened", "verdict"],
                "properties": {
                    **{name: {"type": "string"} for name in ("name", "happened", "why")},
                    **{name: {"type": "integer", "minimum": 0} for name in
                       ("number", "sent", "ok", "denied", "other")},
                    "group": {"enum": sorted(GROUPS)},
                    "family": {"enum": ["v4", "v6", "-"]},
                    "must": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    "counted": {"enum": ["denied", "admitted", "nothing", "nothing or denied", "other"]},
                    "verdict": {"enum": ["refused", "ESCAPED", "unclear", "not tried"]},
                },
            },
        },
    },
}  # fmt: skip


def test_the_document_is_as_its_schema() -> None:
    found = json.loads(json.dumps(report(REFUSED, NOT_TRIED, GOT_OUT, UNCLEAR).document()))
    jsonschema.validate(found, SCHEMA)
    assert (found["tried"], found["refused"], found["escaped"], found["not_tried"]) == (3, 1, 1, 1)


def test_the_digest_is_of_what_happened() -> None:
    assert report(REFUSED).table == report(REFUSED, link="eg8").table
    assert report(REFUSED).table != report(replace(REFUSED, denied=2)).table


def test_what_is_recorded_is_what_a_record_of_it_may_say() -> None:
    made = report(REFUSED, NOT_TRIED)
    fields = {**made.counts(), "table": made.table, "version": made.version}
    assert testimony.wrong(judge.EVENT, fields) == "" and testimony.told(judge.EVENT, fields)
    assert testimony.wrong(judge.EVENT, {**fields, "escaped": -1}) == "escaped: not what selftest may say"
    assert "no such field" in testimony.wrong(judge.EVENT, {**fields, "note": "all is well"})
    assert testimony.is_shown(judge.EVENT, receipt=False) and judge.EVENT not in testimony.PRIVATE


# ---- the verb


def test_the_list_needs_no_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--list", "--only", "frames"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(w.group == "frames" for w in judge.ways())
    assert main(["--json", "selftest", "--list"]) == 0
    found = json.loads(capsys.readouterr().out)["ways"]
    assert [w["number"] for w in found] == [w.number for w in judge.ways()]


def test_what_cannot_be_tested_is_125(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["selftest", "--only", "xyzzy"]) == 125
    assert "nothing matches 'xyzzy'" in capsys.readouterr().err
    assert main(["--json", "--run-dir", str(tmp_path), "selftest", "-w", "acme"]) == 125
    written = capsys.readouterr()
    assert json.loads(written.out)["error"]["reason"] == "unavailable"
    assert "egressd is not running" in written.err
    assert main(["selftest", "--nonsense"]) == 125


# ---- the preflight


def test_the_gate_is_given_the_text_and_the_place() -> None:
    python, *options, script, run_dir = preflight.command("/run/egressd")
    assert python.startswith("/usr/") and options == ["-I", "-S", "-c"] and run_dir == "/run/egressd"
    compile(script, "preflight.py", "exec")


def test_neighbours_are_of_the_same_pool() -> None:
    assert judge._beside(IPv4Address("198.19.255.255")) == "198.19.0.0"
    assert judge._beside(IPv6Address("fd53:1::7")) == "fd53:1::8"
    assert attacks._beside("198.19.0.7", -1) == "198.19.0.6"
    assert attacks._beside("fd53:1::ffff", 1) == "fd53:1::"
