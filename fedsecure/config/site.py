"""``site.toml``: where a site's records, keys and ledger are, and what it lets itself be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedsecure.config.section import Label, Positive, Section, SiteId


class DatasetConfig(Section):
    """Where a site's records are.

    Attributes:
        name: the ledger charges under this name; keep it for the life of the data.
        path: a class-folder tree, a manifest ``.csv``, a feature file ``.npz``, or a folder of DICOM files.
        format: ``"auto"`` decides by what is there.
        split: ``"train"`` or ``"test"`` arrays of a feature file; a manifest's ``split`` column.
        rows: optional ``[start, step]`` stride over a feature file, to share one file between trial sites.
        holdout: fraction in [0, 1) kept for evaluation, chosen by a hash of each unit's id.
        part: which side of ``holdout`` this is.
        public: declared public: may be counted exactly.
    """

    name: Label
    path: Path
    format: Literal["auto", "folder", "manifest", "features", "dicom"] = "auto"
    split: str | None = None
    rows: tuple[int, int] | None = None
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    part: Literal["all", "train", "evaluation"] = "all"
    public: bool = False


class PolicyConfig(Section):
    """A site's own limits; the aggregator proposes, these decide.

    Attributes:
        max_epsilon: refuse whatever would take the training units past it, over all runs on the data set.
        max_evaluation_epsilon: the same for evaluation units.
        delta: δ at which the limits hold.
        min_cohort, min_colluders, min_threshold, min_survivors: floors of n, c, t and u_min (secagg.md §3.5), beside
            those of the protocol itself.
        max_wrap_log2: most log2 of the chance that a round's sum wraps around the ring.
        min_noise_multiplier: refuse a query whose noise multiplier per step is lower.
        methods: allowed methods.
        noise: allowed places of noise.
        unit: the least privacy unit this site accepts: ``"patient"`` refuses runs by record.
        no_privacy: accept runs that say ``no_privacy``; only for data that may be published. ``max_epsilon`` and
            ``min_noise_multiplier`` still hold.
    """

    max_epsilon: Positive = 8.0
    max_evaluation_epsilon: Positive = 4.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    min_cohort: Annotated[int, Field(ge=3)] = 3
    min_colluders: Annotated[int, Field(ge=1)] = 1
    min_threshold: Annotated[int, Field(ge=2, le=128)] = 2
    min_survivors: Annotated[int, Field(ge=3, le=128)] = 3
    max_wrap_log2: Annotated[float, Field(le=-40, allow_inf_nan=False)] = -40.0
    min_noise_multiplier: Annotated[float, Field(ge=0)] = 0.1
    methods: tuple[str, ...] = (
        "linear",
        "facmic",
        "fedclip",
        "bottleneck",
        "fedfocal",
        "probe",
        "fedavg",
        "fedprox",
        "moon",
        "fedavg_block",
        "fedprox_block",
        "moon_block",
        "promptfl",
        "lora",
        "prototypes",
        "ridge",
        "clip2fl",
        "evaluate",
    )
    noise: tuple[Literal["distributed", "local"], ...] = ("distributed", "local")
    unit: Literal["patient", "record"] = "patient"
    no_privacy: bool = False


class SiteConfig(Section):
    """``site.toml``.

    Attributes:
        aggregator: ``host:port`` the site dials.
        federation: which run is meant, where the aggregator serves several: the ``name`` in its settings.
        identity: folder with this site's keys, certificate and the signed roster.
        state: this site's folder: counters, method state, feature cache, reports.
        ledger: the budget ledger, an SQLite file; keep it with the data, not with the run.
        encoder_file: this site's copy of the encoder's weights, or of the ``.npz`` with the text embeddings, where the
            run does not name an open_clip tag.
        target_file: this site's copy of the target that the run aligns with, if it does.
        engine: where clipped sums come from; ``"auto"`` prefers the closed form where its equality is tested.
        device: ``"auto"`` takes the GPU where there is one.
        wait_seconds: longest time in which nothing is asked and the run does not move.
    """

    site: SiteId
    aggregator: str
    federation: Annotated[str, Field(max_length=200)] = ""
    identity: Path
    state: Path
    ledger: Path
    encoder_file: Path | None = None
    target_file: Path | None = None
    train: DatasetConfig | None = None
    evaluation: DatasetConfig | None = None
    policy: PolicyConfig = PolicyConfig()
    engine: Literal["auto", "opacus", "closed-form"] = "auto"
    device: str = "auto"
    connect_seconds: Positive = 60.0
    wait_seconds: Positive = 7200.0
