"""Damaged inputs thrown at the commands: each ends well or with an error message, and loses nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from PIL import Image
from safetensors.numpy import load_file

from pivot_hub import cli
from pivot_hub.errors import PivotError
from pivot_hub.probes.result import results_text, write_results
from pivot_hub.publish import pull
from pivot_hub.publish.staging import write_card
from tests.damage import copy_linked, damage, kinds_for
from tests.probes.test_significance import result
from tests.publish.publishable import PROSE, make_prose, make_publishable, make_results

SECONDS = 120  # of one command; more is a hang
DPO = "stage: dpo\nparent: 2-instruct.yaml\nlearning_rate: {vision: 1.0e-3, projector: 1.0e-3, language: 1.0e-3}\n"
ROWS = "data: [{format: mmpr, path: rows.jsonl, images: images}]\nargs: {num_train_epochs: 1, max_length: 256}\n"


@dataclass(frozen=True)
class Target:
    """A command, and what may be damaged of its input.

    Args:
        command: Arguments of the command in the folder of its input; `out` is its output.
        folder: Folder of the input, whose copy becomes the working folder.
        files: Patterns of the files that are damaged.
        options: Options with values that a user may mistype.
        weight: How often the command is drawn.
        whole: Whether a command that fails leaves no `out`.
        refuses: Whether every damage must be refused, because all files are covered by a checksum.
        changes: File or folder that the command may change besides `out`.
    """

    command: tuple[str, ...]
    folder: str
    files: tuple[str, ...]
    options: tuple[str, ...] = ()
    weight: int = 10
    whole: bool = False
    refuses: bool = False
    changes: str = "out"

    @property
    def name(self) -> str:
        return " ".join(self.command[:2]) if self.command[0] == "data" else self.command[0]


PLAN = ("plan", "rows.yaml", "--processes", "1", "--lengths", "lengths.json", "--json", "out.json")
PROBE = ("probe", "encoder", "--data", "classes", "--protocols", "knn", "--json", "out.json", "--cache", "out")
SEGMENT = ("segment", "encoder", "--data", "masks", "--heads", "linear", "--json", "out.json")
LOCALIZE = ("localize", "mllm", "--data", "yolo", "--json", "out.json")
TARGETS = (
    # Nothing trains: the parent is not finished, and a recipe that is right is refused for that.
    Target(("train", "rows.yaml", "--output", "out"), "recipes", ("*.yaml",), ("--runs", "--parent"), 30),
    Target(
        ("data", "check", "rows.yaml", "--workers", "1", "--json", "out.json"),
        "recipes",
        ("rows.jsonl", "rows.jsonl", "rows.yaml", "images/*", "base/language/*"),
        ("--workers",),
        30,
    ),
    Target(PLAN, "recipes", ("rows.yaml", "lengths.json"), ("--processes", "--mfu", "--accelerate-config"), 2),
    Target(("extract", "mllm", "out"), "mllm", ("mllm/*",), (), 24, whole=True),
    Target(
        ("encode", "images", "--encoder", "encoder", "--out", "out.parquet", "--workers", "1"),
        "encode",
        ("images/*", "encoder/*.json", "encoder/*.safetensors"),
        ("--batch", "--workers", "--dtype"),
        24,
    ),
    Target(("verify", "encoder"), "encode", ("encoder/*", "encoder/results/*"), (), 40, refuses=True),
    Target(("pull", "a/b", "out"), "encode", ("encoder/*", "encoder/results/*"), (), 25, whole=True, refuses=True),
    Target(
        ("card", "encoder", "--prose", "prose.yaml", "--results", "new.json"),
        "encode",
        ("prose.yaml", "new.json", "encoder/*.json", "encoder/*.yaml", "encoder/results/*"),
        (),
        40,
        changes="encoder",
    ),
    Target(
        ("compare", "a.json", "b.json", "--draws", "100", "--json", "out.json"),
        "results",
        ("*.json", "*.npz"),
        ("--draws", "--seed"),
        40,
    ),
    Target(PROBE, "classes", ("classes/*/*/*", "encoder/*.json"), ("--protocols", "--dtype", "--workers"), 12),
    Target(SEGMENT, "masks", ("masks/*/*",), ("--classes", "--ignore", "--image-px", "--heads"), 2),
    Target(LOCALIZE, "yolo", ("yolo/*/*/*", "yolo/data.yaml", "mllm/*.json"), ("--limit", "--ignore", "--explain"), 12),
)
PIVOT = typer.main.get_command(cli.app)  # made once; making it takes longer than most commands
# The class of usage errors is click's, or that of the copy of click in newer versions of typer.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
VALUES = ("0", "-1", "x", "", "1e400", "nan", "../x", "999999999999", "1,,2")

# Failures that are known, by command and kind of damage. Each entry is a fault to fix, and none may be added to excuse
# one. The test fails when none of an entry's seeds fails any more: then the entry is deleted.
KNOWN: frozenset[tuple[str, str]] = frozenset({})
# The same of the seeds that only the long test throws.
KNOWN_AT_LENGTH = KNOWN | {
    ("compare", ".json key"),  # IndexError
    ("compare", ".json value"),  # TypeError
    ("data check", ".json value"),  # an error of tokenizers as it is
    ("localize", ".json missing"),  # TypeError of torch
    ("localize", ".json value"),  # an error of tokenizers as it is
    ("localize", ".yaml value"),  # a name in data.yaml that is no text
    ("probe", ".json key"),  # ValueError of the image processor
    ("probe", ".json value"),  # the same
}


class Hang(Exception):
    """A command took more than `SECONDS`."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"no end after {SECONDS} s")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, recipes: Path, trained: Path) -> Path:
    """Undamaged input of every command."""
    inputs = tmp_path_factory.mktemp("inputs")
    pixels = [Image.effect_noise((40, 24), 90).convert("RGB") for _ in range(6)]
    shutil.copytree(recipes, inputs / "recipes")
    (inputs / "recipes" / "rows.yaml").write_text(DPO + ROWS)
    rows = [
        {"id": i, "image": f"{i}.png", "question": "What is it?", "chosen": "a red circle", "rejected": "a blue square"}
        for i in range(4)
    ]
    (inputs / "recipes" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (inputs / "recipes" / "lengths.json").write_text('{"rows": 4, "prompt_tokens": 12.5, "answer_tokens": 4}')
    encoder = make_publishable(inputs / "encode" / "encoder")
    write_card(encoder, make_prose())
    (inputs / "encode" / "prose.yaml").write_text(yaml.safe_dump(PROSE))
    sha = json.loads((encoder / "results" / "dpo.json").read_text())[0]["encoder_sha256"]
    (inputs / "encode" / "new.json").write_text(results_text(make_results("dpo", sha, 71.0)))
    for folder in ("recipes/images", "encode/images"):
        (inputs / folder).mkdir()
        for i, image in enumerate(pixels[:4]):
            image.save(inputs / folder / f"{i}.png")
    pixels[4].save(inputs / "encode" / "images" / "4.jpg")
    pixels[5].save(inputs / "encode" / "images" / "5.tiff")
    for folder in ("classes", "masks"):
        shutil.copytree(encoder, inputs / folder / "encoder")
    for split in ("train", "test"):
        for name, images in {"cat": pixels[:3], "dog": pixels[3:]}.items():
            (inputs / "classes" / "classes" / split / name).mkdir(parents=True)
            for i, image in enumerate(images):
                image.rotate(90 * (split == "test")).save(inputs / "classes" / "classes" / split / name / f"{i}.png")
    for folder in ("images", "masks"):
        (inputs / "masks" / "masks" / folder).mkdir(parents=True)
    for i, image in enumerate(pixels):
        image.save(inputs / "masks" / "masks" / "images" / f"{i}.png")
        ids = np.random.default_rng(i).integers(0, 3, (3, 5)).repeat(8, 0).repeat(8, 1)
        Image.fromarray(ids.astype(np.uint8)).save(inputs / "masks" / "masks" / "masks" / f"{i}.png")
    shutil.copytree(trained / "3-dpo", inputs / "mllm" / "mllm")
    shutil.copytree(trained / "3-dpo", inputs / "yolo" / "mllm")
    for folder in ("images", "labels"):
        (inputs / "yolo" / "yolo" / folder / "train").mkdir(parents=True)
    for i, image in enumerate([*pixels, *pixels]):
        image.save(inputs / "yolo" / "yolo" / "images" / "train" / f"{i}.png")
        (inputs / "yolo" / "yolo" / "labels" / "train" / f"{i}.txt").write_text(
            "0 0.25 0.5 0.5 0.9\n1 0.8 0.5 0.2 0.2\n"
        )
    (inputs / "yolo" / "yolo" / "data.yaml").write_text("names: [apple, cup]\n")
    (inputs / "results").mkdir()
    for name, share in {"a": 0.5, "b": 0.7}.items():
        hits = np.random.default_rng(0).random(40) < share
        write_results(inputs / "results" / f"{name}.json", [result(name, "shapes/colour", hits)])
    return inputs


def run(target: Target, arguments: list[str], folder: Path) -> tuple[int, str | None]:
    """Run a command in a folder; its exit code, and what is wrong with how it ended, or None."""
    before, code = _state(folder, target.changes), 2
    previous = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    try:
        code = PIVOT(arguments, standalone_mode=False) or 0
    except (PivotError, UsageError):
        pass
    except Exception as error:
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if changed := sorted(before.items() ^ _state(folder, target.changes).items()):
        return code, f"it changed {changed[0][0]}, which is not its output"
    if code != 0:
        return code, "it failed and left an output" if (folder / "out").exists() and target.whole else None
    return code, "exit 0, although a file is damaged" if target.refuses else _not_finite(folder)


def _state(folder: Path, changes: str) -> dict[str, tuple[int, int]]:
    """Mode and size of every file outside of the output, and mode of every folder."""
    state = {}
    for path in folder.rglob("*"):
        name, entry = str(path.relative_to(folder)), path.lstat()
        if not name.startswith((changes, "out", ".out")):
            state[name] = (entry.st_mode, entry.st_mtime_ns if path.is_file() else 0)
    return state


def _not_finite(folder: Path) -> str | None:
    """The first output with a number that is not finite."""
    for path in sorted(folder.glob("out*")):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            arrays: list[Any] = []
            if file.suffix == ".json":
                arrays = [np.array(list(_numbers(json.loads(file.read_text()))))]
            elif file.suffix == ".safetensors":
                arrays = list(load_file(file).values())
            elif file.suffix == ".parquet":
                column = pq.read_table(file).column("features")
                arrays = [np.array(column.combine_chunks().flatten().to_pylist(), dtype=float)]
            if any(not np.isfinite(array).all() for array in arrays):
                return f"exit 0, and {file.name} holds a number that is not finite"
    return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, float):
        yield value


