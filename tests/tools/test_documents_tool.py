"""The tools for a model: asked by a real client of the protocol, by a hostile one, and by Hypothesis."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import Client, MCPError, StdioServerParameters

from egressd.access.identifiers import identifier
from egressd.tools import documents as tool

SCRIPT = Path(tool.__file__)
BINARY = b"\x7fELF\0\1\2" * 100
LONG = "".join(f"line {n}: caf\u00e9 \u20ac \U0001f600\n" for n in range(4000))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model sees, and a secret beside it."""
    beside = tmp_path_factory.mktemp("tools")
    (beside / "secret.txt").write_text("the secret\n")
    work = beside / "work"
    (work / "hr" / "deep" / "er").mkdir(parents=True)
    (work / "hr" / "leave.md").write_text("# Leave\nThirty DAYS a year.\nStra\u00dfe\n")
    (work / "hr" / "deep" / "er" / "note").write_text("days\n")
    (work / "empty").write_bytes(b"")
    (work / "long.txt").write_text(LONG)
    (work / "one-line").write_bytes(b"x" * 3_000_000 + b"needle" + b"y" * 3_000_000)
    (work / "prog").write_bytes(BINARY)
    (work / "latin1.txt").write_bytes("Caf\u00e9 au lait, every day, for everybody here\n".encode("latin-1"))
    Path(os.fsdecode(os.fsencode(work) + b"/new\nline \xff.txt")).write_text("odd\n")
    (work / "link").symlink_to("../secret.txt")
    (work / "link-dir").symlink_to("..")
    (work / "hr" / "abs").symlink_to(beside / "secret.txt")
    os.mkfifo(work / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(work)  # a socket's path has 108 bytes at most
        listener.bind("sock")
        os.chdir(here)
    return work


SEEN = [
    "empty",
    "latin1.txt",
    "long.txt",
    "new%0Aline%20%FF.txt",
    "one-line",
    "prog",
    "hr/leave.md",
    "hr/deep/er/note",
]


def asking(root: Path, conversation: Callable[[Client], Awaitable[None]], mode: str = "auto") -> None:
    server = StdioServerParameters(command=sys.executable, args=[str(SCRIPT), "--root", str(root)])

    async def ask() -> None:
        async with Client(server, mode=mode, read_timeout_seconds=60) as client:
            await conversation(client)

    asyncio.run(ask())


async def told(client: Client, name: str, wrong: bool = False, **arguments: Any) -> str:
    result = await client.call_tool(name, arguments)
    assert result.is_error is wrong, result
    [content] = result.content
    assert content.type == "text"
    return content.text


# ---- a real client


@pytest.mark.parametrize("mode", ["auto", "legacy", "2026-07-28"])
def test_a_real_client_lists_reads_and_searches(root: Path, mode: str) -> None:
    async def conversation(client: Client) -> None:
        listed = await client.list_tools()
        assert [one.name for one in listed.tools] == ["list_documents", "read_document", "search_documents"]
        for one in listed.tools:
            assert one.annotations is not None and one.annotations.read_only_hint
            assert one.annotations.destructive_hint is False and one.annotations.open_world_hint is False
            assert one.input_schema["additionalProperties"] is False
        lines = (await told(client, "list_documents")).splitlines()
        assert [line.split("  ")[0] for line in lines] == SEEN
        assert lines[6] == "hr/leave.md  36 bytes"
        assert await told(client, "read_document", path="hr/leave.md") == (
            "# Leave\nThirty DAYS a year.\nStra\u00dfe\n\n[bytes 0 to 36 of 36]"
        )
        found = await told(client, "search_documents", text="dAyS")
        assert found.splitlines() == [
            "hr/leave.md:2: Thirty DAYS a year.",
            "hr/deep/er/note:1: days",
            "1 files are not text and were not searched.",
        ]

    asking(root, conversation, mode)


def test_the_client_negotiates(root: Path) -> None:
    versions: dict[str, str] = {}

    def conversation(mode: str) -> Callable[[Client], Awaitable[None]]:
        async def ask(client: Client) -> None:
            versions[mode] = client.session.protocol_version or ""
            with pytest.raises(MCPError) as found:
                await client.call_tool("write_document", {"path": "x"})
            assert found.value.error.code == tool.INVALID_PARAMS

        return ask

    for mode in ("auto", "legacy"):
        asking(root, conversation(mode), mode)
    assert versions == {"auto": "2026-07-28", "legacy": "2025-11-25"}


def test_names_are_shown_as_identifiers_spell_them(root: Path) -> None:
    odd = b"new\nline \xff.txt"
    assert tool.spelled((b"hr", odd)) == identifier("s", b"hr/" + odd).partition(":")[2]

    async def conversation(client: Client) -> None:
        assert (await told(client, "read_document", path="new%0Aline%20%FF.txt")).startswith("odd\n")
        assert (await told(client, "search_documents", text="odd")).startswith("new%0Aline%20%FF.txt:1: odd")
        assert (await told(client, "read_document", path="new\nline %FF.txt")).startswith("odd\n")

    asking(root, conversation)


def test_a_long_document_in_parts_is_the_document(root: Path) -> None:
    async def conversation(client: Client) -> None:
        parts, offset = [], 0
        while True:
            text = await told(client, "read_document", path="long.txt", offset=offset, limit=10_001)
            body, _, trailer = text.rpartition("\n[bytes ")
            parts.append(body)
            if "go on" not in trailer:
                break
            offset = int(trailer.rpartition("= ")[2][:-1])
        assert "".join(parts) == LONG
        assert len(parts) > 5

    asking(root, conversation)


def test_answers_have_bounds_and_go_on(root: Path, tmp_path: Path) -> None:
    for number in range(700):
        (tmp_path / f"{number:03}-{'n' * 200}").write_text("match\n" * 3)

    async def conversation(client: Client) -> None:
        seen: list[str] = []
        after: dict[str, Any] = {}
        while True:
            text = await told(client, "list_documents", limit=1000, **after)
            assert len(text) <= tool.MAX_ANSWER
            lines = text.splitlines()
            more = lines[-1].startswith("There are more")
            seen += [line.split("  ")[0] for line in (lines[:-1] if more else lines)]
            if not more:
                break
            after = {"after": seen[-1]}
        assert seen == sorted(path.name for path in tmp_path.iterdir())
        assert len(seen) == 700
        found = await told(client, "search_documents", text="match", limit=200)
        assert len(found.splitlines()) == 201 and found.endswith("search for something rarer.")
        assert len(await told(client, "search_documents", text="match")) <= tool.MAX_ANSWER

    asking(tmp_path, conversation)


def test_text_across_a_chunk_of_a_line_without_end_is_found_once(root: Path) -> None:
    found = tool.search_documents(tool.Documents(str(root)), "NEEDLE", (b"one-line",), 50)
    assert found.count("one-line:1: ") == 1 and "needle" in found
    assert len(found) < 500


def test_folding_is_unicodes(root: Path) -> None:
    assert tool.search_documents(tool.Documents(str(root)), "STRASSE", (), 50).startswith(
        "hr/leave.md:3: Stra\u00dfe"
    )


# ---- a hostile one

NOT_THERE = "There is no document with this path."
HOSTILE_READS: list[tuple[dict[str, Any], str]] = [
    ({"path": "../secret.txt"}, "not a path of a document"),
    ({"path": "hr/../../secret.txt"}, "not a path of a document"),
    ({"path": "%2E%2E/secret.txt"}, "not a path of a document"),
    ({"path": "%2E%2E%2Fsecret.txt"}, "not a path of a document"),
    ({"path": "/etc/passwd"}, "not a path of a document"),
    ({"path": "//etc/passwd"}, "not a path of a document"),
    ({"path": "hr//leave.md"}, "not a path of a document"),
    ({"path": "hr/leave.md/"}, "not a path of a document"),
    ({"path": "."}, "not a path of a document"),
    ({"path": ""}, "not a path of a document"),
    ({"path": "hr/leave.md\0"}, "not a path of a document"),
    ({"path": "hr%00"}, "not a path of a document"),
    ({"path": "%zz"}, "% is spelled %25"),
    ({"path": "\ud800"}, "half a character"),
    ({"path": "x" * 256}, "not a path of a document"),
    ({"path": "a/" * 8000 + "a"}, NOT_THERE),
    ({"path": "a" * 20_000}, "sensible length"),
    ({"path": "link"}, NOT_THERE),
    ({"path": "hr/abs"}, NOT_THERE),
    ({"path": "link-dir/secret.txt"}, NOT_THERE),
    ({"path": "hr"}, NOT_THERE),
    ({"path": "fifo"}, NOT_THERE),
    ({"path": "sock"}, NOT_THERE),
    ({"path": "hr/leave.md/x"}, NOT_THERE),
    ({"path": "HR/leave.md"}, NOT_THERE),
    ({"path": "prog"}, "not text but 700 other bytes"),
    ({"path": "hr/leave.md", "offset": 36}, "nothing begins at 36"),
    ({"path": "hr/leave.md", "offset": 1 << 62}, "nothing begins"),
    ({"path": "hr/leave.md", "offset": 1 << 63}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "offset": 10**400}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "offset": -1}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "offset": 1.0}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "offset": True}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "offset": "0"}, "offset must be a whole number"),
    ({"path": "hr/leave.md", "limit": 0}, "limit must be a whole number"),
    ({"path": "hr/leave.md", "limit": 1 << 20}, "limit must be a whole number"),
    ({"path": 7}, "path must be a text"),
    ({"path": None}, "path must be a text"),
    ({"path": ["hr/leave.md"]}, "path must be a text"),
    ({}, "argument path is missing"),
    ({"path": "hr/leave.md", "encoding": "utf-16"}, "not an argument"),
    ({"path": "hr/leave.md", "x\u202ey\n": 1}, "not an argument"),
]


