"""A machine as it should be, one thing about it changed, and what is said of that."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.diagnosis import findings
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
from egressd.diagnosis.findings import Finding, Result, Whose, conclude, healthy
from egressd.ruleset import layout

YES, NO, UNKNOWN = Trial(True), Trial(False, "the kernel said no"), Trial(None)
FEATURE = Feature(need="transparent proxying", how="a rule", there=True, remedy="modprobe nft_tproxy")
POLICIES = Place(
    path="/etc/egressd/workspaces",
    what="policies",
    present=True,
    mode=0o750,
    gid=900,
    reader=Account(uid=900, gid=900),
)
KEYS = Place(
    path="/var/lib/egressd/keys",
    what="its keys",
    present=True,
    mode=0o700,
    uid=905,
    owner=905,
    forbidden=0o077,
    made=True,
)
GOOD = Facts(
    uid=0,
    software=Software(
        os="Debian GNU/Linux 12 (bookworm)", kernel="6.1.0-18-amd64", features=(FEATURE,),
        nftables=YES, systemd=YES, seccomp=YES, by_systemd=True,
    ),
    spawning=Spawning(
        uid=65534, bwrap="/usr/bin/bwrap", version="bubblewrap 0.8.0\n",
        namespaces=YES, proc=YES, queue=YES, cgroup=YES, cgroup2=True, profiled=False,
    ),
    daemon=Daemon(
        config=YES, config_file="/etc/egressd/egressd.yaml", accounts=YES, places=(POLICIES, KEYS),
        control=YES, local_only=False, upstreams=("9.9.9.9",), broker=YES, broker_account=True,
    ),
    network=Network(
        link=True, host_table=True,
        uplinks=(Uplink(name="eth0", there=True, forwards4=True, forwards6=True),),
        default4=True, default6=True, obstacles=(), nameservers=("127.0.0.53",),
    ),
    clock=Clock(synchronised=True, stepped=0.2),
    sysctls={
        "kernel/pid_max": "4194304", "user/max_user_namespaces": "15000", "user/max_net_namespaces": "15000",
        "kernel/unprivileged_userns_clone": "1", "net/ipv6/neigh/default/gc_thresh3": "1024",
    },
    descriptors=65536,
)  # fmt: skip


def changed(part: str, **fields: Any) -> Facts:
    """GOOD with these fields of one part changed; "" for the whole."""
    if not part:
        return msgspec.structs.replace(GOOD, **fields)
    return msgspec.structs.replace(GOOD, **{part: msgspec.structs.replace(getattr(GOOD, part), **fields)})


def noticed(facts: Facts) -> list[Finding]:
    return [finding for finding in conclude(facts) if finding.result is not Result.OK]


def test_a_machine_as_it_should_be() -> None:
    assert noticed(GOOD) == []
    assert healthy(conclude(GOOD))
    assert {finding.whose for finding in conclude(GOOD)} == set(Whose)


def sysctls(**values: str) -> Facts:
    return changed(
        "", sysctls=GOOD.sysctls | {key.replace("__", "/"): value for key, value in values.items()}
    )


def place(original: Place, **fields: Any) -> Facts:
    return changed("daemon", places=(msgspec.structs.replace(original, **fields),))


def feature(**fields: Any) -> Facts:
    return changed("software", features=(msgspec.structs.replace(FEATURE, **fields),))


def uplink(**fields: Any) -> Facts:
    eth0 = GOOD.network.uplinks[0]
    return changed("network", uplinks=(msgspec.structs.replace(eth0, **fields),))


def obstacle(owner: str, *, certain: bool = True, direction: str = "out") -> Facts:
    one = Obstacle(
        family="inet", table="mine", chain="wall", owner=owner, direction=direction, packet="ip",
        why="its policy is drop", certain=certain,
    )  # fmt: skip
    return changed("network", obstacles=(one,))


BAD, WARNED, OPEN = Result.MISSING, Result.WARNING, Result.UNTESTED
RESTRICTED = sysctls(kernel__apparmor_restrict_unprivileged_userns="1")


@pytest.mark.parametrize(
    ("facts", "result", "need", "fix"),
    [
        # the daemon
        (changed("software", kernel="5.10.0-28-amd64"), BAD, "Linux 5.15", "Debian 12"),
        (changed("software", kernel="strange"), OPEN, "Linux 5.15", ""),
        (changed("software", features=None), OPEN, "the kernel must be able", ""),
        (feature(there=False), BAD, "proxying", "modprobe"),
        (feature(there=None), OPEN, "proxying", ""),
        (changed("software", nftables=NO), BAD, "libnftables", "apt-get install python3-nftables"),
        (changed("software", systemd=NO), BAD, "libsystemd", "apt-get install python3-systemd"),
        (changed("software", systemd=NO, by_systemd=False), WARNED, "libsystemd", "python3-systemd"),
        (changed("daemon", accounts=NO), BAD, "an account for each", "systemd-sysusers"),
        (changed("daemon", control=NO), WARNED, "runs and enforces", "systemctl start egressd"),
        (changed("daemon", broken=("acme",)), WARNED, "policy of acme", "policy check"),
        (place(POLICIES, present=None), OPEN, "policies", ""),
        (place(POLICIES, present=False), BAD, "policies", "systemd-tmpfiles"),
        (place(POLICIES, mode=0o770), BAD, "policies", "chmod g-w /etc/egressd/workspaces"),
        (place(POLICIES, mode=0o757), BAD, "policies", "chmod o-w"),
        (place(POLICIES, gid=0), BAD, "policies", "chgrp 900"),
        (place(POLICIES, mode=0o740), BAD, "policies", "chgrp 900"),
        (place(KEYS, mode=0o750), BAD, "its keys", "chmod g-rx"),
        (place(KEYS, uid=0), BAD, "its keys", "chown 905"),
        (changed("clock", synchronised=False), WARNED, "a clock that is right", "timesyncd"),
        (changed("clock", synchronised=None), OPEN, "a clock that is right", ""),
        (changed("clock", stepped=-86400.0), WARNED, "only goes forward", ""),
        (changed("clock", stepped=86400.0), WARNED, "only goes forward", ""),
        (changed("clock", ahead=3600.0), WARNED, "only goes forward", ""),
        (changed("", descriptors=1024), WARNED, "open files", "LimitNOFILE"),
        (sysctls(kernel__pid_max="4096"), WARNED, "kernel.pid_max", "sysctl -w kernel.pid_max="),
        (sysctls(net__ipv6__neigh__default__gc_thresh3="64"), WARNED, "gc_thresh3", "sysctl -w"),
        # callers
        (changed("spawning", bwrap=None), BAD, "bubblewrap", "apt-get install bubblewrap"),
        (changed("spawning", setuid=True), BAD, "bubblewrap", "chmod u-s /usr/bin/bwrap"),
        (changed("spawning", version="bubblewrap 0.3.1"), BAD, "bubblewrap", "newer"),
        (changed("spawning", version=""), BAD, "bubblewrap", "newer"),
        (changed("spawning", namespaces=NO), BAD, "namespaces without", "the settings above"),
        (changed("spawning", namespaces=UNKNOWN), OPEN, "namespaces without", ""),
        (changed("spawning", proc=NO), BAD, "/proc of its own", "systempaths=unconfined"),
        (changed("software", seccomp=NO), BAD, "filter of system calls", "libseccomp2"),
        (changed("spawning", queue=NO), WARNED, "which program tried", "nfnetlink_queue"),
        (changed("spawning", queue=UNKNOWN), OPEN, "which program tried", ""),
        (changed("spawning", cgroup=NO), WARNED, "as a whole", "Delegate=yes"),
        (changed("spawning", cgroup=NO, cgroup2=False), WARNED, "as a whole", "unified_cgroup_hierarchy"),
        (sysctls(kernel__unprivileged_userns_clone="0"), BAD, "unprivileged_userns_clone", "sysctl -w"),
        (sysctls(user__max_user_namespaces="0"), BAD, "user.max_user_namespaces", "sysctl -w"),
        (sysctls(user__max_net_namespaces="10"), WARNED, "user.max_net_namespaces", "sysctl -w"),
        # the broker
        (changed("daemon", broker=None), OPEN, "a configuration", ""),
        (changed("daemon", broker=NO), BAD, "a configuration", "egressd-broker --check"),
        (changed("daemon", broker_account=False), WARNED, "egressd-broker", "systemd-sysusers"),
        # the neighbourhood
        (changed("network", uplinks=()), WARNED, "a way out", "uplinks"),
        (uplink(there=False), BAD, "the device eth0", "uplinks"),
        (uplink(forwards4=False), BAD, "forwarding on eth0", "egressd --mend"),
        (uplink(forwards6=False), BAD, "forwarding on eth0", "egressd --mend"),
        (changed("network", host_table=False), BAD, "egressd_host", "egressd --mend"),
        (changed("network", obstacles=None), OPEN, "no firewall", ""),
        (obstacle("docker"), BAD, "no firewall", "iptables -I DOCKER-USER -i egw -j ACCEPT"),
        (obstacle("docker", direction="back"), BAD, "no firewall", "--ctstate RELATED,ESTABLISHED"),
        (obstacle("ufw"), BAD, "no firewall", "ufw route allow in on egw"),
        (obstacle("firewalld"), BAD, "no firewall", "--zone=trusted --add-interface=egw"),
        (obstacle(""), BAD, "no firewall", 'nft insert rule inet mine wall iifname "egw" accept'),
        (obstacle("", certain=False), WARNED, "no firewall", "nft insert"),
        (changed("network", legacy=("ip_tables filter",)), WARNED, "no firewall", "iptables-legacy"),
        (changed("network", ipv6=False), BAD, "IPv6", "disable_ipv6"),
        (changed("network", disabled6=True), WARNED, "IPv6", ""),
        (changed("network", overlaps=("198.18.0.0/16 and the route x",)), BAD, "ranges", "pools"),
        (changed("network", managers=("NetworkManager",)), WARNED, "left alone", "unmanaged-devices"),
        (changed("network", managers=("systemd-networkd",)), WARNED, "left alone", "Unmanaged=yes"),
    ],
)  # fmt: skip
def test_one_thing_is_wrong(facts: Facts, result: Result, need: str, fix: str) -> None:
    (finding,) = noticed(facts)
    assert finding.result is result
    assert need in finding.need
    assert fix in finding.fix
    assert bool(finding.fix) == bool(fix)
    assert healthy(conclude(facts)) == (result is not Result.MISSING)
    assert finding.how


def test_no_configuration() -> None:
    """Then it is not known either who is asked for names."""
    told = {finding.need: finding for finding in noticed(changed("daemon", config=NO))}
    assert "egressd --check" in told.pop("a configuration: /etc/egressd/egressd.yaml").fix
    assert told.pop("resolvers that fit this machine").result is Result.UNTESTED
    assert told == {}


@pytest.mark.parametrize(
    "facts",
    [
        changed("network", default6=False),
        changed("network", ipv6=True, disabled6=False),
        changed(
            "network", link=False, uplinks=(Uplink(name="eth0", there=True, forwards4=False),)
        ),  # not yet
        uplink(forwards6=None),  # an older kernel
        uplink(forwards6=False, disabled6=True),
        place(KEYS, present=False),  # egressd makes it
        place(POLICIES, uid=900, mode=0o700, gid=0),  # its own
        changed("daemon", upstreams=("127.0.0.53",)),  # systemd-resolved
        changed("daemon", upstreams=()),
        changed("clock", stepped=5.0),
        changed("clock", stepped=None),
        sysctls(kernel__unprivileged_userns_clone="1"),
        RESTRICTED,  # and yet bubblewrap may
    ],
)
def test_nothing_is_wrong(facts: Facts) -> None:
    assert noticed(facts) == []


# ---- on a machine that is cut off

CUT_OFF = {"uplinks": (), "default4": False, "default6": False}


@pytest.mark.parametrize("network", [CUT_OFF, {}])
@pytest.mark.parametrize("upstream", ["9.9.9.9", "1.1.1.1", "2606:4700:4700::1111"])
@pytest.mark.parametrize("local_only", [True, False])
def test_public_resolvers_on_an_air_gapped_host(
    network: dict[str, Any], upstream: str, local_only: bool
) -> None:
    facts = changed("network", nameservers=("8.8.8.8",), **network)
    daemon = msgspec.structs.replace(GOOD.daemon, upstreams=(upstream,), local_only=local_only)
    facts = msgspec.structs.replace(facts, daemon=daemon)
    told = {finding.need: finding for finding in noticed(facts)}
    cut_off = bool(network) or local_only
    assert ("resolvers that fit this machine" in told) == cut_off
    assert ("resolvers of the host itself" in told) == cut_off
    if cut_off:
        assert upstream in told["resolvers that fit this machine"].said
        assert "`upstream: []`" in told["resolvers that fit this machine"].fix


@pytest.mark.parametrize("upstream", ["10.0.0.53", "192.168.1.1", "fd00::53", "127.0.0.1", "169.254.1.1"])
def test_a_resolver_of_ones_own_is_fine_there(upstream: str) -> None:
    facts = msgspec.structs.replace(
        changed("network", **CUT_OFF),
        daemon=msgspec.structs.replace(GOOD.daemon, upstreams=(upstream,), local_only=True),
    )
    assert noticed(facts) == []


# ---- AppArmor, as Ubuntu has it


@pytest.mark.parametrize(
    ("tried", "profiled", "result", "said"),
    [
        (YES, True, Result.OK, "a profile lets it"),
        (NO, False, Result.MISSING, "no profile lets it"),
        (NO, True, Result.MISSING, "there is a profile, and still"),
        (UNKNOWN, True, Result.UNTESTED, "there is a profile"),
        (UNKNOWN, None, Result.UNTESTED, "the restriction is on"),
    ],
)
def test_apparmor(tried: Trial, profiled: bool | None, result: Result, said: str) -> None:
    spawning = msgspec.structs.replace(GOOD.spawning, namespaces=tried, profiled=profiled)
    facts = msgspec.structs.replace(RESTRICTED, spawning=spawning)
    (finding,) = [one for one in conclude(facts) if one.need.startswith("AppArmor")]
    assert (finding.result, said in finding.said) == (result, True)
    if result is Result.MISSING:
        assert "profile bwrap /usr/bin/bwrap flags=(unconfined) { userns, }" in finding.fix


# ---- whatever the facts are


def test_it_speaks_of_the_right_device() -> None:
    assert findings.LINK == layout.HOST_LINK


TRIALS = st.builds(Trial, st.none() | st.booleans(), st.text(max_size=10))


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Facts,
        uid=st.integers(0, 5000),
        software=st.builds(
            Software, nftables=TRIALS, systemd=TRIALS, seccomp=TRIALS, kernel=st.text(max_size=8)
        ),
        spawning=st.builds(
            Spawning,
            namespaces=TRIALS,
            proc=TRIALS,
            queue=TRIALS,
            cgroup=TRIALS,
            version=st.text(max_size=12),
        ),
        sysctls=st.dictionaries(st.sampled_from(findings.SYSCTLS), st.text(max_size=6)),
    )
)
def test_what_could_not_be_tried_is_never_called_good(facts: Facts) -> None:
    told = conclude(facts)
    for finding in told:
        if finding.result in (Result.MISSING, Result.WARNING) and finding.whose is not Whose.NETWORK:
            assert finding.fix, finding
        assert finding.need
        assert finding.how
    for trial, need in (
        (facts.software.nftables, "the binding of libnftables"),
        (facts.spawning.proc, "a /proc of its own in each sandbox"),
    ):
        (finding,) = [one for one in told if one.need == need]
        assert (finding.result is Result.OK) == (trial.ok is True)
        assert (finding.result is Result.UNTESTED) == (trial.ok is None)
