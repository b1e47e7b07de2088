"""The sections `providers` and `routes` of a policy document: profiles of endpoints, and which serves what.

A profile whose declaration contradicts its URL is refused here, pinned or not: one of them is wrong, and
which, only its author can say. Whether a profile complies with a pin is judged when the policy is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from egressd.model.tree import Path
from egressd.policy import values
from egressd.policy.compiled import Provider, Route
from egressd.policy.parts import Part, Reader, close_to
from egressd.residency.judge import Finding, contradiction
from egressd.residency.places import Declared, Placement, Scope
from egressd.residency.registry import Registry

__all__ = [
    "MAX_MODELS",
    "MAX_PROVIDERS",
    "MAX_ROUTES",
    "OPENAI_COMPATIBLE",
    "Profiles",
    "read_profiles",
    "read_routes",
]

OPENAI_COMPATIBLE = "openai-compatible"  # says how it is spoken to, and nothing about where
MAX_PROVIDERS = 256
MAX_ROUTES = 256
MAX_MODELS = 256


class ProviderPart(Part):
    type: Annotated[str, PlainValidator(values.provider_type)]
    base_url: Annotated[values.WrittenUrl, PlainValidator(values.base_url)]
    api_key: Annotated[str, PlainValidator(values.secret)] = ""
    residency: Any = None
    models: list[Annotated[str, PlainValidator(values.model)]] = Field(default_factory=list)


class DeclaredPart(Part):
    region: Annotated[str, PlainValidator(values.region)]
    jurisdiction: Annotated[str, PlainValidator(values.declared_jurisdiction)]
    source_url: Annotated[str, PlainValidator(values.source_url)] = ""


class RoutePart(Part):
    provider: Annotated[str | None, PlainValidator(values.label)] = None
    providers: list[Annotated[str, PlainValidator(values.label)]] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Profiles:
    """Those that are well formed, by name; and every name that somebody wrote a profile for."""

    found: dict[str, Provider]
    named: frozenset[str]


def read_profiles(reader: Reader, root: dict[str, Any], registry: Registry) -> Profiles:
    path: Path = ("providers",)
    section = _mapping(reader, root, path, "providers: {NAME: {type: ..., base_url: ...}}", MAX_PROVIDERS)
    found = {name: _profile(reader, name, entry, registry) for name, entry in section.items()}
    return Profiles({name: one for name, one in found.items() if one is not None}, frozenset(section))


def read_routes(reader: Reader, root: dict[str, Any], profiles: Profiles) -> tuple[Route, ...]:
    path: Path = ("routes",)
    section = _mapping(reader, root, path, "routes: {default: {provider: NAME}}", MAX_ROUTES)
    routes = (_route(reader, name, entry, profiles) for name, entry in section.items())
    return tuple(route for route in routes if route is not None)


def _mapping(reader: Reader, root: dict[str, Any], path: Path, wanted: str, most: int) -> dict[str, Any]:
    """The section's entries whose names are names."""
    section = root.get(str(path[0]))
    if path[0] not in root or reader.too_long(section, path, most):
        return {}
    if not isinstance(section, dict):
        reader.not_a(path, section, wanted, empty="remove the line")
        return {}
    for name in section:
        if not values.is_label(name):
            reader.wrong((*path, name), f"{values.shown(name)} is not a name", values.LABELS)
    return {name: entry for name, entry in section.items() if values.is_label(name)}


# ---- profiles


def _profile(reader: Reader, name: str, entry: object, registry: Registry) -> Provider | None:
    path: Path = ("providers", name)
    if isinstance(entry, dict) and reader.too_long(entry.get("models"), (*path, "models"), MAX_MODELS):
        return None
    part = reader.part(ProviderPart, entry, path)
    declared = _declared(reader, entry, path)
    if part is None:
        return None
    placement = registry.place(part.base_url.endpoint)
    known = _checked_type(reader, part, placement, path, registry)
    if declared is not None:
        wrong = contradiction(placement, declared)
        if wrong is not None:
            reader.wrong((*path, "residency"), wrong, "correct the profile: one of the two is wrong")
        else:
            regions = registry.catalogue.regions(known)
            _check_declared(reader, declared, path, known=known, regions=regions)
    return Provider(
        name=name,
        type=part.type,
        base_url=part.base_url.text,
        endpoint=part.base_url.endpoint,
        api_key=part.api_key,
        declared=declared,
        models=tuple(dict.fromkeys(part.models)),
        finding=Finding(),
        line=reader.tree.line(path),
        placement=placement,
    )


