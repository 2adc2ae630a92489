"""The linear probe: a linear classifier on the frozen features that knows no text and starts at zero.

Radford et al., CLIP, ICML 2021, section 3.2. What the residual linear head is worth is what it has over this one: here
round 0 is chance, and what noise leaves untrained stays there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedsecure.config import RunSettings
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.task import HeadTask
from fedsecure.methods.descent import AdapterDescent


@dataclass(frozen=True, slots=True)
class LinearProbe(AdapterDescent):
    """Descent on the linear head with texts of zeros, whose logits are a·Dᵀ alone."""

    def task(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        task = AdapterDescent.task(self, settings, features)
        return replace(task, text=np.zeros_like(task.text))


METHOD = LinearProbe(name="probe", version="1", kind="linear")
