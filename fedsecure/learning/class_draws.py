"""What the released programs of CLIP2FL and CReFF take a class's gradient over: augmented draws of its images.

Ten draws of at most 32 images of a class, each changed by one of six operations with parameters that all its images
share: differentiable siamese augmentation (Zhao & Bilen, ICML 2021, arXiv 2102.08259), on normalised images. The mean
over all draws is the class's gradient. None of it is private: a class of few images is shown by few images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.errors import ModelError

# The released programs' ranges: factor of scaling, degrees, share of the side, and share of the side cut out.
_SCALE, _DEGREES, _SHIFT, _CUT = 1.2, 15.0, 0.125, 0.5


@dataclass(frozen=True, slots=True)
class ClassDraws:
    """How often a class is drawn, and how many of its images at most; defaults as released.

    Raises:
        ModelError: FS-1694 a number below 1.
    """

    repeats: int = 10
    most: int = 32

    def __post_init__(self) -> None:
        if min(self.repeats, self.most) < 1:
            raise ModelError(
                "FS-1694", f"{self}", expected="at least one draw of one image", cure="leave the draws as released"
            )

    def __call__(self, inputs: Tensor, labels: Tensor, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Drawn images and their labels, (n′, 3, h, w) and (n′,), a class after the other, of (n, 3, h, w) and (n,).

        All draws of a class are of one size, so that the mean over its rows is the mean over its draws.
        """
        generator = torch.Generator().manual_seed(seed)
        for label in torch.unique(labels):
            mine = torch.nonzero(labels == label)[:, 0]
            draws = [
                mine[torch.randperm(len(mine), generator=generator)[: self.most].to(mine.device)]
                for _ in range(self.repeats)
            ]
            yield torch.cat([siamese(inputs[rows], generator) for rows in draws]), labels[torch.cat(draws)]


def siamese(images: Tensor, generator: torch.Generator) -> Tensor:
    """One operation of six, drawn with its parameters once for all of (n, 3, h, w) images."""
    chosen = int(torch.randint(len(OPERATIONS), (), generator=generator))
    return list(OPERATIONS.values())[chosen](images, generator)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, then saturation, then contrast."""
    brightness, saturation, contrast = (_uniform(generator) for _ in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by whole pixels, zeros where nothing was."""
    sides = images.shape[-2:]
    reach = [int(side * _SHIFT + 0.5) for side in sides]
    down, across = (int(torch.randint(2 * r + 1, (), generator=generator)) for r in reach)
    padded = functional.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    return padded[..., down : down + sides[0], across : across + sides[1]]


def _cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """A square of half the side around a point of the image set to zero."""
    keep = torch.ones_like(images[:1, :1])
    spans = []
    for side in images.shape[-2:]:
        size = int(side * _CUT + 0.5)
        start = int(torch.randint(side + (1 - size % 2), (), generator=generator)) - size // 2
        spans.append(slice(max(start, 0), max(start + size, 0)))
    keep[..., spans[0], spans[1]] = 0
    return images * keep


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.flip(-1) if _uniform(generator) < 0.5 else images


def _scale(images: Tensor, generator: torch.Generator) -> Tensor:
    across, down = (_uniform(generator, 1 / _SCALE, _SCALE) for _ in range(2))
    return _mapped(images, [[across, 0.0, 0.0], [0.0, down, 0.0]])


def _rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    angle = math.radians(_uniform(generator, -_DEGREES, _DEGREES))
    cos, sin = math.cos(angle), math.sin(angle)
    return _mapped(images, [[cos, -sin, 0.0], [sin, cos, 0.0]])


def _mapped(images: Tensor, matrix: list[list[float]]) -> Tensor:
    """Sampled where an affine map of the plane says, zeros outside."""
    maps = torch.tensor(matrix, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    places = functional.affine_grid(maps, list(images.shape), align_corners=True)
    return functional.grid_sample(images, places, align_corners=True)


OPERATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "color": _colour,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
