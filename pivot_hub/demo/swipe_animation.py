"""The swipe between both saliency maps as an animated picture, for pages and chats that show no controls."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pivot_hub.demo.comparison import Comparison
from pivot_hub.explain.gradcam import Method
from pivot_hub.explain.heatmaps import COLOURS, densities, outline, shown_size, stretch, translucent

FRAMES, FRAME_MS = 24, 90  # of one way and back
LABEL_PX = 24
MAP_OPACITY = 0.85


def draw_swipe(comparison: Comparison, method: Method = "gradcam", colours: str = COLOURS[0]) -> bytes:
    """Draw the first map left of a divider and the second one right of it, as the divider moves there and back.

    Args:
        comparison: Comparison of two MLLMs.
        method: Method of the saliency maps.
        colours: Colour scale of the maps, which both share.

    Returns:
        An animated WebP that repeats.
    """
    subject = comparison.subject
    size = shown_size(subject.image)
    grids = [stretch(m, size) for m in densities([result.maps[method] for result in comparison.results])]
    highest = max(float(grid.max()) for grid in grids) or 1.0
    grey = subject.image.convert("L").resize(size).convert("RGBA")
    sides = []
    for grid in grids:
        heat = translucent(grid, colours, 0, highest, 0)
        heat.putalpha(heat.getchannel("A").point(lambda alpha: round(alpha * MAP_OPACITY)))
        side = Image.alpha_composite(grey, heat)
        if subject.mask is not None:
            side = Image.alpha_composite(side, outline(subject.mask, size).convert("RGBA"))
        sides.append(side.convert("RGB"))
    shares = (1 - np.cos(2 * np.pi * np.arange(FRAMES) / FRAMES)) / 2
    frames = [_frame(sides, round(share * size[0]), [r.name for r in comparison.results]) for share in shares]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, quality=80)
    return file.getvalue()


def _frame(sides: list[Image.Image], divider: int, names: list[str]) -> Image.Image:
    """Draw one frame, with the first side left of the divider, and both names below."""
    width, height = sides[0].size
    frame = Image.new("RGB", (width, height + LABEL_PX), "white")
    frame.paste(sides[1], (0, 0))
    frame.paste(sides[0].crop((0, 0, divider, height)), (0, 0))
    draw = ImageDraw.Draw(frame)
    draw.line([(divider, 0), (divider, height)], "white", 2)
    font = ImageFont.load_default(14)
    draw.text((4, height + 4), names[0], "black", font)
    draw.text((width - 4, height + 4), names[1], "black", font, anchor="ra")
    return frame
