"""Which words of an answer learn from the image: the gradient of a loss on the image tokens, token by token.

A loss L depends on the log-probabilities l of the tokens of one or two answers, given the image or the rejected image.
Its gradient on the image tokens e, the projector's output, is the sum over tokens of dL/dl * dl/de. The norm of a token
is that of its own term,

    |dL/dl| * sum over image tokens and channels of |dl/de|,

an L1 norm as in the paper's gradient maps. Its unit is that of the loss for a change of 1 in each channel of e.

For SFT dL/dl is -1/n in an answer of n tokens. A loss that compares takes sums over answers, so that dL/dl is the same
for all tokens of one answer given one image; for DPO it is -beta * sigmoid(-beta * margin) in the chosen answer and the
opposite in the rejected one. Where the two answers begin alike, they share the log-probabilities of these tokens, and
the two values of dL/dl are added up. For DPO the sum is 0: what is said before the answers differ learns nothing from
the image. A norm says how much a token can move the image tokens, not in which direction; terms of several tokens may
cancel each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.yaml_loader import nearest
from pivot_hub.data.image_store import FileStore
from pivot_hub.data.row import IMAGE_TAG, SUFFIXES
from pivot_hub.data.source import AnnotationFile, FileSource, ShapesSource, Source, files_sha256
from pivot_hub.encoder.device import compute_device
from pivot_hub.errors import DataError
from pivot_hub.explain.gradcam import (
    answer_batch,
    answer_log_probs,
    explained_value,
    require_same_family,
    token_log_probs,
)
from pivot_hub.explain.image_maps import captured_tokens, image_family
from pivot_hub.explain.word_kinds import (
    OTHER,
    VISUAL,
    WORDS,
    FindSpans,
    listed_spans,
    read_words,
    shapes_spans,
    token_kinds,
)
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import bootstrap, mean
from pivot_hub.mllm.load import load_mllm
from pivot_hub.provenance import versions, weights_sha256
from pivot_hub.training.losses import NAMED_LOSSES, compares_images, load_loss, mean_loss
from pivot_hub.training.own_function import is_own_function

Progress = Callable[[int, int | None, float], None]  # takes rows done, all rows, and rows per second
LOSSES = ("sft", "dpo", *NAMED_LOSSES)
SIBLINGS = (("chosen", "rejected"), ("other_chosen", "other_rejected"))  # two answers given one image
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Example:
    """A preference pair.

    Args:
        name: Name of the row.
        image: Image of any size.
        question: The user's question.
        chosen: The right answer.
        rejected: The wrong answer.
        rejected_image: Image that the chosen answer does not describe; None if there is none.
    """

    name: str
    image: Image.Image
    question: str
    chosen: str
    rejected: str
    rejected_image: Image.Image | None = None


@dataclass(frozen=True)
class WordGradient:
    """Gradient of a loss through the tokens of one kind of words.

    Args:
        loss: Name of the loss.
        kind: Kind of the words; `visual` is all kinds but `other`.
        rows: Number of rows that have such words.
        tokens: Number of tokens of these words, in all answers that the loss reads.
        relative: Mean norm, where 100 is the mean token of the same answer given the same image. Answers without any
            gradient are left out; None if these are all.
        relative_ci95: Bootstrap interval over rows; None if fewer than two rows have a value.
        norm: Mean norm, see the top of this file.
        norm_ci95: Bootstrap interval over rows; None if fewer than two rows have such words.
    """

    loss: str
    kind: str
    rows: int
    tokens: int
    relative: float | None
    relative_ci95: tuple[float, float] | None
    norm: float
    norm_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class TokenNorm:
    """The norm of one token of an answer, in one loss.

    Args:
        answer: Which answer it is part of, and given which image: chosen, rejected, other_chosen or other_rejected,
            where `other` is the rejected image.
        kind: Kind of its word.
        norm: Its norm.
    """

    answer: str
    kind: str
    norm: float


def token_norms(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    example: Example,
    losses: Sequence[str],
    find_spans: FindSpans,
    reference: PreTrainedModel | None = None,
    beta: float = 0.1,
) -> dict[str, list[TokenNorm]]:
    """Compute the norm of each token for each loss, with one backward pass for each token.

    Args:
        model: The MLLM; its weights get no gradient and are not changed.
        processor: Processor of the MLLM.
        example: The preference pair.
        losses: Names of losses: sft, dpo, those of `training.losses`, or `module:function`.
        find_spans: Function that finds the words of each kind in an answer.
        reference: The frozen parent; only sft needs none.
        beta: Beta of the losses.

    Returns:
        The tokens of all answers that each loss depends on, without those that end a turn.

    Raises:
        DataError: A loss compares images and the pair has no rejected image, or it needs a reference.
        CheckpointError: The MLLM has no image tokens, or the reference is of another family.
    """
    check_losses(losses, reference is not None)
    if reference is not None:
        require_same_family(model, reference)
    answers = {"chosen": example.chosen, "rejected": example.rejected}
    given = {name: (example.image, text) for name, text in answers.items()}
    if compares_images(losses):
        if example.rejected_image is None:
            raise DataError(
                f"{example.name}: has no `rejected_image`, which a loss of {', '.join(losses)} compares with; add it, "
                "or leave out losses that compare images."
            )
        given |= {f"other_{name}": (example.rejected_image, text) for name, text in answers.items()}
    batches = {name: answer_batch(processor, image, example.question, [text]) for name, (image, text) in given.items()}
    sums = {name: _sums(model, batch) for name, batch in batches.items()}
    reference_sums = {} if reference is None else {name: _sums(reference, batch) for name, batch in batches.items()}
    ids = {name: batch["input_ids"][batch["completion_mask"] == 1].tolist() for name, batch in batches.items()}
    derivatives = {loss: _derivatives(loss, sums, reference_sums, len(ids["chosen"]), beta) for loss in losses}
    read = {name for of_loss in derivatives.values() for name in of_loss}
    norms = {name: _log_prob_norms(model, batches[name]) for name in batches if name in read}
    kinds = {name: token_kinds(processor, given[name][1], find_spans(given[name][1])) for name in read}
    both = zip(ids["chosen"], ids["rejected"], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))  # tokens that both answers begin with
    tokens: dict[str, list[TokenNorm]] = {loss: [] for loss in losses}
    for loss, of_loss in derivatives.items():
        for name, derivative in of_loss.items():
            at_shared = sum(of_loss.get(sibling, 0.0) for pair in SIBLINGS if name in pair for sibling in pair)
            for i, (kind, norm) in enumerate(zip(kinds[name], norms[name], strict=True)):
                if kind is not None:
                    factor = at_shared if i < shared else derivative
                    tokens[loss].append(TokenNorm(name, kind, abs(factor) * norm))
    return tokens


def check_losses(losses: Sequence[str], has_reference: bool) -> None:
    """Check that losses can be computed.

    Raises:
        DataError: A loss is unknown, or there is no reference for it.
        TrainingError: A function cannot be imported.
    """
    for name in losses:
        if name not in LOSSES and not is_own_function(name):
            raise DataError(
                f"there is no loss {name!r}{nearest(name, LOSSES)}; give `module:function` or one of "
                f"{', '.join(LOSSES)}."
            )
        if name not in ("sft", "dpo"):
            load_loss(name)
        if name != "sft" and not has_reference:
            raise DataError(f"the loss {name} compares an MLLM with its parent: give --reference, or --loss sft.")


def _sums(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probability of the answer of a batch, (1,)."""
    with torch.no_grad():
        return answer_log_probs(model, batch)


