"""From a token to a receipt, with nothing made up: a real egressd, the real service as an account without any
privilege, a store that `egressctl` filled, tokens of a provider whose keys are in a file; `egressctl ask`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from lab.machine import VENV, Lab, Result, poll

pytestmark = pytest.mark.kernel

BROKER = 4301  # the service's account; nobody knows it but egressd
ISSUER, AUDIENCE = "https://idp.test/", "the-product"
POLICY = f"""
workspace: acme
guard: enforce
members: [user:{BROKER}]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
"""
INFER = """
import json, os, socket, sys
question = sys.stdin.read()
found = sorted(os.path.relpath(os.path.join(at, name), "/work")
               for at, _, names in os.walk("/work") for name in names)
try:
    with socket.create_connection(("plain.test", 7), timeout=5) as s:
        s.sendall(question.encode())
        heard = s.recv(100).decode()
except OSError as error:
    heard = type(error).__name__
print(json.dumps({"question": question, "found": found, "heard": heard, "mode": os.environ["MODE"]}))
"""
DOCUMENTS = {
    "leave.md": ("[group:idp:staff]", "internal"),
    "salaries.md": ("[group:idp:board]", "internal"),
    "plans.md": ("[group:idp:staff]", "secret"),
}


class Whole:
    """Everything, in the lab."""

    def __init__(self, lab: Lab, daemon: Any) -> None:
        self.lab, self.daemon = lab, daemon
        self.root = lab.path("whole")
        self.inside = lab.inside("whole")
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._write()
        self.process = self.start()

    def _write(self) -> None:
        for name in ("documents", "store", "run", "opt"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / name).chmod(0o755)
        self.root.chmod(0o755)
        for name in ("store", "run"):
            self.lab.run(["chown", f"{BROKER}:{BROKER}", f"{self.inside}/{name}"]).check()
        for name, (readers, level) in DOCUMENTS.items():
            head = f"---\nacl: {{read: {readers}}}\nclearance: {level}\n---\n"
            (self.root / "documents" / name).write_text(f"{head}what {name} says\n")
        (self.root / "opt" / "infer.py").write_text(INFER)
        algorithm = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256)
        public = algorithm.to_jwk(self.key.public_key(), as_dict=True) | {"kid": "k1", "alg": "ES256"}
        public.pop("key_ops", None)
        (self.root / "jwks.json").write_text(json.dumps({"keys": [public]}))
        (self.root / "broker.yaml").write_text(yaml.safe_dump(self._config()))

    def _config(self) -> dict[str, Any]:
        python = ["/usr/bin/python3", "-I"]
        return {
            "listen": f"unix:{self.inside}/run/broker.sock",
            "store": f"sqlite:///{self.inside}/store/store.db",
            "run_dir": self.daemon.run_dir,
            "issuers": {
                "idp": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": f"{self.inside}/jwks.json"}
            },
            "workspaces": {
                "acme": {
                    "inferences": {
                        "default": {
                            "command": [*python, f"{self.inside}/opt/infer.py"],
                            "bind_ro": [f"{self.inside}/opt"],
                            "environment": {"MODE": "whole"},
                            "limits": {"wall": "20s"},
                        },
                        "slow": {"command": ["sleep", "600"]},
                    },
                    "commands": True,
                }
            },
        }

    def start(self) -> Any:
        argv = [str(VENV / "bin" / "egressd-broker"), "--config", f"{self.inside}/broker.yaml"]
        process = self.lab.start(argv, uid=BROKER)
        poll(lambda: "ready\n" in process.out or process.status() is not None, timeout=30)
        assert process.status() is None, process.err
        return process

    # ---- who asks

    def token(self, subject: str, *groups: str, **more: Any) -> str:
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "iat": now,
            "exp": now + 600,
            "groups": groups,
        }
        return jwt.encode(claims | more, self.key, algorithm="ES256", headers={"kid": "k1"})

    def ask(self, token: str, *words: str, stdin: str = "") -> Result:
        """As an account of its own, which nobody knows either."""
        env = {"EGRESSD_TOKEN": token}
        return self.lab.run(self.asking(*words), uid=4302, env=env, stdin=stdin, timeout=60)

    def asking(self, *words: str) -> list[str]:
        where = f"unix:{self.inside}/run/broker.sock"
        return [str(VENV / "bin" / "egressctl"), "ask", "--broker", where, *words]

    def administer(self, *words: str, status: int = 0) -> Result:
        """As the store's owner."""
        config = ["--broker-config", f"{self.inside}/broker.yaml", "--run-dir", self.daemon.run_dir]
        argv = [str(VENV / "bin" / "egressctl"), *words, "-w", "acme", *config]
        told = self.lab.run(argv, uid=BROKER)
        assert told.status == status, told.out + told.err
        return told

    def records(self, request: str) -> list[dict[str, Any]]:
        text = self.daemon.ctl("--json", "audit", "--request", request).check().out
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(lab: Lab, start_module_daemon: Any) -> Iterator[Whole]:
    daemon = start_module_daemon(policies={"acme": POLICY}, brokers=[str(BROKER)])
    made = Whole(lab, daemon)
    try:
        # Of a source that is not believed yet nobody may read anything, and that is said.
        made.administer("ingest", f"{made.inside}/documents", "--source", "handbook", status=1)
        made.administer("source", "trust", "handbook", "--front-matter", "on")
        made.administer("member", "add", "group:idp:staff", "--role", "editor", "--clearance", "internal")
        yield made
    finally:
        made.process.signal(15)
        assert made.process.wait(30) == 0, made.process.err
    assert "Traceback" not in made.process.err


NAMES = "\n".join(f"handbook:{name}" for name in (*DOCUMENTS, "none.md"))


