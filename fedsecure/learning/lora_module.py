"""Low-rank branches in CLIP's visual tower through PEFT, for Opacus (LoRA, Hu et al. 2021, arXiv 2106.09685).

Only the two projections of each block's MLP get a branch. Attention does not: open_clip's fused attention reads the
weights of its projections without calling their layers, so a branch there would be trained on nothing. Records are
preprocessed images as rows of pixels (:mod:`fedsecure.vision.pixels`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsecure.errors import ModelError
from fedsecure.extras import require
from fedsecure.learning.modules import centred_inputs
from fedsecure.learning.task import HeadTask
from fedsecure.learning.tower_task import TowerTask, load_exactly, record_loss
from fedsecure.learning.towers import TowerSpec

# Images in activations at a time.
_IMAGES = 64
_TARGETS = r"transformer\.resblocks\.\d+\.mlp\.c_(fc|proj)"


@dataclass(slots=True)
class _Frame:
    """How many units the pass under way holds."""

    units: int = 1


class _PerUnit(nn.Sequential):
    """An MLP that sees (U, m·t, w) where the tower has (U·m, t, w): Opacus takes the first axis for the units."""

    def __init__(self, layers: nn.Sequential, frame: _Frame) -> None:
        super().__init__(OrderedDict(layers.named_children()))
        self.frame = frame

    def forward(self, hidden: Tensor) -> Tensor:
        whole = hidden.reshape(self.frame.units, -1, hidden.shape[-1])
        for layer in self:
            whole = layer(whole)
        return whole.reshape(hidden.shape)


class LoraTower(nn.Module):
    """Logits of (U, m, 3·s²) or (n, 3·s²) pixels: the visual tower with branches, against the run's fixed texts."""

    prior: Tensor

    def __init__(self, visual: nn.Module, *, side: int, head: HeadTask, rank: int) -> None:
        super().__init__()
        require("peft")
        from peft import LoraConfig, inject_adapter_in_model

        self.side, self.head, self.frame = side, head, _Frame()
        self.register_buffer("prior", torch.from_numpy(head.prior * head.scale), persistent=False)
        bare = copy.deepcopy(visual).requires_grad_(False)
        # alpha = rank: the branch is B·A, without a factor.
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=_TARGETS)
        branched: Any = inject_adapter_in_model(config, bare)
        self.visual = branched
        for block in branched.transformer.resblocks:
            block.mlp = _PerUnit(block.mlp, self.frame)

    def forward(self, pixels: Tensor) -> Tensor:
        self.frame.units = len(pixels)
        images = pixels.reshape(-1, 3, self.side, self.side)
        features = self.visual(images).reshape(*pixels.shape[:-1], -1)
        logits: Tensor = centred_inputs(self.head, features) @ self.prior.to(features).T
        return logits

    def branches(self) -> list[tuple[str, nn.Parameter]]:
        """(name in the task, parameter) of what is trained, in the module's order.

        Raises:
            ModelError: FS-1674 when something else than the branches can be trained.
        """
        found = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parts = name.split(".")
                # visual.transformer.resblocks.0.mlp.c_fc.lora_A.default.weight
                if len(parts) != 9 or parts[6] not in ("lora_A", "lora_B"):
                    raise ModelError(
                        "FS-1674",
                        f"trainable tensor {name}",
                        expected="the branches of c_fc and c_proj only",
                        cure="use an encoder with a plain vision transformer, and the PEFT release of constraints.txt",
                    )
                found.append((f"{parts[3]}.{parts[5]}.{parts[6][-1]}", parameter))
        return found


def lora_task(network: Any, *, spec: TowerSpec, head: HeadTask) -> TowerTask:
    """LoRA for the Opacus engine.

    Args:
        network: open_clip's CLIP, on its device; it stays as it is.
        spec: from :func:`fedsecure.learning.towers.lora_spec`.
        head: texts, public mean and temperature.

    Raises:
        EnvironmentProblem: FS-1816 PEFT is not installed.
        ModelError: FS-1672 in ``build`` for tensors that do not fit, FS-1674 for another visual tower than the spec's.
    """
    require("peft")
    side = network.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    if 3 * height * width != spec.dimension or height != width:
        raise ModelError(
            "FS-1674",
            f"a visual tower for {height} × {width} pixels",
            expected=f"{spec.dimension} numbers an image",
            cure="use the encoder that the settings name",
        )
    return TowerTask(
        shapes=spec.shapes,
        build=partial(_build, network.visual, height, head, spec),
        loss=record_loss,
        spec=spec,
        head=head,
        chunk=_IMAGES,
        single=True,
    )


def _build(visual: nn.Module, side: int, head: HeadTask, spec: TowerSpec, parameters: Mapping[str, Any]) -> LoraTower:
    rank = spec.layout[0][1][0]
    # PEFT fills the branches from torch's global generator; they are overwritten, so its state is put back.
    with torch.random.fork_rng(devices=[]):
        tower = LoraTower(visual, side=side, head=head, rank=rank).double()
    load_exactly(tower.branches(), dict(parameters))
    return tower
