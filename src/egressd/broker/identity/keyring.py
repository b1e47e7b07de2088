"""A provider's keys, fetched, kept for a while, and asked for by what stands in a token's header.

Keys come from the address in the provider's own description of itself (OpenID Connect Discovery 1.0); or from
a file, and then the network is never asked. Four times bound what an answer is worth:

- It is fresh for as long as its Cache-Control says, but for a minute at least and an hour at most: so long a
  key that the provider has withdrawn may still be believed.
- A `kid` that is not among the keys makes us ask again, because keys rotate; but never within `COOLDOWN` of
  the last time, or tokens with random ones would make us hammer the provider. One fetch is in flight at most.
- A fetch that fails is tried again after `RETRY`. Meanwhile the old keys hold, until `STALE` after the last
  success: then nobody is believed. It is short because it serves tokens that are older than the outage, and
  those expire.
- A fetch is two requests, each over by `fetching.DEADLINE`, however slowly the other end speaks.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from egressd.broker.identity import jwks
from egressd.broker.identity.fetching import MAX_BODY, Fetch, fetch
from egressd.broker.identity.issuers import Issuer
from egressd.broker.identity.jwks import Key
from egressd.broker.identity.rereading import Reread, Unavailable
from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["COOLDOWN", "FRESH", "MAX_WAITING", "RETRY", "STALE", "Keyring", "boottime"]

FRESH = (60.0, 3600.0)  # seconds: the least and the most an answer is believed without asking again
COOLDOWN = 30.0
RETRY = 5.0
STALE = 4 * 3600.0
MAX_WAITING = 16  # threads that wait for one provider; a service has more, or a slow one would take them all


@dataclass(frozen=True, slots=True)
class _Answer:
    """Times are of the keyring's clock."""

    keys: tuple[Key, ...]
    at: float
    fresh_until: float


def boottime() -> float:
    """Seconds that no setting of the clock moves, and that a suspended machine counts (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Keyring:
    """One provider's keys. Any number of threads may ask; none of them may run an event loop."""

    def __init__(self, issuer: Issuer, *, now: Callable[[], float] = boottime, fetch: Fetch = fetch) -> None:
        self._issuer = issuer
        self._now = now
        self._fetch = fetch
        self._file = _file(issuer)
        self._answer: _Answer | None = None  # replaced whole
        self._trouble = "no keys were fetched yet"
        self._not_before = -math.inf  # when the next fetch may begin
        self._fetching = threading.Lock()
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)

    def find(self, kid: str | None, algorithm: str) -> Key:
        """The one key that can have signed such a token. `NoKey`, or `Unavailable` while nothing is known."""
        if self._file is not None:
            return _found(jwks.choose(self._file.value(), kid, algorithm), kid, algorithm)
        answer = self._fresh()
        key = jwks.choose(answer.keys, kid, algorithm)
        if key is None:  # it may be newer than what we have
            key = jwks.choose(self._newer(answer).keys, kid, algorithm)
        return _found(key, kid, algorithm)

    def keys(self) -> tuple[Key, ...]:
        """All that could be used now; asks the provider if need be. `Unavailable` says why there are none."""
        return self._file.value() if self._file is not None else self._fresh().keys

    def _fresh(self) -> _Answer:
        answer = self._answer
        if answer is not None and self._now() < answer.fresh_until:
            return answer
        if answer is not None and self._fetching.locked():
            return self._holding(answer)  # somebody is at it already
        return self._newer(answer)

    def _newer(self, than: _Answer | None) -> _Answer:
        """Another answer than this one if it may be asked for now and comes; else this one, if it holds."""
        if not self._waiting.acquire(blocking=False):
            return self._holding(than)
        try:
            with self._fetching:
                if self._answer is than and self._now() >= self._not_before:
                    self._ask()
                return self._holding(self._answer)
        finally:
            self._waiting.release()

    def _ask(self) -> None:
        try:
            self._answer = self._asked()
            self._not_before = self._answer.at + COOLDOWN
        except (Unavailable, Unfit) as error:
            self._trouble = str(error)
            self._not_before = self._now() + RETRY

    def _asked(self) -> _Answer:
        issuer = self._issuer
        where = _jwks_uri(self._fetch(issuer.discovery_url, issuer.ca_file).body, issuer)
        fetched = self._fetch(where, issuer.ca_file)
        at = self._now()
        fresh = FRESH[1] if fetched.max_age is None else min(max(fetched.max_age, FRESH[0]), FRESH[1])
        return _Answer(jwks.read(fetched.body, issuer.algorithms), at, at + fresh)

    def _holding(self, answer: _Answer | None) -> _Answer:
        if answer is None or self._now() > answer.at + STALE:
            raise Unavailable(f"no keys of {self._issuer.name}: {self._trouble}")
        return answer


def _found(key: Key | None, kid: str | None, algorithm: str) -> Key:
    if key is None:
        raise jwks.NoKey(f"no key for {algorithm} with kid {jwks.spelt(kid)}")
    return key


def _file(issuer: Issuer) -> Reread[tuple[Key, ...]] | None:
    if not issuer.jwks_file:
        return None
    return Reread(issuer.jwks_file, lambda data: jwks.read(data, issuer.algorithms), limit=MAX_BODY)


def _jwks_uri(data: bytes, issuer: Issuer) -> str:
    """Where the keys are. The description must be this issuer's own, letter by letter (Discovery, 4.3)."""
    document = jwks.json_object(data, f"the description at {issuer.discovery_url}")
    if document.get("issuer") != issuer.issuer:
        shown = quoted(str(document.get("issuer")))
        raise Unfit(f"{issuer.discovery_url} describes another issuer, {shown}", "correct issuer:")
    where = document.get("jwks_uri")
    if not isinstance(where, str) or not where.startswith("https://"):
        raise Unfit(f"{issuer.discovery_url} names no https address of its keys", "use a jwks_file")
    return where
