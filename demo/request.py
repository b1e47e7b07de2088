"""A scene of the demo: people ask, each is shown the documents that they may read, and gets a receipt.

An identity provider is made on the spot: a key, and ID tokens signed with it. The broker is the real one, as
an account that has no right but to be a member of its workspace.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from lab.machine import VENV, Lab, Process, Result, poll

if TYPE_CHECKING:
    from demo import Stage

BROKER, ASKER = 4301, 4302  # accounts, plain numbers; both are the lab's own where it has but one
ISSUER, AUDIENCE = "https://login.acme.test", "acme-search"
POLICY = """\
workspace: people
guard: enforce
{members:<34}# the broker's account: it runs what people ask for
allow:
  - local: ollama                 # the model is on this machine
"""
CONFIG = """\
listen: unix:{home}/run/broker.sock
store: sqlite:///{home}/store/store.db
run_dir: {run_dir}
issuers:
  idp: {{issuer: "{issuer}", audience: {audience}, jwks_file: {home}/jwks.json}}
workspaces:
  people:
    inferences:
      default:
        command: [{home}/python/bin/python, -B, {home}/clients/ask_documents.py]
        bind_ro: [{home}/python, {home}/clients]
        limits: {{wall: 30s, memory: 1GiB, egress_bytes: 1MiB}}
    commands: true                # editors may bring a command of their own
