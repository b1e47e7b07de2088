"""What can be answered, as values. `wire.encode` turns one into bytes; nothing else knows how.

A denial always says why, in an Extended DNS Error (RFC 8914) for whoever sent EDNS.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from egressd.model.addresses import Address
from egressd.model.verdicts import Reason

__all__ = [
    "ANSWER_TTL", "DENIED_TTL", "Extended", "Failure", "Rcode", "Reply", "Type", "addresses", "any_type",
    "blocked", "failure", "no_data", "no_name", "pointer", "refused", "stale", "unknown_version",
]  # fmt: skip

ANSWER_TTL = 60  # seconds; synthetic addresses are stable, so this only bounds how soon a new family shows
STALE_TTL = 30  # seconds; RFC 8767 section 4
DENIED_TTL = 5  # seconds; a policy change should be felt soon, and nobody upstream is spared by caching
_MAX_TEXT = 240  # bytes of UTF-8 in an Extended DNS Error


class Rcode(enum.IntEnum):
    """RFC 6895 section 2.3. BADVERS needs the four upper bits that EDNS adds."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Type(enum.IntEnum):
    """The record types somebody here treats specially; a query's type may be any 16-bit number."""

    A = 1
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    AAAA = 28
    OPT = 41
    SVCB = 64
    HTTPS = 65
    IXFR = 251
    AXFR = 252
    ANY = 255


class Extended(enum.IntEnum):
    """Extended DNS Error codes, RFC 8914 section 4."""

    OTHER = 0
    STALE_ANSWER = 3
    NOT_READY = 14
    BLOCKED = 15
    PROHIBITED = 18
    NOT_SUPPORTED = 21
    NO_REACHABLE_AUTHORITY = 22
    NETWORK_ERROR = 23


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer: an Extended DNS Error code and a text for people. With a `reason` it is a
    denial of ours, answered and counted as one."""

    code: int
    text: str
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `ttl` is of every record in it; `negative` adds the SOA that RFC 2308 wants."""

    rcode: Rcode = Rcode.NOERROR
    addresses: tuple[Address, ...] = ()
    pointer: str | None = None  # a PTR record's target
    hinfo: bool = False  # RFC 8482 section 4.2
    ttl: int = ANSWER_TTL
    negative: bool = False
    extended: int | None = None
    text: str = ""
    shared: bool = True  # another sandbox of the workspace may be given the same bytes, unasked


def addresses(found: tuple[Address, ...], *, ttl: int = ANSWER_TTL) -> Reply:
    return Reply(addresses=found, ttl=ttl)


def stale(found: tuple[Address, ...]) -> Reply:
    """The last good ones, while upstream fails (RFC 8767; the Extended Error is RFC 8914 section 4.4)."""
    return Reply(addresses=found, ttl=STALE_TTL, extended=Extended.STALE_ANSWER)


def pointer(name: str) -> Reply:
    return Reply(pointer=name)


def any_type() -> Reply:
    """The conventional, small answer to ANY (RFC 8482)."""
    return Reply(hinfo=True)


def no_data(*, ttl: int = DENIED_TTL, extended: int | None = None, text: str = "") -> Reply:
    """The name exists, but has no record of this type (RFC 2308 section 2.2)."""
    return Reply(negative=True, ttl=ttl, extended=extended, text=_bounded(text))


def no_name(*, ttl: int) -> Reply:
    """Upstream says that there is no such name; not a denial of ours, so without an Extended Error."""
    return Reply(rcode=Rcode.NXDOMAIN, negative=True, ttl=ttl)


def blocked(text: str) -> Reply:
    """Off the list. NXDOMAIN because every resolver library fails on it at once; musl waits 5 s on others."""
    return Reply(
        rcode=Rcode.NXDOMAIN, negative=True, ttl=DENIED_TTL, extended=Extended.BLOCKED, text=_bounded(text)
    )


def failure(extended: int, text: str) -> Reply:
    return Reply(rcode=Rcode.SERVFAIL, extended=extended, text=_bounded(text))


def refused(text: str) -> Reply:
    return Reply(rcode=Rcode.REFUSED, extended=Extended.PROHIBITED, text=_bounded(text))


def unknown_version() -> Reply:
    """An EDNS version above 0 (RFC 6891 section 6.1.3)."""
    return Reply(rcode=Rcode.BADVERS)


def _bounded(text: str) -> str:
    return text.encode()[:_MAX_TEXT].decode(errors="ignore")
