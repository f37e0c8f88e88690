"""Preference pairs without repeated work: a prompt and its image run once for both answers, without padding.

TRL lays out a batch of B pairs as 2B sequences of prompt and answer, padded to the longest. Here the same tokens are
laid out as trees: a prefix, and branches that continue it. Hidden states are then returned to TRL's loss in the rows
that it expects: the last token of the prompt, then the answer. Positions restart at each branch, and attention is
computed tree by tree, so no branch attends to another. TRL's loss is unchanged.
"""

from __future__ import annotations

import functools
import hashlib
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, LlavaProcessor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from pivot_hub.data.image import open_image, to_rgb
from pivot_hub.errors import DataError, shown, shown_text
from pivot_hub.training.conversation import padded, prepare_images

ATTENTION = "pivot_pairs"
Logps = tuple[float, float]  # log-probabilities of the chosen and the rejected answer


@dataclass(frozen=True)
class Tree:
    """Consecutive tokens of a row: a prefix, then branches, each of which continues the prefix alone.

    Args:
        start: Position of the prefix's first token in the row.
        prefix: Number of tokens of the prefix.
        branches: Number of tokens of each branch.
    """

    start: int
    prefix: int
    branches: tuple[int, ...] = ()


Layout = tuple[tuple[Tree, ...], ...]  # the trees of each row


