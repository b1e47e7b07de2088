"""What egressd's ruleset relies on and no manual promises. One fact, one test; Linux 6.18, nft 1.0.6.

Where a fact is a bug or a gap of this version, the test names what we do because of it: when it fails on
a newer one, that can go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from egressd.ipc.messages import MOST_CONNECTIONS
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError
from egressd.ruleset import observe

pytestmark = pytest.mark.kernel
_libc = ctypes.CDLL(None, use_errno=True)
MAP = "type ipv4_addr . inet_proto . inet_service : mark"


@contextlib.contextmanager
def namespace(name: str) -> Iterator[None]:
    with Path("/proc/thread-self/ns/net").open() as before, Path(f"/run/netns/{name}").open() as there:
        assert _libc.setns(there.fileno(), 0) == 0
        try:
            yield
        finally:
            assert _libc.setns(before.fileno(), 0) == 0


@pytest.fixture
def netns() -> Iterator[str]:
    """A namespace `a` with t0 198.51.100.1, whose other end p0 lies in the namespace `b`."""
    name = f"kf-{os.getpid()}"
    for end in ("a", "b"):
        subprocess.run(["ip", "netns", "add", f"{name}{end}"], check=True)
        with namespace(name + end):  # no IPv6: its own chatter would be counted
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    lines = f"link add t0 netns {name}a type veth peer name p0 netns {name}b"
    subprocess.run(["ip", *lines.split()], check=True)
    for end, device, number in (("a", "t0", 1), ("b", "p0", 2)):
        text = f"link set lo up\nlink set {device} arp off\naddr add 198.51.100.{number}/24 dev {device}\n"
        text += f"link set {device} up\n"
        subprocess.run(["ip", "-n", name + end, "-batch", "-"], input=text, text=True, check=True)
    try:
        yield name
    finally:
        for end in ("a", "b"):
            subprocess.run(["ip", "netns", "del", f"{name}{end}"], check=True)


@pytest.fixture
def nft(netns: str) -> Nft:
    with namespace(f"{netns}b"):
        made = Nft()
    made.run(["add table netdev t", "add table inet t"])
    return made


def send(netns: str, address: str = "198.51.100.2", port: int = 9, count: int = 1) -> None:
    with namespace(f"{netns}a"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            with contextlib.suppress(ConnectionRefusedError):
                sock.sendto(b"x", (address, port))


def arrives(count: Callable[[], int], expected: int) -> int:
    """What is counted once it is as many as expected, or after three seconds: a veth hands over its packets
    in a softirq, which on a busy machine has to wait."""
    end = time.monotonic() + 3.0
    while (found := count()) < expected and time.monotonic() < end:
        time.sleep(0.005)
    return found


def guarded(nft: Nft, *rules: str) -> None:
    nft.run(['add chain netdev t c { type filter hook ingress device "p0" priority 0; policy accept; }'])
    nft.run([f"add rule netdev t c {rule}" for rule in rules])


def of(nft: Nft, sort: str, name: str) -> dict[str, object]:
    for entry in nft.list_json()["nftables"]:
        if sort in entry and entry[sort]["name"] == name:
            return dict(entry[sort])
    raise AssertionError(name)


def packets(nft: Nft, name: str, family: str = "netdev") -> int:
    for _ in range(200):
        for entry in nft.list_json()["nftables"]:
            body = entry.get("counter", {})
            if (body.get("name"), body.get("family")) == (name, family) and body["packets"]:
                return int(body["packets"])
        time.sleep(0.002)
    return 0


def test_a_masked_address_can_be_part_of_a_concatenated_lookup(netns: str, nft: Nft) -> None:
    nft.run(["add counter netdev t hit", f"add map netdev t m {{ {MAP}; counter; }}",
             "add element netdev t m { 198.51.100.0 . udp . 9 : 7 }"])  # fmt: skip
    guarded(
        nft,
        "meta mark set ip daddr & 255.255.255.252 . meta l4proto . th dport map @m",
        "meta mark 7 counter name hit",
    )
    send(netns)
    assert packets(nft, "hit") == 1


def test_a_lookup_that_finds_nothing_changes_nothing(netns: str, nft: Nft) -> None:
    nft.run(["add counter netdev t kept", f"add map netdev t m {{ {MAP}; counter; }}"])
    guarded(
        nft,
        "meta mark set 2",
        "meta mark set ip daddr . meta l4proto . th dport map @m",
        "meta mark 2 counter name kept",
    )
    send(netns)
    assert packets(nft, "kept") == 1


def test_elements_of_an_interval_map_count_one_by_one(netns: str, nft: Nft) -> None:
    nft.run([f"add map netdev t m {{ {MAP}; flags interval; counter; }}",
             'add element netdev t m { 198.51.100.0/24 . udp . 9 comment "a" : 7 }',
             'add element netdev t m { 198.51.100.0/24 . udp . 10 comment "b" : 8 }'])  # fmt: skip
    guarded(nft, "meta mark set ip daddr . meta l4proto . th dport map @m")
    send(netns, count=3)

    def counts() -> dict[str, int]:
        elements = of(nft, "map", "m")["elem"]
        return {e["elem"]["comment"]: e["elem"]["counter"]["packets"] for e, _ in elements}  # type: ignore[attr-defined]

    assert arrives(lambda: sum(counts().values()), 3) == 3
    assert counts() == {"a": 3, "b": 0}


def test_matching_in_a_set_counts_without_a_verdict(netns: str, nft: Nft) -> None:
    nft.run(["add set netdev t s { type mark; counter; }", "add element netdev t s { 5 }"])
    guarded(nft, "meta mark set 5", "meta mark @s")
    send(netns, count=2)

    def count() -> int:
        [element] = of(nft, "set", "s")["elem"]  # type: ignore[misc]
        return int(element["elem"]["counter"]["packets"])

    assert arrives(count, 2) == 2


@pytest.mark.parametrize("word", ["destroy table inet t", "destroy element inet t s { 1 }"])
def test_there_is_no_destroy(nft: Nft, word: str) -> None:
    """Hence add-then-delete in `ruleset.build.unlink`."""
    with pytest.raises(KernelError, match="syntax error"):
        nft.run([word])


def test_adding_what_is_there_is_no_error_and_deleting_it_then_is_certain(nft: Nft) -> None:
    for _ in range(2):
        nft.run(["add counter netdev t x", "delete counter netdev t x"])
        nft.run(["add quota netdev t q { over 1 bytes; }", "delete quota netdev t q"])
    nft.run(["add quota netdev t q { over 500 bytes; }"])
    nft.run(["add quota netdev t q { over 1 bytes; }", "delete quota netdev t q"])


def test_the_same_key_with_other_data_is_refused_and_nothing_of_the_batch_stays(nft: Nft) -> None:
    """Hence delete and add for a changed mark, which begins its counter anew."""
    nft.run([f"add map netdev t m {{ {MAP}; }}", "add element netdev t m { 1.1.1.1 . tcp . 1 : 1 }"])
    nft.run(["add element netdev t m { 1.1.1.1 . tcp . 1 : 1 }"])
    with pytest.raises(KernelError, match="File exists"):
        nft.run(["add counter netdev t new", "add element netdev t m { 1.1.1.1 . tcp . 1 : 2 }"])
    assert "new" not in str(nft.list_json())


def test_overlapping_keys_of_an_interval_map_are_refused(nft: Nft) -> None:
    """Hence `plan.want` refuses overlapping cidr rules, with names."""
    nft.run([f"add map netdev t m {{ {MAP}; flags interval; }}"])
    nft.run(["add element netdev t m { 10.0.0.0/8 . tcp . 1 : 1 }"])
    with pytest.raises(KernelError):
        nft.run(["add element netdev t m { 10.2.0.0/16 . tcp . 1 : 2 }"])


def test_a_chain_outlives_its_device_and_takes_the_next_of_that_name(netns: str, nft: Nft) -> None:
    """Hence no link number is used twice, and chains go with their links."""
    nft.run(["add counter netdev t seen"])
    guarded(nft, "counter name seen")
    subprocess.run(["ip", "-n", f"{netns}b", "link", "del", "p0"], check=True)
    if "p0" not in nft.list_text():
        pytest.skip("this kernel takes the chain away with its device")
    command = f"link add t0 netns {netns}a type veth peer name p0 netns {netns}b"
    subprocess.run(["ip", *command.split()], check=True)
    for end, device in (("a", "t0"), ("b", "p0")):
        subprocess.run(["ip", "-n", netns + end, "link", "set", device, "arp", "off", "up"], check=True)
    subprocess.run(["ip", "-n", f"{netns}a", "addr", "add", "198.51.100.1/24", "dev", "t0"], check=True)
    send(netns)
    assert packets(nft, "seen") >= 1


def test_a_chain_may_wait_for_its_device(nft: Nft) -> None:
    """Chain first, device second: no packet ever passes unjudged."""
    nft.run(
        ['add chain netdev t later { type filter hook ingress device "absent" priority 0; policy drop; }']
    )
    assert of(nft, "chain", "later")["policy"] == "drop"


def test_json_does_not_tell_the_device_but_the_text_does(nft: Nft) -> None:
    """Hence `observe.parse` takes the text of `list chains` as well."""
    guarded(nft, "accept")
    assert of(nft, "chain", "c").get("dev") is None
    assert 'device "p0"' in nft.list_chains()


def test_only_the_text_tells_for_certain_that_a_table_sleeps(nft: Nft) -> None:
    """1.0.6's JSON prints what lies in memory as the flags, or nothing. And saying it again wakes it."""
    nft.run(["add table netdev t { flags dormant; }"])
    assert "\tflags dormant" in nft.list_chains()
    nft.run(["add table netdev t"])
    assert "flags" not in nft.list_chains()


