"""The public settings of a run, which every site sees, checks and hashes, and ``federation.toml`` around them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedsecure.config.method import MethodConfig
from fedsecure.config.section import Label, Positive, Section, SiteId, first_problem, printable
from fedsecure.errors import ConfigError


class PrivacyConfig(Section):
    """What a run may learn about one privacy unit (privacy.md §7).

    Attributes:
        target_epsilon: ε of the whole run at ``delta``, for the units of each site.
        delta: δ; must be below 1 over the number of units of every site. A run that names none takes
            :func:`default_delta` of its largest site.
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
    no_privacy: Annotated[str, Field(max_length=200), AfterValidator(printable)] = ""

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


def default_delta(units: int) -> float:
    """The largest power of ten that is at most 1e-5 and 1/(10·units)."""
    digits = len(str(10 * max(1, units) - 1))
    return min(1e-5, float(f"1e-{digits}"))


class EncoderChoice(Section):
    """The frozen CLIP that turns images and prompts into features; ``features`` takes precomputed ones.

    Attributes:
        model: an open_clip model name, or ``"fedsecure-tiny"`` (bundled), or ``"features"``.
        pretrained: an open_clip tag, ``"bundled"``, or ``"file"`` where every site names its own copy
            (``encoder_file``).
        prompt: template with one ``{}`` for the class name.
    """

    model: Label = "fedsecure-tiny"
    pretrained: Annotated[str, Field(max_length=4096), AfterValidator(printable)] = "bundled"
    prompt: Annotated[Label, Field(pattern=r"\{\}")] = "a picture of a {}"


