"""What a learning rate or a temperature is worth, measured on validation records only and without a federation.

    python -m benchmarks.accuracy_study --features FILE.npz [--kind linear] [--centre FILE.npz:text] [--epsilon 1,8,inf]
        [--rates 0.5,1,2] [--temperatures 0.5,1,2] [--steps 20] [--sites 5 --honest 4] [--folds 5] [--json]

Records of ``train`` and four fifths of ``val`` train, the remaining fifth of ``val`` is scored, in turns; ``test`` is
never opened. Noise is that of the secure sum of so many sites, drawn from a seed. Rates and temperatures are multiples
of what ``fedsecure.learning.training.suggest`` says, so that a row in which 1 is best confirms the rule.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.objective import Objective
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import IMAGE_PRIOR, prior_of_images, suggest
from fedsecure.learning.units import UnitFeatures, group_units
from fedsecure.privacy.accounting import mu_for_epsilon
from fedsecure.privacy.plan import TOKEN_NOISE
from fedsecure.simulation.pool import Pool, read_pool

NORM = 0.1


def units_of(pool: Pool, rows: Any) -> UnitFeatures:
    """Rows of the pool, each a unit."""
    names = [str(row) for row in rows]
    return group_units(
        pool.features[rows].astype(np.float32),
        pool.labels[rows],
        names,
        cap=1,
        key=b"study",
        classes=len(pool.classes),
        record_ids=names,
    )


def folds(pool: Pool, validation: int, count: int) -> Iterator[tuple[UnitFeatures, UnitFeatures]]:
    """Training and scored units; the pool's last ``validation`` rows are scored in turns."""
    total = len(pool.labels)
    order = total - validation + np.random.default_rng(0).permutation(validation)
    for fold in range(count):
        scored = order[fold::count]
        yield units_of(pool, np.setdiff1d(np.arange(total), scored)), units_of(pool, scored)


def descend(
    task: HeadTask,
    units: UnitFeatures,
    *,
    steps: int,
    rate: float,
    noise: float,
    rng: np.random.Generator,
    objective: Callable[[Mapping[str, Any]], Objective] | None = None,
) -> dict[str, Any]:
    """Full-batch DP gradient descent as the methods do it.

    Args:
        task, units: what is trained, and on what.
        steps, rate: T and the learning rate.
        noise: the sum's multiplier.
        rng: draws the noise.
        objective: the loss at an adapter, where it is another one in each step.
    """
    tensors: dict[str, Any] = dict(task.spec.initial(seed=b"study"))
    for _ in range(steps):
        at = task if objective is None else replace(task, objective=objective(tensors))
        gradient = clipped_sum(at, tensors, units, max_grad_norm=NORM, device="cpu")
        gradient += noise * NORM * rng.standard_normal(gradient.size)
        tensors = task.spec.unflatten(task.spec.flatten(tensors) - rate / len(units) * gradient)
    return tensors


def measure(
    options: argparse.Namespace, pool: Pool, validation: int, epsilon: float, rate: float, heat: float
) -> dict[str, Any]:
    """Mean validation accuracy before and after at one ε and multiple of rate and temperature."""
    share = math.sqrt(options.sites / options.honest)
    steps = options.steps
    noise = (TOKEN_NOISE if math.isinf(epsilon) else math.sqrt(steps) / mu_for_epsilon(epsilon, 1e-5)) * share
    text = pool.public["text"]
    centre = pool.public.get("mean", np.zeros(pool.dimension, np.float32))
    spec = AdapterSpec(options.kind, pool.dimension, len(pool.classes))
    before, after = [], []
    for number, (train, scored) in enumerate(folds(pool, validation, options.folds)):
        ruled, temperature = suggest(
            options.kind,
            mu_total=math.sqrt(steps) / noise,
            units=len(train),
            classes=spec.classes,
            dimension=spec.dimension,
            steps=steps,
            max_grad_norm=NORM,
        )
        if options.kind == "linear" and prior_of_images(text, centre):
            temperature *= IMAGE_PRIOR
        task = HeadTask(spec, text, centre, heat * temperature)
        trained = descend(task, train, steps=steps, rate=rate * ruled, noise=noise, rng=np.random.default_rng(number))
        before.append(accuracy(*counts(task, spec.initial(seed=b"study"), scored)))
        after.append(accuracy(*counts(task, trained, scored)))
    error = float(np.std(after, ddof=1) / math.sqrt(len(after))) if len(after) > 1 else None
    return {
        "epsilon": "inf" if math.isinf(epsilon) else epsilon,
        "rate": rate,
        "temperature": heat,
        "zero_shot": float(np.mean(before)),
        "accuracy": float(np.mean(after)),
        "standard_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--kind", default="linear", choices=("linear", "facmic", "fedclip", "bottleneck"))
    parser.add_argument("--centre", default="file")
    parser.add_argument("--epsilon", default="0.5,1,2,4,8,inf")
    parser.add_argument("--rates", default="0.5,1,2")
    parser.add_argument("--temperatures", default="1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--honest", type=int, default=4, help="u_min - c")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # The split named "test" here is not looked at; the reader wants one that is not trained on.
    pool = read_pool(options.features, train=("train", "val"), test="test", centre=options.centre)
    with np.load(options.features) as held:
        validation = len(held["val_y"])
    axes = [
        [float(part) for part in text.split(",")] for text in (options.epsilon, options.rates, options.temperatures)
    ]
    rows = []
    for epsilon, rate, heat in product(*axes):
        rows.append(measure(options, pool, validation, epsilon, rate, heat))
        print(rows[-1], file=sys.stderr)
    if options.json:
        print(json.dumps({"kind": options.kind, "steps": options.steps, "rows": rows}))
        return
    table = Table("ε", "rate", "temperature", "zero-shot", "validation accuracy")
    for row in rows:
        error = row["standard_error"]
        shown = f"{100 * row['accuracy']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
        values = (row["epsilon"], row["rate"], row["temperature"], f"{100 * row['zero_shot']:.1f}", shown)
        table.add_row(*map(str, values))
    Console().print(table)


if __name__ == "__main__":
    main()
