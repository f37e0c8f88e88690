"""The encoders of this package, with what `results/*.csv` records of each; nothing heavy is imported."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pivot_hub.config.encoder_names import hub_repository, making_commands, shipped_encoder
from pivot_hub.files import shipped_folder

RESULTS = shipped_folder("results")
ENCODERS = "encoders.csv"
MEASUREMENTS, BENCHMARKS = "results-*.csv", "benchmark-encoders-*.csv"
# shipped: the weights are part of this package. trained: results are recorded, and the commands make the weights again.
# planned: nobody has trained it, so there are no weights and no results.
Status = Literal["shipped", "trained", "planned"]


@dataclass(frozen=True)
class EncoderShape:
    """A row of `results/encoders.csv`.

    Args:
        name: Short name.
        status: `shipped`, `trained` or `planned`.
        stage: Training stage that ends with this encoder; `base` for one that no MLLM has trained.
        base: Hub name or short name of the encoder that training starts from; empty for one trained from scratch.
        language_model: Language model that the encoder is trained with; empty for a base.
        architecture: Model type of its native config.
        image_px: Side of the square images in pixels.
        patch_px: Side of a patch in pixels.
        tokens: Patch tokens of an image.
        dim: Channels of the features.
        layers: Transformer blocks.
        feature_layer: Hidden state that enters an MLLM.
        parameters: Parameters of the native class, with its pooling head where it has one.
        gmacs: Billions of multiply-accumulate operations of a forward pass for one image, counted by torch's formulas.
        activation_mb: Estimate of the memory of a forward pass for one image beside the weights, in MB, in float32,
            with the hidden states that `PivotVisionModel` keeps.
        licence: Licence of the weights.
        recipe: Recipe of the last stage.
    """

    name: str
    status: Status
    stage: str
    base: str
    language_model: str
    architecture: str
    image_px: int
    patch_px: int
    tokens: int
    dim: int
    layers: int
    feature_layer: str
    parameters: int
    gmacs: float
    activation_mb: float
    licence: str
    recipe: str


@dataclass(frozen=True)
class EncoderResult:
    """A row of `results/results-*.csv`: a measurement of an encoder, with its conditions, see `probes.result`.

    Args:
        encoder: Short name of the encoder.
        task: What was measured.
        metric: Name of the metric.
        value: The measured number, in `unit`.
        ci95_low: Lower end of the bootstrap interval.
        ci95_high: Upper end of the bootstrap interval.
        unit: `percent` or `ratio`.
        n: Number of test items.
        split: Split of the data that was measured.
        seed: Seed of the sampling and of the bootstrap.
        feature_layer: Hidden state that was measured.
        partner: The MLLM that answered; empty if the encoder was measured alone.
        protocol: One line that describes the method.
        encoder_sha256: Hash of the encoder's weights.
    """

    encoder: str
    task: str
    metric: str
    value: float
    ci95_low: float
    ci95_high: float
    unit: str
    n: int
    split: str
    seed: int
    feature_layer: str
    partner: str
    protocol: str
    encoder_sha256: str


@dataclass(frozen=True)
class EncoderSpeed:
    """A row of `results/benchmark-encoders-*.csv`: the speed of an encoder in one form on one device.

    Args:
        encoder: Name of the architecture on the Hub, without its owner, or of the encoder.
        weights: `random`, or `the repository's`; speed does not depend on the values of weights.
        form: Form in which it ran, see `bench.encoder`; `pivot` is `PivotVisionModel` in float32.
        image_px: Side of the images in pixels.
        batch: Images of one pass.
        images_per_s: Images per second, the median of `rounds`.
        ratio_to_native: Time relative to transformers' native class in the same round, the median.
        peak_memory_mb: Peak memory of a process of its own (of the device, on a GPU) in MB.
        rounds: Timed passes.
        device: The GPU, or the number of CPU cores.
        torch: Version of torch.
        transformers: Version of transformers.
        record: File below `recipes/bench` that the row is taken from.
    """

    encoder: str
    weights: str
    form: str
    image_px: int
    batch: int
    images_per_s: float
    ratio_to_native: float
    peak_memory_mb: int
    rounds: int
    device: str
    torch: str
    transformers: str
    record: str


@dataclass(frozen=True)
class EncoderEntry(EncoderShape):
    """An encoder of the registry.

    Args:
        repository: Name on the Hub, in the organisation of PIVOT_HUB_ORG.
        commands: Commands that make the encoder.
        results: What was measured of it.
        speeds: Speed of its architecture where it was measured.
    """

    repository: str
    commands: tuple[str, ...]
    results: tuple[EncoderResult, ...]
    speeds: tuple[EncoderSpeed, ...]

    @property
    def folder(self) -> Path | None:
        """Folder of the weights, where they ship with this package."""
        return shipped_encoder(self.name)

    def weights_mb(self, bytes_per_weight: int) -> float:
        """Return the size of the weights in MB, for 4 bytes a weight (float32) or 2 (bfloat16)."""
        return self.parameters * bytes_per_weight / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, with the memory of the weights, ready for JSON."""
        memory = {"weights_float32_mb": self.weights_mb(4), "weights_bfloat16_mb": self.weights_mb(2)}
        return asdict(self) | {name: round(size, 1) for name, size in memory.items()}


