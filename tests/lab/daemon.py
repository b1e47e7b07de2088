"""egressd in the lab: configured, started, asked, stopped; and commands run in its sandboxes.

with Daemon(lab, policies={"acme": POLICY}) as daemon:
    daemon.sandbox("acme", ["curl", "https://eu.api.openai.test/"])
    daemon.policy("acme", OTHER)      # write the file and apply it
    daemon.counters("acme")
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from egressd.model.identities import Link
from egressd.sandbox.control import Control
from lab import topology
from lab.machine import VENV, Lab, LabError, Process, Result, poll

__all__ = ["EXAMPLE", "Daemon"]

# Accounts of the daemon in the lab: plain numbers; sandboxes run as machine.USER.
ACCOUNTS = {
    "daemon": "4101",
    "warden": "4102",
    "audit": "4103",
    "inspect": "4104",
    "resolve": "4105",
    "relay": "4106",
    "metrics": "4107",
    "api": "4108",
    "custody": "4109",
}
UPSTREAM = (f"udp://{topology.DNS4}", f"udp://[{topology.DNS6}]")
START_WITHIN, STOP_WITHIN = 30.0, 20.0  # seconds

EXAMPLE = """\
workspace: acme
guard: enforce                    # nothing leaves but what is listed below
{members:<34}# who may spawn sandboxes here
allow:
  - host: eu.api.openai.test      # an API, on 443/tcp: TLS must ask for this very name
  - host: "*.search.test"         # names one label longer, admitted when first asked for
  - local: ollama                 # 127.0.0.1:11434 of this machine
wildcards:
  sandbox: {{names: 3}}             # how many of those a sandbox may ask for
