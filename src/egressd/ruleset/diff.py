"""From what is to what should be, in the fewest commands, as one atomic batch.

Counters survive only what is not touched: emptying a set or taking an element out and putting it back
zeroes its counter. So an element that is right is left alone, whatever else is wrong around it. Rules
may be rewritten freely: they count into named counters, which are objects of their own.

Both sides are compared as data (`objects`). That is sound because `build` writes rules in the words in
which `observe.render` reads them, which a test holds against the real nft; an nft that lists them
otherwise makes every rule differ at once, so the warden sees at its start that it cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import msgspec

from egressd.ruleset import build, objects
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import TABLE, Pools
from egressd.ruleset.objects import FAMILIES, VERDICT, Chain, Entry, Key, Objects, Set
from egressd.ruleset.observe import Observed
from egressd.ruleset.wants import Element, WorkspaceWant

__all__ = ["Desired", "LinkWant", "Operation", "changes", "commands", "plan", "tables"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One change. `what` says it to people, `lines` to nft."""

    what: str
    lines: tuple[str, ...]

    def describe(self) -> str:
        return self.what

    def commands(self) -> list[str]:
        return list(self.lines)


def commands(operations: Iterable[Operation]) -> list[str]:
    """All of it, in order, for one atomic batch."""
    return [line for operation in operations for line in operation.lines]


def plan(observed: Observed, desired: Desired) -> tuple[Operation, ...]:
    """What must be done to make the kernel's two tables exactly the desired ones. () when they are.

    ValueError when what is desired contradicts itself.
    """
    return (*tables(observed.tables), *_between(observed.things, build.desired(desired)))


def changes(
    before: WorkspaceWant | None,
    after: WorkspaceWant | None,
    *,
    pools: Pools | None = None,
    links: Iterable[LinkWant] = (),
) -> tuple[Operation, ...]:
    """The same between two versions of a workspace, without asking the kernel.

    `links`: its live ones, whose connection limits change with it. `pools`: the default ones when not
    given. ValueError when the two are not of one workspace.
    """
    if before is not None and after is not None and before.workspace != after.workspace:
        raise ValueError(f"{before.workspace} cannot become {after.workspace}")
    ranges, leases = pools or Pools(), tuple(links)
    if before is not None and after is not None and before.index == after.index:
        before, after = _apart(before, after)
    return tuple(_between(_one(before, ranges, leases), _one(after, ranges, leases)))


def _apart(before: WorkspaceWant, after: WorkspaceWant) -> tuple[WorkspaceWant, WorkspaceWant]:
    """Both without what they share, so that revoking one of ten thousand hosts takes as long as it should.

    Elements of a block of which another element changed stay: its mark is in @in as long as one of them is.
    """
    one, two = before.elements, after.elements
    ahead = _alike(one, two)  # both are sorted: most of what they share is at their two ends
    one, two = one[ahead:], two[ahead:]
    behind = _alike(one[::-1], two[::-1])
    differing = set(one[: len(one) - behind]) ^ set(two[: len(two) - behind])
    owners = {build.owner(element) for element in differing}
    return _only(before, owners), _only(after, owners)


def _alike(one: tuple[Element, ...], two: tuple[Element, ...]) -> int:
    """How many elements at the beginning are equal."""
    differ = (n for n, (old, new) in enumerate(zip(one, two, strict=False)) if old != new)
    return next(differ, min(len(one), len(two)))


def _only(want: WorkspaceWant, owners: set[int]) -> WorkspaceWant:
    kept = tuple(element for element in want.elements if element.mark & build.OWNER in owners)
    return msgspec.structs.replace(want, elements=kept)


def _one(want: WorkspaceWant | None, pools: Pools, links: tuple[LinkWant, ...]) -> Objects:
    if want is None:
        return {}
    things = build.fragment(want, pools)
    shared, elements = Key("inet", "set", "connections"), dict[str, Entry]()
    for lease in links:
        limit = build.connection_limit(lease, want)
        elements |= _elements(limit.pop(shared, None))
        things |= limit
    things[shared] = Set(type="ifname", data=VERDICT, elements=elements, partial=True)
    return things


def tables(awake: Mapping[str, bool]) -> Iterator[Operation]:
    """The two tables made and woken. `awake`: as `Observed.tables`."""
    missing = [family for family in FAMILIES if family not in awake]
    asleep = [family for family, is_awake in awake.items() if not is_awake]
    if missing or asleep:
        words = [f"table {family} {TABLE} is missing" for family in missing]
        words += [f"table {family} {TABLE} is dormant or has foreign flags" for family in asleep]
        yield Operation("; ".join(words), tuple(build.tables()))


# --------------------------------------------------------------------------------------------------
# The order within the batch: empty the chains that change and take out the elements that lead to chains, so
# that nothing refers to what goes; remove; declare what comes; elements; and only then the rules that refer
# to all of it.


def _between(have: Objects, want: Objects) -> Iterator[Operation]:
    remade = {key for key in have.keys() & want.keys() if _remade(have[key], want[key])}
    gone = [key for key in have if key not in want and not _partial(have[key])]
    leaving = {*gone, *remade}
    rewritten = _rewritten(have, want, leaving)
    yield from _emptied(have, rewritten, leaving)
    yield from _elements_removed(have, want, leaving, verdicts=True)
    yield from _removed(have, leaving)
    yield from _elements_removed(have, want, leaving, verdicts=False)
    coming = [key for key in want if (key not in have or key in remade) and not _partial(want[key])]
    yield from _made(want, coming)
    yield from _elements_added(have, want, leaving)
    yield from _written(have, want, rewritten)


