"""Towers of native resolution wherever encoders are used: each image has a map of its own, or they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from pivot_hub.bench.encoder import bench_encoder
from pivot_hub.cli import app
from pivot_hub.data.image import open_image
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel, batches, encode, encoding_run
from pivot_hub.encoder.encode import encode_source
from pivot_hub.encoder.export import export_encoder
from pivot_hub.encoder.feature_parts import PartFolder
from pivot_hub.encoder.image_shapes import parse_layer, require_squares
from pivot_hub.encoder.repository import read_encoder, verify_repository
from pivot_hub.errors import CheckpointError, DataError, PivotError
from pivot_hub.explain.image_maps import captured_tokens, fold_features
from pivot_hub.explain.patch_features import principal_colours, similarity
from pivot_hub.mllm.build import build_mllm, read_processor
from pivot_hub.mllm.load import load_llava
from pivot_hub.mllm.published_configs import part_config
from tests.encoder.native_towers import TOWERS, WIDTH, write_tower

SHAPES = [(60, 90), (120, 40), (64, 64), (30, 110), (100, 101), (90, 60), (50, 50)]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {model_type: write_tower(model_type, folder) for model_type in TOWERS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create images of different shapes, and a corrupt one."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "3-corrupt.png").write_bytes(b"no image")
    return folder


def expected(tower: Path, images: Path, files: list[str], layer: int | str | None = None) -> Any:
    """Encode each image alone."""
    encoder, _ = read_encoder(tower, feature_layer=layer)
    with torch.no_grad():
        return [encoder.forward_features([open_image(images / f, f)]) for f in files]


def read_maps(out: Path, width: int = WIDTH) -> list[np.ndarray]:
    """Read tokens as a user does: flat features, reshaped by the columns height and width."""
    rows = pq.read_table(out).to_pylist()
    return [np.array(row["features"], np.float32).reshape(row["height"], row["width"], width) for row in rows]


@pytest.mark.parametrize("model_type", TOWERS)
def test_tokens_of_each_image_are_its_own_map(
    model_type: str, towers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens.parquet"
    report = encode_source(towers[model_type], images, out, tokens=True, batch=3, workers=0)
    assert json.loads((tmp_path / "tokens.parquet.json").read_text()) == report
    assert report["shape"] == ["height", "width", WIDTH]
    assert [entry["file"] for entry in report["corrupt"]] == ["3-corrupt.png"]
    maps = read_maps(out)
    assert pq.read_table(out)["id"].to_pylist() == report["files"]
    assert report["grids"] == [list(m.shape[:2]) for m in maps]
    assert len({m.shape for m in maps}) > 3, "images of several shapes are encoded together"
    for own, outputs in zip(maps, expected(towers[model_type], images, report["files"]), strict=True):
        assert own.shape == outputs.last_hidden_state[0].shape
        np.testing.assert_allclose(own, outputs.last_hidden_state[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("model_type", TOWERS)
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_pooled_features_are_written_as_those_of_square_encoders(
    model_type: str, suffix: str, towers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"pooled{suffix}"
    report = encode_source(towers[model_type], images, out, batch=3, workers=0)
    assert report["shape"] == [WIDTH]
    assert "grids" not in report
    pooled = np.load(out) if suffix == ".npy" else np.stack(pq.read_table(out)["features"].to_numpy())
    outputs = expected(towers[model_type], images, report["files"])
    np.testing.assert_allclose(pooled, torch.cat([o.pooler_output for o in outputs]).numpy(), atol=1e-5)


def test_large_images_are_encoded_in_smaller_batches(
    towers: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_source(towers["qwen3_vl_vision"], images, tmp_path / "whole.parquet", True, batch=7, workers=0)
    sizes: list[int] = []
    joined = batches.join_inputs

    def noted(inputs: Any) -> Any:
        sizes.append(len(inputs))
        return joined(inputs)

    monkeypatch.setattr(batches, "join_inputs", noted)
    monkeypatch.setattr(batches, "NUMBERS", 60_000)
    encode_source(towers["qwen3_vl_vision"], images, tmp_path / "parts.parquet", True, batch=7, workers=0)
    assert len(sizes) > 1
    assert max(sizes) < 7
    whole, parts = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert whole["id"].equals(parts["id"])
    for one, other in zip(whole["features"].to_pylist(), parts["features"].to_pylist(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_worker_processes_prepare_images_of_any_shape(towers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        encode_source(towers["pixtral"], images, tmp_path / f"{workers}.parquet", True, batch=2, workers=workers)
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


@pytest.mark.parametrize("model_type", TOWERS)
def test_a_stopped_run_resumes_and_gives_the_same_maps(
    model_type: str, towers: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_run, "PART_IMAGES", 2)
    whole, out = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    encode_source(towers[model_type], images, whole, tokens=True, batch=2, workers=0)

    def stop(done: int, total: int | None, rate: float) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_source(towers[model_type], images, out, tokens=True, batch=2, workers=0, progress=stop)
    assert not out.exists()
    damaged = sorted((tmp_path / "resumed.parquet.partial").glob("*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    report = encode_source(towers[model_type], images, out, tokens=True, batch=2, workers=0)
    assert report["resumed_images"] == 3, "the damaged part is not used, and the corrupt image is known"
    assert out.read_bytes() == whole.read_bytes()


def test_only_added_and_replaced_images_are_encoded_again(
    towers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes((images / f"{i}.png").read_bytes())
    out = tmp_path / "f.parquet"
    encode_source(towers["pixtral"], folder, out, tokens=True, batch=2, workers=0)
    (folder / "0.png").write_bytes((images / "6.png").read_bytes())
    (folder / "1b.png").write_bytes((images / "5.png").read_bytes())
    report = encode_source(towers["pixtral"], folder, out, tokens=True, batch=2, workers=0)
    assert report["resumed_images"] == 3
    assert report["files"] == ["0.png", "1.png", "1b.png", "2.png", "3.png"]
    outputs = expected(towers["pixtral"], folder, report["files"])
    for own, one in zip(read_maps(out), outputs, strict=True):
        np.testing.assert_allclose(own, one.last_hidden_state[0].numpy(), atol=1e-5)


def test_a_part_holds_about_as_many_bytes_as_a_stopped_run_may_lose(
    towers: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(encoding_run, "PART_BYTES", 16_000)
    write_part = PartFolder.write_part

    def record(self: Any, name: str, number: int, tables: list[pa.Table]) -> Any:
        sizes.append(tables[0].slice(0, len(tables[0]) - 1).nbytes)
        return write_part(self, name, number, tables)

    monkeypatch.setattr(PartFolder, "write_part", record)
    encode_source(towers["pixtral"], images, tmp_path / "f.parquet", tokens=True, batch=1, workers=0)
    assert len(sizes) > 1
    assert max(sizes) <= 16_000, "a part ends with the image that fills it"


def test_an_image_of_a_shape_that_the_processor_refuses_is_listed(towers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (900, 2)).save(folder / "line.png")
    Image.new("RGB", (60, 60)).save(folder / "square.png")
    report = encode_source(towers["qwen3_vl_vision"], folder, tmp_path / "f.parquet", tokens=True, workers=0)
    assert report["files"] == ["square.png"]
    assert "line.png: its image processor does not take 900 x 2 px" in report["corrupt"][0]["reason"]


def test_features_that_are_not_finite_are_named(
    towers: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = read_encoder(towers["siglip2_vision_model"])
    forward = model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.last_hidden_state[1][-1, -1, -1] = float("nan")
        return outputs

    monkeypatch.setattr(model, "forward", broken)
    monkeypatch.setattr(encode, "read_encoder", lambda name, **options: (model, processor))
    with pytest.raises(DataError, match=r"the features of 1\.png are not finite"):
        encode_source(towers["siglip2_vision_model"], images, tmp_path / "f.parquet", tokens=True, workers=0)


def test_tokens_in_npy_are_refused_before_anything_is_written(
    towers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"give --out a name that ends in .parquet, or leave --tokens out"):
        encode_source(towers["pixtral"], images, tmp_path / "f.npy", tokens=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", ["merged", "last_hidden_state", 1, -3])
def test_any_feature_layer_is_written_and_recorded(
    layer: int | str, towers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    tower, out = towers["qwen3_vl_vision"], tmp_path / "f.parquet"
    command = ["encode", str(images), "--encoder", str(tower), "--out", str(out), "--tokens", "--workers", "0"]
    result = CliRunner().invoke(app, [*command, "--feature-layer", str(layer)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "f.parquet.json").read_text())
    assert report["feature_layer"] == layer
    width = 48 if layer == "merged" else WIDTH
    assert report["shape"] == ["height", "width", width]
    for own, one in zip(read_maps(out, width), expected(tower, images, report["files"], layer), strict=True):
        np.testing.assert_allclose(own, one.last_hidden_state[0].numpy(), atol=1e-5)
    other = 2 if layer != 2 else 1
    again = encode_source(tower, images, out, tokens=True, workers=0, feature_layer=other)
    assert again["resumed_images"] == 0, "features of another layer are never used"


def test_several_layers_are_written_in_one_pass(towers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    tower, out = towers["qwen3_vl_vision"], tmp_path / "f.parquet"
    report = encode_source(tower, images, out, tokens=True, workers=0, feature_layer=["last_hidden_state", 1])
    rows = pq.read_table(out).to_pylist()
    for name, layer in (("features_last_hidden_state", "last_hidden_state"), ("features_1", 1)):
        for row, one in zip(rows, expected(tower, images, report["files"], layer), strict=True):
            own = np.array(row[name], np.float32).reshape(row["height"], row["width"], WIDTH)
            np.testing.assert_allclose(own, one.last_hidden_state[0].numpy(), atol=1e-5)


def test_a_feature_layer_that_the_tower_lacks_is_refused(towers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    for layer, message in ((9, "give -4 to 3"), ("merged", "give the number of a hidden state, or last_hidden_state")):
        with pytest.raises(CheckpointError, match=message):
            encode_source(towers["pixtral"], images, tmp_path / "f.parquet", feature_layer=layer)


def test_layers_of_the_command_line() -> None:
    assert [parse_layer(text) for text in ("-2", "3", "merged", None)] == [-2, 3, "merged", None]


@pytest.mark.parametrize("model_type", TOWERS)
def test_golden_vectors_are_replayed_at_their_own_layer(model_type: str, towers: dict[str, Path]) -> None:
    assert verify_repository(towers[model_type]) == []
    model, _ = read_encoder(towers[model_type], feature_layer=1)
    assert model.config.pivot["feature_layer"] == 1


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    tower = write_tower("qwen3_vl_vision", tmp_path)
    weights = load_file(tower / "model.safetensors")
    key = next(k for k in weights if k.endswith("blocks.0.attn.qkv.weight"))
    weights[key] = weights[key].flip(1)
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differ from the golden vectors"):
        read_encoder(tower, feature_layer="merged")


def test_patch_similarity_and_colours_take_maps_of_any_shape(towers: dict[str, Path], images: Path) -> None:
    (outputs,) = expected(towers["pixtral"], images, ["0.png"])
    features = outputs.last_hidden_state[0].numpy()
    assert features.shape[0] != features.shape[1]
    similar = similarity(features, 1, 2)
    assert similar.shape == features.shape[:2]
    assert similar[1, 2] == pytest.approx(1, abs=1e-5)
    (colours,), _, _ = principal_colours([features])
    assert colours.shape == (*features.shape[:2], 3)


@pytest.fixture(scope="module")
def pixtral_mllm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaForConditionalGeneration]:
    """Create a small LLaVA MLLM with Pixtral's tower."""
    text = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = PivotVisionConfig({"model_type": "pixtral", **TOWERS["pixtral"]}).backbone_config
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=5,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
    folder = tmp_path_factory.mktemp("mllm")
    model.save_pretrained(folder)
    return folder, model


