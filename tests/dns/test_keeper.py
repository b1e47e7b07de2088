"""Dialogues with the keeper: what happens (>>), what it wants done (<<), and what may be answered meanwhile.

The clock is the test's own. Jitter is zero: a TTL of 100 is looked at again after 90 seconds.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from egressd.dns.keeper import (
    Admit,
    Ask,
    Command,
    Finding,
    Keeper,
    Note,
    Settled,
    Standing,
    State,
    Target,
    User,
)
from egressd.dns.replies import Failure
from egressd.dns.slots import EMPTY
from egressd.model.addresses import Address
from egressd.model.verdicts import Reason

API, DB = Target("api.example.com", False), Target("db.example", True)
ACME, ZETA = User("acme", 5), User("zeta", 9)
LOST = Finding(failure=Failure(22, "nobody answered"))
ONE, TWO, SIX = ip_address("93.184.215.14"), ip_address("93.184.215.15"), ip_address("2606:2800::1")


def found(*addresses: Address, ttl: float = 100) -> Finding:
    return Finding(addresses, ttl)


NONE = found()
NO_NAME = Finding(ttl=100, exists=False)


class Talk:
    """A keeper, its clock, and the serial of the last `Admit`."""

    def __init__(self, **options: object) -> None:
        self.keeper = Keeper(**options)  # type: ignore[arg-type]
        self.now = 1000.0
        self.serial = 0

    def use(self, users: dict[Target, set[User]]) -> list[Command]:
        return self._heard(self.keeper.set_users({t: frozenset(u) for t, u in users.items()}, now=self.now))

    def found(self, target: Target, v4: Finding, v6: Finding) -> list[Command]:
        return self._heard(self.keeper.found(target, (v4, v6), now=self.now))

    def admitted(self, target: Target = API, *, refused: dict[Address, str] | None = None) -> list[Command]:
        return self._heard(self.keeper.admitted(target, self.serial, refused=refused or {}))

    def withheld(self, target: Target = API) -> list[Command]:
        return self._heard(self.keeper.withheld(target, self.serial, "no kernel", now=self.now))

    def after(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self._heard(self.keeper.tick(now=self.now))

    def _heard(self, commands: list[Command]) -> list[Command]:
        for command in commands:
            if isinstance(command, Admit):
                self.serial = command.serial
        return commands

    def known(self, target: Target = API) -> tuple[State, object, object, set[str]]:
        standing = self.keeper.standing(target)
        return (
            standing.state,
            standing.v4.slots[0],
            standing.v6.slots[0],
            {u.workspace for u in standing.users},
        )


def kinds(commands: list[Command]) -> list[type]:
    return [type(c) for c in commands]


def settled(**options: object) -> Talk:
    """A talk in which the API's name is known and admitted for acme."""
    talk = Talk(**options)
    assert talk.use({API: {ACME}}) == [Ask(API)]
    talk.found(API, found(ONE), found(SIX))
    talk.admitted()
    return talk


def test_record_admit_answer() -> None:
    talk = Talk()
    assert talk.use({API: {ACME}}) == [Ask(API)]
    assert talk.known() == (State.PENDING, None, None, set())
    (admit,) = talk.found(API, found(ONE, TWO), found(SIX))
    assert admit == Admit(API, (ONE, TWO, ONE, TWO), (SIX,) * 4, 1)
    assert talk.known() == (State.PENDING, None, None, set())  # upstream answered, the kernel has not
    assert talk.admitted() == [Settled(API)]
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})


def test_refreshed_before_the_ttl_ends_and_unchanged_is_no_kernel_write() -> None:
    talk = settled()
    assert talk.keeper.next_due() == talk.now + 90
    assert talk.after(89.9) == []
    assert talk.after(0.1) == [Ask(API)]
    assert talk.after(100) == []  # asked already
    assert talk.found(API, found(ONE), found(SIX)) == []
    assert talk.keeper.next_due() == talk.now + 90


