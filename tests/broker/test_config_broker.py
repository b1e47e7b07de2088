"""broker.yaml: what it means, and every problem with it at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from egressd.broker.config import BrokerConfig, Inference, Listen, ServiceLimits, Tls, load, parse
from egressd.broker.runners.jobs import Limits
from egressd.model.errors import PolicyError

ISSUERS = "issuers: {idp: {issuer: 'https://idp.example/', audience: app}}\n"
WHOLE = """\
listen: https://127.0.0.1:8443
tls: {certificate: /etc/egressd/broker.pem, key: /etc/egressd/broker.key, client_ca: /etc/egressd/clients.pem}
store: postgresql://db.internal/egressd
run_dir: /run/egressd
issuers:
  idp: {issuer: 'https://idp.example/', audience: app}
levels: [low, high]
workspaces:
  acme:
    inferences:
      default:
        command: [python3, /opt/acme/infer.py, --top, 3]
        bind_ro: [/opt/acme]
        environment: {MODE: fast, DEPTH: 3, OPENAI_API_KEY: secret://env/KEY, OTHER: secret://file/etc/key}
        network: policy
        limits: {wall: 60s, cpu: 30s, memory: 2GiB, processes: 64, file_size: 1MiB, output: 1MiB,
                 egress_bytes: 5MiB, connections: 20, tokens: 4000, cost: 0.25}
      closed: {command: ['true'], network: none}
    commands: true
    limits: {wall: 10s}
    network: none
  empty: {}
limits: {rate: 30/min, per_user: 2, at_once: 8, candidates: 1000, files: 50, bytes: 1GiB, body: 8MiB,
         output: 1MiB, kept: 64MiB}
scratch: {directory: /var/lib/egressd-broker/scratch, encrypted: true}
keep: 10m
"""


def told(text: str) -> list[str]:
    with pytest.raises(PolicyError) as error:
        parse(text.encode(), source="broker.yaml")
    return [str(problem) for problem in error.value.problems]


def test_a_whole_file() -> None:
    config = parse(WHOLE.encode(), source="broker.yaml")
    assert config.listen == Listen("", "127.0.0.1", 8443)
    assert str(config.listen) == "https://127.0.0.1:8443"
    assert config.tls == Tls("/etc/egressd/broker.pem", "/etc/egressd/broker.key", "/etc/egressd/clients.pem")
    assert config.store == "postgresql://db.internal/egressd"
    assert [issuer.name for issuer in config.issuers] == ["idp"]
    assert config.levels == ("low", "high")
    acme = config.workspaces["acme"]
    assert acme.inferences["default"] == Inference(
        ("python3", "/opt/acme/infer.py", "--top", "3"),
        ("/opt/acme",),
        {"MODE": "fast", "DEPTH": "3", "OPENAI_API_KEY": "secret://env/KEY", "OTHER": "secret://file/etc/key"},
        "policy",
        Limits(
            wall=60, cpu=30, memory=2 << 30, processes=64, file_size=1 << 20, output=1 << 20, egress=5 << 20,
            connections=20, tokens=4000, cost=0.25,
        ),
    )  # fmt: skip
    bounded = Limits(memory=4 << 30, processes=256)
    assert acme.inferences["closed"] == Inference(("true",), network="none", limits=bounded)
    assert (acme.commands, acme.network) == (True, "none")
    assert acme.limits == Limits(wall=10, memory=4 << 30, processes=256)
    assert config.workspaces["empty"].inferences == {}
    assert config.limits == ServiceLimits((30, 60.0), 2, 8, 1000, 50, 1 << 30, 8 << 20, 1 << 20, 64 << 20)
    assert (config.scratch, config.scratch_encrypted) == ("/var/lib/egressd-broker/scratch", True)
    assert config.keep == 600


@pytest.mark.parametrize(
    ("written", "memory", "processes"),
    [
        ("", 4 << 30, 256),
        ("limits: {}", 4 << 30, 256),
        ("limits: {wall: 60s}", 4 << 30, 256),
        ("limits: {memory: 64GiB}", 64 << 30, 256),
        ("limits: {processes: 2000}", 4 << 30, 2000),
        ("limits: {memory: none}", None, 256),
        ("limits: {memory: none, processes: none}", None, None),
    ],
)
def test_an_inference_is_bounded_unless_it_is_written_that_it_is_not(
    written: str, memory: int | None, processes: int | None
) -> None:
    text = f"""{ISSUERS}
workspaces:
  acme:
    {written}
    inferences:
      default:
        command: [x]
        {written}
"""
    acme = parse(text.encode(), source="broker.yaml").workspaces["acme"]
    for limits in (acme.limits, acme.inferences["default"].limits):
        assert (limits.memory, limits.processes) == (memory, processes)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ("{processes: unlimited}", "this is text (write a whole number)"),
        ("{processes: 0}", "0 is out of range"),
        ("{memory: }", "memory"),
        ("{memory: None}", "'None' is not a size"),
        ("{wall: none}", "wall"),
        ("{file_size: none}", "file_size"),
    ],
)
def test_none_is_said_of_what_is_bounded_by_default_alone(limits: str, problem: str) -> None:
    (line,) = told(f"{ISSUERS}\nworkspaces: {{acme: {{limits: {limits}}}}}\n")
    assert problem in line


def test_what_is_not_written() -> None:
    config = parse(ISSUERS.encode(), source="broker.yaml")
    assert config == BrokerConfig(issuers=config.issuers)
    assert config.store == "sqlite:////var/lib/egressd-broker/store.db"
    assert str(config.listen) == "unix:/run/egressd-broker/broker.sock"
    assert (config.scratch, config.tls) == ("private", None)


def test_every_problem_at_once_at_its_line_with_its_remedy() -> None:
    text = """\
listen: http://0.0.0.0:80
stores: sqlite:////x
issuers: {idp: {issuer: 'https://idp.example/', audience: app}}
workspaces:
  ACME: {}
  acme:
    inferences:
      default: {kommand: [x], limits: {wall: 60, memory: 4GB, walls: 1}}
      other: {command: x, network: some, environment: {A B: 1, C: [1]}, bind_ro: [here]}
    commands: yes
limits: {rate: fast, at_once: 0}
scratch: disk
keep: forever
"""
    found = told(text)
    assert [line.partition(" ")[0] for line in found] == [
        f"broker.yaml:{line}:" for line in (1, 2, 5, 8, 8, 8, 8, 9, 9, 9, 9, 10, 11, 11, 12, 13)
    ]
    whole = "\n".join(found)
    for piece in (
        "tokens and documents would go in clear (write unix:/run/egressd-broker/broker.sock or https://",
        "'stores' is not a key of this section (did you mean store?)",
        "'kommand' is not a key of this section (did you mean command?)",
        "workspaces.acme.inferences.default.limits.memory: '4GB' is not a size such as 64KiB, 50MiB or 4GiB"
        " (write 4GiB)",
        "limits.walls",
        "begin with /",
        "write true or false",
        'write one such as "30/min"',
        "write private, or {directory:",
    ):
        assert piece in whole, piece


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no identity provider is named"),
        ("[1]", "the file is not a mapping"),
        ("\tx: y", "not YAML"),
        (ISSUERS + "listen: https://localhost:1", "no place to listen"),
        (ISSUERS + "listen: https://127.0.0.1:0\ntls: {}", "has no port"),
        (ISSUERS + "listen: https://[::1]:99999", "has no port"),
        (
            ISSUERS + "workspaces: {a: {inferences: {b: {command: [c], bind_ro: [/work/d]}}}}",
            "is below /work",
        ),
        (ISSUERS + "listen: https://127.0.0.1:8443", "needs a certificate"),
        (ISSUERS + "tls: {certificate: /a, key: /b, client_ca: /c}", "a Unix socket is not spoken to by TLS"),
        (ISSUERS + "listen: https://127.0.0.1:8443\ntls: {certificate: /a, key: b}", "client_ca is missing"),
        (
            ISSUERS
            + "listen: https://127.0.0.1:8443\ntls: {certificate: /a, key: /etc/ssl/k, client_ca: /c}",
            "every sandbox sees this file",
        ),
        (ISSUERS + f"listen: unix:/{'x' * 110}", "at most 107 fit a socket"),
        (ISSUERS + "listen: unix:x", "not an absolute path"),
        (ISSUERS + "store: sqlite:///relative.db", "not the URL of a store"),
        (ISSUERS + "store: mysql://x/y", "not the URL of a store"),
        (ISSUERS + "store: postgresql://db/x?password=hunter2x", "a password stands in the URL"),
        (ISSUERS + "levels: [a, a]", "a level stands there twice"),
        (ISSUERS + "levels: []", "not a ladder"),
        (ISSUERS + "scratch: {directory: /run/egressd/x}", "no place for copies"),
        (ISSUERS + "scratch: {encrypted: true}", "directory is missing"),
        (ISSUERS + "workspaces: {acme: {limits: {connections: 10001}}}", "out of range"),
        (ISSUERS + "workspaces: {acme: {limits: {cost: -1}}}", "no amount"),
        (ISSUERS + "workspaces: {acme: {inferences: {a: {command: []}}}}", "not a command"),
        (ISSUERS + "workspaces: {acme: {inferences: {a: {command: [true]}}}}", "quote what looks like"),
        (ISSUERS + "workspaces: {acme: {inferences: {'A b': {command: [x]}}}}", "is not a name"),
        (ISSUERS + "workspaces: {acme: {inferences: [a]}}", "a mapping"),
        (ISSUERS + "keep: 10", "write a whole number and its unit"),
        (ISSUERS + "limits: {body: 5}", "this is a number"),
        (ISSUERS + ISSUERS, "stands here again"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    assert says in "\n".join(told(text))


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("environment: {OPENAI_API_KEY: hunter2-not-a-reference}", "hunter2"),
        ("environment: {ANY: sk-Abc123def456ghi789jkl012}", "sk-Abc123"),
        ("environment: {X: secret://env/not a name}", None),
        ("# the old key was AKIAABCDEFGHIJKLMNOP\n        network: none", "AKIAABCDEF"),
    ],
)
def test_a_secret_in_clear_is_refused_and_not_repeated(line: str, secret: str | None) -> None:
    text = f"{ISSUERS}workspaces:\n  acme:\n    inferences:\n      a:\n        command: [x]\n        {line}\n"
    whole = "\n".join(told(text))
    assert "secret://" in whole
    assert secret is None or secret not in whole


def test_a_user_in_the_stores_url_is_taken_for_a_secret() -> None:
    """It could be one; libpq has PGUSER for it."""
    assert any("before a host" in line for line in told(ISSUERS + "store: postgresql://me:hunter2x@db/x"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load(tmp_path / "broker.yaml")


def program(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "egressd.broker.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_check_validates_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(ISSUERS + "workspaces: {acme: {}}\n")
    done = program("--config", file, "--check")
    assert (done.returncode, done.stdout) == (0, f"{file} is sound: 1 workspace, 1 issuer\n")
    file.write_text("listen: 3\nkeep: x\n")
    done = program("--config", file, "--check")
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        f"{file}:1:",
        f"{file}:1:",
        f"{file}:2:",
    ]


def test_check_reads_the_certificates(tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(
        ISSUERS + "listen: https://127.0.0.1:8443\n"
        f"tls: {{certificate: {tmp_path}/a, key: {tmp_path}/b, client_ca: {tmp_path}/c}}\n"
    )
    done = program("--config", file, "--check")
    assert done.returncode == 1
    assert "tls.certificate" in done.stderr
