"""egressd on a real Debian, from its installation to its removal: each test goes on where the last one ended.

The machine is a container with systemd as its process 1 (container.py). Those marked slow are left out of
the short form, and nothing after them depends on them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from container import Container

from lab.internet import Internet
from lab.machine import PROJECT, Process, poll

pytestmark = pytest.mark.system

ALLOWED, ALLOWED6, FORBIDDEN = "11.22.33.30", "2a10:5353::30", "11.22.33.66"
UNITS = ("egressd", "egressd-foundation", "egressd-broker")
# What `systemd-analyze security` of Debian 12 says, in tenths: docs/operations.md, "The units". May fall,
# not rise.
EXPOSURE = {"egressd": 35, "egressd-foundation": 44, "egressd-broker": 34}
PROVISION = [
    *("/root/provision.sh", "guard", "--deb", "/root/egressd.deb"),
    *("--internet", f"{ALLOWED}, '{ALLOWED6}'", "--client", FORBIDDEN),
]
POLICY = """\
workspace: stream
guard: enforce
members: [user:lab]
allow:
  - host: allowed.lab
    ports: [7/tcp, 80/tcp]
    private: true
"""
# Asks the echo server over one connection of each family, fifty times a second, and says what came back.
STREAM = """\
import socket, sys, time
found = [socket.getaddrinfo("allowed.lab", 7, family, socket.SOCK_STREAM)[0]
         for family in (socket.AF_INET, socket.AF_INET6)]
connections = [socket.create_connection(each[4][:2], 10) for each in found]
for number in range(100_000):
    for connection in connections:
        connection.sendall(b"%d\\n" % number)
        answer = b""
        while not answer.endswith(b"\\n"):
            answer += connection.recv(100) or sys.exit("the connection was cut")
    print(int(answer), flush=True)
    time.sleep(0.02)
"""


def sandboxed(debian: Container, *command: str, workspace: str = "lab", user: str = "lab"):  # type: ignore[no-untyped-def]
    return debian.run(["egressctl", "run", "-w", workspace, "--", *command], user=user)


def fetched(debian: Container, host: str) -> str:
    """ "fetched", or what curl says instead."""
    got = sandboxed(debian, "curl", "-sS", "--max-time", "10", f"http://{host}/")
    return "fetched" if got.status == 0 else got.err.strip()


def counted(debian: Container) -> dict[str, int]:
    """Packets that the stream's workspace has sent, to each of what it may reach; the books balance."""
    read = debian.run(["egressctl", "--json", "counters", "stream"]).check().out
    (workspace,) = json.loads(read)["workspaces"]
    return {host["host"]: host["out"][0] for host in workspace["hosts"]}


def recorded(debian: Container, event: str, **fields: object) -> list[dict[str, object]]:
    """What such records of the journal say, those with these values in them, oldest first."""
    lines = debian.run(["egressctl", "--json", "audit", "--event", event]).check().out.splitlines()
    found = [json.loads(line)["fields"] for line in lines]
    return [each for each in found if fields.items() <= each.items()]


def more_recorded(debian: Container, event: str, before: int, **fields: object) -> dict[str, object]:
    """What the one record says that there is beyond so many."""
    found = poll(lambda: recorded(debian, event, **fields)[before:], timeout=15, what=f"a record of {event}")
    assert len(found) == 1
    return dict(found[0])


def listeners(debian: Container) -> list[str]:
    """Where something listens, by the inodes of the sockets: at the host's control socket, in the gateway."""
    control = debian.shell("ss -xlnH src /run/egressd/control.sock").split()[5]
    gateway = debian.shell("nsenter --net=/run/netns/egressd ss -lntuHe 2>/dev/null | grep -o 'ino:[0-9]*'")
    return [control, *sorted(gateway.split())]