"""


class Daemon:
    """`egressd` in the foreground in lab-host. The log is kept and shown when something fails."""

    def __init__(
        self,
        lab: Lab,
        *,
        policies: Mapping[str, str] | None = None,
        upstream: Sequence[str] = UPSTREAM,
        gateway: str = "egressd",
        **config: Any,
    ) -> None:
        self.lab = lab
        self.gateway = gateway
        self.run_dir = f"/run/{gateway}"
        self.directory = f"daemon-{gateway}"
        for name in ("workspaces", "state", "residency"):
            lab.path(f"{self.directory}/{name}").mkdir(parents=True, exist_ok=True)
        for stale in lab.path(f"{self.directory}/workspaces").iterdir():
            stale.unlink()  # an earlier daemon's in this lab: its names would be looked up, and seen
        for name, text in (policies or {"acme": example(lab)}).items():
            self.write_policy(name, text)
        settings = {
            "workspaces_dir": lab.inside(f"{self.directory}/workspaces"),
            "run_dir": self.run_dir,
            "state_dir": lab.inside(f"{self.directory}/state"),
            "residency_dir": lab.inside(f"{self.directory}/residency"),
            "upstream": list(upstream),
            "user": "same" if lab.single_user else ACCOUNTS,
            "gateway": gateway,
        } | config
        self.config_file = lab.inside(f"{self.directory}/egressd.yaml")
        lab.path(f"{self.directory}/egressd.yaml").write_text(yaml.safe_dump(settings))
        self.process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(self.log, file=sys.stderr)
        self.stop()

    # ---- life

    def start(self) -> None:
        """Return when it says that it enforces; LabError with its log if it ends or takes too long."""
        process = self.process = self.lab.start(self.argv)

        def ready() -> bool:
            if process.status() is not None:
                process.drain()
                raise LabError(f"egressd ended with {process.status()}:\n{self.log}")
            return "ready\n" in process.out

        try:
            poll(ready, timeout=START_WITHIN)
        except LabError:
            process.kill()
            log, self.process = self.log, None
            self.lab.run(self._dismantling)
            raise LabError(f"egressd did not get ready:\n{log}") from None

    @property
    def argv(self) -> list[str]:
        """As its unit would run it: before those it guards, when processors are short."""
        first = [] if self.lab.single_user else ["/usr/bin/nice", "-n", "-10"]
        return [*first, str(VENV / "bin" / "egressd"), "--config", self.config_file]

    def leave(self) -> None:
        """End it as for a restart: sandboxes go on, and the next `start` takes them over."""
        assert self.process is not None
        self.process.signal(signal.SIGUSR1)
        self.process.wait(STOP_WITHIN)
        self.process = None

    def stop(self, *, dismantle: bool = True) -> None:
        """End it as systemd would, then take away the gateway, which outlives a plain stop on purpose."""
        if self.process is None:
            return
        self.process.signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_WITHIN)
        except LabError:
            self.process.kill()
            raise
        finally:
            self.process = None
            if dismantle:
                self.dismantle()

    def dismantle(self) -> None:
        self.lab.run(self._dismantling).check()

    @property
    def _dismantling(self) -> list[str]:
        return [str(VENV / "bin" / "egressd"), "--config", self.config_file, "--dismantle"]

    def kill(self) -> None:
        """As power loss would, but for the kernel: every process at once, nothing told."""
        assert self.process is not None
        self.process.kill()
        self.process = None
        poll(lambda: not self.pids(), what="egressd's processes end with their supervisor")

    @property
    def log(self) -> str:
        return "" if self.process is None else self.process.err + self.process.out

    def pids(self) -> dict[str, int]:
        """Name on its card -> pid, of the daemon's processes; the supervisor too."""
        found = {}
        for pid, words in self.lab.processes().items():
            _, _, rest = words.partition(" -m egressd.processes.")
            if rest and f'"{self.run_dir}"' in words:
                found[rest.split(" ")[0]] = pid
        if self.process is not None and self.process.status() is None:
            found["supervisor"] = self.process.pid
        return found

    # ---- policies

    def write_policy(self, workspace: str, text: str) -> None:
        """Only the file, whole or not at all."""
        path = self.lab.path(f"{self.directory}/workspaces/{workspace}.yaml")
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(path)

    def policy(self, workspace: str, text: str | None) -> Result:
        """Write the file (None: remove it) and have the daemon apply it."""
        if text is None:
            self.lab.path(f"{self.directory}/workspaces/{workspace}.yaml").unlink()
        else:
            self.write_policy(workspace, text)
        return self.ctl("policy", "apply").check()

    # ---- asking

    def ctl_argv(self, *words: str) -> list[str]:
        return [str(VENV / "bin" / "egressctl"), "--run-dir", self.run_dir, *words]

    def ctl(self, *words: str, uid: int | None = None, **options: Any) -> Result:
        """egressctl in lab-host, as root of the lab or as `uid`."""
        return self.lab.run(self.ctl_argv(*words), uid=uid, **options)

    def json(self, *words: str) -> Any:
        """What egressctl answers as a document; counters that do not balance are still a document."""
        result = self.ctl("--json", *words)
        if not result.out:
            raise LabError(f"egressctl {' '.join(words)}: {result.err}\n{self.log}")
        return json.loads(result.out)

    def ask(self, what: str, *, workspace: str | None = None) -> Any:
        """The same document as `json`, over the control socket itself: milliseconds, also on a busy machine,
        where starting egressctl takes a good part of a second. For what is asked against the clock."""
        with Control(f"/proc/{self.lab.keeper_pid}/root{self.run_dir}") as control:
            return control.ask(what, workspace=workspace)

    def sandbox_links(self) -> list[str]:
        """The gateway's ends of the sandboxes' links, as quickly."""
        table = Path(f"/proc/{self.lab.keeper_pid}/root/proc/{self.pids()['warden']}/net/dev").read_text()
        names = [line.partition(":")[0].strip() for line in table.splitlines()[2:]]
        return [name for name in names if Link.of_device(name) is not None]

    def counters(self, workspace: str) -> dict[str, Any]:
        """The workspace's part of `egressctl --json counters`."""
        document = self.json("counters", workspace)
        return next(found for found in document["workspaces"] if found["workspace"] == workspace)

    # ---- sandboxes

    def sandbox_argv(self, workspace: str, argv: Sequence[str], *options: str) -> list[str]:
        return self.ctl_argv("run", "-w", workspace, *options, "--", *argv)

    def sandbox(
        self, workspace: str, argv: Sequence[str], *options: str, uid: int | None = None, **more: Any
    ) -> Result:
        """Run a command in a sandbox, as the lab's unprivileged user unless said otherwise."""
        return self.lab.run(
            self.sandbox_argv(workspace, argv, *options), uid=self.lab.user if uid is None else uid, **more
        )

    def namespace_of(self, sandbox: Process) -> str:
        """The network namespace of a sandbox from `start_sandbox`, for `where=`."""
        return self.lab.namespace_below(sandbox.pid)

    def start_sandbox(
        self, workspace: str, argv: Sequence[str], *options: str, uid: int | None = None, **more: Any
    ) -> Process:
        """The same, left running."""
        return self.lab.start(
            self.sandbox_argv(workspace, argv, *options), uid=self.lab.user if uid is None else uid, **more
        )


def example(lab: Lab) -> str:
    """The policy the demo and the shell start with."""
    return EXAMPLE.format(members=f"members: [user:{lab.user}]")
