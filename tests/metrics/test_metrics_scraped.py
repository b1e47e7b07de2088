"""A real Prometheus scrapes a real egressd; and who else reaches the exporter."""

from __future__ import annotations

import http.client
import json
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from egressd.processes.metric_families import TABLE
from lab import topology
from lab.daemon import ACCOUNTS, Daemon
from lab.machine import Lab, poll
from metrics.metrics_scene import ROOT, Samples, labels_of, one, program, samples

pytestmark = pytest.mark.kernel

MONITORING = ROOT / "docs" / "monitoring"
FETCH = ["curl", "-sS", "--max-time", "5", "--noproxy", "*", "-o", "/dev/null"]
PORT, PROMETHEUS = 9464, 9090
POLICY = """\
workspace: acme
guard: enforce
members: [user:{user}]
allow:
  - {{host: plain.test, ports: [80/tcp], verify: address}}
  - host: eu.api.openai.test
  - host: "*.search.test"
"""


def get(lab: Lab, path: str, *, port: int = PORT, address: str = "127.0.0.1") -> tuple[int, bytes]:
    """Over a connection that was made in lab-host."""
    sock = lab.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    connection = http.client.HTTPConnection(address, port)
    sock.settimeout(10)
    sock.connect((address, port))
    connection.sock = sock
    connection.request("GET", path)
    response = connection.getresponse()
    with response:
        return response.status, response.read()


def scrape(lab: Lab, **options: Any) -> Samples:
    status, body = get(lab, "/metrics", **options)
    assert status == 200
    return samples(body.decode())


@pytest.fixture(scope="module")
def measured(start_module_daemon: Callable[..., Daemon], lab: Lab) -> Daemon:
    daemon = start_module_daemon(policies={"acme": POLICY.format(user=lab.user)}, metrics=f"127.0.0.1:{PORT}")
    poll(lambda: "exporter" in daemon.pids(), what="the exporter")
    poll(lambda: settled(lab), what="metrics of a settled daemon")
    for family in ("-4", "-6"):
        daemon.sandbox("acme", [*FETCH, family, "http://plain.test/"]).check()
        daemon.sandbox("acme", [*FETCH, family, "http://evil.test/"])
    daemon.sandbox("acme", [*FETCH, f"http://{topology.EVIL4}/"])
    daemon.sandbox("acme", [*FETCH, f"http://[{topology.EVIL6}]/"])
    daemon.sandbox("acme", [*FETCH, "http://eu.api.openai.test:443/"])  # no TLS: refused by the inspector
    return daemon


def settled(lab: Lab) -> bool:
    try:
        found = scrape(lab)
        return one(found, "up") == 1 and labels_of(found, "process_up", "process") >= {
            "controller",
            "auditor",
        }
    except (OSError, KeyError):
        return False


@pytest.fixture(scope="module")
def prometheus(measured: Daemon, lab: Lab) -> Iterator[Callable[[str], Any]]:
    """`query(expression)`: the result, as Prometheus's API has it."""
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [{"job_name": "egressd", "static_configs": [{"targets": [f"127.0.0.1:{PORT}"]}]}],
    }
    lab.path("prometheus.yml").write_text(yaml.safe_dump(settings))
    running = lab.start(
        [
            program("prometheus"),
            f"--config.file={lab.inside('prometheus.yml')}",
            f"--storage.tsdb.path={lab.inside('prometheus')}",
            f"--web.listen-address=127.0.0.1:{PROMETHEUS}",
            "--log.level=warn",
        ]
    )

    def ask(path: str) -> Any:
        status, body = get(lab, f"/api/v1/{path}", port=PROMETHEUS)
        answer = json.loads(body)
        assert (status, answer["status"]) == (200, "success"), answer
        return answer["data"]

    def scraped_twice() -> bool:
        try:
            found = ask("query?query=count_over_time(egressd_up[1m])")["result"]
        except (OSError, ValueError):
            return False
        assert running.status() is None, running.err
        return bool(found) and float(found[0]["value"][1]) >= 2

    try:
        poll(scraped_twice, timeout=30, what="Prometheus has scraped")
        yield ask
    finally:
        running.kill()


