"""Preprocessed images as flat rows, for methods that train inside the visual tower: no feature of them would hold.

A row is what the encoder's own preprocessing makes of an image, (3, s, s) end to end. Rows are not cached: they are
several times the size of the image and cost less to make than to read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsecure.vision.encoder import Encoder, FloatFeatures, Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class PixelRows:
    """Stands where an encoder does, and encodes an image as its own preprocessed pixels.

    Attributes:
        name, fingerprint: of their own, so that no row is ever taken for a feature.
        dimension: 3·s².
        cached: not worth it.
    """

    cached = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        side: Any = encoder.network.visual.image_size
        height, width = side if isinstance(side, tuple) else (side, side)
        self.name = f"pixels of {encoder.name}"
        self.fingerprint = hashlib.sha256(b"fedsecure/pixels/v1\0" + encoder.fingerprint.encode()).hexdigest()
        self.dimension = 3 * height * width

    def encode_images(
        self, images: Sequence[Image], *, batch_size: int = 64, progress: Progress | None = None
    ) -> FloatFeatures:
        """float32 (n, 3·s²), as the encoder would see them; arguments as for ``Encoder.encode_images``."""
        out = np.empty((len(images), self.dimension), dtype=np.float32)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(images), batch_size):
                stop = min(start + batch_size, len(images))
                rows = pool.map(lambda i: self._encoder.preprocess(images[i]), range(start, stop))
                for index, row in enumerate(rows, start):
                    out[index] = row.numpy().ravel()
                if progress is not None:
                    progress(stop, len(images))
        return out
