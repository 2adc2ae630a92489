"""A data set of images as frozen features, each image encoded once, ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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


def pace(say: Callable[[str], None], name: str, *, every: float = 2.0) -> Progress:
    """A ``progress`` that says now and then how far the encoding of ``name`` is, and how many images it does a second.

    Args:
        say: takes the line.
        name: of the data set.
        every: seconds between lines; the last image is told of in any case.
    """
    begun, known, last = 0.0, -1, 0.0

    def watch(done: int, count: int) -> None:
        nonlocal begun, known, last
        now = time.monotonic()
        if known < 0 or done < known:
            begun = last = now
            known = done
        elif now - last >= every or done == count:
            last = now
            rate = (done - known) / max(now - begun, 1e-9)
            say(f"encoding {name}: {done:,} of {count:,} images, {rate:.3g} a second")

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
