"""Cards: the same metadata gives the same bytes, a missing value is named, and a changed number is detected."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from pydantic import ValidationError

from pivot_hub.config.encoder_names import CARDS
from pivot_hub.config.recipe import recipe_files
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.errors import CardError
from pivot_hub.probes.result import write_results
from pivot_hub.publish import card_collection
from pivot_hub.publish.card_check import card_problems
from pivot_hub.publish.card_collection import RECORDED, TRAINED, recorded_metadata, render_all_cards
from pivot_hub.publish.card_inputs import EncoderMetadata, read_metadata, read_prose
from pivot_hub.publish.card_render import FIGURE, NOT_TRAINED, card_files, render_card
from pivot_hub.publish.staging import write_card
from tests.local_server.card_rules import metadata_problems
from tests.publish.hub_commands import run
from tests.publish.publishable import make_prose, make_publishable, make_results

PROSE_FILES = sorted(CARDS.glob("*.yaml"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_publishable(tmp_path_factory.mktemp("encoder") / "tiny-dpo")


def test_committed_cards_are_rendered_from_the_recorded_metadata() -> None:
    assert len(PROSE_FILES) == 11
    for name, content in render_all_cards().items():
        committed = (CARDS / name).read_bytes()
        if name == FIGURE:  # the bytes depend on the versions of the libraries, so the pixels are compared
            old, new = (np.asarray(Image.open(io.BytesIO(png)).convert("L"), float) for png in (committed, content))
            assert old.shape == new.shape
            assert np.abs(old - new).mean() < 1
            continue
        assert content == committed, f"{name}: `pivot card --all` writes it"


@pytest.mark.parametrize("name", [f.stem for f in PROSE_FILES])
def test_every_card_follows_the_rules_of_the_hub(name: str) -> None:
    """As huggingface_hub parses it, and as the Hub checks it before a commit."""
    text = (CARDS / f"{name}.md").read_text()
    if name not in TRAINED:
        assert text.splitlines()[0] == NOT_TRAINED
        assert not text.startswith("---")
        return
    assert metadata_problems(text, "model") == ([], [])
    card = ModelCard(text, ignore_metadata_errors=False)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    own = recorded_metadata(name).own_results()
    assert [(e.task_name, e.metric_type, e.metric_value) for e in card.data.get("eval_results")] == [
        (r.task, r.metric, round(r.value, 2)) for r in own
    ]
    for file, content in card_files(recorded_metadata(name), read_prose(name)).items():
        if file.startswith(".eval_results/"):
            entries = parse_eval_result_entries(yaml.safe_load(content))
            assert [e.value for e in entries] == [round(r.value, 2) for r in own]
            assert all("95% interval" in str(e.notes) for e in entries)


def test_every_recipe_that_makes_a_published_encoder_has_prose() -> None:
    recipes = {f"{f.parent.name}/{f.stem}" for f in recipe_files() if f.stem == "3-dpo"}
    recipes -= {"shapes-224/3-dpo", "shapes-few/3-dpo"}  # of studies, whose encoders are not published
    assert recipes == {read_prose(f).recipe for f in PROSE_FILES} - {"shapes/3-sft", "shapes/0-vision"}


def test_a_card_contains_all_its_parts(encoder: Path) -> None:
    text = str(render_card(read_metadata(encoder), make_prose()))
    for part in (
        "base_model: pivot/tiny-base",
        "base_model_relation: finetune",
        "pipeline_tag: image-feature-extraction",
        "library_name: transformers",
        "| shapes/colour | balanced_accuracy | 50.0 [47.5, 52.5] | 60.0 [57.5, 62.5] | 70.0 [67.5, 72.5] | 100 |",
        "| tiny | 100 |",  # the partner of a result that needs an MLLM
        "DPO is higher on shapes/colour (balanced_accuracy), shapes/vqa/all (exact_match)",
        "pivot/tiny-base + a random language model\n└─ tiny/3-dpo",
        "compared with pivot/tiny-sft (SFT)",
        "energy was not measured",
        "pivot train tiny/3-dpo",
        "eprint = {2510.16333}",
        "It is random.",
        "## Intended uses\n- Image features at patch level",
    ):
        assert part in text, part


def test_the_snippet_runs_all_three_loading_paths(encoder: Path) -> None:
    """The code of the card, with the repository's folder in place of its name."""
    text = str(render_card(read_metadata(encoder), make_prose()))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count('"pivot/tiny-dpo"') == 3
    variables: dict[str, Any] = {}
    exec(code.replace("pivot/tiny-dpo", str(encoder)), variables)
    assert type(variables["native"]).__name__ == "SiglipVisionModel"
    assert type(variables["encoder"]).__name__ == type(variables["remote"]).__name__ == "PivotVisionModel"
    assert "transformers_modules" in type(variables["remote"]).__module__
    shape = re.search(r"last_hidden_state  # (\(.*?\))", code)
    assert shape is not None
    assert str(tuple(variables["features"].last_hidden_state.shape)) == shape[1]


