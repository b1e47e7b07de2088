"""The auditor's signing key on disk: made once, readable by nobody else, changed without a gap.

    keys/journal.key        the key, PKCS #8 PEM, mode 0600
    keys/journal.key.new    its successor, while the two change places
    keys/old/HEX.pem        public keys of former ones, by fingerprint

A change of keys is finished by the first checkpoint that both keys signed; until then both are kept, and a
start in between goes on with it. Afterwards the old private key is gone.

With systemd the key may be a credential (`LoadCredential=egressd-journal-key:/path`), which wins over the
file. It is then the machine's owner who changes it: a credential may hold two keys one after the other, the
new one first; both sign until the credential holds the new one alone, and a key in the file of a machine
that is given a credential is followed in the same way.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from egressd.journal.keys import BadKey, PrivateKey
from egressd.model.errors import EgressdError

__all__ = ["CREDENTIAL", "KeyProblem", "Keys", "open_keys"]

CREDENTIAL = "egressd-journal-key"
_NAME, _NEXT, _MAKING, _OLD = "journal.key", "journal.key.new", "journal.key.making", "old"
_MOST = 1 << 16  # bytes of a key file
_PEM = re.compile(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----", re.DOTALL)


class KeyProblem(EgressdError):
    """The signing key cannot be used, or not be changed; says what to do."""


@dataclass(slots=True)
class Keys:
    """`current` signs; `previous` are those it may follow: the journal decides, by who signed its last
    checkpoint, whether they still have to sign with it. `directory` None: nothing is kept on disk."""

    current: PrivateKey
    previous: list[PrivateKey] = field(default_factory=list)
    directory: Path | None = None
    credential: bool = False

    @property
    def all(self) -> list[PrivateKey]:
        return [self.current, *self.previous]

    def rotate(self) -> tuple[PrivateKey, PrivateKey]:
        """Make the next key, durably; (old, new). The journal says so, signs with both and calls `settle`.
        KeyProblem if that is not for us to do."""
        if self.credential:
            raise KeyProblem(
                f"the signing key is the credential {CREDENTIAL}, which egressd cannot change: put a new key"
                " in front of the old one in that credential (`openssl genpkey -algorithm ed25519`) and"
                " restart egressd; take the old one out after the next checkpoint"
            )
        if self.previous:
            raise KeyProblem("a change of keys is under way; wait for the next checkpoint")
        old, new = self.current, PrivateKey.generate()
        if self.directory is not None:
            _write_key(self.directory, _NEXT, new)
        self.current, self.previous = new, [old]
        return old, new

    def settle(self) -> None:
        """A checkpoint signed by `current` is on disk: former keys are kept no longer. OSError leaves things
        as they were, to be tried again."""
        if self.directory is not None:
            for key in self.previous:
                _keep_public(self.directory, key)
            self._forget_private()
        self.previous = []

    def _forget_private(self) -> None:
        assert self.directory is not None
        if self.credential:
            for name in (_NAME, _NEXT):
                with contextlib.suppress(FileNotFoundError):
                    (self.directory / name).unlink()
        elif (self.directory / _NEXT).exists():
            (self.directory / _NEXT).rename(self.directory / _NAME)
        _sync_directory(self.directory)


def open_keys(directory: Path, credential: bytes | None = None) -> Keys:
    """The key of this machine, made if there is none. `credential`: the content of the systemd credential.
    KeyProblem, BadKey's reason included, if what is there may not be used; OSError as the disk gives it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_directory(directory)
    stored = _stored(directory)
    if credential is not None:
        given = _from_credential(credential)
        known = {key.public for key in given}
        return Keys(
            given[0], [*given[1:], *(k for k in stored if k.public not in known)], directory, credential=True
        )
    if not stored:
        stored = [PrivateKey.generate()]
        _write_key(directory, _NAME, stored[0])
    return Keys(stored[0], stored[1:], directory)


def _from_credential(data: bytes) -> list[PrivateKey]:
    if len(data) > _MOST:
        raise KeyProblem(f"the credential {CREDENTIAL} is too large to be a key")
    try:
        keys = [PrivateKey.load(match) for match in _PEM.findall(data)]
    except BadKey as error:
        raise KeyProblem(f"the credential {CREDENTIAL} cannot be used: {error}") from error
    if not keys:
        raise KeyProblem(
            f"the credential {CREDENTIAL} holds no key; make one with `openssl genpkey -algorithm ed25519`"
        )
    return keys


def _stored(directory: Path) -> list[PrivateKey]:
    """Newest first."""
    with contextlib.suppress(FileNotFoundError):
        (directory / _MAKING).unlink()  # never used: it is renamed once it is whole
    found = [_read_key(directory / name) for name in (_NEXT, _NAME)]
    return [key for key in found if key is not None]


def _read_key(path: Path) -> PrivateKey | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        _check_file(path, os.fstat(descriptor))
        try:
            return PrivateKey.load(file.read(_MOST))
        except BadKey as error:
            raise KeyProblem(
                f"{path} cannot be used: {error}; put the right key back, or move the file away: then a new"
                " key is made and a new log begins"
            ) from error


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise KeyProblem(
            f"{path} is not a file of user {os.geteuid()}: `chown {os.geteuid()} {path}`, if the key is"
            " the right one"
        )
    if status.st_mode & 0o077:
        raise KeyProblem(
            f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o}): `chmod 600 {path}`, and"
            " if somebody may have read it, `egressctl key rotate` afterwards"
        )


def _check_directory(directory: Path) -> None:
    status = directory.stat(follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise KeyProblem(
            f"{directory} is not a directory that only user {os.geteuid()} may write to:"
            f" `chown {os.geteuid()} {directory}; chmod 700 {directory}`"
        )


def _write_key(directory: Path, name: str, key: PrivateKey) -> None:
    """Whole or not at all. FileExistsError if there is one."""
    making = directory / _MAKING
    with contextlib.suppress(FileNotFoundError):
        making.unlink()
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.dump())
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(making, directory / name)  # unlike rename(2), never over another key
    finally:
        making.unlink()
    _sync_directory(directory)


def _keep_public(directory: Path, key: PrivateKey) -> None:
    old = directory / _OLD
    old.mkdir(mode=0o700, exist_ok=True)
    path = old / f"{key.public.fingerprint.removeprefix('sha256:')}.pem"
    path.write_text(key.public.pem(), "ascii")
    for place in (path, old):
        _sync(place)


def _sync_directory(directory: Path) -> None:
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
