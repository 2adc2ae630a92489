"""The example regenerates everything by one command: tables, plot, reports; what is wrong stops it before results."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from by_file import load
from federation_world import write_features
from safetensors.numpy import load_file

from fedsecure.data.phantoms import CLASSES, write_federation
from fedsecure.simulation import simulate as simulation

SHORT = ("--seeds", "1", "--rounds", "2", "--reference-rounds", "2", "--reference-steps", "2")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("examples/facmic.py", monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scans")
    write_federation(made / "raw", sites=4, per_class=12, test_per_class=1, seed=3)
    for site in ("site_a", "site_b", "site_c", "site_d"):
        (made / "raw" / site / "train").rename(made / site)
    shutil.rmtree(made / "raw")
    # One test image is also in a training site.
    shutil.copy(sorted((made / "site_d" / CLASSES[0]).iterdir())[0], made / "site_a" / CLASSES[0] / "copy.png")
    return made


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_tensors(file: Path) -> bytes:
    held = load_file(file)
    return b"".join(name.encode() + held[name].tobytes() for name in sorted(held))


@pytest.mark.slow
def test_folders(
    example: ModuleType, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(folders), "--transductive", "--epsilon", "8,inf", "--out", str(out), *SHORT]
    given += ["--method", "linear,local-only-linear,reference,reference-local"]
    assert example.main(given) == 0
    streams = capsys.readouterr()
    assert "1 images lie at more than one site" in streams.err
    rows = rows_of(out)
    assert [(row["method"], row["epsilon"]) for row in rows] == [
        ("linear", "8.0"),
        ("linear", "inf"),
        ("local-only-linear", "8.0"),
        ("local-only-linear", "inf"),
        ("reference", "inf"),
        ("reference-local", "inf"),
    ]
    for row in rows:
        assert row["partition"] == "folders"
        for name in ("raw", "clean", "site_a", "site_b", "site_c"):
            assert 0 <= float(row[f"accuracy {name}"]) <= 1
            assert 0 <= float(row[f"balanced accuracy {name}"]) <= 1
        # A simulated run counts on the whole test set, and so does the adapter that it leaves.
        assert float(row["accuracy raw"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)
        assert bool(row["best round"]) == row["method"].startswith("reference")
    assert float(rows[4]["best-round accuracy raw"]) >= float(rows[4]["accuracy raw"])
    page = (out / "results.md").read_text(encoding="utf-8")
    assert "raw" in page
    assert "82.74" in page
    first, _ = (out / "private" / "linear" / "reports").iterdir()
    report = json.loads(first.read_text(encoding="utf-8"))
    assert report["stamp"] == "NO PRIVACY (seeded)"

    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(simulation, "run_in_memory", forbidden)
    monkeypatch.setattr(example.reference, "_train", forbidden)
    assert example.main(given) == 0
    assert rows_of(out) == rows


@pytest.mark.slow
def test_a_feature_file(example: ModuleType, tmp_path: Path) -> None:
    features, out = tmp_path / "features.npz", tmp_path / "out"
    write_features(features, count=120)
    given = ["--features", str(features), "--sites", "3", "--partition", "quantity:100", "--out", str(out), *SHORT]
    given += ["--method", "linear,prototypes,reference-fedclip", "--epsilon", "inf"]
    # 32 records a batch, and about 40 at each site.
    assert example.main(given) == 0
    assert [row["method"] for row in rows_of(out)] == ["linear", "prototypes", "reference-fedclip"]
    # --rounds is not for a method of one release.
    assert [row["rounds"] for row in rows_of(out)] == ["2", "1", "2"]
    assert {row["partition"] for row in rows_of(out)} == {"quantity:100"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (("--method", "reference", "--epsilon", "8"), "FS-1218"),
        (("--method", "reference", "--epsilon", "inf", "--no-privacy", " "), "FS-1218"),
        (("--method", "nothing"), "FS-1004"),
        (("--eval-site", "site_x"), "FS-1151"),
        (("--target", "site_d"), "FS-1137"),
        (("--epsilon", "some"), "FS-1003"),
        (("--epsilon", "8,-1"), "FS-1003"),
        (("--method", "facmic-aligned"), "FS-1010"),
        (("--method", "facmic", "--normalisation", "public"), "FS-1010"),
        (("--method", "local-only-facmic", "--normalisation", "none"), "FS-1010"),
    ],
)
def test_bad_requests_leave_no_results(
    example: ModuleType, folders: Path, tmp_path: Path, changes: tuple[str, ...], code: str, capsys: Any
) -> None:
    given = [str(folders / "site_d") if value == "site_d" else value for value in changes]
    out = tmp_path / "out"
    assert example.main(["--data", str(folders), "--out", str(out), *SHORT, *given]) == 1
    assert code in capsys.readouterr().err
    assert not (out / "results.csv").exists()
    assert not list(out.rglob("cells/*"))


def test_small_sites_are_told_before_anything_trains(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: Any
) -> None:
    """Twelve images a class are 38 training records; the private methods would have run first."""
    out = tmp_path / "out"
    given = ["--data", str(folders), "--out", str(out), *SHORT, "--epsilon", "8,inf", "--reference-batch", "40"]
    assert example.main([*given, "--method", "linear,reference"]) == 1
    told = capsys.readouterr().err
    assert "FS-1664" in told
    assert "--reference-batch" in told
    assert "without the alignment" in told, "and that there is no target is said at once"
    assert not list(out.rglob("cells/*"))


@pytest.mark.slow
def test_facmic_aligned_is_another_run_than_facmic(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    """The adapter depends on the target, and so on which images are one; a plain run does not."""
    found: dict[str, list[bytes]] = {}
    for name, target in (("test", ["--transductive"]), ("half", ["--halves"])):
        out = tmp_path / name
        given = ["--data", str(folders), "--out", str(out), "--epsilon", "8", *SHORT, "--rounds", "3", *target]
        assert example.main([*given, "--method", "facmic,facmic-aligned"]) == 0
        assert [row["method"] for row in rows_of(out)] == ["facmic", "facmic-aligned"]
        for method in ("facmic", "facmic-aligned"):
            (file,) = (out / "private" / method / "adapters").iterdir()
            found.setdefault(method, []).append(read_tensors(file))
    assert found["facmic"][0] == found["facmic"][1]
    assert len({*found["facmic"], *found["facmic-aligned"]}) == 3


@pytest.mark.slow
def test_normalisation_by_the_target_is_another_run_and_its_adapter_scores_without_it(
    example: ModuleType, folders: Path, tmp_path: Path
) -> None:
    found = {}
    for normalisation in ("layer", "public", "none"):
        out = tmp_path / normalisation
        given = ["--data", str(folders), "--out", str(out), "--epsilon", "8", *SHORT, "--rounds", "3", "--transductive"]
        assert example.main([*given, "--method", "facmic,facmic-aligned", "--normalisation", normalisation]) == 0
        for row in rows_of(out):
            # What the federation counted on the test site is what the kept adapter scores on its images.
            assert float(row["accuracy raw"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)
            (file,) = (out / "private" / row["method"] / "adapters").iterdir()
            found[normalisation, row["method"]] = read_tensors(file)
    assert len(found) == len(set(found.values())) == 6


def test_normalisation_is_of_images(example: ModuleType, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        example.main(["--features", str(tmp_path / "f.npz"), "--normalisation", "none"])
    assert "--normalisation goes with --data" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_inside_the_towers_train_on_the_images(
    example: ModuleType, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(folders), "--out", str(out), "--epsilon", "8", "--seeds", "1", "--rounds", "1"]
    assert example.main([*given, "--method", "linear,promptfl,lora"]) == 0
    rows = rows_of(out)
    assert [row["method"] for row in rows] == ["linear", "promptfl", "lora"]
    for row in rows:
        # What the federation counted on the test site is what the kept adapter scores on its images.
        assert float(row["accuracy raw"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)
        assert {f"accuracy {name}" for name in ("clean", "site_a", "site_b", "site_c")} <= set(row)
    monkeypatch.setattr(simulation, "run_in_memory", None)
    monkeypatch.setattr("fedsecure.simulation.image_folders.image_scores", None)
    assert example.main([*given, "--method", "linear,promptfl,lora"]) == 0
    assert rows_of(out) == rows
    assert example.main(["--features", "x.npz", "--out", str(tmp_path / "other"), "--method", "lora"]) == 1
    assert "trains inside CLIP's towers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        ("--data", "x", "--partition", "dirichlet:1"),
        ("--data", "x", "--sites", "9"),
        ("--features", "x.npz", "--model", "ViT-B-16"),
        ("--features", "x.npz", "--origins", "x.csv"),
        ("--data", "x", "--seeds", "0"),
        ("--data", "x", "--reference-rounds", "0"),
    ],
    ids=" ".join,
)
def test_options_that_would_do_nothing_are_refused(
    example: ModuleType, other: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.arguments(other)
    assert other[2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [("--features", "x.npz"), ("--data", "x", "--transductive"), ("--data", "x", "--target", "y")]
)
def test_halves_are_of_images_and_the_only_target(example: ModuleType, other: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.arguments([*other, "--halves"])
    assert example.arguments(["--data", "x", "--halves"]).halves
