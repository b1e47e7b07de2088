"""Checks a proof: on any machine, with nothing but the file, and better with the key and the policy.

Every check says in plain words what it shows, and where it fails: a JSON path, a record's number, which hash.
A broken check does not end the others, so that the place of the damage can be told: a signature alone says
that something was changed, the checks after it say what.

Broken means that a claim of the proof does not hold: the file was changed, or it proves that the books did
not balance. A note limits a claim (records were lost, the key is not pinned), for the reader to weigh.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import msgspec

from egressd.journal import crosschecks, dsse, lines, merkle, notes, statement, testimony
from egressd.journal.dsse import DsseError
from egressd.journal.keys import BadKey, PublicKey, Verifier
from egressd.journal.lines import Line
from egressd.journal.merkle import MerkleError
from egressd.journal.notes import Checkpoint, NoteError
from egressd.journal.records import RecordError
from egressd.journal.residency import CLAIM, Unproved, residency
from egressd.journal.statement import MARK, JournalPart, Predicate, Statement, StatementError
from egressd.journal.summary import LATE, FlowBooks, Place, speaks_for_itself, summarise

__all__ = ["LIMITS", "MAX_FILE", "REPORT_DATA", "REQUEST_LIMIT", "Check", "Report", "Verdict", "verify"]

MAX_FILE: Final = 360 << 20  # bytes; the largest statement (processes.proving) in base64
_SLACK: Final = (
    120  # seconds by which a record may lie outside its window: floods are written after they began
)

# AMD, SEV-SNP ABI specification (56860), table "ATTESTATION_REPORT Structure": REPORT_DATA is 64 bytes at
# 50h, the whole report 4A0h bytes.
REPORT_DATA: Final = slice(0x50, 0x90)
_SNP_REPORT: Final = 0x4A0

# What no proof of this kind can claim. Said with every one.
LIMITS: Final = (
    "Attribution is to a link, not to a program: whoever runs a sandbox can keep another process of his own "
    'in its network. Every line of this proof means "over this link".',
    "An allowed host can be told anything that the policy lets through; what was said to it is not recorded.",
    "The kernel, egressd and who has root on that machine are trusted. The signature shows that the journal "
    "was not changed after it was written, not that what was written is true.",
    "That no record of the workspace was left out, and that nobody has another journal of the same time, is "
    "the signer's word. A checkpoint that you kept (--checkpoint) shows whether the journal goes on from it; "
    "where the journal itself is at hand, its Merkle root is the one that was signed.",
    "Destinations, flows and times come from events, which may be lost; totals come from counters.",
    "Commands, exit statuses and the processes inside a sandbox are what the caller's own broker said.",
)
# Said where a request was run.
REQUEST_LIMIT: Final = (
    "What the request was shown, in which role, and that nothing of it is left, is what the broker said; when"
    " it said so, and over which link, is egressd's own word. Who asked is not in a proof."
)
_READ_TOGETHER: Final = 5  # seconds: two processes' records are written in the order in which they are read
# Records of a sandbox that there are only once its command runs.
_SENT: Final = frozenset(
    {
        "attempt", "denied", "dns-denied", "dns-refused-address", "dns-would-deny", "flow", "flow-closed",
        "flow-failed", "flow-refused", "name-granted", "observed", "relay-closed", "relay-denied",
        "relay-failed",
    }
)  # fmt: skip


class _Moment(msgspec.Struct):
    at: datetime


class Verdict(enum.StrEnum):
    """BROKEN is the zero among them: what is not known to hold does not."""

    BROKEN = "broken"
    NOTE = "note"
    HOLDS = "holds"


@dataclass(frozen=True, slots=True)
class Check:
    """`name` is stable, for programs; `text` for people; `place` where it breaks, "" if it does not."""

    name: str
    verdict: Verdict
    text: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """`statement` is None if the file could not be read so far; with a broken check it is only what the
    file says. `pinned`: the key is the one that was given, or one that it vouches for."""

    checks: tuple[Check, ...]
    statement: Statement | None
    signers: tuple[str, ...]  # fingerprints of keys whose signature fits
    pinned: bool
    digest: str  # SHA-256 of the file
    limits: tuple[str, ...] = LIMITS

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(check.verdict is not Verdict.BROKEN for check in self.checks)

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict is Verdict.BROKEN)

    @property
    def notes(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict is Verdict.NOTE)


def verify(
    data: bytes,
    *,
    key: PublicKey | None = None,
    origin: str | None = None,
    policy_digest: str | None = None,
    checkpoint: str | None = None,
    manifest: bytes | None = None,
) -> Report:
    """Check a proof file. `key`: the one that the reader trusts, `origin`: the journal that he knows it of;
    `policy_digest`: of the policy that he thinks was in force; `checkpoint`: a note that he has kept;
    `manifest`: the list of files that a request was shown. Never raises for what stands in the file."""
    inquiry = _Inquiry(
        key=key, origin=origin, policy_digest=policy_digest, kept=checkpoint, manifest=manifest
    )
    inquiry.run(data)
    return Report(
        checks=tuple(inquiry.checks),
        statement=inquiry.statement,
        signers=inquiry.signers,
        pinned=inquiry.pinned,
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        limits=inquiry.limits,
    )


@dataclass(slots=True)
class _Inquiry:
    """The checks, in order; later ones use what earlier ones found."""

    key: PublicKey | None
    origin: str | None
    policy_digest: str | None
    kept: str | None
    manifest: bytes | None = None
    checks: list[Check] = field(default_factory=list)
    statement: Statement | None = None
    signers: tuple[str, ...] = ()
    pinned: bool = False
    verifiers: tuple[Verifier, ...] = ()
    end: Checkpoint | None = None
    leaves: dict[int, bytes] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    limits: tuple[str, ...] = LIMITS

    def run(self, data: bytes) -> None:
        signed = self._opened(data)
        if signed is None:
            return
        try:
            self.statement = statement.decode(signed.payload)
        except StatementError as error:
            self._broken("statement", str(error), error.place)
            return
        predicate = self.statement.predicate
        self._keys(predicate)
        self._signature(signed)
        self._end(predicate)
        self._statement(self.statement)
        steps: tuple[Callable[[Predicate], None], ...] = (
            self._start, self._kept, self._rotations, self._read, self._included, self._scope,
            self._speakers, self._window, self._policy, self._residency, self._ruleset, self._summary,
            self._sandboxes, self._request, self._selftests,
            self._books, self._flows, self._attempts, self._losses, self._remarks, self._attestation,
        )  # fmt: skip
        for step in steps:
            step(predicate)

    def _broken(self, name: str, text: str, place: str = "") -> None:
        self.checks.append(Check(name, Verdict.BROKEN, text, place))

    def _note(self, name: str, text: str, place: str = "") -> None:
        self.checks.append(Check(name, Verdict.NOTE, text, place))

    def _holds(self, name: str, text: str) -> None:
        self.checks.append(Check(name, Verdict.HOLDS, text))

    # ---- who says so

    def _opened(self, data: bytes) -> dsse.Signed | None:
        if len(data) > MAX_FILE:
            self._broken("file", f"the file is longer than {MAX_FILE} bytes", "the file")
            return None
        try:
            signed = dsse.open(dsse.decode(data))
        except DsseError as error:
            self._broken("file", str(error), error.place)
            return None
        if signed.payload_type != dsse.IN_TOTO:
            self._broken("file", "the envelope holds something else than a statement", "payloadType")
        else:
            self._holds("file", "The file is one whole envelope, spelled as egressd spells it.")
        return signed

    def _keys(self, predicate: Predicate) -> None:
        journal = predicate.journal
        try:
            self.verifiers = tuple(Verifier.parse(text) for text in journal.keys)
        except BadKey as error:
            self._broken("keys", f"a key of the proof is none: {error}", f"{_JOURNAL}.keys")
            return
        odd = [place for place, each in enumerate(self.verifiers) if each.name != journal.origin]
        if odd or not self.verifiers:
            self._broken("keys", "a key of the proof is not the journal's", f"{_JOURNAL}.keys{odd[:1] or ''}")

    def _signature(self, signed: dsse.Signed) -> None:
        try:
            self.signers = dsse.signers(signed, [verifier.key for verifier in self.verifiers])
        except DsseError as error:
            self._broken("signature", f"The signature does not hold: {error}.", error.place)
            return
        self._holds(
            "signature", f"Signed by {', '.join(self.signers)}; nothing of the statement was changed since."
        )

    def _end(self, predicate: Predicate) -> None:
        journal = predicate.journal
        self.end = self._checkpoint("end-checkpoint", journal.end, f"{_JOURNAL}.end", journal.origin)
        if self.end is not None:
            self._holds(
                "end-checkpoint", f"The journal had {self.end.size} records, and its root was signed."
            )

    def _checkpoint(self, name: str, note: str, place: str, origin: str) -> Checkpoint | None:
        try:
            checkpoint = notes.open(note, self.verifiers)
        except (NoteError, BadKey) as error:
            self._broken(name, f"The checkpoint is not signed by a key of the proof: {error}.", place)
            return None
        if checkpoint.origin != origin:
            self._broken(name, f"The checkpoint is another journal's: {checkpoint.origin}.", place)
            return None
        return checkpoint

    def _statement(self, found: Statement) -> None:
        predicate = found.predicate
        if found.type != statement.STATEMENT_TYPE or found.predicate_type != statement.PREDICATE_TYPE:
            self._broken("statement", "The statement is of another type.", "predicateType")
            return
        if self.end is None:
            return
        proper = statement.subjects(
            predicate.journal.origin,
            self.end.size,
            self.end.root,
            predicate.scope.workspace,
            predicate.policy.digest,
        )
        if found.subject != proper:
            self._broken(
                "statement", "The subjects are not the journal and the policy that it is about.", "subject"
            )
        else:
            self._holds(
                "statement", f"It is about {_about(predicate)}, and says so to any reader of in-toto."
            )

    def _start(self, predicate: Predicate) -> None:
        """The journal at the window's beginning is the beginning of the one at its end."""
        journal = predicate.journal
        if journal.start is None:
            if predicate.window.first:
                self._note("start-checkpoint", "No checkpoint from before the window is in the proof.")
            return
        start = self._checkpoint("start-checkpoint", journal.start, f"{_JOURNAL}.start", journal.origin)
        if start is None or self.end is None:
            return
        if start.size > predicate.window.first:
            self._broken(
                "start-checkpoint", "The start checkpoint is of a later journal.", f"{_JOURNAL}.start"
            )
        elif self._consistent("consistency", start, journal.consistency, f"{_JOURNAL}.consistency"):
            self._holds(
                "consistency", f"The first {start.size} records were not changed between start and end."
            )

    def _kept(self, predicate: Predicate) -> None:
        """The journal that the reader saw before is the beginning of this one."""
        journal, place = predicate.journal, f"{_JOURNAL}.continued"
        if self.kept is None or self.end is None:
            return
        try:
            kept = notes.open(self.kept, self.verifiers)
        except (NoteError, BadKey) as error:
            self._broken("checkpoint", f"The checkpoint that was given is of other keys: {error}.", place)
            return
        if kept.origin != journal.origin:
            text = f"The checkpoint that was given is of {kept.origin}, the proof of another journal."
            self._broken("checkpoint", text, f"{_JOURNAL}.origin")
            return
        if kept.size > self.end.size:
            text = f"The checkpoint that was given has {kept.size} records, more than the proof's journal."
            self._broken(
                "checkpoint", f"{text} The proof is older, or the journal was cut.", f"{_JOURNAL}.end"
            )
            return
        path = self._path_from(journal, kept.size)
        if path is None:
            text = f"Nothing shows that the journal continues the {kept.size} records of the checkpoint."
            self._broken("checkpoint", f"{text} Ask for `egressctl proof --checkpoint FILE`.", place)
        elif self._consistent("checkpoint", kept, path, place):
            self._holds(
                "checkpoint",
                f"It continues the checkpoint that was given, whose {kept.size} records are unchanged.",
            )

    def _path_from(self, journal: JournalPart, size: int) -> tuple[str, ...] | None:
        assert self.end is not None
        if journal.continued is not None and journal.continued.size == size:
            return journal.continued.consistency
        if journal.start is not None:
            with contextlib.suppress(NoteError, BadKey):
                if notes.open(journal.start, self.verifiers).size == size:
                    return journal.consistency
        return () if size == self.end.size else None

    def _consistent(self, name: str, start: Checkpoint, path: Sequence[str], place: str) -> bool:
        assert self.end is not None
        try:
            hashes = _hashes(path, place)
            merkle.verify_consistency(start.size, self.end.size, start.root, self.end.root, hashes)
        except (MerkleError, DsseError) as error:
            self._broken(name, f"The journal at the end does not continue the earlier one: {error}.", place)
            return False
        return True

    def _rotations(self, predicate: Predicate) -> None:
        """Whether the reader's key signed, or vouches for the one that did."""
        if self.origin is not None and self.origin != predicate.journal.origin:
            text = (
                f"The key that was given is of journal {self.origin}, the proof of another: it was begun anew"
            )
            self._broken("key", f"{text}, or is another machine's.", f"{_JOURNAL}.origin")
            return
        if self.key is None:
            said = f"Compare it with the machine's: {', '.join(self.signers) or 'there is none'}."
            self._note("key", f"No key was given, so who signed is only what the file says. {said}")
            return
        if not self.signers:
            return  # no signature holds, which has been told: there is nothing to vouch for
        wanted = self.key.fingerprint
        if wanted in self.signers:
            self.pinned = True
            self._holds("key", "The key that signed is the one that was given.")
            return
        places = [place for place, each in enumerate(self.verifiers) if each.key == self.key]
        if not places:
            self._broken(
                "key",
                f"The key that was given ({wanted}) is none of the proof's: it is another machine's, or newer"
                " than the proof, which then stands on the key of its time.",
                f"{_JOURNAL}.keys",
            )
            return
        vouched = all(self._vouched(predicate, place) for place in range(places[0], len(self.verifiers) - 1))
        if not vouched or self.verifiers[-1].key.fingerprint not in self.signers:
            self._broken(
                "key",
                "The key that was given does not vouch for the one that signed.",
                f"{_JOURNAL}.rotations",
            )
            return
        self.pinned = True
        self._holds(
            "key",
            "The key that was given vouches for the one that signed: it signed the journal that names it.",
        )

    def _vouched(self, predicate: Predicate, place: int) -> bool:
        """Key `place` signed a checkpoint of this journal in which the key after it is named as its
        successor. A signature of the newer key beside it would show nothing: anyone can add one."""
        older, newer = self.verifiers[place], self.verifiers[place + 1]
        named = [
            index
            for index, line in zip(
                predicate.journal.records.indices, predicate.journal.records.lines, strict=False
            )
            if '"key-rotated"' in line and _names(line, str(newer))
        ]
        for number, rotation in enumerate(predicate.journal.rotations):
            try:
                checkpoint = notes.open(rotation.note, [older])
            except (NoteError, BadKey):
                continue
            where = f"{_JOURNAL}.rotations[{number}]"
            if (
                self.end is not None
                and checkpoint.origin == predicate.journal.origin
                and any(index < checkpoint.size for index in named)
                and self._consistent("rotation", checkpoint, rotation.consistency, where)
            ):
                return True
        return False

    # ---- the records

    def _read(self, predicate: Predicate) -> None:
        records = predicate.journal.records
        if len(records.indices) != len(records.lines):
            self._broken("records", "There are not as many lines as numbers.", f"{_RECORDS}.indices")
            return
        before = -1
        leaf_hash, read = merkle.leaf_hash, lines.read
        for place, (index, text) in enumerate(zip(records.indices, records.lines, strict=True)):
            data = text.encode("utf-8", "surrogatepass")
            self.leaves[index] = leaf_hash(data)
            try:
                line = read(data)
            except RecordError as error:
                self._broken("records", f"Record {index} is none: {error}.", f"{_RECORDS}.lines[{place}]")
                return
            if line.seq != index or index <= before:
                wrong = f"Record {index} stands where it does not belong; it says that it is {line.seq}."
                self._broken("records", wrong, f"{_RECORDS}.lines[{place}]")
                return
            before = index
            self.lines.append(line)

    def _included(self, predicate: Predicate) -> None:
        records = predicate.journal.records
        changed = self._changed(predicate)
        if changed is not None:
            place, index = changed
            text = f"Record {index} was changed: its hash is not the one that was taken of it."
            self._broken("inclusion", text, f"{_RECORDS}.lines[{place}]")
            return
        if self.end is None or len(self.leaves) != len(records.indices):
            return
        try:
            hashes = _hashes(records.hashes, f"{_RECORDS}.hashes")
            merkle.verify_included(self.leaves, self.end.size, hashes, self.end.root)
        except (MerkleError, DsseError) as error:
            place_of = getattr(error, "place", "") or f"{_RECORDS}.hashes"
            self._broken("inclusion", f"The records are not those of the signed journal: {error}.", place_of)
            return
        count = len(self.leaves)
        self._holds(
            "inclusion", f"All {count} records are in the journal whose root was signed, each at its number."
        )

    def _changed(self, predicate: Predicate) -> tuple[int, int] | None:
        """Which record does not fit its mark, if one: (place, index)."""
        records = predicate.journal.records
        try:
            marks = dsse.strict_base64(records.marks, place=f"{_RECORDS}.marks")
        except DsseError as error:
            self._broken("inclusion", f"The marks are none: {error}.", error.place)
            return None
        if len(marks) != MARK * len(records.indices):
            self._broken("inclusion", *self._more_or_less(marks, records.indices))
            return None
        found = [leaf[:MARK] for leaf in self.leaves.values()]
        if len(found) == len(records.indices) and b"".join(found) == marks:
            return None
        for place, (index, mark) in enumerate(zip(self.leaves, found, strict=True)):
            if mark != marks[MARK * place : MARK * (place + 1)]:
                return place, index
        return None

    def _more_or_less(self, marks: bytes, indices: Sequence[int]) -> tuple[str, str]:
        """Where a record was taken out or put in: in front of the first that does not fit its mark."""
        known = [marks[at : at + MARK] for at in range(0, len(marks), MARK)]
        fits = [leaf[:MARK] == mark for leaf, mark in zip(self.leaves.values(), known, strict=False)]
        place = fits.index(False) if False in fits else len(fits)
        numbers = [*self.leaves]
        what = "A record was taken out" if len(known) > len(indices) else "A record was put in"
        after = f"after record {numbers[place - 1]}" if 0 < place <= len(numbers) else "at the beginning"
        return f"{what} {after}: {len(known)} were signed for, {len(indices)} are there.", (
            f"{_RECORDS}.lines[{place}]"
        )

    def _scope(self, predicate: Predicate) -> None:
        """Everything is this workspace's, or the machine's and nobody's."""
        window, scope = predicate.window, predicate.scope
        workspace = scope.workspace if scope.link is None else None
        for place, line in enumerate(self.lines):
            own = line.fields.get("workspace") == scope.workspace
            if own and workspace and place >= window.base and line.event not in testimony.PRIVATE:
                continue  # `belongs` would say the same, only slower
            if place < window.base:
                before = statement.is_snapshot(line.event) or statement.is_place(line.event)
                good = (own and before) or statement.is_key_record(line.event)
            else:
                good = statement.belongs(line.event, line.fields, scope)
            if not good:
                text = f"Record {line.seq} ({line.event}) is not of {_about(predicate)}."
                self._broken("scope", text, f"{_RECORDS}.lines[{place}]")
                return
        self._holds(
            "scope", f"Every record is of {_about(predicate)}, or of the machine and naming no workspace."
        )

    def _speakers(self, predicate: Predicate) -> None:
        """What evidence is made of is said by the one process that can know it."""
        for place, line in enumerate(self.lines):
            if not speaks_for_itself(line):
                text = f"Record {line.seq} ({line.event}) is of {line.process}, which may not say so."
                self._broken("speakers", text, f"{_RECORDS}.lines[{place}]")
                return
        self._holds(
            "speakers", "Counters and sandboxes are the controller's word, flows and denials the auditor's."
        )

    def _window(self, predicate: Predicate) -> None:
        window, indices = predicate.window, predicate.journal.records.indices
        size = self.end.size if self.end is not None else window.past
        inside = indices[window.base :]
        if not (window.first <= window.past <= size) or window.base > len(indices):
            self._broken("window", "The window is none of this journal.", "predicate.window")
            return
        if any(not window.first <= index < window.past for index in inside) or any(
            index >= window.first for index in indices[: window.base]
        ):
            self._broken(
                "window", "A record lies outside the window that the proof claims.", "predicate.window"
            )
            return
        odd_bound = self._bound(predicate)
        if odd_bound:
            self._broken("window", odd_bound, "predicate.window")
            return
        since, until = window.since or "", window.until or "a"  # "" before every time, "a" after
        odd = [line for line in self.lines[window.base :] if not since <= line.time <= until]
        outside = [line.seq for line in odd if _apart(line.time, since) and _apart(until, line.time)]
        if outside and not any(line.event == "clock-stepped" for line in self.lines):
            text = f"Record {outside[0]} is of another time than the window, and no clock was set."
            self._broken("window", text, "predicate.window")
            return
        span = f"records {window.first} to {window.past - 1}" if window.past > window.first else "no record"
        self._holds(
            "window",
            f"It covers {span} of the journal, by the signer's word all from {window.since}"
            f" to {window.until}.",
        )
        if outside:
            self._note(
                "window", f"The clock was set; {len(outside)} records carry a time outside the window."
            )
        if predicate.withheld:
            events = ", ".join(f"{count} {event}" for event, count in sorted(predicate.withheld.items()))
            self._note(
                "withheld",
                f"Records of the machine that may name other workspaces are counted, not shown: {events}.",
            )

    def _bound(self, predicate: Predicate) -> str:
        """What is wrong with when the window claims to begin and end: that it begins with a record that is
        there can be checked."""
        window, found = predicate.window, self.lines
        if any(not _TIME.fullmatch(time) for time in (window.since, window.until) if time is not None):
            return "The window begins or ends at no time that a record can have."
        if window.since and window.until and window.since > window.until:
            return "The window ends before it begins."
        known = found[window.base - 1] if 0 < window.base <= len(found) else None
        if window.first == 0 and found and found[0].seq == 0:
            known = found[0]
        elif known is None or known.event != "snapshot":
            return ""
        if known.time != window.since:
            return f"The window begins with record {known.seq}, of {known.time}, and claims {window.since}."
        return ""

    # ---- what they say

    def _policy(self, predicate: Predicate) -> None:
        policy = predicate.policy
        if f"sha256:{statement.sha256_hex(policy.text.encode())}" != policy.digest:
            self._broken(
                "policy", "The policy's text is not the one its digest is of.", "predicate.policy.text"
            )
            return
        said = policy.meaning
        if (said.get("workspace"), said.get("guard")) != (predicate.scope.workspace, policy.guard):
            self._broken("policy", "The policy is of another workspace or guard.", "predicate.policy")
            return
        if self.policy_digest is not None and self.policy_digest != policy.digest:
            text = f"The policy that was given ({self.policy_digest}) is not the proof's ({policy.digest})."
            self._broken("policy", text, "predicate.policy.digest")
            return
        given = "it is the one that was given" if self.policy_digest else "its whole text is in the proof"
        self._holds(
            "policy",
            f"The policy in force when the proof was made was {policy.digest}; {given}."
            f" Its guard: {policy.guard}.",
        )
        if policy.guard != "enforce":
            self._note(
                "guard", f"The guard is {policy.guard}: what was not listed was counted, and let through."
            )
        changes = predicate.summary.policy_changes
        if changes:
            wider = sum(change.widens for change in changes)
            text = f"The policy was changed in the window: {len(changes)} lines, {wider} of them give more"
            self._note(
                "policy-changes", f"{text}. What was sent before a change was sent under the older policy."
            )
            left = changes[-1].policy
            if left and left != policy.digest:
                self._note("policy-changes", f"At the window's end another policy was in force: {left}.")

    def _residency(self, predicate: Predicate) -> None:
        """The addresses that were reached, against what was found of them before they were led to."""
        found = residency(predicate)
        if found.local_only:
            self._note("residency", "External routing was off at the end: only local and cidr rules remain.")
        if not found.pin:
            if found.refused:
                text = f"{_counted(found.refused, 'address')} were refused under a pin that has gone since."
                self._note("residency", text)
            return
        self.limits = (*self.limits, CLAIM)
        pin = ", ".join(found.pin)
        for own in predicate.registry.catalogue:
            text = f"What URLs say of a place is also the word of a file of that machine's own: {own}."
            self._note("residency", text)
        for rule in found.vouched:
            self._note("residency", f'{rule.key} is vouched for, by its rule\'s author: "{rule.reason}"')
        if found.unproved:
            first, count = found.unproved[0], _counted(found.unproved, "address")
            text = (
                f"No record here says where it is: {count} of hosts, the first {first.address} of"
                f" {first.host}. It was reached before the pin, or placed before the window."
            )
            self._note("residency", text)
            return
        judged, refused = (_counted(each, "address") for each in (found.admitted, found.refused))
        text = f"Residency was pinned to {pin}: each of {judged} was judged first, {refused} refused."
        self._holds("residency", text)

    def _ruleset(self, predicate: Predicate) -> None:
        ruleset = predicate.ruleset
        if f"sha256:{statement.sha256_hex(ruleset.text.encode())}" != ruleset.text_digest:
            self._broken(
                "ruleset", "The ruleset's text is not the one its digest is of.", "predicate.ruleset.text"
            )
            return
        if ruleset.drift:
            text = f"The kernel's ruleset was not the one compiled from the policy: {ruleset.drift[0]}"
            self._broken("ruleset", text, "predicate.ruleset.drift[0]")
            return
        whole = ruleset.digest == ruleset.text_digest
        shown = "whole" if whole else "without other workspaces' objects; the digest of the whole is signed"
        self._holds(
            "ruleset",
            f"The ruleset as the kernel listed it is in the proof, {shown}, and matched the policy.",
        )

    def _summary(self, predicate: Predicate) -> None:
        if len(self.lines) != len(predicate.journal.records.lines):
            return  # a record that cannot be read has been told
        window = predicate.window
        found = summarise(self.lines, base=window.base, from_beginning=window.first == 0)
        if found != predicate.summary:
            place, says, is_ = _difference(
                msgspec.to_builtins(predicate.summary), msgspec.to_builtins(found), "predicate.summary"
            )
            self._broken("summary", f"The summary says {says}, the records say {is_}.", place)
            return
        self._holds(
            "summary", "Every number of the summary follows from the records; they were added up again."
        )
        for gap in found.gaps:
            self._note("gap", _sentence(gap))

    def _sandboxes(self, predicate: Predicate) -> None:
        sandboxes = predicate.summary.sandboxes
        if predicate.scope.link is not None:
            whole = [s for s in sandboxes if s.opened and s.closed and s.totals is not None]
            if [s.link for s in sandboxes] != [predicate.scope.link] or not whole:
                self._broken(
                    "sandboxes", "The receipt does not hold its sandbox from opening to closing.", _SANDBOXES
                )
                return
            self._holds(
                "sandboxes", f"The sandbox is whole: opened {whole[0].opened}, closed {whole[0].closed}."
            )
            return
        still = [s.link for s in sandboxes if s.closed is None]
        before = [s.link for s in sandboxes if s.opened is None]
        count = f"{len(sandboxes)} sandbox{'' if len(sandboxes) == 1 else 'es'}"
        if not sandboxes:
            self._holds("sandboxes", "No sandbox was opened or closed in the window.")
        elif not still and not before:
            self._holds("sandboxes", f"{count} in the window, each from its opening to its closing.")
        else:
            parts = [
                *([f"{len(before)} opened before it ({_few(before)})"] if before else []),
                *([f"{len(still)} not closed in it ({_few(still)})"] if still else []),
            ]
            self._note("sandboxes", f"{count} in the window, {', '.join(parts)}.")

    def _request(self, predicate: Predicate) -> None:
        """What was shown to the sandbox was decided once, before anything ran in it."""
        if len(self.lines) != len(predicate.journal.records.lines):
            return
        said, found = predicate.request, statement.request_of(self.lines, predicate.scope)
        if found != said:
            place, says, is_ = _difference(
                msgspec.to_builtins(said), msgspec.to_builtins(found), "predicate.request"
            )
            self._broken("request", f"It says {says} of its request, the records say {is_}.", place)
            return
        decisions = [line for line in self.lines if line.event == testimony.DECIDED]
        if said is not None and self._decided_in_time(predicate, said, decisions):
            self.limits = (*self.limits, REQUEST_LIMIT)
            self._shown(said)
        elif said is None and decisions:
            text = f"Record {decisions[0].seq} is a decision that does not say what one must."
            self._broken("request", text, _RECORDS)
        elif said is None and any(line.event == testimony.ENDED for line in self.lines):
            self._note("request", "A request ended in this sandbox; what it was shown is not on record.")
        self._same_manifest(said)

    def _selftests(self, predicate: Predicate) -> None:
        """What came of attacking sandboxes, where somebody did and said so."""
        for line in self.lines:
            if line.event != testimony.SELFTEST:
                continue
            if not testimony.told(line.event, line.fields):
                self._note("selftest", f"Record {line.seq} is of a self-test and does not say what one must.")
                continue
            said = line.fields
            where = f"Self-test over {said.get('link')} at {line.time[:19]}Z, by its caller's word"
            came = ", ".join(f"{said[name]} {name}" for name in ("refused", "escaped", "unclear"))
            self._note(
                "selftest",
                f"{where}: {said['tried']} ways out tried, {came}, {said['not_tried']} not tried;"
                f" table {said['table']}, egressd {said['version']}.",
            )

    def _decided_in_time(
        self, predicate: Predicate, said: testimony.Request, decisions: Sequence[Line]
    ) -> bool:
        if len(decisions) != 1:
            text = f"Of one sandbox there are {len(decisions)} decisions, the first in record"
            self._broken("request", f"{text} {decisions[0].seq}.", _RECORDS)
            return False
        decided = decisions[0]
        early = next((x for x in self.lines if x.event in _SENT and x.seq < decided.seq), None)
        if early is not None:
            before = f"comes before the decision, record {decided.seq}"
            text = f"Record {early.seq} ({early.event}) is of what the sandbox sent, and {before}"
            if _apart(early.time, decided.time, by=_READ_TOGETHER):
                self._broken("request", f"{text}.", _RECORDS)
                return False
            self._note("request", f"{text}, by less than {_READ_TOGETHER} seconds.")
        admitted = predicate.summary.totals.ok_packets
        if said.network == "none" and admitted:
            text = f"The request was to have no network, and {admitted} packets of it were admitted."
            self._broken("request", text, "predicate.summary.totals.ok_packets")
            return False
        return True

    def _shown(self, said: testimony.Request) -> None:
        files = f"{said.files} file{'' if said.files == 1 else 's'}, {said.octets} bytes"
        network = "" if said.network == "policy" else ", without a network"
        self._holds(
            "request",
            f"Request {said.id} ({said.action}) ran in role {said.role}{network}: it was shown {files}, which"
            " was put on record once, before anything was sent.",
        )
        if said.destroyed:
            text = "Its sandbox and copies were destroyed, and looked for, by its broker's word."
            self._holds("destroyed", text)
        else:
            text = "Nobody said" if said.destroyed is None else "Its broker does not say"
            self._note("destroyed", f"{text} that the request's copies were destroyed.")

    def _same_manifest(self, said: testimony.Request | None) -> None:
        if self.manifest is None:
            return
        digest, place = f"sha256:{hashlib.sha256(self.manifest).hexdigest()}", "predicate.request.manifest"
        if said is None:
            self._broken("manifest", "A manifest was given, and the proof is of no request.", "predicate")
        elif said.manifest != digest:
            text = f"The manifest that was given ({digest}) is not the proof's ({said.manifest})."
            self._broken("manifest", text, place)
        else:
            self._holds("manifest", "The manifest that was given is the one that was put on record.")

    def _books(self, predicate: Predicate) -> None:
        found = predicate.summary
        wrong = [(place, each) for place, each in enumerate(found.unequal) if not each.moving]
        if wrong:
            place, each = wrong[0]
            text = f"The books do not balance at {each.time}: {each.what}, {each.left} against {each.right}"
            self._broken("books", f"{text} (packets, bytes).", f"predicate.summary.unequal[{place}]")
        elif not found.equations:
            self._note("books", "There is no snapshot and no ended sandbox: nothing could be added up.")
        elif found.unequal:
            exact = found.equations - len(found.unequal)
            moving = "packets flowed while the others were read, and egressd found no contradiction"
            text = f"The books balance: {exact} of {found.equations} equations to the byte; {moving}."
            self._note("books", text)
        else:
            count = "1 equation" if found.equations == 1 else f"{found.equations} equations"
            self._holds("books", f"The books balance, to the byte: {count}, added up again.")

    def _flows(self, predicate: Predicate) -> None:
        """Flow records against the guard's own counter, for each link that has ended."""
        known = [(s, s.flow_books) for s in predicate.summary.sandboxes if s.flow_books is not None]
        told = [(s, books) for s, books in known if s.opened is not None and not books.partial]
        if not told:
            return
        missing = [s.link for s, books in told if s.recorded != _of_connections(books)]
        if missing:
            text = f"Of {_few(missing)} not all connections are listed: their records were lost or summed."
            self._note("flows", text)
        admitted = sum(books.ok_packets for _, books in told)
        rest = sum(books.unrecorded_packets for _, books in told)
        text = f"{admitted - rest} of {admitted} packets admitted over links that have ended"
        if rest:
            text = f"{text} are of connections whose end the kernel told"
            self._note("flows", f"{text}; {rest} were of none, or dropped before they made one.")
        else:
            self._holds("flows", f"{text} are of connections whose end the kernel told: none is unexplained.")

    def _attempts(self, predicate: Predicate) -> None:
        """The list of what was tried against the exact count of what was refused: the guard logs at a bounded
        rate, and a proof may be asked for before the last second's denials are written down."""
        found = predicate.summary
        refused = found.totals.denied_packets
        kernels = [a for a in found.attempts if (a.verdict, a.by) == ("denied", "kernel")]
        listed = sum(a.times for a in kernels if a.reason not in LATE)
        late = sum(a.times for a in kernels if a.reason in LATE)
        if late:
            why = ", ".join(sorted({a.reason for a in kernels if a.reason in LATE}))
            text = f"At least {late} packets that the guard had admitted were refused later ({why})."
            self._note("attempts", f"{text} They are counted as admitted, not as denied.")
        if found.attempts_more[0]:
            text = f"{found.attempts_more[0]} destinations that were tried are in the records alone."
            self._note("attempts", text)
        elif listed < refused:
            were = "packet was" if refused == 1 else "packets were"
            text = f"{refused} {were} refused, exactly; where to is on record for {listed} of them."
            self._note("attempts", text)

    def _losses(self, predicate: Predicate) -> None:
        losses = predicate.summary.losses
        if not losses:
            self._holds("losses", "No record was lost in the window, as far as egressd noticed.")
            return
        count = sum(loss.count for loss in losses)
        causes = ", ".join(sorted({f"{loss.cause} of {loss.process}" for loss in losses}))
        text = (
            f"{count} events of this machine were lost ({causes}): lists of attempts and flows may miss some."
        )
        exact = "Totals by host and by reason come from counters, and are not affected."
        self._note("losses", f"{text} {exact}")

    def _remarks(self, predicate: Predicate) -> None:
        if len(self.lines) == len(predicate.journal.records.lines):
            for name, text in crosschecks.remarks(predicate, self.lines, apart=_apart):
                self._note(name, text)

    def _attestation(self, predicate: Predicate) -> None:
        """REPORT_DATA must be SHA-512 of the raw public key, or begin with SHA-256 of it."""
        attestation = predicate.attestation
        if attestation is None:
            return
        place = "predicate.attestation.report"
        try:
            report = dsse.strict_base64(attestation.report, place=place)
        except DsseError as error:
            self._broken("attestation", f"The report cannot be read: {error}.", error.place)
            return
        if attestation.type != "sev-snp":
            self._note(
                "attestation", f"A report of type {attestation.type!r} is there; it is not checked.", place
            )
            return
        if len(report) < _SNP_REPORT or not any(_binds(report[REPORT_DATA], v.key) for v in self._signing()):
            self._broken("attestation", "The hardware's report is not bound to the key that signed.", place)
            return
        text = (
            "The hardware's report names the key that signed. The report's own signature is not checked here:"
        )
        self._note("attestation", f"{text} use AMD's certificates and a tool such as snpguest.")

    def _signing(self) -> Iterator[Verifier]:
        return (each for each in self.verifiers if each.key.fingerprint in self.signers)


