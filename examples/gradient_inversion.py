"""How much of a hospital's data can be read off an update, and what stops it (docs/audit.md).

The first linear layer of an adapter leaks its input exactly: for one record ∂L/∂W_r = g_r·x and ∂L/∂b_r = g_r, so
x = ∂L/∂W_r ÷ ∂L/∂b_r. With more records the honest adapter mixes them; a malicious "imprint" adapter (Fowl et al. 2022)
sorts them into bins by a threshold each, and differences of neighbouring rows give single records again. The attacker
here is the aggregator: it chose the adapter and sees what leaves.

    python examples/gradient_inversion.py                          # generated features
    python examples/gradient_inversion.py --features FILE.npz      # your own (docs/datasets.md)
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedsecure.privacy import accounting
from fedsecure.privacy.grid import distributed_segment, exact_segment, from_grid, round_to_grid
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.secagg.ring import lift, to_ring

Array = npt.NDArray[np.float64]
Kind = Literal["honest", "imprint"]

BATCHES = (1, 4, 16, 64, 256)
SITES, HONEST, CLIP, HIDDEN = 3, 2, 1.0, 512
RECOGNISED = 0.95
PROTECTIONS = ("none", "clipping only", "DP noise", "secure sum of 3", "secure sum of 3 + DP")


@dataclass(frozen=True)
class Adapter:
    """x + W2·relu(W1 x + b1) + b2, then cosines with the texts: the residual adapter of CLIP-Adapter's kind."""

    w1: Array
    b1: Array
    w2: Array
    text: Array

    def gradients(self, x: Array, labels: npt.NDArray[np.int64], *, clip: bool) -> Array:
        """Sum over records of their gradients by (W1, b1, W2, b2), flat; each clipped to C if asked."""
        hidden = x @ self.w1.T + self.b1
        active = np.maximum(hidden, 0)
        logits = 20 * (x + active @ self.w2.T) @ self.text.T
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(x)), labels] -= 1
        to_output = 20 * error @ self.text
        to_hidden = (to_output @ self.w2) * (hidden > 0)
        if clip:
            squares = (to_hidden**2).sum(1) * ((x**2).sum(1) + 1) + (to_output**2).sum(1) * ((active**2).sum(1) + 1)
            scale = np.minimum(1, CLIP / np.maximum(np.sqrt(squares), 1e-12))[:, None]
            to_hidden, to_output = to_hidden * scale, to_output * scale
        parts = (to_hidden.T @ x, to_hidden.sum(0), to_output.T @ active, to_output.sum(0))
        return np.concatenate([part.ravel() for part in parts])


def make_adapter(kind: Kind, text: Array, public: Array, rng: np.random.Generator) -> Adapter:
    """Random layers; or all rows alike, with thresholds at the quantiles of public features along them."""
    d = text.shape[1]
    w2 = rng.normal(size=(d, HIDDEN)) / math.sqrt(HIDDEN)
    if kind == "honest":
        return Adapter(rng.normal(size=(HIDDEN, d)) / math.sqrt(d), 0.02 * rng.normal(size=HIDDEN), w2, text)
    direction = rng.normal(size=d) / math.sqrt(d)
    along = public @ direction
    bins = np.quantile(along, (np.arange(HIDDEN) + 0.5) / HIDDEN)
    # Every record sends the same gradient into each row it activates, so rows differ by single bins.
    same = np.repeat(rng.normal(size=(d, 1)) / math.sqrt(HIDDEN), HIDDEN, axis=1)
    return Adapter(np.tile(direction, (HIDDEN, 1)), -bins, same, text)


