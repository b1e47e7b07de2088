"""Every number that the two tables have counted, by netlink and not by libnftables.

libnftables reads each rule of the kernel to get at a counter, and writes all of it as text: 2.3 s with a
thousand links, and meanwhile nobody else is served. Here are read the objects with names, and the elements of
those sets and maps that count: each number once, after the question.

As with libnftables the kernel tells them one after the other, so under traffic the later ones have seen more
(ruleset/books.py says what holds all the same). But all of them are of one ruleset: a listing during which it
changed (NLM_F_DUMP_INTR, or another generation at its end than at its beginning) is thrown away.

Formats: linux/netfilter/nf_tables.h. What does not look as it should is an error, never left out.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, summarize_address_range

from egressd.kernel.dumps import Attributes, Dumps, comment, count, counted, text, value
from egressd.kernel.netlink import NetlinkError, attributes
from egressd.model.errors import KernelError
from egressd.ruleset import observe
from egressd.ruleset.observe import Counters, DialCount, ElementCount, Numbers, Tally

__all__ = ["Tallies", "address", "network"]

_COUNTER, _QUOTA, _LIMIT = 1, 2, 4  # NFT_OBJECT_*
_PROTOCOLS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
_AGAIN = 8


class Tallies:
    def __init__(self, dumps: Dumps) -> None:
        self._dumps = dumps

    def read(self) -> Counters:
        """KernelError (EINTR) if the ruleset keeps changing; or if something is not of our making."""
        for _ in range(_AGAIN):
            before = self._dumps.generation()
            try:
                numbers = self._numbers()
            except (KeyError, IndexError, struct.error) as error:
                raise KernelError(f"the kernel does not list counters as it should: {error!r}") from error
            if self._dumps.generation() == before:
                return observe.counted(numbers)
        raise NetlinkError(errno.EINTR, "read all counters", "the ruleset keeps changing")

    def _numbers(self) -> Numbers:
        numbers = Numbers(marks={"in": {}, "opened": {}})
        for family in self._dumps.families:
            for said in self._dumps.objects(family):
                _object(said, family, numbers)
            for name in [text(said[2]) for said in self._dumps.sets(family)]:
                if reader := _reader(family, name):
                    reader(self._dumps.elements(family, name), name, numbers)
        return numbers


# ---- objects with names


def _object(said: Attributes, family: str, numbers: Numbers) -> None:
    """NFTA_OBJ_NAME, NFTA_OBJ_TYPE, NFTA_OBJ_DATA."""
    name, kind, data = text(said[2]), _number(said[3]), said[4]
    if kind == _COUNTER:
        numbers.named[family, name] = Tally(*count(data))
    elif kind == _QUOTA:
        parts = dict(attributes(data))
        numbers.quotas[name.removesuffix("_quota")] = (_long(parts[4]), _long(parts[1]))
    elif kind == _LIMIT:
        parts = dict(attributes(data))
        numbers.budgets[name.removesuffix("_budget")] = _number(parts[3])


# ---- elements

_Reader = Callable[[list[Attributes], str, Numbers], None]


def _reader(family: str, name: str) -> _Reader | None:
    if family == "netdev":
        return _admitted if observe.admitting(name) else None
    return {"in": _by_mark, "opened": _by_mark, "dial4": _dialled, "dial6": _dialled}.get(name)


def _by_mark(elements: list[Attributes], name: str, numbers: Numbers) -> None:
    numbers.marks[name] = {_mark(value(parts[1], 4)): Tally(*counted(parts)) for parts in elements}


def _admitted(elements: list[Attributes], name: str, numbers: Numbers) -> None:
    """Keys: address, protocol, port, each filled up to four bytes (struct nft_set_ext, NFT_REG32_SIZE)."""
    workspace, size = observe.admitting(name), 4 if name.endswith("4") else 16
    assert workspace is not None
    for parts in elements:
        key = value(parts[1], size + 8)
        last = value(parts[10], size + 8) if 10 in parts else key
        mark = _mark(value(parts[2], 4))
        place = address(key[:size]) if last == key else network(key[:size], last[:size])
        packets, bytes_ = counted(parts)
        numbers.elements.append(
            ElementCount(
                workspace=workspace,
                address=observe.exact(place, mark),
                protocol=_PROTOCOLS.get(key[size], str(key[size])),
                port=int.from_bytes(key[size + 4 : size + 6], "big"),
                mark=mark,
                comment=comment(parts.get(6, b"")),
                packets=packets,
                bytes=bytes_,
            )
        )


def _dialled(elements: list[Attributes], name: str, numbers: Numbers) -> None:
    """Keys: address, source, port."""
    size = 4 if name.endswith("4") else 16
    for parts in elements:
        key = value(parts[1], 2 * size + 4)
        packets, bytes_ = counted(parts)
        numbers.dialled.append(
            DialCount(
                workspace="",
                address=address(key[:size]),
                port=int.from_bytes(key[2 * size : 2 * size + 2], "big"),
                mark=_mark(value(parts[2], 4)),
                comment=comment(parts.get(6, b"")),
                packets=packets,
                bytes=bytes_,
            )
        )


def _mark(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def address(packed: bytes) -> str:
    """As `observe` spells it: inet_ntop writes ::ffff:1.2.3.4, and Python does not."""
    name = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
    return str(ip_address(name)) if "." in name and ":" in name else name


def network(first: bytes, last: bytes) -> str:
    """The network from one address to another."""
    if first == last:
        return address(first)
    networks: list[object]
    if len(first) == 4:
        networks = list(summarize_address_range(IPv4Address(first), IPv4Address(last)))
    else:
        networks = list(summarize_address_range(IPv6Address(first), IPv6Address(last)))
    if len(networks) != 1:
        raise KernelError(f"{address(first)} to {address(last)} is no network")
    return str(networks[0])


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _long(value: bytes) -> int:
    return int(struct.unpack(">Q", value)[0])
