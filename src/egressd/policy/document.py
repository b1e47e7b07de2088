"""The policy document: one file, one workspace. `load` gives a `Policy`, or every problem at once.

Three passes, so that one reading finds everything: `tree` (is it the YAML we read), the parts below (is
each value what its key wants), `compile` (do the rules stand each other). A part that is wrong is left
out of the next pass, whose findings would only be echoes. Nothing here reads a file or a clock.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from egressd.model.addresses import Network
from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.names import quoted
from egressd.policy import compile as compilation
from egressd.policy import values
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
    Rule,
    Verify,
)
from egressd.policy.tree import MAX_BYTES, Path, Tree, read
from egressd.residency import jurisdictions

__all__ = ["KNOWN_SERVICES", "MAX_BYTES", "load"]

KNOWN_SERVICES: dict[str, Port] = {"ollama": Port(11434, Protocol.TCP)}
DEFAULT_PORT = Port(443, Protocol.TCP)  # and the one that is verified by SNI unless the rule says otherwise
QUIC = Port(443, Protocol.UDP)
MAX_PORTS = 64  # per rule
MAX_MEMBERS = 1024
MAX_PROBLEMS = 1000  # told one by one


def load(
    data: bytes,
    *,
    source: str,
    expected_name: str | None,
    is_public_suffix: Callable[[str], bool],
    own: Iterable[Network] = (),
) -> Policy:
    """Compile a document. `PolicyError` carries everything wrong with it; nothing else is raised.

    `source` is what messages call the file, `expected_name` the workspace its file name promises (None: any),
    `own` are egressd's own address pools, which no `cidr` rule may touch.
    """
    tree = read(data, source=source)
    if not tree.readable:
        raise PolicyError(tree.problems)
    reader = _Reader(tree, {"is_public_suffix": is_public_suffix, "own": tuple(own)})
    draft = reader.draft(expected_name)
    for finding in compilation.conflicts(draft):
        reader.wrong(finding.path, finding.text, finding.remedy)
    problems = sorted(tree.problems)
    if problems:
        raise PolicyError(_bounded(problems, source))
    return compilation.compile(draft)


def _bounded(problems: list[Problem], source: str) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(source, 0, "", f"there are {rest} more problems")]


# ---- parts: which keys there are


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


_HostPorts: TypeAlias = list[Annotated[values.WrittenPort, PlainValidator(values.host_port)]]
_Ports: TypeAlias = list[Annotated[Port, PlainValidator(values.port)]]
_TcpPorts: TypeAlias = list[Annotated[Port, PlainValidator(values.tcp_port)]]


class _HostPart(_Part):
    host: Annotated[str, PlainValidator(values.host)]
    ports: _HostPorts = []
    verify: Annotated[Verify | None, PlainValidator(values.verify)] = None
    ech: Annotated[Ech, PlainValidator(values.ech)] = Ech.REFUSE
    private: Annotated[bool, PlainValidator(values.truth)] = False


class _CidrPart(_Part):
    cidr: Annotated[Any, PlainValidator(values.network)]
    ports: _Ports


class _LocalPart(_Part):
    local: Annotated[str, PlainValidator(values.service)]
    ports: _TcpPorts = []


class _LimitsPart(_Part):
    wall: Annotated[float | None, PlainValidator(values.wall)] = None
    memory: Annotated[int | None, PlainValidator(values.memory)] = None
    processes: Annotated[int | None, PlainValidator(values.count(values.MAX_PROCESSES))] = None
    egress_bytes: Annotated[int | None, PlainValidator(values.byte_count)] = None
    connections: Annotated[int | None, PlainValidator(values.count(values.MAX_CONNECTIONS))] = None
    idle: Annotated[float | None, PlainValidator(values.idle)] = None


class _BudgetPart(_Part):
    """Whatever is not written is the default of the sandbox, or of the workspace."""

    names: Annotated[int | None, PlainValidator(values.count(values.MAX_NAMES))] = None
    bytes: Annotated[int | None, PlainValidator(values.label_bytes)] = None
    rate: Annotated[float | None, PlainValidator(values.rate)] = None


class _WildcardsPart(_Part):
    sandbox: Any = None
    workspace: Any = None


class _ResidencyPart(_Part):
    jurisdictions: list[Annotated[str, PlainValidator(values.jurisdiction)]]


class _RootPart(_Part):
    """The sections that hold parts of their own are read one by one, so that none hides another's faults."""

    workspace: Annotated[str, PlainValidator(values.workspace)]
    guard: Annotated[Guard, PlainValidator(values.guard)] = Guard.OFF
    members: Any = None
    residency: Any = None
    allow: Any = None
    limits: Any = None
    wildcards: Any = None


class _MembersPart(_Part):
    members: list[Annotated[Member, PlainValidator(values.member)]]