def test_a_change_is_answered_only_after_the_kernel_has_it() -> None:
    talk = settled()
    talk.after(90)
    (admit,) = talk.found(API, found(TWO), found(SIX))
    assert isinstance(admit, Admit)
    assert admit.slots4 == (TWO,) * 4
    assert talk.known()[1] == ONE
    talk.admitted()
    assert talk.known()[1] == TWO


def test_withheld_at_first_is_a_failure_and_tried_again() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE), NONE)
    note, done = talk.withheld()
    assert note == Note("dns-withheld", {"name": "api.example.com", "reason": "no kernel"})
    assert done == Settled(API)
    standing = talk.keeper.standing(API)
    assert (standing.state, standing.users) == (State.FAILED, frozenset())
    assert standing.failure == Failure(14, "api.example.com is not admitted: no kernel")
    assert talk.after(1) == [Ask(API)]
    assert kinds(talk.found(API, found(ONE), NONE)) == [Admit]
    talk.admitted()
    assert talk.known() == (State.KNOWN, ONE, None, {"acme"})


def test_withheld_on_refresh_keeps_what_the_kernel_has() -> None:
    talk = settled()
    talk.after(90)
    talk.found(API, found(TWO), found(SIX))
    talk.withheld()
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})
    assert talk.after(1) == [Ask(API)]
    assert kinds(talk.found(API, found(TWO), found(SIX))) == [Admit]


def test_a_late_acknowledgement_of_something_else_changes_nothing() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE), NONE)
    assert talk.keeper.admitted(API, talk.serial + 1) == []
    assert talk.keeper.admitted(DB, talk.serial) == []
    assert talk.known()[0] is State.PENDING
    talk.admitted()
    assert talk.admitted() == []


@pytest.mark.parametrize(("age", "stale"), [(99.0, False), (100.0, True), (86_400.0, True)])
def test_upstream_failure_serves_the_last_good(age: float, stale: bool) -> None:
    talk = settled()
    talk.after(90)
    assert talk.found(API, LOST, LOST) == []
    talk.now = 1000.0 + age
    talk.keeper.tick(now=talk.now)
    assert talk.found(API, LOST, LOST) == ([Settled(API)] if stale else [])
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})
    standing = talk.keeper.standing(API)
    assert (standing.v4.stale, standing.v6.stale) == (stale, stale)


def test_only_the_family_that_fails_is_stale_and_it_recovers() -> None:
    talk = settled()
    talk.after(90)
    talk.found(API, LOST, found(SIX))
    talk.after(60)
    talk.found(API, LOST, found(SIX))
    standing = talk.keeper.standing(API)
    assert (standing.v4.stale, standing.v6.stale) == (True, False)
    talk.after(90)
    assert talk.found(API, found(ONE), found(SIX)) == [Settled(API)]
    assert not talk.keeper.standing(API).v4.stale


def test_but_not_for_ever() -> None:
    talk = settled()
    talk.now += 86_401
    talk.after(0)
    (admit,) = talk.found(API, LOST, LOST)
    assert isinstance(admit, Admit)
    assert (admit.slots4, admit.slots6) == (EMPTY, EMPTY)
    talk.admitted()
    standing = talk.keeper.standing(API)
    assert (standing.state, standing.failure) == (State.FAILED, LOST.failure)


def test_failures_are_retried_with_growing_pauses() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, LOST, LOST)
    talk.admitted()
    assert talk.keeper.standing(API).failure == LOST.failure
    pauses = []
    for _ in range(5):
        due = talk.keeper.next_due()
        assert due is not None
        pauses.append(due - talk.now)
        talk.now = due
        assert talk.after(0) == [Ask(API)]
        assert talk.found(API, LOST, LOST) == []
    assert pauses == [1, 2, 4, 8, 16]
    talk.after(32)
    talk.found(API, found(ONE), NONE)
    talk.admitted()
    assert talk.keeper.next_due() == talk.now + 90


