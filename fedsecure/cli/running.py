"""Commands that plan, start and try runs: ``demo``, ``simulate``, ``plan``, ``serve``, ``join``, ``init``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedsecure.cli.options import Json, LogFormat, Quiet


def demo(
    adapter: Annotated[
        str | None,
        typer.Option(
            help="An installed method, such as linear, facmic, clip2fl, prototypes or ridge. "
            "Default: what scores better, facmic for the generated scans and linear otherwise."
        ),
    ] = None,
    sites: Annotated[int, typer.Option(help="Training sites, at least 3, where the data does not say.")] = 3,
    rounds: Annotated[
        int | None, typer.Option(help="Training rounds; 20 by default, 60 for facmic, 1 for prototypes and ridge.")
    ] = None,
    local_steps: Annotated[int, typer.Option(help="Steps a site takes a round, with --noise local.")] = 1,
    noise: Annotated[Literal["distributed", "local"], typer.Option(help="Where the noise is added.")] = "distributed",
    epsilon: Annotated[float, typer.Option(help="Privacy budget ε of the whole run, per site.")] = 8.0,
    delta: Annotated[float, typer.Option(help="δ of the guarantee.")] = 1e-5,
    sampling_rate: Annotated[float, typer.Option(help="1: full batch; less: Poisson sampling.")] = 1.0,
    data: Annotated[
        Path | None, typer.Option(help="Your images: DIR/<site>/<class>/*.{jpg,png}. They never leave this machine.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Precomputed features, .npz (docs/datasets.md).")] = None,
    eval_site: Annotated[str | None, typer.Option(help="A site folder of --data that only evaluates.")] = None,
    public_eval: Annotated[
        bool | None,
        typer.Option(
            "--public-eval/--private-eval",
            help="Evaluation sets are declared public and counted exactly, or noised and charged. "
            "Default: public for generated and feature files, private for --data.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="An open_clip model, or the bundled one.")] = "fedsecure-tiny",
    pretrained: Annotated[str, typer.Option(help="An open_clip tag or a local weights file.")] = "bundled",
    engine: Annotated[
        Literal["auto", "opacus", "closed-form"], typer.Option(help="Where clipped sums come from.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    colluders: Annotated[int | None, typer.Option(help="Colluding sites the sum withstands, at least 1.")] = None,
    min_survivors: Annotated[int | None, typer.Option(help="Fewest sites in a sum, at least 3.")] = None,
    seed: Annotated[int, typer.Option(help="Of the generated scans; never of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report, adapter and logs; replaced.")] = Path("fedsecure-demo"),
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine. The aggregator and every site are processes of their own."""
    from fedsecure.cli.display import print_json, show_demo, show_plan
    from fedsecure.cli.progress import demo_progress
    from fedsecure.simulation.demo import DemoOptions, run_demo

    options = DemoOptions(
        out=out,
        adapter=adapter,
        sites=sites,
        rounds=rounds,
        local_steps=local_steps,
        noise=noise,
        epsilon=epsilon,
        delta=delta,
        sampling_rate=sampling_rate,
        data=data,
        features=features,
        eval_site=eval_site,
        public_evaluation=public_eval,
        model=model,
        pretrained=pretrained,
        engine=engine,
        device=device,
        colluders=colluders,
        min_survivors=min_survivors,
        seed=seed,
    )
    # Told to stop, it must end its processes first; the default handler would leave them to themselves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with demo_progress(live=not as_json) as watch:
        result = run_demo(options, watch=watch) if as_json else run_demo(options, watch=watch, planned=show_plan)
    if as_json:
        print_json(result.summary)
    else:
        show_demo(result)


