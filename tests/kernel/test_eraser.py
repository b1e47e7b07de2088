"""What is left of links that have ended: how often the table of connections is walked for it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from warden_world import poll, sh

from egressd.kernel import namespaces
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.eraser import Eraser
from egressd.model.identities import Link
from egressd.ruleset.layout import Pools

pytestmark = pytest.mark.kernel

POOLS = Pools()


@pytest.fixture
def eraser() -> Iterator[Eraser]:
    with namespaces.throw_away():
        yield Eraser(POOLS)


def erased(eraser: Eraser, count: int) -> list[int]:
    """Numbers of links that are gone altogether, in their order."""
    found: list[int] = []

    def all_of_them() -> bool:
        found.extend(link.number for link in eraser.erased())
        return len(found) >= count

    poll(all_of_them, timeout=10, what=f"{count} links are erased")
    return found


class Table:
    """In place of the table of connections: who was forgotten, walk by walk; the first walk can be held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, entries: int) -> None:
        self.walks: list[int] = []  # addresses of each
        self.entered, self.go = threading.Event(), threading.Event()
        table = self

        def forget(self: Any, addresses: Collection[Any]) -> None:
            table.walks.append(len(addresses))
            table.entered.set()
            assert table.go.wait(10)

        monkeypatch.setattr(Conntrack, "forget_sources", forget)
        monkeypatch.setattr(Conntrack, "count", lambda self: entries)


def test_links_that_end_while_the_table_is_walked_share_the_next_walk(
    eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(monkeypatch, entries=9)
    eraser.erase(Link(1))
    assert table.entered.wait(10)
    for number in range(2, 52):
        eraser.erase(Link(number))
    assert eraser.busy(Link(1))
    assert eraser.busy(Link(51))
    table.go.set()
    assert erased(eraser, 51) == list(range(1, 52))
    assert table.walks == [2, 100], "both families of each"
    assert eraser.walks == 2
    assert not eraser.busy(Link(51))


def test_what_nothing_was_ever_admitted_over_is_not_looked_for(
    eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(monkeypatch, entries=9)
    for number in range(1, 20):
        eraser.erase(Link(number), unused=True)
    assert erased(eraser, 19) == list(range(1, 20))
    assert table.walks == []


def test_an_empty_table_is_not_walked(eraser: Eraser) -> None:
    for number in range(1, 20):
        eraser.erase(Link(number))
    assert erased(eraser, 19) == list(range(1, 20))
    assert eraser.walks == 0


def test_devices_go_at_once_though_the_table_rests(eraser: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, entries=9)
    table.go.set()
    eraser.erase(Link(9))
    assert erased(eraser, 1) == [9]
    poll(lambda: eraser._rested, what="it has been walked, and rests")
    eraser._rested += 1000
    for number in (1, 2):
        sh(f"ip link add eg{number} type veth peer name p{number}")
        eraser.erase(Link(number), unused=number == 2)
    poll(lambda: "eg" not in sh("ip -o link"), what="both devices are deleted")
    assert erased(eraser, 1) == [2]
    assert eraser.busy(Link(1))
    eraser._rested = 0.0
    eraser.erase(Link(3), unused=True)  # wakes it
    assert sorted(erased(eraser, 2)) == [1, 3]
    assert table.walks == [2, 2]
