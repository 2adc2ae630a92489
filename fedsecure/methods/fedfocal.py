"""The linear head trained with a focal loss, for classes of very different size.

Sarkar, Narang, Rai: Fed-Focal Loss, 2020 (arXiv 2011.06283), with the label smoothing that the FACMIC comparison gives
it. The loss is each record's own, so that clipping bounds it as it does cross-entropy.
"""

from __future__ import annotations

from fedsecure.learning.objective import Objective
from fedsecure.methods.descent import AdapterDescent

METHOD = AdapterDescent(name="fedfocal", version="1", kind="linear", objective=Objective(focal=1.0, smoothing=0.1))
