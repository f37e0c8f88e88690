"""Run the adapters in an environment that has their library: `python -m tests.conformance.adapters LIBRARY FOLDER OUT`.

FOLDER holds encoders by the name of their backbone. OUT gets, for each, the largest difference from the encoder's own
features, and what the library itself measured.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.conformance import loading_paths  # noqa: F401  (its import makes torchvision importable)


def load(folder: Path, **options: Any) -> Any:
    """Load an encoder by this package."""
    from pivot_hub import PivotVisionModel

    return PivotVisionModel.from_pretrained(str(folder), **options)


def images(count: int, side: int) -> list[Image.Image]:
    """Return random images of another shape than the encoder's."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side + 18, side + 38, 3), dtype=np.uint8)) for _ in range(count)]


def largest(a: Any, b: Any) -> float:
    """Return the largest difference of two tensors of one shape."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().float() - b.detach().float()).abs().max())


def timm(folder: Path) -> dict[str, Any]:
    """Compare tokens, pooled features and pixels of the timm model, at the feature layer and after the last one."""
    import timm

    from pivot_hub.encoder.adapters.timm_folder import write_timm

    outcome: dict[str, Any] = {}
    for layer in (None, "last_hidden_state"):
        encoder = load(folder, feature_layer=layer)
        written = write_timm(folder, folder.with_name(f"{folder.name}-timm"), feature_layer=layer)
        model = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        given = images(2, encoder.config.image_size)
        pixels = torch.stack([transform(image) for image in given])
        own_pixels = encoder.prepare(given)["pixel_values"]
        with torch.no_grad():
            own, tokens, pooled = encoder(own_pixels), model.forward_features(own_pixels), model(own_pixels)
        epsilon = getattr(encoder.config.backbone_config, "layer_norm_eps", None)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and epsilon is not None:
                module.eps = epsilon
        with torch.no_grad():
            with_own_epsilon = model.forward_features(own_pixels)
        prefix = encoder.config.pivot["prefix_tokens"]
        outcome[layer or "feature layer"] = {
            "difference": largest(tokens[:, prefix:], own.last_hidden_state),
            "own epsilon": largest(with_own_epsilon[:, prefix:], own.last_hidden_state),
            "pooled": largest(pooled, own.pooler_output),
            "pixels": largest(pixels, own_pixels),
        }
    return outcome


def mteb(folder: Path) -> dict[str, Any]:
    """Compare embeddings, and run a task of MTEB's on images that it draws."""
    from mteb import evaluate
    from mteb.mocks.mock_tasks import MockImageClassificationTask, MockImageClusteringFastTask

    from pivot_hub.encoder.adapters.mteb_model import mteb_model

    model = mteb_model(str(folder))
    encoder = load(folder)
    given = images(3, encoder.config.image_size)
    embeddings = model.encode([{"image": given[:2]}, {"image": given[2:]}])
    with torch.no_grad():
        own = encoder.forward_features(given).pooler_output
    scores = {}
    for task in (MockImageClassificationTask(), MockImageClusteringFastTask()):
        (result,) = evaluate(model, task, cache=None, show_progress_bar=False).task_results
        scores[task.metadata.name] = result.get_score()
    return {"difference": largest(embeddings, own), "scores": scores}


def visbench(folder: Path) -> dict[str, Any]:
    """Compare maps and pooled features of each layer, and run a probe of VisBench's on images that it draws."""
    import visbench
    from visbench.cache import FeatureCache
    from visbench.data import ImageFolderDataset
    from visbench.demo import synthesise

    from pivot_hub.encoder.adapters.visbench_backbone import visbench_backbone

    backbone = visbench_backbone(str(folder), device="cpu")
    encoder = load(folder)
    given = images(2, encoder.config.image_size)
    pixels = backbone.preprocess(given)
    features = backbone.extract_features(pixels, layers=[0, backbone.num_layers - 1])
    with torch.no_grad():
        own = encoder(pixels, output_hidden_states=True)
        own_map = encoder.feature_map(pixels)
    first = own.hidden_states[1][:, encoder.config.pivot["prefix_tokens"] :]
    drawn = synthesise(folder.with_name("drawn"), per_class=4, image_size=64)
    data = ImageFolderDataset(drawn / "val", split="val")
    metrics = visbench.run(backbone, "retrieval", data, cache=FeatureCache(folder.with_name("cache"))).metrics
    return {
        "difference": largest(features["dense"], own_map),
        "pooled": largest(features["pooled"], own.pooler_output),
        "first layer": largest(features["dense_layers"][0].flatten(2).transpose(1, 2), first),
        "pixels": largest(pixels, encoder.prepare(given)["pixel_values"]),
        "scores": metrics,
    }


LIBRARIES = {"timm": timm, "mteb": mteb, "visbench": visbench}


def main() -> None:
    library, folder, out = sys.argv[1:]
    compare = LIBRARIES[library]
    results = {path.name: compare(path) for path in sorted(Path(folder).iterdir())}
    Path(out).write_text(json.dumps({"version": version(library), "results": results}))


if __name__ == "__main__":
    main()
