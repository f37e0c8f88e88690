"""The work behind the mode for any two encoders: a view state becomes maps, and these become panels and numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.demo.cropping import crop_for_encoders
from pivot_hub.demo.encoder_cache import EncoderCache
from pivot_hub.demo.encoder_set import EncoderInfo, EncoderMap, EncoderNames, EncoderSetInfo, MapRequest
from pivot_hub.demo.encoder_state import EncoderState
from pivot_hub.demo.html import same_place
from pivot_hub.demo.model_bundle import Progress
from pivot_hub.demo.service import read_reduced
from pivot_hub.demo.view_state import decode_from_link
from pivot_hub.demo.worker import WorkerPool

ON_PHOTOGRAPHS = (
    "The built-in encoders know nothing but synthetic scenes of shapes: on another image, their maps mean little. Name "
    "other encoders for photographs."
)
FROM_A_LINK = "An image of this link is a reduced copy: maps may differ from those of the original."


@dataclass(frozen=True)
class EncoderView:
    """Maps with the view state that they are shown in.

    Args:
        state: View state.
        info: Description of the encoders.
        image: The image.
        other: The second image; None if the view does not need it.
        maps: Map of each encoder.
        notes: Sentences that are shown beside the maps.
    """

    state: EncoderState
    info: EncoderSetInfo
    image: Image.Image
    other: Image.Image | None
    maps: tuple[EncoderMap, ...]
    notes: tuple[str, ...] = ()

    @property
    def finest(self) -> int:
        """Number of the encoder with the finest grid, on which the row and column of the view state are counted."""
        sizes = [shown.grid[0] * shown.grid[1] for shown in self.maps]
        return sizes.index(max(sizes))

    def with_patch(self, number: int, row: int, column: int) -> EncoderState:
        """Choose another patch.

        Args:
            number: Number of the encoder on whose grid the patch is counted.
            row: Row of the patch.
            column: Column of the patch.

        Returns:
            The view state with the patch at the same place of the finest grid.
        """
        grids = [np.empty((*self.maps[i].grid, 0)) for i in (number, self.finest)]
        row, column = same_place((row, column), *grids)
        return replace(self.state, row=row, column=column)

    def with_layer(self, number: int, layer: int, together: bool) -> EncoderState:
        """Choose the layer of one encoder.

        Args:
            number: Number of the encoder's column, from 0.
            layer: Index of its layer.
            together: Whether the other encoders follow to the same share of their depth.

        Returns:
            The view state with the layers of all encoders; without any if all are the feature layers.
        """
        infos, layers = self.info.encoders, [shown.layer for shown in self.maps]
        if together:
            layers = [_following(infos[number], layer, info) for info in infos]
        layers[number] = layer
        all_own = layers == [info.own for info in infos]
        return replace(self.state, layers="" if all_own else ",".join(map(str, layers)))


class EncoderService:
    """Encoders, shared by all visitors. The data of one visitor are passed as arguments."""

    def __init__(
        self,
        encoders: EncoderCache,
        workers: WorkerPool,
        on_gpu: Callable[[Any], Any] = lambda function: function,
    ) -> None:
        """Store the parts.

        Args:
            encoders: Cache of the encoders.
            workers: Processes for the encoders that visitors name by Hub name.
            on_gpu: Decorator of the functions that run encoders; ZeroGPU's lends a GPU for the time of a call.
        """
        self.encoders, self.workers = encoders, workers

        # Under ZeroGPU the arguments are sent to another process: pass names, not encoders.
        @on_gpu
        def maps_by_name(names: EncoderNames, request: MapRequest) -> tuple[EncoderMap, ...]:
            return encoders.get(names).maps(request)

        @on_gpu
        def info_by_name(names: EncoderNames) -> EncoderSetInfo:
            return encoders.get(names).info

        self._maps_in_this_process, self._info_in_this_process = maps_by_name, info_by_name

    def load(self, names: EncoderNames, progress: Progress | None = None) -> EncoderSetInfo:
        """Load the encoders of these names unless they are loaded, and describe them.

        Args:
            names: Names that a visitor gave.
            progress: Callback that takes the finished share, from 0 to 1, and the next step.

        Raises:
            CheckpointError: A name is not allowed, an encoder cannot be loaded, or it exceeds a limit.
        """
        if names.names:
            self.encoders.check_names(names)
        if self.encoders.are_local(names):
            encoders = self.encoders.get(names, progress)
            if encoders.described is None:  # ZeroGPU's process does not keep it
                encoders.described = self._info_in_this_process(names)
            return encoders.described
        info: EncoderSetInfo = self.workers.info(names, progress)
        return info

    def view(
        self,
        state: EncoderState,
        upload: str | Path | None = None,
        other_upload: str | Path | None = None,
        grid: tuple[int, int] | None = None,
    ) -> EncoderView:
        """Compute the maps of a view state.

        Args:
            state: View state.
            upload: File of the visitor's own image, which takes precedence over the view state's image.
            other_upload: File of the visitor's own second image.
            grid: Grid that row and column are counted on, if it is that of another view.

        Returns:
            The maps; the view state contains the images of the uploads, and the patch that was taken.

        Raises:
            DataError: An image, a layer, a patch or the number of regions cannot be used, or the encoders have no
                drift.
            CheckpointError: An encoder cannot be loaded.
        """
        info = self.load(state.names)
        dataset = ShapesDataset(image_px=info.image_px)
        given, copies = {}, {}
        for name, file in (("image", upload), ("other_image", other_upload)):
            given[name] = read_reduced(file) if file else None
            copies[name] = None if file else decode_from_link(getattr(state, name))
        if upload or other_upload:
            state = state.with_images(*(given[name] or copies[name] for name in given))
        images = {
            name: crop_for_encoders(
                info, given[name] or copies[name] or dataset.scene("test", getattr(state, number)).render().image
            )
            for name, number in (("image", "scene"), ("other_image", "other_scene"))
        }
        image, other = images["image"], images["other_image"] if state.view == "matching" else None
        shown = ("image",) if other is None else ("image", "other_image")
        notes = [FROM_A_LINK] if any(copies[name] for name in shown) else []
        is_built_in = not state.names.names and self.encoders.trained_on_scenes
        if is_built_in and any(given[name] or copies[name] for name in shown):
            notes.append(ON_PHOTOGRAPHS)
        request = MapRequest(
            view=state.view,
            image=image,
            other=other,
            layers=state.layer_numbers,
            row=state.row,
            column=state.column,
            regions=state.regions,
            grid=grid,
        )
        if self.encoders.are_local(state.names):
            maps = self._maps_in_this_process(state.names, request)
        else:
            maps = self.workers.run(state.names, "maps", request)
        view = EncoderView(state, info, image, other, maps, tuple(notes))
        row, column = maps[view.finest].position
        return replace(view, state=replace(state, row=row, column=column))

    def figure(self, view: EncoderView) -> bytes:
        """Draw the images and the maps as one image, colour scale included, as PNG."""
        from pivot_hub.demo.encoder_figure import draw_encoders

        file = io.BytesIO()
        draw_encoders(view, file)
        return file.getvalue()

    def numbers(self, view: EncoderView) -> dict[str, Any]:
        """Return the content of the page as numbers, with the conditions they were computed in."""
        state = view.state
        encoders = [
            {
                "name": info.name,
                "origin": asdict(info.origin),
                "layer": info.labels[shown.layer],
                "feature_layer": info.labels[info.own],
                "layers": list(info.labels),
                "grid": list(shown.grid),
                "row": shown.position[0],
                "column": shown.position[1],
                "values": None if shown.values is None else np.round(shown.values, 5).tolist(),
                "note": shown.note,
                "matches": [asdict(match) for match in shown.matches],
                "basis": shown.basis if state.view == "colours" else None,
                "variance_share": shown.variance_share,
                "cka": shown.cka,
            }
            for info, shown in zip(view.info.encoders, view.maps, strict=True)
        ]
        return {
            "view": state.view,
            "scene": None if state.image else state.scene,
            "other_scene": None if state.other_image or view.other is None else state.other_scene,
            "regions": state.regions if state.view == "regions" else None,
            "encoders": encoders,
            "notes": list(view.notes),
            "link": f"?{state.query()}",
        }


def _following(leader: EncoderInfo, layer: int, info: EncoderInfo) -> int:
    """Return the layer of an encoder that corresponds to a layer of another one: their feature layers correspond."""
    if layer == leader.own:
        return info.own
    if len(info.labels) == len(leader.labels):
        return layer
    return round(layer / (len(leader.labels) - 1) * (len(info.labels) - 1))