def test_the_terse_listing_has_no_elements(nft: Nft) -> None:
    nft.run([f"add map netdev t m {{ {MAP}; }}", "add element netdev t m { 1.1.1.1 . tcp . 1 : 1 }"])
    assert "1.1.1.1" in nft.list_text()
    assert "1.1.1.1" not in nft.list_chains()


def test_flushing_a_chain_keeps_named_counters_and_replacing_an_element_does_not(
    netns: str, nft: Nft
) -> None:
    nft.run(["add counter netdev t seen", f"add map netdev t m {{ {MAP}; counter; }}",
             "add element netdev t m { 198.51.100.2 . udp . 9 : 7 }"])  # fmt: skip
    rules = ("counter name seen", "meta mark set ip daddr . meta l4proto . th dport map @m")
    guarded(nft, *rules)
    send(netns, count=2)
    assert packets(nft, "seen") == 2
    nft.run(["flush chain netdev t c", *(f"add rule netdev t c {rule}" for rule in rules)])
    assert packets(nft, "seen") == 2
    assert _element(nft) == 2
    nft.run(["add element netdev t m { 198.51.100.3 . udp . 9 : 7 }"])
    nft.run(["delete element netdev t m { 198.51.100.3 . udp . 9 }"])
    assert _element(nft) == 2, "its neighbours coming and going does not touch it"
    key = "198.51.100.2 . udp . 9"
    nft.run([f"delete element netdev t m {{ {key} }}", f"add element netdev t m {{ {key} : 7 }}"])
    assert _element(nft) == 0


