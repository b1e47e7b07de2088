#!/usr/bin/env python3
"""The documents of one request, as tools for a model: list, read, search. An MCP server on stdin and stdout.

    python3 /opt/egressd/documents.py [--root /work]

It runs inside the sandbox, with the rights of the command beside it, and sees only what was copied there: it
grants nothing. The model that calls it may have been talked into anything by what it read, so every argument
is hostile, and what it costs is bounded: the size of a message and of an answer, the files and the seconds
of a call. A search is for literal text; a regular expression could take for ever.

Names are shown as in a document's identifier: any byte but a-z A-Z 0-9 / . _ - is spelled %XX, so a newline
in a name breaks no line. Symbolic links, devices and FIFOs are not there, as far as these tools can tell.

This file stands alone: the standard library of Python 3.9, and nothing of egressd. The protocol is MCP
(modelcontextprotocol.io/specification): the handshake of 2024-11-05 to 2025-11-25, and the stateless requests
of 2026-07-28. 2025-03-26 is left out: it alone demands that messages can be sent in batches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

NAME, VERSION = "egressd-documents", "1"
HANDSHAKES = ("2024-11-05", "2025-06-18", "2025-11-25")
STATELESS = ("2026-07-28",)

MAX_MESSAGE = 1 << 20  # bytes of a line from the client
MAX_ANSWER = 1 << 16  # bytes of an answer's text
MAX_READ = 1 << 15  # bytes of a document in one answer, unless more are asked for
MAX_LISTED = 1000
MAX_ENTRIES = 100_000  # names looked at in one call
MAX_SECONDS = 5.0  # of one call
MAX_EXCERPT = 200  # characters of a line that is found
MAX_NEEDLE = 1000  # characters searched for
CHUNK = 1 << 20
MAX_DEPTH = 100  # directories below one another

# JSON-RPC 2.0, section 5.1; the last is MCP's own, of 2026-07-28
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND = -32700, -32600, -32601
INVALID_PARAMS, INTERNAL_ERROR = -32602, -32603
UNSUPPORTED_VERSION = -32022

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO must not hold us
_META = "io.modelcontextprotocol/"

Path = tuple[bytes, ...]  # names, below the root


class Wrong(Exception):
    """What the model asked for cannot be had; the text tells it why, and it may try again."""


class Failed(Exception):
    """An error of the protocol: for the client, not for the model."""

    def __init__(self, code: int, text: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.code, self.text, self.data = code, text, data


# ---- names


def spelled(path: Path) -> str:
    """As egressd/access/identifiers.py spells a path."""
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in b"/".join(path))


def names_of(text: str) -> Path:
    """The inverse, where other characters may stand for their UTF-8. `Wrong` for what is no path below."""
    try:
        plain = text.encode("utf-8")
    except UnicodeEncodeError:
        raise Wrong("That is not a path: it has half a character.") from None
    if re.search(rb"%(?![0-9A-F]{2})", plain):
        raise Wrong("That is not a path: a % is spelled %25, and other bytes %XX.")
    found = re.sub(rb"%([0-9A-F]{2})", lambda spelling: bytes([int(spelling[1], 16)]), plain)
    names = tuple(found.split(b"/"))
    if b"\0" in found or any(name in (b"", b".", b"..") or len(name) > 255 for name in names):
        raise Wrong("That is not a path of a document. Write it as list_documents shows it.")
    if len(names) > MAX_DEPTH:
        raise Wrong("There is no document with this path.")
    return names


# ---- documents beneath the root


class Documents:
    """Files beneath one directory, opened name by name from a descriptor of it: nothing leads out."""

    def __init__(self, root: str) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, path: Path) -> BinaryIO:
        """A regular file. `Wrong` for all else, in the same words."""
        try:
            directory = self._directory(path[:-1])
            try:
                return _regular(path[-1], directory)
            finally:
                os.close(directory)
        except OSError:
            raise Wrong("There is no document with this path.") from None

    def walk(self, under: Path, clock: Clock) -> Iterator[tuple[Path, int]]:
        """Regular files and their sizes, in the order of their names; `under` may itself be one."""
        waiting = [under]
        while waiting:
            path = waiting.pop()
            try:
                directory = self._directory(path)
            except OSError:
                if path == under and path:
                    with self.open(path) as file:
                        yield path, os.fstat(file.fileno()).st_size
                continue
            try:
                names = _listed(directory, clock)
                deeper: list[Path] = []
                for name, mode, size in names:
                    if stat.S_ISREG(mode):
                        yield (*path, name), size
                    elif stat.S_ISDIR(mode) and len(path) < MAX_DEPTH:
                        deeper.append((*path, name))
                waiting += reversed(deeper)
            finally:
                os.close(directory)

    def _directory(self, path: Path) -> int:
        directory = os.dup(self._root)
        try:
            for name in path:
                deeper = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = deeper
        except OSError:
            os.close(directory)
            raise
        return directory


def _regular(name: bytes, directory: int) -> BinaryIO:
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise OSError("not a regular file")
    descriptor = os.open(name, _OPEN, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # exchanged in between
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _listed(directory: int, clock: Clock) -> list[tuple[bytes, int, int]]:
    """Names, modes and sizes, sorted. A name that vanishes meanwhile is not there."""
    found: list[tuple[bytes, int, int]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            clock.tick()
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            found.append((os.fsencode(entry.name), about.st_mode, about.st_size))
    return sorted(found)


class Clock:
    """What one call may look at. `Wrong` when it is used up."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until = now() + MAX_SECONDS
        self._entries = 0

    def tick(self) -> None:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise Wrong("There are too many files to look at in one call: name a directory with `under`.")
        self.check()

    def check(self) -> None:
        if self._now() > self._until:
            raise Wrong("This took too long: name a directory with `under`.")


