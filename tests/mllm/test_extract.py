"""Taking an encoder out of anyone's MLLM: what is read of it, what is recorded, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot_hub import PivotVisionModel, diff_towers, extract_encoder
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.errors import CheckpointError, PivotError
from pivot_hub.mllm.load import load_llava
from pivot_hub.mllm.weight_files import INDEX, WeightFiles
from pivot_hub.probes.run import probe_encoder
from tests.mllm.tiny_mllms import TINY, make_mllm
from tests.publish.hub_server import hub_server

CARD = """---
license: other
license_name: tiny-license
license_link: https://example.org/license
base_model: example/base
---
A model.
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose weights are in several files; those of the language model are most of them."""
    folder = tmp_path_factory.mktemp("llava") / "tiny-llava"
    model = make_mllm(folder, "llava")
    (folder / "model.safetensors").unlink()
    model.model.language_model.resize_token_embeddings(40_000, mean_resizing=False)
    model.config.text_config.vocab_size = 40_000
    model.save_pretrained(folder, max_shard_size="3MB")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def python(code: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def shard_of(folder: Path, part: str) -> Path:
    """Return the file that holds the first tensor whose name contains `part`."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / next(file for key, file in index.items() if part in key)


def test_of_a_sharded_checkpoint_on_the_hub_only_the_towers_bytes_are_read(source: Path, tmp_path: Path) -> None:
    with hub_server(tmp_path / "hub") as server:
        client = server.environment(tmp_path / "home")
        upload = "api.create_repo(name); api.upload_folder(repo_id=name, folder_path=sys.argv[1])"
        code = f"import sys; from huggingface_hub import HfApi; api, name = HfApi(), 'ada/tiny-llava'; {upload}"
        python(code, str(source), env=client)
        commit = server.store.repos["model", "ada/tiny-llava"].commit_at("main").oid
        server.log.clear()
        done = python(
            "from pivot_hub import cli; cli.main()", "extract", "ada/tiny-llava", str(tmp_path / "encoder"), env=client
        )
        requests = [(m, p, s) for m, p, s in server.log if p.endswith(".safetensors") and m == "GET"]
    read, total = map(float, re.findall(r"read ([\d.]+) MB of the checkpoint's ([\d.]+) MB", done.stdout)[0])
    assert total > 5
    assert read < 0.5
    vision = {shard_of(source, part).name for part in ("vision_tower", "multi_modal_projector")}
    assert {path.rpartition("/")[2] for _, path, _ in requests} == vision
    assert {status for _, _, status in requests} <= {206, 302, 307}
    cached = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.stat().st_size > 1_000_000]
    assert cached == []  # nothing large was downloaded
    assert verify_repository(tmp_path / "encoder") == []
    provenance = json.loads((tmp_path / "encoder" / "provenance.json").read_text())
    assert provenance["source"]["name"] == "ada/tiny-llava"
    assert provenance["source"]["revision"] == commit
    assert provenance["commands"] == ["pivot extract ada/tiny-llava encoder"]


def test_the_source_and_its_licence_are_recorded_without_a_path(source: Path, tmp_path: Path) -> None:
    repository = extract_encoder(source, tmp_path / "encoder")
    text = (repository / "provenance.json").read_text()
    recorded = json.loads(text)["source"]
    assert recorded["name"] == "tiny-llava"
    assert (recorded["license"], recorded["license_name"]) == ("other", "tiny-license")
    assert recorded["license_link"] == "https://example.org/license"
    assert recorded["base_model"] == "example/base"
    assert len(recorded["tower_sha256"]) == 64
    assert str(source.parent) not in text
    assert PivotVisionModel.from_pretrained(repository).config.pivot["base_model"] == "tiny-llava"


