"""How patient the custodian is, what it may leave to root to put back, and who is not killed for sleeping."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.kernel import gateway
from egressd.processes import hostside, supervisor
from egressd.processes.cards import CARDS
from egressd.processes.custodian import Patience
from egressd.processes.supervisor import Child, Supervisor


def test_five_times_in_a_minute_and_then_ever_more_rarely() -> None:
    patience = Patience()
    assert [patience.mended(second) for second in range(12)] == [0.0] * 5 + [2, 4, 8, 16, 32, 60, 60]


def test_a_minute_later_it_is_patient_again() -> None:
    patience = Patience()
    for second in range(6):
        patience.mended(second)
    assert patience.mended(70.0) == 0.0


def test_now_and_then_is_never_too_often() -> None:
    patience = Patience()
    assert {patience.mended(15.0 * n) for n in range(200)} == {0.0}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=60))
def test_it_never_waits_longer_than_a_minute(gaps: list[float]) -> None:
    patience, now = Patience(), 0.0
    for gap in gaps:
        now += gap
        assert 0.0 <= patience.mended(now) <= 60.0


# ---- what root puts back on its word


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("net/ipv4/conf/eth0/forwarding", "0", True),
        ("net/ipv6/conf/all/forwarding", "0", True),
        ("net/ipv6/conf/eth0.7/force_forwarding", "0", True),
        ("net/ipv6/conf/eth0/accept_ra", "1", True),
        ("net/ipv6/conf/eth0/accept_ra", "-1", True),
        ("net/ipv4/conf/../forwarding", "0", False),
        ("net/ipv4/conf/eth0/../../../../kernel/core_pattern", "0", False),
        ("kernel/core_pattern", "|/tmp/x", False),
        ("net/ipv4/conf/eth0/forwarding", "|/tmp/x", False),
        ("net/ipv4/conf/eth0/forwarding", "0\n", False),
        ("net/ipv4/conf/eth0/accept_local", "1", False),
        ("/net/ipv4/conf/eth0/forwarding", "0", False),
        ("net/ipv4/ip_forward", "1", False),
    ],
)
def test_settings_from_before(tmp_path: Path, key: str, value: str, kept: bool) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"settings": {key: value}}))
    assert hostside.kept_settings(path) == ({key: value} if kept else {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 7}', '{"settings": [1]}', "\0", "{" * 5000])
def test_a_damaged_file_restores_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert hostside.kept_settings(path) == {}


def test_the_first_value_is_the_one_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.json"
    hostside.write_settings(path, {"net/ipv4/conf/eth0/forwarding": "0", "net/ipv4/conf/egw/forwarding": "0"})
    hostside.write_settings(path, {"net/ipv4/conf/eth0/forwarding": "1"})
    assert hostside.kept_settings(path) == {"net/ipv4/conf/eth0/forwarding": "0"}


def test_whatever_is_set_of_a_device_that_is_not_ours_can_be_put_back(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    keys = {
        setting.key for setting in gateway.host_settings(["eth0", "br-lan.7"]) if "/egw/" not in setting.key
    }
    hostside.write_settings(path, dict.fromkeys(keys, "0"))
    assert hostside.kept_settings(path).keys() == keys


# ---- a machine that slept


@pytest.mark.parametrize(("gap", "forgiven"), [(1.0, False), (4.0, False), (30.0, True), (86400.0, True)])
def test_what_stopped_the_supervisor_stopped_the_others_too(gap: float, forgiven: bool) -> None:
    child = Child(CARDS["resolver"], heard=100.0)
    scene: Any = SimpleNamespace(_looked=101.0, children={"resolver": child})
    now = 101.0 + gap
    Supervisor._forgive(scene, now)
    assert scene._looked == now
    assert child.heard == (100.0 + gap if forgiven else 100.0)
    assert (now - child.heard <= supervisor.HUNG_AFTER) == (forgiven or gap + 1 <= supervisor.HUNG_AFTER)
