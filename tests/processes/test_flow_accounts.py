"""Flow records: what the kernel tells at the end of connections, and what then is written."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from egressd.model.identities import Link
from egressd.processes.denials import Attribution
from egressd.processes.flow_accounts import FlowLog, Hosts
from egressd.processes.journal_file import Draft
from egressd.ruleset.layout import (
    CUT,
    RESOLVER_BLOCK,
    TOLD,
    UNLISTED_BLOCK,
    Kind,
    Mark,
    Pools,
    dial_source,
)
from packets.conntrack_datagrams import ICMP, UDP, ended

POOLS = Pools()
INDEX = 12
BEGAN = 1_700_000_000_000_000_000
S4, S6 = "198.19.0.7", "fd53:1::7"
R4, R6 = "203.0.113.9", "2001:db8::9"


def mark(kind: Kind, block: int = 5, index: int = INDEX) -> int:
    return int(Mark(kind=kind, workspace=index, block=block))


class Scene:
    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.owners, self.hosts = Attribution(), Hosts(POOLS)
        self.log = FlowLog(self.owners, self.hosts, submit=self.drafts.append)
        self.owners.bind(Link(7), "acme", ip_address(S4), ip_address(S6))
        self.hosts.learn("acme", INDEX, {5: "api.test", 6: "ollama", 7: "10.0.0.0/8"}, now=0)
        self.log.opening(Link(7))

    def ends(self, *arguments: Any, now: float = 0.0, **options: Any) -> None:
        self.log.read(ended(*arguments, **options), now=now)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [dict(d.fields) for d in self.drafts if d.event == event]

    def flow(self) -> dict[str, Any]:
        [found] = self.of("flow")
        return found

    def close(self, ok: tuple[int, int] | None, *, now: float = 0.0) -> None:
        fields: dict[str, Any] = {"workspace": "acme"}
        if ok:
            fields |= {"ok_packets": ok[0], "ok_bytes": ok[1]}
        self.log.closed(Link(7), fields, at="2026-01-01T00:00:00.000000Z", now=now)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def synthetic(family: int, block: int = 5) -> str:
    return str(POOLS.synthetic(block, 2)[family == 6])


# ---- what is recorded


@pytest.mark.parametrize(("family", "source", "real"), [(4, S4, R4), (6, S6, R6)])
def test_a_flow_names_link_host_and_real_address(scene: Scene, family: int, source: str, real: str) -> None:
    scene.ends(source, synthetic(family), 443, mark=mark(Kind.FORWARD), real=real)
    assert scene.flow() == {
        "link": "eg7", "workspace": "acme", "host": "api.test", "kind": "host", "protocol": "tcp",
        "source": source, "source_port": 40000, "destination": synthetic(family), "port": 443,
        "address": real, "address_port": 443, "out_packets": 3, "out_bytes": 200, "in_packets": 2,
        "in_bytes": 5000, "seconds": 1.5,
    }  # fmt: skip
    assert scene.drafts[0].time == "2023-11-14T22:13:21.500000Z", "when it ended"


@pytest.mark.parametrize(
    ("kind", "block", "called", "host", "address"),
    [
        (Kind.FORWARD, 5, "host", "api.test", R4),
        (Kind.RELAY, 6, "local", "ollama", None),
        (Kind.INSPECT, 5, "read", "api.test", None),
        (Kind.DIRECT, 7, "direct", "10.0.0.0/8", R4),
        (Kind.DIRECT, UNLISTED_BLOCK, "direct", "(unlisted)", R4),
        (Kind.FORWARD, 99, "host", None, R4),
    ],
)
def test_the_mark_tells_the_kind_and_the_rule(
    scene: Scene, kind: Kind, block: int, called: str, host: str | None, address: str | None
) -> None:
    scene.ends(S4, synthetic(4), mark=mark(kind, block), real=R4)
    flow = scene.flow()
    assert (flow["kind"], flow["host"], flow["address"]) == (called, host, address)


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_inspector_dials_belongs_to_no_link(scene: Scene, family: int) -> None:
    source = str(dial_source(INDEX)[family == 6])
    scene.ends(source, synthetic(family), mark=mark(Kind.FORWARD), real=R6 if family == 6 else R4)
    flow = scene.flow()
    assert (flow["kind"], flow["link"], flow["workspace"], flow["host"]) == (
        "dialled", None, "acme", "api.test",
    )  # fmt: skip


@pytest.mark.parametrize("told", [0, TOLD])
def test_a_connection_that_was_cut_is_recorded_as_what_it_was(scene: Scene, told: int) -> None:
    cut = CUT | told | mark(Kind.FORWARD) & 0x07FF_FFFF
    scene.ends(S4, synthetic(4), 443, mark=cut, real=R4)
    flow = scene.flow()
    assert (flow["kind"], flow["workspace"], flow["host"], flow["address"]) == (
        "host",
        "acme",
        "api.test",
        R4,
    )


def test_icmp_and_datagrams(scene: Scene) -> None:
    scene.ends(S4, R4, mark=mark(Kind.DIRECT, 7), protocol=ICMP)
    scene.ends(S4, synthetic(4), 443, mark=mark(Kind.FORWARD), protocol=UDP)
    assert [(f["protocol"], f["port"]) for f in scene.of("flow")] == [("icmp", None), ("udp", 443)]


def test_without_counters_it_says_so(scene: Scene) -> None:
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), out=None, back=None, began=None)
    flow = scene.flow()
    assert (flow["out_packets"], flow["in_bytes"], flow["seconds"]) == (None, None, None)
    assert scene.log.uncounted == 1


def test_the_gateway_s_own_connections_are_nobody_s(scene: Scene) -> None:
    scene.ends("169.254.54.2", "169.254.54.1", mark=0)
    assert scene.drafts == []


def test_a_mark_that_is_none_of_ours_hides_no_flow(scene: Scene) -> None:
    scene.ends(S4, R4, mark=0xF00D)
    assert (scene.flow()["kind"], scene.flow()["host"], scene.flow()["link"]) == ("unknown", None, "eg7")


def test_rubbish_is_counted(scene: Scene) -> None:
    scene.log.read(b"rubbish", now=0)
    assert (scene.drafts, scene.log.malformed) == ([], 1)


# ---- names


def test_another_workspace_s_hosts_are_never_named(scene: Scene) -> None:
    scene.hosts.learn("other", 13, {5: "secret.test"}, now=0)
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD, 5, index=13))  # link of acme, mark of other
    assert (scene.flow()["workspace"], scene.flow()["host"]) == ("acme", None)


def test_a_number_that_becomes_another_workspace_s_takes_no_names_along(scene: Scene) -> None:
    scene.hosts.learn("other", INDEX, {1: "x.test"}, now=0)
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD))
    assert scene.flow()["host"] is None


def test_a_block_that_is_given_on_keeps_its_former_host_for_what_began_before(scene: Scene) -> None:
    scene.hosts.learn("acme", INDEX, {5: "new.test"}, now=BEGAN)
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), began=BEGAN - 60 * 10**9, lasted=61 * 10**9)
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), began=BEGAN)
    assert [f["host"] for f in scene.of("flow")] == ["api.test", "new.test"]


def test_names_told_late_name_what_began_before(scene: Scene) -> None:
    scene.hosts.learn("acme", INDEX, {44: "late.test"}, now=BEGAN + 3600 * 10**9)
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD, 44))
    assert scene.flow()["host"] == "late.test"


def test_a_synthetic_address_names_its_host(scene: Scene) -> None:
    assert scene.hosts.named("acme", ip_address(synthetic(4))) == "api.test"
    assert scene.hosts.named("acme", ip_address(synthetic(6, 6))) == "ollama"
    assert scene.hosts.named("acme", ip_address(R4)) is None
    assert scene.hosts.named("other", ip_address(synthetic(4))) is None
    assert scene.hosts.named(None, ip_address(synthetic(4))) is None


# ---- many


def totals(flows: list[dict[str, Any]]) -> tuple[int, int, int, int, int]:
    return (
        sum(f.get("flows", 1) for f in flows),
        *(sum(f[name] for f in flows) for name in ("out_packets", "out_bytes", "in_packets", "in_bytes")),
    )  # type: ignore[return-value]


def test_a_flood_of_equal_flows_is_summed_exactly(scene: Scene) -> None:
    for i in range(500):
        scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), source_port=1024 + i, out=(i, i * 100))
    scene.log.due(now=0.9)
    assert len(scene.of("flow")) == 20, "the first ones, one by one"
    scene.log.due(now=1.0)
    flows = scene.of("flow")
    assert len(flows) == 21
    assert (flows[-1]["flows"], flows[-1]["source_port"], flows[-1]["seconds"]) == (480, None, 1.5)
    assert (flows[-1]["host"], flows[-1]["port"], flows[-1]["link"]) == ("api.test", 443, "eg7")
    assert totals(flows) == (500, sum(range(500)), 100 * sum(range(500)), 1000, 2_500_000)


def test_the_next_second_begins_anew(scene: Scene) -> None:
    for second in range(3):
        for i in range(30):
            scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), source_port=i + 1, now=float(second))
    scene.log.drain()
    assert len(scene.of("flow")) == 3 * 21
    assert totals(scene.of("flow"))[0] == 90


def test_a_scan_of_many_destinations_is_bounded_and_exact(scene: Scene) -> None:
    for i in range(5000):
        scene.ends(S4, f"10.1.{i >> 8}.{i & 255}", 443, mark=mark(Kind.DIRECT, 7))
    scene.log.drain()
    flows = scene.of("flow")
    assert len(flows) == 201
    assert totals(flows) == (5000, 15_000, 1_000_000, 10_000, 25_000_000)
    assert (flows[-1]["destination"], flows[-1]["host"]) == (None, "10.0.0.0/8")


def test_one_link_s_flood_takes_nothing_from_another(scene: Scene) -> None:
    scene.owners.bind(Link(8), "acme", ip_address("198.19.0.8"), ip_address("fd53:1::8"))
    for i in range(1000):
        scene.ends(S4, f"10.1.{i >> 8}.{i & 255}", 443, mark=mark(Kind.DIRECT, 7))
    scene.ends("198.19.0.8", synthetic(4), mark=mark(Kind.FORWARD))
    assert scene.of("flow")[-1]["link"] == "eg8"


def test_all_links_together_are_bounded_too(scene: Scene) -> None:
    for link in range(100, 160):
        scene.owners.bind(Link(link), "acme", ip_address(f"198.19.0.{link}"), ip_address(f"fd53:1::{link}"))
        for i in range(150):
            scene.ends(f"198.19.0.{link}", f"10.1.0.{i}", 443, mark=mark(Kind.DIRECT, 7))
    scene.log.drain()
    flows = scene.of("flow")
    assert 5000 < len(flows) <= 5060
    assert totals(flows)[0] == 60 * 150
    assert {f["link"] for f in flows} == {f"eg{n}" for n in range(100, 160)}


# ---- links that end


def test_a_link_s_sums_against_its_counter(scene: Scene) -> None:
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), out=(3, 200))
    scene.ends(S6, synthetic(6), mark=mark(Kind.INSPECT), out=(10, 1000))
    scene.ends(S4, "169.254.53.53", 53, mark=mark(Kind.RESOLVE, RESOLVER_BLOCK), protocol=UDP, out=(1, 60))
    scene.ends(str(dial_source(INDEX)[0]), synthetic(4), mark=mark(Kind.FORWARD), out=(99, 9999))
    scene.close((16, 1300))
    scene.log.erased(Link(7))
    scene.log.settle(now=0, empty=False)
    assert scene.of("link-flows") == [], "there may be more in the socket"
    scene.log.settle(now=0, empty=True)
    [found] = scene.of("link-flows")
    assert found == {
        "link": "eg7", "workspace": "acme", "flows": 2, "questions": 1,
        "out_packets": 14, "out_bytes": 1260, "in_packets": 6, "in_bytes": 15000,
        "question_packets": 1, "question_bytes": 60, "answer_packets": 2, "answer_bytes": 5000,
        "ok_packets": 16, "ok_bytes": 1300, "unrecorded_packets": 2, "unrecorded_bytes": 40,
    }  # fmt: skip
    assert len(scene.of("flow")) == 3, "questions are not recorded one by one"


def test_when_nothing_is_missing_nothing_is_waited_for(scene: Scene) -> None:
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), out=(3, 200))
    scene.close((3, 200))
    scene.log.settle(now=0, empty=False)
    assert scene.of("link-flows")[0]["unrecorded_packets"] == 0
    assert "partial" not in scene.of("link-flows")[0]


def test_last_events_are_waited_for_but_not_for_ever(scene: Scene) -> None:
    scene.close((3, 200))
    scene.log.settle(now=9.9, empty=True)
    assert scene.of("link-flows") == []
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), out=(2, 100))
    scene.log.settle(now=10.0, empty=True)
    [found] = scene.of("link-flows")
    assert (found["flows"], found["unrecorded_packets"], found["unrecorded_bytes"]) == (1, 1, 100)
    assert found["partial"] is True, "nobody said that this was all"


def test_erased_before_it_is_told_closed(scene: Scene) -> None:
    scene.log.erased(Link(7))
    scene.close((1, 40))
    scene.log.settle(now=0, empty=True)
    assert scene.of("link-flows")[0]["unrecorded_packets"] == 1


def test_a_link_whose_counters_nobody_read(scene: Scene) -> None:
    scene.close(None)
    scene.log.settle_all()
    [found] = scene.of("link-flows")
    assert (found["ok_packets"], found["unrecorded_packets"], found["flows"]) == (None, None, 0)


def test_a_link_that_is_older_than_the_auditor_is_marked(scene: Scene) -> None:
    scene.owners.bind(Link(9), "acme", ip_address("198.19.0.9"), ip_address("fd53:1::9"))
    fields = {"workspace": "acme", "ok_packets": 5, "ok_bytes": 500}
    scene.log.closed(Link(9), fields, at="2026-01-01T00:00:00.000000Z", now=0)
    scene.log.settle_all()
    assert scene.of("link-flows")[0]["partial"] is True


def test_more_recorded_than_admitted_cannot_be_and_is_an_alarm(scene: Scene) -> None:
    scene.ends(S4, synthetic(4), mark=mark(Kind.FORWARD), out=(3, 200))
    scene.close((2, 180))
    scene.log.settle_all()
    assert scene.of("link-flows")[0]["unrecorded_packets"] == -1
    [alarm] = scene.of("books-unbalanced")
    assert alarm["differences"] == "flows of eg7: 1 packets, 20 bytes beyond its counter"
