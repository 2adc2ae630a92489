"""Whole runs of the released FACMIC and FedCLIP training, without privacy, as the yardstick of an experiment.

Wu, Desrosiers, Chaddad: FACMIC (MICCAI 2024); Lu et al.: FedCLIP (IEEE Data Eng. Bull. 2023). All sites are in one
process and nothing is summed securely: the losses couple the records of a batch, so that no site's door would let such
an answer pass, and a site is never asked for one. The rows have the columns of ``simulate``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsecure.data.dataset import Labels
from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.evaluation import accuracy, balanced_accuracy
from fedsecure.simulation.folders import Experiment, Part
from fedsecure.simulation.simulate import read_row, write_row

if TYPE_CHECKING:
    from fedsecure.learning.adapters import Float32
    from fedsecure.learning.reference import ReferenceRecipe

ROUNDS, BATCH = 50, 32
WHY = "its losses and its batch normalisation couple the records of a batch, so no clipping bounds what one record does"
# Of the released program: FACMIC with each of the three target features, FedCLIP, and sites that never average.
NAMES = (
    "reference",
    "reference-adapted",
    "reference-adapted-with-gradient",
    "reference-fedclip",
    "reference-local",
)
# Those to which it makes no difference how a target is used.
OTHERS = ("reference-fedclip", "reference-local")
Scores = dict[str, Any]
Watch = Callable[[int, int], None]


def recipe_of(name: str, *, scale: float, steps: int | None = None, batch: int | None = None) -> ReferenceRecipe:
    """The recipe of one of ``NAMES``.

    Args:
        name: of the reference.
        scale: exp(logit_scale) of the encoder.
        steps: a round, 0 for one pass; 199 as released where None.
        batch: 32 where None.

    Raises:
        ModelError: FS-1662 a value out of range.
    """
    from fedsecure.learning.reference import FACMIC, FEDCLIP

    base = {
        "reference": FACMIC,
        "reference-adapted": replace(FACMIC, target="adapted"),
        "reference-adapted-with-gradient": replace(FACMIC, target="adapted-with-gradient"),
        "reference-fedclip": FEDCLIP,
        "reference-local": FACMIC,
    }[name]
    return replace(
        base,
        scale=scale,
        steps=base.steps if steps is None else steps,
        batch=base.batch if batch is None else batch,
    )


def check_consent(epsilon: float, reason: str, *, why: str = WHY, instead: str = "facmic") -> None:
    """Refuse a reference run that is to be private, or that nobody gave a reason for; PrivacyError FS-1218.

    Args:
        epsilon: asked for; only ∞ passes.
        reason: why the data need no privacy.
        why: what of this training cannot be made private.
        instead: the method to run privately.
    """
    if math.isinf(epsilon) and reason.strip():
        return
    found = "without a reason" if math.isinf(epsilon) else f"with ε = {epsilon:g}"
    raise PrivacyError(
        "FS-1218",
        f"the released training {found}",
        expected=f"a run without privacy (ε = inf), and why the data need none: {why}",
        cure=f"use the method {instead} for a private run; for the reference say --epsilon inf and give a reason",
    )


def check_sizes(experiment: Experiment, *, batch: int = BATCH) -> None:
    """ModelError FS-1664 where a site has fewer records than a batch, which is best known before anything trains."""
    small = [f"{len(part)} training records at {name}" for name, part in experiment.train.items() if len(part) < batch]
    if small:
        raise ModelError(
            "FS-1664",
            f"{', '.join(small)}, for batches of {batch}",
            expected="at least one full batch at every site",
            cure="lower --reference-batch, leave the references out with --method, or give the site more records",
        )


def run_reference(
    experiment: Experiment,
    name: str,
    *,
    out: Path,
    seed: int,
    reason: str,
    partition: str,
    epsilon: float = math.inf,
    rounds: int = ROUNDS,
    steps: int | None = None,
    batch: int | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """One run; taken from ``out`` where it is finished there.

    Args:
        experiment: records.
        name: one of ``NAMES``.
        out: folder of results, made by :func:`fedsecure.simulation.simulate.open_results`.
        seed: of first weights and batches.
        reason: why the data need no privacy; kept in the row.
        partition: what to call the way the records are shared out.
        epsilon: ∞; there for the refusal.
        rounds, steps, batch: as released where not given.
        watch: called with (round, rounds).

    Returns:
        a row as of ``simulate``, with further ``tests``, ``sites`` and ``best``: scores of the last round, by test set
        and by site, and of the round that did best on the test set itself, which is no fair estimate.

    Raises:
        PrivacyError: FS-1218 as :func:`check_consent`.
        ModelError: FS-1662, FS-1663 a recipe or a number of records that cannot be trained with.
    """
    check_consent(epsilon, reason)
    recipe = recipe_of(name, scale=experiment.scale, steps=steps, batch=batch)
    aligned = recipe.alignment > 0 and experiment.target is not None
    facts = [name, {**asdict(recipe), "aligned": aligned}, experiment.digest, partition, seed, rounds]
    key = hashlib.sha256(b"fedsecure/reference/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]
    finished = read_row(out, key)
    if finished is not None:
        return finished
    begun = time.monotonic()
    curve, sent = _train(experiment, recipe, local=name == "reference-local", seed=seed, rounds=rounds, watch=watch)
    last = curve[-1]
    whole = next(iter(experiment.tests))
    best = max(range(rounds), key=lambda index: curve[index]["tests"][whole]["accuracy"])
    row = {
        "method": name,
        "partition": partition,
        "noise": "none",
        "sites": len(experiment.train),
        "epsilon": epsilon,
        "seed": seed,
        "zero_shot": zero_shot(experiment)[whole]["accuracy"],
        "accuracy": last["tests"][whole]["accuracy"],
        "balanced_accuracy": last["tests"][whole]["balanced_accuracy"],
        "epsilon_spent": None,
        "rounds": rounds,
        "bytes_up": rounds * sent,
        "no_privacy": reason,
        "cell": key,
        "tests": last["tests"],
        "site_scores": last["sites"],
        "best": {"round": best + 1, "tests": curve[best]["tests"]},
        "curve": [entry["tests"][whole]["accuracy"] for entry in curve],
        "alignment": aligned,
        "wall_seconds": round(time.monotonic() - begun, 2),
    }
    write_row(out, key, row)
    return row


def _train(
    experiment: Experiment, recipe: ReferenceRecipe, *, local: bool, seed: int, rounds: int, watch: Watch
) -> tuple[list[dict[str, Scores]], int]:
    """Scores after each round, and the bytes a site sends in one."""
    import torch

    from fedsecure.learning import reference

    sites = {
        name: reference.ReferenceSite(
            features=part.features,
            labels=part.labels,
            text=experiment.text,
            target=experiment.target,
            recipe=recipe,
            seed=1000 * seed + index,
        )
        for index, (name, part) in enumerate(experiment.train.items())
    }
    counts = [len(part) for part in experiment.train.values()]
    if recipe.alignment > 0 and experiment.target is not None:
        counts.append(len(experiment.target))
    for count in counts:
        # Refuses too small a site before the first of them has trained.
        next(reference.endless_batches(count, recipe.batch, generator=torch.Generator()))
    first = reference.start(experiment.text.shape[1], gate=recipe.gate, seed=seed)
    held: dict[str, dict[str, Float32]] = dict.fromkeys(sites, first)
    curve = []
    for round in range(rounds):
        watch(round, rounds)
        trained = {name: site.train(held[name])[0] for name, site in sites.items()}
        if local:
            held = trained
        else:
            weights = [site.weight for site in sites.values()]
            mean = reference.average(list(trained.values()), weights, previous=first)
            held = dict.fromkeys(sites, mean)
        curve.append(_scores(experiment, held, recipe))
    watch(rounds, rounds)
    return curve, 0 if local else sum(value.nbytes for value in first.values())


def _scores(
    experiment: Experiment, held: Mapping[str, dict[str, Float32]], recipe: ReferenceRecipe
) -> dict[str, Scores]:
    """By test set, a mean over the sites' modules where they differ; and by site, on its own test records."""
    from fedsecure.learning.reference import predict

    def of(part: Part, values: dict[str, Float32]) -> Scores:
        found = predict(values, part.features, experiment.text, gate=recipe.gate)
        return score(found, part.labels, len(experiment.classes))

    different = list({id(values): values for values in held.values()}.values())
    tests = {}
    for name, part in experiment.tests.items():
        tests[name] = mean_score([of(part, values) for values in different])
    return {"tests": tests, "sites": {name: of(part, held[name]) for name, part in experiment.own.items()}}