@pytest.fixture
def stream(debian: Container):  # type: ignore[no-untyped-def]
    """A sandbox that talks to the allowed host, without a pause."""
    debian.write("etc/egressd/workspaces/stream.yaml", POLICY)
    debian.run(["egressctl", "policy", "apply"]).check()
    process = debian.start(["egressctl", "run", "-w", "stream", "--", "python3", "-c", STREAM], user="lab")
    poll(lambda: answers(process) > 5, timeout=20, what="the first answers")
    yield process
    process.kill()


def answers(process: Process) -> int:
    assert process.status() is None, process.err
    return len(process.out.splitlines())


def goes_on(process: Process) -> None:
    """More is answered, over the connection that it began with."""
    so_far = answers(process)
    poll(lambda: answers(process) > so_far + 25, timeout=20, what="more answers")
    assert process.err == ""


def enforcing(debian: Container) -> bool:
    return debian.run(["egressctl", "status"]).status == 0


# ---- installation


def test_it_is_installed_by_its_package_alone_and_does_nothing_yet(debian: Container, package: Path) -> None:
    debian.write("root/egressd.deb", package.read_bytes())
    debian.shell("apt-get install -y /root/egressd.deb", timeout=300)
    assert debian.run(["systemctl", "is-enabled", *UNITS]).out.split() == ["disabled", "static", "disabled"]
    assert debian.run(["systemctl", "is-active", *UNITS]).out.split() == ["inactive"] * 3
    assert debian.run(["ip", "netns"]).out == ""
    assert debian.shell("nft list ruleset") == ""
    assert debian.shell("stat -c '%a %U %G' /var/lib/egressd/journal /etc/egressd/workspaces") == (
        "750 egressd-audit egressd-audit\n750 root egressd\n"
    )


def test_what_it_brings_is_whole(debian: Container) -> None:
    assert debian.run(["dpkg", "--verify", "egressd"]).out == ""
    assert debian.shell("egressd --check") == "/etc/egressd/egressd.yaml: ok\n"
    assert debian.shell("ls /usr/share/man/man*/egress* | wc -l") == "4\n"
    # Nothing is left to be compiled, and nothing knows where it was built.
    assert debian.shell("find /usr/lib/egressd -name '*.py' | wc -l") == debian.shell(
        "find /usr/lib/egressd -name '*.pyc' | wc -l"
    )
    assert debian.run(["grep", "-rIl", str(PROJECT), "/usr/lib/egressd", "/lib/systemd/system"]).out == ""


def test_systemd_finds_nothing_wrong_with_the_units(debian: Container) -> None:
    files = [f"/lib/systemd/system/{name}.service" for name in UNITS]
    result = debian.run(["systemd-analyze", "verify", "--man=no", *files])
    assert (result.status, result.out + result.err) == (0, "")


@pytest.mark.parametrize("hardened", [True, False])
def test_a_hardened_unit_cannot_mount_for_the_host_not_even_with_a_plus(
    debian: Container, hardened: bool
) -> None:
    """Why egressd-foundation is a unit of its own."""
    directive = "ProtectSystem=strict\n" if hardened else ""
    unit = f"[Service]\nType=oneshot\n{directive}ExecStart=+/bin/mount -t tmpfs pinned /mnt\n"
    debian.write("etc/systemd/system/pins.service", unit)
    debian.shell("systemctl daemon-reload; systemctl start pins")
    seen = debian.shell("cat /proc/self/mounts")
    assert ("pinned /mnt" in seen) is not hardened
    debian.path("etc/systemd/system/pins.service").unlink()
    debian.shell("mountpoint -q /mnt && umount /mnt; systemctl daemon-reload")


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_unit_could_do_is_no_more_than_is_written_down(debian: Container, unit: str) -> None:
    judged = debian.run(["systemd-analyze", "security", "--no-pager", unit]).out
    figure = judged.rsplit("service: ", 1)[1].split()[0]
    assert round(float(figure) * 10) <= EXPOSURE[unit], judged


def test_it_is_made_ready_by_the_script_that_vagrant_uses(debian: Container) -> None:
    debian.write("root/provision.sh", Path(PROJECT, "packaging/provision.sh").read_bytes(), mode=0o755)
    said = debian.run(PROVISION, timeout=300).check().out
    assert said.endswith("provision: starting egressd\nprovision: guard is ready\n")
    assert debian.run(["systemctl", "is-active", "egressd"]).out == "active\n"
    assert debian.run(["systemctl", "is-enabled", "egressd"]).out == "enabled\n"
    assert enforcing(debian)


