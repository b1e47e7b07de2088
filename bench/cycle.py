"""A whole request: from the moment an asker says it over the service's socket to the answer that all of it is
destroyed again.

Everything is real and in the lab: egressd, the service as an account without any privilege, its zygote and
runners, a store that `egressctl ingest` filled from the documents' front matter, tokens signed by a provider
whose keys are in a file. The asker is this process, with a connection that stays, and a token per request.
The command is `true`, so what is measured is everything but a model. Every answer is checked: so many files
shown, ended with 0, destroyed; and for the last one the journal says how many were discarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from bench import request, scene
from bench.figures import Figure, Report, interleaved
from egressd.access.identifiers import identifier
from egressd.broker.client import Answered, Broker, Result
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import VENV, Lab, poll

__all__ = ["Cycles", "Source", "Stand", "ingested", "measure", "stand"]

BROKER = 4301  # the service's account; nobody knows it but egressd
_ISSUER, _AUDIENCE = "https://idp.test/", "the-product"
_NAME = "bench"  # of the provider, in principals
_POLICY = f"""\
workspace: acme
guard: enforce
members: [user:{BROKER}]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
"""
_STEPS = ("project", "start", "run", "destroy")  # as a receipt names them; `run` is the command's
_WITHIN = 250.0  # milliseconds: what a whole request may take


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 41,
    sizes: tuple[int, ...] = request.SIZES,
    repeats: int = 11,
    plots: Path | None = request.RESULTS,
) -> None:
    """The parts (request.py), and the whole."""
    request.measure(report, rounds=rounds, sizes=sizes, repeats=repeats, plots=plots)
    with stand(given) as made:
        _whole(report, made, rounds)
        _growth(report, made, sizes, repeats, plots)


def _whole(report: Report, at: Stand, rounds: int) -> None:
    source = ingested(at, "handbook", request.CANDIDATES, request.CLEARED)
    cycles, nothing = Cycles(at, source.documents, request.CLEARED), Cycles(at, (), 0)
    cycles.once()  # the first finds neither the store nor a document in memory
    cycles.steps.clear()
    found = interleaved(rounds, {"whole": cycles.once, "nothing": nothing.once, "decided": cycles.decided})
    discarded = at.discarded(cycles.last)
    if discarded != request.CANDIDATES - request.CLEARED:
        raise RuntimeError(f"{discarded} were discarded")
    median, steps = statistics.median(found["whole"]), cycles.medians()
    decide = round(statistics.median(found["decided"]), 2)
    rest = round(steps.pop("rest") - decide, 2)
    report.add(
        Figure.alone(
            "request_cycle_ms", found["whole"], "ms",
            details={
                "target": f"at most {_WITHIN:g} ms", "met": median <= _WITHIN,
                "files": request.CLEARED, "discarded": discarded, "command_ms": steps.pop("run"),
                "where_the_time_goes_ms": {"decide": decide, **steps, "rest": rest},
            },
        )
    )  # fmt: skip
    report.add(
        Figure.alone(
            "request_cycle_nothing_shown", found["nothing"], "ms",
            details={"where_the_time_goes_ms": nothing.medians()},
        )
    )  # fmt: skip
    report.add(Figure.alone("request_decided", found["decided"], "ms"))
    report.add(Figure("request_ingest_rate", request.CANDIDATES / source.seconds, "documents/s"))


def _growth(report: Report, at: Stand, sizes: tuple[int, ...], repeats: int, plots: Path | None) -> None:
    """Of the whole, over another source. A request has costs that its candidates do not change, so compared
    is what each further candidate costs: up to the largest size, and up to the one before that."""
    count = max(sizes)
    source = ingested(at, "archive", count, count * request.CLEARED // request.CANDIDATES)
    chance = random.Random(11)
    asked = {size: chance.sample(source.documents, size) for size in sizes}
    cycles = {size: Cycles(at, asked[size], len(source.shown.intersection(asked[size]))) for size in sizes}
    found = interleaved(repeats, {str(size): cycles[size].once for size in sizes})
    medians = {size: statistics.median(found[str(size)]) for size in sizes}
    least, before = min(sizes), sorted(sizes)[-2:][0] if len(sizes) > 2 else count

    def each(size: int) -> float:
        return (medians[size] - medians[least]) / (size - least) * 1e3

    report.add(
        Figure(
            "request_cycle_growth_per_candidate", each(count), "us", each(before), target=("at most", 1.1),
            details={
                "ms_by_candidates": {str(size): round(ms, 2) for size, ms in medians.items()},
                "exponent": round(request.exponent(medians), 3),
                "against_linear": round(medians[count] / (medians[least] * count / least), 4),
                "where_the_time_goes_ms": cycles[count].medians(),
                "documents_ingested_per_s": round(count / source.seconds),
            },
        )
    )  # fmt: skip
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        (plots / "request-cycle-growth.svg").write_text(request.plot(medians))


@dataclass(frozen=True)
class Source:
    """One that was ingested: identifiers, and how long that took."""

    documents: tuple[str, ...]
    shown: frozenset[str]  # to the asker
    seconds: float


def ingested(at: Stand, name: str, count: int, cleared: int) -> Source:
    root = at.place / name
    root.mkdir()
    readable = request.write_vault(root, count=count, cleared=cleared)
    seconds = at.ingest(name)

    def identified(paths: Iterable[Path]) -> Iterator[str]:
        return (identifier(name, os.fsencode(path.relative_to(root))) for path in paths)

    return Source(tuple(sorted(identified(root.rglob("*.md")))), frozenset(identified(readable)), seconds)


class Stand:
    """The service in the lab, and an asker. `place` is where sources are put; none is there yet."""

    def __init__(self, lab: Lab, daemon: Daemon) -> None:
        self._lab, self._daemon = lab, daemon
        self.place, self._inside = lab.path("request"), lab.inside("request")
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._write()
        argv = [str(VENV / "bin" / "egressd-broker"), "--config", f"{self._inside}/broker.yaml"]
        self.process = lab.start(argv, uid=BROKER)
        poll(lambda: "ready\n" in self.process.out or self.process.status() is not None, timeout=30)
        if self.process.status() is not None:
            raise RuntimeError(f"the service did not start: {self.process.err}")

    def close(self) -> None:
        self.process.signal(15)
        if self.process.wait(30) != 0:
            raise RuntimeError(f"the service did not end well: {self.process.err}")

    def _write(self) -> None:
        for name in ("store", "run"):
            (self.place / name).mkdir(parents=True)
            self._lab.run(["chown", f"{BROKER}:{BROKER}", f"{self._inside}/{name}"]).check()
        self.place.chmod(0o755)
        algorithm = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256)
        public = algorithm.to_jwk(self._key.public_key(), as_dict=True) | {"kid": "k1", "alg": "ES256"}
        public.pop("key_ops", None)
        (self.place / "jwks.json").write_text(json.dumps({"keys": [public]}))
        (self.place / "broker.yaml").write_text(yaml.safe_dump(self._config()))

    def _config(self) -> dict[str, Any]:
        keys = f"{self._inside}/jwks.json"
        return {
            "listen": f"unix:{self._inside}/run/broker.sock",
            "store": f"sqlite:///{self._inside}/store/store.db",
            "run_dir": self._daemon.run_dir,
            "issuers": {_NAME: {"issuer": _ISSUER, "audience": _AUDIENCE, "jwks_file": keys}},
            "workspaces": {"acme": {"inferences": {"default": {"command": ["true"]}}}},
            "limits": {"rate": "100000/s", "candidates": max(request.SIZES)},
            "keep": "1s",
        }

    def administer(self, *words: str, good: tuple[int, ...] = (0,)) -> None:
        """As the store's owner."""
        where = [
            "-w",
            "acme",
            "--broker-config",
            f"{self._inside}/broker.yaml",
            "--run-dir",
            self._daemon.run_dir,
        ]
        done = self._lab.run([str(VENV / "bin" / "egressctl"), *words, *where], uid=BROKER, timeout=300)
        if done.status not in good:
            done.check()

    def ingest(self, source: str) -> float:
        """What lies in `place / source`, by its front matter. Seconds of the whole command."""
        began = time.monotonic()
        # 1: nobody may read them yet, since nothing is believed of a source that nobody has spoken of.
        self.administer("ingest", f"{self._inside}/{source}", "--source", source, good=(0, 1))
        seconds = time.monotonic() - began
        self.administer("source", "trust", source, "--front-matter", "on")
        return seconds

    def asker(self) -> Broker:
        """With a token of its own: none was seen before."""
        now = int(time.time())
        claims = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": "asker", "groups": ["staff", "advice"]}
        token = jwt.encode(
            claims | {"iat": now, "exp": now + 600}, self._key, algorithm="ES256", headers={"kid": "k1"}
        )
        return Broker(f"unix:{self.place}/run/broker.sock", token=token)

    def discarded(self, request: str) -> int:
        """As the journal has it."""
        found: list[dict[str, Any]] = []

        def told() -> bool:
            text = self._daemon.ctl("--json", "audit", "--request", request).check().out
            found[:] = [json.loads(line) for line in text.splitlines()]
            return any(record["event"] == "request-asked" for record in found)

        poll(told, timeout=10, what=f"the journal tells of {request}")
        return next(int(one["fields"]["discarded"]) for one in found if one["event"] == "request-asked")