def released(sums: list[Array], protection: str, noise_multiplier: float, rng: PrivacyRng) -> Array:
    """What the aggregator sees of the sites' sums; the first site is the victim."""
    length = len(sums[0])
    if protection in ("none", "clipping only"):
        return sums[0]
    if protection == "DP noise":
        segment = distributed_segment(
            "g", length, clip_norm=CLIP, noise_multiplier=noise_multiplier, honest=1, sites=SITES, units=max(BATCHES)
        )
        shares = [sums[0]]
    elif protection == "secure sum of 3":
        reach = max(float(np.abs(values).max()) for values in sums)
        segment = exact_segment("g", length, grid=reach / 2**28, sites=SITES)
        shares = sums
    else:
        segment = distributed_segment(
            "g",
            length,
            clip_norm=CLIP,
            noise_multiplier=noise_multiplier,
            honest=HONEST,
            sites=SITES,
            units=max(BATCHES),
        )
        shares = sums
    # The masks of secure aggregation cancel in this sum, which is all that is left to see.
    words = np.zeros(length, np.uint32)
    for values in shares:
        noise = rng.discrete_gaussian(length, segment.noise_variance)
        words = words + to_ring(round_to_grid(values, segment) + noise)
    return from_grid(lift(words), segment)


def best_cosines(update: Array, victims: Array) -> Array:
    """For each record of a victim, the largest cosine with anything the attack reads off the update."""
    d = victims.shape[1]
    weights, biases = update[: HIDDEN * d].reshape(HIDDEN, d), update[HIDDEN * d : HIDDEN * d + HIDDEN]
    candidates = []
    for top, bottom in ((weights, biases), (weights[:-1] - weights[1:], biases[:-1] - biases[1:])):
        used = np.abs(bottom) > 1e-9 * max(float(np.abs(biases).max()), 1e-300)
        candidates.append(top[used] / bottom[used, None])
    found = np.concatenate(candidates)
    found = found[np.isfinite(found).all(axis=1)]
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-300)
    unit = victims / np.linalg.norm(victims, axis=1, keepdims=True)
    return (unit @ found.T).max(axis=1) if len(found) else np.zeros(len(victims))


def load(features: Path | None, rng: np.random.Generator) -> tuple[Array, npt.NDArray[np.int64], Array, Array]:
    """Centred unit features, labels, centred unit texts, and other records that the attacker knows to be alike."""
    if features is None:
        classes, d, count = 10, 512, 4000
        truth = rng.normal(size=(classes, d)) / math.sqrt(d)
        labels = rng.integers(0, classes, count)
        x = 0.5 * truth[labels] + rng.normal(size=(count, d)) / math.sqrt(d)
        text = truth
    else:
        from fedsecure.config import DatasetConfig
        from fedsecure.data.loading import open_dataset, read_feature_header

        header = read_feature_header(features)
        data = open_dataset(DatasetConfig(name="demo", path=features, split="train"), classes=header.classes)
        x, labels, text = np.asarray(data.features(), np.float64), data.labels, header.text.astype(np.float64)
        text = text - text.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = x - x.mean(axis=0)
    order = rng.permutation(len(x))
    x, labels = x[order] / np.linalg.norm(x[order], axis=1, keepdims=True), labels[order]
    half = len(x) // 2
    return x[:half], labels[:half], text / np.linalg.norm(text, axis=1, keepdims=True), x[half:]


