"""Blocks of code without a reason not to be run are run, page by page, in a folder with what a quickstart leaves.

The models are those that ship with the package, so that nothing is trained first: shapes and results are those of the
pages.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from docs.generate.links import ROOT
from pivot_hub import PivotVisionModel
from pivot_hub.cli import app
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.model_bundle import STAGES
from pivot_hub.demo.packed_bundle import shipped_bundle
from pivot_hub.demo.view_state import PHOTO_FOLDER
from pivot_hub.encoder.repository import write_repository
from pivot_hub.provenance import write_manifest
from tests.command_lines import pivot_arguments
from tests.data.test_pairs import coco, draw_photos
from tests.docs.blocks import RUN_PAGES, Block, run_blocks

LONG = {
    "docs/tutorials/preference-data.md": pytest.mark.slow,
    "docs/tutorials/grpo.md": pytest.mark.slow,
    "docs/how-to/plan.md": pytest.mark.nightly,
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pivot quickstart` leaves: MLLMs in `runs/shapes`, encoders in `hub/pivot`."""
    folder = tmp_path_factory.mktemp("documented") / "quickstart"
    bundle = shipped_bundle()
    members = {"parent": bundle.parent, "sft": bundle.first, "dpo": bundle.second}
    for role, stage in STAGES.items():
        member = members[role]
        assert member is not None
        run = folder / "runs" / "shapes" / Path(stage).name
        member.model.save_pretrained(run)
        member.processor.save_pretrained(run)
        stored = {"name": f"shapes/{Path(stage).name}", "stage": role if role != "parent" else "instruct"}
        write_manifest(run, stored)
        if role != "parent":
            pivot = {"stage": role, "prefix_tokens": 0}
            encoder = PivotVisionModel.from_mllm(member.model, pivot, member.processor.image_processor)
            write_repository(folder / "hub" / "pivot" / f"shapes-{role}", encoder, {"source": "a quickstart"})
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader brings: a photograph, a folder of photographs, labelled ones, and preference pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    photo = Image.open(PHOTO_FOLDER / "cat.webp").convert("RGB")
    photo.save(folder / "cat.jpg")
    (folder / "photos").mkdir()
    for number in range(4):
        photo.rotate(90 * number).resize((80, 60)).save(folder / "photos" / f"{number:02}.png")
    coco(folder / "labelled.json", draw_photos(folder / "labelled"))
    (folder / "labelled.json").rename(folder / "labelled" / "instances.json")
    _write_pairs(folder / "mine")
    return folder


@pytest.fixture
def here(quickstart: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the quickstart and the reader's files."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "quickstart").symlink_to(quickstart)
    for shipped in ("recipes", "model_cards"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write_pairs(folder: Path) -> None:
    """Write preference pairs about scenes, in the form of the page on preference data."""
    (folder / "images").mkdir(parents=True)
    dataset = ShapesDataset()
    lines = []
    for number in range(16):
        scene = dataset.scene("train", number)
        scene.render().image.save(folder / "images" / f"{number}.png")
        right = scene.objects[0].colour
        wrong = "red" if right != "red" else "blue"
        question = f"What colour is the {scene.objects[0].shape}?"
        row = {"id": str(number), "image": f"{number}.png", "question": question}
        lines.append({**row, "chosen": f"It is {right}.", "rejected": f"It is {wrong}."})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(block: Block, names: dict[str, Any]) -> None:
    """Run Python in the page's namespace, each `pivot` command, both sides of a diff; write the file a block names."""
    first = block.text.partition("\n")[0]
    if first.startswith("# ") and first.endswith((".yaml", ".py")):
        Path(first[2:]).parent.mkdir(exist_ok=True)
        Path(first[2:]).write_text(block.text)
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
    elif block.language == "diff":
        for side in "-+":
            lines = [line[2:] for line in block.text.splitlines() if line[:1] in (" ", side)]
            exec(compile("\n".join(lines), str(block), "exec"), names)
    elif block.language == "bash":
        commands = pivot_arguments(block.text)
        written = [line for line in block.text.splitlines() if line.strip() and not line.startswith("#")]
        assert len(commands) == len(written), f"{block}: only `pivot` commands are run"
        for arguments in commands:
            ended = CliRunner().invoke(app, arguments)
            assert ended.exit_code == 0, (arguments, ended.output, ended.exception)


def check_use(names: dict[str, Any]) -> None:
    assert type(names["native"]).__name__ == "SiglipVisionModel"
    assert type(names["encoder"]).__name__ == type(names["remote"]).__name__ == "PivotVisionModel"
    assert names["features"].last_hidden_state.shape == (1, 64, 96)
    assert names["mllm"].vision_config.model_type == "siglip_vision_model"
    assert names["segmenter"].eval()(names["pixels"]).logits.shape == (1, 150, 64, 64)
    assert PivotVisionModel.from_pretrained("my-encoder").config.pivot == names["encoder"].config.pivot


def check_readme(names: dict[str, Any]) -> None:
    assert names["features"].last_hidden_state.shape == names["tokens"].shape == (1, 64, 96)


def check_reward(names: dict[str, Any]) -> None:
    answers = ["Red.", [{"role": "assistant", "content": "blue"}]]
    assert names["short"](answers, ["red", "red"], id=[0, 1]) == [1.0, 0.0]


CHECKS = {"docs/how-to/use-an-encoder.md": check_use, "README.md": check_readme, "docs/tutorials/grpo.md": check_reward}


@pytest.mark.parametrize("page", [pytest.param(page, marks=LONG.get(page, ())) for page in RUN_PAGES])
def test_a_pages_blocks_run(page: str, here: Path) -> None:
    names: dict[str, Any] = {}
    if page == "README.md":  # the diff there is of code that has an image already
        names["pixels"] = torch.zeros(1, 3, 64, 64)
    for block in run_blocks(page):
        run(block, names)
    if page in CHECKS:
        CHECKS[page](names)


def test_the_pages_with_checks_are_run() -> None:
    assert set(CHECKS) | set(LONG) <= set(RUN_PAGES)
    assert len(RUN_PAGES) >= 12
