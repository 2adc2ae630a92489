"""Methods inside CLIP's towers on folders of images: they need images, so they run apart from the others.

Division, common test and own tests are those of ``examples/facmic.py``: the images a site trains on are named by a
manifest, and a laid-out federation of images is simulated. Scores are those of the kept adapter on images. The folders
are FACMIC's brain-tumour slices, or generated scans of three made-up scanners and a common test from all three.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fedsecure.config import EncoderConfig
from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.files import make_folder
from fedsecure.simulation.folders import Division, divide_folders
from fedsecure.simulation.image_folders import image_scores, lay_out_division
from fedsecure.simulation.simulate import SimulationOptions, Step, finished_rows, read_row, simulate, write_row
from fedsecure.vision.encoder import load_encoder

DELTA = 1e-5
MODEL, PRETRAINED = "fedsecure-tiny", "bundled"
SCANNERS = ("site_a", "site_b", "site_c")


def write_scans(folder: Path, *, per_class: int = 25, test_per_class: int = 34) -> Path:
    """``folder/<scanner>/<class>`` and ``folder/test/<class>``, where they are not there yet; returns the folder."""
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    for index, scanner in enumerate(SCANNERS):
        for name, count, seed in ((scanner, per_class, index), ("test", test_per_class, 100 + index)):
            images, labels = generate(count, seed=seed, acquisition=SITES[scanner])
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                target = make_folder(making / name / CLASSES[label])
                Image.fromarray(image).save(target / f"{scanner}-{number:04d}.png")
    making.rename(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Towers:
    """Runs of one method, as a part of a table.

    Attributes:
        data: folder of sites; generated scans where it is not there.
        origins: the image each file was made from, where a table says.
        method: promptfl or lora.
        out: folder of finished runs.
        epsilons, seeds, rounds: ε, number of seeds, and rounds.
    """

    data: Path
    origins: Path | None
    method: str
    out: Path
    epsilons: tuple[float, ...]
    seeds: int
    rounds: int = 20

    @property
    def cells(self) -> int:
        return len(self.epsilons) * self.seeds

    def run(self, watch: Callable[[Step], None]) -> list[dict[str, Any]]:
        division = divide_folders(write_scans(self.data), origins=self.origins)
        if not self._federation.exists():
            self._lay_out(division)
        return [self._scored(row, division) for row in simulate(self._options, watch=watch)["rows"]]

    def finished(self) -> list[dict[str, Any]]:
        if not self._federation.exists():
            return []
        kept = (read_row(self.out / "scored", row["cell"]) for row in finished_rows(self._options))
        return [row for row in kept if row is not None]

    def take(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        own = [dict(row) for row in rows if row["method"] == self.method]
        return own if len(own) == self.cells else None

    @property
    def _federation(self) -> Path:
        return self.out / "layout" / "federation" / "aggregator" / "federation.toml"

    @property
    def _options(self) -> SimulationOptions:
        return SimulationOptions(
            out=self.out / "runs",
            methods=(self.method,),
            federation=self._federation,
            epsilons=self.epsilons,
            seeds=self.seeds,
            delta=DELTA,
            rounds=self.rounds,
        )

    def _lay_out(self, division: Division) -> None:
        encoder = load_encoder(MODEL, PRETRAINED, device="cpu")
        pinned = EncoderConfig(
            model=MODEL, pretrained=PRETRAINED, dimension=encoder.dimension, fingerprint=encoder.fingerprint
        )
        lay_out_division(
            division,
            self.out / "layout",
            encoder=pinned,
            weights=None,
            method=self.method,
            delta=DELTA,
            name="towers",
        )

    def _scored(self, row: Mapping[str, Any], division: Division) -> dict[str, Any]:
        """A row with the columns of ``examples/facmic.py``."""
        found = read_row(self.out / "scored", row["cell"])
        if found is not None:
            return found
        adapter = self.out / "runs" / "adapters" / f"{row['cell']}.safetensors"
        scored: dict[str, Any] = {**row, "partition": "folders"}
        scores = image_scores(division, adapter)
        for name, one in {**scores["tests"], **scores["sites"]}.items():
            scored |= {f"accuracy {name}": one["accuracy"], f"balanced accuracy {name}": one["balanced_accuracy"]}
        make_folder(self.out / "scored" / "cells")
        write_row(self.out / "scored", row["cell"], scored)
        return scored
