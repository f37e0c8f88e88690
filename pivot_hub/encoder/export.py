"""Export an encoder to ONNX in float32, float16 and int8 and to int8 weights for torch, and measure the differences.

The folder has the layout that `@huggingface/transformers` (Node, browsers) and ONNX Runtime users expect.
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

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.encoder.image_shapes import refuse_native
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import ExportError
from pivot_hub.files import write_json
from pivot_hub.outputs import EXPORT, check_replaceable, whole_folder
from pivot_hub.provenance import machine, versions

FLOAT32_TOLERANCE = 1e-4  # relative, for every batch that is checked
PROTOBUF_LIMIT = 2_000_000_000  # bytes; larger weights are stored beside the graph
# Takes a model, its image processor, the encoder's name and its hash; returns results, each with a `to_dict()`.
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
    """Export an encoder, and measure the size of each form and its difference from the original.

    `onnx/model.onnx` takes pixel_values (batch, 3, image_px, image_px) and returns last_hidden_state (batch, H*W, D),
    the patch tokens at the feature layer, and pooler_output (batch, D), their mean, as `PivotVisionModel` does.

    Args:
        encoder: Folder, Hub name or short name of the encoder.
        output: Folder that the export is written to; an earlier export is replaced.
        fp16: Whether to write `onnx/model_fp16.onnx` too, which has float32 inputs and outputs.
        int8: Whether to write `onnx/model_quantized.onnx` (ONNX Runtime's dynamic quantisation) and `quanto/` (int8
            weights for torch by optimum-quanto) too.
        images: Images to check the exported models on, besides scenes of the synthetic Shapes dataset.
        probe: Function that measures a form of the encoder, so that the report shows what int8 costs. It takes the
            model, its image processor, the encoder's name and its hash, and returns results. One such function is
            `probes.run.probe_export`.
        log: Function that is called with each line of progress.

    Returns:
        The report that is written to `export.json`: files, sizes and measured differences.

    Raises:
        CheckpointError: The encoder cannot be loaded, or is a tower of native resolution.
        ExportError: A package is missing, or the exported model's features differ from torch's.
        OutputError: The output holds anything but an export, or another process is writing it.
    """
    _require_packages("onnx", "onnxscript", "onnxruntime", *(["optimum.quanto"] if int8 else []))
    encoder = resolve_encoder(encoder)
    # Their rotary positions and windows are computed from the grids of the batch, which torch.export cannot trace.
    refuse_native(encoder, "an export to ONNX or quanto", "run it in torch, by PivotVisionModel or `pivot encode`")
    check_replaceable(Path(output), EXPORT)  # before the work, and again after it
    model, processor = read_encoder(encoder)
    dataset = ShapesDataset(image_px=model.config.image_size)
    check_images = [*images, *(dataset.scene("test", i).render().image for i in range(5))]
    batches = {"random": _noise(model.config.image_size), "images": _prepare(processor, check_images)}
    with whole_folder(Path(output), EXPORT) as folder:
        forms = _write_forms(encoder, model, processor, folder, fp16, int8, log)
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
        report = {
            **metadata,
            "feature_layer": model.config.pivot["feature_layer"],
            "pictures": len(check_images),
            "files": files,
        }
        if int8 and probe is not None:
            log("probing float32 and int8")
            identity = (metadata["encoder"], metadata["encoder_sha256"])
            results = {"torch": probe(model, processor, *identity)}
            for name in ("onnx/model_quantized.onnx", "quanto/model.safetensors"):
                results[name] = probe(forms[name](), processor, *identity)
            report["probe"] = {name: [result.to_dict() for result in rows] for name, rows in results.items()}
        report |= {"machine": machine(), "versions": versions()}
        write_json(folder / "export.json", report)
    return report


def _write_forms(
    encoder: str | Path,
    model: PivotVisionModel,
    processor: Any,
    folder: Path,
    fp16: bool,
    int8: bool,
    log: Callable[[str], None],
) -> dict[str, Callable[[], FeatureModel]]:
    """Write an encoder's configs and its exported forms.

    Returns:
        For each form, by the name of its file in the folder, a function that loads it.
    """
    model.backbone.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "pivot": model.config.pivot})
    processor.save_pretrained(folder)
    onnx_folder = folder / "onnx"
    onnx_folder.mkdir()
    log("writing onnx/model.onnx")
    _write_onnx(model, onnx_folder / "model.onnx")
    forms: dict[str, Callable[[], FeatureModel]] = {"onnx/model.onnx": lambda: OnnxEncoder(folder)}
    if fp16:
        log("writing onnx/model_fp16.onnx")
        half, _ = read_encoder(encoder, check=False, dtype=torch.float16)  # they were replayed before
        _write_onnx(half, onnx_folder / "model_fp16.onnx")
        forms["onnx/model_fp16.onnx"] = lambda: OnnxEncoder(folder, "model_fp16.onnx")
    if int8:
        log("writing onnx/model_quantized.onnx and quanto/")
        _quantize_onnx(onnx_folder / "model.onnx", onnx_folder / "model_quantized.onnx")
        _write_quanto(read_encoder(encoder, check=False)[0], folder / "quanto")
        forms["onnx/model_quantized.onnx"] = lambda: OnnxEncoder(folder, "model_quantized.onnx")
        forms["quanto/model.safetensors"] = lambda: load_quanto(folder)
    return forms


class OnnxEncoder:
    """Exported encoder in ONNX Runtime, which is called like a `PivotVisionModel`.

    Args:
        folder: Folder that `export_encoder` wrote.
        file: Name of the model's file in the folder's `onnx/`.
        provider: Execution provider of ONNX Runtime.
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
        outputs = self.session.run(OUTPUTS, {"pixel_values": pixel_values.float().cpu().numpy()})
        tokens, pooled = (torch.from_numpy(output) for output in outputs)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def load_quanto(folder: str | Path) -> PivotVisionModel:
    """Load the int8 weights of an export as a torch model.

    Args:
        folder: Folder that `export_encoder` wrote with the option int8.

    Raises:
        ExportError: The package optimum-quanto is missing.
    """
    _require_packages("optimum.quanto")
    from optimum.quanto import requantize

    path = Path(folder)
    config = PivotVisionConfig.from_pretrained(str(path))
    backbone = AutoModel.from_config(config.backbone_config)
    quantized_layers = json.loads((path / "quanto" / "quantization_map.json").read_text())
    weights = load_file(path / "quanto" / "model.safetensors")
    requantize(backbone, weights, quantized_layers, device=torch.device("cpu"))
    model = PivotVisionModel(config, backbone).eval()
    model.image_processor = read_image_processor(str(path), config.backbone_config)
    return model


