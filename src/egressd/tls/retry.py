"""May the client's later bytes go to the server? Until the server has answered, not all of them.

The attack. A TLS 1.3 server that lacks a key share answers a ClientHello with a HelloRetryRequest, and the
client says hello again, in the clear (RFC 8446 section 4.1.4). Section 4.1.2 forbids the client to name
another server then, but OpenSSL does not compare (seen with 3.0, and through it with nginx 1.22): the
second name is handed to the server_name callback, and the certificate and the site are those of the second
name. So whoever lets everything pass after the first ClientHello lets every co-tenant of an allowed address
be reached: first an allowed name without a key share, then any other.

What is done. The client's records are followed by their headers, and the server's answer is read far enough
to tell what it is. Only early data, a change_cipher_spec and an alert pass until then; from any other record
on everything is held: no client sends one before it was answered, and what a server makes of a hello in a
record of no known type, or behind the one byte of a change_cipher_spec, is not for us to guess. If the answer
is a HelloRetryRequest, the next handshake message must be a ClientHello that names the same server (and hides
nothing if the first did not). If it is anything else, no second ClientHello can count in the clear, and the
watch is over; nearly every connection comes to that with the server's first bytes, and no client byte was
held. A server may retry only once (section 4.1.4), so the watch is over with a good second hello, too.

The server is believed: it is the one that policy permits. What it does encrypted, a renegotiation of TLS
1.2 to another name among that, is out of sight.
"""

from __future__ import annotations

from dataclasses import dataclass

from egressd.model.names import quoted
from egressd.model.verdicts import Reason
from egressd.tls.hello import MAX_STREAM, HelloReader, More, Named, Objection

__all__ = ["RETRY_RANDOM", "Ruling", "Watch"]

_ALERT, _HANDSHAKE = 21, 22  # RFC 8446 appendix B.1
# What a client may send before it was answered, and how long a record of it may be (RFC 8446 sections 5, 5.2
# and 6): change_cipher_spec, an alert, early data.
_HARMLESS = {20: range(1, 2), _ALERT: range(2, 3), 23: range((1 << 14) + 257)}
_SERVER_HELLO = 2  # RFC 8446 appendix B.3; a HelloRetryRequest is one, with this random (section 4.1.3)
RETRY_RANDOM = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
_RANDOM_END = 4 + 2 + len(RETRY_RANDOM)  # of the message: type and length, version, random
# Bytes of the server's that are looked at, again with each that comes: even in records of one byte its hello
# has told by the 228th, and alerts may come before it.
_MAX_ANSWER = 1 << 10


@dataclass(frozen=True, slots=True)
class Ruling:
    """What may go to the server now: the client's bytes in their order, those held before among them."""

    forward: bytes
    over: bool  # nothing more needs to be asked: connect the two sides directly


class Watch:
    """Begins after the first ClientHello: feed it both directions until it is `over`, or objects.

    What the server sends may always go to the client at once; feed it *before* it goes, or the client's next
    bytes may arrive first. Once over (or once it objected), feed nothing more.
    """

    __slots__ = ("_answer", "_first", "_held", "_left", "_retried", "_second", "_stopped")

    def __init__(self, first: Named) -> None:
        self._first = first
        self._answer = _Answer()
        self._retried = False
        self._left = 0  # bytes of the client's record that have not come yet
        self._stopped = False  # there is a record that may not pass: nothing does from there on
        self._held = bytearray()  # from there on; before, a header while it is incomplete
        self._second = HelloReader()  # reads what is held, once the server has retried

    def server(self, data: bytes) -> Ruling | Objection:
        """The server's next bytes."""
        if not self._retried:
            retried = self._answer.feed(data)
            if retried is False:
                return self._over()
            if retried:
                self._retried = True
                return self._judge(bytes(self._held)) if self._stopped else Ruling(b"", over=False)
        return Ruling(b"", over=False)

    def client(self, data: bytes) -> Ruling | Objection:
        """The client's next bytes; the first call gets what came with the first ClientHello."""
        passed = b""
        if not self._stopped:
            data = bytes(self._held) + data
            self._held.clear()
            at = self._follow(data)
            passed, data = data[:at], data[at:]
        self._held += data
        if len(self._held) > MAX_STREAM:
            return Objection(Reason.HELLO_TOO_LONG, "too much follows it that the server has not asked for")
        if not (self._retried and self._stopped):
            return Ruling(passed, over=False)
        ruling = self._judge(data)
        return Ruling(passed + ruling.forward, ruling.over) if isinstance(ruling, Ruling) else ruling

    def _follow(self, data: bytes) -> int:
        """How many of these bytes, which begin with a header unless `_left`, may pass."""
        at = 0
        while at < len(data):
            if self._left:
                taken = min(self._left, len(data) - at)
                self._left -= taken
                at += taken
            elif len(data) - at < 5:
                break
            else:
                self._left = data[at + 3] << 8 | data[at + 4]
                if self._left not in _HARMLESS.get(data[at], ()):
                    self._left, self._stopped = 0, True
                    break
                at += 5
        return at

    def _judge(self, data: bytes) -> Ruling | Objection:
        """Read what is held as the second ClientHello; `data` is what of it was not read yet."""
        second = self._second.feed(data)
        if isinstance(second, More):
            return Ruling(b"", over=False)
        if isinstance(second, Objection):
            return Objection(second.reason, f"the second hello: {second.detail}", second.asked)
        if second.name != self._first.name:
            return Objection(
                Reason.SNI_OTHER, "the second hello names another server", asked=quoted(second.name)
            )
        if second.ech and not self._first.ech:
            return Objection(Reason.ECH, "the second hello may hide a name, the first did not")
        return self._over()

    def _over(self) -> Ruling:
        forward = bytes(self._held)
        self._held.clear()
        return Ruling(forward, over=True)


class _Answer:
    """What did the server say first?"""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> bool | None:
        """Whether it is a HelloRetryRequest; None while that is not known."""
        self._data += data[: _MAX_ANSWER - len(self._data)]
        found = _is_retry(self._data)
        # Something endless is taken for the worse: then a client may only say the same hello again.
        return True if found is None and len(self._data) >= _MAX_ANSWER else found


def _is_retry(data: bytearray) -> bool | None:
    """Whether a server's first handshake message, cut into records as it likes, is a HelloRetryRequest.

    An alert may come before it: a warning that the name is not known (RFC 6066 section 3).
    """
    message = bytearray()
    at = 0
    while len(data) - at >= 5:
        kind, size = data[at], data[at + 3] << 8 | data[at + 4]
        if kind == _HANDSHAKE:
            message += data[at + 5 : at + 5 + size]
        elif kind != _ALERT or message:
            return False
        if message and message[0] != _SERVER_HELLO:
            return False
        if len(message) >= _RANDOM_END:
            return message[6:_RANDOM_END] == RETRY_RANDOM
        at += 5 + size
    return None
