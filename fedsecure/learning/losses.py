"""The terms of an objective and their gradients in logits and in adapted features, record by record.

Focal loss of Lin et al. (ICCV 2017) with smoothed labels, as FedFocal uses it; MOON's contrast (CVPR 2021, equation 3)
between adapters instead of whole networks. Values serve Opacus, slopes the closed form; each row stands alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.learning.objective import Distillation, Objective


def _aims(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    aims = torch.full_like(logits, smoothing / logits.shape[-1])
    return aims.scatter_add_(-1, labels[..., None], torch.full_like(logits[..., :1], 1 - smoothing))


def classification_loss(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """Σ_k −q_k (1 − p_k)^γ log p_k with q the smoothed label, and −log e^{s_y}/(e^{s_y} + Σ_j e^{s_jy}) with public
    images j where there are any: (…,) for (…, K) logits and (…,) labels."""
    logs = torch.log_softmax(logits, dim=-1)
    aims = _aims(logits, labels, objective.smoothing)
    focus = (1 - logs.exp()) ** objective.focal if objective.focal else 1.0
    loss = -(aims * focus * logs).sum(-1)
    if objective.negatives is not None:
        loss = loss + objective.negatives.strength * functional.softplus(_beyond(objective, logits, labels))
    return loss


def _beyond(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """How far the public images of other classes together are above the record, in its class's logit: (…,)."""
    assert objective.negatives is not None
    totals = torch.as_tensor(objective.negatives.totals).to(logits)
    return totals[labels] - logits.gather(-1, labels[..., None])[..., 0]


def classification_slope(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """∂/∂logits of :func:`classification_loss`: (…, K)."""
    slope = _label_slope(objective, logits, labels)
    if objective.negatives is not None:
        push = -objective.negatives.strength * torch.sigmoid(_beyond(objective, logits, labels))
        slope.scatter_add_(-1, labels[..., None], push[..., None])
    return slope


def _label_slope(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    if not (objective.focal or objective.smoothing):
        error = torch.softmax(logits, dim=-1)
        error.scatter_add_(-1, labels[..., None], -torch.ones_like(error[..., :1]))
        return error
    logs = torch.log_softmax(logits, dim=-1)
    probabilities, gamma = logs.exp(), objective.focal
    rest = 1 - probabilities
    # p_k times the derivative in p_k; finite for γ = 0 and γ >= 1, however confident.
    change = -(rest**gamma) if gamma else -torch.ones_like(rest)
    if gamma:
        change += gamma * probabilities * rest ** (gamma - 1) * logs
    change *= _aims(logits, labels, objective.smoothing)
    return change.addcmul_(probabilities, change.sum(-1, keepdim=True), value=-1)


def distillation_term(logits: Tensor, teacher: Tensor, how: Distillation) -> Tensor:
    """β·T²·KL(softmax(q/T) ‖ softmax(s/T)) (Hinton, Vinyals, Dean 2015): (…,) for (…, K) logits."""
    soft = torch.log_softmax(teacher / how.temperature, dim=-1)
    own = torch.log_softmax(logits / how.temperature, dim=-1)
    return how.strength * how.temperature**2 * (soft.exp() * (soft - own)).sum(-1)


def distillation_slope(logits: Tensor, teacher: Tensor, how: Distillation) -> Tensor:
    """∂/∂logits of :func:`distillation_term`: (…, K)."""
    apart = torch.softmax(logits / how.temperature, dim=-1) - torch.softmax(teacher / how.temperature, dim=-1)
    return apart.mul_(how.strength * how.temperature)


def contrast_loss(adapted: Tensor, anchor: Tensor, previous: Tensor, *, temperature: float) -> Tensor:
    """−log e^{⟨z, z_g⟩/t} / (e^{⟨z, z_g⟩/t} + e^{⟨z, z_p⟩/t}): (…,) for (…, d) unit rows."""
    return functional.softplus((adapted * (previous - anchor)).sum(-1) / temperature)


def contrast_slope(adapted: Tensor, anchor: Tensor, previous: Tensor, *, temperature: float) -> Tensor:
    """∂/∂z of :func:`contrast_loss`: (…, d)."""
    apart = previous - anchor
    pull = torch.sigmoid((adapted * apart).sum(-1, keepdim=True) / temperature)
    return apart * pull / temperature