def test_said_twice_the_script_changes_nothing(debian: Container) -> None:
    before = debian.property("egressd", "MainPID")
    said = debian.run(PROVISION, timeout=300).check().out
    assert "installing" not in said
    assert "starting" not in said
    assert debian.property("egressd", "MainPID") == before


# ---- work


def test_a_user_reaches_what_is_allowed_and_nothing_else(debian: Container, internet: Internet) -> None:
    assert fetched(debian, "allowed.lab") == "fetched"
    assert "Could not resolve host" in fetched(debian, "forbidden.lab")
    denied = sandboxed(debian, "curl", "-sS", "--max-time", "10", f"http://{FORBIDDEN}/")
    assert denied.status == 7, denied.err  # refused, and not timed out
    assert denied.seconds < 8
    assert [seen.address for seen in internet.seen(port=80)] in ([ALLOWED], [ALLOWED6])


def test_who_is_no_member_is_refused_and_the_log_says_so_in_fields(debian: Container) -> None:
    refused = sandboxed(debian, "true", user="nobody")
    assert refused.status == 125
    assert "not a member" in refused.err
    found = poll(lambda: debian.journal("EGRESSD_EVENT=spawn-refused"), timeout=10, what="the entry")
    entry = json.loads(found.splitlines()[-1])
    told = {name: entry.get(name) for name in ("WORKSPACE", "PRIORITY", "EGRESSD_PROCESS", "EGRESSD_UID")}
    assert told == {
        "WORKSPACE": "lab",
        "PRIORITY": "4",
        "EGRESSD_PROCESS": "controller",
        "EGRESSD_UID": "65534",
    }
    assert entry["_SYSTEMD_UNIT"] == "egressd.service"
    assert entry["SYSLOG_IDENTIFIER"] == "egressd"
    same = debian.journal(f"MESSAGE_ID={entry['MESSAGE_ID']}").splitlines()
    assert {json.loads(line)["EGRESSD_EVENT"] for line in same} == {"spawn-refused"}


def test_what_processes_say_has_their_name_and_a_priority(debian: Container) -> None:
    lines = debian.journal("-u", "egressd", "EGRESSD_PROCESS=supervisor").splitlines()
    entries = [json.loads(line) for line in lines]
    enforcing_ = next(entry for entry in entries if entry["MESSAGE"].startswith("enforcing"))
    assert (enforcing_["PRIORITY"], enforcing_["CODE_FUNC"]) == ("6", "_announce")


def test_everything_that_it_needs_is_there(debian: Container) -> None:
    found = json.loads(debian.run(["egressctl", "--json", "doctor"]).check().out)
    assert found["healthy"]
    others = {each["need"]: each["result"] for each in found["findings"] if each["result"] != "ok"}
    # The clock is the machine's, a root that nobody has logged in as has no control group, and nobody has
    # asked for a broker.
    assert others == {
        "a clock that is right": "warning",
        "limits of memory and processes for a sandbox as a whole": "warning",
        "a configuration": "not tested",
    }


def test_no_way_out_is_found(debian: Container) -> None:
    found = json.loads(debian.run(["egressctl", "--json", "selftest", "-w", "lab"], user="lab").check().out)
    assert (found["escaped"], found["unclear"]) == (0, 0)
    assert found["refused"] == found["tried"] > 500
    assert found["recorded"]


