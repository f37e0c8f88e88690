"""Export an encoder: ONNX in float32, float16 and int8, and int8 weights for torch, each measured against the original.

The folder is laid out as `@huggingface/transformers` (Node, browsers) and ONNX Runtime users expect it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import ExportError
from pivot_hub.files import whole_folder, write_json
from pivot_hub.provenance import machine, versions

FLOAT32_TOLERANCE = 1e-4  # relative, on every batch that is checked
PROTOBUF_LIMIT = 2_000_000_000  # bytes: larger weights lie beside the graph
# Takes a model, its image processor, the encoder's name and its hash; returns results, each with `facts()`.
Probe = Callable[[FeatureModel, Any, str, str], Sequence[Any]]
OUTPUTS = ["last_hidden_state", "pooler_output"]


def export_encoder(
    encoder: str | Path,
    output: str | Path,
    fp16: bool = False,
    int8: bool = False,
    images: Sequence[Image.Image] = (),
    probe: Probe | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Export an encoder, and measure what each form costs.

    `onnx/model.onnx` takes pixel_values (batch, 3, image_px, image_px) and gives last_hidden_state (batch, H*W, D),
    the patch tokens at the feature layer, and pooler_output (batch, D), their mean, as `PivotVisionModel` does.

    Args:
        encoder: folder or Hub name.
        output: folder to make; one that is there is replaced.
        fp16: also write `onnx/model_fp16.onnx`, float32 at its ends.
        int8: also write `onnx/model_quantized.onnx` (ONNX Runtime's dynamic quantisation) and `quanto/` (int8 weights
            for torch by optimum-quanto).
        images: pictures to check on, besides scenes of the built-in world.
        probe: Measures a form of the encoder, so that the report says what int8 costs: it takes the model, its image
            processor, the encoder's name and its hash, and returns results. `probes.run.probe_export` is one.

    Returns:
        What was written and measured, as in `export.json`.

    Raises:
        CheckpointError: there is no such encoder.
        ExportError: a package is missing, or the exported model gives other features than torch.
    """
    _need("onnx", "onnxscript", "onnxruntime", *(["optimum.quanto"] if int8 else []))
    model, processor = read_encoder(encoder)
    dataset = ShapesDataset(image_px=model.config.image_size)
    pictures = [*images, *(dataset.scene("test", i).render().image for i in range(5))]
    batches = {"random": _noise(model.config.image_size), "images": _prepared(processor, pictures)}
    with whole_folder(Path(output)) as folder:
        model.backbone.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**config, "pivot": model.config.pivot})
        processor.save_pretrained(folder)
        (folder / "onnx").mkdir()
        forms: dict[str, Callable[[], FeatureModel]] = {}
        log("writing onnx/model.onnx")
        _write_onnx(model, folder / "onnx" / "model.onnx")
        forms["onnx/model.onnx"] = lambda: OnnxEncoder(folder)
        if fp16:
            log("writing onnx/model_fp16.onnx")
            half, _ = read_encoder(encoder, dtype=torch.float16)
            _write_onnx(half, folder / "onnx" / "model_fp16.onnx")
            forms["onnx/model_fp16.onnx"] = lambda: OnnxEncoder(folder, "model_fp16.onnx")
        if int8:
            log("writing onnx/model_quantized.onnx and quanto/")
            _quantize_onnx(folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx")
            _write_quanto(read_encoder(encoder)[0], folder / "quanto")
            forms["onnx/model_quantized.onnx"] = lambda: OnnxEncoder(folder, "model_quantized.onnx")
            forms["quanto/model.safetensors"] = lambda: load_quanto(folder)
        files = {}
        for name, load in forms.items():
            files[name] = {"bytes": _bytes(folder / name), **_compare(load(), model, batches)}
            worst = max(files[name]["relative_error"].values())
            log(f"{name}: {files[name]['bytes'] / 1e6:.1f} MB, relative error {worst:.1e}")
            if name == "onnx/model.onnx" and not worst < FLOAT32_TOLERANCE:
                raise ExportError(
                    f"{encoder}: the ONNX model's features differ from torch's by {worst:.1e} relative, over "
                    f"{FLOAT32_TOLERANCE}; nothing was kept; report it with the versions of torch and onnxscript."
                )
        metadata = encoder_metadata(encoder)
        named = (metadata["encoder"], metadata["encoder_sha256"])
        report = {
            **metadata,
            "feature_layer": model.config.pivot["feature_layer"],
            "pictures": len(pictures),
            "files": files,
        }
        if int8 and probe is not None:
            log("probing float32 and int8")
            rows = {"torch": probe(model, processor, *named)}
            for name in ("onnx/model_quantized.onnx", "quanto/model.safetensors"):
                rows[name] = probe(forms[name](), processor, *named)
            report["probe"] = {form: [r.to_dict() for r in results] for form, results in rows.items()}
        report |= {"machine": machine(), "versions": versions()}
        write_json(folder / "export.json", report)
    return report


class OnnxEncoder:
    """An exported encoder in ONNX Runtime, called as a `PivotVisionModel` is.

    Args:
        folder: as `export_encoder` wrote it.
        file: in its `onnx/`.
        provider: ONNX Runtime's execution provider.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, file: str = "model.onnx", provider: str = "CPUExecutionProvider") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.config: PivotVisionConfig = PivotVisionConfig.from_pretrained(str(folder))
        path = str(Path(folder) / "onnx" / file)
        self.session = onnxruntime.InferenceSession(path, options, providers=[provider])

    def __call__(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Encode (B, 3, image_px, image_px) in float32."""
        made = self.session.run(OUTPUTS, {"pixel_values": pixel_values.float().cpu().numpy()})
        tokens, pooled = (torch.from_numpy(m) for m in made)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def load_quanto(folder: str | Path) -> PivotVisionModel:
    """Load the int8 weights of an export for torch.

    Args:
        folder: as `export_encoder` wrote it with int8.

    Raises:
        ExportError: optimum-quanto is missing.
    """
    _need("optimum.quanto")
    from optimum.quanto import requantize

    path = Path(folder)
    config = PivotVisionConfig.from_pretrained(str(path))
    backbone = AutoModel.from_config(config.backbone_config)
    kinds = json.loads((path / "quanto" / "quantization_map.json").read_text())
    requantize(backbone, load_file(path / "quanto" / "model.safetensors"), kinds, device=torch.device("cpu"))
    model = PivotVisionModel(config, backbone).eval()
    model.image_processor = read_image_processor(str(path), config.backbone_config)
    return model


class _Features(nn.Module):
    """The encoder between float32 pixels and float32 features, whatever it computes in."""

    def __init__(self, model: PivotVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.model(pixel_values.to(self.model.dtype))
        return made.last_hidden_state.float(), made.pooler_output.float()


def _write_onnx(model: PivotVisionModel, path: Path) -> None:
    # It says at every export that torchvision, which the core does not need, is not there.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    size = model.config.image_size
    with torch.no_grad():
        program = torch.onnx.export(
            _Features(model).eval(),
            (torch.zeros(2, 3, size, size),),
            input_names=["pixel_values"],
            output_names=OUTPUTS,
            dynamic_shapes={"pixel_values": {0: "batch"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The exporter notes for each node where in this machine's files it came from.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    if sum(p.numel() * p.element_size() for p in model.parameters()) < PROTOBUF_LIMIT:
        program.save(str(path), external_data=False)
        return
    import onnx

    # transformers.js looks for NAME_data beside NAME.
    onnx.save_model(program.model_proto, str(path), save_as_external_data=True, location=f"{path.name}_data")


def _quantize_onnx(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a pre-processing that the exporter has already done
    # Every linear layer; ONNX Runtime's int8 convolution, here the patch embedding alone, is slower than float32.
    try:
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            use_external_data_format=source.with_name(f"{source.name}_data").exists(),
        )
    finally:
        root.setLevel(level)


def _write_quanto(model: PivotVisionModel, folder: Path) -> None:
    from optimum.quanto import freeze, qint8, quantization_map, quantize

    backbone: Any = model.backbone
    quantize(backbone, weights=qint8)
    freeze(backbone)
    folder.mkdir()
    weights = {k: v.contiguous() for k, v in backbone.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "quantization_map.json", quantization_map(backbone))


@torch.no_grad()
def _compare(made: FeatureModel, model: PivotVisionModel, batches: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Distance of both outputs to the original's, relative to its norm, for batches of one and of all."""
    worst: dict[str, float] = {}
    for name, pixels in batches.items():
        errors = []
        for batch in (pixels, pixels[:1]):
            seen, wanted = made(batch), model(batch)
            errors += [((seen[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in OUTPUTS]
        worst[name] = max(errors)
    return {"relative_error": worst}


def _noise(image_px: int) -> torch.Tensor:
    return torch.randn(3, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))


def _prepared(processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    pixels: torch.Tensor = processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
    return pixels


def _bytes(path: Path) -> int:
    beside = path.with_name(f"{path.name}_data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    for name in modules:
        if find_spec(name.partition(".")[0]) is None or find_spec(name) is None:
            raise ExportError(f"{name} is not installed; run `pip install 'pivot-hub[export]'`.")
