"""Asks for names that nobody asked for before. In a sandbox: standard library only, one file.

    python3 -I -c TEXT DOMAIN COUNT

Prints {"first": [...], "again": [...]}: the milliseconds until the answer about each fresh name below the
domain, and until the answer to the same question again. One question is one datagram, without getaddrinfo().
"""

import json
import os
import socket
import sys
import time

SERVER = ("169.254.53.53", 53)


def question(name: str) -> bytes:
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    return os.urandom(2) + bytes.fromhex("01000001000000000000") + labels + b"\0\0\1\0\1"


def answered(sock: socket.socket, name: str) -> float:
    begun = time.monotonic()
    sock.send(question(name))
    data = sock.recv(4096)
    spent = (time.monotonic() - begun) * 1e3
    if data[3] & 0xF or data[6:8] == b"\0\0":
        raise SystemExit(f"{name}: code {data[3] & 0xF}, {data[7]} records")
    return spent


def main(domain: str, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(SERVER)
        sock.settimeout(6)
        found: dict[str, list[float]] = {"first": [], "again": []}
        for number in range(count):
            name = f"name-{number}-{os.getpid()}.{domain}"
            found["first"].append(answered(sock, name))
            found["again"].append(answered(sock, name))
        print(json.dumps(found))


main(sys.argv[1], int(sys.argv[2]))
