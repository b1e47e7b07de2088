"""Who asks: an ID token (OpenID Connect Core 1.0, section 2) in, an `access.Identity` out, or a refusal.

A token is foreign until its signature is verified, and what it may say of its own verification is nothing:
`iss` selects the provider from the configuration, and there stand the algorithms, where its keys are and the
audience (RFC 8725). `kid` only chooses among that provider's keys. Whatever a header brings to be verified
with (`jwk`, `jku`, `x5c`, `x5u`) is refused, not followed.

PyJWT verifies the signature. The claims are read here: PyJWT takes the time from the machine, a time from
text, and an audience among others as good; here the clock is an argument, and all three are not so.

Tokens for something else are refused, though the same provider signed them for the same client (RFC 8725,
section 2.8): access tokens, refresh tokens, notices that somebody logged out.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hmac
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jwt

from egressd.access import claims as access_claims
from egressd.access.claims import GroupClaims
from egressd.access.principals import Identity
from egressd.broker.identity.fetching import Fetch, fetch
from egressd.broker.identity.issuers import Issuer, Nonce
from egressd.broker.identity.jwks import Key, NoKey
from egressd.broker.identity.keyring import Keyring, boottime
from egressd.broker.identity.rereading import Reread, Unavailable
from egressd.model import tree
from egressd.model.errors import EgressdError, Unfit
from egressd.model.names import quoted

if TYPE_CHECKING:
    from jwt.types import SigOptions

__all__ = ["MAX_TOKEN", "PUBLIC_TEXT", "Code", "Unauthenticated", "Verifier"]

MAX_TOKEN = 16 * 1024  # characters. Entra names up to 200 groups by their UUIDs: 10 kB in base64
PUBLIC_TEXT = "invalid token"  # all that an asker is told, with RFC 6750's `invalid_token`
_MAX_AUDIENCES = 32
_MAX_NONCE = 256  # characters
_MAX_TIME = 1 << 40  # seconds: later than any clock, exact as a float
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")  # RFC 7515, section 7.1
# Header parameters that bring or point to a key (RFC 7515, section 4.1), or change what is signed (RFC 7797).
_NEVER = ("jwk", "jku", "x5c", "x5u", "b64", "zip", "enc")
# Claims of other tokens: scopes (Okta, Entra; RFC 9068), events of a log-out (Back-Channel Logout 1.0, 2.4).
_OF_OTHERS = ("scp", "scope", "events")
_SAID_KIND = ("typ", "token_use")  # Keycloak's and Cognito's own claim; of an ID token they say "ID", "id"


class Code(enum.StrEnum):
    """What was wrong with a token. For the record: an asker is never told which it was."""

    FORM = "form"  # size, parts, base64, JSON
    HEADER = "header"  # crit, typ, a key of its own
    ALGORITHM = "algorithm"
    ISSUER = "issuer"
    KEY = "key"  # no such key, or more than one
    UNAVAILABLE = "unavailable"  # keys or groups are not to be had: the token may be good
    SIGNATURE = "signature"
    KIND = "kind"  # no ID token
    AUDIENCE = "audience"
    PARTY = "party"
    EXPIRED = "expired"
    EARLY = "early"  # nbf
    ISSUED = "issued"  # iat
    AGE = "age"
    SUBJECT = "subject"
    NONCE = "nonce"
    REPLAYED = "replayed"
    FULL = "full"  # no room to remember that it was used
    CLAIMS = "claims"  # tenant, domain, groups: access.claims


class Unauthenticated(EgressdError):
    """Nobody is believed. `text` is for the record, foreign values in it quoted and bounded; the asker is
    told `PUBLIC_TEXT`, whatever the code."""

    def __init__(self, code: Code, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(f"{code}: {text}")


class Verifier:
    """All providers. Threads may share it; none of them may run an event loop (see `broker.fetching`)."""

    def __init__(
        self,
        issuers: Iterable[Issuer],
        *,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = boottime,
        fetch: Fetch = fetch,
    ) -> None:
        """`clock` is Unix time, which tokens are held against; `elapsed` measures the age of keys."""
        self._clock = clock
        self._sources = {one.issuer: _Source(one, elapsed, fetch) for one in issuers}
        self._used = _Used(since=clock())

    def verify(self, token: str, *, nonce: str = "") -> Identity:
        """Whom the token speaks of. `nonce` is what the asker says it asked its provider with, "" if nothing.

        `Unauthenticated` for everything else; no other exception, whatever the token is.
        """
        header, unverified = _open(token)
        source = self._source(unverified.get("iss"))
        algorithm = _check_header(header, source.issuer)
        key = _key(source.keys, header.get("kid"), algorithm)
        claims = _signed(token, key, algorithm)
        now = self._clock()
        _check_claims(claims, source.issuer, now)
        _check_nonce(claims, source.issuer, nonce)
        identity = _identity(claims, source)
        if source.issuer.nonce is Nonce.ONCE:
            self._used.take(
                identity, nonce, issued=claims["iat"], now=now, until=identity.expires + source.issuer.skew
            )
        return identity

    def troubles(self) -> dict[str, str]:
        """By name, what keeps a provider's tokens from being verified now. Asks for keys if need be."""
        found = {source.issuer.name: source.trouble() for source in self._sources.values()}
        return {name: text for name, text in found.items() if text}

    def _source(self, iss: object) -> _Source:
        """Exactly as configured: no slash more or less, no other case."""
        source = self._sources.get(iss) if isinstance(iss, str) else None
        if source is None:
            raise Unauthenticated(Code.ISSUER, f"{_shown(iss)} is no issuer that is believed here")
        return source


