"""A journal as egressd writes one, small and made up, and proofs of it as the auditor signs them."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from egressd.journal import dsse, lines, merkle, statement
from egressd.journal.keys import PrivateKey
from egressd.journal.statement import (
    Facts,
    Machine,
    PolicyFacts,
    RegistryFacts,
    RulesetFacts,
    Scope,
    Statement,
    sha256_hex,
)
from egressd.journal.summary import summarise
from egressd.policy.compile import canonical
from egressd.policy.compiled import Policy
from egressd.processes import journal_reader
from egressd.processes.journal_file import Clock, Draft, JournalFile
from egressd.processes.journal_keys import Keys
from egressd.processes.prover import Asked, prove
from egressd.processes.workspaces import read_policy_file

POLICY = """\
workspace: acme
guard: enforce
members: [user:infer]
allow:
  - host: eu.api.openai.com
  - host: db.internal.example
    ports: [5432/tcp]
    verify: address
    private: true
"""
# Of this one alone is told where its hosts may be.
PINNED = """\
workspace: nordic
guard: enforce
members: [user:infer]
residency: {jurisdictions: [EEA, CH]}
allow:
  - host: eu.api.openai.com
    vouch: "contract 4711: processed in the EEA and Switzerland"
  - host: db.internal.example
    ports: [5432/tcp]
    verify: address
    private: true
    vouch: "our own machine room in Oslo"
