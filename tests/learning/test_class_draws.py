"""The augmented draws of the released programs: what each operation does to an image, and what is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsecure.errors import ModelError
from fedsecure.learning.class_draws import OPERATIONS, ClassDraws, siamese

IMAGES = torch.rand((5, 3, 32, 32), generator=torch.Generator().manual_seed(0)) - 0.5


def results(name: str, images: Tensor, count: int = 40) -> list[Tensor]:
    return [OPERATIONS[name](images, torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_same_parameters_for_all_images(name: str) -> None:
    one = IMAGES[:1]
    for changed in results(name, one.expand(4, -1, -1, -1), 10):
        assert changed.shape == (4, 3, 32, 32)
        torch.testing.assert_close(changed, changed[:1].expand(4, -1, -1, -1))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_change_images_by_their_seed_and_stay_finite(name: str) -> None:
    found = results(name, IMAGES)
    again = results(name, IMAGES)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert any(not torch.equal(found[0], other) for other in found[1:])
    assert all(bool(torch.isfinite(one).all()) for one in found)


def test_half_the_flips_are_flips() -> None:
    flipped = [torch.equal(one, IMAGES.flip(-1)) for one in results("flip", IMAGES, 200)]
    assert 60 < sum(flipped) < 140
    assert sum(torch.equal(one, IMAGES) for one in results("flip", IMAGES, 200)) == 200 - sum(flipped)


def test_a_crop_moves_by_four_pixels_at_most() -> None:
    point = torch.zeros(1, 1, 32, 32)
    point[..., 16, 16] = 1
    places = {tuple(one[0, 0].nonzero()[0].tolist()) for one in results("crop", point, 400)}
    assert {row for row, _ in places} == {column for _, column in places} == set(range(12, 21))


def test_a_cutout_takes_a_square_of_half_the_side() -> None:
    for one in results("cutout", torch.ones(1, 3, 32, 32), 200):
        rows, columns = (~one[0, 0].bool()).any(1).sum().item(), (~one[0, 0].bool()).any(0).sum().item()
        assert 8 <= rows <= 16
        assert 8 <= columns <= 16
        assert (one[0] == 0).sum().item() == 3 * rows * columns


def test_scaling_and_turning_keep_the_middle_and_stay_in_their_range() -> None:
    bar = torch.zeros(1, 1, 33, 33)
    bar[..., 16, :] = 1
    for one in results("rotate", bar):
        assert one[0, 0, 16, 16] == pytest.approx(1, abs=1e-4)
        # 15 degrees lift the end of a bar by a quarter of its half length.
        heights = one[0, 0, :, 28].argmax().item()
        assert abs(heights - 16) <= 12 * 0.27 + 1
    block = torch.zeros(1, 1, 33, 33)
    block[..., 10:23, 10:23] = 1
    widths = [(one[0, 0, 16] > 0.5).sum().item() for one in results("scale", block)]
    assert 10 <= min(widths) < 13 < max(widths) <= 16


def test_colour_changes_lightness_by_half_and_keeps_a_grey_image_grey() -> None:
    grey = torch.full((1, 3, 32, 32), 0.2)
    found = [one for one in results("color", grey)]
    for one in found:
        torch.testing.assert_close(one, one[:, :1, :1, :1].expand_as(one))
        assert -0.3 <= one[0, 0, 0, 0].item() <= 0.7
    # Saturation from none to double, contrast from half to one and a half.
    spread = [one.std().item() / IMAGES.std().item() for one in results("color", IMAGES)]
    assert 0.2 < min(spread) < 0.8 < 1.2 < max(spread) < 3


def test_each_of_the_six_is_drawn_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(["color", "crop", "cutout", "flip", "scale", "rotate"], 0)
    assert set(OPERATIONS) == set(counts)

    def count(name: str, images: Tensor) -> Tensor:
        counts[name] += 1
        return images

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda images, _, name=name: count(name, images))
    generator = torch.Generator().manual_seed(3)
    for _ in range(600):
        siamese(IMAGES, generator)
    # A hundred each, by five standard deviations.
    assert all(55 < found < 145 for found in counts.values())


def test_classes_are_drawn_without_replacement_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsecure.learning.class_draws.siamese", lambda images, _: images)
    labels = torch.tensor([2] * 7 + [0] * 2)
    inputs = torch.arange(9.0).view(9, 1, 1, 1)
    parts = list(ClassDraws(repeats=3, most=4)(inputs, labels, seed=0))
    assert [known.tolist() for _, known in parts] == [[0] * 6, [2] * 12]
    images, drawn = (torch.cat(column) for column in zip(*parts, strict=True))
    for start, size in ((0, 2), (2, 2), (4, 2), (6, 4), (10, 4), (14, 4)):
        batch = images[start : start + size].flatten().tolist()
        assert len(set(batch)) == size
        assert all(labels[int(value)] == drawn[start] for value in batch)
    others = ClassDraws(repeats=3, most=4)(inputs, labels, seed=1)
    assert not torch.equal(images, torch.cat([other for other, _ in others]))
    with pytest.raises(ModelError, match="FS-1694"):
        ClassDraws(most=0)
