"""FACMIC (MICCAI 2024) under differential privacy: the released training, the private one and what stands beside them.

    python examples/facmic.py --data DIR --model ViT-B-16 --pretrained openai --epsilon 1,3,8,inf --seeds 3
    python examples/facmic.py --features FILE.npz --sites 5 --epsilon 1,8,inf

``DIR/<site>/<class>/*`` are images, the last site (or --eval-site) the common test. Every private run is one of
``fedsecure simulate``; the reference is the released program's training, which is not private and runs at ε = inf only.
Given again, the same command goes on where it was. docs/datasets.md says where the papers' data sets come from.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from fedsecure.cli.display import err, out, show_error
from fedsecure.cli.simulated import simulation_progress
from fedsecure.config import EncoderChoice, EncoderConfig, default_rounds
from fedsecure.errors import ConfigError, FedsecureError
from fedsecure.methods.base import TrainingMethod
from fedsecure.methods.registry import load_training_method
from fedsecure.methods.towers import TowerDescent
from fedsecure.simulation import alone, reference
from fedsecure.simulation.folders import Experiment, divide_folders, from_pool, lay_out_experiment, read_folders
from fedsecure.simulation.image_folders import ScoredRuns, lay_out_division
from fedsecure.simulation.pool import read_pool
from fedsecure.simulation.simulate import (
    SimulationOptions,
    Step,
    among,
    encoding_steps,
    in_cell,
    listed,
    numbers,
    open_results,
    simulate,
)
from fedsecure.simulation.tables import epsilon_text, write_results
from fedsecure.vision.encoder import load_encoder

METHODS = (
    "facmic", "linear", "prototypes", "ridge", "fedclip", "bottleneck", "fedfocal", "probe", "fedavg", "fedprox",
    "moon", "local-only-linear",
)  # fmt: skip
# FACMIC with its alignment: noisy prototypes of the sites, and a public target. Runs where there is a target.
ALIGNED = "facmic-aligned"
# Local steps and rounds of methods that average local training, where nothing else is said.
AVERAGED = 5, 10
REASON = "to compare with, on data whose user declares them public"
UNALIGNED = (
    "There is no target (--target, --transductive or --halves): the references train without the alignment that is "
    "half of FACMIC."
)
REPORTED = "Reported in the paper (ViT-B/16 or B/32, best or last round unknown): BT 82.74, SC 58.47, Real 72.37 %."


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="DIR/<site>/<class>/*.{jpg,png}")
    source.add_argument("--features", type=Path, help="feature file (docs/datasets.md), shared out to --sites")
    parser.add_argument("--eval-site", help="site of --data that is the common test; the last one by default")
    parser.add_argument("--origins", type=Path, help="CSV: the image each file of --data was made from")
    aligned = parser.add_mutually_exclusive_group()
    aligned.add_argument("--target", type=Path, help="folder of public unlabelled images to align with")
    aligned.add_argument("--halves", action="store_true", help="align with half of the test images; test on both")
    parser.add_argument("--transductive", action="store_true", help="align with the test images, as released")
    parser.add_argument(
        "--normalisation",
        choices=("layer", "public", "none"),
        default="layer",
        help="of facmic's hidden layer; public: by the statistics of the images to align with, which --method facmic "
        "then looks at for nothing else",
    )
    parser.add_argument("--model", default="tiny", help="open_clip model, or tiny for the bundled one")
    parser.add_argument("--pretrained", default="openai", help="open_clip tag or weights file")
    parser.add_argument("--sites", type=int, default=5, help="with --features")
    parser.add_argument("--partition", default="iid", help="with --features; as fedsecure simulate")
    parser.add_argument("--train", default="train", help="splits of --features to train on")
    parser.add_argument("--test", default="test", help="split of --features to test on")
    parser.add_argument("--centre", default="file", help="public mean of --features; as fedsecure simulate")
    parser.add_argument(
        "--method",
        help=f"installed methods with commas, also promptfl and lora with --data; default: {', '.join(METHODS)}, "
        f"{ALIGNED} where there is a target, and the references where --epsilon has inf",
    )
    parser.add_argument("--epsilon", default="1,3,8,inf")
    parser.add_argument("--noise", default="distributed", help="distributed, local, or both with a comma")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="of the private methods")
    parser.add_argument("--local-steps", type=int, help="a round, of methods that average: 5 by default, in 10 rounds")
    parser.add_argument("--colluders", type=int, help="with --features; sites the sum withstands")
    parser.add_argument("--min-survivors", type=int, help="with --features; fewest sites in a sum")
    parser.add_argument("--reference-rounds", type=int, default=reference.ROUNDS)
    parser.add_argument("--reference-steps", type=int, help="a round; 0 for one pass, 199 by default")
    parser.add_argument("--reference-batch", type=int, default=reference.BATCH)
    parser.add_argument("--no-privacy", default=REASON, help="why the data may be used without privacy")
    parser.add_argument("--out", type=Path, default=Path("facmic-results"))
    options = parser.parse_args(given)
    if options.halves and options.features is not None:
        parser.error("--halves is of images: name them with --data")
    of_images = ("eval_site", "origins", "target", "normalisation", "model", "pretrained")
    of_features = ("sites", "partition", "train", "test", "centre", "colluders", "min_survivors")
    for name in of_images if options.features is not None else of_features:
        if getattr(options, name) != parser.get_default(name):
            option, other = f"--{name.replace('_', '-')}", "--data" if name in of_images else "--features"
            parser.error(f"{option} goes with {other}")
    for name in ("seeds", "reference_rounds", "reference_batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.halves and options.transductive:
        parser.error("--transductive aligns with all of the test images, and --halves with half of them: choose one")
    return options


def chosen_methods(options: argparse.Namespace, epsilons: Sequence[float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Private methods and references; each is known, and a reference that was named has an ε = inf to run at."""
    aligns = options.target is not None or options.transductive or options.halves
    if options.method is None:
        names = (*METHODS, *((ALIGNED,) if aligns and options.data is not None else ()))
        if math.inf in epsilons:
            # Without a target, the three ways to use one are one training.
            names = (*(reference.NAMES if aligns else ("reference", *reference.OTHERS)), *names)
    else:
        names = listed(options.method)
    inside = [name for name in names if name not in reference.NAMES and takes_images(name)]
    if inside and (options.data is None or options.halves):
        raise ConfigError(
            "FS-1010",
            f"method {inside[0]}, which trains inside CLIP's towers, on {'halves' if options.data else 'features'}",
            expected="--data, without --halves",
            cure="bring images, or leave the method out",
        )
    if ALIGNED in names and not (aligns and options.data is not None):
        raise ConfigError(
            "FS-1010",
            f"method {ALIGNED} without a target",
            expected="--data with --target, --transductive or --halves",
            cure="name what to align with, or leave the method out",
        )
    if options.normalisation == "public" and not aligns:
        raise ConfigError(
            "FS-1010",
            "--normalisation public without a target",
            expected="--target, --transductive or --halves, whose images it takes the statistics of",
            cure="name them, or leave --normalisation out",
        )
    by_itself = f"{alone.PREFIX}facmic"
    if options.normalisation != "layer" and by_itself in names:
        raise ConfigError(
            "FS-1010",
            f"method {by_itself} with --normalisation {options.normalisation}",
            expected="LayerNorm where a site trains by itself",
            cure="leave the option or the method out",
        )
    references = tuple(name for name in names if name in reference.NAMES)
    if references:
        reference.check_consent(math.inf if math.inf in epsilons else min(epsilons), options.no_privacy)
    private = []
    for name in names:
        if name in references:
            continue
        try:
            method_of(name)
        except ConfigError:
            if options.method is not None:
                raise
            continue
        private.append(name)
    return tuple(private), references


