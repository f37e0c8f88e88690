"""Compare the features of extracted towers with timm's own architectures, given the same weights.

`python timm_towers.py REPOSITORIES OUT.json` runs where timm is installed. Both encode one square image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conformance import loading_paths  # noqa: F401  (its import makes torchvision importable)

SIDE = 8  # patches


def qwen3(repo: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return timm's and our map (H, W, D) of one image for Qwen3-VL's tower."""
    from timm.models.qwen3_vit import Qwen3VitEncoder, checkpoint_filter_fn_encoder

    from pivot_hub import PivotVisionModel

    encoder = PivotVisionModel.from_pretrained(repo)
    config = encoder.config.backbone_config
    model = Qwen3VitEncoder(
        img_size=SIDE * config.patch_size,
        patch_size=config.patch_size,
        global_pool="",
        embed_dim=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        pos_embed_grid_size=int(config.num_position_embeddings**0.5),
    ).eval()
    weights = {f"model.visual.{k}": v for k, v in load_file(repo / "model.safetensors").items()}
    model.load_state_dict(checkpoint_filter_fn_encoder(weights, model))
    patch, merge = config.patch_size, config.spatial_merge_size
    image = torch.rand(3, SIDE * patch, SIDE * patch) * 2 - 1
    blocks = image.unflatten(2, (SIDE // merge, merge, patch)).unflatten(1, (SIDE // merge, merge, patch))
    # (3, rows, merge, patch, columns, merge, patch) to the order of the tower's patches, each for two equal frames
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)
    own = encoder(patches, image_grid_thw=torch.tensor([[1, SIDE, SIDE]])).last_hidden_state[0]
    return model.forward_features(image[None])[0], own


def gemma4(repo: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return timm's and our pooled map (H, W, D) of one image for Gemma 4's tower."""
    from timm.models.gemma4_vit import Gemma4VitEncoder, checkpoint_filter_fn_encoder

    from pivot_hub import PivotVisionModel

    encoder = PivotVisionModel.from_pretrained(repo)
    config = encoder.config.backbone_config
    side, patch, pool = 2 * config.pooling_kernel_size, config.patch_size, config.pooling_kernel_size
    model = Gemma4VitEncoder(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        position_embedding_size=config.position_embedding_size,
        pooling_kernel_size=pool,
        standardize=config.standardize,
        use_clipped_linears=config.use_clipped_linears,
    ).eval()
    weights = {f"model.vision_tower.{k}": v for k, v in load_file(repo / "model.safetensors").items()}
    model.load_state_dict(checkpoint_filter_fn_encoder(weights, model))
    image = torch.rand(3, side * patch, side * patch)
    blocks = image.unflatten(2, (side, patch)).unflatten(1, (side, patch))
    patches = blocks.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)[None]
    rows_columns = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    own = encoder(patches, image_position_ids=rows_columns.flip(-1)[None]).last_hidden_state[0]
    return model(image[None])[0].unflatten(0, (side // pool, side // pool)), own


def main() -> None:
    torch.manual_seed(0)
    results = {}
    for name, compare in (("qwen3_vl", qwen3), ("qwen3_5", qwen3), ("gemma4", gemma4)):
        with torch.no_grad():
            expected, own = compare(Path(sys.argv[1]) / name)
        results[name] = {"difference": (expected - own).abs().max().item(), "scale": own.abs().max().item()}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
