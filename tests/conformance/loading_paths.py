"""Load encoder repositories by every loading path with whatever software this Python has; nothing of ours is imported.

`python loading_paths.py REPOSITORIES OUT.json [--package]` runs in a separate environment. For each loading path of
each repository it writes the largest difference from the features stored with the repository, or the error.
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
    # PyPI's torchvision holds CUDA kernels only. timm uses its Python modules, whose import needs the operators' names.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

Golden = dict[str, torch.Tensor]
Outcome = tuple[float, str]  # the largest difference of a feature, and the name of the loaded class
PACKAGES = ("torch", "transformers", "timm", "torchvision", "pillow", "safetensors", "huggingface_hub")


def native(repo: str, golden: Golden) -> Outcome:
    """Load with plain AutoModel, without remote code."""
    model, info = AutoModel.from_pretrained(repo, output_loading_info=True)
    keys = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + list(info["mismatched_keys"])
    if keys:
        raise ValueError(f"{len(keys)} keys missing, unexpected or of another shape: {keys[0]}")
    pivot = model.config.pivot
    hidden = model.eval()(golden["pixel_values"], output_hidden_states=True).hidden_states[pivot["feature_layer"]]
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, pivot["prefix_tokens"] :]
    return difference(tokens, golden["last_hidden_state"]), type(model).__name__


def remote(repo: str, golden: Golden) -> Outcome:
    """Load with the code that the repository contains, and also encode an image with the repository's processor."""
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    return compare_pivot_model(model, golden)


def package(repo: str, golden: Golden) -> Outcome:
    """Load with the installed package, and also encode an image."""
    from pivot_hub import PivotVisionModel

    return compare_pivot_model(PivotVisionModel.from_pretrained(repo), golden)


def llava(repo: str, golden: Golden) -> Outcome:
    """Build LLaVA around the repository's config, load its weights, and compare the features before the projector."""
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
    projector_inputs: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, inputs: projector_inputs.append(inputs[0])
    )
    model.model.get_image_features(
        golden["pixel_values"],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    # LLaVA drops the CLS token only, so register tokens reach the projector and are cut off here.
    tokens = projector_inputs[0][:, max(prefix - 1, 0) :]
    return difference(tokens, golden["last_hidden_state"]), type(model).__name__


def compare_pivot_model(model: Any, golden: Golden) -> Outcome:
    """Compare a PivotVisionModel's features of the golden pixels and of the image with those stored."""
    tokens = model(golden["pixel_values"]).last_hidden_state
    image = Image.fromarray(golden["image"].numpy())
    image_tokens = model.forward_features([image]).last_hidden_state
    largest = max(
        difference(tokens, golden["last_hidden_state"]),
        difference(image_tokens, golden["image_features"]),
    )
    return largest, type(model).__name__


def difference(features: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    return (features.float() - expected).abs().max().item()


def main() -> None:
    loading_paths = [native, remote, llava]
    if "--package" in sys.argv:
        loading_paths.append(package)
    results: dict[str, dict[str, Any]] = {}
    for repo in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
        golden = load_file(repo / "golden.safetensors")
        golden |= load_file(repo.with_suffix(".safetensors"))
        results[repo.name] = {}
        for load in loading_paths:
            try:
                with torch.no_grad():
                    largest, class_name = load(str(repo), golden)
                results[repo.name][load.__name__] = {"difference": largest, "class": class_name}
            except Exception as error:  # it is written to the report, and the test judges it
                results[repo.name][load.__name__] = {"error": f"{type(error).__name__}: {error}"}
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
