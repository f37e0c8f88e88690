"""Short names: what they stand for, what wins over them, and the message where there is no encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pivot_hub import PivotVisionModel, read_encoder
from pivot_hub.cli import app
from pivot_hub.config.encoder_names import (
    CARDS,
    base_encoder,
    hub_repository,
    resolve_encoder,
    shipped_encoder,
    short_names,
)
from pivot_hub.config.recipe import RECIPES
from pivot_hub.encoder import PivotVisionBackbone, PivotVisionConfig
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.diff import diff_towers
from pivot_hub.planner.encoding import plan_encoding
from pivot_hub.publish.card_inputs import read_prose

BASE = RECIPES / "shapes" / "base" / "vision"


def test_a_short_name_is_a_card_and_stands_for_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    assert short_names() == sorted(file.stem for file in CARDS.glob("*.yaml"))
    assert all(hub_repository(name) == read_prose(name).repository for name in short_names())
    monkeypatch.setenv("PIVOT_HUB_ORG", "acme")
    assert hub_repository("siglip2-so400m") == "acme/siglip2-so400m"
    assert hub_repository("google/siglip2-so400m-patch16-384") == "google/siglip2-so400m-patch16-384"
    with pytest.raises(CheckpointError, match="acme/siglip2-so400m is not on the Hub"):
        resolve_encoder("siglip2-so400m")


def test_a_shipped_encoder_loads_by_its_short_name() -> None:
    assert shipped_encoder("shapes-base") == BASE
    for kind in (PivotVisionModel, PivotVisionBackbone):
        model = kind.from_pretrained("shapes-base")
        assert type(model) is kind
        assert model.config.hidden_size == 96
    assert PivotVisionConfig.from_pretrained("shapes-base").image_size == 64
    assert read_encoder("shapes-base")[0].config.hidden_size == 96


def test_a_folder_wins_and_other_names_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, tmp_path / "siglip2-so400m")
    assert resolve_encoder("siglip2-so400m") == "siglip2-so400m"
    assert PivotVisionModel.from_pretrained("siglip2-so400m").config.hidden_size == 96
    assert resolve_encoder("owner/siglip2-so400m") == "owner/siglip2-so400m"
    assert resolve_encoder(Path("shapes-dpo")) == "shapes-dpo"
    assert hub_repository("siglip2-so400m") == "pivot/siglip2-so400m"  # pull writes such a folder


@pytest.mark.parametrize(
    "load",
    [
        resolve_encoder,
        read_encoder,
        PivotVisionModel.from_pretrained,
        PivotVisionConfig.from_pretrained,
        lambda name: diff_towers(name, "shapes-base"),
    ],
)
def test_an_encoder_that_is_not_published_names_the_commands_that_make_it(load: object) -> None:
    assert callable(load)
    with pytest.raises(CheckpointError) as caught:
        load("siglip2-so400m")
    message = str(caught.value)
    assert "pivot train siglip2-so400m/3-dpo --parents" in message
    assert "pivot extract runs/siglip2-so400m/3-dpo siglip2-so400m" in message
    assert "shapes-base" in message


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "siglip2-so40m"],
        ["probe", "siglip2-so40m"],
        ["export", "siglip2-so40m", "out"],
        ["plan-encode", "siglip2-so40m", "--images", "1"],
        ["encode", str(BASE.parents[3] / "spaces" / "browser" / "pictures"), "--encoder", "siglip2-so40m"],
    ],
)
def test_commands_name_the_nearest_encoder(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, CheckpointError)
    assert "did you mean siglip2-so400m" in str(error)


def test_commands_take_short_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "shapes-base"])
    assert result.exit_code == 0, result.output
    assert "sound" in result.output


def test_an_encoder_is_planned_before_it_is_trained() -> None:
    assert base_encoder("siglip2-so400m") == "google/siglip2-so400m-patch16-384"
    assert base_encoder("shapes-dpo") == str(BASE)
    plan = plan_encoding("siglip2-base", 10)
    assert plan.flops_per_image == plan_encoding("google/siglip2-base-patch16-384", 10).flops_per_image
