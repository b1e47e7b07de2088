"""Other people's firewalls, as the kernel lists them: does what comes from egw get through?"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.diagnosis import firewall
from egressd.diagnosis.facts import Obstacle
from egressd.ruleset import build, layout
from egressd.ruleset.layout import Pools

pytestmark = pytest.mark.kernel

DOCKER = """
table ip filter {
  chain DOCKER-USER { %s counter return; }
  chain DOCKER { iifname != "docker0" oifname "docker0" counter drop; }
  chain DOCKER-ISOLATION { iifname "docker0" oifname != "docker0" jump DOCKER-ISOLATION-2; counter return; }
  chain DOCKER-ISOLATION-2 { oifname "docker0" counter drop; counter return; }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    counter jump DOCKER-ISOLATION
    oifname "docker0" ct state related,established counter accept
    oifname "docker0" counter jump DOCKER
    iifname "docker0" oifname != "docker0" counter accept
  }
}
"""
FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state { invalid } drop
    ip6 daddr { ::/96, ::ffff:0:0/96 } reject with icmpv6 type addr-unreachable
    jump filter_FORWARD_ZONES
    reject with icmpx type admin-prohibited
  }
  chain filter_FORWARD_ZONES { %s iifname "wan" goto filter_FWD_public; goto filter_FWD_public; }
  chain filter_FWD_public { jump filter_FWD_public_allow; reject with icmpx type admin-prohibited; }
  chain filter_FWD_public_allow { }
  chain filter_FWD_trusted { accept; }
}
"""
UFW = """
table ip filter {
  chain ufw-before-forward { ct state related,established counter accept; ip protocol icmp counter accept; }
  chain ufw-user-forward { %s }
  chain ufw-after-forward { }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump ufw-before-forward
    counter jump ufw-user-forward
    counter jump ufw-after-forward
  }
}
"""
OWN = """
table inet mine {
  set inner { type ifname; elements = { "lan0", "egw" } }
  chain wall { type filter hook forward priority 0; policy drop; %s }
}
"""


def obstacles(listing: Any) -> list[tuple[str, str, bool]]:
    found = firewall.obstacles(listing, link="egw", uplinks=["wan"], ours=layout.HOST_TABLE)
    return [(obstacle.direction, obstacle.packet, obstacle.certain) for obstacle in found]


