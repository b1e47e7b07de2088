"""Where copies lie: seen by nobody else, gone afterwards, also when their process is killed at any step."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vault_scene import AS_ROOT, USER, Child, Killed, Source, everything, in_child, mounts_at, refusal

from egressd.model.errors import KernelError, Refused
from egressd.vault import fscrypt, janitor, mounts, projection, removal, scratch
from egressd.vault.projection import project
from egressd.vault.scratch import DirectoryScratch, PrivateScratch, swap_warnings

ID, OTHER = "r-" + "a" * 26, "r-" + "b" * 26
SIZE, INODES = 1 << 20, 100


@pytest.fixture
def at(source: Source, tmp_path: Path) -> Path:
    (tmp_path / "at").mkdir()
    return tmp_path / "at"


@pytest.fixture
def disk(source: Source, tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir(mode=0o700)
    return tmp_path / "disk"


def private(at: Path) -> PrivateScratch:
    return PrivateScratch(size=SIZE, inodes=INODES, at=at)


# ---- private


@pytest.mark.parametrize("uid", [None, USER], ids=["as root", "as an ordinary account"])
def test_a_private_scratch(source: Source, at: Path, uid: int | None) -> None:
    copy = source.write("f", b"content")

    def does() -> dict[str, Any]:
        mine = private(at)
        with mine as path:
            project([copy], str(path))
            mine.seal()
            seen = {
                "what": everything(path)[b"hand/f"].content,
                "write": why_not((path / "new").touch),
                "chmod": why_not(lambda: path.chmod(0o700)),
                "outside": outside(at),
                "looked": mine.looked,
            }
        return seen | {"after": mine.looked, "trouble": mine.trouble, "left": list(at.iterdir())}

    rofs = errno.errorcode[errno.EROFS]
    assert in_child(does, uid=uid) == {
        "what": b"content", "write": rofs, "chmod": rofs, "outside": "", "looked": False, "after": True,
        "trouble": (), "left": [],
    }  # fmt: skip
    assert mounts_at(at) == []


def outside(at: Path) -> str:
    """What a process finds there that is in the first process's namespaces: root, where there is one."""
    shown = subprocess.run(
        ["ls", "-A", f"/proc/{os.getppid()}/root{at}"], capture_output=True, text=True, check=False
    )
    return shown.stdout


def why_not(does: Callable[[], object]) -> str:
    try:
        does()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def test_its_mount(at: Path) -> None:
    def does() -> str:
        with private(at):
            lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return next(line for line in lines if f" {at} " in line)

    fields = in_child(does).split()
    assert {"nosuid", "nodev", "noexec"} <= set(fields[5].split(","))
    assert not any(field.startswith(("shared:", "master:")) for field in fields[6:-3])
    assert {"size=1024k", "nr_inodes=100", "mode=700"} <= set(fields[-1].split(","))


def test_a_mount_never_gets_out(at: Path) -> None:
    """Not even where the machine's own mounts are shared, as systemd has them."""

    def does() -> list[str]:
        if mounts._libc.unshare(0x20000) or mounts._mount("none", "/", "none", 0x4000 | 1 << 20, ""):
            raise OSError("no mount namespace with shared mounts")
        ready, tell = os.pipe()
        goes, stays = os.pipe()

        def inner() -> None:
            with private(at) as path:
                (path / "f").touch()
                os.write(tell, b"x")
                os.read(goes, 1)

        child = Child(inner)
        os.read(ready, 1)
        seen = os.listdir(at)  # noqa: PTH208
        os.write(stays, b"x")
        child.end()
        return seen

    if not AS_ROOT:
        pytest.skip("only root can share mounts")
    assert in_child(does) == []


def test_nothing_is_won_but_what_was_had(at: Path, source: Source) -> None:
    """In a user namespace of its own the process has every capability: over nothing that was there before."""
    source.write("secret")
    source.root.chmod(0)

    def does() -> tuple[str, str]:
        with private(at):
            return why_not(lambda: list(source.root.iterdir())), why_not(lambda: os.chown(at, 0, 0))

    seen = in_child(does, uid=USER)
    source.root.chmod(0o700)
    assert seen == ("EACCES", "EINVAL")  # of users, only its own exists there