def simulate(
    method: Annotated[str, typer.Option(help="Installed method, or several with commas.")] = "linear",
    federation: Annotated[
        Path | None,
        typer.Option(
            help="Settings as for fedsecure init; or, without --features, the federation.toml of a laid-out one."
        ),
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Records to share out, .npz (docs/datasets.md).")] = None,
    sites: Annotated[int, typer.Option(help="Sites, where no settings name them.")] = 5,
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:ALPHA (labels) or quantity:ALPHA (sizes); several with commas.")
    ] = "iid",
    epsilon: Annotated[str, typer.Option(help="Targets; inf is a run without privacy.")] = "0.5,1,2,4,8,inf",
    noise: Annotated[str, typer.Option(help="distributed, local, or both with a comma.")] = "distributed",
    seeds: Annotated[int, typer.Option(help="Repeats: of partition, first weights and noise.")] = 3,
    delta: Annotated[float, typer.Option(help="δ of the guarantee.")] = 1e-5,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    local_steps: Annotated[int, typer.Option(help="Noisy steps a site takes per round, with --noise local.")] = 1,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Share of units that a step draws by Poisson sampling; 1 where ε is inf.")
    ] = None,
    colluders: Annotated[int | None, typer.Option(help="Colluding sites the sum withstands, at least 1.")] = None,
    min_survivors: Annotated[int | None, typer.Option(help="Fewest sites in a sum, at least 3.")] = None,
    train: Annotated[str, typer.Option(help="Splits of --features to share out, with commas.")] = "train",
    test: Annotated[str, typer.Option(help="Split of --features to evaluate on; public.")] = "test",
    centre: Annotated[
        str, typer.Option(help="Public mean: file, none, or FILE.npz:ARRAY of public image features.")
    ] = "file",
    out: Annotated[Path, typer.Option(help="Folder of the results; continued if it is there.")] = Path(
        "fedsecure-simulation"
    ),
    as_json: Json = False,
) -> None:
    """Measure methods over ε. Each cell is a whole run in memory, with a deployment's code."""
    from fedsecure.cli.display import print_json
    from fedsecure.cli.simulated import show_simulation, simulation_progress, without_infinity
    from fedsecure.simulation.simulate import SimulationOptions, listed, numbers
    from fedsecure.simulation.simulate import simulate as run

    options = SimulationOptions(
        out=out,
        methods=listed(method),
        federation=federation,
        features=features,
        sites=sites,
        partitions=listed(partition),
        epsilons=numbers("--epsilon", epsilon),
        noises=listed(noise),
        seeds=seeds,
        delta=delta,
        rounds=rounds,
        local_steps=local_steps,
        sampling_rate=sampling_rate,
        colluders=colluders,
        min_survivors=min_survivors,
        train=listed(train),
        test=test,
        centre=centre,
    )
    with simulation_progress(live=not as_json) as watch:
        result = run(options, watch=watch)
    if as_json:
        print_json(without_infinity(result))
    else:
        show_simulation(result)


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="settings.toml or federation.toml; or else the numbers below.")
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Training sites, at least 3.")] = None,
    units: Annotated[int | None, typer.Option(help="Patients (or records) of each site.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    dimension: Annotated[int | None, typer.Option(help="Feature width of the encoder; 512 by default.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget ε; 8 by default, or the file's.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="δ of the guarantee, with numbers; by default 1e-5, or less for large sites.")
    ] = None,
    colluders: Annotated[int | None, typer.Option(help="Colluding sites the sum withstands, with numbers.")] = None,
    as_json: Json = False,
) -> None:
    """Recommend method, module and place of the noise from public numbers. No data is read."""
    from fedsecure.cli.display import print_json, show_recommendation
    from fedsecure.methods.recommend import Numbers, recommend

    if config is None:
        numbers = Numbers.given(
            sites=sites,
            units=units,
            classes=classes,
            dimension=dimension,
            epsilon=epsilon,
            delta=delta,
            colluders=colluders,
        )
    else:
        Numbers.check_alone(config, sites=sites, units=units, classes=classes, colluders=colluders)
        numbers = Numbers.read(config, dimension=dimension, epsilon=epsilon)
    found = recommend(numbers)
    if as_json:
        print_json(found.to_dict())
    else:
        show_recommendation(found)


def serve(
    config: Annotated[
        list[Path], typer.Option(help="federation.toml; repeated for several runs at once behind one port.")
    ],
    quiet: Quiet = False,
    log_format: LogFormat = "text",
    as_json: Json = False,
) -> None:
    """Run the aggregator until the run ends. Started again after a crash or a stop, it goes on where the run was."""
    from fedsecure.aggregator.program import serve as run
    from fedsecure.cli.display import print_json, set_up_logging, show_outcome
    from fedsecure.cli.logged import serve_lines
    from fedsecure.cli.progress import serve_progress
    from fedsecure.config import FederationConfig, load

    set_up_logging(log_format)
    live = not (quiet or as_json) and len(config) == 1
    with serve_lines() if log_format == "json" else serve_progress(live=live) as (announce, watch):
        outcomes = run([load(file, FederationConfig) for file in config], announce=announce, watch=watch)
    if as_json:
        print_json(outcomes[0] if len(outcomes) == 1 else {"runs": outcomes})
        return
    for outcome in outcomes:
        show_outcome(outcome)


def join(
    config: Annotated[Path, typer.Option(help="site.toml")],
    quiet: Quiet = False,
    log_format: LogFormat = "text",
    as_json: Json = False,
) -> None:
    """Take part in a run with this site's data, until it ends."""
    from fedsecure.cli.display import print_json, set_up_logging, show_plan, show_site_report
    from fedsecure.cli.logged import join_lines
    from fedsecure.cli.progress import join_progress
    from fedsecure.client import Client

    set_up_logging(log_format)
    shown = join_lines() if log_format == "json" else join_progress(live=not (quiet or as_json))
    with shown as watch, Client.from_config(config, progress=watch) as client:
        if not as_json and log_format == "text":
            show_plan(client.plan)
        client.run()
        report = client.privacy_report()
    if as_json:
        print_json(report)
    else:
        show_site_report(report, folder=client.config.state / "runs" / client.run_id.hex())


def init(
    folder: Annotated[Path, typer.Argument(help="New folder for the federation.")],
    settings: Annotated[Path, typer.Option(help="TOML with the run's public settings (docs/configuration.md).")],
    listen: Annotated[str, typer.Option(help="host:port the aggregator listens on.")] = "127.0.0.1:8443",
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the aggregator's certificate; may be repeated.")
    ] = None,
    site_keys: Annotated[
        bool,
        typer.Option(
            "--site-keys/--no-site-keys",
            help="Make the sites' private keys here, for a trial; or none, and each site enrols with its own.",
        ),
    ] = True,
    enrolment: Annotated[str, typer.Option(help="host:port of the enrolment desk; none by default.")] = "",
) -> None:
    """Make a federation: for a trial with the keys of all members in one place, or without the sites' keys."""
    from fedsecure.cli.display import show_layout
    from fedsecure.simulation.scaffold import initialise

    hosts = tuple(host or ("127.0.0.1", "localhost"))
    show_layout(initialise(folder, settings, listen=listen, hosts=hosts, site_keys=site_keys, enrolment=enrolment))
