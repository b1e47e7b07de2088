"""The worker beside the auditor: bounded in time, in output, in number; what it says is told, and no more."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from auditor_lab import until

from egressd.ipc import messages
from egressd.ipc.channel import pair
from egressd.ipc.messages import MakeProof
from egressd.ipc.peer import Peer
from egressd.journal.keys import PrivateKey
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.processes.answering import Answering
from egressd.processes.journal_file import WriterState
from egressd.processes.journal_keys import Keys
from egressd.processes.proving import Prover

ASKED = MakeProof(request=1, payload_length=2, workspace="acme", link=7, since="-x", after="")


_OF_NOTHING = ("--journal", "/nowhere", "--workspace", "acme", "--size", "1")


def prover(script: str, **bounds: float) -> Prover:
    return Prover(Path("/nowhere"), command=(sys.executable, "-c", script), **bounds)  # type: ignore[arg-type]


def state(script: str, facts: bytes = b"{}", **bounds: float) -> bytes:
    return asyncio.run(prover(script, **bounds).statement(ASKED, facts, size=12))


def refused(script: str, **bounds: float) -> Refused:
    with pytest.raises(Refused) as caught:
        state(script, **bounds)
    return caught.value


def test_it_gets_facts_and_arguments_and_what_it_writes_is_the_statement() -> None:
    script = "import sys; print(sys.stdin.read() + ' '.join(sys.argv[1:]))"
    said = state(script, b"facts ").decode().split()
    assert said == [
        "facts", "--journal", "/nowhere", "--workspace", "acme", "--size", "12", "--link=7", "--since=-x",
        "--attestation=/attestation.sev-snp",
    ]  # fmt: skip


def test_it_is_nicer_than_we_are_and_sees_nothing_of_our_surroundings() -> None:
    script = "import os, sys; sys.stdin.read(); print(os.nice(0), sorted(os.environ))"
    assert state(script).decode().strip() == f"{os.nice(0) + 10} ['LC_ALL', 'PATH']"


def test_large_facts_and_large_statements_pass() -> None:
    script = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read() * 3)"
    assert state(script, b"x" * 3_000_000) == b"x" * 9_000_000


def test_one_that_does_not_want_the_facts_may_answer_all_the_same() -> None:
    assert state("print('done')", b"x" * 3_000_000) == b"done\n"


def test_its_last_line_says_why_there_is_no_proof() -> None:
    script = (
        "import sys; print('half a statement'); print('one\\ntwo \\x1b[31m', file=sys.stderr); sys.exit(1)"
    )
    error = refused(script)
    assert error.reason is Reason.UNAVAILABLE
    assert str(error) == "no proof could be made: two ?[31m"


@pytest.mark.parametrize("script", ["pass", "import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_nothing_stated_is_no_proof(script: str) -> None:
    assert "no proof could be made: exit status" in str(refused(script))


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    began = time.monotonic()
    error = refused(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
                    seconds=1.0)  # fmt: skip
    assert "not ready within 1 s" in str(error)
    assert time.monotonic() - began < 10
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_worker_that_writes_without_end_is_killed() -> None:
    error = refused("import sys\nwhile True: sys.stdout.write('x' * 65536)", most=1 << 20)
    assert error.reason is Reason.LIMIT
    assert "larger than 1 MiB" in str(error)


def test_a_worker_does_not_outlive_an_auditor_that_was_killed() -> None:
    """Its pipes are held open here, so that nothing but the kernel's signal can end it."""
    facts, hold = os.pipe()
    told, said = os.pipe()
    script = (
        "import subprocess, sys, time; "
        f"print(subprocess.Popen(sys.argv[1:], stdin={facts}, stdout={said}).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *Prover(Path()).command, *_OF_NOTHING],
        pass_fds=(facts, said), stdout=subprocess.PIPE, text=True,
    ) as auditor:  # fmt: skip
        os.close(facts)
        os.close(said)
        assert auditor.stdout is not None
        worker = int(auditor.stdout.readline())
        until(lambda: os.getpriority(os.PRIO_PROCESS, worker) >= min(os.nice(0) + 10, 19))
        auditor.kill()
    poll = select.poll()
    poll.register(told, select.POLLIN)
    ended = poll.poll(5000)
    os.close(hold)
    os.close(told)
    assert ended, "it still waits for facts"


def test_a_worker_that_nobody_listens_to_any_more_does_not_begin() -> None:
    facts, hold = os.pipe()
    told, said = os.pipe()
    os.close(told)
    command = [*Prover(Path()).command, *_OF_NOTHING]
    with subprocess.Popen(command, stdin=facts, stdout=said, stderr=subprocess.PIPE) as worker:
        try:
            assert worker.communicate(timeout=10)[1] == b""
        except subprocess.TimeoutExpired:
            worker.kill()
            raise
        finally:
            for descriptor in (facts, hold, said):
                os.close(descriptor)
    assert worker.returncode == 1


def test_no_more_than_two_at_once() -> None:
    one = prover("pass", at_once=2)
    with one.place(), one.place(), pytest.raises(Refused, match="busy"), one.place():
        pass
    with one.place():
        pass


def test_a_defect_while_answering_is_an_answer_and_the_next_question_is_heard() -> None:
    """Whoever waits for a proof has one of the few turns."""

    class Journal:
        broken = True

        def state(self) -> WriterState:
            if self.broken:
                raise KeyError("a defect")
            return WriterState(records=1, octets=1, segments=1, queued=0, lag=0.0)

    async def story() -> None:
        journal, (mine, its) = Journal(), pair()
        answering = Answering(journal, Keys(PrivateKey.generate()), prover("pass"))  # type: ignore[arg-type]
        answering.listen(its)
        asker = Peer(
            mine, messages.FROM_EVIDENCE, handler=lambda *_: None,
            replies=(messages.Failed, messages.JournalState),
        )  # fmt: skip
        with pytest.raises(Refused, match="a defect"):
            await asker.ask(messages.ReadJournal(request=1), timeout=5)
        journal.broken = False
        assert (await asker.ask(messages.ReadJournal(request=2), timeout=5)).message.records == 1
        asker.close()

    asyncio.run(story())
