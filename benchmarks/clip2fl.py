"""Time and memory of CLIP2FL's step at the aggregator: federated features, then a classifier re-trained on them.

    python -m benchmarks.clip2fl [--json] [--quick]

At the size of CIFAR-100: 100 features of width 512 for each of 100 classes, 100 matching steps, 300 epochs of
re-training. Targets: under 20 s on two cores, and memory of O(K·m·K), not (K·m)². The numbers are generated; how long
it takes does not depend on them. ``--quick`` runs the same code on a small case, which measures nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsecure.learning.class_gradients import ClassGradients, Rows
from fedsecure.learning.classifier import Classifier, Retraining, fresh_classifier, retrain
from fedsecure.learning.federated_features import Matching, PrototypeContrast, find_features, fresh_features

TARGET_SECONDS = 20.0


@dataclass(frozen=True)
class Size:
    """K, m, d, matching steps and epochs."""

    classes: int = 100
    each: int = 100
    dimension: int = 512
    steps: int = 100
    epochs: int = 300


QUICK = Size(classes=5, each=4, dimension=8, steps=3, epochs=2)


def measure(size: Size, rows: Rows) -> dict[str, Any]:
    """Seconds by the clock and of the processor for each part, and the peak resident memory of the process."""
    rng = np.random.default_rng(0)
    layout = ClassGradients(size.classes, size.dimension, rows)
    target = rng.standard_normal(layout.length)
    text = rng.standard_normal((size.classes, size.dimension))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    classifier = fresh_classifier(size.classes, size.dimension, seed=1)
    features = fresh_features(size.classes, size.each, size.dimension, seed=2)
    before = _peak_mb()
    clock, work = time.perf_counter(), time.process_time()
    found = find_features(
        features, classifier, target, layout,
        matching=Matching(steps=size.steps), contrast=PrototypeContrast(), text=text,
    )  # fmt: skip
    matched, matched_work = time.perf_counter() - clock, time.process_time() - work
    clock, work = time.perf_counter(), time.process_time()
    trained: Classifier = retrain(found.features, classifier, Retraining(epochs=size.epochs), seed=3)
    retrained, retrained_work = time.perf_counter() - clock, time.process_time() - work
    assert np.isfinite(trained.weight).all()
    return {
        "matching_s": matched,
        "matching_cpu_s": matched_work,
        "retraining_s": retrained,
        "retraining_cpu_s": retrained_work,
        "step_s": matched + retrained,
        "step_cpu_s": matched_work + retrained_work,
        "features_mb": features.nbytes / 2**20,
        "peak_mb": _peak_mb(),
        "grown_mb": _peak_mb() - before,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clip2fl", description="CLIP2FL's aggregator step.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else, on stdout")
    parser.add_argument("--quick", action="store_true", help="a small case: tests the benchmark, measures nothing")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    result: dict[str, Any] = {
        "diagonal": measure(size, "diagonal"),
        "full": measure(size, "full"),
        "target_s": TARGET_SECONDS,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    table = Table("rows", "figure", "value", title="CLIP2FL, the aggregator's step")
    for rows in ("diagonal", "full"):
        for name, value in result[rows].items():
            table.add_row(rows, name, f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    main()