def run(features: Path | None, *, noise_multiplier: float, repeats: int) -> list[dict[str, float | int | str]]:
    """One row for each adapter, protection and batch size, averaged over ``repeats`` draws of records."""
    rng, noise = np.random.default_rng(0), PrivacyRng()
    x, labels, text, public = load(features, rng)
    rows: list[dict[str, float | int | str]] = []
    for kind in ("honest", "imprint"):
        adapter = make_adapter(kind, text, public, rng)  # type: ignore[arg-type]
        for protection in PROTECTIONS:
            sites = SITES if protection.startswith("secure") else 1
            for batch in BATCHES:
                if sites * batch > len(x):
                    continue
                best: list[Array] = []
                for _ in range(repeats if batch < 64 else 1):
                    chosen = rng.choice(len(x), size=(sites, batch), replace=False)
                    sums = [adapter.gradients(x[rows_], labels[rows_], clip=protection != "none") for rows_ in chosen]
                    update = released(sums, protection, noise_multiplier, noise)
                    best.append(best_cosines(update, x[chosen.ravel()]))
                cosines = np.concatenate(best)
                rows.append(
                    {
                        "adapter": kind,
                        "protection": protection,
                        "batch": batch,
                        "recovered": float((cosines > RECOGNISED).mean()),
                        "mean_best_cosine": float(cosines.mean()),
                    }
                )
    guesses = rng.normal(size=(HIDDEN, x.shape[1]))
    guesses /= np.linalg.norm(guesses, axis=1, keepdims=True)
    chance = float((x[:512] @ guesses.T).max(axis=1).mean())
    return [*rows, {"adapter": "–", "protection": "512 random guesses", "batch": 0, "recovered": 0.0,
                    "mean_best_cosine": chance}]  # fmt: skip


def show(rows: list[dict[str, float | int | str]], console: Console) -> None:
    for kind in ("honest", "imprint"):
        table = Table(title=f"{kind} adapter: records recovered (mean best cosine)", title_justify="left", box=None)
        table.add_column("what leaves", no_wrap=True)
        for batch in BATCHES:
            table.add_column(f"batch {batch}", justify="right", no_wrap=True)
        for protection in PROTECTIONS:
            cells = []
            for batch in BATCHES:
                found = [r for r in rows if (r["adapter"], r["protection"], r["batch"]) == (kind, protection, batch)]
                cells.append(f"{found[0]['recovered']:.0%} ({found[0]['mean_best_cosine']:.2f})" if found else "–")
            table.add_row(protection, *cells)
        console.print(table)
        console.print()
    console.print(f"Mean best cosine of 512 random guesses: {rows[-1]['mean_best_cosine']:.2f}")


def plot(rows: list[dict[str, float | int | str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "none": ("#b2182b", "o", "-"),
        "clipping only": ("#ef8a62", "s", "--"),
        "secure sum of 3": ("#998ec3", "^", "-"),
        "DP noise": ("#2166ac", "D", "-"),
        "secure sum of 3 + DP": ("#4d9221", "v", "--"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("honest", "imprint"), strict=True):
        for protection, (colour, marker, line) in styles.items():
            mine = [r for r in rows if r["adapter"] == kind and r["protection"] == protection]
            axis.plot(
                [r["batch"] for r in mine], [100 * float(r["recovered"]) for r in mine], color=colour, marker=marker,
                linestyle=line, label=protection, markersize=5, clip_on=False,
            )  # fmt: skip
        axis.set_xscale("log", base=4)
        axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axis.minorticks_off()
        axis.set_title(f"{kind} adapter", fontsize=11)
        axis.set_xlabel("records in a site's batch")
        axis.set_ylim(-3, 103)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("records recovered, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read records off an adapter's update, with and without protection.")
    parser.add_argument("--features", type=Path, help="feature file (.npz); generated features by default")
    parser.add_argument("--out", type=Path, default=Path("gradient-inversion"), help="folder for table and plot")
    parser.add_argument("--epsilon", type=float, default=8.0, help="budget of the whole run that the step is part of")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="draws of records for the small batches")
    options = parser.parse_args()
    console, began = Console(), time.monotonic()
    noise_multiplier = accounting.calibrate(options.epsilon, options.delta, steps=options.rounds)
    rows = run(options.features, noise_multiplier=noise_multiplier, repeats=options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows[:-1], options.out / "recovered.png")
    show(rows, console)
    console.print(
        f"DP: one of {options.rounds} steps of a run with ε = {options.epsilon:g}, δ = {options.delta:g} "
        f"(noise multiplier {noise_multiplier:.2f}). {time.monotonic() - began:.0f} s. "
        f"Wrote {options.out / 'table.csv'} and {options.out / 'recovered.png'}.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
