"""foundation: lays what the others stand on, as root, and ends before the first stranger's byte arrives.

    python -m egressd.processes.foundation --config-json '{...}' [--fd reply=N] [--mend | --dismantle]

It makes or adopts the pinned gateway, puts every table of kernel/gateway.py in force, and opens the sockets
that live in the gateway. With `--fd reply=N` (a SOCK_SEQPACKET socket) it hands these over as one message:
{"names": [...], "kept": [...]}, beside it the descriptors in the order of the names, "gateway" being the
namespace itself; without, it opens none. `--held NAME=N` is a socket that outlived the daemon: used again
and among the "kept" if it is the right one. `--foundation` (the default) may be said again at any time: what
is in order is left alone.

A gateway that is ours and sound (adopting.py) is adopted: links, tables, counters and connections stay, for
the warden to compare with the policy. Any other begins anew, and each link that goes is kept for the record.
What it changed of the host's own settings is remembered in state_dir/foundation.json, and `--dismantle` puts
it back.

Order: the second key first (rules that prohibit), then forwarding; links go before their chains.
"""

from __future__ import annotations

import argparse
import array
import datetime
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from egressd.ipc import journald
from egressd.kernel import gateway, namespaces, netlink, routing, sockets, sysctl
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.gateway import GATEWAY_SETTINGS, UPLINK_SETTINGS
from egressd.kernel.links import Links
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.orphans import Orphans
from egressd.kernel.probe import probe
from egressd.kernel.routing import Tables
from egressd.model.errors import EgressdError, KernelError
from egressd.model.identities import Link
from egressd.processes import adopting, hostside, unrecorded
from egressd.processes.adopting import Gateway
from egressd.processes.config import Config
from egressd.processes.left_behind import clear, taken_back
from egressd.processes.unrecorded import Happening, Plain
from egressd.ruleset import build, layout
from egressd.ruleset.layout import Pools
from egressd.ruleset.objects import FAMILIES
from egressd.ruleset.observe import Observed

__all__ = ["FoundationConfig", "FoundationResult", "dismantle", "main", "setup"]

log = logging.getLogger("egressd")

_STATE = "foundation.json"
_NO_LOGIN = 0xFFFF_FFFF  # loginuid of what no login has started


@dataclass(frozen=True, slots=True)
class FoundationConfig:
    """What the foundation depends on. `uplinks` empty: the devices of the host's default routes."""

    gateway: str = layout.GATEWAY
    pools: Pools = field(default_factory=Pools)
    uplinks: tuple[str, ...] = ()
    state_dir: Path = Path("/var/lib/egressd")
    run_dir: Path = Path("/run/egressd")
    pins: str = "/run/netns"

    @classmethod
    def of(cls, config: Config) -> FoundationConfig:
        return cls(
            gateway=config.gateway,
            pools=config.pools.pools(),
            uplinks=config.uplinks,
            state_dir=Path(config.state_dir),
            run_dir=Path(config.run_dir),
        )


@dataclass(slots=True)
class FoundationResult:
    """`namespace` is a descriptor of the gateway; `sockets` live in it, some of them `kept` from before;
    `done` says what was needed."""

    namespace: int
    sockets: dict[str, socket.socket]
    done: list[str]
    kept: list[str]

    def close(self) -> None:
        os.close(self.namespace)
        for sock in self.sockets.values():
            sock.close()


def setup(
    config: FoundationConfig, *, held: Mapping[str, int] | None = None, open_sockets: bool = True
) -> FoundationResult:
    """Everything; KernelError, with what to do, if the kernel refuses any of it. No daemon may be running.
    `held`: descriptors by name, of sockets from before; these are closed, or in the result."""
    if not adopting.in_this_boot(config.run_dir):
        probe()  # takes as long as all the rest; where a gateway was made, the kernel was able to
    namespace, made = namespaces.pin(config.gateway, directory=config.pins)
    done = [f"pinned the gateway as {config.gateway}"] if made else []
    try:
        done += adopting.clean(config.run_dir, config.state_dir)
        done += _secure(namespace)
        done += _pair(namespace)
        done += _gateway(config, namespace)
        done += _host(config)
        with namespaces.inside(namespace):
            kept = _fitting(held or {})
            opened = kept | (sockets.open_all(but=kept) if open_sockets else {})
    except BaseException:
        os.close(namespace)
        raise
    return FoundationResult(namespace, opened, done, sorted(kept))


