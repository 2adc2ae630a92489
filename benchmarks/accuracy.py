"""Accuracy against ε, measured with the deployed code: every cell is a whole `fedsecure demo` with real processes.

    python -m benchmarks.accuracy --features FILE.npz --epsilon 0.5,1,2,4,8 --repeats 3 [--json]
    python -m benchmarks.accuracy --epsilon 1,8                # generated, synthetic scans

The noise cannot be seeded, so that repeats differ by themselves; the table shows mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsecure.simulation.demo import DemoOptions, run_demo


def measure(options: argparse.Namespace, epsilon: float) -> dict[str, Any]:
    """Accuracy before and after at one ε, over the repeats."""
    runs = []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(
                DemoOptions(
                    out=Path(folder) / "demo",
                    adapter=options.adapter,
                    sites=options.sites,
                    noise=options.noise,
                    rounds=options.rounds,
                    local_steps=options.local_steps,
                    epsilon=epsilon,
                    features=options.features,
                    seed=repeat,
                ),
                watch=lambda status: None,
            )
        runs.append(result.summary)
        print(f"ε = {epsilon:g}, run {repeat + 1} of {options.repeats}", file=sys.stderr)
    after = [run["accuracy"]["after"] for run in runs]
    return {
        "epsilon_target": epsilon,
        "epsilon_spent": max(runs[0]["epsilon"].values()),
        "before": statistics.mean(run["accuracy"]["before"] for run in runs),
        "after": statistics.mean(after),
        "after_std": statistics.stdev(after) if len(after) > 1 else 0.0,
        "rounds": runs[0]["rounds"],
        "wall_seconds": statistics.mean(run["wall_seconds"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--features", type=Path, help="feature file (docs/datasets.md); synthetic scans without")
    parser.add_argument("--epsilon", default="0.5,1,2,4,8")
    parser.add_argument("--adapter", default="linear", choices=("linear", "facmic"))
    parser.add_argument("--noise", default="distributed", choices=("distributed", "local"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(options, float(text)) for text in options.epsilon.split(",")]
    if options.json:
        print(json.dumps({"adapter": options.adapter, "noise": options.noise, "sites": options.sites, "rows": rows}))
        return
    table = Table("ε", "spent", "before", "after", "seconds")
    for row in rows:
        table.add_row(
            f"{row['epsilon_target']:g}",
            f"{row['epsilon_spent']:.2f}",
            f"{100 * row['before']:.1f} %",
            f"{100 * row['after']:.1f} ± {100 * row['after_std']:.1f} %",
            f"{row['wall_seconds']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
