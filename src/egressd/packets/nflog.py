"""The kernel's log of packets: NFLOG messages, read and requested.

A datagram from a netlink socket holds several messages, each with attributes (linux/netlink.h,
linux/netfilter/nfnetlink.h, linux/netfilter/nfnetlink_log.h). Headers of netlink are in the machine's
byte order, numbers inside attributes of nfnetlink in the network's.

Rules of this file: any bytes give values, never an exception. What does not parse is `Malformed`: to be
counted, since something was logged and is now lost.

Exact losses: with `NFULNL_CFG_F_SEQ` the kernel numbers the packets it logs per group, before it tries to
hand them over, so the gap in `Logged.sequence` is the number of packets lost to a full socket buffer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

from egressd.model.identities import check_workspace
from egressd.model.verdicts import Reason
from egressd.packets.netlink import (
    ATTRIBUTE,
    DONE,
    ERROR,
    HEADER,
    NOOP,
    OVERRUN,
    Malformed,
    Overrun,
    aligned,
    attributes,
    pieces,
)

__all__ = ["Failure", "Logged", "Malformed", "Message", "Overrun", "Subject", "configure", "parse", "subject"]

_NLM_F_REQUEST, _NLM_F_ACK = 1, 4  # linux/netlink.h
# linux/netfilter/nfnetlink.h
_SUBSYSTEM_ULOG = 4
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource (the group), big-endian
# linux/netfilter/nfnetlink_log.h
_PACKET, _CONFIG = _SUBSYSTEM_ULOG << 8 | 0, _SUBSYSTEM_ULOG << 8 | 1
_PACKET_HDR, _MARK, _TIMESTAMP, _INDEV, _OUTDEV, _PAYLOAD, _PREFIX, _SEQ = 1, 2, 3, 4, 5, 9, 10, 12
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH, _CFG_FLAGS = 1, 2, 3, 4, 5, 6
_CMD_BIND, _COPY_PACKET, _FLAG_SEQ = 1, 2, 1
_PREFIX_MAX = 127  # NF_LOG_PREFIXLEN with its terminating zero


@dataclass(frozen=True, slots=True)
class Logged:
    """One packet that a rule logged."""

    prefix: str
    payload: bytes  # from the network header on, as much as was asked for
    ethertype: int | None = None
    hook: int | None = None
    group: int = 0
    mark: int = 0
    indev: int | None = None  # interface index in the namespace of the rule
    outdev: int | None = None
    sequence: int | None = None
    time: float | None = None  # seconds since 1970, when the kernel stamped the packet


@dataclass(frozen=True, slots=True)
class Failure:
    """NLMSG_ERROR. `errno` 0 acknowledges a request."""

    errno: int
    request: int  # the sequence number of the request meant


Message: TypeAlias = Logged | Failure | Overrun | Malformed


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose packet, and why it was logged: the meaning of a prefix."""

    workspace: str | None
    reason: Reason


def subject(prefix: str) -> Subject:
    """Read "WORKSPACE REASON", or "- REASON" of what was lost past the guard, where the ruleset does not
    know the workspace and only the link tells it. Anything else is nobody's, for an unknown reason."""
    workspace, _, word = prefix.strip().partition(" ")
    reason = Reason.of(word.rstrip(":").strip())
    if workspace == "-":
        return Subject(None, reason)
    try:
        return Subject(check_workspace(workspace), reason)
    except ValueError:
        return Subject(None, Reason.UNKNOWN)


def parse(datagram: bytes) -> tuple[Message, ...]:
    """All messages of one datagram, in order."""
    found: list[Message] = []
    for piece in pieces(datagram):
        message = piece if isinstance(piece, Malformed) else _message(*piece)
        if message is not None:
            found.append(message)
    return tuple(found)


def _message(kind: int, sequence: int, body: bytes) -> Message | None:
    if kind == _PACKET:
        return _packet(body)
    if kind == ERROR:
        if len(body) < 4:
            return Malformed("an error without its number")
        return Failure(errno=-struct.unpack_from("=i", body)[0], request=sequence)
    if kind == OVERRUN:
        return Overrun()
    if kind in (NOOP, DONE):  # DONE ends each batch of several packets
        return None
    return Malformed(f"message type {kind:#06x} is not one of the packet log's")


def _packet(body: bytes) -> Logged | Malformed:
    if len(body) < _GENERIC.size:
        return Malformed("a packet without its header")
    _, version, group = _GENERIC.unpack_from(body)
    found = attributes(body[_GENERIC.size :])
    if version != 0 or found is None:
        return Malformed("a packet whose attributes do not add up")
    ethertype, hook = _numbers(found, _PACKET_HDR, "!HB", (None, None))
    seconds, micros = _numbers(found, _TIMESTAMP, "!QQ", (None, 0))
    return Logged(
        prefix=found.get(_PREFIX, b"")[:_PREFIX_MAX].partition(b"\0")[0].decode("ascii", "replace"),
        payload=found.get(_PAYLOAD, b""),
        ethertype=ethertype,
        hook=hook,
        group=group,
        mark=_numbers(found, _MARK, "!I", (0,))[0],
        indev=_numbers(found, _INDEV, "!I", (None,))[0],
        outdev=_numbers(found, _OUTDEV, "!I", (None,))[0],
        sequence=_numbers(found, _SEQ, "!I", (None,))[0],
        time=None if seconds is None else seconds + micros / 1e6,
    )


def _numbers(found: dict[int, bytes], kind: int, shape: str, absent: tuple) -> tuple:  # type: ignore[type-arg]
    data = found.get(kind, b"")
    return struct.unpack_from(shape, data) if len(data) >= struct.calcsize(shape) else absent


def configure(
    *, group: int, copy: int = 128, batch: int = 16, delay: int = 5, buffer: int = 1 << 16
) -> bytes:
    """The requests that make a netlink socket (NETLINK_NETFILTER) receive what `group` logs.

    Send as one datagram, with CAP_NET_ADMIN, in the namespace of the rules; three acknowledgements
    (`Failure` with errno 0, requests 1 to 3) come back. The binding is the socket's and survives being
    passed on. `copy` bytes of each packet, handed over after `batch` packets or `delay` hundredths of a
    second, whichever is first, numbered so that losses can be told exactly.
    """
    bind = _attribute(_CFG_CMD, struct.pack("!B", _CMD_BIND))
    mode = _attribute(_CFG_MODE, struct.pack("!IBx", copy, _COPY_PACKET))
    rest = (
        _attribute(_CFG_NLBUFSIZ, struct.pack("!I", buffer))
        + _attribute(_CFG_TIMEOUT, struct.pack("!I", delay))
        + _attribute(_CFG_QTHRESH, struct.pack("!I", batch))
        + _attribute(_CFG_FLAGS, struct.pack("!H", _FLAG_SEQ))
    )
    return b"".join(_request(i, group, body) for i, body in enumerate((bind, mode, rest), start=1))


def _request(sequence: int, group: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(0, 0, group) + attributes
    return HEADER.pack(HEADER.size + len(body), _CONFIG, _NLM_F_REQUEST | _NLM_F_ACK, sequence, 0) + body


def _attribute(kind: int, data: bytes) -> bytes:
    length = ATTRIBUTE.size + len(data)
    return ATTRIBUTE.pack(length, kind) + data + bytes(aligned(length) - length)
