"""`python -m lab shell [COMMAND…]`: the lab with egressd in it, for people. `python -m lab chaos COUNT`: that
many faults of it, under traffic (`chaos.py`)."""

from __future__ import annotations

import sys

from lab.machine import LabError


def main() -> int:
    match sys.argv[1:]:
        case ["shell", *words]:
            from lab import shell

            return shell.main(words)
        case ["chaos", count] if count.isdecimal():
            from lab import chaos

            return chaos.main(int(count))
        case _:
            print("usage: python -m lab shell [COMMAND…] | python -m lab chaos COUNT", file=sys.stderr)
            return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
