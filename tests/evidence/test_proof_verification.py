"""A proof holds as it was made, and in no other form: not one byte of it can be changed unseen."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scene
from egressd.journal import merkle, notes
from egressd.journal.keys import PrivateKey
from egressd.journal.notes import Checkpoint
from egressd.journal.statement import Attestation, Scope
from egressd.journal.summary import LATE
from egressd.journal.verification import LIMITS, REPORT_DATA, Report, Verdict, verify
from egressd.processes import journal_reader
from egressd.processes.prover import Asked, CannotProve, prove
from egressd.ruleset import build

Document = dict[str, Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> scene.Story:
    return scene.usual(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def proof(story: scene.Story) -> bytes:
    return story.proof()


@pytest.fixture(scope="module")
def later(story: scene.Story) -> bytes:
    """One whose window begins at the second snapshot."""
    return story.proof(since=scene.at(5))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    story = scene.Story(tmp_path_factory.mktemp("small"))
    story.denied(7)
    return story.proof()


def breaks(report: Report) -> list[str]:
    return [check.name for check in report.broken]


def places(report: Report) -> list[str]:
    return [check.place for check in report.broken]


# ---- as it was made


def test_it_holds(story: scene.Story, proof: bytes) -> None:
    report = verify(proof, key=story.key.public, policy_digest=scene.policy_of("acme").digest)
    assert report.verified
    assert report.pinned
    assert report.signers == (story.key.public.fingerprint,)
    assert {check.name for check in report.checks} >= {
        "file",
        "signature",
        "key",
        "end-checkpoint",
        "inclusion",
        "scope",
        "window",
        "policy",
        "ruleset",
        "summary",
        "sandboxes",
        "books",
        "losses",
    }
    assert not report.notes


def test_it_always_says_what_it_cannot_claim(proof: bytes) -> None:
    assert any("over this link" in limit for limit in verify(proof).limits)
    assert any("allowed host can be told anything" in limit for limit in LIMITS)


def test_without_a_key_that_is_said_and_no_more_is_claimed(proof: bytes, story: scene.Story) -> None:
    report = verify(proof)
    assert report.verified
    assert not report.pinned
    (note,) = report.notes
    assert note.name == "key"
    assert story.key.public.fingerprint in note.text


def test_a_window_is_consistent_with_what_came_before(later: bytes, story: scene.Story) -> None:
    report = verify(later, key=story.key.public)
    assert report.verified
    assert "consistency" in {check.name for check in report.checks}


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b'{"payload":""}', b"\x00" * 64])
def test_what_is_no_proof_is_none(text: bytes) -> None:
    report = verify(text)
    assert breaks(report) == ["file"]
    assert report.statement is None
    assert not report.verified


# ---- not one byte


def test_every_byte_of_a_small_proof_counts(small: bytes) -> None:
    for at in range(len(small)):
        changed = bytearray(small)
        changed[at] ^= 0x01
        assert not verify(bytes(changed)).verified, f"byte {at}"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_byte_can_be_changed_added_or_taken(small: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(small) - 1))
    byte = data.draw(st.integers(0, 255))
    how = data.draw(st.sampled_from(["change", "insert", "delete", "cut", "swap"]))
    changed = {
        "change": small[:at] + bytes([byte]) + small[at + 1 :],
        "insert": small[:at] + bytes([byte]) + small[at:],
        "delete": small[:at] + small[at + 1 :],
        "cut": small[:at],
        "swap": small[:at] + small[at : at + 2][::-1] + small[at + 2 :],
    }[how]
    assert verify(changed).verified == (changed == small)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.rstrip("\n"),
        lambda text: text.replace('","', '", "', 1),
        lambda text: text.replace('{"payload"', '{"payload":"","payload"', 1),
        lambda text: text.replace('"payloadType"', '"payloadTyp\\u0065"', 1),
        lambda text: text.replace('{"payload"', '{"more":1,"payload"', 1),
        lambda text: json.dumps(json.loads(text), indent=1),
        lambda text: text.replace('"signatures":[', '"signatures":[{"keyid":"x","sig":"AAAA"},', 1),
    ],
)
def test_where_no_signature_reaches_the_spelling_is_held(change: Callable[[str], str], small: bytes) -> None:
    """Blanks, repeated and unknown members, other escapes: others read the same, we say it was changed."""
    assert not verify(change(small.decode()).encode()).verified


# ---- changed, and signed again with the right key: each claim is checked for itself


def _records(found: Document) -> Document:
    records: Document = found["predicate"]["journal"]["records"]
    return records


def _fewer_bytes(found: Document) -> None:
    found["predicate"]["summary"]["hosts"][1]["counted"]["out_bytes"] -= 100


def _another_number(found: Document) -> None:
    line = next(line for line in _records(found)["lines"] if '"event":"flow"' in line)
    changed = line.replace('"out_bytes":500', '"out_bytes":200')
    assert changed != line
    _records(found)["lines"][_records(found)["lines"].index(line)] = changed


def _another_number_marked(found: Document) -> None:
    _another_number(found)
    scene.recounted(found)


def _dropped(found: Document) -> None:
    at = next(n for n, line in enumerate(_records(found)["lines"]) if '"event":"flow"' in line)
    del _records(found)["lines"][at], _records(found)["indices"][at]
    scene.recounted(found)


def _swapped(found: Document) -> None:
    texts = _records(found)["lines"]
    texts[4], texts[5] = texts[5], texts[4]
    scene.recounted(found)


def _renumbered(found: Document) -> None:
    indices = _records(found)["indices"]
    indices[4], indices[5] = indices[5], indices[4]


def _no_line(found: Document) -> None:
    _records(found)["lines"][3] = _records(found)["lines"][3].replace('"event"', '"Event"')


def _policy_text(found: Document) -> None:
    policy = found["predicate"]["policy"]
    policy["text"] = policy["text"].replace("eu.api.openai.com", "tracker.example")


def _other_policy(found: Document) -> None:
    _policy_text(found)
    policy = found["predicate"]["policy"]
    policy["digest"] = f"sha256:{hashlib.sha256(policy['text'].encode()).hexdigest()}"


def _ruleset(found: Document) -> None:
    found["predicate"]["ruleset"]["text"] += "table ip leak {\n}\n"


def _drift(found: Document) -> None:
    found["predicate"]["ruleset"]["drift"] = ["map acme_out4: an element more"]


def _unknown_field(found: Document) -> None:
    found["predicate"]["remark"] = "all is well"


def _other_type(found: Document) -> None:
    found["predicateType"] = "https://slsa.dev/provenance/v1"


def _other_subject(found: Document) -> None:
    found["subject"][0]["digest"]["sha256"] = "00" * 32


def _narrower(found: Document) -> None:
    found["predicate"]["window"]["first"] += 6


def _other_time(found: Document) -> None:
    found["predicate"]["window"]["since"] = scene.at(7 * 24 * 3600)
    found["predicate"]["window"]["until"] = scene.at(8 * 24 * 3600)


def _other_hash(found: Document) -> None:
    hashes = _records(found)["hashes"]
    hashes[0] = base64.b64encode(b"\0" * 32).decode()


def _one_hash_more(found: Document) -> None:
    _records(found)["hashes"].append(base64.b64encode(b"\0" * 32).decode())


def _other_scope(found: Document) -> None:
    found["predicate"]["scope"]["workspace"] = "rival"


def _no_keys(found: Document) -> None:
    found["predicate"]["journal"]["keys"] = []


def _old_end(found: Document) -> None:
    journal = found["predicate"]["journal"]
    journal["end"] = journal["start"]


def _other_start(found: Document) -> None:
    journal = found["predicate"]["journal"]
    forger = PrivateKey.generate()
    journal["start"] = notes.sign(Checkpoint(journal["origin"], 3, b"\0" * 32), journal["origin"], [forger])


def _other_consistency(found: Document) -> None:
    found["predicate"]["journal"]["consistency"][0] = base64.b64encode(b"\0" * 32).decode()


@pytest.mark.parametrize(
    ("change", "check", "place"),
    [
        (_fewer_bytes, "summary", "predicate.summary.hosts[1].counted.out_bytes"),
        (_another_number, "inclusion", "predicate.journal.records.lines["),
        (_another_number_marked, "inclusion", "predicate.journal.records.hashes"),
        (_dropped, "inclusion", "predicate.journal.records.hashes"),
        (_swapped, "records", "predicate.journal.records.lines[4]"),
        (_renumbered, "records", "predicate.journal.records.lines[4]"),
        (_no_line, "records", "predicate.journal.records.lines[3]"),
        (_other_hash, "inclusion", "predicate.journal.records.hashes"),
        (_one_hash_more, "inclusion", "predicate.journal.records.hashes"),
        (_policy_text, "policy", "predicate.policy.text"),
        (_other_policy, "statement", "subject"),
        (_ruleset, "ruleset", "predicate.ruleset.text"),
        (_drift, "ruleset", "predicate.ruleset.drift[0]"),
        (_unknown_field, "statement", "$.predicate"),
        (_other_type, "statement", "predicateType"),
        (_other_subject, "statement", "subject"),
        (_narrower, "window", "predicate.window"),
        (_other_time, "window", "predicate.window"),
        (_other_scope, "scope", "predicate.journal.records.lines["),
        (_no_keys, "keys", "predicate.journal.keys"),
        (_old_end, "window", "predicate.window"),
        (_old_end, "inclusion", "predicate.journal.records.hashes"),
        (_other_start, "start-checkpoint", "predicate.journal.start"),
        (_other_consistency, "consistency", "predicate.journal.consistency"),
    ],
)
def test_a_changed_statement_breaks_where_it_was_changed(
    change: Callable[[Document], None], check: str, place: str, story: scene.Story, later: bytes
) -> None:
    report = verify(scene.altered(later, change, story.key), key=story.key.public)
    assert not report.verified
    assert check in breaks(report)
    assert any(each.startswith(place) for each in places(report) if each), places(report)


def test_nothing_changed_and_signed_again_holds(later: bytes, story: scene.Story) -> None:
    """So that the table above fails for what it changes, and not for how."""
    assert verify(scene.altered(later, scene.recounted, story.key), key=story.key.public).verified


def test_a_record_of_another_workspace_does_not_belong(story: scene.Story) -> None:
    """Its place in the tree is genuine, and its summary is recounted; only it is not ours to show."""

    def disguise(found: Document) -> None:
        own = msgspec_policy()
        found["predicate"]["scope"]["workspace"] = "acme"
        found["predicate"]["policy"] = own
        found["subject"][1] = {
            "name": "policy of acme",
            "digest": {"sha256": own["digest"].removeprefix("sha256:")},
        }

    report = verify(scene.altered(story.proof(workspace="rival"), disguise, story.key))
    assert breaks(report) == ["scope"]


def msgspec_policy() -> Document:
    facts = scene.facts_of("acme").policy
    return {"digest": facts.digest, "text": facts.text, "guard": facts.guard}


def test_another_policy_than_the_readers_is_told(proof: bytes) -> None:
    report = verify(proof, policy_digest=scene.policy_of("rival").digest)
    assert breaks(report) == ["policy"]


# ---- keys


def test_another_key_than_the_readers_is_told(proof: bytes) -> None:
    report = verify(proof, key=PrivateKey.generate().public)
    assert breaks(report) == ["key"]
    assert not report.pinned


def test_signed_by_somebody_else(proof: bytes) -> None:
    report = verify(scene.altered(proof, lambda found: None, PrivateKey.generate()))
    assert "signature" in breaks(report)
    assert "signatures[0].keyid" in places(report)


def test_a_log_of_the_forgers_own_holds_and_is_not_the_machines(tmp_path: Path, story: scene.Story) -> None:
    """Everything of it is consistent. Only the reader's own knowledge of the key tells it apart."""
    forged = scene.usual(tmp_path)
    assert verify(forged.proof()).verified
    assert breaks(verify(forged.proof(), key=story.key.public)) == ["key"]