@pytest.fixture
def server(root: Path) -> Iterator[tool.Server]:
    made = tool.Server(tool.Documents(str(root)))
    assert ask(made, "initialize", protocolVersion="2025-11-25")["result"]["protocolVersion"] == "2025-11-25"
    return made


def ask(server: tool.Server, method: str, **params: Any) -> dict[str, Any]:
    answer = server.handle(
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    )
    assert answer is not None and answer["id"] == 1
    return answer


@pytest.mark.parametrize(("arguments", "why"), HOSTILE_READS)
def test_hostile_reads(server: tool.Server, arguments: dict[str, Any], why: str) -> None:
    result = ask(server, "tools/call", name="read_document", arguments=arguments)["result"]
    [content] = result["content"]
    assert result["isError"] and why in content["text"]
    assert "secret" not in content["text"] and len(content["text"]) < 300


@pytest.mark.parametrize("name", ["list_documents", "search_documents"])
@pytest.mark.parametrize(
    "under", ["link-dir", "..", "/", "/etc", "hr/..", "link", "fifo", "nowhere", "x" * 256]
)
def test_nothing_leads_out_of_the_root(server: tool.Server, name: str, under: str) -> None:
    arguments = {"under": under} | ({"text": "secret"} if name == "search_documents" else {})
    result = ask(server, "tools/call", name=name, arguments=arguments)["result"]
    assert "secret.txt" not in result["content"][0]["text"]
    assert result["isError"] or "no documents" in result["content"][0]["text"]


