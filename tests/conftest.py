"""Fixtures every room's tests may use. The lab is made when the first test asks for it, never before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

# Who was started by nohup, or in the background of a script, ignores these, and so would all its children:
# tests that send one would wait for ever.
for _number, _handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

if TYPE_CHECKING:
    from lab.capture import Capture
    from lab.daemon import Daemon
    from lab.internet import Internet
    from lab.machine import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two namespaces and a wire, no servers yet."""
    from lab.machine import Lab, LabError

    try:
        made = Lab()
    except LabError as error:
        pytest.skip(f"no lab on this machine: {error}")
    with made:
        yield made


@pytest.fixture(scope="session")
def _servers(lab: Lab) -> tuple[Internet, Internet]:
    from lab.internet import start_internet

    return start_internet(lab)


@pytest.fixture
def internet(_servers: tuple[Internet, Internet]) -> Internet:
    """The internet's servers, names as at the start, nothing seen yet."""
    _servers[0].reset()
    return _servers[0]


@pytest.fixture
def host_services(_servers: tuple[Internet, Internet]) -> Internet:
    """The services of the host itself: a fake Ollama, and secrets."""
    _servers[1].reset()
    return _servers[1]


@pytest.fixture
def uplink(lab: Lab) -> Iterator[Capture]:
    """The judge, watching the host's uplink for the length of a test."""
    from lab.capture import Capture

    with Capture(lab) as capture:
        yield capture


@pytest.fixture(scope="module")
def daemon(lab: Lab, _servers: tuple[Internet, Internet]) -> Iterator[Daemon]:
    """One egressd for a module's tests, with the example policy for `acme`; leaves nothing in the lab."""
    from lab.daemon import Daemon

    _servers[0].reset()
    with lab.leaving_nothing(), Daemon(lab) as made:
        yield made


@contextlib.contextmanager
def _daemons(lab: Lab) -> Iterator[Callable[..., Daemon]]:
    """`start(policies={...})` gives a running egressd; each is stopped, and checked to leave nothing."""
    from lab.daemon import Daemon

    made: list[Daemon] = []

    def start(**options: Any) -> Daemon:
        daemon = Daemon(lab, **options)
        made.append(daemon)
        daemon.start()
        return daemon

    with lab.leaving_nothing():
        try:
            yield start
        finally:
            for daemon in reversed(made):
                sys.stderr.write(daemon.log)  # pytest shows it when the test fails
                daemon.stop()


@pytest.fixture
def start_daemon(lab: Lab, _servers: tuple[Internet, Internet]) -> Iterator[Callable[..., Daemon]]:
    """`start_daemon(policies={...})`: an egressd of the test's own."""
    _servers[0].reset()  # names as the last test left them would be learnt, for as long as their TTL says
    with _daemons(lab) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_daemon(lab: Lab, _servers: tuple[Internet, Internet]) -> Iterator[Callable[..., Daemon]]:
    """As `start_daemon`, for all tests of a module."""
    _servers[0].reset()
    with _daemons(lab) as start:
        yield start


@pytest.fixture
def no_leaks(lab: Lab) -> Iterator[None]:
    """The test leaves the lab, and this process's descriptors, as it found them."""
    from lab.machine import open_descriptors

    descriptors = open_descriptors()
    with lab.leaving_nothing():
        yield
    assert open_descriptors() <= descriptors, "descriptors leaked"


@pytest.fixture(scope="session")
def unprivileged() -> list[str]:
    """What to put before a command to run it as a user without rights."""
    from lab.machine import USER

    user = str(USER)
    prefix = [] if os.geteuid() else ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
    probe = [*prefix, "unshare", "--user", "--map-root-user", "--net", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this kernel lets no unprivileged user make namespaces")
    return prefix
