"""PivotVisionModel with every backbone: outputs, options of from_pretrained, heads, compilation and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoModel,
    DetrConfig,
    DetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from pivot_hub import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder import PivotVisionBackbone
from pivot_hub.encoder.modeling_pivot import to_grid
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.load import load_mllm
from tests.encoder.originals import IMAGE_PX, ORIGINALS, SIZES, make_vision

GRID = IMAGE_PX // SIZES["patch_size"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {kind: make_vision(folder / kind, kind) for kind in ORIGINALS}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def extracted(trained: Path) -> PivotVisionModel:
    return PivotVisionModel.from_mllm(load_mllm(trained / "3-dpo")[0])


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_patch_tokens_are_those_of_the_native_class(
    kind: str, repositories: dict[str, Path], pixels: torch.Tensor
) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories[kind])
    prefix = ORIGINALS[kind].prefix_tokens
    assert type(encoder.backbone).__name__ == ORIGINALS[kind].native
    assert encoder.config.pivot == {"stage": "base", "feature_layer": -2, "prefix_tokens": prefix}
    assert (encoder.config.image_size, encoder.config.patch_size, encoder.config.hidden_size) == (IMAGE_PX, 8, 32)
    hidden = encoder.backbone(pixels, output_hidden_states=True).hidden_states
    outputs = encoder(pixels, output_hidden_states=True, output_attentions=False)
    assert outputs.last_hidden_state.shape == (3, GRID**2, 32)
    assert torch.equal(outputs.last_hidden_state, hidden[-2][:, prefix:])
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state.mean(1))
    assert len(outputs.hidden_states) == 4
    grid = encoder.feature_map(pixels)
    assert grid.shape == (3, 32, GRID, GRID)
    assert torch.equal(grid[0, :, 1, 2], outputs.last_hidden_state[0, GRID + 2])


@torch.no_grad()
def test_mae_sees_every_patch_in_its_place(repositories: dict[str, Path], pixels: torch.Tensor) -> None:
    """ViTMAEModel drops three quarters of the patches; without dropping and shuffling, it must give equal features."""
    from transformers import ViTMAEModel

    native = ViTMAEModel.from_pretrained(repositories["mae"], mask_ratio=0.0).eval()
    in_order = torch.arange(GRID**2).expand(3, -1) / 100
    expected = native(pixels, noise=in_order, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(PivotVisionModel.from_pretrained(repositories["mae"])(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_images_go_through_the_repositorys_own_processor(kind: str, repositories: dict[str, Path]) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories[kind])
    noise = Image.effect_noise((70, 50), 80)
    images = [noise.convert(mode) for mode in ("RGB", "L", "P", "RGBA", "1")]
    outputs = encoder.forward_features(images)
    assert outputs.last_hidden_state.shape == (5, GRID**2, 32)
    assert torch.equal(outputs.last_hidden_state[0], outputs.last_hidden_state[1])  # the same grey image in RGB and L
    assert torch.allclose(encoder.forward_features(images[0]).pooler_output, outputs.pooler_output[:1], atol=1e-6)


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_other_image_sizes_are_encoded_or_refused_with_an_error_message(
    kind: str, repositories: dict[str, Path]
) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories[kind])
    wide = torch.randn(1, 3, IMAGE_PX, 2 * IMAGE_PX)
    if kind != "aimv2":
        assert encoder.feature_map(wide, interpolate_pos_encoding=True).shape == (1, 32, GRID, 2 * GRID)
    if kind in ("siglip", "siglip2", "clip", "vit", "mae"):
        with pytest.raises(ValueError, match="32 x 64 px for an encoder of 32; resize them, or set interpolate"):
            encoder(wide)
    with pytest.raises(ValueError, match="patch of 8 px does not divide images of 32 x 30 px; resize them"):
        encoder(wide[..., :30], interpolate_pos_encoding=True)


@torch.no_grad()
def test_tuple_and_attentions_are_returned_on_request(extracted: PivotVisionModel, pixels: torch.Tensor) -> None:
    tokens, pooled = extracted(pixels, return_dict=False)
    assert tokens.shape == (3, GRID**2, 32)
    assert pooled.shape == (3, 32)
    extracted.set_attn_implementation("eager")
    assert extracted(pixels, output_attentions=True).attentions[0].shape == (3, 2, GRID**2, GRID**2)
    with pytest.raises(ValueError, match="16 patch tokens do not fill a grid of 3 x 4"):
        to_grid(tokens, 3, 4)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_it_compiles_into_one_graph(kind: str, repositories: dict[str, Path], pixels: torch.Tensor) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories[kind])
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")  # a graph break raises; no kernels are compiled
    with torch.no_grad():
        assert torch.equal(compiled(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_gradient_checkpointing_saves_activations_and_changes_no_gradient(
    kind: str, repositories: dict[str, Path], pixels: torch.Tensor
) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories[kind]).train()
    gradients, activations = [], []
    for checkpointed in (False, True):
        if checkpointed:
            encoder.gradient_checkpointing_enable()
        encoder.zero_grad()
        torch.manual_seed(0)  # DINOv3 jitters its positions in training
        sizes: list[int] = []

        def count(saved: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            loss = encoder(pixels).last_hidden_state.square().mean()
        loss.backward()
        activations.append(sum(sizes))
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert activations[1] < activations[0] / 2
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][k], gradients[1][k], atol=1e-7) for k in gradients[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close(dtype: torch.dtype, repositories: dict[str, Path], pixels: torch.Tensor) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories["siglip"], dtype=dtype)
    assert encoder.dtype == dtype
    exact = PivotVisionModel.from_pretrained(repositories["siglip"])(pixels).last_hidden_state
    tokens = encoder(pixels.to(dtype)).last_hidden_state
    assert tokens.dtype == dtype
    assert (tokens.float() - exact).norm() / exact.norm() < 0.02
    assert encoder.forward_features(Image.new("L", (9, 9))).last_hidden_state.dtype == dtype


@torch.no_grad()
def test_attention_and_device_map_reach_the_backbone(
    repositories: dict[str, Path], pixels: torch.Tensor, tmp_path: Path
) -> None:
    # CLIP, because SigLIP's pooling head uses torch's own attention, which accelerate cannot offload to disk.
    exact = PivotVisionModel.from_pretrained(repositories["clip"])
    assert exact.backbone.config._attn_implementation == "sdpa"
    eager = PivotVisionModel.from_pretrained(repositories["clip"], attn_implementation="eager")
    assert eager.config._attn_implementation == eager.backbone.config._attn_implementation == "eager"
    assert torch.allclose(eager(pixels).last_hidden_state, exact(pixels).last_hidden_state, atol=1e-5)
    for options in (
        {"device_map": "auto"},
        {"device_map": "auto", "max_memory": {"cpu": 50_000}, "offload_folder": str(tmp_path)},
    ):
        placed = PivotVisionModel.from_pretrained(repositories["clip"], **options)
        assert torch.equal(placed(pixels).last_hidden_state, exact(pixels).last_hidden_state)
    assert any(p.is_meta for p in placed.parameters()), "nothing was offloaded to disk"


@torch.no_grad()
def test_another_feature_layer_can_be_chosen(
    repositories: dict[str, Path], pixels: torch.Tensor, tmp_path: Path
) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories["clip"], feature_layer=-1)
    hidden = encoder.backbone(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(encoder(pixels).last_hidden_state, hidden[-1][:, 1:])
    encoder.save_pretrained(tmp_path)
    assert PivotVisionModel.from_pretrained(tmp_path).config.pivot["feature_layer"] == -1


def test_a_push_and_a_pickle_are_refused_and_nothing_is_written(repositories: dict[str, Path], tmp_path: Path) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories["siglip"])
    with pytest.raises(ValueError, match="call push_to_hub"):
        encoder.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(ValueError, match="never as a pickle"):
        encoder.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()
    bare = Path(shutil.copytree(repositories["siglip"], tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="save a SiglipImageProcessor"):
        PivotVisionModel.from_pretrained(bare).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    changed = {k: v + 1 for k, v in encoder.state_dict().items()}
    encoder.save_pretrained(tmp_path / "out", state_dict=changed, safe_serialization=True)
    written = PivotVisionModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(written[k], changed[k]) for k in changed)


def test_auto_model_builds_from_our_config() -> None:
    config = PivotVisionConfig({"model_type": "siglip_vision_model", **SIZES})
    assert isinstance(AutoModel.from_config(config), PivotVisionModel)
    assert PivotVisionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("hidden_size", "layers", "intermediate", "image_px", "patch", "grid"),
    [
        pytest.param(768, 12, 3072, 512, 16, 32, id="base-patch16-512"),
        pytest.param(1024, 24, 4096, 384, 16, 24, id="large-patch16-384"),
        pytest.param(1152, 27, 4304, 384, 14, 27, id="so400m-patch14-384"),
        pytest.param(1536, 40, 6144, 384, 16, 24, id="giant-opt-patch16-384"),
    ],
)
def test_siglips_published_sizes_give_their_grid(
    hidden_size: int, layers: int, intermediate: int, image_px: int, patch: int, grid: int
) -> None:
    """So400m's patch of 14 does not divide its own 384 px: the last 6 pixels are left out, as in its training."""
    native = {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": intermediate,
        "image_size": image_px,
        "patch_size": patch,
    }
    with torch.device("meta"):
        encoder = AutoModel.from_config(PivotVisionConfig(native))
        features = encoder.feature_map(torch.empty(1, 3, image_px, image_px))
    assert features.shape == (1, hidden_size, grid, grid)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_segmentation_and_detection_heads_take_it(kind: str, repositories: dict[str, Path]) -> None:
    backbone = PivotVisionBackbone.from_pretrained(repositories[kind], out_indices=[0, 1, 2, -1])
    native = backbone.config.backbone_config
    assert type(AutoBackbone.from_config(PivotVisionConfig(native))) is PivotVisionBackbone
    images = torch.randn(1, 3, IMAGE_PX, IMAGE_PX)
    backbone.eval()
    with torch.no_grad():
        maps = backbone(images).feature_maps
        expected = PivotVisionModel.from_pretrained(repositories[kind], feature_layer=1).feature_map(images)
    assert torch.equal(maps[1], expected)
    assert backbone.out_features == ["stem", "stage1", "stage2", "stage3"]

    config = PivotVisionConfig(native, out_indices=[0, 1, 2, 3])
    options: Any = {"backbone_config": config, "num_labels": 5, "hidden_size": 16, "use_auxiliary_head": False}
    segmenter = UperNetForSemanticSegmentation(UperNetConfig(**options))
    segmenter.backbone = backbone
    assert segmenter.eval()(images).logits.shape == (1, 5, IMAGE_PX, IMAGE_PX)

    sizes: Any = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads: Any = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": 3}
    detector = DetrForObjectDetection(DetrConfig(backbone_config=PivotVisionConfig(native), **sizes, **heads))
    assert detector.eval()(images).pred_boxes.shape == (1, 6, 4)