def test_a_file_held_open_is_found_out(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_PATIENCE", 0.01)

    def does() -> tuple[bool, tuple[str, ...]]:
        mine = private(at)
        with mine as path:
            (path / "f").write_text("x")
            held = (path / "f").open()
            mine.seal()
        held.close()
        return mine.looked, mine.trouble

    looked, trouble = in_child(does)
    assert not looked
    assert trouble[0] == "some process still holds files of it"


def test_who_lets_go_late_is_waited_for(at: Path) -> None:
    """The last process of a sandbox may still be ending."""

    def does() -> bool:
        mine = private(at)
        with mine as path:
            (path / "f").write_text("x")
            held = (path / "f").open()
            goes, stays = os.pipe()
            child = Child(lambda: os.read(goes, 1))
            held.close()
            free = scratch._free

            def letting_go(directory: int) -> bool:
                os.write(stays, b"x")
                return free(directory)

            scratch._free = letting_go
        child.end()
        return mine.looked

    assert in_child(does)


def test_destroyed_on_the_way_out_of_an_error(at: Path) -> None:
    def does() -> tuple[bool, list[Path]]:
        mine = private(at)
        with pytest.raises(ZeroDivisionError), mine as path:
            (path / "f").write_text("x")
            raise ZeroDivisionError
        return mine.looked, list(at.iterdir())

    assert in_child(does) == (True, [])


def test_not_sealed_while_somebody_writes(at: Path) -> None:
    def does() -> str:
        mine = private(at)
        with mine as path, (path / "f").open("w"):
            try:
                mine.seal()
            except KernelError as error:
                return str(error)
        return ""

    assert "cannot be made read-only: Device or resource busy" in in_child(does)


# ---- refused


def test_a_process_with_threads(at: Path) -> None:
    def does() -> str:
        ends = threading.Event()
        threading.Thread(target=ends.wait, daemon=True).start()
        text = refusal(lambda: private(at).__enter__())
        ends.set()
        return text

    assert "this process has threads" in in_child(does)


def test_no_user_namespaces_here(at: Path) -> None:
    """As on a machine where they are switched off. The switch is each user namespace's own."""

    def does() -> str:
        mounts.enter_private_namespace()
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        return refusal(lambda: private(at).__enter__())

    text = in_child(does)
    assert "user.max_user_namespaces is 0: sysctl -w user.max_user_namespaces=15000" in text
    assert "does not run requests without it" in text


def test_no_mount_namespaces_here(at: Path) -> None:
    def does() -> str:
        mounts.enter_private_namespace()
        Path("/proc/sys/user/max_mnt_namespaces").write_text("0")
        return refusal(lambda: private(at).__enter__())

    assert "user.max_mnt_namespaces is 0" in in_child(does)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "give egressd-broker an AppArmor profile"),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
        ("kernel/unprivileged_userns_clone", "1", "a seccomp filter (systemd's RestrictNamespaces="),
        ("kernel/apparmor_restrict_unprivileged_userns", "0", "a seccomp filter"),
    ],
)
def test_which_switch_it_is(tmp_path: Path, name: str, value: str, text: str) -> None:
    switch = tmp_path / "sys" / name
    switch.parent.mkdir(parents=True)
    switch.write_text(value + "\n")
    assert text in str(mounts.why_refused(errno.EPERM, "no", proc=str(tmp_path)))


@pytest.mark.parametrize(
    ("code", "text"),
    [(errno.ENOSPC, "is reached"), (errno.EINVAL, "CONFIG_USER_NS"), (errno.EPERM, "a security module")],
)
def test_which_errno_it_is(tmp_path: Path, code: int, text: str) -> None:
    assert text in str(mounts.why_refused(code, "no", proc=str(tmp_path)))


