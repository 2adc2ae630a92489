"""The CLIP2FL example on features and on images: one command, rows of every method, resumed, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from by_file import load
from PIL import Image

from fedsecure.data.longtail import long_tail_counts
from fedsecure.errors import ConfigError, DataError, FedsecureError, PrivacyError
from fedsecure.learning.class_draws import ClassDraws
from fedsecure.learning.clip2fl_reference import Retrained
from fedsecure.simulation import clip2fl
from fedsecure.simulation.clip2fl import NAMES, TRUNK_OF, Settings, over_rounds, run_published
from fedsecure.simulation.folders import Part
from fedsecure.simulation.longtail import LongTail, Source, arrange, from_features, from_images, group_bounds
from fedsecure.simulation.simulate import open_results

C, D = 3, 8
QUICK = Settings(rounds=2, epochs=1, last=1, each=4, matching_steps=5, retraining_epochs=5, rate=0.05)
SHORT = (
    *("--rounds", "2", "--epochs", "1", "--last", "1", "--each", "4", "--matching-steps", "5"),
    *("--retraining-epochs", "5", "--seeds", "1", "--sites", "3", "--imbalance", "4", "--alpha", "5"),
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("examples/clip2fl.py", monkeypatch)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    text = np.eye(C, D, dtype=np.float32)
    arrays: dict[str, Any] = {"classes": np.array(["cat", "dog", "eel"]), "text": text}
    for split, each in (("train", 20), ("val", 12), ("test", 10)):
        labels = np.repeat(np.arange(C), each)
        arrays[f"{split}_x"] = (text[labels] + 0.2 * generator.standard_normal((len(labels), D))).astype(np.float32)
        arrays[f"{split}_y"] = labels
    path = tmp_path_factory.mktemp("features") / "held.npz"
    np.savez(path, **arrays)
    return path


def tail_of(file: Path, **changed: Any) -> LongTail:
    source = from_features(file, train=("train", "val"), test="test", public="val", each=5)
    given = {"sites": 3, "imbalance": 4, "partition": "equal-dirichlet:5", "seed": 0, **changed}
    return arrange(source, **given)


def refused(kind: type[FedsecureError], code: str, act: Any) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.code == code


def test_public_records_are_in_no_other_part(file: Path) -> None:
    tail = tail_of(file)
    assert len(tail.source.public) == 5 * C
    assert len(tail.source.train) == (20 + 12 - 5) * C
    held = {row.tobytes() for row in tail.source.train.features}
    assert not held & {row.tobytes() for row in tail.source.public.features}
    assert tail.counts.tolist() == [27, 13, 6]
    assert sum(len(part) for part in tail.experiment.train.values()) == 46
    # The usual bounds would leave a group empty, so classes are taken in thirds.
    assert [members.tolist() for members in tail.groups.values()] == [[0], [1], [2]]
    assert "thirds" in group_bounds(tail)


def test_the_order_of_the_tail_follows_the_seed_where_classes_are_equal(file: Path) -> None:
    counts = {tuple(tail_of(file, commonest_first=True, seed=seed).counts.tolist()) for seed in range(6)}
    assert len(counts) > 1
    assert {tuple(sorted(one)) for one in counts} == {(6, 13, 27)}


def test_bad_experiments(file: Path, tmp_path: Path) -> None:
    for partition in ("equal-dirichlet", "dirichlet:x", "quantity:1", "iid:1"):
        refused(ConfigError, "FS-1010", lambda p=partition: tail_of(file, partition=p))
    refused(DataError, "FS-1160", lambda: tail_of(file, imbalance=1000))
    refused(DataError, "FS-1168", lambda: from_features(file, train=("train",), test="test", public="val", each=13))
    refused(DataError, "FS-1167", lambda: from_images(tmp_path, model="a", pretrained="b", cache=tmp_path))

    def run(**changed: Any) -> Any:
        given = {"seed": 0, "reason": "public", "partition": "p", "settings": QUICK, **changed}
        return run_published(tail_of(file), "fedavg", ["fedavg"], out=open_results(tmp_path / "out"), **given)

    refused(PrivacyError, "FS-1218", lambda: run(epsilon=8.0))
    refused(PrivacyError, "FS-1218", lambda: run(reason=" "))
    refused(ConfigError, "FS-1010", lambda: run(settings=replace(QUICK, students="resnet8")))


def test_without_public_records_a_set_is_as_large_as_the_papers(
    example: ModuleType, file: Path, tmp_path: Path, capsys: Any
) -> None:
    """Long tail of whole classes, no record kept back; what learns from public records is refused at once."""
    tail = arrange(
        from_features(file, train=("train",), test="test", public="train", each=0),
        sites=3, imbalance=4, partition="equal-dirichlet:5", seed=0,
    )  # fmt: skip
    assert tail.counts.tolist() == long_tail_counts(20, C, imbalance=4).tolist() == [20, 10, 5]
    assert tail.experiment.target is None
    assert set(tail.scores(np.zeros(0, np.int64), on="public").values()) == {None}
    out = tmp_path / "out"
    given = ["--features", str(file), "--public-each", "0", "--out", str(out), "--epsilon", "inf", *SHORT]
    assert example.main([*given, "--method", "zero-shot,fedavg,feddf"]) == 1
    assert "feddf without public records" in capsys.readouterr().err
    assert not (out / "published").exists()
    assert example.main([*given, "--method", "zero-shot,fedavg,clip2fl-published"]) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["all public"] for row in csv.DictReader(stream)] == [""] * 3


@pytest.mark.parametrize(("split", "imbalance"), [("cifar10", 100), ("cifar100", 100), ("cifar10", 50)])
def test_the_sets_of_the_papers_have_their_sizes(split: str, imbalance: int) -> None:
    """From features of the archives' size to shares: 12,406, 13,996 and 10,847 records (CReFF, CLIP2FL)."""
    classes, each = (10, 5000) if split == "cifar10" else (100, 500)
    labels = np.repeat(np.arange(classes), each)
    train = Part(np.zeros((len(labels), 2), np.float32), labels)
    test = train.rows(np.arange(classes) * each)
    source = Source(tuple(map(str, range(classes))), np.eye(classes, 2), None, 1.0, train, test, test.rows([]))
    tail = arrange(source, sites=20, imbalance=imbalance, partition="equal-dirichlet:0.5", seed=0)
    assert (
        tail.counts.sum()
        == {("cifar10", 100): 12_406, ("cifar100", 100): 10_847, ("cifar10", 50): 13_996}[split, imbalance]
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("--last", "0"),
            ("--each", "0"),
            ("--temperature", "0"),
            ("--tau", "-5"),
            ("--rate", "nan"),
            ("--seeds", "0"),
        ),
        *(("--negatives", "images"), ("--matching-cosine", "row"), ("--projection", "5")),
    ],
)
def test_settings_that_would_spoil_a_run_are_refused_before_it(
    example: ModuleType, file: Path, tmp_path: Path, capsys: Any, option: str, value: str
) -> None:
    given = ["--features", str(file), "--out", str(tmp_path / "out"), "--epsilon", "inf", *SHORT, option, value]
    assert example.main(given) == 1
    assert "FS-1010" in (told := capsys.readouterr().err)
    assert option in told
    assert not (tmp_path / "out").exists()


