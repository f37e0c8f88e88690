"""Speed and memory of an encoder in each form in which it can be run, compared with transformers' native class."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, SiglipImageProcessorPil, SiglipVisionConfig

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.image_shapes import refuse_native
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import PivotError, ProbeError
from pivot_hub.provenance import machine, peak_memory_mb, versions


def _siglip(
    hidden_size: int, layers: int, heads: int, intermediate_size: int, image_px: int, patch_px: int
) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        image_size=image_px,
        patch_size=patch_px,
    )


# SigLIP's published sizes. Speed does not depend on the values of the weights, so none are downloaded.
SIZES = {
    "siglip-base-patch16-224": _siglip(768, 12, 12, 3072, image_px=224, patch_px=16),
    "siglip-large-patch16-256": _siglip(1024, 24, 16, 4096, image_px=256, patch_px=16),
    "siglip-so400m-patch14-384": _siglip(1152, 27, 16, 4304, image_px=384, patch_px=14),
}
FORMS = ("native", "pivot", "compiled", "bfloat16", "onnx", "onnx_int8", "quanto_int8")
Run = Callable[[torch.Tensor], object]


def bench_encoder(
    encoder: str = "siglip-base-patch16-224",
    batch: int = 8,
    rounds: int = 5,
    forms: tuple[str, ...] = FORMS,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time an encoder in each form, and measure the memory of each form.

    Forms take turns, so that a slow period of the machine affects all of them. `native` is transformers' own class
    with its hidden states as outputs, which is what an MLLM runs; `pivot` is `PivotVisionModel`; the others are that
    class compiled, in bfloat16, and exported. ONNX runs on the CPU.

    Args:
        encoder: Folder, Hub name or short name of an encoder, or the name of an entry of `SIZES`, which gets random
            weights.
        batch: Images of one pass.
        rounds: Timed passes of each form, after one pass of warm-up.
        forms: Forms out of `FORMS`; native is always added.
        log: Callback that receives one line for each form.

    Returns:
        For each form the median seconds a batch, images per second, the median ratio of its time to native's in the
        same round, and the peak memory in MB of a process of its own (on a GPU, of the device).

    Raises:
        CheckpointError: The encoder does not exist, or is a tower of native resolution.
        ProbeError: A form is unknown.
    """
    if unknown := set(forms) - set(FORMS):
        raise ProbeError(f"there is no form {min(unknown)!r}; give some of {', '.join(FORMS)}.")
    if encoder not in SIZES:
        encoder = resolve_encoder(encoder)
        refuse_native(encoder, "the benchmark of encoders", "time PivotVisionModel.forward_features on images of yours")
    forms = tuple(form for form in FORMS if form in {*forms, "native"})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        source = random_repository(Path(folder) / "encoder", SIZES[encoder]) if encoder in SIZES else encoder
        exported = _export(source, Path(folder) / "export", forms)
        runs = {form: _load(form, source, exported, device) for form in forms}
        image_px = cast(int, PivotVisionConfig.from_pretrained(str(source)).image_size)
        pixels = torch.randn(batch, 3, image_px, image_px, device=device)
        seconds = _time(runs, pixels, rounds)
        del runs
        memory = {form: _peak_memory(form, source, exported, device, pixels.shape) for form in forms}
    records = {form: _form_record(seconds[form], seconds["native"], memory[form], batch) for form in forms}
    for form, record in records.items():
        log(
            f"{form:12} {record['images_per_s']:9.2f} images/s {record['ratio_to_native']:7.3f} of native's time "
            f"{record['peak_memory_mb']:7} MB"
        )
    return {
        "benchmark": "encoder",
        "encoder": Path(encoder).name if Path(encoder).is_dir() else encoder,
        "weights": "random" if encoder in SIZES else "the repository's",
        "image_px": image_px,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "forms": records,
        "machine": machine(),
        "versions": versions(),
    }


def _form_record(own: list[float], native: list[float], memory_mb: int, batch: int) -> dict[str, Any]:
    """What the report says of a form, from its and native's seconds in each round."""
    median = statistics.median(own)
    ratios = [own_s / native_s for own_s, native_s in zip(own, native, strict=True)]
    return {
        "seconds_per_batch": round(median, 5),
        "images_per_s": round(batch / median, 2),
        "ratio_to_native": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
        "peak_memory_mb": memory_mb,
    }


def random_repository(folder: Path, config: SiglipVisionConfig) -> str:
    """Save an encoder with random weights and its image processor, and return its folder."""
    side = cast(int, config.image_size)
    model = AutoModel.from_config(PivotVisionConfig(config))
    model.image_processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    model.save_pretrained(folder)
    return str(folder)


def _export(source: str, folder: Path, forms: tuple[str, ...]) -> Path:
    """Export the encoder where a form needs it, and return the folder of the export."""
    if any(form.startswith(("onnx", "quanto")) for form in forms):
        from pivot_hub.encoder.export import export_encoder

        int8 = any(form.endswith("int8") for form in forms)
        export_encoder(source, folder, int8=int8, log=lambda line: None)
    return folder


def _load(form: str, source: str, exported: Path, device: str) -> Run:
    """Load the encoder in one form, as a function of pixels that returns when the computation is finished."""
    if form.startswith("onnx"):
        from pivot_hub.encoder.export import OnnxEncoder

        return OnnxEncoder(exported, "model_quantized.onnx" if form == "onnx_int8" else "model.onnx")
    if form == "quanto_int8":
        from pivot_hub.encoder.export import load_quanto

        return _on(device, load_quanto(exported), torch.float32)
    if form == "bfloat16":
        return _on(device, read_encoder(source, dtype=torch.bfloat16)[0], torch.bfloat16)
    model, _ = read_encoder(source)
    if form == "native":
        return _on(device, model.backbone, torch.float32, output_hidden_states=True)
    return _on(device, torch.compile(model) if form == "compiled" else model, torch.float32)


def _on(device: str, model: Any, dtype: torch.dtype, **options: Any) -> Run:
    placed = model.to(device)

    @torch.inference_mode()
    def run(pixels: torch.Tensor) -> object:
        output = placed(pixels.to(dtype), **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    return run


def _time(runs: dict[str, Run], pixels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form's passes, after one pass of warm-up."""
    for run in runs.values():
        run(pixels)
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for turn in range(rounds):
        # The order alternates, so that a drift of the machine's speed favours no form.
        for form in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            runs[form](pixels)
            seconds[form].append(time.perf_counter() - began)
    return seconds


def _peak_memory(form: str, source: str, exported: Path, device: str, shape: torch.Size) -> int:
    """Measure the peak memory in MB of loading one form and encoding one batch, in a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(sender, form, source, exported, device, tuple(shape)))
    child.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        raise PivotError(
            f"the process that measured the memory of {form} was killed, because the machine has too little memory; "
            "give a smaller batch."
        ) from error
    finally:
        child.join()


def _measure_memory(sender: Any, form: str, source: str, exported: Path, device: str, shape: tuple[int, ...]) -> None:
    _load(form, source, exported, device)(torch.randn(shape, device=device))
    cuda = device == "cuda"
    sender.send(torch.cuda.max_memory_allocated() // 2**20 if cuda else peak_memory_mb())
