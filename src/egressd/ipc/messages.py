"""The closed set of messages. What is not here cannot be said.

Every message is one datagram of a SOCK_SEQPACKET channel (see ipc/channel.py): JSON with a `type` tag,
unknown fields refused, every field bounded. Bulk (`payload` in the comments) travels beside the message
as one sealed memfd, so that no message is ever split.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from egressd.ruleset.wants import AddressText, Element, MarkValue, NatEntry, WorkspaceName

__all__ = [
    "FROM_CLIENT", "FROM_CUSTODIAN", "FROM_EVIDENCE", "FROM_INSPECTOR", "FROM_RELAY", "FROM_RESOLVER",
    "FROM_WARDEN", "TO_AUDITOR", "TO_CLIENT", "TO_EVIDENCE", "TO_INSPECTOR", "TO_RELAY", "TO_RESOLVER",
    "TO_WARDEN",
]  # fmt: skip

LinkNumber = Annotated[int, Meta(ge=1, le=999_999_999)]
RequestId = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(max_length=4096)]
HostName = Annotated[str, Meta(min_length=1, max_length=253)]
UserId = Annotated[int, Meta(ge=0, le=0xFFFF_FFFE)]
# A link's budget of connections is a bucket of the kernel's that is as good as never filled again; nft counts
# its tokens in nanoseconds, in 64 bits (nft_limit.c).
MOST_CONNECTIONS = 10_000


class _Message(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """Base: the tag is the class's name."""


class _Request(_Message, frozen=True, tag=True):
    request: RequestId


# --------------------------------------------------------------------------------------------------
# controller -> warden: everything the privileged process can be asked to do. Nothing else is.
# Why each is safe though the asker be hostile:
#   SetWorkspaces   only ever writes egressd's own two tables inside the gateway; every field is a number,
#                   an address or a checked identifier. A hostile controller can allow what it likes --
#                   that is what a controller is for -- but reaches no other table, namespace or host.
#   Grant           the same, for the elements of one name at a time; Withdraw only ever takes away.
#   SetNat          the same, for where synthetic addresses lead; real addresses are checked again against
#                   the classes no rule may reach (loopback, link-local, egressd's own pools).
#   OpenLink        the descriptor must be a network namespace (nsfs magic, NS_GET_NSTYPE), owned through a
#                   child user namespace by `owner`, neither init's nor the gateway nor leased already.
#   CloseLink       only ever takes permission away.
#   CutFlows        the same, for open connections.
#   Settle          the same: removes links and chains that no message since the last connect named.
#   Heard           lets the warden forget counters that the asker says it has: its own books, no permission.
#   ReadCounters, ReadRuleset, ReadDrift, ReadFlows, ReadLink   read.


class SetWorkspaces(_Request, frozen=True, tag=True):
    """Make the allow maps exactly the payload's (list[WorkspaceWant]); a diff, in one batch."""

    payload_length: Annotated[int, Meta(ge=2, le=1 << 28)]


class SetNat(_Request, frozen=True, tag=True):
    """Change where slots lead. One batch."""

    entries: Annotated[tuple[NatEntry, ...], Meta(max_length=512)]


class Grant(_Request, frozen=True, tag=True):
    """Add elements to a workspace's allow map and lead their slots: one name that a wildcard covers. One
    batch; they stay until `Withdraw`, or a `SetWorkspaces` that does not name them."""

    workspace: WorkspaceName
    elements: Annotated[tuple[Element, ...], Meta(min_length=1, max_length=256)]
    entries: Annotated[tuple[NatEntry, ...], Meta(max_length=16)]


class Withdraw(_Request, frozen=True, tag=True):
    """Take elements of a workspace away again, and the ways of their slots. One batch."""

    workspace: WorkspaceName
    elements: Annotated[tuple[Element, ...], Meta(min_length=1, max_length=256)]
    entries: Annotated[tuple[NatEntry, ...], Meta(max_length=256)]


