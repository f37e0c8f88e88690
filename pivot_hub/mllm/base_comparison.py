"""Compare the vision tower of somebody else's MLLM with that of the base model that its card names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.any_tower import public_name, read_tower, same_model, tower_of_part
from pivot_hub.mllm.diff import compare_towers
from pivot_hub.mllm.vision_part import VisionPart


def base_comparison(
    part: VisionPart, base_model: Any, revision: str | None = None, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compare an MLLM's vision tower with that of its base model, where that can be read.

    Args:
        part: The MLLM's vision tower, as it was read for extraction.
        base_model: What the card says of the base model: a name, a list of names, or nothing.
        revision: Revision of the MLLM's Hub repository.
        log: Function that receives one line: what was found, or why nothing was compared. It is not called where the
            card names no base model.

    Returns:
        Entries of a provenance: `base_comparison` with base_model, base_revision, frozen, changed_blocks, blocks and
        relative_change; or None under that name, with `base_comparison_reason`.
    """
    names = base_model if isinstance(base_model, list) else [base_model]
    names = [name for name in names if name]
    if not names:
        return _not_compared("its card names no base model")
    if len(names) > 1 or not isinstance(names[0], str):
        reason = f"its card names {len(names)} base models" if len(names) > 1 else "its card names no single base model"
        log(f"not compared with a base model: {reason}")
        return _not_compared(reason)
    base = names[0]
    shown = public_name(base)
    # The card of a stranger's repository names no folder of this machine.
    if Path(base).is_dir() and not Path(part.weights.name).is_dir():
        log(f"not compared with its base model {shown}: its card names a folder")
        return _not_compared(f"{shown}: its card names a folder")
    if same_model(base, part.weights.name, None, revision):
        log(f"not compared with {shown}: its card names the model itself")
        return _not_compared("its card names the model itself as its base")
    try:
        tower = read_tower(base)
        diff = compare_towers(tower, tower_of_part(part, revision))
    except (CheckpointError, HfHubHTTPError, *LOADING_ERRORS) as error:
        problem = str(error) if isinstance(error, CheckpointError) else loading_problem(base, error)
        # Names of folders are recorded without their paths.
        for name in (base, part.weights.name):
            problem = problem.replace(name, public_name(name))
        reason = problem.removeprefix(f"{shown}: ").rstrip(".")
        log(f"not compared with its base model {shown}: {reason}")
        return _not_compared(f"{shown}: {reason}")
    if diff.frozen:
        types = "" if diff.a["dtype"] == diff.b["dtype"] else f" in {diff.dtype}"
        log(f"the vision tower is frozen: it equals that of {shown}{types}, so this encoder is {shown}'s")
    else:
        log(f"compared with {shown}: {diff.summary()}")
    comparison = {
        "base_model": shown,
        "base_revision": tower.revision,
        "frozen": diff.frozen,
        "changed_blocks": diff.changed_blocks,
        "blocks": len(diff.blocks),
        "relative_change": diff.relative_change,
    }
    return {"base_comparison": comparison}


def _not_compared(reason: str) -> dict[str, Any]:
    return {"base_comparison": None, "base_comparison_reason": reason}
