"""Commands that use a trained adapter: ``predict`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsecure.cli.options import Json


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    adapter: Annotated[Path, typer.Option(help="adapter.safetensors")],
    weights: Annotated[Path | None, typer.Option(help="Local weights of the encoder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Classify images with a trained adapter."""
    from fedsecure.cli.display import print_json, show_predictions
    from fedsecure.learning.inference import predict_images

    rows = predict_images(adapter, images, weights=weights, device=device)
    if as_json:
        print_json({"predictions": rows})
    else:
        show_predictions(rows)


def evaluate(
    adapter: Annotated[Path, typer.Option(help="adapter.safetensors")],
    data: Annotated[Path, typer.Option(help="Class folders, a manifest .csv or a feature file .npz.")],
    split: Annotated[str | None, typer.Option(help="Split of a feature file or manifest.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the encoder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure an adapter on local records. The figures are exact and not private: keep them inside."""
    from fedsecure.cli.display import print_json, show_evaluation
    from fedsecure.learning.inference import evaluate_dataset

    result = evaluate_dataset(adapter, data, split=split, weights=weights, device=device)
    if as_json:
        print_json(result)
    else:
        show_evaluation(result)
