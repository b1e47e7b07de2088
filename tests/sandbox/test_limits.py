"""Which cgroup, if any: decided on a drawn tree. That rlimits hold is seen in test_broker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox import limits
from egressd.sandbox.limits import Group, Wanted, bound, own_group

MEMORY = Wanted(memory=1 << 20)
BOTH = Wanted(memory=1 << 20, processes=9)
MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def draw(root: Path, *, own: str = "/user/main", enabled: str = "memory pids", at: str = "user") -> Path:
    """A machine whose group `at` has `enabled` controllers for its children."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
    (root / "proc/self/mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda rw\n" + MOUNT)
    tree = root / "sys/fs/cgroup"
    group = tree / own.lstrip("/")
    group.mkdir(parents=True)
    for place in (group, *group.parents):
        if place == tree.parent:
            break
        (place / "cgroup.subtree_control").write_text(enabled if place == tree / at else "")
        (place / "cgroup.controllers").write_text("memory pids cpu\n")
        (place / "cgroup.procs").write_text("1\n2\n")
    return tree


@pytest.fixture(autouse=True)
def _files_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new directory of a real cgroup2 has its files at once; rmdir takes them along."""
    mkdir, rmdir = os.mkdir, os.rmdir

    def made(path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        for name in ("cgroup.procs", "memory.max", "pids.max", "cgroup.kill"):
            (Path(path) / name).write_text("")

    def removed(path: str) -> None:
        for file in Path(path).iterdir():
            file.unlink()
        rmdir(path)

    monkeypatch.setattr(limits.os, "mkdir", made)
    monkeypatch.setattr(limits.os, "rmdir", removed)


def test_a_sibling_under_a_delegated_parent(tmp_path: Path) -> None:
    tree = draw(tmp_path)
    with Group.make(BOTH, root=str(tmp_path)) or pytest.fail("no group") as group:
        made = Path(group.path)
        assert made.parent == tree / "user"
        assert (made / "memory.max").read_text() == "1048576\n"
        assert (made / "pids.max").read_text() == "9\n"
        group.adopt(4321)
        assert (made / "cgroup.procs").read_text() == "4321\n"
    assert not made.exists()


def test_a_scope_of_our_own_is_stepped_down_from(tmp_path: Path) -> None:
    """systemd-run --scope -p Delegate=yes: only this process in it, nothing enabled yet."""
    tree = draw(tmp_path, own="/scope", at="nowhere")
    (tree / "scope/cgroup.procs").write_text(f"{os.getpid()}\n")
    (tree / "scope/broker").mkdir()
    (tree / "scope/broker/cgroup.procs").write_text("")
    with pytest.raises(StopIteration):  # nothing made yet
        next((tree / "scope").glob("egressd-*"))
    Group.make(BOTH, root=str(tmp_path))
    assert (tree / "scope/cgroup.subtree_control").read_text() == "+memory +pids\n"
    assert (tree / "scope/broker/cgroup.procs").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("enabled", ["", "pids", "cpu io"])
def test_without_the_controllers_there_is_no_group(tmp_path: Path, enabled: str) -> None:
    draw(tmp_path, enabled=enabled)
    assert Group.make(BOTH, root=str(tmp_path)) is None


def test_a_group_with_others_in_it_is_left_alone(tmp_path: Path) -> None:
    tree = draw(tmp_path, own="/scope", at="nowhere")
    assert Group.make(MEMORY, root=str(tmp_path)) is None
    assert (tree / "scope/cgroup.subtree_control").read_text() == ""


def test_where_there_is_no_cgroup2_rlimits_do_it_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits.os, "getuid", lambda: 4001)
    assert own_group(root=str(tmp_path)) is None
    found = bound(BOTH, root=str(tmp_path))
    assert (found.group, found.rlimits.memory, found.rlimits.processes) == (None, 1 << 20, 9)
    assert "rlimits (memory per process)" in found.text


def test_no_rlimit_holds_roots_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "getuid", lambda: 0)
    assert bound(MEMORY, root=str(tmp_path)).rlimits.memory == 1 << 20
    with pytest.raises(Refused) as caught:
        bound(BOTH, root=str(tmp_path))
    assert caught.value.reason is Reason.LIMIT


def test_no_limit_needs_nothing(tmp_path: Path) -> None:
    draw(tmp_path)
    assert bound(Wanted(), root=str(tmp_path)).text == "no limits"
    assert not list((tmp_path / "sys/fs/cgroup/user").glob("egressd-*"))


def test_the_mount_point_may_have_spaces() -> None:
    assert limits._mount_point("1 0 0:1 / /a\\040b rw - cgroup2 x rw\n") == "/a b"


def test_time_and_file_size_are_always_rlimits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "getuid", lambda: 4001)
    wanted = Wanted(cpu=2.5, file_size=9)
    found = bound(wanted, root=str(tmp_path))
    assert (found.group, found.rlimits) == (None, limits.plan.Limits(cpu=2.5, file_size=9))
    draw(tmp_path)
    found = bound(Wanted(memory=1 << 20, cpu=2.5, file_size=9), root=str(tmp_path))
    assert found.group is not None, "and memory is the group's"
    assert found.rlimits == limits.plan.Limits(cpu=2.5, file_size=9)


def test_a_service_steps_down_once_for_all_that_it_will_fork(tmp_path: Path) -> None:
    tree = draw(tmp_path, own="/service", at="nowhere")
    assert not limits.step_down(root=str(tmp_path)), "others are in it"
    (tree / "service/cgroup.procs").write_text(f"{os.getpid()}\n")
    (tree / "service/broker").mkdir()
    assert limits.step_down(root=str(tmp_path))
    assert (tree / "service/broker/cgroup.procs").read_text() == f"{os.getpid()}\n"
    (tree / "service/cgroup.subtree_control").write_text("memory pids")
    (tmp_path / "proc/self/cgroup").write_text("0::/service/broker\n")
    with Group.make(BOTH, root=str(tmp_path)) or pytest.fail("no group") as group:
        assert Path(group.path).parent == tree / "service", "beside it"
    assert not limits.step_down(root=str(tmp_path / "nowhere"))


def test_a_group_for_time_alone_needs_no_controller(tmp_path: Path) -> None:
    draw(tmp_path, enabled="")
    found = bound(Wanted(cpu=2), root=str(tmp_path))
    assert found.group is not None
    made = Path(found.group.path)
    (made / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n")
    assert found.group.cpu_seconds() == 1.5
    assert bound(Wanted(file_size=2), root=str(tmp_path)).group is None, "what no group bounds needs none"


@pytest.mark.parametrize(
    ("memory", "pids", "reached"),
    [
        ("oom 0\noom_kill 0\n", "max 0\n", set()),
        ("oom 3\noom_kill 1\n", "max 0\n", {"memory"}),
        ("oom 3\noom_kill 0\n", "max 7\n", {"processes"}),
        ("oom_kill 2\n", "max 1\n", {"memory", "processes"}),
    ],
)
def test_what_the_kernel_has_stopped(tmp_path: Path, memory: str, pids: str, reached: set[str]) -> None:
    group = Group(str(tmp_path))
    (tmp_path / "memory.events").write_text(memory)
    (tmp_path / "pids.events").write_text(pids)
    assert group.reached() == reached
    (tmp_path / "memory.events").unlink()
    (tmp_path / "pids.events").unlink()
    assert group.reached() == set(), "it has neither controller"


@pytest.mark.parametrize("text", [None, "", "usage_usec\n", "usage_usec many\n", "user_usec 5\n"])
def test_time_that_cannot_be_read_is_not_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cpu.stat").write_text(text)
    with pytest.raises(Refused, match=r"usage_usec of .*/cpu\.stat cannot be read") as caught:
        Group(str(tmp_path)).cpu_seconds()
    assert caught.value.reason is Reason.LIMIT


def test_what_was_stopped_and_cannot_be_read_is_not_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\n")
    with pytest.raises(Refused, match=r"oom_kill of .*/memory\.events cannot be read: it is not there"):
        Group(str(tmp_path)).reached()
