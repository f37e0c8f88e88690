"""On-policy pairs of a study: the rejected answers are the wrong ones that a run's own MLLM gave."""

from __future__ import annotations

import json
from pathlib import Path

from pivot_hub.config.data_section import ShapesData
from pivot_hub.data.source import ShapesSource
from pivot_hub.encoder.device import compute_device
from pivot_hub.files import write_json
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.sampling import sample_answers
from pivot_hub.provenance import weights_sha256
from pivot_hub.training.rewards import exact_match

BATCH = 64  # questions in one forward pass


def write_wrong_answers(checkpoint: Path, spec: ShapesData, file: Path) -> None:
    """Let an MLLM answer each question of a source once, at temperature 1, and write its wrong answers.

    The seed of an answer is the number of its scene. A file that the same weights wrote for the same source is kept.

    Args:
        checkpoint: Folder of the MLLM.
        spec: Source of the pairs; its questions are those of content `questions` about the same scenes.
        file: JSON file with `weights_sha256` of the MLLM, the `source`, and `answers`, the wrong answers by the number
            of their scene. Empty answers, and those not complete after 32 tokens, are left out.
    """
    questions = spec.model_copy(update={"content": "questions", "wrong_answers": None})
    asked = {"weights_sha256": weights_sha256(checkpoint), "source": questions.model_dump(mode="json")}
    if file.is_file():
        earlier = json.loads(file.read_text())
        if {key: earlier.get(key) for key in asked} == asked:
            return
    model, processor = load_mllm(checkpoint)
    model.to(compute_device()).eval()  # type: ignore[arg-type]
    source = ShapesSource(questions)
    rows = [row for row in source.rows() if not isinstance(row, Exception)]
    answers: dict[str, str] = {}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        scenes = [int(row.id.split("/")[1]) for row in part]
        images = [source.open_image(row) for row in part]
        sampled = sample_answers(model, processor, [row.prompt for row in part], images, scenes, answers=1)
        for scene, row, (answer,) in zip(scenes, part, sampled, strict=True):
            if answer and exact_match([answer], solution=[row.chosen], prompts=[row.prompt]) == [0.0]:
                answers[str(scene)] = answer
    write_json(file, {**asked, "answers": answers})
