"""Hellos of real clients: saved ones, and those of the programs that this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from egressd.tls.hello import HelloReader, More, Named, read
from tls import record

SAVED = sorted(record.CORPUS.glob("*.hex"))
# Chrome and Firefox put encrypted_client_hello into every hello, as GREASE if not in earnest. Others do not.
HIDING = {"chrome", "firefox"}


def check(data: bytes, *, ech: bool) -> None:
    """Whole, in every two pieces, byte by byte."""
    named = Named(record.NAME, ech=ech, length=len(data))
    assert read(data) == named
    for cut in range(1, len(data)):
        reader = HelloReader()
        assert reader.feed(data[:cut]) == More(), cut
        assert read(data[:cut]) == More(), cut
        assert reader.feed(data[cut:]) == named, cut
    reader = HelloReader()
    assert [reader.feed(data[at : at + 1]) for at in range(len(data))] == [More()] * (len(data) - 1) + [named]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_saved_hello(path: Path) -> None:
    about, data = record.load(path)
    assert about["name"] == record.NAME
    check(data, ech=path.stem in HIDING)


def test_the_corpus_is_what_it_should_be() -> None:
    found = {path.stem: record.load(path)[1] for path in SAVED}
    assert set(found) == set(record.LIVE | record.RECORDED)
    # what one segment does not hold at an MTU of 1500
    large = {label for label, data in found.items() if len(data) > 1440}
    assert {"chrome", "firefox", "safari"} <= large


@pytest.mark.parametrize("label", record.LIVE)
def test_a_client_of_this_machine(label: str) -> None:
    client = record.LIVE[label]
    if not client.here:
        pytest.skip(f"{client.words[0]} is not installed")
    check(record.record(client), ech=False)