class OpenLink(_Request, frozen=True, tag=True):
    """Chain first, then the veth pair into the namespace descriptor sent along, gateway side, up."""

    link: LinkNumber
    workspace: WorkspaceName
    owner: UserId
    quota: Annotated[int, Meta(ge=1, le=1 << 62)] | None = None  # bytes
    connections: Annotated[int, Meta(ge=1, le=MOST_CONNECTIONS)] | None = None  # that may ever be opened
    closed: bool = False  # nothing is admitted, whatever the workspace's policy


class KeepLink(_Request, frozen=True, tag=True):
    """This link is leased; adopt it as it stands in the kernel. After a restart of the warden, or of the
    controller; from then on a namespace descriptor may come along (`Resume`), and it must be the one in which
    the other end of the link lies (RTM_GETNSID, IFLA_LINK_NETNSID), owned through a child user namespace by
    `owner`."""

    link: LinkNumber
    workspace: WorkspaceName
    owner: UserId
    quota: Annotated[int, Meta(ge=1, le=1 << 62)] | None = None
    connections: Annotated[int, Meta(ge=1, le=MOST_CONNECTIONS)] | None = None
    closed: bool = False


class CloseLink(_Request, frozen=True, tag=True):
    link: LinkNumber


class ReadLink(_Request, frozen=True, tag=True):
    """What has this one link counted until now? Answered by `LinkSpent`."""

    link: LinkNumber


class Settle(_Request, frozen=True, tag=True):
    """Links not opened or kept on this connection are removed, with their chains and counters."""


ReportNumber = Annotated[int, Meta(ge=0, le=(1 << 62))]


class Heard(_Request, frozen=True, tag=True):
    """The counters of these reports (`Retired`, `LinkLost`, `LinkClosed`, `Tampered`) are in the books, on
    disk: forget them. With `again`, first thing on a connection, say all others once more: the one who asks
    may not be the one who was told. No report is counted twice, since its number is in the books, too."""

    reports: Annotated[tuple[ReportNumber, ...], Meta(max_length=512)] = ()
    again: bool = False


class ReadCounters(_Request, frozen=True, tag=True):
    """Answered by `Payload`: list[LinkCounters] and per-element counters, see ruleset.observe."""


class ReadRuleset(_Request, frozen=True, tag=True):
    """Answered by `Payload`: the gateway's ruleset as nft lists it (text), or as JSON."""

    json: bool = False


class ReadDrift(_Request, frozen=True, tag=True):
    """Answered by `Payload`: list[str], what would have to change for the kernel, read back now, to be as
    wanted. Nothing is changed."""


class ReadFlows(_Request, frozen=True, tag=True):
    """Answered by `Payload`: list[tuple[int, str]], each (mark, real address) to which some connection of a
    host of this workspace is open now, each once. The mark is of Kind.FORWARD, whoever carries it."""

    workspace: WorkspaceName


class CutFlows(_Request, frozen=True, tag=True):
    """End the open connections of these hosts to these real addresses, on both sides and at once; others of
    the same host stay. What the inspector carries ends as well. Answered `Done` when no byte goes there any
    more."""

    workspace: WorkspaceName
    flows: Annotated[tuple[tuple[MarkValue, AddressText], ...], Meta(min_length=1, max_length=256)]


TO_WARDEN: TypeAlias = (
    SetWorkspaces
    | SetNat
    | Grant
    | Withdraw
    | OpenLink
    | KeepLink
    | CloseLink
    | ReadLink
    | Settle
    | Heard
    | ReadCounters
    | ReadRuleset
    | ReadDrift
    | ReadFlows
    | CutFlows
)


# warden -> controller
class Done(_Request, frozen=True, tag=True):
    """The kernel has acknowledged it."""

    changes: int = 0
    microseconds: int = 0


