"""A container cannot change the machine that it runs on, and if it did, that would be seen."""

from __future__ import annotations

import pytest
from container import Container
from witness import changes, witness

pytestmark = pytest.mark.system

FORWARDING = "sysctl net/ipv4/conf/eth0/forwarding"
BEFORE = {
    "sysctl fs/protected_fifos": "0",
    FORWARDING: "0",
    "mount /proc": "/ rw",
    "group /sys/fs/cgroup of ours": "",
}


@pytest.mark.parametrize(
    ("after", "seen"),
    [
        ({}, []),
        ({"sysctl fs/protected_fifos": "1"}, ["sysctl fs/protected_fifos: '0' became '1'"]),
        ({FORWARDING: "1"}, [f"{FORWARDING}: '0' became '1'"]),
        ({FORWARDING: None}, []),
        ({"sysctl fs/protected_fifos": None}, ["sysctl fs/protected_fifos: '0' became 'nothing'"]),
        ({"sysctl net/netfilter/nf_conntrack_max": "1"}, []),
        ({"mount /proc": None}, ["mount /proc: '/ rw' became 'nothing'"]),
        ({"mount /mnt": "/ rw"}, ["mount /mnt: 'nothing' became '/ rw'"]),
        ({"group /sys/fs/cgroup of ours": "egressd"}, ["group /sys/fs/cgroup of ours: '' became 'egressd'"]),
    ],
)  # fmt: skip
def test_what_became_different_is_told(after: dict[str, str | None], seen: list[str]) -> None:
    merged = BEFORE | after
    assert changes(BEFORE, {name: text for name, text in merged.items() if text is not None}) == seen


def test_it_looks_at_what_no_namespace_covers() -> None:
    found = witness()
    assert {"sysctl fs/protected_fifos", "sysctl kernel/core_pattern", "mount /proc"} <= found.keys()
    assert any(name.startswith("group ") for name in found)


@pytest.mark.parametrize("name", ["fs/protected_fifos", "kernel/core_pattern", "vm/swappiness"])
def test_the_machines_settings_cannot_be_written_in_there(debian: Container, name: str) -> None:
    """What it writes is what is there, should it succeed."""
    file = f"/proc/sys/{name}"
    refused = debian.run(["bash", "-c", f'value=$(cat {file}); echo "$value" > {file}'])
    assert refused.err.endswith("Read-only file system\n")


def test_its_own_networks_settings_can_be(debian: Container) -> None:
    debian.shell("sysctl -qw net.ipv4.conf.up0.forwarding=1")
    assert debian.shell("sysctl -n net.ipv4.conf.up0.forwarding") == "1\n"
    debian.shell("sysctl -qw net.ipv4.conf.up0.forwarding=0")


@pytest.mark.parametrize(
    "file", ["/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/power/state"]
)
def test_nor_can_what_works_on_all_of_it(debian: Container, file: str) -> None:
    assert debian.run(["bash", "-c", f"test -e {file} && : >> {file}"]).status != 0


def test_it_has_no_right_to_load_modules_or_set_the_clock(debian: Container) -> None:
    bounding = int(debian.shell("grep CapBnd /proc/1/status").split()[1], 16)
    sys_module, sys_rawio, sys_time, sys_admin = 16, 17, 25, 21  # linux/capability.h
    assert [bounding >> number & 1 for number in (sys_module, sys_rawio, sys_time, sys_admin)] == [0, 0, 0, 1]