def test_the_service_watches_nothing_by_epoll(whole: Whole) -> None:
    """What is watched so is counted for its account, and a command could use that up."""
    told = whole.lab.run(["sh", "-c", f"ls -l /proc/{whole.process.pid}/fd"]).check().out
    assert "socket:" in told and "eventpoll" not in told


def test_what_is_shown_asked_answered_and_proved(whole: Whole) -> None:
    (whole.root / "found").write_text(NAMES)
    out = whole.lab.path("whole/asker")
    out.mkdir(exist_ok=True)
    out.chmod(0o777)
    told = whole.ask(
        whole.token("u-anna", "staff"), "-w", "acme", "--candidates", f"{whole.inside}/found",
        "--receipt", f"{whole.inside}/asker/job.json", "--proof", f"{whole.inside}/asker/job.proof",
        "--manifest", f"{whole.inside}/asker/MANIFEST.json",
        stdin="How many days?",
    )  # fmt: skip
    assert told.status == 0, told.err + whole.process.err
    assert json.loads(told.out) == {
        "question": "How many days?",
        "found": ["MANIFEST.json", "handbook/leave.md"],
        "heard": "How many days?",
        "mode": "whole",
    }
    receipt = json.loads((out / "job.json").read_text())
    assert [file["id"] for file in receipt["files"]] == ["handbook:leave.md"]
    assert (receipt["status"], receipt["role"], receipt["destroyed"]) == (0, "editor", True)
    assert receipt["network"]["counters"]["ok"]["packets"] > 0
    assert receipt["signed"]["signatures"]
    for name in ("salaries", "plans", "none.md", "discarded"):
        assert name not in json.dumps(receipt)
    listed = out / "MANIFEST.json"
    words = ["verify", f"{whole.inside}/asker/job.proof", "--manifest", f"{whole.inside}/asker/MANIFEST.json"]
    verified = whole.daemon.ctl(*words)
    assert verified.status == 0, verified.out + verified.err
    assert "The manifest that was given is the one that was put on record." in verified.out
    assert [file["id"] for file in json.loads(listed.read_text())["files"]] == ["handbook:leave.md"]
    listed.write_text(listed.read_text().replace("leave", "lease"))
    assert whole.daemon.ctl(*words).status == 1
    poll(lambda: any(r["event"] == "request-ended" for r in whole.records(receipt["request"])), timeout=10)
    events = [record["event"] for record in whole.records(receipt["request"])]
    assert events.index("request-decided") < events.index("request-ended")
    poll(lambda: not whole.daemon.sandbox_links(), timeout=5, what="the link goes")


def test_what_may_not_be_seen_and_what_is_not_there(whole: Whole) -> None:
    anna = whole.token("u-anna", "staff")
    told = {
        why: whole.ask(token, "-w", workspace, *files)
        for why, token, workspace, files in (
            ("not listed", anna, "acme", ["--file", "handbook:salaries.md"]),
            ("not cleared", anna, "acme", ["--file", "handbook:plans.md"]),
            ("not there", anna, "acme", ["--file", "handbook:none.md"]),
            ("no workspace", anna, "nowhere", []),
            ("no member", whole.token("u-mallory", "others"), "acme", []),
        )
    }
    assert {result.status for result in told.values()} == {125}
    assert {result.err for result in told.values()} == {"egressctl: there is nothing here that you may see\n"}
    expired = whole.ask(whole.token("u-anna", "staff", exp=int(time.time()) - 999, iat=1), "-w", "acme")
    assert (expired.status, expired.err) == (125, "egressctl: invalid token\n")


def test_a_membership_that_was_taken_away_counts_at_once(whole: Whole) -> None:
    token = whole.token("u-new", "temps")
    assert whole.ask(token, "-w", "acme").status == 125
    whole.administer("member", "add", "group:idp:temps", "--role", "viewer")
    assert whole.ask(token, "-w", "acme").status == 0
    assert whole.ask(token, "-w", "acme", "--", "id").status == 125, "a viewer runs no commands"
    whole.administer("member", "remove", "group:idp:temps")
    assert whole.ask(token, "-w", "acme").status == 125


def test_a_command_of_ones_own_without_network(whole: Whole) -> None:
    told = whole.ask(
        whole.token("u-anna", "staff"), "-w", "acme", "--network", "none", "--file", "handbook:leave.md",
        "--", "sh", "-c", "tail -n 1 /work/handbook/leave.md; getent hosts plain.test; exit 7",
    )  # fmt: skip
    assert (told.status, told.out) == (7, "what leave.md says\n"), told.err


def test_a_file_that_changed_since_it_was_ingested_is_shown_to_nobody(whole: Whole) -> None:
    file: Path = whole.root / "documents" / "leave.md"
    before = file.read_text()
    file.write_text(before.replace("says", "lies"))
    try:
        told = whole.ask(whole.token("u-anna", "staff"), "-w", "acme", "--file", "handbook:leave.md")
        assert (told.status, told.out) == (125, "")
        assert "the reason is on record" in told.err
    finally:
        file.write_text(before)


def test_the_end_of_the_service_ends_what_runs_and_says_so(whole: Whole) -> None:
    asking = whole.lab.start(
        whole.asking("-w", "acme", "--inference", "slow"),
        uid=4302,
        env={"EGRESSD_TOKEN": whole.token("u-anna", "staff")},
    )
    asking.stdin.close()  # type: ignore[union-attr]
    poll(whole.daemon.sandbox_links, timeout=20, what="it runs")
    whole.process.signal(15)
    assert whole.process.wait(30) == 0, whole.process.err
    assert asking.wait(20) != 0
    assert "the service ends" in asking.err
    poll(lambda: not whole.daemon.sandbox_links(), timeout=5, what="the link goes")
    assert not (whole.root / "run" / "broker.sock").exists()
    whole.process = whole.start()
