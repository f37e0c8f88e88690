"""How fast an encoder is in each form it can be run in, and what our class costs over the native one."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, SiglipImageProcessorPil, SiglipVisionConfig

from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import PivotError, ProbeError
from pivot_hub.provenance import machine, peak_memory_mb, versions

# SigLIP's published sizes: speed does not depend on what the weights hold, so none are fetched.
SIZES = {
    "siglip-base-patch16-224": (768, 12, 12, 3072, 224, 16),
    "siglip-large-patch16-256": (1024, 24, 16, 4096, 256, 16),
    "siglip-so400m-patch14-384": (1152, 27, 16, 4304, 384, 14),
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
    """Time an encoder in each form, in turns so that a slow spell hits all, and measure each one's memory.

    `native` is transformers' own class asked for its hidden states, which is what an MLLM does; `pivot` is
    `PivotVisionModel`; the others run that class compiled, in bfloat16, and exported. ONNX runs on the CPU.

    Args:
        encoder: folder or Hub name, or one of SIZES, with random weights.
        batch: images of one pass.
        rounds: passes of each form, after one to warm up.
        forms: of FORMS; native is always among them.
        say: called with a line a form.

    Returns:
        For each form the median seconds a batch, images per second, and the median ratio to native in the same round;
        peak memory in MB of a process of its own (on a GPU, of the device).

    Raises:
        CheckpointError: there is no such encoder.
        ProbeError: a form is unknown.
    """
    if unknown := set(forms) - set(FORMS):
        raise ProbeError(f"there is no form {min(unknown)!r}; give some of {', '.join(FORMS)}.")
    forms = tuple(f for f in FORMS if f in {*forms, "native"})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        source = _random_repository(Path(folder) / "encoder", *SIZES[encoder]) if encoder in SIZES else encoder
        exported = _export(source, Path(folder) / "export", forms)
        runs = {form: _load(form, source, exported, device) for form in forms}
        config = PivotVisionConfig.from_pretrained(str(source))
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        seconds = _time(runs, pixels, rounds)
        del runs
        memory = {form: _peak_memory(form, source, exported, device, pixels.shape) for form in forms}
    made = {}
    for form in forms:
        ratios = [own / native for own, native in zip(seconds[form], seconds["native"], strict=True)]
        median = statistics.median(seconds[form])
        made[form] = {
            "seconds_per_batch": round(median, 5),
            "images_per_s": round(batch / median, 2),
            "ratio_to_native": round(statistics.median(ratios), 4),
            "ratios": [round(r, 4) for r in ratios],
            "peak_memory_mb": memory[form],
        }
        log(
            f"{form:12} {made[form]['images_per_s']:9.2f} images/s {made[form]['ratio_to_native']:7.3f} of native's "
            f"time {memory[form]:7} MB"
        )
    return {
        "benchmark": "encoder",
        "encoder": Path(encoder).name if Path(encoder).is_dir() else encoder,
        "weights": "random" if encoder in SIZES else "the repository's",
        "image_px": config.image_size,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "forms": made,
        "machine": machine(),
        "versions": versions(),
    }


def _random_repository(
    folder: Path, hidden: int, layers: int, heads: int, intermediate: int, image_px: int, patch: int
) -> str:
    config = SiglipVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        image_size=image_px,
        patch_size=patch,
    )
    model = AutoModel.from_config(PivotVisionConfig(config))
    model.image_processor = SiglipImageProcessorPil(size={"height": image_px, "width": image_px})
    model.save_pretrained(folder)
    return str(folder)


def _export(source: str, folder: Path, forms: tuple[str, ...]) -> Path:
    if any(form.startswith(("onnx", "quanto")) for form in forms):
        from pivot_hub.encoder.export import export_encoder

        int8 = any(form.endswith("int8") for form in forms)
        export_encoder(source, folder, int8=int8, log=lambda line: None)
    return folder


def _load(form: str, source: str, exported: Path, device: str) -> Run:
    """The encoder in one form, as a function of pixels that has done its work when it returns."""
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
        made = placed(pixels.to(dtype), **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return made

    return run


def _time(runs: dict[str, Run], pixels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    for run in runs.values():
        run(pixels)
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for turn in range(rounds):
        # Forwards, then backwards: a drift of the machine's speed favours no form.
        for form in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            runs[form](pixels)
            seconds[form].append(time.perf_counter() - began)
    return seconds


def _peak_memory(form: str, source: str, exported: Path, device: str, shape: torch.Size) -> int:
    """Peak memory in MB of loading one form and encoding one batch, in a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(sender, form, source, exported, device, tuple(shape)))
    child.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        raise PivotError(f"the process that measured the memory of {form} died; the machine has too little.") from error
    finally:
        child.join()


def _measure_memory(sender: Any, form: str, source: str, exported: Path, device: str, shape: tuple[int, ...]) -> None:
    _load(form, source, exported, device)(torch.randn(shape, device=device))
    cuda = device == "cuda"
    sender.send(torch.cuda.max_memory_allocated() // 2**20 if cuda else peak_memory_mb())
