"""Whole runs of CLIP2FL's published training and of its baselines, without privacy, as the yardstick of an experiment.

CLIP2FL (AAAI 2024), CReFF (IJCAI 2022). All sites are in one process and nothing is summed securely: the published
training shows each class's mean gradient, so it asks for consent as the other references do. The rows have the columns
of ``simulate``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fedsecure.errors import ConfigError
from fedsecure.learning.class_gradients import ClassGradients, Rows
from fedsecure.simulation.folders import Part
from fedsecure.simulation.reference import check_consent
from fedsecure.simulation.simulate import read_row, write_row

if TYPE_CHECKING:
    import numpy.typing as npt

    from fedsecure.learning.artefact import Adapter
    from fedsecure.learning.classifier import Classifier
    from fedsecure.learning.clip2fl_reference import Branch, Records, Retrained, Schedule, Trunk
    from fedsecure.learning.federated_features import PrototypeContrast
    from fedsecure.learning.students import Student
    from fedsecure.simulation.longtail import LongTail, Pixels

# Method → the trunk it is trained on; a trunk stands for itself.
TRUNK_OF = {
    "fedavg": "fedavg",
    "fedavgm": "fedavgm",
    "fedprox": "fedprox",
    "feddf": "feddf",
    "ccvr": "fedavg",
    "fedfocal": "fedfocal",
    "ratio-loss": "ratio-loss",
    "tau-norm": "fedavg",
    "creff": "fedavg",
    "fedavg-distilled": "fedavg-distilled",
    "creff-distilled": "fedavg-distilled",
    "clip2fl-published": "fedavg-distilled",
}
_WITH_GRADIENTS = ("creff", "creff-distilled", "clip2fl-published")
_OF_PUBLIC = ("feddf", "ratio-loss")
ZERO_SHOT = "zero-shot"
NAMES = (ZERO_SHOT, *TRUNK_OF)
WHY = (
    "each site shows every class's mean gradient, which for a class of one record is that record's feature, and batch "
    "normalisation couples the records of a batch"
)
Watch = Callable[[int, int], None]


Cosine = Literal["rows", "matrix"]
Negatives = Literal["text", "features"]
ClassImages = Literal["draws", "all"]
_KNOWN = {
    "class_gradients": get_args(Rows),
    "class_images": get_args(ClassImages),
    "matching_cosine": get_args(Cosine),
    "negatives": get_args(Negatives),
}
# Rounds whose mean is reported.
LATE = 10


@dataclass(frozen=True, slots=True)
class Settings:
    """What the published training may be told; the defaults are the released program's.

    Attributes:
        students: ``resnet8`` or ``features``.
        width, norm, projection: of ResNet-8; projection 0 is the teacher's width, which CLIP2FL needs, and CReFF's own
            program has 256.
        rounds, online, epochs, batch, rate: the schedule.
        bfloat16: precision of training's forward passes; float32 otherwise (a GPU may take TF32 in convolutions).
        strength, temperature: of distillation, β and T.
        last, each: rounds in which the side branch runs, and federated features a class.
        class_gradients: ``full`` as published, or ``diagonal``: each class's own row.
        class_images: a class's gradient is over augmented ``draws`` of its images, as released, or over ``all`` of
            them; records that are features are taken whole.
        matching_steps, matching_rate, retraining_epochs, retraining_rate: of the branch.
        matching_cosine: ``rows`` as published, or one for the whole ``matrix`` of a class.
        warm_start: the classifier goes on from the last one, as the paper's text has it, not from a fresh one.
        contrast, contrast_temperature, contrast_sum: η, τ, and whether the contrast is summed, as in the paper, or
            averaged, as released.
        negatives: of the contrast: other classes' ``text`` as released, or other ``features`` as in equation 7.
        text_start: federated features begin at their class's text, in CLIP2FL with students of features.
        tau: of τ-normalisation.
    """

    students: str = "features"
    width: int = 4
    norm: str = "batch"
    projection: int = 0
    rounds: int = 200
    online: int = 8
    epochs: int = 10
    batch: int = 32
    rate: float = 0.1
    bfloat16: bool = False
    strength: float = 1.0
    temperature: float = 3.0
    last: int = 200
    each: int = 100
    class_gradients: Rows = "full"
    class_images: ClassImages = "draws"
    matching_steps: int = 100
    matching_rate: float = 0.1
    matching_cosine: Cosine = "rows"
    retraining_epochs: int = 300
    retraining_rate: float = 0.01
    warm_start: bool = False
    contrast: float = 0.001
    contrast_temperature: float = 0.1
    contrast_sum: bool = False
    negatives: Negatives = "text"
    text_start: bool = False
    tau: float = 1.0

    def __post_init__(self) -> None:
        """ConfigError FS-1010: what would end a run only after it has trained ends it here."""
        least = {
            **dict.fromkeys(("width", "rounds", "online", "epochs", "batch", "last", "each", "retraining_epochs"), 1),
            **dict.fromkeys(("matching_steps", "strength", "contrast", "tau", "projection"), 0),
        }
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    "FS-1010",
                    f"--{name.replace('_', '-')} {getattr(self, name)}",
                    expected=" or ".join(known),
                    cure="see python examples/clip2fl.py --help",
                )
        above = ("rate", "temperature", "matching_rate", "retraining_rate", "contrast_temperature")
        for name in (*least, *above):
            value = getattr(self, name)
            fits = math.isfinite(value) and (value >= least[name] if name in least else value > 0)
            if not fits:
                raise ConfigError(
                    "FS-1010",
                    f"--{name.replace('_', '-')} {value:g}",
                    expected=f"at least {least[name]}" if name in least else "a finite number above 0",
                    cure="see python examples/clip2fl.py --help",
                )


def run_published(
    tail: LongTail,
    trunk: str,
    names: Sequence[str],
    *,
    out: Path,
    seed: int,
    reason: str,
    partition: str,
    settings: Settings,
    epsilon: float = math.inf,
    device: str = "auto",
    watch: Watch = lambda *_: None,
) -> list[dict[str, Any]]:
    """A trunk and the methods that stand on it, in one training; taken from ``out`` where all are finished there.

    Args:
        tail: records.
        trunk: one of ``TRUNK_OF``'s values.
        names: methods of this trunk.
        out: folder of results, made by :func:`fedsecure.simulation.simulate.open_results`.
        seed: of first weights, batches and the choice of sites.
        reason: why the data need no privacy; kept in the rows.
        partition: what to call the way the records are shared out.
        settings: schedule, student, branch.
        epsilon: ∞; there for the refusal.
        device: where it is trained, ``"auto"`` for the GPU where there is one.
        watch: called with (round, rounds).

    Returns:
        rows as of ``simulate`` in the order of ``names``, with ``groups`` on the test set and ``public`` on the public
        records, both of the last round. Of a method that has a classifier after each round also ``late``, the mean on
        the test set over the last ``LATE`` rounds that have one, and ``best``, the round that does best on the public
        records (``chosen_on`` says if there were none and it was the test set) with its ``groups`` on the test set.

    Raises:
        PrivacyError: FS-1218 a private run, or no reason.
        ModelError: FS-1690, FS-1692, FS-1694, FS-1681 settings out of range, FS-1639 no such device.
        ConfigError: FS-1010 images are asked for, and there are none.
    """
    check_consent(epsilon, reason, why=WHY, instead="clip2fl")
    for name in names:
        check_method(tail, name, settings)
    from fedsecure import __version__

    shown = hashlib.sha256(tail.source.public.labels.tobytes()).hexdigest()
    facts = [__version__, asdict(settings), tail.experiment.digest, shown, partition, seed]
    keys = {name: _key([name, *facts]) for name in names}
    kept = [read_row(out, key) for key in keys.values()]
    if all(row is not None for row in kept):
        return [row for row in kept if row is not None]
    from fedsecure.learning.clip2fl_reference import features_of, head_of, train

    begun = time.monotonic()
    spec, records = _records(tail, settings, device=device)
    branches = {name: branch for name in names if (branch := _branch(name, tail, settings, seed)) is not None}
    sites = [records[name] for name in tail.rows]
    schedule = _schedule(settings)
    scored = ("test", "public") if len(tail.source.public) else ("test",)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def guesses(student: Student) -> Callable[[Classifier], dict[str, npt.NDArray[np.int64]]]:
        seen = {on: features_of(student, records[on].inputs) for on in scored}

        def by(head: Classifier) -> dict[str, npt.NDArray[np.int64]]:
            # A model on its way to infinity, which the training refuses once it is there, overflows first.
            with np.errstate(over="ignore", invalid="ignore"):
                return {on: head.probabilities(values).argmax(axis=1) for on, values in seen.items()}

        return by

    def look(round: int, student: Student) -> None:
        by = guesses(student)
        for name, curve in curves.items():
            head = branches[name].after(student) if name in branches else head_of(student)
            if head is not None:
                found = by(head)
                curve.append({"round": round + 1, **{on: tail.scores(found[on], on=on) for on in scored}})

    student = train(
        _trunk(trunk, settings),
        spec,
        sites,
        schedule=schedule,
        seed=seed,
        public=records["public"],
        branches=list(branches.values()),
        after=look,
        watch=watch,
    )
    sent = 4 * sum(value.numel() for value in student.state_dict().values() if value.is_floating_point())
    by = guesses(student)
    rows = []
    for name, key in keys.items():
        head = branches[name].classifier(student, sites) if name in branches else head_of(student)
        row = _row(tail, name, by(head), seed=seed, partition=partition, reason=reason)
        classes, width = student.head.weight.shape
        beside = 0
        if name in _WITH_GRADIENTS:
            layout = ClassGradients(classes, width, rows=settings.class_gradients)
            beside = layout.length * min(settings.last, settings.rounds)
        elif name == "ccvr":
            beside = classes * (1 + width + width**2)
        row |= {"rounds": settings.rounds, "bytes_up": sent * settings.rounds + 4 * beside, "cell": key}
        row["device"] = sites[0].inputs.device.type
        row["moved"] = getattr(branches.get(name), "moved", [])
        row |= over_rounds(curves[name])
        row["wall_seconds"] = round(time.monotonic() - begun, 2)
        write_row(out, key, row)
        rows.append(row)
    return rows


def over_rounds(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``late`` and ``best`` of :func:`run_published` from each round's number and its scores on ``test`` and, where
    there are some, on ``public`` records; nothing of no rounds."""
    if not curve:
        return {}
    chosen_on = "public" if "public" in curve[0] else "test"
    best = max(curve, key=lambda at: at[chosen_on]["all"])
    late = [at["test"] for at in curve[-LATE:]]
    return {
        "late": {name: None if None in (values := [at[name] for at in late]) else fmean(values) for name in late[0]},
        "best": {"round": best["round"], "groups": best["test"], "chosen_on": chosen_on},
    }


