"""systemd's own programs read our files; and they agree with the program they start."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from egressd.processes import supervisor
from egressd.processes.config import Config

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "egressd.service"
FOUNDATION = UNIT.with_name("egressd-foundation.service")


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def settings(name: str, unit: Path = UNIT) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["egressd", "egressd-foundation", "egressd-broker"])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, name: str) -> None:
    unit = tmp_path / f"{name}.service"
    written = UNIT.with_name(unit.name).read_text()
    unit.write_text(
        re.sub("^ExecStart=[^ ]+", "ExecStart=/bin/true", written, flags=re.MULTILINE)
    )  # not here
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_units_start_exists() -> None:
    parser = supervisor._parser()
    for command in (*settings("ExecStart", FOUNDATION), *settings("ExecStart")):
        program, *words = command.split()
        assert program == "/usr/bin/egressd"
        parser.parse_args(words)


def test_the_foundation_is_laid_where_the_host_sees_its_pin() -> None:
    """systemd 252 gives a command of a unit that needs a mount namespace one of its own, be it ExecStartPre=+
    as well: what is mounted there the host never sees. So none of these, which need one (systemd.exec(5))."""
    text = FOUNDATION.read_text()
    named = {line.partition("=")[0] for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)}
    harmless = {"ProtectClock"}
    assert {name for name in named if re.match("Protect|Private|Bind|ReadOnly|ReadWrite|Root|Temporary|Mount"
            "|Inaccessible|Exec.*Paths|DynamicUser|ProcSubset", name)} == harmless  # fmt: skip
    assert settings("ExecStartPre") == []
    assert settings("Wants") == ["egressd-foundation.service"]
    assert "egressd-foundation.service" in settings("After")[0].split()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("ProtectKernelTunables", "no", "sysctls of the gateway are checked at every start"),
        ("ProcSubset", "all", "pid hides /proc/sys"),
        ("RestrictNamespaces", "net", "yes breaks setns"),
        ("Restart", "always", "permission must be able to shrink"),
        ("NotifyAccess", "main", "only the supervisor speaks for egressd"),
        ("Type", "notify", "ready means enforcing"),
        ("RuntimeDirectoryPreserve", "yes", "link numbers are never used twice"),
    ],
)
def test_directives_that_a_tidy_mind_would_change(name: str, value: str, why: str) -> None:
    assert settings(name) == [value], why


def test_the_watchdog_is_slower_than_what_feeds_it() -> None:
    (watchdog,) = settings("WatchdogSec")
    assert int(watchdog.removesuffix("s")) > supervisor.HUNG_AFTER


def test_accounts_and_directories_are_those_of_the_default_configuration(tmp_path: Path) -> None:
    """Made for real, in an empty root: systemd-sysusers first, then systemd-tmpfiles."""
    (tmp_path / "etc").mkdir()
    root = f"--root={tmp_path}"
    sysusers = [tool("systemd-sysusers"), root, ROOT / "systemd" / "egressd.sysusers"]
    subprocess.run(sysusers, check=True, capture_output=True)
    accounts = {line.split(":")[0] for line in (tmp_path / "etc" / "passwd").read_text().splitlines()}
    user = Config().user
    assert accounts == {
        user,
        *(
            f"{user}-{role}"
            for role in ("warden", "custody", "resolve", "relay", "inspect", "audit", "metrics", "api")
        ),
        f"{user}-broker",  # which is no process of egressd's
    }
    tmpfiles = [tool("systemd-tmpfiles"), root, "--create", ROOT / "systemd" / "egressd.tmpfiles"]
    done = subprocess.run(tmpfiles, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    config = Config()
    journal = f"{config.state_dir}/journal"
    for directory in (config.run_dir, config.workspaces_dir, config.residency_dir, journal):
        assert (tmp_path / directory.lstrip("/")).is_dir()
    assert (tmp_path / "etc/egressd/workspaces").stat().st_mode & 0o007 == 0
