"""The objects of our two tables, as attributes, by netlink and not by libnftables.

libnftables reads each rule of the kernel to get at anything, and writes all of it as text: some seconds with
a thousand links, and meanwhile nobody else is served.

Formats: linux/netfilter/nf_tables.h. A listing during which the ruleset changed (NLM_F_DUMP_INTR) is read
again by `Netlink.ask`; whoever makes several asks for the generation before and after.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

from egressd.kernel import netlink
from egressd.kernel.netlink import DUMP, Netlink, Request, attribute, attributes
from egressd.model.errors import KernelError
from egressd.ruleset import layout
from egressd.ruleset.objects import FAMILIES, Family

__all__ = ["Attributes", "Dumps", "comment", "count", "counted", "text", "value"]

_NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS = 1, 4, 7, 10, 13  # NFT_MSG_*
_GET_GENERATION, _GET_OBJECT = 16, 19
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*
_NUMBERS = {name: number for number, name in _FAMILIES.items()}
_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT (libnftnl/udata.h)
_INTERVAL_END = 1  # NFT_SET_ELEM_INTERVAL_END
_BUFFER = 1 << 20  # bytes
_TABLE = f"{layout.TABLE}\0".encode()
_LONG, _ATTRIBUTE = struct.Struct(">Q"), struct.Struct("=HH")
_BYTES, _PACKETS = _ATTRIBUTE.pack(12, 1), _ATTRIBUTE.pack(12, 2)  # heads of what has 64 bits
_IS_COUNTER = attribute(1, b"counter\0")

Attributes = dict[int, bytes]


class Dumps:
    """Reads in the namespace it is made in. Not for several threads at once."""

    families: tuple[Family, ...] = FAMILIES
    meanwhile: Callable[[], None] | None = None  # called while much is read, for who must say that it lives

    def __init__(self) -> None:
        self._netlink = Netlink(netlink.NETFILTER, buffer=_BUFFER)

    def close(self) -> None:
        self._netlink.close()

    def generation(self) -> bytes:
        (reply,) = self._netlink.ask(Request(_NFTABLES | _GET_GENERATION, bytes(4), "read the generation"))
        return dict(attributes(reply.body[4:]))[1]

    def flagged(self) -> list[str]:
        """Every table, of whoever, that is dormant or belongs to a process: "inet egressd"."""
        request = Request(_NFTABLES | _GET_TABLE, bytes(4), "list the tables", DUMP)  # NFPROTO_UNSPEC: all
        found = []
        for reply in self._netlink.ask(request):
            said = dict(attributes(reply.body[4:]))
            if any(said.get(2, b"")):
                found.append(f"{_FAMILIES.get(reply.body[0], reply.body[0])} {text(said[1])}")
        return found

    def table(self, family: Family) -> Attributes | None:
        return next(self._list(_GET_TABLE, family), None)

    def chains(self, family: Family) -> Iterator[Attributes]:
        """NFTA_CHAIN_*."""
        return self._list(_GET_CHAIN, family)

    def rules(self, family: Family) -> Iterator[Attributes]:
        """NFTA_RULE_*, of each chain in order."""
        return self._list(_GET_RULE, family)

    def sets(self, family: Family) -> Iterator[Attributes]:
        """NFTA_SET_*, anonymous ones too."""
        return self._list(_GET_SET, family)

    def objects(self, family: Family) -> Iterator[Attributes]:
        """NFTA_OBJ_*: counters, quotas, limits."""
        return self._list(_GET_OBJECT, family)

    def elements(self, family: Family, name: str, *, ends: bool = False) -> list[Attributes]:
        """NFTA_SET_ELEM_*, by their keys. Each once: a table that is made larger meanwhile may be
        walked through twice (nft_rhash_walk). `ends`: also those that say where an interval ends."""
        found: dict[tuple[bytes, ...], Attributes] = {}
        for said in self._list(_GET_ELEMENTS, family, attribute(2, f"{name}\0".encode())):
            if self.meanwhile is not None:
                self.meanwhile()
            for _, element in attributes(said.get(3, b"")):
                parts = dict(attributes(element))
                flags = parts.get(3, b"")
                if ends or not int.from_bytes(flags, "big") & _INTERVAL_END:
                    found[parts.get(1, b""), parts.get(10, b""), flags] = parts
        return [found[key] for key in sorted(found)]

    def _list(self, kind: int, family: Family, more: bytes = b"") -> Iterator[Attributes]:
        """Nothing where there is no such table. NFTA_*_TABLE is 1 of whatever there is."""
        body = struct.pack("=BBH", _NUMBERS[family], 0, 0)
        if kind != _GET_TABLE:
            body += attribute(1, _TABLE) + more
        request = Request(
            _NFTABLES | kind, body, f"list table {family} {layout.TABLE}", DUMP, frozenset({errno.ENOENT})
        )
        for reply in self._netlink.ask(request):
            said = dict(attributes(reply.body[4:]))
            if said.get(1) == _TABLE and reply.body[0] == _NUMBERS[family]:
                yield said


def count(data: bytes) -> tuple[int, int]:
    """NFTA_COUNTER_PACKETS and NFTA_COUNTER_BYTES."""
    if len(data) == 24 and data[:4] == _BYTES and data[12:16] == _PACKETS:  # as it always is
        return int(_LONG.unpack_from(data, 16)[0]), int(_LONG.unpack_from(data, 4)[0])
    said = dict(attributes(data))
    return int(_LONG.unpack(said[2])[0]), int(_LONG.unpack(said[1])[0])


def counted(parts: Attributes) -> tuple[int, int]:
    """What an element has counted: NFTA_SET_ELEM_EXPR, or the one that is a counter among
    NFTA_SET_ELEM_EXPRESSIONS."""
    expressions = [parts[7]] if 7 in parts else [value for _, value in attributes(parts.get(11, b""))]
    for expression in expressions:
        if expression[:12] == _IS_COUNTER and len(expression) == 40:
            return count(expression[16:])
        said = dict(attributes(expression))
        if said.get(1) == b"counter\0":
            return count(said[2])
    return 0, 0


def comment(data: bytes) -> str:
    """User data is (u8 type, u8 length, value)* (libnftnl/udata.h)."""
    at = 0
    while at + 2 <= len(data):
        kind, length = data[at], data[at + 1]
        if kind == _COMMENT:
            return text(data[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")


def value(data: bytes, size: int) -> bytes:
    """NFTA_DATA_VALUE, of the size that it has in a set of ours; KernelError if it has another."""
    if len(data) == 4 + size and data[:4] == _ATTRIBUTE.pack(4 + size, 1):
        return data[4:]
    found = dict(attributes(data)).get(1, b"")
    if len(found) != size:
        raise KernelError(f"an element of {len(found)} bytes where ours have {size}")
    return found
