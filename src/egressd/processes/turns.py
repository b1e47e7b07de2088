"""Work that is dear, in fair turns: few at a time, of each user one, and whoever has waited longest next."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Iterator

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

__all__ = ["Turns"]


class Turns:
    """`what` is the work's plural, for people. `most`: of one user, waiting ones included."""

    def __init__(self, what: str, *, at_once: int, most: int) -> None:
        self._what, self._most = what, most
        self._all = asyncio.Semaphore(at_once)
        self._asked: collections.Counter[int] = collections.Counter()
        self._own: dict[int, asyncio.Lock] = {}

    @contextlib.contextmanager
    def asked(self, uid: int) -> Iterator[None]:
        """To be held from the question to the answer. Refused to who asks too much."""
        if self._asked[uid] >= self._most:
            raise Refused(
                Reason.LIMIT, f"{self._most} {self._what} of yours are waited for; wait for one of them"
            )
        self._asked[uid] += 1
        try:
            yield
        finally:
            self._asked[uid] -= 1
            if not self._asked[uid]:
                del self._asked[uid]
                self._own.pop(uid, None)

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Within `asked`. A user waits for his own first, and so is never twice in the common line."""
        async with self._own.setdefault(uid, asyncio.Lock()), self._all:
            yield
