"""The judge: every frame that crosses the host's uplink, and assertions about them.

    with Capture(lab) as uplink:
        …
        uplink.assert_never(b"the-secret")
        assert uplink.to("11.22.33.66") == []

`settle()` sends a frame of its own down the same wire and waits until it is captured, so everything sent
before has been seen; a capture in which the kernel dropped a frame fails instead of judging on half the
evidence.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lab import topology
from lab.machine import Lab, LabError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Capture", "Frame"]

ETH_P_ALL, SOL_PACKET = 0x0003, 263  # linux/if_ether.h, linux/socket.h
PACKET_STATISTICS, PACKET_OUTGOING = 6, 4  # linux/if_packet.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_IPV4, _IPV6 = 0x0800, 0x86DD
_TCP, _UDP = 6, 17
_BUFFER = 64 << 20
_SENTINEL = (topology.ROUTER4, 9)  # the discard port of the router


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. May be a segmentation super-packet: the uplink is a veth."""

    number: int
    outgoing: bool  # from the host to the internet
    data: bytes

    @property
    def kind(self) -> int:
        """The Ethernet type."""
        return int.from_bytes(self.data[12:14], "big")

    @property
    def source(self) -> IPv4Address | IPv6Address | None:
        return self._address(26, 22)

    @property
    def destination(self) -> IPv4Address | IPv6Address | None:
        return self._address(30, 38)

    def _address(self, four: int, six: int) -> IPv4Address | IPv6Address | None:
        if self.kind == _IPV4 and len(self.data) >= four + 4:
            return IPv4Address(self.data[four : four + 4])
        if self.kind == _IPV6 and len(self.data) >= six + 16:
            return IPv6Address(self.data[six : six + 16])
        return None

    @property
    def protocol(self) -> int | None:
        """The IP protocol; of IPv6 the first next header."""
        if self.kind == _IPV4:
            return self.data[23]
        return self.data[20] if self.kind == _IPV6 else None

    @property
    def transport(self) -> bytes:
        """What follows the IP header."""
        if self.kind == _IPV4:
            return self.data[14 + 4 * (self.data[14] & 15) :]
        return self.data[54:] if self.kind == _IPV6 else b""

    @property
    def ports(self) -> tuple[int, int] | None:
        """(source, destination) of TCP and UDP."""
        if self.protocol not in (_TCP, _UDP) or len(self.transport) < 4:
            return None
        source, destination = struct.unpack_from("!HH", self.transport)
        return source, destination

    @property
    def is_reset(self) -> bool:
        """A TCP segment with RST (RFC 9293 section 3.1)."""
        return self.protocol == _TCP and len(self.transport) > 13 and bool(self.transport[13] & 4)

    def scapy(self) -> Any:
        """The frame dissected. Scapy takes half a second to import: for failures and rare needs."""
        from scapy.layers.l2 import Ether

        return Ether(self.data)

    def __str__(self) -> str:
        arrow = "->" if self.outgoing else "<-"
        return f"{self.number:5d} {arrow} {self.scapy().summary()}"


