"""From the controller's document to metrics: exact numbers, and labels that nobody can make many of."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from egressd.ipc import messages
from egressd.model.verdicts import Reason
from egressd.processes.exporter import rendered
from egressd.processes.metric_families import OTHER, TABLE, Families, Rows, read, tell
from metrics.metrics_scene import (
    NOW,
    ROOT,
    account,
    document,
    labels_of,
    one,
    promtool,
    row,
    samples,
    told,
)


def test_a_pin_tells_what_it_keeps_out_and_what_it_rests_on() -> None:
    pinned = document()
    acme, torn = pinned["status"]["workspaces"]
    acme["residency"] = {"barred": 2, "addresses_refused": 3, "stale": ["azure"], "broken": None}
    torn["residency"] = {"barred": 0, "addresses_refused": 0, "stale": [], "broken": "aws.json: no table"}
    found = told(pinned)
    for name, numbers in (("acme", (2, 3, 1, 0)), ("torn", (0, 0, 0, 1))):
        words = ("barred_rules", "refused_addresses", "stale_tables", "broken")
        assert tuple(one(found, f"residency_{word}", workspace=name) for word in words) == numbers
    assert labels_of(told(document()), "residency_broken", "workspace") == set(), "nobody is pinned"


def test_each_number_has_its_place() -> None:
    found = told(document())
    assert one(found, "enforcing") == one(found, "books_balanced") == 1
    assert one(found, "ruleset_drift") == 0
    assert one(found, "build_info", version="0.1.0") == 1
    assert one(found, "start_time_seconds") == NOW - 60
    assert (one(found, "process_up", process="warden"), one(found, "process_up", process="resolver")) == (
        1,
        0,
    )
    assert one(found, "process_restarts_total", process="resolver") == 2
    assert one(found, "policy_info", workspace="acme", guard="enforce", digest="sha256:ab") == 1
    assert one(found, "policy_broken", workspace="acme") == 0
    assert one(found, "policy_broken", workspace="torn") == 1
    assert one(found, "sandboxes", workspace="acme") == 3
    assert one(found, "links_ended_total", workspace="acme") == 5
    assert one(found, "host_packets_total", workspace="acme", host="api.example", direction="out") == 1
    assert one(found, "host_bytes_total", workspace="acme", host="api.example", direction="in") == 200
    assert one(found, "host_connections_total", workspace="acme", host="api.example") == 1
    assert one(found, "host_upstream_bytes_total", workspace="acme", host="db.example") == 300
    assert labels_of(found, "host_upstream_bytes_total", "host") == {"db.example"}, "only where it is read"
    assert one(found, "received_bytes_total", workspace="acme") == 1000
    judged = [
        one(found, "judged_bytes_total", workspace="acme", verdict=v) for v in ("admitted", "denied", "other")
    ]
    assert judged == [550, 400, 50]
    assert one(found, "denied_packets_total", workspace="acme", reason="unlisted") == 4
    assert one(found, "denied_packets_total", workspace="acme", reason="shape") == 0, "a zero is told, too"
    assert one(found, "late_bytes_total", reason="unresolved") == 60
    assert one(found, "names_refused_total", workspace="acme", reason="budget-names") == 1
    assert one(found, "flows_refused_total", workspace="acme", reason="sni-other") == 6
    assert one(found, "journal_records_total") == 1000
    assert one(found, "journal_lost_total", cause="queue") == 2
    assert one(found, "journal_uncovered_records") == 10
    assert one(found, "journal_checkpoint_age_seconds") == 30


def test_without_the_auditor_nothing_is_said_about_the_journal() -> None:
    found = told(document(journal=None))
    assert one(found, "journal_up") == 0
    assert not {name for name, _ in found} & {"egressd_journal_records_total", "egressd_journal_lag_seconds"}


def test_the_journal_is_the_auditors_own_message() -> None:
    state = messages.JournalState(request=1, records=7, octets=9, segments=1, queued=0, lag=0.0, lost={})
    found = told(document(journal=msgspec.to_builtins(state)))
    assert one(found, "journal_records_total") == 7
    assert not labels_of(found, "journal_checkpoint_age_seconds", "le"), "there is no checkpoint yet"


def test_drift_that_is_not_known_is_not_zero() -> None:
    assert "egressd_ruleset_drift" not in {name for name, _ in told(document(drift=None))}
    assert one(told(document(drift=["add rule x", "add rule y"])), "ruleset_drift") == 2


def test_a_host_that_was_removed_and_is_listed_again_is_one_host() -> None:
    hosts = [row("api.example"), row("api.example", kind="removed", out=[10, 1000], connections=0)]
    found = told(document(account(hosts=hosts)))
    assert one(found, "host_bytes_total", workspace="acme", host="api.example", direction="out") == 1100


def test_names_that_sandboxes_choose_are_no_labels() -> None:
    """A sandbox asks for as many names under a wildcard as its budget allows, again and again."""
    hosts = [row("*.search.example", kind="wildcard", out=[0, 0])]
    hosts += [row(f"{n}.search.example", kind="granted", wildcard="*.search.example") for n in range(50)]
    found = told(document(account(hosts=hosts)))
    assert labels_of(found, "host_bytes_total", "host") == {"*.search.example"}
    assert one(found, "host_bytes_total", workspace="acme", host="*.search.example", direction="out") == 5000


def test_beyond_so_many_hosts_the_rest_counts_together() -> None:
    hosts = [row(f"h{n}.example") for n in range(1200)]
    found = told(document(account(hosts=hosts)))
    assert len(labels_of(found, "host_bytes_total", "host")) == 1001
    assert one(found, "host_bytes_total", workspace="acme", host=OTHER, direction="out") == 200 * 100
    assert labels_of(found, "host_bytes_total", "host") >= {"h0.example", "h999.example", OTHER}


def test_no_count_moves_from_one_label_to_another() -> None:
    """A counter that shrinks is taken for one that began anew, and its whole value for new traffic."""
    rows = Rows(limit=2)
    names = ["a", "b", "c", "d"]

    def labels(*hosts: str) -> set[str]:
        return labels_of(
            told(document(account(hosts=[row(h) for h in hosts])), rows), "host_bytes_total", "host"
        )

    assert labels(*names) == {"a", "b", OTHER}
    assert labels("d", "c", "b", "a") == {"a", "b", OTHER}, "another order in the policy"
    assert labels("b", "c", "d") == {"b", OTHER}, "a place is free, and c stays where it counts"
    assert labels("b", "c", "d", "e") == {"b", "e", OTHER}, "a new one takes it"
    assert labels_of(told(document(account("other")), rows), "host_bytes_total", "host") == {
        "api.example", "db.example",
    }  # fmt: skip
    assert labels("c", "d") == {"c", "d"}, "the workspace was away: forgotten, and begun anew"


@pytest.mark.parametrize("field", ["denied", "names_refused_by", "flows_refused"])
def test_what_is_no_reason_of_ours_is_no_label(field: str) -> None:
    """The resolver and the inspector read strangers' bytes; taken over, they could send any word."""
    count: Any = [1, 10] if field == "denied" else 1
    made_up = account() | {field: {f"word{n}": count for n in range(500)} | {"unlisted": count}}
    metric = {"denied": "denied_packets_total", "names_refused_by": "names_refused_total"}.get(
        field, "flows_refused_total"
    )
    found = told(document(made_up))
    assert labels_of(found, metric, "reason") - set(Reason) == {OTHER}
    assert one(found, metric, workspace="acme", reason=OTHER) == 500


