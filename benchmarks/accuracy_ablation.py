"""What each measure is worth, on validation records only: one thing is changed at a time, the rest is as deployed.

Three tables of ``python -m benchmarks.accuracy`` (``--only ablation-linear,ablation-facmic,ablation-prior``).

Records of ``train`` and four fifths of ``val`` train, the remaining fifth of ``val`` is scored, in turns; ``test`` is
never opened. Noise is that of the secure sum of five sites of which four are honest, drawn from a seed, the same for
all changes of a fold, so that differences are taken fold by fold. Finished measurements are not taken again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_page import interval, spread
from benchmarks.accuracy_study import folds
from benchmarks.accuracy_work import Work, finished_work, take_work, work_off
from fedsecure.data.longtail import long_tail
from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import IMAGE_PRIOR, prior_of_images, suggest
from fedsecure.learning.units import UnitFeatures
from fedsecure.methods.class_counts import class_counts, shares_of
from fedsecure.privacy.accounting import calibrate
from fedsecure.simulation.pool import Pool, read_pool
from fedsecure.simulation.simulate import Step

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
        prior: shares of the classes in the loss of a record: none, the ``"true"`` ones as if they were public, or
            those that the first round has ``"released"``.
    """

    centred: bool = True
    sampling: float = 1.0
    ruled_at: float | None = None
    temperature: float | None = None
    average: bool = False
    warm: bool = True
    norm: float = 0.1
    steps: float = 1.0
    prior: str = ""


DEPLOYED = "as deployed"
CHANGES: Mapping[str, Change] = {
    DEPLOYED: Change(),
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
    "the true shares as `class_prior`": Change(prior="true"),
    '`class_prior = "released"`': Change(prior="released"),
}
# What is shown of a long tail alone.
TAILED = (DEPLOYED, *(name for name, change in CHANGES.items() if change.prior))
# The module's steps take ten times as long.
FEWER = (DEPLOYED, "random start in place of zero-shot", "not centred by the public mean", "`average = true`")


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
    current, noise = spec.flatten(tensors), noise_at(epsilon)
    mean: Vector = np.zeros_like(current)
    shares = None
    if change.prior:
        found = class_counts(train, spec.classes)
        told = noise if change.prior == "released" else 0.0
        shares = shares_of(found + told * rng.standard_normal(spec.classes), noise=told)
    task = HeadTask(spec, text, centre, temperature, None if shares is None else np.log(shares))
    for step in range(1 if change.prior == "released" else 0, steps):
        drawn = train if change.sampling == 1 else train.select(rng.random(len(train)) < change.sampling)
        total = clipped_sum(task, spec.unflatten(current), drawn, max_grad_norm=change.norm, device="cpu")
        total += noise * change.norm * rng.standard_normal(total.size)
        current -= rate / (change.sampling * len(train)) * total
        taken = step - steps // 2
        if taken >= 0:
            mean += (current - mean) / (taken + 1)
    return accuracy(*counts(task, spec.unflatten(mean if change.average else current), scored))


@dataclass(frozen=True, slots=True)
class Ablation:
    """All changes to one adapter, as a part of a table.

    Attributes:
        features, centre: the feature file and its public mean, as of ``fedsecure simulate``.
        kind: of the adapter.
        folds: how many of the five are scored.
        out: folder of finished measurements.
        epsilons: ε.
        tail: how many times more training records the commonest class has than the rarest; 1 leaves them as they are,
            and above it the scored records stay as even as they were. Which class is how common is drawn, fold by fold.
    """

    features: Path
    centre: str
    kind: str
    folds: int
    out: Path
    epsilons: tuple[float, ...] = (1.0, 8.0)
    tail: float = 1.0

    @property
    def cells(self) -> int:
        return len(self._work())

    def run(self, watch: Callable[[Step], None]) -> list[dict[str, Any]]:
        pool, parts = self._parts()

        def score_of(work: Work) -> float:
            name, epsilon, fold = work
            return score(self.kind, pool, CHANGES[name], epsilon, parts[fold], seed=fold)

        return work_off(self.out, self.kind, self._work(), key=partial(self._key, pool), score=score_of, watch=watch)

    def finished(self) -> list[dict[str, Any]]:
        pool, _ = self._parts()
        return finished_work(self.out, self._work(), key=partial(self._key, pool))

    def take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pool, _ = self._parts()
        take_work(self.out, self._work(), rows, key=partial(self._key, pool))

    def _work(self) -> list[Work]:
        names = tuple(name for name in CHANGES if not CHANGES[name].prior) if self.kind == "linear" else FEWER
        names = names if self.tail == 1 else TAILED
        work = product(names, self.epsilons, range(self.folds))
        return [(name, epsilon, fold) for name, epsilon, fold in work if CHANGES[name].ruled_at != epsilon]

    def _parts(self) -> tuple[Pool, list[tuple[UnitFeatures, UnitFeatures]]]:
        # The split named "test" here is not looked at; the reader wants one that is not trained on.
        pool = read_pool(self.features, train=("train", "val"), test="test", centre=self.centre)
        with np.load(self.features) as held:
            validation = len(held["val_y"])
        parts = list(folds(pool, validation, 5))
        return pool, [(self._tailed(train, fold), scored) for fold, (train, scored) in enumerate(parts)]

    def _tailed(self, train: UnitFeatures, fold: int) -> UnitFeatures:
        if self.tail == 1:
            return train
        labels = train.labels[:, 0]
        order = np.random.default_rng(fold).permutation(int(labels.max()) + 1)
        return train.select(
            long_tail(labels, classes=len(order), imbalance=self.tail, seed=fold, order=[int(c) for c in order])
        )

    def _key(self, pool: Pool, work: Work) -> str:
        name, epsilon, fold = work
        facts = [self.kind, asdict(CHANGES[name]), epsilon, fold, pool.digest, self.tail]
        return hashlib.sha256(b"ablation/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a change: accuracy, and the difference to what is deployed, fold by fold."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        found.setdefault((str(row["change"]), float(row["epsilon"])), {})[int(row["seed"])] = 100 * row["accuracy"]
    epsilons = sorted({epsilon for _, epsilon in found})
    yield "| validation accuracy, % | " + " | ".join(f"ε = {e:g} | difference, 95 %" for e in epsilons) + " |"
    yield "|---" * (2 * len(epsilons) + 1) + "|"
    most = max(len(scores) for scores in found.values())
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for epsilon in epsilons:
            scores, deployed = found.get((name, epsilon), {}), found.get((DEPLOYED, epsilon), {})
            both = sorted(set(scores) & set(deployed)) if name != DEPLOYED else []
            cells += [spread(list(scores.values()), most), interval([scores[f] - deployed[f] for f in both])]
        yield f"| {name} | " + " | ".join(cells) + " |"
