"""Learned prompts and low-rank branches: exact logits, exact clipped sums, nothing shared by units, nothing lost."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsecure.data.phantoms import CLASSES
from fedsecure.errors import EnvironmentProblem, ModelError, PrivacyError
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import predict
from fedsecure.learning.lora_module import LoraTower, lora_task
from fedsecure.learning.modules import build_module
from fedsecure.learning.prompt_module import make_prompts, prompt_task
from fedsecure.learning.tower_task import TowerTask, load_exactly, zero_shot_head
from fedsecure.learning.towers import lora_spec, prompt_spec, towers_of
from fedsecure.learning.units import UnitFeatures
from fedsecure.vision.encoder import Encoder, load_encoder
from fedsecure.vision.prompts import DEFAULT_TEMPLATE, class_prompts

TINY = "fedsecure-tiny"
PROMPTS = [(contexts, at) for contexts in ("shared", "class") for at in (True, False)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(TINY, "bundled", device="cpu")


def prompts_of(encoder: Encoder, contexts: Any = "shared", at: bool = True, *, template: str = DEFAULT_TEMPLATE) -> Any:
    head = head_of(encoder)
    spec = prompt_spec(TINY, classes=len(CLASSES), contexts=contexts, length=4, at_template=at)
    words = make_prompts(encoder.tokenizer, CLASSES, template=template, length=4, at_template=at)
    return prompt_task(encoder.network, words, spec=spec, head=head)


def lora_of(encoder: Encoder) -> TowerTask:
    pytest.importorskip("peft")
    return lora_task(encoder.network, spec=lora_spec(TINY, classes=len(CLASSES), rank=2), head=head_of(encoder))


def head_of(encoder: Encoder) -> Any:
    assert encoder.public_mean is not None
    return zero_shot_head(encoder.encode_text(class_prompts(CLASSES)), encoder.public_mean, temperature=10.0)


def moved(task: TowerTask) -> dict[str, np.ndarray]:
    """Away from the start, so that no gradient is zero."""
    rng = np.random.default_rng(3)
    return {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in task.spec.initial(b"t").items()}


def some_units(dimension: int, *, units: int = 5, records: int = 3, seed: int = 0) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    mask = np.ones((units, records), np.bool_)
    mask[1, records - 1] = records == 1
    labels = np.where(mask, rng.integers(0, len(CLASSES), mask.shape), 0)
    features = rng.normal(size=(units, records, dimension)).astype(np.float32) * mask[..., None]
    return UnitFeatures(features, labels, mask)


def autograd_loop(task: TowerTask, tensors: Mapping[str, Any], units: UnitFeatures, clip: float) -> np.ndarray:
    """One backward pass for each unit, alone, without Opacus."""
    total = np.zeros(task.spec.parameters)
    for row in range(len(units)):
        one = units.select([row])  # type: ignore[arg-type]
        module = task.build(tensors).double().train()
        losses = task.loss(module(torch.from_numpy(one.features).double()), torch.from_numpy(one.labels))
        trainable = [p for p in module.parameters() if p.requires_grad]
        parts = torch.autograd.grad((losses * torch.from_numpy(one.weights)).sum(), trainable)
        flat = torch.cat([g.flatten() for g in parts]).numpy()
        total += flat * min(1.0, clip / float(np.linalg.norm(flat)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("contexts", "at"), PROMPTS)
def test_prompts_under_opacus_give_the_sums_of_autograd(encoder: Encoder, contexts: str, at: bool) -> None:
    task = prompts_of(encoder, contexts, at)
    tensors, units = moved(task), some_units(64)
    for clip in (0.02, 100.0):
        found = clipped_sum(task, tensors, units, max_grad_norm=clip, device="cpu")
        expected = autograd_loop(task, tensors, units, clip)
        # Opacus's engine keeps a margin of 1e-5 below the clip.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
        assert np.linalg.norm(expected) > 0


@pytest.mark.parametrize("contexts", ["shared", "class"])
def test_prompts_at_the_template_start_as_zero_shot(encoder: Encoder, contexts: str) -> None:
    task = prompts_of(encoder, contexts)
    rows = np.random.default_rng(1).normal(size=(7, 64))
    zero_shot = build_module(task.head, {"D": np.zeros((4, 64))}, device=torch.device("cpu"), dtype=torch.float64)
    start = task.spec.initial(b"any")
    found = task.build(start).double().eval()(torch.from_numpy(rows))
    # The zero-shot texts were encoded in float32.
    torch.testing.assert_close(found, zero_shot(torch.from_numpy(rows)), rtol=0, atol=1e-5)
    away = task.build(moved(task)).double().eval()(torch.from_numpy(rows))
    assert not torch.allclose(away, found, atol=1e-2)


def test_prompts_of_their_own_are_what_clip_makes_of_those_words(encoder: Encoder) -> None:
    """With the embeddings of "a picture of a" as learned words, the prompt is that prompt."""
    task = prompts_of(encoder, "shared", False)
    words = encoder.tokenizer(["a picture of a"])[0, 1:5]
    tensors = {"context": encoder.network.token_embedding(words).numpy()}
    module: Any = task.build(tensors).double().eval()
    np.testing.assert_allclose(module.texts(1)[0].detach().numpy(), task.head.text, atol=1e-5)


@pytest.mark.parametrize("name", ["promptfl", "lora"])
def test_a_unit_is_untouched_by_the_others_bit_for_bit(encoder: Encoder, name: str) -> None:
    task = prompts_of(encoder) if name == "promptfl" else lora_of(encoder)
    module = task.build(moved(task)).double().train()
    units = torch.from_numpy(some_units(task.spec.dimension, units=3).features).double()
    others = units.clone()
    others[1:] = torch.from_numpy(some_units(task.spec.dimension, units=2, seed=9).features)
    one, two = module(units), module(others)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


@pytest.mark.slow
@pytest.mark.parametrize(("records", "clip"), [(1, 1000.0), (3, 0.02)])
def test_branches_under_opacus_give_the_sums_of_autograd(encoder: Encoder, records: int, clip: float) -> None:
    task = lora_of(encoder)
    tensors, units = moved(task), some_units(task.spec.dimension, units=3, records=records)
    found = clipped_sum(task, tensors, units, max_grad_norm=clip, device="cpu")
    expected = autograd_loop(task, tensors, units, clip)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    assert all(part.any() for part in task.spec.unflatten(expected).values()), "every branch learns"


def test_branches_start_as_zero_shot_and_leave_the_encoder_alone(encoder: Encoder) -> None:
    task = lora_of(encoder)
    before = {name: value.clone() for name, value in encoder.network.state_dict().items()}
    pixels = torch.from_numpy(some_units(task.spec.dimension, units=2, records=2).features)
    zero_shot = build_module(task.head, {"D": np.zeros((4, 64))}, device=torch.device("cpu"), dtype=torch.float64)
    features = encoder.network.encode_image(pixels.reshape(-1, 3, 64, 64)).reshape(2, 2, 64)
    found = task.build(task.spec.initial(b"any")).double().eval()(pixels.double())
    torch.testing.assert_close(found, zero_shot(features.double()), rtol=0, atol=1e-4)
    clipped_sum(task, moved(task), some_units(task.spec.dimension, units=2), max_grad_norm=1.0, device="cpu")
    after = encoder.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_branch_equals_its_merged_weight(encoder: Encoder) -> None:
    """PEFT's forward pass against W + B·A put into a plain tower by hand."""
    task = lora_of(encoder)
    tensors = moved(task)
    pixels = torch.from_numpy(some_units(task.spec.dimension, units=2, records=1).features).double()[:, 0]
    import copy

    visual: Any = copy.deepcopy(encoder.network.visual).double()
    for name in {key[:-2] for key in tensors}:
        block, layer = name.split(".")
        extra = torch.from_numpy(tensors[f"{name}.B"]).double() @ torch.from_numpy(tensors[f"{name}.A"]).double()
        getattr(visual.transformer.resblocks[int(block)].mlp, layer).weight.data += extra
    features = visual(pixels.reshape(-1, 3, 64, 64))
    zero_shot = build_module(task.head, {"D": np.zeros((4, 64))}, device=torch.device("cpu"), dtype=torch.float64)
    _, found = predict(task, tensors, pixels.numpy(), device="cpu")
    np.testing.assert_allclose(found, torch.softmax(zero_shot(features), -1).detach().numpy(), atol=1e-6)


