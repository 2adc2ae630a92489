"""Learned context words in front of the class names, through CLIP's frozen text tower (facmic.md §2.4, PromptFL).

A record meets the prompts only in its own logits, so a unit's gradient is its own. Opacus wants to see each unit pass
through the trained layer: in training every unit reads the context by itself, and K·U prompts go through the text
tower; in prediction K do. Images come as features of the frozen visual tower, so the feature cache holds here too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsecure.learning.adapters import Float32
from fedsecure.learning.modules import centred_inputs
from fedsecure.learning.task import TINY, HeadTask
from fedsecure.learning.tower_task import TowerTask, load_exactly, record_loss
from fedsecure.learning.towers import TowerSpec, prompt_misfit
from fedsecure.vision.prompts import class_prompts
from fedsecure.vision.weights import Tokenizer

# Prompts in activations at a time.
_PROMPTS = 512
_NEEDED = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The prompts as tokens, and where the learned words stand.

    Attributes:
        tokens: (K, L) int64; 0 where a word of its own is learned.
        first: index of the first learned word.
        length: n learned words.
        added: learned values are added to the token there, else they replace it.
    """

    tokens: Tensor
    first: int
    length: int
    added: bool


def make_prompts(
    tokenizer: Tokenizer, classes: Sequence[str], *, template: str, length: int, at_template: bool
) -> Prompts:
    """Tokenise: start, n learned words, class name, rest of the template, end.

    Args:
        tokenizer: the encoder's.
        classes: K names.
        template: with one ``{}``.
        length: n.
        at_template: the learned words are the n tokens in front of the class name, which the template must have.

    Raises:
        ModelError: FS-1673 when the template has fewer words before the name, or the prompt becomes too long; FS-1609
            as :func:`fedsecure.vision.prompts.class_prompts`.
    """
    prompts = class_prompts(classes, template=template)
    before, after = template.split("{}")
    whole = tokenizer(list(prompts) if at_template else [name + after for name in classes])
    ends = whole.argmax(dim=1)
    if at_template:
        prefix = tokenizer([before.strip()])
        words = int(prefix.argmax()) - 1
        if words < length or not bool((whole[:, : words + 1] == prefix[:, : words + 1]).all()):
            raise prompt_misfit(f"{words} words before the class name in {template!r}", f"at least {length}")
        return Prompts(whole, words - length + 1, length, True)
    if int(ends.max()) + length >= whole.shape[1]:
        raise prompt_misfit(f"a prompt of {int(ends.max()) + 1 + length} words", f"at most {whole.shape[1]}")
    gap = torch.zeros(len(whole), length, dtype=whole.dtype)
    return Prompts(torch.cat([whole[:, :1], gap, whole[:, 1:-length]], dim=1), 1, length, False)


class PromptLearner(nn.Module):
    """Logits of (U, m, d) features, or (n, d) in prediction, against the learned prompts."""

    base: Tensor
    positions: Tensor
    mask: Tensor
    projection: Tensor
    ends: Tensor
    rows: Tensor

    def __init__(self, network: Any, prompts: Prompts, *, head: HeadTask, rows: int) -> None:
        super().__init__()
        self.head, self.first, self.length = head, prompts.first, prompts.length
        text = network
        if any(not hasattr(text, name) for name in _NEEDED) or getattr(text, "text_pool_type", None) != "argmax":
            raise prompt_misfit(f"text tower of {type(network).__name__}", "CLIP's own transformer")
        device = text.positional_embedding.device
        tokens = prompts.tokens.to(device)
        with torch.no_grad():
            base = text.token_embedding(tokens).detach().clone()
            if not prompts.added:
                base[:, self.first : self.first + self.length] = 0.0
        constants = {
            "base": base,
            "positions": text.positional_embedding.detach().clone(),
            "mask": text.attn_mask.detach().clone(),
            "projection": text.text_projection.detach().clone(),
            "ends": tokens.argmax(dim=1),
            "rows": torch.arange(rows, device=device),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.transformer = copy.deepcopy(text.transformer).requires_grad_(False)
        self.norm = copy.deepcopy(text.ln_final).requires_grad_(False)
        self.context = nn.Embedding(rows, base.shape[2])

    def texts(self, units: int) -> Tensor:
        """(U, K, d) unit text features, each unit's from its own reading of the context."""
        k, n = self.base.shape[0], self.length
        learned = self.context(self.rows.repeat(units, 1)).reshape(units, -1, n, self.base.shape[2])
        words = torch.cat(
            [
                self.base[:, : self.first].expand(units, -1, -1, -1),
                self.base[:, self.first : self.first + n] + learned.expand(-1, k, -1, -1),
                self.base[:, self.first + n :].expand(units, -1, -1, -1),
            ],
            dim=2,
        )
        hidden = self.transformer((words + self.positions).flatten(0, 1), attn_mask=self.mask)
        ends = self.ends.repeat(units)
        last = self.norm(hidden)[torch.arange(len(ends), device=ends.device), ends] @ self.projection
        return functional.normalize(last.reshape(units, k, -1), dim=-1, eps=TINY)

    def prior(self, units: int) -> Tensor:
        """(U, K, d): the texts, centred over the classes where the images are centred."""
        rows = self.texts(units)
        if not self.head.centre.any():
            return rows
        return functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=-1, eps=TINY)

    def forward(self, features: Tensor) -> Tensor:
        inputs = centred_inputs(self.head, features)
        prior = self.prior(len(features)) if self.training else self.prior(1)[0]
        logits: Tensor = self.head.scale * inputs @ prior.transpose(-1, -2)
        return logits


def prompt_task(network: Any, prompts: Prompts, *, spec: TowerSpec, head: HeadTask) -> TowerTask:
    """PromptFL for the Opacus engine.

    Args:
        network: open_clip's CLIP, on its device; it stays as it is.
        prompts: from :func:`make_prompts`.
        spec: from :func:`fedsecure.learning.towers.prompt_spec`.
        head: temperature, public mean and zero-shot texts.

    Raises:
        ModelError: FS-1672 in ``build`` for tensors that do not fit, FS-1673 for another kind of text tower.
    """
    build = partial(_build, network, prompts, spec, head)

    def texts(parameters: Mapping[str, Any]) -> Float32:
        with torch.no_grad():
            return np.asarray(build(parameters).eval().texts(1)[0].float().cpu().numpy())

    chunk = max(1, _PROMPTS // spec.classes)
    return TowerTask(
        shapes=spec.shapes, build=build, loss=record_loss, spec=spec, head=head, chunk=chunk, single=True, texts=texts
    )


def _build(
    network: Any, prompts: Prompts, spec: TowerSpec, head: HeadTask, parameters: Mapping[str, Any]
) -> PromptLearner:
    with torch.random.fork_rng(devices=[]):
        module = PromptLearner(network, prompts, head=head, rows=spec.shapes["context"][0]).double()
    load_exactly([("context", weight) for weight in module.context.parameters()], dict(parameters))
    return module
