"""The auditor: writes down what was denied and what the others report. Never blocks anybody.

It reads from the kernel's packet log and from one socket per process, decides nothing and answers
nobody. Whatever cannot be kept -- the kernel's buffer overflowed, the queue is full, a sender could not
hand something over -- is counted, and the count is recorded.

    nflog        what the guard's rules log: denials, and would-be denials of an observing workspace
    audit-NAME   events of process NAME; what it says of its own name is not believed, the socket's is
    supervisor   new sockets for restarted processes

A denial is attributed to a link by the interface it came in on, else by its validated source address. A
forged source attributes nothing.

Floods: equal denials within a second are one record with the count of logged packets. The guard logs at a
bounded rate, so that count is a lower bound; the exact totals are the kernel's counters.
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
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.journal import records
from egressd.journal.floods import Flood, Floods
from egressd.journal.records import Scalar
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.packets import headers, nflog
from egressd.processes import ritual
from egressd.processes.journal_file import Draft, JournalBusy, JournalFile, Writer, timestamp
from egressd.ruleset.layout import ADMITTED, LINK_INDEX

__all__ = ["Attribution", "Auditor", "Denial", "PacketLog", "main"]

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address
# Rules that a packet only meets after the guard has compared its source with the link's own addresses.
_SOURCE_VALIDATED = frozenset(
    {Reason.UNLISTED, Reason.PORT, Reason.ADDRESS, Reason.UNRESOLVED, Reason.CONNECTIONS, Reason.INVALID}
)
_REMEMBERED = 65_536  # links, and addresses of ended ones, kept for late log messages
_READS = 64  # datagrams per wake-up, so that a flood of denials does not starve the other sockets
_LAST_READS = 4096  # messages still read from a socket that is about to be closed
_DATAGRAM = 1 << 17  # at least NFULA_CFG_NLBUFSIZ, see nflog.configure
_TICK = 0.25  # seconds: how late a flood may be handed out
# What a person at the machine should see without asking: also on stderr, for the system's journal.
_NOTABLE = frozenset(
    {
        "tampered", "policy-refused", "spawn-refused", "dns-refused-address", "relay-denied", "lost",
        "journal-torn", "journal-damaged", "peer-broken", "log-ended",
    }
)  # fmt: skip
_WARNING, _NOTICE = 4, 5  # sd-daemon(3) priorities


@dataclass(frozen=True, slots=True)
class Denial:
    """What makes two denials equal."""

    event: str  # "denied", or "observed" where the packet went on
    workspace: str | None
    reason: Reason
    indev: int | None
    source: Address | None  # None where it is not validated: it may be another one in every packet
    destination: Address | None
    port: int | None
    protocol: str


class Attribution:
    """Which link a packet belongs to: by the interface it came in on, which nobody in a sandbox can choose;
    where that is not known, by a source address that the guard has validated."""

    def __init__(self) -> None:
        self._sources: dict[Address, tuple[Link, str]] = {}
        self._ended: OrderedDict[Address, tuple[Link, str]] = OrderedDict()
        self._workspaces: OrderedDict[Link, str] = OrderedDict()

    def bind(self, link: Link, workspace: str, *addresses: Address) -> None:
        self._workspaces[link] = workspace
        self._workspaces.move_to_end(link)
        _bound(self._workspaces)
        for address in addresses:
            self._sources[address] = (link, workspace)
            self._ended.pop(address, None)

    def unbind(self, link: Link) -> None:
        """The link is gone; what it did last may still be under way, so it is remembered as ended."""
        for address in [a for a, (bound, _) in self._sources.items() if bound == link]:
            self._ended[address] = self._sources.pop(address)
            _bound(self._ended)

    def unbind_all(self) -> None:
        for link in {link for link, _ in self._sources.values()}:
            self.unbind(link)

    def link_of(self, denial: Denial) -> Link | None:
        """None where nothing says whose it was, or where what is known of the link contradicts the rule
        that logged it."""
        link = _link_at(denial.indev)
        if link is not None:
            return link if self._workspaces.get(link, denial.workspace) == denial.workspace else None
        if denial.source is None:
            return None
        found = self._sources.get(denial.source) or self._ended.get(denial.source)
        return found[0] if found is not None and found[1] == denial.workspace else None


def _link_at(index: int | None) -> Link | None:
    try:
        return None if index is None else Link(index - LINK_INDEX)
    except ValueError:
        return None


def _bound(mapping: OrderedDict[Any, Any]) -> None:
    while len(mapping) > _REMEMBERED:
        mapping.popitem(last=False)


class PacketLog:
    """From datagrams of the kernel's packet log to drafts of records. `lost` is added up by the reader."""

    def __init__(self, attribution: Attribution) -> None:
        self._attribution = attribution
        self._floods: Floods[Denial, tuple[nflog.Logged, headers.Attempt]] = Floods()
        self._sequence: dict[int, int] = {}
        self.lost = 0  # packets the kernel logged and could not hand over
        self.malformed = 0

    def read(self, datagram: bytes, *, now: float) -> list[Draft]:
        """`now` on a monotonic clock."""
        drafts = []
        for message in nflog.parse(datagram):
            if isinstance(message, nflog.Logged):
                drafts += self._logged(message, now)
            elif isinstance(message, nflog.Malformed):
                self.malformed += 1
        return drafts

    def _logged(self, logged: nflog.Logged, now: float) -> list[Draft]:
        self._count_lost(logged)
        attempt = headers.parse(logged.payload, ethertype=logged.ethertype)
        over = self._floods.add(_denial(logged, attempt), (logged, attempt), now=now)
        return [self._draft(flood) for flood in over]

    def _count_lost(self, logged: nflog.Logged) -> None:
        if logged.sequence is None:
            return
        expected = self._sequence.get(logged.group)
        self._sequence[logged.group] = (logged.sequence + 1) & 0xFFFF_FFFF
        if expected is not None:
            gap = (logged.sequence - expected) & 0xFFFF_FFFF
            if gap < 1 << 31:  # more is a group that was bound anew and counts from 0
                self.lost += gap

    def due(self, *, now: float) -> list[Draft]:
        return [self._draft(flood) for flood in self._floods.due(now=now)]

    def drain(self) -> list[Draft]:
        return [self._draft(flood) for flood in self._floods.drain()]

    def _draft(self, flood: Flood[Denial, tuple[nflog.Logged, headers.Attempt]]) -> Draft:
        denial, (logged, attempt) = flood.key, flood.detail
        link = self._attribution.link_of(denial)
        fields: dict[str, Scalar] = {
            "link": link.device if link else None,
            "workspace": denial.workspace,
            "reason": str(denial.reason),
            "protocol": denial.protocol,
            "source": _text(attempt.source),
            "destination": _text(denial.destination),
            "port": denial.port,
            "packets": flood.count,
        }
        if link is None:
            fields["interface_index"] = denial.indev
        if denial.workspace is None:
            fields["prefix"] = logged.prefix
        if flood.count > 1:
            fields["seconds"] = round(flood.last - flood.first, 3)
            fields["note"] = "logged packets; exact totals are in the kernel's counters"
        fields.update(_details(attempt))
        return Draft(timestamp(logged.time), "auditor", denial.event, records.bounded(fields))