@pytest.mark.parametrize(
    ("damage", "look"),
    [
        ("nft flush ruleset", "nft list table inet egressd_host"),
        (
            "ip link set egw down",
            "ip -6 route show dev egw | grep -q fd53 && ip link show egw up | grep -q egw",
        ),
        ("sysctl -qw net.ipv4.conf.up0.forwarding=0", "test $(sysctl -n net.ipv4.conf.up0.forwarding) = 1"),
    ],
)
def test_the_host_is_put_right_below_the_units_hardening(debian: Container, damage: str, look: str) -> None:
    before = len(recorded(debian, "host-mended"))
    debian.shell(damage)
    poll(lambda: debian.run(["bash", "-c", look]).status == 0, timeout=30, what="the host's side")
    assert more_recorded(debian, "host-mended", before)["restored"]
    assert fetched(debian, "allowed.lab") == "fetched"


BROKER = """\
issuers:
  okta: {issuer: https://acme.okta.com/oauth2/default, audience: 0oa1b2c3}
workspaces:
  lab:
    inferences:
      default: {command: [python3, -c, "print(1)"]}
"""


@pytest.mark.slow
def test_the_broker_answers_below_its_own_hardening_and_feeds_its_watchdog(debian: Container) -> None:
    debian.write("etc/egressd/broker.yaml", BROKER)
    debian.shell("sed -i 's/user:lab]/user:lab, user:egressd-broker]/' /etc/egressd/workspaces/lab.yaml")
    debian.shell("egressctl policy apply && systemctl start egressd-broker", timeout=90)
    said = debian.shell("egressctl member add -w lab user:okta:00u1 --role owner --clearance secret")
    assert said == "user:okta:00u1 is owner, cleared for secret in lab\n"
    assert debian.property("egressd-broker", "DelegateControllers") == "cpu memory pids"
    answered = debian.property("egressd-broker", "WatchdogTimestampMonotonic")
    poll(
        lambda: debian.property("egressd-broker", "WatchdogTimestampMonotonic") != answered,
        timeout=14,
        what="a sign of life",
    )
    debian.shell("systemctl stop egressd-broker")
    assert debian.property("egressd-broker", "Result") == "success"


# ---- restarts


def test_a_restart_keeps_sandboxes_and_their_connections(debian: Container, stream: Process) -> None:
    main, sockets, sent = debian.property("egressd", "MainPID"), listeners(debian), counted(debian)
    resumed = len(recorded(debian, "sandbox-resumed", workspace="stream"))
    assert int(debian.property("egressd", "NFileDescriptorStore")) == 12
    debian.run(["systemctl", "restart", "egressd"]).check()
    assert debian.property("egressd", "MainPID") != main
    assert "is: restart" in debian.journal("-u", "egressd")
    goes_on(stream)
    more_recorded(debian, "sandbox-resumed", resumed, workspace="stream")
    assert counted(debian)["allowed.lab"] > sent["allowed.lab"] + 50  # 25 answers in each family
    assert listeners(debian) == sockets
    assert len(sockets) == 9
    assert int(debian.property("egressd", "NFileDescriptorStore")) == 12
    assert enforcing(debian)
    assert fetched(debian, "allowed.lab") == "fetched"


SLOWLY = "[Service]\nExecStartPre=/bin/sleep 3\n"


def test_who_comes_during_a_restart_waits_and_is_served(debian: Container, stream: Process) -> None:
    debian.write("etc/systemd/system/egressd.service.d/slowly.conf", SLOWLY)
    debian.shell("systemctl daemon-reload; systemctl restart --no-block egressd")
    poll(lambda: debian.property("egressd", "SubState") == "start-pre", timeout=20, what="nobody is there")
    client = debian.start(["egressctl", "run", "-w", "lab", "--", "echo", "served"], user="lab")
    goes_on(stream)
    assert debian.property("egressd", "SubState") == "start-pre"
    assert client.status() is None
    assert client.wait(60) == 0, client.err
    assert client.out == "served\n"
    debian.path("etc/systemd/system/egressd.service.d/slowly.conf").unlink()
    debian.shell("systemctl daemon-reload")
    goes_on(stream)


