"""Views of patch features on maps made by hand, whose result is known."""

from __future__ import annotations

import numpy as np
import pytest

from pivot_hub.errors import DataError
from pivot_hub.explain.patch_views import (
    Match,
    are_related,
    best_matches,
    feature_drift,
    layer_thumbnails,
    patch_colours,
    patch_regions,
    similarity_to,
)

RNG = np.random.default_rng(0)
MEAN = 3 * RNG.normal(size=32)  # the common part that the features of all patches of an encoder have


def features(*shape: int, mean: np.ndarray | float = MEAN, seed: int = 1) -> np.ndarray:
    return (mean + np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def quarters(rows: int, columns: int) -> np.ndarray:
    """A map (rows, columns, 32) of four rectangles, each of one direction, with a little noise."""
    number = 2 * (np.arange(rows)[:, None] >= rows // 2) + (np.arange(columns)[None] >= columns // 4)
    return (np.eye(32)[number] + 0.01 * RNG.normal(size=(rows, columns, 32))).astype(np.float32)


def test_similarity_is_the_cosine_with_a_patch_of_another_image() -> None:
    grid = np.array([[[3.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    assert np.allclose(similarity_to(grid, np.array([5.0, 0.0])), [[1, 0], [-1, 0]])
    assert np.allclose(similarity_to(grid, np.array([1.0, 1.0])), [[0.5**0.5, 0.5**0.5], [-(0.5**0.5), 0]])


def test_best_matches_do_not_touch_each_other() -> None:
    similarities = np.zeros((4, 6))
    similarities[0, 0], similarities[1, 1], similarities[3, 5], similarities[2, 5] = 0.9, 0.8, 0.7, 0.6
    assert best_matches(similarities, 2) == [Match(0, 0, 0.9), Match(3, 5, 0.7)]
    assert len(best_matches(similarities, 99)) <= 6, "matches touch each other"
    assert best_matches(np.full((1, 1), -0.5), 3) == [Match(0, 0, -0.5)]


def test_a_patch_is_found_where_it_lies_in_the_other_image() -> None:
    image, other = features(4, 4, 32), features(5, 7, 32, seed=2)
    other[4, 2] = 2 * image[1, 3]
    best = best_matches(similarity_to(other, image[1, 3]), 3)[0]
    assert (best.row, best.column) == (4, 2)
    assert best.similarity == pytest.approx(1, abs=1e-6)


def test_related_encoders_share_colours_and_others_do_not() -> None:
    parent = quarters(8, 8) + MEAN.astype(np.float32)
    child = parent + 1e-3 * features(8, 8, 32, mean=0)
    stranger = features(8, 8, 32, mean=RNG.normal(size=32), seed=3)
    narrow = features(6, 6, 16, mean=1.0)
    assert are_related(parent, child)
    assert not are_related(parent, stranger)
    assert not are_related(parent, narrow)
    colours = patch_colours([parent, stranger, child, narrow])
    assert colours.bases == [0, 1, 0, 2]
    assert np.abs(colours.images[0].astype(int) - colours.images[2]).max() <= 4
    assert [image.shape for image in colours.images] == [(8, 8, 3)] * 3 + [(6, 6, 3)]
    assert colours.variance_shares[0] == colours.variance_shares[2] > 0.95
    assert colours.variance_shares[1] < 0.6


def test_colours_of_few_and_of_equal_patches_have_three_channels() -> None:
    for grid in (features(1, 1, 32), features(1, 2, 32), np.ones((4, 4, 32), np.float32)):
        colours = patch_colours([grid])
        assert colours.images[0].shape == (*grid.shape[:2], 3)
        assert 0 <= colours.variance_shares[0] <= 1


def test_regions_are_the_rectangles_and_have_one_number_in_all_encoders() -> None:
    fine, coarse = quarters(16, 8), quarters(8, 4)[..., ::-1].copy()
    first, second = patch_regions([fine, coarse], 4)
    assert len(np.unique(first)) == 4
    for rows in (slice(8), slice(8, 16)):
        for columns in (slice(2), slice(2, 8)):
            assert len(np.unique(first[rows, columns])) == 1
    assert np.array_equal(second.repeat(2, 0).repeat(2, 1), first)
    assert set(first[:, 2:].ravel()) == {0, 1}, "the largest regions come first"
    again = patch_regions([fine, coarse], 4)
    assert all(np.array_equal(a, b) for a, b in zip((first, second), again, strict=True))


def test_an_even_image_has_one_region() -> None:
    (labels,) = patch_regions([np.ones((4, 4, 8), np.float32)], 3)
    assert (labels == 0).all()


@pytest.mark.parametrize(("count", "most"), [(1, 12), (13, 12)])
def test_numbers_of_regions_out_of_range_are_refused(count: int, most: int) -> None:
    with pytest.raises(DataError, match=f"regions is {count}: it must be between 2 and {most}"):
        patch_regions([features(4, 4, 32)], count)
    with pytest.raises(DataError, match="regions is 5: it must be between 2 and 4"):
        patch_regions([features(4, 4, 32), features(2, 2, 32)], 5)


def test_drift_is_where_the_features_were_turned() -> None:
    first = features(4, 6, 32)
    second = 3 * first  # a scale is no drift
    second[2, 5] = -first[2, 5]
    drift = feature_drift(first, second)
    expected = np.zeros((4, 6))
    expected[2, 5] = 2
    assert np.allclose(drift.values, expected, atol=1e-5)
    assert drift.related
    assert drift.cka is not None
    assert feature_drift(first, first).cka == 1


def test_drift_of_strangers_is_marked_although_their_structure_may_be_equal() -> None:
    first = features(5, 5, 32)
    rotation, _ = np.linalg.qr(RNG.normal(size=(32, 32)))
    drift = feature_drift(first, (first @ rotation).astype(np.float32))
    assert not drift.related
    assert drift.cka == pytest.approx(1, abs=1e-5)
    assert drift.values.mean() > 0.5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4, 16), "features have 32 and 16 channels; choose encoders of one width"),
        ((4, 5, 32), "grids have 4 x 4 and 4 x 5 patches; choose encoders of one grid"),
    ],
)
def test_drift_of_other_widths_and_grids_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        feature_drift(features(4, 4, 32), features(*shape, mean=0.0))


def test_thumbnails_keep_the_shape_and_show_the_parts() -> None:
    small, large = layer_thumbnails([quarters(4, 8), quarters(56, 28)])
    assert small.shape == (4, 8, 3)
    assert large.shape == (14, 14, 3)
    corners = {tuple(large[row, column]) for row in (0, 13) for column in (0, 13)}
    assert len(corners) == 4
