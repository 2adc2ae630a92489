"""The ``fedsecure`` command: parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from fedsecure.cli.duplicates import duplicates
from fedsecure.errors import FedsecureError

app = typer.Typer(
    name="fedsecure",
    help="Hospitals fine-tune CLIP together through secure, private sums. Nothing else leaves a site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
budget = typer.Typer(help="What has been spent of each data set's privacy budget.", no_args_is_help=True)
app.add_typer(budget, name="budget")
transcript = typer.Typer(help="Recorded rounds.", no_args_is_help=True)
app.add_typer(transcript, name="transcript")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Engine = Literal["auto", "opacus", "closed-form"]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live display: plain lines on stderr.")]


def main() -> None:
    """Entry point: a failure made on purpose is one clear message and exit status 1."""
    try:
        app(prog_name="fedsecure")
    except FedsecureError as error:
        from fedsecure.cli.display import show_error

        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from fedsecure import __version__

        typer.echo(f"fedsecure {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    adapter: Annotated[str, typer.Option(help="linear, facmic, prototypes or ridge.")] = "linear",
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
    from fedsecure.cli.display import print_json, show_demo
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
        result = run_demo(options, watch=watch)
    if as_json:
        print_json(result.summary)
    else:
        show_demo(result)


@app.command()
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


app.command()(duplicates)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="settings.toml or federation.toml; or else the numbers below.")
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Training sites, at least 3.")] = None,
    units: Annotated[int | None, typer.Option(help="Patients (or records) of each site.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    dimension: Annotated[int | None, typer.Option(help="Feature width of the encoder; 512 by default.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget ε; 8 by default, or the file's.")] = None,
    delta: Annotated[float, typer.Option(help="δ of the guarantee, with numbers.")] = 1e-5,
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


@app.command()
def serve(
    config: Annotated[Path, typer.Option(help="federation.toml")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the aggregator of one run, until it ends."""
    from fedsecure.aggregator.program import serve as run
    from fedsecure.cli.display import print_json, set_up_logging, show_outcome
    from fedsecure.cli.progress import serve_progress
    from fedsecure.config import FederationConfig, load

    set_up_logging()
    loaded = load(config, FederationConfig)
    with serve_progress(live=not (quiet or as_json)) as (announce, watch):
        outcome = run(loaded, announce=announce, watch=watch)
    if as_json:
        print_json(outcome)
    else:
        show_outcome(outcome)


