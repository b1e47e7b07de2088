"""One workspace's view, as tables: who is asked for, over which type, under which guard, and what comes."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Literal

import msgspec
import pytest

from egressd.dns import replies, wire
from egressd.dns.keeper import Family, Standing, State, Target, User
from egressd.dns.replies import Failure, Rcode, Reply
from egressd.dns.slots import EMPTY, assign
from egressd.dns.table import Decision, Denied, Forward, Table, Wait, WorkspaceNames, answer, users_of
from egressd.model.verdicts import Reason
from egressd.ruleset.layout import Pools

POOLS = Pools()
Guard = Literal["off", "observe", "enforce"]
TYPES = {
    "A": 1,
    "NS": 2,
    "PTR": 12,
    "MX": 15,
    "TXT": 16,
    "AAAA": 28,
    "SVCB": 64,
    "HTTPS": 65,
    "ANY": 255,
    "TYPE65280": 65280,
}
REAL4 = [ip_address(f"93.184.215.{n}") for n in (14, 15)]
REAL6 = [ip_address("2606:2800::1")]
ACME = "acme"


def known(block: int, *, v4: int = 2, v6: int = 1, **more: object) -> Standing:
    return Standing(
        State.KNOWN,
        Family(assign(EMPTY, REAL4[:v4])[0]),
        Family(assign(EMPTY, REAL6[:v6])[0]),
        ttl=30,
        users=frozenset({User(ACME, block)}),
        **more,  # type: ignore[arg-type]
    )


STANDINGS = {
    Target("both.example", False): known(1),
    Target("four.example", False): known(2, v6=0),
    Target("six.example", True): known(3, v4=0),
    Target("none.example", False): known(4, v4=0, v6=0),
    Target("gone.example", False): known(5, v4=0, v6=0, exists=False),
    Target("lost.example", False): Standing(State.FAILED, failure=Failure(22, "nobody answered")),
    Target("theirs.example", False): Standing(
        State.KNOWN, Family(assign(EMPTY, REAL4)[0]), users=frozenset({User("zeta", 7)})
    ),
    Target("half.example", False): Standing(
        State.KNOWN,
        Family(assign(EMPTY, REAL4)[0]),
        Family(failure=Failure(23, "network is unreachable")),
        users=frozenset({User(ACME, 8)}),
    ),
}
HOSTS = {
    "both.example": (1, False),
    "four.example": (2, False),
    "six.example": (3, True),
    "none.example": (4, False),
    "gone.example": (5, False),
    "lost.example": (6, False),
    "theirs.example": (7, False),
    "half.example": (8, False),
    "new.example": (9, False),
}


def ask(name: str, qtype: str, guard: Guard = "enforce") -> Decision:
    names = WorkspaceNames(workspace=ACME, guard=guard, hosts=HOSTS, services={"ollama": 40})
    labels = wire.labels_of(name)
    query = wire.Query(1, labels, wire.canonical(labels), TYPES[qtype], 1, True, False, None)
    return answer(Table.of(names, POOLS), query, lambda target: STANDINGS.get(target, Standing()))


def word(decision: Decision) -> str:
    """A decision in one line."""
    match decision:
        case Wait(target):
            return f"wait {target.host}{' private' * target.private}"
        case Forward(record):
            return "forward, recorded" if record else "forward"
        case Denied(reply, reason):
            return f"denied {reason}: {word(reply)}"
    code = "" if decision.extended is None else f" ede {int(decision.extended)}"
    if decision.addresses:
        return " ".join(map(str, decision.addresses)) + code
    if decision.pointer or decision.hinfo:
        return decision.pointer or "hinfo"
    kind = "nodata" if decision.rcode == Rcode.NOERROR else Rcode(decision.rcode).name.lower()
    assert decision.negative == (decision.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN))
    return kind + code


GUARDS: tuple[Guard, ...] = ("enforce", "observe", "off")


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(
    ("name", "a", "aaaa"),
    [
        ("both.example", "198.18.0.4 198.18.0.5", "fd53:e9::4"),
        ("four.example", "198.18.0.8", "nodata"),
        ("six.example", "nodata", "fd53:e9::c"),
        ("none.example", "nodata", "nodata"),
        ("gone.example", "nxdomain", "nxdomain"),
        ("lost.example", "servfail ede 22", "servfail ede 22"),
        ("half.example", "198.18.0.32 198.18.0.33", "nodata ede 23"),
        ("new.example", "wait new.example", "wait new.example"),
        (
            "theirs.example",
            "wait theirs.example",
            "wait theirs.example",
        ),  # the kernel leads there for zeta only
        ("ollama", "198.18.0.160", "fd53:e9::a0"),
        ("localhost", "127.0.0.1", "::1"),
        ("a.localhost", "127.0.0.1", "::1"),
    ],
)
def test_listed_names_are_answered_alike_under_every_guard(
    name: str, a: str, aaaa: str, guard: Guard
) -> None:
    if name == "four.example":
        a = "198.18.0.8 198.18.0.9"
    assert word(ask(name, "A", guard)) == a
    assert word(ask(name, "AAAA", guard)) == aaaa


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("qtype", ["NS", "PTR", "MX", "TXT", "SVCB", "HTTPS", "TYPE65280"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("both.example", "nodata ede 21"),
        ("gone.example", "nxdomain"),
        ("lost.example", "servfail ede 22"),
        ("new.example", "wait new.example"),
        ("ollama", "nodata"),
        ("localhost", "nodata"),
    ],
)
def test_other_types_of_listed_names_never_travel(name: str, expected: str, qtype: str, guard: Guard) -> None:
    assert word(ask(name, qtype, guard)) == expected


@pytest.mark.parametrize("name", ["both.example", "ollama", "localhost"])
def test_any_is_small(name: str) -> None:
    assert word(ask(name, "ANY")) == "hinfo"


OFF_LIST = [
    "other.example",
    "both.example.evil.example",
    "example",
    "www.both.example",
    "",
    "Ollama.example",
    "a.ollama",
]


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("name", OFF_LIST)
def test_off_the_list_is_denied_for_every_type(name: str, qtype: str) -> None:
    decision = ask(name, qtype)
    assert word(decision) == "denied name: nxdomain ede 15"
    assert isinstance(decision, Denied)
    assert decision.reply.text == f"{name.lower() or '.'} is not on the list of workspace acme"
    assert decision.reason is Reason.NAME


@pytest.mark.parametrize("name", OFF_LIST)
@pytest.mark.parametrize(
    ("guard", "address", "other"),
    [("observe", "forward, recorded", "nodata ede 21"), ("off", "forward", "nodata ede 21")],
)
def test_an_open_guard_forwards_addresses(name: str, guard: Guard, address: str, other: str) -> None:
    assert word(ask(name, "A", guard)) == address
    assert word(ask(name, "AAAA", guard)) == address
    for qtype in ("MX", "HTTPS", "SVCB", "TXT"):
        assert word(ask(name, qtype, guard)) == other
    assert word(ask(name, "ANY", guard)) == "hinfo"


def reverse(address: str) -> str:
    return ip_address(address).reverse_pointer


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("198.18.0.4", "both.example"),
        ("198.18.0.7", "both.example"),  # every slot of the block
        ("198.18.0.8", "four.example"),
        ("fd53:e9::7", "both.example"),
        ("198.18.0.160", "ollama"),
        ("fd53:e9::a0", "ollama"),
        ("127.0.0.1", "localhost"),
        ("::1", "localhost"),
        ("198.18.0.100", "denied name: nxdomain ede 15"),  # nobody's block
        ("93.184.215.14", "denied name: nxdomain ede 15"),
        ("2606:2800::1", "denied name: nxdomain ede 15"),
        ("198.19.0.1", "denied name: nxdomain ede 15"),
    ],
)
def test_the_name_of_an_address(address: str, expected: str) -> None:
    assert word(ask(reverse(address), "PTR")) == expected
    assert word(ask(reverse(address), "A")).startswith("denied")


def test_users() -> None:
    tables = {
        w: Table.of(WorkspaceNames(workspace=w, guard="enforce", hosts=h, services={"ollama": 40}), POOLS)
        for w, h in {
            "acme": {"x.example": (1, False), "y.example": (2, True)},
            "zeta": {"x.example": (9, False), "y.example": (3, False), "ollama": (4, False)},
        }.items()
    }
    assert users_of(tables) == {
        Target("x.example", False): {User("acme", 1), User("zeta", 9)},
        Target("y.example", True): {User("acme", 2)},
        Target("y.example", False): {User("zeta", 3)},
    }


@pytest.mark.parametrize(
    "document",
    [
        '[{"workspace": "Acme", "guard": "enforce"}]',
        '[{"workspace": "acme", "guard": "open"}]',
        '[{"workspace": "acme"}]',
        '[{"workspace": "acme", "guard": "off", "hosts": {"x.example": [16384, false]}}]',
        '[{"workspace": "acme", "guard": "off", "hosts": {"X.example": [1, false]}}]',
        '[{"workspace": "acme", "guard": "off", "hosts": {"x.example": 1}}]',
        '[{"workspace": "acme", "guard": "off", "hostz": {}}]',
    ],
)
def test_a_payload_that_says_something_else_is_refused_whole(document: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(document, type=list[WorkspaceNames])


def test_replies_are_bounded() -> None:
    assert len(replies.blocked("ä" * 500).text.encode()) == 240
    assert replies.failure(0, "ok") == Reply(rcode=Rcode.SERVFAIL, extended=0, text="ok")
