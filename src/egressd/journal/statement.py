"""What a proof states: an in-toto Statement (v1) whose predicate is all that an auditor needs.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md. The subjects are the journal, by the
root of its Merkle tree, and the policy, by its digest. The predicate type is ours, `PREDICATE_TYPE`.

`Facts` is what the journal cannot say: the policy and the ruleset in force when the proof was asked for. The
controller sends it as JSON; whoever builds the statement adds the journal's part. The fields of every object
are closed: what a reader does not know, it refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from egressd.journal import testimony
from egressd.journal.lines import Line
from egressd.journal.summary import Summary, device

__all__ = [
    "MARK", "PREDICATE_TYPE", "SHARED", "STATEMENT_TYPE", "WITHHELD", "Attestation", "Continued", "Facts",
    "JournalPart", "Machine", "PolicyFacts", "Predicate", "Records", "RegistryFacts", "Rotation",
    "RulesetFacts", "Scope",
    "ShownRuleset", "Statement", "StatementError", "Subject", "Window", "belongs", "build", "decode",
    "encode", "is_key_record", "is_place", "is_snapshot", "report_data", "request_of", "sha256_hex",
    "subjects",
]  # fmt: skip

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:egressd:proof:v1"

MARK: Final = 4  # bytes

Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]

# Records of the machine that name no workspace, and go into the proof of every one.
SHARED: Final = frozenset(
    {
        "clock-stepped", "journal-damaged", "journal-opened", "journal-torn",
        "journal-truncated", "key-created", "key-rotated", "log-ended", "lost", "peer-broken", "peer-ended",
        "process-ended", "process-hung", "process-killed", "process-started", "record-refused",
        "registry-changed",
    }
)  # fmt: skip
# Records of the machine whose text may name another workspace's hosts or objects: counted, not shown.
WITHHELD: Final = frozenset({"books-balanced", "books-restarted", "books-unbalanced", "drift", "tampered"})
# Records of a workspace that a receipt of one of its sandboxes holds as well.
_OF_ALL_LINKS: Final = frozenset(
    {
        "flows-cut", "policy-changed", "policy-refused", "residency-admitted", "residency-refused",
        "workspace-removed",
    }
)  # fmt: skip


class StatementError(ValueError):
    """The payload is not a statement of ours. `place` is its JSON path, where that is known."""

    def __init__(self, text: str, *, place: str = "") -> None:
        self.place = place
        super().__init__(text)


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class PolicyFacts(_Part, frozen=True):
    """`text` is the policy's canonical form (`policy.compile.canonical`), `digest` is of its bytes."""

    digest: Digest
    text: str
    guard: str

    @property
    def meaning(self) -> dict[str, Any]:
        """The text, read; empty where it is none."""
        try:
            found = msgspec.json.decode(self.text)
        except (msgspec.DecodeError, UnicodeError):
            return {}
        return found if isinstance(found, dict) else {}


class RulesetFacts(_Part, frozen=True):
    """The gateway's ruleset as the kernel lists it. `digest` is of the whole text; `text` leaves out what
    belongs to other workspaces. `drift`: differences from what was compiled, of this workspace or nobody."""

    digest: Digest
    text: str
    drift: tuple[str, ...] = ()


class ShownRuleset(_Part, frozen=True):
    """`RulesetFacts`, and the digest of the text as shown: equal to `digest` where nothing was left out."""

    digest: Digest
    text: str
    text_digest: Digest
    drift: tuple[str, ...]


class Machine(_Part, frozen=True):
    boot: str  # /proc/sys/kernel/random/boot_id


class RegistryFacts(_Part, frozen=True):
    """What residency rests on: `NAME@sha256:...` of each table of published prefixes, and of each file by
    which the catalogue of endpoints is another than the one that comes with egressd."""

    digest: Digest
    tables: tuple[str, ...] = ()
    catalogue: tuple[str, ...] = ()


class Attestation(_Part, frozen=True):
    """A report of the hardware, bound to the signing key by its REPORT_DATA (`verification`). Base64."""

    type: str  # "sev-snp", or another that is only carried along
    report: str


class Facts(_Part, frozen=True):
    """The controller's part. `versions`: egressd, kernel, nft, python."""

    policy: PolicyFacts
    ruleset: RulesetFacts
    versions: dict[str, str]
    machine: Machine
    registry: RegistryFacts
    attestation: Attestation | None = None


class Scope(_Part, frozen=True):
    """`link` is a device ("eg7") in a sandbox's receipt, None in the proof of a workspace."""

    workspace: str
    link: str | None


class Window(_Part, frozen=True):
    """Every record of the scope whose number is in [first, past) is in the proof, but what brokers said of
    requests: of that there is in a receipt what `testimony` says. `since` and `until` are when that begins
    and ends; `asked_*` what was asked for. In front of it, `base` records carry the
    counters that the window begins with, where addresses were found to be that had been let in by then, and
    the journal's earlier changes of keys."""

    asked_since: str | None
    asked_until: str | None
    since: str | None
    until: str | None
    first: Annotated[int, Meta(ge=0)]
    past: Annotated[int, Meta(ge=0)]
    base: Annotated[int, Meta(ge=0)]


class Records(_Part, frozen=True):
    """`lines[n]` is leaf `indices[n]` of the end checkpoint's tree; `hashes` prove all of them at once
    (`merkle.included`), in base64. `marks`: the first `MARK` bytes of each leaf's hash, one after the other,
    in base64. They prove nothing; they tell which line was changed, which the tree's root cannot."""

    indices: tuple[int, ...]
    lines: tuple[str, ...]
    hashes: tuple[str, ...]
    marks: str


