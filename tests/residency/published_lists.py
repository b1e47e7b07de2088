"""Lists as their publishers write them, in small."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from typing import Any

from egressd.residency.prefixes import Group, Source, Table

DIGEST = "sha256:" + "0" * 64


def aws(
    *rows: tuple[str, str, str] | tuple[str, str, str, str], created: str = "2026-11-20-19-53-08", **more: Any
) -> bytes:
    """`rows`: prefix, region, service, and the network border group if it is not the region."""
    four, six = [], []
    for prefix, region, service, *group in rows:
        rest = {"region": region, "service": service, "network_border_group": group[0] if group else region}
        if ":" in prefix:
            six.append({"ipv6_prefix": prefix, **rest})
        else:
            four.append({"ip_prefix": prefix, **rest})
    document = {"syncToken": "1795204388", "createDate": created, "prefixes": four, "ipv6_prefixes": six}
    return json.dumps({**document, **more}, indent=2).encode()


def google(*rows: tuple[str, str | None]) -> bytes:
    """`rows`: prefix, scope."""
    prefixes = []
    for prefix, scope in rows:
        entry = {"ipv6Prefix" if ":" in prefix else "ipv4Prefix": prefix}
        prefixes.append(entry if scope is None else {**entry, "service": "Google Cloud", "scope": scope})
    document = {"syncToken": "1795204388", "creationTime": "2026-11-19T10:23:07.12345", "prefixes": prefixes}
    return json.dumps(document).encode()


def azure(*tags: tuple[str, str, Iterable[str]]) -> bytes:
    """`tags`: name, region, prefixes."""
    values = [
        {
            "name": name,
            "id": name,
            "properties": {
                "changeNumber": 7,
                "region": region,
                "regionId": 0,
                "platform": "Azure",
                "systemService": "" if name.startswith("AzureCloud") else name.partition(".")[0],
                "addressPrefixes": list(prefixes),
                "networkFeatures": ["API", "NSG"],
            },
        }
        for name, region, prefixes in tags
    ]
    return json.dumps({"changeNumber": 321, "cloud": "Public", "values": values}).encode()


def table(*groups: Group, name: str = "aws", published: date | None = date(2026, 11, 20)) -> Table:
    return Table(
        name=name,
        provider=name,
        format="aws",
        source=Source("list.json", DIGEST, 1),
        published=published,
        imported=date(2026, 11, 21),
        groups=groups,
    )


def group(region: str, *prefixes: str, anycast: bool = False, countries: tuple[str, ...] = ()) -> Group:
    return Group(region=region, services=(), prefixes=prefixes, anycast=anycast, countries=countries)
