"""systemd-journald as a peer: one of our own, beside the machine's, which sees and hears nothing of it.

It runs in a mount namespace with an empty /run, a machine id made up for it, and a directory of a disk as
/var/log/journal; in a network namespace, because the length of a datagram socket's queue is set per network
namespace (net.unix.max_dgram_qlen: 10, where systemd as init makes it 512), and because journald would listen
to the kernel's audit messages in the first one. It is told records over its native protocol
(systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram per record, the sender waiting while the queue is full.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.machine import poll

__all__ = ["IDENTIFIER", "PROGRAM", "Journald", "installed", "started"]

PROGRAM = Path("/lib/systemd/systemd-journald")
IDENTIFIER = "egressd-bench"
_MACHINE = "e6e55d0000000000000000000000be9c"
_RUN = "run/systemd/journal"

# Nothing is limited, forwarded or taken from elsewhere. Audit= (empty): leave the kernel's switch as it is.
# Entries of this size are not compressed (Compress=yes begins at 512 bytes).
_CONFIGURATION = """\
[Journal]
Storage=persistent
Compress=yes
Seal=yes
SyncIntervalSec=1s
RateLimitIntervalSec=0
SystemMaxUse=16G
SystemKeepFree=1M
ReadKMsg=no
Audit=
ForwardToSyslog=no
ForwardToWall=no
ForwardToConsole=no
"""

# In the namespaces, as root. `flushed` says that /var/log/journal may be written.
_SCRIPT = """\
set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d /run/log
cp "$0/configuration" /run/systemd/journald.conf.d/bench.conf
[ -d /var/log/journal ] || { mount -t tmpfs none /var/log; mkdir /var/log/journal; }
mount --bind "$0/log" /var/log/journal
mount --bind "$0/machine-id" /etc/machine-id
touch /run/systemd/journal/flushed
sysctl -qw net.unix.max_dgram_qlen=512
if [ "$1" = sealed ]; then journalctl --setup-keys --interval=1s >/dev/null 2>&1; fi
exec "$2"
"""


def installed() -> bool:
    return PROGRAM.exists() and Path("/etc/machine-id").exists()


@dataclass(frozen=True)
class Journald:
    process: subprocess.Popen[bytes]
    log: Path
    sock: socket.socket

    @property
    def pid(self) -> int:
        return self.process.pid

    @staticmethod
    def datagram(line: bytes) -> bytes:
        return b"MESSAGE=%b\nPRIORITY=6\nSYSLOG_IDENTIFIER=%b\n" % (line, IDENTIFIER.encode())

    def write(self, datagrams: Sequence[bytes]) -> None:
        """Returns when all of them are written and synced (SIGRTMIN+1, systemd-journald(8))."""
        for datagram in datagrams:
            self.sock.send(datagram)
        asked = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.process.send_signal(signal.SIGRTMIN + 1)
        while self._synced() < asked:
            if self.process.poll() is not None:
                raise RuntimeError("systemd-journald ended")
            time.sleep(0.001)

    def _synced(self) -> int:
        """Microseconds of CLOCK_MONOTONIC when it last had synced because of a signal; 0: never."""
        try:
            return int(Path(f"/proc/{self.pid}/root/{_RUN}/synced").read_text() or 0)
        except FileNotFoundError:
            return 0

    def entries(self) -> int:
        """How many of ours are in its files, as journalctl reads them."""
        words = ["journalctl", "-D", str(self.log / _MACHINE), "-o", "cat", f"SYSLOG_IDENTIFIER={IDENTIFIER}"]
        with subprocess.Popen([*words, "-q"], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            return sum(block.count(b"\n") for block in iter(lambda: reader.stdout.read(1 << 20), b""))

    def octets(self) -> int:
        """Bytes of its files up to their last objects: on disk they grow in steps of 8 MiB."""
        return sum(_tail(path) for path in self.log.rglob("*.journal"))


def _tail(path: Path) -> int:
    """tail_object_offset of the file's header (systemd.io/JOURNAL_FILE_FORMAT)."""
    with path.open("rb") as file:
        file.seek(136)
        return int.from_bytes(file.read(8), "little")


@contextlib.contextmanager
def started(*, sealed: bool = False) -> Iterator[Journald]:
    """`sealed`: with a key for forward secure sealing (journalctl(1), --setup-keys), made for it."""
    with tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "log" / _MACHINE).mkdir(parents=True)
        (directory / "configuration").write_text(_CONFIGURATION)
        (directory / "machine-id").write_text(_MACHINE + "\n")
        words = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _SCRIPT]
        process = subprocess.Popen([*words, name, "sealed" if sealed else "plain", str(PROGRAM)])
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                poll(lambda: _connected(process, sock), timeout=30, what="systemd-journald listens")
                if sealed and not list(directory.glob("log/*/fss")):
                    raise RuntimeError("no sealing key was made")
                yield Journald(process, directory / "log", sock)
        finally:
            process.terminate()
            process.wait(timeout=10)


def _connected(process: subprocess.Popen[bytes], sock: socket.socket) -> bool:
    """A socket of its mount namespace, by way of its root directory."""
    if process.poll() is not None:
        raise RuntimeError(f"systemd-journald did not start: {process.returncode}")
    root = Path(f"/proc/{process.pid}/root")
    if (root / "run").samefile("/run"):
        return False  # that would be the machine's
    try:
        sock.connect(str(root / _RUN / "socket"))
    except OSError:
        return False
    return True
