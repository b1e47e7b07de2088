"""`egressctl key`: the key that signs the journal. The public half is what an auditor must have from you."""

from __future__ import annotations

import argparse
from typing import Any

from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.daemon import Document, answer
from egressd.cli.text import escape
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox.control import Control

__all__ = ["add", "run"]


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "key",
        summary="the key that signs the journal: show it, or change it",
        says="Give the public key to whoever will check proofs, by a way that nobody on the machine can\n"
        "change: a proof carries its own key, which says nothing of whose it is.",
        examples="  egressctl key show\n  egressctl key show --pem > egressd.pem\n  egressctl key rotate",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="egressctl key"
    )
    show = verb_parser(
        actions,
        "show",
        summary="the public key in force, in the spellings that others read",
        says="The verifier key (as the tools of C2SP's signed notes read it), its fingerprint, and the 64\n"
        "bytes to ask an attestation report for, so that the report is bound to the key.",
        examples="  egressctl key show\n  egressctl key show --pem      for openssl",
    )
    show.add_argument("--pem", action="store_true", help="only the key, as PEM (SubjectPublicKeyInfo)")
    verb_parser(
        actions,
        "rotate",
        summary="make a new key; the old one signs the first checkpoint after it, too",
        says="Make a new signing key. The journal names it, and the old key signs the checkpoint over that\n"
        "record before it is forgotten, so who trusts the old key can follow.\n"
        "For root and the daemon's user.",
        examples="  egressctl key rotate",
    )


def run(args: argparse.Namespace) -> int:
    if args.action == "rotate":
        return answer(args, lambda control: _spellings(control.change_key()), show=_show_changed)
    show = _show_pem if args.pem else _show
    return answer(args, _read, show=show)


def _read(control: Control) -> Document:
    return _spellings(control.ask("journal"))


def _spellings(state: dict[str, Any]) -> Document:
    """The key in each spelling. Refused if there is none."""
    from egressd.journal.keys import BadKey, Verifier  # noqa: PLC0415
    from egressd.journal.statement import report_data  # noqa: PLC0415

    if state.get("error"):
        raise Refused(Reason.UNAVAILABLE, str(state["error"]))
    try:
        verifier = Verifier.parse(str(state.get("key") or ""))
    except BadKey as error:
        raise Refused(Reason.UNAVAILABLE, f"egressd has no signing key now: {error}") from error
    return {
        "origin": verifier.name,
        "key": str(verifier),
        "fingerprint": verifier.key.fingerprint,
        "pem": verifier.key.pem(),
        "report_data": report_data(verifier.key.raw).hex(),
    }


def _show(document: Document) -> None:
    print(f"log          {escape(document['origin'])}")
    print(f"key          {escape(document['key'])}")
    print(f"fingerprint  {escape(document['fingerprint'])}")
    print(f"report data  {escape(document['report_data'])}")


def _show_pem(document: Document) -> None:
    print(document["pem"], end="")


def _show_changed(document: Document) -> None:
    _show(document)
    print("The old key has signed the journal that names this one. Give this one to whoever checks proofs.")