def _partial(thing: objects.Object) -> bool:
    return isinstance(thing, Set) and thing.partial


def _remade(have: objects.Object, want: objects.Object) -> bool:
    """Does the difference lie where the kernel lets nothing be changed?"""
    if type(have) is not type(want):
        return True
    if isinstance(have, Set) and isinstance(want, Set):
        return have.shape != want.shape
    if isinstance(have, Chain) and isinstance(want, Chain):
        if have.hook is None or want.hook is None:
            return have.hook is not want.hook
        return replace(have.hook, policy=want.hook.policy) != want.hook
    return have != want


def _rewritten(have: Objects, want: Objects, leaving: set[Key]) -> list[Key]:
    """Chains whose rules must be written anew: other rules, or one that refers to something that goes."""
    names = {key.name for key in leaving}
    keys = []
    for key, thing in want.items():
        if isinstance(thing, Chain):
            present = have.get(key)
            rules = present.rules if isinstance(present, Chain) else ()
            touched = isinstance(present, Chain) and any(present.mentions(name) for name in names)
            if key in leaving or rules != thing.rules or touched:
                keys.append(key)
    return keys


def _emptied(have: Objects, rewritten: list[Key], leaving: set[Key]) -> Iterator[Operation]:
    chains = {key for key in leaving if key.sort == "chain"} | set(rewritten)
    full = [key for key in sorted(chains) if _rules(have.get(key))]
    for key in full:
        yield Operation(f"empty chain {key.path(TABLE)}", (f"flush chain {key.path(TABLE)}",))


def _rules(thing: objects.Object | None) -> tuple[str, ...]:
    return thing.rules if isinstance(thing, Chain) else ()


def _removed(have: Objects, leaving: set[Key]) -> Iterator[Operation]:
    """Chains first: sets and counters cannot go while a rule of theirs is there."""
    order = {"chain": 0, "set": 1, "quota": 2, "limit": 2, "counter": 3}
    for key in sorted(leaving, key=lambda key: (order[key.sort], key)):
        thing = have[key]
        word = thing.word if isinstance(thing, Set) else key.sort
        yield Operation(f"remove {word} {key.path(TABLE)}", (f"delete {word} {key.path(TABLE)}",))


def _made(want: Objects, coming: list[Key]) -> Iterator[Operation]:
    for key in coming:
        lines = tuple(objects.make(key, want[key], TABLE))
        yield Operation(f"make {key.sort} {key.path(TABLE)}", lines)


def _elements(thing: objects.Object | None) -> Mapping[str, Entry]:
    return thing.elements if isinstance(thing, Set) else {}


def _elements_removed(
    have: Objects, want: Objects, leaving: set[Key], *, verdicts: bool
) -> Iterator[Operation]:
    """Of a map that leads to chains also when it goes itself: its chains, which may go too, go before it."""
    for key, thing in have.items():
        leads = isinstance(thing, Set) and thing.data == VERDICT
        if leads is not verdicts or (key in leaving and not verdicts):
            continue
        wanted = {} if key in leaving else _elements(want.get(key))
        names = [name for name, entry in _elements(thing).items() if wanted.get(name) != entry]
        if names:
            notes = [_note(name, _elements(thing)[name]) for name in names]
            commands = tuple(objects.delete_elements(key, names, TABLE))
            yield Operation(f"remove from {key.name}: {_few(notes)}", commands)


def _elements_added(have: Objects, want: Objects, leaving: set[Key]) -> Iterator[Operation]:
    for key, thing in want.items():
        present = {} if key in leaving else _elements(have.get(key))
        added = {name: entry for name, entry in _elements(thing).items() if present.get(name) != entry}
        if added:
            notes = [_note(name, entry) for name, entry in added.items()]
            yield Operation(
                f"add to {key.name}: {_few(notes)}", tuple(objects.add_elements(key, added, TABLE))
            )


def _written(have: Objects, want: Objects, rewritten: list[Key]) -> Iterator[Operation]:
    for key in rewritten:
        lines = tuple(objects.fill(key, want[key], TABLE))
        if lines:
            yield Operation(f"write the {len(lines)} rules of {key.path(TABLE)}", lines)
    yield from _policies(have, want)


def _policies(have: Objects, want: Objects) -> Iterator[Operation]:
    """A base chain's policy is the one part of its declaration that can be said again."""
    for key, thing in want.items():
        present = have.get(key)
        if not (isinstance(thing, Chain) and isinstance(present, Chain)):
            continue
        if thing.hook and present.hook and thing.hook.policy != present.hook.policy:
            what = f"set the policy of {key.path(TABLE)} to {thing.hook.policy}"
            yield Operation(what, (f"add chain {key.path(TABLE)} {{ policy {thing.hook.policy}; }}",))


def _note(name: str, entry: Entry) -> str:
    return f"{name} ({entry.comment})" if entry.comment else name


def _few(notes: list[str]) -> str:
    return ", ".join(notes[:5]) + (f" and {len(notes) - 5} more" if len(notes) > 5 else "")
