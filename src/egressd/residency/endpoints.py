"""A provider's base URL, taken apart once; only what is left of it is compared with anything.

Programs disagree about URLs: what one takes for the host, another takes for user-info, a path or a port
(RFC 3986 against WHATWG against inet_aton). So nothing here is repaired. A URL that two readers could read
in two ways is refused, with what to write instead. User-info, queries and whatever else may hold a secret
never appear in a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from egressd.model.addresses import Address
from egressd.model.errors import Unfit
from egressd.model.names import canonical, quoted

__all__ = ["MAX_URL", "Endpoint"]

MAX_URL = 2048
_PORTS = {"https": 443, "http": 80}
_EXAMPLE = "write it as in https://api.example.com/v1"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)")
# RFC 3986 section 3.3: pchar, without the ";" and "," at which some programs cut a path
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+=:@-]|%[0-9A-Fa-f]{2})*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
# What a decoded octet may not be: another reader would decode once more, or see another path.
_AMBIGUOUS = frozenset('/\\%?#;"<>`{|}^')
_QUERY = re.compile(r"api-version=[0-9A-Za-z.-]{1,40}")  # the one that Azure's base URLs carry
_PORT = re.compile(r"[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    scheme: str  # "https" or "http"
    host: str  # canonical; "" where the URL has an address
    address: Address | None  # instead of a host
    port: int
    path: str  # decoded segments, joined by "/", beginning with "/"; "" or "/" for none

    @property
    def name(self) -> str:
        """What people call it."""
        return self.host or str(self.address)

    @classmethod
    def of_host(cls, host: str) -> Endpoint:
        """Of a host alone, as HTTPS. `Unfit` for what is no name."""
        return cls("https", canonical(host), None, 443, "")

    @classmethod
    def of(cls, url: str) -> Endpoint:
        """Of a base URL. `Unfit` for whatever is not plainly scheme, host, port and path."""
        _refuse_odd_characters(url)
        scheme, rest = _scheme(url)
        authority, path = _parted(rest)
        host, address, port = _authority(authority)
        return cls(scheme, host, address, port or _PORTS[scheme], _path(path))


def _refuse_odd_characters(url: str) -> None:
    """Before anything is taken apart, since parsers strip or translate these, each in its own way."""
    if len(url) > MAX_URL:
        raise Unfit(f"the URL has {len(url)} characters", f"a base URL has at most {MAX_URL}")
    if not url:
        raise Unfit("the URL is empty", _EXAMPLE)
    for character in url:
        if "!" <= character <= "~" and character not in '"<>\\^`{|}':
            continue
        what = "a backslash" if character == "\\" else f"the character U+{ord(character):04X}"
        raise Unfit(f"the URL contains {what}", "write the URL in plain ASCII, the host as an A-label")


def _scheme(url: str) -> tuple[str, str]:
    """Scheme in lower case, and what follows the two slashes. What stands there is not repeated: it may be
    a key that was pasted into the wrong line."""
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if found is None or (scheme not in _PORTS and not found[2]):
        raise Unfit("the URL has no scheme", f"begin with https://: {_EXAMPLE}")
    if scheme not in _PORTS:
        raise Unfit("the URL's scheme is neither https nor http", f"begin with https://: {_EXAMPLE}")
    if len(found[2]) < 2:
        raise Unfit(f"the URL lacks the two slashes after {scheme}:", _EXAMPLE)
    return scheme, url[found.end(1) + 3 :]


def _parted(rest: str) -> tuple[str, str]:
    """Authority and path, of what follows `https://`."""
    rest, hash_, _ = rest.partition("#")
    if hash_:
        raise Unfit("the URL has a fragment (#...)", "end the URL before the #")
    rest, question, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise Unfit(
            "the URL has user-info before the host", "write no name or key into it: api_key: secret://..."
        )
    if question and not _QUERY.fullmatch(query):
        raise Unfit(
            "the URL has a query (?...) other than api-version",
            "end the URL before the ?; a key belongs in api_key: secret://...",
        )
    return authority, slash + path


def _authority(text: str) -> tuple[str, Address | None, int | None]:
    if text.startswith("["):
        inside, bracket, port = text[1:].partition("]")
        if not bracket:
            raise Unfit("the URL's host begins with [ and has no ]", "write an IPv6 address as [2001:db8::1]")
        return "", _v6(inside), _port(port)
    if text.count(":") > 1:
        raise Unfit("the URL's host has more than one colon", "write an IPv6 address as [2001:db8::1]")
    host, colon, port = text.partition(":")
    if not host:
        raise Unfit("the URL has no host", _EXAMPLE)
    if "%" in host:
        raise Unfit("the URL's host is percent-encoded", "write the host in plain letters")
    return *_host(host), _port(colon + port)


def _v6(text: str) -> IPv6Address:
    if "%" in text:
        raise Unfit("the URL's address has a scope (%...)", "write an address that needs none")
    try:
        address = IPv6Address(text)
    except AddressValueError:
        raise Unfit(f"{quoted(text)} is not an IPv6 address", "write it as in [2001:db8::1]") from None
    if address.ipv4_mapped is not None:
        raise Unfit(f"{quoted(text)} carries an IPv4 address", f"write {address.ipv4_mapped}")
    return address


def _host(text: str) -> tuple[str, Address | None]:
    try:
        return "", IPv4Address(text)
    except AddressValueError:
        pass
    try:
        return canonical(text), None
    except Unfit as error:
        if "IPv4" in error.text:  # 127.1, 0x7f000001, 2130706433: what inet_aton takes
            raise Unfit(error.text, "write an address as four decimal numbers: 127.0.0.1") from None
        raise


def _port(text: str) -> int | None:
    """Of what follows the host: "" or ":8443"."""
    if not text:
        return None
    digits = text.removeprefix(":")
    if digits == text or not _PORT.fullmatch(digits) or int(digits) > 65535:
        raise Unfit("the URL's port is not a number from 1 to 65535", "write it as in https://host:8443/")
    return int(digits)


def _path(text: str) -> str:
    """Without its last slash; "" for none."""
    segments = [_segment(segment) for segment in text.removeprefix("/").removesuffix("/").split("/")]
    if segments == [""]:
        if text not in ("", "/"):
            raise Unfit("the URL's path has an empty segment", "write one slash between segments")
        return ""
    if "" in segments:
        raise Unfit("the URL's path has an empty segment", "write one slash between segments")
    return "/" + "/".join(segments)


def _segment(text: str) -> str:
    if not _SEGMENT.fullmatch(text):
        raise Unfit("the URL's path has a character that does not belong there", "write it percent-encoded")
    decoded = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    odd = next((character for character in decoded if not "!" <= character <= "~"), None)
    if odd is not None or _AMBIGUOUS & set(decoded):
        raise Unfit(
            "the URL's path has an escape that programs read in different ways", "write plain letters"
        )
    if decoded in (".", ".."):
        raise Unfit('the URL\'s path has "." or ".." in it', "write the path it leads to")
    return decoded