def _adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _shard(folder: Path) -> None:
    keys = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return apply


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "is not a model repository, it has no config.json; give the"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights; the download stopped half-way"),
    "half": (_half, "its weights are cut off or damaged .* download it again"),
    "a shard": (_shard, "model-00002-of-00002.safetensors is missing; the download stopped half-way"),
    "adapter": (_adapter, "is a LoRA adapter, not a model; merge it into its base"),
    "pickle": (_pickle, r"its weights are a pickle \(pytorch_model.bin\), which may run code; convert them"),
    "a key": (_weights(lambda w: w.__delitem__(next(k for k in w if "layers.1" in k))), "1 weights are missing"),
    "NaN": (_weights(lambda w: next(iter(w.values())).view(-1).__setitem__(0, float("nan"))), "not finite"),
    "sizes": (_config(intermediate_size=48), "do not have the sizes of config.json|of another shape"),
    "unknown": (_config(model_type="resnet"), "vision architecture 'resnet' is not supported; give one of: siglip"),
    "another processor": (
        lambda f: (f / "preprocessor_config.json").write_text('{"image_processor_type": "OwnImageProcessor"}'),
        "its image processor OwnImageProcessor has no form without torchvision",
    ),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "save a SiglipImageProcessor with the enc"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_incomplete_encoder_is_refused_with_a_one_line_message(
    name: str, repositories: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repositories["siglip"], tmp_path / "copy"))
    damage, message = BROKEN[name]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_encoder(copy)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(copy)) == 1


def test_a_language_model_or_an_absent_folder_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="architecture 'qwen2' is not supported; give one of"):
        read_encoder(parts / "language")
    with pytest.raises(CheckpointError, match="no encoder can be loaded"):
        read_encoder(tmp_path / "absent")


def test_a_token_is_used_and_not_stored(repositories: dict[str, Path]) -> None:
    encoder = PivotVisionModel.from_pretrained(repositories["siglip"], token="hf_secret")
    assert encoder.image_processor is not None
    assert "hf_secret" not in repr(vars(encoder)) + repr(encoder.config.to_dict())