@dataclass
class PairCollator:
    """Turns preference rows into the batch that `share_forward` runs and TRL's loss reads.

    Args:
        processor: Processor of a LLaVA-style model, in whose text an image is a run of one token.
        max_length: Largest number of tokens of prompt and answer together; answers are cut, as TRL does.
        encode_once: Whether an image is processed and encoded once, however many pairs have it. Otherwise it is
            encoded once per occurrence.
        share_prefix: Whether a pair is one tree. Otherwise it is two, each with the prompt and one answer.
        pack: Whether all trees are in one row without padding. Otherwise each tree has a row, padded to the longest.
        max_tokens: Largest number of tokens of a chunk; the pairs are split into chunks, and a pair that is longer is
            a chunk of its own. None makes no chunks.
        references: Function that returns the reference log-probabilities of a row.
    """

    processor: LlavaProcessor
    max_length: int | None = None
    encode_once: bool = True
    share_prefix: bool = True
    pack: bool = True
    max_tokens: int | None = None
    references: Callable[[dict[str, Any]], Logps] | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B pairs.

        Returns:
            input_ids and completion_mask (2B, 1 + answer), chosen answers first: the prompt's last token, then the
            answer; attention_mask (2B, prompt + answer), from which TRL counts tokens; pair_ids and pair_positions
            (rows, tokens); pair_take (2B, 1 + answer), the index of each of input_ids in the flattened rows;
            pair_layout; pixel_values (images, ...) and pair_images, the image of each run of image tokens; row (B,)
            if the examples have numbers. With `max_tokens`, a list of such batches under `chunks`.
        """
        references = [self.references(e) for e in examples] if self.references else None
        images = [images_of(e) for e in examples]
        rows = [_rendered(e, i, self.processor) for e, i in zip(examples, images, strict=True)]
        distinct, image_of = self._distinct(images)
        pixels, runs = prepare_images(self.processor, distinct)
        prompts = self._prompts([r["prompt"] for r in rows], image_of, runs)
        tokenizer: Any = self.processor.tokenizer
        answers = [
            self._cut(examples, prompts, tokenizer([r[side] for r in rows], add_special_tokens=False)["input_ids"])
            for side in ("chosen", "rejected")
        ]

        def batch_of(pairs: range) -> dict[str, Any]:
            batch = self._laid_out([prompts[i] for i in pairs], [[side[i] for i in pairs] for side in answers])
            occurrences = [image for i in pairs for image in image_of[i]]
            if pixels is not None and occurrences:
                needed = sorted(set(occurrences))
                batch["pixel_values"] = pixels[needed]
                batch["pair_images"] = torch.tensor([needed.index(image) for image in occurrences])
            if "row" in examples[0]:
                batch["row"] = torch.tensor([examples[i]["row"] for i in pairs])
            if references is not None:
                chosen, rejected = zip(*(references[i] for i in pairs), strict=True)
                batch |= {"ref_chosen_logps": torch.tensor(chosen), "ref_rejected_logps": torch.tensor(rejected)}
            return batch

        if self.max_tokens is None:
            return batch_of(range(len(examples)))
        copies = 1 if self.share_prefix else 2
        costs = [copies * len(p) + len(a) + len(b) for p, a, b in zip(prompts, *answers, strict=True)]
        return {"chunks": [batch_of(pairs) for pairs in _chunks(costs, self.max_tokens)]}

    def _prompts(self, texts: list[str], image_of: list[list[int]], runs: list[int]) -> list[list[int]]:
        """Return the token ids of prompts; each image token is repeated once per feature of its image."""
        tokenizer: Any = self.processor.tokenizer
        token = self.processor.image_token_id
        prompts = []
        for text, ids, images in zip(
            texts, tokenizer(texts, add_special_tokens=False)["input_ids"], image_of, strict=True
        ):
            widths = iter(runs[i] for i in images)
            named = ids.count(token) * (1 if self.share_prefix else 2)
            if named != len(images):
                raise DataError(
                    f"the prompt of a row names another number of images than the row has: {shown_text(text)!r}."
                )
            prompts.append([t for i in ids for t in [i] * (next(widths) if i == token else 1)])
        return prompts

    def _distinct(self, images: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
        """Select the images to process.

        Args:
            images: Images of each pair.

        Returns:
            The images to process; and for each pair, the number of the image of each occurrence, in the order of the
            pair's trees.
        """
        distinct: list[Any] = []
        known: dict[str, int] = {}
        image_of: list[list[int]] = []
        for pair, pair_images in enumerate(images):
            image_of.append([])
            for copy in range(1 if self.share_prefix else 2):
                for k, image in enumerate(pair_images):
                    key = image_key(image) if self.encode_once else f"{pair}/{copy}/{k}"
                    if key not in known:
                        known[key] = len(distinct)
                        distinct.append(image)
                    image_of[-1].append(known[key])
        return distinct, image_of

    def _cut(
        self, examples: Sequence[dict[str, Any]], prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[int]]:
        """Cut answers that are longer than `max_length` allows behind their prompt.

        Raises:
            DataError: A prompt is empty, or leaves no room for an answer.
        """
        for example, prompt in zip(examples, prompts, strict=True):
            if not prompt:
                raise DataError(
                    f"{_row_name(example)}: the prompt is empty, but an answer's first token is predicted from the "
                    "prompt; give the row a prompt."
                )
            if self.max_length is not None and len(prompt) >= self.max_length:
                raise DataError(
                    f"{_row_name(example)}: image and prompt take {len(prompt)} tokens and leave no room for an "
                    f"answer in max_length {self.max_length}; raise max_length."
                )
        if self.max_length is None:
            return answers
        return [a[: self.max_length - len(p)] for p, a in zip(prompts, answers, strict=True)]

    def _laid_out(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> dict[str, Any]:
        """Lay out B pairs as trees.

        Args:
            prompts: Token ids of each prompt.
            answers: Token ids of the chosen answers, and of the rejected ones.
        """
        trees: list[tuple[list[int], list[list[int]]]] = []
        chosens, rejecteds = answers
        for prompt, chosen, rejected in zip(prompts, chosens, rejecteds, strict=True):
            if self.share_prefix:
                trees.append((prompt, [chosen, rejected]))
            else:
                trees += [(prompt + chosen, []), (prompt + rejected, [])]
        rows = [trees] if self.pack else [[tree] for tree in trees]
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        layout, starts = [], []
        for row in rows:
            row_ids: list[int] = []
            row_positions: list[int] = []
            row_trees = []
            for prefix, branches in row:
                starts.append((len(ids), len(row_ids)))
                row_trees.append(Tree(len(row_ids), len(prefix), tuple(map(len, branches))))
                row_ids += prefix + [t for b in branches for t in b]
                row_positions += range(len(prefix))
                row_positions += [p for b in branches for p in range(len(prefix), len(prefix) + len(b))]
            ids.append(row_ids)
            positions.append(row_positions)
            layout.append(tuple(row_trees))
        width = max(map(len, ids))
        take, tails, masks, lengths = [], [], [], []
        for side, side_answers in enumerate(answers):
            for i, (prompt, answer) in enumerate(zip(prompts, side_answers, strict=True)):
                row_number, start = starts[i] if self.share_prefix else starts[2 * i + side]
                prompt_end = row_number * width + start + len(prompt) - 1
                chosen_length = len(answers[0][i]) if self.share_prefix and side == 1 else 0
                answer_start = prompt_end + 1 + chosen_length
                take.append([prompt_end, *range(answer_start, answer_start + len(answer))])
                tails.append([prompt[-1], *answer])
                masks.append([0] + [1] * len(answer))
                lengths.append(len(prompt) + len(answer))
        tokenizer: Any = self.processor.tokenizer
        return {
            "input_ids": padded(tails, tokenizer.pad_token_id),
            "completion_mask": padded(masks, 0),
            "attention_mask": padded([[1] * n for n in lengths], 0),
            "pair_ids": padded(ids, tokenizer.pad_token_id),
            "pair_positions": padded(positions, 0),
            "pair_take": padded(take, 0),
            "pair_layout": tuple(layout),
        }


def share_forward(model: Any) -> None:
    """Make a LLaVA-style model run the batches of `PairCollator`; other batches run as before.

    Args:
        model: A LlavaForConditionalGeneration whose language model uses sdpa attention.
    """
    inner = model.model
    inner.language_model.set_attn_implementation(ATTENTION)
    original = inner.forward

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, pair_layout: Layout | None = None, **kwargs: Any) -> Any:
        if pair_layout is None:
            return original(*args, **kwargs)
        # The outer model passes on the arguments that it did not get, as None.
        return _run_trees(self, pair_layout, **{k: v for k, v in kwargs.items() if v is not None})

    inner.forward = types.MethodType(forward, inner)


def _run_trees(
    model: Any,
    layout: Layout,
    pair_ids: torch.Tensor,
    pair_positions: torch.Tensor,
    pair_take: torch.Tensor,
    pair_images: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> LlavaModelOutputWithPast:
    """Return hidden states (2B, 1 + answer, D): those of the prompt's last token and of the answer, for each row."""
    embeds = model.get_input_embeddings()(pair_ids)
    if pixel_values is not None:
        features = torch.stack(list(model.get_image_features(pixel_values, return_dict=True).pooler_output))
        image_embeds = features[pair_images].flatten(0, 1).to(embeds.device, embeds.dtype)
        is_image = pair_ids == model.config.image_token_id
        if int(is_image.sum()) != len(image_embeds):
            raise DataError(
                f"{int(is_image.sum())} image tokens for {len(image_embeds)} image features: processor and model "
                "disagree; give the processor the model's patch_size, vision_feature_select_strategy and "
                "num_additional_image_tokens."
            )
        embeds = embeds.masked_scatter(is_image.unsqueeze(-1).expand_as(embeds), image_embeds)
    # transformers passes a 4-D mask on unchanged; `attend` reads the layout and not the mask.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    masks = tuple(tuple(branch_mask(tree, embeds.device) for tree in trees) for trees in layout)
    states = model.language_model(
        inputs_embeds=embeds,
        position_ids=pair_positions,
        attention_mask=no_mask,
        pair_layout=layout,
        pair_masks=masks,
        **kwargs,
    ).last_hidden_state
    return LlavaModelOutputWithPast(last_hidden_state=states.flatten(0, 1)[pair_take])


