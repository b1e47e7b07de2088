"""A request in the lab, from its decision to a receipt that somebody checks; and who does not get one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.journal import dsse
from lab.daemon import Daemon
from lab.machine import VENV, Lab, poll

pytestmark = pytest.mark.kernel
MEMBER = 4002
POLICY = """\
workspace: acme
guard: enforce
members: [user:{user}, user:4002]
allow:
  - {{host: plain.test, ports: [80/tcp], verify: address}}
"""
INSIDE = Path(__file__).resolve().parents[1] / "broker" / "cycle_inside.py"
FETCH = "curl -sS --max-time 5 --noproxy '*' http://plain.test/ >/dev/null; "


class Asking:
    """A service in the lab, asked one request after the other."""

    def __init__(self, daemon: Daemon, documents: str) -> None:
        argv = [str(VENV / "bin" / "python"), str(INSIDE), daemon.run_dir, documents]
        self.daemon, self.answers = daemon, 0
        self.process = daemon.lab.start(argv, uid=daemon.lab.user)

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        wish = {"command": ["sh", "-c", command], "workspace": "acme", **more}
        self.process.stdin.write(json.dumps(wish).encode() + b"\n")
        self.answers += 1

        def answered() -> bool:
            assert self.process.status() is None, self.process.err
            return self.process.out.count("\n") >= self.answers

        poll(answered, timeout=60, what="an answer")
        answer: dict[str, Any] = json.loads(self.process.out.splitlines()[self.answers - 1])
        assert answer["link"], answer
        return answer


@pytest.fixture(scope="module")
def asking(lab: Lab, start_module_daemon: Any) -> Iterator[Asking]:
    policies = {"acme": POLICY.format(user=lab.user)}
    daemon = start_module_daemon(policies=policies, brokers=[str(lab.user)])
    directory = daemon.lab.path("receipt-documents")
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    for name in ("a.md", "b.md"):
        (directory / name).write_text("the handbook")
    made = Asking(daemon, daemon.lab.inside("receipt-documents"))
    yield made
    made.process.stdin.close()
    made.process.wait(10)


def payload(file: Path) -> str:
    return dsse.open(dsse.decode(file.read_bytes())).payload.decode()


def receipt(asking: Asking, place: Path, answer: dict[str, Any], uid: int | None) -> Any:
    file = place / f"{uid}.proof"
    words = ["proof", "-w", "acme", "--sandbox", f"eg{answer['link']}", "-o", str(file)]
    return asking.daemon.ctl(*words, uid=uid), file


def test_a_receipt_of_a_request_is_checked_with_its_manifest(asking: Asking, place: Path) -> None:
    script = FETCH + "cat /work/MANIFEST.json"
    answer = asking.ask(script, documents=["a.md", "b.md"], discarded=3133731337, action="summarise")
    done, file = receipt(asking, place, answer, asking.daemon.lab.user)
    assert done.status == 0, done.err
    (place / "MANIFEST.json").write_text(answer["out"])
    key = asking.daemon.json("key", "show")["key"]
    checked = asking.daemon.ctl(
        "--json", "verify", str(file), "--key", key, "--manifest", str(place / "MANIFEST.json")
    )
    found = json.loads(checked.out)
    assert checked.status == 0, [c for c in found["checks"] if c["verdict"] == "broken"]
    request = found["statement"]["request"]
    assert (request["id"], request["files"], request["action"]) == (answer["request"], 2, "summarise")
    assert (request["status"], request["destroyed"], request["network"]) == (0, True, "policy")
    verdicts = {c["name"]: c["verdict"] for c in found["checks"]}
    assert [verdicts[name] for name in ("request", "destroyed", "manifest")] == ["holds"] * 3
    assert found["statement"]["summary"]["totals"]["ok_packets"] > 0, "something was sent, after it"
    text = payload(file)
    for told in ("3133731337", "request-asked", "request-files", "a.md"):
        assert told not in text, told
        assert told not in json.dumps(found)
    (place / "MANIFEST.json").write_text(answer["out"].replace("a.md", "c.md"))
    changed = asking.daemon.ctl("verify", str(file), "--manifest", str(place / "MANIFEST.json"))
    assert changed.status == 1 and "broken manifest" in changed.out


def test_without_a_network_nothing_was_sent_and_the_receipt_says_so(asking: Asking, place: Path) -> None:
    answer = asking.ask(FETCH + "true", documents=["a.md"], network="none")
    done, file = receipt(asking, place, answer, 0)
    assert done.status == 0, done.err
    found = json.loads(asking.daemon.ctl("--json", "verify", str(file)).out)
    assert found["verified"] and found["statement"]["request"]["network"] == "none"
    assert found["statement"]["summary"]["totals"]["ok_packets"] == 0


def test_another_member_learns_nothing_of_it_in_any_way(asking: Asking, place: Path) -> None:
    daemon = asking.daemon
    if daemon.lab.single_user:
        pytest.skip("there is one user here")
    answer = asking.ask("true", documents=["a.md"], discarded=3133731337, action="summarise")
    done, file = receipt(asking, place, answer, MEMBER)
    none, _ = receipt(asking, place, {"link": 99_999}, MEMBER)
    assert done.status == none.status == 125 and not file.exists()
    assert done.err.replace(f"eg{answer['link']}", "eg99999") == none.err
    secrets = (answer["request"], "3133731337", "summarise", "request-decided", "request-asked", "a.md")
    whole = daemon.ctl("proof", "-w", "acme", "-o", str(place / "acme.proof"), uid=MEMBER)
    assert whole.status == 0, whole.err
    told = [payload(place / "acme.proof")]
    for words in (["status"], ["counters"], ["policy", "explain", "acme"]):
        told.append(daemon.ctl("--json", *words, uid=MEMBER).out)
    assert all(told)
    for secret in secrets:
        assert not [text for text in told if secret in text], secret
    assert daemon.ctl("audit", "--request", answer["request"], uid=MEMBER).status == 125
    end = time.monotonic() + 10
    while answer["request"] not in daemon.ctl("audit", "--request", answer["request"]).out:
        assert time.monotonic() < end, "root sees it"