def _declared(reader: Reader, entry: object, path: Path) -> Declared | None:
    if not isinstance(entry, dict) or "residency" not in entry:
        return None
    part = reader.part(DeclaredPart, entry["residency"], (*path, "residency"))
    return Declared(part.region, part.jurisdiction, part.source_url) if part else None


def _checked_type(
    reader: Reader, part: ProviderPart, placement: Placement, path: Path, registry: Registry
) -> str:
    """The catalogue's word for the provider whose regions count; "" if it has none, or cannot be read."""
    catalogue = registry.catalogue
    key = catalogue.key(part.type)
    if part.type == OPENAI_COMPATIBLE or registry.broken:
        return key or placement.provider
    if key is None:
        known = (OPENAI_COMPATIBLE, *catalogue.providers)
        close = close_to(part.type, known)
        remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        reader.wrong((*path, "type"), f"{values.shown(part.type)} is no provider of the catalogue", remedy)
        return ""
    if placement.provider not in ("", key) and placement.scope is not Scope.LOOPBACK:
        text = f"the type is {part.type}, and the base URL is one of {placement.provider}"
        reader.wrong((*path, "type"), text, f"write type: {placement.provider}, or correct base_url")
        return ""
    return key


def _check_declared(
    reader: Reader, declared: Declared, path: Path, *, known: str, regions: Mapping[str, tuple[str, ...]]
) -> None:
    """The region is one of the provider's, and in the jurisdiction. Nothing can be said where it has none."""
    if not regions:
        return
    there = regions.get(declared.region)
    if there is None:
        close = close_to(declared.region, regions)
        remedy = f"did you mean {close[0]}?" if close else "write it as the provider spells it"
        text = f"{values.shown(declared.region)} is not a region of {known}"
        reader.wrong((*path, "residency", "region"), text, remedy)
        return
    outside = sorted(set(there) - declared.countries)
    if outside:
        text = f"it declares {declared.jurisdiction}, and {declared.region} is in {', '.join(outside)}"
        reader.wrong(
            (*path, "residency", "jurisdiction"), text, "correct the profile: one of the two is wrong"
        )


# ---- routes


def _route(reader: Reader, name: str, entry: object, profiles: Profiles) -> Route | None:
    path: Path = ("routes", name)
    listed = entry.get("providers") if isinstance(entry, dict) else None
    if reader.too_long(listed, (*path, "providers"), MAX_PROVIDERS):
        return None
    part = reader.part(RoutePart, entry, path)
    if part is None:
        return None
    written = part.model_fields_set
    if len(written) != 1:
        text = "a route has one of provider and providers"
        reader.wrong(path, text, "write provider: NAME, or providers: [NAME, NAME] in the order to be tried")
        return None
    if part.provider is not None:
        _check_name(reader, part.provider, (*path, "provider"), profiles)
        return Route(name, (part.provider,), reader.tree.line(path))
    if not part.providers:
        reader.wrong((*path, "providers"), "the list is empty", "name at least one")
    for place, provider in enumerate(part.providers):
        where = (*path, "providers", place)
        _check_name(reader, provider, where, profiles)
        if provider in part.providers[:place]:
            reader.wrong(where, f"{provider} is listed twice", "remove one of them")
    return Route(name, tuple(part.providers), reader.tree.line(path))


def _check_name(reader: Reader, name: str, path: Path, profiles: Profiles) -> None:
    if name in profiles.named:
        return
    close = close_to(name, profiles.named)
    remedy = f"did you mean {close[0]}?" if close else "define it under providers:"
    reader.wrong(path, f"there is no provider {values.shown(name)}", remedy)
