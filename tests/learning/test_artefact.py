"""Adapter files come back as they went, refuse other encoders, and fail clearly when damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedsecure.errors import EnvironmentProblem, ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.artefact import AdapterMetadata, load_adapter, save_adapter
from fedsecure.learning.evaluation import predict
from fedsecure.learning.task import HeadTask

FINGERPRINT = "ab" * 32


def saved(path: Path, kind: str = "linear", *, epsilon: float | None = 7.5) -> tuple[HeadTask, dict[str, np.ndarray]]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    spec = AdapterSpec(kind, 8, 3)  # type: ignore[arg-type]
    task = HeadTask(spec, rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32) * 0.1, 12.5)
    tensors = {n: v + rng.normal(size=v.shape).astype(np.float32) for n, v in spec.initial(b"").items()}
    metadata = AdapterMetadata(
        model="ViT-B-32",
        pretrained="openai",
        fingerprint=FINGERPRINT,
        prompt="a picture of a {}",
        classes=("glioma", "méningiome", "none"),
        temperature=12.5,
        epsilon=epsilon,
        delta=1e-5,
        unit="patient",
        rounds=20,
        preprocessing={"size": [224, 224]},
        extra={"run": "00"},
    )
    save_adapter(path, task, tensors=tensors, metadata=metadata)
    return task, tensors


@pytest.mark.parametrize("kind", ["linear", "facmic"])
@pytest.mark.parametrize("epsilon", [7.5, None])
def test_round_trip(tmp_path: Path, kind: str, epsilon: float | None) -> None:
    path = tmp_path / "adapter.safetensors"
    task, tensors = saved(path, kind, epsilon=epsilon)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    adapter = load_adapter(path)
    assert adapter.metadata.classes == ("glioma", "méningiome", "none")
    assert adapter.metadata.epsilon == epsilon
    assert adapter.metadata.preprocessing == {"size": [224, 224]}
    features = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    labels, probabilities = adapter.predict(features, fingerprint=FINGERPRINT, device="cpu")
    expected = predict(task, tensors, features, device="cpu")
    assert np.array_equal(labels, expected[0])
    assert np.array_equal(probabilities, expected[1])
    with pytest.raises(ModelError, match=r"FS-1636.*ViT-B-32, openai"):
        adapter.predict(features, fingerprint="cd" * 32)


def test_unreadable_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="FS-1634"):
        load_adapter(tmp_path / "absent.safetensors")
    path = tmp_path / "adapter.safetensors"
    saved(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 200, b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="FS-1634"):
            load_adapter(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    saved(path)
    good = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        header = dict(file.metadata())
    facts = json.loads(header["adapter"])

    def refused(arrays: object, metadata: dict[str, str] | None, code: str = "FS-1635") -> None:
        save_file(arrays, path, metadata=metadata)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=code):
            load_adapter(path)

    refused(good, None)
    refused(good, {**header, "format": "fedsecure-adapter/2"})
    refused(good, {"format": header["format"]})
    refused(good, {**header, "adapter": "[]"})
    refused(good, {**header, "adapter": json.dumps({k: v for k, v in facts.items() if k != "epsilon"})})
    refused(good, {**header, "adapter": json.dumps({**facts, "temperature": "warm"})})
    refused({k: v for k, v in good.items() if k != "centre"}, header)
    refused({k: v for k, v in good.items() if k != "text"}, header, "FS-163[45]")
    refused({**good, "more": np.zeros(1, np.float32)}, header)
    refused({**good, "D": good["D"].astype(np.float64)}, header)
    refused({**good, "D": good["D"] * np.nan}, header)
    refused(good, {**header, "adapter": json.dumps({**facts, "kind": "mlp"})}, "FS-1631")
    refused({**good, "D": good["D"][:2]}, header, "FS-1632")
    refused({**good, "centre": good["centre"][:5]}, header, "FS-1633")
    refused(good, {**header, "adapter": json.dumps({**facts, "temperature": -1})}, "FS-1633")


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    task, tensors = saved(path)
    before = path.read_bytes()
    metadata = load_adapter(path).metadata
    with pytest.raises(ModelError, match="FS-1632"):
        save_adapter(path, task, tensors={"D": tensors["D"].T}, metadata=metadata)
    assert path.read_bytes() == before
    with pytest.raises(EnvironmentProblem, match="FS-1802"):
        save_adapter(tmp_path / "no" / "folder", task, tensors=tensors, metadata=metadata)
