"""foundation: lays what the others stand on, as root, and ends before the first stranger's byte arrives.

    python -m egressd.processes.foundation --config-json '{...}' [--fd reply=N] [--mend | --dismantle]

It makes or adopts the pinned gateway, clears away what a former life left there, puts every table of
kernel/gateway.py in force, and opens the sockets that live in the gateway. With `--fd reply=N` (a
SOCK_SEQPACKET socket) it hands these over as one message: a JSON list of names, beside it the descriptors
in the same order, "gateway" being the namespace itself. `--foundation` (the default) may be said again at
any time: what is in order is left alone. What it changed of the host's own settings is remembered in
state_dir/foundation.json, and `--dismantle` puts it back.

Order: the second key first (rules that prohibit), then forwarding; links go before their chains.
"""

from __future__ import annotations

import argparse
import array
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from egressd.kernel import gateway, namespaces, netlink, routing, sockets, sysctl
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.gateway import GATEWAY_SETTINGS, UPLINK_SETTINGS
from egressd.kernel.links import Links
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.probe import probe
from egressd.kernel.routing import Tables
from egressd.model.errors import EgressdError, KernelError
from egressd.processes.config import Config
from egressd.ruleset import build, layout
from egressd.ruleset.layout import Pools

__all__ = ["FoundationConfig", "FoundationResult", "dismantle", "main", "setup"]

log = logging.getLogger("egressd")

_STATE = "foundation.json"


@dataclass(frozen=True, slots=True)
class FoundationConfig:
    """What the foundation depends on. `uplinks` empty: the devices of the host's default routes."""

    gateway: str = layout.GATEWAY
    pools: Pools = field(default_factory=Pools)
    uplinks: tuple[str, ...] = ()
    state_dir: Path = Path("/var/lib/egressd")
    pins: str = "/run/netns"

    @classmethod
    def of(cls, config: Config) -> FoundationConfig:
        return cls(
            gateway=config.gateway,
            pools=config.pools.pools(),
            uplinks=config.uplinks,
            state_dir=Path(config.state_dir),
        )


@dataclass(slots=True)
class FoundationResult:
    """`namespace` is a descriptor of the gateway; `sockets` live in it; `done` says what was needed."""

    namespace: int
    sockets: dict[str, socket.socket]
    done: list[str]

    def close(self) -> None:
        os.close(self.namespace)
        for sock in self.sockets.values():
            sock.close()


def setup(config: FoundationConfig) -> FoundationResult:
    """Everything; KernelError, with what to do, if the kernel refuses any of it."""
    probe()
    namespace, made = namespaces.pin(config.gateway, directory=config.pins)
    done = [f"pinned the gateway as {config.gateway}"] if made else []
    try:
        done += _secure(namespace)
        done += _pair(namespace)
        done += _gateway(config, namespace)
        done += _host(config)
        with namespaces.inside(namespace):
            opened = sockets.open_all()
    except BaseException:
        os.close(namespace)
        raise
    return FoundationResult(namespace, opened, done)


def mend(config: FoundationConfig) -> list[str]:
    """Put the host's side and the gateway's tables in order while the daemon runs: links, ruleset and
    sockets are left to it. KernelError if there is no gateway."""
    namespace, made = namespaces.pin(config.gateway, directory=config.pins)
    try:
        if made:
            namespaces.unpin(config.gateway, directory=config.pins)
            raise KernelError(f"there is no gateway {config.gateway!r}; start egressd")
        return _secure(namespace) + _host(config)
    finally:
        os.close(namespace)


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
    with namespaces.inside(namespace), _routing() as route:
        nft, conntrack = Nft(), Conntrack()
        try:
            links = Links(route, None, config.pools)
            done = _clear(links, route)
            nft.run(_afresh(config.pools))  # also loads connection tracking, whose settings come next
            done += [f"set {key}" for key in sysctl.ensure((*GATEWAY_SETTINGS, *UPLINK_SETTINGS))]
            # entries made before the settings would neither count nor tell of their end
            conntrack.forget_all()
            done += _settle(route, links)
        finally:
            conntrack.close()
    return done


def _settle(route: Netlink, links: Links) -> list[str]:
    """Until nothing is missing. The kernel enters an IPv6 address into table local only when a worker has
    come to it (addrconf_dad_work), so what was just done may need a moment to show."""
    done: list[str] = []
    for attempt in range(6):
        steps = gateway.gateway_steps(route, links=links)
        if not steps:
            return done
        done += gateway.run(route, steps)
        time.sleep(0.01 * 2**attempt)
    raise KernelError(f"the gateway does not keep what it is told: {steps[0].describe()}")