@app.command()
def join(
    config: Annotated[Path, typer.Option(help="site.toml")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take part in a run with this site's data, until it ends."""
    from fedsecure.cli.display import print_json, set_up_logging, show_plan, show_site_report
    from fedsecure.cli.progress import join_progress
    from fedsecure.client import Client

    set_up_logging()
    with join_progress(live=not (quiet or as_json)) as watch, Client.from_config(config, progress=watch) as client:
        if not as_json:
            show_plan(client.plan)
        client.run()
        report = client.privacy_report()
    if as_json:
        print_json(report)
    else:
        show_site_report(report, folder=client.config.state / "runs" / client.run_id.hex())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New folder for the federation.")],
    settings: Annotated[Path, typer.Option(help="TOML with the run's public settings (docs/configuration.md).")],
    listen: Annotated[str, typer.Option(help="host:port the aggregator listens on.")] = "127.0.0.1:8443",
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the aggregator's certificate; may be repeated.")
    ] = None,
) -> None:
    """Make a trial federation. Certificates, keys and configuration files of all members in one place."""
    from fedsecure.cli.display import show_layout
    from fedsecure.simulation.scaffold import initialise

    show_layout(initialise(folder, settings, listen=listen, hosts=tuple(host or ("127.0.0.1", "localhost"))))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    adapter: Annotated[Path, typer.Option(help="adapter.safetensors")],
    weights: Annotated[Path | None, typer.Option(help="Local weights of the encoder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Classify images with a trained adapter."""
    from fedsecure.cli.display import print_json, show_predictions
    from fedsecure.learning.inference import predict_images

    rows = predict_images(adapter, images, weights=weights, device=device)
    if as_json:
        print_json({"predictions": rows})
    else:
        show_predictions(rows)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Option(help="adapter.safetensors")],
    data: Annotated[Path, typer.Option(help="Class folders, a manifest .csv or a feature file .npz.")],
    split: Annotated[str | None, typer.Option(help="Split of a feature file or manifest.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the encoder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure an adapter on local records. The figures are exact and not private: keep them inside."""
    from fedsecure.cli.display import print_json, show_evaluation
    from fedsecure.learning.inference import evaluate_dataset

    result = evaluate_dataset(adapter, data, split=split, weights=weights, device=device)
    if as_json:
        print_json(result)
    else:
        show_evaluation(result)


class _PageFirst(typer.core.TyperGroup):
    """``fedsecure report FILE`` is short for ``fedsecure report page FILE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["page", *args])


report = typer.Typer(cls=_PageFirst, help="A privacy report as a page, or checked.", no_args_is_help=True)
app.add_typer(report, name="report")
ReportFile = Annotated[Path, typer.Argument(help="privacy-report.json of a site, or report.json of a federation.")]


@report.command("page")
def report_page(
    file: ReportFile,
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("privacy-report.html"),
) -> None:
    """Make a self-contained HTML page of a privacy report."""
    from fedsecure.privacy.report_html import load_report, write_html

    write_html(load_report(file), html)
    typer.echo(str(html))


@report.command("attach")
def report_attach(
    file: ReportFile,
    audit: Annotated[Path, typer.Option(help="What `fedsecure audit --json` printed.")],
    identity: Annotated[
        Path | None, typer.Option(help="identity.key of the report's site, to sign it anew; without it, unsigned.")
    ] = None,
) -> None:
    """Put the result of an audit into a report, in place."""
    import json

    from fedsecure.files import write_whole
    from fedsecure.identity import keys
    from fedsecure.privacy.report_html import load_report
    from fedsecure.privacy.report_verify import PURPOSE, attach_audit, load_audit, sign_report

    attached = attach_audit(load_report(file), load_audit(audit))
    if identity is not None:
        if attached["kind"] != "site":
            raise typer.BadParameter(
                "a federation's report is not signed; its sites' reports are", param_hint="identity"
            )
        key = keys.load_private_key(identity)
        attached = sign_report(attached, lambda body: keys.sign(key, PURPOSE, body), site=str(attached["site"]))
    write_whole(file, json.dumps(attached, indent=2, sort_keys=True).encode())
    typer.echo(f"{file}: {'signed anew' if identity else 'without a signature'}")


@report.command("verify")
def report_verify(
    file: ReportFile,
    roster: Annotated[Path | None, typer.Option(help="roster.json; without it signatures are not checked.")] = None,
    coordinator: Annotated[Path | None, typer.Option(help="coordinator.pub; beside the roster by default.")] = None,
    as_json: Json = False,
) -> None:
    """Compute every figure of a report again from its events, and check its sites' signatures."""
    from dataclasses import asdict

    from fedsecure.cli.display import print_json
    from fedsecure.identity import keys
    from fedsecure.identity.roster import Roster
    from fedsecure.privacy.report_html import load_report
    from fedsecure.privacy.report_verify import PURPOSE, verify_report

    public: dict[str, bytes] = {}
    if roster is not None:
        known = Roster.load(roster, keys.load_public_key(coordinator or roster.with_name("coordinator.pub")))
        public = {entry.site: entry.identity_key for entry in known.entries}

    def holds(site: str, body: bytes, signature: bytes) -> bool:
        return site in public and keys.verify(public[site], PURPOSE, body, signature)

    verdict = verify_report(load_report(file), verify=holds if roster is not None else None)
    if as_json:
        print_json(asdict(verdict) | {"ok": verdict.ok, "consistent": verdict.consistent})
    else:
        typer.echo(f"{verdict.figures} figures computed again, {len(verdict.findings)} differ")
        for line in [*verdict.findings, *(f"{site}: signature {what}" for site, what in verdict.signatures.items())]:
            typer.echo(line)
    raise typer.Exit(0 if (verdict.ok if roster is not None else verdict.consistent) else 1)


@budget.command("show")
def budget_show(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    delta: Annotated[float, typer.Option(help="δ at which ε is computed.")] = 1e-5,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Limit to reckon with where the ledger has none, such as the policy's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Spent and remaining ε of every data set, and how many more releases like the last one fit."""
    from fedsecure.cli.display import print_json, show_budget
    from fedsecure.privacy.budget import show

    rows = show(ledger, delta=delta, max_epsilon=max_epsilon)
    if as_json:
        print_json({"delta": delta, "datasets": rows})
    else:
        show_budget(rows, delta=delta)


@budget.command("history")
def budget_history(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    dataset: Annotated[str | None, typer.Option(help="Of this data set only.")] = None,
    delta: Annotated[float, typer.Option(help="δ at which ε of a single charge is computed.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Every charge, what it costs by itself and what became of it, and every limit."""
    from fedsecure.cli.display import print_json, show_history
    from fedsecure.privacy.budget import history

    rows = history(ledger, dataset=dataset, delta=delta)
    if as_json:
        print_json({"delta": delta, "entries": rows})
    else:
        show_history(rows, delta=delta)


@budget.command("set")
def budget_set(
    dataset: Annotated[str, typer.Argument(help="Name of the data set in the site's file.")],
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    epsilon: Annotated[float, typer.Option(help="Largest ε over all runs.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger for good.")],
    delta: Annotated[float, typer.Option(help="δ at which the limit holds.")] = 1e-5,
    population: Annotated[Literal["train", "evaluation"], typer.Option(help="Whose units.")] = "train",
) -> None:
    """Record an officer's limit; the smaller of it and the site's policy decides."""
    from fedsecure.privacy.budget import set_limit

    set_limit(ledger, dataset, population=population, epsilon=epsilon, delta=delta, reason=reason)
    typer.echo(f"{population} units of {dataset}: at most ε = {epsilon:g} at δ = {delta:g}")


@budget.command("verify")
def budget_verify(
    ledger: Annotated[Path, typer.Option(help="The site's ledger file.")],
    head: Annotated[str | None, typer.Option(help="rows:hash noted earlier; the ledger must still hold it.")] = None,
    renew: Annotated[bool, typer.Option(help="Write a lost .head file anew; needs --head.")] = False,
    as_json: Json = False,
) -> None:
    """Check the ledger's chain, and that it is no older copy."""
    from fedsecure.cli.display import print_json
    from fedsecure.privacy.budget import verify

    found = verify(ledger, head=head, renew=renew)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['rows']} rows, unbroken; head {found['head']}")


@transcript.command("verify")
def transcript_verify(
    file: Annotated[Path, typer.Argument(help="A recorded round.")],
    as_json: Json = False,
) -> None:
    """Check every signature, context, commitment and hash of a recorded round, and name who broke a rule."""
    from fedsecure.cli.display import print_json
    from fedsecure.secagg.verify import verify_transcript

    verdict = verify_transcript(file)
    if as_json:
        print_json(verdict.to_dict())
    else:
        typer.echo("\n".join(verdict.lines()))
    raise typer.Exit(0 if verdict.ok else 1)


@app.command()
def audit(
    features: Annotated[Path | None, typer.Option(help="Feature file, .npz; generated features by default.")] = None,
    adapter: Annotated[Literal["linear", "facmic"], typer.Option(help="What is trained.")] = "linear",
    noise: Annotated[Literal["distributed", "local"], typer.Option(help="Where the noise is added.")] = "distributed",
    unit: Annotated[Literal["patient", "record"], typer.Option(help="Whom the claim is about.")] = "record",
    engine: Annotated[Engine, typer.Option(help="Where clipped sums come from.")] = "auto",
    epsilon: Annotated[float, typer.Option(help="The claim to test.")] = 2.0,
    delta: Annotated[float, typer.Option(help="δ of the claim.")] = 1e-5,
    sampling_rate: Annotated[float, typer.Option(help="1: full batch; less: Poisson sampling.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Time to aim for.")] = 45.0,
    membership: Annotated[bool, typer.Option(help="Also attack membership, for the report.")] = True,
    as_json: Json = False,
) -> None:
    """Try to refute the proven ε: replay, canaries, membership attack."""
    from datetime import UTC, datetime

    from fedsecure.cli.display import print_json, show_audit
    from fedsecure.learning.audit_run import run_audit

    result = run_audit(
        features=features,
        adapter=adapter,
        noise=noise,
        unit=unit,
        engine=engine,
        epsilon=epsilon,
        delta=delta,
        sampling_rate=sampling_rate,
        seconds=seconds,
        membership=membership,
    )
    if as_json:
        print_json({"date": datetime.now(UTC).date().isoformat()} | result.to_dict())
    else:
        show_audit(result)
    raise typer.Exit(0 if result.passed else 1)
