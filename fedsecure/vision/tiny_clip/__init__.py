"""The bundled tiny CLIP ``fedsecure-tiny``: an open_clip model of the project's own, trained on phantoms only.

The folder holds the open_clip model configuration, the byte-pair merges of its tokenizer, the weights and the mean
feature of public phantoms (for centring). ``pretrain.py`` makes all four. It has never seen a real image.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "fedsecure-tiny"
FOLDER = Path(__file__).parent
CONFIG_FILE = f"{MODEL_NAME}.json"
MERGES_FILE = "merges.txt.gz"
WEIGHTS_FILE = "weights.safetensors"
MEAN_FILE = "mean.safetensors"
