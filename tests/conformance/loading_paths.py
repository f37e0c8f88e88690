"""Opens every door of encoder repositories with whatever software this Python has; nothing of ours is imported.

`python doors.py REPOSITORIES OUT.json [--package]` runs in an environment of its own. For each door of each repository
it writes the largest difference to the features the repository was written from, or the error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("torchvision"):
    # PyPI's torchvision holds CUDA kernels only. timm uses its Python parts, which need the operators' names to import.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

Golden = dict[str, torch.Tensor]
Seen = tuple[float, str]  # the largest difference of a feature, and the class that made it
PACKAGES = ("torch", "transformers", "timm", "torchvision", "pillow", "safetensors", "huggingface_hub")


def native(repo: str, golden: Golden) -> Seen:
    """Plain AutoModel, no remote code."""
    model, info = AutoModel.from_pretrained(repo, output_loading_info=True)
    keys = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + list(info["mismatched_keys"])
    if keys:
        raise ValueError(f"{len(keys)} keys missing, unexpected or of another shape: {keys[0]}")
    pivot = model.config.pivot
    hidden = model.eval()(golden["pixel_values"], output_hidden_states=True).hidden_states[pivot["feature_layer"]]
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, pivot["prefix_tokens"] :]
    return difference(tokens, golden["last_hidden_state"]), type(model).__name__


def remote(repo: str, golden: Golden) -> Seen:
    """The code that lies in the repository; also on a picture, through its own processor."""
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    return ours(model, golden)


def package(repo: str, golden: Golden) -> Seen:
    """The installed package."""
    from pivot_hub import PivotVisionModel

    return ours(PivotVisionModel.from_pretrained(repo), golden)


def llava(repo: str, golden: Golden) -> Seen:
    """LLaVA's classes built around the repository's config, with its weights: what enters the projector."""
    vision = AutoConfig.from_pretrained(repo)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = AutoConfig.for_model("qwen2", **text, num_key_value_heads=2, vocab_size=99)
    prefix = vision.pivot["prefix_tokens"]
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        vision_feature_layer=vision.pivot["feature_layer"],
        vision_feature_select_strategy="default" if prefix else "full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(AutoModel.from_pretrained(repo).state_dict())
    entered: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    model.model.get_image_features(
        golden["pixel_values"],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    # LLaVA drops CLS only; registers go on to the language head.
    return difference(entered[0][:, max(prefix - 1, 0) :], golden["last_hidden_state"]), type(model).__name__


def ours(model: Any, golden: Golden) -> Seen:
    tokens = model(golden["pixel_values"]).last_hidden_state
    picture = Image.fromarray(golden["picture"].numpy())
    seen = model.forward_features([picture]).last_hidden_state
    worst = max(difference(tokens, golden["last_hidden_state"]), difference(seen, golden["picture_features"]))
    return worst, type(model).__name__


def difference(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return (made.float() - wanted).abs().max().item()


def main() -> None:
    doors = [native, remote, llava] + ([package] if "--package" in sys.argv else [])
    results: dict[str, dict[str, Any]] = {}
    for repo in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
        golden = load_file(repo / "golden.safetensors")
        golden |= load_file(repo.with_suffix(".safetensors"))
        results[repo.name] = {}
        for door in doors:
            try:
                with torch.no_grad():
                    off, kind = door(str(repo), golden)
                results[repo.name][door.__name__] = {"difference": off, "class": kind}
            except Exception as error:  # reported, and judged by the test
                results[repo.name][door.__name__] = {"error": f"{type(error).__name__}: {error}"}
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
