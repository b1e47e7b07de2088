"""The lookup of prefixes, measured with tiny counts: that peers are compared only where they agree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import residency


def measured(**counts: Any) -> dict[str, Figure]:
    report = Report("residency", say=lambda _: None)
    residency.measure(report, rounds=2, prefixes=300, lookups=90, **counts)
    return {figure.name: figure for figure in report.figures}


def _naive(texts: Sequence[str]) -> Callable[[str], str | None]:
    """Looks at every prefix."""
    from ipaddress import ip_address, ip_network

    networks = [ip_network(text) for text in texts]

    def find(address: str) -> str | None:
        around = [network for network in networks if ip_address(address) in network]
        return str(max(around, key=lambda network: network.prefixlen)) if around else None

    return find


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(residency, "_PEERS", found)
    monkeypatch.setattr(residency, "_there", lambda name: True)
    return found


def test_each_peer_has_its_figures(peers: dict[str, Any]) -> None:
    peers["naive"] = _naive
    found = measured()
    assert set(found) == {"residency_lookup_vs_naive", "residency_load_vs_naive"}
    figure = found["residency_lookup_vs_naive"]
    assert figure.theirs is not None and 0 < figure.ours < 10_000
    assert figure.details["prefixes"] == 300 and figure.details["lookups"] == 90


def test_a_peer_that_answers_otherwise_is_not_measured(peers: dict[str, Any]) -> None:
    peers["wrong"] = lambda texts: lambda address: texts[0]
    with pytest.raises(RuntimeError, match="for wrong"):
        measured()


def test_without_a_peer_it_is_measured_alone(peers: dict[str, Any]) -> None:
    found = measured()
    assert set(found) == {"residency_lookup", "residency_load"}
    assert "pip install" in found["residency_lookup"].details["why_no_peer"]
