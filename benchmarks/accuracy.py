"""Accuracy against ε with the deployed code: the tables of docs/results.md, each a ``fedsecure simulate``.

    python -m benchmarks.accuracy UCF101.npz CALTECH101.npz [--out FOLDER] [--seeds 3] [--quick]

Five sites, IID, distributed noise, one colluding site, every site needed (u_min = 5), record level, δ = 1e-5; ``train``
and ``val`` records are shared out, ``test`` is evaluated on. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from fedsecure.simulation.simulate import SimulationOptions, Step, simulate
from fedsecure.simulation.tables import to_markdown

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)


def tables(ucf: Path, caltech: Path, *, out: Path, seeds: int, quick: bool) -> Iterator[tuple[str, SimulationOptions]]:
    """Title and options of each table."""
    # UCF101's prior is one public image a class, so that its mean is a public mean of image features.
    for name, file, centre in (("UCF101", ucf, f"{ucf}:text"), ("Caltech101", caltech, "none")):
        for method in ("linear", "facmic"):
            yield (
                f"{name}, {method}",
                SimulationOptions(
                    out=out / f"{name.lower()}-{method}",
                    methods=(method,),
                    features=file,
                    sites=5,
                    min_survivors=5,
                    colluders=1,
                    train=("train", "val"),
                    centre=centre,
                    epsilons=(8.0,) if quick else EPSILONS,
                    seeds=1 if quick else seeds,
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("ucf", type=Path, help="UCF101 features (docs/datasets.md)")
    parser.add_argument("caltech", type=Path, help="Caltech101 features")
    parser.add_argument("--out", type=Path, default=Path("accuracy"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed and ε = 8 only")
    options = parser.parse_args()

    def watch(step: Step) -> None:
        if not step.rounds:
            print(f"{step.done}/{step.cells}: {step.what}", file=sys.stderr)

    for title, chosen in tables(
        options.ucf, options.caltech, out=options.out, seeds=options.seeds, quick=options.quick
    ):
        print(f"## {title}\n\n{to_markdown(simulate(chosen, watch=watch)['summary'])}", flush=True)


if __name__ == "__main__":
    main()
