"""Keys over HTTPS, from servers that are right, wrong, slow, huge or somebody else's."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from identity_provider import (
    Server,
    claims_of,
    ec_key,
    jwk,
    key_set,
    serving,
    signer,
    slowly,
    token,
    unix_now,
)

from egressd.broker.identity import fetching
from egressd.broker.identity.fetching import MAX_BODY, fetch
from egressd.broker.identity.issuers import Issuer
from egressd.broker.identity.rereading import Unavailable
from egressd.broker.identity.tokens import Code, Unauthenticated, Verifier
from lab.authority import Authority
from lab.machine import open_descriptors


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def ca_file(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(authority.root)
    return str(path)


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not about time, a busy machine may take its own."""
    monkeypatch.setattr(fetching, "DEADLINE", 60.0)


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    with serving(authority) as made:
        yield made


def good(issuer: Issuer, **claims: Any) -> str:
    now = unix_now()
    said = claims_of(issuer, iat=now, exp=now + 600, **claims)
    return token({"alg": "ES256", "kid": "e1"}, said, signer(ec_key(), "ES256"))


def issuer_at(server: Server, ca_file: str, *, path: str = "/idp") -> Issuer:
    url = server.serve_provider(jwk(ec_key(), kid="e1"), path=path, cache_control="public, max-age=600")
    return Issuer(name="op", issuer=url, audiences=("egressd",), ca_file=ca_file)


def test_from_discovery_to_an_identity(server: Server, ca_file: str) -> None:
    issuer = issuer_at(server, ca_file)
    one = Verifier([issuer])
    before = open_descriptors()
    assert one.verify(good(issuer)).user == "user:op:00u1anna"
    assert one.verify(good(issuer, sub="00u2ben")).user == "user:op:00u2ben"
    assert server.asked == ["/idp/.well-known/openid-configuration", "/idp/keys"]
    assert open_descriptors() <= before
    assert one.troubles() == {}


def test_from_a_thread_of_an_event_loop(server: Server, ca_file: str) -> None:
    """As the service does."""
    issuer = issuer_at(server, ca_file)
    one = Verifier([issuer])

    async def ask() -> str:
        return (await anyio.to_thread.run_sync(one.verify, good(issuer))).user

    assert anyio.run(ask) == "user:op:00u1anna"


def test_two_providers_of_one_server_are_two(server: Server, ca_file: str) -> None:
    """As Okta's authorization servers and Entra's tenants are."""
    a, b = issuer_at(server, ca_file, path="/a"), issuer_at(server, ca_file, path="/b")
    one = Verifier([a])
    assert one.verify(good(a))
    with pytest.raises(Unauthenticated) as caught:
        one.verify(good(b))
    assert caught.value.code is Code.ISSUER


def refused(url: str, ca_file: str) -> str:
    with pytest.raises(Unavailable) as caught:
        fetch(url, ca_file)
    return str(caught.value)


def test_a_certificate_of_another_authority(server: Server, ca_file: str, tmp_path: Path) -> None:
    server.serve_json("/x", {})
    assert fetch(server.url + "/x", ca_file).body == b"{}"
    other = tmp_path / "other.pem"
    other.write_bytes(Authority().root)
    assert "certificate verify failed" in refused(server.url + "/x", str(other))
    assert "certificate verify failed" in refused(server.url + "/x", "")
    assert refused(server.url + "/x", str(tmp_path / "missing.pem"))
    assert server.asked == ["/x"]


def test_a_certificate_for_another_name(authority: Authority, ca_file: str) -> None:
    with serving(authority, "op.example") as server:
        server.serve_json("/x", {})
        assert "certificate verify failed" in refused(server.url + "/x", ca_file)
        assert server.asked == []


def test_nothing_is_sent_in_clear(server: Server, ca_file: str) -> None:
    server.serve_json("/x", {})
    assert "is not https" in refused(server.url.replace("https", "http") + "/x", ca_file)
    assert server.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server: Server, ca_file: str, status: int) -> None:
    server.serve_json("/there", {})
    server.answers["/here"] = (status, {"location": "/there"}, b"")
    assert str(status) in refused(server.url + "/here", ca_file)
    assert server.asked == ["/here"]


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 404, 500, 503])
def test_only_200_is_an_answer(server: Server, ca_file: str, status: int) -> None:
    server.answers["/x"] = (status, {"content-length": "0"}, b"")
    assert str(status) in refused(server.url + "/x", ca_file)


