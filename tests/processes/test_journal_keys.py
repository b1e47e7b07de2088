"""The signing key on disk: made once, kept to itself, changed whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from egressd.journal.keys import PrivateKey
from egressd.processes import journal_keys
from egressd.processes.journal_keys import KeyProblem, open_keys

KEY, OTHER = PrivateKey.from_seed(bytes(31) + b"\x01"), PrivateKey.from_seed(bytes(31) + b"\x02")


def private_keys(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes())


def test_made_at_the_first_start_and_found_again(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys")
    again = open_keys(tmp_path / "keys")
    assert keys.current.public == again.current.public and again.previous == []
    assert not keys.credential
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "keys/journal.key").stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "keys").iterdir()] == ["journal.key"]


def test_an_umask_does_not_open_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys/journal.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660, 0o666, 0o601])
def test_a_key_that_others_can_reach_is_refused_with_the_remedy(mode: int, tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    (tmp_path / "keys/journal.key").chmod(mode)
    with pytest.raises(KeyProblem, match=rf"mode 0{mode:o}.*chmod 600 .*journal.key"):
        open_keys(tmp_path / "keys")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_can_write_is_refused(mode: int, tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    (tmp_path / "keys").chmod(mode)
    with pytest.raises(KeyProblem, match="chmod 700"):
        open_keys(tmp_path / "keys")


@pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root")
@pytest.mark.parametrize("name", ["", "journal.key"])
def test_of_another_owner(name: str, tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    os.chown(tmp_path / "keys" / name, 4001, 4001)
    with pytest.raises(KeyProblem, match="chown 0 "):
        open_keys(tmp_path / "keys")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    path = tmp_path / "keys/journal.key"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        open_keys(tmp_path / "keys")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyProblem, match="is not a file"):
        open_keys(tmp_path / "keys")


@pytest.mark.parametrize("content", [b"", b"secret words", KEY.dump()[:40], KEY.public.pem().encode()])
def test_a_damaged_key_is_not_replaced_by_a_new_one(content: bytes, tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    (tmp_path / "keys/journal.key").write_bytes(content)
    with pytest.raises(KeyProblem, match="put the right key back") as caught:
        open_keys(tmp_path / "keys")
    assert "secret" not in str(caught.value)
    assert (tmp_path / "keys/journal.key").read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, 50, len(KEY.dump())])
def test_making_is_interrupted_at_any_byte(size: int, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys/journal.key.making").write_bytes(KEY.dump()[:size])
    keys = open_keys(tmp_path / "keys")
    assert keys.current.public != KEY.public
    assert private_keys(tmp_path / "keys") == ["journal.key"]


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys")
    with pytest.raises(FileExistsError):
        journal_keys._write_key(tmp_path / "keys", "journal.key", OTHER)
    assert open_keys(tmp_path / "keys").current.public == keys.current.public
    assert private_keys(tmp_path / "keys") == ["journal.key"]


# ---- a change


def test_a_change_keeps_both_until_it_is_settled(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys")
    old, new = keys.rotate()
    assert (keys.current, keys.previous) == (new, [old])
    assert private_keys(tmp_path / "keys") == ["journal.key", "journal.key.new"]
    with pytest.raises(KeyProblem, match="under way"):
        keys.rotate()
    again = open_keys(tmp_path / "keys")  # after a stop in between
    assert (again.current.public, [k.public for k in again.previous]) == (new.public, [old.public])
    again.settle()
    assert private_keys(tmp_path / "keys") == ["journal.key"]
    after = open_keys(tmp_path / "keys")
    assert (after.current.public, after.previous) == (new.public, [])
    (kept,) = (tmp_path / "keys/old").iterdir()
    assert kept.name == old.public.fingerprint[7:] + ".pem" and kept.read_text() == old.public.pem()
    assert stat.S_IMODE((tmp_path / "keys/journal.key").stat().st_mode) == 0o600


def test_settling_twice_is_settling_once(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys")
    keys.rotate()
    keys.settle()
    keys.settle()
    assert open_keys(tmp_path / "keys").current.public == keys.current.public


# ---- a credential


def test_a_credential_wins_over_the_file(tmp_path: Path) -> None:
    stored = open_keys(tmp_path / "keys").current
    keys = open_keys(tmp_path / "keys", KEY.dump())
    assert keys.credential and keys.current.public == KEY.public
    assert [key.public for key in keys.previous] == [stored.public]
    with pytest.raises(KeyProblem, match=r"cannot change: .* in front of the old"):
        keys.rotate()
    keys.settle()
    assert private_keys(tmp_path / "keys") == []  # the log goes on under the credential's key alone


def test_a_credential_with_two_keys_begins_with_the_new_one(tmp_path: Path) -> None:
    keys = open_keys(tmp_path / "keys", b"# new\n" + OTHER.dump() + b"# old\n" + KEY.dump())
    assert (keys.current.public, [k.public for k in keys.previous]) == (OTHER.public, [KEY.public])
    assert list((tmp_path / "keys").iterdir()) == []


DAMAGED = b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"secret words",
        KEY.dump()[:40],
        KEY.public.pem().encode(),
        KEY.dump() + DAMAGED,
        KEY.dump() + b"#" * 65_536,
    ],
)
def test_a_bad_credential_does_not_fall_back_to_the_file(content: bytes, tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    with pytest.raises(KeyProblem, match="egressd-journal-key") as caught:
        open_keys(tmp_path / "keys", content)
    assert "secret" not in str(caught.value)
