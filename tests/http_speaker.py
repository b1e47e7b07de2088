"""Speaks to a process's HTTP socket byte by byte, so that what it says need not be HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["Speaker"]


class Speaker:
    """`address`: a path, or what a socket calls its own."""

    patience = 15.0  # seconds until an answer is whole

    def __init__(self, address: Any) -> None:
        self.address = address

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.address, str):
            return await asyncio.open_unix_connection(self.address)
        return await asyncio.open_connection(*self.address[:2])

    async def say(self, data: bytes) -> bytes:
        reader, writer = await self.connect()
        try:
            writer.write(data)
            return await asyncio.wait_for(reader.read(), self.patience)
        finally:
            writer.close()
