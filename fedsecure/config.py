"""Configuration files as frozen pydantic models: ``federation.toml`` for the aggregator, ``site.toml`` for a site.

Unknown keys, wrong types and impossible values are refused with the file and the key. Paths are relative to the file.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedsecure.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _printable(text: str) -> str:
    # Names travel to other people's terminals and reports.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
SiteId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PrivacyConfig(_Section):
    """What a run may learn about one privacy unit (privacy.md §7).

    Attributes:
        target_epsilon: ε of the whole run at ``delta``, for the units of each site.
        delta: δ; must be below 1 over the number of units of every site.
        unit: ``"patient"`` needs a patient column; ``"record"`` protects single images.
        max_records_per_unit: public cap m; further images of a patient are left out.
        max_sites_per_patient: at how many training sites one unit may be, at most; 1 says that no two sites share any.
            The report's network-wide ε is for a unit at so many sites.
        max_grad_norm: clip norm C of a unit's gradient.
        noise: ``"distributed"``: each site adds a share and the sum carries the whole noise; ``"local"``: each
            site's own update is private even against the aggregator.
        ring_bits: 32, or 16 with distributed noise: half the bytes up, for a rotation and a coarser grid.
        sampling_rate: 1 is full batch; less is Poisson sampling of units.
        noise_multiplier: ``"auto"`` calibrates to ``target_epsilon``; a number is taken as it is.
        spare_attempts: failed attempts the calibration leaves room for; each costs a round's charge.
        minimum_signal_to_noise: a plan below this predicted ratio is refused.
        no_privacy: why the run goes without privacy, for comparisons on public data; empty: it is private. The noise
            is then a token one, the ledger is charged what that is worth, and each site's policy has to allow it.
    """

    target_epsilon: Positive = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    unit: Literal["patient", "record"] = "patient"
    max_records_per_unit: Annotated[int, Field(ge=1, le=256)] = 4
    max_sites_per_patient: Annotated[int, Field(ge=1, le=256)] = 1
    max_grad_norm: Positive = 0.1
    noise: Literal["distributed", "local"] = "distributed"
    ring_bits: Literal[32, 16] = 32
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    noise_multiplier: Literal["auto"] | Positive = "auto"
    spare_attempts: Annotated[int, Field(ge=0, le=1000)] = 1
    minimum_signal_to_noise: Annotated[float, Field(ge=0)] = 0.02
    no_privacy: Annotated[str, Field(max_length=200), AfterValidator(_printable)] = ""

    @field_validator("ring_bits")
    @classmethod
    def _check_ring(cls, bits: int, others: ValidationInfo) -> int:
        if bits == 16 and others.data.get("noise") != "distributed":
            raise ValueError('16 needs noise = "distributed": local changes are far finer than its grid')
        return bits

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.no_privacy and (self.sampling_rate != 1 or self.noise_multiplier != "auto"):
            raise ValueError('no_privacy goes with sampling_rate = 1 and noise_multiplier = "auto"')
        return self


class EncoderChoice(_Section):
    """The frozen CLIP that turns images and prompts into features; ``features`` takes precomputed ones.

    Attributes:
        model: an open_clip model name, or ``"fedsecure-tiny"`` (bundled), or ``"features"``.
        pretrained: an open_clip tag, ``"bundled"``, or ``"file"`` where every site names its own copy
            (``encoder_file``).
        prompt: template with one ``{}`` for the class name.
    """

    model: Label = "fedsecure-tiny"
    pretrained: Annotated[str, Field(max_length=4096), AfterValidator(_printable)] = "bundled"
    prompt: Annotated[Label, Field(pattern=r"\{\}")] = "a picture of a {}"


class EncoderConfig(EncoderChoice):
    """The encoder, pinned.

    Attributes:
        dimension: feature width d; public, so the aggregator can size the adapter without loading the encoder.
        fingerprint: SHA-256 in hex of weights, architecture and preprocessing; every site must hold the same.
    """

    dimension: Annotated[int, Field(ge=2, le=65_536)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Clip2flConfig(_Section):
    """What the method ``clip2fl`` goes by, and no other; the defaults are those of a private run.

    Attributes:
        distillation: β, how much zero-shot CLIP teaches in local training; 0 is plain cross-entropy.
        distillation_temperature: T of both sides' softmax.
        releases: in how many of the last rounds the sites give class gradients; 0 leaves the side branch out.
        class_gradients: ``"diagonal"``: each class's own row of the classifier's gradient; ``"full"``: all rows.
        budget_share: of the run's budget, for the class gradients.
        clip_norm: what a unit's class gradients are clipped to, for features of unit length.
        project: whether features are projected on the span of the class texts, which is less noise and less signal.
        gate: a class whose noisy gradient's square is less than so many times the noise's is led by its text alone.
        features: m, federated features a class.
        start: where they begin: ``"text"``: at their class's text, as long as √d, in noise N(0, I); ``"noise"``: in
            that noise alone, as published.
        matching_steps, matching_rate: of the gradient matching; the published 0.1 goes with hundreds of releases.
        cosine: one cosine for each row of a class's gradient, or one for its matrix.
        contrast: η of the prototype contrast; 0 is CReFF.
        contrast_temperature: its τ.
        negatives: the contrast's: other classes' texts, or other federated features.
        reduction: whether the contrast is summed or averaged over the federated features.
        head_epochs, head_batch, head_rate: of the classifier's re-training.
        warm_start: whether the classifier goes on from the last one instead of from a fresh one.
    """

    distillation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    distillation_temperature: Positive = 3.0
    releases: Annotated[int, Field(ge=0, le=100_000)] = 1
    class_gradients: Literal["diagonal", "full"] = "diagonal"
    budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clip_norm: Positive = 1.0
    project: bool = False
    gate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    features: Annotated[int, Field(ge=1, le=10_000)] = 100
    start: Literal["text", "noise"] = "text"
    matching_steps: Annotated[int, Field(ge=0, le=100_000)] = 100
    matching_rate: Positive = 100.0
    cosine: Literal["rows", "matrix"] = "rows"
    contrast: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    contrast_temperature: Positive = 0.1
    negatives: Literal["text", "features"] = "text"
    reduction: Literal["sum", "mean"] = "sum"
    head_epochs: Annotated[int, Field(ge=1, le=100_000)] = 300
    head_batch: Annotated[int, Field(ge=1, le=100_000)] = 32
    head_rate: Positive = 0.01
    warm_start: bool = False


class AlignmentConfig(_Section):
    """FACMIC's alignment with a public target, for the method ``facmic``; off by default.

    Attributes:
        weight: λ of the local discrepancy to the target, beside cross-entropy.
        negatives: weight of the text-to-image term, with the target's images in place of a batch's.
        target: SHA-256 in hex of the target file, of which everybody who aligns names a copy (``target_file``).
        prototypes: whether the first round releases class prototypes of the sources, in place of a gradient and at
            its price; without, the target only attracts.
        at: who aligns: ``"sites"`` in every step, or the ``"aggregator"`` after the last, on the prototypes alone.
        transductive: accept a target that holds images of an evaluation set.
    """

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    negatives: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    target: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    prototypes: bool = False
    at: Literal["sites", "aggregator"] = "sites"
    transductive: bool = False

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        if bool(self.target) != (self.weight > 0 or self.negatives > 0):
            raise ValueError("a target goes with a weight or negatives above 0, and these with a target")
        if self.prototypes and self.weight == 0:
            raise ValueError("prototypes are released for nothing without a weight above 0")
        if self.at == "aggregator" and not self.prototypes:
            raise ValueError('at = "aggregator" needs prototypes: the aggregator has no records')
        return self


class MethodConfig(_Section):
    """Which federated method trains, and its public settings.

    Attributes:
        name: an installed method (entry point group ``fedsecure.methods``).
        rounds: communication rounds.
        local_steps: gradient steps a site takes per round (``noise="local"``); one with distributed noise.
        learning_rate: ``"auto"`` follows the predicted signal-to-noise.
        temperature: τ of the logits; ``"auto"`` is the adapter's own default.
        average: whether the result is the mean of the adapters of the second half of the rounds.
        views: how many views of each training image a gradient is the mean of; 1 is the image alone.
        alignment: of the method ``facmic``, with a public target.
        clip2fl: what the method of that name goes by.
    """

    name: Label = "linear"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    learning_rate: Literal["auto"] | Positive = "auto"
    temperature: Literal["auto"] | Positive = "auto"
    average: bool = False
    views: Annotated[int, Field(ge=1, le=32)] = 1
    alignment: AlignmentConfig = AlignmentConfig()
    clip2fl: Clip2flConfig = Clip2flConfig()

    @model_validator(mode="after")
    def _check_alignment(self) -> Self:
        if self.alignment.prototypes and self.rounds < 2:
            raise ValueError("alignment.prototypes takes the first round, so rounds must be at least 2")
        return self


class EvaluationConfig(_Section):
    """Counts of hits, before and after training; a release like any other unless the sets are public."""

    when: tuple[Literal["before", "after"], ...] = ("before", "after")
    target_epsilon: Positive = 2.0


class SiteEntry(_Section):
    """What is public about a site.

    Attributes:
        role: ``"train"`` sites train and may evaluate; ``"evaluate"`` sites only evaluate.
        max_units: declared maximum number of training units; public. Weights and the normaliser use it.
        evaluation_units: declared maximum number of evaluation units; 0 for none.
        evaluation_public: the evaluation set is declared public and may be counted exactly.
        sampling_rate: of this training site, in place of ``privacy.sampling_rate``.
    """

    role: Literal["train", "evaluate"] = "train"
    max_units: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    evaluation_units: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    evaluation_public: bool = False
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if self.role != "train" and self.sampling_rate is not None:
            raise ValueError("sampling_rate is of training sites; this one only evaluates")
        return self


# Sites times prepared rounds: a set-up's messages take up to 128 bytes for each, and a call carries 8 MiB.
MAX_PREPARED = 60_000


class RoundsConfig(_Section):
    """Cohort, collusion and waiting.

    Attributes:
        colluders: c; ``"auto"`` is max(1, ⌊(n−1)/3⌋) (secagg.md §3.5).
        min_survivors: u_min; ``"auto"`` is the protocol's minimum max(t, c+2).
        phase_seconds: longest wait for the sites' messages in one phase.
        training_seconds: longest wait for the masked vectors (the sites train meanwhile).
        silence_seconds: a site that has not been heard of for so long counts as gone for this phase.
        start_seconds: longest wait for enough sites to join.
        max_attempts: attempts of one round before the run ends.
        prepared_rounds: training rounds whose keys are set up at once, so that each then takes three messages instead
            of five; 0 sets up every round by itself. A site that restarts loses its keys, and new ones are set up.
            Times the number of training sites at most 60 000.
        transcripts: record every attempt, and every set-up of keys, for ``fedsecure transcript verify``.
    """

    colluders: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    min_survivors: Literal["auto"] | Annotated[int, Field(ge=3)] = "auto"
    phase_seconds: Positive = 60.0
    training_seconds: Positive = 3600.0
    silence_seconds: Positive = 30.0
    start_seconds: Positive = 600.0
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    prepared_rounds: Annotated[int, Field(ge=0, le=1024)] = 16
    transcripts: bool = False


class RunSettings(_Section):
    """All that is public about a run and shapes its computation; every site sees, checks and hashes it.

    Attributes:
        name: of the federation, shown in reports.
        classes: class names in index order.
        sites: every site of the run, by id.
    """

    name: Label = "federation"
    classes: Annotated[tuple[Label, ...], Field(min_length=2, max_length=10_000)]
    encoder: EncoderConfig
    method: MethodConfig = MethodConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    rounds: RoundsConfig = RoundsConfig()
    sites: Annotated[dict[SiteId, SiteEntry], Field(min_length=3, max_length=128)]

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be distinct")
        trainers = self.declared_units()
        if len(trainers) < 3:
            raise ValueError(f"{len(trainers)} training sites; a secure sum needs at least 3")
        if self.method.alignment.prototypes and self.privacy.ring_bits != 32:
            raise ValueError("alignment.prototypes needs ring_bits = 32: a site's class sums are rounded as one")
        prepared = self.rounds.prepared_rounds
        if prepared * len(trainers) > MAX_PREPARED:
            most = MAX_PREPARED // len(trainers)
            raise ValueError(f"prepared_rounds = {prepared} for {len(trainers)} training sites, at most {most}")
        if any(units < 1 for units in trainers.values()):
            raise ValueError("every training site declares max_units >= 1")
        if self.privacy.noise == "distributed" and self.method.local_steps != 1:
            raise ValueError('local_steps must be 1 with noise = "distributed": every step is a secure sum')
        if self.privacy.no_privacy and set(self.sampling_rates().values()) != {1.0}:
            raise ValueError("no_privacy goes with sampling_rate = 1 at every site")
        return self

    def declared_units(self) -> dict[str, int]:
        """Declared maximum number of training units of each training site."""
        return {site: entry.max_units for site, entry in sorted(self.sites.items()) if entry.role == "train"}

    def sampling_rates(self) -> dict[str, float]:
        """q of each training site: its own where its entry names one, else the run's."""
        rates = {site: self.sites[site].sampling_rate for site in self.declared_units()}
        return {site: self.privacy.sampling_rate if rate is None else rate for site, rate in rates.items()}

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> bytes:
        """``config_hash`` of the round descriptor: SHA-256 over :meth:`canonical`."""
        return hashlib.sha256(b"fedsecure/settings/v1\0" + self.canonical().encode()).digest()

    @staticmethod
    def parse(text: str) -> RunSettings:
        """Inverse of :meth:`canonical`, for settings that came over the wire.

        Raises:
            ConfigError: FS-1008, not the settings of this release.
        """
        try:
            return RunSettings.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                "FS-1008",
                f"the aggregator's settings are refused ({_first(error)})",
                expected="settings of this release",
                cure="install the same fedsecure release on both sides",
            ) from error


