"""The Merkle tree over a journal's records: RFC 6962 section 2.1, with SHA-256.

    leaf hash   SHA-256(0x00 || line)             line: one record without its newline
    node hash   SHA-256(0x01 || left || right)
    root        of n leaves: the left subtree takes the largest power of two that is smaller than n

Everywhere here a *leaf* is a leaf hash, 32 bytes. Functions take any `Sequence[bytes]`, also one that lies
in a file; each reads every leaf at most once.

`included` is one proof for many records. It walks the tree from the root: a subtree without a wanted leaf
gives its hash, one with a wanted leaf is opened, left before right. Each hash therefore has one place, and
for a single record the hashes are those of RFC 6962's audit path, in the tree's order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256

__all__ = [
    "EMPTY", "Frontier", "MerkleError", "consistency", "included", "inclusion", "leaf_hash", "leaf_hashes",
    "node_hash", "root", "verify_consistency", "verify_included", "verify_inclusion",
]  # fmt: skip

EMPTY = sha256(b"").digest()  # the root of a tree without leaves
_HASH = 32  # bytes
_SIZE = 8  # bytes of a dumped frontier's size, big-endian
_MOST = 1 << 63
_RUN = 1 << 12  # leaves hashed up at once; a power of two


class MerkleError(ValueError):
    """A proof does not prove what it should, or a question makes no sense for this tree."""


def leaf_hash(line: bytes) -> bytes:
    """Of one record's line, newline excluded."""
    return sha256(b"\x00" + line).digest()


def leaf_hashes(lines: Iterable[bytes]) -> list[bytes]:
    """Of many lines, newlines excluded."""
    return [sha256(b"\x00" + line).digest() for line in lines]


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root of all leaves; `EMPTY` for none."""
    return _span(leaves, 0, len(leaves)) if leaves else EMPTY


def _span(leaves: Sequence[bytes], low: int, high: int) -> bytes:
    """The hash of the subtree over leaves[low:high], at least one. `low` is a multiple of the power of two
    that its size is rounded up to, as for every subtree of RFC 6962; so pairing from the left, and lifting
    an odd last one, gives the same tree."""
    runs = [_lift(_slice(leaves, at, min(at + _RUN, high))) for at in range(low, high, _RUN)]
    return _lift(runs)


def _slice(leaves: Sequence[bytes], low: int, high: int) -> list[bytes]:
    return [leaves[index] for index in range(low, high)]


def _lift(row: list[bytes]) -> bytes:
    while len(row) > 1:
        pairs = [
            sha256(b"\x01" + left + right).digest() for left, right in zip(row[::2], row[1::2], strict=False)
        ]
        if len(row) % 2:
            pairs.append(row[-1])
        row = pairs
    return row[0]


def _left(size: int) -> int:
    """How many leaves the left subtree of a tree of `size` > 1 leaves has."""
    return 1 << (size - 1).bit_length() - 1


class Frontier:
    """What must be kept of a tree to append to it: the roots of its complete subtrees, largest first; one
    for each binary digit 1 of its size."""

    __slots__ = ("_nodes", "size")

    def __init__(self) -> None:
        self.size = 0
        self._nodes: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        self.extend((leaf,))

    def extend(self, leaves: Iterable[bytes]) -> None:
        row, rest, found = list(leaves), self.size, []
        self.size += len(row)
        while row:  # the new nodes of one height, from the leaves up
            if rest & 1:
                row.insert(0, self._nodes.pop())
            if len(row) & 1:
                found.append(row.pop())
            pairs = zip(row[::2], row[1::2], strict=True)
            row = [sha256(b"\x01" + left + right).digest() for left, right in pairs]
            rest >>= 1
        self._nodes += reversed(found)

    def root(self) -> bytes:
        """RFC 6962's root of the leaves so far."""
        if not self._nodes:
            return EMPTY
        node = self._nodes[-1]
        for left in reversed(self._nodes[:-1]):
            node = node_hash(left, node)
        return node

    def copy(self) -> Frontier:
        other = Frontier()
        other.size, other._nodes = self.size, list(self._nodes)
        return other

    def dump(self) -> bytes:
        """8 bytes of size, big-endian, then the hashes, largest subtree first."""
        return self.size.to_bytes(_SIZE, "big") + b"".join(self._nodes)

    @classmethod
    def load(cls, data: bytes) -> Frontier:
        size = int.from_bytes(data[:_SIZE], "big")
        if len(data) < _SIZE or size >= _MOST or len(data) != _SIZE + size.bit_count() * _HASH:
            raise MerkleError("these bytes are no frontier")
        frontier = cls()
        frontier.size = size
        frontier._nodes = [data[at : at + _HASH] for at in range(_SIZE, len(data), _HASH)]
        return frontier


# ---- one record


