"""The last block of CLIP's visual tower for Opacus: attention, MLP and both layer norms, everything else frozen.

What FedAvg, FedProx and MOON (Li, He, Song, CVPR 2021) train in their papers is the network itself; this is the part
of CLIP that can be trained under per-unit clipping with what is before it computed once
(:mod:`fedsecure.vision.tokens`). open_clip's fused attention keeps queries, keys and values in one tensor that no layer
is called with, so Opacus has no gradient of it; here they are three layers with the same weights. Only the class token
goes on from the last block, so only its query, and its way through the MLP, is computed. Keys have no bias: it would
add the same to all logits of a softmax. Tensors are *changes* of the weights and start at zero, since an aggregator
has no weights; round 0 is therefore zero-shot CLIP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.losses import contrast_loss
from fedsecure.learning.modules import centred_inputs
from fedsecure.learning.objective import Contrast
from fedsecure.learning.opacus_engine import RecordLoss
from fedsecure.learning.task import HeadTask
from fedsecure.learning.tower_task import TowerTask, load_exactly, record_loss
from fedsecure.learning.towers import TowerSpec

# Images in activations at a time.
_IMAGES = 128


class LastBlock(nn.Module):
    """Logits of (U, m, t·w) or (n, t·w) tokens against the run's fixed texts.

    Args:
        visual: open_clip's plain vision transformer, of which it copies what it needs.
        head: texts, public mean and temperature.
    """

    prior: Tensor
    projection: Tensor

    def __init__(self, visual: Any, *, head: HeadTask) -> None:
        super().__init__()
        block = visual.transformer.resblocks[-1]
        self.tokens, self.width = visual.positional_embedding.shape
        self.heads, self.head = block.attn.num_heads, head
        width, inner = self.width, block.mlp.c_fc.out_features
        # Plain layers: Opacus knows gradients of torch's own layer norm and not of open_clip's subclass.
        self.ln_1 = nn.LayerNorm(width, eps=block.ln_1.eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=block.ln_2.eps)
        self.c_fc = nn.Linear(width, inner)
        self.activation = copy.deepcopy(block.mlp.gelu)
        self.c_proj = nn.Linear(inner, width)
        self.ln_post = copy.deepcopy(visual.ln_post).requires_grad_(False)
        self.register_buffer("projection", visual.proj.detach().clone(), persistent=False)
        self.register_buffer("prior", torch.from_numpy(head.prior * head.scale), persistent=False)

    def adapt(self, tokens: Tensor) -> Tensor:
        """z: the unit inputs that texts are compared with, (…, d), of (…, t·w) tokens."""
        units = len(tokens)
        rows = tokens.reshape(units, -1, self.width)
        # The first axis is the units throughout, where Opacus looks for them.
        normed = self.ln_1(rows)
        query = self._by_head(self.query(self._class_tokens(normed)), 1)
        key, value = (self._by_head(layer(normed), self.tokens) for layer in (self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = self._class_tokens(rows) + self.out(mixed.transpose(2, 3).reshape(units, -1, self.width))
        hidden = hidden + self.c_proj(self.activation(self.c_fc(self.ln_2(hidden))))
        features = (self.ln_post(hidden) @ self.projection).reshape(*tokens.shape[:-1], -1)
        return centred_inputs(self.head, features)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.adapt(tokens) @ self.prior.T
        return logits

    def _class_tokens(self, rows: Tensor) -> Tensor:
        """(U, m, w) of (U, m·t, w)."""
        return rows.reshape(len(rows), -1, self.tokens, self.width)[:, :, 0]

    def _by_head(self, rows: Tensor, tokens: int) -> Tensor:
        """(U, m, heads, t, w/heads) of (U, m·t, w)."""
        return rows.reshape(len(rows), -1, tokens, self.heads, self.width // self.heads).transpose(2, 3)


class _BesidePoles(nn.Module):
    """A block whose outputs are what MOON's contrast looks at, end to end: logits, z, and z under each pole."""

    def __init__(self, block: LastBlock, poles: Sequence[LastBlock]) -> None:
        super().__init__()
        self.block = block
        # Not registered: they are constants, and privacy engines would look for their gradients.
        self._poles = tuple(pole.adapt for pole in poles)

    def forward(self, tokens: Tensor) -> Tensor:
        adapted = self.block.adapt(tokens)
        with torch.no_grad():
            fixed = [pole(tokens) for pole in self._poles]
        return torch.cat([adapted @ self.block.prior.T, adapted, *fixed], dim=-1)