# What of ``federation.toml`` is the aggregator's own and no part of the run.
AGGREGATOR_KEYS = {"listen", "state", "identity", "encoder_file", "target_file"}


class FederationConfig(RunSettings):
    """``federation.toml``: the run's public settings, and where this aggregator lives.

    Attributes:
        listen: ``host:port``; port 0 takes a free one and prints it.
        state: the aggregator's folder: models, round records, results.
        identity: folder with the aggregator's certificate, keys and the signed roster.
        encoder_file: the aggregator's copy of what the sites' ``encoder_file`` names, for methods that compute with the
            class texts between rounds.
        target_file: its copy of the target, where the run has the aggregator align.
    """

    listen: str = "127.0.0.1:0"
    state: Path
    identity: Path
    encoder_file: Path | None = None
    target_file: Path | None = None

    def settings(self) -> RunSettings:
        """The public part."""
        return RunSettings.model_validate(self.model_dump(exclude=AGGREGATOR_KEYS))


class DatasetConfig(_Section):
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


class PolicyConfig(_Section):
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
        "fedavg",
        "fedprox",
        "moon",
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


class SiteConfig(_Section):
    """``site.toml``.

    Attributes:
        aggregator: ``host:port`` the site dials.
        identity: folder with this site's keys, certificate and the signed roster.
        state: this site's folder: counters, method state, feature cache, reports.
        ledger: the budget ledger, an SQLite file; keep it with the data, not with the run.
        encoder_file: this site's copy of the encoder's weights, or of the ``.npz`` with the text embeddings, where the
            run does not name an open_clip tag.
        target_file: this site's copy of the target that the run aligns with, if it does.
        engine: where clipped sums come from; ``"auto"`` prefers the closed form where its equality is tested.
        device: ``"auto"`` takes the GPU where there is one.
    """

    site: SiteId
    aggregator: str
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


