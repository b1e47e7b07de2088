"""Copies: exactly what was ingested, exactly what was asked for, whatever happens to the vault meanwhile."""

# pathlib knows no paths that are bytes
# ruff: noqa: PTH101, PTH104, PTH108, PTH118, PTH123, PTH208, PTH211
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vault_scene import AS_ROOT, USER, Child, Copy, Entry, Source, everything, in_child, refusal

from egressd.broker.runners import jobs
from egressd.vault import mounts, projection
from egressd.vault.beneath import PIECE, Bounds
from egressd.vault.projection import MANIFEST, Manifest, project, room
from egressd.vault.scratch import PrivateScratch

FILE, DIRECTORY = ("file", 0o444, 0, 1), ("directory", 0o555, 0, 1)


def file(content: bytes) -> Entry:
    return Entry(*FILE, content)


def directory() -> Entry:
    return Entry(*DIRECTORY, None)


def refused(copies: list[Copy], into: Path, **more: Any) -> str:
    """Why; and the manifest, by which others know what is there, was never written."""
    text = refusal(lambda: project(copies, str(into), **more))
    assert text, "it was projected"
    assert not (into / MANIFEST).exists()
    return text


# ---- what is there


def test_copies_and_their_manifest(source: Source, into: Path) -> None:
    one = source.write("hr/leave.md", b"30 days")
    other = source.write(b"hr/\xff odd\n", b"")
    source.write("hr/salaries.md", b"left out")
    manifest = project([one, other], str(into))
    text = (
        b'{"files":[{"id":"hand:hr/%FF%20odd%0A","path":"hand/hr/%FF%20odd%0A","sha256":"'
        + hashlib.sha256(b"").hexdigest().encode()
        + b'","size":0},{"id":"hand:hr/leave.md","path":"hand/hr/leave.md","sha256":"'
        + hashlib.sha256(b"30 days").hexdigest().encode()
        + b'","size":7}]}\n'
    )
    assert everything(into) == {
        b"MANIFEST.json": file(text),
        b"hand": directory(),
        b"hand/hr": directory(),
        b"hand/hr/leave.md": file(b"30 days"),
        b"hand/hr/\xff odd\n": file(b""),
    }
    assert manifest == Manifest(f"sha256:{hashlib.sha256(text).hexdigest()}", 2, 7)
    top = into.stat()
    assert (stat.S_IMODE(top.st_mode), top.st_mtime_ns) == (0o555, 0)


def test_the_manifest_is_canonical(source: Source, into: Path) -> None:
    project([source.write(name) for name in ("b", "a/b", "a.b")], str(into))
    text = (into / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) + "\n"
    assert [entry["id"] for entry in json.loads(text)["files"]] == ["hand:a.b", "hand:a/b", "hand:b"]


def test_nothing_asked_for(into: Path) -> None:
    assert project([], str(into)).files == 0
    assert everything(into) == {b"MANIFEST.json": file(b'{"files":[]}\n')}


def test_the_order_of_candidates_tells_nothing(source: Source, tmp_path: Path) -> None:
    copies = [source.write(f"d{n % 3}/{n}", bytes([n])) for n in range(9)]
    manifests = []
    for number, order in enumerate((copies, copies[::-1])):
        place = tmp_path / f"into{number}"
        place.mkdir()
        manifests.append((project(order, str(place)), everything(place)))
    assert manifests[0] == manifests[1]


