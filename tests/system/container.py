"""A Debian 12 with systemd as its process 1, in systemd-nspawn, in a lab: `tests/system` installs egressd
there.

    make_tree()
    with Lab() as lab, Container(lab) as debian:
        debian.boot()
        debian.run(["systemctl", "is-active", "egressd"])
        debian.reboot()

It lives in the lab's namespaces, its network is lab-host, its files are an overlay in the lab's memory:
with the lab all of it is gone. What is not the lab's are two control groups, and they are removed as well.

What a machine must have: debootstrap, systemd-nspawn, and control groups of either version, mounted. No
systemd need run there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from lab import topology
from lab.machine import PROJECT, Lab, LabError, Process, Result, poll

__all__ = ["TREE", "Container", "make_tree"]

TREE = PROJECT / ".lab" / "system" / "bookworm"
_MIRROR = "http://deb.debian.org/debian"
# A machine that somebody would run egressd on, and what the package depends on, so that nothing is fetched
# later.
_PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "libpam-systemd", "kmod", "procps", "ca-certificates", "curl"),
    *("bubblewrap", "iproute2", "libseccomp2", "nftables", "python3", "python3-nftables", "python3-systemd"),
)
# systemd-sysctl would write to the /proc/sys of the whole machine, whose kernel this is, if it could.
_MASKED = ("systemd-sysctl.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount")
# The kernel refuses a new /proc in a user namespace, which every sandbox needs, unless one is to be seen of
# which nothing is covered (mount_too_revealing in fs/namespace.c). What systemd-nspawn covers stays covered:
# /proc/sys but for net is the whole machine's. So the other one stands where nobody looks. Only the machine's
# word for its boot is uncovered: units with a /proc of their own (MountAPIVFS= in systemd.exec(5), which
# ProtectControlGroups= implies) would read another one.
_SECOND_PROC = "/run/second-proc"
_SECOND_PROC_UNIT = f"""\
[Unit]
Description=A /proc of which nothing is covered
DefaultDependencies=no
Before=sysinit.target systemd-journald.service

