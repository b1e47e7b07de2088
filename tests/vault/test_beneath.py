"""What is opened beneath a source's directory, and what never is."""

# pathlib knows no paths that are bytes
# ruff: noqa: PTH101, PTH104, PTH108, PTH116, PTH123, PTH211
from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from vault_scene import AS_ROOT, USER, Child, Source, in_child, refusal

from egressd.model.errors import Refused
from egressd.vault import beneath, mounts
from egressd.vault.beneath import Bounds, Found, Skipped, Unopened, Why, open_beneath, read_digest, walk

LIMIT = 1 << 20


def why(root: int, path: bytes) -> Why | None:
    """Why it was not opened; None if it was."""
    try:
        os.close(open_beneath(root, path))
    except Unopened as error:
        return error.why
    return None


def walked(root: int, bounds: Bounds | None = None) -> dict[bytes, Why | int]:
    """Each path with its size, or with why it is no document."""
    return {s.path: s.size if isinstance(s, Found) else s.why for s in walk(root, bounds=bounds)}


# ---- what is read


def test_a_file_is_read(source: Source, root: int) -> None:
    source.write("hr/leave.md", b"30 days")
    digest = hashlib.sha256(b"30 days").hexdigest()
    assert read_digest(root, b"hr/leave.md", limit=LIMIT) == (f"sha256:{digest}", 7, b"30 days")


def test_the_head_is_the_first_64_kib(source: Source, root: int) -> None:
    content = os.urandom(3 << 20)
    source.write("big", content)
    found = read_digest(root, b"big", limit=4 << 20)
    assert found.head == content[: 64 << 10]
    assert found.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_up_to_the_limit(source: Source, root: int, size: int) -> None:
    source.write("f", bytes(size))
    assert read_digest(root, b"f", limit=LIMIT).size == size


def test_beyond_the_limit(source: Source, root: int) -> None:
    source.write("f", bytes(LIMIT + 1))
    with pytest.raises(Unopened, match="too big") as refused:
        read_digest(root, b"f", limit=LIMIT)
    assert refused.value.why is Why.BIG


