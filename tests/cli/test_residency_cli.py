"""`egressctl residency import`, `tables` and `lookup`: with a running egressd, and without."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from egressd.cli import residency
from egressd.ipc import messages
from egressd.journal.keys import PrivateKey
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.processes.registry_files import read_registry
from egressd.residency.prefixes import Table
from egressd.sandbox.control import Control
from residency.published_lists import aws, google

TODAY = datetime.now(UTC).date()
LIST = aws(
    ("3.120.0.0/14", "eu-central-1", "EC2"),
    ("3.0.0.0/9", "us-east-1", "EC2"),
    ("13.34.9.0/24", "eu-west-3", "EC2", "eu-west-3-cmn-wlz-1"),
    ("15.197.0.0/16", "GLOBAL", "GLOBALACCELERATOR"),
    ("9.9.9.0/24", "eu-west-3", "EC2"),
    ("9.9.9.0/24", "us-east-1", "EC2"),
    ("2a05:d014::/36", "eu-central-1", "EC2"),
    created=f"{TODAY}-19-53-08",
)
DIGEST = hashlib.sha256(LIST).hexdigest()
HEAD = ["table", "provider", "prefixes", "published", "imported", "age", "checked", "file's", "digest"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "ip-ranges.json").write_bytes(LIST)
    return tmp_path


@pytest.fixture
def ctl(egressctl: Any, place: Path) -> Any:
    """`egressctl residency`, where no egressd runs, with tables in `place / "residency"`."""

    def run(action: str, *words: object) -> Any:
        there = ("--run-dir", place / "nowhere", "--residency-dir", place / "residency")
        return egressctl("residency", action, *words, *there)

    return run


def kept(place: Path, name: str = "aws") -> Table:
    return Table.decode((place / "residency" / "tables" / f"{name}.json").read_bytes())


# ---- import


def test_what_came_in_is_told_and_kept(ctl: Any, place: Path) -> None:
    told = ctl("import", place / "ip-ranges.json")
    assert (told.status, told.err) == (0, "")
    assert (
        told.out
        == f"""\
aws: 6 prefixes of aws (5 IPv4, 1 IPv6), published {TODAY}
  file ip-ranges.json, {len(LIST)} bytes, sha256:{DIGEST}
  checked: not compared with anything: --sha256 or --signature
  3 regions: eu-central-1 2, eu-west-3-cmn-wlz-1 1, us-east-1 1
  2 countries: DE 2, US 1
  announced from many places: 1
  ! regions that the catalogue does not know: eu-west-3-cmn-wlz-1 1
    their prefixes are kept, and refused where a workspace is pinned
  ! 1 prefixes contradict themselves, and are refused:
    9.9.9.0/24: the same list puts it in different places: eu-west-3, us-east-1
  1 prefixes lie in a wider one of another region; the narrower decides:
    3.120.0.0/14: eu-central-1 in us-east-1
  there was no such table before
written: {place}/residency/tables/aws.json
egressd is not running: the table holds when it next starts
"""
    )
    assert kept(place).source.digest == f"sha256:{DIGEST}"
    assert read_registry(place / "residency").broken == ""


def test_the_table_is_everybodys_to_read_and_nothing_is_left_beside_it(ctl: Any, place: Path) -> None:
    mask = os.umask(0o077)
    try:
        assert ctl("import", place / "ip-ranges.json").status == 0
    finally:
        os.umask(mask)
    directory = place / "residency" / "tables"
    assert [path.name for path in directory.iterdir()] == ["aws.json"]
    assert stat.S_IMODE((directory / "aws.json").stat().st_mode) == 0o644
    for made in (directory, directory.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o755


def test_a_second_import_says_what_is_other(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    (place / "later.json").write_bytes(
        aws(
            ("3.120.0.0/14", "us-east-1", "EC2"),
            ("3.0.0.0/9", "us-east-1", "EC2"),
            ("2a05:d018::/36", "eu-west-1", "EC2"),
            created="2025-01-01-00-00-00",
        )
    )
    told = ctl("import", "--json", place / "later.json").json
    assert told["changes"] == {
        "added": 1,
        "removed": 4,
        "moved": {"count": 1, "examples": [{"prefix": "3.120.0.0/14", "text": "eu-central-1 -> us-east-1"}]},
    }
    assert told["remarks"] == [
        f"it is older than the table before, which was published on {TODAY}",
        "more prefixes have gone than are left: was only a part of it downloaded?",
    ]
    assert kept(place).published != TODAY


def test_a_list_of_another_kind_is_no_later_edition(ctl: Any, place: Path) -> None:
    """In the place of AWS's own, what lies in the US would be in no table, and could be vouched for."""
    ctl("import", place / "ip-ranges.json")
    (place / "own.txt").write_text("3.120.0.0/14\n")
    words = ("import", place / "own.txt", "--provider", "aws", "--region", "eu-central-1")
    told = ctl(*words)
    assert told.status == 1 and kept(place).format == "aws"
    assert "there is a table aws, of aws and the format aws: this is no later edition of it" in told.err
    assert "--name aws puts this one (cidr) there" in told.err
    assert ctl(*words, "--name", "own").status == 0
    assert (kept(place).format, kept(place, "own").format) == ("aws", "cidr")
    assert ctl(*words, "--name", "aws").status == 0
    assert kept(place).format == "cidr"


