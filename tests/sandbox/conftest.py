"""The stand-in for egressd, for the tests of this directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.stand_in import Gateway, gateway_named


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    if os.getuid() != 0:
        pytest.skip("the stand-in for egressd makes links: root only")
    with gateway_named(f"sb-{os.getpid()}") as made:
        yield made


@pytest.fixture
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of the caller's, to be shown to sandboxes."""
    with tempfile.TemporaryDirectory(prefix="egressd-files-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