def prepare(target: Target, inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a working folder with the undamaged input of a command. A pull finds its download there."""
    copy_linked(inputs / target.folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pull, "fetch", lambda *_, **__: folder / "encoder")


def throw(seed: int, inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str | None]:
    """Damage the input of a command, run it, and return the command, the kind of damage, and what is wrong."""
    rng = random.Random(f"damage {seed}")
    target = rng.choices(TARGETS, [target.weight for target in TARGETS])[0]
    prepare(target, inputs, folder, monkeypatch)
    arguments = list(target.command)
    if target.options and rng.random() < 0.2:
        kind = rng.choice(target.options)
        arguments += [kind, rng.choice(VALUES)]
    else:
        pattern = rng.choice(target.files)
        file = rng.choice([path for path in sorted(folder.glob(pattern)) if path.is_file()])
        kind = rng.choice(kinds_for(file.name))
        damage(file, kind, rng)
        kind = f"{file.suffix or file.name} {kind}"
    _, wrong = run(target, arguments, folder)
    shutil.rmtree(folder)
    return target.name, kind, wrong


def throw_all(seeds: range, inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], str]:
    """Throw the damages of some seeds, and return a line for each command and kind of damage that went wrong."""
    wrong: dict[tuple[str, str], str] = {}
    for seed in seeds:
        command, kind, message = throw(seed, inputs, folder / str(seed), monkeypatch)
        if message is not None:
            wrong.setdefault((command, kind), f"seed {seed}: pivot {command}, {kind}: {message}")
    return wrong


@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=pytest.mark.slow) if t.weight < 10 else t for t in TARGETS],
    ids=[t.name for t in TARGETS],
)
def test_undamaged_input_is_accepted(
    target: Target, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the damage, and nothing else, is why a command ends otherwise; `train` has no parent by design."""
    folder = tmp_path / "work"
    prepare(target, inputs, folder, monkeypatch)
    ended = run(replace(target, refuses=False), list(target.command), folder)
    assert ended == (2 if target.name == "train" else 0, None)
    assert list(folder.glob("out*")) or target.name in ("train", "verify", "card")


def test_damaged_input_ends_with_a_message_and_loses_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = throw_all(range(300), inputs, tmp_path, monkeypatch)
    assert [line for case, line in wrong.items() if case not in KNOWN] == []
    assert sorted(KNOWN - wrong.keys()) == [], "these are fixed: delete them from KNOWN"


@pytest.mark.nightly
def test_damaged_input_at_length(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = throw_all(range(300, 1300), inputs, tmp_path, monkeypatch)
    assert [line for case, line in wrong.items() if case not in KNOWN_AT_LENGTH] == []
    assert sorted(KNOWN_AT_LENGTH - wrong.keys()) == [], "these are fixed: delete them from KNOWN_AT_LENGTH"
