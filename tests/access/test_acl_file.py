"""Access lists of source systems: globs, which rules count, and every fault at its line."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egressd.access.acl_file import MAX_BYTES, AclFile, Glob, load
from egressd.access.documents import LEVELS
from egressd.access.identifiers import identifier
from egressd.access.statements import Statement
from egressd.model.errors import PolicyError, Unfit

HR, ALL = frozenset({"group:okta:hr"}), frozenset({"group:okta:all"})

MATCHES = [
    ("hr/leave.md", "hr/leave.md", True),
    ("hr/leave.md", "hr/leave.md.bak", False),
    ("hr/leave.md", "a/hr/leave.md", False),
    ("hr/leave.md", "HR/leave.md", False),
    ("*", "a", True),
    ("*", ".hidden", True),
    ("*", "a/b", False),
    ("*.md", ".md", True),
    ("*.md", "a.md", True),
    ("*.md", "a.md.txt", False),
    ("a*b*c", "abc", True),
    ("a*b*c", "aXbYbZc", True),
    ("a*b*c", "acb", False),
    ("ab*ba", "aba", False),
    ("*a*", "bab", True),
    ("*a*", "bbb", False),
    ("hr/*", "hr/x", True),
    ("hr/*", "hr/x/y", False),
    ("hr/*/x", "hr/y/x", True),
    ("hr/*/x", "hr/x", False),
    ("hr/**", "hr/x", True),
    ("hr/**", "hr/x/y/z", True),
    ("hr/**", "hr", False),
    ("hr/**", "hrx/y", False),
    ("**", "a", True),
    ("**", "a/b/c", True),
    ("**/x", "x", True),
    ("**/x", "a/b/x", True),
    ("**/x", "a/x/b", False),
    ("a/**/b", "a/b", True),
    ("a/**/b", "a/x/y/b", True),
    ("a/**/b/**/c", "a/b/x/b/c", True),
    ("a/**/b/**/c", "a/c/b", False),
    ("**/**/x", "x", True),
    ("100%25.md", "100%.md", True),
    ("a%2Ab", "a*b", True),
    ("a%2Ab", "axb", False),
    ("a?b", "a?b", True),
    ("a?b", "axb", False),
    ("[ab]", "[ab]", True),
    ("[ab]", "a", False),
    ("%C3%A9", "\u00e9", True),
    ("\u00e9", "\u00e9", True),
    ("e\u0301", "\u00e9", False),
]
NO_GLOBS = [
    "", "/", "/hr/x", "hr/", "hr//x", "./x", "../x", "hr/../x", "a**", "**a", "a/b**c", "a%", "a%2", "a%2f",
    "%2F", "%00", "%2E", "%2E%2E", "hr\\x", "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize(("glob", "path", "matches"), MATCHES)
def test_a_glob(glob: str, path: str, matches: bool) -> None:
    assert Glob.of(glob).matches(path.encode()) is matches
    listed = load(f"documents: {{'{glob}': {{clearance: x}}}}".encode(), source="acl.yaml")
    assert (listed.of(path.encode()) is not None) is matches, "found by its directories alike"


@pytest.mark.parametrize("glob", NO_GLOBS)
def test_no_glob(glob: str) -> None:
    with pytest.raises(Unfit):
        Glob.of(glob)


def test_any_bytes_can_be_spelled() -> None:
    assert Glob.of("a%FF%0A").matches(b"a\xff\n")
    assert Glob.of("*").matches(b"\xff\n")


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=20).filter(lambda b: not {0, 47} & set(b) and b not in (b".", b"..")))
def test_an_identifiers_path_is_the_path_and_no_other(name: bytes) -> None:
    spelt = identifier("s", b"d/" + name).partition(":")[2]
    assert Glob.of(spelt).matches(b"d/" + name)
    assert not Glob.of(spelt).matches(b"d/" + name + b"x")


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab*", min_size=1, max_size=8).filter(lambda t: "**" not in t),
    st.text("ab", min_size=1, max_size=8),
)
def test_stars_in_a_name_are_those_of_the_shell(glob: str, name: str) -> None:
    assert Glob.of(glob).matches(name.encode()) == fnmatch.fnmatchcase(name, glob)


_GLOBS = st.lists(st.sampled_from(["a", "b", "*", "**"]), min_size=1, max_size=5)
_NAMES = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=6)


def plainly(glob: list[str], names: list[str]) -> bool:
    """The same rule with recursion; slow, and plain to see."""
    if not glob:
        return not names
    if glob == ["**"]:
        return bool(names)
    if glob[0] == "**":
        return plainly(glob[1:], names) or (bool(names) and plainly(glob, names[1:]))
    return bool(names) and glob[0] in ("*", names[0]) and plainly(glob[1:], names[1:])


@settings(max_examples=200, deadline=None)
@given(_GLOBS, _NAMES)
@example(["**", "**"], ["a"])
@example(["a", "**", "**"], ["a"])
def test_directories_are_matched_as_the_plain_rule_says(glob: list[str], names: list[str]) -> None:
    assert Glob.of("/".join(glob)).matches("/".join(names).encode()) == plainly(glob, names)


def test_no_glob_takes_long() -> None:
    name = Glob.of("*a" * 100 + "*b")
    deep = Glob.of("/".join(["**", "a"] * 200) + "/b")
    start = time.process_time()
    assert not name.matches(b"a" * 255)
    assert not deep.matches(b"/".join([b"a"] * 2000))
    assert time.process_time() - start < 5


# ---- which rules count


def of(text: str, path: bytes = b"hr/x") -> Statement | Unfit | None:
    return load(text.encode(), source="acl.yaml").of(path)


def test_nothing_said() -> None:
    assert of("documents: []") is None
    assert of("documents: {}") is None
    assert of("documents: [{path: legal/**, read: []}]") is None


def test_a_list_and_a_mapping_say_the_same() -> None:
    said = Statement(HR, frozenset(), "secret", ALL)
    rule = "read: [group:okta:hr], deny: [], clearance: secret, groups: [group:okta:all]"
    assert of(f"documents: [{{path: hr/x, {rule}}}]") == of(f"documents: {{hr/x: {{{rule}}}}}") == said


def test_rules_that_agree_or_speak_of_different_things_add_up() -> None:
    hr = "read: [group:okta:hr]"
    text = f"documents: [{{path: '**', clearance: internal}}, {{path: hr/**, {hr}}}, {{path: hr/x, {hr}}}]"
    assert of(text) == Statement(readers=HR, clearance="internal")
    assert of(text, b"other") == Statement(clearance="internal")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("read: [group:okta:hr]", "read: [group:okta:all]", "who may read"),
        ("read: [group:okta:hr]", "read: []", "who may read"),
        ("read: [group:okta:hr]", "read: [group:okta:hr, group:okta:all]", "who may read"),
        ("deny: [group:okta:hr]", "deny: []", "who may not"),
        ("clearance: secret", "clearance: public", "the clearance"),
        ("groups: [group:okta:hr]", "groups: []", "whose it is"),
    ],
)
def test_rules_that_differ_leave_it_unreadable(one: str, other: str, what: str, order: int) -> None:
    rules = [f"  - {{path: hr/**, {one}}}", f"  - {{path: hr/x, {other}}}"][::order]
    found = of("\n".join(["documents:", *rules]))
    assert isinstance(found, Unfit)
    assert f"(lines 2, 3): two that speak of it differ in {what}" in str(found)
    assert of("\n".join(["documents:", *rules]), b"hr/y") is not None, "where only one matches, it counts"


def test_rules_that_match_nothing_are_told() -> None:
    listed = load(
        b"documents: [{path: hr/x, read: []}, {path: hr/y, read: []}, {path: z*, read: []}]", source="f"
    )
    assert [rule.text for rule in listed.unused([b"hr/x", b"zz", b"q"])] == ["hr/y"]
    assert AclFile(()).unused([b"a"]) == ()


# ---- faults

FAULTS = [
    ("", 0, "there is no list of documents"),
    ("[]", 1, "there is no list of documents"),
    ("documents:", 1, "neither a list nor a mapping"),
    ("documents: 3", 1, "neither a list nor a mapping"),
    ("documents: []\nextra: 1", 2, "'extra' is not a key of this file"),
    ("documents:\n  - hr/x", 2, "not a mapping"),
    ("documents:\n  - read: []", 2, "not a path"),
    ("documents:\n  - path: 7\n    read: []", 2, "not a path"),
    ("documents:\n  - path: hr/x", 2, "says nothing"),
    ("documents:\n  hr/x: {}", 2, "says nothing"),
    ("documents:\n  hr/x:", 2, "not a mapping"),
    ("documents:\n  hr/x:\n    path: hr/y\n    read: []", 3, "stands here twice"),
    ("documents:\n  hr/x: {read: []}\n  hr/x: {read: []}", 3, "stands here again"),
    ("documents:\n  - path: hr/x\n    reads: []", 3, "'reads' is not a key of a rule"),
    ("documents:\n  - path: hr/x\n    acl: {read: []}", 3, "'acl' is not a key of a rule"),
    ("documents:\n  - path: hr/x\n    read: group:okta:hr", 3, "not a list"),
    ("documents:\n  - path: hr/x\n    read:\n      - hr", 4, "names nobody"),
    ("documents:\n  - path: hr/x\n    groups: [user:okta:ann]", 3, "not a group"),
    ("documents:\n  - path: hr/x\n    clearance:", 3, "not a level"),
    ("documents:\n  - path: hr/x\n    clearance: cosmic", 3, "'cosmic' is not a level of this workspace"),
    ("documents:\n  - path: ../x\n    read: []", 2, "not a path below"),
    ("documents:\n  - path: &a x\n    read: []\n  - path: *a\n    read: []", 4, "aliases"),
    ("documents: [", 1, "not YAML"),
    ("---\ndocuments: []\n---\ndocuments: []", 3, "second document"),
]


@pytest.mark.parametrize(("text", "line", "what"), FAULTS)
def test_a_fault(text: str, line: int, what: str) -> None:
    with pytest.raises(PolicyError) as found:
        load(text.encode(), source="acl.yaml", levels=LEVELS)
    told = [problem for problem in found.value.problems if what in problem.text]
    assert told, str(found.value)
    assert told[0].source == "acl.yaml" and told[0].line in (line, line + 1)


def test_every_fault_at_once() -> None:
    text = b"documents:\n- {path: /x, read: no}\n- {path: x, clearance: 7, y: 1}\n- {path: y, deny: [a, b]}\n"
    with pytest.raises(PolicyError) as found:
        load(text, source="acl.yaml")
    assert [(one.line, one.where) for one in found.value.problems] == [
        (2, "documents[0].path"), (2, "documents[0].read"),
        (3, "documents[1].clearance"), (3, "documents[1].y"),
        (4, "documents[2].deny[0]"), (4, "documents[2].deny[1]"),
    ]  # fmt: skip


def test_bounds() -> None:
    with pytest.raises(PolicyError, match="larger than 8 MiB"):
        load(b" " * (MAX_BYTES + 1), source="acl.yaml")
    with pytest.raises(PolicyError) as found:
        load(b"documents:\n" + b"- x\n" * 5000, source="acl.yaml")
    assert len(found.value.problems) == 1000


_PIECES = st.sampled_from([
    "documents:", " ", "\n", "- ", "{", "}", "[", "]", "path: ", "hr/**", "'*'", "read: ", "x", "%", "&a ",
    ", ", "user:okta:a", '"\\ud800"', "clearance: ",
])  # fmt: skip
_LINES = st.lists(_PIECES, max_size=25).map(lambda pieces: "".join(pieces).encode())


@settings(max_examples=200, deadline=None)
@given(_LINES | st.binary(max_size=60))
@example(b'documents: [{path: "\\ud800", read: []}]')
@example(b'documents: {"\\ud800": {read: ["\\ud800"]}}')
def test_any_bytes_give_a_list_or_problems(data: bytes) -> None:
    try:
        load(data, source="f").of(b"a/b")
    except PolicyError as wrong:
        assert wrong.problems and str(wrong).isascii()
