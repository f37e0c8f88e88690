"""The two encoders that ship with the page without a server, exported from the model bundle that ships with the Space.

They are made again, after the bundle changed, by `python -m pivot_hub.demo.browser_models`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pivot_hub.demo.packed_bundle import SHIPPED_NAME, shipped_bundle
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.export import export_encoder
from pivot_hub.encoder.repository import write_repository
from pivot_hub.files import shipped_folder
from pivot_hub.outputs import scratch_folder

MODELS = shipped_folder("spaces") / "browser" / "models"
FILES = ("onnx/model.onnx", "preprocessor_config.json")  # all that the page reads
ROLES = {"shapes-sft": "sft", "shapes-dpo": "dpo"}


def shipped_encoders() -> dict[str, PivotVisionModel]:
    """Load the encoders of the shipped model bundle, by the names that the page gives them."""
    bundle = shipped_bundle()
    members = {"sft": bundle.first, "dpo": bundle.second}
    return {
        name: PivotVisionModel.from_mllm(
            members[role].model, {"stage": role, "prefix_tokens": 0}, members[role].processor.image_processor
        )
        for name, role in ROLES.items()
    }


def export_shipped_encoders(models: Path = MODELS, log: Callable[[str], None] = print) -> None:
    """Export the encoders of the shipped model bundle to ONNX, for the page without a server.

    Args:
        models: Folder that receives `NAME/onnx/model.onnx` and `NAME/preprocessor_config.json` for each encoder.
        log: Function that is called with each line of progress.

    Raises:
        ExportError: A package is missing, or the exported features differ from torch's.
    """
    for name, encoder in shipped_encoders().items():
        with scratch_folder("pivot-browser") as folder:
            source = write_repository(folder / name, encoder, {"source": SHIPPED_NAME})
            export_encoder(source, folder / "export", log=lambda line, name=name: log(f"{name}: {line}"))  # type: ignore[misc]
            for file in FILES:
                (models / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / "export" / file, models / name / file)


if __name__ == "__main__":
    export_shipped_encoders()
