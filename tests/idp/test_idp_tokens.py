"""ID tokens of a certified OpenID provider, got by logging in there; then every field of them wrong in turn.

Own target (`make test-idp`): oidc-provider comes from npm, and Node with it.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from provider_process import INSTALLED, Provider, Running, private_jwk

from egressd.access.claims import Provider as Habits
from egressd.broker.identity.issuers import Issuer, Nonce
from egressd.broker.identity.keyring import COOLDOWN, FRESH, STALE
from egressd.broker.identity.tokens import Code, Unauthenticated, Verifier

pytestmark = pytest.mark.idp

TENANT, OID = "6f1c1e0a-3c2b-4d5e-8f90-a1b2c3d4e5f6", "11111111-2222-3333-4444-555555555555"
GROUP = "99999999-8888-7777-6666-555555555555"
ACCOUNTS: dict[str, dict[str, Any]] = {
    "anna": {"email": "anna@acme.example", "email_verified": True, "groups": ["finance", "board"]},
    "ben": {"email": "ben@acme.example", "email_verified": False, "groups": []},
    "cleo": {"email": "cleo@acme.example"},
    "dora": {"groups": "finance"},
    "emil": {"groups": ["finance", 7]},
    "entra": {"tid": TENANT, "oid": OID, "groups": [GROUP]},
    "elsewhere": {"tid": "6f1c1e0a-3c2b-4d5e-8f90-000000000000", "oid": OID, "groups": [GROUP]},
    "google": {"hd": "acme.example", "email": "g@acme.example", "email_verified": True},
    "private": {"email": "g@gmail.example", "email_verified": True},
}


class Times:
    """The keyring's clock. Tokens are held against the real one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    if not (INSTALLED / ".installed").exists():
        pytest.skip("make test-idp installs the provider")
    return Provider(tmp_path_factory.mktemp("idp"))


@pytest.fixture(scope="module")
def keys() -> list[Any]:
    return [
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
        ec.generate_private_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ]


@pytest.fixture(scope="module")
def idp(provider: Provider, keys: list[Any]) -> Iterator[Running]:
    jwks = [private_jwk(key, kid=f"k{number}") for number, key in enumerate(keys)]
    with provider.running(jwks, ACCOUNTS) as running:
        yield running


@pytest.fixture
def issuer(idp: Running, provider: Provider) -> Issuer:
    return Issuer(name="op", issuer=idp.issuer, audiences=("egressd",), ca_file=provider.ca_file)


@pytest.fixture(scope="module")
def annas(idp: Running) -> str:
    """One of hers. Logging in takes a while."""
    return idp.id_token("anna")


def refusal(one: Verifier, token: str, *, nonce: str = "") -> Code:
    with pytest.raises(Unauthenticated) as caught:
        one.verify(token, nonce=nonce)
    return caught.value.code


def claims_in(token: str) -> dict[str, Any]:
    """As they stand, for the test to look at."""
    part = token.split(".")[1]
    found = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    assert isinstance(found, dict)
    return found


def test_who_logs_in_there_is_known_here(issuer: Issuer, annas: str) -> None:
    said = claims_in(annas)
    found = Verifier([issuer]).verify(annas)
    assert found.user == "user:op:anna"
    assert found.groups == {"group:op:finance", "group:op:board"}
    assert found.email == "anna@acme.example"
    assert found.expires == said["exp"] == said["iat"] + 600
    assert Verifier([issuer]).troubles() == {}


@pytest.mark.parametrize("algorithm", ["PS256", "ES256", "EdDSA"])
def test_each_algorithm_that_the_provider_signs_with(idp: Running, issuer: Issuer, algorithm: str) -> None:
    client = f"egressd-{algorithm}"
    token = idp.id_token("anna", client=client)
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    theirs = replace(issuer, audiences=(client,))
    assert Verifier([theirs]).verify(token).subject == "anna"
    assert refusal(Verifier([replace(theirs, algorithms=("RS256",))]), token) is Code.ALGORITHM


def test_a_token_signed_with_the_clients_secret(idp: Running, issuer: Issuer) -> None:
    """OpenID Connect lets clients have it so. Whoever knows the client's secret would be anybody."""
    token = idp.id_token("anna", client="symmetric")
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert refusal(Verifier([replace(issuer, audiences=("symmetric",))]), token) is Code.ALGORITHM


