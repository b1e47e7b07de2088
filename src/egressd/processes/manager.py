"""Is the service being restarted, or stopped? Asked of systemd when it has told us to end.

It sends the same signal for both (systemd.kill(5)). For a restart its queue holds a job of that kind for our
unit until we are gone. Whatever cannot be found out counts as a stop: then the sandboxes end.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

__all__ = ["job", "restarts", "unit"]

log = logging.getLogger("egressd")

_WITHIN = 2.0  # seconds for systemctl to answer
_RESTARTS = frozenset({"restart", "try-restart"})  # org.freedesktop.systemd1(5), JobType
_COMMAND = ("systemctl", "list-jobs", "--no-legend", "--plain", "--no-pager")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "SYSTEMD_COLORS": "0"}


def restarts(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the service manager that started us is about to start us again. Takes at most two seconds;
    needs no capability: systemd's own socket is root's, and so are we."""
    if "NOTIFY_SOCKET" not in environment or "INVOCATION_ID" not in environment:
        return False
    try:
        name = unit(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
        done = subprocess.run(
            _COMMAND, capture_output=True, text=True, timeout=_WITHIN, check=False, env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL, errors="replace",
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("whether this is a restart cannot be asked (%s): taken for a stop", error)
        return False
    if done.returncode or not name:
        why = done.stderr.strip()[:200] if name else "our unit is not known"
        log.warning("whether this is a restart cannot be asked (%s): taken for a stop", why)
        return False
    found = job(done.stdout, name)
    log.info("systemd's job for %s is: %s", name, found or "none")
    return found in _RESTARTS


def unit(cgroups: str) -> str:
    """Our service, from /proc/self/cgroup (cgroups(7)); empty if we are in none."""
    for line in cgroups.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers in ("", "name=systemd"):
            found = re.findall(r"/([A-Za-z0-9:_.\\@-]+\.service)(?=/|$)", path)
            if found:  # both kinds may be there, and only one of them systemd's
                return str(found[-1])
    return ""


def job(listing: str, name: str) -> str:
    """The kind of the job that `systemctl list-jobs` tells of for this unit: "restart", "stop", or ""."""
    for line in listing.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == name:
            return words[2]
    return ""
