"""Methods that train inside CLIP's towers, as shapes and numbers without torch: prompts, branches, the last block.

``promptfl`` learns the context words in front of the class names (CoOp, Zhou et al. 2022, arXiv 2109.01134; federated
as PromptFL, Guo et al. 2023, arXiv 2208.11625); ``lora`` adds low-rank branches to the visual tower's MLP projections
(LoRA, Hu et al. 2021, arXiv 2106.09685); the averaging methods' block variants train the visual tower's last block.
An aggregator, which holds no weights, sizes and starts all of them from the tower named in the settings; their forward
passes are in ``prompt_module``, ``lora_module`` and ``last_block``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec, Float32, Shapes
from fedsecure.vision import tiny_clip

Contexts = Literal["shared", "class"]
# Width of an MLP's hidden layer over the tower's own, in every CLIP transformer.
MLP_RATIO = 4
# CoOp's initialisation.
CONTEXT_STD = 0.02
# What a site may hold of tokens: 27,000 images of ViT-B/32, 7,000 of ViT-B/16, 4,000 of ViT-L/14.
MAX_TOKEN_BYTES = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Towers:
    """The sizes of a CLIP with two plain transformers.

    Attributes:
        image_size: side of the square input, in pixels.
        layers, width: of the visual tower.
        text_width: of the text tower.
        dimension: d, width of the features both project to.
        patch_size: side of a patch, in pixels.
    """

    image_size: int
    layers: int
    width: int
    text_width: int
    dimension: int
    patch_size: int

    @property
    def pixels(self) -> int:
        """Numbers in one preprocessed image: three colour planes."""
        return 3 * self.image_size**2

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


_PUBLISHED: Mapping[str, Towers] = {
    "ViT-B-32": Towers(224, 12, 768, 512, 512, 32),
    "ViT-B-16": Towers(224, 12, 768, 512, 512, 16),
    "ViT-L-14": Towers(224, 24, 1024, 768, 768, 14),
    "ViT-L-14-336": Towers(336, 24, 1024, 768, 768, 14),
}


@cache
def _tiny() -> Towers:
    config = json.loads((tiny_clip.FOLDER / tiny_clip.CONFIG_FILE).read_text(encoding="utf-8"))
    vision = config["vision_cfg"]
    return Towers(
        vision["image_size"],
        vision["layers"],
        vision["width"],
        config["text_cfg"]["width"],
        config["embed_dim"],
        vision["patch_size"],
    )


def towers_of(model: str) -> Towers:
    """The sizes of a named encoder's towers, with or without QuickGELU.

    Args:
        model: ``encoder.model`` of the settings, an open_clip name.

    Raises:
        ModelError: FS-1671 for precomputed features, which have no towers, and for encoders that are not known.
    """
    if model == tiny_clip.MODEL_NAME:
        return _tiny()
    found = _PUBLISHED.get(model.removesuffix("-quickgelu"))
    if found is None:
        raise ModelError(
            "FS-1671",
            f"encoder {model!r} for a method that trains inside the encoder",
            expected=f"images, and one of {', '.join((tiny_clip.MODEL_NAME, *_PUBLISHED))}",
            cure="name such an encoder, or train an adapter over its features (method linear or facmic)",
        )
    return found


@dataclass(frozen=True, slots=True)
class TowerSpec(AdapterSpec):
    """Tensors trained inside a tower; flattened and started as an adapter's are.

    Attributes:
        kind: ``"promptfl"``, ``"lora"`` or ``"last_block"``.
        dimension: numbers in a record: the feature width for prompts, the pixels for low-rank branches, all tokens for
            the last block.
        classes: K.
        layout: names and shapes, in the order of the module's trainable parameters.
        spread: standard deviation of the tensors that start at random; all others start at zero.
    """

    kind: Any
    layout: tuple[tuple[str, tuple[int, ...]], ...] = ()
    spread: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In place of the adapters' own check, which knows only kinds over features.
        assert self.layout, "a tower's method trains something"

    @property
    def shapes(self) -> Shapes:
        """Tensor name → shape."""
        return dict(self.layout)

    def initial(self, seed: bytes) -> dict[str, Float32]:
        """Tensors at round 0: normal values from SHAKE-256 of the public ``seed``, or zeros."""
        tensors = {}
        for name, shape in self.layout:
            tensors[name] = np.zeros(shape, np.float32)
            if name in self.spread:
                size = math.prod(shape)
                raw = hashlib.shake_256(b"fedsecure/towers/initial/v1\0" + name.encode() + b"\0" + seed)
                words = np.frombuffer(raw.digest(8 * size), "<u4").astype(np.float64).reshape(2, size)
                radius, angle = np.sqrt(-2 * np.log((words[0] + 0.5) / 2**32)), words[1] * (2 * math.pi / 2**32)
                tensors[name] = (self.spread[name] * radius * np.cos(angle)).reshape(shape).astype(np.float32)
        return tensors


def prompt_spec(model: str, *, classes: int, contexts: Contexts, length: int, at_template: bool) -> TowerSpec:
    """The learned context: ``context`` of shape (n, w), or (K·n, w) with a context for each class.

    Args:
        model: encoder, as in :func:`towers_of`.
        classes: K.
        contexts: one for all classes, or one for each.
        length: n ≥ 1 words.
        at_template: values are added to the words of the prompt template and start at zero, so round 0 is zero-shot;
            else they are words of their own and start from N(0, 0.02²).

    Raises:
        ModelError: FS-1671 as :func:`towers_of`.
    """
    towers = towers_of(model)
    rows = length * (classes if contexts == "class" else 1)
    return TowerSpec(
        kind="promptfl",
        dimension=towers.dimension,
        classes=classes,
        layout=(("context", (rows, towers.text_width)),),
        spread={} if at_template else {"context": CONTEXT_STD},
    )


def lora_spec(model: str, *, classes: int, rank: int) -> TowerSpec:
    """Branches W + B·A beside both MLP projections of every visual block: A (r, in) normal, B (out, r) zero.

    Raises:
        ModelError: FS-1671 as :func:`towers_of`.
    """
    towers = towers_of(model)
    width, inner = towers.width, towers.width * MLP_RATIO
    layout: list[tuple[str, tuple[int, ...]]] = []
    for block in range(towers.layers):
        for name, (out, into) in (("c_fc", (inner, width)), ("c_proj", (width, inner))):
            layout += [(f"{block}.{name}.A", (rank, into)), (f"{block}.{name}.B", (out, rank))]
    spread = {name: shape[1] ** -0.5 for name, shape in layout if name.endswith(".A")}
    return TowerSpec(kind="lora", dimension=towers.pixels, classes=classes, layout=tuple(layout), spread=spread)


def last_block_spec(model: str, *, classes: int) -> TowerSpec:
    """Changes of the visual tower's last block, w wide: both layer norms, attention without the bias of its keys, and
    the MLP; 12w² + 12w numbers, 7,087,104 for ViT-B/32.

    Raises:
        ModelError: FS-1671 as :func:`towers_of`.
    """
    towers = towers_of(model)
    w, inner = towers.width, towers.width * MLP_RATIO
    layers = {
        "ln_1": (w,), "query": (w, w), "key": (w, w), "value": (w, w), "out": (w, w), "ln_2": (w,),
        "c_fc": (inner, w), "c_proj": (w, inner),
    }  # fmt: skip
    layout: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in layers.items():
        layout.append((f"{name}.weight", shape))
        if name != "key":
            layout.append((f"{name}.bias", shape[:1]))
    return TowerSpec(kind="last_block", dimension=towers.tokens * w, classes=classes, layout=tuple(layout))


def check_held(spec: TowerSpec, records: int) -> None:
    """Refuse more tokens than may be held in memory: ModelError FS-1678.

    Args:
        spec: from :func:`last_block_spec`.
        records: the most that a site may have, by the run's public settings.
    """
    size = 4 * spec.dimension * records
    if size > MAX_TOKEN_BYTES:
        raise ModelError(
            "FS-1678",
            f"{records:,} records of {spec.dimension:,} numbers, {size / 2**30:.1f} GiB in a site's memory",
            expected=f"at most {MAX_TOKEN_BYTES / 2**30:g} GiB of tokens at a site",
            cure="declare fewer max_units, records a unit or views, take an encoder of larger patches, or an adapter",
        )


def prompt_misfit(found: str, expected: str) -> ModelError:
    """FS-1673: a prompt that the learned context, or the text tower, does not fit."""
    return ModelError(
        "FS-1673", found, expected=f"{expected} for this text tower", cure="mend encoder.prompt or the class names"
    )
