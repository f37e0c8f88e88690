"""The report on a stage's rows: counts, lengths, and which rows were skipped and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pivot_hub.data.row import Row


class CheckResult(NamedTuple):
    """The result of checking one row.

    Args:
        problem: Kind and description of what is wrong with the row, or None.
        prompt_tokens: Number of tokens of all turns that are read, without the image.
        answer_tokens: Number of tokens of all answers; for a preference pair, the mean of its two answers.
        answer_cut: Whether `max_length` cuts the answer.
        image_tokens: Number of tokens of the image; 0 without one.
        rewards: For the name of each of the recipe's rewards, whether it can score the row.
    """

    problem: tuple[str, str] | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    answer_cut: bool = False
    image_tokens: int = 0
    rewards: Mapping[str, bool] = {}


@dataclass
class RowReport:
    """Counts over the rows of a stage; the stage's report.json holds them.

    Attributes:
        rows: Number of rows that an epoch sees.
        skipped_rows: Number of rows that cannot be used.
        skipped: Reasons for the first skipped rows.
        problems: Number of skipped rows by kind of problem.
        image_modes: Number of decoded images by the mode they were stored in.
        duplicates: Number of rows whose image and texts occurred before; they are kept.
        sources: For each source its rows, a hash of their ids, the rows of each group, a hash of the annotation files,
            and the commit of the Hub dataset that the files came from.
        answers_cut: Number of rows whose answer `max_length` cuts.
        prompt_tokens: Mean number of prompt tokens of a row, without the image.
        answer_tokens: Mean number of answer tokens of a row; for a preference pair, of one answer.
        image_tokens: Mean number of tokens that a row's image takes.
        answer_lengths: Number of rows by tokens of their answer, in powers of two, as "9-16".
        rewards: Number of rows that each of the recipe's rewards can score.
    """

    rows: int = 0
    skipped_rows: int = 0
    skipped: list[str] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    image_modes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    answers_cut: int = 0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    image_tokens: float = 0.0
    answer_lengths: dict[str, int] = field(default_factory=dict)
    rewards: Counter[str] = field(default_factory=Counter)

    def copy_from(self, other: RowReport) -> None:
        """Replace all counts by those of another report."""
        vars(self).update(vars(other))

    def text(self) -> str:
        """Format the report for a terminal."""
        lines = [f"{self.rows} rows per epoch, {self.skipped_rows} skipped, {self.duplicates} duplicates"]
        for number, source in enumerate(self.sources):
            groups = sorted(source["groups"].items(), key=lambda group: -group[1])
            more = f", {len(groups) - 8} more" if len(groups) > 8 else ""
            named = ": " + ", ".join(f"{name} {count}" for name, count in groups[:8]) + more if groups else ""
            lines.append(f"  source {number}: {source['rows']} rows{named}; ids {source['ids_sha256'][:12]}")
        if self.image_modes:
            lines.append("images: " + ", ".join(f"{mode} {count}" for mode, count in self.image_modes.most_common()))
        lines.append(
            f"mean tokens per row: {self.image_tokens} of the image, {self.prompt_tokens} in the prompt, "
            f"{self.answer_tokens} in the answer"
        )
        lines.append(f"answers cut by max_length: {self.answers_cut}")
        most = max(self.answer_lengths.values(), default=1)
        for tokens, count in self.answer_lengths.items():
            lines.append(f"  {tokens:>9} tokens {count:>9} {'#' * round(40 * count / most)}")
        if self.rewards:
            named = ", ".join(f"{name} {count}" for name, count in self.rewards.items())
            lines.append(f"rows that each reward can score: {named}")
        for kind, count in self.problems.most_common():
            lines.append(f"skipped, {kind}: {count}")
        lines += [f"  {reason}" for reason in self.skipped[:10]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        counters = {"problems": self.problems, "image_modes": self.image_modes, "rewards": self.rewards}
        return {**asdict(self), **{name: dict(counter) for name, counter in counters.items()}}


class RowStatistics:
    """Token counts and duplicates over all rows, in 8 bytes of memory a row."""

    def __init__(self) -> None:
        self.rows = self.prompt_tokens = self.answer_tokens = self.image_tokens = self.answers_cut = 0
        self.answer_length_bits: Counter[int] = Counter()  # answers of 2**(bits - 1) + 1 to 2**bits tokens
        self.rewards: Counter[str] = Counter()
        self.packed_hashes: list[np.ndarray] = []
        self.new_hashes: list[int] = []

    def add(self, row: Row, result: CheckResult) -> None:
        """Count one row."""
        self.rows += 1
        self.prompt_tokens += result.prompt_tokens
        self.answer_tokens += result.answer_tokens
        self.image_tokens += result.image_tokens
        self.answers_cut += result.answer_cut
        self.rewards.update(result.rewards)
        self.answer_length_bits[max(result.answer_tokens - 1, 0).bit_length()] += 1
        content = "\0".join(map(str, (row.image, row.earlier, row.prompt, row.chosen, row.rejected)))
        self.new_hashes.append(int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little"))
        if len(self.new_hashes) >= 1 << 16:
            self._pack_hashes()

    def fill(self, report: RowReport) -> None:
        """Write the statistics into a report."""
        self._pack_hashes()
        report.duplicates = self.rows - len(np.unique(np.concatenate(self.packed_hashes)))
        report.prompt_tokens = round(self.prompt_tokens / self.rows, 2)
        report.answer_tokens = round(self.answer_tokens / self.rows, 2)
        report.image_tokens = round(self.image_tokens / self.rows, 2)
        report.answers_cut = self.answers_cut
        report.rewards = self.rewards
        report.answer_lengths = {
            f"{2 ** (bits - 1) + 1}-{2**bits}" if bits > 1 else str(bits + 1): self.answer_length_bits[bits]
            for bits in sorted(self.answer_length_bits)
        }

    def _pack_hashes(self) -> None:
        """Move the new hashes into an array, which takes less memory than a list of Python integers."""
        self.packed_hashes.append(np.array(self.new_hashes, np.uint64))
        self.new_hashes = []
