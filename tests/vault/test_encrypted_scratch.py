"""A scratch on disk that is encrypted, on a file system made for it, which no other process sees."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from vault_scene import AS_ROOT, USER, Killed, Source, everything, in_child, refusal

from egressd.vault import fscrypt, janitor, mounts, scratch
from egressd.vault.projection import project
from egressd.vault.scratch import DirectoryScratch

T = TypeVar("T")
ID = "r-" + "e" * 26
MARK = b"no word of this is to be found on the disk; " * 500


def missing() -> str:
    """What this machine lacks for it."""
    if not AS_ROOT:
        return "root, for loop devices"
    if not shutil.which("mkfs.ext4"):
        return "mkfs.ext4"
    if not Path("/dev/loop-control").exists():
        return "loop devices"
    if not Path("/sys/fs/ext4/features/encryption").exists():
        return "a kernel with CONFIG_FS_ENCRYPTION"
    return ""


needs_encryption = pytest.mark.skipif(bool(missing()), reason=f"no {missing()} here")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make(tmp_path, "encrypt")


def make(directory: Path, features: str) -> Path:
    with (directory / "image").open("wb") as made:
        made.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", features, directory / "image"], check=True)
    (directory / "at").mkdir()
    return directory / "image"


def on(image: Path, does: Callable[[Path], T]) -> T:
    """What `does` returns, as an ordinary account, with the image mounted where nobody else sees it."""
    at = image.parent / "at"

    def mounted() -> T:
        if mounts._libc.unshare(0x20000) or mounts._mount("none", "/", "none", 0x44000, ""):
            raise OSError("no mount namespace")
        subprocess.run(["mount", "-o", "loop", image, at], check=True)
        try:
            (at / "lost+found").rmdir()
            (at / "scratch").mkdir(mode=0o700)
            os.chown(at / "scratch", USER, USER)
            return in_child(lambda: does(at / "scratch"), uid=USER)
        finally:
            subprocess.run(["umount", at], check=True)

    return in_child(mounted)


@needs_encryption
def test_only_ciphertext_reaches_the_disk(image: Path) -> None:
    (image.parent / "vault").mkdir()
    copy = Source(image.parent / "vault").write("very-secret-name", MARK)

    def does(disk: Path) -> tuple[bool, tuple[str, ...], list[Path]]:
        mine = DirectoryScratch(disk, ID, encrypted=True)
        with mine as path:
            project([copy], str(path))
            os.sync()
            assert everything(path)[b"hand/very-secret-name"].content == MARK
        return mine.looked, mine.trouble, list(disk.iterdir())

    assert on(image, does) == (True, (), [])
    data = image.read_bytes()
    assert b"no word of this" not in data
    assert b"very-secret-name" not in data


@needs_encryption
def test_without_encryption_it_would(image: Path) -> None:
    """The search above finds what there is to find."""
    (image.parent / "vault").mkdir()
    copy = Source(image.parent / "vault").write("very-secret-name", MARK)

    def does(disk: Path) -> bool:
        mine = DirectoryScratch(disk, ID)
        with mine as path:
            project([copy], str(path))
            os.sync()
        return mine.looked

    assert on(image, does)
    assert b"no word of this" in image.read_bytes()


@needs_encryption
def test_each_request_has_a_key_of_its_own_and_none_stays(image: Path) -> None:
    def does(disk: Path) -> tuple[set[bytes], set[int]]:
        keys, status = set[bytes](), set[int]()
        above = scratch.open_scratch(disk)
        for number in range(3):
            mine = DirectoryScratch(disk, f"r-{number:026}", encrypted=True)
            with mine:
                key = fscrypt.identifier_of(mine._held)
                assert key is not None
                assert fscrypt._status(above, key) == fscrypt._PRESENT
            keys.add(key)
            status.add(fscrypt._status(above, key))
        os.close(above)
        return keys, status

    keys, status = on(image, does)
    assert len(keys) == 3
    assert status == {fscrypt._ABSENT}


@needs_encryption
def test_after_a_kill_the_janitor_removes_the_key_too(image: Path) -> None:
    def does(disk: Path) -> tuple[list[int], janitor.Swept, list[Path]]:
        def doomed() -> None:
            with DirectoryScratch(disk, ID, encrypted=True) as path:
                (path / "name").write_bytes(MARK)
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(Killed):
            in_child(doomed)
        above = scratch.open_scratch(disk)
        left = os.open(disk / ID, os.O_RDONLY)
        key = fscrypt.identifier_of(left)
        os.close(left)
        assert key is not None
        status = [fscrypt._status(above, key)]
        swept = janitor.sweep(disk)
        status.append(fscrypt._status(above, key))
        return status, swept, list(disk.iterdir())

    status, swept, left = on(image, does)
    assert status == [fscrypt._PRESENT, fscrypt._ABSENT]
    assert swept == janitor.Swept(1, (ID,), ())
    assert left == []


@needs_encryption
def test_a_file_held_open_is_found_out(image: Path) -> None:
    def does(disk: Path) -> tuple[bool, tuple[str, ...]]:
        mine = DirectoryScratch(disk, ID, encrypted=True)
        with mine as path:
            held = (path / "f").open("w")
        held.close()
        return mine.looked, mine.trouble

    assert on(image, does) == (False, ("its key is still in the kernel, because files are open",))


@needs_encryption
def test_after_a_power_cut_the_keyless_directory_is_swept(image: Path) -> None:
    """The key is gone with the machine's memory: names cannot be read, and are removed all the same."""

    def does(disk: Path) -> tuple[janitor.Swept, list[Path]]:
        mine = DirectoryScratch(disk, ID, encrypted=True)
        path = mine.__enter__()
        (path / "name").write_bytes(MARK)
        above = scratch.open_scratch(disk)
        key = fscrypt.identifier_of(mine._held)
        assert key is not None
        os.sync()
        os.close(mine._held)
        fscrypt.remove_key(above, key)
        assert "name" not in [entry.name for entry in (disk / ID / "work").parent.rglob("*")]
        return janitor.sweep(disk), list(disk.iterdir())

    assert on(image, does) == (janitor.Swept(1, (ID,), ()), [])


