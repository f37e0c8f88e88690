"""Export encoder repositories with optimum-intel, and write what OpenVINO computes of their golden pixels.

`python openvino_export.py REPOSITORIES OUT` runs in a separate environment. For each repository that optimum-intel
knows it writes `OUT/<name>.npy`, the last hidden state, and for the others the reason into `OUT/reasons.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from optimum.exporters.openvino import main_export
from safetensors.numpy import load_file


def main() -> None:
    reasons = {}
    for repo in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
        exported = Path(sys.argv[2]) / repo.name
        try:
            main_export(str(repo), exported, task="feature-extraction")
        except ValueError as error:
            reasons[repo.name] = str(error).splitlines()[0]
            continue
        compiled = openvino.Core().compile_model(
            exported / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        outputs = compiled({"pixel_values": load_file(repo / "golden.safetensors")["pixel_values"]})
        np.save(exported.with_suffix(".npy"), outputs["last_hidden_state"])
    (Path(sys.argv[2]) / "reasons.json").write_text(json.dumps(reasons))


if __name__ == "__main__":
    main()
