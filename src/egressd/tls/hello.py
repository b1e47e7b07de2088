"""Which server does a TLS ClientHello name? Bytes in; a name, an objection or "more" out.

Theory of operation. A client's first flight is TLS records (RFC 8446 section 5.1); the payloads of those of
type handshake, put together, are one ClientHello (section 4.1.2). Records and TCP segments cut it anywhere,
so a name that no single segment or record holds is still read by the server. What is judged here is
therefore the message as put together, never a segment. The reader is strict where honest clients agree
(every length exact, every extension once, one name), because each freedom is a place where the server could
read another name than we did; it is lenient where RFC 8701 wants it (unknown suites, extensions and groups
are passed over unread).

The laws, all tested:

- Any bytes give `More`, `Named` or `Objection`, never an exception.
- How the bytes were cut does not change what is decided, but for `asked` of what is not TLS.
- Once decided it stays decided, whatever is fed afterwards.
- Work is linear in the bytes, also byte by byte; of at most `MAX_STREAM` bytes at most `MAX_MESSAGE` are
  held.

What may follow the ClientHello in the same flight (early data, a change_cipher_spec for middleboxes, RFC
8446 appendix D.4) begins a record of its own. It is not judged here: `Named.length` says where it starts. A
second ClientHello can be among it, and servers were seen to obey its name: `retry.py` watches for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import TypeAlias

from egressd.model.errors import Unfit
from egressd.model.names import MAX_NAME, canonical, quoted
from egressd.model.verdicts import Reason

__all__ = ["MAX_MESSAGE", "MAX_STREAM", "HelloReader", "More", "Named", "Objection", "Reading", "read"]

MAX_MESSAGE = 1 << 16  # bytes of a handshake message, as in Go; clients of today send 200 to 4,000
MAX_STREAM = (
    2 * MAX_MESSAGE
)  # bytes of the connection: a message cut into records of a byte is six times as long
_MAX_RECORD = 1 << 14  # RFC 8446 section 5.1: of a plaintext record

_CHANGE_CIPHER_SPEC, _ALERT, _HANDSHAKE, _APPLICATION_DATA = 20, 21, 22, 23  # RFC 8446 appendix B.1
_CONTENTS = {
    _CHANGE_CIPHER_SPEC: "a change_cipher_spec record",
    _ALERT: "an alert record",
    _APPLICATION_DATA: "an application data record",
}
_CLIENT_HELLO = 1  # RFC 8446 appendix B.3
_MAJOR = 3
# RFC 8446 section 5.1 has servers ignore the minor byte; RFC 5246 appendix E.1 knows these values of it.
_MAX_RECORD_MINOR = 3
_VERSIONS = frozenset({0x0301, 0x0302, 0x0303})  # client_version; TLS 1.3 says 0x0303
_SERVER_NAME = 0  # RFC 6066 section 3
# Whatever may carry a name that nobody can read: encrypted_client_hello (RFC 9849, outer and inner), its
# ech_outer_extensions, code points that its drafts were tried with, and encrypted_server_name before them.
_HIDING = frozenset({0xFE0D, 0xFD00, 0xFE08, 0xFE09, 0xFE0A, 0xFE0B, 0xFE0C, 0xFF02, 0xFFCE})
_TWO = Struct("!H").unpack_from
_TWO_TWICE = Struct("!HH").unpack_from
_MAX_ASKED = 32  # bytes shown of what is not TLS


@dataclass(frozen=True, slots=True)
class More:
    """Nothing is decided yet: the ClientHello goes on."""


@dataclass(frozen=True, slots=True)
class Named:
    """A whole, well-formed ClientHello that names exactly one server."""

    name: str  # canonical, lower case
    ech: bool  # it may hide another name: encrypted_client_hello or its forerunners, real or GREASE
    length: int  # bytes of the connection up to the end of the ClientHello


@dataclass(frozen=True, slots=True)
class Objection:
    """Why this connection must not go on."""

    reason: Reason
    detail: str  # half a sentence for people; ASCII, nothing of a stranger's in it
    asked: str = ""  # what was asked for, quoted and escaped (`model.names.quoted`); empty if nothing was


Reading: TypeAlias = More | Named | Objection

_MORE = More()


def read(data: bytes) -> Reading:
    """Judge the first bytes of a connection, all that are known of them.

    For a ClientHello that lies in one record, as nearly all do, this is the short way. Who gets `More` and
    reads again from the start spends quadratic time on a slow stranger: go on with a `HelloReader` instead.
    """
    # 5 bytes of record header (type, version, length), 4 of message header (type, length)
    if len(data) > 9 and data[0] == _HANDSHAKE and data[1] == _MAJOR and data[2] <= _MAX_RECORD_MINOR:
        end = 5 + (data[3] << 8 | data[4])
        if end <= _MAX_RECORD + 5 and end <= len(data) and data[5] == _CLIENT_HELLO:
            size = data[6] << 16 | data[7] << 8 | data[8]
            if size == end - 9:
                return _hello(data, 9, end, end)
    return HelloReader().feed(data)


class HelloReader:
    """Takes the first bytes of a connection as they come."""

    __slots__ = ("_consumed", "_header", "_left", "_message", "_reading")

    def __init__(self) -> None:
        self._reading: Reading = _MORE
        self._consumed = 0  # bytes of the connection taken so far
        self._header = bytearray()  # of a record, while it is incomplete
        self._left = 0  # bytes of the record's payload that have not come yet
        self._message = bytearray()  # the handshake message so far

    def feed(self, data: bytes) -> Reading:
        """The next bytes of the connection. What has been decided stays, and then `data` is not looked at."""
        at = 0
        while self._reading is _MORE and at < len(data):
            if self._left:
                taken = min(self._left, len(data) - at)
                self._message += data[at : at + taken]
                self._left -= taken
                self._consumed += taken
                self._reading = self._judge_message()
            else:
                taken = min(5 - len(self._header), len(data) - at)
                self._header += data[at : at + taken]
                self._consumed += taken
                self._reading = self._judge_header(following=data[at + taken : at + taken + _MAX_ASKED])
            at += taken
        return self._reading

    def _judge_header(self, *, following: bytes) -> Reading:
        """As soon as a byte of a record's header condemns it; a whole good one opens the record."""
        header = self._header
        if header[0] != _HANDSHAKE or (len(header) > 1 and header[1] != _MAJOR):
            return self._not_handshake(following)
        if len(header) > 2 and header[2] > _MAX_RECORD_MINOR:
            return _malformed(f"it lies in a record of version 3.{header[2]}")
        if len(header) < 5:
            return _MORE
        size = header[3] << 8 | header[4]
        if not size:
            return _malformed("it lies in a record without content")  # RFC 8446 section 5.1
        if size > _MAX_RECORD or self._consumed + size > MAX_STREAM:
            return Objection(Reason.HELLO_TOO_LONG, "its records are longer than permitted")
        self._left = size
        header.clear()
        return _MORE

    def _not_handshake(self, following: bytes) -> Reading:
        header = self._header
        if self._message:
            return _malformed("its records are interrupted by something else")
        if header[0] in _CONTENTS:
            if len(header) == 1:
                return _MORE  # only the version says whether this is TLS
            if header[1] == _MAJOR:
                return _malformed(f"it begins with {_CONTENTS[header[0]]}")
        shown = quoted((bytes(header) + following)[:_MAX_ASKED].decode("latin-1"))
        # RFC 6101 appendix E: an SSL 2.0 hello has the top bit of its length set, and names no server
        kind = "an SSL 2.0 hello, or no TLS at all" if header[0] & 0x80 else "no TLS record"
        return Objection(Reason.NOT_TLS, f"it begins with {kind}", asked=shown)

    def _judge_message(self) -> Reading:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            return _malformed(f"it begins with a handshake message of type {message[0]}")
        if len(message) < 4:
            return self._unless_ended()
        end = 4 + (message[1] << 16 | message[2] << 8 | message[3])
        if end > MAX_MESSAGE:
            return Objection(Reason.HELLO_TOO_LONG, "it says that it is longer than permitted")
        if len(message) < end:
            return self._unless_ended()
        if len(message) > end or self._left:
            # Servers differ in what they make of a second message there; no client sends one.
            return _malformed("more follows it in the same record")
        reading = _hello(bytes(message), 4, end, self._consumed)
        message.clear()
        return reading

    def _unless_ended(self) -> Reading:
        """Without this a message of few bytes could be spread over records for ever: see MAX_STREAM."""
        if not self._left and self._consumed >= MAX_STREAM:
            return Objection(Reason.HELLO_TOO_LONG, "its records are longer than permitted")
        return _MORE


