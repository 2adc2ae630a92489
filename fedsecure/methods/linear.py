"""The residual linear head: logits of zero-shot CLIP plus a learned K × d matrix that starts at zero.

The default under differential privacy: few parameters, zero-shot CLIP at round 0 and in the limit ε → 0
(privacy.md §2.2).
"""

from __future__ import annotations

from fedsecure.methods.descent import AdapterDescent

METHOD = AdapterDescent(name="linear", version="1", kind="linear")
