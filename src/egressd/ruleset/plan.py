"""From a compiled policy to what the kernel is to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

import msgspec

from egressd.policy.compiled import CidrRule, HostRule, LocalRule, Policy, Port, Protocol, Rule, Verify
from egressd.ruleset.allocate import Allocation
from egressd.ruleset.layout import RESOLVER4, RESOLVER6, RESOLVER_BLOCK, Kind, Mark, Pools
from egressd.ruleset.wants import Element, WorkspaceWant, comment, order

__all__ = ["host_elements", "want", "with_elements"]

_DNS = (Port(53, Protocol.TCP), Port(53, Protocol.UDP))


def want(policy: Policy, allocation: Allocation, pools: Pools) -> WorkspaceWant:
    """The workspace's allow map, resolver included, sorted; connections limit and guard mode.

    A wildcard has no element: its names get theirs when they are asked for. ValueError when two `cidr`
    rules overlap on one port: which of them is counted would depend on the order of insertion.
    """
    index = allocation.workspaces[policy.workspace]
    blocks = allocation.blocks[policy.workspace]
    elements = list(_resolver(index))
    for rule in policy.rules:
        applied = policy.applied(rule) if isinstance(rule, HostRule) else rule
        elements += _elements(applied, index=index, block=blocks[rule.key], pools=pools)
    _refuse_overlaps(policy)
    return WorkspaceWant(
        workspace=policy.workspace,
        index=index,
        guard=policy.holding.value,
        elements=tuple(sorted(set(elements), key=order)),
        connections=policy.limits.connections,
    )


def host_elements(rule: HostRule, *, index: int, block: int, pools: Pools) -> tuple[Element, ...]:
    """The elements of one name, for all its ports and both families, sorted as in a want."""
    return tuple(sorted(_elements(rule, index=index, block=block, pools=pools), key=order))


def with_elements(want: WorkspaceWant, more: Iterable[Element]) -> WorkspaceWant:
    """The want with elements of names that wildcards cover."""
    elements = tuple(sorted({*want.elements, *more}, key=order))
    return msgspec.structs.replace(want, elements=elements)


def _resolver(index: int) -> Iterator[Element]:
    mark = int(Mark(kind=Kind.RESOLVE, workspace=index, block=RESOLVER_BLOCK))
    for address in (RESOLVER4, RESOLVER6):
        for port in _DNS:
            yield Element(str(address), port.protocol.value, port.number, mark, "(resolver)")


def _elements(rule: Rule, *, index: int, block: int, pools: Pools) -> Iterator[Element]:
    match rule:
        case HostRule(wildcard=True):
            return
        case CidrRule():
            addresses: tuple[str, ...] = (str(rule.network),)
        case _:
            addresses = tuple(map(str, pools.synthetic(block)))
    for port in rule.ports:
        mark = int(Mark(kind=_kind(rule, port), workspace=index, block=block))
        for address in addresses:
            yield Element(address, port.protocol.value, port.number, mark, comment(rule.key))


def _kind(rule: Rule, port: Port) -> Kind:
    """Where a rule's packets go."""
    match rule:
        case CidrRule():
            return Kind.DIRECT
        case LocalRule():
            return Kind.RELAY
        case HostRule():
            return Kind.FORWARD if rule.verify_on(port) is Verify.ADDRESS else Kind.INSPECT


def _refuse_overlaps(policy: Policy) -> None:
    """nft would answer EEXIST or ENOTEMPTY for the whole batch; say which two rules it is instead."""
    for number, rule in enumerate(policy.cidrs):
        for other in policy.cidrs[:number]:
            shared = set(rule.ports) & set(other.ports)
            if shared and ip_network(rule.network).overlaps(ip_network(other.network)):
                raise ValueError(f"cidr rules {other.key} and {rule.key} overlap on {min(shared)}")
