"""Listing everything, while whoever waits for it goes on saying that it lives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from egressd.kernel import namespaces, nft
from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError

pytestmark = pytest.mark.kernel


@pytest.fixture
def session() -> Iterator[Nft]:
    with namespaces.throw_away():
        made = Nft()
        made.run(["add table inet t", "add chain inet t c", "add rule inet t c drop"])
        yield made


@pytest.mark.parametrize("listing", ["list_json", "list_shapes", "list_text", "list_chains"])
def test_a_listing_is_the_same_whether_somebody_waits_for_it(session: Nft, listing: str) -> None:
    alone = getattr(session, listing)()
    session.meanwhile = lambda: None
    assert getattr(session, listing)() == alone


@pytest.mark.parametrize("family", ["netdev", "inet", "ip", "bridge"])
def test_a_table_that_is_dormant_is_not_listed_as_json(session: Nft, family: str) -> None:
    """nft 1.0.6 frees its flags before it prints them. Its text is right; and counters go without tables."""
    session.run([f"add table {family} one {{ flags dormant; }}", f"add counter {family} one c"])
    for listing in (session.list_json, session.list_shapes):
        with pytest.raises(KernelError, match=rf"dormant.*cannot be listed: '{family} one'$"):
            listing()
    assert "flags dormant" in session.list_text()
    assert [entry["counter"]["name"] for entry in session.list_counters()["nftables"][1:]] == ["c"]
    session.run([f"add table {family} one"])
    assert session.list_json()["nftables"]


def test_while_it_takes_its_time_the_one_who_waits_is_called(
    session: Nft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nft, "_STEP", 0.001)
    called, slow = threading.Event(), session._command

    def until_called(text: str) -> str:
        assert called.wait(10)
        return slow(text)

    monkeypatch.setattr(session, "_command", until_called)
    session.meanwhile = called.set
    assert "chain c" in session.list_text()


def test_one_that_never_ends_is_not_covered_up(session: Nft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "_STEP", 0.001)
    monkeypatch.setattr(nft, "_LONGEST", 0.0)
    calls: list[None] = []
    session.meanwhile = lambda: calls.append(None)
    session.list_text()
    assert calls == []


def test_a_refusal_reaches_the_one_who_waits(session: Nft, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str) -> str:
        raise KernelError("nft: no")

    monkeypatch.setattr(session, "_command", refused)
    session.meanwhile = lambda: None
    with pytest.raises(KernelError, match="nft: no"):
        session.list_json()