def test_patch_features_inside_an_mllm_are_those_of_the_tower(
    towers: dict[str, Path], pixtral_mllm: tuple[Path, LlavaForConditionalGeneration], images: Path
) -> None:
    """In the shape of the image, in its MLLM as alone."""
    _, mllm = pixtral_mllm
    encoder = PivotVisionModel(PivotVisionConfig(mllm.config.vision_config), mllm.model.vision_tower)
    encoder.image_processor = read_encoder(towers["pixtral"])[1]
    inputs = encoder.prepare([open_image(images / "0.png", "0.png")])
    with torch.no_grad(), captured_tokens(mllm) as tokens:
        (features,) = encoder(**inputs).last_hidden_state
        mllm.model.get_image_features(**inputs)
    (inside,) = fold_features(mllm, tokens["features"], inputs)
    assert inside.shape[0] != inside.shape[1]
    assert torch.equal(inside, features)


def test_what_needs_square_images_names_the_tower_and_the_remedy(
    towers: dict[str, Path],
    parts: Path,
    tmp_path: Path,
    pixtral_mllm: tuple[Path, LlavaForConditionalGeneration],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower, language = str(towers["qwen3_vl_vision"]), str(parts / "language")
    folder, _ = pixtral_mllm

    def no_work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded before the refusal")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", no_work)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", no_work)
    uses: list[tuple[Callable[[], object], str]] = [
        (lambda: export_encoder(tower, tmp_path / "export"), "run it in torch"),
        (lambda: bench_encoder(tower), "time PivotVisionModel.forward_features"),
        (lambda: build_mllm(tower, language), "give one of the other backbones"),
        (lambda: read_processor(tower, language), "give one of the other backbones"),
        (lambda: part_config(tower), "give one of the other backbones"),
        (lambda: load_llava(folder), "give one of the other backbones"),
    ]
    for use, remedy in uses:
        with pytest.raises(PivotError, match=r"is a tower of native resolution; .*" + remedy):
            use()
    assert list(tmp_path.iterdir()) == []


def test_square_encoders_are_not_refused(parts: Path) -> None:
    require_squares(read_encoder(parts / "vision")[0].config, "vision", "a test", "do nothing")
    assert part_config(str(parts / "vision")).model_type == "siglip_vision_model"


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_recipe_with_such_a_part_is_refused_before_training(
    command: str, towers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vision = towers["siglip2_vision_model"]
    result = CliRunner().invoke(app, [command, "shapes/1-align", f"model.vision={vision}", "args.max_steps=1"])
    words = f"{result.output} {result.exception}".split()
    assert "siglip2_vision_model is a tower of native resolution" in " ".join(words)
    assert not list(tmp_path.rglob("*.safetensors"))
