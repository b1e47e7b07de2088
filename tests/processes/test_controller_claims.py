"""What the controller writes down of sandboxes, of what their brokers claim, and of drift and imbalance; and
whom it lets read and prove what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_lab import NOTHING, STATE, Client, World, world

from egressd.ipc import messages
from egressd.processes import control, leases
from egressd.processes.leases import Claims
from egressd.ruleset.observe import LinkCounts, Tally

POLICY = """\
guard: enforce
members: [user:4001]
allow:
  - {host: api.test, ports: [8080/tcp]}
"""
OTHERS = POLICY.replace("4001", "4002").replace("api.test", "secret.rival.test")
DIGEST = "sha256:" + "ab" * 32
Dialogue = Callable[[World], Coroutine[Any, Any, None]]


def play(directory: Path, dialogue: Dialogue) -> None:
    async def scene() -> None:
        async with world(directory, acme=POLICY, rival=OTHERS) as made:
            await made.start()
            made.serve()
            await dialogue(made)

    asyncio.run(scene())


async def until(condition: Callable[[], Any]) -> Any:
    for _ in range(1000):
        if found := condition():
            return found
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


async def spawned(w: World, callers: list[int], **attach: Any) -> tuple[Client, messages.Lease]:
    callers.append(4001)
    client = w.client()
    return client, await client.spawn(**attach)


async def closed(w: World, client: Client) -> dict[str, Any]:
    client.close()
    (record,) = await until(lambda: w.records("sandbox-closed"))
    return dict(record)


# ---- a sandbox


def test_a_sandbox_is_recorded_before_it_is_admitted_and_when_it_is_gone(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        client, lease = await spawned(w, callers, command="python3 (sha256:1)", digest=DIGEST)
        assert w.order().index("journal sandbox-opening") < w.order().index("warden OpenLink")
        (opening,) = w.records("sandbox-opening")
        policy = w.controller.policies["acme"]
        assert opening == {
            "link": "eg1", "workspace": "acme", "uid": 4001, "gid": 4001, "pid": 100,
            "command": "python3 (sha256:1)", "command_digest": DIGEST, "policy": policy.digest,
            "guard": "enforce", "address4": str(lease.address4), "address6": str(lease.address6),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        }  # fmt: skip
        w.last_counters = {"in": (9, 900), "ok": (6, 600), "denied": (2, 200), "other": (1, 100)}
        record = await closed(w, client)
        assert record.pop("seconds") >= 0
        assert record == {
            "link": "eg1", "workspace": "acme", "uid": 4001, "pid": 100, "in_packets": 9, "in_bytes": 900,
            "ok_packets": 6, "ok_bytes": 600, "denied_packets": 2, "denied_bytes": 200, "other_packets": 1,
            "other_bytes": 100,
        }, "and nothing of an end that nobody told"  # fmt: skip

    play(tmp_path, dialogue)


def test_the_last_word_of_a_broker_is_kept_though_its_end_comes_with_it(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        client, _ = await spawned(w, callers)
        client.say(
            messages.Ended(status=7, why="wall", user_seconds=1.23456, system_seconds=0.5, max_rss=1 << 20)
        )
        client.say(messages.Ended(status=0))  # the first counts
        record = await closed(w, client)
        told = {key: record[key] for key in ("exit", "why", "user_seconds", "system_seconds", "max_rss")}
        assert told == {
            "exit": 7, "why": "wall", "user_seconds": 1.235, "system_seconds": 0.5, "max_rss": 1 << 20,
        }  # fmt: skip

    play(tmp_path, dialogue)


def test_a_broker_that_does_not_know_what_was_used_says_only_how_it_ended(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        client, _ = await spawned(w, callers)
        client.say(messages.Ended(status=0))
        record = await closed(w, client)
        assert (record["exit"], record["why"]) == (0, "") and "max_rss" not in record

    play(tmp_path, dialogue)


def test_attempts_are_recorded_as_claims_and_the_rest_is_counted(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        client, _ = await spawned(w, callers)
        tried = messages.Attempt(
            protocol="tcp",
            destination="203.0.113.9",
            port=443,
            pid=7,
            executable="/usr/bin/curl",
            command="curl x",
        )
        for _ in range(leases.ATTEMPTS_PER_SECOND + 30):
            client.say(tried)
        await until(
            lambda: w.controller.leases.by_link[next(iter(w.controller.leases.by_link))].claims.unrecorded
        )
        record = await closed(w, client)
        assert record["attempts"] + record["attempts_unrecorded"] == leases.ATTEMPTS_PER_SECOND + 30
        assert len(w.records("attempt")) == record["attempts"] <= 2 * leases.ATTEMPTS_PER_SECOND
        assert w.records("attempt")[0] == {
            "link": "eg1", "workspace": "acme", "protocol": "tcp", "destination": "203.0.113.9", "port": 443,
            "pid": 7, "executable": "/usr/bin/curl", "command": "curl x",
        }  # fmt: skip

    play(tmp_path, dialogue)


def test_no_sandbox_makes_more_attempts_of_record_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "ATTEMPTS", 50)
    claims = Claims()
    allowed = [claims.may_record(now=1000 + number / 100) for number in range(1000)]
    assert sum(allowed[:100]) == leases.ATTEMPTS_PER_SECOND
    assert (sum(allowed), claims.attempts, claims.unrecorded) == (50, 50, 950)


def test_who_has_no_sandbox_claims_nothing(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        client.say(messages.Attempt(protocol="tcp", destination="203.0.113.9"))
        client.say(messages.Ended(status=0))
        assert (await client.ask(messages.Ask(what="status")))["enforcing"] is True  # it is still listened to
        assert not w.records("attempt")
        client.close()

    play(tmp_path, dialogue)


# ---- what is wrong


def test_drift_is_an_alarm_once_per_change(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        for drift in ([], ["a"], ["a"], ["a", "b"], [], ["a"]):
            w.drift = drift
            await w.controller.drift()
        assert [r["what"] for r in w.records("drift")] == ["a", "a; b", "a"]
        assert len(w.controller.alarms) == 3

    play(tmp_path, dialogue)


def test_an_imbalance_is_an_alarm_once_and_so_is_its_end(tmp_path: Path) -> None:
    async def dialogue(w: World) -> None:
        good = w.counters
        bad = {"eg1": LinkCounts(in_=Tally(3, 30), ok=Tally(1, 10))}
        for counters in (good, msgspec.structs.replace(good, links=bad)):
            w.counters = counters
            await w.controller.check_books()
            await w.controller.check_books()
        (told,) = w.records("books-unbalanced")
        assert "eg1" in told["differences"] and not w.records("books-balanced")
        w.counters = good
        await w.controller.check_books()
        await w.controller.check_books()
        assert len(w.records("books-balanced")) == 1

    play(tmp_path, dialogue)


def test_whose_books_do_not_balance_is_for_them_to_know(tmp_path: Path, callers: list[int]) -> None:
    """A workspace may be called like another one's link."""

    async def dialogue(w: World) -> None:
        link = w.sandbox(workspace="rival").link.device
        w.write(link, POLICY)
        await w.controller.apply(by="test")
        w.counters = msgspec.structs.replace(
            NOTHING,
            links={link: LinkCounts(in_=Tally(3, 30))},
            denied={"acme": {"shape": Tally(1, 60)}, "rival": {"shape": Tally(2, 120)}},
        )

        async def told(uid: int, workspace: str | None) -> tuple[list[str], list[bool]]:
            callers.append(uid)
            found = await w.client().ask(messages.Ask(what="counters", workspace=workspace))
            balanced = [each["balance"]["balanced"] for each in found["workspaces"]]
            return [text.partition(" =")[0] for text in found["differences"]], balanced

        whole, _ = await told(0, None)
        assert whole == [f"{link}: in", "acme: denied", "rival: denied"]
        assert await told(4001, "acme") == (["acme: denied"], [False])
        assert await told(4001, link) == ([], [True])
        assert await told(4002, "rival") == ([f"{link}: in", "rival: denied"], [False])

    play(tmp_path, dialogue)


