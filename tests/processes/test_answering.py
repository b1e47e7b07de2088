"""What the auditor answers, where the key is changed while it does."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from egressd.ipc.messages import MakeProof
from egressd.journal import notes
from egressd.journal.keys import PrivateKey
from egressd.journal.notes import Checkpoint
from egressd.model.errors import Refused
from egressd.processes.answering import Answering
from egressd.processes.journal_keys import Keys

ASKED = MakeProof(request=1, payload_length=2, workspace="acme")


class Journal:
    """Its checkpoints are signed by the key in force; it is changed after those numbered in `after`, before
    the proof is signed."""

    def __init__(self, after: set[int]) -> None:
        self.keys, self.after = Keys(PrivateKey.generate()), after
        self.number = 0

    def barrier(self) -> Future[str]:
        self.number += 1
        future: Future[str] = Future()
        signing = self.keys.current
        if self.number in self.after:
            self.keys.rotate()
            self.keys.settle()
        future.set_result(notes.sign(Checkpoint("log", self.number, bytes(32)), "log", [signing]))
        return future


async def _statement(asked: Any, facts: bytes, *, size: int) -> bytes:
    return str(size).encode()


def stated(journal: Journal) -> tuple[PrivateKey, bytes, int]:
    prover = SimpleNamespace(statement=_statement)
    answering = Answering(cast(Any, journal), journal.keys, cast(Any, prover))
    return asyncio.run(answering._stated(ASKED, b"{}"))


def test_who_signed_the_checkpoint_signs_the_proof() -> None:
    journal = Journal(set())
    assert stated(journal) == (journal.keys.current, b"1", 1)


def test_a_key_that_is_changed_meanwhile_has_it_made_anew() -> None:
    journal = Journal({1})
    key, statement, size = stated(journal)
    assert (statement, size) == (b"2", 2)
    assert key is journal.keys.current


def test_a_key_that_is_changed_all_the_time_is_told() -> None:
    with pytest.raises(Refused, match="was changed while the proof was made"):
        stated(Journal({1, 2, 3, 4, 5}))