def _fitting(held: Mapping[str, int]) -> dict[str, socket.socket]:
    """Those that are what they are said to be. The others are closed."""
    found = {}
    for name, number in held.items():
        sock = socket.socket(fileno=number)
        why = sockets.misfit(name, sock)
        if why:
            log.warning("the socket %s that was kept cannot be used: %s", name, why)
            sock.close()
        else:
            sockets.refresh(name, sock)
            found[name] = sock
    return found


def mend(config: FoundationConfig) -> list[str]:
    """Put the host's side and the gateway's tables in order while the daemon runs: links, ruleset and
    sockets are left to it. KernelError if there is no gateway."""
    # Never made here, not for a moment: a start beside us would take it for its own.
    if not Path(config.pins, config.gateway).exists():
        raise KernelError(f"there is no gateway {config.gateway!r}; start egressd")
    namespace, _ = namespaces.pin(config.gateway, directory=config.pins)
    try:
        return _secure(namespace) + _host(config) + _forget_orphans(namespace)
    finally:
        os.close(namespace)


def _forget_orphans(namespace: int) -> list[str]:
    """What the custodian was not told of, since there was none, or too much to tell. They hurt nobody at
    once: not worth a failure."""
    with namespaces.inside(namespace):
        inner = Netlink(netlink.NETFILTER)
    outer = Netlink(netlink.NETFILTER)
    try:
        count = Orphans(host=outer, gateway=inner).forget()
    except KernelError as error:
        log.warning("the host's connections cannot be compared with the gateway's: %s", error)
        return []
    finally:
        inner.close()
        outer.close()
    return [f"had the host forget {count} connections of sandboxes that have ended"] if count else []


@contextmanager
def _routing() -> Iterator[Netlink]:
    route = Netlink(netlink.ROUTE)
    try:
        yield route
    finally:
        route.close()


def _secure(namespace: int) -> list[str]:
    """The second key, before anything can be forwarded."""
    with namespaces.inside(namespace), _routing() as route:
        return gateway.run(route, gateway.rule_steps(Tables(route)))


def _pair(namespace: int) -> list[str]:
    """The veth pair between host and gateway."""
    with namespaces.inside(namespace), _routing() as route:
        inner = layout.UPLINK in Tables(route).devices()
        changed = [] if inner else list(sysctl.ensure(_before_links()))
    with _routing() as route:
        outer = layout.HOST_LINK in Tables(route).devices()
        if inner and outer:
            return []
        if inner or outer:
            raise KernelError(
                f"only one end of the pair {layout.HOST_LINK} and {layout.UPLINK} is where it belongs:"
                " another gateway is connected to this host; `egressd --dismantle` there, or"
                f" `ip link delete {layout.HOST_LINK}` if nothing uses it"
            )
        gateway.make_pair(route, namespace)
    return [f"made {layout.HOST_LINK} and {layout.UPLINK}", *(f"set {key}" for key in changed)]


def _before_links() -> list[sysctl.Setting]:
    """The defaults that a device takes over when it is born."""
    return [setting for setting in GATEWAY_SETTINGS if "/default/" in setting.key]


def _gateway(config: FoundationConfig, namespace: int) -> list[str]:
    now = Gateway.now(namespaces.identity(namespace), config.pools)
    with namespaces.inside(namespace), _routing() as route:
        nft, links = Nft(), Links(route, None, config.pools)
        found, why = _found(config, nft, now)
        if found is None:
            live = set[Link]()
            done = _anew(config, nft, links, route, why=why)
        else:
            live = adopting.guarded(found) & links.present().keys()
            done = _adopted(config, nft, found)
            log.info("gateway %s is adopted, with %d links", config.gateway, len(live))
        done += _settle(route, links, live)
    now.write(config.run_dir)
    return done


def _found(config: FoundationConfig, nft: Nft, now: Gateway) -> tuple[Observed | None, str]:
    """What is to be adopted, or None and why it cannot be."""
    try:
        found = adopting.standing(nft)
    except (KernelError, ValueError) as error:
        return None, f"its ruleset cannot be read: {str(error)[:512]}"
    why = adopting.doubt(config.run_dir, now) or adopting.asleep(found)
    return None if why else found, why


def _adopted(config: FoundationConfig, nft: Nft, found: Observed) -> list[str]:
    done = adopting.mend_base(nft, found, config.pools)
    return done + [f"set {key}" for key in sysctl.ensure((*GATEWAY_SETTINGS, *UPLINK_SETTINGS))]


