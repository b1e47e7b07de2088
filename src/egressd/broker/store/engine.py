"""Reaching the database: SQLite by default, PostgreSQL by URL. Opening it safely, and failing plainly.

Whoever can write to the store decides who reads what. So a database file is created for its owner alone, and
one that others could have written to, or could put another file in place of, is not opened.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from egressd.model.errors import Refused, Unfit
from egressd.model.verdicts import Reason

__all__ = ["FilePlace", "engine_for", "parsed", "place_of", "plainly", "reading", "writing"]

BUSY: Final = 5.0  # seconds to wait for another writer, or for a connection
_POSTGRES: Final = "postgresql+psycopg"
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH
_REMEDY: Final = "write sqlite:////ABSOLUTE/PATH or postgresql+psycopg://USER@HOST/DATABASE"


def parsed(url: str) -> URL:
    """`Unfit` for anything but the two kinds there are. Never repeats what may be a password."""
    try:
        found = make_url(url)
    except (ArgumentError, ValueError, TypeError):
        raise Unfit("the store's URL is not one", _REMEDY) from None
    if found.drivername == "postgresql":  # SQLAlchemy would take it for another driver's
        found = found.set(drivername=_POSTGRES)
    if found.drivername not in ("sqlite", _POSTGRES):
        raise Unfit(f"{found.drivername[:40]!r} is no database that the store can be kept in", _REMEDY)
    if found.drivername == "sqlite" and not _is_plain_path(found):
        raise Unfit("the store needs a file of its own", _REMEDY)
    return found


def _is_plain_path(url: URL) -> bool:
    return bool(
        url.database
        and url.database.startswith("/")
        and "\0" not in url.database
        and not (url.query or url.host or url.username)
    )


class FilePlace:
    """Where a database file is, and which it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(self._safe())
        _check_directory(path.parent)

    def _safe(self) -> os.stat_result:
        # Created before SQLite sees it: SQLite would create it as the umask says.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise unavailable(f"{self.path} cannot be opened: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
            if found.st_size == 0 and os.geteuid() == 0:
                _give(descriptor, self.path.parent)
            return _checked(self.path, os.fstat(descriptor))
        finally:
            os.close(descriptor)

    @property
    def owner(self) -> int:
        return self.path.lstat().st_uid

    def check(self) -> None:
        """`Refused` if another file stands there by now: what is open is then nobody's word any more."""
        try:
            same = _identity(_checked(self.path, self.path.lstat())) == self._identity
        except OSError:
            same = False
        if not same:
            raise unavailable(f"{self.path} is not the file any more that was opened: restart what uses it")


def place_of(url: URL) -> FilePlace | None:
    """None for a database that is not a file of this machine."""
    return FilePlace(Path(url.database or "")) if url.drivername == "sqlite" else None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _give(descriptor: int, directory: Path) -> None:
    """A store that root makes belongs to the account whose directory it is in: the broker's, which could not
    open it otherwise."""
    of = directory.stat()
    os.fchown(descriptor, of.st_uid, of.st_gid)
    os.fchmod(descriptor, 0o600)


def _checked(path: Path, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise unavailable(f"{path} is not a regular file: name the store's file itself")
    if found.st_mode & _WRITABLE:
        raise unavailable(f"others may write to {path}, so anybody could give themselves a role: chmod 600")
    return found


def _check_directory(directory: Path) -> None:
    if directory.stat().st_mode & _WRITABLE:  # sticky, too: SQLite believes a log that lies beside its file
        raise unavailable(f"others may write to {directory}, so anybody could swap the store: chmod 700")


def unavailable(text: str) -> Refused:
    return Refused(Reason.UNAVAILABLE, f"the store: {text}")


def engine_for(url: URL) -> Engine:
    """Connections are made when they are first needed, at most fifteen at a time."""
    try:
        if url.drivername == "sqlite":
            return _sqlite(url)
        return create_engine(
            url,
            connect_args={
                "connect_timeout": int(BUSY),
                "options": "-c lock_timeout=5s -c statement_timeout=30s -c timezone=UTC",
            },
            pool_pre_ping=True,
            pool_timeout=BUSY,
        )
    except (NoSuchModuleError, ImportError) as error:
        raise unavailable(f"{error}: pip install 'egressd[postgres]'") from error


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY, "check_same_thread": False}, pool_timeout=BUSY)
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by a guess of the driver's
    for pragma in (
        "journal_mode=WAL",  # readers do not wait for a writer
        "synchronous=FULL",  # a role that was taken away stays so after a power cut; NORMAL may lose commits
        "foreign_keys=ON",
        "trusted_schema=OFF",  # nothing in the file itself calls functions
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE: a writer waits for its turn now. One that has read first could not wait any more
    # (SQLITE_BUSY at once), since what it has read is old by then.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Whatever a database can fail with is `Refused(UNAVAILABLE)`: never an empty answer."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, UnicodeError, OverflowError) as error:
        raise unavailable(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Of the driver's own words the first line: SQLAlchemy adds the statement and who it was about."""
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0][:300] if said else type(error).__name__


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One state of the database, whatever is written meanwhile."""
    options: dict[str, Any] = {}
    if engine.dialect.name == "postgresql":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with plainly(), engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Committed at the end; whatever is raised inside leaves everything as it was."""
    with plainly(), engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection
