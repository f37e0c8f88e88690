"""Tables of images: a data set of the Hub, Parquet files of any writer, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from pivot_hub.errors import DataError, shown_text

_SAVED = ("dataset_dict.json", "state.json")  # in the folder of a saved DatasetDict, and of a saved Dataset


def is_table(place: Path) -> bool:
    """Return whether a path is a Parquet file, or a folder of Parquet files or of a saved data set."""
    if place.is_file():
        return place.suffix == ".parquet"
    if not place.is_dir():
        return False
    return is_saved(place) or next(place.rglob("*.parquet"), None) is not None


def is_saved(place: Path) -> bool:
    """Return whether a path is a folder that `save_to_disk` wrote."""
    return any((place / name).is_file() for name in _SAVED)


def load_tables(data: str, revision: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """Load the splits of a data set, with each column of stored images as an undecoded `datasets.Image`.

    Args:
        data: Hub name, or a path for which `is_table` is true.
        revision: Revision of a Hub data set.
        streaming: Whether a Hub data set is read row by row and not downloaded.

    Returns:
        A `datasets.Dataset` for each split, or a `datasets.IterableDataset` where it is streamed.

    Raises:
        DataError: The data set cannot be loaded.
    """
    place = Path(data)
    try:
        if is_saved(place):
            loaded = datasets.load_from_disk(data)
            loaded = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)
        elif place.is_file():
            loaded = datasets.load_dataset("parquet", data_files={"train": data})
        else:
            loaded = datasets.load_dataset(data, revision=revision, streaming=streaming)
        return {name: _with_images(table) for name, table in loaded.items()}
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data {data!r} cannot be loaded ({shown_text(reason, 160)}); give a folder, or a data set that can be "
            "reached."
        ) from error


def image_columns(table: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Return the names of a table's image columns."""
    return [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]


def _with_images(table: Any) -> Any:
    """Cast columns of images, and of the bytes of images, to undecoded images."""
    if table.features is None:  # of a stream, whose first rows tell them
        table = table._resolve_features()
    for name, feature in table.features.items():
        if _stores_images(feature):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _stores_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # bytes and path, as the datasets library stores images, without its note of that
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")
