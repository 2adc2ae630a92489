"""A site's features: the public constants of a run, and its records as units of frozen features.

Encoders, prompts, the cache and the data sets are the rooms beside this one; here they become what training eats.
No torch at import, and none at all for precomputed features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedsecure.config import EncoderConfig
from fedsecure.errors import DataError, ModelError, PrivacyError
from fedsecure.learning.adapters import Float32
from fedsecure.learning.units import UnitFeatures, group_units

if TYPE_CHECKING:
    from fedsecure.data.dataset import Dataset
    from fedsecure.learning.thumbnails import ThumbnailRows
    from fedsecure.vision.encoder import Encoder
    from fedsecure.vision.pixels import PixelRows
    from fedsecure.vision.tokens import TokenRows

Progress = Callable[[int, int], None]
# What a method's records are: frozen features, or preprocessed images where the tower itself is trained, or what the
# tower's last block sees of them where only that is; or small images beside features, for a student of CLIP.
Inputs = Literal["features", "pixels", "tokens", "thumbnails"]


@dataclass(frozen=True, slots=True, eq=False)
class SiteFeatures:
    """Public constants of the run, the same at every site.

    Attributes:
        text: (K, d) float32 unit rows, in the federation's class order.
        centre: (d,) float32 public mean of unit image features; zeros where there is none.
        dimension: d.
        fingerprint: of the encoder, or of a feature file's classes, text and mean.
        preprocessing: facts for the adapter's metadata.
        encoder: None for precomputed features.
        rows: what makes a record's row in place of the encoder, for methods that train on images.
        target: (m, d) public, unlabelled features to align with, where the run has any.
    """

    text: Float32
    centre: Float32
    dimension: int
    fingerprint: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    encoder: Encoder | None = None
    rows: PixelRows | TokenRows | ThumbnailRows | None = None
    target: Float32 | None = None

    @property
    def width(self) -> int:
        """Numbers in a record's row: d, or those of a preprocessed image or of its tokens."""
        return self.dimension if self.rows is None else self.rows.dimension


def rows_for(inputs: Inputs, encoder: Encoder) -> PixelRows | TokenRows | ThumbnailRows | None:
    """What makes rows of that kind; None for features, which the encoder itself makes."""
    from fedsecure.learning.thumbnails import ThumbnailRows
    from fedsecure.vision.pixels import PixelRows
    from fedsecure.vision.tokens import TokenRows

    if inputs == "features":
        return None
    if inputs == "thumbnails":
        return ThumbnailRows(encoder)
    return PixelRows(encoder) if inputs == "pixels" else TokenRows(encoder)


def load_site_features(
    config: EncoderConfig, classes: Sequence[str], *, file: Path | None = None, device: str = "auto"
) -> SiteFeatures:
    """Load the run's encoder, or a feature file's header, and embed the class prompts; no record is read.

    Args:
        config: the run's encoder; ``pretrained = "file"`` takes ``file``.
        classes: K class names in the federation's order.
        file: the site's own copy of the weights, or of the feature file.
        device: for the encoder.

    Raises:
        ModelError: FS-1630 when this site's encoder or feature file is not the run's; FS-1638 when its width is not;
            FS-1640 when the run leaves the file to the site and the site names none, or the feature file lacks a
            class; others as the encoder's loader says.
        DataError: as the reader of feature files says.
    """
    source = config.pretrained
    if source == "file" or (config.model == "features" and file is not None):
        if file is None:
            raise ModelError(
                "FS-1640",
                f"encoder {config.model!r} comes from a file and this site names none",
                expected="encoder_file in the site's configuration",
                cure="set encoder_file to this site's copy of the weights or feature file",
            )
        source = str(file)
    if config.model == "features":
        found = _from_feature_file(source, classes)
    else:
        from fedsecure.vision.encoder import load_encoder
        from fedsecure.vision.prompts import class_prompts

        encoder = load_encoder(config.model, source, device=device)
        mean = encoder.public_mean
        found = SiteFeatures(
            text=encoder.encode_text(class_prompts(classes, template=config.prompt)),
            centre=np.zeros(encoder.dimension, np.float32) if mean is None else mean,
            dimension=encoder.dimension,
            fingerprint=encoder.fingerprint,
            preprocessing={"by": "open_clip", "for": config.model, **encoder.preprocessing},
            encoder=encoder,
        )
    if found.fingerprint != config.fingerprint:
        raise ModelError(
            "FS-1630",
            f"encoder {config.model} ({source}) has fingerprint {found.fingerprint[:16]}…",
            expected=f"{config.fingerprint[:16]}…, as the federation's settings say",
            cure="use the same weights, preprocessing and open_clip version as the other sites",
        )
    if found.dimension != config.dimension:
        raise ModelError(
            "FS-1638",
            f"encoder {config.model} gives features of width {found.dimension}",
            expected=f"width {config.dimension}, as the federation's settings say",
            cure="ask the coordinator to mend encoder.dimension",
        )
    return found


