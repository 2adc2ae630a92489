"""How long FACMIC takes on the sizes of its brain-tumour set, secure aggregation and privacy included.

    python -m benchmarks.facmic [--rounds 50] [--reference-rounds 50] [--json] [--quick]

Three sites with 1,474, 423 and 949 records, 512-d features as if cached, four classes, generated. The
private runs are whole runs of the deployed client, doors, ledgers, secure aggregation and coordinator with distributed
noise, the transport in memory; the reference is the released training, 199 steps of 32 records a round, not private.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsecure.files import make_folder
from fedsecure.privacy.report import network_report
from fedsecure.simulation import reference
from fedsecure.simulation.folders import Experiment, Part, lay_out_experiment
from fedsecure.simulation.memory import run_in_memory
from fedsecure.simulation.placing import LaidOut, Variant
from fedsecure.simulation.simulate import SimulationOptions, open_results

SIZES = {"client_0": 1474, "client_1": 423, "client_2": 949}
CLASSES, DIMENSION, TEST = 4, 512, 394
EPSILON, DELTA = 8.0, 1e-5


def generated(sizes: Mapping[str, int], *, test: int) -> Experiment:
    """Records around four class texts."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(CLASSES, DIMENSION)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)

    def part(count: int) -> Part:
        labels = rng.integers(0, CLASSES, count)
        return Part((text[labels] + 0.3 * rng.normal(size=(count, DIMENSION))).astype(np.float32), labels)

    target = part(test)
    return Experiment(
        classes=tuple(f"class {index}" for index in range(CLASSES)),
        text=text,
        mean=None,
        scale=100.0,
        train={site: part(count) for site, count in sizes.items()},
        own={},
        tests={"raw": target},
        target=target.features,
    )


def private(experiment: Experiment, method: str, *, rounds: int, folder: Path) -> dict[str, Any]:
    """One private run with noise of the operating system: from the first join to the last report."""
    layout = lay_out_experiment(experiment, folder / "layout", method=method, delta=DELTA)
    options = SimulationOptions(out=folder, methods=(method,), federation=layout, rounds=rounds, delta=DELTA)
    source = LaidOut.read(options)
    variant = Variant(method=method, partition="iid", noise="distributed", epsilon=EPSILON, seed=0)
    settings, _ = source.cell(variant)
    placed = source.place(make_folder(folder / "run"), variant, settings)
    busy = time.process_time()
    ended = run_in_memory(placed.federation, placed.sites, seed=None, watch=lambda *_: None)
    report = network_report(list(ended.reports.values()))
    return {
        "rounds": rounds,
        "seconds": round(ended.wall_seconds, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
        "epsilon": report["epsilon"],
        "accuracy": report["accuracy"]["after"]["accuracy"],
        "megabytes_up": round(max(ended.bytes_up.values()) / 1e6, 2),
    }


def released(experiment: Experiment, *, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """The released training, with its alignment."""
    busy = time.process_time()
    row = reference.run_reference(
        experiment,
        "reference",
        out=open_results(folder / "reference"),
        seed=0,
        reason="generated records",
        partition="generated",
        rounds=rounds,
        steps=steps,
    )
    return {
        "rounds": rounds,
        "steps": steps,
        "seconds": row["wall_seconds"],
        "processor_seconds": round(time.process_time() - busy, 1),
        "accuracy": row["accuracy"],
    }


def measure(*, rounds: int, reference_rounds: int, steps: int, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """All figures as one object."""
    import torch  # noqa: F401 - a second of imports is not FACMIC's time

    found: dict[str, Any] = {}
    experiment = generated(sizes, test=TEST)
    for method in ("linear", "facmic"):
        with tempfile.TemporaryDirectory() as folder:
            found[method] = private(experiment, method, rounds=rounds, folder=Path(folder))
    if reference_rounds:
        with tempfile.TemporaryDirectory() as folder:
            found["reference"] = released(experiment, rounds=reference_rounds, steps=steps, folder=Path(folder))
    return {
        **found,
        "about": {
            "records": dict(sizes),
            "dimension": DIMENSION,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "load": [round(value, 1) for value in os.getloadavg()],
            "threads": os.environ.get("OMP_NUM_THREADS", "as torch likes"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--reference-rounds", type=int, default=50, help="0 leaves the reference out")
    parser.add_argument("--reference-steps", type=int, default=199, help="a round and site")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the same code on small cases; measures nothing")
    options = parser.parse_args()
    if options.quick:
        found = measure(rounds=2, reference_rounds=1, steps=2, sizes=dict.fromkeys(SIZES, 40))
    else:
        found = measure(rounds=options.rounds, reference_rounds=options.reference_rounds, steps=options.reference_steps)
    if options.json:
        print(json.dumps(found))
        return
    table = Table("three sites", "rounds", "seconds", "processor seconds", "accuracy, %")
    for name in ("linear", "facmic", "reference"):
        if name in found:
            row = found[name]
            values = (row["rounds"], row["seconds"], row["processor_seconds"], f"{100 * row['accuracy']:.1f}")
            table.add_row(name, *map(str, values))
    Console().print(table)
    print(found["about"])


if __name__ == "__main__":
    main()
