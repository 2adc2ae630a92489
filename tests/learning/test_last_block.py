"""The visual tower's last block: open_clip's own numbers, exact clipped sums, and the formulas of the three methods."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_towers import autograd_loop, head_of, moved, some_units
from torch import nn

from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import predict
from fedsecure.learning.last_block import last_block_task, pretrained
from fedsecure.learning.modules import centred_inputs
from fedsecure.learning.objective import Contrast
from fedsecure.learning.tower_task import TowerTask
from fedsecure.learning.towers import MAX_TOKEN_BYTES, check_held, last_block_spec, towers_of
from fedsecure.learning.training import train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.vision.encoder import Encoder, load_encoder
from fedsecure.vision.tokens import TokenRows

TINY = "fedsecure-tiny"
SPEC = last_block_spec(TINY, classes=len(CLASSES))
START = SPEC.initial(b"any")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(TINY, "bundled", device="cpu")


@pytest.fixture(scope="module")
def scans() -> list[Image.Image]:
    images, _ = generate(2, seed=4, acquisition=SITES["site_b"])
    return [Image.fromarray(image).convert("RGB") for image in images]


def block_of(encoder: Encoder, contrast: Contrast | None = None) -> TowerTask:
    return last_block_task(encoder.network, spec=SPEC, head=head_of(encoder), contrast=contrast)


def away(seed: int, *, size: float = 0.02) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.normal(size=value.shape)).astype(np.float32) for name, value in START.items()}


def changed_network(encoder: Encoder, changes: dict[str, Any]) -> Any:
    """open_clip's own tower, float64, with the changes put into its fused weights by hand."""
    network = copy.deepcopy(encoder.network).double()
    block = network.visual.transformer.resblocks[-1]
    width = block.attn.out_proj.out_features
    changes = {name: torch.from_numpy(value).double() for name, value in changes.items()}
    for row, name in enumerate(("query", "key", "value")):
        rows = slice(row * width, (row + 1) * width)
        block.attn.in_proj_weight.data[rows] += changes[f"{name}.weight"]
        if name != "key":
            block.attn.in_proj_bias.data[rows] += changes[f"{name}.bias"]
    layers = {"ln_1": block.ln_1, "out": block.attn.out_proj, "ln_2": block.ln_2}
    for name, layer in (layers | {"c_fc": block.mlp.c_fc, "c_proj": block.mlp.c_proj}).items():
        layer.weight.data += changes[f"{name}.weight"]
        layer.bias.data += changes[f"{name}.bias"]
    return network


