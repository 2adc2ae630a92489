"""Records of CLIP2FL's convolutional student: an image as 32×32 pixels, and as its CLIP feature for the teacher.

The teacher's logits are a constant of the un-augmented image (AAAI 2024, equation 1), and so is the feature they are a
product of; both parts of a row are kept in the feature cache, and no image passes through CLIP twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedsecure.data.cifar import thumbnail
from fedsecure.learning.student_spec import PIXELS, SIDE
from fedsecure.vision.encoder import Encoder, FloatFeatures, Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class ThumbnailRows:
    """Stands where an encoder does: rows of normalised pixels, 3·32² of them, with the encoder's feature behind them.

    Attributes:
        name, fingerprint: of their own, so that no row is ever taken for a feature.
        dimension: 3·32² + d.
        cached: one pass through CLIP an image, ever.
    """

    cached = True

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.name = f"thumbnails and features of {encoder.name}"
        self.fingerprint = hashlib.sha256(b"fedsecure/thumbnails/v1\0" + encoder.fingerprint.encode()).hexdigest()
        self.dimension = PIXELS + encoder.dimension

    def encode_images(
        self, images: Sequence[Image], *, batch_size: int = 64, progress: Progress | None = None
    ) -> FloatFeatures:
        """float32 (n, 3·32² + d); arguments as for ``Encoder.encode_images``."""
        from fedsecure.learning.students import normalise

        seen = self._encoder.encode_images(images, batch_size=batch_size, progress=progress)
        pixels = np.empty((len(images), 3, SIDE, SIDE), np.uint8)
        for index in range(len(images)):
            pixels[index] = thumbnail(images[index].convert("RGB"), side=SIDE)
        return np.concatenate([normalise(pixels).flatten(1).numpy(), seen], axis=1)
