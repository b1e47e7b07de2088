"""Sends datagrams at a steady rate, or asks for a name. In a sandbox: standard library only, one file.

Reads one JSON order per line and answers each with one line:

    {"do": "ask", "name": n, "count": c}             milliseconds until each answer, a pause after each
    {"do": "storm", "to": [address, port], "ports": n, "rate": r}
        datagrams until the next line comes, whatever that says: {"sent", "seconds", "processor"};
        to n ports by turns, `port` and those that follow
"""

import json
import os
import select
import socket
import sys
import time

SERVER = ("169.254.53.53", 53)
PAUSE = 0.001  # seconds
MOST = 1000  # datagrams at once, should it have been kept from sending: a tenth of a second's


def ask(name: str, count: int) -> list[float]:
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    rest = bytes.fromhex("01000001000000000000") + labels + b"\0\0\1\0\1"
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(SERVER)
        sock.settimeout(5)
        for _ in range(count):
            question = os.urandom(2) + rest
            begun = time.monotonic()
            sock.send(question)
            data = sock.recv(4096)
            found.append((time.monotonic() - begun) * 1e3)
            if data[:2] != question[:2] or data[3] & 0xF or data[6:8] == b"\0\0":
                raise SystemExit(f"{name}: code {data[3] & 0xF}")
            time.sleep(PAUSE)
    return found


def storm(address: str, port: int, ports: int, rate: float) -> dict[str, float]:
    """Not connected: refusals that come back are nobody's."""
    sent = 0
    began, worked = time.monotonic(), time.process_time()
    missed = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            due = int((time.monotonic() - began) * rate) - sent - missed
            for _ in range(min(due, MOST)):
                try:
                    sock.sendto(b"x" * 64, (address, port + sent % ports))
                except OSError:  # a full queue of the link
                    missed += 1
                else:
                    sent += 1
            missed += max(0, due - MOST)
    sys.stdin.readline()
    seconds = time.monotonic() - began
    return {"sent": sent, "seconds": seconds, "processor": time.process_time() - worked}


def main() -> None:
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if order["do"] == "ask":
            answer: object = ask(order["name"], order["count"])
        else:
            answer = storm(*order["to"], order["ports"], order["rate"])
        print(json.dumps(answer), flush=True)


main()
