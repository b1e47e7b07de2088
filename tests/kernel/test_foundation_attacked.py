"""The foundation, among what accounts that were taken over have left for root: none of it keeps egressd from
starting, or an administrator from taking it away."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_foundation import edited, inhabited, recorded, remembered
from warden_world import World, nothing_left, sh

from egressd.kernel import namespaces, sockets
from egressd.model.errors import KernelError
from egressd.processes import adopting, foundation, unrecorded
from egressd.processes.config import Config

pytestmark = pytest.mark.kernel

DAEMON, CUSTODY = 4001, 4009
_UNIT = Path(__file__).parents[2] / "systemd" / "egressd-foundation.service"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with nothing_left(), World(tmp_path) as world:
        yield world


def own(world: World) -> Path:
    return world.config.run_dir / "controller"


def custody(world: World) -> Path:
    path = world.config.run_dir / "custodian" / "settings.json"
    path.parent.mkdir(exist_ok=True)
    return path


# ---- with the rights that the units give it


def bounded() -> str:
    """What the unit leaves of root's capabilities, as setpriv(1) takes it."""
    words = [
        word
        for line in _UNIT.read_text().splitlines()
        if line.startswith("CapabilityBoundingSet=")
        for word in line.partition("=")[2].split()
    ]
    return ",".join(["-all", *(f"+{word.removeprefix('CAP_').lower()}" for word in words)])


def as_the_unit(world: World) -> subprocess.CompletedProcess[str]:
    config = Config(
        gateway=world.config.gateway, state_dir=str(world.config.state_dir), run_dir=str(world.config.run_dir)
    )
    command = ["setpriv", f"--bounding-set={bounded()}", "--", sys.executable, "-I", "-m"]
    return subprocess.run(
        [*command, "egressd.processes.foundation", "--config-json", config.encode()],
        capture_output=True,
        text=True,
        preexec_fn=lambda: namespaces.enter(world.host),
        check=False,
    )


def test_a_root_that_may_not_pass_by_permissions_begins_anew_all_the_same(world: World) -> None:
    """The unit has no CAP_DAC_OVERRIDE, and the controller's directory is for the controller alone."""
    inhabited(world)
    recorded(world)
    for path in (own(world), own(world) / "leases"):
        os.chown(path, DAEMON, DAEMON)
        path.chmod(0o700)
    for path in own(world).rglob("*.json"):
        os.chown(path, DAEMON, DAEMON)
        path.chmod(0o644)
    edited(world, boot="another")
    done = as_the_unit(world)
    assert done.returncode == 0, done.stderr
    (lost, fields), (begun, _) = recorded(world)
    assert (lost, begun) == ("sandbox-lost", "gateway-begun")
    assert (fields["link"], fields["workspace"], fields["uid"]) == ("eg7", "acme", DAEMON)
    assert remembered(world) == set()


# ---- the controller's directory


def _deep(path: Path) -> None:
    path.write_text('{"link": 12, "workspace": "acme", "more": ' + "[" * 60_000)


def _nested(path: Path) -> None:
    for _ in range(40):
        path /= "d"
    path.mkdir(parents=True)


LEFT: dict[str, Callable[[Path], object]] = {
    "a lease that is nested deeply": lambda own: _deep(own / "leases" / "eg12.json"),
    "a lease that is no text": lambda own: (own / "leases" / "eg12.json").write_bytes(
        b'{"link": 12, "workspace": "\xff"}'
    ),
    "a directory for a lease": lambda own: _nested(own / "leases" / "eg12.json"),
    "a directory for the books": lambda own: ((own / "books.json").unlink(), _nested(own / "books.json")),
    "a directory for the names": lambda own: _nested(own / "names.jsonl"),
    "a file for the leases": lambda own: ((own / "leases" / "eg7.json").unlink(),
                                          (own / "leases").rmdir(), (own / "leases").touch()),
    "a directory that nobody may enter": lambda own: (own / "leases").chmod(0),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_it_left_keeps_no_gateway_from_beginning_anew(world: World, what: str) -> None:
    inhabited(world)
    recorded(world)
    LEFT[what](own(world))
    edited(world, boot="another")
    assert "removed stale eg7" in world.found()
    events = [event for event, _ in recorded(world)]
    assert events == ["sandbox-lost", "gateway-begun"]
    assert not list(own(world).iterdir())


@pytest.mark.parametrize("what", LEFT)
def test_what_it_left_keeps_no_gateway_from_being_dismantled(world: World, what: str) -> None:
    inhabited(world)
    LEFT[what](own(world))
    assert f"unpinned {world.config.gateway}" in world.dismantle()


def test_leases_without_end_are_not_recorded_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopting, "_MOST_LEASES", 20)
    inhabited(world)
    recorded(world)
    leases = own(world) / "leases"
    for number in (*range(1, 5), *range(100, 200)):
        (leases / f"eg{number}.json").write_text(json.dumps({"link": number, "workspace": "acme"}))
    (leases / "other.json").write_text('{"link": 5, "workspace": "acme"}')
    (leases / "eg6.json").write_text('{"link": 5, "workspace": "acme"}')
    edited(world, boot="another")
    world.found()
    found = recorded(world)
    lost = [fields["link"] for event, fields in found if event == "sandbox-lost"]
    assert lost == ["eg1", "eg2", "eg3", "eg4", "eg7", *(f"eg{number}" for number in range(100, 115))]
    assert not leases.exists(), "all of them are gone nevertheless"


# ---- the custodian's file


