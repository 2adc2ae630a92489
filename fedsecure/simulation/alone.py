"""Local-only training, the baseline that a federation has to beat: every site trains by itself, under its own budget.

Nothing is sent and nothing is summed, so a site's own noise carries its whole ε: the same steps, clip and loss as the
federated method, the noise multiplier calibrated for the site alone, and rate and temperature by the signal that its
own records give. A score is the mean over the sites' models on the common test. The rows have the columns of
``simulate``; there is no privacy report, for no ledger is charged.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.config import default_rounds
from fedsecure.data.dataset import Features, Labels
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.evaluation import predict
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import IMAGE_PRIOR, prior_of_images, suggest, train_locally
from fedsecure.learning.units import UnitFeatures, group_units
from fedsecure.methods.descent import AdapterDescent
from fedsecure.methods.recommend import CLIP_NORM
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.accounting import mu_for_epsilon
from fedsecure.privacy.plan import TOKEN_NOISE
from fedsecure.simulation.folders import Experiment, Part
from fedsecure.simulation.reference import Scores, mean_score, score, zero_shot
from fedsecure.simulation.simulate import read_row, write_row

# What a local-only run of a method is called: local-only-linear, local-only-facmic.
PREFIX = "local-only-"
Watch = Callable[[int, int], None]


def trained_alone(name: str) -> AdapterDescent:
    """The method behind ``local-only-NAME``. Raises ConfigError FS-1010 for one that has no steps to take alone."""
    method = load_training_method(name.removeprefix(PREFIX))
    if not isinstance(method, AdapterDescent) or method.local_only:
        raise ConfigError(
            "FS-1010",
            f"{name}: the method takes no steps that a site could take by itself, or averages between them",
            expected="a method of gradient steps, such as linear, facmic, fedclip, bottleneck or fedfocal",
            cure=f"write {PREFIX}linear",
        )
    return method


def run_alone(
    experiment: Experiment,
    name: str,
    *,
    out: Path,
    epsilon: float,
    seed: int,
    delta: float,
    partition: str,
    rounds: int | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """One run of every site by itself; taken from ``out`` where it is finished there.

    Args:
        experiment: records.
        name: ``local-only-METHOD``.
        out: folder of results, made by :func:`fedsecure.simulation.simulate.open_results`.
        epsilon: of each site; ∞ is a token of noise.
        seed: of first weights and noise.
        delta: of the guarantee.
        partition: what to call the way the records are shared out.
        rounds: full-batch steps; the method's own number where not given.
        watch: called with (site, sites).

    Returns:
        a row as of ``simulate``, with ``tests`` and ``site_scores``: means over the sites' models by test set, and each
        site's model on its own test records.

    Raises:
        ConfigError: FS-1010 as :func:`trained_alone`.
    """
    method = trained_alone(name)
    steps = default_rounds(method.name) if rounds is None else rounds
    facts = [name, method.version, experiment.digest, partition, seed, steps, str(epsilon), delta]
    key = hashlib.sha256(b"fedsecure/alone/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]
    finished = read_row(out, key)
    if finished is not None:
        return finished
    begun = time.monotonic()
    noise = TOKEN_NOISE if math.isinf(epsilon) else math.sqrt(steps) / mu_for_epsilon(epsilon, delta)
    found: dict[str, list[Scores]] = {test: [] for test in experiment.tests}
    own: dict[str, Scores] = {}
    for index, (site, part) in enumerate(experiment.train.items()):
        watch(index, len(experiment.train))
        rng = np.random.default_rng((seed, index))
        task, tensors = _train(method, experiment, part, steps=steps, noise=noise, rng=rng, seed=seed)

        def of(held: Part, task: HeadTask = task, tensors: Mapping[str, Any] = tensors) -> Scores:
            return score(predict(task, tensors, held.features)[0], held.labels, len(experiment.classes))

        for test, held in experiment.tests.items():
            found[test].append(of(held))
        if site in experiment.own:
            own[site] = of(experiment.own[site])
    watch(len(experiment.train), len(experiment.train))
    tests = {test: mean_score(scores) for test, scores in found.items()}
    whole = next(iter(experiment.tests))
    row = {
        "method": name,
        "partition": partition,
        "noise": "own",
        "sites": len(experiment.train),
        "epsilon": epsilon,
        "seed": seed,
        "zero_shot": zero_shot(experiment)[whole]["accuracy"],
        "accuracy": tests[whole]["accuracy"],
        "balanced_accuracy": tests[whole]["balanced_accuracy"],
        "epsilon_spent": None if math.isinf(epsilon) else epsilon,
        "rounds": steps,
        "bytes_up": 0,
        "cell": key,
        "tests": tests,
        "site_scores": own,
        "wall_seconds": round(time.monotonic() - begun, 2),
    }
    write_row(out, key, row)
    return row


def as_units(features: Features, labels: Labels, *, classes: int) -> UnitFeatures:
    """Records, each a unit of its own."""
    names = [str(row) for row in range(len(labels))]
    rows = np.asarray(features, np.float32)
    return group_units(rows, labels, names, cap=1, key=b"own", classes=classes, record_ids=names)


def _train(
    method: AdapterDescent,
    experiment: Experiment,
    part: Part,
    *,
    steps: int,
    noise: float,
    rng: np.random.Generator,
    seed: int,
) -> tuple[HeadTask, dict[str, npt.NDArray[np.float32]]]:
    """A site's task and its trained adapter; ``noise`` is the multiplier of each step."""
    classes, dimension = experiment.text.shape
    spec = AdapterSpec(method.kind, dimension, classes)
    rate, temperature = suggest(
        method.kind,
        mu_total=math.sqrt(steps) / noise,
        units=len(part),
        classes=classes,
        dimension=dimension,
        steps=steps,
        max_grad_norm=CLIP_NORM,
    )
    centre = np.zeros(dimension, np.float32) if experiment.mean is None else experiment.mean
    if method.kind == "linear" and prior_of_images(experiment.text, centre):
        temperature *= IMAGE_PRIOR

    def noised(total: Vector, norm: float) -> Vector:
        return total + noise * norm * rng.standard_normal(total.size)

    task = HeadTask(spec, experiment.text, centre, temperature, objective=method.objective)
    start = spec.initial(seed=f"alone, seed {seed}".encode())
    change = train_locally(
        task,
        start,
        as_units(part.features, part.labels, classes=classes),
        steps=steps,
        learning_rate=rate,
        max_grad_norm=CLIP_NORM,
        normaliser=len(part),
        sample=lambda count: np.ones(count, np.bool_),
        privatise=noised,
    )
    return task, {name: (start[name] + change[name]).astype(np.float32) for name in spec.shapes}
