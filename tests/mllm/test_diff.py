"""Vision towers of two models compared: equal, moved in one block, of other types and kinds, and against the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from pivot_hub import diff_towers, extract_encoder
from pivot_hub.cli import app
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.mllm.diff_figure import draw_diff
from pivot_hub.mllm.similarity import linear_cka
from pivot_hub.mllm.weight_files import WeightFiles

VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARES: dict[str, Any] = {"image_size": 56, "patch_size": 14}
TEXT: dict[str, Any] = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llava(folder: Path, layers: int = 3) -> Path:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**{**VISION, **SQUARES, "num_hidden_layers": layers})
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=5)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    _write_processor(folder, image_processor_type="CLIPImageProcessor", **size)
    return folder


def _qwen(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"depth": 3, "num_heads": 2, "intermediate_size": 64, "patch_size": 14, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2, "hidden_size": 32, "out_hidden_size": 32, "window_size": 56}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "fullatt_block_indexes": [1]}, text_config={**TEXT, "rope_scaling": rope}
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 20000}
    _write_processor(folder, image_processor_type="Qwen2VLImageProcessor", **patches)
    return folder


def _siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VISION, **SQUARES)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def _write_processor(folder: Path, **values: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _altered(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model with other weights."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _key(folder: Path, end: str) -> str:
    """Return the one stored name that ends so, whatever prefix this release of transformers writes."""
    (key,) = [key for key in WeightFiles(folder).keys() if key.endswith(end)]  # noqa: SIM118
    return key


def _moved(source: Path, target: Path, end: str) -> tuple[Path, float]:
    """Copy a model with one tensor moved, and return the copy with the tensor's relative change."""
    key = _key(source, end)
    before = load_file(source / "model.safetensors")[key].double()
    after = before.float() + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    change = float(((before - after.double()).square().sum() / before.square().sum()).sqrt())
    return _altered(source, target, lambda weights: weights.update({key: after})), change


