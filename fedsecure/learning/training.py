"""Local training with noise in every step, and the learning rates that follow the predicted signal-to-noise.

``train_locally`` is DP gradient descent as privacy.md §0.1 and facmic.md §5.4-7: clipped per-unit sum, Gaussian noise,
division by a public normaliser; the noise is drawn by the privacy engine the caller hands in, never here.
No torch at import: an aggregator calls :func:`suggest`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.adapters import AdapterKind, Vector
from fedsecure.learning.engines import EngineName, clipped_sums
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

Privatise = Callable[[Vector, float], Vector]
Sample = Callable[[int], npt.NDArray[np.bool_]]

# A single image says less about its class than a text does: the linear head's temperature is lower by this factor.
IMAGE_PRIOR = 0.5
# A unit's gradient hardly exceeds this, so a larger C clips nothing and must not lower the rate any further.
_LARGEST_GRADIENT: Mapping[str, float] = {"linear": 0.7}


def train_locally(
    task: HeadTask | TowerTask,
    start: Mapping[str, npt.NDArray[Any]],
    units: UnitFeatures,
    *,
    steps: int,
    learning_rate: float,
    max_grad_norm: float,
    normaliser: float,
    privatise: Privatise,
    sample: Sample,
    proximal: float = 0.0,
    engine: EngineName = "auto",
    device: str = "auto",
) -> dict[str, Vector]:
    """Take ``steps`` noisy gradient steps and return how far they led.

    Each step: parameters −= learning_rate · privatise(Σ clipped gradients of the sampled units, C) / normaliser.
    An empty sample is a step like any other: zeros, noised.

    With ``proximal`` ρ > 0 each step ends with the proximal operator of FedProx's term μ/2·‖w − w_start‖² (Li et al.,
    MLSys 2020, equation 2): the distance from the start shrinks by 1/(1 + ρ), ρ = η·μ. That is stable for any rate,
    and free, since the term knows no record.

    Args:
        task: the adapter and its constants.
        start: tensors of the round's start, shapes of ``task.spec``.
        units: the site's training units.
        steps: E ≥ 1.
        learning_rate: η > 0, per step.
        max_grad_norm: C.
        normaliser: public number of units expected in a batch; never the realised one (privacy.md P11).
        privatise: (sum, C) → the sum with its noise, once per step; ``Release.privatise``.
        sample: number of units → (U,) bool, who takes part; ``Release.sample``.
        proximal: ρ ≥ 0.
        engine, device: as in :func:`fedsecure.learning.engines.clipped_sum`.

    Returns:
        name → float64 array, end minus start.

    Raises:
        PrivacyError: FS-1238 for steps, rate or normaliser that are not positive; FS-1239 when ``sample`` or
            ``privatise`` return another shape.
    """
    if steps < 1 or not all(math.isfinite(x) and x > 0 for x in (learning_rate, normaliser)):
        raise PrivacyError(
            "FS-1238",
            f"steps = {steps}, learning_rate = {learning_rate}, normaliser = {normaliser}",
            expected="at least one step, and a finite rate and normaliser above 0",
            cure="mend method.local_steps, method.learning_rate or the site's max_units",
        )
    import torch

    origin = task.spec.flatten(start)
    current = origin.copy()
    how: Any = {"max_grad_norm": max_grad_norm, "engine": engine, "device": device, "precision": "float32"}
    everyone = clipped_sums(task, units, **how, keep=True)
    for _ in range(steps):
        chosen = sample(len(units))
        if chosen.shape != (len(units),) or chosen.dtype != np.bool_:
            raise _foreign("sampler", chosen, f"({len(units)},) bool")
        at = everyone if chosen.all() else clipped_sums(task, units.select(chosen), **how)
        gradient = at(_shaped(task, current))
        noisy = privatise(gradient, max_grad_norm)
        if noisy.shape != gradient.shape:
            raise _foreign("noise", noisy, f"{gradient.shape}")
        # In one pass over vectors that no cache holds.
        torch.from_numpy(current).sub_(torch.from_numpy(noisy), alpha=learning_rate / normaliser)
        if proximal:
            current = origin + (current - origin) / (1 + proximal)
    current -= origin
    return _shaped(task, current)


def _shaped(task: HeadTask | TowerTask, vector: Vector) -> dict[str, Vector]:
    # float64 all along: AdapterSpec.unflatten would round every step to float32.
    tensors: dict[str, Vector] = {}
    at = 0
    for name, shape in task.spec.shapes.items():
        size = math.prod(shape)
        tensors[name] = vector[at : at + size].reshape(shape)
        at += size
    return tensors


def _foreign(what: str, found: npt.NDArray[Any], expected: str) -> PrivacyError:
    return PrivacyError(
        "FS-1239",
        f"the {what} returned {found.dtype} of shape {found.shape}",
        expected=expected,
        cure="pass Release.sample and Release.privatise unchanged",
    )


def prior_of_images(text: npt.NDArray[Any], centre: npt.NDArray[Any]) -> bool:
    """Whether the prior's rows (K, d) are image features, one example a class, and no texts; from public constants.

    Images and texts live in different cones (Liang et al. 2022, arXiv 2203.02053): the mean of image rows points where
    the images' public mean (d,) points, that of texts does not. False where there is no public mean, all zeros.
    """
    mean = unit_rows(np.asarray(text, np.float64)).mean(axis=0)
    lengths = float(np.linalg.norm(mean) * np.linalg.norm(centre))
    return lengths > 0 and float(mean @ centre) > 0.8 * lengths


def suggest(
    kind: AdapterKind,
    *,
    mu_total: float,
    units: float,
    classes: int,
    dimension: int,
    steps: int = 20,
    max_grad_norm: float = 0.1,
) -> tuple[float, float]:
    """Learning rate and temperature from public numbers only; as μ → 0 training goes to zero-shot, not below.

    The step is ``learning_rate · noisy sum / units``; nearly every gradient is clipped, so a rate stands for
    ``learning_rate · max_grad_norm · steps``, the whole way the adapter goes, whatever C and T.

    * linear: the way is min(s, 0.11 s², 128) with s = μ·units/K, the signal-to-noise of one class: noise of about
      2/s of the way reaches each logit, so a linear rate holds the noise in the logits constant, and the square
      keeps it below the differences between the prior's logits where s is small. The temperature, that is the
      weight of the prior, falls as 300/s between 25 and 8; half of it where the prior is images
      (:func:`prior_of_images`).
    * facmic: the gate's exponents get noise of standard deviation g = way·√(d/2)/(μ·units), as LeakyReLU(LayerNorm)
      has norm about √(d/2). Above g = 1 the gate scrambles the features; g = min(0.9, s/94) with
      s = μ·units/√(d/2). A single step goes at most 3 up to s = 300, and at most 8 from s = 800 on: longer ones
      overshoot in noise and the module diverges. So few steps do not use a strong signal up: 60 are the default.
    * facmic_plain: as facmic; normalised by statistics of public images, LeakyReLU has the same norm.
    * fedclip: as facmic with tanh(h) of norm about √d/2 and g = min(0.5, s/250), for there is no norm layer.
    * bottleneck: relu(h) with the bias has norm about 3.4, so the adapted feature gets noise of norm
      way·3.4·√d/(μ·units) in all directions; the way is min(3.4 s, 0.09 s²) with s = μ·units/(3.4·√d).
    * affine: its classifier sees features √d long, so that a way √d times shorter makes the linear head's noise in the
      logits. Map and classifier amplify each other, so the way is 0.3 of that, and 12·K/√d at most; τ is the linear
      head's. Chosen on public records of UCF101, made long-tailed, in a partition of their own.

    The longest steps of the last three are those at 512 features, and shorter in proportion below.

    All were chosen on validation records of CLIP ViT-B/32 features (UCF101, Caltech101), the first two with and
    without centring (``benchmarks/accuracy_study.py``), and the first also on subsets down to 60 records and 4 classes;
    the shorter steps on held-out training slices of FACMIC's brain-tumour set by tiny CLIP, 64 features.

    Args:
        kind: the adapter.
        mu_total: μ > 0 of the whole run's sum: √T over the noise multiplier of the sum (∞ without noise).
        units: declared number of units over all sites.
        classes: K.
        dimension: d.
        steps: T, all gradient steps of the run.
        max_grad_norm: C.

    Raises:
        ModelError: FS-1631 for an unknown kind.
    """
    rule = RULES.get(kind)
    if rule is None:
        raise ModelError(
            "FS-1631",
            f"adapter {kind!r}",
            expected=f"one of {', '.join(RULES)}",
            cure="mend method.name in the settings",
        )
    way, temperature = rule(mu_total * units, classes, dimension, steps)
    return way / (steps * min(max_grad_norm, _LARGEST_GRADIENT.get(kind, 1.0))), temperature


def _narrowness(dimension: int) -> float:
    """By how much the longest step of a module shrinks below the 512 features at which it was found."""
    return min(1.0, dimension / 512)


def _linear(signal: float, classes: int, dimension: int, steps: int) -> tuple[float, float]:
    signal /= classes
    way = min(signal, 0.11 * signal**2, 128.0)
    return way * classes, min(max(300.0 / max(signal, 1.0), 8.0), 25.0)


def _attention(signal: float, classes: int, dimension: int, steps: int) -> tuple[float, float]:
    signal /= math.sqrt(dimension / 2)
    narrow = _narrowness(dimension)
    longest = min(max(signal / 100, 3.0 * math.sqrt(narrow)), 8.0 * narrow)
    return min(min(0.9, signal / 94) * signal, longest * steps), 30.0


def _tanh_gate(signal: float, classes: int, dimension: int, steps: int) -> tuple[float, float]:
    signal /= math.sqrt(dimension) / 2
    return min(min(0.5, signal / 250) * signal, 20.0 * _narrowness(dimension) * steps), 30.0


def _bottleneck(signal: float, classes: int, dimension: int, steps: int) -> tuple[float, float]:
    signal /= 3.4 * math.sqrt(dimension)
    return min(3.4 * signal, 0.09 * signal**2, 10.0 * _narrowness(dimension) * steps), 30.0


def _affine(signal: float, classes: int, dimension: int, steps: int) -> tuple[float, float]:
    way, temperature = _linear(signal, classes, dimension, steps)
    return min(0.3 * way, 12.0 * classes) / math.sqrt(dimension), temperature


# Kind → (μ·units, K, d, T) → the whole way, and the temperature.
RULES: Mapping[AdapterKind, Callable[[float, int, int, int], tuple[float, float]]] = {
    "linear": _linear,
    "facmic": _attention,
    "facmic_plain": _attention,
    "fedclip": _tanh_gate,
    "bottleneck": _bottleneck,
    "affine": _affine,
}
