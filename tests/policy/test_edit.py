"""One property of a policy's text is changed, and nothing else: no comment, quote, blank or end of a line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.errors import PolicyError, Unfit
from egressd.model.tree import read
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.policy.edit import Setting, changed


def policy(text: str) -> Policy:
    return load(text.encode(), source="acme.yaml", expected_name="acme", is_public_suffix=lambda name: False)


def data(text: str) -> object:
    found = read(text.encode(), source="")
    assert not found.problems, found.problems
    return found.value


# ---- before, what is changed, after


BEFORE_AND_AFTER: dict[str, tuple[str, str, Setting, str]] = {
    # a scalar that is there
    "plain": ("workspace: acme\nguard: off\n", "guard", "enforce", "workspace: acme\nguard: enforce\n"),
    "with a comment": (
        "workspace: acme\nguard:  off   # for now\nallow: []\n",
        "guard",
        "enforce",
        "workspace: acme\nguard:  enforce   # for now\nallow: []\n",
    ),
    "quotes stay": (
        "workspace: acme\nguard: 'off'\n",
        "guard",
        "observe",
        "workspace: acme\nguard: 'observe'\n",
    ),
    "both of them": (
        '"workspace": acme\n"guard": "off"',
        "guard",
        "enforce",
        '"workspace": acme\n"guard": "enforce"',
    ),
    "on a line of its own": (
        "workspace: acme\nguard:\n  off  # so\n",
        "guard",
        "enforce",
        "workspace: acme\nguard:\n  enforce  # so\n",
    ),
    "a tab": (
        "workspace: acme\nguard:\toff\t# x\n",
        "guard",
        "enforce",
        "workspace: acme\nguard:\tenforce\t# x\n",
    ),
    "CRLF": (
        "workspace: acme\r\nguard: off # a\r\n# b\r\n",
        "guard",
        "observe",
        "workspace: acme\r\nguard: observe # a\r\n# b\r\n",
    ),
    "no newline at the end": (
        "workspace: acme\nguard: off",
        "guard",
        "enforce",
        "workspace: acme\nguard: enforce",
    ),
    "a byte order mark": (
        "\ufeffworkspace: acme\nguard: off\n",
        "guard",
        "enforce",
        "\ufeffworkspace: acme\nguard: enforce\n",
    ),
    "not what looks like it": (
        "# guard: off\nworkspace: acme\nmembers: ['user:guard']  # guard: off\nguard: off\n",
        "guard",
        "enforce",
        "# guard: off\nworkspace: acme\nmembers: ['user:guard']  # guard: off\nguard: enforce\n",
    ),
    "letters of more than a byte": (
        "# für später: ✓ 🜂\nworkspace: acme\nguard: off # ü\n",
        "guard",
        "enforce",
        "# für später: ✓ 🜂\nworkspace: acme\nguard: enforce # ü\n",
    ),
    "a key that is asked for": (
        "? workspace\n: acme\n? guard\n: off # x\n",
        "guard",
        "enforce",
        "? workspace\n: acme\n? guard\n: enforce # x\n",
    ),
    "after a document's start": (
        "--- # begins\nworkspace: acme\nguard: off\n...\n",
        "guard",
        "enforce",
        "--- # begins\nworkspace: acme\nguard: enforce\n...\n",
    ),
    "truth": (
        "workspace: acme\nlocal_only: false # x\n",
        "local_only",
        True,
        "workspace: acme\nlocal_only: true # x\n",
    ),
    "untruth": (
        "workspace: acme\nlocal_only: true\n",
        "local_only",
        False,
        "workspace: acme\nlocal_only: false\n",
    ),
    "in braces": ("{workspace: acme, guard: off}", "guard", "enforce", "{workspace: acme, guard: enforce}"),
    "JSON": (
        '{"workspace":"acme","guard":"off"}\n',
        "guard",
        "enforce",
        '{"workspace":"acme","guard":"enforce"}\n',
    ),
    # one that is not
    "after workspace": (
        "# top\nworkspace: acme  # who\n\nallow: []\n",
        "guard",
        "enforce",
        "# top\nworkspace: acme  # who\nguard: enforce\n\nallow: []\n",
    ),
    "after guard": (
        "guard: off\nworkspace: acme\n",
        "local_only",
        True,
        "guard: off\nlocal_only: true\nworkspace: acme\n",
    ),
    "at the end of a file without a newline": (
        "workspace: acme",
        "local_only",
        True,
        "workspace: acme\nlocal_only: true",
    ),
    "of lines with CR": (
        "workspace: acme # x\r\nallow: []\r\n",
        "guard",
        "enforce",
        "workspace: acme # x\r\nguard: enforce\r\nallow: []\r\n",
    ),
    "of a document that stands aside": (
        "  workspace: acme\n  allow: []\n",
        "guard",
        "enforce",
        "  workspace: acme\n  guard: enforce\n  allow: []\n",
    ),
    "in braces, with a comment": (
        "{workspace: acme # who\n}\n",
        "guard",
        "enforce",
        "{workspace: acme, guard: enforce # who\n}\n",
    ),
    "in JSON": (
        '{"workspace": "acme", "allow": []}',
        "local_only",
        True,
        '{"workspace": "acme", "local_only": true, "allow": []}',
    ),
    "pinned, after members": (
        "workspace: acme\nmembers:\n  - user:1  # one\n  - user:2  # two\nallow: []\n",
        "residency",
        ("EU", "CH"),
        "workspace: acme\nmembers:\n  - user:1  # one\n  - user:2  # two\n"
        "residency: {jurisdictions: [EU, CH]}\nallow: []\n",
    ),
    "pinned, in JSON": (
        '{"workspace": "acme"}',
        "residency",
        ("EU",),
        '{"workspace": "acme", "residency": {"jurisdictions": ["EU"]}}',
    ),
    # residency, other codes
    "one more": (
        "workspace: acme\nresidency: {jurisdictions: [EU]}  # x\n",
        "residency",
        ("EU", "CH"),
        "workspace: acme\nresidency: {jurisdictions: [EU, CH]}  # x\n",
    ),
    "one less": (
        "workspace: acme\nresidency: {jurisdictions: [EU, CH, 'NO']}\n",
        "residency",
        ("EU", "NO"),
        "workspace: acme\nresidency: {jurisdictions: [EU, 'NO']}\n",
    ),
    "the last less": (
        "workspace: acme\nresidency: {jurisdictions: [ EU, CH ]}\n",
        "residency",
        ("EU",),
        "workspace: acme\nresidency: {jurisdictions: [ EU ]}\n",
    ),
    "another": (
        'workspace: acme\nresidency: {jurisdictions: ["EU"]} # x\n',
        "residency",
        ("CH",),
        'workspace: acme\nresidency: {jurisdictions: ["CH"]} # x\n',
    ),
    "others": (
        "workspace: acme\nresidency: {jurisdictions: [EU, CH, UK]}\n",
        "residency",
        ("DE", "CH"),
        "workspace: acme\nresidency: {jurisdictions: [DE, CH]}\n",
    ),
    "lines, one more": (
        "workspace: acme\nresidency:\n  jurisdictions:  # j\n    - EU  # a\n\n# next\nallow: []\n",
        "residency",
        ("EU", "CH"),
        "workspace: acme\nresidency:\n  jurisdictions:  # j\n    - EU  # a\n    - CH\n\n# next\nallow: []\n",
    ),
    "lines, one less": (
        "workspace: acme\nresidency:\n  jurisdictions:\n  - EU  # a\n  - CH\n  - NO\nallow: []\n",
        "residency",
        ("CH", "NO"),
        "workspace: acme\nresidency:\n  jurisdictions:\n  # a\n  - CH\n  - NO\nallow: []\n",
    ),
    "lines, at the end of all": (
        "workspace: acme\nresidency:\n  jurisdictions:\n  - EU",
        "residency",
        ("EU", "CH"),
        "workspace: acme\nresidency:\n  jurisdictions:\n  - EU\n  - CH",
    ),
    "lines and CR, both": (
        "workspace: acme\r\nresidency:\r\n  jurisdictions:\r\n  - EU\r\n  - CH\r\n",
        "residency",
        ("CH",),
        "workspace: acme\r\nresidency:\r\n  jurisdictions:\r\n  - CH\r\n",
    ),
    "brackets over lines": (
        "workspace: acme\nresidency: {jurisdictions: [EU,  # eu\n   CH # ch\n  ]}\n",
        "residency",
        ("CH",),
        "workspace: acme\nresidency: {jurisdictions: [ # eu\n   CH # ch\n  ]}\n",
    ),
    "the same in another order": (
        "workspace: acme\nresidency: {jurisdictions: [EU,CH]}\n",
        "residency",
        ("CH", "EU"),
        "workspace: acme\nresidency: {jurisdictions: [EU,CH]}\n",
    ),
    # residency, none
    "none of one line": (
        "workspace: acme\nresidency: {jurisdictions: [EU]}\nallow: []\n",
        "residency",
        (),
        "workspace: acme\nallow: []\n",
    ),
    "none, its comment stays": (
        "workspace: acme\nresidency: {jurisdictions: [EU]}  # contract 7\nallow: []\n",
        "residency",
        (),
        "workspace: acme\n# contract 7\nallow: []\n",
    ),
    "none of many lines": (
        "workspace: acme\nresidency:  # a\n  # b\n  jurisdictions:\n    - EU  # c\n    - CH\n\n"
        "# d\nallow: []\n",
        "residency",
        (),
        "workspace: acme\n# a\n  # b\n    # c\n\n# d\nallow: []\n",
    ),
    "none of the end": (
        "workspace: acme\nresidency: {jurisdictions: [EU]}",
        "residency",
        (),
        "workspace: acme\n",
    ),
    "none in braces": (
        "{workspace: acme, residency: {jurisdictions: [EU]}, allow: []}",
        "residency",
        (),
        "{workspace: acme, allow: []}",
    ),
    "none at the end of braces": (
        "{workspace: acme, residency: {jurisdictions: [EU]}}",
        "residency",
        (),
        "{workspace: acme}",
    ),
    "none at the beginning of braces": (
        "{residency: {jurisdictions: [EU]}, workspace: acme}",
        "residency",
        (),
        "{workspace: acme}",
    ),
    "none in braces over lines": (
        "{\n  workspace: acme,  # who\n  residency: {jurisdictions: [EU]},  # where\n  allow: [],\n}\n",
        "residency",
        (),
        "{\n  workspace: acme,  # who\n  # where\n  allow: [],\n}\n",
    ),
    "none, the last in braces over lines": (
        "{\n  workspace: acme,  # who\n  residency: {jurisdictions: [EU]}  # where\n}\n",
        "residency",
        (),
        "{\n  workspace: acme  # who\n  # where\n}\n",
    ),
}


@pytest.mark.parametrize("name", BEFORE_AND_AFTER)
def test_the_text_is_changed_there_and_nowhere_else(name: str) -> None:
    before, key, value, after = BEFORE_AND_AFTER[name]
    assert changed(before, key, value) == after
    assert changed(after, key, value) == after, "what is so already is left alone"


@pytest.mark.parametrize("name", BEFORE_AND_AFTER)
def test_the_policy_has_that_property_and_else_is_as_it_was(name: str) -> None:
    before, key, wanted, after = BEFORE_AND_AFTER[name]
    was, is_now = policy(before), policy(after)
    assert value(is_now, key) == (set(wanted) if isinstance(wanted, tuple) else wanted)
    assert rest(was, key) == rest(is_now, key)


def rest(of: Policy, key: str) -> object:
    settings = {name: value(of, name) for name in ("guard", "residency", "local_only") if name != key}
    return of.members, len(of.rules) + len(of.barred), of.limits, of.wildcards, settings


def value(of: Policy, name: str) -> object:
    found = getattr(of, name)
    return set(found) if isinstance(found, tuple) else found


@pytest.mark.parametrize(("key", "value"), [("guard", "off"), ("residency", ()), ("local_only", False)])
def test_what_is_so_because_nothing_is_written_is_not_written(key: str, value: Setting) -> None:
    text = "workspace: acme  # nothing else\n"
    assert changed(text, key, value) == text


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workspace: acme\nguard: off\nguard: enforce\n", "the key stands here again"),
        ("workspace: &a acme\nguard: off\n", "anchors"),
        ("workspace: acme\nguard: &g off\nother: *g\n", "aliases"),
        ("workspace: acme\nguard: !!str off\n", "tags"),
        ("workspace: acme\n---\nguard: off\n", "a second document"),
        ("%YAML 1.1\n---\nworkspace: acme\n", "% directive"),
        ("workspace: acme\nguard: [", "not YAML"),
        ("workspace: acme\nguard: off # \u202e\n", "hidden character"),
        ("workspace: acme\rguard: off\n", "hidden character"),
        ("- workspace: acme\n", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_what_the_reader_would_not_read_is_not_edited(text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        changed(text, "guard", "enforce")


@pytest.mark.parametrize(
    ("text", "key", "value", "says"),
    [
        ("workspace: acme\nguard: >-\n  off\n", "guard", "enforce", "not written on one line"),
        ("workspace: acme\nguard: [off]\n", "guard", "enforce", "not written on one line"),
        ("workspace: acme\nresidency: EU\n", "residency", ("CH",), "not a list of jurisdictions"),
        (
            "workspace: acme\nresidency:\n  jurisdictions:\n  - # EU\n  - CH # x\n",
            "residency",
            ("EEA", "CH"),
            "not a list of jurisdictions",
        ),
        ("workspace: acme\nresidency: {jurisdictions: []}\n", "residency", ("CH",), "not a list"),
        ("workspace: acme\nresidency: {jurisdictions: [[EU]]}\n", "residency", ("CH",), "not a list"),
        (
            "workspace: acme\n? residency\n: {jurisdictions: [EU]}\n",
            "residency",
            (),
            "does not begin its line",
        ),
        ("members: [user:1]\n", "guard", "enforce", "which workspace"),
        (
            "workspace: acme\nresidency:\n  jurisdictions:\n  -\n    EU\n  - CH\n",
            "residency",
            ("CH",),
            "with one jurisdiction to a line",
        ),
    ],
)
def test_what_cannot_be_changed_alone_is_left_to_its_author(
    text: str, key: str, value: Setting, says: str
) -> None:
    with pytest.raises(Unfit, match=says):
        changed(text, key, value)


# ---- any document


@dataclass(frozen=True)
class Section:
    key: str
    text: str


NOTES = st.sampled_from(["", "  # a note", " # guard: off", "\t# [x], {y}: 'z'", "   #"])
LINES = st.sampled_from(["", "# between\n", "\n", "   # aside\n\n", "# residency: {jurisdictions: [US]}\n"])
CODES = st.lists(
    st.sampled_from(["EU", "EEA", "CH", "UK", "NO", "DE", "US"]), min_size=1, max_size=4, unique=True
)
QUOTES = st.sampled_from(["", "'", '"'])


@st.composite
def sections(draw: st.DrawFn) -> list[Section]:
    """A document in parts, each with what stands around it: key "" for comments and blank lines."""
    note = lambda: draw(NOTES)  # noqa: E731
    members = f"members:{note()}\n  - user:1{note()}\n  - group:2{note()}\n"
    limits = f"limits: {{wall: 1s,{note()}\n  memory: 1GiB}}{note()}\n"
    allow = f"allow:{note()}\n- host: a.example{note()}\n- local: ollama\n"
    found = [Section("workspace", f"workspace: acme{note()}\n")]
    found += draw(
        st.lists(
            st.sampled_from([Section("", members), Section("", limits), Section("", allow)]), unique=True
        )
    )
    if draw(st.booleans()):
        quote = draw(QUOTES)
        guard = draw(st.sampled_from(["off", "observe", "enforce"]))
        found.append(Section("guard", f"guard: {quote}{guard}{quote}{note()}\n"))
    if draw(st.booleans()):
        found.append(
            Section("local_only", f"local_only: {draw(st.sampled_from(['true', 'false']))}{note()}\n")
        )
    if draw(st.booleans()):
        found.append(Section("residency", draw(residencies())))
    found = draw(st.permutations(found))
    return [part for section in found for part in (Section("", draw(LINES)), section)]


@st.composite
def residencies(draw: st.DrawFn) -> str:
    note = lambda: draw(NOTES)  # noqa: E731
    codes = [f"{quote}{code}{quote}" for code in draw(CODES) for quote in [draw(QUOTES)]]
    indent = draw(st.sampled_from(["  ", "    "]))
    match draw(st.sampled_from(["flow", "half", "lines", "wrapped"])):
        case "flow":
            return f"residency: {{jurisdictions: [{', '.join(codes)}]}}{note()}\n"
        case "half":
            return (
                f"residency:{note()}\n{indent}# why\n{indent}jurisdictions: [ {','.join(codes)} ]{note()}\n"
            )
        case "wrapped":
            inner = "".join(f"{indent}{code},{note()}\n" for code in codes)
            inner = f"jurisdictions: [{note()}\n{inner}{indent}]{note()}"
            return f"residency: {{{note()}\n{indent}{inner}\n  }}{note()}\n"
    deeper = indent + draw(st.sampled_from(["", "  "]))
    items = "".join(f"{deeper}- {code}{note()}\n" for code in codes)
    return f"residency:{note()}\n{indent}jurisdictions:{note()}\n{items}"


CHANGES = st.one_of(
    st.tuples(st.just("guard"), st.sampled_from(["off", "observe", "enforce"])),
    st.tuples(st.just("local_only"), st.booleans()),
    st.tuples(st.just("residency"), st.one_of(st.just([]), CODES).map(tuple)),
)


def comments(text: str) -> list[str]:
    return [line[line.index("#") :].rstrip("\r") for line in text.split("\n") if "#" in line]


@settings(max_examples=200, deadline=None)
@given(parts=sections(), change=CHANGES, crlf=st.booleans(), ended=st.booleans())
def test_of_any_document_only_that_node_is_touched(
    parts: list[Section], change: tuple[str, Setting], crlf: bool, ended: bool
) -> None:
    key, wanted = change
    texts = [part.text.replace("\n", "\r\n") if crlf else part.text for part in parts]
    if not ended:
        texts[-1] = texts[-1].removesuffix("\r\n" if crlf else "\n")
    before = "".join(texts)
    after = changed(before, key, wanted)

    keys = [part.key for part in parts]
    if key in keys:
        place = keys.index(key)
        assert after.startswith("".join(texts[:place]))
        assert after.endswith("".join(texts[place + 1 :]))
    elif after != before:
        lines_before, lines_after = before.splitlines(), after.splitlines()
        added = [line for line in lines_after if line.startswith(f"{key}: ") and line not in lines_before]
        assert len(added) == 1
        lines_after.remove(added[0])
        assert lines_after == lines_before
        assert after.endswith("\n") == before.endswith("\n")
    assert comments(after) == comments(before)
    assert ("\r\n" in after) == ("\r\n" in before) and "\r" not in after.replace("\r\n", "")

    was, is_now = policy(before), policy(after)
    assert value(is_now, key) == (set(wanted) if isinstance(wanted, tuple) else wanted)
    assert rest(was, key) == rest(is_now, key)
    assert others(before, key) == others(after, key)


def others(text: str, key: str) -> dict[str, object]:
    found = data(text)
    assert isinstance(found, dict)
    return {name: value for name, value in found.items() if name != key}


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("workspce:ag urd{}[],-#'\"\n\r\t&*!|>\\"), max_size=60), change=CHANGES)
def test_whatever_it_is_given_it_edits_it_rightly_or_refuses(text: str, change: tuple[str, Setting]) -> None:
    text = f"workspace: acme\n{text}"
    try:
        after = changed(text, *change)
    except (PolicyError, Unfit):
        return
    assert others(text, change[0]) == others(after, change[0])
