"""What privacy costs: a gradient step with it over one without, noise, the ledger, and ε by where the noise is drawn.

    python -m benchmarks.privacy [--json] [--quick]

``--quick`` runs the same code on small cases: a test of the benchmark, no measurement.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.secagg import Progress
from fedsecure.messages import Event
from fedsecure.privacy.accounting import calibrate, epsilon
from fedsecure.privacy.ledger import Ledger

ROOT = Path(__file__).resolve().parents[1]
# One thread; and an allocator that neither returns memory to the system nor maps large blocks anew at every step.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
DELTA, TARGET_EPSILON, ROUNDS = 1e-5, 2.0, 20
SITES = (3, 5, 10, 20)


@dataclass(frozen=True)
class Sizes:
    """What is measured; the names of the results are the same in both."""

    batches: dict[str, tuple[int, int, int]]  # records, repeats, repeats of Opacus
    linear: tuple[int, int, int]
    sampler: tuple[int, int]  # samples, repeats
    charges: int
    together: bool = False  # all cases in one process, whose start takes longer than small cases do


FULL = Sizes(
    batches={"b64": (64, 60, 20), "b256": (256, 40, 12), "b1024": (1024, 20, 4)},
    linear=(256, 200, 20),
    sampler=(10**6, 20),
    charges=200,
)
QUICK = Sizes(
    batches={"b64": (4, 2, 1), "b256": (5, 2, 1), "b1024": (6, 2, 1)},
    linear=(4, 2, 1),
    sampler=(1000, 2),
    charges=3,
    together=True,
)


def run(sizes: Sizes, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    samples, repeats = sizes.sampler
    cases = {name: ("facmic", *size) for name, size in sizes.batches.items()}
    cases |= {"linear": ("linear", *sizes.linear), "sampler": ("sampler", samples, repeats, 1)}
    found: dict[str, Any] = {}
    for names in [list(cases)] if sizes.together else [[name] for name in cases]:
        progress(", ".join(f"{cases[name][0]}, {cases[name][1]} records" for name in names))
        found |= dict(zip(names, child([cases[name] for name in names]), strict=True))
    sampler = found["sampler"]["sampler"]
    result: dict[str, Any] = {
        "step": {name: step(found[name]) for name in sizes.batches},
        "step_linear": {"b256": step(found["linear"])},
        "sampler": {f"s_per_1e6{tail}": sampler[which] * 1e3 / samples for which, tail in _KINDS},
    }
    progress("ledger")
    result["ledger"] = ledger(sizes.charges)
    progress("ε of local and distributed noise")
    result["epsilon"] = {f"n{sites}": local_against_distributed(sites) for sites in SITES}
    result["about"] = about()
    return result


_KINDS = (("best", ""), ("median", "_median"))


def step(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds a step and their ratios: of the best of all turns, and of the medians."""
    figures: dict[str, float] = {}
    for which, tail in _KINDS:
        ms = {name: times[which] for name, times in found.items()}
        figures |= {f"{name}_ms{tail}": value for name, value in ms.items()}
        figures[f"ratio{tail}"] = ms["private"] / ms["plain"]
        figures[f"ratio_float64{tail}"] = ms["private"] / ms["plain_float64"]
        figures[f"ratio_distributed{tail}"] = ms["distributed"] / ms["plain"]
        for mode in ("hooks", "ghost"):
            for precision in ("", "_float64"):
                figures[f"vs_{mode}{precision}{tail}"] = ms[f"opacus_{mode}{precision}"] / ms["private"]
    return figures


def child(cases: list[tuple[str, int, int, int]]) -> list[dict[str, dict[str, float]]]:
    """What :mod:`benchmarks.privacy_steps` measures in a process of its own."""
    keys = ("kind", "batch", "repeats", "opacus_repeats")
    settings = [dict(zip(keys, case, strict=True)) for case in cases]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.privacy_steps", json.dumps(settings)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, dict[str, float]]] = json.loads(done.stdout)
    return found