def method_of(name: str) -> TrainingMethod:
    """The installed method behind a name; ConfigError FS-1004."""
    name = installed(name)
    return alone.trained_alone(name) if name.startswith(alone.PREFIX) else load_training_method(name)


def takes_images(name: str) -> bool:
    """Whether a method trains inside CLIP's towers, and so needs the encoder and images at the sites."""
    method = method_of(name)
    return isinstance(method, TowerDescent) or getattr(method, "inputs", "features") != "features"


def weights_of(options: argparse.Namespace) -> Path | None:
    file = Path(options.pretrained)
    return file if file.is_file() else None


def installed(name: str) -> str:
    return "facmic" if name == ALIGNED else name


def facmic_settings(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Keys of ``[method]`` for a method, and of ``[method.alignment]`` where it looks at the target."""
    if installed(name) != "facmic":
        return {}, None
    settings = {"facmic": {"normalisation": options.normalisation}}
    if name != ALIGNED and options.normalisation != "public":
        return settings, None
    aligned = {"weight": 1.0, "prototypes": True} if name == ALIGNED else {}
    return settings, {**aligned, "transductive": options.transductive or options.halves}


def noises_of(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    """The noises asked for, or local noise for a method that knows no other."""
    return ("local",) if getattr(method_of(name), "local_only", "") else listed(options.noise)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the command line asks for; returns rows, their summary and the paths of what was written."""
    epsilons = numbers("--epsilon", options.epsilon)
    private, references = chosen_methods(options, epsilons)
    with simulation_progress(live=True) as watch:
        experiment, simulation = prepare(options, watch)
        warn(experiment(0), aligned=bool(references))
        cells = [(name, seed) for seed in range(options.seeds) for name in references]
        for seed in range(options.seeds if cells else 0):
            reference.check_sizes(experiment(seed), batch=options.reference_batch)
        each = len(epsilons) * options.seeds
        sizes = {n: each * (1 if n.startswith(alone.PREFIX) else len(noises_of(n, options))) for n in private}
        rows, before, all_cells = [], 0, sum(sizes.values()) + len(cells)
        for name in private:
            here = among(watch, before, all_cells)
            before += sizes[name]
            if name.startswith(alone.PREFIX):
                rows += run_alone(options, name, experiment, epsilons, here)
                continue
            chosen = replace(simulation(name), epsilons=epsilons)
            for row in simulate(chosen, watch=here)["rows"]:
                file = chosen.out / "adapters" / f"{row['cell']}.safetensors"
                if takes_images(name):
                    division = divide_folders(options.data, eval_site=options.eval_site, origins=options.origins)
                    kept_scores = ScoredRuns(options.out / "private" / name / "scored")
                    scores = kept_scores.score(row, division, file, weights=weights_of(options))
                else:
                    scores = reference.adapter_scores(experiment(row["seed"]), file)
                rows.append({**row, "method": name, "tests": scores["tests"], "site_scores": scores["sites"]})
        kept = open_results(options.out / "reference") if cells else None
        for done, (name, seed) in enumerate(cells):
            assert kept is not None
            row = reference.run_reference(
                experiment(seed),
                name,
                out=kept,
                seed=seed,
                reason=options.no_privacy,
                partition="iid" if options.data else options.partition,
                rounds=options.reference_rounds,
                steps=options.reference_steps,
                batch=options.reference_batch,
                watch=in_cell(among(watch, before, all_cells), done, len(cells), f"{name}, seed {seed}"),
            )
            rows.append(row)
    if options.data is not None:
        rows = [{**row, "partition": "folders"} for row in rows]
    return write(options, rows, experiment(0))


def run_alone(
    options: argparse.Namespace,
    name: str,
    experiment: Callable[[int], Experiment],
    epsilons: Sequence[float],
    watch: Callable[[Step], None],
) -> list[dict[str, Any]]:
    """Every site by itself, for each ε and seed."""
    kept = open_results(options.out / "alone")
    cells = list(product(epsilons, range(options.seeds)))
    return [
        alone.run_alone(
            experiment(seed),
            name,
            out=kept,
            epsilon=epsilon,
            seed=seed,
            delta=options.delta,
            partition="iid" if options.data else options.partition,
            rounds=options.rounds,
            watch=in_cell(watch, done, len(cells), f"{name}, ε = {epsilon_text(epsilon)}, seed {seed}"),
        )
        for done, (epsilon, seed) in enumerate(cells)
    ]


def prepare(
    options: argparse.Namespace, watch: Callable[[Step], None]
) -> tuple[Callable[[int], Experiment], Callable[[str], SimulationOptions]]:
    """Records by seed, and the options of a simulation of a method on them."""

    def common(method: str) -> SimulationOptions:
        noises = noises_of(method, options)
        steps = options.local_steps or 1 if noises == ("local",) else 1
        rounds = options.rounds
        if getattr(method_of(method), "local_only", ""):
            steps = options.local_steps or AVERAGED[0]
            rounds = options.rounds or AVERAGED[1]
        return SimulationOptions(
            out=options.out / "private" / method,
            methods=(installed(method),),
            noises=noises,
            seeds=options.seeds,
            delta=options.delta,
            colluders=options.colluders,
            min_survivors=options.min_survivors,
            local_steps=steps,
            # A method of one release has one round, whatever the others have.
            rounds=None if default_rounds(method) == 1 else rounds,
        )

    if options.features is not None:
        names = tuple(f"site-{index + 1}" for index in range(options.sites))
        pool = read_pool(options.features, train=listed(options.train), test=options.test, centre=options.centre)

        def shared(seed: int) -> Experiment:
            return from_pool(pool, names, partition=options.partition, seed=seed, transductive=options.transductive)

        def on_features(method: str) -> SimulationOptions:
            return replace(
                common(method),
                features=options.features,
                sites=options.sites,
                partitions=(options.partition,),
                train=listed(options.train),
                test=options.test,
                centre=options.centre,
            )

        return shared, on_features
    tiny = options.model == "tiny"
    experiment = read_folders(
        options.data,
        eval_site=options.eval_site,
        model="fedsecure-tiny" if tiny else options.model,
        pretrained="bundled" if tiny else options.pretrained,
        cache=options.out / "features",
        target=options.target,
        transductive=options.transductive,
        halves=options.halves,
        origins=options.origins,
        progress=encoding_steps(watch),
    )

    def on_folders(method: str) -> SimulationOptions:
        if takes_images(method):
            name, pretrained = ("fedsecure-tiny", "bundled") if tiny else (options.model, options.pretrained)
            choice = EncoderChoice(model=name, pretrained="file" if weights_of(options) else pretrained)
            measured = load_encoder(name, pretrained)
            layout = lay_out_division(
                divide_folders(options.data, eval_site=options.eval_site, origins=options.origins),
                options.out / "layout" / method,
                encoder=EncoderConfig(
                    **choice.model_dump(), dimension=measured.dimension, fingerprint=measured.fingerprint
                ),
                weights=weights_of(options),
                method=method,
                delta=options.delta,
            )
            return replace(common(method), federation=layout)
        settings, alignment = facmic_settings(method, options)
        layout = lay_out_experiment(
            experiment,
            options.out / "layout" / method,
            method=installed(method),
            delta=options.delta,
            settings=settings,
            alignment=alignment,
        )
        return replace(common(method), federation=layout)

    return lambda seed: experiment, on_folders


def warn(experiment: Experiment, *, aligned: bool) -> None:
    """Says what lies at more than one place, and what the references are without."""
    if aligned and experiment.target is None:
        err.print(UNALIGNED, style="yellow")
    shared = experiment.overlap.shared()
    if shared:
        err.print(
            f"{len(shared)} images lie at more than one site; fedsecure duplicates also finds copies that were saved "
            "anew. Test sets:",
            style="yellow",
        )
        err.print("  " + ", ".join(f"{name} {len(part)}" for name, part in experiment.tests.items()))


def write(options: argparse.Namespace, rows: list[dict[str, Any]], experiment: Experiment) -> dict[str, Any]:
    """``results.csv`` one line a run, ``results.md`` the means, and the plot."""
    zero = reference.zero_shot(experiment)
    sets = list(zero)
    sites = sorted({site for row in rows for site in row["site_scores"]})
    extra = [f"{metric} {name}" for name in sets for metric in ("accuracy", "balanced accuracy")]
    extra += [f"{metric} {name}" for name in sites for metric in ("accuracy", "balanced accuracy")]
    extra += ["best round", *(f"best-round accuracy {name}" for name in sets)]
    columns = [f"accuracy {name}" for name in (*sets, *sites)] + [f"best-round accuracy {name}" for name in sets]
    columns += [f"balanced accuracy {name}" for name in sets]
    flat = [{**row, **further(row)} for row in rows]
    said = heading(options, zero)
    if experiment.target is None and any(row["method"] in reference.NAMES for row in rows):
        said += f"{UNALIGNED}\n"
    return write_results(options.out, flat, heading=said, columns=columns, extra=extra)


def further(row: dict[str, Any]) -> dict[str, Any]:
    """The scores of a row as columns."""
    found: dict[str, Any] = {}
    for group in ("tests", "site_scores"):
        for name, scores in row[group].items():
            found[f"accuracy {name}"] = scores["accuracy"]
            found[f"balanced accuracy {name}"] = scores["balanced_accuracy"]
    if "best" in row:
        found["best round"] = row["best"]["round"]
        found |= {f"best-round accuracy {name}": s["accuracy"] for name, s in row["best"]["tests"].items()}
    return found


def heading(options: argparse.Namespace, zero: dict[str, Any]) -> str:
    given = " ".join(["python examples/facmic.py", *sys.argv[1:]])
    shown = ", ".join(f"{name} {100 * s['accuracy']:.1f} % of {s['records']}" for name, s in zero.items())
    seen = options.normalisation == "public" and (options.transductive or options.halves)
    return (
        f"# FACMIC, {(options.data or options.features).name}\n\n"
        f"`{given}`, {datetime.now(UTC).date()}, {os.cpu_count()} cores, {platform.machine()}.\n"
        f"Plain zero-shot CLIP: {shown}. {REPORTED}\n"
        "Means ± standard deviation over seeds. The reference is not private, and ε = ∞ of a private method is a run\n"
        "with a token of noise. Last round throughout; the best round is chosen on the test set and no fair estimate.\n"
        + ("facmic is transductive too: test images normalise its hidden layer.\n" if seen else "")
    )


def main(given: Sequence[str] | None = None) -> int:
    try:
        result = run(arguments(given))
    except FedsecureError as error:
        show_error(error)
        return 1
    out.print(result["page"], highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
