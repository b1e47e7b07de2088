"""Documents for the policy tests: written as text, because that is what people write."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from publicsuffixlist import PublicSuffixList

from egressd.model.addresses import Network
from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.processes.registry_files import builtin_catalogue
from egressd.residency.prefixes import Group, Prefixes, Source, Table
from egressd.residency.registry import Registry

PUBLIC = PublicSuffixList().is_public


def policy(
    text: str | bytes,
    *,
    name: str | None = "acme",
    own: Iterable[Network] = (),
    registry: Registry | None = None,
) -> Policy:
    data = text.encode() if isinstance(text, str) else text
    return load(
        data, source="acme.yaml", expected_name=name, is_public_suffix=PUBLIC, own=own, registry=registry
    )


def problems(text: str | bytes, **options: object) -> tuple[Problem, ...]:
    """What is wrong with a document; () when it is accepted."""
    try:
        policy(text, **options)  # type: ignore[arg-type]
    except PolicyError as error:
        return error.problems
    return ()


def allowing(*rules: str, guard: str = "enforce", more: str = "") -> str:
    """A workspace with these rules in flow style, one per line from line 4 on."""
    lines = "".join(f"  - {rule}\n" for rule in rules)
    return f"workspace: acme\nguard: {guard}\nallow:{' []' if not rules else ''}\n{lines}{more}"


def pinned(*rules: str, pin: str = "EU", guard: str = "enforce", more: str = "") -> str:
    """The same, pinned. The rules still begin on line 4."""
    return allowing(*rules, guard=guard, more=f"residency: {{jurisdictions: [{pin}]}}\n{more}")


# ---- what is known: the built-in catalogue, and a few prefixes


def table(name: str, *groups: Group) -> Table:
    return Table(
        name=name,
        provider=name,
        format="test",
        source=Source(name=f"{name}.json", digest="sha256:" + name.encode().hex().ljust(64, "0"), bytes=1),
        published=date(2026, 11, 1),
        imported=date(2026, 11, 2),
        groups=groups,
    )


CATALOGUE = builtin_catalogue()
AWS = table(
    "aws",
    Group(region="eu-central-1", services=("EC2",), prefixes=("3.64.0.0/12", "2a05:d014::/36")),
    Group(region="us-east-1", services=("EC2",), prefixes=("3.80.0.0/12", "2600:1f18::/33")),
    Group(region="GLOBAL", services=("CLOUDFRONT",), prefixes=("13.32.0.0/15",), anycast=True),
)
AZURE = table(
    "azure",
    Group(region="francecentral", services=("AzureCloud",), prefixes=("20.19.0.0/16",)),
    Group(region="eastus", services=("AzureCloud",), prefixes=("20.42.0.0/16",)),
)
KNOWN = Registry(CATALOGUE, Prefixes([AWS, AZURE], regions=CATALOGUE.cloud_region))
NO_TABLES = Registry(CATALOGUE)
BROKEN = Registry(CATALOGUE, broken="tables/aws.json cannot be read")
