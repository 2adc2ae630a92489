"""CLIP2FL: distillation from CLIP at the sites, federated features at the aggregator, for long tails.

Shi, Zheng, Yin, Lu, Huang, Cao, Chen: CLIP2FL, AAAI 2024 (arXiv 2312.08648). Sites train a student with cross-entropy
and distillation from zero-shot CLIP. In the last rounds they also give class gradients at its features, summed over all
classes in one bounded segment of the same vector. The aggregator finds features whose gradients look alike, draws them
to the class texts, and trains a classifier on them, which has the same number of features for every class; with the
student below it, it is the run's result. Features and classifier never influence the training of the student, so that
this side branch costs one release, and what it does with it is post-processing. Without contrast it is CReFF (IJCAI
2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedsecure.config import Clip2flConfig, RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import AdapterSpec, Float32, Vector
from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum, clear_classes, span_basis
from fedsecure.learning.classifier import Classifier, Retraining, fresh_classifier, retrain
from fedsecure.learning.features import Inputs, SiteFeatures
from fedsecure.learning.federated_features import Matching, PrototypeContrast, find_features, fresh_features
from fedsecure.learning.objective import Distillation
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate, Answer, Segment, SiteState
from fedsecure.methods.base import Ask, Cohort, Release, ServerState, Tensor
from fedsecure.methods.clip2fl_students import STUDENTS, Linear, check_images
from fedsecure.methods.cohorts import cohort_of, refuse_draw, refuse_prior, refuse_target
from fedsecure.methods.descent import AdapterDescent, plan_of
from fedsecure.methods.towers import cautious_rate
from fedsecure.privacy.grid import distributed_segment
from fedsecure.privacy.plan import LastReleases, PrivacyPlan

PURPOSE = "class gradients"
# Values of a contribution, and of the federated features.
MAX_VALUES = 1 << 24
# Of a network that starts at random: its longest step, and how long the noise may be that it ends with. Chosen by the
# training accuracy of ResNet-8 ×1 on 135 generated images; at steps of 1 and more it does not learn.
LONGEST_STEP, CAUTION = 0.4, 4.0
# Tensors of the state beside the student that is trained.
_CLASSIFIER, _FEATURES, _SUM = "classifier", "federated_features", "class_gradients"


@dataclass(frozen=True, slots=True)
class FederatedFeatureDescent(AdapterDescent):
    """Descent on a student, with the side branch of class gradients, federated features and classifier.

    The classifier acts on the student's features z, of length √d on CLIP's, so that N(0, I) draws stand beside them; it
    has no bias and starts from zero, where a class gradient is a class sum of features.
    """

    # --- the aggregator's half --------------------------------------------------------------------------------------

    def ask(self, settings: RunSettings, cohort: Cohort, state: ServerState) -> Ask | None:
        ask = AdapterDescent.ask(self, settings, cohort, state)
        if ask is None:
            return None
        plan = self.plan(settings, cohort)
        ask = replace(ask, events=plan.events_at(state.step))
        if not self.releases_at(settings, state.step):
            return ask
        classifier = state.tensors.get(_CLASSIFIER, self._zero(settings))
        beside = self.class_segment(settings, cohort, plan)
        return replace(ask, inputs={**ask.inputs, _CLASSIFIER: classifier}, segments=(*ask.segments, beside))

    def absorb(self, settings: RunSettings, cohort: Cohort, state: ServerState, aggregate: Aggregate) -> ServerState:
        following = AdapterDescent.absorb(self, settings, cohort, state, aggregate)
        kept = {name: state.tensors[name] for name in (_CLASSIFIER, _FEATURES) if name in state.tensors}
        if self.releases_at(settings, state.step):
            kept[_SUM] = aggregate.values[_SUM] * self._scale(settings)
        return replace(following, tensors={**following.tensors, **kept})

    def computes(self, settings: RunSettings) -> bool:
        return True

    def due(self, settings: RunSettings, state: ServerState) -> bool:
        return _SUM in state.tensors

    def compute(self, settings: RunSettings, state: ServerState, features: SiteFeatures) -> ServerState:
        """Federated features and classifier from the last class gradients; after the last round the student with this
        classifier is the run's result."""
        options, classes = settings.method.clip2fl, len(settings.classes)
        _, cohort = cohort_of(settings, trainers_only=True)
        student, head, layout = self.student(settings), self.head(settings, features), self.layout(settings)
        dimension, seed = settings.encoder.dimension, int.from_bytes(settings.digest()[:4], "big")
        found_before = state.tensors.get(_FEATURES)
        if found_before is None:
            found_before = fresh_features(classes, options.features, dimension, seed=seed)
            if options.start == "text":
                found_before = found_before + student.of_texts(head, state.tensors)[:, None]
        now = Classifier(np.asarray(state.tensors.get(_CLASSIFIER, self._zero(settings)), np.float32))
        target = np.asarray(state.tensors[_SUM], np.float64)
        noise = self.plan(settings, cohort).last_events[0].noise_multiplier * options.clip_norm
        clear = clear_classes(
            target, layout, noise_std=noise * math.sqrt(cohort.sites / cohort.honest), threshold=options.gate
        )
        found = find_features(
            np.asarray(found_before, np.float32),
            now,
            target,
            layout,
            matching=Matching(options.matching_steps, options.matching_rate, options.cosine),
            contrast=_contrast(options),
            text=head.prior,
            clear=clear,
            basis=span_basis(head.prior) if options.project else None,
        )
        begin = now if options.warm_start else fresh_classifier(classes, dimension, bias=False, seed=seed + state.step)
        how = Retraining(options.head_epochs, options.head_batch, options.head_rate)
        trained = retrain(found.features, begin, how, seed=seed + state.step)
        told = {name: value for name, value in asdict(found).items() if name != "features"}
        facts = {**state.facts, self.name: {**told, "clear_classes": int(clear.sum()), "step": state.step}}
        tensors: dict[str, Tensor] = {name: value for name, value in state.tensors.items() if name != _SUM}
        tensors |= {_FEATURES: found.features, _CLASSIFIER: trained.weight}
        if state.step >= settings.method.rounds:
            below = {name: state.tensors[name] for name in self.spec(settings).shapes}
            tensors = {**below, "D": student.residual(trained, head)}
        return replace(state, tensors=tensors, facts=facts)

    # --- a site's half ----------------------------------------------------------------------------------------------

    def answer(self, inputs: Mapping[str, Tensor], state: SiteState, release: Release) -> tuple[Answer, SiteState]:
        trained = {name: inputs[name] for name in self.spec(release.settings).shapes}
        answer, state = AdapterDescent.answer(self, trained, state, release)
        if _CLASSIFIER not in inputs:
            return answer, state
        settings = release.settings
        units = release.units("train")
        assert units is not None, "only training sites are asked"
        values = self.class_gradients(settings, release.features, inputs, units) / self._scale(settings)
        return Answer({**answer.values, _SUM: values}, {**answer.units, _SUM: len(units)}), state

    def class_gradients(
        self, settings: RunSettings, features: SiteFeatures, inputs: Mapping[str, Tensor], units: UnitFeatures
    ) -> Vector:
        """The sum of units' class gradients at the broadcast student and classifier; each of C_g at most."""
        options, student, layout = settings.method.clip2fl, self.student(settings), self.layout(settings)
        head = self.head(settings, features)
        trained = {name: inputs[name] for name in self.spec(settings).shapes}
        rows = student.rows(student.task(settings, head), trained, units)
        shown = rows @ span_basis(head.prior).T if options.project else rows
        scaled = np.asarray(inputs[_CLASSIFIER], np.float64) * student.scale(settings.encoder.dimension)
        return class_gradient_sum(rows, units, Classifier(scaled), layout, clip_norm=options.clip_norm, outer=shown)

    def _training_task(
        self, settings: RunSettings, release: Release, inputs: Mapping[str, Tensor], state: SiteState
    ) -> Any:
        options = settings.method.clip2fl
        taught = Distillation(options.distillation, options.distillation_temperature)
        head = self.head(settings, release.features)
        return self.student(settings).task(settings, head, taught if options.distillation else None)

    # --- what both halves compute alike from public numbers ---------------------------------------------------------

    def student(self, settings: RunSettings) -> Linear:
        """What the run trains."""
        return STUDENTS[settings.method.clip2fl.student]

    def inputs_of(self, settings: RunSettings) -> Inputs:
        return self.student(settings).inputs

    def spec(self, settings: RunSettings) -> AdapterSpec:
        return self.student(settings).spec(settings)

    def head(self, settings: RunSettings, features: SiteFeatures) -> HeadTask:
        """Zero-shot with the run's constants: the texts that every student's classifier starts from."""
        spec = AdapterSpec("linear", settings.encoder.dimension, len(settings.classes))
        return HeadTask(spec, features.text, features.centre, self.temperature(settings, features))

    def task(self, settings: RunSettings, features: SiteFeatures) -> Any:
        """The student as sites evaluate and keep it; a HeadTask over features, a TowerTask over images."""
        return self.student(settings).task(settings, self.head(settings, features))

    def rate(self, settings: RunSettings, cohort: Cohort) -> tuple[float, float]:
        if self.inputs_of(settings) == "features":
            return AdapterDescent.rate(self, settings, cohort)
        longest = LONGEST_STEP * settings.method.rounds * settings.method.local_steps
        return cautious_rate(settings, self.plan(settings, cohort), longest=longest, caution=CAUTION)

    def releases_at(self, settings: RunSettings, step: int) -> bool:
        """Whether round ``step`` asks for class gradients."""
        return step >= settings.method.rounds - settings.method.clip2fl.releases

    def layout(self, settings: RunSettings) -> ClassGradients:
        """Of the class gradients."""
        classes, options = len(settings.classes), settings.method.clip2fl
        width = classes if options.project else settings.encoder.dimension
        return ClassGradients(classes, width, options.class_gradients, bias=False)

    def plan(self, settings: RunSettings, cohort: Cohort) -> PrivacyPlan:
        """The run's plan with training and class gradients, both within the target.

        Raises:
            ConfigError: FS-1017 settings that do not go together, FS-1018 a target to align with, or a prior,
                FS-1050 class gradients of a drawn cohort.
            PrivacyError: as :meth:`fedsecure.privacy.plan.Privacy.plan`.
        """
        self.check(settings)
        refuse_target(settings)
        refuse_prior(settings)
        options = settings.method.clip2fl
        if options.releases:
            refuse_draw(settings)
        last = LastReleases(PURPOSE, options.releases, options.budget_share) if options.releases else None
        return plan_of(settings.canonical(), cohort, self.spec(settings).parameters, last=last)

    def class_segment(self, settings: RunSettings, cohort: Cohort, plan: PrivacyPlan) -> Segment:
        """The layout of the class gradients in a round's vector; the sites share their noise whatever the training's
        is. A unit's are brought to the length of its training gradient."""
        return distributed_segment(
            _SUM,
            self.layout(settings).length,
            clip_norm=settings.privacy.max_grad_norm,
            noise_multiplier=plan.last_events[0].noise_multiplier,
            honest=cohort.honest,
            sites=cohort.sites,
            units=max(settings.declared_units().values()),
        )

    def check(self, settings: RunSettings) -> None:
        """Refuse settings that do not go together.

        Raises:
            ConfigError: FS-1017, FS-1020.
        """
        options, classes, privacy = settings.method.clip2fl, len(settings.classes), settings.privacy
        largest = max(self.layout(settings).length, classes * options.features * settings.encoder.dimension)
        wrong = {
            f"releases = {options.releases} in {settings.method.rounds} rounds": options.releases
            > settings.method.rounds,
            f"project with {classes} classes and features of width {settings.encoder.dimension}": options.project
            and classes >= settings.encoder.dimension,
            f"ring_bits = {privacy.ring_bits}": privacy.ring_bits != 32,
            f"{largest:,} values of class gradients or federated features": largest > MAX_VALUES,
        }
        for found, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(
                    "FS-1017",
                    f"method {self.name!r} with {found}",
                    expected="no more releases than rounds, fewer classes than the features' width to project on, the "
                    f"ring of 32 bits, and at most {MAX_VALUES:,} values",
                    cure="mend [method.clip2fl], or set ring_bits = 32",
                )
        if self.inputs_of(settings) != "features":
            check_images(settings)

    def _scale(self, settings: RunSettings) -> float:
        return settings.method.clip2fl.clip_norm / settings.privacy.max_grad_norm

    def _zero(self, settings: RunSettings) -> Float32:
        return np.zeros((len(settings.classes), settings.encoder.dimension), np.float32)


def _contrast(options: Clip2flConfig) -> PrototypeContrast | None:
    if not options.contrast:
        return None
    return PrototypeContrast(options.contrast, options.contrast_temperature, options.negatives, options.reduction)


METHOD = FederatedFeatureDescent(name="clip2fl", version="1", kind="linear")