@pytest.mark.parametrize(
    ("v4", "v6", "state", "exists"),
    [
        (NONE, NONE, State.KNOWN, True),
        (NO_NAME, NO_NAME, State.KNOWN, False),
        (NO_NAME, NONE, State.KNOWN, False),
        (found(ONE), NO_NAME, State.KNOWN, True),
        (NONE, LOST, State.FAILED, True),
        (LOST, NONE, State.FAILED, True),
        (found(ONE), LOST, State.KNOWN, True),
        (LOST, found(SIX), State.KNOWN, True),
    ],
)
def test_both_families_together(v4: Finding, v6: Finding, state: State, exists: bool) -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, v4, v6)
    talk.admitted()
    standing = talk.keeper.standing(API)
    assert (standing.state, standing.exists) == (state, exists)


def test_no_such_name_takes_the_way_away() -> None:
    talk = settled()
    talk.after(90)
    (admit,) = talk.found(API, NO_NAME, NO_NAME)
    assert isinstance(admit, Admit)
    assert (admit.slots4, admit.slots6) == (EMPTY, EMPTY)
    talk.admitted()
    assert not talk.keeper.standing(API).exists
    talk.after(90)
    assert talk.found(API, LOST, LOST) == []  # and stays so while upstream is away
    assert not talk.keeper.standing(API).exists


@pytest.mark.parametrize(
    ("target", "address", "kind"),
    [
        (API, "10.0.0.5", "private"),
        (API, "fd00::5", "unique-local"),
        (API, "127.0.0.1", "loopback"),
        (API, "::1", "loopback"),
        (API, "169.254.169.254", "metadata"),
        (API, "::ffff:a00:1", "ipv4-mapped"),
        (API, "64:ff9b::a00:1", "nat64"),
        (DB, "127.0.0.1", "loopback"),
        (DB, "::1", "loopback"),
        (DB, "169.254.169.254", "metadata"),
        (DB, "fe80::1", "link-local"),
        (DB, "198.18.0.4", "egressd-pool"),
        (DB, "fd53:e9::4", "egressd-pool"),
    ],
)
def test_refused_addresses_are_recorded_and_lead_nowhere(target: Target, address: str, kind: str) -> None:
    talk = Talk(own=(ip_network("198.18.0.0/16"), ip_network("fd53:e9::/64")))
    talk.use({target: {ACME}})
    bad = found(ip_address(address))
    both = (bad, NONE) if ip_address(address).version == 4 else (NONE, bad)
    note, admit = talk.found(target, *both)
    assert note == Note("dns-refused-address", {"name": target.host, "address": address, "kind": kind})
    assert isinstance(admit, Admit)
    assert (admit.slots4, admit.slots6) == (EMPTY, EMPTY)
    talk.admitted(target)
    standing = talk.keeper.standing(target)
    assert standing.state is State.FAILED
    assert standing.failure == Failure(15, f"every address of {target.host} is refused: {address} ({kind})")


def test_refused_beside_good_ones_are_left_out() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    note, admit = talk.found(API, found(ip_address("10.0.0.5"), ONE), NONE)
    assert isinstance(note, Note)
    assert isinstance(admit, Admit)
    assert admit.slots4 == (ONE,) * 4


def test_rebinding_takes_the_old_way_away_at_once() -> None:
    talk = settled()
    talk.after(90)
    commands = talk.found(API, found(ip_address("10.0.0.5")), NONE)
    assert kinds(commands) == [Note, Admit]
    talk.admitted()
    assert talk.keeper.standing(API).state is State.FAILED


@pytest.mark.parametrize("address", ["10.0.0.5", "fd00::5", "192.168.1.1", "100.64.0.1"])
def test_private_rules_reach_private_ranges(address: str) -> None:
    talk = Talk()
    talk.use({DB: {ACME}})
    real = ip_address(address)
    both = (found(real), NONE) if real.version == 4 else (NONE, found(real))
    assert kinds(talk.found(DB, *both)) == [Admit]