def test_sources_side_by_side(tmp_path: Path, into: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Source(tmp_path / "one", "one"), Source(tmp_path / "two", "two")
    project([two.write("f", b"2"), one.write("f", b"1")], str(into))
    found = everything(into)
    assert (found[b"one/f"].content, found[b"two/f"].content) == (b"1", b"2")


def test_jobs_copies_are_copies(source: Source, into: Path) -> None:
    copy = source.write("f", b"x")
    project([jobs.Copy(**dataclasses.asdict(copy))], str(into))
    assert everything(into)[b"hand/f"] == file(b"x")


def test_into_an_open_directory(source: Source, into: Path) -> None:
    number = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        project([source.write("f", b"x")], number)
    finally:
        os.close(number)
    assert everything(into)[b"hand/f"] == file(b"x")


@pytest.mark.parametrize("size", [0, 1, 4096, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
@pytest.mark.parametrize("way", ["as it comes", "no copy_file_range"])
def test_every_size(source: Source, into: Path, size: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "no copy_file_range":
        monkeypatch.setattr(projection, "_ranged", lambda *_: False)
    content = os.urandom(size)
    project([source.write("f", content)], str(into))
    assert everything(into)[b"hand/f"] == file(content)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_the_umask_changes_nothing(source: Source, into: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        if umask and not AS_ROOT:
            pytest.skip("an ordinary account cannot go into what it closed to itself")
        project([source.write("d/f", b"x")], str(into))
    finally:
        os.umask(before)
    assert everything(into)[b"hand/d/f"] == file(b"x")


# ---- links


def test_a_hard_link_is_a_copy_like_any(source: Source, into: Path, tmp_path: Path) -> None:
    """The other name lies outside. What is at this path was ingested; the copy shares nothing with it."""
    (tmp_path / "outside").write_bytes(b"same")
    os.link(tmp_path / "outside", source.place("inside"))
    project([source.copy("inside", b"same")], str(into))
    assert everything(into)[b"hand/inside"] == file(b"same")
    assert (into / "hand/inside").stat().st_ino != (tmp_path / "outside").stat().st_ino
    (tmp_path / "outside").write_bytes(b"else")
    assert everything(into)[b"hand/inside"] == file(b"same")


@pytest.mark.parametrize("target", ["../secret", "{tmp}/secret", "/proc/self/cwd/secret", "other"])
def test_a_link_is_not_copied(source: Source, into: Path, tmp_path: Path, target: str) -> None:
    """Not even one to a document with the very content that was ingested."""
    (tmp_path / "secret").write_bytes(b"content")
    source.write("other", b"content")
    os.symlink(target.format(tmp=tmp_path), source.place("link"))
    assert refused([source.copy("link", b"content")], into) == "hand:link cannot be shown: a symbolic link"


# ---- what is refused


@pytest.mark.parametrize("now", [b"changed", b"CONTENT", b"", b"content and more"])
def test_what_is_not_what_was_ingested(source: Source, into: Path, now: bytes) -> None:
    kept, copy = source.write("a", b"fine"), source.write("f", b"content")
    source.write("f", now)
    assert refused([kept, copy], into) == "hand:f is not what was ingested: ingest its source again"


def test_a_file_that_is_gone(source: Source, into: Path) -> None:
    copy = source.copy("f", b"content")
    assert refused([copy], into) == "hand:f cannot be shown: gone before it was looked at"


def test_a_source_that_is_gone(source: Source, into: Path) -> None:
    copy = source.write("f")
    source.root.rename(f"{source.root}-moved")
    assert "the source's directory" in refused([copy], into)


def test_a_file_that_may_not_be_read(source: Source, tmp_path: Path) -> None:
    copy = source.write("f")
    os.chmod(source.place("f"), 0)
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "theirs").chmod(0o777)

    def does() -> str:
        return refused([copy], tmp_path / "theirs")

    assert in_child(does, uid=USER) == "hand:f cannot be shown: not to be read by this account"


def test_a_fifo_in_its_place(source: Source, into: Path) -> None:
    os.mkfifo(source.place("f"))
    assert refused([source.copy("f", b"")], into) == "hand:f cannot be shown: not a regular file"


def test_a_mount_in_its_way(source: Source, into: Path) -> None:
    copy = source.write("d/f", b"x")

    def does() -> str:
        mounts.enter_private_namespace()
        mounts.mount_tmpfs(source.place("d").decode(), size=1 << 16, inodes=10)
        source.write("d/f", b"x")
        return refused([copy], into)

    assert in_child(does) == "hand:d/f cannot be shown: on another mount than its source"


def test_a_sparse_file_of_a_terabyte_is_never_read(
    source: Source, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = source.write("f", b"")
    os.truncate(source.place("f"), 1 << 40)
    monkeypatch.setattr(projection, "reopened", lambda *_: pytest.fail("it was opened"))
    assert "is not what was ingested" in refused([copy], into)
    big = dataclasses.replace(copy, size=1 << 40)
    assert "more than 1073741824 at once" in refused([big], into, bounds=Bounds(octets=1 << 30))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"path": b"../secret"}, "is not a path below a directory"),
        ({"path": b"g"}, "does not name the path"),
        ({"id": "hand:../secret", "path": b"../secret"}, "is not a path below a directory"),
        ({"id": "hand:a/../f"}, "is not a path below a directory"),
        ({"id": "../hand:f"}, "is not a document's identifier"),
        ({"id": "MANIFEST.json:f"}, "is not a document's identifier"),
        ({"id": "hand:%66"}, "is another spelling"),
        ({"id": "hand:%2E%2E/secret", "path": b"../secret"}, "is not a path below a directory"),
        ({"id": "hand:g"}, "does not name the path"),
        ({"id": "hand"}, "is not a document's identifier"),
        ({"path": b"/f"}, "is not a path below a directory"),
        ({"size": -1}, "has no size"),
        ({"size": 8}, "is not what was ingested"),
        ({"digest": "sha256:" + "0" * 64}, "is not what was ingested"),
        ({"digest": ""}, "is not what was ingested"),
    ],
)
def test_copies_that_cannot_be_meant(
    source: Source, into: Path, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    (tmp_path / "secret").write_bytes(b"content")
    copy = dataclasses.replace(source.write("f"), **change)
    assert text in refused([copy], into)
    assert not any(name.endswith(b"secret") for name in everything(into))


def test_two_at_one_place(source: Source, tmp_path: Path, into: Path) -> None:
    one = source.write("f")
    (tmp_path / "elsewhere").mkdir()
    other = Source(tmp_path / "elsewhere").write("f", b"another source of that name")
    assert refused([one, other], into) == "hand:f is asked for twice"
    assert refused([one, one], into) == "hand:f is asked for twice"


def test_a_file_where_a_directory_is_to_be(source: Source, into: Path) -> None:
    below = source.write("f/g")
    file = source.copy("f", b"content")
    assert refused([below, file], into) == "hand:f is at the place of a directory"


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(files=1), "2 documents are more than 1 at once"),
        (Bounds(octets=13), "2 documents have 14 bytes, more than 13 at once"),
        (Bounds(depth=2), "hand:1/2/3 lies too deep"),
        (Bounds(path=4), "hand:1/2/3 lies too deep, or its path is too long"),
    ],
)
def test_bounds(source: Source, into: Path, bounds: Bounds, text: str) -> None:
    copies = [source.write("1/2/3"), source.write("4")]
    assert text in refused(copies, into, bounds=bounds)
    assert everything(into) == {}, "found out before anything is made"
    project(copies, str(into), bounds=Bounds(files=2, octets=14, depth=3, path=5))


