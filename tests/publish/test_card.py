"""Cards: the same facts give the same bytes, a missing fact is named, and every number is a result's."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from pydantic import ValidationError

from pivot_hub.config.recipe import recipe_files
from pivot_hub.encoder.repository import verify_repository
from pivot_hub.errors import CardError
from pivot_hub.probes.result import write_results
from pivot_hub.publish.card_check import card_problems
from pivot_hub.publish.card_inputs import CARDS, EncoderMetadata, read_metadata, read_prose
from pivot_hub.publish.card_metadata import METADATA_KEYS
from pivot_hub.publish.card_render import FIGURE, NOT_TRAINED, card_files, render_card
from pivot_hub.publish.staging import write_card
from tests.local_server.metadata import metadata_problems
from tests.publish.cards import FACTS, TRAINED, facts_of, rendered
from tests.publish.publishable import make_prose, make_publishable, make_results

PROSE_FILES = sorted(CARDS.glob("*.yaml"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_publishable(tmp_path_factory.mktemp("encoder") / "tiny-dpo")


def test_committed_cards_are_what_their_facts_give_to_the_byte() -> None:
    assert len(PROSE_FILES) == 11
    for name, content in rendered().items():
        committed = (CARDS / name).read_bytes()
        if name == FIGURE:  # fonts and drawing are the library's: the picture, not its bytes
            old, new = (np.asarray(Image.open(io.BytesIO(made)).convert("L"), float) for made in (committed, content))
            assert old.shape == new.shape
            assert np.abs(old - new).mean() < 1
            continue
        assert content == committed, f"{name}: `python -m tests.publish.cards` writes it anew"


@pytest.mark.parametrize("name", [f.stem for f in PROSE_FILES])
def test_every_card_is_linted_offline(name: str) -> None:
    """By huggingface_hub's own reading, and by the rules that the Hub applies before a commit."""
    text = (CARDS / f"{name}.md").read_text()
    if name not in TRAINED:
        assert text.splitlines()[0] == NOT_TRAINED
        assert not text.startswith("---")
        return
    assert metadata_problems(text, "model") == ([], [])
    card = ModelCard(text, ignore_metadata_errors=False)
    written = card.data.to_dict()
    assert written.keys() <= METADATA_KEYS
    assert ModelCard(str(card)).data.to_dict() == written
    own = facts_of(name).own_results()
    assert [(e.task_name, e.metric_type, e.metric_value) for e in card.data.get("eval_results")] == [
        (r.task, r.metric, round(r.value, 2)) for r in own
    ]
    for file, content in card_files(facts_of(name), read_prose(name)).items():
        if file.startswith(".eval_results/"):
            entries = parse_eval_result_entries(yaml.safe_load(content))
            assert [e.value for e in entries] == [round(r.value, 2) for r in own]
            assert all("95% interval" in str(e.notes) for e in entries)


def test_every_recipe_that_makes_a_published_encoder_has_prose() -> None:
    recipes = {f"{f.parent.name}/{f.stem}" for f in recipe_files() if f.stem == "3-dpo"}
    recipes.remove("shapes-224/3-dpo")  # an experiment for a GPU, of which nothing is published
    assert recipes == {read_prose(f).recipe for f in PROSE_FILES} - {"shapes/3-sft", "shapes/0-vision"}


def test_a_card_says_what_it_must(encoder: Path) -> None:
    text = str(render_card(read_metadata(encoder), make_prose()))
    for said in (
        "base_model: pivot/tiny-base",
        "base_model_relation: finetune",
        "pipeline_tag: image-feature-extraction",
        "library_name: transformers",
        "| shapes/colour | balanced_accuracy | 50.0 [47.5, 52.5] | 60.0 [57.5, 62.5] | 70.0 [67.5, 72.5] | 100 |",
        "| tiny | 100 |",  # the partner of what needs one
        "DPO is higher on shapes/colour (balanced_accuracy), shapes/vqa/all (exact_match)",
        "pivot/tiny-base + a random head\n└─ tiny/3-dpo",
        "held against pivot/tiny-sft (SFT)",
        "energy was not measured",
        "pivot train tiny/3-dpo",
        "eprint = {2510.16333}",
        "It is random.",
    ):
        assert said in text, said


def test_the_snippet_opens_all_three_doors(encoder: Path) -> None:
    """The card's own code, with the repository's folder in place of its name."""
    text = str(render_card(read_metadata(encoder), make_prose()))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count('"pivot/tiny-dpo"') == 3
    made: dict[str, Any] = {}
    exec(code.replace("pivot/tiny-dpo", str(encoder)), made)
    assert type(made["native"]).__name__ == "SiglipVisionModel"
    assert type(made["encoder"]).__name__ == type(made["remote"]).__name__ == "PivotVisionModel"
    assert "transformers_modules" in type(made["remote"]).__module__
    said = re.search(r"last_hidden_state  # (\(.*?\))", code)
    assert said is not None
    assert str(tuple(made["features"].last_hidden_state.shape)) == said[1]


