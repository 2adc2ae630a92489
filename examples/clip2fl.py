"""CLIP2FL (AAAI 2024) on long-tailed data: the published training, what it is compared with, and the private one.

    python examples/clip2fl.py --data DIR --imbalance 100 --alpha 0.5 --epsilon 1,3,8,inf --students resnet8
    python examples/clip2fl.py --features FILE.npz --train train,val --public val --imbalance 20 --epsilon 1,3,8,inf

``DIR`` is CIFAR's binary archive, ``DIR/{train,test,public}/<class>/*``, or ImageNet-LT's lists with the images below
it. The published training is not private and runs at ε = inf only; private runs are those of ``fedsecure simulate``, on
the same records' features. Settings are for the public records to choose and never the test set: both are in the
tables. Given again, the same command goes on where it was. docs/datasets.md says where the papers' data sets come from.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedsecure.cli.display import out, show_error
from fedsecure.cli.simulated import simulation_progress
from fedsecure.errors import ConfigError, FedsecureError, ModelError
from fedsecure.methods.registry import load_training_method
from fedsecure.simulation.clip2fl import (
    LATE,
    NAMES,
    TRUNK_OF,
    WHY,
    ZERO_SHOT,
    Settings,
    check_method,
    run_published,
    run_zero_shot,
    scores_of_adapter,
)
from fedsecure.simulation.folders import lay_out_experiment
from fedsecure.simulation.image_layout import lay_out_images
from fedsecure.simulation.longtail import LongTail, arrange, from_features, from_images, group_bounds
from fedsecure.simulation.reference import check_consent
from fedsecure.simulation.simulate import (
    SimulationOptions,
    Step,
    encoding_steps,
    in_cell,
    listed,
    numbers,
    open_results,
    simulate,
)
from fedsecure.simulation.tables import write_results

# Private rows: the installed method, and what is set of [method.clip2fl]; the others are what it is compared with.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "private-fedavg": ("clip2fl", {"distillation": 0.0, "releases": 0}),
    "private-creff": ("clip2fl", {"distillation": 0.0, "contrast": 0.0, "start": "noise"}),
    "private-fedavg-distilled": ("clip2fl", {"releases": 0}),
    "private-creff-distilled": ("clip2fl", {"contrast": 0.0, "start": "noise"}),
    "clip2fl": ("clip2fl", {}),
}
INSTALLED = ("linear", "prototypes", *FORMS)
REASON = "to compare with, on data whose user declares them public"
REPORTED = (
    "Reported in the paper on ImageNet-LT (top-1, %; all, many, medium, few): CLIP2FL 27.72, 35.06, 27.55, 24.80; "
    "CReFF 26.31, 37.44, 21.87, 10.29; FedAvg 23.85, 34.92, 19.18, 7.10."
)
GROUPS = ("all", "many", "medium", "few")
Watch = Callable[[Step], None]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, help="CIFAR's binary archive, a folder with train/ and test/, or ImageNet-LT"
    )
    source.add_argument("--features", type=Path, help="feature file (docs/datasets.md)")
    parser.add_argument("--students", default="features", choices=("resnet8", "features"))
    parser.add_argument("--imbalance", type=float, default=100.0, help="commonest class over rarest; 0: as it is")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet partition")
    parser.add_argument("--partition", default="equal-dirichlet", choices=("equal-dirichlet", "dirichlet"))
    parser.add_argument("--commonest-first", action="store_true", help="the tail goes by class sizes, not by label")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--model", default="tiny", help="the teacher: an open_clip model, or tiny for the bundled one")
    parser.add_argument("--pretrained", default="openai", help="open_clip tag or weights file")
    parser.add_argument("--train", default="train", help="splits of --features to train on")
    parser.add_argument("--test", default="test", help="split of --features to test on")
    parser.add_argument("--public", default="val", help="split of --features with public records")
    parser.add_argument(
        "--public-each",
        type=int,
        default=5,
        help="public records of each class; with 0 none, and sets of the papers' sizes",
    )
    parser.add_argument("--held-out", type=int, default=0, help="of DIR/public: so many of each class, 0 for all")
    parser.add_argument("--centre", default="none", help="public mean of --features; as fedsecure simulate")
    parser.add_argument("--method", help="default: all that are published (at ε = inf) and installed")
    parser.add_argument("--epsilon", default="1,3,8,inf")
    parser.add_argument("--noise", default="distributed", help="distributed, local, or both with a comma")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--private-student",
        choices=("linear", "features", "resnet8"),
        help="of clip2fl and its private baselines; default: --students",
    )
    parser.add_argument("--private-rounds", type=int, help="of the private methods")
    parser.add_argument(
        "--private-sampling", type=float, help="share of its records a site draws in each round of the private methods"
    )
    parser.add_argument("--no-privacy", default=REASON, help="why the data may be used without privacy")
    parser.add_argument("--device", default="auto", help="of the published training: auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("clip2fl-results"))
    for one in fields(Settings):
        flag, kind = f"--{one.name.replace('_', '-')}", type(one.default)
        if kind is bool:
            parser.add_argument(flag, action="store_true", help="published")
        elif one.name != "students":
            parser.add_argument(flag, type=kind, default=one.default, help="published")
    return parser.parse_args(given)


def chosen_methods(options: argparse.Namespace, epsilons: Sequence[float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Private methods and published ones; each is known, and a published one that was named has ε = inf to run at."""
    if options.method is None:
        names = (*NAMES, *INSTALLED) if math.inf in epsilons else INSTALLED
    else:
        names = listed(options.method)
    published = tuple(name for name in names if name in NAMES)
    if published:
        check_consent(
            math.inf if math.inf in epsilons else min(epsilons), options.no_privacy, why=WHY, instead="clip2fl"
        )
    private = []
    for name in names:
        if name not in published:
            try:
                load_training_method(form_of(name)[0])
            except ConfigError:
                if options.method is not None:
                    raise
                continue
            private.append(name)
    return tuple(private), published


