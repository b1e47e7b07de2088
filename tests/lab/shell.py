"""`make lab`: a shell in lab-host, with egressd enforcing the example policy, to try things by hand."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from lab.daemon import Daemon
from lab.internet import start_internet
from lab.machine import USER, Lab

__all__ = ["main"]

_BANNER = """
You are root of lab-host, a machine of its own in network namespaces, with a little internet behind its
uplink `up0`. Nothing here touches the real network; all of it is gone when you leave (exit).

  policy      {policy}
  config      {config}
  CA          {ca}

  box CMD…                      run CMD in a sandbox of `acme`, as an unprivileged user
  box curl https://eu.api.openai.test/           allowed
  box curl http://localhost:11434/               allowed: the host's Ollama, as `local: ollama`
  box curl https://anything.search.test/         allowed by a wildcard; three such names per sandbox
  box curl https://evil.test/                    not on the list
  box curl --connect-to ::eu.api.openai.test: https://api.openai.test/     the same server, another name
  box curl http://11.22.33.66/                   a raw address
  box dig @10.9.9.9 evil.test                    another resolver
  box curl http://169.254.169.254/               cloud metadata
  egressctl counters acme       what was let through, what was denied, and that it adds up
  egressctl why -w acme evil.test
  egressctl residency acme EU   pin it, and then: egressctl status, why, policy lint
  ip netns exec egressd nft list ruleset         the kernel's own word
  tcpdump -ni up0               the uplink   (lab-net is the other end: ip netns exec lab-net …)
"""

_BOX = """\
box() {{ {drop} egressctl --run-dir {run_dir} run -w acme --files {files} \
--env CURL_CA_BUNDLE=/work/ca.pem -- "$@"; }}
"""


def main(arguments: list[str]) -> int:
    """`shell` with no further words is interactive; with words, they are run in the lab instead."""
    with Lab() as lab:
        start_internet(lab)
        with Daemon(lab) as daemon:
            if arguments:
                return _foreground(lab, arguments)
            return _foreground(lab, ["bash", "--rcfile", _rc_file(lab, daemon), "-i"])


def _rc_file(lab: Lab, daemon: Daemon) -> str:
    files = lab.path("files")
    files.mkdir()
    (files / "ca.pem").write_bytes(lab.path("ca.pem").read_bytes())
    banner = _BANNER.format(
        policy=lab.inside(f"{daemon.directory}/workspaces/acme.yaml"),
        config=daemon.config_file,
        ca=lab.inside("ca.pem"),
    )
    drop = "" if lab.single_user else f"setpriv --reuid {USER} --regid {USER} --clear-groups"
    rc = [
        "PS1='lab-host# '",
        "export CURL_CA_BUNDLE=" + lab.inside("ca.pem"),
        _BOX.format(drop=drop, run_dir=daemon.run_dir, files=lab.inside("files")),
        f"cat <<'END'\n{banner}\nEND",
    ]
    lab.path("bashrc").write_text("\n".join(rc))
    return lab.inside("bashrc")


def _foreground(lab: Lab, argv: list[str]) -> int:
    """Run with our own terminal. The terminal's foreground is given away and taken back."""
    interactive = os.isatty(0)
    process = lab.start(argv, pipes=False, foreground=interactive)
    with _terminal_back() if interactive else contextlib.nullcontext():
        while process.status() is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait(None)
    return process.wait()


@contextlib.contextmanager
def _terminal_back() -> Iterator[None]:
    group = os.getpgrp()
    try:
        yield
    finally:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # tcsetpgrp(3) from the background stops us otherwise
        os.tcsetpgrp(0, group)