# ---- answers


class Answer:
    """Lines, up to a bound."""

    def __init__(self, most: int = MAX_ANSWER) -> None:
        self.lines: list[str] = []
        self._left = most

    def add(self, line: str) -> bool:
        """Whether there was room for it."""
        size = len(line.encode("utf-8", "surrogatepass")) + 1
        if size > self._left:
            return False
        self._left -= size
        self.lines.append(line)
        return True


def list_documents(documents: Documents, under: Path, after: Path, limit: int) -> str:
    clock, answer = Clock(), Answer(MAX_ANSWER - 200)
    for path, size in documents.walk(under, clock):
        if _order(path) <= _order(after):
            continue
        if len(answer.lines) == limit or not answer.add(f"{spelled(path)}  {size} bytes"):
            return "\n".join([*answer.lines, "There are more: ask again with after = the last path above."])
    if not answer.lines:
        return "There are no%s documents here." % (" more" if after else "")
    return "\n".join(answer.lines)


def _order(path: Path) -> tuple[tuple[int, bytes], ...]:
    """As `walk` goes: a directory's files before its directories."""
    return (*tuple((1, name) for name in path[:-1]), (0, path[-1])) if path else ()


def read_document(documents: Documents, path: Path, offset: int, limit: int) -> str:
    with documents.open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if _is_binary(os.pread(file.fileno(), 8192, 0)):
            raise Wrong(f"This is not text but {size} other bytes, and cannot be shown here.")
        if offset > size or (offset == size and size):
            raise Wrong(f"It has {size} bytes: nothing begins at {offset}.")
        data = os.pread(file.fileno(), limit, offset)
    begin, end = _whole_characters(data, at_end=offset + len(data) >= size)
    if begin >= end:
        begin, end = 0, len(data)  # not UTF-8 at all: shown as far as it goes
    text = data[begin:end].decode("utf-8", "replace")
    rest = size - offset - end
    more = f"; go on with offset = {offset + end}" if rest > 0 else ""
    return f"{text}\n[bytes {offset + begin} to {offset + end} of {size}{more}]"


def _is_binary(head: bytes) -> bool:
    if b"\0" in head:
        return True
    text = head[:-3].decode("utf-8", "replace") if len(head) > 3 else head.decode("utf-8", "replace")
    return text.count("\ufffd") * 10 > len(text)


def _whole_characters(data: bytes, *, at_end: bool) -> tuple[int, int]:
    """Where the first character of a piece of UTF-8 begins, and where the last whole one ends."""
    begin = 0
    while begin < min(3, len(data)) and data[begin] & 0xC0 == 0x80:
        begin += 1
    end = len(data)
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:
            needs = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            if needs > back and not at_end:
                end -= back
            break
    return begin, end


