"""Folders as an experiment: the released split, test sets without duplicates, and what is refused before training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.data.partition import released_split
from fedsecure.data.phantoms import CLASSES, write_federation
from fedsecure.errors import DataError
from fedsecure.simulation.folders import Experiment, read_folders


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``DIR/<site>/<class>/*.png`` of four sites with 24 scans each."""
    made = tmp_path_factory.mktemp("scans")
    write_federation(made / "raw", sites=4, per_class=6, test_per_class=1, seed=3)
    for site in ("site_a", "site_b", "site_c", "site_d"):
        (made / "raw" / site / "train").rename(made / site)
    shutil.rmtree(made / "raw")
    return made


@pytest.fixture
def hospitals(scans: Path, tmp_path: Path) -> Path:
    shutil.copytree(scans, tmp_path / "hospitals")
    return tmp_path / "hospitals"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def read(cache: Path) -> Any:
    def call(folder: Path, **changes: Any) -> Experiment:
        options: dict[str, Any] = {"eval_site": "site_d", "model": "fedsecure-tiny", "pretrained": "bundled"}
        return read_folders(folder, cache=cache, **{**options, **changes})

    return call


def test_the_released_split_has_the_authors_sizes() -> None:
    """1179/147/147, 338/42/42 and 759/94/94: what the released program makes of the brain-tumour sites."""
    for count, sizes in ((1474, (1179, 147, 147)), (423, (338, 42, 42)), (949, (759, 94, 94))):
        parts = released_split(count)
        assert tuple(map(len, parts)) == sizes
        assert len(np.unique(np.concatenate(parts))) == sum(sizes)
    with pytest.raises(DataError, match="FS-1130"):
        released_split(9)


def test_sites_are_split_and_the_last_one_is_the_test(hospitals: Path, read: Any) -> None:
    found = read(hospitals, eval_site=None)
    assert {name: len(part) for name, part in found.train.items()} == {"site_a": 19, "site_b": 19, "site_c": 19}
    assert {name: len(part) for name, part in found.own.items()} == {"site_a": 2, "site_b": 2, "site_c": 2}
    assert {name: len(part) for name, part in found.tests.items()} == {"raw": 24, "clean": 24}
    assert found.classes == tuple(sorted(CLASSES))
    assert found.target is None
    assert found.scale > 1
    again = read(hospitals, eval_site="site_d")
    assert again.digest == found.digest
    assert read(hospitals, eval_site="site_a").digest != found.digest


def test_duplicates_leave_the_clean_sets(hospitals: Path, read: Any, tmp_path: Path) -> None:
    """One copy by content, another by origin only: raw holds both, clean goes by origin, strict by either."""
    kind = CLASSES[0]
    first, second, third = sorted((hospitals / "site_d" / kind).iterdir())[:3]
    shutil.copy(first, hospitals / "site_a" / kind / "copy.png")
    sizes = {name: len(part) for name, part in read(hospitals).tests.items()}
    assert sizes == {"raw": 24, "clean": 23}
    table = tmp_path / "origins.csv"
    rows = [str(path.relative_to(hospitals)) for path in sorted(hospitals.rglob("*.png"))]
    origin = {row: f"image {number}" for number, row in enumerate(rows)}
    origin[str(third.relative_to(hospitals))] = origin[str(second.relative_to(hospitals))]
    table.write_text("file,source_blob_sha1\n" + "".join(f"{row},{origin[row]}\n" for row in rows))
    sizes = {name: len(part) for name, part in read(hospitals, origins=table).tests.items()}
    assert sizes == {"raw": 24, "clean": 23, "strict": 22}
    assert len(read(hospitals).overlap.shared()) == 1
    table.write_text("file,source_blob_sha1\n" + "".join(f"{row},{origin[row]}\n" for row in rows[1:]))
    with pytest.raises(DataError, match="FS-1138"):
        read(hospitals, origins=table)
    with pytest.raises(DataError, match="FS-1138"):
        read(hospitals, origins=tmp_path / "none.csv")


