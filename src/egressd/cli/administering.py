"""What the verbs that change the broker's store share: opening it, putting changes on record, saying no.

The store is opened here and not asked for over a socket: who administers the machine must be able to take a
role away while the broker does not run. What is changed is on record with egressd before it is made.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from egressd.cli.arguments import Parser
from egressd.cli.exits import OK, REFUSED
from egressd.cli.screen import complain, print_json
from egressd.model.errors import EgressdError, PolicyError
from egressd.model.verdicts import Reason

if TYPE_CHECKING:
    from egressd.broker.config import BrokerConfig
    from egressd.broker.store.administration import Administration, Operator
    from egressd.broker.store.store import Store

__all__ = ["DEFAULT_CONFIG", "Document", "add_options", "administer", "when"]

DEFAULT_CONFIG: Final = "/etc/egressd/broker.yaml"
DEFAULT_RUN_DIR: Final = "/run/egressd"  # as in main, which is loaded already or is not wanted
Document: TypeAlias = dict[str, Any]


def add_options(parser: Parser) -> None:
    """Of every verb here."""
    parser.add_argument("-w", "--workspace", metavar="WORKSPACE", required=True, help="of which workspace")
    parser.add_argument(
        "--broker-config", metavar="FILE", default=DEFAULT_CONFIG,
        help="the broker's configuration, which names its store (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--store", metavar="URL", help="another store: sqlite:////PATH or postgresql://HOST/DATABASE"
    )


def administer(
    args: argparse.Namespace,
    change: Callable[[Administration, Operator], Document],
    *,
    show: Callable[[Document], None],
    status: Callable[[Document], int] = lambda _: OK,
) -> int:
    """Make it, `show` what was done (or print it as JSON), and return `status` of it; 125 where it is
    refused, with the reason as `daemon.answer` tells it."""
    try:
        with _administration(args) as (administration, operator):
            document = change(administration, operator)
    except (EgressdError, OSError) as error:
        return _refused(args, error)
    if args.json:
        print_json(document)
    else:
        show(document)
    return status(document)


def _refused(args: argparse.Namespace, error: Exception) -> int:
    reason = getattr(error, "reason", Reason.UNKNOWN)
    problems = error.problems if isinstance(error, PolicyError) else ()
    if args.json:
        told: Document = {"reason": reason.value, "text": str(error)}
        if problems:
            told["problems"] = [
                {
                    "file": one.source,
                    "line": one.line,
                    "where": one.where,
                    "text": one.text,
                    "remedy": one.remedy,
                }
                for one in problems
            ]
        print_json({"error": told})
    for line in map(str, problems) if problems else (str(error),):
        complain(line)
    return REFUSED


@contextlib.contextmanager
def _administration(args: argparse.Namespace) -> Iterator[tuple[Administration, Operator]]:
    # SQLAlchemy is loaded by who needs it: not by `egressctl --help`, and not by `egressctl run`.
    from egressd.broker.store.administration import Administration, local_operator  # noqa: PLC0415
    from egressd.broker.store.store import Store  # noqa: PLC0415

    config = _config(args)
    run_dir = args.run_dir if args.run_dir != DEFAULT_RUN_DIR else config.run_dir
    with Store.open(args.store or config.store, levels=config.levels) as store:
        issuers = frozenset(issuer.name for issuer in config.issuers) or None
        record = _recorder(run_dir, store)
        yield Administration(store, record, issuers=issuers), local_operator(store)


def _config(args: argparse.Namespace) -> BrokerConfig:
    """With `--store` there need be none; where there is one, its levels and providers count all the same."""
    from egressd.broker.config import BrokerConfig, load  # noqa: PLC0415

    path = Path(args.broker_config)
    if args.store and args.broker_config == DEFAULT_CONFIG and not path.exists():
        return BrokerConfig()
    return load(path)


def _recorder(run_dir: str, store: Store) -> Callable[[str, str, Mapping[str, Any]], None]:
    """Through egressd, as the broker's account where root asks: the workspaces know that one."""
    from egressd.broker import witness  # noqa: PLC0415
    from egressd.broker.store.account import as_owner  # noqa: PLC0415

    def record(workspace: str, event: str, fields: Mapping[str, Any]) -> None:
        with as_owner(store):
            witness.record(run_dir, workspace, event, fields)

    return record


def when(at: float | None) -> str:
    """As a record spells times, to the second."""
    from datetime import UTC, datetime  # noqa: PLC0415

    if at is None:
        return "-"
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return "?"