def check_method(tail: LongTail, name: str, settings: Settings) -> None:
    """ConfigError FS-1010 where a method learns from public records and there are none, or draws features to texts of
    another width."""
    if name in _OF_PUBLIC and not len(tail.source.public):
        raise ConfigError(
            "FS-1010",
            f"method {name} without public records",
            expected="some records of each class that are declared public",
            cure="leave the method out, or give --public-each, a `public` folder or a split of a feature file",
        )
    width = tail.source.text.shape[1]
    if name == "clip2fl-published" and settings.projection not in (0, width):
        raise ConfigError(
            "FS-1010",
            f"--projection {settings.projection} with {name}",
            expected=f"0 or {width}: its features are drawn to the texts, and are as wide",
            cure="leave the option or the method out",
        )


def run_zero_shot(tail: LongTail, *, seed: int, partition: str) -> dict[str, Any]:
    """The teacher by itself, as a row."""
    from fedsecure.learning.distillation import teacher_logits

    parts = {"test": tail.source.test, "public": tail.source.public}
    found = {on: teacher_logits(part.features, tail.source.text).argmax(axis=1) for on, part in parts.items()}
    row = _row(tail, ZERO_SHOT, found, seed=seed, partition=partition, reason="")
    return {**row, "rounds": 0, "bytes_up": 0, "cell": "", "wall_seconds": 0.0}