def _from_feature_file(source: str, classes: Sequence[str]) -> SiteFeatures:
    from fedsecure.data.loading import read_feature_header

    header = read_feature_header(Path(source))
    rows = {name: row for row, name in enumerate(header.classes)}
    missing = [name for name in classes if name not in rows]
    if missing:
        raise ModelError(
            "FS-1640",
            f"feature file {source} has no text embedding of class {missing[0]!r}",
            expected="one row of text for each class of the federation",
            cure="use the feature file the federation was set up with",
        )
    return SiteFeatures(
        text=header.text[[rows[name] for name in classes]],
        centre=np.zeros(header.dimension, np.float32) if header.mean is None else header.mean,
        dimension=header.dimension,
        fingerprint=header.fingerprint,
        preprocessing={"by": "the owner of the feature file"},
    )


def check_patients(dataset: Dataset, unit: str) -> None:
    """Refuse a run by patient on a data set that knows none; needs no more than its listing.

    Raises:
        PrivacyError: FS-1246 when patients are to be protected and the data set does not know them.
    """
    if unit == "patient" and dataset.patient_ids is None:
        raise PrivacyError(
            "FS-1246",
            f"data set {dataset.name!r} has no patient ids and the run protects patients",
            expected="a patient column, or a run by record",
            cure='add patient ids to the manifest, or agree on privacy.unit = "record"',
        )


def load_units(
    dataset: Dataset,
    features: SiteFeatures,
    *,
    cache: Path | None,
    unit: Literal["patient", "record"],
    cap: int,
    max_units: int | None,
    key: bytes,
    views: int = 1,
    progress: Progress | None = None,
) -> UnitFeatures:
    """Read a data set's records as units of features. Touches records: call it only after the charge is on disk.

    Args:
        dataset: images or precomputed features.
        features: the run's constants, with the encoder that images need.
        cache: folder of the feature cache, None to encode everything.
        unit: ``"patient"`` groups by patient; ``"record"`` makes each record a unit of its own.
        cap: public cap on a patient's records; 1 with ``"record"``.
        max_units: declared maximum of units; None where none is declared.
        key: the site's secret for the keyed hash.
        views: rows of each record, of which a unit's gradient is the mean; images only.
        progress: called with (done, n) while encoding.

    Raises:
        PrivacyError: FS-1246 when patients are to be protected and the data set does not know them.
        DataError: FS-1127 more units than declared; FS-1143, FS-1144, or as the data set says.
        ModelError: FS-1638 when the features have another width than the run's; FS-1641 images without an encoder;
            FS-1677 several views of precomputed features.
    """
    dataset.index()
    check_patients(dataset, unit)
    patients = dataset.patient_ids
    if dataset.kind == "features":
        if views > 1:
            raise ModelError(
                "FS-1677",
                f"method.views = {views} and data set {dataset.name!r} of precomputed features",
                expected="images, which can be seen in several ways",
                cure="set method.views = 1, or run with an image encoder",
            )
        values = dataset.features()
    else:
        if features.encoder is None:
            raise ModelError(
                "FS-1641",
                f"data set {dataset.name!r} holds images and the run's encoder is 'features'",
                expected="a feature file",
                cure="encode the images with the encoder of the feature file, or run with an image encoder",
            )
        from fedsecure.learning.encoding import encode_dataset
        from fedsecure.learning.views import Viewed
        from fedsecure.vision.cache import FeatureCache

        # A wrong label is refused before the encoder's long work.
        _ = dataset.labels
        eye = features.rows or features.encoder
        kept = FeatureCache(cache) if cache is not None and (features.rows is None or features.rows.cached) else None
        seen = [encode_dataset(Viewed(dataset, number), eye, kept, progress=progress) for number in range(1, views)]
        values = encode_dataset(dataset, eye, kept, progress=progress)
        # End to end, so that a record's views stay together while its unit chooses records.
        values = np.concatenate([values, *seen], axis=1)
    if values.ndim != 2 or values.shape[1] != views * features.width:
        raise ModelError(
            "FS-1638",
            f"data set {dataset.name!r} has features of shape {values.shape}",
            expected=f"(n, {views * features.width})",
            cure="use features of the run's encoder",
        )
    owners = patients if unit == "patient" and patients is not None else dataset.record_ids
    units = group_units(
        values,
        dataset.labels,
        owners,
        cap=cap if unit == "patient" else 1,
        key=key,
        classes=features.text.shape[0],
        record_ids=dataset.record_ids,
    )
    units = units.spread(views)
    if max_units is not None:
        check_declared(len(units), max_units, dataset=dataset.name)
    return units


def check_declared(units: int, max_units: int, *, dataset: str) -> None:
    """Refuse a data set with more units than the run declares for it; DataError FS-1127.

    A choice of ``max_units`` among them would depend on who else is there: without one patient another one would take
    the place, and the sum could move by 2C instead of C. The number of units itself is public, and the same whether a
    unit's records are there or replaced by nothing.
    """
    if units > max_units:
        raise DataError(
            "FS-1127",
            f"data set {dataset!r} has {units} units, and the run declares at most {max_units} for this site",
            expected="no more units than declared",
            cure="ask the coordinator to declare more, or choose a fixed subset yourself, in the manifest",
        )
