"""DICOM folders: PatientID without pixels, windows, inversion, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsecure.config import DatasetConfig
from fedsecure.data.dataset import Dataset
from fedsecure.data.loading import open_dataset
from fedsecure.errors import DataError

pydicom = pytest.importorskip("pydicom", reason="extra [dicom] is not installed")

RAMP = np.arange(20, dtype=np.uint16).reshape(4, 5) * 50


def write(path: Path, patient: str | None = "P1", **tags: Any) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    held = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    if patient is not None:
        held.PatientID = patient
    held.Rows, held.Columns, held.SamplesPerPixel = *RAMP.shape, 1
    held.PhotometricInterpretation = "MONOCHROME2"
    held.BitsAllocated, held.BitsStored, held.HighBit, held.PixelRepresentation = 16, 12, 11, 0
    held.PixelData = RAMP.tobytes()
    for name, value in tags.items():
        setattr(held, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    held.save_as(path, enforce_file_format=True)
    return path


def opened(path: Path) -> Dataset:
    return open_dataset(DatasetConfig(name="t", path=path), classes=("a", "b"))


def code_of(act: Any) -> str:
    with pytest.raises(DataError) as caught:
        act()
    return caught.value.code


def test_opens_with_patients(tmp_path: Path) -> None:
    write(tmp_path / "a" / "study" / "0.dcm", "P1")
    write(tmp_path / "b" / "0.dcm", "P2")
    ds = opened(tmp_path)
    assert isinstance(ds, Dataset)
    assert ds.labels.tolist() == [0, 1]
    assert ds.record_ids == ("a/study/0.dcm", "b/0.dcm")
    assert ds.patient_ids == ("P1", "P2")
    seen = np.asarray(ds.image(0))
    assert seen.shape == (4, 5, 3)
    np.testing.assert_array_equal(seen[:, :, 0], np.rint(RAMP * (255 / RAMP.max())))


def test_index_reads_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "0.dcm")
    calls: list[dict[str, Any]] = []
    genuine = pydicom.dcmread

    def watched(path: Path, **options: Any) -> Any:
        calls.append(options)
        return genuine(path, **options)

    monkeypatch.setattr(pydicom, "dcmread", watched)
    ds = opened(tmp_path)
    assert calls == []
    ds.index()
    assert all(c["stop_before_pixels"] and c["specific_tags"] == ["PatientID"] for c in calls)
    assert len(calls) == 1


def test_window_and_inversion(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.dcm", WindowCenter=250, WindowWidth=100)
    write(tmp_path / "a" / "1.dcm", PhotometricInterpretation="MONOCHROME1")
    ds = opened(tmp_path)
    windowed = np.asarray(ds.image(0))[:, :, 0]
    assert (windowed[RAMP <= 150] == 0).all()
    assert (windowed[RAMP >= 350] == 255).all()
    assert np.asarray(ds.image(1))[0, 0, 0] == 255


def test_bad_files(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.dcm", patient=None)
    write(tmp_path / "a" / "1.dcm", NumberOfFrames=2)
    write(tmp_path / "a" / "2.dcm", PixelData=RAMP.tobytes()[:10])
    write(tmp_path / "a" / "3.dcm", Rows=60_000, Columns=60_000)
    (tmp_path / "a" / "4.dcm").write_bytes(b"nothing")
    ds = opened(tmp_path)
    assert code_of(lambda: ds.patient_ids) == "FS-1121"
    assert code_of(lambda: ds.image(1)) == "FS-1122"
    assert code_of(lambda: ds.image(2)) == "FS-1120"
    assert code_of(lambda: ds.image(3)) == "FS-1107"
    assert code_of(lambda: ds.image(4)) == "FS-1120"
    (tmp_path / "b").mkdir()
    assert code_of(lambda: opened(tmp_path)) == "FS-1103"
