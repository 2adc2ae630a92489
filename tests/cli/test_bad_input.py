"""Every bad input a user can give on the command line is one error with its code and its cure, and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import Command
from federation_world import write_features
from safetensors.numpy import save_file

from fedsecure.config import DatasetConfig
from fedsecure.data.dataset import Dataset, no_records
from fedsecure.errors import ConfigError, DataError, FedsecureError, PrivacyError, RunError
from fedsecure.learning import inference
from fedsecure.simulation.processes import read_error


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- demo: options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--epsilon", "0"), "FS-1003"),
        (("--epsilon", "-1"), "FS-1003"),
        (("--epsilon", "nan"), "FS-1003"),
        (("--epsilon", "inf"), "FS-1003"),
        (("--delta", "0"), "FS-1003"),
        (("--delta", "0.05"), "FS-1203"),
        (("--sampling-rate", "1.5"), "FS-1003"),
        (("--rounds", "0"), "FS-1003"),
        (("--sites", "2"), "FS-1003"),
        (("--seed", "-1"), "FS-1003"),
        (("--min-survivors", "2"), "FS-1003"),
        (("--colluders", "0"), "FS-1003"),
        (("--colluders", "3"), "FS-1301"),
        (("--local-steps", "5"), "FS-1003"),
        (("--adapter", "quadratic"), "FS-1004"),
        (("--adapter", "evaluate"), "FS-1004"),
        (("--epsilon", "0.0001"), "FS-1204"),
        (("--data", "."), "FS-1010"),
        (("--eval-site", "site-1"), "FS-1010"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else v,
)
def test_demo_refuses_options(
    command: Command, tmp_path: Path, features_file: Path, options: tuple[str, ...], code: str
) -> None:
    out = tmp_path / "demo"
    ended = command("demo", "--json", "--features", features_file, "--out", out, *options)
    assert ended.error() == code
    if code == "FS-1003":
        assert options[0] in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--sites", "9"), "FS-1003"),
        (("--model", "ViT-B-61"), "FS-1600"),
        (("--pretrained", "nowhere"), "FS-1601"),
        (("--device", "cuda:99"), "FS-1607"),
        # 300 scans a site are too few for it.
        (("--epsilon", "0.001", "--adapter", "facmic"), "FS-1204"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else v,
)
def test_demo_refuses_what_does_not_fit_the_generated_scans(
    command: Command, tmp_path: Path, options: tuple[str, ...], code: str
) -> None:
    assert command("demo", "--out", tmp_path / "demo", *options).error() == code
    assert not list(tmp_path.iterdir())


def test_a_usage_error_is_told_as_such(command: Command) -> None:
    ended = command("demo", "--noise", "none")
    assert ended.status == 2
    assert "--noise" in ended.err
    assert "Traceback" not in ended.err


# --- demo: data -------------------------------------------------------------------------------------------------------


def _two_sites(folder: Path) -> None:
    for name in ("site_c", "site_d"):
        shutil.rmtree(folder / name)


def _empty_class(folder: Path) -> None:
    for scan in (folder / "site_b" / "ring_lesion").iterdir():
        scan.unlink()


def _lonely_class(folder: Path) -> None:
    (folder / "site_b" / "ring_lesion").rename(folder / "site_b" / "ring_leison")


def _no_classes(folder: Path) -> None:
    for site in folder.iterdir():
        shutil.rmtree(site)
        site.mkdir()


def _bad_name(folder: Path) -> None:
    (folder / "site_b").rename(folder / "St. Elsewhere")


def _nested(folder: Path) -> None:
    (folder / "site_b" / "ring_lesion" / "more").mkdir()


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _few_records(folder: Path) -> None:
    for scan in folder.glob("site_b/*/*"):
        if scan.name != "0000.png":
            scan.unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "code"),
    [
        (_gone, (), "FS-1150"),
        (lambda folder: None, ("--eval-site", "site_x"), "FS-1151"),
        (_two_sites, (), "FS-1152"),
        (lambda folder: shutil.rmtree(folder / "site_d"), ("--eval-site", "site_c"), "FS-1152"),
        (_lonely_class, (), "FS-1153"),
        (_no_classes, (), "FS-1154"),
        (_bad_name, (), "FS-1155"),
        (_empty_class, (), "FS-1103"),
        (_nested, (), "FS-1105"),
        (_few_records, ("--epsilon", "0.01", "--eval-site", "site_a"), "FS-1204"),
    ],
    ids=["missing", "eval-site", "two", "two-and-eval", "lonely", "no-class", "name", "empty", "nested", "few"],
)
def test_demo_refuses_data(
    command: Command,
    tmp_path: Path,
    hospitals: Path,
    spoil: Callable[[Path], None],
    options: tuple[str, ...],
    code: str,
) -> None:
    spoil(hospitals)
    before = snapshot(tmp_path)
    ended = command("demo", "--data", hospitals, "--out", tmp_path / "demo", *options)
    assert ended.error() == code
    if spoil in (_lonely_class, _bad_name, _empty_class, _nested):
        assert "site_b" in ended.err or "St. Elsewhere" in ended.err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_feature_files(command: Command, tmp_path: Path, features_file: Path) -> None:
    out = ("--out", tmp_path / "demo")
    assert command("demo", "--features", tmp_path / "none.npz", *out).error() == "FS-1100"
    (tmp_path / "text.npz").write_text("no archive")
    assert command("demo", "--features", tmp_path / "text.npz", *out).error() == "FS-1115"
    (tmp_path / "half.npz").write_bytes(features_file.read_bytes()[:2000])
    assert command("demo", "--features", tmp_path / "half.npz", *out).error() == "FS-1115"
    with np.load(features_file) as archive:
        np.savez(tmp_path / "bare.npz", train_x=archive["train_x"], train_y=archive["train_y"])
    assert command("demo", "--features", tmp_path / "bare.npz", *out).error() == "FS-1116"
    assert not (tmp_path / "demo").exists()


# --- demo: folder -----------------------------------------------------------------------------------------------------


def test_demo_replaces_only_what_a_demo_made(command: Command, tmp_path: Path, features_file: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter-1.txt").write_text("precious")
    assert command("demo", "--features", features_file, "--out", mine).error() == "FS-1009"
    assert command("demo", "--features", features_file, "--out", mine / "chapter-1.txt").error() == "FS-1009"
    assert snapshot(tmp_path) == {"thesis/chapter-1.txt": b"precious"}


def test_demo_does_not_replace_the_folder_it_runs_in(
    command: Command, tmp_path: Path, features_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".fedsecure-demo").write_text("")
    monkeypatch.chdir(tmp_path)
    assert command("demo", "--features", features_file, "--out", ".").error() == "FS-1009"
    assert snapshot(tmp_path) == {".fedsecure-demo": b""}


@pytest.mark.slow
def test_what_a_site_cannot_read_reaches_the_user_and_the_earlier_result_stays(
    command: Command, tmp_path: Path, features_file: Path
) -> None:
    """The features of one site are not finite: only that site's own process finds out."""
    with np.load(features_file) as archive:
        arrays = dict(archive)
    arrays["train_x"][1, 3] = np.nan
    np.savez(tmp_path / "spoiled.npz", **arrays)
    out = tmp_path / "demo"
    out.mkdir()
    (out / ".fedsecure-demo").write_text("")
    (out / "report.html").write_text("of the demo before")
    ended = command("demo", "--json", "--features", tmp_path / "spoiled.npz", "--out", out)
    assert ended.error() == "FS-1110"
    assert "site-" in ended.err.splitlines()[0]
    assert snapshot(out) == {".fedsecure-demo": b"", "report.html": b"of the demo before"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "spoiled.npz"]