def test_a_second_workspace_is_not_covered_by_the_firsts_acknowledgement() -> None:
    talk = settled()
    (admit,) = talk.use({API: {ACME, ZETA}})
    assert isinstance(admit, Admit)
    assert talk.known()[3] == {"acme"}
    talk.admitted()
    assert talk.known()[3] == {"acme", "zeta"}


def test_a_workspace_that_joins_while_the_kernel_is_asked_causes_another_admission() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE), NONE)
    assert talk.use({API: {ACME, ZETA}}) == []
    assert kinds(talk.admitted()) == [Settled, Admit]
    assert talk.known()[3] == {"acme"}
    talk.admitted()
    assert talk.known()[3] == {"acme", "zeta"}


def test_who_leaves_and_comes_back_is_admitted_anew() -> None:
    talk = settled()
    talk.use({API: {ACME, ZETA}})
    talk.admitted()
    assert talk.use({API: {ACME}}) == []
    assert talk.known()[3] == {"acme"}
    assert kinds(talk.use({API: {ACME, ZETA}})) == [Admit]
    assert talk.known()[3] == {"acme"}


def test_who_leaves_and_comes_back_while_the_kernel_is_asked_is_admitted_anew() -> None:
    talk = Talk()
    talk.use({API: {ACME, ZETA}})
    talk.found(API, found(ONE), NONE)
    talk.use({API: {ACME}})
    talk.use({API: {ACME, ZETA}})
    assert kinds(talk.admitted()) == [Settled, Admit]
    assert talk.known()[3] == {"acme"}


def test_names_that_go_are_forgotten_with_all_that_is_under_way() -> None:
    talk = settled()
    assert talk.use({DB: {ACME}}) == [Settled(API), Ask(DB)]
    assert talk.known()[0] is State.PENDING
    assert talk.keeper.found(API, (found(ONE), NONE), now=talk.now) == []
    assert talk.keeper.admitted(API, talk.serial) == []
    assert talk.use({}) == [Settled(DB)]
    assert (len(talk.keeper), talk.keeper.next_due()) == (0, None)
    assert talk.after(10_000) == []


def test_the_same_name_public_and_private_are_two() -> None:
    talk = Talk()
    public, private = Target("x.example", False), Target("x.example", True)
    assert talk.use({public: {ACME}, private: {ZETA}}) == [Ask(public), Ask(private)]


def test_a_new_controller_is_told_everything_while_answers_go_on() -> None:
    talk = settled()
    talk.use({API: {ACME}, DB: {ACME}})
    (admit,) = talk._heard(talk.keeper.readmit())
    assert isinstance(admit, Admit)
    assert (admit.target, admit.slots4) == (API, (ONE,) * 4)
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})
    assert talk.keeper.admitted(API, admit.serial - 1) == []  # the old controller's word counts no more
    assert talk.admitted() == [Settled(API)]


def test_static_hosts_win_and_need_no_upstream() -> None:
    talk = Talk(static={"api.example.com": (ONE, SIX)}, upstream=False)
    ask_free = talk.use({API: {ACME}, DB: {ACME}})
    assert kinds(ask_free) == [Admit, Admit]
    for command in ask_free:
        assert isinstance(command, Admit)
        talk.keeper.admitted(command.target, command.serial)
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})
    failure = talk.keeper.standing(DB).failure
    assert failure == Failure(22, "no upstream is configured and db.example is not among the static hosts")
    for _ in range(20):
        assert not any(isinstance(c, Ask) for c in talk.after(4000))


def test_static_hosts_are_sifted_too() -> None:
    talk = Talk(static={"api.example.com": (ip_address("10.0.0.1"),)}, upstream=False)
    assert kinds(talk.use({API: {ACME}})) == [Note, Admit]


# ---- names of wildcards


def adoptable(talk: Talk, target: Target = API) -> Standing:
    standing, notes = talk.keeper.judge(target, (found(ONE), found(SIX)), now=talk.now)
    assert notes == []
    return standing