def last_block_task(network: Any, *, spec: TowerSpec, head: HeadTask, contrast: Contrast | None = None) -> TowerTask:
    """The last block for the Opacus engine.

    Args:
        network: open_clip's CLIP, on its device; it stays as it is.
        spec: from :func:`fedsecure.learning.towers.last_block_spec`.
        head: texts, public mean and temperature.
        contrast: MOON's, between features z under the trained, the common and the site's previous block, in training;
            a task with it does not predict.

    Raises:
        ModelError: FS-1672 in ``build``, or here for a contrast, for tensors that do not fit; FS-1674 for another
            visual tower than the spec's.
    """
    check_plain(network.visual, spec)
    build = partial(_build, network.visual, head)
    if contrast is None:
        make: Callable[[Mapping[str, Any]], nn.Module] = build
        loss: RecordLoss = record_loss
    else:
        poles = [build(tensors).requires_grad_(False) for tensors in (contrast.anchor, contrast.previous)]
        make, loss = partial(_build_beside, build, poles), partial(_contrasted_loss, contrast, spec.classes)
    return TowerTask(shapes=spec.shapes, build=make, loss=loss, spec=spec, head=head, chunk=_IMAGES)


def pretrained(visual: Any) -> dict[str, Tensor]:
    """The block's own weights, by the names of the task."""
    block = visual.transformer.resblocks[-1]
    query, key, value = block.attn.in_proj_weight.detach().chunk(3)
    query_bias, _, value_bias = block.attn.in_proj_bias.detach().chunk(3)
    found = {"query.weight": query, "query.bias": query_bias, "key.weight": key}
    found |= {"value.weight": value, "value.bias": value_bias}
    layers = {"ln_1": block.ln_1, "out": block.attn.out_proj, "ln_2": block.ln_2}
    layers |= {"c_fc": block.mlp.c_fc, "c_proj": block.mlp.c_proj}
    for name, layer in layers.items():
        found |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    return found


def check_plain(visual: Any, spec: TowerSpec) -> None:
    """Refuse a tower whose last block is not the one written down here: ModelError FS-1674."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    block: Any = blocks[-1] if blocks else None
    positions = getattr(visual, "positional_embedding", None)
    fits = (
        positions is not None
        and positions.numel() == spec.dimension
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and visual.proj is not None
        and len(blocks or ()) > 1
        and type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
    )
    if not fits:
        raise ModelError(
            "FS-1674",
            f"a visual tower {type(visual).__name__} with a last block {type(block).__name__}",
            expected=f"CLIP's plain transformer with {spec.dimension} numbers of tokens an image",
            cure="use the encoder that the settings name",
        )


def _build(visual: Any, head: HeadTask, parameters: Mapping[str, Any]) -> LastBlock:
    # Torch fills new layers from its global generator; these values are overwritten, so its state is put back.
    with torch.random.fork_rng(devices=[]):
        block = LastBlock(visual, head=head).to(visual.proj.device, torch.float64)
    trained = [(name, value) for name, value in block.named_parameters() if value.requires_grad]
    load_exactly(trained, dict(parameters))
    own = pretrained(visual)
    with torch.no_grad():
        for name, parameter in trained:
            parameter.add_(own[name].to(parameter))
    return block


def _build_beside(
    build: Callable[[Mapping[str, Any]], LastBlock], poles: Sequence[LastBlock], parameters: Mapping[str, Any]
) -> nn.Module:
    return _BesidePoles(build(parameters), poles)


def _contrasted_loss(contrast: Contrast, classes: int, outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and MOON's term of each record, (U, m)."""
    width = (outputs.shape[-1] - classes) // 3
    logits, adapted, anchor, previous = torch.split(outputs, [classes, width, width, width], dim=-1)
    apart = contrast_loss(adapted, anchor, previous, temperature=contrast.temperature)
    return record_loss(logits, labels) + contrast.strength * apart
