"""What the controller wants of the kernel, as data the warden can check field by field.

These are the only shapes in which a wish for permission reaches the privileged process. Every field is
bounded here; what is not representable cannot be asked for. Decoding (ipc/) enforces the constraints.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

from egressd.model.identities import WORKSPACE_PATTERN

__all__ = [
    "AddressText", "Comment", "Element", "NatEntry", "WorkspaceName", "WorkspaceWant", "comment", "order",
]  # fmt: skip


WorkspaceName = Annotated[str, Meta(pattern=f"^(?:{WORKSPACE_PATTERN})$", max_length=32)]
# A host name, network or "(resolver)": what a kernel comment may hold. No quote, no backslash, no control
# character; the kernel's limit is 128 bytes (NFTNL_UDATA_COMMENT_MAXLEN), so longer names are shortened
# before they come here (see `comment`).
_COMMENT = r"[A-Za-z0-9.*:/()_ -]{1,120}"
Comment = Annotated[str, Meta(pattern=f"^{_COMMENT}$")]
_LONGEST = 120
# An address as text, checked for its alphabet; whoever uses it parses it with `ipaddress`.
AddressText = Annotated[str, Meta(pattern=r"^[0-9a-f:.]{2,39}$")]
MarkValue = Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]


class Element(Struct, frozen=True, array_like=True):
    """One key of a workspace's allow map: (address, protocol, port) -> mark.

    `address` is a block's first synthetic address for hosts and locals, a network ("10.20.0.0/16") for
    `cidr` rules.
    """

    address: Annotated[str, Meta(pattern=r"^[0-9a-f:.]{2,39}(/[0-9]{1,3})?$")]
    protocol: Literal["tcp", "udp"]
    port: Annotated[int, Meta(ge=1, le=65535)]
    mark: MarkValue
    comment: Comment


class WorkspaceWant(Struct, frozen=True):
    """Everything the kernel is to know of one workspace."""

    workspace: WorkspaceName
    index: Annotated[int, Meta(ge=1, lt=1 << 13)]
    guard: Literal["off", "observe", "enforce"]
    elements: tuple[Element, ...] = ()
    connections: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None  # concurrently open, per sandbox


class NatEntry(Struct, frozen=True, array_like=True):
    """Where one slot leads: (mark, synthetic) -> real. `real` None takes the way away."""

    mark: MarkValue
    synthetic: AddressText
    real: AddressText | None
    comment: Comment


def comment(text: str) -> str:
    """`text`; or its end behind a digest when it is longer than the 120 bytes a comment may have.

    The end of a host name says whose it is. ValueError for characters that no name or network has.
    """
    if len(text) > _LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        text = f"({digest}) {text[-(_LONGEST - 19) :]}"
    if not re.fullmatch(_COMMENT, text):
        raise ValueError(f"{text!r} cannot be a comment")
    return text


def order(element: Element) -> tuple[str, int, str, str]:
    """By which the elements of a want are sorted."""
    return element.comment, element.port, element.protocol, element.address
