"""Where metrics are offered: sockets made by the supervisor, for whom, and what keeps it from starting."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from egressd.processes.cards import CARDS
from egressd.processes.config import Config
from egressd.processes.supervisor import Child, Supervisor, order
from lab.daemon import ACCOUNTS, Daemon
from lab.machine import Lab, LabError, poll

PORT = 9464


@pytest.mark.parametrize(
    ("missing", "announced"), [("exporter", True), ("warden", False), ("auditor", False)]
)
def test_whether_egressd_enforces_does_not_hang_on_the_exporter(
    missing: str, announced: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does the watchdog: an exporter that cannot live must not have all of egressd started anew."""
    supervisor = object.__new__(Supervisor)
    supervisor.config = Config(metrics=f"127.0.0.1:{PORT}")
    supervisor.stopping = supervisor.announced = False
    supervisor.children = {
        name: Child(CARDS[name], ready=name != missing) for name in order(supervisor.config)
    }
    supervisor._look_after()
    assert supervisor.announced == announced
    assert capsys.readouterr().out == ("ready\n" if announced else "")


@pytest.mark.kernel
def test_without_metrics_there_is_no_exporter(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    assert "exporter" not in daemon.pids()
    assert "exporter" not in {process["name"] for process in daemon.json("status")["processes"]}


@pytest.mark.kernel
def test_a_unix_socket_is_for_one_group(start_daemon: Callable[..., Daemon], lab: Lab) -> None:
    if lab.single_user or lab.rootless:
        pytest.skip("there is one user only")
    path = "/run/egressd/metrics.sock"
    daemon = start_daemon(metrics=f"unix:{path}")
    poll(lambda: "exporter" in daemon.pids(), what="the exporter")
    argv = ["curl", "-sS", "--max-time", "10", "--unix-socket", path, "http://egressd/metrics"]
    poll(lambda: "egressd_up 1.0" in lab.run(argv).out, what="root reads")
    assert lab.run(argv, uid=lab.user).status == 7
    group = [int(ACCOUNTS["metrics"])]
    assert "egressd_up 1.0" in lab.run(argv, uid=lab.user, groups=group).check().out
    shown = lab.run(["stat", "-c", "%a %u %g %F", path]).check().out
    assert shown.split() == ["660", "0", ACCOUNTS["metrics"], "socket"]


@pytest.mark.kernel
def test_an_address_that_is_taken_or_a_file_in_the_way_is_told(lab: Lab, no_leaks: None) -> None:
    taken = lab.socket(socket.AF_INET6)
    with taken:
        taken.bind(("::1", PORT))
        taken.listen()
        with pytest.raises(
            LabError, match=r"metrics cannot be offered at \[::1\]:9464: Address already in use"
        ):
            Daemon(lab, metrics=f"[::1]:{PORT}").start()
    file = lab.path("not-a-socket")
    file.write_text("mine")
    with pytest.raises(LabError, match="is there already and is not a socket"):
        Daemon(lab, metrics=f"unix:{lab.inside('not-a-socket')}").start()
    assert file.read_text() == "mine"
    file.unlink()
