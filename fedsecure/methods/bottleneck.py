"""A residual bottleneck of width 64 between the image's feature and the class texts.

Gao et al.: CLIP-Adapter, IJCV 2024 (arXiv 2110.04544), with an up projection that starts at zero, so that round 0
equals zero-shot CLIP. An eighth of a gate's parameters.
"""

from __future__ import annotations

from fedsecure.methods.descent import AdapterDescent

METHOD = AdapterDescent(name="bottleneck", version="1", kind="bottleneck")
