"""Which federated method trains, and the settings of single methods."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedsecure.config.section import Label, Positive, Section


class Clip2flConfig(Section):
    """What the method ``clip2fl`` goes by, and no other; the defaults are those of a private run.

    Attributes:
        student: what is trained: ``"linear"``: a residual head on cached features; ``"features"``: an affine map of
            them under a classifier; ``"resnet8"``: a small network on 32 × 32 images.
        width: of ``"resnet8"``, times its 16, 32 and 64 channels.
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

    student: Literal["linear", "features", "resnet8"] = "linear"
    width: Annotated[int, Field(ge=1, le=16)] = 4
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


class FacmicConfig(Section):
    """What the method ``facmic`` goes by, and no other.

    Attributes:
        normalisation: of the module's hidden layer: ``"layer"``: by mean and variance of a record's own coordinates;
            ``"public"``: by mean and variance of each coordinate over at most 256 images of ``alignment.target`` under
            the step's W1 and b1; ``"none"``: by nothing, scale and shift alone.
    """

    normalisation: Literal["layer", "public", "none"] = "layer"


class AlignmentConfig(Section):
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

    @property
    def aligns(self) -> bool:
        """Whether a record's loss, or the aggregator, looks at the target."""
        return self.weight > 0 or self.negatives > 0

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        if self.aligns and not self.target:
            raise ValueError("a weight or negatives above 0 go with a target")
        if self.prototypes and self.weight == 0:
            raise ValueError("prototypes are released for nothing without a weight above 0")
        if self.at == "aggregator" and not self.prototypes:
            raise ValueError('at = "aggregator" needs prototypes: the aggregator has no records')
        return self


def default_rounds(method: str) -> int:
    """20; the attention modules take longer ways in short steps, and a method of one release takes one."""
    return {"facmic": 60, "fedclip": 60, "prototypes": 1, "ridge": 1}.get(method, 20)


class MethodConfig(Section):
    """Which federated method trains, and its public settings.

    Attributes:
        name: an installed method (entry point group ``fedsecure.methods``).
        rounds: communication rounds; where none are named, as many as suit the method (:func:`default_rounds`).
        local_steps: gradient steps a site takes per round (``noise="local"``); one with distributed noise.
        learning_rate: ``"auto"`` follows the predicted signal-to-noise.
        temperature: τ of the logits; ``"auto"`` is the adapter's own default.
        average: whether the result is the mean of the adapters of the second half of the rounds.
        class_prior: shares of the classes, whose logarithm is added to the logits in training only: public ones, in
            the classes' order, or ``"released"`` by the first round, with its noise and in place of a gradient.
            Without any, all classes count alike.
        views: how many views of each training image a gradient is the mean of; 1 is the image alone.
        alignment: of the method ``facmic``, with a public target.
        facmic: what the method of that name goes by.
        clip2fl: what the method of that name goes by.
    """

    name: Label = "linear"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    learning_rate: Literal["auto"] | Positive = "auto"
    temperature: Literal["auto"] | Positive = "auto"
    average: bool = False
    class_prior: Literal["released"] | Annotated[tuple[Positive, ...], Field(max_length=10_000)] = ()
    views: Annotated[int, Field(ge=1, le=32)] = 1
    alignment: AlignmentConfig = AlignmentConfig()
    # Written out only where it says something, so that other settings have the hash that they always had.
    facmic: FacmicConfig = Field(default=FacmicConfig(), exclude_if=lambda chosen: chosen == FacmicConfig())
    clip2fl: Clip2flConfig = Clip2flConfig()

    @model_validator(mode="after")
    def _choose_rounds(self) -> Self:
        if "rounds" not in self.model_fields_set:
            # Written out in every copy, so that no other release takes another number.
            self.__dict__["rounds"] = default_rounds(self.name)
            self.model_fields_set.add("rounds")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.alignment.target and not (self.alignment.aligns or self.facmic.normalisation == "public"):
            raise ValueError('a target goes with a weight, negatives or facmic.normalisation = "public"')
        return self

    @model_validator(mode="after")
    def _check_first_round(self) -> Self:
        taken = {'class_prior = "released"': self.class_prior == "released"}
        taken["alignment.prototypes"] = self.alignment.prototypes
        takers = [name for name, takes in taken.items() if takes]
        if len(takers) > 1:
            raise ValueError(f"{' and '.join(takers)} both take the first round")
        if takers and self.rounds < 2:
            raise ValueError(f"{takers[0]} takes the first round, so rounds must be at least 2")
        return self
