"""What the last block of the visual tower sees of an image, for methods that train that block alone.

Everything before the block is frozen, so each image goes through it once, in float32, and a row is the block's input:
(t, w) end to end, the class token first. Rows are held in memory for the run and not cached on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsecure.vision.encoder import Encoder, FloatFeatures, Progress
from fedsecure.vision.pixels import PixelRows

if TYPE_CHECKING:
    from PIL.Image import Image


class TokenRows:
    """Stands where an encoder with a plain vision transformer does, and takes pixels through all its blocks but one.

    Attributes:
        name, fingerprint: of their own, as those of pixels.
        dimension: t·w.
        cached: rows are several times the size of the image.
    """

    cached = False

    def __init__(self, encoder: Encoder) -> None:
        self._pixels, self._device = PixelRows(encoder), encoder.device
        # By this name encoding checks that nothing in it is in training mode.
        self._model: Any = encoder.network.visual
        self.name = f"tokens of {encoder.name}"
        self.fingerprint = hashlib.sha256(b"fedsecure/tokens/v1\0" + encoder.fingerprint.encode()).hexdigest()
        self.dimension = self._model.positional_embedding.numel()

    def encode_images(
        self, images: Sequence[Image], *, batch_size: int = 64, progress: Progress | None = None
    ) -> FloatFeatures:
        """float32 (n, t·w), never in half precision; arguments as for ``Encoder.encode_images``."""
        import torch

        pixels = self._pixels.encode_images(images, batch_size=batch_size)
        out = np.empty((len(images), self.dimension), dtype=np.float32)
        before = len(self._model.transformer.resblocks) - 2
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(pixels[start : start + batch_size]).to(self._device)
            with torch.inference_mode():
                found = self._model.forward_intermediates(
                    batch.reshape(len(batch), 3, *self._model.image_size),
                    indices=[before],
                    stop_early=True,
                    intermediates_only=True,
                    output_fmt="NLC",
                    output_extra_tokens=True,
                )
            tokens = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
            out[start : start + len(batch)] = tokens.flatten(1).cpu().numpy()
            if progress is not None:
                progress(start + len(batch), len(images))
        return out