def search_documents(documents: Documents, text: str, under: Path, limit: int) -> str:
    clock, answer = Clock(), Answer(MAX_ANSWER - 200)
    needle = text.casefold()
    skipped = 0
    try:
        for path, _ in documents.walk(under, clock):
            try:
                for number, line in _found(documents, path, needle, clock):
                    if len(answer.lines) == limit or not answer.add(_hit(path, number, line, needle)):
                        return "\n".join([*answer.lines, "There are more: search for something rarer."])
            except (OSError, Binary):
                skipped += 1
    except Wrong as wrong:
        if not answer.lines:
            raise
        answer.lines.append(f"This is not all. {wrong}")
    told = [f"{skipped} files are not text and were not searched."] if skipped else []
    return "\n".join([*(answer.lines or ["Nothing is found."]), *told])


class Binary(Exception):
    """A file that is not text."""


def _found(documents: Documents, path: Path, needle: str, clock: Clock) -> Iterator[tuple[int, str]]:
    """Numbers of the lines that have it, from 1, each once, and the line (of a long one, the part)."""
    told = 0
    with documents.open(path) as file:
        if _is_binary(os.pread(file.fileno(), 8192, 0)):
            raise Binary
        for first, piece in _pieces(file, clock):
            if needle not in piece.decode("utf-8", "replace").casefold():
                continue
            for number, line in enumerate(piece.split(b"\n"), first):
                shown = line.decode("utf-8", "replace")
                if number > told and needle in shown.casefold():
                    told = number
                    yield number, shown


def _pieces(file: BinaryIO, clock: Clock) -> Iterator[tuple[int, bytes]]:
    """Whole lines, as many as fit a megabyte, and the number of the first. A line beyond that comes in parts
    that overlap by more than a needle."""
    number, rest = 1, b""
    while True:
        clock.check()
        data = file.read(CHUNK)
        held = rest + data
        cut = held.rfind(b"\n") + 1
        if not data or (not cut and len(held) > CHUNK):
            cut = len(held)
        piece, rest = held[:cut], held[cut:]
        if piece:
            yield number, piece
        if not data:
            return
        number += piece.count(b"\n")
        if piece and not piece.endswith(b"\n"):
            rest = piece[-4 * MAX_NEEDLE :]


def _hit(path: Path, number: int, line: str, needle: str) -> str:
    """One line, whatever the document has in its own."""
    at = max(0, line.casefold().find(needle) - MAX_EXCERPT // 4)
    excerpt = line[at : at + MAX_EXCERPT].strip()
    clean = "".join(c if c.isprintable() else " " for c in excerpt)
    return f"{spelled(path)}:{number}: {clean}"


# ---- tools: their schemas, and their arguments


_UNDER = {"type": "string", "description": "Only below this directory, as its path is shown. Default: all."}
READ_ONLY = {"readOnlyHint": True, "destructiveHint": False, "idempotentHint": True, "openWorldHint": False}


def _whole(least: int, most: int, default: int, description: str) -> dict[str, Any]:
    return {
        "type": "integer",
        "minimum": least,
        "maximum": most,
        "default": default,
        "description": description,
    }


TOOLS: dict[str, dict[str, Any]] = {
    "list_documents": {
        "title": "List documents",
        "description": "The paths and sizes of the documents that you may read, in order, one per line.",
        "properties": {
            "under": _UNDER,
            "after": {
                "type": "string",
                "description": "Go on after this path, the last of an earlier answer.",
            },
            "limit": _whole(1, MAX_LISTED, 200, "At most so many."),
        },
        "required": [],
    },
    "read_document": {
        "title": "Read a document",
        "description": "The text of one document, or a part. The last line says which bytes were shown.",
        "properties": {
            "path": {"type": "string", "description": "As list_documents shows it."},
            "offset": _whole(0, 1 << 62, 0, "The byte to begin at."),
            "limit": _whole(1, MAX_ANSWER - 1024, MAX_READ, "At most so many bytes."),
        },
        "required": ["path"],
    },
    "search_documents": {
        "title": "Search documents",
        "description": "The lines that contain a text, literally but for upper case: PATH:LINE: TEXT.",
        "properties": {
            "text": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_NEEDLE,
                "description": "What to look for.",
            },
            "under": _UNDER,
            "limit": _whole(1, 200, 50, "At most so many lines."),
        },
        "required": ["text"],
    },
}