def score(predicted: Any, labels: Labels, classes: int) -> Scores:
    """Accuracy, balanced accuracy and the number of records."""
    totals = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return {
        "accuracy": accuracy(hits, totals),
        "balanced_accuracy": balanced_accuracy(hits, totals),
        "records": len(labels),
    }


def mean_score(found: Sequence[Scores]) -> Scores:
    """The mean over several models of scores on the same records."""
    means = {metric: float(np.mean([f[metric] for f in found])) for metric in ("accuracy", "balanced_accuracy")}
    return {**means, "records": found[0]["records"]}


def zero_shot(experiment: Experiment) -> dict[str, Scores]:
    """Plain CLIP on each test set: the class whose text is nearest."""
    text = experiment.text / np.linalg.norm(experiment.text, axis=1, keepdims=True)
    return {
        name: score((part.features @ text.T).argmax(axis=1), part.labels, len(experiment.classes))
        for name, part in experiment.tests.items()
    }


def adapter_scores(experiment: Experiment, file: Path) -> dict[str, Scores]:
    """Scores of a trained adapter (``simulate``'s ``adapters/<cell>.safetensors``), by test set and by site.

    Raises:
        ModelError: FS-163x as :func:`fedsecure.learning.artefact.load_adapter`.
    """
    from fedsecure.learning.artefact import load_adapter

    adapter = load_adapter(file)

    def of(part: Part) -> Scores:
        found, _ = adapter.predict(part.features, fingerprint=adapter.metadata.fingerprint)
        return score(found, part.labels, len(experiment.classes))

    return {
        "tests": {name: of(part) for name, part in experiment.tests.items()},
        "sites": {name: of(part) for name, part in experiment.own.items()},
    }
