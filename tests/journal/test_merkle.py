"""The tree, its proofs, and what does not prove anything."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal import merkle
from egressd.journal.merkle import EMPTY, Frontier, MerkleError, leaf_hash, node_hash

# The reference tree of RFC 6962's first implementation (certificate-transparency, merkletree tests): inputs,
# roots of the first 1..8, audit paths (leaf, size), consistency proofs (first, second).
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
_L5 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"  # leaf 4
_67 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"  # node over leaves 6, 7
_23 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"  # node over leaves 2, 3
_45 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"  # node over leaves 4, 5
PATHS = {
    (0, 1): [],
    (0, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7", _23,
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (5, 8): [_L5, _67, ROOTS[3]],
    (2, 3): [ROOTS[1]],
    (1, 5): ["6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d", _23, _L5],
}  # fmt: skip
CONSISTENT = {
    (1, 1): [],
    (1, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7", _23,
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (6, 8): [_45, _67, ROOTS[3]],
    (2, 5): [_23, _L5],
}  # fmt: skip


def leaves(count: int) -> list[bytes]:
    return [leaf_hash(INPUTS[i] if i < 8 else b"leaf %d" % i) for i in range(count)]


def slow_root(hashes: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if len(hashes) <= 1:
        return hashes[0] if hashes else hashlib.sha256(b"").digest()
    k = 1
    while k * 2 < len(hashes):
        k *= 2
    return node_hash(slow_root(hashes[:k]), slow_root(hashes[k:]))


def slow_path(index: int, hashes: list[bytes]) -> list[bytes]:
    """RFC 6962 section 2.1.1."""
    if len(hashes) == 1:
        return []
    k = 1
    while k * 2 < len(hashes):
        k *= 2
    if index < k:
        return [*slow_path(index, hashes[:k]), slow_root(hashes[k:])]
    return [*slow_path(index - k, hashes[k:]), slow_root(hashes[:k])]


def slow_consistency(first: int, hashes: list[bytes], *, known: bool = True) -> list[bytes]:
    """RFC 6962 section 2.1.2."""
    if first == len(hashes):
        return [] if known else [slow_root(hashes)]
    k = 1
    while k * 2 < len(hashes):
        k *= 2
    if first <= k:
        return [*slow_consistency(first, hashes[:k], known=known), slow_root(hashes[k:])]
    return [*slow_consistency(first - k, hashes[k:], known=False), slow_root(hashes[:k])]


# ---- the reference tree


def test_an_empty_tree_has_the_hash_of_nothing() -> None:
    assert merkle.root([]) == Frontier().root() == EMPTY == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_of_the_reference_tree(size: int) -> None:
    frontier = Frontier()
    frontier.extend(leaves(size))
    assert merkle.root(leaves(size)).hex() == frontier.root().hex() == ROOTS[size - 1]


@pytest.mark.parametrize(("index", "size"), PATHS)
def test_paths_of_the_reference_tree(index: int, size: int) -> None:
    path = merkle.inclusion(leaves(size), index)
    assert [node.hex() for node in path] == PATHS[index, size]
    merkle.verify_inclusion(leaves(8)[index], index, size, path, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(("first", "second"), CONSISTENT)
def test_consistency_of_the_reference_tree(first: int, second: int) -> None:
    path = merkle.consistency(leaves(second), first)
    assert [node.hex() for node in path] == CONSISTENT[first, second]
    merkle.verify_consistency(
        first, second, bytes.fromhex(ROOTS[first - 1]), bytes.fromhex(ROOTS[second - 1]), path
    )


def test_a_leaf_cannot_pass_for_a_node() -> None:
    a, b = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(a + b) != node_hash(a, b) == merkle.root([a, b])


# ---- against the RFC's own recursion


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 33, 64, 65])
def test_every_proof_of_small_trees(size: int) -> None:
    tree, top = leaves(size), slow_root(leaves(size))
    for index in range(size):
        path = merkle.inclusion(tree, index)
        assert path == slow_path(index, tree)
        merkle.verify_inclusion(tree[index], index, size, path, top)
    for first in range(1, size + 1):
        proof = merkle.consistency(tree, first)
        assert proof == slow_consistency(first, tree)
        merkle.verify_consistency(first, size, slow_root(tree[:first]), top, proof)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 10_000])
def test_trees_larger_than_what_is_hashed_at_once(size: int) -> None:
    tree = leaves(size)
    top = slow_root(tree)
    assert merkle.root(tree) == top
    merkle.verify_inclusion(tree[4000], 4000, size, merkle.inclusion(tree, 4000), top)
    proof = merkle.consistency(tree, 4094)
    merkle.verify_consistency(4094, size, slow_root(tree[:4094]), top, proof)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 70), data=st.data())
def test_one_proof_for_many_records(size: int, data: st.DataObject) -> None:
    tree = leaves(size)
    wanted = data.draw(st.sets(st.integers(0, size - 1)))
    hashes = merkle.included(tree, wanted)
    told = {index: tree[index] for index in wanted}
    merkle.verify_included(told, size, hashes, slow_root(tree))
    if len(wanted) == 1:
        (index,) = wanted
        assert sorted(hashes) == sorted(slow_path(index, tree))
    if hashes:  # each hash counts, and so does their number
        broken = data.draw(st.integers(0, len(hashes) - 1))
        for wrong in (
            [*hashes[:broken], bytes(32), *hashes[broken + 1 :]],
            hashes[:broken] + hashes[broken + 1 :],
            [*hashes, hashes[-1]],
        ):
            with pytest.raises(MerkleError):
                merkle.verify_included(told, size, wrong, slow_root(tree))
    for index in wanted:
        with pytest.raises(MerkleError):
            merkle.verify_included({**told, index: bytes(32)}, size, hashes, slow_root(tree))


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.integers(0, 40), max_size=6))
def test_a_frontier_goes_on_after_it_was_stored(parts: list[int]) -> None:
    frontier, tree = Frontier(), []
    for number, part in enumerate(parts):
        more = [leaf_hash(b"%d %d" % (number, i)) for i in range(part)]
        tree += more
        frontier = Frontier.load(frontier.dump())
        frontier.extend(more)
        assert (frontier.size, frontier.root()) == (len(tree), slow_root(tree))


@settings(max_examples=150, deadline=None)
@given(second=st.integers(2, 60), data=st.data())
def test_nothing_but_the_truth_is_consistent(second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, second - 1))
    tree = leaves(second)
    old, new, proof = slow_root(tree[:first]), slow_root(tree), merkle.consistency(tree, first)
    changed = data.draw(st.integers(0, first - 1))
    forged = slow_root([*tree[:changed], leaf_hash(b"forged"), *tree[changed + 1 : first]])
    for case in (
        (first, second, forged, new, proof),
        (first, second, old, forged, proof),
        (first, second, old, new, proof[:-1]),
        (first, second, old, new, [*proof, new]),
        (first, second, old, new, [bytes(32), *proof[1:]]),
        (second, first, new, old, proof),
    ):
        with pytest.raises(MerkleError):
            merkle.verify_consistency(*case)


# ---- refused


@pytest.mark.parametrize(
    ("index", "size", "leaf", "path", "why"),
    [
        (4, 8, 5, PATHS[5, 8], "is not in the tree"),
        (5, 8, 4, PATHS[5, 8], "is not in the tree"),
        (5, 8, 5, PATHS[5, 8][:2], "too short"),
        (5, 8, 5, [*PATHS[5, 8], ROOTS[0]], "too long"),
        (5, 8, 5, [], "too short"),
        (8, 8, 5, PATHS[5, 8], "has no leaf 8"),
        (-1, 8, 5, PATHS[5, 8], "has no leaf -1"),
        (0, 0, 5, [], "has no leaf 0"),
        (5, 1 << 64, 5, PATHS[5, 8], "has no leaf 5"),
        (5, 8, 5, ["00", *PATHS[5, 8][1:]], "no hash"),
    ],
)
def test_a_wrong_audit_path(index: int, size: int, leaf: int, path: list[str], why: str) -> None:
    nodes = [bytes.fromhex(node) for node in path]
    with pytest.raises(MerkleError, match=why):
        merkle.verify_inclusion(leaves(8)[leaf], index, size, nodes, bytes.fromhex(ROOTS[7]))


def test_an_empty_tree_is_the_beginning_of_every_tree_and_only_with_its_own_root() -> None:
    tree = leaves(3)
    assert merkle.consistency(tree, 0) == []
    merkle.verify_consistency(0, 3, EMPTY, merkle.root(tree), [])
    for first, proof in ((bytes(32), []), (EMPTY, [bytes(32)])):
        with pytest.raises(MerkleError):
            merkle.verify_consistency(0, 3, first, merkle.root(tree), proof)
    with pytest.raises(MerkleError):
        merkle.verify_consistency(3, 3, merkle.root(tree), EMPTY, [])


def test_questions_that_make_no_sense() -> None:
    for ask in (
        lambda: merkle.inclusion(leaves(3), 3),
        lambda: merkle.inclusion([], 0),
        lambda: merkle.consistency(leaves(3), 4),
        lambda: merkle.consistency(leaves(3), -1),
        lambda: merkle.included(leaves(3), [3]),
        lambda: merkle.included(leaves(3), [-1]),
        lambda: merkle.verify_included({3: leaves(4)[3]}, 3, [], EMPTY),
        lambda: merkle.verify_included({}, 0, [], bytes(32)),
    ):
        with pytest.raises(MerkleError):
            ask()
    assert merkle.included([], []) == []
    merkle.verify_included({}, 0, [], EMPTY)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(9),
        bytes(7) + b"\x01",
        bytes(7) + b"\x03" + bytes(63),
        b"\xff" * 8 + bytes(64 * 32),
    ],
)
def test_a_damaged_frontier_is_refused(data: bytes) -> None:
    with pytest.raises(MerkleError):
        Frontier.load(data)
