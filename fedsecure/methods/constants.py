"""A run's constants at a site, as its method needs them; what does not fit is refused before anything is charged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsecure.config import RunSettings
from fedsecure.learning.engines import EngineName, choose_engine
from fedsecure.learning.features import Inputs, SiteFeatures, load_site_features, rows_for
from fedsecure.learning.targets import read_target
from fedsecure.methods.descent import AdapterDescent
from fedsecure.methods.registry import load_training_method


def run_constants(
    settings: RunSettings,
    *,
    file: Path | None,
    target: Path | None = None,
    device: str = "auto",
    engine: EngineName = "auto",
) -> SiteFeatures:
    """Encoder, class texts and public mean of a run, and the method's task built once with them; no record is read.

    Args:
        settings: of the run.
        file: the site's own copy of the weights, or of the feature file.
        target: the site's own copy of the target.
        device, engine: the site's.

    Raises:
        ModelError: FS-1637 an engine that cannot train the method's module, FS-1676 a target that is not the run's;
            others as :func:`fedsecure.learning.features.load_site_features` and the method's task say.
        EnvironmentProblem: FS-1816 a package that the method needs is missing.
    """
    method = load_training_method(settings.method.name)
    features = load_site_features(settings.encoder, settings.classes, file=file, device=device)
    alignment, normalisation = settings.method.alignment, settings.method.facmic.normalisation
    # A site that does not use it and has no copy does without: then only the aggregator looks at it.
    if target is not None or alignment.at == "sites" or alignment.negatives > 0 or normalisation == "public":
        features = with_target(settings, features, target)
    choose_engine(engine, method.task(settings, features))
    inputs: Inputs = method.inputs_of(settings) if isinstance(method, AdapterDescent) else "features"
    return features if features.encoder is None else replace(features, rows=rows_for(inputs, features.encoder))


def with_target(settings: RunSettings, features: SiteFeatures, target: Path | None) -> SiteFeatures:
    """The constants with the run's target, if it has one; ModelError FS-1676."""
    digest = settings.method.alignment.target
    if not digest:
        return features
    rows = read_target(target, digest=digest, fingerprint=features.fingerprint, dimension=features.dimension)
    return replace(features, target=rows)
