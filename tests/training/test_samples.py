"""Samples of grpo and rloo runs, their page, and the guards against reward hacking."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState

from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import TrainingError
from pivot_hub.training import rewards
from pivot_hub.training.grpo import PivotGRPOConfig, PivotRLOOConfig
from pivot_hub.training.reward_guards import WINDOW, RewardGuards, form_warning
from pivot_hub.training.samples import IMAGE_PX, MOST_CHARACTERS, MOST_STEPS, PROMPTS, Samples
from pivot_hub.training.samples_page import MOST_POINTS, samples_page
from pivot_hub.training.stage import run_stage
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import add_processor
from tests.training.test_groups import RECIPE

NAN = float("nan")
ARGUMENTS: Any = None  # which the callbacks do not read
CONTROL = TrainerControl()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a finished run of each stage: two steps on answers of two generation batches."""
    folder = tmp_path_factory.mktemp("samples")
    make_mllm(folder / "mllm", "internvl")
    add_processor(folder / "mllm", "internvl")
    runs = {}
    for stage in ("grpo", "rloo"):
        recipe = folder / f"{stage}.yaml"
        recipe.write_text(f"stage: {stage}{RECIPE}")
        args = ("max_steps=2", "steps_per_generation=1", "beta=0.05", "log_completions=true")
        loaded = load_recipe(recipe, [*(f"args.{each}" for each in args), "args.num_completions_to_print=1"])
        runs[stage] = run_stage(loaded, folder, folder / stage, log=lambda line: None)
    return runs


