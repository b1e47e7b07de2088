"""ClientHellos as OpenSSL makes them, and as somebody bends them who wants another host than his own."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TypeAlias

__all__ = ["BENT", "hello", "records", "server_name"]

Extensions: TypeAlias = list[tuple[int, bytes]]
SNI, PADDING, ECH, ESNI = 0, 21, 0xFE0D, 0xFFCE


def hello(name: str | None, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """The first flight of OpenSSL for this server name: one record."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = version
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return out.read()
    raise AssertionError("a handshake that needs no answer")


def taken_apart(record: bytes) -> tuple[bytes, Extensions]:
    """(the message's body before its extensions, the extensions)."""
    body = record[9:]
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    head, rest, found = body[:at], body[at + 2 :], []
    while rest:
        kind, length = struct.unpack_from("!HH", rest)
        found.append((kind, rest[4 : 4 + length]))
        rest = rest[4 + length :]
    return head, found


def put_together(head: bytes, extensions: Extensions) -> bytes:
    """The handshake message."""
    packed = b"".join(struct.pack("!HH", kind, len(data)) + data for kind, data in extensions)
    body = head + struct.pack("!H", len(packed)) + packed
    return b"\x01" + len(body).to_bytes(3, "big") + body


def records(message: bytes, *sizes: int) -> bytes:
    """The message in records of these sizes; the rest in one more."""
    found, at = b"", 0
    for size in (*sizes, len(message)):
        piece = message[at : at + size]
        at += size
        if piece:
            found += b"\x16\x03\x01" + struct.pack("!H", len(piece)) + piece
    return found


def server_name(*names: bytes, kind: int = 0) -> bytes:
    """The data of a server_name extension."""
    entries = b"".join(struct.pack("!BH", kind, len(name)) + name for name in names)
    return struct.pack("!H", len(entries)) + entries


def bent(allowed: str, change: Sequence[tuple[str, int, bytes]]) -> bytes:
    """OpenSSL's hello for `allowed` with extensions added in front or at the end, replaced or dropped."""
    head, found = taken_apart(hello(allowed))
    for how, kind, data in change:
        if how == "replace":
            found = [(k, data if k == kind else d) for k, d in found]
        elif how == "drop":
            found = [(k, d) for k, d in found if k != kind]
        elif how == "first":
            found.insert(0, (kind, data))
        else:
            found.append((kind, data))
    return records(put_together(head, found))


def BENT(allowed: str, other: str) -> dict[str, tuple[bytes, str]]:  # noqa: N802 - reads as a table
    """What is tried -> (bytes, the reason for which it must be refused)."""
    mine, theirs = allowed.encode(), other.encode()
    four, six = (str(ip_address(a)).encode() for a in ("11.22.33.20", "2a10:5353::20"))
    padded = bent(other, [("drop", PADDING, b""), ("first", PADDING, bytes(3000))])
    return {
        "the other name": (hello(other), "sni-other"),
        "the other name, TLS 1.2": (hello(other, version=ssl.TLSVersion.TLSv1_2), "sni-other"),
        "no name": (hello(None), "sni-missing"),
        "a name below": (hello(f"x.{allowed}"), "sni-other"),
        "the name as a label": (bent(allowed, [("replace", SNI, server_name(b"x" + mine))]), "sni-other"),
        "an IPv4 address": (bent(allowed, [("replace", SNI, server_name(four))]), "sni-address"),
        "an IPv6 address": (bent(allowed, [("replace", SNI, server_name(six))]), "sni-address"),
        "both in one list": (bent(allowed, [("replace", SNI, server_name(mine, theirs))]), "sni-repeated"),
        "the same twice": (bent(allowed, [("replace", SNI, server_name(mine, mine))]), "sni-repeated"),
        "two extensions": (bent(allowed, [("last", SNI, server_name(theirs))]), "sni-repeated"),
        "two, the other first": (bent(allowed, [("first", SNI, server_name(theirs))]), "sni-repeated"),
        "behind padding": (padded, "sni-other"),
        "encrypted": (bent(allowed, [("last", ECH, b"\0" * 64)]), "ech"),
        "encrypted, the draft before": (bent(allowed, [("last", ESNI, b"\0" * 64)]), "ech"),
        "one byte a record": (records(hello(other)[5:], *[1] * 200), "sni-other"),
        "a zero in the name": (bent(allowed, [("replace", SNI, server_name(mine + b"\0." + theirs))]), ""),
        "plain HTTP": (b"GET / HTTP/1.1\r\nHost: " + mine + b"\r\n\r\n", "not-tls"),
        "an SSLv2 hello": (b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10" + bytes(38), "not-tls"),
        "an alert first": (b"\x15\x03\x01\0\x02\x01\x00" + hello(allowed), "hello-malformed"),
    }  # fmt: skip