def _element(nft: Nft) -> int:
    [(element, _)] = of(nft, "map", "m")["elem"]  # type: ignore[misc]
    return int(element["elem"]["counter"]["packets"])


def test_the_ethernet_type_is_the_frame_s_own_when_the_kernel_has_taken_the_vlan_tag_off(
    netns: str, nft: Nft
) -> None:
    """`meta protocol` calls a tagged frame IP; the guard goes by `ether type`."""
    nft.run(["add counter netdev t as_ip", "add counter netdev t plain"])
    guarded(nft, "meta protocol ip counter name as_ip", "ether type ip counter name plain")
    with namespace(f"{netns}a"):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind(("t0", 0))
    tag, header = b"\x81\0\0\7\x08\0", b"E\0\0\x14\0\0\0\0\x40\x11\0\0" + bytes(8)
    sock.send(b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + tag + header)
    sock.close()
    assert packets(nft, "as_ip") == 1
    assert "plain" in str(nft.list_json())
    assert of(nft, "counter", "plain")["packets"] == 0


def counting(netns: str, nft: Nft, *rules: str) -> None:
    """A chain `c` of `table inet t` with these rules for what arrives at p0 and begins a connection."""
    for end, device in (("a", "t0"), ("b", "p0")):  # what is sent to no one's MAC does not come so far
        subprocess.run(["ip", "-n", netns + end, "link", "set", device, "arp", "on"], check=True)
    nft.run(["add chain inet t c { type filter hook prerouting priority 0; policy accept; }"])
    nft.run([f'add rule inet t c iifname "p0" ct state new {rule}' for rule in rules])


