"""One answer over TLS, whole and in time, or none."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import httpx

from egressd.broker.identity.rereading import Unavailable
from egressd.model.names import quoted

__all__ = ["DEADLINE", "MAX_BODY", "Fetch", "Fetched", "fetch"]

DEADLINE = 5.0  # seconds
MAX_BODY = 256 * 1024  # bytes. Google's set of keys has 2 kB, Entra's with its certificates 30
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age=\"?([0-9]{1,9})\"?(?:$|[,\s])", re.IGNORECASE)
_UNKEPT = re.compile(r"(?:^|[,\s])no-(?:store|cache)(?:$|[,\s=])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Fetched:
    body: bytes
    max_age: float | None = None  # seconds, of Cache-Control


Fetch: TypeAlias = Callable[[str, str], Fetched]  # URL, CA file or "" -> what is there; `Unavailable`


def fetch(url: str, ca_file: str) -> Fetched:
    """GET, over TLS, from a thread without an event loop. `Unavailable` for everything but a 200 in time.

    A loop of its own is what bounds the whole of it: a client's time-outs are for one read each, and a server
    that sends a byte now and then never reaches them. (Only a system's resolver may take longer than that.)
    """
    if not url.startswith("https://"):
        raise Unavailable(f"{quoted(url)} is not https")
    try:
        return asyncio.run(_bounded(url, ca_file))
    except Unavailable:
        raise
    except TimeoutError as error:
        raise Unavailable(f"{url} did not answer within {DEADLINE:g} s") from error
    except (
        Exception
    ) as error:  # httpx's own, OSError, and groups of others: a port of 99999 is an OverflowError
        raise Unavailable(f"{url}: {quoted(str(error) or type(error).__name__)}") from error


async def _bounded(url: str, ca_file: str) -> Fetched:
    async with asyncio.timeout(DEADLINE):
        return await _get(url, ca_file)


async def _get(url: str, ca_file: str) -> Fetched:
    context = ssl.create_default_context(cafile=ca_file or None)
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    client = httpx.AsyncClient(
        verify=context, trust_env=False, follow_redirects=False, timeout=DEADLINE, headers=headers
    )
    async with client, client.stream("GET", url) as response:
        if response.status_code != 200:  # a redirect, too: keys are where the provider says, or nowhere
            raise Unavailable(f"{url} answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Unavailable(f"{url} answered with an encoding that was not asked for")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > MAX_BODY:
                raise Unavailable(f"{url} answered with more than {MAX_BODY} bytes")
        return Fetched(bytes(body), _max_age(response.headers.get("cache-control", "")))


def _max_age(cache_control: str) -> float | None:
    if _UNKEPT.search(cache_control):
        return 0.0
    found = _MAX_AGE.search(cache_control)
    return float(found[1]) if found else None