def test_a_sparse_file_of_a_terabyte_is_refused_unread(
    source: Source, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write("sparse", b"")
    os.truncate(source.place("sparse"), 1 << 40)
    monkeypatch.setattr(beneath, "_read", lambda *_: pytest.fail("it was read"))
    assert "1099511627776 bytes of at most" in refusal(lambda: read_digest(root, b"sparse", limit=1 << 30))


@pytest.mark.parametrize(
    "name", [b"line\nfeed", b"\xff\xfe\x80", b"n" * 255, b" ", b"-rf", b"a:b", b"%41", b"\xc3", b"\x1b[2J"]
)  # fmt: skip
def test_any_name_can_be_read_and_is_told_in_ascii(source: Source, root: int, name: bytes) -> None:
    source.write(name, b"x")
    assert walked(root) == {name: 1}
    assert read_digest(root, name, limit=9).size == 1
    os.unlink(source.place(name))
    text = refusal(lambda: read_digest(root, name, limit=9))
    assert text.isascii()
    assert text.isprintable()


# ---- what is not


def test_no_link_is_followed(source: Source, root: int, tmp_path: Path) -> None:
    source.write("dir/file", b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    os.symlink("dir/file", source.place("relative"))
    os.symlink(tmp_path / "secret", source.place("absolute"))
    os.symlink("../secret", source.place("up"))
    os.symlink("dir", source.place("to-directory"))
    os.symlink(source.root, source.place("to-itself"))
    os.symlink("/proc/self/root", source.place("magic"))
    for path in (
        b"relative", b"absolute", b"up", b"to-directory/file", b"to-itself/dir/file",
        b"magic/etc/passwd",
    ):  # fmt: skip
        assert why(root, path) is Why.SYMLINK, path
    assert walked(root) == {
        b"absolute": Why.SYMLINK, b"magic": Why.SYMLINK, b"relative": Why.SYMLINK, b"up": Why.SYMLINK,
        b"to-directory": Why.SYMLINK, b"to-itself": Why.SYMLINK, b"dir/file": 6,
    }  # fmt: skip


def test_no_magic_link_is_followed(tmp_path: Path) -> None:
    """/proc/self/fd/N leads out without being a link that a path resolves."""
    (tmp_path / "secret").write_text("outside")
    with open(tmp_path / "secret") as secret:
        fds = beneath.open_root(b"/proc/self/fd")
        try:
            assert why(fds, b"%d" % secret.fileno()) is Why.SYMLINK
        finally:
            os.close(fds)
    process = beneath.open_root(b"/proc/%d" % os.getpid())
    try:
        assert why(process, b"root/etc/passwd") is Why.SYMLINK
        assert why(process, b"cwd") is Why.SYMLINK
    finally:
        os.close(process)


def test_a_root_that_is_a_link_is_refused(source: Source, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source.root)
    assert "cannot be opened" in refusal(lambda: beneath.open_root(bytes(tmp_path / "link")))


@pytest.mark.parametrize(
    "path",
    [
        b"", b"/", b"/etc/passwd", b"..", b"../secret", b"a/../../secret", b"a/../f", b".", b"./f", b"a//f",
        b"f/", b"f\0",
    ],
)  # fmt: skip
def test_what_is_no_path_below_a_directory(source: Source, root: int, tmp_path: Path, path: bytes) -> None:
    source.write("f")
    source.write("a/f")
    (tmp_path / "secret").write_text("outside")
    assert "is not a path below a directory" in refusal(lambda: open_beneath(root, path))


def test_names_and_paths_too_long(root: int) -> None:
    assert why(root, b"n" * 256) is Why.LONG
    assert why(root, b"/".join([b"n" * 255] * 17)) is Why.LONG


def test_what_is_not_there(source: Source, root: int) -> None:
    source.write("f")
    assert why(root, b"missing") is Why.GONE
    assert why(root, b"f/below-a-file") is Why.GONE


def test_a_directory_is_no_document(source: Source, root: int) -> None:
    source.write("d/f")
    assert why(root, b"d") is Why.SPECIAL


def test_a_fifo_is_not_opened(source: Source, root: int) -> None:
    """With a writer that would be let go by an opening; without one, an opening would wait for ever."""
    os.mkfifo(source.place("fifo"))
    assert why(root, b"fifo") is Why.SPECIAL
    with pytest.raises(OSError, match="No such device or address"):  # ENXIO: nobody reads
        os.open(source.place("fifo"), os.O_WRONLY | os.O_NONBLOCK)
    assert walked(root) == {b"fifo": Why.SPECIAL}


def test_a_socket_is_not_opened(source: Source, root: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(source.place("socket").decode())
        assert why(root, b"socket") is Why.SPECIAL
    assert walked(root) == {b"socket": Why.SPECIAL}


@pytest.mark.skipif(not AS_ROOT, reason="only root makes devices")
def test_a_device_is_not_opened(source: Source, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mknod(source.place("zero"), stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(source.place("disk"), stat.S_IFBLK | 0o666, os.makedev(7, 0))
    monkeypatch.setattr(beneath, "reopened", lambda *_: pytest.fail("it was opened"))
    assert (why(root, b"zero"), why(root, b"disk")) == (Why.SPECIAL, Why.SPECIAL)


def test_what_the_account_may_not_read(source: Source) -> None:
    source.write("closed", b"x")
    source.write("shut/f", b"x")
    source.write("open", b"x")
    os.chmod(source.place("closed"), 0)
    os.chmod(source.place("shut"), 0)

    def look() -> tuple[Why | None, Why | None, Why | None, dict[bytes, Why | int]]:
        root = beneath.open_root(bytes(source.root))
        return why(root, b"closed"), why(root, b"shut/f"), why(root, b"open"), walked(root)

    seen = in_child(look, uid=USER)
    os.chmod(source.place("shut"), 0o700)
    assert seen == (
        Why.UNREADABLE, Why.UNREADABLE, None, {b"closed": 1, b"open": 1, b"shut": Why.UNREADABLE},
    )  # fmt: skip


def test_a_lease_does_not_make_us_wait(source: Source, root: int) -> None:
    """Its holder is asked to give it up, and has 45 seconds (/proc/sys/fs/lease-break-time)."""
    source.write("leased")
    ready, tell = os.pipe()

    def hold() -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        with open(source.place("leased"), "r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(tell, b"x")
            signal.pause()

    child = Child(hold)
    try:
        os.read(ready, 1)
        assert why(root, b"leased") is Why.LEASED
    finally:
        child.kill()
        os.close(ready)
        os.close(tell)
    assert why(root, b"leased") is None


# ---- mounts


def test_no_mount_is_crossed(source: Source) -> None:
    """Of another file system, of the same one, and of a single file."""
    for path in ("tmpfs/f", "bound/f", "other/f", "single", "plain"):
        source.write(path, b"x")

    def look() -> tuple[dict[bytes, Why | int], dict[bytes, Why | None]]:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(source.place("tmpfs").decode(), size=4096, inodes=10)
        Path(source.place("tmpfs").decode(), "f").write_text("other")
        for what, where in (("other", "bound"), ("plain", "single")):
            subprocess.run(["mount", "--bind", source.place(what), source.place(where)], check=True)
        root = beneath.open_root(bytes(source.root))
        return walked(root), {path: why(root, path) for path in (b"tmpfs/f", b"bound/f", b"single", b"plain")}

    assert in_child(look) == (
        {b"bound": Why.MOUNT, b"other/f": 1, b"plain": 1, b"single": Why.MOUNT, b"tmpfs": Why.MOUNT},
        {b"tmpfs/f": Why.MOUNT, b"bound/f": Why.MOUNT, b"single": Why.MOUNT, b"plain": None},
    )


def test_a_source_may_be_a_mount(source: Source) -> None:
    def look() -> dict[bytes, Why | int]:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(str(source.root), size=4096, inodes=10)
        source.write("f", b"xy")
        return walked(beneath.open_root(bytes(source.root)))

    assert in_child(look) == {b"f": 2}


# ---- while it is read


@pytest.mark.parametrize("change", [b"longer than it was", b"short", b"EQUAL LENGTH"])
def test_a_file_that_changes_while_it_is_read(
    source: Source, root: int, monkeypatch: pytest.MonkeyPatch, change: bytes
) -> None:
    source.write("f", b"equal length")
    os.utime(source.place("f"), ns=(0, 0))
    read = os.read

    def meanwhile(number: int, most: int) -> bytes:
        data = read(number, most)
        monkeypatch.undo()
        source.write("f", change)
        return data

    monkeypatch.setattr(os, "read", meanwhile)
    with pytest.raises(Unopened) as refused:
        read_digest(root, b"f", limit=LIMIT)
    assert refused.value.why is Why.CHANGED


def swap_for_link(source: Source, outside: Path) -> None:
    """A directory of the source and a link to one outside take turns."""
    here, aside = source.place("dir"), source.place("aside")
    while True:
        os.rename(here, aside)
        os.symlink(outside, here)
        os.unlink(here)
        os.rename(aside, here)


def test_a_directory_that_turns_into_a_link_and_back(source: Source, root: int, tmp_path: Path) -> None:
    """Whatever the moment: what is inside, or nothing."""
    source.write("dir/file", b"inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"secret")
    swapping = Child(lambda: swap_for_link(source, tmp_path / "outside"))
    try:
        seen = {attempt(lambda: read_digest(root, b"dir/file", limit=9).head) for _ in range(3000)}
        listed = {b"/file" in path for _ in range(300) for path in walked(root) if path.startswith(b"dir/")}
    finally:
        swapping.kill()
    assert seen <= {b"inside", Why.SYMLINK, Why.GONE}, seen
    assert listed <= {True}


def attempt(does: Callable[[], bytes]) -> bytes | Why:
    try:
        return does()
    except Unopened as error:
        return error.why


# ---- kernels and containers that lack something


def test_without_openat2_nothing_is_opened(
    source: Source, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write("f")

    def absent(*_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(beneath, "_syscall", absent)
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("it was opened another way"))
    for does in (lambda: open_beneath(root, b"f"), lambda: list(walk(root))):
        assert "use Linux 5.6 or newer" in refusal(does)


def test_without_proc_nothing_is_opened(source: Source) -> None:
    source.write("f")

    def look() -> str:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs("/proc", size=4096, inodes=10)
        return refusal(lambda: open_beneath(beneath.open_root(bytes(source.root)), b"f"))

    assert "mount a procfs on /proc" in in_child(look)


# ---- walking


def test_a_walk_is_sorted_and_tells_size_time_and_links(source: Source, root: int) -> None:
    source.write("b", b"12")
    source.write("a/z", b"1")
    source.write("a/b/c", b"")
    source.write("c", b"123")
    os.utime(source.place("b"), ns=(1, 1_700_000_000_000_000_001))
    os.link(source.place("c"), source.place("a/other-name"))
    found = list(walk(root))
    assert [f.path for f in found] == [b"b", b"c", b"a/other-name", b"a/z", b"a/b/c"]
    assert found[0] == Found(b"b", 2, 1_700_000_000_000_000_001, 1)
    assert [f.links for f in found if isinstance(f, Found)] == [1, 2, 2, 1, 1]


def test_an_empty_source(root: int) -> None:
    assert list(walk(root)) == []


@pytest.mark.parametrize(("count", "seen"), [(0, 0), (3, 3), (4, 3), (5, 4), (6, 5)])
def test_too_many(source: Source, root: int, count: int, seen: int) -> None:
    """A directory counts as well. Which ones are beyond the bound is as the directory has them."""
    for path in ("a", "b", "c", "d/e", "d/f"):
        source.write(path, b"x")
    found = list(walk(root, bounds=Bounds(files=count)))
    assert sum(isinstance(one, Found) for one in found) == seen
    assert [one.why for one in found if isinstance(one, Skipped)] == [Why.MANY] * (count < 6)
    assert isinstance(found[-1], Found if count == 6 else Skipped)


def test_too_deep(source: Source, root: int) -> None:
    source.write("1/2/3", b"x")
    assert walked(root, Bounds(depth=3)) == {b"1/2/3": 1}
    assert walked(root, Bounds(depth=2)) == {b"1/2": Why.DEEP}
    assert walked(root, Bounds(depth=1)) == {b"1": Why.DEEP}


def test_too_long(source: Source, root: int) -> None:
    source.write("abc/d", b"x")
    source.write("abcdef", b"x")
    assert walked(root, Bounds(path=5)) == {b"abc/d": 1, b"abcdef": Why.LONG}
    assert walked(root, Bounds(path=4)) == {b"abc/d": Why.LONG, b"abcdef": Why.LONG}


def test_a_directory_removed_meanwhile(source: Source, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write("a/f")
    source.write("b")
    names = beneath._names

    def meanwhile(root: int, path: bytes, *, most: int) -> list[tuple[bytes, bool]]:
        found = names(root, path, most=most)
        if not path:
            os.rename(source.place("a"), f"{source.root}-elsewhere")
        return found

    monkeypatch.setattr(beneath, "_names", meanwhile)
    assert list(walk(root)) == [
        Found(b"b", 7, os.stat(source.place("b")).st_mtime_ns, 1),
        Skipped(b"a", Why.GONE),
    ]


def test_refusals_are_refused(root: int) -> None:
    with pytest.raises(Refused):
        open_beneath(root, b"nothing")
