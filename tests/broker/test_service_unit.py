"""What comes with the service says what the service does: its pages and its unit."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from egressd.broker import main
from egressd.broker.config import BrokerConfig, Inference, ServiceLimits, Tls, WorkspaceConfig, parse
from egressd.broker.web.app import ROUTES
from egressd.broker.web.requests import LIMITS

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "egressd-broker.service"


def page(name: str) -> str:
    return (ROOT / "docs" / "man" / name).read_text()


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def fields(of: type) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]


def test_the_page_has_every_option_and_no_other() -> None:
    said = set(re.findall(r"--[a-z-]+", main.parser().format_help())) - {"--help"}
    documented = re.findall(r"^\.It Fl -([a-z-]+)", page("egressd-broker.8"), re.MULTILINE)
    assert {f"--{name}" for name in documented} == said


def test_the_page_names_no_path_that_is_not_there() -> None:
    named = set(re.findall(r"^\.It Li \w+ (/v1/\S+)", page("egressd-broker.8"), re.MULTILINE))
    assert named <= {path.replace("{id}", "ID") for path in ROUTES}


def test_the_configurations_page_has_every_key() -> None:
    text = page("broker.yaml.5").split(".Sh DESCRIPTION")[1].split(".Sh EXAMPLES")[0]
    keys = re.findall(r"^\.It Cm ([a-z_]+)$", text, re.MULTILINE)
    written = [name for name in fields(BrokerConfig) if name != "scratch_encrypted"]
    inner = ["inferences", "commands"]
    at = written.index("workspaces") + 1
    assert keys == [*written[:at], *inner, *written[at:]]
    for name in (*fields(ServiceLimits), *fields(Tls), *fields(Inference), *fields(WorkspaceConfig), *LIMITS):
        assert re.search(rf"\.(It )?Cm {name}\b|, {name}\b", text), name


def test_its_example_is_sound() -> None:
    example = page("broker.yaml.5").split(".Bd -literal -offset indent\n")[1].split(".Ed")[0]
    config = parse(example.encode(), source="example")
    assert list(config.workspaces) == ["acme"]
    assert yaml.safe_load(example)


def test_what_the_unit_starts_exists_and_has_no_privilege() -> None:
    ((command),) = settings("ExecStart")
    program, *words = command.split()
    assert program == "/usr/bin/egressd-broker"
    assert main.parser().parse_args(words).config == main.DEFAULT_CONFIG
    assert settings("User") == ["egressd-broker"]
    assert settings("CapabilityBoundingSet") == settings("AmbientCapabilities") == [""]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("ProtectKernelTunables", "no", "a sandbox needs a /proc of its own"),
        ("ProtectControlGroups", "no", "the same"),
        ("ProtectKernelLogs", "no", "the same"),
        ("ProcSubset", "all", "the same"),
        ("RestrictNamespaces", "user mnt net pid ipc uts cgroup", "sandboxes are made of them"),
        ("PrivateUsers", "no", "egressd knows it by its user id"),
        ("NotifyAccess", "main", "only the service speaks for itself"),
        ("KillMode", "mixed", "its runners are its own to end"),
    ],
)
def test_directives_that_a_tidy_mind_would_change(name: str, value: str, why: str) -> None:
    assert settings(name) == [value], why


def test_the_watchdog_is_slower_than_what_feeds_it() -> None:
    (watchdog,) = settings("WatchdogSec")
    assert int(watchdog.removesuffix("s")) >= 3 * main._WATCHDOG


def test_a_file_that_an_issuer_needs_is_missed_before_the_start(tmp_path: Path) -> None:
    config = tmp_path / "broker.yaml"
    keys = tmp_path / "keys.json"
    config.write_text(f"issuers: {{idp: {{issuer: 'https://idp.test', audience: a, jwks_file: {keys}}}}}\n")

    def check() -> tuple[int, str]:
        argv = [str(Path(sys.executable).parent / "egressd-broker"), "--config", str(config), "--check"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert check() == (1, f"egressd-broker: {config}: issuers.idp: {keys} is not there\n")
    keys.write_text('{"keys": []}')
    assert check() == (0, f"{config} is sound: 0 workspaces, 1 issuer\n")
