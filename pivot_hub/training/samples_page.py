"""The page of samples as HTML: the curves of a run's metrics as inline SVG, and tables of its answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PAGE = "samples.html"
TEMPLATE = "samples.html.jinja"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 240, 120, 54, 18, 8, 8  # of a drawing and of its margins
MOST_POINTS = 300  # of a curve; of more logs, means of neighbours are drawn


@dataclass(frozen=True)
class Curve:
    """A curve that is drawn as SVG; coordinates are those of a drawing of WIDTH x HEIGHT.

    Args:
        name: Name of the metric.
        meaning: What it is, in words.
        last: The last value.
        line: Points of the curve.
        band: Points of the polygon around it, a standard deviation to either side; empty without one.
        end: The last point.
        ticks: Height and label of the values at the bottom and the top.
        steps: First and last step.
    """

    name: str
    meaning: str
    last: str
    line: str
    band: str
    end: tuple[float, float]
    ticks: list[tuple[float, str]]
    steps: tuple[int, int]


def samples_page(
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    rewards: Sequence[str],
    warnings: Sequence[str],
    max_steps: int,
) -> str:
    """Render the page. Every text of the rows and answers is escaped.

    Args:
        history: The trainer's logs, with the names of TRL's metrics.
        samples: Samples as lines of `samples.jsonl` hold them.
        rewards: Name of each reward.
        warnings: Warnings about the run.
        max_steps: Number of steps of the run.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        curves=[curve for metric in _metrics(rewards) if (curve := _curve(history, *metric)) is not None],
        samples=list(reversed(samples)),
        rewards=rewards,
        warnings=warnings,
        step=history[-1]["step"] if history else 0,
        max_steps=max_steps,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
    )


def _metrics(rewards: Sequence[str]) -> list[tuple[str, str, str | None, tuple[float, float] | None]]:
    """Return name, meaning, name of the spread, and fixed limits of each metric that is drawn where it is logged."""
    share = (0.0, 1.0)
    each = [
        (f"rewards/{name}/mean", "Mean of this reward, with one standard deviation", f"rewards/{name}/std", None)
        for name in (rewards if len(rewards) > 1 else ())
    ]
    return [
        ("reward", "Mean of the weighted sum of all rewards, with one standard deviation", "reward_std", None),
        *each,
        ("frac_reward_zero_std", "Share of prompts whose answers all got the same reward: no signal", None, share),
        ("completions/mean_length", "Mean length of the answers, in tokens", None, None),
        ("completions/clipped_ratio", "Share of answers without an end at max_completion_length", None, share),
        ("entropy", "Mean entropy of the answers' tokens, in nats", None, None),
        ("kl", "KL divergence of the policy from the reference, in nats", None, None),
    ]


def _curve(
    logs: Sequence[Mapping[str, Any]],
    name: str,
    meaning: str,
    spread_name: str | None,
    limits: tuple[float, float] | None,
) -> Curve | None:
    """Return the curve of a metric, or None if no log has it."""
    points = [
        (log["step"], log[name], (log.get(spread_name) or 0.0) if spread_name else 0.0)
        for log in logs
        if log.get(name) is not None
    ]
    if not points:
        return None
    together = math.ceil(len(points) / MOST_POINTS)
    drawn = [
        tuple(fmean(values) for values in zip(*points[i : i + together], strict=True))
        for i in range(0, len(points), together)
    ]
    low, high = limits or (min(v - spread for _, v, spread in drawn), max(v + spread for _, v, spread in drawn))
    if high == low:
        low, high = low - 0.5, high + 0.5
    first, last = drawn[0][0], drawn[-1][0]

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        up = (value - low) / (high - low)
        x = LEFT + across * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1)

    band = [(s, v + spread) for s, v, spread in drawn] + [(s, v - spread) for s, v, spread in reversed(drawn)]
    return Curve(
        name,
        meaning,
        _number(points[-1][1]),
        _points([place(step, value) for step, value, _ in drawn]),
        _points([place(*point) for point in band]) if spread_name and len(drawn) > 1 else "",
        place(last, drawn[-1][1]),
        [(place(first, value)[1], _number(value)) for value in (low, high)],
        (points[0][0], points[-1][0]),
    )


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
