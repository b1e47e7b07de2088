"""Any tree, any part of it: exactly that part is there, byte for byte, and the manifest says exactly it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from vault_scene import Copy, Source, everything, in_child, refusal

from egressd.access.identifiers import path_of
from egressd.model.errors import Unfit
from egressd.vault.beneath import Found, open_root, read_digest, walk
from egressd.vault.projection import project, room
from egressd.vault.scratch import PrivateScratch

NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b".hidden", b"MANIFEST.json", b"-rf", b"%2E", b"x" * 255, b"\n", b"\xff"]),
    st.binary(min_size=1, max_size=12).filter(
        lambda name: not {0, 47} & {*name} and name not in (b".", b"..")
    ),
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
TREES = st.dictionaries(PATHS, st.binary(max_size=300), max_size=12)


def write(source: Source, tree: dict[bytes, bytes]) -> dict[bytes, Copy]:
    """All of it that can be: not a file where a directory is, nor a path that is too long to be named."""
    made = {}
    for path, content in tree.items():
        with contextlib.suppress(OSError, Unfit):
            source.copy(path, content)
            made[path] = source.write(path, content)
    return made


@settings(max_examples=150, deadline=None)
@given(tree=TREES, data=st.data())
def test_exactly_what_was_asked_for(tree: dict[bytes, bytes], data: st.DataObject) -> None:
    top = Path(tempfile.mkdtemp(prefix="egressd-vault-"))
    try:
        (top / "vault").mkdir()
        (top / "into").mkdir()
        documents = write(Source(top / "vault"), tree)
        wanted = data.draw(st.sets(st.sampled_from(sorted(documents))) if documents else st.just(set()))
        manifest = project([documents[path] for path in wanted], str(top / "into"))
        found = everything(top / "into")
        files = {path: entry.content for path, entry in found.items() if entry.kind == "file"}
        text = files.pop(b"MANIFEST.json")
        assert text is not None
        assert files == {b"hand/" + path: tree[path] for path in wanted}
        above = {path.rpartition(b"/")[0] for path in files}
        directories = {path for path, entry in found.items() if entry.kind == "directory"}
        assert directories == {
            b"/".join(d.split(b"/")[: n + 1]) for d in above for n in range(d.count(b"/") + 1)
        }
        assert {(entry.mode, entry.mtime_ns) for entry in found.values()} <= {(0o444, 0), (0o555, 0)}
        listed = json.loads(text)["files"]
        assert {path_of(entry["id"]): (entry["sha256"], entry["size"]) for entry in listed} == {
            path: (hashlib.sha256(tree[path]).hexdigest(), len(tree[path])) for path in wanted
        }
        assert [entry["path"] for entry in listed] == [entry["id"].replace(":", "/", 1) for entry in listed]
        assert manifest.digest == f"sha256:{hashlib.sha256(text).hexdigest()}"
        assert (manifest.files, manifest.octets) == (len(wanted), sum(len(tree[path]) for path in wanted))
    finally:
        shutil.rmtree(top)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_a_walk_finds_exactly_what_is_there(tree: dict[bytes, bytes]) -> None:
    top = Path(tempfile.mkdtemp(prefix="egressd-vault-"))
    try:
        documents = write(Source(top), tree)
        root = open_root(bytes(top))
        found = {one.path: one.size for one in walk(root) if isinstance(one, Found)}
        assert found == {path: len(tree[path]) for path in documents}
        for path, copy in documents.items():
            assert read_digest(root, path, limit=300) == (copy.digest, copy.size, tree[path])
        os.close(root)
    finally:
        shutil.rmtree(top)


@settings(max_examples=25, deadline=None)
@given(tree=TREES)
def test_room_is_enough(tree: dict[bytes, bytes]) -> None:
    top = Path(tempfile.mkdtemp(prefix="egressd-vault-"))
    try:
        (top / "vault").mkdir()
        (top / "at").mkdir()
        copies = list(write(Source(top / "vault"), tree).values())

        def does() -> tuple[str, bool]:
            wanted = room(copies)
            scratch = PrivateScratch(size=wanted.octets, inodes=wanted.inodes, at=top / "at")
            with scratch as path:
                text = refusal(lambda: project(copies, str(path)))
            return text, scratch.looked

        assert in_child(does) == ("", True)
    finally:
        shutil.rmtree(top)
