"""The committed cards of model_cards/, from the facts that are committed beside them.

`python -m tests.publish.cards [QUICKSTART]` writes them all; with the folder of a finished quickstart it takes the facts of the
built-in world's encoders from there first. A test holds files and facts together.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pivot_hub.config.recipe import RECIPES
from pivot_hub.files import whole_folder, write_whole
from pivot_hub.publish.card_inputs import CARDS, EncoderMetadata, read_metadata, read_prose
from pivot_hub.publish.card_render import FIGURE, card_files, render_plan

FACTS = CARDS / "facts"
TRAINED = ("shapes-base", "shapes-sft", "shapes-dpo")


def facts_of(name: str) -> EncoderMetadata:
    """Of an encoder of the built-in world; the base part's own files ship with the recipes."""
    if name != "shapes-base":
        return read_metadata(FACTS / name)
    results = [r for r in read_metadata(FACTS / "shapes-dpo").results if r.encoder == "base"]
    return EncoderMetadata(**{**vars(read_metadata(RECIPES / "shapes" / "base" / "vision")), "results": results})


def rendered() -> dict[str, bytes]:
    """Every committed card by its file's name, and the figure that the pair shares."""
    made = {}
    for file in sorted(CARDS.glob("*.yaml")):
        prose = read_prose(file.stem)
        if file.stem in TRAINED:
            files = card_files(facts_of(file.stem), prose)
            made[f"{file.stem}.md"] = files["README.md"]
            made |= {FIGURE: files[FIGURE]} if FIGURE in files else {}
        else:
            made[f"{file.stem}.md"] = render_plan(prose).encode()
    return made


def take_metadata(quickstart: Path) -> None:
    """Copy what the cards are made of, without weights, from a finished quickstart."""
    for name in TRAINED[1:]:
        with whole_folder(FACTS / name) as folder:
            source = quickstart / "hub" / "pivot" / name
            for file in ("config.json", "recipe.yaml", "provenance.json"):
                shutil.copyfile(source / file, folder / file)
            shutil.copytree(source / "results", folder / "results")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_metadata(Path(sys.argv[1]))
    for name, content in rendered().items():
        write_whole(CARDS / name, content)
