"""Entries for systemd's journal, with fields, where standard error leads there (sd_journal_send(3);
$JOURNAL_STREAM in systemd.exec(5); the format: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).

Written out here and not taken from python3-systemd: it takes a socket for each entry and keeps none, since
a process closes all descriptors it does not know, and it never waits for a journal that hangs. What could not
be said in this way goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import struct
import sys
import uuid
from collections.abc import Mapping

__all__ = ["configure", "entry", "event_fields", "heard", "message_id", "send"]

_SOCKET = "/run/systemd/journal/socket"
# A name space for message ids, made once (uuid4). The id of an event is made of it and the event's name.
_EVENTS = uuid.UUID("8c5a4c86-2d0e-4b5c-9a4e-3f2b7b1d6a90")
_LARGEST = 48 << 10  # bytes of an entry; a datagram of the default net.core.wmem_default holds four of them
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_SYSLOG = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

Value = str | int | float | bool | None


def heard(descriptor: int = 2) -> bool:
    """Whether that descriptor is the connection to the journal which systemd made, and not one that somebody
    put in its place."""
    try:
        device, _, inode = os.environ["JOURNAL_STREAM"].partition(":")
        status = os.fstat(descriptor)
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (KeyError, ValueError, OSError):
        return False


def message_id(event: str) -> str:
    """The MESSAGE_ID of an event of egressd's journal: the same on every machine."""
    return uuid.uuid5(_EVENTS, event).hex


def priority(level: int) -> int:
    """Of syslog(3), for a level of `logging`."""
    return next(number for least, number in _SYSLOG if level >= least)


def entry(fields: Mapping[str, Value]) -> bytes:
    """One entry as it goes over the wire. Values are printable ASCII, whatever a stranger chose: the rest is
    escaped; a message alone may have several lines. Fields with names the journal would not take are left
    out, as is what does not fit."""
    found = b""
    for name, value in fields.items():
        shown = _shown(value, lines=name == "MESSAGE")
        if _NAME.fullmatch(name) is None or shown is None:
            continue
        data = name.encode() + b"\n" + struct.pack("<Q", len(shown)) + shown + b"\n"
        if len(found) + len(data) <= _LARGEST:
            found += data
    return found


def _shown(value: Value, *, lines: bool) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return json.dumps(value).encode()
    unfit = r"[^\n\x20-\x7e]" if lines else r"[^\x20-\x7e]"
    return re.sub(unfit, lambda found: found[0].encode("unicode_escape").decode(), value).encode()


def event_fields(
    *, event: str, process: str, level: int, message: str, fields: Mapping[str, Value]
) -> dict[str, Value]:
    """The entry for an event of egressd's own journal. WORKSPACE is the event's, its other fields are
    EGRESSD_NAME."""
    told = {_field_name(name): value for name, value in fields.items()}
    return told | {
        "MESSAGE": message,
        "MESSAGE_ID": message_id(event),
        "PRIORITY": level,
        "SYSLOG_IDENTIFIER": "egressd",
        "EGRESSD_EVENT": event,
        "EGRESSD_PROCESS": process,
    }


def _field_name(name: str) -> str:
    """`process` and `event` are taken by the entry's own."""
    if name == "workspace":
        return "WORKSPACE"
    return f"EGRESSD_{'OF_' if name in ('event', 'process') else ''}{name.upper()}"


def send(fields: Mapping[str, Value], *, path: str = _SOCKET) -> bool:
    """Whether the journal has taken the entry. Never waits, never raises."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(entry(fields), path)
    except OSError:
        return False
    return True


def configure(process: str, *, long_lived: bool, level: int = logging.INFO) -> None:
    """Logging of a process of egressd. `long_lived`: the journal asks the kernel whose an entry is when it
    reads it, and finds nobody if that process has ended; a short-lived one keeps to the stream, which is the
    unit's."""
    text = f"egressd[{process}]" if process else "egressd"
    if not heard():
        shape = f"{text}: %(levelname)s: %(message)s"
        logging.basicConfig(stream=sys.stderr, level=level, format=shape)
        return
    handler = _Journal(process or "supervisor") if long_lived else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefixed(f"{text}: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _Prefixed(logging.Formatter):
    """Lines that tell their priority (sd-daemon(3)), each of a traceback's as well."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{priority(record.levelno)}>{line}" for line in lines)


class _Journal(logging.Handler):
    """An entry with fields; if the journal does not take it, a line on standard error."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._plain = logging.Formatter("%(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not send(self._fields(record)):
                sys.stderr.write(self.format(record) + "\n")
                sys.stderr.flush()
        except Exception:  # as logging's own handlers do: nothing fails because it cannot be logged
            self.handleError(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, Value]:
        return {
            "MESSAGE": self._plain.format(record),
            "PRIORITY": priority(record.levelno),
            "SYSLOG_IDENTIFIER": "egressd",
            "EGRESSD_PROCESS": self._process,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
        }
