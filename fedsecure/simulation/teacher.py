"""Trains a stand-in for CLIP on public images and their captions, where CLIP's own weights are not to be had.

CLIP2FL (AAAI 2024) takes OpenAI's ViT-B/32 for its teacher. Here the two towers of ``fedsecure-tiny-resnet`` learn to
tell "a photo of a {class}" among the captions of all classes by cosine times scale: CLIP's loss (Radford et al. 2021)
from image to text with one caption a class, since no two images have captions of their own. What comes out has seen
labelled images of the very task, which CLIP has not; it is a teacher of the same shape and no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.data.dataset import Dataset, Subset
from fedsecure.data.images import ImageFiles, list_class_tree
from fedsecure.errors import DataError, ModelError
from fedsecure.simulation.longtail import CLASSES, PROMPT, class_names, rows_of_each
from fedsecure.vision.prompts import DEFAULT_TEMPLATE, class_prompts
from fedsecure.vision.tiny_clip import FOLDER, MERGES_FILE, RESNET_NAME
from fedsecure.vision.weights import import_open_clip

if TYPE_CHECKING:
    from fedsecure.vision.encoder import Encoder

_TEMPLATES = (PROMPT, DEFAULT_TEMPLATE)
# An eighth of the side, as CIFAR's usual four pixels of 32.
_PAD = 8
_SMOOTHING = 0.05
Watch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TeacherRecipe:
    """How a teacher is trained.

    Attributes:
        epochs, batch: passes over the images, and images a step; a last partial batch is left out.
        rate: greatest rate of AdamW, in one cycle.
        seed: of first weights, order, crops and flips.
        bfloat16: the image tower in that precision: twice as fast on processors that have it, much slower on others.

    Raises:
        ModelError: FS-1695 a number out of range.
    """

    epochs: int = 40
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not (math.isfinite(self.rate) and self.rate > 0):
            raise ModelError(
                "FS-1695",
                f"{self}",
                expected="at least one epoch and two images a step, and a rate above 0",
                cure="correct the recipe",
            )


def public_images(data: Path, *, held_out: int) -> tuple[Dataset, Dataset]:
    """``DIR/public/<class>/*`` in two parts: images to train a teacher on, and ``held_out`` of each class beside them.

    The second part is what ``from_images`` takes with the same ``held_out``.

    Raises:
        DataError: FS-1169 no folder ``public``, or fewer than two classes in it; FS-1103 an empty class, FS-1105 a
            folder in a class; FS-1168 a class has no image beside those held out.
    """
    folder = data / "public"
    classes = class_names(folder) if folder.is_dir() else ()
    if len(classes) < 2:
        raise DataError(
            "FS-1169",
            f"{data} has no folder public with two classes or more",
            expected="DIR/public/<class>/*, images that may train a teacher",
            cure="see docs/datasets.md, long-tailed sets",
        )
    images = ImageFiles(list_class_tree(folder, classes), name=f"{data.name}/public", classes=classes, public=True)
    # One more than are held out: each class needs an image to train on.
    rows_of_each(images.labels, classes=len(classes), each=held_out + 1)
    rows = rows_of_each(images.labels, classes=len(classes), each=held_out)
    rest = np.setdiff1d(np.arange(len(images)), rows)
    return Subset(images, rest.tolist()), Subset(images, rows.tolist())


def train_teacher(images: Dataset, out: Path, *, recipe: TeacherRecipe, watch: Watch = lambda *_: None) -> None:
    """Train on public images, and write the weights for ``load_encoder("fedsecure-tiny-resnet", out)``.

    Args:
        images: with labels; each is seen once an epoch, cropped and flipped at random.
        out: a ``.safetensors`` file; written whole or not at all.
        recipe: how long and how fast.
        watch: called with (epoch, epochs).

    Raises:
        DataError: the reader's, for an image that cannot be read.
        ModelError: FS-1695 another suffix, or training diverges.
    """
    if out.suffix != ".safetensors":
        raise ModelError(
            "FS-1695",
            f"{out} as a file of weights",
            expected="a name that ends in .safetensors",
            cure="name the file teacher.safetensors",
        )
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        state = _train(images, recipe, watch)
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ModelError(
            "FS-1695",
            f"a teacher at rate {recipe.rate:g} has gone to infinity",
            expected="finite weights",
            cure="lower the rate",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    save_file(state, draft, metadata={CLASSES: json.dumps(list(images.classes))})
    draft.replace(out)


def _train(images: Dataset, recipe: TeacherRecipe, watch: Watch) -> dict[str, Tensor]:
    open_clip = import_open_clip()
    shape = open_clip.get_model_config(RESNET_NAME)
    model = open_clip.CLIP(**shape)
    preprocess = open_clip.image_transform(shape["vision_cfg"]["image_size"], is_train=False)
    tokenizer = open_clip.get_tokenizer(RESNET_NAME, bpe_path=str(FOLDER / MERGES_FILE))
    captions = [tokenizer(list(class_prompts(images.classes, template=one))) for one in _TEMPLATES]
    pixels = torch.stack([preprocess(images.image(index)) for index in range(len(images))])
    labels = torch.from_numpy(np.array(images.labels))
    model = model.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.05)
    batches = max(1, len(labels) // recipe.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=recipe.epochs * batches + 1, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        watch(epoch, recipe.epochs)
        for rows in torch.split(torch.randperm(len(labels)), recipe.batch)[:batches]:
            seen = cropped_and_flipped(pixels[rows]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                image = model.encode_image(seen)
            text = model.encode_text(captions[int(torch.randint(len(captions), ()))], normalize=True)
            logits = model.logit_scale.exp() * functional.normalize(image.float(), dim=-1) @ text.T
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            cycle.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
    watch(recipe.epochs, recipe.epochs)
    return {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}


def cropped_and_flipped(images: Tensor) -> Tensor:
    """Each of (n, 3, s, s) images moved by up to an eighth of its side, with zeros behind it, and flipped or not."""
    count, side = len(images), images.shape[-1]
    pad = side * _PAD // 64
    padded = functional.pad(images, (pad,) * 4)
    corners = torch.randint(2 * pad + 1, (count, 2)).tolist()
    moved = torch.stack([padded[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(corners)])
    return torch.where((torch.rand(count) < 0.5)[:, None, None, None], moved.flip(-1), moved)


def zero_shot(encoder: Encoder, images: Dataset) -> float:
    """Share of images whose class's "a photo of a {class}" is nearest."""
    from fedsecure.learning.encoding import encode_dataset

    text = encoder.encode_text(class_prompts(images.classes, template=PROMPT))
    found = (encode_dataset(images, encoder, None) @ text.T).argmax(axis=1)
    return float((found == images.labels).mean())