def test_a_refusal_that_never_was_is_told_as_zero() -> None:
    """Or its first occurrence were, for Prometheus, no increase."""
    found = told(document(account() | {"names_refused_by": {}, "flows_refused": {}}))
    assert one(found, "flows_refused_total", workspace="acme", reason="ech") == 0
    assert one(found, "names_refused_total", workspace="acme", reason="name") == 0


def test_causes_and_processes_are_few() -> None:
    journal = document()["journal"] | {"lost": {f"cause{n:04}": 1 for n in range(1000)}}
    status = document()["status"]
    status = status | {"processes": [{"name": "x\ny", "pid": 1, "state": "running", "restarts": 0}]}
    found = told(document(journal=journal, status=status))
    assert len(labels_of(found, "journal_lost_total", "cause")) == 65
    assert one(found, "journal_lost_total", cause=OTHER) == 936
    assert labels_of(found, "process_up", "process") == {OTHER}


TRICKY = 'a"} 1\negressd_up{x="\\'


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.just(TRICKY), st.text(st.characters(codec="utf-8"), max_size=40)))
def test_foreign_text_stays_inside_its_label(text: str) -> None:
    families = Families()
    odd = account(text, hosts=[row(text)])
    tell(read(document(odd)), Rows(), families, now=NOW)
    plain = samples(rendered(families, as_openmetrics=False, compressed=False).decode())
    assert one(plain, "host_connections_total", workspace=text, host=text) == 1
    assert len(plain) == len(told(document(account(hosts=[row("a")])))), "no sample more"
    open_ = rendered(families, as_openmetrics=True, compressed=False).decode()
    hosts = {s.labels.get("host") for f in openmetrics_families(open_) for s in f.samples}
    assert hosts == {None, text}