def _without(path: str) -> Callable[[EncoderMetadata], EncoderMetadata]:
    file, _, key = path.partition(".")

    def remove(metadata: EncoderMetadata) -> EncoderMetadata:
        content: Any = json.loads(json.dumps(getattr(metadata, file)))
        mapping = content
        *parents, last = key.split(".")
        for part in parents:
            mapping = mapping[part]
        del mapping[last]
        return replace(metadata, **{file: content})

    return remove


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without("config.pivot.stage"), "config.pivot.stage is missing"),
        (_without("config.pivot.base_model"), "config.pivot.base_model is missing"),
        (_without("config.pivot.language_head"), "config.pivot.language_head is missing"),
        (_without("config.hidden_size"), "config.hidden_size is missing"),
        (_without("provenance.mllm"), "provenance.mllm is missing"),
        (_without("provenance.mllm.cost"), "cost is missing"),
        (_without("provenance.mllm.machine"), "machine is missing"),
        (_without("provenance.mllm.commit"), "provenance.commit is missing"),
        (_without("provenance.commands"), "prose.commands is missing"),
        (_without("provenance.files"), "provenance.files is missing"),
        (lambda m: m.with_results([]), "results/*.json are missing"),
        (
            lambda m: m.with_results([r for r in m.results if r.encoder != "sft"]),
            "of the sft encoder",
        ),
        (
            lambda m: m.with_results([r for r in m.results if r.encoder != "dpo"]),
            "for these weights",
        ),
    ],
)
def test_a_missing_value_is_named(
    encoder: Path, change: Callable[[EncoderMetadata], EncoderMetadata], named: str
) -> None:
    with pytest.raises(CardError, match=re.escape(named)):
        render_card(change(read_metadata(encoder)), make_prose())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"benchmarks": {}}, "prose.benchmarks.shapes is missing"),
        ({"data": {}}, "prose.data.shapes is missing"),
    ],
)
def test_a_gap_in_the_prose_is_named(encoder: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CardError, match=re.escape(named)):
        render_card(read_metadata(encoder), make_prose(**changes))


def test_data_and_names_on_the_hub_reach_the_metadata(encoder: Path) -> None:
    prose = make_prose(
        data={"shapes": {"hub": "pivot/shapes", "licence": "MIT"}},
        license="other",
        license_name="as the base's",
        names={"base/vision": "google/siglip2-base-patch16-384"},
    )
    written = render_card(read_metadata(encoder), prose).data.to_dict()
    assert written["datasets"] == ["pivot/shapes"]
    assert written["base_model"] == "google/siglip2-base-patch16-384"
    assert (written["license"], written["license_name"]) == ("other", "as the base's")
    assert written["model-index"][0]["name"] == "pivot/tiny-dpo"


def test_no_licence_is_defaulted() -> None:
    with pytest.raises(ValidationError, match="license"):
        make_prose(license=None)


def test_unknown_keys_and_names_of_prose_are_refused(tmp_path: Path) -> None:
    prose = yaml.safe_load((CARDS / "shapes-dpo.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**prose, "metrics": ["accuracy"]}))
    with pytest.raises(CardError, match="unknown key `metrics`"):
        read_prose(file)
    with pytest.raises(CardError, match="shapes-dpo"):
        read_prose("shapes-dop")


def test_numbers_of_the_paper_stay_out_of_the_metadata() -> None:
    text = (CARDS / "siglip2-so400m.md").read_text()
    assert "3.7 points" in text
    assert "The paper reports of its own encoders" in text
    assert "model-index" not in text


def test_a_written_card_is_in_the_manifest_and_a_changed_number_is_detected(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / ".DS_Store").write_text("x")
    assert write_card(folder, make_prose())
    assert not write_card(folder, make_prose())
    listed = json.loads((folder / "provenance.json").read_text())["files"]
    assert "README.md" in listed
    assert not {".git/HEAD", ".DS_Store"} & listed.keys()
    assert verify_repository(folder) == []
    assert card_problems(folder) == []
    with Image.open(folder / FIGURE) as figure:
        assert np.asarray(figure.convert("L")).std() > 10
    readme = folder / "README.md"
    text = readme.read_text()
    assert "value: 70.0" in text
    readme.write_text(text.replace("value: 70.0", "value: 71.0"))
    problems = card_problems(folder)
    assert len(problems) == 1
    assert "model-index says (71.0," in problems[0]
    readme.write_text(text)
    results = folder / "results" / "dpo.json"
    results.write_text(results.read_text().replace('"value": 70.0', '"value": 70.1'))
    assert len(card_problems(folder)) == 1


@pytest.mark.parametrize("architectures", [[], 3, "x"])
def test_a_value_of_another_type_is_an_error_message(encoder: Path, tmp_path: Path, architectures: Any) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures, "patch_size": "8"}))
    with pytest.raises(CardError, match="a value of another type"):
        write_card(folder, make_prose())
    assert not (folder / "README.md").exists()


