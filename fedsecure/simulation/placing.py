"""Where a simulated federation comes from: feature records shared out to sites, or one that is laid out on disk.

Either way a cell becomes what ``fedsecure serve`` and ``fedsecure join`` read, a ``FederationConfig`` and one
``SiteConfig`` a site, in a folder of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from fedsecure.config import (
    EncoderConfig,
    FederationConfig,
    PolicyConfig,
    RunSettings,
    SiteConfig,
    SiteEntry,
    default_rounds,
    load,
    parse_settings,
    read_toml,
)
from fedsecure.errors import ConfigError
from fedsecure.files import make_folder
from fedsecure.simulation.pool import Pool, read_pool, share_out, write_site
from fedsecure.simulation.scaffold import SitePlan, lay_out

if TYPE_CHECKING:
    from fedsecure.simulation.simulate import SimulationOptions

WITHOUT = "a simulation without privacy, to compare with"
# Above what a run without privacy is charged.
_UNLIMITED = 1e9


@dataclass(frozen=True, slots=True)
class Variant:
    """What distinguishes a cell of the grid; ``epsilon`` is ∞ for a run without privacy."""

    method: str
    partition: str
    noise: str
    epsilon: float
    seed: int

    def __str__(self) -> str:
        epsilon = "∞" if math.isinf(self.epsilon) else f"{self.epsilon:g}"
        return f"{self.method}, {self.partition}, {self.noise}, ε = {epsilon}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Placed:
    """A federation on disk; ``class_counts`` is site → training records of each class, where they are known."""

    federation: FederationConfig
    sites: Mapping[str, SiteConfig]
    class_counts: Mapping[str, list[int]] = field(default_factory=dict)


def _varied(raw: Mapping[str, Any], options: SimulationOptions, variant: Variant) -> dict[str, dict[str, Any]]:
    """The sections ``method`` and ``privacy`` of a cell."""
    method, privacy = dict(raw.get("method", {})), dict(raw.get("privacy", {}))
    if method.get("name") != variant.method or "rounds" not in method:
        method["rounds"] = default_rounds(variant.method)
    if options.rounds is not None:
        method["rounds"] = options.rounds
    method["name"] = variant.method
    if options.local_steps != 1:
        method["local_steps"] = options.local_steps
    privacy["noise"] = variant.noise
    if options.sampling_rate is not None:
        privacy["sampling_rate"] = options.sampling_rate
    if math.isinf(variant.epsilon):
        without = {"noise_multiplier": "auto", "sampling_rate": 1.0}
        privacy |= {"no_privacy": privacy.get("no_privacy") or WITHOUT, **without}
    else:
        privacy |= {"target_epsilon": variant.epsilon, "no_privacy": ""}
    return {"method": method, "privacy": privacy}


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """Records of a feature file, shared out to the sites of a settings file or to ``--sites`` of them."""

    options: SimulationOptions
    pool: Pool
    raw: Mapping[str, Any]
    names: tuple[str, ...]

    @classmethod
    def read(cls, options: SimulationOptions) -> Shared:
        """Raises ConfigError FS-1001 to FS-1003, FS-1010; DataError as the reader of feature files says."""
        assert options.features is not None
        raw = read_toml(options.federation) if options.federation is not None else {}
        sites = raw.get("sites", {f"site-{index + 1}": {} for index in range(options.sites)})
        if not isinstance(sites, dict) or not all(isinstance(entry, dict) for entry in sites.values()):
            raise ConfigError(
                "FS-1003", f"{options.federation}: sites is no table", expected="[sites.<id>]", cure="mend the file"
            )
        names = tuple(site for site, entry in sites.items() if entry.get("role", "train") == "train")
        if len(names) < 3:
            raise ConfigError(
                "FS-1003",
                f"{len(names)} training sites",
                expected="at least 3: of two, each could read the other's part off the sum",
                cure="give --sites 3 or more, or more [sites] in the settings",
            )
        pool = read_pool(options.features, train=options.train, test=options.test, centre=options.centre)
        return cls(options, pool, raw, names)

    @property
    def target_file(self) -> Path | None:
        """The settings file's copy of the target, whose hash its ``alignment.target`` is."""
        named = self.raw.get("target_file")
        if named is None or self.options.federation is None:
            return None
        return self.options.federation.parent / Path(str(named)).expanduser()

    def cell(self, variant: Variant) -> tuple[RunSettings, str]:
        parts = share_out(self.pool, self.names, partition=variant.partition, seed=variant.seed)
        turns = len(self.names)
        entries = {
            name: SiteEntry(
                max_units=len(parts[name]),
                evaluation_units=len(self.pool.test_labels[index::turns]),
                evaluation_public=True,
            )
            for index, name in enumerate(self.names)
        }
        encoder = EncoderConfig(
            model="features", pretrained="file", dimension=self.pool.dimension, fingerprint=self.pool.fingerprint
        )
        # A curve is wanted down to where noise wins, and in memory no attempt fails.
        privacy = {
            "unit": "record",
            "max_records_per_unit": 1,
            "delta": self.options.delta,
            "spare_attempts": 0,
            "minimum_signal_to_noise": 0.0,
        }
        rounds = {"phase_seconds": 300.0, "silence_seconds": 300.0, "start_seconds": 300.0}
        for key, value in (("colluders", self.options.colluders), ("min_survivors", self.options.min_survivors)):
            if value is not None:
                rounds[key] = value
        varied = _varied({**self.raw, "privacy": {**privacy, **self.raw.get("privacy", {})}}, self.options, variant)
        content = {
            **{key: self.raw[key] for key in ("evaluation",) if key in self.raw},
            # The name is the public seed of the adapter's first weights.
            "name": f"{self.raw.get('name', 'simulation')}, seed {variant.seed}",
            "classes": self.pool.classes,
            "encoder": encoder.model_dump(),
            "rounds": {**self.raw.get("rounds", {}), **rounds},
            "sites": {name: entry.model_dump() for name, entry in entries.items()},
            **varied,
        }
        return parse_settings(content, self.options.federation or Path("--features")), self.pool.digest

    def place(self, folder: Path, variant: Variant, settings: RunSettings) -> Placed:
        parts = share_out(self.pool, self.names, partition=variant.partition, seed=variant.seed)
        plans = {}
        private = not settings.privacy.no_privacy
        policy = PolicyConfig(
            max_epsilon=settings.privacy.target_epsilon if private else _UNLIMITED,
            delta=settings.privacy.delta,
            unit=settings.privacy.unit,
            methods=(settings.method.name, "evaluate"),
            min_noise_multiplier=0.0,
            no_privacy=not private,
        )
        for index, name in enumerate(self.names):
            turn = (index, len(self.names))
            train = write_site(self.pool, folder / "records", name, rows=parts[name], turn=turn)
            test = train.model_copy(update={"name": f"{name}-test", "split": "test", "public": True})
            plans[name] = SitePlan(
                train=train, evaluation=test, policy=policy, encoder_file=train.path, target_file=self.target_file
            )
        layout = lay_out(
            folder / "federation",
            settings,
            sites=plans,
            listen="memory:0",
            hosts=("localhost",),
            # Of this file the aggregator reads what is public.
            encoder_file=plans[self.names[0]].encoder_file,
            target_file=self.target_file,
        )
        classes = len(self.pool.classes)
        return Placed(
            federation=load(layout.federation, FederationConfig),
            sites={site: load(file, SiteConfig) for site, file in layout.sites.items()},
            class_counts={
                site: np.bincount(self.pool.labels[rows], minlength=classes).tolist() for site, rows in parts.items()
            },
        )


