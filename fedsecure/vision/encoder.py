"""Frozen CLIP encoders by open_clip: images and prompts to features, nothing trained, nothing fetched behind your back.

An encoder is named by an open_clip model and a pretrained tag, or a local weights file, or is the bundled
``fedsecure-tiny``. The network is never touched: weights that are not on this machine give an error that says what to
download and where to put it. All sites of a federation must hold the same :attr:`Encoder.fingerprint`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import ModelError
from fedsecure.vision.weights import build, fingerprint, import_open_clip, public_mean, resolve

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from fedsecure.vision.weights import Preprocess, Tokenizer

FloatFeatures = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class Encoder:
    """A frozen CLIP; made by :func:`load_encoder`.

    Attributes:
        name: ``model/pretrained`` for people.
        fingerprint: SHA-256 in hex over the weights, architecture, preprocessing and tokenizer.
        dimension: feature width d.
        preprocess: a PIL image → its float32 (3, s, s) tensor, as the model was trained.
        tokenizer: texts → int64 (n, L) tokens.
        public_mean: float32 (d,), the mean of normalised features of public images for centring, or ``None``.
        scale: exp(logit_scale), by which its own training multiplied cosines.
        device: where it runs, such as ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        name: str,
        fingerprint: str,
        public_mean: FloatFeatures | None,
        device: str,
    ) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.public_mean = public_mean
        self.scale = float(model.state_dict()["logit_scale"].exp())
        self.device = device
        self.dimension = int(self.encode_text(["width"]).shape[1])

    @property
    def network(self) -> Any:
        """open_clip's model, frozen; to change anything in it, copy it first."""
        return self._model

    @property
    def preprocessing(self) -> dict[str, Any]:
        """open_clip's facts of ``preprocess``, as JSON has them: size, mode, mean, std, interpolation, resize_mode and
        fill_color."""
        facts = dict(self._model.visual.preprocess_cfg)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}

    def encode_images(
        self,
        images: Sequence[Image],
        *,
        batch_size: int = 64,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> FloatFeatures:
        """Raw (un-normalised) image features.

        Args:
            images: n PIL images; each is preprocessed as this model was trained, when its batch is due.
            batch_size: images encoded at once, ≥ 1.
            device: moves the encoder first; default is where it is.
            progress: called with (done, n) after each batch.

        Returns:
            float32 (n, d), finite.

        Raises:
            ModelError: FS-1608 the encoder gave NaN or infinity, FS-1607 no such device.
        """
        import torch

        if device is not None:
            self._move(device)
        out = np.empty((len(images), self.dimension), dtype=np.float32)
        pinned = self.device.startswith("cuda")
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

            def prepare(start: int) -> list[Future[torch.Tensor]]:
                rows = range(start, min(start + batch_size, len(images)))
                return [pool.submit(lambda i=i: self.preprocess(images[i])) for i in rows]  # type: ignore[misc]

            ahead = prepare(0)
            try:
                for start in range(0, len(images), batch_size):
                    batch = torch.stack([ready.result() for ready in ahead])
                    # The next batch is read and preprocessed while this one is encoded.
                    ahead = prepare(start + batch_size)
                    with torch.inference_mode(), self._precision():
                        held = batch.pin_memory() if pinned else batch
                        encoded = self._model.encode_image(held.to(self.device, non_blocking=pinned))
                    stop = start + len(batch)
                    out[start:stop] = encoded.float().cpu().numpy()
                    if progress is not None:
                        progress(stop, len(images))
            finally:
                for waiting in ahead:
                    waiting.cancel()
        if not np.isfinite(out).all():
            raise ModelError(
                "FS-1608",
                f"encoder {self.name} gave NaN or infinity",
                expected="finite features",
                cure='set device = "cpu" in site.toml (no half precision), or check the weights file',
            )
        return out

    def encode_text(self, prompts: Sequence[str]) -> FloatFeatures:
        """L2-normalised text features, float32 (K, d), always in full precision."""
        import torch

        with torch.inference_mode():
            tokens = self.tokenizer(list(prompts)).to(self.device)
            text = self._model.encode_text(tokens).float()
            unit = text / text.norm(dim=1, keepdim=True)
            return np.asarray(unit.cpu().numpy(), dtype=np.float32)

    def _move(self, device: str) -> None:
        chosen = choose_device(device)
        if chosen != self.device:
            self._model = self._model.to(chosen)
            self.device = chosen

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self.device.startswith("cuda"):
            return torch.autocast("cuda", dtype=torch.float16)
        return contextlib.nullcontext()


def choose_device(device: str) -> str:
    """``"auto"`` takes the GPU where there is one; else the device itself.

    Raises:
        ModelError: FS-1607 no such device here.
    """
    import_open_clip()
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            "FS-1607",
            f"device {device!r} is not usable here ({str(error).splitlines()[0]})",
            expected='"auto", "cpu", or a GPU of this machine such as "cuda:0"',
            cure='set device = "auto" in site.toml',
        ) from error
    return device


def load_encoder(model: str, pretrained: str, *, device: str = "auto") -> Encoder:
    """Load a frozen encoder with open_clip's own preprocessing and tokenizer for it.

    Args:
        model: an open_clip model name, or ``"fedsecure-tiny"``.
        pretrained: a pretrained tag whose weights are on this machine, the path of a weights file (``.safetensors``,
            or ``.pt``/``.bin`` read with weights_only), or ``"bundled"`` with ``"fedsecure-tiny"``.
        device: ``"auto"`` takes the GPU where there is one.

    Raises:
        ModelError: FS-1600 unknown model, FS-1601 unknown tag or no such file, FS-1602 the weights are not on this
            machine, FS-1603 the file is corrupt or pickled, FS-1604 the file is of another model, FS-1605 the
            tokenizer is not on this machine, FS-1606 ``"features"`` is no encoder, FS-1607 no such device.
        EnvironmentProblem: FS-1811 torch or open_clip is missing.
    """
    import_open_clip()
    chosen = choose_device(device)
    source = resolve(model, pretrained)
    built, preprocess, tokenizer = build(source)
    return Encoder(
        built.to(chosen),
        preprocess,
        tokenizer,
        name=f"{model}/{pretrained}",
        fingerprint=fingerprint(source, built, tokenizer),
        public_mean=public_mean(source),
        device=chosen,
    )
