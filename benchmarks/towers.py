"""What a clipped sum inside a tower takes, its gradients held in float32 and by ghost clipping in float64.

    python -m benchmarks.towers [--units 64] [--repeats 5] [--json] [--quick]

Both go side by side through the same units of random numbers, in turn and in one process: PromptFL and LoRA in the
bundled tiny CLIP, and CLIP2FL's ResNet-8 at width 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.lora_module import lora_task
from fedsecure.learning.prompt_module import make_prompts, prompt_task
from fedsecure.learning.student_module import resnet8_task
from fedsecure.learning.student_spec import resnet8_spec
from fedsecure.learning.tower_task import TowerTask, zero_shot_head
from fedsecure.learning.towers import lora_spec, prompt_spec
from fedsecure.learning.units import UnitFeatures
from fedsecure.vision.encoder import load_encoder
from fedsecure.vision.prompts import DEFAULT_TEMPLATE, class_prompts

MODEL, CLASSES = "fedsecure-tiny", ("glioma", "meningioma", "none", "pituitary")


def tasks() -> Mapping[str, TowerTask]:
    """Each method's task, by name."""
    encoder = load_encoder(MODEL, "bundled", device="cpu")
    head = zero_shot_head(encoder.encode_text(class_prompts(CLASSES)), np.zeros(64, np.float32), temperature=10.0)
    words = make_prompts(encoder.tokenizer, CLASSES, template=DEFAULT_TEMPLATE, length=4, at_template=True)
    k = len(CLASSES)
    prompts = prompt_spec(MODEL, classes=k, contexts="shared", length=4, at_template=True)
    return {
        "promptfl": prompt_task(encoder.network, words, spec=prompts, head=head),
        "lora": lora_task(encoder.network, spec=lora_spec(MODEL, classes=k, rank=2), head=head),
        "resnet8": resnet8_task(resnet8_spec(classes=k, dimension=64, width=1), head=head),
    }


def measure(*, units: int, repeats: int) -> dict[str, Any]:
    """Seconds of each, the median of ratios within a repetition, and how far the two sums are apart."""
    found: dict[str, Any] = {"units": units, "repeats": repeats, "threads": torch.get_num_threads(), "methods": {}}
    for name, task in tasks().items():
        rng = np.random.default_rng(0)
        features = rng.normal(size=(units, 1, task.spec.dimension)).astype(np.float32)
        rows = UnitFeatures(features, rng.integers(0, len(CLASSES), (units, 1)), np.ones((units, 1), np.bool_))
        start = task.spec.initial(b"benchmark")
        ways, sums = {"held": task, "ghost": replace(task, single=False)}, {}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(repeats + 1):
            for way, chosen in ways.items():
                begun = time.perf_counter()
                sums[way] = clipped_sum(chosen, start, rows, max_grad_norm=0.1, device="cpu")
                # The first of each imports, and looks at how units stand.
                if turn:
                    seconds[way].append(time.perf_counter() - begun)
        ratios = [one / other for one, other in zip(seconds["held"], seconds["ghost"], strict=True)]
        found["methods"][name] = {
            "parameters": task.spec.parameters,
            "held": all(task.seen.values()),
            "held_units_per_second": units / statistics.median(seconds["held"]),
            "ghost_units_per_second": units / statistics.median(seconds["ghost"]),
            "ratio": statistics.median(ratios),
            "apart": float(np.linalg.norm(sums["held"] - sums["ghost"]) / np.linalg.norm(sums["ghost"])),
        }
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--units", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--quick", action="store_true", help="run the same code on a few units; measures nothing")
    chosen = options.parse_args()
    result = measure(units=4, repeats=1) if chosen.quick else measure(units=chosen.units, repeats=chosen.repeats)
    if chosen.json:
        print(json.dumps(result))
        return
    for name, row in result["methods"].items():
        print(
            f"{name:<11} {row['held_units_per_second']:7.1f} and {row['ghost_units_per_second']:6.1f} units/s, "
            f"time {row['ratio']:.2f}, sums apart by {row['apart']:.0e}"
        )


if __name__ == "__main__":
    main()