_Model = TypeVar("_Model", FederationConfig, SiteConfig, RunSettings)
_PATHS = ("state", "identity", "ledger", "encoder_file", "target_file")


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries.

    Raises:
        ConfigError: FS-1001 unreadable, FS-1002 not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "FS-1001",
            f"{file} cannot be read ({error.strerror})",
            expected="a readable TOML file",
            cure="check the path and its permissions",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "FS-1002", f"{file} is not TOML ({error})", expected="TOML 1.0 in UTF-8", cure="mend the named line"
        ) from error


def parse_settings(raw: dict[str, Any], file: Path) -> RunSettings:
    """Public settings from a file's content; raises ConfigError FS-1003."""
    return _validated(raw, RunSettings, file)


def load(path: Path | str, kind: type[_Model]) -> _Model:
    """Read a TOML file into ``FederationConfig`` or ``SiteConfig``.

    Raises:
        ConfigError: FS-1001 unreadable, FS-1002 not TOML, FS-1003 a key or value is refused.
    """
    file = Path(path)
    raw = read_toml(file)
    base = file.resolve().parent
    for key in _PATHS:
        if isinstance(raw.get(key), str):
            raw[key] = str(base / raw[key])
    for key in ("train", "evaluation"):
        section = raw.get(key)
        if isinstance(section, dict) and isinstance(section.get("path"), str):
            section["path"] = str(base / section["path"])
    return _validated(raw, kind, file)


def _validated(raw: dict[str, Any], kind: type[_Model], file: Path) -> _Model:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            "FS-1003",
            f"{file}: {_first(error)}",
            expected="known keys with values in their ranges",
            cure="see docs/configuration.md for every key",
        ) from error


def _first(error: ValidationError) -> str:
    """The first problem of a validation, in one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the whole"
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{key} = {str(first.get('input'))[:80]!r}: {first['msg']}{more}"
