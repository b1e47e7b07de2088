"""examiner: looks at this machine for `egressctl doctor`, and ends. It changes nothing.

    python -m egressd.processes.examiner --config FILE --run-dir DIR

It writes one document (diagnosis.facts.Facts) to standard output. It runs as whoever asks: what takes rights
that they do not have is left out, which the facts say. What it tries, it tries in namespaces that end with
it; as root, what callers need is tried as `nobody`, who has as few rights as they have.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

import msgspec

from egressd.diagnosis import firewall, reading
from egressd.diagnosis.facts import (
    Account,
    Clock,
    Daemon,
    Facts,
    Feature,
    Network,
    Obstacle,
    Place,
    Software,
    Spawning,
    Trial,
    Uplink,
)
from egressd.diagnosis.findings import SYSCTLS
from egressd.dns.exchange import Server
from egressd.ipc.channel import peer_credentials
from egressd.kernel import netlink, probe, sysctl
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.routing import MAIN, PROTOCOL, Device, Route, Tables
from egressd.model import tree
from egressd.model.errors import EgressdError
from egressd.processes.config import Config
from egressd.processes.config_file import load
from egressd.ruleset import layout
from egressd.sandbox import limits, queueing, seccomp
from egressd.sandbox.control import Control

__all__ = ["examine", "main"]

_NOBODY = 65534
_BWRAP = ("/usr/bin/bwrap", "/usr/local/bin/bwrap", "/bin/bwrap")  # as sandbox.launch looks for it
_BROKER_CONFIG = Path("/etc/egressd/broker.yaml")
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000  # linux/sched.h
_TIME_ERROR = 5  # linux/timex.h: the clock is not synchronised
_TIMEX_BYTES = 512  # more than struct timex has; its first word says what to change: nothing
_PATIENCE = 20.0  # seconds for each program that is run


def examine(config_file: Path, run_dir: str | None) -> Facts:
    """`run_dir` None: the configuration's."""
    config, loaded = _config(config_file)
    run_dir = run_dir or config.run_dir
    supervisor = _supervisor(config, run_dir)
    return Facts(
        uid=os.getuid(),
        software=_software(),
        spawning=_spawning(),
        daemon=_daemon(config, loaded, config_file, run_dir),
        network=_network(config),
        clock=_clock(config, supervisor),
        sysctls={key: value for key in SYSCTLS if (value := _setting(key)) is not None},
        descriptors=_descriptors(supervisor),
    )


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def _setting(key: str) -> str | None:
    try:
        return sysctl.read(key)
    except OSError:
        return None


def _tried(trial: Callable[[], object]) -> Trial:
    """PermissionError: it could not be tried. Whatever else goes wrong is an answer."""
    try:
        said = trial()
    except PermissionError:
        return Trial(None)
    except (EgressdError, OSError, ValueError, ImportError, AttributeError) as error:
        return Trial(False, str(error)[:512])
    return Trial(True, said if isinstance(said, str) else "")


# ---- software


def _software() -> Software:
    return Software(
        os=reading.pretty_name(_text("/etc/os-release") or ""),
        kernel=platform.release(),
        features=_features(),
        nftables=_tried(_nftables),
        systemd=_tried(_systemd),
        seccomp=_tried(lambda: f"{len(seccomp.program()) // 8} instructions"),
        by_systemd=Path("/run/systemd/system").is_dir(),  # sd_booted(3)
    )


def _nftables() -> str:
    import nftables  # noqa: PLC0415 - whether it can be imported is the question

    nftables.Nftables()
    done = subprocess.run(
        ["/usr/sbin/nft", "--version"], capture_output=True, text=True, check=False, timeout=_PATIENCE
    )
    return done.stdout.strip()[:64]


def _systemd() -> None:
    from systemd import daemon  # noqa: PLC0415

    daemon.notify("")  # to nobody: without NOTIFY_SOCKET it does nothing


def _features() -> tuple[Feature, ...] | None:
    """As an ordinary user, in a user namespace of one's own: there a yes counts, and a no may only mean that
    such namespaces are not shown everything."""
    if os.geteuid() == 0:
        with contextlib.suppress(EgressdError, OSError):
            return tuple(_feature(answer) for answer in probe.answers())
        return None
    told = _apart(lambda: msgspec.json.encode([_feature(answer) for answer in probe.answers()]))
    if told is None:
        return None
    found = msgspec.json.decode(told, type=tuple[Feature, ...])
    return tuple(
        feature
        if feature.there
        else msgspec.structs.replace(feature, there=None, said="not in a user namespace; needs root")
        for feature in found
    )


