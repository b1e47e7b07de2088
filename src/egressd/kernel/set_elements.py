"""An element of a set or map as the kernel tells it, in the words of `observe`.

Of the types that our sets have, and no others: whatever is not understood, to the last attribute, is
`Unreadable`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from egressd.kernel.dumps import Attributes, comment
from egressd.kernel.netlink import attributes
from egressd.kernel.tallies import address, network
from egressd.model.errors import KernelError
from egressd.ruleset.objects import VERDICT, Entry, Set, mark_text, string

__all__ = ["Unreadable", "element"]

# NFTA_SET_ELEM_*
_KEY, _DATA, _FLAGS, _USERDATA, _EXPRESSION, _KEY_END, _EXPRESSIONS = 1, 2, 3, 6, 7, 10, 11
_PADDING = 8  # NFTA_SET_ELEM_PAD
_JUMP = -3  # NFT_JUMP
_SIZES = {"mark": 4, "ipv4_addr": 4, "ipv6_addr": 16, "inet_proto": 1, "inet_service": 2, "ifname": 16}
_PROTOCOLS = {6: "tcp", 17: "udp"}
_UNITS = {1: "second", 60: "minute", 3600: "hour", 86_400: "day", 604_800: "week"}


class Unreadable(KernelError):
    """Not one of ours, or not in the way ours are."""


def element(said: Attributes, of: Set) -> tuple[str, Entry]:
    """Its key, and what stands beside it."""
    known = {_KEY, _DATA, _FLAGS, _USERDATA, _EXPRESSION, _KEY_END, _EXPRESSIONS, _PADDING}
    if not said.keys() <= known or int.from_bytes(said.get(_FLAGS, b""), "big"):
        raise Unreadable(f"an element with attributes {sorted(said)}")
    key = _value(said[_KEY])
    name = _key(key, _value(said[_KEY_END]) if _KEY_END in said else key, of.type.split(" . "))
    data = _data(said[_DATA], of.data) if of.data is not None else ""
    if (of.data is None) != (_DATA not in said):
        raise Unreadable("an element with data in a set, or without it in a map")
    return name, Entry(data, comment(said.get(_USERDATA, b"")), _statement(said, of))


def _value(data: bytes) -> bytes:
    """NFTA_DATA_VALUE, alone."""
    ((kind, value),) = attributes(data)
    if kind != 1:
        raise Unreadable("not a plain value")
    return value


def _key(first: bytes, last: bytes, types: list[str]) -> str:
    widths = [_SIZES[kind] for kind in types]
    if len(types) > 1:  # each begins at a word
        widths = [(width + 3) & ~3 for width in widths]
    if sum(widths) != len(first) or len(first) != len(last):
        raise Unreadable(f"a key of {len(first)} bytes")
    return " . ".join(_fields(first, last, types, widths))


def _fields(first: bytes, last: bytes, types: list[str], widths: list[int]) -> Iterator[str]:
    at = 0
    for kind, width in zip(types, widths, strict=True):
        low, high = first[at : at + width], last[at : at + width]
        at += width
        if low == high:
            yield _field(kind, low)
        elif kind in ("ipv4_addr", "ipv6_addr"):
            yield network(low, high)
        else:
            raise Unreadable(f"a range of {kind}")


def _field(kind: str, value: bytes) -> str:
    size = _SIZES[kind]
    if any(value[size:]):
        raise Unreadable(f"{kind} with something behind it")
    match kind:
        case "mark":
            return mark_text(int.from_bytes(value, sys.byteorder))
        case "ifname":
            return string(value.rstrip(b"\0").decode("ascii"))
        case "inet_proto":
            return _PROTOCOLS[value[0]]
        case "inet_service":
            return str(int.from_bytes(value[:2], "big"))
    return address(value)


def _data(data: bytes, kind: str | None) -> str:
    if kind != VERDICT:
        return _field(str(kind), _value(data))
    ((sort, verdict),) = attributes(data)
    said = dict(attributes(verdict))
    if sort != 2 or int.from_bytes(said[1], "big", signed=True) != _JUMP or said.keys() - {1, 2, 3}:
        raise Unreadable("a verdict that is no jump")
    return f"jump {said[2].rstrip(bytes(1)).decode('ascii')}"


def _statement(said: Attributes, of: Set) -> str:
    """What hangs on it beside the counter that each element of such a set has."""
    expressions = [said[_EXPRESSION]] if _EXPRESSION in said else []
    expressions += [value for _, value in attributes(said.get(_EXPRESSIONS, b""))]
    found = [dict(attributes(expression)) for expression in expressions]
    counters = [parts for parts in found if parts[1] == b"counter\0"]
    rest = [parts for parts in found if parts[1] != b"counter\0"]
    if len(counters) != of.counter or len(rest) > 1:
        raise Unreadable("an element that counts where none does, or the other way round")
    return _limit(rest[0]) if rest else ""


def _limit(parts: Attributes) -> str:
    """NFTA_LIMIT_RATE, _UNIT, _BURST, _TYPE, _FLAGS."""
    said = {kind: int.from_bytes(value, "big") for kind, value in attributes(parts[2])}
    if parts[1] != b"limit\0" or said.get(4, 0) != 0 or said.get(5, 0) & ~1:
        raise Unreadable("a statement that is no limit of packets")
    over = "over " if said.get(5, 0) else ""
    return f"limit rate {over}{said[1]}/{_UNITS[said[2]]} burst {said[3]} packets"
