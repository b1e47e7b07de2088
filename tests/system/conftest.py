"""A machine to install egressd on. One for all tests of a file, which stand in the order of a machine's
life."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from container import Container, make_tree
from witness import changes, witness

from lab.internet import Internet, start_internet
from lab.machine import PROJECT, Lab


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure comes what the machine's log says."""
    report = yield
    debian = getattr(item, "funcargs", {}).get("debian")
    if report.failed and debian is not None and debian.running:
        log = debian.run(["journalctl", "--no-pager", "-n", "30", "-o", "short-precise"]).out
        report.sections.append(("the machine's log", log))
    return report


@pytest.fixture(scope="session")
def package() -> Path:
    """The package to install: EGRESSD_DEB, or the latest that `make deb` has made."""
    if given := os.environ.get("EGRESSD_DEB"):
        return Path(given)
    made = sorted(Path(PROJECT, "dist").glob("egressd_*.deb"), key=lambda path: path.stat().st_mtime)
    if not made:
        pytest.fail("there is no dist/egressd_*.deb: make deb")
    return made[-1]


@pytest.fixture(scope="session")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package again, as version 99."""
    directory = tmp_path_factory.mktemp("newer")
    subprocess.run(["dpkg-deb", "-R", package, directory / "tree"], check=True)
    control = directory / "tree" / "DEBIAN" / "control"
    lines = control.read_text().splitlines()
    lines = ["Version: 99" if line.startswith("Version:") else line for line in lines]
    control.write_text("\n".join(lines) + "\n")
    made = directory / "newer.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", directory / "tree", made], check=True, capture_output=True)
    shutil.rmtree(directory / "tree")
    return made


@pytest.fixture(scope="module")
def untouched() -> Iterator[None]:
    """Whatever happens, this machine is as it was."""
    before = witness()
    yield
    assert changes(before, witness()) == []


@pytest.fixture(scope="module")
def outside(untouched: None) -> Iterator[tuple[Lab, Internet]]:
    """What the machine is connected to."""
    if os.getuid() != 0 or shutil.which("systemd-nspawn") is None or shutil.which("debootstrap") is None:
        pytest.fail("needs root, systemd-nspawn and debootstrap: make setup-system")
    with Lab() as lab:
        yield lab, start_internet(lab)[0]


@pytest.fixture(scope="module")
def debian(outside: tuple[Lab, Internet]) -> Iterator[Container]:
    """Debian 12, running, without egressd."""
    make_tree()
    with Container(outside[0]) as container:
        assert container.boot() == "running", container.run(["systemctl", "--failed"]).out
        yield container


@pytest.fixture
def internet(outside: tuple[Lab, Internet]) -> Internet:
    outside[1].forget()
    return outside[1]
