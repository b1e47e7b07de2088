"""Pages to look at and to test with: an ordinary one, an empty one, a broken one, one of many hosts, hostile
ones."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from egressd.journal.page_data import (
    Amount,
    Change,
    Check,
    Claim,
    Equation,
    Fact,
    FlowRow,
    Grant,
    Happening,
    HostRow,
    Moment,
    PageData,
    PlaceRow,
    Refusal,
    RouteRow,
    SandboxRow,
    Tried,
)

__all__ = ["at", "broken", "empty", "hostile", "many", "ordinary"]

_START = datetime(2026, 11, 20, 22, 10, tzinfo=UTC)
_DIGEST = "sha256:" + "3f" * 32

HOSTILE = (
    "</style></script><script>alert(1)</script>",
    '" onload="alert(1)" x="',
    "' onmouseover='alert(1)",
    "<img src=http://192.0.2.1/x.png>",
    "&lt;b&gt; &#60;i&#62; <!-- ]]>",
    "javascript:alert(1)",
    "\x1b[31mred\x07\x00\x7f\u0085",
    "\u202egnp.exe\u2066 \u200b\ufeff",
    "\ud800 lone \udfff",
    "z\u0300\u0301\u0302\u0303\u0304\u0305algo",
    "x" * 3000,
)


def at(seconds: float) -> str:
    """A record's time, `seconds` after the samples begin."""
    return (_START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def ordinary() -> PageData:
    """Six hours of a workspace, over midnight."""
    return PageData(
        verified=True,
        workspace="acme",
        since=at(0),
        until=at(6 * 3600),
        restricted=True,
        complete=True,
        guard="enforce",
        remarks=("The key was not compared with one that you brought: give it with --key.",),
        source="Counted by the kernel at the sandboxes' links.",
        hosts=_hosts(),
        flows=_flows(),
        moments=_moments(),
        refusals=(
            Refusal("unlisted", Amount(1_284_330, 77_059_800), 412),
            Refusal("shape", Amount(7, 4_312), 7),
            Refusal("name", Amount(23), 23, "questions"),
            Refusal("sni-other", Amount(2), 2, "connections"),
        ),
        tried=_tried(),
        claims=(
            Claim(
                "eg7", "198.51.100.20 443/tcp", "/usr/bin/curl", "curl -s https://198.51.100.20/", 3, at(3610)
            ),
        ),
        sandboxes=_sandboxes(),
        policy_text="workspace: acme\nguard: enforce\nallow:\n  - host: eu.api.openai.com\n",
        policy_digest=_DIGEST,
        changes=(
            Change(
                at(4000),
                "host db.internal.example 5432/tcp added",
                True,
                "uid 0",
                _DIGEST,
                "sha256:" + "a1" * 32,
            ),
            Change(at(9000), "host old.example removed", False, "uid 0", "sha256:" + "a1" * 32, _DIGEST),
        ),
        grants=(
            Grant(at(480), True, "tenant-4.search.example.com", "*.search.example.com", "eg7", "203.0.113.9"),
            Grant(
                at(7001), False, "tenant-4.search.example.com", "*.search.example.com", "eg7", "203.0.113.9"
            ),
        ),
        pin="CH, EEA",
        vouched=(Fact("eu.api.openai.com", "contract 4711: processed in the EEA and Switzerland"),),
        places=(
            PlaceRow(
                "bedrock-runtime.eu-central-1.amazonaws.com",
                "192.0.2.10",
                True,
                "192.0.2.10 is in 192.0.2.0/24",
                "192.0.2.0/24",
                "aws eu-central-1",
                "eu-central-1 (DE)",
            ),
            PlaceRow(
                "db.example.net",
                "203.0.113.9",
                False,
                "203.0.113.9 is in us-east-1 (US), and US is not in EEA",
                "203.0.113.0/24",
                "aws us-east-1",
            ),
        ),
        tables=(Fact("aws", _DIGEST, exact=True),),
        routes=(
            RouteRow(
                "default",
                "bedrock-fra",
                "bedrock-runtime.eu-central-1.amazonaws.com eu-central-1 EU",
                "it complies",
                "uid 4001",
                12,
                at(60),
            ),
            RouteRow("draft", "", "", "no provider of the route complies", "uid 4001", 1, at(70)),
        ),
        ruleset_text="table netdev egressd {\n\tmap acme_out4 {\n\t\ttype ipv4_addr : mark\n\t}\n}\n",
        ruleset_digest=_DIGEST,
        equations=_equations(),
        lost=0,
        happenings=(
            Happening(
                at(5400), "process restarted", "inspector, after 2 s; connections it carried were reset"
            ),
            Happening(at(7200), "clock stepped", "by 1.2 s"),
        ),
        proved=(
            "The records in this file are in the journal that the checkpoint describes.",
            "The numbers above are those that the records hold.",
        ),
        not_proved=(
            "That the machine ran the program that it says it ran: there is no attestation report.",
            "What an allowed host did with what it was told.",
        ),
        checks=(
            Check("signature of the statement", True, "Ed25519, key egressd/3f2a 1c4d"),
            Check("checkpoint", True, "size 18,211"),
            Check("inclusion", True, "2,114 records"),
        ),
        scope=(
            Fact("Machine", "inference-07"),
            Fact("Boot", "8c2f51aa-0d7b-4a8e-9d7c-44a1e2a7c1f0", exact=True),
        ),
        evidence=(
            Fact("Journal", "inference-07/egressd/3f2a1c4d", exact=True),
            Fact("Root", "yZ0cB0Hn3J3u0y8k7k3t1w5mJrJ0j5g3S4dI4v7C3eI=", exact=True),
            Fact("Key fingerprint", "sha256:" + "9c" * 32, exact=True),
            Fact(
                "Verifier key",
                "inference-07/egressd/3f2a1c4d+1a2b3c4d+AXk1hPLtkfvtq1RfTn2kqPo7GzvjXrRpsLyfYdZJm0zC",
                exact=True,
            ),
        ),
        versions=(Fact("egressd", "0.1.0"), Fact("kernel", "6.18.2"), Fact("nft", "1.0.6")),
        reasons={"unlisted": "no rule of the workspace allows this destination"},
    )


def _hosts() -> tuple[HostRow, ...]:
    return (
        HostRow(
            "eu.api.openai.com",
            "host",
            ("162.159.140.245", "172.66.0.243", "2a06:98c1:58::f5"),
            ("443/tcp",),
            Amount(183_220, 44_120_331),
            Amount(301_448, 912_334_120),
            1_204,
            at(70),
            at(21_000),
        ),
        HostRow(
            "db.internal.example",
            "host",
            ("10.20.4.7",),
            ("5432/tcp",),
            Amount(9_120, 1_240_000),
            Amount(8_904, 3_500_112),
            12,
            at(4100),
            at(20_800),
        ),
        HostRow(
            "a-very-long-tenant-name-that-nobody-reads.region-eu-central-1.search.example.com",
            "granted",
            ("203.0.113.9",),
            ("443/tcp",),
            Amount(44, 8_100),
            Amount(40, 19_000),
            3,
            at(500),
            at(900),
        ),
        HostRow(
            "ollama",
            "local",
            ("127.0.0.1",),
            ("11434/tcp",),
            Amount(4_000, 2_500_000),
            Amount(9_000, 5_100_000),
            80,
            at(20),
            at(21_500),
        ),
        HostRow(
            "(resolver)",
            "resolver",
            (),
            ("53/tcp", "53/udp"),
            Amount(612, 41_220),
            Amount(612, 90_118),
            306,
            at(10),
            at(21_500),
        ),
        HostRow("never-used.example", "host", (), ("443/tcp",)),
    )


def _flows() -> tuple[FlowRow, ...]:
    return (
        FlowRow(
            "eu.api.openai.com",
            "read",
            "162.159.140.245",
            "443/tcp",
            1_204,
            Amount(90_000, 22_000_000),
            Amount(150_000, 456_000_000),
            at(90),
            at(21_000),
        ),
        FlowRow(
            "eu.api.openai.com",
            "dialled",
            "2a06:98c1:58::f5",
            "443/tcp",
            1_204,
            Amount(90_400, 22_100_000),
            Amount(150_100, 456_100_000),
            at(90),
            at(21_000),
        ),
        FlowRow(
            "db.internal.example",
            "host",
            "10.20.4.7",
            "5432/tcp",
            12,
            Amount(9_120, 1_240_000),
            Amount(8_904, 3_500_112),
            at(4_190),
            at(20_800),
        ),
    )


def _moments() -> tuple[Moment, ...]:
    allowed = [Moment(at(60 + 17.5 * n * (1 + n % 5)), False, 1 + n % 7) for n in range(260)]
    return (*allowed, Moment(at(3600), True, 212), Moment(at(3660), True, 180), Moment(at(18_000), True, 1))


def _tried() -> tuple[Tried, ...]:
    return (
        Tried("198.51.100.20", "", "443/tcp", "unlisted", 212, at(3600), at(3620), "eg7, /usr/bin/curl"),
        Tried("2001:db8:77::20", "", "53/udp", "unlisted", 180, at(3660), at(3670), "eg7"),
        Tried("tracker.example.net", "", "", "name", 23, at(100), at(19_000), "eg7, eg9"),
        Tried("198.18.24.252", "eu.api.openai.com", "443/tcp", "sni-other", 2, at(18_000), at(18_000), "eg9"),
    )


def _sandboxes() -> tuple[SandboxRow, ...]:
    return (
        SandboxRow(
            "eg7",
            "uid 1001",
            "python3 -m agent --task 'summarise the quarterly report' --model gpt-x",
            _DIGEST,
            at(5),
            at(7000),
            "exit 0",
            "12.4 s user, 1.1 s system, 214 MiB",
            Amount(1_400_000, 120_000_000),
            Amount(180_000, 43_000_000),
            Amount(1_284_332, 77_060_012),
            Amount(0, 0),
        ),
        SandboxRow(
            "eg9",
            "uid 1002",
            "node agent.js",
            _DIGEST,
            at(8000),
            "",
            "",
            "",
            Amount(16_996, 4_908_639),
            Amount(16_996, 4_908_639),
            Amount(5, 4_100),
            Amount(0, 0),
        ),
    )


def _equations() -> tuple[Equation, ...]:
    return (
        Equation(
            "at the links: in = admitted + refused + other",
            ("in", Amount(1_481_333, 124_973_763)),
            (
                ("admitted", Amount(196_996, 47_909_651)),
                ("refused", Amount(1_284_337, 77_064_112)),
                ("other", Amount()),
            ),
            True,
        ),
        Equation(
            "admitted = what hosts were sent",
            ("admitted", Amount(196_996, 47_909_651)),
            (("hosts", Amount(196_384, 47_868_431)), ("resolver", Amount(612, 41_220))),
            True,
        ),
    )


def empty() -> PageData:
    return PageData(verified=True, workspace="idle", restricted=True, complete=True, guard="enforce", lost=0)


def broken() -> PageData:
    """The same evening, with a record changed by hand."""
    return replace(
        ordinary(),
        verified=False,
        failures=(
            "record 18,107: its hash does not lead to the checkpoint's root",
            "subject: policy digest differs",
        ),
        checks=(Check("inclusion", False, "record 18,107"), Check("signature of the statement", True)),
        equations=(replace(_equations()[0], left=("in", Amount(1_481_334, 124_973_823)), holds=False),),
        drift=("map acme_out4: element 198.51.100.20 . tcp . 443 is there and should not be",),
        lost=14,
        gaps=("what was counted after 2026-11-21T03:59:59.000000Z, the last snapshot, is in no snapshot",),
    )


def many(hosts: int = 10_000) -> PageData:
    rows = tuple(
        HostRow(
            f"host-{n:05d}.tenant.search.example.com",
            "granted",
            (f"203.0.{n >> 8}.{n & 255}", f"2001:db8::{n:x}"),
            ("443/tcp",),
            Amount(n, n * n * 31),
            Amount(n * 2, n * n * 977),
            n % 90,
            at(n),
            at(n + 4000),
        )
        for n in range(hosts)
    )
    moments = tuple(Moment(at(n), n % 9 == 0, 1) for n in range(hosts))
    return replace(ordinary(), hosts=rows, moments=moments)


def hostile(text: str) -> PageData:
    """`text` in every place that holds text."""
    sample = ordinary()
    return PageData(
        verified=False,
        workspace=text,
        link=text,
        since=text,
        until=text,
        headline=text,
        failures=(text,),
        remarks=(text,),
        guard=text,
        hosts=(HostRow(text, text, (text,), (text,), Amount(1, 1), Amount(1, 1), 1, text, text, text),),
        moments=(Moment(text, True), *sample.moments),
        refusals=(Refusal(text, Amount(1, 1), 1, text), Refusal(text, Amount(1, 1))),
        flows=(FlowRow(text, text, text, text, 1, Amount(), Amount(), text, text),),
        flows_more=text,
        tried=(Tried(text, text, text, text, 1, text, text, text),),
        tried_more=text,
        gaps=(text,),
        claims=(Claim(text, text, text, text, 1, text),),
        grants=(Grant(text, True, text, text, text, text),),
        sandboxes=(
            SandboxRow(
                text, text, text, text, text, text, text, text, Amount(), Amount(), Amount(), Amount()
            ),
        ),
        request=(Fact(text, text, exact=True), Fact(text, text)),
        policy_text=text,
        policy_digest=text,
        changes=(Change(text, text, True, text, text, text),),
        pin=text,
        local_only=True,
        vouched=(Fact(text, text),),
        places=(PlaceRow(text, text, False, text, text, text, text),),
        tables=(Fact(text, text, exact=True),),
        routes=(RouteRow(text, text, text, text, text, 1, text),),
        ruleset_text=text,
        ruleset_digest=text,
        drift=(text,),
        source=text,
        equations_more=text,
        refused=Amount(),
        equations=(Equation(text, (text, Amount()), ((text, Amount()),), False),),
        lost=None,
        happenings=(Happening(text, text, text),),
        proved=(text,),
        not_proved=(text,),
        checks=(Check(text, False, text, place=text),),
        scope=(Fact(text, text, exact=True),),
        evidence=(Fact(text, text),),
        versions=(Fact(text, text),),
        reasons={text: text},
    )
