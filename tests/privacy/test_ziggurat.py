"""The ziggurat gives the standard normal distribution, in every layer, wedge and tail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedsecure.privacy import ziggurat
from fedsecure.privacy.noise import PrivacyRng

# A sound generator raises such an alarm once in a million runs.
ALARM = 1e-6
MANY = 1 << 22


def test_the_layers_have_one_area_and_end_at_the_top() -> None:
    edges = ziggurat.EDGES
    assert edges.shape == (1025,)
    assert (np.diff(edges) < 0).all()
    heights = np.exp(-np.square(edges) / 2)
    area = edges[1] * heights[1] + math.sqrt(math.pi / 2) * math.erfc(edges[1] / math.sqrt(2))
    assert edges[0] * heights[1] == pytest.approx(area, rel=1e-12)
    areas = edges[1:-1] * np.diff(heights[1:])
    assert np.allclose(areas, area, rtol=1e-11, atol=0)
    assert math.sqrt(math.pi / 2) / (1024 * area) == pytest.approx(0.9981, abs=5e-5), "so much of them is below it"


def alarms(rng: PrivacyRng, std: float = 1.0) -> dict[str, float]:
    """p-values of counts between the layers' edges on both sides, and of the tail's size and shape."""
    values, beyond = rng.gaussian(MANY, std) / std, ziggurat._beyond(1 << 18, rng._fill)
    edges = ziggurat.EDGES[1:]
    cuts = np.concatenate([-edges, edges[-2::-1]])
    counts = np.histogram(values, np.concatenate([[-np.inf], cuts, [np.inf]]))[0]
    expected = len(values) * np.diff(np.concatenate([[0.0], stats.norm.cdf(cuts), [1.0]]))
    share = 2 * stats.norm.sf(ziggurat.TAIL)
    return {
        "layers": float(stats.chisquare(counts, expected).pvalue),
        "size of the tail": float(stats.binomtest(int((np.abs(values) > ziggurat.TAIL).sum()), MANY, share).pvalue),
        "shape of the tail": float(stats.kstest(2 * stats.norm.sf(beyond) / share, "uniform").pvalue),
        "sides": float(stats.binomtest(int((values > 0).sum()), len(values), 0.5).pvalue),
        "all": float(stats.kstest(values[: 1 << 19], "norm").pvalue),
    }


@pytest.mark.parametrize("std", [1.0, 1.5 * 2**24])
def test_every_layer_is_as_full_as_the_curve_says(std: float) -> None:
    found = alarms(PrivacyRng(), std)
    assert min(found.values()) > ALARM, found


@pytest.mark.parametrize("broken", ["tail", "layers"])
def test_a_broken_ziggurat_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "tail":  # an exponential tail
        monkeypatch.setattr(
            ziggurat, "_beyond", lambda n, fill: ziggurat.TAIL - np.log(ziggurat.uniform(n, fill)) / ziggurat.TAIL
        )
    else:  # nine bits choose the layer
        monkeypatch.setattr(ziggurat, "LAYERS", 512)
    assert min(alarms(PrivacyRng()).values()) < ALARM


def wedges() -> float:
    """p-value of which points of a layer's wedge stay, by their place in it: as many as the curve is high there."""
    rng, parts = PrivacyRng(), 8
    layers = 1 + (rng.uniform_words(MANY) % np.uint64(1023)).astype(np.int64)
    inner, outer = ziggurat.EDGES[layers + 1], ziggurat.EDGES[layers]
    place = rng.uniform(MANY)
    points = inner + place * (outer - inner)
    after = points.copy()
    width = ziggurat._Layers(ziggurat.EDGES[:-1] * 2.0**-53, ziggurat.EDGES[1:])
    ziggurat._decide(after, width, np.arange(MANY), layers, rng._fill, 1.0)
    heights = np.exp(-np.square(ziggurat.EDGES) / 2)
    low, high = heights[layers], heights[layers + 1]
    chance = (np.exp(-np.square(points) / 2) - low) / (high - low)
    part = np.minimum((place * parts).astype(np.int64), parts - 1)
    stay = np.bincount(part, after == points, parts)
    expected, variance = np.bincount(part, chance, parts), np.bincount(part, chance * (1 - chance), parts)
    return float(stats.chi2.sf(np.sum(np.square(stay - expected) / variance), parts))


def test_a_point_of_a_wedge_stays_where_it_is_under_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wedges() > ALARM
    # Even heights that are off by a hundred-thousandth are noticed.
    monkeypatch.setattr(ziggurat, "_HEIGHTS", ziggurat._HEIGHTS * 1.00001)
    assert wedges() < ALARM


@pytest.mark.parametrize("n", [0, 1, 2, (1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_any_number_of_values(n: int) -> None:
    values = PrivacyRng().gaussian(n)
    assert values.shape == (n,)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == n


def test_values_next_to_each_other_are_independent() -> None:
    values = PrivacyRng().gaussian(1 << 20)
    for apart in (1, 2, 1 << 16):
        correlation = np.corrcoef(values[:-apart], values[apart:])[0, 1]
        assert abs(correlation) < 5.5 / math.sqrt(len(values) - apart)
        squares = np.corrcoef(values[:-apart] ** 2, values[apart:] ** 2)[0, 1]
        assert abs(squares) < 5.5 / math.sqrt(len(values) - apart)
