"""The caller's end of the control socket, talking to daemons that say all kinds of things."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.ipc import messages
from egressd.ipc.channel import Channel, payload
from egressd.model.errors import ProtocolError, Refused
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control, Gone

Answering = Callable[[Channel[Any]], None]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[Answering], str]]:
    """`daemon(answer)` gives the run directory of a daemon that reads one message, then does `answer`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def start(answer: Answering) -> str:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                channel: Channel[Any] = Channel(connection, messages.FROM_CLIENT)
                channel.receive()
                answer(channel)

        threading.Thread(target=serve, daemon=True).start()
        return str(tmp_path)

    yield start
    listener.close()


def answer(document: object) -> Answering:
    data = json.dumps(document).encode()

    def send(channel: Channel[Any]) -> None:
        with payload(data) as descriptor:
            channel.send(messages.Answer(payload_length=len(data)), descriptor=descriptor)

    return send


TERMS = messages.Terms(workspace="acme", guard="enforce", policy="sha256:0", wall=3.0)


def test_terms_are_given(daemon: Callable[[Answering], str]) -> None:
    with Control(daemon(lambda channel: channel.send(TERMS))) as control:
        assert control.enter("acme") == TERMS


@pytest.mark.parametrize("verb", ["ask", "why", "apply"])
def test_documents_are_given(daemon: Callable[[Answering], str], verb: str) -> None:
    with Control(daemon(answer({"a": [1, None]}))) as control:
        asked = {
            "ask": lambda: control.ask("status"),
            "why": lambda: control.why("acme", "example.org"),
            "apply": lambda: control.apply(dry_run=True),
        }
        assert asked[verb]() == {"a": [1, None]}


@pytest.mark.parametrize(
    ("said", "reason", "text"),
    [
        (messages.Refusal(reason="member", text="not you"), Reason.MEMBER, "not you"),
        (messages.Refusal(reason="made-up", text="odd"), Reason.UNKNOWN, "odd"),
        (messages.Revoked(text="going down"), Reason.UNAVAILABLE, "going down"),
        (None, Reason.UNAVAILABLE, "closed the connection"),
    ],
)
def test_every_no_is_a_refusal(
    daemon: Callable[[Answering], str], said: Any, reason: Reason, text: str
) -> None:
    run_dir = daemon(lambda channel: None if said is None else channel.send(said))
    with Control(run_dir) as control, pytest.raises(Refused, match=text) as caught:
        control.enter("acme")
    assert caught.value.reason is reason


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"type":"Nonsense"}', b"\xff" * 100, b"[]"])
def test_what_is_no_message_grants_nothing(daemon: Callable[[Answering], str], data: bytes) -> None:
    run_dir = daemon(lambda channel: channel.socket.sendall(data))
    with Control(run_dir) as control, pytest.raises(ProtocolError):
        control.enter("acme")


def test_the_wrong_answer_grants_nothing(daemon: Callable[[Answering], str]) -> None:
    with Control(daemon(answer({}))) as control, pytest.raises(ProtocolError, match="Answer is no answer"):
        control.enter("acme")


@pytest.mark.parametrize("case", ["absent", "a file", "nobody listens"])
def test_without_a_daemon_it_says_what_to_do(tmp_path: Path, case: str) -> None:
    place = tmp_path / "control.sock"
    if case == "a file":
        place.write_text("")
    if case == "nobody listens":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place))
    with pytest.raises(Refused, match="systemctl start egressd") as caught:
        Control(str(tmp_path))
    assert caught.value.reason is Reason.UNAVAILABLE


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (messages.Revoked(text="the workspace was removed"), "the workspace was removed"),
        (TERMS, "Terms unasked"),
    ],
)
def test_why_the_lease_ended(daemon: Callable[[Answering], str], said: Any, text: str) -> None:
    def send(channel: Channel[Any]) -> None:
        channel.send(TERMS)
        if said is not None:
            channel.send(said)

    with Control(daemon(send)) as control:
        control.enter("acme")
        assert text in control.ended()


def test_an_end_without_a_word_is_no_end_of_the_lease(daemon: Callable[[Answering], str]) -> None:
    with Control(daemon(lambda channel: channel.send(TERMS))) as control:
        control.enter("acme")
        with pytest.raises(Gone):
            control.ended()
        assert isinstance(control.last_word(), Gone)


def test_what_was_said_before_a_reset_is_heard(daemon: Callable[[Answering], str]) -> None:
    """The daemon revokes and closes, with something of ours unread: the kernel tells the reset first."""
    closed = threading.Event()

    def revoke(channel: Channel[Any]) -> None:
        channel.send(TERMS)
        told.wait(10)
        channel.send(messages.Revoked(text="the workspace was removed"))
        channel.close()
        closed.set()

    told = threading.Event()
    with Control(daemon(revoke)) as control:
        control.enter("acme")
        control.tell(messages.Ended(status=0))
        told.set()
        assert closed.wait(10)
        assert control.ended() == "the workspace was removed"


@pytest.mark.parametrize("read", [True, False])
def test_whether_the_last_word_was_read_is_known(daemon: Callable[[Answering], str], read: bool) -> None:
    def die(channel: Channel[Any]) -> None:
        channel.send(TERMS)
        if read:
            channel.receive()
        else:
            asked.wait(10)

    asked = threading.Event()
    with Control(daemon(die)) as control:
        control.enter("acme")
        control._send(messages.ReadSpent())
        asked.set()
        with pytest.raises(Gone) as caught:
            control._expect(messages.Spent)
        assert caught.value.unread is not read
        with pytest.raises(Gone) as caught:
            control.spent()
        assert caught.value.unread, "nobody is there any more"


def test_a_crowd_at_the_door_waits_for_its_turn(tmp_path: Path) -> None:
    """A full backlog is no refusal: connect(2) waits for room."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(1)
        waiting: list[Control] = []
        crowd = [threading.Thread(target=lambda: waiting.append(Control(str(tmp_path)))) for _ in range(8)]
        for one in crowd:
            one.start()
        taken = [listener.accept()[0] for _ in crowd]
        for one in crowd:
            one.join(10)
        assert len(waiting) == len(crowd)
        for each in (*waiting, *taken):
            each.close()
