"""Which provider serves a route, for whoever asks; each answer is on record.

What decides is policy/routing.py. Here is what only the controller knows: where the names of providers lead
at present, and what residency says of those addresses.

A gateway asks before each request, so equal answers are one record: the first at once, the others of a window
as one more with their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from egressd.journal.records import Scalar
from egressd.model.errors import Refused
from egressd.model.names import quoted
from egressd.model.verdicts import Reason
from egressd.policy.compiled import HostRule, Policy, Provider
from egressd.policy.decide import rule_for
from egressd.policy.routing import Candidate, Evidence, Seen, Selection, select

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["RoutingAnswers"]

_WINDOW: Final = 10.0  # seconds
_CAPACITY: Final = 4096  # different answers in a window; with more, the oldest is told early
_SHOWN: Final = 20  # routes that are named to who asks for one that is not


class RoutingAnswers:
    """`later` is an event loop's `call_later`."""

    def __init__(
        self, controller: Controller, *, later: Callable[[float, Callable[[], None]], object]
    ) -> None:
        self._controller = controller
        self._answered = _Answered(controller.auditing.record, later=later)

    def answer(self, policy: Policy, route: str, *, uid: int) -> dict[str, Any]:
        """The document. Refused, with the routes there are, for one that is not."""
        registry = self._controller.registry.digest
        asked = {"workspace": policy.workspace, "by": f"uid {uid}", "registry": registry}
        if policy.route(route) is None:
            text = _no_such(policy, route)
            # Routes that somebody makes up are as many as he likes: one key for all of them.
            key = (uid, policy.workspace, None)
            fields = {**asked, "route": route[:256], "code": "no-such-route", "text": text}
            self._answered.add(key, "route-refused", fields)
            raise Refused(Reason.UNLISTED, text)
        selection = select(policy, route, self._evidence(policy, route))
        event, facts = _record(selection)
        self._answered.add((uid, policy.workspace, *facts.values()), event, {**asked, **facts})
        return _document(selection, registry)

    def drain(self) -> None:
        """Tell what is still counted, at an end."""
        self._answered.drain()

    # ---- what is known of addresses

    def _evidence(self, policy: Policy, route: str) -> dict[str, Evidence]:
        found = policy.route(route)
        profiles = [policy.provider(name) for name in (found.providers if found else ())]
        return {profile.name: self._seen(policy, profile) for profile in profiles if profile is not None}

    def _seen(self, policy: Policy, profile: Provider) -> Evidence:
        """Where its host leads in this workspace, and where it would lead if residency let it."""
        rule = rule_for(policy, profile.endpoint.host) if profile.endpoint.host else None
        if rule is None or profile.is_local:
            return Evidence()
        rule = replace(rule, host=profile.endpoint.host)  # of a wildcard, the name in its place
        led = [self._judged(policy, rule, address) for address in self._led(policy, rule)]
        known = {seen.address for seen in led}
        refused = [
            Seen(one.address, one.finding, one.seen)
            for one in self._controller.residency.refusals(policy, rule)
            if one.address is not None and one.seen is not None and one.address not in known
        ]
        return Evidence((*led, *refused))

    def _led(self, policy: Policy, rule: HostRule) -> list[str]:
        terms = self._controller.residency.terms(policy, rule)
        return self._controller.addresses.of(rule, terms=terms)

    def _judged(self, policy: Policy, rule: HostRule, address: str) -> Seen:
        known = ip_address(address)
        finding, seen = self._controller.registry.judge_address(
            known, pin=policy.pin, vouched=bool(rule.vouch)
        )
        return Seen(known, finding, seen)


def _no_such(policy: Policy, route: str) -> str:
    names = sorted(each.name for each in policy.routes)
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    there = (
        f"its routes are {shown}" if names else "its policy has none: write routes: {NAME: {provider: ...}}"
    )
    return f"workspace {policy.workspace} has no route {quoted(route[:64])}; {there}"


# ---- what is told


def _record(selection: Selection) -> tuple[str, dict[str, Scalar]]:
    """Event and fields; who asked, and by which registry it was decided, comes beside."""
    chosen = selection.selected
    if chosen is None:
        fields = {"route": selection.route, "code": selection.code, "text": selection.text}
        return "route-refused", dict(fields)
    return "route-selected", {
        "route": selection.route,
        "provider": chosen.provider,
        "host": chosen.host,
        "declared_region": chosen.declared_region,
        "jurisdiction": chosen.jurisdiction,
        "addresses": ", ".join(chosen.addresses),
        "prefixes": ", ".join(chosen.prefixes),
        "tables": ", ".join(chosen.tables),
        "code": selection.code,
        "text": selection.text,
        "policy": selection.policy,
    }


def _document(selection: Selection, registry: str) -> dict[str, Any]:
    """The key is a reference here, as in the policy; egressd never has another."""
    chosen = selection.selected
    return {
        "workspace": selection.workspace,
        "route": selection.route,
        "policy": selection.policy,
        "pin": list(selection.pin),
        "registry": registry,
        "selected": None if chosen is None else _candidate(chosen) | {"api_key": chosen.api_key},
        "code": selection.code,
        "reason": selection.text,
        "remedy": selection.remedy,
        "candidates": [_candidate(one) for one in selection.candidates],
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "provider": one.provider,
        "complies": one.selectable,
        "code": one.code,
        "reason": one.text,
        "remedy": one.remedy,
        "type": one.type,
        "base_url": one.base_url,
        "host": one.host,
        "port": one.port,
        "region": one.declared_region,
        "jurisdiction": one.jurisdiction,
        "source_url": one.source_url,
        "addresses": list(one.addresses),
        "prefixes": list(one.prefixes),
        "tables": list(one.tables),
        "refused": dict(one.refused),
    }


# ---- the same answer again


@dataclass(slots=True)
class _Repeated:
    event: str
    fields: Mapping[str, Scalar]
    count: int = 0  # after the first


class _Answered:
    """The first of its kind is recorded at once; those that follow in the window are, when it is over, one
    record with their `count`. Nothing is estimated and nothing dropped."""

    def __init__(
        self,
        record: Callable[[str, Mapping[str, Scalar]], None],
        *,
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._record, self._later = record, later
        self._open: OrderedDict[tuple[object, ...], _Repeated] = OrderedDict()  # oldest first

    def add(self, key: tuple[object, ...], event: str, fields: Mapping[str, Scalar]) -> None:
        known = self._open.get(key)
        if known is not None:
            known.count += 1
            return
        self._record(event, fields)
        if len(self._open) >= _CAPACITY:
            self._tell(self._open.popitem(last=False)[1])
        repeated = self._open[key] = _Repeated(event, fields)
        self._later(_WINDOW, lambda: self._over(key, repeated))

    def drain(self) -> None:
        while self._open:
            self._tell(self._open.popitem(last=False)[1])

    def _over(self, key: tuple[object, ...], repeated: _Repeated) -> None:
        if self._open.get(key) is repeated:
            self._tell(self._open.pop(key))

    def _tell(self, repeated: _Repeated) -> None:
        if repeated.count:
            self._record(repeated.event, {**repeated.fields, "count": repeated.count})
