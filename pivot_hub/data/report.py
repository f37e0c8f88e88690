"""What was found in a stage's rows: counts, lengths, and what was left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pivot_hub.data.row import Row


class Measured(NamedTuple):
    """What a check finds of one row: what is wrong with it, as (kind, sentence), and its tokens without the image."""

    problem: tuple[str, str] | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cut: bool = False


@dataclass
class RowReport:
    """What was read, and what was left out and why; it travels into the stage's report.

    Attributes:
        rows: that an epoch sees.
        skipped_rows: that cannot be used; `skipped` names the first ones, `problems` counts them by kind.
        image_modes: of the decoded images, as stored.
        duplicates: rows whose image and texts were there before; they are kept.
        sources: of each, rows, a hash of their ids, rows of each group, a hash of the annotation files,
            and the Hub's commit where they came from there.
        answers_cut: rows whose answer `max_length` shortens.
        prompt_tokens, answer_tokens: means of a row, without the image; of a pair, of one answer.
        answer_lengths: rows by tokens of their answer, in powers of two, as "9-16".
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
    answer_lengths: dict[str, int] = field(default_factory=dict)

    def become(self, other: RowReport) -> None:
        """Take another report's place."""
        vars(self).update(vars(other))

    def text(self) -> str:
        """One screen for a person."""
        lines = [f"{self.rows} rows an epoch, {self.skipped_rows} left out, {self.duplicates} duplicates"]
        for number, source in enumerate(self.sources):
            groups = sorted(source["groups"].items(), key=lambda g: -g[1])
            more = f", {len(groups) - 8} more" if len(groups) > 8 else ""
            named = ": " + ", ".join(f"{name} {count}" for name, count in groups[:8]) + more if groups else ""
            lines.append(f"  source {number}: {source['rows']} rows{named}; ids {source['ids_sha256'][:12]}")
        if self.image_modes:
            lines.append("images: " + ", ".join(f"{mode} {count}" for mode, count in self.image_modes.most_common()))
        lines.append(f"tokens of a row, without its image: {self.prompt_tokens} asked, {self.answer_tokens} answered")
        lines.append(f"answers cut by max_length: {self.answers_cut}")
        most = max(self.answer_lengths.values(), default=1)
        for tokens, count in self.answer_lengths.items():
            lines.append(f"  {tokens:>9} tokens {count:>9} {'#' * round(40 * count / most)}")
        for kind, count in self.problems.most_common():
            lines.append(f"left out, {kind}: {count}")
        lines += [f"  {reason}" for reason in self.skipped[:10]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": dict(self.problems), "image_modes": dict(self.image_modes)}


class RowCounter:
    """Counts over all rows, in memory that hardly grows with them: 8 bytes a row, to find duplicates."""

    def __init__(self) -> None:
        self.prompt = self.answer = self.cut = self.count = 0
        self.lengths: Counter[int] = Counter()
        self.hashes: list[np.ndarray] = []
        self.new: list[int] = []

    def add(self, row: Row, measured: Measured) -> None:
        self.count += 1
        self.prompt += measured.prompt_tokens
        self.answer += measured.answer_tokens
        self.cut += measured.cut
        self.lengths[max(measured.answer_tokens - 1, 0).bit_length()] += 1
        content = "\0".join(map(str, (row.image, row.earlier, row.prompt, row.chosen, row.rejected)))
        self.new.append(int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little"))
        if len(self.new) >= 1 << 16:
            self.pack()

    def pack(self) -> None:
        self.hashes.append(np.array(self.new, np.uint64))
        self.new = []

    def fill(self, report: RowReport) -> None:
        self.pack()
        report.duplicates = self.count - len(np.unique(np.concatenate(self.hashes)))
        report.prompt_tokens = round(self.prompt / self.count, 2)
        report.answer_tokens = round(self.answer / self.count, 2)
        report.answers_cut = self.cut
        report.answer_lengths = {
            f"{2 ** (bits - 1) + 1}-{2**bits}" if bits > 1 else str(bits + 1): self.lengths[bits]
            for bits in sorted(self.lengths)
        }
