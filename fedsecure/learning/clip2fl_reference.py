"""CLIP2FL's and CReFF's training as published, without privacy: one federated loop for them and for what they beat.

CLIP2FL (AAAI 2024, arXiv 2312.08648, algorithm 1) and CReFF (IJCAI 2022, arXiv 2204.13399). A *trunk* is how a model
is trained and averaged; a *branch* makes another classifier for it. Nothing a branch does flows back into the trunk, so
any number of branches look on at one training. Sites show each class's mean gradient, which for a class of one record
is that record's feature: whoever trains with this must have said that the run is not private.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.class_draws import ClassDraws
from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum
from fedsecure.learning.classifier import Classifier, Retraining, fresh_classifier, retrain
from fedsecure.learning.distillation import Distillation, distillation_loss
from fedsecure.learning.federated_features import Matching, PrototypeContrast, find_features, fresh_features
from fedsecure.learning.objective import CROSS_ENTROPY, Objective
from fedsecure.learning.students import Student, StudentSpec, build_student
from fedsecure.learning.units import UnitFeatures

State = dict[str, Tensor]
NO_TEACHER = Distillation(strength=0.0)
MATCHING, RETRAINING = Matching(), Retraining()
_PAD = 4
_ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """A site's records, or public ones.

    Attributes:
        inputs: (n, …) float32, what the student sees.
        labels: (n,) int64.
        teacher: (n, C) float32 logits of the teacher, computed once.
    """

    inputs: Tensor
    labels: Tensor
    teacher: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Records:
        """The same records there; a model trains where its records are."""
        return Records(self.inputs.to(device), self.labels.to(device), self.teacher.to(device))


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast, the same for all trunks.

    Attributes:
        rounds, online: rounds, and sites drawn in each; all of them where there are fewer.
        epochs, batch, rate: of a site's SGD without momentum in a round; the last partial batch counts.
        augment: random crop and flip of image batches, one draw a batch as released.
        bfloat16: forward passes of training in that precision, which some processors do twice as fast.

    Raises:
        ModelError: FS-1694 a number out of range.
    """

    rounds: int = 200
    online: int = 8
    epochs: int = 10
    batch: int = 32
    rate: float = 0.1
    augment: bool = True
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if min(self.rounds, self.online, self.epochs, self.batch) < 1 or not self.rate > 0:
            raise ModelError(
                "FS-1694",
                f"{self}",
                expected="at least one round, site, epoch and record, and a rate above 0",
                cure="correct the schedule",
            )


@dataclass(frozen=True, slots=True)
class Trunk:
    """How a model is trained at the sites and put together.

    Attributes:
        name, paper: what it is called, and where it comes from.
        distillation: from the teacher's logits; strength 0 is none.
        objective: what stands in place of cross-entropy.
        proximal: μ of (μ/2)‖w − w^t‖² in the sites' loss.
        momentum: of the server's step.
        weigh: class weights (C,) of the round's loss from the round's model and public records.
        finish: what the server does to the average, given the sites' models and public records.
    """

    name: str
    paper: str
    distillation: Distillation = NO_TEACHER
    objective: Objective = CROSS_ENTROPY
    proximal: float = 0.0
    momentum: float = 0.0
    weigh: Callable[[Student, Records], Tensor] | None = None
    finish: Callable[[Student, Sequence[Student], Records], None] | None = None


class Branch(Protocol):
    """Another classifier for the model of a trunk."""

    @property
    def name(self) -> str: ...

    def observe(self, student: Student, sites: Sequence[Records], *, round: int, rounds: int) -> None:
        """See the round's model and sites before they train."""

    def after(self, student: Student) -> Classifier | None:
        """The classifier for a round's model, where the branch has one by then."""

    def classifier(self, student: Student, sites: Sequence[Records]) -> Classifier:
        """The classifier for the last model; ``sites`` are all of them."""