def test_what_is_a_link_is_not_listed_or_searched(root: Path) -> None:
    documents = tool.Documents(str(root))
    assert "link" not in tool.list_documents(documents, (), (), 1000)
    assert "Nothing is found" in tool.search_documents(documents, "the secret", (), 50)


@pytest.mark.parametrize("text", ["", "x" * 1001, 7, None])
def test_hostile_searches(server: tool.Server, text: Any) -> None:
    result = ask(server, "tools/call", name="search_documents", arguments={"text": text})["result"]
    assert result["isError"] and "text must be a text" in result["content"][0]["text"]


def test_a_pattern_is_only_text(server: tool.Server) -> None:
    result = ask(server, "tools/call", name="search_documents", arguments={"text": "(a+)+$|.*"})["result"]
    assert result["content"][0]["text"].startswith("Nothing is found.")


def test_a_call_has_a_time_and_a_number_of_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = tool.Documents(str(root))
    monkeypatch.setattr(tool, "MAX_SECONDS", -1)
    with pytest.raises(tool.Wrong, match="too long"):
        tool.search_documents(documents, "x", (), 50)
    monkeypatch.setattr(tool, "MAX_SECONDS", 60)
    monkeypatch.setattr(tool, "MAX_ENTRIES", 3)
    with pytest.raises(tool.Wrong, match="too many files"):
        tool.list_documents(documents, (), (), 10)