class Failed(_Request, frozen=True, tag=True):
    """Nothing was granted. `reason` is a `model.verdicts.Reason` value."""

    reason: Annotated[str, Meta(max_length=32)]
    text: Text


class Payload(_Request, frozen=True, tag=True):
    """The bulk answer travels beside this as a sealed memfd of `payload_length` bytes."""

    payload_length: Annotated[int, Meta(ge=0, le=1 << 30)]


class LinkClosed(_Request, frozen=True, tag=True):
    """The link's last counters, read after its device was gone. Asked again, before they were `Heard`, the
    same answer. As a report it is repeated as `LinkLost`."""

    link: LinkNumber
    counters: dict[str, tuple[int, int]]  # "in", "ok", "denied", "other" -> (packets, bytes)
    report: ReportNumber = 0  # see `Heard`; 0: nothing was counted that anybody would have to hear of


class LinkSpent(_Request, frozen=True, tag=True):
    """Counters as in `LinkClosed`, and which of the link's own budgets have refused something, by the names
    of `OpenLink`: "quota", "connections"."""

    link: LinkNumber
    counters: dict[str, tuple[int, int]]
    spent: tuple[Annotated[str, Meta(max_length=32)], ...] = ()


class Tampered(_Message, frozen=True, tag=True):
    """Somebody changed the gateway behind our back; `what` was found missing or foreign, and restored."""

    what: Text
    restored: bool
    process: Text = ""  # who, where netlink says (pid and name)
    lost: dict[str, tuple[int, int]] = {}  # key -> (packets, bytes): last counters of elements that went
    report: ReportNumber = 0


class Retired(_Message, frozen=True, tag=True):
    """Elements that left the maps, with their last counters (from the kernel's own delete events)."""

    workspace: WorkspaceName
    elements: dict[str, tuple[int, int]]  # comment -> (packets, bytes), summed
    dialled: dict[str, tuple[int, int]] = {}  # the same for what the inspector sent on; in no book
    replies: dict[str, tuple[int, int]] = {}  # what sandboxes received, of marks that went with them
    opened: dict[str, tuple[int, int]] = {}  # connections: as packets
    report: ReportNumber = 0


class LinkLost(_Message, frozen=True, tag=True):
    """A link that nobody holds any more was removed, with its last counters. `workspace` is empty where
    neither the warden, itself started anew, nor the link's rules tell it."""

    link: LinkNumber
    workspace: Annotated[str, Meta(max_length=32)]
    counters: dict[str, tuple[int, int]]
    report: ReportNumber = 0


class HostMended(_Message, frozen=True, tag=True):
    """custodian -> controller: somebody changed the host's side of the way out; `what` was found, and put
    right if `restored`."""

    what: Text
    restored: bool
    process: Text = ""  # who, where netlink says


FROM_CUSTODIAN: TypeAlias = HostMended
FROM_WARDEN: TypeAlias = Done | Failed | Payload | LinkClosed | LinkSpent | LinkLost | Tampered | Retired


# --------------------------------------------------------------------------------------------------
# controller -> resolver and back

# What the controller holds a name to beside its class of address: opaque to the resolver, which only keeps
# apart what has other terms. "" for a workspace without a pin; other terms whenever a decision may differ.
NameTerms = Annotated[str, Meta(max_length=128, pattern=r"^[A-Za-z0-9:,/ -]*$")]
RefusedAddresses = Annotated[dict[AddressText, Text], Meta(max_length=8)]


class SetNames(_Request, frozen=True, tag=True):
    """The names of every workspace; payload: list[dns.table.WorkspaceNames]."""

    payload_length: Annotated[int, Meta(ge=2, le=1 << 28)]


class BindSource(_Request, frozen=True, tag=True):
    """From now on these two source addresses are this sandbox (validated by the guard, per link)."""

    link: LinkNumber
    workspace: WorkspaceName
    source4: IPv4Address
    source6: IPv6Address


