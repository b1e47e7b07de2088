"""The Python client against the real server; behind it the scene's made-up verifier, store and runners."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_scene import PROJECTED, STARTED, Scene, ended, out, until
from service_server import Authority, Serving, serving

from egressd.broker.client import Answered, Broker, NotAnswered, Piece
from egressd.broker.config import Listen, Tls


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with serving(Scene(), Listen(str(tmp_path / "broker.sock"))) as found:
        yield found


@pytest.fixture
def broker(served: Serving) -> Iterator[Broker]:
    with Broker(str(served.address), token="alice") as found:
        yield found


def test_asking_and_waiting_for_the_end(served: Serving, broker: Broker) -> None:
    served.scene.runners.by_itself = [
        PROJECTED,
        STARTED,
        out("yes\n"),
        out(b"\xff", "stderr"),
        ended(status=3),
    ]
    result = broker.ask(workspace="acme", inference="default", candidates=["handbook:a.md"], input="May I?")
    assert (result.state, result.status, result.stdout, result.errors) == ("ended", 3, "yes\n", b"\xff")
    assert [file["id"] for file in result.receipt["files"]] == ["handbook:a.md"]
    assert served.scene.runners.talks[0].job.stdin == b"May I?"
    assert [one["id"] for one in broker.list()] == [result.id]
    assert broker.receipt(result.id) == result.receipt
    assert broker.receipt(result.id, proof=True)["payload"] == "acme eg41"
    listed = broker.manifest(result.id)
    assert f"sha256:{hashlib.sha256(listed).hexdigest()}" == result.receipt["manifest"]
    with Broker(str(served.address), token="bob") as other, pytest.raises(Answered) as told:
        other.manifest(result.id)
    assert told.value.status == 404


def test_reading_what_is_written_as_it_comes(served: Serving, broker: Broker) -> None:
    served.scene.runners.by_itself = [
        PROJECTED,
        STARTED,
        out("one"),
        out("two", "stderr"),
        out(b"\xfe"),
        ended(),
    ]
    with broker.stream(workspace="acme", inference="default", input=b"\xff\x00") as running:
        assert list(running) == [Piece("stdout", b"one"), Piece("stderr", b"two"), Piece("stdout", b"\xfe")]
    assert running.result is not None
    assert (running.result.output, running.result.errors) == (b"one\xfe", b"two")
    assert running.result.id == running.id
    assert served.scene.runners.talks[0].job.stdin == b"\xff\x00"


def test_leaving_early_cancels_it(served: Serving, broker: Broker) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED, out("one")]
    with broker.stream(workspace="acme", inference="default") as running:
        assert next(iter(running)).data == b"one"
    (talk,) = served.scene.runners.talks
    served.do(lambda: until(lambda: talk.closed))
    assert talk.heard[-1] == "stop: who asked went away"


def test_starting_cancelling_and_waiting(served: Serving, broker: Broker) -> None:
    served.scene.runners.by_itself = None
    id = broker.start(workspace="acme", command=["sleep", "9"], network="none", limits={"wall": 9})
    served.do(lambda: until(lambda: served.scene.runners.talks))
    assert broker.show(id)["state"] == "projecting"
    broker.cancel(id)
    result = broker.wait(id)
    assert (result.status, result.why) == (143, "it was cancelled")
    job = served.scene.runners.talks[0].job
    assert (job.command, job.network, job.limits.wall) == (("sleep", "9"), "none", 9)


@pytest.mark.parametrize(
    ("token", "request_", "status", "says"),
    [
        (
            "alice",
            {"workspace": "nowhere", "inference": "default"},
            404,
            "there is nothing here that you may see",
        ),
        ("viewer", {"workspace": "acme", "command": ["id"]}, 403, "may not run commands of one's own"),
        ("bad", {"workspace": "acme", "inference": "default"}, 401, "invalid token"),
        (
            "alice",
            {"workspace": "acme", "inference": "x"},
            422,
            "inference: the workspace offers none of that name",
        ),
    ],
)
def test_a_no_is_an_exception_with_its_reason(
    served: Serving, token: str, request_: Any, status: int, says: str
) -> None:
    with Broker(str(served.address), token=token) as broker:
        for ask in (broker.ask, broker.stream):
            with pytest.raises(Answered, match=says) as told:
                ask(**request_)
            assert told.value.status == status


def test_the_token_is_not_shown(broker: Broker) -> None:
    assert "alice" not in repr(broker)


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    with (
        Broker(f"unix:{tmp_path}/none.sock", token="alice") as broker,
        pytest.raises(NotAnswered, match="cannot be reached"),
    ):
        broker.list()
    for address in ("http://127.0.0.1:1", "nonsense", "unix:relative"):
        with pytest.raises(NotAnswered, match="no broker's address"):
            Broker(address, token="alice")
    with pytest.raises(NotAnswered, match="No such file"):
        Broker("https://127.0.0.1:1", token="alice", ca=str(tmp_path / "none.pem"))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 302 Found\r\nlocation: https://elsewhere.example/\r\ncontent-length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
    ],
)
def test_what_is_no_broker_is_not_believed(tmp_path: Path, answer: bytes) -> None:
    """And a token is not sent on to where it points."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x.sock"))
        listener.listen()

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        with Broker(f"unix:{tmp_path}/x.sock", token="alice") as broker, pytest.raises(NotAnswered):
            broker.list()
        thread.join(timeout=10)


def test_over_tls_with_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # which is not used
    authority = Authority(tmp_path)
    pair, mine = authority.pair("server"), authority.pair("client", client=True)
    tls = Tls(pair.certificate, pair.key, authority.path)
    with serving(Scene(), Listen("", "127.0.0.1", 0), tls=tls) as served:
        address = f"https://127.0.0.1:{served.port}"
        keys = {"certificate": mine.certificate, "key": mine.key}
        with Broker(address, token="alice", ca=authority.path, **keys) as broker:
            assert broker.ask(workspace="acme", inference="default").status == 0
        with Broker(address, token="alice", ca=authority.path) as broker, pytest.raises(NotAnswered):
            broker.list()
        with (
            Broker(address, token="alice", **keys) as broker,
            pytest.raises(NotAnswered, match="CERTIFICATE"),
        ):
            broker.list()
