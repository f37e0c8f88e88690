"""Several processes: the same steps, weights and checkpoints as one process; and what stops a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pivot_hub.config.recipe import load_recipe
from pivot_hub.errors import CheckpointError, RecipeError, SourceError, TrainingError
from pivot_hub.mllm.blank_image import encode_blank_images
from pivot_hub.mllm.build import build_mllm
from pivot_hub.mllm.extract import extract_encoder
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.training.stage import run_stage
from tests.encoder.originals import ORIGINALS, make_vision

ROOT = Path(__file__).parents[2]
ACCELERATE_CONFIGS = ROOT / "recipes" / "accelerate"
BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
LAUNCHERS = {
    "one": [sys.executable, "-m", "pivot_hub"],
    "ddp": [*TORCHRUN, "-m", "pivot_hub"],
    "fsdp2": [
        *ACCELERATE,
        "--config_file",
        str(ACCELERATE_CONFIGS / "fsdp2.yaml"),
        "-m",
        "tests.training.sharded_on_cpu",
    ],
}
STEPS = ["data.0.rows=32", "global_batch=8", "args.per_device_train_batch_size=2"]


def quiet(line: str) -> None:
    """Ignore progress lines."""


def start(how: str, *arguments: str) -> subprocess.Popen[str]:
    command = [*LAUNCHERS[how], "train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers
        raise
    assert process.returncode == 0, errors[-3000:]
    return output


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 1 + sum("loss" in x for x in lines)))
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare the loss of every step and every weight, up to rounding."""
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    expected, actual = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        # The gradient of a key's bias is only rounding, which AdamW scales up like any other gradient.
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-3 if "k_proj.bias" in name else 1e-5)