def test_weights_stay_in_their_type(tmp_path: Path) -> None:
    """A tower in bfloat16 is written in bfloat16; its features are those of the same values in float32."""
    make_mllm(tmp_path / "model", "qwen3_vl", lambda model: model.to(torch.bfloat16))
    repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
    stored = load_file(repository / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert verify_repository(repository) == []


def test_norms_of_another_type_keep_their_values(tmp_path: Path) -> None:
    def mix(model: Any, change: float) -> None:
        model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "layer_norm1.weight" in name:
                parameter.data = parameter.data.float() + change

    make_mllm(tmp_path / "before", "llava", lambda model: mix(model, 0.0))
    make_mllm(tmp_path / "model", "llava", lambda model: mix(model, 1e-4))
    repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
    weights = load_file(repository / "model.safetensors")
    norm = next(w for k, w in weights.items() if "layer_norm1.weight" in k)
    assert norm[0].item() == pytest.approx(1.0001, abs=1e-7)
    diff = diff_towers(tmp_path / "before", tmp_path / "model")
    assert not diff.frozen
    assert diff.changed_blocks == 3
    assert diff_towers(tmp_path / "model", repository).frozen


@pytest.mark.parametrize(
    ("name", "legacy"),
    [
        ("idefics3", "idefics3"),
        ("smolvlm", "smolvlm"),
        ("glm4v", "glm4v"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("mllama", "mllama"),
    ],
)
def test_older_names_of_the_vision_config_are_understood(name: str, legacy: str, tmp_path: Path) -> None:
    make_mllm(tmp_path / "model", name)
    vision = json.loads((tmp_path / "model" / "config.json").read_text())["vision_config"]
    edit_config(tmp_path / "model", vision_config=vision | {"model_type": legacy})
    assert verify_repository(extract_encoder(tmp_path / "model", tmp_path / "encoder")) == []


def test_what_differs_from_the_mllm_is_recorded(tmp_path: Path) -> None:
    make_mllm(tmp_path / "clip", "llava")
    edit_config(tmp_path / "clip", vision_feature_select_strategy="full")
    make_mllm(tmp_path / "lfm", "lfm2_vl")
    for name, sentence in (
        ("clip", "The MLLM's projector also takes 1 prefix tokens, which the encoder leaves out."),
        ("lfm", "Images are resized by Siglip2ImageProcessor, not as by Lfm2VlImageProcessor of the MLLM."),
    ):
        repository = extract_encoder(tmp_path / name, tmp_path / f"{name}-encoder")
        assert sentence in json.loads((repository / "provenance.json").read_text())["source"]["notes"]


@pytest.mark.parametrize("vision_first", [True, False])
def test_older_names_of_the_tensors_are_understood(vision_first: bool, tmp_path: Path) -> None:
    """Checkpoints before transformers 5 name them `model.vision_tower.` or `vision_tower.vision_model.`."""
    make_mllm(tmp_path / "model", "llava")
    expected = extract_encoder(tmp_path / "model", tmp_path / "expected")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    old, new = ("vision_tower.", "vision_tower.vision_model.") if vision_first else ("", "model.")
    renamed = {k.replace(old, new, 1) if k.startswith("vision_tower.") else k: v for k, v in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
    assert (repository / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


# -- Bad input: one message with the remedy, and no output -----------------------------------------------------------


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def wrong_index(folder: Path) -> None:
    def swap(files: dict[str, str]) -> None:
        key = next(k for k in files if "vision_tower" in k)
        files[key] = next(f for f in files.values() if f != files[key])

    edit_index(folder, swap)


def cut_off(folder: Path) -> None:
    shard = shard_of(folder, "vision_tower")
    shard.write_bytes(shard.read_bytes()[:-1000])


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    shard = shard_of(folder, "vision_tower")
    weights = load_file(shard)
    change(weights)
    save_file(weights, shard, metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    change_weights(
        folder, lambda w: next(v for k, v in w.items() if "layers.2.mlp.fc1.weight" in k)[0].fill_(torch.nan)
    )


def bitsandbytes(folder: Path) -> None:
    def quantise(weights: dict[str, torch.Tensor]) -> None:
        key = next(k for k in weights if "layers.0.mlp.fc1.weight" in k)
        weights[key] = torch.zeros(weights[key].numel() // 2, 1, dtype=torch.uint8)

    change_weights(folder, quantise)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def fp8(folder: Path) -> None:
    def quantise(weights: dict[str, torch.Tensor]) -> None:
        key = next(k for k in weights if "layers.0.mlp.fc1.weight" in k)
        weights[key] = weights[key].to(torch.float8_e4m3fn)

    change_weights(folder, quantise)
    edit_config(folder, quantization_config={"quant_method": "fp8"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    shard = shard_of(folder, "vision_tower")
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def odd_type(folder: Path) -> None:
    edit_header(folder, lambda header: header[next(k for k in header if "vision_tower" in k)].update(dtype="F4"))


def overlap(folder: Path) -> None:
    def move(header: dict[str, Any]) -> None:
        first, second = [k for k in header if "layers.0.mlp.fc" in k and k.endswith("weight")][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        header[second]["shape"] = header[first]["shape"]

    edit_header(folder, move)


def folder_for_file(folder: Path) -> None:
    shard = shard_of(folder, "vision_tower")
    shard.unlink()
    shard.mkdir()


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "wrong index": (wrong_index, "which does not hold it; download both again"),
    "cut off": (cut_off, "download it again"),
    "missing file": (lambda f: shard_of(f, "vision_tower").unlink(), "is missing; the download stopped half-way"),
    "a folder in the place of a file": (folder_for_file, "is missing; the download stopped half-way"),
    "damaged index": (lambda f: (f / INDEX).write_text("{"), "model.safetensors.index.json is damaged"),
    "damaged header": (
        lambda f: shard_of(f, "vision_tower").write_bytes(b"\x20\0\0\0\0\0\0\0" + b"{" * 99),
        "the header of .* is damaged",
    ),
    "not finite": (not_finite, "not finite"),
    "bitsandbytes": (bitsandbytes, r"its vision tower is quantised \(bitsandbytes, .*dequantise it"),
    "fp8": (fp8, r"its vision tower is quantised \(fp8, "),
    "LoRA adapter": (adapter, "is a LoRA adapter, not a model; merge it"),
    "pickle": (pickled, "its weights are a pickle"),
    "several layers": (lambda f: edit_config(f, vision_feature_layer=[-2, -1]), "features of several layers"),
    "original InternVL": (
        lambda f: edit_config(f, model_type="internvl_chat", auto_map={"AutoModel": "x.Y"}),
        "brings code of its own that is not run; give the -hf repository",
    ),
    "code of its own": (
        lambda f: edit_config(f, model_type="own_vl", auto_map={"AutoConfig": "x.Y", "AutoModel": "x.Z"}),
        "is a own_vl model, which brings code of its own that is not run",
    ),
    "a type that torch does not have": (odd_type, "is quantised|a type that torch does not have"),
    "overlapping tensors": (overlap, "overlaps another tensor"),
    "a mean that is not finite": (
        lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [NaN, 0.5, 0.5]}'),
        "image_mean in preprocessor_config.json holds nan",
    ),
    "a deviation of 0": (
        lambda f: (f / "preprocessor_config.json").write_text('{"image_std": [0, 0.5, 0.5]}'),
        "image_std in preprocessor_config.json holds 0",
    ),
    "a preprocessor that is a list": (
        lambda f: (f / "preprocessor_config.json").write_text("[]"),
        "its image processor cannot be read",
    ),
    "language model": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2"}'),
        "is a qwen2 model, which is no MLLM of the table: LLaVA",
    ),
    "no image processor": (lambda f: (f / "preprocessor_config.json").unlink(), "its image processor cannot be read"),
    "a size": (
        lambda f: edit_config(
            f, vision_config=json.loads((f / "config.json").read_text())["vision_config"] | {"hidden_size": 10**9}
        ),
        "hidden_size of 1000000000",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_cannot_be_used_is_refused_with_its_remedy(name: str, copy: Path, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        extract_encoder(copy, tmp_path / "encoder")
    assert "\n" not in str(caught.value)
    assert [f for f in tmp_path.iterdir() if f.name != "model"] == []


def test_a_tower_in_fp8_is_dequantised(tmp_path: Path) -> None:
    make_mllm(tmp_path / "model", "qwen3_vl", lambda model: model.to(torch.bfloat16))
    expected = PivotVisionModel.from_pretrained(extract_encoder(tmp_path / "model", tmp_path / "expected"))
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    for key in [k for k, w in weights.items() if ".blocks." in k and w.dim() == 2]:
        scale = weights[key].float().abs().max() / 448
        weights[f"{key}_scale_inv"] = scale.reshape(1, 1)
        weights[key] = (weights[key].float() / scale).to(torch.float8_e4m3fn)
    save_file(weights, file, metadata={"format": "pt"})
    edit_config(tmp_path / "model", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
    assert verify_repository(repository) == []
    assert {t.dtype for t in load_file(repository / "model.safetensors").values()} == {torch.bfloat16}
    dequantised = PivotVisionModel.from_pretrained(repository)
    for key, weight in expected.state_dict().items():
        other = dequantised.state_dict()[key].float()
        assert (other - weight.float()).norm() <= 0.05 * weight.float().norm(), key


def test_a_quantised_language_model_is_no_obstacle(copy: Path, tmp_path: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "awq", "modules_to_not_convert": ["vision_tower"]})
    assert verify_repository(extract_encoder(copy, tmp_path / "encoder")) == []


def test_a_foreign_provenance_and_an_index_beside_one_file_mislead_nobody(tmp_path: Path) -> None:
    make_mllm(tmp_path / "model", "llava")
    (tmp_path / "model" / "provenance.json").write_text("{}")
    (tmp_path / "model" / INDEX).write_text('{"weight_map": {"x": "other.safetensors"}}')
    repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
    assert "source" in json.loads((repository / "provenance.json").read_text())


def test_paths_of_a_card_are_not_recorded(tmp_path: Path) -> None:
    make_mllm(tmp_path / "model", "llava")
    for base, name in (("~/private/base", "base"), ("../bob/private/m", "m"), ("C:\\Users\\bob\\m", "m")):
        card = f"---\nlicense: other\nlicense_link: /home/bob/LICENSE\nbase_model: '{base}'\n---\n"
        (tmp_path / "model" / "README.md").write_text(card)
        repository = extract_encoder(tmp_path / "model", tmp_path / "encoder")
        text = (repository / "provenance.json").read_text()
        assert json.loads(text)["source"]["base_model"] == name
        assert "bob" not in text
        assert "private" not in text


def test_an_encoder_is_not_extracted_again(source: Path, tmp_path: Path) -> None:
    repository = extract_encoder(source, tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"is an encoder \(clip_vision_model\) already; load it with"):
        extract_encoder(repository, tmp_path / "again")


def test_a_name_that_nothing_answers_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        extract_encoder("nobody/nothing", tmp_path / "encoder")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "mllama"])
def test_an_mllm_in_an_encoders_place_is_sent_to_extract(name: str, tmp_path: Path) -> None:
    assert name in TINY
    make_mllm(tmp_path / "model", name)
    command = re.escape(f"`pivot extract {tmp_path / 'model'} OUTPUT`")
    message = rf"is an MLLM \({name}\), not an encoder; take its encoder out with {command}"
    for use in (lambda f: PivotVisionModel.from_pretrained(f), lambda f: probe_encoder(str(f))):
        with pytest.raises((ValueError, PivotError), match=message):
            use(tmp_path / "model")
    assert re.search(message, verify_repository(tmp_path / "model")[0])
    with pytest.raises(CheckpointError, match=f"{name} model, an MLLM, but not of LLaVA's classes.*{command}"):
        load_llava(tmp_path / "model")


def test_headers_alone_are_read_to_list_a_folder(source: Path) -> None:
    files = WeightFiles(source)
    keys = files.keys()
    assert any("vision_tower" in key for key in keys)
    assert files.bytes_read == 0
    files.describe([key for key in keys if "vision_tower" in key])
    assert 0 < files.bytes_read < 100_000
