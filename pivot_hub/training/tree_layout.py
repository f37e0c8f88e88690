"""Preference pairs without repeated work: a prompt and its image run once for both answers, and nothing is padding.

TRL lays a batch of B pairs out as 2B sequences, prompt and answer each, padded to the longest. Here the same tokens
are laid out as trees, a prefix and the branches that follow it, and hidden states are handed back to TRL's loss in
rows of its own order: the last token of the prompt, then the answer. Positions restart at each branch, and attention
is computed tree by tree, so no branch sees another. Nothing of TRL's loss is changed.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlavaProcessor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from pivot_hub.errors import DataError
from pivot_hub.training.conversation import padded, prepare_images

ATTENTION = "pivot_pairs"
Logps = tuple[float, float]  # of the chosen and of the rejected answer


@dataclass(frozen=True)
class Tree:
    """Tokens that follow each other in a row: a prefix, then branches that each continue the prefix alone."""

    start: int
    prefix: int
    branches: tuple[int, ...] = ()


Layout = tuple[tuple[Tree, ...], ...]  # the trees of each row


@dataclass
class PairCollator:
    """Turns preference rows into the batch that `share_forward` runs and TRL's loss reads.

    Args:
        processor: of a LLaVA-style model: an image is a run of one token.
        max_length: of prompt and answer together; answers are cut, as TRL does.
        encode_once: process and encode an image once, however many pairs show it; otherwise once an occurrence.
        share_prefix: one tree a pair; otherwise two, each with the prompt and one answer.
        pack: all trees in one row without padding; otherwise one row a tree, padded to the longest.
        max_tokens: split the pairs into chunks of at most so many tokens (a pair that has more is alone).
        references: finds the reference log-probabilities of a row.
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
            input_ids, completion_mask (2B, 1 + answer), chosen first: the prompt's last token, then the answer;
            attention_mask (2B, prompt + answer), TRL's, for its token count; pair_ids, pair_positions (rows, tokens);
            pair_take (2B, 1 + answer), where each of input_ids lies in the flattened rows; pair_layout;
            pixel_values (images, ...) and pair_images, the image of each run of image tokens; row (B,) where examples
            carry it. With `max_tokens`, a
            list of such batches under `chunks`.
        """
        references = [self.references(e) for e in examples] if self.references else None
        pictures = [_images(e) for e in examples]
        rows = [_rendered(e, i, self.processor) for e, i in zip(examples, pictures, strict=True)]
        distinct, image_of = self._distinct(pictures)
        pixels, runs = prepare_images(self.processor, distinct)
        prompts = self._prompts([r["prompt"] for r in rows], image_of, runs)
        tokenizer: Any = self.processor.tokenizer
        answers = [
            self._cut(prompts, tokenizer([r[side] for r in rows], add_special_tokens=False)["input_ids"])
            for side in ("chosen", "rejected")
        ]

        def batch(some: range) -> dict[str, Any]:
            made = self._laid_out([prompts[i] for i in some], [[side[i] for i in some] for side in answers])
            shown = [image for i in some for image in image_of[i]]
            if pixels is not None and shown:
                needed = sorted(set(shown))
                made |= {"pixel_values": pixels[needed], "pair_images": torch.tensor([needed.index(i) for i in shown])}
            if "row" in examples[0]:
                made["row"] = torch.tensor([examples[i]["row"] for i in some])
            if references is not None:
                chosen, rejected = zip(*(references[i] for i in some), strict=True)
                made |= {"ref_chosen_logps": torch.tensor(chosen), "ref_rejected_logps": torch.tensor(rejected)}
            return made

        if self.max_tokens is None:
            return batch(range(len(examples)))
        copies = 1 if self.share_prefix else 2
        costs = [copies * len(p) + len(a) + len(b) for p, a, b in zip(prompts, *answers, strict=True)]
        return {"chunks": [batch(some) for some in _within(costs, self.max_tokens)]}

    def _prompts(self, texts: list[str], image_of: list[list[int]], runs: list[int]) -> list[list[int]]:
        """Token ids, each image token as many times as its image has features."""
        tokenizer: Any = self.processor.tokenizer
        token = self.processor.image_token_id
        prompts = []
        for text, ids, images in zip(
            texts, tokenizer(texts, add_special_tokens=False)["input_ids"], image_of, strict=True
        ):
            widths = iter(runs[i] for i in images)
            named = ids.count(token) * (1 if self.share_prefix else 2)
            if named != len(images):
                raise DataError(f"a prompt names another number of images than its row has: {text!r}.")
            prompts.append([t for i in ids for t in [i] * (next(widths) if i == token else 1)])
        return prompts

    def _distinct(self, pictures: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
        """The images to process, and which of them each occurrence of each pair shows, in the order of its trees."""
        distinct: list[Any] = []
        known: dict[str, int] = {}
        image_of: list[list[int]] = []
        for pair, some in enumerate(pictures):
            image_of.append([])
            for copy in range(1 if self.share_prefix else 2):
                for k, picture in enumerate(some):
                    key = image_key(picture) if self.encode_once else f"{pair}/{copy}/{k}"
                    if key not in known:
                        known[key] = len(distinct)
                        distinct.append(picture)
                    image_of[-1].append(known[key])
        return distinct, image_of

    def _cut(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
        if self.max_length is None:
            return answers
        return [a[: max(0, self.max_length - len(p))] for p, a in zip(prompts, answers, strict=True)]

    def _laid_out(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> dict[str, Any]:
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
        for side, some in enumerate(answers):
            for i, (prompt, answer) in enumerate(zip(prompts, some, strict=True)):
                at, start = starts[i] if self.share_prefix else starts[2 * i + side]
                last = at * width + start + len(prompt) - 1
                before = len(answers[0][i]) if self.share_prefix and side == 1 else 0
                take.append([last, *range(last + 1 + before, last + 1 + before + len(answer))])
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
    """Let a LLaVA-style model run the batches of `PairCollator`; other batches run as before.

    Args:
        model: a LlavaForConditionalGeneration; its language model must use sdpa attention.
    """
    inner = model.model
    inner.language_model.set_attn_implementation(ATTENTION)
    original = inner.forward

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, pair_layout: Layout | None = None, **kwargs: Any) -> Any:
        if pair_layout is None:
            return original(*args, **kwargs)
        # The whole model hands on what it was not given, as None.
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
    """Hidden states of the last prompt token and the answer of each of the 2B rows: (2B, 1 + answer, D)."""
    embeds = model.get_input_embeddings()(pair_ids)
    if pixel_values is not None:
        features = torch.stack(list(model.get_image_features(pixel_values, return_dict=True).pooler_output))
        shown = features[pair_images].flatten(0, 1).to(embeds.device, embeds.dtype)
        places = pair_ids == model.config.image_token_id
        if int(places.sum()) != len(shown):
            raise DataError(
                f"{int(places.sum())} image tokens for {len(shown)} image features: processor and model disagree; give "
                "the processor the model's patch_size, vision_feature_select_strategy and num_additional_image_tokens."
            )
        embeds = embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), shown)
    # A 4-D mask passes transformers' mask code untouched; the attention below reads the layout instead.
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


def branch_mask(tree: Tree, device: torch.device) -> torch.Tensor | None:
    """What the branches of a tree see: (branch tokens, tree tokens), true for the prefix and their own past."""
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
    """Attention of trees: a prefix sees itself, a branch its prefix and itself, all causally.

    Args:
        query: (rows, heads, tokens, d); key and value may have fewer heads.
        pair_layout: the trees of each row; without it this is sdpa.
        pair_masks: of each tree, `branch_mask`.

    Returns:
        (rows, tokens, heads, d); what lies in no tree, padding, is zero.
    """
    if pair_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    grouped = query.is_cuda and groups > 1
    if not grouped:  # off CUDA grouped heads would take the slow path
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    dot_product = functools.partial(
        F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=grouped
    )
    rows = []
    for row, (trees, masks) in enumerate(zip(pair_layout, pair_masks, strict=True)):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        made = []
        end = 0
        for tree, mask in zip(trees, masks, strict=True):
            own = slice(tree.start, tree.start + tree.prefix)
            made.append(dot_product(q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True))
            end = own.stop + sum(tree.branches)
            if mask is not None:
                new, whole = slice(own.stop, end), slice(tree.start, end)
                made.append(dot_product(q[:, :, new], k[:, :, whole], v[:, :, whole], attn_mask=mask))
        if end < q.shape[2]:
            made.append(q.new_zeros(1, q.shape[1], q.shape[2] - end, v.shape[3]))
        rows.append(torch.cat([m.transpose(1, 2) for m in made], dim=1))
    return rows[0] if len(rows) == 1 else torch.cat(rows), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def image_key(image: Any) -> str:
    """What tells a decoded image from others: its mode, size and pixels."""
    metadata = f"{image.mode}{image.size}".encode()
    return hashlib.blake2b(metadata + image.tobytes(), digest_size=16).hexdigest()


def _images(example: dict[str, Any]) -> list[Any]:
    if "image" in example:
        return [example["image"]]
    return list(example.get("images") or [])


def _rendered(example: dict[str, Any], images: list[Any], processor: LlavaProcessor) -> dict[str, str]:
    """Prompt and answers as text, through the chat template where they are messages."""
    texts: dict[str, Any] = {side: example[side] for side in ("prompt", "chosen", "rejected")}
    if is_conversational(texts):
        texts = {
            "prompt": prepare_multimodal_messages(texts["prompt"], images=images),
            "chosen": prepare_multimodal_messages(texts["chosen"]),
            "rejected": prepare_multimodal_messages(texts["rejected"]),
        }
        texts = apply_chat_template(texts, processor)
    return texts


def _within(costs: list[int], most: int) -> list[range]:
    """Ranges of neighbours whose costs sum to at most `most`, or of one."""
    ranges: list[range] = []
    spent = 0
    for i, cost in enumerate(costs):
        if ranges and spent + cost <= most:
            ranges[-1] = range(ranges[-1].start, i + 1)
            spent += cost
        else:
            ranges.append(range(i, i + 1))
            spent = cost
    return ranges
