"""What a training step may ask of the device although the program waits for it: a list with a reason each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sync", "copy"]


@dataclass(frozen=True)
class Allowance:
    """What one file may cause in a step of one micro-batch.

    Args:
        kind: Synchronisations, or copies from the CPU to the device.
        file: End of the file's path.
        most: Largest number in a step.
        reason: Why it is allowed.
    """

    kind: Kind
    file: str
    most: int
    reason: str


WINDOWS = "sdpa attention of patches reads their lengths three times a layer; positions of rows that share no prompt"
ALLOWANCES = (
    Allowance("sync", "pivot_hub/training/part_trainer.py", 1, "the loss is checked once an optimizer step"),
    Allowance("sync", "trl/trainer/dpo_trainer.py", 18, "TRL's metrics of a micro-batch"),
    Allowance("sync", "trl/trainer/sft_trainer.py", 5, "TRL's metrics of a micro-batch"),
    Allowance("sync", "trl/trainer/utils.py", 8, "TRL's fused head selects positions; metrics; images by answer"),
    Allowance("sync", "transformers/utils/import_utils.py", 1, "LLaVA compares image tokens with image features"),
    Allowance("sync", "transformers/models/llava/modeling_llava.py", 2, "the text of that comparison's error"),
    Allowance("sync", "transformers/masking_utils.py", 2, "transformers looks whether a mask masks anything"),
    Allowance("sync", "the backward pass", 12, "gradients of masked selections: image features, scored positions"),
    # Answers that were generated are tensors of the device, and which of them share a prompt is decided on the CPU.
    Allowance("sync", "pivot_hub/training/group_layout.py", 4, "the answers, and whether images are the same"),
    Allowance("copy", "pivot_hub/training/group_layout.py", 5, "the answers of each prompt as one tree"),
    Allowance("copy", "pivot_hub/training/tree_layout.py", 4, "which tokens of these trees attend to which"),
    Allowance("sync", "pivot_hub/mllm/inputs.py", 16, "sizes of each prompt's images, for the positions of its tokens"),
    Allowance("sync", "trl/trainer/grpo_trainer.py", 8, "TRL's metrics of a micro-batch"),
    Allowance("copy", "trl/trainer/grpo_trainer.py", 1, "TRL's division of images without trees"),
    Allowance("sync", "trl/trainer/rloo_trainer.py", 8, "TRL's metrics of a micro-batch"),
    # Whole MLLMs. What the collator could compute instead would go to the GPU with the batch, and be read from there.
    Allowance("sync", "transformers/vision_utils.py", 8, "places of patches, from the sizes of the images"),
    Allowance("copy", "transformers/vision_utils.py", 2, "windows and places of patches, made on the CPU"),
    Allowance("sync", "models/qwen2_5_vl/modeling_qwen2_5_vl.py", 256, WINDOWS),
    Allowance("copy", "models/qwen2_5_vl/modeling_qwen2_5_vl.py", 5, "the order of windows, made on the CPU"),
    Allowance("copy", "the backward pass", 2, "gradients of Qwen2.5-VL's order of windows"),
    Allowance("sync", "models/qwen3_vl/modeling_qwen3_vl.py", 256, WINDOWS),
    Allowance("copy", "models/qwen3_vl/modeling_qwen3_vl.py", 1, "how far image positions shift those of the text"),
    Allowance("sync", "models/internvl/modeling_internvl.py", 1, "the text of the same comparison's error"),
    Allowance("sync", "models/smolvlm/modeling_smolvlm.py", 4, "SmolVLM takes black tiles for padding and drops them"),
    Allowance("sync", "models/gemma3/modeling_gemma3.py", 1, "the text of the same comparison's error"),
    Allowance("sync", "models/llava_onevision/modeling_llava_onevision.py", 24, "the tiles of each image, by its size"),
    Allowance("copy", "models/llava_onevision/modeling_llava_onevision.py", 1, "the number of each image's features"),
)


def verdicts(kind: Kind, counts: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Compare counts by place with the list.

    Args:
        kind: What was counted.
        counts: Number of synchronisations or copies of each place, `file:line`.

    Returns:
        The reason of each allowed place, and one problem for each file that causes more than it may.
    """
    reasons: dict[str, str] = {}
    problems = []
    by_file: dict[str, list[str]] = {}
    for place in counts:
        by_file.setdefault(place.partition(":")[0], []).append(place)
    for file, places in by_file.items():
        allowance = next((a for a in ALLOWANCES if a.kind == kind and file.endswith(a.file)), None)
        total = sum(counts[place] for place in places)
        if allowance is not None and total <= allowance.most:
            reasons |= dict.fromkeys(places, allowance.reason)
            continue
        lines = ", ".join(f"{place} ({counts[place]})" for place in places)
        what = "synchronisations" if kind == "sync" else "copies from the CPU"
        problems.append(f"{what}: {total}, allowed {allowance.most if allowance else 0}: {lines}")
    return reasons, problems
