"""The channel: a message is read whole or not at all, and nothing unexpected is repaired."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.ipc import messages
from egressd.ipc.channel import MAX_MESSAGE, Channel, pair, payload
from egressd.ipc.peer import Peer, PeerGone
from egressd.model.errors import ProtocolError, Refused
from egressd.ruleset.wants import Element, NatEntry

Ends = tuple[Channel[Any], Channel[Any]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    left, right = pair()
    both = Channel(left, messages.FROM_WARDEN), Channel(right, messages.TO_WARDEN)
    yield both
    for end in both:
        end.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def raw(channel: Channel[Any], data: bytes, *descriptors: int) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.socket.sendmsg([data], ancillary)


def test_a_message_arrives_as_it_was_sent(ends: Ends) -> None:
    controller, warden = ends
    entry = messages.NatEntry(0x8000_4001, "198.18.0.4", "192.0.2.1", "api.example")
    controller.send(messages.SetNat(request=7, entries=(entry,)))
    assert warden.receive().message == messages.SetNat(request=7, entries=(entry,))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("link", True), ("a_1", True), ("a" + "b" * 30, True), ("a" + "b" * 31, False), ("", False),
        ("Link", False), ("1link", False), ("li nk", False), ("link\n", False), ("l\u00ednk", False),
    ],
)  # fmt: skip
def test_fields_of_an_event_are_named_as_a_record_names_them(name: str, told: bool) -> None:
    left, right = pair()
    with left, right:
        auditor: Channel[Any] = Channel(right, messages.TO_AUDITOR)
        for _ in range(2):  # the second time it is known, or not
            document = {"type": "Event", "process": "warden", "event": "said", "fields": {"also": 1, name: 2}}
            left.send(msgspec.json.encode(document))
            if told:
                assert auditor.receive().message.fields == {"also": 1, name: 2}
            else:
                with pytest.raises(ProtocolError, match="field's name"):
                    auditor.receive()


def test_what_is_known_of_names_is_bounded() -> None:
    for number in range(3 * messages._MOST_KNOWN):
        messages.Event(process="warden", event="said", fields={f"k{number}": 1})
    messages.Event(process="warden", event="said", fields={f"k{number}": 1 for number in range(1000)})
    assert len(messages._known_names) <= messages._MOST_KNOWN
    assert max(map(len, messages._known_names)) == 1


def test_bulk_arrives_sealed_and_whole(ends: Ends) -> None:
    controller, warden = ends
    data = os.urandom(3_000_000)
    with payload(data) as descriptor:
        controller.send(messages.SetWorkspaces(request=1, payload_length=len(data)), descriptor=descriptor)
    assert warden.receive().payload() == data


def test_an_unsealed_payload_is_refused(ends: Ends) -> None:
    controller, warden = ends
    descriptor = os.memfd_create("not sealed")
    os.write(descriptor, b"[]")
    controller.send(messages.SetWorkspaces(request=1, payload_length=2), descriptor=descriptor)
    os.close(descriptor)
    with pytest.raises(ProtocolError, match="sealed"):
        warden.receive().payload()


@pytest.mark.parametrize("claimed", [2, 4])
def test_a_payload_of_another_length_is_refused(ends: Ends, claimed: int) -> None:
    controller, warden = ends
    with payload(b"[1]") as descriptor:
        controller.send(messages.SetWorkspaces(request=1, payload_length=claimed), descriptor=descriptor)
    with pytest.raises(ProtocolError, match="bytes instead of"):
        warden.receive().payload()


def test_a_payload_that_is_a_file_is_refused(ends: Ends, tmp_path: Path) -> None:
    controller, warden = ends
    with (tmp_path / "x").open("w+b") as file:
        file.write(b"[]")
        file.flush()
        controller.send(messages.SetWorkspaces(request=1, payload_length=2), descriptor=file.fileno())
    with pytest.raises(ProtocolError, match="cannot be read"):
        warden.receive().payload()


GARBAGE = {
    "nothing known": b'{"type":"Reboot"}',
    "half a message": b'{"type":"CloseLink","requ',
    "no tag": b'{"request":1}',
    "an unknown field": b'{"type":"CloseLink","request":1,"link":1,"force":true}',
    "a missing field": b'{"type":"CloseLink","request":1}',
    "a number out of range": b'{"type":"CloseLink","request":1,"link":0}',
    "a name that is nft syntax": b'{"type":"OpenLink","request":1,"link":1,"workspace":"a;flush","owner":1}',
    "not UTF-8": b"\xff\xfe\xfd",
    "deep nesting": b"[" * 50_000,
    "a comment that closes its quotes": b'{"type":"SetNat","request":1,"entries":[[1,"::","::","\\";drop"]]}',
    "an address that is none": b'{"type":"SetNat","request":1,"entries":[[1,"example","::1","x"]]}',
    "a message of the other direction": b'{"type":"Done","request":1}',
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused(ends: Ends, data: bytes) -> None:
    controller, warden = ends
    raw(controller, data)
    with pytest.raises(ProtocolError):
        warden.receive()


@pytest.mark.parametrize("value", ["18", "18.5", "true", "null", "[]", "{}", '"x"', '"::1"'])
def test_an_address_that_is_none_is_no_message(value: str) -> None:
    left, right = pair()
    with left, right:
        auditor: Channel[Any] = Channel(right, messages.TO_AUDITOR)
        text = '{"type":"BindSource","request":1,"link":1,"workspace":"a","source4":%s,"source6":"fd53::1"}'
        left.send((text % value).encode())
        with pytest.raises(ProtocolError, match="not a message"):
            auditor.receive()


def test_a_message_larger_than_any_is_refused(ends: Ends) -> None:
    controller, warden = ends
    raw(controller, b'"' + b"x" * MAX_MESSAGE)
    with pytest.raises(ProtocolError, match="larger"):
        warden.receive()


@pytest.mark.parametrize("count", [0, 2, 4, 9])
def test_the_wrong_number_of_descriptors_is_refused_and_none_leaks(ends: Ends, count: int) -> None:
    controller, warden = ends
    message = b'{"type":"OpenLink","request":1,"link":1,"workspace":"acme","owner":1000}'
    before = open_descriptors()
    raw(controller, message, *[controller.fileno()] * count)
    with pytest.raises(ProtocolError):
        warden.receive()
    assert open_descriptors() == before


def test_a_descriptor_nobody_asked_for_is_closed(ends: Ends) -> None:
    controller, warden = ends
    before = open_descriptors()
    raw(controller, b'{"type":"CloseLink","request":1,"link":1}', controller.fileno())
    with pytest.raises(ProtocolError, match="1 descriptors"):
        warden.receive()
    assert open_descriptors() == before


def test_the_end_is_the_end(ends: Ends) -> None:
    controller, warden = ends
    controller.close()
    with pytest.raises(EOFError):
        warden.receive()


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    left, right = pair()
    with left, right:
        left.send(data)
        with suppress(ProtocolError):
            Channel(right, messages.FROM_CLIENT).receive()


def test_addresses_travel_as_addresses() -> None:
    left, right = pair()
    with left, right:
        lease = messages.Lease(link=7, address4=IPv4Address("198.19.0.7"), address6=IPv6Address("fd53:1::7"))
        Channel(left, None).send(lease)
        assert Channel(right, messages.TO_CLIENT).receive().message == lease


def dialogue(steps: Any) -> Any:
    """Run one asynchronous conversation between a peer and a bare channel."""

    async def run() -> Any:
        left, right = pair()
        bare: Channel[Any] = Channel(right, messages.TO_WARDEN)
        heard: list[Any] = []
        gone: list[str] = []
        peer = Peer(
            left, messages.FROM_WARDEN, handler=lambda _, received: heard.append(received.message),
            gone=lambda _, why: gone.append(why), replies=(messages.Done, messages.Failed),
        )  # fmt: skip
        try:
            return await steps(peer, bare, heard, gone)
        finally:
            peer.close()
            bare.close()

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_replies_find_their_requests_in_any_order() -> None:
    async def steps(peer: Peer, bare: Channel[Any], heard: list[Any], gone: list[str]) -> None:
        one = asyncio.ensure_future(peer.ask(messages.CloseLink(request=1, link=1)))
        two = asyncio.ensure_future(peer.ask(messages.CloseLink(request=2, link=2)))
        await asyncio.sleep(0)
        assert [bare.receive().message.link for _ in range(2)] == [1, 2]
        bare.send(messages.Done(request=2, changes=22))
        bare.send(messages.Retired(workspace="acme", elements={"x": (1, 2)}))
        bare.send(messages.Done(request=1, changes=11))
        assert [(await one).message.changes, (await two).message.changes] == [11, 22]
        assert [type(message) for message in heard] == [messages.Retired]

    dialogue(steps)


def test_a_refusal_is_raised_where_the_request_was_made() -> None:
    async def steps(peer: Peer, bare: Channel[Any], heard: list[Any], gone: list[str]) -> None:
        asked = asyncio.ensure_future(peer.ask(messages.CloseLink(request=1, link=1)))
        await asyncio.sleep(0)
        bare.send(messages.Failed(request=1, reason="namespace", text="somebody else's"))
        with pytest.raises(Refused, match="somebody else's"):
            await asked

    dialogue(steps)


def test_nobody_waits_for_a_peer_that_is_gone() -> None:
    async def steps(peer: Peer, bare: Channel[Any], heard: list[Any], gone: list[str]) -> None:
        asked = asyncio.ensure_future(peer.ask(messages.CloseLink(request=1, link=1)))
        await asyncio.sleep(0)
        bare.close()
        with pytest.raises(PeerGone):
            await asked
        assert len(gone) == 1
        with pytest.raises(PeerGone):
            peer.send(messages.CloseLink(request=2, link=1))

    dialogue(steps)


def test_garbage_ends_the_connection_and_only_that() -> None:
    async def steps(peer: Peer, bare: Channel[Any], heard: list[Any], gone: list[str]) -> None:
        bare.socket.send(b"{]")
        while not gone:
            await asyncio.sleep(0.01)
        assert peer.closed and gone[0].startswith("not a message")

    dialogue(steps)


def test_a_peer_that_reads_nothing_is_treated_as_gone() -> None:
    async def steps(peer: Peer, bare: Channel[Any], heard: list[Any], gone: list[str]) -> None:
        with pytest.raises(PeerGone, match="stopped reading"):
            for number in range(1, 100_000):
                peer.send(messages.CloseLink(request=number, link=1))
        assert gone == ["it stopped reading"]

    dialogue(steps)


def test_the_largest_messages_about_single_names_can_be_sent() -> None:
    """Their bounds, with the longest names there can be."""
    element = Element("fd53:e9:ffff:ffff:ffff:ffff:ffff:ffff", "tcp", 65535, 0xFFFF_FFFF, "x" * 120)
    entry = NatEntry(0xFFFF_FFFF, element.address, None, "x" * 120)
    site = messages.Site(workspace="w" * 32, index=8191, host="x" * 253, block=16383, port=65535, idle=1e6)
    for message in (
        messages.Withdraw(
            request=1 << 40, workspace="w" * 32, elements=(element,) * 256, entries=(entry,) * 256
        ),
        messages.RemoveSites(request=1 << 40, sites=(site,) * 256),
        messages.ReleaseNames(request=1 << 40, workspace="w" * 32, hosts=("x" * 253,) * 256),
    ):
        assert len(msgspec.json.encode(message)) < MAX_MESSAGE
