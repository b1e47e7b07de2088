"""Who runs with which rights: one card per process, on one screen.

`capabilities` is what remains once the process runs (and all that its bounding set holds); `user` is a key
of the configuration's `users`. What each reads from strangers decides what it may not have.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CARDS", "Capability", "Card", "Namespace"]


class Capability(enum.IntEnum):
    """Numbers of linux/capability.h."""

    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_ADMIN = 12


class Namespace(enum.StrEnum):
    GATEWAY = "gateway"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    user: str  # "root" or a key of `Config.user`
    namespace: Namespace
    capabilities: frozenset[Capability]
    reads: str  # what it reads from strangers
    does: str
    groups: tuple[str, ...] = ()  # keys of `Config.user` whose groups it is in beside its own


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="supervisor",
            user="root",
            namespace=Namespace.HOST,
            # SETUID, SETGID: a child gives up root itself, but must be able to. KILL: end a hung child of
            # another user. NET_ADMIN and SETPCAP: permitted, never effective here: only to be handed to
            # the warden it restarts, and to let children empty their bounding sets.
            capabilities=frozenset(
                {
                    Capability.SETUID,
                    Capability.SETGID,
                    Capability.KILL,
                    Capability.SETPCAP,
                    Capability.NET_ADMIN,
                }
            ),
            reads="nothing",
            does="starts and restarts the others, with their sockets open",
        ),
        Card(
            name="warden",
            user="warden",
            namespace=Namespace.GATEWAY,
            capabilities=frozenset({Capability.NET_ADMIN}),
            reads="nothing: typed messages from the controller",
            does="applies one nft batch, makes one veth, reads counters",
        ),
        Card(
            name="custodian",
            user="custody",
            namespace=Namespace.HOST,
            capabilities=frozenset({Capability.NET_ADMIN}),
            # From the gateway it hears of connections that ended, over a socket that can say nothing there.
            reads="nothing: the kernel's word of changes to the host's network, and of connections' ends",
            does="puts the host's side back when somebody flushes it; nothing waits for it",
        ),
        Card(
            name="controller",
            user="daemon",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="policy files; the control socket, peer credentials checked",
            does="compiles policy, keeps the sandbox table, decides who may spawn where",
        ),
        Card(
            name="resolver",
            user="resolve",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="DNS from sandboxes and from upstream",
            does="answers names, keeps real addresses fresh",
        ),
        Card(
            name="relay",
            user="relay",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="connections steered to it",
            does="carries connections to local services",
        ),
        Card(
            name="inspector",
            user="inspect",
            # It dials from there, so that the kernel looks up where to; in the host it could dial anything.
            namespace=Namespace.GATEWAY,
            capabilities=frozenset(),
            reads="connections steered to it; the first bytes of both sides",
            does="lets TLS through that asks for the host it was sent to",
        ),
        Card(
            name="auditor",
            user="audit",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="the kernel's log of denials and of ended connections, events from the others",
            does="writes and signs the journal; never blocks anybody",
        ),
        Card(
            name="exporter",
            user="metrics",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="HTTP from whoever reaches its socket",
            does="tells metrics, where they are configured; nothing waits for it",
        ),
        Card(
            name="api",
            user="api",
            namespace=Namespace.HOST,
            capabilities=frozenset(),
            reads="HTTP from users of this machine",
            does="tells each user what they may know, where it is configured; changes nothing",
            groups=("audit",),  # the journal's files are for it to read (journal_tree.FILE_MODE)
        ),
    )
}