def test_branches_survive_a_reload_bit_for_bit_and_misnamed_ones_are_refused(encoder: Encoder) -> None:
    task = lora_of(encoder)
    tensors = moved(task)
    tower: Any = task.build(tensors)
    kept = {name: parameter.detach().float().numpy() for name, parameter in tower.branches()}
    assert list(kept) == list(tensors)
    again: Any = task.build(kept)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tower.branches(), again.branches(), strict=True))
    wrapped = {f"_module.{name}": value for name, value in kept.items()}
    # The trap: torch drops what it does not know, and the tower keeps other values without a word.
    lost: Any = task.build(task.spec.initial(b"other"))
    lost.load_state_dict({f"_module.{k}": v for k, v in tower.state_dict().items()}, strict=False)
    assert not torch.equal(lost.branches()[0][1], tower.branches()[0][1])
    # A tower of eleven layers comes off the wire in another order than its module's: 10 stands before 2.
    swapped: Any = task.build(dict(reversed(kept.items())))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tower.branches(), swapped.branches(), strict=True))
    short = dict(list(kept.items())[1:])
    broken = kept | {"0.c_fc.A": np.full_like(kept["0.c_fc.A"], np.nan)}
    for bad in (wrapped, short, broken):
        with pytest.raises(ModelError, match="FS-1672"):
            task.build(bad)


def test_a_value_that_does_not_stay_is_noticed() -> None:
    class Deaf(nn.Parameter):
        def copy_(self, value: Any, non_blocking: bool = False) -> Any:
            return self

    with pytest.raises(ModelError, match="FS-1672"):
        load_exactly([("a", Deaf(torch.zeros(2)))], {"a": np.ones(2, np.float32)})


