"""Ridge regression from one release: class sums and second moments, regularised towards zero-shot by the noise.

Privacy.md §2.4, "DP ridge". The least-squares head with a penalty λ‖W − W₀‖² on leaving the zero-shot weights W₀ is
W = (G + λI)⁻¹(S + λW₀). The aggregator does not know W₀, and where noise rules λ(G + λI)⁻¹W₀ is near W₀; so the head is
W₀ and a residual (G + λI)⁻¹S, whose length follows the predicted signal like that of prototypes.
"""

from __future__ import annotations

from fedsecure.learning.adapters import Vector
from fedsecure.learning.moments import Statistics
from fedsecure.learning.shrinkage import prototype_directions, ridge_directions
from fedsecure.methods.one_release import OneRelease

# The second moments are known well enough from a small share: their large eigenvalues are sums over all units, and it
# costs the class sums 5 % more noise.
GRAM_SHARE = 0.09


def _directions(statistics: Statistics, units: float) -> Vector:
    return ridge_directions(prototype_directions(statistics, units=units), statistics, units=units)


METHOD = OneRelease(name="ridge", version="1", gram_share=GRAM_SHARE, directions=_directions)
