"""Phantoms: generated, synthetic 64×64 grey-scale "scans" of four classes; no patient or scanner stands behind them.

They exist so that the demo, the tests and the bundled tiny CLIP need neither network nor private data. A head is an
ellipse with a bright skull, folded texture and two dark ventricles; a lesion, if any, is drawn into the brain. Each
site has its own :class:`Acquisition`, so sites differ the way scanners and protocols differ. Everything follows from
a seed. Nothing measured on phantoms says anything about medicine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsecure.errors import DataError

SIZE = 64
CLASSES: tuple[str, ...] = ("no_lesion", "solid_mass", "ring_lesion", "multifocal_lesions")

Grey = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How a (made-up) scanner sees a head. The defaults are the neutral scanner.

    Attributes:
        contrast: factor on the deviation from mid-grey, > 0.
        brightness: added grey level, in units of the full range.
        gamma: exponent of the grey-scale curve, > 0; applied before contrast.
        noise: standard deviation of the added Gaussian noise, in units of the full range.
        blur: standard deviation of the Gaussian point spread, in pixels.
        field_of_view: width of the scene over the width of the neutral one; above 1 the head looks smaller.
        rotation: of the head, in degrees, counter-clockwise.
        rotation_spread, shift_spread: standard deviation of the positioning, in degrees and in half-widths.
        bias_field: strength of the smooth shading across the image, as of an uneven receive coil.
        lesion_contrast: grey-level difference of a lesion from tissue; negative lesions are dark.
        inverted: dark and bright swapped, as on another sequence.
    """

    contrast: float = 1.0
    brightness: float = 0.0
    gamma: float = 1.0
    noise: float = 0.02
    blur: float = 0.4
    field_of_view: float = 1.0
    rotation: float = 0.0
    rotation_spread: float = 4.0
    shift_spread: float = 0.02
    bias_field: float = 0.0
    lesion_contrast: float = 0.35
    inverted: bool = False


#: Eight made-up sites that differ; the first three are the demo's.
SITES: Mapping[str, Acquisition] = {
    "site_a": Acquisition(contrast=0.7, noise=0.07, blur=1.0, rotation=35, field_of_view=1.15),
    "site_b": Acquisition(gamma=1.8, noise=0.06, field_of_view=1.3, bias_field=0.5, rotation=-50),
    "site_c": Acquisition(contrast=0.75, brightness=0.1, noise=0.09, blur=0.7, rotation=70, lesion_contrast=0.28),
    "site_d": Acquisition(gamma=0.6, noise=0.05, blur=1.2, field_of_view=0.85, rotation=-30),
    "site_e": Acquisition(contrast=0.6, brightness=-0.1, noise=0.05, rotation=90),
    "site_f": Acquisition(noise=0.12, bias_field=0.7, rotation=20),
    "site_g": Acquisition(blur=1.5, field_of_view=1.25, rotation=-80, contrast=0.8),
    "site_h": Acquisition(gamma=1.5, contrast=0.8, noise=0.08, rotation=120, field_of_view=1.1),
}


def _ellipse(x: Plane, y: Plane, centre: tuple[float, float], axes: tuple[float, float], angle: float) -> Plane:
    """Distance from the centre in units of the half-axes: 1 on the ellipse."""
    dx, dy = x - centre[0], y - centre[1]
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(np.hypot((c * dx + s * dy) / axes[0], (c * dy - s * dx) / axes[1]))


def _soft(radius: Plane, edge: float = 0.12) -> Plane:
    """1 inside the unit ellipse, 0 outside, linear over the edge (stands in for anti-aliasing)."""
    return np.clip((1 - radius) / edge + 0.5, 0.0, 1.0)


def _lesion(x: Plane, y: Plane, label: int, rng: np.random.Generator) -> Plane:
    """Coverage map in [−0.6, 1] of the lesion of a class; negative inside a ring."""

    def place(spread: float) -> tuple[float, float]:
        angle, radius = rng.uniform(0, 2 * np.pi), spread * np.sqrt(rng.uniform(0.05, 1))
        return 0.46 * radius * np.cos(angle), 0.58 * radius * np.sin(angle)

    if label == 1:
        r = rng.uniform(0.15, 0.25)
        return _soft(_ellipse(x, y, place(1.0), (r, r * rng.uniform(0.75, 1.25)), rng.uniform(0, np.pi)), 0.2)
    if label == 2:
        r = rng.uniform(0.18, 0.27)
        radius = _ellipse(x, y, place(0.9), (r, r * rng.uniform(0.8, 1.2)), rng.uniform(0, np.pi))
        return _soft(radius, 0.2) - 1.5 * _soft(radius / rng.uniform(0.55, 0.68), 0.3)
    if label == 3:
        spots = [
            _soft(_ellipse(x, y, place(1.1), (r := rng.uniform(0.055, 0.095), r), 0.0), 0.4)
            for _ in range(rng.integers(4, 8))
        ]
        return np.asarray(np.maximum.reduce(spots))
    return np.zeros_like(x)


