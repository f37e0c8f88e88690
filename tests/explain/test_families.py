"""Saliency maps and patch features in every trainable family of MLLMs: the right gradients at the right places."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import LAST
from pivot_hub.encoder.modeling_pivot import select_features
from pivot_hub.explain.answer_group import completion_batch, draw_group
from pivot_hub.explain.gradcam import (
    METHODS,
    AnsweredImage,
    Explain,
    answer_batch,
    answer_log_probs,
    gradient_map,
    gradient_maps,
    group_gradient_map,
    inner_border,
    token_log_probs,
    token_maps,
)
from pivot_hub.explain.image_maps import (
    captured_tokens,
    crops_image,
    feature_layer,
    fold_embeddings,
    image_family,
    patch_grid,
    seen_image,
    seen_mask,
)
from pivot_hub.explain.patch_features import patch_tokens
from pivot_hub.explain.word_gradients import Example, token_norms
from pivot_hub.explain.word_kinds import OTHER, shapes_spans
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.fixed_grid import scene_px
from pivot_hub.probes.ranking import rank_pairs
from pivot_hub.probes.run import Sizes, probe_mllm, probe_pairs
from pivot_hub.probes.vqa.synthetic import generate_answers
from tests.mllm.tiny_mllms import make_mllm
from tests.mllm.tiny_processors import PROCESSORS, add_processor

FAMILIES = [name for name in PROCESSORS if name != "mistral3"]  # whose processor needs torchvision
QUESTION, RIGHT, WRONG = "Which?", "It is red.", "It is a green star."
WIDE = (168, 84)  # width and height


@pytest.fixture(scope="module", params=FAMILIES)
def mllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_mllm(tmp_path_factory.mktemp("mllm"), request.param)


def tiny_mllm(folder: Path, name: str) -> tuple[Any, Any]:
    make_mllm(folder, name)
    add_processor(folder, name)
    model, processor = load_mllm(folder)
    return model.eval(), processor


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).normal(128, 60, (WIDE[1], WIDE[0], 3)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def plain_log_prob(model: Any, processor: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Log-probability of RIGHT by one plain call of the model, and the pixels that it was computed from."""
    log_probs, pixels = plain_log_probs(model, processor, image)
    return log_probs.sum(), pixels


def plain_log_probs(model: Any, processor: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of RIGHT and of the end of the turn, and the pixels."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    text = f"{prompt}{RIGHT}<|im_end|>"
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"].requires_grad_()
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    ids = inputs["input_ids"][0, 1:]
    answer = len(processor.tokenizer(f"{RIGHT}<|im_end|>")["input_ids"])
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, None])
    return log_probs[-answer:], inputs["pixel_values"]