def test_killed_it_is_started_again_and_sandboxes_stay(debian: Container, stream: Process) -> None:
    main, sockets, sent = debian.property("egressd", "MainPID"), listeners(debian), counted(debian)
    resumed = len(recorded(debian, "sandbox-resumed", workspace="stream"))
    debian.run(["kill", "-KILL", main]).check()
    poll(
        lambda: debian.property("egressd", "MainPID") not in (main, "0") and enforcing(debian),
        timeout=60,
        what="another supervisor",
    )
    goes_on(stream)
    more_recorded(debian, "sandbox-resumed", resumed, workspace="stream")
    assert counted(debian)["allowed.lab"] > sent["allowed.lab"]
    assert listeners(debian) == sockets


def test_a_gateway_that_cannot_be_adopted_begins_anew_below_the_units_hardening(
    debian: Container, stream: Process
) -> None:
    """As after an upgrade whose rules are built otherwise."""
    lost = len(recorded(debian, "sandbox-lost", workspace="stream"))
    begun_before = len(recorded(debian, "gateway-begun"))
    debian.shell("rm /run/egressd/gateway.json; systemctl restart egressd", timeout=90)
    assert stream.wait(30) != 0
    assert debian.property("egressd-foundation", "Result") == "success"
    record = more_recorded(debian, "sandbox-lost", lost, workspace="stream")
    assert "there is no word" in str(record["why"])
    begun = more_recorded(debian, "gateway-begun", begun_before)
    assert begun["links"] == 1
    assert fetched(debian, "allowed.lab") == "fetched"


@pytest.mark.slow
def test_what_hangs_is_killed_and_started_again_and_sandboxes_stay(
    debian: Container, stream: Process
) -> None:
    before = debian.property("egressd", "MainPID")
    debian.run(["kill", "-STOP", before]).check()
    poll(
        lambda: debian.property("egressd", "MainPID") not in (before, "0") and enforcing(debian),
        timeout=90,
        what="another supervisor",
    )
    assert "Watchdog timeout" in debian.journal("-u", "egressd")
    goes_on(stream)


@pytest.mark.slow
def test_an_upgrade_keeps_sandboxes_and_the_configuration(
    debian: Container, stream: Process, newer: Path
) -> None:
    before = debian.property("egressd", "MainPID"), debian.shell("cat /etc/egressd/egressd.yaml")
    debian.write("root/newer.deb", newer.read_bytes())
    debian.shell("dpkg --install /root/newer.deb", timeout=300)
    assert debian.shell("dpkg-query -W -f '${Version}' egressd") == "99"
    poll(lambda: enforcing(debian), timeout=60, what="egressd of the new version")
    assert debian.property("egressd", "MainPID") != before[0]
    assert debian.shell("cat /etc/egressd/egressd.yaml") == before[1]
    goes_on(stream)


@pytest.mark.slow
def test_the_signing_key_may_be_systemds(debian: Container, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    public = subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout"], check=True, capture_output=True, text=True
    ).stdout
    debian.write("etc/credstore/egressd-journal-key", key.read_bytes(), mode=0o600)
    credential = "[Service]\nLoadCredential=egressd-journal-key:/etc/credstore/egressd-journal-key\n"
    debian.write("etc/systemd/system/egressd.service.d/key.conf", credential)
    debian.shell("systemctl daemon-reload; systemctl restart egressd", timeout=90)
    assert enforcing(debian)
    assert debian.shell("egressctl key show --pem") == public
    assert "key-rotated" in debian.journal("EGRESSD_EVENT=key-rotated")
    # No process of egressd's can read it where systemd keeps it, but root's.
    kept = "/run/credentials/egressd.service/egressd-journal-key"
    assert debian.run(["cat", kept], user="egressd-audit").status != 0


# ---- the end of the service, and of the machine


def test_a_stop_ends_sandboxes_and_keeps_the_denial(debian: Container, stream: Process) -> None:
    debian.run(["systemctl", "stop", "egressd"]).check()
    assert stream.wait(20) != 0
    assert debian.run(["ip", "netns"]).out.split()[:1] == ["egressd"]
    assert "is: stop" in debian.journal("-u", "egressd")
    assert debian.property("egressd", "NFileDescriptorStore") == "0"
    assert sandboxed(debian, "true").status == 125
    debian.run(["systemctl", "start", "egressd"], timeout=90).check()
    assert fetched(debian, "allowed.lab") == "fetched"