def _derivatives(
    loss: str, sums: Mapping[str, Tensor], reference_sums: Mapping[str, Tensor], tokens: int, beta: float
) -> dict[str, float]:
    """Derivative of a loss with respect to the summed log-probability of each answer that it depends on.

    Args:
        loss: Name of the loss.
        sums: Summed log-probability (1,) of each answer under the model.
        reference_sums: The same under the reference.
        tokens: Number of tokens of the chosen answer.
        beta: Beta of the loss.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in sums.items()}
    with torch.enable_grad():
        if loss == "sft":
            value = explained_value("sft", leaves["chosen"], {"completion_mask": torch.ones(1, tokens)})
        elif loss == "dpo":
            pair, reference = (torch.cat([s["chosen"], s["rejected"]]) for s in (leaves, reference_sums))
            value = explained_value("dpo", pair, {}, reference, beta)
        else:
            log_probs = {f"{name}_logps": leaf for name, leaf in leaves.items()}
            log_probs |= {f"ref_{name}_logps": constant for name, constant in reference_sums.items()}
            value = mean_loss(load_loss(loss), log_probs, beta)
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: float(gradient) for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _log_prob_norms(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
    """L1 norm of the gradient of each token's log-probability on the image tokens, for one answer."""
    of_image = batch["input_ids"][0] == image_family(model.config).image_token_id(cast(Any, model.config))
    norms = []
    with torch.enable_grad(), captured_tokens(model) as captured:
        log_probs = token_log_probs(model, batch)[0]
        for position in batch["completion_mask"][0, 1:].nonzero().flatten().tolist():
            (gradient,) = torch.autograd.grad(log_probs[position], captured["embeddings"], retain_graph=True)
            norms.append(float(gradient[0, of_image.to(gradient.device)].float().abs().sum()))
    return norms