def test_a_token_for_another_client(idp: Running, issuer: Issuer) -> None:
    token = idp.id_token("anna", client="console")
    assert refusal(Verifier([issuer]), token) is Code.AUDIENCE
    assert Verifier([replace(issuer, audiences=("egressd", "console"))]).verify(token)


def test_an_access_token_for_the_same_audience(idp: Running, issuer: Issuer) -> None:
    """The same issuer, key, subject and audience: only its type says what it is."""
    tokens = idp.tokens("anna", resource="https://api.example/")
    access = tokens["access_token"]
    said = claims_in(access)
    assert (said["iss"], said["sub"], said["aud"]) == (issuer.issuer, "anna", "egressd")
    assert refusal(Verifier([issuer]), access) is Code.HEADER
    assert refusal(Verifier([replace(issuer, types=("jwt", "at+jwt"))]), access) is Code.KIND
    assert Verifier([issuer]).verify(tokens["id_token"])


def test_an_opaque_access_token(idp: Running, issuer: Issuer) -> None:
    assert refusal(Verifier([issuer]), idp.tokens("anna")["access_token"]) is Code.FORM


def test_groups_as_the_provider_says_them(idp: Running, issuer: Issuer) -> None:
    one = Verifier([issuer])
    ben = one.verify(idp.id_token("ben"))
    assert ben.groups == frozenset()
    assert ben.email == "", "nobody has verified it"
    assert one.verify(idp.id_token("dora")).groups == {"group:op:finance"}
    assert refusal(one, idp.id_token("cleo")) is Code.CLAIMS, "it does not say"
    assert refusal(one, idp.id_token("emil")) is Code.CLAIMS
    okta = Verifier([replace(issuer, provider=Habits.OKTA)])
    assert refusal(okta, idp.id_token("dora")) is Code.CLAIMS, "Okta's is a list"
    optional = Verifier([replace(issuer, optional_groups=True)])
    assert optional.verify(idp.id_token("cleo")).groups == frozenset()


def test_tenants_and_domains(idp: Running, issuer: Issuer) -> None:
    entra = Verifier([replace(issuer, provider=Habits.ENTRA, tenant=TENANT)])
    assert entra.verify(idp.id_token("entra")).user == f"user:op:{OID}"
    assert refusal(entra, idp.id_token("elsewhere")) is Code.CLAIMS
    assert refusal(entra, idp.id_token("anna")) is Code.CLAIMS
    google = Verifier([replace(issuer, provider=Habits.GOOGLE, domain="acme.example")])
    assert google.verify(idp.id_token("google")).groups == frozenset()
    assert refusal(google, idp.id_token("private")) is Code.CLAIMS


def test_the_nonce_of_the_login(idp: Running, issuer: Issuer) -> None:
    nonce = secrets.token_urlsafe(16)
    once = Verifier([replace(issuer, nonce=Nonce.ONCE)], clock=_before_the_login())
    token = idp.id_token("anna", nonce=nonce)
    assert claims_in(token)["nonce"] == nonce
    one = Verifier([issuer])
    assert one.verify(token, nonce=nonce)
    assert refusal(one, token) is Code.NONCE
    assert refusal(one, token, nonce=nonce + "x") is Code.NONCE
    assert once.verify(token, nonce=nonce)
    assert refusal(once, token, nonce=nonce) is Code.REPLAYED
    assert refusal(once, idp.id_token("anna")) is Code.NONCE


def _before_the_login() -> Callable[[], float]:
    """What the verifier takes for the time when it begins: a token's `iat` is in whole seconds."""
    import time

    times = iter([time.time() - 5])
    return lambda: next(times, None) or time.time()