def test_adopted_is_answered_at_once_and_refreshed_like_others() -> None:
    talk = Talk()
    standing = adoptable(talk)
    assert talk.keeper.adopt(API, ACME, standing, seen=talk.now) == []
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme"})
    assert talk.keeper.next_due() == talk.now + 90
    assert talk.after(90) == [Ask(API)]
    assert kinds(talk.found(API, found(TWO), found(SIX))) == [Admit]
    assert talk.known()[1] == ONE
    talk.admitted()
    assert talk.known()[1] == TWO


def test_adopted_beside_somebody_elses_with_the_same_ways_needs_no_second_word() -> None:
    talk = settled()
    standing = talk.keeper.shortcut(API, now=talk.now)
    assert standing is not None
    assert talk.keeper.adopt(API, ZETA, standing, seen=talk.now) == []
    assert talk.known()[3] == {"acme", "zeta"}


def test_adopted_with_other_ways_is_not_answered_before_the_kernel_has_them() -> None:
    talk = settled()
    standing = adoptable(talk)
    talk.after(90)
    talk.found(API, found(TWO), found(SIX))
    talk.admitted()
    (admit,) = talk._heard(talk.keeper.adopt(API, ZETA, standing, seen=talk.now))
    assert isinstance(admit, Admit)
    assert admit.slots4 == (TWO,) * 4
    assert talk.known()[3] == {"acme"}
    talk.admitted()
    assert talk.known()[3] == {"acme", "zeta"}


def test_adopted_while_the_others_have_no_luck_helps_them() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, LOST, LOST)
    talk.admitted()
    assert talk.keeper.shortcut(API, now=talk.now) is None
    (admit,) = talk._heard(talk.keeper.adopt(API, ZETA, adoptable(talk), seen=talk.now))
    assert isinstance(admit, Admit)
    assert admit.slots4 == (ONE,) * 4
    talk.admitted()
    assert talk.known() == (State.KNOWN, ONE, SIX, {"acme", "zeta"})


def test_leaving_takes_only_ones_own() -> None:
    talk = settled()
    talk.keeper.adopt(API, ZETA, adoptable(talk), seen=talk.now)
    assert talk.keeper.leave(API, ZETA) == [Settled(API)]
    assert talk.keeper.leave(API, ZETA) == []
    assert talk.known()[3] == {"acme"}
    assert talk.keeper.leave(API, ACME) == [Settled(API)]
    assert (len(talk.keeper), talk.keeper.next_due()) == (0, None)


def test_leaving_while_the_kernel_is_asked_is_not_undone_by_its_answer() -> None:
    talk = settled()
    talk.use({API: {ACME, ZETA}})
    talk.keeper.leave(API, ZETA)
    talk.admitted()
    assert talk.known()[3] == {"acme"}


def test_judging_keeps_nothing() -> None:
    talk = Talk()
    adoptable(talk)
    assert (len(talk.keeper), talk.keeper.next_due()) == (0, None)
    talk = settled()
    before = talk.keeper.standing(API)
    standing, notes = talk.keeper.judge(API, (found(ip_address("10.0.0.5")), LOST), now=talk.now)
    assert [note.event for note in notes] == ["dns-refused-address"]
    assert standing.v6.slots == before.v6.slots  # the last good ones
    assert talk.keeper.standing(API) == before
    assert talk.keeper.next_due() == talk.now + 90


# ---- the controller refuses addresses

US, USA = "it is in us-east-1 (US)", "it is in us-west-2 (US)"
THREE, FOUR, FIVE = (ip_address(f"93.184.215.{n}") for n in (16, 17, 18))
SEVEN, EIGHT = ip_address("2606:2800::7"), ip_address("2606:2800::8")


def blocked(why: str) -> Failure:
    return Failure(15, f"every address of api.example.com is refused: {why}", Reason.RESIDENCY)


