"""The lab's DNS: from a query's bytes and a table of `Records` to an answer's bytes."""

from __future__ import annotations

from collections.abc import Mapping

import dnslib

from lab.topology import Records

__all__ = ["answer", "question"]

_MAX_CHAIN = 8


def question(query: bytes) -> tuple[str, str]:
    """(name without final dot, type), or ("", "") for what is not a query."""
    try:
        parsed = dnslib.DNSRecord.parse(query)
        return str(parsed.q.qname).rstrip("."), str(dnslib.QTYPE.get(parsed.q.qtype))
    except (dnslib.DNSError, ValueError):
        return "", ""


def find(zone: Mapping[str, Records], name: str) -> Records | None:
    """The records of a name; `*.x` stands for any name below x that is not listed."""
    labels = name.lower().rstrip(".").split(".")
    if (exact := zone.get(".".join(labels))) is not None:
        return exact
    for cut in range(1, len(labels)):
        if (wild := zone.get(".".join(["*", *labels[cut:]]))) is not None:
            return wild
    return None


def answer(zone: Mapping[str, Records], query: bytes, *, udp: bool) -> bytes | None:
    """An authoritative answer, recursion "available" as at a resolver; None for no answer at all."""
    try:
        parsed = dnslib.DNSRecord.parse(query)
    except (dnslib.DNSError, ValueError):
        return None
    name, kind = str(parsed.q.qname).rstrip("."), str(dnslib.QTYPE.get(parsed.q.qtype))
    records = find(zone, name)
    reply = parsed.reply(ra=1, aa=1)
    if records is None:
        reply.header.rcode = dnslib.RCODE.NXDOMAIN
    elif records.drop:
        return None
    elif records.truncate and udp:
        reply.header.tc = 1
    else:
        reply.header.rcode = getattr(dnslib.RCODE, records.rcode)
        _fill(zone, reply, name, kind)
    if not reply.rr and not reply.header.tc:
        soa = "lab.test. 60 IN SOA ns.lab.test. root.lab.test. 1 60 60 60 60"
        reply.add_auth(*dnslib.RR.fromZone(soa))
    return _sized(parsed, reply) if udp else bytes(reply.pack())


def _fill(zone: Mapping[str, Records], reply: dnslib.DNSRecord, name: str, kind: str) -> None:
    """Add the records of `name`, following aliases inside the lab."""
    for _ in range(_MAX_CHAIN):
        records = find(zone, name)
        if records is None:
            return
        alias = records.types.get("CNAME")
        for data in records.types.get(kind, []) if alias is None else alias:
            line = f"{name}. {records.ttl} IN {kind if alias is None else 'CNAME'} {data}"
            reply.add_answer(*dnslib.RR.fromZone(line))
        if alias is None or kind == "CNAME":
            return
        name = alias[0].rstrip(".")


def _sized(parsed: dnslib.DNSRecord, reply: dnslib.DNSRecord) -> bytes:
    """Over UDP no more than the asker said it takes (RFC 6891 section 6.2.3; 512 without EDNS)."""
    offered = [int(record.rclass) for record in parsed.ar if record.rtype == dnslib.QTYPE.OPT]
    if offered:
        reply.add_ar(dnslib.EDNS0(udp_len=1232))
    packed = bytes(reply.pack())
    if len(packed) <= max(512, *offered, 512):
        return packed
    return bytes(reply.truncate().pack())
