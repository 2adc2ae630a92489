"""Class prototypes from one release: where each class's images lie, as far as the noise lets it be seen.

Privacy.md §2.4, "DP class prototypes": one Gaussian release of class sums of unit-length features, shrunk towards the
text embeddings by the predicted noise. A method for few units or a small ε, with nothing to tune.
"""

from __future__ import annotations

from fedsecure.learning.adapters import Vector
from fedsecure.learning.moments import Statistics
from fedsecure.learning.shrinkage import prototype_directions
from fedsecure.methods.one_release import OneRelease


def _directions(statistics: Statistics, units: float) -> Vector:
    return prototype_directions(statistics, units=units)


METHOD = OneRelease(name="prototypes", version="1", gram_share=0.0, directions=_directions)
