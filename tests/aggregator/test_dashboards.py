"""TensorBoard and MLflow get the released figures, without torch, without the network, without holding anybody up."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from aggregator.made_up_run import RUN, run

from fedsecure.aggregator import dashboards
from fedsecure.aggregator.dashboards import Background, TensorBoard
from fedsecure.aggregator.happenings import Happening

CURVES = {
    "evaluation/accuracy": [(0, 0.5), (2, 0.75)],
    "evaluation/balanced_accuracy": [(0, 0.4)],
    "round/survivors": [(1, 2.0), (2, 3.0)],
    "round/seconds": [(1, 2.5), (2, 3.5)],
    "round/attempts": [(1, 2.0), (2, 1.0)],
    "privacy/epsilon": [(0, 0.0), (1, 1.0), (2, 2.0)],
}


def curves_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "boards", RUN)
    for happening in run():
        board(happening)
    board.close()
    assert curves_in(tmp_path / "boards" / RUN) == CURVES


def test_without_epsilon_there_is_no_curve_of_it(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, RUN)
    for happening in run(epsilon=False):
        board(happening)
    board.close()
    assert set(curves_in(tmp_path / RUN)) == set(CURVES) - {"privacy/epsilon"}


# MLflow takes seconds to be imported and to make its database, and changes a process's logging: it gets its own.
TRACKED = """
import socket, sys
from pathlib import Path
def refuse(*a, **k): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = refuse
sys.path.insert(0, {tests!r})
from aggregator.made_up_run import RUN, run
from fedsecure.aggregator.dashboards import MLflow, TensorBoard
uri, told = "sqlite:///{folder}/mlflow.db", run()
for part in (told[:20], told[20:]):
    tracked = MLflow(uri, "federation")
    for happening in part:
        tracked(happening)
    tracked.close(seconds=200)
TensorBoard(Path({folder!r}), RUN).close()
assert not {{"torch", "tensorflow", "keras"}} & set(sys.modules), "the aggregator stays without torch"
import os
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=uri)
(one,) = client.search_runs([client.get_experiment_by_name("federation").experiment_id])
assert one.data.tags["fedsecure.run"] == RUN
assert one.data.params == {{"method": "linear", "rounds": "2"}}, one.data.params
assert one.info.status == "FINISHED"
history = {{name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics}}
curves = {{name: [(m.step, m.value) for m in points] for name, points in history.items()}}
assert {{name: sorted(points) for name, points in curves.items()}} == {curves!r}, curves
"""


@pytest.mark.slow
def test_mlflow_has_them_too_without_torch_and_without_the_network(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    code = TRACKED.format(tests=tests, folder=str(tmp_path), curves=CURVES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


class Recorded:
    """Stands for MLflow's client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.calls.append((name, args))
            if name == "search_runs":
                return []
            if name == "get_experiment_by_name":
                return None
            return type("Run", (), {"info": type("Info", (), {"run_id": "r1"})})

        return call


@pytest.mark.parametrize("complete", [True, False])
def test_what_mlflow_is_sent(monkeypatch: pytest.MonkeyPatch, complete: bool) -> None:
    client = Recorded()
    monkeypatch.setattr(dashboards.MLflow, "_connected", lambda self: client)
    tracked = dashboards.MLflow("sqlite://", "federation")
    for happening in run(complete=complete):
        tracked(happening)
    tracked.close(seconds=60)
    sent = [args for name, args in client.calls if name == "log_metric"]
    assert {name for _, name, _ in sent} == set(CURVES)
    (ended,) = [args for name, args in client.calls if name == "set_terminated"]
    assert ended == ("r1", "FINISHED" if complete else "FAILED")
    assert [args for name, args in client.calls if name == "set_tag"] == (
        [] if complete else [("r1", "fedsecure.code", "FS-1702")]
    )


def test_one_that_hangs_or_fails_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dashboards, "QUEUE", 3)
    gate, heard = threading.Event(), list[str]()

    def stuck(happening: Happening) -> None:
        gate.wait(60)
        heard.append(happening.kind)
        raise ValueError("no route")

    with caplog.at_level(logging.WARNING):
        background = Background(stuck, name="board")
        for _ in range(20):
            background(Happening("alarm", RUN, 0.0, {}))
        background.close(seconds=0.05)
        gate.set()
        background.close(seconds=60)
    assert 3 <= len(heard) <= 4
    assert sum("does not keep up" in record.getMessage() for record in caplog.records) == 1
    assert sum("board fails" in record.getMessage() for record in caplog.records) == 1
