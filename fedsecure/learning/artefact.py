"""The trained adapter as one ``safetensors`` file that says what it is, what it was trained on and at what price.

It holds the text embeddings and the public mean beside the adapter's tensors, so it works on feature files without any
encoder, and it refuses features of another encoder. Statistics of public images that normalise an adapter are in its
tensors. Learned prompts stand in it as the texts they amount to; changes
inside the visual tower need the tower, and so images. No pickle, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError
from fedsecure.files import write_whole
from fedsecure.learning.adapters import AdapterSpec, Float32, Vector
from fedsecure.learning.evaluation import predict
from fedsecure.learning.features import Inputs
from fedsecure.learning.student_spec import STAGES, resnet8_spec
from fedsecure.learning.task import HeadTask
from fedsecure.learning.towers import TowerSpec, last_block_spec, lora_spec, prompt_spec

if TYPE_CHECKING:
    from fedsecure.learning.tower_task import TowerTask

FORMAT = "fedsecure-adapter/1"
_CONSTANTS = ("text", "centre")
# The (K, d) texts that learned prompts amount to.
_LEARNED = "learned"
_MAX_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class AdapterMetadata:
    """What the file says about itself.

    Attributes:
        model, pretrained, fingerprint: the encoder; SHA-256 in hex of weights, architecture and preprocessing.
        preprocessing: the encoder's own, as JSON-able facts.
        prompt: template of the class prompts.
        classes: in label order.
        temperature: τ.
        epsilon: spent by the run, of the site that spent most; None where nothing was protected.
        delta: δ of ``epsilon``.
        unit: ``"patient"`` or ``"record"``.
        rounds: completed.
        extra: further facts, strings only.
    """

    model: str
    pretrained: str
    fingerprint: str
    prompt: str
    classes: tuple[str, ...]
    temperature: float
    epsilon: float | None
    delta: float
    unit: str
    rounds: int
    preprocessing: Mapping[str, Any]
    extra: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A loaded adapter: ``predict`` takes features of the encoder named in the metadata.

    Attributes:
        task: what features are classified with.
        tensors: what was trained, as in ``spec.shapes``.
        metadata: what the file says about itself.
        spec: the adapter's; another than the task's for methods inside the towers.
        zero_shot: the linear head that the encoder alone is.
    """

    task: HeadTask
    tensors: Mapping[str, Float32]
    metadata: AdapterMetadata
    spec: AdapterSpec
    zero_shot: HeadTask

    @property
    def inputs(self) -> Inputs:
        """What it predicts from: features, or rows of images where it lies inside the visual tower."""
        kinds: Mapping[str, Inputs] = {"lora": "pixels", "last_block": "tokens", "resnet8": "thumbnails"}
        return kinds.get(self.spec.kind, "features")

    def check_encoder(self, fingerprint: str) -> None:
        """Refuse another encoder: ModelError FS-1636."""
        if fingerprint != self.metadata.fingerprint:
            raise ModelError(
                "FS-1636",
                f"encoder fingerprint {fingerprint[:16]}…",
                expected=f"{self.metadata.fingerprint[:16]}… ({self.metadata.model}, {self.metadata.pretrained})",
                cure="use the encoder, weights and preprocessing the adapter was trained on",
            )

    def predict(
        self, features: npt.NDArray[Any], *, fingerprint: str, device: str = "auto"
    ) -> tuple[npt.NDArray[np.int64], Vector]:
        """Labels (n,) and probabilities (n, K) for (n, d) features of the encoder ``fingerprint``.

        Raises:
            ModelError: FS-1636 another encoder, FS-1675 an adapter inside the visual tower, FS-1638 as
                :func:`fedsecure.learning.evaluation.predict`.
        """
        self.check_encoder(fingerprint)
        if self.inputs != "features":
            raise ModelError(
                "FS-1675",
                "features, and an adapter inside the visual tower that makes them",
                expected="images",
                cure="use `fedsecure predict` or `fedsecure evaluate` with images",
            )
        # Learned prompts are in the task's texts, so its head is the zero-shot one.
        held = self.tensors if self.spec == self.task.spec else self.task.spec.initial(b"")
        return predict(self.task, held, features, device=device)