# Stages with and without checkpointing of activations, under DDP and FSDP2.
@pytest.mark.parametrize(
    ("stage", "checkpointing", "how"),
    [
        ("3-sft", "true", "ddp"),
        pytest.param("3-sft", "true", "fsdp2", marks=pytest.mark.slow),
        pytest.param("3-dpo", "false", "ddp", marks=pytest.mark.slow),
        pytest.param("3-dpo", "false", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_steps_of_one(
    recipes: Path, trained: Path, tmp_path: Path, stage: str, how: str, checkpointing: str
) -> None:
    recipe = recipes / f"{stage}.yaml"
    one = run_stage(load_recipe(recipe, STEPS), trained.parent, tmp_path / "one", log=quiet)
    overrides = [*STEPS, f"args.gradient_checkpointing={checkpointing}"]
    if stage == "3-dpo":
        overrides.append(f"args.reference_cache={tmp_path}/references")
        # This run caches some rows' values, so that the second process has one batch more to compute than the first.
        partial = load_recipe(recipe, [*overrides, "data.0.rows=15", "global_batch=2", "args.max_steps=1"])
        run_stage(partial, trained.parent, tmp_path / "partial", log=quiet)
    two = tmp_path / "two"
    output = finish(start(how, str(recipe), *overrides, "--runs", str(trained.parent), "--output", str(two)))
    assert output.count("step 4/4") == 1  # only the main process logs
    assert json.loads((two / "report.json").read_text())["processes"] == 2
    assert_same_run(one, two)
    assert not two.with_name("two.partial").exists()
    if stage == "3-dpo":
        assert len(list(tmp_path.glob("references/*"))) == 1


@pytest.mark.slow
def test_pairs_with_and_without_images_can_be_mixed(recipes: Path, trained: Path, tmp_path: Path) -> None:
    """One process has images where the other has none; shards and gradients are still exchanged."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rows = [
        {"question": f"What is {i}?", "chosen": f"It is a star {i}.", "rejected": "Nothing is."}
        | ({"image": "red.png"} if i % 4 else {})
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data=[{{format: mmpr, path: {tmp_path}/rows.jsonl, images: {tmp_path}}}]"
    overrides = [data, "global_batch=4", "args.per_device_train_batch_size=1"]
    for stage, how in (("3-sft", "ddp"), ("3-dpo", "fsdp2")):
        recipe, folder = recipes / f"{stage}.yaml", tmp_path / f"{stage}-{how}"
        one = run_stage(load_recipe(recipe, overrides), trained.parent, folder / "one", log=quiet)
        two = folder / "two"
        finish(start(how, str(recipe), *overrides, "--runs", str(trained.parent), "--output", str(two)))
        assert_same_run(one, two)


@pytest.mark.parametrize("first", ["before", "after"])
def test_a_blank_image_changes_nothing_but_gives_gradients(recipes: Path, first: str) -> None:
    from pivot_hub.training.tree_layout import use_trees

    base = recipes / "base"
    plain, _ = build_mllm(str(base / "vision"), str(base / "language"))
    seeing, processor = build_mllm(str(base / "vision"), str(base / "language"))
    if first == "after":
        use_trees(seeing)
    encode_blank_images(seeing, processor)
    if first == "before":
        use_trees(seeing)
    ids = torch.tensor([[10, 20, 30, 40]])
    expected, actual = plain(input_ids=ids, labels=ids), seeing(input_ids=ids, labels=ids)
    assert torch.equal(actual.logits, expected.logits)
    expected.loss.backward()
    actual.loss.backward()
    assert plain.model.multi_modal_projector.linear_1.weight.grad is None
    gradient = seeing.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    assert not gradient.any()
    for mine, theirs in zip(seeing.lm_head.parameters(), plain.lm_head.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_what_trains_is_what_has_a_gradient(parts: Path, tmp_path: Path, kind: str) -> None:
    model, _ = build_mllm(str(make_vision(tmp_path / kind, kind)), str(parts / "language"))
    freeze_parts(model, {"vision": 1.0, "projector": 1.0, "language": 1.0})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    ids = torch.tensor([[10, *[model.config.image_token_index] * model.config.image_seq_length, 20]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name for name in trained)
    freeze_parts(model, {"projector": 1.0})
    assert all(p.requires_grad == ("projector" in name) for name, p in model.named_parameters())


def workers(launcher: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Return the processes of a run, by rank."""
    return {
        p.environ()["RANK"]: p for p in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in p.environ()
    }


def when_logged(process: subprocess.Popen[str], log: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_run_stopped_on_two_processes_resumes_on_one_or_two(
    recipes: Path, trained: Path, tmp_path: Path, how: str
) -> None:
    recipe = str(recipes / "3-sft.yaml")
    overrides = [*STEPS, "data.0.rows=120", "args.save_steps=500"]
    one = run_stage(load_recipe(recipe, overrides), trained.parent, tmp_path / "one", log=quiet)
    output = tmp_path / "out"
    command = [recipe, *overrides, "--runs", str(trained.parent), "--output", str(output)]
    process = start(how, *command)
    partial = tmp_path / "out.partial"
    when_logged(process, partial / "metrics.jsonl", 3)
    workers(process)["1"].send_signal(signal.SIGTERM)  # only one process gets it
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "stopped by SIGTERM after step" in errors
    (checkpoint,) = partial.glob("checkpoint-*")
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (how == "fsdp2")
    shutil.copytree(partial, tmp_path / "kept")

    for again in ("one", how):
        log = finish(start(again, *command))
        assert f"resuming from step {checkpoint.name.rsplit('-', 1)[1]}" in log
        assert_same_run(one, output)
        if again == "one":
            shutil.move(output, tmp_path / "alone")
            shutil.copytree(tmp_path / "kept", partial)

    image = Image.new("RGB", (32, 32), "red")
    features = [
        extract_features(folder, tmp_path / f"encoder-{folder.name}", image)
        for folder in (one, tmp_path / "alone", output)
    ]
    assert features[1:] == [pytest.approx(features[0], abs=1e-5)] * 2


def extract_features(checkpoint: Path, folder: Path, image: Image.Image) -> Any:
    from pivot_hub import PivotVisionModel

    encoder = PivotVisionModel.from_pretrained(extract_encoder(checkpoint, folder))
    return encoder.forward_features([image]).last_hidden_state.detach().numpy()


def test_shards_cut_off_while_written_are_not_resumed(tmp_path: Path) -> None:
    from pivot_hub.training.checkpoints import last_checkpoint

    for step, whole in ((2, True), (4, False)):
        shards = tmp_path / f"checkpoint-{step}" / "optimizer_0"
        shards.mkdir(parents=True)
        (shards.parent / "trainer_state.json").write_text("{}")
        if whole:
            (shards / ".metadata").touch()
    assert last_checkpoint(tmp_path, quiet) == tmp_path / "checkpoint-2"


def test_an_error_of_every_process_ends_them_all(recipes: Path, tmp_path: Path) -> None:
    process = start("ddp", str(recipes / "3-dpo.yaml"), "--runs", str(tmp_path / "runs"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "the parent has no checkpoint" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": "other/vision"}, "has `model.vision` other/vision, not base/vision"),
        ({"language": "other/language"}, "has `model.language` other/language, not base/language"),
        ({"vision_feature_layer": -1}, "has `model.feature_layer` -1, not -2"),
        ({"model_type": "qwen2"}, "is a qwen2 model, not an MLLM"),
    ],
)
def test_a_parent_of_another_model_is_refused_before_it_is_loaded(
    recipes: Path, trained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()  # without weights: nothing reads them
    for name in ("config.json", "provenance.json"):
        metadata = json.loads((trained / "2-instruct" / name).read_text())
        for key, value in change.items():
            owner = metadata.get("model", {}) if key in ("vision", "language") else metadata
            if key in owner:
                owner[key] = value
        (parent / name).write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        run_stage(load_recipe(recipes / "3-dpo.yaml"), tmp_path, tmp_path / "out", parent, log=quiet)
    assert not (tmp_path / "out.partial").exists()


def test_a_parent_from_another_checkout_is_taken(own_recipes: Path, trained: Path, tmp_path: Path) -> None:
    parent = tmp_path / "elsewhere"
    shutil.copytree(trained / "2-instruct", parent)
    folder = run_stage(load_recipe(own_recipes / "3-sft.yaml"), tmp_path, tmp_path / "out", parent, log=quiet)
    assert (folder / "report.json").is_file()


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_takes_every_key_of_its_configs(name: str) -> None:
    """Every key is one that accelerate knows, and its value reaches the launcher."""
    import yaml
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = ACCELERATE_CONFIGS / f"{name}.yaml"
    assert file.read_text().startswith("# ")
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    given = yaml.safe_load(file.read_text())
    inner = given.get("fsdp_config", {}) | given.get("deepspeed_config", {})
    assert inner.keys() <= known
    args, config, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "-m", "pivot_hub"]))
    assert given["distributed_type"] == config.distributed_type.value
    assert args.mixed_precision == "bf16"
    for key, value in inner.items():
        assert getattr(args, key) == value
    assert (args.use_fsdp, args.use_deepspeed, args.multi_gpu) == (name == "fsdp2", "zero" in name, name == "ddp")


def test_fsdp_settings_reach_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(ACCELERATE_CONFIGS / "fsdp2.yaml"), "-m", "pivot_hub"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    for key, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.state_dict_type.name) == (2, "SHARDED_STATE_DICT")
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading


def test_bfloat16_trains_on_a_cpu(recipes: Path, trained: Path, tmp_path: Path) -> None:
    folder = run_stage(
        load_recipe(recipes / "3-sft.yaml", ["args.bf16=true"]), trained.parent, tmp_path / "out", log=quiet
    )
    expected, actual = losses(trained / "3-sft"), losses(folder)
    assert actual[0] == pytest.approx(expected[0], rel=0.01)
    assert actual != expected


def test_an_8_bit_optimizer_without_its_package_is_refused(
    recipes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    find: Callable[[str], Any] = lambda name: None if name == "bitsandbytes" else find_spec(name)  # noqa: E731
    monkeypatch.setattr("pivot_hub.training.stage.find_spec", find)
    loaded = load_recipe(recipes / "3-sft.yaml", ["args.optim=adamw_bnb_8bit"])
    with pytest.raises(RecipeError, match="`pip install bitsandbytes`"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "named", "batches"), [(float("nan"), True, 1), (1e4, False, 1), (float("nan"), False, 2), (1e4, True, 2)]
)
def test_a_loss_that_diverges_names_its_rows(
    recipes: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    named: bool,
    batches: int,
) -> None:
    """A batch's loss stops the run at the end of the 13th step; a loss of 5 times the usual, in the 12th, does not."""
    from trl import SFTTrainer

    from pivot_hub.training.sft import PivotSFTTrainer

    calls: list[dict[str, Any]] = []
    compute, step = SFTTrainer.compute_loss, PivotSFTTrainer.training_step

    def wild(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        assert "row" not in inputs
        calls.append(inputs)
        step_number, earlier = divmod(len(calls) - 1, batches)
        factor = {12: 5.0, 13: 1.0 if earlier else value}.get(step_number + 1, 1.0)
        return compute(self, model, inputs, *args, **kwargs) * factor

    def numbered(self: Any, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        if not named:
            self.row_ids = None
        return step(self, model, inputs | {"row": [2 * len(calls), 2 * len(calls) + 1]}, *args)

    monkeypatch.setattr(SFTTrainer, "compute_loss", wild)
    monkeypatch.setattr(PivotSFTTrainer, "training_step", numbered)
    overrides = [f"data.0.rows={32 * batches}", "args.per_device_train_batch_size=2", "args.save_steps=5"]
    loaded = load_recipe(recipes / "3-sft.yaml", [*overrides, f"args.gradient_accumulation_steps={batches}"])
    with pytest.raises(TrainingError, match=r"out\.stopped\.json names the rows of the step"):
        run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    metadata = json.loads((tmp_path / "out.stopped.json").read_text())
    assert metadata["step"] == 13
    rows = range(24 * batches, 26 * batches)
    assert metadata["rows"] == ([f"train/{row}" for row in rows] if named else [*rows])
    assert metadata["loss"] == "nan" if value != value else metadata["loss"] > 1e4
    monkeypatch.undo()
    run_stage(loaded, trained.parent, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out.stopped.json").exists()


def test_a_job_is_what_the_hub_command_takes(recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, Volume
    from huggingface_hub.cli.hf import app

    from pivot_hub.training.jobs import hf_job_command

    loaded = load_recipe(recipes / "1-align.yaml")
    command = hf_job_command(loaded, ["args.max_steps=3"], flavor="a100x4", bucket="me/runs", package="pivot-hub==9")
    sent: dict[str, Any] = {}

    class Sent(Exception):
        pass

    def record(self: HfApi, **job: Any) -> None:
        sent.update(job)
        raise Sent

    def sync(self: HfApi, source: str, mount_path: str, **options: Any) -> Volume:
        assert Path(source).is_dir()
        return Volume(type="bucket", source="me/jobs", mount_path=mount_path, read_only=True)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(HfApi, "run_job", record)
    monkeypatch.setattr(HfApi, "sync_job_volume", sync)
    assert command[0] == "hf"
    assert not any("hf_secret" in part for part in command)
    with pytest.raises(Sent):
        app(command[1:], standalone_mode=False)
    assert sent["secrets"] == {"HF_TOKEN": "hf_secret"}
    assert sent["flavor"] == "a100x4"
    assert sent["command"][sent["command"].index("--with") + 1] == "pivot-hub==9"
    places = {v.mount_path: (v.source, bool(v.read_only)) for v in sent["volumes"]}
    assert places == {"/runs": ("me/runs", False), "/recipes/tiny": ("me/jobs", True), "/accelerate": ("me/jobs", True)}
    tail = "--num_processes 4 -m pivot_hub train /recipes/tiny/1-align.yaml args.max_steps=3 --runs /runs"
    assert " ".join(sent["command"]).endswith(f"--config_file /accelerate/ddp.yaml {tail}")

    with pytest.raises(RecipeError, match="is named by its environment variable"):
        hf_job_command(loaded, flavor="a10g-small", bucket="me/runs", package="pivot-hub", secrets=["hf_secret"])
    far = load_recipe(recipes / "1-align.yaml", [f"model.vision={tmp_path}"])
    with pytest.raises(RecipeError, match="lies outside of the recipe's folder"):
        hf_job_command(far, flavor="a10g-small", bucket="me/runs", package="pivot-hub")
    with pytest.raises(SourceError, match="is on this machine, of whose files the other has none"):
        hf_job_command(loaded, flavor="a10g-small", bucket="me/runs", package=str(tmp_path))


def test_a_job_is_submitted_only_if_its_package_can_be_installed(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pivot_hub.cli import app

    submitted = tmp_path / "submitted"
    hf = tmp_path / "hf"
    hf.write_text(f"#!/bin/sh\ntouch {submitted}\n")
    hf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # an index that has none
    command = ["jobs", str(recipes / "1-align.yaml"), "--bucket", "me/runs", "--submit"]
    result = CliRunner().invoke(app, [*command, "--package", "pivot-hub==99"])
    assert isinstance(result.exception, SourceError)
    assert "pivot-hub==99 cannot be installed" in str(result.exception)
    assert not submitted.exists()
    monkeypatch.setattr("pivot_hub.package_source.check_installable", lambda package: None)
    assert CliRunner().invoke(app, [*command, "--package", "pivot-hub==99"]).exit_code == 0
    assert submitted.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "shapes/3-dpo", "--processes", "0"],
        ["data", "check", "shapes/3-dpo", "--workers", "-1"],
        ["plan", "shapes/3-dpo", "--lengths", "/nowhere.json"],
        ["plan", "shapes/3-dpo", "args.loss_type=[sigmoidd]"],
        ["plan", "shapes/3-dpo", "args.save_only_model=true"],
        ["plan", "shapes/3-dpo", "args.ignore_data_skip=true"],
        ["plan", "shapes/3-dpo", "args.sync_ref_model=true"],
        ["plan", "shapes/3-dpo", "learning_rate.vision=.inf"],
        ["plan", "shapes/3-dpo", "args.max_grad_norm=.inf"],
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from pivot_hub.cli import app

    result = CliRunner().invoke(app, arguments)
    assert getattr(result.exception, "exit_code", None) == 2 or result.exit_code == 2
    name = arguments[-2] if arguments[-2].startswith("--") else arguments[-1].split("=")[0].split(".")[-1]
    assert name in f"{result.exception} {result.output}"


def test_the_slurm_script_queues_again_when_it_is_stopped(tmp_path: Path) -> None:
    """With substitutes for SLURM's commands: the launcher gets the signal, and the script waits for its end."""
    for name, body in {
        "srun": 'trap "sleep 0.3; echo saved >> log; exit 1" TERM; echo "$@" > log; while :; do sleep 0.05; done',
        "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> log; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8", "NODEID": "0"}
    environment = {**os.environ, **{f"SLURM_{k}": v for k, v in slurm.items()}, "RECIPE": "r.yaml", "OUTPUT": "out"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = ROOT / "recipes" / "slurm" / "train.sbatch"
    process = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=environment)
    log = tmp_path / "log"
    deadline = time.monotonic() + 20
    while not log.is_file() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    launched, *rest = log.read_text().splitlines()[-3:]
    assert "16 node1 20007 r.yaml --output out" in launched
    assert rest == ["saved", "requeue 7"]
