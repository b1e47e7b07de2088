"""What is a base URL, and what only looks like one to some reader."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.errors import Unfit
from egressd.residency.endpoints import MAX_URL, Endpoint

READ = [
    # URL, scheme, host or address, port, path
    ("https://api.openai.com", "https", "api.openai.com", 443, ""),
    ("https://api.openai.com/", "https", "api.openai.com", 443, ""),
    ("https://api.openai.com/v1", "https", "api.openai.com", 443, "/v1"),
    ("https://api.openai.com/v1/", "https", "api.openai.com", 443, "/v1"),
    ("HTTPS://API.OpenAI.com./v1", "https", "api.openai.com", 443, "/v1"),
    ("https://api.openai.com:8443/v1", "https", "api.openai.com", 8443, "/v1"),
    ("http://localhost:11434", "http", "localhost", 11434, ""),
    ("http://vllm", "http", "vllm", 80, ""),
    ("http://127.0.0.1:11434/v1", "http", "127.0.0.1", 11434, "/v1"),
    ("http://[::1]:11434/v1", "http", "::1", 11434, "/v1"),
    ("http://[2001:DB8:0::1]", "http", "2001:db8::1", 80, ""),
    ("https://xn--bcher-kva.example", "https", "xn--bcher-kva.example", 443, ""),
    ("https://h.azure.example/openai?api-version=2024-10-21", "https", "h.azure.example", 443, "/openai"),
    ("https://h.example/a%2Db/%7Euser", "https", "h.example", 443, "/a-b/~user"),
    ("https://h.example/v1/models/x@001:predict", "https", "h.example", 443, "/v1/models/x@001:predict"),
    ("https://h.example/V1/a..b/...", "https", "h.example", 443, "/V1/a..b/..."),
]  # fmt: skip


@pytest.mark.parametrize("url, scheme, name, port, path", READ, ids=[row[0] for row in READ])
def test_a_url_that_all_read_alike(url: str, scheme: str, name: str, port: int, path: str) -> None:
    endpoint = Endpoint.of(url)

    assert (endpoint.scheme, endpoint.name, endpoint.port, endpoint.path) == (scheme, name, port, path)
    assert bool(endpoint.host) is (endpoint.address is None)


REFUSED = [
    # URL, a word of the reason
    ("", "empty"),
    ("api.openai.com", "no scheme"),
    ("api.openai.com/v1", "no scheme"),
    ("api.openai.com:443/v1", "no scheme"),
    ("//api.openai.com/v1", "no scheme"),
    ("://api.openai.com", "no scheme"),
    (" https://api.openai.com", "U+0020"),
    ("https://api.openai.com ", "U+0020"),
    ("ftp://api.openai.com", "neither https nor http"),
    ("javascript:/alert", "neither https nor http"),
    ("httpss://api.openai.com", "neither https nor http"),
    ("https:/api.openai.com", "two slashes"),
    ("https:api.openai.com", "two slashes"),
    ("https://", "no host"),
    ("https:///api.openai.com", "no host"),
    ("https:////api.openai.com", "no host"),
    ("https://:443", "no host"),
    ("https://?x", "other than api-version"),
    ("https://a@b.example", "user-info"),
    ("https://@b.example", "user-info"),
    ("https://user:secret@b.example/v1", "user-info"),
    ("https://api.openai.com@evil.io", "user-info"),
    ("https://api.openai.com:443@evil.io", "user-info"),
    ("https://bedrock-runtime.eu-central-1.amazonaws.com@evil.io", "user-info"),
    ("https://a@b@evil.io", "user-info"),
    ("https://api.openai.com%40evil.io", "percent-encoded"),
    ("https://api.openai.com%2eevil.io", "percent-encoded"),
    ("https://%65vil.io", "percent-encoded"),
    ("https://api.openai.com\\@evil.io", "backslash"),
    ("https://api.openai.com\\.evil.io", "backslash"),
    ("https:\\\\api.openai.com", "backslash"),
    ("https://api.openai.com/v1\\..\\x", "backslash"),
    ("https://api.openai.com`.evil.io", "U+0060"),
    ("https://api.openai.com/`id`", "U+0060"),
    ("https://api.openai.com\n.evil.io", "U+000A"),
    ("https://api.openai.com\r\nHost: evil.io", "U+000D"),
    ("https://api.openai\t.com", "U+0009"),
    ("https://api.openai.com\0.evil.io", "U+0000"),
    ("https://api.openai.com/<x>", "U+003C"),
    ("https://api.openai.com/{x}", "U+007B"),
    ("https://api。openai.com", "U+3002"),  # ideographic full stop: IDNA takes it for a dot
    ("https://api．openai.com", "U+FF0E"),  # noqa: RUF001  fullwidth full stop
    ("https://аpi.openai.com", "U+0430"),  # noqa: RUF001  cyrillic a
    ("https://api.openai.com／.evil.io", "U+FF0F"),  # noqa: RUF001  fullwidth solidus
    ("https://api.openai.com\u200b", "U+200B"),
    ("https://xn--a.example", "stands for no word"),
    ("https://api_v1.example", "underscore"),
    ("https://-api.example", "hyphen"),
    ("https://api..example", "empty label"),
    ("https://.api.example", "empty label"),
    ("https://api.example..", "empty label"),
    ("https://.", "empty"),
    ("https://api.example:", "port"),
    ("https://api.example:0", "port"),
    ("https://api.example:00443", "port"),
    ("https://api.example:65536", "port"),
    ("https://api.example:+443", "port"),
    ("https://api.example:443:443", "more than one colon"),
    ("https://api.example:4 43", "U+0020"),
    ("https://api.example:https", "port"),
    ("https://[::1", "no ]"),
    ("https://[]", "not an IPv6 address"),
    ("https://[::1]443", "port"),
    ("https://[::1].evil.io", "port"),
    ("https://[fe80::1%eth0]", "scope"),
    ("https://[fe80::1%25eth0]", "scope"),
    ("https://[::ffff:127.0.0.1]", "carries an IPv4 address"),
    ("https://[::ffff:7f00:1]", "carries an IPv4 address"),
    ("https://[127.0.0.1]", "not an IPv6 address"),
    ("https://::1", "more than one colon"),
    ("https://2001:db8::1", "more than one colon"),
    ("https://2130706433", "IPv4"),
    ("https://0x7f000001", "IPv4"),
    ("https://0x7f.0.0.1", "IPv4"),
    ("https://127.1", "IPv4"),
    ("https://0177.0.0.1", "IPv4"),
    ("https://127.0.0.1.", "IPv4"),
    ("https://127.0.0.256", "IPv4"),
    ("https://api.example/v1#x", "fragment"),
    ("https://api.example#@evil.io", "fragment"),
    ("https://api.example?key=AIzaSyA", "other than api-version"),
    ("https://api.example/v1?api_key=sk-abc", "other than api-version"),
    ("https://api.example/v1?", "other than api-version"),
    ("https://api.example/v1?api-version=2024-10-21&sig=abc", "other than api-version"),
    ("https://api.example/v1?api-version=sk_secret", "other than api-version"),
    ("https://api.example?@evil.io", "other than api-version"),
    ("https://api.example//v1", "empty segment"),
    ("https://api.example//", "empty segment"),
    ("https://api.example/v1//", "empty segment"),
    ("https://api.example/.", '"." or ".."'),
    ("https://api.example/v1/../x", '"." or ".."'),
    ("https://api.example/v1/%2e%2E/x", '"." or ".."'),
    ("https://api.example/v1/.%2e", '"." or ".."'),
    ("https://api.example/%", "does not belong"),
    ("https://api.example/%2", "does not belong"),
    ("https://api.example/%zz", "does not belong"),
    ("https://api.example/a%2Fb", "different ways"),
    ("https://api.example/a%5cb", "different ways"),
    ("https://api.example/a%252e", "different ways"),
    ("https://api.example/a%00", "different ways"),
    ("https://api.example/a%0a", "different ways"),
    ("https://api.example/a%3fb", "different ways"),
    ("https://api.example/a%23b", "different ways"),
    ("https://api.example/a%3bb", "different ways"),
    ("https://api.example/a%20b", "different ways"),
    ("https://api.example/%c3%a9", "different ways"),
    ("https://api.example/a;b", "does not belong"),
    ("https://api.example/" + "a" * MAX_URL, "characters"),
]


@pytest.mark.parametrize("url, word", REFUSED, ids=[ascii(row[0][:60]) for row in REFUSED])
def test_a_url_that_is_refused_with_a_remedy(url: str, word: str) -> None:
    with pytest.raises(Unfit) as refused:
        Endpoint.of(url)

    assert word in refused.value.text
    assert refused.value.remedy


SECRETS = [
    "https://user:hunter2@api.example/v1",
    "https://hunter2@api.example/v1",
    "https://api.example/v1?key=hunter2",
    "https://api.example/v1?hunter2",
    "https://api.example/v1#hunter2",
    "https://user:hunter2@api.example\\",
    "https://user:hunter2@api.example/\n",
    "https://user:hunter2@[::1",
    "https://user:hunter2@%",
    "https://user:hunter2@api.example:0?x#y",
    "https://api.example:hunter2/",
    "https://api.example/hunter2/../x",
    "https:hunter2@api.example",
    "hunter2://api.example",
    "hunter2",
    "hunter2:",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_in_a_url_is_not_repeated(url: str) -> None:
    with pytest.raises(Unfit) as refused:
        Endpoint.of(url)

    assert "hunter2" not in f"{refused.value.text} {refused.value.remedy}"


def test_of_host_is_of_a_host_alone() -> None:
    assert Endpoint.of_host("EU.api.openai.com.") == Endpoint.of("https://eu.api.openai.com")
    for wrong in ("https://eu.api.openai.com", "eu.api.openai.com:443", "127.0.0.1", "::1", "a@b"):
        with pytest.raises(Unfit):
            Endpoint.of_host(wrong)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("https:/@.[]%?#\\0127afx-ev_。 \n"), max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.example/{text}"):
        try:
            endpoint = Endpoint.of(url)
        except Unfit:
            continue
        assert "@" not in endpoint.name and endpoint.name.isascii()
        host = (
            f"[{endpoint.address}]" if endpoint.address and endpoint.address.version == 6 else endpoint.name
        )
        written = f"{endpoint.scheme}://{host}:{endpoint.port}{endpoint.path}"
        assert Endpoint.of(written) == endpoint


@settings(max_examples=100, deadline=None)
@given(st.ip_addresses())
def test_addresses_stay_addresses(address: object) -> None:
    text = f"[{address}]" if ":" in str(address) else str(address)
    try:
        endpoint = Endpoint.of(f"https://{text}:8443/v1")
    except Unfit as error:
        assert "carries an IPv4" in error.text
        return
    assert endpoint.address == ip_address(str(address))
