"""Plays systemd for one service: its notification socket, its descriptor store, and what comes with it.

    python3 service_manager.py SOCKET COMMAND ...

Starts the command, and again when told to on standard input: `stop` has it end as for a restart and waits,
until `swap A B` (exchanges the names of two descriptors), `spoil A` (puts another socket in A's place) or
nothing, and then `start`. `store` prints what is kept. SIGTERM ends both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys

STORE: dict[str, int] = {}
FIRST = 3  # SD_LISTEN_FDS_START


def serve(path: str, command: list[str]) -> int:
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 -- as all of this: no more imports than it needs
    notified.bind(path)
    pid = spawn(path, command)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([notified, 0, ended], [], [])
        if notified in ready:
            hear(notified)
        elif ended in ready:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif line := os.read(0, 4096).decode().split():
            if line == ["stop"]:
                os.kill(pid, signal.SIGUSR1)
                wait(notified, ended)
                os.waitpid(pid, 0)
                say("stopped")
                while (line := os.read(0, 4096).decode().split()) != ["start"]:
                    obey(*line)
                pid = spawn(path, command)
                ended = os.pidfd_open(pid)
            else:
                obey(*line)


def wait(notified: socket.socket, ended: int) -> None:
    while ended not in (ready := select.select([notified, ended], [], [])[0]):
        if notified in ready:
            hear(notified)


def obey(word: str, *names: str) -> None:
    if word == "swap":
        one, other = names
        STORE[one], STORE[other] = STORE[other], STORE[one]
    elif word == "spoil":
        os.close(STORE[names[0]])
        STORE[names[0]] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    say(json.dumps(sorted(STORE)))


def hear(notified: socket.socket) -> None:
    data, descriptors, _, _ = socket.recv_fds(notified, 4096, 16)
    said = dict(line.split("=", 1) for line in data.decode().splitlines())
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if "FDSTORE" in said:
        assert said["FDPOLL"] == "0" and said["FDNAME"] not in STORE
        (STORE[said["FDNAME"]],) = descriptors
        return
    if "FDSTOREREMOVE" in said and said["FDNAME"] in STORE:
        os.close(STORE.pop(said["FDNAME"]))
    for descriptor in descriptors:  # BARRIER
        os.close(descriptor)


def spawn(path: str, command: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in STORE.values()]
        for number, descriptor in enumerate(high):
            os.dup2(descriptor, FIRST + number)
        os.closerange(FIRST + len(high), 4096)
        told = {
            "LISTEN_FDS": str(len(STORE)),
            "LISTEN_FDNAMES": ":".join(STORE),
            "LISTEN_PID": str(os.getpid()),
        }
        os.execve(command[0], command, os.environ | {"NOTIFY_SOCKET": path} | (told if STORE else {}))
    return pid


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], sys.argv[2:]))