def test_a_check_changes_nothing(ctl: Any, place: Path) -> None:
    told = ctl("import", "--check", place / "ip-ranges.json")
    assert told.status == 0 and told.out.endswith("nothing was changed\n")
    assert not (place / "residency").exists()


def test_from_standard_input(ctl: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LIST)))
    assert ctl("import", "-").status == 0
    assert kept(place).source.name == "standard input"


def test_a_plain_list_under_a_name(ctl: Any, place: Path) -> None:
    (place / "own.txt").write_text("5.39.0.0/17\n2001:41d0::/32\n")
    words = ("--provider", "Own Cloud".replace(" ", "-"), "--region", "X", "--country", "FR")
    assert ctl("import", place / "own.txt", *words).status == 0
    assert kept(place, "own-cloud").provider == "Own-Cloud"
    assert ctl("import", place / "own.txt", *words, "--name", "mine").status == 0
    assert kept(place, "mine").name == "mine"
    assert ctl("lookup", "5.39.0.1", "--pin", "FR").status == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["half.json"], 1, "half.json:13: the file ends in the middle: only a part of it is here (download"),
        (["goog.json"], 1, "it is goog.json, all of Google's (import cloud.json"),
        (["none.json"], 1, "none.json: it cannot be read: No such file or directory"),
        ([".."], 1, "it cannot be read: Is a directory"),
        (["huge.json"], 1, "huge.json: it has at least 209715200 bytes; a list of prefixes may have 6710"),
        (["ip-ranges.json", "--format", "google"], 1, "it is no list of the format google"),
        (["ip-ranges.json", "--format", "oracle"], 2, "invalid choice: 'oracle'"),
        (["ip-ranges.json", "--country", "DE"], 1, "says itself whose it is"),
        (["ip-ranges.json", "--name", "../x"], 1, "it is no table of prefixes"),
        (["ip-ranges.json", "--sha256", "0" * 64], 1, f"its digest is sha256:{DIGEST}, and not"),
        (["ip-ranges.json", "--sha256", "12"], 2, "--sha256: a SHA-256 digest is 64 hexadecimal digits"),
        (["ip-ranges.json", "--key", "key.pem"], 2, "--signature and --key need each other"),
        (["ip-ranges.json", "--key", "half.json", "--signature", "half.json"], 2, "--signature or --key: "),
        ([], 2, "the following arguments are required: FILE"),
    ],
)  # fmt: skip
def test_what_is_refused(
    ctl: Any, place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, said: str
) -> None:
    monkeypatch.chdir(place)
    Path("half.json").write_bytes(LIST[:300])
    Path("goog.json").write_bytes(google(("8.8.8.0/24", None)))
    Path("huge.json").touch()
    os.truncate("huge.json", 200 << 20)
    told = ctl("import", *words)
    assert (told.status, told.out) == (status, "")
    assert said in told.err
    assert not Path("residency").exists()


def test_what_grows_while_it_is_read_is_bounded_too(ctl: Any, place: Path) -> None:
    told = ctl("import", "/dev/zero")
    assert told.status == 1 and "a list of prefixes may have 67108864" in told.err


def test_a_refusal_for_programs(ctl: Any, place: Path) -> None:
    (place / "half.json").write_bytes(LIST[:300])
    (problem,) = ctl("import", "--json", place / "half.json").json["error"]["problems"]
    assert (problem["source"], problem["line"]) == ("half.json", 13)
    assert problem["remedy"] == "download it again"


def test_compared_with_a_digest(ctl: Any, place: Path) -> None:
    for spelled in (DIGEST, DIGEST.upper(), f"sha256:{DIGEST}"):
        assert ctl("import", place / "ip-ranges.json", "--sha256", spelled).status == 0
    assert kept(place).source.checked == "sha256"


def test_compared_with_a_signature(ctl: Any, place: Path) -> None:
    key, other = PrivateKey.generate(), PrivateKey.generate()
    (place / "key.pem").write_text(key.public.pem())
    (place / "other.pem").write_text(other.public.pem())
    (place / "list.sig").write_bytes(key.sign(LIST))

    def signed_by(name: str) -> Any:
        words = ("--signature", place / "list.sig", "--key", place / name)
        return ctl("import", place / "ip-ranges.json", *words)

    refused = signed_by("other.pem")
    assert refused.status == 1 and "the signature is not one over this file" in refused.err
    assert not (place / "residency").exists()
    assert signed_by("key.pem").status == 0
    assert kept(place).source.checked == f"ed25519 {key.public.fingerprint}"
    (place / "ip-ranges.json").write_bytes(LIST + b" ")
    assert signed_by("key.pem").status == 1


