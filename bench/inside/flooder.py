"""Sends frames as fast as one process can, or only burns its processor. Standard library only, one file.

Run by the owner of a sandbox's network, who may open a raw socket there: no system-call filter, no handshake
of the kernel's, each packet from another port. Reads one JSON order per line and answers each with one line:

    {"do": kind, "from": [address, ...], "to": [address, port]}
        until the next line comes, whatever that says: {"sent", "seconds"}

Kinds: `burn` sends nothing; `udp` and `syn` begin something with each frame; `dns` asks the one question
"name" over and over, from one port.
"""

import json
import select
import socket
import struct
import sys
import time

ETHERNET = bytes.fromhex("025300000002 025300000001 0800".replace(" ", ""))
PORTS = 1 << 14
BATCH = 64


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data if len(data) % 2 == 0 else data[:-1]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(protocol: int, source: str, to: str, body: bytes) -> bytes:
    """`body` is TCP or UDP with a checksum of zero."""
    ends = socket.inet_aton(source) + socket.inet_aton(to)
    where = 16 if protocol == socket.IPPROTO_TCP else 6
    value = checksum(ends + struct.pack(">HH", protocol, len(body)) + body)
    body = body[:where] + struct.pack(">H", value) + body[where + 2 :]
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0) + ends
    return ETHERNET + header[:10] + struct.pack(">H", checksum(header)) + header[12:] + body


def datagram(port: int, to: int, data: bytes) -> bytes:
    return struct.pack(">HHHH", port, to, 8 + len(data), 0) + data


def question(name: str) -> bytes:
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    return bytes.fromhex("777701000001000000000000") + labels + b"\0\0\1\0\1"


def frames(order: dict) -> list[bytes]:  # type: ignore[type-arg]
    source, (to, port) = order["from"], order["to"]
    match order["do"]:
        case "dns":
            return [frame(17, source, to, datagram(4000, port, question(order["name"])))] * BATCH
        case "udp":
            bodies = [datagram(1024 + n, port, b"x" * 18) for n in range(PORTS)]
            return [frame(17, source, to, body) for body in bodies]
    bodies = [struct.pack(">HHIIHHHH", 1024 + n, port, n, 0, 0x5002, 64240, 0, 0) for n in range(PORTS)]
    return [frame(6, source, to, body) for body in bodies]


def stopped() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def burn() -> int:
    while not stopped():
        for _ in range(20_000):
            pass
    return 0


def flood(ready: list[bytes]) -> int:
    sent = 0
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    wire.bind(("eth0", 0))
    while not stopped():
        start = sent % len(ready)
        for data in ready[start : start + BATCH]:
            wire.send(data)
        sent += BATCH
    return sent


def main() -> None:
    made: dict[str, list[bytes]] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] != "burn" and line not in made:
            made[line] = frames(order)
        print(json.dumps({"frames": len(made.get(line, ()))}), flush=True)
        began = time.monotonic()
        sent = burn() if order["do"] == "burn" else flood(made[line])
        sys.stdin.readline()
        print(json.dumps({"sent": sent, "seconds": time.monotonic() - began}), flush=True)


main()