class Capture:
    """Frames on one interface from `start` (or `with`) on. Reads in a thread of this process."""

    def __init__(self, lab: Lab, *, where: str = topology.HOST, device: str = topology.UPLINK) -> None:
        self._lab = lab
        self._frames: list[Frame] = []
        self._dropped = 0
        self._socket = lab.socket(socket.AF_PACKET, socket.SOCK_RAW, 0, where=where)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:  # rootless: the kernel's own limit, usually 208 KiB
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.bind((device, ETH_P_ALL))
        self._probe = lab.socket(socket.AF_INET, socket.SOCK_DGRAM, where=topology.HOST)
        self._ended, self._end = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            os.close(self._end)
            self._thread.join()
            self._socket.close()
            self._probe.close()
            os.close(self._ended)

    def _read(self) -> None:
        waiting = select.poll()  # select(2) takes no descriptor above 1023
        waiting.register(self._socket.fileno(), select.POLLIN)
        waiting.register(self._ended, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in waiting.poll()]
            if self._socket.fileno() not in ready:
                return
            data, (_, _, kind, _, _) = self._socket.recvfrom(1 << 17)
            self._frames.append(Frame(len(self._frames), kind == PACKET_OUTGOING, data))

    def settle(self, timeout: float = 5.0) -> int:
        """Wait until everything sent so far has been captured; the number of frames so far."""
        token = b"settle " + os.urandom(16)
        already = len(self._frames)
        self._probe.sendto(token, (str(_SENTINEL[0]), _SENTINEL[1]))
        deadline = time.monotonic() + timeout
        while not any(token in frame.data for frame in self._frames[already:]):
            if time.monotonic() > deadline:
                raise LabError("the capture does not see its own frame: it cannot judge")
            time.sleep(0.0005)
        self._count_drops()
        return len(self._frames)

    def _count_drops(self) -> None:
        """The kernel's statistics reset when read (packet(7))."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        self._dropped += struct.unpack("=II", statistics)[1]
        if self._dropped:
            raise LabError(f"the capture lost {self._dropped} frames: it cannot judge")

    # ---- the evidence

    def frames(self, *, since: int = 0, outgoing: bool | None = None) -> list[Frame]:
        """All frames but the capture's own, oldest first."""
        self.settle()
        return [
            frame
            for frame in self._frames[since:]
            if b"settle " not in frame.data[42:49] and (outgoing is None or frame.outgoing == outgoing)
        ]

    def to(self, address: object, *, port: int | None = None, since: int = 0) -> list[Frame]:
        """Frames that left for an address, whatever they are."""
        wanted = ip_address(str(address))
        return self._select(
            lambda frame: (
                frame.destination == wanted and (port is None or (frame.ports or (0, 0))[1] == port)
            ),
            since,
        )

    def sent_from(self, address: object, *, since: int = 0) -> list[Frame]:
        """Frames that left with a source address."""
        wanted = ip_address(str(address))
        return self._select(lambda frame: frame.source == wanted, since)

    def holding(self, marker: bytes, *, since: int = 0) -> list[Frame]:
        """Frames of either direction that contain the bytes."""
        return [frame for frame in self.frames(since=since) if marker in frame.data]

    def _select(self, condition: Callable[[Frame], bool], since: int) -> list[Frame]:
        return [frame for frame in self.frames(since=since, outgoing=True) if condition(frame)]

    # ---- verdicts

    def assert_never(self, *markers: bytes, since: int = 0) -> None:
        """None of these bytes crossed the uplink, in either direction, in the clear."""
        for marker in markers:
            assert marker, "an empty marker is in every frame"
            self._assert_none(self.holding(marker, since=since), f"{marker!r} crossed the uplink")

    def assert_nothing_to(self, *addresses: object, since: int = 0) -> None:
        for address in addresses:
            self._assert_none(self.to(address, since=since), f"something left for {address}")

    def assert_quiet(self, *, since: int = 0) -> None:
        """Not one frame left, our own aside. (What comes in may be a server of an earlier test that asks
        after a connection that is gone; and a reset that answers it is the host's, and carries nothing.)"""
        left = [frame for frame in self.frames(since=since, outgoing=True) if not frame.is_reset]
        self._assert_none(left, "the uplink was not quiet")

    def assert_only_to(self, *addresses: object, since: int = 0) -> None:
        """Whatever left went to these addresses, and came from the host's own."""
        wanted = {ip_address(str(address)) for address in addresses}
        ours = {topology.HOST4, topology.HOST6}
        strays = self._select(
            lambda frame: frame.destination not in wanted or frame.source not in ours, since
        )
        self._assert_none(strays, "something left for elsewhere, or under a foreign address")

    @staticmethod
    def _assert_none(frames: list[Frame], what: str) -> None:
        if frames:
            shown = "\n".join(map(str, frames[:10]))
            raise AssertionError(f"{what}, in {len(frames)} frames:\n{shown}")

    def save(self, path: Path) -> None:
        """As a pcap file, to be opened with tcpdump or Wireshark."""
        header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1)
        records = [struct.pack("=IIII", 0, f.number, len(f.data), len(f.data)) + f.data for f in self._frames]
        path.write_bytes(header + b"".join(records))
