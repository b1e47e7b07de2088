"""What a proof says of a request, and to whom it says nothing of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import scene
from egressd.cli import main
from egressd.cli.proof_words import render
from egressd.cli.text import Paint
from egressd.journal import dsse, statement, testimony
from egressd.journal.page import page
from egressd.journal.verification import REQUEST_LIMIT, Report, Verdict, verify

R1, R2 = "r-" + "a1" * 13, "r-" + "b2" * 13
MANIFEST = b'[{"id": "handbook:a.md", "size": 5}]'
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
# What is in the journal, and in nothing that anybody else is given.
SECRETS = (
    "user:okta:00u1", "ann@acme.test", "3133731337", "handbook:secret.md", "candidates", "request-asked",
    "request-files", "request-refused", "access-changed", "testimony-refused",
)  # fmt: skip
Step = Callable[[scene.Story, dict[str, Any]], None]


def about(link: int | None = 7) -> dict[str, Any]:
    own = {} if link is None else {"link": f"eg{link}", "boot": "5f3c0a1b"}
    return {"workspace": "acme", "broker_uid": 4001, **own}


def asked(story: scene.Story, said: dict[str, Any]) -> None:
    story.tell("request-asked", **said, request=R1, asker="user:okta:00u1", email="ann@acme.test",
               discarded=3133731337, candidates=3133731635)  # fmt: skip


def decided(story: scene.Story, said: dict[str, Any], **more: Any) -> None:
    fields = {
        "request": R1, "role": "viewer", "action": "summarise", "cleared": 298, "manifest": DIGEST,
        "octets": 9000, "network": "policy",
    }  # fmt: skip
    story.tell("request-decided", **said, **{**fields, **more})


def files(story: scene.Story, said: dict[str, Any]) -> None:
    story.tell("request-files", **said, request=R1, part=1, parts=1, files=f"handbook:secret.md {DIGEST}")


def ended(story: scene.Story, said: dict[str, Any], **more: Any) -> None:
    fields = {"request": R1, "status": 0, "why": "", "hit": "", "destroyed": True, "files": 298}
    story.tell("request-ended", **said, **{**fields, **more})


def sandbox(story: scene.Story, link: int, *steps: Step, late: Step | None = None, ok: int = 3) -> None:
    """One sandbox; `steps` once it is opened, `late` right before it is closed."""
    tell, said = story.tell, about(link)

    def told(event: str, **fields: Any) -> int:
        if event == "sandbox-closed" and late is not None:
            late(story, said)
        number = tell(event, **fields)
        if event == "sandbox-opening":
            for step in steps:
                step(story, said)
        return number

    story.tell = told  # type: ignore[method-assign]
    story.sandbox(link, ok=ok)
    del story.tell


@pytest.fixture
def story(tmp_path: Path) -> scene.Story:
    return scene.Story(tmp_path)


def whole(story: scene.Story, **asked_for: Any) -> None:
    """A request, and what else a broker says of the workspace."""
    story.snapshot()
    story.tell("access-changed", **about(None), what="member add", by="user:okta:00u1")
    sandbox(story, 7, asked, decided, files, late=ended)
    story.tell("request-refused", **about(None), request=R2, asker="user:okta:00u1", text="no")
    story.tell("testimony-refused", workspace="acme", uid=4003, told="request-decided", text="no broker")
    story.snapshot(openai=3, unlisted=2)


def payload(proof: bytes) -> str:
    return dsse.open(dsse.decode(proof)).payload.decode()


def checks(report: Report, *names: str) -> list[tuple[str, Verdict]]:
    return [(check.name, check.verdict) for check in report.checks if check.name in names]


def broken(report: Report) -> set[str]:
    return {check.name for check in report.broken}


# ---- the receipt


def test_a_receipt_says_what_the_sandbox_was_shown(story: scene.Story) -> None:
    whole(story)
    proof = story.proof(link=7)
    report = verify(proof, key=story.key.public, manifest=MANIFEST)
    assert report.verified, report.broken
    assert checks(report, "request", "destroyed", "manifest") == [
        ("request", Verdict.HOLDS), ("destroyed", Verdict.HOLDS), ("manifest", Verdict.HOLDS),
    ]  # fmt: skip
    assert report.statement is not None
    found = report.statement.predicate.request
    assert found is not None
    assert (found.id, found.files, found.octets, found.role) == (R1, 298, 9000, "viewer")
    assert (found.action, found.network, found.manifest, found.destroyed) == (
        "summarise", "policy", DIGEST, True,
    )  # fmt: skip
    assert REQUEST_LIMIT in report.limits
    (text,) = [check.text for check in report.checks if check.name == "request"]
    assert text == (
        f"Request {R1} (summarise) ran in role viewer: it was shown 298 files, 9000 bytes, which was put on"
        " record once, before anything was sent."
    )


@pytest.mark.parametrize("secret", SECRETS)
def test_a_receipt_tells_nothing_that_its_reader_may_not_know(story: scene.Story, secret: str) -> None:
    whole(story)
    report = verify(story.proof(link=7))
    assert secret not in payload(story.proof(link=7))
    assert secret not in page(report)
    assert secret not in render(report, name="x", paint=Paint(io.StringIO(), no_color=True))


def test_a_request_whose_decision_is_missing_is_told_of(story: scene.Story) -> None:
    sandbox(story, 7, asked, late=ended)
    report = verify(story.proof(link=7), key=story.key.public)
    assert report.verified
    (text,) = [check.text for check in report.checks if check.name == "request"]
    assert text == "A request ended in this sandbox; what it was shown is not on record."
    assert "request" in {check.name for check in report.notes}


@pytest.mark.parametrize("since", [None, 8], ids=["of the whole journal", "from the middle of the first"])
def test_a_link_of_the_same_number_before_the_machine_was_started_anew_is_another(
    story: scene.Story, since: float | None
) -> None:
    sandbox(story, 7, asked, decided, files, late=ended, ok=5)
    story.tell("name-granted", workspace="acme", host="x.example.com", address="198.18.4.0")

    def second(story: scene.Story, said: dict[str, Any]) -> None:
        decided(story, said, request=R2, action="translate")

    sandbox(story, 7, second, late=lambda story, said: ended(story, said, request=R2), ok=3)
    proof = story.proof(link=7, since=None if since is None else scene.at(since))
    report = verify(proof, key=story.key.public)
    assert report.verified, report.broken
    assert report.statement is not None
    predicate = report.statement.predicate
    assert predicate.request is not None
    assert (predicate.request.id, predicate.request.action) == (R2, "translate")
    assert predicate.summary.totals.ok_packets == 3
    assert R1 not in payload(proof) and "summarise" not in payload(proof)


@pytest.mark.parametrize("secret", (*SECRETS, "request-decided", "request-ended", R1, DIGEST, "summarise"))
def test_a_proof_of_the_workspace_tells_nothing_of_requests(story: scene.Story, secret: str) -> None:
    whole(story)
    proof = story.proof()
    report = verify(proof, key=story.key.public)
    assert report.verified and "eg7" in payload(proof), "the sandbox is there"
    assert secret not in payload(proof)


def test_nor_does_the_receipt_of_another_sandbox(story: scene.Story) -> None:
    whole(story)
    sandbox(story, 9)
    proof = story.proof(link=9)
    assert verify(proof, key=story.key.public).verified
    for told in (R1, "request-", DIGEST, *SECRETS[:3]):
        assert told not in payload(proof)


def test_a_receipt_without_a_request_is_as_it_ever_was(story: scene.Story) -> None:
    sandbox(story, 7)
    proof = story.proof(link=7)
    assert '"request"' not in payload(proof)
    report = verify(proof, key=story.key.public)
    assert report.verified and checks(report, "request", "destroyed", "manifest") == []
    assert REQUEST_LIMIT not in report.limits


def test_the_page_and_the_words_show_it(story: scene.Story) -> None:
    whole(story)
    report = verify(story.proof(link=7), key=story.key.public)
    shown = page(report)
    for told in ("What the sandbox was shown", R1, "summarise", DIGEST, "298, 9,000 bytes"):
        assert told in shown
    words = render(report, name="x", paint=Paint(io.StringIO(), no_color=True))
    assert f"{R1}: summarise, role viewer, network by policy" in words
    assert f"298 files, 9000 bytes (8.8 KiB), manifest {DIGEST}" in words
    sandbox(story, 8)
    assert "What the sandbox was shown" not in page(verify(story.proof(link=8)))


# ---- what must hold of it


def test_two_decisions_break_it(story: scene.Story) -> None:
    sandbox(story, 7, decided, lambda s, said: decided(s, said, cleared=299))
    report = verify(story.proof(link=7), key=story.key.public)
    assert broken(report) == {"request"}
    assert "there are 2 decisions" in report.broken[0].text


@pytest.mark.parametrize(("after", "verdict"), [(0.5, Verdict.NOTE), (30.0, Verdict.BROKEN)])
def test_a_decision_after_something_was_sent_is_late(
    story: scene.Story, after: float, verdict: Verdict
) -> None:
    def late(story: scene.Story, said: dict[str, Any]) -> None:
        story.clock += after
        decided(story, said)

    sandbox(story, 7, late=late)
    report = verify(story.proof(link=7), key=story.key.public)
    assert verdict in [found for _, found in checks(report, "request")]
    assert report.verified == (verdict is Verdict.NOTE)
    assert any("comes before the decision" in check.text for check in report.checks)


@pytest.mark.parametrize("ok", [0, 1])
def test_a_request_without_a_network_sent_nothing(story: scene.Story, ok: int) -> None:
    sandbox(story, 7, lambda s, said: decided(s, said, network="none"), ok=ok)
    report = verify(story.proof(link=7), key=story.key.public)
    assert report.verified == (not ok)
    if ok:
        assert "was to have no network, and 1 packets of it were admitted" in report.broken[0].text


@pytest.mark.parametrize("end", [None, {"destroyed": False}])
def test_copies_that_nobody_saw_gone_are_to_know(story: scene.Story, end: dict[str, Any] | None) -> None:
    late = None if end is None else lambda s, said: ended(s, said, **end)
    sandbox(story, 7, decided, late=late)
    report = verify(story.proof(link=7), key=story.key.public)
    assert report.verified
    assert checks(report, "request", "destroyed") == [("request", Verdict.HOLDS), ("destroyed", Verdict.NOTE)]


def test_a_decision_that_says_too_little_breaks_it(story: scene.Story) -> None:
    sandbox(story, 7, lambda s, said: decided(s, said, manifest="sha256:0"))
    assert broken(verify(story.proof(link=7), key=story.key.public)) == {"request"}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda request: request.update(files=299), "predicate.request.files"),
        (lambda request: request.update(destroyed=None), "predicate.request.destroyed"),
        (lambda request: request.update(role="owner"), "predicate.request.role"),
        (lambda request: request.update(manifest="sha256:" + "0" * 64), "predicate.request.manifest"),
    ],
)
def test_a_section_that_the_records_do_not_say_breaks_it(
    story: scene.Story, change: Callable[[dict[str, Any]], None], place: str
) -> None:
    whole(story)
    proof = scene.altered(story.proof(link=7), lambda found: change(found["predicate"]["request"]), story.key)
    report = verify(proof, key=story.key.public)
    assert [(check.name, check.place) for check in report.broken] == [("request", place)]


def test_a_section_that_is_left_out_or_put_in_breaks_it(story: scene.Story) -> None:
    whole(story)
    sandbox(story, 8)
    without = scene.altered(story.proof(link=7), lambda found: found["predicate"].pop("request"), story.key)
    assert broken(verify(without, key=story.key.public)) == {"request"}
    request = msgspec.json.decode(payload(story.proof(link=7)))["predicate"]["request"]
    added = scene.altered(
        story.proof(link=8), lambda found: found["predicate"].update(request=request), story.key
    )
    assert broken(verify(added, key=story.key.public)) == {"request"}


def test_a_record_that_a_proof_may_not_have_breaks_its_scope(story: scene.Story) -> None:
    """Though who made it had the key, and root."""
    whole(story)
    for link, event in ((None, "request-decided"), (7, "request-asked"), (None, "access-changed")):
        scope = statement.Scope("acme", None if link is None else f"eg{link}")
        assert not statement.belongs(event, about(link), scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testimony, "is_shown", lambda event, *, receipt: True)
        patch.setattr("egressd.processes.prover._UNSHOWN", {False: frozenset(), True: frozenset()})
        proofs = [story.proof(), story.proof(link=7)]
    for proof in proofs:
        assert "scope" in broken(verify(proof, key=story.key.public))


def test_only_the_controller_says_it(story: scene.Story) -> None:
    sandbox(story, 7, lambda s, said: decided(s, {**said, "process": "resolver"}))
    report = verify(story.proof(link=7), key=story.key.public)
    assert "speakers" in broken(report)
    assert report.statement is not None and report.statement.predicate.request is None


# ---- the manifest


@pytest.mark.parametrize("manifest", [b"", MANIFEST + b"\n", MANIFEST[:-1]])
def test_another_manifest_is_found(story: scene.Story, manifest: bytes) -> None:
    whole(story)
    report = verify(story.proof(link=7), key=story.key.public, manifest=manifest)
    assert [(check.name, check.place) for check in report.broken] == [
        ("manifest", "predicate.request.manifest")
    ]


def test_a_manifest_is_of_a_request(story: scene.Story) -> None:
    sandbox(story, 7)
    assert broken(verify(story.proof(link=7), key=story.key.public, manifest=MANIFEST)) == {"manifest"}


def test_the_command(story: scene.Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(story)
    (tmp_path / "x.proof").write_bytes(story.proof(link=7))
    (tmp_path / "MANIFEST.json").write_bytes(MANIFEST)
    words = ["verify", str(tmp_path / "x.proof"), "--manifest", str(tmp_path / "MANIFEST.json")]
    assert main.main(words) == 0
    assert "The manifest that was given is the one that was put on record." in capsys.readouterr().out
    (tmp_path / "MANIFEST.json").write_bytes(b"[]")
    assert main.main(words) == 1
    assert "broken manifest" in capsys.readouterr().out
    assert main.main([*words[:3], str(tmp_path / "none")]) == 2
    assert main.main(["verify", "--journal", str(story.directory), *words[2:]]) == 2