def _malformed(detail: str, *, asked: str = "") -> Objection:
    return Objection(Reason.HELLO_MALFORMED, detail, asked)


_CUT = _malformed("one of its fields is longer than the message")


def _hello(data: bytes, at: int, end: int, length: int) -> Named | Objection:
    """Read the ClientHello's body in data[at:end]. `length`: see `Named`.

    version 2, random 32, session_id<0..32>, cipher_suites<2..>, compression_methods<1..>, extensions
    """
    if end - at < 35:
        return _CUT
    if _TWO(data, at)[0] not in _VERSIONS:
        return _malformed(f"its version is {data[at]}.{data[at + 1]}")
    at += 34
    if data[at] > 32:
        return _malformed("its session id is longer than 32 bytes")
    at += 1 + data[at]
    if end - at < 2:
        return _CUT
    size = _TWO(data, at)[0]
    if not size or size & 1:
        return _malformed("its list of cipher suites has no possible length")
    at += 2 + size
    if at >= end:
        return _CUT
    if not data[at]:
        return _malformed("its list of compression methods is empty")
    at += 1 + data[at]
    if at == end:
        return Objection(Reason.SNI_MISSING, "it has no extensions")  # RFC 5246 section 7.4.1.2
    if end - at < 2 or _TWO(data, at)[0] != end - at - 2:
        return _malformed("its extensions do not end where it ends")
    return _extensions(data, at + 2, end, length)


