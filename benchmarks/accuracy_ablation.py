"""What each measure is worth, on validation records only: one thing is changed at a time, the rest is as deployed.

    python -m benchmarks.accuracy_ablation --features FILE.npz [--centre FILE.npz:text] [--kind linear] [--epsilon 1,8]
        [--folds 5] [--out accuracy/ablation] [--page FILE.md]

Records of ``train`` and four fifths of ``val`` train, the remaining fifth of ``val`` is scored, in turns; ``test`` is
never opened. Noise is that of the secure sum of five sites of which four are honest, drawn from a seed, the same for
all changes of a fold, so that differences are taken fold by fold. Finished measurements are not taken again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_page import date_and_machine, interval, keep_rows, spread, update_page
from benchmarks.accuracy_study import folds
from fedsecure.cli.simulated import simulation_progress
from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import IMAGE_PRIOR, prior_of_images, suggest
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy.accounting import calibrate
from fedsecure.simulation.pool import Pool, read_pool
from fedsecure.simulation.simulate import Step, numbers, open_results, read_row, write_row

DELTA, SHARE = 1e-5, math.sqrt(5 / 4)
STEPS = {"linear": 20, "facmic": 60}


@dataclass(frozen=True, slots=True)
class Change:
    """One measure left out or set otherwise; the defaults are what is deployed.

    Attributes:
        centred: by the public mean.
        sampling: rate of Poisson sampling, with 1/rate as many steps; 1 is the full batch.
        ruled_at: ε whose learning rate is taken; None follows the run's own.
        temperature: τ; None is the rule's.
        average: of the adapters of the second half of the steps.
        warm: starts as zero-shot CLIP; otherwise with a random head and without the prior (linear), or a random gate.
        norm: C.
        steps: times the usual number.
    """

    centred: bool = True
    sampling: float = 1.0
    ruled_at: float | None = None
    temperature: float | None = None
    average: bool = False
    warm: bool = True
    norm: float = 0.1
    steps: float = 1.0


CHANGES: Mapping[str, Change] = {
    "as deployed": Change(),
    "not centred by the public mean": Change(centred=False),
    "Poisson sampling, q = 0.25, four times the steps": Change(sampling=0.25),
    "the learning rate of ε = 8": Change(ruled_at=8.0),
    "the learning rate of ε = 1": Change(ruled_at=1.0),
    "temperature 5": Change(temperature=5.0),
    "temperature 25": Change(temperature=25.0),
    "temperature 100, CLIP's own": Change(temperature=100.0),
    "`average = true`": Change(average=True),
    "random start in place of zero-shot": Change(warm=False),
    "clip norm 0.03": Change(norm=0.03),
    "clip norm 0.3": Change(norm=0.3),
    "clip norm 1": Change(norm=1.0),
    "half the steps": Change(steps=0.5),
    "twice the steps": Change(steps=2.0),
}
# The module's steps take ten times as long.
FEWER = (
    "as deployed",
    "not centred by the public mean",
    "the learning rate of ε = 8",
    "the learning rate of ε = 1",
    "`average = true`",
    "random start in place of zero-shot",
    "half the steps",
)


@lru_cache
def multiplier(epsilon: float, steps: int, sampling: float) -> float:
    """Of the sum of honest sites' shares."""
    return calibrate(epsilon, DELTA, steps=steps, sampling_rate=sampling, shared=True)


def score(
    kind: Any, pool: Pool, change: Change, epsilon: float, parts: tuple[UnitFeatures, UnitFeatures], *, seed: int
) -> float:
    """Validation accuracy of one fold."""
    train, scored = parts
    steps = round(STEPS[kind] * change.steps / change.sampling)

    def noise_at(value: float) -> float:
        return SHARE * multiplier(value, steps, change.sampling)

    text = pool.public["text"]
    zeros = np.zeros(pool.dimension, np.float32)
    centre = pool.public.get("mean", zeros) if change.centred else zeros
    spec = AdapterSpec(kind, pool.dimension, len(pool.classes))
    rate, temperature = suggest(
        kind,
        mu_total=change.sampling * math.sqrt(steps) / noise_at(epsilon if change.ruled_at is None else change.ruled_at),
        units=len(train),
        classes=spec.classes,
        dimension=spec.dimension,
        steps=steps,
        max_grad_norm=change.norm,
    )
    if kind == "linear" and prior_of_images(text, centre):
        temperature *= IMAGE_PRIOR
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = dict(spec.initial(seed=b"ablation"))
    temperature = change.temperature or temperature
    if not change.warm:
        # As torch starts a layer; a head of its own has no prior to start from.
        bound = 1 / math.sqrt(spec.dimension)
        last = "D" if kind == "linear" else "W2"
        tensors[last] = rng.uniform(-bound, bound, tensors[last].shape).astype(np.float32)
        temperature = 1e-3 if kind == "linear" else temperature
    task = HeadTask(spec, text, centre, temperature)
    current, noise = spec.flatten(tensors), noise_at(epsilon)
    mean: Vector = np.zeros_like(current)
    for step in range(steps):
        drawn = train if change.sampling == 1 else train.select(rng.random(len(train)) < change.sampling)
        total = clipped_sum(task, spec.unflatten(current), drawn, max_grad_norm=change.norm, device="cpu")
        total += noise * change.norm * rng.standard_normal(total.size)
        current -= rate / (change.sampling * len(train)) * total
        taken = step - steps // 2
        if taken >= 0:
            mean += (current - mean) / (taken + 1)
    return accuracy(*counts(task, spec.unflatten(mean if change.average else current), scored))


