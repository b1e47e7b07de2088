"""From facts to findings: each need, how it was tested, whether it is met, and what to do where it is not.

A need that could not be tried is never called met. `MISSING` is what egressd cannot do its work without;
`WARNING` is what works differently than somebody may think, or will not for long.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from egressd.diagnosis import firewall
from egressd.diagnosis.facts import Facts, Place, Trial, Uplink
from egressd.diagnosis.reading import bwrap_version, kernel_version, number

__all__ = ["SYSCTLS", "Finding", "Result", "Whose", "conclude", "healthy"]

LINK = "egw"  # ruleset.layout.HOST_LINK; tests compare
_OLDEST_KERNEL, _OLDEST_BWRAP = (5, 15), (0, 4)
_ROOT = "needs root"


class Result(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"
    UNTESTED = "not tested"


class Whose(enum.StrEnum):
    """Whose need it is."""

    DAEMON = "daemon"
    CALLERS = "callers"
    BROKER = "broker"
    NETWORK = "neighbourhood"


@dataclass(frozen=True, slots=True)
class Finding:
    whose: Whose
    need: str
    how: str
    result: Result
    said: str = ""
    fix: str = ""


def conclude(facts: Facts) -> list[Finding]:
    """Every need there is, in the order of the rooms below; of neighbours only what was noticed."""
    return [finding for judge in _JUDGES for finding in judge(facts)]


def healthy(findings: list[Finding]) -> bool:
    return all(finding.result is not Result.MISSING for finding in findings)


def _trial(
    whose: Whose,
    need: str,
    how: str,
    trial: Trial,
    fix: str,
    *,
    otherwise: Result = Result.MISSING,
) -> Finding:
    """What a trial shows. One that could not be made says why."""
    if trial.ok is None:
        return Finding(whose, need, how, Result.UNTESTED, trial.said or _ROOT)
    if trial.ok:
        return Finding(whose, need, how, Result.OK, trial.said)
    return Finding(whose, need, how, otherwise, trial.said, fix)


# ---- the daemon


def _kernel(facts: Facts) -> Iterator[Finding]:
    release = facts.software.kernel
    version, how = kernel_version(release), "uname"
    need = "Linux 5.15 or later"
    if version is None:
        yield Finding(Whose.DAEMON, need, how, Result.UNTESTED, f"{release!r} is no version")
    elif version < _OLDEST_KERNEL:
        fix = "a newer kernel: on Debian 11, linux-image-amd64 of bullseye-backports; better, Debian 12"
        yield Finding(Whose.DAEMON, need, how, Result.MISSING, release, fix)
    else:
        yield Finding(Whose.DAEMON, need, how, Result.OK, release)
    features = facts.software.features
    if features is None:
        how = "rules and devices made in a namespace that is thrown away"
        yield Finding(Whose.DAEMON, "what the kernel must be able to do", how, Result.UNTESTED, _ROOT)
    for feature in features or ():
        trial = Trial(feature.there, feature.said)
        yield _trial(Whose.DAEMON, feature.need, feature.how, trial, feature.remedy)


def _software(facts: Facts) -> Iterator[Finding]:
    software = facts.software
    yield _trial(
        Whose.DAEMON,
        "the binding of libnftables",
        "imported, and asked for nothing",
        software.nftables,
        "apt-get install python3-nftables, and a virtual environment made with --system-site-packages by"
        " /usr/bin/python3",
    )
    yield _trial(
        Whose.DAEMON,
        "the binding of libsystemd",
        "imported",
        software.systemd,
        "apt-get install python3-systemd: without it the unit, which waits for a word, does not start",
        otherwise=Result.MISSING if software.by_systemd else Result.WARNING,
    )


def _installation(facts: Facts) -> Iterator[Finding]:
    daemon = facts.daemon
    yield _trial(
        Whose.DAEMON,
        f"a configuration: {daemon.config_file}",
        "loaded",
        daemon.config,
        "egressd --check lists what is wrong; an empty file is good enough",
    )
    yield _trial(
        Whose.DAEMON,
        "an account for each process",
        "looked up",
        daemon.accounts,
        "systemd-sysusers egressd.conf, or name numbers under `user`",
    )
    for place in daemon.places:
        yield _place(place)


def _place(place: Place) -> Finding:
    need, how = f"{place.what}: {place.path}", "owner and mode"

    def found(result: Result, said: str = "", fix: str = "") -> Finding:
        return Finding(Whose.DAEMON, need, how, result, said, fix)

    if place.present is None:
        return found(Result.UNTESTED, _ROOT)
    if not place.present:
        if place.made:
            return found(Result.OK, "not there yet; egressd makes it")
        return found(Result.MISSING, "not there", "systemd-tmpfiles --create egressd.conf")
    shown = f"{place.mode:04o}"
    if place.owner is not None and place.uid != place.owner:
        fix = f"chown {place.owner} {place.path}"
        return found(Result.MISSING, f"belongs to uid {place.uid}", fix)
    if place.mode & place.forbidden:
        letters = _letters(place.mode & place.forbidden)
        return found(Result.MISSING, f"mode {shown}", f"chmod {letters} {place.path}")
    if place.reader is not None and not _readable(place):
        fix = f"chgrp {place.reader.gid} {place.path} && chmod g+rX {place.path}"
        return found(Result.MISSING, f"uid {place.reader.uid} cannot read it (mode {shown})", fix)
    return found(Result.OK, f"mode {shown}")


def _letters(bits: int) -> str:
    """`go-w`, as chmod(1) takes away exactly these."""
    parts = []
    for who, shift in (("g", 3), ("o", 0)):
        one = bits >> shift & 7
        if one:
            parts.append(f"{who}-" + "".join(c for c, bit in zip("rwx", (4, 2, 1), strict=True) if one & bit))
    return ",".join(parts)


def _readable(place: Place) -> bool:
    """For a directory: listed and entered."""
    assert place.reader is not None
    if place.reader.uid == 0:
        return True
    shift = 6 if place.uid == place.reader.uid else 3 if place.gid == place.reader.gid else 0
    return place.mode >> shift & 5 == 5


def _running(facts: Facts) -> Iterator[Finding]:
    daemon = facts.daemon
    yield _trial(
        Whose.DAEMON,
        "egressd runs and enforces",
        "asked over its control socket",
        daemon.control,
        "systemctl start egressd; journalctl -u egressd says why not",
        otherwise=Result.WARNING,
    )
    for name in daemon.broken:
        fix = "egressctl policy check lists what to do; then egressctl policy apply"
        text = "the last good version is in force, or nothing"
        yield Finding(Whose.DAEMON, f"the policy of {name}", "asked egressd", Result.WARNING, text, fix)
    files = facts.descriptors
    if files is not None and files < 4096:
        fix = "LimitNOFILE=65536 in the unit"
        yield Finding(
            Whose.DAEMON, "open files", "limits of the process", Result.WARNING, f"{files} at most", fix
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    clock, how = facts.clock, "the kernel's word (adjtimex)"
    need = "a clock that is right"
    fix = "systemctl enable --now systemd-timesyncd, or chrony; in a virtual machine also its guest agent"
    if clock.synchronised is None:
        yield Finding(Whose.DAEMON, need, how, Result.UNTESTED, "the kernel does not say")
    elif clock.synchronised:
        yield Finding(Whose.DAEMON, need, how, Result.OK, "synchronised")
    else:
        text = "nobody keeps it: times in the journal are this machine's alone"
        yield Finding(Whose.DAEMON, need, how, Result.WARNING, text, fix)
    if clock.stepped is not None and abs(clock.stepped) > 10:
        text = f"it was set by {clock.stepped:+.0f} s since egressd started; compare records by seq"
        how = "wall clock against time since boot"
        yield Finding(Whose.DAEMON, "a clock that only goes forward", how, Result.WARNING, text)
    if clock.ahead > 60:
        text = f"the journal was written to {clock.ahead:.0f} s from now: the clock was set back"
        how = "wall clock against the journal's files"
        yield Finding(Whose.DAEMON, "a clock that only goes forward", how, Result.WARNING, text)


# (setting, the least that is enough, what happens below, result below it)
_LIMITS = (
    ("kernel/pid_max", 32768, "each sandbox takes five processes and what its command starts"),
    ("kernel/threads-max", 8192, "each sandbox takes five processes and what its command starts"),
    ("net/ipv4/neigh/default/gc_thresh3", 1024, "busy machines run out of neighbours, egressd's not counted"),
    ("net/ipv6/neigh/default/gc_thresh3", 1024, "busy machines run out of neighbours, egressd's not counted"),
    ("net/netfilter/nf_conntrack_max", 16384, "connections of the gateway and of the host share this table"),
)
_USER_LIMITS = ("user/max_user_namespaces", "user/max_net_namespaces", "user/max_pid_namespaces")
SYSCTLS = (
    *(key for key, _, _ in _LIMITS),
    *_USER_LIMITS,
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
)


def _limits(facts: Facts) -> Iterator[Finding]:
    for key, least, why in _LIMITS:
        value = number(facts.sysctls.get(key))
        if value is not None and value < least:
            fix = f"sysctl -w {key.replace('/', '.')}={least * 4}, and the same in /etc/sysctl.d/egressd.conf"
            yield Finding(
                Whose.DAEMON, f"{key.replace('/', '.')}", "read", Result.WARNING, f"{value}: {why}", fix
            )


# ---- callers


_APPARMOR = (
    "write /etc/apparmor.d/bwrap with `abi <abi/4.0>, include <tunables/global>"
    " profile bwrap /usr/bin/bwrap flags=(unconfined) { userns, }` (each on a line of its own),"
    " then apparmor_parser -r /etc/apparmor.d/bwrap"
)


def _bubblewrap(facts: Facts) -> Iterator[Finding]:
    spawning = facts.spawning
    need, how = "bubblewrap 0.4 or later, not setuid", "bwrap --version; its mode"
    if spawning.bwrap is None:
        yield Finding(Whose.CALLERS, need, how, Result.MISSING, "not found", "apt-get install bubblewrap")
        return
    version = bwrap_version(spawning.version)
    if spawning.setuid:
        text = "setuid: callers do not own the namespaces that it makes"
        yield Finding(Whose.CALLERS, need, how, Result.MISSING, text, f"chmod u-s {spawning.bwrap}")
    elif version is None or version < _OLDEST_BWRAP:
        text = spawning.version.strip()[:64] or "it does not say its version"
        yield Finding(Whose.CALLERS, need, how, Result.MISSING, text, "a newer bubblewrap")
    else:
        yield Finding(Whose.CALLERS, need, how, Result.OK, spawning.version.strip()[:64])


def _namespaces(facts: Facts) -> Iterator[Finding]:
    spawning, settings = facts.spawning, facts.sysctls
    yield from _forbidden(facts)
    whom = f"bubblewrap, as uid {spawning.uid}"
    restricted = number(settings.get("kernel/apparmor_restrict_unprivileged_userns")) == 1
    fix = (
        _APPARMOR
        if restricted
        else "see the settings above; in a container, its seccomp and AppArmor profile"
    )
    yield _trial(Whose.CALLERS, "namespaces without any right", whom, spawning.namespaces, fix)
    yield _trial(
        Whose.CALLERS,
        "a /proc of its own in each sandbox",
        f"{whom}, with --proc",
        spawning.proc,
        "something hides parts of /proc, and the kernel then refuses a new one: in a container, docker run"
        " --security-opt systempaths=unconfined, or podman run --security-opt unmask=ALL; in a unit, no"
        " ProtectKernelTunables=, ProtectKernelLogs=, ProcSubset=",
    )


def _forbidden(facts: Facts) -> Iterator[Finding]:
    """Settings that keep user namespaces from those who hold no rights."""
    settings, how = facts.sysctls, "read"
    if number(settings.get("kernel/unprivileged_userns_clone")) == 0:
        fix = "sysctl -w kernel.unprivileged_userns_clone=1, and the same in /etc/sysctl.d/egressd.conf"
        yield Finding(Whose.CALLERS, "kernel.unprivileged_userns_clone", how, Result.MISSING, "0", fix)
    for key in _USER_LIMITS:
        value, name = number(settings.get(key)), key.replace("/", ".")
        if value is not None and value < 64:
            fix = f"sysctl -w {name}=16384, and the same in /etc/sysctl.d/egressd.conf"
            result = Result.MISSING if value == 0 else Result.WARNING
            yield Finding(Whose.CALLERS, name, how, result, f"{value}, and each sandbox takes some", fix)
    if number(settings.get("kernel/apparmor_restrict_unprivileged_userns")) == 1:
        yield _apparmor(facts)


def _apparmor(facts: Facts) -> Finding:
    """Ubuntu since 23.10: only programs whose profile says `userns` may make user namespaces with rights."""
    need, how = "AppArmor lets bubblewrap make user namespaces", "the restriction is on; bubblewrap was tried"
    tried = facts.spawning.namespaces.ok
    if tried:
        return Finding(Whose.CALLERS, need, how, Result.OK, "a profile lets it")
    if tried is None:
        if facts.spawning.profiled:
            return Finding(Whose.CALLERS, need, how, Result.UNTESTED, "there is a profile for it")
        return Finding(Whose.CALLERS, need, how, Result.UNTESTED, "the restriction is on", _APPARMOR)
    text = "there is a profile, and still it may not" if facts.spawning.profiled else "no profile lets it"
    return Finding(Whose.CALLERS, need, how, Result.MISSING, text, _APPARMOR)


def _bounds(facts: Facts) -> Iterator[Finding]:
    spawning = facts.spawning
    yield _trial(
        Whose.CALLERS,
        "a filter of system calls",
        "compiled by libseccomp",
        facts.software.seccomp,
        "apt-get install libseccomp2",
    )
    need, how = (
        "limits of memory and processes for a sandbox as a whole",
        "the place of this caller among the cgroups",
    )
    if spawning.cgroup2:
        text = "limits hold for each process by itself (rlimits): no delegated cgroup with memory and pids"
        fix = (
            "systemd-run --user --scope -p Delegate=yes egressctl run ...; the broker's unit has that already"
        )
    else:
        text = "cgroup v2 is not mounted: memory and processes are bounded by rlimits, each process by itself"
        fix = "boot with systemd.unified_cgroup_hierarchy=1 (Debian 11 and later do)"
    trial = spawning.cgroup if spawning.cgroup.ok is not False else Trial(False, text)
    yield _trial(Whose.CALLERS, need, how, trial, fix, otherwise=Result.WARNING)
    yield _trial(
        Whose.CALLERS,
        "holding the first packet of an attempt, to say which program tried",
        "a queue bound in a namespace made for it",
        spawning.queue,
        "CONFIG_NETFILTER_NETLINK_QUEUE, CONFIG_NETFILTER_XT_TARGET_NFQUEUE and CONFIG_NFT_COMPAT, or"
        " CONFIG_NFT_QUEUE (modprobe nfnetlink_queue nft_queue); without, attempts are refused all the same",
        otherwise=Result.WARNING,
    )


# ---- the broker


def _broker(facts: Facts) -> Iterator[Finding]:
    daemon = facts.daemon
    how = "egressd-broker --check"
    if daemon.broker is None:
        text = "it is optional, and there is no /etc/egressd/broker.yaml"
        yield Finding(Whose.BROKER, "a configuration", how, Result.UNTESTED, text)
        return
    yield _trial(
        Whose.BROKER, "a configuration", how, daemon.broker, "egressd-broker --check lists what is wrong"
    )
    result, fix = Result.OK, ""
    if not daemon.broker_account:
        result, fix = Result.WARNING, "systemd-sysusers egressd.conf, or name another account under `brokers`"
    yield Finding(Whose.BROKER, "an account: egressd-broker", "looked up", result, "", fix)


# ---- the neighbourhood


def _uplinks(facts: Facts) -> Iterator[Finding]:
    network = facts.network
    need, how = "a way out of this host", "its routes"
    if network.uplinks:
        names = ", ".join(uplink.name for uplink in network.uplinks)
        yield Finding(Whose.NETWORK, need, how, Result.OK, names)
    elif facts.daemon.local_only or not facts.daemon.upstreams:
        text = "no default route; nothing is asked upstream either"
        yield Finding(Whose.NETWORK, need, how, Result.OK, text)
    else:
        fix = "bring the network up, or name the devices under `uplinks`"
        yield Finding(
            Whose.NETWORK, need, how, Result.WARNING, "no default route: nothing will be forwarded", fix
        )
    for uplink in network.uplinks:
        yield from _uplink(uplink, facts)


def _uplink(uplink: Uplink, facts: Facts) -> Iterator[Finding]:
    need, how = f"forwarding on {uplink.name}", "its settings"
    if not uplink.there:
        fix = "correct `uplinks` in egressd.yaml"
        yield Finding(
            Whose.NETWORK, f"the device {uplink.name}", "looked for", Result.MISSING, "not there", fix
        )
        return
    wrong = [
        version for version, on in (("IPv4", uplink.forwards4), ("IPv6", uplink.forwards6)) if on is False
    ]
    if uplink.disabled6:
        wrong = [version for version in wrong if version == "IPv4"]
    if not wrong:
        yield Finding(Whose.NETWORK, need, how, Result.OK)
    elif not facts.network.link:
        yield Finding(Whose.NETWORK, need, how, Result.OK, "egressd switches it on when it starts")
    else:
        text = f"off for {' and '.join(wrong)}: approved traffic does not leave"
        yield Finding(Whose.NETWORK, need, how, Result.MISSING, text, "egressd --mend")


def _host_side(facts: Facts) -> Iterator[Finding]:
    network, how = facts.network, "the host's ruleset, read"
    if facts.daemon.control.ok and network.host_table is False:
        text = "somebody flushed it: approved traffic does not come back"
        yield Finding(Whose.NETWORK, "table inet egressd_host", how, Result.MISSING, text, "egressd --mend")
    need = f"no firewall of the host's drops what comes from {LINK}"
    if network.obstacles is None:
        yield Finding(Whose.NETWORK, need, how, Result.UNTESTED, _ROOT)
    elif not network.obstacles:
        yield Finding(Whose.NETWORK, need, how, Result.OK)
    for obstacle in network.obstacles or ():
        whose = obstacle.owner or "somebody"
        way = "what comes from" if obstacle.direction == "out" else "answers towards"
        sure = "is dropped" if obstacle.certain else "may be dropped"
        where = f"{obstacle.family} {obstacle.table} {obstacle.chain}"
        text = f"{way} {LINK} ({obstacle.packet}) {sure} in {where}, of {whose}: {obstacle.why}"
        result = Result.MISSING if obstacle.certain else Result.WARNING
        yield Finding(Whose.NETWORK, need, how, result, text, firewall.remedy(obstacle, link=LINK))
    if network.legacy:
        text = f"rules of iptables-legacy ({', '.join(network.legacy)}) do not show in nft"
        fix = f"iptables-legacy -S FORWARD; where it drops: iptables-legacy -I FORWARD -i {LINK} -j ACCEPT"
        yield Finding(Whose.NETWORK, need, "names of tables", Result.WARNING, text, fix)


def _names(facts: Facts) -> Iterator[Finding]:
    """Who is asked for names, and whether there is a way to them."""
    daemon, network = facts.daemon, facts.network
    cut_off = bool(daemon.local_only) or not (network.default4 or network.default6)
    why = "every workspace is local-only" if daemon.local_only else "this host has no default route"
    public = [address for address in daemon.upstreams if ip_address(address).is_global]
    need, how = "resolvers that fit this machine", "`upstream` of egressd.yaml, and the host's routes"
    if public and cut_off:
        text = f"{', '.join(public)}: public, and {why}"
        fix = "`upstream: []`, and what must be found under `hosts`; or a resolver of your own network"
        yield Finding(Whose.NETWORK, need, how, Result.WARNING, text, fix)
    elif any(ip_address(address).is_loopback for address in daemon.upstreams):
        text = "a resolver on this host (systemd-resolved's stub is 127.0.0.53): it decides whom to ask"
        yield Finding(Whose.NETWORK, need, how, Result.OK, text)
    else:
        text = ", ".join(daemon.upstreams) or "nobody is asked upstream: names are those under `hosts`"
        result = Result.OK if daemon.config.ok else Result.UNTESTED
        yield Finding(Whose.NETWORK, need, how, result, text if daemon.config.ok else "no configuration")
    host = [address for address in network.nameservers if ip_address(address).is_global]
    if host and cut_off:
        text = f"{', '.join(host)}: public, and {why}; other programs of this host ask there"
        yield Finding(
            Whose.NETWORK,
            "resolvers of the host itself",
            "/etc/resolv.conf",
            Result.WARNING,
            text,
            "name a resolver of your own network there, or none; egressd does not read it",
        )


def _ipv6(facts: Facts) -> Iterator[Finding]:
    network, need, how = facts.network, "IPv6", "/proc/sys/net/ipv6"
    if not network.ipv6:
        text = "the kernel was started with ipv6.disable=1"
        fix = "start it without; net.ipv6.conf.all.disable_ipv6=1 switches it off as well, and egressd works"
        yield Finding(Whose.NETWORK, need, how, Result.MISSING, text, fix)
    elif network.disabled6:
        text = "switched off (disable_ipv6): sandboxes reach hosts by IPv4"
        yield Finding(Whose.NETWORK, need, how, Result.WARNING, text)
    else:
        text = "" if network.default6 else "no default route: sandboxes reach hosts by IPv4"
        yield Finding(Whose.NETWORK, need, how, Result.OK, text)


def _ranges(facts: Facts) -> Iterator[Finding]:
    need, how = "address ranges that this host does not use itself", "its addresses and routes"
    for overlap in facts.network.overlaps:
        fix = "other ranges under `pools` in egressd.yaml"
        yield Finding(Whose.NETWORK, need, how, Result.MISSING, overlap, fix)
    if not facts.network.overlaps:
        yield Finding(Whose.NETWORK, need, how, Result.OK)


_UNMANAGED = {
    "NetworkManager": (
        f"printf '[keyfile]\\nunmanaged-devices=interface-name:{LINK}\\n'"
        " > /etc/NetworkManager/conf.d/egressd.conf && systemctl reload NetworkManager"
    ),
    "systemd-networkd": (
        f"printf '[Match]\\nName={LINK}\\n[Link]\\nUnmanaged=yes\\n'"
        " > /etc/systemd/network/00-egressd.network && networkctl reload"
    ),
}


def _managers(facts: Facts) -> Iterator[Finding]:
    for manager in facts.network.managers:
        text = f"{manager} manages {LINK} and may take its addresses away"
        fix = _UNMANAGED.get(manager, "")
        yield Finding(
            Whose.NETWORK, f"{LINK} left alone", f"the state of {manager}", Result.WARNING, text, fix
        )


_JUDGES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _kernel, _software, _installation, _running, _clock, _limits,
    _bubblewrap, _namespaces, _bounds,
    _broker,
    _uplinks, _host_side, _names, _ipv6, _ranges, _managers,
)  # fmt: skip
