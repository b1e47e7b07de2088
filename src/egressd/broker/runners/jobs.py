"""What the service and a runner say to each other: one job, and what becomes of it.

Over a SOCK_SEQPACKET channel of their own (ipc/channel.py), the job as a sealed memfd beside `Begin`. Both
ends are this program; bounds are here so that a defect shows at once.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from egressd.ipc.messages import MOST_CONNECTIONS
from egressd.ruleset.wants import WorkspaceName

__all__ = ["FROM_RUNNER", "TO_RUNNER", "Copy", "Job", "Limits"]

Bytes = Annotated[int, Meta(ge=1, le=1 << 50)]
Text = Annotated[str, Meta(max_length=4096)]
RequestName = Annotated[str, Meta(pattern=r"^r-[0-9a-z]{26}$")]  # 128 random bits, RFC 4648 base 32


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What one request may cost. None: not bounded here; what the workspace's policy bounds holds always."""

    wall: Annotated[float, Meta(gt=0, le=1e7)] | None = None  # seconds
    cpu: Annotated[float, Meta(gt=0, le=1e7)] | None = None  # seconds, of all processes together
    memory: Bytes | None = None
    processes: Annotated[int, Meta(ge=1, le=1 << 22)] | None = None
    file_size: Bytes | None = None  # of each file the command writes
    output: Bytes | None = None  # standard output and error together
    egress: Bytes | None = None  # bytes sent over the link, held by the kernel
    connections: Annotated[int, Meta(ge=1, le=MOST_CONNECTIONS)] | None = None  # opened, held by the kernel
    tokens: Annotated[int, Meta(ge=1)] | None = None  # as the command itself reports
    cost: Annotated[float, Meta(gt=0)] | None = None  # the same, in whatever currency it reports


class Copy(Struct, frozen=True, array_like=True):
    """A document to be projected: `path` below `root`, both bytes of the file system."""

    id: str
    root: bytes
    path: bytes
    size: int
    digest: str  # sha256:...


class Job(Struct, frozen=True, forbid_unknown_fields=True):
    id: RequestName
    workspace: WorkspaceName
    command: tuple[str, ...]
    copies: tuple[Copy, ...]
    asker: str  # principal; for the record
    role: str
    discarded: int  # candidates not shown; for the record alone
    action: str  # the inference's name, or "command"
    stdin: bytes = b""
    environment: dict[str, str] = {}
    bind_ro: tuple[str, ...] = ()
    network: Literal["policy", "none"] = "policy"
    limits: Limits = Limits()
    run_dir: str = "/run/egressd"
    scratch: str = "private"  # or the directory of a scratch on disk
    scratch_size: Bytes = 1 << 30
    scratch_encrypted: bool = False
    generation: int = 0  # of the store, when it was decided
    clearance: str = ""  # the asker's; for the record
    email: str = ""  # the same
    preflight: bool = False  # the command runs only if the sandbox refuses what it must


# ---- service -> runner


class _Message(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True, kw_only=True, tag=True):
    """Base: the tag is the class's name."""


class Begin(_Message, frozen=True, tag=True):
    """The job (MessagePack) travels beside this."""

    payload_length: Annotated[int, Meta(ge=2, le=1 << 28)]


class Go(_Message, frozen=True, tag=True):
    """What was decided still holds, now that the copies are made: run it."""


class Stop(_Message, frozen=True, tag=True):
    """End it, whatever stage it is at; answered `Finished` like any end."""

    why: Text


TO_RUNNER: TypeAlias = Begin | Go | Stop


# ---- runner -> service


class Projected(_Message, frozen=True, tag=True):
    """The copies are there, and nothing has run. Waits for `Go`."""

    manifest: str  # sha256:... of the manifest as the sandbox sees it
    files: int
    octets: int
    seconds: float


class Started(_Message, frozen=True, tag=True):
    """The decision is on record, and the gate open."""

    link: int
    policy: str


class Output(_Message, frozen=True, tag=True):
    """A piece of what the command wrote: base64 in JSON."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class Finished(_Message, frozen=True, tag=True):
    """Over, and nothing of it is left: `destroyed` says that this was looked for."""

    status: int
    why: Text = ""  # where it did not end by itself
    hit: tuple[str, ...] = ()  # limits that were reached: fields of `Limits`
    refused: Text = ""  # where it never ran: the reason, for the record and for who administers
    destroyed: bool = False
    counters: dict[str, tuple[int, int]] = {}
    tokens: int = 0
    cost: float = 0.0
    seconds: dict[str, float] = {}  # how long each step took: project, start, run, destroy
    cpu: float = 0.0
    max_rss: int = 0


FROM_RUNNER: TypeAlias = Projected | Started | Output | Finished