def measure(options: argparse.Namespace, epsilons: Sequence[float]) -> Iterator[tuple[Step, dict[str, Any] | None]]:
    """A row a change, ε and fold, and the steps between them."""
    # The split named "test" here is not looked at; the reader wants one that is not trained on.
    pool = read_pool(options.features, train=("train", "val"), test="test", centre=options.centre)
    with np.load(options.features) as held:
        validation = len(held["val_y"])
    parts = list(folds(pool, validation, 5))[: options.folds]
    out = open_results(options.out)
    names = tuple(CHANGES) if options.kind == "linear" else FEWER
    done, total = 0, len(names) * len(epsilons) * len(parts)
    for name in names:
        for epsilon in epsilons:
            change = CHANGES[name]
            if change.ruled_at == epsilon:
                done += len(parts)
                continue
            for fold, part in enumerate(parts):
                facts = [options.kind, asdict(change), epsilon, fold, pool.digest]
                key = hashlib.sha256(b"ablation/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]
                yield Step(done, total, f"{name}, ε = {epsilon:g}, fold {fold}"), None
                row = read_row(out, key)
                if row is None:
                    found = score(options.kind, pool, change, epsilon, part, seed=fold)
                    row = {"kind": options.kind, "change": name, "epsilon": epsilon, "fold": fold, "accuracy": found}
                    write_row(out, key, row)
                done += 1
                yield Step(done, total, name), row


def render(rows: Sequence[Mapping[str, Any]], epsilons: Sequence[float]) -> Iterator[str]:
    """A line a change: accuracy, and the difference to what is deployed, fold by fold."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        found.setdefault((str(row["change"]), float(row["epsilon"])), []).append(100 * float(row["accuracy"]))
    yield "| validation accuracy, % | " + " | ".join(f"ε = {e:g} | difference, 95 %" for e in epsilons) + " |"
    yield "|---" * (2 * len(epsilons) + 1) + "|"
    most = max(len(scores) for scores in found.values())
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for epsilon in epsilons:
            scores, deployed = found.get((name, epsilon), []), found["as deployed", epsilon]
            cells.append(spread(scores, most))
            differs = name != "as deployed" and len(scores) == len(deployed)
            cells.append(interval([a - b for a, b in zip(scores, deployed, strict=True)]) if differs else "–")
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--kind", default="linear", choices=tuple(STEPS))
    parser.add_argument("--centre", default="file")
    parser.add_argument("--epsilon", default="1,8")
    parser.add_argument("--folds", type=int, default=5, help="of five")
    parser.add_argument("--out", type=Path, default=Path("accuracy/ablation"))
    parser.add_argument("--page", type=Path, help="Markdown file with a place for the table")
    options = parser.parse_args()
    epsilons, rows = numbers("--epsilon", options.epsilon), []
    with simulation_progress(live=True) as watch:
        for step, row in measure(options, epsilons):
            watch(step)
            rows += [] if row is None else [row]
    slug = f"ablation-{options.kind}"
    command = f"`python -m benchmarks.accuracy_ablation --features {options.features.name} --kind {options.kind}`"
    how = f"{command}, {date_and_machine()}, {options.folds} folds."
    text = "\n".join((how, "", *render(rows, epsilons))) + "\n"
    print(text)
    if options.page is not None:
        keep_rows(rows, options.page.parent / f"{slug}.csv")
        update_page(options.page, {slug: text})


if __name__ == "__main__":
    main()