def form_of(name: str) -> tuple[str, dict[str, Any]]:
    """The installed method behind a private row, and what is set of ``[method.clip2fl]``."""
    return FORMS.get(name, (name, {}))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the command line asks for; returns rows, their summary and the paths of what was written."""
    epsilons = numbers("--epsilon", options.epsilon)
    private, published = chosen_methods(options, epsilons)
    settings = Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})
    if options.seeds < 1:
        raise ConfigError("FS-1010", f"--seeds {options.seeds}", expected="at least 1", cure="leave it out for 3")
    if published:
        from fedsecure.learning.modules import resolve_device

        resolve_device(options.device)
    with simulation_progress(live=True) as watch:
        tails = prepare(options, watch)
        for name in published:
            check_method(tails(0), name, settings)
        rows: list[dict[str, Any]] = []
        diverged: list[str] = []
        for seed in range(options.seeds):
            rows += run_all_published(
                options, tails(seed), published, settings, seed=seed, watch=watch, diverged=diverged.append
            )
            for name in private:
                rows += run_privately(options, tails(seed), name, epsilons, seed=seed, watch=watch)
    order = {name: place for place, name in enumerate((*NAMES, *private))}
    rows.sort(key=lambda row: (order[row["method"]], row["epsilon"], row["seed"]))
    return {**write(options, rows, tails(0), diverged), "diverged": diverged}


def prepare(options: argparse.Namespace, watch: Watch) -> Callable[[int], LongTail]:
    """The long-tailed records by seed."""
    if options.features is not None:
        source = from_features(
            options.features,
            train=listed(options.train),
            test=options.test,
            public=options.public,
            each=options.public_each,
            centre=options.centre,
        )
    else:
        tiny = options.model == "tiny"
        source = from_images(
            options.data,
            model="fedsecure-tiny" if tiny else options.model,
            pretrained="bundled" if tiny else options.pretrained,
            cache=options.out / "features",
            each=options.public_each,
            held_out=options.held_out,
            progress=partial(encoding_steps(watch), options.data.name),
        )

    @cache
    def by_seed(seed: int) -> LongTail:
        return arrange(
            source,
            sites=options.sites,
            imbalance=options.imbalance,
            partition=f"{options.partition}:{options.alpha:g}",
            seed=seed,
            commonest_first=options.commonest_first,
        )

    return by_seed


def run_all_published(
    options: argparse.Namespace,
    tail: LongTail,
    names: Sequence[str],
    settings: Settings,
    *,
    seed: int,
    watch: Watch,
    diverged: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of a seed: the methods of one trunk share its training. One that diverges has none, and the others go on."""
    partition = f"{options.partition}:{options.alpha:g}"
    if ZERO_SHOT in names:
        yield run_zero_shot(tail, seed=seed, partition=partition)
    trunks = list(dict.fromkeys(TRUNK_OF[name] for name in names if name != ZERO_SHOT))
    kept = open_results(options.out / "published") if trunks else None
    for done, trunk in enumerate(trunks):
        assert kept is not None
        here = [name for name in names if TRUNK_OF.get(name) == trunk]
        try:
            found = run_published(
                tail,
                trunk,
                here,
                out=kept,
                seed=seed,
                reason=options.no_privacy,
                partition=partition,
                settings=settings,
                device=options.device,
                watch=in_cell(watch, done, len(trunks), f"{trunk}, seed {seed}"),
            )
        except ModelError as error:
            if error.code != "FS-1694":
                raise
            diverged(f"{', '.join(here)}, seed {seed}: {error.found}")
        else:
            yield from found


