"""What dead requests left on disk is removed; what lives, and what is not ours, stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from vault_scene import AS_ROOT, USER, Child, refusal

from egressd.vault import janitor, scratch
from egressd.vault.janitor import Swept, sweep
from egressd.vault.scratch import DirectoryScratch

IDS = ["r-" + letter * 26 for letter in "abc"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir(mode=0o700)
    return tmp_path / "disk"


def leave(disk: Path, id: str) -> None:
    """As a request that was killed leaves it."""
    (disk / id / "work" / "hand").mkdir(parents=True)
    (disk / id / "work" / "hand" / "f").write_text("left")
    (disk / id / "work" / "hand").chmod(0o555)
    (disk / id / "work").chmod(0o555)


def test_nothing_to_do(disk: Path) -> None:
    assert sweep(disk) == Swept()


def test_leftovers(disk: Path) -> None:
    for id in IDS:
        leave(disk, id)
    assert sweep(disk) == Swept(3, tuple(IDS), ())
    assert list(disk.iterdir()) == []
    assert sweep(disk) == Swept()


def test_what_lives_stays(disk: Path) -> None:
    ready, tell = os.pipe()

    def live() -> None:
        with DirectoryScratch(disk, IDS[1]) as path:
            (path / "f").write_text("alive")
            os.write(tell, b"x")
            signal.pause()

    leave(disk, IDS[0])
    child = Child(live)
    try:
        os.read(ready, 1)
        assert sweep(disk) == Swept(1, (IDS[0],), ())
        assert (disk / IDS[1] / "work" / "f").read_text() == "alive"
    finally:
        child.kill()
        os.close(ready)
        os.close(tell)
    assert sweep(disk) == Swept(1, (IDS[1],), ())


def test_what_a_child_of_a_request_still_uses_stays(disk: Path) -> None:
    """A fork holds the lock as well: it may have the copies open."""
    goes, stays = os.pipe()
    mine = DirectoryScratch(disk, IDS[0])
    mine.__enter__()
    child = Child(lambda: os.read(goes, 1))
    os.close(mine._held)
    mine._held = -1
    assert sweep(disk) == Swept()
    os.write(stays, b"x")
    child.end()
    assert sweep(disk) == Swept(1, (IDS[0],), ())
    mine.destroy()
    os.close(goes)
    os.close(stays)


def test_what_is_not_ours_stays(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("other", "r-short", "r-" + "A" * 26, "r-" + "a" * 27, "." + IDS[0], IDS[0] + "\n"):
        (disk / name).mkdir()
    (disk / IDS[0]).write_text("a file")
    (disk / IDS[1]).symlink_to(tmp_path / "kept")
    before = sorted(path.name for path in disk.iterdir())
    found = sweep(disk)
    assert (found.count, found.names) == (0, ())
    assert [problem.partition(":")[0] for problem in found.problems] == IDS[:2]
    assert sorted(path.name for path in disk.iterdir()) == before
    assert (tmp_path / "kept").is_dir()


@pytest.mark.skipif(not AS_ROOT, reason="only root gives directories away")
def test_what_belongs_to_somebody_else_stays(disk: Path) -> None:
    leave(disk, IDS[0])
    os.chown(disk / IDS[0], USER, USER)
    assert sweep(disk).problems == (f"{IDS[0]}: belongs to somebody else, and was left",)
    assert (disk / IDS[0] / "work" / "hand" / "f").exists()


def test_one_that_cannot_be_removed_does_not_save_the_others(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id in IDS:
        leave(disk, id)
    real = scratch.discard

    def discard(name: str, *, above: int, held: int) -> list[str]:
        if name == IDS[1]:
            os.close(held)
            return ["its disk is broken"]
        return real(name, above=above, held=held)

    monkeypatch.setattr(scratch, "discard", discard)
    assert sweep(disk) == Swept(2, (IDS[0], IDS[2]), (f"{IDS[1]}: its disk is broken",))


def test_a_directory_swept_before_it_is_held(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between mkdir and flock, in which nobody can tell it from a leftover: it is made again."""
    real, swept = scratch.hold, []

    def hold(name: str, *, above: int, wait: bool) -> int | None:
        monkeypatch.undo()
        swept.append(sweep(disk))
        return real(name, above=above, wait=wait)

    monkeypatch.setattr(scratch, "hold", hold)
    with DirectoryScratch(disk, IDS[0]) as path:
        assert swept == [Swept(1, (IDS[0],), ())]
        assert path.is_dir()
        assert sweep(disk) == Swept()
    assert list(disk.iterdir()) == []


def test_a_directory_swept_while_it_is_being_held(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is got, but of a directory that is no more."""
    import fcntl

    real = fcntl.flock

    def flock(number: int, how: int) -> None:
        monkeypatch.undo()
        sweep(disk)
        real(number, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with DirectoryScratch(disk, IDS[0]) as path:
        assert path.is_dir()
    assert list(disk.iterdir()) == []


def test_sweeping_while_requests_come_and_go(disk: Path) -> None:
    def requests() -> int:
        good = 0
        for number in range(300):
            mine = DirectoryScratch(disk, f"r-{number:026}")  # a request's name is never used twice
            with mine as path:
                (path / "f").write_text("x")
                good += (path / "f").read_text() == "x"
            assert mine.looked, mine.trouble
        return good

    child = Child(requests)
    problems = [problem for _ in range(300) for problem in sweep(disk).problems]
    assert child.end() == 300
    assert problems == []
    assert list(disk.iterdir()) == []


def test_no_directory(disk: Path) -> None:
    assert "cannot be used as a scratch" in refusal(lambda: janitor.sweep(disk / "missing"))
