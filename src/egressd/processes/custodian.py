"""custodian: keeps the host's side of the way out as the foundation made it.

    python -m egressd.processes.custodian --fd supervisor=N --fd controller=N --fd ended=N --uid N --gid N
        --config-json J

Somebody flushes the host's firewall, takes addresses from egressd's device, switches forwarding off, moves
the default route to another device: approved traffic would fail until `egressd --mend`. It hears of that from
the kernel (notifications of nftables and routing; settings notify nobody, and are read every other second),
looks, and does what --mend does to the host. It reads nothing else of anybody: who can make it do something
has the rights that it has. Nothing waits for it, and without it everything that was denied stays denied.

Who fights it is not fought: what is put right again and again waits ever longer, up to a minute, and that is
told once. A look takes time where a host has many routes; it rests five times as long as the last one took.

It also has the host forget the connections of sandboxes that have ended (kernel/orphans.py), of which the
gateway tells it over a socket that can say nothing there.
"""

from __future__ import annotations

import logging
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.kernel import netlink
from egressd.kernel.monitor import Monitor
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.orphans import Departures
from egressd.kernel.routing import Tables
from egressd.model.errors import EgressdError, KernelError, ProtocolError
from egressd.processes import hostside
from egressd.processes.config import Config
from egressd.processes.ritual import begin, introduced
from egressd.ruleset import layout

__all__ = ["Custodian", "Patience", "main"]

log = logging.getLogger("egressd")

_TICK = 2.0  # seconds between two looks at what nobody tells of
_REST = 5.0  # times as long as the last look took
_SHORTEST = 0.05  # seconds between two looks
_TEXT = 2048  # characters of what was found
_UNTOLD = 16  # reports that wait for a controller
_PAUSE = 0.1  # seconds for connections to end in, between two looks at which did
_ENDS = 1000  # of them dealt with before anything else has its turn: twenty milliseconds
_SAID = 60.0  # seconds in which what was lost is told once


@dataclass(slots=True)
class Patience:
    """How long to leave it as it is. Times are monotonic seconds."""

    window: float = 60.0
    free: int = 5  # in a window that are put right at once
    longest: float = 60.0
    _when: deque[float] = field(default_factory=deque)

    def mended(self, now: float) -> float:
        """Something was put right; returns for how many seconds nothing will be."""
        while self._when and now - self._when[0] > self.window + self.longest:
            self._when.popleft()
        self._when.append(now)
        recent = sum(now - when <= self.window for when in self._when)
        return 0.0 if recent <= self.free else min(self.longest, 2.0 ** (recent - self.free))


class Custodian:
    """Made in the host's namespace, with CAP_NET_ADMIN over it."""

    def __init__(self, config: Config) -> None:
        self._config, self._pools = config, config.pools.pools()
        self._route, self._nft = Netlink(netlink.ROUTE), Nft()
        self.monitor = Monitor(ignore=[self._route.port])
        self._patience = Patience()
        self._fault = ""
        self._told_of_fight = False
        self._table: str | None = None  # as it was right after it was made
        self._not_before = 0.0
        self._suspects: set[str] = set()
        self._news = True
        self.reports: deque[messages.HostMended] = deque(maxlen=_UNTOLD)

    def close(self) -> None:
        self.monitor.close()
        self._route.close()

    # ---- hearing

    def hear(self) -> None:
        """Take in what the kernel tells; never waits."""
        news = self.monitor.news()
        self._suspects |= {batch.process for batch in news.batches if batch.process}
        self._news |= bool(news.batches) or news.routing or news.lost

    @property
    def waits(self) -> float:
        """Seconds until it may look, if there is news."""
        return max(0.0, self._not_before - time.monotonic()) if self._news else _TICK

    # ---- looking

    def look(self, *, tick: bool = False) -> None:
        """Put right what is not. Never raises: what cannot be put right is told once, and tried again."""
        began = time.monotonic()
        if began < self._not_before or not (self._news or tick):
            return
        self._news = False
        pause = _SHORTEST
        try:
            done = self._mend()
        except (EgressdError, OSError, ValueError) as error:
            self._cannot(str(error))
        else:
            self._fault = ""
            if done:
                pause = max(pause, self._mended(done))
        self._suspects.clear()
        took = time.monotonic() - began
        self._not_before = began + took + max(pause, _REST * took)

    def _mend(self) -> list[str]:
        if layout.HOST_LINK not in Tables(self._route).devices():
            raise KernelError(f"{layout.HOST_LINK} is gone: systemctl restart egressd makes it anew")
        done = self._mend_table()
        out = hostside.uplinks(self._route, self._config.uplinks)
        more, before = hostside.put_right(self._route, self._pools, out)
        if before:
            hostside.write_settings(Path(self._config.run_dir, hostside.CUSTODY), before)
        return done + more

    def _mend_table(self) -> list[str]:
        """Made anew at the start, since it is not known who had it before; then whenever it differs from what
        was read back right after that."""
        first = self._table is None
        found = hostside.listed(self._nft)
        if not first and found == self._table:
            return []
        self._make_table()
        self._table = hostside.listed(self._nft)
        if found == self._table:
            return []
        what = "was missing" if found is None else "was changed"
        return [f"table inet {layout.HOST_TABLE} {what}"]

    def _make_table(self) -> None:
        """What it tells of that is ours: one batch, which the kernel queues before it acknowledges it. (Not
        known by our process id: the kernel tells the one that we have outside of every container.)"""
        self.hear()
        hostside.make_table(self._nft, self._pools)
        news = self.monitor.news()
        self._news |= len(news.batches) != 1 or news.routing or news.lost

    # ---- telling

    def _mended(self, done: list[str]) -> float:
        what, who = "; ".join(done)[:_TEXT], ", ".join(sorted(self._suspects))[:_TEXT]
        log.warning("the host's side was changed by %s, and is put right: %s", who or "somebody", what)
        self.reports.append(messages.HostMended(what=what, restored=True, process=who))
        pause = self._patience.mended(time.monotonic())
        if pause and not self._told_of_fight:
            text = f"it is changed again and again; from now on it is left so for {pause:g} s and longer"
            log.error("the host's side: %s", text)
            self.reports.append(messages.HostMended(what=text, restored=False, process=who))
        self._told_of_fight = pause > 0
        self._news |= pause > 0  # what happens meanwhile may be a setting, of which nobody tells
        return pause

    def _cannot(self, text: str) -> None:
        if text != self._fault:
            log.error("the host's side cannot be put right: %s", text)
            self.reports.append(messages.HostMended(what=text[:_TEXT], restored=False))
        self._fault = text