def _extensions(data: bytes, at: int, end: int, length: int) -> Named | Objection:
    """Walk the list (RFC 8446 section 4.2: type 2, length 2, content), each type at most once."""
    seen: set[int] = set()
    name_at = name_end = 0
    while at < end:
        if end - at < 4:
            return _CUT
        kind, size = _TWO_TWICE(data, at)
        at += 4
        if size > end - at:
            return _CUT
        if kind in seen:
            return _repeated(kind)
        seen.add(kind)
        if kind == _SERVER_NAME:
            name_at, name_end = at, at + size
        at += size
    if not name_at:
        return Objection(Reason.SNI_MISSING, "it has no server_name extension")
    name = _server_name(data, name_at, name_end)
    if isinstance(name, Objection):
        return name
    return Named(name, not _HIDING.isdisjoint(seen), length)


def _repeated(kind: int) -> Objection:
    if kind == _SERVER_NAME:
        return Objection(Reason.SNI_REPEATED, "it has two server_name extensions")
    return _malformed(f"it has two extensions of type {kind}")


def _server_name(data: bytes, at: int, end: int) -> str | Objection:
    """The one host_name of a ServerNameList: length 2, then entries of type 1, length 2, name."""
    if end - at < 5 or _TWO(data, at)[0] != end - at - 2:
        return _malformed("its server_name extension does not have the length it says")
    if data[at + 2]:
        # no other type was ever defined, and a server may skip it or not
        return _malformed(f"its server_name extension holds a name of type {data[at + 2]}")
    after = at + 5 + _TWO(data, at + 3)[0]
    if after > end:
        return _malformed("its server_name extension does not have the length it says")
    if after < end:
        return _more_names(data, after, end, first=data[at + 5 : after])
    if after - at - 5 > MAX_NAME:
        shown = _shown(data[at + 5 : after])
        return _malformed(f"the server's name has more than {MAX_NAME} characters", asked=shown)
    return _host(data[at + 5 : after])


def _more_names(data: bytes, at: int, end: int, *, first: bytes) -> Objection:
    """What follows the first name in the list: a second name, or bytes that are none."""
    if end - at >= 3 and not data[at] and at + 3 + _TWO(data, at + 1)[0] <= end:
        second = data[at + 3 : at + 3 + _TWO(data, at + 1)[0]]
        asked = f"{_shown(first)}, {_shown(second)}"
        return Objection(Reason.SNI_REPEATED, "its server_name extension holds more than one name", asked)
    return _malformed("its server_name extension holds more than a name", asked=_shown(first))


def _shown(raw: bytes) -> str:
    return quoted(raw[:MAX_NAME].decode("latin-1"))


@lru_cache(
    maxsize=2048
)  # few names are asked for often; at most 255 bytes each, so a stranger can fill 2 MB at most
def _host(raw: bytes) -> str | Objection:
    """The canonical name, or what is wrong with it (RFC 6066 section 3, and `model.names`)."""
    if not raw:
        return _malformed("the server's name is empty")
    text = raw.decode("latin-1")
    asked = quoted(text)
    if not raw.isascii():
        return _malformed("the server's name is not ASCII", asked=asked)
    if _is_address(text):
        return Objection(Reason.SNI_ADDRESS, "the server's name is an address", asked)
    if text.endswith("."):
        # Servers that compare strings take it for a stranger's name, and answer for their default site.
        return _malformed("the server's name ends in a dot", asked=asked)
    try:
        return canonical(text)
    except Unfit:
        return _malformed("the server's name is not a host name", asked=asked)


def _is_address(text: str) -> bool:
    """What any program may take for an IP literal: 127.1, 0x7f.1, 2130706433, [::1], fe80::1%eth0."""
    last = text.rstrip(".").rpartition(".")[2].lower()
    if last.isdecimal() or (last.startswith("0x") and not last[2:].strip("0123456789abcdef")):
        return True
    address = text.strip("[]").partition("%")[0].lower()
    return ":" in address and not set(address) - set("0123456789abcdef:.")
