"""The row index: rows are checked once, memory does not grow with them, and an epoch can be resumed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from pivot_hub.cli import main
from pivot_hub.config.data_section import OnBadRow
from pivot_hub.config.recipe import LoadedRecipe, load_recipe
from pivot_hub.data import index
from pivot_hub.data.index import index_rows
from pivot_hub.data.report import CheckResult
from pivot_hub.data.row import ImageSize, Row
from pivot_hub.data.sampler import BlockSampler
from pivot_hub.errors import DataError, OutputError
from pivot_hub.training.stage import run_stage


class Counting:
    """A check that counts the rows it gets."""

    reads_rejected_images = False

    def __init__(self) -> None:
        self.seen = 0

    def to_dict(self) -> dict[str, Any]:
        return {"counting": True}

    def __call__(self, rows: Sequence[Row], *sizes: Sequence[ImageSize | None]) -> list[CheckResult]:
        self.seen += len(rows)
        return [
            CheckResult(("odd", "it is odd") if "odd" in r.prompt else None, len(r.prompt), len(r.chosen)) for r in rows
        ]


def recipe_of(folder: Path, rows: list[dict[str, Any]], on_bad_row: OnBadRow = OnBadRow.STOP) -> LoadedRecipe:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "0.yaml").write_text(
        "stage: align\nmodel: {vision: v, language: l}\nlearning_rate: {projector: 1.0e-3}\n"
        f"data: [{{format: llava, path: rows.jsonl}}]\non_bad_row: {on_bad_row}\n"
    )
    return load_recipe(folder / "0.yaml")


def talk(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_rows_are_checked_once(tmp_path: Path) -> None:
    loaded, check = recipe_of(tmp_path, [talk(f"q{i}") for i in range(5)]), Counting()
    first = index_rows(loaded, check, tmp_path / "kept")
    again = index_rows(loaded, check, tmp_path / "kept")
    assert check.seen == 5
    assert list(again.rows()) == list(first.rows())
    assert again.report == first.report
    assert len(list((tmp_path / "kept").iterdir())) == 1
    index_rows(loaded, check, tmp_path / "kept", fresh=True)
    assert check.seen == 10
    recipe_of(tmp_path, [talk("another")])  # the file changed, so its rows are checked again
    assert [r.prompt for r in index_rows(loaded, check, tmp_path / "kept").rows()] == ["another"]


def test_the_report_counts(tmp_path: Path) -> None:
    rows = [talk("q", "a" * n) for n in (1, 2, 3, 4, 5, 8, 9, 9)] + [talk("odd"), {"id": 3}]
    report = index_rows(recipe_of(tmp_path, rows, OnBadRow.SKIP), Counting(), tmp_path / "kept").report
    assert report.rows == 8
    assert report.duplicates == 1
    assert report.problems == {"odd": 1, "format": 1}
    assert report.skipped == ["rows.jsonl:9: it is odd", "rows.jsonl:10: `conversations` is missing or empty"]
    assert report.answer_lengths == {"1": 1, "2": 1, "3-4": 2, "5-8": 2, "9-16": 2}
    assert report.answer_tokens == round((1 + 2 + 3 + 4 + 5 + 8 + 9 + 9) / 8, 2)
    text = report.text()
    for line in ("8 rows per epoch, 2 skipped, 1 duplicates", "skipped, odd: 1", "rows.jsonl:9: it is odd"):
        assert line in text


def test_rows_that_an_earlier_check_skipped_still_stop_a_recipe_that_says_stop(tmp_path: Path) -> None:
    rows = [talk("q"), talk("odd")]
    index_rows(recipe_of(tmp_path, rows, OnBadRow.SKIP), Counting(), tmp_path / "kept")
    loaded = recipe_of(tmp_path, rows, OnBadRow.STOP)
    with pytest.raises(DataError, match=r"rows.jsonl:2: it is odd; fix the row, or set `on_bad_row: skip`"):
        index_rows(loaded, Counting(), tmp_path / "kept")


def test_several_processes_check_as_one_does(tmp_path: Path) -> None:
    rows = [talk("odd" if i % 500 == 499 else f"q{i}", "a" * (i % 7 + 1)) for i in range(2100)]
    loaded = recipe_of(tmp_path, rows, OnBadRow.SKIP)
    one = index_rows(loaded, Counting(), tmp_path / "one", workers=1)
    two = index_rows(loaded, Counting(), tmp_path / "two", workers=2)
    assert two.report == one.report
    assert list(two.rows()) == list(one.rows())
    stop = recipe_of(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows.jsonl:500: it is odd"):
        index_rows(stop, Counting(), tmp_path / "stop", workers=2)
    assert not list((tmp_path / "stop").iterdir())


MEMORY = """
import sys
from pathlib import Path
from pivot_hub.data.index import index_rows
from pivot_hub.config.recipe import load_recipe
from tests.data.test_index import Counting