@dataclass(slots=True)
class Farewell:
    """Has the host forget what has ended in the gateway, soon and in small portions."""

    departures: Departures
    _not_before: float = 0.0  # monotonic seconds
    _say_after: float = 0.0
    _lost: int = 0

    @property
    def waits(self) -> float:
        """Seconds until it looks again, if there is anything."""
        return max(0.0, self._not_before - time.monotonic())

    def look(self) -> None:
        """Never raises, never waits."""
        if self.waits:
            return
        try:
            count = self.departures.forget(_ENDS)
        except (EgressdError, OSError) as error:
            self._say(f"the host does not forget connections that have ended: {error}")
            count = 1
        if self.departures.lost > self._lost:
            self._lost = self.departures.lost
            self._say(
                "more connections ended at once than could be told of: what they left in the host's table"
                " stays for two hours, or until `egressd --mend`"
            )
        if 0 < count < _ENDS:
            self._not_before = time.monotonic() + _PAUSE

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._say_after:
            self._say_after = now + _SAID
            log.warning("%s", text)


@dataclass(slots=True)
class Loop:
    """poll(2) over the kernel's notifications, the supervisor, and the controller that is told."""

    custodian: Custodian
    farewell: Farewell
    supervisor: Channel[messages.TO_CHILD]
    controller: Channel[None] | None = None
    beat: float = 0.0
    ticked: float = 0.0

    def run(self) -> None:
        self.supervisor.send(messages.Ready())
        while self.turn():
            pass

    def connect(self, sock: socket.socket) -> None:
        if self.controller is not None:
            self.controller.close()
        sock.setblocking(False)
        self.controller = Channel(sock, None)

    def turn(self) -> bool:
        """Wait for something and deal with it; False without a supervisor."""
        peers = {"controller": self.connect}
        if self.supervisor in self._wait() and not introduced(self.supervisor, peers):
            return False
        self.custodian.hear()
        self.farewell.look()
        now = time.monotonic()
        tick = now - self.ticked >= _TICK
        self.custodian.look(tick=tick)
        if tick:
            self.ticked = now
        self._tell()
        if now - self.beat >= messages.HEARTBEAT:
            self.beat = now
            with suppress(OSError):
                self.supervisor.send(messages.Heartbeat())
        return True

    def _wait(self) -> list[Any]:
        pause, rest = min(self.custodian.waits, _TICK), self.farewell.waits
        sources: list[Any] = [self.custodian.monitor.tables, self.custodian.monitor.routing]
        # left out for a moment: many end together, and are dealt with together
        sources += [] if rest else [self.farewell.departures.told]
        pause = min(pause, rest) if rest else pause
        with selectors.PollSelector() as selector:
            selector.register(self.supervisor, selectors.EVENT_READ)
            for source in sources:
                selector.register(source, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(timeout=max(pause, 0.01))]

    def _tell(self) -> None:
        """What there is to tell waits for a controller that takes it."""
        reports = self.custodian.reports
        while reports and self.controller is not None:
            try:
                self.controller.send(reports[0])
            except BlockingIOError:
                return
            except (OSError, ProtocolError):
                self.controller.close()
                self.controller = None
                return
            reports.popleft()


def main(arguments: list[str] | None = None) -> int:
    start = begin("custodian", arguments)
    try:
        custodian = Custodian(start.config)
        farewell = Farewell(Departures(start.take("ended")))
    except EgressdError as error:
        log.error("%s", error)  # noqa: TRY400
        return 1
    supervisor = start.take("supervisor")
    loop = Loop(custodian, farewell, Channel(supervisor, messages.TO_CHILD))
    loop.connect(start.take("controller"))
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
