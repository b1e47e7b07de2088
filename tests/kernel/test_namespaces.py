"""Whose namespace is it? Every descriptor a stranger may send, and the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from warden_world import USER, Inhabitant, inhabitant, sh

from egressd.kernel import namespaces
from egressd.model.errors import KernelError, Refused
from egressd.model.verdicts import Reason

pytestmark = pytest.mark.kernel


@pytest.fixture
def mine() -> Iterator[Inhabitant]:
    one = inhabitant()
    yield one
    one.close()


@pytest.fixture
def gateway() -> Iterator[int]:
    """This process is in a namespace of its own, as the warden is; gives its descriptor."""
    with namespaces.throw_away():
        descriptor = namespaces.open_own()
        yield descriptor
        os.close(descriptor)


def refusal(
    descriptor: int, *, owner: int = USER, forbidden: frozenset[namespaces.Identity] = frozenset()
) -> str:
    with pytest.raises(Refused) as caught:
        namespaces.verify(descriptor, owner=owner, forbidden=forbidden)
    assert caught.value.reason is Reason.NAMESPACE
    return str(caught.value)


def test_a_namespace_made_by_its_owner_in_a_user_namespace_is_fit(mine: Inhabitant, gateway: int) -> None:
    assert namespaces.verify(mine.net, owner=USER) == namespaces.identity(mine.net)


def test_another_users_namespace_is_refused(mine: Inhabitant, gateway: int) -> None:
    assert f"not made by user {USER + 1}" in refusal(mine.net, owner=USER + 1)
    assert "not made by user 0" in refusal(mine.net, owner=0)


def test_a_leased_one_is_refused(mine: Inhabitant, gateway: int) -> None:
    leased = namespaces.verify(mine.net, owner=USER)
    again = mine.open("net")  # another descriptor of the same namespace
    assert "in use" in refusal(again, forbidden=frozenset({leased}))
    os.close(again)


def test_the_gateway_is_refused(gateway: int) -> None:
    assert "in use" in refusal(gateway, owner=0)


def test_the_hosts_is_refused_though_the_caller_is_root(gateway: int) -> None:
    # `gateway` has moved this thread; the others of this process's ancestors are where the host is
    host = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
    assert "no user namespace of its own" in refusal(host, owner=0)
    os.close(host)


def test_one_that_root_made_without_a_user_namespace_is_refused(gateway: int) -> None:
    one = inhabitant(0, user=False)
    try:
        assert "no user namespace of its own" in refusal(one.net, owner=0)
    finally:
        one.close()


@pytest.mark.parametrize("kind", ["user", "mnt", "pid", "uts"])
def test_other_kinds_of_namespace_are_refused(kind: str, mine: Inhabitant, gateway: int) -> None:
    descriptor = mine.open(kind)
    assert "not a network namespace" in refusal(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("path", ["/dev/null", "/etc/passwd", "/", "/proc/self/status"])
def test_files_are_refused(path: str, gateway: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    assert "not a network namespace" in refusal(descriptor)
    os.close(descriptor)


def test_a_closed_descriptor_is_refused(gateway: int) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    assert "not a network namespace" in refusal(descriptor)


def test_from_a_child_user_namespace_the_outside_is_refused() -> None:
    """A rootless lab: the gateway belongs to a child user namespace, the host's to its parent."""
    outside = namespaces.open_own()
    program = (
        "import os, sys; from egressd.kernel import namespaces; from egressd.model.errors import Refused\n"
        "try: namespaces.verify(int(sys.argv[1]), owner=0)\n"
        "except Refused as error: print(error)"
    )
    unprivileged = f"setpriv --reuid {USER} --regid {USER} --clear-groups unshare -Urn"
    try:
        said = sh(f"{unprivileged} {sys.executable} -c '{program}' {outside}", pass_fds=[outside])
    finally:
        os.close(outside)
    assert "not made by user 0" in said


# ---- pins


@pytest.fixture
def name() -> Iterator[str]:
    name = f"kn-pin-{os.getpid()}"
    yield name
    namespaces.unpin(name)


def test_a_pin_is_one_of_ip_netns(name: str) -> None:
    descriptor, made = namespaces.pin(name)
    assert made
    assert name in sh("ip netns list").split()
    assert "lo" in sh(f"ip netns exec {name} ip -br link")
    again, made = namespaces.pin(name)
    assert not made
    assert namespaces.identity(again) == namespaces.identity(descriptor)
    os.close(descriptor)
    os.close(again)
    assert namespaces.unpin(name)
    assert not namespaces.unpin(name)
    assert not Path("/run/netns", name).exists()


def test_a_pin_of_ip_netns_is_adopted(name: str) -> None:
    sh(f"ip netns add {name}")
    descriptor, made = namespaces.pin(name)
    assert not made
    assert namespaces.identity(descriptor) != namespaces.identity(namespaces.open_own())
    os.close(descriptor)


def test_a_file_without_a_namespace_is_replaced(name: str) -> None:
    Path("/run/netns", name).touch()
    descriptor, made = namespaces.pin(name)
    assert made
    os.close(descriptor)


def test_a_pin_of_our_own_namespace_is_no_gateway(name: str) -> None:
    sh(f"touch /run/netns/{name} && mount --bind /proc/self/ns/net /run/netns/{name}")
    with pytest.raises(KernelError, match="remove it"):
        namespaces.pin(name)


def test_inside_comes_back_whatever_happens(name: str) -> None:
    own = namespaces.open_own()
    descriptor, _ = namespaces.pin(name)
    with pytest.raises(ZeroDivisionError), namespaces.inside(descriptor):
        raise ZeroDivisionError
    now = namespaces.open_own()
    assert namespaces.identity(now) == namespaces.identity(own) != namespaces.identity(descriptor)
    for one in (own, now, descriptor):
        os.close(one)