def _to_bfloat16(weights: dict[str, torch.Tensor]) -> None:
    weights.update({key: tensor.bfloat16() for key, tensor in weights.items()})


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _qwen(tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _siglip(tmp_path_factory.mktemp("siglip") / "base")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, shape in {"a": (60, 90), "b": (120, 64), "d": (64, 64)}.items():
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes(b"no image")
    return folder


def test_a_copy_with_another_language_model_is_frozen(llava: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for key in weights:
            if "language_model" in key or "projector" in key:
                weights[key] = weights[key] + 1

    diff = diff_towers(llava, _altered(llava, tmp_path / "tuned", change))
    assert diff.frozen
    assert diff.summary() == "the vision tower is frozen: all 3 blocks are equal"
    assert [part.name for part in diff.parts] == ["embeddings", "block 0", "block 1", "block 2", "post_layernorm"]
    assert diff.relative_change == 0


def test_one_moved_tensor_is_the_change_of_its_block_only(llava: Path, tmp_path: Path) -> None:
    moved, change = _moved(llava, tmp_path / "moved", "layers.1.mlp.fc1.weight")
    diff = diff_towers(llava, moved)
    assert not diff.frozen
    assert [part.name for part in diff.parts if part.changed] == ["block 1"]
    (block,) = [block for block in diff.blocks if block.changed]
    assert block.changed == 1
    assert block.largest == "encoder.layers.1.mlp.fc1.weight"
    assert block.tensors[block.largest] == pytest.approx(change, rel=1e-9)
    stored = load_file(llava / "model.safetensors")
    own = [t.double().square().sum() for key, t in stored.items() if "vision" in key and ".layers.1." in key]
    of_tensor = stored[_key(llava, "layers.1.mlp.fc1.weight")].double().norm()
    expected = change * float(of_tensor) / float(torch.stack(own).sum().sqrt())
    assert block.relative_change == pytest.approx(expected, rel=1e-9)
    assert diff.summary().startswith("the vision tower moved: 1 of 3 blocks differs; relative change ")


def test_blocks_above_the_feature_layer_are_explained(llava: Path, tmp_path: Path) -> None:
    moved, _ = _moved(llava, tmp_path / "below", "layers.1.mlp.fc1.weight")
    diff = diff_towers(llava, moved)
    assert diff.above == [2]  # hidden state -2 of 3 blocks is the output of block 1
    assert "block 2 is equal: it is above the feature layer" in diff.summary()
    also, _ = _moved(moved, tmp_path / "above", "layers.2.mlp.fc1.weight")
    assert "above the feature layer" not in diff_towers(llava, also).summary()


def test_a_merger_that_alone_was_trained_is_not_a_moved_block(qwen: Path, tmp_path: Path) -> None:
    moved, _ = _moved(qwen, tmp_path / "merger", "merger.mlp.0.weight")
    diff = diff_towers(qwen, moved)
    assert diff.changed_blocks == 0
    assert diff.summary().startswith(
        "the vision tower moved outside of its blocks: all 3 blocks are equal, but merger differs (relative change "
    )


@pytest.mark.parametrize("swap", [False, True])
def test_only_the_stored_type_differs(llava: Path, tmp_path: Path, swap: bool) -> None:
    """A copy in bfloat16 is frozen both against its float32 original and against the same values in float32."""
    half = _altered(llava, tmp_path / "half", _to_bfloat16)
    wide = _altered(half, tmp_path / "wide", lambda w: w.update({key: t.float() for key, t in w.items()}))
    for other in (llava, wide):
        diff = diff_towers(other, half) if swap else diff_towers(half, other)
        assert diff.frozen
        assert diff.dtype == "bfloat16"
        assert "only the stored type differs" in diff.summary()


def test_another_architecture_is_refused_with_both_names(llava: Path, qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of different architectures: only .* has .*; give two models") as error:
        diff_towers(llava, qwen)
    assert str(llava) in str(error.value)
    assert "qwen2_5_vl" in str(error.value)


def test_a_tower_without_the_last_layers_is_compared_in_the_others(llava: Path, tmp_path: Path) -> None:
    """As LLaVA-OneVision's, which leaves out the last layer of its SigLIP."""
    deeper = _llava(tmp_path / "deeper", layers=4)
    for diff in (diff_towers(llava, deeper), diff_towers(deeper, llava)):
        assert {name.split(".")[2] for name in diff.not_compared if name.startswith("encoder.layers.")} == {"3"}
        assert len(diff.blocks) == 3


def test_a_float16_copy_of_a_bfloat16_tower_is_equal(llava: Path, tmp_path: Path) -> None:
    """float16 rounds the smallest values of bfloat16, and bfloat16 most of float16's."""

    def cast(weights: dict[str, torch.Tensor], *dtypes: torch.dtype) -> None:
        for key in weights:
            weights[key] = weights[key] * 1e-5
            for dtype in dtypes:
                weights[key] = weights[key].to(dtype)

    brain = _altered(llava, tmp_path / "brain", lambda weights: cast(weights, torch.bfloat16))
    half = _altered(llava, tmp_path / "half", lambda weights: cast(weights, torch.bfloat16, torch.float16))
    assert diff_towers(brain, half).frozen
    assert diff_towers(half, brain).frozen


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_an_mllm_equals_the_encoder_that_was_extracted_from_it(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, images: Path
) -> None:
    source: Path = request.getfixturevalue(family)
    encoder = extract_encoder(source, tmp_path / "encoder")
    for a, b in ((source, encoder), (encoder, source)):
        diff = diff_towers(a, b, images=images)
        assert diff.frozen
        assert {diff.a["kind"], diff.b["kind"]} == {"mllm", "encoder"}
        assert diff.features is not None
        assert {layer.cka for layer in diff.features.layers} == {1.0}
        assert {layer.relative_l2 for layer in diff.features.layers} == {0.0}


def test_of_an_mllm_only_the_tower_is_read(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read = WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda self, keys, *a: read(self, [*map(_noted(asked), keys)], *a))
    diff_towers(llava, _altered(llava, tmp_path / "copy", lambda weights: None))
    assert asked
    assert all("vision_tower" in key for key in asked)


def _noted(names: list[str]) -> Callable[[str], str]:
    def note(name: str) -> str:
        names.append(name)
        return name

    return note


def test_original_encoders_are_compared_even_where_one_has_a_pooling_head(siglip: Path, tmp_path: Path) -> None:
    assert diff_towers(siglip, _siglip(tmp_path / "copy")).frozen

    def drop_head(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if ".head." in f".{key}"]:
            del weights[key]

    headless = _altered(siglip, tmp_path / "headless", drop_head)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "vision_use_head": False}))
    diff = diff_towers(siglip, headless)
    assert diff.frozen
    assert diff.not_compared
    assert all(name.startswith("head.") for name in diff.not_compared)
    assert "Not compared" in diff.method()


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_features_differ_from_the_moved_block_on(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, images: Path
) -> None:
    source: Path = request.getfixturevalue(family)
    end = {"llava": "layers.1.mlp.fc1.weight", "qwen": "blocks.1.mlp.gate_proj.weight"}[family]
    moved, _ = _moved(source, tmp_path / "moved", end)
    features = diff_towers(source, moved, images=images).features
    assert features is not None
    assert [layer.layer for layer in features.layers] == [0, 1, 2, 3, "last_hidden_state"]
    assert [layer.cka == 1 and layer.relative_l2 == 0 for layer in features.layers] == [True, True, False, False, False]
    assert all(layer.cka is not None and layer.cka < 1 for layer in features.layers[2:])
    assert (features.images, features.listed) == (3, 4)
    assert len(features.skipped) == 1
    assert "c.png" in features.skipped[0]
    limited = diff_towers(source, moved, images=images, limit=2).features
    assert limited is not None
    assert limited.images == 2


