"""Putting on record, over the daemon's control socket, what this service says happened.

A change is recorded before it is made, and whoever wants it waits. A refusal is recorded after its answer, by
one thread and from a bounded line: what an asker sees, and when, never depends on it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from egressd.model.errors import EgressdError
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control, Fact

__all__ = ["Note", "Witness", "record"]

log = logging.getLogger("broker")
_MOST_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Note:
    """A refusal, under a number of its own. `text` is worked out by the thread that records it."""

    request: str
    workspace: str
    asker: str
    action: str
    code: int
    text: Callable[[], str]


def record(run_dir: str, workspace: str, event: str, fields: Mapping[str, Fact]) -> None:
    """Returns when it is on record. `Refused` where it cannot be."""
    with Control(run_dir) as control:
        control.enter(workspace)
        control.testify(event, fields)


class Witness:
    def __init__(self, run_dir: str, *, most: int = 256) -> None:
        self._run_dir = run_dir
        self._line: queue.Queue[Note | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._work, name="witness", daemon=True)
        self._thread.start()
        self.lost = 0  # refusals for which there was no room

    def record(self, workspace: str, event: str, fields: Mapping[str, Fact]) -> None:
        record(self._run_dir, workspace, event, fields)

    def refusal(self, note: Note) -> None:
        """Never waits."""
        try:
            self._line.put_nowait(note)
        except queue.Full:
            self.lost += 1
            if self.lost == 1 or self.lost % 1000 == 0:
                log.warning("refusals come faster than they can be recorded: %d are not", self.lost)

    def close(self) -> None:
        """What is in the line is recorded, for a few seconds at most."""
        try:
            self._line.put(None, timeout=5)
        except queue.Full:
            return
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while (note := self._line.get()) is not None:
            try:
                self.record(note.workspace, "request-refused", _fields(note))
            except EgressdError as error:
                # an asker can invent workspaces without end
                unknown = getattr(error, "reason", None) in (Reason.WORKSPACE, Reason.MEMBER)
                level = logging.DEBUG if unknown else logging.WARNING
                log.log(level, "a refusal is not on record: %s", error)
            except Exception:
                log.exception("a refusal is not on record")


def _fields(note: Note) -> dict[str, Fact]:
    return {
        "request": note.request,
        "asker": note.asker,
        "action": note.action,
        "text": note.text()[:_MOST_TEXT],
        "code": note.code,
    }
