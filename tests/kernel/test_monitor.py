"""What the kernel tells of changes, and how ours are told from others'."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from warden_world import sh

from egressd.kernel import namespaces, netlink
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.ledger import Ledger
from egressd.kernel.monitor import GoneElement, Monitor
from egressd.kernel.netlink import Netlink, NetlinkError, attribute, attributes
from egressd.kernel.nft import Nft
from egressd.kernel.routing import Rule, remove_link
from egressd.model.errors import KernelError

pytestmark = pytest.mark.kernel


@pytest.fixture
def here() -> Iterator[int]:
    """This thread, in a namespace of its own; gives its descriptor."""
    with namespaces.throw_away():
        descriptor = namespaces.open_own()
        yield descriptor
        os.close(descriptor)


@pytest.fixture
def monitor(here: int) -> Iterator[Monitor]:
    monitor = Monitor(ignore=())
    yield monitor
    monitor.close()


@pytest.fixture
def ledger(monitor: Monitor) -> Ledger:
    ledger = Ledger(Nft(), monitor)
    ledger.run(
        [
            "add table netdev egressd",
            "add map netdev egressd m { type ipv4_addr : mark; counter; }",
            'add element netdev egressd m { 192.0.2.1 comment "one.test" : 1, 192.0.2.2 : 2 }',
            "add counter netdev egressd c { packets 3 bytes 99; }",
        ]
    )
    return ledger


def test_our_own_batches_are_no_news(ledger: Ledger) -> None:
    assert not ledger.look()
    for number in range(3):
        ledger.run([f"add chain netdev egressd c{number}"])
        assert not ledger.look()
    assert not ledger.run(["add table netdev egressd"]).elements  # changes nothing: no new generation
    assert not ledger.look()


def test_somebody_elses_are_and_say_who(ledger: Ledger, here: int) -> None:
    sh("nft add chain netdev egressd foreign", namespace=here)
    assert ledger.look()
    (batch,) = ledger.settled()
    assert batch.process.startswith("nft (pid ")
    assert not ledger.look()


def test_who_calls_itself_strangely_is_shown_as_that(monitor: Monitor, here: int) -> None:
    """A name of 15 bytes of its own choice, which goes to logs and terminals (PR_SET_NAME)."""
    script = "import os; open('/proc/self/comm', 'wb').write(b'\\x1b[2J\\nroot'); os.write(1, b'.')"
    script += "; import nftables; nftables.Nftables().cmd('add table inet strange')"
    sh(f'/usr/bin/python3 -c "{script}"', namespace=here)
    (batch,) = monitor.news().batches
    assert batch.process.startswith(r"\x1b[2J\nroot (pid "), batch.process


def test_a_change_whose_news_was_lost_is_seen_all_the_same(
    ledger: Ledger, monitor: Monitor, here: int
) -> None:
    sh("nft add chain netdev egressd foreign", namespace=here)
    monitor.news()  # swallowed
    assert ledger.look()


def test_a_change_between_two_of_ours_is_not_taken_for_ours(ledger: Ledger, here: int) -> None:
    sh("nft add chain netdev egressd foreign", namespace=here)
    ledger.run(["add chain netdev egressd ours"])
    assert ledger.look()
    assert len(ledger.settled()) == 1


def test_a_batch_that_fails_changes_nothing(ledger: Ledger) -> None:
    with pytest.raises(KernelError):
        ledger.run(["add chain netdev egressd x", "add rule netdev egressd nowhere accept"])
    assert not ledger.look()


def test_deleted_elements_come_with_comment_and_count(ledger: Ledger) -> None:
    batch = ledger.run(["delete element netdev egressd m { 192.0.2.1 }"])
    assert batch.elements == [GoneElement(5, "egressd", "m", "one.test", (0, 0), mark=1)]
    batch = ledger.run(["flush map netdev egressd m"])
    assert [element.comment for element in batch.elements] == [""]


def test_a_named_counter_is_read_by_name(ledger: Ledger) -> None:
    assert ledger.count("c") == (3, 99)
    assert ledger.count("nobody") is None


def test_changes_of_routing_are_heard_but_not_our_own(here: int) -> None:
    ours, theirs = Netlink(netlink.ROUTE), Netlink(netlink.ROUTE)
    monitor = Monitor(ignore=(ours.port,))
    rule = Rule(2, 5, None, device="lo")
    ours.run([rule.make({})])
    assert not monitor.news().routing
    theirs.run([rule.remove({})])
    assert monitor.news().routing
    assert not monitor.news().routing
    for one in (ours, theirs, monitor):
        one.close()


def test_a_refusal_has_the_kernels_words_and_what_was_asked(here: int) -> None:
    route = Netlink(netlink.ROUTE)
    route.run([remove_link("nobody")])  # gone already: no error
    bad = Rule(2, 5, None, device="a-name-much-too-long-for-a-device")
    with pytest.raises(NetlinkError, match="add ip -4 rule 5") as caught:
        route.run([bad.make({}), Rule(2, 6, None).make({})])
    assert caught.value.number
    # the rest of the batch was tried, its acknowledgements were read, and the socket serves on
    assert "6:" in sh("ip rule", namespace=here)
    route.run([Rule(2, 6, None).remove({})])
    route.close()


def test_an_empty_table_of_connections_can_be_emptied(here: int) -> None:
    conntrack = Conntrack()
    conntrack.forget_all()
    conntrack.forget_mark(1, 1)
    conntrack.forget_marks(range(1, 20))
    assert conntrack.marks() == []
    conntrack.close()


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x03\x00\x01\x00", b"\xff\xff\x01\x00", b"\x00" * 8])
def test_attributes_that_do_not_fit_are_not_read(data: bytes) -> None:
    assert list(attributes(data)) == []


def test_attributes_come_back_as_they_went() -> None:
    data = attribute(3, b"abc") + attribute(4, b"", nested=True) + attribute(5, b"12345678")
    assert list(attributes(data)) == [(3, b"abc"), (4, b""), (5, b"12345678")]
