"""Methods of many local steps a round: FedAvg, FedProx and MOON, on adapters and on the visual tower's last block.

McMahan et al.: FedAvg, AISTATS 2017; Li et al.: FedProx, MLSys 2020; Li, He, Song: MOON, CVPR 2021. Sites drift apart
while they train alone, which these methods let be, hold back and pull together. Single summed steps do not drift at
all: they are training on everybody's records at once, whatever the skew, so there these methods have no meaning.

As published they train the network, and MOON contrasts its features; ``…_block`` does so with the part of CLIP that is
trained most often, the last block. What is before it is frozen and computed once an image, so records are that block's
input tokens, held in memory for the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedsecure.config import RunSettings
from fedsecure.learning.features import Inputs, SiteFeatures
from fedsecure.learning.objective import Contrast
from fedsecure.learning.towers import TowerSpec, check_held, last_block_spec
from fedsecure.messages import SiteState
from fedsecure.methods.base import Release, Tensor
from fedsecure.methods.descent import AdapterDescent
from fedsecure.methods.towers import TowerDescent, encoder_of

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

_WHY = "it is made of local steps, each noised at the site; in a sum of single steps no site drifts"

FEDAVG = AdapterDescent(name="fedavg", version="1", kind="linear", local_only=_WHY)
FEDPROX = AdapterDescent(name="fedprox", version="1", kind="linear", proximal=0.1, local_only=_WHY)
MOON = AdapterDescent(name="moon", version="1", kind="bottleneck", contrast=1.0, local_only=_WHY)


@dataclass(frozen=True, slots=True)
class BlockDescent(TowerDescent):
    """Local steps on the last block of the visual tower."""

    inputs: ClassVar[Inputs] = "tokens"

    def spec(self, settings: RunSettings) -> TowerSpec:
        """The block's changes.

        Raises:
            ModelError: FS-1671 an encoder without towers, FS-1678 more records than a site may hold tokens of.
        """
        spec = last_block_spec(settings.encoder.model, classes=len(settings.classes))
        cap = settings.privacy.max_records_per_unit if settings.privacy.unit == "patient" else 1
        views = settings.method.views
        check_held(spec, max(cap * (s.max_units * views + s.evaluation_units) for s in settings.sites.values()))
        return spec

    def task(self, settings: RunSettings, features: SiteFeatures) -> TowerTask:  # type: ignore[override]
        """The block with the run's texts; ModelError FS-1674 another tower."""
        return self._task(settings, features)

    def _training_task(
        self, settings: RunSettings, release: Release, inputs: Mapping[str, Tensor], state: SiteState
    ) -> Any:
        # Before a site's first round there is nothing to be pushed from.
        apart = Contrast(inputs, state.tensors, strength=self.contrast) if self.contrast and state.tensors else None
        return self._task(settings, release.features, apart)

    def _task(self, settings: RunSettings, features: SiteFeatures, contrast: Contrast | None = None) -> TowerTask:
        from fedsecure.learning.last_block import last_block_task

        network = encoder_of(features).network
        head = self.zero_shot(settings, features)
        return last_block_task(network, spec=self.spec(settings), head=head, contrast=contrast)


# On held scans of generated scanners, noise as long as 24 in all 111,744 numbers of the tiny tower's block still lost
# nothing against zero-shot; ways of 16 in one or two steps overshot, and in many were no better than 8.
_BLOCK = BlockDescent(name="fedavg_block", version="1", kind="linear", local_only=_WHY, longest=8.0, caution=24.0)
FEDAVG_BLOCK = _BLOCK
FEDPROX_BLOCK = replace(_BLOCK, name="fedprox_block", proximal=FEDPROX.proximal)
MOON_BLOCK = replace(_BLOCK, name="moon_block", contrast=MOON.contrast)