class Rotation(_Part, frozen=True):
    """A checkpoint that an older key signed although a newer one was in force: the older vouches for the log
    that names the newer. `consistency` is from this checkpoint to the end's."""

    note: str
    consistency: tuple[str, ...]


class Continued(_Part, frozen=True):
    """From the journal's first `size` records, of which the reader has kept a checkpoint, to the end's."""

    size: Annotated[int, Meta(ge=1)]
    consistency: tuple[str, ...]


class JournalPart(_Part, frozen=True):
    """`keys`: verifier keys, oldest first; `start` and `end`: signed notes, `consistency` between them."""

    origin: str
    keys: tuple[str, ...]
    start: str | None
    end: str
    consistency: tuple[str, ...]
    rotations: tuple[Rotation, ...]
    records: Records
    continued: Continued | None = None


class Predicate(_Part, frozen=True, omit_defaults=True):
    """`request`: in the receipt of a sandbox that ran one; else it is not there at all."""

    scope: Scope
    window: Window
    policy: PolicyFacts
    ruleset: ShownRuleset
    summary: Summary
    withheld: dict[str, int]  # event -> records of the window that are counted here and not shown
    versions: dict[str, str]
    machine: Machine
    registry: RegistryFacts
    journal: JournalPart
    attestation: Attestation | None
    request: testimony.Request | None = None


class Subject(_Part, frozen=True):
    name: str
    digest: dict[str, str]


class Statement(_Part, frozen=True):
    type: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: Predicate


def build(
    facts: Facts,
    *,
    scope: Scope,
    window: Window,
    summary: Summary,
    withheld: dict[str, int],
    journal: JournalPart,
    size: int,
    root: bytes,
    request: testimony.Request | None = None,
) -> Statement:
    """The statement. `size` and `root` are those of the end checkpoint."""
    ruleset = ShownRuleset(
        digest=facts.ruleset.digest,
        text=facts.ruleset.text,
        text_digest=f"sha256:{sha256_hex(facts.ruleset.text.encode())}",
        drift=facts.ruleset.drift,
    )
    return Statement(
        type=STATEMENT_TYPE,
        subject=subjects(journal.origin, size, root, scope.workspace, facts.policy.digest),
        predicate_type=PREDICATE_TYPE,
        predicate=Predicate(
            scope=scope,
            window=window,
            policy=facts.policy,
            ruleset=ruleset,
            summary=summary,
            withheld=withheld,
            versions=facts.versions,
            machine=facts.machine,
            registry=facts.registry,
            journal=journal,
            attestation=facts.attestation,
            request=request,
        ),
    )


def subjects(origin: str, size: int, root: bytes, workspace: str, policy: str) -> tuple[Subject, ...]:
    return (
        Subject(name=f"{origin}@{size}", digest={"sha256": root.hex()}),
        Subject(name=f"policy of {workspace}", digest={"sha256": policy.removeprefix("sha256:")}),
    )


def encode(statement: Statement) -> bytes:
    """The payload that is signed."""
    return msgspec.json.encode(statement, order="sorted")


def decode(payload: bytes) -> Statement:
    """StatementError says where, as msgspec's JSON path, the payload is not a statement."""
    try:
        statement = msgspec.json.decode(payload, type=Statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text, _, place = str(error).partition(" - at `")
        raise StatementError(
            f"the statement is not one: {text}", place=place.rstrip("`") or "payload"
        ) from error
    if msgspec.json.encode(statement, order="sorted") != payload:
        raise StatementError("the statement is not spelled as egressd spells it", place="payload")
    return statement


# ---- which records belong


def belongs(event: str, fields: dict[str, str | int | float | bool | None], scope: Scope) -> bool:
    """Whether a record of the window is part of the proof: of the workspace and, in a receipt, of the
    sandbox, or of the machine and naming nobody."""
    workspace = fields.get("workspace")
    if event in SHARED:
        return workspace is None or workspace == scope.workspace
    if workspace != scope.workspace or not testimony.is_shown(event, receipt=scope.link is not None):
        return False
    if scope.link is None or event in _OF_ALL_LINKS:
        return True
    link = fields.get("link")
    return link == scope.link or (type(link) is int and f"eg{link}" == scope.link)


def request_of(lines: Iterable[Line], scope: Scope) -> testimony.Request | None:
    """What the records of a receipt say of the request that ran in its sandbox."""
    if scope.link is None:
        return None
    return testimony.of_sandbox(
        testimony.Entry(line.event, line.seq, line.time, line.fields)
        for line in lines
        if line.event in testimony.SHOWN
        and line.process == "controller"
        and line.fields.get("workspace") == scope.workspace
        and device(line.fields) == scope.link
    )


def is_snapshot(event: str) -> bool:
    """Rows and closing record of a snapshot of a workspace's counters."""
    return event in ("counted", "snapshot")


def is_place(event: str) -> bool:
    """An address was let in: what was found of it holds until it is found again."""
    return event == "residency-admitted"


def is_key_record(event: str) -> bool:
    return event in ("key-created", "key-rotated")


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def report_data(raw_key: bytes) -> bytes:
    """The 64 bytes of REPORT_DATA that an attestation of a key is asked for with: SHA-512 of its 32 bytes."""
    return hashlib.sha512(raw_key).digest()
