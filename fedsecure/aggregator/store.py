"""The aggregator's folder on disk: one folder a run, every file written whole or not at all.

<state>/address                     host:port the service listens on
<state>/runs/<run>/federation.json  the public settings of the run
<state>/runs/<run>/rounds.jsonl     one line an attempt: question, survivors, seconds, or why it was aborted
<state>/runs/<run>/state.safetensors, state.json   the method's state after the last sum
<state>/runs/<run>/status.json      what is going on, for people and progress bars
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from fedsecure.config import RunSettings
from fedsecure.files import make_folder, write_whole


class RunStore:
    """Files of one run."""

    def __init__(self, state: Path, run: bytes) -> None:
        self.folder = make_folder(state / "runs" / run.hex())

    def settings(self, settings: RunSettings) -> None:
        write_whole(self.folder / "federation.json", settings.canonical().encode())

    def progress(
        self, *, round: int, stage: str, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """The state after a sum; the tensors first, so that the JSON never names what is not there."""
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        write_whole(self.folder / "state.safetensors", save_tensors(arrays))
        raw = {"round": round, "stage": stage, "step": step, "facts": dict(facts)}
        write_whole(self.folder / "state.json", json.dumps(raw, indent=2).encode())

    def attempt(self, record: Mapping[str, Any]) -> None:
        """Append one attempt to the round log, durably."""
        with (self.folder / "rounds.jsonl").open("ab") as file:
            file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def transcript(self, name: str) -> Callable[[bytes | memoryview], object]:
        """Where the transcript of an attempt, or of a set-up of keys, is appended to."""
        file = make_folder(self.folder / "transcripts") / name

        def write(data: bytes | memoryview) -> None:
            with file.open("ab") as opened:
                opened.write(data)

        return write

    def status(self, status: Mapping[str, Any]) -> None:
        write_whole(self.folder / "status.json", json.dumps(status, sort_keys=True).encode())