def tool_list() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "title": tool["title"],
            "description": tool["description"],
            "inputSchema": {
                "type": "object",
                "properties": tool["properties"],
                "required": tool["required"],
                "additionalProperties": False,
            },
            "annotations": {"title": tool["title"], **READ_ONLY},
        }
        for name, tool in TOOLS.items()
    ]


def arguments_of(tool: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with its defaults, held against the schema above. `Wrong` tells the model what to mend."""
    schema = tool["properties"]
    for key in given:
        if key not in schema:
            raise Wrong("{} is not an argument; there are: {}.".format(ascii(key)[:80], ", ".join(schema)))
    for key in tool["required"]:
        if key not in given:
            raise Wrong(f"The argument {key} is missing.")
    return {key: _argument(key, wanted, given) for key, wanted in schema.items()}


def _argument(key: str, wanted: dict[str, Any], given: dict[str, Any]) -> Any:
    if key not in given:
        return wanted.get("default", "")
    value = given[key]
    if wanted["type"] == "string":
        least, most = wanted.get("minLength", 0), wanted.get("maxLength", 16384)
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise Wrong(f"The argument {key} must be a text of a sensible length.")
        return value
    least, most = wanted["minimum"], wanted["maximum"]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Wrong(f"The argument {key} must be a whole number from {least} to {most}.")
    return value


def call(documents: Documents, name: str, given: dict[str, Any]) -> str:
    wanted = arguments_of(TOOLS[name], given)
    if name == "read_document":
        return read_document(documents, names_of(wanted["path"]), wanted["offset"], wanted["limit"])
    under = names_of(wanted["under"].rstrip("/")) if wanted["under"] else ()
    if name == "search_documents":
        return search_documents(documents, wanted["text"], under, wanted["limit"])
    after = names_of(wanted["after"]) if wanted["after"] else ()
    return list_documents(documents, under, after, wanted["limit"])


# ---- the protocol


class Server:
    """Answers one message at a time. `handle` never raises for any bytes."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._handshaken = False

    def handle(self, line: bytes) -> dict[str, Any] | None:
        """The response to one line, or None where there is none to give."""
        id: Any = None
        try:
            message = _parsed(line)
            if "method" not in message and ("result" in message or "error" in message):
                return None  # a response; nothing was asked
            id = _id(message)
            method = _method(message)
            if "id" not in message:
                return None  # a notification: initialized, cancelled
            return {"jsonrpc": "2.0", "id": id, "result": self._result(method, message.get("params", {}))}
        except Failed as failed:
            error: dict[str, Any] = {"code": failed.code, "message": failed.text}
            if failed.data is not None:
                error["data"] = failed.data
            return {"jsonrpc": "2.0", "id": id, "error": error}
        except Exception as error:
            told = f"internal error: {type(error).__name__}"
            return {"jsonrpc": "2.0", "id": id, "error": {"code": INTERNAL_ERROR, "message": told}}

    def _result(self, method: str, params: Any) -> dict[str, Any]:
        if not isinstance(params, dict):
            raise Failed(INVALID_PARAMS, "params is not an object")
        meta = params.get("_meta", {})
        if isinstance(meta, dict) and _META + "protocolVersion" in meta:
            return _stateless(self._modern(method, params, meta), cached=method != "tools/call")
        if method == "initialize":
            return self._initialize(params)
        if method == "ping":
            return {}
        if method not in ("tools/list", "tools/call"):
            raise Failed(METHOD_NOT_FOUND, f"there is no method {ascii(method)[:80]}")
        if not self._handshaken:
            raise Failed(INVALID_REQUEST, "initialize first")
        return self._tools(method, params)

    def _initialize(self, params: dict[str, Any]) -> dict[str, Any]:
        wanted = params.get("protocolVersion")
        if not isinstance(wanted, str):
            raise Failed(INVALID_PARAMS, "protocolVersion is missing")
        self._handshaken = True
        return {
            "protocolVersion": wanted if wanted in HANDSHAKES else HANDSHAKES[-1],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": NAME, "version": VERSION},
            "instructions": _INSTRUCTIONS,
        }

    def _modern(self, method: str, params: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        """A request that brings its own version and capabilities: nothing is remembered between them."""
        version = meta[_META + "protocolVersion"]
        if version not in STATELESS:
            data = {"supported": [*HANDSHAKES, *STATELESS], "requested": str(version)[:80]}
            raise Failed(UNSUPPORTED_VERSION, "this version of the protocol is not supported", data)
        if not isinstance(meta.get(_META + "clientCapabilities"), dict):
            raise Failed(INVALID_PARAMS, "_meta does not say the client's capabilities")
        if method == "server/discover":
            return {
                "supportedVersions": [*HANDSHAKES, *STATELESS],
                "capabilities": {"tools": {}},
                "instructions": _INSTRUCTIONS,
            }
        if method not in ("tools/list", "tools/call"):
            raise Failed(METHOD_NOT_FOUND, f"there is no method {ascii(method)[:80]}")
        return self._tools(method, params)

    def _tools(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == "tools/list":
            if params.get("cursor") is not None:
                raise Failed(INVALID_PARAMS, "there is one page")
            return {"tools": tool_list()}
        name, given = params.get("name"), params.get("arguments", {})
        if not isinstance(name, str) or name not in TOOLS:
            raise Failed(INVALID_PARAMS, f"there is no tool {ascii(name)[:80]}")
        if given is not None and not isinstance(given, dict):
            raise Failed(INVALID_PARAMS, "arguments is not an object")
        try:
            text, wrong = call(self._documents, name, given or {}), False
        except Wrong as error:
            text, wrong = str(error), True
        return {"content": [{"type": "text", "text": text}], "isError": wrong}


_INSTRUCTIONS = "Read-only access to the documents of this request. There are no others."


def _stateless(result: dict[str, Any], *, cached: bool) -> dict[str, Any]:
    """What results of 2026-07-28 say beside themselves."""
    more: dict[str, Any] = {"ttlMs": 0, "cacheScope": "private"} if cached else {}
    info = {_META + "serverInfo": {"name": NAME, "version": VERSION}}
    return {"resultType": "complete", "_meta": info, **more, **result}


def _parsed(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_MESSAGE:
        raise Failed(INVALID_REQUEST, f"the message is longer than {MAX_MESSAGE} bytes")
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Failed(PARSE_ERROR, "this is not JSON") from None
    if isinstance(message, list):
        raise Failed(INVALID_REQUEST, "messages are sent one by one, not in batches")
    if not isinstance(message, dict):
        raise Failed(INVALID_REQUEST, "a message is an object")
    return message


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _id(message: dict[str, Any]) -> Any:
    id = message.get("id")
    if "id" in message and (isinstance(id, bool) or not isinstance(id, (str, int))):
        raise Failed(INVALID_REQUEST, "an id is a text or a whole number")
    return id


def _method(message: dict[str, Any]) -> str:
    method = message.get("method")
    if message.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise Failed(INVALID_REQUEST, "not a request of JSON-RPC 2.0")
    return method


# ---- lines


def lines(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Lines without their ends. Of one that is too long, one byte over the bound comes, and no more."""
    held, dropping = b"", False
    while True:
        data = read(1 << 16)
        if not data:
            if held.strip() and not dropping:
                yield held
            return
        *whole, held = (held + data).split(b"\n")
        for line in whole:
            if not dropping and line.strip():
                yield line[: MAX_MESSAGE + 1]
            dropping = False
        if dropping:
            held = b""
        elif len(held) > MAX_MESSAGE:
            yield held[: MAX_MESSAGE + 1]
            held, dropping = b"", True


def serve(server: Server, read: Callable[[int], bytes], write: Callable[[bytes], Any]) -> None:
    for line in lines(read):
        answer = server.handle(line)
        if answer is not None:
            write(json.dumps(answer, separators=(",", ":")).encode("ascii") + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="The documents of one request, as tools for a model (MCP).")
    parser.add_argument("--root", default="/work", help="the directory to show (default: /work)")
    options = parser.parse_args()
    try:
        documents = Documents(options.root)
    except OSError as error:
        print(f"documents: {options.root!a}: {error.strerror}", file=sys.stderr)
        return 1
    output = sys.stdout.buffer

    def write(data: bytes) -> None:
        output.write(data)
        output.flush()

    try:
        serve(Server(documents), lambda most: os.read(0, most), write)
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
    return 0


if __name__ == "__main__":
    sys.exit(main())