def render(label: int, acquisition: Acquisition, rng: np.random.Generator) -> Grey:
    """One synthetic scan, uint8 (64, 64)."""
    turn = np.deg2rad(acquisition.rotation + acquisition.rotation_spread * rng.standard_normal())
    axis = acquisition.field_of_view * ((np.arange(SIZE) + 0.5) * 2 / SIZE - 1)
    gx, gy = np.meshgrid(axis, axis)
    px, py = (
        gx - acquisition.shift_spread * rng.standard_normal(),
        gy - acquisition.shift_spread * rng.standard_normal(),
    )
    x, y = np.cos(turn) * px - np.sin(turn) * py, np.sin(turn) * px + np.cos(turn) * py
    head = _ellipse(x, y, (0, 0), (0.72 + 0.03 * rng.standard_normal(), 0.88 + 0.03 * rng.standard_normal()), 0.0)
    brain = _soft(head / 0.88)
    folds = sum(
        np.cos(rng.uniform(6, 16) * (np.cos(a) * x + np.sin(a) * y) + rng.uniform(0, 2 * np.pi))
        for a in rng.uniform(0, np.pi, 5)
    )
    tissue = 0.48 + 0.022 * folds + 0.06 * (head < 0.55)
    gap, long = rng.uniform(0.09, 0.14), rng.uniform(0.2, 0.3)
    ventricles = sum(_soft(_ellipse(x, y, (s * gap, -0.05), (0.06, long), -0.25 * s), 0.3) for s in (-1, 1))
    scene = brain * (tissue - 0.28 * np.clip(ventricles, 0, 1))
    scene += 0.85 * np.clip(_soft(head) - brain, 0, 1)
    strength = acquisition.lesion_contrast * rng.uniform(0.85, 1.15)
    scene += brain * strength * _lesion(x, y, label, rng)
    if acquisition.blur > 0:
        scene = _gaussian_blur(scene, acquisition.blur)
    if acquisition.bias_field:
        a = rng.uniform(0, 2 * np.pi)
        scene = scene * (1 + acquisition.bias_field * 0.5 * (np.cos(a) * gx + np.sin(a) * gy))
    scene = np.clip(scene, 0, 1) ** acquisition.gamma
    if acquisition.inverted:
        scene = 1 - scene
    scene = 0.5 + acquisition.contrast * (scene - 0.5) + acquisition.brightness
    scene = scene + acquisition.noise * rng.standard_normal(scene.shape)
    return np.asarray(np.rint(255 * np.clip(scene, 0, 1)), dtype=np.uint8)


def _gaussian_blur(scene: Plane, sigma: float) -> Plane:
    reach = np.arange(-4, 5)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(scene, [(4, 4) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=axis)
        scene = windows @ kernel
    return scene


def generate(
    n_per_class: int, *, seed: int, acquisition: Acquisition | Callable[[np.random.Generator], Acquisition]
) -> tuple[Grey, Labels]:
    """Synthetic scans, ``n_per_class`` of each class in :data:`CLASSES`, in shuffled order.

    Args:
        n_per_class: ≥ 1.
        seed: ≥ 0; the same seed gives the same bytes.
        acquisition: of all scans, or a function that draws one for each.

    Returns:
        images uint8 (n, 64, 64) and labels int64 (n,), n = 4·``n_per_class``.

    Raises:
        DataError: FS-1140 fewer than one scan a class asked for.
    """
    if n_per_class < 1:
        raise DataError(
            "FS-1140",
            f"{n_per_class} phantoms a class asked for",
            expected="at least 1",
            cure="ask for more phantoms a class",
        )
    rng = np.random.default_rng([seed, 0x70686E74])
    labels = np.repeat(np.arange(len(CLASSES), dtype=np.int64), n_per_class)
    rng.shuffle(labels)
    images = np.empty((len(labels), SIZE, SIZE), dtype=np.uint8)
    for i, label in enumerate(labels):
        seen = acquisition(rng) if callable(acquisition) else acquisition
        images[i] = render(int(label), seen, rng)
    return images, labels


def write_federation(
    folder: Path | str, *, sites: int | Sequence[str], per_class: int, test_per_class: int, seed: int
) -> tuple[str, ...]:
    """Write a federation of synthetic scans as ``folder/<site>/{train,test}/<class>/NNNN.png``.

    Args:
        folder: created where missing; must not hold such a site already.
        sites: how many of :data:`SITES`, in order, or which.
        per_class, test_per_class: scans a class at each site, ≥ 1.
        seed: ≥ 0; train, test and sites draw from streams of their own.

    Returns:
        the site names.

    Raises:
        DataError: FS-1140 a count below 1, FS-1141 no such site, FS-1142 a site folder is there already.
    """
    from PIL import Image

    names = tuple(SITES)[:sites] if isinstance(sites, int) else tuple(sites)
    if not names or any(name not in SITES for name in names) or (isinstance(sites, int) and sites > len(SITES)):
        raise DataError(
            "FS-1141",
            f"phantom sites {sites!r}",
            expected=f"1 to {len(SITES)}, or names out of {', '.join(SITES)}",
            cure="ask for fewer sites, or for these names",
        )
    root = Path(folder)
    for name in names:
        if (root / name).exists():
            raise DataError(
                "FS-1142",
                f"{root / name} is there already",
                expected="a folder without that site, so that no scans of two seeds mix",
                cure="choose an empty folder or remove the old one",
            )
    for name in names:
        index = list(SITES).index(name)
        for part, count in (("train", per_class), ("test", test_per_class)):
            stream = int(np.random.SeedSequence([seed, index, part == "test"]).generate_state(1)[0])
            images, labels = generate(count, seed=stream, acquisition=SITES[name])
            for label, class_name in enumerate(CLASSES):
                target = root / name / part / class_name
                target.mkdir(parents=True)
                for number, image in enumerate(images[labels == label]):
                    Image.fromarray(image).save(target / f"{number:04d}.png")
    return names
