"""Views of patch features that compare encoders: similarity, matches, colours, regions, and drift."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from pivot_hub.errors import DataError
from pivot_hub.explain.patch_features import principal_colours
from pivot_hub.mllm.similarity import linear_cka

FEWEST_REGIONS, MOST_REGIONS = 2, 12
RELATED = 0.5  # cosine of two encoders' mean features from which on their channels mean the same
THUMBNAIL_PATCHES = 14  # longer side of a thumbnail


@dataclass(frozen=True)
class Match:
    """A patch of another image that resembles the chosen one.

    Args:
        row: Row of the patch, from 0 at the top.
        column: Column of the patch, from 0 at the left.
        similarity: Cosine similarity with the chosen patch.
    """

    row: int
    column: int
    similarity: float


@dataclass(frozen=True)
class PatchColours:
    """Patch features of several encoders as colours.

    Args:
        images: Colours (H, W, 3) in uint8 of each encoder.
        bases: Number of the basis that each encoder's colours come from; encoders of one number share it.
        variance_shares: Share of the variance that each encoder's basis explains.
    """

    images: list[np.ndarray]
    bases: list[int]
    variance_shares: list[float]


@dataclass(frozen=True)
class Drift:
    """How far the features of an image moved from one encoder to another.

    Args:
        values: 1 - cosine (H, W) of the two features of each patch, from 0 to 2.
        cka: Linear CKA of both maps, which a rotation of the channels does not change; None if a map is constant.
        related: Whether the channels of both encoders mean the same, so that the cosine of their features says
            something.
    """

    values: np.ndarray
    cka: float | None
    related: bool


def similarity_to(features: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Compute the cosine similarity of every patch with a vector, such as a patch of another image.

    Args:
        features: Patch features (H, W, D).
        vector: Features (D,).

    Returns:
        Similarities (H, W) from -1 to 1; 0 where the features, or the vector, are zero.
    """
    return _unit(features) @ _unit(vector)