def _clear(links: Links, route: Netlink) -> list[str]:
    """Links of a former life: their brokers are gone, or they would be the running daemon's."""
    names = [device.name for device in links.present().values()]
    route.run([routing.remove_link(name) for name in names])
    return [f"removed stale {name}" for name in names]


def _afresh(pools: Pools) -> list[str]:
    """Both tables, empty of workspaces, in one transaction, whatever was there before."""
    gone = [
        f"{verb} table {family} {layout.TABLE}" for family in ("netdev", "inet") for verb in ("add", "delete")
    ]
    return gone + build.base(pools)


# ---- the host's side


def _host(config: FoundationConfig) -> list[str]:
    with _routing() as route:
        uplinks = config.uplinks or _uplinks(route)
        # Before the link is up, so that it never has an automatic address.
        changed = sysctl.ensure(gateway.host_settings(uplinks))
        Nft().run(build.host(config.pools))
        done = gateway.run(route, gateway.host_steps(route, config.pools))
    _remember(config.state_dir, {key: before for key, (before, _) in changed.items()})
    return done + [f"set {key} = {after} (was {before})" for key, (before, after) in changed.items()]


def _uplinks(route: Netlink) -> list[str]:
    tables = Tables(route)
    names = {device.index: device.name for device in tables.devices().values()}
    found = [name for name in tables.default_devices(names) if name != layout.HOST_LINK]
    if not found:
        log.warning("the host has no default route: nothing will be forwarded; set `uplinks` to name devices")
    return found


def _remember(state: Path, before: dict[str, str]) -> None:
    """Keep the values the host had first. Settings of our own device go with it."""
    ours = f"/{layout.HOST_LINK}/"
    kept = {key: value for key, value in before.items() if ours not in key} | _remembered(state)
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = state / f"{_STATE}.new"
    temporary.write_text(json.dumps({"settings": kept}, indent=1) + "\n")
    temporary.replace(state / _STATE)


def _remembered(state: Path) -> dict[str, str]:
    try:
        settings = json.loads((state / _STATE).read_text())["settings"]
        return {str(key): str(value) for key, value in settings.items() if str(key).startswith("net/")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError, TypeError):
        log.warning("%s is damaged: settings of the host from before cannot be restored", state / _STATE)
        return {}


# ---- the end


def dismantle(config: FoundationConfig) -> list[str]:
    """Remove everything; collects what failed and says all of it at the end (KernelError)."""
    done: list[str] = []
    failed: list[str] = []
    for part in (_dismantle_gateway, _dismantle_host, _dismantle_settings):
        try:
            done += part(config)
        except (EgressdError, OSError) as error:
            failed.append(str(error))
    if failed:
        raise KernelError("not everything could be removed: " + "; ".join(failed))
    return done


def _dismantle_gateway(config: FoundationConfig) -> list[str]:
    if not Path(config.pins, config.gateway).exists():
        return []
    namespace, _ = namespaces.pin(config.gateway, directory=config.pins)
    try:
        # The namespace lives on while a process is in it: take its devices and tables away by hand.
        with namespaces.inside(namespace), _routing() as route:
            names = [name for name in Tables(route).devices() if name != "lo"]
            route.run([routing.remove_link(name) for name in names])
            nft = Nft()
            for family in ("netdev", "inet"):
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
    settings = _remembered(config.state_dir)
    done = []
    for key, value in settings.items():
        if sysctl.read(key) not in (None, value):
            sysctl.write(key, value)
            done.append(f"set {key} back to {value}")
    (config.state_dir / _STATE).unlink(missing_ok=True)
    return done


# ---- the program


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="egressd-foundation")
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--fd", metavar="reply=N", type=_reply, default=None)
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


def _hand_over(number: int, result: FoundationResult) -> None:
    names = ["gateway", *result.sockets]
    descriptors = [result.namespace, *(sock.fileno() for sock in result.sockets.values())]
    with socket.socket(fileno=number) as reply:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        reply.sendmsg([json.dumps(names).encode()], ancillary)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if options.debug else logging.INFO,
        format="egressd[foundation]: %(levelname)s: %(message)s",
    )
    config = FoundationConfig.of(Config.decode(options.config_json))
    try:
        if options.dismantle:
            done = dismantle(config)
        elif options.mend:
            done = mend(config)
        else:
            result = setup(config)
            done = result.done
            if options.fd is not None:
                _hand_over(options.fd, result)
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
