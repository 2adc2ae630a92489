"""Sites that are not as one would like: one class only, a class missing, odd images, fewer records than a sample.

What can be trained on is trained on, by the federation's own labels; what cannot is refused with a code, and nothing is
charged or half written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig, FederationConfig, PolicyConfig, RunSettings, SiteConfig, load
from fedsecure.errors import DataError
from fedsecure.learning.artefact import load_adapter
from fedsecure.simulation.memory import run_in_memory
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.vision.encoder import Encoder, load_encoder

CLASSES = ("glioma", "meningioma", "no_tumor")
# One class only; one class missing; a single record.
HELD = {"site-a": ("glioma",), "site-b": ("glioma", "no_tumor"), "site-c": ("meningioma",)}
MODES = ("L", "RGBA", "P", "1", "LA", "I;16")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("fedsecure-tiny", "bundled", device="cpu")


def write_site(folder: Path, classes: tuple[str, ...], *, each: int) -> None:
    rng = np.random.default_rng(len(folder.name))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            size = (1, 1) if index == 0 else (int(rng.integers(2, 40)), int(rng.integers(2, 40)))
            image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            mode = MODES[index % len(MODES)]
            image = Image.new(mode, size, 700) if mode == "I;16" else image.convert(mode)
            image.save(folder / name / f"{index}.png")


def run(folder: Path, encoder: Encoder, **method: Any) -> dict[str, SiteConfig]:
    counts = {name: sum(1 for _ in (folder / name).rglob("*.png")) for name in HELD}
    settings = RunSettings.model_validate(
        {
            "classes": CLASSES,
            "encoder": {"dimension": encoder.dimension, "fingerprint": encoder.fingerprint},
            "method": {"name": "linear", "rounds": 2, **method},
            # Most samples of so few records are empty.
            "privacy": {
                "unit": "record",
                "sampling_rate": 0.1,
                "minimum_signal_to_noise": 0.0,
                "noise_multiplier": 1.0,
            },
            "rounds": {"phase_seconds": 90.0, "silence_seconds": 60.0, "start_seconds": 90.0},
            "evaluation": {"when": []},
            "sites": {name: {"max_units": count} for name, count in counts.items()},
        }
    )
    plans = {
        name: SitePlan(
            train=DatasetConfig(name=name, path=folder / name),
            evaluation=None,
            policy=PolicyConfig(unit="record", max_epsilon=100.0),
        )
        for name in HELD
    }
    made = lay_out(folder / "federation", settings, sites=plans, listen="memory:0", hosts=("localhost",))
    sites = {name: load(path, SiteConfig) for name, path in made.sites.items()}
    run_in_memory(load(made.federation, FederationConfig), sites, seed=None, watch=lambda *_: None)
    return sites


@pytest.mark.slow
def test_sites_of_other_classes_odd_images_and_few_records_train_together(tmp_path: Path, encoder: Encoder) -> None:
    for name, classes in HELD.items():
        write_site(tmp_path / name, classes, each=1 if name == "site-c" else len(MODES))
    sites = run(tmp_path, encoder, views=2)
    for config in sites.values():
        (kept,) = config.state.glob("runs/*/adapter.safetensors")
        assert load_adapter(kept).metadata.classes == CLASSES


def test_a_class_of_another_name_ends_the_run_and_leaves_nothing(tmp_path: Path, encoder: Encoder) -> None:
    for name, classes in HELD.items():
        write_site(tmp_path / name, ("Glioma ",) if name == "site-a" else classes, each=1)
    with pytest.raises(DataError, match=r"FS-1102.*Glioma"):
        run(tmp_path, encoder)
    left = tmp_path / "federation"
    assert not list(left.rglob("adapter.safetensors"))
    assert not list(left.rglob("privacy-report.json"))
