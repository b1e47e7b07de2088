"""`python -m fuzz [--seconds N] [TARGET...]`: libFuzzer by way of atheris, guided by coverage.

Each target has a process of its own and begins with its corpus; inputs that reach something new are kept
there, as many as there is room for, the short ones first. Needs atheris, which `make fuzz` installs into an
environment of its own. Exit status 1 if something was found; the input that did it is kept in the corpus,
where the ordinary tests meet it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz import corpora

_MEMORY = 2048  # MiB


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options, more = parser.parse_known_args()
    if options.child:
        return _child(options.child, [*more, *options.targets])
    from fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    found = [name for name in names if not _fuzz(name, options.seconds)]
    print(f"{len(names)} targets, {len(found)} with findings{': ' if found else ''}{', '.join(found)}")
    return 1 if found else 0


def _fuzz(name: str, seconds: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="egressd-fuzz-") as directory:
        kept, crash = Path(directory, "kept"), Path(directory, "crash")
        kept.mkdir()
        crash.mkdir()
        _unpack(name, kept)
        run = subprocess.run(
            [
                sys.executable, "-m", "fuzz", "--child", name, f"-max_total_time={seconds}", "-timeout=10",
                f"-max_len={corpora.SIZE}", f"-rss_limit_mb={_MEMORY}",
                f"-artifact_prefix={crash}/", str(kept),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        before = corpora.load(name)
        count = corpora.save(name, _bytes_in(kept), always=_bytes_in(crash))
        executions = next((line.split()[1] for line in run.stderr.splitlines() if "Done" in line), "?")
        good = run.returncode == 0 and not any(crash.iterdir())
        print(
            f"{name:18} {executions:>9} inputs, corpus {len(before)} -> {count}{'' if good else '  FOUND'}",
            flush=True,
        )
        if not good:
            print(run.stderr[-4000:])
        return good


def _bytes_in(place: Path) -> list[bytes]:
    return [path.read_bytes() for path in place.iterdir()]


def _unpack(name: str, place: Path) -> None:
    for data in corpora.load(name):
        (place / hashlib.sha256(data).hexdigest()[:20]).write_bytes(data)


def _child(name: str, arguments: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["egressd"]):
        from fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
