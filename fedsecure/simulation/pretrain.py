"""Pretrains the bundled tiny CLIP on generated, captioned phantoms: contrastive learning after CLIP (Radford et al.
2021), with every image of a caption's class as a positive (UniCL, Yang et al. 2022), since few captions are distinct.

Run ``python -m fedsecure.simulation.pretrain --out DIR``. Every image is fresh, everything follows from the seed;
the same seed, step count, machine class and thread count give the same weights.

The bundled weights: seed 7, 1800 steps of 96 scans, 679 s on two shared x86-64 cores (no GPU). 479,000 parameters at
the image side, 623,000 in all, 1.26 MB as float16. Zero-shot accuracy on unseen phantoms (chance 0.25), and of a linear
probe on frozen centred features trained on 240 scans of the same site; 400 test scans in range, 240 a site:

    ==========  =========  =====
    scans       zero-shot  probe
    ==========  =========  =====
    in range    1.00
    site_a      0.74       0.89
    site_b      0.59       0.88
    site_c      0.45       0.81
    site_d      0.90       0.95
    site_e      0.64       0.92
    site_f      0.58       0.85
    site_g      0.61       0.89
    site_h      0.71       0.95
    ==========  =========  =====

Phantoms are synthetic; these figures say that the demo's sites differ and can be learned, and nothing about medicine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fedsecure.data.phantoms import CLASSES, Acquisition, render
from fedsecure.vision.tiny_clip import CONFIG_FILE, MEAN_FILE, MERGES_FILE, MODEL_NAME, WEIGHTS_FILE

DIMENSION = 64
CONTEXT = 24
TEMPLATES = (
    "a picture of a {}",
    "a picture of a {}",
    "a picture of {}",
    "a photo of a {}",
    "a scan of a head with {}",
    "a synthetic scan showing {}",
    "an image of a {}",
    "{}",
)
#: Captions about the acquisition keep features that a site's adapter can use: (low, high) of each property.
QUALITIES = (
    ("a clean scan", "a noisy scan"),
    ("a sharp scan", "a blurred scan"),
    ("a dark scan", "a bright scan"),
    ("a large head", "a small head"),
    ("a scan turned to the right", "a scan turned to the left"),
)


def draw_acquisition(rng: np.random.Generator) -> Acquisition:
    """A scanner out of the pretraining range: moderate settings, nearly upright heads, never inverted."""
    return Acquisition(
        contrast=rng.uniform(0.75, 1.1),
        brightness=rng.uniform(-0.05, 0.05),
        gamma=rng.uniform(0.75, 1.3),
        noise=rng.uniform(0.0, 0.05),
        blur=rng.uniform(0.0, 0.8),
        field_of_view=rng.uniform(0.92, 1.15),
        rotation=rng.normal(0, 10),
        rotation_spread=0.0,
        bias_field=rng.uniform(0, 0.25),
        lesion_contrast=rng.uniform(0.3, 0.42),
    )


def _qualities(a: Acquisition) -> list[bool]:
    bright = a.brightness - 0.15 * (a.gamma - 1)
    return [a.noise > 0.025, a.blur > 0.4, bright > 0, a.field_of_view > 1.035, a.rotation > 0]


def draw_batch(
    size: int, rng: np.random.Generator
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images uint8 (size, 64, 64), class labels (size,), quality labels (size, len(QUALITIES))."""
    labels = rng.integers(0, len(CLASSES), size)
    seen = [draw_acquisition(rng) for _ in range(size)]
    images = np.stack([render(int(c), a, rng) for c, a in zip(labels, seen, strict=True)])
    return images, labels, np.array([_qualities(a) for a in seen], dtype=np.int64)


def captions(template: str, *, underscores: bool) -> list[str]:
    """One caption a class; class names appear with and without underscores in pretraining."""
    return [template.format(c if underscores else c.replace("_", " ")) for c in CLASSES]


