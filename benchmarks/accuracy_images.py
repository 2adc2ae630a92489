"""What several views of an image and the alignment with a public target are worth: held-out images, tiny CLIP.

Three tables of ``python -m benchmarks.accuracy`` (``--only ablation-views-linear,ablation-views-facmic,
ablation-alignment``). Noise is that of the secure sum of three sites of which two are honest, drawn from a seed, the
same for all changes of a fold. No test image is opened: views are scored on a fifth of the training slices of FACMIC's
brain-tumour set, in turns and with all copies of a slice on one side, the alignment on generated scans of a fourth
site.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.accuracy_ablation import DEPLOYED, STEPS, multiplier
from benchmarks.accuracy_study import NORM, descend
from benchmarks.accuracy_work import Work, finished_work, take_work, work_off
from fedsecure.data.arrays import from_arrays
from fedsecure.data.dataset import Features, Labels, Subset
from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.learning.adapters import AdapterSpec, Float32
from fedsecure.learning.alignment import align, frequencies_of, negatives_of, witness_of
from fedsecure.learning.encoding import encode_dataset
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.moments import Moments, moment_sum
from fedsecure.learning.objective import Negatives, Objective
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest
from fedsecure.learning.units import UnitFeatures
from fedsecure.learning.views import Viewed
from fedsecure.methods.facmic import FREQUENCIES, normalising, prototypes_of
from fedsecure.simulation.folders import divide_folders
from fedsecure.simulation.simulate import Step
from fedsecure.vision.cache import FeatureCache
from fedsecure.vision.encoder import Encoder, load_encoder
from fedsecure.vision.prompts import class_prompts

SHARE = math.sqrt(3 / 2)
FOLDS = 5
VIEWS = (1, 2, 4)
TRAINED_AT = ("site_a", "site_b", "site_c")
# A target a fold, each by another made-up scanner.
TARGETS = ("site_d", "site_e", "site_f", "site_g", "site_h")
PER_CLASS = 75
UNTRAINED = "not trained: zero-shot"
PUBLIC = "public statistics in place of LayerNorm"


def units_of(features: Float32, labels: Labels) -> UnitFeatures:
    """(n, v, d) views and (n,) labels, a unit each."""
    shape = features.shape[:2]
    return UnitFeatures(features, np.repeat(labels[:, None], shape[1], axis=1), np.ones(shape, np.bool_))


class Study(Protocol):
    """What is changed, and what it scores."""

    name: str
    kind: Any
    changes: tuple[str, ...]

    def score(self, change: str, epsilon: float, fold: int, *, cache: Path) -> float:
        """Accuracy on held-out images."""


def _task(kind: Any, encoder: Encoder, classes: tuple[str, ...], units: int, noise: float) -> tuple[HeadTask, float]:
    """The task and learning rate of a run of as many steps as are usual."""
    spec = AdapterSpec(kind, encoder.dimension, len(classes))
    rate, temperature = suggest(
        kind,
        mu_total=math.sqrt(STEPS[kind]) / noise,
        units=units,
        classes=spec.classes,
        dimension=spec.dimension,
        steps=STEPS[kind],
        max_grad_norm=NORM,
    )
    text = encoder.encode_text(class_prompts(classes))
    centre = np.zeros(spec.dimension, np.float32) if encoder.public_mean is None else encoder.public_mean
    return HeadTask(spec, text, centre, temperature), rate


@dataclass(slots=True)
class Views:
    """``views`` of each training slice.

    Attributes:
        data: folder of sites.
        kind: of the adapter.
    """

    data: Path
    kind: Any
    name: str = "views"
    changes: tuple[str, ...] = (DEPLOYED, *(f"`views = {count}`" for count in VIEWS[1:]))
    _held: tuple[Float32, Labels, Labels, tuple[str, ...]] | None = field(default=None, repr=False)

    def score(self, change: str, epsilon: float, fold: int, *, cache: Path) -> float:
        encoder = load_encoder("fedsecure-tiny", "bundled", device="cpu")
        features, labels, turns, classes = self._read(encoder, cache)
        views = VIEWS[self.changes.index(change)]
        trained = turns != fold
        units = units_of(features[trained, :views], labels[trained])
        noise = SHARE * multiplier(epsilon, STEPS[self.kind], 1.0)
        task, rate = _task(self.kind, encoder, classes, len(units), noise)
        rng = np.random.default_rng(fold)
        tensors = descend(task, units, steps=STEPS[self.kind], rate=rate, noise=noise, rng=rng)
        return accuracy(*counts(task, tensors, units_of(features[~trained, :1], labels[~trained])))

    def _read(self, encoder: Encoder, cache: Path) -> tuple[Float32, Labels, Labels, tuple[str, ...]]:
        """(n, views, d) features of all training slices, their labels, the fold of each, and the classes."""
        if self._held is None:
            division, store = divide_folders(self.data), FeatureCache(cache)
            parts = [Subset(division.sites[site], [int(r) for r in rows]) for site, rows in division.train.items()]
            features = [
                np.stack([encode_dataset(Viewed(part, number), encoder, store) for number in range(max(VIEWS))], axis=1)
                for part in parts
            ]
            labels = np.concatenate([part.labels for part in parts])
            turns = np.array([part.content_key(i)[0] % FOLDS for part in parts for i in range(len(part))])
            self._held = np.concatenate(features), labels, turns, division.classes
        return self._held


@dataclass(slots=True)
class Alignment:
    """FACMIC's alignment of three sites' scans with those of a fourth, by another scanner, whose labels nobody has."""

    kind: Any = "facmic"
    name: str = "alignment"
    changes: tuple[str, ...] = (
        DEPLOYED,
        UNTRAINED,
        "`weight = 1`, target alone",
        "`weight = 1`, `prototypes = true`",
        '`weight = 1`, `prototypes = true`, `at = "aggregator"`',
        "`negatives = 1`",
        PUBLIC,
    )

    def score(self, change: str, epsilon: float, fold: int, *, cache: Path) -> float:
        encoder, store = load_encoder("fedsecure-tiny", "bundled", device="cpu"), FeatureCache(cache)

        def scans(site: str, seed: int) -> tuple[Features, Labels]:
            images, labels = generate(PER_CLASS, seed=seed, acquisition=SITES[site])
            records = from_arrays(images, labels, classes=CLASSES, name=f"{site}-{seed}")
            return encode_dataset(records, encoder, store), labels

        found = [scans(site, 10 * fold + index) for index, site in enumerate(TRAINED_AT)]
        units = units_of(np.concatenate([f for f, _ in found])[:, None], np.concatenate([y for _, y in found]))
        target, _ = scans(TARGETS[fold], 10 * fold + 8)
        held_out = scans(TARGETS[fold], 10 * fold + 9)
        noise = SHARE * multiplier(epsilon, STEPS[self.kind], 1.0)
        task, rate = _task(self.kind, encoder, tuple(CLASSES), len(units), noise)
        if change == PUBLIC:
            # Its rates are LayerNorm's.
            task = replace(task, spec=replace(task.spec, kind="facmic_plain"), public=normalising(target))
        tensors: Mapping[str, Any] = task.spec.initial(seed=b"study")
        if change != UNTRAINED:
            tensors = self._trained(change, task, units, target, rate=rate, noise=noise, seed=fold)
        return accuracy(*counts(task, tensors, units_of(held_out[0][:, None], held_out[1])))

    def _trained(
        self, change: str, task: HeadTask, units: UnitFeatures, target: Float32, *, rate: float, noise: float, seed: int
    ) -> dict[str, Any]:
        rng, steps, source = np.random.default_rng(seed), STEPS[self.kind], None
        if "prototypes" in change:
            layout = Moments(task.spec.classes, task.spec.dimension)
            total = moment_sum(task, units, layout) + noise * rng.standard_normal(layout.length)
            source, steps = prototypes_of(total, layout, noise=noise), steps - 1
        frequencies = frequencies_of(task, target, count=FREQUENCIES, seed=seed)
        how: Any = {"target": target, "source": source, "frequencies": frequencies, "strength": 1.0}

        def aligned(tensors: Mapping[str, Any]) -> Objective:
            return Objective(alignment=witness_of(task, tensors, **how))

        def apart(tensors: Mapping[str, Any]) -> Objective:
            return Objective(negatives=Negatives(negatives_of(task, tensors, target=target), strength=1.0))

        at_aggregator = "aggregator" in change
        objective = aligned if "weight" in change and not at_aggregator else apart if "negatives" in change else None
        tensors = descend(task, units, steps=steps, rate=rate, noise=noise, rng=rng, objective=objective)
        for _ in range(STEPS[self.kind] if at_aggregator else 0):
            tensors = dict(align(task, tensors, **how, step=rate * NORM))
        return tensors


@dataclass(frozen=True, slots=True)
class ImageAblation:
    """All changes of a study, as a part of a table.

    Attributes:
        study: what is changed.
        out: folder of finished measurements.
        epsilons: ε.
    """

    study: Study
    out: Path
    epsilons: tuple[float, ...] = (1.0, 8.0)

    @property
    def cells(self) -> int:
        return len(self._work())

    def run(self, watch: Callable[[Step], None]) -> list[dict[str, Any]]:
        def score(work: Work) -> float:
            return self.study.score(*work, cache=self.out / "features")

        return work_off(self.out, self.study.kind, self._work(), key=self._key, score=score, watch=watch)

    def finished(self) -> list[dict[str, Any]]:
        return finished_work(self.out, self._work(), key=self._key)

    def take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        take_work(self.out, self._work(), rows, key=self._key)

    def _work(self) -> list[Work]:
        return list(product(self.study.changes, self.epsilons, range(FOLDS)))

    def _key(self, work: Work) -> str:
        facts = [self.study.name, self.study.kind, *work]
        return hashlib.sha256(b"image-ablation/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]