def scores_of_adapter(tail: LongTail, file: Path) -> dict[str, dict[str, float | None]]:
    """``groups`` on the test set and ``public`` on the public records, each ``all``, ``many``, ``medium`` and ``few``,
    of an adapter that ``simulate`` has trained. Raises as its loader."""
    from fedsecure.learning.artefact import load_adapter

    adapter, source = load_adapter(file), tail.source
    scores: dict[str, dict[str, float | None]] = {}
    for name, on, part in (("groups", "test", source.test), ("public", "public", source.public)):
        if not len(part):
            found = part.labels
        elif adapter.inputs == "thumbnails":
            found, _ = _of_images(tail, adapter, on, part)
        else:
            found, _ = adapter.predict(part.features, fingerprint=adapter.metadata.fingerprint)
        scores[name] = tail.scores(found, on=on)
    return scores


def _of_images(
    tail: LongTail, adapter: Adapter, on: str, part: Part
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What a student of small images says of the test set or of the public records."""
    from fedsecure.learning.evaluation import predict
    from fedsecure.learning.student_module import resnet8_task
    from fedsecure.learning.students import normalise
    from fedsecure.learning.towers import TowerSpec

    assert tail.source.pixels is not None, "such a student has been trained on these images"
    assert isinstance(adapter.spec, TowerSpec)
    pixels = normalise(tail.source.pixels[on]).flatten(1).numpy()
    rows = np.concatenate([pixels, part.features], axis=1)
    return predict(resnet8_task(adapter.spec, head=adapter.zero_shot), adapter.tensors, rows)


def _row(
    tail: LongTail, name: str, found: Mapping[str, Any], *, seed: int, partition: str, reason: str
) -> dict[str, Any]:
    from fedsecure.learning.distillation import teacher_logits

    labels = tail.source.test.labels
    groups = tail.scores(found["test"])
    teacher = teacher_logits(tail.source.test.features, tail.source.text).argmax(axis=1)
    return {
        "method": name,
        "partition": partition,
        "noise": "none",
        "sites": len(tail.rows),
        "epsilon": math.inf,
        "seed": seed,
        "zero_shot": float((teacher == labels).mean()),
        "accuracy": float((found["test"] == labels).mean()),
        "balanced_accuracy": groups["all"],
        "epsilon_spent": None,
        "no_privacy": reason,
        "groups": groups,
        "public": tail.scores(found.get("public", tail.source.public.labels), on="public"),
    }


def _key(facts: Sequence[Any]) -> str:
    return hashlib.sha256(b"fedsecure/clip2fl/v1\0" + json.dumps(list(facts)).encode()).hexdigest()[:32]


def _records(tail: LongTail, settings: Settings, *, device: str) -> tuple[Any, dict[str, Records]]:
    """The student's shape, and the records of each site, ``test`` and ``public``."""
    import torch

    from fedsecure.learning.clip2fl_reference import Records
    from fedsecure.learning.distillation import teacher_logits
    from fedsecure.learning.modules import resolve_device
    from fedsecure.learning.students import StudentSpec, normalise

    where = resolve_device(device)
    source, pixels = tail.source, tail.source.pixels
    images = settings.students == "resnet8"
    if images and pixels is None:
        raise ConfigError(
            "FS-1010",
            "students resnet8 on a feature file",
            expected="images (--data), or --students features",
            cure="write --students features",
        )
    spec = StudentSpec(
        settings.students,  # type: ignore[arg-type]
        len(source.classes),
        inputs=source.text.shape[1],
        width=settings.width,
        norm=settings.norm,  # type: ignore[arg-type]
        projection=settings.projection or source.text.shape[1],
    )

    def made(part: Part, held: Pixels | None) -> Records:
        inputs = normalise(held) if images and held is not None else torch.from_numpy(np.array(part.features))
        return Records(
            inputs,
            torch.from_numpy(np.array(part.labels)),
            torch.from_numpy(teacher_logits(part.features, source.text)),
        ).to(where)

    found = {
        name: made(tail.experiment.train[name], None if pixels is None else pixels["train"][rows])
        for name, rows in tail.rows.items()
    }
    for name, part in (("test", source.test), ("public", source.public)):
        found[name] = made(part, None if pixels is None else pixels[name])
    return spec, found


def _schedule(settings: Settings) -> Schedule:
    from fedsecure.learning.clip2fl_reference import Schedule

    return Schedule(
        rounds=settings.rounds,
        online=settings.online,
        epochs=settings.epochs,
        batch=settings.batch,
        rate=settings.rate,
        bfloat16=settings.bfloat16,
    )


def _trunk(name: str, settings: Settings) -> Trunk:
    from fedsecure.learning.baselines import TRUNKS
    from fedsecure.learning.distillation import Distillation

    trunk = TRUNKS[name]
    if trunk.distillation.strength:
        return replace(trunk, distillation=Distillation(settings.strength, settings.temperature))
    return trunk


def _branch(name: str, tail: LongTail, settings: Settings, seed: int) -> Branch | None:
    from fedsecure.learning.baselines import TauNormalised, VirtualFeatures
    from fedsecure.learning.class_draws import ClassDraws
    from fedsecure.learning.classifier import Retraining
    from fedsecure.learning.clip2fl_reference import Retrained
    from fedsecure.learning.federated_features import Matching, PrototypeContrast

    retraining = Retraining(epochs=settings.retraining_epochs, rate=settings.retraining_rate)

    def retrained(contrast: PrototypeContrast | None) -> Retrained:
        return Retrained(
            "creff",
            last=settings.last,
            each=settings.each,
            matching=Matching(settings.matching_steps, settings.matching_rate, settings.matching_cosine),
            retraining=retraining,
            contrast=contrast,
            text=None if contrast is None else tail.source.text,
            text_start=settings.text_start,
            rows=settings.class_gradients,
            draws=ClassDraws() if settings.class_images == "draws" else None,
            warm=settings.warm_start,
            seed=seed,
        )

    if name == "tau-norm":
        return TauNormalised(tau=settings.tau)
    if name == "ccvr":
        return VirtualFeatures(each=settings.each, retraining=retraining, seed=seed)
    if name in ("creff", "creff-distilled"):
        return retrained(None)
    if name == "clip2fl-published":
        reduction: Any = "sum" if settings.contrast_sum else "mean"
        return retrained(
            PrototypeContrast(
                settings.contrast, settings.contrast_temperature, negatives=settings.negatives, reduction=reduction
            )
        )
    return None
