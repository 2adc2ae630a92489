"""What the methods inside CLIP's towers share: descent on a tower's tensors, at learning rates of their own.

Their modules are no heads over features, so every step goes through Opacus; what is asked, noised and summed is as in
:mod:`fedsecure.methods.descent`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedsecure.config import RunSettings
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.towers import TowerSpec
from fedsecure.messages import SiteState
from fedsecure.methods.base import Cohort, Release, Tensor
from fedsecure.methods.descent import AdapterDescent
from fedsecure.privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from fedsecure.learning.task import HeadTask
    from fedsecure.learning.tower_task import TowerTask
    from fedsecure.vision.encoder import Encoder

# Of centred cosines, as the linear head's where the signal is strong.
TEMPERATURE = 10.0


@dataclass(frozen=True, slots=True)
class TowerDescent(AdapterDescent):
    """Descent on tensors inside a tower.

    A rate stands for learning rate × C × steps, the whole way the tensors go: min(``longest``, ``caution`` · s), with
    s = μ·units/√p the signal over the noise in all p of them, so that the noise they end with is at most ``caution``
    long, and nothing is learnt as μ → 0.

    Attributes:
        longest, caution: chosen on validation records of phantoms with the bundled CLIP.
    """

    weighs: ClassVar[bool] = False
    longest: float = 1.0
    caution: float = 1.0

    def spec(self, settings: RunSettings) -> TowerSpec:
        raise NotImplementedError

    def task(self, settings: RunSettings, features: SiteFeatures) -> TowerTask:  # type: ignore[override]
        raise NotImplementedError

    def zero_shot(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        """The head that round 0 equals."""
        from fedsecure.learning.tower_task import zero_shot_head

        chosen = settings.method.temperature
        temperature = TEMPERATURE if chosen == "auto" else chosen
        return zero_shot_head(features.text, features.centre, temperature=temperature)

    def rate(self, settings: RunSettings, cohort: Cohort) -> tuple[float, float]:
        """Learning rate and temperature, as set or from public numbers."""
        return cautious_rate(settings, self.plan(settings, cohort), longest=self.longest, caution=self.caution)

    def _training_task(
        self, settings: RunSettings, release: Release, inputs: Mapping[str, Tensor], state: SiteState
    ) -> Any:
        return self.task(settings, release.features)


def cautious_rate(settings: RunSettings, plan: PrivacyPlan, *, longest: float, caution: float) -> tuple[float, float]:
    """Learning rate and temperature, as set or by :class:`TowerDescent`'s rule."""
    chosen = settings.method
    signal = plan.sum_mu * sum(plan.units.values()) / math.sqrt(plan.parameters)
    way = min(longest, caution * signal)
    rate = way / (chosen.rounds * chosen.local_steps * settings.privacy.max_grad_norm)
    return (
        rate if chosen.learning_rate == "auto" else chosen.learning_rate,
        TEMPERATURE if chosen.temperature == "auto" else chosen.temperature,
    )


def encoder_of(features: SiteFeatures) -> Encoder:
    """The run's encoder; that it is one with towers follows from the settings, which the spec has checked."""
    assert features.encoder is not None, "the spec refuses encoders without towers"
    return features.encoder
