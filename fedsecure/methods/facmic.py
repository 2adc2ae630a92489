"""FACMIC's feature attention module, trained in its DP-valid form.

Wu, Desrosiers, Chaddad: FACMIC, MICCAI 2024 (arXiv 2410.14707). Per-sample cross-entropy against fixed text embeddings
instead of the in-batch loss, LayerNorm instead of BatchNorm, and an output layer that starts at zero, so that
round 0 equals zero-shot CLIP. The domain alignment is not part of it.
"""

from __future__ import annotations

from fedsecure.methods.descent import AdapterDescent

METHOD = AdapterDescent(name="facmic", version="1", kind="facmic")
