"""The store's file: whoever can write to it decides who reads what."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from store_world import ANN, fill

from egressd.broker.store.account import as_owner
from egressd.broker.store.store import Store
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other accounts")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a store that has something in it, and is closed."""
    path = tmp_path / "store.db"
    with Store.open(f"sqlite:///{path}") as store:
        fill(store)
    return path


def opened(path: Path) -> Store:
    return Store.open(f"sqlite:///{path}")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_it_is_its_owner_s_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with opened(tmp_path / "store.db") as store:
            fill(store)
            assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
                "store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600,
            }  # fmt: skip
    finally:
        os.umask(before)


@pytest.mark.parametrize("wrong", [0o620, 0o602, 0o666, 0o622])
def test_a_file_that_others_may_write_to_is_refused(file: Path, wrong: int) -> None:
    file.chmod(wrong)
    with pytest.raises(Refused, match=r"others may write to .*: chmod 600") as refused:
        opened(file)
    assert refused.value.reason is Reason.UNAVAILABLE


def test_a_directory_that_others_may_write_to_is_refused(file: Path) -> None:
    file.parent.chmod(0o777)
    with pytest.raises(Refused, match="anybody could swap the store"):
        opened(file)
    file.parent.chmod(0o1777)  # as /tmp: nobody else may rename the file, but put store.db-wal beside it
    with pytest.raises(Refused, match="anybody could swap the store"):
        opened(file)
    file.parent.chmod(0o700)
    opened(file).close()


def _link(path: Path) -> None:
    path.rename(path.with_name("real.db"))
    path.symlink_to("real.db")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [_link, _fifo, _directory], ids=lambda f: f.__name__)
def test_what_is_not_a_plain_file_is_refused(file: Path, spoil: Callable[[Path], None]) -> None:
    spoil(file)
    with pytest.raises(Refused) as refused:
        opened(file)
    assert refused.value.reason is Reason.UNAVAILABLE


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nowhere/store.db cannot be opened: No such file"):
        opened(tmp_path / "nowhere" / "store.db")


@as_root
def test_a_store_that_root_makes_belongs_to_its_directory_s_account(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 4001, 4002)
    with opened(home / "store.db") as store:
        fill(store)
        assert store.owner == 4001
        assert {path.name: (path.stat().st_uid, path.stat().st_gid) for path in home.iterdir()} == {
            "store.db": (4001, 4002), "store.db-wal": (4001, 4002), "store.db-shm": (4001, 4002),
        }  # fmt: skip


@as_root
def test_root_acts_as_the_store_s_owner_for_a_while(file: Path) -> None:
    os.chown(file, 4001, 4002)
    with opened(file) as store:
        before = os.geteuid(), os.getegid(), os.getgroups()
        with as_owner(store):
            assert (os.geteuid(), os.getegid(), os.getgroups(), os.getuid()) == (4001, 4002, [], 0)
        assert (os.geteuid(), os.getegid(), os.getgroups()) == before
        with pytest.raises(KeyError), as_owner(store):
            raise KeyError
        assert (os.geteuid(), os.getegid(), os.getgroups()) == before


def test_who_owns_the_store_stays_who_it_is(file: Path) -> None:
    with opened(file) as store:
        before = os.geteuid(), os.getegid(), os.getgroups()
        with as_owner(store):
            assert (os.geteuid(), os.getegid(), os.getgroups()) == before


# ---- while it is open


def test_another_file_in_its_place_is_not_believed(file: Path) -> None:
    with opened(file) as store:
        assert store.generation("acme") == 1
        file.rename(file.with_name("old.db"))
        for ask in (lambda: store.generation("acme"), lambda: store.snapshot("acme", ANN, ())):
            with pytest.raises(Refused, match="not the file any more that was opened"):
                ask()
        with pytest.raises(Refused, match="not the file any more"):
            fill(store)


def test_a_file_that_was_opened_to_others_meanwhile_is_not_believed(file: Path) -> None:
    with opened(file) as store:
        file.chmod(0o666)
        with pytest.raises(Refused, match="anybody could give themselves a role"):
            store.snapshot("acme", ANN, ())
        file.chmod(0o600)
        assert store.generation("acme") == 1


def test_what_is_no_database_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"members: [everybody]\n" * 500)
    path.chmod(0o600)
    with pytest.raises(Refused, match="file is not a database") as refused:
        opened(path)
    assert refused.value.reason is Reason.UNAVAILABLE
    assert path.read_bytes() == b"members: [everybody]\n" * 500


def test_a_database_with_a_hole_in_it_answers_nothing(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    file.write_bytes(data)
    with pytest.raises(Refused) as refused:
        opened(file).snapshot("acme", ANN, ["handbook:a.md"])
    assert refused.value.reason is Reason.UNAVAILABLE


def test_a_table_that_is_gone_is_not_an_empty_one(file: Path) -> None:
    with opened(file) as store:
        with sqlite3.connect(file) as connection:
            connection.execute("DROP TABLE barriers")
        connection.close()
        with pytest.raises(Refused, match="no such table: barriers"):
            store.snapshot("acme", ANN, ["handbook:a.md"])


def test_a_locked_database_is_said_and_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egressd.broker.store.engine.BUSY", 0.05)
    with opened(file) as store:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refused, match="database is locked") as refused:
            fill(store)
        assert refused.value.reason is Reason.UNAVAILABLE
        assert store.generation("acme") == 1  # readers do not wait
        other.execute("ROLLBACK")
        other.close()
        fill(store)
        assert store.generation("acme") == 2


def test_a_lock_that_shuts_out_readers_too_is_no_empty_answer(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egressd.broker.store.engine.BUSY", 0.05)
    with opened(file) as store:
        store.close()
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Refused, match="locked"):
            store.snapshot("acme", ANN, ["handbook:a.md"])
        other.close()


def test_nothing_is_left_open(file: Path) -> None:
    def descriptors() -> set[str]:
        found = set()
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(link.readlink()))
        return {name for name in found if name.startswith(str(file))}

    with opened(file) as store:
        store.snapshot("acme", ANN, ())
        assert descriptors()
    assert descriptors() == set()


@as_root
def test_who_is_spoken_to_as_the_owner_sees_the_owner(file: Path) -> None:
    """What the daemon goes by is SO_PEERCRED: the effective rights at connect(2) (unix(7))."""
    os.chown(file, 4001, 4002)
    with (
        tempfile.TemporaryDirectory(prefix="c-peer-", dir="/tmp") as place,
        socket.socket(socket.AF_UNIX) as at,
    ):
        Path(place).chmod(0o711)
        at.bind(f"{place}/socket")
        Path(place, "socket").chmod(0o666)
        at.listen()
        with opened(file) as store, socket.socket(socket.AF_UNIX) as asking:
            with as_owner(store):
                asking.connect(f"{place}/socket")
            peer, _ = at.accept()
            with peer:
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    assert struct.unpack("3i", credentials)[1:] == (4001, 4002)