def test_what_is_refused_is_left_out_and_the_others_take_its_slots() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE, TWO), found(SIX, SEVEN))
    done, admit = talk.admitted(refused={ONE: US, SEVEN: US})
    assert done == Settled(API)
    # nothing is answered that the kernel does not lead to
    known = talk.keeper.standing(API)
    assert (known.v4.slots, known.v6.slots) == ((None, TWO, None, TWO), (SIX, None, SIX, None))
    assert admit == Admit(API, (TWO,) * 4, (SIX,) * 4, 2)
    assert talk.admitted() == [Settled(API)]
    assert talk.known() == (State.KNOWN, TWO, SIX, {"acme"})


def test_of_more_addresses_than_slots_each_gets_its_turn() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    (admit,) = talk.found(API, found(ONE, TWO, THREE, FOUR, FIVE, ip_address("93.184.215.19")), NONE)
    assert isinstance(admit, Admit) and admit.slots4 == (ONE, TWO, THREE, FOUR)
    _, admit = talk.admitted(refused=dict.fromkeys((ONE, TWO, THREE, FOUR), US))
    assert talk.known() == (State.PENDING, None, None, {"acme"})  # who asks waits a moment longer
    assert isinstance(admit, Admit) and set(admit.slots4) == {FIVE, ip_address("93.184.215.19")}
    _, admit = talk.admitted(refused={FIVE: USA})
    assert isinstance(admit, Admit) and set(admit.slots4) == {ip_address("93.184.215.19")}
    talk.admitted()
    assert talk.known()[:2] == (State.KNOWN, ip_address("93.184.215.19"))


@pytest.mark.parametrize(("v4", "v6"), [((ONE,), ()), ((), (SIX,)), ((ONE,), (SIX,))])
def test_with_none_left_the_reason_is_what_is_answered(
    v4: tuple[Address, ...], v6: tuple[Address, ...]
) -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(*v4), found(*v6))
    commands = talk.admitted(refused=dict.fromkeys((*v4, *v6), US))
    assert kinds(commands) == [Settled, Settled]  # no address, so nothing more for the kernel
    standing = talk.keeper.standing(API)
    assert (standing.state, standing.failure) == (State.FAILED, blocked(US))
    assert (standing.v4.slots, standing.v6.slots) == (EMPTY, EMPTY)


@pytest.mark.parametrize("family", [0, 1])
def test_each_family_is_refused_for_itself(family: int) -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE), found(SIX))
    talk.admitted(refused={(ONE, SIX)[family]: US})
    standing = talk.keeper.standing(API)
    refused, led = (standing.v4, standing.v6) if family == 0 else (standing.v6, standing.v4)
    assert standing.state is State.KNOWN
    assert (refused.slots, refused.failure) == (EMPTY, blocked(US))
    assert (led.slots[0], led.failure) == ((SIX, ONE)[family], None)


def test_a_record_that_moves_out_takes_the_way_away_within_one_refresh() -> None:
    talk = settled()
    talk.after(90)
    talk.found(API, found(TWO), found(SEVEN))
    assert talk.known()[1:3] == (ONE, SIX)  # until the kernel leads elsewhere
    talk.admitted(refused={TWO: US, SEVEN: US})
    standing = talk.keeper.standing(API)
    assert (standing.state, standing.failure) == (State.FAILED, blocked(US))
    assert talk.keeper.next_due() == talk.now + 90  # and is looked at again as ever


def test_and_back() -> None:
    talk = settled()
    talk.after(90)
    talk.found(API, found(TWO), NONE)
    talk.admitted(refused={TWO: US})
    talk.after(90)
    assert talk.found(API, found(TWO), NONE) == []  # known to be refused: nobody is asked again
    talk.after(90)
    (admit,) = talk.found(API, found(TWO, ONE), NONE)
    assert isinstance(admit, Admit) and set(admit.slots4) == {ONE}
    talk.admitted()
    assert talk.known()[:2] == (State.KNOWN, ONE)


