"""A source's directory, and a place for the copies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vault_scene import Source


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Where an ordinary account comes through, too. pytest's own is closed to others by each new session."""
    made = Path(tempfile.mkdtemp(prefix="egressd-vault-"))
    made.chmod(0o755)
    yield made
    subprocess.run(["chmod", "-R", "u+rwX", made], check=True)
    shutil.rmtree(made)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "vault").mkdir()
    return Source(tmp_path / "vault")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.fixture
def root(source: Source) -> Iterator[int]:
    """The source's directory, open."""
    from egressd.vault.beneath import open_root

    number = open_root(bytes(source.root))
    yield number
    os.close(number)


@pytest.fixture(autouse=True)
def no_descriptor_stays() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    # fewer: what an earlier file of tests had left to be collected
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
