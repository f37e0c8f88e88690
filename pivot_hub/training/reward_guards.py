"""Guards against reward hacking: warnings about a run whose rewards go up without better answers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, variance
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivot_hub.config.recipe import RewardSpec
from pivot_hub.training.rewards import FORM

WINDOW = 10  # logs whose halves are compared
STANDARD_ERRORS = 2.0  # of the difference between the halves, above which a reward has risen or fallen
MOSTLY = 0.5  # share of answers without an end that is too many

logger = logging.getLogger(__name__)


def form_warning(names: Iterable[str]) -> str | None:
    """Return a warning if rewards look at the form of answers alone, or None.

    Args:
        names: Names of the rewards whose weight is not 0, as in a recipe; a function of the user counts as content.
    """
    listed = list(names)
    if not listed or set(listed) - set(FORM):
        return None
    return (
        f"no reward ({', '.join(listed)}) looks at what the row says is right, only at the form of an answer, so the "
        "run teaches form and not sight; add a reward of content, as `exact_match`, with a weight."
    )


def weighted_names(specs: Sequence[RewardSpec]) -> list[str]:
    """Return the names of the rewards of a recipe whose weight is not 0."""
    return [spec.name for spec in specs if spec.weight]


class RewardGuards(TrainerCallback):
    """Warns, once for each cause, when rewards and logs of a run show that it learns something else than to answer.

    - At the start: every reward with a weight is one of form.
    - A reward of form has risen while the mean of the rewards of content has fallen: from the first to the second half
      of the last WINDOW logs, each by more than STANDARD_ERRORS standard errors of the difference.
    - More than half of the answers of a log have no end at `max_completion_length`.

    Attributes:
        warnings: The warnings of the run so far. A resumed run finds those of its earlier part again.

    Args:
        names: Name of each reward in TRL's metrics.
        form: Those of them that look at the form of an answer alone.
        weights: Weight of each reward.
        longest: The trainer's `max_completion_length`.
    """

    def __init__(self, names: Sequence[str], form: Sequence[str], weights: Sequence[float], longest: int) -> None:
        self.content = [name for name in names if name not in form]
        self.weighted = [name for name, weight in zip(names, weights, strict=True) if weight]
        self.form = [name for name in self.weighted if name in form]
        self.longest = longest
        self.warnings: list[str] = []
        self._causes: set[str] = set()
        self._logs: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.warnings.clear()
        self._causes.clear()
        self._logs.clear()
        if self.form == self.weighted and (warning := form_warning(self.form)):
            self._warn("form alone", warning)
        for log in state.log_history:
            self._look_at(log)
        if state.is_world_process_zero:
            for warning in self.warnings:
                logger.warning("%s", warning)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        known = len(self.warnings)
        self._look_at(state.log_history[-1])
        if state.is_world_process_zero:
            for warning in self.warnings[known:]:
                logger.warning("%s", warning)

    def _warn(self, cause: str, warning: str) -> None:
        if cause not in self._causes:
            self._causes.add(cause)
            self.warnings.append(warning)

    def _look_at(self, log: Mapping[str, Any]) -> None:
        """Add a log of the trainer to the last ones and find what they warn of."""
        if "reward" not in log:  # of an evaluation, or the summary of the run
            return
        self._logs.append(log)
        clipped = log["completions/clipped_ratio"]
        if clipped > MOSTLY:
            self._warn(
                "no end",
                f"step {log['step']}: {clipped:.0%} of the answers have no end at {self.longest} tokens "
                "(completions/clipped_ratio); raise `args.max_completion_length`, or add the reward `length`.",
            )
        for name in self.form:
            changes = self._changes(name)
            if changes is not None:
                self._warn(
                    name,
                    f"step {log['step']}: over the last {WINDOW} logs the reward `{name}`, of form, rose by "
                    f"{changes[0]:.2g} while the mean of the rewards of content fell by {-changes[1]:.2g}; read the "
                    f"answers, and lower the weight of `{name}`.",
                )

    def _changes(self, name: str) -> tuple[float, float] | None:
        """Return by how much a reward of form rose and the mean of those of content fell, or None if they did not."""
        both = []
        for log in self._logs:
            form = log.get(f"rewards/{name}/mean")
            content = [v for other in self.content if (v := log.get(f"rewards/{other}/mean")) is not None]
            if form is not None and content:
                both.append((form, fmean(content)))
        if len(both) < WINDOW:
            return None
        (rise, rise_error), (change, change_error) = (_change(values) for values in zip(*both, strict=True))
        rose, fell = rise > STANDARD_ERRORS * rise_error, -change > STANDARD_ERRORS * change_error
        return (rise, change) if rose and fell else None


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Return the difference between the means of the second and the first half, and its standard error."""
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    error = sqrt(sum(variance(half) / len(half) for half in halves))
    return fmean(halves[1]) - fmean(halves[0]), error