"""
_TEXTS = {"nordic": PINNED}
NOON = datetime(2026, 9, 21, 12, 0, tzinfo=UTC)
EPOCH = "5f3c0a1b-1790000000000"
OPENAI, DB = "eu.api.openai.com", "db.internal.example"


def at(seconds: float) -> str:
    """A record's time, so many seconds after noon."""
    return (NOON + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Story:
    """Appends records one by one, and signs checkpoints where it is told to."""

    def __init__(self, directory: Path, *, key: PrivateKey | None = None, **options: Any) -> None:
        self.directory = directory / "journal"
        self.key = key or PrivateKey.generate()
        self.keys = Keys(self.key)
        self.file = JournalFile(self.directory, keys=self.keys, host="lab.example", clock=_still(), **options)
        self.clock = 0.0
        self._snapshots = 0
        self.file.append(Draft(at(0), note.process, note.event, note.fields) for note in self.file.notes)
        self.file.tree.checkpoint()

    @property
    def origin(self) -> str:
        return self.file.tree.origin

    def tell(self, event: str, *, process: str = "controller", after: float = 1.0, **fields: Any) -> int:
        """One record, `after` seconds after the one before; its number."""
        self.clock += after
        self.file.append([Draft(at(self.clock), process, event, fields)])
        return self.file.seq - 1

    def checkpoint(self) -> int:
        self.file.tree.checkpoint()
        return self.file.seq

    def rotate(self) -> None:
        """As the auditor's writer does it: a new key, a record of it, a checkpoint signed by both."""
        old, new = self.file.tree.rotate()
        self.tell("key-rotated", process="auditor", old=old, new=new)
        self.checkpoint()
        self.key = self.keys.current

    def leaves(self) -> list[bytes]:
        return list(journal_reader.leaves(self.directory))

    def snapshot(
        self,
        *,
        openai: int = 0,
        db: int = 0,
        unlisted: int = 0,
        full: bool = True,
        workspace: str = "acme",
        epoch: str = EPOCH,
        lose: int = 0,
        off: int = 0,
    ) -> None:
        """Packets of 100 bytes each. `lose`: rows lost. `off`: packets in the totals too many."""
        self._snapshots += 1
        head = {"workspace": workspace, "snapshot": f"s{self._snapshots}-{epoch}"}
        rows: list[dict[str, Any]] = [
            _host(OPENAI, openai, "192.0.2.10 2001:db8::10"),
            _host(DB, db, "10.20.0.5"),
            {"reason": "unlisted", "denied_packets": unlisted, "denied_bytes": 60 * unlisted},
        ]
        for row in rows[lose:]:
            self.tell("counted", after=0.001, **head, **row)
        ok = openai + db
        self.tell(
            "snapshot",
            after=0.001,
            **head,
            epoch=epoch,
            rows=len(rows),
            full=full,
            links=0,
            in_packets=ok + unlisted + off,
            in_bytes=100 * ok + 60 * unlisted,
            ok_packets=ok,
            ok_bytes=100 * ok,
            denied_packets=unlisted,
            denied_bytes=60 * unlisted,
            other_packets=0,
            other_bytes=0,
            balanced=not off,
            policy=policy_of(workspace).digest,
            guard="enforce",
            names_refused=0,
            flows_refused=0,
        )

    def sandbox(self, link: int, *, workspace: str = "acme", ok: int = 3, denied: int = 2) -> None:
        """One from its opening to its end, with a flow and a denial."""
        about = {"link": f"eg{link}", "workspace": workspace, "uid": 4001, "pid": 9000 + link}
        self.tell(
            "sandbox-opening",
            **about,
            command="python3 (sha256:77)",
            command_digest=f"sha256:{'77' * 32}",
            policy=policy_of(workspace).digest,
            guard="enforce",
            address4=f"198.19.0.{link}",
            address6=f"fd53:1::{link}",
            boot="5f3c0a1b",
        )
        if denied:
            self.denied(link, workspace=workspace, packets=denied)
        self.flow(link, packets=ok, workspace=workspace)
        self.tell(
            "sandbox-closed",
            **about,
            seconds=3.5,
            in_packets=ok + denied,
            in_bytes=100 * ok + 60 * denied,
            ok_packets=ok,
            ok_bytes=100 * ok,
            denied_packets=denied,
            denied_bytes=60 * denied,
            other_packets=0,
            other_bytes=0,
            exit=0,
            why="",
            user_seconds=0.25,
            system_seconds=0.125,
            max_rss=1 << 20,
        )

    def denied(self, link: int, *, workspace: str = "acme", packets: int = 1, port: int = 443) -> None:
        self.tell(
            "denied",
            process="auditor",
            link=f"eg{link}",
            workspace=workspace,
            reason="unlisted",
            protocol="tcp",
            source=f"198.19.0.{link}",
            destination="203.0.113.9",
            port=port,
            packets=packets,
        )

    def flow(self, link: int, *, packets: int, workspace: str = "acme") -> None:
        self.tell(
            "flow",
            process="auditor",
            link=f"eg{link}",
            workspace=workspace,
            host=OPENAI,
            kind="host",
            protocol="tcp",
            source=f"198.19.0.{link}",
            source_port=40000,
            destination="198.18.0.4",
            port=443,
            address="192.0.2.10",
            address_port=443,
            out_packets=packets,
            out_bytes=100 * packets,
            in_packets=packets,
            in_bytes=1500 * packets,
            seconds=0.75,
        )

    def proof(
        self,
        *,
        workspace: str = "acme",
        link: int | None = None,
        since: str | None = None,
        until: str | None = None,
        continues: int | None = None,
        **facts: Any,
    ) -> bytes:
        """The file."""
        asked: dict[str, Any] = {"link": link, "since": since, "until": until, "continues": continues}
        return sealed(self.state(workspace=workspace, **asked, **facts), self.key)

    def state(
        self,
        *,
        workspace: str = "acme",
        link: int | None = None,
        since: str | None = None,
        until: str | None = None,
        continues: int | None = None,
        **facts: Any,
    ) -> Statement:
        scope = Scope(workspace, None if link is None else f"eg{link}")
        asked = Asked(self.directory, scope, since, until, self.checkpoint(), continues)
        return prove(asked, facts_of(workspace, **facts))


def sealed(found: Statement, *keys: PrivateKey) -> bytes:
    return dsse.encode(dsse.seal(dsse.IN_TOTO, statement.encode(found), keys))


def facts_of(workspace: str = "acme", **other: Any) -> Facts:
    policy, text = policy_of(workspace), "table netdev egressd {\n}\n"
    return Facts(
        policy=PolicyFacts(policy.digest, canonical(policy), policy.guard.value),
        ruleset=RulesetFacts(f"sha256:{sha256_hex(text.encode())}", text, other.get("drift", ())),
        versions={"egressd": "0.1.0", "kernel": "Linux 6.18", "nft": "nftables v1.0.6", "python": "3.11.2"},
        machine=Machine("5f3c0a1b-0000-4000-8000-000000000000"),
        registry=RegistryFacts(
            "sha256:" + "77" * 32, ("aws@sha256:" + "5e" * 32,), other.get("catalogue", ())
        ),
        attestation=other.get("attestation"),
    )


_policies: dict[str, Policy] = {}


def policy_of(workspace: str) -> Policy:
    if workspace not in _policies:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{workspace}.yaml"
            path.write_text(_TEXTS.get(workspace, POLICY.replace("acme", workspace)))
            _policies[workspace] = read_policy_file(path)
    return _policies[workspace]


def _host(name: str, packets: int, addresses: str) -> Mapping[str, Any]:
    return {
        "host": name,
        "kind": "host",
        "out_packets": packets,
        "out_bytes": 100 * packets,
        "in_packets": packets,
        "in_bytes": 1500 * packets,
        "connections": packets and 1,
        "dialled_packets": 0,
        "dialled_bytes": 0,
        "addresses": addresses,
    }


def _still() -> Clock:
    """One that nobody sets."""
    return Clock(wall=lambda: 0.0, running=lambda: 0.0)


def usual(directory: Path) -> Story:
    """Two sandboxes of acme, one of another workspace, three snapshots, two checkpoints."""
    story = Story(directory)
    story.snapshot()
    story.sandbox(7)
    story.snapshot(openai=3, unlisted=2)
    story.checkpoint()
    story.sandbox(8, workspace="rival")
    story.tell("process-started", process="supervisor", name="resolver", pid=41, restarts=1)
    story.sandbox(9, ok=5, denied=0)
    story.snapshot(openai=8, unlisted=2, full=False)
    return story


def altered(proof: bytes, change: Callable[[dict[str, Any]], object], *keys: PrivateKey) -> bytes:
    """The proof with its statement changed and signed anew, as if by who has the keys."""
    found = msgspec.json.decode(dsse.open(dsse.decode(proof)).payload)
    change(found)
    payload = msgspec.json.encode(found, order="sorted")
    return dsse.encode(dsse.seal(dsse.IN_TOTO, payload, keys))


def recounted(found: dict[str, Any]) -> None:
    """The summary and the marks made to fit whatever lines there are now."""
    predicate = found["predicate"]
    records, window = predicate["journal"]["records"], predicate["window"]
    read = [lines.read(line.encode()) for line in records["lines"]]
    summary = summarise(read, base=window["base"], from_beginning=window["first"] == 0)
    predicate["summary"] = msgspec.to_builtins(summary)
    marks = b"".join(merkle.leaf_hash(line.encode())[: statement.MARK] for line in records["lines"])
    records["marks"] = base64.b64encode(marks).decode()
