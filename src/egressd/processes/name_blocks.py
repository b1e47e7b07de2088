"""Telling the auditor which host each block is.

A block that a host has given up is still told as that host's, until another has it: the flows it had are
recorded when they end, which is when their host goes or later. So a name that is given back needs no word.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from egressd.ipc import messages
from egressd.ruleset.layout import RESOLVER_BLOCK, UNLISTED_BLOCK

if TYPE_CHECKING:
    from egressd.processes.controller import Controller
    from egressd.processes.grants import Grant

__all__ = ["NameTelling"]

_BATCH = 256  # messages.NameBlocks' bound
_PAUSE, _PATIENCE = 0.005, 10.0  # seconds


class NameTelling:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._lock = asyncio.Lock()
        self._again = False

    async def tell_all(self) -> None:
        """Every workspace anew, as there is room; who takes nothing is told when it comes back."""
        async with self._lock:
            self._again = True
            while self._again:
                self._again = False
                if not await self._told_all():
                    return

    async def _told_all(self) -> bool:
        for workspace in list(self._controller.policies):
            for message in self._all_of(workspace):
                if not await self._handed_over(message):
                    return False
        return True

    def tell(self, grant: Grant) -> None:
        """One more name; if there is no room for the word, everything again, in time."""
        message = messages.NameBlocks(
            workspace=grant.workspace, index=grant.index, hosts={grant.block: grant.host}
        )
        taken = self._controller.auditing.offer(message)
        if self._lock.locked():
            self._again = True  # what is being told may have been made before, and forget it
        elif not taken:
            self._controller.background(self.tell_all(), "telling the auditor which names there are")

    def _all_of(self, workspace: str) -> Iterator[messages.NameBlocks]:
        """The allocation as it is now, in parts."""
        numbers = self._controller.remembered.allocation
        index = numbers.workspaces.get(workspace) if numbers is not None else None
        if numbers is None or index is None:
            return
        hosts = {RESOLVER_BLOCK: "(resolver)", UNLISTED_BLOCK: "(unlisted)"}
        hosts |= {block: key for key, block in numbers.retired_blocks.get(workspace, {}).items()}
        hosts |= {block: key for key, block in numbers.blocks.get(workspace, {}).items()}
        listed = list(hosts.items())
        for start in range(0, len(listed), _BATCH):
            part = dict(listed[start : start + _BATCH])
            yield messages.NameBlocks(workspace=workspace, index=index, hosts=part)

    async def _handed_over(self, message: messages.NameBlocks) -> bool:
        end = time.monotonic() + _PATIENCE
        while not self._controller.auditing.offer(message):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_PAUSE)
        return True
