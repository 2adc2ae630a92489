"""What a class gradient tells of a class of one image, and what a bound and noise leave of it (docs/clip2fl.md).

CReFF and CLIP2FL have sites send a classifier's gradient for each class they hold. For one image it is
dW = (p − e_c) zᵀ and db = p − e_c, so that z = dW_j ÷ db_j is the image's feature, exactly, whichever row is taken.
Secure aggregation hides which site sent what, and nothing more: of a class that one site holds the sum is that site's.
The attacker is the aggregator; it also has a thousand images, one of which may be the one, and guesses.

    python examples/class_gradient_leak.py                          # generated features
    python examples/class_gradient_leak.py --features FILE.npz      # your own (docs/datasets.md)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum
from fedsecure.learning.classifier import Classifier, fresh_classifier
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy import accounting
from fedsecure.privacy.grid import distributed_segment, from_grid, round_to_grid
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.secagg.ring import lift, to_ring

Array = npt.NDArray[np.float64]

SITES, HONEST, CLIP, CANDIDATES = 5, 3, 1.0, 1000
COUNTS = (1, 10, 100, 1000)
PROTECTIONS = ("as published", "summed", "bounded, summed", "bounded, noised, summed")


@dataclass(frozen=True)
class Told:
    """What the attacker gets out of the slot of the class, averaged over draws.

    Attributes:
        cosine: with the feature of one of its images.
        right: how often that image is the one picked among the candidates.
        mean: cosine with the class's mean feature, which is what the aggregator needs.
    """

    cosine: float
    right: float
    mean: float


def records(rows: Array, label: int) -> UnitFeatures:
    """Images of one class as units of one record."""
    shape = (len(rows), 1)
    labels = np.full(shape, label, np.int64)
    return UnitFeatures(rows[:, None].astype(np.float32), labels, np.ones(shape, np.bool_))


def sent(rows: Array, classifier: Classifier, protection: str, noise_multiplier: float, rng: PrivacyRng) -> Array:
    """The slot of class 0 in what the aggregator sees, (R, d + 1): only the first of the sites holds such images."""
    full = "bounded" not in protection
    layout = ClassGradients(classifier.classes, classifier.dimension, "full" if full else "diagonal")
    bound = np.inf if full else CLIP
    units = records(rows, 0)
    values = class_gradient_sum(units.features, units, classifier, layout, clip_norm=bound)
    if protection == "bounded, noised, summed":
        segment = distributed_segment(
            "class_gradients", layout.length, clip_norm=CLIP, noise_multiplier=noise_multiplier, honest=HONEST,
            sites=SITES, units=max(COUNTS),
        )  # fmt: skip
        words = np.zeros(layout.length, np.uint32)
        for site in range(SITES):
            own = round_to_grid(values if site == 0 else np.zeros_like(values), segment)
            words = words + to_ring(own + rng.discrete_gaussian(layout.length, segment.noise_variance))
        values = from_grid(lift(words), segment)
    elif "summed" in protection:
        # The masks cancel in the sum, and all other sites' slots of this class are zeros.
        values = values + sum(np.zeros_like(values) for _ in range(SITES - 1))
    return values.reshape(layout.shape)[0]


def read_off(slot: Array) -> Array:
    """z: the row with the largest bias entry over that entry; noise makes it a guess like any other."""
    row = int(np.abs(slot[:, -1]).argmax())
    return np.asarray(slot[row, :-1] / slot[row, -1], np.float64)


def cosines(rows: Array, one: Array) -> Array:
    return np.asarray(rows @ one / np.maximum(np.linalg.norm(rows, axis=-1) * np.linalg.norm(one), 1e-300), np.float64)


def attack(x: Array, protection: str, count: int, noise_multiplier: float, repeats: int, rng: PrivacyRng) -> Told:
    """Draw ``count`` images for the class, read its slot, and look for one of them among the candidates."""
    draws = np.random.default_rng(count)
    classifier = fresh_classifier(10, x.shape[1], seed=0)
    told = []
    for _ in range(repeats):
        chosen = draws.choice(len(x), size=CANDIDATES + count - 1, replace=False)
        candidates, mine = x[chosen[:CANDIDATES]], x[np.r_[chosen[0], chosen[CANDIDATES:]]]
        found = read_off(sent(mine, classifier, protection, noise_multiplier, rng))
        near = cosines(candidates, found)
        # The bias's sign is noise where there is noise; a class's mean is known up to it.
        told.append((near[0], near.argmax() == 0, abs(cosines(mine.mean(axis=0)[None], found)[0])))
    return Told(*(float(np.mean(column)) for column in zip(*told, strict=True)))


def load(features: Path | None) -> Array:
    """Centred unit features."""
    if features is None:
        rng = np.random.default_rng(0)
        x = 0.05 * rng.normal(size=512) + rng.normal(size=(4000, 512)) / np.sqrt(512)
    else:
        from fedsecure.config import DatasetConfig
        from fedsecure.data.loading import open_dataset, read_feature_header

        header = read_feature_header(features)
        data = open_dataset(DatasetConfig(name="demo", path=features, split="train"), classes=header.classes)
        x = np.asarray(data.features(), np.float64)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        x = x - x.mean(axis=0)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float64)


def run(features: Path | None, *, noise_multiplier: float, repeats: int) -> dict[tuple[str, int], Told]:
    """What is told, by protection and number of images of the class."""
    x, rng = load(features), PrivacyRng()
    counts = [count for count in COUNTS if count + CANDIDATES <= len(x)]
    return {
        (protection, count): attack(x, protection, count, noise_multiplier, repeats, rng)
        for protection in PROTECTIONS
        for count in counts
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Read an image's feature off a class gradient.")
    parser.add_argument("--features", type=Path, help="feature file (.npz); generated features by default")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of the release")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    console, began = Console(), time.monotonic()
    noise_multiplier = accounting.calibrate(options.epsilon, options.delta, steps=1)
    found = run(options.features, noise_multiplier=noise_multiplier, repeats=options.repeats)
    table = Table(title="a class that one site holds: how often its image is picked of 1000, and cosines", box=None)
    for column in ("what leaves", "images", "picked", "with it", "with the class's mean"):
        table.add_column(column, justify="left" if column == "what leaves" else "right")
    for (protection, count), told in found.items():
        shown = (f"{told.right:.0%}", f"{told.cosine:.3f}", f"{told.mean:.3f}")
        table.add_row(protection, str(count), *shown)
    console.print(table)
    console.print(
        f"Noise: a release with ε = {options.epsilon:g}, δ = {options.delta:g} (noise multiplier "
        f"{noise_multiplier:.2f}). {time.monotonic() - began:.0f} s.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
