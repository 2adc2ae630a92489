"""``fedsecure demo``: a whole federation on this machine, for real.

One aggregator and every site are processes of their own; they meet on loopback over mutual TLS with certificates
made on the spot. Nothing is shortened: secure aggregation, DP training, ledgers and reports are those of a
deployment. What the demo cannot know it says: folders of images have no patients, so the privacy unit is the record.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from fedsecure.config import (
    EvaluationConfig,
    MethodConfig,
    PolicyConfig,
    PrivacyConfig,
    RoundsConfig,
    RunSettings,
    SiteConfig,
    SiteEntry,
    default_rounds,
    load,
)
from fedsecure.errors import ConfigError, RunError
from fedsecure.extras import require
from fedsecure.files import make_folder, write_whole
from fedsecure.simulation.material import Material, find_material
from fedsecure.simulation.processes import Processes, Watch
from fedsecure.simulation.scaffold import Layout, SitePlan, lay_out

if TYPE_CHECKING:
    from fedsecure.privacy.plan import PrivacyPlan

MARKER = ".fedsecure-demo"
_UNEXPLAINED = ("FS-1713", "FS-1714", "FS-1715")
# Fields of the configuration models by the option that sets them, for errors.
_OPTIONS = {
    "target_epsilon": "--epsilon",
    "max_epsilon": "--epsilon",
    "delta": "--delta",
    "sampling_rate": "--sampling-rate",
    "rounds": "--rounds",
    "local_steps": "--local-steps",
    "colluders": "--colluders",
    "min_survivors": "--min-survivors",
}


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line may choose; see ``fedsecure demo --help``."""

    out: Path
    adapter: str | None = None
    sites: int = 3
    rounds: int | None = None
    local_steps: int = 1
    noise: Literal["distributed", "local"] = "distributed"
    epsilon: float = 8.0
    delta: float = 1e-5
    sampling_rate: float = 1.0
    data: Path | None = None
    features: Path | None = None
    eval_site: str | None = None
    public_evaluation: bool | None = None
    model: str = "fedsecure-tiny"
    pretrained: str = "bundled"
    prompt: str = "a picture of a {}"
    engine: str = "auto"
    device: str = "auto"
    colluders: int | None = None
    min_survivors: int | None = None
    seed: int = 0
    wait_seconds: float = 60.0

    @property
    def method(self) -> str:
        """What trains: as said, or what scores better, which is the attention module for the generated scans with its
        own number of rounds, and the linear head for wider features, few rounds and local noise.
        """
        generated = self.data is None and self.features is None and self.model == "fedsecure-tiny"
        as_tuned = self.noise == "distributed" and self.rounds is None
        return self.adapter or ("facmic" if generated and as_tuned else "linear")


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo ends with; ``summary`` is what ``--json`` prints."""

    summary: Mapping[str, Any]
    report: Path
    page: Path
    adapter: Path


def run_demo(
    options: DemoOptions, *, watch: Watch, planned: Callable[[PrivacyPlan], None] = lambda plan: None
) -> DemoResult:
    """Prepare, start the processes, watch them to the end, gather the results.

    Options, data and privacy plan are checked before anything is written. After a failure the folder is as it was.

    Args:
        options: see :class:`DemoOptions`.
        watch: called a few times a second with the aggregator's status, or ``{"stage": "preparing", …}`` before.
        planned: called with the run's privacy plan, before any process starts.

    Raises:
        FedsecureError: any failure of preparation, or of a process, as that process reported it.
    """
    require("torch", "open_clip", "opacus", "PIL", "jinja2", "matplotlib")
    begun = time.monotonic()
    _check_out(options.out)
    watch({"stage": "preparing", "waiting": "reading options, data and encoder"})
    settings, plans, material, plan = prepare(options)
    planned(plan)
    with _replacing(options.out):
        watch({"stage": "preparing", "waiting": "writing data, keys and certificates"})
        material.generate()
        hosts = ("127.0.0.1", "localhost")
        layout = lay_out(
            options.out / "federation",
            settings,
            sites=plans,
            listen="127.0.0.1:0",
            hosts=hosts,
            encoder_file=material.encoder_file,
        )
        watch({"stage": "preparing", "waiting": f"starting {1 + len(plans)} processes"})
        processes = Processes(layout)
        try:
            processes.start()
            processes.watch(watch)
        finally:
            processes.stop()
        watch({"stage": "over", "waiting": "writing the report"})
        return _gather(options, material, layout, settings, processes, begun)


# --- preparation ----------------------------------------------------------------------------------------------------


def prepare(options: DemoOptions) -> tuple[RunSettings, dict[str, SitePlan], Material, PrivacyPlan]:
    """The run's settings, each site's side of it, the data, and the privacy plan; writes nothing.

    Raises:
        ConfigError: FS-1003 an option is out of range, FS-1004 no such adapter, FS-1010 options that do not fit.
        PrivacyError: FS-1203 δ is too large for a site, FS-1204 too few records for the ε, FS-1205 local steps.
        DataError, ModelError, ProtocolError: the data, the encoder, the numbers of secure aggregation.
    """
    from fedsecure.methods.cohorts import cohort_of
    from fedsecure.methods.registry import load_training_method

    if options.sites < 3 or options.seed < 0:
        name, value = ("--sites", options.sites) if options.sites < 3 else ("--seed", options.seed)
        raise ConfigError(
            "FS-1003",
            f"{name} = {value}",
            expected="at least 3 sites: of two, each could read the other's part off the sum"
            if name == "--sites"
            else "0 or more",
            cure="see fedsecure demo --help",
        )
    method = load_training_method(options.method)
    _try_numbers(options)
    material = find_material(options)
    try:
        settings, plans = _settings(options, material)
    except ValidationError as error:
        raise _refused(error) from error
    _, cohort = cohort_of(settings, trainers_only=True)
    return settings, plans, material, method.plan(settings, cohort)


def _try_numbers(options: DemoOptions) -> None:
    """Refuse an option's number before data and encoder are looked at."""
    try:
        _sections(options)
    except ValidationError as error:
        raise _refused(error) from error