# ---- reading


def test_status_tells_of_drift_and_journal(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        before = await client.ask(messages.Ask(what="status"))
        assert (before["drift"], before["drift_read"], before["journal_error"]) == ([], None, None)
        assert before["journal"]["records"] == STATE.records and "type" not in before["journal"]
        w.drift = ["make chain netdev egressd acme_4"]
        await w.controller.drift()
        w.disconnect("evidence")
        await w.settle()
        after = await client.ask(messages.Ask(what="status"))
        assert after["drift"] == w.drift and after["drift_read"] > 0
        assert after["journal"] is None and "auditor is not running" in after["journal_error"]
        client.close()

    play(tmp_path, dialogue)


def test_members_see_their_own_drift(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        w.drift = [
            "make chain netdev egressd rival_4",
            "add to rival_out4: 198.18.0.4 . tcp . 8080 (secret.rival.test)",
            "make chain netdev egressd acme_4",
            "add to acme_out4: 198.18.0.4 . tcp . 8080 (api.test)",
            "write the 9 rules of inet egressd steer",
            "add to in: 0x80004001 (acme api.test), 0x80008001 (rival secret.rival.test)",
            "table inet egressd is missing",
        ]
        await w.controller.drift()
        callers.append(4001)
        client, root = w.client(), w.client()
        (alarm,) = (await root.ask(messages.Ask(what="status")))["alarms"]
        assert "secret.rival.test" in alarm["text"]
        root.close()
        document = await client.ask(messages.Ask(what="status"))
        assert [each["text"] for each in document["alarms"]] == ["the ruleset is not as compiled"]
        assert "rival" not in json.dumps(document)
        told = document["drift"]
        assert told == [
            "make chain netdev egressd acme_4",
            "add to acme_out4: 198.18.0.4 . tcp . 8080 (api.test)",
            "write the 9 rules of inet egressd steer",
            "add to in: elements",
            "table inet egressd is missing",
        ]
        client.close()

    play(tmp_path, dialogue)


def test_who_is_refused_without_end_is_a_few_records_with_their_number(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        callers.extend([4003, 4004])
        stranger, other = w.client(), w.client()
        for number in range(200):  # under names made up, each another one
            answer = await stranger.ask(messages.Enter(workspace=f"guess-{number}"))
            assert answer.reason == "member"
        assert (await stranger.ask(messages.Enter(workspace="acme"))).reason == "member"
        assert (await other.ask(messages.Enter(workspace="acme"))).reason == "member"

        def told() -> list[tuple[Any, Any, Any]]:
            found = w.records("spawn-refused")
            return [(r["uid"], r["workspace"], r.get("count", 1)) for r in found]

        await until(lambda: sum(count for _, _, count in told()) == 202)
        assert [count for uid, workspace, count in told() if workspace == "acme"] == [1, 1]
        assert len(told()) <= 6  # one for each second it took
        assert told()[0][:2] == (4003, "guess-0")
        for client in (stranger, other):
            client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(("uid", "may"), [(0, True), (4001, True), (4002, True), (4003, False)])
def test_the_journals_state_is_for_root_and_members(
    tmp_path: Path, callers: list[int], uid: int, may: bool
) -> None:
    async def dialogue(w: World) -> None:
        callers.append(uid)
        client = w.client()
        answer = await client.ask(messages.Ask(what="journal"))
        if may:
            assert answer["records"] == STATE.records and answer["checkpoint_size"] == 7
        else:
            assert answer.reason == "member"
        client.close()

    play(tmp_path, dialogue)


def test_only_root_changes_the_key(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        callers.append(4001)
        member, root = w.client(), w.client()
        assert (await member.ask(messages.ChangeKey())).reason == "member"
        assert not w.of(messages.RotateKey)
        assert (await root.ask(messages.ChangeKey()))["records"] == STATE.records
        assert len(w.of(messages.RotateKey)) == 1
        w.refusing.add(messages.RotateKey)
        assert (await root.ask(messages.ChangeKey())).reason == "unavailable"
        for client in (member, root):
            client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(("uid", "may"), [(0, True), (906, True), (4001, False), (905, False)])
def test_metrics_are_for_root_and_the_exporter(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch, uid: int, may: bool
) -> None:
    monkeypatch.setattr(control, "_uid_of", lambda _, role: {"metrics": 906}.get(role))

    async def dialogue(w: World) -> None:
        callers.append(uid)
        client = w.client()
        answer = await client.ask(messages.Ask(what="metrics"))
        if not may:
            assert answer.reason == "member"
            client.close()
            return
        assert set(answer) == {"status", "counters", "journal", "drift", "requests"}
        assert {each["workspace"] for each in answer["counters"]["workspaces"]} == {"acme", "rival"}
        assert answer["journal"]["lost"] == {} and answer["drift"] is None
        w.disconnect("evidence")
        await w.settle()
        assert (await client.ask(messages.Ask(what="metrics")))["journal"] is None
        client.close()

    play(tmp_path, dialogue)


# ---- proofs


def test_a_proof_is_of_a_snapshot_that_is_whole_and_of_what_the_kernel_says_now(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        w.ruleset = "table inet egressd {\n}\n"
        callers.append(4001)
        client = w.client()
        asked = messages.Prove(workspace="acme", since="2026-01-01T00:00:00.000000Z")
        assert await client.ask(asked) == {"payload": "proved"}
        (made,) = w.of(messages.MakeProof)
        (snapshot,) = w.records("snapshot")
        assert w.order()[-2:] == ["journal snapshot", "evidence MakeProof"]
        assert made.after == snapshot["snapshot"] and snapshot["workspace"] == made.workspace == "acme"
        assert (made.since, made.until, made.link) == (asked.since, None, None)
        facts = w.payload(messages.MakeProof)
        policy = w.controller.policies["acme"]
        assert facts["policy"]["digest"] == policy.digest and facts["policy"]["guard"] == "enforce"
        assert json.loads(facts["policy"]["text"])["workspace"] == "acme"
        assert facts["ruleset"]["text"] == w.ruleset and facts["ruleset"]["drift"] == []
        assert set(facts) == {"policy", "registry", "ruleset", "versions", "machine"}
        assert set(facts["versions"]) == {"egressd", "kernel", "nft", "python"}
        assert "rival" not in json.dumps(facts)
        client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    ("uid", "workspace", "reason"),
    [(4002, "acme", "member"), (4003, "acme", "member"), (4001, "none", "member"), (0, "none", "workspace")],
)
def test_nobody_proves_what_is_not_theirs(
    tmp_path: Path, callers: list[int], uid: int, workspace: str, reason: str
) -> None:
    async def dialogue(w: World) -> None:
        callers.append(uid)
        client = w.client()
        refusal = await client.ask(messages.Prove(workspace=workspace))
        assert refusal.reason == reason
        assert not w.of(messages.MakeProof) and not w.records("snapshot")
        client.close()

    play(tmp_path, dialogue)


def test_a_receipt_waits_for_the_end_of_its_sandbox_and_for_nobody_elses(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dialogue(w: World) -> None:
        holder, lease = await spawned(w, callers)
        callers.append(4002)
        other = w.client()
        await other.spawn("rival")
        callers.append(4001)
        client = w.client()
        for link in (lease.link + 1, lease.link + 7):  # another's, and none
            refusal = await client.ask(messages.Prove(workspace="acme", link=link))
            assert refusal.reason == "member" and f"eg{link}" in refusal.text
        monkeypatch.setattr(control, "_RECEIPT_WAIT", 0.05)
        refusal = await client.ask(messages.Prove(workspace="acme", link=lease.link))
        assert refusal.reason == "unavailable" and "has not ended" in refusal.text
        monkeypatch.setattr(control, "_RECEIPT_WAIT", 10.0)
        client.say(messages.Prove(workspace="acme", link=lease.link))
        await asyncio.sleep(0.05)
        assert not w.of(messages.MakeProof)
        holder.close()
        assert isinstance(await client.hear(), messages.Part)
        order = w.order()
        assert order.index("journal sandbox-closed") < order.index("evidence MakeProof")
        for name in ("resolver", "relay", "inspector"):  # each has told what it denied before the proof
            assert f"{name} UnbindSource" in order[: order.index("evidence MakeProof")]
        assert w.of(messages.MakeProof)[0].link == lease.link
        assert await client.ask(messages.Prove(workspace="acme", link=lease.link)) == {"payload": "proved"}
        for each in (client, other):
            each.close()

    play(tmp_path, dialogue)


def test_proofs_are_made_in_turns_and_nobody_keeps_others_from_theirs(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_PROOFS_PER_USER", 4)

    async def dialogue(w: World) -> None:
        w.held = asyncio.Event()
        callers.extend([4001] * 5 + [4002] * 2)
        clients = [w.client() for _ in range(7)]

        def made() -> list[str]:
            return [asked.workspace for asked in w.of(messages.MakeProof)]

        for client in clients[:4]:
            client.say(messages.Prove(workspace="acme"))
        await until(lambda: len(made()) == 1)  # one of a user's, however many he asks for
        refusal = await clients[4].ask(messages.Prove(workspace="acme"))
        assert refusal.reason == "limit"
        clients[5].say(messages.Prove(workspace="rival"))
        await until(lambda: made() == ["acme", "rival"])
        clients[6].say(messages.Prove(workspace="rival"))
        clients[3].close()  # who gave up is passed over
        w.held.set()
        for client in [*clients[:3], *clients[5:]]:
            assert isinstance(await client.hear(), messages.Part)
        assert sorted(made()) == ["acme"] * 3 + ["rival"] * 2
        assert await clients[4].ask(messages.Prove(workspace="acme")) == {"payload": "proved"}
        for client in [*clients[:3], *clients[4:]]:
            client.close()

    play(tmp_path, dialogue)


def test_who_waits_for_a_proof_of_what_is_removed_meanwhile_is_told(
    tmp_path: Path, callers: list[int]
) -> None:
    async def dialogue(w: World) -> None:
        w.held = asyncio.Event()
        callers.extend([4001, 4001])
        first, second = w.client(), w.client()
        for client in (first, second):
            client.say(messages.Prove(workspace="acme"))
        await until(lambda: len(w.of(messages.MakeProof)) == 1)
        (w.workspaces / "acme.yaml").unlink()
        await w.controller.apply(by="test")
        w.held.set()
        assert isinstance(await first.hear(), messages.Part)
        assert (await second.hear()).reason == "member"
        assert len(w.of(messages.MakeProof)) == 1
        for client in (first, second):
            client.close()

    play(tmp_path, dialogue)


def test_a_defect_is_an_answer_as_well(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dialogue(w: World) -> None:
        async def counters() -> Any:
            raise KeyError("acme")

        monkeypatch.setattr(w.controller, "counters", counters)
        client = w.client()
        assert (await client.ask(messages.Ask(what="counters"))).reason == "unknown"
        client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    "question",
    [messages.Prove(workspace="acme"), messages.Ask(what="status"), messages.Ask(what="counters")],
)
def test_who_asks_of_a_workspace_that_is_removed_meanwhile_is_answered(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch, question: Any
) -> None:
    async def dialogue(w: World) -> None:
        callers.append(4001)
        client = w.client()
        counters = w.controller.counters

        async def read() -> Any:
            found = await counters()
            if "acme" in w.controller.policies:
                (w.workspaces / "acme.yaml").unlink()
                monkeypatch.setattr(w.controller, "counters", counters)
                await w.controller.apply(by="test")
            return found

        monkeypatch.setattr(w.controller, "counters", read)
        answer = await client.ask(question)
        if isinstance(question, messages.Prove):
            assert answer.reason == "workspace" and not w.of(messages.MakeProof)
        else:
            assert "balanced" in answer
        client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize(
    "claim",
    [
        messages.Ended(status=0, max_rss=1 << 70),
        messages.Ended(status=0, user_seconds=1e300),
        messages.Attempt(protocol="tcp", destination="203.0.113.9", pid=1 << 70),
    ],
)
def test_a_claim_that_no_record_could_hold_ends_the_sandbox_and_its_end_is_recorded(
    tmp_path: Path, callers: list[int], claim: Any
) -> None:
    async def dialogue(w: World) -> None:
        client, lease = await spawned(w, callers)
        client.say(claim)
        (record,) = await until(lambda: w.records("sandbox-closed"))
        assert record["link"] == f"eg{lease.link}" and "exit" not in record and not w.records("attempt")
        client.close()

    play(tmp_path, dialogue)


def test_another_auditor_proves_as_the_one_before(tmp_path: Path, callers: list[int]) -> None:
    async def dialogue(w: World) -> None:
        client = w.client()
        w.connect("evidence")  # while the old channel is still open
        await w.settle()
        assert await client.ask(messages.Prove(workspace="acme")) == {"payload": "proved"}
        w.disconnect("evidence")
        await w.settle()
        assert (await client.ask(messages.Prove(workspace="acme"))).reason == "unavailable"
        w.connect("evidence")
        assert await client.ask(messages.Prove(workspace="acme")) == {"payload": "proved"}
        client.close()

    play(tmp_path, dialogue)


@pytest.mark.parametrize("what", ["auditor gone", "warden gone", "refused", "journal full"])
def test_what_cannot_be_proved_is_refused(
    tmp_path: Path, callers: list[int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from egressd.processes import snapshots

    monkeypatch.setattr(snapshots, "_PATIENCE", 0.02)

    async def dialogue(w: World) -> None:
        client = w.client()
        match what:
            case "auditor gone":
                w.disconnect("evidence")
            case "warden gone":
                w.disconnect("warden")
            case "refused":
                w.refusing.add(messages.MakeProof)
            case _:
                w.journal.full = True
        await w.settle()
        refusal = await client.ask(messages.Prove(workspace="acme"))
        assert isinstance(refusal, messages.Refusal) and refusal.reason == "unavailable", refusal
        client.close()

    play(tmp_path, dialogue)
