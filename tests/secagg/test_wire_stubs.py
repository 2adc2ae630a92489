"""The committed protobuf stubs are those of the ``.proto`` files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

GENERATE = Path(__file__).parents[2] / "protos" / "generate.py"


@pytest.fixture
def generate() -> ModuleType:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is in the extra [dev]")
    spec = importlib.util.spec_from_file_location("protos_generate", GENERATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_stubs_have_the_descriptors_of_their_sources(generate: ModuleType) -> None:
    assert "fedsecure/v1/secagg.proto" in generate.sources()
    assert generate.stale() == []


def test_a_changed_source_is_noticed(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fedsecure" / "v1"
    folder.mkdir(parents=True)
    text = (GENERATE.parent / "fedsecure" / "v1" / "secagg.proto").read_text()
    monkeypatch.setattr(generate, "PROTOS", tmp_path)
    (folder / "secagg.proto").write_text(text)
    assert generate.stale() == []
    (folder / "secagg.proto").write_text(text.replace("bytes mask_key = 3", "bytes mask_key = 9"))
    assert generate.stale() == ["fedsecure/v1/secagg.proto"]