@pytest.mark.slow
def test_an_unreadable_image_is_named_with_its_site(command: Command, tmp_path: Path, hospitals: Path) -> None:
    broken = hospitals / "site_c" / "solid_mass" / "0002.png"
    assert broken.exists()
    broken.write_bytes(broken.read_bytes()[:60])
    ended = command("demo", "--data", hospitals, "--eval-site", "site_a", "--out", tmp_path / "demo")
    shown = ended.err[ended.err.index("FS-") :]
    assert ended.status == 1
    assert shown.startswith("FS-1106 site_c: ")
    assert str(broken) in shown
    assert "Traceback" not in ended.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "error",
    [
        DataError("FS-1106", "scan 7.png [red]cannot[/red] be read", expected="a whole file", cure="replace it"),
        PrivacyError("FS-1204", "two\nlines", expected="more, of\nit", cure="a larger ε, or more"),
        RunError("FS-1702", "x" * 400, expected="y", cure="z"),
    ],
    ids=lambda e: e.code,
)
def test_an_error_is_read_back_as_it_was_printed(error: FedsecureError, capsys: pytest.CaptureFixture[str]) -> None:
    from fedsecure.cli.display import show_error

    show_error(ConfigError("FS-1001", "an earlier one", expected="e", cure="c"))
    show_error(error)
    again = read_error("listening on 127.0.0.1:1\n" + capsys.readouterr().err, where="site-1")
    assert again is not None
    assert type(again) is type(error)
    assert (again.code, again.found) == (error.code, f"site-1: {error.found}")
    assert (again.expected, again.cure) == (error.expected, error.cure)
    assert read_error("Killed\n", where="site-1") is None