@pytest.mark.parametrize("trained", [False, True])
def test_unfused_attention_and_cached_tokens_are_open_clip_to_the_last_bits(encoder: Encoder, trained: bool) -> None:
    changes = away(1) if trained else START
    network = changed_network(encoder, changes)
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[torch.Tensor] = []
    network.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        expected = centred_inputs(head_of(encoder), network.encode_image(pixels))
        block: Any = block_of(encoder).build(changes)
        found = block.adapt(seen[0].flatten(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_are_what_the_last_block_is_given(encoder: Encoder, scans: list[Image.Image]) -> None:
    eye = TokenRows(encoder)
    assert eye.dimension == SPEC.dimension == 65 * 96
    assert eye.fingerprint != encoder.fingerprint
    seen: list[torch.Tensor] = []
    network = copy.deepcopy(encoder.network)
    network.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network.encode_image(torch.stack([encoder.preprocess(image) for image in scans]))
    told: list[tuple[int, int]] = []
    rows = eye.encode_images(scans, batch_size=3, progress=lambda done, count: told.append((done, count)))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, seen[0].flatten(1).numpy(), atol=1e-5)
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_round_0_is_zero_shot(encoder: Encoder, scans: list[Image.Image]) -> None:
    head = head_of(encoder)
    bare, before = predict(head, {"D": np.zeros((4, 64))}, encoder.encode_images(scans), device="cpu")
    found, after = predict(block_of(encoder), START, TokenRows(encoder).encode_images(scans), device="cpu")
    assert np.array_equal(found, bare)
    # Tokens and features were computed in float32.
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert not any(value.any() for value in START.values())


@pytest.mark.slow
@pytest.mark.parametrize(("records", "clip", "contrast"), [(1, 1000.0, False), (3, 0.02, False), (3, 0.02, True)])
def test_clipped_sums_are_those_of_autograd(encoder: Encoder, records: int, clip: float, contrast: bool) -> None:
    """By record and by patient, with units of different sizes."""
    task = block_of(encoder, Contrast(away(2), away(3)) if contrast else None)
    tensors, units = away(1), some_units(SPEC.dimension, units=3, records=records)
    found = clipped_sum(task, tensors, units, max_grad_norm=clip, device="cpu")
    expected = autograd_loop(task, tensors, units, clip)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    assert all(part.any() for part in SPEC.unflatten(expected).values()), "every tensor learns"


@pytest.mark.parametrize("contrast", [False, True])
def test_a_whole_unit_moves_the_sum_by_the_clip_at_most(encoder: Encoder, contrast: bool) -> None:
    task = block_of(encoder, Contrast(away(2), away(3)) if contrast else None)
    units, clip = some_units(SPEC.dimension, units=4, records=2), 0.05
    whole = clipped_sum(task, away(1), units, max_grad_norm=clip, device="cpu")
    moves = []
    for left_out in range(4):
        others = units.select(np.arange(4) != left_out)
        moves.append(np.linalg.norm(whole - clipped_sum(task, away(1), others, max_grad_norm=clip, device="cpu")))
    assert max(moves) <= clip
    assert max(moves) > 0.99 * clip, "the clip is what holds it"


@pytest.mark.slow
def test_a_unit_is_untouched_by_the_others_bit_for_bit(encoder: Encoder) -> None:
    module = block_of(encoder, Contrast(away(2), away(3))).build(away(1)).train()
    units = torch.from_numpy(some_units(SPEC.dimension, units=3).features).double()
    others = units.clone()
    others[1:] = torch.from_numpy(some_units(SPEC.dimension, units=2, seed=9).features)
    one, two = module(units), module(others)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_a_tied_weight_is_refused(encoder: Encoder) -> None:
    """The norm of a weight that two layers use is not what Opacus sees; the engine's guard finds it."""
    import dataclasses

    task = block_of(encoder)

    def tied(parameters: Any) -> nn.Module:
        block: Any = task.build(parameters)
        block.value.weight = block.key.weight
        return block  # type: ignore[no-any-return]

    shapes = {name: shape for name, shape in task.shapes.items() if name != "value.weight"}
    wrong = dataclasses.replace(task, build=tied, shapes=shapes)
    with pytest.raises(PrivacyError, match="FS-1248"):
        clipped_sum(wrong, START, some_units(SPEC.dimension, units=2, records=1), max_grad_norm=1.0, device="cpu")


def one_step(task: TowerTask, units: UnitFeatures, start: Any = None, **how: Any) -> np.ndarray:
    moved_by = train_locally(
        task,
        START if start is None else start,
        units,
        steps=how.pop("steps", 1),
        learning_rate=0.5,
        max_grad_norm=1e6,
        normaliser=len(units),
        privatise=lambda total, clip: total,
        sample=lambda count: np.ones(count, np.bool_),
        device="cpu",
        **how,
    )
    return SPEC.flatten(moved_by)


def by_hand(encoder: Encoder, tensors: Any, units: UnitFeatures, poles: Any = None, strength: float = 0.0) -> Any:
    """Mean gradient of cross-entropy and MOON's term with z of open_clip's own, changed network: weight by weight."""
    block: Any = block_of(encoder).build(tensors)
    rows, labels = torch.from_numpy(units.features[:, 0]).double(), torch.from_numpy(units.labels[:, 0])
    z = block.adapt(rows)
    loss = nn.functional.cross_entropy(z @ block.prior.T, labels)
    if poles is not None:
        near, far = (block_of(encoder).build(pole).adapt(rows).detach() for pole in poles)  # type: ignore[operator]
        pull, push = (torch.exp(nn.functional.cosine_similarity(z, pole) / 0.5) for pole in (near, far))
        loss = loss - strength * torch.log(pull / (pull + push)).mean()
    parts = torch.autograd.grad(loss, [p for p in block.parameters() if p.requires_grad])
    return torch.cat([part.flatten() for part in parts]).numpy()


def test_one_step_of_each_method_by_hand(encoder: Encoder) -> None:
    units = some_units(SPEC.dimension, units=3, records=1)
    common, previous = away(5), away(6, size=0.1)
    plain = by_hand(encoder, common, units)
    free = one_step(block_of(encoder), units, common)
    np.testing.assert_allclose(free, -0.5 * plain, rtol=3e-5, atol=3e-5 * np.abs(plain).max())
    # FedProx: the proximal operator at the end of the step, w − w_start divided by 1 + ρ.
    held = one_step(block_of(encoder), units, common, proximal=0.25)
    np.testing.assert_allclose(held, free / 1.25, rtol=1e-9, atol=1e-15)
    # Equation 3 of the paper, whose cosines are those of the unit rows z.
    task = block_of(encoder, Contrast(common, previous, strength=2.0))
    apart = by_hand(encoder, common, units, poles=(common, previous), strength=2.0)
    np.testing.assert_allclose(one_step(task, units, common), -0.5 * apart, rtol=3e-5, atol=3e-5 * np.abs(apart).max())
    assert np.linalg.norm(apart - plain) > 0.05 * np.linalg.norm(plain), "the contrast has a say"
    # A previous block that is the common one pushes nowhere at the round's start.
    still = one_step(block_of(encoder, Contrast(common, common)), units, common)
    np.testing.assert_allclose(still, free, rtol=1e-6, atol=1e-9)


def test_the_proximal_term_holds_back_over_steps(encoder: Encoder) -> None:
    units = some_units(SPEC.dimension, units=3, records=1)
    free, held = (one_step(block_of(encoder), units, steps=4, proximal=rho) for rho in (0.0, 0.5))
    assert 0 < np.linalg.norm(held) < 0.8 * np.linalg.norm(free)


def test_the_encoder_stays_as_it_is(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.network.state_dict().items()}
    one_step(block_of(encoder, Contrast(away(2), away(3))), some_units(SPEC.dimension, units=2))
    assert all(torch.equal(encoder.network.state_dict()[name], value) for name, value in before.items())


def test_changes_survive_a_reload_and_misnamed_ones_are_refused(encoder: Encoder) -> None:
    task, tensors = block_of(encoder), away(1)
    block: Any = task.build(tensors)
    own = pretrained(encoder.network.visual)
    kept = {name: value - own[name] for name, value in block.named_parameters() if value.requires_grad}
    assert list(kept) == list(tensors)
    assert all(np.allclose(kept[name].detach().numpy(), value, atol=1e-12) for name, value in tensors.items())
    other: Any = task.build(dict(reversed(tensors.items())))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True)), "in any order"
    wrapped = {f"_module.{name}": value for name, value in tensors.items()}
    broken = tensors | {"query.weight": np.full_like(tensors["query.weight"], np.nan)}
    short = dict(list(tensors.items())[1:])
    for bad in (wrapped, short, tensors | wrapped, broken):
        with pytest.raises(ModelError, match="FS-1672"):
            task.build(bad)
        with pytest.raises(ModelError, match="FS-1672"):
            block_of(encoder, Contrast(tensors, bad))


