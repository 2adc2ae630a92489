"""Methods inside CLIP's towers on folders of images: they need images, so they run apart from the others.

Division, common test and own tests are those of ``examples/facmic.py``: the images a site trains on are named by a
manifest, and a laid-out federation of images is simulated. Scores are those of the kept adapter on images. The folders
are FACMIC's brain-tumour slices, or generated scans of three made-up scanners and a common test from all three.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedsecure.config import DatasetConfig, EncoderConfig, PolicyConfig, SiteEntry, parse_settings
from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.files import make_folder, write_whole
from fedsecure.learning.evaluation import accuracy, balanced_accuracy
from fedsecure.learning.inference import predict_images
from fedsecure.simulation.folders import Division, divide_folders
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.simulation.simulate import SimulationOptions, Step, finished_rows, read_row, simulate, write_row
from fedsecure.vision.encoder import load_encoder

DELTA = 1e-5
MODEL, PRETRAINED = "fedsecure-tiny", "bundled"
# Above what a run without privacy is charged.
_UNLIMITED = 1e9
Rows = Sequence[int] | npt.NDArray[np.int64]
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
        folder = make_folder(self.out / "layout")
        policy = PolicyConfig(
            max_epsilon=_UNLIMITED, delta=DELTA, unit="record", methods=(self.method, "evaluate"),
            min_noise_multiplier=0.0, no_privacy=True,
        )  # fmt: skip
        entries, plans = {}, {}
        held: list[tuple[str, Rows]] = [*division.train.items(), (division.test_site, division.tests["raw"])]
        for name, rows in held:
            file = folder / f"{name}.csv"
            write_whole(file, self._manifest(division, name, rows))
            training = name != division.test_site
            section = DatasetConfig(name=name, path=file, format="manifest", public=not training)
            entries[name] = SiteEntry(
                role="train" if training else "evaluate",
                max_units=len(rows) if training else 0,
                evaluation_units=0 if training else len(rows),
                evaluation_public=not training,
            )
            plans[name] = SitePlan(
                train=section if training else None, evaluation=None if training else section, policy=policy
            )
        encoder = load_encoder(MODEL, PRETRAINED, device="cpu")
        pinned = EncoderConfig(
            model=MODEL, pretrained=PRETRAINED, dimension=encoder.dimension, fingerprint=encoder.fingerprint
        )
        content = {
            "name": "towers",
            "classes": division.classes,
            "encoder": pinned.model_dump(),
            "privacy": {
                "unit": "record",
                "max_records_per_unit": 1,
                "delta": DELTA,
                "spare_attempts": 0,
                "minimum_signal_to_noise": 0.0,
            },
            "rounds": {"phase_seconds": 300.0, "silence_seconds": 300.0, "start_seconds": 300.0},
            "sites": {name: entry.model_dump() for name, entry in entries.items()},
        }
        lay_out(
            folder / "federation",
            parse_settings(content, folder),
            sites=plans,
            listen="memory:0",
            hosts=("localhost",),
        )

    def _scored(self, row: Mapping[str, Any], division: Division) -> dict[str, Any]:
        """A row with the columns of ``examples/facmic.py``."""
        found = read_row(self.out / "scored", row["cell"])
        if found is not None:
            return found
        adapter = self.out / "runs" / "adapters" / f"{row['cell']}.safetensors"
        scored: dict[str, Any] = {**row, "partition": "folders"}
        tests: list[tuple[str, str, Rows]] = [(name, division.test_site, r) for name, r in division.tests.items()]
        tests += [(site, site, rows) for site, rows in division.own.items()]
        for name, site, rows in tests:
            answers = predict_images(adapter, list(self._files(division, site, rows)), device="cpu")
            predicted = np.array([division.classes.index(answer["class"]) for answer in answers])
            labels = division.sites[site].labels[np.asarray(rows)]
            totals = np.bincount(labels, minlength=len(division.classes))
            hits = np.bincount(labels[predicted == labels], minlength=len(division.classes))
            scored |= {
                f"accuracy {name}": accuracy(hits, totals),
                f"balanced accuracy {name}": balanced_accuracy(hits, totals),
            }
        make_folder(self.out / "scored" / "cells")
        write_row(self.out / "scored", row["cell"], scored)
        return scored

    def _files(self, division: Division, site: str, rows: Rows) -> Iterator[Path]:
        """Of a site's slices."""
        return (self.data.resolve() / site / division.sites[site].record_ids[int(row)] for row in rows)

    def _manifest(self, division: Division, site: str, rows: Rows) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        labels = division.sites[site].labels[np.asarray(rows)]
        writer.writerow(("file", "label"))
        writer.writerows(
            (file, division.classes[label])
            for file, label in zip(self._files(division, site, rows), labels, strict=True)
        )
        return text.getvalue().encode()
