"""The measuring end: in a sandbox, or in the bare namespace. Standard library only, one file.

Reads one JSON order per line and answers each with one: {"do": "stream", "seconds": s} gives bytes per second
(of what the far end has really received), {"do": "connect", "count": n} connections per second; with a
"pause" after each, of so many seconds, one over the median of how long one takes. Started with the far end's
name or address; it is looked up once, so that no figure contains DNS.
"""

import json
import socket
import statistics
import struct
import sys
import time

SWALLOW, ACCEPT = 7001, 7002
BLOCK = memoryview(bytes(1 << 18))
RESET = struct.pack("ii", 1, 0)  # struct linger: close() resets, so that no port is held in TIME_WAIT


def stream(address: str, seconds: float) -> float:
    with socket.create_connection((address, SWALLOW), 5) as sock:
        sock.settimeout(None)
        began = time.monotonic()
        end = began + seconds
        sent = 0
        while time.monotonic() < end:
            sent += sock.send(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        received = int(sock.recv(64))
        taken = time.monotonic() - began
    if received != sent:
        raise RuntimeError(f"{sent} bytes sent, {received} received")
    return received / taken


def connect(address: str, count: int, pause: float) -> float:
    took = []
    for _ in range(count):
        began = time.monotonic()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.connect((address, ACCEPT))
        sock.close()
        took.append(time.monotonic() - began)
        if pause:
            time.sleep(pause)
    return 1 / statistics.median(took) if pause else count / sum(took)


def main(name: str) -> None:
    address = socket.gethostbyname(name)
    print(json.dumps({"address": address}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stream":
            answer = stream(address, order["seconds"])
        else:
            answer = connect(address, order["count"], order.get("pause", 0))
        print(json.dumps({"rate": answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