def test_on_nothing_that_is_no_directory(at: Path) -> None:
    (at / "file").touch()
    assert "is not a directory" in refusal(lambda: private(at / "file").__enter__())


# ---- on a disk


def test_a_directory_scratch(source: Source, disk: Path) -> None:
    copy = source.write("d/f", b"content")
    mine = DirectoryScratch(disk, ID)
    with mine as path:
        project([copy], str(path))
        mine.seal()
        assert everything(path)[b"hand/d/f"].content == b"content"
        assert path == disk / ID / "work"
        assert stat.S_IMODE((disk / ID).stat().st_mode) == 0o700
        assert not mine.looked
    assert (mine.looked, mine.trouble) == (True, ())
    assert list(disk.iterdir()) == []


def test_as_an_ordinary_account(source: Source, disk: Path) -> None:
    """Copies lie in directories that their owner cannot write to."""
    copy = source.write("d/f")
    if AS_ROOT:
        os.chown(disk, USER, USER)

    def does() -> bool:
        mine = DirectoryScratch(disk, ID)
        with mine as path:
            project([copy], str(path))
        return mine.looked

    assert in_child(does, uid=USER)
    assert list(disk.iterdir()) == []


def test_what_somebody_still_has_open_is_blank(disk: Path) -> None:
    """Nobody can be made to close it; what was in it is gone from the disk all the same."""
    with DirectoryScratch(disk, ID) as path:
        (path / "docs").mkdir()
        (path / "docs" / "a").write_text("secret")
        (path / "docs" / "a").chmod(0o444)
        held = os.open(path / "docs" / "a", os.O_RDONLY)
    assert os.pread(held, 100, 0) == b"" and os.fstat(held).st_nlink == 0
    os.close(held)


