"""One name more or less in a want: what changes, and what is refused."""

from __future__ import annotations

import msgspec
import pytest
from policies import host, inspected, policy, tcp

from egressd.ruleset import build, diff
from egressd.ruleset.allocate import Allocation
from egressd.ruleset.grants import grant, withdraw
from egressd.ruleset.layout import Kind, Mark, Pools
from egressd.ruleset.plan import want
from egressd.ruleset.wants import Element, WorkspaceWant

POOLS = Pools()
NUMBERS = Allocation(
    workspaces={"acme": 1}, blocks={"acme": {"a.test": 1, "m.test": 2, "z.test": 3, "*.w.test": 4}}
)
BASE = want(policy(host("a.test"), host("z.test"), host("*.w.test")), NUMBERS, POOLS)
WITH = want(policy(host("a.test"), inspected("m.test", plain=tcp(80)), host("z.test")), NUMBERS, POOLS)
NAME = tuple(element for element in WITH.elements if element.comment == "m.test")


def test_a_granted_name_stands_where_the_policy_would_have_put_it() -> None:
    assert grant(BASE, NAME).whole == WITH
    assert grant(BASE, NAME[::-1]).whole == WITH
    assert withdraw(WITH, NAME).whole == BASE


def test_it_is_worked_out_as_if_all_were_compared() -> None:
    change = grant(BASE, NAME)
    assert change.operations(POOLS) == diff.changes(BASE, WITH, pools=POOLS)
    assert withdraw(WITH, NAME).operations(POOLS) == diff.changes(WITH, BASE, pools=POOLS)


def test_marks_of_what_is_inspected_are_two() -> None:
    forward, read = (int(Mark(kind=kind, workspace=1, block=2)) for kind in (Kind.FORWARD, Kind.INSPECT))
    change = grant(BASE, NAME)
    assert (change.fresh, change.removed) == ({forward, read}, set())
    assert withdraw(WITH, NAME).removed == {forward, read}
    only_read = [element for element in NAME if element.port == 443]
    assert withdraw(WITH, only_read).removed == {read}, "what goes to port 80 is still forwarded"
    only_plain = [element for element in NAME if element.port == 80]
    assert withdraw(WITH, only_plain).removed == set()


def test_twice_is_once() -> None:
    assert grant(WITH, NAME).operations(POOLS) == ()
    assert grant(BASE, NAME + NAME).whole == WITH
    assert withdraw(BASE, NAME).operations(POOLS) == ()
    assert withdraw(BASE, NAME).whole == BASE


def test_a_change_of_the_policy_leaves_what_it_shares_with_the_policy_alone() -> None:
    """One port of two goes, the inspected one: the mark of the other stays in @in."""
    less = want(policy(host("a.test"), host("m.test", tcp(80)), host("z.test")), NUMBERS, POOLS)
    lines = diff.commands(diff.changes(WITH, less, pools=POOLS))
    mark = [line.split("{")[0] for line in lines if "0x80004002" in line]
    assert mark == ["delete element inet egressd upstream "]
    assert [line.split("{")[0] for line in lines if line.startswith("delete element inet")] == [
        "delete element inet egressd in ",
        "delete element inet egressd opened ",
        "delete element inet egressd upstream ",
        "delete element inet egressd dial4 ",
        "delete element inet egressd dial6 ",
    ]


def other(kind: Kind, *, index: int = 1, block: int = 2, comment: str = "m.test") -> Element:
    mark = int(Mark(kind=kind, workspace=index, block=block))
    return Element(str(POOLS.synthetic(block)[0]), "tcp", 99, mark, comment)


@pytest.mark.parametrize(
    "element",
    [
        other(Kind.RELAY),
        other(Kind.DIRECT),
        other(Kind.RESOLVE),
        other(Kind.FORWARD, index=2),
        other(Kind.FORWARD, block=1),  # a.test's
        msgspec.structs.replace(other(Kind.FORWARD), mark=5),
    ],
    ids=["a service", "a network", "the resolver", "another workspace", "another name", "no mark"],
)
def test_what_is_no_name_of_the_workspace_is_refused(element: Element) -> None:
    with pytest.raises(ValueError):
        grant(BASE, [element])


def test_what_does_not_fit_is_refused_when_commands_are_made() -> None:
    for wrong in (
        msgspec.structs.replace(other(Kind.FORWARD), address="198.18.0.4"),
        msgspec.structs.replace(other(Kind.INSPECT), protocol="udp"),
    ):
        with pytest.raises(ValueError):
            grant(BASE, [wrong]).operations(POOLS)


def test_only_what_is_inspected_may_be_dialled() -> None:
    """Never a local service, never what the sandbox reaches by itself."""
    read = WorkspaceWant(workspace="acme", index=1, guard="enforce", elements=(other(Kind.INSPECT),))
    for kind in (Kind.RELAY, Kind.FORWARD):
        plain = msgspec.structs.replace(read, elements=(other(kind),))
        assert not any("dial" in line for line in build.workspace(plain, POOLS))
    [line] = [line for line in build.workspace(read, POOLS) if "dial4" in line]
    assert line.endswith(' dial4 { 198.18.0.8 . 169.254.64.1 . 99 comment "m.test" : 0x80004002 }')
