"""The 16 benchmarks on a few rows each: lmms-eval's own task files and code, on data with the columns that they read.

The module needs an environment with lmms-eval and has three commands:

- `python -m tests.conformance.vqa_tasks write FOLDER` writes the data and the task files `tiny_<benchmark>`.
- `run OPTIONS` is lmms-eval's command line with the model `scripted`, whose answer is the row's column `reply`: of
  three rows, two have a right reply and the third a wrong one.
- `trim FROM TO` copies the part of such a run that the default suite reads. It leaves out the configuration, which
  contains file paths.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image

from pivot_hub.probes.vqa.benchmarks import BENCHMARKS
from pivot_hub.probes.vqa.lmms_model import TASKS, PivotMllm, main  # its import makes torchvision importable

from lmms_eval.models import MODEL_REGISTRY_V2  # isort: skip
from lmms_eval.models.registry_v2 import ModelManifest  # isort: skip
from lmms_eval.tasks import TaskManager  # isort: skip

ABCD = ["A", "B", "C", "D"]
IMAGES = [Image.effect_noise((48, 48), 60 + i).convert("RGB") for i in range(8)]


def image(i: int) -> Image.Image:
    return IMAGES[i % 8]


def mme(i: int) -> dict[str, Any]:
    category = ("existence", "count", "OCR", "code_reasoning")[i // 2 % 4]
    answer = ("Yes", "No")[i % 2]
    question = f"Is there a {category}? Please answer yes or no."
    return {"question_id": f"{category}/{i // 2}.png", "image": image(i), "question": question} | {
        "answer": answer,
        "category": category,
    }


def mmbench(i: int) -> dict[str, Any]:
    options = ["red", "green", "blue", "star"]
    turned = options[i % 2 :] + options[: i % 2]
    index = i // 2 + 1_000_000 * (i % 2)
    row = {"index": index, "question": "Which colour?", "hint": "nan", "answer": ABCD[turned.index("red")]}
    metadata = {"category": "attribute", "L2-category": "fine", "source": "s", "split": "dev", "image": image(i)}
    return row | dict(zip(ABCD, turned, strict=True)) | {"E": "nan"} | metadata


def seedbench(i: int) -> dict[str, Any]:
    kind = "video" if i % 4 == 3 else "image"
    choices = {f"choice_{c.lower()}": text for c, text in zip(ABCD, ("red", "green", "blue", "star"), strict=True)}
    images = [image(i), image(i + 1)] if kind == "video" else [image(i)]
    row = {"image": images, "question": "Which?", "answer": ABCD[i % 4], "question_id": str(i), "data_type": kind}
    return row | choices


def gqa(i: int) -> dict[str, Any]:
    return {"image": image(i), "question": "What is left?", "answer": ("star", "red")[i % 2], "imageId": str(i)}


def scienceqa(i: int) -> dict[str, Any]:
    row = {"question": "Which?", "choices": ["star", "circle"], "answer": i % 2, "hint": ("", "A hint.")[i % 2]}
    return row | {"image": image(i)}


def mmmu(i: int) -> dict[str, Any]:
    # Every second row has two images; every fourth is an open question, answered in words.
    several = i % 2
    question = "See <image 1> and <image 2>: which?" if several else "See <image 1>: which?"
    kind = "open" if i % 4 == 2 else "multiple-choice"
    row = {"id": f"validation_{('Art', 'Math')[i % 2]}_{i}", "question": question, "question_type": kind}
    answer = ("a star", "7.50")[i // 4 % 2] if kind == "open" else ABCD[i % 4]
    row |= {"options": str([] if kind == "open" else ["red", "green", "blue", "star"]), "answer": answer}
    return row | {f"image_{k}": image(i + k) if k <= 1 + several else None for k in range(1, 8)}


def mathvista(i: int) -> dict[str, Any]:
    kind = ("text", "integer", "float", "list")[i % 4]
    row = {"pid": str(i), "question": "How many?", "decoded_image": image(i), "unit": "cm" if i % 2 else None}
    answer = {"text": "star", "integer": "3", "float": "1.5", "list": "[1, 2]"}[kind]
    row |= {"question_type": "multi_choice" if kind == "text" else "free_form", "answer_type": kind, "answer": answer}
    return row | {"choices": ["red", "star"] if kind == "text" else None, "precision": 1.0 if kind == "float" else None}


def ai2d(i: int) -> dict[str, Any]:
    return {"image": image(i), "question": "Which?", "options": ["red", "star", "blue"], "answer": str(i % 3)}


def chartqa(i: int) -> dict[str, Any]:
    kind = ("human_test", "augmented_test")[i % 2]
    return {"image": image(i), "question": "How much?", "answer": ("3", "star")[i % 2], "type": kind}


def ocrbench(i: int) -> dict[str, Any]:
    kind = ("Regular Text Recognition", "Scene Text-centric VQA", "Handwritten Mathematical Expression Recognition")
    names = ("IIIT5K", "STVQA", "HME100k")
    row = {"image": image(i), "question": "What is written?", "question_type": kind[i % 3], "dataset": names[i % 3]}
    return row | {"answer": [("star", "red")[i % 2]]}


def textvqa(i: int) -> dict[str, Any]:
    row = {"image": image(i), "question": "what is written?", "question_id": i, "ocr_tokens": ["star"]}
    return row | {"answers": ["star"] * (i % 4) + ["red"] * (10 - i % 4)}


def docvqa(i: int) -> dict[str, Any]:
    return {"image": image(i), "question": "What?", "answers": ["a star", "star"][: 1 + i % 2], "questionId": str(i)}


def mmvp(i: int) -> dict[str, Any]:
    row = {"Index": i + 1, "Question": "Is it up?", "Options": "(a) yes (b) no", "image": image(i)}
    return row | {"Correct Answer": ("(a)", "(b)")[i % 2]}


def realworldqa(i: int) -> dict[str, Any]:
    question = "Which?\nA. red\nB. star\nPlease answer directly with only the letter of the correct option."
    return {"image": image(i), "question": question, "answer": ("A", "B", "2")[i % 3]}


def cv_bench(i: int) -> dict[str, Any]:
    source = ("ADE20K", "COCO", "Omni3D")[i // 4 % 3]
    row = {"idx": i, "type": "3D" if source == "Omni3D" else "2D", "task": "Count", "source": source}
    prompt = "How many?\n(A) 1\n(B) 2"
    return row | {"image": image(i), "choices": ["1", "2"], "prompt": prompt, "answer": ("(A)", "(B)")[i % 2]}


ROWS = {
    "mme": mme,
    "mmbench_en": mmbench,
    "mmbench_cn": mmbench,
    "seed_bench": seedbench,
    "gqa": gqa,
    "scienceqa": scienceqa,
    "mmmu": mmmu,
    "mathvista": mathvista,
    "ai2d": ai2d,
    "chartqa": chartqa,
    "ocrbench": ocrbench,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "mmvp": mmvp,
    "realworldqa": realworldqa,
    "cv_bench": cv_bench,
}


# The reply with the right answer, in a form that the benchmark's own rule must recognise.
RIGHT: dict[str, Callable[[dict[str, Any]], str]] = {
    "mme": lambda row: f"{row['answer']}.",
    "mmbench_en": lambda row: f"{row['answer']}. red",
    "mmbench_cn": lambda row: row["answer"],
    "seed_bench": lambda row: f"{row['answer']}.",
    "gqa": lambda row: row["answer"].capitalize(),
    "scienceqa": lambda row: f"{ABCD[row['answer']]}.",
    "mmmu": lambda row: f"The answer is ({row['answer']})" if row["question_type"] != "open" else f"is {row['answer']}",
    "mathvista": lambda row: "(B)" if row["choices"] else f"{row['answer']}",
    "ai2d": lambda row: f"{ABCD[int(row['answer'])]}. {row['options'][int(row['answer'])]}",
    "chartqa": lambda row: {"3": "3.1"}.get(row["answer"], row["answer"]),
    "ocrbench": lambda row: f"It says {row['answer'][0]}",
    "textvqa": lambda row: row["answers"][0],
    "docvqa": lambda row: row["answers"][-1],
    "mmvp": lambda row: row["Correct Answer"].upper(),
    "realworldqa": lambda row: f"{row['answer']}.",
    "cv_bench": lambda row: row["answer"],
}


class Scripted(PivotMllm):
    """A model that answers with the reply written in the row."""

    def __init__(self, batch_size: int = 1, device: str | None = None, max_batch_size: int | None = None) -> None:
        super(PivotMllm, self).__init__()

    def generate_until(self, requests: list[Any]) -> list[str]:
        rows = [(self.task_dict[task][split], row) for _, _, _, row, task, split in (r.args for r in requests)]
        return [data[row]["reply"] for data, row in rows]


def tiny_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Return rows of a benchmark with their replies, of which every third is wrong."""
    rows = [ROWS[name](i) for i in range(count)]
    return [row | {"reply": RIGHT[name](row) if i % 3 < 2 else "none of them"} for i, row in enumerate(rows)]


