"""All cards of `model_cards/`, rendered from the metadata that is recorded beside them in `model_cards/facts`."""

from __future__ import annotations

import shutil
from pathlib import Path

from pivot_hub.config.encoder_names import CARDS, shipped_encoder
from pivot_hub.errors import CardError
from pivot_hub.files import PACKAGE, write_whole
from pivot_hub.outputs import ENCODER, whole_folder
from pivot_hub.publish.card_inputs import EncoderMetadata, read_metadata, read_prose
from pivot_hub.publish.card_render import FIGURE, card_files, render_plan

RECORDED = CARDS / "facts"
TRAINED = ("shapes-base", "shapes-sft", "shapes-dpo")


def write_all_cards(quickstart: Path | None = None) -> list[str]:
    """Render every card of `model_cards/` in the source checkout, and write those that changed.

    Args:
        quickstart: Folder of a finished quickstart, whose metadata and results are recorded first.

    Returns:
        Names of the files that changed.

    Raises:
        CardError: There is no source checkout, the quickstart lacks a file, or a value of a card is missing.
    """
    if CARDS.parent == PACKAGE:
        raise CardError("--all writes model_cards/ of a source checkout: clone the repository, and run it there.")
    if quickstart is not None:
        _record_metadata(quickstart)
    changed = []
    for name, content in render_all_cards().items():
        if not (CARDS / name).is_file() or (CARDS / name).read_bytes() != content:
            write_whole(CARDS / name, content)
            changed.append(name)
    return changed


def render_all_cards() -> dict[str, bytes]:
    """Render every card by the name of its file, and the figure that the SFT and the DPO encoder share."""
    rendered = {}
    for file in sorted(CARDS.glob("*.yaml")):
        prose = read_prose(file.stem)
        if file.stem not in TRAINED:
            rendered[f"{file.stem}.md"] = render_plan(prose).encode()
            continue
        files = card_files(recorded_metadata(file.stem), prose)
        rendered[f"{file.stem}.md"] = files["README.md"]
        if FIGURE in files:
            rendered[FIGURE] = files[FIGURE]
    return rendered


def recorded_metadata(name: str) -> EncoderMetadata:
    """Read the recorded metadata of an encoder of the synthetic Shapes dataset.

    The base encoder's own files ship with the recipes; its results are recorded with those of the DPO encoder.
    """
    if (shipped := shipped_encoder(name)) is None:
        return read_metadata(RECORDED / name)
    results = [r for r in read_metadata(RECORDED / "shapes-dpo").results if r.encoder == "base"]
    return read_metadata(shipped).with_results(results)


def _record_metadata(quickstart: Path) -> None:
    """Copy the inputs of the cards, without weights, from a finished quickstart."""
    encoders = {name: quickstart / "hub" / "pivot" / name for name in TRAINED[1:]}
    for source in encoders.values():
        if not (source / "results").is_dir():
            raise CardError(f"{source} has no results: give the folder of a finished `pivot quickstart`.")
    for name, source in encoders.items():
        with whole_folder(RECORDED / name, ENCODER) as folder:
            for file in ("config.json", "recipe.yaml", "provenance.json"):
                shutil.copyfile(source / file, folder / file)
            shutil.copytree(source / "results", folder / "results")