def train(
    trunk: Trunk,
    spec: StudentSpec,
    sites: Sequence[Records],
    *,
    schedule: Schedule,
    seed: int,
    public: Records | None = None,
    branches: Sequence[Branch] = (),
    after: Callable[[int, Student], None] = lambda *_: None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> Student:
    """All rounds of a trunk; the branches look on. Training is where the records are.

    Args:
        trunk, spec, schedule: what is trained, and how.
        sites: records of each site; one without records never takes part.
        seed: of first weights, batches, augmentation and the choice of sites.
        public: for ``weigh`` and ``finish``.
        branches: told of each round.
        after: called with (round, model) after each round, the model in evaluation mode.
        watch: called with (round, rounds).

    Returns:
        the model after the last round, in evaluation mode.

    Raises:
        ModelError: FS-1694 no site has a record, a trunk that needs public records gets none, or training diverges.
    """
    present = [index for index, site in enumerate(sites) if len(site)]
    if not present or (public is None and (trunk.weigh or trunk.finish)):
        raise ModelError(
            "FS-1694",
            f"{trunk.name} with {len(present)} sites that have records, and public records: {public is not None}",
            expected="at least one site with records, and public records where the method uses some",
            cure="bring more records, or declare some public",
        )
    student = _laid_out(build_student(spec, seed=seed), sites[present[0]].inputs.device)
    draw = np.random.default_rng(seed)
    generators = [torch.Generator().manual_seed(1000 * seed + index) for index in range(len(sites))]
    speed: State = {}
    for round in range(schedule.rounds):
        watch(round, schedule.rounds)
        chosen = draw.choice(present, min(schedule.online, len(present)), replace=False)
        online = [sites[index] for index in sorted(chosen.tolist())]
        student.eval()
        for branch in branches:
            branch.observe(student, online, round=round, rounds=schedule.rounds)
        weights = trunk.weigh(student, public) if trunk.weigh and public is not None else None
        trained = [
            _local(trunk, spec, student, sites[index], schedule, generators[index], weights)
            for index in sorted(chosen.tolist())
        ]
        mean = average([one.state_dict() for one in trained], [len(site) for site in online])
        if trunk.momentum:
            mean, speed = _with_momentum(student.state_dict(), mean, speed, trunk.momentum)
        student.load_state_dict(mean)
        if trunk.finish and public is not None:
            trunk.finish(student, trained, public)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters()):
            raise ModelError(
                "FS-1694",
                f"{trunk.name} at rate {schedule.rate:g} has gone to infinity in round {round + 1}",
                expected="finite weights",
                cure="lower the rate; distillation of strength β and temperature T multiplies it by up to β·T²",
            )
        after(round, student.eval())
    watch(schedule.rounds, schedule.rounds)
    return student.eval()


def _local(
    trunk: Trunk,
    spec: StudentSpec,
    start: Student,
    site: Records,
    schedule: Schedule,
    generator: torch.Generator,
    weights: Tensor | None,
) -> Student:
    """A site's model after its epochs."""
    student = _laid_out(build_student(spec, seed=0), site.inputs.device)
    student.load_state_dict(start.state_dict())
    student.train()
    anchor = [parameter.detach().clone() for parameter in student.parameters()]
    optimiser = torch.optim.SGD(student.parameters(), lr=schedule.rate)
    for _ in range(schedule.epochs):
        for rows in torch.split(torch.randperm(len(site), generator=generator), schedule.batch):
            if len(rows) == 1 and spec.kind == "resnet8" and spec.norm == "batch":
                # One image alone has no batch statistics worth the name; the next pass sees it in company.
                continue
            inputs, labels = site.inputs[rows], site.labels[rows]
            if schedule.augment and inputs.ndim == 4:
                inputs = augmented(inputs, generator)
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=schedule.bfloat16):
                _, logits = student(inputs)
            losses = distillation_loss(
                logits.float(), site.teacher[rows], labels, how=trunk.distillation, objective=trunk.objective
            )
            loss = losses.mean() if weights is None else (losses * weights[labels]).sum() / weights[labels].sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if trunk.proximal:
                for parameter, first in zip(student.parameters(), anchor, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - first, alpha=trunk.proximal)
            optimiser.step()
    return student.eval()