BEYOND: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a link to what never ends": lambda path: path.symlink_to("/dev/zero"),
    "nested deeply": lambda path: path.write_text("[" * 60_000),
    "a directory": Path.mkdir,
    "a NUL in a name": lambda path: _says(path, {"net/ipv4/conf/w\0n/forwarding": "1"}),
    "half of a character": lambda path: _says(path, {"net/ipv4/conf/w\ud800n/forwarding": "1"}),
}


def _says(path: Path, settings: dict[str, str]) -> None:
    path.write_text(json.dumps({"settings": settings}))


@pytest.mark.parametrize("what", BEYOND)
def test_what_the_custodian_left_keeps_nothing_from_being_put_back(world: World, what: str) -> None:
    world.found()
    assert sh("cat /proc/sys/net/ipv4/conf/wan/forwarding", namespace=world.host) == "1\n"
    BEYOND[what](custody(world))
    assert "set net/ipv4/conf/wan/forwarding back to 0" in world.dismantle()
    assert sh("cat /proc/sys/net/ipv4/conf/wan/forwarding", namespace=world.host) == "0\n"
    assert not (world.config.state_dir / "foundation.json").exists()


# ---- the record


def test_a_record_that_grew_too_large_does_not_swallow_what_comes_after(world: World) -> None:
    world.found()
    recorded(world)
    path = world.config.state_dir / "unrecorded.jsonl"
    with path.open("wb") as stream:
        stream.truncate(65 << 20)
    world.dismantle()
    assert "gateway-dismantled" in [event for event, _ in recorded(world)]


def test_half_a_line_takes_no_other_with_it(world: World) -> None:
    world.found()
    with (world.config.state_dir / "unrecorded.jsonl").open("ab") as stream:
        stream.write(b'{"event":"sandbox-lo')
    world.dismantle()
    assert [event for event, _ in recorded(world)] == ["gateway-begun", "gateway-dismantled"]


def test_a_disk_that_is_full_keeps_no_gateway_from_being_made(world: World) -> None:
    """As the journal does without (journal_file.py): what denies comes first."""
    state = world.config.state_dir
    state.mkdir()
    sh(f"mount -t tmpfs -o size=4k none {state}")
    try:
        (state / "fill").write_bytes(bytes(4096))
        with pytest.raises(OSError, match="No space"):
            unrecorded.keep(state, [unrecorded.Happening("gateway-dismantled", {})])
        world.found()
        assert "hook forward" in world.nft("list ruleset")
    finally:
        sh(f"umount {state}")


# ---- sockets that outlive who was handed them

DEAF = (ctypes.c_uint64 * 1)(6)  # struct sock_filter: BPF_RET | BPF_K with 0, nothing comes in
HARM: dict[str, Callable[[socket.socket], object]] = {
    "connected to somebody": lambda s: s.connect(("127.0.0.1", 9) if s.family == socket.AF_INET else (7, 0)),
    "shut down": lambda s: _shut(s),  # noqa: PLW0108 -- it comes below
    "bound to a device": lambda s: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo"),
    "for neighbours alone": lambda s: s.setsockopt(socket.IPPROTO_IP, 21, 255),
}


def _shut(sock: socket.socket) -> None:
    with pytest.raises(OSError, match="not connected"):
        sock.shutdown(socket.SHUT_RD)


def _filter(sock: socket.socket) -> None:
    program = struct.pack("HP", 1, ctypes.addressof(DEAF))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


@contextmanager
def kept(world: World) -> Iterator[dict[str, socket.socket]]:
    """The sockets of a gateway; in the block this thread is there."""
    with namespaces.inside(world.host):
        result = foundation.setup(world.config)
    world.gateway = os.dup(result.namespace)
    try:
        with namespaces.inside(world.gateway):
            yield result.sockets
    finally:
        result.close()


@pytest.mark.parametrize(
    ("name", "harm"),
    [("udp4", "connected to somebody"), ("nflog", "connected to somebody"), ("udp4", "shut down"),
     ("relay4", "bound to a device"), ("nflog", "bound to a device"), ("inspect4", "for neighbours alone")],
)  # fmt: skip
def test_a_socket_that_was_made_deaf_is_not_taken_over(world: World, name: str, harm: str) -> None:
    with kept(world) as found:
        assert {name: sockets.misfit(name, sock) for name, sock in found.items()} == dict.fromkeys(found, "")
        HARM[harm](found[name])
        assert sockets.misfit(name, found[name])


@pytest.mark.parametrize("name", ["udp4", "tcp6", "nflog", "flows", "ended"])
def test_nobody_puts_a_filter_into_it(world: World, name: str) -> None:
    with kept(world) as found:
        with pytest.raises(PermissionError):
            _filter(found[name])
        with pytest.raises(PermissionError):
            found[name].setsockopt(socket.SOL_SOCKET, 44, 0)  # SO_LOCK_FILTER


def test_queues_that_were_shortened_are_long_again(world: World) -> None:
    with kept(world) as found:
        long = {name: _room(sock) for name, sock in found.items()}
        for sock in found.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        found["relay4"].listen(0)
        for name in ("udp4", "udp6", "nflog", "flows", "ended", "relay4"):
            sockets.refresh(name, found[name])
            assert name == "relay4" or _room(found[name]) == long[name]
        listening = sh(f"ss -Hltn sport = :{found['relay4'].getsockname()[1]}", namespace=world.gateway)
        assert {line.split()[2] for line in listening.splitlines()} == {"1024"}


def _room(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


# ---- two at once


def test_mending_makes_no_gateway(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment: a start beside it would take that for its own."""
    monkeypatch.setattr(namespaces, "_make", lambda place: pytest.fail(f"made {place}"))
    with namespaces.inside(world.host), pytest.raises(KernelError, match="no gateway"):
        foundation.mend(world.config)