def run_privately(
    options: argparse.Namespace, tail: LongTail, name: str, epsilons: Sequence[float], *, seed: int, watch: Watch
) -> list[dict[str, Any]]:
    """Rows of a private method on a seed's records, each a whole run of ``fedsecure simulate``."""
    folder = options.out / "private" / name / f"seed-{seed}"
    method, form = form_of(name)
    student = options.private_student or options.students if method == "clip2fl" else "linear"
    how: Any = {"method": method, "delta": options.delta, "settings": {"clip2fl": {"student": student, **form}}}
    if student == "resnet8":
        how["settings"]["clip2fl"]["width"] = options.width
        weights = Path(options.pretrained) if Path(options.pretrained).is_file() else None
        layout = lay_out_images(tail, folder / "layout", weights=weights, **how)
    else:
        layout = lay_out_experiment(tail.experiment, folder / "layout", **how)
    chosen = SimulationOptions(
        out=folder / "runs",
        federation=layout,
        methods=(method,),
        noises=listed(options.noise),
        epsilons=tuple(epsilons),
        seeds=1,
        delta=options.delta,
        rounds=options.private_rounds,
        sampling_rate=options.private_sampling,
    )
    rows = []
    for row in simulate(chosen, watch=watch)["rows"]:
        scores = scores_of_adapter(tail, chosen.out / "adapters" / f"{row['cell']}.safetensors")
        partition, overall = f"{options.partition}:{options.alpha:g}", scores["groups"]["all"]
        row |= {"method": name, "seed": seed, "partition": partition, **scores, "balanced_accuracy": overall}
        rows.append(row)
    return rows


def write(
    options: argparse.Namespace, rows: list[dict[str, Any]], tail: LongTail, diverged: Sequence[str]
) -> dict[str, Any]:
    """``results.csv`` one line a run, ``results.md`` the means, and the plot."""
    parts = {"": "groups", " public": "public", f" mean of last {LATE}": "late", " best round": "best"}
    flat = []
    for row in rows:
        row = {**row, "best round": row.get("best", {}).get("round")}
        for said, part in parts.items():
            scores = row.get(part, {})
            scores = scores.get("groups", {}) if part == "best" else scores
            row |= {f"{group}{said}": scores.get(group) for group in GROUPS}
        flat.append(row)
    columns = [f"{group}{said}" for said in parts for group in GROUPS]
    return write_results(
        options.out,
        flat,
        heading=heading(options, tail, diverged),
        columns=[column for column in columns if any(row[column] is not None for row in flat)],
        extra=[*columns, "best round", "device"],
    )


def heading(options: argparse.Namespace, tail: LongTail, diverged: Sequence[str]) -> str:
    given = " ".join(["python examples/clip2fl.py", *sys.argv[1:]])
    chosen_on = "the public records" if len(tail.source.public) else "the test set itself, and no fair estimate"
    return (
        f"# CLIP2FL, {(options.data or options.features).name}\n\n"
        f"`{given}`, {datetime.now(UTC).date()}, {os.cpu_count()} cores, {platform.machine()}.\n"
        f"{tail.counts.sum()} training records, {tail.counts.max()} in the commonest class and {tail.counts.min()} in "
        f"the rarest; {group_bounds(tail)}. {REPORTED}\n"
        "Means ± standard deviation over seeds; the last round unless a column says otherwise, and a class counts as\n"
        f"much as any other. `mean of last {LATE}`: over those of the last {LATE} rounds after which a method has a\n"
        f"classifier. `best round`: the round that does best on {chosen_on}. What is\n"
        "published is not private; public records may choose settings and the test set never does.\n"
        + "".join(f"\nDiverged, and so without a row: {which}.\n" for which in diverged)
    )


def main(given: Sequence[str] | None = None) -> int:
    try:
        result = run(arguments(given))
    except FedsecureError as error:
        show_error(error)
        return 1
    out.print(result["page"], highlight=False, markup=False, soft_wrap=True)
    return 1 if result["diverged"] else 0


if __name__ == "__main__":
    sys.exit(main())