[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=null
StandardError=null
ExecStart=/bin/mkdir -p -m 700 {_SECOND_PROC}
ExecStart=/bin/mount -t proc proc {_SECOND_PROC}/proc --mkdir
ExecStart=/bin/sh -c 'while umount -l /proc/sys/kernel/random/boot_id; do :; done; true'
"""
_BOOT_WITHIN, _OFF_WITHIN = 90.0, 90.0  # seconds
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GROUPS = Path("/sys/fs/cgroup")


def make_tree(tree: Path = TREE) -> Path:
    """The root file system that containers begin with, from Debian's mirror; kept for the next time."""
    made_of = "\n".join(_PACKAGES)
    stamp = tree.with_suffix(".packages")
    if tree.is_dir() and stamp.exists() and stamp.read_text() == made_of:
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    new = tree.with_suffix(".new")
    for stale in (new, tree):
        shutil.rmtree(stale, ignore_errors=True)
    # In namespaces of its own: what it mounts and starts is gone with it, however it ends.
    subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "nice", "-n", "10",
         "debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}",
         "bookworm", str(new), _MIRROR],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for package in Path(new, "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    new.rename(tree)
    stamp.write_text(made_of)
    return tree


class Container:
    """Files stay over a reboot; what is in memory, and the network, begins anew, as on a machine."""

    def __init__(
        self, lab: Lab, *, name: str = "debian", tree: Path = TREE, network: str = topology.HOST
    ) -> None:
        self.lab, self.name, self.network = lab, name, network
        self._groups = [
            hierarchy / f"egressd-{name}-{os.getpid()}"
            for hierarchy in (_GROUPS, _GROUPS / "unified", _GROUPS / "systemd")
            if Path(hierarchy, "cgroup.procs").exists()
        ]
        self._process: Process | None = None
        self._leader = 0
        self._mount(tree)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, whatever it does; nothing of it stays."""
        if self._process is not None:
            self.pull_the_plug()
        self.lab.run(["umount", "--recursive", "--lazy", self.root])

    # ---- files

    def _mount(self, tree: Path) -> None:
        for name in ("over", "work", "root"):
            self.lab.path(f"{self.name}/{name}").mkdir(parents=True)
        self.root = self.lab.inside(f"{self.name}/root")
        over, work = (self.lab.inside(f"{self.name}/{name}") for name in ("over", "work"))
        options = f"lowerdir={tree},upperdir={over},workdir={work}"
        self.lab.run(["mount", "-t", "overlay", "overlay", "-o", options, self.root]).check()
        units = "etc/systemd/system"
        self.write(f"{units}/second-proc.service", _SECOND_PROC_UNIT)
        self.link(f"{units}/sysinit.target.wants/second-proc.service", "../second-proc.service")
        for masked in _MASKED:
            self.link(f"{units}/{masked}", "/dev/null")
        self.write("etc/resolv.conf", f"nameserver {topology.DNS4}\n")
        self.write("etc/hostname", f"{self.name}\n")
        self.write("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")

    def path(self, name: str) -> Path:
        """A file of the container, from out here."""
        return self.lab.path(f"{self.name}/root/{name}")

    def write(self, name: str, data: str | bytes, *, mode: int = 0o644) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        path.chmod(mode)

    def link(self, name: str, target: str) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    # ---- life

    def boot(self) -> str:
        """Start it, and wait until systemd says how that went: "running", or "degraded"."""
        nspawn = [
            "systemd-nspawn", f"--directory={self.root}", "--boot", f"--machine={self.name}",
            # No service manager out here to register with, and none to make a scope.
            "--register=no", "--keep-unit",
            f"--network-namespace-path=/run/netns/{self.network}", "--capability=CAP_NET_ADMIN",
            "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
        ]  # fmt: skip
        enter = "".join(f"mkdir -p {group}; echo $$ > {group}/cgroup.procs; " for group in self._groups)
        env = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
        self._process = self.lab.start(["sh", "-c", f'{enter}exec "$@"', "sh", *nspawn], env=env)
        self._leader = poll(self._find_leader, timeout=_BOOT_WITHIN, what="process 1 of the container")
        return str(poll(self._booted, timeout=_BOOT_WITHIN, what="the end of booting"))

    def _find_leader(self) -> int:
        assert self._process is not None
        if self._process.status() is not None:
            raise LabError(f"systemd-nspawn ended: {self._process.out}{self._process.err}")
        below = self.lab.descendants(self._process.pid)
        return next((child.pid for child in below if "/systemd " in f"{child.command} ".split("--")[0]), 0)

    def _booted(self) -> str:
        assert self._process is not None
        if self._process.status() is not None:
            raise LabError(f"it ended while it booted: {self._process.out}{self._process.err}")
        told = self.run(["systemctl", "is-system-running"]).out.strip()
        return told if told in ("running", "degraded") else ""

    @property
    def running(self) -> bool:
        return self._leader != 0

    def power_off(self) -> None:
        """As its administrator would, and what a machine's end takes along is gone."""
        assert self._process is not None
        self.run(["systemctl", "--no-block", "poweroff"])
        self._process.wait(_OFF_WITHIN)
        self._gone()

    def pull_the_plug(self) -> None:
        """Everything in it ends with its process 1, at once, and systemd-nspawn for want of it."""
        assert self._process is not None
        if self._leader:
            self.lab.signal(self._leader, signal.SIGKILL)
        else:
            self._process.signal(signal.SIGTERM)
        self._process.wait(_OFF_WITHIN)
        self._gone()

    def reboot(self) -> str:
        self.power_off()
        return self.boot()

    def _gone(self) -> None:
        self._process, self._leader = None, 0
        for argv in (
            ["nft", "flush", "ruleset"],
            ["ip", "route", "flush", "type", "unreachable"],
            ["ip", "-6", "route", "flush", "type", "unreachable"],
            ["sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"],
        ):
            self.lab.run(argv, where=self.network)
        for group in self._groups:
            poll(lambda group=group: _removed(group), timeout=10.0, what=f"{group} is empty")  # type: ignore[misc]

    # ---- in it

    def command(self, argv: Sequence[str], *, user: str | None = None) -> list[str]:
        """What runs `argv` in the container, said out in the lab."""
        become = [] if user is None else ["runuser", "-u", user, "--"]
        home = "/root" if user is None else "/tmp"
        clean = ["env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", f"HOME={home}"]
        spaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"]
        return ["nsenter", "--target", str(self._leader), *spaces, "--", *become, *clean, *argv]

    def run(
        self, argv: Sequence[str], *, user: str | None = None, stdin: str = "", timeout: float = 60.0
    ) -> Result:
        return self.lab.run(self.command(argv, user=user), stdin=stdin, timeout=timeout)

    def start(self, argv: Sequence[str], *, user: str | None = None) -> Process:
        return self.lab.start(self.command(argv, user=user))

    def shell(self, script: str, *, user: str | None = None, timeout: float = 60.0) -> str:
        """Its standard output; LabError if it fails."""
        return self.run(["bash", "-euo", "pipefail", "-c", script], user=user, timeout=timeout).check().out

    def property(self, unit: str, name: str) -> str:
        return self.shell(f"systemctl show --value -p {name} {unit}").strip()

    def journal(self, *matches: str) -> str:
        """What the log says, as `journalctl -o json` prints it, of this boot."""
        return self.run(["journalctl", "-b", "--no-pager", "-o", "json", *matches]).out


def _removed(group: Path) -> bool:
    """The control group and all below, if nobody is in there any more."""
    if not group.exists():
        return True
    below: Mapping[Path, None] = dict.fromkeys(path.parent for path in group.rglob("cgroup.procs"))
    for one in sorted(below, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            one.rmdir()
    return not group.exists()
