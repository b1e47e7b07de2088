"""`egressctl residency`: import lists of prefixes, show them, look up where something is; pin a workspace.

The first word says which: one of `ACTIONS`, and anything else is the name of a workspace.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from egressd.cli.arguments import Parser, Subparsers, verb_parser

__all__ = ["ACTIONS", "add", "run"]

# action -> (module of egressd.cli, its function)
ACTIONS: Final[dict[str, tuple[str, str]]] = {
    "import": ("residency_import", "run"),
    "tables": ("residency_tables", "run"),
    "lookup": ("residency_lookup", "run"),
}
_SWITCH: Final = ("switches", "residency")  # the same for `egressctl residency WORKSPACE EU`


# argparse's own class takes no parameter at run time.
if TYPE_CHECKING:
    _Subcommands: TypeAlias = argparse._SubParsersAction[Parser]
else:
    _Subcommands = argparse._SubParsersAction


class _Words(_Subcommands):
    """Subcommands; and if the first word is none of them, the name of a workspace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choices = cast(Any, _AnyWord(self._name_parser_map))

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = list(values or ())
        if words[0] in self._name_parser_map:
            super().__call__(parser, namespace, values, option_string)
            return
        switch = _switch_parser()
        found, unknown = switch.parse_known_args(words)
        vars(namespace).update(vars(found), action=None)
        if unknown:
            switch.error(f"unrecognized arguments: {' '.join(unknown)}")


class _AnyWord(Mapping[str, Parser]):
    """The subcommands; but argparse asks it whether a word may stand there at all, and any may."""

    def __init__(self, parsers: Mapping[str, Parser]) -> None:
        self._parsers = parsers

    def __getitem__(self, word: str) -> Parser:
        return self._parsers[word]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsers)

    def __len__(self) -> int:
        return len(self._parsers)

    def __contains__(self, word: object) -> bool:
        return True


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "residency",
        summary="where providers' addresses are; to where a workspace is pinned",
        says="Published lists of prefixes are the evidence for where an address is. Import them again from\n"
        "time to time: after 30 days they are called stale. Nothing is downloaded here.\n\n"
        "`egressctl residency WORKSPACE EU` pins a workspace, `egressctl residency WORKSPACE none` frees\n"
        "it. Where an address is announced is evidence, not a legal guarantee.",
        examples="  egressctl residency import ip-ranges.json\n"
        "  egressctl residency tables\n"
        "  egressctl residency lookup 3.120.0.1 --pin EU\n"
        "  egressctl residency acme EU",
    )
    actions = parser.add_subparsers(
        action=_Words,
        dest="action",
        metavar="ACTION|WORKSPACE",
        title="actions",
        prog="egressctl residency",
    )
    parser.add_argument(
        "-w", "--workspace", metavar="WORKSPACE", dest="named", default="",
        help="a workspace that is called as an action is, in front of the jurisdictions",
    )  # fmt: skip
    _add_import(actions)
    _add_tables(actions)
    _add_lookup(actions)


def run(args: argparse.Namespace) -> int:
    if args.action is not None and args.named:
        args.parser.error(f"-w is for a workspace and its jurisdictions, not for {args.action}")
    module, function = _SWITCH if args.action is None else ACTIONS[args.action]
    status: int = getattr(importlib.import_module(f"egressd.cli.{module}"), function)(args)
    return status


def _switch_parser() -> Parser:
    """Not among the subcommands: a workspace may have any name."""
    from egressd.cli.switches import add_options  # noqa: PLC0415

    apart = Parser(prog="egressctl").add_subparsers(prog="egressctl", parser_class=Parser)
    parser = verb_parser(
        apart,
        "residency",
        summary="",
        says="Write `residency: {jurisdictions: [...]}` into the policy of a workspace, and apply it.\n"
        "none: the workspace is pinned to nothing. Without a code, say what it is now.",
        examples="  egressctl residency acme EU\n"
        "  egressctl residency acme EEA,CH\n"
        "  egressctl residency acme none --dry-run  what that would open\n"
        "  egressctl residency -w import EU         a workspace called import",
    )
    parser.add_argument("workspace", metavar="WORKSPACE", help="whose switch")
    parser.add_argument("value", metavar="CODE", nargs="*", help="EU, EEA, UK, a country such as CH; or none")
    add_options(parser)
    return parser


