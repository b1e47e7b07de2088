"""The lab's process 1: owns the namespaces, starts everything in them, takes all of it along when it ends.

Runs as `keeper.py DESCRIPTOR` inside fresh mount, network, pid and uts namespaces (see `machine.py`), with
the standard library only, because the time to import is the lab's time to start. The other end of DESCRIPTOR
is held by the test, the demo or the shell. When that end closes, for whatever reason, SIGKILL included, the
keeper exits, and the kernel ends the pid namespace: processes, links, mounts and namespaces go with it.

A request is one SEQPACKET datagram, `{"op": …}`, with descriptors beside it; so is its reply.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x4000_0000  # linux/sched.h
MS_BIND, MS_REC, MS_SHARED, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x10_0000, 0x2, 0x4  # linux/mount.h
PINS = Path("/run/netns")
MAX_MESSAGE = 1 << 17

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _setns(descriptor: int) -> None:
    _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")


def _mount(source: str, target: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [word.encode() or None for word in (source, target, kind, data)]
    _check(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount {target}")


class Keeper:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}  # pid -> descriptor that its exit status is written to
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._operations: dict[str, Callable[[dict[str, Any], list[int]], tuple[Any, list[int]]]] = {
            "prepare": self._prepare,
            "spawn": self._spawn,
            "signal": self._signal,
            "socket": self._socket,
            "namespace": self._namespace,
            "open": self._open,
            "processes": self._processes,
        }

    def serve(self) -> None:
        """Until the other end of the control socket closes."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([self._control.fileno(), reader], [], [])
            if reader in ready:
                os.read(reader, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._answer():
                return

    def _answer(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 16)
        if not data:
            return False
        request = json.loads(data)
        given: list[int] = []
        try:
            result, given = self._operations[request["op"]](request, descriptors)
            reply = {"result": result}
        except OSError as error:
            reply = {"error": str(error), "errno": error.errno}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))] if given else []
        try:
            self._control.sendmsg([json.dumps(reply).encode()], ancillary)
        except BrokenPipeError:
            return False
        finally:
            for descriptor in given:
                os.close(descriptor)
        return True

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            teller = self._children.pop(pid, None)
            if teller is not None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(teller, str(os.waitstatus_to_exitcode(status)).encode())
                os.close(teller)

    # ---- namespaces

    def _find(self, where: str) -> int:
        """A descriptor for a network namespace: a name under /run/netns, or a path."""
        path = where if where.startswith("/") else str(PINS / where)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def _inside(self, where: str) -> Iterator[None]:
        descriptor = self._find(where)
        try:
            _setns(descriptor)
            yield
        finally:
            _setns(self._home)
            os.close(descriptor)

    def _prepare(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        """Private /run and data directory; namespaces pinned; the host's resolver file."""
        resolver = Path("/etc/resolv.conf").resolve()
        _mount("lab-run", "/run", kind="tmpfs", flags=MS_NOSUID | MS_NODEV, data="mode=755")
        _mount("lab", request["data"], kind="tmpfs", flags=MS_NOSUID | MS_NODEV, data="mode=755")
        PINS.mkdir()
        _mount(str(PINS), str(PINS), flags=MS_BIND | MS_REC)
        _mount("", str(PINS), flags=MS_SHARED | MS_REC)  # what `ip netns` does, and expects
        self._pin(request["host"])
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        try:
            self._pin(request["net"])
        finally:
            _setns(self._home)
        self._name_server(resolver, request["resolver"])
        socket.sethostname(request["host"])
        for where, values in request["sysctls"].items():
            with self._inside(where):
                for name, value in values.items():
                    with contextlib.suppress(FileNotFoundError):  # older kernels lack some
                        Path("/proc/sys/net", name).write_text(value)
        return None, []

    @staticmethod
    def _pin(name: str) -> None:
        (PINS / name).touch(mode=0o444)
        _mount("/proc/self/ns/net", str(PINS / name), flags=MS_BIND)

    @staticmethod
    def _name_server(path: Path, text: str) -> None:
        """The lab-host's resolv.conf. Where the real one lies under /run it has just been hidden."""
        if path.is_relative_to("/run"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif path.exists():
            Path("/run/resolv.conf").write_text(text)
            _mount("/run/resolv.conf", str(path), flags=MS_BIND)

    def _namespace(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        return None, [self._find(request["where"])]

    def _socket(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        """A socket belongs for ever to the namespace it was made in: this one is made in `where`."""
        with self._inside(request["where"]):
            made = socket.socket(request["family"], request["type"], request["protocol"])
        return None, [made.detach()]

    def _open(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        return None, [os.open(request["path"], request["flags"] | os.O_CLOEXEC)]

    # ---- processes

    def _spawn(self, request: dict[str, Any], descriptors: list[int]) -> tuple[Any, list[int]]:
        """Descriptors: standard input, output, error, and where to write the exit status."""
        pid = os.fork()
        if pid == 0:
            try:
                self._become(request, descriptors)
            except BaseException as error:  # nothing may return into the keeper's own loop
                os.write(2, f"{request['argv'][0]}: {error}\n".encode())
            finally:
                os._exit(127)
        self._children[pid] = os.dup(descriptors[3])
        return pid, []

    def _become(self, request: dict[str, Any], descriptors: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        os.setpgid(0, 0)
        _setns(self._find(request["where"]))
        for wanted, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, wanted)
        os.closerange(3, 1 << 16)
        if request["foreground"]:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(0, os.getpid())
        for number in (signal.SIGCHLD, signal.SIGTTOU, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(request["cwd"])
        os.umask(0o022)
        if request["uid"] is not None:
            os.setgroups(request["groups"])
            os.setresgid(request["uid"], request["uid"], request["uid"])
            os.setresuid(request["uid"], request["uid"], request["uid"])
        os.execvpe(request["argv"][0], request["argv"], request["env"])

    def _signal(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        os.kill(request["pid"], request["signal"])
        return None, []

    def _processes(self, request: dict[str, Any], _: list[int]) -> tuple[Any, list[int]]:
        """[[pid, parent, network namespace, command line], …] of everything alive but the keeper.

        The namespace is 0 where the kernel does not tell: in a rootless lab, of a process that hides itself
        (PR_SET_DUMPABLE).
        """
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != "1":
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    after = (entry / "stat").read_text().rpartition(")")[2].split()
                    if after[0] != "Z":
                        network = 0
                        with contextlib.suppress(PermissionError):
                            network = (entry / "ns" / "net").stat().st_ino
                        words = (entry / "cmdline").read_bytes()[:2048].decode(errors="replace")
                        found.append(
                            [int(entry.name), int(after[1]), network, words.replace("\0", " ").strip()]
                        )
        first = request["skip"]  # a reply must fit a datagram
        return found[first : first + 50], []


def main() -> None:
    os.setpgid(0, 0)  # Ctrl-C at a terminal is for the lab's owner; the lab follows when it closes the socket
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    Keeper(control).serve()


if __name__ == "__main__":
    main()
