"""Catalogue and tables, read from their files. What is wrong with one breaks the whole, and is named."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from datetime import date
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from egressd.processes.registry_files import MAX_CATALOGUE, read_registry, read_table
from egressd.residency.judge import Code
from egressd.residency.places import Pin
from egressd.residency.prefixes import Group, Source, Table
from egressd.residency.registry import Registry

EU = Pin(("EU",))
HERE = IPv4Address("3.120.0.1")


def table(name: str = "aws", region: str = "eu-central-1", prefix: str = "3.120.0.0/14") -> bytes:
    return Table(
        name=name,
        provider="aws",
        format="aws",
        source=Source("ip-ranges.json", "sha256:" + "0" * 64, 1),
        published=date(2026, 11, 20),
        imported=date(2026, 11, 21),
        groups=(Group(region=region, services=("EC2",), prefixes=(prefix,)),),
    ).encode()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "residency"
    (made / "tables").mkdir(parents=True)
    (made / "tables" / "aws.json").write_bytes(table())
    return made


def broken(registry: Registry) -> str:
    """Why; and under a pin nothing is let through then."""
    finding, _ = registry.judge_address(HERE, pin=EU, vouched=True)
    assert finding.code is Code.BROKEN and finding.text == registry.broken
    assert registry.judge_name("example.com", pin=EU).code is Code.BROKEN
    assert registry.judge_name("example.com", pin=Pin()).code is Code.UNPINNED
    return registry.broken


def test_without_a_directory_there_is_the_catalogue_alone(tmp_path: Path) -> None:
    registry = read_registry(tmp_path / "nowhere")
    assert registry.broken == ""
    assert "aws-bedrock" in registry.catalogue.providers
    assert registry.prefixes.names == ()
    assert registry.observe(HERE).prefix is None


def test_tables_are_read_and_placed_by_the_catalogue(directory: Path) -> None:
    registry = read_registry(directory)
    assert registry.broken == ""
    seen = registry.observe(HERE)
    assert (seen.prefix, seen.region, seen.countries) == ("3.120.0.0/14", "eu-central-1", ("DE",))
    assert registry.judge_address(HERE, pin=EU, vouched=False)[0].code is Code.INSIDE
    assert registry.judge_address(IPv4Address("8.8.8.8"), pin=EU, vouched=False)[0].code is Code.UNPUBLISHED


def test_the_digest_changes_with_every_file(directory: Path) -> None:
    digests = [read_registry(directory).digest]
    (directory / "tables" / "aws.json").write_bytes(table(region="us-east-1"))
    digests.append(read_registry(directory).digest)
    (directory / "tables" / "own.json").write_bytes(table("own"))
    digests.append(read_registry(directory).digest)
    (directory / "tables" / "own.json").unlink()
    (directory / "mine.yaml").write_text("clouds: {}\n")
    assert len(set(digests)) == 3
    assert read_registry(directory).digest == digests[1] or read_registry(directory).broken


def test_files_that_make_the_catalogue_another_are_named_with_their_digests(directory: Path) -> None:
    assert read_registry(directory).own == ()
    text = "providers:\n  ours: {title: Ours, source: 'https://ours.example/x', domains: [ours.example]}\n"
    (directory / "ours.yaml").write_text(text)
    registry = read_registry(directory)
    assert registry.own == (f"ours.yaml@sha256:{hashlib.sha256(text.encode()).hexdigest()}",)
    (directory / "ours.yaml").write_text("providers: [")
    assert read_registry(directory).broken and len(read_registry(directory).own) == 1


def test_hidden_files_and_editors_leavings_are_passed_over(directory: Path) -> None:
    for name in (".aws.json.x1", "aws.json~", ".hidden"):
        (directory / "tables" / name).write_text("junk")
        (directory / name).write_text("junk")
    assert read_registry(directory).broken == ""


def _half(path: Path) -> None:
    path.write_bytes(table()[:200])


def _edited(path: Path) -> None:
    path.write_bytes(table().replace(b'"EC2"', b'"EC2" '))


def _other_name(path: Path) -> None:
    path.rename(path.with_name("other.json"))


def _link(path: Path) -> None:
    path.rename(path.with_name(".real"))
    path.symlink_to(".real")


def _writable(path: Path) -> None:
    path.chmod(0o666)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def _huge(path: Path) -> None:
    os.truncate(path, 200 << 20)


def _strange(path: Path) -> None:
    path.with_name("notes.txt").write_text("?")


def _writable_directory(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_half, "tables/aws.json: it is no table of prefixes"),
        (_edited, "tables/aws.json: it is not spelled as egressd writes it: it was edited, or cut off"),
        (_other_name, "tables/other.json: name: it holds the table aws, and is called otherwise"),
        (_link, "tables/aws.json: it is a symbolic link (put the file itself here)"),
        (_writable, "tables/aws.json: everybody may write to it"),
        (_fifo, "tables/aws.json: it is a FIFO"),
        (_socket, "tables/aws.json: it is a socket"),
        (_huge, "tables/aws.json: it has at least 209715200 bytes"),
        (_strange, "tables/notes.txt: it is not read: its name does not end in .json"),
        (_writable_directory, "tables: everybody may write to the directory (chmod o-w)"),
    ],
)
def test_a_table_that_cannot_be_used_breaks_the_whole(
    directory: Path, harm: Callable[[Path], None], said: str
) -> None:
    harm(directory / "tables" / "aws.json")
    assert f"{directory}/{said}" in broken(read_registry(directory))


def test_a_broken_table_takes_nothing_from_the_others(directory: Path) -> None:
    (directory / "tables" / "own.json").write_bytes(table("own", prefix="5.5.0.0/16"))
    _half(directory / "tables" / "aws.json")
    registry = read_registry(directory)
    assert broken(registry)
    assert [name.name for name in registry.prefixes.names] == ["own"]
    assert "aws-bedrock" in registry.catalogue.providers


@pytest.mark.parametrize(
    "text",
    ["clouds: [", "providers: {x: 7}", "\0", "a" * (MAX_CATALOGUE + 1)],
    ids=["half", "wrong", "nul", "huge"],
)
def test_a_catalogue_that_cannot_be_used_breaks_the_whole(directory: Path, text: str) -> None:
    (directory / "mine.yaml").write_text(text)
    registry = read_registry(directory)
    assert f"{directory}/mine.yaml" in broken(registry)
    assert "aws-bedrock" in registry.catalogue.providers  # the built-in one is there, for what is not pinned


def test_a_catalogue_of_another_suffix_is_not_silently_left_out(directory: Path) -> None:
    (directory / "mine.yml").write_text("clouds: {}\n")
    assert "mine.yml: it is not read: its name does not end in .yaml" in broken(read_registry(directory))


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "residency").write_text("?")
    assert "the directory cannot be read" in broken(read_registry(tmp_path / "residency"))


def test_one_table_alone(directory: Path) -> None:
    found = read_table(directory / "tables" / "aws.json")
    assert found is not None and found.encode() == table()
    assert read_table(directory / "tables" / "none.json") is None


def test_no_descriptor_is_left_open(directory: Path) -> None:
    read_registry(directory)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for harm in (_half, _link, _writable_directory):
        read_registry(directory)
        harm(directory / "tables" / "aws.json")
    read_registry(directory)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