_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_JOURNAL: Final = "predicate.journal"
_RECORDS: Final = "predicate.journal.records"
_SANDBOXES: Final = "predicate.summary.sandboxes"


def _about(predicate: Predicate) -> str:
    scope = predicate.scope
    return (
        f"workspace {scope.workspace}"
        if scope.link is None
        else f"sandbox {scope.link} of workspace {scope.workspace}"
    )


def _binds(report_data: bytes, key: PublicKey) -> bool:
    return report_data == statement.report_data(key.raw) or report_data.startswith(
        hashlib.sha256(key.raw).digest()
    )


def _hashes(texts: Sequence[str], place: str) -> list[bytes]:
    found = []
    for number, text in enumerate(texts):
        where = f"{place}[{number}]"
        found.append(dsse.strict_base64(text, place=where))
        if len(found[-1]) != 32:
            raise DsseError("not the length of a hash", place=where)
    return found


def _names(text: str, verifier: str) -> bool:
    try:
        line = lines.read(text.encode())
    except (RecordError, UnicodeEncodeError):
        return False
    return line.event == "key-rotated" and line.fields.get("new") == verifier


def _counted(places: Sequence[Place | Unproved], what: str) -> str:
    """Each address once, whatever was found of it and how often."""
    count = len({(each.host, each.address) for each in places})
    return f"{count} {what if count == 1 else what + 'es'}"


