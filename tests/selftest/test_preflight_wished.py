"""The preflight where it is wished: in the gate, before the command and under the same filter."""

from __future__ import annotations

import subprocess

import pytest

from egressd.broker import config
from egressd.model.errors import PolicyError
from egressd.sandbox.plan import Machine, SandboxSpec, plan

MACHINE = Machine(roots={"bin": "usr/bin"}, overlays=())


def gate(*preflight: str) -> str:
    spec = SandboxSpec(command=("true",), preflight=preflight)
    words = plan(spec, MACHINE).arguments
    return words[words.index("sh") + 2]


def test_nothing_is_tried_where_it_is_not_wished() -> None:
    assert "/dev/null" not in gate()


def test_it_comes_after_go_and_before_the_command() -> None:
    script = gate("try", "a way out", "$HOME; true")
    parts = script.split("; ")
    (place,) = (n for n, part in enumerate(parts) if part.startswith("try "))
    assert parts[place - 1] == "ulimit -c 0" and parts[-1] == 'exec "$@"'
    assert "try 'a way out' '$HOME; true' </dev/null >&2 || exit 125" in script


@pytest.mark.parametrize(("status", "ran"), [(0, "ran\n"), (1, ""), (126, "")])
def test_the_command_runs_only_if_it_succeeds(status: int, ran: str) -> None:
    script = gate("sh", "-c", f"cat; exit {status}").split("; ")
    waits = next(n for n, part in enumerate(script) if part.startswith("ulimit -c"))
    found = subprocess.run(
        ["sh", "-c", "; ".join(script[waits:]), "egressctl", "echo", "ran"],
        input="the command's own", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.stdout, found.stderr, found.returncode) == (ran, "", 0 if ran else 125)


ISSUERS = "issuers: {okta: {issuer: https://acme.okta.com/oauth2/default, audience: 0oa1b2c3}}\n"


def test_a_broker_does_it_if_it_is_told_to() -> None:
    def read(line: str) -> config.BrokerConfig:
        return config.parse((ISSUERS + line).encode(), source="x")

    assert read("").preflight is False
    assert read("preflight: true").preflight is True
    with pytest.raises(PolicyError, match="preflight"):
        read("preflight: quick")