def test_the_environment_names_no_proxy(
    server: Server, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.serve_json("/x", {})
    assert fetch(server.url + "/x", ca_file).body == b"{}"


def test_a_huge_answer_is_cut_short(server: Server, ca_file: str) -> None:
    server.serve_json("/most", b" " * MAX_BODY)
    server.serve_json("/more", b" " * (MAX_BODY + 1))
    assert len(fetch(server.url + "/most", ca_file).body) == MAX_BODY
    assert f"more than {MAX_BODY}" in refused(server.url + "/more", ca_file)


def test_an_endless_answer_is_cut_short(server: Server, ca_file: str) -> None:
    def endless(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not server.closing.is_set():
            handler.wfile.write(b" " * 65_536)

    server.answers["/x"] = endless
    assert f"more than {MAX_BODY}" in refused(server.url + "/x", ca_file)


def test_what_is_small_only_on_the_wire(server: Server, ca_file: str) -> None:
    packed = gzip.compress(b" " * (MAX_BODY * 100))
    assert len(packed) < MAX_BODY
    server.serve_json("/x", packed, content_encoding="gzip")
    assert "encoding" in refused(server.url + "/x", ca_file)


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"], ids=["head", "body"]
)
def test_a_server_that_drips_is_left(
    server: Server, ca_file: str, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is in time; all of them never would be."""
    monkeypatch.setattr(fetching, "DEADLINE", 0.5)
    drip = slowly(b"HTTP/1.1 200 OK\r\nx-padding: " + b"x" * 10_000, server, pause=0.05)

    def answer(handler: Any) -> None:
        handler.wfile.write(head)
        drip(handler)

    server.answers["/x"] = answer
    assert "did not answer within 0.5 s" in refused(server.url + "/x", ca_file)


def test_a_server_that_says_nothing(server: Server, ca_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DEADLINE", 0.5)
    server.answers["/x"] = lambda handler: server.closing.wait(20) and None
    assert "did not answer" in refused(server.url + "/x", ca_file)


@pytest.mark.parametrize(
    "said", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"]
)
def test_a_server_that_speaks_otherwise(server: Server, ca_file: str, said: bytes) -> None:
    server.answers["/x"] = lambda handler: handler.wfile.write(said) and None
    assert refused(server.url + "/x", ca_file)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:1/x",
        "https://[::1",
        "https://",
        "https://127.0.0.1:99999/",
        "gopher://x",
        "",
        "https://a\nb/",
    ],
)
def test_where_nobody_answers(url: str, ca_file: str) -> None:
    assert refused(url, ca_file)


@pytest.mark.parametrize(
    ("said", "max_age"),
    [
        ("", None),
        ("public, max-age=22138, must-revalidate, no-transform", 22138.0),
        ('MAX-AGE="60"', 60.0),
        ("s-maxage=60", None),
        ("no-store", 0.0),
        ("max-age=600, no-cache", 0.0),
        ("max-age=-1", None),
        ("max-age=99999999999", None),
        ("max-age=x", None),
    ],
)
def test_how_long_an_answer_says_to_hold(
    server: Server, ca_file: str, said: str, max_age: float | None
) -> None:
    server.serve_json("/x", key_set(), cache_control=said)
    assert fetch(server.url + "/x", ca_file).max_age == max_age


def test_an_outage_of_the_provider(server: Server, ca_file: str) -> None:
    issuer = issuer_at(server, ca_file)
    one = Verifier([issuer])
    known = dict(server.answers)
    server.answers.clear()
    with pytest.raises(Unauthenticated) as caught:
        one.verify(good(issuer))
    assert caught.value.code is Code.UNAVAILABLE
    server.answers.update(known)
    with pytest.raises(Unauthenticated) as caught:
        one.verify(good(issuer))  # it is not asked again at once
    assert caught.value.code is Code.UNAVAILABLE
    assert len(server.asked) == 1