def _anew(config: FoundationConfig, nft: Nft, links: Links, route: Netlink, *, why: str) -> list[str]:
    log.info("gateway %s begins anew: %s", config.gateway, why)
    names = _leave(config, list(links.present()), nft, why=f"begun anew: {why}")
    _record(config, [Happening("gateway-begun", {"why": why, "links": len(names)})])
    conntrack = Conntrack()
    try:
        route.run([routing.remove_link(name) for name in names])
        nft.run(_afresh(config.pools))  # also loads connection tracking, whose settings come next
        done = [f"set {key}" for key in sysctl.ensure((*GATEWAY_SETTINGS, *UPLINK_SETTINGS))]
        # entries made before the settings would neither count nor tell of their end
        conntrack.forget_all()
    finally:
        conntrack.close()
    return [*(f"removed stale {name}" for name in names), *done]


def _leave(config: FoundationConfig, links: list[Link], nft: Nft | None, *, why: str) -> list[str]:
    """The devices that are about to go. Those who had them are on record first; then nothing is remembered
    of what they had. A crash in between has them recorded twice."""
    adopting.disown(config.run_dir)
    _record(config, adopting.lost(config.run_dir, links, nft, why=why))
    adopting.empty(config.run_dir)
    return [link.device for link in links]


def _record(config: FoundationConfig, happenings: list[Happening]) -> None:
    """What denies comes first: a full disk keeps it from no start, as it does not stop the journal."""
    try:
        unrecorded.keep(config.state_dir, happenings)
    except OSError as error:
        log.error("what happened cannot be kept for the record: %s", error.strerror)  # noqa: TRY400
        for happening in happenings:
            log.warning("%s %s", happening.event, json.dumps(happening.fields))


def _settle(route: Netlink, links: Links, live: Collection[Link]) -> list[str]:
    """Until nothing is missing. The kernel enters an IPv6 address into table local only when a worker has
    come to it (addrconf_dad_work), so what was just done may need a moment to show. A sandbox that ends
    takes its link along, also while we look."""
    done: list[str] = []
    for attempt in range(6):
        present = links.present().keys()
        try:
            steps = gateway.gateway_steps(route, links=links, live=live)
            if not steps:
                return done
            done += gateway.run(route, steps)
        except KernelError:
            if links.present().keys() == present:
                raise
        time.sleep(0.01 * 2**attempt)
    raise KernelError(f"the gateway does not keep what it is told: {steps[0].describe()}")


def _afresh(pools: Pools) -> list[str]:
    """Both tables, empty of workspaces, in one transaction, whatever was there before."""
    gone = [f"{verb} table {family} {layout.TABLE}" for family in FAMILIES for verb in ("add", "delete")]
    return gone + build.base(pools)


# ---- the host's side


def _host(config: FoundationConfig) -> list[str]:
    with _routing() as route:
        uplinks = hostside.uplinks(route, config.uplinks)
        if not uplinks:
            log.warning(
                "the host has no default route: nothing will be forwarded until it has;"
                " set `uplinks` to name devices"
            )
        hostside.make_table(Nft(), config.pools)
        done, before = hostside.put_right(route, config.pools, uplinks)
    try:
        hostside.write_settings(config.state_dir / _STATE, before)
    except OSError as error:
        log.error("what the host's settings were cannot be kept: %s: %s", error.strerror, before)  # noqa: TRY400
    return done


# ---- the end


def dismantle(config: FoundationConfig) -> list[str]:
    """Remove everything; collects what failed and says all of it at the end (KernelError)."""
    done: list[str] = []
    failed: list[str] = []
    unrecorded.keep(config.state_dir, _on_record(config))
    for part in (_dismantle_gateway, _dismantle_host, _dismantle_settings):
        try:
            done += part(config)
        except (EgressdError, OSError) as error:
            failed.append(str(error))
    if failed:
        raise KernelError("not everything could be removed: " + "; ".join(failed))
    return done