class _Float32Interface(nn.Module):
    """Encoder that takes float32 pixels and returns float32 features, whatever precision it computes in."""

    def __init__(self, model: PivotVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values.to(self.model.dtype))
        return outputs.last_hidden_state.float(), outputs.pooler_output.float()


def _write_onnx(model: PivotVisionModel, path: Path) -> None:
    # The exporter warns at every export that torchvision, which an encoder does not need, is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    size = model.config.image_size
    with torch.no_grad():
        program = torch.onnx.export(
            _Float32Interface(model).eval(),
            (torch.zeros(2, 3, size, size),),
            input_names=["pixel_values"],
            output_names=OUTPUTS,
            dynamic_shapes={"pixel_values": {0: "batch"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The exporter records the source file of each node, with its path on this machine.
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
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that the exporter has already done
    # Only linear layers: ONNX Runtime's int8 convolution (here the patch embedding) is slower than float32.
    try:
        quantize_dynamic(
            source,
            target,
            # Sums of signed weights saturate in 16 bits on x86 CPUs without VNNI, where features were 18% off.
            # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
            weight_type=QuantType.QUInt8,
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
def _compare(exported: FeatureModel, model: PivotVisionModel, batches: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest distance of an exported model's outputs from the original's, relative to their norm.

    Each batch is encoded as a whole, and its first image alone.
    """
    worst: dict[str, float] = {}
    for name, pixels in batches.items():
        errors = []
        for batch in (pixels, pixels[:1]):
            outputs, expected = exported(batch), model(batch)
            errors += [((outputs[k] - expected[k]).norm() / expected[k].norm()).item() for k in OUTPUTS]
        worst[name] = max(errors)
    return {"relative_error": worst}


def _noise(image_px: int) -> torch.Tensor:
    return torch.randn(3, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))


def _prepare(processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    pixels: torch.Tensor = processor(images=[i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
    return pixels


def _bytes(path: Path) -> int:
    """Size of a model's file, including weights that are stored beside it."""
    weights = path.with_name(f"{path.name}_data")
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _require_packages(*modules: str) -> None:
    from importlib.util import find_spec

    for name in modules:
        if find_spec(name.partition(".")[0]) is None or find_spec(name) is None:
            raise ExportError(f"{name} is not installed; run `pip install 'pivot-hub[export]'`.")