def test_time(issuer: Issuer, annas: str) -> None:
    said = claims_in(annas)
    clock = Times()
    one = Verifier([issuer], clock=clock)
    for now, code in (
        (said["iat"] - 61, Code.ISSUED),
        (said["iat"] - 60, None),
        (said["exp"] + 59, None),
        (said["exp"] + 60, Code.EXPIRED),
    ):
        clock.now = now
        assert (refusal(one, annas) if code else one.verify(annas) and None) is code
    clock.now = said["iat"] + 400
    assert refusal(Verifier([replace(issuer, max_age=300)], clock=clock), annas) is Code.AGE


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "exp", "iat", "groups", "email"])
def test_a_field_that_somebody_changed(issuer: Issuer, annas: str, name: str) -> None:
    """The signature is the provider's, the claims are not."""
    header, _, signature = annas.split(".")
    said = claims_in(annas)
    said[name] = f"{said[name]}x" if isinstance(said[name], str) else [said[name], "x"]
    forged = base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
    code = refusal(Verifier([issuer]), f"{header}.{forged}.{signature}")
    assert code is (Code.ISSUER if name == "iss" else Code.SIGNATURE)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("alg", "none", Code.ALGORITHM),
        ("alg", "HS256", Code.ALGORITHM),
        ("alg", "RS384", Code.ALGORITHM),
        ("alg", "PS256", Code.SIGNATURE),
        ("alg", "ES256", Code.KEY),
        ("kid", "k1", Code.KEY),
        ("kid", "other", Code.KEY),
        ("kid", None, Code.SIGNATURE),
        ("typ", "at+jwt", Code.HEADER),
        ("crit", ["exp"], Code.HEADER),
        ("jku", "https://evil.example/", Code.HEADER),
    ],
)
def test_a_header_that_somebody_changed(
    issuer: Issuer, annas: str, name: str, value: Any, code: Code
) -> None:
    _, claims, signature = annas.split(".")
    header = jwt.get_unverified_header(annas) | {name: value}
    header = {key: one for key, one in header.items() if one is not None}
    forged = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    assert refusal(Verifier([issuer]), f"{forged}.{claims}.{signature}") is code


def test_the_providers_public_key_as_a_secret(issuer: Issuer, annas: str, keys: list[Any]) -> None:
    from cryptography.hazmat.primitives import hmac, serialization
    from cryptography.hazmat.primitives.hashes import SHA256

    public = (
        keys[0]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"k0"}').rstrip(b"=").decode()
    text = f"{header}.{annas.split('.')[1]}"
    mac = hmac.HMAC(public, SHA256())
    mac.update(text.encode())
    forged = f"{text}.{base64.urlsafe_b64encode(mac.finalize()).rstrip(b'=').decode()}"
    assert refusal(Verifier([issuer]), forged) is Code.ALGORITHM


def test_an_issuer_that_is_nearly_the_same(idp: Running, issuer: Issuer, annas: str) -> None:
    slash = replace(issuer, issuer=issuer.issuer + "/")
    assert refusal(Verifier([slash]), annas) is Code.ISSUER
    assert "describes another issuer" in Verifier([slash]).troubles()["op"]


def test_a_provider_whose_certificate_is_not_trusted(issuer: Issuer, annas: str) -> None:
    one = Verifier([replace(issuer, ca_file="")])
    assert refusal(one, annas) is Code.UNAVAILABLE
    assert "certificate verify failed" in one.troubles()["op"]


def test_without_a_network(issuer: Issuer, annas: str, keys: list[Any], tmp_path: Path) -> None:
    public = [
        {name: value for name, value in private_jwk(key, kid=f"k{number}").items() if name in _PUBLIC}
        for number, key in enumerate(keys)
    ]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": public}))

    def nobody(url: str, ca_file: str) -> Any:
        raise AssertionError(url)

    one = Verifier([replace(issuer, ca_file="", jwks_file=str(tmp_path / "keys.json"))], fetch=nobody)
    assert one.verify(annas).subject == "anna"


_PUBLIC = {"kty", "kid", "use", "n", "e", "crv", "x", "y"}


def test_keys_that_rotate_and_a_provider_that_is_away(provider: Provider) -> None:
    """A second provider, started three times at one address: with a key, with another, and not at all."""
    apart = Provider(Path(provider.ca_file).parent / "rotation")
    old, new = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    clock = Times()
    with apart.running([private_jwk(old, kid="old")], ACCOUNTS) as idp:
        issuer = Issuer(name="op", issuer=idp.issuer, audiences=("egressd",), ca_file=apart.ca_file)
        one = Verifier([issuer], elapsed=clock)
        before = idp.id_token("anna")
        assert one.verify(before)
    clock.now = COOLDOWN
    assert one.verify(before), "it is away, and the keys are fresh"
    with apart.running([private_jwk(new, kid="new")], ACCOUNTS) as idp:
        after = idp.id_token("anna")
        assert one.verify(before), "its key is withdrawn, which nobody has noticed yet"
        assert one.verify(after)
        assert refusal(one, before) is Code.KEY
    clock.now += FRESH[1]
    assert one.verify(after), "it is away, and the keys are old"
    clock.now += STALE
    assert refusal(one, after) is Code.UNAVAILABLE
    with apart.running([private_jwk(new, kid="new")], ACCOUNTS):
        clock.now += COOLDOWN
        assert one.verify(after)