def test_prometheus_finds_nothing_to_improve() -> None:
    """`promtool check metrics`: names, units, help, and that counters end in _total."""
    families = Families()
    for name, told_ in TABLE.items():
        families.tell(name, 1, *(["x"] * len(told_.labels)))
    promtool("check", "metrics", stdin=rendered(families, as_openmetrics=False, compressed=False).decode())


def test_a_document_that_is_not_one_is_refused() -> None:
    for broken in ({}, document(counters={}), document(status=None), [], document(journal={"records": -1})):
        with pytest.raises(msgspec.ValidationError):
            read(broken)


def test_the_page_lists_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    listed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `egressd_")
    ]
    told_ = [[f"`{m.name}`", m.kind, ", ".join(m.labels) or "none", m.text] for m in TABLE.values()]
    assert listed == told_, "docs/metrics.md"


# ---- requests


REQUESTS = {
    "workspaces": {
        "acme": {"outcomes": {"done": 3, "refused": 2, "odd": 7}, "documents": 900, "undestroyed": 1,
                 "leftovers": 4},
        "rival": {"outcomes": {}, "documents": 0, "undestroyed": 0, "leftovers": 0},
    },
    "refused": {"limit": 5, "made-up": 2},
}  # fmt: skip


def test_what_requests_came_to_by_their_brokers_word() -> None:
    found = told(document(requests=REQUESTS))
    outcomes = {o: one(found, "requests_total", workspace="acme", outcome=o) for o in ("done", "refused")}
    assert outcomes == {"done": 3, "refused": 2}
    assert labels_of(found, "requests_total", "outcome") == {"done", "failed", "stopped", "refused"}
    assert one(found, "requests_total", workspace="rival", outcome="done") == 0, "from the beginning"
    assert one(found, "request_documents_total", workspace="acme") == 900
    assert one(found, "requests_undestroyed_total", workspace="acme") == 1
    assert one(found, "request_leftovers_total", workspace="acme") == 4
    refused = {r: one(found, "testimony_refused_total", reason=r) for r in ("member", "limit", OTHER)}
    assert refused == {"member": 0, "limit": 5, OTHER: 2}


def test_without_brokers_nothing_is_told_of_requests() -> None:
    for more in ({}, {"requests": {"workspaces": {}, "refused": {}}}):
        found = told(document(**more))
        assert not [name for name, _ in found if name.startswith("egressd_request")]
        assert one(found, "testimony_refused_total", reason="member") == 0
