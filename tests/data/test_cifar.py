"""CIFAR's binary archives and ImageNet-LT's lists: read as published, refused when they are something else."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsecure.data import cifar
from fedsecure.data.arrays import from_arrays
from fedsecure.data.cifar import is_cifar, read_cifar, read_image_list, read_pixels
from fedsecure.errors import DataError


def refused(code: str, act: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


def files(classes: int = 10, each: int = 3) -> dict[str, bytes]:
    """A small CIFAR: record i has the label i mod classes, and pixels whose red, green and blue are told apart."""

    def records(count: int, first: int) -> bytes:
        rows = []
        for i in range(first, first + count):
            label = bytes([i % classes]) if classes == 10 else bytes([7, i % classes])
            rows.append(label + bytes([i % 250] * 1024) + bytes([1] * 1024) + bytes([2] * 1023) + b"\x09")
        return b"".join(rows)

    names = "\n".join(f"class_{i}" for i in range(classes)).encode() + b"\n\n"
    if classes == 10:
        held = {f"data_batch_{b}.bin": records(each, each * (b - 1)) for b in range(1, 6)}
        return {**held, "test_batch.bin": records(10, 0), "batches.meta.txt": names}
    return {"train.bin": records(each, 0), "test.bin": records(each, 0), "fine_label_names.txt": names}


def write(folder: Path, held: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in held.items():
        (folder / name).write_bytes(content)
    return folder


def pack(file: Path, folder: str, held: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in held.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


@pytest.mark.parametrize("form", ["archive", "folder", "parent", "beside"])
def test_cifar10(tmp_path: Path, form: str) -> None:
    if form == "archive":
        path = pack(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files())
    elif form == "beside":
        path = pack(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files()).parent
    else:
        folder = write(tmp_path / "cifar-10-batches-bin", files())
        path = folder if form == "folder" else tmp_path
    assert is_cifar(path)
    held = read_cifar(path)
    assert held.classes == tuple(f"class_{i}" for i in range(10))
    assert held.train.labels.tolist() == [i % 10 for i in range(15)]
    assert held.test.labels.tolist() == list(range(10))
    pixels = read_pixels(held.train)
    assert pixels.shape == (15, 3, 32, 32)
    assert pixels[4, :, 0, 0].tolist() == [4, 1, 2]
    assert pixels[4, :, 31, 31].tolist() == [4, 1, 9]


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    held = read_cifar(pack(tmp_path / "a.tar.gz", "cifar-100-binary", files(classes=100, each=30)))
    assert len(held.classes) == 100
    assert held.train.labels.tolist() == list(range(30))


def test_what_is_no_binary_archive(tmp_path: Path) -> None:
    pickled = pack(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", {"data_batch_1": b"\x80\x04."})
    assert is_cifar(pickled)
    error = refused("FS-1164", lambda: read_cifar(pickled))
    assert "binary" in error.cure
    (tmp_path / "text.tar.gz").write_text("no archive")
    refused("FS-1164", lambda: read_cifar(tmp_path / "text.tar.gz"))
    refused("FS-1164", lambda: read_cifar(tmp_path / "nowhere"))
    assert not is_cifar(write(tmp_path / "images", {"a.txt": b""}))
    refused("FS-1164", lambda: read_cifar(tmp_path / "images"))


def test_damaged_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files()
    short = {**whole, "data_batch_3.bin": whole["data_batch_3.bin"][:-1]}
    refused("FS-1165", lambda: read_cifar(write(tmp_path / "short", short)))
    missing = {name: content for name, content in whole.items() if name != "data_batch_5.bin"}
    assert "data_batch_5.bin" in refused("FS-1165", lambda: read_cifar(write(tmp_path / "missing", missing))).found
    refused("FS-1165", lambda: read_cifar(write(tmp_path / "names", {**whole, "batches.meta.txt": b"a\nb\n"})))
    odd = bytearray(whole["data_batch_1.bin"])
    odd[0] = 10
    refused("FS-1108", lambda: read_cifar(write(tmp_path / "label", {**whole, "data_batch_1.bin": bytes(odd)})))
    monkeypatch.setattr(cifar, "MAX_FILE_BYTES", 100)
    refused("FS-1165", lambda: read_cifar(write(tmp_path / "large", whole)))
    refused("FS-1165", lambda: read_cifar(pack(tmp_path / "large.tar.gz", "cifar-10-batches-bin", whole)))


def test_links_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    refused("FS-1164", lambda: read_cifar(file))


def test_other_sizes_are_scaled() -> None:
    images = np.full((2, 5, 9, 3), 200, np.uint8)
    records = from_arrays(images, [0, 1], classes=("a", "b"))
    assert (read_pixels(records, side=8) == 200).all()
    refused("FS-1123", lambda: read_pixels(from_arrays(np.ones((2, 3)), [0, 1], classes=("a", "b"))))


def test_image_lists(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "train").mkdir(parents=True)
    for name in ("a b.jpg", "c.jpg"):
        Image.new("RGB", (4, 4)).save(root / "train" / name)
    file = tmp_path / "train.txt"

    def read(text: str) -> object:
        file.write_text(text)
        return read_image_list(file, root=root, classes=3)

    file.write_text("train/a b.jpg 2\n\ntrain/c.jpg 0\n")
    entries = read_image_list(file, root=root, classes=3)
    assert [(entry.record_id, entry.label) for entry in entries] == [("train/a b.jpg", 2), ("train/c.jpg", 0)]
    for text in (
        "train/c.jpg 3\n",
        "train/c.jpg\n",
        "train/c.jpg x\n",
        "/etc/passwd 0\n",
        "../images/train/c.jpg 0\n",
        "train/d.jpg 0\n",
    ):
        refused("FS-1166", lambda text=text: read(text))  # type: ignore[misc]
    refused("FS-1166", lambda: read("train/c.jpg 0\ntrain/c.jpg 1\n"))
    refused("FS-1166", lambda: read_image_list(tmp_path / "none.txt", root=root, classes=3))