def learn_merges(texts: Sequence[str], limit: int = 256) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) of the captions' words, most frequent pair first, ties by spelling."""
    words = Counter(word for text in texts for word in text.replace("_", " _ ").split())
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for word, parts in pieces.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            pieces[word] = tuple(merged)
    return merges


def write_architecture(out: Path) -> None:
    """Write the merges and the open_clip configuration that fits them."""
    every = [c for t in TEMPLATES for u in (True, False) for c in captions(t, underscores=u)]
    merges = learn_merges([*every, *(text for pair in QUALITIES for text in pair)])
    text = "\n".join(["#version: fedsecure-tiny", *(f"{a} {b}" for a, b in merges)])
    (out / MERGES_FILE).write_bytes(gzip.compress(text.encode(), mtime=0))
    config = {
        "embed_dim": DIMENSION,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 96, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 512 + len(merges) + 2,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _to_tensor(images: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    grey = torch.from_numpy(images).to(device, torch.float32).div(255)[:, None].expand(-1, 3, -1, -1)
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD, device=device).view(1, 3, 1, 1)
    return (grey - mean) / std


def _contrast(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Image → caption cross-entropy, plus caption → image with all images of the caption as positives."""
    to_text = torch.nn.functional.cross_entropy(logits, labels)
    hits = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    share = hits / hits.sum(0).clamp(min=1)
    to_image = -(logits.log_softmax(0) * share).sum() / logits.shape[1]
    return to_text + 0.2 * to_image


def pretrain(out: Path, *, steps: int, batch: int, seed: int, minutes: float) -> None:
    """Train and write the four files of the model into ``out``."""
    import open_clip

    out.mkdir(parents=True, exist_ok=True)
    write_architecture(out)
    open_clip.add_model_config(out / CONFIG_FILE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = open_clip.create_model(MODEL_NAME).to(device)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME, bpe_path=str(out / MERGES_FILE))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.02)
    start = time.monotonic()
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = 1.2e-3 * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        images, labels, qualities = draw_batch(batch, rng)
        spoken = captions(TEMPLATES[rng.integers(len(TEMPLATES))], underscores=bool(rng.integers(2)))
        text = model.encode_text(
            tokenizer([*spoken, *(c for pair in QUALITIES for c in pair)]).to(device), normalize=True
        )
        image = model.encode_image(_to_tensor(images, device), normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        target = torch.from_numpy(labels).to(device)
        loss = _contrast(logits[:, : len(CLASSES)], target)
        for k in range(len(QUALITIES)):
            first = len(CLASSES) + 2 * k
            loss = loss + 0.1 * _contrast(logits[:, first : first + 2], torch.from_numpy(qualities[:, k]).to(device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        if step % 50 == 49:
            hits = (logits[:, : len(CLASSES)].argmax(1) == target).float().mean().item()
            print(
                f"step {step + 1} loss {loss.item():.3f} hits {hits:.3f} {time.monotonic() - start:.0f} s", flush=True
            )
        if time.monotonic() - start > 60 * minutes:
            print(f"stopped by --minutes after {step + 1} of {steps} steps; not reproducible by seed alone")
            break
    weights = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / WEIGHTS_FILE)
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    model.eval()
    with torch.no_grad():
        images, _, _ = draw_batch(1024, rng)
        mean = torch.cat([model.encode_image(_to_tensor(x, device), normalize=True) for x in np.split(images, 8)])
    save_file({"mean": mean.mean(0).cpu().contiguous()}, out / MEAN_FILE)
    for name in (WEIGHTS_FILE, MEAN_FILE):  # safetensors writes them for the owner alone; they are package data
        (out / name).chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the bundled tiny CLIP on synthetic phantoms.")
    parser.add_argument("--out", type=Path, required=True, help="folder for configuration, merges, weights and mean")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop early after so long")
    args = parser.parse_args()
    pretrain(args.out, steps=args.steps, batch=args.batch, seed=args.seed, minutes=args.minutes)


if __name__ == "__main__":
    main()