class UnbindSource(_Request, frozen=True, tag=True):
    link: LinkNumber


class Resolved(_Request, frozen=True, tag=True):
    """resolver -> controller: a name's slots, real address or None, in slot order.

    Answered `Admitted` once the kernel leads there, `Failed` if it does not. Until then no answer is given.
    """

    host: HostName
    private: bool
    slots4: tuple[IPv4Address | None, IPv4Address | None, IPv4Address | None, IPv4Address | None]
    slots6: tuple[IPv6Address | None, IPv6Address | None, IPv6Address | None, IPv6Address | None]
    terms: NameTerms = ""


class GrantName(_Request, frozen=True, tag=True):
    """resolver -> controller: this name, which a wildcard of the workspace covers, was asked for by the
    sandbox on `link` and leads here. Answered `Granted` once the kernel admits it and leads there, `Failed`
    if it does not; nothing is granted then. Until then no answer is given."""

    workspace: WorkspaceName
    link: LinkNumber
    host: HostName
    wildcard: HostName
    slots4: tuple[IPv4Address | None, IPv4Address | None, IPv4Address | None, IPv4Address | None]
    slots6: tuple[IPv6Address | None, IPv6Address | None, IPv6Address | None, IPv6Address | None]


class Admitted(_Request, frozen=True, tag=True):
    """The kernel leads to the slots of `Resolved`, except to addresses that residency refuses: address ->
    why. The same terms refuse the same address always."""

    refused: RefusedAddresses = {}


class Granted(_Request, frozen=True, tag=True):
    """The name's block of synthetic addresses in that workspace; `refused` as in `Admitted`."""

    block: Annotated[int, Meta(ge=1, lt=1 << 14)]
    refused: RefusedAddresses = {}


class ReleaseNames(_Request, frozen=True, tag=True):
    """resolver -> controller: nobody has used these names for a while; take them back. Answered `Done`."""

    workspace: WorkspaceName
    hosts: Annotated[tuple[HostName, ...], Meta(min_length=1, max_length=256)]


class ReadRefused(_Request, frozen=True, tag=True):
    """How many questions were refused? Answered by `RefusedNames`."""


class RefusedNames(_Request, frozen=True, tag=True):
    """Questions refused since the resolver started: workspace -> reason -> count."""

    counts: dict[WorkspaceName, dict[Annotated[str, Meta(max_length=32)], int]]


TO_RESOLVER: TypeAlias = (
    SetNames | BindSource | UnbindSource | ReadRefused | Admitted | Granted | Done | Failed
)
FROM_RESOLVER: TypeAlias = Resolved | GrantName | ReleaseNames | RefusedNames | Done | Failed


# --------------------------------------------------------------------------------------------------
# controller -> relay and back
class Relay(Struct, frozen=True, forbid_unknown_fields=True):
    """A `local:` service: connections from `workspace` to (block, port) go to 127.0.0.1:`port`."""

    workspace: WorkspaceName
    service: HostName
    block: Annotated[int, Meta(ge=0, lt=1 << 14)]
    port: Annotated[int, Meta(ge=1, le=65535)]


class SetRelays(_Request, frozen=True, tag=True):
    """All relays there are. Flows whose relay is no longer among them are closed on both sides before
    `Done` is answered: only then is a revocation complete."""

    relays: Annotated[tuple[Relay, ...], Meta(max_length=1024)]


TO_RELAY: TypeAlias = SetRelays | BindSource | UnbindSource
FROM_RELAY: TypeAlias = Done | Failed


