"""Words that learn from the image: norms as by plain autograd, exact kinds on scenes, rows of files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from pivot_hub.cli import app
from pivot_hub.data.synthetic import KINDS, ShapesDataset, draw_counterfactual
from pivot_hub.errors import DataError, PivotError
from pivot_hub.explain.word_gradients import Example, TokenNorm, measure_file, summarise, token_norms
from pivot_hub.explain.word_kinds import OTHER, WORDS, listed_spans, read_words, shapes_spans, token_kinds
from pivot_hub.mllm.load import load_mllm
from tests.encoder.originals import IMAGE_PX

BETA = 0.3


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).normal(128, 60, (IMAGE_PX, IMAGE_PX, 3)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


EXAMPLE = Example("r:1", noise(0), "What is it?", "It is a red star.", "It is a green ring at the top.", noise(1))


@pytest.fixture(scope="module")
def mllm(trained: Path) -> tuple[Any, Any]:
    model, processor = load_mllm(trained / "3-dpo")
    return model.eval(), processor


@pytest.fixture(scope="module")
def reference(trained: Path) -> Any:
    return load_mllm(trained / "2-instruct")[0].eval()


def plain_log_probs(model: Any, processor: Any, image: Image.Image, answer: str) -> tuple[Tensor, Tensor, list[int]]:
    """Log-probability of each token of an answer by one plain call, the projector's output, and the tokens."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": EXAMPLE.question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    text = f"{prompt}{answer}<|im_end|>"
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    outputs: list[Tensor] = []

    def start_here(module: Any, args: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[0]

    hook = model.model.multi_modal_projector.register_forward_hook(start_here)
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    hook.remove()
    count = len(processor.tokenizer(f"{answer}<|im_end|>")["input_ids"])
    ids = inputs["input_ids"][0, 1:]
    return logits.log_softmax(-1).gather(-1, ids[:, None])[-count:, 0], outputs[0], ids[-count:].tolist()


Sums = dict[str, Tensor]
PLAIN: dict[str, tuple[tuple[str, ...], Callable[[Sums, Sums, int], Tensor]]] = {
    "sft": (("chosen",), lambda s, r, n: -s["chosen"] / n),
    "dpo": (
        ("chosen", "rejected"),
        lambda s, r, n: -logsigmoid(BETA * (s["chosen"] - s["rejected"] - r["chosen"] + r["rejected"])),
    ),
    "image_sigmoid": (
        ("chosen", "other_chosen"),
        lambda s, r, n: -logsigmoid(BETA * (s["chosen"] - s["other_chosen"] - r["chosen"] + r["other_chosen"])),
    ),
    "image_symmetric": (
        ("chosen", "rejected", "other_chosen", "other_rejected"),
        lambda s, r, n: (
            -logsigmoid(BETA * (s["chosen"] - s["rejected"] - r["chosen"] + r["rejected"])) / 2
            - logsigmoid(BETA * (s["other_rejected"] - s["other_chosen"] - r["other_rejected"] + r["other_chosen"])) / 2
        ),
    ),
}


@pytest.mark.parametrize("loss", list(PLAIN))
def test_norms_are_those_of_plain_autograd(loss: str, mllm: tuple[Any, Any], reference: Any) -> None:
    """Each token's norm is that of the loss's gradient when all other tokens are constants.

    A token that both answers begin with is one quantity: both of its copies stay variables at once.
    """
    model, processor = mllm
    names, value = PLAIN[loss]
    answers = {"chosen": EXAMPLE.chosen, "rejected": EXAMPLE.rejected}
    plain, constants = {}, {}
    for name in names:
        image = EXAMPLE.rejected_image if name.startswith("other") else EXAMPLE.image
        assert image is not None
        answer = answers[name.removeprefix("other_")]
        plain[name] = plain_log_probs(model, processor, image, answer)
        constants[name] = plain_log_probs(reference, processor, image, answer)[0].sum().detach()
    expected: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        sibling = {"rejected": "chosen", "chosen": "rejected"}[name.removeprefix("other_")]
        sibling = name.replace(name.removeprefix("other_"), sibling)
        ids = plain[name][2]
        for i in range(len(ids) - 1):  # without the end of the turn
            copies = [name]
            if sibling in names and ids[: i + 1] == plain[sibling][2][: i + 1]:
                copies.append(sibling)
            sums = {n: log_probs.detach().sum() for n, (log_probs, *_) in plain.items()}
            for copied in copies:
                own = plain[copied][0]
                sums[copied] = own[i] + (own.detach().sum() - own[i].detach())
            total = value(sums, constants, len(plain["chosen"][2]))
            gradients = torch.autograd.grad(total, [plain[n][1] for n in copies], retain_graph=True)
            expected[name].append(float(torch.stack(gradients).sum(0).abs().sum()))
    tokens = token_norms(model, processor, EXAMPLE, ["anchor", loss], shapes_spans, reference, BETA)[loss]
    assert [t.answer for t in tokens] == [name for name in names for _ in expected[name]]
    norms = [t.norm for t in tokens]
    assert norms == pytest.approx([norm for name in names for norm in expected[name]], rel=1e-3, abs=1e-7)
    assert max(norms) > 1e-4
    if loss in ("dpo", "image_symmetric"):  # "It is a" is said by both answers
        assert norms[:3] == [0, 0, 0]


def test_sft_needs_no_reference_and_weights_are_not_changed(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = token_norms(model, processor, replace(EXAMPLE, rejected_image=None), ["sft"], shapes_spans)["sft"]
    assert {t.answer for t in tokens} == {"chosen"}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def kinds_by_word(text: str, spans: list[tuple[int, int, str]]) -> list[tuple[str, str]]:
    return [(text[start:end], kind) for start, end, kind in spans]


def test_kinds_in_descriptions_are_those_of_the_objects() -> None:
    dataset = ShapesDataset()
    for i in range(200):
        scene = dataset.scene("test", i)
        objects = scene.objects
        expected = [(("one", "two", "three", "four", "five")[len(objects) - 1], "number")]
        for o in objects:
            expected += [(o.size, "size"), (o.colour, "colour"), (o.shape, "shape")]
            expected += [(word, "place") for word in o.place.split()[2:]]
        assert kinds_by_word(scene.caption(), shapes_spans(scene.caption())) == expected


def test_kinds_in_answers_follow_from_the_question() -> None:
    dataset = ShapesDataset()
    for i in range(200):
        kind = KINDS[i % 5]
        pair = draw_counterfactual(dataset, "test", i, kind, "question").pair
        for answer in (pair.chosen, pair.rejected):
            found = [k for _, k in kinds_by_word(answer, shapes_spans(answer))]
            if pair.kind in ("colour", "shape"):
                assert found == [pair.kind]
            elif pair.kind == "position":
                assert found in (["place"], ["place"] * 2)
            elif pair.kind == "count":
                assert found[0] == "number"
                assert set(found[1:]) <= {"colour", "shape"}
            else:
                assert found == ["presence", *(["presence"] if answer[0] == "N" else []), "colour", "shape"]


def test_no_is_a_number_only_where_it_counts() -> None:
    for answer, expected in {
        "There are no red crosses.": ["number", "colour", "shape"],
        "No, there is no lime ring.": ["presence", "presence", "colour", "shape"],
    }.items():
        assert [kind for *_, kind in shapes_spans(answer)] == expected


def test_listed_words_are_whole_longest_first_and_in_any_case(tmp_path: Path) -> None:
    find = listed_spans(read_words())
    text = "On top of the Redwood are 12 RED cars and 1,000 men on the left-hand side, next to Bigfoot."
    assert kinds_by_word(text, find(text)) == [
        ("On top of", "place"),
        ("12", "number"),
        ("RED", "colour"),
        ("1,000", "number"),
        ("left", "place"),
        ("side", "place"),
        ("next to", "place"),
    ]
    assert {"colour", "number", "place", "shape"} <= set(read_words(WORDS))
    own = tmp_path / "own.yaml"
    own.write_text("animal: [dog, Cat]\n")
    assert kinds_by_word("2 cats, a cat", listed_spans(read_words(own))("2 cats, a cat")) == [("cat", "animal")]


def test_tokens_have_the_kind_of_their_word(mllm: tuple[Any, Any]) -> None:
    _, processor = mllm
    text = "It is a maroon star."
    kinds = token_kinds(processor, text, shapes_spans(text))
    ids = processor.tokenizer(f"{text}<|im_end|>")["input_ids"]
    assert len(kinds) == len(ids)
    words = {"maroon": "colour", "star": "shape"}
    of_kind = {
        kind: processor.tokenizer.decode([i for i, k in zip(ids, kinds, strict=True) if k == kind]).strip()
        for kind in words.values()
    }
    assert of_kind == {kind: word for word, kind in words.items()}
    assert kinds[-2:] == [OTHER, None]


def test_means_are_relative_to_the_answer_and_intervals_over_rows() -> None:
    rows = [
        {"sft": [TokenNorm("chosen", "colour", 3.0), TokenNorm("chosen", "other", 1.0)]},
        {"sft": [TokenNorm("chosen", "colour", 0.1), TokenNorm("chosen", "other", 0.1)]},
        {"sft": [TokenNorm("chosen", "place", 0.0), TokenNorm("chosen", "other", 0.0)]},
    ]
    visual, colour, place, other = summarise(rows)
    assert [r.kind for r in (visual, colour, place, other)] == ["visual", "colour", "place", "other"]
    assert [colour.rows, colour.tokens, colour.relative] == pytest.approx([2, 2, (150 + 100) / 2])
    assert list(colour.relative_ci95 or ()) == pytest.approx([100, 150])
    assert colour.norm == pytest.approx(1.55)
    assert (place.relative, place.relative_ci95, place.norm, place.norm_ci95) == (None, None, 0, None)
    assert [visual.tokens, visual.norm] == pytest.approx([3, 3.1 / 3])
    assert [other.relative, other.norm] == pytest.approx([75, 1.1 / 3])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for i, (chosen, rejected) in enumerate(
        [("A red dog.", "A blue dog."), ("Two dogs lie left.", "Two dogs lie right."), ("A cat.", "A red cat.")]
    ):
        for j in (0, 1):
            noise(2 * i + j).save(tmp_path / f"{i}-{j}.png")
        row = {"image": f"{i}-0.png", "question": "<image>\nWhat is it?", "chosen": chosen, "rejected": rejected}
        rows.append({**row, "rejected_image": f"{i}-1.png"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(*command: object) -> Any:
    return CliRunner().invoke(app, ["--debug", "gradcam", *map(str, command)])


def test_the_command_reads_rows_of_a_file(trained: Path, data: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("animal: [dog, dogs, cat]\nplace: [left, right]\n")
    files = ["--output", tmp_path / "words.png", "--json", tmp_path / "words.json", "--words", words]
    losses = ["--loss", "sft,dpo,image_sigmoid", "--reference", trained / "2-instruct"]
    result = run(trained / "3-dpo", "--tokens", "--data", data, *losses, *files)
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "words.json").read_text())
    assert (values["mllm"], values["data"], values["rows"]) == ("tiny/3-dpo", "pairs.jsonl", 3)
    rows = {(r["loss"], r["kind"]): r["rows"] for r in values["results"]}
    assert rows["sft", "animal"] == 3
    assert rows["sft", "place"] == 1
    assert rows["sft", "visual"] == 3
    of_dpo = {r["kind"]: r for r in values["results"] if r["loss"] == "dpo"}
    assert of_dpo["place"]["relative"] > of_dpo["other"]["relative"]  # the answers differ in no other word
    assert str(tmp_path) not in (tmp_path / "words.json").read_text()
    assert "image_sigmoid" in result.output
    with Image.open(tmp_path / "words.png") as figure:
        assert figure.width > 600


def test_scenes_are_read_without_a_file(trained: Path) -> None:
    results, values = measure_file(trained / "3-sft", ["sft"], rows=6)
    assert {r.kind for r in results} >= {"visual", "colour", "shape", "place", "number", "size", "other"}
    assert values["rows"] == 6
    assert results == measure_file(trained / "3-sft", ["sft"], rows=6)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scene.png", "--tokens"], "leave out the image"),
        (["scene.png", "--question", "?"], "give an image, --question and --answer; or give --tokens"),
        (["--tokens"], "the loss dpo compares an MLLM with its parent: give --reference, or --loss sft"),
        (["--tokens", "--loss", "sfd"], "there is no loss 'sfd' .did you mean `sft`"),
        (["--tokens", "--loss", "sft", "--rows", "0"], "--rows 0: give at least one"),
        (["--tokens", "--loss", "sft", "--words", "w.yaml"], "belong to rows of a file: give the file by --data"),
        (["--tokens", "--loss", "sft", "--data", "rows.txt"], "rows.txt: rows are read from a .json, .jsonl, .parquet"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(options: list[str], message: str) -> None:
    result = run("no-such-mllm", *options)
    assert isinstance(result.exception, PivotError)
    with pytest.raises(PivotError, match=message):
        raise result.exception


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rejected_image": None}, r"pairs.jsonl:1: has no `rejected_image`, which a loss of image_sigmoid"),
        ({"image": None}, r"pairs.jsonl:1: has no image"),
        ({"image": "missing.png"}, r"pairs.jsonl:1: .*missing.png"),
        ({"rejected": None}, r"pairs.jsonl:1: `rejected` is missing"),
    ],
)
def test_bad_rows_are_named(trained: Path, data: Path, row: dict[str, Any], message: str) -> None:
    first = json.loads(data.read_text().splitlines()[0])
    data.write_text(json.dumps({**first, "question": "What is it?", **row}))
    with pytest.raises(DataError, match=message):
        measure_file(trained / "3-dpo", ["image_sigmoid"], data, reference=trained / "2-instruct")


def test_a_file_without_rows_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty.jsonl: there is no row in it"):
        measure_file(trained / "3-dpo", ["sft"], tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[red, green]", "w.yaml:1: the words of each kind are expected"),
        ("colour: red", "w.yaml:1: `colour` has no list of words"),
        ("sign: [yes, no]", "w.yaml:1: True of `sign` is no text; put words such as yes and no in quotes"),
        ("colour: [orange]\nfruit: [Orange]", "w.yaml:2: 'Orange' is a word of `colour` and of `fruit`; keep one"),
        ("other: [red]", "w.yaml:1: 'other' cannot be the name of a kind"),
        ("{}", "there is no word in it"),
    ],
)
def test_a_bad_word_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_words(tmp_path / "w.yaml")
