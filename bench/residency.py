"""How long it takes to find the published prefix of an address, among 100,000, and to load so many.

The peers are radix tries in C: pytricia and py-radix. All hold the same prefixes, nested and of both
families; before anything is timed, every address that will be asked is asked once, and the answers must be
the same.

They do not answer the same. A peer gives back what was stored with the most specific prefix;
`Prefixes.observe` makes an `Observation`: prefix, region, countries, table, and what further tables say. Each
is asked in the way that suits it best: ours with address objects, as the resolver's answers come, peers with
text that was made beforehand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from datetime import date
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from bench.figures import Figure, Report, interleaved
from egressd.model.addresses import Address
from egressd.residency.prefixes import Group, Prefixes, Source, Table

__all__ = ["measure"]

_REGIONS = tuple(f"region-{number}" for number in range(60))
# Of ip-ranges.json, ServiceTags and cloud.json: most prefixes are small.
_LENGTHS4 = (12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 22, 23, 23, 24, 24, 24, 26, 28, 30, 32)
_LENGTHS6 = (32, 36, 40, 44, 46, 47, 48, 48, 56, 64)


def measure(report: Report, *, rounds: int = 15, prefixes: int = 100_000, lookups: int = 50_000) -> None:
    chance = random.Random(7)
    texts = _texts(chance, prefixes)
    addresses = _addresses(chance, texts, lookups)
    data = _table(texts).encode()
    ours = Prefixes([Table.decode(data)])
    expected = [ours.observe(address).prefix for address in addresses]
    peers = {name: make(texts) for name, make in _PEERS.items() if _there(name)}
    for name, find in peers.items():
        _compare(name, find, addresses, expected)
    _lookups(report, rounds, ours, peers, addresses)
    _loads(report, max(2, rounds // 3), data, texts)


# ---- what is asked, of whom


def _texts(chance: random.Random, count: int) -> list[str]:
    """Different ones; a tenth of IPv6."""
    found: set[str] = set()
    while len(found) < count - count // 10:
        length = chance.choice(_LENGTHS4)
        start = chance.randrange(1 << 24, 224 << 24) >> (32 - length) << (32 - length)
        found.add(str(IPv4Network((start, length))))
    while len(found) < count:
        length = chance.choice(_LENGTHS6)
        start = (0x2600 << 112 | chance.getrandbits(112)) >> (128 - length) << (128 - length)
        found.add(str(IPv6Network((start, length))))
    return sorted(found)


def _addresses(chance: random.Random, texts: Sequence[str], count: int) -> list[Address]:
    """Two of three lie in a prefix for certain."""
    found: list[Address] = []
    for number in range(count):
        text = chance.choice(texts)
        if number % 3 == 0:
            found.append(IPv4Address(chance.randrange(1 << 24, 224 << 24)))
        elif ":" in text:
            six = IPv6Network(text)
            found.append(IPv6Address(int(six[0]) + chance.randrange(six.num_addresses)))
        else:
            four = IPv4Network(text)
            found.append(IPv4Address(int(four[0]) + chance.randrange(four.num_addresses)))
    return found


def _table(texts: Sequence[str]) -> Table:
    count = len(_REGIONS)
    return Table(
        name="aws",
        provider="aws",
        format="aws",
        source=Source("ip-ranges.json", "sha256:" + "0" * 64, 0),
        published=date(2026, 11, 20),
        imported=date(2026, 11, 21),
        groups=tuple(
            Group(region=region, services=("EC2",), prefixes=tuple(texts[number::count]))
            for number, region in enumerate(_REGIONS)
            if texts[number::count]
        ),
    )


_Find = Callable[[str], str | None]
"""The most specific prefix of an address."""


def _pytricia(texts: Sequence[str]) -> _Find:
    import pytricia

    four, six = pytricia.PyTricia(32), pytricia.PyTricia(128)
    for text in texts:
        (six if ":" in text else four).insert(text, text)
    get4, get6 = four.get, six.get
    return lambda address: get6(address) if ":" in address else get4(address)


def _py_radix(texts: Sequence[str]) -> _Find:
    import radix

    tree = radix.Radix()
    for text in texts:
        tree.add(text)
    best = tree.search_best

    def find(address: str) -> str | None:
        node = best(address)
        return None if node is None else node.prefix

    return find


_PEERS: dict[str, Callable[[Sequence[str]], _Find]] = {"pytricia": _pytricia, "py_radix": _py_radix}
_MODULES = {"pytricia": "pytricia", "py_radix": "radix"}


def _there(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(_MODULES[name]) is not None


def _compare(name: str, find: _Find, addresses: Sequence[Address], expected: Sequence[str | None]) -> None:
    for address, prefix in zip(addresses, expected, strict=True):
        found = find(str(address))
        if found != prefix:
            raise RuntimeError(f"{address} is in {prefix} for us, and in {found} for {name}")


# ---- timed


def _microseconds(ask: Callable[[Any], object], questions: Sequence[Any]) -> float:
    began = time.perf_counter()
    for question in questions:
        ask(question)
    return (time.perf_counter() - began) / len(questions) * 1e6


def _lookups(
    report: Report, rounds: int, ours: Prefixes, peers: dict[str, _Find], addresses: Sequence[Address]
) -> None:
    texts = [str(address) for address in addresses]
    ways: dict[str, Callable[[], float]] = {"ours": lambda: _microseconds(ours.observe, addresses)}
    ways |= {name: _asking(find, texts) for name, find in peers.items()}
    found = interleaved(rounds, ways)
    details = {"prefixes": sum(len(group.prefixes) for group in ours.tables[0].groups), "lookups": len(texts)}
    for name in peers:
        figure = Figure.paired(
            f"residency_lookup_vs_{name}", found["ours"], found[name], "us", details=details
        )
        report.add(figure)
    if not peers:
        why = "neither pytricia nor py-radix is installed: pip install '.[bench]'"
        details["why_no_peer"] = why
        report.add(Figure.alone("residency_lookup", found["ours"], "us", details=details))


def _asking(find: _Find, texts: Sequence[str]) -> Callable[[], float]:
    return lambda: _microseconds(find, texts)


def _loads(report: Report, rounds: int, data: bytes, texts: Sequence[str]) -> None:
    """Ours from the bytes of its file, checked; peers from prefixes that have been read already."""
    ways: dict[str, Callable[[], float]] = {"ours": lambda: _milliseconds(lambda: _loaded(data))}
    ways |= {name: _loading(make, texts) for name, make in _PEERS.items() if _there(name)}
    found = interleaved(rounds, ways)
    details = {"bytes": len(data)}
    for name in sorted(ways.keys() - {"ours"}):
        report.add(
            Figure.paired(f"residency_load_vs_{name}", found["ours"], found[name], "ms", details=details)
        )
    if len(ways) == 1:
        report.add(Figure.alone("residency_load", found["ours"], "ms", details=details))


def _loaded(data: bytes) -> Prefixes:
    return Prefixes([Table.decode(data)])


def _loading(make: Callable[[Sequence[str]], _Find], texts: Sequence[str]) -> Callable[[], float]:
    return lambda: _milliseconds(lambda: make(texts))


def _milliseconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1e3