class Page(HTMLParser):
    """What a page shows: the cells of the rows of its tables, the sources of its images, its texts and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.is_in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.is_in_cell = False

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
        if self.is_in_cell:
            self.rows[-1][-1] += data

    def answers(self) -> list[list[str]]:
        """The rows of answers, the header of each table left out."""
        return [[cell.strip() for cell in row] for row in self.rows if row[0] != "answer"]


def state(step: int = 0, max_steps: int = 10, history: Sequence[dict[str, Any]] = ()) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, log_history=list(history))


COMMON = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "entropy", "kl",
    "reward", "reward_std", "frac_reward_zero_std",
    *(f"rewards/{name}/{of}" for name in ("exact_match", "variety") for of in ("mean", "std")),
    *(f"completions/{which}_{of}" for which in ("mean", "min", "max") for of in ("length", "terminated_length")),
    "completions/clipped_ratio",
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_metrics_of_a_run_are_those_of_trl(stage: str, finished: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (finished[stage] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert [set(line) for line in lines[:2]] == [COMMON, COMMON]


def test_the_page_shows_what_trl_logs_of_the_answers(finished: dict[str, Path]) -> None:
    tables = [pd.read_parquet(file) for file in sorted((finished["grpo"] / "completions").iterdir())]
    expected = [
        [
            row.completion[0]["content"].strip() or "(empty)",
            f"{row.exact_match:.3g}",
            f"{row.variety:.3g}",
            f"{row.exact_match + 0.1 * row.variety:.3g}",
            f"{row.advantage:+.2f}" if row.advantage else "0",
        ]
        for table in reversed(tables)  # the newest step comes first
        for row in table.itertuples()
    ]
    assert len(expected) == 2 * 4
    assert Page((finished["grpo"] / "samples.html").read_text()).answers() == expected
    files = json.loads((finished["grpo"] / "provenance.json").read_text())["files"]
    assert {"samples.html", "completions/completions_00001.parquet"} <= set(files)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_the_page_needs_no_other_file_and_no_script(stage: str, finished: dict[str, Path]) -> None:
    html = (finished[stage] / "samples.html").read_text()
    page = Page(html)
    assert len(page.answers()) == 2 * 4
    assert len(page.images) == 2 * 2  # of each prompt
    for uri in page.images:
        assert uri.startswith("data:image/")
        assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (56, 56)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.tags.count("polyline") == 8
    assert {"Step 1", "Step 2", "frac_reward_zero_std", "entropy", "kl"} <= set(page.texts)


def test_a_warning_about_a_run_is_in_its_report_and_on_its_page(finished: dict[str, Path]) -> None:
    """A random model hardly ever ends an answer within four tokens."""
    (warning,) = json.loads((finished["grpo"] / "report.json").read_text())["warnings"]
    assert re.match(r"step 1: \d+% of the answers have no end at 4 tokens.*max_completion_length", warning)
    assert f"Warning: {warning}" in Page((finished["grpo"] / "samples.html").read_text()).texts


def row(**columns: Any) -> dict[str, Any]:
    return {"images": [], "prompt": [{"role": "user", "content": "What?"}], **columns}


def samples_in(folder: Path, every: float, **options: Any) -> Samples:
    samples = Samples(folder, every, ["exact_match", "format"], [1.0, 0.5], [])
    samples.on_train_begin(ARGUMENTS, state(**options), CONTROL)
    return samples


def add(samples: Samples, step: int, *rows: dict[str, Any], texts: Sequence[str] = ("a", "b")) -> None:
    """Add a sample whose answers are equal for each row."""
    count = len(texts) * len(rows)
    values = {"exact_match": [1.0, NAN] * (count // 2), "format": [1.0, NAN] * (count // 2)}
    samples.add(step, rows, list(texts) * len(rows), values, [0.5, -0.5] * (count // 2))


def page_of(samples: Samples, **options: Any) -> str:
    samples.on_train_end(ARGUMENTS, state(**options), CONTROL)
    return samples.page.read_text()


def test_texts_of_rows_and_answers_are_escaped_and_shortened(tmp_path: Path) -> None:
    samples, hostile = samples_in(tmp_path, 1), '<script src="https://a.b/c.js">alert(1)</script><img src=x onerror=y>'
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": hostile}]}]
    long = "y" * (MOST_CHARACTERS + 7)
    add(samples, 1, row(prompt=prompt, solution=hostile, id=hostile), texts=(hostile, f"{long}\ud800"))
    html = page_of(samples)
    page = Page(html)
    assert page.texts.count(hostile) == 4
    assert not {"script", "img"} & set(page.tags)
    assert html.count("y" * MOST_CHARACTERS) == 1
    assert "(8 more characters)" in html
    assert page.answers()[1][1:] == ["-", "-", "-", "-0.50"]  # no reward applies
    assert page.answers()[0][1:] == ["1", "1", "1.5", "+0.50"]


def test_right_boxes_and_masks_lie_on_small_images(tmp_path: Path) -> None:
    samples, image, mask = samples_in(tmp_path, 1), Image.new("L", (640, 320), 7), np.zeros((320, 640), bool)
    mask[:160] = True
    add(samples, 1, row(images=[image, image], boxes=[[10, 20, 30, 50]], masks=mask), row(image=image), row())
    html = page_of(samples)
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in Page(html).images]
    assert [picture.size for picture in pictures] == [(IMAGE_PX, IMAGE_PX // 2)] * 4
    alpha = np.asarray(pictures[1])[..., 3]  # the mask lies on the first image
    assert alpha[: IMAGE_PX // 4 - 2].all()
    assert not alpha[IMAGE_PX // 4 + 2 :].any()
    assert '<svg viewBox="0 0 640 320"' in html
    assert re.findall(r"<rect (.*?)/>", html) == ['x="10.0" y="20.0" width="20.0" height="30.0"']


@pytest.mark.parametrize(
    ("every", "steps", "sampled"),
    [
        (1, 3, [1, 2, 3]),
        (4, 10, [1, 5, 9]),
        (0.25, 10, [1, 4, 7, 10]),
        (0.05, 4, [1, 2, 3, 4]),
        (1, 10 * MOST_STEPS, [1 + 10 * i for i in range(MOST_STEPS)]),
        (0, 5, []),
    ],
)
def test_steps_are_sampled_at_even_distances(every: float, steps: int, sampled: list[int], tmp_path: Path) -> None:
    samples = samples_in(tmp_path, every, max_steps=steps)
    for step in range(1, steps + 1):
        if samples.is_due(step):
            add(samples, step, *[row()] * (PROMPTS + 1))
    samples.on_train_end(ARGUMENTS, state(steps, steps), CONTROL)
    assert samples.page.is_file() == (every > 0)
    lines = [json.loads(line) for line in samples.file.read_text().splitlines()] if sampled else []
    assert [line["step"] for line in lines] == sampled
    assert all(len(line["prompts"]) == PROMPTS for line in lines)


def test_a_resumed_run_draws_the_samples_after_its_checkpoint_again(tmp_path: Path) -> None:
    samples = samples_in(tmp_path, 2)
    for step in (1, 3, 5):
        add(samples, step, row())
    whole = page_of(samples)
    with samples.file.open("a") as file:
        file.write('{"step": 7, "pro')  # killed as it wrote
    resumed = samples_in(tmp_path, 2, step=4)
    assert [resumed.is_due(step) for step in (4, 5)] == [False, True]
    add(resumed, 5, row())
    assert page_of(resumed) == whole
    assert Page(page_of(samples_in(tmp_path, 2))).answers() == []  # a run that starts again


def test_a_curve_has_gaps_and_its_points_are_bounded() -> None:
    logs: list[dict[str, Any]] = [{"step": step, "reward": step / 5000, "kl": None} for step in range(1, 5000)]
    logs.append({"step": 5000, "kl": 0.5})  # of a step that generates no answers
    html = samples_page([*logs, {"step": 5000, "train_runtime": 1.0}], [], ["exact_match"], [], 5000)
    lines = re.findall(r'<polyline points="(.*?)"', html)
    assert [len(line.split()) for line in lines] == [pytest.approx(MOST_POINTS, rel=0.05), 1]
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    assert heights == sorted(heights, reverse=True)  # up the page


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["format"], True),
        (["format", "length"], True),
        (["format", "exact_match"], False),
        (["own.module:format"], False),
        ([], False),
    ],
)
def test_rewards_of_form_alone_are_warned_of(names: list[str], warned: bool) -> None:
    assert (form_warning(names) is not None) == warned
    assert set(rewards.FORM) < set(rewards.__all__)


def log_of(step: int, form: float, content: float | None, clipped: float = 0.0) -> dict[str, Any]:
    means = {"rewards/format/mean": form, "rewards/exact_match/mean": content}
    return {"step": step, "reward": form, "completions/clipped_ratio": clipped, **means}


def warnings_of(logs: list[dict[str, Any]], resumed_at: int = 0, weights: Sequence[float] = (1, 1)) -> list[str]:
    """Warnings of a run that is resumed behind a number of logs."""
    guards = RewardGuards(["format", "exact_match"], ["format"], weights, 32)
    guards.on_train_begin(ARGUMENTS, state(history=logs[:resumed_at]), CONTROL)
    for end in range(resumed_at + 1, len(logs) + 1):
        guards.on_log(ARGUMENTS, state(history=logs[:end]), CONTROL)
    return guards.warnings


WIGGLE = [0.02, -0.02, 0.0, 0.01, -0.01] * 6


@pytest.mark.parametrize(
    ("form", "content", "weights", "causes"),
    [
        (0.03, -0.03, (1, 1), ["the reward `format`, of form, rose by"]),
        (0.03, -0.03, (1, 0), ["no reward (format) looks at", "the reward `format`, of form, rose by"]),
        (0.03, -0.03, (0, 1), []),  # nothing pulls at the form
        (0.03, 0.03, (1, 1), []),
        (-0.03, -0.03, (1, 1), []),
        (0.0, 0.0, (1, 1), []),  # wiggles alone
    ],
)
def test_a_rising_reward_of_form_with_falling_content_is_warned_of_once(
    form: float, content: float, weights: tuple[float, float], causes: list[str]
) -> None:
    logs = [log_of(i, form * i + up, 1 + content * i - up) for i, up in enumerate(WIGGLE, 1)]
    logs.insert(3, {"step": 3, "eval_loss": 1.0})
    expected = warnings_of(logs, weights=weights)
    assert len(expected) == len(causes)
    assert all(cause in warning for cause, warning in zip(causes, expected, strict=True))
    if causes:
        assert f"step {WINDOW}: " in expected[-1]
    assert warnings_of(logs, resumed_at=20, weights=weights) == expected


def test_a_reward_that_applies_to_no_row_is_left_out() -> None:
    assert warnings_of([log_of(i, 0.1 * i, None) for i in range(1, 30)]) == []


def test_answers_without_an_end_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    logs = [log_of(i, 0.0, 0.0, clipped) for i, clipped in enumerate([0.5, 0.51, 0.9], 1)]
    (warning,) = warnings_of(logs)
    assert warning.startswith("step 2: 51% of the answers have no end at 32 tokens")
    assert caplog.messages == [warning]


@pytest.mark.parametrize("options", [{"samples_every": -0.1}, {"samples_every": NAN}, {"stop_without_signal": -1}])
@pytest.mark.parametrize("config", [PivotGRPOConfig, PivotRLOOConfig])
def test_options_out_of_range_are_refused(config: Any, options: dict[str, float], tmp_path: Path) -> None:
    (name,) = options
    with pytest.raises(TrainingError, match=f"{name} is .*; give a number of steps, or 0 for none"):
        config(str(tmp_path), bf16=False, **options)