def test_a_target_that_holds_test_images_is_refused_unless_that_is_wanted(
    hospitals: Path, read: Any, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(hospitals / "site_c", target)
    assert read(hospitals, target=target).target.shape[0] == 24
    shutil.copy(next((hospitals / "site_d" / CLASSES[0]).iterdir()), target / "seen.png")
    with pytest.raises(DataError, match="FS-1137"):
        read(hospitals, target=target)
    assert read(hospitals, target=target, transductive=True).target.shape[0] == 25
    whole = read(hospitals, transductive=True)
    assert np.array_equal(whole.target, whole.tests["raw"].features)


@pytest.mark.slow
def test_halves_of_the_test_are_apart_and_only_one_is_looked_at(hospitals: Path, read: Any) -> None:
    kind = CLASSES[0]
    first, second = sorted((hospitals / "site_d" / kind).iterdir())[:2]
    shutil.copy(first, hospitals / "site_d" / kind / "copy.png")
    shutil.copy(second, hospitals / "site_a" / kind / "copy.png")
    found = read(hospitals, halves=True)
    sizes = {name: len(part) for name, part in found.tests.items()}
    assert list(sizes) == ["raw", "clean", "seen", "unseen", "seen, clean", "unseen, clean"]
    assert (sizes["raw"], sizes["clean"]) == (25, 23)
    assert sizes["seen"] + sizes["unseen"] == sizes["raw"]
    assert sizes["seen, clean"] + sizes["unseen, clean"] == sizes["clean"]
    assert np.array_equal(found.target, found.tests["seen"].features)
    apart = {row.tobytes() for row in found.tests["unseen"].features}
    assert not apart & {row.tobytes() for row in found.target}
    # The same images are in the same halves whatever else lies in the folder.
    (hospitals / "site_d" / kind / "copy.png").unlink()
    again = read(hospitals, halves=True)
    assert {row.tobytes() for row in again.tests["unseen"].features} == apart


def test_a_test_of_one_image_has_no_halves(hospitals: Path, read: Any) -> None:
    for kind in sorted(CLASSES)[1:]:
        shutil.rmtree(hospitals / "site_d" / kind)
    for file in sorted((hospitals / "site_d").rglob("*.png"))[1:]:
        file.unlink()
    with pytest.raises(DataError, match="FS-1156"):
        read(hospitals, halves=True)


def test_missing_classes_keep_the_order_of_labels(hospitals: Path, read: Any) -> None:
    """A site of one class is no class 0: labels are the federation's."""
    last = sorted(CLASSES)[-1]
    for kind in sorted(CLASSES)[:-1]:
        shutil.rmtree(hospitals / "site_b" / kind)
    # Six scans are too few for the split.
    with pytest.raises(DataError, match="FS-1130"):
        read(hospitals)
    for number, file in enumerate(sorted((hospitals / "site_c" / last).iterdir())):
        shutil.copy(file, hospitals / "site_b" / last / f"more-{number}.png")
    assert set(read(hospitals).train["site_b"].labels.tolist()) == {len(CLASSES) - 1}


def test_odd_images_are_encoded(hospitals: Path, read: Any) -> None:
    folder = hospitals / "site_a" / CLASSES[0]
    Image.new("L", (1, 1), 7).save(folder / "one.png")
    Image.new("RGBA", (3, 90), (1, 2, 3, 4)).save(folder / "alpha.png")
    Image.new("1", (8, 8), 1).save(folder / "bits.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(folder / "deep.png")
    found = read(hospitals)
    assert len(found.train["site_a"]) == int(0.8 * 28)
    assert all(np.isfinite(part.features).all() for part in found.train.values())


def _other_name(folder: Path) -> None:
    (folder / "site_b" / CLASSES[0]).rename(folder / "site_b" / "Lesion")


def _torn(folder: Path) -> None:
    (folder / "site_b" / CLASSES[0] / "torn.png").write_bytes(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_other_name, "FS-1153"),
        (_torn, "FS-1106"),
        (lambda folder: shutil.rmtree(folder / "site_b"), "FS-1152"),
        (lambda folder: shutil.rmtree(folder), "FS-1150"),
    ],
    ids=["a class named differently", "a torn image", "two training sites", "no folder"],
)
def test_bad_folders_are_refused(hospitals: Path, read: Any, spoil: Any, code: str) -> None:
    spoil(hospitals)
    with pytest.raises(DataError, match=code):
        read(hospitals)