def ledger(charges: int) -> dict[str, float]:
    """Median milliseconds of a durable reservation and of its commit, on the disk of the temporary folder."""
    reserve, commit = [], []
    payload = hashlib.sha256(b"payload").digest()
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.db") as book:
        for number in range(charges):
            start = time.perf_counter()
            reservation = book.reserve(
                dataset="benchmark",
                population="train",
                events=(Event("train", "training", 100.0, 50.0),),
                run="ab" * 16,
                round=number,
                attempt=0,
                query_digest=hashlib.sha256(b"query").digest(),
                limit_epsilon=8.0,
                delta=DELTA,
            )
            middle = time.perf_counter()
            book.commit(reservation, payload)
            reserve.append(middle - start)
            commit.append(time.perf_counter() - middle)
    return {"reserve_ms": 1e3 * statistics.median(reserve), "commit_ms": 1e3 * statistics.median(commit)}


def local_against_distributed(sites: int) -> dict[str, float]:
    """ε against the aggregator at equal accuracy.

    Equal accuracy means the same noise on the sum of all sites, hence the same distribution of every model. With
    distributed noise an adversary sees that sum: multiplier z. With local noise of the same total each site adds
    z/√n, and the aggregator sees it alone. Full batch, no drop-out, no colluding site.
    """
    z = calibrate(TARGET_EPSILON, DELTA, steps=ROUNDS)
    event = Event("train", "training", z, z / math.sqrt(sites), steps=ROUNDS)
    return {
        "distributed": epsilon([event], delta=DELTA),
        "local": epsilon([event], delta=DELTA, adversary="beyond"),
    }


def about() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("torch", "opacus", "numpy", "cryptography")},
        "environment": ENVIRONMENT,
        "seeds": "records: 0; noise: operating system",
        "epsilon": f"delta {DELTA:g}, {ROUNDS} full-batch rounds, equal noise on the sum",
    }


def table(result: dict[str, Any]) -> Table:
    """The figures beside their targets."""
    rows = Table("figure", "best", "median", "target", title="Privacy")

    def add(name: str, figures: dict[str, float], key: str, unit: str = "", target: str = "") -> None:
        median = figures.get(f"{key}_median")
        rows.add_row(
            name, *(f"{v:.4g} {unit}".strip() if v is not None else "" for v in (figures[key], median)), target
        )

    targets = {"b64": "≤ 2.5", "b256": "≤ 1.6", "b1024": "≤ 1.4"}
    for name, figures in result["step"].items():
        add(f"attention {name}: without privacy", figures, "plain_ms", "ms")
        add("  private, local noise", figures, "private_ms", "ms")
        add("  private over plain", figures, "ratio", "", targets[name])
        add("  … over plain in float64", figures, "ratio_float64")
        add("  private, distributed noise", figures, "distributed_ms", "ms")
        at_256 = name == "b256"
        add("  times faster than Opacus' hooks", figures, "vs_hooks", "", "≥ 15" if at_256 else "")
        add("  … than hooks in float64", figures, "vs_hooks_float64")
        add("  times faster than Opacus' ghost mode", figures, "vs_ghost", "", "≥ 1.7" if at_256 else "")
        add("  … than ghost mode in float64", figures, "vs_ghost_float64")
    linear = result["step_linear"]["b256"]
    add("linear b256: without privacy", linear, "plain_ms", "ms")
    add("  private over plain", linear, "ratio", "", "≤ 1.2")
    add("discrete Gaussian, 1e6 samples", result["sampler"], "s_per_1e6", "s", "≤ 0.2 s")
    for key in ("reserve_ms", "commit_ms"):
        rows.add_row(f"ledger: {key.removesuffix('_ms')}", "", f"{result['ledger'][key]:.4g} ms", "")
    for name, figures in result["epsilon"].items():
        text = f"{figures['distributed']:.2f} / {figures['local']:.4g}"
        rows.add_row(f"ε, {name}: distributed / local", text, "", "")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description="What privacy costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else, on stdout")
    parser.add_argument("--quick", action="store_true", help="small cases: tests the benchmark, measures nothing")
    options = parser.parse_args(arguments)
    progress = Progress()
    result = run(QUICK if options.quick else FULL, progress=progress)
    progress.end()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(table(result))


if __name__ == "__main__":
    main()
