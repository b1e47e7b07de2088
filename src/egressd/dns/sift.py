"""Which real addresses may be used at all. What is refused is named, so that it can be recorded.

A public name that resolves into a private network is how rebinding works; egressd's own ranges are
refused always, or a name could lead one sandbox to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from egressd.model.addresses import Address, AddressClass, Network, objection

__all__ = ["sift"]


def sift(
    addresses: Iterable[Address], *, private: bool, own: Sequence[Network]
) -> tuple[tuple[Address, ...], tuple[tuple[Address, AddressClass], ...]]:
    """(usable, refused with the class that forbids it), each in the order given."""
    judged = [(address, objection(address, private=private, own=own)) for address in addresses]
    good = tuple(address for address, against in judged if against is None)
    return good, tuple((address, against) for address, against in judged if against is not None)