def test_a_failed_card_writes_nothing(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    kept = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(CardError):
        write_card(folder, make_prose(), results={"dpo": []})
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == kept


def test_the_recorded_metadata_holds_no_weights() -> None:
    assert {f.suffix for f in RECORDED.rglob("*") if f.is_file()} == {".json", ".yaml"}


def test_the_command_puts_results_and_card_into_a_repository(encoder: Path, tmp_path: Path) -> None:
    """From files of `pivot probe --json`, whose names become the column headings of the card."""
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    shutil.rmtree(folder / "results")
    prose = tmp_path / "tiny.yaml"
    prose.write_text(yaml.safe_dump(make_prose().model_dump(exclude_none=True)))
    arguments = [str(folder), "--prose", str(prose)]
    for name, sha in (("sft", "c" * 64), ("dpo", read_metadata(folder).encoder_sha256)):
        write_results(tmp_path / f"{name}.json", make_results(f"tiny-{name}", sha, 60.0))
        arguments += ["--results", str(tmp_path / f"{name}.json")]
    done = run(["card", *arguments])
    assert done["code"] == 0, done["err"]
    assert verify_repository(folder) == []
    assert card_problems(folder) == []
    assert "| probe | metric | sft | **dpo** (this) | n |" in (folder / "README.md").read_text()
    assert "These features are `hidden_states[-2]` of the native class" in (folder / "README.md").read_text()
    # Another file of results is added to those that are there.
    write_card(folder, make_prose(), results={"base": make_results("base", "b" * 64, 50.0)})
    assert card_problems(folder) == []
    assert "| probe | metric | base | sft | **dpo** (this) | n |" in (folder / "README.md").read_text()
    done = run(["card", str(folder)])
    assert done["code"] == 2
    assert "there is no prose of this name" in done["err"]


def test_all_cards_are_rendered_with_the_results_of_a_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a copy of model_cards/, with a quickstart whose results differ."""
    cards = Path(shutil.copytree(CARDS, tmp_path / "model_cards"))
    monkeypatch.setattr(card_collection, "CARDS", cards)
    monkeypatch.setattr(card_collection, "RECORDED", cards / "facts")
    (cards / "shapes-sft.md").unlink()
    assert "shapes-sft.md" in card_collection.write_all_cards()
    assert "shapes-sft.md" not in card_collection.write_all_cards()
    encoders = tmp_path / "quickstart" / "hub" / "pivot"
    for stage in ("sft", "dpo"):
        encoder = encoders / f"shapes-{stage}"
        shutil.copytree(RECORDED / encoder.name, encoder)
        results = encoder / "results" / f"{stage}.json"
        results.write_text(results.read_text().replace('"n": 1000', '"n": 999'))
    changed = card_collection.write_all_cards(tmp_path / "quickstart")
    assert set(changed) - {FIGURE} == {"shapes-dpo.md", "shapes-sft.md"}
    assert "| 999 |" in (cards / "shapes-dpo.md").read_text()
    with pytest.raises(CardError, match="give the folder of a finished"):
        card_collection.write_all_cards(tmp_path / "none")


def test_all_cards_need_a_source_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_collection, "PACKAGE", CARDS.parent)
    with pytest.raises(CardError, match="source checkout"):
        card_collection.write_all_cards()


@pytest.mark.parametrize("arguments", [[], ["--all", "hub/mine"], ["hub/mine", "--quickstart", "quickstart"]])
def test_a_card_is_of_one_encoder_or_of_all(arguments: list[str]) -> None:
    done = run(["card", *arguments])
    assert done["code"] == 2
    assert "--all" in done["err"]
