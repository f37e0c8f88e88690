"""The card of an encoder that was taken out of somebody else's MLLM, from its extraction to what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from pivot_hub import extract_encoder
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.errors import CardError
from pivot_hub.publish.card_inputs import read_metadata, read_prose
from pivot_hub.publish.extracted_card import choose_prose
from pivot_hub.publish.pull import published_problems
from pivot_hub.publish.staging import stage_encoder, write_card
from tests.local_server.card_rules import metadata_problems
from tests.mllm.tiny_mllms import make_mllm
from tests.publish.hub_commands import run
from tests.publish.publishable import make_results

LICENSED = "---\nlicense: apache-2.0\nbase_model: {base}\n---\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    make_mllm(folder, "qwen2_5_vl")
    return folder


def tuned(base: Path, folder: Path, moved: bool) -> Path:
    """Write a model after training, whose tower moved in one block or did not."""

    def train(model: torch.nn.Module) -> None:
        model.get_parameter("lm_head.weight").data.add_(1)
        if moved:
            model.get_parameter("model.visual.blocks.1.mlp.gate_proj.weight").data.add_(0.1)

    make_mllm(folder, "qwen2_5_vl", train)
    (folder / "README.md").write_text(LICENSED.format(base=base))
    return folder


@pytest.mark.parametrize(
    ("moved", "sentence"),
    [
        (False, "The vision tower of tuned is frozen: all 3 blocks are equal to those of base, so this is the encoder"),
        (True, "Compared with base, 1 of 3 blocks differ; the relative change of all weights is "),
    ],
)
def test_a_card_says_whether_the_vision_tower_moved(base: Path, moved: bool, sentence: str, tmp_path: Path) -> None:
    repository = extract_encoder(tuned(base, tmp_path / "tuned", moved), tmp_path / "encoder")
    assert run(["card", str(repository), "--repository", "ada/encoder"])["code"] == 0
    text = (repository / "README.md").read_text()
    assert sentence in text
    assert str(tmp_path) not in text
    assert metadata_problems(text, "model") == ([], [])
    card = ModelCard(text, ignore_metadata_errors=False)
    assert (card.data.get("license"), card.data.get("pipeline_tag")) == ("apache-2.0", "image-feature-extraction")
    assert "one map (H, W, 32) for each image" in text
    assert verify_repository(repository) == []
    assert published_problems(repository) == []


def test_an_extracted_encoder_is_staged_with_its_results(base: Path, tmp_path: Path) -> None:
    repository = extract_encoder(tuned(base, tmp_path / "tuned", True), tmp_path / "encoder")
    prose = choose_prose(repository, None, "ada/encoder")
    results = make_results("encoder", read_metadata(repository).encoder_sha256, 50.0)
    assert write_card(repository, prose, "ada/encoder", {"encoder": results})
    text = (repository / "README.md").read_text()
    assert "| **encoder** (this) |" in text
    assert published_problems(repository) == []
    with stage_encoder(repository, "ada/encoder", prose, log=lambda line: None) as publication:
        assert publication.tag == "v1.0.0"
        assert (publication.folder / "README.md").is_file()
    damaged = text.replace("value: 50.0", "value: 60.0")
    assert damaged != text
    (repository / "README.md").write_text(damaged)
    assert any("README.md" in problem for problem in published_problems(repository))


def test_an_unknown_licence_is_asked_for(base: Path, tmp_path: Path) -> None:
    repository = extract_encoder(base, tmp_path / "encoder")
    with pytest.raises(CardError, match="the licence of base is not known, because its card states none; give a file"):
        choose_prose(repository, None)
    prose = tmp_path / "mine.yaml"
    prose.write_text("repository: ada/encoder\nversion: 0.1.0\nabout: An encoder.\nlicense: mit\n")
    assert write_card(repository, read_prose(prose))
    text = (repository / "README.md").read_text()
    assert "An encoder." in text
    assert "license: mit" in text
    assert "Its weights were not compared with those of a base model: its card names no base model." in text
    source = json.loads((repository / "provenance.json").read_text())["source"]
    assert source["license"] is None
