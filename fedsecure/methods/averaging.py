"""Methods of many local steps a round: FedAvg, FedProx and MOON, on adapters.

McMahan et al.: FedAvg, AISTATS 2017; Li et al.: FedProx, MLSys 2020; Li, He, Song: MOON, CVPR 2021. Sites drift apart
while they train alone, which these methods let be, hold back and pull together. Single summed steps do not drift at
all: they are training on everybody's records at once, whatever the skew, so there these methods have no meaning.
"""

from __future__ import annotations

from fedsecure.methods.descent import AdapterDescent

_WHY = "it is made of local steps, each noised at the site; in a sum of single steps no site drifts"

FEDAVG = AdapterDescent(name="fedavg", version="1", kind="linear", local_only=_WHY)
FEDPROX = AdapterDescent(name="fedprox", version="1", kind="linear", proximal=0.1, local_only=_WHY)
MOON = AdapterDescent(name="moon", version="1", kind="bottleneck", contrast=1.0, local_only=_WHY)