def save_adapter(
    path: Path | str, task: HeadTask | TowerTask, *, tensors: Mapping[str, npt.NDArray[Any]], metadata: AdapterMetadata
) -> None:
    """Write the adapter; the file appears whole or not at all.

    Where the task has public images to normalise by, what is written is the same adapter without need of them.

    Raises:
        ModelError: FS-1632 when the tensors do not fit the task's spec.
        EnvironmentProblem: FS-1802 when the file cannot be written.
    """
    from safetensors.numpy import save

    task.spec.flatten(tensors)
    if isinstance(task, HeadTask) and task.public is not None:
        from fedsecure.learning.modules import without_public

        task, tensors = without_public(task, tensors)
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    arrays |= {name: np.ascontiguousarray(getattr(task, name), np.float32) for name in _CONSTANTS}
    if not isinstance(task, HeadTask) and task.texts is not None:
        arrays[_LEARNED] = task.texts(tensors)
    facts: dict[str, Any] = {
        "kind": task.spec.kind,
        **{name: getattr(metadata, name) for name in AdapterMetadata.__slots__},
        "classes": list(metadata.classes),
        "preprocessing": dict(metadata.preprocessing),
        "extra": dict(metadata.extra),
    }
    raw = save(arrays, metadata={"format": FORMAT, "adapter": json.dumps(facts, sort_keys=True)})
    write_whole(Path(path), raw)


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter file.

    Raises:
        ModelError: FS-1634 unreadable, truncated or no safetensors; FS-1635 not an adapter of this format; FS-1631 to
            FS-1633 when its tensors contradict its metadata.
    """
    from safetensors import SafetensorError, safe_open

    target = Path(path)
    try:
        if target.stat().st_size > _MAX_BYTES:
            raise _foreign(target, f"{target.stat().st_size} bytes")
        with safe_open(target, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise _foreign(target, f"format {header.get('format')!r:.60}")
            names = set(file.keys())
            facts = json.loads(header.get("adapter", ""))
            metadata = _metadata(facts)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(names)}
            spec = _spec(str(facts["kind"]), metadata, shapes)
            learned = (_LEARNED,) if isinstance(spec, TowerSpec) and spec.kind == "promptfl" else ()
            if names != {*spec.shapes, *_CONSTANTS, *learned}:
                raise _foreign(target, f"tensors {sorted(names)!s:.120}")
            arrays = {name: np.asarray(file.get_tensor(name)) for name in sorted(names)}
    except OSError as error:
        raise ModelError(
            "FS-1634",
            f"{target} cannot be read ({error.strerror or type(error).__name__})",
            expected="a readable adapter file",
            cure="check the path and its permissions",
        ) from error
    except SafetensorError as error:
        raise ModelError(
            "FS-1634",
            f"{target} is no safetensors file or is damaged ({error!s:.120})",
            expected="a complete safetensors file",
            cure="copy or download it again",
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _foreign(target, f"metadata that cannot be read ({type(error).__name__})") from error
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays.values()):
        raise _foreign(target, "tensors that are not finite float32 values")
    tensors = {name: arrays[name] for name in spec.shapes}
    spec.flatten(tensors)
    head = AdapterSpec("linear", arrays["text"].shape[-1], len(metadata.classes))
    zero_shot = HeadTask(head, arrays["text"], arrays["centre"], metadata.temperature)
    task = zero_shot
    if _LEARNED in arrays:
        task = replace(zero_shot, text=arrays[_LEARNED])
    elif not isinstance(spec, TowerSpec):
        task = replace(zero_shot, spec=spec)
    return Adapter(task, tensors, metadata, spec, zero_shot)


def _spec(kind: str, metadata: AdapterMetadata, shapes: Mapping[str, tuple[int, ...]]) -> AdapterSpec:
    """The adapter that tensors of these shapes are of, as far as the file's own facts say."""
    classes = len(metadata.classes)
    if kind == "promptfl":
        length = shapes["context"][0]
        return prompt_spec(metadata.model, classes=classes, contexts="shared", length=length, at_template=True)
    if kind == "lora":
        return lora_spec(metadata.model, classes=classes, rank=shapes["0.c_fc.A"][0])
    if kind == "last_block":
        return last_block_spec(metadata.model, classes=classes)
    if kind == "resnet8":
        width = shapes["conv.weight"][0] // STAGES[0]
        return resnet8_spec(classes=classes, dimension=shapes["text"][1], width=width)
    return AdapterSpec(kind, int(shapes["text"][1]), classes)  # type: ignore[arg-type]


def _metadata(facts: Mapping[str, Any]) -> AdapterMetadata:
    return AdapterMetadata(
        model=str(facts["model"]),
        pretrained=str(facts["pretrained"]),
        fingerprint=str(facts["fingerprint"]),
        prompt=str(facts["prompt"]),
        classes=tuple(str(name) for name in facts["classes"]),
        temperature=float(facts["temperature"]),
        epsilon=None if facts["epsilon"] is None else float(facts["epsilon"]),
        delta=float(facts["delta"]),
        unit=str(facts["unit"]),
        rounds=int(facts["rounds"]),
        preprocessing=dict(facts["preprocessing"]),
        extra={str(key): str(value) for key, value in facts["extra"].items()},
    )


def _foreign(path: Path, found: str) -> ModelError:
    return ModelError(
        "FS-1635",
        f"{path} holds {found}",
        expected=f"an adapter of format {FORMAT}",
        cure="use a file written by this program, or upgrade it",
    )
