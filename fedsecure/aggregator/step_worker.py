"""Long computations of a method's server half, in a child process: the aggregator's calls never wait for them.

The aggregator never imports torch (architecture.md, "Floors"); a method that needs it after a sum, or that merely takes
long, computes here. The child gets settings and state and gives back a state, both as one safetensors file with JSON in
its header: nothing is unpickled, and both sides check sizes before they read. Files without names carry them, so
neither side can block the other; a pipe tells the child when its parent is gone. The sum that a computation starts from
is on disk before it begins, so what goes wrong here loses no sum, and the sites' charges bought what they bought. What
the machine does to it (no memory, no space, a signal) has an ``OSError`` as its cause: the next process computes again.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedsecure.config import FederationConfig, RunSettings
from fedsecure.errors import EnvironmentProblem, FedsecureError, ModelError, RunError
from fedsecure.methods.base import ComputingMethod, ServerState
from fedsecure.methods.registry import load_method

MAX_BYTES = 1 << 30
_MAX_HEADER = 16 << 20
_KEY = "fedsecure-step/1"
# Their threads wait for each other by spinning, which costs more than it saves in small products on a busy machine.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
log = logging.getLogger("fedsecure.aggregator")


def check_encoder_file(config: FederationConfig) -> None:
    """Refuse, before any site joins, a run whose computation will lack what it starts from.

    Raises:
        ModelError: FS-1640 the run leaves the encoder's file to each party, and the aggregator names none.
        ConfigError: FS-1004 no such method.
    """
    settings = config.settings()
    method = load_method(settings.method.name)
    encoder = settings.encoder
    left_to_parties = encoder.model == "features" or encoder.pretrained == "file"
    if config.encoder_file is not None or not left_to_parties or not hasattr(method, "computes"):
        return
    if cast(ComputingMethod, method).computes(settings):
        raise ModelError(
            "FS-1640",
            f"method {settings.method.name!r} computes with the class texts at the aggregator, whose file names none",
            expected="encoder_file in federation.toml, as the sites name theirs",
            cure="set encoder_file to the aggregator's copy of the weights or feature file",
        )


class StepWorker:
    """One computation in a process of its own, asked now and then whether it is done.

    Args:
        settings: of the run; its method has something to compute.
        state: where it starts.
        encoder_file: the aggregator's copy of the encoder's weights or of the feature file, for the class texts.
        target_file: its copy of the target that the run aligns with.
        deadline: the ``now`` at which it counts as failed.

    Raises:
        RunError: FS-1721 the process cannot be started, or the state is too large for it.
    """

    def __init__(
        self,
        settings: RunSettings,
        state: ServerState,
        *,
        deadline: float,
        encoder_file: Path | None = None,
        target_file: Path | None = None,
    ) -> None:
        self._deadline = deadline
        facts = {
            "settings": settings.canonical(),
            "encoder_file": str(encoder_file) if encoder_file else None,
            "target_file": str(target_file) if target_file else None,
        }
        self._files = ExitStack()
        try:
            self._answer = self._files.enter_context(_nameless())
            self._errors = self._files.enter_context(_nameless())
            with _nameless() as question:
                question.write(pack(state, facts))
                question.seek(0)
                files = (question.fileno(), self._answer.fileno())
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "fedsecure.aggregator.step_worker", *map(str, files)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    pass_fds=files,
                    env={**_ONE_THREAD, **os.environ},
                )
        except OSError as error:
            self._files.close()
            raise _failed(f"it cannot be started ({error.strerror or type(error).__name__})", again=True) from error
        except BaseException:
            self._files.close()
            raise

    def poll(self, now: float) -> ServerState | None:
        """The new state, or None while it is being computed; once it has answered or raised, it is over.

        Raises:
            RunError: FS-1721 the child died, or its answer is none; FS-1722 it took too long.
        """
        status = self._process.poll()
        if status is None:
            if now < self._deadline:
                return None
            self.stop()
            raise RunError(
                "FS-1722",
                "the method's computation at the aggregator took longer than rounds.training_seconds",
                expected="an end within that time",
                cure="let it have a faster machine, or this one to itself, and start `fedsecure serve` again: the run "
                "goes on from its last sum; or end it: fedsecure runs stop",
            )
        try:
            return self._read(status)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the child, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._files.close()

    def _read(self, status: int) -> ServerState:
        if status != 0:
            self._errors.seek(max(0, os.fstat(self._errors.fileno()).st_size - 4000))
            log.error("the computation failed: %s", self._errors.read().decode("utf-8", "replace").strip())
            if status < 0:
                raise _unlucky(f"it was ended by signal {-status}")
            if status == os.EX_OSERR:
                raise _unlucky("this machine had no room for it, or could not read for it")
            raise _failed(f"it ended with status {status}")
        try:
            state, facts = unpack(self._answer)
        except ValueError as error:
            raise _failed(f"its answer is {error}") from error
        if "error" in facts:
            why = str(facts["error"])[:1000]
            raise _unlucky(why) if facts.get("machine") else _failed(why)
        return state


def pack(state: ServerState, facts: Mapping[str, Any]) -> bytes:
    """A state, and facts about it, as one safetensors file.

    Raises:
        RunError: FS-1721 more than 1 GiB.
    """
    header = json.dumps({"step": state.step, "facts": dict(state.facts), "about": dict(facts)})
    arrays = {name: np.ascontiguousarray(value) for name, value in state.tensors.items()}
    size = sum(array.nbytes for array in arrays.values())
    if size + len(header) > MAX_BYTES or len(header) > _MAX_HEADER // 2:
        raise _failed(f"its state of {size + len(header)} bytes is too large")
    return save_tensors(arrays, metadata={_KEY: header})


def unpack(file: IO[bytes]) -> tuple[ServerState, Mapping[str, Any]]:
    """Inverse of :func:`pack`; raises ``ValueError`` in words where the file is no such thing."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if not 8 <= size <= MAX_BYTES + _MAX_HEADER:
        raise ValueError(f"a file of {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_HEADER, size - 8):
        raise ValueError("cut off, or has a header that is too long")
    try:
        raw = json.loads(json.loads(file.read(length))["__metadata__"][_KEY])
        file.seek(0)
        tensors = load_tensors(file.read())
        state = ServerState(step=int(raw["step"]), tensors=tensors, facts=dict(raw["facts"]))
        return state, dict(raw["about"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"malformed ({type(error).__name__})") from error


def compute(file: IO[bytes]) -> bytes:
    """What the child does: a packed state in, a packed state out, or the error of fedsecure that came up."""
    from fedsecure.learning.features import load_site_features
    from fedsecure.methods.constants import with_target

    state, about = unpack(file)
    settings = RunSettings.parse(about["settings"])
    copy, target = (Path(about[name]) if about.get(name) else None for name in ("encoder_file", "target_file"))
    try:
        features = load_site_features(settings.encoder, settings.classes, file=copy, device="cpu")
        features = with_target(settings, features, target)
        method = cast(ComputingMethod, load_method(settings.method.name))
        return pack(method.compute(settings, state, features), {})
    except FedsecureError as error:
        return pack(ServerState(), {"error": str(error), "machine": isinstance(error, EnvironmentProblem)})


def _nameless() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _failed(why: str, *, again: bool = False) -> RunError:
    mend = "free memory and space, and start `fedsecure serve` again: the run goes on from its last sum"
    return RunError(
        "FS-1721",
        f"the method's computation at the aggregator failed: {why}",
        expected="a state computed from the last sum",
        cure=mend if again else "see the aggregator's log; the last sum is in the run's folder, and the charges stand",
    )


def _unlucky(why: str) -> RunError:
    """The machine failed the child, not the method."""
    failure = _failed(why, again=True)
    failure.__cause__ = ChildProcessError(why)
    return failure


def _end_with_parent() -> None:
    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> None:
    """The child: descriptors of the question and of the answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_with_parent()
    try:
        with os.fdopen(int(arguments[0]), "rb") as question, os.fdopen(int(arguments[1]), "wb") as answer:
            answer.write(compute(question))
    except (OSError, MemoryError):
        with suppress(OSError):
            traceback.print_exc()
        # An orderly end may fail for want of the same room, with another status.
        os._exit(os.EX_OSERR)


if __name__ == "__main__":
    main(sys.argv[1:])
