"""The end-to-end demo in miniature: four stages, two encoders and one report; a second run repeats nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from pivot_hub.cli import main
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.probes.result import read_results
from pivot_hub.probes.run import Sizes
from pivot_hub.publish.card_check import card_problems
from pivot_hub.quickstart import push_quickstart, run_quickstart
from tests.local_server.store import Store

FEW = ["data.0.rows=8", "args.per_device_train_batch_size=4", "args.logging_steps=1"]
SMALL = Sizes(train=60, validation=20, test=30, questions=30, targets_validation=3, targets_test=4)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    run_quickstart(folder, overrides=FEW, sizes=SMALL, log=lambda line: None)
    return folder


def test_report_holds_every_result_with_its_conditions(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    assert report["duration_s"] > 0
    assert report["peak_memory_mb"] > 0
    assert set(report["stages"]) == {"1-align", "2-instruct", "3-sft", "3-dpo"}
    tasks = {e: {r["task"] for r in report["results"] if r["encoder"] == e} for e in ("base", "sft", "dpo")}
    alone = {f"shapes/{t}" for t in ("colour", "shape", "position", "count", "segmentation")}
    assert tasks["base"] == alone
    explained = {f"shapes/localisation/{m} of {e}" for m in ("gradcam", "gradient") for e in ("answer", "sft", "dpo")}
    questions = {f"shapes/vqa/{k}" for k in ("all", "colour", "shape", "position", "count", "presence")}
    assert tasks["sft"] == tasks["dpo"] == alone | explained | questions
    for result in report["results"]:
        assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
        assert result["split"] == "test"
        assert (result["partner"] is None) == (result["task"] in alone)
    shas = {r["encoder"]: r["encoder_sha256"] for r in report["results"]}
    assert len(set(shas.values())) == 3


def test_dpo_is_compared_with_sft_in_pairs(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    results = {(r["task"], r["metric"], r["encoder"]): r for r in report["results"]}
    rows = report["comparison"]["rows"]
    assert {(r["task"], r["metric"]) for r in rows} == {k[:2] for k in results if k[2] == "dpo"}
    for row in rows:
        sft, dpo = (results[row["task"], row["metric"], e] for e in ("sft", "dpo"))
        assert (row["first_value"], row["other_value"]) == (sft["value"], dpo["value"])
        assert row["difference"] == pytest.approx(dpo["value"] - sft["value"], abs=1e-9)
        assert (row["verdict"] == "no difference shown") == (row["p_holm"] >= 0.05)


def test_both_encoders_are_valid_repositories(output: Path) -> None:
    for name in ("shapes-sft", "shapes-dpo"):
        folder = output / "hub" / "pivot" / name
        assert verify_repository(folder) == []
        assert type(AutoModel.from_pretrained(folder)).__name__ == "SiglipVisionModel"


def test_both_encoders_have_their_cards(output: Path) -> None:
    """Cards hold the results of this run, and the command that reproduces them."""
    values = {}
    for name in ("sft", "dpo"):
        folder = output / "hub" / "pivot" / f"shapes-{name}"
        assert card_problems(folder) == []
        results = {f.name for f in (folder / "results").iterdir()}
        assert results == {"base.json", "dpo.json", f"{name}-native.json", "sft.json"}
        native = read_results(folder / "results" / f"{name}-native.json")
        assert {(r.encoder, r.feature_layer) for r in native} == {(name, "last_hidden_state")}
        card = ModelCard((folder / "README.md").read_text())
        assert f"| {name}, `last_hidden_state` |" in card.text
        assert "Both are measured under Results." in card.text
        assert card.data.get("base_model") == "pivot/shapes-base"
        values[name] = [r.metric_value for r in card.data.get("eval_results")]
        report = json.loads((output / "report.json").read_text())["results"]
        own = [r for r in report if r["encoder"] == name and not r["task"].endswith((" of sft", " of dpo"))]
        assert values[name] == [round(r["value"], 2) for r in own]
        assert "run_quickstart(Path(" in card.text
        assert "└─ shapes/2-instruct" in card.text
        assert "not known" not in card.text


def test_figure_and_page_are_there(output: Path) -> None:
    with Image.open(output / "maps.png") as figure:
        assert min(figure.size) > 600
    page = (output / "report.md").read_text()
    assert "| probe | metric | base | SFT | DPO |" in page
    assert "maps.png" in page


def test_a_second_run_reuses_what_is_finished_and_restores_what_is_missing(output: Path) -> None:
    kept = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    report = (output / "report.json").read_text()
    run_quickstart(output, overrides=FEW, sizes=SMALL, log=lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()} == kept
    (output / "results" / "dpo.json").unlink()
    shutil.rmtree(output / "hub" / "pivot" / "shapes-dpo")
    run_quickstart(output, overrides=FEW, sizes=SMALL, log=lambda line: None)
    again = json.loads((output / "report.json").read_text())
    values = [(r["task"], r["metric"], r["encoder"], r["value"]) for r in again["results"]]
    assert values == [(r["task"], r["metric"], r["encoder"], r["value"]) for r in json.loads(report)["results"]]
    assert verify_repository(output / "hub" / "pivot" / "shapes-dpo") == []


def test_push_local_publishes_the_encoders_and_loads_them_by_name(output: Path) -> None:
    lines: list[str] = []
    loaded = push_quickstart(output, log=lines.append)
    assert {name: metadata["class"] for name, metadata in loaded.items()} == dict.fromkeys(
        ("pivot/shapes-base", "pivot/shapes-sft", "pivot/shapes-dpo"), "SiglipVisionModel"
    )
    store = Store(output / "local-hub")
    for name, metadata in loaded.items():
        repo = store.repos["model", name]
        assert repo.refs["refs/tags/v0.1.0"] == repo.refs["refs/heads/main"] == metadata["commit"]
    (collection,) = store.collections
    assert {item["note"]["text"] for item in collection["items"]} == {"base", "SFT", "DPO"}
    assert [line.split(":")[0] for line in lines[:3]] == list(loaded)
    assert not (output / "hub" / "pivot" / "shapes-base" / "README.md").is_symlink()


def pivot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pivot_hub", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_commands_do_the_same_by_hand(output: Path, tmp_path: Path) -> None:
    """extract, verify, probe and gradcam from the command line, each with its JSON."""
    checkpoint, encoder = output / "runs" / "shapes" / "3-dpo", tmp_path / "encoder"
    done = pivot("extract", str(checkpoint), str(encoder), "--json", str(tmp_path / "extract.json"))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in json.loads((tmp_path / "extract.json").read_text())["files"]
    assert pivot("verify", str(encoder)).returncode == 0

    scene = tmp_path / "scene.png"
    Image.effect_noise((90, 70), 60).convert("RGB").save(scene)
    question = ["--question", "What shape is it?", "--answer", "It is a star.", "--rejected", "It is a ring."]
    parent = ["--reference", str(output / "runs" / "shapes" / "2-instruct"), "--explain", "dpo"]
    files = ["--output", str(tmp_path / "maps.png"), "--json", str(tmp_path / "maps.json")]
    done = pivot("gradcam", str(checkpoint), str(scene), *question, *parent, *files)
    assert done.returncode == 0, done.stderr
    maps = json.loads((tmp_path / "maps.json").read_text())
    assert len(maps["maps"]["gradcam"]) == 8
    assert (tmp_path / "maps.png").stat().st_size > 1000

    (encoder / "notes.txt").write_text("x")
    done = pivot("verify", str(encoder))
    assert done.returncode == 1
    assert "notes.txt is not expected" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "shapes/9-none"], 2, "no such recipe"),
        (["train", "shapes/3-dpo", "args.bta=1"], 2, "did you mean `beta`"),
        (["extract", "nowhere", "out"], 2, "nowhere: there is no such folder"),
        (["probe", "nowhere"], 2, "there is no folder and no encoder of this name"),
        (["search", "shapes/3-dpo", "--rates", "fast"], 2, "give numbers"),
        (["bench", "speed"], 2, "No such command"),
        (["bench", "encoder", "--forms", "tpu"], 2, "there is no form 'tpu'"),
        (["encode", "nowhere", "--encoder", "nowhere"], 2, "is not a folder"),
        (["export", "nowhere", "out"], 2, "there is no folder and no encoder of this name"),
        (["localize", "nowhere", "--data", "nowhere"], 2, "is not a folder"),
        (["space", "--runs", "nowhere"], 2, "run `pivot quickstart` first"),
        (["fly"], 2, "No such command"),
        (["train"], 2, "Missing argument"),
    ],
)
def test_bad_input_is_an_error_message_and_leaves_nothing(
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pivot", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_help_shows_an_example_for_every_command() -> None:
    overview = pivot("--help").stdout
    commands = [
        "quickstart",
        "train",
        "search",
        "extract",
        "verify",
        "encode",
        "export",
        "probe",
        "localize",
        "read",
        "gradcam",
    ]
    commands += ["card", "push", "pull"]
    for command in [*commands, "space", "bench", "bench shapes", "bench encoder"]:
        assert command.split()[0] in overview
        help_text = " ".join(pivot(*command.split(), "--help").stdout.split())
        assert "Example: pivot " + command in help_text
