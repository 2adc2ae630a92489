"""What all simulated worlds of one size share: keys, a feature file nobody trains on, and the run's settings."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedsecure.config import EncoderConfig, MethodConfig, PrivacyConfig, RoundsConfig, RunSettings, SiteEntry
from fedsecure.data.loading import read_feature_header
from fedsecure.identity.provision import Identity, load_identity, provision

CLASSES = ("a", "b", "c")
DIMENSION = 8
PARAMETERS = DIMENSION * len(CLASSES)
UNITS = 4


@dataclass(slots=True)
class Ground:
    """What all worlds of one size share: keys, features, settings."""

    folder: Path
    keeper: tempfile.TemporaryDirectory[str]  # removes the folder when the process ends
    identities: dict[str, Identity]
    features: Path
    settings: RunSettings


@cache
def ground(sites: int, rounds: int, prepared: int) -> Ground:
    """Keys and settings for ``sites`` sites, made once a process."""
    keeper = tempfile.TemporaryDirectory(prefix="fedsecure-faults-")
    folder = Path(keeper.name)
    names = [f"site-{i + 1}" for i in range(sites)]
    provision(folder / "keys", federation="world", sites=dict.fromkeys(names, "train"), hosts=("localhost",))
    rng = np.random.default_rng(0)
    features = folder / "features.npz"
    arrays: dict[str, Any] = {"classes": np.array(CLASSES), "text": rng.normal(size=(3, DIMENSION)).astype(np.float32)}
    for split in ("train", "test"):
        arrays[f"{split}_x"] = rng.normal(size=(UNITS * sites, DIMENSION)).astype(np.float32)
        arrays[f"{split}_y"] = np.arange(UNITS * sites, dtype=np.int64) % 3
    np.savez(features, **arrays)
    header = read_feature_header(features)
    waits: dict[str, Any] = {"phase_seconds": 20.0, "training_seconds": 30.0, "silence_seconds": 8.0}
    settings = RunSettings(
        name="world",
        classes=CLASSES,
        encoder=EncoderConfig(model="features", pretrained="file", dimension=DIMENSION, fingerprint=header.fingerprint),
        method=MethodConfig(name="basis", rounds=rounds, local_steps=1),
        privacy=PrivacyConfig(
            noise_multiplier=40.0, unit="record", max_records_per_unit=1, noise="local", minimum_signal_to_noise=0.0
        ),
        rounds=RoundsConfig(**waits, start_seconds=120.0, max_attempts=6, prepared_rounds=prepared),
        sites={name: SiteEntry(max_units=UNITS) for name in names},
    )
    homes = {name: folder / "keys" / "sites" / name / "identity" for name in names}
    homes["aggregator"] = folder / "keys" / "aggregator" / "identity"
    return Ground(folder, keeper, {name: load_identity(home) for name, home in homes.items()}, features, settings)
