"""The receipt of one run: a proof of its sandbox alone, fetched when the sandbox has ended."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from egressd.cli.proof import fetch
from egressd.cli.whole_files import write_whole
from egressd.journal.records import stamp
from egressd.model.errors import EgressdError, Refused
from egressd.model.verdicts import Reason

__all__ = ["Receipt"]

_EARLIER = timedelta(seconds=5)  # the window begins a little before the sandbox does


class Receipt:
    """Make it before the run: its window begins then."""

    def __init__(self, name: str, run_dir: str, workspace: str) -> None:
        self._path, self._run_dir, self._workspace = Path(name), run_dir, workspace
        self._since = stamp(datetime.now(UTC) - _EARLIER)

    def check_writable(self) -> None:
        """Refused if the receipt could not be put there."""
        path = self._path
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "it is a directory")
            if path.exists() and not path.is_file():
                path.open("ab").close()
            else:
                tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            text = f"the receipt cannot be written to {path}: {error.strerror or error}; nothing was run"
            raise Refused(Reason.FILES, text) from error

    def fetch(self, link: int) -> str:
        """Write it; what is wrong, or nothing."""
        try:
            data = fetch(self._run_dir, self._workspace, link=link, since=self._since)
            write_whole(self._path, data)
        except (EgressdError, OSError, ValueError) as error:
            return f"there is no receipt: {error}"
        return _doubt(data)


def _doubt(data: bytes) -> str:
    from egressd.journal.verification import verify  # noqa: PLC0415

    broken = verify(data).broken
    return f"the receipt shows that something is wrong: {broken[0].text}" if broken else ""
