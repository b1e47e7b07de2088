"""The sandbox table: numbers are never used twice, addresses never by two at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.processes.leases import Leases, LinkNumbers, Sandbox
from egressd.processes.members import Caller
from egressd.ruleset.layout import Pools


def opened(leases: Leases, workspace: str = "acme") -> Sandbox:
    caller = Caller(pid=1, uid=1000, groups=frozenset())
    return leases.open(workspace=workspace, caller=caller, command="true", since=0.0, quota=None)


def test_numbers_go_up_and_never_back_across_restarts(tmp_path: Path) -> None:
    file = tmp_path / "next-link"
    before = [LinkNumbers(file).take().number for _ in range(1)]
    first = LinkNumbers(file)
    more = [first.take().number for _ in range(200)]
    again = LinkNumbers(file).take().number
    numbers = [*before, *more, again]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("content", ["", "1", "64"])
def test_numbers_begin_where_the_file_says(tmp_path: Path, content: str) -> None:
    file = tmp_path / "next-link"
    file.write_text(content)
    assert LinkNumbers(file).take() == Link(int(content or 1))


def test_a_broken_file_is_an_error_not_a_beginning(tmp_path: Path) -> None:
    file = tmp_path / "next-link"
    file.write_text("seven")
    with pytest.raises(ValueError, match="seven"):
        LinkNumbers(file).take()


def test_two_live_sandboxes_never_share_an_address(tmp_path: Path) -> None:
    leases = Leases(Pools(), LinkNumbers(tmp_path / "next-link"))
    first = opened(leases)
    (tmp_path / "next-link").write_text("65535")  # 65,534 further on the addresses begin again
    leases.numbers = LinkNumbers(tmp_path / "next-link")
    second = opened(leases)
    assert leases.pools.sandbox(Link(65_535))[0] == first.address4
    assert (second.link, second.address4 != first.address4) == (Link(65_536), True)


def test_an_address_comes_free_with_its_sandbox(tmp_path: Path) -> None:
    leases = Leases(Pools(), LinkNumbers(tmp_path / "next-link"))
    sandbox = opened(leases)
    assert leases.count("acme") == 1
    leases.close(sandbox)
    leases.close(sandbox)
    assert (leases.count("acme"), leases.by_link) == (0, {})


def test_a_full_pool_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(Pools(), LinkNumbers(tmp_path / "next-link"))
    monkeypatch.setattr(leases, "_addresses", set(Pools().sandbox4))
    with pytest.raises(Refused, match="every sandbox address"):
        opened(leases)
