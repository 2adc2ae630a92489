"""Using a trained adapter: classify images, or measure it on labelled records. Nothing here leaves the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.config import DatasetConfig
from fedsecure.data.dataset import Features as FloatFeatures
from fedsecure.data.images import read_image
from fedsecure.data.loading import open_dataset, read_feature_header
from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Vector
from fedsecure.learning.artefact import Adapter, load_adapter
from fedsecure.learning.encoding import encode_dataset
from fedsecure.learning.evaluation import accuracy, balanced_accuracy, predict
from fedsecure.learning.features import rows_for
from fedsecure.learning.towers import TowerSpec
from fedsecure.vision.encoder import Encoder, load_encoder

_BATCH = 64


def predict_images(
    adapter: Path, images: Sequence[Path], *, weights: Path | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """Class and probability of each image.

    Args:
        adapter: an adapter file.
        images: image files.
        weights: local weights of the encoder, where the adapter's own tag is not at hand.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        one ``{"image", "class", "probability", "probabilities"}`` an image, in order.

    Raises:
        ModelError: FS-163x the adapter, FS-1636 another encoder, FS-1668 its weights are a file that was not named,
            FS-1669 an adapter for precomputed features.
        DataError: FS-1106 an unreadable image.
    """
    loaded = load_adapter(adapter)
    encoder = encoder_of(loaded, weights=weights, device=device)
    eye = rows_for(loaded.inputs, encoder) or encoder
    parts = [
        eye.encode_images([read_image(path) for path in images[start : start + _BATCH]])
        for start in range(0, len(images), _BATCH)
    ]
    labels, probabilities = _classify(loaded, np.concatenate(parts), encoder, device=device)
    classes = loaded.metadata.classes
    return [
        {
            "image": str(path),
            "class": classes[label],
            "probability": float(row[label]),
            "probabilities": dict(zip(classes, map(float, row), strict=True)),
        }
        for path, label, row in zip(images, labels, probabilities, strict=True)
    ]


def evaluate_dataset(
    adapter: Path, data: Path, *, split: str | None = None, weights: Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Exact accuracy of an adapter, and of its encoder without it, on local labelled records.

    Args:
        adapter: an adapter file.
        data: whatever ``DatasetConfig.path`` may name.
        split: of a feature file or manifest.
        weights, device: as in :func:`predict_images`.

    Raises:
        ModelError, DataError: as :func:`predict_images`; the data set's own.
    """
    loaded = load_adapter(adapter)
    classes = loaded.metadata.classes
    # "." and "/" have no stem, and a folder may be called what no data set is.
    name = "".join(filter(str.isprintable, data.resolve().stem))[:200] or "data"
    records = open_dataset(DatasetConfig(name=name, path=data, split=split), classes=classes)
    records.index()
    if records.kind == "features":
        loaded.check_encoder(read_feature_header(data).fingerprint)
        rows = features = records.features()
        encoder = None
    else:
        encoder = encoder_of(loaded, weights=weights, device=device)
        rows = features = encode_dataset(records, encoder, None)
        eye = rows_for(loaded.inputs, encoder)
        if eye is not None:
            rows = encode_dataset(records, eye, None)
    bare = loaded.zero_shot
    answers = {
        "zero_shot": predict(bare, bare.spec.initial(seed=b"zero-shot"), features, device=device)[0],
        "adapter": _classify(loaded, rows, encoder, device=device)[0],
    }
    counts = {}
    for name, labels in answers.items():
        totals = np.bincount(records.labels, minlength=len(classes)).astype(np.float64)
        hits = np.bincount(records.labels[labels == records.labels], minlength=len(classes)).astype(np.float64)
        counts[name] = (hits, totals)
    result: dict[str, Any] = {
        name: {"accuracy": accuracy(*pair), "balanced_accuracy": balanced_accuracy(*pair)}
        for name, pair in counts.items()
    }
    recalls = [[_recall(h, t) for h, t in zip(*counts[name], strict=True)] for name in ("zero_shot", "adapter")]
    result["per_class"] = [list(row) for row in zip(classes, *recalls, strict=True)]
    result["records"] = len(records)
    return result


def _classify(
    adapter: Adapter, rows: FloatFeatures, encoder: Encoder | None, *, device: str
) -> tuple[npt.NDArray[np.int64], Vector]:
    """Labels (n,) and probabilities (n, K) of features, or of rows of images for an adapter inside the visual tower."""
    if encoder is None or adapter.inputs == "features":
        return adapter.predict(rows, fingerprint=adapter.metadata.fingerprint, device=device)
    from fedsecure.learning.last_block import last_block_task
    from fedsecure.learning.lora_module import lora_task
    from fedsecure.learning.student_module import resnet8_task

    assert isinstance(adapter.spec, TowerSpec)
    if adapter.inputs == "thumbnails":
        task = resnet8_task(adapter.spec, head=adapter.zero_shot)
    else:
        make = lora_task if adapter.inputs == "pixels" else last_block_task
        task = make(encoder.network, spec=adapter.spec, head=adapter.zero_shot)
    return predict(task, adapter.tensors, rows, device=device)


def encoder_of(adapter: Adapter, *, weights: Path | None, device: str) -> Encoder:
    """The encoder the adapter was trained on, checked by its fingerprint."""
    facts = adapter.metadata
    if facts.model == "features":
        raise ModelError(
            "FS-1669",
            "an adapter trained on precomputed features, and images to encode",
            expected="a feature file of the same origin",
            cure="use `fedsecure evaluate --data FILE.npz`, or `fedsecure.load_adapter(...).predict(features)`",
        )
    if facts.pretrained == "file" and weights is None:
        raise ModelError(
            "FS-1668",
            f"the adapter's encoder {facts.model!r} comes from a local file and none is named",
            expected="--weights FILE, the encoder's weights",
            cure="name the file the run was made with; its fingerprint is checked",
        )
    encoder = load_encoder(facts.model, str(weights) if weights else facts.pretrained, device=device)
    adapter.check_encoder(encoder.fingerprint)
    return encoder


def _recall(hits: float, total: float) -> float | None:
    return float(hits / total) if total else None
