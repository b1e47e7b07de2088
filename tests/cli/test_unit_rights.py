"""The rights that the unit leaves egressd are enough: started as the unit starts it, it enforces.

The machine's own network is not touched: everything happens in a network and mount namespace made here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel
BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent

CONFIG = """\
workspaces_dir: {0}/workspaces
run_dir: {0}/run
state_dir: {0}/state
gateway: egressd-unit
user: {{daemon: "4101", warden: "4102", audit: "4103", inspect: "4104", resolve: "4105", relay: "4106",
  metrics: "4107", api: "4108"}}
metrics: unix:{0}/run/metrics.sock
api: 127.0.0.1:8000
"""
POLICY = """\
workspace: acme
guard: enforce
members: [user:root]
allow: [{cidr: 10.20.0.0/16, ports: [5432/tcp]}]
"""
# $1 directory, $2 where the programs are, $3 the interpreter and script that limit rights
SCRIPT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs none /run && mkdir /run/netns
ip link set lo up
egressd="$2/egressd --config $1/egressd.yaml"
$egressd --foundation 2>/dev/null
$3 $egressd >"$1/out" 2>"$1/err" & daemon=$!
trap 'kill -KILL $daemon 2>/dev/null || true' EXIT
for _ in $(seq 200); do grep -q ready "$1/out" && break; kill -0 $daemon; sleep 0.05; done
"$2/egressctl" --run-dir "$1/run" status
scrape="curl -sS --max-time 10 --retry 3 --unix-socket $1/run/metrics.sock http://egressd/metrics"
$scrape | grep -E '^egressd_(up|enforcing) '
ask="curl -sS --max-time 10 --retry 3 --retry-connrefused http://localhost:8000"
$ask/v1/audit?event=process-started | grep -o '"name":"api"'
$ask/v1/counters | grep -o '"balanced":true' | head -1
grep -E 'NoNewPrivs|Seccomp:|CapBnd|CapEff' /proc/$daemon/status
kill -TERM $daemon
wait $daemon
$egressd --dismantle 2>/dev/null
echo "left: $(ip -o link | grep -vc ' lo:') links, $(ls /run/netns | wc -l) pins"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="egressd-unit-") as name:
        made = Path(name)
        made.chmod(0o755)  # the daemon's users read the policies
        (made / "workspaces").mkdir()
        (made / "egressd.yaml").write_text(CONFIG.format(made))
        (made / "workspaces" / "acme.yaml").write_text(POLICY)
        yield made


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give rights up")
@pytest.mark.parametrize(
    "limiter", ["", f"{sys.executable} {HERE / 'as_the_unit.py'}"], ids=["free", "as the unit"]
)
def test_it_enforces_with_the_rights_of_the_unit(place: Path, limiter: str) -> None:
    if limiter and shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["unshare", "-nm", "bash", "-c", SCRIPT, "bash", place, BIN, limiter],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = done.stdout + done.stderr + (place / "err").read_text()
    assert done.returncode == 0, said
    assert "enforcing, books balance" in done.stdout, said
    assert "egressd_up 1.0\negressd_enforcing 1.0\n" in done.stdout, said
    assert '"name":"api"\n"balanced":true\n' in done.stdout, said
    assert "left: 0 links, 0 pins" in done.stdout, said
    facts = dict(line.split(":\t") for line in done.stdout.splitlines() if ":\t" in line)
    assert facts["NoNewPrivs"] == "1"
    assert facts["CapBnd"] == "00000000000011e0"  # KILL SETGID SETUID SETPCAP NET_ADMIN
    assert facts["CapEff"] == "00000000000000e0"  # KILL SETGID SETUID
    assert facts["Seccomp"] == ("2" if limiter else "0")
