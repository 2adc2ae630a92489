"""Encoders: the tiny CLIP through open_clip's path, fingerprints, and everything that can be wrong with weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.errors import EnvironmentProblem, ModelError
from fedsecure.simulation.pretrain import captions, draw_acquisition, learn_merges, pretrain
from fedsecure.vision import tiny_clip, weights
from fedsecure.vision.encoder import Encoder, choose_device, load_encoder
from fedsecure.vision.prompts import class_prompts

TINY = tiny_clip.MODEL_NAME


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return load_encoder(TINY, "bundled", device="cpu")


def refused(code: str, act: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


def zero_shot(encoder: Encoder, images: np.ndarray, labels: np.ndarray) -> float:
    features = encoder.encode_images([Image.fromarray(x) for x in images])
    text = encoder.encode_text(class_prompts(CLASSES))
    return float(((features @ text.T).argmax(1) == labels).mean())


def weights_with_change(folder: Path) -> Path:
    state = load_file(tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE)
    state["visual.proj"] = state["visual.proj"] + 0.01
    save_file(state, folder / "changed.safetensors")
    return folder / "changed.safetensors"


class TestTinyClip:
    def test_shapes_and_norms(self, tiny: Encoder) -> None:
        images, _ = generate(2, seed=1, acquisition=SITES["site_a"])
        features = tiny.encode_images([Image.fromarray(x) for x in images], batch_size=3)
        text = tiny.encode_text(class_prompts(CLASSES))
        assert features.shape == (8, tiny.dimension)
        assert features.dtype == text.dtype == np.float32
        assert tiny.dimension == 64
        np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
        assert abs(np.linalg.norm(features, axis=1) - 1).max() > 0.1, "image features are to be raw"
        assert tiny.public_mean is not None
        assert tiny.public_mean.shape == (64,)
        assert 0 < np.linalg.norm(tiny.public_mean) < 1

    def test_deterministic(self, tiny: Encoder) -> None:
        images, _ = generate(2, seed=1, acquisition=SITES["site_a"])
        pictures = [Image.fromarray(x) for x in images]
        other = load_encoder(TINY, "bundled", device="cpu")
        assert other.fingerprint == tiny.fingerprint
        assert other.encode_images(pictures).tobytes() == tiny.encode_images(pictures).tobytes()
        np.testing.assert_allclose(tiny.encode_images(pictures, batch_size=1), tiny.encode_images(pictures), atol=1e-4)

    def test_zero_shot_on_unseen_phantoms(self, tiny: Encoder) -> None:
        images, labels = generate(25, seed=12345, acquisition=draw_acquisition)
        assert zero_shot(tiny, images, labels) >= 0.85
        assert zero_shot(tiny, images, (labels + 1) % 4) < 0.15, "the test itself must be able to fail"

    def test_demo_sites_leave_room_to_learn(self, tiny: Encoder) -> None:
        scores = [
            zero_shot(tiny, *generate(25, seed=777, acquisition=SITES[s])) for s in ("site_a", "site_b", "site_c")
        ]
        assert 0.4 < np.mean(scores) < 0.8

    @pytest.mark.slow
    def test_a_linear_head_learns_a_shifted_site(self, tiny: Encoder) -> None:
        def centred(seed: int) -> tuple[np.ndarray, np.ndarray]:
            images, labels = generate(50, seed=seed, acquisition=SITES["site_b"])
            x = tiny.encode_images([Image.fromarray(i) for i in images])
            x = x / np.linalg.norm(x, axis=1, keepdims=True) - tiny.public_mean
            return x, labels

        x, y = centred(1)
        head = np.linalg.solve(x.T @ x + 0.1 * np.eye(64), x.T @ np.eye(4)[y])
        x_test, y_test = centred(2)
        probe = ((x_test @ head).argmax(1) == y_test).mean()
        images, labels = generate(50, seed=2, acquisition=SITES["site_b"])
        assert probe > zero_shot(tiny, images, labels) + 0.1

    def test_frozen(self, tiny: Encoder) -> None:
        model = tiny._model
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())

    def test_small(self) -> None:
        files = [p for p in tiny_clip.FOLDER.iterdir() if p.is_file()]
        assert sum(p.stat().st_size for p in files) <= 4 * 1024**2
        assert {tiny_clip.CONFIG_FILE, tiny_clip.MERGES_FILE, tiny_clip.WEIGHTS_FILE, tiny_clip.MEAN_FILE} <= {
            p.name for p in files
        }

    def test_progress(self, tiny: Encoder) -> None:
        seen: list[tuple[int, int]] = []
        tiny.encode_images([Image.new("RGB", (64, 64))] * 5, batch_size=2, progress=lambda *x: seen.append(x))
        assert seen == [(2, 5), (4, 5), (5, 5)]

    def test_no_images(self, tiny: Encoder) -> None:
        assert tiny.encode_images([]).shape == (0, 64)

    def test_preprocessing_is_told_as_it_is_done(self, tiny: Encoder) -> None:
        facts = tiny.preprocessing
        assert set(facts) == {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
        assert json.loads(json.dumps(facts)) == facts
        grey = np.asarray(tiny.preprocess(Image.new("L", (100, 80), 51)))
        assert list(grey.shape[1:]) == facts["size"]
        np.testing.assert_allclose(grey[:, 0, 0] * facts["std"] + facts["mean"], 51 / 255, atol=1e-6)


class TestFingerprint:
    def test_covers_weights_and_ignores_the_container(self, tiny: Encoder, tmp_path: Path) -> None:
        changed = load_encoder(TINY, str(weights_with_change(tmp_path)), device="cpu")
        assert changed.fingerprint != tiny.fingerprint
        assert changed.public_mean is None
        torch.save(load_file(tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE), tmp_path / "same.pt")
        assert load_encoder(TINY, str(tmp_path / "same.pt"), device="cpu").fingerprint == tiny.fingerprint

    def test_covers_preprocessing_architecture_and_tokenizer(self, tiny: Encoder) -> None:
        source = weights.resolve(TINY, "bundled")
        model, _, tokenizer = weights.build(source)
        prints = [weights.fingerprint(source, model, tokenizer)]
        assert prints == [tiny.fingerprint]
        other = weights.Source(model=TINY, file=source.file, preprocess={"interpolation": "bilinear"})
        prints.append(weights.fingerprint(other, weights.build(other)[0], tokenizer))
        other = weights.Source(model=TINY, file=source.file, quick_gelu=True)
        prints.append(weights.fingerprint(other, weights.build(other)[0], tokenizer))
        tokenizer.encoder["zz"] = 9999  # type: ignore[attr-defined]
        prints.append(weights.fingerprint(source, model, tokenizer))
        assert len(set(prints)) == 4


class TestBadModels:
    def test_unknown_model_lists_close_ones(self) -> None:
        assert "ViT-B-16" in refused("FS-1600", lambda: load_encoder("ViT-B16", "openai")).expected

    def test_unknown_tag_lists_close_ones(self) -> None:
        assert "openai" in refused("FS-1601", lambda: load_encoder("ViT-B-16", "openal")).expected
        refused("FS-1601", lambda: load_encoder("ViT-B-16", "bundled"))
        refused("FS-1601", lambda: load_encoder(TINY, "absent.safetensors"))

    def test_uncached_tag_says_what_to_download(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import socket

        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
        monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("touched the network"))
        error = refused("FS-1602", lambda: load_encoder("ViT-B-16", "openai"))
        assert "https://huggingface.co/" in error.cure
        assert "safetensors" in error.cure

    def test_cached_tag_is_found_and_keeps_its_own_settings(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "open_clip_model.safetensors"
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(file))
        source = weights.resolve("ViT-B-16", "openai")
        assert source.file == file
        assert source.quick_gelu, "OpenAI's weights were trained with QuickGELU"
        assert weights.resolve("ViT-B-16-SigLIP", "webli").preprocess["resize_mode"] == "squash"

    def test_quickgelu_model_with_plain_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = {"hf_hub": "x/y/", "quick_gelu": False}
        monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda *a: plain)
        error = refused("FS-1604", lambda: weights.resolve("ViT-B-16-quickgelu", "plain"))
        assert "'ViT-B-16'" in error.cure

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
    @pytest.mark.parametrize("content", [b"", b"nonsense" * 50])
    def test_corrupt(self, tmp_path: Path, suffix: str, content: bytes) -> None:
        file = tmp_path / f"w{suffix}"
        file.write_bytes(content)
        assert str(file) in str(refused("FS-1603", lambda: load_encoder(TINY, str(file))))

    def test_truncated(self, tmp_path: Path) -> None:
        whole = (tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE).read_bytes()
        (tmp_path / "w.safetensors").write_bytes(whole[:-1000])
        refused("FS-1603", lambda: load_encoder(TINY, str(tmp_path / "w.safetensors")))

    def test_code_in_a_torch_file_is_never_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

        torch.save({"visual.proj": Trap()}, tmp_path / "w.pt")
        refused("FS-1603", lambda: load_encoder(TINY, str(tmp_path / "w.pt")))
        assert not (tmp_path / "sprung").exists()

    def test_other_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "w.npz").write_bytes(b"x")
        refused("FS-1603", lambda: load_encoder(TINY, str(tmp_path / "w.npz")))

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        save_file({"some.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
        refused("FS-1604", lambda: load_encoder(TINY, str(tmp_path / "w.safetensors")))
        state = load_file(tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE)
        state["visual.proj"] = torch.zeros(5, 5, dtype=torch.float16)
        save_file(state, tmp_path / "w.safetensors")
        refused("FS-1604", lambda: load_encoder(TINY, str(tmp_path / "w.safetensors")))
        save_file({}, tmp_path / "w.safetensors")
        refused("FS-1603", lambda: load_encoder(TINY, str(tmp_path / "w.safetensors")))

    def test_tokenizer_that_is_not_here(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("cannot reach the hub")

        monkeypatch.setattr("open_clip.get_tokenizer", fail)
        refused("FS-1605", lambda: load_encoder(TINY, "bundled"))

    def test_features_is_no_encoder(self) -> None:
        refused("FS-1606", lambda: load_encoder("features", "x.npz"))

    def test_no_such_device(self) -> None:
        refused("FS-1607", lambda: choose_device("cuda:99"))
        refused("FS-1607", lambda: choose_device("toaster"))
        assert choose_device("cpu") == "cpu"

    def test_nan_weights_show(self, tmp_path: Path) -> None:
        state = load_file(tiny_clip.FOLDER / tiny_clip.WEIGHTS_FILE)
        state["visual.proj"] = state["visual.proj"] * float("nan")
        save_file(state, tmp_path / "w.safetensors")
        encoder = load_encoder(TINY, str(tmp_path / "w.safetensors"), device="cpu")
        refused("FS-1608", lambda: encoder.encode_images([Image.new("RGB", (64, 64))]))

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(EnvironmentProblem, match="FS-1811"):
            load_encoder(TINY, "bundled")


class TestPrompts:
    def test_names_go_in_unchanged(self) -> None:
        assert class_prompts(("no_tumor", "a {x}")) == ("a picture of a no_tumor", "a picture of a a {x}")
        assert class_prompts(("b",), template="{}: {c}") == ("b: {c}",)

    @pytest.mark.parametrize("template", ["a picture", "{} and {}"])
    def test_bad_template(self, template: str) -> None:
        refused("FS-1609", lambda: class_prompts(("a",), template=template))


class TestPretraining:
    def test_merges_join_frequent_words(self) -> None:
        merges = learn_merges(["ring ring ring mass", "mass"])
        assert ("i", "n") in merges
        pieces = {"".join(m) for m in merges}
        assert {"ring</w>", "mass</w>"} <= pieces
        assert merges == learn_merges(["ring ring ring mass", "mass"])
        assert len(learn_merges(["abcdef"], limit=2)) == 2

    def test_captions_speak_both_spellings(self) -> None:
        assert captions("a {}", underscores=True)[1] == "a solid_mass"
        assert captions("a {}", underscores=False)[1] == "a solid mass"

    def test_bundled_architecture_is_what_the_script_writes(self, tmp_path: Path) -> None:
        from fedsecure.simulation.pretrain import write_architecture

        write_architecture(tmp_path)
        for name in (tiny_clip.CONFIG_FILE, tiny_clip.MERGES_FILE):
            assert (tmp_path / name).read_bytes() == (tiny_clip.FOLDER / name).read_bytes()
        assert json.loads((tmp_path / tiny_clip.CONFIG_FILE).read_text())["embed_dim"] == 64

    @pytest.mark.slow
    def test_a_short_run_is_reproducible_and_loads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import open_clip

        # First the bundled configuration, whatever ran before; then none of the drafts.
        weights.import_open_clip()
        monkeypatch.setattr(open_clip, "add_model_config", lambda path: None)
        for name in ("a", "b"):
            pretrain(tmp_path / name, steps=2, batch=16, seed=1, minutes=5)
        files = [tmp_path / n / tiny_clip.WEIGHTS_FILE for n in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert load_encoder(TINY, str(files[0]), device="cpu").dimension == 64
