"""The real server on real sockets: TLS 1.3 with certificates on both sides, clients that say nothing, half of
it, nonsense, too much, or that are gone. Behind it is the scene's service with its made-up verifier and
runners."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_scene import CONFIG, PROJECTED, STARTED, Scene, ended, out, request, until
from service_server import Authority, Pair, Serving, everything, serving

from egressd.broker.config import BrokerConfig, Listen, ServiceLimits, Tls
from egressd.broker.web.listening import Bounds, context, listening
from egressd.model.errors import PolicyError, Refused

QUICK = Bounds(handshake=0.5, head=0.4, body=0.4, unread=0.4, idle=1, connections=8, graceful=2)


@pytest.fixture
def scene() -> Scene:
    return Scene(BrokerConfig(workspaces=CONFIG.workspaces, limits=ServiceLimits(rate=(1000, 60.0))))


@pytest.fixture
def served(scene: Scene, tmp_path: Path) -> Iterator[Serving]:
    with serving(scene, Listen(str(tmp_path / "broker.sock"))) as found:
        yield found


@pytest.fixture
def strict(scene: Scene, tmp_path: Path) -> Iterator[Serving]:
    """With little patience."""
    with serving(scene, Listen(str(tmp_path / "broker.sock")), bounds=QUICK) as found:
        yield found


def client(served: Serving) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=served.address.path)
    headers = {"Authorization": "Bearer alice"}
    return httpx.Client(transport=transport, base_url="http://broker", headers=headers, timeout=20)


def head(method: str = "POST", path: str = "/v1/inferences", **more: str) -> bytes:
    headers = {"Host": "broker", "Authorization": "Bearer alice", "Content-Type": "application/json", **more}
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


# ---- the Unix socket


def test_a_unix_socket_is_for_everybody_and_goes_with_the_service(tmp_path: Path, scene: Scene) -> None:
    path = tmp_path / "broker.sock"
    with serving(scene, Listen(str(path))) as served:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with client(served) as http:
            assert http.get("/healthz").json() == {"status": "ok"}
            assert http.post("/v1/inferences?wait=5", json=request()).json()["state"] == "ended"
        with pytest.raises(Refused, match="somebody listens"), listening(Listen(str(path))):
            pass
        assert path.exists()
    assert not path.exists()


def test_a_socket_that_was_left_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with listening(Listen(str(path))):
        pass
    path.write_text("somebody's")
    with pytest.raises(Refused, match="no socket"), listening(Listen(str(path))):
        pass
    assert path.read_text() == "somebody's"
    with pytest.raises(Refused, match="No such file"), listening(Listen(str(tmp_path / "none" / "x"))):
        pass


def test_large_bodies_are_read_and_larger_ones_are_not(served: Serving) -> None:
    with client(served) as http:
        told = http.post("/v1/inferences?wait=5", json=request(input="x" * (10 << 20)))
        assert told.status_code == 201
        assert len(served.scene.runners.talks[0].job.stdin) == 10 << 20
        assert http.post("/v1/inferences", json=request(input="x" * (17 << 20))).status_code == 413
        chunks = (b"x" * (1 << 20) for _ in range(20))
        told = http.post("/v1/inferences", content=chunks, headers={"Content-Type": "application/json"})
        assert told.status_code == 413
        assert http.get("/healthz").status_code == 200


def test_a_whole_stream(served: Serving) -> None:
    served.scene.runners.by_itself = [
        PROJECTED,
        STARTED,
        out("one"),
        out("two", "stderr"),
        out(b"\xff"),
        ended(),
    ]
    with client(served) as http:
        with http.stream("POST", "/v1/inferences", json=request(stream=True)) as told:
            assert told.status_code == 201
            assert told.headers["content-type"] == "application/x-ndjson"
            found = [json.loads(line) for line in told.iter_lines()]
            id = told.headers["location"].rpartition("/")[2]
        assert found[:3] == [
            {"stream": "stdout", "offset": 0, "text": "one"},
            {"stream": "stderr", "offset": 3, "text": "two"},
            {"stream": "stdout", "offset": 6, "base64": "/w=="},
        ]
        assert (found[3]["state"], found[3]["result"]["status"]) == ("ended", 0)
        assert "output" not in found[3]["result"]
        again = [
            json.loads(line) for line in http.get(f"/v1/inferences/{id}/output?offset=4").text.splitlines()
        ]
        assert [one.get("text", one.get("base64")) for one in again[:2]] == ["wo", "/w=="]
        assert http.get(f"/v1/inferences/{id}/output?offset=x").status_code == 422


def test_server_sent_events_can_be_taken_up_again(served: Serving) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED, out("one\n"), out("two\n", "stderr"), ended()]
    with client(served) as http:
        id = http.post("/v1/inferences?wait=5", json=request()).json()["id"]
        accept = {"Accept": "text/event-stream"}
        whole = http.get(f"/v1/inferences/{id}/output", headers=accept)
        assert whole.headers["content-type"].startswith("text/event-stream")
        events = whole.text.split("\n\n")[:-1]
        assert [event.splitlines()[0] for event in events] == ["event: output", "event: output", "event: end"]
        assert events[0].splitlines()[1] == "id: 4"
        rest = http.get(f"/v1/inferences/{id}/output", headers={**accept, "Last-Event-ID": "4"})
        assert rest.text.split("\n\n")[:-1] == events[1:]


# ---- clients that are gone


def test_an_inference_that_is_streamed_ends_with_its_reader(served: Serving) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED, out("begun\n")]
    body = json.dumps(request(stream=True)).encode()
    with served.connect() as connection:
        connection.sendall(head(Content_Length=str(len(body))) + body)
        seen = b""
        while b"begun" not in seen:
            seen += connection.recv(4096)
    (talk,) = served.scene.runners.talks
    served.do(lambda: until(lambda: talk.closed))
    assert talk.heard == ["go", "stop: who asked went away"]


def test_one_that_is_not_goes_on_without_its_asker(served: Serving) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED]
    body = json.dumps(request()).encode()
    with served.connect() as connection:
        connection.sendall(head(path="/v1/inferences?wait=60", Content_Length=str(len(body))) + body)
        served.do(lambda: until(lambda: served.scene.runners.talks))
    with client(served) as http:
        (one,) = http.get("/v1/inferences").json()["inferences"]
        assert one["state"] in ("projecting", "running")
        assert http.delete(f"/v1/inferences/{one['id']}?wait=5").json()["state"] == "ended"


def test_a_reader_that_is_gone_ends_only_its_reading(served: Serving) -> None:
    served.scene.runners.by_itself = [PROJECTED, STARTED, out("begun\n")]
    with client(served) as http:
        id = http.post("/v1/inferences", json=request()).json()["id"]
        with served.connect() as connection:
            connection.sendall(head("GET", f"/v1/inferences/{id}/output"))
            seen = b""
            while b"begun" not in seen:
                seen += connection.recv(4096)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        served.do(lambda: until(lambda: len(served.server.server_state.tasks) == 0))
        assert http.get(f"/v1/inferences/{id}").json()["state"] == "running"


def test_a_body_that_ends_early_gives_its_place_back(served: Serving) -> None:
    for _ in range(10):
        with served.connect() as connection:
            connection.sendall(head(Content_Length="100") + b"{")
    with client(served) as http:
        served.do(lambda: until(lambda: served.scene.service._places.taken == 0))
        assert http.post("/v1/inferences?wait=5", json=request()).status_code == 201
    assert len(served.scene.runners.talks) == 1


# ---- clients that take their time


def closed_within(connection: socket.socket, seconds: float = 15.0) -> bytes:
    connection.settimeout(seconds)
    return everything(connection)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        head(Content_Length="10"),
        head(Content_Length="10") + b"{",
    ],
    ids=["nothing", "half a head", "no body", "half a body"],
)
def test_who_does_not_finish_is_hung_up_on(strict: Serving, said: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(said)
        assert b" 20" not in closed_within(connection)


def test_a_byte_now_and_then_does_not_help(strict: Serving) -> None:
    with strict.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)
            pytest.fail("it was listened to for ten seconds")


def test_a_second_request_on_a_connection_has_its_own_time(strict: Serving) -> None:
    with strict.connect() as connection:
        connection.sendall(head("GET", "/healthz"))
        seen = b""
        while not seen.endswith(b"}"):
            seen += connection.recv(4096)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        assert closed_within(connection) == b""


def test_who_does_not_read_is_hung_up_on(strict: Serving) -> None:
    strict.scene.runners.by_itself = [PROJECTED, STARTED, *[out("x" * 32768)] * 200]
    body = json.dumps(request(stream=True)).encode()
    with strict.connect() as connection:
        connection.sendall(head(Content_Length=str(len(body))) + body)
        strict.do(lambda: until(lambda: strict.scene.runners.talks, 5))
        (talk,) = strict.scene.runners.talks
        strict.do(lambda: until(lambda: talk.closed, 15))
    assert talk.heard[-1] == "stop: who asked went away"


def test_there_are_only_so_many_connections(strict: Serving) -> None:
    crowd = [strict.connect() for _ in range(8)]
    try:
        assert statuses(strict.say(head("GET", "/healthz", Connection="close"))) in ([503], [])
    finally:
        for connection in crowd:
            connection.close()
    strict.do(lambda: until(lambda: not strict.server.server_state.connections))
    assert statuses(strict.say(head("GET", "/healthz", Connection="close"))) == [200]


# ---- bytes that are not HTTP


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"GET\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/x\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX Y: z\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n folded: z\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        head(Content_Length="-1"),
        head(Content_Length="1, 2"),
        head(Content_Length="x"),
        head(Transfer_Encoding="chunked") + b"zz\r\n",
        head(Transfer_Encoding="gzip"),
        head(Content_Length="5", Transfer_Encoding="chunked")
        + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_malformed_requests_end_the_connection(strict: Serving, said: bytes) -> None:
    answers = strict.say(said)
    assert all(status >= 400 for status in statuses(answers)), answers[:300]
    assert strict.scene.runners.talks == []
    with client(strict) as http:
        assert http.get("/healthz").status_code == 200


def test_requests_in_a_row_are_answered_in_order(served: Serving) -> None:
    body = json.dumps(request()).encode()
    said = head("GET", "/healthz") + head(Content_Length=str(len(body))) + body
    said += head("GET", "/v1/nothing") + head("GET", "/healthz", Connection="close")
    assert statuses(served.say(said)) == [200, 201, 404, 200]


def test_a_web_socket_is_not_spoken(served: Serving) -> None:
    more = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
    with served.connect() as connection:
        connection.sendall(
            head("GET", "/v1/inferences", Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==", **more)
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


# ---- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secured(scene: Scene, authority: Authority) -> Iterator[Serving]:
    pair = authority.pair("server")
    tls = Tls(pair.certificate, pair.key, authority.path)
    with serving(scene, Listen("", "127.0.0.1", 0), tls=tls, bounds=QUICK) as found:
        yield found


def trusting(authority: Authority, pair: Pair | None = None, **more: Any) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=authority.path)
    if pair is not None:
        made.load_cert_chain(pair.certificate, pair.key)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_tls_with_certificates_on_both_sides(secured: Serving, authority: Authority) -> None:
    mine = trusting(authority, authority.pair("client", client=True))
    url = f"https://127.0.0.1:{secured.port}"
    headers = {"Authorization": "Bearer alice"}
    with httpx.Client(verify=mine, base_url=url, headers=headers, trust_env=False) as http:
        told = http.post("/v1/inferences?wait=5", json=request())
        assert told.json()["state"] == "ended"
        stream = told.extensions["network_stream"]
        assert stream.get_extra_info("ssl_object").version() == "TLSv1.3"
        http.headers.pop("authorization")
        assert http.get("/v1/inferences").status_code == 401, "a certificate is no token"


def refused(served: Serving, mine: ssl.SSLContext) -> str:
    """In TLS 1.3 a client learns of it when it reads first. What it is told by asyncio is no more than the
    end of the connection."""
    try:
        with (
            socket.create_connection(("127.0.0.1", served.port), timeout=10) as plain,
            mine.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(head("GET", "/healthz"))
            found = connection.recv(4096)
    except OSError as error:
        return str(error)
    assert found == b"", found
    return "closed"


def test_no_certificate_no_answer(secured: Serving, authority: Authority) -> None:
    assert refused(secured, trusting(authority))


def test_a_certificate_of_somebody_elses_is_none(
    secured: Serving, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "another")
    assert refused(secured, trusting(authority, other.pair("client", client=True)))


def test_a_servers_certificate_is_no_clients(secured: Serving, authority: Authority) -> None:
    assert refused(secured, trusting(authority, authority.pair("other-server")))


def test_tls_1_2_is_refused(secured: Serving, authority: Authority) -> None:
    pair = authority.pair("client", client=True)
    assert refused(secured, trusting(authority, pair, maximum_version=ssl.TLSVersion.TLSv1_2))
    with pytest.raises(
        AssertionError, match=r"HTTP/1\.1 200"
    ):  # and with nothing else changed it is answered
        refused(secured, trusting(authority, pair))


def test_plain_http_is_refused(secured: Serving) -> None:
    assert statuses(secured.say(head("GET", "/healthz"))) == []


def test_a_handshake_takes_only_so_long(secured: Serving) -> None:
    with secured.connect() as connection:
        connection.sendall(b"\x16\x03\x01")
        closed_within(connection)


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    pair = authority.pair("server")
    other = authority.pair("other")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\n")
    for tls, where in (
        (Tls(pair.certificate, other.key, authority.path), "tls.certificate"),
        (Tls(str(tmp_path / "none"), pair.key, authority.path), "tls.certificate"),
        (Tls(pair.certificate, pair.key, str(tmp_path / "none")), "tls.client_ca"),
        (Tls(pair.certificate, pair.key, str(broken)), "tls.client_ca"),
    ):
        with pytest.raises(PolicyError) as told:
            context(tls, source="broker.yaml")
        assert [problem.where for problem in told.value.problems] == [where]


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_nothing_of_it_is_left(scene: Scene, tmp_path: Path) -> None:
    before = descriptors()
    with serving(scene, Listen(str(tmp_path / "broker.sock"))) as served, client(served) as http:
        assert http.post("/v1/inferences?wait=5", json=request()).status_code == 201
    assert descriptors() == before