def test_linear_cka_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((50, 8), (6, 20)):  # more tokens than channels, and fewer
        x, y = (torch.randn(shape, generator=generator) + 3 for _ in range(2))
        centring = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
        k, m = (centring @ z.double() @ z.double().T @ centring for z in (x, y))
        assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-9)
        rotation = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator)).Q
        assert linear_cka(x, 2 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert linear_cka(torch.ones(4, 3), torch.ones(4, 3)) is None


def test_the_figure_and_the_json_are_written(llava: Path, tmp_path: Path, images: Path) -> None:
    moved, change = _moved(llava, tmp_path / "moved", "layers.1.mlp.fc1.weight")
    figure, report = tmp_path / "new" / "diff.png", tmp_path / "diff.json"
    arguments = ["--images", str(images), "--figure", str(figure), "--json", str(report)]
    done = CliRunner().invoke(app, ["diff", str(llava), str(moved), *arguments])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("the vision tower moved: 1 of 3 blocks differs; ")
    assert "left out: c.png" in done.output
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG"
        two_panels = drawn.height
        assert np.asarray(drawn.convert("L")).std() > 0
    values = json.loads(report.read_text())
    assert (values["frozen"], values["changed_blocks"], values["blocks"]) == (False, 1, 3)
    assert values["parts"][2]["largest_change"] == pytest.approx(change)
    assert values["features"]["images"] == 3
    assert values["a"]["name"] == "base"  # without the path of the folder
    draw_diff(diff_towers(llava, moved), figure)
    with Image.open(figure) as drawn:
        assert drawn.height < two_panels


def test_bad_input_is_one_message(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is given twice; give the model before training and the one after it"):
        diff_towers(llava, llava / ".." / llava.name)
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing: its config cannot be read: .*give a folder, or a Hub name"
    ):
        diff_towers(llava, "nobody/nothing")
    with pytest.raises(CheckpointError, match="nothing: there is no such folder; give the folder of an MLLM"):
        diff_towers(llava, tmp_path / "nothing")
    LlamaConfig(**TEXT).save_pretrained(tmp_path / "language")
    (tmp_path / "language" / "model.safetensors").write_bytes((llava / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is neither an MLLM of the table nor an encoder that can be loaded"):
        diff_towers(llava, tmp_path / "language")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="limit 0: give 1 image or more"):
        diff_towers(llava, tmp_path / "language", images=tmp_path, limit=0)
    with pytest.raises(DataError, match="holds no image file"):
        diff_towers(llava, _altered(llava, tmp_path / "copy", lambda weights: None), images=tmp_path / "empty")


def _card(folder: Path, base: Any) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {json.dumps(base)}\n---\nA model.\n")
    return folder


def _source(encoder: Path) -> dict[str, Any]:
    source: dict[str, Any] = json.loads((encoder / "provenance.json").read_text())["source"]
    return source


def test_extraction_records_that_the_tower_is_the_base_models(llava: Path, tmp_path: Path) -> None:
    tuned = _card(_altered(llava, tmp_path / "tuned", lambda weights: None), [str(llava)])
    lines: list[str] = []
    source = _source(extract_encoder(tuned, tmp_path / "encoder", log=lines.append))
    assert source["base_comparison"] == {
        "base_model": "base",
        "base_revision": None,
        "frozen": True,
        "changed_blocks": 0,
        "blocks": 3,
        "relative_change": 0.0,
    }
    assert lines[1:] == ["the vision tower is frozen: it equals that of base, so this encoder is base's"]
    assert source["base_model"] == ["base"]  # without the path of the folder
    left_out = _source(extract_encoder(tuned, tmp_path / "encoder", compare_with_base=False))
    assert "base_comparison" not in left_out


def test_extraction_records_that_the_tower_moved(llava: Path, siglip: Path, tmp_path: Path) -> None:
    moved, _ = _moved(llava, tmp_path / "moved", "layers.1.mlp.fc1.weight")
    done = CliRunner().invoke(app, ["extract", str(_card(moved, str(llava))), str(tmp_path / "encoder")])
    assert done.exit_code == 0, done.output
    assert "compared with base: the vision tower moved: 1 of 3 blocks differs; " in done.output
    comparison = _source(tmp_path / "encoder")["base_comparison"]
    assert (comparison["frozen"], comparison["changed_blocks"], comparison["blocks"]) == (False, 1, 3)
    assert comparison["relative_change"] == pytest.approx(diff_towers(llava, moved).relative_change)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("nobody/nothing", "nobody/nothing: "),
        ("siglip", "of different architectures"),
        (["a/language", "b/vision"], "its card names 2 base models"),
        (None, "its card names no base model"),
        ("itself", "its card names the model itself"),
    ],
)
def test_extraction_succeeds_where_the_base_cannot_be_compared(
    llava: Path, siglip: Path, tmp_path: Path, base: Any, reason: str
) -> None:
    tuned = _altered(llava, tmp_path / "tuned", lambda weights: None)
    base = {"siglip": str(siglip), "itself": str(tuned)}.get(base, base) if isinstance(base, str) else base
    lines: list[str] = []
    source = _source(extract_encoder(_card(tuned, base), tmp_path / "encoder", log=lines.append))
    assert source["base_comparison"] is None
    assert reason in source["base_comparison_reason"]
    assert str(tmp_path.parent) not in json.dumps(source)
    assert len(lines) == 1 + (base is not None)  # the first says what was read
    assert all(line.startswith("not compared with ") for line in lines[1:])