def image_leaves(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What `get_image_features` gives the language model, as leaves that are added to the list by each call."""
    leaves: list[Tensor] = []
    own = model.model.get_image_features

    def noted(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        pooled = outputs.pooler_output
        leaves.extend(part.detach().requires_grad_() for part in pooled)
        outputs.pooler_output = torch.stack(leaves) if isinstance(pooled, Tensor) else list(leaves)
        return outputs

    monkeypatch.setattr(model.model, "get_image_features", noted)
    return leaves


def test_the_gradient_map_is_that_of_the_image_features(
    mllm: tuple[Any, Any], image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It equals autograd at what `get_image_features` gives the language model, in the plain model."""
    model, processor = mllm
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    explanation = gradient_map(model, processor, image, QUESTION, RIGHT)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.requires_grad == before[name][1]
        assert weight.grad is None
    leaves = image_leaves(model, monkeypatch)
    value, _ = plain_log_prob(model, processor, image)
    assert explanation.value == pytest.approx(float(value.detach()), abs=1e-4)
    gradients = torch.cat([g.abs().sum(-1).flatten() for g in torch.autograd.grad(value, leaves)])
    rows, columns = explanation.maps["gradient"].shape
    tiles = image_family(model.config).tiles  # the thumbnail is the last view; LLaVA-NeXT puts the whole image first
    whole = gradients[-rows * columns :] if tiles == "tiles and thumbnail" else gradients[: rows * columns]
    expected = inner_border(whole.reshape(rows, columns).numpy())
    assert expected.max() > 0
    np.testing.assert_allclose(explanation.maps["gradient"], expected, rtol=1e-4, atol=1e-7)


def test_the_norm_of_a_word_is_that_of_all_image_features(
    mllm: tuple[Any, Any], image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token it equals autograd at what `get_image_features` gives the language model, tiles included."""
    model, processor = mllm
    example = Example("r:1", image, QUESTION, RIGHT, WRONG)
    tokens = token_norms(model, processor, example, ["sft"], shapes_spans)["sft"]
    assert [token.kind for token in tokens][-2:] == ["colour", OTHER]
    leaves = image_leaves(model, monkeypatch)
    log_probs, _ = plain_log_probs(model, processor, image)
    for token, log_prob in zip(tokens, log_probs, strict=False):
        gradients = torch.autograd.grad(-log_prob / len(log_probs), leaves, retain_graph=True)
        assert token.norm == pytest.approx(sum(float(g.abs().sum()) for g in gradients), rel=1e-3)


def test_grad_cam_is_that_of_what_enters_the_projector(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """It equals one by hand, from a plain backward pass to the pixels, folded as an encoder folds its features."""
    model, processor = mllm
    family, kept = family_of(model.config), {}
    tower = getattr(model.model, family.tower)
    feature = family.feature_layer(model.config)
    encoder = PivotVisionModel(PivotVisionConfig(tower.config), tower)
    for layer, name in ((None, feature), (1, 1)):

        def keep(module: Any, args: Any, outputs: Any, name: Any = name) -> None:
            kept["features"] = select_features(outputs, name)

        hooks = [
            tower.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"output_hidden_states": True}), with_kwargs=True
            ),
            tower.register_forward_hook(keep),
        ]
        value, _ = plain_log_prob(model, processor, image)
        for hook in hooks:
            hook.remove()
        features = kept["features"]
        (gradient,) = torch.autograd.grad(value, features)
        if encoder.config.image_size is None:
            shapes = processor.image_processor(images=[image], return_tensors="pt")
            folded, own_gradient = (
                encoder.maps(SimpleNamespace(last_hidden_state=f), LAST, shapes)[0] for f in (features, gradient)
            )
        else:
            side = encoder.config.image_size // encoder.config.patch_size
            whole = -1 if family.tiles == "tiles and thumbnail" else 0
            folded, own_gradient = (
                encoder._patch_tokens(f)[whole].unflatten(0, (side, side)) for f in (features, gradient)
            )
        expected = (own_gradient.mean((0, 1)) * folded).sum(-1).relu().detach().numpy()
        grad_cam = gradient_map(model, processor, image, QUESTION, RIGHT, layer=layer).maps["gradcam"]
        np.testing.assert_allclose(grad_cam, expected, rtol=1e-3, atol=1e-6 * max(expected.max(), 1e-3))


def changed_places(image: Image.Image, rows: int, columns: int) -> Iterator[tuple[int, int, Image.Image]]:
    """Copies of an image that differ from it in one cell of a grid, with the cell."""
    for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)}:
        changed = np.array(image)
        top, bottom, left, right = (
            round(place * side)
            for place, side in (
                (row / rows, image.height),
                ((row + 1) / rows, image.height),
                (column / columns, image.width),
                ((column + 1) / columns, image.width),
            )
        )
        changed[top:bottom, left:right] = 255 - changed[top:bottom, left:right]
        yield row, column, Image.fromarray(changed)


def strongest(first: np.ndarray, second: np.ndarray) -> tuple[int, ...]:
    """The cell of two maps (H, W, D) whose features differ most."""
    difference = np.linalg.norm(first - second, axis=-1)
    return tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))


def test_a_change_at_a_place_of_the_image_is_at_that_place_of_the_map(
    mllm: tuple[Any, Any], image: Image.Image
) -> None:
    """Both for the features of the encoder, in patches, and for the tokens of the language model."""
    model, processor = mllm
    image = seen_image(model.config, processor, image)

    def tokens(picture: Image.Image) -> np.ndarray:
        batch = answer_batch(processor, picture, QUESTION, [RIGHT])
        with torch.no_grad(), captured_tokens(model) as captured:
            answer_log_probs(model, batch)
        (folded,) = fold_embeddings(model, captured["embeddings"], batch["input_ids"], batch)
        return folded.detach().numpy()

    for compute in (lambda picture: patch_tokens(model, processor, picture, 1), tokens):
        before = compute(image)
        for row, column, changed in changed_places(image, *before.shape[:2]):
            assert strongest(before, compute(changed)) == (row, column)


def test_maps_have_the_shape_of_the_seen_image(mllm: tuple[Any, Any], image: Image.Image) -> None:
    """What the encoder sees is what it is given again, and a patch of it is one cell of the features' map."""
    model, processor = mllm
    seen = seen_image(model.config, processor, image)
    vision: Any = PivotVisionConfig(model.config.vision_config)
    prepared, again = (processor.image_processor(images=[i], return_tensors="pt") for i in (image, seen))
    rows, columns = patch_grid(model.config, prepared)
    assert seen.size == (columns * vision.patch_size, rows * vision.patch_size)
    assert patch_grid(model.config, again) == (rows, columns)
    is_native = vision.image_size is None
    assert (columns > rows) == is_native  # a tower of squares sees the image without its aspect ratio, or cropped
    if is_native:
        assert torch.equal(prepared["pixel_values"], again["pixel_values"])
    else:
        whole = prepared["pixel_values"].flatten(0, -4)[image_family(model.config).whole_view].permute(1, 2, 0)
        own = processor.image_processor
        normalised = (np.asarray(seen) / 255 - np.array(own.image_mean)) / np.array(own.image_std)
        np.testing.assert_allclose(whole, normalised, atol=1e-5)
    assert patch_tokens(model, processor, image, 1).shape[:2] == (rows, columns)
    side = family_of(model.config).merge(model.config)
    maps = gradient_map(model, processor, image, QUESTION, RIGHT).maps
    assert maps["gradient"].shape == (rows // side, columns // side)
    mask = np.zeros((WIDE[1], WIDE[0]), bool)
    mask[:, WIDE[0] // 2 :] = True
    assert np.array_equal(
        seen_mask(model.config, processor, mask), np.arange(seen.width)[None].repeat(seen.height, 0) >= seen.width // 2
    )
    assert crops_image(model.config, processor) == (model.config.model_type == "llava")


@pytest.mark.parametrize("explain", ["sft", "dpo"])
def test_maps_of_several_images_equal_those_of_each(
    mllm: tuple[Any, Any], image: Image.Image, explain: Explain
) -> None:
    """Images of two shapes and answers of two lengths, with a parent that is another model for the DPO loss."""
    model, processor = mllm
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for weight in reference.get_output_embeddings().parameters():
            weight.mul_(0.5)
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    answered = [
        AnsweredImage(image, QUESTION, RIGHT, WRONG),
        AnsweredImage(other.transpose(Image.Transpose.ROTATE_90), QUESTION, WRONG, RIGHT),
        AnsweredImage(other, f"{QUESTION} Tell me.", f"{WRONG} {WRONG}", RIGHT),
    ]
    together = gradient_maps(model, processor, answered, explain, reference)
    assert len({one.value for one in together}) == 3
    for one, its_maps in zip(answered, together, strict=True):
        alone = gradient_map(model, processor, one.image, one.question, one.answer, explain, one.rejected, reference)
        assert its_maps.value == pytest.approx(alone.value, rel=1e-3, abs=1e-4)
        for method in METHODS:
            own = alone.maps[method]
            assert its_maps.maps[method].shape == own.shape
            assert np.abs(its_maps.maps[method] - own).max() <= 2e-3 * own.max() + 1e-6  # Grad-CAM can be zero


def test_two_answers_share_a_batch_with_copies_of_the_image(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = mllm
    with torch.no_grad():
        both = answer_log_probs(model, answer_batch(processor, image, QUESTION, [RIGHT, WRONG]))
        alone = [answer_log_probs(model, answer_batch(processor, image, QUESTION, [a]))[0] for a in (RIGHT, WRONG)]
    assert torch.allclose(both, torch.stack(alone), atol=1e-3)
    loss = gradient_map(model, processor, image, QUESTION, RIGHT, "dpo", WRONG, model)
    assert loss.value == pytest.approx(np.log(2), abs=1e-3)
    assert loss.maps["gradient"].max() > 0
    same = gradient_map(model, processor, image, QUESTION, RIGHT, "dpo", RIGHT, model)
    assert same.maps["gradient"].max() < 1e-3 * loss.maps["gradient"].max()


def test_answers_are_generated_from_copies_of_the_image_and_their_loss_has_a_map(
    mllm: tuple[Any, Any], image: Image.Image
) -> None:
    """A single answer is drawn alike from one image and from copies, and a group's map is that of its answers."""
    model, processor = mllm
    group = draw_group(model, processor, image, QUESTION, lambda texts: range(len(texts)), answers=3, max_tokens=4)
    assert len(set(map(tuple, group.ids))) > 1
    with torch.no_grad():
        copies = token_log_probs(model, completion_batch(processor, image, QUESTION, [group.ids[1]] * 3))
        alone = token_log_probs(model, completion_batch(processor, image, QUESTION, [group.ids[1]]))
    assert torch.allclose(copies, alone.expand_as(copies), atol=1e-3)
    maps = group_gradient_map(model, processor, image, QUESTION, group).maps
    assert maps["gradient"].shape == gradient_map(model, processor, image, QUESTION, RIGHT).maps["gradient"].shape
    assert maps["gradient"].max() > 0


def test_tokens_together_explain_the_answer(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = mllm
    tokens = token_maps(model, processor, image, QUESTION, RIGHT)
    whole = gradient_map(model, processor, image, QUESTION, RIGHT)
    assert sum(t.log_prob for t in tokens) == pytest.approx(whole.value, abs=1e-3)
    assert "".join(t.text for t in tokens) == f"{RIGHT}<|im_end|>"
    assert {t.maps[method].shape for t in tokens for method in ("gradcam", "gradient")} == {
        whole.maps[method].shape for method in ("gradcam", "gradient")
    }


def test_questions_on_images_of_different_shapes_share_a_pass(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = copy.deepcopy(mllm[0]), mllm[1]
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    with torch.no_grad():  # a tiny model gives the same answer to all inputs, unless its weights are large
        for weight in model.parameters():
            weight.mul_(4)
    images = [image, image.rotate(90, expand=True), image.resize((60, 60))]
    questions = ["Which?", "Which of them?", "Why?"]
    together = generate_answers(model, processor, questions, images, max_new_tokens=8)
    alone = [
        generate_answers(model, processor, [q], [i], max_new_tokens=8)[0]
        for q, i in zip(questions, images, strict=True)
    ]
    assert together == alone
    assert len(set(together)) == 3


def test_the_feature_layer_is_the_last_that_can_be_explained(mllm: tuple[Any, Any], image: Image.Image) -> None:
    model, processor = mllm
    last = feature_layer(model)
    named = gradient_map(model, processor, image, QUESTION, RIGHT, layer=last)
    assert np.array_equal(named.maps["gradcam"], gradient_map(model, processor, image, QUESTION, RIGHT).maps["gradcam"])
    with pytest.raises(ValueError, match=f"layer {last + 1} is not one of 1 to {last}"):
        gradient_map(model, processor, image, QUESTION, RIGHT, layer=last + 1)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_the_probes_of_an_mllm_run(name: str, tmp_path: Path) -> None:
    """On scenes in the size of the encoder's images, or in one that fills eight rows of merged tokens."""
    model, processor = tiny_mllm(tmp_path, name)
    sizes = Sizes(questions=6, targets_validation=1, targets_test=1)
    results = probe_mllm(model, processor, model, "tiny", "0" * 64, "none", sizes)
    assert {r.metric for r in results} == {"pointing_accuracy", "energy_inside", "iou", "exact_match"}
    assert {r.feature_layer for r in results} == {family_of(model.config).feature_layer(model.config)}
    dataset = ShapesDataset(image_px=scene_px(PivotVisionConfig(model.config.vision_config)))
    images, pairs = probe_pairs(dataset, "test", 2)
    conditions = {"encoder": "tiny", "encoder_sha256": "0" * 64, "feature_layer": -1, "partner": "none"}
    assert rank_pairs(model, processor, pairs, images, conditions).value in (0, 50, 100)
