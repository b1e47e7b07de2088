"""egressctl member, ingest, source and barrier: a store, a daemon that records, and what is said."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.store.store import Store
from egressd.ipc import messages

ANN, STAFF = "user:okta:ann", "group:okta:staff"
TERMS = messages.Terms(
    workspace="acme", guard="enforce", policy="sha256:" + "0" * 64, wall=None, memory=None, processes=None,
    services=(),
)  # fmt: skip


class Desk:
    """`desk("member", "list")` runs it with this store and this daemon."""

    def __init__(self, egressctl: Any, daemon: Any, place: Path) -> None:
        self.egressctl, self.daemon, self.place = egressctl, daemon, place
        self.url = f"sqlite:///{place}/store.db"
        self.directory = place / "documents"
        self.directory.mkdir()

    def __call__(self, verb: str, *words: str, workspace: str = "acme") -> Any:
        options = ("-w", workspace, "--store", self.url, "--broker-config", str(self.place / "broker.yaml"))
        return self.egressctl("--run-dir", self.daemon.run_dir, verb, *words, *options)

    def ingest(self, *words: str) -> Any:
        return self("ingest", str(self.directory), "--source", "docs", *words)

    @property
    def recorded(self) -> list[tuple[str, str]]:
        said = [one for one in self.daemon.asked if isinstance(one, messages.Testify)]
        return [(one.event, str(one.fields.get("what", ""))) for one in said]


@pytest.fixture
def desk(egressctl: Any, daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    answers = {messages.Enter: TERMS, messages.Testify: messages.Recorded()}

    def answer(channel: Any) -> None:
        try:
            while True:
                asked = channel.receive().message
                daemon.asked.append(asked)
                channel.send(daemon.refusal or answers[type(asked)])
        except EOFError:
            return

    monkeypatch.setattr(daemon, "_answer", answer)
    (tmp_path / "broker.yaml").write_text(CONFIG)
    return Desk(egressctl, daemon, tmp_path)


CONFIG = """\
issuers:
  okta: {issuer: https://acme.okta.com, audience: egressd}
"""


# ---- members


def test_a_member_is_added_changed_listed_and_removed(desk: Desk) -> None:
    told = desk("member", "add", ANN, "--role", "owner", "--clearance", "secret")
    assert (told.status, told.out, told.err) == (0, f"{ANN} is owner, cleared for secret in acme\n", "")
    desk("member", "add", STAFF, "--role", "viewer")
    told = desk("member", "add", STAFF, "--role", "editor")
    assert told.out == (
        f"{STAFF} is editor, cleared for public in acme; was viewer, cleared for public\n"
    )  # fmt: skip
    told = desk("member", "list")
    assert [line.split()[:3] for line in told.out.splitlines()] == [
        ["MEMBER", "ROLE", "CLEARANCE"], [STAFF, "editor", "public"], [ANN, "owner", "secret"],
    ]  # fmt: skip
    told = desk("member", "remove", STAFF)
    assert told.out == f"{STAFF} is no member of acme any more; was editor, cleared for public\n"
    assert desk("member", "remove", STAFF).out == f"{STAFF} is no member of acme\n"
    assert desk.recorded == [("access-changed", "member-set")] * 3 + [("access-changed", "member-removed")]
    assert desk.daemon.asked[0] == messages.Enter(workspace="acme")


def test_a_name_is_told_as_it_is_kept(desk: Desk) -> None:
    """Composed: or what was just added would seem not to be there."""
    told = desk("member", "add", "group:okta:Re\u0301vision", "--role", "viewer", "--json").json
    assert told["principal"] == "group:okta:R\u00e9vision"
    assert told["after"]["role"] == "viewer"
    assert told["changed"] is True


def test_members_for_programs(desk: Desk) -> None:
    told = desk("member", "add", ANN, "--role", "admin", "--json").json
    assert (told["principal"], told["before"], told["changed"]) == (ANN, None, True)
    assert (told["after"]["role"], told["after"]["clearance"]) == ("admin", "public")
    assert told["after"]["granted_by"].startswith(f"uid {os.geteuid()}")
    [member] = desk("member", "list", "--json").json["members"]
    assert member == told["after"]
    assert desk("member", "list", workspace="other").out == "other has no members: egressctl member add\n"


def test_what_the_daemon_does_not_record_is_not_done(desk: Desk) -> None:
    desk("member", "add", ANN, "--role", "owner")
    desk.daemon.refusal = messages.Refusal(reason="member", text="uid 7 is no broker")
    told = desk("member", "add", STAFF, "--role", "owner", "--json")
    assert (told.status, told.json) == (125, {"error": {"reason": "member", "text": "uid 7 is no broker"}})
    assert told.err == "egressctl: uid 7 is no broker\n"
    desk.daemon.refusal = None
    assert [m["principal"] for m in desk("member", "list", "--json").json["members"]] == [ANN]


def test_without_a_daemon_nothing_is_changed_but_all_is_shown(desk: Desk, tmp_path: Path) -> None:
    desk("member", "add", ANN, "--role", "owner")
    desk.daemon.run_dir = tmp_path / "nowhere"
    told = desk("member", "add", STAFF, "--role", "viewer")
    assert told.status == 125
    assert "egressd is not running" in told.err
    assert ANN in desk("member", "list").out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("add", "ann", "--role", "viewer"), "write user:ISSUER:SUBJECT or group:ISSUER:NAME"),
        (("add", "user:oktaa:ann", "--role", "viewer"), "the providers are okta"),
        (("add", ANN, "--role", "viewer", "--clearance", "cosmic"), "name public, internal"),
        (("remove", ANN), "last owner: make somebody else owner first"),
        (("add", "user:okta:\x1b[2J", "--role", "viewer"), "\\x1b[2J"),
    ],
)
def test_a_no_says_what_to_do_instead(desk: Desk, words: tuple[str, ...], why: str) -> None:
    desk("member", "add", ANN, "--role", "owner")
    told = desk("member", *words)
    assert (told.status, told.out) == (125, "")
    assert why in told.err
    assert "\x1b" not in told.err


def test_a_wrong_role_is_a_wrong_command_line(desk: Desk) -> None:
    told = desk("member", "add", ANN, "--role", "emperor")
    assert told.status == 2
    assert "viewer" in told.err


def test_a_name_that_a_terminal_would_act_on_is_spelled_out(desk: Desk) -> None:
    desk("member", "add", ANN, "--role", "owner")
    with Store.open(desk.url) as store, store.change("acme") as change:
        change.put_member(
            change.members()[0].__class__("user:okta:\x1b[2J\u202e", Role.VIEWER, "\x07", "x", 1.0)
        )
    told = desk("member", "list")
    assert "user:okta:\\x1b[2J\\u202e" in told.out
    assert not {"\x1b", "\u202e", "\x07"} & set(told.out)


# ---- where the store is


def test_the_configuration_names_the_store(desk: Desk, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG + f"store: {desk.url}\n")
    desk("member", "add", ANN, "--role", "owner")
    told = desk.egressctl("member", "list", "-w", "acme", "--broker-config", config)
    assert ANN in told.out


def test_a_configuration_that_is_wrong_is_told_line_by_line(desk: Desk, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text("store: 7\nnonsense: 1\n")
    told = desk.egressctl("member", "list", "-w", "acme", "--broker-config", config, "--json")
    assert told.status == 125
    assert {one["line"] for one in told.json["error"]["problems"]} == {1, 2}
    assert len(told.err.splitlines()) == len(told.json["error"]["problems"]) >= 2
    told = desk.egressctl("member", "list", "-w", "acme", "--broker-config", tmp_path / "nope.yaml")
    assert told.status == 125
    assert "nope.yaml" in told.err


def test_a_store_that_others_could_have_written_to_is_refused(desk: Desk, tmp_path: Path) -> None:
    desk("member", "add", ANN, "--role", "owner")
    (tmp_path / "store.db").chmod(0o666)
    told = desk("member", "list")
    assert told.status == 125
    assert "chmod 600" in told.err


def test_a_url_s_password_is_not_repeated(desk: Desk) -> None:
    desk.url = "postgresql://x:hunter2@127.0.0.1:1/x"
    told = desk("member", "list", "--json")
    assert told.status == 125
    assert "hunter2" not in told.out + told.err


# ---- ingest, source


def test_documents_are_ingested_trusted_and_dropped(desk: Desk) -> None:
    (desk.directory / "a.md").write_text(f"---\nacl: {{read: [{STAFF}]}}\nclearance: public\n---\n")
    told = desk.ingest()
    assert told.status == 1  # nobody may read it yet
    lines = told.out.splitlines()
    assert lines[:2] == [
        "docs: 1 added, 0 changed, 0 removed, 0 unchanged",
        "  nobody may read docs:a.md: nothing says its clearance (say it, or give the source a default)",
    ]
    assert lines[2].startswith("  warning: what one document says of itself is not believed: egressctl ")
    told = desk("source", "trust", "docs", "--front-matter", "on", "--read", ANN, "--clearance", "internal")
    assert (told.status, "front matter: believed" in told.out) == (0, True)
    assert desk.ingest().status == 0
    [source] = desk("source", "list", "--json").json["sources"]
    assert (source["name"], source["documents"], source["read"], source["front_matter"]) == (
        "docs", 1, [ANN], True,
    )  # fmt: skip
    assert "read by default: nobody" in desk("source", "trust", "docs", "--read", "").out
    assert desk("source", "drop", "docs").out == "docs is dropped, with 1 documents\n"
    assert desk("source", "list").out == "acme has no sources: egressctl ingest\n"
    assert [event for event, _ in desk.recorded] == [
        "documents-ingested", "access-changed", "documents-ingested", "access-changed", "access-changed",
    ]  # fmt: skip


SPEAKS = f"---\nacl: {{read: [{STAFF}]}}\nclearance: public\n---\n"


def test_a_first_ingest_may_say_what_is_believed(desk: Desk) -> None:
    (desk.directory / "a.md").write_text(SPEAKS)
    (desk.directory / "b.md").write_text("x")
    options = ("--front-matter", "on", "--read", STAFF, "--deny", ANN, "--clearance", "internal")
    told = desk.ingest(*options)
    assert told.status == 0
    assert told.out.splitlines()[:-1] == [
        "docs: 2 added, 0 changed, 0 removed, 0 unchanged",
        "  front matter: believed",
        f"  read by default: {STAFF}",
        f"  deny by default: {ANN}",
        "  groups by default: none",
        "  clearance by default: internal",
    ]
    assert desk.recorded == [("documents-ingested", "")]
    again = desk.ingest(*options, "--json").json
    assert (again["trust_set"], again["trust"]["front_matter"], again["unchanged"]) == (False, True, 2)
    assert "name public, internal" in desk.ingest("--clearance", "cosmic").err


def test_a_source_is_trusted_first_and_ingested_then(desk: Desk) -> None:
    (desk.directory / "a.md").write_text(SPEAKS)
    told = desk("source", "trust", "docs", "--front-matter", "on")
    assert told.status == 0
    assert told.out.startswith("docs  not ingested yet: egressctl ingest\n  front matter: believed\n")
    assert "  documents: 0, ingested never" in desk("source", "list").out
    [source] = desk("source", "list", "--json").json["sources"]
    assert (source["directory"], source["ingested_at"], source["documents"]) == (None, None, 0)
    assert desk.ingest().status == 0
    assert f"docs  {desk.directory}\n" in desk("source", "list").out
    told = desk("source", "trust", "dosc")
    assert (told.status, told.out) == (125, "")
    assert "there is no source 'dosc'" in told.err


def test_what_is_not_believed_is_told_with_the_command_to_type(desk: Desk) -> None:
    (desk.directory / "a.md").write_text(SPEAKS)
    told = desk.ingest()
    [line] = [line for line in told.out.splitlines() if "believed" in line]
    what, command = line.split(": egressctl ")
    assert what == "  warning: what one document says of itself is not believed"
    assert desk.egressctl(*shlex.split(command)).status == 0
    assert desk.ingest().status == 0
    assert "believed" not in desk.ingest("--front-matter", "off").out.replace(
        "front matter: not believed", ""
    )
    desk.url = "sqlite:////nowhere/x?password=hunter2"
    assert "hunter2" not in desk.ingest().out


def test_an_ingest_for_programs(desk: Desk) -> None:
    (desk.directory / "a\n.md").write_text("x")
    (desk.directory / "link").symlink_to("/etc/passwd")
    told = desk.ingest("--json", "--dry-run")
    assert (told.json["dry_run"], told.json["added"]) == (True, ["docs:a%0A.md"])
    assert told.json["skipped"] == [{"path": "link", "why": "a symbolic link"}]
    assert desk.recorded == []
    assert desk("source", "list", "--json").json["sources"] == []


def test_an_access_list_is_told_every_problem_and_nothing_is_ingested(desk: Desk, tmp_path: Path) -> None:
    acl = tmp_path / "acl.yaml"
    acl.write_text(
        "documents:\n  - {path: ../x, read: []}\n  - {path: a, clearance: cosmic}\n  - {path: b}\n"
    )
    told = desk.ingest("--acl", str(acl), "--json")
    assert told.status == 125
    assert [one["line"] for one in told.json["error"]["problems"]] == [2, 3, 4]
    assert len(told.err.splitlines()) == 3
    assert all(line.startswith(f"egressctl: {acl}:") for line in told.err.splitlines())
    assert desk("source", "list", "--json").json["sources"] == []


@pytest.mark.parametrize("spoil", ["missing", "fifo", "everybody's", "a directory"])
def test_an_access_list_that_is_no_plain_file_is_refused(desk: Desk, tmp_path: Path, spoil: str) -> None:
    acl = tmp_path / "acl.yaml"
    if spoil == "fifo":
        os.mkfifo(acl)
    elif spoil == "a directory":
        acl.mkdir()
    elif spoil == "everybody's":
        acl.write_text("documents: []\n")
        acl.chmod(0o666)
    told = desk.ingest("--acl", str(acl))
    assert told.status == 125
    assert told.err.startswith(f"egressctl: {acl}: ")


def test_an_access_list_counts(desk: Desk, tmp_path: Path) -> None:
    (desk.directory / "a.md").write_text("x")
    acl = tmp_path / "acl.yaml"
    acl.write_text(f"documents:\n  a.md: {{read: [{STAFF}], clearance: public}}\n  b.md: {{read: []}}\n")
    told = desk.ingest("--acl", str(acl))
    assert told.status == 0
    assert "warning: line 3 of the access list matches nothing: b.md" in told.out
    desk("member", "add", STAFF, "--role", "viewer")
    with Store.open(desk.url) as store:
        found = store.snapshot("acme", Identity("okta", "x", frozenset({STAFF})), ["docs:a.md"])
    assert [one.acl.readers for one in found.documents.values()] == [frozenset({STAFF})]
    assert "give it again (--acl FILE)" in desk.ingest().err
    assert desk.ingest("--no-acl").status == 1


def test_many_are_counted_and_not_all_printed(desk: Desk) -> None:
    for i in range(50):
        (desk.directory / f"{i:02}.md").write_text("x")
    told = desk.ingest()
    assert "  ... and 30 more; --json has all" in told.out.splitlines()
    assert len(told.out.splitlines()) == 23
    assert told.err == ""  # progress is for terminals


def test_ctrl_c_is_told_by_the_status_and_changes_nothing(desk: Desk, tmp_path: Path) -> None:
    """A directory that does not end: sparse files take long to digest."""
    for i in range(40):
        with (desk.directory / f"{i}.bin").open("wb") as file:
            file.truncate(1 << 29)
    words = [
        "ingest", str(desk.directory), "--source", "docs", "-w", "acme", "--store", desk.url,
        "--broker-config", str(tmp_path / "broker.yaml"), "--run-dir", str(desk.daemon.run_dir),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "egressd.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    opened = Path(f"/proc/{process.pid}/fd")
    deadline = time.monotonic() + 60
    while not any(".bin" in name for name in _opened_by(opened)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert desk("source", "list", "--json").json["sources"] == []
    assert desk.recorded == []


def _opened_by(descriptors: Path) -> list[str]:
    names = []
    with contextlib.suppress(OSError):
        for link in descriptors.iterdir():
            with contextlib.suppress(OSError):
                names.append(str(link.readlink()))
    return names


# ---- barriers


def test_barriers_are_added_listed_and_removed(desk: Desk) -> None:
    one, other = "group:okta:deals", "group:okta:research"
    between = f"between {one} and {other}"
    assert desk("barrier", "list").out == "acme has no barriers\n"
    assert desk("barrier", "add", other, one).out == f"acme: there is a barrier {between}\n"
    assert desk("barrier", "add", one, other).out == f"acme: there is a barrier {between}; so it was before\n"
    assert desk("barrier", "list").out == f"{one}  {other}\n"
    assert desk("barrier", "list", "--json").json == {"workspace": "acme", "barriers": [[one, other]]}
    told = desk("barrier", "remove", other, one, "--json").json
    assert told == {"workspace": "acme", "groups": [one, other], "barrier": False, "changed": True}
    assert "two groups" in desk("barrier", "add", one, ANN).err


# ---- what it loads


def test_help_loads_no_database(desk: Desk) -> None:
    code = (
        "import sys; from egressd.cli.main import main; main(sys.argv[1:]); print(json.dumps([*sys.modules]))"
    )
    for verb in ("member", "ingest", "source", "barrier"):
        done = subprocess.run(
            [sys.executable, "-c", f"import json; {code}", verb, "--help"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert not loaded & {"sqlalchemy", "alembic", "pydantic", "yaml", "egressd.sandbox.control"}, verb