def inclusion(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of leaf `index`, RFC 6962 section 2.1.1: siblings from the leaf up to the root."""
    if not 0 <= index < len(leaves):
        raise MerkleError(f"a tree of {len(leaves)} leaves has no leaf {index}")
    path: list[bytes] = []
    low, high = 0, len(leaves)
    while high - low > 1:
        middle = low + _left(high - low)
        if index < middle:
            path.append(_span(leaves, middle, high))
            high = middle
        else:
            path.append(_span(leaves, low, middle))
            low = middle
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """MerkleError unless `leaf` is leaf `index` of the tree of `size` leaves with this root (RFC 9162
    section 2.1.3.2, which has the algorithm that RFC 6962 leaves to the reader)."""
    _check_hashes([leaf, root, *path])
    if not 0 <= index < size < _MOST:
        raise MerkleError(f"a tree of {size} leaves has no leaf {index}")
    node, first, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            raise MerkleError("the audit path is too long")
        if first & 1 or first == last:
            node = node_hash(sibling, node)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise MerkleError("the audit path is too short")
    if node != root:
        raise MerkleError(f"record {index} is not in the tree with this root")


# ---- two trees


def consistency(leaves: Sequence[bytes], first: int) -> list[bytes]:
    """That the tree of the first `first` leaves is the beginning of this one, RFC 6962 section 2.1.2.
    Empty if `first` is 0 or all of them."""
    size = len(leaves)
    if not 0 <= first <= size:
        raise MerkleError(f"a tree of {size} leaves has no beginning of {first}")
    if first in (0, size):
        return []
    path: list[bytes] = []
    low, high, whole = 0, size, True  # whole: the verifier knows the hash of this subtree, it is the root
    while first != high:
        middle = low + _left(high - low)
        if first <= middle:
            path.append(_span(leaves, middle, high))
            high = middle
        else:
            path.append(_span(leaves, low, middle))
            low, whole = middle, False
    if not whole:
        path.append(_span(leaves, low, high))
    return path[::-1]


def verify_consistency(
    first: int, second: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]
) -> None:
    """MerkleError unless the tree of `second` leaves begins with that of `first` (RFC 9162, 2.1.4.2)."""
    _check_hashes([first_root, second_root, *path])
    if not 0 <= first <= second < _MOST:
        raise MerkleError(f"a tree of {second} leaves does not begin with one of {first}")
    if first in (0, second):
        if path:
            raise MerkleError("the consistency proof is too long")
        if first_root != (second_root if first == second else EMPTY):
            raise MerkleError(f"the roots at {first} and {second} contradict each other")
        return
    _climb(first, second, first_root, second_root, path)


def _climb(first: int, second: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]) -> None:
    nodes = list(path) if first & (first - 1) else [first_root, *path]
    if not nodes:
        raise MerkleError("the consistency proof is too short")
    here, last = first - 1, second - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise MerkleError("the consistency proof is too long")
        if here & 1 or here == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            new = node_hash(new, node)
        here, last = here >> 1, last >> 1
    if last:
        raise MerkleError("the consistency proof is too short")
    if old != first_root or new != second_root:
        raise MerkleError(f"the tree of {second} records does not begin with that of {first}")


# ---- many records


def included(leaves: Sequence[bytes], indices: Collection[int]) -> list[bytes]:
    """One proof for all of `indices`. Without any it is the root alone; of an empty tree, nothing."""
    size, wanted = len(leaves), sorted(set(indices))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < size:
        raise MerkleError(f"a tree of {size} leaves does not have all of these")
    hashes: list[bytes] = []
    work = [(0, size)] if size else []
    while work:
        low, high = work.pop()
        at = bisect_left(wanted, low)
        if at == len(wanted) or wanted[at] >= high:
            hashes.append(_span(leaves, low, high))
        elif high - low > 1:
            middle = low + _left(high - low)
            work += [(middle, high), (low, middle)]  # the left one is taken first
    return hashes


def verify_included(leaves: Mapping[int, bytes], size: int, hashes: Sequence[bytes], root: bytes) -> None:
    """MerkleError unless each leaf has its index in the tree of `size` leaves with this root."""
    _check_hashes([root, *leaves.values(), *hashes])
    wanted = sorted(leaves)
    if not 0 <= size < _MOST or (wanted and not 0 <= wanted[0] <= wanted[-1] < size):
        raise MerkleError(f"a tree of {size} leaves does not have all of these records")
    rest = iter(hashes)
    found = _join(leaves, wanted, 0, size, rest) if size else EMPTY
    if next(rest, None) is not None:
        raise MerkleError("the proof has more hashes than it needs")
    if found != root:
        raise MerkleError("the records are not in the tree with this root")


def _join(
    leaves: Mapping[int, bytes], wanted: Sequence[int], low: int, high: int, rest: Iterator[bytes]
) -> bytes:
    """The hash of the subtree [low, high), at most 63 calls deep."""
    at = bisect_left(wanted, low)
    if at == len(wanted) or wanted[at] >= high:
        node = next(rest, None)
        if node is None:
            raise MerkleError("the proof has too few hashes")
        return node
    if high - low == 1:
        return leaves[low]
    middle = low + _left(high - low)
    left = _join(leaves, wanted, low, middle, rest)
    return node_hash(left, _join(leaves, wanted, middle, high, rest))


def _check_hashes(hashes: Iterable[bytes]) -> None:
    if any(not isinstance(node, bytes) or len(node) != _HASH for node in hashes):
        raise MerkleError("something that is no hash stands where a hash should")