def _denial(logged: nflog.Logged, attempt: headers.Attempt) -> Denial:
    about = nflog.subject(logged.prefix)
    return Denial(
        event="observed" if logged.mark & ADMITTED else "denied",
        workspace=about.workspace,
        reason=about.reason,
        indev=logged.indev,
        source=attempt.source if about.reason in _SOURCE_VALIDATED else None,
        destination=attempt.destination,
        port=attempt.destination_port,
        protocol=attempt.protocol,
    )


def _details(attempt: headers.Attempt) -> dict[str, Scalar]:
    """Of the first packet, what is out of the ordinary."""
    found: dict[str, Scalar] = {}
    if attempt.tcp_flags and attempt.tcp_flags != ("syn",):
        found["tcp_flags"] = " ".join(attempt.tcp_flags)
    if attempt.icmp_type is not None:
        found["icmp_type"], found["icmp_code"] = attempt.icmp_type, attempt.icmp_code
    for name in ("fragment", "options", "truncated"):
        if getattr(attempt, name):
            found[name] = True
    return found


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)


class Auditor:
    """The process: sockets in, drafts out."""

    def __init__(self, start: ritual.Start, writer: Writer) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._attribution = Attribution()
        self._packets = PacketLog(self._attribution)
        self._peers: dict[str, Peer] = {}
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self._nflog = start.sockets.pop("nflog", None)
        if self._nflog is not None:
            self._nflog.setblocking(False)
            self._loop.add_reader(self._nflog, self._read_nflog)
        self._supervisor = Peer(
            start.take("supervisor"), messages.TO_CHILD, handler=self._from_supervisor, gone=self._alone
        )
        for name in [name for name in start.sockets if _is_audit(name)]:
            self._listen(name, start.take(name))

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

    def _last_reads(self) -> None:
        """What lies in the sockets was said before the end, and counts."""
        if self._nflog is not None:
            self._read_nflog()
        for name in list(self._peers):
            self._retire(name)
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
            if now >= next_beat:
                self._tell(messages.Heartbeat())
                next_beat = now + messages.HEARTBEAT
            await asyncio.sleep(_TICK)

    def _from_supervisor(self, peer: Peer, received: Received[Any]) -> None:
        sock = socket.socket(fileno=received.take())
        name = received.message.name
        if _is_audit(name):
            self._listen(name, sock)
        else:
            sock.close()

    # ---- the others

    def _listen(self, name: str, sock: socket.socket) -> None:
        """Begin to read from process `name`; an older socket of that name is read to its end and closed."""
        process = name.removeprefix("audit-")
        if name in self._peers:
            self._retire(name)
        self._peers[name] = Peer(
            sock,
            messages.TO_AUDITOR,
            handler=lambda _, received: self._heard(name, process, received.message),
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

    def _gone(self, name: str, process: str, peer: Peer, why: str) -> None:
        if process == "controller":
            self._attribution.unbind_all()  # its successor says anew which links there are
        if self._peers.get(name) is peer:
            del self._peers[name]
            self._record(process, "peer-ended" if why == "it ended" else "peer-broken", {"why": why})

    def _heard(self, name: str, process: str, message: Any) -> None:
        if isinstance(message, messages.Event):
            fields: dict[str, Any] = dict(message.fields)
            if message.process != process:
                fields["claimed_process"] = message.process
            self._record(process, message.event, fields)
        elif isinstance(message, messages.Losses):
            self._writer.lose(cause="sender", process=process, count=message.count)
        elif process != "controller":
            self._peers[name].close(f"{type(message).__name__} is not for {process} to say")
        else:
            self._bind(message)

    def _bind(self, message: messages.BindSource | messages.UnbindSource) -> None:
        link = Link(message.link)
        if isinstance(message, messages.BindSource):
            self._attribution.bind(link, message.workspace, message.source4, message.source6)
        else:
            self._attribution.unbind(link)

    # ---- the kernel

    def _read_nflog(self) -> None:
        assert self._nflog is not None
        for _ in range(_READS):
            try:
                datagram = self._nflog.recv(_DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                # ENOBUFS (netlink(7)): the socket's buffer overflowed. How many packets that cost is seen
                # from their numbers, as soon as the next one arrives.
                self._writer.lose(cause=f"netlink-{_errno_name(error)}", process="kernel", count=1)
                if error.errno != errno.ENOBUFS:
                    self._stop_nflog()
                    break
                continue
            if not datagram:
                self._stop_nflog()
                break
            self._submit(self._packets.read(datagram, now=time.monotonic()))
        self._report_losses()

    def _stop_nflog(self) -> None:
        assert self._nflog is not None
        self._loop.remove_reader(self._nflog)
        self._record("auditor", "log-ended", {"text": "the kernel's packet log can no longer be read"})

    def _report_losses(self) -> None:
        for cause, count in (("netlink", self._packets.lost), ("malformed", self._packets.malformed)):
            if count:
                self._writer.lose(cause=cause, process="kernel", count=count)
        self._packets.lost = self._packets.malformed = 0

    # ---- writing

    def _submit(self, drafts: list[Draft]) -> None:
        for draft in drafts:
            self._writer.submit(draft)

    def _record(self, process: str, event: str, fields: dict[str, Any]) -> None:
        self._writer.submit(Draft(timestamp(), process, event, records.bounded(fields)))


def _is_audit(name: str) -> bool:
    return name.startswith("audit-") and len(name) > len("audit-")


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown").lower()


class Herald:
    """Notable records as lines on stderr, where a system's journal listens. Never waits for it."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._poll = select.poll()
        self._poll.register(sys.stderr.fileno(), select.POLLOUT)

    def __call__(self, draft: Draft) -> None:
        if self._enabled and draft.event in _NOTABLE:
            fields = json.dumps(dict(draft.fields), sort_keys=True)
            self.line(_WARNING, f"{draft.process}: {draft.event} {fields}")

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
    herald = Herald(enabled="JOURNAL_STREAM" in os.environ)
    try:
        journal = JournalFile(Path(start.config.state_dir) / "journal")
    except (OSError, JournalBusy) as error:
        herald.say(f"the journal cannot be opened: {error}")
        return 1
    writer = Writer(journal, say=herald.say, written=herald)
    why = asyncio.run(_serve(start, writer))
    log.info("ending: %s", why)
    return 0 if writer.end() else 1


async def _serve(start: ritual.Start, writer: Writer) -> str:
    return await Auditor(start, writer).run()


if __name__ == "__main__":
    sys.exit(main())