def test_the_older_key_vouches_for_the_newer(tmp_path: Path) -> None:
    story = scene.usual(tmp_path)
    old = story.key
    story.rotate()
    story.sandbox(11)
    story.snapshot(openai=11, unlisted=4)
    found = story.proof()
    assert story.key.public != old.public
    for key in (old, story.key):
        report = verify(found, key=key.public)
        assert report.verified, breaks(report)
        assert report.pinned
    assert breaks(verify(found, key=PrivateKey.generate().public)) == ["key"]


def test_a_key_that_no_older_one_named_is_not_vouched_for(tmp_path: Path) -> None:
    """Who has a key of his own can put it into the list, and add his signature to the checkpoints: the older
    key has still never signed a journal that names it."""
    story = scene.usual(tmp_path)
    forger = PrivateKey.generate()

    def adopt(found: Document) -> None:
        journal = found["predicate"]["journal"]
        origin = journal["origin"]
        journal["keys"].append(forger.public.verifier(origin))
        end = notes.open(journal["end"], journal["keys"])
        mine = notes.signatures(notes.sign(end, origin, [forger]))[1]
        journal["end"] = notes.cosigned(journal["end"], mine)
        journal["rotations"] = [{"note": journal["end"], "consistency": []}]

    report = verify(scene.altered(story.proof(), adopt, forger), key=story.key.public)
    assert breaks(report) == ["key"]
    assert not report.pinned