def test_a_table_that_cannot_be_read_is_replaced(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    (place / "residency" / "tables" / "aws.json").write_text("junk")
    told = ctl("import", place / "ip-ranges.json")
    assert told.status == 0 and "the table before cannot be read, and is replaced" in told.out
    assert read_registry(place / "residency").broken == ""


def test_a_directory_that_cannot_be_written(ctl: Any, place: Path) -> None:
    (place / "residency").write_text("a file")
    told = ctl("import", place / "ip-ranges.json")
    assert told.status == 125 and "the table cannot be written" in told.err


# ---- with a running egressd

APPLIED = {"changes": [], "problems": [], "applied": True, "milliseconds": 1.5, "drift": []}


def test_a_running_egressd_is_asked_to_apply(egressctl: Any, daemon: Any, place: Path) -> None:
    daemon.status = {"residency_dir": str(place / "own")}
    daemon.document = APPLIED
    told = egressctl("residency", "import", place / "ip-ranges.json", "--run-dir", daemon.run_dir)
    assert told.status == 0
    assert told.out.endswith(
        f"written: {place}/own/tables/aws.json\nrules: no changes; addresses judged anew in 1.5 ms\n"
    )
    assert daemon.asked[-1] == messages.Apply(why="residency import aws")


def test_a_refusal_to_apply_is_loud(
    egressctl: Any, daemon: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.status = {"residency_dir": str(place / "own")}

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused(Reason.MEMBER, "only root applies policies")

    monkeypatch.setattr(Control, "apply", refuse)
    told = egressctl("residency", "import", place / "ip-ranges.json", "--run-dir", daemon.run_dir)
    assert told.status == 125
    assert told.out.endswith(f"{place}/own/tables/aws.json\nNOT APPLIED: only root applies policies\n")


def test_an_egressd_that_does_not_say_what_it_reads(egressctl: Any, daemon: Any, place: Path) -> None:
    daemon.refusal = messages.Refusal(reason=Reason.MEMBER.value, text="not for you")
    words = ("--run-dir", daemon.run_dir, "--residency-dir", place / "own")
    told = egressctl("residency", "import", place / "ip-ranges.json", *words)
    assert told.status == 125 and "NOT APPLIED: not for you" in told.out


def test_another_directory_than_the_running_egressds(egressctl: Any, daemon: Any, place: Path) -> None:
    daemon.status = {"residency_dir": str(place / "own")}
    words = ("--run-dir", daemon.run_dir, "--residency-dir", place / "other")
    told = egressctl("residency", "import", place / "ip-ranges.json", *words)
    assert told.status == 0
    assert told.out.endswith(f"the running egressd reads {place}/own: nothing was applied\n")
    assert not any(isinstance(asked, messages.Apply) for asked in daemon.asked)


# ---- tables


def test_tables_and_how_old_they_are(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    told = ctl("tables")
    assert (told.status, told.err) == (0, "")
    head, row = told.out.splitlines()
    assert head.split() == HEAD
    assert row.split()[:6] == ["aws", "aws", "6", str(TODAY), str(TODAY), "0"]


def test_an_old_table_is_called_stale(ctl: Any, place: Path) -> None:
    (place / "ip-ranges.json").write_bytes(
        aws(("3.0.0.0/9", "us-east-1", "EC2"), created=f"{TODAY - timedelta(days=31)}-00-00-00")
    )
    ctl("import", place / "ip-ranges.json")
    told = ctl("tables")
    assert told.status == 1
    assert "31 d STALE" in told.out and "import the publisher's list again" in told.out
    (one,) = ctl("tables", "--json").json["tables"]
    assert (one["name"], one["stale"], one["days"], one["prefixes"]) == ("aws", True, 31, 1)


def test_catalogue_files_of_ones_own_are_named(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    assert "files of your own" not in ctl("tables").out
    (place / "residency" / "ours.yaml").write_text(
        "providers:\n  ours: {title: Ours, source: 'https://ours.example/x', domains: [ours.example]}\n"
    )
    assert "catalogue, by files of your own: ours.yaml@sha256:" in ctl("tables").out
    (own,) = ctl("tables", "--json").json["catalogue"]
    assert own.startswith("ours.yaml@sha256:")


def test_no_tables(ctl: Any, place: Path) -> None:
    told = ctl("tables")
    assert told.status == 0 and "no address can be placed" in told.out


def test_a_table_that_is_broken(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    path = place / "residency" / "tables" / "aws.json"
    path.write_bytes(path.read_bytes()[:100])
    told = ctl("tables", "--json")
    assert told.status == 1
    assert f"{path}: it is no table of prefixes" in told.err
    assert str(path) in told.json["broken"] and told.json["tables"] == []
    assert "all that is pinned is refused until that file is right" in ctl("tables").out


# ---- lookup


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["3.120.0.1"], 0, ["3.120.0.0/14 of aws (table aws, sha256:", "region eu-central-1 (DE)"]),
        (["3.120.0.1", "--pin", "EU"], 0, ["complies, inside: "]),
        (["3.120.0.1", "--pin", "FR"], 1, ["refused, outside: ", "DE is not in FR"]),
        (["3.120.0.1", "--pin", "FR,DE"], 0, ["complies, inside: "]),
        (["3.0.0.1", "--pin", "EU"], 1, ["refused, outside: "]),
        (["8.8.8.8", "--pin", "EU"], 1, ["refused, no-prefix: ", "in no published prefix"]),
        (["15.197.0.1", "--pin", "EU"], 1, ["refused, anycast: ", "(write vouch: REASON)"]),
        (["9.9.9.9", "--pin", "EU"], 1, ["refused, conflicting-prefixes: "]),
        (["13.34.9.1", "--pin", "EU"], 1, ["eu-west-3-cmn-wlz-1 nobody can place"]),
        (["2a05:d014::1", "--pin", "EU"], 0, ["complies, inside: "]),
        (["2a05:d014:1000::", "--pin", "EU"], 1, ["refused, no-prefix: "]),
        (["3.120.0.0/16", "--pin", "EU"], 0, ["complies, inside: "]),
        (["3.120.0.0/13", "--pin", "EU"], 1, ["complies, inside: ", "refused, outside: "]),
        (["2a05:d014::/35", "--pin", "EU"], 1, ["complies, inside: ", "refused, no-prefix: "]),
        (["bedrock-runtime.eu-west-1.amazonaws.com", "--pin", "EU"], 0, ["aws-bedrock", "complies"]),
        (["bedrock-runtime.us-east-1.amazonaws.com", "--pin", "EU"], 1, ["refused, outside: "]),
        (["nobody.example", "--pin", "EU"], 0, ["in no catalogue", "left open, by-address: "]),
        (["https://3.0.0.1/v1", "--pin", "EU"], 1, ["refused, outside: "]),
    ],
)  # fmt: skip
def test_where_something_is(ctl: Any, place: Path, words: list[str], status: int, said: list[str]) -> None:
    ctl("import", place / "ip-ranges.json")
    told = ctl("lookup", *words)
    assert (told.status, told.err) == (status, "")
    for text in said:
        assert text in told.out
    document = ctl("lookup", "--json", *words).json
    assert document["compliant"] == (None if "--pin" not in words else status == 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["3.120.0.1/14"], "has bits set behind its length (is 3.120.0.0/14 meant?)"),
        (["3.120.0.1", "--pin", "Europe"], "'Europe' is not a jurisdiction"),
        (["3.120.0.1", "--pin", "GB"], "did you mean UK?"),
        (["https://key@example.com"], "user-info"),
        (["not a host"], ""),
        (["\x1b[2J"], ""),
    ],
)
def test_what_cannot_be_looked_up(ctl: Any, words: list[str], said: str) -> None:
    told = ctl("lookup", *words)
    assert (told.status, told.out) == (2, "")
    assert said in told.err and "\x1b" not in told.err