def query(ask: Callable[[str], Any], expression: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = ask("query?query=" + urllib.parse.quote(expression))["result"]
    return result


# ---- numbers


def test_metrics_are_the_kernels_counters_exactly(measured: Daemon, lab: Lab) -> None:
    counters = measured.counters("acme")

    def fresh() -> Samples | None:
        found = scrape(lab)
        return (
            found
            if one(found, "received_packets_total", workspace="acme") == counters["balance"]["in"][0]
            else None
        )

    found = poll(fresh, what="a reading from after the traffic")
    for row in counters["hosts"]:
        for direction in ("out", "in"):
            packets = one(
                found, "host_packets_total", workspace="acme", host=row["host"], direction=direction
            )
            octets = one(found, "host_bytes_total", workspace="acme", host=row["host"], direction=direction)
            assert [packets, octets] == row[direction], row
    for reason, (packets, octets) in counters["denied"].items():
        assert one(found, "denied_packets_total", workspace="acme", reason=reason) == packets
        assert one(found, "denied_bytes_total", workspace="acme", reason=reason) == octets
    plain = one(found, "host_packets_total", workspace="acme", host="plain.test", direction="out")
    assert plain > 0 and one(found, "denied_packets_total", workspace="acme", reason="unlisted") >= 2
    assert one(found, "links_ended_total", workspace="acme") == counters["ended"]["links"] == 7
    judged = sum(
        one(found, "judged_bytes_total", workspace="acme", verdict=v) for v in ("admitted", "denied", "other")
    )
    assert one(found, "received_bytes_total", workspace="acme") == judged > 0
    admitted = one(found, "judged_bytes_total", workspace="acme", verdict="admitted")
    assert admitted == sum(row["out"][1] for row in counters["hosts"])
    assert one(found, "names_refused_total", workspace="acme", reason="name") > 0
    assert one(found, "flows_refused_total", workspace="acme", reason="not-tls") == 1


def test_all_is_well_and_said_so(measured: Daemon, lab: Lab) -> None:
    found = scrape(lab)
    assert [one(found, name) for name in ("up", "enforcing", "books_balanced", "journal_up")] == [1, 1, 1, 1]
    assert labels_of(found, "process_up", "process") == measured.pids().keys() - {"supervisor"}
    assert one(found, "journal_records_total") > 0
    assert one(found, "policy_broken", workspace="acme") == 0
    assert (get(lab, "/healthz"), get(lab, "/")[0]) == ((200, b"ok\n"), 404)


def test_every_reason_that_is_counted_is_one_we_know(measured: Daemon, lab: Lab) -> None:
    found = scrape(lab)
    for metric in (
        "denied_packets_total",
        "late_packets_total",
        "names_refused_total",
        "flows_refused_total",
    ):
        assert "(other)" not in labels_of(found, metric, "reason"), metric


# ---- a real Prometheus


def test_prometheus_stores_what_was_told(prometheus: Callable[[str], Any], measured: Daemon) -> None:
    assert query(prometheus, 'up{job="egressd"}')[0]["value"][1] == "1"
    counters = measured.counters("acme")
    asked = 'sum(egressd_received_packets_total{workspace="acme"})'
    poll(
        lambda: int(query(prometheus, asked)[0]["value"][1]) == counters["balance"]["in"][0],
        what="Prometheus has the last count",
    )
    lost = "egressd_received_packets_total - on (workspace) sum by (workspace) (egressd_judged_packets_total)"
    assert [sample["value"][1] for sample in query(prometheus, lost)] == ["0"]
    kinds = prometheus("targets/metadata?match_target=" + urllib.parse.quote('{job="egressd"}'))
    types = {entry["metric"]: entry["type"] for entry in kinds}
    for told in TABLE.values():
        family = told.name.removesuffix("_total") if told.kind == "counter" else told.name
        assert types.get(family, told.kind) == told.kind, "in OpenMetrics the family has no _total"


def test_each_alert_rule_is_evaluated_and_none_is_raised(prometheus: Callable[[str], Any]) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = poll(evaluated, what="every rule was evaluated")
    assert {rule["name"] for rule in rules if rule["health"] != "ok"} == set()
    assert {rule["name"] for rule in rules if rule["state"] != "inactive"} == set()


def expressions() -> dict[str, str]:
    """Panel and target -> expression, variables as Grafana would fill them in."""
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": re.sub(
            r"\$(job|instance|workspace)\b", ".*", target["expr"]
        ).replace("$__rate_interval", "1m")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }


