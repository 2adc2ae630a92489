"""Where an encoder's weights come from: names and tags resolved to a local file, checked, built, and fingerprinted.

Everything goes through open_clip's own loading path with the path of a local file, so nothing is ever downloaded:
a tag counts only where open_clip's or Hugging Face's cache on this machine holds its weights.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import EnvironmentProblem, ModelError
from fedsecure.vision import tiny_clip

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Preprocess = Callable[["Image"], "torch.Tensor"]
Tokenizer = Callable[[list[str]], "torch.Tensor"]
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_PROBES = ["a picture of a no_tumor", "the quick brown fox jumps over 13 lazy dogs.", "Größe, naïve – 脳腫瘍"]


@dataclass(frozen=True, slots=True)
class Source:
    """A weights file and how open_clip has to read it.

    Attributes:
        model: open_clip model name.
        file: the weights on this machine.
        quick_gelu: the weights were trained with QuickGELU although the configuration does not say so.
        preprocess: the tag's own preprocessing (mean, std, interpolation, resize_mode); empty for open_clip's default.
    """

    model: str
    file: Path
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        return self.model == tiny_clip.MODEL_NAME and self.file == tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE


def import_open_clip() -> Any:
    """open_clip, with the tiny CLIP registered; EnvironmentProblem FS-1811 where torch or open_clip is missing."""
    try:
        import open_clip
    except ImportError as error:
        raise EnvironmentProblem(
            "FS-1811",
            f"an image encoder needs a package that is not installed ({error.name})",
            expected="the packages of a site: torch and open_clip_torch",
            cure="pip install 'fedsecure[site]'",
        ) from error
    if not set(tiny_clip.NAMES) <= set(open_clip.list_models()):
        open_clip.add_model_config(tiny_clip.FOLDER)
    return open_clip


def resolve(model: str, pretrained: str) -> Source:
    """Find the weights on this machine.

    Raises:
        ModelError: FS-1600 unknown model, FS-1606 ``"features"``, FS-1601 unknown tag or no such file, FS-1602 the
            tag's weights are not on this machine, FS-1603 a suffix that is not read.
    """
    if model == "features":
        raise ModelError(
            "FS-1606",
            'encoder model "features" encodes no images',
            expected="an image encoder where data sets hold images",
            cure="give feature files (.npz) as data sets, or name an open_clip model",
        )
    open_clip = import_open_clip()
    models = open_clip.list_models()
    if model not in models:
        close = difflib.get_close_matches(model, models, n=5, cutoff=0.5)
        raise ModelError(
            "FS-1600",
            f"unknown model {model!r}",
            expected=f"an open_clip model or {tiny_clip.MODEL_NAME!r}"
            + (f"; close: {', '.join(close)}" if close else ""),
            cure="python -c 'import open_clip; print(open_clip.list_models())' lists them",
        )
    if pretrained == "bundled":
        if model != tiny_clip.MODEL_NAME:
            raise _no_tag(model, pretrained, open_clip.list_pretrained_tags_by_model(model))
        return Source(model=model, file=tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        configured = bool(open_clip.get_model_config(model).get("quick_gelu", False))
        trained = bool(tag.get("quick_gelu", False))
        if configured and not trained:
            raise ModelError(
                "FS-1604",
                f"model {model!r} has QuickGELU but weights {pretrained!r} were trained without",
                expected="the model the weights were trained as",
                cure=f"use model {model.removesuffix('-quickgelu')!r} with these weights",
            )
        keys = ("mean", "std", "interpolation", "resize_mode")
        return Source(
            model=model,
            file=_cached(open_clip, model, pretrained, tag),
            quick_gelu=trained,
            preprocess={key: tag[key] for key in keys if tag.get(key) is not None},
        )
    file = Path(pretrained).expanduser()
    if not file.is_file():
        raise _no_tag(model, pretrained, open_clip.list_pretrained_tags_by_model(model))
    if file.suffix not in SUFFIXES:
        raise _corrupt(file, f"suffix {file.suffix!r}")
    return Source(model=model, file=file)


def _no_tag(model: str, pretrained: str, tags: list[str]) -> ModelError:
    known = ["bundled"] if model == tiny_clip.MODEL_NAME else tags
    close = difflib.get_close_matches(pretrained, known, n=5, cutoff=0.4) or known[:8]
    return ModelError(
        "FS-1601",
        f"weights {pretrained!r} of model {model!r}: neither a known tag nor an existing file",
        expected=f"a tag ({', '.join(close) or 'this model has none'}) or a file ({', '.join(SUFFIXES)})",
        cure="mend the tag, or give the path of a weights file",
    )


def _corrupt(file: Path, reason: str) -> ModelError:
    return ModelError(
        "FS-1603",
        f"{file} cannot be read as weights ({reason})",
        expected="a whole .safetensors file, or a torch file of plain tensors (no TorchScript, no pickled code)",
        cure="download it again, or convert it to .safetensors",
    )


def _cached(open_clip: Any, model: str, pretrained: str, tag: Mapping[str, Any]) -> Path:
    """The file of a tag in open_clip's or Hugging Face's cache on this machine."""
    if tag.get("file"):
        return Path(str(tag["file"]))
    wanted: list[str] = []
    if hub := tag.get("hf_hub"):
        import huggingface_hub

        repository, name = os.path.split(hub)
        stem = name or "open_clip_pytorch_model.bin"
        safe = "open_clip_model.safetensors" if not name else str(Path(name).with_suffix(".safetensors"))
        for file_name in dict.fromkeys((safe, stem)):
            found = huggingface_hub.try_to_load_from_cache(repository, file_name)
            if isinstance(found, str):
                return Path(str(found))
        wanted.append(f"{safe} of https://huggingface.co/{repository}")
    if url := tag.get("url"):
        target: Path = Path("~/.cache/clip").expanduser() / os.path.basename(str(url))
        # OpenAI's own files are TorchScript archives, which are code and not read.
        if target.is_file() and "openaipublic" not in url:
            return target
        if not wanted:
            wanted.append(f"{url} into {target}")
    raise ModelError(
        "FS-1602",
        f"weights {pretrained!r} of model {model!r} are not on this machine",
        expected="weights in the local cache; nothing is downloaded during a run",
        cure=f'download {wanted[0] if wanted else "them"} once, with network: python -c "import open_clip; '
        f"open_clip.create_model('{model}', '{pretrained}')\"; or copy the file here and give its path as pretrained",
    )


def _check_file(file: Path) -> None:
    """Refuse a file that is no weights before a model is built for it; reads headers only."""
    import torch
    from safetensors import SafetensorError, safe_open

    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as held:
                keys = list(held.keys())
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, str(error)) from error
    else:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zip and torch each raise their own
            raise _corrupt(file, str(error).splitlines()[0][:160] if str(error) else "empty") from error
        keys = list(loaded) if isinstance(loaded, dict) else []
    if not keys:
        raise _corrupt(file, "no tensors")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's clients answer from their cache only, for as long as a model is being built."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def build(source: Source) -> tuple[torch.nn.Module, Preprocess, Tokenizer]:
    """Model on the CPU in evaluation mode, its preprocessing and its tokenizer, as open_clip makes them.

    Raises:
        ModelError: FS-1603 corrupt, FS-1604 the weights are of another model, FS-1605 the tokenizer (or the
            configuration of a Hugging Face text tower) is not on this machine.
    """
    open_clip = import_open_clip()
    _check_file(source.file)
    options = {f"image_{key}": value for key, value in source.preprocess.items()}
    with _offline():
        try:
            extra = {"bpe_path": str(tiny_clip.FOLDER / tiny_clip.MERGES_FILE)}
            tokenizer = open_clip.get_tokenizer(source.model, **(extra if source.model in tiny_clip.NAMES else {}))
        except Exception as error:  # transformers, the hub and missing packages each raise their own
            raise ModelError(
                "FS-1605",
                f"the tokenizer of {source.model!r} is not on this machine ({' '.join(str(error).split())[:160]})",
                expected="the tokenizer in the local Hugging Face cache; nothing is downloaded during a run",
                cure='run once with network: python -c "import open_clip; '
                f"open_clip.get_tokenizer('{source.model}')\"",
            ) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, preprocess = open_clip.create_model_from_pretrained(
                    source.model, pretrained=str(source.file), force_quick_gelu=source.quick_gelu, **options
                )
        except Exception as error:  # a misfit shows as whatever the first wrong tensor breaks
            raise ModelError(
                "FS-1604",
                f"{source.file} does not fit model {source.model!r} ({' '.join(str(error).split())[:160]})",
                expected=f"the state dictionary of an open_clip {source.model}",
                cure="name the model the weights were trained as",
            ) from error
    return model.eval(), preprocess, tokenizer


def fingerprint(source: Source, model: torch.nn.Module, tokenizer: Tokenizer) -> str:
    """SHA-256 in hex over every weight, the architecture, the preprocessing and the tokenizer.

    Weights are hashed as loaded (name, dtype, shape, bytes), so the same model in another container has the same
    fingerprint.
    """
    held: Any = model
    facts = {
        "architecture": import_open_clip().get_model_config(source.model),
        "quick_gelu": source.quick_gelu,
        "preprocess": dict(held.visual.preprocess_cfg),
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": getattr(tokenizer, "encoder", None),
        "probes": tokenizer(_PROBES).tolist(),
    }
    sha = hashlib.sha256(b"fedsecure/encoder/v1\0")
    raw = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    sha.update(len(raw).to_bytes(8, "big") + raw)
    for name, tensor in sorted(model.state_dict().items()):
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        head = json.dumps([name, array.dtype.newbyteorder("<").str, list(array.shape)]).encode()
        sha.update(len(head).to_bytes(8, "big") + head)
        sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()


def public_mean(source: Source) -> npt.NDArray[np.float32] | None:
    """The bundled model's mean feature of public phantoms; no other model has one."""
    if not source.bundled:
        return None
    from safetensors.numpy import load_file

    return load_file(tiny_clip.FOLDER / tiny_clip.MEAN_FILE)["mean"].astype(np.float32)
