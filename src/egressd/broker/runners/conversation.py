"""The service's end of a channel to a runner, in an event loop: what the runner says, one by one."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from egressd.broker.runners import zygote as forked
from egressd.broker.runners.jobs import Job

__all__ = ["Conversation", "ForkedRunners", "Runners", "Talk"]


class Talk(Protocol):
    """One request's runner. Closing it is the end of everything that runs for it."""

    async def hear(self) -> Any:
        """The next message of `jobs.FROM_RUNNER`. EOFError once the runner is gone; ProtocolError for what is
        no message."""

    def go(self) -> None: ...

    def stop(self, why: str) -> None: ...

    def close(self) -> None: ...


class Runners(Protocol):
    async def begin(self, job: Job) -> Talk:
        """`Refused` where no runner can be had."""


class ForkedRunners:
    """Those of `zygote.py`. Beginning one may take a moment: its zygote may have to be begun."""

    def __init__(self, runners: forked.Runners) -> None:
        self._runners = runners

    async def begin(self, job: Job) -> Talk:
        return Conversation(await asyncio.to_thread(self._runners.run, job))


class Conversation:
    def __init__(self, run: forked.Run) -> None:
        self._run = run
        run.channel.socket.setblocking(False)

    async def hear(self) -> Any:
        while True:
            try:
                return self._run.receive()
            except BlockingIOError:
                await self._readable()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._run.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._run.fileno())

    def go(self) -> None:
        self._run.go()

    def stop(self, why: str) -> None:
        self._run.stop(why)

    def close(self) -> None:
        self._run.close()
