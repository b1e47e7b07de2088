"""Whatever is changed, in whatever order: nobody is shown a file that the plain rule forbids, or denied one
that it allows.

The plain rule is written out here in a few lines, over plain sets. What it is held against is the whole way:
administration, files on disk, ingest, store, snapshot, decision.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_world import FINANCE, OPERATOR, RESEARCH, STAFF, administered, asker

from egressd.access.acl_file import load
from egressd.access.authorise import authorise
from egressd.access.documents import LEVELS
from egressd.access.roles import Role
from egressd.broker.store.ingest import AccessList, ingest
from egressd.broker.store.store import Store
from egressd.model.errors import Refused

GROUPS = (FINANCE, RESEARCH, STAFF)
PEOPLE = {
    "user:okta:ann": asker("ann", FINANCE, STAFF),
    "user:okta:ben": asker("ben", RESEARCH),
    "user:okta:cat": asker("cat", FINANCE, RESEARCH),
    "user:okta:dot": asker("dot"),
}
NAMES = (*PEOPLE, *GROUPS)
PATHS = ("a.md", "hr/b.md", "hr/c.md")

names = st.sampled_from(NAMES)
lists = st.none() | st.lists(names, max_size=3, unique=True)
levels = st.none() | st.sampled_from(LEVELS[:3])
groups = st.none() | st.lists(st.sampled_from(GROUPS), max_size=2, unique=True)
says = st.fixed_dictionaries({"read": lists, "deny": lists, "clearance": levels, "groups": groups})
roles = st.sampled_from([role for role in Role if role is not Role.NONE])


class World(RuleBasedStateMachine):
    url: ClassVar[str] = ""  # an empty database; "" is a new file of SQLite's

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="c-rules-", dir="/tmp"))
        self.directory = self.place / "documents"
        (self.directory / "hr").mkdir(parents=True)
        self.store = Store.open(self.url or f"sqlite:///{self.place}/store.db")
        self.workspace = f"w{self.place.name[-8:].lower().replace('_', 'x')}"
        self.to, self.journal = administered(self.store)
        # the plain state
        self.members: dict[str, tuple[Role, str]] = {}
        self.barriers: set[frozenset[str]] = set()
        self.on_disk: dict[str, dict[str, Any] | None] = {}  # None: front matter that is broken
        self.ingested: dict[str, dict[str, Any] | None] = {}
        self.list: dict[str, dict[str, Any]] = {}
        self.trust: dict[str, Any] = {
            "believed": False,
            "read": [],
            "deny": [],
            "clearance": None,
            "groups": [],
        }
        self.has_source = False
        self._settle_in()

    def _settle_in(self) -> None:
        """Most people may ask, and most documents have readers: from here every change shows."""
        for name, level in (
            ("user:okta:ann", "secret"),
            ("user:okta:ben", "internal"),
            (FINANCE, "internal"),
        ):
            self.set_member(name, Role.VIEWER, level)
        for path, readers in zip(PATHS, ([STAFF], [FINANCE, "user:okta:ben"], [*PEOPLE]), strict=True):
            self.write(path, {"read": readers, "deny": None, "clearance": "internal", "groups": None})
        self.read_source({}, fails=False)
        self.set_trust(believed=True, read=[STAFF, RESEARCH], deny=None, level="public", of=None)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.place)

    # ---- what happens

    @rule(name=names, role=roles, level=st.sampled_from(LEVELS))
    def set_member(self, name: str, role: Role, level: str) -> None:
        with self._kept_owner(name, role):
            self.to.set_member(OPERATOR, self.workspace, name, role, level)
            self.members[name] = (role, level)

    @rule(name=names)
    def remove_member(self, name: str) -> None:
        with self._kept_owner(name, Role.NONE):
            self.to.remove_member(OPERATOR, self.workspace, name)
            self.members.pop(name, None)

    @contextlib.contextmanager
    def _kept_owner(self, name: str, then: Role) -> Any:
        owners = {one for one, (role, _) in self.members.items() if role is Role.OWNER}
        if owners == {name} and then is not Role.OWNER:
            with pytest.raises(Refused, match="last owner"):
                yield
        else:
            yield

    @rule(pair=st.lists(st.sampled_from(GROUPS), min_size=2, max_size=2, unique=True), there=st.booleans())
    def barrier(self, pair: list[str], there: bool) -> None:
        change = self.to.add_barrier if there else self.to.remove_barrier
        change(OPERATOR, self.workspace, *pair)
        (self.barriers.add if there else self.barriers.discard)(frozenset(pair))

    @rule(path=st.sampled_from(PATHS), what=says | st.none())
    def write(self, path: str, what: dict[str, Any] | None) -> None:
        (self.directory / path).write_text(_front_matter(what))
        self.on_disk[path] = what

    @rule(path=st.sampled_from(PATHS))
    def remove(self, path: str) -> None:
        (self.directory / path).unlink(missing_ok=True)
        self.on_disk.pop(path, None)

    @rule(
        rules=st.dictionaries(st.sampled_from(("a.md", "hr/**", "hr/c.md")), says, max_size=2),
        fails=st.sampled_from([False, False, False, True]),
    )
    def read_source(self, rules: dict[str, dict[str, Any]], fails: bool) -> None:
        rules = {glob: one for glob, one in rules.items() if any(v is not None for v in one.values())}
        self.journal.broken = fails
        with pytest.raises(Refused) if fails else contextlib.nullcontext():
            ingest(
                self.to, OPERATOR, self.workspace, "docs", str(self.directory),
                access_list=_access_list(rules), without_list=not rules,
            )  # fmt: skip
        self.journal.broken = False
        if not fails:
            self.ingested, self.list, self.has_source = dict(self.on_disk), rules, True

    @rule(believed=st.none() | st.booleans(), read=lists, deny=lists, level=levels, of=groups)
    def set_trust(self, believed: bool | None, read: Any, deny: Any, level: str | None, of: Any) -> None:
        if not self.has_source:
            return
        self.to.set_trust(
            OPERATOR, self.workspace, "docs", front_matter=believed, clearance=level,
            read=_set(read), deny=_set(deny), groups=_set(of),
        )  # fmt: skip
        said = {"believed": believed, "read": read, "deny": deny, "clearance": level, "groups": of}
        self.trust.update({key: value for key, value in said.items() if value is not None})

    @rule()
    def drop(self) -> None:
        if self.has_source:
            self.to.drop_source(OPERATOR, self.workspace, "docs")
            self.ingested, self.list, self.has_source = {}, {}, False
            self.trust = {"believed": False, "read": [], "deny": [], "clearance": None, "groups": []}

    # ---- what must hold

    @invariant()
    def everybody_is_shown_what_the_plain_rule_allows(self) -> None:
        if not hasattr(self, "store"):
            return
        ids = [f"docs:{path}" for path in PATHS]
        for name, identity in PEOPLE.items():
            found = self.store.snapshot(self.workspace, identity, ids)
            cleared = authorise(found.asker, ids, found.documents, found.rules)
            shown = {one.id[5:] for one in cleared.documents}
            assert shown == {path for path in PATHS if self._allowed(name, path)}, name
        # every change is on record, and moves the generation by one
        assert self.store.generation(self.workspace) == len(self.journal.records)

    def _allowed(self, name: str, path: str) -> bool:
        """The plain rule."""
        mine = {name} | PEOPLE[name].groups
        held = [self.members[one] for one in mine if one in self.members]
        document = self._said_of(path)
        if not held or document is None or document["clearance"] is None:
            return False
        if mine & set(document["deny"]) or not mine & set(document["read"]):
            return False
        if max(LEVELS.index(level) for _, level in held) < LEVELS.index(document["clearance"]):
            return False
        of = {one for one in {*document["groups"], *document["read"]} if one.startswith("group:")}
        return not any(
            one in mine and other in of
            for barrier in self.barriers
            for one, other in (tuple(barrier), tuple(barrier)[::-1])
        )

    def _said_of(self, path: str) -> dict[str, Any] | None:
        """None: nothing, or things that contradict one another."""
        if path not in self.ingested:
            return None
        globs = (path, f"{Path(path).parent}/**")
        heard = [one for glob, one in self.list.items() if glob in globs]
        if self.trust["believed"]:
            if self.ingested[path] is None:
                return None
            heard.append(self.ingested[path])  # type: ignore[arg-type]
        said = {}
        for key in ("read", "deny", "clearance", "groups"):
            values = [_plain(one[key]) for one in heard if one[key] is not None]
            if len(set(values)) > 1:
                return None
            said[key] = values[0] if values else self.trust[key]
        return said


def _plain(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list) else value


def _set(value: list[str] | None) -> frozenset[str] | None:
    return None if value is None else frozenset(value)


def _yaml(what: dict[str, Any]) -> str:
    """One rule of an access list, without its path."""
    parts = [f"{key}: {_flow(value)}" for key, value in what.items() if value is not None]
    return "{" + ", ".join(parts) + "}"


def _flow(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _front_matter(what: dict[str, Any] | None) -> str:
    if what is None:
        return "---\nacl: {read: everybody}\n---\nbroken\n"
    acl = [f"{key}: {_flow(what[key])}" for key in ("read", "deny") if what[key] is not None]
    lines = ["acl: {" + ", ".join(acl) + "}"] if acl else []
    lines += [f"{key}: {_flow(what[key])}" for key in ("clearance", "groups") if what[key] is not None]
    return "\n".join(["---", *lines, "---", "text", ""])


def _access_list(rules: dict[str, dict[str, Any]]) -> AccessList | None:
    if not rules:
        return None
    lines = [f"  {glob}: {_yaml(what)}" for glob, what in rules.items()]
    return AccessList(load("\n".join(["documents:", *lines]).encode(), source="acl.yaml"), "sha256:x")


class Elsewhere(World):
    """The same over PostgreSQL."""


TestRulesOverSqlite = World.TestCase
TestRulesOverSqlite.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRulesOverPostgres = pytest.mark.usefixtures("_elsewhere")(Elsewhere.TestCase)
TestRulesOverPostgres.settings = settings(
    max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def _elsewhere(postgres: Any) -> Any:
    Elsewhere.url = postgres.empty_database()
    yield
    Elsewhere.url = ""