@needs_encryption
def test_a_file_system_that_was_not_made_for_it(tmp_path: Path) -> None:
    def does(disk: Path) -> tuple[str, list[Path]]:
        return refusal(DirectoryScratch(disk, ID, encrypted=True).__enter__), list(disk.iterdir())

    text, left = on(make(tmp_path, "^encrypt"), does)
    assert text == (
        "the scratch directory cannot be encrypted: its file system was not made for it:"
        " tune2fs -O encrypt DEVICE"
    )
    assert left == []


def test_a_file_system_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()

    def does() -> tuple[str, list[Path]]:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(str(tmp_path / "at"), size=1 << 16, inodes=20)
        made = DirectoryScratch(tmp_path / "at", ID, encrypted=True)
        return refusal(made.__enter__), list((tmp_path / "at").iterdir())

    text, left = in_child(does)
    assert text == "the scratch directory cannot be encrypted: its file system cannot: use ext4 or f2fs"
    assert left == []


@pytest.mark.parametrize(
    ("number", "direction", "size"),
    [
        ("_SET_POLICY", 2, 12), ("_GET_POLICY_EX", 3, 9), ("_ADD_KEY", 3, 80), ("_REMOVE_KEY", 3, 64),
        ("_KEY_STATUS", 3, 128),
    ],
)  # fmt: skip
def test_the_numbers_say_the_sizes(number: str, direction: int, size: int) -> None:
    """_IOC of asm-generic/ioctl.h, with the sizes of the structs in linux/fscrypt.h."""
    code = getattr(fscrypt, number)
    assert (code >> 30, code >> 16 & 0x3FFF, code >> 8 & 0xFF) == (direction, size, ord("f"))
    assert struct.calcsize("=II32xII32x") == 80
