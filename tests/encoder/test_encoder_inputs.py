"""Unusual input of an encoder: one answer for an image at all entry points, and hostile repositories refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from pivot_hub import PivotVisionModel
from pivot_hub.data.image import open_image
from pivot_hub.encoder import PivotVisionBackbone, PivotVisionConfig
from pivot_hub.encoder.modeling_pivot import to_rgb
from pivot_hub.encoder.repository import read_encoder, write_repository
from pivot_hub.errors import CheckpointError
from tests.encoder.originals import IMAGE_PX, ORIGINALS, make_vision


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision(tmp_path_factory.mktemp("inputs") / "siglip")


@pytest.fixture(scope="module")
def encoder(source: Path) -> PivotVisionModel:
    return read_encoder(source)[0]


def noise(mode: str) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, *channels), np.uint8))


def save_turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("RGB").save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


def save_wide(folder: Path) -> Path:
    Image.fromarray(np.full((40, 50), 32768, np.uint16)).save(folder / "wide.png")
    return folder / "wide.png"


def save_transparent(folder: Path) -> Path:
    noise("RGBA").save(folder / "transparent.png")
    return folder / "transparent.png"


@pytest.mark.parametrize("save", [save_turned, save_wide, save_transparent])
@torch.no_grad()
def test_an_image_gives_the_same_features_at_every_entry_point(
    save: Callable[[Path], Path], encoder: PivotVisionModel, tmp_path: Path
) -> None:
    file = save(tmp_path)
    expected = open_image(file, "test")
    if save is save_wide:
        assert expected.getpixel((0, 0)) == (128, 128, 128)
    with Image.open(file) as stored:
        assert to_rgb(stored).tobytes() == expected.tobytes()
        forms = [expected, stored, str(file), file]
        features = encoder.forward_features(forms).pooler_output
    assert all(torch.equal(row, features[0]) for row in features)


@torch.no_grad()
def test_arrays_and_tensors_are_scaled_once(encoder: PivotVisionModel) -> None:
    image, grey = noise("RGB"), noise("L")
    pixels = np.asarray(image)
    forms = [
        image,
        pixels,
        pixels.transpose(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1) / 255,
        pixels[:, ::-1][:, ::-1].astype(np.float64) / 255,
    ]
    features = encoder.forward_features(forms).pooler_output
    assert all(torch.equal(row, features[0]) for row in features)
    batch = encoder.forward_features(torch.stack([forms[4], forms[4]])).pooler_output  # type: ignore[list-item]
    assert torch.allclose(batch, features[:2], atol=1e-5)
    greys = encoder.forward_features([grey, np.asarray(grey), torch.tensor(np.asarray(grey))[None]]).pooler_output
    assert torch.equal(greys[1], greys[0])
    assert torch.equal(greys[2], greys[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.randn(3, 8, 8), r"float32 from -.* is not an image; give integers from 0 to 255 or floats from 0 to 1"),
        (np.full((8, 8, 3), 200.0), "float64 from 200 to 200 is not an image"),
        (np.full((8, 8), 1000, np.int32), "int32 from 1000 to 1000"),
        (torch.full((3, 8, 8), float("nan")), "from nan to nan"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\) is not an image"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        ({"path": "x"}, "dict is not an image"),
        ("absent.png", r"absent\.png cannot be decoded"),
        (Image.new("F", (8, 8)), "32-bit pixels"),
    ],
)
def test_what_is_not_an_image_is_refused(image: Any, message: str, encoder: PivotVisionModel) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        encoder.forward_features(image)
    assert "\n" not in str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_config_of_fewer_layers_than_the_weights_is_refused(kind: str, tmp_path: Path) -> None:
    folder = make_vision(tmp_path / kind, kind)
    if ORIGINALS[kind].towers:
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        change_config(folder, vision_config={**vision, "num_hidden_layers": 2})
    else:
        change_config(folder, num_hidden_layers=2, out_features=None, out_indices=None, stage_names=None)
    with pytest.raises(CheckpointError, match=r"weights of the encoder are not used .* fewer layers than the weights"):
        read_encoder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers of 10000000 in config.json is not a number from 1 to 1000"),
        ({"patch_size": 0}, "patch_size of 0 in config.json"),
        ({"patch_size": 64}, "patches of 64 px in config.json are larger than images of 32 px"),
        ({"image_size": 10**6}, "image_size of 1000000"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"pivot": {"feature_layer": -5}}, "feature layer -5: the encoder has 3 layers; give -4 to 3"),
        ({"pivot": {"feature_layer": [-2, -1]}}, r"feature layer \[-2, -1\]: features of several layers"),
        ({"pivot": {"prefix_tokens": 10**9}}, "prefix_tokens of 1000000000 in config.json: siglip_vision_model has 0"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}, "'own' is not supported; the code that it brings"),
        (
            {"image_token_id": 5, "model_type": "gemma3"},
            r"is an MLLM \(gemma3\), not an encoder; take .*`pivot extract",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_allocated(
    changes: dict[str, Any], message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked whether to run code"))
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *args, **options: pytest.fail("weights were read"))
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    change_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_encoder(copy)


def test_a_processor_of_huge_images_is_refused(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    processor["size"] = {"height": 60_000, "width": 60_000}
    (copy / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match=r"images of 60000 px in preprocessor_config\.json"):
        read_encoder(copy)


def test_altered_weights_of_ours_are_never_used(encoder: PivotVisionModel, tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repository", encoder)
    read_encoder(folder, dtype=torch.bfloat16, feature_layer=-1)
    weights = load_file(folder / "model.safetensors")
    key = next(k for k in weights if k.endswith("layers.0.mlp.fc1.weight"))
    save_file({**weights, key: weights[key] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(CheckpointError, match="differ from the golden vectors"):
            read_encoder(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(GatedRepoError, "access to it must be asked for; .*hf auth login"), (RepositoryNotFoundError, "it is private")],
)
def test_repositories_behind_a_login_are_named(kind: type[Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/x"))
        try:
            raise kind("401 Client Error", response=response)
        except kind as error:
            raise OSError("You are trying to access a gated repo.\nMake sure") from error

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", fail)
    with pytest.raises(CheckpointError, match=message):
        read_encoder("facebook/dinov3-vitb16-pretrain-lvd1689m")


@torch.no_grad()
def test_attentions_need_eager_attention(encoder: PivotVisionModel) -> None:
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        encoder(torch.zeros(1, 3, IMAGE_PX, IMAGE_PX), output_attentions=True)


@torch.no_grad()
def test_an_encoder_survives_pickle_and_small_shards(encoder: PivotVisionModel, source: Path, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, IMAGE_PX, IMAGE_PX)
    expected = encoder(pixels).last_hidden_state
    copy = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(copy(pixels).last_hidden_state, expected)
    assert torch.equal(encoder(pixels).last_hidden_state, expected)
    encoder.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(PivotVisionModel.from_pretrained(tmp_path / "shards")(pixels).last_hidden_state, expected)
    native, info = AutoModel.from_pretrained(tmp_path / "shards", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(native(pixels, output_hidden_states=True).hidden_states[-2], expected)
    backbone = PivotVisionBackbone.from_pretrained(source, out_indices=[1, 3])
    backbone.save_pretrained(tmp_path / "backbone")
    assert PivotVisionBackbone.from_pretrained(tmp_path / "backbone").out_indices == [1, 3]
    config = AutoConfig.from_pretrained(tmp_path / "backbone", trust_remote_code=False)
    assert config.model_type == "siglip_vision_model"
    assert PivotVisionConfig.from_pretrained(tmp_path / "backbone").pivot["feature_layer"] == -2
