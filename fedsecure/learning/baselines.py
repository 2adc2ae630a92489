"""What CLIP2FL is compared with, each as one small function over the loop of ``clip2fl_reference``; none is private.

Trunks: FedAvg (McMahan et al., AISTATS 2017), FedAvgM (Hsu et al., arXiv 1909.06335), FedProx (Li et al., MLSys 2020),
FedDF (Lin et al., NeurIPS 2020), Fed-Focal (Sarkar et al., arXiv 2011.06283), Ratio Loss (Wang et al., AAAI 2021).
Branches: τ-normalisation (Kang et al., ICLR 2020) and CCVR (Luo et al., NeurIPS 2021), here over FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.classifier import Classifier, Retraining, fresh_classifier, retrain
from fedsecure.learning.clip2fl_reference import RETRAINING, Records, Trunk, features_of, head_of
from fedsecure.learning.distillation import Distillation
from fedsecure.learning.objective import Objective
from fedsecure.learning.students import Student

# Wang et al.'s α and β.
_RATIO = (1.0, 0.1)
_ENSEMBLE_STEPS, _ENSEMBLE_RATE, _ENSEMBLE_BATCH = 100, 1e-4, 128


def ratio_weights(student: Student, public: Records) -> Tensor:
    """α + β·R_c for each class, R_c estimated from the head's gradients on public records of one class each.

    With ∇_c the gradient of class c's public records in the classifier's weight, R_c = |mean_i (C−1)·∇_c[c, i] /
    (Σ_j ∇_j − ∇_c)[c, i]| (Wang et al., equation 6): what a class pushes itself against what all others push it. A rare
    class's own loss is high, and its ratio with it. Elements with nothing to divide by are left out.
    """
    weight = student.head.weight.detach()
    classes = len(weight)
    with torch.no_grad():
        features = student.features(public.inputs)
        errors = torch.softmax(student.head(features), dim=-1) - functional.one_hot(public.labels, classes)
    gradients = torch.stack(
        [
            errors[public.labels == c].T @ features[public.labels == c] / max(int((public.labels == c).sum()), 1)
            for c in range(classes)
        ]
    )
    rest = gradients.sum(0) - gradients
    own = torch.arange(classes)
    above, below = (classes - 1) * gradients[own, own], rest[own, own]
    usable = below.abs() > 1e-3 * below.abs().mean(dim=1, keepdim=True).clamp_min(1e-12)
    share = torch.where(usable, above / torch.where(usable, below, torch.ones_like(below)), torch.zeros_like(below))
    ratio = (share.sum(1) / usable.sum(1).clamp_min(1)).abs()
    return _RATIO[0] + _RATIO[1] * ratio


def distil_ensemble(student: Student, trained: Sequence[Student], public: Records) -> None:
    """FedDF: the average learns the mean of the sites' logits on unlabelled public records (Lin et al., algorithm 1).

    100 Adam steps a round at 1e-4, instead of up to 10,000 with early stopping. Running statistics stay the average's.
    """
    with torch.inference_mode():
        logits = torch.stack([one(public.inputs)[1] for one in trained]).mean(0)
    aims = torch.softmax(logits, dim=-1).clone()
    optimiser = torch.optim.Adam(student.parameters(), lr=_ENSEMBLE_RATE)
    generator = torch.Generator().manual_seed(len(public))
    for _ in range(_ENSEMBLE_STEPS):
        rows = torch.randint(len(public), (min(_ENSEMBLE_BATCH, len(public)),), generator=generator)
        own = torch.log_softmax(student(public.inputs[rows])[1], dim=-1)
        optimiser.zero_grad()
        functional.kl_div(own, aims[rows], reduction="batchmean").backward()  # type: ignore[no-untyped-call]
        optimiser.step()


FEDAVG = Trunk("fedavg", "McMahan et al., AISTATS 2017")
TRUNKS = {
    trunk.name: trunk
    for trunk in (
        FEDAVG,
        Trunk("fedavgm", "Hsu et al., arXiv 1909.06335", momentum=0.9),
        Trunk("fedprox", "Li et al., MLSys 2020", proximal=0.01),
        Trunk("feddf", "Lin et al., NeurIPS 2020", finish=distil_ensemble),
        Trunk("fedfocal", "Sarkar et al., arXiv 2011.06283", objective=Objective(focal=2.0)),
        Trunk("ratio-loss", "Wang et al., AAAI 2021", weigh=ratio_weights),
        Trunk("fedavg-distilled", "CLIP2FL without its branch", distillation=Distillation()),
    )
}


@dataclass(frozen=True, slots=True)
class TauNormalised:
    """Each class's weights divided by ‖w_c‖^τ, without bias (Kang et al., equation 5)."""

    name: str = "tau-norm"
    tau: float = 1.0

    def observe(self, student: Student, sites: Sequence[Records], *, round: int, rounds: int) -> None:
        """Nothing to see before the end."""

    def after(self, student: Student) -> Classifier | None:
        return self.classifier(student, ())

    def classifier(self, student: Student, sites: Sequence[Records]) -> Classifier:
        weight = head_of(student).weight
        lengths = np.linalg.norm(weight, axis=1, keepdims=True)
        return Classifier((weight / np.maximum(lengths, 1e-12) ** self.tau).astype(np.float32), None)


@dataclass(frozen=True, slots=True)
class VirtualFeatures:
    """CCVR: the classifier re-trained on draws from each class's Gaussian of features (Luo et al., algorithm 1).

    Sites tell each class's count, mean and covariance, put together exactly. A class of one record has no covariance
    and gets that of all classes within, as every class does in part (``shrinkage``): with d above the number of
    records no covariance is regular.
    """

    name: str = "ccvr"
    each: int = 100
    shrinkage: float = 0.5
    retraining: Retraining = RETRAINING
    seed: int = 0

    def observe(self, student: Student, sites: Sequence[Records], *, round: int, rounds: int) -> None:
        """Nothing to see before the end."""

    def after(self, student: Student) -> Classifier | None:
        """Luo et al. calibrate once, after training."""
        return None

    def classifier(self, student: Student, sites: Sequence[Records]) -> Classifier:
        classes, dimension = student.head.weight.shape
        count = np.zeros(classes)
        first, second = np.zeros((classes, dimension)), np.zeros((classes, dimension, dimension))
        for site in sites:
            features, labels = features_of(student, site.inputs).astype(np.float64), site.labels.cpu().numpy()
            for c in np.unique(labels):
                rows = features[labels == c]
                count[c] += len(rows)
                first[c] += rows.sum(0)
                second[c] += rows.T @ rows
        present = np.flatnonzero(count)
        means = first / np.maximum(count, 1)[:, None]
        scatter = second - count[:, None, None] * means[:, :, None] * means[:, None, :]
        within = scatter.sum(0) / max(count.sum() - len(present), 1)
        generator = np.random.default_rng(self.seed)
        drawn = np.zeros((classes, self.each, dimension), np.float32)
        for c in range(classes):
            if not count[c]:
                # Nobody knows this class: what all of them have in common, so that it costs the others least.
                means[c] = means[present].mean(0)
            share = self.shrinkage if count[c] > 1 else 1.0
            own = share * within + (1 - share) * scatter[c] / max(count[c] - 1, 1)
            values, axes = np.linalg.eigh(own)
            noise = generator.standard_normal((self.each, dimension)) * np.sqrt(np.maximum(values, 0))
            drawn[c] = means[c] + noise @ axes.T
        return retrain(drawn, fresh_classifier(classes, dimension, seed=self.seed), self.retraining, seed=self.seed)
