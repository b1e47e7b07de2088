"""A daemon that says what it is told to, over the real control socket and the real channel."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from egressd.cli.main import main
from egressd.ipc import messages
from egressd.ipc.channel import Channel, payload
from egressd.model.errors import ProtocolError


@dataclass
class Daemon:
    """Answers everything with `document`, or refuses with `refusal`; remembers what it was asked. `status` is
    its answer to that question if it is to be another."""

    run_dir: Path
    document: Any = field(default_factory=dict)
    status: Any = None
    then: Any = None  # what `document` becomes after the first answer
    refusal: messages.Refusal | None = None
    hang_up: bool = False
    asked: list[Any] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                self._answer(Channel(connection, messages.FROM_CLIENT))

    def _answer(self, channel: Channel[Any]) -> None:
        """One client, until it has no more questions."""
        while True:
            try:
                asked = channel.receive().message
            except (EOFError, ProtocolError):
                return
            self.asked.append(asked)
            if self.hang_up:
                return
            if self.refusal is not None:
                channel.send(self.refusal)
                continue
            data = json.dumps(self._document_for(asked)).encode()
            with payload(data) as descriptor:
                channel.send(messages.Answer(payload_length=len(data)), descriptor=descriptor)

    def _document_for(self, asked: Any) -> Any:
        if self.status is not None and asked == messages.Ask(what="status"):
            return self.status
        document = self.document
        self.document = self.document if self.then is None else self.then
        return document


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    daemon = Daemon(tmp_path)
    thread = threading.Thread(target=daemon.serve, args=(listener,))
    thread.start()
    yield daemon
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Exactly one document, and nothing else, on standard output."""
        return json.loads(self.out)


class Egressctl:
    """Runs the program in this process: the exit status and what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Outcome:
        self._capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
        written = self._capsys.readouterr()
        return Outcome(status, written.out, written.err)


@pytest.fixture
def egressctl(capsys: pytest.CaptureFixture[str]) -> Egressctl:
    return Egressctl(capsys)