@contextlib.contextmanager
def stand(given: tuple[Lab, Internet] | None = None) -> Iterator[Stand]:
    with contextlib.ExitStack() as stack:
        lab, _ = stack.enter_context(scene.stage(given))
        daemon = stack.enter_context(scene.started(lab, {"acme": _POLICY}, brokers=[str(BROKER)]))
        stack.callback(lambda: lab.run(["rm", "-rf", lab.inside("request")]).check())
        made = stack.enter_context(contextlib.closing(Stand(lab, daemon)))
        role = ["--role", "viewer", "--clearance", "internal"]
        made.administer("member", "add", f"group:{_NAME}:staff", *role)
        made.administer("barrier", "add", f"group:{_NAME}:advice", f"group:{_NAME}:trading")
        yield made
        scene.alarms(daemon)


class Cycles:
    """Requests for candidates of one kind: how long each took, and where the time went. Milliseconds."""

    def __init__(self, at: Stand, candidates: Sequence[str], shown: int) -> None:
        self._at, self._candidates, self._shown = at, candidates, shown
        self.steps: dict[str, list[float]] = {}
        self.last = ""  # number of the last request

    def once(self) -> float:
        """The whole of it, from the request's first byte to the answer's last."""
        with self._at.asker() as asker:
            _connected(asker)
            began = time.perf_counter()
            result = asker.ask(**self._asked())
            taken = (time.perf_counter() - began) * 1e3
        self._check(result)
        self.last = result.id
        steps = {name: result.receipt["times"]["steps"][name] * 1e3 for name in _STEPS}
        for name, spent in {**steps, "rest": taken - sum(steps.values())}.items():
            self.steps.setdefault(name, []).append(spent)
        return taken

    def decided(self) -> float:
        """The same, and one document that does not exist must be shown: so nothing comes after deciding."""
        with self._at.asker() as asker:
            _connected(asker)
            began = time.perf_counter()
            try:
                asker.ask(**self._asked(), files=["handbook:none.md"])
            except Answered as answer:
                if answer.status != 404:
                    raise
                return (time.perf_counter() - began) * 1e3
        raise RuntimeError("a document that does not exist was shown")

    def _asked(self) -> dict[str, Any]:
        return {"workspace": "acme", "inference": "default", "candidates": self._candidates}

    def _check(self, result: Result) -> None:
        if (result.state, result.status) != ("ended", 0) or not result.receipt["destroyed"]:
            raise RuntimeError(f"the request came to nothing: {result}")
        if len(result.receipt["files"]) != self._shown:
            raise RuntimeError(f"{len(result.receipt['files'])} files were shown, not {self._shown}")

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 2) for name, values in self.steps.items()}


def _connected(asker: Broker) -> None:
    """An asker has asked before."""
    asker.list()