def layout_difference(model: Any, collator: PairCollator, window: int | None = None) -> float:
    """Run two small pairs of random tokens as trees and as TRL lays them out.

    What a language model does with the trees shows here, whatever it is called: whether attention gets the trees, and
    whether anything besides attention passes from one token to the next.

    Args:
        model: The LLaVA-style model after `share_forward`.
        collator: Collator with the options that will be used.
        window: Number of tokens that a sliding window is shortened to, so that the small pairs exceed it.

    Returns:
        Norm of the difference of hidden states, relative to their norm; infinite where the trees cannot be run.
    """
    embedding = model.get_input_embeddings()
    tokenizer: Any = collator.processor.tokenizer
    special = {collator.processor.image_token_id, model.config.image_token_id, tokenizer.pad_token_id}
    tokens = torch.tensor([i for i in range(min(1000, embedding.num_embeddings)) if i not in special])
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        picked: list[int] = tokens[torch.randint(len(tokens), (count,), generator=generator)].tolist()
        return picked

    prompts, answers = [draw(9), draw(5)], [[draw(4), draw(7)], [draw(6), draw(3)]]
    device = embedding.weight.device
    trees = collator._laid_out(prompts, answers)
    whole = [p + a for side in answers for p, a in zip(prompts, side, strict=True)]
    config, training = model.model.language_model.config, model.training
    known_window = getattr(config, "sliding_window", None)
    model.eval()
    try:
        if window is not None:
            config.sliding_window = window
        with torch.no_grad():
            expected = model.model(
                input_ids=padded(whole, tokenizer.pad_token_id).to(device),
                attention_mask=padded([[1] * len(ids) for ids in whole], 0).to(device),
            ).last_hidden_state.float()
            try:
                actual = model.model(
                    pair_layout=trees["pair_layout"],
                    **{k: trees[k].to(device) for k in ("pair_ids", "pair_positions", "pair_take")},
                ).last_hidden_state.float()
            except Exception:  # whatever a model of another kind raises
                return math.inf
    finally:
        model.train(training)
        if window is not None:
            config.sliding_window = known_window
    difference, norm = 0.0, 0.0
    for row, (prompt, answer) in enumerate(zip(prompts * 2, [a for side in answers for a in side], strict=True)):
        of_row = expected[row, len(prompt) - 1 : len(prompt) + len(answer)]
        difference += float((actual[row, : 1 + len(answer)] - of_row).square().sum())
        norm += float(of_row.square().sum())
    return math.sqrt(difference / norm) if norm > 0 else math.inf


