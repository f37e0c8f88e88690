"""Load the towers of MLLMs by every loading path with whatever software this Python has.

`python tower_paths.py REPOSITORIES OUT.json [--package]` runs in a separate environment. Beside each repository lies
`<name>.safetensors` with the arguments of the native class, `argument.<name>`, and its features of them, `features`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel

FEATURES = ("last_hidden_state", "pooler_output")


def native(repo: Path, stored: dict[str, torch.Tensor]) -> float:
    """Load with plain AutoModel, without remote code, and compare what the native class returns."""
    model, info = AutoModel.from_pretrained(repo, output_loading_info=True)
    keys = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + list(info["mismatched_keys"])
    if keys:
        raise ValueError(f"{len(keys)} keys missing, unexpected or of another shape: {keys[0]}")
    arguments = {k.removeprefix("argument."): v for k, v in stored.items() if k.startswith("argument.")}
    pixels = arguments.pop("pixel_values")
    layer = model.config.pivot["feature_layer"]
    if isinstance(layer, str):
        features = model.eval()(pixels, **arguments).last_hidden_state
    else:
        features = model.eval()(pixels, output_hidden_states=True, **arguments).hidden_states[layer]
    return (features.float() - stored["features"]).abs().max().item()


def remote(repo: Path, stored: dict[str, torch.Tensor]) -> float:
    """Load with the code that the repository contains, and replay the golden vectors."""
    return _replay(AutoModel.from_pretrained(repo, trust_remote_code=True), repo)


def package(repo: Path, stored: dict[str, torch.Tensor]) -> float:
    """Load with the installed package, and replay the golden vectors."""
    from pivot_hub import PivotVisionModel

    return _replay(PivotVisionModel.from_pretrained(repo), repo)


def _replay(model: torch.nn.Module, repo: Path) -> float:
    golden = load_file(repo / "golden.safetensors")
    features = model(**{k: v for k, v in golden.items() if k not in FEATURES}).last_hidden_state
    if isinstance(features, tuple):
        features = torch.cat([one.flatten(0, 1) for one in features])
    return (features.float() - golden["last_hidden_state"]).abs().max().item()


def main() -> None:
    results: dict[str, dict[str, dict[str, float | str]]] = {}
    for repo in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
        stored = load_file(repo.with_suffix(".safetensors"))
        results[repo.name] = {}
        for load in (native, remote, *([package] if "--package" in sys.argv else [])):
            try:
                with torch.no_grad():
                    results[repo.name][load.__name__] = {"difference": load(repo, stored)}
            except Exception as error:  # it is written to the report, and the test judges it
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                reason = reason.replace(str(repo), repo.name)  # the folder is of one machine
                results[repo.name][load.__name__] = {"error": reason[:400]}
    report = {"versions": {"transformers": transformers.__version__}, "results": results}
    Path(sys.argv[2]).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
