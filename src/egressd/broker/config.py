"""The broker's configuration: one YAML file, read once. With anything wrong in it the broker does not start;
every problem is told at its line, with its remedy.

A secret has no place in it: where one is needed, its reference stands (``secret://env/NAME``,
``secret://file/ABSOLUTE/PATH``), as in a workspace's policy, and a file that holds one in clear is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PlainValidator

from egressd.access.documents import LEVELS
from egressd.broker.identity import issuers
from egressd.broker.runners.jobs import Limits
from egressd.ipc.messages import MOST_CONNECTIONS
from egressd.model import tree
from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.names import quoted
from egressd.policy import plain_secrets, values
from egressd.policy.parts import Part, Reader
from egressd.sandbox.control import DEFAULT_RUN_DIR
from egressd.sandbox.files import seen_anyway

__all__ = [
    "DEFAULT_SOCKET",
    "BrokerConfig",
    "Inference",
    "Listen",
    "ServiceLimits",
    "Tls",
    "WorkspaceConfig",
    "load",
    "parse",
]

DEFAULT_SOCKET = "/run/egressd-broker/broker.sock"
MANUAL = "broker.yaml(5)"
_UNIX_PATH_MAX = 107  # linux/un.h: sun_path, with the NUL at its end
_MAX_WORKSPACES, _MAX_INFERENCES, _MAX_WORDS = 1024, 256, 256
_NAME = re.compile(r"[a-z](?:[a-z0-9_-]{0,30}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_RATE = re.compile(r"([1-9][0-9]{0,5})/(s|min|h)")
_PER = {"s": 1, "min": 60, "h": 3600}
P = TypeVar("P", bound=Part)


# ---- what comes out

# Where nothing is written: one inference could otherwise use up what the service has for all (TasksMax).
MEMORY, PROCESSES = 4 << 30, 256  # bytes; processes and threads
BOUNDED = Limits(memory=MEMORY, processes=PROCESSES)


@dataclass(frozen=True, slots=True)
class Listen:
    """A Unix socket's path, or an address and a port that speak TLS 1.3."""

    path: str = DEFAULT_SOCKET
    address: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"https://[{self.address}]:{self.port}" if ":" in self.address else (
            f"https://{self.address}:{self.port}"
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. Who has no certificate of `client_ca` is not spoken to."""

    certificate: str
    key: str
    client_ca: str


@dataclass(frozen=True, slots=True)
class Inference:
    """A command that a workspace offers. `environment` holds references to secrets as they were written."""

    command: tuple[str, ...]
    bind_ro: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    network: Literal["policy", "none"] = "policy"
    limits: Limits = BOUNDED


@dataclass(frozen=True, slots=True)
class WorkspaceConfig:
    """`network` and `limits` are of commands that askers bring along, where `commands` permits them."""

    inferences: Mapping[str, Inference] = field(default_factory=dict)
    commands: bool = False
    limits: Limits = BOUNDED
    network: Literal["policy", "none"] = "policy"


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Of the service itself. `rate` is requests and the seconds they are spread over, of one user."""

    rate: tuple[int, float] = (30, 60.0)
    per_user: int = 4  # inferences of one user at once
    at_once: int = 16  # of all
    candidates: int = 10_000
    files: int = 1000
    bytes: int = 1 << 30  # of the documents that one request shows
    body: int = 16 << 20
    output: int = 16 << 20  # of what one command writes
    kept: int = 256 << 20  # of what ended commands wrote, all together


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Every field of broker.yaml(5). Paths are absolute."""

    listen: Listen = Listen()
    tls: Tls | None = None
    store: str = "sqlite:////var/lib/egressd-broker/store.db"
    run_dir: str = DEFAULT_RUN_DIR
    issuers: tuple[issuers.Issuer, ...] = ()
    levels: tuple[str, ...] = LEVELS  # the ladder of clearances, lowest first
    workspaces: Mapping[str, WorkspaceConfig] = field(default_factory=dict)
    limits: ServiceLimits = ServiceLimits()
    scratch: str = "private"  # or a directory
    scratch_encrypted: bool = False
    keep: float = 600.0  # seconds for which a result can be fetched
    preflight: bool = False  # each sandbox is attacked a little before its command runs (egressd.selftest)


# ---- values


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise Unfit(f"{_shown(value)} is not an absolute path", "begin with /")
    return value


def _place(value: object) -> str:
    """Of what is shown to a sandbox where it is: not below what it has for the copies and the tools."""
    path = _path(value)
    for taken in ("/work", "/opt/egressd"):
        if f"{path.rstrip('/')}/".startswith(f"{taken}/"):
            raise Unfit(f"{quoted(path)} is below {taken}, which is the sandbox's own", "put it elsewhere")
    return path


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else f"this ({values.kind(value)})"


def _listen(value: object) -> Listen:
    wanted = f"write unix:{DEFAULT_SOCKET} or https://ADDRESS:PORT"
    text = value if isinstance(value, str) else ""
    if text.startswith("unix:"):
        path = _path(text.removeprefix("unix:"))
        if len(path.encode()) > _UNIX_PATH_MAX:
            raise Unfit(f"the path has {len(path.encode())} bytes", f"at most {_UNIX_PATH_MAX} fit a socket")
        return Listen(path)
    if text.startswith("http://"):
        raise Unfit("tokens and documents would go in clear", wanted)
    found = re.fullmatch(r"https://(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})/?", text)
    try:
        address = ip_address((found[1] or found[2]) if found else "")
    except ValueError:
        raise Unfit(f"{_shown(value)} is no place to listen", wanted) from None
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise Unfit(f"{_shown(value)} has no port", wanted)
    return Listen("", str(address), int(found[3]))


def _store(value: object) -> str:
    """SQLAlchemy's URLs. Who connects, and with what password, is for libpq's own variables and files."""
    text = value if isinstance(value, str) else ""
    if re.fullmatch(r"sqlite:////[^\s?#@]+|postgresql(?:\+psycopg)?://[^\s@]+", text):
        if "password=" in text:
            raise Unfit("a password stands in the URL", "put it into the file that PGPASSFILE names")
        return text
    raise Unfit(
        "this is not the URL of a store",
        "write sqlite:////ABSOLUTE/PATH, or postgresql://HOST/DATABASE with PGUSER and PGPASSFILE in the"
        " service's environment",
    )


def _rate(value: object) -> tuple[int, float]:
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Unfit(f"{_shown(value)} is not a rate", 'write one such as "30/min", "2/s" or "500/h"')
    return int(found[1]), float(_PER[found[2]])


def _words(value: object) -> tuple[str, ...]:
    wanted = "write a list of words: [python3, infer.py]"
    if not isinstance(value, list) or not value or len(value) > _MAX_WORDS:
        raise Unfit("this is not a command", wanted)
    for word in value:
        if isinstance(word, bool) or not isinstance(word, str | int) or "\0" in str(word):
            raise Unfit("one of its words is not text", wanted + "; quote what looks like something else")
    return tuple(map(str, value))


def _environment(value: object) -> Mapping[str, str]:
    wanted = "write {NAME: value}; a secret as secret://env/NAME or secret://file/PATH"
    if not isinstance(value, dict):
        raise Unfit(f"this is {values.kind(value)}", wanted)
    found: dict[str, str] = {}
    for name, text in value.items():
        if not _VARIABLE.fullmatch(name):
            raise Unfit(f"{values.shown(name)} is not a variable's name", wanted)
        if isinstance(text, bool) or not isinstance(text, str | int):
            raise Unfit(f"the value of {name} is {values.kind(text)}", "write text, in quotes")
        found[name] = values.secret(text) if str(text).startswith("secret://") else str(text)
    return MappingProxyType(found)


def _network(value: object) -> str:
    if value not in ("policy", "none"):
        raise Unfit(f"{_shown(value)} is not a network", "write policy, or none")
    return str(value)


def _levels(value: object) -> tuple[str, ...]:
    wanted = "write the levels from the lowest to the highest: [public, internal, secret]"
    if not isinstance(value, list) or not 1 <= len(value) <= 32:
        raise Unfit("this is not a ladder of levels", wanted)
    for level in value:
        if not isinstance(level, str) or not _NAME.fullmatch(level):
            raise Unfit(f"{_shown(level)} is not a level", wanted)
    if len(set(value)) < len(value):
        raise Unfit("a level stands there twice", "each has one place on the ladder")
    return tuple(value)


def _or_none(check: Callable[[object], int]) -> Callable[[object], int | None]:
    """Of what is bounded by default."""
    return lambda value: None if value == "none" else check(value)


def _cost(value: object) -> float:
    found = re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,6})?", str(value))
    if isinstance(value, bool) or found is None or float(found[0]) <= 0:
        raise Unfit(
            f"{_shown(value)} is no amount", "write one such as 0.25, in the currency the command reports"
        )
    return float(found[0])


def _scratch(value: object) -> Any:
    if value == "private" or isinstance(value, dict):
        return value
    raise Unfit(
        f"{_shown(value)} is no scratch", "write private, or {directory: /ABSOLUTE/PATH, encrypted: true}"
    )


# ---- the file's grammar


class _TlsPart(Part):
    certificate: Annotated[str, PlainValidator(_path)]
    key: Annotated[str, PlainValidator(_path)]
    client_ca: Annotated[str, PlainValidator(_path)]


class _LimitsPart(Part):
    """Of an inference; spelled as in a workspace's policy."""

    wall: Annotated[float | None, PlainValidator(values.wall)] = None
    cpu: Annotated[float | None, PlainValidator(values.wall)] = None
    memory: Annotated[int | None, PlainValidator(_or_none(values.memory))] = MEMORY
    processes: Annotated[int | None, PlainValidator(_or_none(values.count(values.MAX_PROCESSES)))] = PROCESSES
    file_size: Annotated[int | None, PlainValidator(values.byte_count)] = None
    output: Annotated[int | None, PlainValidator(values.byte_count)] = None
    egress_bytes: Annotated[int | None, PlainValidator(values.byte_count)] = None
    connections: Annotated[int | None, PlainValidator(values.count(MOST_CONNECTIONS))] = None
    tokens: Annotated[int | None, PlainValidator(values.count(1 << 40))] = None
    cost: Annotated[float | None, PlainValidator(_cost)] = None

    def limits(self) -> Limits:
        found = {
            "egress" if name == "egress_bytes" else name: value for name, value in self.model_dump().items()
        }
        return Limits(**found)


class _InferencePart(Part):
    command: Annotated[tuple[str, ...], PlainValidator(_words)]
    bind_ro: list[Annotated[str, PlainValidator(_place)]] = Field(default_factory=list)
    environment: Annotated[Any, PlainValidator(_environment)] = Field(default_factory=dict)
    network: Annotated[Any, PlainValidator(_network)] = "policy"
    limits: Any = None


class _WorkspacePart(Part):
    inferences: Any = None
    commands: Annotated[bool, PlainValidator(values.truth)] = False
    limits: Any = None
    network: Annotated[Any, PlainValidator(_network)] = "policy"


class _ServiceLimitsPart(Part):
    rate: Annotated[tuple[int, float], PlainValidator(_rate)] = (30, 60.0)
    per_user: Annotated[int, PlainValidator(values.count(10_000))] = 4
    at_once: Annotated[int, PlainValidator(values.count(10_000))] = 16
    candidates: Annotated[int, PlainValidator(values.count(1_000_000))] = 10_000
    files: Annotated[int, PlainValidator(values.count(100_000))] = 1000
    bytes: Annotated[int, PlainValidator(values.byte_count)] = 1 << 30
    body: Annotated[int, PlainValidator(values.byte_count)] = 16 << 20
    output: Annotated[int, PlainValidator(values.byte_count)] = 16 << 20
    kept: Annotated[int, PlainValidator(values.byte_count)] = 256 << 20


class _ScratchPart(Part):
    directory: Annotated[str, PlainValidator(_path)]
    encrypted: Annotated[bool, PlainValidator(values.truth)] = False


class _RootPart(Part):
    """Sections with parts of their own are read one by one, so that none hides another's faults."""

    listen: Annotated[Listen, PlainValidator(_listen)] = Listen()
    tls: Any = None
    store: Annotated[str, PlainValidator(_store)] = "sqlite:////var/lib/egressd-broker/store.db"
    run_dir: Annotated[str, PlainValidator(_path)] = DEFAULT_RUN_DIR
    issuers: Any = None
    levels: Annotated[tuple[str, ...], PlainValidator(_levels)] = LEVELS
    workspaces: Any = None
    limits: Any = None
    scratch: Annotated[Any, PlainValidator(_scratch)] = "private"
    keep: Annotated[float, PlainValidator(values.wall)] = 600.0
    preflight: Annotated[bool, PlainValidator(values.truth)] = False


# ---- reading


def load(path: Path) -> BrokerConfig:
    """Read and check a configuration file. PolicyError lists everything wrong with it."""
    try:
        with path.open("rb") as stream:
            data = stream.read(tree.MAX_BYTES + 1)
    except OSError as error:
        text = error.strerror or str(error)
        raise PolicyError([Problem(str(path), 0, "", text, f"see {MANUAL} for an example")]) from error
    return parse(data, source=str(path))


def parse(data: bytes, *, source: str) -> BrokerConfig:
    """PolicyError with every problem; what is told holds no piece of a secret that stands in the file."""
    found = tree.read(data, source=source)
    secrets = plain_secrets.find(data, found)
    for secret in secrets.found:
        found.problems.append(
            Problem(source, secret.line, tree.spelt(secret.path), f"{secret.what} stands here in clear",
                    "write secret://env/NAME or secret://file/ABSOLUTE/PATH, and replace the key")
        )  # fmt: skip
    config = _Document(found).read() if found.readable else BrokerConfig()
    if found.problems:
        hide = secrets.hide
        raise PolicyError([
            replace(one, text=hide(one.text), where=hide(one.where), remedy=hide(one.remedy))
            for one in dict.fromkeys(found.problems)
        ])  # fmt: skip
    return config


class _Document(Reader):
    def __init__(self, found: tree.Tree) -> None:
        super().__init__(found, {})

    def read(self) -> BrokerConfig:
        root = self.tree.value
        if root is None:
            root = {}
        if not isinstance(root, dict):
            self.wrong((), "the file is not a mapping", f"see {MANUAL}")
            return BrokerConfig()
        head = self.part(_RootPart, root, ()) or _RootPart()
        scratch = (
            self._section(_ScratchPart, root, "scratch") if isinstance(root.get("scratch"), dict) else None
        )
        limits = self._section(_ServiceLimitsPart, root, "limits")
        config = BrokerConfig(
            listen=head.listen,
            tls=self._tls(root, head.listen),
            store=head.store,
            run_dir=head.run_dir,
            issuers=self._issuers(root),
            levels=head.levels,
            workspaces=self._workspaces(root),
            limits=ServiceLimits(**limits.model_dump()) if limits else ServiceLimits(),
            scratch=scratch.directory if scratch else "private",
            scratch_encrypted=scratch.encrypted if scratch else False,
            keep=head.keep,
            preflight=head.preflight,
        )
        self._compare(config, root)
        return config

    def _section(self, model: type[P], root: dict[str, Any], key: str) -> P | None:
        return self.part(model, root[key], (key,)) if key in root else None

    def _tls(self, root: dict[str, Any], listen: Listen) -> Tls | None:
        part = self._section(_TlsPart, root, "tls")
        if listen.path and "tls" in root:
            self.wrong(("tls",), "a Unix socket is not spoken to by TLS", "remove it, or listen at https://")
        if not listen.path and "tls" not in root:
            self.wrong(("listen",), "this needs a certificate", "add tls: {certificate, key, client_ca}")
        if part and seen_anyway(part.key):
            # commands have this account's number, and may read what it may
            self.wrong(("tls", "key"), "every sandbox sees this file", "put it in /etc/egressd")
        return Tls(part.certificate, part.key, part.client_ca) if part else None

    def _issuers(self, root: dict[str, Any]) -> tuple[issuers.Issuer, ...]:
        found, problems = issuers.parse(root.get("issuers"), self.tree)
        self.tree.problems += [problem for problem in problems if not self.tree.is_unclear(("issuers",))]
        return found

    def _workspaces(self, root: dict[str, Any]) -> dict[str, WorkspaceConfig]:
        section = self._mapping(root.get("workspaces", {}), ("workspaces",), _MAX_WORKSPACES)
        found = {}
        for name, entry in section.items():
            try:
                found[values.workspace(name)] = self._workspace(entry, ("workspaces", name))
            except Unfit as error:
                self.wrong(("workspaces", name), error.text, error.remedy)
        return found

    def _workspace(self, entry: object, path: tree.Path) -> WorkspaceConfig:
        entry = {} if entry is None else entry  # offered to readers' own commands, or to nobody yet
        part = self.part(_WorkspacePart, entry, path)
        if not isinstance(entry, dict):
            return WorkspaceConfig()
        below = (*path, "inferences")
        named = self._mapping(entry.get("inferences", {}), below, _MAX_INFERENCES)
        inferences = {name: self._inference(one, (*below, name)) for name, one in named.items()}
        for name in named:
            if not _NAME.fullmatch(name):
                self.wrong((*below, name), f"{values.shown(name)} is not a name", values.LABELS)
        limits = self._limits(entry, path)
        if part is None:
            return WorkspaceConfig()
        return WorkspaceConfig(inferences, part.commands, limits, part.network)

    def _inference(self, entry: object, path: tree.Path) -> Inference:
        part = self.part(_InferencePart, entry, path)
        limits = self._limits(entry, path) if isinstance(entry, dict) else BOUNDED
        if part is None:
            return Inference(())
        return Inference(part.command, tuple(part.bind_ro), part.environment, part.network, limits)

    def _limits(self, entry: dict[str, Any], path: tree.Path) -> Limits:
        part = self.part(_LimitsPart, entry["limits"], (*path, "limits")) if "limits" in entry else None
        return part.limits() if part else BOUNDED

    def _mapping(self, value: object, path: tree.Path, most: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.not_a(path, value, "a mapping: {NAME: {...}}", empty="remove the line")
            return {}
        return {} if self.too_long(value, path, most) else value

    def _compare(self, config: BrokerConfig, root: dict[str, Any]) -> None:
        """What no section shows alone."""
        if config.scratch != "private" and config.scratch.startswith(config.run_dir.rstrip("/") + "/"):
            self.wrong(("scratch",), "egressd's own directory is no place for copies", "name another one")
