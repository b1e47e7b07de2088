"""Bytes to values and back. The only module that imports dnslib.

Theory of operation. Reading is done by a small cursor of our own: dnslib parses the data of every record
type it knows, follows compression pointers in ways that can recurse without end, and fails with whatever
exception comes up. What a stranger sends is read here for exactly the fields that somebody uses, every
step bounded. Queries of the common form are read, and answers of the common forms written, by code that
does nothing else, because a sandbox can ask for as many names that nobody knows as it likes; the rest is
the cursor's and dnslib's, which also say in the tests what the fast code must come to.

Rules of this file: any bytes give a value (`Query`, `Malformed`, `Response`) or None, never an exception.
A name is *canonical* when it is lower case, without final dot, every byte that is not a letter, digit,
hyphen or underscore written as a decimal escape of RFC 4343 section 2.1 -- a name with a dot or a NUL
inside a label therefore never equals a listed one.

Formats: RFC 1035 section 4, EDNS RFC 6891, Extended DNS Errors RFC 8914, negative answers RFC 2308.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple, TypeAlias

import dnslib

from egressd.dns.replies import Rcode, Reply, Type
from egressd.model.addresses import Address

__all__ = [
    "UDP_SIZE", "Answer", "Edns", "Labels", "Malformed", "Query", "Response", "canonical", "encode",
    "labels_of", "malformed", "query", "read_query", "read_response", "reverse_address", "type_name",
]  # fmt: skip

UDP_SIZE = 1232  # bytes: what we send and announce (DNS flag day 2020)
CHAIN_LIMIT = 8  # CNAMEs followed
_PLAIN_UDP_SIZE = 512  # RFC 1035 section 4.2.1
_MAX_NAME = 255  # bytes on the wire, RFC 1035 section 2.3.4
_MAX_ADDRESSES = 64  # of one answer; more than any honest one, and only four are used
_HEADER = struct.Struct("!6H")
_RECORD = struct.Struct("!HHIH")
_QR, _TC, _RD, _RA, _CD = 0x8000, 0x0200, 0x0100, 0x0080, 0x0010
_IN = 1
_OPTION_EDE = 15  # RFC 8914 section 2
_LABEL_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")
_NAME_BYTES = bytes(_LABEL_BYTES) + b"."

Labels: TypeAlias = tuple[bytes, ...]


class _WireError(Exception):
    """Inside this file only: the bytes are not a DNS message."""


@dataclass(frozen=True, slots=True)
class Edns:
    """What a client's OPT record says that matters here. Its options (cookies, client subnet) are not
    read: nothing of them travels."""

    size: int
    version: int
    dnssec_ok: bool


class Query(NamedTuple):
    """One well-formed question. A tuple, because making one is most of what reading one costs."""

    id: int
    labels: Labels  # as asked, case kept (0x20)
    name: str  # canonical
    qtype: int
    qclass: int
    recursion: bool
    checking_disabled: bool
    edns: Edns | None
    echo: bytes = b""  # the question section as it came; empty: to be made from the labels


@dataclass(frozen=True, slots=True)
class Malformed:
    """A message that deserves an answer but not attention. See `malformed`."""

    id: int
    opcode: int
    recursion: bool
    rcode: Rcode


@dataclass(frozen=True, slots=True)
class Answer:
    """What an upstream response says about one address family of a name.

    `addresses` empty with `rcode` NOERROR is NODATA; `ttl` is then the negative TTL in seconds.
    """

    rcode: int
    addresses: tuple[Address, ...]
    ttl: int
    extended: int | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """An upstream response; `answer` is None when it is truncated or its records make no sense."""

    id: int
    name: str
    qtype: int
    qclass: int
    truncated: bool
    answer: Answer | None


# ---- names


def canonical(labels: Labels) -> str:
    """The name as text; the root is the empty string. Inverse of `labels_of` for listed names."""
    text = b".".join(labels).lower()
    if not text.translate(None, _NAME_BYTES) and text.count(b".") == len(labels) - 1:
        return text.decode("ascii")
    return ".".join(_label_text(label.lower()) for label in labels)


def _label_text(label: bytes) -> str:
    if _LABEL_BYTES.issuperset(label):
        return label.decode("ascii")
    return "".join(chr(c) if c in _LABEL_BYTES else f"\\{c:03d}" for c in label)


def labels_of(name: str) -> Labels:
    """The labels of a canonical name without escapes."""
    return tuple(label.encode("ascii") for label in name.split(".")) if name else ()


def type_name(qtype: int) -> str:
    """ "AAAA", or "TYPE65280" as RFC 3597 section 5 spells what has no name."""
    return str(dnslib.QTYPE.forward.get(qtype, f"TYPE{qtype}"))


def reverse_address(name: str) -> Address | None:
    """The address whose reverse name this is (RFC 1035 section 3.5, RFC 3596 section 2.5), or None."""
    parts = name.split(".")
    if name.endswith(".in-addr.arpa") and len(parts) == 6:
        octets = [int(p) for p in parts[3::-1] if p.isascii() and p.isdigit() and len(p) <= 3]
        return IPv4Address(bytes(octets)) if len(octets) == 4 and max(octets) < 256 else None
    if name.endswith(".ip6.arpa") and len(parts) == 34:
        digits = "".join(parts[31::-1])
        return IPv6Address(bytes.fromhex(digits)) if _is_hex(digits) else None
    return None


def _is_hex(digits: str) -> bool:
    return len(digits) == 32 and all(c in "0123456789abcdef" for c in digits)


# ---- reading


class _Cursor:
    """A position in a message. Every step checks that the bytes are there."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        if self.at + layout.size > len(self.data):
            raise _WireError
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def bytes(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise _WireError
        self.at += length
        return self.data[self.at - length : self.at]

    def name(self, *, compressed: bool = True) -> Labels:
        """A name. Each pointer must lead before the place the previous one led to, so it must end."""
        labels: list[bytes] = []
        size, position, resume, floor = 0, self.at, None, self.at
        while True:
            length = self._byte(position)
            if length >= 0xC0:
                target = (length & 0x3F) << 8 | self._byte(position + 1)
                if not compressed or target >= floor:
                    raise _WireError
                resume = position + 2 if resume is None else resume
                position = floor = target
                continue
            size += length + 1
            if length > 63 or size > _MAX_NAME or position + 1 + length > len(self.data):
                raise _WireError
            position += 1 + length
            if not length:
                break
            labels.append(self.data[position - length : position])
        self.at = position if resume is None else resume
        return tuple(labels)

    def _byte(self, position: int) -> int:
        if position >= len(self.data):
            raise _WireError
        return self.data[position]


_HH = struct.Struct("!HH")


def read_query(data: bytes) -> Query | Malformed | None:
    """A client's message. None is silence: what is too short to have an id, and what is itself a
    response (answering those lets two servers answer each other for ever)."""
    if len(data) < _HEADER.size:
        return None
    number, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        return None
    opcode, recursion = flags >> 11 & 0xF, bool(flags & _RD)
    if opcode != 0:
        return Malformed(number, opcode, recursion, Rcode.NOTIMP)
    if questions == 1 and not answers and not authorities and additional <= 1:
        found = _read_plain(data, number, flags, additional)
        if found is not None:
            return found
    # Exactly one question (RFC 9619); a query carries no answers; OPT and at most one signature.
    if questions == 1 and not answers and not authorities and additional <= 2:
        try:
            return _read_query(data, number, flags, additional)
        except _WireError:
            pass
    return Malformed(number, opcode, recursion, Rcode.FORMERR)


def _read_plain(data: bytes, number: int, flags: int, additional: int) -> Query | None:
    """Nearly every query: a name, and OPT without options or nothing. None for whatever is different,
    right or wrong: `_read_query` decides about it."""
    labels, end = [], len(data)
    position, length = _HEADER.size + 1, data[_HEADER.size] if end > _HEADER.size else 0xFF
    while 0 < length < 64:
        following = position + length
        if following >= end:
            return None
        labels.append(data[position:following])
        position, length = following + 1, data[following]
    rest = end - position
    if length or position > _HEADER.size + _MAX_NAME or rest != (_QUESTION_OPT if additional else _HH.size):
        return None
    edns = None
    if additional:
        qtype, qclass, root, kind, size, ttl, options = _PLAIN.unpack_from(data, position)
        if root or kind != _OPT or options:
            return None
        edns = _edns(size, ttl)
    else:
        qtype, qclass = _HH.unpack_from(data, position)
    chosen = tuple(labels)
    echo = data[_HEADER.size : position + _HH.size]
    recursion, checking_disabled = bool(flags & _RD), bool(flags & _CD)
    return Query(number, chosen, canonical(chosen), qtype, qclass, recursion, checking_disabled, edns, echo)


_PLAIN = struct.Struct("!HHBHHIH")  # type and class of the question, then OPT
_QUESTION_OPT = _PLAIN.size
_OPT = int(Type.OPT)


@functools.lru_cache(maxsize=64)
def _edns(size: int, ttl: int) -> Edns:
    return Edns(size=size, version=ttl >> 16 & 0xFF, dnssec_ok=bool(ttl & 0x8000))


def _read_query(data: bytes, number: int, flags: int, additional: int) -> Query:
    cursor = _Cursor(data, _HEADER.size)
    labels = cursor.name(compressed=False)
    qtype, qclass = cursor.take(_HH)
    echo = data[_HEADER.size : cursor.at]
    edns = None
    for _ in range(additional):
        owner = cursor.name()
        kind, size, ttl, length = cursor.take(_RECORD)
        rdata = cursor.bytes(length)
        if kind != Type.OPT:
            continue
        if edns is not None or owner:  # one OPT only, at the root: RFC 6891 section 6.1.1
            raise _WireError
        for _ in _options(rdata):
            pass
        edns = _edns(size, ttl)
    if cursor.at != len(data):
        raise _WireError
    recursion, checking_disabled = bool(flags & _RD), bool(flags & _CD)
    return Query(number, labels, canonical(labels), qtype, qclass, recursion, checking_disabled, edns, echo)


def _options(rdata: bytes) -> Iterator[tuple[int, bytes]]:
    cursor = _Cursor(rdata)
    while cursor.at < len(rdata):
        code, length = cursor.take(_HH)
        yield code, cursor.bytes(length)


@dataclass(slots=True)
class _Sections:
    """The records of a response that matter, by canonical owner name."""

    aliases: dict[str, tuple[str, int]]
    addresses: dict[str, list[tuple[Address, int]]]
    negative: int | None = None
    extended: int | None = None


def read_response(data: bytes) -> Response | None:
    """An upstream message, or None when it is not a response to one question."""
    try:
        cursor = _Cursor(data)
        number, flags, questions, *counts = cursor.take(_HEADER)
        if not flags & _QR or flags >> 11 & 0xF or questions != 1:
            return None
        name = canonical(cursor.name(compressed=False))
        qtype, qclass = cursor.take(_HH)
    except _WireError:
        return None
    truncated = bool(flags & _TC)
    answer = None if truncated else _read_answer(cursor, flags & 0xF, counts, name, qtype)
    return Response(number, name, qtype, qclass, truncated, answer)


def _read_answer(cursor: _Cursor, rcode: int, counts: list[int], name: str, qtype: int) -> Answer | None:
    sections = _Sections({}, {})
    try:
        for section, count in enumerate(counts):
            for _ in range(count):
                rcode = _read_record(cursor, sections, section, qtype, rcode)
        return _follow(sections, rcode, name)
    except _WireError:
        return None


def _read_record(cursor: _Cursor, sections: _Sections, section: int, qtype: int, rcode: int) -> int:
    """Read one record; returns the response code, to which OPT adds its upper bits."""
    owner = canonical(cursor.name())
    kind, rclass, ttl, length = cursor.take(_RECORD)
    end = cursor.at + length
    if end > len(cursor.data):
        raise _WireError
    ttl = 0 if ttl > 0x7FFF_FFFF else ttl  # RFC 2181 section 8
    if kind == Type.OPT and section == 2:
        rcode |= (ttl >> 24) << 4
        sections.extended = _extended(cursor.bytes(length))
    elif section == 0 and rclass == _IN and kind in (Type.CNAME, qtype):
        _keep(cursor, sections, owner, (kind, ttl, length))
    elif section == 1 and rclass == _IN and kind == Type.SOA:
        cursor.name(), cursor.name()
        sections.negative = min(ttl, cursor.take(_SOA)[4])  # RFC 2308 section 5
    cursor.at = end
    return rcode


_SOA = struct.Struct("!5I")


def _extended(rdata: bytes) -> int | None:
    codes = (int.from_bytes(data[:2], "big") for code, data in _options(rdata) if code == _OPTION_EDE)
    return next(codes, None)


def _keep(cursor: _Cursor, sections: _Sections, owner: str, record: tuple[int, int, int]) -> None:
    kind, ttl, length = record
    if kind == Type.CNAME:
        sections.aliases.setdefault(owner, (canonical(cursor.name()), ttl))
        return
    found = sections.addresses.setdefault(owner, [])
    if len(found) >= _MAX_ADDRESSES:
        return
    if kind == Type.A and length == 4:
        found.append((IPv4Address(cursor.bytes(4)), ttl))
    elif kind == Type.AAAA and length == 16:
        found.append((IPv6Address(cursor.bytes(16)), ttl))
    elif kind in (Type.A, Type.AAAA):
        raise _WireError


def _follow(sections: _Sections, rcode: int, name: str) -> Answer | None:
    """Follow the chain of aliases inside the answer. None when it is longer than anyone honest needs.

    The names on the way grant nothing; only their TTLs count.
    """
    ttls = []
    for _ in range(CHAIN_LIMIT + 1):
        if name not in sections.aliases:
            break
        name, ttl = sections.aliases[name]
        ttls.append(ttl)
    else:
        return None
    found = sections.addresses.get(name, [])
    ttls += [ttl for _, ttl in found]
    if rcode != Rcode.NOERROR or not found:
        ttl = _NO_SOA_TTL if sections.negative is None else sections.negative
        return Answer(rcode, (), ttl, sections.extended)
    return Answer(rcode, tuple(dict.fromkeys(a for a, _ in found)), min(ttls), sections.extended)


_NO_SOA_TTL = 30  # seconds; a negative answer without SOA must not be cached (RFC 2308 section 5), only paced


# ---- writing


def query(*, id: int, labels: Labels, qtype: int) -> bytes:
    """A question of our own to an upstream server: recursion desired, lower case, our EDNS, no options."""
    record = _record(header=_header(id=id, flags=_RD))
    record.add_question(dnslib.DNSQuestion(_label(tuple(x.lower() for x in labels)), qtype))
    record.add_ar(dnslib.EDNS0(udp_len=UDP_SIZE))
    return bytes(record.pack())


def malformed(message: Malformed) -> bytes:
    """A header that says what was wrong."""
    flags = _QR | message.opcode << 11 | (_RD if message.recursion else 0) | _RA | message.rcode
    return _HEADER.pack(message.id, flags, 0, 0, 0, 0)


def encode(asked: Query, reply: Reply, *, udp: bool) -> bytes:
    """The answer to `asked`; over UDP cut to what the client takes, with TC set when cut.

    The question and the owner names keep the asker's case: owners are pointers to the question.
    """
    limit = _limit(asked, udp=udp)
    data = _pack(asked, reply, text=reply.text)
    if len(data) > limit and reply.text:
        data = _pack(asked, reply, text="")
    if len(data) > limit:
        data = _pack(asked, Reply(rcode=reply.rcode, extended=reply.extended), text="", truncated=True)
    return data


def _limit(asked: Query, *, udp: bool) -> int:
    if not udp:
        return 0xFFFF
    return _PLAIN_UDP_SIZE if asked.edns is None else min(max(asked.edns.size, _PLAIN_UDP_SIZE), UDP_SIZE)


def _pack(asked: Query, reply: Reply, *, text: str, truncated: bool = False) -> bytes:
    if reply.pointer is None and not reply.hinfo:
        return _pack_plain(asked, reply, text, truncated)
    return _pack_any(asked, reply, text=text, truncated=truncated)


def _flags(asked: Query, reply: Reply, truncated: bool) -> int:
    flags = _QR | _RA | (_RD if asked.recursion else 0) | (_CD if asked.checking_disabled else 0)
    return flags | (_TC if truncated else 0) | (reply.rcode & 0xF)


def _pack_plain(asked: Query, reply: Reply, text: str, truncated: bool) -> bytes:
    """Addresses, or what says that there are none, written by hand: dnslib takes ten times as long."""
    question = asked.echo or _question(asked)
    owner = b"\xc0\x0c" if asked.labels else b"\x00"
    parts = [b"", question]
    for address in reply.addresses:
        packed = address.packed
        parts += (owner, _RECORD.pack(1 if len(packed) == 4 else 28, _IN, reply.ttl, len(packed)), packed)
    if reply.negative:
        parts.append(_negative(reply.ttl))
    if asked.edns is not None:
        parts.append(_plain_opt(asked.edns, reply, text))
    additional = 0 if asked.edns is None else 1
    counts = 1, len(reply.addresses), int(reply.negative), additional
    parts[0] = _HEADER.pack(asked.id, _flags(asked, reply, truncated), *counts)
    return b"".join(parts)


def _question(asked: Query) -> bytes:
    name = b"".join(bytes((len(label),)) + label for label in asked.labels)
    return name + b"\x00" + _HH.pack(asked.qtype, asked.qclass)


_SOA_NAMES = b"\x07egressd\x07invalid\x00\x06nobody\x07invalid\x00"
_SOA_TIMES = 1, 3600, 600, 86400  # serial, refresh, retry, expire


@functools.lru_cache(maxsize=128)
def _negative(ttl: int) -> bytes:
    data = _SOA_NAMES + _SOA.pack(*_SOA_TIMES, ttl)
    return b"\x00" + _RECORD.pack(Type.SOA, _IN, ttl, len(data)) + data


def _plain_opt(asked: Edns, reply: Reply, text: str) -> bytes:
    data = b""
    if reply.extended is not None:
        why = text.encode()
        data = _EDE.pack(_OPTION_EDE, 2 + len(why), reply.extended) + why
    return b"\x00" + _RECORD.pack(_OPT, UDP_SIZE, _opt_ttl(asked, reply), len(data)) + data


_EDE = struct.Struct("!HHH")  # an option's code and length, and the error's code


def _opt_ttl(asked: Edns, reply: Reply) -> int:
    """RFC 6891 section 6.1.3: the upper bits of the response code, version 0, DO."""
    return reply.rcode >> 4 << 24 | (0x8000 if asked.dnssec_ok else 0)


def _pack_any(asked: Query, reply: Reply, *, text: str, truncated: bool) -> bytes:
    record = _record(header=_header(id=asked.id, flags=_flags(asked, reply, truncated)))
    owner = _label(asked.labels)
    record.add_question(dnslib.DNSQuestion(owner, asked.qtype, asked.qclass))
    for kind, data in _records(reply):
        record.add_answer(dnslib.RR(owner, kind, _IN, reply.ttl, data))
    if reply.negative:
        record.add_auth(dnslib.RR(_label(()), Type.SOA, _IN, reply.ttl, _soa(reply.ttl)))
    if asked.edns is not None:
        record.add_ar(_opt(asked.edns, reply, text))
    return bytes(record.pack())


def _records(reply: Reply) -> Iterator[tuple[int, Any]]:
    for address in reply.addresses:
        yield (Type.A if address.version == 4 else Type.AAAA), dnslib.RD(address.packed)
    if reply.pointer is not None:
        yield Type.PTR, dnslib.PTR(_label(labels_of(reply.pointer)))
    if reply.hinfo:
        yield Type.HINFO, dnslib.RD(b"\x07RFC8482\x00")


def _soa(ttl: int) -> Any:
    # No zone of ours exists; the root as owner holds for any name, "invalid." (RFC 6761) misleads nobody.
    return dnslib.SOA(_label((b"egressd", b"invalid")), _label((b"nobody", b"invalid")), (*_SOA_TIMES, ttl))


def _opt(asked: Edns, reply: Reply, text: str) -> Any:
    options = []
    if reply.extended is not None:
        options.append(dnslib.EDNSOption(_OPTION_EDE, struct.pack("!H", reply.extended) + text.encode()))
    return dnslib.EDNS0(
        udp_len=UDP_SIZE, ext_rcode=reply.rcode >> 4, flags="do" if asked.dnssec_ok else "", opts=options
    )


def _record(*, header: Any) -> Any:
    return dnslib.DNSRecord(header)


def _header(*, id: int, flags: int) -> Any:
    return dnslib.DNSHeader(id=id, bitmap=flags)


def _label(labels: Labels) -> Any:
    return dnslib.DNSLabel(labels)