def _apart(earlier: str, later: str, *, by: float = _SLACK) -> bool:
    """By more than so many seconds, in either order; times that are none are."""
    decode = msgspec.json.Decoder(_Moment).decode
    try:
        first, second = (decode(msgspec.json.encode({"at": time})).at for time in (earlier, later))
    except msgspec.DecodeError:
        return True
    return bool(abs((second - first).total_seconds()) > by)


def _difference(says: Any, is_: Any, path: str) -> tuple[str, str, str]:
    """The first place where two documents differ, and what stands there."""
    if isinstance(says, dict) and isinstance(is_, dict):
        for name in sorted({*says, *is_}):
            if says.get(name) != is_.get(name):
                return _difference(says.get(name), is_.get(name), f"{path}.{name}")
    if isinstance(says, list | tuple) and isinstance(is_, list | tuple):
        for number, (left, right) in enumerate(zip(says, is_, strict=False)):
            if left != right:
                return _difference(left, right, f"{path}[{number}]")
        return path, f"{len(says)} rows", f"{len(is_)} rows"
    return path, _short(says), _short(is_)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _of_connections(books: FlowBooks) -> tuple[int, int, int]:
    """Flows, packets and bytes out, without the questions to the resolver, which have no record each."""
    return books.flows, books.out_packets - books.question_packets, books.out_bytes - books.question_bytes


def _few(links: Sequence[str]) -> str:
    return ", ".join(links[:5]) + (", ..." if len(links) > 5 else "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