# --- configuration ----------------------------------------------------------------------------------------------------

SETTINGS = """
classes = ["a", "b", "c"]
[encoder]
model = "features"
pretrained = "file"
dimension = 16
fingerprint = "{fingerprint}"
[privacy]
unit = "record"
[sites.north]
max_units = 30
[sites.east]
max_units = 30
[sites.west]
max_units = 30
""".format(fingerprint="ab" * 32)


@pytest.mark.parametrize("program", ["serve", "join"])
def test_configuration_files_are_refused(command: Command, tmp_path: Path, program: str) -> None:
    file = tmp_path / "run.toml"
    assert command(program, "--config", file).error() == "FS-1001"
    file.write_bytes(b"\xff\xfe not TOML")
    assert command(program, "--config", file).error() == "FS-1002"
    file.write_text("listen = [")
    assert command(program, "--config", file).error() == "FS-1002"
    file.write_text("lisetn = 'localhost'")
    assert command(program, "--config", file).error() == "FS-1003"
    assert snapshot(tmp_path) == {"run.toml": b"lisetn = 'localhost'"}


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ("max_units = 30\n", "max_unist = 30\n", "FS-1003", "max_unist"),
        ("[sites.west]\nmax_units = 30\n", "", "FS-1003", "sites = "),
        ('unit = "record"', "target_epsilon = 0", "FS-1003", "target_epsilon"),
        ('unit = "record"', "delta = 0.1", "FS-1203", "0.1"),
        ('unit = "record"', "target_epsilon = 1e-5", "FS-1204", "1e-05"),
        ('model = "features"', 'modell = "features"', "FS-1003", "modell"),
        ("dimension = 16\n", "dimenson = 16\n", "FS-1003", "dimenson"),
        ("[privacy]", '[method]\nname = "quadratic"\n[privacy]', "FS-1004", "quadratic"),
        ("[privacy]", "[rounds]\ncolluders = 3\n[privacy]", "FS-1301", "c=3"),
    ],
)
def test_init_refuses_settings(command: Command, tmp_path: Path, old: str, new: str, code: str, named: str) -> None:
    assert old in SETTINGS
    (tmp_path / "settings.toml").write_text(SETTINGS.replace(old, new, 1))
    ended = command("init", tmp_path / "federation", "--settings", tmp_path / "settings.toml")
    assert ended.error() == code
    assert named in ended.err
    assert not (tmp_path / "federation").exists()


