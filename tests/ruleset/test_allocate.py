"""Numbers are for keeps."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import EXAMPLE, host, policy

from egressd.model.errors import PolicyError
from egressd.ruleset import allocate as room
from egressd.ruleset.allocate import allocate, give_back, take
from egressd.ruleset.layout import BLOCKS, WORKSPACES

names = st.lists(st.integers(0, 400).map("h{}.test".format), unique=True, max_size=60)


def test_the_order_of_policies_and_rules_does_not_matter() -> None:
    one, two = policy(*EXAMPLE), policy(host("b.test"), workspace="beta")
    turned = dataclasses.replace(one, rules=one.rules[::-1])
    assert allocate([one, two]) == allocate([two, turned])


def test_numbers_stay_without_memory_for_most() -> None:
    """The search starts where the key's hash says."""
    many = policy(*(host(f"h{n}.test") for n in range(500)))
    fewer = policy(*(host(f"h{n}.test") for n in range(0, 500, 2)))
    first, second = allocate([many]).blocks["acme"], allocate([fewer]).blocks["acme"]
    moved = [key for key in second if second[key] != first[key]]
    assert len(moved) < 25


@settings(max_examples=100, deadline=None)
@given(st.lists(names, max_size=5))
def test_a_name_keeps_its_block_and_nobody_else_gets_it(versions: list[list[str]]) -> None:
    allocation, owner = None, {}
    for version in versions:
        allocation = allocate([policy(*map(host, version))], allocation)
        blocks = allocation.blocks["acme"]
        assert set(blocks) == set(version)
        assert len(set(blocks.values())) == len(blocks)
        for name, block in blocks.items():
            assert 0 < block < BLOCKS - 1
            assert owner.setdefault(block, name) == name


def test_a_workspace_that_comes_back_finds_its_numbers() -> None:
    acme, beta = policy(*EXAMPLE), policy(host("b.test"), workspace="beta")
    first = allocate([acme, beta])
    gone = allocate([acme], first)
    assert gone.workspaces.keys() == {"acme"}
    assert gone.retired_workspaces == {"beta": first.workspaces["beta"]}
    again = allocate([acme, beta], gone)
    assert (again.workspaces, again.blocks) == (first.workspaces, first.blocks)


def test_graves_are_opened_only_when_there_is_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BLOCKS", range(1, 5))
    first = allocate([policy(host("a.test"), host("b.test"))])
    second = allocate([policy(host("c.test"), host("d.test"))], first)
    assert not set(second.blocks["acme"].values()) & set(first.blocks["acme"].values())
    third = allocate([policy(*(host(f"{x}.test") for x in "cdef"))], second)
    assert sorted(third.blocks["acme"].values()) == [1, 2, 3, 4]
    assert third.retired_blocks == {}
    assert {k: third.blocks["acme"][k] for k in ("c.test", "d.test")} == second.blocks["acme"]


def test_too_many_is_said_before_anything_is_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BLOCKS", range(1, 3))
    with pytest.raises(PolicyError, match="3 rules in workspace acme: too many"):
        allocate([policy(*(host(f"{x}.test") for x in "abc"))])
    monkeypatch.setattr(room, "_INDEXES", range(1, 2))
    with pytest.raises(PolicyError, match="2 workspaces: too many"):
        allocate([policy(), policy(workspace="beta")])


def test_a_full_house_is_numbered_without_gaps() -> None:
    names = [f"w{n}" for n in range(WORKSPACES - 1)]
    allocation = allocate(policy(workspace=name) for name in names)
    assert sorted(allocation.workspaces.values()) == list(range(1, WORKSPACES))


# ---- names of wildcards, one at a time


def test_a_name_takes_a_block_that_no_rule_has_and_keeps_it() -> None:
    first = allocate([policy(*EXAMPLE)])
    second, block = take(first, "acme", "a.search.test")
    assert block not in first.blocks["acme"].values()
    assert take(second, "acme", "a.search.test") == (second, block)
    third = give_back(second, "acme", ["a.search.test", "never.test"])
    assert third.blocks == first.blocks and third.retired_blocks["acme"] == {"a.search.test": block}
    assert take(third, "acme", "a.search.test")[1] == block
    assert take(third, "acme", "b.search.test")[1] != block


def test_the_block_of_whoever_left_first_is_the_first_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BLOCKS", range(1, 5))
    allocation = allocate([policy(host("x.test"))])
    blocks = {}
    for name in ("c.test", "a.test", "b.test"):
        allocation, blocks[name] = take(allocation, "acme", name)
    for name in ("b.test", "c.test", "a.test"):
        allocation = give_back(allocation, "acme", [name])
    allocation, block = take(allocation, "acme", "d.test")
    assert block == blocks["b.test"] and "b.test" not in allocation.retired_blocks["acme"]
    # a change of policy keeps the order
    allocation = allocate([policy(host("x.test"))], allocation, granted={"acme": ["d.test"]})
    allocation, block = take(allocation, "acme", "e.test")
    assert block == blocks["c.test"]
    allocation, _ = take(allocation, "acme", "f.test")
    with pytest.raises(PolicyError, match="every block of workspace acme is in use"):
        take(allocation, "acme", "g.test")


def test_rules_and_granted_names_never_share_a_block() -> None:
    allocation = allocate([policy(host("x.test"))])
    allocation, block = take(allocation, "acme", "a.search.test")
    rules = [host(f"h{n}.test") for n in range(500)]
    after = allocate([policy(*rules)], allocation, granted={"acme": ["a.search.test"]})
    assert after.blocks["acme"]["a.search.test"] == block
    assert len(set(after.blocks["acme"].values())) == 501
    assert "a.search.test" not in after.retired_blocks["acme"]
    gone = allocate([policy(*rules)], after)
    assert gone.retired_blocks["acme"]["a.search.test"] == block