"""
# Each with who may read it, up to which level one must be cleared, and what it says.
DOCUMENTS = {
    "canteen.md": ("staff", "internal", "Canteen: fish on Fridays."),
    "leave.md": ("staff", "internal", "Leave: 30 days a year."),
    "salaries.md": ("board", "confidential", "Salaries: from 3000 to 4711."),
}
PLAIN, HIDDEN, MISSING = ("canteen.md", "leave.md"), "salaries.md", "pensions.md"
QUESTION = "How much leave is there?"
WORDS = 58  # letters of a record's line before its words


def brokers(lab: Lab) -> list[str]:
    """For egressd.yaml: whose word on requests is put on record."""
    return [str(_account(lab))]


def _account(lab: Lab) -> int:
    return 0 if lab.single_user else BROKER


@dataclass(frozen=True)
class Desk:
    """The service, what it serves, and who asks it."""

    stage: Stage
    broker: Process
    key: ec.EllipticCurvePrivateKey

    @property
    def home(self) -> str:
        return self.stage.lab.inside("people")

    def file(self, name: str) -> Path:
        return self.stage.lab.path(f"people/{name}")

    # ---- who administers

    def administer(self, *words: str, shown: str = "") -> Result:
        """As the store's owner: the broker's account."""
        self.stage.story.command(shown or f"egressctl {shlex.join(words)}")
        result = self.stage.daemon.ctl(
            *words, "-w", "people", "--broker-config", f"{self.home}/broker.yaml", uid=BROKER
        )
        lines = (result.out + result.err).splitlines()
        self.stage.story.show("\n".join(line for line in lines if "bytes read;" not in line))
        return result

    # ---- who asks

    def token(self, subject: str, *groups: str) -> str:
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "groups": groups, "iat": now}
        more = {"email": f"{subject}@acme.test", "exp": now + 600}
        return jwt.encode(claims | more, self.key, algorithm="ES256", headers={"kid": "demo"})

    def environment(self, token: str) -> Mapping[str, str]:
        return {"EGRESSD_TOKEN": token, "EGRESSD_BROKER": f"unix:{self.home}/run/broker.sock"}

    def ask(self, token: str, *words: str, shown: str, stdin: str = QUESTION) -> Result:
        """As an account that nobody knows: the token alone says who it is."""
        self.stage.story.command(shown)
        result = self.stage.lab.run(
            self.stage.daemon.ctl_argv("ask", "-w", "people", *words),
            uid=ASKER, env=self.environment(token), stdin=stdin, timeout=60,
        )  # fmt: skip
        self.stage.story.show(result.out + result.err)
        return result

    def paper(self, name: str) -> str:
        return self.stage.paper(name)

    # ---- what there is of a request while it runs, and not after it

    def remains(self) -> dict[str, int]:
        """Processes below the broker beside the one that forks them, mounts of copies anywhere in the lab,
        the links of sandboxes."""
        proc = Path(f"/proc/{self.stage.lab.keeper_pid}/root/proc")
        mounts = 0
        for process in self.stage.lab.table():
            try:
                text = (proc / str(process.pid) / "mountinfo").read_text()
            except OSError:  # it has ended
                continue
            mounts += any(" - tmpfs egressd " in line for line in text.splitlines())
        return {
            "processes": len(self.stage.lab.descendants(self.broker.pid)) - 1,
            "processes that see copies": mounts,
            "links": len(self.stage.daemon.sandbox_links()),
        }


def requested(stage: Stage) -> None:
    story = stage.story
    story.step("Inference over documents: each asker's own, and a receipt")
    story.say(
        "Documents say in their front matter who may read them. Somebody asks a product something, and its\n"
        "search finds three. What may the model see? `egressd-broker` decides it before anything runs."
    )
    desk = opened(stage)
    set_up(desk)
    anna, bert = desk.token("anna", "staff"), desk.token("bert", "staff", "board")
    request = asked(desk, anna, bert)
    not_told(desk, anna)
    without_network(desk, anna)
    proved(desk, request)
    left(desk, anna)
    desk.broker.signal(15)
    desk.broker.wait(30)


# ---- setting up


def opened(stage: Stage) -> Desk:
    """The files, and the service running on them."""
    story, lab = stage.story, stage.lab
    key = ec.generate_private_key(ec.SECP256R1())
    home = lab.inside("people")
    _write_files(stage, key)
    policy = POLICY.format(members=f"members: [user:{_account(lab)}]")
    stage.daemon.policy("people", policy)
    story.command(f"cat documents/{HIDDEN} workspaces/people.yaml; sed -n '/^issuers/,$p' broker.yaml")
    config = lab.path("people/broker.yaml").read_text()
    story.show(
        (lab.path(f"people/documents/{HIDDEN}").read_text()) + policy + config[config.index("issuers:") :]
    )
    story.command("egressd-broker --config broker.yaml &            # as an account without any rights")
    broker = lab.start([str(VENV / "bin" / "egressd-broker"), "--config", f"{home}/broker.yaml"], uid=BROKER)
    poll(
        lambda: "ready\n" in broker.out or broker.status() is not None, timeout=30, what="the broker is ready"
    )
    if broker.status() is not None:
        story.show(broker.err)
    return Desk(stage, broker, key)


def _write_files(stage: Stage, key: ec.EllipticCurvePrivateKey) -> None:
    lab, home, root = stage.lab, stage.lab.inside("people"), stage.lab.path("people")
    for name in ("documents", "clients", "python", "store", "run"):
        (root / name).mkdir(parents=True)
    for name in ("store", "run"):
        if not lab.single_user:
            lab.run(["chown", f"{BROKER}:{BROKER}", f"{home}/{name}"]).check()
    for name, (group, level, text) in DOCUMENTS.items():
        head = f"---\nacl: {{read: [group:idp:{group}]}}\nclearance: {level}\n---\n"
        (root / "documents" / name).write_text(f"{head}{text}\n")
    (root / "found.txt").write_text("".join(f"handbook:{name}\n" for name in DOCUMENTS))
    client = "ask_documents.py"
    (root / "clients" / client).write_text((Path(__file__).parent / "clients" / client).read_text())
    # Where /work is not, which is the copies' place in a sandbox.
    lab.run(["mount", "--rbind", str(VENV), f"{home}/python"]).check()
    algorithm = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256)
    public: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    public = {name: public[name] for name in ("kty", "crv", "x", "y")} | {"kid": "demo", "alg": "ES256"}
    (root / "jwks.json").write_text(json.dumps({"keys": [public]}))
    config = CONFIG.format(home=home, run_dir=stage.daemon.run_dir, issuer=ISSUER, audience=AUDIENCE)
    if stage.lab.single_user:  # root without a cgroup: the default bound of processes is refused
        config = config.replace("1MiB}", "1MiB, processes: none}")
        config += "    limits: {processes: none}\n"
    (root / "broker.yaml").write_text(config)


def set_up(desk: Desk) -> None:
    story = desk.stage.story
    result = desk.administer(
        "ingest", f"{desk.home}/documents", "--source", "handbook", "--front-matter", "on",
        shown="egressctl ingest documents -w people --source handbook --front-matter on",
    )  # fmt: skip
    story.expect(
        held=result.status == 0 and f"handbook: {len(DOCUMENTS)} added" in result.out,
        text="what the documents say of themselves is believed, because somebody said so",
    )
    for group, role, level in (("staff", "editor", "internal"), ("board", "viewer", "confidential")):
        desk.administer(
            "member", "add", f"group:idp:{group}", "--role", role, "--clearance", level,
            shown=f"egressctl member add -w people group:idp:{group} --role {role} --clearance {level}",
        ).check()  # fmt: skip


# ---- asking


def asked(desk: Desk, anna: str, bert: str) -> str:
    """The number of Anna's request."""
    story = desk.stage.story
    story.say(
        "Anna is of the staff; she asks with the ID token that her company's identity provider gave her:"
    )
    found = f"{desk.home}/found.txt"
    told = desk.ask(
        anna, "--candidates", found,
        "--receipt", desk.paper("anna.json"), "--proof", desk.paper("anna.proof"),
        "--manifest", desk.paper("MANIFEST.json"),
        shown=f"echo '{QUESTION}' | egressctl ask -w people --candidates found.txt --proof anna.proof"
        " --manifest MANIFEST.json",
    )  # fmt: skip
    story.expect(held=_answer(told) == _texts(*PLAIN), text="the model was shown two documents of three")
    told = desk.ask(
        anna, "--candidates", found, "--", "ls", "-R", "/work",
        shown="egressctl ask -w people --candidates found.txt -- ls -R /work",
    )  # fmt: skip
    names = {line for line in told.out.splitlines() if line.endswith((".md", ".json"))}
    story.expect(
        held=told.status == 0 and names == {"MANIFEST.json", *PLAIN},
        text="the third is not there to be read: what is not cleared is not copied",
    )
    story.say("Bert is on the board, too. The same question, the same three candidates:")
    told = desk.ask(
        bert,
        "--candidates",
        found,
        shown=f"echo '{QUESTION}' | egressctl ask -w people --candidates found.txt",
    )
    story.expect(held=_answer(told) == _texts(*DOCUMENTS), text="for him the model was shown all three")
    return str(json.loads(desk.stage.lab.path("evidence/anna.json").read_text())["request"])


