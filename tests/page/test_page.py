"""The auditor's page, read as HTML: whole, escaped, self-contained, and saying what it must."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import Counter
from dataclasses import fields, replace
from html.parser import HTMLParser

import page_samples as samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal.markup import Html, element, joined, shown
from egressd.journal.page import render
from egressd.journal.page_data import Amount, Check, HostRow, PageData
from egressd.journal.page_style import STYLE

VOID = {"br", "hr", "meta", "col", "wbr"}


class Reader(HTMLParser):
    """Checks that what is opened is closed, in order; collects elements, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: Counter[str] = Counter()
        self.attributes: Counter[tuple[str, str]] = Counter()
        self.values: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.other: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        for name, value in attrs:
            self.attributes[tag, name] += 1
            self.values.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    @property
    def text(self) -> str:
        return " ".join("\n".join(self.texts).split())


ALL = {name: getattr(samples, name)() for name in ("ordinary", "empty", "broken")}


@pytest.mark.parametrize("name", ALL)
def test_it_is_whole(name: str) -> None:
    page = Reader(render(ALL[name]))
    for tag in ("html", "head", "body", "h1", "style", "main"):
        assert page.elements[tag] == 1, tag
    assert page.values["lang"] == ["en"]
    assert len(re.findall(r"<title>", render(ALL[name]).split("</head>")[0])) == 1
    ids = page.values["id"]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.values["href"]} <= set(ids)
    assert set(page.values["aria-labelledby"]) <= set(ids)


@pytest.mark.parametrize("name", ALL)
def test_it_loads_nothing_and_runs_nothing(name: str) -> None:
    text = render(ALL[name])
    page = Reader(text)
    assert not page.elements.keys() & {
        "script", "iframe", "object", "embed", "img", "link", "base", "form", "input", "audio", "video",
        "image", "use", "foreignobject", "animate", "set",
    }  # fmt: skip
    attributes = {name for _, name in page.attributes}
    assert not attributes & {
        "src",
        "srcset",
        "style",
        "action",
        "formaction",
        "xlink:href",
        "data",
        "background",
    }
    assert not [name for name in attributes if name.startswith("on")]
    assert all(target.startswith("#") for target in page.values["href"])
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert not re.search(r"(?i)(src|href)\s*=\s*[\"']?(https?:|//)", text)


def test_the_policy_of_the_page_admits_one_style_sheet() -> None:
    page = Reader(render(samples.ordinary()))
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    assert (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        in page.values["content"]
    )
    assert "<style>" + STYLE + "</style>" in render(samples.ordinary())


# ---- what is said


def test_a_verified_page_says_what_left() -> None:
    page = Reader(render(samples.ordinary()))
    assert "Verified" in page.text
    assert "NOT" not in page.text.split("Contents")[0][:200]
    assert (
        "Nothing left but 45.7 MiB to eu.api.openai.com, ollama, db.internal.example and a-very-long"
        in page.text
    )
    for said in (
        "44,120,331 B", "183,220 packets", "162.159.140.245", "2a06:98c1:58::f5", "443/tcp",  # who, how much
        "77,059,800 B", "no rule of the workspace allows this", "198.51.100.20", "2001:db8:77::20",
        "python3 -m agent --task 'summarise the quarterly report'", "exit 0", "uid 1001",  # sandboxes
        "widens:", "tenant-4.search.example.com", "- host: eu.api.openai.com",  # policy
        "124,973,763 B", "✓ holds", "No record was lost.", "clock stepped",
        "sha256:9c9c", "egressctl verify",
    ):  # fmt: skip
        assert said in page.text, said


def test_a_broken_page_claims_nothing() -> None:
    page = Reader(render(samples.broken()))
    assert "✗ NOT verified" in page.text
    assert "This proof does not hold. Nothing below can be relied on." in page.text
    assert "record 18,107: its hash does not lead to the checkpoint's root" in page.text
    assert "Nothing left but" not in page.text
    assert "Nothing is proved" in page.text
    assert samples.ordinary().proved[0] not in page.text
    assert "✗ does not hold: +1 packets, +60 bytes" in page.text
    assert "14 records were lost" in page.text
    assert "✗ failed" in page.text
    assert "element 198.51.100.20 . tcp . 443 is there and should not be" in page.text


def test_an_empty_page_is_not_blank() -> None:
    page = Reader(render(samples.empty()))
    for said in ("Nothing left.", "Nothing was refused", "No sandbox ran", "The policy did not change"):
        assert said in page.text, said
    assert page.elements["svg"] == 0


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        ({}, "Nothing left but 45.7 MiB to"),
        (
            {"restricted": False, "guard": "observe"},
            "Nothing was restricted: the guard was observe. 45.7 MiB to",
        ),
        (
            {"restricted": False},
            "For a part of the time nothing was restricted: the guard was opened. 45.7 MiB",
        ),
        ({"complete": False}, "As far as it was counted, nothing left but 45.7 MiB to"),
        ({"hosts": ()}, "Nothing left."),
        ({"hosts": (), "complete": False}, "As far as it was counted, nothing left."),
        ({"verified": False, "hosts": ()}, "This proof does not hold."),
    ],
)
def test_the_headline_claims_no_more_than_is_known(change: dict[str, object], headline: str) -> None:
    page = render(replace(samples.ordinary(), **change))
    assert re.search(r"<h1>(.*?)</h1>", page)[1].startswith(headline)  # type: ignore[index]


def test_the_resolver_is_not_a_host_that_something_went_to() -> None:
    hosts = (HostRow("(resolver)", "resolver", out=Amount(5, 300)),)
    assert "<h1>Nothing left.</h1>" in render(replace(samples.ordinary(), hosts=hosts))