NO_ARGUMENTS = b'{"name":"list_documents","arguments":[]}'
PROTOCOL: list[tuple[bytes, int]] = [
    (b"", tool.PARSE_ERROR),
    (b"{", tool.PARSE_ERROR),
    (b"\xff\xfe", tool.PARSE_ERROR),
    (b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}', tool.PARSE_ERROR),
    (b"[" * 100_000, tool.PARSE_ERROR),
    (b'{"a":' * 100_000, tool.PARSE_ERROR),
    (b"[]", tool.INVALID_REQUEST),
    (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', tool.INVALID_REQUEST),
    (b'"ping"', tool.INVALID_REQUEST),
    (b"null", tool.INVALID_REQUEST),
    (b"{}", tool.INVALID_REQUEST),
    (b'{"id":1,"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":1,"method":7}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":1}', tool.INVALID_REQUEST),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', tool.INVALID_PARAMS),
    (b'{"jsonrpc":"2.0","id":1,"method":"resources/list"}', tool.METHOD_NOT_FOUND),
    (b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":7}}', tool.INVALID_PARAMS),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"cursor":"x"}}', tool.INVALID_PARAMS),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call"}', tool.INVALID_PARAMS),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":["x"]}}', tool.INVALID_PARAMS),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%s}' % NO_ARGUMENTS, tool.INVALID_PARAMS),
    (b"x" * (tool.MAX_MESSAGE + 1), tool.INVALID_REQUEST),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code"), PROTOCOL)
def test_what_is_no_request(server: tool.Server, line: bytes, code: int) -> None:
    answer = server.handle(line)
    assert answer is not None and answer["error"]["code"] == code
    assert ask(server, "ping") == {"jsonrpc": "2.0", "id": 1, "result": {}}, "and it goes on"


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","method":"notifications/initialized"}',
        b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}',
        b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"list_documents"}}',
        b'{"jsonrpc":"2.0","id":1,"result":{}}',
        b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x"}}',
    ],
)
def test_what_is_not_answered(server: tool.Server, line: bytes) -> None:
    assert server.handle(line) is None


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("2024-11-05", "2024-11-05"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("2025-03-26", "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
    ],
)
def test_versions_of_the_handshake(root: Path, asked: str, given: str) -> None:
    server = tool.Server(tool.Documents(str(root)))
    assert ask(server, "tools/list")["error"]["code"] == tool.INVALID_REQUEST, "nothing before the handshake"
    assert ask(server, "initialize", protocolVersion=asked)["result"]["protocolVersion"] == given
    assert "tools" in ask(server, "tools/list")["result"]


META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}


