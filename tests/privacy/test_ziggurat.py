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
    assert edges.shape == (257,)
    assert (np.diff(edges) < 0).all()
    # Published to this many digits (Doornik 2005, table 1, 256 layers; NumPy's own constant).
    assert pytest.approx(3.6541528853610088, abs=1e-14) == ziggurat.TAIL
    heights = np.exp(-np.square(edges) / 2)
    area = edges[1] * heights[1] + math.sqrt(math.pi / 2) * math.erfc(edges[1] / math.sqrt(2))
    assert edges[0] * heights[1] == pytest.approx(area, rel=1e-12)
    areas = edges[1:-1] * np.diff(heights[1:])
    assert np.allclose(areas, area, rtol=1e-12, atol=0)
    assert math.sqrt(math.pi / 2) / (256 * area) == pytest.approx(0.9933, abs=5e-5), "so much of them is below it"


def alarms(rng: PrivacyRng) -> dict[str, float]:
    """p-values of counts between the layers' edges on both sides, and of the tail's size and shape."""
    values, beyond = rng.gaussian(MANY), ziggurat._beyond(1 << 18, rng._fill)
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


def test_every_layer_is_as_full_as_the_curve_says() -> None:
    found = alarms(PrivacyRng())
    assert min(found.values()) > ALARM, found


@pytest.mark.parametrize("broken", ["wedges", "tail", "layers"])
def test_a_broken_ziggurat_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "wedges":  # whoever is in a wedge stays
        monkeypatch.setattr(ziggurat, "_HEIGHTS", np.zeros(257))
    elif broken == "tail":  # an exponential tail
        monkeypatch.setattr(
            ziggurat, "_beyond", lambda n, fill: ziggurat.TAIL - np.log(ziggurat.uniform(n, fill)) / ziggurat.TAIL
        )
    else:  # seven bits choose the layer
        monkeypatch.setattr(ziggurat, "LAYERS", 128)
    assert min(alarms(PrivacyRng()).values()) < ALARM


@pytest.mark.parametrize("n", [0, 1, 2, (1 << 15) - 1, 1 << 15, (1 << 15) + 1])
def test_any_number_of_values(n: int) -> None:
    values = PrivacyRng().gaussian(n)
    assert values.shape == (n,)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == n


def test_values_next_to_each_other_are_independent() -> None:
    values = PrivacyRng().gaussian(1 << 20)
    for apart in (1, 2, 1 << 15):
        correlation = np.corrcoef(values[:-apart], values[apart:])[0, 1]
        assert abs(correlation) < 5.5 / math.sqrt(len(values) - apart)
        squares = np.corrcoef(values[:-apart] ** 2, values[apart:] ** 2)[0, 1]
        assert abs(squares) < 5.5 / math.sqrt(len(values) - apart)
