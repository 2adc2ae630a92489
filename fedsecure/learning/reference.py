"""FACMIC's training as its authors released it, without privacy: the yardstick for the private form.

Wu, Desrosiers, Chaddad: FACMIC (MICCAI 2024) and its released program; FedCLIP (Lu et al., IEEE Data Eng. Bull. 2023)
differs by a Tanh gate and has no alignment. Batch normalisation, an in-batch contrastive loss and LMMD couple the
records of a batch, so nothing here can be made private by clipping: whoever trains with it must have said that the run
is not private.

One difference to the program: there all sites draw target batches from one shuffled stream in turn, here each from its
own, so that what a site does depends on no other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.alignment import lmmd

Gate = Literal["batchnorm", "tanh"]
TargetFeature = Literal["raw", "adapted", "adapted-with-gradient"]
Float32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

# Pseudo-labels and evaluation use CLIP's usual scale, whatever the encoder's own is.
EVALUATION_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class ReferenceRecipe:
    """How a site trains in one round, as released.

    Attributes:
        gate: ``batchnorm`` is FACMIC's module, ``tanh`` FedCLIP's.
        steps: optimiser steps a round; every site takes as many, whatever its size. 0: one pass over the data.
        batch: records a batch, labelled and unlabelled alike; the last partial batch is dropped.
        rate, weight_decay, betas, epsilon: Adam with L2 weight decay.
        alignment: weight of LMMD; 0 trains without a target.
        target: which target features LMMD sees. ``raw`` is the released program's.
        scale: τ of the contrastive loss, exp(logit_scale) of the encoder.
        keeps_moments: whether Adam's state outlives the round.

    Raises:
        ModelError: FS-1662 for a value out of range.
    """

    gate: Gate = "batchnorm"
    steps: int = 199
    batch: int = 32
    rate: float = 5e-5
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    alignment: float = 1.0
    target: TargetFeature = "raw"
    scale: float = 100.0
    keeps_moments: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 2 or not self.rate > 0 or self.alignment < 0 or not self.scale > 0:
            raise ModelError(
                "FS-1662",
                f"steps = {self.steps}, batch = {self.batch}, rate = {self.rate}, alignment = {self.alignment}, "
                f"scale = {self.scale}",
                expected="steps >= 0, a batch of two or more, rate and scale above 0, alignment >= 0",
                cure="correct the reference recipe",
            )


FACMIC = ReferenceRecipe()
FEDCLIP = ReferenceRecipe(gate="tanh", alignment=0.0, weight_decay=0.2, keeps_moments=False)


class ReferenceAttention(nn.Module):
    """z = unit(softmax(W2·act(W1 x + b1) + b2) ⊙ x) for (n, d) raw image embeddings; no residual.

    With ``batchnorm`` the activation is LeakyReLU(BatchNorm(h)): 2d² + 4d trainable values and 2d running statistics.
    With ``tanh`` it is Tanh(h): 2d² + 2d.
    """

    def __init__(self, dimension: int, gate: Gate) -> None:
        super().__init__()
        self.hidden = nn.Linear(dimension, dimension)
        self.norm = nn.BatchNorm1d(dimension) if gate == "batchnorm" else None
        self.output = nn.Linear(dimension, dimension)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features)
        hidden = torch.tanh(hidden) if self.norm is None else functional.leaky_relu(self.norm(hidden), 0.01)
        return functional.normalize(torch.softmax(self.output(hidden), dim=-1) * features, dim=-1)


def start(dimension: int, *, gate: Gate, seed: int) -> dict[str, Float32]:
    """The server's one random start, PyTorch's defaults under a public seed; name → array, buffers included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tensors(ReferenceAttention(dimension, gate))


def tensors(module: ReferenceAttention) -> dict[str, Float32]:
    """What travels: weights and, for ``batchnorm``, the running mean and variance; float32 copies."""
    return {
        name: value.detach().cpu().numpy().astype(np.float32, copy=True)
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def restored(values: Mapping[str, npt.NDArray[np.floating]], *, gate: Gate) -> ReferenceAttention:
    """The module that holds ``values``.

    Raises:
        ModelError: FS-1632 when a tensor is missing, foreign or of another shape.
    """
    dimension = len(values["output.bias"]) if "output.bias" in values else 2
    with torch.random.fork_rng(devices=[]):
        module = ReferenceAttention(dimension, gate)
    expected = {name: value.shape for name, value in tensors(module).items()}
    found = {name: value.shape for name, value in values.items()}
    if found != expected:
        raise ModelError(
            "FS-1632",
            f"tensors {found}",
            expected=f"{expected} for the reference module with gate {gate}",
            cure="use tensors of the same federation settings",
        )
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in values.items()}
    module.load_state_dict(state, strict=False)
    return module


