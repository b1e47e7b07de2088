"""`egressctl residency lookup`: what is known of where something is, and what a pin would make of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from egressd.cli.daemon import Document
from egressd.cli.exits import FOUND, OK, USAGE
from egressd.cli.residency_tables import where
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import Paint, escape
from egressd.model.addresses import Address, Network
from egressd.model.errors import Unfit
from egressd.model.names import quoted
from egressd.processes.registry_files import read_registry
from egressd.residency.endpoints import Endpoint
from egressd.residency.judge import Code, Finding
from egressd.residency.jurisdictions import named
from egressd.residency.places import Observation, Pin, Placement
from egressd.residency.registry import Registry

__all__ = ["look_up", "render", "run"]


def run(args: argparse.Namespace) -> int:
    try:
        subject, pin = _subject(args.subject), Pin() if args.pin is None else Pin.of(args.pin)
    except Unfit as error:
        if args.json:
            print_json({"error": {"text": str(error)}})
        complain(str(error))
        return USAGE
    registry = read_registry(where(args).directory)
    if registry.broken:
        complain(registry.broken)
    document = look_up(subject, pin=pin, registry=registry)
    if args.json:
        print_json(document)
    else:
        print(render(document, paint=paint()))
    return FOUND if pin and not document["compliant"] else OK


def _subject(text: str) -> Address | Network | Endpoint:
    """Of a URL, an address, a network or a host. `Unfit` for what is none."""
    if "://" in text:
        return Endpoint.of(text)
    try:
        return _network(text) if "/" in text else ip_address(text)
    except Unfit:
        raise
    except ValueError:
        return Endpoint.of_host(text)


def _network(text: str) -> Network:
    network = ip_network(text, strict=False)
    if str(network) != text:
        raise Unfit(f"{quoted(text)} has bits set behind its length", f"is {network} meant?")
    return network


def look_up(subject: Address | Network | Endpoint, *, pin: Pin, registry: Registry) -> Document:
    """`compliant` is null without a pin. `endpoint` is null for an address, `addresses` empty for a name."""
    document: Document = {
        "subject": str(subject.name if isinstance(subject, Endpoint) else subject),
        "pin": list(pin.codes),
        "compliant": None,
        "endpoint": None,
        "addresses": [],
        "registry": registry.digest,
        "broken": registry.broken,
    }
    findings: list[Finding] = []
    if isinstance(subject, Endpoint):
        finding = registry.judge_endpoint(subject, declared=None, pin=pin)
        document["endpoint"] = _placement(registry.place(subject)) | _judged(finding, pin)
        findings.append(finding)
    for seen in _observed(subject, registry):
        finding, _ = registry.judge_address(seen.address, pin=pin, vouched=False)
        document["addresses"].append(_observation(seen) | _judged(finding, pin))
        findings.append(finding)
    if pin:
        document["compliant"] = all(finding.compliant for finding in findings)
    return document


def _observed(subject: Address | Network | Endpoint, registry: Registry) -> tuple[Observation, ...]:
    if isinstance(subject, Endpoint):
        return () if subject.address is None else (registry.observe(subject.address),)
    if isinstance(subject, (IPv4Network, IPv6Network)):
        return registry.prefixes.covers(subject)
    return (registry.observe(subject),)


def _judged(finding: Finding, pin: Pin) -> dict[str, Any]:
    if not pin:
        return {"finding": None}
    told = {"compliant": finding.compliant, "code": finding.code.value}
    return {"finding": told | {"text": finding.text, "remedy": finding.remedy}}


def _placement(placement: Placement) -> dict[str, Any]:
    return asdict(placement) | {"scope": placement.scope.value}


def _observation(seen: Observation) -> dict[str, Any]:
    return {
        "address": str(seen.address),
        "prefix": seen.prefix,
        "provider": seen.provider,
        "region": seen.region,
        "countries": list(seen.countries),
        "anycast": seen.anycast,
        "conflict": seen.conflict,
        "table": None if seen.table is None else seen.table.name,
        "table_digest": None if seen.table is None else seen.table.digest,
        "others": [_observation(other) for other in seen.others],
    }


# ---- for people


_PIECES = 20  # of a network


def render(document: Document, *, paint: Paint) -> str:
    lines = [escape(document["subject"])]
    if document["endpoint"] is not None:
        lines += _endpoint_lines(document["endpoint"], paint)
    for seen in document["addresses"][:_PIECES]:
        lines += _address_lines(seen, paint)
    more = len(document["addresses"]) - _PIECES
    if more > 0:
        lines.append(f"  and {more} more parts (--json)")
    if document["endpoint"] is not None and not document["addresses"]:
        lines.append("  of its addresses: look them up, and ask again with each")
    return "\n".join(lines)


def _endpoint_lines(found: Document, paint: Paint) -> list[str]:
    if not found["provider"] and found["scope"] == "unknown":
        lines = ["  by its URL: in no catalogue"]
    else:
        region = f", region {escape(found['region'])}" if found["region"] else ""
        where = named(found["countries"])
        lines = [f"  by its URL: {escape(found['provider'] or 'a known owner')}, {found['scope']}{region}"]
        lines[0] += f" ({where})" if where else ""
        lines += [f"    {escape(found['note'])}"] if found["note"] else []
        lines += [f"    source: {escape(found['source'])}"] if found["source"] else []
    return lines + _finding_lines(found["finding"], paint)


def _address_lines(seen: Document, paint: Paint) -> list[str]:
    lines = [f"  {one['address']}: {_said(one)}" for one in (seen, *seen["others"])]
    return lines + _finding_lines(seen["finding"], paint)


def _said(seen: Document) -> str:
    if seen["prefix"] is None:
        return "in no published prefix that was imported"
    told = f"{seen['prefix']} of {escape(seen['provider'])} (table {escape(seen['table'])}"
    told += f", {seen['table_digest'][:19]}...)"
    if seen["conflict"]:
        return f"{told}: {escape(seen['conflict'])}"
    if seen["anycast"]:
        return f"{told}, announced from many places"
    where = named(seen["countries"]) or "nobody knows in which country"
    if seen["region"] == where:  # a plain list that names countries
        return f"{told}, in {where}"
    return f"{told}, region {escape(seen['region'] or 'not told')} ({where})"


def _finding_lines(finding: Document | None, paint: Paint) -> list[str]:
    if finding is None:
        return []
    verdict = paint.good("complies") if finding["compliant"] else paint.bad("refused")
    if finding["code"] == Code.BY_ADDRESS:
        verdict = paint.strong("left open")
    remedy = f" ({escape(finding['remedy'])})" if finding["remedy"] else ""
    return [f"    {verdict}, {finding['code']}: {escape(finding['text'])}{remedy}"]
