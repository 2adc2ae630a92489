"""A data set of images as frozen features, each image encoded once, ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedsecure.data.dataset import Dataset, wrong_kind
from fedsecure.errors import ModelError
from fedsecure.vision.cache import FeatureCache, FloatFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

    from fedsecure.learning.thumbnails import ThumbnailRows
    from fedsecure.vision.encoder import Encoder, Progress
    from fedsecure.vision.pixels import PixelRows
    from fedsecure.vision.tokens import TokenRows

_CHUNK = 256
_ENCODED = re.compile(r"encoding (.+): ([\d,]+)/([\d,]+) images, ([\d,.]+(?:e-\d+)?)/s")


def encode_dataset(
    dataset: Dataset,
    encoder: Encoder | PixelRows | TokenRows | ThumbnailRows,
    cache: FeatureCache | None,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> FloatFeatures:
    """Raw features of all images of a data set, from the cache where they are known. Reads records: reserve first.

    Equal images are encoded once. What has been encoded is stored every few batches, so that a stopped run goes on
    where it was.

    Args:
        dataset: of images, n records.
        encoder: frozen; or what stands in its place.
        cache: or ``None`` to encode everything.
        batch_size: images encoded at once.
        progress: called with (done, n).

    Returns:
        float32 (n, d).

    Raises:
        DataError: FS-1123 a feature data set; FS-1106, FS-1107, FS-1120 … an image cannot be read.
        ModelError: FS-1608 the encoder gave NaN, FS-1645 a layer of it is in training mode.
        EnvironmentProblem: FS-1813 the cache cannot be written.
    """
    if dataset.kind != "image":
        raise wrong_kind(dataset.name, dataset.kind)
    _check_frozen(encoder)
    count = len(dataset)
    keys = [dataset.content_key(i) for i in range(count)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    known = cache.get(encoder.fingerprint, list(first), dimension=encoder.dimension) if cache else {}
    rows = sorted(i for key, i in first.items() if key not in known)
    done = count - len(rows)
    if progress is not None:
        progress(done, count)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        watch = None if progress is None else partial(_at, progress, done, count)
        encoded = encoder.encode_images(_Lazy(dataset, chunk), batch_size=batch_size, progress=watch)
        fresh = {keys[i]: vector for i, vector in zip(chunk, encoded, strict=True)}
        if cache is not None:
            cache.put(encoder.fingerprint, fresh)
        known |= fresh
        done += len(chunk)
        if progress is not None:
            progress(done, count)
    return np.stack([known[key] for key in keys])


def _at(progress: Progress, before: int, count: int, done: int, chunk: int) -> None:
    # The last batch of a chunk is told of once the chunk is stored: who stops there stops with what was told.
    if done < chunk:
        progress(before + done, count)


@dataclass(frozen=True, slots=True)
class Encoded:
    """How far the encoding of a data set is.

    Attributes:
        name: of the data set.
        done, count: images encoded or known before, and all of them.
        rate: images encoded a second.
    """

    name: str
    done: int
    count: int
    rate: float

    @property
    def counted(self) -> str:
        """``250/500 images, 50/s``."""
        rate = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        return f"{self.done:,}/{self.count:,} images, {rate}/s"

    def __str__(self) -> str:
        return f"encoding {self.name}: {self.counted}"

    @classmethod
    def read(cls, line: str) -> Encoded | None:
        """What such a line says; None for any other."""
        found = _ENCODED.fullmatch(line.strip())
        if found is None:
            return None
        name, *numbers = found.groups()
        done, count, rate = (number.replace(",", "") for number in numbers)
        return cls(name, int(done), int(count), float(rate))


def pace(tell: Callable[[Encoded], None], name: str, *, every: float = 2.0) -> Progress:
    """A ``progress`` that tells now and then how far the encoding of ``name`` is, and how many images it does a second.

    A smaller number of images done, or another number in all, is another pass over images, with a rate of its own.

    Args:
        tell: takes how far it is.
        name: of the data set.
        every: seconds between two calls; the last image is told of in any case. What was known before is not told.
    """
    begun, known, last = 0.0, 0, 0.0
    before = (-1, -1)

    def watch(done: int, count: int) -> None:
        nonlocal begun, known, last, before
        now = time.monotonic()
        another = done < before[0] or count != before[1]
        before = done, count
        if another:
            begun = last = now
            known = done
        elif done > known and (now - last >= every or done == count):
            last = now
            tell(Encoded(name, done, count, (done - known) / max(now - begun, 1e-9)))

    return watch


def _check_frozen(encoder: Encoder | PixelRows | TokenRows | ThumbnailRows) -> None:
    """Batch normalisation in training mode would mix the images of a batch, and remember them (privacy.md P9)."""
    module = getattr(encoder, "_model", None)
    training = [name or "the model" for name, part in module.named_modules() if part.training] if module else []
    if training:
        raise ModelError(
            "FS-1645",
            f"the encoder's {training[0]} is in training mode",
            expected="a frozen encoder, every layer in evaluation mode",
            cure="load it with load_encoder and do not call train() on it",
        )


class _Lazy(Sequence["Image"]):
    """Images of chosen records, read when their batch is encoded."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]) -> None:
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        return self._dataset.image(self._rows[i])