most = 0
def measure():  # pages of mapped files are not counted: the kernel can drop them
    global most
    lines = Path("/proc/self/status").read_text().splitlines()
    most = max(most, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

index = index_rows(load_recipe(sys.argv[1]), Counting(), sys.argv[2], lambda *progress: measure(), workers=1)
for i, row in enumerate(index.table):
    if i % 1000 == 0:
        measure()
print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Ten times the rows, 60 MB more of JSON, take hardly more memory to read, check and iterate over."""
    peaks = []
    for count in (10_000, 100_000):
        folder = tmp_path / str(count)
        recipe_of(folder, [talk(f"q{i} " + "x" * 500, "a" * 80) for i in range(count)])
        command = [sys.executable, "-c", MEMORY, str(folder / "0.yaml"), str(folder / "kept")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 12_000  # kB; the rows are 65 MB


def test_an_epoch_in_blocks_is_seeded_and_whole() -> None:
    blocks = np.repeat(np.arange(40), 25)
    sampler = BlockSampler(blocks, seed=3, window=200)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) != order
    assert list(BlockSampler(blocks, seed=3, window=200)) == order
    assert list(BlockSampler(blocks, seed=4, window=200)) != order
    sampler.set_epoch(1)
    assert list(sampler) != order
    for start in range(0, 1000, 200):  # a window reads few blocks, and mixes them
        window = blocks[order[start : start + 200]]
        assert len(set(window.tolist())) == 8
        assert (np.diff(window) != 0).mean() > 0.7
    assert len(sampler) == 1000


class _ReadBy(torch.utils.data.Dataset[tuple[int, int]]):
    """The number of each row with that of the loader worker that reads it."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, row: int) -> tuple[int, int]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return row, worker.id


def test_each_loader_worker_of_each_process_reads_blocks_of_its_own() -> None:
    """As accelerate shards batches over processes, and torch's loader over workers; here two of each."""
    blocks = np.arange(2000) // 40
    readers: dict[int, list[tuple[int, int]]] = {}
    for streams, batch in ((1, 1), (4, 4)):
        readers[streams] = []
        for process in range(2):
            sampler = BlockSampler(blocks, seed=0, window=200, streams=streams, batch=batch)
            shard = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, process)
            for rows, workers in DataLoader(_ReadBy(), batch_sampler=shard, num_workers=2):
                readers[streams] += [(row, 10 * process + worker) for row, worker in zip(rows, workers, strict=True)]
    reads = {n: len({(blocks[int(row)], int(reader)) for row, reader in pairs}) for n, pairs in readers.items()}
    assert [sorted(int(row) for row, _ in pairs) for pairs in readers.values()] == [list(range(2000))] * 2
    assert reads[1] == 4 * 50  # every worker reads every block
    assert reads[4] <= 1.2 * 50  # the last windows are shared, so that all workers end together


@pytest.mark.parametrize(("streams", "batch", "window"), [(7, 3, 64), (64, 4, 8), (3, 50, 16)])
def test_an_epoch_in_streams_is_seeded_and_whole(streams: int, batch: int, window: int) -> None:
    """With blocks of many sizes, also fewer of them than streams, and batches larger than a stream's window."""
    blocks = np.repeat(np.arange(40), np.arange(1, 41))
    order = list(BlockSampler(blocks, 1, window, streams, batch))
    assert sorted(order) == list(range(len(blocks))) != order
    assert order == list(BlockSampler(blocks, 1, window, streams, batch))
    assert order != list(BlockSampler(blocks, 2, window, streams, batch))


def test_rows_that_are_read_alone_are_blocks_of_one() -> None:
    blocks = np.concatenate([np.repeat(np.arange(4), 8), np.arange(4, 20)])
    assert sorted(BlockSampler(blocks, 0, window=16)) == list(range(48))


