"""The other machines of the laboratory, and what says which script makes them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from container import Container

from lab.machine import PROJECT

pytestmark = pytest.mark.system

SCRIPT = Path(PROJECT, "packaging/provision.sh")
VAGRANTFILE = Path(PROJECT, "vagrant/Vagrantfile")


@pytest.mark.parametrize(("role", "says"), [("internet", "the internet"), ("client", "a neighbour")])
def test_the_other_two_answer_on_port_80_and_stay_as_they_are(
    debian: Container, role: str, says: str
) -> None:
    debian.write("root/provision.sh", SCRIPT.read_bytes(), mode=0o755)
    for _ in range(2):
        assert (
            debian.run(["/root/provision.sh", role], timeout=120).check().out
            == f"provision: {role} is ready\n"
        )
    fetch = "for _ in $(seq 50); do curl -fsS http://127.0.0.1/ && exit; sleep 0.1; done 2>/dev/null; exit 1"
    assert debian.shell(fetch) == f"{says}\n"


@pytest.mark.parametrize(
    "words", ["", "router", "guard", "guard --deb /nowhere.deb --internet 1.2.3.4 --client 1.2.3.5"]
)
def test_what_it_cannot_do_it_says_and_changes_nothing(debian: Container, words: str) -> None:
    debian.write("root/provision.sh", SCRIPT.read_bytes(), mode=0o755)
    refused = debian.run(["/root/provision.sh", *words.split()])
    assert refused.status in (1, 2)
    assert "provision" in refused.err
    assert not debian.path("etc/egressd").exists()


def test_a_distribution_that_it_does_not_know_is_refused(debian: Container) -> None:
    debian.write("root/provision.sh", SCRIPT.read_bytes(), mode=0o755)
    release = debian.path("etc/os-release").read_text()
    debian.write("etc/os-release", release.replace('"12"', '"11"'))
    refused = debian.run(["/root/provision.sh", "internet"])
    debian.write("etc/os-release", release)
    assert refused.status == 1
    assert "is neither Debian 12 nor Ubuntu 24.04" in refused.err


def test_vagrant_uses_that_script_for_each_role_on_each_distribution() -> None:
    text = VAGRANTFILE.read_text()
    assert "/vagrant/packaging/provision.sh #{role}" in text
    assert re.findall(r'"(\w+)" => \d+', text) == ["guard", "internet", "client"]
    assert re.findall(r"(debian/bookworm64|ubuntu-24\.04)", text) == ["debian/bookworm64", "ubuntu-24.04"]


@pytest.mark.skipif(shutil.which("ruby") is None, reason="no ruby")
def test_the_vagrantfile_is_ruby() -> None:
    checked = subprocess.run(["ruby", "-c", VAGRANTFILE], capture_output=True, text=True, check=True)
    assert checked.stdout == "Syntax OK\n"


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="no vagrant")
def test_vagrant_finds_nothing_wrong(tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "machines"),
        "VAGRANT_CWD": str(VAGRANTFILE.parent),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    argv = ["unshare", "--net", "vagrant", "validate", "--ignore-provider"]
    judged = subprocess.run(argv, env=environment, check=False, capture_output=True, text=True)
    assert (judged.returncode, judged.stderr) == (0, "")
    assert "Vagrantfile validated successfully" in judged.stdout
    assert not Path(VAGRANTFILE.parent, ".vagrant").exists()
