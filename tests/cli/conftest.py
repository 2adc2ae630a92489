"""The command line in this process: its status, its two streams, and the one error it ends with."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from federation_world import CLASSES, write_features

from fedsecure.cli.app import main
from fedsecure.data.loading import read_feature_header
from fedsecure.data.phantoms import CLASSES as PHANTOM_CLASSES
from fedsecure.data.phantoms import write_federation
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.artefact import AdapterMetadata, save_adapter
from fedsecure.learning.task import HeadTask
from fedsecure.vision.encoder import load_encoder
from fedsecure.vision.prompts import class_prompts


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The code of the one error, checked to be the only one, with its cure, and without a traceback."""
        assert self.status == 1, (self.status, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        (code,) = re.findall(r"^(FS-\d{4}) \S", self.err, re.MULTILINE)
        assert len(re.findall(r"^  expected: \S", self.err, re.MULTILINE)) == 1, self.err
        assert len(re.findall(r"^  cure:     \S", self.err, re.MULTILINE)) == 1, self.err
        assert f"docs/errors.md#{code.lower()}" in self.err
        return str(code)


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``fedsecure`` with arguments."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedsecure", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        streams = capsys.readouterr()
        return Ended(status, streams.out, streams.err)

    return run


@pytest.fixture
def log_state() -> Iterator[None]:
    """Puts the loggers back as they were: ``serve`` and ``join`` set them up for the process."""
    root, own = logging.getLogger(), logging.getLogger("fedsecure")
    before = list(root.handlers), root.level, own.level
    yield
    root.handlers[:], root.level, own.level = before


@pytest.fixture(scope="session")
def features_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small feature file, 90 records a split."""
    file = tmp_path_factory.mktemp("features") / "small.npz"
    write_features(file)
    return file


@pytest.fixture(scope="session")
def _hospital_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("phantoms")
    write_federation(made / "raw", sites=4, per_class=6, test_per_class=1, seed=3)
    folder = made / "hospitals"
    folder.mkdir()
    for site in ("site_a", "site_b", "site_c", "site_d"):
        (made / "raw" / site / "train").rename(folder / site)
    return folder


@pytest.fixture
def hospitals(_hospital_scans: Path, tmp_path: Path) -> Path:
    """``DIR/<site>/<class>/*.png`` of four sites with 24 scans each, to be spoiled."""
    import shutil

    shutil.copytree(_hospital_scans, tmp_path / "hospitals")
    return tmp_path / "hospitals"


def _write_adapter(file: Path, task: HeadTask, **facts: object) -> Path:
    metadata = AdapterMetadata(
        **{
            "prompt": "a picture of a {}",
            "temperature": task.temperature,
            "epsilon": 8.0,
            "delta": 1e-5,
            "unit": "record",
            "rounds": 1,
            "preprocessing": {},
            "extra": {},
            **facts,
        }  # type: ignore[arg-type]
    )
    save_adapter(file, task, tensors=task.spec.initial(seed=b"test"), metadata=metadata)
    return file


@pytest.fixture(scope="session")
def feature_adapter(tmp_path_factory: pytest.TempPathFactory, features_file: Path) -> Path:
    """An untrained adapter of the small feature file."""
    header = read_feature_header(features_file)
    task = HeadTask(AdapterSpec("linear", 16, 3), header.text, np.zeros(16, np.float32), 0.01)
    return _write_adapter(
        tmp_path_factory.mktemp("adapter") / "features.safetensors",
        task,
        model="features",
        pretrained="file",
        fingerprint=header.fingerprint,
        classes=CLASSES,
    )


@pytest.fixture(scope="session")
def image_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of the bundled encoder: its answers are zero-shot."""
    encoder = load_encoder("fedsecure-tiny", "bundled", device="cpu")
    text = encoder.encode_text(class_prompts(tuple(PHANTOM_CLASSES), template="a picture of a {}"))
    centre = np.zeros(encoder.dimension, np.float32) if encoder.public_mean is None else encoder.public_mean
    task = HeadTask(AdapterSpec("linear", encoder.dimension, len(PHANTOM_CLASSES)), text, centre, 0.01)
    return _write_adapter(
        tmp_path_factory.mktemp("adapter") / "images.safetensors",
        task,
        model="fedsecure-tiny",
        pretrained="bundled",
        fingerprint=encoder.fingerprint,
        classes=tuple(PHANTOM_CLASSES),
    )
