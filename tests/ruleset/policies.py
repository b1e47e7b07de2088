"""Small compiled policies for the ruleset's tests."""

from __future__ import annotations

from ipaddress import ip_network

from egressd.policy.compiled import (
    Budgets,
    CidrRule,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Policy,
    Port,
    Protocol,
    Rule,
    Verify,
)


def tcp(*numbers: int) -> tuple[Port, ...]:
    return tuple(Port(number, Protocol.TCP) for number in numbers)


def udp(*numbers: int) -> tuple[Port, ...]:
    return tuple(Port(number, Protocol.UDP) for number in numbers)


def host(name: str, ports: tuple[Port, ...] = tcp(443)) -> HostRule:
    return HostRule(host=name, ports=ports, inspected=(), private=False, line=1)


def inspected(name: str, ports: tuple[Port, ...] = tcp(443), plain: tuple[Port, ...] = ()) -> HostRule:
    """A host whose connections to `ports` are read, and those to `plain` are not."""
    read = tuple((port, Verify.SNI) for port in ports)
    return HostRule(host=name, ports=ports + plain, inspected=read, private=False, line=1)


def network(text: str, ports: tuple[Port, ...] = tcp(5432)) -> CidrRule:
    return CidrRule(network=ip_network(text), ports=ports, line=1)


def local(service: str, port: int) -> LocalRule:
    return LocalRule(service=service, ports=tcp(port), line=1)


def policy(
    *rules: Rule,
    workspace: str = "acme",
    guard: Guard = Guard.ENFORCE,
    connections: int | None = None,
    egress_bytes: int | None = None,
) -> Policy:
    return Policy(
        workspace=workspace,
        guard=guard,
        members=(),
        residency=(),
        rules=rules,
        limits=Limits(connections=connections, egress_bytes=egress_bytes),
        wildcards=Budgets(),
        digest="sha256:0",
    )


EXAMPLE = (
    host("api.example.com", tcp(443) + udp(443)),
    host("*.search.example.com"),
    network("10.20.0.0/16"),
    network("10.9.9.9/32"),
    network("2001:db8:9::/48"),
    local("ollama", 11434),
    inspected("pay.example.com", plain=tcp(80)),
)
