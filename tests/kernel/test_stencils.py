"""Batches of links without libnftables: the same objects, learnt from what it would have sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from egressd.kernel import namespaces
from egressd.kernel.ledger import Ledger
from egressd.kernel.monitor import Monitor
from egressd.kernel.nft import Nft
from egressd.kernel.stencils import printed
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.ruleset import build
from egressd.ruleset.build import LinkWant
from egressd.ruleset.layout import Pools
from egressd.ruleset.wants import WorkspaceWant

pytestmark = pytest.mark.kernel

POOLS = Pools()
ACME = WorkspaceWant(workspace="acme", index=1, guard="enforce")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quota": {"quota": 1000},
    "both budgets": {"quota": 7, "connections": 5},
    "closed": {"closed": True},
}


class Counting(Nft):
    """libnftables, and how often it was asked for what."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def run(self, commands: Sequence[str]) -> None:
        self.asked.append("run")
        super().run(commands)

    def would_send(self, commands: Sequence[str]) -> str:
        self.asked.append("would send")
        return super().would_send(commands)


@pytest.fixture
def nft() -> Iterator[Counting]:
    """A gateway's tables with one workspace, in a namespace of its own."""
    with namespaces.throw_away():
        nft = Counting()
        nft.run(build.base(POOLS))
        nft.run(build.workspace(ACME, POOLS))
        nft.asked.clear()
        yield nft


@pytest.fixture
def ledger(nft: Counting) -> Iterator[Ledger]:
    monitor = Monitor(ignore=())
    yield Ledger(nft, monitor)
    monitor.close()


def link(ledger: Ledger, number: int, **kind: Any) -> None:
    want = LinkWant(Link(number), "acme", **kind)
    ledger.run_link(
        lambda other: build.link(replace(want, link=other), ACME, POOLS), want.link, POOLS.sandbox
    )


def unlink(ledger: Ledger, number: int) -> None:
    ledger.run_link(build.unlink, Link(number), POOLS.sandbox)


def listing(nft: Nft) -> list[str]:
    """Everything but the numbers that the kernel gives; anonymous sets show in their rules."""
    found = []
    for entry in nft.list_json()["nftables"]:
        for sort, body in entry.items():
            shown = {key: value for key, value in body.items() if key != "handle"}
            found.append(f"{sort} {json.dumps(shown, sort_keys=True)}")
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_from_a_stencil_is_the_link_that_libnftables_makes(
    nft: Counting, ledger: Ledger, kind: str
) -> None:
    empty = listing(nft)
    for number in (7, 40_001, 123_456_789):  # the first by words, the others stamped
        link(ledger, number, **KINDS[kind])
        stamped, hooks = listing(nft), nft.list_chains()
        unlink(ledger, number)
        assert listing(nft) == empty
        nft.run(build.link(LinkWant(Link(number), "acme", **KINDS[kind]), ACME, POOLS))
        assert (stamped, hooks) == (listing(nft), nft.list_chains())
        nft.run(build.unlink(Link(number)))
    assert nft.asked.count("would send") == 4, "twice for opening and twice for closing, once and for all"


def test_libnftables_is_asked_twice_per_kind_and_never_again(nft: Counting, ledger: Ledger) -> None:
    for number in range(1, 4):
        link(ledger, number)
    nft.asked.clear()
    for number in range(4, 30):
        link(ledger, number)
    assert nft.asked == []
    for number in range(1, 30):
        unlink(ledger, number)
    assert nft.asked == ["run", "would send", "would send"]


def test_each_batch_is_ours_and_counted(ledger: Ledger) -> None:
    for number in range(1, 6):
        before = ledger.generation
        link(ledger, number)
        assert ledger.generation == before + 1
        assert not ledger.look()
        assert ledger.count(f"eg{number}_in") == (0, 0)


def test_what_the_kernel_refuses_is_refused_in_libnftables_words(nft: Counting, ledger: Ledger) -> None:
    for number in (1, 2, 3):
        link(ledger, number)
    for number in (1, 2, 3):
        unlink(ledger, number)
    nft.run(build.drop_workspace(ACME))
    before = listing(nft)
    ledger.look()
    with pytest.raises(KernelError, match=r"nft: .*No such file or directory"):
        link(ledger, 4)
    assert listing(nft) == before, "nothing of it is in force"
    assert not ledger.look() or ledger.settled() is not None
    nft.run(build.workspace(ACME, POOLS))
    link(ledger, 5)
    assert any('"eg5"' in line for line in listing(nft)), "it is learnt anew"


def test_a_batch_that_differs_in_more_than_its_name_is_never_stamped(nft: Counting, ledger: Ledger) -> None:
    def make(one: Link) -> list[str]:
        return [f"add counter inet egressd c{one.number % 1000} {{ packets {one.number} bytes 0; }}"]

    for number in (1, 2, 3):
        ledger.run_link(make, Link(number), POOLS.sandbox)
    assert nft.asked.count("run") == 3
    numbers = [body["counter"]["packets"] for body in nft.list_json()["nftables"] if "counter" in body
               and body["counter"]["name"] in ("c1", "c2", "c3")]  # fmt: skip
    assert sorted(numbers) == [1, 2, 3]


def test_what_is_no_batch_is_not_taken_for_one() -> None:
    for text in ("", "add table inet t\n", "| 02578 | R--- |\t|  type | flags  |\n"):
        with pytest.raises(KernelError, match="does not print"):
            list(printed(text))


def test_a_message_is_read_as_it_is_printed() -> None:
    text = (
        "| 00016 | R--- |\t|  type | flags  |\n| 00 00 00 0a  |\t|  extra header  |\n"
        "| 02578 | R--- |\t|  type | flags  |\n| 05 00 00 00  |\t|  extra header  |\n"
        "|\x1b[1;31m00012\x1b[0m|\x1b[1;32mN-\x1b[0m|\x1b[1;34m00004\x1b[0m|\t|len |flags| type|\n"
        "|00008|-B|00001|\t|len |flags| type|\n| 01 02 7c 09  |\t|      data      |\t    |\n"
        "| 00017 | R--- |\t|  type | flags  |\n| 00 00 00 0a  |\t|  extra header  |\n"
    )
    body = bytes.fromhex("050000000c0004800800014001027c09")
    assert list(printed(text)) == [(2578, body)]