def test_a_test_set_without_a_class_is_refused_before_training(file: Path, tmp_path: Path) -> None:
    with np.load(file) as held:
        arrays = dict(held)
    kept = arrays["test_y"] != 1
    np.savez(tmp_path / "short.npz", **(arrays | {"test_x": arrays["test_x"][kept], "test_y": arrays["test_y"][kept]}))
    refused(DataError, "FS-1163", lambda: tail_of(tmp_path / "short.npz"))


def test_a_method_that_diverges_costs_no_other_its_row(
    example: ModuleType, file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    given = ["--features", str(file), "--train", "train,val", "--out", str(out), "--epsilon", "inf", *SHORT]
    given += ["--method", "zero-shot,fedavg-distilled", "--rate", "1000", "--strength", "1e30"]
    assert example.main(given) == 1
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["method"] for row in csv.DictReader(stream)] == ["zero-shot"]
    said = "Diverged, and so without a row: fedavg-distilled, seed 0"
    assert said in (out / "results.md").read_text(encoding="utf-8")
    assert said in capsys.readouterr().out


def test_a_classs_images_are_drawn_as_released_or_taken_all(file: Path) -> None:
    for chosen, draws in (("draws", ClassDraws()), ("all", None)):
        branch = clip2fl._branch("creff", tail_of(file), replace(QUICK, class_images=chosen), 0)  # type: ignore[arg-type]
        assert isinstance(branch, Retrained)
        assert branch.draws == draws