def _without(path: str) -> Callable[[EncoderMetadata], EncoderMetadata]:
    file, _, key = path.partition(".")

    def remove(metadata: EncoderMetadata) -> EncoderMetadata:
        content: Any = json.loads(json.dumps(getattr(metadata, file)))
        inside = content
        *parents, last = key.split(".")
        for part in parents:
            inside = inside[part]
        del inside[last]
        return EncoderMetadata(**{**vars(metadata), file: content})

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
        (lambda f: EncoderMetadata(**{**vars(f), "results": []}), "results/*.json are missing"),
        (
            lambda f: EncoderMetadata(**{**vars(f), "results": [r for r in f.results if r.encoder != "sft"]}),
            "of the sft encoder",
        ),
        (
            lambda f: EncoderMetadata(**{**vars(f), "results": [r for r in f.results if r.encoder != "dpo"]}),
            "for these weights",
        ),
    ],
)
def test_a_missing_fact_is_named(
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
def test_prose_that_lacks_what_the_facts_need_is_named(encoder: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CardError, match=re.escape(named)):
        render_card(read_metadata(encoder), make_prose(**changes))


def test_data_and_names_on_the_hub_reach_the_metadata(encoder: Path) -> None:
    prose = make_prose(
        data={"shapes": {"hub": "pivot/shapes-world", "licence": "MIT"}},
        license="other",
        license_name="as the base's",
        names={"base/vision": "google/siglip2-base-patch16-384"},
    )
    written = render_card(read_metadata(encoder), prose).data.to_dict()
    assert written["datasets"] == ["pivot/shapes-world"]
    assert written["base_model"] == "google/siglip2-base-patch16-384"
    assert (written["license"], written["license_name"]) == ("other", "as the base's")
    assert written["model-index"][0]["name"] == "pivot/tiny-dpo"


def test_no_licence_is_defaulted() -> None:
    with pytest.raises(ValidationError, match="license"):
        make_prose(license=None)


def test_prose_holds_no_number_of_a_result_and_no_unknown_key(tmp_path: Path) -> None:
    good = yaml.safe_load((CARDS / "shapes-dpo.yaml").read_text())
    file = tmp_path / "mine.yaml"
    for change, said in (
        ({"about": "It reaches 79.4 percent."}, "numbers come from results"),
        ({"limits": ["Up to 3.7 points worse."]}, "numbers come from results"),
        ({"metrics": ["accuracy"]}, "unknown key `metrics`"),
    ):
        file.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(CardError, match=re.escape(said)):
            read_prose(file)
    with pytest.raises(CardError, match="shapes-dpo"):
        read_prose("shapes-dop")


def test_an_unknown_metadata_key_is_refused(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pivot_hub.publish.card_metadata.METADATA_KEYS", METADATA_KEYS - {"tags"})
    with pytest.raises(CardError, match="metadata key 'tags'"):
        render_card(read_metadata(encoder), make_prose())


def test_paper_numbers_stay_out_of_the_metadata() -> None:
    text = (CARDS / "siglip2-so400m.md").read_text()
    assert "3.7 points" in text
    assert "What the paper reports of its own encoders" in text
    assert "model-index" not in text


def test_a_written_card_is_sealed_and_a_changed_number_is_found(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    assert write_card(folder, make_prose())
    assert not write_card(folder, make_prose())
    assert verify_repository(folder) == []
    assert card_problems(folder) == []
    with Image.open(folder / FIGURE) as figure:
        assert np.asarray(figure.convert("L")).std() > 10
    readme, evals = folder / "README.md", folder / ".eval_results" / "shapes.yaml"
    for file, old, new, found in (
        (readme, "value: 70.0", "value: 71.0", "model-index says (71.0,"),
        (readme, "| 70.0 [67.5, 72.5]", "| 71.0 [67.5, 72.5]", "no row with the results of shapes/colour"),
        (evals, "value: 70.0", "value: 71.0", "shapes.yaml says 71.0"),
    ):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        problems = card_problems(folder)
        assert len(problems) == 1
        assert found in problems[0]
        file.write_text(text)
    results = folder / "results" / "dpo.json"
    results.write_text(results.read_text().replace('"value": 70.0', '"value": 70.1'))
    assert len(card_problems(folder)) == 3


def test_a_failed_card_writes_nothing(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    kept = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(CardError):
        write_card(folder, make_prose(), results={"dpo": []})
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == kept


def test_facts_hold_no_weights() -> None:
    assert {f.suffix for f in FACTS.rglob("*") if f.is_file()} == {".json", ".yaml"}


def test_the_command_puts_results_and_card_into_a_repository(encoder: Path, tmp_path: Path) -> None:
    """Files that `pivot probe --json` wrote, whose names are the encoders' in the card."""
    folder = Path(shutil.copytree(encoder, tmp_path / "tiny-dpo"))
    shutil.rmtree(folder / "results")
    prose = tmp_path / "tiny.yaml"
    prose.write_text(yaml.safe_dump(make_prose().model_dump(exclude_none=True)))
    command = [sys.executable, "-m", "pivot_hub", "card", str(folder), "--prose", str(prose)]
    for name, sha in (("sft", "c" * 64), ("dpo", read_metadata(folder).encoder_sha256)):
        write_results(tmp_path / f"{name}.json", make_results(f"tiny-{name}", sha, 60.0))
        command += ["--results", str(tmp_path / f"{name}.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify_repository(folder) == []
    assert card_problems(folder) == []
    assert "| probe | metric | sft | **dpo** (this) | n |" in (folder / "README.md").read_text()
    # Another file of results joins those that are there.
    write_card(folder, make_prose(), results={"base": make_results("base", "b" * 64, 50.0)})
    assert card_problems(folder) == []
    assert "| probe | metric | base | sft | **dpo** (this) | n |" in (folder / "README.md").read_text()
    done = subprocess.run(command[:5], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no prose of this name" in done.stderr