def test_init_overwrites_nothing(command: Command, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    made = command("init", tmp_path / "federation", "--settings", tmp_path / "settings.toml")
    assert made.status == 0, made.err
    for site in ("north", "east", "west"):
        assert str(tmp_path / "federation" / "sites" / site / "site.toml") in made.out
    before = snapshot(tmp_path)
    assert command("init", tmp_path / "federation", "--settings", tmp_path / "settings.toml").error() == "FS-1403"
    assert snapshot(tmp_path) == before


# --- using the result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["predict", "evaluate"])
def test_adapters_are_refused(command: Command, tmp_path: Path, features_file: Path, program: str) -> None:
    file = tmp_path / "adapter.safetensors"
    target = (features_file,) if program == "predict" else ("--data", features_file)
    assert command(program, "--adapter", file, *target).error() == "FS-1634"
    file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not safetensors")
    assert command(program, "--adapter", file, *target).error() == "FS-1634"
    save_file({"weight": np.zeros(3, np.float32)}, file)
    assert command(program, "--adapter", file, *target).error() == "FS-1635"


def test_a_truncated_adapter_is_refused(command: Command, tmp_path: Path, feature_adapter: Path) -> None:
    file = tmp_path / "half.safetensors"
    file.write_bytes(feature_adapter.read_bytes()[:-20])
    assert command("predict", "--adapter", file, "scan.png").error() == "FS-1634"


def test_predict_refuses_what_is_no_image(
    command: Command, tmp_path: Path, image_adapter: Path, hospitals: Path
) -> None:
    good = next(hospitals.glob("site_a/*/*.png"))
    assert command("predict", "--adapter", image_adapter, tmp_path / "none.png").error() == "FS-1106"
    (tmp_path / "notes.png").write_text("no scan")
    ended = command("predict", "--json", "--adapter", image_adapter, good, tmp_path / "notes.png")
    assert ended.error() == "FS-1106"
    assert "notes.png" in ended.err


def test_an_adapter_of_features_refuses_images_and_other_features(
    command: Command, tmp_path: Path, feature_adapter: Path, features_file: Path, hospitals: Path
) -> None:
    scan = next(hospitals.glob("site_a/*/*.png"))
    assert command("predict", "--adapter", feature_adapter, scan).error() == "FS-1669"
    assert command("evaluate", "--adapter", feature_adapter, "--data", features_file, "--split", "test").status == 0
    write_features(tmp_path / "other.npz", seed=9)
    assert command("evaluate", "--adapter", feature_adapter, "--data", tmp_path / "other.npz").error() == "FS-1636"
    assert command("evaluate", "--adapter", feature_adapter, "--data", tmp_path / "none.npz").error() == "FS-1100"
    split = ("--data", features_file, "--split", "holdout")
    assert command("evaluate", "--adapter", feature_adapter, *split).error() == "FS-1114"


def test_evaluate_refuses_folders_of_other_classes(command: Command, image_adapter: Path, hospitals: Path) -> None:
    (hospitals / "site_a" / "ring_lesion").rename(hospitals / "site_a" / "other")
    assert command("evaluate", "--adapter", image_adapter, "--data", hospitals / "site_a").error() == "FS-1102"


def test_evaluate_takes_the_folder_it_stands_in(
    command: Command, image_adapter: Path, hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hospitals / "site_a")
    ended = command("evaluate", "--adapter", image_adapter, "--data", ".", "--json")
    assert (ended.status, json.loads(ended.out)["records"]) == (0, 24)


@pytest.mark.parametrize("name", ["a\nb", "a" * 240])
def test_evaluate_takes_a_folder_of_any_name(command: Command, image_adapter: Path, hospitals: Path, name: str) -> None:
    data = (hospitals / "site_a").rename(hospitals / name)
    assert command("evaluate", "--adapter", image_adapter, "--data", data, "--json").status == 0


def test_evaluate_takes_a_folder_without_a_name(
    command: Command, image_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def opened(config: DatasetConfig, *, classes: Sequence[str]) -> Dataset:
        names.append(config.name)
        raise no_records(config.name)

    monkeypatch.setattr(inference, "open_dataset", opened)
    assert command("evaluate", "--adapter", image_adapter, "--data", "/").error() == "FS-1104"
    assert names == ["data"]


@pytest.mark.parametrize("what", ["show", "history"])
def test_budget_refuses_what_is_no_ledger(command: Command, tmp_path: Path, what: str) -> None:
    file = tmp_path / "ledger.db"
    assert command("budget", what, "--ledger", file).error() == "FS-1261"
    assert not list(tmp_path.iterdir()), "a look must not make a ledger"
    file.write_text("no database at all, but long enough to be looked at " * 40)
    assert command("budget", what, "--ledger", file).error() == "FS-1252"


def test_report_refuses_what_is_no_report(command: Command, tmp_path: Path) -> None:
    page = ("--html", tmp_path / "page.html")
    assert command("report", tmp_path / "none.json", *page).error() == "FS-1232"
    (tmp_path / "other.json").write_text(json.dumps({"epsilon": 8}))
    assert command("report", tmp_path / "other.json", *page).error() == "FS-1232"
    (tmp_path / "text.json").write_text("{")
    assert command("report", tmp_path / "text.json", *page).error() == "FS-1232"
    assert not (tmp_path / "page.html").exists()
