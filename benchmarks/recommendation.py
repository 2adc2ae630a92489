"""Is the method that `fedsecure plan` recommends the best of its candidates? Measured on genuine CLIP features.

    python -m benchmarks.recommendation --data FOLDER [--split test] [--repeats 3] [--json]

Every candidate is run centrally with the deployed kernels (clipped sums, moments, learning rates, shrinkage) and seeded
Gaussian noise of the size its plan gives the secure sum. ``--split val`` scores a fifth of the training and validation
records that was left out, which is what the rule may be tuned on; ``--split test`` trains on all of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.moments import Moments, moment_sum, read_moments
from fedsecure.learning.shrinkage import class_signal, weight, zero_shot_error
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.training import suggest
from fedsecure.learning.units import UnitFeatures
from fedsecure.methods.one_release import OneRelease
from fedsecure.methods.recommend import CLIP_NORM, Candidate, Numbers, recommend
from fedsecure.methods.registry import load_method

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
# (sites, every how manieth record): the training records are shared out evenly.
FEDERATIONS = ((3, 1), (3, 4), (10, 1))
METHODS = ("linear", "prototypes", "ridge")


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Training units, labelled test records and the public constants of one federation."""

    name: str
    task: HeadTask
    units: UnitFeatures
    test: Vector
    truth: np.ndarray

    def score(self, head: Vector) -> float:
        """Accuracy of logits τ·a·Pᵀ + a·Dᵀ."""
        logits = self.test @ (self.task.scale * self.task.prior + head).T
        return float((logits.argmax(axis=1) == self.truth).mean())


def worlds(folder: Path, *, split: str, every: int) -> Iterator[World]:
    """UCF101 (a weak prior) and Caltech101 (a strong one), each as it is and centred by a public mean."""
    for name in ("ucf101", "caltech"):
        with np.load(folder / f"{name}_clip_vitb32.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        inputs = unit_rows(np.concatenate([arrays["train_x"], arrays["val_x"]]).astype(np.float64))
        labels = np.concatenate([arrays["train_y"], arrays["val_y"]])
        test, truth = unit_rows(arrays["test_x"].astype(np.float64)), arrays["test_y"]
        order = np.random.default_rng(20).permutation(len(labels))
        if split == "val":
            held = order[: len(order) // 5]
            order = order[len(order) // 5 :]
            test, truth = inputs[held], labels[held]
        text = unit_rows(arrays["text"].astype(np.float64)).astype(np.float32)
        mean = inputs.mean(axis=0)
        inputs, labels = inputs[order[::every]], labels[order[::every]]
        spec = AdapterSpec("linear", text.shape[1], text.shape[0])
        for centred in (False, True):
            centre = (mean if centred else np.zeros_like(mean)).astype(np.float32)
            units = UnitFeatures(
                inputs[:, None].astype(np.float32), labels[:, None], np.ones((len(labels), 1), np.bool_)
            )
            shown = unit_rows(test - centre) if centred else test
            yield World(name + (" centred" if centred else ""), HeadTask(spec, text, centre, 25.0), units, shown, truth)


def runner(world: World, method: str, numbers: Numbers) -> Callable[[float, np.random.Generator], float]:
    """(noise multiplier of the sum, generator) → accuracy of one run of a method."""
    spec, units = world.task.spec, sum(numbers.units.values())
    if method == "linear":

        def descend(noise: float, rng: np.random.Generator) -> float:
            rate, temperature = suggest(
                "linear",
                mu_total=20**0.5 / noise,
                units=units,
                classes=spec.classes,
                dimension=spec.dimension,
                steps=20,
                max_grad_norm=CLIP_NORM,
            )
            task = HeadTask(spec, world.task.text, world.task.centre, temperature)
            current = np.zeros(spec.parameters)
            for _ in range(20):
                total = clipped_sum(task, spec.unflatten(current), world.units, max_grad_norm=CLIP_NORM, device="cpu")
                total = total + CLIP_NORM * noise * rng.normal(size=total.shape)
                current -= rate / units * total
            return world.score(current.reshape(spec.classes, -1) * world.task.temperature / temperature)

        return descend
    installed: Any = load_method(method)
    assert isinstance(installed, OneRelease)
    layout = Moments(spec.classes, spec.dimension, installed.gram_share)
    clean = moment_sum(world.task, world.units, layout)

    def release(noise: float, rng: np.random.Generator) -> float:
        statistics = read_moments(clean + noise * rng.normal(size=layout.length), layout, noise=noise)
        far = weight(class_signal(layout, units=units, noise=noise), zero_shot_error(statistics, units=units))
        return world.score(world.task.temperature * far * installed.directions(statistics, units))

    return release


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a world, federation and ε: the accuracy of every candidate, and which one is recommended."""
    rows = []
    for sites, every in FEDERATIONS:
        for world in worlds(options.data, split=options.split, every=every):
            per_site = len(world.units) // sites
            spec = world.task.spec
            for epsilon in EPSILONS:
                numbers = Numbers.even(
                    sites=sites, units=per_site, classes=spec.classes, dimension=spec.dimension, epsilon=epsilon
                )
                plan = recommend(numbers)
                measured = {}
                for candidate in plan.candidates:
                    if candidate.method in METHODS:
                        measured[candidate.label] = _mean(world, candidate, numbers, options.repeats)
                best = max(measured.values())
                rows.append(
                    {
                        "world": world.name, "sites": sites, "units": per_site, "epsilon": epsilon,
                        "zero_shot": world.score(np.zeros((spec.classes, spec.dimension))),
                        "measured": measured, "recommended": plan.best.label, "signal": plan.best.class_signal,
                        "loss": best - measured[plan.best.label],
                    }
                )  # fmt: skip
    return rows


def _mean(world: World, candidate: Candidate, numbers: Numbers, repeats: int) -> float:
    run = runner(world, candidate.method, numbers)
    noise = candidate.sum_noise_multiplier
    return float(np.mean([run(noise, np.random.default_rng(seed)) for seed in range(repeats)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with the two feature files")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps(rows))
        return
    labels = list(rows[0]["measured"])
    table = Table("world", "sites × units", "ε", "zero-shot", *labels, "recommended", "loss")
    for row in rows:
        shown = [f"{100 * row['measured'][label]:.1f}" for label in labels]
        table.add_row(
            row["world"], f"{row['sites']} × {row['units']}", f"{row['epsilon']:g}", f"{100 * row['zero_shot']:.1f}",
            *shown, row["recommended"], f"{100 * row['loss']:.1f}",
        )  # fmt: skip
    Console(width=180).print(table)
    print(f"largest loss of the recommendation: {100 * max(row['loss'] for row in rows):.2f} points")


if __name__ == "__main__":
    main()