def test_a_broken_table_places_nothing_under_a_pin(ctl: Any, place: Path) -> None:
    ctl("import", place / "ip-ranges.json")
    (place / "residency" / "tables" / "own.json").write_text("junk")
    told = ctl("lookup", "3.120.0.1", "--pin", "EU")
    assert told.status == 1 and "refused, broken-registry: " in told.out


# ---- which verb is it?


def test_any_other_word_is_a_workspace(
    egressctl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr("egressd.cli.switches.residency", lambda args: seen.append(args) or 0)
    for words in (["acme", "EU"], ["--json", "acme", "EEA", "CH"], ["acme"]):
        assert egressctl("residency", *words).status == 0
    assert [(args.workspace, list(args.value)) for args in seen] == [
        ("acme", ["EU"]),
        ("acme", ["EEA", "CH"]),
        ("acme", []),
    ]
    assert [args.json for args in seen] == [False, True, False]
    for action in residency.ACTIONS:
        assert egressctl("residency", action, "--frob").status == 2
    assert len(seen) == 3


def test_documents_are_json_alone(ctl: Any, place: Path) -> None:
    document = ctl("import", "--json", place / "ip-ranges.json")
    assert json.loads(document.out)["written"] == str(place / "residency" / "tables" / "aws.json")
    assert document.err == ""
