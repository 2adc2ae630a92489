"""What a record's loss is beside plain cross-entropy, as data and without torch.

Every term depends on one record, on released adapters and on public constants only, so that clipping bounds what a
record can do whatever the weights are (facmic.md §5.3). The formulas are in :mod:`fedsecure.learning.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Vector

if TYPE_CHECKING:
    from fedsecure.learning.alignment import Witness


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """MOON's term (Li, He, Song: Model-Contrastive Federated Learning, CVPR 2021, equation 3), per record.

    Attributes:
        anchor: tensors of the round's common adapter, to whose features a record's are drawn.
        previous: tensors of this site's adapter at the end of its last round, from whose features they are pushed.
        strength: μ ≥ 0.
        temperature: > 0.
    """

    anchor: Mapping[str, Any]
    previous: Mapping[str, Any]
    strength: float = 1.0
    temperature: float = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Negatives:
    """FACMIC's text-to-image half with public images for a batch (facmic.md §5.4-2), per record.

    Attributes:
        totals: (K,) float64, log Σ exp(logit of the class) over public images of other classes.
        strength: ≥ 0.
    """

    totals: Vector
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Distillation:
    """How much, and how softly, zero-shot CLIP speaks as a teacher (CLIP2FL, AAAI 2024, equation 1).

    Attributes:
        strength: β ≥ 0; 0 is plain training. The released program's is 1.
        temperature: T > 0; the released program's is 3. The paper's equation has none.

    Raises:
        ModelError: FS-1690 a value out of range.
    """

    strength: float = 1.0
    temperature: float = 3.0

    def __post_init__(self) -> None:
        strong = math.isfinite(self.strength) and self.strength >= 0
        if not (strong and math.isfinite(self.temperature) and self.temperature > 0):
            raise ModelError(
                "FS-1690",
                f"distillation strength {self.strength} and temperature {self.temperature}",
                expected="a finite strength of 0 or more, and a finite temperature above 0",
                cure="the released program's are strength 1 and temperature 3",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """A per-record loss: focal cross-entropy with smoothed labels, plus terms in the adapted feature z.

    Attributes:
        focal: γ of the focal loss (Lin et al., ICCV 2017), 0 or at least 1; 0 is cross-entropy.
        smoothing: share of the label spread evenly over the classes, in [0, 1).
        alignment: FACMIC's local maximum mean discrepancy in its witness form, or None.
        contrast: MOON's contrast, or None.
        negatives: FACMIC's text-to-image half against public images, or None.
        distillation: from the run's own zero-shot logits, which are a constant of the record; or None.

    Raises:
        ModelError: FS-1646 a value out of its range.
    """

    focal: float = 0.0
    smoothing: float = 0.0
    alignment: Witness | None = None
    contrast: Contrast | None = None
    distillation: Distillation | None = None
    negatives: Negatives | None = None

    def __post_init__(self) -> None:
        focal, smoothing = self.focal, self.smoothing
        if not (0 <= smoothing < 1 and (focal == 0 or (math.isfinite(focal) and focal >= 1))):
            raise ModelError(
                "FS-1646",
                f"an objective with focal = {focal} and smoothing = {smoothing}",
                expected="focal 0 or at least 1, where its gradient is bounded, and smoothing in [0, 1)",
                cure="report it to the method's author",
            )

    @property
    def plain(self) -> bool:
        """Cross-entropy and nothing else."""
        return not (self.focal or self.smoothing or self.of_features or self.distillation or self.negatives)

    @property
    def of_features(self) -> bool:
        """Whether a term looks at the adapted feature, which the linear head does not have."""
        return self.alignment is not None or self.contrast is not None


CROSS_ENTROPY = Objective()
# exp(logit_scale) of OpenAI's models, by which the released program multiplies a teacher's cosines.
TEACHER_SCALE = 100.0
