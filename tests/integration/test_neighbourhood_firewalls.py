"""Beside other firewalls of the host: what they do to approved traffic, what `egressctl doctor` says of it,
and that the command it gives is the remedy. What is denied stays denied all along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integration.neighbours import POLICY, doctor, refused, works, works_again
from integration.probe import Resident

NEED = "no firewall of the host's drops what comes from egw"
# Rules as these programs make them, without what has nothing to do with forwarding.
DOCKER = """\
iptables -P FORWARD DROP
iptables -N DOCKER
iptables -N DOCKER-ISOLATION-STAGE-1
iptables -N DOCKER-USER
iptables -A DOCKER-USER -j RETURN
iptables -A DOCKER-ISOLATION-STAGE-1 -j RETURN
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-ISOLATION-STAGE-1
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT
"""
UFW = """\
{tables} -P FORWARD DROP
{tables} -N {prefix}-before-forward
{tables} -N {prefix}-user-forward
{tables} -N {prefix}-after-forward
{tables} -A FORWARD -j {prefix}-before-forward
{tables} -A FORWARD -j {prefix}-user-forward
{tables} -A FORWARD -j {prefix}-after-forward
{tables} -A {prefix}-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""
FIREWALLD = """\
nft -f - <<'END'
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_FORWARD_ZONES
    reject with icmpx type admin-prohibited
  }
  chain filter_FORWARD_ZONES { goto filter_FWD_public; }
  chain filter_FWD_public { reject with icmpx type admin-prohibited; }
  chain filter_FWD_trusted { accept; }
}
END
"""
OWN = """\
nft -f - <<'END'
table inet mine {
  chain forward { type filter hook forward priority 0; policy drop; }
}
END
"""
GONE = "nft delete table {}"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY})


@pytest.fixture
def host(daemon: Any) -> Iterator[Any]:
    """A shell in the host; the tables of others are gone afterwards."""

    def say(script: str) -> str:
        return str(daemon.lab.run(["sh", "-e", "-c", script]).check().out)

    try:
        yield say
    finally:
        for table in ("ip filter", "ip6 filter", "inet firewalld", "inet mine"):
            daemon.lab.run(["nft", "delete", "table", *table.split()])


def closed(daemon: Any) -> list[dict[str, str]]:
    """What the doctor has to say about it."""
    return [row for row in doctor(daemon).get(NEED, []) if row["result"] == "missing"]


def commands(rows: list[dict[str, str]]) -> str:
    return "\n".join(sorted({row["fix"] for row in rows}))


def test_docker(daemon: Any, host: Any) -> None:
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        host(DOCKER)
        found = closed(daemon)
        assert found
        assert {"docker" in row["said"] for row in found} == {True}
        assert (
            resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
        )  # by IPv6, of which docker has none
        four = [one.result for one in resident.tries(*_four(resident))]
        assert four == ["timeout"]
        refused(resident)
        host(commands(found))
        assert closed(daemon) == []
        works_again(resident)
        assert [one.result for one in resident.tries(*_four(resident))] == ["ok"]


def _four(resident: Resident) -> tuple[tuple[Any, ...], ...]:
    """plain.test, by the IPv4 address that it has in there."""
    address = resident.tries(("resolve", "plain.test", "4"))[0].data
    return (("tcp", address.split()[0], 7, "x"),)


@pytest.mark.slow
def test_ufw(daemon: Any, host: Any) -> None:
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        host(UFW.format(tables="iptables", prefix="ufw"))
        host(UFW.format(tables="ip6tables", prefix="ufw6"))
        found = closed(daemon)
        assert commands(found) == "ufw route allow in on egw"
        assert not works(resident)
        refused(resident)
        # which is what that command does
        host("iptables -A ufw-user-forward -i egw -j ACCEPT; ip6tables -A ufw6-user-forward -i egw -j ACCEPT")
        assert closed(daemon) == []
        works_again(resident)


@pytest.mark.slow
def test_firewalld(daemon: Any, host: Any) -> None:
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        host(FIREWALLD)
        found = closed(daemon)
        assert "firewall-cmd --permanent --zone=trusted --add-interface=egw" in commands(found)
        assert not works(resident)
        refused(resident)
        host("nft insert rule inet firewalld filter_FORWARD_ZONES iifname egw goto filter_FWD_trusted")
        assert closed(daemon) == []
        works_again(resident)


def test_a_firewall_of_ones_own(daemon: Any, host: Any) -> None:
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        host(OWN)
        found = closed(daemon)
        assert len(found) == 4  # there and back, in both families
        assert not works(resident)
        refused(resident)
        host(commands(found))
        assert closed(daemon) == []
        works_again(resident)


def test_without_one_there_is_nothing_to_say(daemon: Any) -> None:
    found = doctor(daemon)
    assert NEED not in found
    assert "table inet egressd_host" not in found
    assert not [row for rows in found.values() for row in rows if row["result"] == "missing"], found