def summarise(rows: Sequence[Mapping[str, Sequence[TokenNorm]]]) -> list[WordGradient]:
    """Average the norms of tokens by loss and kind, with bootstrap intervals over rows.

    Args:
        rows: What `token_norms` returned for each row.

    Returns:
        For each loss `visual`, then each kind that occurs, from the largest relative norm on; `other` comes last.
    """
    kinds = sorted({token.kind for row in rows for tokens in row.values() for token in tokens})
    results = []
    for loss in rows[0]:
        scores = np.stack([_scores(row[loss], kinds) for row in rows])  # (rows, kinds, 4)
        seen = [i for i, kind in enumerate(kinds) if kind != OTHER]
        columns = {VISUAL: scores[:, seen].sum(1)} | {kind: scores[:, i] for i, kind in enumerate(kinds)}
        of_loss = [_summary(loss, kind, column) for kind, column in columns.items() if column[:, 3].sum()]
        results += sorted(of_loss, key=lambda r: (r.kind != VISUAL, r.kind == OTHER, -(r.relative or 0)))
    return results


def table_of(results: Sequence[WordGradient]) -> Table:
    """Arrange results as a table, a row for each loss and kind."""
    table = Table(box=SIMPLE, title="Which words learn from the image, with 95% intervals over rows")
    for column in (
        "loss",
        "kind",
        "rows",
        "tokens",
        "relative norm (100: mean token of the answer)",
        "norm of a token",
    ):
        table.add_column(column, no_wrap=True)
    for r in results:
        relative, norm = _cell(r.relative, r.relative_ci95, ".1f"), _cell(r.norm, r.norm_ci95, ".3g")
        table.add_row(r.loss, r.kind, str(r.rows), str(r.tokens), relative, norm)
    return table