def _on_record(config: FoundationConfig) -> list[Happening]:
    """Who opens up, if there is anything to open; no daemon runs that could write it down."""
    if not Path(config.pins, config.gateway).exists():
        return []
    fields: dict[str, Plain] = {"gateway": config.gateway, "uid": os.getuid(), "at": _now()}
    with suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
        fields |= {"login_uid": login} if login != _NO_LOGIN else {}
    sudo = os.environ.get("SUDO_UID", "")
    fields |= {"sudo_uid": int(sudo)} if re.fullmatch("[0-9]{1,10}", sudo) else {}
    return [Happening("gateway-dismantled", fields)]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _dismantle_gateway(config: FoundationConfig) -> list[str]:
    if not Path(config.pins, config.gateway).exists():
        adopting.empty(config.run_dir)
        return []
    namespace, _ = namespaces.pin(config.gateway, directory=config.pins)
    try:
        # The namespace lives on while a process is in it: take its devices and tables away by hand.
        with namespaces.inside(namespace), _routing() as route:
            nft = Nft()
            present = list(Links(route, None, config.pools).present())
            _leave(config, present, nft, why="the gateway was dismantled")
            names = [name for name in Tables(route).devices() if name != "lo"]
            route.run([routing.remove_link(name) for name in names])
            for family in FAMILIES:
                nft.run([f"add table {family} {layout.TABLE}", f"delete table {family} {layout.TABLE}"])
    finally:
        os.close(namespace)
    namespaces.unpin(config.gateway, directory=config.pins)
    return [*(f"removed {name}" for name in names), f"unpinned {config.gateway}"]


def _dismantle_host(config: FoundationConfig) -> list[str]:
    Nft().run([f"add table inet {layout.HOST_TABLE}", f"delete table inet {layout.HOST_TABLE}"])
    with _routing() as route:
        if layout.HOST_LINK in Tables(route).devices():
            route.run([routing.remove_link(layout.HOST_LINK)])
        route.run([network.remove({}) for network in gateway.backstops(config.pools)])
    return [f"removed table {layout.HOST_TABLE}", "removed the backstop routes"]


def _dismantle_settings(config: FoundationConfig) -> list[str]:
    # What the custodian changed later; where both have a value, ours was the first.
    custody, state = config.run_dir / hostside.CUSTODY, config.state_dir / _STATE
    settings = hostside.kept_settings(custody) | hostside.kept_settings(state)
    done, failed = [], []
    for key, value in settings.items():
        try:
            if sysctl.read(key) not in (None, value):
                sysctl.write(key, value)
                done.append(f"set {key} back to {value}")
        except (KernelError, OSError) as error:
            failed.append(str(error))
    with suppress(FileNotFoundError), taken_back(custody.parent) as place:
        clear(custody.name, below=place)
    if failed:
        raise KernelError("; ".join(failed))
    state.unlink(missing_ok=True)
    return done


# ---- the program


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="egressd-foundation")
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--fd", metavar="reply=N", type=_reply, default=None)
    parser.add_argument("--held", metavar="NAME=N", type=_held, action="append", default=[])
    parser.add_argument("--debug", action="store_true", help="log everything that is done")
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--foundation", action="store_true", help="make everything (the default)")
    verbs.add_argument("--mend", action="store_true", help="the host's side only, while egressd runs")
    verbs.add_argument("--dismantle", action="store_true", help="remove everything")
    return parser.parse_args(arguments)


def _reply(text: str) -> int:
    name, _, number = text.partition("=")
    if name != "reply":
        raise argparse.ArgumentTypeError("only reply=N is known")
    os.fstat(int(number))
    return int(number)


def _held(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in sockets.NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is no socket of the gateway")
    os.fstat(int(number))
    return name, int(number)


def _hand_over(number: int, result: FoundationResult) -> None:
    names = ["gateway", *result.sockets]
    descriptors = [result.namespace, *(sock.fileno() for sock in result.sockets.values())]
    with socket.socket(fileno=number) as reply:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        reply.sendmsg([json.dumps({"names": names, "kept": result.kept}).encode()], ancillary)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    level = logging.DEBUG if options.debug else logging.INFO
    journald.configure("foundation", long_lived=False, level=level)
    config = FoundationConfig.of(Config.decode(options.config_json))
    try:
        if options.dismantle:
            done = dismantle(config)
        elif options.mend:
            done = mend(config)
        else:
            # Without anybody to hand them to there is no need of any, and somebody may be keeping them.
            result = setup(config, held=dict(options.held), open_sockets=options.fd is not None)
            done = result.done
            if options.fd is not None:
                _hand_over(options.fd, result)
                with suppress(OSError):
                    os.nice(19)  # nobody waits for the rest, and two tables may have 262,144 entries each
                done += _forget_orphans(result.namespace)
            result.close()
    except (EgressdError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400
        return 1
    for line in done:
        log.debug("%s", line)
    what = "removed or put back" if options.dismantle else "made or put in order"
    log.info("gateway %s: %d things %s", config.gateway, len(done), what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
