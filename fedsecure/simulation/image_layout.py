"""A long-tailed experiment's images as a federation on disk, for the convolutional student of CLIP2FL.

Sites hold 32×32 images, as the published training sees them. Of CIFAR they are the images themselves; larger ones are
scaled, so the teacher sees less of them here than features of the originals would show.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsecure.config import DatasetConfig
from fedsecure.errors import ConfigError
from fedsecure.files import make_folder
from fedsecure.simulation.folders import lay_out_sections
from fedsecure.simulation.longtail import LongTail, Pixels


def lay_out_images(
    tail: LongTail, folder: Path, *, method: str, delta: float, settings: Mapping[str, Any], weights: Path | None = None
) -> Path:
    """Images and manifest of each site, and the whole test set at a site that evaluates; an earlier layout goes.

    Args:
        tail: of images.
        folder: of the layout.
        method, delta, settings: as for :func:`fedsecure.simulation.folders.lay_out_experiment`.
        weights: the encoder's, where they are a file.

    Returns:
        the path of ``federation.toml``.

    Raises:
        ConfigError: FS-1021 an experiment of features.
    """
    pixels, encoder = tail.source.pixels, tail.source.encoder
    if pixels is None or encoder is None:
        raise ConfigError(
            "FS-1021",
            "the student resnet8 and an experiment of features",
            expected="images",
            cure="bring images (--data), or train the student on features (--private-student features)",
        )
    shutil.rmtree(folder, ignore_errors=True)
    digest = tail.experiment.digest[:16]
    held = {name: (pixels["train"][rows], tail.source.train.labels[rows]) for name, rows in tail.rows.items()}
    held["test"] = (pixels["test"], tail.source.test.labels)
    sections = {}
    for name, (shown, labels) in held.items():
        file = _write(make_folder(folder / "records" / name), shown, [tail.source.classes[label] for label in labels])
        sections[name] = (DatasetConfig(name=f"{name}-{digest}", path=file, public=name == "test"), len(labels))
    return lay_out_sections(
        sections, folder, classes=tail.source.classes, encoder=encoder, files=dict.fromkeys(sections, weights),
        method=method, delta=delta, settings=settings,
    )  # fmt: skip


def _write(folder: Path, pixels: Pixels, labels: list[str]) -> Path:
    from PIL import Image

    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "label"))
        for number, (planes, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(folder / f"{number}.png")
            rows.writerow((f"{number}.png", label))
    return manifest