def test_what_belongs_to_no_host_is_in_the_headline() -> None:
    hosts = (
        HostRow("a.test", out=Amount(1, 300)),
        HostRow("(in no record)", "unrecorded", out=Amount(3, 280)),
    )
    page = render(replace(samples.ordinary(), hosts=hosts))
    assert "<h1>Nothing left but 300 B to a.test and 280 B that no record of a connection names.</h1>" in page
    assert "of 1 counted" in page


# ---- accessible


def test_tables_have_headings_and_charts_have_words() -> None:
    text = render(samples.ordinary())
    page = Reader(text)
    assert page.attributes["th", "scope"] == page.elements["th"]
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        heads = len(re.findall(r'<th scope="col"', table))
        for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL):
            assert len(re.findall(r"<t[hd]\b", row)) == heads
    shown_charts = page.attributes["svg", "role"]
    assert shown_charts == 2
    assert page.attributes["svg", "aria-hidden"] == page.elements["svg"] - shown_charts
    assert page.elements["desc"] == shown_charts
    assert len(re.findall(r"<rect[^>]*><title>", text)) >= 30  # each column says what it is


def test_headings_fit_beside_the_cells_of_a_card() -> None:
    """7.2rem: about fourteen letters (page_style)."""
    for name in ("ordinary", "broken"):
        labels = set(Reader(render(ALL[name])).values["data-label"])
        assert {label for label in labels if len(label) > 14} == set()


def _colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]  # WCAG 2.2
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["light", "dark", "paper"])
def test_contrast(number: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(blocks) == 3
    colours = _colours(blocks[number])
    for text in ("text", "muted", "link", "bad"):
        for ground in ("ground", "raised"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for word in ("good", "bad", "note"):
        assert _contrast(colours[word], colours[f"{word}-ground"]) >= 4.5, word
    for bar in ("sent", "received", "refused"):
        assert _contrast(colours[bar], colours["ground"]) >= 3, bar


def test_every_colour_is_defined_three_times() -> None:
    blocks = [_colours(block) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]
    assert blocks[0] == blocks[2]
    assert blocks[0].keys() == blocks[1].keys() == set(re.findall(r"var\(--([a-z-]+)\)", STYLE))


# ---- hostile text


def _shape(text: str) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    page = Reader(render(samples.hostile(text)))
    assert page.other == []
    del page.elements["wbr"]  # one for each dot of a name
    return page.elements, page.attributes


PLAIN = _shape("plain")


@pytest.mark.parametrize("text", samples.HOSTILE)
def test_hostile_texts_open_nothing(text: str) -> None:
    assert _shape(text) == PLAIN
    assert " ".join(shown(text).split()) in Reader(render(samples.hostile(text))).text


# Line breaks make lines of policy, ruleset and facts; those are elements, and not a stranger's to choose.
@given(
    st.text(
        st.characters(exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1, max_size=60
    )
)
@settings(max_examples=120, deadline=None)
def test_no_text_opens_a_tag_or_an_attribute(text: str) -> None:
    if re.match(r"\d{4}", text) or not shown(text).strip():
        return  # a time, or blank: shown otherwise
    assert _shape(text) == PLAIN


@given(st.text(st.sampled_from("<>&\"'/=! -abc;#x3\n\t"), max_size=40))
@settings(max_examples=200)
def test_markup_gives_texts_back(text: str) -> None:
    page = Reader(element("p", element("b", text, title=text), joined(text)))
    assert page.elements == Counter(p=1, b=1)
    assert page.attributes == Counter({("b", "title"): 1})
    assert page.values["title"] == [shown(text)]
    assert "".join(page.texts) == shown(text) * 2


def test_only_markup_is_markup() -> None:
    assert element("p", Html("<b>x</b>")) == "<p><b>x</b></p>"
    assert element("p", "<b>x</b>") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"
    assert element("p", [1, None, ["a", ("b",)]]) == "<p>1ab</p>"


def test_what_does_not_show_is_spelled() -> None:
    assert shown("a\u202eb\x00\u200b\ud800") == "a\\u{202e}b\\u{0000}\\u{200b}\\u{d800}"
    assert shown("übergröße 日本 e\u0301") == "übergröße 日本 e\u0301"
    assert shown("e" + "\u0301" * 9).count("\\u{0301}") == 7


def test_the_page_can_always_be_written() -> None:
    render(samples.hostile("\ud800\udfff")).encode("utf-8")


def test_every_field_is_tried_with_hostile_text() -> None:
    """A field of PageData that `hostile` leaves out would not be tested."""
    plain = PageData(verified=False, workspace="")
    hostile = samples.hostile("x")
    same = {f.name for f in fields(PageData) if getattr(plain, f.name) == getattr(hostile, f.name)}
    assert same == {"verified", "restricted", "complete", "lost"}


# ---- many


def test_ten_thousand_hosts() -> None:
    data = samples.many()
    begun = time.process_time()
    page = render(data)
    taken = time.process_time() - begun
    assert len(page.encode()) < 10_000_000
    assert taken < 10  # seconds; 0.5 where this was written
    assert page.count('<th scope="row">host-') == 10_000
    assert page.count("<rect") < 200
    assert "Drawn are 15 of 10,000, those that were sent most." in page
    assert "9,994 more hosts" not in page  # the one that was sent nothing is not counted
    assert "9,993 more hosts" in page


def test_a_check_that_held_with_a_limit_says_so_and_a_broken_one_says_where() -> None:
    checks = (
        Check("losses", True, "12 records were lost.", remark=True),
        Check("summary", False, "It says 1, the records say 2.", place="predicate.summary.hosts[1]"),
    )
    text = render(replace(samples.ordinary(), checks=checks))
    assert "! held, with a limit" in text and "✓ held<" not in text
    assert "It says 1, the records say 2. (at predicate.summary.hosts[1])" in text
