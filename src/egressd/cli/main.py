"""egressctl: the table of verbs, and the one that was asked for.

Rules of this file: nothing is imported that the asked-for verb does not need. `egressctl run` stands
between a caller and its sandbox, so a table of names is read here, and one module is loaded from it.
Every verb's module has `add(subparsers)`, which describes its arguments, and `run(args)`, which returns
the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final, Protocol, cast

from egressd import __version__
from egressd.cli.arguments import Parser, Subparsers
from egressd.cli.exits import BROKEN_PIPE, INTERRUPTED, REFUSED, USAGE
from egressd.cli.screen import complain, discard_output, prepare

__all__ = ["DEFAULT_RUN_DIR", "VERBS", "VerbModule", "main", "parser_for", "whole_parser"]

DEFAULT_RUN_DIR: Final = "/run/egressd"

# verb -> (module of egressd.cli, what it does)
VERBS: Final[dict[str, tuple[str, str]]] = {
    "run": ("run", "run a command in a sandbox of a workspace"),
    "status": ("status", "is egressd enforcing; which workspaces, which sandboxes"),
    "doctor": ("doctor", "what egressd needs of this machine: is it there, and how to get it"),
    "selftest": ("selftest", "try to get out of a sandbox, in every way that is known"),
    "policy": ("policy", "check, lint, compare, apply or explain policies"),
    "guard": ("guard", "is what is not listed refused: on, observe or off"),
    "residency": ("residency", "where providers' addresses are; to where a workspace is pinned"),
    "local-only": ("local_only", "is external routing off: on or off"),
    "route": ("route", "which provider serves a route, and why; or why none"),
    "why": ("why", "why a name, an address or a sandbox is allowed or denied"),
    "counters": ("counters", "bytes and packets per workspace and host; do the books balance"),
    "ruleset": ("ruleset", "the gateway's nftables ruleset, as the kernel lists it"),
    "audit": ("audit", "what was recorded: denials, flows, grants, sandboxes, changes"),
    "watch": ("watch", "sandboxes, hosts, rates and denials, live"),
    "proof": ("proof", "signed evidence of what a workspace sent, to whom, and what was refused"),
    "verify": ("verify", "check a proof, or a journal, on any machine"),
    "key": ("key", "the key that signs the journal: show it, or change it"),
    "member": ("member", "who has which role in a workspace: add, remove or list"),
    "ingest": ("ingest", "read documents, and who may see them, into the broker's store"),
    "source": ("source", "where a workspace's documents come from; what is believed of them"),
    "barrier": ("barrier", "groups that must not see each other's documents"),
    "ask": ("ask", "run an inference over documents that you may see"),
}

_EPILOG = """\
examples:
  egressctl run -w acme -- python3 infer.py    run a command that reaches only what acme allows
  egressctl policy check acme.yaml             every problem of a policy; needs no daemon and no root
  egressctl policy diff                        what `policy apply` would change
  egressctl why -w acme tracker.example        why is this name denied in acme?
  egressctl guard acme on                      from now on, refuse what is not listed
  egressctl route -w acme default              which provider serves this route, and why
  egressctl counters acme                      who was talked to, what was denied, does it add up?
  egressctl ruleset | less                     the kernel's own word
  egressctl audit --since 1h --verdict denied  what was denied within the hour
  egressctl watch                              what goes on, live
  egressctl proof -w acme --since 1d           signed evidence of the last day, into acme.proof
  egressctl verify acme.proof --key key.pem    does it hold? Needs no daemon and no root
  egressctl ask -w acme --candidates found.txt run an inference over what you may see of these
  egressctl doctor                             is all here that egressd needs?
  egressctl selftest -w acme                   try to get out, in some hundred ways
  egressctl --json status                      the same answers for programs

exit status:
  0    done, and nothing is wrong        1    problems were found, the books do not balance,
                                              or no provider complies
  2    the command line is wrong         125  egressd refused, or cannot be reached
  `run` and `ask` return the status of their command, and 125 for what is wrong before it begins.
  `selftest` returns 2 if something escaped, and 125 for a wrong command line.

egressctl VERB --help says more about a verb.  See also egressctl(1), egressd(8), egressd.yaml(5).
"""


class VerbModule(Protocol):
    """What a verb's module offers."""

    def add(self, subparsers: Subparsers) -> object: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status, also where argparse would leave by itself."""
    prepare()
    try:
        status = _obey(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        discard_output()
        return BROKEN_PIPE
    except OSError as error:  # whatever else can fail is dealt with where it fails
        complain(f"the answer cannot be written: {error.strerror or error}")
        discard_output()
        return REFUSED
    return status


def _obey(words: list[str]) -> int:
    verb = _verb_of(words)
    if verb is not None and verb not in VERBS:
        return _unknown(verb)
    parser = parser_for(() if verb is None else (verb,))
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:  # said by the verb, whose usage is the one that helps
            getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as leaving:  # --help, --version, or a wrong command line
        return leaving.code if isinstance(leaving.code, int) else USAGE
    if verb is None:
        parser.print_help(sys.stderr)
        return USAGE
    return _load(verb).run(args)


def parser_for(verbs: Sequence[str]) -> Parser:
    """The command line with only these verbs' arguments described, so only their modules loaded."""
    parser = Parser(
        prog="egressctl",
        usage="egressctl [--run-dir DIR] [--json] VERB ...",
        description="Ask egressd, or run a command under it.\n\nverbs:\n" + _verb_lines(),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", default=DEFAULT_RUN_DIR,
        help="where egressd keeps its control socket (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--version", action="version", version=f"egressctl {__version__}")
    if verbs:
        # The list of verbs in the description is the complete one; this one would only hold what is loaded.
        subparsers = parser.add_subparsers(
            dest="verb", metavar="VERB", prog="egressctl", help=argparse.SUPPRESS
        )
        for verb in verbs:
            _load(verb).add(subparsers)
    return parser


def whole_parser() -> Parser:
    """The command line with everything in it: what man page and completions are compared with."""
    return parser_for(tuple(VERBS))


def _verb_of(words: Sequence[str]) -> str | None:
    """The first word that is neither an option nor an option's value."""
    remaining = iter(words)
    for word in remaining:
        if word == "--run-dir":
            next(remaining, None)
        elif word == "--":
            return next(remaining, None)
        elif not word.startswith("-"):
            return word
    return None


def _verb_lines() -> str:
    return "\n".join(f"  {verb:<12}{summary}" for verb, (_, summary) in VERBS.items())


def _load(verb: str) -> VerbModule:
    return cast(VerbModule, importlib.import_module(f"egressd.cli.{VERBS[verb][0]}"))


def _unknown(verb: str) -> int:
    import difflib  # noqa: PLC0415

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the verbs are {', '.join(VERBS)}"
    complain(f"there is no verb '{verb}': {hint}")
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
