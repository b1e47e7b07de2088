"""The configuration: refused whole, with the place and the remedy, or taken whole."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from egressd.model.errors import PolicyError
from egressd.processes import supervisor
from egressd.processes.config import Account, Config, ListenAddress
from egressd.processes.config_file import load

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
        "custody": Account(901, 901),
        "audit": Account(902, 902),
        "inspect": Account(903, 903),
        "resolve": Account(904, 904),
        "relay": Account(905, 905),
    }
    assert Config.decode(config.encode()) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "uids"),
    [
        ("brokers: ['4001', root]\n", {0, 4001}),
        ("brokers: []\n", set()),
        ("", {4001}),  # the account of that name
    ],
)
def test_brokers_are_accounts_by_name_or_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, uids: set[int]
) -> None:
    monkeypatch.setattr("egressd.processes.config._BROKER", "4001")
    config = load(written(tmp_path, text))
    assert config.broker_uids() == uids
    assert Config.decode(config.encode()).broker_uids() == uids


def test_without_an_account_for_it_there_is_no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egressd.processes.config._BROKER", "no-such-account-here")
    assert Config().broker_uids() == frozenset()
    gone = Config(brokers=("no-such-account-here", "4001"))  # it was there when the file was read
    assert gone.broker_uids() == {4001}


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
        ("brokers: [no-such-account-here]\n", 1, "there is no account 'no-such-account-here'"),
        ("brokers: egressd-broker\n", 1, "Expected `array"),
        ("brokers: [4001]\n", 1, "Expected `str`"),
        ("upstream: udp://192.0.2.53\n", 1, "upstream"),
        ("upstream: ['gopher://192.0.2.53']\n", 1, "gopher"),
        ("upstream: ['udp://resolver.example']\n", 1, "resolver.example"),
        ("metrics: 0.0.0.0:9464\n", 1, "put a proxy in front"),
        ("metrics: '[::]:9464'\n", 1, "put a proxy in front"),
        ("metrics: 192.0.2.7:9464\n", 1, "put a proxy in front"),
        ("metrics: '[2001:db8::7]:9464'\n", 1, "put a proxy in front"),
        ("metrics: '[::ffff:127.0.0.1]:9464'\n", 1, "put a proxy in front"),
        ("metrics: '[fe80::1]:9464'\n", 1, "put a proxy in front"),
        ("metrics: localhost:9464\n", 1, "127.0.0.1:9464"),
        ("metrics: ':9464'\n", 1, "127.0.0.1:9464"),
        ("metrics: 127.0.0.1\n", 1, "127.0.0.1:9464"),
        ("metrics: ::1:9464\n", 1, "[::1]:9464"),
        ("metrics: 127.0.0.1:0\n", 1, "0 is not a port"),
        ("metrics: 127.0.0.1:65536\n", 1, "65536 is not a port"),
        ("metrics: 127.0.0.256:9464\n", 1, "127.0.0.256"),
        ("metrics: true\n", 1, "Expected `str | null`"),
        ("metrics: unix:metrics.sock\n", 1, "absolute path"),
        ("metrics: unix:/run/egressd/\n", 1, "absolute path"),
        (f"metrics: unix:/{'x' * 107}\n", 1, "107 bytes"),
        (GOOD + "metrics: 127.0.0.1:9464\n", 7, "metrics: '906'"),
        ("metrics: 127.0.0.1:9464\nuser: daemon\n", 2, "systemd-sysusers"),
        ("api: 0.0.0.0:8000\n", 1, "come in by ssh"),
        ("api: 192.0.2.7:8000\n", 1, "come in by ssh"),
        ("api: '[::]:8000'\n", 1, "come in by ssh"),
        ("api: localhost:8000\n", 1, "127.0.0.1:8000"),
        ("api: unix:api.sock\n", 1, "/run/egressd/api.sock"),
        (GOOD + "api: 127.0.0.1:8000\n", 7, "api: '907'"),
        ("api: 127.0.0.1:8000\nuser: daemon\n", 2, "systemd-sysusers"),
        ("api: unix:/run/egressd/control.sock\n", 1, "is the path of the control socket, too"),
        ("metrics: unix:/run/egressd/../egressd//control.sock\n", 1, "of the control socket, too"),
        ("run_dir: /run/e\napi: unix:/run/e/control.sock\n", 2, "of the control socket, too"),
        ("metrics: unix:/run/e.sock\napi: unix:/run/e.sock\n", 2, "/run/e.sock is the path of metrics, too"),
        ("residency_dir: here\n", 1, "absolute path"),
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


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("127.0.0.1:9464", ListenAddress(IPv4Address("127.0.0.1"), 9464, "")),
        ("127.8.9.1:65535", ListenAddress(IPv4Address("127.8.9.1"), 65535, "")),
        ("[::1]:9464", ListenAddress(IPv6Address("::1"), 9464, "")),
        ("unix:/run/egressd/metrics.sock", ListenAddress(None, 0, "/run/egressd/metrics.sock")),
    ],
)
def test_metrics_are_read_at_the_loopback_or_a_socket(
    tmp_path: Path, text: str, where: ListenAddress
) -> None:
    user = GOOD.replace("}\n", ", metrics: '906'}\n").replace("[10.20.0.5], metrics: '906'}", "[10.20.0.5]}")
    config = load(written(tmp_path, f"{user}metrics: '{text}'\n"))
    assert config.metrics_address == where
    assert config.accounts()["metrics"] == Account(906, 906)
    assert supervisor.order(config) == (*supervisor.ORDER, "custodian", "exporter")


def test_the_api_answers_at_the_loopback_or_a_socket(tmp_path: Path) -> None:
    user = GOOD.replace("}\n", ", api: '907'}\n").replace("[10.20.0.5], api: '907'}", "[10.20.0.5]}")
    for text, path in (("127.0.0.1:8000", ""), ("[::1]:8000", ""), ("unix:/run/egressd/a", "/run/egressd/a")):
        config = load(written(tmp_path, f"{user}api: '{text}'\n"))
        assert config.api_address is not None and config.api_address.path == path
        assert config.accounts()["api"] == Account(907, 907)
        assert supervisor.order(config) == (*supervisor.ORDER, "custodian", "api")


def test_without_metrics_their_account_is_not_asked_for(tmp_path: Path) -> None:
    """A configuration that is older than metrics goes on working."""
    config = load(written(tmp_path, GOOD))
    assert config.metrics_address is None
    assert "metrics" not in config.accounts()
    assert supervisor.order(config) == (*supervisor.ORDER, "custodian")


def test_without_the_custodian_s_account_the_warden_s_is_taken(tmp_path: Path) -> None:
    """A list of accounts that is older than the custodian is good enough: both hold the same capability."""
    config = load(written(tmp_path, GOOD))
    assert config.accounts()["custody"] == config.accounts()["warden"]
    named = load(written(tmp_path, GOOD.replace("warden: ", "custody: '909', warden: ")))
    assert named.accounts()["custody"] == Account(909, 909)
    assert named.accounts()["warden"] == config.accounts()["warden"]


def test_nobody_has_a_channel_to_the_exporter() -> None:
    assert not any("exporter" in relation for relation in supervisor.RELATIONS)