def list_encoders(filter: str = "") -> list[EncoderEntry]:
    """List the encoders of this package: those that are trained first, and those that are planned.

    Args:
        filter: Part of a short name or of a base's name, or a pattern with `*` and `?`; all encoders by default.

    Example:
        >>> [encoder.name for encoder in list_encoders("so400m")]
        ['siglip-so400m', 'siglip2-so400m']
    """
    pattern = filter if set(filter) & set("*?[") else f"*{filter}*"
    results = [result for file in sorted(RESULTS.glob(MEASUREMENTS)) for result in _read(file, EncoderResult)]
    speeds = [speed for file in sorted(RESULTS.glob(BENCHMARKS)) for speed in _read(file, EncoderSpeed)]
    return [
        EncoderEntry(
            **vars(shape),
            repository=hub_repository(shape.name),
            commands=tuple(making_commands(shape.name)),
            results=tuple(result for result in results if result.encoder == shape.name),
            speeds=tuple(s for s in speeds if s.encoder in (shape.name, shape.base.rpartition("/")[2])),
        )
        for shape in _read(RESULTS / ENCODERS, EncoderShape)
        if fnmatch(shape.name, pattern) or fnmatch(shape.base, pattern)
    ]


def describe_encoder(entry: EncoderEntry) -> str:
    """Return a page on an encoder: what it is, how it is loaded or made, what it needs and what was measured."""
    shape = f"{entry.image_px} px in patches of {entry.patch_px} px: {entry.tokens} tokens of {entry.dim} channels"
    lines = [
        f"{entry.name} ({entry.repository}): {_STATUS[entry.status]}",
        "",
        f"  architecture   {entry.architecture}, {entry.layers} layers, features of hidden state {entry.feature_layer}",
        f"  images         {shape}",
        f"  base           {entry.base or 'none: trained from scratch'}",
        f"  stage          {entry.stage}, recipe {entry.recipe}"
        + (f", with {entry.language_model}" if entry.language_model else ""),
        f"  licence        {entry.licence}",
        f"  cost           {entry.parameters / 1e6:,.1f} M parameters, {entry.gmacs:,.2f} GMACs an image",
        f"  memory         weights {entry.weights_mb(4):,.0f} MB in float32, {entry.weights_mb(2):,.0f} in bfloat16;",
        f"                 about {entry.activation_mb:,.1f} MB in float32 for each image of a batch, half of it",
        "                 in bfloat16: an estimate on fake tensors, without gradients",
    ]
    for speed in entry.speeds:
        weights = "" if speed.weights != "random" else ", random weights of this architecture"
        lines.append(
            f"  {speed.form:<14} {speed.images_per_s:,.2f} images/s, {speed.peak_memory_mb:,} MB, batch {speed.batch}, "
            f"{speed.device}{weights}"
        )
    if entry.results:
        lines += ["", "  measured, with 95% intervals:"]
    for result in entry.results:
        with_mllm = f", answers of {result.partner}" if result.partner else ""
        lines.append(
            f"  {result.task:<39} {result.metric:<17} {result.value:5.1f} [{result.ci95_low:.1f}, "
            f"{result.ci95_high:.1f}]  n {result.n}, layer {result.feature_layer}{with_mllm}"
        )
    lines += ["", f'  load: PivotVisionModel.from_pretrained("{entry.name}")']
    if entry.folder is None:
        lines += ["  make, where it is not on the Hub:", *(f"    {command}" for command in entry.commands)]
    return "\n".join(lines)


_STATUS: Mapping[Status, str] = {
    "shipped": "its weights ship with this package",
    "trained": "trained; its weights are made again by the commands below, or come from the Hub once published there",
    "planned": "planned, not trained yet: there are no weights and no results",
}


def _read(file: Path, kind: type[Any]) -> list[Any]:
    """Read a table as a list of dataclasses, whose fields are its columns."""
    types = {field.name: _TYPES.get(str(field.type), str) for field in fields(kind)}
    with file.open(newline="") as text:
        return [kind(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(text)]


_TYPES: Mapping[str, type[Any]] = {"int": int, "float": float}