def write_tasks(folder: Path, count: int = 12) -> None:
    """Write each benchmark's task with only its data replaced, and lmms-eval's own MMBench task beside ours.

    Args:
        folder: Folder that the data and the task files are written to.
        count: Number of rows of each task.
    """
    index = TaskManager("WARNING", include_path=[str(TASKS)]).task_index
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {name: (name, b.task, b.split) for name, b in BENCHMARKS.items()}
    tasks["mmbench_static"] = ("mmbench_en", "mmbench_en_dev_static", "dev")
    for tiny, (name, original, split) in tasks.items():
        data = folder / f"{name}.parquet"
        datasets.Dataset.from_list(tiny_rows(name, count)).to_parquet(data)
        task = {
            "task": f"tiny_{tiny}",
            "include": index[original]["yaml_path"],
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data)}},
        }
        if name == "gqa":
            task["process_docs"] = None  # it would download the images
        (folder / f"{tiny}.yaml").write_text(yaml.safe_dump(task))


def trim_run(run: Path, target: Path) -> None:
    """Copy a run's scores and samples, without its configuration."""
    target.mkdir(parents=True, exist_ok=True)
    results = json.loads(next(run.rglob("*_results.json")).read_text())
    kept = {key: dict(sorted(results[key].items())) for key in ("results", "n-samples")}
    (target / "recorded_results.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    for log in sorted(run.rglob("*_samples_*.jsonl")):
        (target / f"recorded_samples_{log.name.partition('_samples_')[2]}").write_text(log.read_text())


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_tasks(Path(sys.argv[2]))
    elif sys.argv[1] == "trim":
        trim_run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.argv[1:2] = ["--model", "scripted"]
        path = "tests.conformance.vqa_tasks.Scripted"
        MODEL_REGISTRY_V2.register_manifest(ModelManifest("scripted", simple_class_path=path))
        main()
