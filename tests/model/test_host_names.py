"""Names: one spelling each, and everything that is not one told why."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from publicsuffixlist import PublicSuffixList

from egressd.model.errors import Unfit
from egressd.model.names import Pattern, canonical, covering, is_pattern, matches, quoted, service_label

PUBLIC = PublicSuffixList().is_public

ACCEPTED = [
    ("api.example.com", "api.example.com"),
    ("API.Example.COM", "api.example.com"),
    ("api.example.com.", "api.example.com"),
    ("ollama", "ollama"),
    ("a-b.c--d.example", "a-b.c--d.example"),
    ("1.2.3.com", "1.2.3.com"),
    ("0x7f.example", "0x7f.example"),
    ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
    ("a" * 63 + ".com", "a" * 63 + ".com"),
    (".".join(["a" * 49] * 5) + ".com", ".".join(["a" * 49] * 5) + ".com"),  # 253
    (".".join(["a" * 49] * 5) + ".com.", ".".join(["a" * 49] * 5) + ".com"),
]

REFUSED = [
    ("", "is empty", "write a name"),
    (".", "is empty", "write a name"),
    ("..", "empty label", "extra dot"),
    ("a..b", "empty label", "extra dot"),
    (".example.com", "empty label", "extra dot"),
    ("example.com..", "empty label", "extra dot"),
    ("a" * 64 + ".com", "label of 64 characters", "at most 63"),
    (".".join(["a" * 49] * 5) + ".comm", "254 characters", "at most 253"),
    ("x" * 100_000, "100000 characters", "at most 253"),
    ("evil.com\0.example.com", "a NUL", "letters, digits"),
    ("a b.com", "a space", "letters, digits"),
    (" a.com", "a space", "letters, digits"),
    ("a.com\n", "a line break", "letters, digits"),
    ("a.com\t", "a tab", "letters, digits"),
    ("a'.com", "a quote", "letters, digits"),
    ('a".com', "a quote", "letters, digits"),
    ("a{b}.com", "a brace", "letters, digits"),
    ("a}.com", "a brace", "letters, digits"),
    ("a;b.com", "U+003B", "letters, digits"),
    ("a\\.com", "a backslash", "letters, digits"),
    ("a_b.com", "an underscore", "letters, digits"),
    ("_dmarc.example.com", "an underscore", "letters, digits"),
    ("user@example.com", "an at sign", "letters, digits"),
    ("*.example.com", "an asterisk", "letters, digits"),
    ("\x7f.com", "U+007F", "letters, digits"),
    ("-a.com", "begins or ends with a hyphen", "hyphen"),
    ("a-.com", "begins or ends with a hyphen", "hyphen"),
    ("a.-", "begins or ends with a hyphen", "hyphen"),
    ("1.2.3.4", "as an IPv4 address", "cidr"),
    ("127.1", "as an IPv4 address", "cidr"),
    ("2130706433", "as an IPv4 address", "cidr"),
    ("0x7f000001", "as an IPv4 address", "cidr"),
    ("0177.0.0.0x", "as an IPv4 address", "cidr"),
    ("example.123", "as an IPv4 address", "cidr"),
    ("10.0.0.1.", "as an IPv4 address", "cidr"),
    ("::1", "looks like an IPv6 address", "cidr"),
    ("[2001:db8::1]", "looks like an IPv6 address", "cidr"),
    ("10.0.0.0/8", "looks like a network", "cidr"),
    ("https://api.example.com/v1", "is a URL", "only the host name"),
    ("api.example.com:8443", "has a port", "ports: [8443/tcp]"),
    ("example.com/path", "a slash", "letters, digits"),
    ("ab--c.com", "-- in the third place", "check"),
    ("xn--.com", "begins or ends with a hyphen", "hyphen"),
    ("xn--zzzzzzzz.com", "stands for no word", "check"),
    ("xn--99999999999.com", "stands for no word", "check"),
    ("xn--a-ecp.com", "stands for no word", "check"),  # decodes to a full stop inside the label
    ("xn--ls8h.com", "stands for no word", "check"),  # an emoji: not permitted by IDNA 2008
    ("xn--example-9999.com", "stands for no word", "check"),
    ("b\u00fccher.example", "is not ASCII", "write xn--bcher-kva.example,"),
    ("\u0430pple.com", "is not ASCII", "write xn--pple-43d.com,"),  # Cyrillic a
    ("example\u3002com", "is not ASCII", "write example.com,"),  # ideographic full stop
    ("\uff45xample.com", "is not ASCII", "write example.com,"),  # fullwidth e
    ("\u212aelvin.example", "is not ASCII", "write kelvin.example,"),  # lower() would make it ASCII
    ("\u202eexample.com", "is not ASCII", "xn--..."),
    ("\u00fc" * 10_000, "is not ASCII", "xn--..."),
]


@pytest.mark.parametrize(("text", "name"), ACCEPTED)
def test_accepted(text: str, name: str) -> None:
    assert canonical(text) == name
    assert canonical(name) == name, "what is canonical stays as it is"


@pytest.mark.parametrize(("text", "says", "remedy"), REFUSED, ids=range(len(REFUSED)))
def test_refused(text: str, says: str, remedy: str) -> None:
    with pytest.raises(Unfit) as refusal:
        canonical(text)
    assert says in refusal.value.text
    assert remedy in refusal.value.remedy
    assert str(refusal.value).isprintable() and str(refusal.value).isascii()
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize(
    "text", ["localhost", "LOCALHOST.", "ip6-localhost", "sandbox", "a.b", "11434", "a b", ""]
)
def test_what_no_local_service_can_be_called(text: str) -> None:
    with pytest.raises(Unfit):
        service_label(text)


def test_a_local_service_is_one_word() -> None:
    assert [service_label(text) for text in ("ollama", "Ollama", "vllm-2")] == ["ollama", "ollama", "vllm-2"]


PATTERNS = [
    ("*.search.example.com", "*.search.example.com"),
    ("**.Example.com.", "**.example.com"),
    ("*.svc.cluster.local", "*.svc.cluster.local"),
    ("*.xn--bcher-kva.example", "*.xn--bcher-kva.example"),
]
BAD_PATTERNS = [
    ("*", "every name there is"),
    ("**", "every name there is"),
    ("*example", "every name there is"),
    ("*.", "is empty"),
    ("*.com", "top-level domain"),
    ("**.com", "top-level domain"),
    ("*.xn--p1ai", "top-level domain"),
    ("*.co.uk", "public suffix"),
    ("**.co.uk", "public suffix"),
    ("**.CO.UK.", "public suffix"),
    ("*.github.io", "public suffix"),
    ("*.s3.amazonaws.com", "public suffix"),
    ("*.compute.amazonaws.com", "public suffix"),  # listed as *.compute.amazonaws.com
    ("*.kawasaki.jp", "public suffix"),
    ("*.*.example.com", "asterisk where none may stand"),
    ("a.*.example.com", "asterisk where none may stand"),
    ("a*.example.com", "asterisk where none may stand"),
    ("*a.example.com", "asterisk where none may stand"),
    ("***.example.com", "asterisk where none may stand"),
    ("*.example.*", "asterisk where none may stand"),
    ("*.10.0.0.1", "IPv4"),
    ("*.a b.com", "a space"),
    ("*.b\u00fccher.example", "is not ASCII"),
]


@pytest.mark.parametrize(("text", "spelt"), PATTERNS)
def test_patterns(text: str, spelt: str) -> None:
    assert is_pattern(text)
    assert str(Pattern.of(text, is_public_suffix=PUBLIC)) == spelt


@pytest.mark.parametrize(("text", "says"), BAD_PATTERNS)
def test_bad_patterns(text: str, says: str) -> None:
    assert is_pattern(text)
    with pytest.raises(Unfit, match=re.escape(says)):
        Pattern.of(text, is_public_suffix=PUBLIC)


def test_a_suffix_listed_only_by_its_wildcard() -> None:
    """Where the list has `*.shared.example`, its base is no suffix itself, but all below it are."""
    with pytest.raises(Unfit, match="public suffix"):
        Pattern.of("**.shared.example", is_public_suffix=lambda name: name == "any.shared.example")


COVERED = [
    # name                 exact   *.     **.  of example.com
    ("example.com", True, False, False),
    ("a.example.com", False, True, True),
    ("a.b.example.com", False, False, True),
    ("a.b.c.example.com", False, False, True),
    ("example.com.example.com", False, False, True),
    ("aexample.com", False, False, False),
    ("example.com.evil.org", False, False, False),
    ("a.example.com.evil.org", False, False, False),
    ("com", False, False, False),
    (".example.com", False, False, False),
]


@pytest.mark.parametrize(("name", "exact", "one", "deep"), COVERED)
def test_what_a_pattern_covers(name: str, exact: bool, one: bool, deep: bool) -> None:
    assert matches("example.com", name) is exact
    assert matches("*.example.com", name) is one
    assert matches("**.example.com", name) is deep


LABELS = st.lists(st.sampled_from(["a", "b", "ab", "a-b", "com"]), min_size=1, max_size=5)


def naive(pattern: list[str], name: list[str]) -> bool:
    """Label by label, from the right."""
    head, base = pattern[0], pattern[1:]
    if head not in ("*", "**"):
        return pattern == name
    extra = len(name) - len(base)
    return name[max(extra, 0) :] == base and (extra == 1 if head == "*" else extra >= 1)


@settings(max_examples=200)
@given(st.sampled_from(["*", "**", "a"]), LABELS, LABELS)
def test_matches_is_the_naive_model(head: str, base: list[str], name: list[str]) -> None:
    pattern = [head, *base]
    assert matches(".".join(pattern), ".".join(name)) is naive(pattern, name)
    related = [*name, *base]
    assert matches(".".join(pattern), ".".join(related)) is naive(pattern, related)


CANONICAL = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=300), st.text(alphabet="aZ0-._*xn:/\0 \u00fc\u3002", max_size=80)))
def test_any_text_is_a_canonical_name_or_unfit(text: str) -> None:
    try:
        name = canonical(text)
    except Unfit as error:
        assert error.text and str(error).isprintable()
    else:
        assert CANONICAL.fullmatch(name)
        assert canonical(name) == name
        assert name == text.lower().removesuffix(".")


@settings(max_examples=100)
@given(st.text(max_size=100))
def test_any_text_is_a_pattern_or_unfit(text: str) -> None:
    try:
        pattern = Pattern.of(text, is_public_suffix=lambda name: False)
    except Unfit:
        return
    assert canonical(pattern.base) == pattern.base
    assert "." in pattern.base


def test_quoting_is_printable_ascii_of_one_line() -> None:
    assert quoted("a\0\x1b[2J\u202e") == r"'a\x00\x1b[2J\u202e'"
    assert len(quoted("x" * 10_000)) < 100


# ---- every rule's host that would cover a name, the most specific first

COVERING = [
    (
        "a.b.example.com",
        ["a.b.example.com", "*.b.example.com", "**.b.example.com", "**.example.com", "**.com"],
    ),
    ("example.com", ["example.com", "*.com", "**.com"]),
    ("*.b.example.com", ["*.b.example.com", "**.b.example.com", "**.example.com", "**.com"]),
    ("**.b.example.com", ["**.b.example.com", "**.example.com", "**.com"]),
    ("ollama", ["ollama"]),
    ("", [""]),
]


@pytest.mark.parametrize(("host", "found"), COVERING)
def test_covering(host: str, found: list[str]) -> None:
    assert list(covering(host)) == found


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join),
    st.tuples(
        st.sampled_from(["", "*.", "**."]),
        st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join),
    ).map("".join),
)
def test_covering_is_all_that_matches_and_nothing_else(name: str, host: str) -> None:
    assert matches(host, name) == (host in covering(name))


def test_the_longest_name_has_few_that_cover_it() -> None:
    assert len(list(covering(".".join(["a"] * 127)))) == 128
