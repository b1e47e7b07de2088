"""What tests of several processes share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from egressd.processes import control
from egressd.processes.members import Caller


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Who the next connections are, one after the other; then root."""
    uids: list[int] = []
    pids = itertools.count(100)

    def caller_of(_: Any) -> Caller:
        uid = uids.pop(0) if uids else 0
        return Caller(next(pids), uid, frozenset({uid}), uid)

    monkeypatch.setattr(control, "caller_of", caller_of)
    return uids
