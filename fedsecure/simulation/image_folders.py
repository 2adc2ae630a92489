"""Divided folders of images as a federation whose sites read images: for methods that train inside CLIP's towers.

Division, common test and own tests are those of :func:`fedsecure.simulation.folders.divide_folders`; what a site
trains on is named by a manifest, and the kept adapter is scored on images.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.config import DatasetConfig, EncoderConfig
from fedsecure.data.dataset import paths_of
from fedsecure.files import make_folder, write_whole
from fedsecure.simulation.folders import Division, lay_out_sections
from fedsecure.simulation.reference import Scores, score
from fedsecure.simulation.simulate import read_row, write_row

Rows = Sequence[int] | npt.NDArray[np.int64]


def lay_out_division(
    division: Division,
    folder: Path,
    *,
    encoder: EncoderConfig,
    weights: Path | None,
    method: str,
    delta: float,
    name: str = "experiment",
) -> Path:
    """A division of images as a federation on disk for ``simulate``; an earlier layout in ``folder`` is replaced.

    Args:
        division: of folders of images, which stay where they are.
        folder: of the layout.
        encoder: of the run; its towers are what the method trains in.
        weights: the encoder's, where they are a file.
        method, delta, name: as for :func:`fedsecure.simulation.folders.lay_out_sections`.

    Returns, raises: as there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    records = make_folder(folder / "records")
    sections: dict[str, tuple[DatasetConfig, int]] = {}
    held: list[tuple[str, str, Rows]] = [(site, site, rows) for site, rows in division.train.items()]
    held.append(("test", division.test_site, division.tests["raw"]))
    for label, site, rows in held:
        listed = _manifest(division, site, rows)
        write_whole(records / f"{label}.csv", listed)
        # The name carries a hash of what is listed, so that other records are other cells.
        digest = hashlib.sha256(listed).hexdigest()[:16]
        section = DatasetConfig(
            name=f"{label}-{digest}", path=records / f"{label}.csv", format="manifest", public=label == "test"
        )
        sections[label] = section, len(rows)
    return lay_out_sections(
        sections, folder, classes=division.classes, encoder=encoder, files=dict.fromkeys(sections, weights),
        method=method, delta=delta, name=name,
    )  # fmt: skip


def image_scores(division: Division, adapter: Path, *, weights: Path | None = None) -> dict[str, dict[str, Scores]]:
    """Scores of an adapter that takes images, by test set and by site, as of
    :func:`fedsecure.simulation.reference.adapter_scores`."""
    from fedsecure.learning.inference import predict_images

    def of(site: str, rows: Rows) -> Scores:
        answers = predict_images(adapter, list(_files(division, site, rows)), weights=weights)
        predicted = np.array([division.classes.index(answer["class"]) for answer in answers])
        return score(predicted, division.sites[site].labels[np.asarray(rows)], len(division.classes))

    return {
        "tests": {name: of(division.test_site, rows) for name, rows in division.tests.items()},
        "sites": {site: of(site, rows) for site, rows in division.own.items()},
    }


@dataclass(frozen=True, slots=True)
class ScoredRuns:
    """Scores of finished runs, kept beside them: to encode the images again takes longer than many a run.

    Attributes:
        out: folder of the scores.
    """

    out: Path

    def score(
        self, row: Mapping[str, Any], division: Division, adapter: Path, *, weights: Path | None = None
    ) -> dict[str, dict[str, Scores]]:
        """Of a run's adapter; computed where they are not there yet."""
        found = read_row(self.out, row["cell"])
        if found is None:
            found = {"epsilon": row["epsilon"], **image_scores(division, adapter, weights=weights)}
            make_folder(self.out / "cells")
            write_row(self.out, row["cell"], found)
        return {name: found[name] for name in ("tests", "sites")}


def _files(division: Division, site: str, rows: Rows) -> Iterator[Path]:
    paths = paths_of(division.sites[site])
    assert paths is not None, "a division is of folders of images"
    return (paths[int(row)].resolve() for row in rows)


def _manifest(division: Division, site: str, rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = division.sites[site].labels[np.asarray(rows)]
    writer.writerow(("file", "label"))
    files = _files(division, site, rows)
    writer.writerows((file, division.classes[label]) for file, label in zip(files, labels, strict=True))
    return text.getvalue().encode()