# ---- attestation


def _report(data: bytes, *, length: int = 0x4A0) -> str:
    report = bytearray(length)
    report[REPORT_DATA] = data.ljust(64, b"\0")
    return base64.b64encode(bytes(report[:length])).decode()


@pytest.mark.parametrize(
    ("digest", "length", "verdict"),
    [
        (hashlib.sha512, 0x4A0, Verdict.NOTE),
        (hashlib.sha256, 0x4A0, Verdict.NOTE),
        (hashlib.sha384, 0x4A0, Verdict.BROKEN),
        (hashlib.sha512, 0x90, Verdict.BROKEN),  # cut short
    ],
)
def test_an_attestation_names_the_key(
    digest: Callable[..., Any], length: int, verdict: Verdict, story: scene.Story
) -> None:
    report = _report(digest(story.key.public.raw).digest(), length=length)
    found = verify(story.proof(attestation=Attestation("sev-snp", report)))
    assert [check.verdict for check in found.checks if check.name == "attestation"] == [verdict]


def test_an_attestation_of_another_key_does_not_count(story: scene.Story) -> None:
    other = _report(hashlib.sha512(PrivateKey.generate().public.raw).digest())
    assert breaks(verify(story.proof(attestation=Attestation("sev-snp", other)))) == ["attestation"]