@pytest.fixture(scope="module")
def listed() -> Callable[[str], Any]:
    """A ruleset put into a namespace of its own, and read back as egressd reads it."""

    def read(ruleset: str) -> Any:
        script = "nft -f - && nft -j list ruleset"
        lines = re.sub(r" \}(?= \}|$)", "\n}", ruleset, flags=re.MULTILINE)
        done = subprocess.run(
            ["unshare", "--map-root-user", "--net", "sh", "-c", script],
            input=lines, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return read


BOTH_WAYS_4 = [("out", "ip", True), ("back", "ip", True)]
OUT = [("out", "ip", True), ("out", "ip6", True)]
ALL = [("out", "ip", True), ("back", "ip", True), ("out", "ip6", True), ("back", "ip6", True)]


@pytest.mark.parametrize(
    ("ruleset", "expected"),
    [
        ("", []),
        (DOCKER % "", BOTH_WAYS_4),
        (DOCKER % 'iifname "egw" counter accept;', [("back", "ip", True)]),
        (DOCKER % 'iifname "egw" accept; oifname "egw" ct state related,established accept;', []),
        (FIREWALLD % "", OUT),
        (FIREWALLD % 'iifname "egw" goto filter_FWD_trusted;', []),
        (UFW % "", [("out", "ip", True)]),
        (UFW % 'iifname "egw" counter accept;', []),
        (OWN % "", ALL),
        (OWN % "accept", []),
        (OWN % "counter", ALL),
        (OWN % 'iifname @inner accept; ct state vmap { established : accept, invalid : drop }', []),
        (OWN % 'iifname { "egw", "lan0" } accept; oifname "eg*" ct state established accept', []),
        (OWN % 'iifname vmap { "egw" : accept, "lan0" : drop }', [("back", v, True) for v in ("ip", "ip6")]),
        (OWN % 'meta nfproto ipv4 accept', [("out", "ip6", True), ("back", "ip6", True)]),
        # what may or may not hold: a port, a source
        (OWN % "tcp dport 443 accept", [(way, packet, False) for way, packet, _ in ALL]),
        (OWN % "ip saddr 10.0.0.0/8 accept", [("out", "ip", False), ("back", "ip", False), *ALL[2:]]),
        (OWN % "udp dport 53 accept; meta l4proto { icmp, udp } accept", ALL),  # none of ours is
        (OWN % "ip saddr 192.0.2.0/24 drop; accept", []),  # a blocklist: it means others
        (OWN % 'iifname != "egw" accept; iifname "egw" reject', OUT),
        # neither forward nor a filter nor of these families
        ("table inet other { chain c { type filter hook input priority 0; policy drop; } }", []),
        ("table bridge other { chain c { type filter hook forward priority 0; policy drop; } }", []),
        ("table inet egressd_host { chain c { type filter hook forward priority 0; policy drop; } }", []),
    ],
)  # fmt: skip
def test_what_a_firewall_does_with_us(
    listed: Any, ruleset: str, expected: list[tuple[str, str, bool]]
) -> None:
    assert obstacles(listed(ruleset)) == expected


def test_what_egressd_itself_makes_there_is_no_obstacle(listed: Any) -> None:
    assert obstacles(listed("\n".join(build.host(Pools())))) == []


@pytest.mark.parametrize(
    ("ruleset", "owner", "way"),
    [
        (DOCKER % "", "docker", "DOCKER-USER"),
        (FIREWALLD % "", "firewalld", "--zone=trusted"),
        (UFW % "", "ufw", "ufw route allow in on egw"),
        (OWN % "", "", 'nft insert rule inet mine wall iifname "egw" accept'),
    ],
)  # fmt: skip
def test_whose_it_is_and_what_to_do(listed: Any, ruleset: str, owner: str, way: str) -> None:
    found = firewall.obstacles(listed(ruleset), link="egw", uplinks=["wan"], ours=layout.HOST_TABLE)
    assert {obstacle.owner for obstacle in found} == {owner}
    assert way in firewall.remedy(found[0], link="egw")


def test_the_remedy_is_one(listed: Any) -> None:
    """The commands that are given for a firewall of one's own, given: nothing is left to find."""
    ruleset = OWN % ""
    found = firewall.obstacles(listed(ruleset), link="egw", uplinks=["wan"], ours=layout.HOST_TABLE)
    rules = [firewall.remedy(obstacle, link="egw").removeprefix("nft ") for obstacle in found]
    assert obstacles(listed("\n".join([ruleset, *rules]))) == []


def test_a_name_that_is_not_plain_is_not_put_into_a_command() -> None:
    made = Obstacle(
        family="inet",
        table="x; rm -rf /",
        chain="c",
        owner="",
        direction="out",
        packet="ip",
        why="",
        certain=True,
    )
    assert "rm" not in firewall.remedy(made, link="egw")


def test_a_maze_comes_to_an_end() -> None:
    """Chains that jump to the next one four times, fifteen deep: a thousand million ways."""
    rows: list[dict[str, Any]] = [
        {"chain": {"family": "inet", "table": "t", "name": "c0", "hook": "forward", "type": "filter"}}
    ]
    for depth in range(15):
        for _ in range(4):
            jump = {"jump": {"target": f"c{depth + 1}"}}
            rule = {"family": "inet", "table": "t", "chain": f"c{depth}", "expr": [jump]}
            rows.append({"rule": rule})
    loop = {"family": "inet", "table": "t", "chain": "c15", "expr": [{"jump": {"target": "c0"}}]}
    assert obstacles({"nftables": [*rows, {"rule": loop}]}) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["@s", "egw"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["nftables", "chain", "rule", "set", "expr", "match", "left", "right", "op", "meta",
                         "key", "vmap", "data", "jump", "target", "drop", "accept", "elem", "family", "table",
                         "name", "hook", "type", "policy", "payload", "protocol", "ct"]),
        inner, max_size=5),
    max_leaves=25,
)  # fmt: skip
EXPRESSIONS = st.lists(JSON, max_size=5)


@settings(max_examples=150, deadline=None)
@given(JSON, EXPRESSIONS)
def test_nothing_that_a_listing_may_hold_makes_it_fail(listing: Any, expressions: list[Any]) -> None:
    firewall.obstacles(listing, link="egw", uplinks=["wan"], ours="x")
    base = {
        "family": "inet",
        "table": "t",
        "name": "c",
        "hook": "forward",
        "type": "filter",
        "policy": "drop",
    }
    rule = {"family": "inet", "table": "t", "chain": "c", "expr": expressions}
    found = firewall.obstacles(
        {"nftables": [{"chain": base}, {"rule": rule}]}, link="egw", uplinks=["wan"], ours="x"
    )
    assert all(obstacle.chain == "c" for obstacle in found)


def with_conntrack(verdict: str) -> Any:
    """As nft lists what iptables made: the match has a name, and no more."""
    base = {
        "family": "ip",
        "table": "filter",
        "name": "FORWARD",
        "hook": "forward",
        "type": "filter",
        "policy": "drop",
    }
    expressions = [
        {"xt": {"type": "match", "name": "conntrack"}},
        {"counter": {"packets": 0}},
        {verdict: None},
    ]
    rule = {"family": "ip", "table": "filter", "chain": "FORWARD", "expr": expressions}
    return {"nftables": [{"chain": base}, {"rule": rule}]}


def test_what_iptables_accepts_by_state_is_answers() -> None:
    assert obstacles(with_conntrack("accept")) == [("out", "ip", True)]
    assert obstacles(with_conntrack("drop")) == BOTH_WAYS_4
