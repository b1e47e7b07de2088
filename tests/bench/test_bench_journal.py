"""The journal's benchmark, with tiny counts: that it measures what it says, and leaves nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.figures import Figure, Report

from bench import journal, journald

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="benchmarks measure as root what an ordinary user gets"),
]
needs_journald = pytest.mark.skipif(not journald.installed(), reason="needs systemd-journald")


def figures(report: Report) -> dict[str, Figure]:
    return {figure.name: figure for figure in report.figures}


def mounts() -> list[str]:
    return sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def left_over() -> set[Path]:
    return set(Path("/var/tmp").glob("egressd-bench-*"))


def processes() -> set[str]:
    """Of ours: what has inherited this program as its ancestor."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def is_paired(figure: Figure) -> bool:
    return figure.ours > 0 and figure.theirs is not None and figure.theirs > 0


@needs_journald
def test_auditor_and_journald_write_the_same_records_and_nothing_stays() -> None:
    report = Report("journal", say=lambda _: None)
    before = mounts(), left_over(), processes(), os.sched_getaffinity(0)
    journal.records_per_second(report, rounds=2, count=300)
    assert (mounts(), left_over(), processes(), os.sched_getaffinity(0)) == before
    found = figures(report)
    assert set(found) == {
        "journal_records_per_s",
        "journal_records_per_s_vs_sealed",
        "journal_record_processor",
        "journal_record_processor_vs_sealed",
        "journal_writer_records_per_s",
        "journal_disk_bytes_per_record",
    }
    assert all(map(is_paired, found.values()))
    assert 200 < found["journal_disk_bytes_per_record"].ours < 2000
    assert found["journal_records_per_s"].target == ("at least", 2.0)


def test_without_journald_it_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journald, "installed", lambda: False)
    report = Report("journal", say=lambda _: None)
    journal.records_per_second(report, rounds=1, count=100)
    found = figures(report)
    assert set(found) == {
        "journal_records_per_s", "journal_writer_records_per_s", "journal_disk_bytes_per_record",
    }  # fmt: skip
    assert all(figure.ours > 0 and figure.ratio is None for figure in found.values())


def test_a_record_that_is_missing_ends_the_run() -> None:
    with journal._alone(50, os.sched_getaffinity(0), os.sched_getaffinity(0)) as alone:
        alone.write()
        with pytest.raises(RuntimeError, match="of 51 records 50 are in the journal"):
            alone.check(51)
        assert alone.check(50) > 50 * 200


@needs_journald
def test_journald_sees_only_what_it_is_told_and_the_machine_sees_nothing_of_it() -> None:
    own = Path("/etc/machine-id").read_text()
    with journald.started() as peer:
        peer.write([peer.datagram(b"a line"), peer.datagram(b"another")])
        assert peer.entries() == 2
        assert peer.octets() > 0
        assert Path("/etc/machine-id").read_text() == own
        assert not Path(f"/proc/{peer.pid}/root/run/log/journal").exists()  # volatile: nothing
        assert not list(Path("/var/log").glob("journal/e6e55d*"))
        assert Path(f"/proc/{peer.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def test_answers_and_spawns_are_measured_in_storms_and_without(lab: Any, internet: Any) -> None:
    report = Report("journal", say=lambda _: None)
    with lab.leaving_nothing():
        journal.latency(report, lab, internet, rounds=1, questions=5, spawns=1)
    found = figures(report)
    assert set(found) == {
        f"{name}{suffix}"
        for what in ("dns", "spawn")
        for name, suffix in (
            (f"journal_added_latency_{what}", ""),
            (f"journal_added_latency_{what}", "_vs_allowed_storm"),
            (f"journal_allowed_storm_{what}", ""),
        )
    }
    assert all(map(is_paired, found.values()))
    storm = found["journal_added_latency_dns"].details["storm"]
    assert storm["datagrams_per_second"] > 1000
    assert storm["of_a_core_the_auditor"] > 0


def test_proofs_and_journals_are_checked() -> None:
    report = Report("journal", say=lambda _: None)
    before = left_over()
    journal.verification_speed(report, rounds=1, count=40)
    assert left_over() == before
    found = figures(report)
    assert set(found) == {"verify_records_per_s", "verify_journal_records_per_s"}
    assert found["verify_records_per_s"].details["records"] >= 40
    assert all(figure.ours > 0 for figure in found.values())
