"""Lower bounds on ε from one run with canaries, and the figures of a membership attack (privacy.md §4 B and C).

One-run bound: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023), theorem 5.2.
Rates: Clopper and Pearson (1934). Gaussian: the estimated μ of Dong, Roth and Su (2022). All take arrays and return
numbers; nothing here draws anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fedsecure.messages import Event, FloatArray
from fedsecure.privacy import accounting

Bools = npt.NDArray[np.bool_]

# Shares of the canaries that are guessed "in", and as many "out"; the best bound is taken, at a 1/7 of the risk each.
_GUESSED = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_HIGHEST = 60.0


def one_run_p_value(canaries: int, guesses: int, correct: int, *, eps: float, delta: float) -> float:
    """Probability bound of ``correct`` or more right among ``guesses`` under (ε, δ) (theorem 5.2).

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r ≤ m; the rest is abstained from.
        correct: v ≤ r.
        eps, delta: the hypothesis.
    """
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-eps))
    beta = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return min(1.0, beta)
    steps = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - steps, guesses, right))
    return float(min(1.0, beta + float((below / steps).max()) * delta * 2 * canaries))


def one_run_epsilon(scores: FloatArray, included: Bools, *, delta: float, risk: float) -> float:
    """Largest ε that one run refutes with error probability at most ``risk``.

    Args:
        scores: (m,), larger means "in".
        included: (m,) the coins.
    """
    order = np.argsort(scores)
    best = 0.0
    for share in _GUESSED:
        k = max(1, round(share * len(scores)))
        k = min(k, len(scores) // 2)
        correct = int(included[order[-k:]].sum() + (~included[order[:k]]).sum())

        def refuted(eps: float, k: int = k, correct: int = correct) -> bool:
            return one_run_p_value(len(scores), 2 * k, correct, eps=eps, delta=delta) < risk / len(_GUESSED)

        best = max(best, _largest(refuted))
    return best


def _largest(refuted: Callable[[float], bool]) -> float:
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, _HIGHEST
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def clopper_pearson(successes: int, trials: int, *, risk: float) -> tuple[float, float]:
    """Interval of a probability that misses it on either side with probability at most ``risk`` each."""
    from scipy.special import betaincinv

    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, risk))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - risk))
    return low, high


def rates_epsilon(scores: FloatArray, included: Bools, *, delta: float, risk: float) -> float:
    """ε from true- and false-positive rates, ln((TPR − δ)/FPR) or its mirror image.

    The threshold is chosen on every other canary and judged on the rest, so that choosing costs no confidence.
    """
    chosen, best = (0.0, 1), -math.inf
    half = slice(0, None, 2)
    for threshold in np.quantile(scores[half], [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.995]):
        for side in (1, -1):
            found = _rates(scores[half], included[half], float(threshold), side, delta=delta, risk=0.05)
            if found > best:
                chosen, best = (float(threshold), side), found
    rest = slice(1, None, 2)
    return max(0.0, _rates(scores[rest], included[rest], *chosen, delta=delta, risk=risk / 2))


def _rates(scores: FloatArray, included: Bools, threshold: float, side: int, *, delta: float, risk: float) -> float:
    guessed = side * scores >= side * threshold
    inside, outside = (included, ~included) if side == 1 else (~included, included)
    if not (inside.any() and outside.any()):
        return -math.inf
    low, _ = clopper_pearson(int((guessed & inside).sum()), int(inside.sum()), risk=risk)
    _, high = clopper_pearson(int((guessed & outside).sum()), int(outside.sum()), risk=risk)
    return math.log((low - delta) / high) if low > delta else -math.inf


def gaussian_epsilon(scores: FloatArray, included: Bools, *, delta: float, risk: float) -> float:
    """ε(δ) of the μ that the distance of the two groups' means shows at least, in units of the wider spread."""
    inside, outside = scores[included], scores[~included]
    if min(len(inside), len(outside)) < 2:
        return 0.0
    spread = max(float(inside.std(ddof=1)), float(outside.std(ddof=1)))
    gap = float(inside.mean() - outside.mean())
    if not spread > 0:
        return _HIGHEST if gap > 0 else 0.0
    mu = gap / spread
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + mu**2 / (2 * (len(scores) - 2)))
    least = mu - NormalDist().inv_cdf(1 - risk) * error
    if least <= 0:
        return 0.0
    # Beyond this ε is past every claim, and the accountant need not be asked.
    if least > 40:
        return 1e3
    return accounting.epsilon((Event("train", "audit", 1 / least, 1 / least),), delta=delta)


@dataclass(frozen=True, slots=True)
class Membership:
    """How well a likelihood-ratio attack tells members from others; a figure for the report, not a gate.

    Attributes:
        subject: what was attacked.
        auc: area under the ROC curve; 0.5 is guessing.
        tpr_at_1, tpr_at_01: true-positive rates at false-positive rates of 1 % and 0.1 %.
        shadows, targets: models trained for the attack, and attacked.
        decisions: target models times records.
    """

    subject: str
    auc: float
    tpr_at_1: float
    tpr_at_01: float
    shadows: int
    targets: int
    decisions: int


def membership_attack(subject: str, confidence: FloatArray, included: Bools, *, targets: int) -> Membership:
    """Likelihood-ratio attack (Carlini et al. 2022) with per-record means and a spread shared by all records.

    Args:
        subject: what is attacked, for the report.
        confidence: (models, records), logit of the probability of the record's own label, or any score.
        included: (models, records), whether the model was trained on the record.
        targets: the last so many models are attacked, the others are the shadows; ≥ 1.
    """
    shadows = len(confidence) - targets
    seen, member = confidence[:shadows], included[:shadows]
    counts = np.maximum(member.sum(axis=0), 1), np.maximum((~member).sum(axis=0), 1)
    inside = np.where(member, seen, 0).sum(axis=0) / counts[0]
    outside = np.where(member, 0, seen).sum(axis=0) / counts[1]
    residual = seen - np.where(member, inside, outside)
    spread = max(float(np.sqrt(np.mean(residual**2))), 1e-12)
    attacked = confidence[shadows:]
    ratio = ((attacked - outside) ** 2 - (attacked - inside) ** 2) / (2 * spread**2)
    score, truth = ratio.ravel(), included[shadows:].ravel()
    return Membership(
        subject=subject,
        auc=_auc(score, truth),
        tpr_at_1=_tpr(score, truth, 0.01),
        tpr_at_01=_tpr(score, truth, 0.001),
        shadows=shadows,
        targets=targets,
        decisions=len(score),
    )


def _auc(score: FloatArray, truth: Bools) -> float:
    from scipy.stats import rankdata

    members, others = int(truth.sum()), int((~truth).sum())
    ranks = float(rankdata(score)[truth].sum())
    return (ranks - members * (members + 1) / 2) / (members * others)


def _tpr(score: FloatArray, truth: Bools, fpr: float) -> float:
    threshold = np.quantile(score[~truth], 1 - fpr, method="higher")
    return float((score[truth] > threshold).mean())
