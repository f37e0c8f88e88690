"""What it takes to encode many images: FLOPs, hours and cost on GPUs, CPU cores that decode, and bytes written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from pivot_hub.config.encoder_names import base_encoder, is_short_name, resolve_encoder
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.feature_table import STORES
from pivot_hub.encoder.image_shapes import token_shape
from pivot_hub.errors import DataError
from pivot_hub.mllm.published_configs import part_config
from pivot_hub.planner.gpus import GPUS, HFU

# Measured for photographs of 640x480 pixels at 384 pixels, by PIL on one core of an AMD EPYC: 5 to decode, 13 to resize
# and normalise.
DECODE_MS = 18.0


@dataclass(frozen=True)
class EncodeOnGpu:
    """Encoding on one kind of GPU.

    Args:
        gpu: Name of the GPU.
        images_per_s: Images a second of one GPU.
        gpu_hours: Hours of all GPUs together.
        wall_hours: Hours until the last image.
        cores: CPU cores beside one GPU that decode as fast as it encodes.
        usd: Cost of all GPUs; None if no price is given.
    """

    gpu: str
    images_per_s: float
    gpu_hours: float
    wall_hours: float
    cores: int
    usd: float | None


@dataclass(frozen=True)
class EncodePlan:
    """What encoding takes; no weight is loaded and nothing is run.

    Args:
        encoder: Folder, Hub name or short name of the encoder.
        images: Number of images.
        parameters: Parameters of the encoder.
        flops_per_image: FLOPs of a forward pass for one image.
        shape: Shape of an image's features.
        store: Type of the stored features.
        bytes_per_image: Bytes of an image's features, without ids and before compression.
        bytes_written: The same of all images.
        precision: Precision that the encoder computes in.
        hfu: Assumed share of the GPU's peak FLOPs.
        decode_ms: Assumed time to decode and prepare an image on one core, in milliseconds.
        processes: Number of GPUs.
        gpus: Estimates for each kind of GPU.
    """

    encoder: str
    images: int
    parameters: int
    flops_per_image: int
    shape: tuple[int, ...]
    store: str
    bytes_per_image: int
    bytes_written: int
    precision: str
    hfu: float
    decode_ms: float
    processes: int
    gpus: tuple[EncodeOnGpu, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Return the plan as text."""
        shape = " x ".join(map(str, self.shape))
        lines = [
            f"{self.encoder}: {self.images:,} images on {self.processes} GPU(s) in {self.precision}",
            "",
            f"  {self.parameters / 1e6:,.1f} M parameters, {self.flops_per_image / 1e9:,.1f} GFLOPs an image",
            f"  features of {shape} in {self.store}: {self.bytes_per_image:,} bytes an image, "
            f"{self.bytes_written / 1e9:,.1f} GB in all",
            "",
            f"  {f'at {self.hfu:.0%} HFU':<16}{'images/s a GPU':>16}{'GPU-hours':>14}{'wall hours':>14}"
            f"{'cores a GPU':>14}" + (f"{'USD':>14}" if self.gpus[0].usd is not None else ""),
        ]
        for one in self.gpus:
            usd = "" if one.usd is None else f"{one.usd:>14,.2f}"
            lines.append(
                f"  {one.gpu:<16}{one.images_per_s:>16,.0f}{one.gpu_hours:>14,.2f}{one.wall_hours:>14,.2f}"
                f"{one.cores:>14}{usd}"
            )
        lines += [
            "",
            f"  assumed {self.decode_ms:g} ms of a core to decode and prepare an image; the GPU waits for fewer cores.",
            "  `pivot encode` shows the images a second that it reaches.",
        ]
        return "\n".join(lines)


def plan_encoding(
    encoder: str,
    images: float,
    tokens: bool = False,
    dtype: str = "bfloat16",
    store: str = "float16",
    processes: int = 1,
    hfu: float = HFU,
    decode_ms: float = DECODE_MS,
    usd_per_hour: float | None = None,
) -> EncodePlan:
    """Plan the encoding of images by an encoder of square images, from its config alone.

    Args:
        encoder: Folder, Hub name or short name of the encoder; published ones are known without the Hub. A short name's
            encoder has the shape of its base, so it need not be trained yet.
        images: Number of images, a whole one.
        tokens: Whether all patch tokens are written, and not their mean.
        dtype: Precision that the encoder computes in: float32, float16 or bfloat16.
        store: Type of the stored features: float32, float16, bfloat16 or int8.
        processes: Number of GPUs.
        hfu: Assumed share of the GPU's peak FLOPs, from 0 to 1.
        decode_ms: Time to decode and prepare an image on one core, in milliseconds.
        usd_per_hour: Price of one GPU for an hour.

    Raises:
        CheckpointError: There is no config, or it is of a tower of native resolution.
        DataError: A value is out of range.
    """
    for name, value, known in (("dtype", dtype, ("float32", "float16", "bfloat16")), ("store", store, tuple(STORES))):
        if value not in known:
            raise DataError(f"{name} {value!r} is not known; give one of {', '.join(known)}.")
    numbers = {"images": images, "processes": processes, "hfu": hfu, "decode time": decode_ms}
    for name, number in {**numbers, **({} if usd_per_hour is None else {"price": usd_per_hour})}.items():
        if not 0 < number < float("inf"):
            raise DataError(f"{name} {number}: give a number above 0.")
    if images != int(images):
        raise DataError(f"images {images}: give a whole number.")
    if hfu > 1:
        raise DataError(f"hfu {hfu}: give a share from 0 to 1.")
    config = PivotVisionConfig(
        part_config(base_encoder(encoder) if is_short_name(encoder) else resolve_encoder(encoder))
    )
    side = cast(int, config.image_size)  # `part_config` refuses towers of native resolution
    with torch.device("meta"):
        model = PivotVisionModel(config).eval()
        pixels = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    flops = counter.get_total_flops()
    shape = tuple(int(size) for size in token_shape(config))
    shape = shape if tokens else shape[-1:]
    size = torch.Size(shape).numel() * STORES[store].bit_width // 8 + (4 if store == "int8" else 0)
    gpus = []
    for gpu in GPUS:
        speed = hfu * (gpu.float32_flops if dtype == "float32" else gpu.half_flops) / flops
        hours = images / speed / 3600
        usd = None if usd_per_hour is None else hours * usd_per_hour
        cores = ceil(speed * decode_ms / 1000)
        gpus.append(EncodeOnGpu(gpu.name, speed, hours, hours / processes, cores, usd))
    return EncodePlan(
        encoder=encoder,
        images=int(images),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_image=flops,
        shape=shape,
        store=store,
        bytes_per_image=size,
        bytes_written=size * int(images),
        precision=dtype,
        hfu=hfu,
        decode_ms=decode_ms,
        processes=processes,
        gpus=tuple(gpus),
    )
