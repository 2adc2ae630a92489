"""A run's constants at a site, as its method needs them; what does not fit is refused before anything is charged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsecure.config import RunSettings
from fedsecure.learning.engines import EngineName, choose_engine
from fedsecure.learning.features import Inputs, SiteFeatures, load_site_features
from fedsecure.methods.registry import load_training_method


def run_constants(
    settings: RunSettings, *, file: Path | None, device: str = "auto", engine: EngineName = "auto"
) -> SiteFeatures:
    """Encoder, class texts and public mean of a run, and the method's task built once with them; no record is read.

    Args:
        settings: of the run.
        file: the site's own copy of the weights, or of the feature file.
        device, engine: the site's.

    Raises:
        ModelError: FS-1637 an engine that cannot train the method's module; others as
            :func:`fedsecure.learning.features.load_site_features` and the method's task say.
        EnvironmentProblem: FS-1816 a package that the method needs is missing.
    """
    method = load_training_method(settings.method.name)
    features = load_site_features(settings.encoder, settings.classes, file=file, device=device)
    inputs: Inputs = getattr(method, "inputs", "features")
    if inputs == "pixels" and features.encoder is not None:
        from fedsecure.vision.pixels import PixelRows

        features = replace(features, pixels=PixelRows(features.encoder))
    choose_engine(engine, method.task(settings, features))
    return features
