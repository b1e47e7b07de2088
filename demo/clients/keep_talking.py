"""Asks one host again and again over one connection, until that breaks, or somebody says: enough."""

import http.client
import signal
import sys
import time

host = http.client.HTTPSConnection(sys.argv[1], timeout=5)
host.connect()
answers = 0


def enough(*_: object) -> None:
    print(f"{answers} answers over one connection, and none was missing", flush=True)
    sys.exit()


signal.signal(signal.SIGTERM, enough)
print(f"connected to {sys.argv[1]}", flush=True)
try:
    while True:
        host.sock.sendall(f"GET / HTTP/1.1\r\nHost: {sys.argv[1]}\r\n\r\n".encode())
        if not host.sock.recv(65536):
            raise ConnectionAbortedError("closed")
        answers += 1
        time.sleep(0.02)
except TimeoutError:
    print(f"{answers} answers, then none", flush=True)
except OSError:
    print(f"{answers} answers, then the connection broke", flush=True)
