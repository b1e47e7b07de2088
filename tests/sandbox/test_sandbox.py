"""egressd.Sandbox, the Python interface: the same broker inside another program, in any of its threads."""

# programs are easier to read in one line
# ruff: noqa: E501
from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from sandbox.stand_in import Gateway, as_caller

pytestmark = pytest.mark.kernel


def script(gateway: Gateway, body: str) -> str:
    """What a caller's program prints. It finds `box` open."""
    whole = (
        "import egressd, subprocess, os, json, threading, time\n"
        "from egressd.model.errors import Refused\n"
        f"RUN = {str(gateway.run_dir)!r}\n"
        "def fds(): return sorted(os.listdir('/proc/self/fd'))\n"
    ) + textwrap.dedent(body)
    done = subprocess.run(
        as_caller(sys.executable, "-c", whole),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_a_completed_process(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        with egressd.Sandbox(workspace="acme", run_dir=RUN, env={"A": "1"}) as box:
            r = box.run(["sh", "-c", "cat; echo $A; echo err >&2; exit 3"], input="in ", capture_output=True, text=True)
            print(type(r).__name__, r.returncode, repr(r.stdout), repr(r.stderr))
            print(box.run(["cat"], input=b"bytes", stdout=subprocess.PIPE).stdout)
            print(box.run(["sh", "-c", "echo a >&2"], stdout=-1, stderr=-2, text=True).stdout.strip())
            print(box.run(["echo", "hidden"], stdout=subprocess.DEVNULL).stdout)
        """,
    )
    assert said.splitlines() == ["CompletedProcess 3 'in 1\\n' 'err\\n'", "b'bytes'", "a", "None"]


def test_errors_are_the_ones_a_caller_expects(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        def tried(work):
            try: work()
            except Exception as error: print(type(error).__name__, getattr(error, "reason", ""))
        box = egressd.Sandbox(workspace="plain", run_dir=RUN)
        tried(lambda: egressd.Sandbox(workspace="strangers", run_dir=RUN).__enter__())
        tried(lambda: egressd.Sandbox(workspace="plain", run_dir="/nonexistent").__enter__())
        tried(lambda: egressd.Sandbox(workspace="plain", run_dir=RUN, files="/run").__enter__())
        tried(lambda: egressd.Sandbox(workspace="revokes", run_dir=RUN).run(["sleep", "9"]))
        tried(lambda: egressd.Sandbox(workspace="brief", run_dir=RUN).run(["sleep", "9"]))
        tried(lambda: box.run(["sleep", "9"], timeout=0.2))
        tried(lambda: box.run(["false"], check=True))
        tried(lambda: box.run([]))
        """,
    )
    assert said.splitlines() == [
        "Refused member", "NotRunning unavailable", "Refused files", "Refused unavailable", "TimeoutExpired ",
        "TimeoutExpired ", "CalledProcessError ", "ValueError ",
    ]  # fmt: skip


def test_a_timeout_keeps_what_was_said_until_then(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        try: egressd.Sandbox(workspace="plain", run_dir=RUN).run(["sh", "-c", "echo early; sleep 9"], timeout=0.5, capture_output=True)
        except subprocess.TimeoutExpired as error: print(error.output, error.timeout)
        """,
    )
    assert said == "b'early\\n' 0.5\n"


def test_no_descriptor_and_no_child_is_left(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        def once(workspace, command):
            try: egressd.Sandbox(workspace=workspace, run_dir=RUN).run(command, capture_output=True, timeout=1)
            except (Refused, subprocess.TimeoutExpired, egressd.model.errors.KernelError): pass
        once("acme", ["true"])
        before = fds()
        for workspace in ("acme", "strangers", "full", "dies", "empty", "revokes", "brief"):
            once(workspace, ["sleep", "2"])
        once("plain", ["no-such"])
        print(fds() == before)
        try: os.waitpid(-1, 0)
        except ChildProcessError: print("no children")
        """,
    )
    assert said == "True\nno children\n"


def test_many_at_once_from_threads(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        results = []
        def work(n):
            with egressd.Sandbox(workspace="acme", run_dir=RUN) as box:
                results.append(box.run(["sh", "-c", "cat; ls /proc/self/fd | wc -l"], input=str(n) + " ", capture_output=True, text=True).stdout)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
        print(json.dumps(sorted(results, key=lambda r: int(r.split()[0]))))
        """,
    )
    assert json.loads(said) == [f"{n} 4\n" for n in range(12)]  # 0, 1, 2 and ls's own


def test_big_data_both_ways(gateway: Gateway) -> None:
    said = script(
        gateway,
        """
        data = os.urandom(1 << 22)
        r = egressd.Sandbox(workspace="plain", run_dir=RUN).run(["cat"], input=data, capture_output=True)
        print(r.stdout == data, r.stderr)
        r = egressd.Sandbox(workspace="plain", run_dir=RUN).run(["true"], input=data, capture_output=True)
        print(r.returncode)
        """,
    )
    assert said == "True b''\n0\n"
