"""How a document is named: its source, and its path below the source's directory.

``handbook:hr/leave.md``. A path is bytes (path_resolution(7)): what is no plain printable ASCII is spelled
%XX, so that an identifier stands in a record, a URL's path or a line of a list as it is, and no two paths
have the same one.
"""

from __future__ import annotations

import re

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["MAX_IDENTIFIER", "SOURCE", "identifier", "path_of", "source_of"]

# Characters. 680 bytes that all have to be spelled; and an index of PostgreSQL takes keys of 2704 bytes.
MAX_IDENTIFIER = 2048
SOURCE = re.compile(r"[a-z][a-z0-9-]{0,30}[a-z0-9]|[a-z]")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-")
_SPELLINGS = tuple(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in range(256))
_SPELLED = re.compile(r"(?:[A-Za-z0-9/._-]|%[0-9A-F]{2})+")
_HIGHEST = 255  # bytes of one name, NAME_MAX of linux/limits.h


def identifier(source: str, path: bytes) -> str:
    """`Unfit` for a path that is none below a directory, or that is too long to be named."""
    if not SOURCE.fullmatch(source):
        raise Unfit(
            f"{quoted(source)} is not a source's name", "use lower-case letters, digits and inner hyphens"
        )
    _check(path)
    text = f"{source}:" + "".join([_SPELLINGS[byte] for byte in path])
    if len(text) > MAX_IDENTIFIER:
        raise Unfit(f"{quoted(text)} takes more than {MAX_IDENTIFIER} characters", "use a shorter path")
    return text


def source_of(text: str) -> str:
    """The source that an identifier names. `Unfit` where it is not one."""
    source, colon, rest = text.partition(":")
    if not colon or not rest or not SOURCE.fullmatch(source) or len(text) > MAX_IDENTIFIER:
        raise Unfit(f"{quoted(text)} is not a document's identifier", "write SOURCE:PATH")
    return source


def path_of(text: str) -> bytes:
    """The inverse of `identifier`. `Unfit` for all else, another spelling of the same path too."""
    source = source_of(text)
    rest = text[len(source) + 1 :]
    if not _SPELLED.fullmatch(rest):
        raise Unfit(f"{quoted(text)} is not a document's identifier", "spell other bytes %XX")
    path = re.sub(rb"%([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), rest.encode("ascii"))
    if identifier(source, path) != text:
        raise Unfit(
            f"{quoted(text)} is another spelling of an identifier", "spell plain characters as they are"
        )
    return path


def _check(path: bytes) -> None:
    parts = path.split(b"/")
    if b"\0" in path or any(part in (b"", b".", b"..") or len(part) > _HIGHEST for part in parts):
        raise Unfit(f"{path[:80]!a} is not a path below a directory", "name a file by its path")
