"""The values of a policy document: each function takes what the YAML said and returns what the policy holds.

`Unfit` for anything else, with what to write instead. Used by the parts in `document`; what a value needs
from outside (the public suffix list, egressd's own pools) comes in the validation context.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address, ip_network
from typing import NamedTuple

from pydantic import ValidationInfo

from egressd.model.addresses import Address, Network, check_network, classify
from egressd.model.errors import Unfit
from egressd.model.identities import check_workspace
from egressd.model.names import Pattern, canonical, is_pattern, quoted, service_label
from egressd.policy import units
from egressd.policy.compiled import Ech, Guard, Member, MemberKind, Port, Protocol, Verify
from egressd.residency import jurisdictions
from egressd.residency.endpoints import MAX_URL, Endpoint

# Named by those who compare us with others, and not built.
_VERIFY_NOT_AVAILABLE = frozenset({"http-host"})

MAX_CONNECTIONS = 1_000_000  # what the kernel message can say (ruleset/wants.py)
MAX_PROCESSES = 4_194_304  # PID_MAX_LIMIT, linux/threads.h
MAX_WALL = 366 * 86400
MAX_IDLE = 86400
MIN_MEMORY = 1 << 20
MAX_BYTE_COUNT = 1 << 62  # a named quota's range, with room to spare
MAX_NAMES = 8192  # of wildcards: half of a workspace's blocks (ruleset/layout.py), the rest are for rules
MAX_LABEL_BYTES = 1 << 30
MAX_RATE = 1000  # fresh names per second
TLS = "tls"  # a port's protocol: TCP, on which TLS is spoken
MIN_REASON, MAX_REASON = 8, 200  # characters of a written reason

_PORT = re.compile(r"([1-9][0-9]{0,9}|0)(?:/([A-Za-z0-9]+))?")
_RANGE = re.compile(r"[0-9]+ ?[-:] ?[0-9]+(?:/[a-z]+)?")
_NETWORK = re.compile(r"[0-9A-Fa-f:.]+/[0-9]{1,3}")
_USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@-]{0,62}\$?")
_USER_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_LABEL = re.compile(r"[a-z](?:[a-z0-9_-]{0,30}[a-z0-9])?")  # of a provider or a route: a record's word
_TYPE = re.compile(r"[a-z][a-z0-9-]{0,39}")
_REGION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,38}[A-Za-z0-9])?")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}")
# A reference. The value of a secret has no place in a policy, which is shown, recorded and proved.
_SECRET_ENV = re.compile(r"secret://env/[A-Za-z_][A-Za-z0-9_]{0,127}")
_SECRET_FILE = re.compile(r"secret://file(?:/[A-Za-z0-9._@+-]{1,255}){1,32}")
_SHORT = re.compile(r"[A-Za-z0-9._-]{1,24}")
MAX_DECLARED = 32  # jurisdictions of a profile
MAX_USER_ID = 0xFFFF_FFFE  # (uid_t)-1 means "no change" to the kernel


def kind(value: object) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "a truth value"
        case int():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "a mapping"


def _text(value: object, wanted: str) -> str:
    if isinstance(value, str):
        return value
    raise Unfit(f"this is {kind(value)}", f"write {wanted}")


def workspace(value: object) -> str:
    text = _text(value, "the workspace's name, as text")
    if is_workspace(text):
        return text
    raise Unfit(
        f"{quoted(text)} is not a workspace name",
        "use 1 to 32 lower-case letters, digits and inner hyphens, beginning with a letter",
    )


def is_workspace(value: object) -> bool:
    try:
        return isinstance(value, str) and check_workspace(value) == value
    except ValueError:
        return False


def guard(value: object) -> Guard:
    wanted = "one of off, observe, enforce"
    text = _text(value, wanted)
    try:
        return Guard(text)
    except ValueError:
        raise Unfit(f"{quoted(text)} is not a guard", f"write {wanted}") from None


def member(value: object) -> Member:
    wanted = "user:NAME, user:NUMBER, group:NAME or group:NUMBER"
    if isinstance(value, dict):
        raise Unfit("this is a mapping", "leave no space after the colon: user:NAME")
    text = _text(value, wanted)
    kind, _, name = text.partition(":")
    if kind not in tuple(MemberKind):
        raise Unfit(f"{quoted(text)} is not a member", f"write {wanted}")
    if not _is_account(name):
        raise Unfit(f"{quoted(text)} does not name an account", f"write {wanted}")
    return Member(MemberKind(kind), name)


def _is_account(name: str) -> bool:
    if _USER_ID.fullmatch(name):
        return int(name) <= MAX_USER_ID
    return _USER_NAME.fullmatch(name) is not None


def host(value: object, info: ValidationInfo) -> str:
    text = _text(value, "a host name")
    assert info.context is not None
    if is_pattern(text):
        pattern = Pattern.of(text, is_public_suffix=info.context["is_public_suffix"])
        _refuse_this_machine(pattern.base)
        return str(pattern)
    name = canonical(text)
    _refuse_this_machine(name)
    if "." not in name:
        raise Unfit(
            f"{quoted(name)} is a single label",
            "write the full name; for a service on this machine write a local rule",
        )
    return name


def _refuse_this_machine(name: str) -> None:
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761 section 6.3
        raise Unfit(f"{quoted(name)} is this machine itself", "for a service on it write a local rule")


def network(value: object, info: ValidationInfo) -> Network:
    wanted = "a network such as 10.20.0.0/16 or 2001:db8:1::/48"
    text = _text(value, wanted)
    if not _NETWORK.fullmatch(text):
        raise Unfit(f"{quoted(text)} is not a network", _as_network(text) or f"write {wanted}")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise Unfit(f"{quoted(text)} is not a network", f"write {wanted}") from None
    if ip_address(text.partition("/")[0]) != network.network_address:
        raise Unfit(f"{quoted(text)} has bits set beyond its prefix", f"write {network}")
    assert info.context is not None
    check_network(network, own=info.context["own"])
    return network


def _as_network(text: str) -> str:
    """What a lone address would be as a network, for the remedy."""
    try:
        return f"write {ip_network(ip_address(text))}"
    except ValueError:
        return ""


class WrittenPort(NamedTuple):
    """A port of a host rule. `tls`: written as N/tls, which is TCP that must speak TLS."""

    port: Port
    tls: bool


def host_port(value: object) -> WrittenPort:
    return _port(value, "tcp, tls or udp")


def _port(value: object, protocols: str) -> WrittenPort:
    if not isinstance(value, str) and (not isinstance(value, int) or isinstance(value, bool)):
        raise Unfit(f"this is {kind(value)}", "write a port such as 443/tcp")
    text = str(value)
    match = _PORT.fullmatch(text)
    if match is None:
        remedy = "list each port" if _RANGE.fullmatch(text) else "write a port such as 443/tcp"
        raise Unfit(f"{quoted(text)} is not a port", remedy)
    if not 1 <= int(match[1]) <= 65535:
        raise Unfit(f"{quoted(text)} is not a port", "ports are 1 to 65535")
    protocol = match[2] or "tcp"
    if protocol == TLS:
        return WrittenPort(Port(int(match[1]), Protocol.TCP), tls=True)
    if protocol not in tuple(Protocol):
        raise Unfit(f"{quoted(text)} has an unknown protocol", f"write {protocols}, in lower case")
    return WrittenPort(Port(int(match[1]), Protocol(protocol)), tls=False)


def port(value: object) -> Port:
    found, tls = _port(value, "tcp or udp")
    if tls:
        raise Unfit(f"{found.number}/tls is for host rules: only there is a name to verify", f"write {found}")
    return found


def tcp_port(value: object) -> Port:
    found = port(value)
    if found.protocol is not Protocol.TCP:
        raise Unfit(f"{found} is not TCP", "local services are reached over TCP only")
    return found


def verify(value: object) -> Verify:
    wanted = "sni or address"
    text = _text(value, wanted)
    if text in _VERIFY_NOT_AVAILABLE:
        raise Unfit(f"verify: {text} is not available in this version", "write verify: address")
    try:
        return Verify(text)
    except ValueError:
        raise Unfit(f"{quoted(text)} is not a way to verify", f"write {wanted}") from None


def ech(value: object) -> Ech:
    wanted = "refuse or allow"
    text = _text(value, wanted)
    try:
        return Ech(text)
    except ValueError:
        raise Unfit(f"{quoted(text)} is not a way to treat ECH", f"write {wanted}") from None


def truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise Unfit(f"this is {kind(value)}", "write true or false")


def service(value: object) -> str:
    return service_label(_text(value, "a service's name, such as ollama"))


def jurisdiction(value: object) -> str:
    return jurisdictions.jurisdiction(_text(value, "EU, EEA, UK or a country's two letters, such as CH"))


def wall(value: object) -> float:
    seconds = units.duration(_text(value, "a whole number and its unit: 120s"))
    if seconds > MAX_WALL:
        raise Unfit(f"{quoted(str(value))} is too long", f"{units.duration_text(MAX_WALL)} is the most")
    return seconds


def idle(value: object) -> float:
    seconds = units.duration(_text(value, "a whole number and its unit: 10m"))
    if seconds > MAX_IDLE:
        raise Unfit(f"{quoted(str(value))} is too long", f"{units.duration_text(MAX_IDLE)} is the most")
    return seconds


def memory(value: object) -> int:
    count = byte_count(value)
    if count < MIN_MEMORY:
        raise Unfit(f"{quoted(str(value))} is too little", f"{units.size_text(MIN_MEMORY)} is the least")
    return count


def byte_count(value: object) -> int:
    count = units.size(_text(value, "a whole number and its unit: 50MiB"))
    if count > MAX_BYTE_COUNT:
        raise Unfit(f"{quoted(str(value))} is too much", f"{units.size_text(MAX_BYTE_COUNT)} is the most")
    return count


def label_bytes(value: object) -> int:
    count = units.size(_text(value, "a whole number and its unit: 4KiB"))
    if count > MAX_LABEL_BYTES:
        raise Unfit(f"{quoted(str(value))} is too much", f"{units.size_text(MAX_LABEL_BYTES)} is the most")
    return count


def rate(value: object) -> float:
    return float(count(MAX_RATE)(value))


def count(most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Unfit(f"this is {kind(value)}", "write a whole number")
        if not 1 <= value <= most:
            raise Unfit(f"{value} is out of range", f"1 to {most} are allowed")
        return value

    return check


def reason(value: object) -> str:
    """Why a rule vouches for its host: it stands in proofs, so it is a sentence and not a `yes`."""
    text = _text(value, "the reason, in quotes")
    if not text.isprintable():
        raise Unfit("the reason has characters that cannot be shown", "write plain text on one line")
    if len(text.strip()) < MIN_REASON or len(text) > MAX_REASON:
        raise Unfit(
            f"the reason has {len(text)} characters",
            f"write {MIN_REASON} to {MAX_REASON}: who answers for where it is, and on what ground",
        )
    return text.strip()


# ---- of providers. A file that has a secret in the wrong place is shown to others because it does not load:
# so what is wrong here is not quoted, unless it is short and so hardly one. The line says where it stands.


def shown(text: str) -> str:
    """The text, if it is too short and plain for a key or a token; else nothing of it."""
    return quoted(text) if _SHORT.fullmatch(text) else "what is written here"


def is_label(text: str) -> bool:
    """Can it be the name of a provider or of a route?"""
    return _LABEL.fullmatch(text) is not None


def label(value: object) -> str:
    text = _text(value, "a name such as azure-frc")
    if is_label(text):
        return text
    raise Unfit(f"{shown(text)} is not a name", LABELS)


LABELS = "use 1 to 32 lower-case letters, digits, - and _, beginning with a letter"


def provider_type(value: object) -> str:
    text = _text(value, "the provider's type, such as azure-openai or openai-compatible")
    if _TYPE.fullmatch(text):
        return text
    raise Unfit(f"{shown(text)} is not a type of provider", "write one such as openai-compatible")


class WrittenUrl(NamedTuple):
    text: str
    endpoint: Endpoint


def base_url(value: object, info: ValidationInfo) -> WrittenUrl:
    wanted = "a URL such as https://api.example.com/v1"
    text = _text(value, wanted)
    try:
        endpoint = Endpoint.of(text)
    except Unfit as error:
        if error.text.startswith("the URL"):
            raise
        raise Unfit("the URL's host is neither a host name nor an address", f"write {wanted}") from None
    assert info.context is not None
    if endpoint.address is not None:
        _check_address(endpoint.address, info.context["own"])
    elif endpoint.host.endswith(".localhost"):
        raise Unfit("the URL's host is this machine itself", "write localhost")
    elif "." not in endpoint.host and endpoint.host != "localhost":
        raise Unfit("the URL's host is a single label", "write the full name, or localhost for this machine")
    return WrittenUrl(text, endpoint)


def _check_address(address: Address, own: tuple[Network, ...]) -> None:
    if address == IPv4Address("127.0.0.1"):
        return
    if address.is_loopback:
        raise Unfit("the URL's address is this machine itself", "write 127.0.0.1, where local rules lead")
    try:
        check_network(ip_network(address), own=own)
    except Unfit:
        raise Unfit(
            f"the URL's address is {classify(address)}, which no rule may reach", "write the host's name"
        ) from None


def secret(value: object) -> str:
    """A reference to a secret. Whatever else was written is not told: it may be the secret."""
    text = value if isinstance(value, str) else ""
    if _SECRET_ENV.fullmatch(text):
        return text
    if _SECRET_FILE.fullmatch(text) and not {".", ".."} & set(text.split("/")):
        return text
    raise Unfit(
        "this is not a reference to a secret, and the secret itself must not stand here",
        "write secret://env/NAME or secret://file/ABSOLUTE/PATH, and replace a key that was written here",
    )


def region(value: object) -> str:
    text = _text(value, "the region, as the provider spells it")
    if _REGION.fullmatch(text):
        return text
    raise Unfit(f"{shown(text)} is not a region", "write it as the provider spells it, such as eu-central-1")


def declared_jurisdiction(value: object) -> str:
    """One code, or a list of them: joined as in "CH, EEA"."""
    if isinstance(value, list) and 0 < len(value) <= MAX_DECLARED:
        return ", ".join(sorted({_declared_code(code) for code in value}))
    return _declared_code(value)


def _declared_code(value: object) -> str:
    text = _text(value, "EU, EEA, UK or a country's two letters, such as CH, or a list of these")
    if text in jurisdictions.CODES:
        return text
    if not _SHORT.fullmatch(text):
        raise Unfit(f"{shown(text)} is not a jurisdiction", "use EU, EEA, UK or a country's two letters")
    return jurisdictions.jurisdiction(text)


def source_url(value: object) -> str:
    """Where the provider says it. Only kept and shown, never fetched."""
    wanted = "the address of the page that says so: https://..."
    text = _text(value, wanted)
    try:
        if len(text) <= MAX_URL and text.startswith("https://") and Endpoint.of(text.partition("#")[0]).host:
            return text
    except Unfit:
        pass
    raise Unfit("this is not the https URL of a public page", f"write {wanted}")


def model(value: object) -> str:
    text = _text(value, "a model's id, as the provider spells it")
    if _MODEL.fullmatch(text) and ".." not in text and "//" not in text:
        return text
    raise Unfit("this is not a model's id", "write it as the provider spells it")
