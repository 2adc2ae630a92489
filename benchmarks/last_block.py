"""FedAvg, FedProx and MOON on the visual tower's last block and on adapters, with tiny CLIP.

    python -m benchmarks.last_block --out FOLDER [--data FOLDER] [--seeds 3] [--epsilon 8,inf] [--rounds 5] [--steps 3]

Without ``--data`` each seed draws other scans for three sites with scanners of their own, and other noise; scored are
held scans of the same sites. With it, FACMIC's brain-tumour slices are divided as in ``examples/facmic.py``, seeds are
of noise alone, and each training site's held tenth is scored. Every run is that of ``fedsecure simulate``, with
the deployed code; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsecure.config import DatasetConfig, PolicyConfig, SiteEntry, parse_settings
from fedsecure.data.phantoms import CLASSES, SITES, write_federation
from fedsecure.files import make_folder, write_whole
from fedsecure.simulation.folders import divide_folders
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.simulation.simulate import SimulationOptions, Step, simulate
from fedsecure.simulation.tables import summarise, to_markdown
from fedsecure.vision.encoder import load_encoder

METHODS = ("fedavg_block", "fedprox_block", "moon_block", "fedavg", "fedprox", "moon")
TRAINED_AT = tuple(SITES)[:3]
TRAINED, TESTED = 16, 50
# Above what a run without privacy is charged.
_UNLIMITED = 1e9
_POLICY = PolicyConfig(max_epsilon=_UNLIMITED, unit="record", min_noise_multiplier=0.0, no_privacy=True)


def generated(folder: Path, *, seed: int, trained: int) -> Path:
    """Three sites of ``trained`` and ``TESTED`` scans a class; the aggregator's file."""
    scans = make_folder(folder / "scans")
    write_federation(scans, sites=TRAINED_AT, per_class=trained, test_per_class=TESTED, seed=seed)
    entry = SiteEntry(max_units=trained * len(CLASSES), evaluation_units=TESTED * len(CLASSES), evaluation_public=True)
    plans = {
        name: SitePlan(
            train=DatasetConfig(name=f"{name}-train", path=scans / name / "train"),
            evaluation=DatasetConfig(name=f"{name}-test", path=scans / name / "test", public=True),
            policy=_POLICY,
        )
        for name in TRAINED_AT
    }
    return _lay_out(folder, CLASSES, dict.fromkeys(TRAINED_AT, entry), plans)


def slices(folder: Path, data: Path) -> Path:
    """The division of ``examples/facmic.py``: each training site's four fifths, scored on a held tenth of its own."""
    division = divide_folders(data)
    entries, plans = {}, {}
    for name, found in division.sites.items():
        if name == division.test_site:
            continue
        sections, counts = {}, {}
        for part, rows in (("train", division.train[name]), ("test", division.own[name])):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("file", "label"))
            for row in map(int, rows):
                writer.writerow((data.resolve() / name / found.record_ids[row], division.classes[found.labels[row]]))
            file = folder / f"{name}-{part}.csv"
            write_whole(file, text.getvalue().encode())
            public = part == "test"
            sections[part] = DatasetConfig(name=f"{name}-{part}", path=file, format="manifest", public=public)
            counts[part] = len(rows)
        plans[name] = SitePlan(train=sections["train"], evaluation=sections["test"], policy=_POLICY)
        entries[name] = SiteEntry(max_units=counts["train"], evaluation_units=counts["test"], evaluation_public=True)
    return _lay_out(folder, division.classes, entries, plans)


def _lay_out(
    folder: Path, classes: Sequence[str], entries: Mapping[str, SiteEntry], plans: Mapping[str, SitePlan]
) -> Path:
    encoder = load_encoder("fedsecure-tiny", "bundled", device="cpu")
    content: dict[str, Any] = {
        "name": "last block and adapters",
        "classes": classes,
        "encoder": {"model": "fedsecure-tiny", "dimension": encoder.dimension, "fingerprint": encoder.fingerprint},
        "privacy": {"unit": "record", "spare_attempts": 0, "minimum_signal_to_noise": 0.0},
        "rounds": {"phase_seconds": 600.0, "silence_seconds": 600.0, "start_seconds": 600.0},
        "sites": {name: entry.model_dump() for name, entry in entries.items()},
    }
    settings = parse_settings(content, folder)
    made = lay_out(folder / "federation", settings, sites=plans, listen="memory:0", hosts=("localhost",))
    return made.federation


def measure(
    out: Path,
    *,
    seeds: int,
    epsilons: Sequence[float],
    rounds: int,
    steps: int,
    data: Path | None = None,
    trained: int = TRAINED,
) -> str:
    """Every method with every ε on every seed's scans, or on the slices; the table."""
    options = SimulationOptions(
        out=out / "runs",
        methods=METHODS,
        epsilons=tuple(epsilons),
        noises=("local",),
        seeds=seeds,
        rounds=rounds,
        local_steps=steps,
    )
    if data is not None:
        rows = _rows(options, out, lambda folder: slices(folder, data))
    else:
        rows = []
        for seed in range(1, seeds + 1):
            folder = out / f"seed-{seed}"
            drawn = replace(options, out=folder / "runs", seeds=1)
            found = _rows(drawn, folder, lambda folder, seed=seed: generated(folder, seed=seed, trained=trained))
            rows += [{**row, "seed": seed} for row in found]
    return to_markdown(summarise(rows))


def _rows(options: SimulationOptions, folder: Path, make: Any) -> list[dict[str, Any]]:
    laid_out = folder / "federation" / "aggregator" / "federation.toml"
    if not laid_out.exists():
        laid_out = make(make_folder(folder))
    found: list[dict[str, Any]] = simulate(replace(options, federation=laid_out), watch=_tell)["rows"]
    return found


def _tell(step: Step) -> None:
    if not step.rounds:
        print(f"{step.done} of {step.cells} runs: {step.what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", default="8,inf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    chosen = parser.parse_args()
    table = measure(
        chosen.out,
        seeds=chosen.seeds,
        epsilons=[float(text) for text in chosen.epsilon.split(",")],
        rounds=chosen.rounds,
        steps=chosen.steps,
        data=chosen.data,
    )
    print(table)


if __name__ == "__main__":
    main()
