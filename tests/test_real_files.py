"""Commands on files from other projects: photographs, captions and preference pairs in the published formats.

The files are not part of the project and are not redistributed; without them the tests are skipped with a reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pivot_hub import PivotVisionConfig
from pivot_hub.data.boxes_and_masks import read_annotated_images
from pivot_hub.data.llava import parse_conversation
from pivot_hub.data.mmpr_meta import read_meta
from pivot_hub.data.pairs import PairOptions, write_pairs
from pivot_hub.data.preference import parse_vlfeedback_pair
from pivot_hub.data.row import Row, read_records
from pivot_hub.data.source import example
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import DataError
from pivot_hub.mllm.chat_templates import QWEN
from pivot_hub.training.conversation import ConversationCollator
from tests.conftest import make_language
from tests.data.test_formats import index_of, png
from tests.encoder.originals import make_vision
from tests.training.test_conversation import processor_with

REAL = Path(os.environ.get("PIVOT_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"real files are not here: {REAL.name} (set PIVOT_REAL_DATA)")

HUB = REAL / "hub"

ALIGN = """
stage: align
model: {vision: base/vision, language: base/language}
learning_rate: {projector: 1.0e-3}
data: [{format: llava, path: captions.json, images: images}]
on_bad_row: skip
"""
INSTRUCT = """
stage: instruct
parent: 1-align.yaml
learning_rate: {vision: 1.0e-4, projector: 1.0e-3, language: 1.0e-3}
data: [{format: llava, path: captions.json, images: images, sample: 64}]
on_bad_row: skip
"""
DPO = """
stage: dpo
parent: 2-instruct.yaml
learning_rate: {vision: 1.0e-5, projector: 1.0e-5, language: 1.0e-5}
data: [{format: mmpr, path: pairs.jsonl, images: vqa, sample: 64}]
on_bad_row: skip
"""
ARGS = "args: {num_train_epochs: 1, per_device_train_batch_size: 16, max_length: 768, gradient_checkpointing: false}\n"


def _captions(images: Path) -> list[dict[str, object]]:
    """Write caption rows in LLaVA's format from COCO's panoptic annotations."""
    file = next((REAL / "coco128" / "panoptic_segmentation" / "annotations").rglob("*.json"), None)
    assert file is not None
    panoptic = json.loads(file.read_text())
    names = {c["id"]: c["name"] for c in panoptic["categories"]}
    labels = {a["image_id"]: [names[s["category_id"]] for s in a["segments_info"]] for a in panoptic["annotations"]}
    rows: list[dict[str, object]] = []
    for image in panoptic["images"]:
        if (images / image["file_name"]).is_file() and labels.get(image["id"]):
            caption = f"A photograph of {', '.join(sorted(set(labels[image['id']])))}."
            turns = [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": caption}]
            rows.append({"id": str(image["id"]), "image": image["file_name"], "conversations": turns})
    return rows


def _pairs() -> list[dict[str, str]]:
    """Write preference rows in MMPR's format from BLINK: the right option is chosen, a wrong one is rejected."""
    rows = []
    for request in sorted((REAL / "vqa").rglob("request.json")):
        stored = json.loads(request.read_text())
        options = re.findall(r"^(\([A-Z]\)) (.+)$", stored["query"], re.MULTILINE)
        right = next((f"{k} {v}" for k, v in options if k.casefold() == stored["answer"].casefold()), None)
        wrong = next((f"{k} {v}" for k, v in options if k.casefold() != stored["answer"].casefold()), None)
        image = request.parent / Path(stored["images"][0]).name
        if right and wrong and image.is_file():
            question = re.sub(r"<img src=[^>]*>\s*", "<image>\n", stored["query"])
            name = str(image.relative_to(REAL / "vqa"))
            rows.append({"image": name, "question": question, "chosen": right, "rejected": wrong})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write recipes, small random parts and annotation files with bad rows among the good ones."""
    root = tmp_path_factory.mktemp("real")
    recipes = root / "photos"
    make_vision(recipes / "base" / "vision")
    make_language(recipes / "base" / "language")
    images = recipes / "images"
    images.mkdir()
    for file in (REAL / "coco128" / "images" / "train2017").iterdir():
        (images / file.name).symlink_to(file)
    first = next(images.glob("*.jpg"))
    with Image.open(first) as image:
        image.convert("P").save(images / "palette.png")
        image.convert("RGBA").save(images / "alpha.png")
    (images / "corrupt.jpg").write_bytes(first.read_bytes()[:2000])
    captions = _captions(images)
    turns = captions[0]["conversations"]
    assert isinstance(turns, list)
    captions += [{"id": n, "image": n, "conversations": turns} for n in ("palette.png", "alpha.png")]
    captions += [{"id": n, "image": n, "conversations": turns} for n in ("corrupt.jpg", "missing.jpg")]
    empty = [turns[0], {"from": "gpt", "value": ""}]
    captions.append({"id": "empty", "image": captions[0]["image"], "conversations": empty})
    (recipes / "captions.json").write_text(json.dumps(captions))
    (recipes / "vqa").symlink_to(REAL / "vqa")
    (recipes / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _pairs()))
    for name, text in (("1-align", ALIGN), ("2-instruct", INSTRUCT), ("3-dpo", DPO)):
        (recipes / f"{name}.yaml").write_text(text.lstrip() + ARGS)
    return root


def pivot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pivot_hub", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_path_from_photographs_to_a_probed_encoder(folder: Path) -> None:
    reports = {}
    for stage in ("1-align", "2-instruct", "3-dpo"):
        done = pivot(folder, "train", f"photos/{stage}.yaml", "--json", f"{stage}.json")
        assert done.returncode == 0, done.stderr
        reports[stage] = json.loads((folder / f"{stage}.json").read_text())
    data = reports["1-align"]["data"]
    assert data["skipped_rows"] == 3
    skipped = " ".join(data["skipped"])
    for reason in ("corrupt.jpg cannot be decoded", "missing.jpg does not exist", "the answer is empty"):
        assert reason in skipped
    assert {"RGB", "L", "P", "RGBA"} <= set(data["image_modes"])
    assert reports["3-dpo"]["data"]["rows"] == 64

    assert pivot(folder, "extract", "runs/photos/3-dpo", "hub/photos-dpo").returncode == 0
    assert pivot(folder, "verify", "hub/photos-dpo").returncode == 0
    for data_folder in ("caltech101", "tinyimagenet/train"):
        classes = folder / Path(data_folder).parts[0]
        for label in sorted((REAL / "classification" / data_folder).iterdir())[:5]:
            target = classes / label.name
            target.mkdir(parents=True)
            for file in sorted(p for p in label.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:20]:
                shutil.copy(file, target / file.name)
        done = pivot(folder, "probe", "hub/photos-dpo", "--data", str(classes), "--json", f"{classes.name}.json")
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / f"{classes.name}.json").read_text())[0]
        assert result["n"] == 20
        assert result["ci95"][0] <= result["value"] <= result["ci95"][1]


def test_a_bad_row_stops_by_default(folder: Path) -> None:
    done = pivot(folder, "train", "photos/1-align.yaml", "on_bad_row=stop", "--output", "stopped")
    assert done.returncode == 2
    assert re.search(r"captions\.json:\d+: image .*corrupt\.jpg cannot be decoded", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (folder / "stopped").exists()
    assert not (folder / "stopped.partial").exists()


@pytest.mark.parametrize(
    ("name", "native", "size"),
    [
        ("siglip2-base-patch16-512", {"model_type": "siglip_vision_model", "image_size": 512}, 512),
        ("clip-vit-large-patch14-336", {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}, 336),
        ("dinov2-base", {"model_type": "dinov2", "image_size": 224, "patch_size": 14}, 224),
    ],
)
def test_published_processors_prepare_photographs(name: str, native: dict[str, Any], size: int, tmp_path: Path) -> None:
    """SigLIP2's config has no sizes, CLIP's processor gives its size as a number, and DINOv2's processor crops."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(AutoConfig.for_model(**{**native, **small})).save_pretrained(tmp_path)
    shutil.copyfile(HUB / name / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    encoder, processor = read_encoder(tmp_path)
    photographs = sorted((REAL / "coco128" / "images").rglob("*.jpg"))[:4]
    images = [Image.open(p).convert(mode) for p, mode in zip(photographs, ("RGB", "L", "RGBA", "P"), strict=True)]
    assert processor(images=images[0], return_tensors="pt")["pixel_values"].shape == (1, 3, size, size)
    with torch.no_grad():
        features = encoder.forward_features(images)
    assert features.last_hidden_state.shape == (4, (size // encoder.config.patch_size) ** 2, 32)
    assert features.last_hidden_state.isfinite().all()


def test_siglip2s_own_config_gives_its_published_size(tmp_path: Path) -> None:
    config = PivotVisionConfig.from_pretrained(HUB / "siglip2-base-patch16-512")
    assert (config.image_size, config.patch_size, config.hidden_size) == (512, 16, 768)
    with torch.device("meta"):
        feature_map = AutoModel.from_config(config).feature_map(torch.empty(1, 3, 512, 512))
    assert feature_map.shape == (1, 768, 32, 32)


def test_mmprs_own_meta_file_is_read(tmp_path: Path) -> None:
    """The published file has two sources, a trailing comma, and paths below the folder that holds MMPR-v1.2."""
    published = REAL / "formats" / "internvl_meta" / "mmpr_v1.2_debug_mpo.json"
    shutil.copyfile(published, tmp_path / "meta.json")
    spec = "{format: mmpr, path: meta.json, images: .}"
    with pytest.raises(DataError, match="does not exist; `images` is the folder its paths"):
        index_of(tmp_path, spec, "dpo")
    folder = tmp_path / "MMPR-v1.2" / "annotations"
    folder.mkdir(parents=True)
    row = {"image": "a.png", "question": "?", "chosen": "A", "rejected": "B"}
    for name, count in (("correctness", 529), ("format", 201)):
        file = folder / f"m3cot_train_extracted_pairs_vqa_{name}_rules.jsonl"
        file.write_text((json.dumps(row) + "\n") * count)
    # The images stay packed, in an archive with the name of their folder.
    with zipfile.ZipFile(tmp_path / "MMPR-v1.2" / "images.zip", "w") as archive:
        archive.writestr("images/M3CoT/a.png", png(0))
    index = index_of(tmp_path, spec, "dpo")
    rows = list(index.rows())
    assert len(rows) == 730
    assert {(r.image, r.archive) for r in rows} == {("MMPR-v1.2/images/M3CoT/a.png", "MMPR-v1.2/images.zip")}
    assert index.report.duplicates == 730 - 1


@pytest.mark.parametrize("file", sorted((REAL / "formats" / "internvl_meta").glob("*.json")), ids=lambda f: f.stem)
def test_every_real_meta_file_is_understood(file: Path) -> None:
    sources = read_meta(file)
    assert sources
    assert all(s.annotation.endswith(".jsonl") and s.length and s.repeat_time >= 1 for s in sources)


def test_mdpos_own_rows_are_pairs_without_vicunas_frame() -> None:
    file = REAL / "formats" / "mdpo_vlfeedback" / "data" / "sample_data.json"
    rows = [parse_vlfeedback_pair(n, r) for n, r in read_records(file) if isinstance(r, dict)]
    assert len(rows) > 1
    for row in rows:
        assert isinstance(row, Row)
        assert row.prompt.startswith("<image>\n")
        assert "USER" not in row.prompt
        assert "ASSISTANT" not in row.prompt


def test_llama_factorys_conversations_are_read() -> None:
    file = REAL / "formats" / "llamafactory" / "data" / "mllm_demo.json"
    rows = [parse_conversation(n, r) for n, r in read_records(file) if isinstance(r, dict)]
    assert [type(row).__name__ for row in rows].count("DataError") == 2  # the rows of two images
    folder = file.parent
    assert all((folder / r.image).is_file() for r in rows if isinstance(r, Row) and r.image)


def test_prompts_are_the_authors_token_for_token() -> None:
    """The ids were looked up by hand in the vocabulary of Qwen2.5's own tokenizer; 151655 is the image token."""
    tokenizer = AutoTokenizer.from_pretrained(HUB / "qwen2.5-vl-7b-instruct")
    processor = processor_with(tokenizer, QWEN)
    start, end, newline, image = 151644, 151645, 198, [151655] * 4
    system = [start, 8948, newline, 2610, 525, 264, 10950, 17847, 13, end, newline]  # You are a helpful assistant.
    question = [start, 872, newline, *image, newline, 3838, 374, 432, 5267, 16141, 304, 825, 3409, 13, end, newline]
    header, cat = [start, 77091, newline], [26801, end, newline]
    again = [start, 872, newline, 10234, 30, 220, end, newline]  # "Why? " with its trailing space
    because = [2132, 702, 271, 1312, 3187, 388, 624, end, newline]  # "It has\n\nwhiskers.\n"
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?\nAnswer in one word."},
        {"from": "gpt", "value": "Cat"},
        {"from": "human", "value": "Why? "},
        {"from": "gpt", "value": "It has\n\nwhiskers.\n"},
    ]
    row = parse_conversation("a:1", {"image": "a.jpg", "conversations": turns})
    assert isinstance(row, Row)
    images = [Image.new("RGB", (8, 8))]
    whole = [*system, *question, *header, *cat, *again, *header, *because]
    no = -100
    kept = {start, end, newline}
    expected_labels = {
        None: [
            *[no] * len([*system, *question, *header]),
            *cat,
            *[no] * len([*again, *header]),
            *because,
        ],
        # preprocess_qwen of LLaVA-NeXT: all tokens of gpt turns, but only the markers and newlines of the others.
        "llava_next": [
            *[t if t in kept else no for t in [*system, *question]],
            *header,
            *cat,
            *[t if t in kept else no for t in again],
            *header,
            *because,
        ],
    }
    for labels, expected in expected_labels.items():
        collator = ConversationCollator(processor, 2048, labels)  # type: ignore[arg-type]
        batch = collator([example(images, row, "conversation", processor.image_token)])
        assert batch["input_ids"][0].tolist() == whole
        assert batch["labels"][0].tolist() == expected
    caption = {"from": "gpt", "value": "a red  bus"}
    row = parse_conversation("a:1", {"image": "a.jpg", "conversations": [turns[0], caption]})
    assert isinstance(row, Row)
    # The plain format has the image, then the caption and a newline, which are learnt. It leaves out the question.
    batch = ConversationCollator(processor, 2048)([example(images, row, "plain", processor.image_token)])
    assert batch["input_ids"][0].tolist() == [*image, 64, 2518, 220, 5828, newline]
    assert batch["labels"][0].tolist() == [*[no] * 4, 64, 2518, 220, 5828, newline]


def test_regions_of_three_formats_agree() -> None:
    """COCO128's boxes, polygons and id masks, each with their own ids, show the same objects in the same places."""
    coco = REAL / "coco128"
    boxed, _ = read_annotated_images(coco, boxes=coco / "object_detection" / "labels")
    drawn, left_out = read_annotated_images(coco, boxes=coco / "instance_segmentation" / "labels", on_bad_row="skip")
    masked, _ = read_annotated_images(coco, masks=coco / "semantic_segmentation" / "masks", ignore=(0, 255))
    assert (len(boxed), len(drawn), len(masked)) == (126, 98, 100)
    assert sum("is empty" in reason for reason in left_out) == 2
    boxes, masks = ({p.name: p.regions for p in labelled} for labelled in (boxed, masked))
    inside, overlap = [], []
    for item in drawn:
        for name, region in item.regions.items():
            polygon, box, mask = region(), boxes[item.name][name](), masks[item.name][name]()
            inside.append((polygon & box).sum() / polygon.sum())
            overlap.append((polygon & mask).sum() / (polygon | mask).sum())
    assert np.mean(inside) > 0.98
    assert np.mean(overlap) > 0.9
    # The same labels with the names of another folder: an id is unknown there, or names another class.
    with pytest.raises(DataError, match=r"txt, line \d+: class id 45 has no name in .*instance_segmentation"):
        read_annotated_images(
            coco,
            boxes=coco / "object_detection" / "labels",
            names=coco / "instance_segmentation" / "config.yaml",
        )


def test_photographs_and_questions_become_preference_rows(tmp_path: Path) -> None:
    """COCO128's boxes and BLINK's options give rows whose text tells nothing, and edited images beside them."""
    coco = REAL / "coco128"
    options = PairOptions(
        boxes=coco / "object_detection" / "labels", counterfactuals=("erase", "crop", "mirror"), limit=40
    )
    report = write_pairs(coco, tmp_path / "coco", options)
    # Few photographs have two objects that compare in size, and those that are mirrored are not asked about twice.
    assert {sum(n.values()) for group, n in report.rows.items() if group not in ("size", "position")} == {40}
    assert report.skipped == 2
    questions = [json.loads(request.read_text()) for request in sorted((REAL / "vqa").rglob("request.json"))]
    with (tmp_path / "vqa.jsonl").open("w") as file:
        for stored in questions:
            image = Path(stored["images"][0]).relative_to("../tasks").as_posix()
            question = re.sub(r"<img src=[^>]*>", "", stored["query"])
            file.write(json.dumps({"image": image, "question": question, "answer": stored["answer"]}) + "\n")
    report = write_pairs(REAL / "vqa", tmp_path / "vqa", PairOptions(questions=tmp_path / "vqa.jsonl"))
    assert sum(report.rows["option"].values()) > 200
    assert report.blind[0].accuracy_pct is not None
    assert report.blind[0].accuracy_pct < 60
