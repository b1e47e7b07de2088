"""From a directory to the store: what is read, what is said of it, and what becomes of it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_world import ANN, BEN, FINANCE, OPERATOR, RESEARCH, STAFF, Journal, administered

from egressd.access.acl_file import load
from egressd.access.authorise import authorise
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.store.administration import Administration
from egressd.broker.store.ingest import AccessList, Ingested, ingest
from egressd.broker.store.store import Store
from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason
from egressd.vault.beneath import Bounds

OURS = "---\nacl: {read: [group:okta:finance]}\nclearance: internal\n---\nnumbers\n"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


class Desk:
    """An operator with a directory: `put` files into it, `ingest` it, and see who may read what."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store, self.directory = store, directory
        self.to: Administration
        self.journal: Journal
        self.to, self.journal = administered(store)
        self.to.set_member(OPERATOR, "acme", STAFF, Role.VIEWER, "secret")
        self.journal.records.clear()

    def put(self, path: str | bytes, text: str = "hello\n") -> Path:
        file = self.directory / os.fsdecode(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def ingest(self, *, rules: str | None = None, source: str = "docs", **options: Any) -> Ingested:
        data = None if rules is None else rules.encode()
        access_list = data and AccessList(load(data, source="acl.yaml"), hashlib.sha256(data).hexdigest())
        options = {"directory": str(self.directory), "actor": OPERATOR, **options}
        return ingest(self.to, workspace="acme", source=source, access_list=access_list or None, **options)

    def trust(self, **trust: Any) -> None:
        self.to.set_trust(OPERATOR, "acme", "docs", **trust)

    def readable(self, who: Identity, *paths: str) -> list[str]:
        ids = [f"docs:{path}" for path in paths] or sorted(self.store.stored("acme", "docs"))
        found = self.store.snapshot("acme", who, ids)
        return [one.id[5:] for one in authorise(found.asker, ids, found.documents, found.rules).documents]


@pytest.fixture
def desk(store: Store, tmp_path: Path) -> Desk:
    directory = tmp_path / "documents"
    directory.mkdir()
    return Desk(store, directory)


# ---- what is there


def test_what_was_added_changed_removed_and_left(desk: Desk) -> None:
    desk.put("a.md")
    desk.put("hr/b.md")
    desk.put("c.md")
    first = desk.ingest()
    assert (first.added, first.changed, first.removed, first.unchanged) == (
        ("docs:a.md", "docs:c.md", "docs:hr/b.md"), (), (), 0,
    )  # fmt: skip
    desk.put("a.md", "other\n")
    (desk.directory / "c.md").unlink()
    desk.put("d.md")
    second = desk.ingest()
    assert (second.added, second.changed, second.removed, second.unchanged) == (
        ("docs:d.md",), ("docs:a.md",), ("docs:c.md",), 1,
    )  # fmt: skip
    third = desk.ingest()
    assert (third.added, third.changed, third.removed, third.unchanged) == ((), (), (), 3)
    assert third.digest == second.digest != first.digest


def test_a_document_is_stored_with_size_digest_and_where_it_is(desk: Desk) -> None:
    desk.put("hr/a.md", "text")
    desk.ingest()
    [one] = desk.store.snapshot("acme", ANN, ["docs:hr/a.md"]).documents.values()
    digest = "sha256:" + hashlib.sha256(b"text").hexdigest()
    assert (one.root, one.path, one.size, one.digest) == (str(desk.directory), b"hr/a.md", 4, digest)


@pytest.mark.parametrize(
    ("path", "id"),
    [(b"new\nline", "docs:new%0Aline"), (b"caf\xe9", "docs:caf%E9"), (b"x" * 255, "docs:" + "x" * 255),
     (b"-rf", "docs:-rf"), (b"a b", "docs:a%20b"), (b"%41", "docs:%2541"), (b"\x1b[2J", "docs:%1B%5B2J")],
)  # fmt: skip
def test_names_of_any_bytes_have_one_identifier(desk: Desk, path: bytes, id: str) -> None:
    desk.put(path)
    assert desk.ingest().added == (id,)
    assert desk.store.snapshot("acme", ANN, [id]).documents[id].path == path


def test_what_is_no_document_is_told_with_why(desk: Desk, tmp_path: Path) -> None:
    desk.put("plain")
    (tmp_path / "secret").write_text("x")
    (desk.directory / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(desk.directory / "fifo")
    desk.put("/".join(["\x01" * 90] * 8))  # fits a path; spelled %01 it has more than 2048 characters
    deep = desk.put("/".join("x" * 3 for _ in range(40)))
    done = desk.ingest(bounds=Bounds(depth=20, path=4000))
    assert done.added == ("docs:plain",)
    told = dict(done.skipped)
    assert any("takes more than 2048 characters" in why for why in told.values())
    assert told["link"] == "a symbolic link"
    assert told["fifo"] == "not a regular file"
    assert "too deep" in told.values()
    assert deep.exists()
    assert not any("secret" in id for id in desk.store.stored("acme", "docs"))


def test_a_document_that_cannot_be_read_any_more_is_stored_no_more(desk: Desk, tmp_path: Path) -> None:
    file = desk.put("a.md", OURS)
    desk.ingest()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    done = desk.ingest()
    assert (done.removed, done.skipped) == (("docs:a.md",), (("a.md", "a symbolic link"),))
    assert dict(desk.store.snapshot("acme", ANN, ["docs:a.md"]).documents) == {}


# ---- who may read it


def test_nobody_may_read_what_nothing_is_said_of(desk: Desk) -> None:
    desk.put("a.md")
    done = desk.ingest()
    assert [id for id, _ in done.unreadable] == ["docs:a.md"]
    assert desk.readable(ANN) == []


def test_front_matter_counts_only_where_it_is_believed(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.put("plain.md")
    desk.ingest()
    assert desk.readable(ANN) == []
    desk.trust(front_matter=True)
    assert (desk.readable(ANN), desk.readable(BEN)) == (["a.md"], [])
    desk.trust(read=frozenset({STAFF}), clearance="public")
    assert (desk.readable(ANN), desk.readable(BEN)) == (["a.md", "plain.md"], ["plain.md"])
    desk.trust(front_matter=False)
    assert desk.readable(BEN) == ["a.md", "plain.md"]  # a document that is not believed is not heard


def test_front_matter_that_is_broken_is_nobody_s_and_told(desk: Desk) -> None:
    desk.put("bad.md", "---\nacl: {read: everybody}\n---\n")
    desk.put("good.md", OURS)
    desk.ingest()
    desk.trust(front_matter=True, read=frozenset({STAFF}), clearance="public")
    done = desk.ingest()
    [(id, why)] = done.unreadable
    assert id == "docs:bad.md"
    assert why.startswith("line 2: acl.read")
    assert desk.readable(ANN) == ["good.md"]


RULES = "documents:\n  hr/**: {read: [group:okta:research], clearance: public}\n"


def test_an_access_list_says_who_may_read(desk: Desk) -> None:
    desk.put("hr/a.md")
    desk.put("b.md")
    desk.ingest(rules=RULES)
    assert (desk.readable(ANN), desk.readable(BEN)) == ([], ["hr/a.md"])


def test_list_and_front_matter_that_differ_are_nobody_s(desk: Desk) -> None:
    desk.put("hr/a.md", OURS)
    desk.ingest(rules=RULES)
    assert desk.readable(BEN) == ["hr/a.md"]
    desk.trust(front_matter=True)
    assert (desk.readable(ANN), desk.readable(BEN)) == ([], [])
    desk.trust(front_matter=False)
    assert desk.readable(BEN) == ["hr/a.md"]  # what the list said was not forgotten


def test_a_source_that_had_a_list_is_not_ingested_without_one_by_mistake(desk: Desk) -> None:
    desk.put("hr/a.md")
    desk.ingest(rules=RULES)
    desk.trust(read=frozenset({STAFF}), clearance="public")
    assert desk.readable(ANN) == []
    with pytest.raises(Refused, match=r"give it again \(--acl FILE\)"):
        desk.ingest()
    assert desk.readable(ANN) == []
    desk.ingest(without_list=True)
    assert desk.readable(ANN) == ["hr/a.md"]
    desk.ingest()  # and now it has none


def test_rules_that_match_nothing_are_warned_of(desk: Desk) -> None:
    desk.put("b.md")
    [warning] = desk.ingest(rules=RULES).warnings
    assert warning == "line 2 of the access list matches nothing: hr/**"


# ---- trust that is said before there is something to trust, or with it


def test_a_source_may_be_believed_before_it_is_ingested(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.trust(front_matter=True)
    [source] = desk.store.sources("acme")
    assert (source.directory, source.ingested_at, source.trust.front_matter) == ("", None, True)
    assert desk.ingest(source="other", directory=str(desk.directory)).added  # it has no files to share
    desk.to.drop_source(OPERATOR, "acme", "other")
    done = desk.ingest()
    assert (done.unreadable, done.unbelieved, done.trust_set, desk.readable(ANN)) == ((), 0, False, ["a.md"])
    [source] = desk.store.sources("acme")
    assert source.directory == str(desk.directory)
    with pytest.raises(Refused, match="is not the one of source docs"):
        desk.ingest(directory=str(desk.directory.parent))


def test_a_source_that_is_only_spoken_of_is_not_an_editor_s_to_make(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.to.set_member(OPERATOR, "acme", "user:okta:ann", Role.ADMIN, "secret")
    with pytest.raises(Unfit, match="there is no source 'docs'"):
        desk.to.set_trust(ANN, "acme", "docs", front_matter=True)
    desk.trust(front_matter=True)
    monkeypatch.chdir(desk.directory)
    for directory in ("", ".", str(desk.directory)):
        with pytest.raises(Refused, match="is for who administers the machine"):
            desk.ingest(actor=ANN, directory=directory)
    assert desk.store.sources("acme")[0].directory == ""
    desk.to.set_trust(ANN, "acme", "docs", clearance="internal")  # what is there may be changed


def test_an_ingest_sets_trust_in_one_transaction_and_one_record(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.put("plain.md")
    wanted = desk.to.wanted(True, frozenset({STAFF}), None, None, "public")
    done = desk.ingest(trust=wanted)
    assert (done.unreadable, done.trust_set, desk.store.generation("acme")) == ((), True, 2)
    assert (desk.readable(ANN), desk.readable(BEN)) == (["a.md", "plain.md"], ["plain.md"])
    [(_, event, fields)] = desk.journal.records
    assert event == "documents-ingested"
    assert {name: value for name, value in fields.items() if name.removesuffix("_before") in TRUST} == {
        "front_matter": True, "front_matter_before": False,
        "read": '["group:okta:staff"]', "read_before": "[]",
        "deny": "[]", "deny_before": "[]", "groups": "[]", "groups_before": "[]",
        "clearance": "public", "clearance_before": "",
    }  # fmt: skip
    assert len(fields) <= 24  # of a message
    assert desk.ingest(trust=wanted).trust_set is False
    assert not TRUST & desk.journal.records[-1][2].keys()


TRUST = {"front_matter", "read", "deny", "groups", "clearance"}


def test_what_is_refused_or_only_tried_sets_no_trust(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.ingest()
    wanted = desk.to.wanted(front_matter=True)
    assert desk.ingest(trust=wanted, dry_run=True).unreadable == ()
    desk.journal.broken = True
    with pytest.raises(Refused, match="egressd is not running"):
        desk.ingest(trust=wanted)
    desk.journal.broken = False
    assert (desk.readable(ANN), desk.store.sources("acme")[0].trust.front_matter) == ([], False)


def test_an_ingest_s_trust_needs_the_right_to_set_it(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.ingest()
    for role, level, wanted, why in (
        (Role.EDITOR, "secret", desk.to.wanted(front_matter=True), "an editor may not do that"),
        (Role.EDITOR, "secret", desk.to.wanted(front_matter=False), "an editor may not do that"),  # it is off
        (
            Role.ADMIN,
            "internal",
            desk.to.wanted(clearance="secret"),
            "only somebody who is cleared for secret",
        ),
    ):
        desk.to.set_member(OPERATOR, "acme", STAFF, role, level)
        before = desk.store.generation("acme")
        with pytest.raises(Refused, match=why) as refused:
            desk.ingest(actor=ANN, trust=wanted)
        assert (refused.value.reason, desk.store.generation("acme")) == (Reason.MEMBER, before)
    assert desk.ingest(actor=ANN, trust=desk.to.wanted(front_matter=True)).trust_set
    assert desk.readable(ANN) == ["a.md"]


def test_documents_that_speak_and_are_not_heard_are_counted(desk: Desk) -> None:
    desk.put("a.md", OURS)
    desk.put("title.md", "---\ntitle: says nothing of who may read it\n---\n")
    desk.put("plain.md")
    assert desk.ingest().unbelieved == 1
    desk.trust(read=frozenset({STAFF}), clearance="public")
    assert desk.ingest().unbelieved == 1  # and everybody may read it now, which it does not say
    listed = "documents:\n  '**': {read: [group:okta:staff], clearance: public}\n"
    assert desk.ingest(rules=listed).unbelieved == 0  # its source system has said it
    assert desk.ingest(without_list=True, trust=desk.to.wanted(front_matter=False)).unbelieved == 0
    assert desk.ingest(trust=desk.to.wanted(front_matter=True)).unbelieved == 0


# ---- record, then store; all or nothing


def test_it_is_on_record_with_what_it_changed(desk: Desk) -> None:
    desk.put("a.md")
    done = desk.ingest(rules=RULES)
    assert desk.journal.records == [("acme", "documents-ingested", {
        "source": "docs", "directory": str(desk.directory), "added": 1, "changed": 0, "removed": 0,
        "unchanged": 0, "unreadable": 1, "skipped": 0, "digest": done.digest,
        "access_list": hashlib.sha256(RULES.encode()).hexdigest(), "by": "uid 0 (root)", "generation": 2,
    })]  # fmt: skip
    assert desk.store.generation("acme") == 2


def test_what_cannot_be_recorded_is_not_stored(desk: Desk) -> None:
    desk.put("a.md")
    desk.journal.broken = True
    with pytest.raises(Refused, match="egressd is not running"):
        desk.ingest()
    assert (desk.store.sources("acme"), desk.store.generation("acme")) == ((), 1)


def test_a_dry_run_says_the_same_and_changes_nothing(desk: Desk) -> None:
    desk.put("a.md", OURS)
    dry = desk.ingest(dry_run=True)
    assert (desk.store.sources("acme"), desk.store.generation("acme"), desk.journal.records) == ((), 1, [])
    wet = desk.ingest()
    assert (dry.added, dry.digest, dry.unreadable) == (wet.added, wet.digest, wet.unreadable)
    assert (dry.dry_run, wet.dry_run) == (True, False)


def test_ctrl_c_leaves_the_store_as_it_was(desk: Desk) -> None:
    for i in range(20):
        desk.put(f"{i}.md")
    desk.ingest()
    before = desk.store.stored("acme", "docs")
    desk.put("3.md", "other")

    def interrupt(files: int, _octets: int) -> None:
        if files == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.ingest(progress=interrupt)
    assert desk.store.stored("acme", "docs") == before
    assert desk.store.generation("acme") == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from store_world import OPERATOR, administered
from egressd.broker.store.ingest import ingest
from egressd.broker.store.store import Store
store = Store.open(sys.argv[1])
to, journal = administered(store)
def record(workspace, event, fields):
    os.kill(os.getpid(), signal.SIGKILL)  # everything is written by now, and nothing committed
to._record = record
ingest(to, OPERATOR, "acme", "docs", sys.argv[2])
"""


def test_killed_in_the_middle_of_it_the_old_state_stays(desk: Desk, url: str) -> None:
    desk.put("a.md", OURS)
    desk.ingest()
    desk.trust(front_matter=True)
    before = desk.store.stored("acme", "docs")
    desk.put("a.md", OURS.replace("finance", "research"))
    desk.put("b.md")
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, url, str(desk.directory), here], check=False)
    assert done.returncode == -signal.SIGKILL
    assert desk.store.stored("acme", "docs") == before
    assert desk.readable(ANN) == ["a.md"]
    assert desk.store.generation("acme") == 3
    # and the next one is not kept waiting by locks of the dead; PostgreSQL notices in its own time
    assert desk.ingest().added == ("docs:b.md",)
    assert desk.store.generation("acme") == 4


# ---- quick


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written an hour ago."""
    import egressd.broker.store.ingest as module

    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setitem(module.survey.__kwdefaults__, "now_ns", lambda: later)


def test_quick_reads_only_what_was_touched(desk: Desk, settled: None) -> None:
    desk.put("a.md", "aaaa")
    desk.put("b.md", "bb")
    assert desk.ingest().octets == 6
    assert desk.ingest(quick=True).octets == 0
    assert desk.ingest().octets == 6  # it is read again unless one says otherwise
    desk.put("b.md", "BB")
    done = desk.ingest(quick=True)
    assert (done.octets, done.changed, done.unchanged) == (2, ("docs:b.md",), 1)


def test_quick_is_not_taken_in_by_a_time_that_was_set_back(desk: Desk, settled: None) -> None:
    file = desk.put("a.md", "aaaa")
    before = file.stat()
    desk.ingest()
    file.write_text("bbbb")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert desk.ingest(quick=True).changed == ("docs:a.md",)


def test_quick_reads_again_what_was_written_a_moment_before_it_was_read(desk: Desk) -> None:
    desk.put("a.md", "aaaa")
    desk.ingest()
    assert desk.ingest(quick=True).octets == 4


def test_quick_hears_a_new_access_list(desk: Desk, settled: None) -> None:
    desk.put("hr/a.md")
    desk.ingest()
    done = desk.ingest(quick=True, rules=RULES)
    assert (done.octets, done.changed) == (0, ("docs:hr/a.md",))
    assert desk.readable(BEN) == ["hr/a.md"]


# ---- directories


def test_a_directory_that_is_a_link_or_lies_behind_one_is_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(desk.directory)
    (desk.directory / "below").mkdir()
    for path in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(Refused, match="symbolic link, which may lead elsewhere tomorrow: name /"):
            desk.ingest(directory=str(path))


@pytest.mark.parametrize("which", ["itself", "above"])
def test_a_directory_that_everybody_may_write_to_is_refused(desk: Desk, which: str) -> None:
    (desk.directory / "below").mkdir()
    (desk.directory if which == "above" else desk.directory / "below").chmod(0o777)
    with pytest.raises(Refused, match=r"everybody may write to .*: chmod o-w") as refused:
        desk.ingest(directory=str(desk.directory / "below"))
    assert refused.value.reason is Reason.FILES


def test_one_that_its_group_may_write_to_is_warned_of(desk: Desk) -> None:
    desk.directory.chmod(0o775)
    assert ["the group of" in warning for warning in desk.ingest().warnings] == [True]


def test_what_is_no_directory_is_refused(desk: Desk) -> None:
    file = desk.put("a.md")
    for path, why in ((file, "is no directory"), (desk.directory / "nope", "No such file")):
        with pytest.raises(Refused, match=why):
            desk.ingest(directory=str(path))


@pytest.mark.parametrize("place", ["/usr/share", "/etc", "/"])
def test_what_every_sandbox_sees_is_no_source(desk: Desk, place: str) -> None:
    with pytest.raises(Refused, match="is seen by every sandbox"):
        desk.ingest(directory=place)


def test_no_file_has_two_sources(desk: Desk) -> None:
    (desk.directory / "below").mkdir()
    (desk.directory.parent / "documents-too").mkdir()
    desk.ingest(directory=str(desk.directory / "below"))
    for path in (desk.directory, desk.directory / "below"):
        with pytest.raises(Refused, match="hold the same files"):
            desk.ingest(source="other", directory=str(path))
    desk.ingest(source="other", directory=str(desk.directory.parent / "documents-too"))
    with pytest.raises(Refused, match="is not the one of source docs"):
        desk.ingest(directory=str(desk.directory))


@pytest.mark.parametrize("source", ["", "Docs", "a:b", "a/b", "-a", "a" * 40, "\u00e4"])
def test_a_source_s_name_is_a_plain_one(desk: Desk, source: str) -> None:
    with pytest.raises(Unfit, match="is not a source's name"):
        desk.ingest(source=source)


# ---- who may


def test_an_editor_ingests_again_what_an_operator_has_named(desk: Desk, tmp_path: Path) -> None:
    desk.put("a.md")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(Refused) as refused:
        desk.ingest(actor=ANN)
    assert refused.value.reason is Reason.MEMBER  # a viewer
    desk.to.set_member(OPERATOR, "acme", "user:okta:ann", Role.EDITOR)
    for options in ({}, {"directory": str(elsewhere)}, {"source": "other"}):
        with pytest.raises(Refused, match="is for who administers the machine"):
            desk.ingest(actor=ANN, **options)
    desk.ingest()
    desk.put("b.md")
    assert desk.ingest(actor=ANN).added == ("docs:b.md",)
    with pytest.raises(Refused, match="is for who administers the machine"):
        desk.ingest(actor=ANN, directory=str(elsewhere))
    assert desk.journal.records[-1][2]["by"] == "user:okta:ann"


def test_a_stranger_s_ingest_reads_nothing(desk: Desk) -> None:
    desk.put("a.md")
    desk.ingest()
    seen: list[int] = []
    with pytest.raises(Refused, match="there is no such workspace"):
        desk.ingest(actor=Identity("okta", "eve"), progress=lambda files, _: seen.append(files))
    assert seen == []


# ---- many


def test_two_ingests_at_once_leave_one_of_the_two_states(desk: Desk, url: str) -> None:
    import threading

    for i in range(30):
        desk.put(f"{i}.md", OURS)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Store.open(url) as mine:
                to, _ = administered(mine)
                ingest(to, OPERATOR, "acme", "docs", str(desk.directory))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(desk.store.stored("acme", "docs")) == 30
    assert desk.store.generation("acme") == 3


def test_finance_and_research_are_told_apart_to_the_end(desk: Desk) -> None:
    desk.put("f.md", OURS)
    desk.put("r.md", OURS.replace("finance", "research"))
    desk.put("both.md", OURS.replace("[group:okta:finance]", f"[{FINANCE}, {RESEARCH}]"))
    desk.ingest()
    desk.trust(front_matter=True)
    assert (desk.readable(ANN), desk.readable(BEN)) == (["both.md", "f.md"], ["both.md", "r.md"])
    desk.to.add_barrier(OPERATOR, "acme", FINANCE, RESEARCH)
    assert (desk.readable(ANN), desk.readable(BEN)) == (["f.md"], ["r.md"])
