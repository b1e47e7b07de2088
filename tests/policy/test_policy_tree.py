"""The YAML we read: what it is taken for, what is refused, and on which line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.tree import MAX_BYTES, MAX_DEPTH, read, spelt

SCALARS = [
    ("true", True),
    ("false", False),
    ("True", "True"),
    ("yes", "yes"),
    ("no", "no"),
    ("NO", "NO"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("'true'", "true"),
    ('"443"', "443"),
    ("443", 443),
    ("-1", -1),
    ("0", 0),
    ("0443", "0443"),
    ("0x1bb", "0x1bb"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),  # a number in base sixty, in YAML 1.1
    ("1.5", "1.5"),
    ("1e3", "1e3"),
    (".inf", ".inf"),
    ("9" * 18, int("9" * 18)),
    ("9" * 5000, "9" * 5000),
    ("2026-11-21", "2026-11-21"),
    ("null", None),
    ("~", None),
    ("", None),
    ("<<", "<<"),
    ("=", "="),
    ("|\n  a\n", "a\n"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars(text: str, value: object) -> None:
    tree = read(f"key: {text}\n".encode(), source="f")
    assert tree.readable and not tree.problems
    assert tree.value == {"key": value}
    assert type(tree.value["key"]) is type(value)


def test_every_value_knows_its_line() -> None:
    tree = read(b"# first\na: 1\nb:\n  - x\n  - {c: y,\n     d: z}\ne: >\n  folded\n", source="f")
    assert tree.value == {"a": 1, "b": ["x", {"c": "y", "d": "z"}], "e": "folded\n"}
    places = {("a",): 2, ("b",): 3, ("b", 0): 4, ("b", 1): 5, ("b", 1, "c"): 5, ("b", 1, "d"): 6, ("e",): 7}
    assert {path: tree.line(path) for path in places} == places
    assert tree.line(("b", 1, "missing")) == 5, "the nearest thing around it"
    assert tree.line(("nothing", "at", "all")) == 2


REFUSED = [
    (b"a: &x 1", 1, "anchors"),
    (b"a: 1\nb: *a", 2, "aliases"),
    (b"a: &x [1]\nb: *x", 2, "aliases"),
    (b"a: 1\n*a : 2", 2, "a key is not plain text"),
    (b"<<: *x", 1, "aliases"),
    (b"a: !!str 1", 1, "tags"),
    (b"a: ! 1", 1, "tags"),
    (b"a: !!python/object/apply:os.system [ls]", 1, "tags"),
    (b"!!map {a: 1}", 1, "tags"),
    (b"a: 1\na: 2", 2, "stands here again, first on line 1"),
    (b"a: 1\n'a': 2", 2, "stands here again, first on line 1"),
    (b"a: {b: 1, c: 2, b: 3}", 1, "stands here again"),
    (b"{a: 1}: 2", 1, "a key is not plain text"),
    (b"? [a]\n: 2", 1, "a key is not plain text"),
    (b"a: 1\n---\nb: 2", 2, "a second document"),
    (b"%YAML 1.1\n---\na: 1", 1, "% directive"),
    (b"%TAG ! tag:example.com,2000:\n---\na: 1", 1, "% directive"),
    (b"a: [1, 2\nb: 3", 2, "not YAML"),
    (b"a: 'b", 1, "not YAML"),
    (b"a:\n\tb: 1", 2, "not YAML"),
    (b"a: @b", 1, "not YAML"),
    (b"a: 1\n b: 2", 2, "not YAML"),
    (b"a: 1\nb: \xff\xfe", 2, "not UTF-8"),
    (b"a: \xc0\x80", 1, "not UTF-8"),
    (b"a: 1\n# \0", 2, "hidden character U+0000"),
    (b"a: 1\n# \x1b[2J", 2, "hidden character U+001B"),
    (b"a: 1\n# \rb: 2", 2, "hidden character U+000D"),
    ("a: 1\n# \u2028b: 2".encode(), 2, "hidden character U+2028"),
    ("a: 1\n# \x85b: 2".encode(), 2, "hidden character U+0085"),
    ("a: 1\n# \u202eb: 2".encode(), 2, "hidden character U+202E"),
    ("a: \ufeffb".encode(), 1, "hidden character U+FEFF"),
    ("a: 1".encode("utf-16"), 1, "not UTF-8"),
    ("a: 1".encode("utf-16-be"), 1, "hidden character U+0000"),
    (b"[" * 1000, 1, "nested too deeply"),
    (b"{a: " * 1000, 1, "nested too deeply"),
    (b"- " * 1000, 1, "nested too deeply"),
    (b"[" * 500_000, 1, "nested too deeply"),
    (b"#" * (MAX_BYTES + 1), 0, "larger than 1 MiB"),
    (b"x" * 100_000_000, 0, "larger than 1 MiB"),
]


@pytest.mark.parametrize(("data", "line", "says"), REFUSED, ids=range(len(REFUSED)))
def test_refused(data: bytes, line: int, says: str) -> None:
    tree = read(data, source="acme.yaml")
    found = [problem for problem in tree.problems if says in problem.text]
    assert [problem.line for problem in found] == [line], tree.problems
    assert found[0].source == "acme.yaml" and found[0].remedy


def test_what_is_readable_is_read_in_spite_of_a_problem() -> None:
    """So that one reading tells everything that is wrong."""
    tree = read(b"a: &x 1\na: 2\nb: *x\nc: [3]\n", source="f")
    assert [problem.line for problem in tree.problems] == [1, 2, 3]
    assert tree.readable
    assert tree.value == {"a": 1, "b": None, "c": [3]}
    assert tree.is_unclear(("b",)) and tree.is_unclear(("b", "below"))
    assert not tree.is_unclear(("a",)) and not tree.is_unclear(("c",))


def test_the_depth_that_is_allowed() -> None:
    assert read(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, source="f").readable
    assert not read(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), source="f").readable


def test_the_size_that_is_allowed() -> None:
    assert read(b"a: 1\n".ljust(MAX_BYTES, b"#"), source="f").readable


def test_line_endings_and_a_byte_order_mark() -> None:
    tree = read("\ufeffa: 1\r\nb: 2\r\n".encode(), source="f")
    assert tree.value == {"a": 1, "b": 2} and not tree.problems
    assert tree.line(("b",)) == 2


def test_nothing_at_all() -> None:
    for data in (b"", b"\n", b"# a comment\n", b"---\n", b"null"):
        tree = read(data, source="f")
        assert tree.readable and tree.value is None and not tree.problems


def test_paths_are_spelt_for_people_and_terminals() -> None:
    assert spelt(("allow", 2, "ports", 0)) == "allow[2].ports[0]"
    assert spelt(()) == ""
    assert spelt(("a b\x1b",)) == r"'a b\x1b'"


@settings(max_examples=200)
@given(
    st.one_of(
        st.binary(max_size=200), st.text(alphabet="ab:-[]{},&*!|>'\"#%?\n \t0~", max_size=60).map(str.encode)
    )
)
def test_any_bytes_give_a_tree(data: bytes) -> None:
    tree = read(data, source="f")
    assert tree.readable or tree.problems
    assert all(str(problem).isprintable() for problem in tree.problems)
