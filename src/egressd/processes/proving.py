"""Running the prover: a worker beside the auditor that reads the journal and writes a statement.

It holds no key and no socket: facts of the controller go in, the statement comes out, both by pipe. The
auditor signs what came out, so that a prover that reads strangers' records and goes wrong can state nonsense
about the journal, which `verify` finds, and nothing else.

Bounded: in time, in output, in number. Who asks beyond that is told so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from egressd.ipc.messages import MakeProof
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

__all__ = ["ATTESTATION", "Prover"]

ATTESTATION = "attestation.sev-snp"  # in the state directory, put there by whoever asked the hardware for it

_SECONDS, _MOST, _AT_ONCE = 60.0, 256 << 20, 2
_CHUNK, _SAID = 1 << 18, 4096
_NICE = 10  # the auditor itself, which must keep up with the kernel, goes first
# What the worker is told of the world. It must find nothing in it.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}


class _TooLarge(Exception):
    """It wrote more than a statement may have."""


@dataclass(slots=True)
class Prover:
    """`command` is the worker without its arguments."""

    directory: Path
    command: Sequence[str] = (sys.executable, "-I", "-m", "egressd.processes.prover")
    seconds: float = _SECONDS
    most: int = _MOST
    at_once: int = _AT_ONCE
    _running: int = field(default=0, init=False)

    @contextlib.contextmanager
    def place(self):  # type: ignore[no-untyped-def]
        """To be held from the question to the answer, so that waiting ones take no memory either. Refused if
        there is none."""
        if self._running >= self.at_once:
            raise Refused(Reason.LIMIT, f"busy: {self._running} proofs are being made; try again in a moment")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def statement(self, asked: MakeProof, facts: bytes, *, size: int) -> bytes:
        """The statement as the worker wrote it, of the journal's first `size` records. Refused, with what the
        worker said, if there is none."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *self._arguments(asked, size),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
            async with asyncio.timeout(self.seconds):
                return await self._converse(process, facts)
        except TimeoutError:
            raise Refused(Reason.UNAVAILABLE, f"the proof was not ready within {self.seconds:g} s") from None
        except _TooLarge:
            text = f"the proof is larger than {self.most >> 20} MiB; ask for less at a time (--since)"
            raise Refused(Reason.LIMIT, text) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def _arguments(self, asked: MakeProof, size: int) -> list[str]:
        arguments = ["--journal", str(self.directory), "--workspace", asked.workspace, "--size", str(size)]
        options = {
            "link": asked.link,
            "since": asked.since,
            "until": asked.until,
            "continues": asked.continues,
            "attestation": self.directory.parent / ATTESTATION,
        }
        for name, value in options.items():
            if value is not None:
                arguments.append(f"--{name}={value}")  # one word: a value that begins with "-" is a value
        return arguments

    async def _converse(self, process: asyncio.subprocess.Process, facts: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        saying = asyncio.ensure_future(_last_words(process.stderr))
        giving = asyncio.ensure_future(_give(process.stdin, facts))
        try:
            statement = await _collect(process.stdout, self.most)
            await giving
            said, status = await saying, await process.wait()
        finally:
            saying.cancel()
            giving.cancel()
        if status != 0 or not statement:
            raise Refused(Reason.UNAVAILABLE, f"no proof could be made: {said or f'exit status {status}'}")
        return statement


async def _give(stream: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it did not want them; its status tells
        stream.write(data)
        await stream.drain()
    stream.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # 3.11.2 keeps it for whoever asks
        await stream.wait_closed()


async def _collect(stream: asyncio.StreamReader, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while data := await stream.read(_CHUNK):
        size += len(data)
        if size > most:
            raise _TooLarge
        parts.append(data)
    return b"".join(parts)


async def _last_words(stream: asyncio.StreamReader) -> str:
    """The end of what it said, as one line of printable characters."""
    kept = b""
    while data := await stream.read(_CHUNK):
        kept = (kept + data)[-_SAID:]
    text = kept.decode("utf-8", "replace").strip().splitlines()
    return "".join(c if c.isprintable() else "?" for c in (text[-1] if text else ""))[:512]
