"""The loader: every format opens, reads lazily, and refuses bad input with its own code."""

from __future__ import annotations

import ast
import gc
import io
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data import images as image_files
from fedsecure.data.dataset import Dataset, Subset
from fedsecure.data.features import _read, read_feature_header
from fedsecure.data.loading import from_arrays, from_torch, in_holdout, open_dataset
from fedsecure.errors import DataError

CLASSES = ("cat", "dog", "eel")


def opened(path: Path, **options: Any) -> Dataset:
    return open_dataset(DatasetConfig(name="t", path=path, **options), classes=CLASSES)


def refused(code: str, act: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


def save(path: Path, level: int, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (5, 4), level).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for i in range(3):
        save(root / "cat" / f"{i}.png", 10 * i)
        save(root / "eel" / f"{i}.jpg", 100 + 10 * i)
    return root


def feature_arrays(n: int = 9, d: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "train_x": rng.standard_normal((n, d)).astype(np.float16),
        "train_y": np.arange(n) % 3,
        "test_x": rng.standard_normal((5, d)).astype(np.float16),
        "test_y": np.arange(5) % 3,
        "classes": np.array(["eel", "cat", "dog"]),
        "text": rng.standard_normal((3, d)).astype(np.float32),
    }


def write_npz(folder: Path, **changes: Any) -> Path:
    arrays = feature_arrays() | changes
    np.savez(folder / "f.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / "f.npz"


class TestFolder:
    def test_opens_in_federation_order(self, tree: Path) -> None:
        ds = opened(tree)
        assert isinstance(ds, Dataset)
        assert ds.kind == "image"
        assert ds.labels.tolist() == [0, 0, 0, 2, 2, 2]
        assert ds.labels.dtype == np.int64
        assert ds.record_ids[0] == "cat/0.png"
        assert ds.patient_ids is None
        assert ds.image(1).mode == "RGB"
        assert ds.image(1).getpixel((0, 0)) == (10, 10, 10)
        assert ds.content_key(0) != ds.content_key(1)

    def test_listing_opens_no_file(self, tree: Path) -> None:
        (tree / "cat" / "0.png").write_bytes(b"not an image at all")
        ds = opened(tree)
        ds.index()
        error = refused("FS-1106", lambda: ds.image(0))
        assert "0.png" in str(error)

    def test_truncated(self, tree: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(tree / "eel" / "0.jpg")
        whole = (tree / "eel" / "0.jpg").read_bytes()
        (tree / "eel" / "0.jpg").write_bytes(whole[: len(whole) // 2])
        assert "0.jpg" in str(refused("FS-1106", lambda: opened(tree).image(3)))

    def test_vanished(self, tree: Path) -> None:
        ds = opened(tree)
        (tree / "cat" / "0.png").unlink()
        refused("FS-1106", lambda: ds.image(0))
        refused("FS-1106", lambda: ds.content_key(0))

    def test_oversize_refused_before_decoding(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_files, "MAX_PIXELS", 19)
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        refused("FS-1107", lambda: opened(tree).image(0))

    def test_pillow_bomb(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
        refused("FS-1107", lambda: opened(tree).image(0))

    def test_pillow_warns_of_a_bomb(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
        refused("FS-1107", lambda: opened(tree).image(0))

    def test_reading_touches_no_filter_of_warnings(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are the process's: a thread that trains would lose its own while another one reads."""
        monkeypatch.setattr(warnings, "catch_warnings", lambda *_, **__: pytest.fail("filters changed"))
        assert opened(tree).image(0).mode == "RGB"

    def test_unknown_class_named(self, tree: Path) -> None:
        save(tree / "fox" / "0.png", 1)
        assert "'fox'" in str(refused("FS-1102", lambda: opened(tree)))

    def test_empty_class_folder(self, tree: Path) -> None:
        (tree / "dog").mkdir()
        (tree / "dog" / "notes.txt").write_text("no image")
        assert "dog" in str(refused("FS-1103", lambda: opened(tree)))

    def test_nested_folder(self, tree: Path) -> None:
        save(tree / "cat" / "patient" / "0.png", 1)
        refused("FS-1105", lambda: opened(tree))

    def test_no_records(self, tmp_path: Path) -> None:
        refused("FS-1104", lambda: opened(tmp_path))

    def test_missing_path(self, tmp_path: Path) -> None:
        refused("FS-1100", lambda: opened(tmp_path / "absent"))
        refused("FS-1100", lambda: opened(tmp_path / "absent", format="folder"))

    def test_unknown_format(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("")
        refused("FS-1101", lambda: opened(tmp_path / "x.txt"))

    def test_split_is_a_subfolder(self, tree: Path) -> None:
        assert len(open_dataset(DatasetConfig(name="t", path=tree.parent, split="tree"), classes=CLASSES)) == 6

    def test_rows_need_features(self, tree: Path) -> None:
        refused("FS-1101", lambda: opened(tree, rows=(0, 2)))

    def test_deep_grey_keeps_its_range(self, tree: Path) -> None:
        deep = np.linspace(1000, 3000, 20).reshape(4, 5).astype(np.uint16)
        Image.fromarray(deep).save(tree / "cat" / "0.png")
        seen = np.asarray(opened(tree).image(0))[:, :, 0]
        assert seen.min() == 0
        assert seen.max() == 255
        assert len(np.unique(seen)) == 20

    def test_palette_with_transparency(self, tree: Path) -> None:
        Image.new("P", (3, 3)).save(tree / "cat" / "0.png", transparency=b"\x00\xff")
        assert opened(tree).image(0).mode == "RGB"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_folder(self, tree: Path) -> None:
        tree.chmod(0)
        try:
            refused("FS-1100", lambda: opened(tree, format="folder"))
        finally:
            tree.chmod(0o700)


class TestHoldout:
    @pytest.mark.slow
    @given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
    def test_monotone(self, unit: str, a: float, b: float) -> None:
        low, high = sorted((a, b))
        assert in_holdout(unit, low) <= in_holdout(unit, high)

    def test_parts_are_a_partition(self, tmp_path: Path) -> None:
        for i in range(40):
            save(tmp_path / "cat" / f"{i}.png", i)
        parts = [opened(tmp_path, holdout=0.3, part=p) for p in ("train", "evaluation")]
        ids = [set(p.record_ids) for p in parts]
        assert not ids[0] & ids[1]
        assert ids[0] | ids[1] == set(opened(tmp_path).record_ids)
        assert 4 <= len(ids[1]) <= 20
        row = parts[1].record_ids.index(min(ids[1]))
        level = int(Path(min(ids[1])).stem)
        assert parts[1].image(row).getpixel((0, 0)) == (level,) * 3

    def test_patients_stay_together(self) -> None:
        ds = from_arrays(
            np.ones((60, 3)), np.zeros(60, int), classes=CLASSES, patients=[str(i // 3) for i in range(60)]
        )
        from fedsecure.data.loading import _part

        sides = [_part(ds, 0.5, evaluation=e) for e in (False, True)]
        patients = [set(s.patient_ids or ()) for s in sides]
        assert patients[0]
        assert patients[1]
        assert not patients[0] & patients[1]
        assert sum(len(s) for s in sides) == 60

    def test_empty_side(self, tree: Path) -> None:
        ds = opened(tree, holdout=0.0, part="evaluation")
        refused("FS-1119", lambda: len(ds))

    def test_subset_refuses_repeats_and_strangers(self, tree: Path) -> None:
        base = opened(tree)
        refused("FS-1109", lambda: len(Subset(base, [1, 1])))
        refused("FS-1109", lambda: len(Subset(base, [6])))
        refused("FS-1109", lambda: len(Subset(base, [-1])))
        refused("FS-1104", lambda: len(Subset(base, [])))


class TestManifest:
    def write(self, tree: Path, *lines: str) -> Path:
        file = tree.parent / "m.csv"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    def test_opens_with_patients_and_split(self, tree: Path) -> None:
        file = self.write(
            tree,
            "file,label,patient,split",
            "tree/cat/1.png,cat,P1,train",
            "tree/eel/0.jpg,eel,P2,test",
            "tree/eel/1.jpg,eel,P1,train",
        )
        ds = opened(file, split="train")
        assert ds.labels.tolist() == [0, 2]
        assert ds.patient_ids == ("P1", "P1")
        assert ds.record_ids == ("tree/cat/1.png", "tree/eel/1.jpg")
        assert ds.image(0).getpixel((0, 0)) == (10, 10, 10)

    @pytest.mark.parametrize(
        ("code", "lines"),
        [
            ("FS-1112", ["path,label", "tree/cat/1.png,cat"]),
            ("FS-1112", ["file,label", '"tree/cat/1.png,cat']),
            ("FS-1102", ["file,label", "tree/cat/1.png,fox"]),
            ("FS-1113", ["file,label", "tree/cat/9.png,cat"]),
            ("FS-1113", ["file,label", "tree/cat/1.png,cat", "tree/cat/../cat/1.png,cat"]),
            ("FS-1113", ["file,label,patient", "tree/cat/1.png,cat,"]),
            # A patient with no image.
            ("FS-1113", ["file,label,patient", "tree/cat/1.png,cat,P1", ",cat,P2"]),
            ("FS-1113", ["file,label", "tree/cat/1.png,cat,surplus"]),
            ("FS-1113", ["file,label", "tree/cat/1.png"]),
            ("FS-1114", ["file,label,split", "tree/cat/1.png,cat,train"]),
            ("FS-1104", ["file,label"]),
        ],
    )
    def test_bad(self, tree: Path, code: str, lines: list[str]) -> None:
        refused(code, lambda: opened(self.write(tree, *lines)))

    def test_bad_split(self, tree: Path) -> None:
        refused("FS-1114", lambda: opened(self.write(tree, "file,label", "tree/cat/1.png,cat"), split="train"))
        lines = ("file,label,split", "tree/cat/1.png,cat,train")
        assert "train" in refused("FS-1114", lambda: opened(self.write(tree, *lines), split="dev")).expected

    def test_not_utf8(self, tree: Path) -> None:
        (tree.parent / "m.csv").write_bytes(b"file,label\n\xff\xfe,cat\n")
        refused("FS-1112", lambda: opened(tree.parent / "m.csv"))


class TestFeatureFile:
    def test_opens_and_maps_classes_by_name(self, tmp_path: Path) -> None:
        ds = opened(write_npz(tmp_path, train_patient=np.arange(9) // 2))
        assert ds.kind == "features"
        assert ds.labels.tolist() == [2, 0, 1] * 3
        assert ds.features().dtype == np.float32
        np.testing.assert_array_equal(ds.features(), feature_arrays()["train_x"].astype(np.float32))
        assert ds.patient_ids == tuple(str(i // 2) for i in range(9))
        assert ds.record_ids[3] == "train/3"

    def test_stride_shares_one_file(self, tmp_path: Path) -> None:
        file = write_npz(tmp_path)
        parts = [opened(file, rows=(i, 3)) for i in range(3)]
        ids = [r for p in parts for r in p.record_ids]
        assert sorted(ids) == sorted(opened(file).record_ids)
        np.testing.assert_array_equal(parts[1].features(), opened(file).features()[1::3])
        refused("FS-1118", lambda: opened(file, rows=(9, 3)))
        refused("FS-1118", lambda: opened(file, rows=(0, 0)))

    def test_header(self, tmp_path: Path) -> None:
        header = read_feature_header(write_npz(tmp_path))
        assert header.classes == ("eel", "cat", "dog")
        assert header.splits == {"train": 9, "test": 5}
        assert header.dimension == 4
        assert header.mean is None
        np.testing.assert_allclose(np.linalg.norm(header.text, axis=1), 1, rtol=1e-6)
        centred = read_feature_header(write_npz(tmp_path, mean=np.ones(4)))
        assert centred.mean is not None
        assert centred.fingerprint != header.fingerprint
        other_rows = read_feature_header(write_npz(tmp_path, train_x=np.zeros((9, 4))))
        assert other_rows.fingerprint == header.fingerprint

    @pytest.mark.parametrize(
        ("code", "changes"),
        [
            ("FS-1116", {"text": None}),
            ("FS-1116", {"text": np.ones((3, 5))}),
            ("FS-1116", {"text": np.zeros((3, 4))}),
            ("FS-1110", {"text": np.full((3, 4), np.nan)}),
            ("FS-1116", {"classes": None}),
            ("FS-1116", {"classes": np.array(["cat", "cat", "eel"])}),
            ("FS-1116", {"train_y": None}),
            ("FS-1116", {"train_y": np.zeros(8, int)}),
            ("FS-1116", {"train_y": np.zeros(9)}),
            ("FS-1116", {"train_x": np.zeros((9, 4), int)}),
            ("FS-1116", {"test_x": np.zeros((5, 3))}),
            ("FS-1116", {"mean": np.zeros(3)}),
            ("FS-1116", {"train_patient": np.zeros(3)}),
            ("FS-1116", {"train_x": None, "test_x": None}),
            ("FS-1114", {"train_x": None, "train_y": None}),
            ("FS-1102", {"classes": np.array(["cat", "dog", "fox"])}),
            ("FS-1104", {"train_x": np.zeros((0, 4)), "train_y": np.zeros(0, int)}),
            ("FS-1115", {"classes": np.array(["cat", "dog", "eel"], dtype=object)}),
        ],
    )
    def test_bad_when_opened(self, tmp_path: Path, code: str, changes: dict[str, Any]) -> None:
        refused(code, lambda: opened(write_npz(tmp_path, **changes)))

    def test_bad_when_read(self, tmp_path: Path) -> None:
        nan = feature_arrays()["train_x"]
        nan[3, 1] = np.inf
        ds = opened(write_npz(tmp_path, train_x=nan))
        assert "row 3" in str(refused("FS-1110", ds.features))
        ds = opened(write_npz(tmp_path, train_y=np.full(9, 3)))
        refused("FS-1108", lambda: ds.labels)

    def test_too_large_or_too_short_is_refused_before_allocation(self, tmp_path: Path) -> None:
        def declare(rows: int) -> Path:
            raw = io.BytesIO()
            np.lib.format.write_array_header_1_0(raw, {"descr": "<f4", "fortran_order": False, "shape": (rows, 4)})
            file = tmp_path / "f.npz"
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("train_x.npy", raw.getvalue())
            return file

        refused("FS-1117", lambda: opened(declare(10**12)))
        refused("FS-1115", lambda: opened(declare(1000)))

    @given(
        dtype=st.sampled_from(["<f2", "<f4", "<f8", ">f4"]),
        labels=st.sampled_from(["|i1", "|u1", "<i4", ">i8"]),
        order=st.sampled_from(["C", "F"]),
        version=st.sampled_from([(1, 0), (2, 0)]),
        records=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_arrays_are_what_numpy_reads(self, tmp_path_factory, dtype, labels, order, version, records, seed) -> None:
        rng, file = np.random.default_rng(seed), tmp_path_factory.mktemp("npz") / "f.npz"
        arrays = feature_arrays() | {
            "train_x": np.asarray(rng.standard_normal((records, 4)), dtype, order),
            "train_y": rng.integers(0, 3, records).astype(labels),
            "train_patient": np.array([f"patient {i} ü" for i in range(records)]),
            "when": np.zeros(2, "<M8[ns]"),
            "nothing": np.zeros((0, 3)),
            "scalar": np.array(True),
        }
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w") as stream:
                    np.lib.format.write_array(stream, array, version=version, allow_pickle=False)
        with np.load(file) as numpys:
            for key in arrays:
                ours = _read(file, key)
                assert (ours.dtype, ours.shape) == (numpys[key].dtype, numpys[key].shape)
                assert ours.tobytes() == numpys[key].tobytes()
        assert opened(file).patient_ids == tuple(arrays["train_patient"])

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr': '<f3', 'fortran_order': False, 'shape': (9, 4), }\n",
            "{'descr': '<2f4', 'fortran_order': False, 'shape': (9, 2), }\n",
            "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }\n",
            "{'descr': '<O', 'fortran_order': False, 'shape': (9, 4), }\n",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (9, 4), }\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (9, -4), }\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (9 4), }\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n" % ("9" * 5000),
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (9, 4), }\n",
            "{'shape': (9, 4)}\n",
            " " * 20_000 + "\n",
        ],
    )
    def test_headers_that_numpy_does_not_write(self, tmp_path: Path, header: str) -> None:
        with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
            raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
            archive.writestr("train_x.npy", raw + bytes(9 * 4 * 4))
        refused("FS-1115", lambda: opened(tmp_path / "f.npz"))

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"])
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "f.npz").write_bytes(content)
        refused("FS-1115", lambda: opened(tmp_path / "f.npz"))

    def test_truncated_archive(self, tmp_path: Path) -> None:
        file = write_npz(tmp_path)
        file.write_bytes(file.read_bytes()[:-200])
        refused("FS-1115", lambda: opened(file))

    def test_missing(self, tmp_path: Path) -> None:
        refused("FS-1100", lambda: read_feature_header(tmp_path / "absent.npz"))


class TestKinds:
    def test_reading_survives_what_other_threads_parse(self, tmp_path: Path) -> None:
        # CPython's ast fails before 3.11.8 where another thread uses it meanwhile (gh-106905). Threads change where
        # garbage is collected; here that itself parses something, each time.
        file, thresholds = write_npz(tmp_path), gc.get_threshold()

        def collected(phase: str, info: Any) -> None:
            ast.parse("1")

        gc.callbacks.append(collected)
        gc.set_threshold(1)
        try:
            if sys.version_info < (3, 11, 8):
                with pytest.raises(SystemError), np.load(file) as archive:
                    archive["train_x"]
            assert opened(file).features().shape == (9, 4)
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(collected)

    def test_features_are_no_images(self, tmp_path: Path, tree: Path) -> None:
        refused("FS-1123", lambda: opened(write_npz(tmp_path)).image(0))
        refused("FS-1123", opened(tree).features)


class TestArrays:
    def test_images_and_features(self) -> None:
        grey = from_arrays(np.full((2, 4, 4), 9, np.uint8), [0, 1], classes=CLASSES)
        assert grey.kind == "image"
        assert grey.image(0).getpixel((0, 0)) == (9, 9, 9)
        assert grey.content_key(0) == grey.content_key(1)
        vectors = from_arrays(np.eye(3), [0, 1, 2], classes=CLASSES, public=True)
        assert vectors.kind == "features"
        assert vectors.public
        assert vectors.content_key(0) != vectors.content_key(1)

    @pytest.mark.parametrize(
        ("code", "records", "labels"),
        [
            ("FS-1109", np.eye(3), [0, 1]),
            ("FS-1108", np.eye(3), [0, 1, 3]),
            ("FS-1108", np.eye(3), [0, 1, -1]),
            ("FS-1111", np.eye(3), [0.0, 1.0, 2.0]),
            ("FS-1111", np.eye(3, dtype=int), [0, 1, 2]),
            ("FS-1111", np.zeros((3, 4, 4)), [0, 1, 2]),
            ("FS-1104", np.zeros((0, 4)), np.zeros(0, int)),
        ],
    )
    def test_bad(self, code: str, records: Any, labels: Any) -> None:
        refused(code, lambda: from_arrays(records, labels, classes=CLASSES))

    def test_bad_later(self) -> None:
        refused("FS-1110", from_arrays([[np.nan, 1.0]], [0], classes=CLASSES).features)
        refused("FS-1109", lambda: from_arrays(np.eye(3), [0, 1, 2], classes=CLASSES, patients=["a"]))


class Pairs:
    """A map-style data set that counts what is fetched."""

    def __init__(self, images: Any, labels: list[int], *, targets: bool) -> None:
        self.images, self.labels, self.fetched = images, labels, 0
        if targets:
            self.targets = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        self.fetched += 1
        return self.images[i], self.labels[i]


class TestTorch:
    def test_targets_spare_the_items(self) -> None:
        import torch

        source = Pairs(torch.rand(3, 1, 6, 6), [0, 1, 2], targets=True)
        ds = from_torch(source, classes=CLASSES)
        assert isinstance(ds, Dataset)
        assert ds.labels.tolist() == [0, 1, 2]
        assert source.fetched == 0
        seen = np.asarray(ds.image(1))
        assert seen.shape == (6, 6, 3)
        np.testing.assert_array_equal(seen[:, :, 0], np.rint(source.images[1, 0].numpy() * 255))

    def test_real_torch_dataset_without_targets(self) -> None:
        import torch

        source = torch.utils.data.TensorDataset(torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
        ds = from_torch(source, classes=CLASSES)
        assert ds.labels.tolist() == [0, 1, 2, 0]
        assert ds.image(0).size == (5, 5)

    def test_normalised_images_are_refused(self) -> None:
        ds = from_torch(Pairs(np.full((1, 3, 4, 4), -0.5), [0], targets=True), classes=CLASSES)
        refused("FS-1124", lambda: ds.image(0))

    def test_bad(self) -> None:
        refused("FS-1125", lambda: from_torch(iter([]), classes=CLASSES))  # type: ignore[arg-type]
        refused("FS-1125", lambda: from_torch([1, 2], classes=CLASSES).labels)
        refused("FS-1104", lambda: from_torch([], classes=CLASSES))
        refused("FS-1108", lambda: from_torch(Pairs([0], [7], targets=True), classes=CLASSES).labels)
        refused("FS-1111", lambda: from_torch(Pairs(np.zeros((1, 7)), [0], targets=True), classes=CLASSES).image(0))
