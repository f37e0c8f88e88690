"""Published parts by name, without their weights: their sizes, and the MLLM that two configs describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from pivot_hub.encoder.configuration_pivot import native_config
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.joined_families import image_tokens
from pivot_hub.mllm.published_configs import (
    meta_mllm,
    meta_model,
    part_config,
    published_mllms,
    published_parts,
    whole_config,
)
from tests.conftest import make_language
from tests.encoder.originals import IMAGE_PX, ORIGINALS, make_vision

# Relative tolerances: So400m has 428M parameters without its pooling head, and the 1B of giant are 1.13B.
TOLERANCES = {"400M": 0.04, "1B": 0.15}


def number(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


def last_digit(text: str) -> float:
    """One unit of the last published digit, because published numbers may be rounded or truncated."""
    digits = text[:-1].partition(".")[2]
    return float(10 ** -len(digits)) * number(f"1{text[-1]}")


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of a language model, or of a vision tower without its pooling head."""
    is_language = hasattr(config, "vocab_size")
    with torch.device("meta"):
        model = (AutoModelForCausalLM if is_language else AutoModel).from_config(config)
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("head.", "pooler.")))


@pytest.mark.parametrize("name", published_parts())
def test_a_published_part_has_its_published_size(name: str) -> None:
    published = published_parts()[name]["parameters"]
    tolerance = TOLERANCES.get(published, 0) * number(published) or last_digit(published)
    assert count_parameters(part_config(name)) == pytest.approx(number(published), abs=tolerance)
    assert published_parts()[name]["licence"]


@pytest.mark.parametrize("name", published_mllms())
def test_a_published_mllm_has_its_published_size(name: str) -> None:
    """The Hub's count of parameters is of the stored weights, without lm_head where it is the embeddings."""
    published = published_mllms()[name]["parameters"]
    count = sum(p.numel() for p in meta_model(whole_config(name)).parameters())
    assert count == pytest.approx(number(published), abs=last_digit(published))
    assert published_mllms()[name]["licence"]


def test_all_parts_of_the_paper_are_listed() -> None:
    names = list(published_parts())
    assert len(names) == 15
    assert sum("siglip2" in n for n in names) == sum("Qwen2.5" in n for n in names) == 4


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("google/siglip2-so400m-patch16-384", 576),
        ("google/siglip-so400m-patch14-384", 729),
        ("openai/clip-vit-large-patch14-336", 576),
        ("facebook/vit-mae-large", 196),
    ],
)
def test_an_image_has_the_tokens_of_its_patches(name: str, tokens: int) -> None:
    assert image_tokens(part_config(name)) == tokens


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_meta_model_is_the_model_that_is_built(kind: str, tmp_path: Path) -> None:
    """Both have the same weights and the same number of image tokens, for every architecture."""
    make_vision(tmp_path / "vision", kind)
    make_language(tmp_path / "language")
    real, _ = build_mllm(str(tmp_path / "vision"), str(tmp_path / "language"))
    vision = part_config(str(tmp_path / "vision"))
    meta = meta_mllm(vision, part_config(str(tmp_path / "language")), -2)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())
    features = torch.stack(
        list(real.model.get_image_features(torch.rand(1, 3, IMAGE_PX, IMAGE_PX), return_dict=True).pooler_output)
    )
    assert features.shape[1] == image_tokens(vision) == meta.config.image_seq_length


def test_a_two_tower_config_gives_its_vision_tower(tmp_path: Path) -> None:
    make_vision(tmp_path, "siglip2")
    assert AutoConfig.from_pretrained(tmp_path).model_type == "siglip"
    assert part_config(str(tmp_path)).model_type == "siglip_vision_model"
    assert part_config("facebook/vit-mae-large").model_type == "vit"
    assert native_config(part_config("facebook/dinov2-large")).hidden_size == 1024


def test_an_unknown_part_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="connect to the Hub, or give one of: google/siglip2-base"):
        part_config("nobody/nothing")
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        part_config("Qwen/Qwen2.5-7B-Instruct", revision="0" * 40)