def branch_mask(tree: Tree, device: torch.device) -> torch.Tensor | None:
    """Return what the branches of a tree attend to, (branch tokens, tree tokens): the prefix and their own past."""
    if not any(tree.branches):
        return None
    own = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool).tril() for n in tree.branches)).bool()
    return torch.cat((torch.ones(len(own), tree.prefix, dtype=torch.bool), own), dim=1).to(device)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pair_layout: Layout | None = None,
    pair_masks: tuple[tuple[torch.Tensor | None, ...], ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in trees: a prefix attends to itself, a branch to its prefix and itself, both causally.

    Args:
        module: The attention layer.
        query: Queries, (rows, heads, tokens, d).
        key: Keys, which may have fewer heads.
        value: Values, with as many heads as the keys.
        attention_mask: Mask of sdpa, which is only read without a layout.
        scaling: Factor of the scores; None for sdpa's default.
        dropout: Probability of dropping an attention weight.
        pair_layout: Trees of each row; without them this function is sdpa.
        pair_masks: The `branch_mask` of each tree, by row.
        kwargs: Further arguments of sdpa.

    Returns:
        The output, (rows, tokens, heads, d), which is zero at padding; and None, for no attention weights.
    """
    if pair_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    grouped = query.is_cuda and groups > 1
    if not grouped:  # without CUDA, grouped heads would take sdpa's slow path
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    dot_product = functools.partial(
        F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=grouped
    )
    rows = []
    for row, (trees, masks) in enumerate(zip(pair_layout, pair_masks, strict=True)):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        pieces = []
        end = 0
        for tree, mask in zip(trees, masks, strict=True):
            prefix = slice(tree.start, tree.start + tree.prefix)
            pieces.append(dot_product(q[:, :, prefix], k[:, :, prefix], v[:, :, prefix], is_causal=True))
            end = prefix.stop + sum(tree.branches)
            if mask is not None:
                branches, whole = slice(prefix.stop, end), slice(tree.start, end)
                pieces.append(dot_product(q[:, :, branches], k[:, :, whole], v[:, :, whole], attn_mask=mask))
        if end < q.shape[2]:
            pieces.append(q.new_zeros(1, q.shape[1], q.shape[2] - end, v.shape[3]))
        rows.append(torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1))
    return rows[0] if len(rows) == 1 else torch.cat(rows), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def image_key(image: Any) -> str:
    """Return a hash of a decoded image: of its mode, size and pixels."""
    header = f"{image.mode}{image.size}".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).hexdigest()


def images_of(example: dict[str, Any]) -> list[Image.Image]:
    """Return the images of a preference row, decoded: as TRL, paths and arrays are read too.

    Raises:
        DataError: An image is something else, or cannot be read.
    """
    images = [example["image"]] if "image" in example else list(example.get("images") or [])
    return [_decoded(image, _row_name(example)) for image in images]


def _decoded(image: Any, owner: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image), owner)
    array = np.asarray(image) if isinstance(image, np.ndarray | torch.Tensor) else None
    if array is not None and array.ndim == 3 and array.dtype == np.uint8:
        if array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        if array.shape[2] in (1, 3, 4):
            return to_rgb(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else np.ascontiguousarray(array)))
    found = shown(image) if array is None else f"an array {array.shape} of {array.dtype}"
    raise DataError(f"{owner}: {found} is no image; give a PIL image, a path, or an array (height, width, 3) of uint8.")


def _row_name(example: dict[str, Any]) -> str:
    if "row" in example:
        return f"row {example['row']}"
    return f"the row with the prompt {shown(example.get('prompt'))}"


def template_options(example: dict[str, Any]) -> dict[str, Any]:
    """Return a row's own arguments of the chat template, as TRL passes them on.

    A table stores the arguments of other rows as None in this one, which a template would take for a value.
    """
    return {k: v for k, v in (example.get("chat_template_kwargs") or {}).items() if v is not None}


def _rendered(example: dict[str, Any], images: list[Any], processor: LlavaProcessor) -> dict[str, str]:
    """Return prompt and answers as text; messages go through the chat template."""
    texts: dict[str, Any] = {side: example[side] for side in ("prompt", "chosen", "rejected")}
    if is_conversational(texts):
        texts = {
            "prompt": prepare_multimodal_messages(texts["prompt"], images=images),
            "chosen": prepare_multimodal_messages(texts["chosen"]),
            "rejected": prepare_multimodal_messages(texts["rejected"]),
        }
        texts = apply_chat_template(cast(Any, {**texts, "chat_template_kwargs": template_options(example)}), processor)
    return texts


def _chunks(costs: list[int], limit: int) -> list[range]:
    """Divide items into ranges whose costs sum to at most `limit`; an item that costs more has its own range."""
    ranges: list[range] = []
    spent = 0
    for i, cost in enumerate(costs):
        if ranges and spent + cost <= limit:
            ranges[-1] = range(ranges[-1].start, i + 1)
            spent += cost
        else:
            ranges.append(range(i, i + 1))
            spent = cost
    return ranges
