"""The encoders that ship with the page without a server."""

from __future__ import annotations

import torch

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.browser_models import FILES, MODELS, ROLES, shipped_encoders
from pivot_hub.encoder.modeling_pivot import read_image_processor


def test_the_pages_encoders_are_those_of_the_shipped_model_bundle() -> None:
    """The bundle was changed, otherwise: run `python -m pivot_hub.demo.browser_models`."""
    import onnxruntime

    files = {str(f.relative_to(MODELS)) for f in MODELS.rglob("*") if f.is_file()}
    assert files == {f"{name}/{file}" for name in ROLES for file in FILES}
    image = ShapesDataset(image_px=256).scene("test", 0).render().image
    features = {}
    for name, encoder in shipped_encoders().items():
        processor = read_image_processor(str(MODELS / name), encoder.config.backbone_config)
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        session = onnxruntime.InferenceSession(str(MODELS / name / "onnx" / "model.onnx"))
        (tokens,) = session.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = encoder.forward_features([image])[0].flatten(0, 1).numpy()
        assert abs(tokens[0] - expected).max() < 1e-4 * abs(expected).max(), name
        features[name] = tokens
    assert abs(features["shapes-sft"] - features["shapes-dpo"]).max() > 0.01, "both are the same encoder"
