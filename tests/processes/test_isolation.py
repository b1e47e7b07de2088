"""Giving up rights: what is on the card remains, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from egressd.processes.cards import CARDS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")

PROGRAM = """
    import json, os, sys
    from egressd.processes import isolation
    from egressd.processes.cards import CARDS
    isolation.become(CARDS[sys.argv[1]], uid=931, gid=932)
    status = dict(l.rstrip("\\n").split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
    def attempt(what):
        try:
            what()
        except OSError:
            return "denied"
        return "allowed"
    print(json.dumps({
        "status": {k: status[k].strip() for k in sys.argv[2:]},
        "back to root": attempt(lambda: os.setuid(0)),
        "read the shadow file": attempt(lambda: open("/etc/shadow")),
        "kill init": attempt(lambda: os.kill(1, 0)),
    }))
"""


FIELDS = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd", "CapInh", "NoNewPrivs")


def run(name: str, program: str = PROGRAM) -> dict[str, object]:
    command = [sys.executable, "-c", textwrap.dedent(program), name, *FIELDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", [name for name in CARDS if name != "supervisor"])
def test_a_process_becomes_its_card(name: str) -> None:
    bits = f"{sum(1 << capability for capability in CARDS[name].capabilities):016x}"
    assert run(name) == {
        "status": {
            "Uid": "931\t931\t931\t931",
            "Gid": "932\t932\t932\t932",
            "Groups": "",
            "CapEff": bits,
            "CapPrm": bits,
            "CapBnd": bits,
            "CapInh": f"{0:016x}",
            "NoNewPrivs": "1",
        },
        "back to root": "denied",
        "read the shadow file": "denied",
        "kill init": "denied",
    }


def test_only_warden_and_custodian_keep_net_admin_and_only_the_supervisor_anything_else() -> None:
    holders = {name: {c.name for c in card.capabilities} for name, card in CARDS.items() if card.capabilities}
    assert holders == {
        "supervisor": {"SETUID", "SETGID", "KILL", "SETPCAP", "NET_ADMIN"},
        "warden": {"NET_ADMIN"},
        "custodian": {"NET_ADMIN"},
    }


def test_a_right_that_cannot_be_given_up_ends_the_process() -> None:
    program = """
        import sys
        from egressd.processes import isolation
        from egressd.processes.cards import CARDS
        import os
        os.setresuid(940, 940, 940)
        isolation.become(CARDS["resolver"], uid=931, gid=931)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "IsolationError" in done.stderr


def test_other_descriptors_are_closed() -> None:
    program = """
        import os
        from egressd.processes import isolation
        kept, other = os.pipe()
        isolation.close_other_descriptors([kept])
        os.fstat(kept)
        try:
            os.fstat(other)
        except OSError:
            print("closed")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "closed\n"
