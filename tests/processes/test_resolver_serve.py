"""`serve` in this process: any bytes give an answer, an error or silence, and each denial is counted once."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

import dnslib
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.processes.config import Config
from egressd.processes.resolver import Resolver
from egressd.processes.ritual import Auditing

ONE, SIX, STRANGER = map(ip_address, ("198.19.0.1", "fd53:1::1", "198.19.0.9"))
LISTED = WorkspaceNames(workspace="acme", guard="enforce", hosts={"api.example.com": (1, False)})
T = TypeVar("T")


def with_resolver(use: Callable[[Resolver], Awaitable[T]]) -> T:
    async def run() -> T:
        resolver = Resolver(Config(), Auditing("resolver"))
        resolver.set_names(msgspec.json.encode([LISTED]))
        bind(resolver)
        return await use(resolver)

    return asyncio.run(run())


def bind(resolver: Resolver, link: int = 1, workspace: str = "acme") -> None:
    four, six = ip_address(f"198.19.0.{link}"), ip_address(f"fd53:1::{link}")
    resolver._bind(
        messages.BindSource(request=1, link=link, workspace=workspace, source4=four, source6=six)  # type: ignore[arg-type]
    )


def question(name: str, qtype: str = "A", number: int = 7) -> bytes:
    record = dnslib.DNSRecord.question(name, qtype)
    record.header.id = number
    return bytes(record.pack())


def corpus() -> list[bytes]:
    lines = (Path(__file__).parent.parent / "dns" / "corpus" / "queries.txt").read_text().splitlines()
    return [bytes.fromhex(line.split()[1].strip("-")) for line in lines if not line.startswith("#")]


async def all_ways(resolver: Resolver, data: bytes) -> None:
    """Twice, so that the second time what is remembered answers."""
    for source in (ONE, SIX, STRANGER, ONE):
        for udp in (True, False):
            answer = resolver.serve(data, source, udp)
            if answer is None or isinstance(answer, bytes):
                assert answer is None or (answer[:2] == data[:2] and answer[2] & 0x80)
                assert answer is None or not udp or len(answer) <= 1232
            else:  # a name that waits for upstream; who asked may go away
                assert inspect.isawaitable(answer)
                asyncio.ensure_future(answer).cancel()
    await asyncio.sleep(0)


def test_the_corpus_never_raises() -> None:
    async def use(resolver: Resolver) -> None:
        for data in corpus():
            await all_ways(resolver, data)

    with_resolver(use)


@given(st.binary(max_size=600), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_no_bytes_ever_raise(noise: bytes, chance: random.Random) -> None:
    async def use(resolver: Resolver) -> None:
        await all_ways(resolver, noise)
        damaged = bytearray(chance.choice(corpus()) or b"\0")
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        await all_ways(resolver, bytes(damaged))

    with_resolver(use)


@pytest.mark.parametrize("udp", [True, False])
def test_refused_counts_equal_the_denied_queries(udp: bool) -> None:
    """Fresh and repeated ones, from memory or not; more different ones than are remembered."""

    async def use(resolver: Resolver) -> None:
        for number in range(5000):
            data = question(f"n{number % 3000}.evil.example", number=number)
            answer = resolver.serve(data, (ONE, SIX)[number % 2], udp)
            assert isinstance(answer, bytes) and answer[3] & 0xF == 3
        for number in range(100):
            resolver.serve(question("evil.example", "AXFR", number=number), ONE, udp)
            resolver.serve(question("evil.example", number=number), STRANGER, udp)
        resolver._fold()
        assert resolver.refused == {"acme": {"name": 5000, "type": 100}}

    with_resolver(use)


def test_memory_ends_with_the_binding_and_with_the_list() -> None:
    async def use(resolver: Resolver) -> None:
        data = question("evil.example")

        def code() -> int:
            answer = resolver.serve(data, ONE, True)
            assert isinstance(answer, bytes)
            return answer[3] & 0xF

        assert [code(), code()] == [3, 3]
        assert ONE.packed in resolver._cache.lanes  # where datagrams are answered without asking `serve`
        resolver._unbind(1)
        assert resolver._cache.lanes == {}
        assert code() == 5
        bind(resolver, workspace="gone")
        assert code() == 2
        bind(resolver)
        assert resolver._cache.lanes == {}
        assert code() == 3
        listed = WorkspaceNames(workspace="acme", guard="enforce", services={"evil.example": 3})
        resolver.set_names(msgspec.json.encode([listed]))
        assert resolver._cache.lanes == {}
        assert code() == 0
        assert len(resolver._cache.lanes) == 1

    with_resolver(use)


def test_a_reverse_name_is_not_remembered_as_denied() -> None:
    async def use(resolver: Resolver) -> None:
        data = question("4.0.18.198.in-addr.arpa", "PTR")
        resolver.serve(data, ONE, True)
        lane = resolver._cache.lanes[ONE.packed]
        assert lane.denials == {}
        assert len(lane.pending) <= 1

    with_resolver(use)