def _answer(told: Result) -> list[str]:
    return told.out.removeprefix("You said: ").splitlines() if told.status == 0 else []


def _texts(*names: str) -> list[str]:
    return [*(DOCUMENTS[name][2] for name in names), QUESTION]


def not_told(desk: Desk, anna: str) -> None:
    story = desk.stage.story
    story.say("Anna guesses names: of a document that she may not read, and of one that does not exist:")
    told = []
    for name in (HIDDEN, MISSING):
        result = desk.ask(
            anna, "--file", f"handbook:{name}", shown=f"egressctl ask -w people --file handbook:{name}"
        )
        told.append((result.status, result.out, result.err))
    answers = [_http(desk, anna, name) for name in (HIDDEN, MISSING)]
    story.command(
        f"curl --unix-socket run/broker.sock -H @token --json '{_body(HIDDEN)}' http://broker/v1/inferences"
    )
    story.show(answers[0].rpartition("\n")[2])
    story.expect(
        held=told[0]
        == told[1]
        == (125, "", f"egressctl: {json.loads(answers[0].splitlines()[-1])['detail']}\n"),
        text="one answer for both",
    )
    story.expect(
        held=answers[0] == answers[1] and answers[0].startswith("HTTP/1.1 404 "),
        text=f"and over HTTP, headers and all, byte for byte: {len(answers[0])} of them",
    )


def _body(name: str) -> str:
    asked = {"workspace": "people", "inference": "default", "files": [f"handbook:{name}"]}
    return json.dumps(asked, separators=(",", ":"))


def _http(desk: Desk, token: str, name: str) -> str:
    """The whole answer; only of its time the digits are taken away."""
    argv = [
        "curl", "-sSi", "--unix-socket", f"{desk.home}/run/broker.sock",
        "-H", f"Authorization: Bearer {token}", "--json", _body(name), "http://broker/v1/inferences",
    ]  # fmt: skip
    answer = desk.stage.lab.run(argv, uid=ASKER).check().out
    return re.sub(r"(?m)^date: .*$", lambda found: re.sub(r"\d", "0", found[0]), answer)


