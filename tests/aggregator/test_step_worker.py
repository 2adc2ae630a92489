"""Computations of the aggregator in a process of their own: whatever becomes of the child is an answer or one error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from fedsecure.aggregator.program import serve
from fedsecure.aggregator.step_worker import StepWorker, check_encoder_file, compute, pack, unpack
from fedsecure.config import FederationConfig, RunSettings
from fedsecure.errors import ModelError, RunError
from fedsecure.methods.base import ServerState
from tests.federation_world import write_features

STATE = ServerState(step=3, tensors={"D": np.ones((3, 16), np.float32)}, facts={"seen": [1, 2]})


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "features.npz"
    write_features(path)
    return path


def settings_of(features: Path, *, method: str = "linear", alignment: dict[str, object] | None = None) -> RunSettings:
    from fedsecure.data.loading import read_feature_header

    header = read_feature_header(features)
    encoder = {"model": "features", "pretrained": "file", "dimension": 16, "fingerprint": header.fingerprint}
    raw = {"classes": header.classes, "encoder": encoder, "method": {"name": method, "alignment": alignment or {}}}
    return RunSettings.model_validate({**raw, "sites": {f"s{i}": {"max_units": 30} for i in range(3)}})


def start(settings: RunSettings, file: Path | None, *, seconds: float = 100.0) -> StepWorker:
    return StepWorker(settings, STATE, encoder_file=file, deadline=time.monotonic() + seconds)


def config_of(settings: RunSettings, folder: Path, **own: object) -> FederationConfig:
    raw = {**settings.model_dump(), "state": folder / "state", "identity": folder / "identity", **own}
    return FederationConfig.model_validate(raw)


def outcome(worker: StepWorker) -> ServerState:
    while (state := worker.poll(time.monotonic())) is None:
        time.sleep(0.02)
    return state


@contextmanager
def packed(state: ServerState, facts: dict[str, object]) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(pack(state, facts))
        file.flush()
        yield file


def test_a_state_travels_whole():
    with packed(STATE, {"settings": "…"}) as file:
        state, facts = unpack(file)
    assert (state.step, state.facts, facts) == (3, {"seen": [1, 2]}, {"settings": "…"})
    np.testing.assert_array_equal(state.tensors["D"], STATE.tensors["D"])
    assert state.tensors["D"].dtype == np.float32
    with packed(ServerState(), {}) as empty:
        assert unpack(empty)[0] == ServerState()


@pytest.mark.parametrize("raw", [b"", b"\x00" * 7, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{}", b"\x80\x04K\x01." * 9])
def test_what_is_no_state_is_refused_in_words(raw: bytes):
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        with pytest.raises(ValueError, match="a file of|cut off|malformed"):
            unpack(file)


def test_a_state_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedsecure.aggregator.step_worker.MAX_BYTES", 100)
    with pytest.raises(RunError, match="FS-1721.*too large"):
        pack(STATE, {})


def test_an_error_of_the_child_comes_back_in_its_own_words(features: Path):
    # The aggregator names no feature file, so the child cannot have the class texts.
    with pytest.raises(RunError, match="FS-1721.*FS-1640") as caught:
        outcome(start(settings_of(features), None))
    assert not isinstance(caught.value.__cause__, OSError), "no other machine would do better"


def test_a_child_that_fails_is_an_error_and_its_trace_is_in_the_log(features: Path, caplog: pytest.LogCaptureFixture):
    # The linear method has nothing to compute.
    with pytest.raises(RunError, match="FS-1721.*status 1") as caught:
        outcome(start(settings_of(features), features))
    assert "AttributeError" in caplog.text
    assert not isinstance(caught.value.__cause__, OSError)


def test_a_killed_child_is_an_error(features: Path):
    worker = start(settings_of(features), features)
    worker._process.kill()
    with pytest.raises(RunError, match="FS-1721.*signal 9") as caught:
        outcome(worker)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_child_without_room_for_its_answer_is_an_error_of_the_machine(
    features: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with ExitStack() as stack:
        answer = stack.enter_context(open("/dev/full", "r+b", buffering=0))
        files = iter([answer, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))])
        monkeypatch.setattr("fedsecure.aggregator.step_worker._nameless", lambda: next(files))
        with pytest.raises(RunError, match="FS-1721.*no room") as caught:
            outcome(start(settings_of(features), None))
    assert isinstance(caught.value.__cause__, OSError)
    assert "No space left" in caplog.text


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_no_room_for_the_question_is_an_error_of_the_machine(
    features: Path, monkeypatch: pytest.MonkeyPatch, opened: int
):
    files: list[IO[bytes]] = []
    nameless = tempfile.TemporaryFile

    def full() -> IO[bytes]:
        if len(files) == opened:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.append(nameless())
        return files[-1]

    monkeypatch.setattr("fedsecure.aggregator.step_worker._nameless", full)
    with pytest.raises(RunError, match="FS-1721.*No space left") as caught:
        start(settings_of(features), features)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(files) == opened
    assert all(file.closed for file in files)


def test_a_child_that_takes_too_long_is_ended(features: Path):
    worker = start(settings_of(features), features, seconds=-1.0)
    with pytest.raises(RunError, match="FS-1722"):
        worker.poll(time.monotonic())
    assert worker._process.returncode is not None
    worker.stop()  # once more does no harm


def test_a_child_ends_with_its_parent():
    # The same thread that ends a child whose parent has died; its computation here would last for ever.
    code = "import time; from fedsecure.aggregator.step_worker import _end_with_parent as e; e(); print(1, flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", code + "; time.sleep(600)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"1\n"
        child.stdin.close()
        assert child.wait(60) == 1


def test_the_child_computes_without_any_process_too(features: Path):
    about = {"settings": settings_of(features).canonical(), "encoder_file": None}
    with packed(STATE, about) as question, tempfile.TemporaryFile() as answer:
        answer.write(compute(question))
        answer.flush()
        assert "FS-1640" in unpack(answer)[1]["error"]


AT_AGGREGATOR = {"weight": 1.0, "target": "ab" * 32, "prototypes": True, "at": "aggregator"}
AT_SITES = {**AT_AGGREGATOR, "at": "sites"}


@pytest.mark.parametrize(("method", "alignment"), [("clip2fl", {}), ("facmic", AT_AGGREGATOR)])
def test_an_aggregator_that_will_lack_the_class_texts_does_not_start(
    tmp_path: Path, features: Path, method: str, alignment: dict[str, object]
):
    settings = settings_of(features, method=method, alignment=alignment)
    with pytest.raises(ModelError, match=r"FS-1640.*federation\.toml"):
        serve([config_of(settings, tmp_path)], announce=lambda *_: None, watch=lambda _: None)
    assert not (tmp_path / "state").exists()
    check_encoder_file(config_of(settings, tmp_path, encoder_file=features))


@pytest.mark.parametrize(("method", "alignment"), [("linear", {}), ("facmic", {}), ("facmic", AT_SITES)])
def test_an_aggregator_that_computes_nothing_needs_no_file(
    tmp_path: Path, features: Path, method: str, alignment: dict[str, object]
):
    check_encoder_file(config_of(settings_of(features, method=method, alignment=alignment), tmp_path))


def test_an_encoder_that_is_installed_everywhere_needs_no_file(tmp_path: Path, features: Path):
    settings = settings_of(features, method="clip2fl")
    encoder = settings.encoder.model_copy(update={"model": "fedsecure-tiny", "pretrained": "bundled"})
    check_encoder_file(config_of(settings.model_copy(update={"encoder": encoder}), tmp_path))
    named = encoder.model_copy(update={"pretrained": "file"})
    with pytest.raises(ModelError, match="FS-1640"):
        check_encoder_file(config_of(settings.model_copy(update={"encoder": named}), tmp_path))
