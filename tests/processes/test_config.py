"""The configuration: refused whole, with the place and the remedy, or taken whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from egressd.model.errors import PolicyError
from egressd.processes.config import Account, Config, load

GOOD = """
workspaces_dir: /etc/egressd/workspaces
run_dir: /run/egressd
upstream: [udp://192.0.2.53]
hosts: {db.internal.example: [10.20.0.5]}
user: {daemon: '900', warden: '901', audit: '902', inspect: '903', resolve: '904', relay: '905'}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "egressd.yaml"
    path.write_text(text)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert config.upstream == ("udp://192.0.2.53",)
    assert config.accounts() == {
        "daemon": Account(900, 900),
        "warden": Account(901, 901),
        "audit": Account(902, 902),
        "inspect": Account(903, 903),
        "resolve": Account(904, 904),
        "relay": Account(905, 905),
    }
    assert Config.decode(config.encode()) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("\nworkspace_dir: /x\n", 2, "workspace_dir"),
        ("run_dir: run\n", 1, "not an absolute path"),
        ("run_dir: 7\n", 1, "Expected `str`"),
        ("pools: {synthetic4: 198.18.0.0/15}\n", 1, "/16"),
        ("pools: {synthetic4: 198.19.0.0/16}\n", 1, "overlap"),
        ("pools: {synthetic4: nonsense}\n", 1, "nonsense"),
        ("gateway: '../../etc'\n", 1, "gateway"),
        ("uplinks: ['eth0; flush ruleset']\n", 1, "uplinks"),
        ("hosts: {a.example: [no-address]}\n", 1, "no-address"),
        ("hosts: {a.example: []}\n", 1, "no address"),
        ("user: no-such-account-here\n", 1, "systemd-sysusers"),
        ("upstream: udp://192.0.2.53\n", 1, "upstream"),
        ("upstream: ['gopher://192.0.2.53']\n", 1, "gopher"),
        ("upstream: ['udp://resolver.example']\n", 1, "resolver.example"),
        ("- a\n- b\n", 1, "not a mapping"),
        ("a: [\n", 2, "not YAML"),
        ("run_dir: /a\nrun_dir: /b\n", 2, "again"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load(written(tmp_path, text))
    (problem,) = caught.value.problems
    assert (problem.line, says in str(problem)) == (line, True), str(problem)


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        load(written(tmp_path, "run_dir: x\nstate_dir: y\ngateway: '!'\n"))
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3]


def test_a_missing_and_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match="larger than 1 MiB"):
        load(written(tmp_path, "#" * (1 << 21)))
