"""How fast images become features the first time: images a second of CLIP's visual towers.

    python -m benchmarks.encoding [--json] [--quick]

Weights are random, since speed does not depend on them, and images are random files of 512 × 512 pixels, read, decoded
and preprocessed as a site does. ViT-L/14 is measured where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import open_dataset
from fedsecure.learning.encoding import encode_dataset
from fedsecure.vision.encoder import Encoder, choose_device
from fedsecure.vision.weights import import_open_clip

CLASSES = ("a", "b")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--quick", action="store_true", help="run the same code on a few images; measures nothing")
    chosen = options.parse_args()
    device = choose_device("auto")
    result = measure(device, images=8 if chosen.quick else (2048 if device == "cuda" else 128))
    if chosen.json:
        print(json.dumps(result))
        return
    for name, rate in result["images_per_second"].items():
        print(f"{name:<10} {'–' if rate is None else f'{rate:.1f}'} images/s on {result['device']}")


def measure(device: str, *, images: int) -> dict[str, Any]:
    """Images a second by model, the first batch apart; ``None`` for what needs a GPU and has none."""
    rates: dict[str, float | None] = {"ViT-B-32": None, "ViT-L-14": None}
    busy = dict(rates)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images)
        records = open_dataset(DatasetConfig(name="scans", path=Path(folder)), classes=CLASSES)
        records.index()
        for model in rates:
            if model == "ViT-B-32" or device == "cuda":
                rates[model], busy[model] = speed(random_encoder(model, device), records)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "images": images,
        "images_per_second": rates,
        "images_per_processor_second": busy,
    }


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        target = folder / CLASSES[index % 2] / f"{index:05}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (512, 512), dtype=np.uint8)).save(target, compress_level=1)


def random_encoder(model: str, device: str) -> Encoder:
    """The architecture and its preprocessing, without trained weights."""
    open_clip = import_open_clip()
    torch.manual_seed(0)
    network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=None)
    tokenizer = open_clip.get_tokenizer(model)
    return Encoder(
        network.to(device), preprocess, tokenizer, name=model, fingerprint="00" * 32, public_mean=None, device=device
    )


def speed(encoder: Encoder, records: Any) -> tuple[float, float]:
    """Images a second, and a second of processor time."""
    encoder.encode_images([records.image(index) for index in range(4)])
    begun, worked = time.perf_counter(), time.process_time()
    encode_dataset(records, encoder, None)
    return len(records) / (time.perf_counter() - begun), len(records) / (time.process_time() - worked)


if __name__ == "__main__":
    main()
