"""What a runner says to the service's log: what nobody else would hear of."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from egressd.broker.runners import cycle, jobs
from egressd.broker.runners.desk import Desk
from egressd.ipc import messages
from egressd.model.errors import KernelError
from egressd.processes import testifying
from egressd.processes.testifying import Said

JOB = jobs.Job(
    id="r-" + "0" * 26, workspace="acme", command=("true",), copies=(), asker="user:okta:u1", role="viewer",
    discarded=0, action="command",
)  # fmt: skip


class Scratch:
    """One whose copies do not go."""

    def __init__(self, *, error: str = "", trouble: tuple[str, ...] = ()) -> None:
        self.error, self.trouble = error, trouble

    def destroy(self) -> bool:
        if self.error:
            raise OSError(self.error)
        return not self.trouble


@pytest.fixture
def runner() -> Iterator[cycle.Cycle]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        made = cycle.Cycle(JOB, Desk(ours))
        yield made
        made._relay.close()


@pytest.mark.parametrize(
    ("scratch", "said"),
    [
        (Scratch(), ""),
        (Scratch(error="disk on fire"), "its copies could not be destroyed: disk on fire\n"),
        (Scratch(trouble=("a file stays",)), "its copies are not seen to be gone: a file stays\n"),
        (
            Scratch(trouble=("a\n\x1b[31mb\udcff",)),
            "its copies are not seen to be gone: a\\n\\x1b[31mb\\xff\n",
        ),
    ],
)
def test_copies_that_stay(
    runner: cycle.Cycle, scratch: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner._scratch = scratch
    runner._destroy_copies()
    assert capsys.readouterr().err == (said and f"request {JOB.id}: {said}")
    assert runner._facts.destroyed is (said == "")


def test_a_process_that_cannot_be_closed_to_others_runs_nothing(
    runner: cycle.Cycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        def prctl(self, *_: int) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    with pytest.raises(KernelError, match="PR_SET_DUMPABLE"):
        cycle.dumpable(allowed=False)
    monkeypatch.setattr(runner, "_record_without_lease", lambda: None)
    finished = runner.run()
    assert "PR_SET_DUMPABLE" in finished.refused
    assert finished.status == 125


def test_what_egressd_answers_to_a_second_end_is_known() -> None:
    """By that a runner whose word was in flight when egressd died knows that it had arrived."""
    said = Said(request=JOB.id, events={"request-ended"})
    word = messages.Testify(event="request-ended", fields={"request": JOB.id})
    sandbox: Any = object()
    assert cycle._ONCE in testifying._out_of_turn(word, sandbox, said)
    assert testifying._out_of_turn(word, sandbox, Said(request=JOB.id)) == ""