def without_network(desk: Desk, anna: str) -> None:
    told = desk.ask(
        anna, "--network", "none", "--candidates", f"{desk.home}/found.txt",
        "--", "sh", "-c", "cat handbook/leave.md | tail -1; curl -sS http://localhost:11434/",
        shown="egressctl ask -w people --network none --candidates found.txt -- sh -c"
        " 'tail -1 handbook/leave.md; curl http://localhost:11434/'",
    )  # fmt: skip
    desk.stage.story.expect(
        held=told.status == 7 and told.out == f"{DOCUMENTS['leave.md'][2]}\n" and "curl: (7)" in told.err,
        text="without a network not even what the workspace allows can be reached",
    )


# ---- what remains to be shown, and what remains


def proved(desk: Desk, request: str) -> None:
    stage, story = desk.stage, desk.stage.story
    story.say("What Anna's first request was shown, for somebody who was not there:")
    story.command(
        "unshare --user --net egressctl verify anna.proof --key egressd.pem --manifest MANIFEST.json"
    )
    result = stage.verify("anna.proof", "--manifest", desk.paper("MANIFEST.json"))
    found = json.loads(result.out)
    checks = {check["name"]: check for check in found["checks"]}
    story.show(
        "\n".join(
            f"{c['verdict']}  {c['text']}" for c in found["checks"] if c["name"] in ("request", "manifest")
        )
    )
    story.expect(
        held=result.status == 0 and found["verified"] and found["pinned"] and bool(checks),
        text="the list of documents is the one that was put on record before anything ran",
    )
    receipt = stage.lab.path("evidence/anna.json").read_text()
    proof = json.loads(stage.lab.path("evidence/anna.proof").read_text())
    said = receipt + base64.b64decode(proof["payload"]).decode()
    story.expect(
        held="request-decided" in said and HIDDEN not in said and "discarded" not in said,
        text="of what was not shown it says nothing, not even that there is something",
    )
    _recorded(desk, request)


def _recorded(desk: Desk, request: str) -> None:
    stage, story = desk.stage, desk.stage.story
    asked = ("audit", "--request", request)
    story.command(
        f"egressctl {shlex.join(asked)} | cut -c {WORDS + 1}-            # root alone may read that"
    )
    told = stage.daemon.ctl(*asked).check().out
    story.show("\n".join(line[WORDS:] for line in told.splitlines()))
    records = [json.loads(line) for line in stage.daemon.ctl("--json", *asked).check().out.splitlines()]
    facts = {record["event"]: record["fields"] for record in records}
    held = (
        facts["request-asked"]["asker"] == "user:idp:anna"
        and facts["request-asked"]["discarded"] == 1
        and [line.split()[0] for line in facts["request-files"]["files"].splitlines()]
        == [f"handbook:{name}" for name in PLAIN]
        and facts["request-ended"]["destroyed"] is True
    )
    story.expect(held=held, text="who asked, what was cleared and that one was not, what became of it")


def left(desk: Desk, anna: str) -> None:
    stage, story = desk.stage, desk.stage.story
    story.say("Somebody asks for something long, and leaves in the middle of it:")
    words = ("ask", "-w", "people", "--candidates", f"{desk.home}/found.txt", "--", "sleep", "600")
    story.command("egressctl ask -w people --candidates found.txt -- sleep 600")
    asking = stage.lab.start(stage.daemon.ctl_argv(*words), uid=ASKER, env=desk.environment(anna))
    asking.close()
    poll(lambda: all(desk.remains().values()), timeout=20, what="it runs")
    before = desk.remains()
    asking.signal(2)
    status = asking.wait(20)
    story.show("^C")
    poll(lambda: not any(desk.remains().values()), timeout=10, what="nothing is left")
    after = desk.remains()
    told = ", ".join(f"{name}: {count} -> {after[name]}" for name, count in before.items())
    story.expect(
        held=status == 130 and all(before.values()) and not any(after.values()),
        text=f"nothing is left: {told}",
    )
