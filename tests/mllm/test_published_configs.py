"""Published parts by name, without their weights: their sizes, and the model they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from pivot_hub.encoder.configuration_pivot import native_config
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.published_configs import image_tokens, meta_mllm, part_config, published_parts
from tests.conftest import make_language
from tests.encoder.originals import IMAGE_PX, ORIGINALS, make_vision

# So400m is a name for 428M less its pooling head, and g's 1B stands for 1.13B.
ROUGH = {"400M": 0.04, "1B": 0.15}


def number(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


def last_digit(text: str) -> float:
    """A unit of the last digit that was published: some figures are rounded, some cut."""
    digits = text[:-1].partition(".")[2]
    return float(10 ** -len(digits)) * number(f"1{text[-1]}")


def counted(config: PreTrainedConfig) -> int:
    """Parameters of a language model, or of a tower without what pools its tokens."""
    is_language = hasattr(config, "vocab_size")
    with torch.device("meta"):
        model = (AutoModelForCausalLM if is_language else AutoModel).from_config(config)
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("head.", "pooler.")))


@pytest.mark.parametrize("name", published_parts())
def test_a_published_part_has_its_published_size(name: str) -> None:
    published = published_parts()[name]["parameters"]
    tolerance = ROUGH.get(published, 0) * number(published) or last_digit(published)
    assert counted(part_config(name)) == pytest.approx(number(published), abs=tolerance)
    assert published_parts()[name]["licence"]


def test_there_are_all_parts_of_the_paper() -> None:
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
    """Of every architecture: the same weights and the same image tokens."""
    make_vision(tmp_path / "vision", kind)
    make_language(tmp_path / "language")
    real, _ = build_mllm(str(tmp_path / "vision"), str(tmp_path / "language"))
    vision = part_config(str(tmp_path / "vision"))
    made = meta_mllm(vision, part_config(str(tmp_path / "language")), -2)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in made.parameters())
    features = torch.stack(
        list(real.model.get_image_features(torch.rand(1, 3, IMAGE_PX, IMAGE_PX), return_dict=True).pooler_output)
    )
    assert features.shape[1] == image_tokens(vision) == made.config.image_seq_length


def test_a_two_tower_config_gives_its_vision_tower(tmp_path: Path) -> None:
    make_vision(tmp_path, "siglip2")
    assert AutoConfig.from_pretrained(tmp_path).model_type == "siglip"
    assert part_config(str(tmp_path)).model_type == "siglip_vision_model"
    assert part_config("facebook/vit-mae-large").model_type == "vit"
    assert native_config(part_config("facebook/dinov2-large")).hidden_size == 1024


def test_a_part_that_is_nowhere_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="connect to the Hub, or give one of: google/siglip2-base"):
        part_config("nobody/nothing")
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        part_config("Qwen/Qwen2.5-7B-Instruct", revision="0" * 40)
