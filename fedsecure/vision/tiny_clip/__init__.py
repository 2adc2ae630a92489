"""The bundled tiny CLIP ``fedsecure-tiny``: an open_clip model of the project's own, trained on phantoms only.

The folder holds the open_clip model configuration, the byte-pair merges of its tokenizer, the weights and the mean
feature of public phantoms (for centring). ``pretrain.py`` makes all four. It has never seen a real image.

``fedsecure-tiny-resnet`` is a configuration alone, with the same tokenizer and text tower and a small convolutional
image tower, for stand-in teachers that somebody trains (:mod:`fedsecure.simulation.teacher`); no weights come with it.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "fedsecure-tiny"
RESNET_NAME = "fedsecure-tiny-resnet"
NAMES = (MODEL_NAME, RESNET_NAME)
FOLDER = Path(__file__).parent
CONFIG_FILE = f"{MODEL_NAME}.json"
MERGES_FILE = "merges.txt.gz"
WEIGHTS_FILE = "weights.safetensors"
MEAN_FILE = "mean.safetensors"
