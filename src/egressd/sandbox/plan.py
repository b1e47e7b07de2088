"""PURE: what a sandbox is to look like, and the bubblewrap arguments that make it so.

Facts about the machine (`Machine`) and the wish (`SandboxSpec`) go in; `Plan` comes out: a list of
operations that can be printed, compared and run. Nothing here opens a file.

The order of operations matters to bubblewrap, which carries them out one after the other: /etc is bound
before files in it are covered, /run is made before directories in it, and what is read-only at the end
(the root, /dev) is sealed last.

The command never starts by itself. bubblewrap runs a *gate*, a line of shell that says on descriptor 7 that
it waits, waits on 8 for the word "go", and takes end of file for death: a broker that is killed at any moment
leaves a closed pipe, and a closed pipe leaves no command. (bwrap's own --block-fd takes end of file for
permission.)
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "ABOVE", "DATA_FILES", "GATE", "Bind", "Limits", "Machine", "Overlay", "Plan", "SandboxSpec", "describe",
    "plan",
]  # fmt: skip

USAGE = 3  # where a command that is asked to reports what it used; open only then
READY, GATE = 7, 8  # the gate's descriptors: sh of dash has single digits only
SECCOMP, STATUS = 9, 10
_FIRST_DATA = 11
_BLOCK = 512  # bytes; the unit of ulimit -f (POSIX), in dash, busybox, and bash when it is called sh
ABOVE = 64  # no descriptor has its place from here on
WORK = "/work"
TOOLS = "/opt/egressd"
PATH = "/usr/local/bin:/usr/bin:/bin"
FAILED = 125  # as env(1), timeout(1) and chroot(1): the launcher itself failed

# What a sandbox knows of names. No search list and ndots:1: "ollama" is asked for as it stands.
RESOLV_CONF = "nameserver 169.254.53.53\nnameserver fd53:53::53\noptions ndots:1 timeout:1 attempts:5\n"
NSSWITCH_CONF = (
    "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
    "networks: files\nprotocols: files\nservices: files\nethers: files\nrpc: files\n"
)
HOSTS = "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback\n"
DATA_FILES: Mapping[str, str] = {
    "/etc/resolv.conf": RESOLV_CONF,
    "/etc/nsswitch.conf": NSSWITCH_CONF,
    "/etc/hosts": HOSTS,
}
_SYSTEM = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")  # beside /usr, where not merged into it


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory of the caller's, read-only, at `target`."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Overlay:
    """Where one of `DATA_FILES` really lies, symbolic links followed: there our text is bound.

    `links` are the links that were followed outside /etc and /usr, as (path, target): they have to be made
    again inside, or /etc/resolv.conf -> /var/run/... would lead nowhere.
    """

    name: str
    resolved: str
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan must know of the machine: see files.machine()."""

    roots: Mapping[str, str | None]  # "lib" -> "usr/lib" for a link, None for a directory; absent: absent
    overlays: tuple[Overlay, ...]
    hidden: tuple[str, ...] = ()  # directories below /etc that a sandbox must not see


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds set in the gate with ulimit; None leaves the caller's own."""

    memory: int | None = None  # bytes of private writable memory, per process (RLIMIT_DATA)
    processes: int | None = None  # in the sandbox's own user namespace (RLIMIT_NPROC, Linux 5.14)
    cpu: float | None = None  # seconds, per process (RLIMIT_CPU)
    file_size: int | None = None  # bytes of each file that is written (RLIMIT_FSIZE)
    descriptors: int | None = None  # open ones, per process (RLIMIT_NOFILE)


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    command: tuple[str, ...]
    files: str | None = None  # shown at /work
    tools: str | None = None  # shown at /opt/egressd
    binds: tuple[Bind, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    # More of it, which may hold keys: everybody on the machine can read a command line (proc(5), cmdline).
    unseen: Mapping[str, str] = field(default_factory=dict)
    terminal: bool = False  # stay in the caller's session, so that job control works
    default_signals: tuple[str, ...] = ()  # names without SIG, to be restored before the command
    limits: Limits = Limits()
    shared_memory: int | None = None  # bytes for each of /tmp, /run and /dev/shm
    preflight: tuple[str, ...] = ()  # a command that must succeed first, see egressd.selftest


@dataclass(frozen=True, slots=True)
class Plan:
    """bubblewrap's arguments, and which text each data descriptor must hold."""

    arguments: tuple[str, ...]
    data: tuple[tuple[int, str], ...]  # (descriptor number in bwrap, text)


def plan(spec: SandboxSpec, machine: Machine) -> Plan:
    """The whole command line, beginning with "bwrap"."""
    data = [(_FIRST_DATA + i, DATA_FILES[o.name]) for i, o in enumerate(machine.overlays)]
    unseen: list[str] = []
    if spec.unseen:
        number = _FIRST_DATA + len(data)
        unseen = ["--args", str(number)]
        data.append((number, "".join(f"{word}\0" for word in _variables(spec.unseen))))
    arguments = [
        "bwrap",
        *_namespaces(terminal=spec.terminal),
        *_system(machine),
        *_private(spec),
        *_overlays(machine.overlays),
        *_directories(spec),
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        "--clearenv",
        *_variables(spec.environment),
        *unseen,
        *("--seccomp", str(SECCOMP), "--json-status-fd", str(STATUS)),
        "--",
        *_gate(spec),
    ]
    return Plan(tuple(arguments), tuple(data))


def _namespaces(*, terminal: bool) -> list[str]:
    """Without a new session on a terminal: seccomp refuses TIOCSTI, which is what it would be for."""
    session = [] if terminal else ["--new-session"]
    # For a caller who is uid 0 bubblewrap leaves every capability (in the sandbox's own user namespace): the
    # command could rename its device and lay rules of its own.
    return [
        "--unshare-all", "--hostname", "sandbox", "--die-with-parent", "--cap-drop", "ALL", *session,
    ]  # fmt: skip


def _system(machine: Machine) -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM:
        if name not in machine.roots:
            continue
        target = machine.roots[name]
        if target is None:
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        else:
            arguments += ["--symlink", target, f"/{name}"]
    arguments += ["--ro-bind", "/etc", "/etc"]
    for path in machine.hidden:
        arguments += ["--tmpfs", path, "--remount-ro", path]
    return arguments


def _private(spec: SandboxSpec) -> list[str]:
    """Nothing of the machine's /run and /tmp: no resolver, D-Bus, nscd or agent socket."""
    size = [] if spec.shared_memory is None else ["--size", str(spec.shared_memory)]
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    for path, mode in (("/dev/shm", "1777"), ("/tmp", "1777"), ("/run", "0755")):  # noqa: S108
        arguments += [*size, "--perms", mode, "--tmpfs", path]
    return arguments


def _overlays(overlays: Iterable[Overlay]) -> list[str]:
    arguments = []
    made: set[str] = set()
    for number, overlay in enumerate(overlays, _FIRST_DATA):
        for path, target in overlay.links:
            if path not in made:
                made.add(path)
                arguments += ["--symlink", target, path]
        arguments += ["--perms", "0444", "--ro-bind-data", str(number), overlay.resolved]
    return arguments


def _directories(spec: SandboxSpec) -> list[str]:
    arguments = []
    for bind in spec.binds:
        arguments += ["--ro-bind", bind.source, bind.target]
    if spec.tools is not None:
        arguments += ["--ro-bind", spec.tools, TOOLS]
    if spec.files is not None:
        arguments += ["--ro-bind", spec.files, WORK]
    return [*arguments, "--chdir", "/tmp" if spec.files is None else WORK]  # noqa: S108


def _variables(environment: Mapping[str, str]) -> list[str]:
    arguments = []
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    return arguments


def _gate(spec: SandboxSpec) -> list[str]:
    """`"$0"` is egressctl, so that "not found" is reported in that name."""
    restore = []
    if spec.default_signals:
        # bwrap was started ignoring them, and a shell cannot un-ignore what it inherited (POSIX sh, trap)
        restore = ["env", f"--default-signal={','.join(spec.default_signals)}"]
    return ["sh", "-c", _gate_script(spec.limits, spec.preflight), "egressctl", *restore, *spec.command]


def _gate_script(limits: Limits, preflight: tuple[str, ...] = ()) -> str:
    lines = [
        f"echo >&{READY}; exec {READY}>&-",
        f'IFS= read -r g <&{GATE} && [ "$g" = go ] || exit {FAILED}',
        f"exec {GATE}<&-",
        "ulimit -c 0",
    ]
    if preflight:
        # Where the command will be, under the same filter; it reads and writes nothing of the command's.
        lines.append(f"{shlex.join(preflight)} </dev/null >&2 || exit {FAILED}")
    if limits.memory is not None:
        lines.append(f"ulimit -d {max(1, limits.memory // 1024)} || exit {FAILED}")
    if limits.processes is not None:
        # bash and ksh say -u, dash and busybox -p
        bound = limits.processes
        lines.append(f"ulimit -u {bound} 2>/dev/null || ulimit -p {bound} || exit {FAILED}")
    if limits.cpu is not None:
        # SIGXCPU at the soft limit, SIGKILL a second later. The soft one first: it is never above the hard.
        soft = math.ceil(limits.cpu)
        lines.append(f"ulimit -S -t {soft} && ulimit -H -t {soft + 1} || exit {FAILED}")
    if limits.file_size is not None:
        lines.append(f"ulimit -f {limits.file_size // _BLOCK} || exit {FAILED}")
    if limits.descriptors is not None:
        lines.append(f"ulimit -n {limits.descriptors} || exit {FAILED}")
    return "; ".join([*lines, 'exec "$@"'])


def environment(
    *,
    terminal: str | None = None,
    ollama_port: int | None = None,
    usage: bool = False,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The whole environment of a command; nothing of the caller's is passed on. ValueError for a name or
    value that cannot be one."""
    found = {"PATH": PATH, "HOME": "/tmp", "LANG": "C.UTF-8"}  # noqa: S108
    if terminal:
        found["TERM"] = terminal
    if ollama_port is not None:
        found["OLLAMA_HOST"] = f"http://127.0.0.1:{ollama_port}"
    if usage:
        found["EGRESSD_USAGE_FD"] = str(USAGE)
    for name, value in (extra or {}).items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
        found[name] = value
    return found


def describe(made: Plan) -> str:
    """A line for a shell that builds the same sandbox by hand, without egressd and thus without a network.

    The gate is opened, the filter left out, the texts come from here-documents; what may hold keys does not.
    """
    arguments = list(made.arguments)
    for option in ("--seccomp", "--json-status-fd", "--args"):
        if option in arguments[: arguments.index("--")]:
            at = arguments.index(option)
            del arguments[at : at + 2]
    texts = [(number, text) for number, text in made.data if "\0" not in text]
    documents = [f"{number}<<'EOF{number}'" for number, _ in texts]
    bodies = "".join(f"{text}EOF{number}\n" for number, text in texts)
    line = " ".join([shlex.join(arguments), f"{READY}>/dev/null {GATE}<<<go", *documents])
    return f"{line}\n{bodies}"
