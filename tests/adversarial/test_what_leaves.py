"""Everything that leaves a site in a whole run: how many messages, of which kinds and sizes, is the same for any data.

A spy in the transport keeps every byte a site sends. What its messages hold is masked or noised, which other tests
show; here it is their number and size, which no noise covers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.errors import FedsecureError
from fedsecure.site import line, sources
from fedsecure.site.rounds import Rounds
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

ONE_RELEASE = ("prototypes", "ridge")
# Made of local steps, and refuse distributed noise; made for images, and refuse this world's features.
LOCAL_STEPS = ("fedavg", "fedprox", "moon")
IN_TOWERS = ("promptfl", "lora", *(f"{name}_block" for name in LOCAL_STEPS))
INSTALLED = sorted({point.name for point in entry_points(group="fedsecure.methods")} - {"evaluate", *IN_TOWERS})
RUNS = [(m, n) for m in INSTALLED for n in ("distributed", "local") if n == "local" or m not in LOCAL_STEPS]
FEW, MANY = 4, 30


class Spy(MemoryTransport):
    """Keeps what goes out. Polls and beats come as time passes, so of those only what they say counts."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sent: list[tuple[str, int]] = []
        self.bytes: list[bytes] = []
        self.pulse: set[tuple[str, bytes]] = set()

    def _keep(self, kind: str, *parts: bytes) -> None:
        self.sent += [(kind, len(part)) for part in parts]
        self.bytes += parts

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        self._keep("join", request.SerializeToString())
        self.session = request.session
        return super().join(request)

    def next(self, request: pb.NextRequest) -> pb.Directive:
        assert request == pb.NextRequest(session=self.session, after=request.after)
        return super().next(request)

    def send(self, message: pb.PhaseMessage) -> None:
        self._keep("send", message.SerializeToString())
        super().send(message)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self._keep("upload", header.SerializeToString(), bytes(payload))
        super().upload(header, payload)

    def fetch(self, request: pb.FetchRequest) -> bytes:
        self._keep("fetch", request.SerializeToString())
        return super().fetch(request)

    def beat(self, request: pb.BeatRequest) -> None:
        assert request == pb.BeatRequest(session=self.session, leaving=request.leaving)
        self.pulse.add(("beat", request.leaving.encode()))
        super().beat(request)


def replace_records(world: World, *, units: int) -> list[bytes]:
    """Other private records in the same file, at each site: ``units`` of them, or one class only; their rows."""
    with np.load(world.features) as stored:
        arrays = dict(stored)
    rows = []
    rng = np.random.default_rng(units)
    for split in ("train", "test"):
        count = units * world.sites
        values = arrays[f"{split}_x"][:count] + rng.normal(size=(count, arrays[f"{split}_x"].shape[1]))
        arrays[f"{split}_x"] = values.astype(np.float32)
        labels = arrays[f"{split}_y"][:count]
        # Of few records, all are of one class: two classes are empty everywhere.
        arrays[f"{split}_y"] = labels if units == MANY else np.zeros_like(labels)
        rows += [row.tobytes() for row in arrays[f"{split}_x"]]
    np.savez(world.features, **arrays)
    return rows


def whole_run(folder: Path, method: str, noise: str, *, units: int, **privacy: Any) -> dict[str, Spy]:
    """A run with private evaluation before and after; what each site sent."""
    folder.mkdir()
    settings: dict[str, Any] = {"rounds": 1 if method in ONE_RELEASE else 2, "adapter": method, "noise": noise}
    # A tiny signal is no matter here.
    world = World(folder, public_evaluation=False, privacy={"minimum_signal_to_noise": 0.0, **privacy}, **settings)
    rows = replace_records(world, units=units)
    world.start()
    spies = {name: Spy(world.coordinator, name, world.gate) for name in world.names}
    policy = world.site_config("site-1").policy.model_copy(update={"methods": (method, "evaluate")})
    world.run(*(world.take_part(n, transport=spies[n], changes={"policy": policy}) for n in world.names))
    assert not world.errors, world.errors
    for spy in spies.values():
        everything = b"".join(spy.bytes)
        assert not any(row in everything for row in rows)
        assert not any(name.encode() in everything for name in ("-train", "-test", str(folder)))
        assert spy.pulse <= {("beat", b"")}
    return spies


