"""A partition published as hashes: laid out whole or not at all; and what the shipped one says."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fedsecure.data.partition import released_split
from fedsecure.data.partition_manifest import Placement, arrange, git_sha1, read_partition
from fedsecure.errors import DataError
from fedsecure.learning.reference import batches_a_pass

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "partitions" / "brain-tumor.csv"


def test_the_hash_is_gits(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"picture\n")
    expected = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True, check=True)
    assert git_sha1(file) == expected.stdout.strip()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "download" / "deep"
    folder.mkdir(parents=True)
    for name in ("x.jpg", "y.JPG", "z.png"):
        (folder / name).write_bytes(name.encode())
    (folder / "notes.txt").write_text("no image")
    return folder.parent


def test_images_go_where_the_partition_says(source: Path, tmp_path: Path) -> None:
    sums = {file.name: git_sha1(file) for file in (source / "deep").iterdir()}
    manifest = tmp_path / "partition.csv"
    rows = [("a", "cat", "x.jpg"), ("a", "cat", "y.JPG"), ("b", "dog", "x.jpg")]
    manifest.write_text("site,label,git_sha1\n" + "".join(f"{s},{k},{sums[n]}\n" for s, k, n in rows))
    read: list[int] = []
    assert arrange(read_partition(manifest), source, tmp_path / "out", step=read.append) == 3
    assert sum(read) == 3
    laid = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert laid == {"a/cat/0000.jpg": b"x.jpg", "a/cat/0001.jpg": b"y.JPG", "b/dog/0000.jpg": b"x.jpg"}
    with pytest.raises(DataError, match="FS-1139"):
        arrange(read_partition(manifest), source, tmp_path / "out")


def test_a_missing_image_leaves_nothing(source: Path, tmp_path: Path) -> None:
    rows = (Placement("a", "cat", git_sha1(source / "deep" / "x.jpg")), Placement("a", "cat", "0" * 40))
    with pytest.raises(DataError, match="lacks 1 of 2"):
        arrange(rows, source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"download"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "site,label,git_sha1\n",
        "file,label\nx,y\n",
        f"site,label,git_sha1\n../up,cat,{'0' * 40}\n",
        f"site,label,git_sha1\na,,{'0' * 40}\n",
        "site,label,git_sha1\na,cat,xyz\n",
        "site,label,git_sha1\na,cat\n",
        f"site,label,git_sha1\na,cat,{'0' * 40},more\n",
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "partition.csv"
    file.write_text(text)
    with pytest.raises(DataError, match="FS-1139"):
        read_partition(file)


def test_the_shipped_partition_is_the_authors() -> None:
    """Counts of each cell, what the average weighs, and what is there twice."""
    rows = read_partition(SHIPPED)
    counts = Counter((row.site, row.label.removesuffix("_tumor")) for row in rows)
    classes = ("glioma", "meningioma", "no", "pituitary")
    expected = {
        "client_0": (424, 422, 203, 425),
        "client_1": (122, 121, 58, 122),
        "client_2": (273, 272, 130, 274),
        "client_3": (100, 115, 105, 74),
    }
    assert {site: tuple(counts[site, kind] for kind in classes) for site in expected} == expected
    sizes = [sum(expected[site]) for site in ("client_0", "client_1", "client_2")]
    assert [batches_a_pass(len(released_split(size)[0]), 32) for size in sizes] == [36, 10, 23]
    training = {row.git_sha1 for row in rows if row.site != "client_3"}
    test = [row.git_sha1 for row in rows if row.site == "client_3"]
    assert (len(test), len(set(test)), sum(sha in training for sha in test)) == (394, 314, 88)
    assert len(set(test) - training) == 250
    assert len({row.git_sha1 for row in rows}) == 3004
