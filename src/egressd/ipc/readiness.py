"""Telling systemd how things stand, where it has asked (sd_notify(3))."""

from __future__ import annotations

import os

__all__ = ["notify"]


def notify(state: str) -> None:
    """Nothing happens without systemd. To be called once before rights are given up: it imports then."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon  # noqa: PLC0415

        daemon.notify(state)