def test_a_report_beside_the_journal_goes_into_the_proof(tmp_path: Path, story: scene.Story) -> None:
    place = tmp_path / "attestation.sev-snp"
    place.write_bytes(base64.b64decode(_report(hashlib.sha512(story.key.public.raw).digest())))
    asked = Asked(story.directory, Scope("acme", None), None, None, story.checkpoint(), attestation=place)
    found = verify(scene.sealed(prove(asked, scene.facts_of()), story.key))
    assert found.verified
    assert [check.verdict for check in found.checks if check.name == "attestation"] == [Verdict.NOTE]

    place.write_bytes(b"\0" * 70_000)
    with pytest.raises(CannotProve, match="no attestation report"):
        prove(asked, scene.facts_of())


def test_one_of_an_unknown_kind_is_carried_along_unchecked(story: scene.Story) -> None:
    found = verify(story.proof(attestation=Attestation("tdx", "AAAA")))
    assert found.verified
    assert "it is not checked" in next(c.text for c in found.notes if c.name == "attestation")


# ---- what an operator, who has the key, may say and not say


@pytest.mark.parametrize(
    ("since", "until"),
    [
        ("2020-01-01T00:00:00.000000Z", None),  # it begins later
        ("", None),
        ("yesterday", None),
        (None, "2026-09-21"),
        (None, "2026-09-21T11:59:59.000000Z"),
    ],
)  # fmt: skip
def test_a_window_claims_no_more_than_its_records(
    story: scene.Story, later: bytes, since: str | None, until: str | None
) -> None:
    def longer(found: Document) -> None:
        window = found["predicate"]["window"]
        window["since"], window["until"] = since or window["since"], until or window["until"]
        if since == "":
            window["since"] = ""

    assert breaks(verify(scene.altered(later, longer, story.key))) == ["window"]


def remarks(report: Report) -> list[tuple[str, str]]:
    assert report.verified, report.broken
    return [(check.name, check.text) for check in report.notes if check.name != "key"]


