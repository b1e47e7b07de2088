"""What machines say of themselves: read, and never stumbled over."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.diagnosis import reading

SMALL = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.1.0-18-amd64", (6, 1)),
        ("5.15.0-91-generic", (5, 15)),
        ("6.18.44-fc-v657", (6, 18)),
        ("6.1", (6, 1)),
        ("six", None),
        ("", None),
        ("6", None),
    ],
)
def test_kernels(text: str, expected: tuple[int, int] | None) -> None:
    assert reading.kernel_version(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("bubblewrap 0.8.0\n", (0, 8)), ("bubblewrap 0.11.0", (0, 11)), ("what?", None), ("", None)],
)
def test_bubblewraps(text: str, expected: tuple[int, int] | None) -> None:
    assert reading.bwrap_version(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("32768\n", 32768),
        (" 7 ", 7),
        ("-1", -1),
        ("", None),
        (None, None),
        ("1 2", None),
        ("٣", None),
    ],
)
def test_settings(text: str | None, expected: int | None) -> None:
    assert reading.number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('NAME=Debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n', "Debian GNU/Linux 12 (bookworm)"),
        ("PRETTY_NAME='Ubuntu 24.04.1 LTS'", "Ubuntu 24.04.1 LTS"),
        ('PRETTY_NAME="A \\"quoted\\" one \\$"', 'A "quoted" one $'),
        ("PRETTY_NAME=Alpine", "Alpine"),
        ("NAME=nothing", ""),
        ("PRETTY_NAME", ""),
    ],
)
def test_systems(text: str, expected: str) -> None:
    assert reading.pretty_name(text) == expected


RESOLV = """\
# a comment
search example.org
nameserver 127.0.0.53
nameserver\tfe80::1%eth0
  nameserver 1.1.1.1 # trailing
nameserver nonsense
nameserver
options edns0
"""


def test_resolvers() -> None:
    assert reading.nameservers(RESOLV) == ("127.0.0.53", "fe80::1", "1.1.1.1")


LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 524288               files
Max processes             unlimited            unlimited            processes
"""


@pytest.mark.parametrize(
    ("name", "expected"), [("Max open files", 524288), ("Max processes", None), ("Max nothing", None)]
)
def test_limits(name: str, expected: int | None) -> None:
    assert reading.limit_of(LIMITS, name) == expected


def test_states_of_managers() -> None:
    text = "# private\n[device]\nmanaged=true\nnm-owned=0\n"
    assert reading.section_value(text, "managed") == "true"
    assert reading.section_value(text, "nm-managed") is None


@SMALL
@given(st.text())
def test_no_text_makes_them_fail(text: str) -> None:
    for found in (reading.kernel_version(text), reading.bwrap_version(text)):
        assert found is None or all(0 <= part <= 9999 for part in found)
    assert len(reading.pretty_name(text)) <= 128
    assert all(ip_address(address) for address in reading.nameservers(text))
    assert reading.section_value(text, "managed") is None or "managed=" in text.replace(" ", "")
    for found_number in (reading.number(text), reading.limit_of(text, "Max open files")):
        assert found_number is None or isinstance(found_number, int)


@SMALL
@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_limits_are_read_back(soft: int, hard: int) -> None:
    assert reading.limit_of(f"Max open files   {soft}   {hard}   files", "Max open files") == hard


@SMALL
@given(st.lists(st.ip_addresses(), max_size=5))
def test_resolvers_are_read_back(addresses: list[object]) -> None:
    text = "".join(f"nameserver {address}\n" for address in addresses)
    assert reading.nameservers(text) == tuple(map(str, addresses))