def contrastive_loss(adapted: Tensor, text: Tensor, *, scale: float) -> Tensor:
    """½(image→text + text→image) cross-entropy of a batch against each other's texts; 0-d.

    Records of one class are each other's false negatives. With t the text of every record's own class, the
    image→text half equals class cross-entropy with the batch's class counts as prior.

    Args:
        adapted: (n, d) unit rows.
        text: (n, d) unit text embedding of each record's class.
        scale: τ.
    """
    logits = scale * adapted @ text.T
    own = torch.arange(len(adapted), device=adapted.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def endless_batches(count: int, batch: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of shuffled passes without end; a pass's last partial batch is dropped.

    Raises:
        ModelError: FS-1663 where a pass has no full batch.
    """
    if count < batch:
        raise ModelError(
            "FS-1663",
            f"{count} records for batches of {batch}",
            expected="at least one full batch",
            cure="lower the batch, or give the site more records",
        )
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].view(-1, batch)


def batches_a_pass(count: int, batch: int) -> int:
    """⌊n/B⌋: the steps of one pass, and the weight of a site in the average."""
    return count // batch


@dataclass(frozen=True, slots=True)
class RoundLosses:
    """Mean losses of a site's round; for the researcher's eyes, never sent."""

    contrastive: float
    alignment: float


@dataclass(slots=True)
class ReferenceSite:
    """One site of the reference: its data, its optimiser's moments, its place in the shuffled data.

    Attributes:
        features: (n, d) raw image embeddings.
        labels: (n,) classes.
        text: (K, d) text embeddings.
        target: (m, d) raw unlabelled embeddings, or None where nothing is aligned.
        recipe: how to train.
        seed: of the site's shuffling.
    """

    features: Float32
    labels: Integers
    text: Float32
    target: Float32 | None
    recipe: ReferenceRecipe
    seed: int
    _moments: dict[str, object] | None = None
    _sources: Iterator[Tensor] | None = None
    _targets: Iterator[Tensor] | None = None

    @property
    def weight(self) -> int:
        """Its share of the average before normalisation: ⌊n/B⌋."""
        return batches_a_pass(len(self.labels), self.recipe.batch)

    def train(self, values: Mapping[str, npt.NDArray[np.floating]]) -> tuple[dict[str, Float32], RoundLosses]:
        """One round from the server's tensors: what the site would send back, and its mean losses.

        Raises:
            ModelError: FS-1632 foreign tensors, FS-1663 fewer records than a batch.
        """
        recipe = self.recipe
        module = restored(values, gate=recipe.gate).train()
        optimiser = torch.optim.Adam(
            module.parameters(),
            lr=recipe.rate,
            betas=recipe.betas,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
        )
        if self._moments is not None and recipe.keeps_moments:
            optimiser.load_state_dict(self._moments)
        text = functional.normalize(torch.from_numpy(self.text), dim=-1)
        sources, targets = self._batches()
        seen = [0.0, 0.0]
        steps = recipe.steps or self.weight
        for _ in range(steps):
            chosen = next(sources)
            labels = torch.from_numpy(self.labels)[chosen]
            adapted = module(torch.from_numpy(self.features)[chosen])
            contrast = contrastive_loss(adapted, text[labels], scale=recipe.scale)
            aligned = contrast.detach() * 0
            if targets is not None:
                aligned = self._alignment(module, adapted, labels, next(targets), text)
            optimiser.zero_grad()
            (contrast + recipe.alignment * aligned).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            seen[0] += float(contrast.detach())
            seen[1] += float(aligned.detach())
        self._moments = dict(optimiser.state_dict())
        return tensors(module), RoundLosses(contrastive=seen[0] / steps, alignment=seen[1] / steps)

    def _batches(self) -> tuple[Iterator[Tensor], Iterator[Tensor] | None]:
        if self._sources is None:
            generator = torch.Generator().manual_seed(self.seed)
            self._sources = endless_batches(len(self.labels), self.recipe.batch, generator=generator)
            if self.target is not None and self.recipe.alignment > 0:
                self._targets = endless_batches(len(self.target), self.recipe.batch, generator=generator)
        return self._sources, self._targets

    def _alignment(
        self, module: ReferenceAttention, adapted: Tensor, labels: Tensor, chosen: Tensor, text: Tensor
    ) -> Tensor:
        assert self.target is not None
        raw = torch.from_numpy(self.target)[chosen]
        # Pseudo-labels come from the module in training mode: its running statistics see target batches too.
        seen = module(raw)
        probabilities = torch.softmax(EVALUATION_SCALE * seen.detach() @ text.T, dim=-1)
        target = {
            "raw": functional.normalize(raw, dim=-1),
            "adapted": seen.detach(),
            "adapted-with-gradient": seen,
        }[self.recipe.target]
        return lmmd(adapted, labels, target, probabilities)


def average(
    contributions: list[dict[str, Float32]], weights: list[int], *, previous: Mapping[str, Float32]
) -> dict[str, Float32]:
    """The server's tensors after a round: the weighted mean, running statistics included.

    Raises:
        ModelError: FS-1663 when no site has a full batch.
    """
    total = sum(weights)
    if total == 0 or len(weights) != len(contributions):
        raise ModelError(
            "FS-1663",
            f"{len(contributions)} contributions of total weight {total}",
            expected="at least one site with a full batch",
            cure="lower the batch, or give the sites more records",
        )
    shares = [weight / total for weight in weights]
    return {
        name: np.asarray(
            sum(share * values[name].astype(np.float64) for share, values in zip(shares, contributions, strict=True)),
            np.float32,
        )
        for name in previous
    }


def predict(values: Mapping[str, Float32], features: Float32, text: Float32, *, gate: Gate) -> Integers:
    """argmax_c 100·⟨z, t_c⟩ with running statistics: (n,) class indices of (n, d) raw embeddings."""
    module = restored(values, gate=gate).eval()
    rows = functional.normalize(torch.from_numpy(text), dim=-1)
    with torch.inference_mode():
        logits = EVALUATION_SCALE * module(torch.from_numpy(features)) @ rows.T
        return np.asarray(logits.argmax(-1).numpy(), np.int64)


def contrastive_floor(counts: list[int]) -> float:
    """The least image→text loss a batch with these class counts allows: the mean of log n_y, in nats."""
    total = sum(counts)
    return sum(count * math.log(count) for count in counts if count) / total
