"""Multinomial logistic regression: scikit-learn's optimum for every C in one run, on a CPU or GPU, block by block.

scikit-learn minimises `C * sum of cross-entropies + ||W||^2 / 2` by L-BFGS from zero, once for each C. This module
minimises the same objective in another way:

- Cs are fitted from the strongest penalty to the weakest. Each fit starts from the extrapolation of the last two optima
  and keeps the history of L-BFGS: it describes the curvature of the cross-entropy, which does not depend on C, and the
  curvature of the penalty is known exactly.
- Steps are preconditioned. The Hessian of a class is close to `p (1 - p) * covariance + penalty`, which is diagonal in
  the basis of the covariance's eigenvectors, so correlated features need only a few more steps than others.
- Most steps use fast matrix products (bfloat16 or TF32, if the hardware has them), the last ones use float32.
- The data are read in blocks: only the weights, their history and one block are in memory. A GPU with memory for the
  data holds them whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pivot_hub.errors import ProbeError

CELLS = 8_000_000  # logits in a block, so that a block nearly fits a processor's cache
CUDA_CELLS = 128_000_000  # on a GPU, where a block is large enough for its products to take longer than their launch
HISTORY = 20  # steps and gradient changes that L-BFGS remembers
SLACK = 1e-6  # relative increase of the loss that the line search accepts as rounding
QUICK = 20  # fast products are used until the expected decrease is below this many times the tolerance
STALLED = 4  # or until this many steps in a row have not halved the expected decrease, because of rounding
FLAT = 20  # number of steps within which the loss has to fall by the tolerance


class Rows(Protocol):
    """Features (N, D), as an array in memory or memory-mapped from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray | Tensor: ...


@dataclass(frozen=True)
class Logistic:
    """A fitted logistic regression.

    Args:
        c: Inverse strength of the penalty, as in scikit-learn.
        weight: (classes, D) float32 weights.
        bias: (classes,) float32 biases.
        loss: Minimised objective: the mean cross-entropy plus the penalty divided by `C * N`.
        steps: Number of steps taken for this C.
    """

    c: float
    weight: Tensor
    bias: Tensor
    loss: float
    steps: int

    @torch.no_grad()
    def predict(self, x: Rows) -> np.ndarray:
        """Predict the most likely class of each row: (N,) int64."""
        classes = [torch.addmm(self.bias, b, self.weight.T).argmax(1).cpu() for b in _blocks(x, len(self.bias))]
        return torch.cat(classes).numpy()


@torch.no_grad()
def fit_logistic(
    x: Rows,
    y: np.ndarray,
    cs: Sequence[float],
    classes: int | None = None,
    start: Logistic | None = None,
    tolerance: float = 5e-6,
    max_steps: int = 500,
    device: str | torch.device = "cpu",
) -> list[Logistic]:
    """Fit one regression for each C.

    Args:
        x: (N, D) float32 features.
        y: (N,) class numbers, from 0.
        cs: Inverse penalties. They are fitted from the smallest to the largest.
        classes: Number of classes; one more than the largest of `y` by default.
        start: Starting point of the first fit, such as the optimum for a part of the rows.
        tolerance: The fit stops when the quadratic model of L-BFGS expects the loss to fall by less than this, or when
            the loss has not fallen by this in FLAT steps. The loss is then within a few times this of its optimum.
        max_steps: Largest number of steps for one C.
        device: Device to fit on.

    Returns:
        The fits, in the order of `cs`.

    Raises:
        ProbeError: A feature is not finite, there are fewer than two classes, or a fit does not converge.
    """
    if len(x) != len(y):
        raise ProbeError(f"{len(x)} rows of features for {len(y)} labels; give one label per row.")
    if len(np.unique(y)) < 2:
        raise ProbeError("all labels are of one class: a probe needs at least two; check the data.")
    problem = _Problem(x, y, classes or int(y.max()) + 1, torch.device(device))
    fits = {}
    path = [] if start is None else [_Point(start.c, problem.centred(start.weight, start.bias), math.inf)]
    for c in sorted({*cs, *(problem.lead(min(cs)) if start is None else ())}):
        path.append(problem.minimise(c, path, tolerance, max_steps))
        fits[c] = problem.fit(path[-1])
        del path[:-2]
    return [fits[c] for c in cs]