def _cell(value: float | None, ci95: tuple[float, float] | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if ci95 is None else f"{value:{form}} [{ci95[0]:{form}}, {ci95[1]:{form}}]"


def _scores(tokens: Sequence[TokenNorm], kinds: Sequence[str]) -> np.ndarray:
    """Sums of one row by kind (kinds, 4): relative norms, tokens that have one, norms, and tokens."""
    scores = np.zeros((len(kinds), 4))
    for answer in {token.answer for token in tokens}:
        of_answer = [token for token in tokens if token.answer == answer]
        mean_norm = sum(token.norm for token in of_answer) / len(of_answer)
        for token in of_answer:
            relative = (100 * token.norm / mean_norm, 1) if mean_norm > 0 else (0, 0)
            scores[kinds.index(token.kind)] += (*relative, token.norm, 1)
    return scores


def _summary(loss: str, kind: str, scores: np.ndarray) -> WordGradient:
    """Means and intervals of one kind from its scores (rows, 4)."""
    relative, relative_ci95, _ = _mean_of(scores[:, :2])
    norm, norm_ci95, rows = _mean_of(scores[:, 2:])
    assert norm is not None  # the kind occurs
    return WordGradient(loss, kind, rows, int(scores[:, 3].sum()), relative, relative_ci95, norm, norm_ci95)


def _mean_of(scores: np.ndarray) -> tuple[float | None, tuple[float, float] | None, int]:
    """Mean, its interval and the number of rows that have a value, from sums and counts of each row (rows, 2)."""
    rows = int((scores[:, 1] > 0).sum())
    if rows == 0:
        return None, None, rows
    with np.errstate(invalid="ignore"):  # a resample may lack the kind
        value, ci95 = bootstrap(scores, mean, SEED)
    return value, ci95 if rows > 1 else None, rows


def examples_of(source: Source, rows: int) -> Iterator[Example]:
    """Read the first rows of a source as preference pairs.

    Raises:
        DataError: A row is bad, or has no image.
    """
    for row in islice(source.rows(), rows):
        if isinstance(row, DataError):
            raise DataError(f"{row}.") from None
        if row.image is None:
            raise DataError(f"{row.id}: has no image; only rows with an image have gradients on it, so remove the row.")
        assert row.rejected is not None  # a row of pairs has one
        images = [row] if row.rejected_image is None else [row, row.with_rejected_image()]
        image, *rejected = (source.open_image(source.locate(each)) for each in images)
        question = row.prompt.replace(IMAGE_TAG, "").strip()
        yield Example(row.id, image, question, row.chosen, row.rejected, rejected[0] if rejected else None)


def measure_file(
    checkpoint: Path,
    losses: Sequence[str],
    data: Path | None = None,
    images: Path | None = None,
    rows: int = 200,
    words: Path | None = None,
    reference: Path | None = None,
    beta: float = 0.1,
    progress: Progress | None = None,
) -> tuple[list[WordGradient], dict[str, Any]]:
    """Measure which words learn from the image, over preference pairs of a file or of the synthetic Shapes dataset.

    Args:
        checkpoint: Folder of the MLLM.
        losses: Names of losses, as in `token_norms`.
        data: File of rows with `image, question, chosen, rejected` and, for losses that compare images,
            `rejected_image`: .json, .jsonl or .parquet. None for pairs of test scenes that differ in one thing.
        images: Folder or archive that image names start from; the folder of `data` by default.
        rows: Number of rows, from the first on.
        words: YAML file with the words of each kind; `words.yaml` beside this file by default. Kinds in the synthetic
            Shapes dataset are known.
        reference: Folder of the parent; only sft needs none.
        beta: Beta of the losses.
        progress: Function that is called after each row.

    Returns:
        The results, and these with their conditions as plain values.

    Raises:
        DataError: A file or a row cannot be used, there is no row, or a loss is unknown or lacks its reference.
        CheckpointError: The MLLM has no image tokens, or the reference is of another family.
    """
    check_losses(losses, reference is not None)
    if rows < 1:
        raise DataError(f"--rows {rows}: give at least one.")
    source: Source
    if data is None:
        if words is not None or images is not None:
            raise DataError("--words and --images belong to rows of a file: give the file by --data.")
        source = ShapesSource(
            ShapesData(format="shapes", content="pairs", rows=rows, split="test", counterfactual=True)
        )
        find_spans: FindSpans = shapes_spans
    else:
        if data.suffix not in SUFFIXES or not data.is_file():
            raise DataError(f"{data}: rows are read from a {', '.join(SUFFIXES)} file, and this is none.")
        store = FileStore(data.parent if images is None else images)
        source = FileSource("mmpr", (AnnotationFile(data, data.name),), data.parent, store)
        find_spans = listed_spans(read_words(words or WORDS))
    model, processor = load_mllm(checkpoint)
    parent = None if reference is None else load_mllm(reference)[0]
    for each in (model, parent):
        if each is not None:
            cast(torch.nn.Module, each).to(compute_device()).eval()
    started, measured = time.monotonic(), []
    for example in examples_of(source, rows):
        measured.append(token_norms(model, processor, example, losses, find_spans, parent, beta))
        if progress is not None:
            progress(len(measured), None, len(measured) / (time.monotonic() - started))
    if not measured:
        raise DataError(f"{data}: there is no row in it; give preference pairs with images.")
    results = summarise(measured)
    return results, {
        "mllm": _shown_folder(checkpoint),
        "mllm_sha256": weights_sha256(checkpoint),
        "reference": None if reference is None else _shown_folder(reference),
        "reference_sha256": None if reference is None else weights_sha256(reference),
        "data": "synthetic Shapes dataset, test pairs that differ in one thing" if data is None else data.name,
        "data_sha256": files_sha256(source),
        "words": None if data is None else (words or WORDS).name,
        "rows": len(measured),
        "beta": beta,
        "norm": "L1 norm at the projector's output of the loss through one token",
        "relative": "100 is the mean token of the same answer given the same image",
        "results": [asdict(result) for result in results],
        "versions": versions(),
    }


def _shown_folder(folder: Path) -> str:
    return "/".join(folder.absolute().parts[-2:])
