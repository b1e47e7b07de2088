"""`egressctl residency tables`: which tables of prefixes there are; and where they are kept."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from egressd.cli.daemon import Document
from egressd.cli.exits import FOUND, OK
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.text import Paint, escape, shorten, table
from egressd.model.errors import EgressdError
from egressd.processes.config import Config
from egressd.processes.registry_files import read_registry
from egressd.residency.prefixes import STALE_DAYS, Table
from egressd.residency.registry import Registry

__all__ = ["Where", "render", "run", "where"]


@dataclass(frozen=True, slots=True)
class Where:
    """Which directory is meant, and which the running egressd reads; None if none runs. `silent`: why one
    that runs does not say."""

    directory: Path
    running: Path | None
    silent: str
    run_dir: str


def where(args: argparse.Namespace) -> Where:
    running, silent = _asked(args.run_dir)
    directory = Path(args.residency_dir) if args.residency_dir else running or Path(Config().residency_dir)
    return Where(directory.absolute(), running, silent, args.run_dir)


def _asked(run_dir: str) -> tuple[Path | None, str]:
    from egressd.sandbox.control import Control, NotRunning  # noqa: PLC0415

    try:
        with Control(run_dir) as control:
            told = control.ask("status").get("residency_dir")
    except NotRunning:
        return None, ""
    except (EgressdError, OSError, ValueError) as error:
        return None, str(error)
    return (Path(str(told)), "") if told else (None, "it does not say which directory it reads")


def run(args: argparse.Namespace) -> int:
    place = where(args)
    registry = read_registry(place.directory)
    document = _document(registry, place.directory, today=datetime.now(UTC).date())
    if registry.broken:
        complain(registry.broken)
    if args.json:
        print_json(document)
    else:
        print(render(document, paint=paint()))
    return FOUND if registry.broken or any(one["stale"] for one in document["tables"]) else OK


def _document(registry: Registry, directory: Path, *, today: date) -> Document:
    stale = {name.name for name in registry.prefixes.stale(today)}
    return {
        "directory": str(directory),
        "registry": registry.digest,
        "broken": registry.broken,
        "catalogue": list(registry.own),
        "tables": [_table(one, one.name in stale, today) for one in registry.prefixes.tables],
    }


def _table(one: Table, stale: bool, today: date) -> dict[str, Any]:
    return {
        "name": one.name,
        "provider": one.provider,
        "format": one.format,
        "prefixes": len({prefix for group in one.groups for prefix in group.prefixes}),
        "published": None if one.published is None else one.published.isoformat(),
        "imported": one.imported.isoformat(),
        "days": (today - one.age_from).days,
        "stale": stale,
        "serial": one.serial,
        "file": one.source.name,
        "digest": one.source.digest,
        "checked": one.source.checked,
    }


def render(document: Document, *, paint: Paint) -> str:
    own = ", ".join(escape(shorten(each, 60)) for each in document["catalogue"])
    return _tables(document, paint) + (f"\ncatalogue, by files of your own: {own}" if own else "")


def _tables(document: Document, paint: Paint) -> str:
    if not document["tables"]:
        where = escape(document["directory"])
        if document["broken"]:
            return f"no tables of {where} are used; all that is pinned is refused until that file is right"
        return f"no tables in {where}: no address can be placed (egressctl residency import FILE)"
    rows = [
        [
            escape(one["name"]),
            escape(one["provider"]),
            str(one["prefixes"]),
            one["published"] or "-",
            one["imported"],
            f"{one['days']} d" + (" STALE" if one["stale"] else ""),
            escape(one["checked"] or "-"),
            shorten(one["digest"], 19),
        ]
        for one in document["tables"]
    ]
    head = ["table", "provider", "prefixes", "published", "imported", "age", "checked", "file's digest"]
    shown = table(head, rows, right="prefixes", columns=paint.columns)
    if any(one["stale"] for one in document["tables"]):
        shown += f"\n{paint.bad('STALE')}: older than {STALE_DAYS} days; import the publisher's list again"
    return shown