def same_shape(folder: Path, method: str, noise: str, **privacy: Any) -> None:
    few = whole_run(folder / "few", method, noise, units=FEW, **privacy)
    many = whole_run(folder / "many", method, noise, units=MANY, **privacy)
    for name in few:
        assert few[name].sent == many[name].sent
        assert sum(kind == "upload" for kind, _ in few[name].sent) >= 6, "evaluation, training, evaluation"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "noise"), [("linear", "distributed"), ("facmic", "local"), ("ridge", "distributed")]
)
def test_number_and_size_of_messages_do_not_depend_on_the_records(tmp_path: Path, method: str, noise: str) -> None:
    same_shape(tmp_path, method, noise)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "noise"), RUNS)
def test_that_holds_for_every_installed_method(tmp_path: Path, method: str, noise: str) -> None:
    same_shape(tmp_path, method, noise)


@pytest.mark.slow
def test_that_holds_in_the_ring_of_16_bits_and_for_samples(tmp_path: Path) -> None:
    same_shape(tmp_path, "linear", "distributed", ring_bits=16, sampling_rate=0.5)


def test_a_client_that_talks_by_the_batch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: one that fetches the model again for every ten units of its own."""
    right = Rounds.converse

    def by_the_batch(self: Rounds, asked: Any, session: Any, *, door: Any) -> str:
        paid = right(self, asked, session, door=door)
        for _ in range(len(door.sources["train"].load()) // 10):
            self.line.fetch(asked.query.inputs, asked.ask.inputs)
        return paid

    monkeypatch.setattr(Rounds, "converse", by_the_batch)
    with pytest.raises(AssertionError):
        same_shape(tmp_path, "ridge", "distributed")


def leave(folder: Path, spoil: Callable[[dict[str, Any]], None], limit: float) -> tuple[dict[str, Spy], set[str]]:
    """Three sites with the same trouble, who all get as far as each other: what each sent, and what each was told."""
    world = World(folder, rounds=1)
    with np.load(world.features) as stored:
        arrays = dict(stored)
    spoil(arrays)
    np.savez(world.features, **arrays)
    world.start()
    spies = {name: Spy(world.coordinator, name, world.gate) for name in world.names}
    policy = world.site_config("site-1").policy.model_copy(update={"max_epsilon": limit})
    world.run(*(world.take_part(n, transport=spies[n], changes={"policy": policy}) for n in world.names))
    assert all(isinstance(error, FedsecureError) for error in world.errors.values()), world.errors
    return spies, {error.code for error in world.errors.values() if isinstance(error, FedsecureError)}


def test_why_records_cannot_be_used_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit gets out, that the site stops: the operator reads which row is bad, the others the word for any stop."""
    read, together = sources.load_units, threading.Barrier(3)

    def not_before_the_others(*arguments: Any, **options: Any) -> Any:
        together.wait(60.0)
        return read(*arguments, **options)

    def spoil(arrays: dict[str, Any]) -> None:
        arrays["train_x"][:3] = np.nan

    monkeypatch.setattr(sources, "load_units", not_before_the_others)
    monkeypatch.setattr(line, "GOODBYE_SECONDS", 60.0)  # a loaded machine never decides
    spies, raised = leave(tmp_path, spoil, 8.0)
    assert raised == {"FS-1110"}
    assert {code for spy in spies.values() for _, code in spy.pulse if code} == {b"FS-1720"}
    assert not any(b"FS-11" in sent for spy in spies.values() for sent in spy.bytes)


def test_a_reason_outside_the_records_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "GOODBYE_SECONDS", 60.0)
    spies, raised = leave(tmp_path, lambda arrays: None, 0.1)
    assert raised == {"FS-1201"}
    assert {code for spy in spies.values() for _, code in spy.pulse if code} == {b"FS-1201"}