def best_matches(similarities: np.ndarray, count: int) -> list[Match]:
    """Find the most similar patches, best first, of which none touches another.

    Args:
        similarities: Similarities (H, W) with the chosen patch.
        count: Largest number of matches.
    """
    left = similarities.astype(np.float64).copy()
    matches: list[Match] = []
    while len(matches) < count and np.isfinite(left).any():
        row, column = map(int, np.unravel_index(left.argmax(), left.shape))
        matches.append(Match(row, column, float(similarities[row, column])))
        left[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = -np.inf
    return matches


def are_related(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether the channels of two encoders mean the same, as those of encoders with one parent do.

    Encoders of one width that were trained apart have unrelated channels: their mean features, which dominate all
    patches, then point in unrelated directions.

    Args:
        first: Patch features (H, W, D) in one encoder.
        second: Patch features (H', W', E) of the same image in the other.
    """
    if first.shape[-1] != second.shape[-1]:
        return False
    return float(_unit(first.mean((0, 1))) @ _unit(second.mean((0, 1)))) >= RELATED


def patch_colours(encoders: Sequence[np.ndarray]) -> PatchColours:
    """Show the first three principal components of patch features as red, green and blue.

    Encoders whose channels mean the same share one basis, so that a colour means the same in each; see `are_related`.
    The others have a basis of their own.

    Args:
        encoders: Patch features (H, W, D) of one image in each encoder.
    """
    groups: list[list[int]] = []
    for number, features in enumerate(encoders):
        for group in groups:
            if are_related(encoders[group[0]], features):
                group.append(number)
                break
        else:
            groups.append([number])
    colours = PatchColours([np.empty(0)] * len(encoders), [0] * len(encoders), [0.0] * len(encoders))
    for basis, group in enumerate(groups):
        images, share, _ = principal_colours([encoders[number] for number in group])
        for number, image in zip(group, images, strict=True):
            colours.images[number] = image
            colours.bases[number], colours.variance_shares[number] = basis, share
    return colours


def patch_regions(encoders: Sequence[np.ndarray], count: int, seed: int = 0) -> list[np.ndarray]:
    """Divide an image into regions of similar features, in each encoder by itself (k-means on features of length 1).

    The regions of each further encoder get the numbers of those of the first one that they overlap most.

    Args:
        encoders: Patch features (H, W, D) of one image in each encoder.
        count: Number of regions; fewer are found where fewer patches differ.
        seed: Seed of the first centres.

    Returns:
        Numbers (H, W) of the regions from 0, in each encoder.

    Raises:
        DataError: The number of regions is out of range, or larger than the number of patches.
    """
    most = min(MOST_REGIONS, *(features.shape[0] * features.shape[1] for features in encoders))
    if not FEWEST_REGIONS <= count <= most:
        raise DataError(f"regions is {count}: it must be between {FEWEST_REGIONS} and {most} in these encoders.")
    all_labels = []
    for features in encoders:
        rows = _unit(features).reshape(-1, features.shape[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer patches differ than regions were asked for
            labels = KMeans(count, n_init=4, random_state=seed).fit_predict(rows)
        all_labels.append(labels.reshape(features.shape[:2]))
    first = _by_size(all_labels[0], count)
    return [first, *(_renumbered(first, labels, count) for labels in all_labels[1:])]


def feature_drift(first: np.ndarray, second: np.ndarray) -> Drift:
    """Compare the features of each patch in two encoders.

    Args:
        first: Patch features (H, W, D) in one encoder.
        second: Patch features (H, W, D) of the same image in the other.

    Raises:
        DataError: The encoders differ in the number of channels or of patches; the message names both.
    """
    (*grid, width), (*other_grid, other_width) = first.shape, second.shape
    if width != other_width:
        raise DataError(
            f"Drift compares the same channels of two encoders, but their features have {width:,} and {other_width:,} "
            "channels; choose encoders of one width, or another view."
        )
    if grid != other_grid:
        raise DataError(
            f"Drift compares the same patches of two encoders, but their grids have {grid[0]} x {grid[1]} and "
            f"{other_grid[0]} x {other_grid[1]} patches; choose encoders of one grid, or another view."
        )
    values = 1 - (_unit(first) * _unit(second)).sum(-1)
    x, y = (torch.from_numpy(features.reshape(-1, width)) for features in (first, second))
    return Drift(values.clip(0, 2), linear_cka(x, y), are_related(first, second))


def layer_thumbnails(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Show each layer of an encoder as a small image of its principal components, each layer on a basis of its own.

    Args:
        maps: Patch features (H, W, D) of each layer.

    Returns:
        Colours (h, w, 3) in uint8 of each layer, at most THUMBNAIL_PATCHES a side.
    """
    return [principal_colours([_reduced(features)])[0][0] for features in maps]


def _unit(features: np.ndarray) -> np.ndarray:
    """Divide features (..., D) by their length; zero stays zero."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def _reduced(features: np.ndarray) -> np.ndarray:
    """Average a map (H, W, D) to at most THUMBNAIL_PATCHES a side."""
    size = (min(features.shape[0], THUMBNAIL_PATCHES), min(features.shape[1], THUMBNAIL_PATCHES))
    channels_first = torch.from_numpy(features).permute(2, 0, 1)
    return torch.nn.functional.adaptive_avg_pool2d(channels_first, size).permute(1, 2, 0).numpy()


def _by_size(labels: np.ndarray, count: int) -> np.ndarray:
    """Number regions (H, W) by their size, the largest one 0."""
    order = np.argsort(-np.bincount(labels.ravel(), minlength=count), kind="stable")
    return np.argsort(order)[labels]


def _renumbered(first: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Give regions (H', W') the numbers of the regions (H, W) of the first encoder that they overlap most."""
    rows = (np.arange(labels.shape[0]) * 2 + 1) * first.shape[0] // (2 * labels.shape[0])
    columns = (np.arange(labels.shape[1]) * 2 + 1) * first.shape[1] // (2 * labels.shape[1])
    overlaps = np.zeros((count, count), int)
    np.add.at(overlaps, (labels, first[rows][:, columns]), 1)
    _, numbers = linear_sum_assignment(-overlaps)
    return np.asarray(numbers)[labels]
