"""The policy document: one file, one workspace. `load` gives a `Policy`, or every problem at once.

Three passes, so that one reading finds everything: `tree` (is it the YAML we read), the parts below (is
each value what its key wants), `compile` (do the rules stand each other). A part that is wrong is left
out of the next pass, whose findings would only be echoes. Nothing here reads a file or a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, PlainValidator

from egressd.model.addresses import Network
from egressd.model.errors import PolicyError, Problem
from egressd.model.names import quoted
from egressd.model.tree import MAX_BYTES, Path, Tree, read
from egressd.policy import compile as compilation
from egressd.policy import plain_secrets, values
from egressd.policy.compile import Draft, Drafted
from egressd.policy.compiled import (
    Budget,
    Budgets,
    CidrRule,
    Ech,
    Guard,
    HostRule,
    Limits,
    LocalRule,
    Member,
    Policy,
    Port,
    Protocol,
    Provider,
    Rule,
    Verify,
)
from egressd.policy.parts import MAX_PROBLEMS, MISSING, Part, Reader, close_to, first_keys
from egressd.policy.profiles import Profiles, read_profiles, read_routes
from egressd.residency import jurisdictions
from egressd.residency.registry import Registry

__all__ = ["KNOWN_SERVICES", "MAX_BYTES", "load"]

KNOWN_SERVICES: dict[str, Port] = {"ollama": Port(11434, Protocol.TCP)}
DEFAULT_PORT = Port(443, Protocol.TCP)  # and the one that is verified by SNI unless the rule says otherwise
QUIC = Port(443, Protocol.UDP)
MAX_PORTS = 64  # per rule
MAX_MEMBERS = 1024


def load(
    data: bytes,
    *,
    source: str,
    expected_name: str | None,
    is_public_suffix: Callable[[str], bool],
    own: Iterable[Network] = (),
    registry: Registry | None = None,
) -> Policy:
    """Compile a document. `PolicyError` carries everything wrong with it; nothing else is raised.

    `source` is what messages call the file, `expected_name` the workspace its file name promises (None: any),
    `own` are egressd's own address pools, which no `cidr` rule may touch. `registry` is what is known about
    providers and addresses; without one, nothing is.
    """
    tree = read(data, source=source)
    if not tree.readable:
        raise PolicyError(_without_secrets(tree.problems, data, tree))
    registry = registry or Registry()
    reader = _Reader(tree, {"is_public_suffix": is_public_suffix, "own": tuple(own)}, registry)
    draft = reader.draft(expected_name)
    for finding in compilation.conflicts(draft):
        reader.wrong(finding.path, finding.text, finding.remedy)
    problems = sorted(tree.problems)
    if problems:
        raise PolicyError(_without_secrets(_bounded(problems, source), data, tree))
    return compilation.compile(draft, registry)


def _without_secrets(problems: Iterable[Problem], data: bytes, tree: Tree) -> list[Problem]:
    """Problems quote what they do not understand, and are recorded: a key in the wrong line is not told."""
    hide = plain_secrets.find(data, tree).hide
    return [
        replace(found, where=hide(found.where), text=hide(found.text), remedy=hide(found.remedy))
        for found in problems
    ]


def _bounded(problems: list[Problem], source: str) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(source, 0, "", f"there are {rest} more problems")]


# ---- parts: which keys there are


_HostPorts: TypeAlias = list[Annotated[values.WrittenPort, PlainValidator(values.host_port)]]
_Ports: TypeAlias = list[Annotated[Port, PlainValidator(values.port)]]
_TcpPorts: TypeAlias = list[Annotated[Port, PlainValidator(values.tcp_port)]]


class _HostPart(Part):
    host: Annotated[str, PlainValidator(values.host)]
    ports: _HostPorts = Field(default_factory=list)
    verify: Annotated[Verify | None, PlainValidator(values.verify)] = None
    ech: Annotated[Ech, PlainValidator(values.ech)] = Ech.REFUSE
    private: Annotated[bool, PlainValidator(values.truth)] = False
    vouch: Annotated[str, PlainValidator(values.reason)] = ""


class _CidrPart(Part):
    cidr: Annotated[Any, PlainValidator(values.network)]
    ports: _Ports
    vouch: Annotated[str, PlainValidator(values.reason)] = ""


class _LocalPart(Part):
    local: Annotated[str, PlainValidator(values.service)]
    ports: _TcpPorts = Field(default_factory=list)


class _ProviderRulePart(Part):
    """Of a profile; or of a type of the catalogue, whose `region` then makes the host."""

    provider: Annotated[str, PlainValidator(values.label)]
    region: Annotated[str | None, PlainValidator(values.region)] = None
    verify: Annotated[Verify | None, PlainValidator(values.verify)] = None
    ech: Annotated[Ech, PlainValidator(values.ech)] = Ech.REFUSE
    private: Annotated[bool, PlainValidator(values.truth)] = False
    vouch: Annotated[str, PlainValidator(values.reason)] = ""


class _LimitsPart(Part):
    wall: Annotated[float | None, PlainValidator(values.wall)] = None
    memory: Annotated[int | None, PlainValidator(values.memory)] = None
    processes: Annotated[int | None, PlainValidator(values.count(values.MAX_PROCESSES))] = None
    egress_bytes: Annotated[int | None, PlainValidator(values.byte_count)] = None
    connections: Annotated[int | None, PlainValidator(values.count(values.MAX_CONNECTIONS))] = None
    idle: Annotated[float | None, PlainValidator(values.idle)] = None


class _BudgetPart(Part):
    """Whatever is not written is the default of the sandbox, or of the workspace."""

    names: Annotated[int | None, PlainValidator(values.count(values.MAX_NAMES))] = None
    bytes: Annotated[int | None, PlainValidator(values.label_bytes)] = None
    rate: Annotated[float | None, PlainValidator(values.rate)] = None


class _WildcardsPart(Part):
    sandbox: Any = None
    workspace: Any = None


class _ResidencyPart(Part):
    jurisdictions: list[Annotated[str, PlainValidator(values.jurisdiction)]]


class _RootPart(Part):
    """The sections that hold parts of their own are read one by one, so that none hides another's faults."""

    workspace: Annotated[str, PlainValidator(values.workspace)]
    guard: Annotated[Guard, PlainValidator(values.guard)] = Guard.OFF
    local_only: Annotated[bool, PlainValidator(values.truth)] = False
    members: Any = None
    residency: Any = None
    providers: Any = None
    routes: Any = None
    allow: Any = None
    limits: Any = None
    wildcards: Any = None