def test_who_takes_the_denial_away_is_on_record(debian: Container) -> None:
    before = len(recorded(debian, "gateway-dismantled"))
    assert "running already" in debian.run(["egressd", "--dismantle"]).err
    debian.shell("systemctl stop egressd; egressd --dismantle", timeout=90)
    assert debian.run(["ip", "netns"]).out == ""
    debian.run(["systemctl", "start", "egressd"], timeout=90).check()
    assert more_recorded(debian, "gateway-dismantled", before)["uid"] == 0
    assert fetched(debian, "allowed.lab") == "fetched"


EARLY = """\
[Unit]
Description=Tries to get out, from as early on as anything runs
DefaultDependencies=no
After=second-proc.service

[Service]
User=lab
ExecStart=/bin/bash -c 'while true; do egressctl run -w lab -- bash -c "curl -sm 2 http://{forbidden}/; \\
    curl -sm 2 http://allowed.lab/ >/dev/null && echo allowed"; echo "status $?"; sleep 0.1; done'
StandardOutput=append:/var/tmp/early

[Install]
WantedBy=sysinit.target
"""


@pytest.mark.slow
def test_after_a_boot_there_is_no_moment_without_rules(debian: Container, internet: Internet) -> None:
    debian.write("etc/systemd/system/early.service", EARLY.format(forbidden=FORBIDDEN))
    debian.shell("systemctl daemon-reload; systemctl enable early")
    assert debian.reboot() == "running"
    assert debian.run(["systemctl", "is-active", "egressd"]).out == "active\n"
    tried = poll(
        lambda: "allowed" in (text := debian.path("var/tmp/early").read_text()) and text,
        timeout=30,
        what="a sandbox that may reach something",
    )
    debian.shell("systemctl disable --now early")
    assert "status 125\n" in tried.partition("allowed")[0]  # it did begin before egressd
    assert internet.seen(address=FORBIDDEN) == []
    assert internet.seen(address=ALLOWED) + internet.seen(address=ALLOWED6) != []


@pytest.mark.slow
def test_a_machine_that_lost_its_power_starts_again(debian: Container) -> None:
    debian.pull_the_plug()
    assert debian.boot() == "running"
    assert enforcing(debian)
    assert fetched(debian, "allowed.lab") == "fetched"


# ---- removal


def test_removed_it_has_put_back_everything(debian: Container, stream: Process) -> None:
    debian.shell("apt-get remove -y egressd", timeout=120)
    assert stream.wait(20) != 0
    assert debian.run(["ip", "netns"]).out == ""
    assert debian.shell("nft list ruleset") == ""
    assert "egw" not in debian.shell("ip -brief link")
    assert debian.shell("ip route show type unreachable; ip -6 route show type unreachable table main") == ""
    assert debian.shell("sysctl -n net.ipv4.ip_forward net.ipv4.conf.up0.forwarding") == "0\n0\n"
    assert debian.run(["systemctl", "list-unit-files", "--no-legend", "egressd*"]).out == ""
    assert debian.run(["systemctl", "list-units", "--no-legend", "egressd*"]).out == ""
    assert debian.run(["pgrep", "-f", "egressd.processes"]).out == ""
    assert debian.shell("ls /etc/egressd /var/lib/egressd | head -n 20") != ""  # its files are kept


def test_purged_it_leaves_nothing(debian: Container) -> None:
    debian.shell("apt-get purge -y egressd", timeout=120)
    places = "/etc /usr /lib/systemd /var/lib /run"
    found = debian.shell(
        f"find {places} -xdev -name '*egressd*' -not -path '*/sysusers*' -not -path '/var/lib/dpkg/*'"
        " -not -path '/etc/systemd/system/egressd.service.d*' -not -path '/run/systemd/*'"
        " -not -path '/etc/credstore/*'"
    )
    assert found == ""
    assert debian.run(["systemctl", "is-system-running"]).out == "running\n"
