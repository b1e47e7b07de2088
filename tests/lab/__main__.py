"""`python -m lab shell [COMMAND…]`: the lab with egressd in it, for people."""

from __future__ import annotations

import sys

from lab.machine import LabError


def main() -> int:
    match sys.argv[1:]:
        case ["shell", *words]:
            from lab import shell

            return shell.main(words)
        case _:
            print("usage: python -m lab shell [COMMAND…]", file=sys.stderr)
            return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
