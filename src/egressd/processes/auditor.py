"""The auditor: writes down what was denied and what the others report. Never blocks anybody.

It reads from the kernel's packet log and from one socket per process, decides nothing, and answers only the
controller's questions about the journal. Whatever cannot be kept -- the kernel's buffer overflowed, the queue
is full, a sender could not hand something over -- is counted, and the count is recorded.

    nflog        what the guard's rules log: denials, also would-be ones, see denials.py
    flows        the end of each connection in the gateway, see flow_accounts.py
    audit-NAME   events of process NAME; what it says of its own name is not believed, the socket's is
    evidence     the controller's questions about the journal, see answering.py
    supervisor   new sockets for restarted processes
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egressd.ipc import journald, messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.journal import records
from egressd.model.errors import EgressdError, ProtocolError
from egressd.model.identities import Link
from egressd.processes import ritual
from egressd.processes.answering import Answering
from egressd.processes.denials import Attribution, PacketLog
from egressd.processes.flow_accounts import FlowLog, Hosts
from egressd.processes.journal_file import Draft, JournalFile, Writer, timestamp
from egressd.processes.journal_keys import open_keys
from egressd.processes.proving import Prover
from egressd.processes.told import Teller, inbox

__all__ = ["Auditor", "main"]

log = logging.getLogger(__name__)

_Told = messages.BindSource | messages.UnbindSource | messages.NameBlocks | messages.LinkErased
_READS = 64  # datagrams per wake-up, so that a flood of denials does not starve the other sockets
_LAST_READS = 4096  # messages still read from a socket that is about to be closed
_DATAGRAM = 1 << 17  # at least NFULA_CFG_NLBUFSIZ, see nflog.configure
_LAST_FLOWS = 3.0  # seconds for what the kernel has told when we are to end
# Seconds: the kernel hands over a batch of the packet log 0.1 s after its first packet (kernel.sockets), on a
# timer that may be a few jiffies late; and how long a closed link's last connections are waited for.
_LOGGED_WITHIN, _ENDED_WITHIN = 0.15, 3.0
_LOOK = 0.02  # seconds between two looks
# Seconds: how long a fresh auditor waits to hear whose links there are, at most, and after the first word.
_NAMES_WITHIN, _NAMES_AFTER = 2.0, 0.2
_TICK = 0.25  # seconds: how late a flood may be handed out
# Those who read strangers' bytes have words of their own. The others' are what evidence is made of: counters,
# flows, losses, who opened which sandbox.
_WORDS = {"resolver": "dns-", "inspector": "flow-", "relay": "relay-"}
_ENDS_OF_LINKS = frozenset({"sandbox-closed", "sandbox-lost"})
_HANDED_WITHIN = 5.0  # seconds; the supervisor wrote it before it started us
# What a person at the machine should see without asking: also on stderr, for the system's journal.
_NOTABLE = frozenset(
    {
        "tampered", "host-mended", "policy-refused", "spawn-refused", "dns-refused-address", "relay-denied",
        "lost", "journal-torn", "journal-damaged", "journal-truncated", "clock-stepped",
        "key-created", "key-rotated", "peer-broken", "log-ended", "drift", "books-unbalanced",
        "books-restarted", "process-hung", "process-killed", "sandbox-lost", "testimony-refused",
        "lease-refused", "gateway-dismantled",
    }
)  # fmt: skip
# Events that somebody here acts on, besides writing them down.
_HEEDED = _NOTABLE | _ENDS_OF_LINKS | {"sandbox-opening", "snapshot"}
_WARNING, _NOTICE = 4, 5  # sd-daemon(3) priorities


class Auditor:
    """The process: sockets in, drafts out."""

    def __init__(self, start: ritual.Start, writer: Writer, answering: Answering) -> None:
        self._writer, self._answering = writer, answering
        self._loop = asyncio.get_running_loop()
        self._attribution = Attribution()
        self._hosts = Hosts(start.config.pools.pools())
        self._packets = PacketLog(self._attribution, self._hosts)
        self._flows = FlowLog(self._attribution, self._hosts, submit=writer.submit)
        self._answering.settle = self._settle
        self._peers: dict[str, Teller] = {}
        self._inbox = inbox()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self._nflog = _kernel_log(start, "nflog")
        self._endings = _kernel_log(start, "flows")
        self._listening = False  # to the ends of connections
        if self._nflog is not None:
            self._loop.add_reader(self._nflog, self._read_nflog)
        self._supervisor = Peer(
            start.take("supervisor"), messages.TO_CHILD, handler=self._from_supervisor, gone=self._alone
        )
        for name in [name for name in start.sockets if _is_audit(name)]:
            self._listen(name, start.take(name))
        if "evidence" in start.sockets:
            self._answering.listen(start.take("evidence"))
        self._loop.call_later(_NAMES_WITHIN, self._listen_to_flows)

    async def run(self) -> str:
        """Serve until told to stop; returns why."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._finish, f"signal {number.name}")
        self._tell(messages.Ready())
        beating = self._loop.create_task(self._beat())
        why = await self.ended
        beating.cancel()
        self._last_reads()
        return why

    def _finish(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)

    async def _settle(self, link: Link | None) -> None:
        """Hand to the writer all that has happened by now: what lies in the kernel's buffers and in sockets,
        what would wait for the end of its second, and the last connections of a `link` that is closed."""
        await asyncio.sleep(_LOGGED_WITHIN)
        deadline = time.monotonic() + _ENDED_WITHIN
        while True:
            self._read_all()
            if link is None or not self._flows.awaits(link) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_LOOK)
        self._flows.drain()
        self._submit(self._packets.drain())

    def _read_all(self) -> None:
        """What lies in the sockets now; of one that is filled faster than it is read, not all."""
        for peer in list(self._peers.values()):
            peer.read(_LAST_READS)
        for _ in range(_LAST_READS // _READS):
            if self._read_nflog():
                break
        for _ in range(_LAST_READS // _READS):
            if self._read_flows():
                break

    def _last_reads(self) -> None:
        """What lies in the sockets was said before the end, and counts."""
        self._read_nflog()
        for name in list(self._peers):
            self._retire(name)
        self._listening, deadline = True, time.monotonic() + _LAST_FLOWS
        while not self._read_flows() and time.monotonic() < deadline:
            pass
        self._flows.settle_all()
        self._flows.drain()
        self._submit(self._packets.drain())

    # ---- the supervisor

    def _alone(self, peer: Peer, why: str) -> None:
        self._finish(f"the supervisor is gone: {why}")

    def _tell(self, message: messages.FROM_CHILD) -> None:
        with contextlib.suppress(PeerGone):
            self._supervisor.send(message)

    async def _beat(self) -> None:
        next_beat = 0.0
        while True:
            now = time.monotonic()
            self._submit(self._packets.due(now=now))
            self._flows.due(now=now)
            self._flows.settle(now=now, empty=False)
            if now >= next_beat:
                self._tell(messages.Heartbeat())
                next_beat = now + messages.HEARTBEAT
            await asyncio.sleep(_TICK)

    def _from_supervisor(self, peer: Peer, received: Received[Any]) -> None:
        sock = socket.socket(fileno=received.take())
        name = received.message.name
        if _is_audit(name):
            self._listen(name, sock)
        elif name == "evidence":
            self._answering.listen(sock)
        else:
            sock.close()

    # ---- the others

    def _listen(self, name: str, sock: socket.socket) -> None:
        """Begin to read from process `name`; an older socket of that name is read to its end and closed."""
        process = name.removeprefix("audit-")
        if name in self._peers:
            self._retire(name)
        self._peers[name] = Teller(
            sock,
            process,
            self._inbox,
            heard=lambda message: self._heard(name, process, message),
            sheaf=self._writer.submit_sheaf,
            gone=lambda peer, why: self._gone(name, process, peer, why),
        )

    def _retire(self, name: str) -> None:
        peer = self._peers[name]
        with contextlib.suppress(OSError, EOFError, ProtocolError):  # BlockingIOError: it is empty
            for _ in range(_LAST_READS):
                self._heard(name, name.removeprefix("audit-"), peer.channel.receive().message)
        if self._peers.get(name) is peer:
            del self._peers[name]
            peer.close("replaced")

    def _gone(self, name: str, process: str, peer: Teller, why: str) -> None:
        if process == "controller":
            self._attribution.unbind_all()  # its successor says anew which links there are
        if self._peers.get(name) is peer:
            del self._peers[name]
            self._record(process, "peer-ended" if why == "it ended" else "peer-broken", {"why": why})

    def _heard(self, name: str, process: str, message: Any) -> bool:
        """True: an event of a kind that means nothing but its record."""
        if process == "controller" and not self._listening:
            self._loop.call_later(_NAMES_AFTER, self._listen_to_flows)
        if isinstance(message, messages.Event):
            if message.event.startswith(_WORDS.get(process, "")):
                self._happened(process, message)
                return message.event not in _HEEDED
            self._peers[name].close(f"{message.event} is not for {process} to say")
        elif isinstance(message, messages.Losses):
            self._writer.lose(cause="sender", process=process, count=message.count)
        elif process != ("warden" if isinstance(message, messages.LinkErased) else "controller"):
            self._peers[name].close(f"{type(message).__name__} is not for {process} to say")
        else:
            self._learn(message)
        return False

    def _happened(self, process: str, said: messages.Event) -> None:
        fields: dict[str, Any] = dict(said.fields)
        if said.process != process:
            fields["claimed_process"] = said.process
        recorded = self._record(process, said.event, fields)
        if process == "controller":
            self._follow_link(said.event, fields)
            if said.event == "snapshot" and recorded:
                self._answering.snapshot_submitted(fields.get("snapshot"))

    def _follow_link(self, event: str, fields: dict[str, Any]) -> None:
        """What the controller's events say of a link's life."""
        link = _link_named(fields.get("link"))
        if link is not None and event == "sandbox-opening":
            self._flows.opening(link)
        elif link is not None and event in _ENDS_OF_LINKS:
            self._flows.closed(link, fields, at=timestamp(), now=time.monotonic())
            self._read_flows()

    def _learn(self, message: _Told) -> None:
        """What somebody who knows says of links and names. What the kernel told before is read first: it is
        of the time before."""
        match message:
            case messages.LinkErased():
                self._flows.erased(Link(message.link))
                self._read_flows()
            case messages.UnbindSource():
                self._attribution.unbind(Link(message.link))
            case messages.BindSource():
                self._read_flows()
                self._attribution.bind(
                    Link(message.link), message.workspace, message.source4, message.source6
                )
            case messages.NameBlocks():
                self._read_flows()
                self._hosts.learn(message.workspace, message.index, message.hosts, now=time.time_ns())

    # ---- the kernel

    def _received(self, sock: socket.socket, cause: str) -> Iterator[bytes | None]:
        """What the kernel told, as far as one turn goes. None: nothing more just now. Empty: never again.
        `cause`: how a loss is called, with an errno's name in it."""
        for _ in range(_READS):
            try:
                datagram = sock.recv(_DATAGRAM)
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                # ENOBUFS (netlink(7)): the socket's buffer overflowed. What that cost is seen later: of the
                # packet log from its numbers, with the next one; of connections in the sums of their links.
                self._writer.lose(cause=cause.format(_errno_name(error)), process="kernel", count=1)
                if error.errno == errno.ENOBUFS:
                    continue
                datagram = b""
            yield datagram
            if not datagram:
                return

    def _read_nflog(self) -> bool:
        """What the kernel has logged. True: there was no more."""
        empty = self._nflog is None
        for datagram in self._received(self._nflog, "netlink-{}") if self._nflog is not None else ():
            if datagram:
                self._submit(self._packets.read(datagram, now=time.monotonic()))
            elif datagram is None:
                empty = True
            else:
                self._stopped(self._nflog, "the kernel's packet log")
                self._nflog = None
        self._report_losses()
        return empty

    def _listen_to_flows(self) -> None:
        """A restarted auditor finds what the kernel told meanwhile, and first has to hear from the controller
        whose it is."""
        if self._endings is not None and not self._listening:
            self._loop.add_reader(self._endings, self._read_flows)
        self._listening = True

    def _read_flows(self) -> bool:
        """Ends of connections, as far as they have been told. True: there were no more."""
        if not self._listening:
            return False
        empty = self._endings is None
        for datagram in self._received(self._endings, "flows-{}") if self._endings is not None else ():
            if datagram:
                self._flows.read(datagram, now=time.monotonic())
            elif datagram is None:
                empty = True
            else:
                self._stopped(self._endings, "the ends of connections")
                self._endings = None
                return True
        self._flows.settle(now=time.monotonic(), empty=empty)
        self._report_losses()
        return empty

    def _stopped(self, sock: socket.socket | None, what: str) -> None:
        assert sock is not None
        self._loop.remove_reader(sock)
        self._record("auditor", "log-ended", {"text": f"{what} can no longer be read"})

    def _report_losses(self) -> None:
        for cause, count in (
            ("netlink", self._packets.lost),
            ("malformed", self._packets.malformed),
            ("flows-malformed", self._flows.malformed),
            ("flows-uncounted", self._flows.uncounted),
        ):
            if count:
                self._writer.lose(cause=cause, process="kernel", count=count)
        self._packets.lost = self._packets.malformed = 0
        self._flows.malformed = self._flows.uncounted = 0

    # ---- writing

    def _submit(self, drafts: list[Draft]) -> None:
        for draft in drafts:
            self._writer.submit(draft)

    def _record(self, process: str, event: str, fields: dict[str, Any]) -> bool:
        return self._writer.submit(Draft(timestamp(), process, event, records.bounded(fields)))


def _kernel_log(start: ritual.Start, name: str) -> socket.socket | None:
    sock = start.sockets.pop(name, None)
    if sock is not None:
        sock.setblocking(False)
    return sock


def _link_named(value: Any) -> Link | None:
    """A link as records name it, or by number as they once did."""
    if isinstance(value, str):
        return Link.of_device(value)
    return Link(value) if isinstance(value, int) and 1 <= value <= 999_999_999 else None


def _is_audit(name: str) -> bool:
    return name.startswith("audit-") and len(name) > len("audit-")


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown").lower()


class Herald:
    """Notable records as entries with fields, where a system's journal listens. Never waits for it."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._poll = select.poll()
        self._poll.register(sys.stderr.fileno(), select.POLLOUT)

    def __call__(self, draft: Draft) -> None:
        if not self._enabled or draft.event not in _NOTABLE:
            return
        fields = dict(draft.fields)
        text = f"{draft.process}: {draft.event} {json.dumps(fields, sort_keys=True)}"
        named = journald.event_fields(
            event=draft.event, process=draft.process, level=_WARNING, message=text, fields=fields
        )
        if not journald.send(named):
            self.line(_WARNING, text)

    def say(self, text: str) -> None:
        """For people, with or without systemd."""
        self.line(_NOTICE, f"egressd[auditor]: {text}")

    def line(self, priority: int, text: str) -> None:
        """One line of at most PIPE_BUF bytes, which POLLOUT promises to have room for (pipe(7))."""
        prefix = f"<{priority}>" if self._enabled else ""
        data = f"{prefix}{text}".encode("ascii", "backslashreplace")[: select.PIPE_BUF - 1] + b"\n"
        if any(event & select.POLLOUT for _, event in self._poll.poll(0)):
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), data)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when told to stop, 1 when the journal cannot be opened."""
    try:
        start = ritual.begin("auditor", arguments)
    except ProtocolError as error:
        print(f"egressd[auditor]: {error}", file=sys.stderr)
        return 1
    herald = Herald(enabled=journald.heard())
    state = Path(start.config.state_dir)
    try:
        keys = open_keys(state / "keys", _credential(start))
        journal = JournalFile(state / "journal", keys=keys)
    except (OSError, EgressdError) as error:
        herald.say(f"the journal cannot be opened: {error}")
        return 1
    writer = Writer(journal, say=herald.say, written=herald, modest=frozenset(_WORDS))
    answering = Answering(writer, keys, Prover(state / "journal"))
    why = asyncio.run(_serve(start, writer, answering))
    log.info("ending: %s", why)
    return 0 if writer.end() else 1


def _credential(start: ritual.Start) -> bytes | None:
    """The signing key, where the system manager holds it instead of a file."""
    sock = start.sockets.pop("credential", None)
    if sock is None:
        return None
    with sock:
        sock.settimeout(_HANDED_WITHIN)
        parts = list(iter(lambda: sock.recv(1 << 16), b""))
    return b"".join(parts)


async def _serve(start: ritual.Start, writer: Writer, answering: Answering) -> str:
    return await Auditor(start, writer, answering).run()


if __name__ == "__main__":
    sys.exit(main())
