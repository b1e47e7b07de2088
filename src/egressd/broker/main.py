"""egressd-broker: the service. Starts the process that forks runners before anything else, since that one
must have no threads; then opens the store, and answers until it is told to end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import selectors
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from egressd import __version__
from egressd.broker.config import BrokerConfig, load
from egressd.ipc import journald
from egressd.ipc.readiness import notify
from egressd.model.errors import EgressdError, PolicyError, Refused
from egressd.model.verdicts import Reason

if TYPE_CHECKING:
    import socket

    from egressd.broker.runners.zygote import Runners
    from egressd.broker.service import Service
    from egressd.broker.web.listening import BrokerServer
    from egressd.broker.witness import Witness
    from egressd.sandbox.control import Fact

__all__ = ["main", "parser", "serve"]

log = logging.getLogger("broker")
DEFAULT_CONFIG = "/etc/egressd/broker.yaml"
_WATCHDOG = 5.0  # seconds between signs of life; the unit waits for three


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="egressd-broker",
        description="Answer requests for inferences: verify who asks, decide what they see, run, destroy.",
        epilog="See egressd-broker(8) and broker.yaml(5).",
        allow_abbrev=False,
    )
    found.add_argument("--config", metavar="FILE", default=DEFAULT_CONFIG, help="configuration (%(default)s)")
    found.add_argument(
        "--check", action="store_true", help="say what is wrong with the configuration, and end"
    )
    found.add_argument("--debug", action="store_true", help="log more")
    found.add_argument("--version", action="version", version=f"egressd-broker {__version__}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    level = logging.DEBUG if args.debug else logging.INFO
    if journald.heard():
        journald.configure("broker", long_lived=not args.check, level=level)
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(levelname)s: %(message)s")
    for chatty in ("uvicorn.error", "asyncio", "httpx", "httpcore", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        config = load(Path(args.config))
        if args.check:
            _check(config, args.config)
            return 0
        return serve(config, source=args.config)
    except PolicyError as error:
        for problem in error.problems:
            print(f"egressd-broker: {problem}", file=sys.stderr)
        return 1
    except EgressdError as error:
        print(f"egressd-broker: {error}", file=sys.stderr)
        return 1


def _check(config: BrokerConfig, source: str) -> None:
    """The files it names, too, where this account may read them."""
    from egressd.broker.web.listening import context  # noqa: PLC0415

    if config.tls is not None:
        context(config.tls, source=source)
    for issuer in config.issuers:
        for path in (issuer.jwks_file, issuer.ca_file, issuer.members_file, issuer.names_file):
            if path and not os.path.exists(path):  # noqa: PTH110 - a path that may not be looked at is told as well
                raise Refused(Reason.FILES, f"{source}: issuers.{issuer.name}: {path} is not there")
    told = (_many(len(config.workspaces), "workspace"), _many(len(config.issuers), "issuer"))
    print(f"{source} is sound: {', '.join(told)}")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def serve(config: BrokerConfig, *, source: str) -> int:
    """Until SIGTERM or SIGINT. The exit status."""
    from egressd.broker.runners.zygote import Runners  # noqa: PLC0415

    os.umask(0o077)
    with Runners.start(most=config.limits.at_once) as runners:
        return _serve(config, runners, source)


def _serve(config: BrokerConfig, runners: Runners, source: str) -> int:
    # What makes threads is imported when the process that forks has begun.
    from egressd.broker.identity.tokens import Verifier  # noqa: PLC0415
    from egressd.broker.runners.conversation import ForkedRunners  # noqa: PLC0415
    from egressd.broker.service import Service  # noqa: PLC0415
    from egressd.broker.store.administration import Administration  # noqa: PLC0415
    from egressd.broker.store.store import Store  # noqa: PLC0415
    from egressd.broker.web.app import App  # noqa: PLC0415
    from egressd.broker.web.listening import BrokerServer, context, listening  # noqa: PLC0415
    from egressd.broker.witness import Witness  # noqa: PLC0415

    tls = None if config.tls is None else context(config.tls, source=source)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(config.store, levels=config.levels))
        witness = Witness(config.run_dir)
        stack.callback(witness.close)
        _sweep(config, witness)
        bound = stack.enter_context(listening(config.listen))
        service = Service(
            config,
            verifier=Verifier(config.issuers),
            store=store,
            runners=ForkedRunners(runners),
            witness=witness,
        )
        names = frozenset(issuer.name for issuer in config.issuers)
        app = App(service, Administration(store, witness.record, issuers=names)).asgi()
        loop = stack.enter_context(asyncio.Runner(loop_factory=event_loop))
        loop.run(_answer(BrokerServer(app, tls=tls), service, bound, str(config.listen)))
    return 0


def event_loop() -> asyncio.AbstractEventLoop:
    """By poll(2), as runners do. What epolls watch is counted for the account as a whole (epoll(7),
    max_user_watches): one command that uses it up would have nobody else answered."""
    return asyncio.SelectorEventLoop(selectors.PollSelector())


def _sweep(config: BrokerConfig, witness: Witness) -> None:
    """What requests left on disk that were killed together with their machine. On record, if anything."""
    from egressd.vault.janitor import sweep  # noqa: PLC0415
    from egressd.vault.scratch import swap_warnings  # noqa: PLC0415

    if config.scratch == "private":
        for warning in swap_warnings():
            log.warning("%s", warning)
        return
    swept = sweep(config.scratch)
    for problem in swept.problems:
        log.error("a leftover: %s", problem)
    if swept.count or swept.problems:
        log.warning("%d leftovers removed from %s", swept.count, config.scratch)
        fields: dict[str, Fact] = {"count": swept.count, "where": config.scratch, "left": len(swept.problems)}
        for workspace in sorted(config.workspaces)[:1]:  # whose they were is not known
            try:
                witness.record(workspace, "leftovers-removed", fields)
            except EgressdError as error:
                log.warning("that leftovers were removed is not on record: %s", error)


async def _answer(server: BrokerServer, service: Service, bound: socket.socket, where: str) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    beating = asyncio.create_task(_beat(server, where))
    ending = asyncio.create_task(end.wait())
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    notify("STOPPING=1")
    beating.cancel()
    await service.close()  # runs first: whoever waits for one is answered while the server ends
    server.should_exit = True
    await serving
    service.dismiss()


async def _beat(server: BrokerServer, where: str) -> None:
    """READY=1 once it answers, and then signs of life for as long as the loop turns."""
    while not server.started:
        await asyncio.sleep(0.01)
    log.info("answering at %s", where)
    if "NOTIFY_SOCKET" not in os.environ:
        print("ready", flush=True)
    notify("READY=1")
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(_WATCHDOG)


if __name__ == "__main__":
    sys.exit(main())