def test_only_into_an_empty_directory(source: Source, into: Path) -> None:
    (into / "left").touch()
    assert "is not empty" in refused([source.write("f")], into)


# ---- while it is copied

CONTENT = b"what was ingested; " * 100
LARGE = CONTENT * (2 * PIECE // len(CONTENT))
STEPS = ("look", "reopened", "_copied")  # before each; and in the middle of copying


def overwrite(source: Source, content: bytes) -> None:
    with open(source.place("d/f"), "r+b") as file:
        file.write(bytes(len(content)))


def grow(source: Source, content: bytes) -> None:
    with open(source.place("d/f"), "ab") as file:
        file.write(b"more" * PIECE)


def shrink(source: Source, content: bytes) -> None:
    os.truncate(source.place("d/f"), len(content) // 2)


def empty(source: Source, content: bytes) -> None:
    os.truncate(source.place("d/f"), 0)


def make_endless(source: Source, content: bytes) -> None:
    os.truncate(source.place("d/f"), 1 << 40)


def replace(source: Source, content: bytes) -> None:
    source.write("d/new", bytes(len(content)))
    os.rename(source.place("d/new"), source.place("d/f"))


def link(source: Source, content: bytes) -> None:
    os.unlink(source.place("d/f"))
    os.symlink("../../outside/f", source.place("d/f"))


def link_directory(source: Source, content: bytes) -> None:
    os.rename(source.place("d"), source.place("aside"))
    os.symlink("../outside", source.place("d"))


def fifo(source: Source, content: bytes) -> None:
    os.unlink(source.place("d/f"))
    os.mkfifo(source.place("d/f"))


def remove(source: Source, content: bytes) -> None:
    shutil.rmtree(source.place("d"))


def close(source: Source, content: bytes) -> None:
    os.chmod(source.place("d/f"), 0)


ATTACKS = (
    overwrite, grow, shrink, empty, make_endless, replace, link, link_directory, fifo, remove, close,
)  # fmt: skip


@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("step", [*STEPS, "middle"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_vault_that_changes_at_that_very_moment(
    source: Source,
    into: Path,
    monkeypatch: pytest.MonkeyPatch,
    attack: Callable[[Source, bytes], None],
    step: str,
    content: bytes,
) -> None:
    """Either what was ingested, byte for byte, or nothing. Never what lies outside, never a wait."""
    copy = source.write("d/f", content)
    outside = source.root.parent / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(bytes(len(content)))
    happen(monkeypatch, step, lambda: attack(source, content))
    text = refusal(lambda: project([copy], str(into)))
    if text:
        assert "hand:d/f" in text
        assert not (into / MANIFEST).exists()
    else:
        assert everything(into)[b"hand/d/f"] == file(content)
    if attack is overwrite and step != "middle":
        assert text, "it was not even noticed"


def happen(monkeypatch: pytest.MonkeyPatch, step: str, attack: Callable[[], None]) -> None:
    """Have it attacked once, just before that step; in the middle: after the first piece was read."""
    if step == "middle":
        happen_after(monkeypatch, os, "read", attack)
        happen_after(monkeypatch, os, "copy_file_range", attack)
        return
    place: Any = projection._Copier if step == "_copied" else projection
    real = getattr(place, step)

    def attacked(*words: Any, **more: Any) -> Any:
        monkeypatch.undo()
        attack()
        return real(*words, **more)

    monkeypatch.setattr(place, step, attacked)


def happen_after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, attack: Callable[[], None]) -> None:
    real = getattr(place, name)

    def attacked(source: int, *words: int) -> Any:
        most = min(words[-1], PIECE // 2)
        done = real(source, *words[:-1], most)
        monkeypatch.undo()
        attack()
        return done

    monkeypatch.setattr(place, name, attacked)


def test_a_directory_that_turns_into_a_link_and_back_while_it_is_copied(
    source: Source, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_bytes(b"CONTENT")
    copy = source.write("d/f", b"content")

    def swap() -> None:
        here, aside = source.place("d"), source.place("aside")
        while True:
            os.rename(here, aside)
            os.symlink("../outside", here)
            os.unlink(here)
            os.rename(aside, here)

    swapping, seen = Child(swap), set()
    try:
        for number in range(300):
            place = tmp_path / f"into{number}"
            place.mkdir()
            text = refusal(functools.partial(project, [copy], str(place)))
            seen.add(text or everything(place)[b"hand/d/f"].content)
    finally:
        swapping.kill()
    link, gone = "a symbolic link", "gone before it was looked at"
    assert seen <= {b"content", f"hand:d/f cannot be shown: {link}", f"hand:d/f cannot be shown: {gone}"}


def test_a_clone_is_judged_by_what_was_cloned(
    source: Source, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may clone what nobody read. Here it clones something else."""
    copy = source.write("f", b"content")

    def cloned(_: int, made: int) -> bool:
        os.write(made, b"CONTENT")
        return True

    monkeypatch.setattr(projection, "_cloned", cloned)
    assert "is not what was ingested" in refused([copy], into)


@pytest.mark.skipif(not AS_ROOT or not shutil.which("mkfs.xfs"), reason="needs root, loop devices, xfsprogs")
def test_blocks_are_shared_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with open(image, "wb") as made:
        made.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)

    def does() -> dict[bytes, Entry]:
        (mounted / "vault").mkdir()
        (mounted / "into").mkdir()
        copies = [Source(mounted / "vault").write(str(n), b"%d" % n * n) for n in (1, 5000, PIECE)]
        for way in ("_through", "_in_pieces", "_ranged"):
            monkeypatch.setattr(projection, way, lambda *_: pytest.fail("it was not cloned"))
        project(copies, str(mounted / "into"))
        return everything(mounted / "into")

    found = in_mount(image, mounted, does)
    for n in (1, 5000, PIECE):
        assert found[b"hand/%d" % n] == file(b"%d" % n * n)


def in_mount(image: Path, at: Path, does: Callable[[], Any]) -> Any:
    """What `does` returns in a child with the image mounted, where nobody else sees it."""

    def mounted() -> Any:
        if mounts._libc.unshare(0x20000) or mounts._mount("none", "/", "none", 0x44000, ""):
            raise OSError("no mount namespace")
        subprocess.run(["mount", "-o", "loop", image, at], check=True)
        try:
            return does()
        finally:
            subprocess.run(["umount", at], check=True)

    return in_child(mounted)


# ---- room


def test_room_is_enough_and_no_more_than_a_page_a_file(source: Source, tmp_path: Path) -> None:
    copies = [source.write(f"d{n % 7}/e{n % 3}/{n}" + "x" * 100, bytes(n * 97)) for n in range(120)]
    wanted = room(copies)
    (tmp_path / "at").mkdir()

    def does(inodes: int) -> str:
        scratch = PrivateScratch(size=wanted.octets, inodes=inodes, at=tmp_path / "at")
        with scratch as path:
            text = refusal(lambda: project(copies, str(path)))
        assert scratch.looked, scratch.trouble
        return text

    assert in_child(lambda: does(wanted.inodes)) == ""
    assert "the scratch is full" in in_child(lambda: does(wanted.inodes - 1))
    content = sum(copy.size for copy in copies)
    assert wanted.octets < content + 120 * 4096 + 120 * 600


def test_no_room(source: Source, tmp_path: Path) -> None:
    copy = source.write("f", bytes(100_000))
    (tmp_path / "at").mkdir()

    def does() -> tuple[str, bool]:
        scratch = PrivateScratch(size=1 << 16, inodes=100, at=tmp_path / "at")
        with scratch as path:
            text = refusal(lambda: project([copy], str(path)))
        return text, scratch.looked

    text, looked = in_child(does)
    assert text == "the scratch is full (No space left on device): give it more room"
    assert looked


# ---- what was left out cannot be seen


def test_nothing_inside_tells_of_what_was_left_out(tmp_path: Path) -> None:
    """The same three documents, from a vault with nothing else and from one with a thousand things."""
    seen = []
    for extra in (0, 1000):
        (tmp_path / f"{extra}").mkdir()
        source = Source(tmp_path / f"{extra}")
        for number in range(extra):
            source.write(f"a/{number}", b"left out")
        copies = [source.write(path, b"shown") for path in ("a/z", "a/b/c", "d")][:: -1 if extra else 1]
        (tmp_path / f"at{extra}").mkdir()
        seen.append(in_child(functools.partial(look, copies, tmp_path / f"at{extra}")))
    assert seen[0] == seen[1]


def look(copies: list[Copy], at: Path) -> list[Any]:
    """All that stat, statfs and listing say, but for times of change and device numbers."""
    with PrivateScratch(size=1 << 20, inodes=100, at=at) as path:
        project(copies, str(path))
        found: list[Any] = [os.statvfs(path)[:9]]
        for here, directories, files in os.walk(path):
            found.append((here.removeprefix(str(at)), directories, files, os.listdir(here)))
            for name in (".", *directories, *files):
                s = os.lstat(os.path.join(here, name))
                found.append((s.st_mode, s.st_ino, s.st_nlink, s.st_size, s.st_blocks, s.st_mtime_ns))
    return found


def test_the_vault_imports_nothing_above_it() -> None:
    """Nor anything that would make a runner slow to start."""
    loaded = subprocess.run(
        [sys.executable, "-c",
         "import sys, egressd.vault.projection, egressd.vault.janitor; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not {"asyncio", "sqlalchemy", "pydantic", "egressd.broker", "egressd.sandbox"} & set(loaded)
    assert msgspec.__name__ in loaded