def test_removal_follows_nothing(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    with DirectoryScratch(disk, ID) as path:
        (path / "link").symlink_to(tmp_path / "kept")
        (path / "file").symlink_to(tmp_path / "kept" / "file")
        os.link(tmp_path / "kept" / "file", path / "hard")
        os.mkfifo(path / "fifo")
        (path / "closed").mkdir(mode=0)
        (path / b"\xff\n".decode(errors="surrogateescape")).mkdir()
    assert list(disk.iterdir()) == []
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_a_directory_that_turns_into_a_link_while_it_is_removed(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    mine = DirectoryScratch(disk, ID)
    with mine as path:
        (path / "d").mkdir()
        (path / "d" / "f").touch()
        real = removal.open_own

        def swapped(name: str, *, above: int) -> int:
            if name == "d":
                (path / "d").rename(path / "e")
                (path / "d").symlink_to(tmp_path / "kept")
            return real(name, above=above)

        monkeypatch.setattr(removal, "open_own", swapped)
    monkeypatch.undo()
    assert mine.looked, "a second look removes what the first could not"
    assert (tmp_path / "kept" / "file").read_text() == "kept"
    assert list(disk.iterdir()) == []


def test_what_cannot_be_removed_is_told_and_left_to_the_janitor(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def unlink(name: str, **more: int) -> None:
        if name == "stuck":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(name, **more)

    mine = DirectoryScratch(disk, ID)
    with mine as path:
        (path / "stuck").touch()
        (path / "other").touch()
        monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.undo()
    assert not mine.looked
    assert mine.trouble[0] == "'stuck' cannot be removed: Input/output error"
    assert mine.trouble[-1] == f"{ID} is still there"
    assert [name for name in everything(disk) if b"other" in name] == []
    assert janitor.sweep(disk).names == (ID,)


def test_an_account_that_was_changed_on_the_way(at: Path) -> None:
    """Then the process is not dumpable (prctl(2)), and what is in its /proc/self is root's."""
    if not AS_ROOT:
        pytest.skip("only root can change its account")

    def does() -> str:
        os.setgid(USER)
        os.setuid(USER)
        return refusal(lambda: private(at).__enter__())

    assert "start it as its user" in in_child(does)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777, 0o722])
def test_not_where_others_can_write(disk: Path, mode: int) -> None:
    disk.chmod(mode)
    for does in (lambda: DirectoryScratch(disk, ID).__enter__(), lambda: janitor.sweep(disk)):
        assert "is not safe as a scratch" in refusal(does)
    assert list(disk.iterdir()) == []


@pytest.mark.skipif(not AS_ROOT, reason="only root gives directories away")
def test_not_where_it_belongs_to_somebody_else(disk: Path) -> None:
    os.chown(disk, USER, USER)
    assert f"it must belong to user {os.geteuid()}" in refusal(lambda: DirectoryScratch(disk, ID).__enter__())


def test_not_where_there_is_nothing(disk: Path) -> None:
    assert "No such file" in refusal(lambda: DirectoryScratch(disk / "missing", ID).__enter__())
    (disk / "link").symlink_to("/tmp")
    assert refusal(lambda: DirectoryScratch(disk / "link", ID).__enter__())


@pytest.mark.parametrize(
    "name", ["", "r-", "..", "r-" + "a" * 25, "r-" + "A" * 26, f"x/{ID}", f"{ID}\n", "../" + ID]
)
def test_not_by_another_name(disk: Path, name: str) -> None:
    assert "is not a request's name" in refusal(lambda: DirectoryScratch(disk, name))


def test_one_request_one_directory(disk: Path) -> None:
    with DirectoryScratch(disk, ID) as path:
        (path / "f").touch()
        assert "File exists" in refusal(lambda: DirectoryScratch(disk, ID).__enter__())
        assert (path / "f").exists()


@pytest.mark.parametrize("full", ["inodes", "bytes"])
def test_a_full_disk(source: Source, disk: Path, full: str) -> None:
    copy = source.write("f", bytes(1 << 17))

    def does() -> tuple[str, str, list[Path]]:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(str(disk), size=1 << 16, inodes=2 if full == "inodes" else 50)
        mine = DirectoryScratch(disk, ID)
        entering = copying = ""
        try:
            with mine as path:
                copying = refusal(lambda: project([copy], str(path)))
            assert mine.looked
        except Refused as error:
            entering = str(error)
        return entering, copying, list(disk.iterdir())

    entering, copying, left = in_child(does)
    if full == "inodes":
        assert (entering, copying) == (f"{disk} is full: make room, or give requests another scratch", "")
    else:
        assert (entering, copying) == ("", "the scratch is full (No space left on device): give it more room")
    assert left == []


def test_a_file_system_without_locks(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert "cannot be used as a scratch: Bad file" in refusal(lambda: DirectoryScratch(disk, ID).__enter__())
    assert list(disk.iterdir()) == []


# ---- killed at every step

Step = tuple[Any, str, int]  # where, which function, at which call
PROJECTING: list[Step] = [
    (projection, "_fill", 1), (projection, "look", 2), (projection, "_write", 2),
    (projection, "_describe", 1), (projection, "_settle", 1),
]  # fmt: skip
PRIVATE: list[Step] = [
    (mounts, "enter_private_namespace", 1), (mounts, "mount_tmpfs", 1), *PROJECTING, (mounts, "remount", 1),
    (mounts, "remount", 2), (removal, "empty", 1), (removal, "_gone", 2), (scratch, "_free", 1),
    (mounts, "detach", 1),
]  # fmt: skip
ON_DISK: list[Step] = [
    (scratch, "open_scratch", 1), (scratch, "hold", 1), *PROJECTING, (scratch, "discard", 1),
    (fscrypt, "identifier_of", 1), (removal, "empty", 1), (removal, "_gone", 2), (removal, "remove_empty", 1),
]  # fmt: skip


def killed_at(step: Step, when: str, does: Callable[[], object]) -> None:
    """`does`, in a child that kills itself at that step; it must come to it."""

    def doomed() -> None:
        place, name, number = step
        real, calls = getattr(place, name), [0]

        def deadly(*words: Any, **more: Any) -> Any:
            calls[0] += 1
            own = calls[0]  # some call themselves
            if own == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*words, **more)
            if own == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(place, name, deadly)
        does()

    with pytest.raises(Killed, match="-9"):
        in_child(doomed)


def named(step: Step) -> str:
    return f"{step[0].__name__.rpartition('.')[2]}.{step[1]}.{step[2]}"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", PRIVATE, ids=named)
def test_a_killed_private_scratch_leaves_nothing(source: Source, at: Path, step: Step, when: str) -> None:
    copies = [source.write("d/f", b"x" * 5000), source.write("g")]

    def does() -> None:
        mine = private(at)
        with mine as path:
            project(copies, str(path))
            mine.seal()

    killed_at(step, when, does)
    assert list(at.iterdir()) == []
    assert mounts_at(at) == []
    at.rmdir()  # EBUSY, where something is mounted in any view


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ON_DISK, ids=named)
def test_what_a_killed_directory_scratch_leaves_is_swept(
    source: Source, disk: Path, step: Step, when: str
) -> None:
    copies = [source.write("d/f", b"x" * 5000), source.write("g")]

    def does() -> None:
        with DirectoryScratch(disk, ID) as path:
            project(copies, str(path))

    killed_at(step, when, does)
    left = [path.name for path in disk.iterdir()]
    found = janitor.sweep(disk)
    assert (found.names, found.count, found.problems) == (tuple(left), len(left), ())
    assert list(disk.iterdir()) == []
    gone = step[1] == "open_scratch" or (
        when == "after" and step[1:] in (("discard", 1), ("remove_empty", 1))
    )
    assert left == ([] if gone else [ID])


