"""A whole federation in one process, for tests: the real coordinator, clients, secure aggregation, ledgers and methods.

Only the transport is the in-memory twin. Features are generated: Gaussian classes around unit text embeddings.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # and torch: a first import in a thread of a site fails by chance (simulation.memory)
import torch  # noqa: F401

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import Database
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.store import begin, unfinished
from fedsecure.client import Client
from fedsecure.config import (
    DatasetConfig,
    EncoderConfig,
    FederationConfig,
    MethodConfig,
    PolicyConfig,
    PrivacyConfig,
    RoundsConfig,
    RunSettings,
    SiteConfig,
    SiteEntry,
)
from fedsecure.data.loading import read_feature_header
from fedsecure.errors import TransportError
from fedsecure.files import make_folder
from fedsecure.identity.provision import load_identity, provision
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

CLASSES = ("a", "b", "c")
log = logging.getLogger("federation_world")


def write_features(path: Path, *, count: int = 90, dimension: int = 16, seed: int = 0) -> None:
    """Features whose text prior is tilted by 45°, so that training has much to mend: zero-shot gets about 0.6 right."""
    rng = np.random.default_rng(seed)
    true = np.linalg.qr(rng.normal(size=(dimension, len(CLASSES))))[0].T
    text = true + 1.0 * np.roll(true, 1, axis=0) + 0.35 * rng.normal(size=true.shape)
    arrays: dict[str, Any] = {"classes": np.array(CLASSES), "text": text.astype(np.float32)}
    for split in ("train", "test"):
        labels = np.arange(count) % len(CLASSES)
        values = true[labels] + 0.22 * rng.normal(size=(count, dimension))
        arrays[f"{split}_x"], arrays[f"{split}_y"] = values.astype(np.float32), labels.astype(np.int64)
    np.savez(path, **arrays)


class Line(MemoryTransport):
    """A site's line, on which nobody answers any more once the aggregator's process cannot go on."""

    def __init__(self, core: Coordinator, site: str, gate: threading.Condition) -> None:
        super().__init__(core, site, gate)
        self._coordinator = core

    def next(self, request: pb.NextRequest) -> pb.Directive:
        with self._gate:
            failure = self._coordinator.failure
        if failure is not None and not failure.final:
            raise TransportError("FS-1501", f"the aggregator ended with {failure}", expected="an answer", cure="wait")
        return super().next(request)


@dataclass
class World:
    """One federation under ``folder``; ``start`` makes a coordinator, ``run`` lets sites take part in threads."""

    folder: Path
    sites: int = 3
    rounds: int = 4
    adapter: str = "linear"
    noise: str = "distributed"
    local_steps: int = 1
    epsilon: float = 8.0
    public_evaluation: bool = True
    max_epsilon: float = 8.0
    prior: str | tuple[float, ...] = ()
    privacy: dict[str, Any] = field(default_factory=dict)
    waits: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [f"site-{i + 1}" for i in range(self.sites)]
        self.features = self.folder / "features.npz"
        write_features(self.features, count=30 * self.sites)
        header = read_feature_header(self.features)
        provision(
            self.folder / "keys", federation="world", sites=dict.fromkeys(self.names, "train"), hosts=("localhost",)
        )
        # A loaded machine never decides; who ends closes its line, and is missed after two seconds.
        rounds = {"phase_seconds": 90.0, "training_seconds": 90.0, "silence_seconds": 60.0, "start_seconds": 90.0}
        self.settings = RunSettings(
            name="world",
            classes=CLASSES,
            encoder=EncoderConfig(
                model="features", pretrained="file", dimension=header.dimension, fingerprint=header.fingerprint
            ),
            method=MethodConfig.model_validate(
                {
                    "name": self.adapter,
                    "rounds": self.rounds,
                    "local_steps": self.local_steps,
                    "class_prior": self.prior,
                }
            ),
            privacy=PrivacyConfig(
                target_epsilon=self.epsilon, unit="record", max_records_per_unit=1, noise=self.noise, **self.privacy
            ),
            rounds=RoundsConfig(**{**rounds, **self.waits}),
            sites={
                name: SiteEntry(max_units=30, evaluation_units=30, evaluation_public=self.public_evaluation)
                for name in self.names
            },
        )
        self.gate = threading.Condition()
        self.happened: list[Happening] = []
        self.gone: frozenset[str] = frozenset()
        self.errors: dict[str, BaseException] = {}

    def start(self) -> Coordinator:
        config = FederationConfig(
            **self.settings.model_dump(),
            state=self.folder / "aggregator",
            identity=self.folder / "keys" / "aggregator" / "identity",
            encoder_file=self.features,
        )
        if hasattr(self, "coordinator"):
            # As the program ends: a run that is over has been told to its sites.
            self.coordinator.close()
            self.database.close()
        self.database = Database("", make_folder(config.state))
        store = unfinished(self.database, config) or begin(self.database, config, os.urandom(16))
        self.coordinator = Coordinator(
            config,
            load_identity(config.identity),
            store=store,
            now=time.monotonic(),
            listener=self.happened.append,
            gone=self.gone,
        )
        return self.coordinator

    def site_config(self, name: str, **changes: Any) -> SiteConfig:
        index = self.names.index(name)
        home = self.folder / name

        def section(split: str) -> DatasetConfig:
            return DatasetConfig(
                name=f"{name}-{split}",
                path=self.features,
                split=split,
                rows=(index, self.sites),
                public=split == "test" and self.public_evaluation,
            )

        values: dict[str, Any] = {
            "site": name,
            "aggregator": "memory",
            "identity": self.folder / "keys" / "sites" / name / "identity",
            "state": home / "state",
            "ledger": home / "ledger.db",
            "encoder_file": self.features,
            "train": section("train"),
            "evaluation": section("test"),
            "policy": PolicyConfig(max_epsilon=self.max_epsilon, unit="record", max_evaluation_epsilon=8.0),
            "wait_seconds": 90.0,
        }
        home.mkdir(exist_ok=True)
        return SiteConfig(**{**values, **changes})

    def client(self, name: str, **options: Any) -> Client:
        changes = options.pop("changes", {})
        transport = options.pop("transport", None) or Line(self.coordinator, name, self.gate)
        return Client(self.site_config(name, **changes), transport=transport, **options)

    def hurry(self) -> None:
        """From now on the aggregator gives up at once where it would wait for sites to come."""
        with self.gate:
            core = self.coordinator
            rounds = core.config.rounds.model_copy(update={"start_seconds": 0.0})
            core.engine.config = core.config.model_copy(update={"rounds": rounds})
            core.tick(time.monotonic())

    def pass_over(self, late: str) -> None:
        """The time of the current phase is up, if ``late`` is the only one it still waits for."""
        with self.gate:
            core = self.coordinator
            running = core.engine.set_up if core.engine.preparing else core.engine.attempt
            if running is not None and tuple(running.waiting_for()) == (late,):
                running._deadline = 0.0
                core.tick(time.monotonic())

    def run(self, *actions: Callable[[], Any], seconds: float = 200.0) -> None:
        """Run actions in threads of their own; whatever they raise is kept in ``errors``."""

        def guarded(index: int, action: Callable[[], Any]) -> None:
            try:
                action()
            except BaseException as error:
                self.errors[f"{index}"] = error
                # Shown where the test fails: others hear only that a site left.
                log.warning("site %d of the world ended", index + 1, exc_info=error)

        threads = [threading.Thread(target=guarded, args=(i, action), daemon=True) for i, action in enumerate(actions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
            assert not thread.is_alive(), f"hangs: {self.coordinator.reason(time.monotonic())}"

    def take_part(self, name: str, **options: Any) -> Callable[[], None]:
        def whole() -> None:
            with self.client(name, **options) as client:
                client.run()
                self.reports[name] = client.privacy_report()

        return whole

    @property
    def reports(self) -> dict[str, Any]:
        return self.__dict__.setdefault("_reports", {})