@pytest.mark.parametrize("panel", expressions())
def test_each_panel_asks_what_prometheus_can_answer(prometheus: Callable[[str], Any], panel: str) -> None:
    expression = expressions()[panel]
    assert "$" not in expression
    named = {name.removeprefix("egressd_") for name in re.findall(r"\begressd_\w+", expression)}
    assert named and named <= TABLE.keys()
    found = query(prometheus, expression)
    quiet = ("> 0", "lost", "checkpoint_age", "drift")  # nothing to show where nothing is wrong, or not yet
    assert found or any(word in expression for word in quiet), expression


# ---- who reaches it


def test_no_sandbox_reaches_the_exporter(measured: Daemon, lab: Lab) -> None:
    places = ("127.0.0.1", "[::1]", "169.254.54.1", "[fd53:2::1]", str(topology.HOST4), f"[{topology.HOST6}]")
    for place in places:
        result = measured.sandbox("acme", [*FETCH, f"http://{place}:{PORT}/metrics"])
        assert result.status == 7, (place, result.err)  # could not connect
    assert one(scrape(lab), "exporter_requests_total", code="200") > 0, "it was there all the time"


def test_only_that_one_address_is_listened_at(measured: Daemon, lab: Lab) -> None:
    listening = lab.run(["ss", "-Hltn", f"sport = :{PORT}"]).check().out.split()
    assert f"127.0.0.1:{PORT}" in listening
    for address in ("::1", str(topology.HOST4)):
        with pytest.raises(ConnectionRefusedError):
            get(lab, "/metrics", address=address)


def test_connections_that_are_held_open_keep_prometheus_out_not(measured: Daemon, lab: Lab) -> None:
    held = [lab.socket(socket.AF_INET) for _ in range(200)]
    try:
        for sock in held:
            sock.connect(("127.0.0.1", PORT))
            sock.send(b"GET /metrics HTTP/1.1\r\nX: ")
        assert one(scrape(lab), "up") == 1
        opened = lab.run(["ls", f"/proc/{measured.pids()['exporter']}/fd"]).check().out.split()
        assert len(opened) < 100
    finally:
        for sock in held:
            sock.close()


def test_it_has_no_right_but_to_ask(measured: Daemon, lab: Lab) -> None:
    text = lab.run(["cat", f"/proc/{measured.pids()['exporter']}/status"]).check().out
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    if not lab.single_user and not lab.rootless:
        uid = int(ACCOUNTS["metrics"])
        assert status["Uid"].split() == [str(uid)] * 4
        for words in (["policy", "apply"], ["ruleset"], ["policy", "diff"]):
            assert measured.ctl(*words, uid=uid).status != 0, words
        assert measured.sandbox("acme", ["true"], uid=uid).status == 125


# ---- life


def test_its_death_is_nobodys_business(measured: Daemon, lab: Lab) -> None:
    sandbox = measured.start_sandbox("acme", ["sleep", "60"])
    poll(lambda: one(scrape(lab), "sandboxes", workspace="acme") == 1, what="the sandbox is told")
    old = measured.pids()["exporter"]
    lab.signal(old, 9)

    def again() -> bool:
        try:
            return one(scrape(lab), "process_restarts_total", process="exporter") == 1
        except OSError:  # the socket stays; who is in its queue when the process dies is reset
            return False

    poll(again, timeout=15, what="the exporter is back")
    assert measured.pids()["exporter"] != old
    assert sandbox.status() is None
    sandbox.kill()


def test_it_finds_the_controller_that_comes_after_one_that_died(measured: Daemon, lab: Lab) -> None:
    exporter = measured.pids()["exporter"]
    lab.signal(measured.pids()["controller"], 9)

    def again() -> bool:
        found = scrape(lab)
        return one(found, "up") == 1 and one(found, "process_restarts_total", process="controller") == 1

    poll(again, timeout=15, what="the new controller is asked")
    assert measured.pids()["exporter"] == exporter
