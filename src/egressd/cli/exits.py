"""Exit statuses, the same for every verb; egressctl(1) documents them."""

from __future__ import annotations

from typing import Final

__all__ = ["BROKEN_PIPE", "FOUND", "INTERRUPTED", "OK", "REFUSED", "USAGE"]

OK: Final = 0
FOUND: Final = 1  # problems were found, the books do not balance, or no provider complies
USAGE: Final = 2  # argparse's own
REFUSED: Final = 125  # egressd refused, or cannot be reached; what env(1) uses for itself
INTERRUPTED: Final = 130  # 128 + SIGINT: what a shell would say
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE
