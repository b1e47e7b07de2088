"""What a request's own two parts cost: deciding what may be seen, and copying exactly that. (The whole of it,
with store, service, sandbox and all, is in cycle.py.)

The vault has the shape of the published figure this is measured against (644 candidates, 298 of them for the
asker, 346 not; 4.2 seconds): Markdown of 2 to 200 KB, 23 KB on average, in nested directories, each with its
access list in its front matter. Both sides copy the same 298 files from a warm page cache to the same tmpfs;
removing the copies is not timed. Ours also opens each file beneath its root, hashes what it writes, and
writes the manifest. Every round is checked: so many files, and as many discarded, or the run ends.

The growth is of deciding and copying together, from a hundred candidates to ten thousand.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure, Report, interleaved
from egressd.access import front_matter, trust
from egressd.access.authorise import Cleared, authorise
from egressd.access.documents import LEVELS, Asker, Document, Rules
from egressd.access.identifiers import identifier
from egressd.access.principals import Identity
from egressd.access.roles import Role
from egressd.broker.runners.jobs import Copy
from egressd.vault import beneath, mounts
from egressd.vault.projection import Manifest, project, room

__all__ = [
    "CANDIDATES", "CLEARED", "RESULTS", "SIZES", "Vault", "exponent", "make_vault", "measure", "plot",
    "private_tmpfs", "write_vault",
]  # fmt: skip

CANDIDATES, CLEARED = 644, 298
SOURCE, ISSUER = "handbook", "bench"
SIZES = (100, 300, 1000, 3000, 10_000)  # candidates, of the growth
RESULTS = Path(__file__).resolve().parent / "results"
_SMALLEST, _BIGGEST = 2_000, 200_000  # bytes of a document
_RULES = Rules(barriers=frozenset({frozenset({"group:bench:advice", "group:bench:trading"})}))
_STAFF = frozenset({"group:bench:staff", "group:bench:advice"})
# Front matter that clears the asker, and four that do not: another list, a denial, a level, a barrier.
_OPEN = ("acl: {read: [group:bench:staff]}\nclearance: internal",)
_CLOSED = (
    "acl: {read: [group:bench:board]}\nclearance: internal",
    "acl: {read: [group:bench:staff], deny: ['user:bench:asker']}\nclearance: internal",
    "acl: {read: [group:bench:staff]}\nclearance: secret",
    "acl: {read: [group:bench:staff]}\nclearance: internal\ngroups: [group:bench:trading]",
)


@dataclass(frozen=True)
class Vault:
    """Documents on disk, as they are known once they are ingested, and somebody who asks for them."""

    root: Path
    documents: dict[str, Document]
    asker: Asker
    rules: Rules
    cleared: int  # of all of them

    def authorise(self, candidates: list[str]) -> Cleared:
        return authorise(self.asker, candidates, self.documents, self.rules)


def copies(cleared: Cleared) -> list[Copy]:
    """As the service gives them to a runner."""
    return [Copy(d.id, os.fsencode(d.root), d.path, d.size, d.digest) for d in cleared.documents]


# ---- the vault


def make_vault(root: Path, *, count: int = CANDIDATES, cleared: int = CLEARED, seed: int = 7) -> Vault:
    """`count` documents below the directory `root`, of which the asker may read exactly `cleared`."""
    write_vault(root, count=count, cleared=cleared, seed=seed)
    documents = {document.id: document for document in _ingested(root)}
    asker = Asker(Identity(ISSUER, "asker", _STAFF), Role.VIEWER, "internal")
    return Vault(root, documents, asker, _RULES, cleared)


def write_vault(root: Path, *, count: int = CANDIDATES, cleared: int = CLEARED, seed: int = 7) -> set[Path]:
    """Its files; which of them the asker may read."""
    chance = random.Random(seed)
    readable = set()
    text = _words(chance, 1 << 20)
    for number in range(count):
        may = number * cleared // count != (number + 1) * cleared // count
        said = chance.choice(_OPEN if may else _CLOSED)
        place = (
            root / f"team-{number % 9}" / f"area-{number % 5}" / f"{2015 + number % 10}" / f"note-{number}.md"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_document(chance, text, number, said))
        if may:
            readable.add(place)
    return readable


def _words(chance: random.Random, size: int) -> bytes:
    letters = "etaoinshrdlucmfw"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(4000)]
    return " ".join(chance.choices(words, k=size // 6)).encode()[:size]


def _document(chance: random.Random, text: bytes, number: int, said: str) -> bytes:
    size = min(_BIGGEST, max(_SMALLEST, int(chance.lognormvariate(9.7, 0.9))))
    head = f"---\ntitle: Note {number}\n{said}\n---\n\n# Note {number}\n\n".encode()
    start = chance.randrange(len(text) - size)
    return (head + text[start : start + size])[:size]


def _ingested(root: Path) -> Iterator[Document]:
    number = beneath.open_root(bytes(root))
    try:
        for found in beneath.walk(number):
            if isinstance(found, beneath.Skipped):
                raise RuntimeError(f"the vault holds {found}")
            contents = beneath.read_digest(number, found.path, limit=_BIGGEST)
            acl, clearance, groups, problem = _said(contents.head.partition(b"\n---\n")[0] + b"\n---\n")
            yield Document(
                identifier(SOURCE, found.path), str(root), found.path, contents.size, contents.digest,
                acl, clearance, groups, problem,
            )  # fmt: skip
    finally:
        os.close(number)


def _said(head: bytes) -> trust.Effective:
    """By its front matter alone, read once for all that say the same."""
    return _effective(b"\n".join(line for line in head.split(b"\n") if not line.startswith(b"title:")))


@functools.cache
def _effective(head: bytes) -> trust.Effective:
    return trust.effective(front_matter.read(head), None, trust.Trust(front_matter=True), LEVELS)


# ---- measuring


def measure(
    report: Report,
    *,
    rounds: int = 41,
    sizes: tuple[int, ...] = SIZES,
    repeats: int = 5,
    plots: Path | None = RESULTS,
) -> None:
    with _place() as top:
        _against_cp(report, top, rounds=rounds)
    with _place() as top:
        _growth(report, top, sizes=sizes, repeats=repeats, plots=plots)


@contextmanager
def _place() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="egressd-bench-"))
    try:
        (top / "vault").mkdir()
        (top / "at").mkdir()
        yield top
    finally:
        shutil.rmtree(top)


def private_tmpfs(at: Path, does: Callable[[], Any], *, size: int) -> Any:
    """What `does` returns (as JSON), in a child that has a tmpfs there which nobody else sees."""
    answer, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            mounts.enter_private_namespace()
            mounts.mount_tmpfs(str(at), size=size, inodes=100_000)
            with os.fdopen(tell, "w") as pipe:
                json.dump(does(), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(answer) as pipe:
        data = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise RuntimeError("what was to be measured failed; see above")
    return json.loads(data)


def _against_cp(report: Report, top: Path, *, rounds: int) -> None:
    vault = make_vault(top / "vault")
    chosen = _decided(vault, list(vault.documents))
    for copy in chosen:  # the same files, by other names: what cp is to copy, all of it
        place = top / "theirs" / os.fsdecode(copy.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(vault.root / os.fsdecode(copy.path))
    found = private_tmpfs(
        top / "at",
        lambda: interleaved(
            rounds,
            {"ours": lambda: _ours(vault, chosen, top / "at"), "cp": lambda: _cp(top / "theirs", top / "at")},
        ),
        size=1 << 28,
    )
    octets = sum(copy.size for copy in chosen)
    report.add(
        Figure.paired(
            "request_cycle_vs_rsync", found["ours"], found["cp"], "ms", target=("at most", 1.5),
            details={"files": len(chosen), "discarded": len(vault.documents) - len(chosen), "octets": octets},
        )
    )  # fmt: skip


def _decided(vault: Vault, candidates: list[str]) -> list[Copy]:
    decided = vault.authorise(candidates)
    if len(candidates) == len(vault.documents) and len(decided.documents) != vault.cleared:
        raise RuntimeError(f"{len(decided.documents)} documents were cleared, not {vault.cleared}")
    if len(decided.documents) + decided.discarded != len(candidates):
        raise RuntimeError("some candidate was neither cleared nor discarded")
    return copies(decided)


def _ours(vault: Vault, chosen: list[Copy], at: Path) -> float:
    """Milliseconds of a projection."""
    place = at / "ours"
    place.mkdir()
    began = time.perf_counter()
    manifest = project(chosen, str(place))
    taken = time.perf_counter() - began
    _check(manifest, len(chosen))
    _remove(place)
    return taken * 1e3


def _check(manifest: Manifest, count: int) -> None:
    if manifest.files != count:
        raise RuntimeError(f"{manifest.files} files were copied, not {count}")


def _cp(source: Path, at: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, at / "cp"], check=True)
    taken = time.perf_counter() - began
    _remove(at / "cp")
    return taken * 1e3


def _remove(place: Path) -> None:
    subprocess.run(["rm", "-rf", place], check=True)


# ---- growth


def _growth(report: Report, top: Path, *, sizes: tuple[int, ...], repeats: int, plots: Path | None) -> None:
    count = max(sizes)
    vault = make_vault(top / "vault", count=count, cleared=count * CLEARED // CANDIDATES)
    chance = random.Random(11)
    asked = {size: chance.sample(sorted(vault.documents), size) for size in sizes}
    whole = room(_decided(vault, asked[count]))
    found = private_tmpfs(
        top / "at",
        lambda: interleaved(
            repeats, {str(n): functools.partial(_decide_and_copy, vault, asked[n], top / "at") for n in sizes}
        ),
        size=2 * whole.octets,
    )
    medians = {size: statistics.median(found[str(size)]) for size in sizes}
    least = min(sizes)
    report.add(
        Figure(
            "request_growth_per_candidate", medians[count] / count * 1e3, "us", medians[least] / least * 1e3,
            target=("at most", 1.1),
            details={
                "ms_by_candidates": {str(size): round(ms, 3) for size, ms in medians.items()},
                "exponent": round(exponent(medians), 3),
            },
        )
    )  # fmt: skip
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        (plots / "request-growth.svg").write_text(plot(medians))


def _decide_and_copy(vault: Vault, candidates: list[str], at: Path) -> float:
    """Milliseconds."""
    place = at / "ours"
    place.mkdir()
    began = time.perf_counter()
    chosen = _decided(vault, candidates)
    manifest = project(chosen, str(place))
    taken = time.perf_counter() - began
    _check(manifest, len(chosen))
    _remove(place)
    return taken * 1e3


def exponent(points: dict[int, float]) -> float:
    """The slope of the least-squares line through the logarithms: 1 is linear."""
    if len(points) < 2:
        return math.nan
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(xs, ys).slope


_WIDTH, _HEIGHT, _MARGIN = 560, 360, 60


def plot(points: dict[int, float]) -> str:
    """SVG: milliseconds by candidates, both axes logarithmic; linear growth runs along the dashed line."""
    linear = points[min(points)] * max(points) / min(points)
    highest = max(*points.values(), linear)
    decades = (math.floor(math.log10(min(points.values()))), math.ceil(math.log10(highest)))
    left, right = math.log10(min(points)), math.log10(max(points))

    def x(value: float) -> float:
        return _MARGIN + (math.log10(value) - left) / ((right - left) or 1) * (_WIDTH - 2 * _MARGIN)

    def y(value: float) -> float:
        share = (math.log10(value) - decades[0]) / ((decades[1] - decades[0]) or 1)
        return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)

    first = min(points)
    parts = [
        f'<line x1="{x(first):.1f}" y1="{y(points[first]):.1f}" x2="{x(max(points)):.1f}"'
        f' y2="{y(linear):.1f}" stroke="#999" stroke-dasharray="4 4"/>',
        f'<polyline fill="none" stroke="#06c" stroke-width="2" points="'
        f'{" ".join(f"{x(n):.1f},{y(ms):.1f}" for n, ms in points.items())}"/>',
    ]
    for n, ms in points.items():
        parts.append(f'<circle cx="{x(n):.1f}" cy="{y(ms):.1f}" r="4" fill="#06c"/>')
        parts.append(f'<text x="{x(n) + 6:.1f}" y="{y(ms) + 16:.1f}">{ms:.3g} ms</text>')
        parts.append(f'<text x="{x(n):.1f}" y="{_HEIGHT - _MARGIN + 20}" text-anchor="middle">{n}</text>')
    for decade in range(decades[0], decades[1] + 1):
        height = f"{y(10.0**decade):.1f}"
        parts.append(f'<text x="{_MARGIN - 8}" y="{height}" text-anchor="end">{10.0**decade:g}</text>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">candidates (dashed: linear)</text>'
    )
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
