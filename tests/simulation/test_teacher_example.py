"""A stand-in teacher: what the script writes loads as a CLIP, knows its images, and has not seen those held out."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from by_file import load
from PIL import Image

from fedsecure.errors import ModelError
from fedsecure.simulation.longtail import from_images
from fedsecure.simulation.teacher import public_images, zero_shot
from fedsecure.vision.encoder import load_encoder
from fedsecure.vision.tiny_clip import RESNET_NAME

CLASSES = ("cat", "dog", "eel")
EACH, HELD = 10, 2


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("examples/train_teacher.py", monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Each class has a colour of its own."""
    generator = np.random.default_rng(3)
    for split, each in (("public", EACH), ("train", 2), ("test", 3)):
        for place, name in enumerate(CLASSES):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., place] += 130
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.slow
def test_it_writes_a_teacher_that_loads_and_knows_its_images(
    example: ModuleType, data: Path, tmp_path: Path, capsys: Any
) -> None:
    options = ["--data", str(data), "--held-out", str(HELD), "--batch", "8", "--json"]
    files = [tmp_path / name / "teacher.safetensors" for name in ("long", "short", "again")]
    for file, epochs in zip(files, ("16", "1", "1"), strict=True):
        assert example.main([*options, "--epochs", epochs, "--out", str(file)]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    assert files[1].read_bytes() == files[2].read_bytes() != files[0].read_bytes()
    images, held = public_images(data, held_out=HELD)
    long, short = (load_encoder(RESNET_NAME, str(files[i]), device="cpu") for i in (0, 1))
    # Chance is 1/3. Both trainings are seeded.
    assert zero_shot(long, images) >= 0.8 > zero_shot(short, images)
    assert told[0]["fingerprint"] == long.fingerprint != short.fingerprint
    assert told[0]["images"] == len(images) == (EACH - HELD) * len(CLASSES)
    assert told[0]["accuracy"].keys() == {"held out", "test"}
    assert told[0]["accuracy"]["held out"] == zero_shot(long, held)
    (data / "test" / "dog").rename(data / "test" / "zebra")
    (data / "train" / "dog").rename(data / "train" / "zebra")
    (data / "public" / "dog").rename(data / "public" / "zebra")
    with pytest.raises(ModelError, match="FS-1691"):
        from_images(data, model=RESNET_NAME, pretrained=str(files[0]), cache=tmp_path / "cache")


def test_what_is_held_out_is_what_settings_are_chosen_on(data: Path, tmp_path: Path) -> None:
    images, held = public_images(data, held_out=HELD)
    assert np.bincount(held.labels).tolist() == [HELD] * len(CLASSES)
    assert not {images.content_key(i) for i in range(len(images))} & {held.content_key(i) for i in range(len(held))}
    source = from_images(data, model="fedsecure-tiny", pretrained="bundled", cache=tmp_path / "cache", held_out=HELD)
    assert source.pixels is not None
    chosen = {pixels.tobytes() for pixels in source.pixels["public"]}
    assert chosen == {np.asarray(held.image(i)).transpose(2, 0, 1).tobytes() for i in range(len(held))}


def test_bad_input(example: ModuleType, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "teacher.safetensors"
    (tmp_path / "bare" / "test").mkdir(parents=True)
    (tmp_path / "empty" / "public" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "public" / "dog").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "empty" / "public" / "cat" / "0.png")
    cases = {
        "FS-1169": ["--data", str(tmp_path / "bare")],
        "FS-1103": ["--data", str(tmp_path / "empty")],
        "FS-1168": ["--data", str(data), "--held-out", str(EACH)],
        "FS-1695": ["--data", str(data), "--held-out", "1", "--rate", "0"],
    }
    cases["FS-1695 "] = ["--data", str(data), "--held-out", "1", "--out", str(tmp_path / "teacher.pt")]
    for code, given in cases.items():
        assert example.main(["--out", str(out), *given]) == 1
        assert code.strip() in capsys.readouterr().err
    assert not out.exists()