@dataclass
class _Point:
    """A point on the path of Cs: theta (classes, D + 1), its loss without the penalty, and the L-BFGS history.

    The history holds pairs of a step and the change of the cross-entropy's gradient along it.
    """

    c: float
    theta: Tensor
    cross_entropy: float
    steps: int = 0
    history: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Problem:
    """The objective over theta = (weights, bias) of centred features: (classes, D + 1), bias last."""

    def __init__(self, x: Rows, y: np.ndarray, classes: int, device: torch.device) -> None:
        self.x = resident(x, device) if device.type == "cuda" else x
        self.classes, self.device = classes, device
        self.y = torch.from_numpy(np.asarray(y, np.int64)).to(device)
        self.n, self.d = x.shape
        self.mean, covariance = _moments(x, classes, device)
        values, self.axes = torch.linalg.eigh(covariance)
        self.spread = values.clamp_min(0).float()  # variances along the axes, (D,)
        self.axes = self.axes.float()
        self.counts = torch.bincount(self.y, minlength=classes)
        rows = min(len(x), _rows(x, classes, device))
        self._buffers = torch.empty(2, rows, classes, device=device)  # a block's logits and probabilities

    def lead(self, c: float) -> Iterator[float]:
        """Yield Cs below the first one, down to where the penalty is as strong as the data.

        The optimum for a weak penalty is far from zero, where the path starts.
        """
        while 1 / (c * self.n) < self.spread.mean().item() / self.classes:
            c /= 10
            yield c

    def centred(self, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(self.device)
        return torch.cat([weight, (bias.to(self.device) + weight @ self.mean)[:, None]], 1)

    def fit(self, point: _Point) -> Logistic:
        weight, bias = self.plain(point.theta)
        return Logistic(point.c, weight.cpu(), bias.cpu(), self.penalised(point, 1 / (point.c * self.n)), point.steps)

    def plain(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and bias for features that are not centred."""
        weight = theta[:, :-1].contiguous()
        return weight, theta[:, -1] - weight @ self.mean

    def penalised(self, point: _Point, penalty: float) -> float:
        return point.cross_entropy + penalty / 2 * point.theta[:, :-1].double().square().sum().item()

    def value(self, theta: Tensor) -> tuple[float, Tensor]:
        """Compute the mean cross-entropy and its gradient in one pass over the data."""
        weight, bias = self.plain(theta)
        gradient = torch.zeros_like(weight)
        sums = torch.zeros(self.classes, device=self.device)
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        for block, labels in self._labelled():
            logits, p = (buffer[: len(block)] for buffer in self._buffers)
            torch.addmm(bias, block, weight.T, out=logits)
            top, where = logits.max(1, keepdim=True)
            own = logits.gather(1, labels)
            torch.softmax(logits, 1, out=p)
            loss += (top - own - p.gather(1, where).log()).sum(dtype=torch.float64)  # the largest p never underflows
            sums += p.sum(0)
            p.scatter_add_(1, labels, p.new_full((1, 1), -1.0).expand(len(block), 1))
            gradient.addmm_(p.T, block)
        residual = (sums - self.counts) / self.n
        gradient = gradient.div_(self.n).addr_(residual, self.mean, alpha=-1)
        return loss.item() / self.n, torch.cat([gradient, residual[:, None]], 1)

    def confusion(self, theta: Tensor) -> Tensor:
        """Compute the mean of p (1 - p) for each class: (classes,)."""
        weight, bias = self.plain(theta)
        spread = torch.zeros(self.classes, device=self.device)
        for block, _ in self._labelled():
            p = torch.softmax(torch.addmm(bias, block, weight.T), 1)
            spread += p.sum(0) - p.square_().sum(0)
        return (spread / self.n).clamp_min(1e-12)

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        row = 0
        for block in _blocks(self.x, self.classes, self.device):
            yield block, self.y[row : row + len(block), None]
            row += len(block)

    def preconditioner(self, theta: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
        """Return a function that applies the inverse of a Hessian, diagonal in class and axis, to a gradient."""
        confusion = self.confusion(theta)
        scale = 1 / (torch.outer(confusion, self.spread) + penalty)
        axes = self.axes

        def apply(gradient: Tensor) -> Tensor:
            along = (gradient[:, :-1] @ axes).mul_(scale)
            return torch.cat([along @ axes.T, (gradient[:, -1] / confusion)[:, None]], 1)

        return apply

    def minimise(self, c: float, path: Sequence[_Point], tolerance: float, max_steps: int) -> _Point:
        """Run preconditioned L-BFGS from the extrapolated path, first with fast matrix products, then in float32."""
        penalty = 1 / (c * self.n)
        with _quick_products():
            at, gradient = self._begin(c, path, penalty)
            precondition = self.preconditioner(at.theta, penalty)
            at, gradient = self._descend(at, gradient, penalty, precondition, QUICK * tolerance, max_steps, STALLED)
        at.cross_entropy, gradient = self.value(at.theta)
        at, _ = self._descend(at, gradient, penalty, precondition, tolerance, max_steps)
        if at.steps < max_steps:
            return at
        raise ProbeError(
            f"the logistic regression did not converge in {max_steps} steps at C {c:g}; "
            "standardise the features or leave out the weakest penalty."
        )

    def _descend(
        self,
        at: _Point,
        gradient: Tensor,
        penalty: float,
        precondition: Callable[[Tensor], Tensor],
        tolerance: float,
        max_steps: int,
        stalled: int | None = None,
    ) -> tuple[_Point, Tensor]:
        """Take steps until the quadratic model expects a decrease below the tolerance, or progress stalls."""
        best, best_at = math.inf, at.steps
        losses = [self.penalised(at, penalty)]
        while at.steps < max_steps:
            # The history describes the cross-entropy alone. The penalty's part is exact for any C.
            history = [(moved, _ridge(changed, moved, penalty)) for moved, changed in at.history]
            full = _ridge(gradient, at.theta, penalty)
            direction = _two_loops(full, history, precondition).neg_()
            slope = _dot(direction, full)
            expected = -slope / 2  # decrease of the loss
            if expected < best / 2:
                best, best_at = expected, at.steps
            if expected < tolerance or (stalled and at.steps - best_at >= stalled):
                break
            at, gradient = self._search(at, gradient, direction, slope, penalty)
            losses.append(self.penalised(at, penalty))
            if len(losses) > FLAT and losses[-1 - FLAT] - losses[-1] < tolerance:
                break  # float32 rounding prevents any further decrease, even if the gradient suggests one
        return at, gradient

    def _begin(self, c: float, path: Sequence[_Point], penalty: float) -> tuple[_Point, Tensor]:
        """Start at zero, at the last optimum, or at the extrapolation of the last two in log C if that is better."""
        if not path:
            theta = torch.zeros(self.classes, self.d + 1, device=self.device)
            loss, gradient = self.value(theta)
            return _Point(c, theta, loss), gradient
        last = path[-1]
        if len(path) > 1:
            reach = math.log(c / last.c) / math.log(last.c / path[-2].c)
            theta = last.theta + reach * (last.theta - path[-2].theta)
            loss, gradient = self.value(theta)
            ahead = _Point(c, theta, loss, 0, last.history)
            if self.penalised(ahead, penalty) < self.penalised(last, penalty):
                return ahead, gradient
        loss, gradient = self.value(last.theta)
        return _Point(c, last.theta, loss, 0, last.history), gradient

    def _search(
        self, at: _Point, gradient: Tensor, direction: Tensor, slope: float, penalty: float
    ) -> tuple[_Point, Tensor]:
        """Search along a direction for a sufficient decrease (Armijo), by quadratic interpolation from a full step."""
        length, before = 1.0, self.penalised(at, penalty)
        for _ in range(30):
            moved = direction * length
            theta = at.theta + moved
            loss, after = self.value(theta)
            new = _Point(at.c, theta, loss, at.steps + 1, at.history)
            value = self.penalised(new, penalty)
            if value <= before + 1e-4 * length * slope + SLACK * abs(before):
                changed = after - gradient
                if _dot(moved, _ridge(changed, moved, penalty)) > 0:
                    new.history = [*at.history[1 - HISTORY :], (moved, changed)]
                return new, after
            if math.isfinite(value):
                length = min(max(-slope * length**2 / (2 * (value - before - slope * length)), length / 10), length / 2)
            else:
                length /= 10
        raise ProbeError("the logistic regression found no step that lowers its loss; check the features for outliers.")


@contextmanager
def _quick_products() -> Iterator[None]:
    """Allow matrix products in bfloat16 or TF32, which are several times faster, where the hardware has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.sum(a * b, dtype=torch.float64).item()


def _ridge(gradient: Tensor, theta: Tensor, penalty: float) -> Tensor:
    """Add the gradient of the penalty, which does not include the bias (last column)."""
    penalised = gradient.clone()
    penalised[:, :-1] += penalty * theta[:, :-1]
    return penalised


def _two_loops(
    gradient: Tensor, history: Sequence[tuple[Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Multiply a gradient by the inverse Hessian of L-BFGS (Nocedal and Wright, algorithm 7.4)."""
    q = gradient.clone()
    shares = []
    for moved, changed in reversed(history):
        shares.append(_dot(moved, q) / _dot(moved, changed))
        q.sub_(changed, alpha=shares[-1])
    r = precondition(q)
    for (moved, changed), share in zip(history, reversed(shares), strict=True):
        r.add_(moved, alpha=share - _dot(changed, r) / _dot(moved, changed))
    return r


def _moments(x: Rows, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the mean (D,) float32 and the covariance (D, D) float64."""
    n, d = x.shape
    total = torch.zeros(d, dtype=torch.float64, device=device)
    products = torch.zeros(d, d, dtype=torch.float64, device=device)
    shift: Tensor | None = None
    for block in _blocks(x, classes, device):
        if not torch.isfinite(block).all():
            raise ProbeError("the features hold values that are not finite (NaN or infinite); check the encoder.")
        if shift is None:
            shift = block.mean(0)  # near the mean, float32 products keep enough digits
        centred = block - shift
        total += centred.sum(0, dtype=torch.float64)
        products += (centred.T @ centred).double()
    assert shift is not None
    off = total / n
    return (shift.double() + off).float(), products / n - torch.outer(off, off)


def resident(x: Rows, device: torch.device) -> Rows:
    """Read features onto the device if they take less than half of its free memory; else return them as they are.

    Args:
        x: (N, D) features.
        device: The device that computes.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if 4 * math.prod(x.shape) > free // 2:
        return x
    features = torch.empty(tuple(x.shape), device=device)
    start = 0
    for block in _blocks(x, 1, device):
        features[start : start + len(block)] = block
        start += len(block)
    return cast(Rows, features)


def _blocks(x: Rows, classes: int, device: str | torch.device = "cpu") -> Iterator[Tensor]:
    rows = _rows(x, classes, torch.device(device))
    for start in range(0, len(x), rows):
        yield torch.as_tensor(x[start : start + rows], dtype=torch.float32, device=device)


def _rows(x: Rows, classes: int, device: torch.device) -> int:
    return max(256, (CUDA_CELLS if device.type == "cuda" else CELLS) // max(classes, x.shape[1]))
