"""Streams that are to be cut, in a sandbox. Standard library only, one file.

Given host names; opens an echo stream to each, says "open", then talks on one after the other without pause:
"live NAME" when it begins, {"host", "error", "at"} when the stream failed, `at` in CLOCK_MONOTONIC seconds.
"""

import errno
import json
import socket
import sys
import time

ECHO = 7


def talk(sock: socket.socket) -> tuple[str, float]:
    try:
        while True:
            sock.send(b"x" * 64)
            if not sock.recv(4096):
                return "end of file", time.monotonic()
    except OSError as error:
        at = time.monotonic()
        return errno.errorcode.get(error.errno or 0, "timeout"), at


def main(names: list[str]) -> None:
    streams = [socket.create_connection((name, ECHO), 5) for name in names]
    print("open", flush=True)
    for name, sock in zip(names, streams, strict=True):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"live {name}", flush=True)
        error, at = talk(sock)
        print(json.dumps({"host": name, "error": error, "at": at}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