_RULES: dict[str, type[_Part]] = {"host": _HostPart, "cidr": _CidrPart, "local": _LocalPart}
_KINDS = (*_RULES, "provider")
_MISSING = {
    "workspace": "add workspace: NAME",
    "ports": "add ports: such as [443/tcp]",
    "jurisdictions": "add jurisdictions: [EEA]",
}
P = TypeVar("P", bound=_Part)
T = TypeVar("T")


# ---- reading: parts out of the tree, every fault to its line


class _Reader:
    """Collects problems in the tree it reads; what could be read goes into the draft."""

    def __init__(self, tree: Tree, context: dict[str, object]) -> None:
        self._tree = tree
        self._context = context

    def wrong(self, path: Path, text: str, remedy: str = "") -> None:
        if not self._tree.is_unclear(path):
            self._tree.problems.append(self._tree.problem(path, text, remedy))

    def draft(self, expected_name: str | None) -> Draft:
        """What is well formed of the document; the rest is among the problems."""
        root = self._tree.value
        if not isinstance(root, dict):
            what = "the document is empty" if root is None else f"the document is {values.kind(root)}"
            self.wrong((), what, "begin with workspace: NAME")
            return Draft("", Guard.OFF, (), (), (), Limits(), Budgets())
        head = self._part(_RootPart, root, ())
        if expected_name is not None:
            self._check_name(root.get("workspace"), expected_name)
        return Draft(
            workspace=head.workspace if head else "",
            guard=head.guard if head else Guard.OFF,
            members=self._members(root),
            residency=self._residency(root),
            rules=self._rules(root),
            limits=self._limits(root),
            wildcards=self._wildcards(root),
        )

    def _check_name(self, workspace: object, expected_name: str) -> None:
        if values.is_workspace(workspace) and workspace != expected_name:
            text = f"the workspace is {workspace} but the file is named for {quoted(expected_name)}"
            self.wrong(("workspace",), text, "make the file's name and the workspace agree")

    def _members(self, root: dict[str, Any]) -> tuple[Member, ...]:
        if "members" not in root or self._too_long(root["members"], ("members",), MAX_MEMBERS):
            return ()
        part = self._part(_MembersPart, {"members": root["members"]}, ())
        return tuple(part.members) if part else ()

    def _residency(self, root: dict[str, Any]) -> tuple[str, ...]:
        if "residency" not in root:
            return ()
        path: Path = ("residency",)
        section = root["residency"]
        codes = section.get("jurisdictions") if isinstance(section, dict) else None
        if self._too_long(codes, (*path, "jurisdictions"), len(jurisdictions.CODES)):
            return ()
        part = self._part(_ResidencyPart, section, path)
        if part is not None and not part.jurisdictions:
            self.wrong(("residency", "jurisdictions"), "the list is empty", "name at least one, or remove it")
        return tuple(part.jurisdictions) if part else ()

    def _limits(self, root: dict[str, Any]) -> Limits:
        if "limits" not in root:
            return Limits()
        part = self._part(_LimitsPart, root["limits"], ("limits",))
        return Limits(**part.model_dump()) if part else Limits()

    def _wildcards(self, root: dict[str, Any]) -> Budgets:
        usual = Budgets()
        if "wildcards" not in root:
            return usual
        section = root["wildcards"]
        if self._part(_WildcardsPart, section, ("wildcards",)) is None:
            return usual
        found = {
            whose: self._budget(section[whose], getattr(usual, whose), ("wildcards", whose))
            for whose in _WildcardsPart.model_fields
            if whose in section
        }
        return replace(usual, **found)

    def _budget(self, section: object, usual: Budget, path: Path) -> Budget:
        part = self._part(_BudgetPart, section, path)
        return replace(usual, **part.model_dump(exclude_none=True)) if part else usual

    def _rules(self, root: dict[str, Any]) -> tuple[Drafted, ...]:
        if "allow" not in root:
            return ()
        entries = root["allow"]
        if not isinstance(entries, list):
            self._not_a(("allow",), entries, "a list of rules", empty="write allow: [] to allow nothing")
            return ()
        if self._too_long(entries, ("allow",), compilation.MAX_RULES):
            return ()
        rules = ((index, self._rule(index, entry)) for index, entry in enumerate(entries))
        return tuple(Drafted(index, rule) for index, rule in rules if rule is not None)

    def _rule(self, index: int, entry: object) -> Rule | None:
        path: Path = ("allow", index)
        if not isinstance(entry, dict):
            self._not_a(path, entry, "a mapping such as host: api.example.com", empty="remove the dash")
            return None
        kinds = [kind for kind in _KINDS if kind in entry]
        if not kinds:
            self._no_kind(path, entry)
        elif len(kinds) > 1:
            text = f"a rule is one of {', '.join(_KINDS)}, and this is {' and '.join(kinds)}"
            self.wrong(path, text, "make it two rules")
        elif kinds[0] not in _RULES:
            self.wrong((*path, kinds[0]), f"{kinds[0]} rules are not available in this version", _BY_HOST)
        elif not self._too_long(entry.get("ports"), (*path, "ports"), MAX_PORTS):
            part = self._part(_RULES[kinds[0]], entry, path)
            return None if part is None else self._compiled(part, path)
        return None

    def _no_kind(self, path: Path, entry: dict[str, Any]) -> None:
        text = f"a rule is one of {', '.join(_KINDS)}, and this is none"
        close = [(key, match) for key in _first(entry) for match in _close(key, _KINDS)]
        if close:
            self.wrong((*path, close[0][0]), text, f"did you mean {close[0][1]}?")
        else:
            self.wrong(path, text, "write host: NAME")

    def _compiled(self, part: _Part, path: Path) -> Rule | None:
        line = self._tree.line(path)
        match part:
            case _HostPart():
                return self._host(part, path)
            case _CidrPart():
                ports = self._ports(part, part.ports, None, path)
                return CidrRule(part.cidr, ports, line) if ports else None
            case _LocalPart():
                ports = self._ports(part, part.ports, KNOWN_SERVICES.get(part.local), path)
                return LocalRule(part.local, ports, line) if ports else None
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
        return HostRule(part.host, numbers, inspected, part.private, self._tree.line(path), part.ech)

    def _ports(self, part: _Part, ports: list[T], default: T | None, path: Path) -> tuple[T, ...]:
        """What was written, or the default; () after reporting when there is neither."""
        written = "ports" in part.model_fields_set
        if not written and default is not None:
            return (default,)
        if not written:
            self.wrong(path, "ports is missing, and the service has no usual port", _MISSING["ports"])
        elif not ports:
            self.wrong((*path, "ports"), "the list is empty", "name at least one port")
        else:
            return tuple(ports)
        return ()

    # ---- parts and their faults

    def _part(self, model: type[P], value: object, path: Path) -> P | None:
        try:
            return model.model_validate(value, context=self._context)
        except ValidationError as error:
            known = tuple(model.model_fields)
            meant = {match for key in _first(value) if key not in known for match in _close(key, known)}
            for fault in error.errors(include_url=False, include_input=True):
                # a misspelt key is one mistake, told where it stands; not that the right one is missing
                if fault["type"] != "missing" or fault["loc"][-1] not in meant:
                    self._fault(fault, model, path)
            return None

    def _fault(self, fault: Any, model: type[_Part], base: Path) -> None:
        """One of pydantic's findings, in our words and at its line."""
        path: Path = (*base, *fault["loc"])
        match fault["type"]:
            case "value_error":
                self._unfit(path, fault["ctx"]["error"])
            case "extra_forbidden":
                self._unknown_key(path, tuple(model.model_fields))
            case "missing":
                self.wrong(path, f"{path[-1]} is missing", _MISSING.get(str(path[-1]), "add it"))
            case "list_type":
                self._not_a(path, fault["input"], "a list: [...]", empty="write [] or remove the line")
            case "model_type" | "dict_type":
                self._not_a(path, fault["input"], "a mapping: {...}", empty="remove the line")
            case _:
                self.wrong(path, str(fault["msg"]))

    def _unfit(self, path: Path, error: ValueError) -> None:
        if isinstance(error, Unfit):
            self.wrong(path, error.text, error.remedy)
        else:
            self.wrong(path, str(error))

    def _unknown_key(self, path: Path, known: tuple[str, ...]) -> None:
        key = str(path[-1])
        # a file of nothing but unknown keys must not buy a comparison for each of them
        close = _close(key, known) if len(self._tree.problems) < MAX_PROBLEMS else []
        remedy = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(known)}"
        self.wrong(path, f"{quoted(key)} is not a key of this section", remedy)

    def _too_long(self, value: object, path: Path, most: int) -> bool:
        """Told before the entries are looked at: a list beyond all bounds gets one answer, not thousands."""
        if not isinstance(value, list) or len(value) <= most:
            return False
        self.wrong(path, f"there are {len(value)} entries, {most} are the most", "list fewer")
        return True

    def _not_a(self, path: Path, value: object, wanted: str, *, empty: str) -> None:
        self.wrong(path, f"this is {values.kind(value)}", empty if value is None else f"write {wanted}")


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
_BY_HOST = "list the provider's endpoints as host rules"


def _first(mapping: object) -> Iterable[str]:
    """A few keys: more than any section has, and few enough to compare each with all that are known."""
    return islice(mapping, 8) if isinstance(mapping, dict) else ()


def _close(key: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(key[:40].lower(), list(known), n=1, cutoff=0.7)