def test_prediction_is_the_same_in_any_company(encoder: Encoder) -> None:
    task = block_of(encoder)
    rows = np.random.default_rng(5).normal(size=(5, SPEC.dimension))
    _, together = predict(task, moved(task), rows, device="cpu")
    alone = np.concatenate([predict(task, moved(task), row[None], device="cpu")[1] for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-336", TINY])
def test_tokens_and_weights_are_counted_as_open_clip_has_them(model: str, encoder: Encoder) -> None:
    import open_clip

    vision = open_clip.get_model_config(model)["vision_cfg"]
    towers, spec = towers_of(model), last_block_spec(model, classes=3)
    assert towers.patch_size == vision["patch_size"]
    assert towers.tokens == (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    w = vision["width"]
    assert spec.parameters == 12 * w * w + 12 * w
    assert spec.dimension == towers.tokens * w
    assert last_block_spec("ViT-B-32", classes=3).parameters == 7_087_104


def test_layout_and_weights_agree_by_name_and_shape(encoder: Encoder) -> None:
    own = pretrained(encoder.network.visual)
    assert {name: tuple(value.shape) for name, value in own.items()} == dict(SPEC.shapes)


def test_more_tokens_than_fit_are_refused(encoder: Encoder) -> None:
    spec = last_block_spec("ViT-B-16", classes=3)
    most = MAX_TOKEN_BYTES // (4 * spec.dimension)
    check_held(spec, most)
    with pytest.raises(ModelError, match="FS-1678"):
        check_held(spec, most + 1)


@pytest.mark.parametrize("trouble", ["other", "pooled", "scaled", "single"])
def test_another_visual_tower_than_the_settings_is_refused(encoder: Encoder, trouble: str) -> None:
    network, spec = copy.deepcopy(encoder.network), SPEC
    if trouble == "other":
        spec = last_block_spec("ViT-B-32", classes=4)
    elif trouble == "pooled":
        network.visual.pool_type = "avg"
    elif trouble == "scaled":
        network.visual.transformer.resblocks[-1].ls_2 = nn.Linear(96, 96)
    else:
        network.visual = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="FS-1674"):
        last_block_task(network, spec=spec, head=head_of(encoder))