def test_a_device_that_there_is_not_is_refused_before_anything_is_read(
    example: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    given = ["--data", str(tmp_path / "none"), "--epsilon", "inf", "--method", "fedavg", "--out", str(tmp_path / "out")]
    assert example.main([*given, "--device", "abacus"]) == 1
    assert "FS-1639" in capsys.readouterr().err


def test_the_device_reaches_the_training(
    example: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(example, "run_published", lambda *_, device, **__: asked.append(device) or [])
    options = example.arguments(
        ["--features", str(file), "--out", str(tmp_path), "--epsilon", "inf", "--device", "cuda:7"]
    )
    rows = example.run_all_published(
        options, tail_of(file), ("fedavg", "fedprox"), QUICK, seed=0, watch=lambda _: None, diverged=lambda _: None
    )
    assert list(rows) == []
    assert asked == ["cuda:7", "cuda:7"]


def test_the_last_rounds_and_the_best_are_told_apart() -> None:
    def at(round: int, test: float, public: float | None = None) -> dict[str, Any]:
        scores = {"all": test, "few": None}
        return {"round": round, "test": scores, **({} if public is None else {"public": {"all": public}})}

    tests = [0.9, *(0.1 * place for place in range(10))]
    seen = over_rounds([at(place + 1, value, public=float(place == 4)) for place, value in enumerate(tests)])
    assert seen["late"] == {"all": pytest.approx(0.45), "few": None}, "the first of eleven is not among the last ten"
    assert seen["best"] == {"round": 5, "groups": {"all": tests[4], "few": None}, "chosen_on": "public"}
    blind = over_rounds([at(place + 1, value) for place, value in enumerate(tests)])
    assert (blind["best"]["round"], blind["best"]["chosen_on"]) == (1, "test")
    assert over_rounds([]) == {}


@pytest.mark.slow
def test_every_published_method_in_one_command_that_resumes(
    example: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    given = ["--features", str(file), "--train", "train,val", "--out", str(out), "--epsilon", "inf", *SHORT]
    given += ["--method", ",".join(NAMES), "--device", "cpu"]
    assert example.main(given) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == list(NAMES)
    for row in rows:
        for column in ("all", "many", "medium", "few", "all public"):
            assert 0 <= float(row[column]) <= 1
        # The test set is balanced.
        assert float(row["all"]) == pytest.approx(float(row["accuracy"]))
        assert row["device"] == ("" if row["method"] == "zero-shot" else "cpu")
        # CCVR calibrates once, and the branch looks on in the last round of two.
        rounds = {"zero-shot": 0, "ccvr": 0, "fedavg": 2, "tau-norm": 2}.get(row["method"])
        if rounds is not None:
            assert (row["all mean of last 10"] != "", row["best round"] != "") == (rounds > 0,) * 2
        if row["method"] == "creff":
            assert (row["best round"], row["all best round"]) == ("2", row["all"])
    page = (out / "results.md").read_text(encoding="utf-8")
    assert "27.72" in page
    assert "| clip2fl-published |" in page

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("fedsecure.learning.clip2fl_reference.train", never)
    assert example.main(given) == 0
    assert example.main([*given, "--rounds", "3", "--epsilon", "8"]) == 1
    assert "FS-1218" in capsys.readouterr().err


@pytest.mark.slow
def test_the_form_of_the_paper_is_another_training_than_the_program(file: Path, tmp_path: Path) -> None:
    """Equation 7's negatives, a classifier that goes on, one cosine a class, diagonal rows: each changes the result."""
    given = replace(QUICK, last=2, contrast=1.0, contrast_sum=True)
    forms = [{}, {"negatives": "features"}, {"warm_start": True}, {"matching_cosine": "matrix"}]
    rows = []
    for number, form in enumerate([*forms, {"class_gradients": "diagonal"}]):
        (row,) = run_published(
            tail_of(file), "fedavg-distilled", ["clip2fl-published"], out=open_results(tmp_path / str(number)),
            seed=0, reason="public", partition="p", settings=replace(given, **form),  # type: ignore[arg-type]
        )  # fmt: skip
        rows.append(row)
    assert len({json.dumps(row["moved"]) for row in rows[:4]}) >= 3
    assert rows[4]["bytes_up"] < rows[0]["bytes_up"] == rows[1]["bytes_up"]
    assert len({row["cell"] for row in rows}) == 5


@pytest.mark.slow
def test_a_private_run_beside_them(example: ModuleType, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--features", str(file), "--train", "train,val", "--out", str(out), "--epsilon", "8", *SHORT]
    assert example.main([*given, "--method", "linear", "--private-rounds", "2"]) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["method"] == "linear"
    assert float(row["epsilon_spent"]) <= 8
    assert 0 < float(row["all public"]) <= 1, "settings may be chosen on these"
    # What simulate counted on the test site is what its adapter scores.
    assert float(row["all"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)
    # A share of the records a round is another run, within the same ε.
    assert example.main([*given, "--method", "linear", "--private-rounds", "2", "--private-sampling", "0.5"]) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        (sampled,) = csv.DictReader(stream)
    assert sampled["cell"] != row["cell"]
    assert float(sampled["epsilon_spent"]) <= 8


@pytest.mark.slow
def test_the_private_form_of_clip2fl(example: ModuleType, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--features", str(file), "--train", "train,val", "--out", str(out), "--epsilon", "8,inf", *SHORT]
    forms = [name for name in example.FORMS if name != "clip2fl"]
    assert example.main([*given, "--method", ",".join(["clip2fl", *forms]), "--private-rounds", "3"]) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        private, token, *others = csv.DictReader(stream)
    assert {row["method"] for row in others} == set(forms)
    # Without the branch nothing is sent but the student.
    sent = {row["method"]: float(row["bytes_up"]) for row in others}
    assert sent["private-fedavg"] == sent["private-fedavg-distilled"]
    # Each form is a federation of its own.
    assert len({row["cell"] for row in (private, *others) if row["epsilon"] == "8.0"}) == 1 + len(forms)
    assert sent["private-fedavg-distilled"] < sent["private-creff"] == float(private["bytes_up"])
    assert float(private["epsilon_spent"]) <= 8
    assert (private["epsilon"], token["epsilon"]) == ("8.0", "inf")
    assert float(token["few"]) > 0.5


@pytest.mark.slow
def test_images(example: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for split, each in (("train", 8), ("test", 3), ("public", 2)):
        for place, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(90 * place, 90 * place + 90, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "data"), "--students", "resnet8", "--width", "1", "--out", str(out), *SHORT]
    given += ["--epsilon", "inf", "--method", "fedavg,clip2fl-published", "--imbalance", "2"]
    assert example.main(given) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["method"] for row in csv.DictReader(stream)] == ["fedavg", "clip2fl-published"]
    # The same network inside the private federation, from the same command.
    private = [*given[: given.index("--epsilon")], "--epsilon", "8", "--method", "clip2fl", "--private-rounds", "1"]
    assert example.main([*private, "--imbalance", "2"]) == 0
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["method"], float(row["epsilon_spent"]) <= 8) == ("clip2fl", True)
    assert 0 <= float(row["all public"]) <= 1
    # What the federation counted on the test site is what the kept student scores.
    assert float(row["all"]) == pytest.approx(float(row["accuracy"]), abs=1e-6)


def test_a_student_of_images_wants_images(example: ModuleType, file: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--features", str(file), "--train", "train,val", "--out", str(tmp_path / "out"), "--epsilon", "8", *SHORT]
    assert example.main([*given, "--method", "clip2fl", "--private-student", "resnet8"]) == 1
    assert "FS-1021" in capsys.readouterr().err


@pytest.mark.slow
def test_lists_of_images_as_they_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for split, counts in (("train", (5, 2)), ("val", (1, 1)), ("test", (2, 2))):
        lines = []
        for label, count in enumerate(counts):
            for i in range(count):
                name = f"{split}-{label}-{i}.png"
                Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
                lines.append(f"{name} {label}\n")
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text("".join(lines))

    def read() -> Any:
        return from_images(tmp_path, model="fedsecure-tiny", pretrained="bundled", cache=tmp_path / "cache")

    refused(DataError, "FS-1167", read)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    tail = arrange(read(), sites=2, imbalance=0, partition="iid", seed=0)
    assert tail.source.classes == ("cat", "dog")
    assert tail.counts.tolist() == [5, 2]
    assert len(tail.source.public) == 2


def test_every_method_has_a_trunk() -> None:
    from fedsecure.learning.baselines import TRUNKS

    assert set(TRUNK_OF.values()) == set(TRUNKS)
    assert set(clip2fl._WITH_GRADIENTS) <= set(TRUNK_OF)