class _MembersPart(Part):
    members: list[Annotated[Member, PlainValidator(values.member)]]


_RULES: dict[str, type[Part]] = {
    "host": _HostPart, "cidr": _CidrPart, "local": _LocalPart, "provider": _ProviderRulePart,
}  # fmt: skip
_KINDS = tuple(_RULES)
T = TypeVar("T")


# ---- reading: parts out of the tree, every fault to its line


class _Reader(Reader):
    """What could be read goes into the draft."""

    def __init__(self, tree: Tree, context: dict[str, object], registry: Registry) -> None:
        super().__init__(tree, context)
        self._registry = registry
        self._profiles = Profiles({}, frozenset())

    def draft(self, expected_name: str | None) -> Draft:
        """What is well formed of the document; the rest is among the problems."""
        root = self.tree.value
        if not isinstance(root, dict):
            what = "the document is empty" if root is None else f"the document is {values.kind(root)}"
            self.wrong((), what, "begin with workspace: NAME")
            return Draft("", Guard.OFF, (), (), (), Limits(), Budgets())
        head = self.part(_RootPart, root, ())
        if expected_name is not None:
            self._check_name(root.get("workspace"), expected_name)
        self._profiles = read_profiles(self, root, self._registry)
        return Draft(
            workspace=head.workspace if head else "",
            guard=head.guard if head else Guard.OFF,
            members=self._members(root),
            residency=self._residency(root),
            rules=self._rules(root),
            limits=self._limits(root),
            wildcards=self._wildcards(root),
            local_only=head.local_only if head else False,
            providers=tuple(self._profiles.found.values()),
            routes=read_routes(self, root, self._profiles),
        )

    def _check_name(self, workspace: object, expected_name: str) -> None:
        if values.is_workspace(workspace) and workspace != expected_name:
            text = f"the workspace is {workspace} but the file is named for {quoted(expected_name)}"
            self.wrong(("workspace",), text, "make the file's name and the workspace agree")

    def _members(self, root: dict[str, Any]) -> tuple[Member, ...]:
        if "members" not in root or self.too_long(root["members"], ("members",), MAX_MEMBERS):
            return ()
        part = self.part(_MembersPart, {"members": root["members"]}, ())
        return tuple(part.members) if part else ()

    def _residency(self, root: dict[str, Any]) -> tuple[str, ...]:
        if "residency" not in root:
            return ()
        path: Path = ("residency",)
        section = root["residency"]
        codes = section.get("jurisdictions") if isinstance(section, dict) else None
        if self.too_long(codes, (*path, "jurisdictions"), len(jurisdictions.CODES)):
            return ()
        part = self.part(_ResidencyPart, section, path)
        if part is not None and not part.jurisdictions:
            self.wrong(("residency", "jurisdictions"), "the list is empty", "name at least one, or remove it")
        return tuple(part.jurisdictions) if part else ()

    def _limits(self, root: dict[str, Any]) -> Limits:
        if "limits" not in root:
            return Limits()
        part = self.part(_LimitsPart, root["limits"], ("limits",))
        return Limits(**part.model_dump()) if part else Limits()

    def _wildcards(self, root: dict[str, Any]) -> Budgets:
        usual = Budgets()
        if "wildcards" not in root:
            return usual
        section = root["wildcards"]
        if self.part(_WildcardsPart, section, ("wildcards",)) is None:
            return usual
        found = {
            whose: self._budget(section[whose], getattr(usual, whose), ("wildcards", whose))
            for whose in _WildcardsPart.model_fields
            if whose in section
        }
        return replace(usual, **found)

    def _budget(self, section: object, usual: Budget, path: Path) -> Budget:
        part = self.part(_BudgetPart, section, path)
        return replace(usual, **part.model_dump(exclude_none=True)) if part else usual

    def _rules(self, root: dict[str, Any]) -> tuple[Drafted, ...]:
        if "allow" not in root:
            return ()
        entries = root["allow"]
        if not isinstance(entries, list):
            self.not_a(("allow",), entries, "a list of rules", empty="write allow: [] to allow nothing")
            return ()
        if self.too_long(entries, ("allow",), compilation.MAX_RULES):
            return ()
        rules = ((index, self._rule(index, entry)) for index, entry in enumerate(entries))
        return tuple(Drafted(index, rule) for index, rule in rules if rule is not None)

    def _rule(self, index: int, entry: object) -> Rule | None:
        path: Path = ("allow", index)
        if not isinstance(entry, dict):
            self.not_a(path, entry, "a mapping such as host: api.example.com", empty="remove the dash")
            return None
        kinds = [kind for kind in _KINDS if kind in entry]
        if not kinds:
            self._no_kind(path, entry)
        elif len(kinds) > 1:
            text = f"a rule is one of {', '.join(_KINDS)}, and this is {' and '.join(kinds)}"
            self.wrong(path, text, "make it two rules")
        elif not self.too_long(entry.get("ports"), (*path, "ports"), MAX_PORTS):
            part = self.part(_RULES[kinds[0]], entry, path)
            return None if part is None else self._compiled(part, path)
        return None

    def _no_kind(self, path: Path, entry: dict[str, Any]) -> None:
        text = f"a rule is one of {', '.join(_KINDS)}, and this is none"
        close = [(key, match) for key in first_keys(entry) for match in close_to(key, _KINDS)]
        if close:
            self.wrong((*path, close[0][0]), text, f"did you mean {close[0][1]}?")
        else:
            self.wrong(path, text, "write host: NAME")

    def _compiled(self, part: Part, path: Path) -> Rule | None:
        line = self.tree.line(path)
        match part:
            case _HostPart():
                return self._host(part, path)
            case _CidrPart():
                ports = self._ports(part, part.ports, None, path)
                return CidrRule(part.cidr, ports, line, part.vouch) if ports else None
            case _LocalPart():
                ports = self._ports(part, part.ports, KNOWN_SERVICES.get(part.local), path)
                return LocalRule(part.local, ports, line) if ports else None
            case _ProviderRulePart():
                return self._provider(part, path)
        return None

    def _host(self, part: _HostPart, path: Path) -> HostRule | None:
        usual = values.WrittenPort(DEFAULT_PORT, tls=False)
        ports = self._ports(part, part.ports, usual, path)
        faults = [_misverified(written, part.verify) for written in ports]
        for number, fault in enumerate(faults):
            if fault is not None:
                self.wrong((*path, "ports", number), *fault)
        inspected = tuple(sorted({(w.port, Verify.SNI) for w in ports if _is_inspected(w, part.verify)}))
        if not ports or any(faults):
            return None
        if "ech" in part.model_fields_set and not inspected:
            self.wrong((*path, "ech"), "no port of this rule is verified by sni, so ECH is not seen", _NO_ECH)
            return None
        numbers = tuple(written.port for written in ports)
        line = self.tree.line(path)
        return HostRule(part.host, numbers, inspected, part.private, line, part.ech, part.vouch)

    # ---- rules for providers

    def _provider(self, part: _ProviderRulePart, path: Path) -> Rule | None:
        profile = self._profiles.found.get(part.provider)
        if profile is not None and part.region is None:
            return self._of_profile(profile, part, path)
        if profile is not None:
            text = f"{part.provider} is a profile, which says itself where it is"
            self.wrong((*path, "region"), text, "leave region out")
        elif part.provider not in self._profiles.named:
            return self._of_type(part, path)
        return None

    def _of_profile(self, profile: Provider, part: _ProviderRulePart, path: Path) -> Rule | None:
        line, ports, providers = self.tree.line(path), (profile.port,), (profile.name,)
        if profile.is_local:
            meaningless = self._meaningless(part, ("verify", "ech", "private", "vouch"), path)
            return None if meaningless else LocalRule(profile.key, ports, line, providers)
        if profile.endpoint.address is not None:
            meaningless = self._meaningless(part, ("verify", "ech", "private"), path)
            network = ip_network(profile.endpoint.address)
            return None if meaningless else CidrRule(network, ports, line, part.vouch, providers)
        secure = profile.endpoint.scheme == "https"
        rule = self._of_host(profile.endpoint.host, profile.port, part, path, secure=secure)
        return replace(rule, providers=providers) if rule else None

    def _meaningless(self, part: Part, keys: Iterable[str], path: Path) -> bool:
        written = [key for key in keys if key in part.model_fields_set]
        for key in written:
            text = f"{key} is for hosts, and the provider's URL has the address of no name"
            self.wrong((*path, key), text, f"leave {key} out")
        return bool(written)

    def _of_host(
        self, host: str, port: Port, part: _ProviderRulePart, path: Path, *, secure: bool
    ) -> HostRule | None:
        """One port, over which TLS is spoken, or certainly not: as the URL's scheme says."""
        if part.verify is Verify.SNI and not secure:
            text = "a URL of http:// has no TLS whose name could be verified"
            self.wrong((*path, "verify"), text, "leave verify out, or write https:// if it speaks TLS")
            return None
        inspected = ((port, Verify.SNI),) if secure and part.verify is not Verify.ADDRESS else ()
        if "ech" in part.model_fields_set and not inspected:
            self.wrong((*path, "ech"), "no port of this rule is verified by sni, so ECH is not seen", _NO_ECH)
            return None
        line = self.tree.line(path)
        return HostRule(host, (port,), inspected, part.private, line, part.ech, part.vouch)

    def _of_type(self, part: _ProviderRulePart, path: Path) -> HostRule | None:
        """`provider: TYPE` and `region: REGION`, where those two alone make a host."""
        catalogue = self._registry.catalogue
        if catalogue.key(part.provider) is None:
            known = {*self._profiles.named, *catalogue.providers}
            close = close_to(part.provider, known)
            remedy = f"did you mean {close[0]}?" if close else "define it under providers:"
            self.wrong((*path, "provider"), f"there is no provider {values.shown(part.provider)}", remedy)
        elif part.region is None:
            text = f"there is no profile {part.provider}, and as a type it is in many places"
            self.wrong((*path, "provider"), text, "add region: REGION, or define it under providers:")
        elif (host := catalogue.host_of(part.provider, part.region)) is not None:
            return self._of_host(host, DEFAULT_PORT, part, path, secure=True)
        else:
            self._no_host(part.provider, part.region, (*path, "region"))
        return None

    def _no_host(self, provider: str, region: str, path: Path) -> None:
        regions = self._registry.catalogue.regions(provider)
        if region in regions:
            text = f"{provider} and {region} alone do not make a host"
            self.wrong(path, text, "define it under providers:, with its base_url")
        else:
            close = close_to(region, regions)
            remedy = f"did you mean {close[0]}?" if close else "write it as the provider spells it"
            self.wrong(path, f"{values.shown(region)} is not a region of {provider}", remedy)

    def _ports(self, part: Part, ports: list[T], default: T | None, path: Path) -> tuple[T, ...]:
        """What was written, or the default; () after reporting when there is neither."""
        written = "ports" in part.model_fields_set
        if not written and default is not None:
            return (default,)
        if not written:
            self.wrong(path, "ports is missing, and the service has no usual port", MISSING["ports"])
        elif not ports:
            self.wrong((*path, "ports"), "the list is empty", "name at least one port")
        else:
            return tuple(ports)
        return ()


def _is_inspected(written: values.WrittenPort, verify: Verify | None) -> bool:
    """Without `verify`, what is usually or expressly TLS is read; TCP only."""
    if written.port.protocol is not Protocol.TCP or verify is Verify.ADDRESS:
        return False
    return verify is Verify.SNI or written.tls or written.port == DEFAULT_PORT


def _misverified(written: values.WrittenPort, verify: Verify | None) -> tuple[str, str] | None:
    """What keeps this port from being verified as the rule says: text and remedy."""
    port = written.port
    if verify is Verify.ADDRESS and written.tls:
        text = f"{port.number}/tls is verified by sni, and verify: address says the contrary"
        return text, f"write {port}, or leave verify out"
    if verify is Verify.SNI and port.protocol is not Protocol.TCP:
        text = f"{port} cannot be verified by sni, which is for TLS over TCP"
        return text, "give it a rule of its own, with verify: address"
    if verify is None and port == QUIC:
        return f"{port} is QUIC, whose name is not verified", _QUIC
    return None


_NO_ECH = "leave ech out, or leave out verify: address"
_QUIC = (
    "leave it out, since clients fall back to TCP; or give it a rule of its own with verify: address, and"
    " every other name behind the same address can be asked for"
)