# --------------------------------------------------------------------------------------------------
# controller -> inspector and back
class Site(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A host whose connections are read: those from `workspace` to (block, port) must ask for `host`.

    `index` is the workspace's number: the inspector dials the block's synthetic addresses from that
    workspace's own source address (layout.dial_source), and the kernel admits and translates it."""

    workspace: WorkspaceName
    index: Annotated[int, Meta(ge=1, lt=1 << 13)]
    host: HostName
    block: Annotated[int, Meta(ge=1, lt=1 << 14)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    ech: bool = False  # whether encrypted_client_hello may be there
    idle: float | None = None  # seconds without a byte after which the flow is reset; None: the default


class SetSites(_Request, frozen=True, tag=True):
    """All sites there are; payload: list[Site]. Flows whose site is no longer among them are closed on both
    sides before `Done` is answered: only then is a revocation complete. Other flows stay."""

    payload_length: Annotated[int, Meta(ge=2, le=1 << 28)]


class AddSites(_Request, frozen=True, tag=True):
    """More of them: a wildcard's name was granted. The rest stays."""

    sites: Annotated[tuple[Site, ...], Meta(min_length=1, max_length=256)]


class RemoveSites(_Request, frozen=True, tag=True):
    """Some of them go, with their flows."""

    sites: Annotated[tuple[Site, ...], Meta(min_length=1, max_length=256)]


class RefusedFlows(_Request, frozen=True, tag=True):
    """Connections refused since the inspector started: workspace -> reason -> count."""

    counts: dict[WorkspaceName, dict[Annotated[str, Meta(max_length=32)], int]]


TO_INSPECTOR: TypeAlias = SetSites | AddSites | RemoveSites | BindSource | UnbindSource | ReadRefused
FROM_INSPECTOR: TypeAlias = RefusedFlows | Done | Failed


# --------------------------------------------------------------------------------------------------
# client (broker, egressctl) -> controller and back, over the control socket
class Enter(_Message, frozen=True, tag=True):
    """May I spawn in this workspace? Answered `Terms` or `Refusal`."""

    workspace: Annotated[str, Meta(max_length=256)]


class Attach(_Message, frozen=True, tag=True):
    """After `Enter`: the namespace of my child comes along as the one descriptor. Answered `Lease`.

    `command` is recorded, never interpreted; `digest` is SHA-256 of all its arguments, each ended by a NUL.
    """

    command: Text = ""
    digest: Annotated[str, Meta(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    # Of this sandbox alone; the workspace's own limits hold as well.
    quota: Annotated[int, Meta(ge=1, le=1 << 62)] | None = None  # bytes
    connections: Annotated[int, Meta(ge=1, le=MOST_CONNECTIONS)] | None = None  # that it may ever open
    closed: bool = False  # "network: none": a link over which nothing is admitted


class Resume(_Message, frozen=True, tag=True):
    """On a new connection, after the one that held the lease ended without `Revoked`: egressd was restarted,
    or crashed, and the sandbox goes on. The namespace comes along as the one descriptor, as with `Attach`:
    the link is found by it and by the peer's user, and `link` only says which one is meant. Answered `Lease`;
    a `Refusal` means that the sandbox must end. A lease can be resumed once, for a while after the start.
    """

    link: LinkNumber


class Testify(_Message, frozen=True, tag=True):
    """Put this on record as the asker's word: from root and the brokers that the configuration names, and
    "selftest" from whoever holds the sandbox that it is of. After `Enter`, of that workspace; after `Attach`,
    of that sandbox, too. Answered `Recorded`.

    Workspace, link, boot and the broker's uid are the controller's own additions; `fields` cannot name
    them (`journal.testimony`).
    """

    event: Literal[
        "request-asked",
        "request-decided",
        "request-files",
        "request-refused",
        "request-ended",
        "access-changed",
        "documents-ingested",
        "leftovers-removed",
        "selftest",
    ]
    fields: Annotated[dict[str, Annotated[str, Meta(max_length=4096)] | int | float | bool | None],
                      Meta(max_length=24)]  # fmt: skip


class Recorded(_Message, frozen=True, tag=True):
    """It was handed over, before anything that is recorded later."""


class ReadSpent(_Message, frozen=True, tag=True):
    """After `Attach`: what has my link counted until now? Answered `Spent`."""


class Spent(_Message, frozen=True, tag=True):
    """As `LinkSpent`."""

    counters: dict[str, tuple[int, int]]  # "in", "ok", "denied", "other" -> (packets, bytes)
    spent: tuple[Annotated[str, Meta(max_length=32)], ...] = ()


class Ended(_Message, frozen=True, tag=True):
    """The last word of a broker about its sandbox; recorded as its claim. Never answered."""

    status: Annotated[int, Meta(ge=-128, le=255)]  # exit status; -N: ended by signal N
    why: Annotated[str, Meta(max_length=256)] = ""  # "wall", "revoked", ... where it did not end by itself
    user_seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    system_seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    max_rss: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0  # bytes


class Attempt(_Message, frozen=True, tag=True):
    """Which process inside tried what the gateway will refuse; recorded as the broker's claim, never
    believed. Never answered."""

    protocol: Annotated[str, Meta(max_length=16)]
    destination: Annotated[str, Meta(max_length=45)]  # an address
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    pid: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None  # inside the sandbox's pid namespace
    executable: Annotated[str, Meta(max_length=1024)] = ""
    command: Annotated[str, Meta(max_length=2048)] = ""


class Ask(_Message, frozen=True, tag=True):
    """A reading verb. Answered `Answer` with a JSON document as payload, or `Refusal`."""

    what: Literal["status", "counters", "ruleset", "policy", "diff", "journal", "metrics", "workspaces"]
    workspace: Annotated[str, Meta(max_length=256)] | None = None


class Why(_Message, frozen=True, tag=True):
    """Why is this name, address or sandbox allowed or denied? Answered `Answer`."""

    workspace: Annotated[str, Meta(max_length=256)]
    subject: Annotated[str, Meta(max_length=1024)]


class SelectRoute(_Message, frozen=True, tag=True):
    """Which provider may serve this route now, and why, or why none? Recorded. Answered `Answer`."""

    workspace: Annotated[str, Meta(max_length=256)]
    route: Annotated[str, Meta(max_length=256)]


class ForUser(_Message, frozen=True, tag=True):
    """From root or the HTTP API's own account alone: what this connection asks from here on is asked for that
    user, who sees what a member with this user id and these groups would see. Never answered; said once."""

    uid: UserId
    gids: Annotated[tuple[UserId, ...], Meta(max_length=1024)]


class Apply(_Message, frozen=True, tag=True):
    """Read the policy directory again, and the catalogue and tables of residency, and apply it as one
    change. For root and the daemon's user.

    With `dry_run`, only answer what would change. `why` is recorded with the change: what the caller was
    asked to do ("guard acme enforce"). If that is `about` one workspace, it is recorded with changes of that
    one alone: members read the records of theirs, and changes of others may be applied with it.
    """

    dry_run: bool = False
    why: Annotated[str, Meta(max_length=256)] = ""
    about: Annotated[str, Meta(max_length=64)] = ""


class Prove(_Message, frozen=True, tag=True):
    """Evidence of a workspace, or of one sandbox of it. Answered with the DSSE envelope as document.
    `continues`: records of a checkpoint that somebody kept; that the journal goes on from there is proved."""

    workspace: Annotated[str, Meta(max_length=256)]
    link: LinkNumber | None = None
    since: Annotated[str, Meta(max_length=32)] | None = None  # as a record spells a time
    until: Annotated[str, Meta(max_length=32)] | None = None
    continues: Annotated[int, Meta(ge=1)] | None = None


class ChangeKey(_Message, frozen=True, tag=True):
    """Make a new signing key. For root and the daemon's user. Answered like `Ask(what="journal")`."""


FROM_CLIENT: TypeAlias = (
    Enter
    | Attach
    | Resume
    | Testify
    | ReadSpent
    | Ended
    | Attempt
    | Ask
    | Why
    | SelectRoute
    | ForUser
    | Apply
    | Prove
    | ChangeKey
)


class LocalService(Struct, frozen=True, forbid_unknown_fields=True):
    """A port on the sandbox's own loopback, and the synthetic addresses it is translated to."""

    service: HostName
    port: Annotated[int, Meta(ge=1, le=65535)]
    address4: IPv4Address
    address6: IPv6Address


class Terms(_Message, frozen=True, tag=True):
    """You may. What the sandbox will be held to, and how its inside is laid out."""

    workspace: WorkspaceName
    guard: Literal["off", "observe", "enforce"]
    policy: str  # digest
    wall: float | None = None
    memory: int | None = None
    processes: int | None = None
    services: tuple[LocalService, ...] = ()
    # Where the policy may lead: addresses of its names, and its networks. Who tries another place will be
    # refused, and the broker may say who it was (`Attempt`). As of now: a later policy may lead elsewhere.
    # None: nobody needs to look.
    known: Annotated[tuple[Annotated[str, Meta(max_length=49)], ...], Meta(max_length=256)] | None = None


class Lease(_Message, frozen=True, tag=True):
    """The link is there: this is its address. It goes when this connection closes."""

    link: LinkNumber
    address4: IPv4Address
    address6: IPv6Address


class Refusal(_Message, frozen=True, tag=True):
    """No, and why. `reason` is a `model.verdicts.Reason` value; `text` says what to do about it."""

    reason: Annotated[str, Meta(max_length=32)]
    text: Text


class Revoked(_Message, frozen=True, tag=True):
    """The lease has ended from our side (workspace removed, daemon stopping): the sandbox must end."""

    text: Text


class Answer(_Message, frozen=True, tag=True):
    """The JSON document travels beside this as a sealed memfd of `payload_length` bytes."""

    payload_length: Annotated[int, Meta(ge=0, le=1 << 30)]


PART = 1 << 14  # characters of a document per message: at four bytes each, half of what a message may hold


class Part(_Message, frozen=True, tag=True):
    """A piece of the JSON document; the pieces up to the `last` make it whole.

    Not a descriptor, as among ourselves: one that is sent and not yet read is charged to its sender
    (ETOOMANYREFS, unix(7)), and a stranger need never read. A few of them would have kept the controller
    from handing a namespace to the warden.
    """

    text: Annotated[str, Meta(max_length=PART)]
    last: bool


TO_CLIENT: TypeAlias = Terms | Lease | Recorded | Spent | Refusal | Revoked | Answer | Part


# --------------------------------------------------------------------------------------------------
# anyone -> auditor. Never answered, never waited for.
class Event(_Message, frozen=True, tag=True):
    """Something to be recorded. `fields` are data: the auditor escapes them, nobody interprets them."""

    process: Annotated[str, Meta(max_length=32)]
    event: Annotated[str, Meta(pattern=r"^[a-z][a-z-]{1,40}$")]
    fields: dict[str, str | int | float | bool | None]

    def __post_init__(self) -> None:
        """Names are compared as a whole with those of earlier events: a pattern per name would be a third of
        what the auditor does for an event."""
        names = tuple(self.fields)
        if names in _known_names:
            return
        if not all(map(_FIELD_NAME.fullmatch, names)):
            raise ValueError("a field's name is not spelled as a record spells it")
        if len(_known_names) >= _MOST_KNOWN:
            _known_names.clear()
        if len(names) <= _MOST_NAMES:
            _known_names.add(names)


_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
# More than our own processes use, and few megabytes should one of them be somebody else's.
_MOST_KNOWN, _MOST_NAMES = 1024, 64
_known_names: set[tuple[str, ...]] = set()


class Losses(_Message, frozen=True, tag=True):
    """How many events a process could not hand over since it last said so."""

    process: Annotated[str, Meta(max_length=32)]
    count: Annotated[int, Meta(ge=1, lt=1 << 32)]  # added up in a record, which holds less than 1 << 64


class NameBlocks(_Message, frozen=True, tag=True):
    """From the controller: which host each block of a workspace is, so that a flow, of which the kernel tells
    addresses, is recorded under its name. Further messages tell of more blocks of it, or of other hosts."""

    workspace: WorkspaceName
    index: Annotated[int, Meta(ge=1, lt=1 << 13)]
    hosts: Annotated[dict[int, HostName], Meta(max_length=256)]  # block -> host, as the policy's rows say it


class LinkErased(_Message, frozen=True, tag=True):
    """From the warden: the kernel has forgotten all connections of a closed link, so that the end of each has
    been told."""

    link: LinkNumber


TO_AUDITOR: TypeAlias = Event | Losses | BindSource | UnbindSource | NameBlocks | LinkErased


# --------------------------------------------------------------------------------------------------
# controller -> auditor and back, on a channel of its own ("evidence"): what has an answer.
class ReadJournal(_Request, frozen=True, tag=True):
    """How is the journal? Answered by `JournalState`."""


class JournalState(_Request, frozen=True, tag=True):
    """Records and bytes on disk, what waits in the queue, what was lost since the auditor started, seconds
    since the oldest waiting record was submitted, and the last checkpoint."""

    records: int
    octets: int
    segments: int
    queued: int
    lag: float  # seconds; 0: nothing waits
    lost: dict[Annotated[str, Meta(max_length=64)], int]  # cause -> count
    failing: Text = ""  # why the disk refuses, if it does
    origin: Text = ""
    key: Text = ""  # the public key in force, as signed-note verifier key
    checkpoint_size: int = 0
    checkpoint_time: float = 0.0  # Unix time; 0: none yet


class MakeProof(_Request, frozen=True, tag=True):
    """Answered by `Payload` (the DSSE envelope), or `Failed`. The payload sent along is the controller's
    part of the statement (journal.statement.Facts as JSON). `after`: id of the snapshot that must be on disk
    first."""

    payload_length: Annotated[int, Meta(ge=2, le=1 << 30)]
    workspace: WorkspaceName
    link: LinkNumber | None = None  # a receipt: of this link alone
    since: Annotated[str, Meta(max_length=32)] | None = None  # a record's time; None: from the beginning
    until: Annotated[str, Meta(max_length=32)] | None = None  # None: now
    after: Annotated[str, Meta(max_length=64)] = ""
    continues: Annotated[int, Meta(ge=1)] | None = None  # records of an earlier checkpoint


class RotateKey(_Request, frozen=True, tag=True):
    """Make a new signing key; both keys sign the first checkpoint after it. Answered by `JournalState`."""


TO_EVIDENCE: TypeAlias = ReadJournal | MakeProof | RotateKey
FROM_EVIDENCE: TypeAlias = JournalState | Payload | Done | Failed


# --------------------------------------------------------------------------------------------------
# child -> supervisor and back. The supervisor reads nothing else.
class Ready(_Message, frozen=True, tag=True):
    """The process has given up its rights and serves."""


class Heartbeat(_Message, frozen=True, tag=True):
    """The process's loop still turns; sent every `HEARTBEAT` seconds."""


FROM_CHILD: TypeAlias = Ready | Heartbeat
HEARTBEAT = 2.0  # seconds


class NewPeer(_Message, frozen=True, tag=True):
    """Another process was restarted: the descriptor sent along is the new channel to it, under the
    name the old one had on the command line (`--fd NAME=N`)."""

    name: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class ProcessState(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    pid: int
    state: Literal["starting", "running", "down"]
    restarts: int


class ProcessTable(_Message, frozen=True, tag=True):
    """To the controller alone, for `status`: how the processes are."""

    processes: tuple[ProcessState, ...]


TO_CHILD: TypeAlias = NewPeer | ProcessTable