def _add_import(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "import",
        summary="read a list of prefixes, and keep it as a table",
        says="Read a list of prefixes: AWS ip-ranges.json, Google cloud.json, Azure ServiceTags_*.json or\n"
        "one prefix per line, with a region or a country behind it. A file is taken whole or not at all.\n"
        "A running egressd applies it at once. For root. Exit status 1 if the file has problems.",
        examples="  egressctl residency import ip-ranges.json\n"
        "  egressctl residency import --check ServiceTags_Public_20261116.json\n"
        "  egressctl residency import cloud.json --sha256 9f86d081884c7d65...\n"
        "  egressctl residency import own.txt --provider ovhcloud --region GRA --country FR",
    )
    parser.add_argument("file", metavar="FILE", help="the list; - for standard input")
    parser.add_argument("--name", metavar="NAME", help="of the table, if not its provider's")
    parser.add_argument(
        "--format", metavar="FORMAT", choices=("aws", "google", "azure", "cidr"),
        help="aws, google, azure or cidr, if it is not to be guessed",
    )  # fmt: skip
    parser.add_argument("--provider", metavar="NAME", default="", help="of a plain list: whose it is")
    parser.add_argument(
        "--region", metavar="REGION", default="", help="of a plain list: where its prefixes are"
    )
    parser.add_argument(
        "--country", metavar="CODE", default="", help="of a plain list: in which jurisdiction"
    )
    parser.add_argument("--sha256", metavar="HEX", help="refuse the file if this is not its digest")
    parser.add_argument(
        "--signature", metavar="FILE", help="its detached Ed25519 signature, 64 bytes or base64"
    )
    parser.add_argument("--key", metavar="FILE", help="whose signature that must be: a public key, PEM")
    _add_directory(parser)
    parser.add_argument("--check", action="store_true", help="change nothing, only say what would come in")


def _add_tables(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "tables",
        summary="which tables of prefixes there are, and how old",
        says="Which tables of prefixes there are, from whom and how old.\n"
        "Exit status 1 if one is stale (more than 30 days old), or a file cannot be used: then everything\n"
        "is refused in workspaces that are pinned.",
        examples="  egressctl residency tables\n"
        "  egressctl residency tables --json | jq '.tables[].published'",
    )
    _add_directory(parser)


def _add_lookup(actions: Subparsers) -> None:
    parser = verb_parser(
        actions,
        "lookup",
        summary="where an address or an endpoint is, as far as is known",
        says="What the tables say of an address or a network, and the catalogue of a host or a URL; with\n"
        "--pin, what a workspace with that pin would decide, and exit status 1 if it would refuse.\n"
        "No name is looked up, and no request is made.",
        examples="  egressctl residency lookup 3.120.0.1 --pin EU\n"
        "  egressctl residency lookup 2600:1f14::1\n"
        "  egressctl residency lookup https://bedrock-runtime.eu-central-1.amazonaws.com --pin EU\n"
        "  egressctl residency lookup eu.api.openai.com --pin EEA,CH",
    )
    parser.add_argument("subject", metavar="ADDRESS|HOST|URL", help="or a network, as in 192.0.2.0/24")
    parser.add_argument("--pin", metavar="CODES", help="jurisdictions, as in EU or EEA,CH")
    _add_directory(parser)


def _add_directory(parser: Parser) -> None:
    parser.add_argument(
        "--residency-dir", metavar="DIR",
        help="where catalogue and tables are kept, if not where the running egressd has them",
    )  # fmt: skip
