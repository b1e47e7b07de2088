"""`egressctl member`: who has which role in a workspace, and up to which level."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from egressd.cli.administering import Document, add_options, administer, when
from egressd.cli.arguments import Subparsers, verb_parser
from egressd.cli.screen import paint
from egressd.cli.text import escape, table

if TYPE_CHECKING:
    from egressd.broker.store.administration import Administration, Operator
    from egressd.broker.store.store import Membership

__all__ = ["add", "run"]

_ROLES = ("viewer", "editor", "admin", "owner")


def add(subparsers: Subparsers) -> None:
    parser = verb_parser(
        subparsers,
        "member",
        summary="who has which role in a workspace: add, remove or list",
        says="Without a membership nobody may ask. A member is user:ISSUER:SUBJECT or group:ISSUER:NAME;\n"
        "who is more than one has the highest role and the highest clearance of them.\n"
        "For root and the owner of the broker's store. Each change is on record before it is made.",
        examples="  egressctl member add -w acme user:okta:00u1 --role owner --clearance secret\n"
        "  egressctl member add -w acme group:okta:staff --role viewer\n"
        "  egressctl member list -w acme\n"
        "  egressctl member remove -w acme user:okta:00u1",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", prog="egressctl member"
    )
    making = verb_parser(
        actions,
        "add",
        summary="make somebody a member, or change a member's role or clearance",
        says="Make a member, or change one.\n"
        "The role is viewer (may ask), editor (may also run commands of their own, and ingest), admin (may\n"
        "also set viewers and editors, trust and barriers) or owner (may set everybody).",
        examples="  egressctl member add -w acme user:okta:00u1 --role editor --clearance confidential",
    )
    add_options(making)
    making.add_argument("principal", metavar="PRINCIPAL", help="user:ISSUER:SUBJECT or group:ISSUER:NAME")
    making.add_argument("--role", metavar="ROLE", choices=_ROLES, required=True, help=", ".join(_ROLES))
    making.add_argument(
        "--clearance", metavar="LEVEL", default="",
        help="up to which level; what it was, or the lowest for a new member",
    )  # fmt: skip
    taking = verb_parser(
        actions,
        "remove",
        summary="take a membership away",
        says="Take a membership away; the next request counts without it, and one that is being prepared is\n"
        "decided again. The last owner stays until there is another.",
        examples="  egressctl member remove -w acme user:okta:00u1",
    )
    add_options(taking)
    taking.add_argument("principal", metavar="PRINCIPAL", help="as `member list` spells it")
    listing = verb_parser(
        actions,
        "list",
        summary="all memberships of a workspace",
        says="All memberships of a workspace: who gave them, and when.",
        examples="  egressctl member list -w acme --json | jq -r '.members[].principal'",
    )
    add_options(listing)


def run(args: argparse.Namespace) -> int:
    if args.action == "add":
        return administer(args, lambda to, by: _add(args, to, by), show=_show_change)
    if args.action == "remove":
        return administer(args, lambda to, by: _remove(args, to, by), show=_show_change)
    return administer(args, lambda to, by: _list(args, to, by), show=_show_list)


def _add(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    from egressd.access.principals import principal  # noqa: PLC0415
    from egressd.access.roles import Role  # noqa: PLC0415

    was = to.set_member(by, args.workspace, args.principal, Role.of(args.role), args.clearance)
    name = principal(args.principal)  # as it is kept: composed
    now = next((m for m in to.members(by, args.workspace) if m.principal == name), None)
    return {
        "workspace": args.workspace,
        "principal": name,
        "before": _member(was),
        "after": _member(now),
        "changed": _member(was) != _member(now),
    }


def _remove(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    was = _member(to.remove_member(by, args.workspace, args.principal))
    return {
        "workspace": args.workspace,
        "principal": args.principal,
        "before": was,
        "after": None,
        "changed": was is not None,
    }


def _list(args: argparse.Namespace, to: Administration, by: Operator) -> Document:
    members = [_member(member) for member in to.members(by, args.workspace)]
    return {"workspace": args.workspace, "members": members}


def _member(member: Membership | None) -> Document | None:
    if member is None:
        return None
    return {
        "principal": member.principal,
        "role": str(member.role),
        "clearance": member.clearance,
        "granted_by": member.granted_by,
        "at": when(member.at),
    }


def _show_change(document: Document) -> None:
    principal, workspace = escape(document["principal"]), escape(document["workspace"])
    before, after = document["before"], document["after"]
    if after is None and before is None:
        print(f"{principal} is no member of {workspace}")
    elif after is None:
        print(f"{principal} is no member of {workspace} any more; was {_is(before)}")
    elif not document["changed"]:
        print(f"{principal} is {_is(after)} in {workspace} already")
    else:
        was = f"; was {_is(before)}" if before else ""
        print(f"{principal} is {_is(after)} in {workspace}{was}")


def _is(member: Document) -> str:
    return f"{escape(member['role'])}, cleared for {escape(member['clearance'])}"


def _show_list(document: Document) -> None:
    rows = [
        [escape(one[name]) for name in ("principal", "role", "clearance", "granted_by", "at")]
        for one in document["members"]
    ]
    if not rows:
        print(f"{escape(document['workspace'])} has no members: egressctl member add")
        return
    print(table(("MEMBER", "ROLE", "CLEARANCE", "GIVEN BY", "AT"), rows, columns=paint().columns))
