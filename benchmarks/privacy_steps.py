"""One gradient step of an adapter, with privacy and without, and under Opacus: the child process of the benchmark.

    python -m benchmarks.privacy_steps '[{"kind": "facmic", "batch": 256, "repeats": 40, "opacus_repeats": 10}]'

One process measures all variants of one batch size in turns, on one thread and with the memory allocator's settings it
was started with, and prints one JSON object a case: for every variant its least and its median milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.modules import build_module
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy.grid import distributed_segment, privatise_on_grid, round_to_grid
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.secagg.ring import to_ring

SEED = 0
WIDTH, CLASSES = 512, 10
CLIP, NOISE, RATE = 0.1, 1.0, 0.1
# Local training keeps its vector between steps, and so do the others: a turn is this many steps.
STEPS = 4


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps([figures(settings) for settings in json.loads(sys.argv[1])]))


def figures(settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What one case's settings ask for."""
    if settings["kind"] == "sampler":
        draw = partial(PrivacyRng().discrete_gaussian, settings["batch"], Fraction(2**40))
        return measure({"sampler": (draw, 1, 1)}, settings)
    return measure(variants(settings["kind"], settings["batch"], opacus=settings["opacus_repeats"] > 0), settings)


def measure(
    turns: dict[str, tuple[Callable[[], Any], int, int]], settings: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Milliseconds a step: every variant once in each turn, Opacus' in the first ``opacus_repeats`` only.

    Args:
        turns: name → (work, steps it takes, 1 or 0 for Opacus').
        settings: ``repeats`` and ``opacus_repeats``.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for work, _, _ in turns.values():
        work()
    for turn in range(settings["repeats"]):
        for name, (work, steps, ours) in turns.items():
            if ours or turn < settings["opacus_repeats"]:
                start = time.perf_counter()
                work()
                taken[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {name: {"best": min(ms), "median": statistics.median(ms)} for name, ms in taken.items()}


def variants(kind: Any, batch: int, *, opacus: bool) -> dict[str, tuple[Callable[[], Any], int, int]]:
    """The same step in every way, on the same generated records."""
    task, start, units = case(kind, batch)
    turns: dict[str, tuple[Callable[[], Any], int, int]] = {
        "plain": (plain(task, start, units, torch.float32), STEPS, 1),
        "private": (local(task, start, units), STEPS, 1),
        "plain_float64": (plain(task, start, units, torch.float64), STEPS, 1),
        "distributed": (distributed(task, start, units), 1, 1),
    }
    if opacus:
        for precision, suffix in ((torch.float32, ""), (torch.float64, "_float64")):
            for mode in ("hooks", "ghost"):
                turns[f"opacus_{mode}{suffix}"] = (opacus_step(task, start, units, mode, precision), 1, 0)
    return turns


def case(kind: Any, batch: int) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    """Generated records, one a unit, and an adapter that has moved away from its start."""
    rng = np.random.default_rng(SEED)
    spec = AdapterSpec(kind, WIDTH, CLASSES)
    text = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    task = HeadTask(spec, text, (0.02 * rng.normal(size=WIDTH)).astype(np.float32), 30.0)
    start = {n: (v + 0.02 * rng.normal(size=v.shape)).astype(np.float32) for n, v in spec.initial(b"public").items()}
    features = rng.normal(size=(batch, 1, WIDTH)).astype(np.float32)
    return task, start, UnitFeatures(features, rng.integers(0, CLASSES, (batch, 1)), np.ones((batch, 1), np.bool_))


def plain(task: HeadTask, start: Any, units: UnitFeatures, precision: torch.dtype) -> Callable[[], None]:
    """Autograd and ``torch.optim.SGD``."""
    module, optimiser, features, labels = _torch_parts(task, start, units, precision)

    def steps() -> None:
        for _ in range(STEPS):
            optimiser.zero_grad()
            functional.cross_entropy(module(features), labels).backward()
            optimiser.step()

    return steps


def local(task: HeadTask, start: Any, units: UnitFeatures) -> Callable[[], Any]:
    """What a site runs under ``noise = "local"``: ``train_locally``, with the door's length check and noise."""
    rng = PrivacyRng()

    def privatise(total: Any, clip: float) -> Any:
        assert float(np.linalg.norm(total)) <= len(units) * clip
        return privatise_on_grid(total, clip_norm=clip, noise_multiplier=NOISE, rng=rng)

    return lambda: train_locally(
        task,
        start,
        units,
        steps=STEPS,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        normaliser=len(units),
        privatise=privatise,
        sample=lambda count: rng.poisson_mask(count, 1.0),
        device="cpu",
    )


def distributed(task: HeadTask, start: Any, units: UnitFeatures) -> Callable[[], Any]:
    """What a site runs under ``noise = "distributed"`` before it masks: clipped sum, grid, share of discrete noise."""
    rng = PrivacyRng()
    segment = distributed_segment(
        "gradient", task.spec.parameters, clip_norm=CLIP, noise_multiplier=NOISE, honest=3, sites=3, units=len(units)
    )

    def step() -> Any:
        words = round_to_grid(clipped_sum(task, start, units, max_grad_norm=CLIP, device="cpu"), segment)
        return to_ring(words + rng.discrete_gaussian(segment.length, segment.noise_variance), 32)

    return step


def opacus_step(
    task: HeadTask, start: Any, units: UnitFeatures, mode: str, precision: torch.dtype
) -> Callable[[], None]:
    """Opacus' engine with its default hooks or its ghost mode; per-record clip, noise and SGD, all by Opacus."""
    module, optimiser, features, labels = _torch_parts(task, start, units, precision)
    with warnings.catch_warnings():
        # Opacus and its dependencies warn of their own deprecations and that its noise is not cryptographic.
        warnings.simplefilter("ignore")
        from opacus import PrivacyEngine

        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=len(labels))
        made = PrivacyEngine().make_private(
            module=module,
            optimizer=optimiser,
            data_loader=loader,
            criterion=torch.nn.CrossEntropyLoss(),
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    private, own = made[0], made[1]
    loss = made[2] if mode == "ghost" else torch.nn.CrossEntropyLoss()

    def step() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            own.zero_grad()
            loss(private(features), labels).backward()
            own.step()

    return step


def _torch_parts(task: HeadTask, start: Any, units: UnitFeatures, precision: torch.dtype) -> tuple[Any, Any, Any, Any]:
    module = build_module(task, start, device=torch.device("cpu"), dtype=precision)
    features = torch.from_numpy(units.features[:, 0]).to(precision)
    return module, torch.optim.SGD(module.parameters(), lr=RATE), features, torch.from_numpy(units.labels[:, 0])


if __name__ == "__main__":
    main()
