"""Encoder repositories: three loading paths give features equal bit for bit, and a flipped bit is detected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, SiglipVisionModel
from typer.testing import CliRunner

from pivot_hub import PivotVisionConfig, PivotVisionModel, extract_encoder
from pivot_hub.cli import app
from pivot_hub.encoder.repository import read_encoder, verify_repository, write_repository
from pivot_hub.errors import CheckpointError, OutputError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.provenance import write_manifest
from tests.encoder.originals import IMAGE_PX, ORIGINALS, SIZES, make_vision


@pytest.fixture(scope="module")
def repository(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_encoder(trained / "3-dpo", tmp_path_factory.mktemp("hub") / "pivot" / "tiny-dpo")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_features_equal_those_inside_the_mllm_bit_for_bit(
    repository: Path, trained: Path, pixels: torch.Tensor
) -> None:
    mllm, _ = load_mllm(trained / "3-dpo")
    entered = []
    mllm.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    mllm.eval().model.get_image_features(pixels)
    native = AutoModel.from_pretrained(repository)
    ours = PivotVisionModel.from_pretrained(repository)
    remote = AutoModel.from_pretrained(repository, trust_remote_code=True)
    assert type(native) is SiglipVisionModel
    assert type(remote).__name__ == "PivotVisionModel"
    assert "transformers_modules" in type(remote).__module__
    assert torch.equal(native(pixels, output_hidden_states=True).hidden_states[-2], entered[0])
    assert torch.equal(ours(pixels).last_hidden_state, entered[0])
    assert torch.equal(remote(pixels).last_hidden_state, entered[0])


def test_processor_equals_the_mllms(repository: Path, trained: Path) -> None:
    image = Image.effect_noise((70, 50), 80).convert("RGB")
    _, processor = load_mllm(trained / "3-dpo")
    alone = AutoImageProcessor.from_pretrained(repository, backend="pil")
    a, b = (p(images=image, return_tensors="pt")["pixel_values"] for p in (alone, processor.image_processor))
    assert torch.equal(a, b)


def test_weights_are_under_the_keys_of_the_original_hub_checkpoint(repository: Path) -> None:
    keys = load_file(repository / "model.safetensors").keys()
    assert "vision_model.embeddings.patch_embedding.weight" in keys
    assert all(k.startswith("vision_model.") for k in keys)
    assert set(load_file(repository / "projector.safetensors")) == {
        f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


def test_config_and_provenance_record_the_origin(repository: Path) -> None:
    pivot = json.loads((repository / "config.json").read_text())["pivot"]
    assert pivot["stage"] == "dpo"
    assert pivot["feature_layer"] == -2
    assert pivot["base_model"] == "base/vision"
    provenance = json.loads((repository / "provenance.json").read_text())
    assert pivot["recipe_sha256"] == provenance["mllm"]["recipe_sha256"]
    lineage, step = [], provenance["mllm"]
    while step:
        lineage.append(step["stage"])
        step = (step.get("parent") or {}).get("provenance")
    assert lineage == ["dpo", "instruct", "align"]


def test_no_published_file_contains_a_local_path(repository: Path) -> None:
    home = str(Path.home())
    for file in repository.rglob("*"):
        if file.suffix in (".json", ".yaml", ".py", ".jsonl"):
            text = file.read_text()
            assert home not in text
            assert str(repository.parent) not in text
            assert "/tmp/" not in text


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_every_backbone_is_written_under_keys_plain_automodel_reads(
    kind: str, pixels: torch.Tensor, tmp_path: Path
) -> None:
    model, _ = read_encoder(make_vision(tmp_path / "original", kind))
    folder = write_repository(tmp_path / "written", model)
    assert verify_repository(folder) == []
    native, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(native).__name__ == ORIGINALS[kind].native
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = native(pixels, output_hidden_states=True).hidden_states[-2][:, ORIGINALS[kind].prefix_tokens :]
    assert torch.equal(tokens, model(pixels).last_hidden_state)
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(remote(pixels).last_hidden_state, model(pixels).last_hidden_state)
    prefixed = kind in ("siglip", "siglip2", "clip")
    assert all(k.startswith("vision_model.") == prefixed for k in load_file(folder / "model.safetensors"))


def test_an_encoder_without_image_processor_is_not_written(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    native = SiglipVisionModel(SiglipVisionConfig(**SIZES))
    with pytest.raises(CheckpointError, match="has no image processor; set its image_processor to a Siglip"):
        write_repository(tmp_path / "out", PivotVisionModel(PivotVisionConfig(native.config), native))
    assert list(tmp_path.iterdir()) == []


def _flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


FILES = [
    "config.json",
    "configuration_pivot.py",
    "golden.safetensors",
    "model.safetensors",
    "modeling_pivot.py",
    "native_resolution.py",
    "preprocessor_config.json",
    "projector.safetensors",
    "provenance.json",
    "recipe.yaml",
]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected_in_every_file(repository: Path, tmp_path: Path, name: str) -> None:
    assert sorted(f.name for f in repository.iterdir()) == FILES
    size = (repository / name).stat().st_size
    for offset in (0, size // 3, size // 2, size - 1):
        copy = Path(shutil.copytree(repository, tmp_path / str(offset)))
        _flip_bit(copy / name, offset)
        problems = verify_repository(copy)
        assert len(problems) == 1, offset
        assert name in problems[0]
    assert verify_repository(repository) == []


def test_missing_extra_and_pickled_files_are_detected(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    (copy / "recipe.yaml").unlink()
    (copy / "notes.txt").write_text("x")
    (copy / "weights.bin").write_bytes(b"x")
    problems = " ".join(verify_repository(copy))
    for message in ("recipe.yaml is missing", "notes.txt is not expected", "weights.bin is a pickle"):
        assert message in problems


def test_golden_vectors_detect_changed_weights_whose_checksum_is_right(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    provenance = json.loads((copy / "provenance.json").read_text())
    _flip_bit(copy / "model.safetensors", -2)  # a high bit of the last weight's exponent
    weights = load_file(copy / "model.safetensors")
    from safetensors.torch import save_file

    name = next(k for k in weights if k.endswith("layers.0.mlp.fc1.weight"))
    weights[name] = weights[name] * 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    write_manifest(copy, {k: v for k, v in provenance.items() if k not in ("files", "sha256")})
    assert any("golden vectors" in p for p in verify_repository(copy))


def test_extracting_again_replaces_an_encoder_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    for stage in ("3-sft", "3-dpo"):
        extract_encoder(trained / stage, target)
        assert json.loads((target / "config.json").read_text())["pivot"]["stage"] == stage[2:]
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]
    stage_copy = Path(shutil.copytree(trained / "3-sft", tmp_path / "stage"))
    (target / "thesis.tex").write_text("ten years")
    for folder, named in ((target, "thesis.tex"), (stage_copy, "chat_template.jinja")):
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        with pytest.raises(OutputError, match=f"holds {named}, which is not part of an encoder repository"):
            extract_encoder(trained / "3-dpo", folder)
        assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_a_folder_that_is_not_a_checkpoint_is_refused_and_nothing_is_written(parts: Path, tmp_path: Path) -> None:
    for source in (parts / "vision", parts / "language", tmp_path / "nothing"):
        with pytest.raises(CheckpointError):
            extract_encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAVED = "written by save_pretrained, which writes no checksums"


def test_what_is_not_a_repository_is_named(repository: Path, trained: Path, tmp_path: Path) -> None:
    PivotVisionModel.from_pretrained(repository).save_pretrained(tmp_path / "saved")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    for folder, message in (
        (make_vision(tmp_path / "original"), "is a siglip_vision_model model that pivot_hub did not write"),
        (tmp_path / "saved", SAVED),
        (tmp_path / "photos", "holds 1 images and no model"),
        (tmp_path / "absent", "there is no such folder"),
        (trained / "3-dpo", "is an MLLM (llava), not an encoder; take its encoder out with `pivot extract"),
    ):
        problems = verify_repository(folder)
        assert len(problems) == 1
        assert message in problems[0]


def test_files_of_git_and_of_the_hubs_client_are_passed_over(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    names = (".git/HEAD", ".cache/huggingface/download/x.lock", ".DS_Store", "__pycache__/a.pyc", ".gitattributes")
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    result = CliRunner().invoke(app, ["verify", str(copy)])
    assert result.exit_code == 0, result.output
    assert f"{len(names)} files of git, the Hub's client or a file manager passed over" in result.output
    assert "A hash is no signature" in result.output


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


STRANGERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (
        lambda f: (f / "modeling_pivot.py").open("a").write("import os\n"),
        "modeling_pivot.py is not the code",
    ),
    "pickle": (_write("pytorch_model.bin", "x"), "pytorch_model.bin is a pickle"),
    "module": (_write("evil.py", "x"), "evil.py is not a kind of file"),
    "adapter": (_write("adapter_config.json", "{}"), "adapter_config.json is not a kind of file"),
    "link": (lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "notes.txt is a link out of the repository"),
    "folder link": (lambda f: (f / "results").symlink_to("/etc"), "results is a link out of the repository"),
    "auto_map": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"modeling_pivot.', '"stranger/x--modeling_pivot.')
        ),
        "config.json points at code that is not the repository's own",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_change_is_detected_under_a_right_manifest(name: str, repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    change, message = STRANGERS[name]
    change(copy)
    provenance = json.loads((copy / "provenance.json").read_text())
    write_manifest(copy, {k: v for k, v in provenance.items() if k not in ("files", "sha256")})
    assert any(message in problem for problem in verify_repository(copy))
