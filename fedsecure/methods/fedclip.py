"""FedCLIP's adapter: a gate of two layers with Tanh between them, over the features of a frozen CLIP.

Lu, Hu, Wang, Xie: FedCLIP, IEEE Data Engineering Bulletin 2023 (arXiv 2302.13485). Trained in the DP-valid form of
:mod:`fedsecure.methods.facmic`: per-record cross-entropy, and an output layer that starts at zero.
"""

from __future__ import annotations

from fedsecure.methods.descent import AdapterDescent

METHOD = AdapterDescent(name="fedclip", version="1", kind="fedclip")
