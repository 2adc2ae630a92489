"""Several views of one image, for augmentation multiplicity: the same ones on every machine and in every run.

De et al., "Unlocking high-accuracy differentially private image classification through scale" (2022, arXiv
2204.13650), §3.2: a record's gradient is the mean over its views, clipped once, so views cost no privacy. A view is a
function of its number and of the image's own content alone; so it is encoded once and kept like any other feature.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from fedsecure.data.dataset import Dataset, Subset

if TYPE_CHECKING:
    from PIL.Image import Image

# Slight changes, as another positioning or exposure makes them.
_DEGREES, _LEAST_SIDE, _EXPOSURE = 10.0, 0.85, 0.1


def view(image: Image, number: int, *, key: bytes) -> Image:
    """View ``number`` of an image: mirrored or not, turned, cropped and exposed a little differently; 0 is the image.

    Args:
        image: of any mode.
        number: ≥ 0.
        key: hash of the image's content.
    """
    if number == 0:
        return image
    from PIL import Image as pil
    from PIL import ImageEnhance, ImageOps

    seed = hashlib.sha256(b"fedsecure/views/v1\0" + number.to_bytes(4, "big") + key).digest()
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    mirrored, degrees, side, left, top, light, contrast = rng.uniform(size=7)
    seen = image.convert("RGB")
    seen = ImageOps.mirror(seen) if mirrored < 0.5 else seen
    seen = seen.rotate((2 * degrees - 1) * _DEGREES, resample=pil.Resampling.BILINEAR)
    share = _LEAST_SIDE + (1 - _LEAST_SIDE) * side
    width, height = (max(1, round(share * extent)) for extent in seen.size)
    x, y = round(left * (seen.width - width)), round(top * (seen.height - height))
    seen = seen.crop((x, y, x + width, y + height))
    seen = ImageEnhance.Brightness(seen).enhance(1 + (2 * light - 1) * _EXPOSURE)
    return ImageEnhance.Contrast(seen).enhance(1 + (2 * contrast - 1) * _EXPOSURE)


class Viewed(Subset):
    """A data set of images, each seen in view ``number``; of other contents, so that a cache tells them apart."""

    def __init__(self, base: Dataset, number: int) -> None:
        super().__init__(base, range(len(base)))
        self._number = number

    def image(self, i: int) -> Image:
        return view(super().image(i), self._number, key=super().content_key(i))

    def content_key(self, i: int) -> bytes:
        own = super().content_key(i)
        if self._number == 0:
            return own
        return hashlib.sha256(b"fedsecure/views/v1\0" + self._number.to_bytes(4, "big") + own).digest()