def test_a_guard_that_was_off_for_a_while_is_told(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.snapshot()
    story.tell("snapshot", workspace="acme", snapshot="x", epoch=scene.EPOCH, rows=0, guard="off")
    story.snapshot(openai=3)
    report = verify(story.proof())
    [(_, text)] = [found for found in remarks(report) if found[0] == "guard"]
    assert "was off too, by 1 records" in text and "let through meanwhile" in text


def test_a_policy_that_no_change_explains_is_told(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.tell("sandbox-opening", workspace="acme", link="eg7", policy="sha256:another", guard="enforce")
    [(_, text)] = [found for found in remarks(verify(story.proof())) if found[0] == "policy-changes"]
    assert "under another policy (sha256:another)" in text
    digest = scene.policy_of("acme").digest
    story.tell("policy-changed", workspace="acme", policy=digest, policy_before="sha256:another", by="uid 0")
    assert all("under another" not in text for _, text in remarks(verify(story.proof())))


@pytest.mark.parametrize("event", ["journal-truncated", "drift", "tampered", "clock-stepped", "log-ended"])
def test_alarms_are_told(tmp_path: Path, event: str) -> None:
    story = scene.Story(tmp_path)
    workspace = {"workspace": "acme"} if event in ("drift", "tampered") else {}
    number = story.tell(event, process="auditor", **workspace)
    [(_, text)] = [found for found in remarks(verify(story.proof())) if found[0] == "alarms"]
    assert f"1 {event}" in text and f"record {number}," in text


def test_time_that_goes_back_is_told(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.denied(7)
    story.tell("process-started", process="supervisor", name="relay", after=500)
    story.tell("process-started", process="supervisor", name="relay", after=-400)
    [(_, text)] = [found for found in remarks(verify(story.proof())) if "Time goes back" in found[1]]
    assert scene.at(501) in text and scene.at(101) in text


def test_packets_of_a_sandbox_that_is_left_out_are_told(tmp_path: Path) -> None:
    story = scene.usual(tmp_path)
    proof = story.proof()
    assert not remarks(verify(proof))

    def hidden(found: Document) -> None:
        """Every record of eg9, as if there had been none."""
        records = found["predicate"]["journal"]["records"]
        kept = [n for n, line in enumerate(records["lines"]) if '"link":"eg9"' not in line]
        for name in ("lines", "indices"):
            records[name] = [records[name][n] for n in kept]
        hashes = merkle.included(story.leaves(), records["indices"])
        records["hashes"] = [base64.b64encode(each).decode() for each in hashes]
        scene.recounted(found)

    [(name, text)] = remarks(verify(scene.altered(proof, hidden, story.key)))
    assert name == "sandboxes" and text.startswith("5 packets (500 bytes, in) were counted that are of no")


def test_a_window_shorter_than_was_asked_for_is_told(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.denied(7)
    found = remarks(verify(story.proof(since="2026-08-21T12:00:00.000000Z")))
    [text] = [text for name, text in found if name == "window"]
    assert text.startswith("It was asked for from 2026-08-21T12:00:00.000000Z on, and begins only at")


# ---- what the reader has kept


def told(report: Report, name: str) -> list[tuple[str, str]]:
    return [(check.verdict.value, check.text) for check in report.checks if check.name == name]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[scene.Story, list[str]]:
    """A journal, and its checkpoints of three moments."""
    story = scene.Story(tmp_path_factory.mktemp("grown"))
    kept = []
    for _ in range(3):
        story.snapshot(openai=2)
        story.denied(7)
        story.checkpoint()
        kept.append(journal_reader.latest(story.directory) or "")
    return story, kept


def size_of(note: str) -> int:
    return notes.parse(notes.signatures(note)[0]).size


def test_a_journal_that_continues_what_was_kept(grown: tuple[scene.Story, list[str]]) -> None:
    story, kept = grown
    for note in kept[:2]:
        proof = story.proof(continues=size_of(note))
        report = verify(proof, key=story.key.public, checkpoint=note)
        assert report.verified
        [(verdict, text)] = told(report, "checkpoint")
        assert verdict == "holds" and f"whose {size_of(note)} records are unchanged" in text
    assert verify(story.proof(), checkpoint=kept[2]).verified  # the one it ends with
    assert not told(verify(story.proof(continues=size_of(kept[0]))), "checkpoint")  # nobody asked


def test_without_the_hashes_between_nothing_is_shown(grown: tuple[scene.Story, list[str]]) -> None:
    story, kept = grown
    for proof in (story.proof(), story.proof(continues=size_of(kept[1]))):
        report = verify(proof, checkpoint=kept[0])
        assert breaks(report) == ["checkpoint"]
        assert "Ask for `egressctl proof --checkpoint FILE`" in report.broken[0].text


def test_a_journal_written_anew_does_not_continue_it(
    grown: tuple[scene.Story, list[str]], tmp_path: Path
) -> None:
    """The same key, the same name, the same length, one record another."""
    story, kept = grown
    other = scene.Story(tmp_path, key=story.key)
    other.sandbox(8)
    for _ in range(4):
        other.snapshot(openai=2)
    first = Checkpoint(story.origin, size_of(kept[0]), bytes(32))
    forged = notes.sign(first, story.origin, [story.key])
    assert breaks(verify(story.proof(continues=first.size), checkpoint=forged)) == ["checkpoint"]
    report = verify(other.proof(continues=size_of(kept[0])), checkpoint=kept[0])
    assert breaks(report) == ["checkpoint"]
    assert "of other keys" in report.broken[0].text  # a journal begun anew has another name


def test_a_journal_that_was_cut_is_shorter_than_what_was_kept(
    grown: tuple[scene.Story, list[str]],
) -> None:
    story, _ = grown
    longer = notes.sign(Checkpoint(story.origin, 10_000, bytes(32)), story.origin, [story.key])
    report = verify(story.proof(), checkpoint=longer)
    assert breaks(report) == ["checkpoint"]
    assert "10000 records, more than the proof's journal" in report.broken[0].text
    with pytest.raises(CannotProve, match="it was truncated, or is another journal"):
        story.proof(continues=10_000)


def test_a_key_is_known_of_one_journal(story: scene.Story, proof: bytes, tmp_path: Path) -> None:
    """Whoever begins the journal anew keeps the key, and has to change the journal's name."""
    key = story.key.public
    assert verify(proof, key=key, origin=story.origin).pinned
    anew = scene.Story(tmp_path, key=story.key)
    anew.denied(7)
    assert verify(anew.proof(), key=key).pinned
    report = verify(anew.proof(), key=key, origin=story.origin)
    assert breaks(report) == ["key"] and not report.pinned
    assert "it was begun anew" in report.broken[0].text


# ---- receipts


def test_a_receipt_is_of_one_sandbox(story: scene.Story) -> None:
    report = verify(story.proof(link=7), key=story.key.public)
    assert report.verified
    assert report.statement is not None
    summary = report.statement.predicate.summary
    assert [s.link for s in summary.sandboxes] == ["eg7"]
    assert (summary.totals.ok_packets, summary.totals.denied_packets) == (3, 2)
    assert [(f.host, f.address, f.out_bytes) for f in summary.flows] == [(scene.OPENAI, "192.0.2.10", 300)]


def test_a_receipt_without_its_end_does_not_hold(story: scene.Story) -> None:
    def cut(found: Document) -> None:
        records = _records(found)
        at = next(n for n, line in enumerate(records["lines"]) if '"sandbox-closed"' in line)
        del records["lines"][at], records["indices"][at]
        found["predicate"]["journal"]["records"]["hashes"] = [
            base64.b64encode(each).decode() for each in merkle.included(story.leaves(), records["indices"])
        ]
        scene.recounted(found)

    report = verify(scene.altered(story.proof(link=7), cut, story.key))
    assert breaks(report) == ["sandboxes"]


COUNTED = {"snapshot": f"s9-{scene.EPOCH}", "host": scene.OPENAI, "kind": "host", "out_packets": 1 << 40}
CLOSING = {"snapshot": f"s9-{scene.EPOCH}", "epoch": scene.EPOCH, "rows": 0, "full": True}
LINK = {"link": "eg7", "ok_packets": 3, "ok_bytes": 300}


@pytest.mark.parametrize(
    ("process", "event", "fields"),
    [
        ("resolver", "counted", COUNTED),
        ("inspector", "snapshot", CLOSING),
        ("relay", "sandbox-closed", LINK),
        ("auditor", "sandbox-opening", LINK),
        ("warden", "sandbox-lost", LINK),
        ("inspector", "flow", LINK),
        ("controller", "link-flows", LINK),
        ("resolver", "denied", LINK | {"reason": "unlisted", "packets": 9}),
        ("resolver", "observed", LINK),
        ("controller", "lost", {"cause": "queue", "count": 1, "from": "relay"}),
        ("resolver", "attempt", LINK),
        ("relay", "policy-changed", {"change": "+ host x"}),
    ],
)
def test_a_record_of_who_may_not_say_it_is_not_believed(
    process: str, event: str, fields: Document, tmp_path: Path
) -> None:
    story = scene.usual(tmp_path)
    honest = verify(story.proof()).statement
    number = story.tell(event, process=process, workspace="acme", **fields)
    report = verify(story.proof())
    assert breaks(report) == ["speakers"]
    assert report.broken[0].text == f"Record {number} ({event}) is of {process}, which may not say so."
    assert report.statement is not None and honest is not None
    found, before = report.statement.predicate.summary, honest.predicate.summary
    for part in ("hosts", "totals", "sandboxes", "attempts", "claims", "flows", "losses", "policy_changes"):
        assert getattr(found, part) == getattr(before, part), part


def test_the_reasons_past_the_guard_are_the_ruleset_s() -> None:
    assert set(build.LATE) == LATE
    assert not set(build.DENIALS) & LATE


# ---- what it proves may be bad news


def test_books_that_do_not_balance_break_the_proof(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.snapshot(openai=3, off=1)
    report = verify(story.proof())
    assert breaks(report) == ["books"]
    assert "in = ok + denied + other" in report.broken[0].text


def test_a_sandbox_that_goes_on_is_said(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.sandbox(7)
    story.tell("sandbox-opening", link="eg8", workspace="acme", uid=4001, pid=1, command="x")
    note = next(check for check in verify(story.proof()).notes if check.name == "sandboxes")
    assert note.text == "2 sandboxes in the window, 1 not closed in it (eg8)."


def test_changes_of_policy_are_said(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    own, other = scene.policy_of("acme").digest, scene.policy_of("rival").digest
    change = {"workspace": "acme", "change": "+ host x", "by": "uid 0"}
    story.tell("policy-changed", **change, widens=True, policy=own, policy_before=other)
    notes_ = [check.text for check in verify(story.proof()).notes if check.name == "policy-changes"]
    assert len(notes_) == 1
    assert "1 lines, 1 of them give more" in notes_[0]
    story.tell("policy-changed", **change, widens=False, policy=other, policy_before=own)
    report = verify(story.proof())
    assert report.verified
    assert any(f"another policy was in force: {other}" in check.text for check in report.notes)


def test_denials_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    """The guard logs at a bounded rate; its counters count all."""
    story = scene.Story(tmp_path)
    story.denied(7, packets=40)
    story.snapshot(unlisted=1000)
    report = verify(story.proof())
    assert report.verified
    note = next(check for check in report.notes if check.name == "attempts")
    assert "1000 packets were refused, exactly; where to is on record for 40 of them" in note.text


def test_what_was_refused_past_the_guard_is_not_taken_for_what_the_guard_refused(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.denied(7, packets=40)
    story.tell("denied", process="auditor", link="eg7", workspace="acme", reason="pace", packets=960)
    story.snapshot(unlisted=1000)
    texts = [check.text for check in verify(story.proof()).notes if check.name == "attempts"]
    assert texts == [
        "At least 960 packets that the guard had admitted were refused later (pace)."
        " They are counted as admitted, not as denied.",
        "1000 packets were refused, exactly; where to is on record for 40 of them.",
    ]


@pytest.mark.parametrize("event", ["record-refused", "process-hung", "process-killed"])
def test_what_befell_the_machine_is_in_everybody_s_proof(tmp_path: Path, event: str) -> None:
    story = scene.Story(tmp_path)
    number = story.tell(event, process="supervisor", name="resolver", why="it was not heard of")
    report = verify(story.proof())
    assert report.verified and report.statement is not None
    assert number in report.statement.predicate.journal.records.indices
    assert any(f"1 {event}" in check.text for check in report.notes if check.name == "alarms")


def test_losses_are_said_with_their_effect(tmp_path: Path) -> None:
    story = scene.Story(tmp_path)
    story.tell("lost", process="auditor", cause="queue", count=17, **{"from": "resolver"})
    report = verify(story.proof())
    assert report.verified
    note = next(check for check in report.notes if check.name == "losses")
    assert "17 events" in note.text
    assert "not affected" in note.text