def _laid_out(student: Student, device: torch.device) -> Student:
    """Convolutions on a processor are half as fast again with the colour planes innermost; nothing else changes."""
    return student.to(device).to(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random crop of the zero-padded batch, and one coin for flipping all of it, as released."""
    across, down, flip = (int(torch.randint(n, (), generator=generator)) for n in (2 * _PAD + 1, 2 * _PAD + 1, 2))
    side = images.shape[-1]
    padded = functional.pad(images, (_PAD,) * 4)
    cut = padded[..., down : down + side, across : across + side]
    return cut.flip(-1) if flip else cut


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> State:
    """Σ n_k w_k / Σ n_k of every entry, running statistics included; counters are those of the first."""
    total = sum(weights)
    return {
        name: sum((n / total * state[name] for n, state in zip(weights, states, strict=True)), torch.zeros_like(first))
        if first.is_floating_point()
        else first.clone()
        for name, first in states[0].items()
    }


def _with_momentum(before: Mapping[str, Tensor], mean: State, speed: State, momentum: float) -> tuple[State, State]:
    moved, kept = dict(mean), {}
    for name, value in mean.items():
        if value.is_floating_point() and "running" not in name:
            kept[name] = (value - before[name]) + momentum * speed.get(name, torch.zeros_like(value))
            moved[name] = before[name] + kept[name]
    return moved, kept


def features_of(student: Student, inputs: Tensor) -> Float32:
    """z of records, (n, d) float32, in evaluation mode."""
    student.eval()
    with torch.inference_mode():
        parts = [student.features(part) for part in torch.split(inputs, _ROWS)]
    return np.asarray(torch.cat(parts).cpu().numpy(), np.float32)


def head_of(student: Student) -> Classifier:
    """The model's own classifier φ."""
    weight, bias = (value.detach().cpu().numpy().copy() for value in (student.head.weight, student.head.bias))
    return Classifier(weight, bias)


def predict(student: Student, inputs: Tensor, *, classifier: Classifier | None = None) -> npt.NDArray[np.int64]:
    """(n,) classes by the model's own classifier, or by a branch's."""
    chosen = head_of(student) if classifier is None else classifier
    return np.asarray(chosen.probabilities(features_of(student, inputs)).argmax(axis=1), np.int64)


def mean_gradients(
    student: Student,
    sites: Sequence[Records],
    classifier: Classifier,
    layout: ClassGradients,
    *,
    draws: ClassDraws | None = None,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Equations 3 and 4: each class's mean gradient at a site, and the plain mean of that over its holders.

    Args:
        student, sites, classifier, layout: whose gradients, over whose records, in which classifier, laid out how.
        draws: a class's mean is over these of its images; over all of its records where there are none, and where
            records are features, which have no further views.
        seed: of the draws.

    Returns:
        (K, …) in the layout's shape, zeros for a class that no site holds.
    """
    total, holders = np.zeros(layout.shape), np.zeros(layout.classes)
    for place, site in enumerate(sites):
        shown: Iterable[tuple[Tensor, Tensor]] = [(site.inputs, site.labels)]
        if draws is not None and site.inputs.ndim == 4:
            shown = draws(site.inputs, site.labels, seed=1000 * seed + place)
        parts = [(features_of(student, inputs), known.cpu().numpy()) for inputs, known in shown]
        features, labels = (np.concatenate(column)[:, None] for column in zip(*parts, strict=True))
        units = UnitFeatures(features, labels, np.ones_like(labels, bool))
        sums = class_gradient_sum(units.features, units, classifier, layout).reshape(layout.shape)
        counts = np.bincount(labels[:, 0], minlength=layout.classes)
        total += sums / np.maximum(counts, 1)[:, None, None]
        holders += counts > 0
    return np.asarray(total / np.maximum(holders, 1)[:, None, None])


@dataclass(slots=True)
class Retrained:
    """The classifier re-trained on federated features: CReFF without contrast, CLIP2FL with it.

    Attributes:
        name: of the branch.
        last: r, how many of the last rounds it is run in; the released programs run it in all.
        each: m, features a class.
        matching, retraining: their settings.
        contrast, text: the prototype contrast and its (K, d) texts; None for CReFF.
        rows: ``full`` as published, or ``diagonal``.
        draws: of a class's images, as released; None for all of its records.
        seed: of features and classifiers.
        warm: go on from the last classifier, as the paper's text has it, instead of from a fresh one, as released.
        text_start: begin features at √d times their class's text, for students whose features are CLIP's own, instead
            of at N(0, I) alone.
    """

    name: str
    last: int = 200
    each: int = 100
    matching: Matching = MATCHING
    retraining: Retraining = RETRAINING
    contrast: PrototypeContrast | None = None
    text: Float32 | None = None
    rows: str = "full"
    draws: ClassDraws | None = None
    seed: int = 0
    warm: bool = False
    text_start: bool = False
    moved: list[tuple[float, float]] = field(default_factory=list)
    _features: Float32 | None = None
    _classifier: Classifier | None = None

    def observe(self, student: Student, sites: Sequence[Records], *, round: int, rounds: int) -> None:
        if round < rounds - self.last:
            return
        classes, dimension = student.head.weight.shape
        held = self._classifier or fresh_classifier(classes, dimension, seed=self.seed)
        layout = ClassGradients(classes, dimension, rows="full" if self.rows == "full" else "diagonal")
        target = mean_gradients(student, sites, held, layout, draws=self.draws, seed=self.seed + round)
        if self._features is None:
            self._features = fresh_features(classes, self.each, dimension, seed=self.seed)
            if self.text_start and self.text is not None:
                self._features += np.float32(math.sqrt(dimension)) * self.text[:, None]
        found = find_features(
            self._features,
            held,
            target.ravel(),
            layout,
            matching=self.matching,
            contrast=self.contrast,
            text=self.text,
        )
        self.moved.append((found.moved_by_matching, found.moved_by_contrast))
        self._features = found.features
        first = held if self.warm else fresh_classifier(classes, dimension, seed=self.seed + 1 + round)
        self._classifier = retrain(found.features, first, self.retraining, seed=self.seed + round)

    def after(self, student: Student) -> Classifier | None:
        return self._classifier

    def classifier(self, student: Student, sites: Sequence[Records]) -> Classifier:
        if self._classifier is None:
            self.observe(student, sites, round=0, rounds=1)
        assert self._classifier is not None
        return self._classifier