class EncoderConfig(EncoderChoice):
    """The encoder, pinned.

    Attributes:
        dimension: feature width d; public, so the aggregator can size the adapter without loading the encoder.
        fingerprint: SHA-256 in hex of weights, architecture and preprocessing; every site must hold the same.
    """

    dimension: Annotated[int, Field(ge=2, le=65_536)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EvaluationConfig(Section):
    """Counts of hits, before and after training; a release like any other unless the sets are public."""

    when: tuple[Literal["before", "after"], ...] = ("before", "after")
    target_epsilon: Positive = 2.0


class SiteEntry(Section):
    """What is public about a site.

    Attributes:
        role: ``"train"`` sites train and may evaluate; ``"evaluate"`` sites only evaluate.
        max_units: declared maximum number of training units; public. Weights and the normaliser use it.
        evaluation_units: declared maximum number of evaluation units; 0 for none.
        evaluation_public: the evaluation set is declared public and may be counted exactly.
        sampling_rate: of this training site, in place of ``privacy.sampling_rate``.
    """

    role: Literal["train", "evaluate"] = "train"
    max_units: Annotated[int, Field(ge=0, le=500_000)] = 0
    evaluation_units: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    evaluation_public: bool = False
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if self.role != "train" and self.sampling_rate is not None:
            raise ValueError("sampling_rate is of training sites; this one only evaluates")
        return self


# Units squared times records of a unit: so far what rounding adds to a float64 sum stays below the slack in the
# sensitivity (fedsecure.privacy.grid).
MAX_ROUNDED = 1 << 42
# Sites times prepared rounds: a set-up's messages take up to 128 bytes for each, and a call carries 8 MiB.
MAX_PREPARED = 60_000


class RoundsConfig(Section):
    """Cohort, collusion and waiting.

    Attributes:
        cohort: K, how many training sites a training round asks, by public draw; ``"all"`` asks everybody. Evaluation
            asks everybody always.
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
        on_alarm: what follows a sum that no honest sites can have made: the run goes on, or stops.
        transcripts: record every attempt, and every set-up of keys, for ``fedsecure transcript verify``.
    """

    cohort: Literal["all"] | Annotated[int, Field(ge=3)] = "all"
    colluders: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    min_survivors: Literal["auto"] | Annotated[int, Field(ge=3)] = "auto"
    phase_seconds: Positive = 60.0
    training_seconds: Positive = 3600.0
    silence_seconds: Positive = 30.0
    start_seconds: Positive = 600.0
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    prepared_rounds: Annotated[int, Field(ge=0, le=1024)] = 16
    on_alarm: Literal["continue", "stop"] = "continue"
    transcripts: bool = False


class RunSettings(Section):
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
        prior = self.method.class_prior
        if prior != "released" and len(prior) not in (0, len(self.classes)):
            raise ValueError(f"class_prior has {len(prior)} shares, one for each of the {len(self.classes)} classes")
        trainers = self.declared_units()
        if len(trainers) < 3:
            raise ValueError(f"{len(trainers)} training sites; a secure sum needs at least 3")
        if self.method.alignment.prototypes and self.privacy.ring_bits != 32:
            raise ValueError("alignment.prototypes needs ring_bits = 32: a site's class sums are rounded as one")
        if prior == "released" and self.privacy.ring_bits != 32:
            raise ValueError('class_prior = "released" needs ring_bits = 32: a site\'s class counts are rounded as one')
        prepared = self.rounds.prepared_rounds
        if self.cohort_size() > len(trainers):
            raise ValueError(f"rounds.cohort = {self.rounds.cohort} of {len(trainers)} training sites")
        if self.draws and prepared:
            raise ValueError(
                f"prepared_rounds = {prepared} with a drawn cohort: keys are set up for one cohort, and each round has "
                "another; set prepared_rounds = 0"
            )
        if prepared * len(trainers) > MAX_PREPARED:
            most = MAX_PREPARED // len(trainers)
            raise ValueError(f"prepared_rounds = {prepared} for {len(trainers)} training sites, at most {most}")
        if any(units < 1 for units in trainers.values()):
            raise ValueError("every training site declares max_units >= 1")
        records = self.privacy.max_records_per_unit
        if max(trainers.values()) ** 2 * records > MAX_ROUNDED:
            most = math.isqrt(MAX_ROUNDED // records)
            raise ValueError(f"max_units above {most} with max_records_per_unit = {records}: sums would round too much")
        if self.privacy.noise == "distributed" and self.method.local_steps != 1:
            raise ValueError('local_steps must be 1 with noise = "distributed": every step is a secure sum')
        if self.privacy.no_privacy and set(self.sampling_rates().values()) != {1.0}:
            raise ValueError("no_privacy goes with sampling_rate = 1 at every site")
        private = {n: s.evaluation_units for n, s in self.sites.items() if not s.evaluation_public}
        if "delta" not in self.privacy.model_fields_set:
            delta = default_delta(max(*trainers.values(), *private.values()))
            # Its digest and every copy name the number, so that no other release takes another one.
            self.__dict__["privacy"] = self.privacy.model_copy(update={"delta": delta})
        for name, units in private.items():
            if self.privacy.delta * units >= 1:
                raise ValueError(
                    f"privacy.delta = {self.privacy.delta:g} with {units} private evaluation units at {name!r}: δ must "
                    f"be below 1/{units}, better below 1/{10 * units}"
                )
        return self

    def declared_units(self) -> dict[str, int]:
        """Declared maximum number of training units of each training site."""
        return {site: entry.max_units for site, entry in sorted(self.sites.items()) if entry.role == "train"}

    def sampling_rates(self) -> dict[str, float]:
        """q of each training site: its own where its entry names one, else the run's."""
        rates = {site: self.sites[site].sampling_rate for site in self.declared_units()}
        return {site: self.privacy.sampling_rate if rate is None else rate for site, rate in rates.items()}

    def cohort_size(self) -> int:
        """K: how many training sites a training round asks."""
        return len(self.declared_units()) if self.rounds.cohort == "all" else self.rounds.cohort

    @property
    def draws(self) -> bool:
        """Whether each training round asks some of the training sites, drawn in public."""
        return self.cohort_size() < len(self.declared_units())

    def rounds_asked(self) -> int:
        """⌈R·K/n⌉: in how many of the R training rounds a site is asked at most, whatever is drawn."""
        return -(-self.method.rounds * self.cohort_size() // len(self.declared_units()))

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
                f"the aggregator's settings are refused ({first_problem(error)})",
                expected="settings of this release",
                cure="install the same fedsecure release on both sides",
            ) from error


class TelemetryConfig(Section):
    """Whom the aggregator tells of a run, beside its logs and metrics; nobody by default.

    Attributes:
        otel: make OpenTelemetry traces; where they go, the ``OTEL_*`` environment variables say.
        tensorboard: folder for TensorBoard's event files, one folder a run in it.
        mlflow: MLflow tracking server or database, such as ``sqlite:////srv/mlflow.db``; empty for none.
    """

    otel: bool = False
    tensorboard: Path | None = None
    mlflow: Annotated[str, Field(max_length=4096), AfterValidator(printable)] = ""


# What of ``federation.toml`` is the aggregator's own and no part of the run.
AGGREGATOR_KEYS = {
    "listen",
    "enrolment",
    "metrics",
    "telemetry",
    "database",
    "state",
    "identity",
    "encoder_file",
    "target_file",
}


class FederationConfig(RunSettings):
    """``federation.toml``: the run's public settings, and where this aggregator lives.

    Attributes:
        listen: ``host:port``; port 0 takes a free one and prints it.
        enrolment: ``host:port`` on which machines that are no members yet can ask to become some; empty for none.
        metrics: ``host:port`` on which Prometheus may ask for metrics, without TLS; empty for none.
        telemetry: traces, TensorBoard and MLflow.
        database: SQLAlchemy's URL of the database of runs and rounds, such as ``postgresql+psycopg://user@host/name``;
            empty for SQLite in ``state``. ``FEDSECURE_DATABASE`` in the environment takes its place, so that no
            password need stand in the file.
        state: the aggregator's folder: models, results, and the database.
        identity: folder with the aggregator's certificate, keys and the signed roster.
        encoder_file: the aggregator's copy of what the sites' ``encoder_file`` names, for methods that compute with the
            class texts between rounds.
        target_file: its copy of the target, where the run has the aggregator align.
    """

    listen: str = "127.0.0.1:0"
    enrolment: str = ""
    metrics: str = ""
    telemetry: TelemetryConfig = TelemetryConfig()
    database: str = ""
    state: Path
    identity: Path
    encoder_file: Path | None = None
    target_file: Path | None = None

    def settings(self) -> RunSettings:
        """The public part."""
        return RunSettings.model_validate(self.model_dump(exclude=AGGREGATOR_KEYS))
