"""The stand-in for egressd that goes away and comes back, its links staying.
`python returning_daemon.py RUN_DIR NAMESPACE`; lines on standard input say what it does:

    cut            end every connection without a word
    away           the same, and nobody listens from then on
    back           listen again
    resume HOW     what `Resume` is answered from now on: see `_resume`
    close          take all links away, as after leases that nobody resumed
"""

# ruff: noqa: PTH101, PTH108
from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from typing import Any

import fake_daemon
from fake_daemon import FakeDaemon

from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.ruleset import layout


class ReturningDaemon(FakeDaemon):
    def __init__(self, run_dir: str) -> None:
        super().__init__(run_dir)
        self.how = ["lease"]  # the last stays
        self.live: set[socket.socket] = set()
        self.leases: dict[int, tuple[int, int]] = {}  # link -> its namespace's identity
        self.testified: set[tuple[int, str]] = set()
        self.listener: socket.socket | None = None

    def serve(self) -> None:
        for service in (fake_daemon.OLLAMA, fake_daemon.OTHER):
            for address in (service.address4, service.address6):
                threading.Thread(target=fake_daemon._answer, args=(service, address), daemon=True).start()
        self._listen()
        print("ready", flush=True)
        poll = select.poll()
        poll.register(0, select.POLLIN)
        while True:
            if self.listener is not None:
                poll.register(self.listener, select.POLLIN)
            ready = {number for number, _ in poll.poll()}
            if self.listener is not None and self.listener.fileno() in ready:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()
            if self.listener is not None:
                poll.unregister(self.listener)
            if 0 in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                self._do(*line.split())
                print("done", flush=True)

    def _do(self, verb: str, *words: str) -> None:
        match verb:
            case "cut":
                self._cut()
            case "away":
                assert self.listener is not None
                self.listener.close()
                self.listener = None
                self._cut()
            case "back":
                self._listen()
            case "resume":
                self.how = list(words)
            case "close":
                for number in list(self.leases):
                    self._give_back(Link(number))

    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        os.chmod(self.path, 0o666)
        self.listener.listen(256)

    def _cut(self) -> None:
        with self.lock:
            for connection in self.live:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.live.clear()

    def talk(self, connection: socket.socket) -> None:
        """A connection that is cut takes its lease nowhere; one that the other end closes gives it back."""
        channel: Channel[Any] = Channel(connection, messages.FROM_CLIENT)
        with self.lock:
            self.live.add(connection)
        workspace, link = "", None
        with contextlib.suppress(OSError, ProtocolError, EOFError):
            while True:
                received = channel.receive()
                match received.message:
                    case messages.Enter(workspace=workspace):
                        self._enter(channel, workspace)
                    case messages.Attach():
                        link = self._attach_known(channel, workspace, received.take())
                    case messages.Resume(link=number):
                        link = self._resume(channel, number, received.take())
                    case messages.Ended():
                        self._write_down("ended.jsonl", received.message)
                    case messages.Testify():
                        self._hear(channel, workspace, received.message, link)
                    case messages.ReadSpent():
                        if self._dies("spent"):
                            self._cut()
                            raise EOFError
                        channel.send(messages.Spent(counters=fake_daemon.COUNTERS))
                    case _:
                        pass
        with self.lock:
            ours = connection in self.live
            self.live.discard(connection)
        if link is not None and ours:
            self._give_back(link)
        channel.close()

    def _attach_known(self, channel: Channel[Any], workspace: str, namespace: int) -> Link | None:
        status = os.fstat(namespace)
        link = self._attach(channel, workspace, namespace)
        if link is not None:
            self.leases[link.number] = status.st_dev, status.st_ino
        return link

    def _resume(self, channel: Channel[Any], number: int, namespace: int) -> Link | None:
        status = os.fstat(namespace)
        os.close(namespace)
        self._write_down("resumed.jsonl", number)
        how = self.how.pop(0) if len(self.how) > 1 else self.how[0]
        link = Link(number)
        address4, address6 = layout.Pools().sandbox(link)
        if self.leases.get(number) != (status.st_dev, status.st_ino):
            channel.send(messages.Refusal(reason="namespace", text="that is not the lease's network"))
            return None
        match how:
            case "refuse":
                channel.send(messages.Refusal(reason="member", text="its time is over"))
            case "later":
                channel.send(messages.Refusal(reason="limit", text="too many connections to egressd"))
                raise EOFError
            case "starting":
                channel.send(messages.Refusal(reason="unavailable", text="the warden is not running"))
            case "other":
                channel.send(messages.Lease(link=number + 1, address4=address4, address6=address6))
            case "terms":
                channel.send(messages.Terms(workspace="plain", guard="enforce", policy=""))
            case "revoke":
                channel.send(messages.Revoked(text="egressd is stopping"))
            case "hang-up":
                raise EOFError
            case "nonsense":
                channel.socket.send(b'{"type":"Nonsense"}')
            case "mute":
                pass
            case _:
                channel.send(messages.Lease(link=number, address4=address4, address6=address6))
                return link
        return None

    def _dies(self, when: str) -> bool:
        """Once: `resume HOW... dies:WHEN` is not for `Resume` alone."""
        if f"dies:{when}" not in self.how:
            return False
        self.how.remove(f"dies:{when}")
        return True

    def _hear(self, channel: Channel[Any], workspace: str, word: messages.Testify, link: Link | None) -> None:
        """As the controller does, it takes each word about a sandbox once."""
        said = (link.number if link else 0, word.event)
        if self._dies(f"before:{word.event}"):
            self._cut()
            raise EOFError
        if link is not None and said in self.testified and word.event != "request-files":
            text = f"{word.event} was said of this sandbox"
            channel.send(messages.Refusal(reason="protocol", text=text))
            return
        self.testified.add(said)
        if self._dies(f"after:{word.event}"):
            self._write_down("testified.jsonl", {"link": link and link.number, "event": word.event,
                                                 "fields": word.fields})  # fmt: skip
            self._cut()
            raise EOFError
        self._testify(channel, workspace, word, link)

    def _give_back(self, link: Link) -> None:
        self.leases.pop(link.number, None)
        self._remove(link)


if __name__ == "__main__":
    fake_daemon.main(ReturningDaemon)