# ---- what belongs to one provider


class _Source:
    def __init__(self, issuer: Issuer, elapsed: Callable[[], float], fetch: Fetch) -> None:
        self.issuer = issuer
        self.keys = Keyring(issuer, now=elapsed, fetch=fetch)
        self._members = _reread(issuer.members_file, access_claims.read_members)
        self._names = _reread(issuer.names_file, access_claims.read_names)
        self._last: tuple[object, object, GroupClaims] | None = None  # replaced whole, see Reread

    def group_claims(self) -> GroupClaims:
        """Made once for what stands in the files: checking 10,000 names takes 20 ms."""
        members = self._members.value() if self._members else None
        names = self._names.value() if self._names else None
        last = self._last
        if last is None or last[0] is not members or last[1] is not names:
            last = self._last = members, names, self.issuer.group_claims(members=members, names=names)
        return last[2]

    def trouble(self) -> str:
        try:
            self.group_claims()
            return "" if self.keys.keys() else "it publishes no key that could be used"
        except (Unavailable, Unfit) as error:
            return str(error)


def _reread(path: str, read: Callable[..., Any]) -> Reread[Any] | None:
    return Reread(path, lambda data: read(data, source=path), limit=tree.MAX_BYTES) if path else None


# ---- before the signature


def _open(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims, not verified: good for choosing what to verify with."""
    if not isinstance(token, str) or len(token) > MAX_TOKEN or not _COMPACT.fullmatch(token):
        raise Unauthenticated(
            Code.FORM, f"this is not three parts in base64url of at most {MAX_TOKEN} characters"
        )
    header, payload, _ = token.split(".")
    return _part(header, "header"), _part(payload, "payload")


def _part(text: str, name: str) -> dict[str, Any]:
    try:
        return _json(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, RecursionError, binascii.Error):
        raise Unauthenticated(Code.FORM, f"the {name} is no JSON object in base64url") from None


def _json(data: bytes) -> dict[str, Any]:
    """ValueError for what RFC 8259 does not know: NaN, which is later than no time and earlier than none.
    And for halves of surrogate pairs, which no file, store or record could hold."""
    found = json.loads(data, parse_constant=_refuse_constant)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004
    json.dumps(found, ensure_ascii=False).encode()
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(text)


def _check_header(header: dict[str, Any], issuer: Issuer) -> str:
    """The algorithm: one of the issuer's."""
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
        raise Unauthenticated(
            Code.ALGORITHM, f"{_shown(algorithm)} is not among {', '.join(issuer.algorithms)}"
        )
    if "crit" in header:  # RFC 7515, section 4.1.11: what is critical there, is not known here
        raise Unauthenticated(Code.HEADER, f"crit asks for {_shown(header['crit'])}")
    for name in _NEVER:
        if name in header:
            raise Unauthenticated(Code.HEADER, f"the header has {name}")
    kind = header.get("typ", "jwt")
    if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in issuer.types:
        raise Unauthenticated(Code.HEADER, f"typ is {_shown(kind)}")
    if not isinstance(header.get("kid"), str | None):
        raise Unauthenticated(Code.HEADER, "kid is not text")
    return algorithm


def _key(keys: Keyring, kid: str | None, algorithm: str) -> Key:
    try:
        return keys.find(kid, algorithm)
    except NoKey as error:
        raise Unauthenticated(Code.KEY, str(error)) from None
    except Unavailable as error:
        raise Unauthenticated(Code.UNAVAILABLE, str(error)) from error


def _signed(token: str, key: Key, algorithm: str) -> dict[str, Any]:
    """The claims, now that this key signed them. The key is an object of its type, never text that another
    algorithm could take for a secret."""
    try:
        found = _JWS.decode_complete(token, key.public, algorithms=[algorithm], options=_STRICT)
        return _json(found["payload"])
    except jwt.InvalidSignatureError:
        raise Unauthenticated(Code.SIGNATURE, "the signature is not by the provider's key") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise Unauthenticated(Code.FORM, f"this cannot be verified: {quoted(str(error))}") from None


_JWS = jwt.PyJWS()
_STRICT: SigOptions = {"verify_signature": True, "enforce_minimum_key_length": True}


# ---- after it


def _check_claims(claims: Mapping[str, Any], issuer: Issuer, now: float) -> None:
    _check_kind(claims)
    _check_audience(claims, issuer)
    _check_times(claims, issuer, now)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise Unauthenticated(Code.SUBJECT, f"sub is {_shown(subject)}")


def _check_kind(claims: Mapping[str, Any]) -> None:
    for name in _OF_OTHERS:
        if name in claims:
            raise Unauthenticated(Code.KIND, f"this is no ID token: it has {name}")
    for name in _SAID_KIND:
        kind = claims.get(name, "id")
        if not isinstance(kind, str) or kind.lower() != "id":
            raise Unauthenticated(Code.KIND, f"this is no ID token: {name} is {_shown(kind)}")


def _check_audience(claims: Mapping[str, Any], issuer: Issuer) -> None:
    """OpenID Connect Core 1.0, section 3.1.3.7, items 3 to 5: for us, for nobody who is not trusted as we
    are, and where there are several, asked for by one of us."""
    said = claims.get("aud")
    audiences = said if isinstance(said, list) else [said]
    if not 1 <= len(audiences) <= _MAX_AUDIENCES or not all(a in issuer.audiences for a in audiences):
        raise Unauthenticated(Code.AUDIENCE, f"aud is {_shown(said)}")
    party = claims.get("azp")
    if party is None and len(audiences) > 1:
        raise Unauthenticated(Code.PARTY, "there are several audiences, and no azp")
    if party is not None and party not in issuer.authorised_parties:
        raise Unauthenticated(Code.PARTY, f"azp is {_shown(party)}")


def _check_times(claims: Mapping[str, Any], issuer: Issuer, now: float) -> None:
    """RFC 7519, sections 4.1.4 to 4.1.6. Our clock and theirs differ by at most the skew."""
    issued = _time(claims, "iat", Code.ISSUED)
    expires = _time(claims, "exp", Code.EXPIRED)
    early = _time(claims, "nbf", Code.EARLY) if "nbf" in claims else 0.0
    if expires + issuer.skew <= now or expires <= issued:
        raise Unauthenticated(Code.EXPIRED, f"expired {now - expires:.0f} s ago")
    if issued - issuer.skew > now:
        raise Unauthenticated(Code.ISSUED, f"issued {issued - now:.0f} s from now")
    if early - issuer.skew > now:
        raise Unauthenticated(Code.EARLY, f"not good for another {early - now:.0f} s")
    if now - issued > issuer.max_age + issuer.skew:
        raise Unauthenticated(Code.AGE, f"issued {now - issued:.0f} s ago, max_age is {issuer.max_age} s")


def _time(claims: Mapping[str, Any], name: str, code: Code) -> float:
    """A NumericDate: a number, not a text of digits and not `true`, which Python takes for 1."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_TIME:
        raise Unauthenticated(code, f"{name} is {_shown(value)}")
    assert math.isfinite(value)
    return float(value)


def _check_nonce(claims: Mapping[str, Any], issuer: Issuer, nonce: str) -> None:
    if issuer.nonce is Nonce.IGNORE:
        return
    said = claims.get("nonce", "")
    if not isinstance(said, str) or len(said) > _MAX_NONCE:
        raise Unauthenticated(Code.NONCE, f"nonce is {_shown(said)}")
    if not hmac.compare_digest(said.encode(errors="surrogatepass"), nonce.encode(errors="surrogatepass")):
        raise Unauthenticated(Code.NONCE, "the nonce is not the one that the asker says")
    if issuer.nonce is Nonce.ONCE and not said:
        raise Unauthenticated(Code.NONCE, "there is no nonce, and the configuration asks for one")


def _identity(claims: Mapping[str, Any], source: _Source) -> Identity:
    try:
        return access_claims.identity(claims, source.group_claims(), source.issuer.name)
    except Unavailable as error:
        raise Unauthenticated(Code.UNAVAILABLE, str(error)) from error
    except Unfit as error:
        raise Unauthenticated(Code.CLAIMS, str(error)) from None


def _shown(value: object) -> str:
    """A foreign value for a message."""
    return quoted(value if isinstance(value, str) else json.dumps(value)) if value is not None else "missing"


# ---- nonces that were used


_PER_USER = 64
_MOST = 65_536


class _Used:
    """Which nonces were seen, until the tokens they stand in have expired.

    Nothing is forgotten early: who has too many tokens alive is refused, and so is everybody once all the
    room is taken. What was used before this process began cannot be known, so that tokens from before it
    count as used. (A provider whose clock runs ahead by some seconds has as many of them pass once more.)
    """

    def __init__(self, *, since: float) -> None:
        self._since = since
        self._lock = threading.Lock()
        self._until: dict[str, dict[str, float]] = {}  # by user and nonce
        self._count = 0

    def take(self, identity: Identity, nonce: str, *, issued: float, now: float, until: float) -> None:
        """Once for each nonce of a user, and `Unauthenticated` from then on."""
        if issued < self._since:
            raise Unauthenticated(Code.REPLAYED, "it was issued before this service began")
        with self._lock:
            mine = self._living(identity.user, now)
            if nonce in mine:
                raise Unauthenticated(Code.REPLAYED, "its nonce was used already")
            if len(mine) >= _PER_USER or self._count >= _MOST:
                raise Unauthenticated(
                    Code.FULL, f"{len(mine)} tokens of this user and {self._count} of all are alive"
                )
            self._until.setdefault(identity.user, mine)[nonce] = until
            self._count += 1

    def _living(self, user: str, now: float) -> dict[str, float]:
        """Of this user; where room is short, everybody's dead ones go."""
        for one in [user] if self._count < _MOST else list(self._until):
            mine = self._until.get(one, {})
            for nonce in [nonce for nonce, until in mine.items() if until <= now]:
                del mine[nonce]
                self._count -= 1
            if not mine:
                self._until.pop(one, None)
        return self._until.get(user, {})
