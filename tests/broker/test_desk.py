"""Work that is interrupted by what the service says: once, and with nothing left open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.broker.runners import jobs
from egressd.broker.runners.desk import Desk, Stopped
from egressd.ipc.channel import Channel, pair


@pytest.fixture
def ends() -> Iterator[tuple[Desk, Channel[Any]]]:
    ours, theirs = pair()
    with ours, theirs:
        yield Desk(ours), Channel(theirs, jobs.FROM_RUNNER)


def test_what_was_opened_and_is_known_to_nobody_is_closed(ends: tuple[Desk, Channel[Any]]) -> None:
    """The handler runs right after the system call, before its result has a name."""
    desk, service = ends
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(Stopped, match="never mind"), desk.interrupting():
        os.open("/", os.O_RDONLY)
        os.open("/dev/null", os.O_RDONLY)
        service.send(jobs.Stop(why="never mind"))
        pytest.fail("it goes on")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_what_clears_up_is_not_interrupted_again(ends: tuple[Desk, Channel[Any]]) -> None:
    desk, service = ends
    done = []
    with pytest.raises(Stopped, match="one"), desk.interrupting():
        try:
            service.send(jobs.Stop(why="one"))
        finally:
            service.send(jobs.Stop(why="two"))
            service.socket.shutdown(socket.SHUT_RDWR)
            done.append("cleared up")
    assert done


def test_what_goes_through_keeps_what_it_opened(ends: tuple[Desk, Channel[Any]]) -> None:
    desk, service = ends
    with desk.interrupting():
        service.send(jobs.Go())
        number = os.open("/", os.O_RDONLY)
    assert desk.may_go
    os.close(number)
    with contextlib.suppress(BlockingIOError):
        service.send(jobs.Stop(why="later"))
    assert signal.getsignal(signal.SIGIO) is signal.SIG_DFL
    assert not fcntl.fcntl(desk.fileno(), fcntl.F_GETFL) & os.O_ASYNC, "or this process would be dead"
    with pytest.raises(Stopped, match="later"):
        desk.heed()
