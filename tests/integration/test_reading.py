"""`egressctl audit` and `egressctl watch` on what the daemon itself writes and answers."""

from __future__ import annotations

import pytest

from lab import topology as t
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Process, Result, poll

pytestmark = pytest.mark.kernel

POLICY = """\
workspace: plain
guard: enforce
members: [user:{user}]
allow:
  - {{host: plain.test, ports: [80/tcp], verify: address}}
"""
FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*"]


def test_what_happened_can_be_read_and_watched(daemon: Daemon, internet: Internet) -> None:
    daemon.policy("plain", POLICY.format(user=daemon.lab.user))
    with_follow = daemon.lab.start(
        daemon.ctl_argv("audit", "-w", "plain", "--verdict", "denied", "--follow", "--since", "now")
    )
    holder = daemon.start_sandbox("plain", ["sleep", "60"])
    try:
        for url in ("http://plain.test/", f"http://{t.EVIL4}/", f"http://[{t.EVIL6}]/", "http://evil.test/"):
            daemon.sandbox("plain", [*FETCH, url])
        _audit(daemon)
        _follow(with_follow)
        _watch(daemon)
    finally:
        for process in (holder, with_follow):
            process.kill()
    _who_may(daemon)


def _audit(daemon: Daemon) -> None:
    def denied() -> Result | None:
        result = daemon.ctl("audit", "-w", "plain", "--verdict", "denied").check()
        unlisted = "no rule of the workspace allows this destination [unlisted]"  # the kernel's word, in time
        found = (unlisted, f"{t.EVIL4}:80/tcp", f"[{t.EVIL6}]:80/tcp", "name evil.test (A)")
        return result if all(text in result.out for text in found) else None

    told: Result = poll(denied, what="the denials are on record")
    assert "plain.test:80/" not in told.out  # other tests ask for other ports of it
    lines = daemon.ctl("--json", "audit").check().out
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    written = "".join(path.read_text() for path in sorted(directory.glob("*.jsonl")))
    assert lines and written.startswith(lines)
    assert daemon.ctl("audit", "--host", "**.test", "--json").out.count("evil.test") >= 1


def _follow(following: Process) -> None:
    for wanted in (f"{t.EVIL4}:80/tcp", f"[{t.EVIL6}]:80/tcp", "name evil.test"):
        poll(lambda wanted=wanted: wanted in following.out, what=f"{wanted} is followed")


def _watch(daemon: Daemon) -> None:
    shown = daemon.ctl("watch", "--once", "--interval", "0.2", "-w", "plain").check().out
    assert "enforcing, books balance" in shown
    assert "plain.test" in shown and "sleep" in shown
    assert f"denied  {t.EVIL4}:80/tcp" in shown  # from the journal, which the status document names


def _who_may(daemon: Daemon) -> None:
    """A member sees its own workspaces live, and not the journal."""
    user = daemon.lab.user
    if daemon.lab.single_user:
        return
    refused = daemon.ctl("audit", uid=user)
    assert (refused.status, refused.out) == (125, "")
    assert "use sudo, or `adduser" in refused.err
    shown = daemon.ctl("watch", "--once", "--interval", "0.2", uid=user).check().out
    assert "plain.test" in shown and "tcp" not in shown
