"""Towers of native resolution: how images of their own shapes enter, and how tokens fold back into maps (H, W, D).

This file is copied into every published encoder, so it imports torch only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How a tower takes a batch of images of different shapes, besides `pixel_values`.

    Args:
        inputs: Names of the image processor's outputs that describe the shapes.
        arguments: Names of the tower's arguments for them.
        grids: Function that returns the patches (height, width) of each image, from these outputs and the config.
        rows: Function that brings the patches of one image (height * width, D), in the tower's order, into rows
            (height, width, D); it takes the tokens, height, width, config and the patches a side that are merged.
        tiles: Whether the tower pads an image to tiles (images, 1, tiles, 1 + N, D), of which each begins with a CLS.
    """

    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    grids: Callable[..., list[tuple[int, int]]]
    rows: Callable[..., torch.Tensor] = lambda tokens, height, width, *_: tokens.unflatten(0, (height, width))
    tiles: bool = False


def _grids_of_thw(inputs, config):
    grids = inputs["image_grid_thw"].tolist()
    if any(frames != 1 for frames, _, _ in grids):
        raise ValueError("videos have no feature map; give images, whose image_grid_thw starts with 1.")
    return [(height, width) for _, height, width in grids]


def _grids_of_sizes(inputs, config):
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return [(height // config.patch_size, width // config.patch_size) for height, width in sizes]


def _grids_of_positions(inputs, config):
    # Positions are (x, y), and (-1, -1) where an image is padded.
    return [(int(p[:, 1].max()) + 1, int(p[:, 0].max()) + 1) for p in inputs["image_position_ids"]]


def _grids_of_tiles(inputs, config):
    side = config.image_size // config.patch_size
    tiles = [config.supported_aspect_ratios[i - 1] for i in inputs["aspect_ratio_ids"].flatten().tolist()]
    return [(rows * side, columns * side) for rows, columns in tiles]


def _rows_of_blocks(tokens, height, width, config, merge):
    """Sort patches that lie together with those that they will be merged with."""
    blocks = tokens.unflatten(0, (height // merge, width // merge, merge, merge))
    return blocks.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _rows_of_windows(tokens, height, width, config, merge):
    """Sort blocks of patches that lie together with those of their window of attention."""
    side = config.window_size // config.patch_size // merge
    order = _window_order(height // merge, width // merge, side)
    blocks = tokens.unflatten(0, (len(order), merge * merge))[order.argsort().to(tokens.device)]
    return _rows_of_blocks(blocks.flatten(0, 1), height, width, config, merge)


def _window_order(rows, columns, side):
    """Return the blocks of a grid in the order of its windows of `side` x `side` blocks."""
    blocks = torch.arange(rows * columns).unflatten(0, (rows, columns))
    return torch.cat([part.flatten() for strip in blocks.split(side) for part in strip.split(side, dim=1)])


LAYOUTS = {
    "grid_thw": Layout(("image_grid_thw",), ("grid_thw",), _grids_of_thw),
    "grid_thw in blocks": Layout(("image_grid_thw",), ("grid_thw",), _grids_of_thw, _rows_of_blocks),
    "grid_thw in windows": Layout(("image_grid_thw",), ("grid_thw",), _grids_of_thw, _rows_of_windows),
    "image_sizes": Layout(("image_sizes",), ("image_sizes",), _grids_of_sizes),
    "spatial_shapes": Layout(
        ("pixel_attention_mask", "spatial_shapes"),
        ("pixel_attention_mask", "spatial_shapes"),
        lambda inputs, config: [tuple(shape) for shape in inputs["spatial_shapes"].tolist()],
    ),
    "position_ids": Layout(("image_position_ids",), ("pixel_position_ids",), _grids_of_positions),
    "tiles": Layout(
        ("aspect_ratio_ids", "aspect_ratio_mask"),
        ("aspect_ratio_ids", "aspect_ratio_mask"),
        _grids_of_tiles,
        tiles=True,
    ),
}


def merge_side(config, merge):
    """Return how many patches a side the tower joins to one token at its end, 1 if it joins none.

    Args:
        config: Native config of the tower.
        merge: Name of the config's entry, see `Backbone.merge`.
    """
    side = 1 if merge is None else getattr(config, merge)
    return side if isinstance(side, int) else side[0]


def to_maps(hidden, grids, layout, config, merge=1):
    """Fold the tokens of a batch of images into one map for each image.

    Args:
        hidden: Tokens of all images one after the other (..., N, D) without padding, or padded to the longest image
            (B, N, D); tokens are patches, or were merged from `merge` x `merge` patches.
        grids: Patches (height, width) of each image.
        layout: Name of the tower's layout in LAYOUTS.
        config: Native config of the tower.
        merge: Patches a side that the tower joins to one token.

    Returns:
        One map (H, W, D) for each image, rows from top to bottom.

    Raises:
        ValueError: The number of tokens is not that of the grids.
    """
    if LAYOUTS[layout].tiles:
        return _maps_of_tiles(hidden, grids, config)
    lengths = [height * width for height, width in grids]
    if hidden.dim() == 3 and hidden.shape[0] == len(grids):
        return [h[:n].unflatten(0, grid) for h, n, grid in zip(hidden, lengths, grids, strict=True)]
    tokens = hidden.flatten(0, -2)
    if len(tokens) == sum(lengths):
        parts = tokens.split(lengths)
        rows = LAYOUTS[layout].rows
        return [rows(part, *grid, config, merge) for part, grid in zip(parts, grids, strict=True)]
    grids = [(height // merge, width // merge) for height, width in grids]
    lengths = [height * width for height, width in grids]
    if len(tokens) != sum(lengths):
        raise ValueError(f"{len(tokens)} tokens do not fill the grids {grids}.")
    return [part.unflatten(0, grid) for part, grid in zip(tokens.split(lengths), grids, strict=True)]


def _maps_of_tiles(hidden, grids, config):
    """Join the tiles of each image (images, 1, tiles, 1 + N, D) and drop their CLS tokens."""
    side = config.image_size // config.patch_size
    maps = []
    for tiles, (height, width) in zip(hidden.flatten(0, 1), grids, strict=True):
        rows, columns = height // side, width // side
        patches = tiles[: rows * columns, 1 : 1 + side * side].unflatten(1, (side, side)).unflatten(0, (rows, columns))
        maps.append(patches.transpose(1, 2).flatten(0, 1).flatten(1, 2))
    return maps