@dataclass(frozen=True, slots=True, eq=False)
class LaidOut:
    """A federation as ``fedsecure init`` lays it out; only its states and ledgers are replaced by fresh ones."""

    options: SimulationOptions
    federation: FederationConfig
    sites: Mapping[str, SiteConfig]
    digest: str

    @classmethod
    def read(cls, options: SimulationOptions) -> LaidOut:
        """Raises ConfigError FS-1001 to FS-1003 for its files, FS-1010 where there is none."""
        if options.federation is None or options.partitions != ("iid",):
            raise ConfigError(
                "FS-1010",
                "no --features" if options.federation is None else "--partition without --features",
                expected="--features FILE.npz, or --federation with the federation.toml that fedsecure init wrote",
                cure="see docs/simulation.md",
            )
        federation = load(options.federation, FederationConfig)
        root = options.federation.resolve().parent.parent / "sites"
        sites = {site: load(root / site / "site.toml", SiteConfig) for site in federation.sites}
        sha = hashlib.sha256(b"fedsecure/laid-out/v1\0")
        for site in sorted(sites):
            sha.update((root / site / "site.toml").read_bytes() + b"\0")
        return cls(options, federation, sites, sha.hexdigest())

    def cell(self, variant: Variant) -> tuple[RunSettings, str]:
        raw = self.federation.settings().model_dump()
        name = f"{raw['name']}, seed {variant.seed}"
        content = {**raw, "name": name, **_varied(raw, self.options, variant)}
        try:
            return RunSettings.model_validate(content), self.digest
        except ValidationError as error:
            raise ConfigError(
                "FS-1003",
                f"{variant}: {error.errors(include_url=False)[0]['msg']}",
                expected="options that fit the federation's settings",
                cure="see docs/configuration.md",
            ) from error

    def place(self, folder: Path, variant: Variant, settings: RunSettings) -> Placed:
        state = make_folder(folder / "aggregator")
        federation = FederationConfig(
            **settings.model_dump(),
            state=state,
            identity=self.federation.identity,
            encoder_file=self.federation.encoder_file,
            target_file=self.federation.target_file,
        )
        sites = {}
        for name, config in self.sites.items():
            home = make_folder(folder / name)
            sites[name] = config.model_copy(update={"state": home / "state", "ledger": home / "ledger.db"})
        return Placed(federation=federation, sites=sites)