def _refused(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    names = [str(part) for part in first["loc"]]
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if names:
        option = next((_OPTIONS[name] for name in reversed(names) if name in _OPTIONS), ".".join(names))
        found = f"{option} = {first.get('input')!r:.80}"
    else:
        found = next((option for name, option in _OPTIONS.items() if name in expected), "an option") + " does not fit"
    return ConfigError("FS-1003", found, expected=expected, cure="see fedsecure demo --help")


def _sections(options: DemoOptions) -> tuple[MethodConfig, PrivacyConfig, RoundsConfig]:
    rounds = default_rounds(options.method) if options.rounds is None else options.rounds
    method = MethodConfig(name=options.method, rounds=rounds, local_steps=options.local_steps)
    privacy = PrivacyConfig(
        target_epsilon=options.epsilon,
        delta=options.delta,
        unit="record",
        max_records_per_unit=1,
        noise=options.noise,
        sampling_rate=options.sampling_rate,
    )
    waits = RoundsConfig(
        colluders="auto" if options.colluders is None else options.colluders,
        min_survivors="auto" if options.min_survivors is None else options.min_survivors,
        phase_seconds=options.wait_seconds,
        training_seconds=600.0,
        # A machine under load is not a dead site; a site whose process ends is missed at once.
        silence_seconds=60.0,
        start_seconds=max(120.0, options.wait_seconds),
        max_attempts=3,
    )
    return method, privacy, waits


def _settings(options: DemoOptions, material: Material) -> tuple[RunSettings, dict[str, SitePlan]]:
    method, privacy, waits = _sections(options)
    entries = {}
    plans = {}
    limits = PolicyConfig(
        max_epsilon=options.epsilon, delta=options.delta, unit="record", methods=(options.method, "evaluate")
    )
    for site in sorted({*material.train, *material.evaluation}):
        train, evaluation = material.train.get(site), material.evaluation.get(site)
        entries[site] = SiteEntry(
            role="train" if train else "evaluate",
            max_units=train[1] if train else 0,
            evaluation_units=evaluation[1] if evaluation else 0,
            evaluation_public=bool(evaluation and evaluation[0].public),
        )
        plans[site] = SitePlan(
            train=train[0] if train else None,
            evaluation=evaluation[0] if evaluation else None,
            policy=limits,
            encoder_file=material.encoder_file,
            engine=options.engine,
            device=options.device,
            connect_seconds=options.wait_seconds,
        )
    settings = RunSettings(
        name="demo on synthetic scans" if material.source == "phantoms" else "demo",
        classes=material.classes,
        encoder=material.encoder,
        method=method,
        privacy=privacy,
        evaluation=EvaluationConfig(target_epsilon=2.0),
        rounds=waits,
        sites=entries,
    )
    return settings, plans


# --- the folder -----------------------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    """Refuse a place that is neither new, nor empty, nor an earlier demo's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = f"{out} is not empty and no demo made it" if out.is_dir() else f"{out} is no folder"
    if (out / MARKER).exists():
        if not Path.cwd().is_relative_to(out.resolve()):
            return
        found = f"{out} is the folder this command was started in, and would be replaced"
    raise ConfigError(
        "FS-1009",
        found,
        expected="a new folder, or one of an earlier demo",
        cure="name another folder with --out",
    )


@contextmanager
def _replacing(out: Path) -> Iterator[None]:
    """A fresh folder in place of an earlier demo's, which comes back if this one fails.

    Only an unexplained end of a process leaves the new folder behind, for its logs.
    """
    was_there = out.is_dir()
    earlier = out.absolute().with_name(f".{out.absolute().name}.earlier")
    if (out / MARKER).exists():
        shutil.rmtree(earlier, ignore_errors=True)
        make_folder(out.absolute().parent)
        out.rename(earlier)
    try:
        make_folder(out)
        write_whole(out / MARKER, b"made by `fedsecure demo`; replaced by the next one\n")
        yield
    except BaseException as error:
        if not (isinstance(error, RunError) and error.code in _UNEXPLAINED):
            shutil.rmtree(out, ignore_errors=True)
            if earlier.exists():
                earlier.rename(out)
            elif was_there:
                out.mkdir(mode=0o700)
        raise
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


# --- results --------------------------------------------------------------------------------------------------------


def _gather(
    options: DemoOptions,
    material: Material,
    layout: Layout,
    settings: RunSettings,
    processes: Processes,
    begun: float,
) -> DemoResult:
    from fedsecure.privacy.report import network_report
    from fedsecure.privacy.report_html import write_html

    reports = {}
    usage = {}
    adapter = None
    for site, file in layout.sites.items():
        for run in (file.parent / "state" / "runs").glob("*/privacy-report.json"):
            reports[site] = json.loads(run.read_text())
            usage[site] = json.loads((run.parent / "usage.json").read_text())
            adapter = adapter or run.parent / "adapter.safetensors"
    if adapter is None:
        raise RunError(
            "FS-1715",
            "no site finished",
            expected="at least one site with a report and an adapter",
            cure=f"see the log.txt files under {layout.folder}",
        )
    kept = options.out / "adapter.safetensors"
    shutil.copyfile(adapter, kept)
    network = network_report(list(reports.values()))
    write_whole(options.out / "report.json", json.dumps(network, indent=2, sort_keys=True).encode())
    page = options.out / "report.html"
    write_html(network, page)
    outcome = next(iter(reports.values()))["outcome"]
    before, after = (outcome["evaluations"].get(stage, {}) for stage in ("before", "after"))
    epsilons = {site: report["epsilon"] for site, report in reports.items() if report["role"] == "train"}
    lost = sorted(set(layout.sites) - set(reports))
    # What a lost site has charged stays charged, and it wrote no report.
    epsilons |= {site: _charged(layout.sites[site], settings) for site in lost if site in material.train}
    summary = {
        "accuracy": {"before": before.get("accuracy"), "after": after.get("accuracy")},
        "balanced_accuracy": {"before": before.get("balanced_accuracy"), "after": after.get("balanced_accuracy")},
        "epsilon": epsilons,
        "epsilon_evaluation": {
            site: report["epsilon_evaluation"] for site, report in reports.items() if report.get("epsilon_evaluation")
        },
        "delta": settings.privacy.delta,
        "unit": settings.privacy.unit,
        "noise": settings.privacy.noise,
        "rounds": outcome["rounds"],
        "attempts": outcome["attempts"],
        "sites": sorted(layout.sites),
        "lost_sites": lost,
        "bytes_up": {site: numbers["bytes_up"] for site, numbers in usage.items()},
        "bytes_down": {site: numbers["bytes_down"] for site, numbers in usage.items()},
        "wall_seconds": round(time.monotonic() - begun, 2),
        "secagg": {
            "mode": "active",
            "colluders": next(iter(reports.values()))["secagg"]["colluders"],
            "min_survivors": next(iter(reports.values()))["secagg"]["min_survivors"],
        },
        "processes": processes.count + 1,
        "engine": next(iter(usage.values()))["engine"],
        "adapter": options.method,
        "source": material.source,
        "evaluation_public": all(section.public for section, _ in material.evaluation.values()),
        "synthetic": material.source == "phantoms",
        "report": str(options.out / "report.json"),
        "page": str(page),
        "adapter_file": str(kept),
    }
    return DemoResult(summary=summary, report=options.out / "report.json", page=page, adapter=kept)


def _charged(file: Path, settings: RunSettings) -> float:
    """ε that a site's ledger holds, of its training records."""
    from fedsecure.privacy.ledger import Ledger

    config = load(file, SiteConfig)
    if config.train is None or not config.ledger.exists():
        return 0.0
    with Ledger(config.ledger) as ledger:
        return ledger.epsilon(config.train.name, "train", delta=settings.privacy.delta)