# ---- swap


def fake_proc(directory: Path, *, swaps: str = "", group: str = "") -> str:
    (directory / "self").mkdir(parents=True)
    (directory / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n" + swaps)
    (directory / "self" / "cgroup").write_text(group)
    return str(directory)


def test_no_swap_no_warning(tmp_path: Path) -> None:
    assert swap_warnings(proc=fake_proc(tmp_path / "proc")) == ()
    assert swap_warnings(proc=str(tmp_path / "none")) == ()


def test_swap_is_told(tmp_path: Path) -> None:
    swaps = "/dev/dm-1 partition 8388604 0 -2\n/swapfile file 1024 0 -3\n"
    (warning,) = swap_warnings(proc=fake_proc(tmp_path / "proc", swaps=swaps), cgroups=str(tmp_path))
    assert "swap is on (/dev/dm-1, /swapfile)" in warning
    assert "MemorySwapMax=0" in warning


def test_compressed_memory_is_no_disk(tmp_path: Path) -> None:
    assert swap_warnings(proc=fake_proc(tmp_path / "proc", swaps="/dev/zram0 partition 1 0 100\n")) == ()


@pytest.mark.parametrize(
    ("where", "limit", "warned"),
    [("system.slice/egressd-broker.service", "0", False), ("system.slice", "0", False), ("", "0", False),
     ("system.slice/egressd-broker.service", "max", True), ("system.slice/other.service", "0", True)],
)  # fmt: skip
def test_a_group_that_may_not_swap(tmp_path: Path, where: str, limit: str, warned: bool) -> None:
    proc = fake_proc(
        tmp_path / "proc", swaps="/dev/sda2 partition 1 0 -2\n",
        group="1:name=systemd:/x\n0::/system.slice/egressd-broker.service\n",
    )  # fmt: skip
    (tmp_path / "cgroups" / where).mkdir(parents=True)
    (tmp_path / "cgroups" / where / "memory.swap.max").write_text(limit + "\n")
    assert bool(swap_warnings(proc=proc, cgroups=str(tmp_path / "cgroups"))) is warned


def test_the_kernel_fact_behind_it(at: Path) -> None:
    """noswap is refused to a tmpfs in a user namespace. The day it is not, the warning can go."""

    def does() -> int:
        mounts.enter_private_namespace()
        return mounts._mount("egressd", str(at), "tmpfs", 0, "size=4096,noswap")

    assert in_child(does) == -1
