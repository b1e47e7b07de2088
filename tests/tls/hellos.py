"""ClientHellos by hand, right and wrong: everything has an honest default, and every part can be replaced."""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["ECH", "NAME", "PLAIN", "client_hello", "extension", "hello", "message", "records", "server_name"]

NAME = "api.example.test"
ECH = 0xFE0D

Extension = tuple[int, bytes]


def server_name(*names: bytes | str, kind: int = 0) -> Extension:
    """The extension of RFC 6066 section 3, with as many names as are given."""
    listed = b""
    for name in names:
        raw = name.encode() if isinstance(name, str) else name
        listed += struct.pack("!BH", kind, len(raw)) + raw
    return 0, struct.pack("!H", len(listed)) + listed


def extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!HH", kind, len(content)) + content


# supported_groups, signature_algorithms, supported_versions with GREASE, GREASE itself (RFC 8701), key_share
PLAIN: tuple[Extension, ...] = (
    (10, b"\x00\x04\x00\x1d\x00\x17"), (13, b"\x00\x04\x08\x04\x04\x01"), (43, b"\x04\x1a\x1a\x03\x04"),
    (0x5A5A, b""), (51, b"\x00\x24\x00\x1d\x00\x20" + bytes(32)),
)  # fmt: skip


def client_hello(
    *names: bytes | str,
    extensions: Sequence[Extension] | None = None,
    more: Sequence[Extension] = (),
    version: int = 0x0303,
    session: bytes = bytes(32),
    suites: bytes = b"\x0a\x0a\x13\x01\x13\x02",
    compression: bytes = b"\x00",
    tail: bytes | None = None,
) -> bytes:
    """The body of the message. `extensions` replaces all of them, `tail` also their length."""
    if extensions is None:
        extensions = [server_name(*(names or (NAME,))), *PLAIN, *more]
    if tail is None:
        listed = b"".join(extension(*each) for each in extensions)
        tail = struct.pack("!H", len(listed)) + listed
    return b"".join(
        (
            struct.pack("!H", version), bytes(range(32)), bytes([len(session)]), session,
            struct.pack("!H", len(suites)), suites, bytes([len(compression)]), compression, tail,
        )
    )  # fmt: skip


def message(body: bytes, *, kind: int = 1) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def records(data: bytes, *sizes: int, kind: int = 22, version: int = 0x0301) -> bytes:
    """`data` cut into records of these sizes, and a last one with the rest."""
    out, at = b"", 0
    for size in (*sizes, len(data)):
        piece = data[at : at + size]
        out += struct.pack("!BHH", kind, version, len(piece)) + piece if piece or not data else b""
        at += size
    return out


def hello(
    *names: bytes | str, sizes: Sequence[int] = (), record_version: int = 0x0301, **parts: object
) -> bytes:
    """A first flight, ready to be sent."""
    return records(message(client_hello(*names, **parts)), *sizes, version=record_version)  # type: ignore[arg-type]
