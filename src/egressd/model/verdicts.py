"""Verdicts and reasons. The absent, unknown or zero verdict is *denied*."""

from __future__ import annotations

import enum

__all__ = ["Reason", "Verdict"]


class Verdict(enum.IntEnum):
    """What is decided about an attempt. Zero denies, so an unfilled decision denies."""

    DENIED = 0
    ALLOWED = 1

    def __str__(self) -> str:
        return self.name.lower()


class Reason(enum.StrEnum):
    """Why. The value is what counters, log prefixes and the journal spell; `text` is for people."""

    # decided by policy
    UNKNOWN = "unknown"
    ALLOWED = "allowed"
    UNRESTRICTED = "unrestricted"
    UNLISTED = "unlisted"
    PORT = "port"
    ADDRESS = "address"
    RESIDENCY = "residency"
    LOCAL_ONLY = "local-only"
    # decided by the guard at the link, in the kernel (chain names end in these words)
    SOURCE = "source"
    SHAPE = "shape"
    QUOTA = "quota"
    CONNECTIONS = "connections"
    BUDGET_CONNECTIONS = "budget-connections"
    CLOSED = "closed"
    UNRESOLVED = "unresolved"
    INVALID = "invalid"
    NOT_IP = "not-ip"
    UNMARKED = "unmarked"
    REPLY = "reply"
    INSPECTOR = "inspector"
    PACE = "pace"
    DIAL = "dial"
    MISROUTED = "misrouted"
    CUT = "cut"
    # decided by the resolver
    NAME = "name"
    UPSTREAM = "upstream"
    TYPE = "type"
    BUDGET_NAMES = "budget-names"
    BUDGET_BYTES = "budget-bytes"
    BUDGET_RATE = "budget-rate"
    # decided by the inspector
    SNI_MISSING = "sni-missing"
    SNI_ADDRESS = "sni-address"
    SNI_REPEATED = "sni-repeated"
    SNI_OTHER = "sni-other"
    ECH = "ech"
    NOT_TLS = "not-tls"
    HELLO_MALFORMED = "hello-malformed"
    HELLO_TOO_LONG = "hello-too-long"
    HELLO_TOO_SLOW = "hello-too-slow"
    # decided by the controller
    WORKSPACE = "workspace"
    MEMBER = "member"
    NAMESPACE = "namespace"
    LIMIT = "limit"
    UNAVAILABLE = "unavailable"
    PROTOCOL = "protocol"
    FILES = "files"

    @classmethod
    def of(cls, value: str) -> Reason:
        """The reason spelled `value`; UNKNOWN for anything else, which denies."""
        try:
            return cls(value)
        except ValueError:
            return cls.UNKNOWN

    @property
    def text(self) -> str:
        """One sentence a person can act on."""
        return _TEXTS[self]


_TEXTS: dict[Reason, str] = {
    Reason.UNKNOWN: "no decision was made, and what is not decided is denied",
    Reason.ALLOWED: "a rule of the workspace allows it",
    Reason.UNRESTRICTED: "the workspace's guard is off or observing: counted, not restricted",
    Reason.UNLISTED: "no rule of the workspace allows this destination",
    Reason.PORT: "the host is allowed, but not on this port or protocol",
    Reason.ADDRESS: "the address is of a kind that rules may not reach",
    Reason.RESIDENCY: "it is not known to be where the workspace's residency allows",
    Reason.LOCAL_ONLY: "external routing is off in this workspace: only local and cidr rules remain",
    Reason.SOURCE: "the packet's source address is not the sandbox's own",
    Reason.SHAPE: "IP fragments, IP options and extension headers are not let through",
    Reason.QUOTA: "the sandbox has used up the bytes that it may send",
    Reason.CONNECTIONS: "the sandbox has as many open connections as its limit allows",
    Reason.BUDGET_CONNECTIONS: "the sandbox has opened as many connections as it may ever open",
    Reason.CLOSED: "the sandbox was started without a network",
    Reason.UNRESOLVED: "the name has no address in this family",
    Reason.INVALID: "connection tracking does not recognise the packet as part of any connection",
    Reason.NOT_IP: "the frame is neither IPv4 nor IPv6",
    Reason.UNMARKED: "the packet came over a link without having passed its guard",
    Reason.REPLY: "a sandbox answered; nobody may connect to one",
    Reason.PACE: "the sandbox begins connections, or asks the resolver, faster than any one sandbox may",
    Reason.INSPECTOR: "the inspector, which must read this connection, is not running",
    Reason.DIAL: "the inspector dialled what no rule of the workspace allows, or allows any more",
    Reason.MISROUTED: "the packet was admitted, but its way does not lead to where its mark permits",
    Reason.CUT: "the connection was ended: residency does not allow its address any more",
    Reason.NAME: "the name is not on the workspace's list",
    Reason.UPSTREAM: "the upstream resolver gave no usable answer",
    Reason.TYPE: "only address records are answered for this name",
    Reason.BUDGET_NAMES: "as many different names of wildcards have been asked for as the budget allows",
    Reason.BUDGET_BYTES: "the bytes of names of wildcards that may be asked upstream are used up",
    Reason.BUDGET_RATE: "fresh names of wildcards are asked for faster than the budget allows",
    Reason.SNI_MISSING: "the TLS ClientHello names no server",
    Reason.SNI_ADDRESS: "the TLS ClientHello names an address instead of a server",
    Reason.SNI_REPEATED: "the TLS ClientHello names more than one server",
    Reason.SNI_OTHER: "the TLS ClientHello names another server than the one whose address was used",
    Reason.ECH: "the TLS ClientHello may hide another name (encrypted_client_hello); see ech: allow",
    Reason.NOT_TLS: "what was sent is not TLS, and the rule says that it is; see verify: address",
    Reason.HELLO_MALFORMED: "the TLS ClientHello is not well formed",
    Reason.HELLO_TOO_LONG: "the TLS ClientHello is longer than any client's",
    Reason.HELLO_TOO_SLOW: "the TLS ClientHello did not arrive in time",
    Reason.WORKSPACE: "there is no workspace of that name, or its policy is broken",
    Reason.MEMBER: "the caller is not a member of the workspace",
    Reason.NAMESPACE: "the descriptor is not a fresh network namespace owned by the caller",
    Reason.LIMIT: "a limit on sandboxes or connections is reached",
    Reason.UNAVAILABLE: "a part of egressd that must confirm this is not running",
    Reason.PROTOCOL: "the request is not one egressd understands",
    Reason.FILES: "the directory holds something that cannot be shown to a sandbox",
}