def collected(nft: Nft) -> None:
    """Once the kernel has collected what counts no connection (nft_connlimit_gc)."""
    nft.run(["add set inet t clock { type ifname; size 65535; flags dynamic; }"])
    nft.run(['add element inet t clock { "any" ct count over 2, "stays" limit rate over 5/second }'])
    deadline = time.monotonic() + 10
    while len(left := of(nft, "set", "clock")["elem"]) > 1:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, "it stays"
        time.sleep(0.05)
    assert left[0]["elem"]["val"] == "stays"  # type: ignore[index]
    nft.run(["delete set inet t clock"])


def test_an_element_that_counts_connections_is_collected_while_it_counts_none(nft: Nft) -> None:
    """nft_connlimit_gc, every second: the limit is gone with it. One with a rate stays. So no limit of ours
    hangs on an element."""
    collected(nft)


def test_a_rule_that_counts_connections_stays_and_goes_on_counting(netns: str, nft: Nft) -> None:
    nft.run(["add counter inet t over"])
    counting(netns, nft, "udp dport 7-9 ct count over 2 counter name over drop")
    for port in (7, 8, 9):
        send(netns, port=port)
    assert arrives(lambda: packets(nft, "over", "inet"), 1) == 1
    collected(nft)
    send(netns, port=9)
    assert arrives(lambda: packets(nft, "over", "inet"), 2) == 2
    with namespace(f"{netns}b"):
        table = Conntrack()
    table.forget_all()
    table.close()
    collected(nft)
    for port in (7, 8, 9):
        send(netns, port=port)
    assert arrives(lambda: packets(nft, "over", "inet"), 3) == 3


