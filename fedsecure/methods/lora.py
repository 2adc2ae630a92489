"""LoRA: low-rank branches beside the MLP projections of CLIP's visual tower, through PEFT and Opacus.

Hu et al.: LoRA, ICLR 2022 (arXiv 2106.09685). Sites train on images and not on features, since the tower that makes
features changes; nothing is cached, and a step costs a pass through the tower. Needs ``fedsecure[lora]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsecure.config import RunSettings
from fedsecure.learning.features import Inputs, SiteFeatures
from fedsecure.learning.towers import TowerSpec, lora_spec
from fedsecure.methods.towers import TowerDescent, encoder_of

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

RANK = 2


@dataclass(frozen=True, slots=True)
class Lora(TowerDescent):
    """Descent on branches of rank ``RANK``."""

    inputs: ClassVar[Inputs] = "pixels"

    def spec(self, settings: RunSettings) -> TowerSpec:
        """The branches; ModelError FS-1671 for an encoder without towers."""
        return lora_spec(settings.encoder.model, classes=len(settings.classes), rank=RANK)

    def task(self, settings: RunSettings, features: SiteFeatures) -> TowerTask:  # type: ignore[override]
        """The tower with its branches; EnvironmentProblem FS-1816 without PEFT, ModelError FS-1674 another tower."""
        from fedsecure.learning.lora_module import lora_task

        network = encoder_of(features).network
        return lora_task(network, spec=self.spec(settings), head=self.zero_shot(settings, features))


METHOD = Lora(name="lora", version="1", kind="linear", longest=20.0, caution=12.0)
