"""Front matter: what is read as what, and that nothing that looks like it is taken for its absence."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egressd.access.front_matter import MAX_HEAD, read
from egressd.access.statements import Statement
from egressd.model.errors import Unfit

ANN, STAFF = "user:okta:ann", "group:okta:staff"


def set_of(*names: str) -> frozenset[str]:
    return frozenset(names)


SAID = [
    ("---\nacl: {read: [user:okta:ann]}\n---\ntext", Statement(readers=set_of(ANN))),
    (
        "---\ntitle: Leave\ndate: 2026-11-21\nacl:\n  read:\n    - user:okta:ann\n    - group:okta:staff\n"
        "  deny: [group:okta:guests]\nclearance: secret\ngroups: [group:okta:hr]\ntags: [a, b]\n---\n",
        Statement(set_of(ANN, STAFF), set_of("group:okta:guests"), "secret", set_of("group:okta:hr")),
    ),
    ("---\nacl: {deny: [user:okta:ann]}\n---\n", Statement(denied=set_of(ANN))),
    ("---\nacl: {read: []}\n---\n", Statement(readers=set_of())),
    ("---\nclearance: public\n---", Statement(clearance="public")),
    ("---\n---\n", Statement()),
    ("---\ntitle: none of our business\n---\n", Statement()),
    ("---\r\nclearance: public\r\n---\r\ntext", Statement(clearance="public")),
    ("\ufeff---\nclearance: public\n---\n", Statement(clearance="public")),
    ("\n\n---\nclearance: public\n---\n", Statement(clearance="public")),
    ("---  \nclearance: public\n---\t\n", Statement(clearance="public")),
    ("-----\nclearance: public\n-----\n", Statement(clearance="public")),
    ("---\nclearance: 'no'\n---\n", Statement(clearance="no")),
    ("---\nacl: {read: ['group:okta:a, b: c']}\n---\n", Statement(set_of("group:okta:a, b: c"))),
    ("---\nclearance: public\n---\n---\nclearance: secret\n---\n", Statement(clearance="public")),
]  # fmt: skip
NONE = [
    "", " ", "text", "# Title\n\n---\nacl: {read: []}\n---\n", "-- \n", "- item\n- item\n", "a\n---\n---\n",
    "-----BEGIN CERTIFICATE-----\nMII\n", "----- Forwarded message -----\n", '{"title": "a JSON document"}\n',
    "{\n", "+ plus\n", "++\n", ";; lisp\n", "<!-- --- -->\n",
]  # fmt: skip
UNREADABLE = [
    ("---", "never closes"),
    ("---\nclearance: public\n", "never closes"),
    ("---\nclearance: public\n--\n", "never closes"),
    ("---\nclearance: public\n ---\n", "never closes"),
    ("---\nclearance: public\n...\n\ntext\n", "never closes"),
    ("---\nclearance: public\n----\nclearance: secret\n---\n", "closed by another line"),
    ("---\nclearance: public\n...\ntext\n---\n", "line 4: this is not YAML"),
    ("---\n" + "# x\n" * (MAX_HEAD // 4) + "---\n", "never closes within 64 KiB"),
    ("--- # a comment\nclearance: public\n---\n", "does not begin front matter"),
    ("---yaml\nclearance: public\n---\n", "does not begin front matter"),
    ("--- {clearance: public}\n---\n", "does not begin front matter"),
    ("---\rclearance: public\r---\r", "does not begin front matter"),
    ("+++\nclearance = 'public'\n+++\n", "TOML"),
    ("+++", "TOML"),
    ('\n;;;\n{"clearance": "public"}\n;;;\n', "JSON"),
    ('{"title": 1,\n "acl": {"read": []}}\n\ntext\n', "JSON"),
    ("\u200b---\nclearance: public\n---\n", "nobody sees"),
    ("\ufeff\ufeff---\nclearance: public\n---\n", "nobody sees"),
    ("\u3164---\nclearance: public\n---\n", "nobody sees"),
    ("\u2800\n---\nclearance: public\n---\n", "nobody sees"),
    ("\ufe0f---\nclearance: public\n---\n", "nobody sees"),
    ("\U000e0020---\nclearance: public\n---\n", "nobody sees"),
    ("---\na\u200bcl: {read: []}\n---\n", "is not read"),
    ("---\n\u2060acl: {read: []}\n---\n", "is not read"),
    ("---\n\uff41\uff43\uff4c: {read: []}\n---\n", "is not read"),
    ("---\nclear\u00adance: secret\n---\n", "is not read"),
    ("---\nre\u200dad: []\n---\n", "not below acl"),
    ("\0---\nclearance: public\n---\n", "UTF-8|nobody sees"),
    ("---\nclearance: [public\n---\n", "not YAML"),
    ("---\n- a\n---\n", "not a mapping"),
    ("---\njust text\n---\n", "not a mapping"),
    ("---\nclearance: public\nclearance: public\n---\n", "line 3: clearance: the key stands here again"),
    ("---\nacl: {read: [user:okta:ann], read: []}\n---\n", "stands here again"),
    ("---\nx: &a [1]\n---\n", "anchors"),
    ("---\nx: *a\n---\n", "aliases"),
    ("---\nx: !!python/object/apply:os.system [id]\n---\n", "tags"),
    ("---\n<<: {clearance: public}\n---\n", "not merged"),
    ("---\n%YAML 1.1\n---\nclearance: public\n", "not YAML|not a mapping|directive"),
    ("---\ntitle: a\u202eb\n---\n", "hidden character U\\+202E"),
    ("---\nclearance:\n---\n", "line 2: clearance: this is not a level"),
    ("---\nclearance: [public]\n---\n", "not a level"),
    ("---\nclearance: 3\n---\n", "not a level"),
    ("---\nclearance: true\n---\n", "not a level"),
    ("---\nclearance: ''\n---\n", "not a level"),
    ("---\nacl:\n---\n", "acl says nothing"),
    ("---\nacl: {}\n---\n", "acl says nothing"),
    ("---\nacl: [user:okta:ann]\n---\n", "acl says nothing"),
    ("---\nacl: {read: user:okta:ann}\n---\n", "not a list"),
    ("---\nacl: {read: }\n---\n", "not a list"),
    ("---\nacl: {read: [ann]}\n---\n", "names nobody"),
    ("---\nacl: {read: [7]}\n---\n", "not text"),
    ("---\nacl: {read: [[user:okta:ann]]}\n---\n", "not text"),
    ("---\nacl: {readers: [user:okta:ann]}\n---\n", "not a key of acl"),
    ("---\nacl: {read: [user:okta:ann], write: []}\n---\n", "not a key of acl"),
    ("---\nacl: {read: ['user:okta:ann ']}\n---\n", "no name"),
    ("---\ngroups: [user:okta:ann]\n---\n", "not a group"),
    ("---\ngroups: finance\n---\n", "not a list"),
    ("---\nACL: {read: []}\n---\n", "'ACL' is not read"),
    ("---\nacls: {read: []}\n---\n", "'acls' is not read"),
    ("---\nacl.read: []\n---\n", "'acl.read' is not read"),
    ("---\nClearance: secret\n---\n", "'Clearance' is not read"),
    ("---\ndeny: [user:okta:ann]\n---\n", "below acl"),
    ("---\nacl:\nread: [user:okta:ann]\n---\n", "below acl"),
    ("---\nx: " + "[" * 40 + "]" * 40 + "\n---\n", "nested too deeply"),
    ("---\nacl: {read: [" + "a," * 5000 + "]}\n---\n", "5000 entries"),
]


@pytest.mark.parametrize(("text", "said"), SAID)
def test_what_is_said(text: str, said: Statement) -> None:
    assert read(text.encode()) == said


@pytest.mark.parametrize("text", NONE)
def test_no_front_matter(text: str) -> None:
    assert read(text.encode()) is None


@pytest.mark.parametrize(("text", "why"), UNREADABLE)
def test_unreadable(text: str, why: str) -> None:
    with pytest.raises(Unfit, match=why) as found:
        read(text.encode())
    assert len(str(found.value)) < 1000 and str(found.value).isascii() and "\n" not in str(found.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("text", ["---\nclearance: secret\n---\n", "+++\n", "\n---\n"])
def test_another_encoding_is_no_hiding_place(text: str, encoding: str) -> None:
    with pytest.raises(Unfit, match="not UTF-8"):
        read(text.encode(encoding))


def test_bytes_that_are_no_text_may_follow_but_not_stand_in_it() -> None:
    assert read(b"---\nclearance: public\n---\n\xff\xfe\0") == Statement(clearance="public")
    with pytest.raises(Unfit, match="not UTF-8"):
        read(b"---\nclearance: public\ntitle: \xff\n---\n")
    assert read(b"\x7fELF\x02\x01\x01" + bytes(60)) is None
    assert read(b"%PDF-1.7\n---\n") is None


def test_lines_are_the_documents_own() -> None:
    with pytest.raises(Unfit, match="line 6: clearance: this is not a level") as found:
        read(b"\n---\n\n# first\ntitle: x\nclearance: 3\nacl: 4\n---\n")
    assert "; line 7: acl" in str(found.value)


def test_a_character_cut_in_two_at_the_end_is_no_fault() -> None:
    head = ("---\nclearance: public\n---\n" + "\u00e9" * MAX_HEAD).encode()
    assert read(head[: MAX_HEAD - 1]) == read(head[:MAX_HEAD]) == read(head) == Statement(clearance="public")


_PIECES = st.sampled_from([
    "---", "---\n", "\n", "+++\n", "acl:", " {read: [", "user:okta:ann", "]}", "clearance: ", "public\n",
    "&a ", "*a", "!t ", "\ufeff", "\u202e", "\0", "- ", "  ", ": ", "'", "...\n", "\r", "<<: ", "{", "}",
])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(_PIECES, max_size=20).map(lambda p: "".join(p).encode())))
@example(b"---\n" + b"[" * 60000)
@example(b"---\n" + b"- " * 30000 + b"\n---\n")
@example(b"---\n" + b"? " * 30000 + b"\n---\n")
@example(b"---" + b" \n" * 32000)
@example(b'---\na: "\\ud800"\n---\n')
@example(b'---\n"\\ud800": 1\nacl: {"\\ud800": 1}\n---\n')
@example(b'---\nclearance: "\\ud800"\ngroups: ["group:okta:\\ud800"]\n---\n')
def test_any_bytes_give_a_statement_nothing_or_unfit(head: bytes) -> None:
    try:
        found = read(head)
    except Unfit as wrong:
        assert str(wrong).isascii() and "\n" not in str(wrong)
        return
    assert found is None or isinstance(found, Statement)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(["user:okta:a", "group:okta:b c", "group:entra:d"])), st.sampled_from("\n \t"))
def test_what_is_written_is_read(names: set[str], space: str) -> None:
    written = ", ".join(f"'{name}'" for name in sorted(names))
    head = f"{space}---\nacl: {{read: [{written}]}}\n---\n"
    assert read(head.encode()) == Statement(readers=frozenset(names))