def test_data_check_reports_all_rows_before_training_and_training_reuses_its_index(
    own_recipes: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Missing images, corrupt images, equal answers and duplicates are reported; the stage reads the same index."""
    images = own_recipes / "images"
    images.mkdir()
    Image.new("RGB", (9, 9), "red").save(images / "a.png")
    (images / "b.png").write_bytes(b"no image")
    pair = {"image": "a.png", "question": "What?", "chosen": "A star.", "rejected": "A cube."}
    rows = [pair, pair, *({**pair, "question": f"{i}?"} for i in range(3))]
    bad = [{**pair, "image": "c.png"}, {**pair, "image": "b.png"}, {**pair, "rejected": "A star."}]
    (own_recipes / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + bad))
    path = own_recipes / "3-dpo.yaml"
    data = next(line for line in path.read_text().splitlines() if line.startswith("data:"))
    source = "{format: mmpr, path: pairs.jsonl, images: images, expect: {rows: 9, prompt_tokens: 9, answer_tokens: 9}}"
    path.write_text(path.read_text().replace(data, f"data: [{source}]"))
    for part in ("vision", "language"):
        (own_recipes / "base" / part / "model.safetensors").unlink()
    command = ["pivot", "data", "check", str(path), "--json", str(tmp_path / "check.json")]
    for more, code in ((["on_bad_row=skip"], 0), ([], 1)):
        monkeypatch.setattr(sys, "argv", [*command[:4], *more, *command[4:]])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert (exit_info.value.code or 0) == code
    output = capsys.readouterr().out
    for line in (
        "5 rows per epoch, 3 skipped, 1 duplicates",
        "skipped, missing image: 1",
        "skipped, corrupt image: 1",
        "skipped, same answers: 1",
        "source 0: 5 rows, where the recipe expects 9",
        "training would stop at the first of these rows",
    ):
        assert line in output
    checked = json.loads((tmp_path / "check.json").read_text())
    built: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(index, "_build", lambda *args: built.append(args[0]))
        skip = load_recipe(path, ["on_bad_row=skip"])
        folder = run_stage(skip, trained.parent, tmp_path / "out", log=lambda line: None)
    assert not built
    report = json.loads((folder / "report.json").read_text())["data"]
    assert {k: checked[k] for k in report} == report
    provenance = json.loads((folder / "provenance.json").read_text())["data"][0]
    assert provenance["ids_sha256"] == checked["sources"][0]["ids_sha256"]
    assert len(provenance["files_sha256"]) == 64
    with pytest.raises(DataError, match=r"pairs.jsonl:6: image c.png does not exist"):
        run_stage(load_recipe(path), trained.parent, tmp_path / "stop", log=lambda line: None)


def test_a_fixed_image_is_checked_again(tmp_path: Path) -> None:
    """A row that was skipped for its missing image is used once the image exists, though the rows did not change."""
    rows = [{**talk("q"), "image": "a.png"}]
    spec = "path: rows.jsonl, images: ."
    recipe_of(tmp_path, [*rows, talk("q")], OnBadRow.SKIP)
    file = tmp_path / "0.yaml"
    file.write_text(file.read_text().replace("path: rows.jsonl", spec))
    assert index_rows(load_recipe(file), Counting(), tmp_path / "kept").report.skipped_rows == 1
    stop = load_recipe(file, ["on_bad_row=stop"])
    with pytest.raises(DataError, match=r"rows.jsonl:1: image a.png does not exist"):
        index_rows(stop, Counting(), tmp_path / "kept")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert index_rows(stop, Counting(), tmp_path / "kept").report.rows == 2


def test_an_index_with_a_flipped_bit_or_cut_short_is_built_again(tmp_path: Path) -> None:
    """L8: each file of it is compared with its hash whenever it is read."""
    loaded, kept = recipe_of(tmp_path, [talk(f"q{i}") for i in range(5)]), tmp_path / "kept"
    whole = list(index_rows(loaded, Counting(), kept).rows())
    (folder,) = kept.iterdir()
    for name in ("rows.arrow", "epoch.npy", "report.json", "index.json"):
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:middle], None):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            check = Counting()
            assert list(index_rows(loaded, check, kept).rows()) == whole
            assert check.seen == 5, (name, damaged)
    assert [f.name for f in kept.iterdir()] == [folder.name]
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds thesis.tex"):
        index_rows(loaded, Counting(), kept, fresh=True)


def test_an_index_into_an_archive_that_changed_is_built_again(tmp_path: Path) -> None:
    """Rows point into an archive by offset, which would be another image's."""
    recipe_of(tmp_path, [{**talk("q"), "image": "coco/a.png"}])
    file = tmp_path / "0.yaml"
    file.write_text(file.read_text().replace("path: rows.jsonl", "path: rows.jsonl, images: ."))
    colours = []
    for order in (("a.png", "b.png"), ("b.png", "a.png")):
        with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
            for name in order:
                content = io.BytesIO()
                Image.new("RGB", (4, 4), "red" if name == "a.png" else "blue").save(content, "PNG")
                archive.writestr(name, content.getvalue())
        dataset = index_rows(load_recipe(file), Counting(), tmp_path / "kept").as_dataset("plain", "<I>")
        colours.append(dataset[0]["images"][0].getpixel((0, 0)))
    assert colours == [(255, 0, 0)] * 2


def test_a_second_process_waits_for_the_index_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    """L3: the second process finds what the first has built, instead of moving its files away."""
    loaded, kept = recipe_of(tmp_path, [talk(f"q{i}") for i in range(5)]), tmp_path / "kept"
    fork = get_context("fork")

    def start() -> tuple[BaseProcess, Connection]:
        """Start a process that builds the index, and stop it in the middle."""
        here, there = fork.Pipe()

        class Waiting(Counting):
            def __call__(self, rows: Sequence[Row], *sizes: Sequence[ImageSize | None]) -> list[CheckResult]:
                there.send("building")
                there.recv()
                return super().__call__(rows, *sizes)

        process = fork.Process(target=lambda: index_rows(loaded, Waiting(), kept, workers=1))
        process.start()
        assert here.recv() == "building"
        return process, here

    killed, _ = start()
    killed.kill()
    killed.join()
    assert list(kept.glob(".*"))
    first, pipe = start()  # takes the lock of the killed process over
    check, counts = Counting(), []
    waiting = threading.Thread(target=lambda: counts.append(len(list(index_rows(loaded, check, kept).rows()))))
    waiting.start()
    pipe.send("go on")
    waiting.join(60)
    first.join(60)
    assert first.exitcode == 0
    assert (counts, check.seen) == ([5], 0)
    assert len(list(kept.iterdir())) == 1
