"""Which server is asked first, as a dialogue with a clock of its own."""

from __future__ import annotations

from egressd.dns.exchange import Server
from egressd.dns.health import Health

ONE, TWO, SIX = map(Server.parse, ("udp://192.0.2.1", "udp://192.0.2.2", "udp://[2001:db8::1]"))
ALL = (ONE, TWO, SIX)


def test_as_configured_while_nothing_is_known() -> None:
    assert Health(ALL).order(now=0) == ALL


def test_one_failure_puts_a_server_last_and_one_answer_back() -> None:
    health = Health(ALL)
    health.failed(ONE, now=10)
    assert health.order(now=10) == (TWO, SIX, ONE)
    health.failed(TWO, now=10)
    assert health.order(now=10) == (SIX, ONE, TWO)
    health.answered(ONE, trip=0.01, now=11)
    assert health.order(now=11) == (ONE, SIX, TWO)


def test_much_slower_is_later_but_not_for_ever() -> None:
    health = Health(ALL)
    health.answered(ONE, trip=0.4, now=0)
    health.answered(TWO, trip=0.1, now=0)
    assert health.order(now=1) == (TWO, SIX, ONE)
    health.answered(ONE, trip=0.3, now=2)  # smoothed: still slow
    assert health.order(now=2)[-1] == ONE
    assert health.order(now=63) == ALL


def test_a_little_slower_is_no_reason() -> None:
    health = Health((ONE, TWO))
    health.answered(ONE, trip=0.05, now=0)
    health.answered(TWO, trip=0.002, now=0)
    assert health.order(now=1) == (ONE, TWO)


def test_probes_come_with_growing_pauses_and_one_at_a_time() -> None:
    health = Health((ONE, TWO))
    health.failed(ONE, now=0)
    assert health.probe(now=0.9) is None
    moments, now = [], 0.0
    while len(moments) < 9:
        now += 0.25
        if health.probe(now=now) is not None:
            assert health.probe(now=now) is None
            health.failed(ONE, now=now + 0.1)
            moments.append(now)
    pauses = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    health.answered(ONE, trip=0.01, now=now)
    assert not health.is_down(ONE)
    assert health.probe(now=now + 100) is None
    health.failed(ONE, now=now + 100)
    assert health.probe(now=now + 101) == ONE  # the pauses begin anew


def test_many_questions_that_fail_together_are_one_failure() -> None:
    health = Health((ONE, TWO))
    for _ in range(50):
        health.failed(ONE, now=0.5)
    assert health.probe(now=1.5) == ONE


def test_when_all_are_down_all_are_tried_and_none_is_probed() -> None:
    health = Health((ONE, TWO))
    health.failed(ONE, now=0)
    health.failed(TWO, now=0)
    assert health.order(now=9) == (ONE, TWO)
    assert health.probe(now=9) is None