def test_stateless_requests(root: Path) -> None:
    server = tool.Server(tool.Documents(str(root)))
    found = ask(server, "server/discover", _meta=META)["result"]
    assert found["supportedVersions"] == [*tool.HANDSHAKES, *tool.STATELESS]
    assert found["resultType"] == "complete"
    assert ask(server, "tools/list", _meta=META)["result"]["ttlMs"] == 0
    assert ask(server, "ping", _meta=META)["error"]["code"] == tool.METHOD_NOT_FOUND
    unknown = ask(
        server, "tools/list", _meta=META | {"io.modelcontextprotocol/protocolVersion": "2027-01-01"}
    )
    assert unknown["error"]["code"] == tool.UNSUPPORTED_VERSION
    assert unknown["error"]["data"]["supported"] == found["supportedVersions"]
    half = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}
    assert ask(server, "tools/list", _meta=half)["error"]["code"] == tool.INVALID_PARAMS
    assert ask(server, "tools/list")["error"]["code"] == tool.INVALID_REQUEST, "nothing is remembered"


# ---- lines


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.integers(1, 9)
)
def test_lines_come_whole_however_they_arrive(sent: list[bytes], size: int) -> None:
    stream = b"\n".join(sent)
    pieces = iter([stream[at : at + size] for at in range(0, len(stream), size)])
    assert list(tool.lines(lambda _: next(pieces, b""))) == [line for line in sent if line.strip()]


def test_a_line_without_end_is_dropped_and_the_next_is_read() -> None:
    pieces = iter([b"x" * (1 << 16)] * 40 + [b"x\n{}\n", b"y" * (1 << 21) + b"\nz\n"])
    got = list(tool.lines(lambda _: next(pieces, b"")))
    assert [len(line) for line in got] == [tool.MAX_MESSAGE + 1, 2, tool.MAX_MESSAGE + 1, 1]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_ARGUMENTS = st.dictionaries(
    st.sampled_from(["path", "under", "after", "text", "limit", "offset"]),
    _JSON | st.text("./%2hr\0", max_size=9),
)
_CALLS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*tool.TOOLS, "x"]),
        "_meta": _JSON | st.just(META),
        "arguments": _ARGUMENTS,
    },
)
_METHODS = st.sampled_from(["tools/call", "tools/list", "initialize"])
_REQUESTS = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "id": st.integers() | _JSON, "method": _METHODS},
    optional={"params": _CALLS | _JSON},
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | (_JSON | _REQUESTS).map(lambda value: json.dumps(value).encode()))
def test_any_line_gets_one_answer_or_none(root: Path, line: bytes) -> None:
    server = tool.Server(tool.Documents(str(root)))
    server._handshaken = True
    answer = server.handle(line)
    if answer is None:
        return
    assert set(answer) <= {"jsonrpc", "id", "result", "error"}
    assert ("result" in answer) != ("error" in answer)
    assert answer.get("error", {}).get("code") != tool.INTERNAL_ERROR
    assert "the secret" not in json.dumps(answer)


# ---- the process


def run(root: Path, sent: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--root", str(root), *options]
    return subprocess.run(command, input=sent, capture_output=True, timeout=60, check=False)


def test_it_needs_nothing_but_the_standard_library(root: Path) -> None:
    done = run(root, b'{"jsonrpc":"2.0","id":"a","method":"ping"}\nnot json\n')
    assert (done.returncode, done.stderr) == (0, b"")
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    assert first == {"jsonrpc": "2.0", "id": "a", "result": {}}
    assert (second["id"], second["error"]["code"]) == (None, tool.PARSE_ERROR)


def test_older_pythons_can_read_it() -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text(), feature_version=(3, 9))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere\n", b"")
    assert done.returncode == 1 and done.stdout == b""
    assert b"No such file" in done.stderr and done.stderr.count(b"\n") == 1


def test_a_client_that_goes_away_is_no_error(root: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--root", str(root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0