def test_a_rule_written_anew_counts_from_nothing(netns: str, nft: Nft) -> None:
    """Not even the next packet of an old connection counts."""
    nft.run(["add counter inet t over"])
    counting(netns, nft, "ct count over 1 counter name over drop")
    with namespace(f"{netns}a"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
        old.connect(("198.51.100.2", 7))
        old.send(b"x")
        send(netns, port=8)
        assert arrives(lambda: packets(nft, "over", "inet"), 1) == 1
        nft.run(["flush chain inet t c"])
        nft.run(['add rule inet t c iifname "p0" ct state new ct count over 1 counter name over drop'])
        with contextlib.suppress(ConnectionRefusedError):
            old.send(b"x")
        send(netns, port=8)
        send(netns, port=9)
    assert arrives(lambda: packets(nft, "over", "inet"), 2) == 2


def lim(burst: int) -> str:
    return f"limit netdev t few {{ rate over 1/week burst {burst} packets; }}"


@pytest.mark.parametrize("burst", [1, 5, 300])
def test_a_limit_that_is_as_good_as_never_filled_again_counts_to_the_packet(
    netns: str, nft: Nft, burst: int
) -> None:
    """Hence a budget of connections is one. What is over takes nothing, and looking neither."""
    nft.run([f"add {lim(burst)}", "add counter netdev t over", "add counter netdev t seen"])
    guarded(nft, "counter name seen", "limit name few counter name over")
    send(netns, count=burst)
    assert arrives(lambda: packets(nft, "seen"), burst) == burst
    nft.list_json()
    assert packets(nft, "over") == 0
    send(netns, count=3)
    assert arrives(lambda: packets(nft, "seen"), burst + 3) == burst + 3
    assert packets(nft, "over") == 3


def test_a_limit_with_a_name_outlives_its_rules_and_its_own_declaration(netns: str, nft: Nft) -> None:
    """Hence it has one: rules may be written anew, and it may be said again, with another number even."""
    nft.run([f"add {lim(3)}", "add counter netdev t over", "add counter netdev t seen"])
    rules = ("counter name seen", "limit name few counter name over")
    guarded(nft, *rules)
    send(netns, count=2)
    assert arrives(lambda: packets(nft, "seen"), 2) == 2
    nft.run(["flush chain netdev t c", f"add {lim(900)}", *(f"add rule netdev t c {r}" for r in rules)])
    assert of(nft, "limit", "few")["burst"] == 3
    send(netns, count=2)
    assert arrives(lambda: packets(nft, "seen"), 4) == 4
    assert packets(nft, "over") == 1


def test_a_limit_in_a_rule_begins_anew_with_it(netns: str, nft: Nft) -> None:
    nft.run(["add counter netdev t over", "add counter netdev t seen"])
    rules = ("counter name seen", "limit rate over 1/week burst 1 packets counter name over")
    guarded(nft, *rules)
    send(netns, count=2)
    assert arrives(lambda: packets(nft, "over"), 1) == 1
    nft.run(["flush chain netdev t c", *(f"add rule netdev t c {r}" for r in rules)])
    send(netns, count=1)
    assert arrives(lambda: packets(nft, "seen"), 3) == 3
    assert packets(nft, "over") == 1


def test_a_limit_that_fills_too_slowly_for_its_size_is_refused(nft: Nft) -> None:
    """Its tokens are nanoseconds in 64 bits, and 30,500 weeks are no more than that. Compared as signed
    numbers half as many: hence MOST_CONNECTIONS."""
    assert MOST_CONNECTIONS * 7 * 86_400 * 10**9 < 1 << 63
    nft.run([f"add {lim(MOST_CONNECTIONS)}", f"add {lim(MOST_CONNECTIONS)}"])
    with pytest.raises(KernelError):
        nft.run([f"add {lim(30_501)}".replace("few", "many")])


def test_a_full_set_of_limits_limits_nothing(netns: str, nft: Nft) -> None:
    """`add @s` ends its rule when there is no room: who comes too late is let through. So packets make no
    limits here."""
    nft.run(["add counter inet t over", "add counter inet t passed"])
    nft.run(["add set inet t s { type inet_service; size 1; flags dynamic; }"])
    counting(netns, nft, "add @s { udp dport ct count over 0 } counter name over drop", "counter name passed")
    send(netns, port=7)
    assert arrives(lambda: packets(nft, "over", "inet"), 1) == 1
    send(netns, port=8)
    assert arrives(lambda: packets(nft, "passed", "inet"), 1) == 1
    assert packets(nft, "over", "inet") == 1


def test_a_chain_stays_while_an_element_leads_there(nft: Nft) -> None:
    """Though the map goes in the same batch. So the element goes first (ruleset.diff)."""
    nft.run(["add chain inet t other", "add map inet t m { type ifname : verdict; }"])
    nft.run(['add element inet t m { "eg7" : jump other }'])
    with pytest.raises(KernelError, match="busy"):
        nft.run(["delete chain inet t other", "delete map inet t m"])
    nft.run(['delete element inet t m { "eg7" }', "delete chain inet t other", "delete map inet t m"])


def test_a_comment_may_have_127_bytes(nft: Nft) -> None:
    """We stay at 120."""
    nft.run([f'add counter inet t a {{ comment "{"x" * 127}"; }}'])
    with pytest.raises(KernelError):
        nft.run([f'add counter inet t b {{ comment "{"x" * 129}"; }}'])


def test_conntrack_s_size_is_one_number_for_all_namespaces(netns: str) -> None:
    """The table of each namespace is its own, its bound is init's: the gateway cannot set one."""
    with namespace(f"{netns}b"), pytest.raises(PermissionError):
        Path("/proc/sys/net/netfilter/nf_conntrack_max").write_text("5")


def test_ten_thousand_elements_in_one_batch_are_quick(nft: Nft) -> None:
    nft.run([f"add map netdev t m {{ {MAP}; counter; }}"])
    elements = ", ".join(
        f'10.{n >> 8}.{n & 255}.4 . tcp . 443 comment "h{n}" : {n + 1}' for n in range(10_000)
    )
    start = time.perf_counter()
    nft.run([f"add element netdev t m {{ {elements} }}"])
    assert time.perf_counter() - start < 2


# ---- what begins in the gateway itself


def test_a_mask_is_read_only_at_the_beginning_of_a_concatenation(nft: Nft) -> None:
    """And listed anywhere, so that a listing cannot always be read back. Hence the order in `dial4`."""
    nft.run(["add map inet t m { type ipv4_addr . ipv4_addr : mark; }", "add chain inet t c"])
    nft.run(["add rule inet t c meta mark set ip daddr & 255.255.255.252 . ip saddr map @m"])
    with pytest.raises(KernelError, match="syntax error"):
        nft.run(["add rule inet t c meta mark set ip saddr . ip daddr & 255.255.255.252 map @m"])
    nft.run(["add rule inet t c meta mark set ip saddr . (ip daddr & 255.255.255.252) map @m"])
    assert "set ip saddr . ip daddr & 255.255.255.252 map @m" in nft.list_text()


def test_a_mask_of_upper_bits_is_listed_as_a_prefix(nft: Nft) -> None:
    """Hence our rules compare such marks with two bounds; and what reads a listing must not take the number
    for an address."""
    nft.run(["add chain inet t c", "add rule inet t c ct mark & 0xf0000000 == 0x10000000 accept"])
    [rule] = [item["rule"] for item in nft.list_json()["nftables"] if "rule" in item]
    assert rule["expr"][0]["match"]["right"] == {"prefix": {"addr": 0x1000_0000, "len": 4}}
    assert observe.render(rule["expr"]).startswith("foreign ")


def ip(netns: str, command: str) -> str:
    done = subprocess.run(["ip", "-n", f"{netns}b", *command.split()], capture_output=True, check=True)
    return done.stdout.decode()


def test_bind_knows_local_routes_in_ipv4_and_only_configured_addresses_in_ipv6(netns: str, nft: Nft) -> None:
    """IPV6_FREEBIND, which needs no right, is the way; IPv4 needs nothing. Hence the inspector sets it."""
    with namespace(f"{netns}b"):
        Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").write_text("0")
    ip(netns, "route add local 169.254.64.0/19 dev lo table local")
    ip(netns, "-6 route add local fd53:3::/112 dev lo table local")
    with namespace(f"{netns}b"):
        four, six = socket.socket(socket.AF_INET), socket.socket(socket.AF_INET6)
    with four, six:
        four.bind(("169.254.64.7", 0))
        with pytest.raises(OSError, match="Cannot assign requested address"):
            six.bind(("fd53:3::7", 0))
        six.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
        six.bind(("fd53:3::7", 0))


OUTPUT = (
    "add counter inet t before",
    "add counter inet t after",
    "add counter inet t changed",
    "add chain inet t early { type %s hook output priority -150; }",
    "add rule inet t early ip daddr 198.18.0.1 meta mark set 1",
    "add chain inet t nat { type nat hook output priority -100; }",
    "add rule inet t nat meta mark 1 dnat ip to 198.51.100.1",
    "add chain inet t out { type filter hook output priority 0; }",
    'add rule inet t out meta mark 1 oifname "lo" ct status dnat counter name before',
    'add rule inet t out meta mark 1 oifname "p0" counter name changed',
    "add chain inet t post { type filter hook postrouting priority 0; }",
    'add rule inet t post meta mark 1 oifname "p0" counter name after',
)


@pytest.mark.parametrize("kind", ["filter", "route"])
def test_a_translation_on_the_way_out_asks_routing_again_with_the_mark(
    netns: str, nft: Nft, kind: str
) -> None:
    """nf_nat_ipv4_local_fn does, for a `filter` chain's mark as well, but the device that later chains of
    the hook see is the old one. A `route` chain asks before the translation, and its answer stands: here,
    that no marked packet goes to a synthetic address. Hence `dial` is a `filter` chain."""
    ip(netns, "route add local 198.18.0.0/16 dev lo table 101")
    ip(netns, "rule add pref 5 fwmark 1 lookup 200")
    ip(netns, "rule add pref 6 lookup 101")
    ip(netns, "route add 198.51.100.0/24 dev p0 table 200")
    ip(netns, "route add unreachable 198.18.0.0/16 table 200")
    nft.run([line.replace("%s", kind) for line in OUTPUT])
    with namespace(f"{netns}b"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("198.51.100.2", 0))
        outcome = sock.connect_ex(("198.18.0.1", 9))
        try:
            sock.send(b"x")
        except OSError as error:
            outcome = error.errno or 0
    if kind == "route":
        assert outcome in (errno.EHOSTUNREACH, errno.EPERM)
        assert of(nft, "counter", "after")["packets"] == 0
    else:
        assert outcome == 0
        assert (packets(nft, "before", "inet"), packets(nft, "after", "inet")) == (1, 1)
        assert of(nft, "counter", "changed")["packets"] == 0
