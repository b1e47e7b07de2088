"""egressd: kernel-enforced egress allowlists for sandboxed inferences.

The public Python interface is :class:`egressd.Sandbox`; everything else is internal.
It is imported on first use, so that the daemon's processes do not load the caller's side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egressd.sandbox.launch import Sandbox as Sandbox

__all__ = ["Sandbox", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Sandbox":
        from egressd.sandbox.launch import Sandbox  # noqa: PLC0415

        return Sandbox
    raise AttributeError(f"module 'egressd' has no attribute {name!r}")
