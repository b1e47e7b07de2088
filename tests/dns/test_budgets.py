"""Budgets: what is spent, what comes back, and that no interleaving gets more than there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.dns.budgets import DAY, Account, Bucket, Spent
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Budget, Budgets

SMALL = Budgets(sandbox=Budget(names=3, bytes=20, rate=2), workspace=Budget(names=5, bytes=40, rate=3))
WIDE = Budget(names=10**6, bytes=10**9, rate=10**6)


def reason(spent: Spent | None) -> Reason | None:
    return spent.reason if spent else None


@pytest.mark.parametrize(
    ("budgets", "cost", "held", "expected", "text"),
    [
        (SMALL, 20, 0, None, ""),
        (SMALL, 21, 0, Reason.BUDGET_BYTES, "this sandbox for bytes in names of wildcards is spent: 20 in"),
        (SMALL, 1, 4, None, ""),
        (SMALL, 1, 5, Reason.BUDGET_NAMES, "this workspace for names of wildcards is spent: 5 at a time"),
        (Budgets(WIDE, Budget(9, 40, 3)), 41, 0, Reason.BUDGET_BYTES, "this workspace for bytes"),
        (Budgets(Budget(0, 9, 9), WIDE), 1, 0, Reason.BUDGET_NAMES, "this sandbox for names"),
        (Budgets(WIDE, Budget(0, 9, 9)), 1, 0, Reason.BUDGET_NAMES, "this workspace for names"),
        (Budgets(WIDE, Budget(9, 0, 9)), 1, 0, Reason.BUDGET_BYTES, "this workspace"),
        # the sandbox's own comes first: that is what its owner can do something about
        (Budgets(Budget(0, 0, 1), Budget(0, 0, 1)), 9, 9, Reason.BUDGET_NAMES, "this sandbox"),
    ],
)
def test_first_question(budgets: Budgets, cost: int, held: int, expected: Reason | None, text: str) -> None:
    spent = Account(budgets, now=0).charge(1, "a.example", cost, held=held, now=0)
    assert reason(spent) == expected
    assert text in (spent.text if spent else "")


def test_the_same_name_counts_once_but_its_bytes_each_time() -> None:
    account = Account(SMALL, now=0)
    for second in range(4):
        assert account.charge(1, "a.example", 5, held=0, now=second) is None
    assert reason(account.charge(1, "a.example", 1, held=0, now=9)) == Reason.BUDGET_BYTES


def test_what_is_refused_costs_nothing() -> None:
    account = Account(SMALL, now=0)
    for _ in range(100):
        assert reason(account.charge(1, "a.example", 21, held=0, now=0)) == Reason.BUDGET_BYTES
        assert reason(account.charge(1, "a.example", 1, held=5, now=0)) == Reason.BUDGET_NAMES
    assert account.charge(1, "a.example", 20, held=0, now=0) is None


def test_rates_of_a_sandbox_and_of_all_of_them() -> None:
    account = Account(SMALL, now=0)
    ask = [account.charge(link, f"{n}.example", 1, held=0, now=0) for n, link in enumerate((1, 1, 1, 2, 2))]
    assert [reason(a) for a in ask] == [None, None, Reason.BUDGET_RATE, None, Reason.BUDGET_RATE]
    assert "this sandbox asks" in (ask[2].text if ask[2] else "")
    assert "this workspace asks" in (ask[4].text if ask[4] else "")
    assert account.charge(2, "x.example", 1, held=0, now=0.34) is None  # a third of a second is one of three


def test_a_rate_below_one_lets_one_through() -> None:
    account = Account(Budgets(Budget(9, 99, 0.1), WIDE), now=0)
    assert account.charge(1, "a.example", 1, held=0, now=0) is None
    assert reason(account.charge(1, "b.example", 1, held=0, now=9.9)) == Reason.BUDGET_RATE
    assert account.charge(1, "b.example", 1, held=0, now=10) is None


def test_a_sandbox_that_ends_leaves_nothing_but_what_the_workspace_paid() -> None:
    account = Account(SMALL, now=0)
    assert account.charge(1, "a.example", 20, held=0, now=0) is None
    assert len(account) == 1
    account.close(1)
    assert len(account) == 0
    assert account.charge(2, "a.example", 20, held=0, now=1) is None
    assert reason(account.charge(3, "b.example", 1, held=0, now=2)) == Reason.BUDGET_BYTES
    assert account.charge(3, "b.example", 1, held=0, now=2 + DAY / 40) is None


def test_a_changed_budget_keeps_what_is_spent() -> None:
    account = Account(SMALL, now=0)
    account.charge(1, "a.example", 20, held=0, now=0)
    account.change(Budgets(Budget(3, 30, 2), Budget(5, 25, 3)), now=0)
    assert account.charge(1, "b.example", 5, held=0, now=0) is None
    assert reason(account.charge(2, "c.example", 1, held=0, now=0)) == Reason.BUDGET_BYTES
    account.change(SMALL, now=0)
    assert account.charge(2, "c.example", 15, held=0, now=0) is None


def test_a_clock_that_stands_or_goes_back_fills_nothing() -> None:
    bucket = Bucket.full(1, 1, now=100)
    bucket.take(1, now=100)
    assert not bucket.has(1, now=50)
    assert not bucket.has(1, now=100)
    assert bucket.has(1, now=101)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 40_000) | st.floats(0, 1),  # seconds since the step before
        st.integers(1, 3),  # link
        st.integers(0, 5),  # name
        st.integers(1, 12),  # bytes
        st.booleans(),  # does that sandbox end first
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_no_interleaving_gets_more(steps: list[tuple[float, int, int, int, bool]]) -> None:
    account, now, lives = Account(SMALL, now=0.0), 0.0, [0, 0, 0, 0]
    paid: list[tuple[float, int, str, int]] = []
    for pause, link, number, cost, ends in steps:
        now += pause
        if ends:
            account.close(link * 1000 + lives[link])
            lives[link] += 1
        life, name = link * 1000 + lives[link], f"{number}.example"
        if account.charge(life, name, cost, held=0, now=now) is None:
            paid.append((now, life, name, cost))
    for life in {entry[1] for entry in paid}:
        mine = [entry for entry in paid if entry[1] == life]
        assert len({name for _, _, name, _ in mine}) <= SMALL.sandbox.names
        assert sum(cost for *_, cost in mine) <= SMALL.sandbox.bytes
        _within_rate([at for at, *_ in mine], SMALL.sandbox.rate)
    _within_rate([at for at, *_ in paid], SMALL.workspace.rate)
    for start in [at for at, *_ in paid]:
        for end in [at for at, *_ in paid]:
            spent = sum(cost for at, *_, cost in paid if start <= at <= end)
            assert spent <= SMALL.workspace.bytes * (1 + max(end - start, 0) / DAY) + 1e-6


def _within_rate(moments: list[float], rate: float) -> None:
    for first, start in enumerate(moments):
        for number, end in enumerate(moments[first:], 1):
            assert number <= rate + (end - start) * rate + 1e-6
