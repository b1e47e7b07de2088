"""Every parser of foreign bytes, and what must be true whatever they are.

A target takes bytes, and returns. Any exception that it does not expect is a finding. What must hold beyond
that stands in it as an assertion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from egressd.access import acl_file, front_matter
from egressd.dns import replies, wire
from egressd.ipc import messages
from egressd.ipc.channel import decode_address
from egressd.journal import dsse, lines, notes, records
from egressd.model.errors import EgressdError, PolicyError
from egressd.model.names import canonical
from egressd.packets import conntrack_events, headers, inet_diag, netlink, nflog, nfqueue
from egressd.policy import compile as compiling
from egressd.policy import document
from egressd.residency import formats
from egressd.tls import hello
from egressd.tls.retry import Ruling, Watch

__all__ = ["TARGETS"]


def dns_query(data: bytes) -> None:
    """From a sandbox. An answer is no longer than it may be, and says which question it answers."""
    found = wire.read_query(data)
    if isinstance(found, wire.Query):
        for reply in (replies.refused("no"), replies.no_name(ttl=1), replies.any_type()):
            answer = wire.encode(found, reply, udp=True)
            assert answer[:2] == data[:2]
            assert len(answer) <= wire.UDP_SIZE
    elif isinstance(found, wire.Malformed):
        assert wire.malformed(found)[:2] == data[:2]


def dns_response(data: bytes) -> None:
    """From an upstream. Names in it are believed only in their one spelling."""
    found = wire.read_response(data)
    if found is not None:
        assert found.id == int.from_bytes(data[:2], "big")


def client_hello(data: bytes) -> None:
    """From a sandbox. However it is cut, the verdict is one; and who was named is a name."""
    whole = hello.read(data)
    if isinstance(whole, hello.Named):
        assert canonical(whole.name) == whole.name
        assert isinstance(hello.read(data[: whole.length]), hello.Named)
        assert isinstance(hello.read(data[: whole.length - 1]), hello.More)
    reader = hello.HelloReader()
    piece: hello.Reading = hello.More()
    for at in range(0, len(data), 7):
        piece = reader.feed(data[at : at + 7])
    assert _verdict(piece) == _verdict(whole) or not data


def _verdict(found: hello.Reading) -> object:
    """Without what it shows of something that is no TLS, which may not have come yet."""
    return (found.reason, found.detail) if isinstance(found, hello.Objection) else found


def second_hello(data: bytes) -> None:
    """After the first hello: the client says the even bytes of `data`, the server the odd ones. What is
    forwarded is what came, in its order, and nothing else."""
    watch = Watch(hello.Named("a.test", ech=False, length=0))
    client, server = data[::2], data[1::2]
    forwarded = b""
    for at in range(0, len(client) + 1, 64):
        for ruling in (watch.server(server[at : at + 64]), watch.client(client[at : at + 64])):
            if not isinstance(ruling, Ruling):
                return
            forwarded += ruling.forward
            assert client.startswith(forwarded)
            if ruling.over:
                return


def policy(data: bytes) -> None:
    """A file of root's, so not foreign; but what it says must be found out, or refused."""
    try:
        found = document.load(
            data, source="x.yaml", expected_name=None, is_public_suffix=lambda name: "." not in name
        )
    except PolicyError as error:
        assert error.problems
        return
    assert found.digest == compiling.digest(found)


def _decoder(kinds: object) -> Callable[[bytes], None]:
    decoder: msgspec.json.Decoder[object] = msgspec.json.Decoder(kinds, dec_hook=decode_address)  # type: ignore[arg-type]
    encoder = msgspec.json.Encoder(enc_hook=str)

    def target(data: bytes) -> None:
        try:
            found = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
            return
        assert decoder.decode(encoder.encode(found)) == found

    return target


def nflog_message(data: bytes) -> None:
    for message in nflog.parse(data):
        if isinstance(message, nflog.Logged):
            packet(message.payload)
            nflog.subject(message.prefix)


def held_packet(data: bytes) -> None:
    for held in nfqueue.parse(data):
        if isinstance(held, nfqueue.Held):
            nfqueue.accept(held)


def packet(data: bytes) -> None:
    """What a sandbox sent, as it stands in the log: never an exception, and text that can be printed."""
    for ethertype in (None, 0x0800, 0x86DD, 0x0806):
        found = headers.parse(data, ethertype=ethertype)
        inet_diag.question(found)
        assert str(found).isprintable()


def diagnosis(data: bytes) -> None:
    inet_diag.inode(data)
    for piece in netlink.pieces(data):
        if not isinstance(piece, netlink.Malformed):
            netlink.attributes(piece.body)


def record(data: bytes) -> None:
    """A line of the journal is believed in its one spelling."""
    try:
        found = lines.read(data)
    except records.RecordError:
        return
    assert records.encode(records.decode(data)) == data.removesuffix(b"\n") + b"\n"
    assert found.seq >= 0


def envelope(data: bytes) -> None:
    """A proof from anybody."""
    try:
        dsse.open(dsse.decode(data))
    except dsse.DsseError:
        return


def checkpoint(data: bytes) -> None:
    try:
        found = notes.parse(data.decode("latin-1"))
    except notes.NoteError:
        return
    assert found.size >= 0


def access_list(data: bytes) -> None:
    try:
        acl_file.load(data, source="acl.yaml")
    except PolicyError as error:
        assert error.problems


def head(data: bytes) -> None:
    """The front matter of a document that anybody may have written."""
    try:
        front_matter.read(data)
    except EgressdError:
        return


def prefixes(data: bytes) -> None:
    try:
        formats.read(data, name="x.json")
    except PolicyError as error:
        assert error.problems


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "dns-query": dns_query,
    "dns-response": dns_response,
    "client-hello": client_hello,
    "second-hello": second_hello,
    "policy": policy,
    "from-client": _decoder(messages.FROM_CLIENT),
    "from-warden": _decoder(messages.FROM_WARDEN),
    "to-warden": _decoder(messages.TO_WARDEN),
    "from-resolver": _decoder(messages.FROM_RESOLVER),
    "to-auditor": _decoder(messages.TO_AUDITOR),
    "nflog": nflog_message,
    "nfqueue": held_packet,
    "packet": packet,
    "conntrack-events": lambda data: [str(e) for e in conntrack_events.parse(data)] and None,
    "inet-diag": diagnosis,
    "journal-line": record,
    "proof": envelope,
    "checkpoint": checkpoint,
    "access-list": access_list,
    "front-matter": head,
    "prefixes": prefixes,
}
