"""Address classes: the registries as vectors, and Python's own opinion as a second witness."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.addresses import (
    SPECIAL,
    AddressClass,
    check_network,
    classes,
    classify,
    embedded,
    objection,
    usable,
)
from egressd.model.errors import Unfit

C = AddressClass
# address, class, what it embeds, may a public name lead there, may a private one
VECTORS = [
    ("8.8.8.8", C.GLOBAL, None, True, True),
    ("1.1.1.1", C.GLOBAL, None, True, True),
    ("0.0.0.0", C.UNSPECIFIED, None, False, False),
    ("0.1.2.3", C.THIS_NETWORK, None, False, False),
    ("9.255.255.255", C.GLOBAL, None, True, True),
    ("10.0.0.0", C.PRIVATE, None, False, True),
    ("10.255.255.255", C.PRIVATE, None, False, True),
    ("11.0.0.0", C.GLOBAL, None, True, True),
    ("100.63.255.255", C.GLOBAL, None, True, True),
    ("100.64.0.1", C.CGNAT, None, False, True),
    ("100.127.255.255", C.CGNAT, None, False, True),
    ("100.100.100.200", C.METADATA, None, False, False),
    ("127.0.0.1", C.LOOPBACK, None, False, False),
    ("127.255.255.255", C.LOOPBACK, None, False, False),
    ("168.63.129.16", C.METADATA, None, False, False),
    ("168.63.129.17", C.GLOBAL, None, True, True),
    ("169.254.0.1", C.LINK_LOCAL, None, False, False),
    ("169.254.53.53", C.LINK_LOCAL, None, False, False),
    ("169.254.169.254", C.METADATA, None, False, False),
    ("169.254.170.2", C.METADATA, None, False, False),
    ("172.15.255.255", C.GLOBAL, None, True, True),
    ("172.16.0.1", C.PRIVATE, None, False, True),
    ("172.31.255.255", C.PRIVATE, None, False, True),
    ("172.32.0.0", C.GLOBAL, None, True, True),
    ("192.0.0.1", C.PROTOCOL, None, False, False),
    ("192.0.0.9", C.ANYCAST, None, False, False),
    ("192.0.0.10", C.ANYCAST, None, False, False),
    ("192.0.0.192", C.METADATA, None, False, False),
    ("192.0.2.1", C.DOCUMENTATION, None, False, True),
    ("192.31.196.1", C.AS112, None, False, False),
    ("192.52.193.1", C.AMT, None, False, False),
    ("192.88.99.1", C.SIX_TO_FOUR, None, False, False),
    ("192.168.1.1", C.PRIVATE, None, False, True),
    ("192.175.48.1", C.AS112, None, False, False),
    ("198.18.0.1", C.BENCHMARKING, None, False, False),
    ("198.19.255.255", C.BENCHMARKING, None, False, False),
    ("198.51.100.1", C.DOCUMENTATION, None, False, True),
    ("203.0.113.1", C.DOCUMENTATION, None, False, True),
    ("223.255.255.255", C.GLOBAL, None, True, True),
    ("224.0.0.1", C.MULTICAST, None, False, False),
    ("239.255.255.255", C.MULTICAST, None, False, False),
    ("240.0.0.1", C.RESERVED, None, False, False),
    ("255.255.255.255", C.BROADCAST, None, False, False),
    ("2606:4700::1111", C.GLOBAL, None, True, True),
    ("2a00:1450::1", C.GLOBAL, None, True, True),
    ("::", C.UNSPECIFIED, None, False, False),
    ("::1", C.LOOPBACK, None, False, False),
    ("::2", C.IPV4_COMPATIBLE, "0.0.0.2", False, False),
    ("::8.8.8.8", C.IPV4_COMPATIBLE, "8.8.8.8", False, False),
    ("::ffff:8.8.8.8", C.IPV4_MAPPED, "8.8.8.8", False, False),
    ("::ffff:127.0.0.1", C.IPV4_MAPPED, "127.0.0.1", False, False),
    ("::ffff:0:10.0.0.1", C.IPV4_TRANSLATED, "10.0.0.1", False, False),
    ("64:ff9b::169.254.169.254", C.NAT64, "169.254.169.254", False, False),
    ("64:ff9b::8.8.8.8", C.NAT64, "8.8.8.8", False, False),
    ("64:ff9b:1:7f00:0:100::", C.NAT64_LOCAL, "127.0.0.1", False, False),
    ("64:ff9b:2::1", C.RESERVED, None, False, False),
    ("100::1", C.DISCARD, None, False, False),
    ("100:0:0:1::1", C.DISCARD, None, False, False),
    ("100:0:0:2::1", C.RESERVED, None, False, False),
    ("2001::1", C.TEREDO, "255.255.255.254", False, False),
    ("2001:0:4136:e378:8000:63bf:3fff:fdd2", C.TEREDO, "192.0.2.45", False, False),
    ("2001:1::1", C.ANYCAST, None, False, False),
    ("2001:1::2", C.ANYCAST, None, False, False),
    ("2001:1::3", C.ANYCAST, None, False, False),
    ("2001:1::4", C.PROTOCOL, None, False, False),
    ("2001:2::1", C.BENCHMARKING, None, False, False),
    ("2001:3::1", C.AMT, None, False, False),
    ("2001:4:112::1", C.AS112, None, False, False),
    ("2001:10::1", C.ORCHID, None, False, False),
    ("2001:2f:ffff::1", C.ORCHID, None, False, False),
    ("2001:30::1", C.DRONE_ID, None, False, False),
    ("2001:200::1", C.GLOBAL, None, True, True),
    ("2001:db8::1", C.DOCUMENTATION, None, False, True),
    ("2002:7f00:1::1", C.SIX_TO_FOUR, "127.0.0.1", False, False),
    ("2002:808:808::1", C.SIX_TO_FOUR, "8.8.8.8", False, False),
    ("2620:4f:8000::1", C.AS112, None, False, False),
    ("3fff::1", C.DOCUMENTATION, None, False, True),
    ("3fff:1000::1", C.GLOBAL, None, True, True),
    ("4000::1", C.RESERVED, None, False, False),
    ("5f00::1", C.SRV6, None, False, False),
    ("fc00::1", C.UNIQUE_LOCAL, None, False, True),
    ("fd53:e9::5", C.UNIQUE_LOCAL, None, False, True),
    ("fd00:ec2::254", C.METADATA, None, False, False),
    ("fd00:ec2::23", C.METADATA, None, False, False),
    ("fd20:ce::254", C.METADATA, None, False, False),
    ("fd00:c1::a9fe:a9fe", C.METADATA, None, False, False),
    ("fe80::1", C.LINK_LOCAL, None, False, False),
    ("fe80::a9fe:a9fe", C.METADATA, None, False, False),
    ("fec0::1", C.SITE_LOCAL, None, False, False),
    ("ff02::1", C.MULTICAST, None, False, False),
    ("fe00::1", C.RESERVED, None, False, False),
]


@pytest.mark.parametrize(("text", "kind", "inner", "public", "private"), VECTORS)
def test_vectors(text: str, kind: AddressClass, inner: str | None, public: bool, private: bool) -> None:
    address = ip_address(text)
    assert classify(address) is kind
    assert embedded(address) == (ip_address(inner) if inner else None)
    assert usable(address, private=False) is public
    assert usable(address, private=True) is private
    assert objection(address, private=True) is (None if private else kind)


def test_every_class_has_a_vector() -> None:
    assert {kind for _, kind, *_ in VECTORS} == set(AddressClass) - {C.OWN}


# The IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), row by row: what IANA says of global
# reachability ("-" where it says N/A), our class, and whether a name marked private may lead there. No name
# without that mark may lead to any of them, "globally reachable" or not: what stands here is infrastructure.
REGISTRIES = [
    ("0.0.0.0/8", "no", C.THIS_NETWORK, False),
    ("0.0.0.0/32", "no", C.UNSPECIFIED, False),
    ("10.0.0.0/8", "no", C.PRIVATE, True),
    ("100.64.0.0/10", "no", C.CGNAT, True),
    ("127.0.0.0/8", "no", C.LOOPBACK, False),
    ("169.254.0.0/16", "no", C.LINK_LOCAL, False),
    ("172.16.0.0/12", "no", C.PRIVATE, True),
    ("192.0.0.0/24", "no", C.PROTOCOL, False),
    ("192.0.0.0/29", "no", C.PROTOCOL, False),  # DS-Lite
    ("192.0.0.8/32", "no", C.PROTOCOL, False),  # IPv4 dummy address
    ("192.0.0.9/32", "yes", C.ANYCAST, False),
    ("192.0.0.10/32", "yes", C.ANYCAST, False),
    ("192.0.0.170/32", "no", C.PROTOCOL, False),  # ipv4only.arpa: NAT64 discovery
    ("192.0.0.171/32", "no", C.PROTOCOL, False),
    ("192.0.2.0/24", "no", C.DOCUMENTATION, True),
    ("192.31.196.0/24", "yes", C.AS112, False),
    ("192.52.193.0/24", "yes", C.AMT, False),
    ("192.88.99.0/24", "-", C.SIX_TO_FOUR, False),
    ("192.88.99.2/32", "no", C.SIX_TO_FOUR, False),  # 6a44 relay
    ("192.168.0.0/16", "no", C.PRIVATE, True),
    ("192.175.48.0/24", "yes", C.AS112, False),
    ("198.18.0.0/15", "no", C.BENCHMARKING, False),
    ("198.51.100.0/24", "no", C.DOCUMENTATION, True),
    ("203.0.113.0/24", "no", C.DOCUMENTATION, True),
    ("240.0.0.0/4", "no", C.RESERVED, False),
    ("255.255.255.255/32", "no", C.BROADCAST, False),
    ("::1/128", "no", C.LOOPBACK, False),
    ("::/128", "no", C.UNSPECIFIED, False),
    ("::ffff:0:0/96", "no", C.IPV4_MAPPED, False),
    ("64:ff9b::/96", "yes", C.NAT64, False),
    ("64:ff9b:1::/48", "no", C.NAT64_LOCAL, False),
    ("100::/64", "no", C.DISCARD, False),
    ("100:0:0:1::/64", "no", C.DISCARD, False),
    ("2001::/23", "no", C.PROTOCOL, False),
    ("2001::/32", "-", C.TEREDO, False),
    ("2001:1::1/128", "yes", C.ANYCAST, False),
    ("2001:1::2/128", "yes", C.ANYCAST, False),
    ("2001:1::3/128", "yes", C.ANYCAST, False),
    ("2001:2::/48", "no", C.BENCHMARKING, False),
    ("2001:3::/32", "yes", C.AMT, False),
    ("2001:4:112::/48", "yes", C.AS112, False),
    ("2001:10::/28", "-", C.ORCHID, False),
    ("2001:20::/28", "yes", C.ORCHID, False),
    ("2001:30::/28", "yes", C.DRONE_ID, False),
    ("2001:db8::/32", "no", C.DOCUMENTATION, True),
    ("2002::/16", "-", C.SIX_TO_FOUR, False),
    ("2620:4f:8000::/48", "yes", C.AS112, False),
    ("3fff::/20", "no", C.DOCUMENTATION, True),
    ("5f00::/16", "no", C.SRV6, False),
    ("fc00::/7", "no", C.UNIQUE_LOCAL, True),
    ("fe80::/10", "no", C.LINK_LOCAL, False),
]


@pytest.mark.parametrize(("text", "reachable", "kind", "private"), REGISTRIES)
def test_the_registries_row_by_row(text: str, reachable: str, kind: AddressClass, private: bool) -> None:
    network = ip_network(text)
    parts = [n for n, _ in SPECIAL if n.version == network.version and n.prefixlen > network.prefixlen]
    edges = {network[0], network[-1], network[network.num_addresses // 2]}
    plain = [address for address in edges if not any(address in part for part in parts)]
    assert plain
    for address in plain:
        assert classify(address) is kind
        assert not usable(address, private=False)
        assert usable(address, private=True) is private
    assert not (reachable == "yes" and private)


def test_the_registries_are_all_there() -> None:
    """Every row is a row of ours, or lies in one whose class it shares."""
    ours = {network for network, _ in SPECIAL}
    within = {"192.0.0.0/29", "192.0.0.8/32", "192.0.0.170/32", "192.0.0.171/32", "192.88.99.2/32"}
    assert {text for text, *_ in REGISTRIES if ip_network(text) not in ours} == within


METADATA = [
    "169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.169.253", "169.254.169.123",
    "169.254.42.42", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254",
    "fd00:ec2::253", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42",
    "fe80::a9fe:a9fe",
]  # fmt: skip


@pytest.mark.parametrize("text", METADATA)
def test_metadata_is_out_of_reach_however_it_is_spelt(text: str) -> None:
    """`private: true` changes nothing, nor do addresses that carry it inside."""
    address = ip_address(text)
    assert objection(address, private=True) is C.METADATA
    if isinstance(address, IPv4Address):
        value = int(address)
        carriers = [0xFFFF << 32 | value, value, 0x64_FF9B << 96 | value, 0x2002 << 112 | value << 80]
        for carrier in map(IPv6Address, carriers):
            assert embedded(carrier) == address
            assert not usable(carrier, private=True)


@pytest.mark.parametrize(
    "text",
    ["169.254.0.1", "169.254.255.254", "169.254.53.53", "fe80::1", "febf:ffff::1", "fec0::1", "127.0.0.53"],
)
def test_link_local_and_loopback_are_out_of_reach_even_for_private_names(text: str) -> None:
    assert not usable(ip_address(text), private=True)


def test_what_is_embedded_is_classified_too() -> None:
    assert classes(ip_address("::ffff:169.254.169.254")) == {C.IPV4_MAPPED, C.METADATA}
    assert classes(ip_address("64:ff9b::10.0.0.1")) == {C.NAT64, C.PRIVATE}
    assert classes(ip_address("8.8.8.8")) == {C.GLOBAL}


def test_a_scope_does_not_hide_a_class() -> None:
    assert classify(ip_address("fe80::1%eth0")) is C.LINK_LOCAL
    assert classify(ip_address("::1%lo")) is C.LOOPBACK


def test_egressds_own_pools_are_never_reached() -> None:
    own = (ip_network("fd53:e9::/64"), ip_network("198.18.0.0/16"))
    assert usable(ip_address("fd53:e9::5"), private=True)
    assert objection(ip_address("fd53:e9::5"), private=True, own=own) is C.OWN
    assert objection(ip_address("198.18.0.5"), private=True, own=own) is C.OWN
    assert usable(ip_address("fd54::5"), private=True, own=own)
    assert usable(ip_address("8.8.8.8"), private=False, own=own)


# ---- Python's ipaddress as a second witness

ADDRESSES = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6),
    st.sampled_from(SPECIAL).flatmap(
        lambda entry: st.integers(0, entry[0].num_addresses - 1).map(lambda offset: entry[0][offset])
    ),
)


@settings(max_examples=200)
@given(ADDRESSES)
def test_global_for_us_is_global_for_python(address: IPv4Address | IPv6Address) -> None:
    kind = classify(address)
    if kind is C.GLOBAL:
        assert address.is_global
        assert not (address.is_multicast or address.is_reserved or address.is_loopback)
    if usable(address, private=True):
        assert not (address.is_multicast or address.is_loopback or address.is_link_local)
        assert not address.is_unspecified


@settings(max_examples=200)
@given(ADDRESSES)
def test_python_names_the_same_classes(address: IPv4Address | IPv6Address) -> None:
    kind = classify(address)
    assert address.is_loopback is (kind is C.LOOPBACK)
    assert address.is_multicast is (kind is C.MULTICAST)
    assert address.is_unspecified is (kind is C.UNSPECIFIED)
    if address.is_link_local:
        assert kind in (C.LINK_LOCAL, C.METADATA)
    if isinstance(address, IPv6Address):
        assert address.is_site_local is (kind is C.SITE_LOCAL)
        assert (address.ipv4_mapped is not None) is (kind is C.IPV4_MAPPED)
        assert (address.sixtofour is not None) is (kind is C.SIX_TO_FOUR)
        assert (address.teredo is not None) is (kind is C.TEREDO)
        if address.teredo is not None:
            assert embedded(address) == address.teredo[1]
        if address.sixtofour is not None:
            assert embedded(address) == address.sixtofour


@settings(max_examples=200)
@given(ADDRESSES)
def test_the_most_specific_entry_decides(address: IPv4Address | IPv6Address) -> None:
    holding = [(n.prefixlen, kind) for n, kind in SPECIAL if n.version == address.version and address in n]
    expected = max(holding)[1] if holding else (C.GLOBAL if address.version == 4 else C.RESERVED)
    assert classify(address) is expected


def test_no_network_is_listed_twice() -> None:
    assert len({network for network, _ in SPECIAL}) == len(SPECIAL)


# ---- networks of cidr rules

FINE = [
    "10.0.0.0/8", "10.1.2.3/32", "172.16.0.0/12", "192.168.0.0/16", "8.8.8.0/24", "100.64.0.0/16",
    "203.0.113.0/24", "2001:db8::/32", "fd12:3456::/32", "2606:4700::/32", "2a00::/12", "8.0.0.0/6",
]  # fmt: skip
REFUSED = [
    ("0.0.0.0/0", "every address"),
    ("::/0", "every address"),
    ("0.0.0.0/1", "this-network|unspecified"),
    ("128.0.0.0/1", "touches"),
    ("::/1", "touches"),
    ("2000::/3", "touches"),
    ("127.0.0.0/8", "loopback"),
    ("127.0.0.1/32", "loopback"),
    ("::1/128", "loopback"),
    ("169.254.0.0/16", "metadata"),
    ("169.254.1.0/24", "link-local"),
    ("169.254.169.254/32", "metadata"),
    ("168.0.0.0/8", "168.63.129.16/32 .metadata"),
    ("100.64.0.0/10", "100.100.100.200/32 .metadata"),
    ("fd00::/8", "metadata"),
    ("fc00::/7", "metadata"),
    ("fe80::/10", "metadata"),
    ("fe80:1::/32", "link-local"),
    ("::ffff:0:0/96", "ipv4-mapped"),
    ("::ffff:10.0.0.0/104", "ipv4-mapped"),
    ("64:ff9b::/96", "nat64"),
    ("2002::/16", "6to4"),
    ("2001::/16", "touches"),
    ("198.18.0.0/15", "benchmarking"),
    ("198.0.0.0/8", "benchmarking"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("240.0.0.0/4", "broadcast"),
    ("ff00::/8", "multicast"),
    ("4000::/16", "not allocated"),
]


@pytest.mark.parametrize("text", FINE)
def test_networks_a_rule_may_name(text: str) -> None:
    check_network(ip_network(text))


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_networks_no_rule_may_name(text: str, says: str) -> None:
    with pytest.raises(Unfit, match=says) as refusal:
        check_network(ip_network(text))
    assert refusal.value.remedy


def test_a_network_beside_our_pools() -> None:
    own = (ip_network("fd53:e9::/64"),)
    check_network(ip_network("fd53:ea::/64"), own=own)
    for text in ("fd53:e9::/64", "fd53:e9::1/128", "fd53::/16"):
        with pytest.raises(Unfit, match="egressd's own pool"):
            check_network(ip_network(text), own=own)


@settings(max_examples=200)
@given(ADDRESSES, st.integers(0, 128))
def test_a_network_that_passes_holds_nothing_unusable(
    address: IPv4Address | IPv6Address, prefix: int
) -> None:
    network = ipaddress.ip_network((address, min(prefix, address.max_prefixlen)), strict=False)
    try:
        check_network(network)
    except Unfit:
        return
    for witness in (network.network_address, address, network.broadcast_address):
        assert usable(witness, private=True)
    assert not any(usable(n[0], private=True) is False and n.overlaps(network)
                   for n, _ in SPECIAL if n.version == network.version)  # fmt: skip
