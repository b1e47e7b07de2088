"""How long a sandbox takes to start: from the call to the command's first instruction.

The caller is an ordinary user in the machine's own namespaces, as in real life; only egressd itself runs in
the lab. (firejail would, inside the lab's process namespace, believe that it is in a container and make
no sandbox at all.) The program that measures is inside/spawner.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from bench import first, scene
from bench.figures import Figure, Report
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab

__all__ = ["measure", "reach"]

POLICY = """\
workspace: acme
guard: enforce
members: ["user:{uid}"]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
  - local: ollama
"""


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 60,
    at_once: int = 50,
    waves: int = 3,
) -> None:
    user = scene.account()
    policy = POLICY.format(uid=user.pw_uid)
    with scene.stage(given) as (made, _), scene.started(made, {"acme": policy}) as daemon:
        found = _spawner(daemon, user, rounds=rounds, at_once=at_once, waves=waves)
        found["alarms"] = scene.alarms(daemon)
    _tell(report, found)


def _spawner(daemon: Daemon, user: Any, **counts: int) -> dict[str, Any]:
    """Run the measuring program as that user, outside the lab."""
    with scene.shared_directory() as files, reach(daemon) as run_dir:
        orders = {
            "run_dir": f"/proc/self/fd/{run_dir}",
            "files": str(files),
            "inside": first.command(files, seen_as="/work"),
            "outside": first.command(files, seen_as=str(files)),
            **counts,
        }
        done = subprocess.run(
            scene.program("spawner", json.dumps(orders)),
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd=scene.PROJECT,
            env=scene.environment() | {"HOME": "/tmp"},
            pass_fds=[run_dir],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError("the measuring program failed; see above")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextlib.contextmanager
def reach(daemon: Daemon) -> Iterator[int]:
    """egressd's run directory, from outside the lab's mount namespace: a descriptor leads there."""
    _, (descriptor,) = daemon.lab.ask("open", path=daemon.run_dir, flags=os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _tell(report: Report, found: dict[str, Any]) -> None:
    times, cli = found["times"], found["cli"]
    report.add(
        Figure.paired(
            "spawn_cold_vs_bwrap", times["egressd"], times["bwrap"], "ms",
            target=("at most", 4.0), details={"where_the_time_goes_ms": found["steps"]},
        )
    )  # fmt: skip
    if "firejail" in times:
        report.add(
            Figure.paired(
                "spawn_cold_vs_firejail", times["egressd"], times["firejail"], "ms", target=("at most", 0.5)
            )
        )
        report.add(
            Figure.paired("spawn_cold_vs_firejail_noprofile", times["egressd"], times["firejail_bare"], "ms")
        )
    else:
        report.add(Figure.alone("spawn_cold_vs_firejail", times["egressd"], "ms", details=found["without"]))
    report.add(Figure.paired("spawn_cli_vs_bwrap", cli["egressctl"], cli["bwrap"], "ms"))
    alarms = {"alarms": found["alarms"]}
    report.add(Figure.alone("spawn_50_concurrent_p99", found["concurrent"], "ms", of="p99", details=alarms))
    report.add(Figure.alone("spawn_50_concurrent_rate", found["rates"], "sandboxes/s"))
