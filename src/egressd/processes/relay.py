"""The relay: takes the connections the gateway steers here for local services, and carries them there.

How connections arrive, and who they are from: `steered.py`. Caller and destination must together be a relay
the controller has announced; anything else is reset at once and recorded.

The listeners live in the gateway; this process, and so every socket it dials with, in the host's namespace,
where 127.0.0.1 is the host's. It dials 127.0.0.1 and the announced port, nothing else.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.processes import ritual
from egressd.processes.dialing import Target
from egressd.processes.flows import Poller
from egressd.processes.steered import House, Limits, Program, Visit
from egressd.ruleset.layout import Pools

__all__ = ["Relay", "Relays", "main"]

log = logging.getLogger(__name__)


class _Visit(Visit):
    __slots__ = ("relay",)

    relay: messages.Relay


class Relays(House):
    """Who may reach which local service, and the flows that do."""

    dial_within: ClassVar[float] = 3.0  # 127.0.0.1 answers at once, unless its backlog is full
    denied_event: ClassVar[str] = "relay-denied"
    failed_event: ClassVar[str] = "relay-failed"
    closed_event: ClassVar[str] = "relay-closed"
    label: ClassVar[str] = "service"

    def __init__(self, poller: Poller, *, pools: Pools, auditing: ritual.Auditing, limits: Limits) -> None:
        super().__init__(poller, pools=pools, auditing=auditing, limits=limits)
        self._services: dict[tuple[str, int, int], messages.Relay] = {}

    def announce(self, relays: Iterable[messages.Relay]) -> int:
        """These relays and no others. Returns how many flows had to be closed."""
        self._services = {(relay.workspace, relay.block, relay.port): relay for relay in relays}
        gone = [v for v in self.visits if isinstance(v, _Visit) and not self._announced(v.relay)]
        for visit in gone:
            visit.end("revoked")
        return len(gone)

    def _announced(self, relay: messages.Relay) -> bool:
        return self._services.get((relay.workspace, relay.block, relay.port)) == relay

    def _receive(
        self, client: socket.socket, caller: tuple[Link, str], block: int, ends: tuple[str, str, int]
    ) -> Reason | None:
        source, destination, port = ends
        relay = self._services.get((caller[1], block, port))
        if relay is None:
            return Reason.UNLISTED
        full = self.no_room(*caller)
        if full is not None:
            return full
        visit = _Visit(
            self,
            client,
            caller=caller,
            source=source,
            destination=destination,
            port=port,
            label=relay.service,
        )
        visit.relay = relay
        self.enter(visit)
        self.poller.watch(client.fileno(), 0, visit.client_event)
        visit.dial([Target(socket.AF_INET, ("127.0.0.1", relay.port))])
        return None

    def _look(self, now: float) -> None:
        """Nothing: local services may be silent for as long as they like."""

    def tell_totals(self) -> None:
        for (workspace, service), total in self.totals.items():
            if not total.told:
                total.told = True
                self.auditing.record(
                    "relay-totals",
                    {
                        "workspace": workspace,
                        "service": service,
                        "flows": total.flows,
                        "bytes_out": total.bytes_out,
                        "bytes_in": total.bytes_in,
                    },
                )


class Relay(Program):
    """The process."""

    receives: ClassVar[Any] = messages.TO_RELAY

    def __init__(self, start: ritual.Start, *, limits: Limits) -> None:
        super().__init__(start, limits=limits)
        for name in ("relay4", "relay6"):
            self.house.listen(start.take(name))

    def _open(self, pools: Pools, limits: Limits) -> Relays:
        self.relays = Relays(self.poller, pools=pools, auditing=self.auditing, limits=limits)
        return self.relays

    def _apply(self, received: Received[messages.TO_RELAY]) -> messages.Done:
        message = received.message
        changes = 0
        if isinstance(message, messages.SetRelays):
            self.relays.settle()
            changes = self.relays.announce(message.relays)
        elif isinstance(message, messages.BindSource):
            self.relays.bind(Link(message.link), message.workspace, message.source4, message.source6)
        else:
            self.relays.unbind(Link(message.link))
        return messages.Done(request=message.request, changes=changes)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when told to stop, 1 when it could not begin."""
    try:
        relay = Relay(ritual.begin("relay", arguments), limits=Limits().within_process())
    except ProtocolError as error:
        print(f"egressd[relay]: {error}", file=sys.stderr)
        return 1
    log.info("ending: %s", relay.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