def test_a_tied_branch_is_refused(encoder: Encoder) -> None:
    """The norm of a weight that two layers use is not what Opacus sees; the engine's guard finds it."""
    task = lora_of(encoder)

    def tied(parameters: Mapping[str, Any]) -> nn.Module:
        tower: Any = task.build(parameters)
        blocks = tower.visual.transformer.resblocks
        blocks[1].mlp.c_fc.lora_A = blocks[0].mlp.c_fc.lora_A
        return tower  # type: ignore[no-any-return]

    tensors = moved(task)
    shapes = {name: shape for name, shape in task.shapes.items() if name != "1.c_fc.A"}
    wrong = dataclasses.replace(task, build=tied, shapes=shapes)
    units = some_units(task.spec.dimension, units=2, records=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PrivacyError, match="FS-1248"):
            clipped_sum(wrong, tensors, units, max_grad_norm=1.0, device="cpu")


def test_prediction_is_the_same_in_any_company(encoder: Encoder) -> None:
    task = prompts_of(encoder, "class", False)
    rows = np.random.default_rng(5).normal(size=(9, 64))
    _, together = predict(task, moved(task), rows, device="cpu")
    alone = np.concatenate([predict(task, moved(task), row[None], device="cpu")[1] for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_starts_are_public_and_spread_as_said() -> None:
    spec = prompt_spec("ViT-B-32", classes=3, contexts="class", length=16, at_template=False)
    one, two = spec.initial(b"run"), spec.initial(b"run")
    assert one["context"].shape == (48, 512)
    assert np.array_equal(one["context"], two["context"])
    assert not np.array_equal(one["context"], spec.initial(b"other")["context"])
    # 24,576 values: the deviation is within 1 % of 0.02 and the mean within 6 standard errors; the seed is fixed.
    assert abs(one["context"].std() / 0.02 - 1) < 0.02
    assert abs(one["context"].mean()) < 6 * 0.02 / 24_576**0.5
    lora = lora_spec("ViT-L-14", classes=3, rank=4)
    assert lora.parameters == 24 * 2 * 4 * 5 * 1024
    assert all(value.any() == name.endswith(".A") for name, value in lora.initial(b"run").items())


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-336", TINY])
def test_the_table_of_towers_is_that_of_open_clip(model: str, encoder: Encoder) -> None:
    import open_clip

    known, towers = open_clip.get_model_config(model), towers_of(model)
    vision = known["vision_cfg"]
    assert (towers.image_size, towers.layers, towers.width) == tuple(
        vision[k] for k in ("image_size", "layers", "width")
    )
    assert (towers.text_width, towers.dimension) == (known["text_cfg"]["width"], known["embed_dim"])


@pytest.mark.parametrize("model", ["features", "RN50", "ViT-B-17"])
def test_an_encoder_without_known_towers_is_refused(model: str) -> None:
    for make in (
        lambda: lora_spec(model, classes=3, rank=4),
        lambda: prompt_spec(model, classes=3, contexts="shared", length=4, at_template=True),
    ):
        with pytest.raises(ModelError, match="FS-1671"):
            make()


def test_prompts_that_do_not_fit_are_refused(encoder: Encoder) -> None:
    for template, length, at in (("scan {}", 4, True), ("a picture of a {}", 20, False), ("{} scan", 1, True)):
        with pytest.raises(ModelError, match="FS-1673"):
            make_prompts(encoder.tokenizer, CLASSES, template=template, length=length, at_template=at)
    after = make_prompts(encoder.tokenizer, ("mass",), template="a {} scan", length=2, at_template=False)
    assert after.tokens[0, 1:3].tolist() == [0, 0]
    assert after.tokens[0, 3 : int(after.tokens[0].argmax())].tolist() == [
        *encoder.tokenizer(["mass scan"])[0, 1 : int(encoder.tokenizer(["mass scan"])[0].argmax())].tolist()
    ]
    head, spec = head_of(encoder), prompt_spec(TINY, classes=4, contexts="shared", length=4, at_template=True)
    task = prompt_task(nn.Linear(2, 2), prompts_words(encoder), spec=spec, head=head)
    with pytest.raises(ModelError, match="FS-1673"):
        task.build(spec.initial(b"x"))


def prompts_words(encoder: Encoder) -> Any:
    return make_prompts(encoder.tokenizer, CLASSES, template=DEFAULT_TEMPLATE, length=4, at_template=True)


def test_another_visual_tower_than_the_settings_is_refused(encoder: Encoder) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelError, match="FS-1674"):
        lora_task(encoder.network, spec=lora_spec("ViT-B-32", classes=4, rank=2), head=head_of(encoder))


def test_without_peft_the_extra_is_named(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsecure import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"fedsecure\[lora\]"):
        lora_task(encoder.network, spec=lora_spec(TINY, classes=4, rank=2), head=head_of(encoder))


def test_only_branches_can_be_trained(encoder: Encoder) -> None:
    task = lora_of(encoder)
    tower = task.build(task.spec.initial(b"x"))
    assert isinstance(tower, LoraTower)
    tower.visual.proj.requires_grad_(True)
    with pytest.raises(ModelError, match="FS-1674"):
        tower.branches()