def test_only_what_is_found_is_remembered_as_refused() -> None:
    talk = settled()
    for n in range(100):
        talk.after(90)
        talk.found(API, found(ip_address(f"93.184.216.{n}")), NONE)
        talk.admitted(refused={ip_address(f"93.184.216.{n}"): US})
    assert len(talk.keeper._entries[API].refused) == 1
    talk.after(90)
    assert kinds(talk.found(API, found(ip_address("93.184.216.0")), NONE)) == [Admit]  # shown once more


def test_a_refusal_of_what_was_not_proposed_changes_nothing() -> None:
    talk = settled()
    talk.after(90)
    talk.found(API, found(TWO), found(SIX))
    assert talk.admitted(refused={THREE: US}) == [Settled(API)]
    assert talk.known() == (State.KNOWN, TWO, SIX, {"acme"})


def test_withheld_after_a_refusal_is_no_eternal_wait() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE, TWO, THREE, FOUR, FIVE), NONE)
    talk.admitted(refused=dict.fromkeys((ONE, TWO, THREE, FOUR), US))
    assert talk.known()[0] is State.PENDING
    talk.withheld()
    assert talk.known()[0] is State.FAILED
    assert talk.after(1) == [Ask(API)]


def test_what_upstream_fails_to_say_leaves_refused_what_was() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE, TWO), NONE)
    talk.admitted(refused={ONE: US})
    talk.admitted()
    talk.after(90)
    assert talk.found(API, LOST, LOST) == []
    assert talk.known()[:2] == (State.KNOWN, TWO)


def test_other_terms_are_another_target() -> None:
    talk = settled()
    pinned, moved = Target(API.host, False, "EU 01"), Target(API.host, False, "EU 02")
    commands = talk.use({API: {ZETA}, pinned: {ACME}})
    assert [type(c) for c in commands] == [Admit, Ask] and commands[1] == Ask(pinned)
    talk.found(pinned, found(ONE), NONE)
    talk.admitted(pinned, refused={ONE: US})
    assert talk.known(pinned)[0] is State.FAILED
    assert talk.known(API) == (State.KNOWN, ONE, SIX, set())  # zeta has yet to be admitted
    commands = talk.use({API: {ZETA}, moved: {ACME}})
    assert [c for c in commands if not isinstance(c, Admit)] == [Settled(pinned), Ask(moved)]
    assert talk.known(moved)[0] is State.PENDING
    talk.found(moved, found(ONE), NONE)
    talk.admitted(moved)
    assert talk.known(moved)[:2] == (State.KNOWN, ONE)


def test_a_new_controller_judges_again_what_the_old_one_refused() -> None:
    talk = Talk()
    talk.use({API: {ACME}})
    talk.found(API, found(ONE), NONE)
    talk.admitted(refused={ONE: US})
    (admit,) = talk._heard(talk.keeper.readmit())
    assert isinstance(admit, Admit) and admit.slots4 == (ONE,) * 4
    assert talk.known()[0] is State.FAILED  # until it has
    talk.admitted(refused={ONE: USA})
    assert talk.keeper.standing(API).failure == blocked(USA)
    talk.keeper.readmit()
    talk.serial += 1
    talk.admitted()
    assert talk.known()[:2] == (State.KNOWN, ONE)


def test_a_name_of_a_wildcard_is_adopted_without_what_was_refused_of_it() -> None:
    talk = Talk()
    standing, _ = talk.keeper.judge(API, (found(ONE, TWO, THREE, FOUR, FIVE), found(SIX)), now=talk.now)
    (admit,) = talk._heard(talk.keeper.adopt(API, ACME, standing, seen=talk.now, refused={ONE: US, SIX: US}))
    known = talk.keeper.standing(API)
    assert (known.v4.slots, known.v6.slots) == ((None, TWO, THREE, FOUR), EMPTY)
    assert isinstance(admit, Admit) and admit.slots4 == (FIVE, TWO, THREE, FOUR)
    talk.admitted()
    assert talk.keeper.standing(API).v6.failure == blocked(US)