def _feature(answer: probe.Answer) -> Feature:
    return Feature(
        need=answer.need, how=answer.how, there=answer.there, remedy=answer.remedy, said=answer.said[:512]
    )


def _apart(trial: Callable[[], bytes]) -> bytes | None:
    """What `trial` returns in a process of its own, with every right over namespaces that end with it. None
    where such are not to be had. What it raises is told as an empty answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(reader)
            if ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
                status = 2
                os.write(writer, trial())
                status = 0
        os._exit(status)
    os.close(writer)
    with open(reader, "rb") as stream:  # noqa: PTH123 - a descriptor
        told = stream.read()
    _, status = os.waitpid(child, 0)
    return None if os.waitstatus_to_exitcode(status) == 1 else told


# ---- callers


def _spawning() -> Spawning:
    path = next((path for path in _BWRAP if os.access(path, os.X_OK)), None)
    uid = os.getuid() or _NOBODY
    return Spawning(
        uid=uid,
        bwrap=path,
        version=_output([path, "--version"]) if path else "",
        setuid=bool(path and Path(path).stat().st_mode & stat.S_ISUID),
        namespaces=_sandboxed(path),
        proc=_sandboxed(path, "--proc", "/proc"),
        queue=_queue(),
        cgroup=_cgroup(),
        cgroup2=limits.own_group() is not None,
        profiled=_profiled(),
    )


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout[:256]


def _sandboxed(bwrap: str | None, *options: str) -> Trial:
    """bubblewrap, with every namespace that a sandbox has, running something that does nothing."""
    if bwrap is None:
        return Trial(None, "there is no bubblewrap")
    command = [
        bwrap,
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        *options,
        "--",
        "/usr/bin/true",
    ]
    as_whom = {"user": _NOBODY, "group": _NOBODY, "extra_groups": ()} if os.geteuid() == 0 else {}
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
            cwd="/",
            env={},
            **as_whom,
        )
    except subprocess.TimeoutExpired:
        return Trial(False, f"no end after {_PATIENCE:g} s")
    except (OSError, subprocess.SubprocessError) as error:
        return Trial(None, str(error)[:256])
    return Trial(done.returncode == 0, done.stderr.strip()[-256:])


def _queue() -> Trial:
    told = _apart(_bind_queue)
    if told is None:
        return Trial(None, "no user namespace to try it in")
    return Trial(told == b"bound", "")


def _bind_queue() -> bytes:
    for number in queueing.open_sockets([]):
        os.close(number)
    return b"bound"


def _cgroup() -> Trial:
    """As limits.Group.make looks, but nothing is made."""
    own = limits.own_group()
    if own is None:
        return Trial(False)
    wanted = {"memory", "pids"}
    parent = Path(own).parent
    beside = wanted <= set((_text(parent / "cgroup.subtree_control") or "").split())
    below = wanted <= set((_text(Path(own, "cgroup.controllers")) or "").split())
    if beside and os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK):
        return Trial(True, f"beside {own}")
    if below and own != "/" and os.access(Path(own, "cgroup.subtree_control"), os.W_OK):
        return Trial(True, f"below {own}, for a program that is alone in it")
    return Trial(False)


def _profiled() -> bool | None:
    profiles = _text("/sys/kernel/security/apparmor/profiles")
    if profiles is None:
        return None
    return any(Path(line.partition(" (")[0]).name.startswith("bwrap") for line in profiles.splitlines())


# ---- the daemon


def _config(path: Path) -> tuple[Config, Trial]:
    """Its defaults stand for one that cannot be used."""
    try:
        if path.exists() and not os.access(path, os.R_OK):
            return Config(), Trial(None)
        return load(path), Trial(True)
    except (EgressdError, OSError, ValueError) as error:
        return Config(), Trial(False, str(error)[:512])


def _daemon(config: Config, loaded: Trial, path: Path, run_dir: str) -> Daemon:
    control, broken = _asked(run_dir)
    return Daemon(
        config=loaded,
        config_file=str(path),
        accounts=_accounts(config),
        places=tuple(_places(config, path)),
        control=control,
        broken=broken,
        local_only=_local_only(Path(config.workspaces_dir)),
        upstreams=tuple(str(Server.parse(text).address) for text in config.upstream),
        broker=_broker(),
        broker_account=bool(config.broker_uids()),
    )


def _accounts(config: Config) -> Trial:
    try:
        found = config.accounts()
    except KeyError as error:
        return Trial(False, str(error.args[0])[:256])
    return Trial(True, f"{len(found)} of them")


def _asked(run_dir: str) -> tuple[Trial, tuple[str, ...]]:
    try:
        with Control(run_dir) as control:
            document = control.ask("status")
        broken = tuple(str(w["workspace"]) for w in document["workspaces"] if w["problem"])
        enforcing = bool(document["enforcing"])
    except (EgressdError, OSError, ValueError) as error:
        return Trial(False, str(error)[:256]), ()
    except (LookupError, TypeError) as error:
        return Trial(False, f"it answers what nobody understands: {error!r}"[:256]), ()
    return Trial(enforcing, "" if enforcing else "it does not enforce"), broken


def _places(config: Config, path: Path) -> Iterator[Place]:
    accounts: dict[str, Account] = {}
    with contextlib.suppress(KeyError):
        accounts = {role: Account(uid=a.uid, gid=a.gid) for role, a in config.accounts().items()}
    audit = accounts.get("audit")
    owner = None if audit is None else audit.uid
    state = Path(config.state_dir)
    if path.exists():  # else that is what was said already
        yield _place(path, "the configuration", owner=0)
    yield _place(Path(config.workspaces_dir), "policies", reader=accounts.get("daemon"))
    yield _place(Path(config.run_dir), "sockets", made=True)
    yield _place(state, "what outlives a restart", made=True)
    yield _place(state / "journal", "the journal", owner=owner, forbidden=0o027, made=True)
    yield _place(state / "keys", "its keys", owner=owner, forbidden=0o077, made=True)
    yield _place(state / "keys" / "journal.key", "the signing key", owner=owner, forbidden=0o077, made=True)


def _place(
    path: Path,
    what: str,
    *,
    owner: int | None = None,
    forbidden: int = 0o022,
    reader: Account | None = None,
    made: bool = False,
) -> Place:
    def place(present: bool | None, mode: int = 0, uid: int = 0, gid: int = 0) -> Place:
        return Place(
            path=str(path), what=what, present=present, mode=mode, uid=uid, gid=gid,
            owner=owner, forbidden=forbidden, reader=reader, made=made,
        )  # fmt: skip

    try:
        status = path.stat()
    except FileNotFoundError:
        return place(False)
    except OSError:
        return place(None)
    return place(True, stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid)


def _local_only(directory: Path) -> bool | None:
    """Whether every workspace is; None where that cannot be read, or there is none."""
    found = []
    try:
        for path in sorted(directory.glob("*.yaml")):
            with path.open("rb") as stream:
                value = tree.read(stream.read(tree.MAX_BYTES + 1), source=path.name).value
            found.append(isinstance(value, dict) and value.get("local_only") is True)
    except OSError:
        return None
    return all(found) if found else None


def _broker() -> Trial | None:
    if not _BROKER_CONFIG.exists():
        return None
    if not os.access(_BROKER_CONFIG, os.R_OK):
        return Trial(None)
    program = Path(sys.executable).with_name("egressd-broker")
    try:
        done = subprocess.run(
            [program, "--check"], capture_output=True, text=True, check=False, timeout=_PATIENCE
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Trial(None, str(error)[:256])
    return Trial(done.returncode == 0, done.stderr.strip()[:512])


def _supervisor(config: Config, run_dir: str) -> tuple[int, float] | None:
    """The running daemon's process, which listens at the control socket (SO_PEERCRED, unix(7)), and when it
    took its lock (Unix time). supervisor.alone"""
    lock = Path("/run/egressd", f"{config.gateway}.lock")
    try:
        with Control(run_dir) as control:
            pid = peer_credentials(control.channel.socket).pid
        taken = lock.stat().st_mtime
    except (EgressdError, OSError):
        return None
    return (pid, taken) if "egressd" in (_text(f"/proc/{pid}/cmdline") or "") else None


def _descriptors(supervisor: tuple[int, float] | None) -> int | None:
    if supervisor is None:
        return None
    return reading.limit_of(_text(f"/proc/{supervisor[0]}/limits") or "", "Max open files")


# ---- time


def _clock(config: Config, supervisor: tuple[int, float] | None) -> Clock:
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = max(
            (path.stat().st_mtime for path in Path(config.state_dir, "journal").iterdir()), default=0.0
        )
    return Clock(
        synchronised=_synchronised(),
        stepped=_stepped(supervisor),
        ahead=round(max(0.0, newest - time.time()), 3),
    )


def _synchronised() -> bool | None:
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else bool(state != _TIME_ERROR)


def _stepped(found: tuple[int, float] | None) -> float | None:
    """The daemon wrote its lock when it began. What the wall clock says now of that moment, counted back over
    the time since boot (which no setting of the clock changes), differs by how much the clock was set."""
    line = "" if found is None else _text(f"/proc/{found[0]}/stat") or ""
    words = line.rpartition(")")[2].split()
    ticks = reading.number(words[19]) if len(words) > 19 else None  # starttime, field 22 of proc(5)
    if found is None or ticks is None:
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(time.time() - age - found[1], 1)


# ---- the network


def _network(config: Config) -> Network:
    route = Netlink(netlink.ROUTE)
    try:
        tables = Tables(route)
        devices = tables.devices()
        names = {device.index: device.name for device in devices.values()}
        routes = [one for one in tables.routes(names) if one.table == MAIN]
        addresses = tables.addresses(names)
        defaults = [name for name in tables.default_devices(names) if name != layout.HOST_LINK]
    finally:
        route.close()
    uplinks = config.uplinks or tuple(defaults)
    ruled, obstacles = _ruled(uplinks)
    out = {one.network.version for one in routes if one.network.prefixlen == 0 and one.kind == "unicast"}
    used = [f"the route {one.network} on {one.device}" for one in routes if _theirs(one)]
    used_networks = [one.network for one in routes if _theirs(one)]
    for address in addresses:
        if address.device != layout.HOST_LINK:
            used.append(f"the address {address.address}/{address.prefix} of {address.device}")
            used_networks.append(ip_network((address.address, address.prefix), strict=False))
    pools = [ip_network(text) for text in msgspec.structs.astuple(config.pools)]
    return Network(
        link=layout.HOST_LINK in devices,
        host_table=ruled,
        uplinks=tuple(_uplink(name, devices) for name in uplinks),
        default4=4 in out,
        default6=6 in out,
        ipv6=Path("/proc/sys/net/ipv6").exists(),
        disabled6=_setting("net/ipv6/conf/all/disable_ipv6") == "1",
        obstacles=obstacles,
        legacy=tuple(_legacy()),
        overlaps=tuple(
            f"{pool} and {what}"
            for pool in pools
            for what, network in zip(used, used_networks, strict=True)
            if pool.version == network.version and pool.overlaps(network)
        ),
        nameservers=reading.nameservers(_text("/etc/resolv.conf") or ""),
        managers=tuple(_managers(devices.get(layout.HOST_LINK))),
    )


def _theirs(route: Route) -> bool:
    """Not a default route, nor one of ours."""
    ours = route.device == layout.HOST_LINK or (route.kind == "unreachable" and route.proto == PROTOCOL)
    return route.network.prefixlen > 0 and not ours


def _uplink(name: str, devices: dict[str, Device]) -> Uplink:
    forwards = _setting(f"net/ipv4/conf/{name}/forwarding")
    # Linux 6.17 has one switch for each device, before there was one for all
    six = _setting(f"net/ipv6/conf/{name}/force_forwarding") or _setting("net/ipv6/conf/all/forwarding")
    everywhere = _setting("net/ipv6/conf/all/forwarding")
    return Uplink(
        name=name,
        there=name in devices,
        forwards4=None if forwards is None else forwards == "1",
        forwards6=None if six is None else "1" in (six, everywhere),
        disabled6=_setting(f"net/ipv6/conf/{name}/disable_ipv6") == "1",
    )


def _ruled(uplinks: tuple[str, ...]) -> tuple[bool | None, tuple[Obstacle, ...] | None]:
    """Is egressd's table there, and what of other tables stands in the way?"""
    if os.geteuid() != 0:  # libnftables would complain on standard error
        return None, None
    try:
        listing = Nft().list_json()
    except (EgressdError, OSError, ValueError):
        return None, None
    tables = [row["table"] for row in listing["nftables"] if "table" in row]
    there = any((one["family"], one["name"]) == ("inet", layout.HOST_TABLE) for one in tables)
    found = firewall.obstacles(listing, link=layout.HOST_LINK, uplinks=uplinks, ours=layout.HOST_TABLE)
    return there, tuple(found)


def _legacy() -> Iterator[str]:
    for name in ("ip_tables_names", "ip6_tables_names"):
        if "filter" in (_text(f"/proc/net/{name}") or "").split():
            yield name.replace("_names", " filter")


def _managers(device: Device | None) -> Iterator[str]:
    if device is None:
        return
    state = _text(f"/run/NetworkManager/devices/{device.index}")
    if state is not None and reading.section_value(state, "managed") in ("true", "1"):
        yield "NetworkManager"
    state = _text(f"/run/systemd/netif/links/{device.index}")
    if state is not None and reading.section_value(state, "ADMIN_STATE") in ("configured", "configuring"):
        yield "systemd-networkd"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="egressd-examiner")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir")
    options = parser.parse_args(arguments)
    sys.stdout.buffer.write(msgspec.json.encode(examine(options.config, options.run_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
