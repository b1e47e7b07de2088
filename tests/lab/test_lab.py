"""The lab judges everything else, so it is judged first: it answers, it sees, it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import dnslib
import pytest

from lab import topology
from lab.capture import Capture
from lab.internet import Internet, start_internet
from lab.machine import TESTS, Lab, LabError, closed_to_others, open_descriptors, poll

pytestmark = pytest.mark.kernel
BOTH = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


def fetch(lab: Lab, url: str, *options: str) -> tuple[int, str]:
    """curl in lab-host: its exit status and what it got. A dead address costs it half a second."""
    argv = ["curl", "-sS", "--max-time", "3", "--connect-timeout", "0.5", "--cacert", lab.inside("ca.pem")]
    result = lab.run([*argv, *options, url])
    return result.status, result.out


# ---- names


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("server", [topology.DNS4, topology.DNS6])
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("eu.api.openai.test", "A", ["11.22.33.10"]),
        ("eu.api.openai.test", "AAAA", ["2a10:5353::10"]),
        ("EU.api.OpenAI.test", "A", ["11.22.33.10"]),
        ("anything.search.test", "A", ["11.22.33.40"]),
        ("six.test", "A", []),
        ("many.test", "A", [f"11.22.33.{128 + n}" for n in range(8)]),
        ("alias.test", "AAAA", ["plain.test.", "2a10:5353::30"]),
        ("not-there.test", "A", None),
    ],
)
def test_names_resolve(
    lab: Lab,
    internet: Internet,
    server: object,
    transport: str,
    name: str,
    kind: str,
    expected: list[str] | None,
) -> None:
    reply = ask(lab, str(server), name, kind, tcp=transport == "tcp")
    if expected is None:
        assert reply.header.rcode == dnslib.RCODE.NXDOMAIN
    else:
        assert [str(record.rdata) for record in reply.rr] == expected
    assert internet.queries() == [(name, kind)]


def ask(lab: Lab, server: str, name: str, kind: str, *, tcp: bool = False) -> dnslib.DNSRecord:
    """A question from lab-host, with sockets of our own: what arrives is exactly this."""
    query = dnslib.DNSRecord.question(name, kind).pack()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with lab.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        sock.connect((server, 53))
        sock.sendall(len(query).to_bytes(2, "big") + query if tcp else query)
        data = sock.recv(65535)[2 if tcp else 0 :]
    return dnslib.DNSRecord.parse(data)


def test_names_change_while_it_runs(lab: Lab, internet: Internet) -> None:
    internet.set("new.test", A=["11.22.33.77"])
    assert str(ask(lab, str(topology.DNS4), "new.test", "A").a.rdata) == "11.22.33.77"
    internet.set("new.test")
    assert ask(lab, str(topology.DNS4), "new.test", "A").header.rcode == dnslib.RCODE.NXDOMAIN


def test_servers_misbehave_on_request(lab: Lab, internet: Internet) -> None:
    assert ask(lab, str(topology.DNS4), "broken.test", "A").header.rcode == dnslib.RCODE.SERVFAIL
    assert ask(lab, str(topology.DNS4), "long.test", "TXT").header.tc == 1
    assert ask(lab, str(topology.DNS4), "long.test", "TXT", tcp=True).header.tc == 0
    internet.set("plain.test", topology.Records({"A": ["11.22.33.30"]}, truncate=True))
    assert ask(lab, str(topology.DNS4), "plain.test", "A").header.tc == 1
    with pytest.raises(TimeoutError):
        ask(lab, str(topology.DNS4), "mute.test", "A")


def test_the_host_resolves_through_the_lab_only(lab: Lab, internet: Internet) -> None:
    assert lab.run(["getent", "ahostsv4", "plain.test"]).out.split()[0] == "11.22.33.30"
    assert ("plain.test", "A") in internet.queries()


def test_other_resolvers_answer_too_so_that_a_leak_shows(lab: Lab, internet: Internet) -> None:
    for server in (topology.OTHER_DNS4, topology.OTHER_DNS6):
        assert ask(lab, str(server), "evil.test", "A").a.rdata is not None
    asked_at = [entry.address for entry in internet.seen(port=53)]
    assert asked_at == [str(topology.OTHER_DNS4), str(topology.OTHER_DNS6)]


# ---- servers


@BOTH
@pytest.mark.parametrize("host", ["eu.api.openai.test", "one.cdn.test", "two.cdn.test", "evil.test"])
def test_tls_chains_verify(lab: Lab, internet: Internet, host: str, family: str) -> None:
    status, body = fetch(lab, f"https://{host}/", f"--{family}")
    assert status == 0
    assert body.startswith(f"{host} at ")
    (entry,) = internet.seen(port=443)
    assert entry.name == host


def test_tls_without_the_lab_authority_is_refused(lab: Lab, internet: Internet) -> None:
    assert lab.run(["curl", "-sS", "https://eu.api.openai.test/"]).status == 60  # curl(1): peer not verified
    assert internet.seen(port=443) != [], "a failed handshake is a connection all the same"


def test_a_certificate_is_not_good_for_another_name(lab: Lab, internet: Internet) -> None:
    status, _ = fetch(lab, "https://one.cdn.test/", "--connect-to", "one.cdn.test:443:two.cdn.test:443")
    assert status == 0, "one address serves both names"
    script = (
        "import socket, ssl\n"
        f"context = ssl.create_default_context(cafile={lab.inside('ca.pem')!r})\n"
        "sock = socket.create_connection(('11.22.33.20', 443))\n"
        "context.check_hostname = False\n"
        "tls = context.wrap_socket(sock, server_hostname='one.cdn.test')\n"
        "print(tls.getpeercert()['subjectAltName'])\n"
    )
    assert lab.run([sys.executable, "-c", script]).check().out.strip() == "(('DNS', 'one.cdn.test'),)"


def test_dns_over_tls(lab: Lab, internet: Internet) -> None:
    script = (
        "import socket, ssl, sys\n"
        f"context = ssl.create_default_context(cafile={lab.inside('ca.pem')!r})\n"
        "sock = socket.create_connection(('10.3.0.2', 853))\n"
        "tls = context.wrap_socket(sock, server_hostname='dns.lab.test')\n"
        "query = sys.stdin.buffer.read()\n"
        "tls.sendall(len(query).to_bytes(2, 'big') + query)\n"
        "sys.stdout.write(tls.recv(65535)[2:].hex())\n"
    )
    query = dnslib.DNSRecord.question("plain.test", "A").pack()
    out = lab.run([sys.executable, "-c", script], stdin=query).check().out
    assert str(dnslib.DNSRecord.parse(bytes.fromhex(out)).a.rdata) == "11.22.33.30"
    assert internet.queries() == [("plain.test", "A")]


def test_the_api_speaks_openai(lab: Lab, internet: Internet) -> None:
    asked = json.dumps({"model": "lab-1", "messages": [{"role": "user", "content": "hello"}]})
    _, body = fetch(lab, "https://eu.api.openai.test/v1/chat/completions", "-d", asked)
    assert json.loads(body)["choices"][0]["message"]["content"] == "You said: hello"
    streamed = json.dumps(json.loads(asked) | {"stream": True})
    _, body = fetch(lab, "https://eu.api.openai.test/v1/chat/completions", "-d", streamed)
    assert body.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    "address", [topology.PLAIN4, topology.PLAIN6, topology.METADATA4, topology.METADATA6]
)
def test_every_address_echoes(lab: Lab, internet: Internet, address: object) -> None:
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with lab.socket(family, kind) as sock:
            sock.settimeout(2.0)
            sock.connect((str(address), 7))
            sock.send(b"ping")
            assert sock.recv(16) == b"ping"
    seen = internet.seen(address=address, port=7)
    assert [(entry.protocol, entry.data) for entry in seen] == [("tcp", "ping"), ("udp", "ping")]


def test_closed_ports_and_silent_addresses(lab: Lab, internet: Internet) -> None:
    with lab.socket(socket.AF_INET) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect((str(topology.PLAIN4), 81))
    for family, address in ((socket.AF_INET, topology.SILENT4), (socket.AF_INET6, topology.SILENT6)):
        with lab.socket(family) as sock, pytest.raises(TimeoutError):
            sock.settimeout(0.2)
            sock.connect((str(address), 80))
    assert internet.seen() == []


def test_the_host_has_an_ollama_and_secrets(lab: Lab, host_services: Internet) -> None:
    asked = json.dumps({"model": "lab-1", "messages": [{"role": "user", "content": "hi"}], "stream": False})
    _, body = fetch(lab, "http://127.0.0.1:11434/api/chat", "-d", asked)
    assert json.loads(body)["message"]["content"] == "You said: hi"
    for url in ("http://127.0.0.1:9999/", "http://10.3.0.1:9998/", "http://[2001:db8:3::1]:9997/"):
        assert fetch(lab, url) == (0, topology.SECRET.decode() + "\n")
    assert len(host_services.seen()) == 4


# ---- the judge


def test_the_capture_sees_exactly_what_was_sent(lab: Lab, internet: Internet, uplink: Capture) -> None:
    marker = os.urandom(8).hex().encode()
    with lab.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(100):
            sock.sendto(marker, (str(topology.EVIL4), 9))
    with lab.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.sendto(marker, (str(topology.EVIL6), 9))
    sent = uplink.holding(marker)
    assert len(sent) == len(uplink.frames(outgoing=True)) == 101
    assert [len(uplink.to(address, port=9)) for address in (topology.EVIL4, topology.EVIL6)] == [100, 1]
    assert sent[0].transport[8:] == sent[-1].transport[8:] == marker
    assert {str(frame.source) for frame in sent} == {str(topology.HOST4), str(topology.HOST6)}
    assert len(internet.seen(port=9)) >= 101


def test_the_capture_condemns(lab: Lab, internet: Internet, uplink: Capture) -> None:
    uplink.assert_quiet()
    with lab.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"a-secret", (str(topology.EVIL4), 9))
    verdicts: list[Callable[[], None]] = [
        uplink.assert_quiet,
        lambda: uplink.assert_never(b"a-secret"),
        lambda: uplink.assert_nothing_to(topology.EVIL4),
        lambda: uplink.assert_only_to(topology.DNS4),
    ]
    for verdict in verdicts:
        with pytest.raises(AssertionError):
            verdict()
    uplink.assert_never(b"another-secret")
    uplink.assert_nothing_to(topology.EVIL6)
    uplink.assert_only_to(topology.EVIL4)


def test_an_idle_uplink_carries_nothing(lab: Lab, uplink: Capture) -> None:
    assert fetch(lab, "http://127.0.0.1:11434/")[0] == 0, "loopback stays on loopback"
    uplink.assert_quiet()


def test_a_saved_capture_is_a_pcap_file(
    lab: Lab, internet: Internet, uplink: Capture, tmp_path: Path
) -> None:
    ask(lab, str(topology.DNS4), "plain.test", "A")
    uplink.settle()
    uplink.save(tmp_path / "uplink.pcap")
    from scapy.layers.dns import DNS
    from scapy.utils import rdpcap

    names = [packet[DNS].qd[0].qname for packet in rdpcap(str(tmp_path / "uplink.pcap")) if DNS in packet]
    assert names == [b"plain.test.", b"plain.test."]


# ---- processes, and the end


def test_commands_run_as_who_and_where_they_should(lab: Lab) -> None:
    assert lab.run(["id", "-u"]).out.strip() == "0"
    assert lab.run(["id", "-u"], uid=lab.user).out.strip() == str(lab.user)
    assert lab.run(["sh", "-c", "echo $1; exit 7", "sh", "out"]).status == 7
    assert lab.run(["sh", "-c", "kill -9 $$"]).status == -signal.SIGKILL
    assert lab.run(["cat"], stdin="through").out == "through"
    assert lab.run(["no-such-program"]).status == 127
    assert "net0" in lab.links(topology.NET)
    assert "net0" not in lab.links(topology.HOST)
    assert lab.run(["hostname"]).out.strip() == topology.HOST
    with pytest.raises(LabError, match="still runs"):
        lab.run(["sleep", "60"], timeout=0.05)


def test_a_process_in_a_namespace_of_its_own_is_found(lab: Lab) -> None:
    process = lab.start(["unshare", "--net", "--fork", "--kill-child", "sleep", "60"])
    path = lab.namespace_below(process.pid)
    assert lab.links(path).keys() == {"lo"}
    with lab.socket(socket.AF_INET, where=path) as sock, pytest.raises(OSError, match="unreachable"):
        sock.connect((str(topology.ROUTER4), 80))
    process.kill()
    with pytest.raises(LabError, match="not within"):
        lab.namespace_below(process.pid, timeout=0.05)


def test_what_is_left_behind_is_found(lab: Lab) -> None:
    with pytest.raises(AssertionError, match="link dangling"), lab.leaving_nothing(within=0.1):
        lab.run(["ip", "link", "add", "dangling", "type", "veth", "peer", "name", "other"]).check()
    lab.run(["ip", "link", "del", "dangling"]).check()


def test_the_machine_sees_nothing_of_it(lab: Lab, no_leaks: None) -> None:
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert topology.UPLINK not in links
    assert not Path("/run/netns", topology.HOST).exists()
    assert lab.run(["ls", "/run/netns"]).out.split() == [topology.HOST, topology.NET]
    assert not Path(lab.directory, "ca.pem").exists()


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children} | {
        deep for child in children for deep in descendants(int(child))
    }


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_stop_ends_everything() -> None:
    before = open_descriptors()
    lab = Lab()
    start_internet(lab)
    lab.start(["sh", "-c", "setsid sleep 600 & trap '' TERM; sleep 600"])
    pids = descendants(lab._keeper.pid) | {lab._keeper.pid}
    assert len(pids) >= 5
    lab.stop()
    assert gone(pids), "stop() returns when it is gone"
    assert open_descriptors() == before


def test_sigkill_of_the_owner_ends_everything(tmp_path: Path) -> None:
    script = (
        "from lab.machine import Lab\nfrom lab.internet import start_internet\nimport time\n"
        "lab = Lab(); start_internet(lab); lab.start(['setsid', 'sleep', '600'])\n"
        "print(lab._keeper.pid, flush=True); time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )
    assert owner.stdout is not None
    keeper = int(owner.stdout.readline())
    pids = descendants(keeper) | {keeper}
    assert len(pids) >= 4
    owner.kill()
    owner.wait()
    owner.stdout.close()
    poll(lambda: gone(pids), timeout=2.0, what="the lab ends with its owner")


# ---- without root


def test_a_directory_closed_to_others_is_named() -> None:
    # not tmp_path: what pytest has above it, it closes to others whenever it starts
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        inner = Path(name) / "open" / "closed" / "deep"
        inner.mkdir(parents=True)
        Path(name).chmod(0o755)
        assert closed_to_others(inner) is None
        inner.parent.chmod(0o750)
        assert closed_to_others(inner) == inner.parent
        assert closed_to_others(inner.parent.parent) is None


def test_it_works_without_root(unprivileged: list[str]) -> None:
    script = (
        "import os\n"
        "from lab.machine import Lab\nfrom lab.internet import start_internet\n"
        "from lab.capture import Capture\n"
        "assert os.geteuid() != 0\n"
        "with Lab() as lab:\n"
        "    internet, _ = start_internet(lab)\n"
        "    with Capture(lab) as uplink:\n"
        "        curl = ['curl', '-sS', '--cacert', lab.inside('ca.pem'), 'https://six.test/']\n"
        "        got = lab.run(curl, uid=lab.user)\n"
        "        print(got.out.strip(), got.err, bool(uplink.to('2a10:5353::30')), lab.rootless)\n"
        "        lab.run(['nft', 'add', 'table', 'inet', 'mine']).check()\n"
    )
    result = subprocess.run(
        [*unprivileged, sys.executable, "-B", "-c", script],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(TESTS)}, timeout=30,
    )  # fmt: skip
    assert result.stdout.strip() == "six.test at 2a10:5353::30  True True", result.stderr
